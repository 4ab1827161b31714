"""sample.py: what it refuses, before any work, and where it writes. Files are whole or as they were."""
import resource
from contextlib import contextmanager

import pytest
import torch
from PIL import Image, ImageFont

import common
import dq
import sample
from conftest import DEVICE, call
from test_transformer import tiny


def draw(run, *args):
    return call(sample.main, run / "transformer.pt", "--batch-size", 4, "--device", DEVICE, *args)


@contextmanager
def nearly_full_disk(room=300):
    """No file may become larger than so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# ------------------------------------------------------------------------------------------------
# Refused before any work: even the checkpoint, which is not there, has not been looked for


@pytest.mark.parametrize("args, line", [
    (["--out", "s.psd"], "--out s.psd: no picture in colour can be written as .psd; take .png"),
    (["--out", "s.xbm"], "--out s.xbm: no picture in colour can be written as .xbm; take .png"),
    (["--out", "s.MPG"], "--out s.MPG: no picture in colour can be written as .MPG; take .png"),
    (["--gif", "g.jpg"], "--gif g.jpg: pictures that move end in .gif, .webp or .png"),
    (["--gif", "g"], "--gif g: pictures that move end in .gif, .webp or .png"),
    (["--gif", "a.png", "--out", "a.png"], "--out and --gif are the same file, a.png"),
    (["--seed", 2 ** 64], "--seed must be at least 0 and below 2**64, not 18446744073709551616"),
    (["--seed", -1], "--seed must be at least 0 and below 2**64, not -1"),
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
        f"error: --save-dir {folder} holds 000003.png of a larger job, which --n 3 would leave among its own images; "
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


@pytest.mark.parametrize("option, name", [
    ("--out", "s.png"), ("--out", "s.jpg"), ("--gif", "s.gif"), ("--save-dir", "000000.png")])
def test_a_full_disk_leaves_the_older_picture_whole(option, name, run, tmp_path):
    (tmp_path / name).write_bytes(b"an older one")
    target = tmp_path if option == "--save-dir" else tmp_path / name
    with nearly_full_disk():
        line = draw(run, "--n", 1, "--out", tmp_path / "other.png", option, target)
    assert line == (f"error: could not write {tmp_path / name} ([Errno 27] File too large); "
                    "what was there before is whole")
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_bytes() == b"an older one"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ValueError, RuntimeError])
def test_a_file_is_whole_or_as_it_was(error, tmp_path):
    def save(file):
        file.write(b"half of a new o")
        raise error("for some reason\nand more")

    (tmp_path / "x.png").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else dq.UserError) as told:
        dq.write_file(tmp_path / "x.png", save)
    if error is not KeyboardInterrupt:
        assert str(told.value).startswith(f"could not write {tmp_path / 'x.png'} (for some reason); what was there")
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"] and (tmp_path / "x.png").read_bytes() == b"old"
    dq.write_file(tmp_path / "x.png", lambda file: file.write(b"new"))
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"] and (tmp_path / "x.png").read_bytes() == b"new"


# ------------------------------------------------------------------------------------------------
# Captions, seeds, devices


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


def test_the_gpu_that_is_asked_for_becomes_the_current_one(monkeypatch):
    current, ones = [], torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size, device: ones(*size))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **kwargs: True)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    for name, numbered in (("cuda:1", "cuda:1"), ("cuda", "cuda:0"), ("cuda:0", "cuda:0"), ("cpu", "cpu")):
        assert common.pick_device(name, "auto")[0] == torch.device(numbered)
    assert current == [torch.device("cuda", i) for i in (1, 0, 0)]


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "", "meta"])
def test_devices_that_are_not_here(name):
    with pytest.raises(dq.UserError, match="no such device"):
        common.pick_device(name, "auto")
