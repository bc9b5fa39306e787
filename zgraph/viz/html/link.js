// The state as the address says it: `#pass=bucket&node=relu&view=text`. What others wrote there is only ever text.

const SETTLED_MS = 200, MOST_TOLD = 60;

class Link {
  constructor(report) {
    this.report = report;
    this.word = byId("word");
    window.addEventListener("hashchange", () => this.read());
  }

  // Write the state, once it has settled: a slider that is dragged is one step back, not twenty.
  moved() {
    if (this.isReading || location.protocol === "about:") return;
    this.say([]);
    clearTimeout(this.timer);
    this.timer = setTimeout(() => {
      const hash = `#${this.report.stateText()}`;
      if (hash !== location.hash) history.pushState(null, "", hash);
    }, SETTLED_MS);
  }

  // Show the state that the address says; what it names that is not there is told, and the default taken.
  read() {
    clearTimeout(this.timer);
    const said = new URLSearchParams(location.hash.slice(1)), words = [], { report } = this;
    const at = said.has("pass") ? report.positions.findIndex(({ name }) => name === said.get("pass")) : report.opening;
    if (at < 0) words.push(`The link names a pass that is not in this report: ${told(said.get("pass"))}.`);
    const app = report.apps[said.get("run") === "2" ? 1 : 0] ?? report.apps[0];
    const node = said.has("node") ? app.run.numberOf(said.get("node")) : null;
    if (node === undefined) words.push(`The link names a node that is not in this report: ${told(said.get("node"))}.`);
    this.isReading = true;
    report.showTab(said.get("view") === "text");
    report.showOnlyChanged(said.get("only") === "changed");
    report.show(at < 0 ? report.opening : at);
    if (node === null || node === undefined) report.selectNothing();
    else app.select(node, said.has("pass") && at >= 0 ? "link" : "address");
    this.isReading = false;
    this.say(words);
  }

  say(words) {
    this.word.textContent = words.join(" ");
    this.word.hidden = !words.length;
  }
}

const told = text => (text.length > MOST_TOLD ? `${text.slice(0, MOST_TOLD)}…` : text);
