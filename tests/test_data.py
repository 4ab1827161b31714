"""Images in, checkpoints out."""
import os
import struct
import warnings
import zlib
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

import common
import dq
import train_vae
from train_vae import ImageFolder, ToyShapes, open_data


# ------------------------------------------------------------------------------------------------
# One image


def read(tmp_path, image, name="x.png", size=4, **save):
    """Save one Pillow image, or the bytes of a file, load it as the scripts do -> (S, S, 3) in 0..255."""
    if isinstance(image, bytes):
        (tmp_path / name).write_bytes(image)
    else:
        image.save(tmp_path / name, **save)
    return ((common.load_image(tmp_path / name, size) + 1) * 127.5).permute(1, 2, 0).numpy()


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


@pytest.mark.parametrize("kind", MODES)
def test_images_of_every_mode(tmp_path, kind):
    image, name, expected = MODES[kind]
    save = dict(lossless=True) if name.endswith("webp") else {}
    pixels = read(tmp_path, image, name, **save)
    assert np.abs(pixels - expected)[1:, 1:].max() <= 1, pixels[1, 1]


def test_premultiplied_grey(tmp_path):
    """Pillow reads such files from some version on."""
    rgb = common.to_rgb(flat("LA", (128, 102)).convert("La"))
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
    centre = common.load_image(tmp_path / "wide.png", 16)
    assert abs(((centre.mean() + 1) * 127.5).item() - ramp.mean()) < 2
    crops = [common.load_image(tmp_path / "wide.png", 16, np.random.default_rng(i)) for i in range(40)]
    rising = [bool(c[0, 0, -1] > c[0, 0, 0]) for c in crops]
    assert 8 < sum(rising) < 32                                              # half of them flipped
    assert len({round(c.mean().item(), 3) for c in crops}) > 15              # at many places
    noise = np.indices((64, 64)).sum(0).astype(np.uint8) % 2 * 255           # checks, which antialiasing makes grey
    Image.fromarray(noise).save(tmp_path / "noise.png")
    small = common.load_image(tmp_path / "noise.png", 8)
    assert small.abs().max() < 0.1


# ------------------------------------------------------------------------------------------------
# A folder of images


def put(root, *names):
    """Small images of these names."""
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = dict(format="JPEG2000") if path.suffix == ".jp2" else {}
        Image.new("RGB", (8, 8 + i % 3), (i * 9 % 256, 40, 90)).save(path, **kind)


def cut(path):
    path.write_bytes(path.read_bytes()[:45])                                 # the header is whole


def numbered(n, start="", end=".png"):
    return [f"{start}{i}{end}" for i in range(n)]


def names(*data):
    return sorted(name for each in data for name, _ in each.files)


def companions(root, outside):
    put(root, *numbered(100))
    for name in numbered(100):
        (root / f"._{name}").write_bytes(b"\0\5\26\7" + bytes(100))
    return numbered(100), (), "100 hidden, of the system or of this project"


def hidden_folders(root, outside):
    put(root, *numbered(4, "photos/"), "__MACOSX/photos/0.png", ".ipynb_checkpoints/1.png", "photos/@eaDir/0.png")
    return numbered(4, "photos/"), (), "3 hidden, of the system or of this project"


def own_output(root, outside):
    put(root, *numbered(4), "run/vae.png", "former/vae.png", "drawn/000000.png", "samples.png")
    (root / "former/vae.jsonl").touch()
    (root / "drawn/samples.json").touch()
    return numbered(4), (), "3 hidden, of the system or of this project"     # run/ is --out


def output_into_the_same_folder(root, outside):
    put(root, *numbered(4), "vae.png")
    (root / "vae.pt").touch()
    (root / "run").symlink_to(root)                                          # --out is the folder itself
    return numbered(4), (), "1 hidden, of the system or of this project, 1 .pt"


def links_and_loops(root, outside):
    put(outside, "cats/0.png", "cats/1.png", "lone.png")
    put(root, "dogs/0.png", "dogs/1.png")
    (root / "cats").symlink_to(outside / "cats")
    (outside / "cats/loop").symlink_to(root)
    (root / "a real folder comes first").symlink_to(root / "dogs")
    (root / "dogs/2.png").symlink_to(outside / "lone.png")
    (root / "dogs/itself").symlink_to("itself")
    return [*numbered(2, "cats/"), *numbered(3, "dogs/")], ("cats", "dogs"), "1 without an ending"


def a_locked_folder(root, outside):
    put(root, *numbered(4), "locked/0.png")
    return numbered(4), (), "1 folders that can't be read"


