// Debian's chromium, without any traffic of its own.
import { existsSync } from "node:fs";

export const flags = [
  "--no-sandbox",
  "--disable-gpu",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-default-apps",
  "--disable-sync",
  "--no-first-run",
  "--force-color-profile=srgb",
];

export function executable() {
  const places = [process.env.HEADWISE_CHROMIUM, "/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome"];
  const found = places.find((place) => place && existsSync(place));
  if (!found) {
    console.error("Chromium is not installed; `make test` installs it (Debian package chromium). Or set HEADWISE_CHROMIUM to its path.");
    process.exit(3);
  }
  return found;
}

/** A page that waits two minutes for what it is asked: where others take most of a machine, thirty seconds are not enough. */
export async function newPage(browser, options = {}) {
  const page = await browser.newPage(options);
  page.setDefaultTimeout(120_000);
  return page;
}
