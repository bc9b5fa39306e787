// What is shown as pictures: SVG that needs nothing else, in the theme at hand, and PNG drawn from it.

const HEADING = 30, LEAST_WIDTH = 900, MOST_PIXELS = 8000;

const FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif";

// The part of a canvas' pen that the charts use, writing SVG.
class SvgPen {
  constructor(into) {
    Object.assign(this, { into, fillStyle: "#000", strokeStyle: "#000", lineWidth: 1, globalAlpha: 1, path: "", dash: "" });
  }

  add(tag, attributes, ...children) {
    const opacity = this.globalAlpha < 1 ? this.globalAlpha : undefined;
    this.into.append(element(tag, { opacity, ...attributes }, ...children));
  }

  fillRect(x, y, width, height) {
    this.add("rect", { x: rounded(x), y: rounded(y), width: rounded(width), height: rounded(height), fill: this.fillStyle });
  }

  strokeRect(x, y, width, height) {
    const d = `M${rounded(x)},${rounded(y)}h${rounded(width)}v${rounded(height)}h${rounded(-width)}z`;
    this.add("path", { d, fill: "none", stroke: this.strokeStyle, "stroke-width": this.lineWidth, "stroke-dasharray": this.dash || undefined });
  }

  fillText(text, x, y) {
    this.add("text", { x: rounded(x), y: rounded(y), dy: "0.35em", fill: this.fillStyle, "font-size": 11, "font-family": FONT }, text);
  }

  beginPath() { this.path = ""; }
  moveTo(x, y) { this.path += `M${rounded(x)},${rounded(y)}`; }
  lineTo(x, y) { this.path += `L${rounded(x)},${rounded(y)}`; }
  fill() { this.add("path", { d: `${this.path}Z`, fill: this.fillStyle }); }
  setLineDash(lengths) { this.dash = lengths.join(" "); }
}

const rounded = number => Math.round(number * 100) / 100;

// A picture of a run's graph, timeline or memory: { name, width, height, text }.
function pictureOf(app, what) {
  const colours = coloursNow(), { model, graphs } = app.run.data, pass = graphs[app.state.graph].name;
  const body = element("g", { transform: `translate(0,${HEADING})` });
  const box = what === "graph" ? graphInto(app, body) : chartInto(app, what, body, colours);
  const [width, height] = [Math.ceil(box.width), Math.ceil(box.height + HEADING)];
  const heading = new SvgPen(element("g"));
  heading.fillStyle = colours.text;
  heading.fillText(`${model}, ${what === "graph" ? `graph after ${pass}` : what === "memory" ? "memory of a rank over the step" : "timeline of the step"}`, 10, HEADING / 2);
  const svg = element("svg", { width, height, viewBox: `0 0 ${width} ${height}` },
    element("rect", { width, height, fill: colours.card }), heading.into, body);
  return { name: `${fileName(model)}-${what}${what === "graph" ? `-${fileName(pass)}` : ""}`, width, height, text: asXml(svg) };
}

function chartInto(app, what, into, colours) {
  const { charts } = app, canvas = charts[what].getBoundingClientRect(), pen = new SvgPen(into);
  const width = Math.max(LEAST_WIDTH, canvas.width), { height } = canvas;
  (what === "memory" ? drawMemory : drawTimeline)(charts, pen, width, height, colours);
  if (what === "timeline") return { width, height };
  app.categories().reduce((x, name) => {
    pen.fillStyle = colours[name] ?? colours.place;
    pen.fillRect(x, height + 8, 9, 9);
    pen.fillStyle = colours.muted;
    pen.fillText(name, x + 14, height + 13);
    return x + 30 + 6.2 * name.length;
  }, GUTTER);
  return { width, height: height + 26 };
}

function graphInto(app, into) {
  const { layer, box } = app.graph, copy = layer.cloneNode(true);
  copy.setAttribute("transform", `translate(0,${-HEAD})`);
  const [shown, copies] = [layer, copy].map(root => [...root.querySelectorAll("*")]);
  shown.forEach((found, at) => inlined(found, copies[at]));
  into.append(copy);
  return { width: box.width, height: box.height - HEAD };
}

