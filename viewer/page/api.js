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

/** Fetches the object `id` as `{id, online, at, sightings}`; null if it is neither online nor in the history. */
export async function fetchObject(id, signal) {
  const response = await fetch(address(`objects/${id}`), { signal: AbortSignal.any([signal, AbortSignal.timeout(5000)]) });
  if (response.status === 404) return null;
  if (!response.ok) throw new Error(`the viewer answered ${response.status}`);
  const object = await response.json();
  const sightings = object.sightings.map((at) => Date.parse(at));
  return { id: object.id, online: object.online, at: Date.parse(object.last_seen), sightings };
}

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
