// Draws the tree that page_layout.js lays out, and answers the pointer and the keyboard.

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const canvas = byId("canvas"), scene = byId("scene");

const COLOURS = {
  heads: ["#f08c2e", "#d9573f", "#f5b971"], query_heads: ["#e377a2", "#f0a3c0"], channels: ["#3fa35c", "#1f9e9a", "#93c95f"],
  head_dim: ["#d9b310", "#a8912b", "#efd95a"], residual: ["#4a7fc1", "#86b3e8"], other: ["#9a6fc0", "#c39bd8", "#8c6d5a"],
};
const used = {};
const spare = (n) => `hsl(${(n * 137.5) % 360} 55% 55%)`;

// Families of one pattern (one in every layer) share a colour and a row of the legend.
const patterns = new Map();
data.families.forEach((family, index) => {
  Object.assign(family, { index });
  if (!patterns.has(family.legend)) {
    const taken = used[family.kind] = (used[family.kind] ?? -1) + 1;
    const colour = COLOURS[family.kind]?.[taken] ?? spare(patterns.size);
    patterns.set(family.legend, { name: family.legend, colour, families: [], off: false });
  }
  family.pattern = patterns.get(family.legend);
  family.pattern.families.push(family);
});
const valueFamilies = new Map();
data.vertices.forEach((vertex, order) => {
  Object.assign(vertex, { order, families: new Set(vertex.families), key: `v${order}`, lines: new Set() });
  for (const [value, , dims] of vertex.outputs) valueFamilies.set(value, [...new Set(dims.flat())]);
});
// An operator that writes in place makes a value anew, so a line is known by its maker and its value.
const edges = data.edges.map(([value, from, to]) => {
  const id = `${from}:${value}`;
  data.vertices[from].lines.add(id);
  data.vertices[to].lines.add(id);
  return { id, value, from: data.vertices[from], to: data.vertices[to] };
});

const view = { x: 0, y: 0, scale: 1 };
let root, drawn = new Map(), lines = [], spotlight = null, pinned = null, found = "";

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== false && value !== null) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== null));
  return made;
}

