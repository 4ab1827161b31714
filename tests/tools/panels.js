// ---------------------------------------------------------------------------------------------------------------
// The panels A to F around the models of page.js. `view` is all that a reader has chosen; it lives in the address

const $ = (id) => document.getElementById(id);
const S = CONFIG.size, K = layout.n_grains, V = CONFIG.codebook_size, UNIT = S / layout.fine_side,
  PICTURES = DATA.pictures;
const NAMES = [["fixed"], ["coarse", "fine"], ["coarse", "medium", "fine"]][K - 1] || layout.cells.map(
  (_, k) => `level ${k}`);
const HUE = (k) => `var(--grain${Math.min(k, 2)})`;
const PLAIN = {temperature: 1, top_k: 0, top_p: 1, cfg: 1}, LIKE_SAMPLE = {...PLAIN, temperature: 0.7, cfg: 2};
const START = {pic: 0, cut: null, flip: {}, t: null, given: null, seed: 0, label: null, temperature: 1, top_p: 1,
               cfg: 1, over: "order", head: "mean", keep: null, base: 0, map: null, mapseed: 0, kept: null};
const view = {...START};
let trace = null, finished = null;                           // the sequence of panels B to D, and its pixels
const options = () => ({temperature: view.temperature, top_k: 0, top_p: view.top_p, cfg: view.cfg});
const label = () => view.label ?? PICTURES[view.pic].label;

const percent = (p) =>
  (p >= 0.0995 ? (100 * p).toFixed(0) : p >= 0.00095 ? (100 * p).toFixed(1) : p > 0 ? "<0.1" : "0") + "%";
const plural = (n, noun) => `${n} ${noun}${n === 1 ? "" : "s"}`;
const same = (a, b) => a[0] === b[0] && a[1] === b[1];
const is_eos = (pos) => layout.ids[pos].is_eos;
const short = (pos) => (is_eos(pos) ? "EOS" : `${layout.ids[pos].row + 1},${layout.ids[pos].column + 1}`);
const describe = (pos) => {
  const {grain, row, column} = layout.ids[pos];
  return is_eos(pos) ? `EOS of ${NAMES[grain]}` : `${NAMES[grain]}, row ${row + 1}, column ${column + 1}`;
};

function el(tag, props = {}, ...children) {                  // an element; "on..." are listeners, the rest attributes
  const svg = ["svg", "rect", "text", "path", "polyline", "line", "circle", "g", "pattern"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(props))
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(node.style, value);
    else if (value !== false && value !== undefined) node.setAttribute(name, value === true ? "" : value);
  node.append(...children);
  return node;
}

const button = (text, onclick, props = {}) => el("button", {onclick, ...props}, text);
const pressed = (on) => ({"aria-pressed": String(on)});
const entered = (act) => (event) => ["Enter", " "].includes(event.key) && (event.preventDefault(), act());

function rich(node, text) {                                  // "[where 3 nats]": words in the colour of a class
  node.replaceChildren(...text.split(/(\[\w+ [^\]]+\])/).map((part) => {
    const found = part.match(/^\[(\w+) ([^\]]+)\]$/);
    return found ? el("b", {class: found[1]}, found[2]) : part;
  }));
}

function slider(text, value, min, max, step, act) {
  const shown = el("output", {}, value.toFixed(2));
  const input = el("input", {type: "range", min, max, step, value, "aria-label": text, oninput: () => {
    shown.textContent = (+input.value).toFixed(2);
    act(+input.value);
  }});
  return el("label", {class: "slider"}, el("span", {}, text, shown), input);
}

function choice(text, names, chosen, act) {                  // names: [[value, name], ...]
  return el("label", {}, text + " ", el("select", {onchange: (event) => act(event.target.value)},
    ...names.map(([value, name]) => el("option", {value, selected: String(value) === String(chosen)}, name))));
}

function stats(node, entries) {                              // entries: [[number, what it is, class], ...]
  node.replaceChildren(...entries.map(
    ([value, text, name = ""]) => el("div", {}, el("strong", {class: name}, value), text)));
}

// The address. Pairs are written in four characters: two digits of base 64 for the position, two for the content

const DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
const digits = (n) => DIGITS[n >> 6] + DIGITS[n & 63];
const number = (text) => DIGITS.indexOf(text[0]) * 64 + DIGITS.indexOf(text[1]);
const pairs_text = (pairs) => pairs.map(([pos, code]) => digits(pos) + digits(code + 1)).join("");
const text_pairs = (text) => (text.match(/..../g) || []).map((part) => [number(part), number(part.slice(2)) - 1]);
const numbers = (text) => text.split("_").filter(Boolean).map(Number);
const within = (x, low, high) => Math.min(Math.max(Number.isFinite(x) ? x : low, low), high);

const WRITE = {
  given: pairs_text, cut: (cut) => cut.join("_"), map: (map) => map.join("_"),
    flip: (flip) => Object.entries(flip).flat().join("_"),
  keep: (keep) => keep.map((each) => each.label + "." + pairs_text(each.pairs)).join("_~").replaceAll("_~", "~"),
};
const READ = {
  given: text_pairs, over: String, head: String,
  cut: (text) => (numbers(text).length === K - 1 ? numbers(text).map((x) => within(x, -1e9, 1e9)) : null),
  map: (text) => Array.from({length: layout.n_regions}, (_, i) => within(numbers(text)[i] | 0, 0, K - 1)),
  flip: (text) => Object.fromEntries(numbers(text).flatMap((region, i, all) =>
    (i % 2 || !(region < layout.n_regions) ? [] : [[region, within(all[i + 1] | 0, 0, K - 1)]]))),
  keep: (text) => text.split("~").map(
    (each) => ({label: within(parseInt(each), -1, n_classes - 1), pairs: text_pairs(each.split(".")[1] || "")}))
    .filter(({pairs}) => complete(legal_part(pairs))).slice(0, 6),
  pic: (text) => within(text | 0, 0, PICTURES.length - 1), label: (text) => within(text | 0, -1, n_classes - 1),
  kept: (text) => within(text | 0, 0, 7), temperature: (text) => within(+text, 0.1, 4),
    top_p: (text) => within(+text, 0.01, 1),
  cfg: (text) => within(+text, 0, 10),
};

function write_address() {
  const out = new URLSearchParams();
  for (const [name, value] of Object.entries(view))
    if (JSON.stringify(value) !== JSON.stringify(START[name])) out.set(name, (WRITE[name] || String)(value));
  if (`#${out}` !== (location.hash || "#")) history.replaceState(null, "", `#${out}`);
}

