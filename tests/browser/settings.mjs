// What a repl runs with beside its code, in a real Chromium against a real server: variables and secrets, domains, replicas.
//
//   GANTRY_BIN=target/debug/gantry node tests/browser/settings.mjs
//   eval "$(scripts/testbed env)"; GANTRY_PLATFORM=kubernetes node tests/browser/settings.mjs     the same on a cluster
//
// Screenshots go to $GANTRY_SCREENSHOTS or a temporary folder, whose name is printed.
import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { randomBytes } from "node:crypto";
import { existsSync, mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { Dns } from "./dns.mjs";
import { Checks, ON_CLUSTER, Server, WAIT_MS, launchBrowser, screenshotFolder, watch } from "./harness.mjs";

const WIDE = { width: 1440, height: 900 };
const NARROW = { width: 400, height: 800 };
/** On a cluster an image is pulled, volumes are mounted, and addresses become known first. */
const START_MS = ON_CLUSTER ? 90_000 : WAIT_MS;

const RUN = ON_CLUSTER ? `-${randomBytes(3).toString("hex")}` : "";
const USER = `bea${RUN}`;
const REPL = `stall${RUN}`;
const DOMAIN = `stall${RUN}.example.com`;
/** It says what it was given, and goes on. */
const PROGRAM = "import os, time\nprint(os.environ.get('COLOUR'), os.environ.get('TOKEN'), flush=True)\ntime.sleep(10_000)\n";

const shots = screenshotFolder();
const dns = await Dns.start();
let server;
let page;
const checks = new Checks((name) => shot(`failed-${name.replace(/[^a-z0-9]+/gi, "-")}`));
const byId = (id) => page.getByTestId(id);
const shot = (name) => page.screenshot({ path: join(shots, `${name}.png`), fullPage: true });
const row = (at) => byId("variables").locator("li").nth(at);

async function api(method, path, body) {
  const headers = { "x-api-key": server.apiKey, "content-type": "application/json" };
  const response = await fetch(`${server.origin}${path}`, { method, headers, body: body && JSON.stringify(body), signal: AbortSignal.timeout(START_MS) });
  assert.ok(response.ok, `${method} ${path}: ${response.status} ${await response.clone().text()}`);
  return response.json();
}

async function add(name, value, secret) {
  const count = await byId("variables").locator("li").count();
  await byId("add-variable").click();
  await row(count).locator("[data-field=name]").fill(name);
  await row(count).locator("[data-field=value]").fill(value);
  await row(count).locator("[data-field=secret]").setChecked(secret);
}

async function save() {
  const saved = page.waitForResponse((one) => one.url().endsWith(`/repls/${REPL}/env`) && one.request().method() === "PUT", { timeout: START_MS });
  await byId("save-variables").click();
  assert.equal((await saved).status(), 200);
}

async function variableChecks() {
  await checks.check("variables and secrets are given; a secret is not shown again", async () => {
    await add("COLOUR", "red", false);
    await add("TOKEN", "hush-hush", true);
    await shot("settings-variables");
    await save();
    const secret = page.getByLabel("Value of TOKEN");
    await secret.and(page.getByPlaceholder("stays as it is")).waitFor();
    assert.equal(await secret.inputValue(), "");
    assert.equal(await page.getByLabel("Value of COLOUR").inputValue(), "red");
    const told = await api("GET", `/repls/${REPL}/env`);
    assert.deepEqual([told.env, told.secrets], [{ COLOUR: "red" }, ["TOKEN"]]);
    assert.doesNotMatch(await page.content(), /hush-hush/);
  });
  await checks.check("the program has them, a secret that was left alone too", async () => {
    await page.getByLabel("Value of COLOUR").fill("green");
    await save();
    const workspace = await page.context().newPage();
    await workspace.goto(new URL(await byId("open-workspace").getAttribute("href"), page.url()).href);
    await workspace.getByTestId("output").getByText("green hush-hush").waitFor({ timeout: START_MS });
    await workspace.close();
  });
  await checks.check("a name that is no name, or there twice, is refused before anything is sent", async () => {
    const sent = [];
    const note = (request) => request.method() === "PUT" && sent.push(request.url());
    page.on("request", note);
    await add("2ND", "x", false);
    await byId("save-variables").click();
    assert.equal(await row(2).locator("[data-field=name]").evaluate((field) => field.validity.patternMismatch), true);
    await row(2).locator("[data-field=name]").fill("COLOUR");
    await byId("save-variables").click();
    await byId("variables").getByRole("alert").getByText("COLOUR is there twice").waitFor();
    await shot("settings-twice");
    assert.deepEqual(sent, []);
    page.off("request", note);
    await row(2).getByRole("button").click();
    await page.getByLabel("Remove TOKEN").click();
    await save();
    assert.deepEqual((await api("GET", `/repls/${REPL}/env`)).secrets, []);
  });
}

async function domainChecks() {
  await checks.check("a domain is asked to be proved, with what to put into the DNS, and is there when it is", async () => {
    await byId("domain").fill("not a name");
    await byId("add-domain").click();
    await byId("domains").getByRole("alert").waitFor();
    await byId("domain").fill(DOMAIN);
    await byId("add-domain").click();
    await byId("proof").waitFor();
    const [name, type, value] = (await byId("proof").textContent()).split(" ");
    assert.deepEqual([name, type], [`_gantry.${DOMAIN}`, "TXT"]);
    await shot("settings-proof");
    dns.texts.set(name, value);
    await byId("add-domain").click();
    await page.getByLabel(`Remove ${DOMAIN}`).waitFor({ timeout: START_MS });
    assert.equal(await byId("proof").count(), 0);
    assert.deepEqual((await api("GET", `/repls/${REPL}/domains`)).domains, [DOMAIN]);
    await shot("settings-domain");
    await page.getByLabel(`Remove ${DOMAIN}`).click();
    await page.getByLabel(`Remove ${DOMAIN}`).waitFor({ state: "detached", timeout: START_MS });
    assert.deepEqual((await api("GET", `/repls/${REPL}/domains`)).domains, []);
  });
}

async function scaleChecks() {
  if (ON_CLUSTER) {
    await checks.check("replicas are given by number", async () => {
      await byId("scale-replicas").fill("2");
      await byId("scale-repl").click();
      await byId("settings").locator("summary").getByText("2 replicas").waitFor({ timeout: START_MS });
      await shot("settings-scaled");
    });
    return;
  }
  await checks.check("more replicas than one machine has are refused, with what to do", async () => {
    for (const auto of [false, true]) {
      await byId("autoscale").setChecked(auto);
      await byId(auto ? "scale-max" : "scale-replicas").fill("3");
      await byId("scale-repl").click();
      await byId("scale").getByRole("alert").getByText("GANTRY_PLATFORM=kubernetes").waitFor();
    }
    await shot("settings-scale-refused");
    assert.equal((await api("GET", `/repls/${REPL}`)).replicas, 1);
  });
}

async function lookChecks() {
  await checks.check("on a narrow screen and in the dark nothing is cut off", async () => {
    await page.setViewportSize(NARROW);
    await add("A_LONG_NAME_THAT_A_NARROW_SCREEN_HAS_NO_ROOM_FOR", "value", false);
    const wide = await page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
    assert.equal(wide, 0, "the page scrolls sideways");
    await shot("settings-narrow");
    await page.emulateMedia({ colorScheme: "dark" });
    await page.setViewportSize(WIDE);
    await shot("settings-dark");
  });
}

async function dataChecks() {
  await checks.check("what a repl keeps is shown, and is deleted when it is stopped and its user says so", async () => {
    if (ON_CLUSTER) return;
    assert.match(await byId("data").innerText(), /keeps nothing/);
    const folder = join(server.dataDir, "local", "databases", REPL);
    mkdirSync(folder, { recursive: true });
    writeFileSync(join(folder, "db.sqlite3"), randomBytes(3 << 20));
    await api("POST", "/stop", { replId: REPL });
    await byId("data").getByText(/take 3\.0 MiB of at most 1\.0 GiB/).waitFor();
    await byId("data").scrollIntoViewIfNeeded();
    await shot("settings-data");
    await byId("delete-data").click();
    await shot("settings-data-question");
    await page.getByRole("button", { name: "Delete the data", exact: true }).click();
    await byId("data").getByText(/keeps nothing/).waitFor();
    assert.ok(!existsSync(join(folder, "db.sqlite3")));
  });
}

/** Nothing of this run stays in the cluster. */
async function cleanUp() {
  await api("POST", "/stop", { replId: REPL });
  const namespaces = [`user-${USER}`, process.env.GANTRY_NAMESPACE];
  spawnSync(process.env.TESTBED_KUBECTL ?? "kubectl", ["delete", "namespace", ...namespaces, "--ignore-not-found", "--wait=false"], { timeout: START_MS });
}

let browser;
if (ON_CLUSTER) process.env.GANTRY_NAMESPACE = `gantry-settings${RUN}`;
server = await Server.create({ variables: { GANTRY_NAMESERVER: dns.address } });
try {
  await server.start();
  await api("POST", "/start", { replId: REPL, userId: USER, language: "python", files: { "main.py": PROGRAM } });
  browser = await launchBrowser();
  const context = await browser.newContext({ viewport: WIDE, colorScheme: "light" });
  page = await context.newPage();
  page.setDefaultTimeout(WAIT_MS);
  const wrong = watch(page, [new URL(server.origin).host]);
  await page.goto(`${server.origin}/#/repls/${REPL}`);
  await byId("key").fill(server.apiKey);
  await byId("sign-in").click();
  await byId("settings").locator("summary").click();
  await byId("add-variable").waitFor();
  await variableChecks();
  await domainChecks();
  await scaleChecks();
  await lookChecks();
  await dataChecks();
  await checks.check("no script error, no policy violation, no request to anywhere else", async () => {
    assert.deepEqual(wrong, []);
  });
} catch (error) {
  checks.failed += 1;
  console.log(`FAIL the tests could not go on\n${error.stack}`);
} finally {
  await browser?.close();
  if (ON_CLUSTER) await cleanUp().catch((error) => console.log(`not cleaned up: ${error.message}`));
  await server.stop();
  dns.stop();
}
console.log(`screenshots: ${shots}`);
console.log(`${checks.passed} passed, ${checks.failed} failed`);
process.exitCode = checks.failed || !checks.passed ? 1 : 0;
