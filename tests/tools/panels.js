// ---------------------------------------------------------------------------------------------------------------
// The page: what is shown (`view`, which lives in the address), and slices of work that don't block it

const $ = (id) => document.getElementById(id);
const S = CONFIG.size, K = layout.n_grains, V = CONFIG.codebook_size, PICTURES = DATA.pictures;
const NAMES = [["fixed"], ["coarse", "fine"], ["coarse", "medium", "fine"]][K - 1] || layout.cells.map((_, k) => `level ${k}`);
const HUE = (k) => `var(--grain${Math.min(k === K - 1 && K > 1 ? K - 1 : k, 2)})`;
const percent = (p) => (p >= 0.0995 ? (100 * p).toFixed(0) : p >= 0.00095 ? (100 * p).toFixed(1) : p > 0 ? "<0.1" : "0") + "%";
const plural = (n, noun) => `${n} ${noun}${n === 1 ? "" : "s"}`;
const same = (a, b) => a[0] === b[0] && a[1] === b[1];

function el(tag, props = {}, ...children) {                  // an element; "on..." props are listeners, "aria-..." attributes
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
const rich = (node, text) => node.replaceChildren(...text.split(/(\[\w+ [^\]]+\])/).map((part) => {
  const found = part.match(/^\[(\w+) ([^\]]+)\]$/);          // "[where 3 nats]": words in the colour of a class
  return found ? el("b", {class: found[1]}, found[2]) : part;
}));

const START = {pic: 0, cut: null, flip: {}, t: null, given: null, seed: 0, label: null, temperature: 1, top_p: 1, cfg: 1,
               over: "order", head: "mean", keep: null, base: 0, map: null, mapseed: 0, kept: null};
const view = {...START};
let trace = null, finished = null;                           // the sequence of panels B to D, and its pixels
const options = () => ({temperature: view.temperature, top_k: 0, top_p: view.top_p, cfg: view.cfg});
const label = () => view.label ?? PICTURES[view.pic].label;

const DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
const digits = (n) => DIGITS[n >> 6] + DIGITS[n & 63];
const number = (text) => DIGITS.indexOf(text[0]) * 64 + DIGITS.indexOf(text[1]);
const pairs_text = (pairs) => pairs.map(([pos, code]) => digits(pos) + digits(code + 1)).join("");
const text_pairs = (text) => (text.match(/..../g) || []).map((part) => [number(part), number(part.slice(2)) - 1]);

function write_address() {
  const out = new URLSearchParams();
  for (const name of Object.keys(START)) {
    const value = view[name];
    if (JSON.stringify(value) === JSON.stringify(START[name])) continue;
    out.set(name, name === "given" ? pairs_text(value) : name === "cut" || name === "map" ? value.join("_") :
      name === "flip" ? Object.entries(value).flat().join("_") :
      name === "keep" ? value.map((each) => each.label + "." + pairs_text(each.pairs)).join("_") : value);
  }
  const hash = "#" + out;
  if (hash !== (location.hash || "#")) history.replaceState(null, "", hash);
}

function read_address() {
  const numbers = (text) => text.split("_").filter(Boolean).map(Number), within = (x, low, high) => Math.min(Math.max(x, low), high);
  const read = {
    given: (text) => text_pairs(text), cut: numbers, over: String, head: String,
    map: (text) => Array.from({length: layout.n_regions}, (_, i) => within(numbers(text)[i] | 0, 0, K - 1)),
    flip: (text) => Object.fromEntries(numbers(text).flatMap((x, i, all) => (i % 2 ? [[all[i - 1], within(x | 0, 0, K - 1)]] : []))),
    keep: (text) => text.split("_").filter(Boolean).slice(0, 6).map((each) => ({label: parseInt(each), pairs: text_pairs(each.split(".")[1] || "")})),
    pic: (text) => within(text | 0, 0, PICTURES.length - 1), label: (text) => within(text | 0, -1, n_classes - 1),
    temperature: (text) => within(+text || 1, 0.05, 4), top_p: (text) => within(+text || 1, 0.01, 1), cfg: (text) => within(+text, 0, 10),
  };
  Object.assign(view, START);
  for (const [name, text] of new URLSearchParams(location.hash.slice(1)))
    if (name in START) view[name] = (read[name] || ((text) => Math.max(0, text | 0)))(text);
  if (view.keep) view.keep = view.keep.filter(({pairs}) => complete(legal_part(pairs)));
}

const jobs = {};                                             // the newest job of each panel; older ones give up
async function run(panel, work, portion = 0, parts = 1) {    // -> what the work returns, or null if it was overtaken
  const mine = (jobs[panel] = {}), bar = $(panel).querySelector("progress"), begun = performance.now();
  for (let n = 0; ; ) {
    for (const until = performance.now() + 12; performance.now() < until; n++) {
      const {value, done} = work.next();
      if (done) {
        if (portion + 1 === parts) bar.hidden = true;
        return value;
      }
      if (value && value.pairs) bar.value = (portion + value.pairs.length / (layout.max_len * 0.7)) / parts;
    }
    if (performance.now() - begun > 200 || portion) bar.hidden = false;
    await new Promise((go) => setTimeout(go));
    if (jobs[panel] !== mine) return null;
  }
}

const painted = new Map();                                   // pictures of code maps that were decoded lately
function* picture(codes) {
  const key = codes.join();
  if (!painted.has(key)) painted.set(key, yield* decode(codes));
  if (painted.size > 500) painted.delete(painted.keys().next().value);
  return painted.get(key);
}

