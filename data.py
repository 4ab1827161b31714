"""Reading images: the built-in toy shapes, a folder of image files, and one file of any kind as a tensor."""
import contextlib
import errno
import functools
import io
import os
import signal
import stat
import sys
import time
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

import dq
from common import SIGNALS, printable, shuffled_indices


# ------------------------------------------------------------------------------------------------
# The toy shapes


class ToyShapes(torch.utils.data.Dataset):
    """Textured shapes (much information) on smooth gradients (little), any size, made on the fly.

    self[i] -> image (3, S, S) in [-1, 1], label (the kind of shape, i % 4); both depend on (seed, i mod n) alone.
    detail_mask(i) tells where the information is, texture(i) which of `textures` it has.
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

    def __len__(self):
        return self.n

    def _draw(self, i):
        """All that is random in image i: signed distance to the shape's edge (S, S), negative inside; places from its
        middle, x and y; two colours behind it, from where to where; turn and kind of its texture, inks."""
        rng = dq.numpy_rng(self.seed, i % self.n)
        r = rng.choice([0.6, 0.675, 0.75])
        x, y = self.x - rng.integers(-2, 3) / 8, self.y - rng.integers(-2, 3) / 8  # on a grid: few codes say much
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
        image = (image.transpose(2, 0, 1) * 2 - 1).astype(np.float32)        # 3, S, S
        return torch.from_numpy(image), i % self.n % 4


# ------------------------------------------------------------------------------------------------
# A folder of images

FILES, BYTES = 5000, 5e7                 # up to here a folder is looked through at the start, which takes seconds
NAMED = 10                               # of broken files; more are counted
BROKEN = -2                              # in place of a label
NO_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}                 # Pillow needs other programs for these
# what systems hide in folders, beside names with a dot, and the pictures that this project draws
NO_DATA = {"__MACOSX", "@eaDir", "@__thumb", "@Recycle", "#recycle", "#snapshot", "$RECYCLE.BIN", "lost+found",
           "System Volume Information", "vae.png", "transformer.png", "samples.png"}
# a folder that holds one of these was written by this project
WRITTEN = {"vae.pt", "vae.jsonl", "codes.pt", "transformer.pt", "transformer.jsonl", "samples.png", "samples.json"}
OWN = "hidden, of the system or of this project"
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval"}


def open_data(folder, size, augment=False, seed=0, skip=None, flip=True, held_out=None):
    """The images of a folder, or the toy data where folder is None -> data to train on, held-out data.

    If there are two or more sub-folders, the first level of them are classes. augment: random crops of what is trained
    on and, with flip, mirror images. skip: a folder that is no data (--out). held_out: a folder, whose images are never
    trained on, though it lie in `folder`; None for a part.
    """
    if not folder:
        dq.require(not held_out, "--held-out is for the images of --data")
        return ToyShapes(size, seed=seed), ToyShapes(size, n=512, seed=seed + 1_000_003)
    names, left_out = sound_images(folder, [skip, held_out], size)
    classes = sorted({name.split("/")[0] for name in names if "/" in name})
    label = {name: i for i, name in enumerate(classes)} if len(classes) > 1 else {}

    def labelled(names):
        return [(name, label.get(name.split("/")[0], -1)) for name in names]
    train, val = split(labelled(names))
    if held_out:
        train, val = labelled(names), labelled(sound_images(held_out, [skip], size)[0])
        strange = next((name for name, number in val if label and number < 0), None)
        dq.require(not strange, f"{strange} below {held_out} is in no folder that is named like a class of {folder}")
    return (ImageFolder(folder, train, label, size, augment, seed, left_out, flip),
            ImageFolder(held_out or folder, val, label, size, left_out=left_out))


def find_images(root, skip):
    """Files below a folder that Pillow may read, as "cat/1.png", sorted, and a Counter of the rest by reason.
    Links to folders are followed, in each folder after what is no link; none is entered twice, so loops end. A file of
    several names counts once. skip: a list of folders that are not searched; None in it is none."""
    dq.require(os.path.isdir(root), f"no such folder: {root}")
    endings = {ending for ending, kind in Image.registered_extensions().items()
               if kind in Image.OPEN and kind not in NO_PICTURES} | {".mpo"}
    names, left_out, files_seen = [], Counter(), set()
    seen = {os.path.realpath(folder) for folder in skip if folder} - {os.path.realpath(root)}

    def links_last(names):
        return sorted(names, key=lambda name: (os.path.islink(os.path.join(path, name)), name))

    def unreadable(error):
        if not isinstance(error, PermissionError):                           # the system's: no verdict on the folder
            raise OSError(f"can't read {error.filename}: {error.strerror}")
        left_out[f"folder that can't be read ({error.filename})"] += 1
    for path, folders, files in os.walk(root, onerror=unreadable, followlinks=True):
        real, top = os.path.realpath(path), path == os.fspath(root)
        if real in seen or not (top or WRITTEN.isdisjoint(files)):
            left_out[OWN] += real not in seen
            folders.clear()
            continue
        seen.add(real)
        hidden = {name for name in folders + files if name.startswith(".") or name in NO_DATA}
        left_out[OWN] += len(hidden)
        folders[:] = links_last(set(folders) - hidden)
        below = "" if top else os.path.relpath(path, root).replace(os.sep, "/") + "/"
        for name in links_last(set(files) - hidden):
            ending = os.path.splitext(name)[1].lower()
            if ending not in endings:
                left_out[ending or "without an ending"] += 1
            elif (file := file_number(os.path.join(path, name))) in files_seen:
                left_out["other names of the same file"] += 1
            else:
                names.append(below + name)
                files_seen.add(file)
    dq.require(names, f"no images below {root}; other files: {reasons(left_out) or 'none'}")
    return sorted(names, key=lambda name: name.split("/")), left_out


def file_number(path):
    """What is the same for all names of a file."""
    with contextlib.suppress(dq.UserError):
        info = patiently(os.stat, path)
        return (info.st_dev, info.st_ino) if info.st_ino else path           # not every system has numbers
    return path


def sound_images(root, skip, size):
    """`find_images`; of a small folder without those that can't be decoded. Of a large one none is read at the start;
    what is broken is then found on the way, as in ImageFolder."""
    names, left_out = find_images(root, skip)
    paths = [os.path.join(root, name) for name in names]
    if len(paths) > FILES or sum(os.path.getsize(path) for path in paths if os.path.isfile(path)) > BYTES:
        return names, left_out
    data, quiet = ImageFolder(root, [(name, -1) for name in names], (), size), dq.rank_world()[0] > 0
    sound = [name for i, name in enumerate(names) if data.read(i, quiet)]
    left_out["broken"] = len(names) - len(sound)
    dq.require(sound, f"none of the {len(names)} images below {root} can be decoded")
    return sound, left_out


def split(files):
    """(name, label) pairs -> those to train on; held out: one in 20, by a hash of its name."""
    first = {label: name for name, label in reversed(files)}                 # to train on, so that no class is lost
    others = [(name, label) for name, label in files if name != first[label]]
    held = [pair for pair in others if zlib.crc32(pair[0].encode(errors="surrogateescape")) % 20 == 0]
    held = set(held or others[:1])                                           # so few files that chance left none
    return [pair for pair in files if pair not in held], [pair for pair in files if pair in held] or files[:1]


class ImageFolder(torch.utils.data.Dataset):
    """Images of a folder. files: pairs (name below root, label), the label -1 without a class.

    self[i] -> image (3, S, S) in [-1, 1], label. A file that can't be decoded is black, and its label BROKEN.
    augment, to train on them: crops and flips at random. i may run past the length: i // len(self) is then the epoch,
    which with the seed fixes the crop and flip. In place of a file that can't be decoded comes another of the epoch,
    drawn by (seed, i): none is favoured, and a resumed run sees the same.
    """

    def __init__(self, root, files, classes, size, augment=False, seed=0, left_out=None, flip=True):
        self.root, self.files, self.classes, self.left_out = root, files, tuple(classes), left_out or Counter()
        self.size, self.augment, self.seed, self.flip = size, augment, seed, flip
        self.broken = torch.zeros(len(files), dtype=torch.bool)

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        pair, n = self.read(i), len(self)
        if pair is None and self.augment:
            others = dq.numpy_rng(self.seed, i, 1).permutation(n).tolist()
            pair = next(filter(None, (self.read(i - i % n + k) for k in others)), None)
            dq.require(pair, f"none of these {n} images below {self.root} can be decoded")
        return pair or (torch.zeros(3, self.size, self.size), BROKEN)

    def read(self, i, quiet=False):
        """Image i and its label, or None if it can't be decoded, which is said once."""
        k = i % len(self)
        if self.broken[k]:
            return None
        name, label = self.files[k]
        try:
            rng = dq.numpy_rng(self.seed, i) if self.augment else None
            return load_image(os.path.join(self.root, name), self.size, rng, self.flip), label
        except dq.UserError as error:
            self.broken[k] = True
            count = int(self.broken.sum())
            if not quiet and (count <= NAMED or count & (count - 1) == 0):   # then 16, 32, 64, ...
                line = f"warning: left out {error if count <= NAMED else f'{count} by now'}"
                print(printable(line), file=sys.stderr)


