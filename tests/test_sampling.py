"""Sampling, section 7 of dq.py: with a KV cache and continuous batching, the naive loop's images come out.

    SampleOptions.check    test_options_out_of_range_are_refused
    filter_logits          test_top_k_and_top_p_equal_a_loop
    draw                   test_draws_follow_the_distribution
    start                  test_an_image_depends_on_its_number_alone, test_any_seed_has_images_of_its_own
    decode_one, write      test_the_step_draws_what_the_naive_loop_draws,
                           test_sampled_frequencies_match_exact_probabilities,
                           test_given_tilings_and_given_codes_are_kept;
                           no synchronisation with a GPU: tools/test_fake_gpu.py
    generate_one           test_the_simple_sampler_generates_the_same
    check_given            test_given_positions_that_are_no_valid_prefix_are_refused,
                           test_given_contents_outside_the_codebook_are_refused
    generate               test_the_fused_loop_draws_what_the_naive_loop_draws,
                           test_refilled_slots_cost_the_mean_length,
                           test_guidance_costs_nothing_where_there_are_no_classes
      CUDA graphs          test_the_captured_path_draws_the_same, test_a_small_job_captures_no_more_than_it_needs
      compile, dtype       test_the_step_is_one_graph_for_the_compiler, test_bfloat16_matrices_draw_nearly_the_same
"""
import contextlib
import math

import pytest
import torch

import dq
import naive
from dq import SampleOptions, generate
from sample import given_coarse, given_tiling
from test_transformer import all_images, tiny


def sample_of(model, B, seed=3, **kwargs):
    label = torch.arange(B, device=model.content.weight.device) % max(1, len(model.config.classes))
    return generate(model, label if model.config.classes else torch.full_like(label, -1), seed=seed, **kwargs), label


def test_options_out_of_range_are_refused():
    for bad in (dict(temperature=0.0), dict(temperature=1e-38), dict(top_p=0.0), dict(top_p=1.1), dict(top_k=-1),
                dict(cfg=-1.0), dict(cfg=1e38)):                             # 1e38 / 1e-38 would overflow
        with pytest.raises(dq.UserError):
            SampleOptions(**bad).check()
    for fine in (dict(top_p=1.0), dict(top_k=0), dict(cfg=0.0), dict(temperature=1e-6)):
        SampleOptions(**fine).check()


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (3, 1.0), (0, 0.6), (5, 0.5), (1, 1.0), (99, 1e-6)])
def test_top_k_and_top_p_equal_a_loop(top_k, top_p):
    logits = torch.randn(20, 11) * 2
    kept = dq.filter_logits(logits, top_k, top_p) > -math.inf
    for row, mask in zip(logits.tolist(), kept):
        ours, target = set(mask.nonzero().flatten().tolist()), naive.filter_logits(row, top_k, top_p)
        assert ours >= target, f"an entry is dropped that top_k = {top_k}, top_p = {top_p} keeps"
        assert ours <= target, f"an entry is kept that top_k = {top_k}, top_p = {top_p} drops"


def test_draws_follow_the_distribution():
    """Over a fine grid of u, each entry gets its probability. At both ends of the range, possible entries are drawn."""
    logits = torch.tensor([-math.inf, 0.3, -math.inf, 1.2, -0.5, -math.inf])
    n = 100_000
    drawn = dq.draw(logits.expand(n, -1), (torch.arange(n) + 0.5) / n)
    torch.testing.assert_close(torch.bincount(drawn, minlength=6) / n, logits.softmax(0), atol=2e-5, rtol=0,
                               msg=lambda why: f"over a fine grid of u, a frequency is not the probability: {why}")
    assert (drawn.diff() >= 0).all(), "a larger u must not draw an entry that comes earlier"
    for logits in torch.randn(50, 40).masked_fill(torch.rand(50, 40) < 0.7, -math.inf):
        logits[17] = 0.1
        ends = dq.draw(logits.expand(3, -1), torch.tensor([2.0 ** -24, 0.5, 1.0]))
        possible = logits.isfinite().nonzero().flatten()
        assert ends[0] == possible[0], "the smallest u does not draw the first possible entry"
        assert ends[2] == possible[-1], "u = 1 does not draw the last possible entry"
        u = 1 - torch.rand(1)
        one = naive.draw({i: float(logits[i]) for i in possible.tolist()}, float(u))
        assert dq.draw(logits[None], u) == one, "not the first entry whose cumulative probability reaches u"


