"""Reading images: the built-in toy shapes, folders of image files, and one file of any kind as a tensor."""
import contextlib
import errno
import functools
import io
import itertools
import os
import posixpath
import stat
import textwrap
import time
import unicodedata
import warnings
import zlib
from collections import Counter, deque, namedtuple
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageChops, ImageCms, ImageOps, PngImagePlugin
from torch.utils.data import BatchSampler, Dataset
from tqdm import tqdm

import dq
from common import first_line, say, shuffled_indices

MEMORY = 2e9                             # bytes of images that each data set caches


class Kept(dict):
    """A cache of up to MEMORY bytes for the images that a function returns; None where it raises UserError."""

    def __init__(self, compute):
        self.compute, self.room = compute, MEMORY

    def __missing__(self, key):
        try:
            image = self.compute(key)
        except dq.UserError as error:
            image = say(f"warning: skipped {error}")                         # None
        size = getattr(image, "nbytes", 0)
        if size <= self.room:
            self[key] = image
            self.room -= size
        return image


# ---- The toy shapes ----------------------------------------------------------------------------


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
        self.images = Kept(self.paint)

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
        return self.images[i % self.n].clone(), i % self.n % 4

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


# ---- A folder of images ------------------------------------------------------------------------

BROKEN = -2                              # label of an image that can't be decoded
# names that systems hide, beside those with a leading dot; and the figures that this project draws, beside these files
NO_DATA = {"__MACOSX", "@eaDir", "@__thumb", "@Recycle", "#recycle", "#snapshot", "$RECYCLE.BIN", "lost+found",
           "System Volume Information"}
FIGURES, BESIDE = {"vae.png", "transformer.png", "samples.png"}, {"vae.pt", "transformer.pt", ".samples.png.lock"}

Found = namedtuple("Found", "root files left_out")       # left_out: {reason: number of files}
File = namedtuple("File", "name size key")               # like "cat/1.png"; bytes; the same for two names of one file


def open_data(folder, size, augment=False, seed=0, skip=None, flip=True, held_out=None, found=None):
    """The images of a folder, or the toy shapes if folder is None -> training set, validation set.

    If there are two or more sub-folders, those of the first level are the classes. The validation set is one file in
    20, or all images of the folder held_out; these are never trained on, even if held_out is inside `folder`.

    augment: random crops of the training images and, with flip, horizontal flips. skip: a folder to leave out (--out).
    found: the result of find_images(folder, [skip, held_out]), if it is there already.
    """
    if folder is None:
        dq.require(held_out is None, "--held-out is for the images of --data")
        return ToyShapes(size, seed=seed), ToyShapes(size, n=512, seed=seed + 1_000_003)
    found = found or find_images(folder, [skip, held_out])
    other = Found(found.root, [], {}) if held_out is None else find_images(held_out, [skip])
    taken = {file.key for file in other.files}
    files = [file for file in found.files if file.key not in taken]
    dq.require(files, f"all images below {folder} are also below --held-out {held_out}; none is left to train on")
    found.left_out["also below --held-out"] = len(found.files) - len(files)

    def class_of(file):                                                      # systems write accents in different ways
        return unicodedata.normalize("NFC", file.name.split("/")[0])

    def labelled(files):
        return [(file.name, label.get(class_of(file), -1), file.size) for file in files]

    strips = Kept(functools.partial(load_strip, size=size))
    files = decode_all(found.root, files, found.left_out, strips, size)
    classes = sorted({class_of(file) for file in files if "/" in file.name})
    label = {name: i for i, name in enumerate(classes)} if len(classes) > 1 else {}
    train, val = split(labelled(files))
    if other.files:
        train, val = train + val, labelled(decode_all(*other, strips, size))
        strange = next((name for name, number, _ in val if label and number < 0), None)
        dq.require(not strange, f"{strange} below {other.root} has no matching class in {found.root}")
    return (ImageFolder(found.root, train, label, size, augment, seed, found.left_out, flip, strips),
            ImageFolder(other.root, val, label, size, strips=strips))


