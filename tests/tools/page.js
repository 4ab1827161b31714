"use strict";
// Both models of dq.py in plain JavaScript, one image at a time, and the panels around them. Sections 3 to 7 have
// dq.py's numbers, names and order. A "row" is one set of activations: with guidance there are two, labelled and
// unlabelled. Functions with a star (function*) pause between pieces of work, so that the page stays responsive.

// ---------------------------------------------------------------------------------------------------------------
// 1  Configuration and weights

const parse = (id) => JSON.parse(document.getElementById(id).textContent);
const bytes_of = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
const DATA = parse("data"), CONFIG = DATA.config, VAE = DATA.vae;
const WEIGHTS = bytes_of(document.getElementById("weights").textContent);
const W = {};                                                // name -> {data, shape}, as in a state_dict

function half(bits) {                                        // float16 -> number
  const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
}

function load_weights() {
  const halves = Float32Array.from({length: 65536}, (_, bits) => half(bits));
  for (const {name, shape, kind, start, scale} of DATA.tensors) {
    const n = shape.reduce((a, b) => a * b, 1);
    if (kind === "int8") {                                   // whole numbers, and a scale for each row
      const q = new Int8Array(WEIGHTS.buffer, start, n), scales = new Float32Array(WEIGHTS.buffer, scale, shape[0]);
      W[name] = {shape, data: Float32Array.from(q, (value, i) => value * scales[Math.floor(i / shape[1])])};
    } else {
      W[name] = {shape, data: Float32Array.from(new Uint16Array(WEIGHTS.buffer, start, n), (bits) => halves[bits])};
    }
  }
}

const row_of = (name, i) => W[name].data.subarray(i * W[name].shape[1], (i + 1) * W[name].shape[1]);
const sum = (values) => values.reduce((a, b) => a + b, 0);

// ---------------------------------------------------------------------------------------------------------------
// 4  Decoder: a grid of codes -> an image. A map is {c, side, data}: c channels of side x side numbers

const silu = (map) => ({...map, data: map.data.map((x) => x / (1 + Math.exp(-x)))});
const add = (a, b) => ({...a, data: a.data.map((x, i) => x + b.data[i])});

function norm(map, name) {                                   // GroupNorm, 32 groups
  const n = map.data.length / 32, area = map.side ** 2, data = new Float32Array(map.data.length);
  const weight = W[name + ".weight"].data, bias = W[name + ".bias"].data;
  for (let g = 0; g < 32; g++) {
    let total = 0, squares = 0;
    for (let i = g * n; i < (g + 1) * n; i++) total += map.data[i];
    const mean = total / n;
    for (let i = g * n; i < (g + 1) * n; i++) squares += (map.data[i] - mean) ** 2;
    const scale = 1 / Math.sqrt(squares / n + 1e-6);
    for (let i = g * n; i < (g + 1) * n; i++) {
      const c = Math.floor(i / area);
      data[i] = (map.data[i] - mean) * scale * weight[c] + bias[c];
    }
  }
  return {...map, data};
}

