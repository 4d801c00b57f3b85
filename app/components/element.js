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

// The pointer's place on a picture, (x, y) as shares of its width and height.
function sharesAt(event, picture) {
  const { left, top, width, height } = picture.getBoundingClientRect();
  const share = (value) => Math.min(Math.max(value, 0), 1);
  return [share((event.clientX - left) / width), share((event.clientY - top) / height)];
}

// The row and the column of a picture's raster under the pointer, with fractions.
function rasterAt(event, picture, { rows, columns }) {
  const [x, y] = sharesAt(event, picture);
  return [Math.min(rows * y, rows - 1e-6), Math.min(columns * x, columns - 1e-6)];
}
