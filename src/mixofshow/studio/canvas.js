// The canvas: what is drawn on it, and what mouse, pen and finger do there.
// Masks are decoded while they are shown: one that comes later would not be in what a first quick dab makes of it.
function pictureOf(mask) {
  if (!masks.has(mask)) masks.set(mask, Object.assign(new Image(), { src: mask }));
  return masks.get(mask);
}

function brushOf(region) {
  let made = brushes.get(region);
  if (made) return made;
  const scale = MASK_SIDE / Math.max(doc.width, doc.height);
  made = make("canvas", { width: Math.round(doc.width * scale), height: Math.round(doc.height * scale) });
  const pen = made.getContext("2d");
  pen.fillRect(0, 0, made.width, made.height);
  const before = pictureOf(region.mask);
  if (before.naturalWidth) pen.drawImage(before, 0, 0, made.width, made.height);
  brushes.set(region, made);
  return made;
}

function paint(region, from, to, colour) {
  const mask = brushOf(region), pen = mask.getContext("2d");
  Object.assign(pen, { strokeStyle: colour, lineWidth: BRUSH * Math.min(mask.width, mask.height) * 2, lineCap: "round" });
  pen.beginPath();
  pen.moveTo(from[0] * mask.width, from[1] * mask.height);
  pen.lineTo(to[0] * mask.width + 0.01, to[1] * mask.height);
  pen.stroke();
}

function shapeOf(index) {
  const region = doc.regions[index], colour = colourOf(index), look = { class: "shape", fill: colour, stroke: colour };
  if (region.box) {
    const [left, top, right, bottom] = region.box;
    return make("svg:rect", { ...look, x: left * WIDE, y: top * high(), width: (right - left) * WIDE, height: (bottom - top) * high() });
  }
  if (region.polygon) return make("svg:polygon", { ...look, points: region.polygon.map(([x, y]) => `${x * WIDE},${y * high()}`).join(" ") });
  const id = `${own}-${index}`;
  pictureOf(region.mask);
  const picture = make("svg:image", { href: region.mask, width: WIDE, height: high(), preserveAspectRatio: "none" });
  const tinted = make("svg:rect", { class: "shape", fill: colour, width: WIDE, height: high(), mask: `url(#${id})`, style: "fill-opacity: .5" });
  return make("svg:g", {}, make("svg:mask", { id }, picture), tinted);
}

function describe(index) {
  const region = doc.regions[index], [left, top, right, bottom] = around(region).map((edge) => Math.round(edge * 100));
  const kind = region.box ? "box" : region.polygon ? "polygon" : "painted mask";
  const what = [`Region ${index + 1}`, kind, nameOf(index)].filter(Boolean).join(", ");
  return `${what}: from ${left} to ${right} percent across, ${top} to ${bottom} percent down`;
}

const HANDLES = [[0, 1], [1, 2], [2, 3], [0, 3], [0], [1], [2], [3]];

function handles(region) {
  if (region.polygon) return region.polygon.map(([x, y], number) => [x, y, { "data-corner": number }]);
  if (!region.box) return [];
  const [left, top, right, bottom] = region.box;
  const x = (edges) => edges.includes(0) ? left : edges.includes(2) ? right : (left + right) / 2;
  const y = (edges) => edges.includes(1) ? top : edges.includes(3) ? bottom : (top + bottom) / 2;
  return HANDLES.map((edges) => [x(edges), y(edges), { "data-edges": edges.join("") }]);
}

function showCanvas() {
  const focused = [...svg.querySelectorAll(".region")].indexOf(document.activeElement);
  const width = canvas.parentElement.clientWidth || WIDE, unit = WIDE / Math.max(canvas.clientWidth || width, 1);
  canvas.style.aspectRatio = `${doc.width} / ${doc.height}`;
  canvas.style.width = `min(100%, ${70 * doc.width / doc.height}vh)`;
  svg.setAttribute("viewBox", `0 0 ${WIDE} ${high()}`);
  svg.dataset.tool = tool;
  svg.replaceChildren(...doc.regions.map((region, index) => {
    const [left, top] = around(region), size = 14 * unit;
    const name = make("svg:text", { class: "name", x: left * WIDE + 4 * unit, y: top * high() + size + 2 * unit, "font-size": size, textContent: `${index + 1} ${nameOf(index)}` });
    const group = make("svg:g", { class: `region${index === selected ? " selected" : ""}`, tabindex: 0, role: "button", "aria-label": describe(index), "data-index": index });
    group.append(shapeOf(index), name);
    return group;
  }));
  if (selected >= 0 && doc.regions[selected]) {
    svg.append(...handles(doc.regions[selected]).map(([x, y, more]) => make("svg:circle", { class: "handle", cx: x * WIDE, cy: y * high(), r: 7 * unit, ...more })));
  }
  if (corners.length) {
    const points = corners.map(([x, y]) => `${x * WIDE},${y * high()}`).join(" ");
    svg.append(make("svg:polyline", { points, fill: "none", stroke: "black", "stroke-width": 2 * unit, "stroke-dasharray": 6 * unit }));
  }
  if (focused >= 0) svg.querySelectorAll(".region")[focused]?.focus();
  for (const mask of [...masks.keys()]) if (!doc.regions.some((region) => region.mask === mask)) masks.delete(mask);
  const under = canvas.querySelector("img");
  under.hidden = !props.picture;
  if (props.picture && under.getAttribute("src") !== props.picture) under.setAttribute("src", props.picture);
}

