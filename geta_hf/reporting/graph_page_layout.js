// From vertices and edges to boxes and lines: a tree of modules, each open one laid out in layers by longest path.

const HEADER = 24, PAD = 14, GAP = 16, HEIGHT = 25, MARGIN = 18;
const brush = document.createElement("canvas").getContext("2d");
brush.font = "600 12px ui-monospace, monospace";
const textWidth = (text) => brush.measureText(text).width;

class Block {
  constructor(name, path, parent) {
    Object.assign(this, { name, path, parent, blocks: new Map(), vertices: [], nets: new Map(), families: new Set() });
    Object.assign(this, { frozen: 0, quantizers: 0, count: 0 });
  }
}

// The module tree over the visible vertices; a module with nothing but one submodule is drawn as one with it.
function buildTree(vertices, edges) {
  const root = new Block("model", "", null);
  for (const vertex of vertices) {
    let block = root;
    const parts = vertex.block ? vertex.block.split(".") : [];
    parts.forEach((part, depth) => {
      if (!block.blocks.has(part)) block.blocks.set(part, new Block(part, parts.slice(0, depth + 1).join("."), block));
      block = block.blocks.get(part);
    });
    vertex.parent = block;
    block.vertices.push(vertex);
  }
  joinChains(root);
  finish(root);
  const visible = new Set(vertices);
  for (const edge of edges) if (visible.has(edge.from) && visible.has(edge.to)) addNets(edge);
  return root;
}

function joinChains(block) {
  for (const [part, child] of block.blocks) {
    joinChains(child);
    const inner = [...child.blocks.values()];
    if (child.vertices.length || inner.length !== 1) continue;
    inner[0].name = `${child.name}.${inner[0].name}`;
    inner[0].parent = block;
    block.blocks.set(part, inner[0]);
  }
}

function finish(block) {
  for (const child of block.blocks.values()) finish(child);
  block.items = [...block.blocks.values(), ...block.vertices].sort((a, b) => a.order - b.order);
  block.order = block.items.length ? block.items[0].order : 0;
  for (const item of block.items) {
    for (const family of item.families) block.families.add(family);
    block.frozen += item instanceof Block ? item.frozen : item.frozen ? 1 : 0;
    block.quantizers += item instanceof Block ? item.quantizers : item.body.length ? 1 : 0;
    block.count += item instanceof Block ? item.count : 1;
  }
  block.shape = block.items.map((item) => (item instanceof Block ? `${item.name}(${item.shape})` : item.op)).join(" ");
}

// Everything is open that is no small leaf and not huge, save for the twins of a layer that is drawn already.
function openByDefault(block) {
  block.open = !block.parent || ((block.blocks.size > 0 || block.count > 8) && block.vertices.length < 500);
  const drawn = new Set();
  for (const child of block.blocks.values()) {
    openByDefault(child);
    const repeated = /^\d+$/.test(child.name) && drawn.has(child.shape);
    drawn.add(child.shape);
    if (repeated) child.open = false;
  }
}

function chain(item) {
  const path = [];
  for (let node = item; node; node = node.parent) path.unshift(node);
  return path;
}

// A net is one value inside one block: from an item (or from outside: null) to items, and perhaps out again.
function net(block, id, value) {
  if (!block.nets.has(id)) block.nets.set(id, { id, value, from: null, to: new Set(), out: false });
  return block.nets.get(id);
}

function addNets({ id, value, from, to }) {
  const up = chain(from), down = chain(to);
  let depth = 0;
  while (up[depth] === down[depth]) depth++;
  const shared = net(up[depth - 1], id, value);
  shared.from = up[depth];
  shared.to.add(down[depth]);
  for (let i = depth; i < down.length - 1; i++) net(down[i], id, value).to.add(down[i + 1]);
  for (let i = depth; i < up.length - 1; i++) Object.assign(net(up[i], id, value), { from: up[i + 1], out: true });
}

