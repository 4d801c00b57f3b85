/** A picture to paint on. A brush, rectangles and regions make a mask over the picture's raster; the end
of each stroke sends it. The page's answer is the changed picture, which comes in as data.
*/

const TOOLS = { brush: "Brush", rectangle: "Rectangle", region: "Superpixel" };
const KEPT = 50; // strokes that can be taken back
const PAINT = [224, 92, 38, 150]; // what waits for its answer
const HELP = "Arrow keys move the cursor, Enter paints, [ and ] change the size, E erases, Ctrl+Z undoes.";

function button(text, act) {
  const made = element("button", "", text);
  made.type = "button";
  made.addEventListener("click", act);
  return made;
}

function build(root) {
  const bar = element("div", "bar");
  const tools = element("div", "tools");
  tools.setAttribute("role", "group");
  tools.setAttribute("aria-label", "Tool");
  const canvas = element("canvas", "canvas");
  canvas.tabIndex = 0;
  canvas.setAttribute("role", "application"); // keys are ours, also in a reader's browse mode
  canvas.setAttribute("aria-description", HELP);
  const picture = element("span", "hidden");
  picture.setAttribute("role", "img");
  const status = element("span", "hidden");
  status.setAttribute("aria-live", "polite");
  const size = element("input");
  Object.assign(size, { type: "range", min: "1", max: "30", value: "8" });
  size.setAttribute("aria-label", "Size of the brush, in percent of the picture's shorter side");
  size.addEventListener("keydown", (event) => event.stopPropagation());
  const state = { root, canvas, picture, status, size, tool: "brush", erase: false, history: [] };
  state.tools = Object.entries(TOOLS).map(([name, text]) => {
    const made = button(text, () => choose(state, name));
    made.dataset.tool = name;
    return made;
  });
  tools.append(...state.tools);
  state.eraser = button("Erase", () => erasing(state, !state.erase));
  state.undo = button("Undo", () => undo(state));
  state.clear = button("Clear", () => {
    before(state);
    state.mask.fill(0);
    done(state);
  });
  const label = element("label", "size", "Size");
  label.append(size);
  bar.append(tools, state.eraser, state.undo, state.clear, label);
  root.append(bar, canvas, picture, status);
  choose(state, "brush");
  erasing(state, false);
  listen(state);
  state.resized = new ResizeObserver(() => draw(state));
  state.resized.observe(canvas);
  return state;
}

function choose(state, name) {
  state.tool = name;
  state.corner = null;
  for (const made of state.tools) made.setAttribute("aria-pressed", made.dataset.tool === name);
  state.size.disabled = name !== "brush";
  draw(state);
}

function erasing(state, erase) {
  state.erase = erase;
  state.eraser.setAttribute("aria-pressed", erase);
}

// ---------------------------------------------------------------- the mask

function unpacked(text, count) {
  const bytes = atob(text);
  const mask = new Uint8Array(count);
  for (let i = 0; i < count; i++) mask[i] = (bytes.charCodeAt(i >> 3) >> (7 - (i & 7))) & 1;
  return mask;
}

function packed(mask) {
  const bytes = new Uint8Array(Math.ceil(mask.length / 8));
  for (let i = 0; i < mask.length; i++) if (mask[i]) bytes[i >> 3] |= 128 >> (i & 7);
  let text = "";
  for (const byte of bytes) text += String.fromCharCode(byte);
  return btoa(text);
}

function before(state) {
  state.history.push(state.mask.slice());
  if (state.history.length > KEPT) state.history.shift();
}

function done(state) {
  const last = state.history.at(-1);
  if (last && last.every((value, i) => value === state.mask[i])) state.history.pop(); // nothing new
  else state.send({ rows: state.rows, columns: state.columns, bits: packed(state.mask) });
  draw(state);
}

function undo(state) {
  const last = state.history.pop();
  if (!last) return;
  state.mask = last;
  state.send({ rows: state.rows, columns: state.columns, bits: packed(state.mask) });
  draw(state);
}

function radius(state) {
  return (Number(state.size.value) / 200) * Math.min(state.rows, state.columns);
}

function fill(state, from, to, inside) {
  const value = state.erase ? 0 : 1;
  for (let r = Math.max(from[0], 0); r <= Math.min(to[0], state.rows - 1); r++)
    for (let c = Math.max(from[1], 0); c <= Math.min(to[1], state.columns - 1); c++)
      if (inside(r, c)) state.mask[r * state.columns + c] = value;
}

