// The panel beside the drawing: details of what the pointer is on, legend, frozen operators, search.

const number = (n) => n.toLocaleString("en");
const short = (n) => (n < 1e4 ? number(n) : n.toLocaleString("en", { notation: "compact", maximumFractionDigits: 2 }));
const chip = (colour) => element("span", { class: "chip", style: `background:${colour}` });

// Every size is underlined in the colours of the families that live along it.
function shapeLine(label, sizes, dims) {
  const parts = sizes.map((size, i) => {
    const colours = [...new Set((dims[i] ?? []).map((family) => data.families[family].pattern.colour))];
    const ground = `linear-gradient(90deg,${[...colours, colours.at(-1)].join(",")})`;
    return [i ? " × " : "", element("span", { style: colours.length ? `border-bottom:3px solid;border-image:${ground} 1` : null }, String(size))];
  });
  return element("tr", {}, element("td", {}, breakable(label)), element("td", {}, parts.length ? parts.flat() : "scalar"));
}

function memberPart(member, groups) {
  const rows = member.rows.map((row) => `[${row.join(" ")}${member.width > row.length ? " …" : ""}]`);
  return element("div", { class: "member" }, element("code", {}, breakable(member.tensor)),
    element("div", { class: "quiet" }, `dim ${member.dim}, ${number(groups)} × ${number(member.width)} indices: `, element("code", {}, `${rows.join(" ")}${groups > rows.length ? " …" : ""}`)));
}

function familyPart(family, limit, near = "") {
  const members = [...family.members].sort((a, b) => b.tensor.startsWith(`${near}.`) - a.tensor.startsWith(`${near}.`));
  const shown = pinned ? members : members.slice(0, limit), left = members.length - shown.length;
  return [
    element("h3", {}, chip(family.pattern.colour), family.name),
    element("p", { class: "quiet" }, `${family.kind}, ${number(family.groups)} groups of ${short(family.parameters)} parameters and ${short(family.macs)} MACs`),
    element("p", {}, family.prunable ? "prunable" : element("span", { class: "quiet" }, `not prunable: ${family.reason}`)),
    family.excludes.length ? element("p", { class: "quiet" }, `excludes ${family.excludes.join(", ")}`) : null,
    ...shown.map((member) => memberPart(member, family.groups)),
    left ? element("p", { class: "quiet" }, `and ${number(left)} more members; a click on a vertex or a family keeps and shows all`) : null,
  ];
}

function describe(item) {
  const parts = [];
  if (item instanceof Block) {
    const families = [...item.families].map((index) => data.families[index]);
    parts.push(element("h2", {}, "Module"), element("h3", {}, item.path || data.title));
    parts.push(element("p", { class: "quiet" }, `${number(item.count)} operators${item.quantizers ? `, ${item.quantizers} quantizers` : ""}${item.frozen ? `, ${item.frozen} frozen` : ""}; click to ${item.open ? "fold" : "unfold"}`));
    parts.push(...families.slice(0, 12).flatMap((family) => familyPart(family, 3, item.path)));
    if (families.length > 12) parts.push(element("p", { class: "quiet" }, `and ${families.length - 12} more families`));
  } else {
    parts.push(element("h2", {}, "Operator"), element("h3", {}, labelOf(item).text), element("p", { class: "mono" }, item.module || data.title));
    if (item.frozen) parts.push(element("p", { class: "alarm" }, `❄ frozen: ${item.frozen}`));
    if (item.body.length) parts.push(element("p", { class: "mono quiet" }, `merged: ${item.body.join(" → ")}`));
    if (item.returned) parts.push(element("p", {}, "the model returns its result"));
    if (item.reads.length) parts.push(element("h2", {}, "reads"), element("table", {}, item.reads.map(([, sizes, dims, ...names]) => shapeLine(names.join(" = "), sizes, dims))));
    parts.push(element("h2", {}, "gives"), element("table", {}, item.outputs.map(([, sizes, dims], i) => shapeLine(i ? `result ${i + 1}` : "result", sizes, dims))));
    if (!item.families.size) parts.push(element("p", { class: "quiet" }, "No family: nothing of its result may leave."));
    parts.push(...[...item.families].flatMap((family) => familyPart(data.families[family], 6, item.block)));
  }
  fill(parts);
}

function fill(parts) {
  const release = pinned ? [element("button", { class: "release", onclick: () => pin(pinned) }, "let go (Esc)")] : [];
  byId("details").replaceChildren(...release, ...parts.filter((part) => part !== null));
}

function look(key) {
  const item = drawn.get(key);
  document.querySelectorAll("#scene .hot").forEach((one) => one.classList.remove("hot"));
  if (!item) return;
  item.group.classList.add("hot");
  if (!(item instanceof Block)) for (const { id, path } of lines) path.classList.toggle("hot", item.lines.has(id));
  if (!pinned) describe(item);
}

// Keep the details of a vertex or a family until it is let go.
function pin(item) {
  document.querySelectorAll("#scene .pinned").forEach((one) => one.classList.remove("pinned"));
  pinned = item === pinned ? null : item;
  if (pinned?.group) pinned.group.classList.add("pinned");
  if (item.members) fill(familyPart(item, 40));
  else describe(item);
}

