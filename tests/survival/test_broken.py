"""Losses and weights that are not finite, and files that are broken or malicious."""
import math
import os

import pytest
import torch
from PIL import Image

import data as reading
import dq
import sample
import train_transformer
import train_vae
from conftest import ROOT, TRANSFORMER, VAE, call
from helpers import load
from runs import read_log
from train_vae import open_data
from warm import Script


# ------------------------------------------------------------------------------------------------
# Losses and weights


@pytest.mark.parametrize("bad_step", [3, 12])
def test_a_loss_that_is_not_a_number_stops_the_run(bad_step, images, tmp_path, monkeypatch):
    calls, real = [], dq.budget_loss

    def budget_loss(gate, ratios):
        calls.append(1)
        return real(gate, ratios) * (math.nan if len(calls) == bad_step else 1)
    monkeypatch.setattr(dq, "budget_loss", budget_loss)
    with pytest.raises(dq.UserError) as error:
        train_vae.main(["--data", str(images), "--out", str(tmp_path), "--steps", "30", "--save-every", "10", *VAE])
    assert f"step {bad_step}: not finite in the loss: loss, budget;" in str(error.value)
    if bad_step > 10:
        assert "the checkpoint of step 10 is still good" in str(error.value) and load(tmp_path, "vae")["step"] == 10
    else:
        assert "no checkpoint yet" in str(error.value) and not (tmp_path / "vae.pt").exists()


@pytest.mark.parametrize("bad_part", [0, 1])
def test_a_loss_that_is_not_a_number_in_one_part_of_a_batch_stops_the_run(bad_part, images, tmp_path, monkeypatch):
    calls, real = [], dq.budget_loss

    def budget_loss(gate, ratios):
        calls.append(1)
        return real(gate, ratios) * (math.nan if len(calls) == 3 + bad_part else 1)
    monkeypatch.setattr(dq, "budget_loss", budget_loss)
    line = call(train_vae.main, "--data", images, "--out", tmp_path, "--steps", 4, *VAE, "--accumulate", 2)
    assert line.startswith("error: step 2: not finite in the loss: loss, budget;")


def test_the_log_has_the_mean_over_the_parts_of_a_batch(images, tmp_path, monkeypatch):
    calls, real = [], dq.budget_loss

    def budget_loss(gate, ratios):
        calls.append(1)
        return real(gate, ratios) * 0 + (len(calls) - 1) % 2                 # the two parts of each batch give 0 and 1
    monkeypatch.setattr(dq, "budget_loss", budget_loss)
    train_vae.main(["--data", str(images), "--out", str(tmp_path), "--steps", "10", *VAE, "--accumulate", "2"])
    assert [line["budget"] for line in read_log(tmp_path / "vae.jsonl") if "budget" in line] == [0.5]


def test_broken_weights_are_not_saved(images, tmp_path, monkeypatch):
    """The loss of the last step before a checkpoint can be finite while its gradient is not."""
    real = train_vae.backward

    def backward(y, last, *args):
        weight = real(y, last, *args)
        last.grad.fill_(math.inf)
        return weight
    monkeypatch.setattr(train_vae, "backward", backward)
    line = "step 1: not finite in the weights: decoder.out.2.weight; there is no checkpoint yet"
    with pytest.raises(dq.UserError, match=line):
        train_vae.main(["--data", str(images), "--out", str(tmp_path), "--steps", "1", *VAE])
    assert not (tmp_path / "vae.pt").exists()

# ------------------------------------------------------------------------------------------------
# Files


class Bomb:
    def __reduce__(self):
        return os.system, ("touch ran",)