function closePolygon() {
  const points = corners.map((corner) => corner.map(rounded));
  corners = [];
  if (points.length > 2) add({ polygon: points });
  else { say("A polygon needs three corners"); showCanvas(); }
}

function press(event) {
  if (event.button > 0) return;
  const at = point(event), target = event.target, region = doc.regions[selected];
  event.preventDefault();
  if (tool === "polygon") {
    const [first] = corners;
    if (first && corners.length > 2 && Math.hypot(at[0] - first[0], at[1] - first[1]) < SMALLEST) return closePolygon();
    corners.push([snapped(at[0]), snapped(at[1])]);
    say("Click the first corner again, or press Enter, to close it; Escape gives it up");
    return showCanvas();
  }
  svg.setPointerCapture(event.pointerId);
  const before = JSON.stringify(doc);
  drag = { tool, at, last: at, before, moved: false };
  if (tool === "box") Object.assign(drag, { index: doc.regions.length, start: at.map(snapped) });
  else if (tool !== "select") {
    if (!region || !region.mask) {
      if (tool === "eraser") { drag = null; return say("Select a painted region first"); }
      doc.regions.push({ prompt: "", mask: "", units: "share" });
      selected = doc.regions.length - 1;
    }
    stroke(at);
  } else if ("edges" in target.dataset || "corner" in target.dataset) {
    Object.assign(drag, { index: selected, edges: target.dataset.edges && [...target.dataset.edges].map(Number), corner: target.dataset.corner });
  } else {
    const group = target.closest(".region");
    drag.index = group ? Number(group.dataset.index) : -1;
    select(drag.index, { focus: Boolean(group) });
  }
}

function stroke(at) {
  paint(doc.regions[selected], drag.last, at, drag.tool === "eraser" ? "black" : "white");
  Object.assign(drag, { last: at, moved: true });
}

function pull(event) {
  if (!drag) return;
  const at = point(event), [dx, dy] = [at[0] - drag.at[0], at[1] - drag.at[1]];
  drag.moved = drag.moved || Math.hypot(dx, dy) > 0.004;
  if (!drag.moved) return;
  if (drag.tool === "brush" || drag.tool === "eraser") {
    stroke(at);
    doc.regions[selected].mask = brushOf(doc.regions[selected]).toDataURL("image/png");
    return showCanvas();
  }
  const fresh = JSON.parse(drag.before);
  if (drag.tool === "box") {
    const to = at.map(snapped), box = [0, 1].map((axis) => Math.min(drag.start[axis], to[axis])).concat([0, 1].map((axis) => Math.max(drag.start[axis], to[axis])));
    if (box[2] - box[0] >= SMALLEST && box[3] - box[1] >= SMALLEST) fresh.regions.push({ prompt: "", box: box.map(rounded), units: "share" });
    selected = fresh.regions.length - 1;
  } else if (drag.index >= 0) {
    const region = fresh.regions[drag.index];
    if (drag.corner !== undefined) region.polygon[drag.corner] = [rounded(snapped(at[0])), rounded(snapped(at[1]))];
    else shifted(region, dx, dy, drag.edges);
  }
  doc = fresh;
  showCanvas();
}

function release() {
  if (!drag) return;
  const { before, tool: used } = drag;
  drag = null;
  const region = doc.regions[selected];
  if (region && (used === "brush" || used === "eraser")) region.mask = brushOf(region).toDataURL("image/png");
  if (JSON.stringify(doc) === before) return;
  remember(JSON.parse(before).regions);
  future = [];
  hand();
  show();
  if (used === "box") choose("select");
}
