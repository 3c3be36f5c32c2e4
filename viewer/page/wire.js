// What the viewer sends, as the page reads it: ids as text, times as milliseconds since 1970.

// Ids are 64-bit integers, and a JavaScript number holds 53 bits: 9007199254740993 would be read as its
// neighbour. No other text of these answers can hold `"id":`, since they are made of ids and times only.
const ID = /"id":\s*(-?\d+)/g;

/** Parses an answer about objects; `id` becomes text. */
export function parse(text) {
  return JSON.parse(text.replace(ID, '"id":"$1"'));
}

/** The objects of an event or an answer, as `{id, at}`. */
export function objects(text) {
  return parse(text).objects.map(({ id, last_seen }) => ({ id, at: Date.parse(last_seen) }));
}

/** The object `id` as `{id, at, sightings}`, or null where there is none. */
export async function fetchObject(id, signal) {
  const response = await fetch(`/objects/${id}`, { signal: AbortSignal.any([signal, AbortSignal.timeout(5000)]) });
  if (response.status === 404) return null;
  if (!response.ok) throw new Error(`the viewer answered ${response.status}`);
  const object = parse(await response.text());
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
