// Drives a repl's workspace in a real Chromium: real server, real runner, the program's own page.
//
//   GANTRY_BIN=target/debug/gantry node tests/browser/workspace.mjs
//   eval "$(scripts/testbed env)"; GANTRY_PLATFORM=kubernetes node tests/browser/workspace.mjs     the same on a cluster
//
// Screenshots go to $GANTRY_SCREENSHOTS or a temporary folder, whose name is printed.
import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { randomBytes } from "node:crypto";
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { typingChecks } from "./typing.mjs";
import { Checks, ON_CLUSTER, Server, WAIT_MS, launchBrowser, screenshotFolder, sleep, watch } from "./harness.mjs";

const WIDE = { width: 1440, height: 900 };
const MIDDLE = { width: 1100, height: 760 };
const NARROW = { width: 400, height: 800 };
/** On a cluster an image is pulled, volumes are mounted, and addresses become known first. */
const START_MS = ON_CLUSTER ? 90_000 : WAIT_MS;

const RUN = ON_CLUSTER ? `-${randomBytes(3).toString("hex")}` : "";
const USER = `ada${RUN}`;
const REPL = `shop${RUN}`;
const RELEASED = `shown${RUN}`;

const SERVING = `import http.server

PAGE = b"<!doctype html><title>Shop</title><h1>Open for business</h1><p>Served by main.py."


class Shop(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("content-type", "text/html")
        self.end_headers()
        self.wfile.write(PAGE)

    def log_message(self, *_):
        print("asked for", self.path, flush=True)


print("listening", flush=True)
http.server.HTTPServer(("", 3000), Shop).serve_forever()
`;

const shots = screenshotFolder();
let server;
let browser;
let context;
let page;
let wrong = [];
const checks = new Checks((name) => shot(`failed-${name.replace(/[^a-z0-9]+/gi, "-")}`));

const byId = (id) => page.getByTestId(id);
const shot = (name) => page.screenshot({ path: join(shots, `${name}.png`) });
const tab = (id) => page.locator(`[data-dock="${id}"]`);
const treeItem = (path) => byId("tree").locator(`[data-path="${path}"]`);
const editing = () => page.locator("[data-editing]:not([hidden]) .cm-content");
const terminal = (name) => page.locator(`[data-terminal="${name}"]`);
const programIs = (state, timeout = WAIT_MS) => page.locator(`[data-testid=program-state][data-state=${state}]`).waitFor({ timeout });

const waitFor = (what, argument, timeout = WAIT_MS) => page.waitForFunction(what, argument, { timeout });

/** Until the terminal shows this; lines that are wrapped count as one. */
const shows = (name, text, timeout = WAIT_MS) =>
  waitFor(([name, text]) => {
    const rows = [...document.querySelectorAll(`[data-terminal="${name}"] .xterm-rows > div`)];
    return rows.map((row) => row.textContent.replaceAll("\u00a0", " ")).join("").includes(text);
  }, [name, text], timeout);

async function type(name, text) {
  await terminal(name).locator(".xterm-helper-textarea").focus();
  // xterm.js takes a text without keys, as an input method gives it, only when no key seems to be held; F6 let go elsewhere does.
  await page.keyboard.press("Shift");
  await page.keyboard.insertText(text);
  await page.keyboard.press("Enter");
}

async function write(text) {
  await editing().click();
  await page.keyboard.press("Control+a");
  await page.keyboard.insertText(text);
}

const text = () => editing().evaluate((content) => [...content.querySelectorAll(".cm-line")].map((line) => line.textContent).join("\n"));
const isDirty = (path, dirty) => page.locator(`[data-file="${path}"][data-dirty=${dirty}]`).waitFor();

async function answer(value, action) {
  await byId("asked").fill(value);
  await page.getByRole("button", { name: action, exact: true }).click();
}

