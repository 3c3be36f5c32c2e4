// The fragment of the page's URL contains the selected group and the shown object, so that a person can share the URL
// and a reload shows the same: `#42`, `#shop/berlin` or `#shop/berlin:42`. Names are percent-encoded. A group whose name
// is a number has a colon, such as `#42:`, because `#42` is an object.
import { encodePath, parseId } from "./api.js";

/** Reads `{group, id}`; `group` is "" for all objects, and `id` is null for no object. */
export function readFragment() {
  const text = location.hash.slice(1);
  const id = parseId(text);
  if (id !== null) return { group: "", id };
  const [, path, object = ""] = text.match(/^(.*?)(?::(-?\d*))?$/);
  try {
    return { group: decodeURIComponent(path), id: parseId(object) };
  } catch {
    return { group: "", id: null };
  }
}

export function writeFragment(group, id) {
  const path = encodePath(group);
  const separator = group && (id !== null || parseId(path) !== null) ? ":" : "";
  const fragment = path + separator + (id ?? "");
  history.replaceState(null, "", fragment ? `#${fragment}` : location.pathname);
}
