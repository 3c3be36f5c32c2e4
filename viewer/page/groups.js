// The tree of groups, as far as the page shows it, and the selected group.
import { fetchGroups } from "./api.js";

// Number of groups by which a list grows, and the most that the viewer returns in a response.
const PAGE_GROUPS = 100;
const LIMIT_MAX = 1000;
// Events carry only changes of a status, so the page reads the shown groups again when an object has come or gone.
const BETWEEN_READS_MS = 2000;
// No event reports that the definition of the groups has changed.
const READ_AGAIN_MS = 30_000;
// Maximum number of groups in an announcement.
const ANNOUNCED_MAX = 3;

const KINDS = {
  online: "is online",
  late: "is late",
  maintenance: "is in maintenance",
  never_seen: "was never seen",
  given_up: "was given up",
  gone: "is gone",
};

export class Groups {
  /** The path of the selected group, or "" if the page shows all objects. */
  selected = "";
  #now;
  #on;
  #areAvailable = null;
  #wanted = "";
  /** The lists of shown children by their parent's path; that of the groups at the top has the path "". */
  #lists = new Map();
  #byPath = new Map();
  /** Groups whose status has changed since the page announced it, by path; only the selected one and those at the top. */
  #unannounced = new Map();
  #needsDrawing = false;
  #isReading = false;
  #needsReading = true;
  #readAt = -Infinity;

  /**
   * `now` returns the viewer's time. Calls `on.draw()` when the shown groups have changed, `on.select(path)` when
   * another group is selected, `on.unknown(path)` if the selected group does not exist, and `on.announce(text)` when the
   * status of the selected group or of one at the top has changed.
   */
  constructor(now, on) {
    this.#now = now;
    this.#on = on;
    this.#open("");
    this.#readAll();
  }

  /** The path of the group that is selected, or will be once the page knows that the viewer has groups. */
  get wanted() {
    return this.#areAvailable === false ? "" : this.#wanted;
  }

  /** The number of online objects of the selected group; null if unknown. */
  get online() {
    return this.#byPath.get(this.selected)?.online ?? null;
  }

