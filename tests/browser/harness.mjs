// What the browser tests stand on: a gantry server of their own, a Chromium of their own, named checks with bounds.
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { randomBytes } from "node:crypto";
import { existsSync, mkdirSync, mkdtempSync, readFileSync, readdirSync, readlinkSync, rmSync } from "node:fs";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { chromium } from "playwright-core";

/** A server that is not ready after this never will be; a cold start under a loaded machine takes a few seconds. */
const READY_TIMEOUT_MS = 30_000;
/** From SIGTERM until the process is gone, before it is killed. */
const STOP_TIMEOUT_MS = 10_000;
/** One check, with everything it waits for. */
const CHECK_TIMEOUT_MS = 90_000;
/** One wait inside a check. */
export const WAIT_MS = 20_000;

const CHROMIUM_FLAGS = [
  "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
  "--disable-component-update", "--disable-sync",
];

/** The same tests against a cluster: the server is told so, and with it where everything is. */
export const ON_CLUSTER = process.env.GANTRY_PLATFORM === "kubernetes";
const CLUSTER_VARIABLES = /^(GANTRY_|KUBECONFIG$|S3_|AWS_|RUNNER_IMAGE$|DATABASE_IMAGE$|INGRESS_|DOMAIN$|APP_DOMAIN$|MANIFEST_TEMPLATE$)/;

export { sleep };

function freePort() {
  return new Promise((done, fail) => {
    const probe = createServer();
    probe.once("error", fail);
    probe.listen(0, "127.0.0.1", () => {
      const { port } = probe.address();
      probe.close(() => done(port));
    });
  });
}

/** Kills what a killed server left behind: processes whose arguments, environment or folder name this data folder. */
function killLeftovers(dataDir) {
  for (const pid of readdirSync("/proc").filter((name) => /^\d+$/.test(name))) {
    if (Number(pid) === process.pid) continue;
    try {
      const mine =
        readFileSync(`/proc/${pid}/cmdline`, "utf8").includes(dataDir) ||
        readFileSync(`/proc/${pid}/environ`, "utf8").includes(dataDir) ||
        readlinkSync(`/proc/${pid}/cwd`).startsWith(dataDir);
      if (mine) process.kill(Number(pid), "SIGKILL");
    } catch {
      // It has ended, or it is not ours to look at.
    }
  }
}

/** Servers that `stop` has not ended yet: an interrupted run stops them too, and with them their sandboxes. */
const unfinished = new Set();
let interrupted = false;
process.once("exit", () => {
  for (const server of unfinished) server.child?.kill("SIGTERM");
});
for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"]) {
  process.once(signal, () => {
    interrupted = true;
    Promise.allSettled([...unfinished].map((server) => server.stop())).finally(() => process.exit(1));
  });
}

export class Server {
  static async create({ apiKey = `test-${randomBytes(24).toString("hex")}`, variables = {} } = {}) {
    assert.ok(!interrupted, "the tests were interrupted");
    const binary = resolve(process.env.GANTRY_BIN ?? "target/debug/gantry");
    assert.ok(existsSync(binary), `no gantry at ${binary}; build it, or set GANTRY_BIN`);
    const server = new Server();
    Object.assign(server, { binary, apiKey, variables, port: await freePort(), dataDir: mkdtempSync(join(tmpdir(), "gantry-browser-")), log: "" });
    unfinished.add(server);
    server.origin = `http://127.0.0.1:${server.port}`;
    return server;
  }

  async start() {
    const { PATH, HOME, LANG } = process.env;
    const clusters = Object.entries(process.env).filter(([name]) => ON_CLUSTER && CLUSTER_VARIABLES.test(name));
    const env = { ...Object.fromEntries(clusters), ...this.variables, PATH, HOME, LANG, HOST: "127.0.0.1", PORT: String(this.port), GANTRY_DATA_DIR: this.dataDir };
    if (this.apiKey) env.API_KEY = this.apiKey;
    const child = spawn(this.binary, ["serve"], { env, stdio: ["ignore", "pipe", "pipe"] });
    this.child = child;
    this.ended = new Promise((done) => child.once("exit", (code, signal) => done(`exit code ${code}, signal ${signal}`)));
    for (const stream of [child.stdout, child.stderr]) {
      stream.setEncoding("utf8");
      stream.on("data", (text) => {
        this.log = (this.log + text).slice(-200_000);
      });
    }
    await this.ready();
  }

