// A graph as a tree of phases, modules and nodes, and where each box of it goes.

const PHASES = { fwd: "forward", bwd: "backward", upd: "update" };
const MOST_ITEMS = 80, CHUNK = 40, MOST_OPEN = 70, ROW_WIDTH = 1500;

class Group {
  constructor(id, name, parent) {
    Object.assign(this, { id, name, parent, label: name, items: [], groups: new Map(), nodes: [], shape: undefined, first: undefined, done: undefined });
  }

  child(name) {
    if (!this.groups.has(name)) {
      const made = new Group(this.id ? `${this.id}.${name}` : name, name, this);
      made.isNumbered = /^\d+$/.test(name);
      if (made.isNumbered) made.label = `${this.label}.${name}`;
      this.groups.set(name, made);
      this.items.push(made);
    }
    return this.groups.get(name);
  }
}

// The nodes of a graph in order, those that its pass removed where they stood.
function withRemoved(run, graph) {
  const change = run.change(graph);
  if (!change.removed.size) return [...run.orders[graph]];
  const ghosts = new Map();
  let anchor = -1;
  const here = new Set(run.orders[graph]);
  for (const node of run.orders[graph - 1]) {
    if (here.has(node)) anchor = node;
    else if (ghosts.has(anchor)) ghosts.get(anchor).push(node);
    else ghosts.set(anchor, [node]);
  }
  const found = [...(ghosts.get(-1) ?? [])];
  for (const node of run.orders[graph]) found.push(node, ...(ghosts.get(node) ?? []));
  return found;
}

const didChange = (change, node) => KINDS.find(kind => change[kind].has(node));

// A group stands where its computing begins: its gathers may be started long before.
function buildTree(run, graph, onlyChanged) {
  const root = new Group("", "step", null), change = run.change(graph);
  for (const node of withRemoved(run, graph)) {
    if (onlyChanged && !didChange(change, node)) continue;
    const computes = kindOf(run.op(node, graph)) === "compute";
    let group = root;
    for (const name of [PHASES[run.nodes.phase[node]], ...(run.module(node) ? run.module(node).split(".") : [])]) {
      group.nodes.push(node);
      group = group.child(name);
      if (computes) group.first ??= root.nodes.length - 1;
    }
    group.nodes.push(node);
    group.items.push(node);
  }
  const position = new Map(root.nodes.map((node, at) => [node, at]));
  const at = item => item instanceof Group ? item.first ?? position.get(item.nodes[0]) : position.get(item);
  for (const group of [root, ...allGroups(root)]) group.items.sort((a, b) => at(a) - at(b));
  root.items = root.items.map(phase => tidied(run, graph, change, phase, false));
  return root;
}

// Chains of one child become one box, layers that are alike a stack, and very many nodes chunks.
function tidied(run, graph, change, group, mayMerge = true) {
  while (mayMerge && group.items.length === 1 && group.items[0] instanceof Group) {
    const [only] = group.items;
    only.label = `${group.label}.${only.name}`;
    only.parent = group.parent;
    group = only;
  }
  group.items = stacked(run, graph, change, group, group.items.map(item => item instanceof Group ? tidied(run, graph, change, item) : item));
  if (group.items.length > MOST_ITEMS) group.items = chunked(group, group.items);
  for (const item of group.items) if (item instanceof Group) item.parent = group;
  return group;
}

function stacked(run, graph, change, group, items) {
  const found = [];
  for (let at = 0; at < items.length;) {
    let end = at + 1;
    if (isNumbered(items[at])) {
      while (isNumbered(items[end]) && shape(run, graph, change, items[end]) === shape(run, graph, change, items[at])) end++;
    }
    if (end - at >= 3) found.push(gathered(group, items.slice(at, end), true));
    else found.push(...items.slice(at, end));
    at = end;
  }
  return found;
}

const isNumbered = item => item instanceof Group && item.isNumbered;

