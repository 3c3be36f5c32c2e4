// A table of the latest objects that came online or are gone.
import { timeOfDay } from "./format.js";

const ROWS_MAX = 6;

export class RecentChanges {
  #body;
  #onChoose;
  #entries = [];
  #changed = false;

  /** Fills the table body `body`. Calls `onChoose(id)` when a person chooses an object. */
  constructor(body, onChoose) {
    this.#body = body;
    this.#onChoose = onChoose;
  }

  /** Adds a change from the stream, received at the time `at` of the viewer's clock. */
  add(kind, objects, at) {
    if (kind !== "online" && kind !== "gone") return;
    for (const { id } of objects.slice(-ROWS_MAX)) this.#entries.unshift({ id, kind, at });
    this.#entries.length = Math.min(this.#entries.length, ROWS_MAX);
    this.#changed = true;
  }

  /** Removes all entries. */
  clear() {
    this.#entries = [];
    this.#body.replaceChildren();
    this.#body.closest("table").hidden = true;
    this.#changed = false;
  }

  /** Shows new entries, except while a person is about to choose a row. */
  draw() {
    const inUse = this.#body.matches(":hover") || this.#body.contains(document.activeElement);
    if (!this.#changed || inUse) return;
    this.#changed = false;
    this.#body.closest("table").hidden = false;
    this.#body.replaceChildren(...this.#entries.map((entry) => this.#row(entry)));
  }

  #row({ id, kind, at }) {
    const row = document.createElement("tr");
    row.insertCell().textContent = timeOfDay(at);
    const change = row.insertCell();
    change.textContent = kind === "online" ? "came online" : "gone";
    change.className = kind;
    const button = document.createElement("button");
    button.type = "button";
    button.className = "as-link";
    button.textContent = id;
    button.addEventListener("click", () => this.#onChoose(id));
    row.insertCell().append(button);
    return row;
  }
}
