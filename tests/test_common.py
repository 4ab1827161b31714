"""common.py, and that it alone is shared.

    load_image, open_image, to_rgb, grey_8_bits   test_images_of_every_mode and what follows
    to_picture, draw_grains, save_grid            test_a_picture_is_its_pixels and two more
    pick_device                                   test_the_gpu_that_is_asked_for_becomes_the_current_one and two more
    run, say, printable                           test_how_a_script_ends, test_wrong_input_ends_in_one_line,
                                                  test_an_error_reaches_the_shell,
                                                  test_every_line_survives_the_terminal and two more
    prepare, lock, torchrun_job, join             test_a_lock_is_not_handed_to_children and what follows
    path                                          test_paths_of_flags, test_wrong_input_ends_in_one_line
    number                                        test_numbers_of_flags, test_wrong_input_ends_in_one_line
    trainer_flags, override                       test_wiring.py
    Schedule                                      test_schedules
    seed_all                                      test_seeds_have_nothing_in_common, survival/test_resume.py
    Record                                        test_training_writes_logs_pictures_and_checkpoints,
                                                  test_the_best_checkpoint_is_that_of_the_lowest_loss,
                                                  test_wiring.py, survival/test_resume.py and test_broken.py
    Stop                                          test_a_signal_is_noted_and_a_second_one_acts, survival/test_kill.py
    deal                                          test_train_vae.py and test_train_transformer.py
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
import struct
import sys
import time
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from tqdm import tqdm

import common
import data as reading
import dq
import train_vae
from conftest import DEVICE, ROOT, TRANSFORMER, VAE, call, script
from warm import Script


# ------------------------------------------------------------------------------------------------
# Five rooms


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
    reads_images = {"train_vae.py", "sample.py"}                             # stage 2 never sees a pixel
    assert all(imported(name) == {"dq", "common"} | ({"data"} if name in reads_images else set()) for name in SCRIPTS)


@pytest.mark.parametrize("whole", SCRIPTS)
def test_a_script_runs_beside_others_with_syntax_errors(whole, run, tmp_path):
    for name in OURS:
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    for name in set(SCRIPTS) - {whole}:
        (tmp_path / name).write_text("def (:")
    flags = {"train_vae.py": ["--encode", run / "vae.pt", "--data", "images", "--out", "x", "--device", DEVICE],
             "train_transformer.py": ["--codes", run / "codes.pt", "--out", "y", "--steps", 1, *TRANSFORMER],
             "sample.py": [run / "transformer.pt", "--n", 1, "--out", "z", "--device", DEVICE]}
    (tmp_path / "images").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "images/0.png")
    for name in SCRIPTS:
        done = Script(tmp_path / name, *flags[name], cwd=tmp_path)
        _, error = done.communicate()
        assert (done.returncode == 0) == (name == whole), error

# ------------------------------------------------------------------------------------------------
# One picture


def read(tmp_path, image, name="x.png", size=4, **save):
    """Save one Pillow image, or the bytes of a file, load it as the scripts do -> (S, S, 3) in 0..255."""
    if isinstance(image, bytes):
        (tmp_path / name).write_bytes(image)
    else:
        image.save(tmp_path / name, **save)
    return ((reading.load_image(tmp_path / name, size) + 1) * 127.5).permute(1, 2, 0).numpy()


def flat(mode, color, size=(4, 4), spoilt=None):
    """One colour; the first pixel can have another one, and is then not looked at."""
    image = Image.new(mode, size, color)
    if spoilt is not None:
        image.putpixel((0, 0), spoilt)
    return image


def palette_with_transparency():
    image = flat("P", 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.info["transparency"] = 1
    return image


def directory(tags, start):
    """(tag, type, values) -> a TIFF directory, as in TIFF and EXIF, to be put `start` bytes into the file."""
    head, tail = struct.pack("<H", len(tags)), b""
    for tag, kind, values in sorted(tags):
        data = struct.pack(f"<{len(values)}{ {3: 'H', 4: 'I', 8: 'h'}[kind]}", *values)
        if len(data) > 4:                                                    # too long for its place: it follows below
            place = start + 2 + 12 * len(tags) + 4 + len(tail)
            tail += data
            data = struct.pack("<I", place)
        head += struct.pack("<HHI", tag, kind, len(values)) + data.ljust(4, b"\0")
    return head + bytes(4) + tail


def tif(data, bits, photometric=1):
    """The bytes of a TIFF of 4 x 4 unsigned greys."""
    tags = [(256, 3, [4]), (257, 3, [4]), (258, 3, [bits]), (259, 3, [1]), (262, 3, [photometric]), (273, 4, [8]),
            (277, 3, [1]), (278, 3, [4]), (279, 4, [len(data)])]
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory(tags, 8 + len(data))


def png(pixels, depth, color_type, *chunks):
    """The bytes of a PNG with 4 rows of these bytes. chunks: (name, data), before the pixels"""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 4, 4, depth, color_type, 0, 0, 0)), *chunks,
              (b"IDAT", zlib.compress((b"\0" + pixels) * 4)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks)


RGB16 = b"\x28\x07\x50\x07\x07\x07"
MODES = {
    "rgb": (flat("RGB", (10, 20, 30)), "x.png", (10, 20, 30)),
    "grey": (flat("L", 90), "x.png", 90),
    "bit": (flat("1", 1), "x.png", 255),
    "gif": (flat("P", 0), "x.gif", 0),
    "cmyk": (flat("CMYK", (0, 255, 255, 0)), "x.tif", (255, 0, 0)),
    "cmyk-jpeg": (flat("CMYK", (0, 255, 255, 0)), "x.jpg", (255, 0, 0)),
    "transparent": (flat("RGBA", (255, 0, 0, 0)), "x.png", 255),             # white
    "translucent": (flat("RGBA", (0, 0, 0, 51)), "x.webp", 204),             # a fifth black over white
    "grey+alpha": (flat("LA", (0, 0)), "x.png", 255),
    "palette+alpha": (palette_with_transparency(), "x.png", 255),
    "16bit": (flat("I;16", 32896), "x.png", 128),
    "16bit-tif": (flat("I;16", 257), "x.tif", 1),
    "16bit-tif white is zero": (tif(struct.pack("<H", 257 * 55) * 16, 16, photometric=0), "x.tif", 200),
    "12bit-tif": (tif(b"\x40\x44\x04" * 8, 12), "x.tif", 64),               # 0x404 of 0xfff
    "32bit-tif": (tif(struct.pack("<I", 3 << 30) * 16, 32), "x.tif", 191),
    "32bit-tif signed": (flat("I", 100, spoilt=255), "x.tif", 100),          # numpy's integers, of 0 to 255
    "float": (flat("F", 0.5), "x.tif", 127.5),
    "float, overshoot": (flat("F", 0.5, spoilt=1.1), "x.tif", 127.5),
    "float, all overshoot": (flat("F", 1.02), "x.tif", 255),
    "float of 0 to 255": (flat("F", 100.0, spoilt=255.0), "x.tif", 100),
    "float of 0 to 255, overshoot": (flat("F", 100.0, spoilt=280.0), "x.tif", 100),
    "float, one extreme": (flat("F", 0.5, spoilt=1e9), "x.tif", 127.5),
    "float, infinite": (flat("F", 0.5, spoilt=float("inf")), "x.tif", 127.5),
    "float, a quarter infinite": (Image.fromarray(np.float32([[np.inf] * 4] + [[0.5] * 4] * 3)), "x.tif", 127.5),
    "float, not a number": (flat("F", 0.5, spoilt=float("nan")), "x.tif", 127.5),
    "float, nothing else": (flat("F", float("nan")), "x.tif", 0),
    "key, 2 bit": (png(b"\xaa", 2, 0, (b"tRNS", struct.pack(">H", 2))), "x.png", 255),
    "key, 2 bit, another": (png(b"\xaa", 2, 0, (b"tRNS", struct.pack(">H", 1))), "x.png", 170),
    "key, 8 bit": (png(b"\x28" * 4, 8, 0, (b"tRNS", struct.pack(">H", 40))), "x.png", 255),
    "key, 16 bit": (png(b"\x28\x07" * 4, 16, 0, (b"tRNS", b"\x28\x07")), "x.png", 255),
    "key, 16 bit, another": (png(b"\x28\x28" * 4, 16, 0, (b"tRNS", b"\x28\x07")), "x.png", 40),
    "key, rgb 16 bit": (png(RGB16 * 4, 16, 2, (b"tRNS", RGB16)), "x.png", 255),
    "key, rgb 16 bit, another": (png(RGB16 * 4, 16, 2, (b"tRNS", bytes(6))), "x.png", (40, 80, 7)),
}


def colour_profile(description, gamma, *primaries):
    """The least of an ICC profile: three primaries (X, Y, Z, each for white of D50) and a power."""
    def fixed(*numbers):
        return b"".join(struct.pack(">i", round(x * 65536)) for x in numbers)
    name, curve = description.encode() + b"\0", struct.pack(">IH2x", 1, round(gamma * 256))
    tags = {b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(name)) + name + bytes(78 + -len(name) % 4),
            b"wtpt": b"XYZ \0\0\0\0" + fixed(0.9642, 1.0, 0.8249)}
    for letter, primary in zip((b"r", b"g", b"b"), primaries):
        tags |= {letter + b"XYZ": b"XYZ \0\0\0\0" + fixed(*primary), letter + b"TRC": b"curv\0\0\0\0" + curve}
    start, index = 132 + 12 * len(tags), struct.pack(">I", len(tags))
    for tag, data in tags.items():
        index += tag + struct.pack(">II", start, len(data))
        start += len(data)
    head = struct.pack(">I4xI", start, 0x02400000) + b"mntrRGB XYZ " + bytes(12) + b"acsp" + bytes(28)
    return head + fixed(0.9642, 1.0, 0.8249) + bytes(48) + index + b"".join(tags.values())


P3 = [(0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841)]
SRGB = [(0.4360, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7139)]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
@pytest.mark.parametrize("profile, colour, wanted", [
    (colour_profile("wide", 2.2, *P3), (230, 100, 60), (249, 89, 39)),
    (colour_profile("linear sRGB", 1.0, *SRGB), (55, 55, 55), (128, 128, 128)),
    (colour_profile("sRGB", 1.0, *SRGB), (55, 55, 55), (55, 55, 55)),        # as it says: nothing to do
    (b"no profile", (230, 100, 60), (230, 100, 60))], ids=["wide", "linear", "sRGB", "unusable"])
def test_colours_are_those_that_the_profile_means(profile, colour, wanted, mode, tmp_path):
    picture = Image.new("RGB", (8, 8), colour).convert(mode, palette=Image.Palette.ADAPTIVE)
    picture.save(tmp_path / "x.png", icc_profile=profile)
    assert max(abs(a - b) for a, b in zip(reading.open_image(tmp_path / "x.png").getpixel((3, 3)), wanted)) <= 1


@pytest.mark.parametrize("kind", MODES)
def test_images_of_every_mode(tmp_path, kind):
    image, name, expected = MODES[kind]
    save = dict(lossless=True) if name.endswith("webp") else {}
    pixels = read(tmp_path, image, name, **save)
    assert np.abs(pixels - expected)[1:, 1:].max() <= 1, pixels[1, 1]


def test_premultiplied_grey(tmp_path):
    """Pillow reads such files from some version on."""
    rgb = reading.to_rgb(flat("LA", (128, 102)).convert("La"))
    assert rgb.mode == "RGB" and abs(rgb.getpixel((1, 1))[0] - 204) <= 1     # 40 % of half grey, over white


ORIENTATION_6 = (0x0112, 3, [6])                                             # turn a quarter to the right
EXIF = {"sound": [ORIENTATION_6], "a tag out of range": [ORIENTATION_6, (0x0128, 8, [-5])],
        "a directory that is not there": [ORIENTATION_6, (0x8769, 4, [99999])], "no EXIF at all": None}


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp"])
@pytest.mark.parametrize("kind", EXIF)
def test_the_pixels_of_broken_metadata(kind, name, tmp_path, capfd):
    """Every picture is read, without a warning, and upright where the orientation can be read."""
    image = Image.new("RGB", (8, 8))
    image.paste("white", (0, 0, 8, 4))                                       # stored: the upper half white ...
    tags = EXIF[kind]
    exif = b"garbage" if tags is None else b"Exif\0\0II*\0\x08\0\0\0" + directory(tags, 8)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        pixels = read(tmp_path, image, name, size=8, exif=exif)
    black, white = (pixels[4:], pixels[:4]) if tags is None else (pixels[:, :4], pixels[:, 4:])
    assert black.max() < 20 and white.min() > 235                            # ... shown: the right half
    assert not told and capfd.readouterr().err == ""


def test_text_of_three_megabytes(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 3_000_000, zip=True)
    assert (read(tmp_path, flat("L", 90), pnginfo=text) == 90).all()


def test_resize_crop_and_flip(tmp_path):
    ramp = np.tile(np.arange(64, dtype=np.uint8)[None] * 4, (16, 1))         # 64 x 16, brighter to the right
    Image.fromarray(ramp).save(tmp_path / "wide.png")
    centre = reading.load_image(tmp_path / "wide.png", 16)
    assert abs(((centre.mean() + 1) * 127.5).item() - ramp.mean()) < 2
    crops = [reading.load_image(tmp_path / "wide.png", 16, np.random.default_rng(i)) for i in range(40)]
    rising = [bool(c[0, 0, -1] > c[0, 0, 0]) for c in crops]
    assert 8 < sum(rising) < 32                                              # half of them flipped
    assert len({round(c.mean().item(), 3) for c in crops}) > 15              # at many places
    noise = np.indices((64, 64)).sum(0).astype(np.uint8) % 2 * 255           # checks, which antialiasing makes grey
    Image.fromarray(noise).save(tmp_path / "noise.png")
    small = reading.load_image(tmp_path / "noise.png", 8)
    assert small.abs().max() < 0.1


@pytest.mark.parametrize("shape", [(16, 40), (40, 16)], ids=["wide", "high"])
def test_crops_reach_every_side(shape, tmp_path):
    """The least and the largest random number give the first and the last square, its last column and row included."""
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "x.png")
    for number, square in ((0.0, noise[:16, :16]), (1 - 2.0 ** -53, noise[-16:, -16:])):
        def random(n=None):
            return np.full(n, number) if n else 0.9                          # the last one: not mirrored
        crop = reading.load_image(tmp_path / "x.png", 16, SimpleNamespace(random=random))
        assert np.abs(((crop + 1) * 127.5).permute(1, 2, 0).numpy() - square).max() < 1.5


def test_deep_greys_are_rounded(tmp_path):
    greys = np.uint16([[0, 128, 129, 385], [386, 500, 1000, 32767], [32900, 40000, 50000, 60000], [65406, 65407, 9, 1]])
    pixels = read(tmp_path, Image.fromarray(greys))
    assert (pixels.round()[..., 0] == np.round(greys / 257)).all()


def test_a_picture_is_its_pixels():
    """Rounded to the nearest of 256, cut at black and white, enlarged by whole pixels."""
    values = torch.tensor([0, 1, 127, 128, 254, 255.0])
    x = (torch.cat([values - 0.4, values + 0.4]) / 127.5 - 1).clamp(-1.002, 1.002).expand(3, 1, 12)
    assert np.asarray(common.to_picture(x, 0))[0, :, 0].tolist() == [0, 1, 127, 128, 254, 255] * 2
    far = torch.tensor([-3.0, 3.0]).expand(3, 1, 2)
    assert np.asarray(common.to_picture(far, 8))[:, :, 1].tolist() == [[0] * 4 + [255] * 4] * 4


def test_a_box_per_code():
    """In the colour of its granularity, of the size of its code, and nothing between its edges."""
    grains = torch.tensor([[0, 1], [2, 0]])                                  # of 16 x 16 pixels: codes of 8, 4 and 2
    picture = np.asarray(common.draw_grains(torch.full((3, 16, 16), -1.0), grains, (8, 4, 2)))
    assert picture.shape == (128, 128, 3)
    colours = [tuple(bytes.fromhex(each[1:])) for each in ("#3a6ea5", "#e07b00", "#c01530")]
    ground = (89, 89, 89)                                                    # black under 35 % of white
    for row, column, colour, side in ((0, 0, colours[0], 64), (0, 64, colours[1], 32), (64, 0, colours[2], 16),
                                      (64, 64, colours[0], 64)):
        for at in range(side, 64, side):                                     # every code in the region has its edges
            assert tuple(picture[row + at, column + 5]) == tuple(picture[row + 5, column + at]) == colour
        assert tuple(picture[row + 30, column + 30]) == tuple(picture[row + 28, column + 26]) == ground
        assert tuple(picture[row + 1, column + 30]) == ground


def test_a_grid_row_by_row(tmp_path):
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
# A program and its flags


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


def test_dtype_is_what_is_asked_for(monkeypatch):
    for units in ({}, dict(avx512_bf16=True), dict(amx_bf16=True)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units, raising=False)
        for dtype, bf16 in (("fp32", False), ("bf16", True), ("auto", bool(units))):
            with common.pick_device("cpu", dtype)[1]():
                assert torch.is_autocast_enabled("cpu") == bf16
                assert not bf16 or torch.get_autocast_dtype("cpu") == torch.bfloat16


@pytest.mark.parametrize("raised, status", [
    (None, None), (dq.UserError("two\nlines"), "error: lines"), (OSError(28, "No space left"), "error: [Errno 28] No "),
    (KeyboardInterrupt(), 130), (SystemExit(143), 143), (RuntimeError("a fault of ours"), RuntimeError),
    (KeyError("x"), KeyError), (RuntimeError("CUDA out of memory. Tried"), "error: not enough memory; reduce --batch-"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "error: not enough memory; "),
    (RuntimeError("DataLoader worker (pid 7) is killed"), "error: a process that loads images died; --resume continue"),
    (RuntimeError("DataLoader timed out after 60 seconds"), "error: the processes that load images do not deliver"),
    (RuntimeError("[gloo] Connection closed by peer"), "error: another process of this job died or lost its connecti"),
    (MemoryError(), "error: not enough memory; reduce --batch-size"),
    (RuntimeError("std::bad_alloc"), "error: not enough memory; "),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when"), "error: not enough memory; "),
    (KeyError("in DataLoader worker process 0"), KeyError)], ids=repr)
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
def test_whatever_fails_in_torch_compile_is_one_line(raised, monkeypatch):
    def backend(*args):
        raise raised
    monkeypatch.setattr(common, "LOCKS", {})

    def main():
        torch.compile(torch.nn.Linear(2, 2), backend=backend)(torch.zeros(1, 2))
    with pytest.raises(SystemExit) as end:
        common.run(main)
    assert end.value.code.startswith("error: --compile does not work here; leave it out") and "\n" not in end.value.code


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
    for text, says in (("", "is empty"), (" ", "is empty"), ("~no-such-user/x", "no home folder for '~no-such-")):
        with pytest.raises(argparse.ArgumentTypeError, match=says):
            common.path(text)


def test_a_signal_is_noted_and_a_second_one_acts(capsys):
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with common.Stop(torch.device("cpu")) as stop:
            assert stop.asked() == 0
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.asked() == stop.asked() == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):                           # the former handler, at once
                os.kill(os.getpid(), signal.SIGINT)
            with pytest.raises(SystemExit) as end:
                stop.leave(signal.SIGINT, "after step 3")
        assert end.value.code == 130 and "stopped by SIGINT after step 3" in capsys.readouterr().out
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_best_checkpoint_is_that_of_the_lowest_loss(tmp_path):
    config = dq.VAEConfig(size=16, codebook_size=16)
    args, model = argparse.Namespace(save_every=1), dq.DQVAE(config)
    record = common.Record(args, tmp_path / "vae.pt", config, dict(steps=9, eval_every=20), model, {}, {})
    record.start("")
    assert [record.evaluates(step) for step in (0, 1, 9, 10)] == [False, False, True, True]
    for done, loss, best in ((1, 3.0, 1), (2, 2.0, 2), (3, 5.0, 2), (4, math.nan, 2), (5, 1.5, 5)):
        record.evaluated(done, dict(loss=loss), loss)
        assert dq.load_checkpoint(tmp_path / "vae.best.pt", "dq-vae")["step"] == best
    assert record.best == 1.5


@pytest.mark.parametrize("done, looked_at", [(3, True), (7, True), (10, True), (4, False)])
def test_losses_are_looked_at_before_anything_is_made_of_them(done, looked_at, tmp_path):
    """In a step that is evaluated, saved or logged a loss that is no number, of any step before, ends the run."""
    config, args = dq.VAEConfig(size=16, codebook_size=16), argparse.Namespace(save_every=7)
    record = common.Record(args, tmp_path / "vae.pt", config, dict(steps=99, eval_every=3), dq.DQVAE(config), {}, {})
    record.start("")
    record.add(done - 1, dict(loss=torch.tensor(math.nan)))
    record.add(done, dict(loss=torch.tensor(1.0)))
    with pytest.raises(dq.UserError, match="not finite") if looked_at else contextlib.nullcontext():
        record.after(done, SimpleNamespace(asked=lambda: 0))


def test_logged_losses_are_means_over_the_processes(tmp_path, monkeypatch):
    record = common.Record(None, tmp_path, None, {}, None, {}, {})
    monkeypatch.setattr(dq, "rank_world", lambda: (0, 2))
    monkeypatch.setattr(dq, "all_reduce_sum", lambda x: 3 * x)               # the other process has twice as much
    record.add(1, dict(loss=torch.tensor(2.0), budget=torch.tensor(4.0)))
    assert record.newest_losses() == dict(loss=3.0, budget=6.0)


def test_schedules():
    assert [round(dq.gumbel_scale(s, 100), 3) for s in (0, 50, 70, 90, 99)] == [1, 1, 0.5, 0, 0]

    linear = common.Schedule(steps=110, batch_size=1, lr=2.0, warmup=10, decay="linear")
    assert [linear.learning_rate(step) for step in (4, 9, 10, 35, 85, 110)] == pytest.approx([1, 2, 2, 1.5, 0.5, 0])
    schedule = common.Schedule(steps=110, batch_size=1, lr=2.0, warmup=10)
    rates = [schedule.learning_rate(step) for step in range(110)]
    assert rates[0] == 0.2 and rates[9] == max(rates) == 2.0 and rates[60] == pytest.approx(1.0) and rates[-1] < 0.01


def test_seeds_have_nothing_in_common():
    def drawn(*numbers):
        common.seed_all(*numbers)
        return random.random(), np.random.rand(), torch.rand(1, dtype=torch.double).item()
    near = [drawn(*numbers) for numbers in itertools.product(range(3), range(50), range(4))]  # seed, step, process
    near += [drawn(*numbers) for numbers in itertools.product(range(3), range(1, 50))]
    assert len(set(sum(near, ()))) == 3 * len(near)
    assert drawn(1, 2, 3) == drawn(1, 2, 3) != drawn(2 ** 63 - 1, 2, 3)      # the largest --seed


@pytest.mark.parametrize("stage, fixture, figures", [
    ("vae", "vae_run", {"psnr", "ssim", "l1", "share", "bits_per_pixel", "codebook_used", "perplexity"}),
    ("transformer", "run", {"nats_per_image", "bits_per_code", "bits_per_pixel"})])
def test_training_writes_logs_pictures_and_checkpoints(stage, fixture, figures, request):
    folder = request.getfixturevalue(fixture)
    log = [json.loads(line) for line in (folder / f"{stage}.jsonl").read_text().splitlines()]
    assert figures <= set(log[-1]) and log[-1]["step"] == 6
    assert Image.open(folder / f"{stage}.png").width > 100
    assert dq.load_checkpoint(folder / f"{stage}.pt", f"dq-{stage}")["step"] == 6


@pytest.mark.parametrize("name, args, says", [
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
    ("train_vae.py", ["--perceptual-weight", 1, "--perceptual-weights", "file"], "--perceptual-weight 0"),
    ("train_vae.py", ["--batch-size", 6, "--accumulate", 4], "--accumulate"),
    ("train_vae.py", ["--encode", "file"], "not a checkpoint"),
    ("train_vae.py", ["--encode", "nowhere.pt"], "no such file"),
    ("train_vae.py", ["--encode", "VAE", "--data", "empty"], "no images"),
    ("train_vae.py", ["--seed", -1], "--seed"),
    ("train_transformer.py", ["--codes", "CODES", "--width", 33], "width"),
    ("train_vae.py", ["--encode", "VAE", "--size", 64, "--resume"], "--resume has no effect with --encode; --size has"),
    ("train_vae.py", ["--encode", "VAE", "--compile"], "--compile has no effect with --encode"),
    ("train_vae.py", ["--out", "file/x"], "file"),
    ("train_transformer.py", [], "no such file: out/codes.pt (train_vae.py writes it); to make it from a DQ-VAE: "
                                 "python train_vae.py --encode out/vae.pt --out out"),
    ("train_transformer.py", ["--codes", "nowhere.pt"], "no such file"),
    ("train_transformer.py", ["--codes", "file"], "not a checkpoint"),
    ("train_transformer.py", ["--codes", "VAE"], "a dq-codes is needed"),
    ("sample.py", ["nowhere.pt"], "no such file"),
    ("sample.py", ["file"], "not a checkpoint"),
    ("sample.py", ["VAE"], "a dq-transformer is needed"),
    ("sample.py", ["MODEL", "--label", "dog"], "no class"),
    ("sample.py", ["MODEL", "--label", 4], "no class"),
    ("sample.py", ["MODEL", "--n", 0], "--n"),
    ("sample.py", ["MODEL", "--keep", 1], "--keep needs --input"),
    ("sample.py", ["MODEL", "--out", "x.psd"], "no picture in colour"),
    ("sample.py", ["MODEL", "--temperature", -1], "temperature"),
    ("sample.py", ["MODEL", "--top-p", 0], "top-p"),
    ("sample.py", ["MODEL", "--input", "file"], "file"),
])
def test_wrong_input_ends_in_one_line(name, args, says, request, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("no checkpoint, no image")
    for word, fixture, file in (("VAE", "vae_run", "vae.pt"), ("CODES", "vae_run", "codes.pt"),
                                ("MODEL", "run", "transformer.pt")):
        if word in args:                                                     # a fault in stage 2 is none of stage 1's
            args = [request.getfixturevalue(fixture) / file if a == word else a for a in args]
    args = [str(a) for a in args]
    with pytest.raises(SystemExit) as end:                                   # anything else would be a traceback
        common.run(lambda: importlib.import_module(name[:-3]).main(args))
    if end.value.code == 2:                                                  # argparse has printed its line
        assert says in capsys.readouterr().err.splitlines()[-1]
    else:
        assert end.value.code.startswith("error: ") and says in end.value.code and "\n" not in end.value.code


def test_an_error_reaches_the_shell():
    done = script("sample.py", "nowhere.pt")
    assert done.returncode == 1 and done.stderr == "error: no such file: nowhere.pt (train_transformer.py writes it)\n"


# ------------------------------------------------------------------------------------------------
# Terminals, batch systems, other runs


def output_to_a_file(monkeypatch):
    """In an old encoding. -> what is written so far"""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="cp1252"))
    return raw


def test_every_line_survives_the_terminal(monkeypatch):
    """Names of files can be anything; control characters would steer it."""
    output = output_to_a_file(monkeypatch)
    common.run(lambda: common.say("wrote 絵/caf\udce9/é\x1b[2J\rx\nnote: done"))
    wanted = "wrote \\u7d75/caf\\udce9/é\\x1b[2J\\rx\nnote: done\n"
    assert output.getvalue().decode("cp1252").replace(os.linesep, "\n") == wanted


def test_a_line_is_in_the_file_at_once(monkeypatch):
    """Not when the program ends: nohup, batch systems."""
    output, seen = output_to_a_file(monkeypatch), []

    def main():
        for line in ("data", "step 250"):
            tqdm.write(line)
            seen.append(output.getvalue().decode().split())
    common.run(main)
    assert seen == [["data"], ["data", "step", "250"]]


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_reader_that_has_gone_is_no_error(name, monkeypatch):
    """As `| head -1`, or a terminal that was closed."""
    reader, writer = os.pipe()
    os.close(reader)
    stream = open(writer, "w")
    monkeypatch.setattr(sys, name, stream)
    said = []

    def main():
        for line in ("data", "step 250", "x" * 100_000):
            print(line, file=getattr(sys, name))
            common.say(line)
            said.append(line)
    common.run(main)
    assert len(said) == 3


def test_a_closed_output_is_no_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    common.run(lambda: (common.say("x"), tqdm.write("y"), print("z", file=sys.stderr)))


def holder(folder, done):
    common.lock(folder)
    done.send("locked")
    time.sleep(60)


def test_a_lock_is_not_handed_to_children(tmp_path):
    """A loader that outlives a killed run does not keep the next one from starting."""
    pytest.importorskip("fcntl")
    ours, theirs = multiprocessing.Pipe()
    fork = multiprocessing.get_context("fork")

    def parent():
        common.lock(tmp_path)
        loader = fork.Process(target=time.sleep, args=[60])
        loader.start()
        theirs.send(loader.pid)
        os._exit(0)                                                          # as if killed
    process = fork.Process(target=parent)
    process.start()
    process.join()
    orphan = ours.recv()
    try:
        common.lock(tmp_path)
        assert os.path.realpath(tmp_path) in common.LOCKS
    finally:
        common.LOCKS.clear()
        os.kill(orphan, signal.SIGKILL)


def test_a_folder_is_one_runs_at_a_time(tmp_path):
    pytest.importorskip("fcntl")
    told, done = multiprocessing.Pipe()
    other = multiprocessing.get_context("fork").Process(target=holder, args=(tmp_path, done))
    other.start()
    told.recv()
    line = f"error: another run is writing into {tmp_path}; wait until it ends, or use another --out"
    assert call(train_vae.main, "--out", tmp_path, "--data", "nowhere", *VAE) == line
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    other.kill()
    other.join()
    common.lock(tmp_path)                                                    # the other is gone, its file is not
    common.lock(tmp_path)                                                    # the same process, again
    assert list(common.LOCKS) == [os.path.realpath(tmp_path)]
    common.run(lambda: None)                                                 # at its end a program holds none
    assert not common.LOCKS


def test_a_folder_that_can_not_be_locked_is_used_with_a_note(tmp_path, monkeypatch, capsys):
    fcntl = pytest.importorskip("fcntl")

    def lockf(file, how):
        raise OSError(37, "No locks available")
    monkeypatch.setattr(fcntl, "lockf", lockf)
    common.lock(tmp_path)
    assert "note: can't tell whether another run writes into" in capsys.readouterr().out


@pytest.mark.parametrize("name, value", [
    ("WORLD_SIZE", "abc"), ("WORLD_SIZE", "0"), ("LOCAL_RANK", "-1"), ("RANK", "5"), ("RANK", "x"), ("RANK", "1.0"),
    ("MASTER_PORT", "99999"), ("MASTER_PORT", "http"), ("MASTER_PORT", "0"), ("TORCHELASTIC_RESTART_COUNT", "once")])
def test_every_variable_of_torchrun_is_checked(name, value, tmp_path, monkeypatch):
    sound = dict(WORLD_SIZE="2", RANK="0", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29999")
    if name == "TORCHELASTIC_RESTART_COUNT":
        sound["WORLD_SIZE"] = "1"
    for each, text in (sound | {name: value}).items():
        monkeypatch.setenv(each, text)
    line = call(train_vae.main, "--out", tmp_path, *VAE)
    assert line.startswith(f"error: the environment variable {name} is {value!r} (") and "\n" not in line


def test_a_port_in_use_is_one_line(tmp_path, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        sound = dict(WORLD_SIZE="2", RANK="0", LOCAL_RANK="0", MASTER_ADDR="localhost",
                     MASTER_PORT=str(taken.getsockname()[1]))
        for each, text in sound.items():
            monkeypatch.setenv(each, text)
        line = call(train_vae.main, "--out", tmp_path, *VAE)
    assert line.startswith("error: could not join the 2 processes at localhost:") and "\n" not in line


def test_half_a_batch_system_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    line = call(train_vae.main, "--out", tmp_path, *VAE)
    assert line.startswith("error: WORLD_SIZE is 2, but there is no RANK, MASTER_ADDR, MASTER_PORT")
    monkeypatch.setenv("WORLD_SIZE", "")                                     # as good as none
    monkeypatch.setattr(train_vae, "open_data", lambda *args, **kwargs: dq.require(False, "reached"))
    assert call(train_vae.main, "--out", tmp_path, *VAE) == "error: reached"
