"""Tests of common.py, and of which file imports which.

    to_picture, draw_grains, save_grid            test_a_picture_has_the_pixels_of_its_image and the two tests below it
    pick_device                                   test_the_gpu_of_the_flag_becomes_the_current_one and the two below it
    run, say, printable                           test_how_a_script_ends, test_wrong_input_gives_one_line,
                                                  test_an_error_reaches_the_shell,
                                                  test_every_line_can_be_printed and the three below it
    prepare, lock, env_number                     test_child_processes_do_not_inherit_a_lock and all below it
    explained                                     test_an_exception_becomes_a_user_error
    path                                          test_paths_of_flags, test_wrong_input_gives_one_line
    number                                        test_numbers_of_flags, test_wrong_input_gives_one_line
    trainer_flags, override                       test_wiring.py
    Schedule                                      test_schedules
    seed_all                                      test_seeds_give_unrelated_numbers, survival/test_resume.py
    Record                                        test_training_writes_logs_pictures_and_checkpoints,
                                                  test_the_best_checkpoint_is_that_of_the_lowest_loss and the three
                                                  below it, test_presets.py, test_wiring.py, survival/test_resume.py
                                                  and survival/test_broken.py
    Stop                                          test_the_first_signal_is_noted_and_the_second_one_exits,
                                                  survival/test_kill.py
    shuffled_indices                              test_data.py and test_train_transformer.py
    save_picture                                  test_sample.py
"""
import argparse
import ast
import contextlib
import importlib
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm

import common
import dq
import train_vae
from conftest import DEVICE, ROOT, TRANSFORMER, VAE, call, script
from warm import Script


# ------------------------------------------------------------------------------------------------
# Imports


SCRIPTS = ["train_vae.py", "train_transformer.py", "sample.py"]
OURS = {path.stem for path in ROOT.glob("*.py")}


def test_scripts_import_no_other_script():
    def imported(name):
        tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
        names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        assert "importlib" not in names and "__import__" not in ast.unparse(tree)
        return OURS.intersection(names)
    assert OURS == {"dq", "data", "common", *(name[:-3] for name in SCRIPTS)}
    assert imported("dq.py") == set() and imported("common.py") == {"dq"} and imported("data.py") == {"dq", "common"}
    reads_images = {"train_vae.py", "sample.py"}                             # stage 2 never loads an image
    assert all(imported(name) == {"dq", "common"} | ({"data"} if name in reads_images else set()) for name in SCRIPTS)


@pytest.mark.parametrize("intact", SCRIPTS)
def test_a_script_runs_although_the_others_have_syntax_errors(intact, run, tmp_path):
    for name in OURS:
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    for name in set(SCRIPTS) - {intact}:
        (tmp_path / name).write_text("def (:")
    flags = {"train_vae.py": ["--encode", run / "vae.pt", "--data", "images", "--out", "x", "--device", DEVICE],
             "train_transformer.py": ["--codes", run / "codes.pt", "--out", "y", "--steps", 1, *TRANSFORMER],
             "sample.py": [run / "transformer.pt", "--n", 1, "--out", "z", "--device", DEVICE]}
    (tmp_path / "images").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "images/0.png")
    for name in SCRIPTS:
        done = Script(tmp_path / name, *flags[name], cwd=tmp_path)
        _, error = done.communicate()
        assert (done.returncode == 0) == (name == intact), error


# ------------------------------------------------------------------------------------------------
# Drawing


def test_a_picture_has_the_pixels_of_its_image():
    """Values are rounded to the nearest of 256 levels and clamped; each pixel becomes a square of pixels."""
    values = torch.tensor([0, 1, 127, 128, 254, 255.0])
    x = (torch.cat([values - 0.4, values + 0.4]) / 127.5 - 1).clamp(-1.002, 1.002).expand(3, 1, 12)
    assert np.asarray(common.to_picture(x, 0))[0, :, 0].tolist() == [0, 1, 127, 128, 254, 255] * 2
    far = torch.tensor([-3.0, 3.0]).expand(3, 1, 2)
    assert np.asarray(common.to_picture(far, 8))[:, :, 1].tolist() == [[0] * 4 + [255] * 4] * 4