  async ready() {
    const deadline = Date.now() + READY_TIMEOUT_MS;
    while (Date.now() < deadline) {
      const ended = await Promise.race([this.ended, sleep(50, null)]);
      assert.equal(ended, null, `the server ended at start (${ended}):\n${this.log}`);
      const answer = await fetch(`${this.origin}/healthz`, { signal: AbortSignal.timeout(2_000) }).catch(() => null);
      if (answer?.ok) return;
    }
    throw new Error(`the server was not ready within ${READY_TIMEOUT_MS} ms:\n${this.log}`);
  }

  async kill() {
    this.child.kill("SIGKILL");
    await this.ended;
  }

  async stop() {
    if (this.child && this.child.exitCode === null && this.child.signalCode === null) {
      this.child.kill("SIGTERM");
      const ended = await Promise.race([this.ended, sleep(STOP_TIMEOUT_MS, null)]);
      if (ended === null) await this.kill();
    }
    killLeftovers(this.dataDir);
    rmSync(this.dataDir, { recursive: true, force: true, maxRetries: 5, retryDelay: 200 });
    unfinished.delete(this);
  }
}

export async function launchBrowser() {
  const executablePath = process.env.CHROMIUM ?? "/usr/bin/chromium";
  assert.ok(existsSync(executablePath), `no Chromium at ${executablePath}; install Debian's chromium, or set CHROMIUM`);
  // Playwright gives every launch a fresh profile and removes it.
  return chromium.launch({ executablePath, headless: true, args: CHROMIUM_FLAGS, timeout: READY_TIMEOUT_MS });
}

export function screenshotFolder() {
  const folder = process.env.GANTRY_SCREENSHOTS ? resolve(process.env.GANTRY_SCREENSHOTS) : mkdtempSync(join(tmpdir(), "gantry-screenshots-"));
  mkdirSync(folder, { recursive: true });
  return folder;
}

/** Watches a page for what must never happen: script errors, policy violations, requests to anywhere else. */
export function watch(page, allowedHosts) {
  const wrong = [];
  page.on("pageerror", (error) => wrong.push(`script error: ${error.message}`));
  page.on("console", (message) => {
    if (/Content Security Policy/i.test(message.text())) wrong.push(message.text());
  });
  page.on("request", (request) => {
    const { protocol, host } = new URL(request.url());
    if (protocol !== "data:" && !allowedHosts.includes(host)) wrong.push(`request to ${request.url()}`);
  });
  page.on("websocket", (socket) => {
    if (!allowedHosts.includes(new URL(socket.url()).host)) wrong.push(`WebSocket to ${socket.url()}`);
  });
  return wrong;
}

export class Checks {
  passed = 0;
  failed = 0;

  /** `onFailure` may take a screenshot; its own failure is not news. */
  constructor(onFailure = async () => {}) {
    this.onFailure = onFailure;
  }

  async check(name, body) {
    const began = performance.now();
    let timer;
    const bound = new Promise((_, fail) => {
      timer = setTimeout(() => fail(new Error(`not done within ${CHECK_TIMEOUT_MS} ms`)), CHECK_TIMEOUT_MS);
    });
    try {
      await Promise.race([body(), bound]);
      this.passed += 1;
      console.log(`ok   ${name} (${Math.round(performance.now() - began)} ms)`);
    } catch (error) {
      this.failed += 1;
      console.log(`FAIL ${name}\n${String(error.stack ?? error).replace(/^/gm, "     ")}`);
      await this.onFailure(name).catch(() => {});
    } finally {
      clearTimeout(timer);
    }
  }
}