function paint(canvas, pixels, x = 0, y = 0, side = S) {     // (a square of) S x S pixels
  [canvas.width, canvas.height] = [side, side];
  canvas.getContext("2d").putImageData(new ImageData(pixels, S, S), -x, -y);
  return canvas;
}
const image = (pixels, about) => paint(el("canvas", {role: "img", "aria-label": about}), pixels);
const pixels_of = (pic) => {
  const bytes = bytes_of(PICTURES[pic].pixels);
  return Uint8ClampedArray.from({length: 4 * S * S}, (_, i) => (i % 4 === 3 ? 255 : bytes[Math.floor(i / 4) * 3 + i % 4]));
};
const square = (pos, props) => {                             // the rectangle of a position, in pixels of the image
  const {row, column, step} = layout.ids[pos], unit = S / layout.fine_side;
  return el("rect", {x: column * step * unit, y: row * step * unit, width: step * unit, height: step * unit, ...props});
};
const overlay = (...children) => el("svg", {viewBox: `0 0 ${S} ${S}`, "aria-hidden": "true"}, ...children);
const stack = (canvas, ...svg) => el("div", {class: "stack"}, canvas, overlay(...svg));
const describe = (pos) => {
  const {grain, row, column, is_eos} = layout.ids[pos];
  return is_eos ? `EOS of ${NAMES[grain]}` : `${NAMES[grain]}, row ${row + 1}, column ${column + 1}`;
};
const boxes = (pairs) => pairs.filter(([pos]) => !layout.ids[pos].is_eos).map(([pos]) =>
  square(pos, {fill: "none", class: "box" + layout.ids[pos].grain, "stroke-width": 0.35}));

// ---------------------------------------------------------------------------------------------------------------
// A  Where is the detail?

