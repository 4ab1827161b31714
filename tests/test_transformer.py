"""DQTransformer and its sampler: a proper distribution over tilings, the same with and without the cache."""
import contextlib
import itertools
import math
import types
import weakref

import pytest
import torch

import dq
from dq import DQTransformer, SampleOptions, TransformerConfig, generate


def tiny(size=4, factors=(2, 1), V=2, classes=(), device="cpu", **kwargs):
    """A random model with opinions: weights far from the nearly uniform initialisation."""
    torch.manual_seed(1)
    config = TransformerConfig(size=size, factors=factors, codebook_size=V, classes=classes, width=32, heads=2,
                               position_layers=2, content_layers=2, **kwargs)
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
    model = tiny(device=device)
    codes, grains = all_images(model.layout, 2)
    assert len(codes) == 18 ** 4 == 104_976
    total = 0.0
    for c, g in zip(codes.split(8192), grains.split(8192)):
        losses = model(*model.layout.pack(c.to(device), g.to(device)))
        total += (-(losses["position"] + losses["content"])).double().exp().sum().item()
    assert abs(total - 1) < 1e-4


def sample_of(model, B, seed=3, **kwargs):
    label = torch.arange(B, device=model.content.weight.device) % max(1, len(model.config.classes))
    return generate(model, label if model.config.classes else torch.full_like(label, -1), seed=seed, **kwargs), label


def naive_generate(model, label, options, seed, first=0, given=None):
    """One image after the other; every step runs the model on the whole sequence so far. -> lists of pairs"""
    layout, config, device, images = model.layout, model.config, label.device, []
    for i, y in enumerate(label.tolist()):
        pairs = []
        while not pairs or pairs[-1][0] != layout.end:
            t = len(pairs)
            noise = dq.gumbel_noise(dq.noise_keys(seed, torch.tensor([first + i], device=device), t + 1)[:, t], dq.noise_entries(layout.n_positions + config.codebook_size, device))[0].cpu()

            def logits(which, position):
                """Of step t, guided: which = 0 for the position, 1 for the content, given the position."""
                sequence = torch.tensor([pairs + [[position, -1]]], device=device)
                both = [model.logits(sequence[..., 0], sequence[..., 1], torch.tensor([each], device=device))[which][0, t].cpu() for each in (y, -1)]
                guided = both[1] + options.cfg * (both[0] - both[1]) if options.cfg != 1 and config.classes else both[0]
                return guided / options.temperature

            covered = torch.full((1, layout.n_regions), -1)                  # the rules, on what is there already
            for p, _ in pairs:
                if layout.region[p] >= 0:
                    covered[0, layout.region[p]] = layout.grain[p]
            legal = layout.legal(torch.tensor([pairs[-1][0] if pairs else -1], device=device), covered.to(device))[0].cpu()
            free = {p: float(logits(0, p)[p] + noise[p]) for p in legal.nonzero().flatten().tolist()}
            p = max(free, key=free.get)
            if given is not None and given[0][i, t] >= 0:
                p = int(given[0][i, t])
            content = logits(1, p)
            kept = naive_filter(content.tolist(), options.top_k, options.top_p)
            c = max(kept, key=lambda v: float(content[v] + noise[layout.n_positions + v]))
            if given is not None and given[1][i, t] >= 0:
                c = int(given[1][i, t])
            pairs.append([p, -1 if layout.is_eos[p] else c])
        images.append(pairs)
    return images


@pytest.mark.parametrize("how", [dict(), dict(slots=2, bucket=2), dict(slots=3, bucket=8, look_every=4), dict(slots=2, bucket=64, look_every=32)], ids=str)
@pytest.mark.parametrize("cfg", [1.0, 2.5])
@pytest.mark.parametrize("size, factors", [(8, (4,)), (8, (4, 2)), (8, (4, 2, 1))])
@torch.no_grad()
def test_the_fused_loop_draws_what_the_naive_loop_draws(size, factors, cfg, how, device):
    """Code by code: in one batch or in few slots that are refilled, over many windows of the cache or a single one."""
    model = tiny(size, factors, V=5, classes=("a", "b"), device=device)
    options, label = SampleOptions(temperature=2.0, top_k=4, top_p=0.95, cfg=cfg), torch.tensor([0, 1, 1, -1, 0], device=device)
    pos, code = generate(model, label, options, seed=7, first=10, **how)
    naive = naive_generate(model, label, options, seed=7, first=10)
    if len(factors) > 1:
        assert len({len(pairs) for pairs in naive}) > 1                      # they end at different steps
    for i, pairs in enumerate(naive):
        n = len(pairs)
        assert pos[i, :n].tolist() == [p for p, _ in pairs] and code[i, :n].tolist() == [c for _, c in pairs]
        assert (pos[i, n:] == model.layout.end).all() and (code[i, n:] == -1).all()