// Sets w and h of an item and, for an open block, x and y of everything in it, relative to its top centre.
function layout(item) {
  const label = item.label = labelOf(item);
  item.w = textWidth(label.mark + label.text) + textWidth(label.note) + (label.note ? 30 : 22);
  item.h = HEIGHT;
  item.inPorts = new Map();
  item.outPorts = new Map();
  if (!(item instanceof Block) || !item.open) return;
  item.items.forEach(layout);
  const rows = makeRows(item);
  arrange(rows);
  settle(item, rows);
}

function rankItems(block) {
  const rank = new Map(), before = new Map(), after = new Map();
  for (const item of block.items) before.set(item, []), after.set(item, []);
  for (const { from, to, out } of block.nets.values()) {
    for (const item of to) if (from && item.order > from.order) before.get(item).push(from), after.get(from).push(item);
    if (!from) for (const item of to) before.get(item).push(null);
  }
  for (const item of block.items) rank.set(item, Math.max(1, ...before.get(item).map((other) => (rank.get(other) ?? 0) + 1)));
  for (const item of [...block.items].reverse()) {
    if (before.get(item).length || !after.get(item).length) continue;
    rank.set(item, Math.max(1, Math.min(...after.get(item).map((other) => rank.get(other))) - 1));
  }
  return rank;
}

// Rows of cells: ports at both ends, items by rank, and a place for every line that runs past a row.
function makeRows(block) {
  const rank = rankItems(block), cells = new Map();
  const last = block.items.reduce((most, item) => Math.max(most, rank.get(item)), 0) + 1;
  const far = farFrom(block, rank, last);
  const rows = Array.from({ length: last + 1 }, () => []);
  const cell = (row, order, extra) => {
    const made = { row, order, w: 8, h: 0, x: 0, up: [], down: [], item: null, ...extra };
    rows[row].push(made);
    return made;
  };
  for (const item of block.items) cells.set(item, cell(rank.get(item), item.order, { item, w: item.w, h: item.h }));
  for (const one of block.nets.values()) {
    const order = one.from ? one.from.order : -1;
    const targets = [...one.to].map((item) => cells.get(item));
    if (one.out) targets.push(cell(last, order, { port: "outPorts", id: one.id }));
    const start = one.from ? cells.get(one.from) : cell(0, order, { port: "inPorts", id: one.id });
    one.segments = [];
    const aside = (target) => target.row <= start.row || target.row - start.row > far;
    one.back = targets.filter(aside).map((target) => [start, target]);
    const end = Math.max(...targets.map((target) => (aside(target) ? 0 : target.row)));
    for (let row = start.row + 1, at = start; row <= end; row++) {
      for (const target of targets) if (target.row === row) connect(one, at, target);
      if (row < end) {
        const pass = cell(row, order, { pass: true });
        connect(one, at, pass);
        at = pass;
      }
    }
  }
  return rows;
}

// How many rows a line may pass on its way; where an unrolled loop would need very many places, long ones go aside.
function farFrom(block, rank, last) {
  const reach = (one) => Math.max(...[...one.to].map((item) => rank.get(item)), one.out ? last : 0) - (rank.get(one.from) ?? 0);
  const places = [...block.nets.values()].reduce((sum, one) => sum + Math.max(0, reach(one)), 0);
  return places > 20000 ? 30 : Infinity;
}

function connect(one, a, b) {
  const segment = { a, b, from: a.item?.outPorts, to: b.item?.inPorts, id: one.id };
  one.segments.push(segment);
  a.down.push(segment);
  b.up.push(segment);
}

const startX = ({ a, from, id }) => a.x + (from?.get(id) ?? 0);
const endX = ({ b, to, id }) => b.x + (to?.get(id) ?? 0);

