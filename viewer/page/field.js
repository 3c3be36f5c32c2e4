// Draws the field of cells on a canvas.
//
// A browser cannot smoothly lay out 10,000 elements that change colour all the time. Each frame computes
// which of about fifty looks each cell has, and paints only the cells whose look has changed: of 10,000
// cells that fade over half a minute, a few hundred. field-input.js adds keyboard and screen reader support.
// Decision: docs/decisions/0056-how-does-the-page-draw-objects.md
import { ONLINE } from "./presence.js";
import { duration } from "./format.js";

const SHADES = 32;
const FLASH_MS = 900;
const FLASH_STEPS = 12;
const GHOST_MS = 2400;
const GHOST_STEPS = 8;
// Looks: 0 empty, then the shades from fresh to stale, the steps of a flash after a sighting, and the steps of a ghost,
// which is an outline that fades out after an object is gone.
const FIRST_SHADE = 1;
const FIRST_FLASH = FIRST_SHADE + SHADES;
const FIRST_GHOST = FIRST_FLASH + FLASH_STEPS;
const LOOKS = FIRST_GHOST + GHOST_STEPS;
const NEVER_DRAWN = 255;
// Looks change at most every 75 ms, so painting more often would show nothing new.
const BETWEEN_PAINTS_MS = 30;

// Sizes of cells in CSS pixels; the field uses the largest that fits. Cells with a `text` size show the id, and with
// `age` also the age.
const SIZES = [
  { width: 112, height: 56, gap: 4, text: 15, age: true },
  { width: 88, height: 44, gap: 4, text: 13, age: true },
  { width: 68, height: 34, gap: 3, text: 12 },
  { width: 54, height: 27, gap: 3, text: 11 },
  { width: 42, height: 24, gap: 3, text: 11 },
  ...[[24, 3], [20, 3], [17, 2], [14, 2], [12, 2], [10, 2], [9, 1], [8, 1], [7, 1], [6, 1], [5, 1]]
    .map(([side, gap]) => ({ width: side, height: side, gap, text: 0 })),
];

export class Field {
  columns = 1;
  #presence;
  #element;
  #canvas;
  #context;
  #now;
  #size = SIZES[0];
  #rows = 1;
  #pitch = { x: 1, y: 1 };
  #ratio = 1;
  #left = 0;
  #width = 0;
  #height = 0;
  #drawn = new Uint8Array(0);
  #paints = [];
  #arrangement = -1;
  #paintedAt = 0;
  #agesPaintedAt = 0;
  #reducedMotion = matchMedia("(prefers-reduced-motion: reduce)");

