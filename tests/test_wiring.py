"""What the scripts pass to the functions that other files test. Spies record the calls of each `main`.

    train_vae.main            test_batches_of_images_follow_the_seed to test_clip_0_does_not_clip
      losses                  test_the_reconstruction_loss, test_the_commitment_and_budget_losses,
                              test_the_adversarial_loss, test_the_discriminator_loss,
                              test_accumulated_gradients_are_averaged
      noise, optimisers       test_the_gate_noise_is_annealed, test_the_optimisers_of_stage_1,
                              test_gradient_clipping_of_stage_1
    train_transformer.main    test_batches_of_codes_follow_the_seed to
                              test_evaluating_stage_2_more_often_changes_nothing
      loss                    test_the_gradient_of_stage_2
    sample.main               test_flags_reach_the_sampler and what follows
    parse, override           test_every_flag_reaches_the_run, test_factors_without_ratios_get_equal_ratios
    Record                    test_the_logged_losses_of_stage_1, test_the_final_state_is_saved

Most tests share one short run of each stage. Every weight of a loss differs from all others and from 1.
"""
import copy
import functools
import itertools
import json
import math
import shutil
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import common
import data as reading
import dq
import naive
import sample
import train_transformer
import train_vae
from conftest import DEVICE, call
from test_transformer import tiny

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="compares bit by bit with results on the CPU")
CPU = ["--device", "cpu", "--dtype", "fp32"]


# ------------------------------------------------------------------------------------------------
# Stage 1


STEPS, GAN_START, L2, BUDGET, LPIPS, GAN, RATIOS, BETAS = 5, 3, 0.3, 3.0, 0.7, 0.4, (0.7, 0.3), (0.6, 0.95)


class Distance(torch.nn.Module):
    """Replaces LPIPS. It is not symmetric, so exchanged arguments show."""

    def forward(self, x, y):
        return (x - 2 * y).abs().mean(dim=(1, 2, 3))


def weights_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def norm_of(gradients):
    return torch.stack([each.norm() for each in gradients]).norm().item()


