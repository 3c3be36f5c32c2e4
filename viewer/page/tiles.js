// The numbers of the pipeline: a tile with a chart for each, and the same as a table.
import { Chart } from "./chart.js";
import { KEPT_MS } from "./stats.js";
import { ago, duration, number, UNKNOWN } from "./format.js";

const ERRORS = {
  timeout: "timed out",
  transport: "no connection",
  throttled: "asked to wait",
  status: "answered an error",
  garbage: "unreadable answer",
  wrong_id: "answered another id",
};
const BREAKER = ["asked freely", "opening up again", "paused as it asked", "away, probed only"];

const text = (value) => number(value);
const plain = (key) => (stats) => stats[key] ?? null;

// `value` takes the number out of the stats, `beside` says what belongs to it, `alarm` whether to mark it.
const TILES = [
  {
    title: "Callbacks", unit: "/s", value: plain("callbacks_per_second"), write: text,
    beside: (stats) => `${number(stats.ids_per_second)} ids/s`,
  },
  {
    title: "Queue", unit: "messages", value: plain("queue_messages"), write: text,
    beside: (stats) => (stats.spool_messages > 0 ? `and ${number(stats.spool_messages)} in the spool` : ""),
    alarm: (stats) => stats.spool_messages > 0,
  },
  {
    title: "Oldest message", unit: "", value: plain("oldest_message_age_seconds"), write: duration,
  },
  {
    title: "Lookups", unit: "/s", value: plain("lookups_per_second"), write: text,
    beside: (stats) => {
      const { online, offline } = stats.lookups_by_outcome ?? {};
      return `${number(online)} online, ${number(offline)} offline`;
    },
  },
  {
    title: "Lookups in flight", unit: "", value: plain("lookups_in_flight"), write: text,
    beside: (stats) => (stats.breaker_state > 0 ? `status API: ${BREAKER[stats.breaker_state] ?? UNKNOWN}` : ""),
    alarm: (stats) => stats.breaker_state > 0,
  },
  {
    title: "Lookup errors", unit: "/s", value: (stats) => sum(errorsOf(stats)), write: text, kinds: true,
    alarm: (stats) => sum(errorsOf(stats)) > 0,
  },
  {
    title: "Dead letters", unit: "", value: plain("dead_letters"), write: text, commands: true,
    alarm: (stats) => stats.dead_letters > 0,
  },
];

/** Keeps the tiles in `place` and the rows in `summary` up to date with a history of stats. */
export class Tiles {
  #history;
  #tiles;
  #services = element("dl", "services");
  #summary;
  #pointed = null;

  constructor(place, summary, history) {
    this.#history = history;
    this.#summary = summary;
    this.#tiles = TILES.map((about) => new Tile(about, (share) => this.#point(share)));
    const services = element("section", "tile");
    services.append(element("h3", "tile-title", "Services"), this.#services);
    place.append(...this.#tiles.map((tile) => tile.element), services);
    summary.closest("details").addEventListener("toggle", () => this.draw());
  }

  draw(now = Date.now()) {
    const history = this.#history();
    const pointed = this.#pointed === null ? null : nearest(history, now - KEPT_MS * (1 - this.#pointed));
    for (const tile of this.#tiles) tile.draw(history, pointed, now);
    const latest = history.at(-1)?.stats;
    if (latest) this.#drawServices(latest);
    if (this.#summary.closest("details").open) {
      this.#summary.replaceChildren(...this.#tiles.map((tile) => tile.summary(history)));
    }
  }

  // All charts have the same five minutes, so a look at one moment is a look at that moment of all.
  #point(share) {
    this.#pointed = share;
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
    this.#services.replaceChildren(...rows.map(([name, words, alarm]) => {
      const row = element("div", alarm ? "alarm" : "");
      row.append(element("dt", "", name), element("dd", "", words));
      return row;
    }));
  }
}

class Tile {
  element = element("section", "tile");
  #about;
  #chart = new Chart();
  #now = element("span", "tile-number", UNKNOWN);
  #unit = element("span", "tile-unit");
  #top = element("span", "chart-top");
  #beside = element("p", "tile-beside");

