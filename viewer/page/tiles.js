// The statistics of the pipeline: a tile with a chart for each value, and a table of all values.
import { Chart } from "./chart.js";
import { HISTORY_MS } from "./stats.js";
import { ago, duration, number, UNKNOWN } from "./format.js";

const ERRORS = {
  timeout: "timed out",
  transport: "no connection",
  throttled: "throttled",
  status: "error status",
  garbage: "invalid response",
  wrong_id: "wrong id",
};
const BREAKER = ["ok", "recovering", "paused on request", "away, probes only"];

const field = (key) => (stats) => stats[key] ?? null;

// `value` gets the value from the stats, `format` formats it, `note` is the text below it, and `alarm` says whether to
// highlight it.
const TILES = [
  {
    title: "Callbacks", unit: "/s", value: field("callbacks_per_second"), format: number,
    note: (stats) => `${number(stats.ids_per_second)} ids/s`,
  },
  {
    title: "Queue", unit: "messages", value: field("queue_messages"), format: number,
    note: (stats) => (stats.spool_messages > 0 ? `plus ${number(stats.spool_messages)} in the spool` : ""),
    alarm: (stats) => stats.spool_messages > 0,
  },
  {
    title: "Oldest message", unit: "", value: field("oldest_message_age_seconds"), format: duration,
  },
  {
    title: "Lookups", unit: "/s", value: field("lookups_per_second"), format: number,
    note: (stats) => {
      const { online, offline } = stats.lookups_by_outcome ?? {};
      return `${number(online)} online, ${number(offline)} offline`;
    },
  },
  {
    title: "Lookups in flight", unit: "", value: field("lookups_in_flight"), format: number,
    note: (stats) => (stats.breaker_state > 0 ? `status API: ${BREAKER[stats.breaker_state] ?? UNKNOWN}` : ""),
    alarm: (stats) => stats.breaker_state > 0,
  },
  {
    title: "Lookup errors", unit: "/s", value: (stats) => sum(errorsOf(stats)), format: number, kinds: true,
    alarm: (stats) => sum(errorsOf(stats)) > 0,
  },
  {
    title: "Dead letters", unit: "", value: field("dead_letters"), format: number, commands: true,
    alarm: (stats) => stats.dead_letters > 0,
  },
];

/** Shows a history of stats as tiles in `container` and as rows in `summary`. */
export class Tiles {
  #history;
  #tiles;
  #services = element("dl", "services");
  #summary;
  /** The position at which a person points at a chart, from 0 (left) to 1; null if at none. */
  #pointedShare = null;

  constructor(container, summary, history) {
    this.#history = history;
    this.#summary = summary;
    this.#tiles = TILES.map((definition) => new Tile(definition, (share) => this.#point(share)));
    const services = element("section", "tile");
    services.append(element("h3", "tile-title", "Services"), this.#services);
    container.append(...this.#tiles.map((tile) => tile.element), services);
    summary.closest("details").addEventListener("toggle", () => this.draw());
  }

  draw(now = Date.now()) {
    const history = this.#history();
    const share = this.#pointedShare;
    const pointed = share === null ? null : nearest(history, now - HISTORY_MS * (1 - share));
    for (const tile of this.#tiles) tile.draw(history, pointed, now);
    const latest = history.at(-1)?.stats;
    if (latest) this.#drawServices(latest);
    if (this.#summary.closest("details").open) {
      this.#summary.replaceChildren(...this.#tiles.map((tile) => tile.summary(history)));
    }
  }

  // All charts show the same five minutes, so pointing at one chart points at the same moment in all.
  #point(share) {
    this.#pointedShare = share;
    this.draw();
  }

  #drawServices(stats) {
    const answering = stats.services.filter(({ status }) => status === "ok").length;
    const rows = [
      ["Answering", `${answering} of ${stats.services.length}`, answering < stats.services.length],
      ["Status API", stats.breaker_state === null ? UNKNOWN : (BREAKER[stats.breaker_state] ?? UNKNOWN), stats.breaker_state > 0],
      ["Spool", stats.spool_messages === 0 ? "empty" : number(stats.spool_messages), stats.spool_messages > 0],
      ["Subscribers", number(stats.subscribers), false],
    ];
    this.#services.replaceChildren(...rows.map(([name, text, alarm]) => {
      const row = element("div", alarm ? "alarm" : "");
      row.append(element("dt", "", name), element("dd", "", text));
      return row;
    }));
  }
}

class Tile {
  element = element("section", "tile");
  #definition;
  #chart = new Chart();
  #now = element("span", "tile-number", UNKNOWN);
  #unit = element("span", "tile-unit");
  #top = element("span", "chart-top");
  #note = element("p", "tile-note");

