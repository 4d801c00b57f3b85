/** Keys of a page without a grid that takes them: each is an act. */

export default function ({ data, parentElement, setTriggerValue }) {
  const root = parentElement.querySelector(".keys");
  if (!root.xattn) {
    root.xattn = new Acts(root);
    root.dataset.keys = data.keys.join(" ");
    listen(root, (key) => (data.keys.includes(key) ? root.xattn.add({ key }) : false));
  }
  root.xattn.send = (acts) => setTriggerValue("act", acts);
  root.xattn.taken(data.taken);
}
