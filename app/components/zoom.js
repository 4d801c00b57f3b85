/** Zoom of a grid's pictures, all at once, and the values under the pointer: the part of grid.js for maps
of one photo. The wheel with Ctrl, a pinch, + and - zoom; a drag and the arrow keys move; a double click
and 0 show the whole again. Unzoomed, keys, touches and the wheel do what they do in any grid.
*/

const MOST = 16; // times
const STILL = 4; // pixels by which a click may move

function linkFrames(root, data) {
  const zoom = (root.xattnZoom ??= followZoom(root));
  root.classList.add("linked");
  const { aspect, outlines, subject } = data.linked;
  zoom.wide = Math.min(1, aspect / data.aspect); // of a frame, that the picture takes
  zoom.tall = Math.min(1, data.aspect / aspect);
  root.style.setProperty("--wide", zoom.wide);
  root.style.setProperty("--tall", zoom.tall);
  for (const link of root.querySelectorAll(".cell")) {
    const frame = link.querySelector(".frame");
    link.draggable = false;
    link.xattnMap = unpackMap(data.cells.find((cell) => cell.id === link.dataset.id).map);
    frame.querySelectorAll(".cross, .value, .outlines").forEach((old) => old.remove());
    frame.append(drawOutlines(outlines || []), element("span", "cross"), element("span", "value"));
    for (const mark of frame.querySelectorAll(".cross, .value, .outlines"))
      mark.setAttribute("aria-hidden", "true");
  }
  if (zoom.subject !== subject) moveTo(zoom, 1, [0, 0]);
  zoom.subject = subject;
  point(zoom, zoom.at);
}

function unpackMap(map) {
  if (!map) return null;
  const bytes = Uint8Array.from(atob(map.cells), (letter) => letter.charCodeAt(0));
  return { ...map, cells: new Uint16Array(bytes.buffer) };
}

function drawOutlines(outlines) {
  const space = "http://www.w3.org/2000/svg";
  const layer = element("span", "outlines");
  const svg = document.createElementNS(space, "svg");
  svg.setAttribute("viewBox", "0 0 1 1");
  svg.setAttribute("preserveAspectRatio", "none");
  const ordered = [...outlines].sort((one, other) => one.own - other.own); // the class's own on top
  for (const kind of ["under", "over"])
    for (const { points, own } of ordered) {
      const line = document.createElementNS(space, "polygon");
      line.setAttribute("points", points.map((at) => at.join(",")).join(" "));
      line.setAttribute("class", `${kind} ${own ? "own" : "other"}`);
      svg.append(line);
    }
  layer.append(svg);
  return layer;
}

function followZoom(root) {
  const zoom = { root, scale: 1, move: [0, 0], at: null, fingers: new Map(), dragged: false };
  zoom.bar = zoomBar(zoom);
  root.after(zoom.bar);
  moveTo(zoom, 1, [0, 0]);
  root.addEventListener("wheel", (event) => wheel(event, zoom), { passive: false });
  root.addEventListener("pointerdown", (event) => press(event, zoom));
  root.addEventListener("pointermove", (event) => drag(event, zoom));
  for (const kind of ["pointerup", "pointercancel"])
    root.addEventListener(kind, (event) => {
      zoom.fingers.delete(event.pointerId);
      setTimeout(() => (zoom.dragged = false)); // after the click
    });
  // A touch leaves the crosshair where it was.
  root.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && point(zoom, null));
  root.addEventListener("dblclick", () => moveTo(zoom, 1, [0, 0]));
  root.addEventListener("dragstart", (event) => event.preventDefault());
  // Two fingers are for the maps, not for the page.
  const two = (event) => event.touches.length > 1 && event.preventDefault();
  root.addEventListener("touchmove", two, { passive: false });
  root.addEventListener("keydown", (event) => zoomKey(event, zoom), { capture: true });
  const dragged = (event) => {
    if (!zoom.dragged) return;
    event.preventDefault();
    event.stopImmediatePropagation();
  };
  root.addEventListener("click", dragged, { capture: true });
  return zoom;
}

function zoomBar(zoom) {
  const bar = element("div", "zoom");
  bar.setAttribute("role", "group");
  bar.setAttribute("aria-label", "Zoom of all maps");
  const made = (text, label, act) => {
    const button = element("button", "", text);
    button.type = "button";
    button.title = label;
    button.setAttribute("aria-label", label);
    button.addEventListener("click", act);
    bar.append(button);
    return button;
  };
  zoom.less = made("−", "Zoom out", () => zoomBy(zoom, 1 / 1.5));
  zoom.share = element("span", "share");
  zoom.share.setAttribute("aria-live", "polite");
  bar.append(zoom.share);
  made("+", "Zoom in", () => zoomBy(zoom, 1.5));
  zoom.whole = made("Whole", "Show the whole photo again", () => moveTo(zoom, 1, [0, 0]));
  bar.append(element("span", "hint", "Ctrl + wheel or pinch zooms all maps, a drag moves them"));
  return bar;
}

