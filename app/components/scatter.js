/** Photos as points on a canvas. A lasso or a rectangle chooses some, and so do the legend and the keyboard.

Two canvases lie on each other: the points, drawn when something changes, and what is being drawn. The browser
answers a choice by itself; the page is told of it afterwards. All text goes in as text.
*/

const NEAR = 14; // pixels within which a point is meant
const RAMP = ["#2a5fa8", "#6f78b5", "#a98aa0", "#cf8a62", "#ea6a1f"]; // of a scale, readable on both grounds

function numbers(packed) {
  const bytes = Uint8Array.from(atob(packed || ""), (c) => c.charCodeAt(0));
  return new Uint16Array(bytes.buffer);
}

function reader(column) {
  if (Array.isArray(column)) return (i) => column[i];
  const at = numbers(column.at);
  return (i) => column.texts[at[i]];
}

function build(state) {
  const { root } = state;
  state.bar = element("div", "bar");
  state.modes = {};
  for (const [mode, name] of [["lasso", "Lasso"], ["box", "Rectangle"]]) {
    const button = element("button", "", name);
    button.type = "button";
    button.addEventListener("click", () => setMode(state, mode));
    state.modes[mode] = button;
    state.bar.append(button);
  }
  state.clear = element("button", "", "Choose none");
  state.clear.type = "button";
  state.clear.addEventListener("click", () => choose(state, new Set()));
  state.count = element("span", "count");
  state.bar.append(state.clear, state.count);
  state.plane = element("div", "plane");
  state.points = element("canvas");
  state.points.setAttribute("aria-hidden", "true");
  state.drawing = element("canvas", "drawing");
  state.drawing.tabIndex = 0;
  state.drawing.setAttribute("role", "application");
  state.hint = element("div", "hint");
  state.hint.hidden = true;
  state.told = element("div", "told");
  state.told.setAttribute("aria-live", "polite");
  state.plane.append(state.points, state.drawing, state.hint);
  state.legend = element("div");
  root.replaceChildren(state.bar, state.legend, state.plane, state.told);
  listen(state);
  new ResizeObserver(() => redraw(state)).observe(state.plane);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redraw(state));
  setMode(state, "lasso");
}

function setMode(state, mode) {
  state.mode = mode;
  for (const [name, button] of Object.entries(state.modes)) button.setAttribute("aria-pressed", String(name === mode));
}

// ---------------------------------------------------------------------- drawing

function fitted(canvas, plane) {
  const ratio = devicePixelRatio || 1;
  const [width, height] = [plane.clientWidth, plane.clientHeight];
  if (canvas.width !== Math.round(width * ratio)) canvas.width = Math.round(width * ratio);
  if (canvas.height !== Math.round(height * ratio)) canvas.height = Math.round(height * ratio);
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return [context, width, height];
}

function redraw(state) {
  const [context, width, height] = fitted(state.points, state.plane);
  if (!width || !state.x) return;
  const side = Math.min(width, height) - 24;
  const wide = Math.min(width - 24, 1.6 * side); // a plane that is wider than high uses some of its width
  const n = state.x.length;
  state.at = new Float32Array(2 * n);
  for (let i = 0; i < n; i++) {
    state.at[2 * i] = width / 2 + (state.x[i] / 65535 - 0.5) * wide;
    state.at[2 * i + 1] = height / 2 + (state.y[i] / 65535 - 0.5) * side;
  }
  state.radius = Math.min(5, Math.max(1.6, 0.22 * Math.sqrt((wide * side) / n)));
  const some = state.chosen.size > 0;
  for (const chosen of some ? [false, true] : [true]) {
    context.globalAlpha = chosen ? 0.9 : 0.22;
    for (const [swatch, cross, own] of state.layers) {
      const members = some ? own.filter((i) => state.chosen.has(i) === chosen) : own;
      draw(context, state, members, colourOf(swatch), cross);
    }
  }
  context.globalAlpha = 1;
  overlay(state);
}

// A colour of the theme is asked of what shows it, as it differs between light and dark.
const colourOf = (swatch) => (typeof swatch === "string" ? swatch : getComputedStyle(swatch).backgroundColor);

