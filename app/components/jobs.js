/** A table of jobs: a click on a name opens the job, the boxes choose those whose losses are compared.

All text goes in as text.
*/

const COLUMNS = ["Job", "What", "State", "Progress", "Best", "Started", "Took"];

function box(job) {
  const place = element("td", "box");
  const label = element("label");
  const field = element("input");
  field.type = "checkbox";
  field.checked = job.chosen;
  field.dataset.id = job.id;
  field.setAttribute("aria-label", `Compare the losses of ${job.id}`);
  label.append(field);
  place.append(label);
  return place;
}

function progress(job) {
  const place = element("td", "progress");
  if (job.share === null) return place;
  const bar = element("span", "bar");
  bar.setAttribute("role", "progressbar");
  bar.setAttribute("aria-label", `Progress of ${job.id}`);
  bar.setAttribute("aria-valuenow", Math.round(100 * job.share));
  const done = element("b");
  done.style.width = `${100 * job.share}%`;
  bar.append(done);
  place.append(bar, element("span", "share", job.done));
  return place;
}

function row(job) {
  const line = element("tr");
  if (job.selected) line.setAttribute("aria-current", "true");
  const name = element("td", "name");
  const link = element("a", "", job.id);
  link.href = job.href;
  link.dataset.id = job.id;
  link.dir = "auto";
  name.append(link);
  line.append(
    box(job),
    name,
    element("td", "what", job.what),
    element("td", `state ${job.kind}`, job.state),
    progress(job),
    element("td", "best", job.best),
    element("td", "started", job.started),
    element("td", "took", job.took),
  );
  return line;
}

export default function ({ data, parentElement, setTriggerValue }) {
  const root = parentElement.querySelector(".jobs");
  const state = (root.xattn ??= { shown: null });
  state.send = setTriggerValue;
  if (state.shown === null) {
    openByClick(root, "a", (id) => state.send("open", id));
    root.addEventListener("change", () => {
      const chosen = [...root.querySelectorAll("input:checked")].map((field) => field.dataset.id);
      state.send("chosen", chosen);
    });
  }
  const shown = JSON.stringify(data);
  if (shown === state.shown) return;
  state.shown = shown;
  const at = root.getRootNode().activeElement;
  const table = element("table");
  table.setAttribute("aria-label", "Jobs");
  const head = element("thead");
  const titles = element("tr");
  titles.append(element("th"), ...COLUMNS.map((name) => element("th", "", name)));
  head.append(titles);
  const body = element("tbody");
  body.append(...data.jobs.map(row));
  table.append(head, body);
  root.replaceChildren(table);
  // A running job brings the table anew; the focus stays where it was.
  if (at?.dataset?.id) root.querySelector(`${at.localName}[data-id="${at.dataset.id}"]`)?.focus();
}