function read_address() {
  Object.assign(view, START);
  for (const [name, text] of new URLSearchParams(location.hash.slice(1)))
    if (name in START) view[name] = (READ[name] || ((value) => Math.max(0, value | 0)))(text);
}

// Work in slices: what takes long is a paused function (function*), which runs for 12 milliseconds at a time

const jobs = {}, busy = {};                                  // the newest job of each panel; older ones give up
async function run(panel, work, portion = 0, parts = 1) {    // -> what the work returns, or null if it was overtaken
  const mine = (jobs[panel] = {}), bar = $(panel).querySelector("progress"), begun = performance.now();
  busy[panel] = true;
  for (;;) {
    for (const until = performance.now() + 12; performance.now() < until;) {
      const {value, done} = work.next();
      if (done) {
        if (portion + 1 >= parts) end_job(panel);
        return value;
      }
      if (value && value.pairs) bar.value = (portion + value.pairs.length / (layout.max_len * 0.7)) / parts;
    }
    if (performance.now() - begun > 200 || portion) bar.hidden = false;
    await new Promise((go) => setTimeout(go));
    if (jobs[panel] !== mine) return null;
  }
}

function end_job(panel) {
  delete busy[panel];
  $(panel).querySelector("progress").hidden = true;
}

const painted = new Map();                                   // pixels of code maps that were decoded lately
function* picture(codes) {
  const key = codes.join();
  if (!painted.has(key)) painted.set(key, yield* decode(codes));
  if (painted.size > 500) painted.delete(painted.keys().next().value);
  return painted.get(key);
}

function paint(canvas, pixels, x = 0, y = 0, side = S) {     // S x S pixels, or a square of them
  [canvas.width, canvas.height] = [side, side];
  canvas.getContext("2d").putImageData(new ImageData(pixels, S, S), -x, -y);
  return canvas;
}

// the square of a position: x, y, side, in pixels of the image
function place_of(pos) {
  const {row, column, step} = layout.ids[pos];
  return [column * step * UNIT, row * step * UNIT, step * UNIT];
}

function square(pos, props) {
  const [x, y, side] = place_of(pos);
  return el("rect", {x, y, width: side, height: side, ...props});
}

const image = (pixels, about) => paint(el("canvas", {role: "img", "aria-label": about}), pixels);
const overlay = (...children) => el("svg", {viewBox: `0 0 ${S} ${S}`, "aria-hidden": "true"}, ...children);
const stack = (canvas, ...children) => el("div", {class: "stack"}, canvas, overlay(...children));
const boxes = (pairs) => pairs.filter(([pos]) => !is_eos(pos)).map(([pos]) =>
  square(pos, {fill: "none", class: "box" + Math.min(layout.ids[pos].grain, 2), "stroke-width": 0.35}));
const pixels_of = (pic) => {
  const bytes = bytes_of(PICTURES[pic].pixels);
  return Uint8ClampedArray.from({length: 4 * S * S},
    (_, i) => (i % 4 === 3 ? 255 : bytes[Math.floor(i / 4) * 3 + i % 4]));
};

// ---------------------------------------------------------------------------------------------------------------
// A  Where is the detail?

function grains_of(pic) {                                    // the router's choice, or the score cut at the thresholds
  const {score, grains} = PICTURES[pic];
  const chosen = view.cut ? score.map((s) => view.cut.filter((cut) => s > cut).length) : grains.slice();
  if (pic === view.pic) for (const [region, grain] of Object.entries(view.flip)) chosen[region] = grain;
  return chosen;
}

function codes_of(pic, grains) {                             // a cell's code depends on its own granularity alone
  const maps = PICTURES[pic].codes, side = layout.fine_side, c = side / layout.side;
  return Int32Array.from(maps[0], (_, i) =>
    maps[grains[Math.floor(i / side / c) * layout.side + Math.floor(i % side / c)]][i]);
}

function psnr(a, b) {
  let total = 0;
  for (let i = 0; i < a.length; i++) total += (a[i] - b[i]) ** 2;
  return 10 * Math.log10(255 ** 2 / Math.max(total / (3 * S * S), 1e-6));
}

const count = (grains) => sum(grains.map((k) => layout.cells[k]));
const bits = (n) => n * Math.log2(V) + layout.n_regions * Math.log2(K);  // n codes and the map, without a model

function all_cuts(pic) {                                     // each map of one threshold: from all coarse to all fine
  const {score} = PICTURES[pic], order = [...score.keys()].sort((a, b) => score[b] - score[a]);
  return [0, ...order.keys()].map((_, n) => {
    const grains = new Array(layout.n_regions).fill(0);
    for (const region of order.slice(0, n)) grains[region] = K - 1;
    return grains;
  });
}