function draw(context, state, members, colour, cross) {
  const { at, radius } = state;
  context.fillStyle = context.strokeStyle = colour;
  context.lineWidth = Math.max(1.2, radius * 0.6);
  context.beginPath();
  for (const i of members) {
    const [x, y] = [at[2 * i], at[2 * i + 1]];
    if (cross) {
      context.moveTo(x - radius, y - radius);
      context.lineTo(x + radius, y + radius);
      context.moveTo(x - radius, y + radius);
      context.lineTo(x + radius, y - radius);
    } else if (radius < 2.2) context.rect(x - radius, y - radius, 2 * radius, 2 * radius);
    else {
      context.moveTo(x + radius, y);
      context.arc(x, y, radius, 0, 6.2832);
    }
  }
  if (cross) context.stroke();
  else context.fill();
}

function overlay(state) {
  const [context] = fitted(state.drawing, state.plane);
  const style = getComputedStyle(state.root);
  context.strokeStyle = style.getPropertyValue("--st-primary-color") || "#b4441f";
  context.fillStyle = context.strokeStyle;
  context.lineWidth = 1.5;
  const path = state.path;
  if (path && path.length > 1) {
    context.beginPath();
    path.forEach(([x, y], i) => (i ? context.lineTo(x, y) : context.moveTo(x, y)));
    context.closePath();
    context.globalAlpha = 0.12;
    context.fill();
    context.globalAlpha = 1;
    context.stroke();
  }
  for (const i of new Set([state.cursor, state.under])) {
    if (i === null || i === undefined || !state.at || 2 * i >= state.at.length) continue;
    context.beginPath();
    context.arc(state.at[2 * i], state.at[2 * i + 1], state.radius + 4, 0, 6.2832);
    context.lineWidth = 2;
    context.stroke();
  }
}

// ---------------------------------------------------------------------- choosing

function nearest(state, x, y, within = Infinity) {
  let [best, found] = [within * within, null];
  for (let i = 0; i < state.x.length; i++) {
    const [dx, dy] = [state.at[2 * i] - x, state.at[2 * i + 1] - y];
    const d = dx * dx + dy * dy;
    if (d < best) [best, found] = [d, i];
  }
  return found;
}

function inside(state, path) {
  const [xs, ys] = [path.map((p) => p[0]), path.map((p) => p[1])];
  const [left, right, top, bottom] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const found = [];
  for (let i = 0; i < state.x.length; i++) {
    const [x, y] = [state.at[2 * i], state.at[2 * i + 1]];
    if (x < left || x > right || y < top || y > bottom) continue;
    let within = false;
    for (let a = 0, b = path.length - 1; a < path.length; b = a++) {
      if (ys[a] > y !== ys[b] > y && x < ((xs[b] - xs[a]) * (y - ys[a])) / (ys[b] - ys[a]) + xs[a]) within = !within;
    }
    if (within) found.push(i);
  }
  return found;
}

const box = ([ax, ay], [bx, by]) => [[ax, ay], [bx, ay], [bx, by], [ax, by]];

/** Choose these points; chosen photos that are not on the map stay so if the points are `more` than before. */
function choose(state, chosen, more = false, since) {
  state.chosen = chosen;
  state.more &&= more;
  redraw(state);
  counted(state);
  if (since !== undefined) state.root.dataset.answered = (performance.now() - since).toFixed(1);
  clearTimeout(state.telling);
  state.telling = setTimeout(() => {
    state.choose({ points: [...chosen].sort((a, b) => a - b), more: state.more });
    state.more = true; // until the next choice that is told
  }, state.slow ? 400 : 0);
}

function counted(state) {
  const [n, all] = [state.chosen.size, state.x.length];
  const photos = all === 1 ? "photo" : "photos";
  state.count.textContent = n ? `${n.toLocaleString("en")} of ${all.toLocaleString("en")} chosen` : `${all.toLocaleString("en")} ${photos}`;
  state.clear.disabled = !n;
}