def loader(data, workers, **how):
    if workers and isinstance(data, ImageFolder):
        data.broken.share_memory_()                                          # each learns what another has met
    return torch.utils.data.DataLoader(data, num_workers=workers, worker_init_fn=leave_signals_to_the_parent,
                                       pin_memory=torch.cuda.is_available(), **how)


def leave_signals_to_the_parent(worker):
    """What is sent to all processes of a run reaches loaders too, which the parent still needs: as for it, the second
    signal takes effect."""
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:                       # as nohup has it
            signal.signal(number, lambda number, frame: signal.signal(number, signal.SIG_DFL))


def stream(data, batch_size, seed, start=0, workers=0, accumulate=1):
    """Endless batches in the order of `deal`, of each this process's share of every part that is worked on at once."""
    rank, world = dq.rank_world()
    own = np.arange(batch_size).reshape(accumulate, world, -1)[:, rank].flatten()
    batches = ([batch[i] for i in own] for batch in shuffled_indices(len(data), batch_size, seed, start))
    return iter(loader(data, workers, batch_sampler=batches))


def few(parts, n):
    return ", ".join(parts[:n]) + (", ..." if len(parts) > n else "")


def reasons(counts):
    """A Counter of what is left out as text, endings last."""
    found = sorted(counts.items(), key=lambda item: (item[0][0] == ".", -item[1], item[0]))
    return few([f"{n} {what}" for what, n in found if n], 8)