async function openPage(url, size = WIDE) {
  page = await context.newPage();
  page.setDefaultTimeout(WAIT_MS);
  await page.setViewportSize(size);
  const hosts = [REPL, RELEASED].flatMap((repl) => [`${repl}.apps.localhost:${server.port}`, `${repl}.apps.localhost`]);
  wrong.push(watch(page, [`127.0.0.1:${server.port}`, ...hosts]));
  await page.goto(url);
}

async function startChecks() {
  await checks.check("a new repl is named, started and begun with a first file", async () => {
    await byId("key").fill(server.apiKey);
    await byId("sign-in").click();
    await page.locator("[data-tab=repls]").click();
    await byId("new-repl").click();
    await byId("new-repl-user").fill(USER);
    await byId("new-repl-name").fill("Not a name");
    await byId("start-repl").click();
    assert.equal(await byId("new-repl-name").evaluate((field) => field.validity.patternMismatch), true);
    await byId("new-repl-name").fill(REPL);
    await byId("new-repl-language").selectOption("python");
    await shot("new-repl");
    await byId("start-repl").click();
    await treeItem("main.py").waitFor({ timeout: START_MS });
    await editing().waitFor();
    assert.equal((await text()).trim(), "print('Hello')");
  });
  await checks.check("a name that is another's is refused in the dialog, with the reason", async () => {
    const opened = page;
    await openPage(`${server.origin}/#/repls`);
    await byId("new-repl").click();
    await byId("new-repl-user").fill(`${USER}x`);
    await byId("new-repl-name").fill(REPL);
    await byId("start-repl").click();
    await page.getByRole("dialog").getByRole("alert").getByText("replId is not available").first().waitFor();
    await shot("new-repl-refused");
    await page.keyboard.press("Escape");
    await page.getByRole("dialog").waitFor({ state: "hidden" });
    await byId("repls").locator(".row", { hasText: REPL }).waitFor();
    await page.close();
    page = opened;
  });
}

async function editChecks() {
  await checks.check("what is typed is marked until Ctrl+S saves it, in the workspace and in the store", async () => {
    await write(SERVING);
    await isDirty("main.py", true);
    const stored = page.waitForResponse((response) => response.url().endsWith(`/repls/${REPL}/save`));
    await page.keyboard.press("Control+s");
    await isDirty("main.py", false);
    assert.equal((await stored).status(), 200);
    assert.ok((await (await stored).json()).written >= 1);
  });
  await checks.check("Ctrl+Enter saves and runs; output, state and the program's page are shown as they come", async () => {
    await write(SERVING.replace("business", "everybody"));
    await page.keyboard.press("Control+Enter");
    await isDirty("main.py", false);
    await programIs("serving");
    await waitFor(() => document.querySelector("[data-testid=output]").textContent.includes("listening"));
    await tab("page").click();
    const frame = page.frameLocator("[data-testid=app-frame]");
    await frame.getByText("Open for everybody").waitFor();
    assert.equal(await byId("app-frame").getAttribute("src"), await page.locator(".workspace-url a").getAttribute("href"));
    await shot("workspace-page");
    await tab("output").click();
    await waitFor(() => document.querySelector("[data-testid=output]").textContent.includes("asked for /"));
    await shot("workspace-output");
  });
  await checks.check("a program is stopped, and one that fails shows its traceback and exit code", async () => {
    await byId("stop-program").click();
    await programIs("ended");
    await write("print('before', flush=True)\nraise SystemExit(3)\n");
    await byId("run-program").click();
    await page.getByText("ended, exit code 3").waitFor();
    // Of this run alone.
    assert.equal((await byId("output").textContent()).trim(), "before");
    await write("1/0\n");
    await page.keyboard.press("Control+Enter");
    await waitFor(() => document.querySelector("[data-testid=output]").textContent.includes("ZeroDivisionError"));
    await page.getByText("ended, exit code 1").waitFor();
    await write(SERVING);
    await page.keyboard.press("Control+Enter");
    await programIs("serving");
  });
}

