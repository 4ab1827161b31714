"""train_transformer.py: codes.pt, batches, evaluation, and the script as a whole.

    parse                        test_the_preset_comes_with_the_codes; fit: test_presets.py
    read_codes                   test_the_error_for_invalid_codes_says_what_to_do
    Images, sequences            test_uncond_hides_the_labels, and in test_train_vae.py
                                 test_encoding_keeps_every_image_and_its_mirror_image
    batches                      test_batches_of_stage_2
    evaluate                     test_evaluation_of_a_transformer, test_evaluation_is_no_wider_than_needed,
                                 test_a_limited_evaluation_takes_the_same_images
    save_samples                 test_samples_of_a_run
    Muon                         test_muon_in_float32_equals_that_of_torch_up_to_rounding
    make_optimizers              test_which_weights_decay
    main                         test_codes_are_all_that_stage_2_reads and the tests after it, test_wiring.py
"""
import copy
import itertools
import math
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import data as reading
import dq
import sample
import train_transformer
import train_vae
from conftest import DEVICE, TRANSFORMER, VAE, call, plain
from runs import read_log
from test_layout import random_image
from test_transformer import tiny


def images_of(codes, grains, label=None):
    """-> Images, as train_transformer.py reads them. Without labels, no image has a class."""
    label = torch.full((len(codes),), -1) if label is None else label
    part = dict(codes=codes[:, None].byte(), grains=grains[:, None].byte(), label=label)
    return train_transformer.Images(part, (4, 2))


def test_uncond_hides_the_labels():
    part = dict(codes=torch.zeros(3, 2, 4, 4), grains=torch.zeros(3, 2, 2, 2), label=torch.tensor([5, 6, 7]))
    labels = [train_transformer.Images(part, (4, 2), uncond).label.tolist() for uncond in (False, True)]
    assert labels == [[5, 5, 6, 6, 7, 7], [-1] * 6]


def test_evaluation_of_a_transformer():
    """It applies no dropout and uses the labels. The metrics do not depend on how the images are batched."""
    model = tiny(8, (4, 2), V=5, classes=("a", "b"), dropout=0.5)
    grains, label = torch.randint(0, 2, (6, 2, 2)), torch.arange(6) % 2
    grains[:2] = 1                                                           # the longest sequences
    codes = random_image(model.layout, grains, 5)
    pos, code = model.layout.pack(codes, grains)
    images = images_of(codes, grains, label)
    model.train()
    metrics = train_transformer.evaluate(model, images, torch.device("cpu"), plain, batch_size=4)
    assert model.training
    model.eval()
    nats = []
    with torch.no_grad():
        for b in range(6):                                                   # one image and one code at a time
            position, content = model.logits(pos[b:b + 1], code[b:b + 1], label[b:b + 1])
            logp = 0.0
            for t in range(pos.shape[1]):
                logp += float(position[0, t].log_softmax(-1)[pos[b, t]])
                if code[b, t] >= 0:
                    logp += float(content[0, t].log_softmax(-1)[code[b, t]])
            nats.append(-logp)
    n_codes = (code >= 0).sum().item() / 6
    assert metrics["nats_per_image"] == pytest.approx(sum(nats) / 6, rel=1e-4)
    assert metrics["bits_per_code"] == pytest.approx(sum(nats) / 6 / math.log(2) / n_codes, rel=1e-4)
    assert metrics["bits_per_pixel"] == pytest.approx(sum(nats) / 6 / math.log(2) / 64, rel=1e-4)


def test_evaluation_is_no_wider_than_needed(monkeypatch):
    model = tiny(8, (4, 2), V=5)
    grains = torch.zeros(5, 2, 2, dtype=torch.long)                          # 4 codes and 2 EOS tokens each ...
    grains[1], grains[3] = 1, 1                                              # ... except for two images of 16 codes
    images = images_of(random_image(model.layout, grains, 5), grains)
    widths, real = [], train_transformer.sequences

    def sequences(*args):
        batch = real(*args)
        widths.append(tuple(batch[0].shape))
        return batch
    monkeypatch.setattr(train_transformer, "sequences", sequences)
    train_transformer.evaluate(model, images, torch.device("cpu"), plain, batch_size=3)
    assert widths == [(3, 6), (2, 18)]


