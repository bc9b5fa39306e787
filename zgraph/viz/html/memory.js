// How the bytes alive over the step are drawn: one category upon the other.

function drawMemory(charts, pen, width, height, colours) {
  const { rest, budget } = charts.run.data, { mostBytes: most, top } = charts, base = 4;
  const y = bytes => height - base - bytes / (top * 1.06) * (height - base - 6);
  const columns = columnsOf(charts, Math.max(1, Math.floor(width - GUTTER)));
  let under = new Float64Array(columns.length).fill(rest);
  if (rest) {
    pen.fillStyle = colours.rest;
    pen.fillRect(GUTTER, y(rest), width - GUTTER, y(0) - y(rest));
  }
  charts.categories.forEach((category, number) => {
    const over = under.map((value, i) => value + (columns[i] < 0 ? 0 : charts.bytes[number][columns[i]]));
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
  drawPeak(charts, pen, width, y(most), colours);
  drawLives(charts, pen, width, height, colours);
  drawCursor(charts, pen, width, height, colours);
}

// For each column of pixels the moment with the most bytes, or the one that lasts; -1 after the step.
function columnsOf(charts, count) {
  const found = new Int32Array(count), scale = count / (charts.to - charts.from);
  found.fill(-1);
  const first = charts.momentAt(charts.from), last = Math.min(charts.us.length - 1, upper(charts.us, charts.to));
  for (let moment = first; moment <= last; moment++) {
    const column = Math.max(0, Math.floor((charts.us[moment] - charts.from) * scale));
    if (column < count && (found[column] < 0 || charts.total[moment] > charts.total[found[column]])) found[column] = moment;
  }
  const ends = new Int32Array(count).fill(-1);
  for (let moment = first; moment <= last; moment++) {
    const column = Math.max(0, Math.floor((charts.us[moment] - charts.from) * scale));
    if (column < count) ends[column] = moment;
  }
  for (let i = 1, latest = ends[0]; i < count; i++) {
    if (found[i] < 0) found[i] = latest; else latest = ends[i];
  }
  return found.fill(-1, Math.min(count, Math.max(0, Math.ceil((charts.length - charts.from) * scale))));
}

function drawPeak(charts, pen, width, y, colours) {
  const x = charts.x(charts.us[charts.peakAt] ?? 0, width);
  if (x < GUTTER || x > width) return;
  pen.fillStyle = colours.text;
  pen.beginPath();
  pen.moveTo(x, y + 1);
  pen.lineTo(x - 5, y - 7);
  pen.lineTo(x + 5, y - 7);
  pen.fill();
}

// How long what the selected node makes is alive.
function drawLives(charts, pen, width, height, colours) {
  const lives = charts.livesOf.get(charts.app.state.node) ?? [];
  const born = Math.min(...lives.map(life => life.born)), freed = Math.max(...lives.map(life => life.freed));
  const left = Math.max(GUTTER, charts.x(charts.timeOf(born), width));
  const right = Math.min(width, Math.max(charts.x(charts.timeOf(freed), width), left + 2));
  if (!lives.length || right < GUTTER || left > width) return;
  pen.globalAlpha = 0.18;
  pen.fillStyle = colours.select;
  pen.fillRect(left, 0, right - left, height);
  pen.globalAlpha = 1;
  pen.fillRect(left, 0, right - left, 3);
}