// Keep a family's details and bring the place where it is drawn into view.
function pinFamily(family) {
  const places = [...drawn.values()].filter((item) => item.families.has(family.index));
  if (pinned !== family && places.length) show(places.find((item) => !(item instanceof Block && item.open)) ?? places[0]);
  pin(family);
}

function lookAtFamilies(families) {
  spotlight = families && new Set(families.map((family) => family.index));
  colour();
  if (families && !pinned) fill([element("h2", {}, families.length > 1 ? `${families.length} families; the first:` : "Family"), ...familyPart(families[0], 40)]);
}

function drawLegend() {
  const groups = [...patterns.values()];
  const only = (one) => {
    const alone = groups.every((other) => other.off === (other !== one));
    for (const other of groups) other.off = !alone && other !== one;
    refreshLegend();
  };
  const line = (one) => {
    const [first] = one.families, many = one.families.length;
    const look = { onpointerenter: () => lookAtFamilies(one.families), onpointerleave: () => lookAtFamilies(null) };
    const each = one.families.map((family) => element("button", { class: "mono", onpointerenter: () => lookAtFamilies([family]), onpointerleave: () => lookAtFamilies(one.families),
      onfocus: () => lookAtFamilies([family]), onblur: () => lookAtFamilies(null), onclick: () => pinFamily(family) }, many > 1 ? placeIn(family) : family.name));
    one.row = element("summary", { class: "row" },
      element("button", { class: "name mono", "aria-pressed": "true", title: first.prunable ? "prunable; click to show or hide" : `${first.reason}; click to show or hide`,
        onclick: (event) => { event.preventDefault(); one.off = !one.off; refreshLegend(); }, onfocus: look.onpointerenter, onblur: look.onpointerleave },
      chip(one.colour), breakable(one.name)),
      element("span", { class: "quiet" }, `${many > 1 ? `${many} × ` : ""}${number(first.groups)}`),
      element("button", { onclick: (event) => { event.preventDefault(); only(one); } }, "only"),
      element("button", { "aria-label": `Each family of ${one.name}`, onclick: (event) => { event.preventDefault(); one.part.open = !one.part.open; } }, "▾"));
    one.part = element("details", look, one.row, element("div", { class: "members" }, each));
    return one.part;
  };
  const part = (title, list) => (list.length ? [element("h2", {}, title), ...list.map(line)] : []);
  const may = (one) => one.families[0].prunable;
  byId("legend").replaceChildren(...part("Prunable families", groups.filter(may)), ...part("Not prunable", groups.filter((one) => !may(one))));
}

const breakable = (name) => name.split(/(?<=[.:])/).flatMap((part) => [part, element("wbr")]);

const placeIn = (family) => (family.name.match(/(?<=^|\.)\d+(?=[.:#]|$)/g) ?? [family.name]).join(".");

function refreshLegend() {
  for (const one of patterns.values()) {
    one.row.toggleAttribute("data-off", one.off);
    one.row.querySelector("button").setAttribute("aria-pressed", String(!one.off));
  }
  colour();
}

function drawFrozen() {
  byId("frozen").hidden = !data.frozen.length && !data.untouched.length;
  const line = (one) => element("button", { onclick: () => revealFrozen(one) }, element("span", { class: "alarm mono" }, `❄ ${one.op} `),
    element("span", { class: "mono" }, breakable(one.modules || "the model")), element("span", { class: "quiet" }, ` ${one.count} ×, ${one.reason}`));
  const frozen = data.frozen.length ? [element("h2", {}, "Frozen"), ...data.frozen.map(line)] : [];
  const untouched = data.untouched.map((name) => element("p", { class: "mono" }, breakable(name)));
  byId("frozen").replaceChildren(...frozen, ...(untouched.length ? [element("h2", {}, "Read by no operator"), ...untouched] : []));
}

function revealFrozen(one) {
  const vertex = data.vertices.find((other) => other.frozen && other.op === one.op && other.module === one.module);
  if (vertex) reveal(vertex);
}

function search() {
  const text = byId("search").value.trim().toLowerCase();
  mark(text);
  const blocks = text ? blocksOf(root).filter((block) => block.path.toLowerCase().includes(text)) : [];
  const vertices = text ? data.vertices.filter((vertex) => vertex.parent && vertex.op.toLowerCase().includes(text)) : [];
  const results = [...blocks.sort((a, b) => a.path.length - b.path.length), ...vertices].slice(0, 30);
  const left = blocks.length + vertices.length - results.length;
  const line = (item) => element("button", { class: "mono", onclick: () => reveal(item) }, item instanceof Block ? item.path : `${item.module || "model"} › ${item.op}`);
  const rest = left > 0 ? [element("p", { class: "quiet" }, `and ${number(left)} more`)] : [];
  byId("results").replaceChildren(...results.map(line), ...rest, ...(text && !results.length ? [element("p", { class: "quiet" }, "nothing found")] : []));
}