def test_a_limited_evaluation_takes_the_same_images(monkeypatch):
    """They are spread over all images."""
    model, grains, taken, real = tiny(8, (4, 2), V=5), torch.randint(0, 2, (90, 2, 2)), [], train_transformer.sequences
    images = images_of(random_image(model.layout, grains, 5), grains)
    monkeypatch.setattr(train_transformer, "sequences", lambda all_images, index, *how: (
        taken[-1].extend(index.tolist()), real(all_images, index, *how))[1])
    metrics = []
    for _ in range(2):
        taken.append([])
        metrics.append(train_transformer.evaluate(model, images, torch.device("cpu"), plain, limit=9))
    assert sorted(taken[0]) == sorted(set(taken[1])) and len(taken[0]) == 9 and max(taken[0]) > 30
    with torch.no_grad():
        nll = model.eval()(*real(images, torch.tensor(taken[0]), model.layout, torch.device("cpu")))
    expected = (nll["position"] + nll["content"]).mean().item()
    assert metrics[0]["nats_per_image"] == metrics[1]["nats_per_image"] == pytest.approx(expected, rel=1e-4)


def test_samples_of_a_run(tmp_path, monkeypatch):
    """They cycle through the classes, in evaluation mode, with the seed of the run."""
    model, asked, real = tiny(16, (8, 4), V=16, classes=("a", "b", "c"), dropout=0.5), [], dq.generate
    vae = dq.DQVAE(dq.VAEConfig(size=16, codebook_size=16)).eval()

    def generate(model, label, *how, slots):
        asked.append((model.training, label.tolist(), how, slots))
        return real(model, label, *how, slots=slots)
    monkeypatch.setattr(dq, "generate", generate)
    model.train()
    options = dq.SampleOptions(0.8, 3)
    train_transformer.save_samples(tmp_path / "x.png", model, vae, options, 7, plain, n=5, batch_size=2)
    assert asked == [(False, [0, 1, 2, 0, 1], (options, 7), 2)] and model.training
    assert Image.open(tmp_path / "x.png").size == (8 * 130 - 2, 2 * 130 - 2)


def test_which_weights_decay():
    """Matrices decay, vectors do not. Muon updates the matrices of the blocks, AdamW all other weights."""
    model, sets = tiny(8, (4, 2), V=5, classes=("a", "b"), width=128), {}
    blocks = [p for stack in (model.position_stack, model.content_stack) for p in stack.parameters()]
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) == many] for many in (True, False))
    for name in ("muon", "adamw"):
        schedule = train_transformer.TransformerSchedule(steps=1, batch_size=1, lr=0.02, betas=(0.8, 0.95),
                                                         weight_decay=0.3, optimizer=name)
        optimizers = train_transformer.make_optimizers(model, schedule)
        groups = [group for each in optimizers.values() for group in each.param_groups]
        assert sorted(id(p) for group in groups for p in group["params"]) == sorted(map(id, model.parameters()))
        decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
        assert decay == {id(p): 0.3 for p in matrices} | {id(p): 0.0 for p in vectors}
        assert {group["lr"] for group in groups} == {0.02}
        adamw = optimizers["optimizer"]
        assert isinstance(adamw, torch.optim.AdamW)
        assert all(group["betas"] == (0.8, 0.95) for group in adamw.param_groups)
        sets[name] = optimizers
    assert list(sets["adamw"]) == ["optimizer"]
    muon = sets["muon"]["muon"]
    assert {id(p) for p in muon.param_groups[0]["params"]} == {id(p) for p in blocks if p.dim() == 2}
    assert [muon.param_groups[0][name] for name in ("momentum", "nesterov", "ns_steps")] == [0.95, True, 5]
    # the RMS of an update is 0.2 times the learning rate, about that of AdamW
    schedule = train_transformer.TransformerSchedule(steps=1, batch_size=1, lr=0.02)
    for kind in (train_transformer.Muon, torch.optim.Muon):
        muon = train_transformer.make_optimizers(model, schedule, kind)["muon"]
        p = muon.param_groups[0]["params"][0]
        p.grad, before = torch.randn_like(p), p.detach().clone()
        muon.step()
        assert (p.detach() - before).square().mean().sqrt().item() == pytest.approx(0.2 * 0.02, rel=0.3)


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)])
def test_muon_in_float32_equals_that_of_torch_up_to_rounding(shape):
    """Each can load the state of the other, so a run can resume on another machine."""
    weights = [torch.nn.Parameter(torch.ones(shape)) for _ in range(2)]
    how, generator = dict(lr=0.02, weight_decay=0.3, adjust_lr_fn="match_rms_adamw"), torch.manual_seed(0)
    ours, torchs = train_transformer.Muon(weights[:1], **how), torch.optim.Muon(weights[1:], **how)
    for _ in range(3):
        before = weights[0].detach().clone()
        gradient = torch.randn(shape, generator=generator)
        for p, optimizer in zip(weights, (ours, torchs)):
            p.grad = gradient.clone()
            optimizer.step()
        update, expected = (p.detach() - before * (1 - 0.02 * 0.3) for p in weights)
        assert (update - expected).norm() < 0.03 * expected.norm()
        ours_state, torchs_state = ours.state_dict(), torchs.state_dict()
        assert ours_state["param_groups"] == torchs_state["param_groups"]
        torch.testing.assert_close(ours_state["state"], torchs_state["state"])
        weights[0].data.copy_(weights[1])
        ours.load_state_dict(copy.deepcopy(torchs_state))


