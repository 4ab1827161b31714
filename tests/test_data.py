"""data.py: the toy shapes, folders of images, and single files of any kind.

    ToyShapes                        test_toy_shapes and the three tests after it
    find_images, split, open_data    test_which_files_are_images and the tests after it
    ImageFolder                      test_broken_files_do_not_change_the_distribution, test_classes_splits_and_epochs
    Kept, decode_all                 test_cached_images_equal_decoded_ones and the tests after it
    describe, identity               test_description_of_a_data_set, test_identity_depends_on_file_sizes
    image_side                       test_image_side
    loader, stream                   test_stream_is_a_function_of_seed_and_batch_number and the tests after it
    load_image, open_image           test_images_of_every_mode, test_resize_crop_and_flip, and the tests between them
    to_rgb, to_srgb                  test_images_of_every_mode, test_depth_then_transparency_then_colours
"""
import errno
import itertools
import multiprocessing
import os
import pickle
import runpy
import shutil
import struct
import threading
import time
import warnings
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

import common
import data as reading
import dq
import train_vae
from conftest import call
from data import ImageFolder, ToyShapes, open_data


# ------------------------------------------------------------------------------------------------
# Folders of images


def put(root, *names):
    """Save small images with these names."""
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = dict(format="JPEG2000") if path.suffix == ".jp2" else {}
        Image.new("RGB", (8, 8 + i % 3), (i * 9 % 256, 40, 90)).save(path, **kind)


def truncate(path):
    path.write_bytes(path.read_bytes()[:45])                                 # the header stays intact


def numbered(n, start="", end=".png"):
    return [f"{start}{i}{end}" for i in range(n)]


def names(*data):
    return sorted(os.fsdecode(name) for each in data for name in each.names)


def labels(*data):
    """-> {file name: label}"""
    return {os.fsdecode(name): label for each in data for name, label in zip(each.names, each.labels.tolist())}


# each function below makes a folder -> its images, its classes, and the text on the skipped files


def companions(root, outside):
    put(root, *numbered(100))
    for name in numbered(100):
        (root / f"._{name}").write_bytes(b"\0\5\26\7" + bytes(100))
    return numbered(100), (), "100 hidden, of the system or of this project"


def hidden_folders(root, outside):
    put(root, *numbered(4, "photos/"), "__MACOSX/photos/0.png", ".ipynb_checkpoints/1.png", "photos/@eaDir/0.png")
    return numbered(4, "photos/"), (), "3 hidden, of the system or of this project"


def output_of_this_project(root, outside):
    put(root, *numbered(4), "run/vae.png", "former/vae.png", "samples/000000.png", "samples.png")
    put(root, "photos/5.png", "photos/samples.png", "photos/vae.png", "older/000000.png")
    (root / "former/vae.pt").touch()
    (root / ".samples.png.lock").touch()
    long = "\\u540d" * 4000                                                  # a folder with a long name
    (root / "samples/samples.json").write_text(f'{{\n "out": "{long}",\n "grain_map": null,\n "written_by": "dq"\n}}')
    (root / "older/samples.json").write_text('{\n "checkpoint": "x", "n": 1,\n "grain_map": null\n}')
    (root / "photos/samples.json").write_text('{"samples": [{"filepath": "5.png"}]}')  # of another program
    images = numbered(4) + ["photos/5.png", "photos/samples.png", "photos/vae.png"]
    return images, (), "7 hidden, of the system or of this project, 1 .json, 1 .pt"


def output_into_the_same_folder(root, outside):
    put(root, *numbered(4), "vae.png")
    (root / "vae.pt").touch()
    (root / "run").symlink_to(root)                                          # --out is the folder itself
    return numbered(4), (), "1 hidden, of the system or of this project, 1 .pt"


def links_and_loops(root, outside):
    put(outside, "cats/0.png", "cats/1.png", "single.png")
    put(root, "dogs/0.png", "dogs/1.png")
    (root / "cats").symlink_to(outside / "cats")
    (outside / "cats/loop").symlink_to(root)
    (root / "a real folder comes first").symlink_to(root / "dogs")
    (root / "dogs/2.png").symlink_to(outside / "single.png")
    (root / "dogs/itself").symlink_to("itself")
    return [*numbered(2, "cats/"), *numbered(3, "dogs/")], ("cats", "dogs"), "1 that can't be opened"


def unreadable_files(root, outside):
    put(root, *numbered(4), "locked/0.png")
    (root / "missing.png").symlink_to("nowhere.png")
    os.mkfifo(root / "pipe.png")
    return numbered(4), (), "3 that can't be opened"


def classes_with_one_image(root, outside):
    single = [name for name in numbered(99, "single", "/0.png") if zlib.crc32(name.encode()) % 20 == 0]
    put(root, *single, *numbered(12, "many/"))                               # by their hash, all would be held out
    return [*single, *numbered(12, "many/")], ("many", *sorted(name.split("/")[0] for name in single)), "nothing"


def other_endings(root, outside):
    images = [name for name in ("a.jfif", "b.jp2", "c.avif", "d.PNG", "e.ppm")
              if os.path.splitext(name)[1].lower() in Image.registered_extensions()]
    put(root, *images)
    for name in ("1.heic", "2.HEIC", "3.svg", "README", "4.eps", "5.fits"):
        (root / name).write_text("no image")
    return images, (), "2 .heic, 1 .eps, 1 .fits, 1 .svg, 1 without an ending"


def broken_files(root, outside):
    put(root, *numbered(20))
    for i in range(3):
        (root / f"{i}.png").write_bytes(b"")
        truncate(root / f"{3 + i}.png")
        (root / f"{6 + i}.png").write_text("<html>404 not found</html>")
    return numbered(20)[9:], (), "9 broken"


@pytest.mark.parametrize("make", [
    companions, hidden_folders, output_of_this_project, output_into_the_same_folder, links_and_loops, unreadable_files,
    classes_with_one_image, other_endings, broken_files])
def test_which_files_are_images(make, tmp_path, monkeypatch, capfd):
    """Images, classes, and the report on all other files. Each skipped image is named in a warning."""
    root, real = tmp_path / "images", os.scandir

    def scandir(path):
        if "locked" in str(path):                                            # the tests may run as root
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)
    monkeypatch.setattr(os, "scandir", scandir)
    root.mkdir()
    images, classes, skipped = make(root, tmp_path / "outside")
    train, val = open_data(root, 8, skip=root / "run")
    assert names(train, val) == sorted(images)
    assert train.classes == val.classes == classes and len(val) > 0
    assert f"{len(train)} training and {len(val)} validation images" in reading.describe(train, val)
    reported = reading.describe(train, val).partition("; skipped: ")[2]
    assert sorted(reported.split(", ")) == sorted(skipped.split(", "))
    if classes:
        assert all(classes[label] == name.split("/")[0] for name, label in labels(train, val).items())
        assert set(train.labels) == set(range(len(classes)))                 # every class is trained on
    warned = capfd.readouterr().out.splitlines()
    assert all(line.startswith(f"warning: skipped {root}/") for line in warned)
    assert len(set(warned)) == len(warned) == {links_and_loops: 1, unreadable_files: 3, broken_files: 9}.get(make, 0)
    for data in (train, val):
        assert all(data[i][1] != reading.BROKEN for i in range(len(data)))


