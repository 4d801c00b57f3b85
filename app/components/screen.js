/** Tells the page whether the screen is a narrow one, now and when it is turned. It shows nothing.

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

export default function ({ data, parentElement, setStateValue }) {
  const root = parentElement.querySelector(".screen");
  const state = (root.xattn ??= { said: data.narrow });
  state.say = (narrow) => {
    if (narrow === state.said) return;
    state.said = narrow;
    setStateValue("narrow", narrow);
  };
  if (!state.query) {
    state.query = matchMedia(`(max-width: ${data.most}px)`);
    state.query.addEventListener("change", () => state.say(state.query.matches));
  }
  state.say(state.query.matches);
  document.addEventListener("click", closeFirst, true);
  return () => document.removeEventListener("click", closeFirst, true);
}
