// Makes the field usable by pointer, keyboard and screen reader.
//
// To a screen reader the field is a list box. Only the focused option exists in the document, with its
// position (`aria-posinset` of `aria-setsize`): 10,000 real options would cost as much as the canvas
// saves. The left and right keys move in the order of the cells, up and down between rows.
import { ONLINE } from "./presence.js";
import { ago, duration } from "./format.js";

const PAGE_ROWS = 5;

export class FieldInput {
  #field;
  #presence;
  #now;
  #onChoose;
  #element;
  #option;
  #active = -1;
  #activeId = null;
  #arrangement = 0;
  #chosen = null;
  #rings;
  #tip;
  #pointed = -1;
  #described = "";

  /** Calls `onChoose(id)` when a person chooses an object. */
  constructor(element, field, presence, now, onChoose) {
    this.#element = element;
    this.#field = field;
    this.#presence = presence;
    this.#now = now;
    this.#onChoose = onChoose;
    this.#option = element.querySelector("[role=option]");
    this.#rings = { chosen: element.querySelector(".ring-chosen"), active: element.querySelector(".ring-active") };
    this.#tip = element.querySelector(".tip");
    element.addEventListener("keydown", (event) => this.#key(event));
    element.addEventListener("focus", () => this.#focus());
    element.addEventListener("blur", () => this.refresh());
    element.addEventListener("pointermove", (event) => this.#point(event));
    element.addEventListener("pointerleave", () => this.#point(null));
    element.addEventListener("click", (event) => this.#click(event));
  }

  /** Marks the cell of the object `id`, or no cell if `id` is null. */
  mark(id) {
    this.#chosen = id;
    this.refresh();
  }

  /** Updates rings, tip and description. */
  refresh() {
    // Objects keep their slots until the field is compacted. Then the focus follows its object to the new slot.
    if (this.#arrangement !== this.#presence.arrangement) {
      this.#arrangement = this.#presence.arrangement;
      this.#active = this.#activeId === null ? -1 : this.#presence.slotOf(this.#activeId);
    }
    this.#activeId = this.#active < 0 ? null : this.#presence.idAt(this.#active);
    const chosen = this.#chosen === null ? -1 : this.#presence.slotOf(this.#chosen);
    this.#placeRing(this.#rings.chosen, chosen);
    const focused = document.activeElement === this.#element;
    this.#placeRing(this.#rings.active, focused && this.#active < this.#presence.slots ? this.#active : -1);
    // A new age alone does not change the description, because screen readers read out each change of it.
    if (this.#described !== this.#descriptionKey()) this.#describe(this.#active);
    this.#showTip();
  }

  #descriptionKey() {
    const slot = this.#active;
    return `${slot} ${this.#presence.idAt(slot)} ${this.#isOnline(slot)} ${this.#chosen}`;
  }

  #placeRing(ring, slot) {
    ring.hidden = slot < 0;
    if (slot < 0) return;
    const { x, y, width, height } = this.#field.boxOf(slot);
    ring.style.transform = `translate(${x}px, ${y}px)`;
    ring.style.width = `${width}px`;
    ring.style.height = `${height}px`;
  }

  #focus() {
    if (!this.#isOnline(this.#active)) {
      const chosen = this.#chosen === null ? -1 : this.#presence.slotOf(this.#chosen);
      this.#active = chosen >= 0 ? chosen : this.#next(-1, 1);
    }
    this.#described = "";
    this.refresh();
  }

  #key(event) {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      if (this.#active >= 0) this.#onChoose(this.#presence.idAt(this.#active));
      return;
    }
    const { columns } = this.#field;
    const goal = {
      ArrowRight: () => this.#next(this.#active, 1),
      ArrowLeft: () => this.#next(this.#active, -1),
      ArrowDown: () => this.#vertical(columns),
      ArrowUp: () => this.#vertical(-columns),
      PageDown: () => this.#vertical(columns * PAGE_ROWS),
      PageUp: () => this.#vertical(-columns * PAGE_ROWS),
      Home: () => this.#next(-1, 1),
      End: () => this.#next(this.#presence.slots, -1),
    }[event.key];
    if (!goal) return;
    event.preventDefault();
    const slot = goal();
    if (slot >= 0) this.#active = slot;
    this.#described = "";
    this.refresh();
    this.#rings.active.scrollIntoView({ block: "nearest" });
  }

  #isOnline(slot) {
    return slot >= 0 && slot < this.#presence.slots && this.#presence.state[slot] === ONLINE;
  }

