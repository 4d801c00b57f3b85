/** A matrix of counts whose cells open. Arrow keys move the focus between the cells that hold something.

Only one cell is in the tab order, the one that had the focus last. All text goes in as text.
*/

function heading(name, scope) {
  const made = element("th", scope);
  made.scope = scope;
  made.title = name;
  made.append(element("span", "class", name));
  return made;
}

function build(cell, row, column) {
  const place = element("td");
  if (!cell) return place;
  const link = element("a", `cell ${cell.kind}`, cell.text);
  link.href = cell.href || "#";
  link.title = cell.hint;
  link.setAttribute("aria-label", cell.hint);
  link.dataset.id = cell.id;
  link.dataset.row = row;
  link.dataset.column = column;
  link.style.setProperty("--share", `${Math.round(100 * cell.share)}%`);
  if (cell.selected) link.setAttribute("aria-current", "true");
  place.append(link);
  return place;
}

function nearest(cells, from, key) {
  const [row, column] = [Number(from.dataset.row), Number(from.dataset.column)];
  const across = key === "ArrowLeft" || key === "ArrowRight";
  const sign = key === "ArrowRight" || key === "ArrowDown" ? 1 : -1;
  const ahead = cells
    .map((cell) => [cell, Number(cell.dataset.row) - row, Number(cell.dataset.column) - column])
    .map(([cell, down, right]) => (across ? [cell, right * sign, Math.abs(down)] : [cell, down * sign, Math.abs(right)]))
    .filter(([, along]) => along > 0);
  // The next line of cells first; within it the one that is least to the side.
  ahead.sort((a, b) => a[1] + 2 * a[2] - b[1] - 2 * b[2] || a[1] - b[1]);
  return ahead.length ? ahead[0][0] : null;
}

function focus(cells, to) {
  for (const cell of cells) cell.tabIndex = cell === to ? 0 : -1;
  to.focus();
}

export default function ({ data, parentElement, setTriggerValue }) {
  const root = parentElement.querySelector(".matrix");
  const state = (root.xattn ??= { shown: null });
  state.open = (id) => setTriggerValue("open", id);
  if (state.shown === null) {
    root.addEventListener("keydown", (event) => {
      const from = event.target.closest(".cell");
      if (!from || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
      if (!event.key.startsWith("Arrow")) return;
      event.preventDefault();
      const cells = [...root.querySelectorAll(".cell")];
      const to = nearest(cells, from, event.key);
      if (to) focus(cells, to);
    });
    openByClick(root, ".cell", (id) => state.open(id));
  }
  const shown = JSON.stringify(data);
  if (shown === state.shown) return;
  state.shown = shown;
  const inside = root.getRootNode().activeElement?.dataset?.id;
  const table = element("table");
  table.setAttribute("aria-label", data.label);
  const head = element("tr");
  head.append(element("td", "corner", data.corner), ...data.columns.map((name) => heading(name, "col")));
  const rows = data.rows.map((row, i) => {
    const line = element("tr");
    line.append(heading(row.title, "row"), ...row.cells.map((cell, j) => build(cell, i, j)));
    return line;
  });
  table.append(head, ...rows);
  root.replaceChildren(table);
  const cells = [...root.querySelectorAll(".cell")];
  cells.forEach((cell, i) => (cell.tabIndex = i === 0 ? 0 : -1));
  const again = inside && cells.find((cell) => cell.dataset.id === inside);
  if (again) focus(cells, again);
}
