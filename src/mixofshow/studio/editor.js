// The region editor: boxes, polygons and painted masks over the picture. All lengths are shares of the picture, so that no
// size of window, canvas or screen enters. What others wrote (names, prompts) is only ever put in as text.
// `props.value` is {width, height, regions}, the regions as in a composition's YAML; `props.cards` are the concepts,
// `props.fields` the settings of a region, `props.advice` lines for each region, `props.picture` what lies underneath,
// `props.composes` whether they are a composition's, with prompts and settings, and can be drawn over in a picture; else
// only their shapes count.
const PALETTE = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#a3a300", "#7f3fbf"];
const SMALLEST = 0.02, WIDE = 1000, MASK_SIDE = 512, BRUSH = 0.06, HISTORY = 200;
const find = (selector) => element.querySelector(selector);
const svg = find("svg"), canvas = find(".canvas"), list = find(".regions"), hint = find(".hint");
let doc = { width: 64, height: 64, regions: [] };
let selected = -1, tool = FIRST_TOOL, drag = null, corners = [], past = [], future = [], timer = null;
let brushes = new WeakMap();
const masks = new Map();
const own = `mask-${crypto.getRandomValues(new Uint32Array(1))[0]}`; // a page has several editors

const copy = (value) => JSON.parse(JSON.stringify(value));
const clamp = (value, low = 0, high = 1) => Math.min(Math.max(value, low), high);
const rounded = (value) => Math.round(value * 1e4) / 1e4;
const high = () => WIDE * doc.height / doc.width;
const grid = () => Number(find("[data-grid]").value);
const snapped = (value) => clamp(grid() ? Math.round(value * grid()) / grid() : value);
const cards = () => props.cards || [];
const cardOf = (region) => cards().findIndex((card) => (region.prompt || "").toLowerCase().includes(card.word));

function colourOf(index) {
  const card = cardOf(doc.regions[index]);
  return PALETTE[(card < 0 ? index : card) % PALETTE.length];
}

function nameOf(index) {
  if (!props.composes) return "";
  const prompt = doc.regions[index].prompt || "";
  const card = cardOf(doc.regions[index]);
  return card >= 0 ? cards()[card].word : (/<[^<>]*>/.exec(prompt) || [prompt.slice(0, 24) || "no prompt yet"])[0];
}

// The smallest box around a region, [left, top, right, bottom]; a mask is everywhere.
function around(region) {
  if (region.box) return region.box;
  if (!region.polygon) return [0, 0, 1, 1];
  const xs = region.polygon.map((point) => point[0]), ys = region.polygon.map((point) => point[1]);
  return [Math.min(...xs), Math.min(...ys), Math.max(...xs), Math.max(...ys)];
}

// What is done to the regions is remembered, handed to the page, and can be taken back; the picture's size is not theirs.
function remember(regions = doc.regions) {
  const now = JSON.stringify(regions);
  if (past.at(-1) !== now) past.push(now);
  if (past.length > HISTORY) past.shift();
}

function hand() {
  clearTimeout(timer);
  timer = null;
  props.value = copy(doc);
  trigger("input");
}

function handSoon() {
  clearTimeout(timer);
  timer = setTimeout(hand, 300);
}

function change(act, { typing = false } = {}) {
  if (!typing) remember();
  future = [];
  act();
  if (typing) handSoon(); else { hand(); showList(); }
  showCanvas();
}

function travel(from, to) {
  const now = JSON.stringify(doc.regions);
  while (from.at(-1) === now) from.pop();
  if (!from.length) return;
  to.push(now);
  doc = { ...doc, regions: JSON.parse(from.pop()) };
  selected = Math.min(selected, doc.regions.length - 1);
  hand();
  show();
  if (document.activeElement === document.body) focusSelected();  // what had it is gone, and with it the keys
}

function focusSelected() {
  (svg.querySelectorAll(".region")[selected] || find('[data-tool="box"]')).focus();
}

function select(index, { focus = false } = {}) {
  selected = index;
  showCanvas();
  for (const [number, item] of [...list.children].entries()) item.classList.toggle("selected", number === selected);
  if (focus && index >= 0) svg.querySelectorAll(".region")[index].focus();
}

function add(region) {
  change(() => {
    doc.regions.push({ prompt: "", ...region, units: "share" });
    selected = doc.regions.length - 1;
  });
  say(`Region ${selected + 1} of ${doc.regions.length}: ${nameOf(selected)}`);
}

function remove(index) {
  change(() => {
    doc.regions.splice(index, 1);
    selected = Math.min(index, doc.regions.length - 1);
  });
  say(`${doc.regions.length} regions`);
}

function reorder(index, by) {
  const other = index + by;
  if (other < 0 || other >= doc.regions.length) return;
  change(() => {
    [doc.regions[index], doc.regions[other]] = [doc.regions[other], doc.regions[index]];
    selected = other;
  });
}

const say = (text) => { hint.textContent = text; };

// Columns side by side, as wide as the numbers say. They have no margins, for a box holds in the cells that lie wholly in
// it, and on the coarsest maps of a small picture a half with margins holds none.
function column(shares, number) {
  const upTo = (count) => shares.slice(0, count).reduce((one, other) => one + other, 0);
  const sum = upTo(shares.length);
  return [upTo(number) / sum, 0, upTo(number + 1) / sum, 1];
}

function freePlace() {
  const count = Math.max(2, Math.round(doc.width / doc.height));
  const taken = doc.regions.filter((region) => !region.mask).map(around);
  const meets = (a, b) => a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3];
  for (let number = 0; number < count; number++) {
    const box = column(Array(count).fill(1), number);
    if (!taken.some((other) => meets(box, other))) return box;
  }
  return [0.25, 0.25, 0.75, 0.75];
}

function arrange() {
  const shares = find("[data-ratios]").value.split(":").map(Number);
  if (!shares.length || shares.some((share) => !(share > 0))) return say("Columns: expected numbers with colons between, such as 1:2:1");
  change(() => {
    shares.forEach((_, number) => {
      const region = doc.regions[number] || (doc.regions[number] = { prompt: "", units: "share" });
      delete region.polygon;
      delete region.mask;
      region.box = column(shares, number);
    });
  });
}

// Moving and resizing: `edges` are which of left, top, right, bottom go along.
function shifted(region, dx, dy, edges = null, snap = snapped) {
  const [left, top, right, bottom] = around(region);
  if (!edges) {
    const x = clamp(snap(left + dx), 0, 1 - (right - left)), y = clamp(snap(top + dy), 0, 1 - (bottom - top));
    const move = ([px, py]) => [rounded(clamp(px + x - left)), rounded(clamp(py + y - top))];
    if (region.box) region.box = [...move([left, top]), ...move([right, bottom])];
    else if (region.polygon) region.polygon = region.polygon.map(move);
  } else if (region.box) {
    const box = [left, top, right, bottom];
    for (const edge of edges) box[edge] = snap(box[edge] + (edge % 2 ? dy : dx));
    for (const [low, top] of [[0, 2], [1, 3]]) if (box[top] - box[low] < SMALLEST) return;
    region.box = box.map(rounded);
  }
}

function point(event) {
  const place = svg.getBoundingClientRect();
  return [clamp((event.clientX - place.left) / place.width), clamp((event.clientY - place.top) / place.height)];
}