// Sweeps down and up: every cell goes to the mean of its neighbours, first free to change places, then not.
function arrange(rows) {
  for (const row of rows) row.sort((a, b) => a.order - b.order), place(row, row.map(() => 0));
  for (let sweep = 0; sweep < 15; sweep++) {
    const down = sweep % 2 === 0;
    for (const row of down ? rows : [...rows].reverse()) {
      for (const cell of row) cell.wish = wish(cell, down);
      if (sweep < 8) row.sort((a, b) => a.wish - b.wish);
      place(row, row.map((cell) => cell.wish));
    }
  }
}

// Where a cell's lines to the row above (or below) would be straight.
function wish(cell, down) {
  const shifts = (down ? cell.up : cell.down).map((segment) => (startX(segment) - endX(segment)) * (down ? 1 : -1));
  return shifts.length ? cell.x + shifts.reduce((a, b) => a + b) / shifts.length : cell.x;
}

// The places nearest to the wishes (least squares) that keep order and distance: pool adjacent violators.
function place(row, wishes) {
  const pools = [];
  let offset = 0;
  row.forEach((cell, i) => {
    if (i) offset += (row[i - 1].w + cell.w) / 2 + (cell.item || row[i - 1].item ? GAP : 4);
    cell.offset = offset;
    const weight = cell.pass ? 3 : 1;
    let pool = { cells: [cell], sum: weight * (wishes[i] - offset), weight };
    while (pools.length && pools.at(-1).sum / pools.at(-1).weight > pool.sum / pool.weight) {
      const left = pools.pop();
      pool = { cells: left.cells.concat(pool.cells), sum: left.sum + pool.sum, weight: left.weight + pool.weight };
    }
    pools.push(pool);
  });
  for (const pool of pools) for (const cell of pool.cells) cell.x = pool.sum / pool.weight + cell.offset;
}

// Final coordinates of an open block, centred on its own middle.
function settle(block, rows) {
  const cells = rows.flat();
  const left = cells.reduce((least, c) => Math.min(least, c.x - c.w / 2), Infinity);
  const right = cells.reduce((most, c) => Math.max(most, c.x + c.w / 2), -Infinity);
  const header = block.w;
  block.w = Math.max(header, right - left + 2 * PAD);
  block.rows = [];
  let y = 0;
  rows.forEach((row, r) => {
    const height = Math.max(0, ...row.map((c) => c.h));
    block.rows.push({ top: y, bottom: y + height });
    const slide = Math.max(0, ...row.flatMap((c) => c.down.map((s) => Math.abs(startX(s) - endX(s)))));
    y += height + (r === 0 ? HEADER : 0) + (r < rows.length - 1 ? Math.min(48, MARGIN + slide / 12) : 0);
  });
  block.h = y;
  for (const cell of cells) {
    cell.x -= (left + right) / 2;
    if (cell.port) block[cell.port].set(cell.id, cell.x);
    if (cell.item) Object.assign(cell.item, { x: cell.x, y: block.rows[cell.row].top });
  }
}

// The lines of a net, in the block's own coordinates: downwards, and aside along the right border.
function netPath(block, { id, segments, back }) {
  const line = segments.map((segment) => {
    const { a, b } = segment, x = startX(segment), to = endX(segment);
    const { top, bottom } = block.rows[a.row], next = block.rows[b.row].top, bend = (bottom + next) / 2;
    return `M${x},${a.item ? top + a.h : top}V${bottom}C${x},${bend} ${to},${bend} ${to},${next}`;
  });
  const side = block.w / 2 - 6;
  const returning = back.map(([a, b]) => {
    const down = block.rows[a.row].top + a.h + 6, up = block.rows[b.row].top - 6;
    const from = a.x + (a.item?.outPorts.get(id) ?? 0), to = b.x + (b.item?.inPorts.get(id) ?? 0);
    return `M${from},${down - 6}V${down}H${side}V${up}H${to}V${up + 6}`;
  });
  return [line.join(""), returning.join("")];
}