async function show_a() {
  const grains = grains_of(view.pic), {score} = PICTURES[view.pic], original = pixels_of(view.pic),
    most = Math.max(...score, 1e-9);
  const side = S / layout.side, at = (r) => (
    {x: (r % layout.side) * side, y: Math.floor(r / layout.side) * side, width: side, height: side});
  const heat = score.map((value, r) => el(
    "g", {}, el("rect", {...at(r), fill: "var(--pin)", "fill-opacity": 0.85 * value / most}),
    el("text", {x: at(r).x + side / 2, y: at(r).y + side / 2, "font-size": side / 3.2, "text-anchor": "middle",
                "dominant-baseline": "central", fill: "var(--ink)"}, value.toFixed(2))));
  const flip = (r) => () => change({flip: {...view.flip, [r]: (grains[r] + 1) % K}, given: null, t: null});
  const cells = grains.map((k, r) => el("rect", {...at(r), class: "cell", tabindex: 0, role: "button", onclick: flip(r),
    onkeydown: entered(flip(r)), "aria-label": `region ${r + 1}, ${NAMES[k]}: flip`}));
  const boxed = stack(image(original, "boxes of the codes"),
    el("rect", {width: S, height: S, fill: "var(--panel)", "fill-opacity": 0.35}),
    ...boxes(layout.pack(codes_of(view.pic, grains), grains)), ...cells);
  boxed.lastChild.removeAttribute("aria-hidden");
  const again = el("div", {}, el("canvas", {width: S, height: S})), curve = el("div", {class: "curve"});
  const figure = (title, body, note) => el("div", {}, el("h3", {}, title), body, el("p", {class: "soft small"}, note));
  $("four").replaceChildren(
    figure("Image", image(original, "validation image"), `${S} x ${S} pixels, not seen in training`),
    figure("Score", stack(el("canvas", {width: S, height: S}), ...heat), `of the ${VAE.router} router, for detail`),
    figure("Granularity map", boxed, "one box per code; click to flip"),
    figure("Reconstruction", again, "decoded from the codes alone"),
    figure("What codes buy", curve, "all thresholds on the score"));
  const cut = view.cut || DATA.thresholds,
    turn = (i) => (x) => change({cut: cut.map((old, j) => (j === i ? x : old)), flip: {}, given: null, t: null});
  if ($("cuts").children.length && view.cut) {               // a slider that is being moved stays as it is
    $("cuts").lastChild.disabled = false;
  } else {
    $("cuts").replaceChildren(...cut.map((value, i) =>
      slider(`Threshold on the score${K > 2 ? `, ${NAMES[i]} to ${NAMES[i + 1]}` : ""}`, value, 0,
        Math.max(K - 1, most), 0.01, turn(i))),
      button("Router's own choice", () => change({cut: null, flip: {}, given: null, t: null}),
        {disabled: !view.cut && !Object.keys(view.flip).length}));
  }

  // the chosen image first, then the film, then the curve of all thresholds
  const decoded = await run("A", picture(codes_of(view.pic, grains)), 0, 2), n = count(grains),
    full = layout.n_regions * layout.cells[K - 1];
  if (!decoded) return;
  const dB = psnr(original, decoded);
  again.replaceChildren(image(decoded, "reconstruction"));
  stats($("statsA"), [[`${n}`, `codes of at most ${full}`], [bits(n).toFixed(0), "bits without a model"],
    [(bits(n) / S ** 2).toFixed(3), "bits per pixel"], [`${dB.toFixed(1)} dB`, "PSNR"]]);
  for (const [i, card] of [...$("film").children].entries()) {
    const mine = grains_of(i), pixels = await run("A", picture(codes_of(i, mine)), 0, 2);
    if (!pixels) return;
    card.setAttribute("aria-pressed", i === view.pic);
    card.setAttribute("aria-label", `image ${i + 1}, ${count(mine)} codes`);
    card.replaceChildren(image(pixels_of(i), "image"), image(pixels, "reconstruction"),
      el("small", {}, `${count(mine)} codes`),
      el("small", {class: "soft"}, `${psnr(pixels_of(i), pixels).toFixed(1)} dB`));
  }
  const points = [];
  for (const each of all_cuts(view.pic)) {
    const pixels = await run("A", picture(codes_of(view.pic, each)), 0, 2);
    if (!pixels) return;
    points.push([count(each), psnr(original, pixels)]);
  }
  end_job("A");
  draw_curve(curve, points, [n, dB]);
  const [[low, worst], [high, best]] = [points[0], points.at(-1)],
    chord = worst + (best - worst) * (n - low) / Math.max(high - low, 1);
  rich($("seeA"), K === 1 ? `There is one granularity, so every image has ${full} codes.` :
    `${plural(n, "code")} give ${dB.toFixed(1)} dB. With every region ${NAMES[K - 1]}, ${full} codes give ` +
    `${best.toFixed(1)} dB; with every region ` +
    `${NAMES[0]}, ${low} codes give ${worst.toFixed(1)} dB. ` + (n > low && n < full ? (dB > chord ?
    `Spending codes where the score is high buys ${(dB - chord).toFixed(1)} dB over the straight line between these ` +
    `two.` :
    `This map is ${(chord - dB).toFixed(1)} dB below the straight line between these two.`) : ""));
}

function draw_curve(node, points, [n, dB]) {
  const xs = points.map(([x]) => x), ys = [...points.map(([, y]) => y), dB];
  const [x0, x1, y0, y1] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const at = ([x, y]) => [34 + 176 * (x - x0) / Math.max(x1 - x0, 1), 140 - 124 * (y - y0) / Math.max(y1 - y0, 0.1)];
  const line = (list) => list.map((point) => at(point).join()).join(" "), [cx, cy] = at([n, dB]);
  const write = (x, y, anchor, text) => el("text", {x, y, "text-anchor": anchor}, text);
  node.replaceChildren(el("svg", {viewBox: "0 0 222 176", role: "img", "aria-label": "PSNR by number of codes"},
    el("path", {class: "axis", d: "M34 8V146H214", fill: "none"}),
    el("polyline", {class: "chord", points: line([points[0], points.at(-1)])}), el("polyline", {points: line(points)}),
    el("circle", {cx, cy, r: 5, fill: "var(--pin)"}), write(30, 143, "end", y0.toFixed(0)),
      write(30, 20, "end", y1.toFixed(0)),
    write(38, 12, "start", "dB"), write(34, 159, "start", x0), write(212, 159, "end", x1),
      write(124, 172, "middle", "number of codes")));
}

// ---------------------------------------------------------------------------------------------------------------
// B  The sequence: the image's own, or one that leaves it somewhere and is drawn by the model from there

const own_pairs = () => layout.pack(codes_of(view.pic, grains_of(view.pic)), grains_of(view.pic));
const complete = (pairs) => pairs.length > 0 && pairs.at(-1)[0] === layout.end;

function legal_part(pairs) {                                 // the pairs in front of the first that can't be
  const at = pairs.findIndex(([pos, code], t) =>
    !(layout.legal(t ? pairs[t - 1][0] : -1, layout.grains(pairs.slice(0, t)))[pos] && code >= -1 && code < V));
  return at < 0 ? pairs : pairs.slice(0, at);
}

function fork(state, t, rows) {                              // a copy of a state that has written t pairs
  const copy = ({keys, values}) => ({keys: keys.slice(0, t), values: values.slice(0, t)});
  const caches = rows.map((_, r) => state.caches[r].map(copy));
  return {labels: rows, caches, pairs: state.pairs.slice(0, t), steps: state.steps.slice(0, t)};
}

// given pairs, then drawn ones -> state, which takes over what `from` shares. cfg: other than 1 for both rows
function* follow(given, of_label, how, numbers, from, cfg = how.cfg) {
  const rows = rows_of(of_label, cfg);
  let t = 0;
  if (from && rows.every((row, r) => row === from.labels[r]))
    while (t < given.length && t < from.pairs.length && same(given[t], from.pairs[t])) t++;
  return yield* generate(of_label, how, numbers, given, t ? fork(from, t, rows) : first_state(rows));
}

