// Who came online and who went, lately: the last few of them, in words.
import { timeOfDay } from "./format.js";

const MOST = 6;

export class Lately {
  #place;
  #choose;
  #entries = [];
  #changed = false;

  /** Fills the rows of the table body `place`; `choose(id)` is called with the object that a person wants to see. */
  constructor(place, choose) {
    this.#place = place;
    this.#choose = choose;
  }

  /** Notes what the stream says; `at` is when, by the viewer's clock. */
  note(kind, objects, at) {
    if (kind !== "online" && kind !== "gone") return;
    for (const { id } of objects.slice(-MOST)) this.#entries.unshift({ id, kind, at });
    this.#entries.length = Math.min(this.#entries.length, MOST);
    this.#changed = true;
  }

  /** Shows what is new, but not under the hand of somebody who is about to choose a row. */
  draw() {
    const inUse = this.#place.matches(":hover") || this.#place.contains(document.activeElement);
    if (!this.#changed || inUse) return;
    this.#changed = false;
    this.#place.closest("table").hidden = false;
    this.#place.replaceChildren(...this.#entries.map((entry) => this.#row(entry)));
  }

  #row({ id, kind, at }) {
    const row = document.createElement("tr");
    row.insertCell().textContent = timeOfDay(at);
    const what = row.insertCell();
    what.textContent = kind === "online" ? "came online" : "gone";
    what.className = kind;
    const button = document.createElement("button");
    button.type = "button";
    button.className = "as-link";
    button.textContent = id;
    button.addEventListener("click", () => this.#choose(id));
    row.insertCell().append(button);
    return row;
  }
}
