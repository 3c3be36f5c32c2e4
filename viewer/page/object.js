// One object: found by its id, followed while it is on show, with its recent sightings.
import { fetchObject, readId } from "./api.js";
import { ago, duration, preciseTimeOfDay } from "./format.js";

const MOST_SIGHTINGS = 20;

const element = (id) => document.getElementById(id);

export class ObjectPanel {
  #now;
  #say;
  #chosen;
  #id = null;
  #seenAt = null;
  #sightings = [];
  #state = "looking";
  #request = new AbortController();

  /**
   * `say(words)` tells a screen reader; `chosen(id)` is called when another object is on show, with null
   * for none.
   */
  constructor(now, say, chosen) {
    this.#now = now;
    this.#say = say;
    this.#chosen = chosen;
    element("search").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#search();
    });
    element("search-id").addEventListener("input", () => this.#complain(""));
    element("object-close").addEventListener("click", () => {
      this.show(null);
      element("search-id").focus();
    });
    // The address names the object, so that it can be passed on and survives a reload.
    addEventListener("hashchange", () => this.showAddressed());
  }

  get id() {
    return this.#id;
  }

  /** Shows an object, or none. */
  show(id) {
    if (id === this.#id) return;
    this.#id = id;
    this.#seenAt = null;
    this.#sightings = [];
    this.#state = "looking";
    history.replaceState(null, "", id === null ? location.pathname : `#${id}`);
    element("object").hidden = id === null;
    element("object-none").hidden = id !== null;
    element("object-id").textContent = id ?? "";
    this.#drawSightings();
    this.refresh();
    this.#chosen(id);
    this.load(true);
  }

  /** Shows the object that the page's address names. */
  showAddressed() {
    const id = readId(location.hash.slice(1));
    if (id !== null) this.show(id);
  }

  /** Asks the viewer about the object on show; `aloud` tells the answer. */
  async load(aloud = false) {
    this.#request.abort();
    if (this.#id === null) return;
    const request = new AbortController();
    this.#request = request;
    try {
      const object = await fetchObject(this.#id, request.signal);
      if (request.signal.aborted) return;
      if (object) {
        // What came by the stream meanwhile may be newer than the answer.
        this.#sightings = merge(object.sightings, this.#sightings);
        this.#seenAt = Math.max(object.at, this.#seenAt ?? object.at);
        this.#state = "online";
      } else {
        this.#state = this.#seenAt === null ? "absent" : "gone";
      }
    } catch {
      if (request.signal.aborted) return;
      if (this.#state === "looking") this.#state = "unknown";
    }
    this.#drawSightings();
    this.refresh();
    if (aloud) this.#say(`Object ${this.#id}: ${this.#words()}`);
  }

  /** Notes what the stream says about the object on show. */
  note(kind, objects) {
    if (this.#id === null || kind === "snapshot") return;
    const object = objects.find(({ id }) => id === this.#id);
    if (!object) return;
    const before = this.#state;
    this.#seenAt = Math.max(object.at, this.#seenAt ?? object.at);
    this.#state = kind === "gone" ? "gone" : "online";
    if (kind !== "gone") this.#sightings = merge([object.at], this.#sightings);
    this.#drawSightings();
    this.refresh();
    if (before !== this.#state) this.#say(`Object ${this.#id}: ${this.#words()}`);
  }

  /** Brings the age up to date. */
  refresh() {
    if (this.#id === null) return;
    const state = element("object-state");
    const words = this.#words();
    if (state.textContent !== words) state.textContent = words;
    state.dataset.state = this.#state;
  }

  #words() {
    const age = this.#seenAt === null ? 0 : Math.max(0, this.#now() - this.#seenAt);
    return {
      looking: "asking …",
      unknown: "The viewer does not answer. It is asked again when it is back.",
      absent: "Not online: never seen, or not for a while. When it is seen, it shows here.",
      online: `Online, seen ${ago(age)}`,
      gone: `Gone, last seen ${ago(age)}`,
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
    const id = readId(element("search-id").value);
    if (id === null) {
      this.#complain("An id is a whole number of 64 bits, such as 42.");
      return;
    }
    this.#complain("");
    if (id === this.#id) this.load(true);
    else this.show(id);
  }

  #complain(words) {
    element("search-wrong").textContent = words;
    element("search-id").setAttribute("aria-invalid", String(words !== ""));
    if (words) this.#say(words);
  }

}

// Newest first, each once.
function merge(some, others) {
  return [...new Set([...some, ...others])].sort((a, b) => b - a).slice(0, MOST_SIGHTINGS);
}

function row(...cells) {
  const line = document.createElement("tr");
  for (const text of cells) line.insertCell().textContent = text;
  return line;
}