def find_images(root, skip=()):
    """All files below a folder that Pillow may be able to read, sorted by name -> Found.

    Symbolic links are followed, after everything else. Each folder is visited once, and a file with several names
    counts once. skip: folders to leave out; None in it is ignored. If all images are in the sub-folders of one
    sub-folder, as in many archives, that one becomes the root.
    """
    dq.require(not os.path.isfile(root), f"{root} is a file; a folder of images is needed (unpack an archive first)")
    dq.require(os.path.isdir(root), f"no such folder: {root}")
    endings = {ending for ending, kind in Image.registered_extensions().items()  # FITS needs a scale, others a program
               if kind in Image.OPEN and kind not in {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "MPEG", "WMF"}} | {".mpo"}
    seen = {os.path.realpath(folder) for folder in skip if folder} - {os.path.realpath(root)}
    rows, left_out, bar = [], Counter(), progress(f"searching {root}")
    todo, links = [(Path(os.path.realpath(root)), "")], []                   # entries, and their names below root
    while todo or links:
        linked = not todo                                                    # it is a link, or a link leads to it
        entry, name = (todo or links).pop()
        path, real = os.path.join(root, name), os.path.realpath(entry) if linked else os.fspath(entry)
        try:
            if patiently(path, entry.is_dir):
                entries = [] if real in seen else patiently(path, lambda: list(os.scandir(real)))
                seen.add(real)
                ours = name and any(each.name == "samples.json" and holds_samples(each) for each in entries)
                hidden = NO_DATA | FIGURES if BESIDE & {each.name for each in entries} else NO_DATA
                for each in entries:
                    if ours or each.name.startswith(".") or each.name in hidden:
                        left_out["hidden, of the system or of this project"] += 1
                    else:
                        (links if linked or each.is_symlink() else todo).append((each, posixpath.join(name, each.name)))
            elif (ending := os.path.splitext(name)[1].lower()) not in endings:
                left_out[ending or "without an ending"] += 1
            else:
                info = patiently(path, entry.stat)
                dq.require(stat.S_ISREG(info.st_mode), f"{path}: no such file")  # reading a pipe would block
                key = (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns) if info.st_nlink > 1 else real
                rows.append((linked, File(name, info.st_size, key)))         # with one link, the file has one name
                bar.update()
        except dq.UserError as error:                                        # no permission, or a link to nothing
            left_out["that can't be opened"] += 1
            say(f"warning: skipped {error}")
    bar.close()
    dq.require(rows, f"no images below {root}; other files: {', '.join(left_out) or 'none'}")
    first = {file.key: file for _, file in sorted(rows, reverse=True)}       # of several names the first, links last
    left_out["other names of the same file"] = len(rows) - len(first)
    files = sorted(first.values(), key=lambda file: file.name.split("/"))
    parents = {posixpath.dirname(file.name) for file in files}
    inner = posixpath.commonpath(parents)
    if inner and inner not in parents:
        root, files = os.path.join(root, inner), [file._replace(name=file.name[len(inner) + 1:]) for file in files]
    return Found(os.fspath(root), files, left_out)


