// The field for hands and ears: pointer, keyboard, screen reader.
//
// To a screen reader the field is a list box, of which only the option that has the focus exists in the
// document, with its place among all (`aria-posinset` of `aria-setsize`): 10,000 real options would cost what
// the canvas saves. Left and right go in order, up and down as the cells lie.
import { ONLINE } from "./presence.js";
import { ago, duration } from "./format.js";

const PAGE_ROWS = 5;

export class Browse {
  #field;
  #presence;
  #now;
  #choose;
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

  /** `choose(id)` is called with the object that a person wants to see. */
  constructor(element, field, presence, now, choose) {
    this.#element = element;
    this.#field = field;
    this.#presence = presence;
    this.#now = now;
    this.#choose = choose;
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

  /** Marks the cell of this object, or of none if it is null. */
  mark(id) {
    this.#chosen = id;
    this.refresh();
  }

  /** Brings rings, tip and words up to date with what has changed. */
  refresh() {
    // Objects keep their slots, but for a field that was pulled together: then the focus goes along.
    if (this.#arrangement !== this.#presence.arrangement) {
      this.#arrangement = this.#presence.arrangement;
      this.#active = this.#activeId === null ? -1 : this.#presence.slotOf(this.#activeId);
    }
    this.#activeId = this.#active < 0 ? null : this.#presence.idAt(this.#active);
    const chosen = this.#chosen === null ? -1 : this.#presence.slotOf(this.#chosen);
    this.#put(this.#rings.chosen, chosen);
    const focused = document.activeElement === this.#element;
    this.#put(this.#rings.active, focused && this.#active < this.#presence.slots ? this.#active : -1);
    // Not for the age alone: screen readers read out what changes on the option that has the focus.
    if (this.#described !== this.#toDescribe()) this.#describe(this.#active);
    this.#showTip();
  }

  #toDescribe() {
    const slot = this.#active;
    return `${slot} ${this.#presence.idAt(slot)} ${this.#isOnline(slot)} ${this.#chosen}`;
  }

  #put(ring, slot) {
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
      if (this.#active >= 0) this.#choose(this.#presence.idAt(this.#active));
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

  // The nearest slot from there in that direction where somebody is online, or -1.
  #next(from, step) {
    for (let slot = from + step; slot >= 0 && slot < this.#presence.slots; slot += step) {
      if (this.#isOnline(slot)) return slot;
    }
    return -1;
  }

  // Straight up or down; where nobody is, the nearest beside it.
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
    this.#described = this.#toDescribe();
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
    option.setAttribute("aria-posinset", String(this.#placeOf(slot)));
    this.#element.setAttribute("aria-activedescendant", option.id);
  }

  #placeOf(slot) {
    let place = 0;
    for (let before = 0; before <= slot; before++) place += this.#presence.state[before] === ONLINE ? 1 : 0;
    return Math.max(1, place);
  }

  #at(event) {
    const box = this.#element.getBoundingClientRect();
    return this.#field.slotAt(event.clientX - box.left - this.#element.clientLeft, event.clientY - box.top - this.#element.clientTop);
  }

  #point(event) {
    this.#pointed = event && event.pointerType !== "touch" ? this.#at(event) : -1;
    this.#showTip();
  }

  #click(event) {
    const slot = this.#at(event);
    if (!this.#isOnline(slot)) return;
    this.#active = slot;
    this.#choose(this.#presence.idAt(slot));
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
