// The panel that shows one object, follows its changes and lists its recent sightings.
import { fetchObject, parseId } from "./api.js";
import { ObjectHistory } from "./object-history.js";
import { ago, duration, preciseTimeOfDay } from "./format.js";

const SIGHTINGS_MAX = 20;

const element = (id) => document.getElementById(id);

export class ObjectPanel {
  #now;
  #announce;
  #onShow;
  #id = null;
  #seenAt = null;
  #goneAt = null;
  #sightings = [];
  #state = "loading";
  #changes = 0;
  #history;
  #request = new AbortController();
  #mustAnnounce = false;

  /**
   * `announce(text)` makes a screen reader say the text. Calls `onShow(id)` when the panel shows another object, with
   * null for none.
   */
  constructor(now, announce, onShow) {
    this.#now = now;
    this.#announce = announce;
    this.#onShow = onShow;
    this.#history = new ObjectHistory((goneAt) => {
      // The end of an earlier session says nothing about the latest one.
      if (goneAt > this.#seenAt) this.#goneAt = goneAt;
    });
    element("search").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#search();
    });
    element("search-id").addEventListener("input", () => this.#showError(""));
    element("object-close").addEventListener("click", () => {
      this.show(null);
      element("search-id").focus();
    });
  }

  get id() {
    return this.#id;
  }

  /** Shows the object `id`, or none if `id` is null. */
  show(id) {
    if (id === this.#id) return;
    this.#id = id;
    this.#seenAt = null;
    this.#goneAt = null;
    this.#sightings = [];
    this.#state = "loading";
    this.#history.show(id);
    element("object").hidden = id === null;
    element("object-none").hidden = id !== null;
    element("object-id").textContent = id ?? "";
    this.#drawSightings();
    this.refresh();
    this.#onShow(id);
    this.load(true);
  }

  /** Fetches the shown object from the viewer. With `announce`, a screen reader says the result. */
  async load(announce = false) {
    this.#request.abort();
    // A snapshot may replace this request by another before the response arrives.
    this.#mustAnnounce = this.#id !== null && (announce || this.#mustAnnounce);
    if (this.#id === null) return;
    const request = new AbortController();
    this.#request = request;
    const changes = this.#changes;
    try {
      const object = await fetchObject(this.#id, request.signal);
      if (request.signal.aborted) return;
      if (object) {
        this.#sightings = merge(object.sightings, this.#sightings);
        this.#seenAt = Math.max(object.at, this.#seenAt ?? object.at);
      }
      // A change that the stream sent meanwhile may be newer than the response.
      if (changes === this.#changes) {
        const missing = this.#seenAt === null ? "absent" : "gone";
        this.#setState(object?.isOnline ? "online" : missing, object?.goneAt ?? null);
      }
    } catch {
      if (request.signal.aborted) return;
      if (this.#state === "loading") this.#state = "unknown";
    }
    this.#drawSightings();
    this.refresh();
    if (this.#mustAnnounce) this.#announce(`Object ${this.#id}: ${this.#stateText()}`);
    this.#mustAnnounce = false;
  }

  /** Applies a change from the stream, if it is about the shown object. */
  apply(kind, objects) {
    if (this.#id === null) return;
    // The page may have missed changes before the snapshot.
    if (kind === "snapshot") return this.#history.reload();
    const object = objects.find(({ id }) => id === this.#id);
    if (!object) return;
    const before = this.#state;
    this.#seenAt = Math.max(object.at, this.#seenAt ?? object.at);
    this.#changes += 1;
    this.#setState(kind === "gone" ? "gone" : "online", null);
    if (kind !== "gone") this.#sightings = merge([object.at], this.#sightings);
    this.#drawSightings();
    this.refresh();
    if (before !== this.#state) this.#announce(`Object ${this.#id}: ${this.#stateText()}`);
  }

  /** Updates what changes with time. */
  refresh() {
    if (this.#id === null) return;
    const state = element("object-state");
    const text = this.#stateText();
    if (state.textContent !== text) state.textContent = text;
    state.dataset.state = this.#state;
    this.#history.draw(this.#state === "gone", this.#seenAt, this.#now());
  }

  // A change from the stream has no `goneAt`. The history then has it.
  #setState(state, goneAt) {
    if (state !== this.#state && this.#state !== "loading") this.#history.reload();
    if (state !== this.#state || goneAt !== null) this.#goneAt = goneAt;
    this.#state = state;
  }

  #stateText() {
    const age = this.#seenAt === null ? 0 : Math.max(0, this.#now() - this.#seenAt);
    const since = this.#goneAt === null ? "" : ` for ${duration(Math.max(0, this.#now() - this.#goneAt) / 1000)}`;
    return {
      loading: "loading …",
      unknown: "The viewer does not answer. The page tries again when the viewer is back.",
      absent: "Not online: never seen, or not recently. If the object is seen, it appears here.",
      online: `Online, seen ${ago(age)}`,
      gone: `Gone${since}, last seen ${ago(age)}`,
    }[this.#state];
  }

  #drawSightings() {
    element("sightings").hidden = this.#sightings.length === 0;
    const rows = this.#sightings.map((at, index) => {
      const before = this.#sightings[index + 1];
      return row(preciseTimeOfDay(at), before === undefined ? "–" : duration((at - before) / 1000));
    });
    element("sightings-rows").replaceChildren(...rows);
  }

  #search() {
    const id = parseId(element("search-id").value);
    if (id === null) {
      this.#showError("An id is a 64-bit integer, such as 42.");
      return;
    }
    this.#showError("");
    if (id === this.#id) this.load(true);
    else this.show(id);
  }

  #showError(text) {
    element("search-error").textContent = text;
    element("search-id").setAttribute("aria-invalid", String(text !== ""));
    if (text) this.#announce(text);
  }
}

// Merges two lists without duplicates, newest first.
function merge(some, others) {
  return [...new Set([...some, ...others])].sort((a, b) => b - a).slice(0, SIGHTINGS_MAX);
}

function row(...cells) {
  const line = document.createElement("tr");
  for (const text of cells) line.insertCell().textContent = text;
  return line;
}
