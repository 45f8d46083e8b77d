// node web/screenshot.mjs <report.html> <out.png> [#hash] [--dark] [--width=1440] [--full]
import { chromium } from "playwright-core";
import { resolve } from "node:path";
import { pathToFileURL } from "node:url";
import { executable, flags } from "./test/browser.mjs";

const [report, out, ...rest] = process.argv.slice(2);
if (!report || !out) {
  console.error("Usage: node web/screenshot.mjs <report.html> <out.png> [#hash] [--dark] [--width=1440] [--full]");
  process.exit(2);
}
const hash = rest.find((one) => one.startsWith("#")) ?? "";
const width = Number(rest.find((one) => one.startsWith("--width="))?.slice(8) ?? 1440);
const browser = await chromium.launch({ executablePath: executable(), args: flags });
try {
  const page = await browser.newPage({
    viewport: { width, height: Math.round(width * 0.68) },
    colorScheme: rest.includes("--dark") ? "dark" : "light",
    deviceScaleFactor: rest.includes("--sharp") ? 2 : 1,
  });
  await page.goto(pathToFileURL(resolve(report)).href + hash);
  await page.waitForSelector(".hw-grid, .hw-scroll, .hw-panel");
  await page.waitForTimeout(500);
  await page.screenshot({ path: out, fullPage: rest.includes("--full") });
} finally {
  await browser.close();
}