// What is alike in layers that are alike: how often each op is there, and what was done to it.
function shape(run, graph, change, group) {
  if (group.shape === undefined) {
    const counts = new Map();
    for (const node of group.nodes) {
      const key = run.op(node, graph) + (didChange(change, node) ?? "");
      counts.set(key, (counts.get(key) ?? 0) + 1);
    }
    group.shape = JSON.stringify([...counts].sort());
  }
  return group.shape;
}

function gathered(group, items, isStack) {
  const names = items.map(item => item.name ?? "");
  const made = new Group(
    `${group.id}/${isStack ? names[0] : items.find(item => !(item instanceof Group))}+${items.length}`,
    isStack ? `${group.label}.${names[0]} – ${names.at(-1)}` : `${items.length} nodes`, group,
  );
  made.items = items;
  made.nodes = items.flatMap(item => item instanceof Group ? item.nodes : [item]);
  made.isStack = isStack;
  for (const item of items) if (item instanceof Group) item.parent = made;
  return made;
}

function chunked(group, items) {
  const found = [];
  for (let at = 0; at < items.length;) {
    let end = at;
    while (end < items.length && end - at < CHUNK && !(items[end] instanceof Group)) end++;
    if (end - at > 3) found.push(gathered(group, items.slice(at, end), false));
    else found.push(...items.slice(at, (end = Math.max(end, at + 1))));
    at = end;
  }
  return found;
}

// How many nodes of a group the pass added, removed, changed and moved, as [kind, text].
function chips(run, graph, group) {
  if (!group.done) {
    const change = run.change(graph), counts = { added: 0, removed: 0, changed: 0, moved: 0 };
    for (const node of group.nodes) {
      const kind = didChange(change, node);
      if (kind) counts[kind]++;
    }
    group.done = KINDS.filter(kind => counts[kind]).map(kind => [kind, `${SIGNS[kind]}${counts[kind].toLocaleString("en")}`]);
  }
  return group.done;
}

function* allGroups(group) {
  for (const item of group.items) {
    if (item instanceof Group) {
      yield item;
      yield* allGroups(item);
    }
  }
}

// Which groups are open at first: from the top, as long as not too many boxes show.
function openAtFirst(root) {
  const open = new Set(root.items.map(phase => phase.id));
  let shown = root.items.reduce((sum, phase) => sum + phase.items.length, 0);
  for (let level = root.items; level.length;) {
    const next = level.flatMap(group => group.items).filter(item => item instanceof Group && !item.isStack);
    level = next.filter(group => (shown + group.items.length > MOST_OPEN ? false : (shown += group.items.length)));
    level.forEach(group => open.add(group.id));
  }
  return open;
}

// Boxes with their places: { group or node, x, y, width, height, boxes }. Sources read before targets, downwards.
function layout(run, graph, root, open) {
  const reads = run.edges(graph).reads, before = graph ? run.edges(graph - 1).reads : reads;
  const readsOf = node => (reads.get(node) ?? before.get(node))?.nodes ?? [];
  const slot = new Int32Array(run.count);

  function placed(item) {
    if (!(item instanceof Group)) return { node: item, x: 0, y: 0, width: nodeWidth(run, item, graph), height: 36, boxes: [] };
    if (!open.has(item.id)) return { group: item, x: 0, y: 0, width: groupWidth(run, graph, item, false), height: 44, boxes: [] };
    const boxes = item.items.map(placed);
    const rows = item === root ? [boxes] : inRows(boxes, ranks(item, boxes));
    return { group: item, isOpen: true, x: 0, y: 0, boxes, ...arrange(rows, groupWidth(run, graph, item, true)) };
  }

  function ranks(group, boxes) {
    slot.fill(-1);
    boxes.forEach((box, at) => (box.group ? box.group.nodes : [box.node]).forEach(node => (slot[node] = at)));
    const from = boxes.map(() => new Set()), to = boxes.map(() => new Set());
    for (const node of group.nodes) {
      for (const maker of readsOf(node)) {
        if (slot[maker] >= 0 && slot[maker] < slot[node]) {
          from[slot[node]].add(slot[maker]);
          to[slot[maker]].add(slot[node]);
        }
      }
    }
    const rank = new Int32Array(boxes.length), isLight = [];
    boxes.forEach((_, at) => {
      rank[at] = Math.max(0, ...[...from[at]].map(other => rank[other] + 1));
      isLight[at] = from[at].size <= 1 && [...from[at]].every(other => isLight[other]);
    });
    // What begins a line of its own stands right above what reads it.
    for (let at = boxes.length - 1; at >= 0; at--) {
      if (isLight[at] && to[at].size) rank[at] = Math.min(...[...to[at]].map(other => rank[other])) - 1;
    }
    return { rank, from, to };
  }

  const box = placed(root);
  place(box, 0, 0);
  return box;
}