function conv(map, name) {                                   // 1 x 1, or 3 x 3 with padding 1
  const {data: w, shape: [c_out, c_in, size]} = W[name + ".weight"], bias = W[name + ".bias"].data;
  const side = map.side, area = side * side, data = new Float32Array(c_out * area);
  if (size === 1) {
    for (let o = 0; o < c_out; o++) {
      const y = data.subarray(o * area, (o + 1) * area).fill(bias[o]);
      for (let i = 0; i < c_in; i++) {
        const weight = w[o * c_in + i], x = map.data.subarray(i * area, (i + 1) * area);
        for (let p = 0; p < area; p++) y[p] += weight * x[p];
      }
    }
    return {c: c_out, side, data};
  }
  const s = side + 2, plane = s * s, padded = new Float32Array(c_in * plane), y = new Float32Array(side * s);
  for (let i = 0; i < c_in; i++)
    for (let r = 0; r < side; r++)
      padded.set(map.data.subarray(i * area + r * side, i * area + (r + 1) * side), i * plane + (r + 1) * s + 1);
  for (let o = 0; o < c_out; o++) {
    y.fill(bias[o]);                                         // rows of s numbers, the last two of which are unused
    for (let i = 0; i < c_in; i++) {
      const x = padded.subarray(i * plane, (i + 1) * plane), k = (o * c_in + i) * 9;
      const a = w[k], b = w[k + 1], c = w[k + 2], d = w[k + 3], e = w[k + 4], f = w[k + 5], g = w[k + 6],
        h = w[k + 7], j = w[k + 8];
      for (let p = 0, n = side * s - 2; p < n; p++)
        y[p] += a * x[p] + b * x[p + 1] + c * x[p + 2] + d * x[p + s] + e * x[p + s + 1] + f * x[p + s + 2] +
          g * x[p + 2 * s] + h * x[p + 2 * s + 1] + j * x[p + 2 * s + 2];
    }
    for (let r = 0; r < side; r++) data.set(y.subarray(r * s, r * s + side), o * area + r * side);
  }
  return {c: c_out, side, data};
}

function res_block(x, name) {
  let h = conv(silu(norm(x, name + ".norm1")), name + ".conv1");
  h = conv(silu(norm(h, name + ".norm2")), name + ".conv2");
  return add(W[name + ".shortcut.weight"] ? conv(x, name + ".shortcut") : x, h);
}

function attn_block(x, name) {                               // one head, over all positions of the map
  const {c, side} = x, area = side * side, qkv = conv(norm(x, name + ".norm"), name + ".qkv").data;
  const y = new Float32Array(c * area);
  for (let i = 0; i < area; i++) {
    const scores = new Float32Array(area);
    for (let k = 0; k < c; k++) {
      const q = qkv[k * area + i] / Math.sqrt(c);
      for (let j = 0; j < area; j++) scores[j] += q * qkv[(c + k) * area + j];
    }
    const weights = softmax(scores);
    for (let k = 0; k < c; k++) {
      let total = 0;
      for (let j = 0; j < area; j++) total += weights[j] * qkv[(2 * c + k) * area + j];
      y[k * area + i] = total;
    }
  }
  return add(x, conv({c, side, data: y}, name + ".proj"));
}

// residual blocks, with attention after each where it is due
function* sequential(x, name) {
  for (let i = 0; W[`${name}.${i}.qkv.weight`] || W[`${name}.${i}.conv1.weight`]; i++) {
    x = W[`${name}.${i}.qkv.weight`] ? attn_block(x, `${name}.${i}`) : res_block(x, `${name}.${i}`);
    yield;
  }
  return x;
}

// sines of a learned map of (x, y), a row and a column vector
function position_embedding(z) {
  const {c, side} = z, {data: fourier} = W["decoder.position.fourier.weight"];
  const bias = W["decoder.position.fourier.bias"].data;
  const line = Array.from({length: side}, (_, i) => (side > 1 ? 2 * i / (side - 1) - 1 : 0));
  const data = z.data.map((value, i) => {
    const k = Math.floor(i / side ** 2), row = Math.floor(i / side) % side, column = i % side;
    const wave = Math.sin(fourier[2 * k] * line[column] + fourier[2 * k + 1] * line[row] + bias[k]);
    return value + wave + row_of("decoder.position.rows", row)[k] + row_of("decoder.position.columns", column)[k];
  });
  return {c, side, data};
}

function upsample(map) {                                     // twice the side
  const s = 2 * map.side, data = new Float32Array(map.c * s * s);
  for (let i = 0; i < data.length; i++) {
    const k = Math.floor(i / (s * s)), row = Math.floor(i / s) % s, column = i % s;
    data[i] = map.data[(k * map.side + (row >> 1)) * map.side + (column >> 1)];
  }
  return {c: map.c, side: s, data};
}

