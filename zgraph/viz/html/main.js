// The page: one run, or two side by side, and what all of it shares.

class Report {
  constructor(runs) {
    if (runs.length > 1) addSecond("-2");
    this.runs = runs;
    this.positions = positionsOf(runs);
    this.opening = this.positions.findIndex(({ name }) => name === runs[0].data.graphs[runs[0].data.opening].name);
    this.apps = runs.map((run, at) => new App(this, run, at ? `-${at + 1}` : ""));
    [this.active] = this.apps;
    const stepped = this.apps.map(app => app.charts).filter(charts => charts.step);
    for (const charts of stepped) charts.link(stepped);
    this.writeHead();
    this.writeStops();
    this.search = new Search(this.apps);
    this.pictures = new Pictures(this);
    this.link = new Link(this);
    this.listen();
    this.showTheme(DARK.matches);
    this.link.read();
  }

  writeHead() {
    const { runs } = this, [{ data, orders }] = runs;
    byId("model").textContent = [...new Set(runs.map(run => run.data.model))].join(" and ");
    byId("facts").textContent = runs.length > 1 ? `${data.name} beside ${runs[1].data.name}`
      : `${plural(orders.at(-1).length, "node")}, ${data.ranks} rank${data.ranks === "1" ? "" : "s"}, ${data.hardware}`;
    byId("headline").replaceChildren(...runs.map(run => element("p", {},
      run.data.name ? element("span", { class: "name" }, run.data.name) : null,
      element("b", {}, run.data.headline[0]), ` ${unbroken(run.data.headline.slice(1, runs.length > 1 ? 2 : undefined).join(" "))}`)));
    if (runs.length > 1) {
      byId("headline").append(figureTable(runs));
      this.apps.forEach(app => ["program-side", "charts"].forEach(id => app.part(id).querySelector(".bar").prepend(element("b", { class: "name" }, app.run.data.name))));
    }
  }

  writeStops() {
    byId("slider").max = this.positions.length - 1;
    byId("stops").replaceChildren(...this.positions.map((position, at) => element("li", {}, element(
      "button", { onclick: () => this.show(at), title: this.stopTitle(position) },
      element("b", {}, position.name), ...this.runs.map((run, i) => element("small", {}, ...this.stopCounts(position, run, i)))))));
  }

  stopTitle({ graphs, isIn }) {
    const made = this.runs.map((run, i) => run.data.graphs[graphs[i]]).filter((_, i) => isIn[i]);
    return [...new Set(made.map(graph => `${graph.step}, ${(graph.seconds * 1e3).toFixed(0)} ms`))].join("\n");
  }

  stopCounts({ graphs, isIn }, run, i) {
    if (!isIn[i]) return ["–"];
    const change = run.change(graphs[i]);
    const counts = KINDS.filter(kind => change[kind].size).map(kind => element("span", { class: kind }, `${SIGNS[kind]}${short(change[kind].size)}`));
    return counts.length ? counts : [graphs[i] ? "as it was" : plural(run.orders[0].length, "node")];
  }

  // Show what a pass made, in each run that has it.
  show(at) {
    this.at = at;
    byId("slider").value = at;
    [...byId("stops").children].forEach((stop, i) => stop.classList.toggle("now", i === at));
    const stop = byId("stops").children[at], frame = byId("passes");
    if (stop.offsetLeft < frame.scrollLeft || stop.offsetLeft + stop.offsetWidth > frame.scrollLeft + frame.clientWidth) {
      frame.scrollLeft = stop.offsetLeft - (frame.clientWidth - stop.offsetWidth) / 2;
    }
    const { graphs, isIn } = this.positions[at];
    this.apps.forEach((app, i) => app.drawGraph(graphs[i], isIn[i]));
    if (this.active.state.node !== null) this.active.select(this.active.state.node, "pass");
    this.link.moved();
  }

  showGraphOf(app, graph) {
    const i = this.apps.indexOf(app);
    this.show(this.positions.findIndex(({ graphs, isIn }) => isIn[i] && graphs[i] === graph));
  }

  // A node was selected in a run, or none: the other run shows its own of that name.
  selected(app, node, from) {
    this.active = app;
    for (const other of this.apps) {
      if (other !== app) other.follow(node === null ? null : other.run.numberOf(app.run.key(node)) ?? null, from === "pass" ? from : "other");
    }
    this.link.moved();
  }

  selectNothing() {
    for (const app of this.apps) app.follow(null);
    this.active.details.showHelp();
    this.link.moved();
  }

  showTab(isText) {
    this.isText = isText;
    for (const app of this.apps) app.showTab(isText);
    this.link.moved();
  }

  showOnlyChanged(onlyChanged) {
    for (const app of this.apps) app.showOnlyChanged(onlyChanged);
    this.link.moved();
  }

  // What is shown, as the address says it.
  stateText() {
    const { run, state } = this.active, said = new URLSearchParams({ pass: this.positions[this.at].name });
    if (state.node !== null) said.set("node", run.key(state.node));
    if (state.node !== null && this.active !== this.apps[0]) said.set("run", "2");
    if (this.isText) said.set("view", "text");
    if (state.onlyChanged) said.set("only", "changed");
    return said.toString();
  }

  listen() {
    byId("slider").addEventListener("input", event => this.show(Number(event.target.value)));
    byId("theme").addEventListener("click", () => this.showTheme(!this.isDark));
    window.addEventListener("keydown", event => this.pressed(event));
    window.addEventListener("resize", () => this.apps.forEach(app => app.program.draw()));
    DARK.addEventListener("change", () => this.showTheme(DARK.matches));
    PRINT.addEventListener("change", () => this.toPaper(PRINT.matches));
  }

  pressed(event) {
    if (event.target.matches("input[type=search]") || event.ctrlKey || event.metaKey || event.altKey) return;
    const act = {
      ArrowLeft: () => this.show(Math.max(0, this.at - 1)), ArrowRight: () => this.show(Math.min(this.positions.length - 1, this.at + 1)),
      "/": () => byId("query").focus(), "0": () => this.apps.forEach(app => app.graph.fit()), Escape: () => this.selectNothing(),
    }[event.key];
    if (!act) return;
    event.preventDefault();
    act();
  }

  showTheme(isDark) {
    this.isDark = isDark;
    document.documentElement.dataset.theme = isDark ? "dark" : "light";
    for (const app of this.apps) app.charts.ask();
  }

  // Paper is white, and shows all of a graph.
  toPaper(isPaper) {
    document.documentElement.dataset.theme = this.isDark && !isPaper ? "dark" : "light";
    for (const app of this.apps) {
      app.graph.toPaper(isPaper);
      app.charts.draw();
    }
  }
}

const DARK = matchMedia("(prefers-color-scheme: dark)"), PRINT = matchMedia("print");

// A figure stays with its unit.
const unbroken = text => text.replace(/(\d) (?=\S)/g, "$1\u00a0");

const short = count => count < 1e3 ? String(count) : `${(count / 1e3).toFixed(count < 1e4 ? 1 : 0)}k`;

const began = performance.now();
readRuns().then(runs => {
  window.report = new Report(runs);
  [window.zgraph] = window.report.apps;
  requestAnimationFrame(() => requestAnimationFrame(() => {
    document.body.dataset.ready = String(Math.round(performance.now()));
    console.debug(`ready after ${(performance.now() - began).toFixed(0)} ms`);
  }));
}).catch(error => {
  document.getElementById("details").textContent = `This file cannot be shown: ${error.message}`;
  throw error;
});
