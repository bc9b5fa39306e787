// What is selected, and who is told of it.

class App {
  constructor(run) {
    this.run = run;
    this.state = { graph: run.last, node: null, moment: null, onlyChanged: false };
    this.charts = new Charts(this);
    this.details = new Details(this);
    this.graph = new GraphView(this);
    this.program = new ProgramView(this);
    this.writeHead();
    this.writeStops();
    this.writeStep();
    this.search = new Search(this);
    this.listen();
    this.showTheme(DARK.matches);
    this.showGraph(run.last);
  }

  writeHead() {
    const { model, ranks, hardware } = this.run.data;
    byId("model").textContent = model;
    byId("facts").textContent = `${plural(this.run.orders.at(-1).length, "node")}, ${ranks} rank${ranks === "1" ? "" : "s"}, ${hardware}`;
  }

  writeStops() {
    const { graphs } = this.run.data;
    byId("slider").max = this.run.last;
    byId("stops").replaceChildren(...graphs.map((graph, at) => {
      const change = this.run.change(at);
      const counts = KINDS.filter(kind => change[kind].size).map(kind => element("span", { class: kind }, `${SIGNS[kind]}${short(change[kind].size)}`));
      return element("li", {}, element("button", { title: `${graph.step}, ${(graph.seconds * 1e3).toFixed(0)} ms`, onclick: () => this.showGraph(at) },
        element("b", {}, graph.name), element("small", {}, ...(counts.length ? counts : [at ? "as it was" : plural(this.run.orders[0].length, "node")]))));
    }));
  }

  writeStep() {
    const { step, why } = this.run.data;
    if (!step) {
      byId("step-summary").textContent = `No predicted step: ${why}`;
      document.body.classList.add("no-step");
      return;
    }
    const gap = step.bound ? ` (${(100 * Math.max(0, step.us / step.bound - 1)).toFixed(1)} % above the lower bound)` : "";
    const peak = this.charts.total[this.charts.peakAt] + this.run.data.rest;
    byId("step-summary").replaceChildren(
      element("b", {}, `Predicted step ${time(step.us)}`), gap, ", ",
      element("span", { class: "exposed-text" }, `${time(step.exposed)} exposed`), `, peak ${size(peak)}`,
    );
    byId("legend").replaceChildren(...this.charts.categories.filter((_, i) => this.charts.bytes[i].some(bytes => bytes > 0)).map(name => element(
      "span", {}, element("span", { class: `dot ${name}` }), name)));
  }

  showGraph(graph) {
    this.state.graph = graph;
    byId("slider").value = graph;
    [...byId("stops").children].forEach((stop, at) => stop.classList.toggle("now", at === graph));
    byId("stops").children[graph].scrollIntoView({ block: "nearest", inline: "nearest" });
    const change = this.run.change(graph), name = this.run.data.graphs[graph].name;
    const words = KINDS.filter(kind => change[kind].size).map(kind => `${change[kind].size.toLocaleString("en")} ${kind}`);
    byId("what-changed").textContent = graph ? `${name}: ${words.join(", ") || "as it was"}` : "as captured";
    this.graph.show();
    this.program.show();
    if (this.state.node !== null) this.select(this.state.node, "pass");
  }

  // Select a node everywhere; what it was selected in stays where it is.
  select(node, from) {
    Object.assign(this.state, { node, moment: null });
    if (from !== "graph" && from !== "pass") this.graph.reveal(node);
    if (from !== "text") this.program.reveal(node); else this.program.draw();
    if (from !== "timeline" && from !== "pass") this.charts.reveal(node);
    this.graph.mark();
    this.charts.ask();
    this.details.showNode(node);
  }

  selectMoment(moment) {
    const node = this.charts.momentNodes[moment];
    Object.assign(this.state, { moment, node: node >= 0 ? node : null });
    if (node >= 0) {
      this.graph.reveal(node);
      this.program.reveal(node);
    }
    this.graph.mark();
    this.charts.ask();
    this.details.showMoment(moment);
  }

  selectNothing() {
    Object.assign(this.state, { node: null, moment: null });
    this.graph.mark();
    this.program.draw();
    this.charts.ask();
    this.details.showHelp();
  }

  showGroup(group) {
    this.details.showGroup(group);
  }

  showTab(isText) {
    byId("text").hidden = !isText;
    byId("graph").toggleAttribute("hidden", isText);
    byId("show-text").setAttribute("aria-selected", isText);
    byId("show-graph").setAttribute("aria-selected", !isText);
    byId("graph-buttons").hidden = isText;
    if (!isText && this.graph.mustFit) this.graph.fit();
    if (this.state.node !== null) (isText ? this.program : this.graph).reveal(this.state.node);
    this.program.draw();
  }

