/** A list of packs with a search field. The arrow keys move in it, Enter and a click open a pack.

All text goes in as text.
*/

function line(pack) {
  const link = element("a", "pack");
  link.href = pack.href;
  link.dataset.id = pack.id;
  link.title = pack.title;
  if (pack.selected) link.setAttribute("aria-current", "true");
  const picture = element("img", "thumb");
  picture.loading = "lazy";
  picture.decoding = "async";
  picture.alt = "";
  picture.addEventListener("error", () => picture.replaceWith(element("span", "thumb")));
  picture.src = pack.src;
  link.append(picture, element("span", "title", pack.title), element("span", "line", pack.line));
  return link;
}

function problem(pack) {
  const place = element("div", "problem");
  place.append(element("span", "title", pack.title), element("span", "line", pack.line));
  return place;
}

function shown(root) {
  return [...root.querySelectorAll(".pack")].filter((link) => !link.hidden);
}

function find(root, words) {
  for (const place of root.querySelectorAll(".pack, .problem"))
    place.hidden = !words.every((word) => place.textContent.toLowerCase().includes(word));
  const heading = root.querySelector(".heading");
  if (heading) heading.hidden = ![...root.querySelectorAll(".problem")].some((place) => !place.hidden);
  root.querySelector(".none").hidden = [...root.querySelectorAll(".pack, .problem")].some((p) => !p.hidden);
}

function follow(state, event) {
  if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
  const links = shown(state.root);
  const at = links.indexOf(event.target.closest(".pack"));
  const field = event.target.closest(".search");
  const ends = field ? {} : { Home: 0, End: links.length - 1 };
  const to = { ArrowUp: at - 1, ArrowDown: at + 1, ...ends }[event.key];
  if (event.key === "Enter" && field && links.length) state.open(links[0].dataset.id);
  if (to === undefined) return;
  event.preventDefault();
  event.stopPropagation();
  if (to < 0) state.root.querySelector(".search")?.focus();
  else links[Math.min(to, links.length - 1)]?.focus();
}

export default function ({ data, parentElement, setTriggerValue }) {
  const root = parentElement.querySelector(".packs");
  const state = (root.xattn ??= { root, shown: null });
  state.open = (id) => setTriggerValue("open", id);
  if (state.shown === null) {
    root.addEventListener("keydown", (event) => follow(state, event));
    openByClick(root, ".pack", (id) => state.open(id));
  }
  const text = JSON.stringify(data);
  if (text === state.shown) return;
  state.shown = text;
  const list = element("div", "list");
  list.setAttribute("role", "group");
  list.setAttribute("aria-label", "Packs, the newest first");
  list.append(...data.packs.map(line));
  if (data.problems.length) list.append(element("p", "heading", "Cannot be shown"), ...data.problems.map(problem));
  const none = element("p", "none", "No pack of this name.");
  none.hidden = true;
  list.append(none);
  const parts = [list];
  if (data.search) {
    const field = element("input", "search");
    field.type = "search";
    field.placeholder = "Search packs";
    field.setAttribute("aria-label", "Search packs");
    field.addEventListener("input", () => find(root, field.value.toLowerCase().split(/\s+/).filter(Boolean)));
    parts.unshift(field);
  }
  root.replaceChildren(...parts);
  // A field would bring up a phone's keyboard over the list.
  const first = matchMedia("(pointer: coarse)").matches ? null : root.querySelector(".search");
  (first ?? root.querySelector(".pack[aria-current]") ?? root.querySelector(".pack"))?.focus({ preventScroll: true });
  root.querySelector(".pack[aria-current]")?.scrollIntoView({ block: "nearest" });
}
