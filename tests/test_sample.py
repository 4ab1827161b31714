"""sample.py: what it refuses before any work, which checkpoint and options it takes, where it writes, and what.

    parse, default_options        test_options_that_are_not_given_are_those_of_the_checkpoint
    better_checkpoint, peek       test_the_better_checkpoint_of_a_folder
    has_guidance                  test_no_guidance_by_a_vector_that_was_not_trained
    check, check_ending           test_what_could_not_be_written_is_refused_in_one_line and two more
    label_number                  test_a_label_is_a_name_before_it_is_a_number and one more; test_common.py
    caption                       test_a_name_that_the_font_cannot_draw_becomes_its_number
    read_grain_map                test_a_grain_map_is_read_bright_for_fine and one more
    given_tiling, given_coarse    test_sampling.py
    save_gif                      test_moving_pictures
    main                          test_out_is_a_folder_or_a_pictures_name, test_sampling_with_every_option,
                                  test_a_stopped_job_keeps_what_is_complete, test_samples_json_says_how_and_what,
                                  test_images_are_saved_while_others_are_sampled, test_two_jobs_do_not_mix_their_images,
                                  test_no_image_waits_for_the_disk
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


# ------------------------------------------------------------------------------------------------
# Refused before any work: even the checkpoint, which is not there, has not been looked for


def draw(run, *args):
    return call(sample.main, run / "transformer.pt", "--batch-size", 4, "--device", DEVICE, *args)


@pytest.mark.parametrize("args, line", [
    (["--out", "s.psd"], "--out s.psd: can't write RGB images as .psd; use .png"),
    (["--out", "s.xbm"], "--out s.xbm: can't write RGB images as .xbm; use .png"),
    (["--out", "s.MPG"], "--out s.MPG: can't write RGB images as .MPG; use .png"),
    (["--gif", "g.jpg"], "--gif g.jpg: the name of an animation must end in .gif, .webp or .png"),
    (["--gif", "g"], "--gif g: the name of an animation must end in .gif, .webp or .png"),
    (["--gif", "a.png", "--out", "a.png"], "--out and --gif are the same file, a.png"),
    (["--input", "a.png", "--grain-map", "b.png"], "--input and --grain-map exclude each other"),
    (["--cfg", "inf"], "cfg must be between 0 and 1e6, not inf"),
])
def test_what_could_not_be_written_is_refused_in_one_line(args, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(sample.main, "nowhere.pt", *args) == f"error: {line}"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ["checkpoint", "--out", "--save-dir", "--gif", "--grain-map", "--input"])
def test_paths_are_not_empty_and_may_name_the_home_folder(flag, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    assert call(sample.main, *([""] if flag == "checkpoint" else [f"{flag}="])) == 2
    assert "the path is empty" in capsys.readouterr().err
    args = sample.parse(["~/x.png"] if flag == "checkpoint" else [f"{flag}=~/x.png"])
    assert getattr(args, flag.strip("-").replace("-", "_")) == tmp_path / "home/x.png"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_ending_is_refused_or_can_be_written(tmp_path):
    pictures, written = [common.to_picture(torch.rand(3, 16, 16) * 2 - 1)] * 3, 0
    for ending in Image.registered_extensions():
        path = tmp_path / f"x{ending}"
        try:
            sample.check_ending("--out", path)
        except dq.UserError:
            continue
        common.save_grid(path, pictures, columns=2)
        written += path.stat().st_size > 0
    assert written > 10 and not list(tmp_path.glob("*.tmp*"))


def test_images_of_a_larger_job_are_not_mixed_with_new_ones(run, tmp_path):
    folder = tmp_path / "all"
    for n in (3, 3, 5):                                                      # again, and a larger one: all are replaced
        assert draw(run, "--n", n, "--save-dir", folder, "--out", tmp_path) is None
    (folder / "notes.png").touch()                                           # no image of a job
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert draw(run, "--n", 3, "--seed", 1, "--save-dir", folder) == (
        f"error: --save-dir {folder} holds 000004.png of a larger job, which would stay among the 3 new images; "
        "empty the folder, or name another one")
    assert before == {path: path.read_bytes() for path in folder.iterdir()} and len(before) == 8

# ------------------------------------------------------------------------------------------------
# Where it writes


def test_out_is_a_folder_or_a_pictures_name(run, tmp_path, capsys):
    (tmp_path / "folder.png").mkdir()
    for out, file in ((tmp_path / "a/b.1", "a/b.1/samples.png"), (tmp_path / "c/x.jpg", "c/x.jpg"),
                      (tmp_path / "folder.png", "folder.png/samples.png")):
        assert draw(run, "--n", 2, "--out", out) is None
        assert capsys.readouterr().out.startswith(f"wrote {tmp_path / file} with temperature 1, ")
        assert Image.open(tmp_path / file).width > 200
    assert draw(run, "--n", 2) is None and Image.open(run / "samples.png").width > 200
    (tmp_path / "file").touch()
    assert "file" in draw(run, "--n", 2, "--out", tmp_path / "file")


@pytest.mark.parametrize("ending", ["gif", "webp", "png"])
def test_moving_pictures(ending, run, tmp_path):
    path = tmp_path / f"grow.{ending}"
    assert draw(run, "--n", 1, "--out", tmp_path, "--gif", path) is None
    assert Image.open(path).n_frames > 4


def while_sampling(monkeypatch, watch):
    """Call watch(n_complete) after each step of dq.generate, before sample.py hears of it."""
    real = dq.generate

    def generate(*args, progress, **kwargs):
        def spy(n_complete, pos, code):
            watch(n_complete)
            return progress(n_complete, pos, code)
        return real(*args, progress=spy, **kwargs)
    monkeypatch.setattr(dq, "generate", generate)


@pytest.mark.parametrize("first", [0, 1, 3])
def test_a_stopped_job_keeps_what_is_complete(first, run, tmp_path, monkeypatch, capsys):
    """A signal ends a job within a step, not at the end of a batch or of a call."""
    folder, complete = tmp_path / "all", []

    def watch(n_complete):
        assert (folder / "samples.json").exists()                            # our mark is there before any image
        complete.append(n_complete)
        if n_complete >= first and max(complete[:-1], default=-1) < first:
            os.kill(os.getpid(), signal.SIGTERM)
    while_sampling(monkeypatch, watch)
    assert draw(run, "--n", 9, "--batch-size", 7, "--out", tmp_path, "--save-dir", folder) == 143
    n = complete[-1]
    assert first <= n < 7 and n == next(k for k in complete if k >= first)   # not even one batch is complete
    assert sorted(path.name for path in folder.glob("*.png")) == [f"{i:06d}.png" for i in range(n)]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("stopping: ") and "a second signal stops at once" in lines[0]
    assert lines[-1] == f"stopped by SIGTERM when {n} of 9 images were sampled"
    assert (tmp_path / "samples.png").exists() == (n > 0) and len(lines) == (3 if n else 2)


def test_images_are_saved_while_others_are_sampled(run, tmp_path, monkeypatch):
    """Each batch as soon as it is complete, though one call of dq.generate samples many."""
    calls, there = [], []

    def watch(n_complete):
        calls.append(n_complete)
        there.append(len(list(tmp_path.glob("0*.png"))))
    while_sampling(monkeypatch, watch)
    assert draw(run, "--n", 11, "--out", tmp_path / "x", "--save-dir", tmp_path) is None
    for before, saved in zip(calls, there[1:]):
        assert saved == (before if before == 11 else before - before % 4)
    assert there[-1] == 8 and len(list(tmp_path.glob("0*.png"))) == 11


@pytest.mark.parametrize("slots, sync_every", [(2, 1), (5, 3), (7, 1)])
def test_progress_of_a_generation(slots, sync_every, device):
    """What is said to be complete is; the last call has all; and generation stops when it is told to."""
    model, label = tiny(8, (4, 2), V=5, device=device), torch.full((7,), -1, device=device)
    pos, code = dq.generate(model, label, seed=3)
    seen, how = [], dict(seed=3, slots=slots, sync_every=sync_every)

    def progress(n, so_far_pos, so_far_code):
        assert torch.equal(so_far_pos[:n], pos[:n]) and torch.equal(so_far_code[:n], code[:n])
        seen.append(n)
    both = dq.generate(model, label, progress=progress, **how)
    assert torch.equal(both[0], pos) and torch.equal(both[1], code)
    assert seen == sorted(seen) and seen[-1] == 7 and seen.count(7) == 1 and (slots == 7 or len(set(seen)) > 2)
    ends = []
    some_pos, _ = dq.generate(model, label, progress=lambda n, *_: ends.append(n) or n >= 1, **how)
    n = ends[-1]
    assert ends == seen[:len(ends)] and n >= 1 and all(k == 0 for k in ends[:-1])
    assert torch.equal(some_pos[:n], pos[:n])


@contextlib.contextmanager
def held(folder, name):
    """The lock of another process."""
    pytest.importorskip("fcntl")
    folder.mkdir(exist_ok=True)
    code = "import fcntl, sys; fcntl.lockf(file := open(sys.argv[1], 'a'), fcntl.LOCK_EX); print(); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", code, str(folder / name)], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE)
    other.stdout.readline()
    yield
    other.communicate()


def test_two_jobs_do_not_mix_their_images(run, tmp_path):
    """As two trainers: the second one is refused. A trainer does not keep a job from its folder."""
    line = "error: another run is writing into "
    flags = ["--n", 1, "--out", tmp_path / "out"]
    with held(tmp_path / "all", ".sample.lock"):
        assert draw(run, *flags, "--save-dir", tmp_path / "all").startswith(line + str(tmp_path / "all"))
        assert draw(run, *flags, "--save-dir", tmp_path / "other") is None
    with held(tmp_path / "out", ".sample.lock"):
        assert draw(run, *flags).startswith(line + str(tmp_path / "out"))
        assert draw(run, "--n", 1, "--out", tmp_path / "out/other.png") is None
    with held(tmp_path / "out", ".lock"):
        assert draw(run, *flags) is None
    assert not list((tmp_path / "all").glob("*.png"))


def test_no_image_waits_for_the_disk(run, tmp_path, monkeypatch):
    """They can be sampled again: grid, animation and images."""
    synced, real = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.path.basename(file.name)), real(file)))
    assert draw(run, "--n", 5, "--out", tmp_path, "--save-dir", tmp_path / "all", "--gif", tmp_path / "x.gif") is None
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
    for wrong in (["a"], dict(heat=1.0), dict(temperature="hot")):           # of another version, or damaged
        assert len(options_of(monkeypatch, save_model(tmp_path / "wrong.pt", wrong, classes=("a",)))) == 4
    monkeypatch.setenv("COLUMNS", "1000")                                    # no path is broken
    with pytest.raises(SystemExit):
        sample.parse([str(path), "--help"])
    assert "sampling options (default: the checkpoint's)" in capsys.readouterr().out
    assert call(sample.main, path, "--n", 1, "--cfg", 1, "--device", DEVICE, "--out", tmp_path / "x.png") is None
    assert capsys.readouterr().out == (
        f"wrote {tmp_path / 'x.png'} with temperature 1.25, top-k 3, top-p 0.75, cfg 1\n")


@pytest.mark.parametrize("carried", [None, dict(temperature=0.9, cfg=2.0)])
@pytest.mark.parametrize("config, without", [(dict(classes=("a", "b"), label_dropout=0.0), "label dropout"),
                                             (dict(), "classes"), (dict(label_dropout=0.0), "classes")])
def test_no_guidance_by_a_vector_that_was_not_trained(config, without, carried, tmp_path, monkeypatch):
    path = save_model(tmp_path / "a.pt", carried, **config)
    flags = ["--n", 1, "--device", DEVICE, "--out", tmp_path / "x.png"]
    assert options_of(monkeypatch, path)[3] == 1.0
    assert call(sample.main, path, *flags) is None and call(sample.main, path, *flags, "--cfg", 1) is None
    for cfg in ("2", "0.5", "0"):
        assert call(sample.main, path, *flags, "--cfg", cfg) == (
            f"error: --cfg {cfg}: {path} was trained without {without}, so it has no guidance; leave --cfg out")


def test_the_better_checkpoint_of_a_folder(tmp_path, monkeypatch, capsys):
    """That of the lowest validation loss, which is the last one unless transformer.best.pt is of another step."""
    monkeypatch.chdir(tmp_path)
    flags = ["--n", "1", "--device", DEVICE]
    assert call(sample.main, *flags) == "error: no such file: out/transformer.pt (train_transformer.py writes it)"
    last, best = Path("out/transformer.pt"), Path("out/transformer.best.pt")
    save_model(last, step=30)
    assert sample.parse([]).checkpoint == last
    save_model(best, dict(temperature=0.5), step=30, best=192.14)
    assert sample.parse([]).checkpoint == last and sample.parse(["out"]).checkpoint == last
    assert call(sample.main, *flags) is None and "validation" not in capsys.readouterr().out
    save_model(best, dict(temperature=0.5), step=10, best=192.14)
    assert sample.parse([]).checkpoint == best and options_of(monkeypatch).temperature == 0.5
    assert sample.parse([str(last)]).checkpoint == last
    assert call(sample.main, *flags) is None
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith(f"sampling from {best}: ") and "192.1 nats per image at step 10" in line
    assert Path("out/samples.png").exists()
    last.unlink()
    assert sample.parse(["out"]).checkpoint == best


# ------------------------------------------------------------------------------------------------
# What it draws


def test_samples_json_says_how_and_what(run, tmp_path):
    assert draw(run, "--n", 3, "--temperature", 0.9, "--out", tmp_path, "--save-dir", tmp_path / "all") is None
    told = json.loads((tmp_path / "all/samples.json").read_text())
    assert (told["n"], told["temperature"], told["compile"], told["label"]) == (3, 0.9, False, None)
    assert told["checkpoint"] == str(run / "transformer.pt") and told["written_by"] == "dq" and told["cfg"] == 1.5
    names = dq.load_transformer(run / "transformer.pt", "cpu")[0].config.classes
    assert told["labels"] == {f"00000{i}.png": names[i] for i in range(3)}


@pytest.mark.parametrize("label, number, notes", [("2", 0, False), ("10", 2, False), ("1", 1, True), ("x", 3, False)])
def test_a_label_is_a_name_before_it_is_a_number(label, number, notes, capsys):
    assert sample.label_number(label, ("2", "7", "10", "x")) == number
    assert ("note: no class is named 1" in capsys.readouterr().out) == notes


@pytest.mark.parametrize("name", ["caf\u00e9", "\u1100\u1161 b", "\u00c5ngstr\u00f6m"])
def test_a_label_matches_in_any_unicode_normal_form(name):
    for folder, typed in itertools.product(("NFC", "NFD", "NFKC"), repeat=2):
        folder, typed = (unicodedata.normalize(form, name) for form in (folder, typed))
        assert sample.label_number(typed, ("a", folder, "z")) == 1
    composed, apart = (unicodedata.normalize(form, name) for form in ("NFC", "NFD"))
    both = ("a", composed, apart)                                            # two folders, on some file systems
    assert [sample.label_number(each, both) for each in (composed, apart)] == [1, 2]


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


def test_a_grain_map_is_read_bright_for_fine(tmp_path):
    from PIL import Image
    picture = Image.new("L", (40, 40), 0)
    picture.paste(255, (20, 0, 40, 20))
    picture.paste(120, (0, 20, 20, 40))
    picture.save(tmp_path / "map.png")
    assert sample.read_grain_map(tmp_path / "map.png", dq.Layout(16, (8, 4, 2))).tolist() == [[[0, 2], [1, 0]]]


@pytest.mark.parametrize("size", [(1, 1), (1000, 3)])
def test_a_grain_map_of_another_shape_is_stretched(size, run, tmp_path):
    Image.new("L", size, 255).save(tmp_path / "map.png")
    flags = ["--n", 1, "--grain-map", tmp_path / "map.png", "--out", tmp_path / "x.png", "--device", DEVICE]
    assert call(sample.main, run / "transformer.pt", *flags) is None


def test_a_name_that_the_font_cannot_draw_becomes_its_number():
    classes = ("名前", "cross", "two\nlines", "caf\udce9", "a b")
    assert [sample.caption(i, classes) for i in range(5)] == ["class 0", "cross", "class 2", "class 3", "a b"]
    font = ImageFont.load_default()
    glyphs = [bytes(font.getmask(chr(i))) for i in range(33, 127)]
    assert len(set(glyphs)) > 85                                             # it does have what is left as it is


def test_seeds_that_differ_draw_images_that_differ(device):
    model = tiny().to(device)
    label = torch.full((8,), -1, device=device)
    drawn = [dq.generate(model, label, seed=seed) for seed in (0, 1, 2 ** 32, 2 ** 62, 2 ** 63, 2 ** 64 - 1)]
    for i, (pos, code) in enumerate(drawn):
        assert all(not (torch.equal(pos, p) and torch.equal(code, c)) for p, c in drawn[:i])


@pytest.mark.parametrize("name, label", [("earth64", "coast"), ("emoji64", "flags-noto")])
def test_the_weights_that_come_with_the_code_draw(name, label, tmp_path, capsys):
    path = ROOT / f"assets/{name}.pt"
    assert path.stat().st_size < 16e6
    grains = Image.new("L", (8, 8))                                          # all coarse, the fewest codes
    grains.save(tmp_path / "map.png")
    assert call(sample.main, path, "--label", label, "--n", 1, "--grain-map", tmp_path / "map.png", "--save-dir",
                tmp_path, "--out", tmp_path / "grid.png", "--device", DEVICE) is None
    low, high = Image.open(tmp_path / "000000.png").convert("L").getextrema()
    assert high - low > 8                                                    # a picture
