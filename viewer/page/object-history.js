// The history of one object: a bar of its last 24 hours, and a table of its latest sessions.
import { fetchAvailability, fetchSessions } from "./api.js";
import { UNKNOWN, duration, number, share, shortTime } from "./format.js";

const DAY_MS = 86_400_000;
const ROWS_MAX = 10;
const BAR_SESSIONS_MAX = 1000;
// The bar's SVG is as wide as a day has minutes.
const MINUTE_MS = 60_000;
const WIDTH = DAY_MS / MINUTE_MS;
// Shorter sessions, and shorter gaps between sessions that are not short, are drawn with this width. Otherwise they
// would be thinner than a pixel.
const WIDTH_MIN = 6;
// After a change, the page waits a moment for further ones. Between two requests it waits longer.
const SETTLE_MS = 300;
const INTERVAL_MIN_MS = 3000;
const REFRESH_MS = 60_000;
const RETRY_MS = 10_000;

const element = (id) => document.getElementById(id);

export class ObjectHistory {
  #onLoad;
  #id = null;
  /** What was fetched last; null if there is nothing to show. */
  #loaded = null;
  #request = new AbortController();
  #isLoading = false;
  #isStale = false;
  #startedAt = 0;
  #timer = 0;
  #drawn = "";

  /** Calls `onLoad(goneAt)` with the time since when the object is gone; null if it is online or that is not known. */
  constructor(onLoad) {
    this.#onLoad = onLoad;
  }

  /** Shows the history of the object `id`, or nothing if `id` is null. */
  show(id) {
    this.#request.abort();
    clearTimeout(this.#timer);
    this.#id = id;
    this.#loaded = null;
    this.#isStale = false;
    if (id !== null) this.#load();
  }

  /** Fetches the history again soon, because it has changed. */
  reload() {
    this.#isStale = true;
    if (!this.#isLoading) this.#loadIn(SETTLE_MS);
  }

  #loadIn(milliseconds) {
    const earliest = this.#startedAt + INTERVAL_MIN_MS - performance.now();
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#load(), Math.max(milliseconds, earliest));
  }

  async #load() {
    const request = new AbortController();
    this.#request = request;
    this.#isLoading = true;
    this.#isStale = false;
    this.#startedAt = performance.now();
    let next = REFRESH_MS;
    try {
      const loaded = await fetchHistory(this.#id, request.signal);
      if (request.signal.aborted) return;
      this.#loaded = loaded;
      this.#drawn = "";
      if (loaded) this.#onLoad(loaded.sessions[0].goneAt);
      else next = null;
    } catch {
      if (request.signal.aborted) return;
      // The page keeps the last values. Half of the wait is random, so that many pages do not retry at the same moment.
      next = RETRY_MS * (0.5 + Math.random() / 2);
    }
    this.#isLoading = false;
    if (this.#isStale) this.#loadIn(SETTLE_MS);
    else if (next !== null) this.#loadIn(next);
  }

  /** Shows the history at the time `now`. If the latest session has no end, it ends at `seenAt` if the object `isGone`. */
  draw(isGone, seenAt, now) {
    element("history").hidden = this.#loaded === null;
    if (this.#loaded === null) return;
    this.#drawRows(isGone, now);
    // The bar is redrawn once per minute, because it moves by a pixel in several minutes.
    const state = `${isGone} ${Math.floor(now / MINUTE_MS)}`;
    if (state === this.#drawn) return;
    this.#drawn = state;
    this.#drawBar(isGone ? seenAt : now, now);
    const label = this.#label();
    element("day").setAttribute("aria-label", label);
    element("day-text").textContent = label;
    element("day-start").textContent = shortTime(now - DAY_MS, now);
  }

  #drawRows(isGone, now) {
    const rows = this.#loaded.sessions.slice(0, ROWS_MAX).map(({ onlineAt, goneAt }) => {
      const isRunning = goneAt === null && !isGone;
      const end = isRunning ? now : goneAt;
      return [
        onlineAt === null ? UNKNOWN : shortTime(onlineAt, now),
        isRunning ? "still online" : goneAt === null ? UNKNOWN : shortTime(goneAt, now),
        onlineAt === null || end === null ? UNKNOWN : duration(Math.max(0, end - onlineAt) / 1000),
      ];
    });
    // Cells stay in the document, because a screen reader may be reading one.
    const body = element("sessions-rows");
    while (body.rows.length > rows.length) body.deleteRow(-1);
    rows.forEach((texts, index) => {
      const row = body.rows[index] ?? body.insertRow();
      texts.forEach((text, column) => {
        const cell = row.cells[column] ?? row.insertCell();
        if (cell.textContent !== text) cell.textContent = text;
      });
    });
  }

  #drawBar(openEnd, now) {
    const { sessions, since } = this.#loaded;
    const toX = (at) => Math.min(WIDTH, Math.max(0, WIDTH - (now - at) / MINUTE_MS));
    // If the beginning of a session is not known, it is drawn from the end of the session before.
    const spans = sessions.map(({ onlineAt, goneAt }, index) => ({
      from: toX(onlineAt ?? Math.max(since, sessions[index + 1]?.goneAt ?? since)),
      to: toX(goneAt ?? openEnd),
    }));
    const shown = spans.filter(({ to }) => to > 0);
    const known = toX(since);
    element("day-known").setAttribute("x", known);
    element("day-known").setAttribute("width", WIDTH - known);
    element("day-online").setAttribute("d", shown.map(({ from, to }) => box(from, to)).join(""));
    const gaps = shown.slice(1).map(({ to }, index) => ({ from: to, to: shown[index].from, sides: [shown[index], shown[index + 1]] }));
    const clear = gaps.filter(({ sides }) => sides.every(({ from, to }) => to - from > 2 * WIDTH_MIN));
    element("day-gaps").setAttribute("d", clear.map(({ from, to }) => box(from, to)).join(""));
  }

