// Drives the report in Chromium: node web/test/page.mjs <report.html> [<folder for screenshots>]
// Prints one JSON object of what was found; tests/test_report_page.py judges it.
import { chromium } from "playwright-core";
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
import { dirname, join, resolve } from "node:path";
import { fileURLToPath, pathToFileURL } from "node:url";
import { executable, flags, newPage } from "./browser.mjs";

const [report, shots] = process.argv.slice(2);
const address = pathToFileURL(resolve(report)).href;
const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const found = { errors: [], requests: [], violations: {}, checks: {}, keyboard: {}, hash: {}, state: {}, pattern: {}, tradeoffs: {}, circuit: {}, training: {}, widgets: {}, size: {} };

const browser = await chromium.launch({ executablePath: executable(), args: flags });

async function open(options, hash = "") {
  const page = await newPage(browser, { viewport: { width: 1440, height: 980 }, ...options });
  page.on("console", (message) => { if (["error", "warning"].includes(message.type())) found.errors.push(message.text()); });
  page.on("pageerror", (error) => found.errors.push(String(error)));
  page.on("request", (request) => { if (!/^(file|data|blob|about):/.test(request.url())) found.requests.push(request.url()); });
  await page.goto(address + hash);
  await page.waitForSelector(".hw-card");
  return page;
}

const selected = (page) => page.locator('[role="gridcell"][aria-selected="true"]').getAttribute("data-unit");
const title = (page) => page.locator(".hw-card h2").first().textContent();

async function check(page, name) {
  // The policy of the page lets no script in that is not its own; axe comes in by the debugger.
  await page.evaluate(axe);
  const result = await page.evaluate(() => window.axe.run(document, { resultTypes: ["violations"] }));
  found.checks[name] = result.passes.length;
  found.violations[name] = result.violations.map((one) => `${one.id}: ${one.nodes.slice(0, 3).map((n) => `${n.html.slice(0, 160)} ${n.any[0]?.message ?? ""}`).join(" | ")}`);
  if (shots) await page.screenshot({ path: join(shots, `${name}.png`), fullPage: true });
}

async function keyboard() {
  const page = await open({}, "#L5.H1");
  await page.waitForSelector(".hw-grid");
  await page.locator('[role="gridcell"][tabindex="0"]').focus();
  found.keyboard.start = await selected(page);
  for (const key of ["ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp", "Home", "End"]) {
    await page.keyboard.press(key);
    found.keyboard[key] = await selected(page);
  }
  found.keyboard.focused = await page.evaluate(() => document.activeElement?.getAttribute("data-unit"));
  found.keyboard.card = await title(page);
  found.keyboard.stops = await page.locator('[role="grid"] [tabindex="0"]').count();
  await page.keyboard.press("Enter");
  found.keyboard.enter = await page.evaluate(() => document.activeElement?.textContent);
  found.keyboard.address = new URL(page.url()).hash;
  await page.close();
}

async function links() {
  const page = await open({}, "#L7.H4&colour=induction_ablation&side=key");
  found.hash.opened = await title(page);
  found.hash.colour = await page.locator(".hw-map select").inputValue();
  found.hash.side = await page.locator('.hw-pattern .hw-choice [aria-pressed="true"]').textContent();
  await page.evaluate(() => { location.hash = "#L2.H3"; });
  await page.waitForFunction(() => document.querySelector(".hw-card h2")?.textContent === "L2.H3");
  found.hash.followed = await selected(page);
  await page.evaluate(() => { location.hash = "#L999.H1"; });
  await page.waitForTimeout(100);
  found.hash.unknown = await title(page);
  await page.locator('[data-unit="L3.H3"]').click();
  found.hash.clicked = await title(page);
  await page.locator(".hw-map select").selectOption("roles");
  await page.getByRole("button", { name: "Table", exact: true }).click();
  await page.locator(".hw-scroll thead button").filter({ hasText: "Role" }).click();
  found.state.sorted = await page.locator('.hw-scroll th[aria-sort="ascending"]').textContent();
  found.state.rows = await page.locator(".hw-map .hw-scroll tbody tr").count();
  found.state.address = new URL(page.url()).hash;
  await page.close();
}

