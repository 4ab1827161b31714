"""Configurations and the DQ-VAE, sections 1 and 4 of dq.py.

    VAEConfig                    test_bad_configurations_are_refused, test_the_last_multiplier_repeats
    norm, ResBlock, AttnBlock    test_group_norm_equals_a_loop and two more
    DQVAE.encode, decode         test_encode_and_decode_agree_with_forward
    DQVAE.mix                    test_mix_equals_a_loop, test_the_reconstruction_reaches_every_gate
    DQVAE.cell_weight            test_cell_weight_equals_a_loop
    Decoder, PositionEmbedding   test_the_decoder_adds_the_position_of_each_cell
    DQVAE.forward                test_an_image_that_is_not_finite_raises_nothing
    Encoder and all sizes        test_the_papers_presets_have_the_papers_sizes; numbers: tools/test_import_authors.py
"""
import itertools
from dataclasses import replace

import pytest
import torch

import dq
import naive
import train_transformer
import train_vae
from dq import DQVAE, VAEConfig, one_hot


def small(**kwargs):
    return VAEConfig(**{**dict(size=16, factors=(8, 4), ratios=(0.5, 0.5), codebook_size=16, code_dim=4,
                               channels=32, width=32, multipliers=(1,)), **kwargs})


CASES = [((8,), (1.0,)), ((8, 4), (0.5, 0.5)), ((8, 4, 2), (0.5, 0.25, 0.25)), ((4, 1), (0.5, 0.5))]
TRIPLE = CASES[2]


