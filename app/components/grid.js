/** A grid of pictures with captions. Arrow keys move the focus, Enter and a click open a cell. The photo
without its map shows while a cell is pointed at, has the keyboard's focus, or is pressed for long.

Only one cell is in the tab order, the one that had the focus last. All text goes in as text. With `data.keys`
photos are chosen and marked by keys (acts.js); what is chosen is shown at once, before the script answers.
*/

// A long file name breaks behind these, as in theme.py, and a number does not; a <wbr> is not copied.
const MARKS = /\S(?!(?<=\d[eE])[-+]\d)[-_/+](?=[^-_./,+\s])|\S[.,](?=[^-_./,+\s\d])/g;

function breakable(name, text) {
  const made = element("span", name, "");
  for (const part of String(text).replace(MARKS, "$&\0").split("\0")) {
    if (made.firstChild) made.append(document.createElement("wbr"));
    made.append(part);
  }
  return made;
}

function picture(cell, kept) {
  if (kept) {
    // The old picture stays until the new one is there.
    const image = kept.querySelector("img");
    image.alt = cell.alt || "";
    if (image.getAttribute("src") !== cell.src) image.src = cell.src;
    for (const old of kept.querySelectorAll(".badge, .marks, .box")) old.remove();
    return kept;
  }
  const frame = element("span", "frame");
  const image = element("img");
  image.loading = "lazy";
  image.decoding = "async";
  image.alt = cell.alt || "";
  image.addEventListener("load", () => frame.classList.add("there"));
  image.addEventListener("error", () => {
    frame.classList.add("there");
    image.replaceWith(element("span", "gone", "This picture cannot be shown."));
  });
  image.src = cell.src;
  frame.append(image);
  return frame;
}

// The heading of a row, or the place of a picture that there is none of.
function words(cell, kept) {
  const text = kept ?? element("span", cell.wide ? "heading" : "none", "");
  text.dataset.id = cell.id;
  text.textContent = cell.title;
  return text;
}

// The link of a cell stays where it is: between press and release of a button it must not be replaced,
// or the browser knows of no click on it.
function build(cell, before) {
  const at = before.findIndex((old) => old.dataset.id === cell.id);
  const [kept] = at < 0 ? [] : before.splice(at, 1);
  if (!cell.src) return words(cell, kept);
  const link = kept ?? element("a", "cell");
  link.href = cell.href || "#";
  link.classList.toggle("side", cell.span > 0);
  link.style.setProperty("--span", cell.span);
  link.dataset.id = cell.id;
  if (cell.selected) link.setAttribute("aria-current", "true");
  else link.removeAttribute("aria-current");
  const text = element("span", "text");
  const head = element("span", "head");
  head.append(breakable("title", cell.title));
  if (cell.value) head.append(breakable("amount", cell.value));
  text.append(head);
  for (const line of cell.lines || []) text.append(breakable("line", line));
  const frame = picture(cell, kept?.querySelector("img") ? kept.querySelector(".frame") : undefined);
  if (cell.badge) frame.append(element("span", `badge ${cell.badge.kind || "plain"}`, cell.badge.text));
  if (cell.marks?.length) {
    const marks = element("span", "marks");
    for (const mark of cell.marks) marks.append(element("span", "mark", mark));
    frame.append(marks);
  }
  if (cell.photo !== undefined) {
    link.dataset.photo = cell.photo;
    const box = element("span", "box");
    box.setAttribute("role", "checkbox");
    box.setAttribute("aria-label", "Choose this photo");
    frame.append(box);
  }
  if (frame.querySelector(".bare")?.getAttribute("src") !== cell.bare) frame.querySelector(".bare")?.remove();
  link.xattnBare = cell.bare;
  link.replaceChildren(frame, text);
  link.title = cell.title;
  return link;
}

// The photo lies over the picture and is transparent until the style sheet shows it. It is fetched when it
// is first wanted.
function fetchBare(cell) {
  const image = cell?.querySelector(".frame > img:not(.bare)");
  if (!image || !cell.xattnBare || cell.querySelector(".bare")) return;
  const photo = element("img", "bare");
  photo.alt = "";
  photo.addEventListener("error", () => photo.remove());
  photo.src = cell.xattnBare;
  image.after(photo);
}

