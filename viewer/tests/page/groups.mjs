// Tests the tree of groups and the selected group.
import assert from "node:assert/strict";
import { writeFile } from "node:fs/promises";
import { join } from "node:path";
import { axe, showsText, until } from "./world.mjs";

const HOSTILE = "<img src=x onerror=fail()>";
const SPECIAL = "a:b %2F?#ü";

const SHOP = [
  {
    name: "shop",
    children: [
      { name: "berlin", objects: ["2002-2003", 2004], up: "all", degraded: "2" },
      { name: "spare", objects: [2006, 2008], up: "any" },
    ],
    up: "60%",
    degraded: "any",
  },
  { name: HOSTILE, objects: [] },
  { name: "42", objects: [2010] },
  { name: SPECIAL, objects: [2012], up: "any" },
  ...["one", "two", "three"].map((name) => ({ name, objects: [] })),
];
const MANY = Array.from({ length: 1000 }, (_, root) => ({ name: `root ${root + 1}`, objects: [2002] }));

const on = (page) => ({
  row: (path) => page.locator(`[role=treeitem][data-path=${JSON.stringify(path)}]`),
  rows: page.getByRole("treeitem"),
  title: page.locator("#presence-title"),
  note: page.locator("#group-note"),
  count: page.locator("#count"),
  connection: page.locator("#connection-text"),
  announcement: page.getByRole("status"),
});

const groupsFile = (world) => join(world.home, "groups.json");

/** A test on a Lastseen with these groups. The next test with the same groups uses the same Lastseen. */
const withGroups = (definition, test) => async (world) => {
  if (world.groups !== definition) {
    await writeFile(groupsFile(world), JSON.stringify(definition));
    await world.kill();
    await world.boot({ GROUPS_FILE: groupsFile(world) });
    world.groups = definition;
  }
  await test(world);
};

/** Posts the ids again and again during `test`, so that they stay online. */
async function keepOnline(world, ids, test) {
  const posting = setInterval(() => world.post(...ids).catch(() => {}), 500);
  try {
    await test();
  } finally {
    clearInterval(posting);
  }
}

const expand = async (page, path, child) => {
  await on(page).row(path).locator(".group-toggle").click();
  await on(page).row(child).waitFor();
};

const focusedPath = (page) => page.evaluate(() => document.activeElement.dataset.path);