def test_a_box_per_code():
    """A box has the colour of its granularity and the size of its code, and it is not filled."""
    grains = torch.tensor([[0, 1], [2, 0]])                                  # of 16 x 16: codes of 8, 4 and 2 pixels
    picture = np.asarray(common.draw_grains(torch.full((3, 16, 16), -1.0), grains, (8, 4, 2)))
    assert picture.shape == (128, 128, 3)
    colours = [tuple(bytes.fromhex(each[1:])) for each in ("#3a6ea5", "#e07b00", "#c01530")]
    ground = (89, 89, 89)                                                    # black, blended with 35 % of white
    for row, column, colour, side in ((0, 0, colours[0], 64), (0, 64, colours[1], 32), (64, 0, colours[2], 16),
                                      (64, 64, colours[0], 64)):
        for at in range(side, 64, side):                                     # each code in the region has its own edges
            assert tuple(picture[row + at, column + 5]) == tuple(picture[row + 5, column + at]) == colour
        assert tuple(picture[row + 30, column + 30]) == tuple(picture[row + 28, column + 26]) == ground
        assert tuple(picture[row + 1, column + 30]) == ground


def test_a_grid_is_filled_row_by_row(tmp_path):
    pictures = [Image.new("RGB", (30, 20), (10 * i, 0, 0)) for i in range(5)]
    common.save_grid(tmp_path / "x.png", pictures, columns=2, captions=["", "", "x", "", ""])
    sheet = np.asarray(Image.open(tmp_path / "x.png"))
    assert sheet.shape[:2] == (3 * (20 + 2 + 14) - 2, 2 * (30 + 2) - 2)
    for i in range(5):
        top, left = i // 2 * 36, i % 2 * 32
        assert (sheet[top + 14:top + 34, left:left + 30] == (10 * i, 0, 0)).all()
        assert (sheet[top:top + 14, left:left + 30] < 99).any() == (i == 2)
    common.save_grid(tmp_path / "x.png", pictures, columns=2)
    assert Image.open(tmp_path / "x.png").size == (62, 64)


# ------------------------------------------------------------------------------------------------
# Devices, errors, and flags


def test_the_gpu_of_the_flag_becomes_the_current_one(monkeypatch):
    current, ones = [], torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size, device: ones(*size))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **kwargs: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    for name, numbered in (("cuda:1", "cuda:1"), ("cuda", "cuda:0"), ("cuda:0", "cuda:0"), ("cpu", "cpu")):
        assert common.pick_device(name, "auto")[0] == torch.device(numbered)
    monkeypatch.setenv("LOCAL_RANK", "3")                                    # as torchrun does
    assert common.pick_device("cuda", "auto")[0] == torch.device("cuda:3")
    assert current == [torch.device("cuda", i) for i in (1, 0, 0, 3)]


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "", "meta"])
def test_devices_that_do_not_exist(name):
    with pytest.raises(dq.UserError, match="no such device"):
        common.pick_device(name, "auto")


def test_the_dtype_is_that_of_the_flag(monkeypatch):
    for units in ({}, dict(avx512_bf16=True), dict(amx_bf16=True)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units, raising=False)
        for dtype, bf16 in (("fp32", False), ("bf16", True), ("auto", bool(units))):
            with common.pick_device("cpu", dtype)[1]():
                assert torch.is_autocast_enabled("cpu") == bf16
                assert not bf16 or torch.get_autocast_dtype("cpu") == torch.bfloat16


