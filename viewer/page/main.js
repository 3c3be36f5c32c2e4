// The live page: connects its parts, and shows whether its content is up to date.
import { FieldInput } from "./field-input.js";
import { Field } from "./field.js";
import { readFragment, writeFragment } from "./fragment.js";
import { GroupTree } from "./group-tree.js";
import { Groups } from "./groups.js";
import { RecentChanges } from "./recent-changes.js";
import { ObjectPanel } from "./object.js";
import { Presence } from "./presence.js";
import { Stats } from "./stats.js";
import { follow } from "./tab-feed.js";
import { Tiles } from "./tiles.js";
import { ago, duration, number, timeOfDay } from "./format.js";

const element = (id) => document.getElementById(id);

// Decision: docs/decisions/0057-when-does-the-page-say-live.md
// A proxy may hold back the stream but not the statistics, which use separate requests. The page opens a new stream if
// statistics arrive, the stream has been silent for this time, and either the stream is not connected or the viewer
// counts another number of objects than the page.
const SILENT_MS = 20_000;
// When statistics arrive again after an outage, the page opens a new stream if the old one has been silent for this
// time: the browser may take minutes to notice that the old one is broken.
const SILENT_AFTER_OUTAGE_MS = 5000;
// If statistics fail and the stream has been silent for this time, the stream counts as broken.
const BOTH_SILENT_MS = 8000;
// For this time after its start, or after a person has selected a group, a page that was never connected shows
// "connecting".
const SLOW_START_MS = 4000;

const presence = new Presence();
// Whether the stream is connected, and whether the latest request for statistics succeeded.
const receiving = { stream: false, stats: false };
// Whether there are more objects than the page shows. The stream covers only the shown ones.
let isLimited = false;
let brokenAt = null;
let everConnected = false;
let startedAt = performance.now();

/** The viewer's time. It stands still while the stream is broken, because the shown objects then do not change. */
const now = () => brokenAt?.viewer ?? stats.clock.now();

const feed = follow({
  open(limited) {
    // A stream with a limit may not have covered the object in the panel, so the page fetches it.
    if (isPartial()) loadUnlisted();
    isLimited = limited;
    groups.readSoon(true);
    setReceiving("stream", true);
  },
  lost: () => setReceiving("stream", false),
  change(kind, objects) {
    const time = performance.now();
    if (!receiving.stream) setReceiving("stream", true);
    if (kind === "snapshot") {
      presence.replace(objects);
      panel.load();
    } else if (kind === "listed") presence.markSeen(objects, 0);
    else if (kind === "gone") presence.markGone(objects, time, now());
    else presence.markSeen(objects, time);
    if (kind !== "seen") groups.readSoon();
    panel.apply(kind, objects);
    recentChanges.add(kind, objects, now());
  },
  groups: (changes) => groups.apply(changes),
  refused: () => showAllObjects("The tabs of this browser already show as many groups as they can at once."),
});

const stats = new Stats({
  answer(answer) {
    const isBack = !receiving.stats;
    setReceiving("stats", true);
    showNotices(answer);
    tiles.draw();
    const differs = answer.online !== null && answer.online !== presence.online && !isPartial();
    const isSilent = feed.silence > (isBack ? SILENT_AFTER_OUTAGE_MS : SILENT_MS);
    if (isSilent && (isBack || differs || !receiving.stream)) feed.renew();
    if (isPartial()) loadUnlisted();
    if (isLimited) groups.readSoon();
  },
  failure() {
    setReceiving("stats", false);
    tiles.draw();
  },
});

const tiles = new Tiles(element("tiles"), element("summary-rows"), () => stats.history);
const field = new Field(element("field"), presence, now);
const panel = new ObjectPanel(now, announce, (id) => {
  writeFragment(groups.wanted, id);
  fieldInput.mark(id);
});
const fieldInput = new FieldInput(element("field"), field, presence, now, (id) => panel.show(id));
const recentChanges = new RecentChanges(element("recent-changes"), (id) => panel.show(id));
const groups = new Groups(now, {
  announce,
  draw: () => groupTree.draw(),
  select: showGroup,
  unknown: (path) => showAllObjects(`There is no group ${path}. The page shows all objects.`),
});
const groupTree = new GroupTree(element("groups"), groups);
element("all-objects").addEventListener("click", () => {
  groups.select("");
  element("field").focus();
});
addEventListener("hashchange", showFromUrl);
showFromUrl();
setInterval(tick, 250);
tick();

// ---------------------------------------------------------------------------- connection state

