// Who is online: each object in a slot of its own, which it keeps while it is online.
//
// Slots are what the field draws as cells. They live in flat arrays, so that a frame can look at 10,000 of
// them without making garbage. An object that comes back gets its old slot if nobody has taken it, so the
// field does not dance.

/** Of more objects than these the page shows the first that it hears of; none needs more memory than this. */
export const MOST_SLOTS = 20_000;

export const FREE = 0;
export const ONLINE = 1;

const DEFAULT_SPAN_MS = 30_000;
// The ages that a fade can end at. The lifetime of an object is a setting of the routine that the page is not
// told; it is learnt from the ages at which objects go.
const SPANS_MS = [1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 45, 60, 90, 120, 180, 300, 600, 900, 1800, 3600, 7200, 21_600, 86_400]
  .map((seconds) => seconds * 1000);

export class Presence {
  state = new Uint8Array(256);
  /** When the object was last seen, by the viewer's clock, in milliseconds. */
  seenAt = new Float64Array(256);
  /** When the page heard so, by `performance.now()`; 0 if it came with a snapshot. */
  litAt = new Float64Array(256);
  /** When the page heard that it is gone, likewise. */
  goneAt = new Float64Array(256);
  /** How many slots there are; those beyond were never used. */
  slots = 0;
  /** Counts the times that objects were given other slots. */
  arrangement = 0;
  #ids = [];
  #slotOf = new Map();
  #free = [];
  #online = 0;
  #agesAtEnd = [];
  #span = DEFAULT_SPAN_MS;

  get online() {
    return this.#online;
  }

  /** The age at which an object is about to go, in milliseconds. */
  get span() {
    return this.#span;
  }

  /** The object of a slot: who is there, or who was there last. */
  idAt(slot) {
    return this.#ids[slot];
  }

  /** The slot of an object that is online, or -1. */
  slotOf(id) {
    const slot = this.#slotOf.get(id);
    return slot !== undefined && this.state[slot] === ONLINE ? slot : -1;
  }

  /** Takes exactly these to be online, as a snapshot says. */
  replace(objects) {
    const there = new Set(objects.map(({ id }) => id));
    for (let slot = 0; slot < this.slots; slot++) {
      if (this.state[slot] === ONLINE && !there.has(this.#ids[slot])) this.#vacate(slot, 0);
    }
    // An empty field begins in the order of the ids; one that is known to people stays as it is.
    if (this.#online === 0) {
      this.#clear();
      objects.sort(byId);
    }
    for (const object of objects) this.#put(object, 0);
  }

  /** Notes that objects were seen, new ones or not. */
  see(objects, heardAt) {
    for (const object of objects) this.#put(object, heardAt);
  }

  /** Notes that objects are gone; `now` is the viewer's time. */
  remove(objects, heardAt, now) {
    for (const { id, at } of objects) {
      const slot = this.slotOf(id);
      if (slot < 0) continue;
      this.#vacate(slot, heardAt);
      this.#learn(now - at);
    }
    if (this.slots > this.#online * 2 + 128) this.#compact();
  }

  #put({ id, at }, heardAt) {
    let slot = this.#slotOf.get(id);
    if (slot === undefined) {
      slot = this.#take();
      if (slot < 0) return;
      this.#ids[slot] = id;
      this.#slotOf.set(id, slot);
    }
    if (this.state[slot] !== ONLINE) {
      this.state[slot] = ONLINE;
      this.seenAt[slot] = 0;
      this.#online += 1;
    }
    this.seenAt[slot] = Math.max(this.seenAt[slot], at);
    this.litAt[slot] = heardAt;
  }

  // A new one at first, so that those who left find theirs when they come back; with a quarter more slots than
  // objects, the one that has been free for longest.
  #take() {
    while (this.#free.length > 0 && this.slots >= Math.min(MOST_SLOTS, this.#online * 1.25 + 32)) {
      const slot = this.#free.shift();
      if (this.state[slot] !== FREE) continue;
      this.#slotOf.delete(this.#ids[slot]);
      return slot;
    }
    if (this.slots === MOST_SLOTS) return -1;
    if (this.slots === this.state.length) this.#grow();
    return this.slots++;
  }

  #vacate(slot, heardAt) {
    this.state[slot] = FREE;
    this.goneAt[slot] = heardAt;
    this.#online -= 1;
    this.#free.push(slot);
    // Objects that come back to their slots leave them in this list.
    if (this.#free.length > 2 * this.slots + 64) {
      this.#free = [...new Set(this.#free)].filter((free) => this.state[free] === FREE);
    }
  }

  #grow() {
    for (const name of ["state", "seenAt", "litAt", "goneAt"]) {
      const larger = new this[name].constructor(this[name].length * 2);
      larger.set(this[name]);
      this[name] = larger;
    }
  }

  #clear() {
    this.state.fill(FREE);
    this.goneAt.fill(0);
    this.#slotOf.clear();
    this.#ids = [];
    this.#free = [];
    this.#online = 0;
    this.slots = 0;
    this.arrangement += 1;
  }

  // Closes the gaps, once they are most of the field.
  #compact() {
    const staying = [];
    for (let slot = 0; slot < this.slots; slot++) {
      if (this.state[slot] === ONLINE) staying.push({ id: this.#ids[slot], at: this.seenAt[slot], litAt: this.litAt[slot] });
    }
    this.#clear();
    for (const object of staying.sort(byId)) this.#put(object, object.litAt);
  }

  // The lower quartile: late ones tell of a routine that was away, and the few early ones of a person's DELETE.
  #learn(age) {
    this.#agesAtEnd.push(age);
    if (this.#agesAtEnd.length > 64) this.#agesAtEnd.shift();
    if (this.#agesAtEnd.length < 4) return;
    const sorted = this.#agesAtEnd.toSorted((a, b) => a - b);
    const quartile = sorted[Math.floor(sorted.length / 4)];
    this.#span = SPANS_MS.findLast((span) => span <= quartile) ?? SPANS_MS[0];
  }
}

// Ids are text, so the longer of two is the greater; negative ones, which hardly anybody has, come in some order.
function byId(one, other) {
  return one.id.length - other.id.length || (one.id < other.id ? -1 : 1);
}
