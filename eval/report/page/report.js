"use strict";
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

// Elements are made from nodes and text alone: a name is never read as HTML.
function fill(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}
const make = (tag, attributes = {}, ...children) =>
  fill(document.createElement(tag), attributes, children);
const draw = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS(SVG, tag), attributes, children);
// A dagger after the name of a method in a column that is close to its head's training.
const named = (m, c) => data.methods[m].name + (data.methods[m].trained.includes(c) ? " †" : "");
const show = (value) => value === null ? "-" : Number(value.toPrecision(4)).toString();

// ---------------------------------------------------------------- leaderboard

const table = byId("table");
const body = table.tBodies[0];
const firstOrder = [...body.rows];

const seconds = window.XATTN_SECONDS || {};
firstOrder.forEach((row, m) => {
  const name = data.methods[m].name;
  const value = Object.prototype.hasOwnProperty.call(seconds, name) ? seconds[name] : null;
  if (typeof value !== "number" || !Number.isFinite(value)) return;
  const cell = row.querySelector("[data-seconds]");
  cell.dataset.v = value;
  cell.textContent = value > 0 && value < 0.001 ? value.toExponential(1) : value.toFixed(3);
});

const heads = [...table.querySelectorAll("thead button")].map((button) => button.closest("th"));
heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
  const up = head.dataset.up === "1";
  const first = up ? "descending" : "ascending", second = up ? "ascending" : "descending";
  const next = { none: first, [first]: second, [second]: "none" }[head.getAttribute("aria-sort")];
  heads.forEach((other) => other.setAttribute("aria-sort", "none"));
  head.setAttribute("aria-sort", next);
  const sign = next === "ascending" ? 1 : -1;
  const key = (row) => column ? parseFloat(row.cells[column].dataset.v) : row.dataset.name;
  const rows = [...firstOrder];
  if (next !== "none") rows.sort((a, b) => {
    const x = key(a), y = key(b);
    if (x !== x || y !== y) return (x !== x) - (y !== y); // without a value: last, either way
    return sign * (x < y ? -1 : x > y ? 1 : 0);
  });
  body.append(...rows);
}));
firstOrder.forEach((row, m) => { row.dataset.name = data.methods[m].name.toLowerCase(); });

document.querySelectorAll("input[data-kind]").forEach((box) => box.addEventListener("change", () => {
  table.querySelectorAll(`[data-kind="${box.dataset.kind}"]`).forEach((cell) => {
    cell.hidden = !box.checked;
  });
}));
byId("intervals").addEventListener("change", (event) => {
  table.classList.toggle("no-intervals", !event.target.checked);
});

// ---------------------------------------------------------------- charts

// At most as wide as the screen, so that labels keep their size there.
const W = Math.max(300, Math.min(480, document.documentElement.clientWidth - 24)), H = 300, BOX = { left: 52, right: 12, top: 28, bottom: 40 };

function ticks(low, high) {
  const raw = (high - low) / 7 || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((f) => f * power).find((s) => s >= raw);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) found.push(k * step);
  return found;
}

// A frame with grid and labels; returns it with the two maps from values to pixels.
function frame(label, title, xRange, yRange, xLabel, yLabel, height = H) {
  const svg = draw("svg", { viewBox: `0 0 ${W} ${height}`, role: "img", "aria-label": label });
  const right = W - BOX.right, bottom = height - BOX.bottom;
  const scale = ([low, high], from, to) => (v) => from + (to - from) * (v - low) / (high - low || 1);
  const x = scale(xRange, BOX.left, right), y = scale(yRange, bottom, BOX.top);
  for (const v of ticks(...xRange)) svg.append(
    draw("line", { class: "grid", x1: x(v), x2: x(v), y1: BOX.top, y2: bottom }),
    draw("text", { x: x(v), y: bottom + 16, "text-anchor": "middle" }, show(v)));
  for (const v of ticks(...yRange)) svg.append(
    draw("line", { class: "grid", x1: BOX.left, x2: right, y1: y(v), y2: y(v) }),
    draw("text", { x: BOX.left - 6, y: y(v) + 4, "text-anchor": "end" }, show(v)));
  svg.append(
    draw("text", { class: "title", x: BOX.left, y: 16 }, title),
    draw("text", { x: (BOX.left + right) / 2, y: height - 6, "text-anchor": "middle" }, xLabel),
    draw("text", { x: 0, y: 0, "text-anchor": "middle",
      transform: `translate(12 ${(BOX.top + bottom) / 2}) rotate(-90)` }, yLabel));
  return { svg, x, y };
}