def spoil(path, how, tmp_path):
    """Write a broken variant of a checkpoint. -> its path"""
    broken = tmp_path / "broken.pt"
    data = bytearray(path.read_bytes())
    if how == "truncated":
        data = data[:len(data) * 2 // 3]
    elif how == "bits flipped":
        middle = slice(len(data) // 2, len(data) // 2 + 100)                 # longer than the padding between tensors
        data[middle] = bytes(byte ^ 0xFF for byte in data[middle])
    elif how == "empty":
        data = b""
    broken.write_bytes(data)
    if how == "code":
        torch.save(dict(kind="dq-transformer", config=Bomb()), broken)
    elif how in ("version", "config"):
        checkpoint = torch.load(path, weights_only=True)
        if how == "version":
            checkpoint["weights"]["something.new"] = checkpoint["weights"].pop("condition.weight")
        else:
            checkpoint["config"] = dict(size="big")
        torch.save(checkpoint, broken)
    return broken


@pytest.mark.parametrize("how", ["truncated", "bits flipped", "empty", "code", "version", "config"])
def test_broken_checkpoints(how, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    broken = spoil(run / "transformer.pt", how, tmp_path)
    line = call(sample.main, broken)
    assert line.startswith("error: ") and "\n" not in line
    assert not (tmp_path / "ran").exists()                                   # no code in the checkpoint has run
    (tmp_path / "out").mkdir()
    broken.rename(tmp_path / "out/transformer.pt")
    flags = ["--codes", run / "codes.pt", "--steps", 8, *TRANSFORMER]
    line = call(train_transformer.main, *flags, "--resume")
    assert line.startswith("error: ") and "\n" not in line


@pytest.mark.parametrize("changes", [
    dict(sample_options=dict(temperature=1.0, top_q=3)), dict(sample_options=[1.0, 0]), dict(sample_options=7),
    dict(sample_options=dict(temperature="warm")), dict(psnr="good"), dict(psnr=[1]), dict(config=None),
    dict(vae_config=dict(size=16, colour="red")), dict(vae_weights=3)], ids=str)
def test_a_checkpoint_with_other_entries_cannot_be_sampled_from(changes, run, tmp_path):
    path = tmp_path / "transformer.pt"
    torch.save(load(run, "transformer") | changes, path)
    line = call(sample.main, path, "--n", 1, "--out", tmp_path)
    assert line.startswith("error: ") and "\n" not in line
    assert {each.name for each in tmp_path.iterdir()} == {"transformer.pt"}


@pytest.mark.parametrize("changes", [
    dict(config=7), dict(settings=["steps", 2]), dict(optimizer=None), dict(muon={}), dict(weights=[]), dict(best=...),
    dict(step=...)], ids=str)
def test_a_checkpoint_with_other_entries_cannot_be_resumed(changes, run, tmp_path):
    """... stands for an entry that is missing."""
    saved = load(run, "transformer") | changes
    torch.save({name: value for name, value in saved.items() if value is not ...}, tmp_path / "transformer.pt")
    line = call(train_transformer.main, "--codes", run / "codes.pt", "--out", tmp_path, *TRANSFORMER, "--resume")
    assert line.startswith(f"error: {tmp_path / 'transformer.pt'} is damaged, or of another command; leave --resume ")
    assert "\n" not in line and {each.name for each in tmp_path.iterdir()} == {".lock", "transformer.pt"}


@pytest.mark.parametrize("changes", [
    dict(config=[]), dict(weights=None), dict(train=None), dict(held_out=dict(codes=3)), dict(classes=...),
    dict(name=...), dict(train=dict(label=torch.zeros(2)))], ids=str)
def test_codes_with_other_entries_are_not_trained_on(changes, run, tmp_path):
    stored = torch.load(run / "codes.pt", weights_only=True) | changes
    torch.save({name: value for name, value in stored.items() if value is not ...}, tmp_path / "codes.pt")
    line = call(train_transformer.main, "--out", tmp_path, *TRANSFORMER, "--steps", 1)
    assert line.startswith("error: ") and "\n" not in line
    assert {each.name for each in tmp_path.iterdir()} == {".lock", "codes.pt"}


def test_images_that_are_odd_or_broken(tmp_path, capfd):
    """Images that can be read are used. Each of the others is skipped with a warning that names it."""
    root = tmp_path / "images"
    root.mkdir()
    Image.new("RGB", (1, 1), "red").save(root / "one.png")
    Image.new("RGB", (20_000, 10), "green").save(root / "wide.png")
    Image.new("RGB", (10, 20_000), "blue").save(root / "high.png")
    Image.new("RGB", (30, 30), "white").save(root / os.fsdecode(b"caf\xe9 \xff.png"))  # not UTF-8
    Image.new("RGB", (30, 30), "white").save(root / "名前 🙂.png")
    Image.new("1", (20_000, 20_000)).save(root / "bomb.png")
    Image.new("1", (10_000, 10_000)).save(root / "small bomb.png")
    (root / "empty.png").write_bytes(b"")
    (root / "text.jpg").write_text("no image")
    (root / "cut.png").write_bytes((root / "wide.png").read_bytes()[:-30])
    (root / "folder.png").mkdir()
    (root / "dangling.png").symlink_to("nowhere.png")
    os.mkfifo(root / "pipe.png")                                             # opening it would block forever
    (root / "locked.png").write_bytes((root / "one.png").read_bytes())
    (root / "locked.png").chmod(0)
    for data in open_data(root, 8, augment=True):
        for i in range(2 * len(data)):
            image, _ = data[i]
            assert image.shape == (3, 8, 8) and image.isfinite().all()
    warnings = capfd.readouterr().out
    for name in ("bomb.png", "small bomb.png", "empty.png", "text.jpg", "cut.png", "dangling.png", "pipe.png"):
        assert any(f"/{name}: " in line for line in warnings.splitlines()), name
    for name in ("one.png", "wide.png", "high.png", "folder.png"):
        assert f"/{name}" not in warnings
    assert "Traceback" not in warnings
    assert call(train_vae.main, "--data", root, "--out", tmp_path / "out", "--steps", 2, *VAE) is None


def test_classes_of_any_name(tmp_path):
    for name in (b"caf\xe9", "名前".encode()):
        folder = tmp_path / "images" / os.fsdecode(name)
        folder.mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (16, 16), (60 * i, 90, 0)).save(folder / f"{i}.png")
    both = ["--out", tmp_path, "--steps", 1]
    assert call(train_vae.main, *both, *VAE, "--data", tmp_path / "images") is None
    assert call(train_transformer.main, *both, *TRANSFORMER) is None
    assert call(sample.main, tmp_path / "transformer.pt", "--n", 2) is None
    done = Script(ROOT / "sample.py", tmp_path / "transformer.pt", "--label", "dog")
    _, error = done.communicate()
    assert done.returncode == 1 and "no class 'dog'" in error and error.count("\n") == 1


def test_training_starts_before_every_file_is_read(tmp_path, monkeypatch):
    root = tmp_path / "images"
    root.mkdir()
    Image.new("RGB", (8, 8)).save(root / "0.png")
    data = (root / "0.png").read_bytes()
    for i in range(1, 1500):
        (root / f"{i}.png").write_bytes(data)
    opened, real = [], reading.open_image
    monkeypatch.setattr(reading, "MEMORY", 1500 * 3 * 16 * 16 - 1)           # too little memory to cache all images
    monkeypatch.setattr(reading, "open_image", lambda *args: (opened.append(1), real(*args))[1])
    monkeypatch.setattr(train_vae, "write_codes", lambda *args: opened.append("codes"))  # it reads all images
    train_vae.main(["--data", str(root), "--out", str(tmp_path), "--steps", "2", *VAE])
    assert opened.index("codes") <= 512 + 2 * 4                              # the validation images and two batches
