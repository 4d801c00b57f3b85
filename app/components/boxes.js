/** A photo under boxes, each a button; with `draws`, a drag over the photo draws another one. Tab and the
arrow keys go from box to box, Enter and a click open one. All text goes in as text.
*/

const STILL = 4; // pixels below which a drag is a click

function build(root) {
  const frame = element("div", "frame");
  const photo = element("img", "photo");
  const drawn = element("span", "drawn");
  frame.append(photo, drawn);
  root.append(frame);
  const state = { root, frame, photo, drawn, buttons: [], from: null, dragged: false };
  frame.addEventListener("dragstart", (event) => event.preventDefault());
  frame.addEventListener("pointerdown", (event) => {
    state.dragged = false;
    if (event.button || !state.data.draws) return;
    state.from = { x: event.clientX, y: event.clientY, at: sharesAt(event, state.frame) };
  });
  frame.addEventListener("pointermove", (event) => {
    if (!state.from) return;
    const far = Math.hypot(event.clientX - state.from.x, event.clientY - state.from.y);
    if (!state.dragged && far < STILL) return;
    if (!state.dragged) frame.setPointerCapture(event.pointerId);
    state.dragged = true;
    place(state.drawn, (state.box = between(state, event)));
  });
  frame.addEventListener("pointerup", () => {
    state.from = null;
    if (state.dragged) state.send("draw", state.box);
    setTimeout(() => (state.dragged = false)); // after the click
  });
  frame.addEventListener("pointercancel", () => {
    state.from = null;
    place(state.drawn, state.data.drawn);
  });
  frame.addEventListener("click", (event) => {
    const button = event.target.closest(".box");
    if (button && !state.dragged) state.send("open", button.dataset.id);
  });
  frame.addEventListener("keydown", (event) => keys(event, state));
  return state;
}

// Left, top, right and bottom of a drag; where it began stays the same place on the photo if the page moves.
function between(state, event) {
  const [x0, y0] = state.from.at;
  const [x1, y1] = sharesAt(event, state.frame);
  return [Math.min(x0, x1), Math.min(y0, y1), Math.max(x0, x1), Math.max(y0, y1)];
}

function place(box, at) {
  box.hidden = !at;
  if (!at) return;
  const [x0, y0, x1, y1] = at.map((share) => 100 * share);
  Object.assign(box.style, { left: `${x0}%`, top: `${y0}%`, width: `${x1 - x0}%`, height: `${y1 - y0}%` });
}

function keys(event, state) {
  const step = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
  const at = state.order.indexOf(event.target);
  if (at < 0 || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
  const to = { Home: 0, End: state.order.length - 1 }[event.key] ?? (step && at + step);
  if (to === undefined) return;
  event.preventDefault();
  event.stopPropagation();
  state.order[Math.min(Math.max(to, 0), state.order.length - 1)].focus();
}

function made(box) {
  const button = element("button", `box ${box.kind}`);
  const { width, height } = { width: box.at[2] - box.at[0], height: box.at[3] - box.at[1] };
  Object.assign(button, { type: "button", title: box.text });
  button.dataset.id = box.id;
  button.setAttribute("aria-label", box.text);
  button.setAttribute("aria-pressed", String(box.selected));
  button.style.zIndex = 1 + Math.round(1000 * (1 - Math.min(width * height, 1))); // the small ones on top
  button.append(element("span", box.at[1] < 0.08 ? "name inside" : "name", box.text));
  place(button, box.at);
  return button;
}

export default function ({ data, parentElement, setTriggerValue }) {
  const root = parentElement.querySelector(".boxes");
  const state = (root.xattn ??= build(root));
  state.send = (what, value) => setTriggerValue(what, value);
  const shown = JSON.stringify(data);
  if (shown === state.shown) return;
  Object.assign(state, { shown, data });
  const inside = root.getRootNode().activeElement?.dataset?.id;
  if (state.photo.getAttribute("src") !== data.photo) state.photo.src = data.photo;
  state.photo.alt = data.alt;
  state.frame.style.setProperty("--aspect", data.aspect);
  state.frame.classList.toggle("draws", data.draws);
  state.frame.classList.toggle("few", data.boxes.length <= 4);
  state.frame.setAttribute("role", "group");
  state.frame.setAttribute("aria-label", data.label);
  state.order = data.boxes.map(made);
  for (const old of state.frame.querySelectorAll(".box")) old.remove();
  state.drawn.before(...state.order);
  place(state.drawn, data.drawn);
  state.order.find((button) => button.dataset.id === inside)?.focus();
}
