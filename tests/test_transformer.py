"""DQTransformer, section 6 of dq.py: a normalised distribution over images.

    Block.step                     test_a_block_decodes_step_by_step_what_it_computes_at_once
    rope_table, apply_rope         test_rotation_is_a_product_of_complex_numbers,
                                   test_products_depend_on_how_far_apart_coordinates_are
    attention, Block, rope_of      test_logits_equal_a_loop_over_prefixes
    TransformerConfig              test_bad_configurations_are_refused
    dtypes                         test_attention_is_computed_in_the_dtype_of_autocast
    dropout                        test_dropout_acts_at_four_places_in_training
    initialisation                 test_a_fresh_model_is_uniform
    DQTransformer.embed            test_a_pair_is_the_sum_of_three_rows
    DQTransformer.logits           test_logits_equal_a_loop_over_prefixes, test_an_image_does_not_see_its_batch_mates
    DQTransformer.forward          test_probabilities_of_all_images_sum_to_one,
                                   test_forced_positions_and_padding_cost_nothing
    sizes of the paper             test_vae.py
"""
import itertools
import math

import pytest
import torch

import dq
import naive
from dq import DQTransformer, TransformerConfig
from test_layout import random_image


def tiny(size=4, factors=(2, 1), V=2, classes=(), device="cpu", layers=2, width=32, **kwargs):
    """A random model whose predictions are far from uniform, unlike those of a newly initialised model."""
    torch.manual_seed(1)
    kwargs.setdefault("qk_norm", True)
    config = TransformerConfig(size=size, factors=factors, codebook_size=V, classes=classes, width=width, heads=2,
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
    model = tiny(layers=1, width=8, device=device)
    codes, grains = all_images(model.layout, 2)
    assert len(codes) == 18 ** 4 == 104_976
    total = 0.0
    for c, g in zip(codes.split(512), grains.split(512)):
        losses = model(*model.layout.pack(c.to(device), g.to(device)))
        total += (-(losses["position"] + losses["content"])).double().exp().sum().item()
    assert abs(total - 1) < 1e-4


@torch.no_grad()
def test_a_pair_is_the_sum_of_three_rows(device):
    model = tiny(8, (4, 2, 1), V=5, device=device)
    pos = torch.arange(model.layout.n_positions, device=device)              # every position id
    code = torch.where(model.layout.is_eos, -1, torch.randint_like(pos, 0, 5))
    target = torch.stack([naive.embed(model, p, c) for p, c in zip(pos.tolist(), code.tolist())])
    torch.testing.assert_close(model.embed(pos, code), target, msg=lambda why: (
        f"a pair is not the sum of its embeddings of content, position and granularity: {why}"))
    torch.testing.assert_close(model.embed(pos[None], code[None]), target[None], msg=lambda why: (
        f"pairs of shape (1, P) are not embedded like pairs of shape (P,): {why}"))


@pytest.mark.parametrize("training, label_dropout, papers", [(False, 1.0, False), (False, 1.0, True),
                                                             (True, 1.0, False), (True, 0.0, False)])
@torch.no_grad()
def test_logits_equal_a_loop_over_prefixes(training, label_dropout, papers, device):
    """The loop computes each step from scratch, from the pairs before it. Labels are hidden in training only.

    papers: attention as in the paper's model, without RoPE and QK-norm.
    """
    model = tiny(8, (4, 2), V=5, classes=("a", "b"), label_dropout=label_dropout, rotary=not papers,
                 qk_norm=not papers, device=device)
    model.train(training)
    layout, label = model.layout, torch.tensor([0, 1, -1], device=device)
    grains = torch.tensor([[[0, 1], [1, 0]], [[1, 1], [1, 1]], [[0, 0], [0, 0]]], device=device)
    pos, code = layout.pack(random_image(layout, grains, V=5), grains)
    position, content = model.logits(pos, code, label)
    for b, y in enumerate(label.tolist()):
        hidden = training and label_dropout == 1
        target = naive.logits(model, list(zip(pos[b].tolist(), code[b].tolist())), -1 if hidden else y)
        case = f"{'in training' if training else 'in evaluation'}, label {y}, {'hidden' if hidden else 'not hidden'}"
        assert torch.equal(position[b].isfinite(), target[0].isfinite()), (
            f"the finite position logits are not exactly those of the valid ids ({case})")
        torch.testing.assert_close(position[b], target[0], atol=1e-4, rtol=1e-4, msg=lambda why: (
            f"the position logits differ from a loop over the pairs before each step ({case}): {why}"))
        torch.testing.assert_close(content[b], target[1], atol=1e-4, rtol=1e-4, msg=lambda why: (
            f"the position logits are right, but the content logits differ from a loop over prefixes ({case}): {why}"))


@pytest.mark.parametrize("bad", [dict(width=33), dict(heads=0), dict(heads=3, width=18), dict(size=6),
                                 dict(factors=(4, 8))], ids=str)
def test_bad_configurations_are_refused(bad):
    with pytest.raises(dq.UserError):
        TransformerConfig(**{**dict(size=8, factors=(4, 2), width=32, heads=2), **bad})


@torch.no_grad()
def test_dropout_acts_at_four_places_in_training(monkeypatch):
    """As in GPT-2: dropout acts on the embeddings, on the attention weights and on the output of both branches."""
    model, seen, real = tiny(8, (4, 2), V=5, dropout=0.25), [], torch.nn.functional.dropout

    def dropout(x, p=0.5, training=True, inplace=False):
        if training and p:                                                   # it does something
            seen.append((tuple(x.shape), p))
        return real(x, p, training, inplace)
    monkeypatch.setattr(torch.nn.functional, "dropout", dropout)
    grains = torch.zeros(3, 2, 2, dtype=torch.long)
    pos, code = model.layout.pack(random_image(model.layout, grains, 5), grains)
    B, L = pos.shape
    model.eval()(pos, code)
    assert not seen
    model.train()(pos, code)
    entries, scores = ((B, L, 32), 0.25), ((B, 2, L, L), 0.25)
    assert seen == [entries] + [scores, entries, entries] * 4                # two stacks of two blocks


def test_a_fresh_model_is_uniform():
    """Its residual branches are zero-initialised, and all contents are equally likely."""
    model = DQTransformer(TransformerConfig(size=16, codebook_size=100, width=64, heads=2))
    grains = torch.randint(0, 2, (4, 2, 2))
    pos, code = model.layout.pack(random_image(model.layout, grains, 100), grains)
    nats = model(pos, code)["content"].sum() / (code >= 0).sum()
    assert nats.item() == pytest.approx(math.log(100), rel=1e-6)
    for block in (*model.position_stack, *model.content_stack):
        x = torch.randn(2, 5, 64)
        assert torch.equal(block(x), x)
        for linear in (block.qkv, block.up):
            assert linear.weight.std().item() == pytest.approx(0.02, rel=0.1)


@torch.no_grad()
def test_rotation_is_a_product_of_complex_numbers():
    coordinates, x = torch.tensor([[0.0, 0.0], [1.5, 4.0], [8.5, 11.0], [0.5, 0.5]]), torch.randn(4, 3, 16)
    rotated = dq.apply_rope(x, dq.rope_table(coordinates, 16)[:, None])
    torch.testing.assert_close(rotated, naive.rotate(x, coordinates.tolist()), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_products_depend_on_how_far_apart_coordinates_are():
    """Products of rotated vectors depend on the distances in rows and columns. At (0, 0) nothing is rotated."""
    q, k = torch.randn(2, 16)
    coordinates = torch.tensor([[0.0, 0.0], [1.5, 4.0], [3.0, 2.5], [8.5, 11.0], [10.0, 9.5]])
    rope = dq.rope_table(coordinates, 16)                                    # the last two are shifted by 7, 7
    torch.testing.assert_close(dq.apply_rope(q, rope[0]), q)
    products = [dq.apply_rope(q, rope[i]) @ dq.apply_rope(k, rope[j]) for i, j in ((1, 2), (3, 4), (1, 4), (2, 1))]
    torch.testing.assert_close(products[0], products[1])
    assert all(abs(products[0] - other) > 1e-3 for other in products[2:])
    for row, column in ((1.0, 0.0), (0.0, 1.0)):                             # each rotates half of the planes
        rotated = dq.apply_rope(q, dq.rope_table(torch.tensor([[row, column]]), 16)[0])
        unchanged = (rotated == q).view(2, 2, 4)
        assert unchanged[:, int(row)].all() and not unchanged[:, int(column)].any()


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
    label = torch.arange(32, device=device) % 2
    grains = torch.randint(0, 2, (32, 2, 2), device=device)
    pos, code = model.layout.pack(random_image(model.layout, grains, V=5), grains)
    labelled, unlabelled = (model.logits(pos, code, y)[1] for y in (label, None))
    model.train()
    trained = model.logits(pos, code, label)[1]
    is_labelled = torch.isclose(trained, labelled, atol=1e-4).flatten(1).all(1)
    is_unlabelled = torch.isclose(trained, unlabelled, atol=1e-4).flatten(1).all(1)
    assert (is_labelled ^ is_unlabelled).all() and 4 < is_labelled.sum() < 28


@torch.no_grad()
@pytest.mark.parametrize("rotary, qk_norm", [(True, True), (False, False)])
def test_a_block_decodes_step_by_step_what_it_computes_at_once(rotary, qk_norm, device):
    model = tiny(8, (4, 2), V=5, rotary=rotary, qk_norm=qk_norm, device=device)
    block, heads = model.position_stack[0], model.config.heads
    B, L, C = 3, 6, model.config.width
    x, pos = torch.randn(B, L, C, device=device), torch.randint(22, (B, L), device=device)
    rope = model.rope_of(pos, pos)
    cache = torch.zeros(2, B, heads, L, C // heads, device=device)
    for t in range(L):
        rows, steps = torch.arange(B, device=device), torch.full((B,), t, device=device)
        mask = torch.zeros(B, heads, 1, L, device=device)
        mask[..., t + 1:] = -math.inf
        y = block.step(x[:, t], rope if rope is None else rope[:, t], cache, rows, steps, mask)
        torch.testing.assert_close(y, block(x, rope)[:, t], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_attention_is_computed_in_the_dtype_of_autocast(monkeypatch):
    """RoPE and QK-norm must not turn it into float32, which takes twice as long. The logits are float32 again."""
    model, seen, real, layer_norm = tiny(8, (4, 2), V=5), set(), dq.attention, torch.nn.functional.layer_norm
    monkeypatch.setattr(dq, "attention", lambda q, k, v, **how: (seen.update([q.dtype, k.dtype, v.dtype]),
                                                                 real(q, k, v, **how))[1])
    monkeypatch.setattr(torch.nn.functional, "layer_norm", lambda x, *how: layer_norm(x.float(), *how))  # as on GPUs
    grains = torch.randint(0, 2, (2, 2, 2))
    pos, code = model.layout.pack(random_image(model.layout, grains, 5), grains)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.logits(pos, code)
    assert seen == {torch.bfloat16} and [each.dtype for each in logits] == [torch.float32] * 2