def test_description_of_a_data_set(tmp_path):
    def text(*args, **kwargs):
        return reading.describe(*open_data(*args, **kwargs))

    assert text(None, 8) == ("data: the built-in toy shapes, 8,192 training and 512 validation images, "
                             "4 classes: circle, square, triangle, cross")
    put(tmp_path / "a", *numbered(3), *numbered(3, "one folder is no class/"))
    assert text(tmp_path / "a", 8) == (f"data: {tmp_path}/a, 5 training and 1 validation images, no classes; "
                                       "skipped: nothing")
    put(tmp_path / "b", *(f"{'class ' + name}/{i}.png" for name in "abcdefghijklmnop" for i in range(2)))
    assert ", 16 classes: class a, class b, " in text(tmp_path / "b", 8) and " ...; skipped: nothing" in text(
        tmp_path / "b", 8)
    put(tmp_path / "c", "Train/cat/0.png", "Train/dog/1.png", "test/0.png", "val/0.png")
    line, hint = text(str(tmp_path / "c"), 8).split("\n")
    assert ", 3 classes: Train, test, val; " in line and "named like splits" in hint and "after --data" in hint
    assert "note" not in text(tmp_path / "c/Train", 8) and "2 classes: cat, dog" in text(tmp_path / "c/Train", 8)
    os.rename(tmp_path / "b/class b", os.fsencode(tmp_path) + b"/b/class a\xe9")
    assert "class a\udce9" in text(tmp_path / "b", 8)                       # `say` escapes it for a terminal


@pytest.mark.parametrize("outer", ["PetImages", "downloads/pets 1.0"])
def test_the_outer_folder_of_an_archive_is_the_root(outer, tmp_path):
    """Most archives hold one folder, and the classes are in it."""
    put(tmp_path, *numbered(3, f"{outer}/cat/"), *numbered(3, f"{outer}/dog/"))
    (tmp_path / "LICENSE").touch()
    data = open_data(tmp_path, 8)
    assert data[0].classes == ("cat", "dog") and names(*data) == numbered(3, "cat/") + numbered(3, "dog/")
    assert reading.describe(*data).startswith(f"data: {tmp_path / outer}, 5 training")
    assert open_data(tmp_path / outer, 8)[0].root == str(tmp_path / outer)
    put(tmp_path, f"{outer}/notes.png")                                      # the folder has images of its own
    assert open_data(tmp_path, 8)[0].classes == () and open_data(tmp_path, 8)[0].root == str(tmp_path)


def test_a_large_folder_is_not_read_at_the_start(tmp_path, monkeypatch):
    opened, real = [], reading.open_image
    monkeypatch.setattr(reading, "open_image", lambda *args: opened.append(1) or real(*args))
    put(tmp_path, "0.png")
    for i in range(1, 100):
        shutil.copy(tmp_path / "0.png", tmp_path / f"{i}.png")
    for memory, expected in ((100 * 8 * 8 * 3, 100), (100 * 8 * 8 * 3 - 1, 0)):
        monkeypatch.setattr(reading, "MEMORY", memory)
        opened.clear()
        data = open_data(tmp_path, 8)
        assert sum(map(len, data)) == 100 and len(opened) == expected


def folder_with_broken_files(root, monkeypatch):
    """30 images, too many to be checked before training. Ten in a row are broken."""
    monkeypatch.setattr(reading, "MEMORY", 0)
    for i in range(30):
        root.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (i, 0, 0)).save(root / f"{i:02d}.png")
        if 5 <= i < 15:
            truncate(root / f"{i:02d}.png")
    return open_data(root, 8, augment=True, seed=1)[0]


def red(x):
    return ((x[..., 0, 0, 0] + 1) * 127.5).round().int().tolist()


def test_broken_files_do_not_change_the_distribution(tmp_path, monkeypatch, capfd):
    """The images that replace them are drawn uniformly, and depend on the seed and the index only."""
    data = folder_with_broken_files(tmp_path / "images", monkeypatch)
    n, intact = len(data), {int(name[:2]) for name in data.names} - set(range(5, 15))
    broken = n - len(intact)
    assert broken > 5
    data.augment = False                                                     # evaluation: no image replaces another
    assert [red(x) for x, label in map(data.__getitem__, range(n)) if label != reading.BROKEN] == sorted(intact)
    data.augment = True
    drawn = [red(data[i][0]) for i in range(40 * n)]
    count = Counter(drawn)
    mean = 40 * n / len(intact)
    assert count.keys() == intact
    assert max(abs(times - mean) for times in count.values()) < 5 * mean ** 0.5
    resumed = folder_with_broken_files(tmp_path / "images", monkeypatch)     # it has not met the broken files yet
    assert [red(resumed[i][0]) for i in range(7 * n, 8 * n)] == drawn[7 * n:8 * n]
    assert capfd.readouterr().out.count("warning: skipped") == 2 * broken    # once per data set
    with pytest.raises(dq.UserError, match="none of these 1 images"):
        (tmp_path / "images/05.png").rename(tmp_path / "a.png")
        ImageFolder(tmp_path, [("a.png", -1)], (), 8, augment=True)[0]


def test_each_broken_file_is_reported_once(tmp_path, monkeypatch, capfd):
    data = folder_with_broken_files(tmp_path / "images", monkeypatch)
    alone = [red(data[i][0]) for i in range(2 * len(data))]
    warned = capfd.readouterr().out
    assert all(warned.count(os.fsdecode(name)) == (5 <= int(name[:2]) < 15) for name in data.names)
    loader = reading.loader(data, 2, batch_size=1, sampler=range(2 * len(data)))
    assert [red(x)[0] for x, _ in loader] == alone and capfd.readouterr().out == ""


