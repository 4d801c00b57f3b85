/** What a vision-language model said of photos. Pointing at a word, or focusing it, shows its map at once;
a click or Enter keeps it. Arrow keys go from word to word, 1 to 9 choose the method. Pointing at a place of
a photo colours the words by what their maps have there. All text goes in as text.
*/

const WIDEST = 4; // pixels of the line under a word that needs the image most
const LEAST = 0.1; // nats that a word loses without the image, below which it has no line
const NEEDED = 4; // nats that a word loses without the image, from which on its line is as wide as that

function build(root) {
  const state = { root, word: 0, method: 0, kept: 0, images: [] };
  for (const name of ["photos", "methods", "prompt", "words", "said", "hint"]) {
    state[name] = element("div", name);
    if (name !== "photos") (state.side ??= element("div", "side")).append(state[name]);
  }
  state.hint.textContent =
    "The line under a word says how much it needs the image. Point at a word for its map, at a place of the " +
    "photo for the words that come from there.";
  state.said.setAttribute("aria-live", "polite");
  state.methods.setAttribute("role", "group");
  state.methods.setAttribute("aria-label", "Method");
  state.words.setAttribute("role", "toolbar");
  state.words.dir = state.prompt.dir = "auto"; // of the language that is spoken
  root.append(state.photos, state.side);
  root.addEventListener("keydown", (event) => key(event, state));
  state.words.addEventListener("pointerover", (event) => over(event, state));
  state.words.addEventListener("focusin", (event) => over(event, state));
  state.words.addEventListener("pointerleave", () => show(state, state.kept));
  state.words.addEventListener("focusout", () => show(state, state.kept));
  state.words.addEventListener("click", (event) => keep(event.target.closest(".word"), state));
  return state;
}

function over(event, state) {
  const word = event.target.closest(".word");
  if (word) show(state, Number(word.dataset.at));
}

function keep(word, state) {
  if (!word) return;
  state.kept = Number(word.dataset.at);
  show(state, state.kept);
  send(state);
}

function send(state) {
  const { words, methods } = state.data;
  state.pick({ word: words[state.kept].number, method: methods[state.method].name });
}

function key(event, state) {
  if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
  const { words, methods } = state.data;
  const number = Number(event.key) - 1;
  if (methods[number]) {
    choose(state, number);
  } else {
    const last = words.length - 1;
    const [next, before] = [Math.min(state.word + 1, last), Math.max(state.word - 1, 0)];
    const back = getComputedStyle(state.words).direction === "rtl";
    const to = {
      ArrowRight: back ? before : next, ArrowLeft: back ? next : before,
      ArrowDown: next, ArrowUp: before, Home: 0, End: last,
    }[event.key];
    if (to === undefined || !event.target.closest(".words")) return;
    state.words.querySelectorAll(".word")[to].focus();
  }
  event.preventDefault();
  event.stopPropagation();
}

function choose(state, method) {
  state.method = method;
  load(state);
  show(state, state.word);
  send(state);
}

// The pictures of all words by the method that is shown, so that the next one is there at once; of a clip
// they would be too many.
function load(state) {
  if (state.data.clip) return;
  state.images = state.data.photos.flatMap((photo) =>
    photo.maps[state.method].filter(Boolean).map((map) => Object.assign(new Image(), { src: map.src })));
}

function show(state, at) {
  const { data, method } = state;
  const word = data.words[at];
  state.word = at;
  for (const [i, button] of [...state.words.querySelectorAll(".word")].entries()) {
    button.classList.toggle("shown", i === at);
    button.tabIndex = i === at ? 0 : -1;
    button.setAttribute("aria-pressed", String(i === state.kept));
  }
  for (const [i, button] of [...state.methods.children].entries())
    button.setAttribute("aria-pressed", String(i === method));
  for (const [i, frame] of [...state.photos.querySelectorAll(".frame")].entries()) {
    const map = data.photos[i].maps[method][at];
    const image = frame.querySelector("img");
    const wanted = map ? map.src : data.photos[i].src;
    if (image.getAttribute("src") !== wanted) image.src = wanted;
    image.alt = `${data.photos[i].title}, map of ${word.text} by ${data.methods[method].title}`;
  }
  const found = word.sources[method];
  const most = found ? Math.max(...found.map(Math.abs), 1e-12) : 1;
  for (const [i, token] of [...state.prompt.querySelectorAll(".token")].entries())
    token.style.setProperty("--share", found ? Math.max(found[i] / most, 0).toFixed(3) : 0);
  const buttons = state.words.querySelectorAll(".word");
  for (const button of buttons) button.style.setProperty("--share", 0);
  state.said.textContent = [
    `${word.text}: p ${word.p.toFixed(2)}`,
    `loses ${word.lost.toFixed(2)} nats without the image`,
    ...(word.shares[method] ? [word.shares[method]] : []),
    ...(data.photos.every((photo) => !photo.maps[method][at]) ? ["no map by this method"] : []),
  ].join(" · ");
}

