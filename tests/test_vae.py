"""DQ-VAE: routing, budget, codebook, and the way the gradient takes."""
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import dq
import train_transformer
import train_vae
from dq import DQVAE, Codebook, EntropyRouter, GrainRouter, RandomRouter, VAEConfig, budget_loss, one_hot
from train_vae import ToyShapes


def small(**kwargs):
    return VAEConfig(**{**dict(size=16, factors=(8, 4), ratios=(0.5, 0.5), codebook_size=16, code_dim=4,
                               channels=32, width=32, multipliers=(1,)), **kwargs})


CASES = [((8,), (1.0,)), ((8, 4), (0.5, 0.5)), ((8, 4, 2), (0.5, 0.25, 0.25)), ((4, 1), (0.5, 0.5))]


@pytest.mark.parametrize("router", ["learned", "entropy", "random"])
@pytest.mark.parametrize("factors, ratios", CASES)
def test_encode_and_decode_agree_with_forward(factors, ratios, router, device):
    config = small(factors=factors, ratios=ratios, router=router)
    model = DQVAE(config).to(device)
    x = torch.rand(3, 3, 16, 16, device=device) * 2 - 1
    model(x)                                                                 # one training step fills the codebook
    model.eval()
    torch.manual_seed(5)
    out = model(x)
    torch.manual_seed(5)                                                     # the random router draws
    codes, grains = model.encode(x)
    assert codes.shape == (3, 16 // factors[-1], 16 // factors[-1])
    assert grains.shape == (3, 16 // factors[0], 16 // factors[0])
    assert torch.equal(codes, out.codes) and torch.equal(grains, out.grains)
    torch.testing.assert_close(model.decode(codes), out.reconstruction, atol=1e-5, rtol=1e-5)
    layout = dq.Layout(16, factors).to(device)                               # what stage 2 sees is all there is
    codes2, grains2 = layout.unpack(*layout.pack(codes, grains))
    assert torch.equal(codes, codes2) and torch.equal(grains, grains2)


def test_straight_through_gradient_of_the_gate():
    """Forward is one-hot; backward is the softmax's: dL/dlogit_k = p_k (c_k - sum_j p_j c_j)."""
    router, maps = GrainRouter(32, 3), [torch.randn(2, 32, s, s) for s in (2, 4, 8)]
    logits = torch.randn(2, 3, 2, 2, requires_grad=True)
    router.logits = lambda _: logits
    gate = router(None, maps, noise=0.0)
    assert torch.equal(gate.detach(), torch.nn.functional.one_hot(logits.argmax(1), 3).permute(0, 3, 1, 2).float())
    cost = torch.randn(2, 3, 2, 2)
    (gate * cost).sum().backward()
    p = logits.detach().softmax(1)
    expected = p * (cost - (p * cost).sum(1, keepdim=True))
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.parametrize("factors, ratios", CASES[1:3])
def test_the_reconstruction_reaches_every_gate(factors, ratios):
    model = DQVAE(small(factors=factors, ratios=ratios))
    K = len(factors)
    gate = torch.nn.functional.one_hot(torch.randint(0, K, (2, 2, 2)), K).permute(0, 3, 1, 2).float().requires_grad_()
    model.router.forward = lambda x, maps, noise: gate
    out = model(torch.rand(2, 3, 16, 16) * 2 - 1)
    out.reconstruction.square().mean().backward()
    assert (gate.grad != 0).all()                                            # also of the granularities not chosen
    model.zero_grad()


def test_gumbel_noise_draws_with_the_softmax_probabilities():
    router = GrainRouter(32, 3)
    logits = torch.tensor([1.0, 0.0, -1.0]).view(1, 3, 1, 1).expand(20_000, 3, 1, 1)
    router.logits = lambda _: logits
    share = router(None, None).mean(dim=(0, 2, 3))
    torch.testing.assert_close(share, logits[0, :, 0, 0].softmax(0), atol=0.015, rtol=0)
    router.eval()
    assert (router(None, None)[:, 0] == 1).all()                             # evaluation takes the argmax


def test_budget_loss_is_the_papers_for_two_granularities():
    gate = torch.nn.functional.one_hot(torch.randint(0, 2, (5, 4, 4)), 2).permute(0, 3, 1, 2).float()
    fine, target, gamma = gate[:, 1].mean(), 0.3, 10
    torch.testing.assert_close(10 * budget_loss(gate, (1 - target, target)), 2 * gamma * (fine - target) ** 2)


def test_budget_loss_lets_images_differ():
    all_coarse, all_fine = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    gate = torch.stack([all_coarse, all_fine])[:, :, None, None].expand(2, 2, 4, 4)
    assert budget_loss(gate, (0.5, 0.5)) == 0


@pytest.mark.parametrize("K", [2, 3])
def test_budget_loss_equals_a_loop_and_pulls_on_all_regions_alike(K):
    ratios = torch.rand(K).softmax(0).tolist()
    gate = one_hot(torch.randint(0, K, (3, 2, 2)), K).requires_grad_()
    loss = budget_loss(gate, ratios)
    loss.backward()
    wanted = 0.0
    for k, ratio in enumerate(ratios):
        share = sum(gate[b, k, y, x].item() for b in range(3) for y in range(2) for x in range(2)) / 12
        wanted += (share - ratio) ** 2
        torch.testing.assert_close(gate.grad[:, k], torch.full((3, 2, 2), 2 * (share - ratio) / 12))
    assert float(loss.detach()) == pytest.approx(wanted)


def test_nearest_code_equals_a_loop():
    book, z = Codebook(7, 3), torch.randn(50, 3)
    book.codes.copy_(torch.randn(7, 3) * torch.linspace(0.2, 3, 7)[:, None])  # short ones and long ones
    ids = book.assign(z)
    assert len(ids.unique()) > 3
    for vector, i in zip(z, ids.tolist()):
        assert i == min(range(7), key=lambda v: float((book.codes[v] - vector).square().sum()))


def test_straight_through_has_the_value_of_q_and_the_gradient_of_z():
    z, q, cost = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3), torch.randn(5, 3)
    out = dq.straight_through(z, q)
    torch.testing.assert_close(out.detach(), q)
    (out * cost).sum().backward()
    torch.testing.assert_close(z.grad, cost)


@pytest.mark.parametrize("age, decay", [(0, 0.1), (5, 0.4), (1000, 0.9)])
def test_ema_update_equals_a_loop_over_codes(age, decay):
    V, D = 6, 3
    book = Codebook(V, D, decay=0.9)
    book.restart = lambda *_: None
    book.codes.normal_()
    book.uses.uniform_(1, 2)
    book.sums.copy_(book.codes * book.uses[:, None])
    book.age.fill_(age)
    codes, uses, sums = (t.clone() for t in (book.codes, book.uses, book.sums))
    z = torch.randn(2, D, 4, 4)
    weight = torch.ones(2, 4, 4)
    z[:, :, :2, :2] = z[:, :, :1, :1]                                        # one coarse code over four cells
    weight[:, :2, :2] = 1 / 4
    book.train()
    q, ids, loss = book(z, weight)
    for v in range(V):
        n, total = 0.0, torch.zeros(D)
        for b in range(2):
            for y in range(4):
                for x in range(4):
                    vector = z[b, :, y, x]
                    nearest = min(range(V), key=lambda i: float((codes[i] - vector).square().sum()))
                    assert nearest == ids[b, y, x]
                    if nearest == v:
                        n, total = n + float(weight[b, y, x]), total + weight[b, y, x] * vector
        uses[v] = decay * uses[v] + (1 - decay) * n
        sums[v] = decay * sums[v] + (1 - decay) * total
    torch.testing.assert_close(book.uses, uses)
    torch.testing.assert_close(book.sums, sums)
    torch.testing.assert_close(book.codes, sums / uses[:, None])


def test_commitment_counts_every_code_once_and_pulls_only_the_encoder():
    book = Codebook(4, 2).eval()
    book.codes.normal_()
    z = torch.randn(1, 2, 2, 2, requires_grad=True)
    weight = torch.tensor([[[0.25, 1.0], [1.0, 0.5]]])
    q, ids, loss = book(z, weight)
    expected = sum(0.25 * weight[0, y, x] * (book.codes[ids[0, y, x]] - z[0, :, y, x]).square().mean()
                   for y in range(2) for x in range(2)) / 4
    torch.testing.assert_close(loss, expected)
    q.sum().backward()
    assert (z.grad == 1).all()                                               # straight-through


def test_restart_revives_dead_codes_and_leaves_the_others():
    book, z, weight = Codebook(8, 2), torch.randn(64, 2), torch.full((64,), 0.5)
    book.restart(z, weight)                                                  # the first batch initialises all codes
    assert (book.uses == 4).all()                                            # 64 / 2 uses for 8 codes
    book.uses.copy_(torch.arange(8) + 1)
    book.sums.copy_(book.codes * book.uses[:, None])
    book.codes[5], book.uses[5], book.sums[5] = 100.0, 0.39, 39.0            # used less than a tenth of 4 times
    before = [t.clone() for t in (book.codes, book.uses, book.sums)]
    book.restart(z, weight)
    others = torch.arange(8) != 5
    for t, was in zip((book.codes, book.uses, book.sums), before):
        torch.testing.assert_close(t[others], was[others])
    distance = (z - book.codes[5]).norm(dim=1)
    assert 0 < distance.min() < 0.1                                          # hardly beside a vector of the batch
    assert book.uses[5] == 4
    torch.testing.assert_close(book.sums[5], 4 * book.codes[5])


def test_restart_draws_by_weight():
    book, z = Codebook(8, 2), torch.rand(64, 2)
    z[32:] += 100
    book.restart(z, (torch.arange(64) < 32).float())
    assert (book.codes < 50).all()


def test_a_batch_of_few_different_vectors_gives_codes_that_differ():
    book = Codebook(16, 2)
    book.restart(torch.randn(3, 2).repeat(20, 1), torch.ones(60))
    assert torch.pdist(book.codes).min() > 1e-5


@pytest.mark.parametrize("ratios", [(0.5, 0.5), (0.7, 0.3), (0.4, 0.3, 0.3), (1.0,)])
def test_entropy_thresholds_and_random_routing_give_the_asked_ratios(ratios):
    x = torch.stack([ToyShapes(64)[i][0] for i in range(128)])
    entropy = EntropyRouter(ratios, 8)
    train_vae.calibrate(entropy, ratios, x.split(32))
    for router in (entropy, RandomRouter(ratios)):
        share = router(x, [torch.zeros(1, 1, 8, 8)]).mean(dim=(0, 2, 3))
        torch.testing.assert_close(share, torch.tensor(ratios), atol=0.02, rtol=0)


def test_entropy_equals_a_loop_over_pixels():
    x = torch.rand(1, 3, 8, 8) * 2 - 1
    ours = EntropyRouter((0.5, 0.5), 4).score(x)
    for r in range(4):
        patch = x[0, :, r // 2 * 4:r // 2 * 4 + 4, r % 2 * 4:r % 2 * 4 + 4].double().numpy()
        grey = 0.2989 * patch[0] + 0.587 * patch[1] + 0.114 * patch[2]
        hist = np.array([np.mean([math.exp(-0.5 * ((g - b) / 0.01) ** 2) for g in grey.flat])
                         for b in np.linspace(-1, 1, 32)])
        p = hist / hist.sum()
        expected = -sum(q * math.log(q) for q in p if q > 0)
        assert abs(ours[0, r // 2, r % 2] - expected) < 1e-3


TRIPLE = CASES[2]


def test_mix_equals_a_loop():
    """The mixed map, and what the gate learns from it, for a gate of any numbers."""
    model = DQVAE(small(factors=TRIPLE[0], ratios=TRIPLE[1]))
    maps, gate = [torch.randn(2, 32, s, s) for s in (2, 4, 8)], torch.rand(2, 3, 2, 2, requires_grad=True)
    cost = torch.randn(2, 32, 8, 8)
    mixed = model.mix(maps, gate)
    (mixed * cost).sum().backward()
    wanted, gradient = torch.zeros(2, 32, 8, 8), torch.zeros(2, 3, 2, 2)
    for b, k, y, x in itertools.product(range(2), range(3), range(8), range(8)):
        side = (4, 2, 1)[k]                                                  # of what one vector of this map fills
        vector = maps[k][b, :, y // side, x // side]
        wanted[b, :, y, x] += gate.detach()[b, k, y // 4, x // 4] * vector
        gradient[b, k, y // 4, x // 4] += cost[b, :, y, x] @ vector
    torch.testing.assert_close(mixed.detach(), wanted)
    torch.testing.assert_close(gate.grad, gradient, atol=1e-4, rtol=1e-4)


def test_cell_weight_equals_a_loop():
    model, grains = DQVAE(small(factors=TRIPLE[0], ratios=TRIPLE[1])), torch.randint(0, 3, (2, 2, 2))
    weight = model.cell_weight(one_hot(grains, 3).requires_grad_())
    assert weight.shape == (2, 8, 8) and not weight.requires_grad
    for b, y, x in itertools.product(range(2), range(8), range(8)):
        assert weight[b, y, x] == 1 / (16, 4, 1)[grains[b, y // 4, x // 4]]  # one code for so many cells


def test_the_decoder_adds_the_position_of_each_cell():
    """Sines of a linear map of (x, y), plus a vector for the row and one for the column."""
    decoder, z = DQVAE(small()).decoder, torch.randn(2, 32, 4, 4)
    embedding, wanted = decoder.position, torch.zeros(2, 32, 4, 4)
    matrix, bias = embedding.fourier.weight[:, :, 0, 0], embedding.fourier.bias
    for b, y, x in itertools.product(range(2), range(4), range(4)):
        at = torch.tensor([2 * x / 3 - 1, 2 * y / 3 - 1])                    # corners at -1 and 1
        wanted[b, :, y, x] = z[b, :, y, x] + torch.sin(matrix @ at + bias) + embedding.rows[y] + embedding.columns[x]
    torch.testing.assert_close(embedding(z), wanted)
    out = decoder(z)
    decoder.position = torch.nn.Identity()
    torch.testing.assert_close(decoder(wanted), out)


def stage_2_config(name):
    """That of a preset, for the codes of its DQ-VAE."""
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


def test_both_stages_have_the_same_presets():
    assert list(train_vae.PRESETS) == list(train_transformer.PRESETS)
    for name in train_vae.PRESETS:
        stage_2_config(name)                                                 # or a UserError
        for presets in (train_vae.PRESETS, train_transformer.PRESETS):
            schedule = presets[name][1]
            assert schedule.batch_size % schedule.accumulate == 0


def test_bad_configurations_are_refused():
    for bad in (dict(size=20), dict(factors=(4, 8)), dict(factors=(6, 3)), dict(ratios=(0.5, 0.4)),
                dict(ratios=(1.0,)), dict(width=48)):
        with pytest.raises(ValueError):
            small(**bad)
