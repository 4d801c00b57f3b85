/** Tells the page whether the screen is a narrow one, now and when it is turned. It shows nothing. */

export default function ({ data, parentElement, setStateValue }) {
  const root = parentElement.querySelector(".width");
  const state = (root.xattn ??= { said: false });
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
}
