"""sample.py: what it refuses, before any work, where it writes, and what.

    parse, check, check_ending    test_what_could_not_be_written_is_refused_in_one_line and two more
    label_number                  test_a_label_is_a_name_before_it_is_a_number; unknown ones: test_common.py
    caption                       test_a_name_that_the_font_cannot_draw_becomes_its_number
    read_grain_map                test_a_grain_map_is_read_bright_for_fine and one more
    given_tiling, given_coarse    test_sampling.py
    save_gif                      test_moving_pictures
    main                          test_out_is_a_folder_or_a_pictures_name, test_sampling_with_every_option,
                                  test_a_stopped_job_keeps_what_is_drawn, test_samples_json_says_how_and_what
"""
import json
import os
import signal

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
    (["--out", "s.psd"], "--out s.psd: no picture in colour can be written as .psd; take .png"),
    (["--out", "s.xbm"], "--out s.xbm: no picture in colour can be written as .xbm; take .png"),
    (["--out", "s.MPG"], "--out s.MPG: no picture in colour can be written as .MPG; take .png"),
    (["--gif", "g.jpg"], "--gif g.jpg: pictures that move end in .gif, .webp or .png"),
    (["--gif", "g"], "--gif g: pictures that move end in .gif, .webp or .png"),
    (["--gif", "a.png", "--out", "a.png"], "--out and --gif are the same file, a.png"),
    (["--input", "a.png", "--grain-map", "b.png"], "--input and --grain-map exclude each other"),
    (["--cfg", "inf"], "cfg must be between 0 and 1e6, not inf"),
])
def test_what_could_not_be_written_is_refused_in_one_line(args, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(sample.main, "nowhere.pt", *args) == f"error: {line}"
    assert not list(tmp_path.iterdir())


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
        f"error: --save-dir {folder} holds 000004.png of a larger job, which --n 3 would leave among its own images; "
        "empty it, or name another folder")
    assert before == {path: path.read_bytes() for path in folder.iterdir()} and len(before) == 7

# ------------------------------------------------------------------------------------------------
# Where it writes


def test_out_is_a_folder_or_a_pictures_name(run, tmp_path, capsys):
    (tmp_path / "folder.png").mkdir()
    for out, file in ((tmp_path / "a/b.1", "a/b.1/samples.png"), (tmp_path / "c/x.jpg", "c/x.jpg"),
                      (tmp_path / "folder.png", "folder.png/samples.png")):
        assert draw(run, "--n", 2, "--out", out) is None
        assert capsys.readouterr().out == f"wrote {tmp_path / file}\n"
        assert Image.open(tmp_path / file).width > 200
    assert draw(run, "--n", 2) is None and Image.open(run / "samples.png").width > 200
    (tmp_path / "file").touch()
    assert "file" in draw(run, "--n", 2, "--out", tmp_path / "file")


@pytest.mark.parametrize("ending", ["gif", "webp", "png"])
def test_moving_pictures(ending, run, tmp_path):
    path = tmp_path / f"grow.{ending}"
    assert draw(run, "--n", 1, "--out", tmp_path, "--gif", path) is None
    assert Image.open(path).n_frames > 4


def test_a_stopped_job_keeps_what_is_drawn(run, tmp_path, monkeypatch, capsys):
    """After the batches of a round the grid is written; the mark of our own pictures was there before the first."""
    marked, real = [], dq.generate

    def generate(*args, **kwargs):
        marked.append((tmp_path / "all/samples.json").exists())
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)
    monkeypatch.setattr(dq, "generate", generate)
    monkeypatch.setattr(sample, "ROUND", 1)
    assert draw(run, "--n", 9, "--out", tmp_path, "--save-dir", tmp_path / "all") == 143
    assert capsys.readouterr().out.endswith("stopped by SIGTERM when 4 of 9 images were drawn\n")
    assert marked == [True] and len(list((tmp_path / "all").glob("*.png"))) == 4
    assert Image.open(tmp_path / "samples.png").width > 200


# ------------------------------------------------------------------------------------------------
# What it draws


def test_samples_json_says_how_and_what(run, tmp_path):
    assert draw(run, "--n", 3, "--temperature", 0.9, "--out", tmp_path, "--save-dir", tmp_path / "all") is None
    told = json.loads((tmp_path / "all/samples.json").read_text())
    assert (told["n"], told["temperature"], told["compile"], told["label"]) == (3, 0.9, False, None)
    assert told["checkpoint"] == str(run / "transformer.pt")
    names = dq.load_transformer(run / "transformer.pt", "cpu")[0].config.classes
    assert told["labels"] == {f"00000{i}.png": names[i] for i in range(3)}


@pytest.mark.parametrize("label, number, notes", [("2", 0, False), ("10", 2, False), ("1", 1, True), ("x", 3, False)])
def test_a_label_is_a_name_before_it_is_a_number(label, number, notes, capsys):
    assert sample.label_number(label, ("2", "7", "10", "x")) == number
    assert ("note: no class is named 1" in capsys.readouterr().out) == notes


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