# in one batch or in a few slots that are refilled; with a cache that grows often, or with a single size
HOW = [dict(), dict(slots=2, bucket=2), dict(slots=3, bucket=8, sync_every=4), dict(slots=2, bucket=64, sync_every=32)]


@pytest.mark.parametrize("size, factors, cfg", [(8, (4,), 1.0), (8, (4,), 2.5), (8, (4, 2), 1.0), (8, (4, 2, 1), 2.5)])
@torch.no_grad()
def test_the_fused_loop_draws_what_the_naive_loop_draws(size, factors, cfg, device):
    model = tiny(size, factors, V=5, classes=("a", "b"), device=device)
    draws_as_the_naive_loop(model, cfg, *HOW)


@torch.no_grad()
def test_the_step_draws_what_the_naive_loop_draws(device):
    """With guidance, with slots that are refilled, and with some of the images completely given."""
    model = tiny(8, (4, 2), V=5, classes=("a", "b"), device=device)
    draws_as_the_naive_loop(model, 1.0, dict(slots=5))
    label = torch.tensor([0, 1, 1, -1, 0], device=device)
    other = generate(model, label, seed=1)
    given = [torch.where((label == 1)[:, None], each, -1) for each in other]
    drawn = draws_as_the_naive_loop(model, 2.5, dict(slots=2), given=given)
    for i in (1, 2):
        kept = [p for p, _ in drawn[i]] == other[0][i, :len(drawn[i])].tolist()
        assert kept, "positions that were given are sampled again"


def draws_as_the_naive_loop(model, cfg, *ways, labels=(0, 1, 1, -1, 0), given=None):
    """Compare pair by pair with the naive loop, for each of several ways to call `generate`."""
    options, device = SampleOptions(temperature=2.0, top_k=4, top_p=0.95, cfg=cfg), model.order.weight.device
    images = naive.generate(model, labels, options, seed=7, first=10, given=given)
    if model.layout.n_grains > 1:
        assert len({len(pairs) for pairs in images}) > 1, "all images end at the same step"
    for how in ways:
        pos, code = generate(model, torch.tensor(labels, device=device), options, seed=7, first=10, given=given, **how)
        for i, pairs in enumerate(images):
            n = len(pairs)
            case = f"image {i}, guidance {cfg}, {'some' if given else 'no'} images given, generate({how})"
            target_pos, target_code = map(list, zip(*pairs))
            assert pos[i, :n].tolist() == target_pos, f"positions differ from those of the naive loop: {case}"
            assert code[i, :n].tolist() == target_code, f"positions are right, but contents are not: {case}"
            rest = (pos[i, n:] == model.layout.end).all() and (code[i, n:] == -1).all()
            assert rest, f"the sequence is not padded after the last EOS: {case}"
    return images


@torch.no_grad()
def test_sampled_frequencies_match_exact_probabilities(device):
    model = tiny(size=2, factors=(2, 1), layers=1, device=device)            # one region: 2 + 16 images
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
def test_low_temperature_leaves_nothing_to_chance(device):
    model = tiny(8, (4, 2), V=5, classes=("a", "b"), device=device)
    (pos, code), _ = sample_of(model, 8, options=SampleOptions(temperature=1e-4))
    (pos2, code2), _ = sample_of(model, 8, seed=99, options=SampleOptions(temperature=1e-4))
    assert torch.equal(pos, pos2) and torch.equal(code, code2)               # whatever the seed


