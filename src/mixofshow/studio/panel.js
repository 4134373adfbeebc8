// The list of regions with their settings, the concepts' cards, the keyboard; and the beginning of it all.
function field(index, { key, label, type, min, max, step, fallback }) {
  const region = doc.regions[index];
  const input = make("input", { type, min, max, step, "data-key": key, value: region[key] ?? "", checked: Boolean(region[key]), placeholder: fallback ?? "" });
  return make("label", {}, `${label} `, input);
}

function edge(index, number) {
  const label = ["Left", "Top", "Right", "Bottom"][number];
  const value = Math.round(doc.regions[index].box[number] * 1000) / 10;
  return make("label", {}, `${label} % `, make("input", { type: "number", min: 0, max: 100, step: 0.1, "data-edge": number, value }));
}

function showItem(index) {
  const region = doc.regions[index];
  const button = (act, text, label) => make("button", { type: "button", "data-act": act, textContent: text, "aria-label": `${label} region ${index + 1}`, title: label });
  const head = make("div", { class: "row" }, make("strong", { textContent: `${index + 1} ${nameOf(index)}` }), button("up", "↑", "Earlier:"), button("down", "↓", "Later:"), button("double", "Duplicate", "Duplicate"), button("delete", "Delete", "Delete"));
  const item = (...rest) => make("li", { class: index === selected ? "selected" : "", "data-index": index, style: `border-left-color: ${colourOf(index)}` }, head, ...rest);
  if (!props.composes) return item();
  head.append(button("over", "Draw over", "Draw over, in the picture that was clicked,"));
  const prompt = make("textarea", { "data-key": "prompt", rows: 2, value: region.prompt || "", "aria-label": `Prompt of region ${index + 1}`, placeholder: "What is in this region" });
  const box = region.box ? [make("div", { class: "row" }, ...[0, 1, 2, 3].map((number) => edge(index, number)))] : [];
  const more = make("details", {}, make("summary", { textContent: "More settings" }), make("div", { class: "row" }, ...(props.fields || []).map((one) => field(index, one))));
  more.open = Boolean(opened[index]);
  more.addEventListener("toggle", () => { opened[index] = more.open; });
  const advice = make("p", { class: "advice", role: "status", textContent: (props.advice || [])[index] || "" });
  return item(prompt, ...box, more, advice);
}

let opened = [];

function showList() {
  const focus = document.activeElement, item = list.contains(focus) ? focus.closest("li")?.dataset.index : undefined;
  const which = focus?.dataset?.key ? `[data-key="${focus.dataset.key}"]` : focus?.dataset?.edge ? `[data-edge="${focus.dataset.edge}"]` : focus?.dataset?.act ? `[data-act="${focus.dataset.act}"]` : null;
  list.replaceChildren(...doc.regions.map((_, index) => showItem(index)));
  if (item !== undefined && which) list.children[Math.min(item, list.children.length - 1)]?.querySelector(which)?.focus();
}

function showAdvice() {
  [...list.querySelectorAll(".advice")].forEach((place, index) => { place.textContent = (props.advice || [])[index] || ""; });
}

function showCards() {
  find(".cards").replaceChildren(...cards().map((card, number) => {
    const text = make("span", { textContent: card.word });
    const picture = card.picture ? [make("img", { src: card.picture, alt: "" })] : [];
    return make("button", { type: "button", "data-card": number, style: `border-left-color: ${PALETTE[number % PALETTE.length]}`, title: card.title, "aria-label": `Add a region for ${card.word}` }, ...picture, text);
  }));
}

function show() {
  showCanvas();
  showList();
}

function choose(name) {
  tool = name;
  corners = [];
  for (const button of element.querySelectorAll("[data-tool]")) {
    if (button.tagName === "BUTTON") button.setAttribute("aria-pressed", button.dataset.tool === name);
  }
  showCanvas();
}

function typed(event) {
  const input = event.target, item = input.closest("li[data-index]");
  if (!item) return;
  const index = Number(item.dataset.index), region = doc.regions[index];
  if (input.dataset.key === "prompt") {
    change(() => { region.prompt = input.value; }, { typing: true });
    item.querySelector("strong").textContent = `${index + 1} ${nameOf(index)}`;
    item.style.borderLeftColor = colourOf(index);
  } else if (input.dataset.key) {
    const value = { number: input.valueAsNumber, checkbox: input.checked }[input.type] ?? input.value;
    const empty = value === "" || value === false || Number.isNaN(value);
    change(() => { if (empty) delete region[input.dataset.key]; else region[input.dataset.key] = value; }, { typing: true });
  } else if (input.dataset.edge) {
    const box = [...region.box];
    box[input.dataset.edge] = rounded(clamp(input.valueAsNumber / 100));
    if (box[0] < box[2] && box[1] < box[3]) change(() => { region.box = box; }, { typing: true });
    else say(`Region ${index + 1}: expected numbers from 0 to 100, Left before Right and Top before Bottom`);
  }
}

