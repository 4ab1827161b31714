"""The same method in plain loops: dq.py computes whole batches at once, this file one image, code by code.

It is a second tutorial, and the reference that the tests compare dq.py with. These functions read the weights and sizes
of dq's models and call only torch's own layers, never the code that they check. They follow the order of dq.py:
    stage 1      entropy, shares, nearest, averages, mix, cell_weight, position    an image becomes codes
    layers       group_norm, res_block, attn_block; layer_norm, gelu               the parts of the networks
    sequences    granularities, where, place; pack, then legal                     codes become pairs
    stage 2      embed, rotate, block; next_place, next_content; logits            the next pair, and its probability
    sampling     draw, filter_logits; generate                                     one pair after the other
Start with `pack` (and `granularities` for the ids), continue with `legal` and `next_place`, and end with `generate`.
That is variable-length generation in a hundred lines. Look up the rest where it is called.

The notation is that of dq.py. A pair is (position id, codebook id), and the codebook id of an EOS is -1.
"""
import math
import struct

import numpy as np
import torch

__tracebackhide__ = True                                                     # pytest does not print these functions


# ------------------------------------------------------------------------------------------------
# Stage 1: routers, codebook, DQVAE


def entropy(patch):
    """Entropy of the grey levels of one region (3, F, F) in [-1, 1], in nats, from a histogram with 32 soft bins."""
    red, green, blue = patch.double().flatten(1).tolist()
    grey = [0.2989 * r + 0.587 * g + 0.114 * b for r, g, b in zip(red, green, blue)]
    histogram = [sum(math.exp(-0.5 * ((g - centre) / 0.01) ** 2) for g in grey) for centre in np.linspace(-1, 1, 32)]
    p = [count / sum(histogram) for count in histogram]
    return -sum(q * math.log(q) for q in p if q > 0)


def shares(gate):
    """The fraction of all regions that has granularity k, for each k. gate: (B, K, h, w), one-hot"""
    B, K, h, w = gate.shape
    return [sum(gate[b, k, y, x].item() for b in range(B) for y in range(h) for x in range(w)) / (B * h * w)
            for k in range(K)]


def nearest(codes, vector):
    """The id of the codebook entry (of V, D) that is nearest to a vector (D,)."""
    return min(range(len(codes)), key=lambda v: float((codes[v] - vector).square().sum()))


def averages(codes, uses, sums, z, weight, decay):
    """One batch of online k-means: moving averages of how often each entry is used, and of the sum of its vectors.

    codes (V, D); uses (V,); sums (V, D); z: (B, D, H, W); weight (B, H, W) of each cell -> uses, sums
    """
    new_uses, new_sums = torch.zeros_like(uses), torch.zeros_like(sums)
    for b in range(len(z)):
        for y in range(z.shape[2]):
            for x in range(z.shape[3]):
                v = nearest(codes, z[b, :, y, x])
                new_uses[v] += weight[b, y, x]
                new_sums[v] += weight[b, y, x] * z[b, :, y, x]
    return decay * uses + (1 - decay) * new_uses, decay * sums + (1 - decay) * new_sums


