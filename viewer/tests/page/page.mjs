// Tests the live page in Chromium, with a running Lastseen. scripts/test-page runs this file.
import assert from "node:assert/strict";
import { tests as groups } from "./groups.mjs";
import { tests as history } from "./history.mjs";
import { tests as presence } from "./presence.mjs";
import { axe, showsText, until, World } from "./world.mjs";

const on = (page) => ({
  count: page.locator("#count"),
  connection: page.locator("#connection-text"),
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
  ...history,

  async "a posted object appears and disappears after its TTL"(world) {
    const { page } = await world.open();
    const { count, connection, state, id, show } = on(page);
    await showsText(connection, /^live$/);
    await showsText(count, /^0$/);
    await id.fill("2");
    await show.click();
    await showsText(state, /^Not online/);

    await world.post("2", "3");
    await showsText(state, /^Online, seen/);
    await showsText(count, /^1$/);
    assert.equal(await page.getByRole("region", { name: "Recent sightings" }).locator("tbody tr").count(), 1);

    await showsText(state, /^Gone for .+, last seen/);
    // The limit is so short that only the change itself can do this, and not the snapshot after a missed change.
    await showsText(count, /^0$/, 5000);
  },

  async "during a viewer restart the page keeps its last values"(world) {
    const { page } = await world.open();
    const { count, connection, state, id, show } = on(page);
    await id.fill("4");
    await show.click();
    await world.post("4");
    await showsText(state, /^Online, seen/);
    await showsText(count, /^1$/);

    await world.kill();
    await showsText(connection, /^no connection since \d\d:\d\d:\d\d \([1-9]\d* s\)/);
    assert.equal((await count.textContent()).trim(), "1");
    assert.match(await state.textContent(), /^Online/);

    await page.evaluate(() => (window.sameDocument = true));
    await world.boot();
    await showsText(connection, /^live$/);
    await showsText(count, /^0$/);
    await showsText(state, /^(Gone|Not online)/);
    await world.post("4");
    await showsText(state, /^Online, seen/);
    assert.ok(await page.evaluate(() => window.sameDocument), "the page was reloaded");
  },

  async "the page opens a rejected stream again, although browsers give up"(world) {
    const proxy = await world.proxy();
    proxy.stream = "refuse";
    const { page } = await world.open({}, proxy.url);
    const { connection } = on(page);
    await showsText(connection, /^no connection yet/);
    proxy.stream = "pass";
    await showsText(connection, /^live$/);
  },

  // Field case 7.1
  async "behind a proxy with a path everything loads"(world) {
    const proxy = await world.proxy();
    const { page, consoleErrors } = await world.open({}, proxy.url);
    const { connection, state, id, show } = on(page);
    await showsText(connection, /^live$/);
    await id.fill("2");
    await show.click();
    await world.post("2");
    await showsText(state, /^Online, seen/);
    const link = page.getByRole("link", { name: "the HTTP API" });
    const address = new URL(await link.getAttribute("href"), page.url()).href;
    const description = await (await page.request.get(address)).json();
    assert.equal(new URL(description.servers[0].url, address).href, proxy.url);
    assert.deepEqual(proxy.notFound.filter((path) => !/\/(objects\/2|groups\?.*)$/.test(path)), []);
    assert.deepEqual(consoleErrors.filter((text) => !text.includes("404")), []);
  },

  // Field case 7.2
  async "seven tabs share one stream and are all live"(world) {
    const proxy = await world.proxy();
    const { page } = await world.open({}, proxy.url);
    const pages = [page];
    while (pages.length < 7) {
      const tab = await page.context().newPage();
      await tab.goto(proxy.url);
      pages.push(tab);
    }
    for (const tab of pages) await showsText(on(tab).connection, /^live$/);
    assert.equal(proxy.streams, 1);
    const { id, show, state } = on(pages[6]);
    await id.fill("2");
    await show.click();
    await world.post("2");
    await showsText(state, /^Online, seen/);
    for (const tab of pages) await showsText(on(tab).count, /^1$/);
    // Closing the first tab must not end the stream.
    await pages[0].close();
    await showsText(state, /^Gone/);
  },

  // Field case 2.2
  async "above its limit the page counts all objects and follows the chosen one"(world) {
    const proxy = await world.proxy();
    proxy.limit = 2;
    const posting = setInterval(() => world.post("2", "4", "6", "8").catch(() => {}), 500);
    const { page } = await world.open({}, proxy.url);
    const { count, state, id, show } = on(page);
    try {
      await showsText(count, /^4$/);
      await showsText(page.locator("#field-rest"), /^The page shows 2 of them/);
      await id.fill("8");
      await show.click();
      await showsText(state, /^Online, seen/);
    } finally {
      clearInterval(posting);
    }
    await showsText(state, /^Gone for .+, last seen/);
    await showsText(count, /^0$/);
  },

  // Field case 7.3
  async "the page is not live before the list of objects has arrived"(world) {
    const proxy = await world.proxy();
    proxy.stream = "hold";
    const { page } = await world.open({}, proxy.url);
    const { connection, count } = on(page);
    await until("the stream is open", () => proxy.streams === 1);
    await showsText(connection, /^no connection yet/);
    proxy.begin();
    await page.waitForTimeout(500);
    assert.match(await connection.textContent(), /^no connection yet/);
    assert.equal(await count.textContent(), "–");
    proxy.release();
    await showsText(connection, /^live$/);
    await showsText(count, /^\d+$/);
  },

  async "the keyboard moves between cells and chooses one"(world) {
    const { page } = await world.open();
    const { count, field, option } = on(page);
    await until("both are online at once", async () => {
      await world.post("6", "8");
      await page.waitForTimeout(200);
      return (await count.textContent()) === "2";
    });
    await field.focus();
    await page.keyboard.press("Home");
    await showsText(option, /^Object \d, seen/);
    const first = await option.textContent();
    await page.keyboard.press("ArrowRight");
    await until("another has the focus", async () => (await option.textContent()).slice(0, 8) !== first.slice(0, 8));
    const other = (await option.textContent()).match(/^Object (\d)/)[1];
    await page.keyboard.press("Enter");
    await showsText(page.locator("#object-id"), new RegExp(`^${other}$`));
  },

  async "an id of more than 53 bits is shown exactly"(world) {
    const { page } = await world.open();
    const { state, id, show } = on(page);
    await id.fill("9007199254740994");
    await show.click();
    await world.post("9007199254740994", "9007199254740992");
    await showsText(state, /^Online, seen/);
    await showsText(page.locator("#recent-changes"), /9007199254740992/);
  },

  async "the pipeline's statistics arrive"(world) {
    const { page } = await world.open();
    for (const title of ["Callbacks", "Lookups"]) {
      await until(`${title} are counted`, async () => {
        await world.post("10");
        await page.waitForTimeout(200);
        return Number(await tile(page, title).textContent()) > 0;
      });
    }
  },

  async "dead letters show commands and unknown values a dash"(world) {
    const { page } = await world.open();
    const answer = async (change) =>
      page.route("**/stats", async (route) => {
        const response = await route.fetch();
        await route.fulfill({ response, json: { ...(await response.json()), ...change } });
      });
    await answer({ dead_letters: 3, queue_messages: null });
    await showsText(tile(page, "Dead letters"), /^3$/);
    await showsText(tile(page, "Queue"), /^–$/);
    const commands = await page.locator("#tiles code").allTextContents();
    assert.deepEqual(commands, ["lastseen dead-letters list", "lastseen dead-letters redrive --all"]);
    await answer({ dead_letters: 0, queue_messages: 12 });
    await showsText(tile(page, "Dead letters"), /^0$/);
    await showsText(tile(page, "Queue"), /^12$/);
    assert.equal(await page.locator("#tiles code").count(), 0);
  },

  async "the content security policy blocks nothing of the page"(world) {
    const { page, consoleErrors } = await world.open();
    await showsText(on(page).connection, /^live$/);
    const policy = (await page.request.get(world.url)).headers()["content-security-policy"];
    assert.match(policy, /default-src 'self'/);
    assert.deepEqual(consoleErrors, []);
  },

  async "axe finds no problem in dark and light, on desktop and phone"(world) {
    const source = await axe();
    for (const colorScheme of ["dark", "light"]) {
      for (const width of [1280, 320]) {
        const { page } = await world.open({ colorScheme, viewport: { width, height: 740 }, bypassCSP: true });
        await showsText(on(page).connection, /^live$/);
        await world.post("12");
        await page.locator(".as-table summary").click();
        await page.evaluate(source);
        const check = async () => {
          const { violations } = await page.evaluate("axe.run()");
          assert.deepEqual(violations.map(({ id, nodes }) => `${id}: ${nodes.map(({ html }) => html).join()}`), []);
          const overflow = await page.evaluate("document.documentElement.scrollWidth - innerWidth");
          assert.ok(overflow <= 0, `the page is ${overflow} pixels wider than a window of ${width}`);
        };
        await check();
        await on(page).id.fill("12");
        await on(page).show.click();
        await page.getByRole("region", { name: "Latest sessions" }).waitFor();
        await check();
      }
    }
  },

  // Last, because these tests start Lastseen with groups.
  ...groups,
};

// Prints lines like cargo's test runner, which scripts/test counts.
const filter = process.argv[2] ?? "";
const world = await World.start();
let passed = 0;
let failed = 0;
try {
  for (const [name, test] of Object.entries(tests).filter(([name]) => name.includes(filter))) {
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
  if (failed > 0) console.log(`last lines of the log of lastseen:\n${(await world.log()).split("\n").slice(-30).join("\n")}`);
} finally {
  await world.end();
}
console.log(`test result: ${failed ? "FAILED" : "ok"}. ${passed} passed; ${failed} failed; 0 ignored`);
process.exitCode = failed > 0 || passed === 0 ? 1 : 0;