// nats of each pair, where and what, under the model as it is
function costs(state) {
  return state.steps.map((step, t) => {
    const [pos, code] = state.pairs[t], where = softmax(place_logits(step, PLAIN))[pos];
    return [Math.abs(Math.log(where)), code < 0 ? 0 : -Math.log(softmax(content_logits(step, PLAIN))[code])];
  });
}
const nats = (state) => costs(state).reduce(([a, b], [c, d]) => [a + c, b + d], [0, 0]);

function most_open(state) {                                  // a step to begin with, where both draws have a choice
  const entropy = (p) => -sum(p.map((x) => (x > 0 ? x * Math.log(x) : 0)));
  const worth = state.steps.map((step, t) => (t > 1 && state.pairs[t][1] >= 0 ?
    entropy(softmax(place_logits(step, PLAIN))) * entropy(softmax(content_logits(step, PLAIN))) : 0));
  return worth.indexOf(Math.max(...worth));
}

async function show_sequence() {
  const given = legal_part(view.given || own_pairs());
  const found = await run("B", follow(given, label(), options(), uniform(view.seed, 0), trace, 2), 0, 2);
  const pixels = found && await run("B", picture(layout.unpack(found.pairs)), 1, 2);
  if (!pixels) return false;
  [trace, finished] = [found, pixels];
  view.t = Math.min(view.t ?? most_open(trace), trace.pairs.length - 1);
  show_b();
  show_step();
  return true;
}

function show_b() {
  const cost = costs(trace), dear = cost.map(([a, b]) => a + b), limit = Math.log(V),
    top = Math.max(limit * 1.12, ...dear);
  const height = (x) => ({height: `${100 * x / top}%`}),
    rule = (y, name = "") => el("div", {class: "rule" + name, style: {bottom: `${100 * y / top}%`}});
  const own = own_pairs(), left = trace.pairs.findIndex((pair, t) => !own[t] || !same(pair, own[t]));
  const scale = [0, 2, 4, 6, 8, 10, 12].filter((y) => y < top).map((y) => {
    const node = rule(y);
    node.append(el("span", {}, y));
    return node;
  });
  $("tiles").replaceChildren(...scale, rule(limit, " limit"), ...cost.map(([where, what], t) =>
    el("div", {class: "tile", onclick: () => change({t}),
               title: `pair ${t + 1}: ${describe(trace.pairs[t][0])}; where ${where.toFixed(2)}, what ` +
                 `${what.toFixed(2)} nats`},
      el("i", {class: "where", style: height(where)}), el("i", {class: "what", style: height(what)}))));
  $("strip").replaceChildren(...trace.pairs.map(([pos], t) => el("div", {onclick: () => change({t})},
    is_eos(pos) ? el("div", {class: "eos"}, "E") : paint(el("canvas"), finished, ...place_of(pos)),
    el("u", {style: {background: left >= 0 && t >= left ? "var(--pin)" : HUE(layout.ids[pos].grain)}}))));
  rich($("legendB"), `Height in nats: [where where], [what what]. Dashed: ln ${V} = ${limit.toFixed(2)} nats, what ` +
    `a code costs without ` +
    `a model. Below: the patch of each code; ${NAMES.map((name, k) => `[g${Math.min(k, 2)} ${name}]`).join(", ")}` +
    (left < 0 ? "." : "; [pin sampled by the model]."));

  const [where, what] = nats(trace), total = (where + what) / Math.LN2,
    n = trace.pairs.filter(([, code]) => code >= 0).length;
  stats($("statsB"), [[where.toFixed(1), "nats for where", "where"], [what.toFixed(1), "nats for what", "what"],
    [total.toFixed(0), "bits in all"], [(total / S ** 2).toFixed(3), "bits per pixel"]]);
  const most = dear.indexOf(Math.max(...dear)), name = CONFIG.classes[label()];
  rich($("seeB"), (left < 0 ? "These are the codes of the image in panel A. " : left > 0 ?
    `The first ${plural(left, "pair")} ${left === 1 ? "is" : "are"} the image's; the model sampled the rest. ` :
    "The model sampled all of this" +
    (view.given.length ? ". " : `, as python sample.py --n 1${name ? ` --label "${name}"` : ""} --seed ${view.seed} ` +
      `--temperature ${view.temperature} ` +
    `--top-p ${view.top_p} --cfg ${view.cfg} does, up to the rounding of the weights. `)) +
    `[where Where] takes ${percent(where / (where + what))} of the cost, [what what] the rest. Without a model, ` +
    `${plural(n, "code")} and the map take ` +
    `${bits(n).toFixed(0)} bits; the model saves ${total < bits(n) ? percent(1 - total / bits(n)) : "nothing here"}. ` +
    `The most surprising pair is number ${most + 1} (${describe(trace.pairs[most][0])}) with ` +
    `${dear[most].toFixed(1)} nats.`);
  $("scrub").max = trace.pairs.length - 1;
}

// ---------------------------------------------------------------------------------------------------------------
// C  The canvas

function show_step() {
  const {t} = view, [pos] = trace.pairs[t];
  $("tiles").querySelectorAll(".tile").forEach((tile, i) => {
    tile.setAttribute("aria-current", i === t);
    tile.classList.toggle("ahead", i > t);
  });
  $("scrub").value = t;
  $("scrub").setAttribute("aria-valuetext", `pair ${t + 1}: ${describe(pos)}`);
  $("step").textContent = `pair ${t + 1} / ${trace.pairs.length}`;
  show_c();
  show_d();
}