// ---------------------------------------------------------------------- what a person does

function listen(state) {
  const { drawing } = state;
  const place = (event) => {
    const frame = drawing.getBoundingClientRect();
    return [event.clientX - frame.left, event.clientY - frame.top];
  };
  drawing.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    drawing.setPointerCapture(event.pointerId);
    state.path = [place(event)];
    state.cursor = null;
    hide(state);
  });
  drawing.addEventListener("pointermove", (event) => {
    const at = place(event);
    if (!state.path) {
      show(state, nearest(state, ...at, NEAR), at);
      return;
    }
    if (state.mode === "box") state.path = box(state.path[0], at);
    else state.path.push(at);
    overlay(state);
  });
  drawing.addEventListener("pointerup", (event) => {
    if (!state.path) return;
    const since = performance.now();
    const [path, at] = [state.path, place(event)];
    state.path = null;
    const moved = Math.max(...path.map(([x, y]) => Math.hypot(x - path[0][0], y - path[0][1])));
    let found = [];
    if (moved > 5) found = inside(state, path);
    else {
      const one = nearest(state, ...at, NEAR);
      if (one !== null) found = [one];
    }
    state.slow = false;
    choose(state, new Set(event.shiftKey ? [...state.chosen, ...found] : found), event.shiftKey, since);
  });
  drawing.addEventListener("pointercancel", () => {
    state.path = null;
    overlay(state);
  });
  drawing.addEventListener("pointerleave", () => hide(state));
  drawing.addEventListener("keydown", (event) => follow(state, event));
  drawing.addEventListener("blur", () => {
    state.cursor = null;
    hide(state);
  });
}

function hide(state) {
  state.hint.hidden = true;
  state.under = null;
  overlay(state);
}

function show(state, i, at) {
  if (i === null) {
    if (state.under !== null && state.under !== undefined) hide(state);
    return;
  }
  if (state.under === i && !state.hint.hidden) return;
  state.under = i;
  overlay(state);
  const image = element("img");
  image.alt = "";
  image.src = state.picture + encodeURIComponent(state.ids[i]);
  const words = state.words.map((word) => word(i)).filter(Boolean);
  state.hint.replaceChildren(image, ...words.map((word) => element("span", "word", word)));
  state.hint.hidden = false;
  const [width, height] = [state.plane.clientWidth, state.plane.clientHeight];
  const [x, y] = at ?? [state.at[2 * i], state.at[2 * i + 1]];
  state.hint.style.left = `${Math.max(4, x + 190 > width ? x - 182 : x + 14)}px`;
  state.hint.style.top = `${Math.max(4, Math.min(y - 20, height - 210))}px`;
  state.told.textContent = words.join(", ");
}

const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

function follow(state, event) {
  if (event.altKey || event.ctrlKey || event.metaKey || !state.x.length) return;
  const step = STEPS[event.key];
  if (step) move(state, step, event.shiftKey);
  else if (event.key === " " && state.cursor !== null) {
    const chosen = new Set(state.chosen);
    if (!chosen.delete(state.cursor)) chosen.add(state.cursor);
    state.slow = true;
    choose(state, chosen, true);
  } else if (event.key === "Enter" && state.cursor !== null) state.open(state.cursor);
  else if (event.key === "Escape") {
    hide(state);
    choose(state, new Set());
  } else return;
  event.preventDefault();
  event.stopPropagation();
}

function move(state, [right, down], drawing) {
  const { at } = state;
  if (state.cursor === null || state.cursor === undefined)
    state.cursor = nearest(state, state.plane.clientWidth / 2, state.plane.clientHeight / 2);
  else {
    const [x, y] = [at[2 * state.cursor], at[2 * state.cursor + 1]];
    let [best, found] = [Infinity, state.cursor];
    for (let i = 0; i < state.x.length; i++) {
      const [dx, dy] = [at[2 * i] - x, at[2 * i + 1] - y];
      const along = dx * right + dy * down;
      const cost = along + 2.5 * Math.abs(dx * down + dy * right);
      if (along > 0.5 && cost < best) [best, found] = [cost, i];
    }
    if (!drawing) state.anchor = null;
    else state.anchor ??= state.cursor;
    state.cursor = found;
  }
  show(state, state.cursor);
  if (!drawing || state.anchor === null || state.anchor === undefined) return;
  const ends = [state.anchor, state.cursor];
  const [xs, ys] = [ends.map((i) => at[2 * i]), ends.map((i) => at[2 * i + 1])];
  const [from, to] = [Math.min, Math.max].map((f, k) => [f(...xs) - 1 + 2 * k, f(...ys) - 1 + 2 * k]);
  state.slow = true;
  choose(state, new Set(inside(state, box(from, to))));
}

