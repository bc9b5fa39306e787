// Search over the nodes of the runs.

const MOST_HITS = 40;

class Search {
  constructor(apps) {
    this.apps = apps;
    this.field = byId("query");
    this.list = byId("hits");
    this.field.addEventListener("input", () => this.look());
    this.field.addEventListener("focus", () => this.look());
    this.field.addEventListener("keydown", event => this.pressed(event));
    document.addEventListener("pointerdown", event => event.target.closest("#search") || this.close());
  }

  look() {
    this.hits = this.found();
    this.at = 0;
    const rows = this.hits.map(({ app: { run }, node }, at) => element("li", { role: "option", onclick: () => this.take(at) },
      element("b", {}, nodeName(run, node)), ` ${shortOp(run.op(node))} `, element("small", {}, run.module(node))));
    if (!rows.length && this.field.value.trim()) rows.push(element("li", { class: "none" }, "nothing found"));
    this.list.replaceChildren(...rows);
    this.list.hidden = !rows.length;
    this.field.setAttribute("aria-expanded", !this.list.hidden);
    this.mark();
  }

  // The nodes that match: of the second run those that the first does not have.
  found() {
    const [first] = this.apps;
    return this.apps.flatMap(app => app.run.find(this.field.value, MOST_HITS).map(node => ({ app, node })))
      .filter(({ app, node }) => app === first || first.run.numberOf(app.run.key(node)) === undefined).slice(0, MOST_HITS);
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

  take(at) {
    const { app, node } = this.hits[at];
    this.close();
    app.select(node, "search");
  }

  close() {
    this.list.hidden = true;
    this.field.setAttribute("aria-expanded", false);
    this.field.blur();
  }
}
