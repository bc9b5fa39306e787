// The predicted step on a clock: a row a lane, and the bytes alive below it, on one axis of time.

const GUTTER = 92, ROW = 24, TOP = 20, LABEL_PIXELS = 34;
const LANE_NAMES = { compute: "compute", exposed: "exposed", comm: "network", d2h: "to host", h2d: "from host" };

class Charts {
  constructor(app) {
    this.app = app;
    this.run = app.run;
    this.timeline = document.getElementById("timeline");
    this.memory = document.getElementById("memory");
    this.tip = document.getElementById("tip");
    const { step, memory } = this.run.data;
    this.step = step;
    if (!step) return;
    this.readLanes(step);
    this.readMemory(memory);
    this.from = 0;
    this.to = this.end = Math.max(step.us, 1e-3);
    this.hover = null;
    this.listen(this.timeline);
    this.listen(this.memory);
    new ResizeObserver(() => this.resize()).observe(document.getElementById("charts"));
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

  timeOf(moment) { return moment < this.us.length ? this.us[moment] : this.end; }

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
      const colours = coloursNow();
      this.drawTimeline(colours);
      this.drawMemory(colours);
    });
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

  drawTimeline(colours) {
    const [pen, width, height] = this.pen(this.timeline);
    this.drawTicks(pen, width, height, colours);
    const { node: selected } = this.app.state;
    this.lanes.forEach((lane, row) => {
      const y = TOP + row * ROW;
      pen.fillStyle = colours.muted;
      pen.fillText(LANE_NAMES[lane.name], 8, y + ROW / 2);
      pen.fillStyle = colours.line;
      pen.fillRect(GUTTER, y + ROW - 1, width - GUTTER, 1);
      this.drawLane(pen, lane, y, width, colours);
    });
    for (const { lane, start, us } of this.spansOf.get(selected) ?? []) {
      const row = this.lanes.findIndex(found => found.name === lane);
      const left = Math.max(GUTTER, this.x(start, width)), right = Math.min(width, Math.max(this.x(start + us, width), left + 3));
      if (right < GUTTER || left > width) continue;
      pen.strokeStyle = colours.select;
      pen.lineWidth = 2.5;
      pen.strokeRect(left - 1, TOP + row * ROW, right - left + 2, ROW - 2);
    }
    this.drawCursor(pen, width, height, colours);
  }

  // The spans of a lane that are in view; what is narrower than a pixel becomes one with its neighbours.
  drawLane(pen, lane, y, width, colours) {
    const { node, start, us } = lane, { phase } = this.run.nodes;
    const scale = (width - GUTTER) / (this.to - this.from);
    let at = Math.max(0, upper(start, this.from) - 1), last = GUTTER;
    for (; at < node.length && start[at] < this.to; at++) {
      const right = Math.min(GUTTER + (start[at] + us[at] - this.from) * scale, width);
      if (right < last + 0.25) continue;
      const left = Math.max(GUTTER + (start[at] - this.from) * scale, last);
      const wide = Math.max(right - left, 0.6);
      const kind = lane.name === "exposed" ? "exposed" : node[at] < 0 ? "place" : kindOf(this.run.op(node[at]));
      pen.fillStyle = kind === "compute" && phase[node[at]] !== "fwd" ? colours.backward : colours[kind];
      pen.fillRect(left, y + 2, wide > 2 ? wide - 0.5 : wide, ROW - 5);
      last = left + (wide > 2 ? 0 : wide);
      if (wide > LABEL_PIXELS && node[at] >= 0) this.label(pen, shortOp(this.run.op(node[at])), left, y, wide, colours);
    }
  }

  label(pen, text, left, y, wide, colours) {
    const fits = Math.floor((wide - 8) / 6);
    pen.fillStyle = colours.onColour;
    pen.fillText(text.length > fits ? `${text.slice(0, Math.max(1, fits - 1))}…` : text, left + 4, y + ROW / 2);
  }

  drawTicks(pen, width, height, colours) {
    const step = niceStep((this.to - this.from) / Math.max(2, (width - GUTTER) / 130));
    pen.lineWidth = 1;
    for (let us = Math.ceil(this.from / step) * step; us <= this.to; us += step) {
      const x = this.x(us, width);
      pen.fillStyle = colours.line;
      pen.fillRect(x, TOP - 6, 1, height);
      pen.fillStyle = colours.muted;
      pen.fillText(time(us), Math.min(x + 4, width - 60), 9);
    }
  }

  drawMemory(colours) {
    const [pen, width, height] = this.pen(this.memory);
    const { rest, budget } = this.run.data, base = 4;
    const most = rest + this.total[this.peakAt];
    const top = budget && budget < most * 1.4 ? Math.max(budget, most) : most;
    const y = bytes => height - base - bytes / (top * 1.06) * (height - base - 6);
    const columns = this.columns(Math.max(1, Math.floor(width - GUTTER)));
    let under = new Float64Array(columns.length).fill(rest);
    if (rest) {
      pen.fillStyle = colours.rest;
      pen.fillRect(GUTTER, y(rest), width - GUTTER, y(0) - y(rest));
    }
    this.categories.forEach((category, number) => {
      const over = under.map((value, i) => value + (columns[i] < 0 ? 0 : this.bytes[number][columns[i]]));
      pen.fillStyle = colours[category] ?? colours.place;
      pen.beginPath();
      pen.moveTo(GUTTER, y(under[0]));
      over.forEach((value, i) => { pen.lineTo(GUTTER + i, y(value)); pen.lineTo(GUTTER + i + 1, y(value)); });
      for (let i = under.length - 1; i >= 0; i--) { pen.lineTo(GUTTER + i + 1, y(under[i])); pen.lineTo(GUTTER + i, y(under[i])); }
      pen.fill();
      under = over;
    });
    pen.fillStyle = colours.muted;
    const restAt = Math.min(height - 10, y(rest / 2));
    if (rest) pen.fillText("at rest", 8, restAt);
    for (const at of [most, most / 2]) if (!rest || Math.abs(y(at) - restAt) > 13) pen.fillText(size(at), 8, Math.max(8, y(at)));
    if (budget && budget <= top) {
      pen.strokeStyle = colours.exposed;
      pen.setLineDash([6, 4]);
      pen.strokeRect(GUTTER, y(budget), width, 0);
      pen.setLineDash([]);
      pen.fillStyle = colours.exposed;
      pen.fillText(`budget ${size(budget)}`, GUTTER + 6, y(budget) + 9);
    }
    this.drawPeak(pen, width, y(most), colours);
    this.drawLives(pen, width, height, colours);
    this.drawCursor(pen, width, height, colours);
  }

  // For each column of pixels the moment with the most bytes, or the one that lasts.
  columns(count) {
    const found = new Int32Array(count), scale = count / (this.to - this.from);
    found.fill(-1);
    const first = this.momentAt(this.from), last = Math.min(this.us.length - 1, upper(this.us, this.to));
    for (let moment = first; moment <= last; moment++) {
      const column = Math.max(0, Math.floor((this.us[moment] - this.from) * scale));
      if (column < count && (found[column] < 0 || this.total[moment] > this.total[found[column]])) found[column] = moment;
    }
    const ends = new Int32Array(count).fill(-1);
    for (let moment = first; moment <= last; moment++) {
      const column = Math.max(0, Math.floor((this.us[moment] - this.from) * scale));
      if (column < count) ends[column] = moment;
    }
    for (let i = 1, latest = ends[0]; i < count; i++) {
      if (found[i] < 0) found[i] = latest; else latest = ends[i];
    }
    return found;
  }

  drawPeak(pen, width, y, colours) {
    const x = this.x(this.us[this.peakAt] ?? 0, width);
    if (x < GUTTER || x > width) return;
    pen.fillStyle = colours.text;
    pen.beginPath();
    pen.moveTo(x, y + 1);
    pen.lineTo(x - 5, y - 7);
    pen.lineTo(x + 5, y - 7);
    pen.fill();
  }

  // How long what the selected node makes is alive.
  drawLives(pen, width, height, colours) {
    const lives = this.livesOf.get(this.app.state.node) ?? [];
    const born = Math.min(...lives.map(life => life.born)), freed = Math.max(...lives.map(life => life.freed));
    const left = Math.max(GUTTER, this.x(this.timeOf(born), width));
    const right = Math.min(width, Math.max(this.x(this.timeOf(freed), width), left + 2));
    if (!lives.length || right < GUTTER || left > width) return;
    pen.globalAlpha = 0.18;
    pen.fillStyle = colours.select;
    pen.fillRect(left, 0, right - left, height);
    pen.globalAlpha = 1;
    pen.fillRect(left, 0, right - left, 3);
  }

  drawCursor(pen, width, height, colours) {
    const { moment } = this.app.state;
    const lines = [[this.hover, colours.muted], [moment === null ? null : this.us[moment], colours.select]];
    for (const [us, colour] of lines) {
      if (us === null || us < this.from || us > this.to) continue;
      pen.fillStyle = colour;
      pen.fillRect(this.x(us, width), 0, 1, height);
    }
  }

  // Show a time from..to, within the step.
  look(from, to) {
    const least = Math.max(this.end / 2e5, 0.05);
    const long = Math.min(this.end, Math.max(least, to - from));
    this.from = Math.min(Math.max(0, from - (long - (to - from)) / 2), this.end - long);
    this.to = this.from + long;
    this.ask();
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
    onDrag(canvas, dx => this.pan(-dx / (width() - GUTTER) * (this.to - this.from)), event => this.clicked(canvas, event));
    canvas.addEventListener("pointermove", event => this.hovered(canvas, event));
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
