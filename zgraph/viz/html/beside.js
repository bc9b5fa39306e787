// Two runs on one page: a second copy of what shows a run, the passes of both on one slider, and where they differ.

// Copy the parts of the page that show a run, with ids of their own.
function addSecond(suffix) {
  const main = document.querySelector("main"), charts = byId("charts");
  for (const [part, add] of [[byId("program-side"), copy => main.insertBefore(copy, byId("details"))], [charts, copy => charts.after(copy)]]) {
    const copy = part.cloneNode(true);
    for (const found of [copy, ...copy.querySelectorAll("[id]")]) found.id += suffix;
    add(copy);
  }
  document.body.classList.add("two");
}

// The stops of the slider: { name, graphs, isIn }, a graph a run; where a run has no such pass, its latest before.
function positionsOf(runs) {
  const names = runs.map(run => run.data.graphs.map(graph => graph.name));
  const all = names.reduce(merged), latest = runs.map(() => 0);
  return all.map(name => {
    const found = names.map(own => own.indexOf(name));
    found.forEach((at, i) => { if (at >= 0) latest[i] = at; });
    return { name, graphs: [...latest], isIn: found.map(at => at >= 0) };
  });
}

// The names of both, in the order of the first; what only the second has stands behind what it has it behind.
function merged(first, second) {
  const all = [...first];
  let at = 0;
  for (const name of second) {
    const found = all.indexOf(name);
    if (found < 0) all.splice(at++, 0, name);
    else at = found + 1;
  }
  return all;
}

const FIGURES = [
  ["step", "step_us", time], ["lower bound", "bound_us", time], ["communication", "communication_us", time],
  ["exposed", "exposed_us", time], ["sent by a rank", "sent_bytes", size], ["peak", "peak_bytes", size],
];

// The figures in which two runs differ, with how much.
function figureTable(runs) {
  const [a, b] = runs.map(({ data }) => ({ ...data.figures, rest: data.rest }));
  const rows = [...FIGURES, ["at rest", "rest", size]].filter(([, key]) => a[key] !== b[key] && a[key] !== undefined && b[key] !== undefined);
  const plain = [["ranks", "ranks"], ["hardware", "hardware"]].filter(([, key]) => runs[0].data[key] !== runs[1].data[key]);
  if (!rows.length && !plain.length) return element("p", { class: "same" }, "No figure of the two runs differs.");
  return element("table", { class: "figures" },
    element("thead", {}, element("tr", {}, element("td"), ...runs.map(run => element("th", { scope: "col" }, run.data.name)), element("th", { scope: "col" }, "difference"))),
    element("tbody", {},
      ...plain.map(([title, key]) => element("tr", {}, element("th", { scope: "row" }, title), ...runs.map(run => element("td", {}, run.data[key])), element("td"))),
      ...rows.map(([title, key, told]) => element("tr", {}, element("th", { scope: "row" }, title),
        element("td", {}, told(a[key])), element("td", {}, told(b[key])), element("td", {}, differenceText(a[key], b[key], told))))));
}

function differenceText(a, b, told) {
  const sign = b > a ? "+" : "−", share = a ? ` (${sign}${unbroken(`${Math.abs(100 * (b / a - 1)).toFixed(1)} %`)})` : "";
  return `${sign}${unbroken(told(Math.abs(b - a)))}${share}`;
}
