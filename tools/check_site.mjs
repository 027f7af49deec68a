// Looks at the built site in a headless Chromium: no sideways scrolling, no console message, no
// serious finding of axe-core; at the width of a screen and of a phone, light and dark.
//
//   npm install --prefix FOLDER playwright-core axe-core
//   MODULES=FOLDER/node_modules node tools/check_site.mjs site [SCREENSHOTS]
//
// CHROMIUM names the browser, /usr/bin/chromium where it is not set; PAGES other pages, by comma.
import { createServer } from "node:http";
import { mkdirSync, readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { extname, join, normalize } from "node:path";

const modules = createRequire(`${process.env.MODULES ?? "node_modules"}/`);
const { chromium } = modules("playwright-core");
const axe = readFileSync(modules.resolve("axe-core/axe.min.js"), "utf8");

const PAGES = process.env.PAGES?.split(",") ?? [
  "", "results/", "results/contests/", "recipes/plain-pytorch/", "recipes/llama/", "planner/",
];
const KINDS = {
  ".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".json": "application/json",
  ".svg": "image/svg+xml", ".png": "image/png",
};

function serve(folder) {
  return new Promise((resolve) => {
    const server = createServer((request, response) => {
      const path = normalize(decodeURIComponent(new URL(request.url, "http://x").pathname));
      try {
        const file = join(folder, path.endsWith("/") ? `${path}index.html` : path);
        const body = readFileSync(file);
        response.writeHead(200, { "content-type": KINDS[extname(file)] ?? "text/plain" }).end(body);
      } catch {
        response.writeHead(404).end();
      }
    }).listen(0, "127.0.0.1", () => resolve(server));
  });
}

// In the page: what scrolls sideways, the page itself first.
function sideways() {
  const found = [];
  const root = document.scrollingElement;
  if (root.scrollWidth > root.clientWidth) found.push(`page ${root.scrollWidth}`);
  for (const block of document.querySelectorAll("pre > code")) {
    if (block.scrollWidth > block.clientWidth + 1) found.push(`code ${block.innerText.slice(0, 40)}`);
  }
  for (const table of document.querySelectorAll(".md-typeset__table")) {
    if (table.scrollWidth > table.clientWidth + 1) found.push(`(table ${table.innerText.slice(0, 30)})`);
  }
  return found;
}

async function look(browser, base, page, width, scheme, shots) {
  const context = await browser.newContext({ viewport: { width, height: 900 }, colorScheme: scheme });
  const tab = await context.newPage();
  const messages = [];
  tab.on("console", (message) => messages.push(message.text()));
  tab.on("pageerror", (error) => messages.push(String(error)));
  await tab.goto(`${base}/${page}`, { waitUntil: "networkidle" });
  const name = `${page.replaceAll("/", "-") || "home-"}${width}-${scheme}`;
  if (shots) await tab.screenshot({ path: join(shots, `${name}.png`), fullPage: width < 1000 });
  const wide = await tab.evaluate(sideways);
  await tab.evaluate(axe);
  const { violations } = await tab.evaluate(() => globalThis.axe.run());
  const serious = violations
    .filter((one) => ["serious", "critical"].includes(one.impact))
    .map((one) => `${one.id} x${one.nodes.length}: ${one.nodes[0].target} ${one.nodes[0].failureSummary}`);
  await context.close();
  // Tables in brackets scroll within themselves, which is allowed.
  const bad = [...wide.filter((what) => !what.startsWith("(")), ...messages, ...serious];
  console.log(`${bad.length ? "FAIL" : "ok  "} ${name}`, ...wide, ...messages, ...serious);
  return bad.length;
}

const [site, shots] = process.argv.slice(2);
if (!site) throw new Error("name the folder of the built site, such as: node tools/check_site.mjs site");
if (shots) mkdirSync(shots, { recursive: true });
const server = await serve(site);
const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox"],
});
let failed = 0;
for (const page of PAGES) {
  for (const width of [1280, 420]) {
    for (const scheme of ["light", "dark"]) {
      failed += await look(browser, `http://127.0.0.1:${server.address().port}`, page, width, scheme, shots);
    }
  }
}
await browser.close();
server.close();
console.log(failed ? `${failed} findings` : "no findings");
process.exit(failed ? 1 : 0);
