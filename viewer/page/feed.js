// The stream of changes, kept up: `GET /events`.
import { MOST_SLOTS } from "./presence.js";
import { address, parse } from "./api.js";

const FIRST_WAIT_MS = 1000;
const LONGEST_WAIT_MS = 30_000;
const KINDS = ["snapshot", "more", "resumed", "online", "seen", "gone"];

/**
 * Follows the stream forever, about as many objects as the page shows. Calls `on.open(isLimited)` whenever the
 * stream is there (again) and its list of objects is complete, or holds as many as the page shows, `on.lost()` whenever it is not, and `on.change(kind, objects)` for each
 * change, in order: "snapshot" with all objects, "listed" with further ones, "online", "seen" and "gone".
 *
 * The browser resumes a broken connection with `Last-Event-ID`, so that nothing is missed. It gives up on a response that
 * is no stream (a proxy's 502 while the viewer starts, say): then the source is made anew here, after a growing, jittered
 * wait, and begins with a snapshot.
 */
export class Feed {
  #on;
  #source = null;
  #failures = 0;
  #timer = 0;
  #heardAt = performance.now();
  /** The objects of a list that is not complete yet, by id; null otherwise. */
  #list = null;

  constructor(on) {
    this.#on = on;
    this.#connect();
  }

  /** Drops the connection and makes a new one, which begins with a snapshot: for one that hangs. */
  renew() {
    clearTimeout(this.#timer);
    this.#connect();
  }

  /** For how many milliseconds nothing has come, not even a failure, although the next connection is not due later. */
  get silence() {
    return this.#source.readyState === EventSource.CLOSED ? 0 : performance.now() - this.#heardAt;
  }

  #connect() {
    this.#source?.close();
    const source = new EventSource(address(`events?limit=${MOST_SLOTS}`));
    this.#source = source;
    this.#list = null;
    this.#heardAt = performance.now();
    source.onopen = () => (this.#heardAt = performance.now());
    source.onerror = () => {
      this.#heardAt = performance.now();
      this.#on.lost();
      if (source.readyState === EventSource.CLOSED) this.#connectLater();
    };
    for (const kind of KINDS) {
      source.addEventListener(kind, (event) => {
        this.#heardAt = performance.now();
        this.#failures = 0;
        const parsed = this.#read(event);
        if (parsed) this.#take(kind, parsed);
      });
    }
  }

  // A large list comes in parts, with changes between them. It replaces what is shown only once it is complete.
  #take(kind, { objects, remaining }) {
    if (kind === "snapshot") this.#list = new Map();
    if (!this.#list) {
      if (objects.length) this.#on.change(kind === "more" ? "listed" : kind, objects);
    } else if (kind === "gone") {
      for (const { id } of objects) this.#list.delete(id);
    } else {
      for (const { id, at } of objects) this.#list.set(id, at);
    }
    if (remaining === undefined || remaining === "follow") return;
    if (this.#list) this.#on.change("snapshot", [...this.#list].map(([id, at]) => ({ id, at })));
    this.#list = null;
    this.#on.open(remaining === "over_limit");
  }

  // After an event that cannot be read nothing is sure any more: a new connection begins with a snapshot.
  #read(event) {
    try {
      return parse(event.data);
    } catch (error) {
      console.error(`an event of ${event.type} cannot be read:`, error);
      this.#source.close();
      this.#on.lost();
      this.#connectLater();
      return null;
    }
  }

  // Half of the wait is random, so that the pages of many people do not come back all at once.
  #connectLater() {
    const wait = Math.min(LONGEST_WAIT_MS, FIRST_WAIT_MS * 2 ** this.#failures);
    this.#failures += 1;
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#connect(), wait * (0.5 + Math.random() / 2));
  }
}
