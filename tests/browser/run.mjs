// Drives the page in a real Chromium against a real server.
//
//   GANTRY_BIN=target/debug/gantry node tests/browser/run.mjs
//
// Screenshots go to $GANTRY_SCREENSHOTS or a temporary folder, whose name is printed.
import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { moduleChecks } from "./modules.mjs";
import { runTabTypingChecks } from "./typing.mjs";
import { Checks, Server, WAIT_MS, launchBrowser, screenshotFolder, sleep, watch } from "./harness.mjs";

const WIDE = { width: 1280, height: 800 };
const NARROW = { width: 400, height: 800 };

const shots = screenshotFolder();
let server;
let browser;
let page;
const pagesWrong = [];
const checks = new Checks(async (name) => {
  await page?.screenshot({ path: join(shots, `failed-${name.replace(/[^a-z0-9]+/gi, "-")}.png`) });
});

const byId = (id) => page.getByTestId(id);
const status = () => byId("verdict").first().getAttribute("data-status");
const shot = (name) => page.screenshot({ path: join(shots, `${name}.png`) });

async function openPage(context, url) {
  const opened = await context.newPage();
  opened.setDefaultTimeout(WAIT_MS);
  pagesWrong.push(watch(opened, [`127.0.0.1:${server.port}`, `dev-prod.apps.localhost:${server.port}`]));
  await opened.goto(url);
  return opened;
}

async function signIn(on, key) {
  await on.getByTestId("key").fill(key);
  await on.getByTestId("sign-in").click();
}

async function openTab(tab) {
  await page.locator(`[data-tab=${tab}]`).click();
}

async function writeCode(text) {
  await openTab("run");
  await page.locator(".cm-content").click();
  await page.keyboard.press("Control+a");
  await page.keyboard.insertText(text);
}

async function submissionId() {
  return (await byId("submission-id").textContent()).trim();
}

/** Starts what is in the editor by keyboard and returns the new submission's id. */
async function submit() {
  const before = (await byId("submission-id").count()) ? await submissionId() : "";
  await page.locator(".cm-content").press("Control+Enter");
  await page.waitForFunction((old) => document.querySelector("[data-testid=submission-id]")?.textContent.trim() !== old, before);
  return submissionId();
}

async function verdict(timeout = WAIT_MS) {
  await page.waitForFunction(
    () => document.querySelector("[data-testid=verdict]")?.dataset.status !== "running", null, { timeout });
  return status();
}

async function runCode(text, { deploy = false } = {}) {
  await writeCode(text);
  await byId("deploy").setChecked(deploy);
  await submit();
  return verdict();
}

async function waitForText(id, wanted, timeout = WAIT_MS) {
  await page.waitForFunction(
    ([name, text]) => document.querySelector(`[data-testid=${name}]`)?.textContent.includes(text), [id, wanted], { timeout });
}

const stages = () =>
  page.locator("section:not([hidden]) .stage").evaluateAll((all) => Object.fromEntries(all.map((one) => [one.dataset.stage, one.dataset.state])));

const ticks = (n) => Array.from({ length: n }, (_, i) => `tick ${i}\n`).join("");
const TICKING = (n) => `import time\nfor i in range(${n}):\n    print("tick", i, flush=True)\n    time.sleep(0.2)\n`;

async function signInChecks() {
  await checks.check("a wrong key is refused in words", async () => {
    await signIn(page, "not-a-key");
    await page.locator(".note.bad").waitFor();
    assert.ok((await page.locator(".note.bad").textContent()).length > 10);
    await shot("sign-in-refused");
  });
  await checks.check("the key signs in, and the editor and the connection come up", async () => {
    await signIn(page, server.apiKey);
    await page.locator("[data-editor=codemirror]").waitFor();
    await page.locator("[data-testid=connection][data-state=online]").waitFor();
    assert.equal(await byId("who").textContent(), "admin");
    await shot("empty");
  });
}

