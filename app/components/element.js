/** What every component begins with: how its parts are made, and how a click opens one of them. */

function element(tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) {
    made.textContent = text;
    made.dir = "auto"; // names from right to left stand by themselves
  }
  return made;
}

function openByClick(root, links, open) {
  root.addEventListener("click", (event) => {
    const link = event.target.closest(links);
    // Another tab or window: the browser follows the link by itself.
    if (!link || event.ctrlKey || event.metaKey || event.shiftKey || event.button) return;
    event.preventDefault();
    open(link.dataset.id);
  });
}

// The row and the column of a picture's raster under the pointer, with fractions.
function rasterAt(event, picture, { rows, columns }) {
  const box = picture.getBoundingClientRect();
  const part = (share, count) => Math.min(Math.max(count * share, 0), count - 1e-6);
  return [
    part((event.clientY - box.top) / box.height, rows),
    part((event.clientX - box.left) / box.width, columns),
  ];
}
