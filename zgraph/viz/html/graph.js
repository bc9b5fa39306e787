// The picture of a graph: boxes that open and close, edges between what shows, pan and zoom.

class GraphView {
  constructor(app) {
    this.app = app;
    this.run = app.run;
    this.svg = app.part("graph");
    this.layer = element("g");
    this.svg.append(this.layer);
    this.view = { x: 0, y: 0, scale: 1 };
    this.open = null;
    this.boxes = new Map();
    this.listen();
  }

  // Draw a graph anew.
  show() {
    const { graph, onlyChanged } = this.app.state;
    this.tree = buildTree(this.run, graph, onlyChanged);
    const isFirst = !this.open;
    this.open ??= openAtFirst(this.tree);
    if (onlyChanged) openAtFirst(this.tree).forEach(id => this.open.add(id));
    this.open.add("");
    this.draw();
    if (isFirst) this.fit();
  }

  // On paper all of it is in view; where that would be too small to read, the phases and what lies right below them.
  toPaper(isPaper) {
    const { width, height } = this.box;
    if (isPaper && Math.min(PAPER.width / width, PAPER.height / height) < PAPER.least) {
      this.unfolded = this.open;
      this.open = new Set(["", ...this.tree.items.map(phase => phase.id)]);
      this.draw();
    } else if (!isPaper && this.unfolded) {
      this.open = this.unfolded;
      this.unfolded = undefined;
      this.draw();
    }
    const { x, y, scale } = this.view;
    if (isPaper) {
      this.svg.setAttribute("viewBox", `0 ${HEAD} ${this.box.width} ${this.box.height - HEAD}`);
      this.layer.removeAttribute("transform");
    } else {
      this.svg.removeAttribute("viewBox");
      this.moveTo(x, y, scale);
    }
  }

  draw() {
    const { graph } = this.app.state;
    this.change = this.run.change(graph);
    this.box = layout(this.run, graph, this.tree, this.open);
    this.boxes.clear();
    this.holder = new Int32Array(this.run.count).fill(-1);
    this.shown = [];
    const boxes = element("g"), edges = element("g", { class: "edges" });
    for (const phase of this.box.boxes) this.drawBox(phase, boxes);
    this.drawEdges(edges);
    this.layer.replaceChildren(...this.frames, edges, boxes);
    this.frames = [];
    this.mark();
  }

  frames = [];

  drawBox(box, into) {
    const number = this.shown.push(box) - 1;
    if (box.group) {
      this.boxes.set(box.group.id, box);
      if (!box.isOpen) box.group.nodes.forEach(node => (this.holder[node] = number));
      box.element = this.groupElement(box);
      if (box.isOpen) {
        this.frames.push(box.element);
        for (const inner of box.boxes) this.drawBox(inner, into);
        return;
      }
    } else {
      this.holder[box.node] = number;
      box.element = this.nodeElement(box);
    }
    into.append(box.element);
  }

  groupElement(box) {
    const { group, width, height, x, y } = box;
    const label = group.isStack ? `${group.label}  ×${group.items.length}` : group.label;
    const counts = element("text", { x: width - 10, y: box.isOpen ? 17 : 34, class: "chips", "text-anchor": "end" });
    for (const [kind, text] of chips(this.run, this.app.state.graph, group)) counts.append(element("tspan", { class: kind, dx: 6 }, text));
    return element("g", {
      class: `group${box.isOpen ? " open" : ""}${group.isStack ? " stack" : ""}`, transform: `translate(${x},${y})`, "data-group": group.id,
    },
      group.isStack && !box.isOpen ? element("rect", { x: 5, y: 5, width, height, rx: 6, class: "behind" }) : null,
      element("rect", { width, height, rx: 6 }),
      element("text", { x: 10, y: 17, class: "name" }, `${box.isOpen ? "▾" : "▸"} ${label}`),
      box.isOpen ? null : element("text", { x: 10, y: 34, class: "note" }, plural(group.nodes.length, "node")),
      counts,
      element("title", {}, group.id),
    );
  }

  nodeElement(box) {
    const { node, width, height, x, y } = box;
    const did = didChange(this.change, node), op = this.run.op(node, this.app.state.graph);
    return element("g", {
      class: `node ${kindOf(op)} ${did ?? ""}`, transform: `translate(${x},${y})`, "data-node": node,
    },
      element("rect", { width, height, rx: 5 }),
      element("text", { x: width / 2, y: 15, class: "op" }, shortOp(op)),
      element("text", { x: width / 2, y: 29, class: "value" }, nodeName(this.run, node)),
      did ? element("text", { x: width - 9, y: 12, class: `sign ${did}` }, SIGNS[did]) : null,
      element("title", {}, this.run.text(node, this.app.state.graph)),
    );
  }

