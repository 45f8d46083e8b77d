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