def classes_of_one(root, outside):
    lone = [name for name in numbered(99, "lone", "/0.png") if zlib.crc32(name.encode()) % 20 == 0]  # to be held out
    put(root, *lone, *numbered(12, "many/"))
    return [*lone, *numbered(12, "many/")], (*sorted(name.split("/")[0] for name in lone), "many"), "nothing"


def other_endings(root, outside):
    wanted = [name for name in ("a.jfif", "b.jp2", "c.avif", "d.PNG", "e.ppm")
              if os.path.splitext(name)[1].lower() in Image.registered_extensions()]
    put(root, *wanted)
    for name in ("1.heic", "2.HEIC", "3.svg", "README", "4.eps"):
        (root / name).write_text("no image")
    return wanted, (), "1 without an ending, 2 .heic, 1 .eps, 1 .svg"


def broken_files(root, outside):
    put(root, *numbered(20))
    for i in range(3):
        (root / f"{i}.png").write_bytes(b"")
        cut(root / f"{3 + i}.png")
        (root / f"{6 + i}.png").write_text("<html>404 not found</html>")
        (root / f"{9 + i}.png").unlink()
        (root / f"{9 + i}.png").symlink_to("nowhere.png")
    return numbered(20)[12:], (), "12 broken"


@pytest.mark.parametrize("make", [companions, hidden_folders, own_output, output_into_the_same_folder, links_and_loops,
                                  a_locked_folder, classes_of_one, other_endings, broken_files])
def test_what_a_folder_holds(make, tmp_path, monkeypatch, capfd):
    """Which images are data, which classes there are, what is said of the rest; and nothing is drawn twice."""
    root, real = tmp_path / "images", os.scandir

    def scandir(path):
        if "locked" in str(path):                                            # root, who may run this, reads everything
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)
    monkeypatch.setattr(os, "scandir", scandir)
    root.mkdir()
    wanted, classes, left_out = make(root, tmp_path / "outside")
    train, val = open_data(root, 8, skip=root / "run")
    assert names(train, val) == sorted(wanted)
    assert train.classes == val.classes == classes and len(val) > 0
    assert f"{len(train)} images to train on, {len(val)} held out" in train_vae.describe(train, val)
    assert train_vae.describe(train, val).endswith(f"; left out: {left_out}")
    if classes:
        assert all(classes[label] == name.split("/")[0] for name, label in train.files + val.files)
        assert {label for _, label in train.files} == set(range(len(classes)))  # every class is trained on
    said = capfd.readouterr().err.splitlines()
    if make is broken_files:
        assert len(said) == 11 and all(line.startswith(f"warning: left out {root}/") for line in said[:10])
        assert len(set(said)) == 11 and said[-1] == "warning: ... and 2 more, 12 in all"
    else:
        assert said == [f"warning: can't read the folder {root}/locked: Permission denied"] * (make is a_locked_folder)
    for data in (train, val):
        assert all(label != train_vae.BROKEN for _, label in once(data))


def test_what_is_understood_is_said_in_one_line(tmp_path, monkeypatch):
    def said(*args, **kwargs):
        return train_vae.describe(*open_data(*args, **kwargs))

    assert said(None, 8) == ("data: the built-in toy shapes, 8192 images to train on, 512 held out; "
                             "4 classes: circle, square, triangle, cross")
    put(tmp_path / "a", *numbered(3), *numbered(3, "one folder is no class/"))
    assert said(tmp_path / "a", 8) == (f"data: {tmp_path}/a, 5 images to train on, 1 held out; no classes; "
                                       "left out: nothing")
    put(tmp_path / "b", *(f"{name}/{i}.png" for name in "hgfedcba" for i in range(2)))
    assert "; 8 classes: a, b, c, d, e, f, ...; left out: nothing" in said(tmp_path / "b", 8)
    put(tmp_path / "c", "Train/cat/0.png", "Train/dog/1.png", "test/0.png", "val/0.png")
    line, hint = said(str(tmp_path / "c"), 8).split("\n")
    assert "; 3 classes: Train, test, val; " in line
    assert "named like splits (Train, test, val)" in hint and hint.endswith(f": --data {tmp_path}/c/Train")
    assert "note" not in said(tmp_path / "c/Train", 8) and "2 classes: cat, dog" in said(tmp_path / "c/Train", 8)
    os.rename(tmp_path / "b/a", os.fsencode(tmp_path) + b"/b/\xff")
    assert "\\udcff" not in said(tmp_path / "b", 8)                          # the seventh
    os.rename(tmp_path / "b/b", os.fsencode(tmp_path) + b"/b/a\xe9")
    assert "a\\udce9" in said(tmp_path / "b", 8)
    monkeypatch.setattr(train_vae, "LOOKED_AT", 5)
    assert said(tmp_path / "a", 8).endswith("so many files that broken ones are left out as they are met")