function* decoder(z) {
  let h = yield* sequential(conv(position_embedding(z), "decoder.stem"), "decoder.mid");
  for (let i = 0; W[`decoder.levels.${i}.0.conv1.weight`]; i++) {
    h = yield* sequential(h, `decoder.levels.${i}`);
    if (W[`decoder.ups.${i}.weight`]) h = conv(upsample(h), `decoder.ups.${i}`);
  }
  return conv(silu(norm(h, "decoder.out.0")), "decoder.out.2");
}

function* decode(codes) {                                    // H x W codebook ids -> RGBA bytes of the image
  const {data: book, shape: [, D]} = W["codebook.codes"], side = layout.fine_side, area = side * side;
  const q = {c: D, side, data: new Float32Array(D * area)};
  for (let i = 0; i < area; i++)                             // as in sample.py --gif, id 0 stands for what is not there
    for (let d = 0; d < D; d++) q.data[d * area + i] = book[Math.max(codes[i], 0) * D + d];
  const {data: x, side: S} = yield* decoder(conv(q, "post_quant"));
  const pixels = new Uint8ClampedArray(4 * S * S).fill(255);
  for (let i = 0; i < 3 * S * S; i++) pixels[4 * (i % (S * S)) + Math.floor(i / (S * S))] = (x[i] + 1) * 127.5;
  return pixels;
}

// ---------------------------------------------------------------------------------------------------------------
// 5  Sequences: codes and granularities <-> (position, content) pairs

class Layout {
  constructor(size, factors) {
    this.sides = factors.map((factor) => size / factor);
    [this.side, this.fine_side] = [this.sides[0], this.sides.at(-1)];
    this.n_regions = this.side ** 2;
    this.cells = this.sides.map((side) => (side / this.side) ** 2);
    this.n_grains = factors.length;
    this.max_len = this.n_regions * this.cells.at(-1) + this.n_grains;
    [this.offsets, this.eos, this.ids] = [[], [], []];       // ids: what each position id stands for
    this.sides.forEach((side, k) => {
      const c = side / this.side, first = this.ids.length, step = this.fine_side / side;
      this.offsets.push(first);
      for (let i = 0; i < side * side; i++) {
        const row = Math.floor(i / side), column = i % side, r = Math.floor(row / c), s = Math.floor(column / c);
        const first_id = first + r * c * side + s * c;
        this.ids.push({grain: k, region: r * this.side + s, first_id, opens: first_id === first + i, is_eos: false,
                       row, column, step, coordinates: [(row + 0.5) * step, (column + 0.5) * step]});
      }
      this.eos.push(this.ids.length);
      this.ids.push({grain: k, region: -1, first_id: this.ids.length, opens: true, is_eos: true, coordinates: [0, 0]});
    });
    this.n_positions = this.ids.length;
    this.end = this.n_positions - 1;
  }

  // -> [[position, content], ...] up to and with the last EOS
  pack(codes, grains) {
    const pairs = [];
    this.ids.forEach((id, pos) => {
      if (id.is_eos) pairs.push([pos, -1]);
      else if (grains[id.region] === id.grain) pairs.push([pos, codes[this.cells_of(pos)[0]]]);
    });
    return pairs;
  }

  unpack(pairs) {                                            // -> codes (H W), -1 where nothing is yet
    const codes = new Int32Array(this.fine_side ** 2).fill(-1);
    for (const [pos, code] of pairs) for (const cell of this.cells_of(pos)) codes[cell] = code;
    return codes;
  }

  cells_of(pos) {                                            // cells of the finest grid that a position covers
    const {row, column, step, is_eos} = this.ids[pos], cells = [];
    if (!is_eos)
      for (let i = 0; i < step; i++)
        for (let j = 0; j < step; j++) cells.push((row * step + i) * this.fine_side + column * step + j);
    return cells;
  }

