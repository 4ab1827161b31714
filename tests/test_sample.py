"""sample.py: which flags it refuses, which checkpoint and options it takes, where it writes, and what.

    parse, check_ending           test_wrong_flags_are_refused_before_any_work, test_out_is_a_folder_or_a_file,
                                  test_a_folder_means_its_best_checkpoint and three more; test_wiring.py
    load                          test_options_that_are_not_given_are_those_of_the_checkpoint,
                                  test_no_guidance_without_a_trained_vector, test_the_checkpoint_is_read_once
    label_number                  test_a_label_is_a_name_before_it_is_a_number and one more; test_common.py
    caption                       test_a_name_that_the_font_cannot_draw_becomes_its_number
    read_grain_map                test_a_bright_region_is_fine and one more
    given_tiling, given_coarse    test_sampling.py
    save_gif                      test_animations; test_wiring.py
    main                          test_sampling_with_every_option, test_a_stopped_job_keeps_its_complete_images,
                                  test_samples_json_describes_the_job, test_images_are_saved_while_others_are_sampled,
                                  test_two_jobs_do_not_mix_their_images, test_no_image_is_flushed_to_disk
"""
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import unicodedata
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageFont

import common
import dq
import sample
from conftest import DEVICE, ROOT, call
from test_transformer import tiny


def sample_from(run, *args):
    return call(sample.main, run / "transformer.pt", "--batch-size", 4, "--device", DEVICE, *args)


# ------------------------------------------------------------------------------------------------
# Flags that are refused before any work: the checkpoint does not even exist


@pytest.mark.parametrize("args, line", [
    (["--out", "s.psd"], "--out s.psd: the name must end in .png, .jpg, .jpeg, .webp, .gif, .bmp, .tif, .tiff"),
    (["--out", "s.MPG"], "--out s.MPG: the name must end in .png, .jpg, .jpeg, .webp, .gif, .bmp, .tif, .tiff"),
    (["--gif", "g.jpg"], "--gif g.jpg: the name must end in .gif, .webp"),
    (["--gif", "g"], "--gif g: the name must end in .gif, .webp"),
    (["--keep", "1"], "--keep needs --input"),
    (["--cfg", "inf"], "cfg must be between 0 and 1e6, not inf"),
])
def test_wrong_flags_are_refused_before_any_work(args, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(sample.main, "nowhere.pt", *args) == f"error: {line}"
    assert not list(tmp_path.iterdir())


def test_a_photo_and_a_granularity_map_exclude_each_other(capsys):
    assert call(sample.main, "nowhere.pt", "--input", "a.png", "--grain-map", "b.png") == 2
    assert "not allowed with argument --input" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["checkpoint", "--out", "--save-dir", "--gif", "--grain-map", "--input"])