  constructor(about, point) {
    this.#about = about;
    this.element.classList.toggle("kinds", Boolean(about.kinds));
    const figure = element("p", "tile-figure");
    figure.append(this.#now, " ", this.#unit);
    this.#unit.textContent = about.unit;
    const frame = element("div", "chart-frame");
    frame.append(this.#chart.element, this.#top);
    frame.addEventListener("pointermove", (event) => {
      const box = frame.getBoundingClientRect();
      point(Math.min(1, Math.max(0, (event.clientX - box.left) / box.width)));
    });
    for (const end of ["pointerleave", "pointercancel"]) frame.addEventListener(end, () => point(null));
    const head = element("div", "tile-head");
    head.append(element("h3", "tile-title", about.title), figure);
    this.element.append(head, frame, this.#beside);
  }

  /** `pointed` is the moment that a person looks at, if not the last. */
  draw(history, pointed, now) {
    const shown = pointed ?? history.at(-1);
    if (!shown) return;
    const { value, write, beside, alarm } = this.#about;
    set(this.#now, write(value(shown.stats)));
    this.element.classList.toggle("alarm", Boolean(alarm?.(shown.stats)));
    this.element.classList.toggle("pointed", pointed !== null);
    const kinds = this.#about.kinds ? kindsOf(history) : null;
    const lines = kinds
      ? kinds.map((kind) => series(history, (stats) => (stats.lookups_by_outcome ? (errorsOf(stats)[kind] ?? 0) : null)))
      : [series(history, value)];
    const top = this.#chart.draw(lines.length ? lines : [series(history, value)], now);
    set(this.#top, write(top));
    this.#chart.point(pointed?.at ?? null, now);
    if (pointed) set(this.#beside, ago(now - pointed.at));
    else if (kinds) this.#drawKinds(kinds, shown.stats);
    else if (this.#about.commands) this.#drawCommands(shown.stats);
    else set(this.#beside, beside?.(shown.stats) ?? "");
  }

  /** A row of the table. */
  summary(history) {
    const { title, unit, value, write } = this.#about;
    const values = history.map(({ stats }) => value(stats)).filter((one) => one !== null);
    const some = values.length > 0;
    const figures = [
      history.length ? value(history.at(-1).stats) : null,
      some ? Math.min(...values) : null,
      some ? values.reduce((all, one) => all + one, 0) / values.length : null,
      some ? Math.max(...values) : null,
    ];
    const row = element("tr", "");
    const head = element("th", "", `${title}${unit === "/s" ? " per second" : ""}`);
    head.scope = "row";
    row.append(head, ...figures.map((figure) => element("td", "", write(figure))));
    return row;
  }

  #drawKinds(kinds, stats) {
    const errors = errorsOf(stats) ?? {};
    const words = kinds.map((kind) => `${ERRORS[kind] ?? kind} ${number(errors[kind] ?? 0)}`);
    if (this.#beside.dataset.words === words.join()) return;
    this.#beside.dataset.words = words.join();
    this.#beside.replaceChildren(...words.map((word, at) => element("span", `kind kind-${at}`, word)));
    if (!words.length) this.#beside.textContent = stats.lookups_by_outcome ? "none" : "";
  }

  #drawCommands(stats) {
    const some = stats.dead_letters > 0;
    if (this.#beside.dataset.words === String(some)) return;
    this.#beside.dataset.words = String(some);
    this.#beside.replaceChildren();
    if (!some) return;
    for (const command of ["list", "redrive --all"]) this.#beside.append(element("code", "", `lastseen dead-letters ${command}`));
  }
}

// What came out of lookups besides an answer, per second by kind; null if it is not known.
function errorsOf({ lookups_by_outcome: outcomes }) {
  if (!outcomes) return null;
  return Object.fromEntries(Object.entries(outcomes).filter(([kind]) => kind !== "online" && kind !== "offline"));
}

const sum = (errors) => errors && Object.values(errors).reduce((all, one) => all + one, 0);

// The kinds that occurred, in an order that stays; there are four colours.
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

function set(place, words) {
  delete place.dataset.words;
  if (place.textContent !== words) place.textContent = words;
}

function element(name, style, words = "") {
  const made = document.createElement(name);
  if (style) made.className = style;
  made.textContent = words;
  return made;
}
