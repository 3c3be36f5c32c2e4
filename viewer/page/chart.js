// A small SVG line chart of the last five minutes.
import { HISTORY_MS } from "./stats.js";

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 300;
const HEIGHT = 60;
// The line has a gap between points that are further apart, because nothing is known about the time between them.
const GAP_MS = 12_000;

export class Chart {
  element = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": "true", class: "chart" });
  #area = svg("path", { class: "chart-area" });
  #lines = [];
  #cursor = svg("line", { class: "chart-cursor", y1: 0, y2: HEIGHT });

  constructor() {
    const grid = [toY(1), toY(0.5)].map((y) => svg("line", { class: "chart-grid", x1: 0, x2: WIDTH, y1: y, y2: y }));
    const base = svg("line", { class: "chart-base", x1: 0, x2: WIDTH, y1: HEIGHT - 0.5, y2: HEIGHT - 0.5 });
    this.element.append(...grid, this.#area, base, this.#cursor);
    this.showCursor(null, 0);
  }

  /**
   * Draws lines of points `{at, value}` for the five minutes up to `now`; a null value is a gap. Returns the value at
   * the top edge.
   */
  draw(lines, now) {
    const greatest = Math.max(0, ...lines.flat().map(({ value }) => value ?? 0));
    const top = roundUp(greatest);
    const runs = lines.map((points) => this.#toRuns(points, now, top));
    // With several lines, filled areas would suggest that the values add up.
    this.#area.setAttribute("d", runs.length === 1 ? area(runs[0]) : "");
    while (this.#lines.length < lines.length) {
      const line = svg("path", { class: `chart-line chart-line-${this.#lines.length}` });
      this.#lines.push(line);
      this.element.insertBefore(line, this.#cursor);
    }
    this.#lines.forEach((line, index) => line.setAttribute("d", runs[index] ? path(runs[index]) : ""));
    return top;
  }

  /** Shows the cursor at the time `at`, or hides it if `at` is null. */
  showCursor(at, now) {
    this.#cursor.classList.toggle("shown", at !== null);
    if (at === null) return;
    const x = toX(at, now);
    this.#cursor.setAttribute("x1", x);
    this.#cursor.setAttribute("x2", x);
  }

  // Converts points to runs of coordinates without a gap.
  #toRuns(points, now, top) {
    const runs = [];
    let last = null;
    for (const { at, value } of points) {
      if (value === null) {
        last = null;
        continue;
      }
      if (last === null || at - last > GAP_MS) runs.push([]);
      last = at;
      runs.at(-1).push([toX(at, now), toY(value / top)]);
    }
    return runs;
  }
}

const toX = (at, now) => WIDTH - ((now - at) / HISTORY_MS) * WIDTH;
const toY = (share) => HEIGHT - 1.5 - share * (HEIGHT - 5);
const coordinates = ([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`;

// A lone point becomes a short dash; otherwise it would be invisible.
function path(runs) {
  return runs.map((run) => `M${run.map(coordinates).join("L")}${run.length === 1 ? "h1" : ""}`).join("");
}

function area(runs) {
  return runs
    .filter((run) => run.length > 1)
    .map((run) => `M${run[0][0].toFixed(1)} ${HEIGHT}L${run.map(coordinates).join("L")}L${run.at(-1)[0].toFixed(1)} ${HEIGHT}Z`)
    .join("");
}

/** Rounds up to 1, 2, 3, 5 or 8 times a power of ten, and at least to 1. */
function roundUp(value) {
  if (value <= 1) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return power * [1, 2, 3, 5, 8, 10].find((step) => step * power >= value * 0.999);
}

function svg(name, attributes) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}
