// Starts a Lastseen and a browser for the tests, and waits for what the page shows.
import { spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtemp, readFile, rm } from "node:fs/promises";
import { createWriteStream } from "node:fs";
import { createRequire } from "node:module";
import { createServer as createHttpServer, request } from "node:http";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";

const { LASTSEEN, CHROMIUM, NODE_PACKAGES } = process.env;
const require = createRequire(join(NODE_PACKAGES, "/"));
const { chromium } = require("playwright-core");

// The deadline of each wait.
const DEADLINE_MS = 30_000;

// Objects expire soon, and the status API answers fast.
const SETTINGS = {
  OBJECT_TTL: "3s",
  ROUTINE_INTERVAL: "500ms",
  LATENCY_MIN: "100ms",
  LATENCY_MAX: "500ms",
  ADMIN_ADDR: "127.0.0.1:0",
  TESTER_ADDR: "127.0.0.1:0",
};

/** All roles in one process on files, without the simulated partner: only the tests post callbacks. */
export class World {
  proxies = [];

  static async start() {
    const world = new World();
    world.home = await mkdtemp(join(tmpdir(), "lastseen-page-"));
    [world.viewerPort, world.producerPort] = await freePorts(2);
    await world.boot();
    world.browser = await chromium.launch({
      executablePath: CHROMIUM,
      // Chromium refuses to run its sandbox as root.
      args: process.getuid() === 0 ? ["--no-sandbox"] : [],
    });
    return world;
  }

  get url() {
    return `http://127.0.0.1:${this.viewerPort}/`;
  }

  async boot(settings = {}) {
    const log = createWriteStream(join(this.home, "log"), { flags: "a" });
    this.process = spawn(LASTSEEN, ["--no-partner"], {
      env: {
        ...process.env,
        ...SETTINGS,
        ...settings,
        LASTSEEN_DIR: join(this.home, "data"),
        VIEWER_ADDR: `127.0.0.1:${this.viewerPort}`,
        PRODUCER_ADDR: `127.0.0.1:${this.producerPort}`,
      },
      stdio: ["ignore", "pipe", "pipe"],
    });
    this.process.stdout.pipe(log);
    this.process.stderr.pipe(log);
    this.exited = once(this.process, "exit");
    await until("the viewer answers", async () => (await fetch(`${this.url}stats`)).ok);
    await until("the producer answers", async () => (await fetch(`http://127.0.0.1:${this.producerPort}/`)).status === 404);
  }

  async kill() {
    this.process.kill("SIGKILL");
    await this.exited;
  }

  /** Posts a callback with these ids. They are strings, because a JavaScript number cannot hold all ids. */
  async post(...ids) {
    const response = await fetch(`http://127.0.0.1:${this.producerPort}/callback`, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: `{"object_ids":[${ids.join()}]}`,
    });
    if (response.status !== 200) throw new Error(`the callback was answered ${response.status}`);
  }

  /** Opens the page in a new window; `consoleErrors` collects its errors. */
  async open(settings = {}, url = this.url) {
    const context = await this.browser.newContext({ viewport: { width: 1280, height: 800 }, ...settings });
    const page = await context.newPage();
    page.setDefaultTimeout(DEADLINE_MS);
    const consoleErrors = [];
    page.on("pageerror", (error) => consoleErrors.push(error.message));
    page.on("console", (message) => {
      // Without GROUPS_FILE, the viewer answers 404 to the page's request for groups.
      const isExpected = new URL(message.location().url || url).pathname.endsWith("/groups");
      if (message.type() === "error" && !isExpected) consoleErrors.push(message.text());
    });
    await page.goto(url);
    return { page, consoleErrors };
  }

  /** Starts a proxy that serves the viewer under `/presence/`. The proxy ends when the pages are closed. */
  async proxy() {
    const proxy = await PathProxy.start(this.viewerPort);
    this.proxies.push(proxy);
    return proxy;
  }

  async closePages() {
    await Promise.all(this.browser.contexts().map((context) => context.close()));
    for (const proxy of this.proxies.splice(0)) proxy.end();
  }

  async log() {
    return readFile(join(this.home, "log"), "utf8").catch(() => "");
  }

  async end() {
    await this.browser?.close();
    if (this.process.exitCode === null && this.process.signalCode === null) await this.kill();
    await rm(this.home, { recursive: true, force: true });
  }
}