  // Edges between boxes that show, one for each pair; the longest, and those between phases, only at what is selected.
  drawEdges(into) {
    const { graph } = this.app.state, found = new Map();
    const { reads } = this.run.edges(graph), before = graph ? this.run.edges(graph - 1).reads : reads;
    for (const node of this.tree.nodes) {
      const target = this.holder[node];
      if (target < 0) continue;
      for (const maker of (reads.get(node) ?? before.get(node))?.nodes ?? []) {
        const source = this.holder[maker];
        if (source < 0 || source === target) continue;
        const key = source * this.shown.length + target;
        if (found.has(key)) found.get(key).count++;
        else found.set(key, { source, target, count: 1, crosses: this.run.nodes.phase[node] !== this.run.nodes.phase[maker] });
      }
    }
    this.edges = [...found.values()];
    for (const edge of this.edges) {
      const [a, b] = [this.shown[edge.source], this.shown[edge.target]];
      const isHidden = edge.crosses || b.y - a.y > FAR;
      edge.element = element("path", {
        d: curve(a, b, edge.crosses), class: isHidden ? "edge hidden" : b.y - a.y > FAR / 3 ? "edge far" : "edge", "stroke-width": 1 + Math.min(3, Math.log10(edge.count)),
      });
      into.append(edge.element);
    }
  }

  // Show what is selected, and what it touches.
  mark() {
    this.layer.querySelectorAll(".selected, .near").forEach(found => found.classList.remove("selected", "near"));
    const { node } = this.app.state;
    const holder = node === null ? -1 : this.holder[node];
    if (holder < 0) return;
    this.shown[holder].element.classList.add("selected");
    for (const edge of this.edges) {
      if (edge.source !== holder && edge.target !== holder) continue;
      edge.element.classList.add("near");
      this.shown[edge.source === holder ? edge.target : edge.source].element.classList.add("near");
    }
  }

  // Open whatever a node lies in, and bring it into view.
  reveal(node) {
    let isInside = false;
    for (const group of allGroups(this.tree)) {
      if (group.nodes.includes(node)) {
        isInside = true;
        this.open.add(group.id);
      }
    }
    if (isInside) this.draw();
    const box = this.shown[this.holder[node]];
    if (box) this.centre(box);
    return isInside;
  }

  centre(box) {
    const { width, height } = this.svg.getBoundingClientRect();
    const scale = Math.max(this.view.scale, 0.8);
    this.moveTo(width / 2 - (box.x + box.width / 2) * scale, height / 2 - (box.y + box.height / 2) * scale, scale);
  }

  toggle(id) {
    const before = this.boxes.get(id);
    if (!this.open.delete(id)) this.open.add(id);
    this.draw();
    const after = this.boxes.get(id), { x, y, scale } = this.view;
    this.moveTo(x + (before.x - after.x) * scale, y + (before.y - after.y) * scale, scale);
    this.app.showGroup(after.group);
  }

  collapse() {
    this.open = openAtFirst(this.tree);
    this.open.add("");
    this.draw();
    this.fit();
  }

  // All of it, but never too small to read: then its top. A picture that does not show waits until it does.
  fit() {
    const { width, height } = this.svg.getBoundingClientRect();
    this.mustFit = !width;
    if (this.mustFit) return;
    const whole = Math.min((width - 30) / this.box.width, (height - 30) / this.box.height);
    const scale = Math.min(1, Math.max(whole, NARROW.matches ? 0.8 : 0.7));
    this.moveTo(Math.max(5, (width - this.box.width * scale) / 2), 12 - HEAD * scale, scale);
  }

  zoom(factor, x, y) {
    const { width, height } = this.svg.getBoundingClientRect();
    [x, y] = [x ?? width / 2, y ?? height / 2];
    const scale = Math.min(3, Math.max(0.04, this.view.scale * factor));
    const real = scale / this.view.scale;
    this.moveTo(x - (x - this.view.x) * real, y - (y - this.view.y) * real, scale);
  }

  moveTo(x, y, scale) {
    this.view = { x, y, scale };
    this.layer.setAttribute("transform", `translate(${x},${y}) scale(${scale})`);
  }

  listen() {
    this.svg.addEventListener("wheel", event => {
      event.preventDefault();
      this.zoom(Math.exp(-event.deltaY / 400), event.offsetX, event.offsetY);
    }, { passive: false });
    const move = (dx, dy) => this.moveTo(this.view.x + dx, this.view.y + dy, this.view.scale);
    onDrag(this.svg, move, event => {
      const found = event.target.closest("[data-node], [data-group]");
      if (found?.dataset.node) this.app.select(Number(found.dataset.node), "graph");
      else if (found) this.toggle(found.dataset.group);
    }, (factor, x, y, dx, dy) => {
      move(dx, dy);
      this.zoom(factor, x, y);
    });
  }
}

const FAR = 480, PAPER = { width: 700, height: 420, least: 0.45 };

const NARROW = matchMedia("(max-width: 700px)");

function curve(a, b, crosses) {
  if (crosses) {
    const [x1, y1, x2, y2] = [a.x + a.width, a.y + a.height / 2, b.x, b.y + b.height / 2];
    const bend = Math.max(40, Math.abs(x2 - x1) / 2);
    return `M${x1},${y1}C${x1 + bend},${y1} ${x2 - bend},${y2} ${x2},${y2}`;
  }
  const [x1, y1, x2, y2] = [a.x + a.width / 2, a.y + a.height, b.x + b.width / 2, b.y];
  const bend = Math.max(12, Math.min(60, Math.abs(y2 - y1) / 2));
  return `M${x1},${y1}C${x1},${y1 + bend} ${x2},${y2 - bend} ${x2},${y2}`;
}