async function terminalChecks() {
  await checks.check("terminals speak UTF-8, take the window's size, and there may be several", async () => {
    await byId("new-terminal").click();
    await terminal("1").locator(".xterm-rows").waitFor();
    await type("1", "echo $((6*7)) grüße 😀; pwd");
    await shows("1", "42 grüße 😀");
    const size = async (marker) => {
      await type("1", `echo ${marker}=$(stty size)`);
      await waitFor((marker) => new RegExp(`${marker}=\\d+ \\d+`).test(document.querySelector('[data-terminal="1"] .xterm-rows').textContent), marker);
      const all = await terminal("1").locator(".xterm-rows").textContent();
      const [, rows, columns] = new RegExp(`${marker}=(\\d+) (\\d+)`).exec(all).map(Number);
      return { rows, columns };
    };
    const before = await size("before");
    await page.setViewportSize({ width: WIDE.width + 200, height: WIDE.height + 60 });
    await sleep(400);
    const after = await size("after");
    assert.ok(after.columns > before.columns && after.rows > before.rows, JSON.stringify({ before, after }));
    await page.setViewportSize(WIDE);
    await byId("new-terminal").click();
    await type("2", "echo sec''ond");
    await shows("2", "second");
    await tab(">1").click();
    await shows("1", "42 grüße");
    await shot("workspace-terminal");
  });
  await checks.check("after a reload the terminals are there, with what they showed and what ran on", async () => {
    await type("1", "(sleep 1; echo while-a''way) &");
    await page.reload();
    await tab(">2").waitFor();
    await tab(">1").click();
    await shows("1", "42 grüße 😀");
    await shows("1", "while-away");
    await type("1", "echo sti''ll");
    await shows("1", "still");
  });
  await checks.check("a flood is drawn or let go, stays bounded, and Ctrl+C ends it", async () => {
    const heap = () => page.evaluate(() => performance.memory.usedJSHeapSize);
    const before = await heap();
    await type("1", "yes abcdefghijklmnopqrstuvwxyz | head -c 60000000; echo flood-is-o''ver");
    await sleep(1_500);
    await terminal("1").locator(".xterm-helper-textarea").focus();
    await page.keyboard.press("Control+c");
    await type("1", "echo al''ive");
    await shows("1", "alive", 60_000);
    const grown = (await heap()) - before;
    assert.ok(grown < 100 << 20, `the page grew by ${grown} bytes`);
  });
  await checks.check("a shell that ends says how, and Enter brings a new one; a closed one is gone", async () => {
    await tab(">2").click();
    await type("2", "exit 5");
    await shows("2", "ended with exit code 5");
    await page.keyboard.press("Enter");
    await type("2", "echo ano''ther");
    await shows("2", "another");
    await page.getByRole("button", { name: "Close Terminal 2" }).click();
    await tab(">2").waitFor({ state: "detached" });
    await page.reload();
    await tab(">1").waitFor();
    assert.equal(await tab(">2").count(), 0);
  });
}

async function openedFile() {
  const address = `${server.origin}/#/repls/${REPL}?view=workspace&file=main.py`;
  const other = await context.newPage();
  other.setDefaultTimeout(WAIT_MS);
  await other.goto(address);
  const surface = other.locator("[data-editing]:not([hidden]) .cm-content");
  await surface.waitFor();
  // What was typed is not saved, and leaving asks about that.
  return { page: other, surface, close: () => other.close({ runBeforeUnload: false }) };
}

