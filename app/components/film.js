/** A film of JPEG frames: the range input gives focus and keys, Space plays. All text goes in as text. */

const AHEAD = 8; // frames that are fetched before they are shown

function build(root) {
  const picture = element("img", "picture");
  picture.decoding = "sync"; // no flash from frame to frame
  const bar = element("div", "bar");
  const play = element("button", "play");
  play.type = "button";
  const range = element("input", "range");
  Object.assign(range, { type: "range", min: "0", step: "1" });
  const count = element("span", "count");
  bar.append(play, range, count);
  const title = element("p", "title");
  title.dir = "auto";
  root.append(picture, bar, title);
  const state = { picture, play, range, count, title, loaded: new Map(), timer: 0, data: null };
  listen(state);
  return state;
}

function fetched(state, index) {
  if (!state.loaded.has(index)) {
    const image = new Image();
    image.src = state.data.source + index;
    state.loaded.set(index, image);
    if (state.loaded.size > 64) state.loaded.delete(state.loaded.keys().next().value);
  }
  return state.loaded.get(index);
}

function show(state, index) {
  const last = state.data.titles.length - 1;
  state.at = Math.min(Math.max(index, 0), last);
  state.range.value = String(state.at);
  state.range.setAttribute("aria-valuetext", `${state.at + 1} of ${last + 1}: ${state.data.titles[state.at]}`);
  state.count.textContent = `${state.at + 1} / ${last + 1}`;
  state.title.textContent = state.data.titles[state.at];
  state.picture.alt = state.data.titles[state.at];
  const source = state.data.source + state.at;
  if (state.picture.getAttribute("src") !== source) state.picture.src = source;
  for (let i = 1; i <= AHEAD && state.at + i <= last; i += 1) fetched(state, state.at + i);
}

function pause(state) {
  clearTimeout(state.timer);
  state.playing = false;
  state.play.textContent = "Play";
}

function step(state, due) {
  if (!state.playing) return;
  const last = state.data.titles.length - 1;
  if (state.at >= last) {
    pause(state);
    state.rest(state.at);
    return;
  }
  const next = fetched(state, state.at + 1);
  if (!next.complete) {
    state.timer = setTimeout(() => step(state, performance.now()), 30);
    return;
  }
  show(state, state.at + 1);
  const then = Math.max(due + 1000 / state.data.rate, performance.now());
  state.timer = setTimeout(() => step(state, then), then - performance.now());
}

function toggle(state) {
  if (state.playing) {
    pause(state);
    state.rest(state.at);
    return;
  }
  if (state.at >= state.data.titles.length - 1) show(state, 0);
  state.playing = true;
  state.play.textContent = "Pause";
  step(state, performance.now());
}

function listen(state) {
  state.play.addEventListener("click", () => toggle(state));
  state.range.addEventListener("input", () => {
    pause(state);
    show(state, Number(state.range.value));
  });
  state.range.addEventListener("change", () => state.rest(Number(state.range.value)));
  state.range.addEventListener("keydown", (event) => {
    event.stopPropagation(); // the page's own shortcuts must not see the keys that move the film
    if (event.key === " ") {
      event.preventDefault();
      toggle(state);
    }
  });
}

export default function ({ data, parentElement, setTriggerValue }) {
  const root = parentElement.querySelector(".film");
  const state = (root.xattn ??= build(root));
  state.rest = (index) => setTriggerValue("rest", index);
  const other = state.data?.source !== data.source;
  state.data = data;
  state.range.max = String(data.titles.length - 1);
  state.range.setAttribute("aria-label", data.label);
  if (other) {
    state.loaded.clear();
    pause(state);
    show(state, data.start);
  }
  return () => clearTimeout(state.timer);
}