// Methods under test by rank in eight colours and three dashes, sanity rows grey.
const DASHES = ["", "7 4", "2 3"];
const styles = new Map();
data.ranked.forEach((m, k) => styles.set(m, {
  stroke: `var(--c${k % 8})`, "stroke-dasharray": DASHES[Math.floor(k / 8) % 3] }));
data.methods.forEach((_, m) => {
  if (styles.has(m)) return;
  styles.set(m, { stroke: "var(--quiet)",
    "stroke-dasharray": ["10 3", "4 3", "1 3", "10 3 2 3"][(styles.size - data.ranked.length) % 4] });
});
const drawn = [...styles.keys()].filter((m) => data.curves.some((chart) => m in chart.lines));
const usual = new Set(drawn.filter((m) => data.ranked.slice(0, 4).includes(m)
  || ["random", "centre"].includes(data.methods[m].name)));
let chosen = new Set(usual);

function drawCharts() {
  byId("charts").replaceChildren(...data.curves.map((chart) => {
    const all = drawn.filter((m) => m in chart.lines).map((m) => chart.lines[m]);
    const numbers = all.flatMap(([mean, lo, hi]) => [...mean, ...lo, ...hi]).filter((v) => v !== null);
    const yRange = [Math.min(0, ...numbers), Math.max(...numbers)];
    const xRange = ["deletion", "insertion"].includes(chart.key) ? [0, 1]
      : [Math.min(...chart.x), Math.max(...chart.x)];
    const { svg, x, y } = frame(
      `${chart.title} curves: mean ${data.score} against the ${chart.axis}; the table has the areas`,
      chart.title, xRange, yRange, chart.axis, `mean ${data.score}`);
    for (const m of drawn.filter((m) => chosen.has(m) && m in chart.lines)) {
      const [mean, lo, hi] = chart.lines[m];
      const path = (values) => chart.x.map((v, t) => [x(v), y(values[t])])
        .filter((_, t) => values[t] !== null).map(([a, b]) => `${a.toFixed(1)},${b.toFixed(1)}`);
      svg.append(draw("g", { "data-m": m },
        draw("title", {}, data.methods[m].name),
        draw("polygon", { class: "band", fill: styles.get(m).stroke,
          points: [...path(hi), ...path(lo).reverse()].join(" ") }),
        draw("polyline", { class: "line", points: path(mean).join(" "), ...styles.get(m) })));
    }
    return make("figure", {}, svg);
  }));
}

function emphasise(m) {
  document.querySelectorAll("#charts svg").forEach((svg) => {
    const line = svg.querySelector(`g[data-m="${m}"]`);
    svg.classList.toggle("dim", line !== null);
    svg.querySelectorAll("g.hot").forEach((group) => group.classList.remove("hot"));
    if (line !== null) line.classList.add("hot");
  });
}

function drawLegend() {
  const buttons = drawn.map((m) => {
    const counts = data.curves.filter((c) => m in c.lines).map((c) => c.lines[m][3]);
    const few = Math.min(...counts) < data.n ? ` (n = ${Math.min(...counts)})` : "";
    const base = data.methods[m].sanity ? ", sanity row" : "";
    const button = make("button", { type: "button", "aria-pressed": chosen.has(m) },
      draw("svg", { viewBox: "0 0 28 8", "aria-hidden": "true" },
        draw("line", { x1: 0, x2: 28, y1: 4, y2: 4, "stroke-width": 3, ...styles.get(m) })),
      data.methods[m].name + base + few);
    button.addEventListener("click", () => {
      if (!chosen.delete(m)) chosen.add(m);
      button.setAttribute("aria-pressed", chosen.has(m));
      drawCharts();
      emphasise(chosen.has(m) ? m : -1);
    });
    for (const on of ["pointerenter", "focus"]) button.addEventListener(on, () => emphasise(m));
    for (const off of ["pointerleave", "blur"]) button.addEventListener(off, () => emphasise(-1));
    return button;
  });
  const sets = { all: drawn, none: [], "first four and priors": usual };
  const more = Object.entries(sets).map(([name, set]) => {
    const button = make("button", { type: "button" }, name);
    button.addEventListener("click", () => { chosen = new Set(set); drawCharts(); drawLegend(); });
    return button;
  });
  byId("legend").replaceChildren(...more, ...buttons);
}

