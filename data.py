"""Reading images: the built-in toy shapes, folders of image files, and one file of any kind as a tensor."""
import contextlib
import errno
import functools
import io
import multiprocessing
import os
import posixpath
import re
import signal
import stat
import sys
import time
import unicodedata
import warnings
import zlib
from collections import Counter, namedtuple
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageChops, ImageCms, ImageOps, PngImagePlugin
from torch.utils.data import DataLoader, Dataset, default_collate, default_convert, get_worker_info
from tqdm import tqdm

import dq
from common import SIGNALS, printable, shuffled_indices

MEMORY = 2e9                             # bytes per process for images that are kept, so that each is computed once


# ------------------------------------------------------------------------------------------------
# The toy shapes


class ToyShapes(Dataset):
    """Textured shapes (high detail) on smooth gradients (low detail), of any size.

    self[i] -> image (3, S, S) in [-1, 1], label (the kind of shape, i % 4); both depend on (seed, i mod n) alone.
    detail_mask(i) -> where the shape is; texture(i) -> index into `textures`.
    """
    classes = ("circle", "square", "triangle", "cross")
    textures = ("stripes", "checks", "dots")
    backgrounds = np.array([[205, 226, 240], [240, 222, 206], [214, 236, 212], [232, 216, 240],
                            [246, 238, 200], [150, 178, 206], [206, 160, 150], [150, 190, 160]]) / 255
    inks = np.array([[[30, 60, 130], [250, 200, 60]], [[190, 40, 50], [250, 240, 225]],
                     [[20, 110, 90], [250, 170, 140]], [[90, 40, 120], [150, 220, 210]],
                     [[40, 40, 50], [245, 245, 245]], [[220, 100, 20], [40, 60, 100]]]) / 255

    def __init__(self, size=32, n=8192, seed=0):
        self.size, self.n, self.seed = size, n, seed
        line = (np.arange(size) + 0.5) / size * 2 - 1                        # pixel centres in [-1, 1]
        self.x, self.y = np.meshgrid(line, line)                             # S, S; y points down
        self.kept = None                                                     # n, 3, S, S once there are any

    def __len__(self):
        return self.n

    def _draw(self, i):
        """Signed distance to the shape's edge (S, S), negative inside; x and y from the shape's centre; two background
        colours and the direction of their gradient; the texture's rotation, kind and inks."""
        rng = dq.numpy_rng(self.seed, i % self.n)
        r = rng.choice([0.6, 0.675, 0.75])
        x, y = self.x - rng.integers(-2, 3) / 8, self.y - rng.integers(-2, 3) / 8  # on a coarse grid: easier to encode
        a, b = np.maximum(abs(x), abs(y)), np.minimum(abs(x), abs(y))
        distances = dict(circle=np.hypot(x, y) - r, square=a - 0.85 * r, cross=np.maximum(a - r, b - 0.36 * r),
                         triangle=np.maximum(0.866 * abs(x) - 0.5 * y - 0.55 * r, y - 0.7 * r))
        return (distances[self.classes[i % self.n % 4]], x, y,
                rng.choice(len(self.backgrounds), 2, replace=False), rng.uniform(0, 2 * np.pi),
                rng.integers(4), rng.integers(len(self.textures)), rng.integers(len(self.inks)))

    def detail_mask(self, i):
        """Pixels of the textured shape: (S, S), bool."""
        return torch.from_numpy(self._draw(i)[0] < 0)

    def texture(self, i):
        return int(self._draw(i)[6])

    def __getitem__(self, i):
        i %= self.n
        if get_worker_info() or 12 * self.n * self.size ** 2 > MEMORY:       # no copy in each loader process
            return self.paint(i), i % 4
        if self.kept is None:                                                # pages take memory once they are written
            self.kept, self.has = torch.empty(self.n, 3, self.size, self.size), np.zeros(self.n, bool)
        if not self.has[i]:
            self.kept[i], self.has[i] = self.paint(i), True
        return self.kept[i].clone(), i % 4

    def paint(self, i):
        """Image i: (3, S, S) in [-1, 1]."""
        def mix(a, b, t):                                                    # colours; t: S, S
            return a + (b - a) * np.clip(t, 0, 1)[..., None]                 # S, S, 3
        d, x, y, behind, angle, turn, kind, inks = self._draw(i)
        image = mix(*self.backgrounds[behind], 0.5 + (np.cos(angle) * self.x + np.sin(angle) * self.y) / 2.83)
        turn, k = turn * np.pi / 4, 2 * np.pi / 0.5                          # 4 periods across the image
        u, v = k * (np.cos(turn) * x + np.sin(turn) * y), k * (np.cos(turn) * y - np.sin(turn) * x)
        wave = (np.sin(u), np.sin(u) * np.sin(v) * 1.4, np.cos(u) * 0.6 + np.cos(v) * 0.6 - 0.3)[kind]
        ink, other = self.inks[inks]
        texture = mix(ink, other, 0.5 + self.size * 0.5 / 8 * wave)          # soft edges
        texture = mix(texture, ink, 1.5 + (d + 0.06) * self.size / 2)        # an outline that closes the shape
        image = mix(image, texture, 0.5 - d * self.size / 2)                 # antialiased edge
        return torch.from_numpy((image.transpose(2, 0, 1) * 2 - 1).astype(np.float32))  # 3, S, S


