// The live page: puts its parts together, and says whether what it shows is true now.
import { Browse } from "./field-input.js";
import { Field } from "./field.js";
import { Lately } from "./recent-changes.js";
import { ObjectPanel } from "./object.js";
import { Presence } from "./presence.js";
import { Stats } from "./stats.js";
import { follow } from "./tab-feed.js";
import { Tiles } from "./tiles.js";
import { ago, duration, number, timeOfDay } from "./format.js";

const element = (id) => document.getElementById(id);

// Decision: docs/decisions/0057-when-does-the-page-say-live.md
// Stream and numbers come by different requests. While numbers come, a stream that is silent for so long is made
// anew if it still tries to connect, or is there and the viewer counts others than the page does: something in
// between keeps it from us. One that broke with the numbers may take minutes to notice; the numbers know already.
const SILENT_MS = 20_000;
const SILENT_AFTER_OUTAGE_MS = 5000;
// Neither comes, but nothing has said that the stream is broken: it is taken to be.
const BOTH_SILENT_MS = 8000;
const SLOW_START_MS = 4000;

const presence = new Presence();
const heard = { stream: false, numbers: false };
// Whether there are more objects than the page shows: the stream is about those that it shows only.
let isLimited = false;
let brokenAt = null;
let everConnected = false;

/** The viewer's time; it stands still at the moment that the stream broke, as what is shown is of then. */
const now = () => brokenAt?.viewer ?? stats.clock.now();

const feed = follow({
  open(limited) {
    // What happened to an object that the stream was not about, only the viewer knows.
    if (isLimited) loadUnlisted();
    isLimited = limited;
    hear("stream", true);
  },
  lost: () => hear("stream", false),
  change(kind, objects) {
    const time = performance.now();
    if (!heard.stream) hear("stream", true);
    if (kind === "snapshot") {
      presence.replace(objects);
      panel.load();
    } else if (kind === "listed") presence.see(objects, 0);
    else if (kind === "gone") presence.remove(objects, time, now());
    else presence.see(objects, time);
    panel.note(kind, objects);
    lately.note(kind, objects, now());
  },
});

const stats = new Stats({
  answer(answer) {
    const back = !heard.numbers;
    hear("numbers", true);
    showNotices(answer);
    tiles.draw();
    const differs = answer.online !== null && answer.online !== presence.online && !isLimited;
    const doubtful = back ? feed.silence > SILENT_AFTER_OUTAGE_MS : feed.silence > SILENT_MS;
    if (doubtful && (back || differs || !heard.stream)) feed.renew();
    if (isLimited) loadUnlisted();
  },
  failure() {
    hear("numbers", false);
    tiles.draw();
  },
});

const tiles = new Tiles(element("tiles"), element("summary-rows"), () => stats.history);
const field = new Field(element("field"), presence, now);
const panel = new ObjectPanel(now, say, (id) => browse.mark(id));
const browse = new Browse(element("field"), field, presence, now, (id) => panel.show(id));
const lately = new Lately(element("lately"), (id) => panel.show(id));
panel.showAddressed();
setInterval(tick, 250);
tick();

// ---------------------------------------------------------------------------- is it true now?

function hear(what, is, since = 0) {
  const was = heard.stream;
  heard[what] = is;
  if (heard.stream) {
    if (brokenAt && everConnected) say("Connected again.");
    brokenAt = null;
    everConnected = true;
  } else if (was) {
    brokenAt = { page: Date.now() - since, viewer: stats.clock.now() - since };
    say(`No connection since ${timeOfDay(brokenAt.page)}. The last values stay.`);
  }
  showConnection();
}

function showConnection() {
  const [state, words] = connection();
  element("connection").dataset.state = state;
  const place = element("connection-words");
  if (place.textContent !== words) place.textContent = words;
  document.body.classList.toggle("stream-lost", everConnected && !heard.stream);
  document.body.classList.toggle("numbers-lost", !heard.numbers && stats?.history.length > 0);
}

function connection() {
  if (heard.stream) return heard.numbers || !stats.history.length ? ["live", "live"] : ["partly", `numbers of ${timeOfDay(stats.history.at(-1).at)}`];
  if (!everConnected) return performance.now() < SLOW_START_MS ? ["connecting", "connecting"] : ["broken", "no connection yet; trying again"];
  const since = duration((Date.now() - brokenAt.page) / 1000);
  return ["broken", `no connection since ${timeOfDay(brokenAt.page)} (${since}); trying again`];
}

// What the viewer itself cannot see is told apart from what we cannot.
function showNotices({ table, events, services }) {
  const wrong = [["The table", table], ["The stream of changes", events], ...services.map(({ url, status }) => [`The numbers of ${url}`, status]), ...services.map(({ url, settings }) => [`The settings of ${url}`, settings ?? "ok"])]
    .filter(([, status]) => status !== "ok")
    .map(([what, status]) => `${what}: ${status}`);
  const place = element("notices");
  if (place.dataset.words === wrong.join("\n")) return;
  place.dataset.words = wrong.join("\n");
  place.hidden = wrong.length === 0;
  place.firstElementChild.replaceChildren(...wrong.map((words) => Object.assign(document.createElement("li"), { textContent: words })));
  if (wrong.length) say(wrong.join(". "));
}

// ---------------------------------------------------------------------------- the rest

/** Asks for the object on show, if the stream is not about it. */
function loadUnlisted() {
  if (panel.id !== null && presence.slotOf(panel.id) < 0) panel.load();
}

function tick() {
  if (heard.stream && !heard.numbers && feed.silence > BOTH_SILENT_MS) hear("stream", false, feed.silence);
  showConnection();
  showCount();
  panel.refresh();
  lately.draw();
  browse.refresh();
  element("scale-end").textContent = `${duration(presence.span / 1000)} ago`;
  element("numbers-when").textContent = heard.numbers || !stats.history.length
    ? "the last 5 minutes"
    : `until ${timeOfDay(stats.history.at(-1).at)}, ${ago(Date.now() - stats.history.at(-1).at)}`;
}

function showCount() {
  const count = isLimited ? Math.max(presence.online, stats.latest?.online ?? 0) : presence.online;
  const words = everConnected ? number(count) : "–";
  element("count").textContent = words;
  document.title = everConnected ? `${words} online – Lastseen` : "Lastseen";
  document.querySelector(".field-empty").hidden = !everConnected || presence.online > 0;
  element("field-rest").textContent = isLimited && count > presence.online ? `Shown are ${number(presence.online)} of them.` : "";
}

function say(words) {
  element("said").textContent = words;
}