def test_paths_are_not_empty_and_may_name_the_home_folder(flag, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    assert call(sample.main, *([""] if flag == "checkpoint" else [f"{flag}="])) == 2
    assert "the path is empty" in capsys.readouterr().err
    args = sample.parse(["~/x.gif"] if flag == "checkpoint" else [f"{flag}=~/x.gif"])
    assert getattr(args, flag.strip("-").replace("-", "_")) == tmp_path / "home/x.gif"


def test_every_accepted_ending_can_be_written(tmp_path):
    pictures, accepted = [common.to_picture(torch.rand(3, 16, 16) * 2 - 1)] * 3, []
    for ending in Image.registered_extensions():
        path = tmp_path / f"x{ending}"
        with contextlib.suppress(dq.UserError):
            sample.check_ending("--out", path)
            accepted.append(path)
    for path in accepted:
        common.save_grid(path, pictures, columns=2)
    assert len(accepted) == 8 and sorted(tmp_path.iterdir()) == sorted(accepted)


def test_images_of_a_larger_job_are_not_mixed_with_new_ones(run, tmp_path):
    folder = tmp_path / "all"
    for n in (3, 3, 5):                                                      # the same job again, then a larger one
        assert sample_from(run, "--n", n, "--save-dir", folder, "--out", tmp_path) is None
    (folder / "notes.png").touch()                                           # not an image of a job
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert sample_from(run, "--n", 3, "--seed", 1, "--save-dir", folder) == (
        f"error: {folder / '000003.png'} is of a larger job; empty the folder, or use another --save-dir")
    assert before == {path: path.read_bytes() for path in folder.iterdir()} and len(before) == 8


# ------------------------------------------------------------------------------------------------
# Where it writes


def test_out_is_a_folder_or_a_file(run, tmp_path, capsys):
    (tmp_path / "folder.png").mkdir()
    for out, file in ((tmp_path / "a/b.1", "a/b.1/samples.png"), (tmp_path / "c/x.jpg", "c/x.jpg"),
                      (tmp_path / "folder.png", "folder.png/samples.png")):
        assert sample_from(run, "--n", 2, "--out", out) is None
        assert capsys.readouterr().out.startswith(f"wrote {tmp_path / file} with temperature 1, ")
        assert Image.open(tmp_path / file).width > 200
    assert sample_from(run, "--n", 2) is None and Image.open(run / "samples.png").width > 200
    (tmp_path / "file").touch()
    assert "file" in sample_from(run, "--n", 2, "--out", tmp_path / "file")


@pytest.mark.parametrize("ending", ["gif", "webp"])
def test_animations(ending, run, tmp_path):
    path = tmp_path / f"new/grow.{ending}"
    assert sample_from(run, "--n", 1, "--out", tmp_path, "--gif", path) is None
    assert Image.open(path).n_frames > 4


def while_sampling(monkeypatch, watch):
    """Call watch(n_complete) after each step of dq.generate, before sample.py learns about it."""
    real = dq.generate

    def generate(*args, progress, **kwargs):
        def spy(n_complete, pos, code):
            watch(n_complete)
            return progress(n_complete, pos, code)
        return real(*args, progress=spy, **kwargs)
    monkeypatch.setattr(dq, "generate", generate)


@pytest.mark.parametrize("first", [0, 1, 3])
def test_a_stopped_job_keeps_its_complete_images(first, run, tmp_path, monkeypatch, capsys):
    """A signal ends a job within a step, before a batch is complete."""
    folder, complete = tmp_path / "all", []

    def watch(n_complete):
        assert (folder / "samples.json").exists(), "images without samples.json could be mistaken for data"
        complete.append(n_complete)
        if n_complete >= first and max(complete[:-1], default=-1) < first:
            os.kill(os.getpid(), signal.SIGTERM)
    while_sampling(monkeypatch, watch)
    assert sample_from(run, "--n", 9, "--batch-size", 7, "--out", tmp_path, "--save-dir", folder,
                       "--gif", tmp_path / "x.gif") == 143
    n = complete[-1]
    assert first <= n < 7 and n == next(k for k in complete if k >= first)   # not even one batch is complete
    assert sorted(path.name for path in folder.glob("*.png")) == [f"{i:06d}.png" for i in range(n)]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("stopping: ") and "a second signal stops at once" in lines[0]
    assert lines[-1] == f"stopped by SIGTERM when {n} of 9 images were sampled"
    for name in ("samples.png", "x.gif"):
        assert (tmp_path / name).exists() == (n > 0), name
    assert len(lines) == (3 if n else 2)


def test_images_are_saved_while_others_are_sampled(run, tmp_path, monkeypatch):
    """dq.generate is called once. Each batch is saved as soon as it is complete."""
    complete, saved = [], []

    def watch(n_complete):
        complete.append(n_complete)
        saved.append(len(list(tmp_path.glob("0*.png"))))
    while_sampling(monkeypatch, watch)
    assert sample_from(run, "--n", 11, "--out", tmp_path / "x", "--save-dir", tmp_path) is None
    assert complete == sorted(complete) and complete[-1] == 11, "more than one call of dq.generate"
    for before, n in zip(complete, saved[1:]):
        assert n == before - before % 4
    assert saved[-1] == 8 and len(list(tmp_path.glob("0*.png"))) == 11


@pytest.mark.parametrize("slots, sync_every", [(2, 1), (5, 3), (7, 1)])
def test_progress_of_a_generation(slots, sync_every, device):
    """The images that are reported as complete are complete, the last call has all, and returning True ends it."""
    model, label = tiny(8, (4, 2), V=5, device=device), torch.full((7,), -1, device=device)
    pos, code = dq.generate(model, label, seed=3)
    reported, how = [], dict(seed=3, slots=slots, sync_every=sync_every)

    def progress(n, so_far_pos, so_far_code):
        assert torch.equal(so_far_pos[:n], pos[:n]) and torch.equal(so_far_code[:n], code[:n])
        reported.append(n)
    both = dq.generate(model, label, progress=progress, **how)
    assert torch.equal(both[0], pos) and torch.equal(both[1], code)
    assert reported == sorted(reported) and reported[-1] == 7 and reported.count(7) == 1
    assert slots == 7 or len(set(reported)) > 2
    until_stopped = []
    some_pos, _ = dq.generate(model, label, progress=lambda n, *_: until_stopped.append(n) or n >= 1, **how)
    n = until_stopped[-1]
    assert until_stopped == reported[:len(until_stopped)] and n >= 1 and all(k == 0 for k in until_stopped[:-1])
    assert torch.equal(some_pos[:n], pos[:n])


@contextlib.contextmanager
def locked(folder, name):
    """Another process holds the lock."""
    pytest.importorskip("fcntl")
    folder.mkdir(exist_ok=True)
    code = "import fcntl, sys; fcntl.lockf(file := open(sys.argv[1], 'a'), fcntl.LOCK_EX); print(); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", code, str(folder / name)], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE)
    other.stdout.readline()
    yield
    other.communicate()