def describe(train, val):
    """What was understood of --data, in one line that a trainer prints, and a hint where one is due."""
    text = f"{len(train)} images to train on, {len(val)} held out; "
    text += f"{len(train.classes)} classes: {few(train.classes, 6)}" if train.classes else "no classes"
    if isinstance(train, ToyShapes):
        return f"data: the built-in toy shapes, {text}"
    text = f"data: {train.root}, {text}; left out: {reasons(train.left_out) or 'nothing'}"
    if "broken" not in train.left_out:
        text += "; so much that broken files are left out as they are met"
    folders = [name.split("/")[:-1] for name, _ in train.files]
    top, inner = (sorted({path[depth] for path in folders if len(path) > depth}) for depth in (0, 1))
    if len(top) == 1 and len(inner) > 1 and all(len(path) > 1 for path in folders):
        text += (f"\nnote: all images are in one sub-folder, so there are no classes; for the folders in it as classes "
                 f"({few(inner, 6)}): --data {os.path.join(train.root, top[0])}")
    elif len(top) > 1 and {name.lower() for name in top} <= SPLITS:
        first = next((name for name in top if name.lower().startswith("train")), top[0])
        text += (f"\nnote: sub-folders are classes, and these are named like splits ({', '.join(top)}); "
                 f"for the images of one alone: --data {os.path.join(train.root, first)}")
    return text


def identity(data):
    """What a checkpoint notes of a data set, so that no run goes on with another one."""
    if isinstance(data, ToyShapes):
        return "the toy shapes"
    paths = [os.path.join(data.root, name) for name, _ in data.files]
    files = "\n".join(f"{name} {os.path.getsize(path) if os.path.isfile(path) else 0}"
                      for (name, _), path in zip(data.files, paths)).encode(errors="surrogateescape")
    return f"{len(data)} files (checksum of their names and sizes {zlib.crc32(files):08x})"


# ------------------------------------------------------------------------------------------------
# One file

# Pillow refuses a PNG with much text beside its pixels
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2 ** 28