def test_classes_splits_and_epochs(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MEMORY", 0)                                # because files change below
    put(tmp_path, *numbered(30, "b/deeper/"), *numbered(30, "a/"), "notes.png")
    train, val = open_data(tmp_path, 16, augment=True)
    assert train.classes == val.classes == ("a", "b")
    held_out = {name for name in names(train, val) if zlib.crc32(name.encode()) % 20 == 0} - {"notes.png"}
    assert set(names(val)) == held_out and len(held_out) > 1
    assert len(names(train, val)) == len(set(names(train, val))) == 61
    assert {name.split("/")[0]: label for name, label in labels(train).items()} == {"a": 0, "b": 1, "notes.png": -1}
    Image.effect_noise((40, 20), 99).save(tmp_path / os.fsdecode(train.names[3]))
    x, y = train[3]
    assert x.shape == (3, 16, 16) and -1 <= x.min() and x.max() <= 1 and y == 0
    assert torch.equal(train[3][0], x)                                       # the same index gives the same crop
    assert not torch.equal(train[3 + len(train)][0], x)                      # the next epoch another one
    Image.effect_noise((40, 20), 99).save(tmp_path / os.fsdecode(val.names[0]))
    assert torch.equal(val[0][0], val[len(val)][0])                          # validation images are not augmented
    assert open_data(tmp_path / "a", 16)[0][0][1] == -1                      # one folder is no class


def test_folders_without_images(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        open_data(tmp_path / "missing", 16)
    (tmp_path / "a.heic").touch()
    with pytest.raises(ValueError, match="no images below .*; other files: .heic"):
        open_data(tmp_path, 16)
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 1 images below .* can be decoded"):
        open_data(tmp_path, 16)


class Indices(torch.utils.data.Dataset):
    """The image of index i is the number i."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return torch.tensor(i), -i


def test_stream_is_a_function_of_seed_and_batch_number():
    def take(n, **kwargs):
        batches = reading.stream(Indices(10), 4, **kwargs)
        return [next(batches)[0].tolist() for _ in range(n)]

    uninterrupted = take(10, seed=1)
    assert uninterrupted[3:] == take(7, seed=1, start=3) and uninterrupted != take(10, seed=2)
    assert uninterrupted == take(10, seed=1, workers=3)
    indices = sum(uninterrupted, [])
    for epoch in range(4):                                                   # every epoch has each image once
        assert sorted(indices[10 * epoch:10 * epoch + 10]) == list(range(10 * epoch, 10 * epoch + 10))


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_batches_of_the_loader(workers):
    """All of them in order, the last one included, with as many loaded ahead as there are workers."""
    data, loaded = Indices(11), []
    real = Indices.__getitem__
    loader = reading.loader(data, workers, batch_size=3, sampler=range(11))
    assert [(x.tolist(), y.tolist()) for x, y in loader] == [
        (part, [-i for i in part]) for part in ([0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10])]
    data.__class__ = type("Counted", (Indices,), dict(__getitem__=lambda data, i: loaded.append(i) or real(data, i)))
    batches = reading.loader(data, workers, ([i] for i in itertools.count()))  # never ends
    next(batches), next(batches)
    end = time.monotonic() + 20
    while len(loaded) < 2 + workers and time.monotonic() < end:
        time.sleep(0.01)
    assert sorted(loaded) == list(range(2 + workers))


def test_indices_count_through_the_epochs():
    """The index of an image tells its epoch, so that each epoch has its own crops."""
    indices = sum((next(batches) for batches in [common.shuffled_indices(10, 4, seed=1)] for _ in range(10)), [])
    assert sorted(indices) == list(range(40))


class Hangs(Indices):
    """As on a dead file server: the second image never arrives."""

    def __getitem__(self, i):
        threading.Event().wait() if i == 1 else None
        return torch.tensor(i), i


def program_with_a_hanging_loader(waits):
    batches = reading.loader(Hangs(4), 1, batch_size=1, sampler=range(4))
    with common.Stop(patience=0.2):
        for _ in range(1 + waits):
            next(batches)
            os.kill(os.getpid(), common.signal.SIGTERM) if waits else None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the program is forked")
@pytest.mark.parametrize("waits, status", [(False, 0), (True, 128 + 15)])
def test_a_loader_that_hangs_does_not_keep_a_program_from_ending(waits, status):
    """Neither at its end, nor when it waits for the loader and gets a signal."""
    process = multiprocessing.get_context("fork").Process(target=program_with_a_hanging_loader, args=[waits])
    process.start()
    process.join(60)
    process.kill()
    assert process.exitcode == status


def test_toy_validation_images_are_new():
    train, val = open_data(None, 16, seed=5)
    assert torch.equal(train[0][0], ToyShapes(16, seed=5)[0][0])
    trained = {train[i][0].numpy().tobytes() for i in range(0, 64)}
    assert not trained & {val[i][0].numpy().tobytes() for i in range(64)} and train.seed != val.seed


@pytest.mark.parametrize("world, accumulate", [(2, 1), (2, 2), (3, 4)])
def test_ranks_share_each_accumulation_step(world, accumulate, monkeypatch):
    """An accumulation step has the same images for any number of ranks."""
    one = next(reading.stream(Indices(50), 24, seed=1))[0].chunk(accumulate)
    ranks = []
    for rank in range(world):
        monkeypatch.setattr(dq, "rank_world", lambda: (rank, world))
        ranks.append(next(reading.stream(Indices(50), 24, seed=1, accumulate=accumulate))[0].chunk(accumulate))
    for step, *parts in zip(one, *ranks):
        assert torch.equal(torch.cat(parts), step)


def test_a_file_with_two_names_is_one_image(tmp_path):
    """Otherwise the same image could be trained on by one name and held out by the other."""
    put(tmp_path / "images", *numbered(30, "cat/"), *numbered(3, "dog/"))
    for i in range(20):
        os.symlink(tmp_path / f"images/cat/{i}.png", tmp_path / f"images/dog/soft{i}.png")
        os.link(tmp_path / f"images/cat/{i}.png", tmp_path / f"images/dog/hard{i}.png")
    train, val = open_data(tmp_path / "images", 8)
    assert names(train, val) == sorted(numbered(30, "cat/") + numbered(3, "dog/"))
    assert "40 other names of the same file" in reading.describe(train, val)


def test_identity_depends_on_file_sizes(tmp_path):
    put(tmp_path, *numbered(30))
    before = [reading.identity(open_data(tmp_path, 8)[0]) for _ in range(2)]
    assert before[0] == before[1]
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / os.fsdecode(open_data(tmp_path, 8)[0].names[3]))
    assert reading.identity(open_data(tmp_path, 8)[0]) != before[0]


def test_identity_of_a_data_set(tmp_path):
    """It is in checkpoints, so it must not change."""
    data = ImageFolder(tmp_path, [("a/\udcff.png", 0, 5), ("b/1.png", 1, 12)], "ab", 8)
    checksum = zlib.crc32(b"a/\xff.png 5\nb/1.png 12")
    assert reading.identity(data) == f"2 files (checksum of their names and sizes {checksum:08x})"
    assert reading.identity(ToyShapes(8)) == "the toy shapes"


def test_a_folder_of_validation_images(tmp_path):
    put(tmp_path / "a", *numbered(40, "cat/"), *numbered(40, "dog/"))
    put(tmp_path / "b", *numbered(3, "dog/"))
    train, val = open_data(tmp_path / "a", 8, held_out=tmp_path / "b")
    assert len(train) == 80 and names(val) == numbered(3, "dog/") and {val[i][1] for i in range(3)} == {1}
    put(tmp_path / "b", "cow/1.png")
    with pytest.raises(dq.UserError, match="cow/1.png below .* has no matching class in"):
        open_data(tmp_path / "a", 8, held_out=tmp_path / "b")
    with pytest.raises(dq.UserError, match="--held-out is for the images of --data"):
        open_data(None, 8, held_out=tmp_path / "b")


def test_validation_images_below_data_are_not_trained_on(tmp_path):
    """Their folder is no class, and causes no note on splits."""
    put(tmp_path, *numbered(7), *numbered(3, "val/"))
    train, val = open_data(tmp_path, 8, held_out=tmp_path / "val")
    assert names(train) == numbered(7) and names(val) == numbered(3)
    put(tmp_path, *numbered(4, "train/"))
    train, val = open_data(str(tmp_path), 8, held_out=str(tmp_path / "val"))
    assert names(train) == sorted(numbered(7) + numbered(4, "train/")) and train.classes == val.classes == ()
    assert reading.describe(train, val).endswith("no classes; skipped: nothing")


def test_augmentation_depends_on_the_seed(tmp_path):
    """The crops do, and the images that replace broken ones."""
    for i in range(12):
        Image.effect_noise((40, 20), 99).save(tmp_path / f"{i:02}.png")
    (tmp_path / "00.png").write_bytes(b"")

    def drawn(seed):
        data = ImageFolder(tmp_path, [(f"{i:02}.png", i) for i in range(12)], (), 16, augment=True, seed=seed)
        return data[5][0], [data[12 * epoch][1] for epoch in range(8)]
    (a, first), (b, again), (c, other) = map(drawn, (1, 1, 2))
    assert torch.equal(a, b) and first == again and not torch.equal(a, c) and first != other


def test_flips_can_be_disabled(tmp_path):
    for name, columns in (("left", slice(0, 4)), ("right", slice(4, 8))):
        (tmp_path / name).mkdir()
        pixels = np.zeros((8, 8, 3), np.uint8)
        pixels[:, columns] = 255
        for i in range(30):
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    found = {}
    for flip in (True, False):
        train, _ = open_data(tmp_path, 8, augment=True, flip=flip)
        found[flip] = {(label, bool(x[0, 0, 0] > 0)) for x, label in map(train.__getitem__, range(200))}
    assert found[True] == {(0, True), (0, False), (1, True), (1, False)}
    assert found[False] == {(0, True), (1, False)}


@pytest.mark.parametrize("failures", [2, 3])
def test_io_errors_are_retried(failures, tmp_path, monkeypatch, capfd):
    """Two retries; then the run ends. An I/O error says nothing about the image, so none is skipped."""
    put(tmp_path, *numbered(20))
    monkeypatch.setattr(reading, "MEMORY", 0)
    train, _ = open_data(tmp_path, 8, augment=True)
    waits, left, real = [], [failures], Path.read_bytes

    def read_bytes(path):
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(errno.ESTALE, "Stale file handle")
        return real(path)
    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    monkeypatch.setattr(common.time, "sleep", waits.append)
    if failures < 3:
        assert train[0][1] == -1 and waits == [1, 5]
    else:
        with pytest.raises(OSError, match="Stale file handle; once this is fixed, --resume continues"):
            train[0]
    assert not train.strips and capfd.readouterr().out == ""


@pytest.mark.parametrize("failures", [2, 3])
def test_io_errors_of_a_folder(failures, tmp_path, monkeypatch):
    """They are retried as well; then the run ends before it has missed images."""
    put(tmp_path, *numbered(20, "a/"), *numbered(20, "b/"))
    left, real = [failures], os.scandir

    def scandir(path):
        left[0] -= str(path).endswith("b")
        if str(path).endswith("b") and left[0] >= 0:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return real(path)
    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(common.time, "sleep", lambda seconds: None)
    if failures < 3:
        assert len(reading.find_images(tmp_path).files) == 40
    else:
        line = call(train_vae.main, "--data", tmp_path, "--out", tmp_path / "out")
        assert line.startswith(f"error: can't read {tmp_path / 'b'}: Input/output error")


@pytest.mark.parametrize("workers", [0, 2])
def test_cached_images_equal_decoded_ones(workers, tmp_path, monkeypatch):
    """Bit for bit, with and without loader threads, over epochs, and beside a broken file."""
    for i, (w, h) in enumerate([(40, 40), (97, 31), (31, 97), (9, 5), (300, 2), (8, 8)] * 4):
        noise = np.random.default_rng(i).integers(0, 256, (h, w, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{i}.png")
    Image.effect_noise((640, 400), 60).save(tmp_path / "photo.jpg")
    truncate(tmp_path / "3.png")
    found, sizes = [], []
    for memory in (1e9, 25 * 3 * 64, 0):                                     # all, some and no images are kept
        monkeypatch.setattr(reading, "MEMORY", memory)
        train, val = open_data(tmp_path, 8, augment=True, seed=5)
        if memory == 1e9:
            intact = names(train)
            (tmp_path / "3.png").unlink()                                    # the split depends on the number of files
        batches = reading.stream(train, 6, seed=5, workers=workers)
        found.append([next(batches)[0] for _ in range(12)] + [x for x, _ in reading.loader(
            val, workers, batch_size=2, sampler=range(len(val)))])
        assert names(train) == intact
        kept = [strip.nbytes for strip in train.strips.values() if strip is not None]
        assert sum(kept) <= memory
        sizes.append(len(kept))
    assert sizes[0] == 24 and 0 < sizes[1] < 24 and sizes[2] == 0
    for kept, partly, decoded in zip(*found):
        assert torch.equal(kept, decoded) and torch.equal(partly, decoded)
        assert kept.dtype == torch.float32 and kept.is_contiguous()
    indices = next(common.shuffled_indices(len(train), 6, seed=5))
    assert torch.equal(found[0][0], torch.stack([train[i][0] for i in indices]))


def test_each_file_is_decoded_once(tmp_path, monkeypatch):
    put(tmp_path, *numbered(20))
    read, real = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path.name) or real(path))
    train, val = open_data(tmp_path, 8, augment=True)
    for data in (train, val):
        [data[i] for i in range(3 * len(data))]
    assert sorted(read) == sorted(numbered(20))


@pytest.mark.parametrize("world, cores, expected", [(1, 12, 3), (2, 12, 6), (16, 12, 1)])
def test_processes_share_the_cores(world, cores, expected, tmp_path, monkeypatch):
    """torchrun sets the number of torch's threads to 1 in each process."""
    put(tmp_path, *numbered(3))
    threads, real = [], reading.ThreadPool
    monkeypatch.setattr(reading, "ThreadPool", lambda n: threads.append(n) or real(n))
    monkeypatch.setattr(dq, "rank_world", lambda: (0, world))
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3 if world == 1 else 1)
    open_data(tmp_path, 8)
    assert threads == [expected]


def test_jpegs_are_decoded_at_a_reduced_size(tmp_path):
    """With sides of at least twice the crop's; the result is close to that of the full size."""
    ramp = np.add.outer(np.arange(320), np.arange(640)) % 512
    Image.fromarray(np.minimum(ramp, 511 - ramp).astype(np.uint8)).save(tmp_path / "x.jpg", quality=95)
    assert reading.open_image(tmp_path / "x.jpg", 32).size == (160, 80)
    assert reading.open_image(tmp_path / "x.jpg").size == (640, 320)
    reduced = reading.load_image(tmp_path / "x.jpg", 32)
    full = Image.open(tmp_path / "x.jpg").convert("RGB").resize((64, 32))
    assert (reduced - reading.crop(np.asarray(full), 32)).abs().max() < 0.05


def test_panoramas_keep_their_proportions(tmp_path):
    stripes = np.zeros((10, 400, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "x.png")
    assert reading.load_strip(tmp_path / "x.png", 10).shape == (10, 10 * reading.LONGEST, 3)
    assert np.array_equal(reading.load_strip(tmp_path / "x.png", 10), stripes[:, 40:360])  # not resized
    assert reading.load_strip(tmp_path / "x.png", 20).shape == (20, 20 * reading.LONGEST, 3)


def test_crops_are_uniform():
    strip = np.arange(11, dtype=np.uint8)[None, :, None].repeat(8, 0).repeat(3, 2)  # 8 x 11: four different crops
    for turned in (strip, strip.transpose(1, 0, 2)):
        corners = [(reading.crop(turned, 8, np.random.default_rng(i)).min() + 1) * 127.5 for i in range(400)]
        found = Counter(round(corner.item()) for corner in corners)
        assert sorted(found) == [0, 1, 2, 3] and min(found.values()) > 60
    assert round(((reading.crop(strip, 8).min() + 1) * 127.5).item()) in (1, 2)


def test_a_huge_file_is_not_read(tmp_path, monkeypatch, capfd):
    """The limits are on its bytes, and on the pixels that its header promises."""
    put(tmp_path / "images", *numbered(3))
    with open(tmp_path / "images/scan.tif", "wb") as file:
        file.write(b"II*\0")
        file.truncate(reading.BYTES + 1)                                     # a sparse file
    Image.new("1", (10_000, 9_000)).save(tmp_path / "images/wide.png")
    read, real = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path.name) or real(path))
    train, val = open_data(tmp_path / "images", 8)
    assert "; skipped: 2 broken" in reading.describe(train, val) and "scan.tif" not in read
    warned = capfd.readouterr().out
    assert "scan.tif: not a file of at most 536,870,912 bytes" in warned
    assert "wide.png: too many pixels: (10000, 9000)" in warned
    with pytest.raises(dq.UserError, match="scan.tif: not a file of at most"):
        reading.load_image(tmp_path / "images/scan.tif", 8)                  # as in sample.py --input

    def no_memory(path):
        raise MemoryError
    monkeypatch.setattr(Path, "read_bytes", no_memory)
    with pytest.raises(dq.UserError, match="0.png: not enough memory"):
        reading.open_image(tmp_path / "images/0.png")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_a_pipe_is_not_read(tmp_path, monkeypatch):
    """To read one would block."""
    os.mkfifo(tmp_path / "x.png")
    monkeypatch.setattr(Path, "read_bytes", None)
    with pytest.raises(dq.UserError, match="x.png: not a file"):
        reading.open_image(tmp_path / "x.png")