function clicked(event) {
  const button = event.target.closest("button");
  if (!button || !element.contains(button)) return;
  const item = button.closest("li[data-index]"), index = item ? Number(item.dataset.index) : -1;
  // By keyboard, which cannot drag, the box comes at once, into the next free place.
  if (button.dataset.tool === "box" && event.detail === 0) add({ box: freePlace() });
  else if (button.dataset.tool) choose(button.dataset.tool);
  else if (button.dataset.card) add({ prompt: cards()[button.dataset.card].prompt, box: freePlace() });
  else if (button.dataset.do) ({ undo: () => travel(past, future), redo: () => travel(future, past), columns: arrange })[button.dataset.do]();
  else if (button.dataset.act) {
    const twice = () => add(copy(doc.regions[index]));
    const over = () => { hand(); trigger("draw_over", { region: index + 1 }); };
    ({ over,  up: () => reorder(index, -1), down: () => reorder(index, 1), delete: () => remove(index), double: twice })[button.dataset.act]();
  }
}

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const TOOLS = { v: "select", b: "box", p: "polygon", m: "brush", e: "eraser" };

function key(event) {
  const writing = event.target.matches("input, textarea, select");
  const control = event.ctrlKey || event.metaKey, name = event.key.toLowerCase();
  if (control && (name === "z" || name === "y") && !writing) {
    event.preventDefault();
    return name === "y" || event.shiftKey ? travel(future, past) : travel(past, future);
  }
  if (writing || control || event.altKey) return;
  if (corners.length && event.key === "Enter") return closePolygon();
  if (corners.length && event.key === "Escape") { corners = []; return showCanvas(); }
  if (TOOLS[name]) return choose(TOOLS[name]);
  const group = event.target.closest(".region");
  if (group) keyOnRegion(event, Number(group.dataset.index));
}

function keyOnRegion(event, index) {
  const region = doc.regions[index], unit = grid() ? 1 / grid() : 0.01;
  if (ARROWS[event.key]) {
    const [x, y] = ARROWS[event.key];
    event.preventDefault();
    selected = index;
    change(() => shifted(region, x * unit, y * unit, event.shiftKey ? [x ? 2 : 3] : null, clamp));
  } else if (event.key === "Delete" || event.key === "Backspace") {
    event.preventDefault();
    remove(index);
    focusSelected();
  } else if (event.key === "[" || event.key === "]") {
    reorder(index, event.key === "[" ? -1 : 1);
    svg.querySelectorAll(".region")[selected]?.focus();
  } else if (event.key === "Enter" || event.key === " ") {
    event.preventDefault();
    select(index);
    list.children[index].querySelector("textarea")?.focus();
  }
}

function taken() {
  doc = { width: 64, height: 64, ...copy(props.value || {}) };
  doc.regions = doc.regions || [];
  brushes = new WeakMap();
  selected = Math.min(selected, doc.regions.length - 1);
  show();
}

element.addEventListener("click", clicked);
element.addEventListener("input", typed);
element.addEventListener("keydown", key);
list.addEventListener("focusin", (event) => {
  const item = event.target.closest("li[data-index]");
  if (item && Number(item.dataset.index) !== selected) select(Number(item.dataset.index));
});
list.addEventListener("change", (event) => { if (event.target.dataset.edge) showList(); }); // what was not taken goes
list.addEventListener("focusin", (event) => { if (event.target.matches("input, textarea")) remember(); });
list.addEventListener("focusout", () => { if (timer) hand(); }); // what is clicked next is to know it
svg.addEventListener("pointerdown", press);
svg.addEventListener("pointermove", pull);
svg.addEventListener("pointerup", release);
svg.addEventListener("pointercancel", release);
watch("value", () => {
  if (JSON.stringify(props.value) === JSON.stringify(doc)) return;
  if (JSON.stringify(props.value?.regions) !== JSON.stringify(doc.regions)) {
    remember();
    future = [];
  }
  taken();
});
watch("advice", showAdvice);
watch("cards", () => { showCards(); show(); });
watch("picture", showCanvas);
new ResizeObserver(showCanvas).observe(canvas.parentElement);
showCards();
taken();
choose(tool);