function show_c() {
  const {t, over} = view, step = trace.steps[t], written = trace.pairs.slice(0, t), [pos] = trace.pairs[t],
    name = NAMES[layout.ids[pos].grain];
  const codes = layout.unpack(written), blank = [...codes.keys()].filter((i) => codes[i] < 0), shapes = [];
  const write = (place, text) => {
    const [x, y, side] = place_of(place);
    shapes.push(el("text", {class: "order", x: x + side / 2, y: y + side / 2, "text-anchor": "middle",
      "dominant-baseline": "central",
                            style: {fontSize: `${Math.min(2.1, 0.55 * UNIT)}px`}}, text));
  };
  shapes.push(el("pattern", {id: "hatch", width: 1.6, height: 1.6, patternUnits: "userSpaceOnUse",
    patternTransform: "rotate(45)"},
    el("line", {class: "hatch", y2: 1.6})));
  for (const look of [{class: "blank"}, {fill: "url(#hatch)"}])
    shapes.push(el("path", {...look,
      d: blank.map((i) => `M${i % layout.fine_side * UNIT} ` +
        `${Math.floor(i / layout.fine_side) * UNIT}h${UNIT}v${UNIT}h-${UNIT}z`).join("")}));

  let said = is_eos(pos) ? `The model ends the ${name} codes here.` : `The next code goes to ${describe(pos)}.`;
  if (over === "order") {
    shapes.push(...boxes(written));
    written.forEach(([place], i) => is_eos(place) || write(place, i + 1));
    said = `${plural(written.filter(([, code]) => code >= 0).length, "code")} so far. The numbers tell the order: ` +
      `${NAMES.join(", then ")}, each row by row.`;
  } else if (over === "next") {
    const p = softmax(place_logits(step, options())), end = layout.eos[layout.ids[pos].grain];
    p.forEach((x, place) => {
      if (!step.legal[place] || is_eos(place)) return;
      shapes.push(square(place, {fill: "var(--where)", "fill-opacity": 0.12 + 0.8 * x, stroke: "var(--where)",
        "stroke-width": 0.25}));
      if (x >= 0.005) write(place, (100 * x).toFixed(0));
    });
    said = `In percent: where the next ${name} code may go. ` + (
      step.legal[end] ? `EOS, which ends the ${name} codes, has ${percent(p[end])}.` : "EOS can't come yet.");
  } else if (over === "attention") {
    const [layer, head] = view.head.split(".").map(Number), all = step.attention.flat();
    const weights = step.attention[layer]?.[head] || all[0].map((_, i) => sum(all.map((each) => each[i])) / all.length);
    let rest = weights[0];                                   // entry i holds the pair before i; entry 0 the class
    const codes_only = written.map(([place], i) => (is_eos(place) ? (rest += weights[i + 1], 0) : weights[i + 1]));
    codes_only.forEach((x, i) => {
      if (!is_eos(written[i][0])) shapes.push(
        square(written[i][0], {fill: "var(--pin)", "fill-opacity": 0.9 * x / Math.max(...codes_only, 1e-9)}));
      if (x >= 0.01) write(written[i][0], (100 * x).toFixed(0));
    });
    said = `In percent: where the content stack looks from the framed position. ` +
      `${n_classes ? "The class" : "The start"} and EOS get ${percent(rest)}.`;
  }
  if (!is_eos(pos)) shapes.push(square(pos, {class: "target"}));
  $("canvas").replaceChildren(image(finished, `the image after ${plural(t, "pair")}`), overlay(...shapes));
  $("overlays").replaceChildren(...[["none", "Image"], ["order", "Order"], ["next", "Next position"],
    ["attention", "Attention"]].map(([each, text]) =>
    button(text, () => change({over: each}), pressed(over === each))));
  const heads = step.attention.flatMap(
    (layer, i) => layer.map((_, h) => [`${i}.${h}`, `layer ${i + 1}, head ${h + 1}`]));
  $("heads").replaceChildren(...(
    over === "attention" ? [choice("Head", [["mean", "mean of all"], ...heads], view.head, (head) => change({head}))] :
      []));
  rich($("seeC"), said);
}

// ---------------------------------------------------------------------------------------------------------------
// D  Two samples

function why_not(place, prev, grains) {                      // in words, what `legal` says
  const {grain, region, opens} = layout.ids[place];
  if (place <= prev) return "it lies behind the last position, and each granularity goes row by row";
  if (grains[region] >= 0 && grains[region] < grain) return `a ${NAMES[grains[region]]} code covers it`;
  return opens || grains[region] === grain ? "a position in front of it must come first" :
    "a region begins at its first cell";
}

// parts: [from, to, text, colour], in the order of the draw
function bar(node, parts, u, about) {
  node.replaceChildren(...parts.filter(([from, to]) => to > from).map(([from, to, text, colour]) => {
    const style = {width: `${100 * (to - from)}%`, ...(colour && {background: colour})},
      fits = 260 * (to - from) > 8 * text.length;
    return el("div", {class: (colour ? "" : "rest ") + (u > from && u <= to ? "hit" : ""), style,
      title: `${text}: ${percent(to - from)}`}, colour && fits ? text : "");
  }), el("b", {style: {left: `${100 * u}%`}}));
  node.setAttribute("aria-label", `${about}; the pin is at ${u.toFixed(3)}`);
}

function show_d() {
  const {t} = view, step = trace.steps[t], [pos, code] = trace.pairs[t], {grain} = layout.ids[pos],
    u = uniform(view.seed, 0, t + 1)[t];
  const before = trace.pairs.slice(0, t), prev = t ? before[t - 1][0] : -1, grains = layout.grains(before),
    end = layout.eos[grain], side = layout.sides[grain];
  const force = (pair) => () => change({given: [...before, pair]});

  // where: a button per place of this granularity, then the bar
  const logits = place_logits(step, options()), p = softmax(logits), drawn = draw(logits, u[0]),
    n_legal = step.legal.filter(Boolean).length;
  $("places").style.gridTemplateColumns = `repeat(${side}, 1fr)`;
  $("places").replaceChildren(...Array.from({length: side * side}, (_, i) => {
    const place = layout.offsets[grain] + i;
    if (!step.legal[place]) {
      const reason = why_not(place, prev, grains),
        tell = () => rich($("seeD"), `${describe(place)} is not valid: ${reason}.`);
      return el("button", {class: "no", tabindex: -1, onclick: tell, title: reason, "aria-disabled": "true",
        "aria-label": `${describe(place)}: not valid, ${reason}`});
    }
    return el("button", {class: place === pos ? "here" : "", onclick: force([place, -1]),
      "aria-label": `${describe(place)}: ${percent(p[place])}; force it`},
      el("i", {style: {opacity: 0.75 * p[place]}}),
        el("span", {}, side <= 8 && p[place] >= 0.005 ? (100 * p[place]).toFixed(0) : ""));
  }));
  const ends = step.legal[end];
  $("eos").replaceChildren(el("i", {style: {opacity: 0.75 * p[end]}}),
    el("span", {}, ends ? `EOS, no more ${NAMES[grain]} codes: ${percent(p[end])}` : "EOS can't come yet"));
  Object.assign($("eos"), {className: pos === end ? "here" : "", disabled: !ends, onclick: force([end, -1])});
  $("whereD").textContent = n_legal === 1 ? "only one position is valid" : `${n_legal} are valid, in percent`;
  let total = 0;
  bar($("barWhere"), [...p.keys()].filter((i) => p[i] > 0).map(
    (i, n) => [total, (total += p[i]), short(i), `color-mix(in oklab, var(--where) ${n % 2 ? 76 : 100}%, black)`]),
      u[0], "places");

  // what: the likeliest codes, if the pair has a content
  const q_logits = content_logits(step, options()), q = softmax(q_logits),
    raw = softmax(apply_guidance(step.content, options()));
  const likeliest = [...raw.keys()].sort((a, b) => raw[b] - raw[a]).slice(0, 12), drawn_code = draw(q_logits, u[1]);
  $("barWhat").hidden = $("codes").hidden = is_eos(pos);
  $("whatD").textContent = is_eos(pos) ? "an EOS has no content" : `the ${likeliest.length} likeliest of ${V}`;
  show_patches(likeliest, q, u[1], force);

  const given = t < (view.given ? view.given.length : trace.pairs.length),
    of = given ? "the sequence is given" : "the sequence has";
  rich($("seeD"), (n_legal === 1 ? `The position is certain: ${describe(pos)}. ` :
    `[pin u = ${u[0].toFixed(3)}] gives ${describe(drawn)}${drawn === pos ? "" : `; ${of} ${describe(pos)}`}. `) +
    (is_eos(pos) ? "" : `[pin u = ${u[1].toFixed(3)}] gives code ${drawn_code} ` +
      `(${percent(q[drawn_code])})${code === drawn_code ? "" : `; ${of} code ${code} (${percent(q[code])})`}. `) +
    (!given ? "The model sampled this pair and all after it." : drawn === pos && (is_eos(pos) || code === drawn_code) ?
      "The sample agrees with the given pair." :
      "A frame marks the given pair; “Sample from here” lets the pins decide."));
  show_options(before, given);
}

