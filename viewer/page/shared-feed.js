// One stream for all tabs of a browser that show the same group, in a SharedWorker: a browser opens at most six
// connections to a host, so with one stream for each tab the seventh tab would stay blank.
// Decision: docs/decisions/0055-why-do-all-tabs-of-a-browser-share-one-stream.md
import { Feed } from "./feed.js";

// Maximum number of groups that are followed at once. With the stream of all objects, they leave one of the six
// connections for other requests.
const GROUPS_MAX = 4;

/** The feeds by group; that of all objects has the key "". */
const feeds = new Map();

class SharedFeed {
  #group;
  #feed;
  #tabs = new Set();
  #objects = new Map();
  #isOpen = false;
  #isLimited = false;

  constructor(group) {
    this.#group = group;
    this.#feed = new Feed({
      open: (limited) => {
        this.#isOpen = true;
        this.#isLimited = limited;
        this.#send("open", limited);
      },
      lost: () => {
        this.#isOpen = false;
        this.#send("lost");
      },
      change: (kind, changed) => {
        if (kind === "snapshot") this.#objects.clear();
        for (const { id, at } of changed) {
          if (kind === "gone") this.#objects.delete(id);
          else this.#objects.set(id, at);
        }
        this.#send("change", kind, changed);
      },
      groups: (changes) => this.#send("groups", changes),
    }, group);
  }

  renew() {
    this.#feed.renew();
  }

  join(tab) {
    this.#tabs.add(tab);
    if (!this.#isOpen) return tab.postMessage([this.#group, "silent", this.#feed.silence]);
    const objects = [...this.#objects].map(([id, at]) => ({ id, at }));
    tab.postMessage([this.#group, "change", "snapshot", objects]);
    tab.postMessage([this.#group, "open", this.#isLimited]);
  }

  leave(tab) {
    this.#tabs.delete(tab);
    if (this.#tabs.size > 0) return;
    this.#feed.close();
    feeds.delete(this.#group);
  }

  #send(...message) {
    for (const tab of this.#tabs) tab.postMessage([this.#group, ...message]);
  }
}

addEventListener("connect", ({ ports: [tab] }) => {
  let joined = null;
  tab.onmessage = ({ data: [command, group] }) => {
    if (command === "renew") return joined?.renew();
    joined?.leave(tab);
    joined = command === "join" ? feedOf(group) : null;
    if (joined) joined.join(tab);
    else if (command === "join") tab.postMessage([group, "refused"]);
  };
});

/** The feed of `group`, or null if too many other groups are followed. */
function feedOf(group) {
  if (!feeds.has(group)) {
    if (group && feeds.size - feeds.has("") >= GROUPS_MAX) return null;
    feeds.set(group, new SharedFeed(group));
  }
  return feeds.get(group);
}