def test_a_large_folder_is_not_read_at_the_start(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(train_vae, "open_image", lambda path, header_only=False: opened.append(header_only))
    put(tmp_path, "0.png")
    for i in range(1, 100):
        os.link(tmp_path / "0.png", tmp_path / f"{i}.png")
    for looked_at, decoded, expected in ((100, 1e6, [False] * 100), (100, 100, [True] * 100), (99, 1e6, [])):
        monkeypatch.setattr(train_vae, "LOOKED_AT", looked_at)
        monkeypatch.setattr(train_vae, "DECODED", decoded)
        opened.clear()
        assert sum(map(len, open_data(tmp_path, 8))) == 100 and opened == expected


def spoilt_folder(root, monkeypatch):
    """30 images of which 10 in a row are broken, and none is looked at before it is met."""
    monkeypatch.setattr(train_vae, "LOOKED_AT", 0)
    for i in range(30):
        root.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (i, 0, 0)).save(root / f"{i:02d}.png")
        if 5 <= i < 15:
            cut(root / f"{i:02d}.png")
    return open_data(root, 8, seed=1)[0]


def once(data):
    """What stage 2 encodes."""
    return [train_vae.Once(data)[i] for i in range(len(data))]


def red(x):
    return ((x[..., 0, 0, 0] + 1) * 127.5).round().int().tolist()


def test_a_broken_file_weighs_nothing(tmp_path, monkeypatch, capfd):
    data = spoilt_folder(tmp_path / "images", monkeypatch)
    n, sound = len(data), {int(name[:2]) for name, _ in data.files} - set(range(5, 15))
    broken = n - len(sound)
    assert broken > 5
    assert [red(x) for x, label in once(data) if label != train_vae.BROKEN] == sorted(sound)  # none in place of another
    drawn = [red(data[i][0]) for i in range(100 * n)]
    count = Counter(drawn)
    mean = 100 * n / len(sound)
    assert count.keys() == sound
    assert max(abs(times - mean) for times in count.values()) < 5 * mean ** 0.5
    fresh = spoilt_folder(tmp_path / "images", monkeypatch)                  # a run that goes on has not seen the rest
    assert [red(fresh[i][0]) for i in range(7 * n, 8 * n)] == drawn[7 * n:8 * n]
    error = capfd.readouterr().err
    assert error.count("warning: left out") == 2 * broken                    # once in each data set
    with pytest.raises(dq.UserError, match="none of these 1 images"):
        (tmp_path / "images/05.png").rename(tmp_path / "a.png")
        ImageFolder(tmp_path, [("a.png", -1)], (), 8)[0]


def test_a_broken_file_is_named_once_by_all_processes(tmp_path, monkeypatch, capfd):
    data = spoilt_folder(tmp_path / "images", monkeypatch)
    broken = [name for name, _ in data.files if 5 <= int(name[:2]) < 15]
    alone = [red(data[i][0]) for i in range(2 * len(data))]
    data.broken.zero_()
    capfd.readouterr()
    loader = torch.utils.data.DataLoader(data, 1, num_workers=2, sampler=range(2 * len(data)))
    assert [red(x)[0] for x, _ in loader] == alone
    error = capfd.readouterr().err
    assert all(error.count(name) for name in broken)
    assert error.count("warning") < 1.5 * len(broken)                        # 2: each for itself; 1 + a tie or two