async function show_patches(likeliest, q, u, force) {
  const [pos, code] = trace.pairs[view.t], mine = (jobs.patches = {}), colours = {};
  if (is_eos(pos)) return (jobs.D = {}), end_job("D");
  const [x, y, side] = place_of(pos);
  const cards = likeliest.map((c) => el(
    "button", {class: (c === code ? "here " : "") + (q[c] > 0 ? "" : "cut"), onclick: force([pos, c]),
    "aria-label": `code ${c}: ${percent(q[c])}; force it`}, el("canvas", {width: 1, height: 1}), percent(q[c])));
  $("codes").replaceChildren(...cards);
  const lay = () => {                                        // in the order of ids, as `draw` adds them up
    const parts = [];
    let total = 0;
    q.forEach((p, c) => {
      const shown = likeliest.includes(c), last = parts.at(-1);
      if (shown || !last || last[3]) parts.push(
        [total, total + p, shown ? `${c}` : "other codes", shown && (colours[c] || "var(--soft)")]);
      else last[1] = total + p;
      total += p;
    });
    bar($("barWhat"), parts, u, "codes");
  };
  lay();
  const codes = layout.unpack(trace.pairs);
  for (const [i, c] of likeliest.entries()) {                // the finished image, with this code at the place
    for (const cell of layout.cells_of(pos)) codes[cell] = c;
    const pixels = await run("D", picture(codes.slice()), i, likeliest.length);
    if (!pixels || jobs.patches !== mine) return;
    paint(cards[i].firstChild, pixels, x, y, side);
    const patch = cards[i].firstChild.getContext("2d").getImageData(0, 0, side, side).data, mean = [0, 0, 0];
    patch.forEach((value, j) => j % 4 < 3 && (mean[j % 4] += value / side ** 2));
    colours[c] = `rgb(${mean.map(Math.round)})`;
    if (i % 4 === 3 || i === likeliest.length - 1) lay();
  }
}

function show_options(before, given) {
  // options act from the step in view on: what was drawn before it becomes given; given pairs stay
  const set = (part) => change({...part, ...(!given && {given: before})});
  const values = String([view.temperature, view.top_p, view.cfg, label() >= 0]);
  if ($("options").dataset.values !== values) {              // a slider that is being moved stays as it is
    const move = (name) => (x) => {
      $("options").dataset.values = String(
        [...["temperature", "top_p", "cfg"].map((each) => (each === name ? x : view[each])), label() >= 0]);
      $("options").act({[name]: x});
    };
    $("options").dataset.values = values;
    $("options").replaceChildren(slider("Temperature", view.temperature, 0.1, 2, 0.05, move("temperature")),
      slider("Top-p (what)", view.top_p, 0.05, 1, 0.05, move("top_p")),
      ...(label() >= 0 ? [slider("Guidance", view.cfg, 0, 5, 0.25, move("cfg"))] : []));
  }
  $("options").act = set;
  const classes = [...CONFIG.classes.entries(), [-1, "no class"]];
  $("actions").replaceChildren(...(
    n_classes ? [choice("Class", classes, label(), (value) => set({label: +value}))] : []),
    button("New u", () => set({seed: view.seed + 1})),
    button("Sample from here", () => change({given: before}), {class: given ? "main" : ""}),
    button("Sample all", () => change({given: [], t: null})),
    button("Back to the image", () => change({given: null}), {disabled: view.given === null}));
}

// ---------------------------------------------------------------------------------------------------------------
// E  Branches

let branches = [];                                           // [{label, pairs, nats, pixels}]
async function show_e() {
  const wanted = view.keep || examples(), made = [];
  for (const [i, {label: of, pairs}] of wanted.entries()) {
    const wish = `${of}.${pairs_text(pairs)}`, old = branches.find((each) => each.wish === wish);
    const state = old || await run(
      "E", follow(pairs, of, LIKE_SAMPLE, uniform(view.seed, 0), trace), i, wanted.length + 1);
    const pixels = old ? old.pixels : state && await run(
      "E", picture(layout.unpack(state.pairs)), i, wanted.length + 1);
    if (!pixels) return;
    made.push(old || {wish, label: of, pairs: state.pairs, nats: sum(nats(state)), pixels});
    if (made.length === wanted.length || !branches.length) draw_branches(made);
  }
  branches = made;
  draw_branches(made);
  end_job("E");
}