def test_optimizer_and_decay_of_the_presets():
    """Our presets use Muon and a linear decay of the learning rate. The paper's use AdamW and a cosine."""
    for name, (_, schedule) in train_transformer.PRESETS.items():
        papers = name in ("toy-paper", "ffhq256", "imagenet256", "imagenet256-triple")
        assert schedule.optimizer == ("adamw" if papers else "muon"), name
        near_the_end = schedule.learning_rate(schedule.warmup + 0.75 * (schedule.steps - schedule.warmup))
        assert near_the_end / schedule.lr == pytest.approx(0.1464 if papers else 0.25, rel=1e-3), name


def test_batches_of_stage_2():
    """Each epoch has every sequence once, in its own order. Each batch is sorted and depends only on its number."""
    length = np.random.default_rng(0).integers(6, 18, size=12)
    dealt = list(itertools.islice(train_transformer.batches(length, 4, seed=5), 9))
    epochs = [torch.cat(dealt[e:e + 3]).tolist() for e in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) == 3
    assert all((np.diff(length[batch]) >= 0).all() for batch in dealt)
    for start in (1, 4, 8):
        assert torch.equal(next(train_transformer.batches(length, 4, seed=5, start=start)), dealt[start])
    big = next(train_transformer.batches(length, 30, seed=5)).tolist()       # more than an epoch
    assert all(2 <= big.count(i) <= 3 for i in range(12))


# ------------------------------------------------------------------------------------------------
# The script


def test_the_preset_comes_with_the_codes(vae_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train_transformer.parse([])[1:] == train_transformer.PRESETS["toy"]  # there is no codes.pt
    (tmp_path / "out").mkdir()
    codes = torch.load(vae_run / "codes.pt", weights_only=True)
    for preset, found in (("emoji64", "emoji64"), ("earth64", "earth64")):
        torch.save(codes | dict(preset=preset), "out/codes.pt")
        os.replace("out/codes.pt", "elsewhere.pt")
        args, config, schedule = train_transformer.parse(["--codes", "elsewhere.pt", "--heads", "4"])
        preset, expected = train_transformer.PRESETS[found]
        assert args.preset == found and (config, schedule) == (replace(preset, heads=4), expected)
    torch.save(codes | dict(preset="emoji64"), "out/codes.pt")
    assert train_transformer.parse([])[1].width == 160
    args, config, schedule = train_transformer.parse(["--preset", "toy", "--steps", "3"])  # flags take precedence
    assert (args.preset, config.width, schedule.steps) == ("toy", 192, 3)


def test_the_path_of_the_codes_may_begin_with_a_tilde(vae_run, tmp_path, monkeypatch):
    """`parse` reads the name of the preset from the same file as `main`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    torch.save(torch.load(vae_run / "codes.pt", weights_only=True) | dict(preset="emoji64"), tmp_path / "codes.pt")
    for flags in (["--codes=~/codes.pt"], ["--out=~/"]):
        args = train_transformer.parse(flags)[0]
        assert (args.preset, args.codes) == ("emoji64", tmp_path / "codes.pt")


@pytest.mark.parametrize("how", ["cut", "a bit flipped", "empty", "of another version", "a list"])
def test_the_error_for_invalid_codes_says_what_to_do(how, vae_run, tmp_path):
    path = tmp_path / "codes.pt"
    data = bytearray((vae_run / "codes.pt").read_bytes())
    if how == "a bit flipped":
        data[len(data) // 2] ^= 1
    path.write_bytes(dict(cut=data[:-1000], empty=b"").get(how, data))
    if how == "of another version":
        torch.save(torch.load(path, weights_only=True) | dict(version=2), path)
    elif how == "a list":
        torch.save([1], path)
    line = call(train_transformer.main, "--out", tmp_path, *TRANSFORMER, "--steps", 1)
    assert line.startswith("error: ") and "\n" not in line
    assert {each.name for each in tmp_path.iterdir()} == {".lock", "codes.pt"}
    assert f"python train_vae.py --encode {tmp_path / 'vae.pt'} --out {tmp_path}" in line


def test_codes_are_all_that_stage_2_reads(vae_run, tmp_path, monkeypatch):
    """A course can hand out this one file; stage 2 and sampling need no images."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    shutil.copy(vae_run / "codes.pt", "out")
    for module, name in ((reading, "open_image"), (reading, "open_data"), (reading, "ToyShapes")):
        monkeypatch.setattr(module, name, None)
    before = (tmp_path / "out/codes.pt").read_bytes()
    assert call(train_transformer.main, *TRANSFORMER, "--steps", 2) is None
    assert call(sample.main, "--n", 2, "--device", DEVICE) is None
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        ".lock", "codes.pt", "transformer.pt", "transformer.best.pt", "transformer.jsonl", "transformer.png",
        ".samples.png.lock", "samples.png"}
    assert (tmp_path / "out/codes.pt").read_bytes() == before


