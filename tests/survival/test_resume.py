"""Resumed runs: each continues as if it had never stopped, or is refused."""
import functools
import os
import random

import numpy as np
import pytest
import torch
from PIL import Image

import dq
import train_transformer
import train_vae
from conftest import TRANSFORMER, VAE, call
from helpers import STAGES, Killed, load, same
from runs import read_log


@pytest.mark.parametrize("stage", ["vae with a discriminator", "transformer"])
def test_ten_steps_killed_and_ten_more_are_twenty_steps(stage, vae_run, images, tmp_path, monkeypatch):
    module, flags = STAGES[stage]
    stem = stage.split()[0]
    monkeypatch.setattr(train_vae, "Discriminator", functools.partial(train_vae.Discriminator, width=8))
    data = ["--data", str(images)]
    if stem == "transformer":
        data = ["--codes", str(vae_run / "codes.pt"), "--dropout", "0.1"]

    def train(out, *more):
        module.main(["--out", str(tmp_path / out), "--steps", "20", "--eval-every", "5", "--save-every", "10",
                     *data, *flags, *more])

    train("whole")
    save = dq.save_checkpoint

    def save_and_die(path, *args, **kwargs):
        save(path, *args, **kwargs)
        if path.name == f"{stem}.pt" and kwargs["step"] == 10:               # before its evaluation
            raise Killed
    monkeypatch.setattr(dq, "save_checkpoint", save_and_die)
    with pytest.raises(Killed):
        train("halves")
    monkeypatch.setattr(dq, "save_checkpoint", save)
    halves = tmp_path / "halves"
    assert load(halves, stem)["step"] == 10
    with open(halves / f"{stem}.jsonl", "ab") as log:                        # later steps, and lines that are not valid
        log.write(b'{"step": 11, "loss": 3}\nnull\n[1]\n{"loss": 2}\n{"step": "4"}\n'
                  b'{"step": 3, "\xe9": 1}\n{"step": 12, "lo')
    for module_with_state in (random, np.random):                            # as other code might
        module_with_state.seed(99)
    torch.manual_seed(99)
    train("halves", "--resume")
    for name in (stem, f"{stem}.best"):
        same(*(dq.load_checkpoint(tmp_path / folder / f"{name}.pt", f"dq-{stem}") for folder in ("whole", "halves")))
    assert (tmp_path / "whole" / f"{stem}.jsonl").read_text() == (halves / f"{stem}.jsonl").read_text()


def test_a_resumed_run_draws_the_same_from_every_generator(images, tmp_path, monkeypatch):
    """The numbers differ from step to step."""
    drawn, real = [], dq.budget_loss

    def budget_loss(gate, ratios):
        drawn.append((random.random(), np.random.rand(), torch.rand(()).item()))
        return real(gate, ratios)
    monkeypatch.setattr(dq, "budget_loss", budget_loss)
    flags = ["--data", images, *VAE, "--save-every", 2]
    for out, steps, *more in (("whole", 6), ("halves", 4), ("halves", 6, "--resume")):
        assert call(train_vae.main, *flags, "--out", tmp_path / out, "--steps", steps, *more) is None
    whole, halves = drawn[:6], drawn[6:]
    assert halves == whole and len(set(sum(whole, ()))) == 18