// Colour the words by the share of its greatest value that each word's map has at a place of a photo.
function point(event, state, photo) {
  const box = event.currentTarget.getBoundingClientRect();
  const x = (event.clientX - box.left) / box.width;
  const y = (event.clientY - box.top) / box.height;
  for (const [i, button] of [...state.words.querySelectorAll(".word")].entries()) {
    const map = photo.maps[state.method][i];
    button.style.setProperty("--share", map ? shareAt(map, x, y).toFixed(3) : 0);
  }
}

function shareAt(map, x, y) {
  const [top, left, bottom, right] = map.box;
  const [down, across] = [(y - top) / (bottom - top), (x - left) / (right - left)];
  if (down < 0 || across < 0 || down >= 1 || across >= 1 || map.most <= 0) return 0;
  map.values ??= new Uint16Array(Uint8Array.from(atob(map.cells), (c) => c.charCodeAt(0)).buffer);
  const at = Math.floor(down * map.rows) * map.columns + Math.floor(across * map.columns);
  return Math.max(map.low + (map.values[at] / 65535) * (map.high - map.low), 0) / map.most;
}

function fill(state) {
  const { data } = state;
  const strip = data.clip || data.photos.length > 2;
  state.root.classList.toggle("clip", data.clip);
  state.root.classList.toggle("many", strip);
  state.photos.tabIndex = strip ? 0 : -1; // the arrow keys scroll it
  state.photos.setAttribute("role", "group");
  state.photos.setAttribute("aria-label", data.clip ? "Frames" : "Photos");
  state.photos.replaceChildren(...data.photos.map((photo) => {
    const figure = element("figure");
    const frame = element("div", "frame");
    frame.style.setProperty("--aspect", photo.aspect);
    frame.append(Object.assign(element("img"), { decoding: "sync" }));
    frame.addEventListener("pointermove", (event) => point(event, state, photo));
    frame.addEventListener("pointerleave", () => show(state, state.word));
    figure.append(frame, element("figcaption", photo.own ? "own" : "", photo.title));
    return figure;
  }));
  const own = state.photos.querySelector("figure:has(.own)"); // of a strip, where it is in sight
  if (own && strip) state.photos.scrollLeft = own.offsetLeft - state.photos.offsetLeft;
  state.methods.replaceChildren(...data.methods.map((method, i) => {
    const button = Object.assign(element("button", "method", method.title), { type: "button" });
    button.title = `${i + 1}`;
    button.addEventListener("click", () => choose(state, i));
    return button;
  }));
  state.methods.hidden = data.methods.length < 2;
  state.prompt.replaceChildren(...data.prompt.map((text) => element("span", "token", text)));
  state.words.setAttribute("aria-label", data.label);
  state.words.replaceChildren(...data.words.flatMap((word, i) => {
    const button = Object.assign(element("button", "word", word.text), { type: "button" });
    button.dataset.at = i;
    const need = word.lost < LEAST ? 0 : Math.min(word.lost / NEEDED, 1);
    button.style.setProperty("--need", `${(WIDEST * need).toFixed(2)}px`);
    button.setAttribute("aria-label",
      `${word.text}, p ${word.p.toFixed(2)}, loses ${word.lost.toFixed(2)} nats without the image`);
    return [document.createTextNode(word.before), button];
  }), document.createTextNode(data.after));
}

export default function ({ data, parentElement, setTriggerValue }) {
  const root = parentElement.querySelector(".answer");
  const state = (root.xattn ??= build(root));
  state.pick = (chosen) => setTriggerValue("pick", chosen);
  const text = JSON.stringify({ ...data, word: 0, method: 0 }); // what was picked here is shown already
  if (text === state.text) return;
  state.text = text;
  const same = state.data?.subject === data.subject;
  state.data = data;
  if (!same) [state.kept, state.method] = [data.word, data.method];
  fill(state);
  load(state);
  show(state, same ? Math.min(state.word, data.words.length - 1) : state.kept);
}