const LONG = 350; // milliseconds of a touch that shows the photo instead of opening the cell

function followTouch(state) {
  const root = state.root;
  let timer, held;
  const end = () => {
    clearTimeout(timer);
    held?.classList.remove("held");
    held = null;
  };
  root.addEventListener("pointerdown", (event) => {
    const cell = event.target.closest(".cell");
    state.long = false;
    if (event.pointerType !== "touch" || !cell?.xattnBare) return;
    timer = setTimeout(() => {
      state.long = true;
      held = cell;
      fetchBare(cell);
      cell.classList.add("held");
    }, LONG);
  });
  for (const kind of ["pointerup", "pointercancel", "pointerleave"]) root.addEventListener(kind, end);
  // The menu of a link would take the touch away.
  root.addEventListener("contextmenu", (event) => held && event.preventDefault());
}

// The place of the cell above or below one.
function inColumn(cells, at, step) {
  const column = cells.filter((cell) => cell.offsetLeft === cells[at].offsetLeft);
  const next = column[column.indexOf(cells[at]) + step];
  if (next || step < 0) return cells.indexOf(next);
  // Down from a full row above a shorter last one goes to its end, not to the next page.
  const end = cells[at].offsetTop + cells[at].offsetHeight;
  return cells.at(-1).offsetTop >= end ? cells.length - 1 : cells.length;
}