/** Records whether `source` ("stream" or "stats") works. `silence` is for how many milliseconds nothing has arrived. */
function setReceiving(source, isReceiving, silence = 0) {
  const wasConnected = receiving.stream;
  receiving[source] = isReceiving;
  if (receiving.stream) {
    if (brokenAt && everConnected) announce("Connected again.");
    brokenAt = null;
    everConnected = true;
  } else if (wasConnected) {
    brokenAt = { page: Date.now() - silence, viewer: stats.clock.now() - silence };
    announce(`No connection since ${timeOfDay(brokenAt.page)}. The page keeps the last values.`);
  }
  showConnection();
}

function showConnection() {
  const [state, text] = connection();
  element("connection").dataset.state = state;
  const label = element("connection-text");
  if (label.textContent !== text) label.textContent = text;
  document.body.classList.toggle("stream-lost", everConnected && !receiving.stream);
  document.body.classList.toggle("stats-lost", !receiving.stats && stats?.history.length > 0);
}

function connection() {
  if (receiving.stream) {
    if (receiving.stats || !stats.history.length) return ["live", "live"];
    return ["partly", `statistics of ${timeOfDay(stats.history.at(-1).at)}`];
  }
  if (!everConnected) return performance.now() - startedAt < SLOW_START_MS ? ["connecting", "connecting"] : ["broken", "no connection yet; trying again"];
  const since = duration((Date.now() - brokenAt.page) / 1000);
  return ["broken", `no connection since ${timeOfDay(brokenAt.page)} (${since}); trying again`];
}

// Shows the dependencies that the viewer reports as away. `showConnection` shows whether the viewer itself is away.
function showNotices({ table, events, services }) {
  const problems = [
    ["The table", table],
    ["Events", events],
    ...services.map(({ url, status }) => [`The metrics of ${url}`, status]),
    ...services.map(({ url, settings }) => [`The settings of ${url}`, settings ?? "ok"]),
  ]
    .filter(([, status]) => status !== "ok")
    .map(([subject, status]) => `${subject}: ${status}`);
  const notices = element("notices");
  if (notices.dataset.shown === problems.join("\n")) return;
  notices.dataset.shown = problems.join("\n");
  notices.hidden = problems.length === 0;
  notices.firstElementChild.replaceChildren(...problems.map((text) => Object.assign(document.createElement("li"), { textContent: text })));
  if (problems.length) announce(problems.join(". "));
}

// ---------------------------------------------------------------------------- shown values

/** Shows the group and the object in the page's URL. */
function showFromUrl() {
  const { group, id } = readFragment();
  groups.select(group);
  if (id !== null) panel.show(id);
}

/** Shows only the objects of the group `path`, or all objects if it is "", as after the start of the page. */
function showGroup(path) {
  receiving.stream = false;
  isLimited = false;
  brokenAt = null;
  everConnected = false;
  startedAt = performance.now();
  presence.replace([]);
  recentChanges.clear();
  feed.select(path);
  writeFragment(path, panel.id);
  const place = path && ` in ${path}`;
  element("presence-title").textContent = `Objects online${place}`;
  element("field").setAttribute("aria-label", `Objects online${place}`);
  element("count-group").textContent = place;
  element("all-objects").hidden = !path;
  element("group-note").hidden = true;
  showConnection();
}

function showAllObjects(reason) {
  groups.select("");
  element("group-note").textContent = reason;
  element("group-note").hidden = false;
  announce(reason);
}

/** Whether the stream covers only some of the objects. */
function isPartial() {
  return isLimited || groups.selected !== "";
}

/** Fetches the object in the panel if the stream does not cover it. */
function loadUnlisted() {
  if (panel.id !== null && presence.slotOf(panel.id) < 0) panel.load();
}

function tick() {
  const isSilent = !receiving.stats && feed.silence > BOTH_SILENT_MS;
  if (receiving.stream && isSilent) setReceiving("stream", false, feed.silence);
  showConnection();
  showCount();
  panel.refresh();
  recentChanges.draw();
  fieldInput.refresh();
  if (receiving.stats) groups.tick();
  element("scale-end").textContent = `${duration(presence.lifetimeMs / 1000)} ago`;
  element("stats-period").textContent = receiving.stats || !stats.history.length
    ? "the last 5 minutes"
    : `until ${timeOfDay(stats.history.at(-1).at)}, ${ago(Date.now() - stats.history.at(-1).at)}`;
}

function showCount() {
  const all = groups.selected ? groups.online : stats.latest?.online;
  const count = isLimited ? Math.max(presence.online, all ?? 0) : presence.online;
  const text = everConnected ? number(count) : "–";
  element("count").textContent = text;
  document.title = everConnected ? `${text} online${element("count-group").textContent} – Lastseen` : "Lastseen";
  document.querySelector(".field-empty").hidden = !everConnected || presence.online > 0;
  element("field-rest").textContent = isLimited && count > presence.online ? `The page shows ${number(presence.online)} of them.` : "";
}

/** Makes a screen reader say the text. */
function announce(text) {
  element("announcement").textContent = text;
}