async function runChecks() {
  await checks.check("bad code shows a failed verdict, exit code 1 and the traceback on stderr", async () => {
    assert.equal(await runCode("print(1/0)", { deploy: true }), "tests_failed");
    await waitForText("stderr", "ZeroDivisionError");
    assert.equal(await page.locator("[data-fact='Exit code']").first().textContent(), "1");
    assert.ok(!(await byId("stdout").textContent()).includes("ZeroDivisionError"));
    const states = await stages();
    assert.equal(states.test, "failed");
    assert.equal(states.deploy, "skipped");
    await shot("bad-code");
  });
  await checks.check("good code is deployed, and its link shows its output", async () => {
    assert.equal(await runCode("print('Hello')", { deploy: true }), "deployed");
    await waitForText("stdout", "Hello");
    const states = await stages();
    for (const name of ["receive", "test", "publish", "deploy", "ready"]) assert.equal(states[name], "passed", name);
    const link = page.locator(".deployed-at a");
    assert.equal(await link.getAttribute("target"), "_blank");
    const url = await link.getAttribute("href");
    assert.equal(url, `http://dev-prod.apps.localhost:${server.port}/`);
    await shot("good-code");
    const [app] = await Promise.all([page.context().waitForEvent("page"), link.click()]);
    await app.waitForLoadState("domcontentloaded", { timeout: WAIT_MS });
    await app.getByText("Hello").first().waitFor({ timeout: WAIT_MS });
    await app.close();
  });
  await checks.check("failing test cases show what was expected and what came", async () => {
    await writeCode("print(input())");
    await byId("deploy").setChecked(false);
    await page.locator(".run-options > summary").click();
    await byId("add-case").click();
    const fields = page.locator(".case").first();
    await fields.getByLabel("Name").fill("echo");
    await fields.getByLabel("Standard input").fill("one\n");
    await fields.getByLabel("Expected output").fill("two\n");
    try {
      await submit();
      assert.equal(await verdict(), "tests_failed");
      const failed = page.locator(".test.failed").first();
      assert.match(await failed.textContent(), /echo/);
      await failed.locator(".diff-line.expected", { hasText: "two" }).waitFor();
      await failed.locator(".diff-line.actual", { hasText: "one" }).waitFor();
      await shot("test-cases");
    } finally {
      await page.getByRole("button", { name: "Remove case 1" }).click();
      await page.locator(".run-options > summary").click();
    }
  });
  await checks.check("input is typed while the program runs", async () => {
    await writeCode("print('Who?', flush=True)\nname = input()\nprint('Hello', name, flush=True)\nimport sys\nprint('rest', repr(sys.stdin.read()))\n");
    await byId("deploy").setChecked(false);
    await page.locator(".run-options > summary").click();
    await byId("interactive").setChecked(true);
    assert.ok(await byId("stdin-field").isDisabled());
    await shot("input-option");
    try {
      await submit();
      await waitForText("stdout", "Who?");
      await byId("input").fill("Ada");
      await shot("input");
      await byId("input").press("Enter");
      await waitForText("stdout", "Hello Ada");
      assert.equal(await byId("input").inputValue(), "");
      // Over a reload as well.
      await page.reload();
      await waitForText("stdout", "Hello Ada");
      await byId("input").fill("Grace");
      await byId("give-input").click();
      await byId("end-input").click();
      await byId("input-line").waitFor({ state: "detached" });
      assert.equal(await verdict(), "tests_passed");
      await waitForText("stdout", "rest 'Grace\\n'");
    } finally {
      const options = page.locator(".run-options");
      if ((await options.getAttribute("open")) === null) await options.locator("summary").click();
      await byId("interactive").setChecked(false);
      await options.locator("summary").click();
    }
    assert.equal(await byId("input-line").count(), 0);
  });
  await checks.check("Stop cancels a sleeping program", async () => {
    await writeCode("import time\nprint('asleep', flush=True)\ntime.sleep(9)\nprint('woke')");
    await submit();
    await waitForText("stdout", "asleep");
    await byId("stop").click();
    assert.equal(await verdict(5_000), "cancelled");
    assert.ok(!(await byId("stdout").textContent()).includes("woke"));
    await byId("run").waitFor();
  });
  await checks.check("markup that a program prints stays text", async () => {
    const markup = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>";
    await runCode(`print(${JSON.stringify(markup)})`);
    await waitForText("stdout", markup);
    assert.equal(await page.title(), "Gantry");
    assert.equal(await byId("stdout").locator("*").count(), 0);
  });
  await checks.check("a flood of lines stays bounded, and the page says what it dropped", async () => {
    await runCode("for i in range(30000): print('line', i)");
    await waitForText("stdout", "line 29999");
    await waitForText("stdout-note", "not shown here");
    const lines = (await byId("stdout").textContent()).split("\n").length;
    assert.ok(lines >= 2_000 && lines < 4_000, `${lines} lines are in the page`);
  });
}