@pytest.mark.parametrize("router", ["learned", "entropy", "random"])
@pytest.mark.parametrize("factors, ratios", CASES)
def test_encode_and_decode_agree_with_forward(factors, ratios, router, device):
    config = small(factors=factors, ratios=ratios, router=router)
    model = DQVAE(config).to(device)
    x = torch.rand(3, 3, 16, 16, device=device) * 2 - 1
    model(x)                                                                 # a training step initialises the codebook
    model.eval()
    out = model(x)
    codes, grains = model.encode(x)
    assert codes.shape == (3, 16 // factors[-1], 16 // factors[-1])
    assert grains.shape == (3, 16 // factors[0], 16 // factors[0])
    assert torch.equal(codes, out.codes) and torch.equal(grains, out.grains)
    torch.testing.assert_close(model.decode(codes), out.reconstruction, atol=1e-5, rtol=1e-5)
    layout = dq.Layout(16, factors).to(device)                               # stage 2's sequences lose nothing
    codes2, grains2 = layout.unpack(*layout.pack(codes, grains))
    assert torch.equal(codes, codes2) and torch.equal(grains, grains2)


@pytest.mark.parametrize("factors, ratios", CASES[1:3])
def test_the_reconstruction_reaches_every_gate(factors, ratios):
    model = DQVAE(small(factors=factors, ratios=ratios))
    K = len(factors)
    gate = torch.nn.functional.one_hot(torch.randint(0, K, (2, 2, 2)), K).permute(0, 3, 1, 2).float().requires_grad_()
    model.router.forward = lambda x, maps, noise: gate
    out = model(torch.rand(2, 3, 16, 16) * 2 - 1)
    out.reconstruction.square().mean().backward()
    assert (gate.grad != 0).all()                                            # also where not chosen
    model.zero_grad()


def test_mix_equals_a_loop():
    """The mixed map and the gradient of the gate, for a gate of arbitrary numbers."""
    model = DQVAE(small(factors=TRIPLE[0], ratios=TRIPLE[1]))
    maps, gate = [torch.randn(2, 32, s, s) for s in (2, 4, 8)], torch.rand(2, 3, 2, 2, requires_grad=True)
    cost = torch.randn(2, 32, 8, 8)
    mixed = model.mix(maps, gate)
    (mixed * cost).sum().backward()
    for b in range(2):
        gates = gate[b].detach().clone().requires_grad_()
        target = naive.mix([each[b] for each in maps], gates)
        (target * cost[b]).sum().backward()
        torch.testing.assert_close(mixed[b].detach(), target.detach(), msg=lambda why: (
            f"the mixed map is not the sum of the maps, each multiplied by its gate: {why}"))
        assert gate.grad is not None, "no gradient reaches the gate"
        torch.testing.assert_close(gate.grad[b], gates.grad, atol=1e-4, rtol=1e-4, msg=lambda why: (
            f"the mixed map is right, but a gate's gradient is not that of the product with its map: {why}"))


def test_cell_weight_equals_a_loop():
    model, grains = DQVAE(small(factors=TRIPLE[0], ratios=TRIPLE[1])), torch.randint(0, 3, (2, 2, 2))
    weight = model.cell_weight(one_hot(grains, 3).requires_grad_())
    assert weight.shape == (2, 8, 8), "the weights do not have the shape of the finest grid"
    assert not weight.requires_grad, "the weights are not detached, so a gradient could reach the gate through them"
    target = torch.stack([naive.cell_weight(each, TRIPLE[0]) for each in grains])
    torch.testing.assert_close(weight, target, msg=lambda why: (
        f"the weight of a cell is not 1 / (number of cells that share its code): {why}"))


def test_the_decoder_adds_the_position_of_each_cell():
    """The embedding is the sine of a linear map of (x, y), plus one vector per row and one per column."""
    decoder, z = DQVAE(small()).decoder, torch.randn(2, 32, 4, 4)
    embedding, target = decoder.position, z.clone()
    for y, x in itertools.product(range(4), range(4)):
        target[:, :, y, x] += naive.position(embedding, y, x)
    torch.testing.assert_close(embedding(z), target)
    out = decoder(z)
    decoder.position = torch.nn.Identity()
    torch.testing.assert_close(decoder(target), out)


@torch.no_grad()
def test_group_norm_equals_a_loop():
    """For values so small that eps matters."""
    for channels in (32, 96):
        norm, x = dq.norm(channels), torch.randn(channels, 3, 5) * 1e-3
        norm.weight.normal_(), norm.bias.normal_()
        torch.testing.assert_close(norm(x[None])[0], naive.group_norm(norm, x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("channels", [32, 64])
@torch.no_grad()
def test_a_residual_block_is_its_formula(channels):
    block, x = dq.ResBlock(32, channels), torch.randn(2, 32, 4, 5)
    for b in range(2):
        torch.testing.assert_close(block(x)[b], naive.res_block(block, x[b]), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_attention_over_a_map_is_its_formula():
    block, x = dq.AttnBlock(32), torch.randn(2, 32, 4, 5)
    block.qkv.weight.normal_(std=0.5)                                        # so that the attention is not uniform
    for b in range(2):
        torch.testing.assert_close(block(x)[b], naive.attn_block(block, x[b]), atol=1e-5, rtol=1e-4)


def test_an_image_that_is_not_finite_raises_nothing():
    """The loss is then NaN, which the trainer reports."""
    model = DQVAE(small())
    out = model(torch.full((1, 3, 16, 16), torch.nan))
    assert out.commitment.isnan()


def stage_2_config(name):
    """A preset's TransformerConfig for the codes of its DQ-VAE."""
    vae = train_vae.PRESETS[name][0]
    config = train_transformer.PRESETS[name][0]
    return replace(config, size=vae.size, factors=vae.factors, codebook_size=vae.codebook_size)


@pytest.mark.parametrize("name, encoder, codes", [
    ("ffhq256", 33.3, 256 * 2.5), ("imagenet256", 33.3, 256 * 2.5),
    ("imagenet256-triple", 59.2, 64 * (0.4 + 0.3 * 4 + 0.3 * 16))])
def test_the_papers_presets_have_the_papers_sizes(name, encoder, codes):
    def millions(*modules):
        return sum(p.numel() for m in modules for p in m.parameters()) / 1e6
    config = train_vae.PRESETS[name][0]
    with torch.device("meta"):
        vae, transformer = DQVAE(config), dq.DQTransformer(stage_2_config(name))
    assert millions(vae.encoder, vae.router) == pytest.approx(encoder, rel=0.02)
    assert millions(vae.decoder) == pytest.approx(14.4, rel=0.02)
    assert millions(transformer) == pytest.approx(309, rel=0.02)
    layout = transformer.layout
    assert layout.n_regions * sum(r * s for r, s in zip(config.ratios, layout.cells)) == pytest.approx(codes)


@pytest.mark.parametrize("name, images, factors, ratios, budget", [
    ("ffhq256", 66_500, (16, 8), (0.5, 0.5), 10), ("imagenet256", 1_217_000, (16, 8), (0.5, 0.5), 10),
    ("imagenet256-triple", 1_217_000, (32, 16, 8), (0.4, 0.3, 0.3), 1)])
def test_the_papers_presets_have_the_papers_settings(name, images, factors, ratios, budget):
    """Section 4 of the paper, and the settings that were released with it."""
    target = [
        (train_vae.PRESETS[name][0], dict(size=256, factors=factors, ratios=ratios, codebook_size=1024, code_dim=256,
                                          channels=256, router="learned")),
        (train_vae.PRESETS[name][1], dict(batch_size=120, lr=5.4e-4, betas=(0.5, 0.9), clip=0, l2_weight=0,
                                          budget_weight=budget, perceptual_weight=1, gan_weight=1, gan_start=0)),
        (train_transformer.PRESETS[name][0], dict(position_layers=6, content_layers=18, heads=8, dropout=0.1,
                                                  rotary=False, qk_norm=False)),
        (train_transformer.PRESETS[name][1], dict(batch_size=240, lr=5e-4, betas=(0.9, 0.95), weight_decay=0.01,
                                                  clip=1, decay="cosine", optimizer="adamw"))]
    for preset, settings in target:
        assert {each: getattr(preset, each) for each in settings} == settings
    for stage, epochs in ((train_vae, 50), (train_transformer, 100)):
        schedule = stage.PRESETS[name][1]
        assert schedule.steps * schedule.batch_size == pytest.approx(epochs * images, rel=2e-3)


def test_both_stages_have_the_same_presets():
    assert {*train_vae.PRESETS} == {*train_transformer.PRESETS} - {"toy-paper"}  # which takes the codes of toy
    for name in train_vae.PRESETS:
        stage_2_config(name)                                                 # raises UserError if they don't fit
        for presets in (train_vae.PRESETS, train_transformer.PRESETS):
            schedule = presets[name][1]
            assert schedule.batch_size % schedule.accumulate == 0


def test_bad_configurations_are_refused():
    for bad in (dict(size=20), dict(factors=(4, 8)), dict(factors=(6, 3)), dict(ratios=(0.5, 0.4)),
                dict(ratios=(1.0,)), dict(width=48), dict(channels=48), dict(factors=(6, 3), size=12),
                dict(ratios=(1.5, -0.5)), dict(router="coin"), dict(code_dim=0), dict(codebook_size=0)):
        with pytest.raises(dq.UserError):
            small(**bad)
    config = small(size=4, factors=(4, 2), channels=64, multipliers=(1, 2))  # one region
    assert DQVAE(config)(torch.zeros(1, 3, 4, 4)).reconstruction.shape == (1, 3, 4, 4)


def test_the_last_multiplier_repeats():
    config = VAEConfig(width=32, multipliers=(1, 3))
    assert [config.level_width(level) for level in range(4)] == [32, 96, 96, 96]
