// Tests the history of an object: its bar, its sessions, and how long it has been gone.
import assert from "node:assert/strict";
import { showsText, until } from "./world.mjs";

const HOUR_MS = 3_600_000;

const on = (page) => ({
  state: page.locator("#object-state"),
  id: page.getByRole("textbox", { name: "Object id" }),
  bar: page.getByRole("img", { name: /last/i }),
  sessions: page.getByRole("table", { name: "Latest sessions" }).locator("tbody tr"),
  sightings: page.getByRole("region", { name: "Recent sightings" }),
});

/** Waits until the viewer reports the object as online, or as gone. */
const isListed = (world, id, online) =>
  until(`object ${id} is ${online ? "online" : "gone"}`, async () => {
    const response = await fetch(`${world.url}objects/${id}`);
    return response.ok && (await response.json()).online === online;
  });

const accessibleName = (locator) => locator.getAttribute("aria-label");

/** Makes the viewer answer with `sessions`, newest first as [online, gone] in hours ago, and with `availability`. */
async function answer(page, sessions, availability) {
  const now = Date.now();
  const time = (hours) => (hours === null ? null : new Date(now - hours * HOUR_MS).toISOString());
  const queries = [];
  await page.route("**/objects/*/availability?*", (route) => {
    const { hours, ratio } = availability;
    route.fulfill({ json: { id: "2", since: time(hours), until: time(0), seconds_online: 1, ratio, sessions: availability.sessions } });
  });
  await page.route("**/objects/*/sessions?*", (route) => {
    const query = Object.fromEntries(new URL(route.request().url()).searchParams);
    queries.push(query);
    const from = Number(query.after ?? 0);
    const end = from + Number(query.limit);
    const some = sessions.slice(from, end).map(([online, gone]) => ({ online_at: time(online), gone_at: time(gone), last_seen: time(gone) }));
    route.fulfill({ json: { sessions: some, next: end < sessions.length ? String(end) : null } });
  });
  return queries;
}

const boxes = async (page, id) => ((await page.locator(id).getAttribute("d")) ?? "").split("M").slice(1);