def test_resuming_with_other_settings(images, tmp_path, capsys):
    """A changed setting that alters the run is refused by name; a change that is allowed is reported."""
    def train(*flags):
        data = ["--data", images, "--held-out", tmp_path / "held-out"]
        return call(train_vae.main, "--out", tmp_path, *VAE, *data, "--steps", 2, *flags)

    def files():
        return {path: path.read_bytes() for path in tmp_path.rglob("*.*")}

    for name in ("other", "held-out"):
        (tmp_path / name / "circle").mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / name / f"circle/{name}.png")
    assert train() is None
    before = files()
    for flag, value in (("--data", tmp_path / "other"), ("--held-out", tmp_path / "other"),
                        ("--batch-size", 8), ("--seed", 1), ("--lr", 0.5), ("--clip", 3), ("--budget-weight", 2),
                        ("--codebook-size", 32), ("--gan-start", 7), ("--accumulate", 2)):
        line = train("--steps", 4, flag, value, "--resume")
        assert line.startswith("error: ") and f"trained with {flag} " in line and "leave --resume out" in line, line
    assert files() == before
    capsys.readouterr()
    for steps in (1, 2):                                                     # no more steps than the run already has
        assert train("--steps", steps, "--resume", "--eval-every", 1) is None
        out = capsys.readouterr().out.splitlines()
        vae, codes = tmp_path / "vae.pt", tmp_path / "codes.pt"
        assert out[-1:] == [f"nothing left to do: {vae} is at step 2, and {codes} is there"] and files() == before
    assert train("--steps", 4, "--resume", "--eval-every", 1) is None
    out = capsys.readouterr().out
    assert "note: --steps was 2 and is 4 from step 2 on" in out and "note: --eval-every was 250 and is 1" in out
    assert load(tmp_path, "vae")["step"] == 4


def test_a_checkpoint_without_settings_can_be_resumed(images, tmp_path):
    """Its lowest loss still counts."""
    flags = ["--data", images, "--out", tmp_path, *VAE]
    assert call(train_vae.main, *flags, "--steps", 2) is None
    checkpoint = load(tmp_path, "vae") | dict(best=0.0)
    del checkpoint["settings"]
    torch.save(checkpoint, tmp_path / "vae.pt")
    assert call(train_vae.main, *flags, "--steps", 4, "--lr", 0.01, "--resume") is None
    assert load(tmp_path, "vae")["step"] == 4 and load(tmp_path, "vae.best")["step"] == 2


def test_a_run_without_qk_norm_is_refused(run, tmp_path):
    """Its configuration has no such field, and its weights would fit."""
    checkpoint = load(run, "transformer")
    del checkpoint["config"]["qk_norm"]
    torch.save(checkpoint, tmp_path / "transformer.pt")
    assert not dq.load_transformer(tmp_path / "transformer.pt", "cpu")[0].config.qk_norm
    line = call(train_transformer.main, "--codes", run / "codes.pt", "--out", tmp_path, *TRANSFORMER, "--steps", 8,
                "--resume")
    assert line.startswith("error: ") and "was trained with qk_norm False, not True" in line


def test_evaluating_more_often_changes_nothing(images, tmp_path):
    for every in ("1", "3"):
        train_vae.main(["--data", str(images), "--out", str(tmp_path / every), "--steps", "3", "--router", "random",
                        *VAE, "--eval-every", every])
    same(load(tmp_path / "1", "vae")["weights"], load(tmp_path / "3", "vae")["weights"])


@pytest.mark.parametrize("stem, fixture, key", [("vae", "vae_run", "loss"), ("transformer", "run", "nats_per_image")])
def test_the_best_checkpoint_has_the_lowest_validation_loss(stem, fixture, key, request):
    folder = request.getfixturevalue(fixture)
    held_out = [line for line in read_log(folder / f"{stem}.jsonl") if "psnr" in line or "nats_per_image" in line]
    best = min(held_out, key=lambda line: line[key])
    checkpoint = dq.load_checkpoint(folder / f"{stem}.best.pt", f"dq-{stem}")
    assert checkpoint["step"] == best["step"] and checkpoint["best"] == pytest.approx(best[key], abs=1e-4)


def test_the_best_checkpoint_can_be_sampled_from(run):
    dq.load_transformer(run / "transformer.best.pt", "cpu")


def test_a_new_run_moves_the_previous_one_aside(images, tmp_path, capsys):
    for steps in (1, 2, 3):
        (tmp_path / "codes.pt").unlink(missing_ok=True)                      # as if killed before the end
        train_vae.main(["--data", str(images), "--out", str(tmp_path), "--steps", str(steps), *VAE])
    assert [load(tmp_path / name, "vae")["step"] for name in ("former-1", "former-2", ".")] == [1, 2, 3]
    for name in ("vae.pt", "vae.best.pt", "vae.jsonl", "vae.png"):
        assert (tmp_path / "former-1" / name).exists() and (tmp_path / name).exists()
    assert "former-2" in capsys.readouterr().out