def holds_samples(path):
    """Is this the file that sample.py writes beside its samples? Other programs use the name, too."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return b'"grain_map":' in file.read(2 ** 20)                         # long paths can precede it


def progress(title, items=None, total=None):
    """A progress bar for what may take long: it appears after some seconds, also in the log of a batch system."""
    return tqdm(items, title, total, unit=" images", leave=False, delay=5, mininterval=5, disable=dq.rank_world()[0])


def decode_all(root, files, left_out, strips, size):
    """Decode all images, on all cores, if they fit into memory. -> the files, without those known to be broken"""
    if 3 * size ** 2 * len(files) > MEMORY:
        return files
    world = dq.rank_world()[1]          # torchrun leaves each process one thread, but Pillow's decoders release the GIL
    with ThreadPool(torch.get_num_threads() if world == 1 else max(1, os.cpu_count() // world)) as pool:
        decoded = pool.imap(lambda file: strips[os.path.join(root, file.name)] is not None, files)
        sound = list(itertools.compress(files, progress("reading images", decoded, len(files))))
    left_out["broken"] = len(files) - len(sound)
    dq.require(sound, f"none of the {len(files)} images below {root} can be decoded")
    return sound


def split(files):
    """(name, label, size) -> those to train on; the validation set: one in 20, by a hash of the name."""
    first = set({file[1]: file for file in reversed(files)}.values())        # for training, so that no class is lost
    others = [file for file in files if file not in first]
    held = {file for file in others if zlib.crc32(os.fsencode(file[0])) % 20 == 0} or {*others[:1]}
    return [file for file in files if file not in held], [file for file in files if file in held] or files[:1]


class ImageFolder(Dataset):
    """Images of a folder. files: (name below root, label) or (name, label, size); label -1: without a class.

    self[i] -> image (3, S, S) in [-1, 1], label. An image that can't be decoded is black and has the label BROKEN.

    augment: random crops and flips, and another image in place of one that can't be decoded. (seed, i) determines all
    three, so a resumed run sees the same images. i may exceed the length: i // len(self) is the epoch.
    """

    def __init__(self, root, files, classes, size, augment=False, seed=0, left_out=None, flip=True, strips=None):
        names, labels, *sizes = zip(*files)
        # arrays, because processes that share a Python object copy it when they count their references to it
        self.names, self.labels = np.array([os.fsencode(name) for name in names]), np.array(labels)
        self.sizes, self.strips = np.array(sizes).flatten(), strips or Kept(functools.partial(load_strip, size=size))
        self.root, self.classes, self.left_out, self.size = root, tuple(classes), left_out or Counter(), size
        self.augment, self.seed, self.flip = augment, seed, flip

    def __len__(self):
        return len(self.names)

    def strip(self, k):
        """Image k as returned by `load_strip`, or None if it can't be decoded."""
        return self.strips[os.path.join(self.root, os.fsdecode(self.names[k]))]

    def __getitem__(self, i):
        n = len(self)
        strip = self.strip(i % n)
        if strip is None and self.augment:
            others = dq.numpy_rng(self.seed, i, 1).permutation(n).tolist()
            other = next((k for k in others if self.strip(k) is not None), None)
            dq.require(other is not None, f"none of these {n} images below {self.root} can be decoded")
            return self[i - i % n + other]
        if strip is None:
            return -torch.ones(3, self.size, self.size), BROKEN
        rng = dq.numpy_rng(self.seed, i) if self.augment else None
        return crop(strip, self.size, rng, self.flip), int(self.labels[i % n])


def loader(data, workers, batches=None, **how):
    """Yield images (B, 3, S, S) and labels (B,) for each list of indices in `batches`, or in BatchSampler(**how).
    `workers` threads load the next batches."""
    batches = batches or BatchSampler(drop_last=False, **how)
    with ThreadPool(max(1, workers)) as pool:
        results = deque()
        for batch in itertools.chain(batches, [[]] * workers):
            results.append(pool.map_async(data.__getitem__, batch))
            if len(results) > workers:
                x, label = zip(*results.popleft().get())
                yield torch.stack(x), torch.tensor(label)


def stream(data, batch_size, seed, start=0, workers=0, accumulate=1):
    """Endless batches in the order of `shuffled_indices`; of each, this rank's part of every accumulation step."""
    rank, world = dq.rank_world()
    own = np.arange(batch_size).reshape(accumulate, world, -1)[:, rank].flatten()
    batches = shuffled_indices(len(data), batch_size, seed, start)
    return loader(data, workers, ([batch[i] for i in own] for batch in batches))


def describe(train, val):
    """How --data was understood, in one line, and a note if the folders look like splits."""
    classes = textwrap.shorten(", ".join(train.classes), 80, placeholder=" ...")
    classes = f"{len(train.classes):,} classes: {classes}" if classes else "no classes"
    if isinstance(train, ToyShapes):
        return f"data: the built-in toy shapes, {len(train):,} training and {len(val):,} validation images, {classes}"
    same = " (the same: there is no other)" if train.root == val.root and val.names[0] in train.names else ""
    skipped = ", ".join(f"{n:,} {reason}" for reason, n in train.left_out.most_common() if n)
    text = (f"data: {train.root}, {len(train):,} training and {len(val):,} validation images{same}, {classes}; "
            f"skipped: {textwrap.shorten(skipped or 'nothing', 200, placeholder=' ...')}")
    if train.classes and {name.lower() for name in train.classes} <= {"train", "val", "valid", "validation", "test"}:
        text += "\nnote: these classes are named like splits; to train on one of them, name its folder after --data"
    return text