# ------------------------------------------------------------------------------------------------
# A folder of images


NAMED = 10                               # broken files that are named at the start; all are counted
BROKEN = -2                              # label of an image that can't be decoded
OTHER_PROGRAMS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}              # formats that need more than Pillow
# names that systems hide, beside those with a leading dot, and the figures that this project draws
NO_DATA = {"__MACOSX", "@eaDir", "@__thumb", "@Recycle", "#recycle", "#snapshot", "$RECYCLE.BIN", "lost+found",
           "System Volume Information", "vae.png", "transformer.png", "samples.png"}
# a folder with one of these files is an output of this project, if the first bytes of the file say so too
WRITTEN = {"vae.pt", "vae.jsonl", "codes.pt", "transformer.pt", "transformer.jsonl", "samples.json"}
SIGNS = re.compile(rb'dq-(vae|codes|transformer)|"written_by": *"dq"|"checkpoint":.*"grain_map":|\A\{"step": ', re.S)
OURS = "hidden, of the system or of this project"
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval"}

Found = namedtuple("Found", "root files left_out")       # left_out: {reason: number of files}
File = namedtuple("File", "name size key")               # like "cat/1.png"; bytes; the same for two names of one file


def open_data(folder, size, augment=False, seed=0, skip=None, flip=True, held_out=None, found=None):
    """The images of a folder, or the toy shapes if folder is None -> training set, validation set.

    If there are two or more sub-folders, those of the first level are the classes. The validation set is one file in
    20, or all images of the folder held_out; these are never trained on, even if held_out is inside `folder`.

    augment: random crops of the training images and, with flip, horizontal flips. skip: a folder to leave out (--out).
    found: the result of find_images(folder, [skip, held_out]), if it is there already.
    """
    dq.require("" not in (folder, held_out), "--data and --held-out need the name of a folder, not an empty one")
    if folder is None:
        dq.require(held_out is None, "--held-out is for the images of --data")
        return ToyShapes(size, seed=seed), ToyShapes(size, n=512, seed=seed + 1_000_003)
    root, files, left_out = found or find_images(folder, [skip, held_out])
    other = held_out and find_images(held_out, [skip])
    if other:
        taken = {file.key for file in other.files}
        left_out["also below --held-out"] = sum(file.key in taken for file in files)
        files = [file for file in files if file.key not in taken]
        dq.require(files, f"all images below {folder} are also below --held-out {held_out}; none is left to train on")
    files, kept = decode_all(Found(root, files, left_out), size)

    def class_of(file):                                                      # systems write accents in different ways
        return unicodedata.normalize("NFC", file.name.split("/")[0])

    def labelled(files):
        return [(file.name, label.get(class_of(file), -1), file.size) for file in files]

    classes = sorted({class_of(file) for file in files if "/" in file.name})
    label = {name: i for i, name in enumerate(classes)} if len(classes) > 1 else {}
    train, val = split(labelled(files))
    where, kept_val = root, kept
    if other:
        files, kept_val = decode_all(other, size)
        train, val, where = train + val, labelled(files), other.root
        strange = next((name for name, number, _ in val if label and number < 0), None)
        dq.require(not strange, f"{strange} below {where} has no matching class in {root}")
    return (ImageFolder(root, train, label, size, augment, seed, left_out, flip, kept),
            ImageFolder(where, val, label, size, left_out=left_out, kept=kept_val))