def test_a_seed_fixes_the_images_and_another_changes_them(device):
    model = tiny(8, (4, 2), V=5, device=device)
    (a, ca), _ = sample_of(model, 8)
    (b, cb), _ = sample_of(model, 8)
    (_, cc), _ = sample_of(model, 8, seed=4)
    assert torch.equal(a, b) and torch.equal(ca, cb) and not torch.equal(ca, cc)


@pytest.mark.parametrize("seed", [1, 2 ** 62, 2 ** 64 - 1])
def test_any_seed_has_images_of_its_own(seed, device):
    model = tiny(8, (4, 2), V=5, device=device)
    (_, zero), _ = sample_of(model, 8, seed=0)
    (_, other), _ = sample_of(model, 8, seed=seed)
    assert not torch.equal(zero, other)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_no_other_seed_has_the_same_draws(number):
    """Seeds and image indices are 32-bit words. No word may be mistaken for another."""
    uniform = {seed: dq.numpy_rng(seed, number).random(4).tolist() for seed in (0, number << 32, number)}
    others = [dq.numpy_rng(number << 32, 0), dq.numpy_rng(0, number << 32), dq.numpy_rng(number, 0)]
    draws = [*uniform.values(), *(each.random(4).tolist() for each in others)]
    assert len({tuple(each) for each in draws}) == len(draws)


def test_no_image_is_drawn_for_no_label(device):
    pos, code = generate(tiny(8, (4, 2), V=5, device=device), torch.zeros(0, dtype=torch.long, device=device))
    assert pos.shape == code.shape == (0, 18)


def test_what_can_not_be_drawn_is_refused(device):
    model = tiny(8, (4, 2), V=5, classes=("a", "b"), device=device)
    for label, classes in ((2, ("a", "b")), (-2, ("a", "b")), (1, ())):      # -2 would be the last class
        with pytest.raises(dq.UserError, match=rf"labels must be in \[-1, {max(0, len(classes) - 1)}\]"):
            generate(tiny(8, (4, 2), V=5, classes=classes, device=device), torch.tensor([0, label], device=device))
    for bad in (dict(cfg=float("inf")), dict(cfg=float("nan")), dict(temperature=float("inf")), dict(top_p=0.0)):
        with pytest.raises(dq.UserError):
            generate(model, torch.tensor([0], device=device), SampleOptions(**bad))


@pytest.mark.parametrize("row, column, value, why", [
    (1, 2, -1, "prefix of a valid sequence"),  # a position that is sampled, before one that is given
    (0, 0, 3, "prefix of a valid sequence"),  # a coarse code twice
    (1, 1, 0, "prefix of a valid sequence"),  # out of order
    (0, 0, 22, "below 22"), (1, 0, -2, "below 22")])
def test_given_positions_that_are_no_valid_prefix_are_refused(row, column, value, why, device):
    model, label = tiny(8, (4, 2), V=5, device=device), torch.full((2,), -1, device=device)
    grains = torch.tensor([[[0, 0], [0, 0]], [[0, 1], [1, 0]]], device=device)
    pos, code = model.layout.pack(torch.zeros(2, 4, 4, dtype=torch.long, device=device), grains)
    generate(model, label, given=(pos, code))
    pos[row, column] = value
    with pytest.raises(dq.UserError, match=why):
        generate(model, label, given=(pos, code))


def test_given_pairs_of_another_shape_are_refused(device):
    """Fewer rows left the last images without given pairs."""
    model, label = tiny(8, (4, 2), V=5, device=device), torch.full((3,), -1, device=device)
    none = torch.full((3, model.layout.max_len), -1, device=device)
    generate(model, label, given=(none, none))
    for pos, code in ((none[:2], none[:2]), (none[:, :3], none[:, :3]), (none, none[:2])):
        with pytest.raises(dq.UserError, match=r"given tensors must have shape \(3, 18\)"):
            generate(model, label, given=(pos, code))


