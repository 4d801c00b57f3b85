/** What a person does by keys, as numbered acts; put before the components that know keys.

A run of the script may be interrupted by the next act, and forget this one. So every act is sent until a run says
that it took it up, after longer and longer waits: none is lost, and the script does none twice.
*/

class Acts {
  constructor(root) {
    this.root = root;
    this.waiting = [];
    this.last = 0;
  }
  add(act) {
    this.waiting.push({ ...act, n: ++this.last });
    this.again(4000);
    this.send([...this.waiting]);
  }
  again(wait) {
    clearTimeout(this.timer);
    if (this.waiting.length && this.root.isConnected)
      this.timer = setTimeout(() => {
        this.again(2 * wait);
        this.send([...this.waiting]);
      }, wait);
  }
  taken(n) {
    this.last = Math.max(this.last, n);
    this.waiting = this.waiting.filter((act) => act.n > n);
    this.again(500);
  }
}

const FIELDS = /^(TEXTAREA|SELECT)$/;
const BUTTONS = /^(checkbox|radio|range|button|submit)$/;

function typing(event) {
  const at = event.composedPath()[0];
  if (at.isContentEditable || FIELDS.test(at.tagName)) return true;
  return at.tagName === "INPUT" && !BUTTONS.test(at.type);
}

/** The key's name where it is one of ours: "1" to "9", "j", "k", "x", "undo", "redo" or "escape". */
function keyName(event) {
  if (event.defaultPrevented || event.altKey || event.isComposing || typing(event)) return null;
  const key = event.key.toLowerCase();
  if (key === "z") return event.shiftKey ? "redo" : "undo";
  if (event.ctrlKey || event.metaKey || event.shiftKey) return null;
  return /^[1-9jkx]$|^escape$/.test(key) ? key : null;
}

/** Call `act(name, event)` for keys anywhere on the page, as long as `root` is a part of it.

What was on the page that was left may be there a while longer: only the root that came last is asked.
*/
function listen(root, act) {
  const roots = (document.xattnRoots ??= new Set());
  roots.add(root);
  const follow = (event) => {
    if (!root.isConnected) {
      roots.delete(root);
      return document.removeEventListener("keydown", follow);
    }
    if ([...roots].findLast((other) => other.isConnected) !== root) return;
    const name = keyName(event);
    if (name && act(name, event) !== false) event.preventDefault();
  };
  document.addEventListener("keydown", follow);
}