  grains(pairs) {                                            // -> granularity of each region, -1 where nothing covers
    const known = new Array(this.n_regions).fill(-1);
    for (const [pos] of pairs) if (!this.ids[pos].is_eos) known[this.ids[pos].region] = this.ids[pos].grain;
    return known;
  }

  legal(prev, grains) {                                      // -> for each position id, whether it may follow prev
    const mask = new Array(this.n_positions).fill(false), following = Math.min(prev + 1, this.end);
    const k = this.ids[following].grain;
    for (let pos = following; pos <= this.eos[k]; pos++) {   // what may come lies ahead, in the same granularity
      const {region, opens, first_id, is_eos} = this.ids[pos];
      const due = !is_eos && grains[region] === k && first_id < following;
      const free = opens && (is_eos || grains[region] < 0 || grains[region] >= k);
      mask[pos] = due || free;
      if (due || free && k === this.n_grains - 1) break;     // what can't be passed over
    }
    return mask;
  }
}

const layout = new Layout(CONFIG.size, CONFIG.factors);

// ---------------------------------------------------------------------------------------------------------------
// 6  DQ-Transformer, one step at a time over a cache

function softmax(logits) {
  const top = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  const p = logits.map((x) => Math.exp(x - top)), total = sum(p);
  return p.map((x) => x / total);
}

function linear(x, name) {
  const {data: w, shape: [m, n]} = W[name + ".weight"], y = new Float32Array(m);
  for (let i = 0, k = 0; i < m; i++) {
    let a = 0, b = 0, c = 0, d = 0, j = 0;                   // four sums, since processors add them side by side
    for (; j + 3 < n; j += 4, k += 4) {
      a += w[k] * x[j];
      b += w[k + 1] * x[j + 1];
      c += w[k + 2] * x[j + 2];
      d += w[k + 3] * x[j + 3];
    }
    for (; j < n; j++, k++) a += w[k] * x[j];
    y[i] = a + b + c + d;
  }
  return y;
}

function layer_norm(x, weight) {
  const mean = sum(x) / x.length, scale = 1 / Math.sqrt(x.reduce((a, b) => a + (b - mean) ** 2, 0) / x.length + 1e-5);
  return x.map((value, i) => (value - mean) * scale * (weight ? weight[i] : 1));
}

function gelu(x) {                                           // erf by Abramowitz and Stegun 7.1.26
  const z = Math.abs(x) / Math.SQRT2, t = 1 / (1 + 0.3275911 * z);
  const tail = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))));
  const erf = 1 - tail * Math.exp(-z * z);
  return 0.5 * x * (1 + Math.sign(x) * erf);
}

function rope_table([row, column]) {                         // -> angle of each of the d / 2 planes of a head
  const d = CONFIG.width / CONFIG.heads, n = d / 4;
  return Float32Array.from({length: d / 2}, (_, i) => (i < n ? row : column) * 10 ** -((i % n) / n));
}

function apply_rope(x, angles) {                             // turn the planes of channels i and i + d/2 of every head
  if (!angles) return x;
  const y = new Float32Array(x.length), n = angles.length;
  for (let i = 0; i < n; i++) {
    const cos = Math.cos(angles[i]), sin = Math.sin(angles[i]);
    for (let a = i, b = i + n; a < x.length; a += 2 * n, b += 2 * n) {
      y[a] = x[a] * cos - x[b] * sin;
      y[b] = x[b] * cos + x[a] * sin;
    }
  }
  return y;
}

// q (C), t + 1 keys and values (C) -> y (C), weights by head
function attention(q, keys, values) {
  const C = q.length, d = C / CONFIG.heads, y = new Float32Array(C), weights = [];
  for (let h = 0; h < C; h += d) {
    const scores = new Float32Array(keys.length);
    keys.forEach((key, t) => {
      for (let i = h; i < h + d; i++) scores[t] += q[i] * key[i] / Math.sqrt(d);
    });
    const w = softmax(scores);
    values.forEach((value, t) => {
      for (let i = h; i < h + d; i++) y[i] += w[t] * value[i];
    });
    weights.push(w);
  }
  return [y, weights];
}