function inRows(boxes, { rank, from, to }) {
  const rows = new Map();
  boxes.forEach((_, at) => rows.set(rank[at], [...(rows.get(rank[at]) ?? []), at]));
  const sorted = [...rows].sort((a, b) => a[0] - b[0]).map(([, row]) => row);
  const place = new Float64Array(boxes.length);
  const number = row => row.forEach((at, i) => (place[at] = (i + 0.5) / row.length));
  sorted.forEach(number);
  for (const [neighbours, some] of [[from, sorted], [to, sorted.toReversed()], [from, sorted]]) {
    for (const row of some) {
      const mean = new Map(row.map(at => {
        const near = [...neighbours[at]];
        return [at, near.length ? near.reduce((sum, other) => sum + place[other], 0) / near.length : place[at]];
      }));
      row.sort((a, b) => mean.get(a) - mean.get(b));
      number(row);
    }
  }
  return sorted.flatMap(row => wrapped(row.map(at => boxes[at])));
}

function wrapped(row) {
  const found = [[]];
  let width = 0;
  for (const box of row) {
    if (width && width + box.width > ROW_WIDTH) {
      found.push([]);
      width = 0;
    }
    found.at(-1).push(box);
    width += box.width + 14;
  }
  return found;
}

const HEAD = 24, GAP_X = 14, GAP_Y = 22, PAD = 12;

function arrange(rows, least) {
  const widths = rows.map(row => row.reduce((sum, box) => sum + box.width, 0) + GAP_X * (row.length - 1));
  const width = Math.max(least, ...widths) + 2 * PAD;
  let y = HEAD + PAD;
  rows.forEach((row, number) => {
    let x = (width - widths[number]) / 2;
    for (const box of row) {
      Object.assign(box, { x, y });
      x += box.width + GAP_X;
    }
    y += Math.max(0, ...row.map(box => box.height)) + GAP_Y;
  });
  return { width, height: y - GAP_Y + PAD };
}

// From places within the parent to places in the picture.
function place(box, x, y) {
  box.x += x;
  box.y += y;
  for (const inner of box.boxes) place(inner, box.x, box.y);
}

const nodeWidth = (run, node, graph) => 40 + Math.max(7.4 * shortOp(run.op(node, graph)).length, 6.3 * nodeName(run, node).length);

// A box that is open has its counts beside its name, one that is closed below it.
function groupWidth(run, graph, group, isOpen) {
  const counts = chips(run, graph, group).reduce((sum, [, text]) => sum + 7 * text.length + 6, 0), name = 50 + 7 * group.label.length;
  return isOpen ? name + counts : Math.max(120, name, 26 + 6.3 * plural(group.nodes.length, "node").length + counts);
}

function nodeName(run, node, most = 24) {
  const key = run.key(node);
  const name = key.includes("(") ? key.slice(key.indexOf("(") + 1).split(/[,)#]/)[0] : `%${key}`;
  return name.length > most ? `${name.slice(0, most - 1)}…` : name;
}
