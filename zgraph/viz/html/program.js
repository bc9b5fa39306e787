// The graph as text: the lines that are in view, and no others.

const LINE = 18;

class ProgramView {
  constructor(app) {
    this.app = app;
    this.run = app.run;
    this.frame = app.part("text");
    this.lines = app.part("lines");
    this.order = [];
    this.frame.addEventListener("scroll", () => this.draw());
    this.lines.addEventListener("click", event => {
      const line = event.target.closest("[data-node]");
      if (line) this.app.select(Number(line.dataset.node), "text");
    });
  }

  show() {
    const { graph, onlyChanged } = this.app.state, change = this.run.change(graph);
    this.order = withRemoved(this.run, graph).filter(node => !onlyChanged || didChange(change, node));
    this.lines.style.height = `${this.order.length * LINE}px`;
    this.draw();
  }

  draw() {
    if (this.frame.hidden) return;
    const { graph, node: selected } = this.app.state, change = this.run.change(graph);
    const first = Math.max(0, Math.floor(this.frame.scrollTop / LINE) - 10);
    const last = Math.min(this.order.length, first + Math.ceil(this.frame.clientHeight / LINE) + 20);
    this.lines.replaceChildren(...this.order.slice(first, last).map((node, at) => {
      const did = didChange(change, node);
      return element("div", {
        class: `line ${did ?? ""} ${kindOf(this.run.op(node, graph))}${node === selected ? " selected" : ""}`,
        style: `top:${(first + at) * LINE}px`, "data-node": node,
      }, element("i", {}, did ? SIGNS[did] : ""), element("code", {}, this.run.text(node, graph)));
    }));
  }

  reveal(node) {
    const at = this.order.indexOf(node);
    if (at >= 0 && !this.frame.hidden) {
      const top = at * LINE, { scrollTop, clientHeight } = this.frame;
      if (top < scrollTop + LINE || top > scrollTop + clientHeight - 2 * LINE) this.frame.scrollTop = top - clientHeight / 2;
    }
    this.draw();
    return at >= 0;
  }
}