async function pattern() {
  const page = await open({}, "#L5.H1&prompt=code");
  await page.waitForSelector(".hw-token");
  found.pattern.tokens = await page.locator(".hw-token").count();
  found.pattern.text = await page.locator(".hw-strip").textContent();
  await page.locator(".hw-token").nth(6).click();
  found.pattern.chosen = await page.locator('.hw-token[aria-selected="true"]').getAttribute("data-at");
  await page.locator('.hw-token[tabindex="0"]').focus();
  await page.mouse.move(0, 0);
  await page.keyboard.press("ArrowRight");
  found.pattern.moved = await page.locator('.hw-token[aria-selected="true"]').getAttribute("data-at");
  found.pattern.weight = await page.locator(".hw-token").nth(0).getAttribute("aria-label");
  await page.locator(".hw-card").getByText("The same in Python").click();
  found.pattern.code = await page.locator(".hw-card .hw-code code").textContent();
  await page.close();
}

/** The dots by pointer and by key: what they say, and the plan on the map. */
async function tradeoffs() {
  const page = await open({}, "#L5.H1");
  const at = found.tradeoffs;
  const rings = () => page.locator(".hw-grid .hw-full").count();
  const chart = page.locator(".hw-dots").first();
  at.dots = await page.locator(".hw-dots").evaluateAll((all) => all.map((one) => one.querySelectorAll("[data-dot]").length));
  at.stops = await page.locator(".hw-dots").evaluateAll((all) => all.map((one) => one.querySelectorAll('[tabindex="0"]').length));
  at.before = await rings();
  const plan = chart.locator('[data-dot="0.4/plan"]');
  await plan.hover();
  at.hovered = await rings();
  at.says = await page.locator(".hw-map .hw-plan-shown").textContent();
  at.cell = await page.locator(".hw-grid .hw-full").first().getAttribute("aria-label");
  await page.locator(".hw-mark").hover();
  at.after = await rings();
  await chart.locator('[tabindex="0"]').focus();
  await page.keyboard.press("Home");
  at.walk = [];
  for (let i = 0; i < at.dots[0] + 1; i++) {
    at.walk.push(await page.evaluate(() => document.activeElement?.getAttribute("data-dot")));
    await page.keyboard.press("ArrowRight");
  }
  await plan.focus();
  at.focused = await rings();
  at.label = await plan.getAttribute("aria-label");
  await page.keyboard.press("Enter");
  await page.waitForFunction(() => document.activeElement?.tagName === "H3");
  at.numbers = await page.locator(".hw-numbers").textContent();
  at.address = new URL(page.url()).hash;
  at.kept = await rings();
  at.card = await page.locator(".hw-inplans").textContent();
  const corner = await chart.locator('[data-dot="0.2/full"]').boundingBox();
  at.pressed = [];
  for (let i = 0; i < 3; i++) {
    await page.mouse.click(corner.x + corner.width / 2, corner.y + corner.height / 2);
    at.pressed.push(await chart.locator('[aria-pressed="true"]').getAttribute("data-dot"));
  }
  await plan.focus();
  await page.keyboard.press(" ");
  await page.locator(".hw-tradeoffs select").first().selectOption("nll");
  at.quality = new URL(page.url()).hash;
  await page.locator(".hw-tradeoffs select").nth(1).selectOption("1024");
  at.sentence = await page.locator(".hw-charts > p").textContent();
  await page.getByRole("button", { name: "Close" }).click();
  at.closed = await page.locator(".hw-numbers").count();
  await page.locator(".hw-tradeoffs summary").first().click();
  at.rows = await page.locator(".hw-tradeoffs tbody tr").count();
  at.out = await page.locator(".hw-tradeoffs details").last().textContent();
  await page.evaluate(() => { location.hash = "#L5.H1&dot=0.2%2Fplan"; });
  await page.waitForSelector(".hw-numbers");
  at.linked = await page.locator(".hw-numbers h3").textContent();
  await page.close();
}