async function treeChecks() {
  await checks.check("files are made, renamed and deleted, and deleting asks first", async () => {
    await byId("new-file").click();
    await answer("lib/greet.py", "Make it");
    await treeItem("lib/greet.py").waitFor();
    await page.locator('[data-file="lib/greet.py"]').waitFor();
    await write("def greet():\n    return 'hi'\n");
    await treeItem("lib").click();
    await byId("new-folder").click();
    await answer("lib/deep", "Make it");
    await treeItem("lib/deep").waitFor();
    await treeItem("lib/greet.py").click();
    await byId("rename").click();
    await answer("lib/hello.py", "Rename it");
    await treeItem("lib/hello.py").waitFor();
    // The editor goes along, with what was typed.
    await isDirty("lib/hello.py", true);
    await page.keyboard.press("Escape");
    await editing().click();
    await page.keyboard.press("Control+s");
    await isDirty("lib/hello.py", false);
    await treeItem("lib/hello.py").click();
    await byId("delete").click();
    await page.getByRole("button", { name: "Keep as it is" }).click();
    assert.equal(await treeItem("lib/hello.py").count(), 1);
    await treeItem("lib").click();
    await byId("delete").click();
    await page.getByRole("dialog").getByText("2 files and folders").waitFor();
    await page.getByRole("button", { name: "Delete it" }).click();
    await treeItem("lib").waitFor({ state: "detached" });
    await page.locator('[data-file="lib/hello.py"]').waitFor({ state: "detached" });
  });
  await checks.check("an upload of bytes arrives whole, and comes back by a download", async () => {
    const bytes = randomBytes(1_400_000);
    await byId("upload-files").setInputFiles({ name: "data.bin", mimeType: "application/octet-stream", buffer: bytes });
    await treeItem("data.bin").waitFor();
    await waitFor(() => !document.querySelector(".uploading"));
    await treeItem("data.bin").click();
    const note = page.locator(".workspace-notes [role=alert]");
    await note.getByText("data.bin is not text").waitFor();
    const [saved] = await Promise.all([page.waitForEvent("download"), byId("download").click()]);
    assert.equal(saved.suggestedFilename(), "data.bin");
    assert.ok(readFileSync(await saved.path()).equals(bytes), "other bytes came back");
    await note.waitFor({ state: "detached" });
    await byId("delete").click();
    await page.getByRole("button", { name: "Delete it" }).click();
    await treeItem("data.bin").waitFor({ state: "detached" });
  });
  await checks.check("what a program makes and changes shows up by itself", async () => {
    await tab(">1").click();
    await type("1", "mkdir -p made && echo one > made/by-program.txt");
    await treeItem("made").click();
    await treeItem("made/by-program.txt").click();
    await waitFor(() => document.querySelector("[data-editing]:not([hidden]) .cm-content")?.textContent === "one");
    await type("1", "echo two > made/by-program.txt");
    await waitFor(() => document.querySelector("[data-editing]:not([hidden]) .cm-content")?.textContent === "two");
    // The editor knows one kind of line end; that it shows these as its own is no typing.
    await type("1", "printf 'three\\r\\nand\\n' > made/by-program.txt");
    await waitFor(() => document.querySelector("[data-editing]:not([hidden]) .cm-content")?.textContent === "threeand");
    await sleep(300);
    await isDirty("made/by-program.txt", false);
  });
  await checks.check("what was typed is not lost to a change: the person chooses", async () => {
    await write("mine");
    await type("1", "echo theirs > made/by-program.txt");
    await byId("conflict").waitFor();
    assert.equal(await text(), "mine");
    await shot("workspace-conflict");
    await page.getByRole("button", { name: "Keep what I typed" }).click();
    await editing().click();
    await page.keyboard.press("Control+s");
    await isDirty("made/by-program.txt", false);
    await type("1", "cat made/by-program.txt; echo");
    await shows("1", "mine");
    await write("mine again");
    await type("1", "echo theirs again > made/by-program.txt");
    await page.getByRole("button", { name: "Take the changed file" }).click();
    await waitFor(() => document.querySelector("[data-editing]:not([hidden]) .cm-content").textContent === "theirs again");
    await isDirty("made/by-program.txt", false);
  });
  await checks.check("what is refused is said with its cause", async () => {
    await treeItem("made/by-program.txt").click();
    await byId("rename").click();
    await answer("main.py", "Rename it");
    const note = page.locator(".workspace-notes [role=alert]");
    await note.getByText("made/by-program.txt was not renamed").waitFor();
    assert.match(await note.textContent(), /exists/i);
    await shot("workspace-refused");
    await byId("rename").click();
    await answer("../outside.txt", "Rename it");
    await waitFor(() => /\.\./.test(document.querySelector(".workspace-notes [role=alert]").textContent));
    await page.getByRole("button", { name: "Dismiss" }).click();
    assert.equal(await note.count(), 0);
    assert.equal(await treeItem("made/by-program.txt").count(), 1);
  });
}

