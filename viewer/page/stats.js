// Polls `GET /stats` every second, keeps the statistics of the last five minutes, and estimates the viewer's clock.

import { address } from "./api.js";

export const HISTORY_MS = 5 * 60_000;
const INTERVAL_MS = 1000;
const HIDDEN_INTERVAL_MS = 5000;
const WAIT_MAX_MS = 15_000;

/** Estimates the viewer's clock from the fastest of the last responses. */
class Clock {
  #samples = [];
  #offset = 0;

  add(at, sentAt, answeredAt) {
    this.#samples.push({ offset: at - (sentAt + answeredAt) / 2, took: answeredAt - sentAt });
    if (this.#samples.length > 30) this.#samples.shift();
    this.#offset = this.#samples.reduce((best, one) => (one.took < best.took ? one : best)).offset;
  }

  now() {
    return Date.now() + this.#offset;
  }
}

/**
 * Polls forever. `history` holds `{at, stats}` by the page's clock, oldest first; failed requests have no entry.
 * Calls `on.answer(stats)` and `on.failure()`.
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
      if (!document.hidden) this.#pollIn(0);
    });
    this.#poll();
  }

  get latest() {
    return this.history.at(-1)?.stats ?? null;
  }

  async #poll() {
    const sentAt = Date.now();
    try {
      const response = await fetch(address("stats"), { cache: "no-store", signal: AbortSignal.timeout(5000) });
      if (!response.ok) throw new Error(`the viewer answered ${response.status}`);
      const stats = await response.json();
      const answeredAt = Date.now();
      this.clock.add(Date.parse(stats.at), sentAt, answeredAt);
      this.history.push({ at: answeredAt, stats });
      while (this.history[0].at < answeredAt - HISTORY_MS - 2 * HIDDEN_INTERVAL_MS) this.history.shift();
      this.#failures = 0;
      this.#on.answer(stats);
    } catch {
      // The page reports any failure, and polls again.
      this.#failures += 1;
      this.#on.failure();
    }
    this.#pollIn(this.#wait(Date.now() - sentAt));
  }

  #wait(took) {
    const interval = document.hidden ? HIDDEN_INTERVAL_MS : INTERVAL_MS;
    if (this.#failures === 0) return Math.max(0, interval - took);
    const longest = Math.min(WAIT_MAX_MS, interval * 2 ** (this.#failures - 1));
    return longest * (0.5 + Math.random() / 2);
  }

  #pollIn(milliseconds) {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#poll(), milliseconds);
  }
}