/** The circuit by pointer, by key, by slider and by link. */
async function circuit() {
  const page = await open({}, "#L5.H1&graph=why-mary-john-0a1b2c");
  const at = found.circuit;
  const graph = page.locator(".hw-circuit-graph");
  const slider = page.locator(".hw-threshold input");
  const lines = () => graph.locator("[data-edge]").evaluateAll((all) => new Set(all.map((one) => one.dataset.edge)).size);
  at.edges = await lines();
  at.says = await page.locator(".hw-threshold output").textContent();
  at.stops = await graph.locator('[tabindex="0"]').count();
  at.verdict = await page.locator(".hw-verdict-line").textContent();
  await slider.focus();
  await page.keyboard.press("Home");
  at.one = await lines();
  await page.keyboard.press("End");
  at.all = await lines();
  await slider.fill("12");
  at.few = await lines();
  at.address = new URL(page.url()).hash;
  await graph.locator('[data-place="logits"]').focus();
  at.walk = [];
  for (const key of ["ArrowDown", "ArrowDown", "ArrowUp", "ArrowUp"]) {
    await page.keyboard.press(key);
    at.walk.push(await page.evaluate(() => document.activeElement?.getAttribute("data-place")));
  }
  at.label = await graph.locator('[data-place="logits"]').getAttribute("aria-label");
  await page.keyboard.press("ArrowDown");
  at.before = await page.evaluate(() => document.activeElement?.getAttribute("data-place"));
  await page.keyboard.press("Enter");
  await page.waitForFunction(() => document.activeElement?.tagName === "H3");
  at.heading = await page.locator(".hw-circuit .hw-numbers h3").textContent();
  at.numbers = await page.locator(".hw-circuit .hw-numbers").textContent();
  at.picked = new URL(page.url()).hash;
  await page.locator(".hw-circuit .hw-ends .hw-link").first().click();
  at.edge = await page.locator(".hw-circuit .hw-numbers h3").textContent();
  await page.locator(".hw-circuit summary").filter({ hasText: "Workbench" }).click();
  at.code = await page.locator(".hw-circuit .hw-code code").textContent();
  await page.getByRole("button", { name: "Every number shown" }).click();
  at.bench = await page.locator(".hw-circuit .hw-code code").textContent();
  await page.locator(".hw-circuit .hw-numbers").getByRole("button", { name: "Close" }).click();
  at.closed = await page.locator(".hw-circuit .hw-numbers").count();
  await page.locator(".hw-circuit summary").filter({ hasText: "as a table" }).click();
  at.rows = await page.locator(".hw-circuit .hw-scroll tbody tr").count();
  await page.locator(".hw-circuit select").selectOption("ioi");
  at.other = new URL(page.url()).hash;
  at.task = await lines();
  await page.mouse.move(0, 0);
  // A line in a free place: its middle is on nothing else.
  at.pressed = await page.evaluate(() => {
    const edge = document.querySelector(".hw-circuit-graph [data-edge]");
    edge.dispatchEvent(new MouseEvent("click", { bubbles: true }));
    return edge.dataset.edge;
  });
  at.opened = new URL(page.url()).hash;
  await page.evaluate(() => { location.hash = "#L5.H1&graph=why-mary-john-0a1b2c&edges=7&node=logits"; });
  await page.waitForFunction(() => document.querySelector(".hw-circuit .hw-numbers h3")?.textContent === "logits");
  at.linked = await lines();
  at.out = await page.locator(".hw-circuit details").last().textContent();
  await page.close();
}

/** The lines of a training run: the selected head's is read out, the table selects, the choice stays in the address. */
async function training() {
  const page = await open({}, "#L2.H3");
  const at = found.training;
  at.lines = await page.locator('.hw-curves [role="img"]').evaluateAll((all) => all.map((one) => one.getAttribute("aria-label")));
  await page.locator(".hw-training summary").first().click();
  at.rows = await page.locator(".hw-training tbody tr").count();
  at.first = await page.locator(".hw-training tbody .hw-link").first().textContent();
  await page.locator(".hw-training tbody .hw-link").first().click();
  at.picked = new URL(page.url()).hash;
  at.says = await page.locator(".hw-training .hw-reading").textContent();
  at.legend = await page.locator(".hw-training .hw-key").textContent();
  await page.locator(".hw-training select").selectOption("match@train");
  at.address = new URL(page.url()).hash;
  await page.locator(".hw-training summary").filter({ hasText: "Python" }).click();
  at.code = await page.locator(".hw-training .hw-code code").textContent();
  await page.close();
}

