// Follows the event stream, `GET /events`, and reconnects when it breaks.
import { SLOTS_MAX } from "./presence.js";
import { address, parse } from "./api.js";

const FIRST_WAIT_MS = 1000;
const WAIT_MAX_MS = 30_000;
const KINDS = ["snapshot", "more", "resumed", "online", "seen", "gone", "group"];

/**
 * Follows the stream forever, for at most `SLOTS_MAX` objects, only those of the group `group` unless it is "". Calls `on.open(isLimited)` when the stream is connected
 * and its list of objects has arrived, where `isLimited` says that there are more objects than the page shows;
 * `on.lost()` when the stream breaks; and `on.change(kind, objects)` for each change, in order: "snapshot" with all
 * objects, "listed" with further ones, "online", "seen" and "gone"; and `on.groups(changes)` for groups whose status has
 * changed.
 *
 * The browser resumes a broken connection with `Last-Event-ID`, so no change is missed. The browser gives up if the
 * response is not an event stream, such as a proxy's 502 while the viewer starts. Then this class opens a new stream
 * after a growing, jittered wait; a new stream begins with a snapshot.
 */
export class Feed {
  #on;
  #group;
  #source = null;
  #failures = 0;
  #timer = 0;
  #lastActivity = performance.now();
  /** The objects of the list by id, until the list has arrived completely; then null. */
  #list = null;

  constructor(on, group = "") {
    this.#on = on;
    this.select(group);
  }

  /** Follows the objects of another group, beginning with a snapshot. */
  select(group) {
    this.#group = group;
    this.#failures = 0;
    this.renew();
  }

  close() {
    clearTimeout(this.#timer);
    this.#source.close();
  }

  /** Replaces a connection that hangs with a new one, which begins with a snapshot. */
  renew() {
    clearTimeout(this.#timer);
    this.#connect();
  }

  /** Milliseconds since the last event or failure; 0 while the feed waits to reconnect. */
  get silence() {
    return this.#source.readyState === EventSource.CLOSED ? 0 : performance.now() - this.#lastActivity;
  }

  #connect() {
    this.#source?.close();
    const query = new URLSearchParams({ ...(this.#group && { group: this.#group }), limit: SLOTS_MAX });
    const source = new EventSource(address(`events?${query}`));
    this.#source = source;
    this.#list = null;
    this.#lastActivity = performance.now();
    source.onopen = () => (this.#lastActivity = performance.now());
    source.onerror = () => {
      this.#lastActivity = performance.now();
      this.#on.lost();
      if (source.readyState === EventSource.CLOSED) this.#connectLater();
    };
    for (const kind of KINDS) {
      source.addEventListener(kind, (event) => {
        this.#lastActivity = performance.now();
        this.#failures = 0;
        const parsed = this.#parse(event);
        if (parsed && kind === "group") this.#on.groups(parsed.groups);
        else if (parsed) this.#apply(kind, parsed);
      });
    }
  }

  // A large list arrives in parts, with changes in between. Once complete, the list replaces the shown objects.
  #apply(kind, { objects, remaining }) {
    if (kind === "snapshot") this.#list = new Map();
    if (!this.#list) {
      if (objects.length) this.#on.change(kind === "more" ? "listed" : kind, objects);
    } else if (kind === "gone") {
      for (const { id } of objects) this.#list.delete(id);
    } else {
      for (const { id, at } of objects) this.#list.set(id, at);
    }
    if (remaining === undefined || remaining === "follow") return;
    if (this.#list) this.#on.change("snapshot", [...this.#list].map(([id, at]) => ({ id, at })));
    this.#list = null;
    this.#on.open(remaining === "over_limit");
  }

  // After an invalid event, the shown objects may be wrong, so a new connection must begin with a snapshot.
  #parse(event) {
    try {
      return event.type === "group" ? JSON.parse(event.data) : parse(event.data);
    } catch (error) {
      console.error(`cannot parse an event of type ${event.type}; reconnecting:`, error);
      this.#source.close();
      this.#on.lost();
      this.#connectLater();
      return null;
    }
  }

  // Half of the wait is random, so that many pages do not reconnect at the same moment.
  #connectLater() {
    const wait = Math.min(WAIT_MAX_MS, FIRST_WAIT_MS * 2 ** this.#failures);
    this.#failures += 1;
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#connect(), wait * (0.5 + Math.random() / 2));
  }
}
