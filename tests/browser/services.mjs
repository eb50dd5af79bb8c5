// Drives the Services tab in a real Chromium against a server with a cluster; tests/kubernetes/services.py starts it.
//
//   GANTRY_URL=http://127.0.0.1:8000 API_KEY=… GANTRY_SERVICE=user/shop node tests/browser/services.mjs
//
// The service exists and has three replicas. It is scaled to four, then deleted.
import assert from "node:assert/strict";
import { join } from "node:path";
import { Checks, WAIT_MS, launchBrowser, screenshotFolder, watch } from "./harness.mjs";

const { GANTRY_URL: url, API_KEY: key, GANTRY_SERVICE: service } = process.env;
const shots = screenshotFolder();
const browser = await launchBrowser();
const page = await browser.newPage({ viewport: { width: 1280, height: 900 } });
page.setDefaultTimeout(WAIT_MS);
const wrong = watch(page, [new URL(url).host]);
const byId = (id) => page.getByTestId(id);
const shot = (name) => page.screenshot({ path: join(shots, `${name}.png`), fullPage: true });
const checks = new Checks((name) => shot(`failed-${name.replace(/[^a-z0-9]+/gi, "-")}`));
const running = (wanted) =>
  page.waitForFunction((text) => document.querySelector("[data-testid=running]")?.textContent === text, wanted, { timeout: 60_000 });
const name = service.split("/")[1];

await checks.check("nodes and services are shown as they are", async () => {
  await page.goto(`${url}/#/services`);
  await byId("key").fill(key);
  await byId("sign-in").click();
  await byId("nodes").locator("[data-state=healthy]").first().waitFor();
  await page.locator(".row", { hasText: service.split("/")[0] }).click();
  await running("3/3");
  assert.equal(await byId("containers").locator("tbody tr").count(), 3);
  await byId("timeline").locator("[data-event=started]").first().waitFor();
  await shot("services");
});
await checks.check("it is scaled by the control, and the page follows", async () => {
  await byId("replicas").fill("4");
  await byId("scale").click();
  await running("4/4");
  await byId("timeline").locator("[data-event=scaled]").first().waitFor();
});
await checks.check("deleting asks first, and leaves it when the answer is no", async () => {
  await byId("delete-service").click();
  await page.getByRole("dialog").getByText(`Delete ${name}?`).waitFor();
  await shot("services-delete");
  await page.getByRole("button", { name: "Keep as it is" }).click();
  await running("4/4");
  await byId("delete-service").click();
  await page.getByRole("button", { name: "Delete it" }).click();
  await page.getByText("No such service").waitFor();
});
await checks.check("the page did nothing that it must not", async () => assert.deepEqual(wrong, []));
await browser.close();
console.log(`${checks.passed} passed, ${checks.failed} failed; screenshots are in ${shots}`);
process.exit(checks.failed ? 1 : 0);