async function keyboardChecks() {
  await checks.check("tree, editor and terminal are all reached and left by keyboard", async () => {
    await treeItem("made").focus();
    const focused = () => page.evaluate(() => document.activeElement.dataset.path ?? document.activeElement.className);
    await page.keyboard.press("End");
    assert.equal(await focused(), "main.py");
    await page.keyboard.press("Enter");
    await page.locator('[data-file="main.py"][aria-selected=true]').waitFor();
    await page.keyboard.press("Home");
    assert.equal(await focused(), "made");
    if ((await treeItem("made").getAttribute("aria-expanded")) === "true") await page.keyboard.press("ArrowLeft");
    assert.equal(await treeItem("made").getAttribute("aria-expanded"), "false");
    await page.keyboard.press("ArrowRight");
    await page.keyboard.press("ArrowRight");
    assert.equal(await focused(), "made/by-program.txt");
    await page.keyboard.press("ArrowLeft");
    assert.equal(await focused(), "made");
    await page.keyboard.press("F6");
    assert.match(await focused(), /cm-content/);
    await page.keyboard.press("F6");
    assert.match(await focused(), /xterm-helper-textarea/);
    await page.keyboard.press("F6");
    assert.equal(await focused(), "made");
    const bar = page.getByRole("separator", { name: "Size of the editor" });
    const before = Number(await bar.getAttribute("aria-valuenow"));
    await bar.focus();
    await page.keyboard.press("ArrowRight");
    await waitFor((before) => Number(document.querySelector("[aria-label='Size of the editor']").getAttribute("aria-valuenow")) > before, before);
    await page.keyboard.press("ArrowLeft");
  });
  await checks.check("every control has a name", async () => {
    const nameless = await page.evaluate(() =>
      [...document.querySelectorAll("button, a[href], input, select, iframe, [role=tab], [role=treeitem], [role=separator]")]
        .filter((element) => element.offsetParent !== null)
        .filter((element) => !(element.getAttribute("aria-label") || element.textContent.trim() || element.title || element.labels?.length))
        .map((element) => element.outerHTML.slice(0, 120)));
    assert.deepEqual(nameless, []);
  });
}

async function lookChecks() {
  await checks.check("light and dark, wide, middle and narrow: nothing overflows sideways", async () => {
    await treeItem("main.py").click();
    await tab(">1").click();
    await type("1", "clear; ls --color=always -la; echo; printf '\\e[31mred \\e[32mgreen \\e[33myellow \\e[34mblue \\e[35mmagenta \\e[36mcyan\\e[0m\\n'");
    await shows("1", "cyan");
    for (const scheme of ["light", "dark"]) {
      await page.emulateMedia({ colorScheme: scheme });
      for (const [name, size] of Object.entries({ wide: WIDE, middle: MIDDLE, narrow: NARROW })) {
        await page.setViewportSize(size);
        await sleep(400);
        const width = await page.evaluate(() => document.documentElement.scrollWidth);
        assert.ok(width <= size.width, `${name} is ${width} px wide`);
        await page.screenshot({ path: join(shots, `workspace-${scheme}-${name}.png`), fullPage: true });
      }
    }
    const background = await terminal("1").locator(".xterm-scrollable-element").evaluate((element) => getComputedStyle(element).backgroundColor);
    assert.equal(background, "rgb(22, 27, 34)", "the terminal follows the theme");
    await page.emulateMedia({ colorScheme: "light" });
    await page.setViewportSize(MIDDLE);
    await byId("turn").click();
    await sleep(300);
    await shot("workspace-turned");
    await byId("turn").click();
    await page.setViewportSize(WIDE);
  });
}

