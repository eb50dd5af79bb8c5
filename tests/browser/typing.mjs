// Typing as fast as a person, a macro or a slow machine makes it: every letter stays, where it was typed.
import assert from "node:assert/strict";
import { sleep } from "./harness.mjs";

/** No line begins with a blank and none opens a block, so that the editor indents nothing by itself. */
const TYPED = Array.from({ length: 4 }, (_, n) => `print(${n}, "the quick brown fox ${n}")\n`).join("");
/** Longer than the page takes from a key press to everything that follows from it. */
const SETTLED_MS = 600;
/** How fast keys come, and how many times slower than this machine the page's is. */
const PACES = [
  { delay: 0, slower: 1 },
  { delay: 10, slower: 1 },
  { delay: 0, slower: 4 },
  { delay: 10, slower: 4 },
];

/** A page that hangs does so for good; a busy machine types a letter in less than a second. */
const HANGS_MS = 150_000;

/** A page that hangs must fail the check, not hang it. */
async function within(what, doing) {
  let timer;
  const late = new Promise((_, fail) => {
    timer = setTimeout(() => fail(new Error(`the page hangs: ${what} took more than ${HANGS_MS} ms`)), HANGS_MS);
  });
  try {
    return await Promise.race([doing, late]);
  } finally {
    clearTimeout(timer);
  }
}

/** What stands in CodeMirror or in the plain text field. */
const textOf = (surface) => surface.evaluate((element) =>
  element.value ?? [...element.querySelectorAll(".cm-line")].map((line) => line.textContent).join("\n"));

async function staysTyped(surface, wanted) {
  await sleep(SETTLED_MS);
  assert.equal(await within("reading what was typed", textOf(surface)), wanted);
}

async function typeInto(page, surface, { delay, slower }) {
  const devtools = await page.context().newCDPSession(page);
  await surface.click();
  await page.keyboard.press("Control+a");
  await page.keyboard.press("Delete");
  await devtools.send("Emulation.setCPUThrottlingRate", { rate: slower });
  await within(`typing ${TYPED.length} letters`, page.keyboard.type(TYPED, { delay }));
  await within("slowing down no more", devtools.send("Emulation.setCPUThrottlingRate", { rate: 1 }));
  await staysTyped(surface, TYPED);
  await devtools.detach();
}

/** In the editor that `open()` shows on a page of its own, which may hang: `{page, surface, close}`. */
export async function typingChecks(checks, where, open) {
  await checks.check(`${where}: what is typed stays, at any speed`, async () => {
    const { page, surface, close } = await open();
    try {
      for (const pace of PACES) await typeInto(page, surface, pace);
    } finally {
      await close();
    }
  });
}

/** In the Run tab: beside a program that prints, in the plain text field, and while CodeMirror comes in its place. */
export async function runTabTypingChecks(checks, open) {
  const withField = async (answer, use) => {
    const { page, close } = await open((context) => context.route("**/vendor/codemirror.js", answer));
    try {
      await use(page, page.locator("[data-editor=plain] textarea"));
    } finally {
      await close();
    }
  };
  await typingChecks(checks, "Run", open);
  await checks.check("Run: what is typed stays while a program prints", async () => {
    const { page, surface, close } = await open();
    try {
      await surface.click();
      await page.keyboard.press("Control+a");
      await page.keyboard.insertText("import time\nfor i in range(4000):\n    print(i, '=' * 60, flush=True)\n    time.sleep(0.002)\n");
      await page.getByTestId("deploy").setChecked(false);
      await page.getByTestId("run").click();
      await page.getByTestId("stdout").getByText("=====").waitFor();
      await typeInto(page, surface, { delay: 30, slower: 4 });
      // On a slow machine typing takes longer than the 10 s that the program may run: then it has ended.
      const ended = page.locator("[data-testid=verdict][data-status]").waitFor();
      await Promise.any([page.getByTestId("stop").click(), ended]);
    } finally {
      await close();
    }
  });
  await checks.check("Run: what is typed into the plain text field stays", () =>
    withField((route) => route.abort(), async (page, field) => {
      for (const pace of PACES) await typeInto(page, field, pace);
    }));
  await checks.check("Run: typing goes on where it was when the editor has loaded", async () => {
    let letIn;
    const wait = new Promise((done) => { letIn = done; });
    await withField(async (route) => { await wait; await route.continue(); }, async (page, field) => {
      await field.click();
      await page.keyboard.press("Control+a");
      const typing = page.keyboard.type(TYPED, { delay: 15 });
      await sleep(500);
      letIn();
      await within("typing", typing);
      await page.locator("[data-editor=codemirror]").waitFor();
      await staysTyped(page.locator("section:not([hidden]) .cm-content"), TYPED);
    });
  });
}
