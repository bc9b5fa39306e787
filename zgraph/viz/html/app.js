// What is selected in a run, and who is told of it.

class App {
  constructor(report, run, suffix) {
    Object.assign(this, { report, run, suffix });
    this.state = { graph: 0, node: null, moment: null, onlyChanged: false };
    this.charts = new Charts(this);
    this.details = new Details(this);
    this.graph = new GraphView(this);
    this.program = new ProgramView(this);
    this.writeStep();
    this.listen();
  }

  // An element of this run's part of the page.
  part(id) { return byId(id + this.suffix); }

  writeStep() {
    const { step, why, figures } = this.run.data;
    if (!step) {
      this.part("step-summary").textContent = `No predicted step: ${why}`;
      this.part("charts").classList.add("no-step");
      return;
    }
    const gap = step.bound ? ` (${(100 * Math.max(0, step.us / step.bound - 1)).toFixed(1)} % above the lower bound)` : "";
    this.part("step-summary").replaceChildren(
      element("b", {}, `Predicted step ${time(step.us)}`), gap, ", ",
      element("span", { class: "exposed-text" }, `${time(step.exposed)} exposed`), `, peak ${size(figures.peak_bytes)}`,
    );
    this.part("legend").replaceChildren(...this.categories().map(name => element("span", {}, element("span", { class: `dot ${name}` }), name)));
  }

  // The categories of memory that ever have bytes.
  categories() {
    return this.charts.categories.filter((_, i) => this.charts.bytes[i].some(bytes => bytes > 0));
  }

  // Show a graph; `isOwn` is false where the run has none of the name that is asked for.
  drawGraph(graph, isOwn = true) {
    this.state.graph = graph;
    const change = this.run.change(graph), name = this.run.data.graphs[graph].name;
    const words = KINDS.filter(kind => change[kind].size).map(kind => `${change[kind].size.toLocaleString("en")} ${kind}`);
    this.part("what-changed").textContent = !isOwn ? `no such pass here; as after ${name}` : graph ? `${name}: ${words.join(", ") || "as it was"}` : "as captured";
    this.graph.show();
    this.program.show();
  }

  showGraph(graph) { this.report.showGraphOf(this, graph); }

  // Select a node everywhere; what it was selected in stays where it is.
  select(node, from) {
    if (!STAYS.includes(from)) this.goTo(node);
    this.follow(node, from);
    this.report.selected(this, node, from);
    this.details.showNode(node);
  }

  // Show the last graph that has a node, if the one that shows has it not.
  goTo(node) {
    const { run, state: { graph } } = this;
    if (run.orders[graph].includes(node) || run.change(graph).removed.has(node)) return;
    this.showGraph(run.orders.findLastIndex(order => order.includes(node)));
  }

  // Show a node, or none, as selected.
  follow(node, from) {
    Object.assign(this.state, { node, moment: null });
    if (node !== null) {
      if (from !== "graph" && from !== "pass") this.graph.reveal(node);
      if (from !== "text") this.program.reveal(node);
      if (from !== "timeline" && from !== "pass") this.charts.reveal(node);
    }
    this.program.draw();
    this.graph.mark();
    this.charts.ask();
  }

  selectMoment(moment) {
    const node = this.charts.momentNodes[moment];
    if (node >= 0) this.goTo(node);
    this.report.selected(this, null, "moment");
    Object.assign(this.state, { moment, node: node >= 0 ? node : null });
    if (node >= 0) {
      this.graph.reveal(node);
      this.program.reveal(node);
    }
    this.graph.mark();
    this.charts.ask();
    this.details.showMoment(moment);
  }

  showGroup(group) {
    this.details.showGroup(group);
  }

  showTab(isText) {
    this.part("text").hidden = !isText;
    this.part("graph").toggleAttribute("hidden", isText);
    this.part("show-text").setAttribute("aria-selected", isText);
    this.part("show-graph").setAttribute("aria-selected", !isText);
    this.part("graph-buttons").hidden = isText;
    if (!isText && this.graph.mustFit) this.graph.fit();
    if (this.state.node !== null) (isText ? this.program : this.graph).reveal(this.state.node);
    this.program.draw();
  }

  showOnlyChanged(onlyChanged) {
    if (this.state.onlyChanged === onlyChanged) return;
    this.state.onlyChanged = this.part("only-changed").checked = onlyChanged;
    this.graph.show();
    this.program.show();
    this.graph.fit();
  }

  listen() {
    const clicks = {
      "show-graph": () => this.report.showTab(false), "show-text": () => this.report.showTab(true),
      collapse: () => this.graph.collapse(), fit: () => this.graph.fit(),
      "zoom-in": () => this.graph.zoom(1.3), "zoom-out": () => this.graph.zoom(1 / 1.3),
      "time-fit": () => this.charts.look(0, this.charts.end), "to-peak": () => this.showPeak(),
    };
    for (const [id, act] of Object.entries(clicks)) this.part(id).addEventListener("click", act);
    this.part("only-changed").addEventListener("change", event => this.report.showOnlyChanged(event.target.checked));
  }

  showPeak() {
    const { charts } = this, us = charts.us[charts.peakAt];
    if (us < charts.from || us > charts.to) charts.look(us - (charts.to - charts.from) / 2, us + (charts.to - charts.from) / 2);
    this.selectMoment(charts.peakAt);
  }
}

// Where a node is selected without another graph being shown.
const STAYS = ["graph", "text", "pass", "link"];

const byId = id => document.getElementById(id);
