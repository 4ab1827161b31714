"""DQTransformer and its sampler: a proper distribution over tilings, the same with and without the cache."""
import contextlib
import itertools
import math
import shutil

import numpy as np
import pytest
import torch

import dq
import sample
import train_transformer
from conftest import TRANSFORMER, call
from test_layout import naive_legal, random_image
from sample import given_coarse, given_tiling
from dq import DQTransformer, SampleOptions, TransformerConfig, generate


def tiny(size=4, factors=(2, 1), V=2, classes=(), device="cpu", layers=2, **kwargs):
    """A random model with opinions: weights far from the nearly uniform initialisation."""
    torch.manual_seed(1)
    config = TransformerConfig(size=size, factors=factors, codebook_size=V, classes=classes, width=32, heads=2,
                               position_layers=layers, content_layers=layers, **kwargs)
    model = DQTransformer(config).to(device).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(std=0.25)
    return model


def all_images(layout, V):
    """Every image of a K = 2 layout: codes (M, H, W), grains (M, h, w)."""
    h, m, s = layout.side, layout.fine_side // layout.side, layout.cells[1]
    region = [(0, (c,) * s) for c in range(V)] + [(1, cs) for cs in itertools.product(range(V), repeat=s)]
    images = list(itertools.product(range(len(region)), repeat=layout.n_regions))
    index = torch.tensor(images)                                             # M, N
    grains = torch.tensor([g for g, _ in region])[index].view(-1, h, h)
    cells = torch.tensor([cs for _, cs in region])[index]                    # M, N, s
    codes = cells.view(-1, h, h, m, m).transpose(2, 3).reshape(-1, h * m, h * m)
    return codes, grains


@torch.no_grad()
def test_probabilities_of_all_images_sum_to_one(device):
    model = tiny(layers=1, device=device)
    codes, grains = all_images(model.layout, 2)
    assert len(codes) == 18 ** 4 == 104_976
    total = 0.0
    for c, g in zip(codes.split(8192), grains.split(8192)):
        losses = model(*model.layout.pack(c.to(device), g.to(device)))
        total += (-(losses["position"] + losses["content"])).double().exp().sum().item()
    assert abs(total - 1) < 1e-4


def naive_embed(model, p, c):
    """One pair: a row for the content, one for the position, one for the granularity."""
    k = sum(p > eos for eos in model.layout.eos)
    content = model.content.weight[c if c >= 0 else model.config.codebook_size]
    return content + model.position.weight[p] + model.granularity.weight[k]


@torch.no_grad()
def test_a_pair_is_the_sum_of_three_rows(device):
    model = tiny(8, (4, 2, 1), V=5, device=device)
    pos = torch.arange(model.layout.n_positions, device=device)              # every place of every granularity
    code = torch.where(model.layout.is_eos, -1, torch.randint_like(pos, 0, 5))
    wanted = torch.stack([naive_embed(model, p, c) for p, c in zip(pos.tolist(), code.tolist())])
    torch.testing.assert_close(model.embed(pos, code), wanted)
    torch.testing.assert_close(model.embed(pos[None], code[None]), wanted[None])


def naive_rotate(x, places):
    """(L, d): channels i and i + d/2 as a complex number, turned by the row (the first d/4 of them) or the column."""
    d = x.shape[1]
    angle = torch.tensor([[place[i >= d // 4] * 10.0 ** -(i % (d // 4) / (d // 4)) for i in range(d // 2)]
                          for place in places], device=x.device)
    z = torch.complex(*x.chunk(2, dim=1)) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag], dim=1)


def naive_block(block, h, queries, keys):
    """h (L, C) -> (L, C): attention entry by entry. queries, keys: places of each entry, or None for no rotation."""
    C, d, y = h.shape[1], h.shape[1] // block.heads, torch.empty_like(h)
    q, k, v = (block.norm1(h) @ block.qkv.weight.t()).split(C, dim=1)
    for a in range(block.heads):
        own = slice(a * d, (a + 1) * d)
        turned_q, turned_k = (naive_rotate(part[:, own], places) if places else part[:, own]
                              for part, places in ((q, queries), (k, keys)))
        for t in range(len(h)):                                              # each looks at itself and what is before
            scores = turned_k[:t + 1] @ turned_q[t] / math.sqrt(d)
            y[t, own] = scores.softmax(0) @ v[:t + 1, own]
    h = h + y @ block.proj.weight.t()
    return h + torch.nn.functional.gelu(block.norm2(h) @ block.up.weight.t()) @ block.down.weight.t()