async function resumeChecks() {
  await checks.check("a run goes on over SIGKILL and restart of the server, without gap or double", async () => {
    await writeCode(TICKING(30));
    const id = await submit();
    await waitForText("stdout", "tick 6");
    await server.kill();
    await page.locator("[data-testid=connection]:not([data-state=online])").waitFor();
    await shot("server-away");
    await server.start();
    await page.locator("[data-testid=connection][data-state=online]").waitFor();
    assert.equal(await verdict(30_000), "tests_passed");
    await sleep(200);
    assert.equal(await byId("stdout").textContent(), ticks(30));
    assert.equal(await submissionId(), id);
  });
  await checks.check("a reload in the middle of a run picks it up again", async () => {
    await writeCode(TICKING(15));
    const id = await submit();
    await waitForText("stdout", "tick 4");
    await page.reload();
    await page.locator("[data-editor=codemirror]").waitFor();
    assert.equal(await verdict(), "tests_passed");
    await sleep(200);
    assert.equal(await submissionId(), id);
    assert.equal(await byId("stdout").textContent(), ticks(15));
  });
}

async function offlineChecks() {
  await checks.check("a run started while the server is away is sent once it is back", async () => {
    await writeCode("print('late')");
    await server.kill();
    await page.locator("[data-testid=connection]:not([data-state=online])").waitFor();
    await submit();
    await server.start();
    assert.equal(await verdict(), "tests_passed");
    await waitForText("stdout", "late");
  });
}