def replace_stat(monkeypatch, of):
    """Let the entries of os.scandir return of(info) where they would return `info`."""
    entries = os.scandir

    class Entry:
        def __init__(self, entry):
            self.entry = entry

        def __getattr__(self, name):
            return getattr(self.entry, name)

        def __fspath__(self):
            return self.entry.path

        def stat(self):
            return of(self.entry.stat())
    monkeypatch.setattr(os, "scandir", lambda path: map(Entry, entries(path)))


def test_one_stat_per_file(tmp_path, monkeypatch):
    """A file server may take a millisecond for each, and there may be a million files."""
    put(tmp_path, *numbered(30, "a/"), *numbered(10, "b/"))
    asked = Counter()
    replace_stat(monkeypatch, lambda info: (asked.update(["scan"]), info)[1])
    for name in ("stat", "lstat"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda path, *args, real=real, **how: (
            asked.update([str(path).endswith(".png")]), real(path, *args, **how))[1])
    monkeypatch.setattr(reading, "MEMORY", 0)
    train, val = open_data(tmp_path, 8)
    reading.describe(train, val), reading.identity(train), reading.identity(val)
    assert asked["scan"] == 40 and asked[True] == 0


def test_data_sets_can_be_pickled(tmp_path):
    """So that a DataLoader can send them to its processes on every system."""
    put(tmp_path, *numbered(3))
    for data in (ToyShapes(8, n=4), open_data(tmp_path, 8, augment=True)[0]):
        first = data[0][0]
        assert torch.equal(pickle.loads(pickle.dumps(data))[0][0], first)