function block(x, name, cache, t, query_turns, key_turns) {  // -> x, attention's weights by head
  const C = x.length, d = C / CONFIG.heads, qkv = linear(layer_norm(x, W[name + ".norm1.weight"].data), name + ".qkv");
  let [q, k, v] = [qkv.slice(0, C), qkv.slice(C, 2 * C), qkv.slice(2 * C)];
  if (CONFIG.qk_norm)
    for (const vector of [q, k])
      for (let h = 0; h < C; h += d) vector.set(layer_norm(vector.slice(h, h + d)), h);
  q = apply_rope(q, query_turns);
  [cache.keys[t], cache.values[t]] = [apply_rope(k, key_turns), v];
  const [y, weights] = attention(q, cache.keys, cache.values);
  const z = linear(y, name + ".proj");
  x = x.map((value, i) => value + z[i]);
  const up = linear(layer_norm(x, W[name + ".norm2.weight"].data), name + ".up").map(gelu);
  const down = linear(up, name + ".down");
  return [x.map((value, i) => value + down[i]), weights];
}

const n_classes = CONFIG.classes.length;

function embed(pos, code) {                                  // content + position + granularity
  const content = row_of("content.weight", code < 0 ? CONFIG.codebook_size : code),
    position = row_of("position.weight", pos);
  const granularity = row_of("granularity.weight", layout.ids[pos].grain);
  return content.map((x, i) => x + position[i] + granularity[i]);
}

const condition = (label) => row_of("condition.weight", label < 0 ? n_classes : label);
const rope_of = (pos) => CONFIG.rotary && rope_table(pos < 0 ? [0, 0] : layout.ids[pos].coordinates);

// ---------------------------------------------------------------------------------------------------------------
// 7  Sampling

function filter_logits(logits, top_k, top_p) {
  if (top_k > 0 && top_k < logits.length) {
    const least = logits.slice().sort().at(-top_k);          // a typed array sorts by value
    logits = logits.map((x) => (x < least ? -Infinity : x));
  }
  if (top_p < 1) {
    const p = softmax(logits), order = [...p.keys()].sort((a, b) => p[b] - p[a]), kept = logits.slice().fill(-Infinity);
    let before = 0;
    for (const i of order) {
      if (before >= top_p) break;                            // already reached without this one
      kept[i] = logits[i];
      before += p[i];
    }
    return kept;
  }
  return logits;
}

function draw(logits, u) {                                   // the first entry whose cumulated probability reaches u
  const p = softmax(logits), total = sum(p);
  let cumulated = 0, last = 0;
  for (let i = 0; i < p.length; i++) {
    if (p[i] === 0) continue;                                // what can't be drawn is never reached
    cumulated += p[i];
    last = i;
    if (cumulated >= u * total) return i;
  }
  return last;
}

// logits labelled, unlabelled -> guided, by temperature
function apply_guidance(rows, options) {
  const [labelled, unlabelled] = rows;
  if (!unlabelled || options.cfg === 1) return labelled.map((x) => x / options.temperature);
  return labelled.map((x, i) => (unlabelled[i] + options.cfg * (x - unlabelled[i])) / options.temperature);
}

const masked = (logits, legal) => logits.map((x, i) => (legal[i] ? x : -Infinity));
const place_logits = (step, options) => masked(apply_guidance(step.position, options), step.legal);
const content_logits = (step, options) => filter_logits(
  apply_guidance(step.content, options), options.top_k, options.top_p);

