// What is known of the selection: a node, a group of them, or a moment of the step.

const MOST_LISTED = 60;

class Details {
  constructor(app) {
    this.app = app;
    this.run = app.run;
    this.panel = document.getElementById("details");
    this.showHelp();
  }

  show(...parts) {
    this.panel.replaceChildren(...parts.filter(Boolean));
    this.panel.scrollTop = 0;
  }

  showHelp() {
    this.show(
      element("h2", {}, "Nothing selected"),
      element("p", {}, "Click a node, a span of the timeline, or a moment of the memory; the others show it, too."),
      element("dl", { class: "keys" }, ...[
        ["← →", "the pass before, the next"], ["/", "search"], ["0", "all of the graph in view"], ["Esc", "select nothing"],
        ["wheel, drag", "zoom and move"], ["shift + wheel", "move in time"],
      ].flatMap(([key, does]) => [element("dt", {}, key), element("dd", {}, does)])),
      element("p", { class: "made" }, this.run.data.made),
    );
  }

  showNode(node) {
    const { run, app } = this, { graph } = app.state;
    const isThere = run.orders[graph].includes(node);
    const seen = isThere ? graph : run.history(node).reduce((last, [at, what]) => (what === "removed" || at > graph ? last : at), 0);
    const edges = run.edges(isThere ? graph : seen);
    const reads = edges.reads.get(node) ?? { nodes: [], inputs: [] }, readers = edges.readers.get(node) ?? [];
    this.show(
      element("h2", {}, element("span", { class: `dot ${kindOf(run.op(node, seen))}` }), nodeName(run, node, Infinity)),
      element("p", { class: "facts" }, `${run.op(node, seen)}, ${PHASES[run.nodes.phase[node]]}${isThere ? "" : `; not in the graph after ${run.data.graphs[graph].name}`}`),
      element("pre", { class: "node-text" }, run.text(node, seen)),
      ...this.source(node),
      ...this.history(node),
      ...this.when(node),
      ...this.memory(node),
      ...this.links("Reads", reads.nodes, reads.inputs),
      ...this.links("Read by", readers),
    );
  }

  source(node) {
    const { module, file, line, by } = this.run.nodes, lines = this.run.data.sources[file[node]]?.[line[node]];
    if (!module[node] && !file[node]) return [];
    const first = line[node] - 3;
    return [
      element("h3", {}, "Source"),
      module[node] ? element("p", { class: "module" }, module[node]) : null,
      file[node] ? element("p", { class: "file", title: file[node] }, `${file[node].split("/").slice(-2).join("/")}:${line[node]}`) : null,
      lines ? element("pre", { class: "source" }, ...lines.map((text, i) => element(
        "div", { class: i === 3 ? "here" : "" }, element("i", {}, first + i > 0 ? String(first + i) : ""), text || " ",
      ))) : null,
      by[node] ? element("p", { class: "by" }, `put there by ${by[node]}`) : null,
    ];
  }

  history(node) {
    const { graphs } = this.run.data;
    return [
      element("h3", {}, "Passes"),
      element("ul", { class: "links" }, ...this.run.history(node).map(([graph, what]) => element(
        "li", {}, element("button", { onclick: () => this.app.showGraph(graph) },
          element("span", { class: `word ${KIND_OF_EVENT[what] ?? ""}` }, what), graph ? ` by ${graphs[graph].name}` : ""),
      ))),
    ];
  }

  when(node) {
    const spans = this.app.charts.spansOf?.get(node) ?? [];
    if (!spans.length) return [];
    return [
      element("h3", {}, "When"),
      ...spans.map(({ lane, start, us, other }) => element("p", { class: lane === "exposed" ? "when exposed-text" : "when" },
        lane === "exposed" ? `computing waits ${time(us)} for ` : `${LANE_NAMES[lane]}: ${time(us)}, from ${time(start)} to ${time(start + us)}`,
        lane === "exposed" && other >= 0 ? this.link(other) : "")),
    ];
  }

