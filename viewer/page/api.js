// Reads the viewer's API. Ids are strings, because a JavaScript number holds only 53 of their 64 bits. Times are
// milliseconds since 1970.

/** The URL of `path` on the viewer, also behind a proxy that serves the viewer under another path. */
export function address(path) {
  return new URL(`../${path}`, import.meta.url).href;
}

/** Parses an event into `{objects, remaining}`. Each object is `{id, at}`, where `at` is its `last_seen`. */
export function parse(text) {
  const { objects, remaining } = JSON.parse(text);
  return { objects: objects.map(({ id, last_seen }) => ({ id, at: Date.parse(last_seen) })), remaining };
}

/** Fetches the object `id` as `{id, isOnline, at, goneAt, sightings}`; null if it is neither online nor in the history. */
export async function fetchObject(id, signal) {
  const object = await fetchJson(`objects/${id}`, signal);
  if (!object) return null;
  const { online, last_seen, gone_at, sightings } = object;
  return { id: object.id, isOnline: online, at: Date.parse(last_seen), goneAt: time(gone_at), sightings: sightings.map(time) };
}

/**
 * Fetches the sessions of the object `id` as `{sessions, next}`, newest first; null if the viewer has no history. Each
 * session is `{onlineAt, goneAt}`, with null for a time that is not in the history. `query` has the API's parameters.
 */
export async function fetchSessions(id, query, signal) {
  const page = await fetchJson(`objects/${id}/sessions?${new URLSearchParams(query)}`, signal);
  if (!page) return null;
  const sessions = page.sessions.map(({ online_at, gone_at }) => ({ onlineAt: time(online_at), goneAt: time(gone_at) }));
  return { sessions, next: page.next };
}

/** Fetches how long the object `id` was online in the last 24 hours as `{since, until, ratio, count}`; `count` is the number of sessions. */
export async function fetchAvailability(id, signal) {
  const availability = await fetchJson(`objects/${id}/availability?window=24h`, signal);
  if (!availability) return null;
  const { since, until, ratio, sessions } = availability;
  return { since: time(since), until: time(until), ratio, count: sessions };
}

/** Encodes the path of a group for a URL. Names contain no "/", so it only separates them. */
export const encodePath = (path) => path.split("/").map(encodeURIComponent).join("/");

/**
 * Fetches the groups below the group `path`, after the group itself, or those at the top if `path` is "", as
 * `{groups, next}`; null if the viewer has no such group, or no groups at all. `query` has the API's parameters.
 */
export async function fetchGroups(path, query) {
  const page = await fetchJson(`groups${path && "/"}${encodePath(path)}?${new URLSearchParams(query)}`);
  return page && { groups: page.groups.map((group) => ({ ...group, since: time(group.since) })), next: page.next };
}

async function fetchJson(path, signal) {
  const signals = [AbortSignal.timeout(5000), ...(signal ? [signal] : [])];
  const response = await fetch(address(path), { signal: AbortSignal.any(signals) });
  if (response.status === 404) return null;
  if (!response.ok) throw new Error(`the viewer answered ${response.status}`);
  return response.json();
}

const time = (text) => (text === null ? null : Date.parse(text));

// The range of 64-bit integers.
const ID_MIN = -(2n ** 63n);
const ID_MAX = 2n ** 63n - 1n;

/** Parses an id that a person typed, and returns its canonical spelling; null if it is invalid. */
export function parseId(text) {
  const typed = text.trim();
  if (!/^-?\d{1,19}$/.test(typed)) return null;
  const id = BigInt(typed);
  return id < ID_MIN || id > ID_MAX ? null : String(id);
}