// labels: of each row; caches: by row and layer; pairs: written so far; steps: what each of them was drawn from
function first_state(labels) {
  const n = CONFIG.position_layers + CONFIG.content_layers;
  const caches = labels.map(() => Array.from({length: n}, () => ({keys: [], values: []})));
  return {labels, caches, pairs: [], steps: []};
}

function decode_one(state, options, u, given = []) {         // write one more pair
  const t = state.pairs.length, [last, last_code] = t ? state.pairs[t - 1] : [-1, -1];
  const last_turns = rope_of(last), order = row_of("order.weight", t), {position_layers, content_layers} = CONFIG;

  // where: position stack, then one draw among the legal ids
  const hidden = state.labels.map((label, r) => {
    let h = t ? embed(last, last_code) : condition(label);
    h = h.map((x, i) => x + order[i]);
    for (let i = 0; i < position_layers; i++)
      [h] = block(h, `position_stack.${i}`, state.caches[r][i], t, last_turns, last_turns);
    return h;
  });
  const step = {legal: layout.legal(last, layout.grains(state.pairs)), u, attention: []};
  step.position = hidden.map((h) => linear(layer_norm(h, W["position_norm.weight"].data), "position_head"));
  const pos = given[0] >= 0 ? given[0] : draw(place_logits(step, options), u[0]);

  // what: content stack, then one draw
  const turns = rope_of(pos);
  step.content = hidden.map((h, r) => {
    const position = row_of("position.weight", pos);
    h = h.map((x, i) => x + position[i]);
    for (let i = 0; i < content_layers; i++) {
      const [next, weights] = block(h, `content_stack.${i}`, state.caches[r][position_layers + i], t, turns,
        last_turns);
      h = next;
      if (r === 0) step.attention.push(weights);
    }
    return linear(layer_norm(h, W["content_norm.weight"].data), "content_head");
  });
  const code = given[1] >= 0 ? given[1] : draw(content_logits(step, options), u[1]);
  state.pairs.push([pos, layout.ids[pos].is_eos ? -1 : code]);
  state.steps.push(step);
}

const is_done = (state) => state.pairs.length > 0 && state.pairs.at(-1)[0] === layout.end;

const rows_of = (label, cfg) => (cfg !== 1 && n_classes && label >= 0 ? [label, -1] : [label]);

function* generate(label, options, uniform, given = [], state = first_state(rows_of(label, options.cfg))) {
  while (!is_done(state)) {
    decode_one(state, options, uniform[state.pairs.length], given[state.pairs.length]);
    yield state;
  }
  return state;
}

// numpy's default_rng, as dq.py seeds it: the draws of image `number` are those of sample.py --seed
function uniform(seed, number, n = layout.max_len) {
  const words = [BigInt(seed) % 2n ** 32n, BigInt(number) % 2n ** 32n, BigInt(seed) >> 32n, BigInt(number) >> 32n].map(
    Number);
  const hasher = (constant, factor) => (value) => {          // SeedSequence: mix the four words, then spread them
    value ^= constant;
    constant = Math.imul(constant, factor);
    value = Math.imul(value, constant);
    return value ^ (value >>> 16);
  };
  const hash = hasher(0x43b0d7e5, 0x931e8875), pool = words.map(hash);
  for (let i = 0; i < 4; i++)
    for (let j = 0; j < 4; j++)
      if (i !== j) {
        const mixed = Math.imul(0xca01f9dd, pool[j]) - Math.imul(0x4973f715, hash(pool[i]));
        pool[j] = mixed ^ (mixed >>> 16);
      }
  const spread = hasher(0x8b51f9dd, 0x58f38ded),
    s = Array.from({length: 8}, (_, i) => BigInt(spread(pool[i % 4]) >>> 0));
  const wide = (i) => (s[i + 1] << 96n) | (s[i] << 64n) | (s[i + 3] << 32n) | s[i + 2];
  const m128 = (1n << 128n) - 1n, m64 = (1n << 64n) - 1n, increment = (wide(4) << 1n | 1n) & m128;
  const next = (x) => (x * 0x2360ed051fc65da44385df649fccf645n + increment) & m128;
  let x = next((increment + wide(0)) & m128);                // PCG64: a linear congruence, its high bits turned
  const halves = [];
  while (halves.length < 2 * n) {
    x = next(x);
    const folded = (x >> 64n) ^ (x & m64), turn = x >> 122n,
      turned = ((folded >> turn) | (folded << (64n - turn))) & m64;
    halves.push(Number(turned & 0xffffffffn), Number(turned >> 32n));
  }
  return Array.from({length: n}, (_, t) => [0, 1].map((i) => 1 - (halves[2 * t + i] >>> 8) / 2 ** 24));
}