def load_settings(path, kind):
    return dq.load_checkpoint(path, kind)["settings"]


def test_the_first_lines_name_the_device_and_the_data(images, tmp_path, capsys):
    flags = ["--out", str(tmp_path), "--steps", "1"]
    train_vae.main([*flags, *VAE, "--data", str(images)])
    train, held_out = reading.open_data(images, 16)
    device, first = capsys.readouterr().out.splitlines()[:2]
    assert device == "{device}, {dtype}, torch {torch}".format(**load_settings(tmp_path / "vae.pt", "dq-vae"))
    assert first == reading.describe(train, held_out) and len(train) + len(held_out) == 16
    train_transformer.main([*flags, *TRANSFORMER])
    device, first = capsys.readouterr().out.splitlines()[:2]
    settings = load_settings(tmp_path / "transformer.pt", "dq-transformer")
    assert device == "{device}, {dtype}, torch {torch}".format(**settings)
    assert first.startswith(f"codes: {tmp_path / 'codes.pt'}, {len(train)} images (checksum ")
    assert f", {10 * len(train)} views of them to train on, {len(held_out)} images for validation; 4 classes" in first


@pytest.mark.parametrize("flags, guided", [([], True), (["--label-dropout", 0.0], False), (["--uncond"], False)])
def test_checkpoints_carry_the_sampling_options_of_the_preset(flags, guided, vae_run, tmp_path, monkeypatch):
    """The samples during training use them, too. There is no guidance without label dropout or without classes."""
    config, schedule = train_transformer.PRESETS["toy"]
    preset = dq.SampleOptions(1.25, 5, 0.75, 3.0)
    monkeypatch.setitem(train_transformer.PRESETS, "toy", (config, replace(schedule, sampling=preset)))
    sampled, options = [], preset if guided else preset._replace(cfg=1.0)
    monkeypatch.setattr(train_transformer, "save_samples", lambda *args, **how: sampled.append(args[3]))
    flags = ["--codes", vae_run / "codes.pt", "--out", tmp_path, "--steps", 1, "--preset", "toy", *TRANSFORMER, *flags]
    assert call(train_transformer.main, *flags) is None
    for name in ("transformer.pt", "transformer.best.pt"):
        assert dq.load_checkpoint(tmp_path / name, "dq-transformer")["sample_options"] == options._asdict()
    assert sampled == [options] and sample.load(tmp_path / "transformer.pt", "cpu")[2] == options
    changed = replace(schedule, sampling=dq.SampleOptions())                 # a run may still be resumed
    monkeypatch.setitem(train_transformer.PRESETS, "toy", (config, changed))
    assert call(train_transformer.main, *flags, "--resume") is None


def test_sampling_options_of_presets():
    """There are three settings: for toy shapes and drawings, for photos and other images, and the paper's."""
    options = {name: schedule.sampling for name, (_, schedule) in train_transformer.PRESETS.items()}
    assert all(options[name] == (0.7, 0, 1.0, 2.0) for name in ("toy", "toy64", "toy-paper", "emoji64"))
    assert options["earth64"] == train_transformer.TransformerSchedule(1, 1, 1.0).sampling == (1.0, 0, 1.0, 1.5)
    assert all(options[name] == (1.0, 300, 1.0, 1.0) for name in ("ffhq256", "imagenet256", "imagenet256-triple"))
    for each in options.values():
        each.check()