function follow(state, event) {
  const cells = [...state.root.querySelectorAll(".cell")];
  const at = cells.indexOf(event.target.closest(".cell"));
  if (at < 0 || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  const row = { ArrowUp: -1, ArrowDown: 1 }[event.key];
  let to = at;
  if (step) to = at + step;
  else if (row) to = inColumn(cells, at, row);
  else if (event.key === "Home") to = 0;
  else if (event.key === "End") to = cells.length - 1;
  else if (event.key === "PageDown") to = cells.length;
  else if (event.key === "PageUp") to = -1;
  else return;
  event.preventDefault();
  event.stopPropagation();
  if (to < 0 || to >= cells.length) {
    state.arriving = to < 0 ? "last" : "first";
    state.turn(to < 0 ? -1 : 1);
    return;
  }
  focus(cells, to);
}

// Show which photos are chosen.
function paint(state) {
  for (const cell of state.root.querySelectorAll(".cell")) {
    const chosen = state.chosen.has(cell.dataset.photo);
    cell.classList.toggle("chosen", chosen);
    cell.querySelector(".box")?.setAttribute("aria-checked", chosen);
  }
}

// Choose the photo at a place, or all from the last one to it; a second time leaves a single one out again.
function choose(state, at, range) {
  const photos = [...state.root.querySelectorAll(".cell")].map((cell) => cell.dataset.photo);
  const from = range && state.anchor < photos.length ? state.anchor : at;
  const part = photos.slice(Math.min(from, at), Math.max(from, at) + 1);
  if (from === at && state.chosen.has(photos[at])) state.chosen.delete(photos[at]);
  else for (const photo of part) state.chosen.add(photo);
  if (!range) state.anchor = at;
  tell(state, photos);
}

function tell(state, photos) {
  paint(state);
  const of = [...new Set(photos)];
  state.acts.add({ of, chosen: of.filter((photo) => state.chosen.has(photo)) });
}

// A key pressed anywhere on the page, unless somebody is typing.
function markKey(state, key) {
  const cells = [...state.root.querySelectorAll(".cell")];
  const at = cells.indexOf(state.root.getRootNode().activeElement);
  if (!cells.length || !state.keys) return false;
  if (key === "j" || key === "k") {
    const to = at < 0 ? cells.findIndex((cell) => cell.tabIndex === 0) : at + (key === "j" ? 1 : -1);
    if (to >= 0 && to < cells.length) return focus(cells, to);
    state.arriving = to < 0 ? "last" : "first";
    state.turn(to < 0 ? -1 : 1);
  } else if (key === "x") {
    if (at >= 0) choose(state, at);
  } else if (key === "escape") {
    if (!state.chosen.size) return false;
    state.chosen.clear();
    paint(state);
    state.acts.add({ key });
  } else state.acts.add({ key, photo: at < 0 ? null : cells[at].dataset.photo });
}

function focus(cells, at) {
  cells.forEach((cell, i) => (cell.tabIndex = i === at ? 0 : -1));
  cells[at].focus();
}

export default function ({ data, parentElement, setTriggerValue }) {
  const root = parentElement.querySelector(".grid");
  const state = (root.xattn ??= {
    ...{ root, shown: null, arriving: null },
    ...{ acts: new Acts(root), chosen: new Set(), anchor: 0 },
  });
  state.open = (id) => setTriggerValue("open", id);
  state.turn = (by) => setTriggerValue("turn", by);
  state.acts.send = (acts) => setTriggerValue("act", acts);
  state.keys = data.keys;
  if (state.shown === null) {
    root.addEventListener("keydown", (event) => follow(state, event));
    root.addEventListener("click", (event) => {
      const cell = event.target.closest(".cell");
      const many = event.ctrlKey || event.metaKey || event.shiftKey;
      if (cell && state.keys && !event.button && (many || event.target.closest(".box"))) {
        event.preventDefault();
        const at = [...root.querySelectorAll(".cell")].indexOf(cell);
        return choose(state, at, event.shiftKey);
      }
      // Another tab or window: the browser follows the link by itself.
      if (!cell || event.ctrlKey || event.metaKey || event.shiftKey || event.button) return;
      event.preventDefault();
      if (state.long) return;
      cell.classList.add("opening");
      setTimeout(() => cell.classList.remove("opening"), 1000);
      state.open(cell.dataset.id);
    });
    root.addEventListener("mousedown", (event) => {
      if (event.shiftKey && state.keys) event.preventDefault(); // no text is marked
    });
    if (data.keys) listen(root, (key) => markKey(state, key));
    root.addEventListener("pointerover", (event) => {
      if (event.pointerType === "mouse") fetchBare(event.target.closest(".cell"));
    });
    followTouch(state);
    root.addEventListener("focusin", (event) => {
      const cell = event.target.closest(".cell");
      fetchBare(cell);
      for (const other of root.querySelectorAll(".cell")) other.tabIndex = other === cell ? 0 : -1;
    });
  }
  const shown = JSON.stringify(data);
  const before = [...root.children];
  for (const cell of before) cell.classList.remove("opening");
  state.acts.taken(data.taken);
  if (shown === state.shown) return;
  const inside = root.getRootNode().activeElement?.closest?.(".cell");
  if (state.shown !== null && state.scroll !== data.scroll && root.getBoundingClientRect().top < 0)
    root.scrollIntoView({ block: "start" });
  state.shown = shown;
  state.scroll = data.scroll;
  root.setAttribute("role", "group");
  root.setAttribute("aria-label", data.label);
  root.style.setProperty("--columns", (!data.width && data.columns) || "auto-fill");
  root.style.setProperty("--aspect", data.aspect);
  root.style.setProperty("--fit", data.cover ? "cover" : "contain");
  // A cell takes its part of a row, gaps of 12 pixels left out, where that is more than its width.
  const part = data.columns ? `(100% - ${12 * data.columns}px) / ${data.columns}` : "0px";
  if (data.width) root.style.setProperty("--cell", `max(${data.width}px, ${part})`);
  root.classList.toggle("table", data.rows > 0);
  root.style.setProperty("--rows", data.rows);
  const parts = data.cells.map((cell) => build(cell, before));
  const cells = parts.filter((part) => part.matches(".cell"));
  cells.forEach((cell, i) => (cell.tabIndex = i === 0 ? 0 : -1));
  if (parts.length !== root.children.length || parts.some((part, i) => part !== root.children[i]))
    root.replaceChildren(...parts);
  if (!state.acts.waiting.length)
    state.chosen = new Set(data.cells.filter((cell) => cell.chosen).map((cell) => cell.photo));
  paint(state);
  if (data.linked) linkFrames(root, data); // in zoom.js
  if (!cells.length) return;
  const same = inside && cells.findIndex((cell) => cell.dataset.id === inside.dataset.id);
  if (state.arriving) focus(cells, state.arriving === "last" ? cells.length - 1 : 0);
  else if (inside) focus(cells, Math.max(same, 0));
  state.arriving = null;
}