// All cells whose centre is within the brush of the line from one place to the other.
function line(state, [r0, c0], [r1, c1]) {
  const reach = Math.max(radius(state), 0.75);
  const length = (r1 - r0) ** 2 + (c1 - c0) ** 2;
  const low = [Math.min(r0, r1), Math.min(c0, c1)].map((v) => Math.floor(v - reach));
  const high = [Math.max(r0, r1), Math.max(c0, c1)].map((v) => Math.ceil(v + reach));
  fill(state, low, high, (r, c) => {
    const [y, x] = [r + 0.5 - r0, c + 0.5 - c0];
    const along = length ? Math.min(Math.max((y * (r1 - r0) + x * (c1 - c0)) / length, 0), 1) : 0;
    return (y - along * (r1 - r0)) ** 2 + (x - along * (c1 - c0)) ** 2 <= reach * reach;
  });
}

function rectangle(state, one, other) {
  const low = [0, 1].map((axis) => Math.floor(Math.min(one[axis], other[axis])));
  const high = [0, 1].map((axis) => Math.floor(Math.max(one[axis], other[axis])));
  fill(state, low, high, () => true);
}

function region(state, at) {
  const label = labelAt(state, at);
  const value = state.erase ? 0 : 1;
  state.regions.forEach((other, i) => {
    if (other === label) state.mask[i] = value;
  });
}

function labelAt(state, at) {
  const [r, c] = at.map(Math.floor);
  return state.regions[r * state.columns + c];
}

// ---------------------------------------------------------------- pointer and keys

function use(state, at) {
  if (state.tool === "brush") line(state, state.last ?? at, at);
  else if (state.tool === "region") region(state, at);
  state.last = at;
}

function listen(state) {
  const { canvas } = state;
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button || !state.mask || state.painting) return;
    canvas.setPointerCapture(event.pointerId);
    state.painting = true;
    state.last = null;
    state.at = state.corner = rasterAt(event, state.canvas, state);
    before(state);
    use(state, state.at);
    draw(state);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!state.mask) return;
    state.at = rasterAt(event, state.canvas, state);
    if (state.painting) use(state, state.at);
    draw(state);
  });
  const end = () => {
    if (!state.painting) return;
    if (state.tool === "rectangle") rectangle(state, state.corner, state.at);
    state.painting = false;
    state.last = state.corner = null;
    done(state);
  };
  canvas.addEventListener("pointerup", end);
  canvas.addEventListener("pointercancel", end);
  canvas.addEventListener("pointerleave", () => {
    if (state.painting) return;
    state.at = null;
    draw(state);
  });
  canvas.addEventListener("keydown", (event) => keys(event, state));
}

function keys(event, state) {
  if (event.altKey || event.shiftKey || !state.mask) return; // the page's own keys
  const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  const at = state.at ?? [state.rows / 2, state.columns / 2];
  if ((event.ctrlKey || event.metaKey) && event.key === "z") undo(state);
  else if (event.ctrlKey || event.metaKey) return;
  else if (step) {
    const far = Math.max(1, radius(state));
    const counts = [state.rows, state.columns];
    state.at = at.map((v, i) => Math.min(Math.max(v + far * step[i], 0), counts[i] - 1e-6));
    const [r, c] = state.at.map((v) => Math.floor(v) + 1);
    state.status.textContent = `row ${r} of ${state.rows}, column ${c} of ${state.columns}`;
  } else if (event.key === "Enter" || event.key === " ") press(state, at);
  else if (event.key === "[" || event.key === "]")
    state.size.value = Number(state.size.value) + (event.key === "]" ? 1 : -1);
  else if (event.key === "e") erasing(state, !state.erase);
  else return;
  event.preventDefault();
  event.stopPropagation();
  draw(state);
}

function press(state, at) {
  state.at = at;
  if (state.tool === "rectangle" && !state.corner) {
    state.corner = at;
    return;
  }
  before(state);
  state.last = null;
  if (state.tool === "rectangle") rectangle(state, state.corner, at);
  else use(state, at);
  state.last = state.corner = null;
  done(state);
}

// ---------------------------------------------------------------- drawing

function draw(state) {
  state.undo.disabled = !state.history.length;
  state.clear.disabled = !state.mask?.includes(1);
  const { canvas } = state;
  const [width, height] = [canvas.clientWidth, canvas.clientHeight].map((v) =>
    Math.round(v * devicePixelRatio));
  if (!state.mask || !width || !height) return;
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, width, height);
  if (state.image) context.drawImage(state.image, 0, 0, width, height);
  const scale = [height / state.rows, width / state.columns];
  waiting(state, context, width, height);
  outline(context, state.mask, state, scale, devicePixelRatio);
  if (state.at) cursor(state, context, scale);
}