def identity(data):
    """Fingerprint of a data set, which is compared on --resume."""
    if isinstance(data, ToyShapes):
        return "the toy shapes"
    files = b"\n".join(b"%s %d" % file for file in zip(data.names.tolist(), data.sizes.tolist()))
    return f"{len(data)} files (checksum of their names and sizes {zlib.crc32(files):08x})"


def image_side(found, n=64):
    """Median short side, in pixels, of up to n of the images that `find_images` found; 0 if no header can be read."""
    sides, files = [], [file for file in found.files if file.size <= BYTES]  # some decoders read all of the file
    for k in np.linspace(0, len(files) - 1, min(n, len(files))).astype(int):
        with contextlib.suppress(Exception), Image.open(os.path.join(found.root, files[k].name)) as image:
            sides.append(min(image.size))
    return int(np.median(sides or [0]))


# ---- One file ----------------------------------------------------------------------------------

BYTES = 2 ** 29                          # a larger file is not read: 6 bytes for each of the pixels that Pillow allows
LONGEST = 32                             # of a longer panorama, this many squares in its middle
# Pillow refuses a PNG with much text beside its pixels, and warns of corrupt metadata
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2 ** 28
warnings.filterwarnings("ignore", module="PIL")


def load_image(path, size, rng=None, flip=True):
    """One file -> (3, S, S) in [-1, 1], as returned by `crop`."""
    return crop(load_strip(path, size), size, rng, flip)