  memory(node) {
    const lives = this.app.charts.livesOf?.get(node) ?? [];
    if (!lives.length) return [];
    const { charts } = this.app;
    return [
      element("h3", {}, "Memory"),
      ...lives.slice(0, MOST_LISTED).map(life => element("p", { class: "when" }, element("span", { class: `dot ${life.category}` }),
        `${size(life.bytes)} of ${life.category}, from ${time(charts.timeOf(life.born))} to ${time(charts.timeOf(life.freed))}`)),
      lives.length > MOST_LISTED ? element("p", {}, `and ${lives.length - MOST_LISTED} more`) : null,
    ];
  }

  links(title, nodes, inputs = []) {
    if (!nodes.length && !inputs.length) return [];
    const more = nodes.length + inputs.length - MOST_LISTED;
    return [
      element("h3", {}, `${title} (${nodes.length + inputs.length})`),
      element("ul", { class: "links" },
        ...nodes.slice(0, MOST_LISTED).map(node => element("li", {}, this.link(node), element("small", {}, ` ${shortOp(this.run.op(node, this.app.state.graph))}`))),
        ...inputs.slice(0, Math.max(0, MOST_LISTED - nodes.length)).map(name => element("li", {}, `%${name}`, element("small", {}, " input"))),
        more > 0 ? element("li", {}, `and ${more} more`) : null),
    ];
  }

  link(node, name = nodeName(this.run, node, Infinity)) {
    return element("button", { class: "link", onclick: () => this.app.select(node, "details") }, name);
  }

  showGroup(group) {
    const { run } = this, { graph } = this.app.state, change = run.change(graph), ops = new Map();
    for (const op of group.nodes.map(node => shortOp(run.op(node, graph)))) ops.set(op, (ops.get(op) ?? 0) + 1);
    const changed = group.nodes.filter(node => didChange(change, node));
    this.show(
      element("h2", {}, group.label),
      element("p", { class: "facts" }, `${plural(group.nodes.length, "node")}${group.isStack ? `, ${group.items.length} that are alike` : ""}`),
      element("h3", {}, "Ops"),
      element("ul", { class: "counts" }, ...[...ops].sort((a, b) => b[1] - a[1]).slice(0, MOST_LISTED).map(([op, count]) => element(
        "li", {}, element("b", {}, count.toLocaleString("en")), ` ${op}`))),
      ...this.links(`Changed by ${run.data.graphs[graph].name}`, changed),
    );
  }

  showMoment(moment) {
    const { charts } = this.app, { rest } = this.run.data, node = charts.momentNodes[moment];
    const alive = charts.aliveAt(moment), device = alive.filter(life => life.category !== "host");
    const parts = charts.categories.map((name, i) => [name, charts.bytes[i][moment]]).filter(([, bytes]) => bytes > 0);
    parts.push(["rest", rest]);
    const most = Math.max(1, ...parts.map(([, bytes]) => bytes));
    this.show(
      element("h2", {}, `${size(charts.total[moment] + rest)} alive`),
      element("p", { class: "facts" }, `${moment === charts.peakAt ? "the peak, " : ""}at ${time(charts.us[moment])}, `, node >= 0 ? this.link(node) : ""),
      element("h3", {}, "By category"),
      element("ul", { class: "bars" }, ...parts.sort((a, b) => b[1] - a[1]).map(([name, bytes]) => element(
        "li", {}, element("span", { class: `bar-fill ${name}`, style: `width:${100 * bytes / most}%` }),
        element("span", { class: "bar-name" }, name === "rest" ? "at rest" : name), element("b", {}, size(bytes))))),
      element("h3", {}, `Alive now (${device.length})`),
      element("ul", { class: "links" }, ...device.slice(0, MOST_LISTED).map(life => element("li", {},
        element("span", { class: `dot ${life.category}` }), life.node >= 0 ? this.link(life.node, this.nameOf(life)) : this.nameOf(life),
        element("small", {}, ` ${size(life.bytes)}${life.name.endsWith("#") ? ", in flight" : ""}`))),
        device.length > MOST_LISTED ? element("li", {}, `and ${device.length - MOST_LISTED} more`) : null),
    );
  }

  nameOf(life) { return life.name === "#arena" ? "the program's arena" : `%${life.name.replace(/#$/, "")}`; }
}

const KIND_OF_EVENT = { made: "added", removed: "removed", changed: "changed", moved: "moved" };