function grains_of(pic) {                                    // the router's choice, or the score cut at the thresholds
  const {score, grains} = PICTURES[pic], chosen = view.cut ? score.map((s) => view.cut.filter((cut) => s > cut).length) : grains.slice();
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
const bits = (grains) => count(grains) * Math.log2(V) + layout.n_regions * Math.log2(K);

function all_cuts(pic) {                                     // every map that one threshold can make: from all coarse to all fine
  const order = [...PICTURES[pic].score.keys()].sort((a, b) => PICTURES[pic].score[b] - PICTURES[pic].score[a]);
  return [0, ...order.map((_, i) => i + 1)].map((n) => {
    const grains = new Array(layout.n_regions).fill(0);
    for (const region of order.slice(0, n)) grains[region] = K - 1;
    return grains;
  });
}

async function show_a() {
  const grains = grains_of(view.pic), pairs = layout.pack(codes_of(view.pic, grains), grains), original = pixels_of(view.pic);
  const regions = PICTURES[view.pic].score.map((score, r) => {
    const side = S / layout.side, x = (r % layout.side) * side, y = Math.floor(r / layout.side) * side;
    return {score, r, at: {x, y, width: side, height: side}, x: x + side / 2, y: y + side / 2};
  });
  const most = Math.max(...PICTURES[view.pic].score, 1e-9);
  const heat = regions.map(({score, at, x, y}) => el("g", {}, el("rect", {...at, fill: "var(--pin)", "fill-opacity": 0.85 * score / most}),
    el("text", {x, y: y + 0.9, "font-size": S / layout.side / 3.2, "text-anchor": "middle", "dominant-baseline": "middle", fill: "var(--ink)"}, score.toFixed(2))));
  const flip = (r) => () => change({flip: {...view.flip, [r]: (grains[r] + 1) % K}, given: null});
  const cells = regions.map(({r, at}) => el("rect", {...at, class: "cell", tabindex: 0, role: "button", onclick: flip(r),
    "aria-label": `region ${r + 1}, ${NAMES[grains[r]]}: flip`, onkeydown: (event) => ["Enter", " "].includes(event.key) && (event.preventDefault(), flip(r)())}));
  const boxed = stack(image(original, "boxes of the codes"), el("rect", {width: S, height: S, fill: "var(--panel)", "fill-opacity": 0.35}), ...boxes(pairs), ...cells);
  const blank = el("canvas", {width: S, height: S}), again = el("h3", {}, "Reconstruction"), curve = el("div", {class: "curve"});
  boxed.lastChild.removeAttribute("aria-hidden");
  const figure = (title, body, note) => el("div", {}, typeof title === "string" ? el("h3", {}, title) : title, body, el("p", {class: "soft small"}, note));
  $("four").replaceChildren(
    figure("Image", image(original, "validation image"), `${S} x ${S} pixels, not seen in training`),
    figure("Score", stack(blank, ...heat), `what the ${VAE.router} router says`),
    figure("Granularity map", boxed, "one box per code; click to flip"),
    figure(again, el("div", {}, el("canvas", {width: S, height: S})), "decoded from the codes alone"),
    el("div", {}, el("h3", {}, "What codes buy"), curve));
  if (!$("film").children.length) PICTURES.forEach((_, i) => $("film").append(button("", () => change({pic: i, flip: {}, given: null, label: null, t: null, keep: null}))));

  const cut = view.cut || DATA.thresholds;
  $("cuts").replaceChildren(...cut.map((value, i) => slider(`Threshold on the score${K > 2 ? `, ${NAMES[i]} to ${NAMES[i + 1]}` : ""}`,
    value, 0, Math.max(K - 1, most), 0.01, (x) => change({cut: cut.map((old, j) => (j === i ? x : old)), flip: {}, given: null}))),
    button("Router's own choice", () => change({cut: null, flip: {}, given: null}), {disabled: !view.cut && !Object.keys(view.flip).length}));

  // the chosen picture first, then the film, then the curve of all thresholds
  const decoded = await run("A", picture(codes_of(view.pic, grains)), 0, 2), n = count(grains), full = layout.n_regions * layout.cells[K - 1];
  if (!decoded) return;
  const dB = psnr(original, decoded);
  again.nextSibling.replaceChildren(image(decoded, "reconstruction"));
  $("statsA").replaceChildren(...[[`${n}`, `codes of at most ${full}`], [bits(grains).toFixed(0), "bits, uncompressed"],
    [(bits(grains) / S ** 2).toFixed(3), "bits per pixel"], [`${dB.toFixed(1)} dB`, "PSNR"]].map(([value, text]) => el("div", {}, el("strong", {}, value), text)));
  for (const [i, card] of [...$("film").children].entries()) {
    const mine = grains_of(i), pixels = await run("A", picture(codes_of(i, mine)), 0, 2);
    if (!pixels) return;
    card.setAttribute("aria-pressed", i === view.pic);
    card.setAttribute("aria-label", `image ${i + 1}, ${count(mine)} codes`);
    card.replaceChildren(image(pixels_of(i), "image"), image(pixels, "reconstruction"),
      el("small", {}, `${count(mine)} codes`), el("small", {class: "soft"}, `${psnr(pixels_of(i), pixels).toFixed(1)} dB`));
  }
  const points = [];
  for (const each of all_cuts(view.pic)) {
    const pixels = await run("A", picture(codes_of(view.pic, each)), 0, 2);
    if (!pixels) return;
    points.push([count(each), psnr(original, pixels)]);
  }
  draw_curve(curve, points, [n, dB]);
  await run("A", [][Symbol.iterator](), 1, 2);
  const chord = points[0][1] + (points.at(-1)[1] - points[0][1]) * (n - points[0][0]) / Math.max(points.at(-1)[0] - points[0][0], 1);
  rich($("seeA"), K === 1 ? `One granularity: every region has ${layout.cells[0]} code.` :
    `${plural(n, "code")} give ${dB.toFixed(1)} dB. Every region ${NAMES[K - 1]} would take ${full} codes for ${points.at(-1)[1].toFixed(1)} dB, ` +
    `every region ${NAMES[0]} ${points[0][0]} codes for ${points[0][1].toFixed(1)} dB. ` + (n > points[0][0] && n < full ?
    `Spending the codes where the score is high buys ${(dB - chord).toFixed(1)} dB over the straight line between these two.` : ""));
}

function draw_curve(node, points, [n, dB]) {
  const xs = points.map(([x]) => x), ys = [...points.map(([, y]) => y), dB], [x0, x1, y0, y1] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const at = ([x, y]) => [34 + 176 * (x - x0) / Math.max(x1 - x0, 1), 140 - 124 * (y - y0) / Math.max(y1 - y0, 0.1)];
  const line = (list) => list.map((point) => at(point).join()).join(" "), [cx, cy] = at([n, dB]);
  node.replaceChildren(el("svg", {viewBox: "0 0 222 176", role: "img", "aria-label": "PSNR by number of codes"},
    el("path", {class: "axis", d: "M34 8V146H214", fill: "none"}),
    el("polyline", {class: "chord", points: line([points[0], points.at(-1)])}), el("polyline", {points: line(points)}),
    el("circle", {cx, cy, r: 5, fill: "var(--pin)"}),
    ...[[y0, 143], [y1, 20]].map(([y, place]) => el("text", {x: 30, y: place, "text-anchor": "end"}, y.toFixed(0))),
    el("text", {x: 38, y: 12}, "dB"), el("text", {x: 34, y: 159}, x0), el("text", {x: 212, y: 159, "text-anchor": "end"}, x1),
    el("text", {x: 124, y: 172, "text-anchor": "middle"}, "number of codes")));
}

function slider(text, value, min, max, step, act, form = (x) => x.toFixed(2)) {
  const shown = el("output", {}, form(value));
  const input = el("input", {type: "range", min, max, step, value, "aria-label": text, oninput: () => {
    shown.textContent = form(+input.value);
    act(+input.value);
  }});
  return el("label", {class: "slider"}, el("span", {}, text, shown), input);
}

// ---------------------------------------------------------------------------------------------------------------
// B  The sequence: the image's own, or one that leaves it and is drawn by the model

const own_pairs = () => layout.pack(codes_of(view.pic, grains_of(view.pic)), grains_of(view.pic));
const complete = (pairs) => pairs.length > 0 && pairs.at(-1)[0] === layout.end;

function legal_part(pairs) {                                 // the pairs in front of the first that can't be
  const at = pairs.findIndex(([pos, code], t) =>
    !(layout.legal(t ? pairs[t - 1][0] : -1, layout.grains(pairs.slice(0, t)))[pos] && code >= -1 && code < V));
  return at < 0 ? pairs : pairs.slice(0, at);
}

function fork(state, t, rows) {                              // a copy of a state that has written t pairs
  const copy = ({keys, values}) => ({keys: keys.slice(0, t), values: values.slice(0, t)});
  return {labels: rows, caches: rows.map((_, r) => state.caches[r].map(copy)), pairs: state.pairs.slice(0, t), steps: state.steps.slice(0, t)};
}

// given pairs, then drawn ones -> state, which takes over what `from` shares. cfg: other than 1 for both rows
function* follow(given, of_label, how, numbers, from, cfg = how.cfg) {
  const rows = rows_of(of_label, cfg);
  let t = 0;
  if (from && rows.every((row, r) => row === from.labels[r]))
    while (t < given.length && t < from.pairs.length && same(given[t], from.pairs[t])) t++;
  return yield* generate(of_label, how, numbers, given, t ? fork(from, t, rows) : first_state(rows));
}

function costs(state) {                                      // nats of each pair, where and what, under the model as it is
  const plain = {temperature: 1, top_k: 0, top_p: 1, cfg: 1};
  return state.steps.map((step, t) => {
    const [pos, code] = state.pairs[t];
    return [-Math.log(softmax(place_logits(step, plain))[pos]), code < 0 ? 0 : -Math.log(softmax(content_logits(step, plain))[code])].map(Math.abs);
  });
}
const nats = (state) => costs(state).reduce(([a, b], [c, d]) => [a + c, b + d], [0, 0]);

function most_open(state) {                                  // a step worth looking at: the next place is least certain
  const entropy = state.steps.map((step, t) => t > 1 && state.pairs[t][1] >= 0 ? -sum(softmax(place_logits(step, options())).map((p) => (p > 0 ? p * Math.log(p) : 0))) : 0);
  return entropy.indexOf(Math.max(...entropy));
}

async function show_sequence() {
  const given = legal_part(view.given || own_pairs());
  const found = await run("B", follow(given, label(), options(), uniform(view.seed, 0), trace, 2));
  const pixels = found && await run("B", picture(layout.unpack(found.pairs)));
  if (!pixels) return false;
  [trace, finished] = [found, pixels];
  view.t = Math.min(view.t ?? most_open(trace), trace.pairs.length - 1);
  show_b();
  show_step();
  return true;
}

function show_b() {
  const cost = costs(trace), limit = Math.log(V), top = Math.max(limit * 1.12, ...cost.map(([a, b]) => a + b)), height = (x) => `${100 * x / top}%`;
  const own = own_pairs(), left = trace.pairs.findIndex((pair, t) => !own[t] || !same(pair, own[t]));
  $("tiles").replaceChildren(
    ...[0, 2, 4, 6, 8, 10, 12].filter((y) => y < top).map((y) => el("div", {class: "rule", style: {bottom: height(y)}}, el("span", {}, y))),
    el("div", {class: "rule limit", style: {bottom: height(limit)}}),
    ...cost.map(([where, what], t) => el("div", {class: "tile", title: `pair ${t + 1}: ${describe(trace.pairs[t][0])}; where ${where.toFixed(2)}, what ${what.toFixed(2)} nats`, onclick: () => change({t})},
      el("i", {class: "where", style: {height: height(where)}}), el("i", {class: "what", style: {height: height(what)}}))));
  $("strip").replaceChildren(...trace.pairs.map(([pos], t) => {
    const {is_eos, grain, row, column, step} = layout.ids[pos], unit = S / layout.fine_side;
    const mark = el("u", {style: {background: left >= 0 && t >= left ? "var(--pin)" : HUE(grain)}});
    return el("div", {onclick: () => change({t})}, is_eos ? el("div", {class: "eos"}, "E") :
      paint(el("canvas"), finished, column * step * unit, row * step * unit, step * unit), mark);
  }));
  const [where, what] = nats(trace), total = (where + what) / Math.LN2, n = trace.pairs.filter(([, code]) => code >= 0).length;
  $("statsB").replaceChildren(...[[where.toFixed(1), "nats for where", "where"], [what.toFixed(1), "nats for what", "what"], [total.toFixed(0), "bits in all", ""],
    [(total / S ** 2).toFixed(3), "bits per pixel", ""]].map(([value, text, of]) => el("div", {}, el("strong", {class: of}, value), text)));
  const plain = n * Math.log2(V) + layout.n_regions * Math.log2(K), dear = cost.map(([a, b]) => a + b), most = dear.indexOf(Math.max(...dear));
  rich($("seeB"), (left < 0 ? "This is the image of panel A. " : left === 0 ? "The model drew all of this. " : `The first ${plural(left, "pair")} ${left === 1 ? "is" : "are"} those of the image, the rest the model drew. `) +
    `[where ${percent(where / (where + what))}] of the cost is for where, the rest for [what what]. Without a model, ${plural(n, "code")} and the map take ${plain.toFixed(0)} bits; the model ${total < plain ? `saves ${percent(1 - total / plain)}` : "saves nothing here"}. ` +
    `The most surprising pair is number ${most + 1} (${describe(trace.pairs[most][0])}) with ${dear[most].toFixed(1)} nats.`);
  rich($("legendB"), `Height in nats: [where where], [what what]. Dashed: ln ${V} = ${limit.toFixed(2)} nats, what a code costs without a model. Below: the patch of each code; ` +
    NAMES.map((name, k) => `[g${k} ${name}]`).join(", ") + (left < 0 ? "." : "; [pin drawn by the model]."));
  $("scrub").max = trace.pairs.length - 1;
}

// ---------------------------------------------------------------------------------------------------------------
// C  The canvas

function show_step() {
  const {t} = view, [pos] = trace.pairs[t];
  [...$("tiles").querySelectorAll(".tile")].forEach((tile, i) => {
    tile.setAttribute("aria-current", i === t);
    tile.classList.toggle("ahead", i > t);
  });
  $("scrub").value = t;
  $("scrub").setAttribute("aria-valuetext", `pair ${t + 1}: ${describe(pos)}`);
  $("step").textContent = `pair ${t + 1} of ${trace.pairs.length}`;
  show_c();
  show_d();
}

function show_c() {
  const {t} = view, step = trace.steps[t], written = trace.pairs.slice(0, t), [pos] = trace.pairs[t];
  const codes = layout.unpack(written), unit = S / layout.fine_side, shapes = [], hatch = el("pattern", {id: "hatch", width: 1.6, height: 1.6, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)"}, el("line", {class: "hatch", y2: 1.6}));
  const blank = [...codes.keys()].filter((i) => codes[i] < 0).map((i) => ({x: i % layout.fine_side * unit, y: Math.floor(i / layout.fine_side) * unit, width: unit + 0.02, height: unit + 0.02}));
  shapes.push(hatch, ...blank.map((at) => el("rect", {...at, class: "blank"})), ...blank.map((at) => el("rect", {...at, fill: "url(#hatch)"})));
  const write = (place, text, size) => {
    const {row, column, step} = layout.ids[place];
    shapes.push(el("text", {class: "order", x: (column + 0.5) * step * unit, y: (row + 0.5) * step * unit, "text-anchor": "middle", "dominant-baseline": "central", style: {fontSize: `${size}px`}}, text));
  };
  let said = "";
  if (view.over === "order") {
    shapes.push(...boxes(written));
    written.forEach(([place], i) => layout.ids[place].is_eos || write(place, i + 1, Math.min(2.1, 0.5 * unit)));
    said = `${plural(written.filter(([, code]) => code >= 0).length, "code")} so far. The numbers tell the order: ${NAMES.join(", then ")}, each row by row.`;
  } else if (view.over === "next") {
    const p = softmax(place_logits(step, options())), end = p[layout.eos[layout.ids[pos].grain]];
    p.forEach((x, place) => {
      if (!step.legal[place] || layout.ids[place].is_eos) return;
      shapes.push(square(place, {fill: "var(--where)", "fill-opacity": 0.12 + 0.8 * x, stroke: "var(--where)", "stroke-width": 0.25}));
      if (x >= 0.005) write(place, (100 * x).toFixed(0), Math.min(2.1, 0.6 * unit));
    });
    said = `In percent: where the next ${NAMES[layout.ids[pos].grain]} code may go. EOS, which ends the ${NAMES[layout.ids[pos].grain]} codes, has ${percent(end)}.`;
  } else if (view.over === "attention") {
    const [layer, head] = view.head.split(".").map(Number), all = step.attention.flat();
    const weights = view.head === "mean" || !step.attention[layer]?.[head] ? all[0].map((_, i) => sum(all.map((each) => each[i])) / all.length) : step.attention[layer][head];
    let rest = weights[0];                                   // entry i holds the pair before i, entry 0 the class
    const most = Math.max(...weights.slice(1), 1e-9);
    written.forEach(([place], i) => {
      if (layout.ids[place].is_eos) rest += weights[i + 1];
      else shapes.push(square(place, {fill: "var(--pin)", "fill-opacity": 0.9 * weights[i + 1] / most}));
      if (!layout.ids[place].is_eos && weights[i + 1] >= 0.01) write(place, (100 * weights[i + 1]).toFixed(0), Math.min(2.1, 0.6 * unit));
    });
    said = `In percent: what the content stack looks at from the framed place. The class and EOS get ${percent(rest)}.`;
  }
  if (!layout.ids[pos].is_eos) shapes.push(square(pos, {class: "target"}));
  $("canvas").replaceChildren(image(finished, `the image after ${plural(t, "pair")}`), overlay(...shapes));
  $("overlays").replaceChildren(...[["none", "Image"], ["order", "Order"], ["next", "Next place"], ["attention", "Attention"]].map(([over, text]) => button(text, () => change({over}), pressed(view.over === over))));
  const heads = trace.steps[0].attention.flatMap((layer, i) => layer.map((_, h) => `${i}.${h}`));
  $("heads").replaceChildren(...(view.over !== "attention" ? [] : [el("label", {class: "row"}, "Head", el("select", {onchange: (event) => change({head: event.target.value})},
    ...["mean", ...heads].map((head) => el("option", {value: head, selected: head === view.head}, head === "mean" ? "mean of all" : `layer ${+head.split(".")[0] + 1}, head ${+head.split(".")[1] + 1}`))))]));
  rich($("seeC"), said || (layout.ids[pos].is_eos ? "The model ends a granularity here." : `The next code goes to ${describe(pos)}.`));
}

// ---------------------------------------------------------------------------------------------------------------
// D  Two draws

function why_not(place, prev, grains) {                      // in words, what `legal` says
  const {grain, region, opens, is_eos} = layout.ids[place];
  if (place <= prev) return "behind the last place: each granularity goes row by row";
  if (grains[region] >= 0 && grains[region] < grain) return `covered by a ${NAMES[grains[region]]} code`;
  if (is_eos) return "a region is not complete";
  return opens || grains[region] === grain ? "a place in front of it must come first" : "a region begins at its first cell";
}

function bar(node, p, parts, u, hit, about) {                // parts: [from, to, text, colour] in the order of the draw
  let left = 0;
  node.replaceChildren(...parts.filter(([from, to]) => to > from).map(([from, to, text, colour]) => {
    left = to;
    const inside = u > from && u <= to, style = {width: `${100 * (to - from)}%`, ...(colour && {background: colour, color: "#fff"})};
    return el("div", {class: (colour ? "" : "rest ") + (inside ? "hit" : ""), style, title: `${text}: ${percent(to - from)}`}, to - from > 0.075 && colour ? text : "");
  }), el("b", {style: {left: `${100 * u}%`}}));
  node.setAttribute("aria-label", `${about}; the pin at ${u.toFixed(3)} draws ${hit}`);
  return left;
}

function show_d() {
  const {t} = view, step = trace.steps[t], [pos, code] = trace.pairs[t], {grain, is_eos} = layout.ids[pos], u = uniform(view.seed, 0, t + 1)[t];
  const before = trace.pairs.slice(0, t), prev = t ? before[t - 1][0] : -1, grains = layout.grains(before), side = layout.sides[grain], end = layout.eos[grain];
  const force = (pair) => () => change({given: [...before, pair]});

  const logits = place_logits(step, options()), p = softmax(logits), drawn = draw(logits, u[0]);
  $("places").style.gridTemplateColumns = `repeat(${side}, 1fr)`;
  $("places").replaceChildren(...Array.from({length: side * side}, (_, i) => {
    const place = layout.offsets[grain] + i, ok = step.legal[place], here = place === pos ? "here" : "";
    if (!ok) return el("button", {class: "no", title: why_not(place, prev, grains), "aria-disabled": "true", tabindex: -1,
      "aria-label": `${describe(place)}: not valid, ${why_not(place, prev, grains)}`, onclick: () => rich($("seeD"), `Not valid: ${why_not(place, prev, grains)}.`)});
    return el("button", {class: here, onclick: force([place, -1]), "aria-label": `${describe(place)}: ${percent(p[place])}; force it`},
      el("i", {style: {opacity: 0.75 * p[place]}}), el("span", {}, side <= 8 && p[place] >= 0.005 ? (100 * p[place]).toFixed(0) : ""));
  }));
  const done = step.legal[end];
  $("eos").replaceChildren(el("i", {style: {opacity: 0.75 * p[end]}}), el("span", {}, done ? `EOS, no more ${NAMES[grain]} codes: ${percent(p[end])}` : "EOS can't come yet"));
  $("eos").className = pos === end ? "here" : "";
  $("eos").disabled = !done;
  $("eos").onclick = force([end, -1]);
  const n_legal = step.legal.filter(Boolean).length, short = (place) => (layout.ids[place].is_eos ? "EOS" : `${layout.ids[place].row + 1},${layout.ids[place].column + 1}`);
  $("whereD").textContent = n_legal === 1 ? "only one place is valid" : `${n_legal} valid places, in percent`;
  let total = 0;
  bar($("barWhere"), p, [...p.keys()].filter((i) => p[i] > 0).map((i) => [total, (total += p[i]), short(i), `color-mix(in oklab, var(--where) ${i % 2 ? 78 : 100}%, black)`]), u[0], describe(drawn), "places");

  // what: only if there is a content
  const q_logits = content_logits(step, options()), q = softmax(q_logits), raw = softmax(guided(step.content, options()));
  const likeliest = [...raw.keys()].sort((a, b) => raw[b] - raw[a]).slice(0, 12), drawn_code = draw(q_logits, u[1]);
  $("barWhat").hidden = $("codes").hidden = is_eos;
  $("whatD").textContent = is_eos ? "an EOS has no content" : `the ${likeliest.length} likeliest of ${V}`;
  show_patches(likeliest, raw, q, u[1], drawn_code, force);

  const guess = likeliest[0], place_hit = drawn === pos, code_hit = place_hit && (is_eos || drawn_code === code), from = view.given ? view.given.length : trace.pairs.length;
  rich($("seeD"), (n_legal === 1 ? `The place is certain: ${describe(pos)}. ` : `[pin u = ${u[0].toFixed(3)}] draws ${describe(drawn)}${place_hit ? "" : `; ${t < from ? "given is" : "the sequence has"} ${describe(pos)}`}. `) +
    (is_eos ? "" : `For the content, [pin u = ${u[1].toFixed(3)}] draws code ${drawn_code} (${percent(q[drawn_code])})${code === drawn_code ? "" : `; given is code ${code} (${percent(q[code])})`}. `) +
    (t < from ? (code_hit ? "The model agrees with the given pair." : "The frame marks the given pair; with “Draw from here” the pins decide.") : "The model drew this pair and all that follow."));
  show_options(before);
}

async function show_patches(likeliest, raw, q, u, drawn, force) {
  const {t} = view, [pos, code] = trace.pairs[t], {row, column, step, is_eos} = layout.ids[pos], unit = S / layout.fine_side;
  if (is_eos) return;
  const cards = likeliest.map((c) => el("button", {class: (c === code ? "here " : "") + (q[c] > 0 ? "" : "cut"), onclick: force([pos, c]), "aria-label": `code ${c}: ${percent(q[c])}; force it`}, el("canvas", {width: 1, height: 1}), percent(q[c])));
  $("codes").replaceChildren(...cards);
  const colours = {}, lay = () => {                          // in the order of ids, as `draw` adds them up
    const parts = [];
    let total = 0;
    q.forEach((x, c) => {
      const mine = likeliest.includes(c), last = parts.at(-1), from = total;
      total += x;
      if (!mine && last && !last[3]) [last[1], last[2]] = [total, "other codes"];
      else parts.push([from, total, mine ? `${c}` : "other codes", mine ? colours[c] || "var(--soft)" : null]);
    });
    bar($("barWhat"), q, parts, u, `code ${drawn}`, "codes");
  };
  lay();
  const codes = layout.unpack(trace.pairs), mine = jobs.patches = {};
  for (const [i, c] of likeliest.entries()) {                // the finished picture, with this code at the place
    for (const cell of layout.cells_of(pos)) codes[cell] = c;
    const pixels = await run("D", picture(codes.slice()), i, 12);
    if (!pixels || jobs.patches !== mine) return;
    paint(cards[i].firstChild, pixels, column * step * unit, row * step * unit, step * unit);
    const colour = [0, 0, 0], area = (step * unit) ** 2;
    for (let y = row * step * unit; y < (row + 1) * step * unit; y++)
      for (let x = column * step * unit; x < (column + 1) * step * unit; x++)
        for (let k = 0; k < 3; k++) colour[k] += pixels[4 * (y * S + x) + k] / area;
    colours[c] = `rgb(${colour.map(Math.round)})`;
    if (i % 4 === 3 || i === likeliest.length - 1) lay();
  }
}

function show_options(before) {
  // options act from the step in view on: what was drawn before it becomes given
  const set = (part) => change({...part, ...(view.given && view.t >= view.given.length && {given: before})});
  if (!$("options").children.length || $("options").dataset.seed !== String([view.temperature, view.top_p, view.cfg, label()])) {
    const focus = document.activeElement?.getAttribute?.("aria-label"), move = (name) => (x) => {
      $("options").dataset.seed = String([...["temperature", "top_p", "cfg"].map((each) => (each === name ? x : view[each])), label()]);
      set({[name]: x});
    };
    $("options").dataset.seed = String([view.temperature, view.top_p, view.cfg, label()]);
    $("options").replaceChildren(slider("Temperature", view.temperature, 0.1, 2, 0.05, move("temperature")), slider("Top-p (what)", view.top_p, 0.05, 1, 0.05, move("top_p")),
      ...(n_classes && label() >= 0 ? [slider("Guidance", view.cfg, 0, 5, 0.25, move("cfg"))] : []));
    if (focus) [...$("options").querySelectorAll("input")].find((input) => input.getAttribute("aria-label") === focus)?.focus();
  }
  const own = view.given === null, drawn = view.given && view.t >= view.given.length;
  $("actions").replaceChildren(
    ...(n_classes ? [el("label", {}, "Class ", el("select", {onchange: (event) => set({label: +event.target.value})},
      ...[...CONFIG.classes, "no class"].map((name, i) => el("option", {value: i < n_classes ? i : -1, selected: label() === (i < n_classes ? i : -1)}, name))))] : []),
    button("New u", () => set({seed: view.seed + 1})),
    button("Draw from here", () => change({given: before}), {class: drawn ? "" : "main"}),
    button("Draw all", () => change({given: [], t: null})),
    button("Back to the image", () => change({given: null}), {disabled: own}));
}

// ---------------------------------------------------------------------------------------------------------------
// E  Branches

let branches = [];                                           // [{pairs, label, pixels, nats}]
async function show_e() {
  const wanted = view.keep || examples();
  branches = branches.filter((old) => wanted.some(({pairs, label}) => old.wish === pairs_text(pairs) + label));
  for (const [i, {pairs, label: of, name}] of wanted.entries()) {
    const wish = pairs_text(pairs) + of, old = branches.find((each) => each.wish === wish);
    const state = old ? null : await run("E", follow(pairs, of, options(), uniform(view.seed, 0), trace), i, wanted.length);
    const pixels = old ? old.pixels : state && await run("E", picture(layout.unpack(state.pairs)), i, wanted.length);
    if (!pixels) return;
    const made = old || {wish, pairs: state.pairs, label: of, pixels, nats: sum(nats(state))};
    made.name = name || made.name;
    branches = [...branches.filter((each) => each !== old), made];
    draw_branches();
  }
  await run("E", [][Symbol.iterator](), 0, 1);
}

function examples() {                                        // the image, and what other choices at the step in view lead to
  const {t} = view, before = trace.pairs.slice(0, t), step = trace.steps[t], [pos, code] = trace.pairs[t], end = layout.eos[layout.ids[pos].grain];
  const p = softmax(place_logits(step, options())), q = softmax(content_logits(step, options())), best = (values) => [...values.keys()].sort((a, b) => values[b] - values[a]);
  const places = best(p).filter((i) => p[i] > 0 && i !== pos && i !== end).slice(0, 2), codes = best(q).filter((c) => c !== code).slice(0, 2);
  return [{pairs: trace.pairs, label: label(), name: "the sequence above"},
    ...places.map((place) => ({pairs: [...before, [place, -1]], label: label(), name: "another place"})),
    ...(code >= 0 ? codes.map((c) => ({pairs: [...before, [pos, c]], label: label(), name: "another code"})) : []),
    ...(step.legal[end] && pos !== end ? [{pairs: [...before, [end, -1]], label: label(), name: "EOS at once"}] : [])];
}

function first_difference(a, b) {                            // -> step, and in words what differs there
  const t = a.findIndex((pair, i) => !b[i] || !same(pair, b[i]));
  if (t < 0) return [-1, "the same"];
  const [[p, c], [q, d]] = [a[t], b[t]];
  return [t, p === q ? `what: code ${c}, not ${d}` : `where: ${describe(p)}, not ${describe(q)}`];
}

function draw_branches() {
  const base = branches[Math.min(view.base, branches.length - 1)], codes = layout.unpack(base.pairs), unit = S / layout.fine_side;
  const store = (list, more = {}) => change({keep: list.map(({pairs, label}) => ({pairs, label})), ...more});
  $("branches").replaceChildren(...branches.map((each, i) => {
    const [t, difference] = first_difference(each.pairs, base.pairs), mine = layout.unpack(each.pairs), letter = String.fromCharCode(97 + i);
    const frames = [...mine.keys()].filter((cell) => mine[cell] !== codes[cell]);
    const edges = frames.flatMap((cell) => [[0, -1, "h"], [0, 1, "h"], [-1, 0, "v"], [1, 0, "v"]].map(([dx, dy]) => {
      const side = layout.fine_side, x = cell % side, y = Math.floor(cell / side), [a, b] = [x + dx, y + dy];
      if (a >= 0 && b >= 0 && a < side && b < side && frames.includes(b * side + a)) return "";
      return dy ? `M${x * unit} ${(y + (dy > 0)) * unit}h${unit}` : `M${(x + (dx > 0)) * unit} ${y * unit}v${unit}`;
    }));
    return el("div", {class: "card" + (each === base ? " base" : "")},
      stack(image(each.pixels, `branch ${letter}`), ...(each === base ? [] : [el("path", {class: "differs", d: edges.join("")})])),
      el("p", {}, el("strong", {}, `${letter}: `), `log p = -${each.nats.toFixed(1)} nats`, n_classes && each.label !== base.label ? ` (${CONFIG.classes[each.label] || "no class"})` : ""),
      el("p", {class: "soft"}, each === base ? "the others are compared with this one" : t < 0 ? "the same sequence" : `pair ${t + 1} is the first to differ; ${difference}`),
      el("div", {class: "row"}, button("Open", () => change({given: each.pairs, label: each.label, t: Math.max(t, 0)})),
        ...(each === base ? [] : [button("Compare", () => store(branches, {base: i}), {title: "compare the others with this one"}), button("×", () => store(branches.filter((other) => other !== each), {base: 0}), {"aria-label": `remove branch ${letter}`})])));
  }));
  const full = branches.length >= 6;
  $("keep").disabled = full;
  $("keep").onclick = () => store([...branches, {pairs: trace.pairs, label: label()}]);
  $("full").textContent = full ? "Six are kept; remove one to keep another." : "";
  const others = branches.filter((each) => each !== base), best = others.reduce((a, b) => (b.nats < (a ? a.nats : Infinity) ? b : a), null);
  rich($("seeE"), others.length ? `Image ${String.fromCharCode(97 + branches.indexOf(best))} is the likeliest of the others: ${best.nats < base.nats ? `e to the ${(base.nats - best.nats).toFixed(1)} times as likely as` : `e to the ${(best.nats - base.nats).toFixed(1)} times less likely than`} image ${String.fromCharCode(97 + branches.indexOf(base))}.` : "Force a choice in panel D, then keep its image here.");
}

// ---------------------------------------------------------------------------------------------------------------
// F  Your map

const STAMPS = {ring: (x, y) => Math.hypot(x, y) > 0.45 && Math.hypot(x, y) < 0.95, middle: (x, y) => Math.max(Math.abs(x), Math.abs(y)) < 0.6,
                top: (x, y) => y < 0, diagonal: (x, y) => Math.abs(x - y) < 0.4, "all fine": () => true, "all coarse": () => false};
const stamp = (inside) => Array.from({length: layout.n_regions}, (_, r) => {
  const at = (i) => (2 * i + 1) / layout.side - 1;
  return inside(at(r % layout.side), at(Math.floor(r / layout.side))) ? K - 1 : 0;
});
const map = () => view.map || stamp(STAMPS.middle);
const map_class = () => (view.label ?? -1) < 0 ? (n_classes ? 0 : -1) : view.label;
let brush = null;                                            // granularity that is being painted
const eight_options = () => (view.temperature === 1 && view.top_p === 1 && view.cfg === 1 ? {...options(), temperature: 0.7, cfg: 2} : options());

function show_map() {
  const grains = map(), put = (r, k) => change({map: grains.map((old, i) => (i === r ? k : old)), kept: null});
  $("map").style.gridTemplateColumns = `repeat(${layout.side}, 1fr)`;
  if ($("map").children.length !== grains.length) {
    $("map").replaceChildren(...grains.map((_, r) => button("", () => {}, {
      onpointerdown: (event) => { brush = (map()[r] + 1) % K; event.target.releasePointerCapture?.(event.pointerId); paint_region(r); },
      onkeydown: (event) => ["Enter", " "].includes(event.key) && (event.preventDefault(), (brush = (map()[r] + 1) % K), paint_region(r))})));
    $("map").addEventListener("pointermove", (event) => {
      const r = [...$("map").children].indexOf(document.elementFromPoint(event.clientX, event.clientY)?.closest?.("#map button"));
      if (event.buttons && brush !== null && r >= 0) paint_region(r);
    });
    addEventListener("pointerup", () => (brush = null));
  }
  function paint_region(r) {
    if (map()[r] !== brush) change({map: map().map((old, i) => (i === r ? brush : old)), kept: null});
  }
  grains.forEach((k, r) => {
    const cell = $("map").children[r], c = Math.sqrt(layout.cells[k]);
    cell.style.setProperty("--colour", HUE(k));
    cell.style.gridTemplateColumns = `repeat(${c}, 1fr)`;
    cell.setAttribute("aria-label", `region ${r + 1}: ${NAMES[k]}`);
    cell.replaceChildren(...Array.from({length: c * c}, () => el("i")));
  });
  $("stamps").replaceChildren(...Object.entries(STAMPS).map(([name, inside]) => button(name, () => change({map: stamp(inside), kept: null}), pressed(stamp(inside).join() === grains.join()))));
}

async function show_f() {
  show_map();
  const grains = map(), tiling = layout.pack(new Int32Array(layout.fine_side ** 2).fill(-1), grains), kept = view.kept;
  const how = eight_options(), made = [], of = map_class();
  const held = kept === null ? null : await run("F", generate(of, how, uniform(view.mapseed, kept), tiling), 0, 9);
  if (kept !== null && !held) return;
  const given = held ? tiling.map(([pos, code], t) => (layout.ids[pos].grain === 0 ? held.pairs[t] : [pos, code])) : tiling;
  $("actionsF").replaceChildren(
    ...(n_classes ? [el("label", {}, "Class ", el("select", {onchange: (event) => change({label: +event.target.value})}, ...CONFIG.classes.map((name, i) => el("option", {value: i, selected: of === i}, name))))] : []),
    button("Draw eight others", () => change({mapseed: view.mapseed + (kept === null ? 8 : 1), kept: null}), {class: "main"}),
    button("Release the coarse codes", () => change({kept: null}), {disabled: kept === null}));
  rich($("seeF"), kept === null ? `${plural(count(grains), "code")} each: ${plural(grains.filter((k) => k === 0).length, NAMES[0] + " region")}, ${grains.filter((k) => k > 0).length} finer. ` +
    (how.temperature === view.temperature ? "The sliders of panel D apply. " : "They are drawn at temperature 0.7 with guidance 2, like those of sample.py. ") + "Click an image to keep its coarse codes and draw its fine ones again." :
    `All eight have the [g0 ${NAMES[0]} codes] of image ${kept + 1}; only the finer ones were drawn again.`);
  for (let i = 0; i < 8; i++) {
    const seed = held && i !== kept ? view.mapseed + 1000 : view.mapseed;
    const state = await run("F", follow(given, of, how, uniform(seed, i), made[0]?.state), i + 1, 9);
    const pixels = state && await run("F", picture(layout.unpack(state.pairs)), i + 1, 9);
    if (!pixels) return;
    made[i] = {state, card: button("", () => change({kept: kept === i ? null : i}), {...pressed(kept === i), "aria-label": `image ${i + 1}: keep its coarse codes`})};
    made[i].card.append(stack(image(pixels, `image ${i + 1}`)));
    if ($("eight").children[i]) $("eight").children[i].replaceWith(made[i].card);
    else $("eight").append(made[i].card);
  }
  await run("F", [][Symbol.iterator](), 0, 1);
}

// ---------------------------------------------------------------------------------------------------------------
// What follows from what

async function change(part) {
  Object.assign(view, part);
  const touched = (...names) => names.some((name) => name in part);
  if (touched("t", "over", "head") && !touched("given", "pic", "label", "seed", "temperature", "top_p", "cfg") && view.t !== null && trace) show_step();
  if (touched("pic", "cut", "flip")) show_a();
  if (touched("pic", "cut", "flip", "given", "label", "seed", "temperature", "top_p", "cfg"))
    if (!(await show_sequence())) return;
  write_address();
  if (touched("keep", "base", "pic") || (view.keep === null && !branches.length)) show_e();
  if (touched("map", "mapseed", "kept", "label")) show_f();
}

async function everything() {
  read_address();
  branches = [];
  $("options").replaceChildren();
  show_map();
  show_a();
  await show_sequence();
  write_address();
  await show_e();
  show_f();
}

function move(by) {
  if (trace) change({t: Math.min(Math.max(view.t + by, 0), trace.pairs.length - 1)});
}

let playing = null;
function play() {
  clearInterval(playing);
  const on = !playing;
  playing = on ? setInterval(() => (view.t >= trace.pairs.length - 1 ? play() : move(1)), 350) : null;
  if (on && view.t >= trace.pairs.length - 1) change({t: 0});
  $("play").textContent = on ? "❚❚ Pause" : "▶︎ Play";
}

function start() {
  const parts = layout.cells.map((cells, k) => `${plural(cells, "code")} per ${NAMES[k]} region`).join(", ");
  $("facts").textContent = `${DATA.params.transformer} parameters in the transformer, ${DATA.params.decoder} in the decoder, images of ${S} x ${S} pixels, ${parts}. ` +
    "Everything below is computed while you watch; nothing is loaded from anywhere.";
  rich($("introA"), `DQ-VAE cuts an image into ${layout.side} x ${layout.side} regions, and a router scores each of them for detail. ` +
    layout.cells.map((cells, k) => `[g${k} ${k === 0 ? "A " : "a "}${NAMES[k]} region] gets ${plural(cells, "code")}`).join(", ") + ".");
  rich($("introB"), "Sorted by granularity and place, the codes form a sequence of pairs. Each tile is one pair. Its height is what the pair costs under the model, in nats: " +
    "[where violet for where], [what green for what]. A tall tile is a surprise.");
  rich($("foot"), `Made by tests/tools/page.py from ${DATA.source}. The transformer's matrices are rounded to ${DATA.matrices}: ${DATA.nats.rounded} nats per validation image, ${DATA.nats.exact} before rounding. ` +
    "The address of this page holds everything you chose, so a link shows what you see. ");
  $("foot").append(el("a", {href: "#selftest"}, "Compare this page with dq.py."));
  $("back").onclick = () => move(-1);
  $("forth").onclick = () => move(1);
  $("play").onclick = play;
  $("scrub").oninput = () => change({t: +$("scrub").value});
  addEventListener("keydown", (event) => {
    if (event.target.closest("input, select, textarea") || event.altKey || event.ctrlKey || event.metaKey) return;
    const by = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (by) event.preventDefault(), move(by);
  });
  everything();
}

function begin() {
  load_weights();
  if (location.hash !== "#selftest") return start();
  let result;
  try {
    result = self_test();
  } catch (error) {
    result = {ok: false, error: String(error.stack)};
  }
  document.body.replaceChildren(el("pre", {id: "selftest"}, JSON.stringify(result, null, 1)));
}
addEventListener("hashchange", () => ([location.hash, $("selftest")].some((x) => x === "#selftest" || x?.id) ? location.reload() : everything()));
begin();
