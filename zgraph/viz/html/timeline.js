// How the timeline is drawn: a row a lane. A pen is that of a canvas, or one that writes SVG.

function drawTimeline(charts, pen, width, height, colours) {
  drawTicks(charts, pen, width, height, colours);
  const { node: selected } = charts.app.state;
  charts.lanes.forEach((lane, row) => {
    const y = TOP + row * ROW;
    pen.fillStyle = colours.muted;
    pen.fillText(LANE_NAMES[lane.name], 8, y + ROW / 2);
    pen.fillStyle = colours.line;
    pen.fillRect(GUTTER, y + ROW - 1, width - GUTTER, 1);
    drawLane(charts, pen, lane, y, width, colours);
  });
  for (const { lane, start, us } of charts.spansOf.get(selected) ?? []) {
    const row = charts.lanes.findIndex(found => found.name === lane);
    const left = Math.max(GUTTER, charts.x(start, width)), right = Math.min(width, Math.max(charts.x(start + us, width), left + 3));
    if (right < GUTTER || left > width) continue;
    pen.strokeStyle = colours.select;
    pen.lineWidth = 2.5;
    pen.strokeRect(left - 1, TOP + row * ROW, right - left + 2, ROW - 2);
  }
  drawCursor(charts, pen, width, height, colours);
}

// The spans of a lane that are in view; what is narrower than a pixel becomes one with its neighbours.
function drawLane(charts, pen, lane, y, width, colours) {
  const { node, start, us } = lane, { phase } = charts.run.nodes;
  const scale = (width - GUTTER) / (charts.to - charts.from);
  let at = Math.max(0, upper(start, charts.from) - 1), last = GUTTER;
  for (; at < node.length && start[at] < charts.to; at++) {
    const right = Math.min(GUTTER + (start[at] + us[at] - charts.from) * scale, width);
    if (right < last + 0.25) continue;
    const left = Math.max(GUTTER + (start[at] - charts.from) * scale, last);
    const wide = Math.max(right - left, 0.6);
    const kind = lane.name === "exposed" ? "exposed" : node[at] < 0 ? "place" : kindOf(charts.run.op(node[at]));
    pen.fillStyle = kind === "compute" && phase[node[at]] !== "fwd" ? colours.backward : colours[kind];
    pen.fillRect(left, y + 2, wide > 2 ? wide - 0.5 : wide, ROW - 5);
    last = left + (wide > 2 ? 0 : wide);
    if (wide > LABEL_PIXELS && node[at] >= 0) label(pen, shortOp(charts.run.op(node[at])), left, y, wide, colours);
  }
}

function label(pen, text, left, y, wide, colours) {
  const fits = Math.floor((wide - 8) / 6);
  pen.fillStyle = colours.onColour;
  pen.fillText(text.length > fits ? `${text.slice(0, Math.max(1, fits - 1))}…` : text, left + 4, y + ROW / 2);
}

function drawTicks(charts, pen, width, height, colours) {
  const step = niceStep((charts.to - charts.from) / Math.max(2, (width - GUTTER) / 130));
  pen.lineWidth = 1;
  for (let us = Math.ceil(charts.from / step) * step; us <= charts.to; us += step) {
    const x = charts.x(us, width);
    pen.fillStyle = colours.line;
    pen.fillRect(x, TOP - 6, 1, height);
    pen.fillStyle = colours.muted;
    if (x + TICK_PIXELS < width) pen.fillText(time(us), x + 4, 9);
  }
}

function drawCursor(charts, pen, width, height, colours) {
  const { moment } = charts.app.state;
  const lines = [[charts.hover, colours.muted], [moment === null ? null : charts.us[moment], colours.select]];
  for (const [us, colour] of lines) {
    if (us === null || us < charts.from || us > charts.to) continue;
    pen.fillStyle = colour;
    pen.fillRect(charts.x(us, width), 0, 1, height);
  }
}