def test_given_contents_outside_the_codebook_are_refused(device):
    model, label = tiny(8, (4, 2), V=5, device=device), torch.full((1,), -1, device=device)
    pos = torch.full((1, 18), -1, device=device)
    for bad in (5, -2):
        code = torch.full_like(pos, -1)
        code[0, 0] = bad
        with pytest.raises(dq.UserError, match="below 5"):
            generate(model, label, given=(pos, code))


def test_samples_can_be_used_for_training(device):
    """They are normal tensors. Inference tensors could not be saved for a backward pass."""
    model = tiny(8, (4, 2), V=5, device=device)
    pos, code = generate(model, torch.full((2,), -1, device=device))
    sum(model(pos, code).values()).sum().backward()
    assert model.content.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("factors, cfg", [((4, 2), 1.0), ((4, 2), 2.5), ((8,), 1.0), ((4, 2, 1), 2.5)])
def test_the_simple_sampler_generates_the_same(factors, cfg, device):
    model = tiny(8, factors, V=5, classes=("a", "b"), device=device)
    options = SampleOptions(temperature=2.0, top_k=4, top_p=0.95, cfg=cfg)
    label = torch.tensor([0, 1, -1, 1], device=device)
    pos, code = generate(model, label, options, seed=7, first=10)
    for i, class_id in enumerate(label.tolist()):
        one_pos, one_code = dq.generate_one(model, class_id, options, seed=7, index=10 + i)
        n = len(one_pos)
        assert pos[i, :n].tolist() == one_pos.tolist() and (pos[i, n:] == model.layout.end).all()
        assert code[i, :n].tolist() == one_code.tolist()


def test_an_image_depends_on_its_number_alone(device):
    model = tiny(8, (4, 2), V=5, classes=("a", "b"), device=device)
    label = torch.arange(20, device=device) % 2
    pos, code = generate(model, label, seed=5)
    for slots in (1, 7, 64):
        again = generate(model, label, seed=5, slots=slots)
        assert torch.equal(again[0], pos) and torch.equal(again[1], code)
    tail = generate(model, label[15:], seed=5, first=15)
    assert torch.equal(tail[0], pos[15:]) and torch.equal(tail[1], code[15:])


def test_refilled_slots_cost_the_mean_length(device, monkeypatch):
    """A large job takes at most 15 % more steps than (sum of lengths) / slots, although lengths vary from 9 to 18."""
    model = tiny(8, (4, 2), V=5, device=device)
    calls, real = [], dq.decode_one
    monkeypatch.setattr(dq, "decode_one", lambda *args: (calls.append(1), real(*args))[1])
    pos, code = generate(model, torch.full((256,), -1, device=device), SampleOptions(temperature=3.0), slots=16)
    length = model.layout.lengths(pos)
    if device.type == "cpu":
        assert length.min() <= 9 and length.max() >= 17
        assert 1.0 <= len(calls) / (int(length.sum()) / 16) <= 1.15


def test_guidance_costs_nothing_where_there_are_no_classes(monkeypatch):
    rows, real = [], dq.decode_one
    monkeypatch.setattr(dq, "decode_one", lambda model, job, state, end: (
        rows.append(state.cache[0].shape[1]), real(model, job, state, end))[1])
    for classes in ((), ("a", "b")):
        generate(tiny(8, (4, 2), V=5, classes=classes), torch.zeros(3, dtype=torch.long), SampleOptions(cfg=2.0))
    assert rows[0] == 3 and rows[-1] == 6 and set(rows) == {3, 6}            # with classes: also unconditional rows


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


@pytest.mark.parametrize("cfg", [1.0, 2.5])
def test_bfloat16_matrices_draw_nearly_the_same(cfg, device):
    """Most images are exactly those of float32. By chance, none would be."""
    model, options = tiny(8, (4, 2), V=5, classes=("a", "b"), device=device), SampleOptions(cfg=cfg)
    label = torch.arange(64, device=device) % 2
    a, b = (torch.cat(generate(model.to(dtype), label, options, seed=1, slots=8), dim=1)
            for dtype in (torch.float32, torch.bfloat16))
    same = (a == b).all(dim=1).float().mean()
    assert 0.7 < same < 1                                                    # 1: nothing was computed in bfloat16