export const tests = {
  async "the keyboard finds a gone object, and the page says since when"(world) {
    await world.post("1002");
    await isListed(world, "1002", true);
    await isListed(world, "1002", false);
    const { page, consoleErrors } = await world.open();
    const { state, id, bar, sessions } = on(page);
    await id.focus();
    await page.keyboard.type("1002");
    await page.keyboard.press("Enter");
    await showsText(state, /^Gone for .+, last seen .+ ago$/);
    await showsText(page.getByRole("status"), /^Object 1002: Gone for/);
    const text = await state.textContent();
    await until("the time grows", async () => (await state.textContent()) !== text);

    await bar.waitFor();
    assert.match(
      await accessibleName(bar),
      /^Online [\d.]+% of the last .+, in 1 session\. The striped part of the bar is older than the history\.$/,
    );
    assert.equal(await sessions.count(), 1);
    assert.match((await sessions.locator("td").allTextContents()).join(" "), /\d\d:\d\d.* \d\d:\d\d.* [\d.]+ s$/);

    const reached = [];
    for (let step = 0; step < 3; step++) {
      await page.keyboard.press("Tab");
      reached.push(await page.evaluate(() => document.activeElement.id || document.activeElement.className || document.activeElement.textContent));
    }
    assert.deepEqual(reached, ["Show", "object-close", "sessions"]);
    assert.deepEqual(consoleErrors, []);
  },

  async "bar and sessions follow the shown object"(world) {
    const { page } = await world.open();
    const { state, id, bar, sessions } = on(page);
    await id.fill("1004");
    await id.press("Enter");
    await showsText(state, /^Not online: never seen/);
    assert.equal(await bar.count(), 0);

    // The panel loads sessions at most every 3 s, so the object must stay online for longer than its TTL.
    const showsOnline = async (count) => {
      await world.post("1004");
      await page.waitForTimeout(200);
      const texts = await sessions.allTextContents();
      return texts.length === count && texts[0].includes("still online");
    };
    await until("the session is still online", () => showsOnline(1));
    await showsText(state, /^Gone for .+, last seen/);
    await until("the session has an end", async () => !(await sessions.textContent()).includes("still online"));
    await until("a second session is still online", () => showsOnline(2));
    await until("the label counts it", async () => (await accessibleName(bar)).includes("in 2 sessions"));
  },

  async "the bar shows 24 hours with short gaps and long absences"(world) {
    const { page } = await world.open();
    await answer(page, [[2, null], [5, 2.01], [9, 8], [null, 20], [40, 30]], { hours: 24, ratio: 0.9153, sessions: 4 });
    const { state, id, bar, sessions } = on(page);
    await world.post("1006");
    await id.fill("1006");
    await id.press("Enter");
    await showsText(state, /^Online, seen/);
    await bar.waitFor();
    assert.equal(await accessibleName(bar), "Online 91.5% of the last 24 hours, in 4 sessions.");
    assert.equal(Math.round(await bar.locator("rect").getAttribute("x")), 0);
    const drawn = await boxes(page, "#day-online");
    assert.deepEqual(drawn.map((box) => Math.round(Number.parseFloat(box))), [1320, 1140, 900, 0]);
    // The gap of half a minute is at least as wide as a pixel.
    const gaps = await boxes(page, "#day-gaps");
    assert.equal(gaps.length, 3);
    assert.ok(gaps.every((gap) => Number.parseFloat(gap.split("h")[1]) >= 6), gaps.join());
    const cells = await sessions.evaluateAll((rows) => rows.map((row) => [...row.cells].map((cell) => cell.textContent)));
    assert.equal(cells.length, 5);
    assert.match(cells[0].join(), /,still online,2 h$/);
    assert.match(cells[3].join(), /^–,.+,–$/);
    assert.match(cells[4].join(), /^\d+ \w+ \d\d:\d\d,\d+ \w+ \d\d:\d\d,10 h$/);
  },

  async "the bar of an object with many sessions shows the latest 1,000"(world) {
    const { page } = await world.open();
    const many = Array.from({ length: 1200 }, (_, index) => [(index + 1) * 0.015, index ? index * 0.015 + 0.005 : null]);
    const queries = await answer(page, many, { hours: 24, ratio: 0.00001, sessions: 1200 });
    const { id, bar, sessions } = on(page);
    await id.fill("1008");
    await id.press("Enter");
    await bar.waitFor();
    assert.equal(await accessibleName(bar), "Online 0.1% of the last 24 hours, in 1,200 sessions. The bar shows the latest 1,000 of them.");
    assert.equal((await boxes(page, "#day-online")).length, 1000);
    assert.equal(Math.round(await bar.locator("rect").getAttribute("x")), 540);
    assert.equal(await sessions.count(), 10);
    assert.deepEqual(queries.slice(0, 2).map(({ limit, after }) => [limit, after]), [["10", undefined], ["990", "10"]]);
    const length = sessions.first().locator("td").last();
    const before = await length.textContent();
    await until("the session that has not ended grows", async () => (await length.textContent()) !== before);
  },

  async "changes in quick succession cost one request at a time"(world) {
    const { page } = await world.open();
    await page.clock.install();
    await page.reload();
    await page.evaluate(async () => {
      const { ObjectHistory } = await import("/page/object-history.js");
      const forward = window.fetch;
      window.waiting = [];
      window.loaded = 0;
      window.fetch = (url, options) =>
        String(url).includes("/objects/1/") ? new Promise((resolve) => waiting.push({ url: String(url), resolve })) : forward(url, options);
      window.shown = new ObjectHistory(() => (loaded += 1));
      shown.show("1");
    });
    const change = () => page.evaluate(() => Array.from({ length: 20 }, () => shown.reload()));
    const isWaiting = (part) =>
      until(`a request for ${part} waits`, () => page.evaluate((part) => waiting.length === 1 && waiting[0].url.includes(part), part));
    const respond = (body) => page.evaluate((body) => waiting.shift().resolve(Response.json(body)), body);
    const load = async (times) => {
      await isWaiting("/sessions?");
      await change();
      await respond({ sessions: [{ online_at: new Date().toISOString(), gone_at: null, last_seen: null }], next: null });
      await isWaiting("/availability?");
      await change();
      await respond({ since: new Date().toISOString(), until: new Date().toISOString(), ratio: 1, sessions: 1 });
      await until("the history is loaded", () => page.evaluate((times) => loaded === times, times));
    };
    await load(1);
    await page.clock.runFor(2500);
    assert.equal(await page.evaluate("waiting.length"), 0);
    await page.clock.runFor(1000);
    await load(2);
  },

  async "an error keeps the last sessions"(world) {
    const { page } = await world.open();
    const { state, id, sessions } = on(page);
    await id.fill("1010");
    await id.press("Enter");
    await world.post("1010");
    await showsText(sessions, /still online/);
    let failures = 0;
    await page.route("**/objects/*/sessions?*", (route) => {
      failures += 1;
      return route.fulfill({ status: 503, json: {} });
    });
    await showsText(state, /^Gone, last seen/);
    await until("a request fails after the object is gone", () => failures > 0);
    await showsText(sessions, /–$/);
  },

  async "without a history the panel shows only current values"(world) {
    await world.kill();
    await world.boot({ HISTORY_RETENTION: "0" });
    try {
      const { page } = await world.open();
      const { state, id, bar, sightings } = on(page);
      const answered = page.waitForResponse("**/objects/1012/sessions?*");
      await id.fill("1012");
      await id.press("Enter");
      assert.equal((await answered).status(), 404);
      await world.post("1012");
      await showsText(state, /^Online, seen/);
      assert.ok(await sightings.isVisible());
      await showsText(state, /^Gone, last seen/);
      assert.equal(await bar.count(), 0);
    } finally {
      await world.kill();
      await world.boot();
    }
  },
};
