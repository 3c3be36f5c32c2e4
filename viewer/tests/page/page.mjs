// The live page in a real Chromium, on a real Lastseen. Run by scripts/test-page.
import assert from "node:assert/strict";
import { tests as presence } from "./presence.mjs";
import { axe, says, until, World } from "./world.mjs";

const on = (page) => ({
  count: page.locator("#count"),
  connection: page.locator("#connection-words"),
  state: page.locator("#object-state"),
  field: page.getByRole("listbox", { name: "Objects online" }),
  option: page.getByRole("option"),
  id: page.getByRole("textbox", { name: "Object id" }),
  show: page.getByRole("button", { name: "Show", exact: true }),
});

const tile = (page, title) =>
  page.locator(".tile", { has: page.getByRole("heading", { name: title, exact: true }) }).locator(".tile-number");

const tests = {
  ...presence,

  async "the page shows an object that was posted to the callback, and loses it after its TTL"(world) {
    const { page } = await world.open();
    const { count, connection, state, id, show } = on(page);
    await says(connection, /^live$/);
    await says(count, /^0$/);
    await id.fill("2");
    await show.click();
    await says(state, /^Not online/);

    await world.post("2", "3");
    await says(state, /^Online, seen/);
    await says(count, /^1$/);
    assert.equal(await page.getByRole("region", { name: "Recent sightings" }).locator("tbody tr").count(), 1);

    await says(state, /^Gone, last seen/);
    // By this change, and not by the snapshot that the page asks for when it has missed one.
    await says(count, /^0$/, 5000);
  },

  async "the page survives a restart of the viewer, and keeps its last values meanwhile"(world) {
    const { page } = await world.open();
    const { count, connection, state, id, show } = on(page);
    await id.fill("4");
    await show.click();
    await world.post("4");
    await says(state, /^Online, seen/);
    await says(count, /^1$/);

    await world.kill();
    await says(connection, /^no connection since \d\d:\d\d:\d\d \([1-9]\d* s\)/);
    assert.equal((await count.textContent()).trim(), "1");
    assert.match(await state.textContent(), /^Online/);

    await page.evaluate(() => (window.sameDocument = true));
    await world.boot();
    await says(connection, /^live$/);
    await says(count, /^0$/);
    await says(state, /^(Gone|Not online)/);
    await world.post("4");
    await says(state, /^Online, seen/);
    assert.ok(await page.evaluate(() => window.sameDocument), "it was not loaded anew");
  },

  async "a stream that was refused is asked for again, which the browser does not do by itself"(world) {
    const proxy = await world.proxy();
    proxy.stream = "refuse";
    const { page } = await world.open({}, proxy.url);
    const { connection } = on(page);
    await says(connection, /^no connection yet/);
    proxy.stream = "pass";
    await says(connection, /^live$/);
  },

  // Field case 7.1
  async "under a path of a proxy everything loads, and the page is live"(world) {
    const proxy = await world.proxy();
    const { page, complaints } = await world.open({}, proxy.url);
    const { connection, state, id, show } = on(page);
    await says(connection, /^live$/);
    await id.fill("2");
    await show.click();
    await world.post("2");
    await says(state, /^Online, seen/);
    await page.getByRole("link", { name: "the HTTP interface" }).click();
    await page.getByRole("heading", { name: "GET /events" }).waitFor();
    assert.equal(await page.evaluate("document.styleSheets.length"), 1);
    await page.getByRole("link", { name: "the live page" }).click();
    await says(on(page).connection, /^live$/);
    const description = await (await page.request.get(new URL("openapi.json", proxy.url).href)).json();
    assert.equal(new URL(description.servers[0].url, new URL("openapi.json", proxy.url)).href, proxy.url);
    assert.deepEqual(proxy.notFound.filter((path) => !path.endsWith("/objects/2")), []);
    assert.deepEqual(complaints.filter((text) => !text.includes("404")), []);
  },

  // Field case 7.2
  async "seven tabs share one stream, and all of them are live"(world) {
    const proxy = await world.proxy();
    const { page } = await world.open({}, proxy.url);
    const pages = [page];
    while (pages.length < 7) {
      const tab = await page.context().newPage();
      await tab.goto(proxy.url);
      pages.push(tab);
    }
    for (const tab of pages) await says(on(tab).connection, /^live$/);
    assert.equal(proxy.streams, 1);
    const { id, show, state } = on(pages[6]);
    await id.fill("2");
    await show.click();
    await world.post("2");
    await says(state, /^Online, seen/);
    for (const tab of pages) await says(on(tab).count, /^1$/);
    // The first tab is not the one that keeps the stream.
    await pages[0].close();
    await says(state, /^Gone/);
  },

  // Field case 2.2
  async "of more objects than it shows, the page counts all and follows the one that is chosen"(world) {
    const proxy = await world.proxy();
    proxy.limit = 2;
    const posting = setInterval(() => world.post("2", "4", "6", "8").catch(() => {}), 500);
    const { page } = await world.open({}, proxy.url);
    const { count, state, id, show } = on(page);
    try {
      await says(count, /^4$/);
      await says(page.locator("#field-rest"), /^Shown are 2 of them/);
      await id.fill("8");
      await show.click();
      await says(state, /^Online, seen/);
    } finally {
      clearInterval(posting);
    }
    await says(state, /^Gone, last seen/);
    await says(count, /^0$/);
  },

  // Field case 7.3
  async "the page is not live before the list of objects has arrived"(world) {
    const proxy = await world.proxy();
    proxy.stream = "hold";
    const { page } = await world.open({}, proxy.url);
    const { connection, count } = on(page);
    await until("the stream is open", () => proxy.streams === 1);
    await says(connection, /^no connection yet/);
    proxy.begin();
    await page.waitForTimeout(500);
    assert.match(await connection.textContent(), /^no connection yet/);
    assert.equal(await count.textContent(), "–");
    proxy.release();
    await says(connection, /^live$/);
    await says(count, /^\d+$/);
  },

  async "the cells can be walked through and chosen by keyboard"(world) {
    const { page } = await world.open();
    const { count, field, option } = on(page);
    await until("both are online at once", async () => {
      await world.post("6", "8");
      await page.waitForTimeout(200);
      return (await count.textContent()) === "2";
    });
    await field.focus();
    await page.keyboard.press("Home");
    await says(option, /^Object \d, seen/);
    const first = await option.textContent();
    await page.keyboard.press("ArrowRight");
    await until("another has the focus", async () => (await option.textContent()).slice(0, 8) !== first.slice(0, 8));
    const other = (await option.textContent()).match(/^Object (\d)/)[1];
    await page.keyboard.press("Enter");
    await says(page.locator("#object-id"), new RegExp(`^${other}$`));
  },

  async "an id of more than 53 bits is shown to its last digit"(world) {
    const { page } = await world.open();
    const { state, id, show } = on(page);
    await id.fill("9007199254740994");
    await show.click();
    await world.post("9007199254740994", "9007199254740992");
    await says(state, /^Online, seen/);
    await says(page.locator("#lately"), /9007199254740992/);
  },

  async "the numbers of the pipeline arrive"(world) {
    const { page } = await world.open();
    for (const title of ["Callbacks", "Lookups"]) {
      await until(`${title} are counted`, async () => {
        await world.post("10");
        await page.waitForTimeout(200);
        return Number(await tile(page, title).textContent()) > 0;
      });
    }
  },

  async "dead letters come with the words to send them back, and what is not known is a dash"(world) {
    const { page } = await world.open();
    const answer = async (change) =>
      page.route("**/stats", async (route) => {
        const response = await route.fetch();
        await route.fulfill({ response, json: { ...(await response.json()), ...change } });
      });
    await answer({ dead_letters: 3, queue_messages: null });
    await says(tile(page, "Dead letters"), /^3$/);
    await says(tile(page, "Queue"), /^–$/);
    const commands = await page.locator("#tiles code").allTextContents();
    assert.deepEqual(commands, ["lastseen dead-letters list", "lastseen dead-letters redrive --all"]);
    await answer({ dead_letters: 0, queue_messages: 12 });
    await says(tile(page, "Dead letters"), /^0$/);
    await says(tile(page, "Queue"), /^12$/);
    assert.equal(await page.locator("#tiles code").count(), 0);
  },

  async "the policy against foreign scripts forbids nothing that the page does"(world) {
    const { page, complaints } = await world.open();
    await says(on(page).connection, /^live$/);
    const policy = (await page.request.get(world.url)).headers()["content-security-policy"];
    assert.match(policy, /default-src 'self'/);
    assert.deepEqual(complaints, []);
  },

  async "axe finds nothing, in dark and light, on a desk and on a phone"(world) {
    const source = await axe();
    for (const colorScheme of ["dark", "light"]) {
      for (const width of [1280, 360]) {
        const { page } = await world.open({ colorScheme, viewport: { width, height: 740 }, bypassCSP: true });
        await says(on(page).connection, /^live$/);
        await world.post("12");
        await page.locator("summary").click();
        await page.evaluate(source);
        const { violations } = await page.evaluate("axe.run()");
        assert.deepEqual(violations.map(({ id, nodes }) => `${id}: ${nodes.map(({ html }) => html).join()}`), []);
        const overflow = await page.evaluate("document.documentElement.scrollWidth - innerWidth");
        assert.ok(overflow <= 0, `it is ${overflow} pixels wider than a window of ${width}`);
      }
    }
  },
};

// The lines of cargo's own test runner, which scripts/test counts.
const only = process.argv[2] ?? "";
const world = await World.start();
let passed = 0;
let failed = 0;
try {
  for (const [name, test] of Object.entries(tests).filter(([name]) => name.includes(only))) {
    try {
      await test(world);
      passed += 1;
      console.log(`test ${name} ... ok`);
    } catch (error) {
      failed += 1;
      console.log(`test ${name} ... FAILED\n${error.stack}`);
    }
    await world.closePages();
  }
  if (failed > 0) console.log(`the log of lastseen ends with\n${(await world.log()).split("\n").slice(-30).join("\n")}`);
} finally {
  await world.end();
}
console.log(`test result: ${failed ? "FAILED" : "ok"}. ${passed} passed; ${failed} failed; 0 ignored`);
process.exitCode = failed > 0 || passed === 0 ? 1 : 0;
