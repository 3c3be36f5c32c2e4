// The stream of changes in a tab, shared with other tabs if the browser supports SharedWorker.
import { Feed } from "./feed.js";
import { address } from "./api.js";

/**
 * A `Feed` for this tab. Calls `on.refused()` if the tabs of this browser already follow as many groups as they can at
 * once.
 */
export function follow(on) {
  return "SharedWorker" in globalThis ? new TabFeed(on) : new Feed(on);
}

class TabFeed {
  #on;
  #group = "";
  #port;
  #lastActivity = performance.now();
  /** A stream for this tab alone, if the worker cannot start. */
  #own = null;

  constructor(on) {
    this.#on = on;
    // The name separates this worker from that of an older page in another tab, which does not know groups.
    const worker = new SharedWorker(address("page/shared-feed.js"), { type: "module", name: "groups" });
    worker.onerror = () => (this.#own ??= new Feed(on, this.#group));
    this.#port = worker.port;
    this.#port.onmessage = ({ data }) => this.#receive(data);
    this.#port.postMessage(["join", this.#group]);
    // After "pagehide", the browser may keep the page in its back/forward cache and show it again later.
    addEventListener("pagehide", () => this.#port.postMessage(["leave"]));
    addEventListener("pageshow", (event) => event.persisted && this.#port.postMessage(["join", this.#group]));
  }

  /** Follows the objects of another group, beginning with a snapshot. */
  select(group) {
    this.#group = group;
    this.#lastActivity = performance.now();
    if (this.#own) this.#own.select(group);
    else this.#port.postMessage(["join", group]);
  }

  renew() {
    this.#lastActivity = performance.now();
    if (this.#own) this.#own.renew();
    else this.#port.postMessage(["renew"]);
  }

  get silence() {
    return this.#own ? this.#own.silence : performance.now() - this.#lastActivity;
  }

  #receive([group, name, ...values]) {
    // The worker may have sent this before it learnt that the tab follows another group.
    if (group !== this.#group) return;
    this.#lastActivity = performance.now();
    if (name === "silent") this.#lastActivity -= values[0];
    else this.#on[name](...values);
  }
}