// ---------------------------------------------------------------------------------------------------------------
// The self-test, page.html#selftest: numbers of this file beside those of dq.py

function crc32(bytes) {
  let crc = -1;
  for (const byte of bytes) {
    crc ^= byte;
    for (let i = 0; i < 8; i++) crc = (crc >>> 1) ^ (crc & 1 ? 0xedb88320 : 0);
  }
  return ~crc >>> 0;
}

function finish(work) {                                      // a paused function (function*), to its end
  for (;;) {
    const {value, done} = work.next();
    if (done) return value;
  }
}

function self_test() {
  const {logits, drawn, legal, decoded} = DATA.reference, checks = {},
    plain = {temperature: 1, top_k: 0, top_p: 1, cfg: 1};
  const check = (name, value, limit) => (checks[name] = {value, limit, ok: value <= limit});
  check("checksum of the weights", Math.abs(crc32(WEIGHTS) - DATA.crc), 0);

  let [position, content, sums] = [0, 0, 0];                 // largest differences
  for (const {label, pairs, ...wanted} of logits) {
    const state = finish(generate(label, plain, uniform(0, 0), pairs)),
      floats = (text) => new Float32Array(bytes_of(text).buffer);
    const [where, what] = [floats(wanted.position), floats(wanted.content)], P = layout.n_positions,
      V = CONFIG.codebook_size;
    state.steps.forEach((step, t) => {
      place_logits(step, plain).forEach((x, i) => {
        const y = where[t * P + i];
        if (x !== y) position = Math.max(position, Number.isFinite(x - y) ? Math.abs(x - y) : 1e9);
      });
      step.content[0].forEach((x, i) => (content = Math.max(content, Math.abs(x - what[t * V + i]))));
      for (const p of [softmax(place_logits(step, plain)),
        softmax(content_logits(step, {...plain, temperature: 0.5, top_p: 0.9}))])
        sums = Math.max(sums, Math.abs(sum(p) - 1));
    });
  }
  check("position logits", position, 0.01);
  check("content logits", content, 0.01);
  check("sum of probabilities", sums, 1e-5);

  const differ = (a, b) => JSON.stringify(a) !== JSON.stringify(b);
  check("sequences drawn", sum(drawn.map(({seed, number, label, options, given, pairs}) =>
    +differ(pairs, finish(generate(label, options, uniform(seed, number), given)).pairs))), 0);
  check("legal", sum(legal.map(({prev, grains, legal}) =>
    +differ(legal, [...layout.ids.keys()].filter((i) => layout.legal(prev, grains)[i])))), 0);
  check("pixels decoded", Math.max(...decoded.map(({pairs, pixels}) => {
    const mine = finish(decode(layout.unpack(pairs)));
    return bytes_of(pixels).reduce(
      (most, x, i) => Math.max(most, Math.abs(x - mine[Math.floor(i / 3) * 4 + i % 3])), 0);
  })), 2);
  const regrown = layout.pack(layout.unpack(drawn[0].pairs), layout.grains(drawn[0].pairs));
  check("unpack, pack", +differ(regrown, drawn[0].pairs), 0);
  return {ok: Object.values(checks).every((each) => each.ok), checks};
}
