// The stream of changes, kept up: `GET /events`.
import { objects } from "./wire.js";

const FIRST_WAIT_MS = 1000;
const LONGEST_WAIT_MS = 30_000;
const KINDS = ["snapshot", "online", "seen", "gone"];

/**
 * Follows the stream for ever. Calls `on.open()` whenever it is there (again), `on.lost()` whenever it is
 * not, and `on.change(kind, objects)` for each event, in order.
 *
 * A connection that breaks is taken up again by the browser, with `Last-Event-ID`, so that nothing is missed.
 * It gives up for good on an answer that is no stream (a proxy's 502 while the viewer starts, say): then the
 * source is made anew here, after a growing, jittered wait, and begins with a snapshot.
 */
export class Feed {
  #on;
  #source = null;
  #failures = 0;
  #timer = 0;
  #heardAt = performance.now();

  constructor(on) {
    this.#on = on;
    this.#connect();
  }

  /** Drops the connection and makes a new one, which begins with a snapshot: for one that hangs. */
  renew() {
    clearTimeout(this.#timer);
    this.#connect();
  }

  /** For how many milliseconds nothing has come, not even a failure, although nothing is being waited for. */
  get silence() {
    return this.#source.readyState === EventSource.CLOSED ? 0 : performance.now() - this.#heardAt;
  }

  #connect() {
    this.#source?.close();
    const source = new EventSource("/events");
    this.#source = source;
    this.#heardAt = performance.now();
    source.onopen = () => {
      this.#failures = 0;
      this.#heardAt = performance.now();
      this.#on.open();
    };
    source.onerror = () => {
      this.#heardAt = performance.now();
      this.#on.lost();
      if (source.readyState === EventSource.CLOSED) this.#connectLater();
    };
    for (const kind of KINDS) {
      source.addEventListener(kind, (event) => {
        this.#heardAt = performance.now();
        const changed = this.#read(event);
        if (changed) this.#on.change(kind, changed);
      });
    }
  }

  // After an event that cannot be read nothing is sure any more: a new connection begins with a snapshot.
  #read(event) {
    try {
      return objects(event.data);
    } catch (error) {
      console.error(`an event of ${event.type} cannot be read:`, error);
      this.#source.close();
      this.#on.lost();
      this.#connectLater();
      return null;
    }
  }

  // Half of the wait is chance, so that the pages of many people do not come back all at once.
  #connectLater() {
    const wait = Math.min(LONGEST_WAIT_MS, FIRST_WAIT_MS * 2 ** this.#failures);
    this.#failures += 1;
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#connect(), wait * (0.5 + Math.random() / 2));
  }
}