def find_images(root, skip=()):
    """All files below a folder that Pillow may be able to read, sorted by name -> Found.

    Symbolic links are followed, after everything else. Each folder is visited once, and a file with several names
    counts once. skip: folders to leave out; None in it is ignored. If all images are in the sub-folders of one
    sub-folder, as in many archives, that one becomes the root.
    """
    def ask(entry, question):                                                # None: no such file, or no permission
        with contextlib.suppress(dq.UserError):
            return patiently(lambda path: question(), entry.path)
    root = os.fspath(root)
    dq.require(not os.path.isfile(root), f"{root} is a file; a folder of images is needed (unpack an archive first)")
    dq.require(os.path.isdir(root), f"no such folder: {root}")
    endings = {ending for ending, kind in Image.registered_extensions().items()
               if kind in Image.OPEN and kind not in OTHER_PROGRAMS} | {".mpo"}
    rows, left_out, bar = [], Counter(), progress(f"searching {root}")
    seen = {os.path.realpath(folder) for folder in skip if folder} - {os.path.realpath(root)}
    todo, links = [(root, "", False)], []                                    # path, name below root, reached by a link?
    while todo or links:
        path, below, linked = (todo or links).pop()
        real = os.path.realpath(path)
        if real in seen:
            continue
        seen.add(real)
        try:
            entries = sorted(os.scandir(path), key=lambda entry: entry.name, reverse=True)
        except PermissionError:
            left_out[f"folder that can't be read ({path})"] += 1
            continue
        except OSError as error:                                             # the file system's fault, not the folder's
            raise OSError(f"can't read {path}: {error.strerror}") from None
        if below and any(entry.name in WRITTEN and is_ours(entry.path) for entry in entries):
            left_out[OURS] += 1
            continue
        for entry in entries:
            name, ending, link = below + entry.name, os.path.splitext(entry.name)[1].lower(), entry.is_symlink()
            if entry.name.startswith(".") or entry.name in NO_DATA:
                left_out[OURS] += 1
            elif ask(entry, entry.is_dir):
                (links if link else todo).append((entry.path, name + "/", linked or link))
            elif ending not in endings:
                left_out[ending or "without an ending"] += 1
            else:
                bar.update()
                info = ask(entry, entry.stat)
                key = os.path.realpath(entry.path) if link and info else os.path.join(real, entry.name)
                if info and info.st_nlink > 1:                               # else it has no other name
                    key = info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns
                rows.append((linked or link, File(name, info.st_size if info else 0, key)))
    bar.close()
    files = {file.key: file for _, file in sorted(rows, reverse=True)}       # of several names the first, links last
    left_out["other names of the same file"] = len(rows) - len(files)
    files = sorted(files.values(), key=lambda file: file.name.split("/"))
    dq.require(files, f"no images below {root}; other files: {reasons(left_out) or 'none'}")
    parents = {posixpath.dirname(file.name) for file in files}
    inner = posixpath.commonpath(parents)
    if inner and inner not in parents:
        root, files = os.path.join(root, inner), [file._replace(name=file.name[len(inner) + 1:]) for file in files]
    return Found(root, files, left_out)


def is_ours(path):
    """Did this project write the file, whatever its name?"""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        head = file.read(4096)
        return bool(SIGNS.search(head)) or (not head and path.endswith(".jsonl"))


def progress(title, total=None):
    """A progress bar for what may take long: it appears after some seconds, also in the log of a batch system."""
    return tqdm(desc=title, total=total, unit=" images", leave=False, delay=5, disable=dq.rank_world()[0] > 0,
                mininterval=0.1 if sys.stderr.isatty() else 30)