@pytest.mark.parametrize("raised, status", [
    (None, None), (dq.UserError("two\nlines"), "error: two"),
    (dq.UserError("no such folder: NCCL"), "error: no such folder: NCCL"),
    (OSError(28, "No space left"), "error: [Errno 28] No "),
    (KeyboardInterrupt(), 130), (SystemExit(143), 143), (RuntimeError("a bug of ours"), RuntimeError),
    (KeyError("x"), KeyError), (RuntimeError("CUDA out of memory. Tried"), "error: not enough memory; reduce --batch-"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "error: not enough memory; "),
    (RuntimeError("[gloo] Connection closed by peer"),
     "error: another process of this job died or lost its connection; --resume continues ("),
    (MemoryError(), "error: not enough memory; reduce --batch-size"),
    (RuntimeError("std::bad_alloc"), "error: not enough memory; "),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when"), "error: not enough memory; ")], ids=repr)
def test_how_a_script_ends(raised, status):
    def main():
        if raised:
            raise raised
    if status is None:
        return common.run(main)
    with pytest.raises(status if isinstance(status, type) else SystemExit) as end:
        common.run(main)
    if isinstance(status, str):
        assert end.value.code.startswith(status) and "\n" not in end.value.code
    elif isinstance(status, int):
        assert end.value.code == status


@pytest.mark.parametrize("raised", [KeyError("getpwuid(): uid not found: 12345"), OSError(13, "Permission denied"),
                                    RuntimeError("no compiler"), AttributeError("triton")], ids=repr)
def test_any_error_in_torch_compile_gives_one_line(raised, monkeypatch):
    def backend(*args):
        raise raised
    def main():
        torch.compile(torch.nn.Linear(2, 2), backend=backend)(torch.zeros(1, 2))
    with pytest.raises(SystemExit) as end:
        common.run(main)
    assert end.value.code.startswith("error: --compile does not work here; leave it out") and "\n" not in end.value.code


def test_an_exception_becomes_a_user_error():
    """A user error keeps its own line, and a lack of memory the hint of `run`."""
    for raised, kind, line in ((KeyError("step"), dq.UserError, "x.pt is damaged ('step')"),
                               (TypeError("two\nlines"), dq.UserError, "x.pt is damaged (two)"),
                               (dq.UserError("no such file"), dq.UserError, "no such file"),
                               (MemoryError("8 GiB"), MemoryError, "8 GiB")):
        with pytest.raises(kind) as end, common.explained("x.pt is damaged"):
            raise raised
        assert str(end.value) == line


def test_numbers_of_flags():
    for kind, good, bad in ((common.positive, ("1", "7"), ("0", "-1", "1.5", "x")),
                            (common.natural, ("0", "2"), ("-1",)), (common.weight, ("0", "0.5"), ("-0.1", "nan")),
                            (common.number(float, 0, below=1), ("0", "0.99"), ("1", "-0.1"))):
        assert [kind(text) for text in good] == [float(text) for text in good]
        for text in bad:
            with pytest.raises((argparse.ArgumentTypeError, ValueError)):
                kind(text)


def test_paths_of_flags(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    home = "/home/someone"
    for text, wanted in (("a/b", "a/b"), ("~", home), ("~/runs/x.pt", f"{home}/runs/x.pt"), ("a~", "a~")):
        assert common.path(text) == Path(wanted)
    for text in ("", " "):
        with pytest.raises(argparse.ArgumentTypeError, match="the path is empty"):
            common.path(text)


def test_the_first_signal_is_noted_and_the_second_one_exits(capsys):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with common.Stop() as stop:
            assert stop.asked() == 0
            for _ in range(2):                                               # `timeout` sends its signal twice
                os.kill(os.getpid(), signal.SIGINT)
            assert stop.asked() == stop.asked() == signal.SIGINT
            time.sleep(0.01)                                                 # the thread that hears signals is done
            stop.noted -= 2                                                  # seconds
            with pytest.raises(SystemExit) as end:
                os.kill(os.getpid(), signal.SIGINT)
            assert end.value.code == 130
            with pytest.raises(SystemExit) as end:
                stop.leave(signal.SIGINT, "after step 3")
        out, error = capsys.readouterr()
        assert end.value.code == 130 and "stopped by SIGINT after step 3" in out and not error
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


# ------------------------------------------------------------------------------------------------
# A training run


def record_of(tmp_path, steps, **args):
    """A record of a run of stage 1 that has no optimizer."""
    config = dq.VAEConfig(size=16, codebook_size=16)
    settings = dict(steps=steps, eval_every=args.pop("eval_every", 1000))
    return common.Record(argparse.Namespace(save_every=1000, **args), tmp_path / "vae.pt", config, settings,
                         dq.DQVAE(config), {}, {})


NO_SIGNAL = SimpleNamespace(asked=lambda: 0)


def test_the_best_checkpoint_is_that_of_the_lowest_loss(tmp_path):
    record, losses = record_of(tmp_path, 5, eval_every=1), [3.0, 2.0, 5.0, math.nan, 1.5]
    best = []

    def validate(step):
        if step > 1:
            best.append(dq.load_checkpoint(tmp_path / "vae.best.pt", "dq-vae")["step"])
        return dict(loss=losses[step - 1]), losses[step - 1]
    for step in record.steps("", NO_SIGNAL, validate):
        record.add(step + 1, dict(loss=torch.tensor(1.0)))
    assert best == [1, 2, 2, 2] and dq.load_checkpoint(tmp_path / "vae.best.pt", "dq-vae")["step"] == 5
    assert record.best == 1.5


def test_evaluations_are_due_at_multiples_and_at_the_end(tmp_path):
    record, evaluated = record_of(tmp_path, 9, eval_every=4), []
    for step in record.steps("", NO_SIGNAL, lambda step: (evaluated.append(step) or {}, 0.0)):
        record.add(step + 1, dict(loss=torch.tensor(1.0)))
    assert evaluated == [4, 8, 9]


def test_checkpoints_are_due_between_evaluations(tmp_path, monkeypatch):
    record, saved = record_of(tmp_path, 9, eval_every=7), []
    record.args.save_every = 3
    monkeypatch.setattr(record, "save", lambda path, done, **more: saved.append((path.name, done)))
    for step in record.steps("", NO_SIGNAL, lambda step: ({}, math.inf)):
        record.add(step + 1, dict(loss=torch.tensor(1.0)))
    assert saved == [("vae.pt", done) for done in (3, 6, 7, 9)]


@pytest.mark.parametrize("done, checked", [(3, True), (7, True), (10, True), (4, False)])
def test_losses_are_checked_before_they_are_used(done, checked, tmp_path):
    """A loss that is not finite ends the run at the next step that is evaluated, saved or logged."""
    record = record_of(tmp_path, 99, eval_every=3)
    record.args.save_every, record.step = 7, done - 1
    steps = record.steps("", NO_SIGNAL, lambda step: ({}, 0.0))
    assert next(steps) == done - 1
    record.add(done - 1, dict(loss=torch.tensor(math.nan)))
    record.add(done, dict(loss=torch.tensor(1.0)))
    with pytest.raises(dq.UserError, match="not finite") if checked else contextlib.nullcontext():
        next(steps)


def test_logged_losses_are_means_over_the_ranks(tmp_path, monkeypatch):
    record = common.Record(None, tmp_path, None, {}, None, {}, {})
    monkeypatch.setattr(dq, "rank_world", lambda: (0, 2))
    monkeypatch.setattr(dq, "all_reduce_sum", lambda x: 3 * x)               # the other rank has twice as much
    record.add(1, dict(loss=torch.tensor(2.0), budget=torch.tensor(4.0)))
    assert record.newest_losses() == dict(loss=3.0, budget=6.0)


def test_schedules():
    assert [round(dq.gumbel_scale(s, 100), 3) for s in (0, 50, 70, 90, 99)] == [1, 1, 0.5, 0, 0]

    linear = common.Schedule(steps=110, batch_size=1, lr=2.0, warmup=10, decay="linear")
    assert [linear.learning_rate(step) for step in (4, 9, 10, 35, 85, 110)] == pytest.approx([1, 2, 2, 1.5, 0.5, 0])
    schedule = common.Schedule(steps=110, batch_size=1, lr=2.0, warmup=10)
    rates = [schedule.learning_rate(step) for step in range(110)]
    assert rates[0] == 0.2 and rates[9] == max(rates) == 2.0 and rates[60] == pytest.approx(1.0) and rates[-1] < 0.01


def test_seeds_give_unrelated_numbers():
    def drawn(*numbers):
        common.seed_all(*numbers)
        return random.random(), np.random.rand(), torch.rand(1, dtype=torch.double).item()
    near = [drawn(*numbers) for numbers in itertools.product(range(3), range(50), range(4))]  # seed, step, rank
    near += [drawn(*numbers) for numbers in itertools.product(range(3), range(1, 50))]
    assert len(set(sum(near, ()))) == 3 * len(near)
    assert drawn(1, 2, 3) == drawn(1, 2, 3) != drawn(2 ** 63 - 1, 2, 3)      # the largest --seed


@pytest.mark.parametrize("stage, fixture, metrics", [
    ("vae", "vae_run", {"psnr", "l1", "share", "bits_per_pixel", "codebook_used", "perplexity"}),
    ("transformer", "run", {"nats_per_image", "bits_per_code", "bits_per_pixel"})])
def test_training_writes_logs_pictures_and_checkpoints(stage, fixture, metrics, request):
    folder = request.getfixturevalue(fixture)
    log = [json.loads(line) for line in (folder / f"{stage}.jsonl").read_text().splitlines()]
    assert metrics <= set(log[-1]) and log[-1]["step"] == 6
    assert Image.open(folder / f"{stage}.png").width > 100
    assert dq.load_checkpoint(folder / f"{stage}.pt", f"dq-{stage}")["step"] == 6


@pytest.mark.parametrize("name, args, message", [
    ("train_vae.py", ["--data", "nowhere"], "no such folder"),
    ("train_vae.py", ["--data", "empty"], "no images"),
    ("train_vae.py", ["--size", 20], "not a multiple"),
    ("train_vae.py", ["--factors", 8, 4, "--ratios", 0.5], "need 2 ratios"),
    ("train_vae.py", ["--ratios", 0.5, 0.6], "sum to 1"),
    ("train_vae.py", ["--steps", 0], "--steps: must be at least 1, not 0"),
    ("train_vae.py", ["--lr", 0], "--lr"),
    ("train_vae.py", ["--lr", "nan"], "--lr"),
    ("train_vae.py", ["--clip", "much"], "--clip: invalid float value"),
    ("train_vae.py", ["--seed", 2 ** 64], "--seed"),
    ("train_vae.py", ["--out", ""], "--out: the path is empty"),
    ("train_vae.py", ["--data", ""], "--data: the path is empty"),
    ("train_vae.py", ["--held-out", " "], "--held-out: the path is empty"),
    ("train_vae.py", ["--encode="], "--encode: the path is empty"),
    ("train_vae.py", ["--perceptual-weights", "file", ""], "--perceptual-weights: the path is empty"),
    ("train_transformer.py", ["--dropout", 1], "--dropout: must be at least 0 and below 1"),
    ("train_vae.py", ["--device", "cuda:99"], "no such device"),
    ("train_vae.py", ["--preset", "huge"], "invalid choice"),
    ("train_vae.py", ["--gan-weight", -1], "--gan-weight"),
    ("train_vae.py", ["--gan-weight", 1, "--size", 16], "at least 24"),
    ("train_vae.py", ["--perceptual-weight", 1, "--size", 8], "at least 16"),
    ("train_vae.py", ["--perceptual-weight", 1, "--perceptual-weights", "file"], "--perceptual-weight 0"),
    ("train_vae.py", ["--batch-size", 6, "--accumulate", 4], "--accumulate"),
    ("train_vae.py", ["--encode", "file"], "not a checkpoint"),
    ("train_vae.py", ["--encode", "nowhere.pt"], "no such file"),
    ("train_vae.py", ["--encode", "VAE", "--data", "empty"], "no images"),
    ("train_vae.py", ["--seed", -1], "--seed"),
    ("train_transformer.py", ["--codes", "CODES", "--width", 33], "width"),
    ("train_vae.py", ["--encode", "VAE", "--size", 64, "--resume"], "--resume has no effect with --encode; --size has"),
    ("train_vae.py", ["--encode", "VAE", "--compile"], "--compile has no effect with --encode"),
    ("train_vae.py", ["--encode", "VAE", "--preset", "toy"], "--preset has no effect with --encode"),
    ("train_vae.py", ["--out", "file/x"], "file"),
    ("train_transformer.py", [], "no such file: out/codes.pt (train_vae.py writes it); to make it from a DQ-VAE: "
                                 "python train_vae.py --encode out/vae.pt --out out"),
    ("train_transformer.py", ["--codes", "nowhere.pt"], "no such file"),
    ("train_transformer.py", ["--codes", "file"], "not a checkpoint"),
    ("train_transformer.py", ["--codes", "VAE"], "is of kind dq-vae, not dq-codes"),
    ("sample.py", ["nowhere.pt"], "no such file"),
    ("sample.py", ["file"], "not a checkpoint"),
    ("sample.py", ["VAE"], "is of kind dq-vae, not dq-transformer"),
    ("sample.py", ["MODEL", "--label", "dog"], "no class"),
    ("sample.py", ["MODEL", "--label", 4], "no class"),
    ("sample.py", ["MODEL", "--n", 0], "--n"),
    ("sample.py", ["MODEL", "--keep", 1], "--keep needs --input"),
    ("sample.py", ["MODEL", "--out", "x.psd"], "the name must end in .png"),
    ("sample.py", ["MODEL", "--temperature", -1], "temperature"),
    ("sample.py", ["MODEL", "--top-p", 0], "top-p"),
    ("sample.py", ["MODEL", "--input", "file"], "file"),
])
def test_wrong_input_gives_one_line(name, args, message, request, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("no checkpoint, no image")
    for word, fixture, file in (("VAE", "vae_run", "vae.pt"), ("CODES", "vae_run", "codes.pt"),
                                ("MODEL", "run", "transformer.pt")):
        if word in args:                                                     # only rows that need stage 2 train it
            args = [request.getfixturevalue(fixture) / file if a == word else a for a in args]
    args = [str(a) for a in args]
    with pytest.raises(SystemExit) as end:                                   # any other exception would be a traceback
        common.run(lambda: importlib.import_module(name[:-3]).main(args))
    if end.value.code == 2:                                                  # argparse has printed its line
        assert message in capsys.readouterr().err.splitlines()[-1]
    else:
        assert end.value.code.startswith("error: ") and message in end.value.code and "\n" not in end.value.code


def test_an_error_reaches_the_shell():
    done = script("sample.py", "nowhere.pt")
    assert done.returncode == 1 and done.stderr == "error: no such file: nowhere.pt (train_transformer.py writes it)\n"


# ------------------------------------------------------------------------------------------------
# Terminals, batch systems, and other runs


def output_to_a_file(monkeypatch):
    """Redirect stdout to a file with an old encoding. -> a buffer with what was written so far"""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="cp1252"))
    return raw


def test_every_line_can_be_printed(monkeypatch):
    """File names can contain characters that the encoding lacks, and control characters that steer a terminal."""
    output = output_to_a_file(monkeypatch)
    common.run(lambda: common.say("wrote 絵/caf\udce9/é\x1b[2J\rx\nnote: done"))
    expected = "wrote \\u7d75/caf\\udce9/é\\x1b[2J\\rx\nnote: done\n"
    assert output.getvalue().decode("cp1252").replace(os.linesep, "\n") == expected


def test_each_line_is_written_at_once(monkeypatch):
    """With nohup and in batch systems, the output is a file, which Python would buffer."""
    output, seen = output_to_a_file(monkeypatch), []

    def main():
        for line in ("data", "step 250"):
            tqdm.write(line)
            seen.append(output.getvalue().decode().split())
    common.run(main)
    assert seen == [["data"], ["data", "step", "250"]]


def test_a_reader_that_is_gone_is_no_error(monkeypatch):
    """The reader is `| head -1`. The output can still be flushed, as at the end of the script."""
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", open(writer, "w"))
    said = []

    def main():
        for line in ("data", "step 250", "x" * 100_000):
            common.say(line)
            said.append(line)
    common.run(main)
    sys.stdout.close()
    assert len(said) == 3


def test_a_closed_output_is_no_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    common.run(lambda: (common.say("x"), tqdm.write("y"), print("z", file=sys.stderr)))


def hold_lock(folder, done):
    kept = common.lock(folder)
    done.send("locked")
    time.sleep(60)


def test_child_processes_do_not_inherit_a_lock(tmp_path):
    """A loader process that outlives a killed run does not keep the next run from starting."""
    pytest.importorskip("fcntl")
    ours, theirs = multiprocessing.Pipe()
    fork = multiprocessing.get_context("fork")

    def parent():
        kept = common.lock(tmp_path)
        loader = fork.Process(target=time.sleep, args=[60])
        loader.start()
        theirs.send(loader.pid)
        os._exit(0)                                                          # as if killed
    process = fork.Process(target=parent)
    process.start()
    process.join()
    orphan = ours.recv()
    try:
        common.lock(tmp_path).close()
    finally:
        os.kill(orphan, signal.SIGKILL)


def try_lock(folder, result):
    result.send(call(lambda args: common.lock(*args), folder))


def holds_lock(folder):
    """-> the error message that another process gets for this folder, or None"""
    ours, theirs = multiprocessing.Pipe()
    multiprocessing.get_context("fork").Process(target=try_lock, args=(folder, theirs)).start()
    theirs.close()                                                           # so that a dead child is an EOFError
    return ours.recv()


def test_only_one_run_at_a_time_writes_into_a_folder(tmp_path, monkeypatch):
    pytest.importorskip("fcntl")
    told, done = multiprocessing.Pipe()
    other = multiprocessing.get_context("fork").Process(target=hold_lock, args=(tmp_path, done), daemon=True)
    other.start()
    told.recv()
    monkeypatch.setattr(train_vae, "open_data", lambda *args, **kwargs: dq.require(False, "the lock did not work"))
    line = f"error: another run is writing into {tmp_path}; wait until it ends, or use another --out"
    assert call(train_vae.main, "--out", tmp_path, *VAE, "--steps", 1) == line
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    other.kill()
    other.join()
    kept = common.lock(tmp_path)                                             # the file of the other process is left
    assert "another run is writing into" in holds_lock(tmp_path)
    kept.close()
    assert holds_lock(tmp_path) is None


def test_a_run_holds_its_lock_until_it_ends(tmp_path, monkeypatch):
    pytest.importorskip("fcntl")
    lines = []

    def open_data(*args, **kwargs):
        lines.append(holds_lock(tmp_path))
        raise dq.UserError("no data")
    monkeypatch.setattr(train_vae, "open_data", open_data)
    assert call(train_vae.main, "--out", tmp_path, *VAE, "--steps", 1) == "error: no data"
    lines.append(holds_lock(tmp_path))
    assert "another run is writing into" in lines[0] and lines[1] is None


def test_a_folder_without_locks_is_used_with_a_note(tmp_path, monkeypatch, capsys):
    fcntl = pytest.importorskip("fcntl")

    def lockf(file, how):
        raise OSError(37, "No locks available")
    monkeypatch.setattr(fcntl, "lockf", lockf)
    common.lock(tmp_path)
    assert "note: can't tell whether another run writes into" in capsys.readouterr().out


@pytest.mark.parametrize("name, value", [
    ("WORLD_SIZE", "abc"), ("WORLD_SIZE", "-1"), ("LOCAL_RANK", "-1"), ("RANK", "5"), ("RANK", "x"), ("RANK", "1.0"),
    ("MASTER_PORT", "99999"), ("MASTER_PORT", "http"), ("MASTER_PORT", "0"), ("TORCHELASTIC_RESTART_COUNT", "once")])
def test_every_variable_of_torchrun_is_checked(name, value, tmp_path, monkeypatch):
    valid = dict(WORLD_SIZE="2", RANK="0", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29999")
    if name == "TORCHELASTIC_RESTART_COUNT":
        valid["WORLD_SIZE"] = "1"
    monkeypatch.setattr(common.dist, "rendezvous", lambda url: dq.require(False, "joined"))
    for each, text in (valid | {name: value}).items():
        monkeypatch.setenv(each, text)
    flags = [*VAE, "--device", "cuda"] if name == "LOCAL_RANK" else VAE      # CPUs have no number
    line = call(train_vae.main, "--out", tmp_path, *flags)
    assert line.startswith("error: ") and name in line and value in line and "\n" not in line


def test_a_restarted_job_reads_no_address_of_the_first_one(tmp_path, monkeypatch):
    """torchrun keeps its store when it restarts a job. With several nodes, their counts of restarts can differ."""
    store, joined = common.dist.HashStore(), []
    monkeypatch.setattr(common.dist, "rendezvous", lambda url: iter([(store, 0, 2)]))
    monkeypatch.setattr(common.dist, "init_process_group", lambda *args, store, **how: joined.append(store))
    variables = dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29999")
    for count, local in (("0", "2"), ("1", "2"), ("1", "1")):
        for name, value in (variables | dict(TORCHELASTIC_RESTART_COUNT=count, LOCAL_WORLD_SIZE=local)).items():
            monkeypatch.setenv(name, value)
        common.prepare(SimpleNamespace(device="cpu", dtype="fp32", out=tmp_path),
                       SimpleNamespace(accumulate=1, batch_size=2))
    joined[0].set("rank 1", "an address")
    assert [each.check(["rank 1"]) for each in joined] == [True, False, True]


def test_a_port_in_use_gives_one_line(tmp_path, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        valid = dict(WORLD_SIZE="2", RANK="0", LOCAL_RANK="0", MASTER_ADDR="localhost",
                     MASTER_PORT=str(taken.getsockname()[1]))
        for each, text in valid.items():
            monkeypatch.setenv(each, text)
        line = call(train_vae.main, "--out", tmp_path, *VAE)
    assert line.startswith("error: could not join the 2 processes of this job (") and "\n" not in line


def test_missing_variables_of_torchrun_give_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    variables = dict(MASTER_PORT="29999", RANK="0", MASTER_ADDR="localhost")
    for name in variables:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():                                    # each time another one is missing
        line = call(train_vae.main, "--out", tmp_path, *VAE)
        assert line.startswith("error: ") and name in line and "\n" not in line
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WORLD_SIZE", "")                                     # the same as unset
    monkeypatch.setattr(train_vae, "open_data", lambda *args, **kwargs: dq.require(False, "reached"))
    assert call(train_vae.main, "--out", tmp_path, *VAE) == "error: reached"
