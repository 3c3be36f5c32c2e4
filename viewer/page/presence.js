// The objects that are online, each in a slot that it keeps while it is online.
//
// The field draws each slot as a cell. Slots are flat arrays, so that a frame can read 10,000 of them
// without allocating. An object that comes back gets its old slot if that is still free, so that cells
// do not jump around.

/** Maximum number of slots, which bounds the page's memory. Further objects are not shown. */
export const SLOTS_MAX = 20_000;

export const FREE = 0;
export const ONLINE = 1;

const DEFAULT_LIFETIME_MS = 30_000;
// Possible lifetimes. The page does not know `OBJECT_TTL`, so it estimates the lifetime from the ages that objects have
// when they are gone.
const LIFETIMES_MS = [1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 45, 60, 90, 120, 180, 300, 600, 900, 1800, 3600, 7200, 21_600, 86_400]
  .map((seconds) => seconds * 1000);

export class Presence {
  state = new Uint8Array(256);
  /** When the object was last seen, by the viewer's clock, in milliseconds. */
  seenAt = new Float64Array(256);
  /** When the page received the latest sighting, by `performance.now()`; 0 if it came with a snapshot. */
  updatedAt = new Float64Array(256);
  /** When the page learnt that the object is gone, by `performance.now()`; 0 if it learnt so from a snapshot. */
  goneAt = new Float64Array(256);
  /** Number of slots in use or used before. */
  slots = 0;
  /** Changes whenever objects move to other slots. */
  arrangement = 0;
  #ids = [];
  #slotOf = new Map();
  #free = [];
  #online = 0;
  #agesAtEnd = [];
  #lifetimeMs = DEFAULT_LIFETIME_MS;

  get online() {
    return this.#online;
  }

  /** The estimated age at which an object is gone, in milliseconds. */
  get lifetimeMs() {
    return this.#lifetimeMs;
  }

  /** The id of the object that has the slot, or last had it. */
  idAt(slot) {
    return this.#ids[slot];
  }

  /** The slot of an object that is online, or -1. */
  slotOf(id) {
    const slot = this.#slotOf.get(id);
    return slot !== undefined && this.state[slot] === ONLINE ? slot : -1;
  }

  /** Replaces all objects with those of a snapshot. */
  replace(objects) {
    const online = new Set(objects.map(({ id }) => id));
    for (let slot = 0; slot < this.slots; slot++) {
      if (this.state[slot] === ONLINE && !online.has(this.#ids[slot])) this.#release(slot, 0);
    }
    // An empty field starts in the order of the ids; otherwise objects keep their cells.
    if (this.#online === 0) {
      this.#clear();
      objects.sort(byId);
    }
    for (const object of objects) this.#put(object, 0);
  }

  /** Records that objects were seen, and adds those that were not online. */
  markSeen(objects, receivedAt) {
    for (const object of objects) this.#put(object, receivedAt);
  }

  /** Records that objects are gone; `now` is the viewer's time. */
  markGone(objects, receivedAt, now) {
    for (const { id, at } of objects) {
      const slot = this.slotOf(id);
      if (slot < 0) continue;
      this.#release(slot, receivedAt);
      this.#learnLifetime(now - at);
    }
    if (this.slots > this.#online * 2 + 128) this.#compact();
  }

  #put({ id, at }, receivedAt) {
    let slot = this.#slotOf.get(id);
    if (slot === undefined) {
      slot = this.#allocate();
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
    this.updatedAt[slot] = receivedAt;
  }

  // Returns a slot that was never used, so that objects that come back find their old slots free. Once there are a
  // quarter more slots than online objects, returns the slot that has been free for longest. Returns -1 if none is free.
  #allocate() {
    while (this.#free.length > 0 && this.slots >= Math.min(SLOTS_MAX, this.#online * 1.25 + 32)) {
      const slot = this.#free.shift();
      if (this.state[slot] !== FREE) continue;
      this.#slotOf.delete(this.#ids[slot]);
      return slot;
    }
    if (this.slots === SLOTS_MAX) return -1;
    if (this.slots === this.state.length) this.#grow();
    return this.slots++;
  }

  #release(slot, receivedAt) {
    this.state[slot] = FREE;
    this.goneAt[slot] = receivedAt;
    this.#online -= 1;
    this.#free.push(slot);
    // The list grows beyond the free slots, because an object that comes back does not remove its slot from the list.
    if (this.#free.length > 2 * this.slots + 64) {
      this.#free = [...new Set(this.#free)].filter((free) => this.state[free] === FREE);
    }
  }

  #grow() {
    for (const name of ["state", "seenAt", "updatedAt", "goneAt"]) {
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

  // Removes all free slots by moving the objects to the first slots.
  #compact() {
    const staying = [];
    for (let slot = 0; slot < this.slots; slot++) {
      if (this.state[slot] === ONLINE) staying.push({ id: this.#ids[slot], at: this.seenAt[slot], updatedAt: this.updatedAt[slot] });
    }
    this.#clear();
    for (const object of staying.sort(byId)) this.#put(object, object.updatedAt);
  }

  // Uses the lower quartile, because ages are too high after the routine was away, and a few are too low after a person
  // has deleted rows.
  #learnLifetime(age) {
    this.#agesAtEnd.push(age);
    if (this.#agesAtEnd.length > 64) this.#agesAtEnd.shift();
    if (this.#agesAtEnd.length < 4) return;
    const sorted = this.#agesAtEnd.toSorted((a, b) => a - b);
    const quartile = sorted[Math.floor(sorted.length / 4)];
    this.#lifetimeMs = LIFETIMES_MS.findLast((lifetime) => lifetime <= quartile) ?? LIFETIMES_MS[0];
  }
}

// Compares ids as text: the longer one is greater. The order of negative ids, which are rare, does not matter.
function byId(one, other) {
  return one.id.length - other.id.length || (one.id < other.id ? -1 : 1);
}
