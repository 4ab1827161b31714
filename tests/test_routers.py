"""Routers and budget, section 2 of dq.py.

    GrainRouter.score       test_the_score_is_the_mean_granularity
    GrainRouter.forward     test_straight_through_gradient_of_the_gate,
                            test_gumbel_noise_draws_with_the_softmax_probabilities
    EntropyRouter.score     test_entropy_equals_a_loop_over_pixels
    ThresholdRouter         test_entropy_thresholds_and_random_routing_give_the_asked_ratios (with train_vae.calibrate),
                            test_blank_regions_are_coarse
    DialRouter              test_the_dial_gate_equals_a_loop_over_regions and four more, DQVAE.set_ratios included
    sample_global           test_processes_draw_together_what_one_would
    budget_loss             test_budget_loss_equals_a_loop_and_pulls_on_all_regions_alike and two more
"""
import itertools
import operator

import pytest
import torch

import dq
import naive
from dq import DialRouter, EntropyRouter, GrainRouter, RandomRouter, budget_loss, one_hot
from data import ToyShapes


def test_straight_through_gradient_of_the_gate():
    """Forward is one-hot. Backward is that of the softmax: dL/dlogit_k = p_k (c_k - sum_j p_j c_j)."""
    router = GrainRouter(32, 3)
    logits = torch.randn(2, 3, 2, 2, requires_grad=True)
    router.logits = operator.itemgetter(0)                                   # the first map
    gate = router(None, [logits], noise=0.0)
    chosen = torch.nn.functional.one_hot(logits.argmax(1), 3).permute(0, 3, 1, 2).float()
    torch.testing.assert_close(gate.detach(), chosen, msg=lambda why: f"the gate is not one-hot: {why}")
    assert torch.equal(gate.detach(), chosen), (
        "the gate is one-hot only up to rounding: (a + b) - b need not equal a, so the order of the sum matters")
    cost = torch.randn(2, 3, 2, 2)
    (gate * cost).sum().backward()
    p = logits.detach().softmax(1)
    expected = p * (cost - (p * cost).sum(1, keepdim=True))
    torch.testing.assert_close(logits.grad, expected, msg=lambda why: (
        f"the gate is right, but the gradient of the logits is not that of the softmax: {why}"))


def test_gumbel_noise_draws_with_the_softmax_probabilities():
    router = GrainRouter(32, 3)
    logits = torch.tensor([1.0, 0.0, -1.0]).view(1, 3, 1, 1).expand(20_000, 3, 1, 1)
    router.logits = operator.itemgetter(0)                                   # the first map
    fractions = router(None, [logits]).mean(dim=(0, 2, 3))
    torch.testing.assert_close(fractions, logits[0, :, 0, 0].softmax(0), atol=0.015, rtol=0, msg=lambda why: (
        f"in training, granularities are not sampled with the softmax probabilities of the logits: {why}"))
    router.eval()
    assert (router(None, [logits])[:, 0] == 1).all(), "in evaluation, the gate is not the argmax of the logits"


def test_the_score_is_the_mean_granularity():
    router, maps = GrainRouter(32, 3), [torch.randn(2, 32, s, s) for s in (2, 4, 8)]
    logits = torch.randn(2, 3, 2, 2)
    router.logits = lambda _: logits
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    torch.testing.assert_close(router.score(None, maps), p[:, 1] + 2 * p[:, 2])