function shape(parent, tag, attributes, text) {
  const made = document.createElementNS(canvas.namespaceURI, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

// ---- drawing

const SHAPING = new Set(["t", "transpose", "permute", "view", "_unsafe_view", "expand", "clone", "unsqueeze", "squeeze"]);
const QUANTIZERS = { attached: "weight quantizer", inserted: "activation quantizer" };

function labelOf(item) {
  if (!(item instanceof Block)) return { mark: item.frozen ? "❄ " : "", text: QUANTIZERS[item.op] ?? item.op, note: "" };
  const mark = `${item.frozen ? "❄ " : ""}${item.open ? "▾ " : "▸ "}`;
  const main = item.vertices.filter((vertex) => !vertex.body.length && !SHAPING.has(vertex.op));
  const alone = item.blocks.size === 0 && main.length === 1;
  const note = item.open ? "" : `${alone ? main[0].op : `${item.count} operators`}${item.quantizers ? " · Q" : ""}`;
  return { mark, text: item.name, note };
}

function build() {
  const open = new Map(root ? blocksOf(root).map((block) => [block.path, block.open]) : []);
  for (const vertex of data.vertices) vertex.parent = null;
  root = buildTree(data.vertices.filter((vertex) => vertex.learned || byId("plain").checked), edges);
  root.name = data.title;
  openByDefault(root);
  for (const block of blocksOf(root)) block.open = open.get(block.path) ?? block.open;
}

const blocksOf = (block) => [block, ...[...block.blocks.values()].flatMap(blocksOf)];

function draw() {
  layout(root);
  drawn = new Map();
  lines = [];
  scene.replaceChildren();
  Object.assign(root, { x: 0, y: 0, left: 0, top: 0 });
  drawItem(root, scene);
  colour();
}

function drawItem(item, parent) {
  const isBlock = item instanceof Block;
  const kinds = isBlock ? ["block", item.open ? "open" : "closed"] : ["vertex"];
  if (!isBlock && item.reads.length) kinds.push("reads");
  if (!isBlock && item.body.length) kinds.push("quantizer");
  if (item.returned) kinds.push("returned");
  if (item.frozen && !(isBlock && item.open)) kinds.push("frozen");
  const key = item.key ?? `b${item.path}`;
  const name = `${item.label.text} ${item.label.note} in ${(isBlock ? item.parent?.path : item.module) || "the model"}`;
  const group = shape(parent, "g", { class: kinds.join(" "), transform: `translate(${item.x},${item.y})`, "data-key": key,
    tabindex: 0, role: "button", "aria-label": name, ...(isBlock ? { "aria-expanded": item.open } : {}) });
  const size = { class: "box", x: -item.w / 2, y: 0, width: item.w, height: item.h, rx: isBlock ? 7 : 4 };
  shape(group, "rect", size);
  item.bars = shape(group, "g", {});
  if (isBlock && item.open) drawInside(item, group);
  const left = 10 - item.w / 2, middle = isBlock && item.open ? 13 : 11;
  if (item.label.mark) shape(group, "text", { class: "mark", x: left, y: middle }, item.label.mark);
  shape(group, "text", { x: left + textWidth(item.label.mark), y: middle }, item.label.text);
  const after = left + textWidth(item.label.mark + item.label.text) + 8;
  if (item.label.note) shape(group, "text", { class: "note", x: after, y: middle }, item.label.note);
  item.group = group;
  drawn.set(key, item);
}

function drawInside(block, group) {
  for (const one of block.nets.values()) {
    const [path, back] = netPath(block, one);
    for (const [d, kind] of [[path, "net"], [back, "net back"]]) {
      if (d) lines.push({ id: one.id, value: one.value, path: shape(group, "path", { class: kind, d }) });
    }
  }
  for (const item of block.items) {
    Object.assign(item, { left: block.left + item.x, top: block.top + item.y });
    drawItem(item, group);
  }
}

// Colours follow the legend, or what the pointer is on; what has no active family then steps back.
function colour() {
  const active = (index) => (spotlight ? spotlight.has(index) : !data.families[index].pattern.off);
  const choosing = spotlight !== null || [...patterns.values()].some((one) => one.off);
  for (const item of drawn.values()) {
    const on = [...item.families].filter(active);
    item.bars.replaceChildren();
    if (item instanceof Block && item.open) continue;
    item.group.classList.toggle("dim", choosing && on.length === 0);
    const tints = [...new Set(on.map((index) => data.families[index].pattern.colour))];
    const width = (item.w - 8) / tints.length;
    tints.forEach((fill, i) => shape(item.bars, "rect", { x: 4 - item.w / 2 + i * width, y: item.h - 5, width, height: 4, fill }));
  }
  for (const { value, path } of lines) {
    const on = (valueFamilies.get(value) ?? []).filter(active).sort((a, b) => data.families[b].prunable - data.families[a].prunable);
    path.style.stroke = on.length ? data.families[on[0]].pattern.colour : "";
    path.classList.toggle("coloured", on.length > 0);
    path.classList.toggle("dim", choosing && on.length === 0);
  }
}

// ---- moving about

function move() {
  scene.setAttribute("transform", `translate(${view.x},${view.y}) scale(${view.scale})`);
}

function zoom(factor, x = canvas.clientWidth / 2, y = canvas.clientHeight / 2) {
  const scale = Math.min(3, Math.max(0.03, view.scale * factor)), real = scale / view.scale;
  Object.assign(view, { scale, x: x - (x - view.x) * real, y: y - (y - view.y) * real });
  move();
}

function fit() {
  const scale = Math.min(1, (canvas.clientWidth - 40) / root.w, (canvas.clientHeight - 70) / root.h);
  Object.assign(view, { scale, x: canvas.clientWidth / 2, y: 50 });
  move();
}

function start() {
  const scale = Math.min(1, Math.max(0.4, canvas.clientWidth / (root.w + 40)));
  Object.assign(view, { scale, x: canvas.clientWidth / 2, y: 50 });
  move();
}

function show(item) {
  Object.assign(view, { scale: Math.max(0.8, view.scale) });
  Object.assign(view, { x: canvas.clientWidth / 2 - item.left * view.scale, y: canvas.clientHeight / 3 - item.top * view.scale });
  move();
}

// Fold or unfold, keeping the block's header under the pointer.
function toggle(block) {
  if (!block.parent) return;
  const { left, top } = block;
  block.open = !block.open;
  draw();
  view.x += (left - block.left) * view.scale;
  view.y += (top - block.top) * view.scale;
  move();
  block.group.focus({ preventScroll: true });
}

function reveal(item) {
  for (let block = item.parent; block; block = block.parent) block.open = true;
  draw();
  show(item);
  item.group.focus({ preventScroll: true });
  mark(found);
}

function mark(text) {
  found = text;
  for (const item of drawn.values()) {
    const name = item instanceof Block ? item.path : item.op;
    item.group.classList.toggle("found", text !== "" && name.toLowerCase().includes(text));
  }
}

// ---- the pointer and the keyboard

const keyAt = (target) => target.closest?.("[data-key]")?.dataset.key;

function press(key) {
  const item = drawn.get(key);
  if (item instanceof Block) toggle(item);
  else if (item) pin(item);
}

function listen() {
  let grip = null;
  canvas.addEventListener("pointerdown", (event) => { grip = { x: event.clientX, y: event.clientY, moved: false }; });
  canvas.addEventListener("pointermove", (event) => {
    if (!grip || !event.buttons) return;
    const [dx, dy] = [event.clientX - grip.x, event.clientY - grip.y];
    if (!grip.moved && Math.hypot(dx, dy) < 5) return;
    grip = { x: event.clientX, y: event.clientY, moved: true };
    canvas.classList.add("moving");
    Object.assign(view, { x: view.x + dx, y: view.y + dy });
    move();
  });
  canvas.addEventListener("click", (event) => {
    canvas.classList.remove("moving");
    if (!grip?.moved) press(keyAt(event.target));
    grip = null;
  });
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    const box = canvas.getBoundingClientRect();
    if (event.ctrlKey || event.metaKey) return zoom(Math.exp(-event.deltaY / 300), event.clientX - box.left, event.clientY - box.top);
    Object.assign(view, { x: view.x - event.deltaX, y: view.y - event.deltaY });
    move();
  }, { passive: false });
  canvas.addEventListener("pointerover", (event) => look(keyAt(event.target)));
  canvas.addEventListener("pointerleave", () => look(null));
  document.addEventListener("keydown", (event) => { if (event.key === "Escape" && pinned) pin(pinned); });
  canvas.addEventListener("focusin", (event) => look(keyAt(event.target)));
  canvas.addEventListener("keydown", keyboard);
  byId("search").addEventListener("input", search);
  byId("search").addEventListener("keydown", (event) => { if (event.key === "Enter") byId("results").querySelector("button")?.click(); });
  byId("closer").onclick = () => zoom(1.3);
  byId("farther").onclick = () => zoom(1 / 1.3);
  byId("fit").onclick = fit;
  byId("unfold").onclick = () => { for (const block of blocksOf(root)) block.open = true; draw(); start(); };
  byId("fold").onclick = () => { openByDefault(root); draw(); start(); };
  byId("plain").onchange = () => { build(); draw(); move(); };
}