  /** Shows only the objects of the group `path`, or all objects if it is "". */
  select(path) {
    this.#wanted = path;
    if (!this.#areAvailable || path === this.selected) return;
    this.selected = path;
    for (let end = path.indexOf("/"); end >= 0; end = path.indexOf("/", end + 1)) this.#open(path.slice(0, end));
    this.#on.select(path);
    this.#show();
    this.readSoon(true);
  }

  /** Shows the children of the group `path`, or hides them and all groups below. */
  async expand(path, isExpanded) {
    if (isExpanded) this.#open(path);
    for (const below of isExpanded ? [] : [...this.#lists.keys()]) {
      if (below === path || below.startsWith(`${path}/`)) this.#lists.delete(below);
    }
    await this.#readAndShow(path);
  }

  async showMore(path) {
    this.#lists.get(path).wanted += PAGE_GROUPS;
    await this.#readAndShow(path);
  }

  /** The shown rows from top to bottom: each is a group, or shows more groups of the list `more`. */
  rows(path = "", level = 1) {
    const list = this.#lists.get(path);
    if (!list) return [];
    const size = list.next === null ? list.groups.length : -1;
    const rows = list.groups.flatMap((group, index) => [
      { path: group.path, group, level, position: index + 1, size, isExpanded: this.#lists.has(group.path) },
      ...this.rows(group.path, level + 1),
    ]);
    const more = { path: `${path}/`, more: path, level, position: list.groups.length + 1, size };
    return list.next === null ? rows : [...rows, more];
  }

  /** Applies changes of statuses from the stream. */
  apply(changes) {
    for (const { was, is, ...change } of changes) {
      const group = this.#byPath.get(change.path) ?? { path: change.path, status: was };
      if (group.status !== is) {
        Object.assign(group, { status: is, since: this.#now() });
        this.#announceLater(group);
      }
      // A response that is under way may be older than this change.
      Object.assign(group, change, { changedAt: performance.now() });
    }
    this.#needsDrawing = true;
    this.readSoon();
  }

  /** Reads the shown groups again, at most every 2 s, or at once after the page may have missed changes. */
  readSoon(atOnce = false) {
    this.#needsReading = true;
    if (atOnce) this.#readAt = -Infinity;
  }

  /** Shows changes from the stream, and reads the shown groups again if they may have changed. */
  tick() {
    if (this.#areAvailable === false || document.hidden) return;
    if (this.#needsDrawing) this.#show();
    if (this.#isReading) return;
    // The stream of a group does not report changes of other groups.
    const needsReading = this.#needsReading || this.selected !== "";
    if (performance.now() - this.#readAt > (needsReading ? BETWEEN_READS_MS : READ_AGAIN_MS)) this.#readAll();
  }

  #open(path) {
    if (!this.#lists.has(path)) this.#lists.set(path, { groups: [], next: null, wanted: PAGE_GROUPS });
  }

  async #readAll() {
    this.#isReading = true;
    this.#needsReading = false;
    this.#readAt = performance.now();
    try {
      await this.#readSelected();
      for (const path of [...this.#lists.keys()]) await this.#read(path);
    } catch {
      this.#needsReading = true;
    }
    this.#isReading = false;
    this.#show();
    if (this.#areAvailable) this.select(this.#wanted);
  }

  async #readAndShow(path) {
    this.#show();
    try {
      await this.#read(path);
    } catch {
      this.readSoon();
    }
    this.#show();
  }

  // The selected group may be below groups that are not shown.
  async #readSelected() {
    const path = this.selected;
    if (!path) return;
    const sentAt = performance.now();
    const response = await fetchGroups(path, { depth: 1, limit: 1 });
    if (path !== this.selected) return;
    if (response) this.#keep(response.groups[0], sentAt);
    else this.#on.unknown(path);
  }

  async #read(path) {
    const list = this.#lists.get(path);
    if (!list) return;
    const sentAt = performance.now();
    const groups = [];
    let next = null;
    do {
      // The list of a group's children begins with the group.
      const limit = Math.min(LIMIT_MAX, list.wanted - groups.length + (path && next === null ? 1 : 0));
      const response = await fetchGroups(path, { depth: 1, limit, ...(next !== null && { after: next }) });
      if (!response && next !== null) throw new Error(`the group ${next} was removed while the page read the groups after it`);
      if (path === "") this.#areAvailable = response !== null;
      if (!response) {
        list.groups = [];
        if (path) this.#lists.delete(path);
        return;
      }
      groups.push(...response.groups.filter((group) => parentOf(group.path) === path));
      next = response.next;
    } while (next !== null && groups.length < list.wanted);
    list.groups = groups.map((group) => this.#keep(group, sentAt));
    list.next = next;
    this.#forgetHidden();
  }

  /** Keeps a group from a response to a request of the time `sentAt`, unless the stream sent a later change. */
  #keep(group, sentAt) {
    const known = this.#byPath.get(group.path);
    if (known?.changedAt > sentAt) return known;
    if (known && known.status !== group.status) this.#announceLater(group);
    this.#byPath.set(group.path, group);
    return group;
  }

  #forgetHidden() {
    const selected = this.#byPath.get(this.selected);
    const shown = [...this.#lists.values()].flatMap(({ groups }) => groups);
    this.#byPath = new Map((selected ? [selected, ...shown] : shown).map((group) => [group.path, group]));
  }

  #announceLater(group) {
    if (group.path === this.selected || parentOf(group.path) === "") this.#unannounced.set(group.path, group);
  }

  #show() {
    this.#needsDrawing = false;
    this.#on.draw();
    if (this.#unannounced.size === 0) return;
    const texts = [...this.#unannounced.values()].map((group) => [`${group.path} is ${group.status}`, reasonOf(group)].filter(Boolean).join(": "));
    const rest = texts.splice(ANNOUNCED_MAX).length;
    this.#on.announce([...texts, ...(rest ? [`${rest} more groups have changed`] : [])].join(". "));
    this.#unannounced.clear();
  }
}

/** Why the group is not up, such as "142 in berlin is gone"; "" if it is up. */
export function reasonOf({ path, status, because }) {
  if (status === "up" || !because) return "";
  const place = because.path.slice(path.length + 1);
  if (because.object === null) return place && `${place} is not up`;
  return `${because.object}${place && ` in ${place}`} ${KINDS[because.kind] ?? because.kind}`;
}

const parentOf = (path) => path.slice(0, Math.max(0, path.lastIndexOf("/")));