def test_the_papers_model_at_toy_size():
    """It differs from the preset toy only in our additions, and in the learning rate, which AdamW needs."""
    (config, schedule), (paper, papers) = (train_transformer.PRESETS[name] for name in ("toy", "toy-paper"))
    assert replace(paper, rotary=True, qk_norm=True) == config and not paper.rotary and not paper.qk_norm
    assert replace(papers, decay="linear", optimizer="muon", lr=schedule.lr) == schedule
    assert (papers.decay, papers.optimizer) == ("cosine", "adamw") and papers.lr < schedule.lr


@pytest.mark.parametrize("psnr", [None, 21.46])
def test_the_last_line_has_the_loss_and_the_next_command(psnr, vae_run, tmp_path, capsys):
    """A codes.pt of an earlier version has no PSNR. The checkpoint has that of the codes."""
    stored = torch.load(vae_run / "codes.pt", weights_only=True)
    assert stored.pop("psnr") > 5
    torch.save(stored | ({"psnr": psnr} if psnr else {}), tmp_path / "codes.pt")
    flags = ["--codes", tmp_path / "codes.pt", "--out", tmp_path / "run", "--steps", 2, *TRANSFORMER]
    for more in ([], ["--resume"]):                                          # a finished run says it again
        assert call(train_transformer.main, *flags, *more) is None
        last = capsys.readouterr().out.splitlines()[-1]
        log = read_log(tmp_path / "run/transformer.jsonl")[-1]
        assert last == (
            f"done: validation loss {log['nats_per_image']:.1f} nats per image (lowest: {log['nats_per_image']:.1f}), "
            f"samples: {tmp_path / 'run/transformer.png'}; next: python sample.py {tmp_path / 'run'}")
    assert dq.load_checkpoint(tmp_path / "run/transformer.pt", "dq-transformer")["psnr"] == psnr
    assert call(sample.main, tmp_path / "run", "--n", 1, "--device", DEVICE) is None  # the next command


def test_a_transformer_knows_its_classes(run):
    checkpoint = dq.load_checkpoint(run / "transformer.pt", "dq-transformer")
    assert checkpoint["config"]["classes"] == ("circle", "cross", "square", "triangle")


def test_three_granularities_without_classes_and_with_loader_processes(images, tmp_path):
    both = ["--out", tmp_path, "--steps", 2]
    for module, *flags in ((train_vae, *both, *VAE, "--data", images, "--workers", 1, "--factors", 8, 4, 2),
                           (train_transformer, *both, *TRANSFORMER, "--uncond"),
                           (sample, tmp_path / "transformer.pt", "--n", 3, "--device", DEVICE)):
        assert call(module.main, *flags) is None
    checkpoint = dq.load_checkpoint(tmp_path / "transformer.pt", "dq-transformer")
    assert checkpoint["config"]["factors"] == (8, 4, 2) and checkpoint["config"]["classes"] == ()
    assert checkpoint["vae_config"]["ratios"] == pytest.approx((1 / 3,) * 3)


def test_a_batch_in_parts_is_the_batch(vae_run, tmp_path):
    """Gradient accumulation gives the same weights up to rounding, because each image has its own loss in stage 2."""
    ends = []
    for n in ("1", "2"):
        train_transformer.main(["--out", str(tmp_path / n), "--codes", str(vae_run / "codes.pt"), "--steps", "3",
                                "--dtype", "fp32", "--label-dropout", "0", "--dropout", "0", *TRANSFORMER,
                                "--accumulate", n])
        ends.append(dq.load_checkpoint(tmp_path / n / "transformer.pt", "dq-transformer")["weights"])
    for name in ends[0]:
        torch.testing.assert_close(ends[0][name], ends[1][name], atol=1e-4, rtol=1e-3)


def test_a_run_cannot_resume_on_other_codes(images, tmp_path):
    flags = ["--out", str(tmp_path), "--steps", "1"]
    train_vae.main([*flags, *VAE, "--data", str(images)])
    train_transformer.main([*flags, *TRANSFORMER])
    train_vae.main([*flags, *VAE, "--data", str(images), "--seed", "1"])
    with pytest.raises(dq.UserError, match="trained with --codes .* images .checksum .*, not .* leave --resume out"):
        train_transformer.main([*flags, *TRANSFORMER, "--resume"])