function keyboard(event) {
  const key = keyAt(event.target);
  const steps = { ArrowLeft: [60, 0], ArrowRight: [-60, 0], ArrowUp: [0, 60], ArrowDown: [0, -60] };
  const actions = { "+": () => zoom(1.3), "-": () => zoom(1 / 1.3), 0: fit, Enter: () => press(key), " ": () => press(key) };
  if (steps[event.key]) Object.assign(view, { x: view.x + steps[event.key][0], y: view.y + steps[event.key][1] });
  else if (actions[event.key]) actions[event.key]();
  else return;
  event.preventDefault();
  move();
}

const percent = (share) => `${(100 * share).toFixed(1)} %`;
byId("title").textContent = data.title;
byId("facts").textContent = `${number(data.vertices.length)} operators, ${number(data.families.length)} families, ${number(data.families.filter((family) => family.prunable).length)} of them prunable. Families cover ${percent(data.covered)} of the matrix parameters, prunable ones ${percent(data.prunable)}.`;
byId("plain").nextElementSibling.textContent = `all ${number(data.vertices.length)} operators`;
drawLegend();
drawFrozen();
fill([element("p", { class: "quiet" }, "Point at a vertex or a family to see its members. Click a module to fold or unfold it, a vertex to keep its details; Esc lets go. Drag or scroll to move, Ctrl and scroll to zoom.")]);
listen();
build();
draw();
start();
