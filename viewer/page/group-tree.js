// Draws the tree of groups as rows, and makes it usable by pointer, keyboard and screen reader.
//
// The rows are siblings with a level (`aria-level`), so that an update only touches the rows that have changed.
import { reasonOf } from "./groups.js";
import { number, shortTime } from "./format.js";

// The icons of the statuses, the worst first. They differ in shape, because colour alone must not carry the meaning.
const ICONS = { down: "■", degraded: "▲", up: "●" };

export class GroupTree {
  #section;
  #tree;
  #summary;
  #groups;
  #rows = [];
  /** The elements of the rows, by the rows' paths. */
  #elements = new Map();
  #active = "";

  /** Draws `groups` in the `details` element `section`. */
  constructor(section, groups) {
    this.#section = section;
    this.#tree = section.querySelector("[role=tree]");
    this.#summary = section.querySelector("#groups-summary");
    this.#groups = groups;
    section.open = matchMedia("(min-width: 1081px)").matches;
    this.#tree.addEventListener("keydown", (event) => this.#key(event));
    this.#tree.addEventListener("click", (event) => this.#click(event));
    this.#tree.addEventListener("focusin", ({ target }) => this.#activate(target.closest("[role=treeitem]").dataset.path));
  }

  draw() {
    const activeIndex = this.#rows.findIndex(({ path }) => path === this.#active);
    const hadFocus = this.#tree.contains(document.activeElement);
    this.#rows = this.#groups.rows();
    this.#section.hidden = this.#rows.length === 0;
    this.#section.parentElement.classList.toggle("has-groups", this.#rows.length > 0);
    write(this.#summary, this.#summarize());
    this.#place(this.#rows.map((row) => this.#draw(row)));
    // If the row with the focus has disappeared, that in its place gets the focus.
    const isKept = this.#elements.has(this.#active);
    if (!isKept) this.#activate(this.#rows[Math.max(0, Math.min(activeIndex, this.#rows.length - 1))]?.path);
    if (hadFocus && !this.#tree.contains(document.activeElement)) this.#elements.get(this.#active)?.focus();
  }

  // Rows that stay keep their place in the document, because a row that is moved loses the focus.
  #place(elements) {
    const shown = new Set(elements);
    for (const [path, element] of this.#elements) {
      if (shown.has(element)) continue;
      element.remove();
      this.#elements.delete(path);
    }
    let place = this.#tree.firstElementChild;
    for (const element of elements) {
      if (element === place) place = place.nextElementSibling;
      else this.#tree.insertBefore(element, place);
    }
  }

  #draw(row) {
    const { path, group, level, position, size, isExpanded } = row;
    const element = this.#elements.get(path) ?? this.#create(path);
    const [toggle, icon, name, status, detail, reason] = element.children;
    set(element, "aria-level", level);
    set(element, "aria-posinset", position);
    set(element, "aria-setsize", size);
    element.style.setProperty("--level", level - 1);
    if (!group) return element;
    set(element, "aria-selected", path === this.#groups.selected);
    set(element, "aria-expanded", group.groups > 0 ? isExpanded : null);
    set(element, "data-status", group.status);
    write(toggle, group.groups > 0 ? (isExpanded ? "▾" : "▸") : "");
    write(icon, ICONS[group.status] ?? "");
    write(name, group.name);
    write(status, group.status);
    const online = group.total === 0 ? "no objects" : `${number(group.online)} of ${number(group.total)} online`;
    write(detail, `since ${shortTime(group.since)}, ${online}`);
    write(reason, reasonOf(group));
    return element;
  }

  #create(path) {
    const element = document.createElement("li");
    element.setAttribute("role", "treeitem");
    element.dataset.path = path;
    element.tabIndex = path === this.#active ? 0 : -1;
    if (path.endsWith("/")) {
      element.className = "group-more";
      element.textContent = "Show more";
    } else {
      for (const part of ["toggle", "icon", "name", "status", "detail", "reason"]) {
        // The name may be in any script, which must not affect the order of the text around it.
        const child = document.createElement(part === "name" ? "bdi" : "span");
        child.className = `group-${part}`;
        if (part === "toggle" || part === "icon") child.setAttribute("aria-hidden", "true");
        element.append(child, " ");
      }
    }
    this.#elements.set(path, element);
    return element;
  }

  #summarize() {
    const top = this.#rows.filter(({ group, level }) => group && level === 1);
    const counts = Object.keys(ICONS).map((status) => [status, top.filter(({ group }) => group.status === status).length]);
    const texts = counts.filter(([, count]) => count > 0).map(([status, count]) => `${count} ${status}`);
    return [...texts, ...(this.#rows.at(-1)?.more === "" ? ["more not shown"] : [])].join(", ");
  }

  // Only one row is in the order of the tab key.
  #activate(path = "") {
    for (const [some, tabIndex] of [[this.#active, -1], [path, 0]]) {
      const element = this.#elements.get(some);
      if (element) element.tabIndex = tabIndex;
    }
    this.#active = path;
  }

  #choose({ path, more }) {
    if (more === undefined) this.#groups.select(path);
    else this.#groups.showMore(more);
  }

  #click({ target }) {
    const path = target.closest("[role=treeitem]")?.dataset.path;
    const row = this.#rows.find((row) => row.path === path);
    if (!row) return;
    if (target.closest(".group-toggle") && row.group.groups > 0) this.#groups.expand(path, !row.isExpanded);
    else this.#choose(row);
  }

  #key(event) {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const index = this.#rows.findIndex(({ path }) => path === this.#active);
    const row = this.#rows[index];
    if (!row) return;
    const hasChildren = row.group?.groups > 0;
    const focus = (goal) => this.#elements.get(this.#rows[goal]?.path)?.focus();
    const act = {
      ArrowDown: () => focus(index + 1),
      ArrowUp: () => focus(index - 1),
      Home: () => focus(0),
      End: () => focus(this.#rows.length - 1),
      ArrowRight: () => hasChildren && (row.isExpanded ? focus(index + 1) : this.#groups.expand(row.path, true)),
      ArrowLeft: () => {
        if (hasChildren && row.isExpanded) this.#groups.expand(row.path, false);
        else focus(this.#rows.findLastIndex(({ level }, above) => above < index && level < row.level));
      },
      Enter: () => this.#choose(row),
      " ": () => this.#choose(row),
    }[event.key];
    if (!act) return;
    event.preventDefault();
    act();
  }
}

function set(element, name, value) {
  if (value === null) element.removeAttribute(name);
  else if (element.getAttribute(name) !== String(value)) element.setAttribute(name, value);
}

function write(element, text) {
  if (element.textContent !== text) element.textContent = text;
}