function moveTo(zoom, scale, move) {
  zoom.scale = Math.min(Math.max(scale, 1), MOST);
  zoom.move = move.map((at) => Math.min(Math.max(at, 1 - zoom.scale), 0));
  const { style, classList } = zoom.root;
  style.setProperty("--zoom", zoom.scale);
  style.setProperty("--x", `${100 * zoom.move[0]}%`);
  style.setProperty("--y", `${100 * zoom.move[1]}%`);
  classList.toggle("zoomed", zoom.scale > 1);
  zoom.share.textContent = `${Math.round(100 * zoom.scale)}%`;
  zoom.less.disabled = zoom.whole.disabled = zoom.scale === 1;
  point(zoom, zoom.at);
}

function zoomBy(zoom, factor, about = [0.5, 0.5]) {
  const scale = Math.min(Math.max(zoom.scale * factor, 1), MOST);
  moveTo(zoom, scale, zoom.move.map((at, i) => about[i] - (about[i] - at) * (scale / zoom.scale)));
}

// Where the event is in its frame, (x, y) in shares of the frame.
function inFrame(event) {
  const box = event.target.closest?.(".frame")?.getBoundingClientRect();
  return box ? [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height] : null;
}

function wheel(event, zoom) {
  const about = inFrame(event);
  const asked = event.ctrlKey || event.metaKey;
  if (!about || (!asked && zoom.scale === 1)) return; // the page scrolls
  event.preventDefault();
  const pixels = event.deltaY * (event.deltaMode ? 30 : 1);
  zoomBy(zoom, Math.exp(-Math.min(Math.max(pixels, -200), 200) * 0.004), about);
}

function press(event, zoom) {
  zoom.dragged = false;
  const at = inFrame(event);
  if (!at || event.button) return;
  if (event.isPrimary) zoom.fingers.clear();
  zoom.fingers.set(event.pointerId, [event.clientX, event.clientY]);
  zoom.box = event.target.closest(".frame").getBoundingClientRect();
  point(zoom, at);
}

function drag(event, zoom) {
  const before = zoom.fingers.get(event.pointerId);
  if (!before) return point(zoom, inFrame(event));
  const now = [event.clientX, event.clientY];
  const others = [...zoom.fingers].filter(([id]) => id !== event.pointerId);
  const moved = now.map((at, i) => at - before[i]);
  const size = [zoom.box.width, zoom.box.height];
  const corner = [zoom.box.left, zoom.box.top];
  if (others.length) {
    const fixed = others[0][1];
    const far = (at) => Math.max(Math.hypot(at[0] - fixed[0], at[1] - fixed[1]), 1);
    const middle = now.map((at, i) => ((at + fixed[i]) / 2 - corner[i]) / size[i]);
    zoomBy(zoom, far(now) / far(before), middle);
  } else if (zoom.scale === 1 || (!zoom.dragged && Math.hypot(...moved) < STILL)) return;
  else moveTo(zoom, zoom.scale, zoom.move.map((at, i) => at + moved[i] / size[i]));
  zoom.dragged = true;
  if (event.isPrimary) zoom.root.setPointerCapture?.(event.pointerId);
  zoom.fingers.set(event.pointerId, now);
}

function zoomKey(event, zoom) {
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  const step = { ArrowLeft: [1, 0], ArrowRight: [-1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
  if (event.key === "+" || event.key === "=") zoomBy(zoom, 1.5);
  else if (event.key === "-") zoomBy(zoom, 1 / 1.5);
  else if (event.key === "0") moveTo(zoom, 1, [0, 0]);
  else if (step && zoom.scale > 1 && !event.shiftKey)
    moveTo(zoom, zoom.scale, zoom.move.map((at, i) => at + 0.15 * step[i]));
  else return;
  event.preventDefault();
  event.stopImmediatePropagation();
}

// The crosshair at a place of the frame, the same in all, and what each map says there.
function point(zoom, at) {
  zoom.at = at;
  const { root } = zoom;
  root.classList.toggle("pointed", at !== null);
  if (at === null) return;
  root.style.setProperty("--cx", `${100 * at[0]}%`);
  root.style.setProperty("--cy", `${100 * at[1]}%`);
  root.classList.toggle("low", at[1] > 0.5);
  const shares = [zoom.wide, zoom.tall];
  const place = at.map((v, i) => ((v - zoom.move[i]) / zoom.scale - (1 - shares[i]) / 2) / shares[i]);
  for (const link of root.querySelectorAll(".cell")) {
    const value = link.querySelector(".value");
    if (value) value.textContent = link.xattnMap ? valueAt(link.xattnMap, place) : "";
  }
}

function valueAt(map, [x, y]) {
  const [top, left, bottom, right] = map.box;
  const [down, across] = [(y - top) / (bottom - top), (x - left) / (right - left)];
  if (x < 0 || y < 0 || x >= 1 || y >= 1) return "";
  if (down < 0 || across < 0 || down >= 1 || across >= 1) return "not seen by the network";
  const cell = Math.floor(down * map.rows) * map.columns + Math.floor(across * map.columns);
  const value = map.low + (map.cells[cell] / 65535) * (map.high - map.low);
  const share = map.most > 0 ? ` · ${Math.round((100 * value) / map.most)}% of max` : "";
  const place = `row ${Math.floor(down * map.of[0]) + 1}, column ${Math.floor(across * map.of[1]) + 1}`;
  return `${map.of[0] > map.rows || map.of[1] > map.columns ? "≈ " : ""}${short(value)}${share}\n${place}`;
}

function short(value) {
  return String(Number(value.toPrecision(3))).replace("-", "−");
}