// the sequence above, and what other choices at one step lead to
function examples() {
  const t = most_open(trace), before = trace.pairs.slice(0, t), step = trace.steps[t], [pos, code] = trace.pairs[t],
    end = layout.eos[layout.ids[pos].grain];
  const best = (p, ...not) => [...p.keys()].filter((i) => p[i] > 0 && !not.includes(i)).sort((a, b) => p[b] - p[a])[0];
  const place = best(softmax(place_logits(step, PLAIN)), pos, end),
    other = best(softmax(content_logits(step, PLAIN)), code);
  const firsts = [place >= 0 && [place, -1], code >= 0 && other >= 0 && [pos, other],
    step.legal[end] && pos !== end && [end, -1]];
  return [trace.pairs, ...firsts.filter(Boolean).map((pair) => [...before, pair])].map(
    (pairs) => ({label: label(), pairs}));
}

function first_difference(a, b) {                            // -> step, and in words what differs there
  const t = a.findIndex((pair, i) => !b[i] || !same(pair, b[i]));
  if (t < 0) return [-1, "The same sequence."];
  const [[p, c], [q, d]] = [a[t], b[t]];
  return [t, `First differs at pair ${t + 1}: ${p === q ? `code ${c} instead of ${d}` : `position ${short(
    p)} instead of ${short(q)}`}.`];
}

function outline(cells) {                                    // the edges of a set of cells, as the d of a path
  const side = layout.fine_side, inside = new Set(cells);
  return cells.map((cell) => {
    const x = cell % side, y = Math.floor(cell / side);
    return (inside.has(cell - side) && y ? "" : `M${x * UNIT} ${y * UNIT}h${UNIT}`) + (
      inside.has(cell + side) ? "" : `M${x * UNIT} ${(y + 1) * UNIT}h${UNIT}`) +
      (x && inside.has(cell - 1) ? "" : `M${x * UNIT} ${y * UNIT}v${UNIT}`) + (
        x < side - 1 && inside.has(cell + 1) ? "" : `M${(x + 1) * UNIT} ${y * UNIT}v${UNIT}`);
  }).join("");
}

function draw_branches(list) {
  const base = list[Math.min(view.base, list.length - 1)], codes = layout.unpack(base.pairs),
    letter = (each) => String.fromCharCode(97 + list.indexOf(each));
  const store = (kept, more = {}) => change({keep: kept.map(({label: of, pairs}) => ({label: of, pairs})), ...more});
  $("branches").replaceChildren(...list.map((each, i) => {
    const [t, difference] = first_difference(each.pairs, base.pairs), mine = layout.unpack(each.pairs);
    const frame = outline([...mine.keys()].filter((cell) => mine[cell] !== codes[cell]));
    return el("div", {class: "card" + (each === base ? " base" : "")},
      stack(image(each.pixels, `branch ${letter(each)}`), el("path", {class: "differs", d: frame})),
      el("p", {}, el("strong", {}, `${letter(each)}: log p = -${each.nats.toFixed(1)}`),
        n_classes && each.label !== base.label ? ` (${CONFIG.classes[each.label] || "no class"})` : ""),
      el("p", {class: "soft"}, each === base ? "The others are compared with this one." : difference),
      el("div", {class: "row"}, button(
        "Open", () => change({given: each.pairs, label: each.label, t: Math.max(t, 0)}),
        {"aria-label": `open branch ${letter(each)} in panels B to D`}),
        ...(each === base ? [] : [button(
          "Compare", () => store(list, {base: i}), {"aria-label": `compare the others with branch ${letter(each)}`}),
          button("×", () => store(list.filter((other) => other !== each), {base: 0}),
            {"aria-label": `remove branch ${letter(each)}`})])));
  }));
  $("keep").disabled = list.length >= 6;
  $("keep").onclick = () => store([...list, {label: label(), pairs: trace.pairs}]);
  $("full").textContent = list.length >= 6 ? "Six are kept; remove one to keep another." : "";
  const others = list.filter((each) => each !== base),
    best = others.reduce((a, b) => (a && a.nats < b.nats ? a : b), null);
  const apart = best && Math.abs(best.nats - base.nats),
    times = apart < 7 ? `${Math.exp(apart).toFixed(1)} times` : `10^${(apart / Math.LN10).toFixed(0)} times`;
  rich($("seeE"), !best ? "Force a choice in panel D, then keep its image here." :
    `log p is in nats, under the model as it is. The likeliest of the others is ${letter(best)}, ` +
    `${times} ${best.nats < base.nats ? "more" : "less"} likely than ${letter(base)}. ` + (
    view.keep ? "" : "Each leaves the sequence at one pair: by another position, another code, or EOS at once."));
}

// ---------------------------------------------------------------------------------------------------------------
// F  Your map

const STAMPS = {"image A": () => PICTURES[view.pic].grains, ring: (x, y) => Math.abs(Math.hypot(x, y) - 0.75) < 0.25,
  top: (x, y) => y < 0,
                diagonal: (x, y) => Math.abs(x - y) < 0.4, "all fine": () => true, "all coarse": () => false};
const stamp = (name) => (name === "image A" ? STAMPS[name]() : Array.from({length: layout.n_regions}, (_, r) => {
  const at = (i) => (2 * i + 1) / layout.side - 1;           // from -1 to 1
  return STAMPS[name](at(r % layout.side), at(Math.floor(r / layout.side))) ? K - 1 : 0;
}));
const map = () => view.map || stamp("image A");
let brush = null;                                            // the granularity that is being painted

function paint_region(r) {
  if (brush !== null && map()[r] !== brush) change({map: map().map((old, i) => (i === r ? brush : old)), kept: null});
}

function show_map() {
  const grains = map(), dip = (r) => (brush = (map()[r] + 1) % K);
  if (!$("map").children.length) {
    $("map").style.gridTemplateColumns = `repeat(${layout.side}, 1fr)`;
    $("map").append(...grains.map((_, r) => el("button", {
      onpointerdown: (event) => (event.target.releasePointerCapture(event.pointerId), dip(r), paint_region(r)),
        onkeydown: entered(() => (dip(r), paint_region(r), (brush = null)))})));
    $("map").addEventListener("pointermove", (event) => {
      const r = [...$("map").children].indexOf(
        document.elementFromPoint(event.clientX, event.clientY)?.closest("#map button"));
      if (event.buttons && r >= 0) paint_region(r);
    });
    addEventListener("pointerup", () => (brush = null));
  }
  grains.forEach((k, r) => {
    const cell = $("map").children[r], c = Math.sqrt(layout.cells[k]);
    cell.style.setProperty("--colour", HUE(k));
    cell.style.gridTemplateColumns = `repeat(${c}, 1fr)`;
    cell.setAttribute("aria-label", `region ${r + 1}: ${NAMES[k]}; change it`);
    cell.replaceChildren(...Array.from({length: c * c}, () => el("i")));
  });
  $("stamps").replaceChildren(...Object.keys(STAMPS).map((name) =>
    button(name, () => change({map: name === "image A" ? null : stamp(name), kept: null}),
      pressed(stamp(name).join() === grains.join()))));
}