/** Forwards requests under `/presence/` without that prefix, and answers 404 to all others. */
class PathProxy {
  /** What happens to the stream: "pass" forwards it, "refuse" answers 503, "hold" holds it back after its head. */
  stream = "pass";
  /** Limit of the stream, instead of the page's own. */
  limit = null;
  /** The paths that were answered 404, and the number of open streams. */
  notFound = [];
  streams = 0;
  #held = [];

  static async start(port) {
    const proxy = new PathProxy();
    proxy.server = createHttpServer((incoming, outgoing) => proxy.#forward(incoming, outgoing, port)).listen(0, "127.0.0.1");
    await once(proxy.server, "listening");
    return proxy;
  }

  get url() {
    return `http://127.0.0.1:${this.server.address().port}/presence/`;
  }

  /** Sends the first part of a list on each stream that is held back. */
  begin() {
    const part = { objects: [{ id: "1", last_seen: new Date().toISOString() }], remaining: "follow" };
    for (const { outgoing } of this.#held) outgoing.write(`event: snapshot\ndata: ${JSON.stringify(part)}\n\n`);
  }

  /** Forwards streams that were held back, and all later ones. */
  release() {
    this.stream = "pass";
    for (const { pass } of this.#held.splice(0)) pass();
  }

  end() {
    this.server.close();
    this.server.closeAllConnections();
  }

  #forward(incoming, outgoing, port) {
    const isStream = incoming.url.startsWith("/presence/events");
    if (!incoming.url.startsWith("/presence/")) {
      this.notFound.push(incoming.url);
      return outgoing.writeHead(404).end();
    }
    if (isStream && this.stream === "refuse") return outgoing.writeHead(503).end();
    let path = incoming.url.slice("/presence".length);
    if (isStream && this.limit) path = path.replace(/limit=\d+/, `limit=${this.limit}`);
    const onward = request({ host: "127.0.0.1", port, path, headers: incoming.headers }, (response) => {
      if (response.statusCode === 404) this.notFound.push(incoming.url);
      outgoing.writeHead(response.statusCode, response.headers).flushHeaders();
      const pass = () => response.pipe(outgoing);
      if (isStream && this.stream === "hold") this.#held.push({ pass, outgoing });
      else pass();
    });
    if (isStream) {
      this.streams += 1;
      outgoing.on("close", () => (this.streams -= 1));
    }
    onward.on("error", () => outgoing.destroy());
    outgoing.on("close", () => onward.destroy());
    onward.end();
  }
}

/** Waits until `condition` returns true. The error message of a timeout includes the last error of `condition`. */
export async function until(description, condition, within = DEADLINE_MS) {
  const deadline = Date.now() + within;
  let reason = "";
  while (Date.now() < deadline) {
    try {
      if (await condition()) return;
      reason = "";
    } catch (error) {
      reason = `: ${error.message}`;
    }
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  throw new Error(`timed out waiting until ${description}${reason}`);
}

/** Waits until the element's text matches the pattern. */
export async function showsText(locator, pattern, within = DEADLINE_MS) {
  let text = "";
  await until(`the text matches ${pattern}`, async () => {
    text = (await locator.textContent()).trim();
    return pattern.test(text);
  }, within).catch((error) => {
    throw new Error(`${error.message}; the text is "${text}"`);
  });
}

export const axe = () => readFile(require.resolve("axe-core/axe.min.js"), "utf8");

// All ports are open at once, so that they differ.
async function freePorts(count) {
  const servers = Array.from({ length: count }, () => createServer().listen(0, "127.0.0.1"));
  await Promise.all(servers.map((server) => once(server, "listening")));
  const ports = servers.map((server) => server.address().port);
  await Promise.all(servers.map((server) => once(server.close(), "close")));
  return ports;
}