def test_two_jobs_do_not_mix_their_images(run, tmp_path):
    """The second job is refused, like a second trainer. A trainer or other files in the same folder do not matter."""
    line = "error: another run is writing into "
    flags = ["--n", 1, "--out", tmp_path / "out"]
    with locked(tmp_path / "all", ".samples.json.lock"):
        assert sample_from(run, *flags, "--save-dir", tmp_path / "all").startswith(line + str(tmp_path / "all"))
        assert sample_from(run, *flags, "--save-dir", tmp_path / "other") is None
    for name, more in (("samples.png", []), ("x.gif", ["--gif", tmp_path / "out/x.gif"])):
        with locked(tmp_path / "out", f".{name}.lock"):
            assert sample_from(run, *flags, *more).startswith(line + str(tmp_path / "out"))
            assert sample_from(run, "--n", 1, "--out", tmp_path / "out/other.png") is None
    with locked(tmp_path / "out", ".other.png.lock"):
        assert sample_from(run, "--n", 1, "--out", tmp_path / "out/other.png").startswith(line)
    with locked(tmp_path / "out", ".lock"):
        assert sample_from(run, *flags) is None
    assert not list((tmp_path / "all").glob("*.png"))


def test_no_image_is_flushed_to_disk(run, tmp_path, monkeypatch):
    """The grid, the animation and the images can be sampled again, so none of them waits for the disk."""
    synced, real = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.path.basename(file.name)), real(file)))
    flags = ["--out", tmp_path, "--save-dir", tmp_path / "all", "--gif", tmp_path / "x.gif"]
    assert sample_from(run, "--n", 5, *flags) is None
    assert synced == ["samples.json.tmp"]
    assert len([*tmp_path.rglob("*.png"), *tmp_path.rglob("*.gif")]) == 5 + 2


# ------------------------------------------------------------------------------------------------
# Which checkpoint, and which options


def save_model(path, options=None, step=7, best=100.0, **config):
    """A random model -> its path. options: a dict that the checkpoint carries, or None"""
    model = tiny(16, (8, 4), V=16, **config)
    vae = dq.DQVAE(dq.VAEConfig(size=16, codebook_size=16, channels=32, multipliers=(1,)))
    more = {} if options is None else dict(sample_options=options)
    path.parent.mkdir(parents=True, exist_ok=True)
    dq.save_checkpoint(path, "dq-transformer", model.config, model, vae_config=asdict(vae.config),
                       vae_weights=vae.state_dict(), step=step, best=best, **more)
    return path


def options_of(monkeypatch, *flags):
    """The options with which sample.main calls dq.generate, if it is given these flags."""
    def generate(model, label, options, *rest, **how):
        raise InterruptedError(options)
    with monkeypatch.context() as patch, pytest.raises(InterruptedError) as end:
        patch.setattr(dq, "generate", generate)
        sample.main([str(each) for each in ("--n", 1, "--device", DEVICE, *flags)])
    return end.value.args[0]