def load_strip(path, size):
    """One file -> uint8 (h, w, 3): all that crops are cut from. Its short side has `size` pixels (antialiased)."""
    image = open_image(path, size)
    sides = [min(side * size // min(image.size), LONGEST * size) for side in image.size]
    return np.array(ImageOps.fit(image, sides))                              # a longer one is cut, not squeezed


def crop(strip, size, rng=None, flip=True):
    """uint8 (h, w, 3) -> (3, S, S) in [-1, 1]: the centre square or, with rng, a random one. `flip` then flips it
    horizontally with probability 1/2."""
    where = (0.5, 0.5) if rng is None else rng.random(2)
    left, top = (int(at * (side - size + 1)) for at, side in zip(where, strip.shape[1::-1]))
    square = strip[top:top + size, left:left + size].transpose(2, 0, 1)      # 3, S, S
    square = square[:, :, ::-1] if rng is not None and flip and rng.random() < 0.5 else square
    return torch.from_numpy(square.astype(np.float32, order="C") / 127.5 - 1)


def open_image(path, size=2 ** 30):
    """One file -> Pillow image, RGB and upright; of a JPEG a smaller version may be decoded, whose sides are still at
    least twice `size`. UserError if the pixels can't be read, for any reason; metadata may be corrupt."""
    info = patiently(path, os.stat, path)
    dq.require(stat.S_ISREG(info.st_mode) and info.st_size <= BYTES, f"{path}: not a file of at most {BYTES:,} bytes")
    data = patiently(path, Path(path).read_bytes)
    try:
        with Image.open(io.BytesIO(data)) as image:
            dq.require(np.prod(image.size) <= (Image.MAX_IMAGE_PIXELS or np.inf), f"too many pixels: {image.size}")
            image.draft(None, (2 * size, 2 * size))
            codec, *_, packing = image.tile[0] if image.tile else ("", "")   # load() forgets it
            dq.require(codec != "libtiff" or packing[0][-2:] not in ("BS", "BF"), "Pillow would swap its bytes")
            image.load()
            with contextlib.suppress(Exception):
                ImageOps.exif_transpose(image, in_place=True)                # turns the pixels, then corrects the EXIF
            return to_rgb(image, packing)
    except Exception as error:                                               # decoders raise nearly everything
        raise dq.UserError(f"{path}: {first_line(error).split(' <_io.')[0]}") from None


# errors of one file; None: of memory. All others are the system's, as of a file server that does not answer
OF_A_FILE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.EINVAL, None}


def patiently(path, read, *args):
    """read(*args), which concerns this path. UserError if the file is missing, must not be read or does not fit into
    memory. Any other error says nothing about the file: two more attempts follow after a pause, then OSError."""
    for seconds in (1, 5, 0):
        try:
            return read(*args)
        except (OSError, MemoryError) as error:
            reason = getattr(error, "strerror", "not enough memory for this file")
            dq.require(getattr(error, "errno", None) not in OF_A_FILE, f"{path}: {reason}")
            time.sleep(seconds)
    raise OSError(f"can't read {path}: {reason}; once this is fixed, --resume continues")


@functools.lru_cache(16)
def to_srgb(profile, mode):
    """-> a function that converts images of this mode (L, RGB or CMYK) from an ICC profile (bytes) to sRGB; None if the
    colours of the profile are those of sRGB already, or the profile can't be used."""
    with contextlib.suppress(Exception):
        transform = ImageCms.buildTransform(io.BytesIO(profile), ImageCms.createProfile("sRGB"), mode, "RGB")
        levels = np.uint8(np.meshgrid(*[range(0, 256, 15)] * 3))             # what becomes of these colours?
        colours = Image.fromarray(levels.T.reshape(-1, 18, 3)).convert(mode)
        change = ImageChops.difference(ImageCms.applyTransform(colours, transform), colours.convert("RGB"))
        if np.max(change) > 2:
            return lambda image: ImageCms.applyTransform(image, transform)


def to_rgb(image, packing=""):
    """A Pillow image of any mode -> RGB. In this order: all depths to 8 bits; transparency over white; colours to sRGB.

    Floats and signed or 32-bit integers do not declare their white: it is the first of 1, 255, 65535 and the type's
    maximum that is at least half of the 90th percentile of the positive pixels, as outliers must not darken the rest.
    packing: Pillow's name for the layout of the pixels in the file, as "RGB;16B".
    """
    key, profile = image.info.get("transparency"), image.info.get("icc_profile")  # key: a transparent colour
    tags = getattr(image, "tag_v2", {})                                      # of TIFF; 262: what zero means
    bits, kind = tags.get(258, (16,))[0], tags.get(339, (1,))[0]             # kind 1: unsigned, 2: signed, 3: floats
    if image.mode[0] in "IF" or kind == 2:                                   # greys of more than 8 bits, or signed ones
        x, white = np.asarray(image), 2 ** (bits - (kind == 2)) - 1
        x = x.view({(8, 2): np.int8, (32, 1): np.uint32}.get((bits, kind), x.dtype))  # which Pillow does not know
        if image.mode == "F" or image.mode == "I" and image.format != "PPM":  # white is not declared
            bright = np.quantile(np.append(x[np.isfinite(x) & (x > 0)], 0), 0.9)
            white = next((scale for scale in (1, 255, 65535) if scale < white and bright <= 2 * scale), white)
        levels = np.nan_to_num(x / np.float32(white)).clip(0, 1) * 255       # NaN becomes black
        levels = 255 - levels if tags.get(262) == 0 else levels              # Pillow inverts 8 bits only
        image = Image.fromarray(np.dstack([np.uint8(levels.round()), np.uint8(255) * (x != key)]))  # LA
    elif key is not None and packing in ("L;2", "L;4"):                      # Pillow scales the pixels, not the key
        image.info["transparency"] = key * {"L;2": 85, "L;4": 17}[packing]
    elif key is not None and packing == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in key)
    grey = image.mode in ("1", "L", "LA", "La") or packing == "LA;16B"       # which Pillow reads as RGBA
    if image.has_transparency_data:
        image = image.convert(image.mode.upper()).convert("RGBA")            # La and RGBa are premultiplied
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    for mode in ("L", "RGB") if grey else ("CMYK" if image.mode == "CMYK" else "RGB",):
        if convert := to_srgb(profile, mode):                                # greys may have a profile of colours
            return convert(image.convert(mode))
    return image.convert("RGB")
