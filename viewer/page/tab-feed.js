// The stream of changes in a tab, shared with other tabs if the browser supports SharedWorker.
import { Feed } from "./feed.js";
import { address } from "./api.js";

/** A `Feed` for this tab. */
export function follow(on) {
  return "SharedWorker" in globalThis ? new TabFeed(on) : new Feed(on);
}

class TabFeed {
  #on;
  #port;
  #lastActivity = performance.now();
  /** A stream for this tab alone, if the worker cannot start. */
  #own = null;

  constructor(on) {
    this.#on = on;
    const worker = new SharedWorker(address("page/shared-feed.js"), { type: "module" });
    worker.onerror = () => (this.#own ??= new Feed(on));
    this.#port = worker.port;
    this.#port.onmessage = ({ data }) => this.#receive(data);
    this.#port.postMessage("join");
    // After "pagehide", the browser may keep the page in its back/forward cache and show it again later.
    addEventListener("pagehide", () => this.#port.postMessage("leave"));
    addEventListener("pageshow", (event) => event.persisted && this.#port.postMessage("join"));
  }

  renew() {
    this.#lastActivity = performance.now();
    if (this.#own) this.#own.renew();
    else this.#port.postMessage("renew");
  }

  get silence() {
    return this.#own ? this.#own.silence : performance.now() - this.#lastActivity;
  }

  #receive([name, ...values]) {
    this.#lastActivity = performance.now();
    if (name === "silent") this.#lastActivity -= values[0];
    else this.#on[name](...values);
  }
}