@pytest.fixture(scope="module")
def stage_1(images, tmp_path_factory):
    """A run with all losses and two gradient accumulation steps. -> the recorded calls"""
    out = tmp_path_factory.mktemp("stage_1")
    names = ("forward", "noise", "backward", "hinge", "steps", "discriminators", "models", "read", "seeds")
    seen = SimpleNamespace(out=out, **{name: [] for name in names})
    config = dq.VAEConfig(size=24, codebook_size=16, channels=32, multipliers=(1,), ratios=RATIOS)
    schedule = train_vae.VAESchedule(steps=STEPS, batch_size=4, lr=1e-3, betas=BETAS, l2_weight=L2, accumulate=2)
    flags = ["--budget-weight", BUDGET, "--perceptual-weight", LPIPS, "--gan-weight", GAN, "--gan-start", GAN_START,
             "--clip", 0.5, "--seed", 3, "--preset", "toy", "--data", images, "--out", out, *CPU]

    def discriminator(real=train_vae.Discriminator):
        seen.discriminators.append(real(width=8))
        return seen.discriminators[-1]

    def forward(self, x, *noise, real=dq.DQVAE.forward):
        y = real(self, x, *noise)
        if torch.is_grad_enabled():
            seen.models.append(self)
            seen.forward.append(SimpleNamespace(x=x, out=y, training=self.training))
        return y

    def gate(self, x, maps, noise=1.0, real=dq.GrainRouter.forward):
        if torch.is_grad_enabled():
            seen.noise.append(noise)
        return real(self, x, maps, noise)

    def backward(y, last, loss, adversarial, other, gan_weight=1.0, scale=1.0, real=train_vae.backward):
        weights = [p for module in (seen.models[-1], *seen.discriminators) for p in module.parameters()]
        score = seen.discriminators[0](y).mean().item()
        known = dict(y=y.detach().clone(), last=last, loss=loss.item(), other=other.item(), gan_weight=gan_weight,
                     scale=scale, adversarial=None if adversarial is None else adversarial.item(), score=score)
        known["fresh"] = all(p.grad is None for p in weights)
        known["weight"] = real(y, last, loss, adversarial, other, gan_weight, scale)
        seen.backward.append(SimpleNamespace(**known))
        return known["weight"]

    def hinge_loss(real, fake, loss=train_vae.hinge_loss):
        passed, model = seen.forward[-1], seen.discriminators[0]
        recon_grad, = torch.autograd.grad(fake.sum(), passed.out.reconstruction, retain_graph=True, allow_unused=True)
        expected = [model(each) for each in (passed.x, seen.backward[-1].y)]
        grads = torch.autograd.grad(loss(*expected), list(model.parameters()))
        seen.hinge.append(SimpleNamespace(real=real, fake=fake, expected=expected, recon_grad=recon_grad, grads=grads))
        return loss(real, fake)

    def step(self, real=torch.optim.Adam.step):
        weights = weights_of(self)
        gradients = [p.grad.clone() for p in weights if p.grad is not None]
        old = [p.detach().clone() for p in weights]
        real(self)
        moved = [not torch.equal(a, b) for a, b in zip(old, weights)]
        if gradients or any(moved):                                          # a step without any does nothing
            seen.steps.append(SimpleNamespace(optimizer=self, gradients=gradients, after=len(seen.forward), moved=moved,
                                              rates={group["lr"] for group in self.param_groups}))

    def seed_all(*numbers, real=common.seed_all):
        seen.seeds.append((numbers, len(seen.forward) // 2))
        real(*numbers)

    def read(self, real=common.Record.newest_losses):
        seen.read.append(real(self))
        return seen.read[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train_vae.PRESETS, "toy", (config, schedule))
        patch.setattr(train_vae.Perceptual, "load", lambda files: Distance())
        patch.setattr(train_vae, "FEW", 0)                                   # no crops in codes.pt, to save time
        for owner, name, spy in ((train_vae, "Discriminator", discriminator), (dq.DQVAE, "forward", forward),
                                 (dq.GrainRouter, "forward", gate), (train_vae, "backward", backward),
                                 (train_vae, "hinge_loss", hinge_loss), (torch.optim.Adam, "step", step),
                                 (common.Record, "newest_losses", read), (train_vae, "seed_all", seed_all)):
            patch.setattr(owner, name, spy)
        assert call(train_vae.main, *flags) is None
    seen.model, seen.discriminator = seen.models[0], seen.discriminators[0]
    return seen


def test_batches_of_images_follow_the_seed(stage_1, images):
    data = reading.open_data(images, 24, augment=True, seed=3)[0]
    batches = zip(stage_1.forward[::2], stage_1.forward[1::2])
    for parts, indices in zip(batches, common.shuffled_indices(len(data), 4, seed=3)):
        assert torch.equal(torch.cat([part.x for part in parts]), torch.stack([data[i][0] for i in indices]))
    assert len(stage_1.forward) == 2 * STEPS


def test_stage_1_trains_in_training_mode(stage_1):
    assert all(each.training for each in stage_1.forward)


def test_each_step_has_its_own_seed(stage_1, stage_2):
    """The seed of a step depends on --seed and its index alone, in stage 2 also on the rank."""
    assert [seed for seed in stage_1.seeds if len(seed[0]) == 2] == [((3, step), step) for step in range(STEPS)]
    assert [seed for seed in stage_2.seeds if len(seed[0]) > 1] == [((3, step, 0), step) for step in range(4)]


def test_the_gate_noise_is_annealed(stage_1):
    """It follows the schedule, and is the same in both accumulation steps."""
    expected = [1, 1, 1, 0.75, 0.25]
    assert stage_1.noise == pytest.approx([noise for noise in expected for _ in range(2)], abs=1e-6)


def test_the_reconstruction_loss(stage_1):
    for each, passed in zip(stage_1.backward, stage_1.forward):
        x, y = passed.x, each.y
        assert torch.equal(y, passed.out.reconstruction)
        expected = (x - y).abs().mean() + L2 * (x - y).square().mean() + LPIPS * (x - 2 * y).abs().mean()
        assert each.loss == pytest.approx(expected.item(), rel=1e-5)
        assert each.last is stage_1.model.decoder.out[-1].weight


def test_the_commitment_and_budget_losses(stage_1):
    for each, passed in zip(stage_1.backward, stage_1.forward):
        shares = naive.shares(passed.out.gate.detach())
        budget = sum((share - ratio) ** 2 for share, ratio in zip(shares, RATIOS))
        assert each.other == pytest.approx(passed.out.commitment.item() + BUDGET * budget, rel=1e-4)
        assert passed.out.commitment > 2e-4, "too small for the tolerance to notice that it is missing"


def test_the_adversarial_loss(stage_1):
    """It is minus the discriminator's mean logit, from step --gan-start on."""
    missing = [True] * 2 * GAN_START + [False] * 2 * (STEPS - GAN_START)
    assert [each.adversarial is None for each in stage_1.backward] == missing
    for each in stage_1.backward[2 * GAN_START:]:
        assert each.adversarial == pytest.approx(-each.score, rel=1e-4) and abs(each.score) > 1e-4
        assert each.gan_weight == GAN and 0 < each.weight <= 0.75 * GAN


def test_the_discriminator_loss(stage_1):
    assert len(stage_1.hinge) == 2 * (STEPS - GAN_START)
    for each in stage_1.hinge:
        for got, expected in zip((each.real, each.fake), each.expected):
            torch.testing.assert_close(got, expected)
        assert each.recon_grad is None, "the discriminator's loss has a gradient in the autoencoder"


def test_accumulated_gradients_are_averaged(stage_1):
    assert all(each.scale == 0.5 for each in stage_1.backward)
    weights = list(stage_1.discriminator.parameters())
    steps = [each for each in stage_1.steps if weights_of(each.optimizer) == weights]
    assert len(steps) == STEPS - GAN_START
    for step, first, second in zip(steps, stage_1.hinge[::2], stage_1.hinge[1::2]):
        for gradient, a, b in zip(step.gradients, first.grads, second.grads):
            torch.testing.assert_close(gradient, (a + b) / 2, atol=1e-6, rtol=1e-4)


def test_each_step_starts_without_gradients(stage_1):
    """Neither model nor discriminator has gradients before the first backward pass of a batch."""
    assert all(each.fresh for each in stage_1.backward[::2])


def test_the_optimisers_of_stage_1(stage_1):
    """One Adam has all weights of the model, another those of the discriminator. Both follow the schedule."""
    schedule = common.Schedule(steps=STEPS, batch_size=4, lr=1e-3)
    of_model, of_discriminator = (
        [each for each in stage_1.steps if weights_of(each.optimizer) == list(module.parameters())]
        for module in (stage_1.model, stage_1.discriminator))
    assert [each.after // 2 for each in of_model] == list(range(1, STEPS + 1))
    assert [each.after // 2 for each in of_discriminator] == list(range(GAN_START + 1, STEPS + 1))
    for each in of_model + of_discriminator:
        assert each.rates == {schedule.learning_rate(each.after // 2 - 1)}
        assert len(each.gradients) == len(each.moved), "some weights have no gradient"
        assert all(group["betas"] == BETAS for group in each.optimizer.param_groups)
        assert sum(each.moved) > 0.9 * len(each.moved)


def test_gradient_clipping_of_stage_1(stage_1):
    of_model = [each for each in stage_1.steps if len(each.gradients) == len(list(stage_1.model.parameters()))]
    norms = [norm_of(each.gradients) for each in of_model]
    assert len(norms) == STEPS and max(norms) == pytest.approx(0.5, rel=1e-3)


def test_the_logged_losses_of_stage_1(stage_1):
    """Losses are means over the accumulation steps. Validation metrics come last, and select the best checkpoint."""
    trained, validation = stage_1.read[-1], json.loads((stage_1.out / "vae.jsonl").read_text().splitlines()[-1])
    last, outs = stage_1.backward[-2:], [each.out for each in stage_1.forward[-2:]]
    expected = dict(loss=[each.loss + each.other for each in last], gan=[each.adversarial for each in last],
                    gan_weight=[each.weight.item() for each in last],
                    commitment=[out.commitment.item() for out in outs],
                    lpips=[(passed.x - 2 * each.y).abs().mean().item()
                           for passed, each in zip(stage_1.forward[-2:], last)])
    for name, parts in expected.items():
        assert trained[name] == pytest.approx(sum(parts) / 2, abs=2e-5), name
    assert validation["step"] == STEPS and trained["critic"] > 0 and trained["l1"] > 0
    loss = validation["l1"] + L2 * validation["l2"] + LPIPS * validation["lpips"]
    assert validation["loss"] == pytest.approx(loss, abs=1e-4)
    best = dq.load_checkpoint(stage_1.out / "vae.best.pt", "dq-vae")["best"]
    assert best == pytest.approx(validation["loss"], abs=1e-5)


def test_the_final_state_is_saved(stage_1):
    checkpoint = dq.load_checkpoint(stage_1.out / "vae.pt", "dq-vae")
    assert checkpoint["step"] == STEPS and checkpoint["preset"] == "toy"
    for name, x in stage_1.model.state_dict().items():
        assert torch.equal(x, checkpoint["weights"][name])
    settings = checkpoint["settings"]
    assert (settings["budget_weight"], settings["gan_start"], settings["l2_weight"], settings["seed"]) == (
        BUDGET, GAN_START, L2, 3)


def test_the_entropy_router_is_calibrated_on_2048_images(images, tmp_path, monkeypatch):
    """They are augmented training images, shuffled by the seed."""
    seen = SimpleNamespace()

    def loader(data, workers, **how):
        seen.data, seen.indices = data, how["sampler"]
        return [(torch.full((1,), float(i)), None) for i in range(5)]
    monkeypatch.setattr(train_vae, "loader", loader)
    monkeypatch.setattr(dq.EntropyRouter, "calibrate", lambda self, ratios, images, encoder: seen.__dict__.update(
        ratios=ratios, images=torch.cat(list(images)).tolist()))
    flags = ["--size", 16, "--router", "entropy", "--ratios", 0.7, 0.3, "--seed", 3, "--out", tmp_path, *CPU]
    record_of(train_vae.main, monkeypatch, "--data", images, *flags)
    assert seen.indices == next(common.shuffled_indices(len(seen.data), 2048, seed=3)) and len(seen.indices) == 2048
    assert seen.data.augment and seen.images == [0, 1, 2, 3, 4] and tuple(seen.ratios) == (0.7, 0.3)


def test_losses_of_stage_1_are_in_float32(images, tmp_path, monkeypatch):
    stop_at(monkeypatch, train_vae, "backward")
    flags = ["--size", 16, "--batch-size", 2, "--data", images, "--out", tmp_path, "--device", "cpu"]
    with pytest.raises(Reached) as end:
        train_vae.main([str(each) for each in (*flags, "--dtype", "bf16")])
    y, _, loss, _, other = end.value.args[0][:5]
    assert y.dtype == loss.dtype == other.dtype == torch.float32


def test_clip_0_does_not_clip(images, tmp_path, monkeypatch):
    def never(*args):
        raise AssertionError
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", never)
    stop_at(monkeypatch, common.Record, "save")                              # after the first step
    flags = ["--size", 16, "--batch-size", 2, "--steps", 1, "--clip", 0, "--data", images, "--out", tmp_path, *CPU]
    with pytest.raises(Reached):
        train_vae.main([str(flag) for flag in flags])


# ------------------------------------------------------------------------------------------------
# Stage 2


@pytest.fixture(scope="module")
def stage_2(stage_1, tmp_path_factory):
    """A run of four steps on those codes, with two gradient accumulation steps. -> the recorded calls"""
    out = tmp_path_factory.mktemp("stage_2")
    seen = SimpleNamespace(out=out, forward=[], evaluated=[], steps=[], added=[], seeds=[])
    config = dq.TransformerConfig(width=32, heads=2, position_layers=1, content_layers=1, label_dropout=0.0)
    schedule = train_transformer.TransformerSchedule(steps=4, batch_size=6, lr=1e-3, accumulate=2, eval_every=2)
    flags = ["--codes", stage_1.out / "codes.pt", "--out", out, "--clip", 0.05, "--seed", 3, "--preset", "toy", *CPU]

    def forward(self, pos, code, label=None, real=dq.DQTransformer.forward):
        if not torch.is_grad_enabled():
            seen.evaluated.append(SimpleNamespace(pos=pos, code=code, label=label))
            return real(self, pos, code, label)
        with torch.no_grad():
            twin = copy.deepcopy(self)
        seen.forward.append(SimpleNamespace(pos=pos, code=code, label=label, training=self.training, model=twin))
        seen.names = {id(p): name for name, p in self.named_parameters()}
        return real(self, pos, code, label)

    def spy(owner):
        def step(self, *args, real=owner.step, **kwargs):
            weights = weights_of(self)
            gradients = {seen.names[id(p)]: p.grad.clone() for p in weights}
            old = [p.detach().clone() for p in weights]
            real(self, *args, **kwargs)
            seen.steps.append(SimpleNamespace(kind=owner.__name__, gradients=gradients, after=len(seen.forward) // 2,
                                              rates={group["lr"] for group in self.param_groups},
                                              moved=[not torch.equal(a, b) for a, b in zip(old, weights)]))
        return step

    def seed_all(*numbers, real=common.seed_all):
        seen.seeds.append((numbers, len(seen.forward) // 2))
        real(*numbers)

    def add(self, done, terms, *scale, real=common.Record.add):
        seen.added.append({name: term.item() for name, term in terms.items()})
        return real(self, done, terms, *scale)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train_transformer.PRESETS, "toy", (config, schedule))
        patch.setattr(train_transformer, "save_samples", functools.partial(train_transformer.save_samples, n=1))
        for owner, name, spied in ((dq.DQTransformer, "forward", forward), (common.Record, "add", add),
                                   (train_transformer, "seed_all", seed_all),
                                   (torch.optim.AdamW, "step", spy(torch.optim.AdamW)),
                                   (train_transformer.Muon, "step", spy(train_transformer.Muon))):
            patch.setattr(owner, name, spied)
        assert call(train_transformer.main, *flags) is None
    seen.stored = dq.load_checkpoint(stage_1.out / "codes.pt", "dq-codes")
    return seen


def images_in(stored, part, layout):
    """-> pos, code, label of all views of all images in a part of codes.pt."""
    codes, grains = (stored[part][name].flatten(0, 1).long() for name in ("codes", "grains"))
    views = stored[part]["codes"].shape[1]
    return *layout.pack(codes, grains), [int(y) for y in stored[part]["label"] for _ in range(views)]


def rows(*batch):
    """The images of a batch, sorted: the pairs of each without padding, and its label."""
    return sorted((tuple(p for p in pos.tolist()[:n]), tuple(code.tolist()[:n]), int(y))
                  for pos, code, y in zip(*batch) for n in [int((code >= 0).nonzero().max()) + 2])


def test_batches_of_codes_follow_the_seed(stage_2):
    """Each image occurs once per epoch, with its label, in the order that the seed determines."""
    pos, code, label = images_in(stage_2.stored, "train", stage_2.forward[0].model.layout)
    n = len(label)
    batches = zip(stage_2.forward[::2], stage_2.forward[1::2])
    for parts, indices in zip(batches, common.shuffled_indices(n, 6, seed=3)):
        got = [row for part in parts for row in rows(part.pos, part.code, part.label)]
        index = [i % n for i in indices]
        assert sorted(got) == rows(pos[index], code[index], [label[i] for i in index])
    assert len(set(label)) == 4


def test_the_gradient_of_stage_2(stage_2):
    """It is that of the position and content losses, per code, averaged over the batch, and then clipped."""
    layout = stage_2.forward[0].model.layout
    _, code, _ = images_in(stage_2.stored, "train", layout)
    codes_per_image = (code >= 0).sum().item() / len(code)
    for n in range(4):
        model, loss = stage_2.forward[2 * n].model, 0.0
        for part in stage_2.forward[2 * n:2 * n + 2]:
            position, content = model.eval().logits(part.pos, part.code, part.label)
            real = part.code >= 0
            loss -= position.log_softmax(-1).gather(-1, part.pos[..., None]).sum()
            loss -= content.log_softmax(-1).gather(-1, part.code.clamp(min=0)[..., None])[..., 0][real].sum()
        (loss / 6 / codes_per_image).backward()
        expected = {name: p.grad for name, p in model.named_parameters()}
        norm = norm_of(expected.values())
        assert norm > 0.05, "the norm is too small to be clipped"
        got = {}
        for step in stage_2.steps:
            if step.after == n + 1:
                got |= step.gradients
        assert got.keys() == expected.keys()
        for name, gradient in got.items():
            torch.testing.assert_close(gradient, expected[name] * 0.05 / norm, atol=1e-6, rtol=1e-3, msg=name)


def test_the_optimisers_of_stage_2(stage_2):
    schedule = common.Schedule(steps=4, batch_size=6, lr=1e-3)
    for kind in ("AdamW", "Muon"):
        steps = [step for step in stage_2.steps if step.kind == kind]
        assert [step.after for step in steps] == [1, 2, 3, 4]
        assert [step.rates for step in steps] == [{schedule.learning_rate(n)} for n in range(4)]
        assert all(any(step.moved) for step in steps[2:])                    # zero-initialised heads move first
    assert all(part.training for part in stage_2.forward)


def test_stage_2_evaluates_all_validation_images(stage_2):
    """With their labels. This run evaluates twice."""
    batch = images_in(stage_2.stored, "held_out", stage_2.forward[0].model.layout)
    got = [row for each in stage_2.evaluated for row in rows(each.pos, each.code, each.label)]
    assert sorted(got) == sorted(2 * rows(*batch))


def test_the_logged_losses_of_stage_2(stage_2):
    for part, terms in zip(stage_2.forward, stage_2.added):
        with torch.no_grad():
            nll = part.model.eval()(part.pos, part.code, part.label)
        position, content = (nll[name].sum().item() / 6 for name in ("position", "content"))
        assert terms["position_nats"] == pytest.approx(position, rel=1e-4)
        assert terms["content_nats"] == pytest.approx(content, rel=1e-4)
    _, code, _ = images_in(stage_2.stored, "train", part.model.layout)
    bits = (position + content) / math.log(2) / ((code >= 0).sum().item() / len(code))
    assert terms["bits_per_code"] == pytest.approx(bits, rel=1e-4)


@pytest.mark.parametrize("stage", ["vae", "transformer"])
def test_only_rank_0_writes_files(stage, stage_1, images, tmp_path, monkeypatch):
    """If several ranks wrote a file of the same name, the run could fail."""
    module, flags = train_vae, ["--data", images, "--size", 16]
    if stage == "transformer":
        module, flags = train_transformer, ["--codes", stage_1.out / "codes.pt", "--width", 32, "--heads", 2]
    monkeypatch.setattr(dq, "rank_world", lambda: (1, 2))
    monkeypatch.setattr(dq, "all_reduce_sum", lambda x: x)
    monkeypatch.setattr(module, "distribute", lambda model: model)
    flags += ["--batch-size", 4, "--steps", 2, "--eval-every", 1, "--save-every", 1, "--out", tmp_path, *CPU]
    module.main([str(flag) for flag in flags])
    assert list(tmp_path.iterdir()) == []


def test_evaluating_stage_2_more_often_changes_nothing(stage_1, tmp_path, monkeypatch):
    flags = ["--codes", stage_1.out / "codes.pt", "--width", 32, "--heads", 2, "--position-layers", 1,
             "--content-layers", 1, "--dropout", 0.2, "--batch-size", 4, "--steps", 2, *CPU]
    monkeypatch.setattr(train_transformer, "save_samples", functools.partial(train_transformer.save_samples, n=1))
    weights = []
    for every in (1, 2):
        assert call(train_transformer.main, *flags, "--eval-every", every, "--out", tmp_path / str(every)) is None
        checkpoint = dq.load_checkpoint(tmp_path / str(every) / "transformer.pt", "dq-transformer")
        weights.append(checkpoint["weights"])
    assert all(torch.equal(a, b) for a, b in zip(*(each.values() for each in weights)))


# ------------------------------------------------------------------------------------------------
# Flags


class Reached(Exception):
    """Ends a script as soon as the test knows enough."""


def stop_at(monkeypatch, owner, name):
    def reached(*args, **kwargs):
        raise Reached(args, kwargs)
    monkeypatch.setattr(owner, name, reached)


def record_of(main, monkeypatch, *flags):
    """-> the Record of a trainer, which ends before its first step."""
    stop_at(monkeypatch, common.Record, "steps")
    with pytest.raises(Reached) as end:
        main([str(flag) for flag in flags])
    return end.value.args[0][0]


VAE_FLAGS = {"--size": 32, "--codebook-size": 24, "--code-dim": 6, "--steps": 7, "--batch-size": 6, "--lr": 0.25,
             "--eval-every": 3, "--accumulate": 2, "--clip": 0.75, "--budget-weight": 2.5, "--perceptual-weight": 0.125,
             "--gan-weight": 0.375, "--gan-start": 5, "--seed": 9, "--save-every": 4, "--router": "random"}
TRANSFORMER_FLAGS = {"--position-layers": 3, "--content-layers": 5, "--width": 48, "--heads": 3, "--dropout": 0.125,
                     "--label-dropout": 0.25, "--steps": 7, "--batch-size": 6, "--lr": 0.25, "--eval-every": 3,
                     "--accumulate": 2, "--clip": 0.75, "--seed": 9, "--save-every": 4, "--optimizer": "adamw"}


@pytest.mark.parametrize("stage", ["vae", "transformer"])
def test_every_flag_reaches_the_run(stage, stage_1, images, tmp_path, monkeypatch):
    """Each is found in the configuration, the schedule or the record. Without flags, these equal the preset."""
    monkeypatch.setattr(train_vae.Perceptual, "load", lambda files: Distance())
    opened, streams, real = [], [], reading.open_data
    monkeypatch.setattr(train_vae, "open_data", lambda *args, **how: (opened.append(how), real(*args, **how))[1])
    monkeypatch.setattr(train_vae, "stream", lambda data, *how: streams.append(how))
    module, flags = (train_vae, VAE_FLAGS) if stage == "vae" else (train_transformer, TRANSFORMER_FLAGS)
    both = ["--data", images] if stage == "vae" else ["--codes", stage_1.out / "codes.pt"]
    both += ["--out", tmp_path, *CPU]
    more = ["--uncond"]
    if stage == "vae":
        other = tmp_path / "held out"
        shutil.copytree(images, other)
        more = ["--factors", 4, 2, "--ratios", 0.25, 0.75, "--no-flip", "--held-out", other, "--workers", 1]
    record = record_of(module.main, monkeypatch, *both, *itertools.chain(*flags.items()), *more)
    found = asdict(record.config) | record.settings | dict(save_every=record.args.save_every)
    for flag, value in flags.items():
        assert found[flag[2:].replace("-", "_")] == value, flag
    if stage == "vae":
        assert (record.config.factors, record.config.ratios) == ((4, 2), (0.25, 0.75))
        assert streams[-1] == (6, 9, 0, 1, 2)           # batch size, seed, first step, workers, accumulation steps
        assert opened[-1].pop("found").root == str(images)                   # the folder is searched once
        assert opened[-1] == dict(augment=True, seed=9, skip=tmp_path, flip=False, held_out=other)
    else:
        assert record.config.classes == ()
    for preset in ("toy", "emoji64"):
        record = record_of(module.main, monkeypatch, *both, "--preset", preset)
        config, schedule = module.PRESETS[preset]
        schedule = asdict(schedule)
        sampling = schedule.pop("sampling", dq.SampleOptions())              # stage 2 has them; they are no setting
        assert record.settings.items() >= schedule.items() and record.args.save_every == schedule["eval_every"]
        if stage == "vae":
            assert record.config == config
        else:
            assert record.config.classes == ("circle", "cross", "square", "triangle")
            assert (record.config.width, record.config.size, record.config.codebook_size) == (config.width, 24, 16)
            assert record.extra["sample_options"] == sampling._asdict()


def test_no_flip(images, tmp_path, monkeypatch):
    """Without it, codes.pt has mirror images of the training images. It never has any of validation images."""
    for flags, mirrored in (([], [True, False]), (["--no-flip"], [False, False])):
        encoded = []
        monkeypatch.setattr(train_vae, "encode_dataset", lambda vae, data, device, autocast, workers, mirrored, *more: (
            encoded.append(mirrored), dict(label=torch.zeros(len(data))))[1])
        flags = ["--size", 16, "--batch-size", 2, "--steps", 1, "--data", images, "--out", tmp_path, *flags, *CPU]
        assert call(train_vae.main, *flags) is None
        assert encoded == mirrored


def test_factors_without_ratios_get_equal_ratios():
    assert train_vae.parse(["--factors", "8", "4", "2"])[1].ratios == (1 / 3,) * 3
    triple = ["--preset", "imagenet256-triple", "--factors", "32", "16", "8"]
    assert train_vae.parse(triple)[1].ratios == (0.4, 0.3, 0.3)              # those of a preset with as many factors


@pytest.mark.parametrize("stage", ["vae", "transformer"])
def test_the_seed_determines_the_initial_weights(stage, stage_1, images, tmp_path, monkeypatch):
    module, both = train_vae, ["--data", images, "--size", 16]
    if stage == "transformer":
        module, both = train_transformer, ["--codes", stage_1.out / "codes.pt", "--width", 32, "--heads", 2]
    first = []
    for seed in (1, 1, 2):
        model = record_of(module.main, monkeypatch, *both, "--out", tmp_path, "--seed", seed, *CPU).model
        first.append([p.detach() for p in model.parameters() if p.dim() > 1][1])
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])


# ------------------------------------------------------------------------------------------------
# Sampling


CLASSES = ("apple", "pear", "plum")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random model of three granularities and three classes -> the path of its checkpoint"""
    path = tmp_path_factory.mktemp("checkpoint") / "transformer.pt"
    model = tiny(16, (8, 4, 2), V=16, classes=CLASSES)
    vae = dq.DQVAE(dq.VAEConfig(size=16, factors=(8, 4, 2), ratios=(0.4, 0.3, 0.3), codebook_size=16, channels=32,
                                multipliers=(1,)))
    vae.codebook.codes.normal_()
    dq.save_checkpoint(path, "dq-transformer", model.config, model, vae_config=asdict(vae.config),
                       vae_weights=vae.state_dict())
    return path


def generate_args(monkeypatch, checkpoint, *flags):
    """-> the arguments with which sample.main calls dq.generate."""
    monkeypatch.chdir(checkpoint.parent)
    stop_at(monkeypatch, dq, "generate")
    with pytest.raises(Reached) as end:
        sample.main([str(each) for each in (checkpoint, *CPU, *flags)])
    (model, label, options, seed, given), how = end.value.args
    dtype = {p.dtype for p in model.parameters()}
    return SimpleNamespace(label=label.tolist(), options=options, seed=seed, given=given, dtype=dtype, **how)


def test_flags_reach_the_sampler(checkpoint, monkeypatch):
    def args_of(*flags):
        return generate_args(monkeypatch, checkpoint, *flags)

    plain = args_of("--n", 5)
    assert plain.label == [0, 1, 2, 0, 1] and plain.options == dq.SampleOptions(0.7, 0, 1.0, 2.0)
    assert (plain.seed, plain.given, plain.slots) == (0, None, 64)
    assert plain.dtype == {torch.float32} and plain.compile is False
    other = args_of("--n", 4, "--batch-size", 2, "--label", "pear", "--temperature", 0.9, "--top-k", 3,
                    "--top-p", 0.8, "--cfg", 1.5, "--seed", 11, "--compile", "--dtype", "bf16")
    assert other.label == [1] * 4 and other.options == dq.SampleOptions(0.9, 3, 0.8, 1.5)
    assert (other.seed, other.given, other.slots) == (11, None, 2)
    assert other.dtype == {torch.bfloat16} and other.compile is True
    assert args_of("--n", 2, "--label", 2).label == [2, 2]


def test_a_large_job_saves_what_one_batch_would(checkpoint, tmp_path, monkeypatch):
    """Every image is saved once, under its own index, whatever the batch size."""
    saved, folders, real = [], [], sample.save_picture
    monkeypatch.setattr(sample, "save_picture", lambda path, picture: (saved.append(path.name), real(path, picture)))
    for batch_size in (2, 5):
        saved.clear()
        folders.append(tmp_path / str(batch_size))
        flags = ["--n", 5, "--batch-size", batch_size, "--save-dir", folders[-1], "--out", tmp_path, *CPU]
        assert call(sample.main, checkpoint, *flags) is None
        assert saved == [f"{i:06d}.png" for i in range(5)]
    several, one = ({path.name: path.read_bytes() for path in folder.glob("*.png")} for folder in folders)
    assert several == one and len(set(one.values())) == 5
    model, vae = dq.load_transformer(checkpoint, "cpu")
    pos, code = dq.generate(model, torch.arange(5) % 3, dq.SampleOptions(0.7, cfg=2.0))
    with torch.no_grad():
        expected = vae.decode(model.layout.unpack(pos, code)[0])
    for i, x in enumerate(expected):
        image = np.asarray(Image.open(folders[0] / f"{i:06d}.png")).astype(int)
        assert np.abs(image - ((x.permute(1, 2, 0).numpy() + 1) * 127.5).clip(0, 255)).max() <= 0.51
    told = json.loads((folders[0] / "samples.json").read_text())
    assert told["n"] == 5 and told["seed"] == 0
    with pytest.raises(dq.UserError, match="no images below"):               # samples are never read as data
        reading.find_images(tmp_path)


def test_a_grid_of_samples(checkpoint, tmp_path, monkeypatch):
    """It shows at most 32 images, each beside its boxes, with its class and its number of codes."""
    stop_at(monkeypatch, sample, "save_grid")
    model, _ = dq.load_transformer(checkpoint, "cpu")
    _, code = dq.generate(model, torch.arange(34) % 3, dq.SampleOptions(0.7, cfg=2.0))
    with pytest.raises(Reached) as end:
        flags = [checkpoint, "--n", 34, "--batch-size", 20, "--out", tmp_path / "x.png", *CPU]
        sample.main([str(each) for each in flags])
    (path, tiles), how = end.value.args
    assert path == tmp_path / "x.png" and len(tiles) == len(how["captions"]) == 64
    assert list(how["captions"][::2]) == [CLASSES[i % 3] for i in range(32)]
    assert list(how["captions"][1::2]) == [f"{int((row >= 0).sum())} codes" for row in code[:32]]


def test_images_of_a_larger_job(checkpoint, tmp_path):
    for name in ("000003.png", "notes.png"):
        (tmp_path / name).touch()
    flags = [str(checkpoint), "--save-dir", str(tmp_path)]
    assert sample.parse([*flags, "--n", "4"]).out == checkpoint.parent / "samples.png"  # 3 is the last of four
    with pytest.raises(dq.UserError, match="000003.png is of a larger job"):
        sample.parse([*flags, "--n", "3"])


def test_a_granularity_map_fixes_all_positions(checkpoint, tmp_path, monkeypatch):
    """It fixes no content."""
    picture = Image.new("L", (40, 40), 0)
    picture.paste(255, (20, 0, 40, 20))                                      # the second region is fine
    picture.save(tmp_path / "map.png")
    pos, code = (each[0].tolist() for each in generate_args(
        monkeypatch, checkpoint, "--n", 1, "--grain-map", tmp_path / "map.png").given)
    layout = dq.Layout(16, (8, 4, 2))
    expected = [p for p, _ in naive.pack(layout, torch.zeros(8, 8), torch.tensor([[0, 2], [0, 0]]))]
    assert pos == expected + [layout.end] * (layout.max_len - len(expected)) and set(code) == {-1}


def test_a_photo_fixes_its_coarse_codes(checkpoint, images, monkeypatch):
    """In every image, those of the --keep coarsest granularities, by default 1, are given. All others are sampled."""
    photo, layout = next(images.rglob("*.png")), dq.Layout(16, (8, 4, 2))
    _, vae = dq.load_transformer(checkpoint, "cpu")
    grains = torch.tensor([[[0, 1], [2, 1]]])
    codes = dq.upsample(torch.arange(4).view(1, 2, 2), 8)
    monkeypatch.setattr(dq.DQVAE, "encode", lambda self, x: (codes, grains))
    pairs = naive.pack(layout, codes[0], grains[0])
    for flags, keep in (((), 1), (("--keep", 0), 0), (("--keep", 2), 2), (("--keep", 3), 3)):
        given = generate_args(monkeypatch, checkpoint, "--n", 2, "--input", photo, *flags).given
        assert [each.shape for each in given] == [(2, layout.max_len)] * 2
        for b in range(2):
            found = list(zip(given[0][b].tolist(), given[1][b].tolist()))
            kept = [naive.where(layout, p)[0] < keep for p, _ in pairs]
            assert found[:len(pairs)] == [pair if k else (-1, -1) for pair, k in zip(pairs, kept)]


def test_an_animation_adds_the_codes_one_by_one(checkpoint, tmp_path, monkeypatch):
    """Each frame is the decoded image where there are codes so far, and grey elsewhere. The last frame has all."""
    saved, real = [], sample.save_picture
    monkeypatch.setattr(sample, "save_picture", lambda path, *rest, **how: (saved.append((path, rest, how)),
                                                                            real(path, *rest, **how)))
    flags = ["--n", 3, "--batch-size", 1, "--label", 0, "--gif", tmp_path / "x.gif", "--out", tmp_path, *CPU]
    assert call(sample.main, checkpoint, *flags) is None
    (path, (first,), how), = saved
    frames = [np.asarray(each) for each in (first, *how["append_images"])]
    model, vae = dq.load_transformer(checkpoint, "cpu")
    pos, code = dq.generate(model, torch.tensor([0]), dq.SampleOptions(0.7, cfg=2.0))
    pairs = [(int(p), int(c)) for p, c in zip(pos[0], code[0])]
    length = pairs.index((model.layout.end, -1))
    assert path == tmp_path / "x.gif" and len(frames) == min(length, 80)
    assert how["duration"] == [60] * (len(frames) - 1) + [2000]
    codes = model.layout.unpack(pos, code)[0]
    with torch.no_grad():
        complete = common.to_picture(vae.decode(codes)[0], 256)
    assert (frames[-1] == np.asarray(complete)).all()
    for t in (1, length // 2):
        there = np.zeros((256, 256), bool)
        for p, _ in pairs[:t]:
            k, row, column = naive.where(model.layout, p)
            if row is not None:
                side = 256 // model.layout.sides[k]
                there[row * side:(row + 1) * side, column * side:(column + 1) * side] = True
        assert (frames[t - 1][~there] == 128).all() and (frames[t - 1][there] != 128).any() == there.any()
    assert there.any() and not there.all()