  /** `now` returns the viewer's time. It stands still while the stream is broken, and so do the ages. */
  constructor(element, presence, now) {
    this.#element = element;
    this.#presence = presence;
    this.#now = now;
    this.#canvas = element.querySelector("canvas");
    this.#context = this.#canvas.getContext("2d", { alpha: false });
    new ResizeObserver(() => this.#resize()).observe(element);
    for (const query of ["(prefers-color-scheme: dark)", "(forced-colors: active)", "(prefers-contrast: more)"]) {
      matchMedia(query).addEventListener("change", () => this.#repaint());
    }
    this.#repaint();
    this.#resize();
    const frame = (time) => {
      requestAnimationFrame(frame);
      this.#draw(time);
    };
    requestAnimationFrame(frame);
  }

  /** The box of a slot's cell, in CSS pixels of the field. */
  boxOf(slot) {
    const [x, y, width, height] = this.#boxOf(slot);
    return { x: x / this.#ratio, y: y / this.#ratio, width: width / this.#ratio, height: height / this.#ratio };
  }

  /** The slot whose cell is at a point, in CSS pixels of the field, or -1. */
  slotAt(x, y) {
    const column = Math.floor((x - this.#left) / this.#pitch.x);
    const row = Math.floor(y / this.#pitch.y);
    if (column < 0 || column >= this.columns || row < 0) return -1;
    const slot = row * this.columns + column;
    return slot < this.#presence.slots ? slot : -1;
  }

  // The box of a slot's cell, rounded to device pixels, so that all gaps are equally wide.
  #boxOf(slot) {
    const column = slot % this.columns;
    const row = Math.floor(slot / this.columns);
    const ratio = this.#ratio;
    const gap = Math.max(1, Math.round(this.#size.gap * ratio));
    const left = Math.round(this.#left * ratio);
    const x = left + Math.round(column * this.#pitch.x * ratio);
    const y = Math.round(row * this.#pitch.y * ratio);
    const nextX = left + Math.round((column + 1) * this.#pitch.x * ratio);
    const nextY = Math.round((row + 1) * this.#pitch.y * ratio);
    return [x, y, nextX - x - gap, nextY - y - gap];
  }

  // The field has the minimum height of the style sheet, and grows if even the smallest cells need more.
  #resize() {
    const width = this.#element.clientWidth;
    const height = Number.parseFloat(getComputedStyle(this.#element).minHeight);
    if (width === this.#width && height === this.#height && devicePixelRatio === this.#ratio) return;
    this.#width = width;
    this.#height = height;
    this.#ratio = devicePixelRatio;
    this.#arrange(true);
  }

  #capacityOf(size, height) {
    return Math.floor((this.#width + size.gap) / size.width) * Math.floor((height + size.gap) / size.height);
  }

  // Chooses the largest cell size that fits. Cells shrink at once, but grow only if a quarter more cells would fit.
  #arrange(force) {
    const height = this.#height;
    const needed = Math.max(1, this.#presence.slots);
    const fitting = SIZES.find((size) => this.#capacityOf(size, height) >= needed) ?? SIZES.at(-1);
    const growing = SIZES.indexOf(fitting) < SIZES.indexOf(this.#size);
    if (force || !growing || this.#capacityOf(fitting, height) >= needed * 1.25) this.#size = fitting;
    const size = this.#size;
    this.columns = Math.max(1, Math.floor((this.#width + size.gap) / size.width));
    this.#rows = Math.max(Math.ceil(needed / this.columns), Math.floor((height + size.gap) / size.height));
    // Cells with text fill all the space; small cells keep whole pixels, because they would look uneven otherwise.
    this.#pitch = size.text
      ? { x: (this.#width + size.gap) / this.columns, y: Math.max(size.height, (height + size.gap) / this.#rows) }
      : { x: size.width, y: size.height };
    this.#left = Math.floor((this.#width + size.gap - this.columns * this.#pitch.x) / 2);
    this.#arrangement = this.#presence.arrangement;

    const canvasHeight = Math.round(this.#rows * this.#pitch.y) - size.gap;
    const [deviceWidth, deviceHeight] = [Math.round(this.#width * this.#ratio), Math.round(canvasHeight * this.#ratio)];
    if (this.#canvas.width !== deviceWidth || this.#canvas.height !== deviceHeight) {
      this.#canvas.width = deviceWidth;
      this.#canvas.height = deviceHeight;
      this.#canvas.style.height = `${canvasHeight}px`;
    }
    this.#drawn = new Uint8Array(this.columns * this.#rows).fill(NEVER_DRAWN);
    this.#context.fillStyle = this.#ground;
    this.#context.fillRect(0, 0, deviceWidth, deviceHeight);
  }

  #draw(time) {
    const presence = this.#presence;
    if (presence.slots > this.#drawn.length) this.#arrange(false);
    else if (presence.arrangement !== this.#arrangement) this.#arrange(false);
    else if (devicePixelRatio !== this.#ratio) this.#resize();
    if (time - this.#paintedAt < BETWEEN_PAINTS_MS) return;
    this.#paintedAt = time;
    // With reduced motion, ages change once a second.
    if (this.#reducedMotion.matches && time - this.#agesPaintedAt < 1000) return;
    // A cell's age as text changes even if its look does not.
    const refresh = time - this.#agesPaintedAt >= 500;
    if (refresh) this.#agesPaintedAt = time;
    const rewrite = refresh && this.#size.age;

    const now = this.#now();
    const pageTime = performance.now();
    const drawn = this.#drawn;
    for (let slot = 0; slot < drawn.length; slot++) {
      const look = slot < presence.slots ? this.#lookOf(slot, now, pageTime) : 0;
      if (look === drawn[slot] && !(rewrite && look >= FIRST_SHADE && look < FIRST_GHOST)) continue;
      drawn[slot] = look;
      this.#paint(slot, look, now);
    }
  }

  #lookOf(slot, now, pageTime) {
    const presence = this.#presence;
    const moving = !this.#reducedMotion.matches;
    if (presence.state[slot] !== ONLINE) {
      const since = pageTime - presence.goneAt[slot];
      const ghost = moving && presence.goneAt[slot] > 0 && since < GHOST_MS;
      return ghost ? FIRST_GHOST + Math.min(GHOST_STEPS - 1, Math.floor((since / GHOST_MS) * GHOST_STEPS)) : 0;
    }
    const since = pageTime - presence.updatedAt[slot];
    if (moving && presence.updatedAt[slot] > 0 && since < FLASH_MS) {
      return FIRST_FLASH + Math.min(FLASH_STEPS - 1, Math.floor((since / FLASH_MS) * FLASH_STEPS));
    }
    const age = Math.min(1, Math.max(0, (now - presence.seenAt[slot]) / presence.lifetimeMs));
    return FIRST_SHADE + Math.min(SHADES - 1, Math.floor(age * SHADES));
  }

  #paint(slot, look, now) {
    const context = this.#context;
    const [x, y, width, height] = this.#boxOf(slot);
    const paint = this.#paints[look];
    context.fillStyle = this.#ground;
    context.fillRect(x, y, width, height);
    // A cell also shrinks as it ages, because colour alone must not carry the meaning.
    const inset = this.#size.text ? 0 : Math.round(paint.inset * Math.min(width, height));
    if (paint.outline) {
      const line = Math.max(1, Math.round(this.#ratio));
      context.fillStyle = paint.fill;
      context.fillRect(x, y, width, height);
      context.fillStyle = this.#ground;
      if (width > 3 * line) context.fillRect(x + line, y + line, width - 2 * line, height - 2 * line);
      return;
    }
    context.fillStyle = paint.fill;
    context.fillRect(x + inset, y + inset, width - 2 * inset, height - 2 * inset);
    if (this.#size.text && look !== 0) this.#write(slot, paint, now, x, y, width, height);
  }

  #write(slot, paint, now, x, y, width, height) {
    const context = this.#context;
    const id = this.#presence.idAt(slot);
    const text = this.#size.text * this.#ratio;
    const pad = text * 0.6;
    const middle = y + height / 2;
    context.fillStyle = paint.ink;
    context.textBaseline = "middle";
    context.font = `600 ${text}px ${this.#font}`;
    const lengthMax = Math.floor((width - 2 * pad) / (text * 0.62));
    const label = id.length <= lengthMax ? id : `…${id.slice(1 - lengthMax)}`;
    context.fillText(label, x + pad, this.#size.age ? middle - text * 0.5 : middle);
    if (!this.#size.age) return;
    context.font = `${text * 0.8}px ${this.#font}`;
    const age = Math.max(0, Math.floor((now - this.#presence.seenAt[slot]) / 1000));
    context.fillText(duration(age).replace("0.0 s", "0 s"), x + pad, middle + text * 0.65);
  }

  // Reads the colours from the style sheet, so that only the style sheet decides about dark, light and forced colours.
  #repaint() {
    const style = getComputedStyle(this.#element);
    const colour = (name) => rgb(style.getPropertyValue(name));
    const [ground, empty, fresh, middle, stale, flash, gone] =
      ["--ground", "--cell-empty", "--cell-fresh", "--cell-middle", "--cell-stale", "--cell-flash", "--cell-gone"].map(colour);
    // Against any colour, either black or white has a contrast of at least 4.5.
    const inks = [[255, 255, 255], [0, 0, 0]];
    this.#font = style.getPropertyValue("--mono");
    this.#ground = css(ground);
    this.#paints = Array.from({ length: LOOKS }, (_, look) => {
      if (look === 0) return { fill: css(empty), inset: 0.3 };
      if (look >= FIRST_GHOST) return { fill: css(mix(gone, ground, (look - FIRST_GHOST) / GHOST_STEPS)), outline: true };
      const age = look < FIRST_FLASH ? (look - FIRST_SHADE) / (SHADES - 1) : 0;
      const aged = age < 0.4 ? mix(fresh, middle, age / 0.4) : mix(middle, stale, (age - 0.4) / 0.6);
      const fill = look < FIRST_FLASH ? aged : mix(flash, fresh, ((look - FIRST_FLASH) / FLASH_STEPS) ** 2);
      const ink = inks.toSorted((a, b) => contrast(b, fill) - contrast(a, fill))[0];
      return { fill: css(fill), ink: css(ink), inset: 0.2 * age };
    });
    this.#drawn.fill(NEVER_DRAWN);
    this.#context.fillStyle = this.#ground;
    this.#context.fillRect(0, 0, this.#canvas.width, this.#canvas.height);
  }
  #ground = "#000";
  #font = "monospace";
}

// Parses `#rrggbb` or a system colour, which only a canvas can resolve.
function rgb(text) {
  const context = document.createElement("canvas").getContext("2d");
  context.fillStyle = text.trim();
  context.fillRect(0, 0, 1, 1);
  return [...context.getImageData(0, 0, 1, 1).data.slice(0, 3)];
}

const css = ([red, green, blue]) => `rgb(${Math.round(red)} ${Math.round(green)} ${Math.round(blue)})`;
const mix = (from, to, share) => from.map((part, index) => part + (to[index] - part) * share);

// The contrast ratio of WCAG 2.
function contrast(one, other) {
  const light = (colour) => {
    const [red, green, blue] = colour.map((part) => {
      const share = part / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue + 0.05;
  };
  const [a, b] = [light(one), light(other)];
  return Math.max(a, b) / Math.min(a, b);
}