export const tests = {
  async "without groups the page has no tree and asks once"(world) {
    const { page } = await world.open({}, `${world.url}#shop/berlin`);
    const requests = [];
    page.on("request", (request) => new URL(request.url()).pathname.startsWith("/groups") && requests.push(request.url()));
    await page.reload();
    await showsText(on(page).connection, /^live$/);
    for (let answers = 0; answers < 4; answers++) await page.waitForResponse("**/stats");
    assert.equal(requests.length, 1);
    assert.equal(await page.getByRole("tree").count(), 0);
    assert.equal(await on(page).title.textContent(), "Objects online");
  },

  "a group shows status, count, since when and why": withGroups(SHOP, async (world) => {
    const { page, consoleErrors } = await world.open();
    const { row } = on(page);
    await row("shop").waitFor();
    assert.equal(await row("shop/berlin").count(), 0);
    await expand(page, "shop", "shop/berlin");
    await showsText(row("shop/berlin"), /▲? *down since \d\d:\d\d:\d\d, 0 of 3 online 200\d (was never seen|is gone)/);
    await keepOnline(world, [2002, 2004, 2006], async () => {
      await showsText(row("shop/berlin"), /berlin degraded since \d\d:\d\d:\d\d, 2 of 3 online 2003 was never seen$/);
      await showsText(row("shop/spare"), /spare up since \d\d:\d\d:\d\d, 1 of 2 online$/);
      await showsText(row("shop"), /shop up since \d\d:\d\d:\d\d, 3 of 5 online$/);
    });
    await showsText(row("shop"), /shop down since .+, 0 of 5 online 200\d in (berlin|spare) is gone$/);
    await row("shop").locator(".group-toggle").click();
    await until("the children are hidden", async () => (await row("shop/berlin").count()) === 0);
    assert.deepEqual(consoleErrors, []);
  }),

  "events alone change statuses": withGroups(SHOP, async (world) => {
    const { page } = await world.open();
    const { row, connection } = on(page);
    await showsText(connection, /^live$/);
    await showsText(row("shop"), /down since/);
    await page.route(/\/groups/, (route) => route.abort());
    // The count is as of the change of status, when some of the three objects may not be online yet.
    await keepOnline(world, [2002, 2004, 2006], () => showsText(row("shop"), /shop up since \d\d:\d\d:\d\d, [123] of 5 online$/));
    await showsText(row("shop"), /shop (down|degraded) since .+ in (berlin|spare) is gone$/);
  }),

  "a selected group limits the field and is in the URL": withGroups(SHOP, async (world) => {
    await keepOnline(world, [2002, 2004, 2006], async () => {
      const { page } = await world.open();
      const { row, count, title } = on(page);
      await showsText(count, /^3$/);
      await expand(page, "shop", "shop/spare");
      await row("shop/spare").click();
      await showsText(count, /^1$/);
      assert.equal(await title.textContent(), "Objects online in shop/spare");
      assert.equal(await row("shop/spare").getAttribute("aria-selected"), "true");
      await page.getByRole("listbox", { name: "Objects online in shop/spare" }).press("Enter");
      await showsText(page.locator("#object-id"), /^2006$/);
      assert.equal(new URL(page.url()).hash, "#shop/spare:2006");

      await page.reload();
      await showsText(title, /^Objects online in shop\/spare$/);
      await showsText(page.locator("#object-id"), /^2006$/);
      await showsText(count, /^1$/);
      await row("shop/spare").waitFor();
      await page.getByRole("button", { name: "Close" }).click();
      assert.equal(new URL(page.url()).hash, "#shop/spare");
      await page.getByRole("button", { name: "Show all objects" }).click();
      await showsText(count, /^3$/);
      assert.equal(await title.textContent(), "Objects online");
      assert.equal(new URL(page.url()).hash, "");
      await page.evaluate(() => (location.hash = "#2002"));
      await showsText(page.locator("#object-id"), /^2002$/);
    });
  }),

  "the field is empty until the objects of the group arrive": withGroups(SHOP, async (world) => {
    const proxy = await world.proxy();
    const { page } = await world.open({}, proxy.url);
    const { count, row } = on(page);
    await keepOnline(world, [2006, 2010], async () => {
      await showsText(count, /^2$/);
      await row("42").waitFor();
      proxy.stream = "hold";
      await row("42").click();
      await showsText(count, /^–$/);
      await page.getByRole("listbox").press("Home");
      assert.equal(await page.locator("#field-active").textContent(), "No object");
      proxy.release();
      await showsText(count, /^1$/);
      await page.getByRole("listbox").press("Home");
      await showsText(page.locator("#field-active"), /^Object 2010/);
    });
  }),

  "the object panel follows an object outside the selected group": withGroups(SHOP, async (world) => {
    const { page } = await world.open({}, `${world.url}#shop/berlin:2006`);
    const { title } = on(page);
    const state = page.locator("#object-state");
    await showsText(title, /^Objects online in shop\/berlin$/);
    await showsText(state, /^(Gone|Not online)/);
    await world.post("2006");
    await showsText(state, /^Online/);
    await showsText(state, /^Gone/);
  }),

  "names are only text and work in URLs": withGroups(SHOP, async (world) => {
    const { page } = await world.open();
    const { row, rows, title, count } = on(page);
    await row("shop").waitFor();
    assert.equal(await page.getByRole("tree").locator("img").count(), 0);
    await rows.filter({ hasText: HOSTILE }).click();
    await showsText(title, /^Objects online in <img src=x onerror=fail\(\)>$/);
    await keepOnline(world, [2010, 2012], async () => {
      for (const [path, hash] of [["42", "#42:"], [SPECIAL, "#a%3Ab%20%252F%3F%23%C3%BC"]]) {
        await rows.filter({ has: page.getByText(path, { exact: true }) }).click();
        await showsText(count, /^1$/);
        assert.equal(new URL(page.url()).hash, hash);
        await page.reload();
        await until(`the title names ${path}`, async () => (await title.textContent()) === `Objects online in ${path}`);
        await showsText(count, /^1$/);
      }
    });
  }),

  "the keyboard moves in the tree, expands, collapses and selects": withGroups(SHOP, async (world) => {
    const { page } = await world.open();
    const { row, title } = on(page);
    await row("shop").waitFor();
    await page.locator("summary", { hasText: "Groups" }).focus();
    await page.keyboard.press("Tab");
    const press = async (key, path) => {
      await page.keyboard.press(key);
      assert.equal(await focusedPath(page), path, key);
    };
    assert.equal(await focusedPath(page), "shop");
    await press("ArrowRight", "shop");
    await row("shop/spare").waitFor();
    assert.equal(await row("shop").getAttribute("aria-expanded"), "true");
    assert.deepEqual(
      await Promise.all(["level", "posinset", "setsize"].map((name) => row("shop/spare").getAttribute(`aria-${name}`))),
      ["2", "2", "2"],
    );
    await press("ArrowRight", "shop/berlin");
    await press("ArrowDown", "shop/spare");
    await press("Enter", "shop/spare");
    await showsText(title, /^Objects online in shop\/spare$/);
    await press("ArrowLeft", "shop");
    await press("ArrowLeft", "shop");
    await until("shop is collapsed", async () => (await row("shop").getAttribute("aria-expanded")) === "false");
    await press("ArrowDown", HOSTILE);
    await press("End", "three");
    await press("ArrowUp", "two");
    await press("Home", "shop");
    await page.keyboard.press("Tab");
    await page.keyboard.press("Shift+Tab");
    assert.equal(await focusedPath(page), "shop");
  }),

  "a screen reader hears of the top and of the selected group": withGroups(SHOP, async (world) => {
    const { page } = await world.open();
    const { row, announcement } = on(page);
    const heard = [];
    await page.exposeFunction("hear", (text) => heard.push(text));
    await announcement.evaluate((element) => {
      new MutationObserver(() => window.hear(element.textContent)).observe(element, { childList: true, characterData: true, subtree: true });
    });
    // The limit is so short that a reading without a change, after 30 s, cannot do this.
    const hears = (pattern) => until(`${pattern} is announced`, () => heard.some((text) => pattern.test(text)), 15_000).catch((error) => {
      throw new Error(`${error.message}; announced: ${heard.join(" | ")}`);
    });
    await expand(page, "shop", "shop/spare");
    await showsText(row("shop"), /down/);
    await keepOnline(world, [2002, 2004, 2006], () => hears(/shop is up/));
    await hears(/shop is down: 200\d in (berlin|spare) is gone/);
    assert.deepEqual(heard.filter((text) => /shop\//.test(text)), []);
    await row("shop/spare").click();
    await keepOnline(world, [2002, 2004, 2006], () => hears(/shop\/spare is up/));
    // The stream of the selected group reports nothing of others, but the page still reads them.
    await row("42").click();
    for (let answers = 0; answers < 4; answers++) await page.waitForResponse("**/stats");
    await showsText(row("shop"), /down since/);
    heard.length = 0;
    await keepOnline(world, [2002, 2004, 2006], () => hears(/shop is up/));
  }),

  "two tabs follow different groups, also behind a path": withGroups(SHOP, async (world) => {
    const proxy = await world.proxy();
    const { page } = await world.open({}, `${proxy.url}#shop/berlin`);
    const other = await page.context().newPage();
    await other.goto(`${proxy.url}#shop/spare`);
    await keepOnline(world, [2002, 2004, 2006], async () => {
      await showsText(on(page).count, /^2$/);
      await showsText(on(other).count, /^1$/);
      await until("each group has one stream", () => proxy.streams === 2);
      await on(other).row("shop/berlin").click();
      await showsText(on(other).count, /^2$/);
      await until("the tabs share one stream", () => proxy.streams === 1);
    });
    await showsText(on(page).count, /^0$/);
    await showsText(on(other).count, /^0$/);
    assert.deepEqual(proxy.notFound, []);
  }),

  "more groups than a browser can follow are refused": withGroups(SHOP, async (world) => {
    const proxy = await world.proxy();
    const { page } = await world.open({}, `${proxy.url}#one`);
    const tabs = [page];
    for (const name of ["two", "three", "shop", "shop/berlin"]) {
      const tab = await page.context().newPage();
      await tab.goto(`${proxy.url}#${name}`);
      tabs.push(tab);
      if (name !== "shop/berlin") await showsText(on(tab).title, new RegExp(`in ${name}$`));
    }
    const last = tabs.at(-1);
    await showsText(on(last).note, /as many groups as they can/);
    await showsText(on(last).title, /^Objects online$/);
    for (const tab of tabs) await showsText(on(tab).connection, /^live$/);
    assert.ok(proxy.streams <= 5);
    await page.close();
    await on(last).row("shop/berlin").click();
    await showsText(on(last).title, /in shop\/berlin$/);
    await showsText(on(last).connection, /^live$/);
  }),

  "an unknown group in the URL shows all objects and says so": withGroups(SHOP, async (world) => {
    const { page } = await world.open({}, `${world.url}#shop/paris`);
    const { note, title, connection } = on(page);
    await showsText(note, /^There is no group shop\/paris/);
    await showsText(title, /^Objects online$/);
    await showsText(connection, /^live$/);
    assert.equal(new URL(page.url()).hash, "");
  }),

  "counts are read at most every two seconds, and only after changes": withGroups(SHOP, async (world) => {
    const { page } = await world.open();
    const { count, row, connection } = on(page);
    const readAt = [];
    page.on("request", (request) => new URL(request.url()).pathname === "/groups" && readAt.push(Date.now()));
    await showsText(connection, /^live$/);
    await showsText(count, /^0$/);
    await until("nothing has been read for three seconds", () => page.waitForTimeout(3000).then(() => Date.now() - (readAt.at(-1) ?? 0) > 3000));
    readAt.length = 0;
    await keepOnline(world, [2002, 2004, 2006], async () => {
      await showsText(row("shop"), /up since .+ 3 of 5 online/);
      for (let changes = 0; changes < 2; changes++) {
        // This changes no status, so there is no event about a group.
        await world.post("2008");
        await showsText(row("shop"), /up since .+ 4 of 5 online/, 15_000);
        await showsText(row("shop"), /up since .+ 3 of 5 online/, 15_000);
      }
    });
    const gaps = readAt.slice(1).map((at, index) => at - readAt[index]);
    assert.ok(gaps.length >= 3 && gaps.every((gap) => gap > 1800), `the groups were read after ${gaps.join()} ms`);
  }),

  "axe finds no problem in the tree, in any mode and width": withGroups(SHOP, async (world) => {
    const source = await axe();
    for (const colorScheme of ["dark", "light"]) {
      for (const width of [1280, 1000, 320]) {
        const settings = { colorScheme, viewport: { width, height: 740 }, bypassCSP: true, reducedMotion: "reduce" };
        const { page } = await world.open(settings, `${world.url}#shop/berlin`);
        await showsText(on(page).title, /in shop\/berlin$/);
        const summary = page.locator("summary", { hasText: "Groups" });
        if (width < 1080) {
          assert.ok(!(await on(page).row("shop").isVisible()), "the section is not collapsed on a phone");
          await summary.click();
        }
        await on(page).row("shop/spare").waitFor();
        await on(page).row("shop").focus();
        await page.evaluate(source);
        const { violations } = await page.evaluate("axe.run()");
        assert.deepEqual(violations.map(({ id, nodes }) => `${id}: ${nodes.map(({ html }) => html).join()}`), []);
        const overflow = await page.evaluate("document.documentElement.scrollWidth - innerWidth");
        assert.ok(overflow <= 0, `the page is ${overflow} pixels wider than a window of ${width}`);
      }
    }
  }),

  "the page shows all objects when the selected group is removed": withGroups(SHOP, async (world) => {
    const { page } = await world.open({}, `${world.url}#shop/spare`);
    const { row, note, title, connection } = on(page);
    await row("shop/spare").waitFor();
    const [{ children, ...shop }, ...others] = SHOP;
    world.groups = [{ ...shop, children: children.slice(0, 1) }, ...others];
    await writeFile(groupsFile(world), JSON.stringify(world.groups));
    await showsText(note, /^There is no group shop\/spare/);
    await showsText(title, /^Objects online$/);
    await showsText(connection, /^live$/);
    await row("shop/spare").waitFor({ state: "detached" });
    assert.ok(await row("shop/berlin").isVisible());
  }),

  "a thousand groups at the top are shown page by page": withGroups(MANY, async (world) => {
    const { page } = await world.open();
    const { rows, row } = on(page);
    await row("root 1").focus();
    await page.keyboard.press("End");
    for (let shown = 200; shown <= 1000; shown += 100) {
      await page.keyboard.press("Enter");
      await row(`root ${shown}`).waitFor({ state: "attached" });
    }
    await until("all rows are shown", async () => (await rows.count()) === 1000);
    assert.equal(await focusedPath(page), "root 901");
    assert.equal(await row("root 1000").getAttribute("aria-setsize"), "1000");
    await page.keyboard.press("End");
    assert.equal(await focusedPath(page), "root 1000");
    await keepOnline(world, [2002], () => showsText(row("root 1000"), /up since .+, 1 of 1 online$/));
  }),

  "the tree disappears when the viewer no longer has groups": withGroups(SHOP, async (world) => {
    const { page } = await world.open({}, `${world.url}#shop`);
    const { row, title, connection } = on(page);
    await row("shop").waitFor();
    await world.kill();
    world.groups = null;
    await world.boot();
    await row("shop").waitFor({ state: "detached" });
    await showsText(title, /^Objects online$/);
    await showsText(connection, /^live$/);
  }),
};