def test_names_are_in_one_array(tmp_path):
    """Processes that share a list copy each of its Python objects when they look at it."""
    files = [(f"cat/\udcff{i}.png", i % 3) for i in range(50)]
    data = ImageFolder(tmp_path, files, "abc", 8)
    assert list(labels(data).items()) == files and len(data) == 50
    assert not any(isinstance(each, list) for each in vars(data).values())


@pytest.mark.parametrize("links", [1, 2])
def test_inode_numbers_may_be_meaningless(links, tmp_path, monkeypatch):
    """A file with one link has no other name. With two, size and time must be equal as well."""
    put(tmp_path, *numbered(12, "a/"), *numbered(12, "b/"))
    (tmp_path / "b/again.png").symlink_to(tmp_path / "a/3.png")
    for i, path in enumerate(sorted(tmp_path.rglob("*.png"))):
        os.utime(path, (i * (links - 1),) * 2)                               # with one link, the times are equal
    replace_stat(monkeypatch, lambda info: SimpleNamespace(
        st_dev=1, st_ino=7, st_nlink=links, st_size=info.st_size, st_mtime_ns=info.st_mtime_ns, st_mode=info.st_mode))
    train, val = open_data(tmp_path, 8)
    assert names(train, val) == sorted(numbered(12, "a/") + numbered(12, "b/"))


def test_files_take_precedence_over_links(tmp_path):
    """The class is that of the file, even if the name of the link comes first in the alphabet."""
    root = tmp_path / "images"
    put(root, *numbered(4, "cat/"), *numbered(4, "dog/"))
    for i in range(3):
        os.symlink(root / f"dog/{i}.png", root / f"cat/a{i}.png")
    (tmp_path / "outside").mkdir()
    os.link(root / "dog/3.png", tmp_path / "outside/3.png")
    os.symlink(tmp_path / "outside", root / "a link")
    assert names(*open_data(root, 8)) == numbered(4, "cat/") + numbered(4, "dog/")


def test_images_below_both_folders_are_not_trained_on(tmp_path):
    put(tmp_path / "a", *numbered(20))
    with pytest.raises(dq.UserError, match="are also below --held-out"):
        open_data(tmp_path / "a", 8, held_out=tmp_path / "a")
    with pytest.raises(dq.UserError, match="are also below --held-out"):
        open_data(tmp_path / "a", 8, held_out=tmp_path)                      # the folder that contains it
    (tmp_path / "b").mkdir()
    os.symlink(tmp_path / "a/1.png", tmp_path / "b/one.png")
    os.link(tmp_path / "a/2.png", tmp_path / "b/two.png")
    put(tmp_path / "b", "3.png")                                             # another file with the same name
    train, val = open_data(tmp_path / "a", 8, held_out=tmp_path / "b")
    assert names(train) == sorted(set(numbered(20)) - {"1.png", "2.png"}) and len(val) == 3
    assert "skipped: 2 also below --held-out" in reading.describe(train, val)


def test_description_says_if_the_validation_image_is_trained_on(tmp_path):
    put(tmp_path / "one", "0.png")
    put(tmp_path / "four", *(f"{name}/0.png" for name in "abcd"))
    put(tmp_path / "five", *(f"{name}/0.png" for name in "abcd"), "a/1.png")
    for name, n in (("one", 1), ("four", 4)):
        text = reading.describe(*open_data(tmp_path / name, 8))
        assert f"{n} training and 1 validation images (the same: there is no other), " in text
    assert "the same" not in reading.describe(*open_data(tmp_path / "five", 8))