@pytest.mark.parametrize("fill", [torch.Tensor.uniform_, torch.Tensor.exponential_])
def test_processes_draw_together_what_one_would(fill, monkeypatch):
    def sampled(rank, world):
        monkeypatch.setattr(dq, "rank_world", lambda: (rank, world))
        torch.manual_seed(3)
        return dq.sample_global(fill, (6 // world, 2), "cpu")
    assert torch.equal(torch.cat([sampled(rank, 3) for rank in range(3)]), sampled(0, 1))


def test_blank_regions_are_coarse():
    """If most regions have equal scores, the threshold does not split them: all of them become coarse."""
    x = torch.ones(4, 3, 16, 16)
    x[:, :, :8, :8] = torch.rand(4, 3, 8, 8) * 2 - 1                         # one region of four has detail
    router = EntropyRouter((0.5, 0.5), 8)
    router.calibrate((0.5, 0.5), [x])
    assert router(x, None).argmax(1).tolist() == [[[1, 0], [0, 0]]] * 4


def test_entropy_equals_a_loop_over_pixels():
    image = torch.rand(1, 3, 8, 8) * 2 - 1
    ours = EntropyRouter((0.5, 0.5), 4).score(image)
    for y in range(2):
        for x in range(2):
            patch = image[0, :, 4 * y:4 * y + 4, 4 * x:4 * x + 4]
            assert abs(ours[0, y, x] - naive.entropy(patch)) < 1e-3, (
                f"in a noise image, the entropy of region ({y}, {x}) differs from the entropy of its 16 pixels")


@pytest.fixture(scope="module")
def shapes():
    toy = ToyShapes(64)
    return torch.stack([toy[i][0] for i in range(128)])


@pytest.mark.parametrize("ratios", [(0.5, 0.5), (0.7, 0.3), (0.4, 0.3, 0.3), (1.0,)])
def test_entropy_thresholds_and_random_routing_give_the_asked_ratios(ratios, shapes):
    x, entropy = shapes, EntropyRouter(ratios, 8)
    entropy.calibrate(ratios, x.split(32))
    for router in (entropy, RandomRouter(ratios)):
        fractions = router(x, [torch.zeros(1, 1, 8, 8)]).mean(dim=(0, 2, 3))
        torch.testing.assert_close(fractions, torch.tensor(ratios), atol=0.02, rtol=0)


def test_budget_loss_is_the_papers_for_two_granularities():
    gate = torch.nn.functional.one_hot(torch.randint(0, 2, (5, 4, 4)), 2).permute(0, 3, 1, 2).float()
    fine, target, gamma = gate[:, 1].mean(), 0.3, 10
    torch.testing.assert_close(10 * budget_loss(gate, (1 - target, target)), 2 * gamma * (fine - target) ** 2)


def test_budget_loss_lets_images_differ():
    all_coarse, all_fine = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    gate = torch.stack([all_coarse, all_fine])[:, :, None, None].expand(2, 2, 4, 4)
    assert budget_loss(gate, (0.5, 0.5)) == 0, (
        "an all-coarse image and an all-fine image together meet ratios of 1/2, so the loss must be 0")


@pytest.mark.parametrize("K", [2, 3])
def test_budget_loss_equals_a_loop_and_pulls_on_all_regions_alike(K):
    ratios = torch.rand(K).softmax(0).tolist()
    gate = one_hot(torch.randint(0, K, (3, 2, 2)), K).requires_grad_()
    loss = budget_loss(gate, ratios)
    loss.backward()
    fraction = naive.shares(gate.detach())
    for k, ratio in enumerate(ratios):
        torch.testing.assert_close(
            gate.grad[:, k], torch.full((3, 2, 2), 2 * (fraction[k] - ratio) / 12),
            msg=lambda why: f"regions get different gradients, or not the gradient that the formula gives: {why}")
    target = sum((fraction[k] - ratio) ** 2 for k, ratio in enumerate(ratios))
    assert float(loss.detach()) == pytest.approx(target), "the loss differs from its formula for these fractions"


def dial_router(K, logits):
    """A DialRouter whose gate has these logits (B, K, h, w)."""
    router = DialRouter([1 / K] * K, GrainRouter(32, K))
    router.scorer.logits = lambda maps: logits
    return router


@pytest.mark.parametrize("K", [2, 3, 4])
def test_the_dial_score_is_the_log_odds_of_finest_and_coarsest(K):
    """For two granularities, a learned router and the dial that it becomes thus order all regions in the same way."""
    logits = torch.randn(3, K, 2, 2)
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    torch.testing.assert_close(dial_router(K, logits).score(None, None), (p[:, -1] / p[:, 0]).log())
    if K == 2:
        mean = dial_router(K, logits).scorer.score(None, None)               # B, h, w
        torch.testing.assert_close(dial_router(K, logits).score(None, None), (mean / (1 - mean)).log())


@pytest.mark.parametrize("K", [2, 3])
def test_the_dial_gate_equals_a_loop_over_regions(K):
    """Training: the same random numbers, but thresholds by sorting, and the soft gate of one region at a time."""
    B, router, cost = 6, dial_router(K, None), torch.randn(6, K, 3, 3)
    scores = (5 * torch.randn(B, 3, 3) + 2).requires_grad_()
    router.score = lambda x, maps: scores
    torch.manual_seed(1)
    gate = router(torch.zeros(B, 3, 8, 8), None, noise=0.7)
    gradient, = torch.autograd.grad((gate * cost).sum(), scores)

    torch.manual_seed(1)
    uniform = torch.rand(B, 3, 3)
    squares = torch.randn(B, K) ** 2
    budgets = (0.4 / K + 0.6 * squares / squares.sum(1, keepdim=True)).tolist()  # around equal ratios
    deviation = (scores - scores.mean()).square().mean().sqrt()
    noisy = 3 * (scores - scores.mean()) / deviation + 0.7 * (uniform / (1 - uniform)).log()
    in_order, total = sorted(noisy.flatten().tolist()), 0.0
    for i, y, x in itertools.product(range(B), range(3), range(3)):
        levels = []
        for k in range(K - 1):                                               # at a fraction of the way through the list
            at = sum(budgets[i][:k + 1]) * (len(in_order) - 1)
            low = min(int(at), len(in_order) - 2)
            levels.append(in_order[low] + (at - low) * (in_order[low + 1] - in_order[low]))
        assert gate[i, :, y, x].argmax() == sum(noisy[i, y, x] > level for level in levels)
        odds = [torch.exp(sum((noisy[i, y, x] - level for level in levels[:k]), torch.tensor(0.0))) for k in range(K)]
        total = total + sum(odds[k] / sum(odds) * cost[i, k, y, x] for k in range(K))
    wanted, = torch.autograd.grad(total, scores)
    torch.testing.assert_close(gradient, wanted, atol=1e-5, rtol=1e-4)
    assert torch.equal(gate.detach(), one_hot(gate.argmax(1), K))


def test_the_dial_evaluates_at_its_own_budget():
    """The thresholds follow the quantiles at the target ratios, whatever budgets the images get in training."""
    router = DialRouter((0.6, 0.3, 0.1), GrainRouter(32, 3))
    maps = [torch.randn(64, 32, s, s) for s in (4, 8, 16)]
    for _ in range(60):
        router(torch.zeros(64, 3, 8, 8), maps)
    fractions = router.eval()(torch.zeros(64, 3, 8, 8), maps).mean(dim=(0, 2, 3))
    torch.testing.assert_close(fractions, torch.tensor([0.6, 0.3, 0.1]), atol=0.01, rtol=0)


@pytest.mark.parametrize("ratios", [(0.3, 0.7), (0.8, 0.2), (1, 0), (0, 1), (0.5, 0.2, 0.3)])
@pytest.mark.parametrize("router", dq.ROUTERS)
@torch.no_grad()
def test_other_ratios_without_training(router, ratios):
    """Every router meets them, and a region whose granularity stays keeps its codes: they depend on nothing else."""
    K = len(ratios)
    config = dq.VAEConfig(size=32, factors=(8, 4, 2)[:K], ratios=[1 / K] * K, router=router, width=32, multipliers=(1,))
    vae, images = dq.DQVAE(config).eval(), torch.rand(16, 3, 32, 32) * 2 - 1
    vae.codebook.codes.normal_(std=0.1)
    vae.set_ratios(config.ratios, images.split(8))
    codes, grains = vae.encode(images)
    vae.set_ratios(ratios, images.split(8))
    other_codes, other_grains = vae.encode(images)
    fractions = one_hot(other_grains, K).mean(dim=(0, 2, 3))
    torch.testing.assert_close(fractions, torch.tensor(ratios).float(), atol=0.02, rtol=0)
    kept = dq.upsample(grains == other_grains, config.size // config.factors[-1])
    assert torch.equal(codes[kept], other_codes[kept]) and kept.any()
    assert vae.config.ratios == ratios and config.ratios != ratios           # a checkpoint's config is not changed
    if router in ("learned", "dial"):                                        # further training is around them, too
        assert vae.router.ratios.tolist() == pytest.approx(ratios)
    again = dq.DQVAE(vae.config).eval()
    again.load_state_dict(vae.state_dict())
    assert torch.equal(again.encode(images)[1], other_grains), "the checkpoint does not carry the thresholds"


@torch.no_grad()
def test_random_routes_depend_on_the_image_alone():
    """In evaluation. So codes do not depend on how images are distributed over ranks, nor on what was drawn before."""
    router, maps = RandomRouter((0.5, 0.5)).eval(), [torch.zeros(6, 1, 8, 8)]
    x = torch.rand(6, 3, 16, 16)
    gate = router(x, maps)
    torch.manual_seed(3)
    alone = torch.cat([router(x[i:i + 1], [maps[0][:1]]) for i in (5, 0, 3)])
    assert torch.equal(alone, gate[[5, 0, 3]])
    assert not torch.equal(gate[0], gate[1]) and 0.4 < gate[:, 1].mean() < 0.6


@pytest.mark.parametrize("ratios, targets", [((0, 1), [0, 1]), ((1, 0), [1, 0]), ((0, 0.5, 0.5), [0, 0.5, 0.5])])
def test_none_and_all_are_none_and_all(ratios, targets):
    """Also for images that the entropy router was not calibrated on. Thresholds must be finite to be saved."""
    router = EntropyRouter(ratios, 4)
    router.calibrate(ratios, [torch.rand(50, 3, 8, 8) * 2 - 1])
    assert router.thresholds.isfinite().all()
    least, most = torch.zeros(16), torch.linspace(-1, 1, 32)[8:24]           # one grey level; 16 levels, one per bin
    extremes = torch.stack([least, most]).view(2, 1, 4, 4).repeat(1, 3, 2, 2)
    other = torch.cat([torch.rand(400, 3, 8, 8) * 2 - 1, extremes])
    fractions = router(other, None).mean(dim=(0, 2, 3)).tolist()
    assert all(a == b if b in (0, 1) else abs(a - b) < 0.2 for a, b in zip(fractions, targets))


def test_the_gate_is_computed_in_float32():
    """In bfloat16, logits that differ by less than 1 % would tie, and ties are decided in favour of coarse."""
    with torch.autocast("cpu", torch.bfloat16):
        assert GrainRouter(32, 3).logits([torch.randn(2, 32, s, s) for s in (2, 4, 8)]).dtype == torch.float32