  // The nearest slot with an online object in the direction of `step`, or -1.
  #next(from, step) {
    for (let slot = from + step; slot >= 0 && slot < this.#presence.slots; slot += step) {
      if (this.#isOnline(slot)) return slot;
    }
    return -1;
  }

  // The slot straight up or down or, if no object is online there, the nearest slot with one.
  #vertical(distance) {
    const last = this.#presence.slots - 1;
    const goal = this.#active + distance;
    if (goal < 0 || goal > last) return distance < 0 ? this.#next(-1, 1) : this.#next(last + 1, -1);
    if (this.#isOnline(goal)) return goal;
    const [before, after] = [this.#next(goal, -1), this.#next(goal, 1)];
    if (before < 0 || after < 0) return Math.max(before, after);
    return goal - before < after - goal ? before : after;
  }

  #describe(slot) {
    const option = this.#option;
    this.#described = this.#descriptionKey();
    if (slot < 0 || slot >= this.#presence.slots) {
      this.#element.removeAttribute("aria-activedescendant");
      option.textContent = "No object";
      return;
    }
    const id = this.#presence.idAt(slot);
    const online = this.#isOnline(slot);
    const age = Math.max(0, this.#now() - this.#presence.seenAt[slot]);
    option.textContent = `Object ${id}, ${online ? `seen ${ago(age)}` : "gone"}`;
    option.setAttribute("aria-selected", String(id === this.#chosen));
    option.setAttribute("aria-setsize", String(this.#presence.online));
    option.setAttribute("aria-posinset", String(this.#positionOf(slot)));
    this.#element.setAttribute("aria-activedescendant", option.id);
  }

  #positionOf(slot) {
    let position = 0;
    for (let before = 0; before <= slot; before++) position += this.#presence.state[before] === ONLINE ? 1 : 0;
    return Math.max(1, position);
  }

  #slotAt(event) {
    const box = this.#element.getBoundingClientRect();
    return this.#field.slotAt(event.clientX - box.left - this.#element.clientLeft, event.clientY - box.top - this.#element.clientTop);
  }

  #point(event) {
    this.#pointed = event && event.pointerType !== "touch" ? this.#slotAt(event) : -1;
    this.#showTip();
  }

  #click(event) {
    const slot = this.#slotAt(event);
    if (!this.#isOnline(slot)) return;
    this.#active = slot;
    this.#onChoose(this.#presence.idAt(slot));
    this.refresh();
  }

  #showTip() {
    const slot = this.#pointed;
    const shown = this.#isOnline(slot);
    this.#element.classList.toggle("on-cell", shown);
    this.#tip.hidden = !shown;
    if (!shown) return;
    const age = Math.max(0, this.#now() - this.#presence.seenAt[slot]);
    this.#tip.textContent = `${this.#presence.idAt(slot)} · ${age < 1000 ? "seen now" : `${duration(age / 1000)} ago`}`;
    const { x, y, width, height } = this.#field.boxOf(slot);
    const left = Math.min(Math.max(0, x + width / 2 - this.#tip.offsetWidth / 2), this.#element.clientWidth - this.#tip.offsetWidth);
    const top = y > this.#tip.offsetHeight + 8 ? y - this.#tip.offsetHeight - 6 : y + height + 6;
    this.#tip.style.transform = `translate(${left}px, ${top}px)`;
  }
}
