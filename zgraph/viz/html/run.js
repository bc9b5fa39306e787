// The runs: what the file holds, and what follows from it. Nodes are numbers; a graph is an order of them.

async function readRuns() {
  const bytes = Uint8Array.from(atob(document.getElementById("data").textContent), c => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return (await new Response(stream).json()).map(data => new Run(data));
}

class Run {
  constructor(data) {
    this.data = data;
    Object.assign(kinds, data.kinds);
    this.nodes = data.nodes;
    this.count = data.nodes.key.length;
    this.last = data.graphs.length - 1;
    this.orders = [];
    for (const steps of data.orders) {
      let at = 0;
      this.orders.push(steps ? Int32Array.from(steps, step => (at += step)) : this.orders.at(-1));
    }
    this.texts = Array.from({ length: this.count }, () => []);
    for (const [node, graph, text] of data.texts) this.texts[node].push([graph, text, text.match(OP)[1]]);
    this.changes = [];
    this.uses = [];
    this.placeSums();
  }

  // The node of a key; undefined where there is none.
  numberOf(key) {
    this.numbers ??= new Map(this.nodes.key.map((name, node) => [name, node]));
    return this.numbers.get(key);
  }

  // What adds gradients up has no module of its own: it is shown in the one that all of its operands share.
  placeSums() {
    const { phase, module } = this.nodes;
    for (const order of new Set(this.orders)) {
      for (const node of order) {
        if (module[node] || phase[node] === "fwd") continue;
        const text = this.text(node, 0), makers = [];
        for (const [, name] of text.slice(Math.max(0, text.indexOf(" = "))).matchAll(VALUE)) makers.push(this.numberOf(name));
        module[node] = shared(makers.filter(maker => maker !== undefined).map(maker => module[maker]));
      }
    }
  }

  // A node as it is in a graph: as it was last written until there.
  version(node, graph) {
    let found = this.texts[node][0];
    for (const version of this.texts[node]) if (version[0] <= graph) found = version;
    return found;
  }

  text(node, graph) { return this.version(node, graph)[1]; }
  op(node, graph = this.last) { return this.version(node, graph)[2]; }
  key(node) { return this.nodes.key[node]; }
  module(node) { return this.nodes.module[node]; }

  // What the pass that made a graph did: sets of nodes.
  change(graph) {
    return this.changes[graph] ??= graph ? difference(this, this.orders[graph - 1], this.orders[graph], graph) : nothing();
  }

  // Who reads whom in a graph: for each node the nodes that it reads from, and those that read from it.
  edges(graph) {
    const order = this.orders[graph];
    const same = this.uses.find(found => found.order === order);
    if (same) return same;
    const makers = new Map(), reads = new Map(), readers = new Map();
    for (const node of order) {
      const text = this.text(node, graph), at = text.indexOf(" = ");
      if (at >= 0) for (const [, name] of text.slice(0, at).matchAll(VALUE)) makers.set(name, node);
    }
    for (const node of order) {
      const text = this.text(node, graph), at = text.indexOf(" = ");
      const from = [], inputs = [];
      for (const [, name] of text.slice(Math.max(0, at)).matchAll(VALUE)) {
        const maker = makers.get(name);
        if (maker === undefined) inputs.push(name);
        else if (maker !== node && !from.includes(maker)) from.push(maker);
      }
      reads.set(node, { nodes: from, inputs });
      for (const maker of from) {
        if (!readers.has(maker)) readers.set(maker, []);
        readers.get(maker).push(node);
      }
    }
    const found = { order, reads, readers };
    this.uses.push(found);
    return found;
  }

  // What the passes did to a node, in order: [graph, what].
  history(node) {
    const events = [];
    for (let graph = 0; graph <= this.last; graph++) {
      const change = this.change(graph);
      if (graph === 0 ? this.orders[0].includes(node) : change.added.has(node)) events.push([graph, graph ? "made" : "captured"]);
      if (change.changed.has(node)) events.push([graph, "changed"]);
      if (change.moved.has(node)) events.push([graph, "moved"]);
      if (change.removed.has(node)) events.push([graph, "removed"]);
    }
    return events;
  }

  find(query, limit) {
    const words = query.toLowerCase().replaceAll("%", "").split(/\s+/).filter(Boolean);
    if (!words.length) return [];
    const ranked = [];
    for (let node = 0; node < this.count; node++) {
      const key = this.key(node).toLowerCase();
      const all = `${key} ${this.op(node)} ${this.module(node)}`.toLowerCase();
      if (words.every(word => all.includes(word))) ranked.push([key === words[0] ? 0 : key.startsWith(words[0]) ? 1 : 2, node]);
    }
    ranked.sort((a, b) => a[0] - b[0] || a[1] - b[1]);
    return ranked.slice(0, limit).map(([, node]) => node);
  }
}

// The path that begins all of the paths.
function shared(paths) {
  const parts = paths.map(path => path.split("."));
  const found = parts[0]?.filter((name, at) => parts.every(other => other.slice(0, at + 1).join() === parts[0].slice(0, at + 1).join()));
  return found?.join(".") ?? "";
}

const OP = /^\w+ (?:%.*? = )?([\w.]+)\(/;

const VALUE = /%([^\s,:()\[\]"]+)/g;

const nothing = () => ({ added: new Set(), removed: new Set(), changed: new Set(), moved: new Set() });

function difference(run, before, after, graph) {
  const found = nothing();
  if (before === after) return found;
  const position = new Map();
  before.forEach((node, at) => position.set(node, at));
  const common = [];
  for (const node of after) {
    if (!position.has(node)) found.added.add(node);
    else {
      common.push(node);
      if (run.texts[node].some(([from]) => from === graph)) found.changed.add(node);
    }
  }
  const kept = new Set(common);
  for (const node of before) if (!kept.has(node)) found.removed.add(node);
  const inOrder = increasing(common.map(node => position.get(node)));
  common.forEach((node, at) => inOrder.has(at) || found.moved.add(node));
  return found;
}

// Where the numbers of a longest increasing run stand.
function increasing(numbers) {
  const tails = [], ends = [], before = new Int32Array(numbers.length);
  numbers.forEach((number, at) => {
    let low = 0, high = tails.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (tails[middle] < number) low = middle + 1; else high = middle;
    }
    before[at] = low ? ends[low - 1] : -1;
    tails[low] = number;
    ends[low] = at;
  });
  const found = new Set();
  for (let at = ends.length ? ends.at(-1) : -1; at >= 0; at = before[at]) found.add(at);
  return found;
}

const KINDS = ["added", "removed", "changed", "moved"];
const SIGNS = { added: "+", removed: "−", changed: "~", moved: "⇅" };

// What colours a node: what it does to where a value lies, or that it computes.
// How each of zgraph's own ops is drawn, from their table; all others compute.
const kinds = {};
const kindOf = op => kinds[op] ?? "compute";

const shortOp = op => op.replace(/^aten\./, "").replace(/\.(default|Tensor|Scalar|int|dim_IntList|self)$/, "");

const time = us => us >= 1e6 ? `${(us / 1e6).toFixed(3)} s` : us >= 1e3 ? `${(us / 1e3).toFixed(us < 1e5 ? 2 : 1)} ms` : `${us.toFixed(1)} µs`;

const size = bytes => {
  const unit = bytes >= 2 ** 30 ? ["GiB", 2 ** 30] : bytes >= 2 ** 20 ? ["MiB", 2 ** 20] : bytes >= 1024 ? ["KiB", 1024] : ["B", 1];
  return `${(bytes / unit[1]).toFixed(unit[1] === 1 ? 0 : 1)} ${unit[0]}`;
};

const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;

// An element with attributes and children; texts are only ever texts.
function element(tag, attributes = {}, ...children) {
  const found = SVG.has(tag) ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) found.addEventListener(name.slice(2), value);
    else if (value !== undefined && value !== false) found.setAttribute(name, value);
  }
  found.append(...children.filter(child => child !== undefined && child !== null));
  return found;
}

const SVG = new Set(["svg", "g", "rect", "path", "text", "tspan", "title", "defs", "marker"]);