def test_a_long_list_of_broken_files_ends_in_a_count(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(train_vae, "LOOKED_AT", 0)
    put(tmp_path, "sound.png")
    for i in range(40):
        (tmp_path / f"{i}.png").touch()
    train, val = open_data(tmp_path, 8)
    once(train)
    error = capfd.readouterr().err.splitlines()
    assert len(error) == 12 and error[10:] == [f"warning: left out {n} images by now" for n in (16, 32)]


def test_classes_splits_and_epochs(tmp_path):
    put(tmp_path, *numbered(30, "b/deeper/"), *numbered(30, "a/"), "notes.png")
    train, val = open_data(tmp_path, 16, augment=True)
    assert train.classes == val.classes == ("a", "b")
    held_out = {name for name, _ in val.files}
    assert held_out == {name for name in names(train, val) if zlib.crc32(name.encode()) % 20 == 0} - {"notes.png"}
    assert len(names(train, val)) == len(set(names(train, val))) == 61 and len(held_out) > 1
    assert {name.split("/")[0]: label for name, label in train.files} == {"a": 0, "b": 1, "notes.png": -1}
    Image.effect_noise((40, 20), 99).save(tmp_path / train.files[3][0])
    x, y = train[3]
    assert x.shape == (3, 16, 16) and -1 <= x.min() and x.max() <= 1 and y == 0
    assert torch.equal(train[3][0], x)                                       # the same image, the same crop
    assert not torch.equal(train[3 + len(train)][0], x)                      # another one in the next epoch
    assert open_data(tmp_path / "a", 16)[0][0][1] == -1                      # one folder is no class


def test_a_single_image_is_in_both_splits(tmp_path):
    put(tmp_path, "0.png")
    train, val = open_data(tmp_path, 8)
    assert names(train) == names(val) == ["0.png"]


def test_no_folder_no_images_nothing_that_decodes(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        open_data(tmp_path / "missing", 16)
    (tmp_path / "a.heic").touch()
    with pytest.raises(ValueError, match="no images below .*; other files: 1 .heic"):
        open_data(tmp_path, 16)
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 1 images below .* can be decoded"):
        open_data(tmp_path, 16)


def test_stream_is_a_function_of_seed_and_batch_number():
    class Numbers(torch.utils.data.Dataset):
        def __len__(self):
            return 10

        def __getitem__(self, i):
            return i

    def take(n, **kwargs):
        batches = train_vae.stream(Numbers(), 4, **kwargs)
        return [next(batches).tolist() for _ in range(n)]

    whole = take(10, seed=1)
    assert whole[3:] == take(7, seed=1, start=3) and whole != take(10, seed=2)
    flat_ = sum(whole, [])
    for epoch in range(4):                                                   # every epoch holds each image once
        assert sorted(flat_[10 * epoch:10 * epoch + 10]) == list(range(10 * epoch, 10 * epoch + 10))


@pytest.mark.parametrize("size", [16, 32, 64])
def test_toy_shapes(size):
    data = ToyShapes(size, n=40)
    same, other = ToyShapes(size, n=40), ToyShapes(size, n=40, seed=1)
    for i in range(8):
        x, y = data[i]
        assert x.shape == (3, size, size) and x.abs().max() <= 1 and y == i % 4
        assert torch.equal(x, same[i][0]) and torch.equal(x, data[i + 40][0]) and not torch.equal(x, other[i][0])
        mask = data.detail_mask(i)
        change = (x[:, 1:, 1:] - x[:, :-1, 1:]).abs().sum(0) + (x[:, 1:, 1:] - x[:, 1:, :-1]).abs().sum(0)
        inside = torch.nn.functional.max_pool2d(mask[None].float(), 5, 1, 2)[0, 1:, 1:] > 0
        assert change[~inside].max() < 6 / size                              # outside the mask all is smooth
        assert change[mask[1:, 1:]].max() > 0.5                              # inside it is not
        assert 0.05 < mask.float().mean() < 0.8


def test_checkpoints(tmp_path):
    config = dq.VAEConfig(size=16, codebook_size=16)
    model = dq.DQVAE(config)
    path = tmp_path / "vae.pt"
    dq.save_checkpoint(path, "dq-vae", config, model, step=3)
    loaded = dq.load_vae(path, torch.device("cpu"))
    assert loaded.config == config and dq.load_checkpoint(path, "dq-vae")["step"] == 3
    for a, b in zip(model.state_dict().values(), loaded.state_dict().values()):
        assert torch.equal(a, b)
    assert [p.name for p in tmp_path.iterdir()] == ["vae.pt"]                # no temporary file is left
    with pytest.raises(ValueError, match="a dq-transformer is needed"):
        dq.load_transformer(path, torch.device("cpu"))
    whole = path.read_bytes()
    for missing in ({"kind": "dq-vae"}, {"kind": "dq-vae", "config": {"colour": 1}, "weights": {}}):
        torch.save(missing, path)
        with pytest.raises(dq.UserError, match="damaged or of another version"):
            dq.load_vae(path, torch.device("cpu"))
    for damage in (b"", b"hello", whole[:len(whole) // 2]):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match="damaged"):
            dq.load_checkpoint(path, "dq-vae")


def test_a_checkpoint_runs_no_code(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))
    torch.save({"kind": "dq-vae", "weights": Hostile()}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="not a checkpoint"):
        dq.load_checkpoint(tmp_path / "bad.pt", "dq-vae")
    assert not (tmp_path / "pwned").exists()


def test_the_texture_that_is_named_is_the_one_that_is_drawn():
    class Forced(ToyShapes):
        def _paint(self, rng):
            behind, angle, turn, _, inks = super()._paint(rng)
            return behind, angle, turn, self.kind, inks
    data, forced, named = ToyShapes(16, 24), Forced(16, 24), [ToyShapes(16, 24).texture(i) for i in range(24)]
    for forced.kind in range(3):
        assert [torch.equal(forced[i][0], data[i][0]) for i in range(24)] == [kind == forced.kind for kind in named]
    assert set(named) == {0, 1, 2}
