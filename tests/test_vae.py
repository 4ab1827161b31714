"""DQ-VAE: routing, budget, codebook, and the way the gradient takes."""
import math

import numpy as np
import pytest
import torch

import dq
from dq import DQVAE, Codebook, EntropyRouter, GrainRouter, RandomRouter, ToyShapes, VAEConfig, budget_loss


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
    assert codes.shape == (3, 16 // factors[-1], 16 // factors[-1]) and grains.shape == (3, 16 // factors[0], 16 // factors[0])
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


@pytest.mark.parametrize("age, decay", [(0, 0.1), (5, 0.4), (1000, 0.9)])
def test_ema_update_equals_a_loop_over_codes(age, decay):
    V, D = 6, 3
    book = Codebook(V, D, decay=0.9, dead_below=0.0)
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
    expected = sum(0.25 * weight[0, y, x] * (book.codes[ids[0, y, x]] - z[0, :, y, x]).square().mean() for y in range(2) for x in range(2)) / 4
    torch.testing.assert_close(loss, expected)
    q.sum().backward()
    assert (z.grad == 1).all()                                               # straight-through


def test_restart_revives_dead_codes_and_leaves_the_others():
    book = Codebook(8, 2)
    z = torch.randn(4, 2, 4, 4)
    book(z, torch.ones(4, 4, 4))
    assert (book.uses > 0).all()                                             # the first batch initialises all codes
    book.codes[5], book.uses[5], book.sums[5] = 100.0, 0.0, 0.0
    before = book.codes.clone()
    book.restart(z.permute(0, 2, 3, 1).reshape(-1, 2), torch.ones(64))
    assert book.codes[5].abs().max() < 10
    others = torch.arange(8) != 5
    torch.testing.assert_close(book.codes[others], before[others])
    distance = (z.permute(0, 2, 3, 1).reshape(-1, 2) - book.codes[5]).norm(dim=1)
    assert 0 < distance.min() < 0.1                                          # hardly beside a vector of the batch


def test_a_batch_of_few_different_vectors_gives_codes_that_differ():
    book = Codebook(16, 2)
    book.restart(torch.randn(3, 2).repeat(20, 1), torch.ones(60))
    assert torch.pdist(book.codes).min() > 1e-5


@pytest.mark.parametrize("ratios", [(0.5, 0.5), (0.7, 0.3), (0.4, 0.3, 0.3), (1.0,)])
def test_entropy_thresholds_and_random_routing_give_the_asked_ratios(ratios):
    x = torch.stack([ToyShapes(64)[i][0] for i in range(128)])
    entropy = EntropyRouter(ratios, 8)
    entropy.calibrate(x.split(32))
    for router in (entropy, RandomRouter(ratios)):
        share = router(x, [torch.zeros(1, 1, 8, 8)]).mean(dim=(0, 2, 3))
        torch.testing.assert_close(share, torch.tensor(ratios), atol=0.02, rtol=0)


def test_entropy_equals_a_loop_over_pixels():
    x = torch.rand(1, 3, 8, 8) * 2 - 1
    ours = EntropyRouter((0.5, 0.5), 4).score(x)
    for r in range(4):
        patch = x[0, :, r // 2 * 4:r // 2 * 4 + 4, r % 2 * 4:r % 2 * 4 + 4].double().numpy()
        grey = 0.2989 * patch[0] + 0.587 * patch[1] + 0.114 * patch[2]
        hist = np.array([np.mean([math.exp(-0.5 * ((g - b) / 0.01) ** 2) for g in grey.flat]) for b in np.linspace(-1, 1, 32)])
        p = hist / hist.sum()
        expected = -sum(q * math.log(q) for q in p if q > 0)
        assert abs(ours[0, r // 2, r % 2] - expected) < 1e-3


@pytest.mark.parametrize("name, encoder, codes", [
    ("ffhq256", 33.3, 256 * 2.5), ("imagenet256", 33.3, 256 * 2.5), ("imagenet256-triple", 59.2, 64 * (0.4 + 0.3 * 4 + 0.3 * 16))])
def test_the_papers_presets_have_the_papers_sizes(name, encoder, codes):
    def millions(*modules):
        return sum(p.numel() for m in modules for p in m.parameters()) / 1e6
    preset = dq.PRESETS[name]
    with torch.device("meta"):
        vae, transformer = DQVAE(preset.vae), dq.DQTransformer(preset.transformer)
    assert millions(vae.encoder, vae.router) == pytest.approx(encoder, rel=0.02)
    assert millions(vae.decoder) == pytest.approx(14.4, rel=0.02)
    assert millions(transformer) == pytest.approx(309, rel=0.02)
    layout = transformer.layout
    assert layout.n_regions * sum(r * s for r, s in zip(preset.vae.ratios, layout.cells)) == pytest.approx(codes)


def test_the_stages_of_every_preset_fit_together():
    for preset in dq.PRESETS.values():
        for name in ("size", "factors", "codebook_size"):
            assert getattr(preset.vae, name) == getattr(preset.transformer, name)
        assert preset.train_vae.batch_size % preset.train_vae.accumulate == 0


def test_bad_configurations_are_refused():
    for bad in (dict(size=20), dict(factors=(4, 8)), dict(factors=(6, 3)), dict(ratios=(0.5, 0.4)), dict(ratios=(1.0,)), dict(width=48)):
        with pytest.raises(ValueError):
            small(**bad)