def decode_all(found, size):
    """Decode all images once, on all cores, if they fit into memory at this size -> the files that can be decoded,
    {name: strip as of `load_strip`}. If they do not fit: all files, {}; each is then decoded whenever it is needed."""
    root, files, left_out = found
    ratios = [min(max(side) / min(side), LONGEST) for side in image_sizes(root, [file.name for file in files])]
    if 3 * size ** 2 * np.mean(ratios or [1]) * len(files) > MEMORY:
        return files, {}
    (rank, world), strips, errors = dq.rank_world(), {}, []
    cores = len(getattr(os, "sched_getaffinity", lambda pid: range(os.cpu_count() or 1))(0))

    def read(file):
        try:
            return file.name, load_strip(os.path.join(root, file.name), size)
        except dq.UserError as error:
            return file.name, error
    with (warnings.catch_warnings(), progress("reading images", len(files)) as bar,
          ThreadPoolExecutor(max(1, min(16, cores // world))) as pool):      # decoders run outside of Python's lock
        warnings.simplefilter("ignore")                                      # the threads share one list of filters
        for start in range(0, len(files), 4096):
            for name, strip in pool.map(read, files[start:start + 4096]):
                bar.update()
                if isinstance(strip, dq.UserError):
                    errors.append(strip)
                else:
                    strips[name] = strip
    for error in errors[:NAMED if rank == 0 else 0]:
        print(printable(f"warning: skipped {error}"), file=sys.stderr)
    left_out["broken"] = len(errors)
    dq.require(strips, f"none of the {len(files)} images below {root} can be decoded")
    return [file for file in files if file.name in strips], strips


def split(files):
    """(name, label, size) -> those to train on; the validation set: one in 20, by a hash of the name."""
    first = {label: name for name, label, _ in reversed(files)}              # for training, so that no class is lost
    others = [file for file in files if file[0] != first[file[1]]]
    held = [file for file in others if zlib.crc32(file[0].encode(errors="surrogateescape")) % 20 == 0]
    held = set(held or others[:1])                                           # so few files that chance left none
    return [file for file in files if file not in held], [file for file in files if file in held] or files[:1]


class Files(Sequence):
    """Pairs (name, label) in arrays. To read a Python object changes its reference count, so that each loader process
    would soon have a copy of its own."""

    def __init__(self, files):
        names, labels, *sizes = zip(*files)
        self.names = np.array([name.encode(errors="surrogateescape") for name in names])
        self.labels, self.sizes = np.array(labels), np.array(sizes)[0] if sizes else np.zeros(len(names), int)

    def __len__(self):
        return len(self.names)

    def __getitem__(self, k):
        return self.names[k].decode(errors="surrogateescape"), int(self.labels[k])


class ImageFolder(Dataset):
    """Images of a folder. files: (name below root, label) or (name, label, size); label -1: without a class.

    self[i] -> image (3, S, S) in [-1, 1], label. An image that can't be decoded is black and has the label BROKEN.

    augment: random crops and flips, and another image in place of one that can't be decoded. (seed, i) determines all
    three, so a resumed run sees the same images. i may exceed the length: i // len(self) is the epoch.
    kept: {name: strip} of all images, as of `decode_all`; without it each image is decoded whenever it is needed.
    """

    def __init__(self, root, files, classes, size, augment=False, seed=0, left_out=None, flip=True, kept=None):
        self.files, self.broken = Files(files), torch.zeros(len(files), dtype=torch.bool)
        self.root, self.classes, self.left_out, self.size = root, tuple(classes), left_out or Counter(), size
        self.augment, self.seed, self.flip, self.kept = augment, seed, flip, kept

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        pixels, label = self.pixels(i)
        return to_tensor(pixels), label

    def __getitems__(self, numbers):
        """For `Loader`, which converts a batch of bytes at once."""
        return [self.pixels(i) for i in numbers]

    def pixels(self, i):
        """(S, S, 3), uint8, and the label."""
        pair, n = self.read(i), len(self)
        if pair is None and self.augment:
            others = dq.numpy_rng(self.seed, i, 1).permutation(n).tolist()
            pair = next(filter(None, (self.read(i - i % n + k) for k in others)), None)
            dq.require(pair, f"none of these {n} images below {self.root} can be decoded")
        return pair or (np.zeros((self.size, self.size, 3), np.uint8), BROKEN)

    def read(self, i):
        """As `pixels`; None if image i can't be decoded, with one warning."""
        k = i % len(self)
        if self.broken[k]:
            return None
        name, label = self.files[k]
        try:
            strip = self.kept[name] if self.kept else load_strip(os.path.join(self.root, name), self.size)
            return crop(strip, self.size, dq.numpy_rng(self.seed, i) if self.augment else None, self.flip), label
        except dq.UserError as error:
            self.broken[k] = True
            print(printable(f"warning: skipped {error}"), file=sys.stderr)


class Loader(DataLoader):
    """Its processes send arrays through a pipe: for tensors they would need shared memory, and sockets whose names must
    not be long. So a loader that starts can deliver."""

    def __iter__(self):
        try:
            for batch in map(default_convert, super().__iter__()):
                images = isinstance(batch, list) and batch[0].dtype == torch.uint8
                yield [to_tensor(batch[0]), *batch[1:]] if images else batch
        except RuntimeError as error:
            dq.require("timed out" not in str(error), f"no images from --workers for {self.timeout} seconds; "
                                                      "--workers 0 loads them in the main process")
            raise

    @staticmethod
    def collate(samples):
        batch = default_collate(samples)
        return [x.numpy() for x in batch] if isinstance(batch, list) else batch.numpy()


def loader(data, workers, **how):
    """Batches (x, label). how: as for DataLoader"""
    if workers and isinstance(data, ImageFolder):
        data.broken.share_memory_()                                          # each process knows what others have met
        if data.kept and multiprocessing.get_start_method() != "fork":
            workers = 0                                                      # each would get a copy of all images
    return Loader(data, num_workers=workers, worker_init_fn=leave_signals_to_the_parent, collate_fn=Loader.collate,
                  generator=torch.Generator(), timeout=600 if workers else 0, **how)  # draws none of the run's numbers


def leave_signals_to_the_parent(worker):
    """A signal that is sent to all processes of a run reaches the loaders too. The parent still needs them, so they
    ignore the first one, and the second one takes effect."""
    signal.set_wakeup_fd(-1)                                                 # else the parent hears a loader's signals
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:                       # as under nohup
            signal.signal(number, lambda number, frame: signal.signal(number, signal.SIG_DFL))


def stream(data, batch_size, seed, start=0, workers=0, accumulate=1):
    """Endless batches in the order of `shuffled_indices`; of each, this rank's part of every accumulation step."""
    rank, world = dq.rank_world()
    own = np.arange(batch_size).reshape(accumulate, world, -1)[:, rank].flatten()
    batches = ([batch[i] for i in own] for batch in shuffled_indices(len(data), batch_size, seed, start))
    return iter(loader(data, workers, batch_sampler=batches))


def few(parts, n):
    return ", ".join(parts[:n]) + (", ..." if len(parts) > n else "")


def reasons(counts):
    """A Counter of skipped files as text, endings last."""
    found = sorted(counts.items(), key=lambda item: (item[0][0] == ".", -item[1], item[0]))
    return few([f"{n:,} {what}" for what, n in found if n], 8)


def describe(train, val):
    """How --data was understood, in one line, and a note if the folders look like splits."""
    text = f"{len(train):,} training and {len(val):,} validation images, "
    text += f"{len(train.classes):,} classes: {few(train.classes, 6)}" if train.classes else "no classes"
    if isinstance(train, ToyShapes):
        return f"data: the built-in toy shapes, {text}"
    if len(val) == 1 and val.root == train.root and val.files[0] in train.files:
        text = text.replace("images,", "images (the same: there is no other),", 1)
    text = f"data: {train.root}, {text}; skipped: {reasons(train.left_out) or 'nothing'}"
    if not train.kept:
        text += "; too many to be checked now, so broken files are skipped when they are met"
    if train.classes and {name.lower() for name in train.classes} <= SPLITS:
        first = next((name for name in train.classes if name.lower().startswith("train")), train.classes[0])
        text += (f"\nnote: these classes are named like splits ({', '.join(train.classes)}); to train on one of them "
                 f"alone: --data {os.path.join(train.root, first)}")
    return text


def identity(data):
    """Fingerprint of a data set, which is compared on --resume."""
    if isinstance(data, ToyShapes):
        return "the toy shapes"
    files = "\n".join(f"{name} {size}" for (name, _), size in zip(data.files, data.files.sizes))
    checksum = zlib.crc32(files.encode(errors="surrogateescape"))
    return f"{len(data)} files (checksum of their names and sizes {checksum:08x})"


def image_sizes(root, names, n=64):
    """(width, height) of up to n of the images, spread over the list; only their headers are read."""
    sizes = []
    for k in np.linspace(0, len(names) - 1, min(n, len(names))).astype(int):
        path = os.path.join(root, names[k])
        with contextlib.suppress(Exception), warnings.catch_warnings():      # broken files, and huge ones
            warnings.simplefilter("ignore")
            with Image.open(path if os.path.isfile(path) else os.devnull) as image:  # opening a pipe would block
                sizes.append(image.size)
    return sizes


def image_side(data, n=64):
    """Median short side, in pixels, of up to n images, or 0. data: a folder, a result of find_images, or a data set"""
    data = find_images(data) if isinstance(data, (str, os.PathLike)) else data
    sizes = [(data.size,)] if isinstance(data, ToyShapes) else image_sizes(data.root, [f[0] for f in data.files], n)
    return int(np.median([min(size) for size in sizes] or [0]))


# ------------------------------------------------------------------------------------------------
# One file


BYTES = 2 ** 29                          # a larger file is not read: 6 bytes for each of the pixels that Pillow allows
LONGEST = 32                             # of a longer panorama, this many squares in its middle
# Pillow refuses a PNG with much text beside its pixels
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2 ** 28


def load_image(path, size, rng=None, flip=True):
    """One file -> (3, S, S) in [-1, 1]: its centre square or, with rng, a random one, which `flip` mirrors with
    probability 1/2."""
    return to_tensor(crop(load_strip(path, size), size, rng, flip))


def load_strip(path, size):
    """One file -> uint8 (h, w, 3): all that crops are cut from. Its short side has `size` pixels (antialiased)."""
    image = open_image(path, size)
    short, long = min(image.size), min(max(image.size) * size // min(image.size), LONGEST * size)
    out = (long, size) if image.width >= image.height else (size, long)
    w, h = (side * short / size for side in out)                             # the ratio of the sides stays as it is
    left, top = (image.width - w) / 2, (image.height - h) / 2
    return np.array(image.resize(out, Image.Resampling.BICUBIC, box=(left, top, left + w, top + h)))


def crop(strip, size, rng=None, flip=True):
    """(h, w, 3) -> (S, S, 3): the square in the middle, or a random one."""
    where = (0.5, 0.5) if rng is None else rng.random(2)
    left, top = (int(at * (side - size + 1)) for at, side in zip(where, strip.shape[1::-1]))
    square = strip[top:top + size, left:left + size]
    return np.ascontiguousarray(square[:, ::-1] if rng is not None and flip and rng.random() < 0.5 else square)


def to_tensor(pixels):
    """uint8 (..., S, S, 3) -> (..., 3, S, S) in [-1, 1]."""
    pixels = pixels if torch.is_tensor(pixels) else torch.from_numpy(pixels)
    return pixels.movedim(-1, -3).contiguous().float() / 127.5 - 1


def open_image(path, size=None):
    """One file -> Pillow image, RGB and upright; of a JPEG a smaller version may be decoded, whose sides are still at
    least twice `size`. UserError if the pixels can't be read, for any reason; metadata may be corrupt."""
    info = patiently(os.stat, path)
    dq.require(stat.S_ISREG(info.st_mode), f"{path}: no such file")          # reading a pipe would block
    dq.require(info.st_size <= BYTES, f"{path}: has {info.st_size:,} bytes, more than {BYTES:,}")
    data = patiently(lambda path: Path(path).read_bytes(), path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                most = Image.MAX_IMAGE_PIXELS or np.inf
                dq.require(image.width * image.height <= most, f"{image.width} x {image.height} pixels are too many")
                if size:
                    image.draft(None, (2 * size, 2 * size))
                packing = image.tile[0][3] if image.tile else ""             # load() forgets it
                image.load()
                with contextlib.suppress(Exception):
                    ImageOps.exif_transpose(image, in_place=True)            # turns the pixels, then corrects the EXIF
                return to_rgb(image, packing)
    except Exception as error:                                               # decoders raise nearly everything
        raise dq.UserError(f"{path}: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from None


# errors that concern one file; all others are the system's, like a file server that does not answer
OF_A_FILE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG,
             errno.EINVAL}


def patiently(read, path):
    """read(path). UserError if the file is missing, must not be read or does not fit into memory. Any other error says
    nothing about the file: two more attempts follow after a pause, then OSError."""
    for seconds in (1, 5, 0):
        try:
            return read(path)
        except MemoryError:
            raise dq.UserError(f"{path}: not enough memory for this file") from None
        except OSError as error:
            reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror or type(error).__name__
            dq.require(error.errno not in OF_A_FILE, f"{path}: {reason}")
            time.sleep(seconds)
    raise OSError(f"can't read {path}: {reason}; once this is fixed, --resume continues")


@functools.lru_cache(16)
def to_srgb(profile, mode):
    """-> a function that converts images of this mode (L, RGB or CMYK) from an ICC profile (bytes) to sRGB; None if the
    colours of the profile are those of sRGB already, or the profile can't be used."""
    with contextlib.suppress(Exception):
        described = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(described, ImageCms.createProfile("sRGB"), mode, "RGB")
        levels = np.arange(0, 256, 15, dtype=np.uint8)                       # what becomes of a few colours?
        colours = Image.merge("RGB", [Image.fromarray(each.reshape(-1, 18)) for each in np.meshgrid(*[levels] * 3)])
        probe = Image.fromarray(levels[None]) if mode == "L" else colours
        change = ImageChops.difference(ImageCms.applyTransform(probe.convert(mode), transform), probe.convert("RGB"))
        if mode == "CMYK" or np.max(change) > 2:
            return lambda image: ImageCms.applyTransform(image, transform)


def to_rgb(image, packing=""):
    """A Pillow image of any mode -> RGB. In this order: all depths to 8 bits; transparency over white; colours to sRGB.
    packing: Pillow's name for the layout of the pixels in the file, as "RGB;16B"."""
    key, profile = image.info.get("transparency"), image.info.get("icc_profile")  # key: a transparent colour
    if image.mode.startswith("I") or image.mode == "F":
        opaque = np.uint8(255) * (np.asarray(image) != key)
        image = Image.fromarray(np.dstack([grey_8_bits(image), opaque]))     # LA
    elif key is not None and packing in ("L;2", "L;4"):                      # Pillow scales the pixels, not the key
        image.info["transparency"] = key * {"L;2": 85, "L;4": 17}[packing]
    elif key is not None and packing == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in key)
    elif image.mode in ("La", "RGBa"):                                       # premultiplied
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    grey = image.mode in ("1", "L", "LA") or packing == "LA;16B"             # which Pillow reads as RGBA
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if grey or image.mode not in ("RGB", "CMYK"):
        image = image.convert("L" if grey else "RGB")
    if convert := profile and to_srgb(profile, image.mode):
        return convert(image)
    image = image.convert("RGB")
    convert = profile and grey and to_srgb(profile, "RGB")                   # greys with a profile of colours
    return convert(image) if convert else image


def grey_8_bits(image):
    """A Pillow image with grey levels of more than 8 bits -> (H, W), uint8, by the depth that the file declares.
    Floats and signed integers declare none. Their white level is the first of 1, 255 and 65535 that is at least half
    of the 90th percentile of the positive pixels, so neither overshoot nor a few outliers make the rest black."""
    x, tags = np.asarray(image).astype(np.float32), getattr(image, "tag_v2", {})  # of TIFF; others use 16 bits
    bits, kind = tags.get(258, (16,))[0], tags.get(339, (1,))[0]             # kind 1: unsigned, 2: signed, 3: float
    white = 2.0 ** (bits - (kind == 2)) - 1
    if image.mode != "F" and kind == 1:
        x = x % 2.0 ** bits                                                  # Pillow reads 32 bits as signed
    else:
        bright = np.quantile(np.append(x[np.isfinite(x) & (x > 0)], 0), 0.9)
        white = min([white] + [scale for scale in (1, 255, 65535) if bright <= 2 * scale])
    x = np.nan_to_num(x / white).clip(0, 1)                                  # NaN becomes black
    if tags.get(262) == 0:                                                   # zero is white; Pillow inverts 8 bits
        x = 1 - x
    return (x * 255).round().astype(np.uint8)