def test_options_that_are_not_given_are_those_of_the_checkpoint(tmp_path, monkeypatch, capsys):
    carried = dict(temperature=1.25, top_k=3, top_p=0.75, cfg=1.5)
    path = save_model(tmp_path / "a.pt", carried, classes=("a", "b"))
    assert options_of(monkeypatch, path) == (1.25, 3, 0.75, 1.5)
    assert options_of(monkeypatch, "--n", "16", path, "--top-k", 0) == (1.25, 0, 0.75, 1.5)
    assert options_of(monkeypatch, "--cfg", 3, "--temperature", 0.5, path) == (0.5, 3, 0.75, 3.0)
    old = save_model(tmp_path / "old.pt", classes=("a", "b"))
    assert options_of(monkeypatch, old) == (0.7, 0, 1.0, 2.0)
    monkeypatch.setenv("COLUMNS", "1000")                                    # argparse then breaks no line
    with pytest.raises(SystemExit):
        sample.parse([str(path), "--help"])
    assert "sampling options (default: the checkpoint's)" in capsys.readouterr().out
    assert call(sample.main, path, "--n", 1, "--cfg", 1, "--device", DEVICE, "--out", tmp_path / "x.png") is None
    assert capsys.readouterr().out == (
        f"wrote {tmp_path / 'x.png'} with temperature 1.25, top-k 3, top-p 0.75, cfg 1\n")
    torch.save(torch.load(path, weights_only=True) | dict(psnr=21.46), path)  # as train_transformer.py does
    assert call(sample.main, path, "--n", 1, "--device", DEVICE, "--out", tmp_path / "x.png") is None
    assert capsys.readouterr().out.endswith(
        "cfg 1.5; reconstructions limit them at 21.5 dB, which more --steps of train_vae.py raise\n")


@pytest.mark.parametrize("carried", [None, dict(temperature=0.9, cfg=2.0)])
@pytest.mark.parametrize("config", [dict(classes=("a", "b"), label_dropout=0.0), dict(), dict(label_dropout=0.0)])
def test_no_guidance_without_a_trained_vector(config, carried, tmp_path, monkeypatch):
    """Guidance extrapolates from the embedding of "no label", which only label dropout trains."""
    path = save_model(tmp_path / "a.pt", carried, **config)
    assert options_of(monkeypatch, path)[3] == options_of(monkeypatch, path, "--cfg", 1)[3] == 1.0
    for cfg in ("2", "0.5", "0"):
        assert call(sample.main, path, "--n", 1, "--device", DEVICE, "--cfg", cfg) == (
            f"error: --cfg {cfg} needs classes and label dropout, which {path} lacks")


def test_the_checkpoint_is_read_once(tmp_path, monkeypatch):
    path, read, real = save_model(tmp_path / "transformer.best.pt", classes=("a",)), [], torch.load
    monkeypatch.setattr(torch, "load", lambda path, **how: (read.append(path), real(path, **how))[1])
    options_of(monkeypatch, tmp_path)
    assert read == [path]


def test_a_folder_means_its_best_checkpoint(tmp_path, monkeypatch, capsys):
    """That of the lowest validation loss, unless the last one is named. The first line names it."""
    monkeypatch.chdir(tmp_path)
    flags = ["--n", "1", "--device", DEVICE]
    assert call(sample.main, *flags) == "error: no such file: out/transformer.pt (train_transformer.py writes it)"
    last, best = Path("out/transformer.pt"), Path("out/transformer.best.pt")
    save_model(last, step=30)
    assert sample.parse([]).checkpoint == sample.parse(["out"]).checkpoint == last
    assert call(sample.main, *flags) is None and "validation" not in capsys.readouterr().out
    save_model(best, dict(temperature=0.5), step=10, best=192.14)
    assert sample.parse([]).checkpoint == sample.parse(["out"]).checkpoint == best
    assert sample.parse([str(last)]).checkpoint == last
    assert options_of(monkeypatch).temperature == 0.5
    assert capsys.readouterr().out.splitlines()[0] == (
        f"sampling from {best}: step 10, lowest validation loss, 192.1 nats")
    assert Path("out/samples.png").exists()
    last.unlink()
    assert sample.parse(["out"]).checkpoint == best


# ------------------------------------------------------------------------------------------------
# What it writes


def test_samples_json_describes_the_job(run, tmp_path):
    assert sample_from(run, "--n", 3, "--temperature", 0.9, "--out", tmp_path, "--save-dir", tmp_path / "all") is None
    told = json.loads((tmp_path / "all/samples.json").read_text())
    assert (told["n"], told["temperature"], told["compile"], told["label"]) == (3, 0.9, False, None)
    assert told["device"].startswith(f"{DEVICE.partition(':')[0]} (") and told["dtype"] in ("fp32", "bf16")
    assert told["checkpoint"] == str(run / "transformer.pt") and told["written_by"] == "dq" and told["cfg"] == 1.5
    names = dq.load_transformer(run / "transformer.pt", "cpu")[0].config.classes
    assert told["labels"] == {f"00000{i}.png": names[i] for i in range(3)}


@pytest.mark.parametrize("classes, numbers", [
    (("2", "7", "10", "x"), {"2": 0, "10": 2, "x": 3, "1": None}),           # a number names a class here, or nothing
    (("circle", "square"), {"square": 1, "1": 1, "2": None, "-1": None, "": None})])
