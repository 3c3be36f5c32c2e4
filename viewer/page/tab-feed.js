// The stream of changes as a tab gets it: shared with the other tabs where the browser can do that.
import { Feed } from "./feed.js";
import { address } from "./api.js";

/** A `Feed` for this tab. */
export function follow(on) {
  return "SharedWorker" in globalThis ? new TabFeed(on) : new Feed(on);
}

class TabFeed {
  #on;
  #port;
  #heardAt = performance.now();
  /** The stream of this tab alone, if the worker cannot be started. */
  #own = null;

  constructor(on) {
    this.#on = on;
    const worker = new SharedWorker(address("page/shared-feed.js"), { type: "module" });
    worker.onerror = () => (this.#own ??= new Feed(on));
    this.#port = worker.port;
    this.#port.onmessage = ({ data }) => this.#take(data);
    this.#port.postMessage("join");
    // A tab that is left may come back as it was, from the browser's cache.
    addEventListener("pagehide", () => this.#port.postMessage("leave"));
    addEventListener("pageshow", (event) => event.persisted && this.#port.postMessage("join"));
  }

  renew() {
    this.#heardAt = performance.now();
    if (this.#own) this.#own.renew();
    else this.#port.postMessage("renew");
  }

  get silence() {
    return this.#own ? this.#own.silence : performance.now() - this.#heardAt;
  }

  #take([what, ...values]) {
    this.#heardAt = performance.now();
    if (what === "silent") this.#heardAt -= values[0];
    else this.#on[what](...values);
  }
}
