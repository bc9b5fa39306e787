// The predicted step on a clock: a row a lane, and the bytes alive below it, on one axis of time.

const GUTTER = 92, ROW = 24, TOP = 20, LABEL_PIXELS = 34, TICK_PIXELS = 62;
const LANE_NAMES = { compute: "compute", exposed: "exposed", comm: "network", d2h: "to host", h2d: "from host" };

class Charts {
  constructor(app) {
    this.app = app;
    this.run = app.run;
    this.timeline = app.part("timeline");
    this.memory = app.part("memory");
    this.tip = document.getElementById("tip");
    const { step, memory } = this.run.data;
    this.step = step;
    if (!step) return;
    this.readLanes(step);
    this.readMemory(memory);
    this.from = 0;
    this.length = this.to = this.end = Math.max(step.us, 1e-3);
    this.top = this.topBytes();
    this.linked = [this];
    this.hover = null;
    this.listen(this.timeline);
    this.listen(this.memory);
    new ResizeObserver(() => this.resize()).observe(app.part("charts"));
  }

  readLanes(step) {
    const [lane, node, start, us] = step.spans.length ? step.spans : [[], [], [], []];
    const lanes = new Map(Object.keys(LANE_NAMES).map(name => [name, { name, node: [], start: [], us: [], other: [] }]));
    const push = (name, node, start, us, other) => {
      const found = lanes.get(name);
      found.node.push(node); found.start.push(start); found.us.push(us); found.other.push(other);
    };
    lane.forEach((name, at) => push(name, node[at], start[at], us[at]));
    const [waits, starts, at, long] = step.stalls.length ? step.stalls : [[], [], [], []];
    waits.forEach((wait, i) => push("exposed", wait, at[i], long[i], starts[i]));
    this.lanes = [...lanes.values()].filter(found => found.node.length);
    this.spansOf = new Map();
    for (const found of this.lanes) {
      found.start = Float64Array.from(found.start);
      found.us = Float64Array.from(found.us);
      found.node.forEach((node, i) => {
        if (!this.spansOf.has(node)) this.spansOf.set(node, []);
        this.spansOf.get(node).push({ lane: found.name, start: found.start[i], us: found.us[i], other: found.other[i] });
      });
    }
  }

  readMemory(memory) {
    const [name, node, category, bytes, born, freed] = memory.lives.length ? memory.lives : [[], [], [], [], [], []];
    this.lives = name.map((_, i) => ({ name: name[i], node: node[i], category: category[i], bytes: bytes[i], born: born[i], freed: freed[i] }));
    this.livesOf = Map.groupBy(this.lives, life => life.node);
    this.us = Float64Array.from(memory.us);
    this.categories = memory.categories;
    this.bytes = memory.bytes.map(column => Float64Array.from(column));
    this.total = new Float64Array(this.us.length);
    for (const column of this.bytes) column.forEach((value, i) => (this.total[i] += value));
    this.peakAt = this.total.reduce((best, value, i) => (value > this.total[best] ? i : best), 0);
    this.momentNodes = memory.node;
  }

  // The moment that a time falls in.
  momentAt(us) { return Math.max(0, upper(this.us, us) - 1); }

  timeOf(moment) { return moment < this.us.length ? this.us[moment] : this.length; }

  get mostBytes() { return this.run.data.rest + this.total[this.peakAt]; }

  // What the chart of memory goes up to: the peak, and the budget if that is near.
  topBytes() {
    const { budget } = this.run.data;
    return budget && budget < this.mostBytes * 1.4 ? Math.max(budget, this.mostBytes) : this.mostBytes;
  }

  // Draw on the same scale as others, and move with them.
  link(others) {
    this.linked = others;
    this.end = this.to = Math.max(...others.map(charts => charts.end));
    this.top = Math.max(...others.map(charts => charts.top));
  }

  aliveAt(moment) {
    return this.lives.filter(life => life.born <= moment && moment < life.freed).sort((a, b) => b.bytes - a.bytes || (a.name < b.name ? -1 : 1));
  }

  resize() {
    this.timeline.style.height = `${TOP + ROW * this.lanes.length + 4}px`;
    for (const canvas of [this.timeline, this.memory]) {
      const { width, height } = canvas.getBoundingClientRect(), ratio = window.devicePixelRatio;
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
    }
    this.ask();
  }

  // Draw before the next frame, once however often it is asked for.
  ask() {
    if (!this.step || this.isAsked) return;
    this.isAsked = true;
    requestAnimationFrame(() => {
      this.isAsked = false;
      this.draw();
    });
  }

  draw() {
    if (!this.step) return;
    const colours = coloursNow();
    drawTimeline(this, ...this.pen(this.timeline), colours);
    drawMemory(this, ...this.pen(this.memory), colours);
  }

