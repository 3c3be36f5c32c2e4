// What the viewer sends, as the page reads it: ids are strings, since a JavaScript number holds 53 of their 64 bits, and
// times are milliseconds since 1970.

/** Where the viewer serves `path`, also if a proxy serves the viewer under a path of its own. */
export function address(path) {
  return new URL(`../${path}`, import.meta.url).href;
}

/** An event as `{objects, remaining}`, where objects are `{id, at}`. */
export function parse(text) {
  const { objects, remaining } = JSON.parse(text);
  return { objects: objects.map(({ id, last_seen }) => ({ id, at: Date.parse(last_seen) })), remaining };
}

/** The object `id` as `{id, at, sightings}`, or null where there is none. */
export async function fetchObject(id, signal) {
  const response = await fetch(address(`objects/${id}`), { signal: AbortSignal.any([signal, AbortSignal.timeout(5000)]) });
  if (response.status === 404) return null;
  if (!response.ok) throw new Error(`the viewer answered ${response.status}`);
  const object = await response.json();
  return { id: object.id, at: Date.parse(object.last_seen), sightings: object.sightings.map((at) => Date.parse(at)) };
}

// 64-bit integers, from both ends.
const LEAST = -(2n ** 63n);
const GREATEST = 2n ** 63n - 1n;

/** What a person typed, as an id in its only spelling, or null if it is none. */
export function readId(text) {
  const typed = text.trim();
  if (!/^-?\d{1,19}$/.test(typed)) return null;
  const id = BigInt(typed);
  return id < LEAST || id > GREATEST ? null : String(id);
}