if (data.curves.length) { drawCharts(); drawLegend(); }
else byId("curves").hidden = true;

// ---------------------------------------------------------------- image by image

const methodNames = data.methods.map((m) => m.name);
const columnNames = data.columns.map((c) => c.key + (c.up ? " ↑" : " ↓"));

function select(label, names, value, changed) {
  const list = make("select", { "aria-label": label },
    ...names.map((name, i) => make("option", { value: i }, name)));
  list.value = value;
  list.addEventListener("change", changed);
  return list;
}

function scatter() {
  if (!data.columns.length) { byId("scatter").hidden = true; return; }
  const [one, two = one] = data.ranked.length ? data.ranked : [0];
  const start = data.cases.length ? data.cases[Math.min(1, data.cases.length - 1)].column : 0;
  const controls = ["x", "y"].map((axis, k) => [
    select(`metric on ${axis}`, columnNames, start, plot),
    select(`method on ${axis}`, methodNames, k ? two : one, plot),
  ]);
  byId("axes").append(...controls.map(([metric, method], k) => make("div", { class: "axis" },
    make("b", {}, k ? "y" : "x"), make("label", {}, "metric ", metric),
    make("label", {}, "method ", method))));
  plot();

  function plot() {
    const [[xc, xm], [yc, ym]] = controls.map((pair) => pair.map((list) => Number(list.value)));
    const points = data.points
      .map((image, k) => ({ image, a: data.values[xm][xc][k], b: data.values[ym][yc][k] }))
      .filter(({ a, b }) => a !== null && b !== null).sort((p, q) => p.a - q.a);
    if (!points.length) {
      byId("cloud").replaceChildren(make("p", {}, "No image has both values."));
      byId("sum").textContent = byId("point").textContent = "";
      return;
    }
    const same = xc === yc;
    const range = (...lists) => {
      const low = Math.min(...lists.flat()), high = Math.max(...lists.flat());
      const room = 0.04 * (high - low) || Math.abs(high) * 0.1 || 1;
      return [low - room, high + room];
    };
    const as = points.map((p) => p.a), bs = points.map((p) => p.b);
    const xRange = same ? range(as, bs) : range(as), yRange = same ? xRange : range(bs);
    const label = (m, c) => `${methodNames[m]}: ${columnNames[c]}`;
    const { svg, x, y } = frame(
      `${points.length} images, ${label(xm, xc)} against ${label(ym, yc)}`,
      "one dot, one image", xRange, yRange, label(xm, xc), label(ym, yc), 420);
    fill(svg, { tabindex: 0, role: "application" }, []);
    if (same) svg.append(draw("line", { class: "diagonal", x1: x(xRange[0]), y1: y(xRange[0]),
      x2: x(xRange[1]), y2: y(xRange[1]) }));
    const of = data.points.length < data.n ? ` (${data.points.length} of ${data.n} are on this page)` : "";
    let summary = `${points.length} images${of}. `;
    if (same && xm !== ym) {
      const above = points.filter((p) => p.b > p.a).length;
      const below = points.filter((p) => p.b < p.a).length;
      const few = points.length < data.least ? `: ${data.too_few}` : "";
      const [better, worse] = data.columns[xc].up ? [above, below] : [below, above];
      summary += `${methodNames[ym]} (y) is better on ${better}, worse on ${worse}, equal on ` +
        `${points.length - above - below}${few}. Dashed: equal values. `;
    }
    for (const [m, c] of same && xm === ym ? [[xm, xc]] : [[xm, xc], [ym, yc]]) {
      if (data.methods[m].trained.includes(c)) {
        summary += `The training of ${methodNames[m]} is close to ${data.columns[c].key}. `;
      }
    }
    const describe = ({ image, a, b }) => {
      const { id, class: name } = data.images[image];
      return `${id}\n${name}, ${data.score} ${show(data.images[image].p)}\n` +
        `x ${show(a)}  ${label(xm, xc)}\ny ${show(b)}  ${label(ym, yc)}`;
    };
    const dots = points.map((p) => draw("circle", { cx: x(p.a), cy: y(p.b), r: 5 },
      draw("title", {}, describe(p))));
    let at = -1;
    const pick = (k) => {
      if (at >= 0) dots[at].classList.remove("on");
      at = k;
      dots[k].classList.add("on");
      byId("point").textContent = describe(points[k]);
    };
    dots.forEach((dot, k) => {
      dot.addEventListener("pointerenter", () => pick(k));
      dot.addEventListener("click", () => pick(k));
    });
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      pick((at + step + dots.length) % dots.length);
    });
    svg.append(...dots);
    byId("cloud").replaceChildren(svg);
    byId("sum").textContent = summary;
    byId("point").textContent = "Point at a dot, or use the arrow keys on the plot.";
  }
}
scatter();

