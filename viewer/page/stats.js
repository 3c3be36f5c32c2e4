// The numbers: `GET /stats` each second, the last five minutes of them, and the viewer's clock.

import { address } from "./api.js";

export const KEPT_MS = 5 * 60_000;
const INTERVAL_MS = 1000;
const HIDDEN_INTERVAL_MS = 5000;
const LONGEST_WAIT_MS = 15_000;

/** What the viewer's clock says, judged from the quickest of its last answers. */
class Clock {
  #samples = [];
  #offset = 0;

  note(at, asked, answered) {
    this.#samples.push({ offset: at - (asked + answered) / 2, took: answered - asked });
    if (this.#samples.length > 30) this.#samples.shift();
    this.#offset = this.#samples.reduce((best, one) => (one.took < best.took ? one : best)).offset;
  }

  now() {
    return Date.now() + this.#offset;
  }
}

/**
 * Asks for ever. `history` holds `{at, stats}`, oldest first, by the page's clock; a time without an answer
 * has no entry. Calls `on.answer(stats)` and `on.failure()`.
 */
export class Stats {
  clock = new Clock();
  history = [];
  #on;
  #failures = 0;
  #timer = 0;

  constructor(on) {
    this.#on = on;
    document.addEventListener("visibilitychange", () => {
      if (!document.hidden) this.#askIn(0);
    });
    this.#ask();
  }

  get latest() {
    return this.history.at(-1)?.stats ?? null;
  }

  async #ask() {
    const asked = Date.now();
    try {
      const response = await fetch(address("stats"), { cache: "no-store", signal: AbortSignal.timeout(5000) });
      if (!response.ok) throw new Error(`the viewer answered ${response.status}`);
      const stats = await response.json();
      const answered = Date.now();
      this.clock.note(Date.parse(stats.at), asked, answered);
      this.history.push({ at: answered, stats });
      while (this.history[0].at < answered - KEPT_MS - 2 * HIDDEN_INTERVAL_MS) this.history.shift();
      this.#failures = 0;
      this.#on.answer(stats);
    } catch {
      // Whatever it was, the page says so and asks again.
      this.#failures += 1;
      this.#on.failure();
    }
    this.#askIn(this.#wait(Date.now() - asked));
  }

  #wait(took) {
    const interval = document.hidden ? HIDDEN_INTERVAL_MS : INTERVAL_MS;
    if (this.#failures === 0) return Math.max(0, interval - took);
    const longest = Math.min(LONGEST_WAIT_MS, interval * 2 ** (this.#failures - 1));
    return longest * (0.5 + Math.random() / 2);
  }

  #askIn(milliseconds) {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#ask(), milliseconds);
  }
}