  pen(canvas) {
    const pen = canvas.getContext("2d"), ratio = window.devicePixelRatio;
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, canvas.width, canvas.height);
    pen.font = "11px system-ui, sans-serif";
    pen.textBaseline = "middle";
    return [pen, canvas.width / ratio, canvas.height / ratio];
  }

  x(us, width) { return GUTTER + (us - this.from) / (this.to - this.from) * (width - GUTTER); }

  usAt(x, width) { return this.from + (x - GUTTER) / (width - GUTTER) * (this.to - this.from); }

  // Show a time from..to, within the step.
  look(from, to) {
    const least = Math.max(this.end / 2e5, 0.05);
    const long = Math.min(this.end, Math.max(least, to - from));
    const begin = Math.min(Math.max(0, from - (long - (to - from)) / 2), this.end - long);
    for (const charts of this.linked) {
      charts.from = begin;
      charts.to = begin + long;
      charts.ask();
    }
  }

  zoom(factor, us = (this.from + this.to) / 2) {
    const long = Math.min(this.end, (this.to - this.from) * factor);
    const from = us - (us - this.from) / (this.to - this.from) * long;
    this.look(from, from + long);
  }

  pan(us) {
    const by = Math.min(Math.max(us, -this.from), this.end - this.to);
    this.look(this.from + by, this.to + by);
  }

  // Bring a node's time into view; the view stays where it is if that is in it and wide enough to be seen.
  reveal(node) {
    const [span] = this.spansOf?.get(node) ?? [];
    if (!span) return this.ask();
    const long = this.to - this.from;
    if (span.start < this.from || span.start + span.us > this.to || span.us < long / 400) {
      const wide = Math.min(long, Math.max(span.us * 40, this.end / 2e4));
      const middle = span.start + span.us / 2;
      this.look(middle - wide / 2, middle + wide / 2);
    }
    this.ask();
  }

  listen(canvas) {
    const width = () => canvas.getBoundingClientRect().width;
    canvas.addEventListener("wheel", event => {
      event.preventDefault();
      const sideways = event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY);
      if (sideways) this.pan((event.deltaX || event.deltaY) / (width() - GUTTER) * (this.to - this.from));
      else this.zoom(Math.exp(event.deltaY / 300), this.usAt(event.offsetX, width()));
    }, { passive: false });
    const drag = dx => this.pan(-dx / (width() - GUTTER) * (this.to - this.from));
    onDrag(canvas, drag, event => this.clicked(canvas, event), (factor, x, y, dx) => {
      drag(dx);
      this.zoom(1 / factor, this.usAt(x, width()));
    });
    canvas.addEventListener("pointermove", event => event.pointerType === "touch" || this.hovered(canvas, event));
    canvas.addEventListener("pointerleave", () => {
      this.hover = null;
      this.tip.hidden = true;
      this.ask();
    });
    canvas.addEventListener("keydown", event => {
      const act = {
        ArrowLeft: () => this.pan((this.from - this.to) / 8), ArrowRight: () => this.pan((this.to - this.from) / 8),
        "+": () => this.zoom(0.6), "-": () => this.zoom(1 / 0.6),
      }[event.key];
      if (!act) return;
      act();
      event.preventDefault();
      event.stopPropagation();
    });
  }

  spanAt(event) {
    const lane = this.lanes[Math.floor((event.offsetY - TOP) / ROW)];
    if (!lane || event.offsetX < GUTTER) return null;
    const width = this.timeline.getBoundingClientRect().width, us = this.usAt(event.offsetX, width);
    const near = 2 * (this.to - this.from) / width;
    const at = upper(lane.start, us + near) - 1;
    return at >= 0 && us <= lane.start[at] + lane.us[at] + near ? { lane, at } : null;
  }

  clicked(canvas, event) {
    if (event.offsetX < GUTTER) return;
    if (canvas === this.memory) {
      this.app.selectMoment(this.momentAt(this.usAt(event.offsetX, canvas.getBoundingClientRect().width)));
      return;
    }
    const found = this.spanAt(event);
    if (found && found.lane.node[found.at] >= 0) this.app.select(found.lane.node[found.at], "timeline");
  }

  hovered(canvas, event) {
    const us = this.usAt(event.offsetX, canvas.getBoundingClientRect().width);
    this.hover = event.offsetX < GUTTER ? null : us;
    const lines = this.hover === null ? [] : canvas === this.memory ? this.memoryTip(us) : this.spanTip(event);
    this.tip.hidden = !lines.length;
    if (lines.length) {
      this.tip.replaceChildren(...lines.map(line => element("div", {}, line)));
      const { offsetWidth, offsetHeight } = this.tip;
      this.tip.style.left = `${Math.min(event.clientX + 14, window.innerWidth - offsetWidth - 8)}px`;
      this.tip.style.top = `${Math.max(4, event.clientY - offsetHeight - 12)}px`;
    }
    this.ask();
  }

  spanTip(event) {
    const found = this.spanAt(event);
    if (!found) return [];
    const { lane, at } = found, node = lane.node[at];
    const name = node < 0 ? "" : `%${this.run.key(node)}`;
    const long = `${time(lane.us[at])}, from ${time(lane.start[at])}`;
    if (lane.name === "exposed") return ["computing waits", `for ${lane.other[at] < 0 ? "" : `%${this.run.key(lane.other[at])}`}`, long];
    return [node < 0 ? lane.name : this.run.op(node), name, long, node < 0 ? "" : this.run.module(node)].filter(Boolean);
  }

  memoryTip(us) {
    const moment = this.momentAt(us);
    const parts = this.categories.map((name, i) => [name, this.bytes[i][moment]]).filter(([, bytes]) => bytes > 0);
    const most = parts.sort((a, b) => b[1] - a[1]).slice(0, 5).map(([name, bytes]) => `${name} ${size(bytes)}`);
    return [`${size(this.total[moment] + this.run.data.rest)} at ${time(this.us[moment])}`, ...most];
  }
}

// How many of the sorted numbers are not above a number.
function upper(numbers, number) {
  let low = 0, high = numbers.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (numbers[middle] <= number) low = middle + 1; else high = middle;
  }
  return low;
}

function niceStep(least) {
  const power = 10 ** Math.floor(Math.log10(least));
  return [1, 2, 5, 10].map(factor => factor * power).find(step => step >= least);
}

// The colours of the theme that is on, by what they are for.
function coloursNow() {
  const style = getComputedStyle(document.documentElement);
  return new Proxy({}, { get: (_, name) => style.getPropertyValue(`--${name}`).trim() || undefined });
}