const DRAWN = { fill: "", "fill-opacity": "1", stroke: "none", "stroke-width": "", "stroke-dasharray": "none", opacity: "1" };
const LETTERED = { "font-size": "", "font-weight": "400", "text-anchor": "start" };

// Say on an element itself how the page's style draws it; what the page hides goes.
function inlined(found, copy) {
  const style = getComputedStyle(found), isText = found.matches("text, tspan");
  if (style.visibility === "hidden") return copy.remove();
  for (const name of [...copy.attributes].map(({ name }) => name)) if (name === "class" || name.startsWith("data-")) copy.removeAttribute(name);
  if (found.matches("g, title")) return;
  for (const [name, usual] of Object.entries(isText ? { ...DRAWN, ...LETTERED } : DRAWN)) {
    const value = plainColour(style.getPropertyValue(name));
    if (value !== usual && !(name === "stroke-width" && style.stroke === "none")) copy.setAttribute(name, value);
  }
  if (isText) copy.setAttribute("font-family", FONT);
  if (style.textDecorationLine !== "none") copy.setAttribute("text-decoration", style.textDecorationLine);
}

// Mixed colours as every viewer knows them.
function plainColour(value) {
  return value.replace(/color\(srgb ([\d.e-]+) ([\d.e-]+) ([\d.e-]+)[^)]*\)/, (_, ...parts) => `rgb(${parts.slice(0, 3).map(part => Math.round(255 * part)).join(", ")})`);
}

const fileName = text => text.replace(/[^\w.-]+/g, "-").slice(0, 60) || "run";

// Characters that XML has no way to write are replaced.
const asXml = svg => new XMLSerializer().serializeToString(svg).replace(/[^\t\n\r\x20-\uD7FF\uE000-\uFFFD\u{10000}-\u{10FFFF}]/gu, "�");

async function asPng({ width, height, text }) {
  const image = new Image(), scale = Math.min(2, MOST_PIXELS / Math.max(width, height));
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(text)}`;
  await image.decode();
  const canvas = Object.assign(document.createElement("canvas"), { width: Math.ceil(width * scale), height: Math.ceil(height * scale) });
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  return new Promise(done => canvas.toBlob(done, "image/png"));
}

class Pictures {
  constructor(report) {
    this.report = report;
    this.button = byId("pictures");
    this.list = byId("picture-list");
    this.said = element("p", { role: "status" });
    this.list.replaceChildren(...report.apps.flatMap(app => this.rows(app)), this.said);
    this.button.addEventListener("click", () => this.show(this.list.hidden));
    document.addEventListener("pointerdown", event => event.target.closest("#picture-menu") || this.show(false));
    this.list.addEventListener("keydown", event => event.key === "Escape" && this.show(false));
  }

  rows(app) {
    const kinds = app.run.data.step ? ["graph", "timeline", "memory"] : ["graph"], { name } = app.run.data;
    return kinds.map(what => element("div", { class: "picture" }, element("span", {}, name ? `${what} of ${name}` : what), ...[
      ["copy PNG", () => this.copy("image/png", asPng(pictureOf(app, what)))],
      ["copy SVG", () => this.copy("text/plain", new Blob([pictureOf(app, what).text], { type: "text/plain" }))],
      ["save PNG", async () => { const made = pictureOf(app, what); this.save(`${made.name}.png`, await asPng(made)); }],
      ["save SVG", () => { const made = pictureOf(app, what); this.save(`${made.name}.svg`, new Blob([made.text], { type: "image/svg+xml" })); }],
    ].map(([label, act]) => element("button", { onclick: act, "aria-label": `${label} of the ${what}${name ? ` of ${name}` : ""}` }, label))));
  }

  show(isShown) {
    this.list.hidden = !isShown;
    this.button.setAttribute("aria-expanded", isShown);
    this.said.textContent = "";
  }

  async copy(type, content) {
    try {
      await navigator.clipboard.write([new ClipboardItem({ [type]: content })]);
      this.said.textContent = "copied";
    } catch {
      this.said.textContent = "The browser does not let this page copy; save it instead.";
    }
  }

  save(name, blob) {
    const link = element("a", { href: URL.createObjectURL(blob), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    this.said.textContent = `saved as ${name}`;
  }
}