  #label() {
    const { availability, sessions, isPartial } = this.#loaded;
    const { since, until, ratio, count } = availability;
    const isWhole = until - since > DAY_MS - 1000;
    const period = isWhole ? "last 24 hours" : `last ${duration((until - since) / 1000)}`;
    const parts = [`Online ${share(ratio)} of the ${period}, in ${number(count)} ${count === 1 ? "session" : "sessions"}.`];
    if (count === 0) parts[0] = `Not online in the ${period}.`;
    if (isPartial) parts.push(`The bar shows the latest ${number(sessions.length)} of them.`);
    if (!isWhole) parts.push("The striped part of the bar is older than the history.");
    return parts.join(" ");
  }
}

/**
 * Fetches the sessions of the table and those of the last 24 hours, newest first, one request after the other. Returns
 * null if there is no history or no session. Nothing is known about the time before `since`.
 */
async function fetchHistory(id, signal) {
  const latest = await fetchSessions(id, { limit: ROWS_MAX }, signal);
  if (!latest?.sessions.length) return null;
  const availability = await fetchAvailability(id, signal);
  if (!availability) return null;
  const { sessions, next } = latest;
  const { since } = availability;
  if (next === null || sessions.at(-1).onlineAt <= since) return { sessions, availability, since, isPartial: false };
  const query = { after: next, since: new Date(since).toISOString(), limit: BAR_SESSIONS_MAX - ROWS_MAX };
  const rest = await fetchSessions(id, query, signal);
  if (!rest) return null;
  sessions.push(...rest.sessions);
  const isPartial = rest.next !== null;
  return { sessions, availability, since: isPartial ? (sessions.at(-1).onlineAt ?? since) : since, isPartial };
}

// A box around the middle of the given one, if that is too narrow to see.
function box(from, to) {
  const width = Math.max(WIDTH_MIN, to - from);
  const left = Math.min(WIDTH - width, Math.max(0, (from + to - width) / 2));
  return `M${left.toFixed(2)} 0h${width.toFixed(2)}v1h-${width.toFixed(2)}z`;
}