// ---------------------------------------------------------------- best and worst cases

function cases() {
  if (!data.cases.some((c) => c.methods.length)) { byId("cases").hidden = true; return; }
  const metric = select("metric", data.cases.map((c) => columnNames[c.column]), 0, grid);
  const overlay = make("input", { type: "range", min: 0, max: 100, value: 55 });
  overlay.addEventListener("input", () => {
    byId("grid").style.setProperty("--overlay", overlay.value / 100);
  });
  byId("choice").append(make("label", {}, "metric ", metric));
  if (Object.keys(data.photos).length) byId("choice").append(make("label", {}, "map over photo ", overlay));
  if (Object.keys(data.maps).length) byId("choice").append(make("span", { class: "tag" },
    "map: least ", make("span", { class: "scale", role: "img", "aria-label": "dark to bright" }), " most relevant"));
  grid();

  function picture(m, i) {
    const { id, class: name } = data.images[i];
    const photo = data.photos[i], map = data.maps[`${m}:${i}`];
    const box = make("div", { class: "case" });
    const what = `of ${methodNames[m]} for ${id}, ${name}`;
    if (photo) box.append(make("img", { src: photo, loading: "lazy",
      alt: map ? "" : `Photo ${id}; no map ${what}` }));
    if (map) box.append(make("img", { src: map, loading: "lazy",
      alt: (photo ? "Heat map over the photo, " : "Heat map ") + what }));
    if (!photo && !map) box.append(make("span", {}, "no picture"));
    return box;
  }

  function end(title, m, images, digitsOf) {
    return make("div", {}, make("h4", {}, title), make("div", { class: "pair" },
      ...images.map(([i, value]) => make("figure", {}, picture(m, i), make("figcaption", {},
        make("b", {}, digitsOf(value)), make("span", {}, data.images[i].class),
        make("span", {}, data.images[i].id))))));
  }

  function grid() {
    const chosenCase = data.cases[Number(metric.value)];
    const key = data.columns[chosenCase.column].key;
    const rest = data.ranked.length - chosenCase.methods.length;
    byId("cases-note").textContent = `Each method's own extremes in ${columnNames[chosenCase.column]}; ` +
      "of equal values the earlier image." +
      (rest > 0 ? ` ${chosenCase.methods.length} of ${data.ranked.length} methods, by mean rank.` : "") +
      (chosenCase.methods.some(([m]) => data.methods[m].trained.includes(chosenCase.column))
        ? " † its training is close to this metric." : "");
    byId("grid").replaceChildren(...chosenCase.methods.map(([m, best, worst]) =>
      make("article", { class: "card" }, make("h3", { class: "name" }, named(m, chosenCase.column)),
        make("div", { class: "ends" },
          end("best", m, best, (v) => `${key} ${show(v)}`),
          ...(worst.length ? [end("worst", m, worst, (v) => `${key} ${show(v)}`)] : [])))));
  }
}
cases();
})();
