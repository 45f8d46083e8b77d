// Follows the page of an experiment while it is trained: node web/test/live.mjs <training.html> <seconds> [<folder for screenshots>]
// Says "ready" once the page is open, and prints one JSON object of what was seen when the last run is done;
// tests/test_live_page.py trains meanwhile and judges.
import { chromium } from "playwright-core";
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
import { join, resolve } from "node:path";
import { pathToFileURL } from "node:url";
import { executable, flags, newPage } from "./browser.mjs";

const [file, seconds, shots] = process.argv.slice(2);
const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const found = { errors: [], requests: [], said: [], lines: {}, shaded: {}, labels: [], violations: [] };

const browser = await chromium.launch({ executablePath: executable(), args: flags });
try {
  const page = await newPage(browser, { viewport: { width: 1240, height: 900 } });
  page.on("console", (message) => { if (["error", "warning"].includes(message.type())) found.errors.push(message.text()); });
  page.on("pageerror", (error) => found.errors.push(String(error)));
  page.on("request", (request) => { if (!/^(file|data|blob|about):/.test(request.url())) found.requests.push(request.url()); });
  await page.goto(pathToFileURL(resolve(file)).href);
  await page.waitForSelector(".hw-training");
  found.before = await page.locator(".hw-training").textContent();
  console.log("ready");

  const summary = page.locator(".hw-summary");
  const runs = (await page.locator(".hw-run option").count()) - 1;
  const last = `Run ${runs} of ${runs},`;
  const end = Date.now() + Number(seconds) * 1000;
  for (let said = ""; Date.now() < end && !(said.startsWith(last) && said.includes("done after")); ) {
    said = await summary.textContent();
    if (said !== found.said.at(-1)) {
      found.said.push(said);
      // The length of the longest line, in points: it grows with the tape.
      const points = await page.locator(".hw-curves path[fill=none], .hw-curves g[fill=none] path").evaluateAll((all) => Math.max(0, ...all.map((one) => one.getAttribute("d").split(/[ML]/).length - 1)));
      found.lines[said] = points;
    }
    await page.waitForTimeout(60);
  }
  found.labels = await page.locator('.hw-curves [role="img"]').evaluateAll((all) => all.map((one) => one.getAttribute("aria-label")));
  found.address = new URL(page.url()).hash;

  // A run of the reader's choice, also by its link.
  for (const place of await page.locator(".hw-run option").evaluateAll((all) => all.map((one) => one.value).filter(Boolean))) {
    await page.locator(".hw-run select").selectOption(place);
    await page.waitForFunction((name) => document.querySelector(".hw-summary").textContent.includes(`, ${name}: `), await page.locator(`.hw-run option[value="${place}"]`).textContent());
    await page.waitForTimeout(100);
    found.shaded[place] = { key: await page.locator(".hw-training .hw-key").textContent(), boxes: await page.locator('.hw-curves [fill="var(--hw-attend)"] rect').count() };
    found.chosen = new URL(page.url()).hash;
  }
  await page.evaluate(axe);
  const result = await page.evaluate(() => window.axe.run(document, { resultTypes: ["violations"] }));
  found.violations = result.violations.map((one) => `${one.id}: ${one.nodes[0]?.html.slice(0, 160)}`);
  if (shots) await page.screenshot({ path: join(shots, "live.png"), fullPage: true });
  const linked = await newPage(browser);
  await linked.goto(pathToFileURL(resolve(file)).href + found.chosen);
  await linked.waitForSelector(".hw-curves");
  found.linked = await linked.locator(".hw-run select").inputValue();
} finally {
  await browser.close();
}
console.log(JSON.stringify(found));