@pytest.mark.parametrize("name", ["imgs.zip", "photo.png"])
def test_a_file_is_no_folder(name, tmp_path):
    put(tmp_path, "photo.png")
    shutil.copy(tmp_path / "photo.png", tmp_path / "imgs.zip")
    with pytest.raises(dq.UserError, match=f"{name} is a file; a folder of images is needed .unpack an archive"):
        open_data(tmp_path / name, 8)
    with pytest.raises(dq.UserError, match=f"{name} is a file"):
        open_data(tmp_path, 8, held_out=tmp_path / name)


def test_empty_folder_names_are_errors(tmp_path):
    """They are neither the toy shapes nor the current folder."""
    put(tmp_path, *numbered(3))
    for folder, held_out in (("", None), (tmp_path, "")):
        with pytest.raises(dq.UserError, match="no such folder: $"):
            open_data(folder, 8, held_out=held_out)


def test_classes_in_two_unicode_normal_forms(tmp_path):
    """Some systems store an accented letter in file names as two characters."""
    put(tmp_path / "a", *numbered(3, "caf\u00e9/"), *numbered(3, "dog/"))
    put(tmp_path / "b", "cafe\u0301/0.png")
    train, val = open_data(tmp_path / "a", 8, held_out=tmp_path / "b")
    assert train.classes == ("caf\u00e9", "dog") and val[0][1] == 0


def test_image_side(tmp_path):
    for i, size in enumerate([(30, 50), (60, 40), (300, 90), (10, 10), (45, 45)]):
        Image.new("RGB", size).save(tmp_path / f"{i}.png")
    (tmp_path / "broken.png").touch()
    Image.new("RGB", (999, 999)).save(tmp_path / "huge.png")
    os.truncate(tmp_path / "huge.png", reading.BYTES + 1)                    # it will not be read
    found = reading.find_images(tmp_path)
    assert reading.image_side(found) == 40
    (tmp_path / "huge.png").unlink()
    found = reading.find_images(tmp_path)
    assert reading.image_side(found._replace(files=found.files[-1:])) == 0   # no header can be read
    assert reading.image_side(found._replace(files=found.files[:2]), n=1) == 30


# ------------------------------------------------------------------------------------------------
# The toy shapes


def test_toy_shapes_are_computed_once(monkeypatch):
    painted, real = [], ToyShapes.paint
    monkeypatch.setattr(ToyShapes, "paint", lambda data, i: painted.append(i) or real(data, i))
    data = ToyShapes(16, n=10, seed=2)
    first = [data[i][0] for i in range(10)]
    first[3].zero_()                                                         # the caller may change the image
    assert all(torch.equal(data[i + 10][0], real(data, i)) for i in range(10)) and painted == [*range(10)]
    monkeypatch.setattr(reading, "MEMORY", 0)
    data = ToyShapes(16, n=10, seed=2)
    assert torch.equal(data[3][0], data[3][0]) and len(painted) == 12


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
        near = torch.nn.functional.max_pool2d(mask[None].float(), 5, 1, 2)[0, 1:, 1:] > 0
        assert change[~near].max() < 6 / size                                # the background is smooth
        assert change[mask[1:, 1:]].max() > 0.5                              # the shape is textured
        assert 0.05 < mask.float().mean() < 0.8


def test_texture_index():
    """`texture` names the texture that is drawn."""
    class Forced(ToyShapes):
        def _draw(self, i):
            *shape_and_colours, turn, _, inks = super()._draw(i)
            return *shape_and_colours, turn, self.kind, inks
    data, index = ToyShapes(16, 24), [ToyShapes(16, 24).texture(i) for i in range(24)]
    for kind in range(3):
        forced = Forced(16, 24)
        forced.kind = kind
        assert [torch.equal(forced[i][0], data[i][0]) for i in range(24)] == [kind == each for each in index]
    assert set(index) == {0, 1, 2}


# ------------------------------------------------------------------------------------------------
# One file


def read(tmp_path, image, name="x.png", size=4, **save):
    """Save a Pillow image or the bytes of a file, and load it as the scripts do. -> (S, S, 3), 0 to 255"""
    if isinstance(image, bytes):
        (tmp_path / name).write_bytes(image)
    else:
        image.save(tmp_path / name, **save)
    return ((reading.load_image(tmp_path / name, size) + 1) * 127.5).permute(1, 2, 0).numpy()


def flat(mode, colour, size=(4, 4), first=None):
    """An image of one colour; its first pixel, which the tests ignore, can have another one."""
    image = Image.new(mode, size, colour)
    if first is not None:
        image.putpixel((0, 0), first)
    return image


def palette_with_transparency():
    image = flat("P", 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.info["transparency"] = 1
    return image


def directory(tags, start, order="<"):
    """(tag, type, values) -> the bytes of a TIFF directory, which begins at byte `start` of the file."""
    head, tail = struct.pack(f"{order}H", len(tags)), b""
    for tag, kind, values in sorted(tags):
        data = struct.pack(f"{order}{len(values)}{ {3: 'H', 4: 'I', 8: 'h'}[kind]}", *values)
        if len(data) > 4:                                                    # then the entry holds its place
            place = start + 2 + 12 * len(tags) + 4 + len(tail)
            tail += data
            data = struct.pack(f"{order}I", place)
        head += struct.pack(f"{order}HHI", tag, kind, len(values)) + data.ljust(4, b"\0")
    return head + bytes(4) + tail


def tif(data, bits, photometric=1, kind=1, order="<", compression=1):
    """The bytes of a TIFF file with 4 x 4 greys. kind: 1 for unsigned integers, 2 for signed ones, 3 for floats"""
    tags = [(256, 3, [4]), (257, 3, [4]), (258, 3, [bits]), (259, 3, [compression]), (262, 3, [photometric]),
            (273, 4, [8]), (277, 3, [1]), (278, 3, [4]), (279, 4, [len(data)]), (339, 3, [kind])]
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", 8 + len(data))
    return head + data + directory(tags, 8 + len(data), order)


def png(pixels, depth, color_type, *chunks):
    """The bytes of a PNG file with four equal rows of pixels. chunks: (name, data), before the pixels"""
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
    "translucent": (flat("RGBA", (0, 0, 0, 51)), "x.webp", 204),             # 20 % black over white
    "grey+alpha": (flat("LA", (0, 0)), "x.png", 255),
    "palette+alpha": (palette_with_transparency(), "x.png", 255),
    "16bit": (flat("I;16", 32896), "x.png", 128),
    "16bit-tif": (flat("I;16", 257), "x.tif", 1),
    "16bit-tif white is zero": (tif(struct.pack("<H", 257 * 55) * 16, 16, photometric=0), "x.tif", 200),
    "16bit-pgm, dark": (b"P5 4 4 65535\n" + b"\1\1" * 16, "x.pgm", 1),
    "10bit-pgm as text, dark": (b"P2 4 4 1000\n" + b"4 " * 16, "x.pgm", 1),
    "12bit-tif": (tif(b"\x40\x44\x04" * 8, 12), "x.tif", 64),               # 0x404 of 0xfff
    "32bit-tif": (flat("I", 100, first=255), "x.tif", 100),                  # NumPy integers from 0 to 255
    "32bit-tif of 16 bits": (flat("I", 32768), "x.tif", 127.5),
    "float": (flat("F", 0.5), "x.tif", 127.5),
    "float, overshoot": (flat("F", 0.5, first=1.1), "x.tif", 127.5),
    "float, all overshoot": (flat("F", 1.02), "x.tif", 255),
    "float of 0 to 255": (flat("F", 100.0, first=255.0), "x.tif", 100),
    "float of 0 to 255, overshoot": (flat("F", 100.0, first=280.0), "x.tif", 100),
    "float, one outlier": (flat("F", 0.5, first=1e9), "x.tif", 127.5),
    "float, infinite": (flat("F", 0.5, first=float("inf")), "x.tif", 127.5),
    "float, a quarter infinite": (Image.fromarray(np.float32([[np.inf] * 4] + [[0.5] * 4] * 3)), "x.tif", 127.5),
    "float, not a number": (flat("F", 0.5, first=float("nan")), "x.tif", 127.5),
    "float, no numbers": (flat("F", float("nan")), "x.tif", 0),
    "key, 2 bit": (png(b"\xaa", 2, 0, (b"tRNS", struct.pack(">H", 2))), "x.png", 255),
    "key, 2 bit, of another grey": (png(b"\xaa", 2, 0, (b"tRNS", struct.pack(">H", 1))), "x.png", 170),
    "key, 8 bit": (png(b"\x28" * 4, 8, 0, (b"tRNS", struct.pack(">H", 40))), "x.png", 255),
    "key, 16 bit": (png(b"\x28\x07" * 4, 16, 0, (b"tRNS", b"\x28\x07")), "x.png", 255),
    "key, 16 bit, of another grey": (png(b"\x28\x28" * 4, 16, 0, (b"tRNS", b"\x28\x07")), "x.png", 40),
    "key, rgb 16 bit": (png(RGB16 * 4, 16, 2, (b"tRNS", RGB16)), "x.png", 255),
    "key, rgb 16 bit, of another colour": (png(RGB16 * 4, 16, 2, (b"tRNS", bytes(6))), "x.png", (40, 80, 7)),
}