async function awayChecks() {
  if (ON_CLUSTER) return;
  await checks.check("while the server is away the page says so, keeps what is typed, and comes back by itself", async () => {
    await write(`${SERVING}# typed before\n`);
    await server.kill();
    await byId("workspace-connection").getByText("Reconnecting").waitFor();
    await editing().click();
    await page.keyboard.press("Control+End");
    await page.keyboard.insertText("# typed meanwhile");
    await shot("workspace-away");
    await server.start();
    await byId("workspace-connection").waitFor({ state: "detached" });
    await isDirty("main.py", true);
    assert.match(await text(), /typed before[^]*typed meanwhile/);
    await page.keyboard.press("Control+s");
    await isDirty("main.py", false);
    await tab(">1").click();
    await type("1", "tail -n 1 main.py");
    await shows("1", "# typed meanwhile");
  });
}

async function stopChecks() {
  await checks.check("unsaved text is still there after a look at another tab", async () => {
    await write(`${SERVING}# not saved`);
    await page.locator("[data-tab=submissions]").click();
    await byId("workspace").waitFor({ state: "detached" });
    await page.goBack();
    await isDirty("main.py", true);
    assert.match(await text(), /not saved/);
    await editing().click();
    await page.keyboard.press("Control+s");
    await isDirty("main.py", false);
  });
  await checks.check("what cannot be kept is named before it is lost", async () => {
    await tab(">1").click();
    await type("1", "ln -s /etc/passwd outside; ln -s main.py inside");
    await byId("not-kept").getByText("outside (the link leads out of the workspace)").waitFor();
    await treeItem("outside").getByTestId("unkept").waitFor();
    assert.equal(await treeItem("inside").getByTestId("unkept").count(), 0);
    await shot("workspace-not-kept");
  });
  await checks.check("a stopped repl says so, and started again it has its files", async () => {
    await byId("stop-repl").click();
    await page.getByRole("dialog").getByText("Its files are saved first").waitFor();
    await page.getByRole("dialog").getByText("outside (the link leads out of the workspace)").waitFor();
    await shot("workspace-stop-loses");
    await page.getByRole("button", { name: "Stop it" }).click();
    await byId("start").waitFor({ timeout: START_MS });
    await page.getByRole("alert").getByText("Not everything was kept").waitFor();
    await shot("workspace-stopped");
    await byId("start").click();
    await treeItem("main.py").waitFor({ timeout: START_MS });
    await treeItem("made").waitFor();
    await treeItem("inside").waitFor();
    assert.equal(await treeItem("outside").count(), 0);
    await waitFor(() => /not saved/.test([...document.querySelectorAll(".cm-content")].map((one) => one.textContent).join()));
    await programIs("serving", START_MS);
  });
}

/** Submits by the command line, as a person would. */
function submit(code) {
  const file = join(shots, "main.py");
  writeFileSync(file, code);
  const env = { ...process.env, API_KEY: server.apiKey, GANTRY_SERVER: server.origin };
  const done = spawnSync(server.binary, ["submit", file, "--repl", RELEASED, "--user", USER], { env, encoding: "utf8", timeout: START_MS });
  assert.equal(done.status, 0, done.stderr);
}

