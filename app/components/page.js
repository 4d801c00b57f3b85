/** Keys of every page: ? lists the keys, / searches. It shows nothing by itself.

It also closes an open popover before a link to another page is followed. By itself Streamlit closes it
after the click, and the message that it was closed then asks for the page that was just left.
*/

const POPOVER = "[data-testid=stPopoverBody]";

function closeFirst(event) {
  const link = event.target.closest?.("a[href]");
  if (!event.isTrusted || !link || link.closest(POPOVER) || !document.querySelector(POPOVER)) return;
  if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  event.stopPropagation();
  document.body.click(); // a click beside it closes a popover
  setTimeout(() => link.click()); // Streamlit tells the server after a timeout of 0, too
}

function listKeys(keys) {
  const dialog = element("dialog", "xattn-keys");
  const list = element("dl");
  for (const [key, about] of keys) list.append(element("dt", "", key), element("dd", "", about));
  const close = element("button", "", "Close");
  dialog.append(element("h2", "", "Keys"), list, close);
  dialog.setAttribute("aria-label", "Keys");
  dialog.addEventListener("click", (event) => [dialog, close].includes(event.target) && dialog.close());
  dialog.addEventListener("keydown", (event) => event.stopPropagation()); // Escape closes it, and no photo is tagged
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
}

// Go to the field for searching; from another page by way of the gallery, which takes a moment to open.
function search(tries = 600) {
  const seen = (query) => [...document.querySelectorAll(query)].find((found) => found.checkVisibility());
  const field = seen("[data-testid=stMain] input[aria-label=Search]");
  if (field) return field.select();
  if (tries === 600) seen("a[href$='/'], a[href*='/?']")?.click();
  if (tries) setTimeout(() => search(tries - 1), 100);
}

function pageKey(event, keys) {
  if (event.defaultPrevented || event.altKey || event.ctrlKey || event.metaKey || typing(event)) return;
  if (document.querySelector("dialog[open]") || !"?/".includes(event.key)) return;
  event.preventDefault();
  event.key === "/" ? search() : listKeys(keys);
}

// Streamlit's own words about a lost server name commands that are not ours; the style sheet replaces them.
function markLost() {
  for (const dialog of document.querySelectorAll("[role=dialog]"))
    if (dialog.textContent.startsWith("Connection error")) dialog.dataset.xattnLost = "";
}

export default function ({ data }) {
  const dialogs = new MutationObserver(markLost);
  dialogs.observe(document.body, { childList: true });
  const follow = (event) => pageKey(event, data);
  document.addEventListener("click", closeFirst, true);
  document.addEventListener("keydown", follow);
  return () => {
    dialogs.disconnect();
    document.removeEventListener("click", closeFirst, true);
    document.removeEventListener("keydown", follow);
  };
}