def load_image(path, size, rng=None, flip=True):
    """One file -> (3, S, S) in [-1, 1]: its centre square or, with rng, a random one, with flip every other time
    mirrored."""
    where = (0.5, 0.5) if rng is None else tuple(rng.random(2))
    image = ImageOps.fit(open_image(path), (size, size), Image.Resampling.BICUBIC, centering=where)  # antialiased
    if rng is not None and flip and rng.random() < 0.5:
        image = ImageOps.mirror(image)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def open_image(path):
    """One file -> Pillow image, RGB and upright. UserError when its pixels can't be read, whatever the reason; what is
    written around them may be wrong in any way."""
    kind = patiently(os.stat, path).st_mode
    dq.require(stat.S_ISREG(kind), f"{path}: no such file")                  # who reads a pipe waits for ever
    data = patiently(lambda path: Path(path).read_bytes(), path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)   # more pixels than Pillow thinks sane
            with Image.open(io.BytesIO(data)) as image:
                packing = image.tile[0][3] if image.tile else ""             # load() forgets it
                image.load()
                with contextlib.suppress(Exception):
                    ImageOps.exif_transpose(image, in_place=True)            # turns the pixels, then mends the EXIF
                return to_rgb(image, packing)
    except Exception as error:                                               # decoders raise nearly everything
        raise dq.UserError(f"{path}: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from None


# what says something of a file; all other errors are of the system: a file server that is away, no memory
OF_A_FILE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG,
             errno.EINVAL}


def patiently(read, path):
    """read(path). UserError when there is no file that may be read; what is the system's fault is tried again after a
    moment, then OSError: it is no verdict on the file."""
    for seconds in (1, 5, 0):
        try:
            return read(path)
        except (OSError, MemoryError) as error:
            missing = isinstance(error, FileNotFoundError)
            reason = "no such file" if missing else getattr(error, "strerror", None) or type(error).__name__
            dq.require(getattr(error, "errno", None) not in OF_A_FILE, f"{path}: {reason}")
            time.sleep(seconds)
    raise OSError(f"can't read {path}: {reason}; when that is mended, --resume goes on")


@functools.lru_cache(16)
def to_srgb(profile, mode):
    """-> a function of images of this mode that takes their colours from an ICC profile (bytes) to sRGB; or None, where
    there is nothing to do, or the profile is of no use."""
    with contextlib.suppress(Exception):
        described = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        name = ImageCms.getProfileDescription(described).lower()
        if not name.startswith("srgb") or "linear" in name:
            out = "RGBA" if mode == "RGBA" else "RGB"
            transform = ImageCms.buildTransform(described, ImageCms.createProfile("sRGB"), mode, out)
            return lambda image: ImageCms.applyTransform(image, transform)


def to_rgb(image, packing=""):
    """A Pillow image of any mode -> RGB; transparency over white, all depths scaled to 8 bits.
    packing: Pillow's name for the layout of the pixels in the file, as "RGB;16B"."""
    key = image.info.get("transparency")                                     # a colour that stands for transparent
    if image.mode.startswith("I") or image.mode == "F":
        opaque = np.uint8(255) * (np.asarray(image) != key)
        image = Image.fromarray(np.dstack([grey_8_bits(image), opaque]))     # grey and alpha
    elif key is not None and packing in ("L;2", "L;4"):                      # Pillow scales the pixels, not the key
        image.info["transparency"] = key * {"L;2": 85, "L;4": 17}[packing]
    elif key is not None and packing == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in key)
    elif image.mode == "La":
        image = image.convert("LA")
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    if convert := to_srgb(image.info.get("icc_profile"), image.mode):
        image = convert(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def grey_8_bits(image):
    """A Pillow image of greys deeper than 8 bits -> (H, W), uint8, by the depth that its file declares.
    Floats and signed numbers declare none: their white is the first of 1, 255, 65535 that the bright pixels do not
    exceed by far, so neither overshoot nor a few extreme pixels make the others black."""
    x, tags = np.asarray(image).astype(np.float32), getattr(image, "tag_v2", {})  # of TIFF; others fill 16 bits
    bits, kind = tags.get(258, (16,))[0], tags.get(339, (1,))[0]             # kind 1: unsigned, 2: signed, 3: float
    white = 2.0 ** (bits - (kind == 2)) - 1
    if image.mode != "F" and kind == 1:
        x = x % 2.0 ** bits                                                  # Pillow takes 32 bits as signed
    else:
        bright = np.quantile(np.append(x[np.isfinite(x) & (x > 0)], 0), 0.9)
        white = min([white] + [scale for scale in (1, 255, 65535) if bright <= 2 * scale])
    x = np.nan_to_num(x / white).clip(0, 1)                                  # what is no number is black
    if tags.get(262) == 0:                                                   # white is zero; Pillow turns 8 bits itself
        x = 1 - x
    return (x * 255).round().astype(np.uint8)