async function releaseChecks() {
  await checks.check("a release is looked at, not changed", async () => {
    submit("print('first')");
    submit("print('second')");
    await page.goto(`${server.origin}/#/repls/${RELEASED}`);
    await byId("open-workspace").click();
    await byId("is-release").waitFor();
    await editing().waitFor({ timeout: START_MS });
    assert.match(await text(), /second/);
    await editing().click();
    await page.keyboard.type("x");
    assert.match(await text(), /^print\('second'\)/);
    for (const id of ["new-file", "upload", "rename", "delete", "save", "run-program"]) assert.equal(await byId(id).count(), 0, id);
    await waitFor(() => document.querySelector("[data-testid=output]").textContent.includes("second"));
    await shot("workspace-release");
  });
  await checks.check("an earlier release serves again after a yes", async () => {
    await page.locator(".back-link").click();
    await byId("releases").getByText("current").waitFor();
    await page.getByRole("button", { name: "Roll back to 1" }).click();
    await page.getByRole("button", { name: "Keep as it is" }).click();
    await page.getByRole("button", { name: "Roll back to 1" }).click();
    await page.getByRole("button", { name: "Serve release 1" }).click();
    await waitFor(() => {
      const row = [...document.querySelectorAll("[data-testid=releases] tbody tr")].find((one) => one.cells[0].textContent === "1");
      return row?.cells[1].textContent === "current";
    }, null, START_MS);
    await shot("repl-rolled-back");
  });
  await checks.check("a repl is deleted when its name is typed, having said what goes with it", async () => {
    await byId("delete-repl").click();
    await page.getByRole("dialog").getByText("1 file, 2 releases").waitFor();
    await shot("repl-delete");
    await answer("another", "Delete it");
    await page.getByRole("alert").getByText("is not deleted").waitFor();
    await byId("delete-repl").click();
    await answer(RELEASED, "Delete it");
    await byId("delete-repl").waitFor({ state: "detached", timeout: START_MS });
    await page.locator(".row-title", { hasText: REPL }).first().waitFor();
    assert.equal(await page.locator(".row-title", { hasText: RELEASED }).count(), 0);
  });
}

/** Nothing of this run stays in the cluster. */
async function cleanUp() {
  const headers = { "x-api-key": server.apiKey, "content-type": "application/json" };
  for (const replId of [REPL, RELEASED]) {
    await fetch(`${server.origin}/stop`, { method: "POST", headers, body: JSON.stringify({ replId }) });
  }
  const namespaces = [`user-${USER}`, process.env.GANTRY_NAMESPACE];
  spawnSync(process.env.TESTBED_KUBECTL ?? "kubectl", ["delete", "namespace", ...namespaces, "--ignore-not-found", "--wait=false"], { timeout: START_MS });
}

async function main() {
  if (ON_CLUSTER) process.env.GANTRY_NAMESPACE = `gantry-page${RUN}`;
  server = await Server.create();
  try {
    await server.start();
    browser = await launchBrowser();
    context = await browser.newContext({ viewport: WIDE, colorScheme: "light", permissions: ["clipboard-read", "clipboard-write"] });
    await openPage(server.origin);
    await startChecks();
    await editChecks();
    await typingChecks(checks, "Workspace", openedFile);
    await terminalChecks();
    await treeChecks();
    await keyboardChecks();
    await lookChecks();
    await awayChecks();
    await stopChecks();
    await releaseChecks();
    await checks.check("no script error, no policy violation, no request to anywhere else", async () => {
      assert.deepEqual(wrong.flat(), []);
    });
  } catch (error) {
    checks.failed += 1;
    console.log(`FAIL the tests could not go on\n${error.stack}`);
  } finally {
    await browser?.close();
    if (ON_CLUSTER) await cleanUp().catch((error) => console.log(`not cleaned up: ${error.message}`));
    await server.stop();
  }
  console.log(`screenshots: ${shots}`);
  console.log(`${checks.passed} passed, ${checks.failed} failed`);
  process.exitCode = checks.failed || !checks.passed ? 1 : 0;
}

await main();