def colour_profile(description, gamma, *primaries):
    """A minimal ICC profile: three primaries (X, Y, Z, relative to D50), and a gamma or the table of a curve."""
    def fixed(*numbers):
        return b"".join(struct.pack(">i", round(x * 65536)) for x in numbers)
    name, table = description.encode() + b"\0", [256 * gamma] if np.isscalar(gamma) else gamma
    curve = struct.pack(f">I{len(table)}H", len(table), *map(round, table)) + bytes(2 * (len(table) % 2))
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
@pytest.mark.parametrize("profile, colour, expected", [
    (colour_profile("wide", 2.2, *P3), (230, 100, 60), (249, 89, 39)),
    (colour_profile("linear sRGB", 1.0, *SRGB), (55, 55, 55), (128, 128, 128)),
    (colour_profile("sRGB-elle-V2-g10.icc", 1.0, *SRGB), (55, 55, 55), (128, 128, 128)),  # linear in spite of its name
    (colour_profile("c2", 2.2, *SRGB), (200, 100, 60), (201, 100, 57)),
    (b"no profile", (230, 100, 60), (230, 100, 60))], ids=["wide", "linear", "linear sRGB", "gamma", "unusable"])
def test_colour_profiles(profile, colour, expected, mode, tmp_path):
    image = Image.new("RGB", (8, 8), colour).convert(mode, palette=Image.Palette.ADAPTIVE)
    image.save(tmp_path / "x.png", icc_profile=profile)
    assert max(abs(a - b) for a, b in zip(reading.open_image(tmp_path / "x.png").getpixel((3, 3)), expected)) <= 1


def test_srgb_profiles_change_nothing(tmp_path):
    """The rounding errors of their transform, whose curve often is a table, are avoided."""
    colours = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    x = np.linspace(0, 1, 1024)
    table = np.where(x < 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4) * 65535
    Image.fromarray(colours).save(tmp_path / "x.png", icc_profile=colour_profile("any", table, *SRGB))
    assert np.array_equal(np.asarray(reading.open_image(tmp_path / "x.png")), colours)


@pytest.mark.parametrize("kind", MODES)
def test_images_of_every_mode(tmp_path, kind):
    image, name, expected = MODES[kind]
    save = dict(lossless=True) if name.endswith("webp") else {}
    pixels = read(tmp_path, image, name, **save)
    assert np.abs(pixels - expected)[1:, 1:].max() <= 1, pixels[1, 1]


@pytest.mark.parametrize("compression", [1, 8], ids=["raw", "deflate"])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind, white", [
    ("u1", 255), ("u2", 65535), ("u4", 2 ** 32 - 1), ("u4", 65535), ("u4", 255), ("i1", 127),
    ("i2", 32767), ("i2", 255), ("i4", 2 ** 31 - 1), ("i4", 255), ("f4", 1), ("f4", 255), ("f4", 65535),
    ("f4", 2 ** 32 - 1), ("f2", 1), ("f8", 1)])
def test_greys_of_every_type(kind, white, order, compression, tmp_path):
    """They give the same picture as 8 bits, or an error where Pillow can't read the type or would swap its bytes."""
    expected = np.arange(0, 256, 17).reshape(4, 4)
    levels = expected / 255 * white
    data = (levels if kind[0] == "f" else levels.round()).astype(order + kind).tobytes()
    data = zlib.compress(data) if compression == 8 else data
    file = tif(data, 8 * int(kind[1]), 1, "uif".index(kind[0]) + 1, order, compression)
    refused = kind in ("f2", "f8") or order == ">" and (kind == "u4" or compression == 8 and kind in ("i2", "i4", "f4"))
    if refused:
        with pytest.raises(dq.UserError, match="x.tif: (cannot identify image file$|Pillow would swap its bytes)"):
            read(tmp_path, file, "x.tif")
    else:
        assert np.abs(read(tmp_path, file, "x.tif")[..., 0] - expected).max() < 1.5


def test_premultiplied_grey(tmp_path):
    """Some versions of Pillow read such files."""
    rgb = reading.to_rgb(flat("LA", (128, 102)).convert("La"))
    assert rgb.mode == "RGB" and abs(rgb.getpixel((1, 1))[0] - 204) <= 1     # 40 % of half grey, over white


ORIENTATION_6 = (0x0112, 3, [6])                                             # rotate by 90 degrees clockwise
EXIF = {"intact": [ORIENTATION_6], "a tag out of range": [ORIENTATION_6, (0x0128, 8, [-5])],
        "a missing directory": [ORIENTATION_6, (0x8769, 4, [99999])], "not EXIF": None}


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp"])
@pytest.mark.parametrize("kind", EXIF)
def test_images_with_corrupt_metadata(kind, name, tmp_path, capfd):
    """Every image is read without a warning, and upright if its orientation can be read."""
    image = Image.new("RGB", (8, 8))
    image.paste("white", (0, 0, 8, 4))                                       # the upper half of the file is white ...
    tags = EXIF[kind]
    exif = b"garbage" if tags is None else b"Exif\0\0II*\0\x08\0\0\0" + directory(tags, 8)
    image.save(tmp_path / name, exif=exif)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        load_image = runpy.run_path(reading.__file__)["load_image"]          # pytest has removed the module's filter
        pixels = ((load_image(tmp_path / name, 8) + 1) * 127.5).permute(1, 2, 0).numpy()
    black, white = (pixels[4:], pixels[:4]) if tags is None else (pixels[:, :4], pixels[:, 4:])
    assert black.max() < 20 and white.min() > 235                            # ... which is the right half, upright
    assert not warned and capfd.readouterr().err == ""