/** The widgets' modules, loaded as a notebook loads them: from a blob, with a model of the notebook's own. */
async function widgets() {
  const data = JSON.parse(readFileSync(report, "utf8").match(/id="headwise-data">(.*?)<\/script>/s)[1]);
  const folder = join(dirname(fileURLToPath(import.meta.url)), "..", "..", "headwise", "view", "static");
  const page = await newPage(browser);
  page.on("pageerror", (error) => found.errors.push(String(error)));
  for (const name of ["headmap", "headcard", "patternview", "tradeoffview", "circuitview", "trainingview"]) {
    const source = readFileSync(join(folder, `${name}.js`), "utf8");
    found.widgets[name] = await page.evaluate(async ([source, data]) => {
      const module = await import(URL.createObjectURL(new Blob([source], { type: "text/javascript" })));
      const state = { data, unit: "L5.H1", colour: "roles", prompt: "", side: "query", token: -1, view: "grid", role: "" };
      const heard = {};
      let saved = 0;
      const model = {
        get: (key) => state[key],
        set: (key, value) => { state[key] = value; },
        save_changes: () => { saved += 1; },
        on: (event, callback) => { (heard[event] ??= []).push(callback); },
        off: (event, callback) => { heard[event] = (heard[event] ?? []).filter((one) => one !== callback); },
      };
      const el = document.body.appendChild(document.createElement("div"));
      const stop = module.default.render({ model, el });
      const wait = () => new Promise((done) => setTimeout(done, 150));
      await wait();
      el.querySelector('[data-unit="L2.H3"]')?.click();
      el.querySelector('[data-place="logits"]')?.dispatchEvent(new MouseEvent("click", { bubbles: true }));
      const node = state.node;
      const picked = state.unit;
      state.unit = "L7.H4";
      heard["change:unit"].forEach((callback) => callback());
      await wait();
      const followed = el.querySelector("h2")?.textContent + " " + (el.querySelector('[aria-selected="true"]')?.dataset.unit ?? "");
      stop();
      return { picked, node, followed, saved, left: el.childElementCount, heard: Object.values(heard).flat().length };
    }, [source, data]);
  }
  await page.close();
}

try {
  await widgets();
  await keyboard();
  await links();
  await pattern();
  await tradeoffs();
  await circuit();
  await training();
  const looks = [
    ["roles", "light", ""],
    ["roles", "dark", ""],
    ["sequential", "dark", "#L5.H1&colour=induction_stripe"],
    ["diverging", "light", "#L10.H5&colour=induction_ablation"],
    ["table", "light", "#L4.H7&view=table&colour=entropy_change"],
    ["plan", "light", "#L5.H1&dot=0.4%2Fplan"],
    ["plan", "dark", "#L5.H1&dot=0.2%2Fplan&quality=nll"],
    ["circuit", "light", "#L5.H1&graph=why-mary-john-0a1b2c&node=logits"],
    ["training", "dark", "#L5.H1&curve=match%40train"],
    ["circuit", "dark", "#L5.H1&graph=ioi&edges=120"],
  ];
  for (const [name, colorScheme, hash] of looks) {
    const page = await open({ colorScheme, reducedMotion: "reduce" }, hash);
    await page.waitForTimeout(150);
    await page.evaluate((all) => { for (const one of document.querySelectorAll(all)) one.open = true; }, ".hw-card > details, .hw-tradeoffs > details, .hw-circuit > details, .hw-training > details");
    await page.waitForTimeout(50);
    await check(page, `${name}-${colorScheme}`);
    await page.close();
  }
  const narrow = await open({ viewport: { width: 700, height: 900 } });
  await narrow.waitForTimeout(150);
  found.size.overflow = await narrow.evaluate(() => document.documentElement.scrollWidth - innerWidth);
  await check(narrow, "narrow");
} finally {
  await browser.close();
}
console.log(JSON.stringify(found));
