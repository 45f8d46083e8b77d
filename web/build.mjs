// Builds headwise/view/static/ from src/. `--check` builds in memory and compares with what is committed.
import { build } from "esbuild";
import { readFileSync, writeFileSync, mkdirSync, existsSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const here = dirname(fileURLToPath(import.meta.url));
const out = join(here, "..", "headwise", "view", "static");
const palette = JSON.parse(readFileSync(join(here, "..", "headwise", "view", "palette.json"), "utf8"));

const banner = "Built from web/ by `make web`; do not edit. Holds Preact (MIT), Observable Plot and D3 (ISC): see static/LICENCES.txt";

const shared = {
  absWorkingDir: here,
  bundle: true,
  minify: true,
  target: "es2022",
  write: false,
  legalComments: "none",
  jsx: "automatic",
  jsxImportSource: "preact",
  logLevel: "warning",
  banner: { js: `/* ${banner} */` },
};

const variables = (theme) =>
  Object.entries(palette.page[theme]).map(([name, value]) => `--hw-${name}:${value};`).join("");

const style = async () => {
  const colours = `.hw{${variables("light")}color-scheme:light dark}\n@media (prefers-color-scheme:dark){.hw{${variables("dark")}}}\n`;
  const text = colours + readFileSync(join(here, "src", "style.css"), "utf8");
  const made = await build({
    ...shared,
    banner: { css: "/* Built from web/ by `make web`; do not edit. */" },
    stdin: { contents: text, loader: "css", resolveDir: here },
  });
  return made.outputFiles[0].text;
};

const bundle = async (entry, format) => {
  const made = await build({ ...shared, entryPoints: [join("src", entry)], format });
  return made.outputFiles[0].text;
};

// The licences of everything that is bundled travel with it.
const licences = () => {
  const lock = JSON.parse(readFileSync(join(here, "package-lock.json"), "utf8"));
  const parts = [];
  for (const [place, entry] of Object.entries(lock.packages).sort()) {
    if (!place || entry.dev || entry.devOptional || entry.optional) continue;
    const file = ["LICENSE", "LICENSE.md", "license", "LICENCE"].map((n) => join(here, place, n)).find(existsSync);
    if (file) parts.push(`${place.replace("node_modules/", "")} ${entry.version}\n\n${readFileSync(file, "utf8").trim()}\n`);
  }
  return parts.join("\n" + "-".repeat(72) + "\n\n");
};

const files = {
  "headwise.css": await style(),
  "report.js": await bundle("report.tsx", "iife"),
  "headmap.js": await bundle("headmap.tsx", "esm"),
  "headcard.js": await bundle("headcard.tsx", "esm"),
  "patternview.js": await bundle("patternview.tsx", "esm"),
  "tradeoffview.js": await bundle("tradeoffview.tsx", "esm"),
  "trainingview.js": await bundle("trainingview.tsx", "esm"),
  "circuitview.js": await bundle("circuitview.tsx", "esm"),
  "LICENCES.txt": licences(),
};

if (process.argv.includes("--check")) {
  const differs = Object.entries(files).filter(([name, text]) => {
    const path = join(out, name);
    return !existsSync(path) || readFileSync(path, "utf8") !== text;
  });
  if (differs.length) {
    console.error(`headwise/view/static/ is not what web/ builds: ${differs.map(([n]) => n).join(", ")}. Run \`make web\` and commit.`);
    process.exit(1);
  }
  console.log("headwise/view/static/ is what web/ builds.");
} else {
  mkdirSync(out, { recursive: true });
  for (const [name, text] of Object.entries(files)) {
    writeFileSync(join(out, name), text);
    console.log(`${name.padEnd(16)} ${(text.length / 1024).toFixed(0).padStart(4)} kB`);
  }
}