// ---------------------------------------------------------------------- the legend

function legend(state, data) {
  state.layers = [];
  const n = state.x.length;
  if (data.scale) {
    const values = numbers(data.values);
    const own = [...RAMP, "rest"].map(() => []);
    for (let i = 0; i < n; i++)
      own[values[i] ? Math.min(RAMP.length - 1, Math.floor(((values[i] - 1) / 65534) * RAMP.length)) : RAMP.length].push(i);
    const ramp = element("div", "ramp");
    const strip = element("i");
    strip.style.background = `linear-gradient(90deg, ${RAMP.join(",")})`;
    ramp.append(element("span", "", data.scale.name), element("span", "", data.scale.low), strip, element("span", "", data.scale.high));
    const none = element("span", "swatch");
    none.style.setProperty("--own", "var(--rest)");
    if (own[RAMP.length].length) ramp.append(none, element("span", "", "none"));
    state.legend.className = "";
    state.legend.replaceChildren(ramp);
    state.layers.push([own[RAMP.length].length ? none : "#888", false, own[RAMP.length]]);
    RAMP.forEach((colour, k) => state.layers.push([colour, false, own[k]]));
    return;
  }
  const groups = numbers(data.groups);
  const own = data.legend.map(() => []);
  for (let i = 0; i < n; i++) own[groups[i]]?.push(i);
  state.legend.className = "legend";
  state.legend.setAttribute("role", "group");
  state.legend.setAttribute("aria-label", "Legend; a press chooses the photos of a colour");
  state.legend.replaceChildren();
  data.legend.forEach((group, k) => {
    const button = element("button");
    button.type = "button";
    const swatch = element("span", `swatch ${group.kind}`);
    swatch.style.setProperty("--own", `var(--${group.kind === "class" ? `c${k % 7}` : group.kind})`);
    button.append(swatch, element("span", "name", group.name), element("span", "", own[k].length.toLocaleString("en")));
    button.title = `Choose the photos of: ${group.name}`;
    button.addEventListener("click", () => choose(state, new Set(own[k]), false, performance.now()));
    state.legend.append(button);
    state.layers.push([swatch, group.kind === "bad", own[k]]);
  });
  // The rest lies below the others.
  state.layers.sort((a, b) => b[2].length - a[2].length);
}

export default function ({ data, parentElement, setTriggerValue }) {
  const root = parentElement.querySelector(".scatter");
  const state = (root.xattn ??= { root, chosen: new Set(), more: true, cursor: null, under: null, path: null, shown: null });
  state.choose = (choice) => setTriggerValue("choose", choice);
  state.open = (row) => setTriggerValue("open", row);
  if (state.shown === null) build(state);
  const shown = JSON.stringify(data);
  if (shown === state.shown) return;
  state.shown = shown;
  const photos = JSON.stringify([data.ids.length, data.ids[0], data.ids[data.ids.length - 1]]);
  if (photos !== state.photos || data.turn !== state.turn) state.chosen = new Set(data.chosen);
  [state.photos, state.turn] = [photos, data.turn];
  [state.x, state.y] = [numbers(data.x), numbers(data.y)];
  [state.ids, state.picture] = [data.ids, data.picture];
  state.words = data.words.map(reader);
  [state.cursor, state.anchor] = [null, null];
  state.hint.hidden = true;
  state.drawing.setAttribute("aria-label", data.label);
  legend(state, data);
  redraw(state);
  counted(state);
}
