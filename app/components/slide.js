/** Before/after slider. All text goes in as text; the range input gives focus and keys. */

function build(root) {
  const frame = element("div", "frame");
  const before = element("img", "before");
  const after = element("img", "after");
  after.alt = ""; // the two pictures share one description
  const left = element("span", "tag left");
  const right = element("span", "tag right");
  const edge = element("span", "edge");
  for (const hidden of [left, right, edge]) hidden.setAttribute("aria-hidden", "true");
  frame.append(before, after, left, right, edge);
  const range = element("input", "range");
  Object.assign(range, { type: "range", min: "0", max: "100", step: "1", value: "50" });
  root.append(frame, range);

  const show = () => {
    const share = Number(range.value);
    root.style.setProperty("--share", `${share}%`);
    range.setAttribute("aria-valuetext", `${share} % ${left.textContent}`);
    left.hidden = share < 18;
    right.hidden = share > 82;
  };
  const follow = (event) => {
    const box = frame.getBoundingClientRect();
    range.value = String(Math.round((100 * (event.clientX - box.left)) / box.width));
    show();
  };
  frame.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    event.preventDefault();
    frame.setPointerCapture(event.pointerId);
    range.focus({ preventScroll: true });
    follow(event);
  });
  frame.addEventListener("pointermove", (event) => {
    if (frame.hasPointerCapture(event.pointerId)) follow(event);
  });
  range.addEventListener("input", show);
  // The page's own shortcuts must not see the keys that move the edge.
  range.addEventListener("keydown", (event) => event.stopPropagation());
  return { before, after, left, right, range, show };
}

const built = new WeakMap();

export default function ({ data, parentElement }) {
  const root = parentElement.querySelector(".slide");
  if (!built.has(root)) built.set(root, build(root));
  const parts = built.get(root);
  for (const side of ["before", "after"]) {
    if (parts[side].getAttribute("src") !== data[side].src) parts[side].src = data[side].src;
  }
  parts.before.alt = data.alt;
  parts.left.textContent = data.after.name;
  parts.right.textContent = data.before.name;
  parts.range.setAttribute("aria-label", data.label);
  parts.show();
}
