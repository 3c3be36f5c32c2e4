// One stream for all tabs of a browser, in a SharedWorker: a browser opens at most six connections to a host, so with
// one stream for each tab the seventh tab would stay blank.
// Decision: docs/decisions/0055-why-do-all-tabs-of-a-browser-share-one-stream.md
import { Feed } from "./feed.js";

const tabs = new Set();
const objects = new Map();
let isOpen = false;
let isLimited = false;

const feed = new Feed({
  open(limited) {
    isOpen = true;
    isLimited = limited;
    send(["open", isLimited]);
  },
  lost() {
    isOpen = false;
    send(["lost"]);
  },
  change(kind, changed) {
    if (kind === "snapshot") objects.clear();
    for (const { id, at } of changed) {
      if (kind === "gone") objects.delete(id);
      else objects.set(id, at);
    }
    send(["change", kind, changed]);
  },
});

addEventListener("connect", ({ ports: [tab] }) => {
  tab.onmessage = ({ data }) => {
    if (data === "renew") feed.renew();
    if (data === "leave") tabs.delete(tab);
    if (data === "join") {
      tabs.add(tab);
      if (!isOpen) return tab.postMessage(["silent", feed.silence]);
      tab.postMessage(["change", "snapshot", [...objects].map(([id, at]) => ({ id, at }))]);
      tab.postMessage(["open", isLimited]);
    }
  };
});

function send(message) {
  for (const tab of tabs) tab.postMessage(message);
}
