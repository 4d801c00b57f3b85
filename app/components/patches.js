/** A photo cut into patches. A click picks one; arrow keys, Home and End move a cursor that is picked
when it rests. All text goes in as text.
*/

const REST = 250; // milliseconds without a key after which the cursor's patch is picked

function build(root) {
  const frame = element("div", "frame");
  frame.tabIndex = 0;
  frame.setAttribute("role", "application"); // arrow keys are ours, also in a reader's browse mode
  frame.setAttribute("aria-roledescription", "patch picker");
  const photo = element("img", "photo");
  photo.decoding = "sync"; // no flash when a picture takes another's place
  const map = element("img", "map");
  map.alt = "";
  map.decoding = "sync";
  const lines = element("span", "lines");
  const picked = element("span", "picked");
  const cursor = element("span", "cursor");
  frame.append(photo, map, lines, picked, cursor);
  const status = element("span", "status");
  status.setAttribute("aria-live", "polite");
  const fade = element("label", "fade");
  const range = element("input");
  Object.assign(range, { type: "range", min: "0", max: "100", value: "70" });
  fade.append("Photo", range, "Map");
  range.setAttribute("aria-label", "Opacity of the map over the photo");
  root.append(frame, fade, status);
  const show = () => map.style.setProperty("opacity", Number(range.value) / 100);
  range.addEventListener("input", show);
  range.addEventListener("keydown", (event) => event.stopPropagation());
  show();
  const state = { frame, photo, map, lines, picked, cursor, status, fade, at: null, asked: [], timer: 0 };
  listen(state);
  return state;
}

function place(box, at, state) {
  box.hidden = at === null;
  if (at === null) return;
  box.style.top = `${(100 * at[0]) / state.rows}%`;
  box.style.left = `${(100 * at[1]) / state.columns}%`;
  box.style.height = `${100 / state.rows}%`;
  box.style.width = `${100 / state.columns}%`;
}

const under = (event, state) => rasterAt(event, state.photo, state).map(Math.floor);

function pick(state, at) {
  rest(state);
  state.at = at;
  place(state.picked, at, state);
  if (String(at) !== (state.asked.at(-1) ?? String(state.shown.picked))) state.asked.push(String(at));
  state.send(at);
}

function rest(state) {
  clearTimeout(state.timer);
  state.timer = 0;
}

// An answer to a pick leaves the cursor where it is, which may be ahead; any other change moves it.
function answered(state, picked) {
  const at = state.asked.lastIndexOf(String(picked));
  state.asked = at < 0 ? [] : state.asked.slice(at + 1);
  if (at >= 0 && (state.timer || state.asked.length)) return;
  rest(state);
  state.at = picked;
}

function moved(event, [row, column], state) {
  const [lastRow, lastColumn] = [state.rows - 1, state.columns - 1];
  switch (event.key) {
    case "ArrowUp": return [Math.max(row - 1, 0), column];
    case "ArrowDown": return [Math.min(row + 1, lastRow), column];
    case "ArrowLeft": return [row, Math.max(column - 1, 0)];
    case "ArrowRight": return [row, Math.min(column + 1, lastColumn)];
    case "Home": return [event.ctrlKey ? 0 : row, 0];
    case "End": return [event.ctrlKey ? lastRow : row, lastColumn];
    default: return null;
  }
}

function listen(state) {
  const { frame } = state;
  frame.addEventListener("pointermove", (event) => {
    if (event.pointerType !== "touch") place(state.cursor, under(event, state), state);
  });
  frame.addEventListener("pointerleave", () => place(state.cursor, null, state));
  frame.addEventListener("click", (event) => pick(state, under(event, state)));
  frame.addEventListener("keydown", (event) => {
    if (event.altKey || event.metaKey || event.shiftKey) return; // the page's own keys
    const from = state.at ?? [Math.floor(state.rows / 2), Math.floor(state.columns / 2)];
    const chosen = event.key === "Enter" || event.key === " ";
    const to = chosen ? from : moved(event, from, state);
    if (to === null) return;
    event.preventDefault();
    event.stopPropagation();
    if (chosen) return pick(state, to);
    state.at = to;
    place(state.picked, to, state);
    state.status.textContent =
      `row ${to[0] + 1} of ${state.rows}, column ${to[1] + 1} of ${state.columns}`;
    clearTimeout(state.timer);
    state.timer = setTimeout(() => frame.isConnected && pick(state, to), REST);
  });
}

export default function ({ data, parentElement, setTriggerValue }) {
  const root = parentElement.querySelector(".patches");
  const state = (root.xattn ??= build(root));
  state.send = (at) => setTriggerValue("pick", at);
  const wasPicked = state.shown?.picked;
  state.shown = data;
  state.rows = data.rows;
  state.columns = data.columns;
  for (const name of ["photo", "map"]) {
    const wanted = data[name] || "";
    state[name].hidden = !wanted;
    if (wanted && state[name].getAttribute("src") !== wanted) state[name].src = wanted;
  }
  state.fade.hidden = !data.map;
  state.photo.alt = data.alt;
  state.frame.setAttribute("aria-label", data.label);
  state.frame.style.setProperty("--aspect", data.aspect);
  state.frame.style.setProperty("--rows", data.rows);
  state.frame.style.setProperty("--columns", data.columns);
  if (String(wasPicked) !== String(data.picked)) answered(state, data.picked);
  else if (String(data.picked) === state.asked.at(-1)) state.asked = [];
  place(state.picked, state.at, state);
  place(state.cursor, null, state);
}