// Paint that the picture does not show yet.
function waiting(state, context, width, height) {
  const pixels = new ImageData(state.columns, state.rows);
  let some = false;
  state.mask.forEach((value, i) => {
    if (!value || state.answered[i]) return;
    pixels.data.set(PAINT, 4 * i);
    some = true;
  });
  if (!some) return;
  const small = new OffscreenCanvas(state.columns, state.rows);
  small.getContext("2d").putImageData(pixels, 0, 0);
  context.imageSmoothingEnabled = false;
  context.drawImage(small, 0, 0, width, height);
  context.imageSmoothingEnabled = true;
}

function outline(context, mask, { rows, columns }, [tall, wide], unit) {
  const path = new Path2D();
  for (let r = 0; r < rows; r++)
    for (let c = 0; c < columns; c++) {
      const i = r * columns + c;
      if (c + 1 < columns && mask[i] !== mask[i + 1]) {
        path.moveTo((c + 1) * wide, r * tall);
        path.lineTo((c + 1) * wide, (r + 1) * tall);
      }
      if (r + 1 < rows && mask[i] !== mask[i + columns]) {
        path.moveTo(c * wide, (r + 1) * tall);
        path.lineTo((c + 1) * wide, (r + 1) * tall);
      }
    }
  stroke(context, path, unit);
}

function stroke(context, path, unit) {
  context.lineCap = "square";
  for (const [colour, width] of [["#000c", 3], ["#fff", 1.25]]) {
    context.strokeStyle = colour;
    context.lineWidth = width * unit;
    context.stroke(path);
  }
}

function cursor(state, context, [tall, wide]) {
  const path = new Path2D();
  const [r, c] = state.at;
  if (state.tool === "brush") {
    const reach = Math.max(radius(state), 0.75);
    path.ellipse(c * wide, r * tall, reach * wide, reach * tall, 0, 0, 2 * Math.PI);
  } else if (state.tool === "rectangle" && state.corner) {
    const [r0, c0] = state.corner;
    path.rect(c0 * wide, r0 * tall, (c - c0) * wide, (r - r0) * tall);
  } else if (state.tool === "region") {
    const label = labelAt(state, state.at);
    const own = state.regions.map((other) => (other === label ? 1 : 0));
    return outline(context, own, state, [tall, wide], devicePixelRatio);
  } else {
    path.arc(c * wide, r * tall, 3 * devicePixelRatio, 0, 2 * Math.PI);
  }
  stroke(context, path, devicePixelRatio);
}

// ---------------------------------------------------------------- what the page says

function regionsOf(runs, count) {
  const labels = new Uint16Array(count);
  let at = 0;
  for (let i = 0; i < runs.length; i += 2) {
    labels.fill(runs[i], at, at + runs[i + 1]);
    at += runs[i + 1];
  }
  return labels;
}

function show(state, source) {
  if (source === state.source) return;
  state.source = source;
  const image = new Image();
  image.onload = () => {
    if (state.source !== source) return; // a later one is on its way
    state.image = image;
    state.answered = state.next;
    draw(state);
  };
  image.src = source;
}

export default function ({ data, parentElement, setTriggerValue }) {
  const root = parentElement.querySelector(".brush");
  const state = (root.xattn ??= build(root));
  state.send = (mask) => setTriggerValue("paint", mask);
  const count = data.rows * data.columns;
  const known = unpacked(data.mask, count);
  if (state.subject !== data.subject || state.mask?.length !== count) {
    Object.assign(state, { rows: data.rows, columns: data.columns, mask: known.slice(), history: [] });
    Object.assign(state, { answered: known, at: null, corner: null, painting: false });
    state.regions = regionsOf(data.regions, count);
  } else if (state.stamp !== data.stamp) {
    before(state);
    state.mask = known.slice();
  }
  state.subject = data.subject;
  state.stamp = data.stamp;
  state.next = known;
  if (data.photo === state.source) state.answered = known;
  show(state, data.photo);
  state.canvas.style.setProperty("--aspect", data.aspect);
  state.canvas.setAttribute("aria-label", data.label);
  state.picture.setAttribute("aria-label", data.alt);
  if (state.said !== data.said) state.status.textContent = data.said;
  state.said = data.said;
  draw(state);
}