  constructor(definition, point) {
    this.#definition = definition;
    this.element.classList.toggle("kinds", Boolean(definition.kinds));
    const figure = element("p", "tile-figure");
    figure.append(this.#now, " ", this.#unit);
    this.#unit.textContent = definition.unit;
    const frame = element("div", "chart-frame");
    frame.append(this.#chart.element, this.#top);
    frame.addEventListener("pointermove", (event) => {
      const box = frame.getBoundingClientRect();
      point(Math.min(1, Math.max(0, (event.clientX - box.left) / box.width)));
    });
    for (const end of ["pointerleave", "pointercancel"]) frame.addEventListener(end, () => point(null));
    const head = element("div", "tile-head");
    head.append(element("h3", "tile-title", definition.title), figure);
    this.element.append(head, frame, this.#note);
  }

  /** `pointed` is the history entry that a person points at, or null for the latest. */
  draw(history, pointed, now) {
    const shown = pointed ?? history.at(-1);
    if (!shown) return;
    const { value, format, note, alarm } = this.#definition;
    set(this.#now, format(value(shown.stats)));
    this.element.classList.toggle("alarm", Boolean(alarm?.(shown.stats)));
    this.element.classList.toggle("pointed", pointed !== null);
    const kinds = this.#definition.kinds ? kindsOf(history) : null;
    const lines = kinds
      ? kinds.map((kind) => series(history, (stats) => (stats.lookups_by_outcome ? (errorsOf(stats)[kind] ?? 0) : null)))
      : [series(history, value)];
    const top = this.#chart.draw(lines.length ? lines : [series(history, value)], now);
    set(this.#top, format(top));
    this.#chart.showCursor(pointed?.at ?? null, now);
    if (pointed) set(this.#note, ago(now - pointed.at));
    else if (kinds) this.#drawKinds(kinds, shown.stats);
    else if (this.#definition.commands) this.#drawCommands(shown.stats);
    else set(this.#note, note?.(shown.stats) ?? "");
  }

  /** The tile's row in the table of all values. */
  summary(history) {
    const { title, unit, value, format } = this.#definition;
    const values = history.map(({ stats }) => value(stats)).filter((one) => one !== null);
    const hasValues = values.length > 0;
    const figures = [
      history.length ? value(history.at(-1).stats) : null,
      hasValues ? Math.min(...values) : null,
      hasValues ? values.reduce((total, one) => total + one, 0) / values.length : null,
      hasValues ? Math.max(...values) : null,
    ];
    const row = element("tr", "");
    const head = element("th", "", `${title}${unit === "/s" ? " per second" : ""}`);
    head.scope = "row";
    row.append(head, ...figures.map((figure) => element("td", "", format(figure))));
    return row;
  }

  #drawKinds(kinds, stats) {
    const errors = errorsOf(stats) ?? {};
    const texts = kinds.map((kind) => `${ERRORS[kind] ?? kind} ${number(errors[kind] ?? 0)}`);
    if (this.#note.dataset.shown === texts.join()) return;
    this.#note.dataset.shown = texts.join();
    this.#note.replaceChildren(...texts.map((text, index) => element("span", `kind kind-${index}`, text)));
    if (!texts.length) this.#note.textContent = stats.lookups_by_outcome ? "none" : "";
  }

  #drawCommands(stats) {
    const hasDeadLetters = stats.dead_letters > 0;
    if (this.#note.dataset.shown === String(hasDeadLetters)) return;
    this.#note.dataset.shown = String(hasDeadLetters);
    this.#note.replaceChildren();
    if (!hasDeadLetters) return;
    for (const command of ["list", "redrive --all"]) this.#note.append(element("code", "", `lastseen dead-letters ${command}`));
  }
}

// Failed lookups per second, by kind; null if unknown.
function errorsOf({ lookups_by_outcome: outcomes }) {
  if (!outcomes) return null;
  return Object.fromEntries(Object.entries(outcomes).filter(([kind]) => kind !== "online" && kind !== "offline"));
}

const sum = (errors) => errors && Object.values(errors).reduce((total, one) => total + one, 0);

// The kinds of errors that occurred, in a fixed order; at most six, because there are six line styles.
function kindsOf(history) {
  const kinds = new Set();
  for (const { stats } of history) {
    for (const [kind, rate] of Object.entries(errorsOf(stats) ?? {})) if (rate > 0) kinds.add(kind);
  }
  return [...Object.keys(ERRORS).filter((kind) => kinds.has(kind)), ...[...kinds].filter((kind) => !(kind in ERRORS))].slice(0, 6);
}

const series = (history, value) => history.map(({ at, stats }) => ({ at, value: value(stats) }));

function nearest(history, at) {
  return history.reduce((best, one) => (!best || Math.abs(one.at - at) < Math.abs(best.at - at) ? one : best), null);
}

function set(target, text) {
  delete target.dataset.shown;
  if (target.textContent !== text) target.textContent = text;
}

function element(name, className, text = "") {
  const created = document.createElement(name);
  if (className) created.className = className;
  created.textContent = text;
  return created;
}