def test_png_with_three_megabytes_of_text(tmp_path):
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
    assert 8 < sum(rising) < 32                                              # half of them are flipped
    assert len({round(c.mean().item(), 3) for c in crops}) > 15              # from many positions
    noise = np.indices((64, 64)).sum(0).astype(np.uint8) % 2 * 255           # a checkerboard, which becomes grey
    Image.fromarray(noise).save(tmp_path / "noise.png")
    small = reading.load_image(tmp_path / "noise.png", 8)
    assert small.abs().max() < 0.1


@pytest.mark.parametrize("shape", [(16, 40), (40, 16)], ids=["wide", "high"])
def test_crops_reach_every_side(shape, tmp_path):
    """The smallest and the largest random number give the first and the last square, with its last row and column."""
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "x.png")
    for number, square in ((0.0, noise[:16, :16]), (1 - 2.0 ** -53, noise[-16:, -16:])):
        def random(n=None):
            return np.full(n, number) if n else 0.9                          # not flipped
        crop = reading.load_image(tmp_path / "x.png", 16, SimpleNamespace(random=random))
        assert np.abs(((crop + 1) * 127.5).permute(1, 2, 0).numpy() - square).max() < 1.5


def test_16_bit_greys_are_rounded(tmp_path):
    greys = np.uint16([[0, 128, 129, 385], [386, 500, 1000, 32767], [32900, 40000, 50000, 60000], [65406, 65407, 9, 1]])
    pixels = read(tmp_path, Image.fromarray(greys))
    assert (pixels.round()[..., 0] == np.round(greys / 257)).all()


# ------------------------------------------------------------------------------------------------
# The order: depth, transparency, colours


def naive_srgb(value, gamma):
    """A level (0 to 255) in a profile with sRGB's primaries and this gamma -> the level in sRGB"""
    light = (value / 255) ** gamma
    return 255 * (12.92 * light if light < 0.0031308 else 1.055 * light ** (1 / 2.4) - 0.055)


def grey_profile(gamma):
    """As `colour_profile`, for grey images: it has one curve and no primaries."""
    rgb = colour_profile("grey", gamma, *SRGB)
    tags = {rgb[at:at + 4]: rgb[slice(*(lambda start, length: (start, start + length))(
        *struct.unpack(">II", rgb[at + 4:at + 12])))] for at in range(132, 132 + 12 * 8, 12)}
    tags = {b"desc": tags[b"desc"], b"wtpt": tags[b"wtpt"], b"kTRC": tags[b"rTRC"]}
    start, index = 132 + 12 * 3, struct.pack(">I", 3)
    for tag, data in tags.items():
        index += tag + struct.pack(">II", start, len(data))
        start += len(data)
    return struct.pack(">I", start) + rgb[4:16] + b"GRAY" + rgb[20:128] + index + b"".join(tags.values())


def pixels_of(kind, transparency):
    """-> colour type of a PNG, bytes of a row, chunks; its level (0 to 255) and opacity (0 to 1)"""
    colour, depth = kind
    key = {"key": True, "other key": False}.get(transparency)
    level = {1: 255, 2: 170, 4: 102, 8: 100, 16: 100}[depth]
    raw = {1: 1, 2: 2, 4: 6, 8: 100, 16: 100 * 257}[depth]
    if colour == "palette":
        row, palette = bytes([0] * (4 * depth // 8 or 1)), (b"PLTE", bytes([level] * 3 + [9] * 3))
        alpha = {"key": [0], "other key": [255, 0], "half": [102], None: None}[transparency]
        chunks = [palette] + ([(b"tRNS", bytes(alpha))] if alpha else [])
        return 3, row, chunks, level, {"key": 0.0, "half": 0.4}.get(transparency, 1.0)
    bands = 3 if colour == "rgb" else 1
    if transparency == "half":                                               # an alpha channel
        row = b"".join(struct.pack(">H", v) if depth == 16 else bytes([v])
                       for v in ([raw] * bands + [round(0.4 * (2 ** depth - 1))]) * 4)
        return (6 if bands == 3 else 4), row, [], level, 0.4
    bits = "".join(f"{raw:0{depth}b}" for _ in range(4 * bands))
    row = int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8), "big")
    value = raw if key else raw ^ (256 if depth == 16 else 1)                 # Pillow reads 8 bits
    chunks = [] if key is None else [(b"tRNS", struct.pack(f">{bands}H", *[value] * bands))]
    return (2 if bands == 3 else 0), row, chunks, level, 0.0 if key else 1.0


KINDS = [("grey", 1), ("grey", 2), ("grey", 4), ("grey", 8), ("grey", 16), ("rgb", 8), ("rgb", 16), ("palette", 8)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind[0]}{kind[1]}")
def test_depth_then_transparency_then_colours(kind, tmp_path):
    """Every kind of PNG, with every kind of transparency and of profile."""
    for transparency, profile in itertools.product([None, "key", "other key", "half"], [None, 1.0, 1.8, "rgb"]):
        if transparency == "half" and kind[0] == "grey" and kind[1] < 8:
            continue                                                         # no PNG has it
        colour, row, chunks, level, alpha = pixels_of(kind, transparency)
        grey = kind[0] == "grey" and profile != "rgb"
        gamma = 1.0 if profile == "rgb" else profile
        if profile:
            icc = grey_profile(gamma) if grey else colour_profile("any", gamma, *SRGB)
            chunks = [(b"iCCP", b"x\0\0" + zlib.compress(icc)), *chunks]
        (tmp_path / "x.png").write_bytes(png(row, kind[1], colour, *chunks))
        expected = level * alpha + 255 * (1 - alpha)
        expected = naive_srgb(expected, gamma) if profile else expected
        found = np.asarray(reading.open_image(tmp_path / "x.png")).astype(int)
        assert np.abs(found - expected).max() <= 1.6, (kind, transparency, profile, found[0, 0], expected)


def test_colour_profiles_of_other_formats(tmp_path):
    """TIFF with greys of several depths, and a WebP whose pixels are all transparent."""
    for image, level in ((flat("F", 0.25), 63.75), (flat("I;16", 64 * 257), 64), (flat("L", 64), 64)):
        for gamma in (1.0, 1.8):
            image.save(tmp_path / "x.tif", icc_profile=grey_profile(gamma))
            found = reading.open_image(tmp_path / "x.tif").getpixel((0, 0))[0]
            assert abs(found - naive_srgb(level, gamma)) <= 1.6
    flat("RGBA", (100, 100, 100, 0)).save(tmp_path / "x.webp", lossless=True, exact=True,
                                          icc_profile=colour_profile("any", 1.0, *SRGB))
    assert reading.open_image(tmp_path / "x.webp").getpixel((0, 0)) == (255, 255, 255)