  listen() {
    const clicks = {
      "show-graph": () => this.showTab(false), "show-text": () => this.showTab(true),
      collapse: () => this.graph.collapse(), fit: () => this.graph.fit(),
      "zoom-in": () => this.graph.zoom(1.3), "zoom-out": () => this.graph.zoom(1 / 1.3),
      "time-fit": () => this.charts.look(0, this.charts.end), "to-peak": () => this.showPeak(),
      theme: () => this.showTheme(document.documentElement.dataset.theme !== "dark"),
    };
    for (const [id, act] of Object.entries(clicks)) byId(id).addEventListener("click", act);
    byId("slider").addEventListener("input", event => this.showGraph(Number(event.target.value)));
    byId("only-changed").addEventListener("change", event => {
      this.state.onlyChanged = event.target.checked;
      this.graph.show();
      this.program.show();
      this.graph.fit();
    });
    window.addEventListener("keydown", event => this.pressed(event));
    window.addEventListener("resize", () => this.program.draw());
    DARK.addEventListener("change", () => this.showTheme(DARK.matches));
  }

  pressed(event) {
    if (event.target.matches("input[type=search]") || event.ctrlKey || event.metaKey || event.altKey) return;
    const { graph } = this.state;
    const act = {
      ArrowLeft: () => this.showGraph(Math.max(0, graph - 1)), ArrowRight: () => this.showGraph(Math.min(this.run.last, graph + 1)),
      "/": () => byId("query").focus(), "0": () => this.graph.fit(), Escape: () => this.selectNothing(),
    }[event.key];
    if (!act) return;
    event.preventDefault();
    act();
  }

  showPeak() {
    const { charts } = this, us = charts.us[charts.peakAt];
    if (us < charts.from || us > charts.to) charts.look(us - (charts.to - charts.from) / 2, us + (charts.to - charts.from) / 2);
    this.selectMoment(charts.peakAt);
  }

  showTheme(isDark) {
    document.documentElement.dataset.theme = isDark ? "dark" : "light";
    this.charts.ask();
  }
}

const MOST_HITS = 40;

class Search {
  constructor(app) {
    this.app = app;
    this.field = byId("query");
    this.list = byId("hits");
    this.field.addEventListener("input", () => this.look());
    this.field.addEventListener("focus", () => this.look());
    this.field.addEventListener("keydown", event => this.pressed(event));
    document.addEventListener("pointerdown", event => event.target.closest("#search") || this.close());
  }

  look() {
    const { run } = this.app;
    this.hits = run.find(this.field.value, MOST_HITS);
    this.at = 0;
    const rows = this.hits.map((node, at) => element("li", { role: "option", onclick: () => this.take(at) },
      element("b", {}, nodeName(run, node)), ` ${shortOp(run.op(node))} `, element("small", {}, run.module(node))));
    if (!rows.length && this.field.value.trim()) rows.push(element("li", { class: "none" }, "nothing found"));
    this.list.replaceChildren(...rows);
    this.list.hidden = !rows.length;
    this.field.setAttribute("aria-expanded", !this.list.hidden);
    this.mark();
  }

  mark() {
    [...this.list.children].forEach((row, at) => row.classList.toggle("now", at === this.at));
    this.list.children[this.at]?.scrollIntoView({ block: "nearest" });
  }

  pressed(event) {
    if (event.key === "Escape") this.close();
    else if (event.key === "Enter" && this.hits?.length) this.take(this.at);
    else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      const count = this.hits?.length ?? 0;
      if (count) this.at = (this.at + (event.key === "ArrowDown" ? 1 : count - 1)) % count;
      this.mark();
      event.preventDefault();
    }
  }

  // Select a hit, in a graph that has it.
  take(at) {
    const { app } = this, node = this.hits[at];
    const has = graph => app.run.orders[graph].includes(node);
    this.close();
    if (!has(app.state.graph) && !app.run.change(app.state.graph).removed.has(node)) {
      app.showGraph(app.run.orders.findLastIndex(order => order.includes(node)));
    }
    app.select(node, "search");
  }

  close() {
    this.list.hidden = true;
    this.field.setAttribute("aria-expanded", false);
    this.field.blur();
  }
}

const DARK = matchMedia("(prefers-color-scheme: dark)");

const byId = id => document.getElementById(id);

const short = count => count < 1e3 ? String(count) : `${(count / 1e3).toFixed(count < 1e4 ? 1 : 0)}k`;

const began = performance.now();
readRun().then(run => {
  window.zgraph = new App(run);
  requestAnimationFrame(() => requestAnimationFrame(() => {
    document.body.dataset.ready = String(Math.round(performance.now()));
    console.debug(`ready after ${(performance.now() - began).toFixed(0)} ms`);
  }));
}).catch(error => {
  document.getElementById("details").textContent = `This file cannot be shown: ${error.message}`;
  throw error;
});