def naive_place(layout, p):
    """Centre of the code of an id, in cells of the finest grid; 0, 0 for an EOS and the start, -1."""
    if p < 0 or p in layout.eos:
        return 0.0, 0.0
    k = sum(p > eos for eos in layout.eos)
    side = layout.side * int(layout.cells[k] ** 0.5)
    i, width = p - layout.offsets[k], layout.fine_side / side
    return (i // side + 0.5) * width, (i % side + 0.5) * width


@pytest.mark.parametrize("rotary", [True, False])
@pytest.mark.parametrize("training, label_dropout", [(False, 1.0), (True, 1.0), (True, 0.0)])
@torch.no_grad()
def test_logits_equal_a_loop_over_prefixes(training, label_dropout, rotary, device):
    """Each step is computed anew from the pairs before it. In training, and then only, labels are hidden."""
    model = tiny(8, (4, 2), V=5, classes=("a", "b"), label_dropout=label_dropout, rotary=rotary, device=device)
    model.train(training)
    layout, label = model.layout, torch.tensor([0, 1, -1], device=device)
    grains = torch.tensor([[[0, 1], [1, 0]], [[1, 1], [1, 1]], [[0, 0], [0, 0]]], device=device)
    pos, code = layout.pack(random_image(layout, grains, V=5), grains)
    position, content = model.logits(pos, code, label)
    for b, t in itertools.product(range(3), range(layout.max_len)):
        pairs = list(zip(pos[b].tolist(), code[b].tolist()))[:t]
        hidden = label[b] < 0 or training and label_dropout == 1
        first = model.condition.weight[2 if hidden else label[b]]
        h = torch.stack([first, *(naive_embed(model, *pair) for pair in pairs)])
        h = h + model.order.weight[:t + 1]                                   # t + 1, C
        past = [naive_place(layout, p) for p in [-1] + pos[b, :t].tolist()] if rotary else None
        target = [naive_place(layout, p) for p in pos[b, :t + 1].tolist()] if rotary else None
        for block in model.position_stack:
            h = naive_block(block, h, past, past)
        wanted = torch.full((layout.n_positions,), -math.inf, device=device)
        legal = list(naive_legal(layout, [p for p, _ in pairs]))
        wanted[legal] = model.position_head(model.position_norm(h))[-1][legal]
        torch.testing.assert_close(position[b, t], wanted, atol=1e-4, rtol=1e-4)
        h = h + model.position.weight[pos[b, :t + 1]]
        for block in model.content_stack:
            h = naive_block(block, h, target, past)
        wanted = model.content_head(model.content_norm(h))[-1]
        torch.testing.assert_close(content[b, t], wanted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_products_depend_on_how_far_apart_places_are():
    """Of rotated vectors; in rows and in columns. Place 0, 0 turns nothing."""
    q, k = torch.randn(2, 16)
    places = torch.tensor([[0.0, 0.0], [1.5, 4.0], [3.0, 2.5], [8.5, 11.0], [10.0, 9.5]])
    turns = dq.rotations(places, 16)                                         # the last two are moved by 7, 7
    torch.testing.assert_close(dq.rotate(q, turns[0]), q)
    products = [dq.rotate(q, turns[i]) @ dq.rotate(k, turns[j]) for i, j in ((1, 2), (3, 4), (1, 4), (2, 1))]
    torch.testing.assert_close(products[0], products[1])
    assert all(abs(products[0] - other) > 1e-3 for other in products[2:])
    for row, column in ((1.0, 0.0), (0.0, 1.0)):                             # each of the two turns half of the planes
        turned = dq.rotate(q, dq.rotations(torch.tensor([[row, column]]), 16)[0])
        still = (turned == q).view(2, 2, 4)
        assert still[:, int(row)].all() and not still[:, int(column)].any()


def lengths(layout, pos):
    """Pairs up to and with the last EOS. (B, L) -> (B,)"""
    return (pos != layout.end).sum(1) + 1


def sample_of(model, B, seed=3, **kwargs):
    label = torch.arange(B, device=model.content.weight.device) % max(1, len(model.config.classes))
    return generate(model, label if model.config.classes else torch.full_like(label, -1), seed=seed, **kwargs), label


def naive_draw(logits, u):
    """Inverse of the distribution function, by a loop. logits: {entry: logit} -> entry"""
    weights = {i: math.exp(logit - max(logits.values())) for i, logit in sorted(logits.items())}
    reached = 0.0
    for i, weight in weights.items():
        reached += weight / sum(weights.values())
        if reached >= u:
            return i
    return i                                                                 # u = 1, and rounding


def naive_generate(model, label, options, seed, first=0, given=None):
    """One image after the other; every step runs the model on the whole sequence so far. -> lists of pairs"""
    layout, config, device, images = model.layout, model.config, label.device, []
    for i, y in enumerate(label.tolist()):
        pairs, uniform = [], 1 - np.random.default_rng([seed, first + i]).random((layout.max_len, 2), np.float32)
        while not pairs or pairs[-1][0] != layout.end:
            t = len(pairs)

            def logits(which, position):
                """Of step t, guided: which = 0 for the position, 1 for the content, given the position."""
                pos, code = torch.tensor([pairs + [[position, -1]]], device=device).unbind(-1)
                both = [model.logits(pos, code, torch.tensor([each], device=device))[which][0, t] for each in (y, -1)]
                guided = both[1] + options.cfg * (both[0] - both[1]) if options.cfg != 1 and config.classes else both[0]
                return (guided / options.temperature).tolist()

            legal = naive_legal(layout, [p for p, _ in pairs])
            before = logits(0, min(legal))                                   # any will do: it is not seen yet
            position = {p: before[p] for p in legal}
            p = naive_draw(position, uniform[t, 0])
            if given is not None and given[0][i, t] >= 0:
                p = int(given[0][i, t])
            content = logits(1, p)
            kept = naive_filter(content, options.top_k, options.top_p)
            c = naive_draw({v: content[v] for v in kept}, uniform[t, 1])
            if given is not None and given[1][i, t] >= 0:
                c = int(given[1][i, t])
            pairs.append([p, -1 if p in layout.eos else c])
        images.append(pairs)
    return images


@pytest.mark.parametrize("how", [dict(), dict(slots=2, bucket=2), dict(slots=3, bucket=8, look_every=4),
                                 dict(slots=2, bucket=64, look_every=32)], ids=str)
@pytest.mark.parametrize("cfg", [1.0, 2.5])
@pytest.mark.parametrize("size, factors", [(8, (4,)), (8, (4, 2)), (8, (4, 2, 1))])
@torch.no_grad()
def test_the_fused_loop_draws_what_the_naive_loop_draws(size, factors, cfg, how, device):
    """Code by code: in one batch or in few slots that are refilled, over many windows of the cache or a single one."""
    model = tiny(size, factors, V=5, classes=("a", "b"), device=device)
    draws_as_the_naive_loop(model, cfg, how)


@torch.no_grad()
def test_the_step_draws_what_the_naive_loop_draws(device):
    """With guidance, in slots that are refilled, and with some of the images given whole."""
    model = tiny(8, (4, 2), V=5, classes=("a", "b"), device=device)
    label = torch.tensor([0, 1, 1, -1, 0], device=device)
    draws_as_the_naive_loop(model, 1.0, dict(slots=5))
    other = generate(model, label, seed=1)
    given = [torch.where((label == 1)[:, None], each, -1) for each in other]
    naive = draws_as_the_naive_loop(model, 2.5, dict(slots=2, given=given))
    for i in (1, 2):
        assert [p for p, _ in naive[i]] == other[0][i, :len(naive[i])].tolist()


def draws_as_the_naive_loop(model, cfg, how):
    options, device = SampleOptions(temperature=2.0, top_k=4, top_p=0.95, cfg=cfg), model.order.weight.device
    label = torch.tensor([0, 1, 1, -1, 0], device=device)
    pos, code = generate(model, label, options, seed=7, first=10, **how)
    naive = naive_generate(model, label, options, seed=7, first=10, given=how.get("given"))
    if model.layout.n_grains > 1:
        assert len({len(pairs) for pairs in naive}) > 1                      # they end at different steps
    for i, pairs in enumerate(naive):
        n = len(pairs)
        assert pos[i, :n].tolist() == [p for p, _ in pairs] and code[i, :n].tolist() == [c for _, c in pairs]
        assert (pos[i, n:] == model.layout.end).all() and (code[i, n:] == -1).all()
    return naive


@torch.no_grad()
def test_an_image_does_not_see_its_batch_mates(device):
    model = tiny(8, (4, 2), V=5, device=device)
    h, H = 2, 4
    fine, coarse = torch.ones(1, h, h, dtype=torch.long), torch.zeros(1, h, h, dtype=torch.long)
    codes = torch.randint(0, 5, (1, h, h)).repeat_interleave(2, 1).repeat_interleave(2, 2)
    alone = [t[:, :6] for t in model.layout.pack(codes.to(device), coarse.to(device))]     # 4 codes, 2 EOS
    codes, grains = torch.cat([codes, torch.randint(0, 5, (1, H, H))]), torch.cat([coarse, fine])
    both = model.layout.pack(codes.to(device), grains.to(device))
    for a, b in zip(model.logits(*alone), model.logits(*both)):
        torch.testing.assert_close(a[0], b[0, :6], atol=1e-5, rtol=1e-5)
    for name in ("position", "content"):
        torch.testing.assert_close(model(*alone)[name][0], model(*both)[name][0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_sampled_frequencies_match_exact_probabilities(device):
    model = tiny(size=2, factors=(2, 1), device=device)                      # one region: 2 + 16 images
    codes, grains = all_images(model.layout, 2)
    pos, code = model.layout.pack(codes.to(device), grains.to(device))
    losses = model(pos, code)
    p = (-(losses["position"] + losses["content"])).double().exp()
    n = 20_000
    (spos, scode), _ = sample_of(model, n)
    same = ((spos[:, None] == pos) & (scode[:, None] == code)).all(-1)       # n, 18
    assert (same.sum(1) == 1).all()
    chi2 = ((same.sum(0) - n * p).square() / (n * p)).sum().item()
    assert chi2 < 40.8                                                       # 99.9 % quantile for 17 degrees of freedom


@torch.no_grad()
def test_forced_positions_and_padding_cost_nothing(device):
    model = tiny(8, (4,), V=5, device=device)                                # K = 1: every position is forced
    coarse = torch.zeros(3, 2, 2, dtype=torch.long, device=device)
    pos, code = model.layout.pack(torch.randint(0, 5, (3, 2, 2), device=device), coarse)
    assert (model(pos, code)["position"] == 0).all()
    model = tiny(8, (4, 2), V=5, device=device)                              # all coarse: 6 pairs, then padding
    codes = dq.upsample(torch.randint(0, 5, (3, 1, 2, 2)).float(), 4)[:, 0].long()
    pos, code = model.layout.pack(codes.to(device), coarse)
    assert pos.shape[1] == 18 and (pos[:, 5:] == model.layout.end).all()
    for name in ("position", "content"):
        assert torch.allclose(model(pos, code)[name], model(pos[:, :6], code[:, :6])[name], atol=1e-5)


@torch.no_grad()
def test_label_dropout_hides_labels_in_training_only(device):
    model = tiny(8, (4, 2), V=5, classes=("a", "b"), label_dropout=0.5, device=device)
    (pos, code), label = sample_of(model, 32)
    labelled, unlabelled = (model.logits(pos, code, y)[1] for y in (label, None))
    model.train()
    trained = model.logits(pos, code, label)[1]
    is_labelled = torch.isclose(trained, labelled, atol=1e-4).flatten(1).all(1)
    is_unlabelled = torch.isclose(trained, unlabelled, atol=1e-4).flatten(1).all(1)
    assert (is_labelled ^ is_unlabelled).all() and 4 < is_labelled.sum() < 28


def naive_filter(row, top_k, top_p):
    order = sorted(range(len(row)), key=lambda i: -row[i])
    if top_k:
        order = order[:top_k]
    weights = [math.exp(row[i]) for i in order]
    kept, mass = [], 0.0
    for i, w in zip(order, weights):
        if kept and mass >= top_p:
            break
        kept.append(i)
        mass += w / sum(weights)
    return set(kept)


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (3, 1.0), (0, 0.6), (5, 0.5), (1, 1.0), (99, 1e-6)])
def test_top_k_and_top_p_equal_a_loop(top_k, top_p):
    logits = torch.randn(20, 11) * 2
    kept = dq.filter_logits(logits, top_k, top_p) > -math.inf
    for row, mask in zip(logits.tolist(), kept):
        assert set(mask.nonzero().flatten().tolist()) == naive_filter(row, top_k, top_p)


@torch.no_grad()
def test_low_temperature_leaves_nothing_to_chance(device):
    model = tiny(8, (4, 2), V=5, classes=("a", "b"), device=device)
    (pos, code), _ = sample_of(model, 8, options=SampleOptions(temperature=1e-4))
    (pos2, code2), _ = sample_of(model, 8, seed=99, options=SampleOptions(temperature=1e-4))
    assert torch.equal(pos, pos2) and torch.equal(code, code2)               # the same whatever the noise


def test_a_seed_fixes_the_images_and_another_changes_them(device):
    model = tiny(8, (4, 2), V=5, device=device)
    (a, ca), _ = sample_of(model, 8)
    (b, cb), _ = sample_of(model, 8)
    (_, cc), _ = sample_of(model, 8, seed=4)
    assert torch.equal(a, b) and torch.equal(ca, cb) and not torch.equal(ca, cc)


def test_an_image_depends_on_its_number_alone(device):
    model = tiny(8, (4, 2), V=5, classes=("a", "b"), device=device)
    label = torch.arange(40, device=device) % 2
    pos, code = generate(model, label, seed=5)
    for slots in (1, 7, 64):
        again = generate(model, label, seed=5, slots=slots)
        assert torch.equal(again[0], pos) and torch.equal(again[1], code)
    tail = generate(model, label[30:], seed=5, first=30)
    assert torch.equal(tail[0], pos[30:]) and torch.equal(tail[1], code[30:])


def test_refilled_slots_cost_the_mean_length(device, monkeypatch):
    """Steps of a large job: within 15 % of (sum of lengths) / slots, though lengths vary from 9 to 18 pairs."""
    model = tiny(8, (4, 2), V=5, device=device)
    calls, real = [], dq.decode_one
    monkeypatch.setattr(dq, "decode_one", lambda *args: (calls.append(1), real(*args))[1])
    pos, code = generate(model, torch.full((256,), -1, device=device), SampleOptions(temperature=3.0), slots=16)
    length = lengths(model.layout, pos)
    if device.type == "cpu":
        assert length.min() <= 9 and length.max() >= 17
        assert len(calls) <= 1.15 * int(length.sum()) / 16


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str)
@pytest.mark.parametrize("shape", [(1,), (2, 1), (3, 3), (200,)], ids=str)
@pytest.mark.parametrize("n_out", [6, 7])                                    # 7 can't be cut in two
def test_linear_equals_sums(n_out, shape, dtype, tolerance, device):
    """With few rows and many, with and without a sum to add to, with and without a gradient."""
    linear = dq.Linear(24, n_out).to(device, dtype)
    x, residual = (torch.randn(*shape, n, device=device, dtype=dtype) for n in (24, n_out))
    naive = (x.double()[..., None, :] * linear.weight.double()).sum(-1)
    for gradient in (False, True):
        with torch.set_grad_enabled(gradient):
            for got, wanted in ((linear(x), naive), (linear(x, residual), naive + residual.double())):
                assert got.shape == (*shape, n_out)
                torch.testing.assert_close(got.double(), wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("cfg", [1.0, 2.5])
def test_bfloat16_matrices_draw_nearly_the_same(cfg, device):
    """Most images come out whole as in float32; by chance none would."""
    model, options = tiny(8, (4, 2), V=5, classes=("a", "b"), device=device), SampleOptions(cfg=cfg)
    label = torch.arange(64, device=device) % 2
    a, b = (torch.cat(generate(model, label, options, seed=1, slots=8, dtype=dtype), dim=1)
            for dtype in (None, torch.bfloat16))
    same = (a == b).all(dim=1).float().mean()
    assert 0.7 < same < 1                                                    # 1: nothing was computed in bfloat16


class FakeCuda:
    """What `generate` asks of torch.cuda to capture steps and replay them, with the device's queue played by the CPU.

    As on a GPU, a step that is being captured does nothing but be recorded, with the tensors that it was given.
    """

    def __init__(self, monkeypatch):
        self.capturing, self.counts, real = None, dict(captured=0, replayed=0, direct=0), dq.decode_one

        def decode_one(*args):
            if self.capturing is None:
                self.counts["direct"] += 1
                return real(*args)
            self.capturing.step = lambda: real(*args)

        class Graph:
            def replay(graph):
                self.counts["replayed"] += 1
                graph.step()

        @contextlib.contextmanager
        def capture(graph, pool, stream):
            assert pool == "pool" and stream == "stream"                     # one for all
            self.capturing = graph
            yield
            self.capturing = None
            self.counts["captured"] += 1
        monkeypatch.setattr(dq, "decode_one", decode_one)
        fakes = dict(CUDAGraph=Graph, graph=capture, Stream=lambda device: "stream", graph_pool_handle=lambda: "pool")
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)


@pytest.mark.parametrize("cfg", [1.0, 2.5])
@torch.no_grad()
def test_the_captured_path_draws_the_same(cfg, monkeypatch):
    """Each size of the cache is captured when it is first needed; all other steps are replays."""
    model = tiny(8, (4, 2, 1), V=5, classes=("a", "b"))
    label, options = torch.arange(9) % 2, SampleOptions(temperature=2.0, cfg=cfg)
    given = [torch.where(torch.rand(len(label), 1) < 0.5, t, -1)             # some images whole
             for t in generate(model, label, options, seed=1)]
    for extra in (dict(), dict(given=given)):
        pos, code = generate(model, label, options, seed=7, slots=2, **extra)
        with monkeypatch.context() as patch:
            cuda = FakeCuda(patch)
            again = generate(model, label, options, seed=7, slots=2, graphs=True, bucket=16, look_every=4, **extra)
        assert torch.equal(again[0], pos) and torch.equal(again[1], code)
        length = lengths(model.layout, pos)
        assert cuda.counts["captured"] == cuda.counts["direct"] == -(-int(length.max()) // 16)
        steps = cuda.counts["replayed"] + cuda.counts["direct"]
        assert int(length.sum()) / 2 <= steps <= (int(length.sum()) + int(length.max())) / 2 + 4 + 1


def test_a_small_job_captures_no_more_than_it_needs(monkeypatch):
    model = tiny(8, (4, 2, 1), V=5)
    coarse = torch.zeros(3, 2, 2, dtype=torch.long)                          # 4 codes and 3 EOS ids
    cuda = FakeCuda(monkeypatch)
    generate(model, torch.full((3,), -1), given=given_tiling(model.layout, coarse), graphs=True, bucket=8, look_every=1)
    assert cuda.counts == dict(captured=1, direct=1, replayed=6)


@pytest.mark.parametrize("cfg", [1.0, 2.5])
def test_the_step_is_one_graph_for_the_compiler(cfg, monkeypatch):
    """torch.compile finds no break in a step, and draws the same (without a compiler: the capture could go wrong)."""
    torch._dynamo.reset()
    model = tiny(8, (4, 2), V=5, classes=("a", "b"))
    options = SampleOptions(temperature=2.0, top_k=4, top_p=0.9, cfg=cfg)
    label, real = torch.arange(5) % 2, torch.compile
    wanted = generate(model, label, options, seed=7, slots=2, bucket=64)
    monkeypatch.setattr(torch, "compile", lambda step: real(step, fullgraph=True, backend="eager"))
    compiled = generate(model, label, options, seed=7, slots=2, bucket=64, compile=True)
    assert torch.equal(compiled[0], wanted[0]) and torch.equal(compiled[1], wanted[1])


@pytest.mark.parametrize("seed", [1, 2 ** 62, 2 ** 64 - 1])
def test_any_seed_has_images_of_its_own(seed, device):
    model = tiny(8, (4, 2), V=5, device=device)
    (_, zero), _ = sample_of(model, 8, seed=0)
    (_, other), _ = sample_of(model, 8, seed=seed)
    assert not torch.equal(zero, other)


def test_draws_follow_the_distribution():
    """u over a fine grid: each entry gets its probability. Ends of the range; what has none is never drawn."""
    logits = torch.tensor([-math.inf, 0.3, -math.inf, 1.2, -0.5, -math.inf])
    n = 100_000
    drawn = dq.draw(logits.expand(n, -1), (torch.arange(n) + 0.5) / n)
    torch.testing.assert_close(torch.bincount(drawn, minlength=6) / n, logits.softmax(0), atol=2e-5, rtol=0)
    assert (drawn.diff() >= 0).all()
    for logits in torch.randn(50, 40).masked_fill(torch.rand(50, 40) < 0.7, -math.inf):
        logits[17] = 0.1
        ends = dq.draw(logits.expand(3, -1), torch.tensor([2.0 ** -24, 0.5, 1.0]))
        possible = logits.isfinite().nonzero().flatten()
        assert ends[0] == possible[0] and ends[2] == possible[-1]


def test_given_tilings_and_given_codes_are_kept(device):
    model = tiny(8, (4, 2, 1), V=5, device=device)
    layout = model.layout
    wanted = torch.randint(0, 3, (6, 2, 2), device=device)
    (pos, code), _ = sample_of(model, 6, given=given_tiling(layout, wanted))
    codes, grains = layout.unpack(pos, code)
    assert torch.equal(grains, wanted) and (codes >= 0).all()
    for keep in range(4):
        (pos2, code2), _ = sample_of(model, 6, seed=8, given=given_coarse(layout, codes, grains, keep))
        codes2, grains2 = layout.unpack(pos2, code2)
        kept = grains < keep
        assert torch.equal(grains2[kept], grains[kept]) and (grains2[~kept] >= keep).all()
        cells = dq.upsample(kept[:, None].float(), layout.fine_side)[:, 0] > 0
        assert torch.equal(codes2[cells], codes[cells])


def test_options_out_of_range_are_refused():
    for bad in (dict(temperature=0.0), dict(top_p=0.0), dict(top_p=1.1), dict(top_k=-1), dict(cfg=-1.0)):
        with pytest.raises(ValueError):
            SampleOptions(**bad).check()


def test_checkpoints_of_other_orders_are_refused(run, tmp_path):
    """Those of before, which say nothing of their order, and those of tests/ablations.py: in one line, by whatever
    reads them; the files stay as they are."""
    held, out = dq.load_checkpoint(run / "transformer.pt", "dq-transformer"), tmp_path / "out"
    assert held["layout"] == "coarse to fine, row by row"
    shutil.copytree(run, out)
    for layout, told in ((None, "of an older version"), ("fine to coarse", "fine to coarse")):
        torch.save({name: x for name, x in held.items() if name != "layout"} | ({"layout": layout} if layout else {}),
                   out / "transformer.pt")
        before = {path: path.read_bytes() for path in out.iterdir()}
        line = (f"error: {out / 'transformer.pt'} was trained on sequences in another order ({told}) than is read here "
                "(coarse to fine, row by row); train_transformer.py trains a new one")
        assert call(sample.main, out / "transformer.pt") == line
        assert call(train_transformer.main, "--out", out, "--resume", *TRANSFORMER) == line
        assert {path: path.read_bytes() for path in out.iterdir()} == before