async function show_f() {
  show_map();
  const grains = map(), tiling = layout.pack(new Int32Array(layout.fine_side ** 2).fill(-1), grains),
    {kept, mapseed} = view;
  const plain = JSON.stringify(options()) === JSON.stringify(PLAIN), how = plain ? LIKE_SAMPLE : options();
  $("actionsF").replaceChildren(
    ...(n_classes ? [choice("Class", [...CONFIG.classes.entries(), [-1, "no class"]], label(),
      (value) => change({label: +value}))] : []),
    button("Sample eight others", () => change({mapseed: mapseed + 1, kept: null}), {class: "main"}),
    button("Release the coarse codes", () => change({kept: null}), {disabled: kept === null}));
  rich($("seeF"), kept === null ? `${plural(count(grains), "code")} per image, all at the same positions. ` +
    (plain ? "They are sampled at temperature 0.7 with guidance 2, like those of sample.py. " :
      "The sliders of panel D apply. ") +
    `Click an image to keep its ${NAMES[0]} codes and sample the others again.` :
    `All eight have the [g0 ${NAMES[0]} codes] of image ${kept + 1}; the model sampled only the others again.`);
  const held = kept === null ? null : await run("F", generate(label(), how, uniform(mapseed, kept), tiling), 0, 10);
  if (kept !== null && !held) return;
  const given = tiling.map((pair, t) => (held && layout.ids[pair[0]].grain === 0 ? held.pairs[t] : pair));
  let first = null;
  // the kept one stays as it was, the others have new numbers
  for (let i = 0; i < 8; i++) {
    const numbers = uniform(mapseed, held && i !== kept ? i + 8 : i);
    const state = await run("F", follow(given, label(), how, numbers, first), i + 1, 10);
    const pixels = state && await run("F", picture(layout.unpack(state.pairs)), i + 1, 10);
    if (!pixels) return;
    first = first || state;
    const card = button("", () => change({kept: kept === i ? null : i}),
      {...pressed(kept === i), "aria-label": `image ${i + 1}: keep its ${NAMES[0]} codes`});
    card.append(image(pixels, `image ${i + 1}`));
    if ($("eight").children[i]) $("eight").children[i].replaceWith(card);
    else $("eight").append(card);
  }
  end_job("F");
}

// ---------------------------------------------------------------------------------------------------------------
// What follows from what

async function change(part) {
  Object.assign(view, part);
  const touched = (...names) => names.some((name) => name in part);
  const sequence = touched("pic", "cut", "flip", "given", "label", "seed", "temperature", "top_p", "cfg");
  if (touched("pic", "cut", "flip")) show_a();
  if (touched("map")) show_map();
  if (sequence && !(await show_sequence())) return;
  if (!sequence && touched("t", "over", "head")) show_step();
  write_address();
  if (touched("keep", "base") || (
    view.keep === null && touched("pic", "cut", "flip", "given", "label", "seed"))) show_e();
  if (touched("map", "mapseed", "kept", "label", "pic")) show_f();
}

async function everything() {
  read_address();
  branches = [];
  $("cuts").replaceChildren();
  show_map();
  show_a();
  if (!(await show_sequence())) return;
  write_address();
  await show_e();
  show_f();
}

const move = (by) => trace && change({t: within(view.t + by, 0, trace.pairs.length - 1)});

let playing = null;
function play() {
  const last = trace.pairs.length - 1;
  clearInterval(playing);
  if (playing === null && view.t >= last) change({t: 0});
  playing = playing === null ? setInterval(() => (view.t >= trace.pairs.length - 1 ? play() : move(1)), 350) : null;
  $("play").textContent = playing === null ? "Play" : "Pause";
}

function start() {
  const sizes = layout.cells.map((cells, k) => `${plural(cells, "code")} per ${NAMES[k]} region`).join(", ");
  $("facts").textContent = `${DATA.params.transformer} parameters in the transformer, ${DATA.params.decoder} in the ` +
    `decoder, images of ${S} x ${S} ` +
    `pixels, ${sizes}. Everything below is computed while you watch. Nothing is loaded from anywhere.`;
  rich($("introA"), `DQ-VAE cuts an image into ${layout.side} x ${layout.side} regions, and a router scores each of ` +
    `them for detail. ` +
    layout.cells.map((cells, k) => `[g${Math.min(k, 2)} ${k ? "a" : "A"} ${NAMES[k]} region] gets ` +
      `${plural(cells, "code")}`).join(", ") + ".");
  rich($("introB"), "Sorted by granularity and position, the codes form a sequence of pairs. Each tile is one pair. " +
    "Its height is what the pair costs " +
    "under the model: [where violet for where], [what green for what]. A tall tile is a surprise.");
  rich($("foot"), `tests/tools/page.py made this page from ${DATA.source}. The matrices of the transformer are ` +
    `rounded to ${DATA.matrices}: ` +
    `${DATA.nats.rounded.toFixed(2)} nats per validation image, ${DATA.nats.exact.toFixed(2)} before rounding. The ` +
    `address of the page holds everything ` +
    "you chose, so a link shows what you see. ");
  $("foot").append(el("a", {href: "#selftest"}, "Compare this page with dq.py"), ".");
  PICTURES.forEach((_, i) => $("film").append(
    button("", () => change({pic: i, flip: {}, given: null, label: null, t: null, keep: null, base: 0, kept: null}))));
  $("back").onclick = () => move(-1);
  $("forth").onclick = () => move(1);
  $("play").onclick = play;
  $("scrub").oninput = () => change({t: +$("scrub").value});
  addEventListener("keydown", (event) => {
    const by = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (!by || event.target.closest?.("input, select") || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    move(by);
  });
  everything();
}

function begin() {
  load_weights();
  addEventListener("hashchange", () => (
    location.hash === "#selftest" || $("selftest") ? location.reload() : everything()));
  if (location.hash !== "#selftest") return start();
  let result;
  try {
    result = self_test();
  } catch (error) {
    result = {ok: false, error: String(error.stack)};
  }
  document.body.replaceChildren(el("pre", {id: "selftest"}, JSON.stringify(result, null, 1)));
}
begin();