def test_a_label_is_a_name_before_it_is_a_number(classes, numbers):
    for label, number in numbers.items():
        if number is not None:
            assert sample.label_number(label, classes) == number
            continue
        with pytest.raises(dq.UserError, match=f"^no class '{label}' among the {len(classes)}: {', '.join(classes)}$"):
            sample.label_number(label, classes)


@pytest.mark.parametrize("name", ["caf\u00e9", "\u1100\u1161 b", "\u00c5ngstr\u00f6m"])
def test_a_label_matches_in_any_unicode_normal_form(name):
    for folder, typed in itertools.product(("NFC", "NFD", "NFKC"), repeat=2):
        folder, typed = (unicodedata.normalize(form, name) for form in (folder, typed))
        assert sample.label_number(typed, ("a", folder, "z")) == 1


def test_sampling_with_every_option(run, images, tmp_path):
    photo = next(images.rglob("*.png"))
    Image.linear_gradient("L").save(tmp_path / "map.png")
    for extra in (["--label", "cross", "--temperature", 0.9, "--top-k", 5, "--top-p", 0.9, "--cfg", 2,
                   "--gif", tmp_path / "x.gif"],
                  ["--label", "3", "--grain-map", tmp_path / "map.png"],
                  ["--input", photo, "--keep", 1],
                  ["--dtype", "fp32"]):
        assert call(sample.main, run / "transformer.pt", "--n", 5, "--batch-size", 3, "--device", DEVICE,
                    "--out", tmp_path / "grid.png", "--save-dir", tmp_path / "all", *extra) is None
        assert sorted(p.name for p in (tmp_path / "all").glob("*.png")) == [f"{i:06d}.png" for i in range(5)]
        assert Image.open(tmp_path / "all/000004.png").size == (16, 16)
    assert Image.open(tmp_path / "grid.png").width > 200
    assert Image.open(tmp_path / "x.gif").n_frames > 4


def test_a_bright_region_is_fine(tmp_path):
    picture = Image.new("L", (40, 40), 0)
    picture.paste(255, (20, 0, 40, 20))
    picture.paste(120, (0, 20, 20, 40))
    picture.save(tmp_path / "map.png")
    assert sample.read_grain_map(tmp_path / "map.png", dq.Layout(16, (8, 4, 2))).tolist() == [[[0, 2], [1, 0]]]


@pytest.mark.parametrize("size", [(1, 1), (1000, 3)])
def test_a_granularity_map_of_any_shape_is_stretched(size, tmp_path):
    Image.new("L", size, 255).save(tmp_path / "map.png")
    assert sample.read_grain_map(tmp_path / "map.png", dq.Layout(16, (8, 4))).tolist() == [[[1, 1], [1, 1]]]


def test_a_name_that_the_font_cannot_draw_becomes_its_number():
    classes = ("名前", "cross", "two\nlines", "caf\udce9", "a b")
    assert [sample.caption(i, classes) for i in range(5)] == ["class 0", "cross", "class 2", "class 3", "a b"]
    font = ImageFont.load_default()
    glyphs = [bytes(font.getmask(chr(i))) for i in range(33, 127)]
    assert len(set(glyphs)) > 85, "the font lacks ASCII characters"


def test_every_seed_gives_other_images(device):
    model = tiny().to(device)
    label = torch.full((8,), -1, device=device)
    sampled = [dq.generate(model, label, seed=seed) for seed in (0, 1, 2 ** 32, 2 ** 62, 2 ** 63, 2 ** 64 - 1)]
    for i, (pos, code) in enumerate(sampled):
        assert all(not (torch.equal(pos, p) and torch.equal(code, c)) for p, c in sampled[:i])


@pytest.mark.parametrize("name, label", [("earth64", "coast"), ("emoji64", "flags-noto")])
def test_the_shipped_weights_sample_an_image(name, label, tmp_path):
    path = ROOT / f"assets/{name}.pt"
    assert path.stat().st_size < 16e6
    grains = Image.new("L", (8, 8))                                          # all coarse: the fewest codes
    grains.save(tmp_path / "map.png")
    assert call(sample.main, path, "--label", label, "--n", 1, "--grain-map", tmp_path / "map.png", "--save-dir",
                tmp_path, "--out", tmp_path / "grid.png", "--device", DEVICE) is None
    low, high = Image.open(tmp_path / "000000.png").convert("L").getextrema()
    assert high - low > 8, "the image is uniform"