@pytest.mark.parametrize("restarted", ["--resume", "TORCHELASTIC_RESTART_COUNT"])
def test_the_same_command_starts_and_resumes(restarted, images, tmp_path, monkeypatch, capsys):
    """A batch system requeues a job with the same command, and so does torchrun --max-restarts."""
    flags = ["--data", images, "--out", tmp_path, *VAE]
    if restarted == "--resume":
        flags.append(restarted)
    else:
        monkeypatch.setenv(restarted, "1")
    assert call(train_vae.main, *flags, "--steps", 2) is None
    assert f"note: there is no {tmp_path / 'vae.pt'} to resume yet; starting from scratch" in capsys.readouterr().out
    assert call(train_vae.main, *flags, "--steps", 4) is None
    assert load(tmp_path, "vae")["step"] == 4 and "from step 2 on" in capsys.readouterr().out
    assert not list(tmp_path.glob("former-*"))


@pytest.mark.parametrize("stage", ["vae", "transformer"])
def test_a_checkpoint_is_written_before_its_evaluation(stage, vae_run, images, tmp_path, monkeypatch):
    """The evaluation can run out of memory. A resumed run, even a finished one, repeats it."""
    module, flags = STAGES[stage]
    data = ["--data", images] if stage == "vae" else ["--codes", vae_run / "codes.pt"]
    flags = [*data, *flags, "--out", tmp_path, "--steps", 4, "--eval-every", 2, "--save-every", 100]
    real, fails = module.evaluate, [2, 4]

    def evaluate(*args, **how):
        if fails and load(tmp_path, stage)["step"] == fails[0]:
            fails.pop(0)
            raise MemoryError
        return real(*args, **how)
    monkeypatch.setattr(module, "evaluate", evaluate)
    assert call(module.main, *flags).startswith("error: not enough memory; reduce --batch-size")
    assert load(tmp_path, stage)["step"] == 2
    assert call(module.main, *flags, "--resume").startswith("error: not enough memory")
    assert load(tmp_path, stage)["step"] == 4
    assert call(module.main, *flags, "--resume") is None
    log = read_log(tmp_path / f"{stage}.jsonl")
    assert [line["step"] for line in log if "codes_per_image" in line] == [2, 4]
    assert (tmp_path / f"{stage}.best.pt").exists()


def test_device_and_dtype_are_logged_and_a_change_is_reported(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_vae, "write_codes", lambda *args: None)        # slow in bf16 on a CPU
    flags = ["--data", images, "--out", tmp_path, *VAE, "--device", "cpu"]
    assert call(train_vae.main, *flags, "--steps", 2, "--dtype", "fp32") is None
    assert call(train_vae.main, *flags, "--steps", 4, "--dtype", "bf16", "--resume") is None
    assert "note: --dtype was fp32 and is bf16 from step 2 on" in capsys.readouterr().out
    log = [line for line in read_log(tmp_path / "vae.jsonl") if "dtype" in line]
    assert [(line["step"], line["dtype"]) for line in log] == [(0, "fp32"), (2, "bf16")]
    assert log[0]["torch"] == str(torch.__version__) and log[0]["device"].startswith("cpu (")
    settings = load(tmp_path, "vae")["settings"]
    assert settings["dtype"] == "bf16" and settings["torch"] == str(torch.__version__)


def test_codes_are_those_of_the_newest_weights(images, tmp_path):
    flags = [*VAE, "--data", images, "--out", tmp_path, "--resume"]
    for steps in (1, 2):
        assert call(train_vae.main, *flags[:-1 if steps == 1 else None], "--steps", steps) is None
        same(load(tmp_path, "vae")["weights"], dq.load_checkpoint(tmp_path / "codes.pt", "dq-codes")["weights"])
    before = (tmp_path / "codes.pt").stat().st_mtime
    assert call(train_vae.main, *flags, "--steps", 2) is None                # nothing is left to do
    assert (tmp_path / "codes.pt").stat().st_mtime == before
    os.utime(tmp_path / "codes.pt", (before - 60, before - 60))              # older than vae.pt
    assert call(train_vae.main, *flags, "--steps", 2) is None
    assert (tmp_path / "codes.pt").stat().st_mtime >= before