async function listChecks() {
  await checks.check("the list of submissions opens the whole record", async () => {
    const id = await submissionId();
    await openTab("submissions");
    await page.locator(`[data-submission="${id}"]`).click();
    const record = byId("record");
    await record.getByText("tick 14", { exact: false }).first().waitFor();
    assert.equal(await record.getByTestId("verdict").getAttribute("data-status"), "tests_passed");
    assert.match(await record.locator(".code-text").textContent(), /range\(15\)/);
    assert.ok(page.url().includes(id), "the address names the submission");
    await shot("submission");
    await page.getByLabel("Status").selectOption("tests_failed");
    await page.waitForFunction((gone) => !document.querySelector(`[data-submission="${gone}"]`), id);
    await byId("submissions").locator("li").first().waitFor();
  });
  await checks.check("a stored submission opens in the editor", async () => {
    const row = page.locator(".row").first();
    const id = await row.getAttribute("data-submission");
    await row.click();
    await byId("record").getByRole("heading", { name: id }).waitFor();
    const code = await byId("record").locator(".code-text").textContent();
    await page.getByRole("button", { name: "Open in the editor" }).click();
    await page.waitForFunction(
      (text) => [...document.querySelectorAll(".cm-line")].map((line) => line.textContent).join("\n") === text, code);
    assert.match(page.url(), /#\/run$/);
  });
  await checks.check("the deployed repl and its releases are listed", async () => {
    await openTab("repls");
    await page.locator(".row", { hasText: "dev-prod" }).click();
    await byId("releases").getByText("current").waitFor();
    await shot("repls");
  });
  await checks.check("a module is created, its functions are found, and one is called", async () => {
    await openTab("modules");
    await byId("module-name").fill("math");
    await byId("create-module").click();
    // The first module of a server waits for pip.
    await page.locator(".row", { hasText: "math" }).locator("[data-state=running]").waitFor({ timeout: 240_000 });
    await page.locator("a.row", { hasText: "math" }).click();
    await byId("function-filter").fill("sqr");
    await page.locator("[data-function=sqrt]").click();
    await byId("call-form").getByText("Return the square root of x.").waitFor();
    await byId("call-args").fill("[16");
    await byId("call").click();
    await byId("call-wrong").getByText("Arguments").waitFor();
    await byId("call-args").fill("[16]");
    await byId("call").click();
    await byId("module-result").getByText("4").waitFor();
    await shot("modules");
    await byId("call-args").fill("[-1]");
    await byId("call").click();
    await byId("traceback").getByText("ValueError").waitFor();
    await byId("remove-module").click();
    await page.getByRole("button", { name: "Remove it" }).click();
    await page.getByText("No such module").waitFor();
  });
  await checks.check("without a cluster the Services tab says how to get one", async () => {
    await openTab("services");
    await byId("no-services").getByText("GANTRY_PLATFORM=kubernetes").waitFor();
    await shot("no-services");
  });
}

async function logChecks() {
  await checks.check("the log is searched, and every field of a record can be read", async () => {
    await openTab("logs");
    await byId("log-search").fill("ZeroDivisionError");
    await page.waitForFunction(() => {
      const rows = [...document.querySelectorAll(".log-row")];
      return rows.length > 0 && rows.every((row) => row.textContent.includes("ZeroDivisionError"));
    });
    await page.locator(".log-line").first().click();
    await page.locator(".log-fields").getByText("gantry.submission_id").waitFor();
    await shot("logs-search");
    await byId("log-search").fill("");
  });
  await checks.check("every level and step that can be chosen is one the server knows", async () => {
    for (const [parameter, group] of [["level", "Level"], ["step", "Step"]]) {
      const chips = page.getByRole("group", { name: group, exact: true }).locator(".chip");
      const count = await chips.count();
      assert.ok(count > 1);
      for (let index = 0; index < count; index++) {
        const chip = chips.nth(index);
        const value = (await chip.getAttribute("data-testid")).replace("chip-", "");
        const answered = page.waitForResponse((response) => response.url().includes(`${parameter}=${value}`));
        await chip.click();
        assert.equal((await answered).status(), 200, value);
        assert.equal(await chip.getAttribute("aria-pressed"), "true");
        await chip.click();
        assert.equal(await chip.getAttribute("aria-pressed"), "false");
      }
    }
  });
  await checks.check("the histogram counts what is shown, and a bar, a field's value and a link narrow to it", async () => {
    const shown = () => page.locator(".log-row").count();
    const query = () => new URLSearchParams(new URL(page.url()).hash.split("?")[1] ?? "");
    await page.waitForFunction(() => document.querySelectorAll(".log-row").length > 5);
    await page.waitForFunction(() => {
      const total = Number(document.querySelector("[data-testid=histogram]").dataset.total);
      return total === document.querySelectorAll(".log-row").length;
    });
    const before = await shown();
    assert.match(await byId("log-count").textContent(), new RegExp(`^${before} records shown$`));
    await page.locator(".bar:not(:disabled)").first().click();
    await byId("chip-time").waitFor();
    await page.waitForFunction((before) => {
      const rows = document.querySelectorAll(".log-row").length;
      return rows > 0 && rows < before;
    }, before);
    assert.ok(query().get("since") && query().get("until"), "the time stands in the address");
    await shot("logs-histogram");
    await byId("chip-time").click();
    await page.waitForFunction((before) => document.querySelectorAll(".log-row").length >= before, before);

    await page.locator(".log-line", { hasText: "submission.received" }).first().click();
    const step = await page.locator(".log-fields").textContent();
    assert.match(step, /submission\.received/);
    await byId("only-gantry.submission_id").click();
    await page.waitForFunction((before) => {
      const rows = document.querySelectorAll(".log-row").length;
      return rows > 1 && rows < before;
    }, before);
    const wanted = query().get("submission_id");
    assert.ok(wanted);
    // The address alone shows the same to somebody else.
    const other = await page.context().newPage();
    await other.goto(page.url());
    await other.waitForFunction((rows) => document.querySelectorAll(".log-row").length === rows, await shown());
    await other.close();

    await page.locator(".log-line").first().click();
    await byId("record-link").first().click();
    await page.waitForFunction(() => document.querySelectorAll(".log-row").length === 1);
    await openTab("run");
    await openTab("logs");
    await page.waitForFunction((before) => document.querySelectorAll(".log-row").length >= before, before);
  });
  await checks.check("what is shown can be saved, one record a line", async () => {
    await byId("chip-warn").click();
    await page.waitForFunction(() => {
      const rows = [...document.querySelectorAll(".log-row")];
      return rows.length > 0 && rows.every((row) => row.classList.contains("warn"));
    });
    const shown = await page.locator(".log-row").count();
    const [saved] = await Promise.all([page.waitForEvent("download"), byId("log-download").click()]);
    assert.match(saved.suggestedFilename(), /^gantry-logs-.*\.ndjson$/);
    const lines = readFileSync(await saved.path(), "utf8").trimEnd().split("\n").map((line) => JSON.parse(line));
    assert.equal(lines.length, shown);
    assert.ok(lines.every((record) => record["log.level"] === "warn"));
    await byId("chip-warn").click();
  });
  await checks.check("following pauses on scrolling up and jumps back to the end", async () => {
    const atEnd = () => page.evaluate(() => {
      const list = document.querySelector("[data-testid=logs]");
      return list.scrollHeight - list.scrollTop - list.clientHeight < 40;
    });
    await openTab("run");
    await writeCode(TICKING(40));
    await submit();
    await openTab("logs");
    await waitForText("logs", "tick 4");
    await page.waitForFunction(() => {
      const list = document.querySelector("[data-testid=logs]");
      return list.scrollHeight > list.clientHeight + 200;
    });
    assert.ok(await atEnd(), "following keeps the end in view");
    await byId("logs").hover();
    await page.mouse.wheel(0, -150);
    await byId("jump").waitFor();
    await page.waitForFunction(() => /new, jump to end/.test(document.querySelector("[data-testid=jump]")?.textContent ?? ""));
    const place = () => byId("logs").evaluate((list) => list.scrollTop);
    const before = await place();
    await sleep(700);
    assert.equal(await place(), before, "the list stands still while paused");
    await shot("logs-paused");
    await byId("jump").click();
    await page.waitForFunction(() => !document.querySelector("[data-testid=jump]"));
    await sleep(300);
    assert.ok(await atEnd(), "the button goes to the end");
    await openTab("run");
    await byId("stop").click();
    await verdict();
  });
}

async function lookChecks() {
  await checks.check("light, dark and narrow look right and nothing overflows sideways", async () => {
    await runCode("from math import sqrt\n\n# Primes by trial division\ndef is_prime(n):\n    return n > 1 and all(n % d for d in range(2, int(sqrt(n)) + 1))\n\nfor n in range(30):\n    if is_prime(n):\n        print(f\"{n:3} is prime\")\n", { deploy: true });
    await waitForText("stdout", "29 is prime");
    await sleep(200);
    const background = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
    const light = await background();
    await shot("light");
    await page.emulateMedia({ colorScheme: "dark" });
    assert.notEqual(await background(), light, "the page follows the system");
    await shot("dark");
    await byId("theme").click();
    assert.equal(await background(), light, "the toggle overrides the system");
    await byId("theme").click();
    await page.emulateMedia({ colorScheme: "light" });
    await page.setViewportSize(NARROW);
    for (const tab of ["submissions", "repls", "modules", "services", "logs", "run"]) {
      await openTab(tab);
      await sleep(400);
      const width = await page.evaluate(() => document.documentElement.scrollWidth);
      assert.ok(width <= NARROW.width, `${tab} is ${width} px wide`);
      await shot(`narrow-${tab}`);
    }
    await page.screenshot({ path: join(shots, "narrow-run-full.png"), fullPage: true });
    await page.setViewportSize(WIDE);
  });
}

/**
 * A page of its own whose WebSocket frames pass through `tamper(message, from)`: false loses the frame, "cut" also the connection.
 * It is signed in, and `use(opened)` runs something.
 */
async function throughBadWire(tamper, use) {
  const context = await browser.newContext({ viewport: WIDE });
  try {
    await context.routeWebSocket(/\/ws\/code/, (toPage) => {
      const toServer = toPage.connectToServer();
      const pass = (from, forward) => (message) => {
        const verdictOfWire = tamper(JSON.parse(message), from);
        if (verdictOfWire === "cut") {
          toPage.close();
          toServer.close();
        } else if (verdictOfWire !== false) forward(message);
      };
      toPage.onMessage(pass("page", (message) => toServer.send(message)));
      toServer.onMessage(pass("server", (message) => toPage.send(message)));
    });
    const opened = await openPage(context, server.origin);
    await signIn(opened, server.apiKey);
    await opened.locator("[data-editor=codemirror]").waitFor();
    await use(opened);
  } finally {
    await context.close();
  }
}

async function runIn(opened, code) {
  await opened.locator(".cm-content").click();
  await opened.keyboard.press("Control+a");
  await opened.keyboard.insertText(code);
  await opened.getByTestId("deploy").setChecked(false);
  await opened.getByTestId("run").click();
}

async function passes(opened, stdout) {
  await opened.locator("[data-testid=verdict][data-status=tests_passed]").waitFor();
  await sleep(200);
  assert.equal(await opened.getByTestId("stdout").textContent(), stdout);
}

async function tick(opened) {
  await runIn(opened, TICKING(5));
  await passes(opened, ticks(5));
}

async function wireChecks() {
  await checks.check("a submission that never arrived is sent again under the same id", async () => {
    const sent = [];
    await throughBadWire((message, from) => {
      if (from === "page") sent.push(message);
      return from === "page" && sent.length === 1 ? "cut" : true;
    }, tick);
    const [lost, resumed, again] = sent;
    assert.equal(resumed.resume, lost.submission_id);
    assert.equal(again.submission_id, lost.submission_id);
    assert.equal(sent.length, 3);
  });
  await checks.check("a lost frame is asked for again", async () => {
    let lost = null;
    const asked = [];
    await throughBadWire((message, from) => {
      if (from === "page") {
        if (message.resume) asked.push(message);
        return true;
      }
      if (lost !== null || message.event !== "output" || !message.data.includes("tick 2")) return true;
      lost = message.seq;
      return false;
    }, tick);
    assert.equal(asked[0].after, lost - 1);
  });
  await checks.check("a connection cut after every few frames loses nothing and doubles nothing", async () => {
    let frames = 0;
    await throughBadWire((_, from) => (from === "server" && ++frames % 4 === 0 && frames < 16 ? "cut" : true), tick);
    assert.ok(frames >= 8);
  });
  await checks.check("input and its end that a lost connection took along reach the program once", async () => {
    const sent = [];
    const lost = new Set();
    const takesAlong = (message) => message.stdin && (message.eof ? "the end" : message.data);
    await throughBadWire((message, from) => {
      if (from !== "page" || !message.stdin) return true;
      sent.push(message);
      const part = takesAlong(message);
      if ((part !== "two ü\n" && part !== "the end") || lost.has(part)) return true;
      lost.add(part);
      return "cut";
    }, async (opened) => {
      await opened.locator(".run-options > summary").click();
      await opened.getByTestId("interactive").setChecked(true);
      await runIn(opened, "import sys\nprint('up', flush=True)\nfor line in sys.stdin: print('got', line, end='', flush=True)\nprint('end')\n");
      await opened.getByTestId("stdout").getByText("up").waitFor();
      for (const line of ["one", "two ü", "three"]) {
        await opened.locator("[data-testid=connection][data-state=online]").waitFor();
        await opened.getByTestId("input").fill(line);
        await opened.getByTestId("give-input").click();
        await opened.getByTestId("stdout").getByText(`got ${line}`).waitFor();
      }
      await opened.getByTestId("end-input").click();
      await passes(opened, "up\ngot one\ngot two ü\ngot three\nend\n");
    });
    assert.deepEqual([...lost], ["two ü\n", "the end"]);
    for (const data of ["two ü\n", ""]) {
      const [first, ...again] = sent.filter((message) => message.data === data);
      assert.ok(again.length > 0 && again.every((message) => message.offset === first.offset), JSON.stringify(sent));
    }
  });
}

/** The Run tab in a context of its own, signed in. `prepare(context)` comes before the page. */
async function openRunTab(prepare = async () => {}) {
  const context = await browser.newContext({ viewport: WIDE });
  await prepare(context);
  const opened = await openPage(context, server.origin);
  await signIn(opened, server.apiKey);
  await opened.locator("[data-editor]").waitFor();
  return { page: opened, surface: opened.locator("section:not([hidden]) .cm-content"), close: () => context.close() };
}

async function sessionChecks() {
  await checks.check("without CodeMirror a plain text field works", async () => {
    const context = await browser.newContext({ viewport: WIDE });
    try {
      await context.route("**/vendor/codemirror.js", (route) => route.abort());
      const plain = await openPage(context, server.origin);
      await signIn(plain, server.apiKey);
      const field = plain.locator("[data-editor=plain] textarea");
      await field.fill("print('plain', 6 * 7)");
      await plain.getByTestId("deploy").setChecked(false);
      await field.press("Control+Enter");
      await plain.getByTestId("stdout").getByText("plain 42").waitFor();
      await plain.close();
    } finally {
      await context.close();
    }
  });
  await checks.check("signing out leaves nothing of the code, in no tab", async () => {
    const secret = "left-behind-by-ada";
    const { page: one, surface, close } = await openRunTab();
    try {
      const context = one.context();
      const two = await openPage(context, server.origin);
      for (const [opened, words] of [[two, "in the other tab"], [one, "here"]]) {
        await opened.bringToFront();
        await opened.locator(".cm-content").click();
        await opened.keyboard.press("Control+a");
        await opened.keyboard.insertText(`# ${secret} ${words}`);
        await opened.getByTestId("deploy").setChecked(false);
        await opened.getByTestId("run").click();
        await opened.locator("[data-testid=verdict][data-status=tests_passed]").waitFor();
        await opened.getByTestId("user").fill("ada");
        await opened.waitForFunction((secret) => JSON.stringify({ ...localStorage }).includes(secret), secret);
      }
      await one.getByRole("button", { name: "Sign out" }).click();
      for (const opened of [one, two]) {
        await opened.getByTestId("key").waitFor();
        // What would still be written is written when the page is left.
        await opened.reload();
        await opened.getByTestId("key").waitFor();
        const left = await opened.evaluate(() => JSON.stringify({ ...localStorage, ...sessionStorage }));
        assert.ok(!left.includes(secret) && !left.includes("ada"), left);
      }
      const made = spawnSync(server.binary, ["key", "create", "--user", "grace"], {
        env: { ...process.env, GANTRY_DATA_DIR: server.dataDir }, encoding: "utf8", timeout: WAIT_MS });
      // A key counts as soon as it is made.
      await signIn(one, made.stdout.trim());
      await one.locator("[data-editor=codemirror]").waitFor();
      assert.match(await surface.textContent(), /^print\('Hello'\)/);
      // The session ends by itself, and somebody else comes.
      await surface.click();
      await one.keyboard.press("Control+a");
      await one.keyboard.insertText("# written-by-grace");
      await one.waitForFunction(() => JSON.stringify({ ...localStorage }).includes("written-by-grace"));
      await context.clearCookies();
      await one.reload();
      await signIn(one, server.apiKey);
      await one.locator("[data-editor=codemirror]").waitFor();
      assert.match(await surface.textContent(), /^print\('Hello'\)/);
      assert.ok(!(await one.evaluate(() => JSON.stringify({ ...localStorage }))).includes("grace"));
    } finally {
      await close();
    }
  });
  await checks.check("signing out asks for a key again, also after a reload", async () => {
    await page.getByRole("button", { name: "Sign out" }).click();
    await byId("key").waitFor();
    await page.reload();
    await byId("key").waitFor();
  });
  await checks.check("the printed one-time address signs in and leaves no token in the address", async () => {
    const first = await Server.create({ apiKey: null });
    const context = await browser.newContext({ viewport: WIDE });
    try {
      await first.start();
      const printed = new RegExp(`http://[^\\s"]+/#token=[^\\s"]+`);
      const deadline = Date.now() + WAIT_MS;
      while (!printed.test(first.log) && Date.now() < deadline) await sleep(50);
      const [address] = printed.exec(first.log) ?? [];
      assert.ok(address, `no sign-in address was printed:\n${first.log}`);
      const opened = await context.newPage();
      await opened.goto(address);
      await opened.locator("[data-testid=connection][data-state=online]").waitFor({ timeout: WAIT_MS });
      assert.ok(!opened.url().includes("token"), opened.url());
    } finally {
      await context.close();
      await first.stop();
    }
  });
}

async function main() {
  server = await Server.create();
  try {
    await server.start();
    browser = await launchBrowser();
    const context = await browser.newContext({ viewport: WIDE, colorScheme: "light" });
    page = await openPage(context, server.origin);
    await signInChecks();
    await moduleChecks(checks, page);
    await runChecks();
    await resumeChecks();
    await listChecks();
    await logChecks();
    await offlineChecks();
    await wireChecks();
    await lookChecks();
    await runTabTypingChecks(checks, openRunTab);
    await sessionChecks();
    await checks.check("no script error, no policy violation, no request to anywhere else", async () => {
      assert.deepEqual(pagesWrong.flat(), []);
    });
  } catch (error) {
    checks.failed += 1;
    console.log(`FAIL the tests could not go on\n${error.stack}`);
  } finally {
    await browser?.close();
    await server.stop();
  }
  console.log(`screenshots: ${shots}`);
  console.log(`${checks.passed} passed, ${checks.failed} failed`);
  process.exitCode = checks.failed || !checks.passed ? 1 : 0;
}

await main();