@torch.no_grad()
def test_an_image_does_not_see_its_batch_mates(device):
    model = tiny(8, (4, 2), V=5, device=device)
    h, H = 2, 4
    fine, coarse = torch.ones(1, h, h, dtype=torch.long), torch.zeros(1, h, h, dtype=torch.long)
    codes = torch.randint(0, 5, (1, h, h)).repeat_interleave(2, 1).repeat_interleave(2, 2)
    alone = [t[:, :6] for t in model.layout.pack(codes.to(device), coarse.to(device))]     # 4 codes, 2 EOS
    both = model.layout.pack(torch.cat([codes, torch.randint(0, 5, (1, H, H))]).to(device), torch.cat([coarse, fine]).to(device))
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
    pos, code = model.layout.pack(dq.upsample(torch.randint(0, 5, (3, 1, 2, 2)).float(), 4)[:, 0].long().to(device), coarse)
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
    lengths = model.layout.length(model.layout.unpack(pos, code)[1])
    if device.type == "cpu":
        assert lengths.min() <= 9 and lengths.max() >= 17
        assert len(calls) <= 1.15 * int(lengths.sum()) / 16


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 9])
@torch.inference_mode()
def test_products_with_few_rows_equal_sums(rows, dtype, tolerance, device):
    x = torch.randn(rows, 24, device=device)
    for out in (6, 7):                                                       # 7 rows of weights can't be cut in two
        weight = torch.randn(out, 24, device=device) / 24 ** 0.5
        naive = (x.double()[:, None] * weight.double()).sum(-1)
        gelu = naive * 0.5 * (1 + torch.erf(naive / 2 ** 0.5))
        for wanted, activate in ((naive, False), (gelu, True)):
            got = dq.few_rows(weight, dtype, rows, activate)(x)
            assert got.shape == (rows, out) and got.is_contiguous()
            torch.testing.assert_close(got.double(), wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("cfg", [1.0, 2.5])
def test_bfloat16_matrices_draw_nearly_the_same(cfg, device):
    """Most images come out whole as in float32; by chance none would."""
    model, label, options = tiny(8, (4, 2), V=5, classes=("a", "b"), device=device), torch.arange(64, device=device) % 2, SampleOptions(cfg=cfg)
    a, b = (torch.cat(generate(model, label, options, seed=1, slots=8, dtype=dtype), dim=1) for dtype in (None, torch.bfloat16))
    same = (a == b).all(dim=1).float().mean()
    assert 0.8 < same < 1                                                    # 1: nothing was computed in bfloat16


class FakeCuda:
    """What `generate` asks of torch.cuda to capture steps and replay them, with the device's queue played by the CPU.

    As on a GPU, a step that is being captured does nothing but be recorded, with the tensors that it was given; and
    a graph doesn't keep those of its window alive.
    """

    def __init__(self, monkeypatch):
        self.capturing, self.counts, real = None, dict(captured=0, replayed=0, direct=0), dq.decode_one

        def decode_one(model, job, state, window):
            if self.capturing is None:
                self.counts["direct"] += 1
                return real(model, job, state, window)
            bias, slot, rest = weakref.ref(window.bias), weakref.ref(window.slot), window._replace(bias=None, slot=None)
            self.capturing.steps.append(lambda: real(model, job, state, rest._replace(bias=bias(), slot=slot())))

        class Graph:
            def __init__(graph):
                graph.steps = []

            def replay(graph):
                self.counts["replayed"] += 1
                for step in graph.steps:
                    step()

        @contextlib.contextmanager
        def capture(graph):
            self.capturing = graph
            yield
            self.capturing = None
            self.counts["captured"] += 1
        event = types.SimpleNamespace(synchronize=lambda: None)
        stream = types.SimpleNamespace(wait_stream=lambda other: None, record_event=lambda: event)
        monkeypatch.setattr(dq, "decode_one", decode_one)
        for name, fake in dict(CUDAGraph=Graph, graph=capture, Stream=lambda: stream, current_stream=lambda: stream,
                               stream=lambda s: contextlib.nullcontext()).items():
            monkeypatch.setattr(torch.cuda, name, fake)


@pytest.mark.parametrize("cfg", [1.0, 2.5])
@torch.no_grad()
def test_the_captured_path_draws_the_same(cfg, monkeypatch):
    """Capture in front of the first step, its warm-ups undone, replays only from then on, looks that come late."""
    model = tiny(8, (4, 2, 1), V=5, classes=("a", "b"))
    label, options = torch.arange(9) % 2, SampleOptions(temperature=2.0, cfg=cfg)
    given = [torch.where(torch.rand(len(label), 1) < 0.5, t, -1) for t in generate(model, label, options, seed=1)]  # some images whole
    for extra in (dict(), dict(given=given)):
        pos, code = generate(model, label, options, seed=7, slots=2, **extra)
        with monkeypatch.context() as patch:
            cuda = FakeCuda(patch)
            again = generate(model, label, options, seed=7, slots=2, graphs=True, bucket=16, look_every=4, **extra)
        assert torch.equal(again[0], pos) and torch.equal(again[1], code)
        sizes = -(-model.layout.max_len // 16)
        assert cuda.counts["captured"] == cuda.counts["direct"] == sizes     # one warm-up each, and nothing outside a graph
        lengths = model.layout.length(model.layout.unpack(pos, code)[1])
        assert int(lengths.sum()) / 2 <= cuda.counts["replayed"] <= (int(lengths.sum()) + int(lengths.max())) / 2 + 2 * 4 + 1


def test_noise_is_gumbel_and_independent():
    image, t = torch.arange(200), torch.arange(200) % 7

    def noise(seed, t):
        return dq.gumbel_noise(dq.noise_keys(seed, image, 8)[image, t], dq.noise_entries(500)).double()
    x = noise(3, t)
    assert x.shape == (200, 500) and torch.isfinite(x).all()
    uniform = torch.exp(-torch.exp(-x)).flatten().sort().values              # the distribution function makes it uniform
    assert (uniform - torch.linspace(0, 1, len(uniform), dtype=torch.double)).abs().max() < 1.95 / len(uniform) ** 0.5  # Kolmogorov, 99.9 %
    assert abs(x.mean() - 0.5772) < 0.02 and abs(x.var() - math.pi ** 2 / 6) < 0.05
    for a, b in ((x[:, :-1], x[:, 1:]), (x[:-1], x[1:]), (x, noise(4, t)), (x, noise(3, t + 1)), (x, noise(3 + (1 << 40), t)), (x, x.flip(1))):
        r = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert abs(r) < 4 / a.numel() ** 0.5
    row = dq.gumbel_noise(dq.noise_keys(3, torch.tensor([17]), 8)[:, t[17]], dq.noise_entries(500))[0]
    assert torch.equal(row.double(), x[17])                                  # whatever else is in the batch


def test_the_extremes_of_the_noise_are_finite():
    """The mapping of any 32 bits into (0, 1), at both ends."""
    ends = torch.tensor([-2 ** 31, -1, 0, 2 ** 31 - 1], dtype=torch.int32)
    uniform = ((ends >> 9).float() + (2 ** 22 + 0.5)) / 2 ** 23
    assert 0 < uniform[0] < uniform[1] < uniform[2] < uniform[3] < 1


def test_given_tilings_and_given_codes_are_kept(device):
    model = tiny(8, (4, 2, 1), V=5, device=device)
    layout = model.layout
    wanted = torch.randint(0, 3, (6, 2, 2), device=device)
    (pos, code), _ = sample_of(model, 6, given=dq.given_tiling(layout, wanted))
    codes, grains = layout.unpack(pos, code)
    assert torch.equal(grains, wanted) and (codes >= 0).all()
    for keep in range(4):
        (pos2, code2), _ = sample_of(model, 6, seed=8, given=dq.given_coarse(layout, codes, grains, keep))
        codes2, grains2 = layout.unpack(pos2, code2)
        kept = grains < keep
        assert torch.equal(grains2[kept], grains[kept]) and (grains2[~kept] >= keep).all()
        cells = dq.upsample(kept[:, None].float(), layout.fine_side)[:, 0] > 0
        assert torch.equal(codes2[cells], codes[cells])


def test_options_out_of_range_are_refused():
    for bad in (dict(temperature=0.0), dict(top_p=0.0), dict(top_p=1.1), dict(top_k=-1), dict(cfg=-1.0)):
        with pytest.raises(ValueError):
            SampleOptions(**bad).check()