def mix(maps, gate):
    """One image: its maps, K x (Z, H_k, W_k), and its gate (K, h, w), which may be any numbers -> (Z, H, W)"""
    H, mixed = maps[-1].shape[-1], torch.zeros_like(maps[-1])
    for y in range(H):
        for x in range(H):
            for k, each in enumerate(maps):
                m, n = H // each.shape[-1], H // gate.shape[-1]              # cells in the side of a code, of a region
                mixed[:, y, x] += gate[k, y // n, x // n] * each[:, y // m, x // m]
    return mixed


def cell_weight(grains, factors):
    """One image (h, w) -> (H, W): a code that fills n cells gives each of them 1 / n."""
    m = factors[0] // factors[-1]                                            # cells in the side of a region
    H = len(grains) * m
    return torch.tensor([[1 / (factors[grains[y // m, x // m]] // factors[-1]) ** 2 for x in range(H)]
                         for y in range(H)])


def position(embedding, y, x):
    """The decoder's position embedding of a cell: Fourier features of its coordinates, a row and a column vector."""
    H = len(embedding.rows)
    at = torch.tensor([2 * x / (H - 1) - 1, 2 * y / (H - 1) - 1])            # corners at -1 and 1
    waves = torch.sin(embedding.fourier.weight[:, :, 0, 0] @ at + embedding.fourier.bias)
    return waves + embedding.rows[y] + embedding.columns[x]                  # Z


# ------------------------------------------------------------------------------------------------
# Layers, by their formulas; the constants are repeated here on purpose


def group_norm(weights, x):
    """One image (C, H, W): normalise 32 groups of channels to mean 0 and variance 1, then scale and shift channels."""
    groups = x.unflatten(0, (32, -1))                                        # 32, C / 32, H, W
    groups = torch.stack([(g - g.mean()) / torch.sqrt(((g - g.mean()) ** 2).mean() + 1e-6) for g in groups])
    return groups.flatten(0, 1) * weights.weight[:, None, None] + weights.bias[:, None, None]


def silu(x):
    return x / (1 + torch.exp(-x))


def conv(weights, x):
    """One image (C, H, W): each output is a sum over the 3 x 3 (or 1 x 1) cells around it; outside there are zeros."""
    n, (_, H, W) = weights.kernel_size[0], x.shape
    padded = torch.nn.functional.pad(x, [n // 2] * 4)
    shifted = [padded[:, i:i + H, j:j + W] for i in range(n) for j in range(n)]  # n n x (C, H, W)
    return torch.einsum("oct,tchw->ohw", weights.weight.flatten(2), torch.stack(shifted)) + weights.bias[:, None, None]


def res_block(weights, x):
    """One image (C, H, W): norm, SiLU and convolution, twice; added to x, or to its projection to other channels."""
    h = conv(weights.conv1, silu(group_norm(weights.norm1, x)))
    h = conv(weights.conv2, silu(group_norm(weights.norm2, h)))
    return (conv(weights.shortcut, x) if len(h) != len(x) else x) + h


def attn_block(weights, x):
    """One image (C, H, W): single-head self-attention over all cells."""
    q, k, v = conv(weights.qkv, group_norm(weights.norm, x)).flatten(1).chunk(3)  # each C, H W
    taken = torch.empty_like(v)
    for i in range(v.shape[1]):
        fit = (q[:, i, None] * k).sum(0) / math.sqrt(len(q))                 # H W
        taken[:, i] = (fit.exp() / fit.exp().sum() * v).sum(1)
    return x + conv(weights.proj, taken.view_as(x))


def normalised(x):
    """Each vector of x (..., n) with its mean subtracted, divided by its standard deviation."""
    x = x - x.mean(-1, keepdim=True)
    return x / torch.sqrt((x ** 2).mean(-1, keepdim=True) + 1e-5)


def layer_norm(weights, h):
    """Entries (L, C): normalise each to mean 0 and variance 1, then scale every channel."""
    return normalised(h) * weights.weight


def gelu(x):
    """x times the probability that a standard normal variable is below x."""
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


# ------------------------------------------------------------------------------------------------
# Sequences


def granularities(layout):
    """For each granularity, coarse to fine: its first id, the number of codes in a row, its EOS id."""
    first = 0
    for side in layout.sides:
        yield first, side, first + side * side                               # ids row by row, then the EOS
        first += side * side + 1


def where(layout, p):
    """A position id -> granularity, row, column; the row and column of an EOS are None."""
    for k, (first, side, eos) in enumerate(granularities(layout)):
        if p == eos:
            return k, None, None
        if p < eos:
            return k, (p - first) // side, (p - first) % side


def place(layout, p):
    """Coordinates of a code's centre, in cells of the finest grid; (0, 0) for an EOS and for the start, -1."""
    k, row, column = where(layout, p) if p >= 0 else (0, None, None)
    if row is None:
        return 0.0, 0.0
    width = layout.sides[-1] / layout.sides[k]
    return (row + 0.5) * width, (column + 0.5) * width


def pack(layout, codes, grains):
    """One image (H, W), (h, w) -> its pairs: coarse codes first, each granularity row by row, followed by its EOS."""
    pairs = []
    for k, (first, side, eos) in enumerate(granularities(layout)):
        c, m = side // layout.sides[0], layout.sides[-1] // side             # a region has c x c codes of m x m cells
        for y in range(side):
            for x in range(side):
                if grains[y // c, x // c] == k:
                    pairs.append((first + y * side + x, int(codes[y * m, x * m])))
        pairs.append((eos, -1))
    return pairs


def legal(layout, prefix):
    """The set of ids that may follow a list of ids.

    A granularity is written row by row. Its first cell in a region opens the region, and then the region's other cells
    must follow. A region that is not opened is left to a finer granularity, but the finest one must not leave any.
    """
    k, covered, last = 0, {}, -1                                             # granularity; regions covered; last id
    for p in prefix:
        last = p
        at, row, column = where(layout, p)
        if row is None:
            k = at + 1
        else:
            c = layout.sides[at] // layout.sides[0]                          # c x c codes a region
            covered[row // c, column // c] = at
    all_of_them = list(granularities(layout))
    if k == len(all_of_them):
        return {all_of_them[-1][2]}                                          # padding with the last EOS
    first, side, eos = all_of_them[k]
    c, may = side // layout.sides[0], set()
    for p in range(max(first, last + 1), eos):                               # until an id that cannot be skipped
        y, x = (p - first) // side, (p - first) % side
        region = y // c, x // c
        is_due = covered.get(region) == k
        opens = region not in covered and y % c == x % c == 0
        if is_due or opens:
            may.add(p)
        if is_due or opens and k == len(all_of_them) - 1:
            return may
    return may | {eos}


# ------------------------------------------------------------------------------------------------
# Stage 2: the next pair


def embed(model, p, c):
    """Input embedding of a pair: content + position + granularity. -> (C,)"""
    content = model.content.weight[c if c >= 0 else model.config.codebook_size]
    return content + position_row(model, p) + model.granularity.weight[where(model.layout, p)[0]]


def position_row(model, p):
    return model.position.weight[p]                                          # every id has its own row


def rotate(x, places):
    """RoPE for x (L, heads, d) at L coordinates: channels i and i + d/2 are a complex number, rotated by an angle.

    The angle is a frequency times the row for the first half of these numbers, and times the column for the second.
    """
    n = x.shape[-1] // 4
    frequency = [10.0 ** -(i / n) for i in range(n)]
    angle = torch.tensor([[row * f for f in frequency] + [column * f for f in frequency] for row, column in places])
    z = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angle), angle)[:, None].to(x.device)
    return torch.cat([z.real, z.imag], dim=-1)


def block(weights, h, queries, keys):
    """A transformer block on entries (L, C): each attends to itself and to those before it.

    queries, keys: for each entry the coordinates by which RoPE rotates its query or key; or None for no rotation.
    """
    L, C = h.shape
    qkv = layer_norm(weights.norm1, h) @ weights.qkv.weight.t()              # L, 3 C
    q, k, v = qkv.view(L, 3, weights.heads, -1).unbind(1)                    # each L, heads, d
    if weights.qk_norm:
        q, k = normalised(q), normalised(k)
    if queries is not None:
        q, k = rotate(q, queries), rotate(k, keys)
    y = torch.empty_like(v)
    for t in range(L):
        scores = (k[:t + 1] * q[t]).sum(-1) / math.sqrt(q.shape[-1])         # t + 1, heads
        y[t] = (scores.softmax(0)[..., None] * v[:t + 1]).sum(0)
    h = h + y.view(L, C) @ weights.proj.weight.t()
    return h + gelu(layer_norm(weights.norm2, h) @ weights.up.weight.t()) @ weights.down.weight.t()


def next_place(model, pairs, label):
    """The position logits of the next pair. -> outputs of the position stack (L, C), {valid id: its logit}

    There are L = len(pairs) + 1 entries: the label (-1: none), and all pairs so far.
    """
    ids = [p for p, _ in pairs]
    first = model.condition.weight[label if label >= 0 else len(model.config.classes)]
    h = torch.stack([first, *(embed(model, p, c) for p, c in pairs)]) + model.order.weight[:len(pairs) + 1]
    past = [place(model.layout, p) for p in [-1, *ids]] if model.config.rotary else None
    for weights in model.position_stack:
        h = block(weights, h, past, past)
    logits = layer_norm(model.position_norm, h[-1]) @ model.position_head.weight.t()
    return h, {p: logits[p].item() for p in legal(model.layout, ids)}


def next_content(model, h, pairs, p):
    """The content logits (V,) of the next pair, if its position is p. h: as returned by next_place

    Each entry gets the position of the pair that follows it. Its query uses that pair's coordinates, its key its own.
    """
    ids = [each for each, _ in pairs]
    h = h + torch.stack([position_row(model, each) for each in [*ids, p]])
    past, there = None, None
    if model.config.rotary:
        past, there = ([place(model.layout, each) for each in of] for of in ([-1, *ids], [*ids, p]))
    for weights in model.content_stack:
        h = block(weights, h, there, past)
    return layer_norm(model.content_norm, h[-1]) @ model.content_head.weight.t()


def logits(model, pairs, label):
    """Position logits (L, P), -inf where not valid, and content logits (L, V) of every pair, each from scratch.

    Training needs these; dq.py computes them in one pass over the sequence.
    """
    positions = torch.full((len(pairs), model.layout.n_positions), -math.inf)
    contents = []
    for t, (p, _) in enumerate(pairs):
        h, may = next_place(model, pairs[:t], label)
        for each, logit in may.items():
            positions[t, each] = logit
        contents.append(next_content(model, h, pairs[:t], p))
    return positions.to(contents[0].device), torch.stack(contents)


# ------------------------------------------------------------------------------------------------
# Sampling


def draw(logits, u):
    """The first entry at which the cumulative probability reaches u. logits: {entry: logit} -> entry"""
    weights = {i: math.exp(logit - max(logits.values())) for i, logit in sorted(logits.items())}
    reached = 0.0
    for i, weight in weights.items():
        reached += weight / sum(weights.values())
        if reached >= u:
            return i
    return i                                                                 # u = 1, and rounding


def filter_logits(row, top_k, top_p):
    """The k most likely entries of a list of logits, and of these the fewest that reach p. -> set of entries"""
    order = sorted(range(len(row)), key=lambda i: -row[i])
    if top_k:
        order = order[:top_k]
    weights = [math.exp(row[i]) for i in order]
    kept, mass = set(), 0.0
    for i, weight in zip(order, weights):
        if kept and mass >= top_p:
            break
        kept.add(i)
        mass += weight / sum(weights)
    return kept


@torch.no_grad()
def generate(model, labels, options, seed, first=0, given=None):
    """One image after the other; every step computes the whole sequence so far. -> the pairs of each image

    labels: a list, -1 for none. given: None, or for each image and step a position and a content, -1 if it is sampled.
    """
    return [image(model, label, options, generator(seed, first + i), given and [x[i] for x in given])
            for i, label in enumerate(labels)]


def generator(seed, number):
    """NumPy's generator for one image, seeded with the 32-bit words of both numbers, low words first."""
    low, high = zip(*(struct.unpack("<II", struct.pack("<Q", x)) for x in (seed, number)))
    return np.random.default_rng([*low, *high])


def image(model, label, options, rng, given):
    uniform, pairs = 1 - rng.random((model.layout.max_len, 2), np.float32), []  # in (0, 1]
    guided = options.cfg != 1 and len(model.config.classes) > 0

    def mixture(labelled, unlabelled):
        return (unlabelled + options.cfg * (labelled - unlabelled)) / options.temperature

    while not pairs or pairs[-1][0] != model.layout.end:
        t = len(pairs)
        h, may = next_place(model, pairs, label)
        h_without, may_without = next_place(model, pairs, -1) if guided else (h, may)
        p = draw({each: mixture(may[each], may_without[each]) for each in may}, uniform[t, 0])
        if given and given[0][t] >= 0:
            p = int(given[0][t])

        content = next_content(model, h, pairs, p)
        content_without = next_content(model, h_without, pairs, p) if guided else content
        row = mixture(content, content_without).tolist()
        c = draw({v: row[v] for v in filter_logits(row, options.top_k, options.top_p)}, uniform[t, 1])
        if given and given[1][t] >= 0:
            c = int(given[1][t])
        is_eos = where(model.layout, p)[1] is None
        pairs.append((p, -1 if is_eos else c))
    return pairs
