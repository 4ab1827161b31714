"""DQTransformer and its sampler: a proper distribution over tilings, the same with and without the cache."""
import itertools
import math

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


@pytest.mark.parametrize("cfg", [1.0, 2.5])
@pytest.mark.parametrize("size, factors", [(8, (4,)), (8, (4, 2)), (8, (4, 2, 1))])
@torch.no_grad()
def test_cached_steps_equal_the_full_forward_pass(size, factors, cfg, device, monkeypatch):
    model = tiny(size, factors, V=5, classes=("a", "b"), device=device)
    drawn = []
    real = dq.draw
    monkeypatch.setattr(dq, "draw", lambda logits, generator: (drawn.append(logits.clone()), real(logits, generator))[1])
    (pos, code), label = sample_of(model, 6, options=SampleOptions(cfg=cfg))
    position, content = model.logits(pos, code, label)
    if cfg != 1:                                                             # guidance, done by hand
        position0, content0 = model.logits(pos, code)
        legal = position > -math.inf
        position = torch.where(legal, position0 + cfg * (position - position0), -math.inf)
        content = content0 + cfg * (content - content0)
    assert len(drawn) >= 2 * (pos != model.layout.end).sum(1).max()
    for t, (p, c) in enumerate(zip(drawn[0::2], drawn[1::2])):
        torch.testing.assert_close(p, position[:, t], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(c, content[:, t], atol=1e-4, rtol=1e-4)


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