class FakeCuda:
    """Replaces the parts of torch.cuda with which `generate` captures and replays steps. The CPU does the work.

    As on a GPU, a step that is being captured is not run. It is only recorded, with the tensors that it was given.
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
            assert pool == "pool" and stream == "stream"                     # shared by all graphs
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
    """Each cache size is captured when it is first needed. All other steps are replays."""
    model = tiny(8, (4, 2, 1), V=5, classes=("a", "b"))
    label, options = torch.arange(9) % 2, SampleOptions(temperature=2.0, cfg=cfg)
    given = [torch.where(torch.rand(len(label), 1) < 0.5, t, -1)             # some images complete
             for t in generate(model, label, options, seed=1)]
    for extra in (dict(), dict(given=given)):
        pos, code = generate(model, label, options, seed=7, slots=2, **extra)
        with monkeypatch.context() as patch:
            cuda = FakeCuda(patch)
            again = generate(model, label, options, seed=7, slots=2, graphs=True, bucket=16, sync_every=4, **extra)
        assert torch.equal(again[0], pos) and torch.equal(again[1], code)
        length = model.layout.lengths(pos)
        assert cuda.counts["captured"] == cuda.counts["direct"] == -(-int(length.max()) // 16)
        steps = cuda.counts["replayed"] + cuda.counts["direct"]
        assert int(length.sum()) / 2 <= steps <= (int(length.sum()) + int(length.max())) / 2 + 4 + 1


def test_a_small_job_captures_no_more_than_it_needs(monkeypatch):
    model = tiny(8, (4, 2, 1), V=5)
    coarse = torch.zeros(3, 2, 2, dtype=torch.long)                          # 4 codes and 3 EOS ids
    cuda = FakeCuda(monkeypatch)
    generate(model, torch.full((3,), -1), given=given_tiling(model.layout, coarse), graphs=True, bucket=8, sync_every=1)
    assert cuda.counts == dict(captured=1, direct=1, replayed=6)


@pytest.mark.parametrize("cfg", [1.0, 2.5])
def test_the_step_is_one_graph_for_the_compiler(cfg, monkeypatch):
    """torch.compile finds no graph break in a step, and the samples are the same. The backend compiles nothing."""
    torch._dynamo.reset()
    model = tiny(8, (4, 2), V=5, classes=("a", "b"), layers=1)
    options = SampleOptions(temperature=2.0, top_k=4, top_p=0.9, cfg=cfg)
    label, real = torch.arange(5) % 2, torch.compile
    wanted = generate(model, label, options, seed=7, slots=2, bucket=64)
    compiled_steps = []

    def compile(step):
        compiled_steps.append(step)
        return real(step, fullgraph=True, backend="eager")
    monkeypatch.setattr(torch, "compile", compile)
    compiled = generate(model, label, options, seed=7, slots=2, bucket=64, compile=True)
    assert torch.equal(compiled[0], wanted[0]) and torch.equal(compiled[1], wanted[1])
    assert compiled_steps == [dq.decode_one]


def test_guidance_0_is_no_label(device):
    """Guidance below 1 also mixes conditional and unconditional logits."""
    model = tiny(8, (4, 2), V=5, classes=("a", "b"), device=device)
    label = torch.tensor([0, 1, 0, 1], device=device)
    without, guided = (generate(model, *how, seed=3) for how in ((torch.full_like(label, -1), SampleOptions()),
                                                                 (label, SampleOptions(cfg=0.0))))
    assert all(torch.equal(a, b) for a, b in zip(without, guided))
    assert not torch.equal(generate(model, label, seed=3)[0], without[0])


def test_draws_are_computed_in_float32():
    assert dq.apply_guidance(torch.randn(2, 5).bfloat16(), SampleOptions(), 2).dtype == torch.float32
