"""A DQ-Transformer checkpoint -> pictures.    python sample.py [CHECKPOINT] [--label circle]

Writes one grid of samples; with --save-dir one PNG an image too (the layout that FID tools read);
with --gif the first image as it grows from coarse to fine.

In front of that stands what all scripts share: images in, pictures out, the device, the end of a program.
"""
import argparse
import contextlib
import io
import json
import math
import os
import sys
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin
from tqdm import tqdm

import dq


# ------------------------------------------------------------------------------------------------
# Images in


LOOKED_AT, DECODED = 5000, 5e6           # files, bytes: how large a folder is looked through at the start
NAMED = 10                               # of broken files; more are counted
BROKEN = -2                              # in place of a label
NO_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}                 # Pillow needs other programs for these
# what systems hide in folders, beside names with a dot, and the pictures that this project draws
NO_DATA = {"__MACOSX", "@eaDir", "@__thumb", "@Recycle", "#recycle", "#snapshot", "$RECYCLE.BIN", "lost+found",
           "System Volume Information", "vae.png", "transformer.png", "samples.png"}
# a folder that holds one of these was written by this project
WRITTEN = {"vae.pt", "vae.jsonl", "transformer.pt", "transformer.jsonl", "samples.png", "samples.json"}
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval"}


def open_data(folder, size, augment=False, seed=0, skip=None):
    """The images of a folder, or the toy data where folder is None -> data to train on, held-out data.

    If there are two or more sub-folders, the first level of them are classes. One file in 20, chosen
    by a hash of its name, is held out, but every class keeps one to train on.
    augment: random crops and flips of what is trained on; skip: a folder that is no data (--out).
    """
    if not folder:
        return ToyShapes(size, seed=seed), ToyShapes(size, n=512, seed=seed + 1_000_003)
    dq.require(os.path.isdir(folder), f"no such folder: {folder}")
    names, left_out = find_images(folder, skip)
    dq.require(names, f"no images below {folder}; other files: {reasons(left_out) or 'none'}")
    names = without_broken(folder, names, left_out)
    top = [name.split("/")[0] if "/" in name else None for name in names]
    classes = sorted(set(top) - {None})
    label = {name: i for i, name in enumerate(classes)} if len(classes) > 1 else {}
    train, val = split([(name, label.get(first, -1)) for name, first in zip(names, top)])
    return (ImageFolder(folder, train, label, size, augment, seed, left_out),
            ImageFolder(folder, val, label, size, left_out=left_out))


def find_images(root, skip=None):
    """Files below a folder that Pillow may read, as "cat/1.png", sorted, and a Counter of the rest by reason.

    Links are followed, after what is no link, and no folder is entered twice, so loops end.
    """
    endings = {ending for ending, kind in Image.registered_extensions().items()
               if kind in Image.OPEN and kind not in NO_PICTURES} | {".mpo"}
    names, left_out, unreadable = [], Counter(), []
    folders, links, seen = [""], [], {os.path.realpath(skip or root)} - {os.path.realpath(root)}
    while folders or links:
        folder = (folders or links).pop()                                    # "" or "cat/"
        path = os.path.join(root, folder)
        if os.path.realpath(path) in seen:
            continue
        seen.add(os.path.realpath(path))
        try:
            entries = sorted(os.scandir(path), key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            unreadable.append(f"can't read the folder {path}: {error.strerror}")
            continue
        if folder and not WRITTEN.isdisjoint(entry.name for entry in entries):
            left_out["hidden, of the system or of this project"] += 1
            continue
        for entry in entries:
            ending = os.path.splitext(entry.name)[1].lower()
            if entry.name.startswith(".") or entry.name in NO_DATA:
                left_out["hidden, of the system or of this project"] += 1
            elif os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                (links if entry.is_symlink() else folders).append(f"{folder}{entry.name}/")
            elif ending in endings:
                names.append(folder + entry.name)
            else:
                left_out[ending or "without an ending"] += 1
    warn(unreadable)
    left_out["folders that can't be read"] += len(unreadable)
    return sorted(names, key=lambda name: name.split("/")), left_out


def without_broken(root, names, left_out):
    """The files without those that are seen to be broken before anything starts.

    Up to LOOKED_AT files are opened, and decoded if they have up to DECODED bytes in all: seconds at
    most. Of more files none is read; what is broken is then found on the way, as in ImageFolder.
    """
    if len(names) > LOOKED_AT:
        return names
    paths = [os.path.join(root, name) for name in names]
    header_only = sum(os.path.getsize(path) for path in paths if os.path.isfile(path)) > DECODED
    sound, broken = [], []
    for name, path in zip(names, paths):
        try:
            open_image(path, header_only)
            sound.append(name)
        except dq.UserError as error:
            broken.append(f"left out {error}")
    warn(broken)
    left_out["broken"] += len(broken)
    dq.require(sound, f"none of the {len(names)} images below {root} can be decoded")
    return sound


def warn(lines):
    """Some lines and the number of the rest, on standard error, from one process."""
    if dq.processes()[0] == 0:
        rest = [f"... and {len(lines) - NAMED} more, {len(lines)} in all"] if len(lines) > NAMED else []
        for line in lines[:NAMED] + rest:
            print(f"warning: {line}", file=sys.stderr)


def split(files):
    """(name, label) pairs -> those to train on, those held out."""
    hashed = {file for file in files if zlib.crc32(file[0].encode(errors="surrogateescape")) % 20 == 0}
    kept = {label for _, label in set(files) - hashed}                       # other classes would be held out whole
    val = [file for file in files if file in hashed and file[1] in kept]
    if not val:                                                              # so few files that chance left none
        size = Counter(label for _, label in files)
        val = [file for file in files if size[file[1]] > 1][:1]
    held = set(val)
    return [file for file in files if file not in held], val or files[:1]    # no class can spare one: it is in both


class ImageFolder(torch.utils.data.Dataset):
    """Images of a folder. files: pairs (name below root, label), the label -1 without a class.

    self[i] -> image (3, S, S) in [-1, 1], label. i may run past the length: i // len(self) is then the
    epoch, which with the seed fixes the random crop and flip. In place of a file that can't be decoded
    comes another of the epoch, drawn by (seed, i): none is favoured, and a resumed run sees the same.
    read(i) -> what self[i] gives, but None in place of such a file.
    """

    def __init__(self, root, files, classes, size, augment=False, seed=0, left_out=None):
        self.root, self.files, self.classes, self.left_out = root, files, tuple(classes), left_out or Counter()
        self.size, self.augment, self.seed = size, augment, seed
        self.broken = torch.zeros(len(files), dtype=torch.bool).share_memory_()  # by all processes that load images

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        pair, n = self.read(i), len(self)
        if pair is None:
            others = np.random.default_rng([self.seed, i, 1]).permutation(n).tolist()
            pair = next(filter(None, (self.read(i - i % n + k) for k in others)), None)
            dq.require(pair, f"none of these {n} images below {self.root} can be decoded")
        return pair

    def read(self, i):
        k = i % len(self)
        if self.broken[k]:
            return None
        name, label = self.files[k]
        rng = np.random.default_rng([self.seed, i]) if self.augment else None
        try:
            return load_image(os.path.join(self.root, name), self.size, rng), label
        except dq.UserError as error:
            self.broken[k] = True
            count = int(self.broken.sum())
            if count <= NAMED:
                print(f"warning: left out {error}", file=sys.stderr)
            elif count & (count - 1) == 0:                                   # 16, 32, 64, ...
                print(f"warning: left out {count} images by now", file=sys.stderr)
            return None


class Once(torch.utils.data.Dataset):
    """Each image of a data set once, and none in place of another: what can't be decoded is black, its label BROKEN."""

    def __init__(self, data):
        self.data, self.read = data, getattr(data, "read", data.__getitem__)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        return self.read(i % len(self)) or (torch.zeros(3, self.data.size, self.data.size), BROKEN)


def few(parts, n):
    return ", ".join(parts[:n]) + (", ..." if len(parts) > n else "")


def reasons(counts):
    """A Counter of what is left out as text, endings last."""
    parts = [f"{n} {what}" for what, n in sorted(counts.items(), key=lambda item: (item[0][0] == ".", -item[1])) if n]
    return few(parts, 8)


def describe(train, val):
    """What was understood of --data, in one line that a trainer prints, and a hint where one is due."""
    text = f"{len(train)} images to train on, {len(val)} held out; "
    text += f"{len(train.classes)} classes: {few(train.classes, 6)}" if train.classes else "no classes"
    if isinstance(train, ToyShapes):
        return f"data: the built-in toy shapes, {text}"
    text = f"data: {train.root}, {text}; left out: {reasons(train.left_out) or 'nothing'}"
    if len(train) + len(val) > LOOKED_AT:
        text += "; so many files that broken ones are left out as they are met"
    top = sorted({name.split("/")[0] for name, _ in train.files + val.files if "/" in name})
    if top and {name.lower() for name in top} <= SPLITS:
        first = next((name for name in top if name.lower().startswith("train")), top[0])
        text += (f"\nnote: sub-folders are classes, and these are named like splits ({', '.join(top)}); "
                 f"for the images of one alone: --data {os.path.join(train.root, first)}")
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)        # names of files can be any bytes


# Pillow refuses a PNG with much text beside its pixels
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2 ** 28


def load_image(path, size, rng=None):
    """One file -> (3, S, S) in [-1, 1]: short side to S, then a centre crop, or a random crop and flip."""
    image = open_image(path)
    w, h = image.size
    scale = size / min(w, h)
    w, h = max(size, round(w * scale)), max(size, round(h * scale))          # what it would be when resized
    x, y = (w - size) // 2, (h - size) // 2
    if rng is not None:
        x, y = rng.integers(w - size + 1), rng.integers(h - size + 1)
    sx, sy = image.width / w, image.height / h
    box = (x * sx, y * sy, min((x + size) * sx, image.width), min((y + size) * sy, image.height))
    image = image.resize((size, size), Image.Resampling.BICUBIC, box, reducing_gap=3.0)  # Pillow antialiases
    if rng is not None and rng.random() < 0.5:
        image = ImageOps.mirror(image)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def open_image(path, header_only=False):
    """One file -> Pillow image, RGB and upright. UserError when its pixels can't be read, whatever the reason.

    What is written around the pixels may be wrong in any way. header_only: look at the first bytes -> None
    """
    dq.require(os.path.isfile(path), f"{path}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)   # more pixels than Pillow thinks sane
            with Image.open(path) as image:
                if header_only:
                    return None
                packing = image.tile[0][3] if image.tile else ""             # load() forgets it
                image.load()
                with contextlib.suppress(Exception):
                    ImageOps.exif_transpose(image, in_place=True)            # turns the pixels, then mends the EXIF
                return to_rgb(image, packing)
    except Exception as error:                                               # decoders raise nearly everything
        raise dq.UserError(f"{path}: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from None


def to_rgb(image, packing=""):
    """A Pillow image of any mode -> RGB; transparency over white, all depths scaled to 8 bits.

    packing: Pillow's name for the layout of the pixels in the file, as "RGB;16B".
    """
    key = image.info.get("transparency")                                     # a colour that stands for transparent
    if image.mode.startswith("I") or image.mode == "F":
        x = np.asarray(image)
        image = Image.fromarray(grey_8_bits(image))
        if key is not None:
            image.putalpha(Image.fromarray(np.uint8(255) * (x != key)))
    elif key is not None and packing in ("L;2", "L;4"):                      # Pillow scales the pixels, not the key
        image.info["transparency"] = key * {"L;2": 85, "L;4": 17}[packing]
    elif key is not None and packing == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in key)
    elif image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def grey_8_bits(image):
    """A Pillow image of greys deeper than 8 bits -> (H, W), uint8, by the depth that its file declares.

    Floats and signed numbers declare none: their white is the first of 1, 255, 65535 that the bright
    pixels do not exceed by far, so neither overshoot nor a few extreme pixels make the others black.
    """
    x, tags = np.asarray(image).astype(np.float32), getattr(image, "tag_v2", {})  # of TIFF; others fill 16 bits
    bits, kind = tags.get(258, (16,))[0], tags.get(339, (1,))[0]             # kind 1: unsigned, 2: signed, 3: float
    white = 2.0 ** (bits - (kind == 2)) - 1
    if image.mode != "F" and kind == 1:
        x = x % 2.0 ** bits                                                  # Pillow takes 32 bits as signed
    else:
        bright = x[np.isfinite(x) & (x > 0)]
        bright = np.quantile(bright, 0.9) if bright.size else 0.0
        white = min(white, next((scale for scale in (1, 255, 65535) if bright <= 2 * scale), white))
    x = np.nan_to_num(x / white, nan=0.0, posinf=1.0, neginf=0.0).clip(0, 1)
    if tags.get(262) == 0:                                                   # white is zero; Pillow turns 8 bits itself
        x = 1 - x
    return (x * 255).round().astype(np.uint8)


class ToyShapes(torch.utils.data.Dataset):
    """Textured shapes (much information) on smooth gradients (little), any size, made on the fly.

    self[i] -> image (3, S, S) in [-1, 1], label (the kind of shape, i % 4). Image i depends on
    (seed, i mod n) alone. detail_mask(i) tells where the information is, texture(i) which of `textures` it has.
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

    def _shape(self, i):
        """Signed distance to the shape's edge (S, S), negative inside, and the generator for all the rest."""
        rng = np.random.default_rng([self.seed, i % self.n])
        r = rng.choice([0.6, 0.675, 0.75])
        x, y = self.x - rng.integers(-2, 3) / 8, self.y - rng.integers(-2, 3) / 8  # on a grid: few codes say much
        kind = self.classes[i % self.n % 4]
        if kind == "circle":
            d = np.hypot(x, y) - r
        elif kind == "square":
            d = np.maximum(abs(x), abs(y)) - 0.85 * r
        elif kind == "triangle":
            d = np.maximum(0.866 * abs(x) - 0.5 * y - 0.55 * r, y - 0.7 * r)
        else:
            a, b = np.maximum(abs(x), abs(y)), np.minimum(abs(x), abs(y))
            d = np.maximum(a - r, b - 0.36 * r)
        return d, x, y, rng

    def detail_mask(self, i):
        """Pixels of the textured shape: (S, S), bool."""
        return torch.from_numpy(self._shape(i)[0] < 0)

    def _paint(self, rng):
        """What is drawn after the shape: two colours behind it, from where to where, turn and kind of texture, inks."""
        return (rng.choice(len(self.backgrounds), 2, replace=False), rng.uniform(0, 2 * np.pi),
                rng.integers(4), rng.integers(len(self.textures)), rng.integers(len(self.inks)))

    def texture(self, i):
        return int(self._paint(self._shape(i)[3])[3])

    def __getitem__(self, i):
        d, x, y, rng = self._shape(i)
        behind, angle, turn, kind, inks = self._paint(rng)
        c0, c1 = self.backgrounds[behind]
        t = 0.5 + (np.cos(angle) * self.x + np.sin(angle) * self.y) / 2.83   # S, S in [0, 1]
        image = c0 + (c1 - c0) * t[..., None]                                # S, S, 3
        turn, k = turn * np.pi / 4, 2 * np.pi / 0.5                          # 4 periods across the image
        u, v = k * (np.cos(turn) * x + np.sin(turn) * y), k * (np.cos(turn) * y - np.sin(turn) * x)
        wave = (np.sin(u), np.sin(u) * np.sin(v) * 1.4, np.cos(u) * 0.6 + np.cos(v) * 0.6 - 0.3)[kind]
        sharp = self.size * 0.5 / 8                                          # soft edges
        ink0, ink1 = self.inks[inks]
        texture = ink0 + (ink1 - ink0) * np.clip(0.5 + sharp * wave, 0, 1)[..., None]
        edge = np.clip(1.5 + (d + 0.06) * self.size / 2, 0, 1)[..., None]    # an outline that closes the shape
        texture = texture + (ink0 - texture) * edge
        cover = np.clip(0.5 - d * self.size / 2, 0, 1)[..., None]            # antialiased edge
        image = image + (texture - image) * cover
        return torch.from_numpy(image.transpose(2, 0, 1) * 2 - 1).float(), i % self.n % 4


def identity(data):
    """What a checkpoint notes of a data set, so that no run goes on with another one."""
    if isinstance(data, ToyShapes):
        return "the toy shapes"
    checksum = zlib.crc32("\n".join(name for name, _ in data.files).encode(errors="surrogateescape"))
    return f"{len(data)} files (checksum of their names {checksum:08x})"


# ------------------------------------------------------------------------------------------------
# Pictures out


def save_picture(path, picture, **options):
    """A Pillow image, in the format that the ending says. options: those of Pillow's `save`."""
    def save(file):
        memory = io.BytesIO()                                                # Pillow overlooks it when a disk is full
        picture.save(memory, Image.registered_extensions()[path.suffix.lower()], **options)
        file.write(memory.getbuffer())
    dq.write_file(path, save)


def to_picture(x, side=128):
    """(3, S, S) in [-1, 1] -> Pillow image, enlarged by whole pixels to about `side`. Never rescaled in brightness."""
    pixels = ((x.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255).byte()
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    times = max(1, side // picture.width)
    return picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)


GRAIN_COLOURS = ("#3a6ea5", "#e07b00", "#c01530")                            # blue, orange, red: coarse to fine


def draw_grains(x, grains, factors):
    """One box per code over an image (3, S, S): blue for the coarsest granularity, orange, then red. grains: (h, w)"""
    picture = to_picture(x)
    picture = Image.blend(picture, Image.new("RGB", picture.size, "white"), 0.35)
    pen = ImageDraw.Draw(picture)
    for k, factor in enumerate(factors):                                     # finer boxes lie on top
        cells, side = factors[0] // factor, factor * picture.width / x.shape[-1]
        here = (grains == k).repeat_interleave(cells, 0).repeat_interleave(cells, 1)  # S/factor, S/factor
        for row, column in here.nonzero().tolist():
            box = [column * side, row * side, (column + 1) * side, (row + 1) * side]
            pen.rectangle(box, outline=GRAIN_COLOURS[k % 3])
    return picture


def save_grid(path, pictures, columns, captions=None):
    """Pillow images of one size -> one picture, row by row, a caption above each."""
    w, h = pictures[0].size
    top, gap = 14 if captions else 0, 2
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * (w + gap) - gap, rows * (h + gap + top) - gap), "white")
    for i, picture in enumerate(pictures):
        x, y = i % columns * (w + gap), i // columns * (h + gap + top)
        sheet.paste(picture, (x, y + top))
        if captions:
            ImageDraw.Draw(sheet).text((x + 2, y + 1), captions[i], fill="black")
    save_picture(path, sheet)


# ------------------------------------------------------------------------------------------------
# The device, and the end of a program


def pick_device(name, dtype):
    """--device and --dtype -> the device, from now on the current one, and a function that opens an autocast context.

    auto: the GPU if there is one; bfloat16 where the hardware computes in it, else float32.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError):
        raise dq.UserError(f"no such device here: {name}") from None
    cpu = getattr(torch.cpu, "get_capabilities", dict)()                     # torch has it from 2.11 on
    fast = cpu.get("avx512_bf16") or cpu.get("amx_bf16")
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)                                        # streams and graphs are made on that
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    bf16 = dtype == "bf16" or (dtype == "auto" and bool(fast))
    return device, lambda: torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def run(main):
    """Call a script's main; what the user can mend ends in one line and exit status 1, not in a traceback."""
    known = {"DataLoader worker": "a process that loads images died; with fewer --workers it may have more memory, "
                                  "and --resume goes on",
             "gloo": "another process of this job is gone; --resume goes on from the last checkpoint",
             "NCCL": "another process of this job is gone, or its network; --resume goes on from the last checkpoint",
             "out of memory": "not enough memory; a smaller --batch-size or a larger --accumulate takes less",
             "allocate memory": "not enough memory; a smaller --batch-size or a larger --accumulate takes less"}
    status = 0
    try:
        main()
    except SystemExit as end:                                                # of argparse, or after a signal
        status = end.code
    except KeyboardInterrupt:
        status = 130
    except (dq.UserError, OSError) as error:
        status = f"error: {str(error).strip().splitlines()[-1]}"             # a loader process adds lines before ours
    except RuntimeError as error:
        line = next((line for sign, line in known.items() if sign in str(error)), None)
        if line is None:
            raise
        status = f"error: {line} ({str(error).strip().splitlines()[0]})"
    leave(status)


def leave(status):
    """Exit; of several processes none leaves while another is still at work, unless something went wrong."""
    if dq.processes()[1] > 1 and status:                                     # an orderly exit could wait for ever
        if isinstance(status, str):
            print(status, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1 if isinstance(status, str) else status)
    if dq.processes()[1] > 1:
        dist.barrier()
        dist.destroy_process_group()
    if status:
        sys.exit(status)


# ------------------------------------------------------------------------------------------------
# Sampling

ROUND = 16    # batches in a call of dq.generate; slots stand idle at the end of a call only, pictures are written then


def parse(argv=None):
    parser = argparse.ArgumentParser(description="Sample images from a DQ-Transformer.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("checkpoint", nargs="?", type=Path, default=Path("out/transformer.pt"), help="what train_transformer.py wrote")
    add("--n", type=int, default=32, help="number of images")
    add("--batch-size", type=int, default=64, help="images at a time")
    add("--label", help="class, by name or number; None: all in turn")
    add("--temperature", type=float, default=0.7, help="of positions and contents; 1: the model as it is")
    add("--top-k", type=int, default=0, help="draw contents from the k likeliest; 0: all")
    add("--top-p", type=float, default=1.0, help="draw contents from the likeliest that make up p")
    add("--cfg", type=float, default=2.0, help="classifier-free guidance; 1: off")
    add("--seed", type=int, default=0, help="of the draws")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--dtype", choices=["auto", "bf16", "fp32"], default="auto", help="auto: bf16 where the hardware has it")
    add("--compile", action="store_true", help="torch.compile the step (GPUs: then captured)")
    add("--out", metavar="DIR", type=Path,
        help="folder for samples.png, a grid of up to 32 images, or a picture's name; None: the checkpoint's folder")
    add("--save-dir", metavar="DIR", type=Path, help="also write every image as a PNG of its own here")
    add("--gif", metavar="FILE", type=Path, help="also write how the first image grows, code by code")
    add("--grain-map", metavar="FILE", type=Path,
        help="picture that is bright where finer codes shall go; only contents are drawn")
    add("--input", metavar="FILE", type=Path, help="photo whose coarse codes are kept (see --keep)")
    add("--keep", type=int, help="with --input: how many of the coarsest granularities to keep; None: 1")
    return parser.parse_args(argv)


def check(args):
    """Refuse, before any work, what would fail or do harm at its end. -> where the grid goes"""
    dq.require(args.n >= 1 and args.batch_size >= 1, "--n and --batch-size must be at least 1")
    dq.require(0 <= args.seed < 2 ** 64, f"--seed must be at least 0 and below 2**64, not {args.seed}")
    dq.require(not (args.input and args.grain_map), "--input and --grain-map exclude each other")
    dq.require(args.input or args.keep is None, "--keep needs --input")

    out = args.out or args.checkpoint.parent
    if out.is_dir() or out.suffix.lower() not in Image.registered_extensions():
        out = out / "samples.png"
    check_ending("--out", out)
    if args.gif:
        dq.require(args.gif.suffix.lower() in (".gif", ".webp", ".png"),
                   f"--gif {args.gif}: pictures that move end in .gif, .webp or .png")
        check_ending("--gif", args.gif)
        dq.require(args.gif != out, f"--out and --gif are the same file, {out}")
    if args.save_dir and args.save_dir.is_dir():
        numbers = sorted(int(path.stem) for path in args.save_dir.glob("[0-9]*.png") if path.stem.isdecimal())
        more = [i for i in numbers if i >= args.n]                           # the others are replaced
        if more:
            raise dq.UserError(f"--save-dir {args.save_dir} holds {more[0]:06d}.png of a larger job, which --n {args.n}"
                               " would leave among its own images; empty it, or name another folder")
    return out


def check_ending(flag, path):
    """UserError unless Pillow can write an RGB picture of this name: it reads more formats than it writes."""
    try:
        Image.new("RGB", (16, 16)).save(io.BytesIO(), Image.registered_extensions()[path.suffix.lower()])
    except (KeyError, OSError, ValueError):
        raise dq.UserError(f"{flag} {path}: no picture in colour can be written as {path.suffix}; take .png") from None


def label_number(label, classes):
    """--label, a name or a number -> a number."""
    dq.require(classes, "this model knows no classes; leave --label out")
    if label in classes:
        return classes.index(label)
    names = ", ".join(classes[:20]) + (", ..." if len(classes) > 20 else "")
    dq.require(label.isdecimal() and int(label) < len(classes),
               f"no class {label!r}; there are 0 to {len(classes) - 1}: {names}")
    return int(label)


def caption(number, classes):
    """The name of a class, or its number where the captions' font, which is Pillow's own, has ASCII only."""
    name = classes[number]
    return name if name.isascii() and name.isprintable() else f"class {number}"


def read_grain_map(path, layout):
    """A picture -> grains (1, h, w): its brightness, averaged over each region, cut into K equal steps."""
    grey = open_image(path).convert("L").resize((layout.side, layout.side), Image.Resampling.BOX)
    grains = np.asarray(grey).astype(np.int64) * layout.n_grains // 256
    return torch.from_numpy(grains)[None]


def given_tiling(layout, grains):
    """For dq.generate: this grain map (B, h, w), every content open. -> pos, code, each (B, L), -1 where to be drawn"""
    H = layout.fine_side
    pos, _ = layout.pack(torch.zeros(len(grains), H, H, dtype=torch.long, device=grains.device), grains)
    return pos, torch.full_like(pos, -1)


def given_coarse(layout, codes, grains, keep):
    """For dq.generate: the codes of the `keep` coarsest granularities of these images, the rest open."""
    pos, code = layout.pack(codes, grains)
    kept = layout.grain[pos] < keep
    return torch.where(kept, pos, -1), torch.where(kept, code, -1)


def given_pairs(args, layout, vae, device, autocast):
    """What --grain-map or --input fix of every image: positions and contents, each (1, max_len), or None."""
    if args.grain_map:
        return given_tiling(layout, read_grain_map(args.grain_map, layout).to(device))
    if args.input:
        keep = 1 if args.keep is None else args.keep
        dq.require(0 <= keep <= layout.n_grains, f"--keep must be 0 to {layout.n_grains}, the number of granularities")
        x = load_image(args.input, vae.config.size)[None].to(device)         # 1, 3, S, S
        with autocast(), torch.inference_mode():
            return given_coarse(layout, *vae.encode(x), keep)
    return None


def save_gif(path, layout, vae, pos, code, autocast, frames=80):
    """One image (1, L) as it is written: after each code what is there so far, the rest grey."""
    length = int((pos != layout.end).sum())
    steps = sorted({round(t) for t in np.linspace(1, length, min(length, frames))})
    order = torch.arange(pos.shape[1], device=pos.device)                    # L
    so_far = torch.cat([torch.where(order < t, pos, layout.end) for t in steps])  # frames, L
    codes, _ = layout.unpack(so_far, code.expand(len(steps), -1))            # frames, H, W; -1 where nothing is yet
    with autocast(), torch.inference_mode():
        images = torch.cat([vae.decode(part) for part in codes.clamp(min=0).split(64)]).float()  # frames, 3, S, S
    there = dq.upsample((codes >= 0).float()[:, None], images.shape[-1])     # frames, 1, S, S
    pictures = [to_picture(x, 256) for x in images * there]
    duration = [60] * (len(steps) - 1) + [2000]                              # milliseconds
    save_picture(path, pictures[0], save_all=True, append_images=pictures[1:], duration=duration, loop=0)


def main(argv=None):
    args = parse(argv)
    options = dq.SampleOptions(args.temperature, args.top_k, args.top_p, args.cfg)
    options.check()
    out = check(args)
    device, autocast = pick_device(args.device, args.dtype)
    model, vae = dq.load_transformer(args.checkpoint, device)
    layout, classes = model.layout, model.config.classes
    if args.label is not None:
        label = torch.full((args.n,), label_number(args.label, classes))
    else:
        label = torch.arange(args.n) % len(classes) if classes else torch.full((args.n,), -1)
    given = given_pairs(args, layout, vae, device, autocast)
    for folder in (out.parent, args.save_dir, args.gif and args.gif.parent):
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
    with autocast():                                                         # on CPUs it is no faster for few rows
        bf16 = torch.is_autocast_enabled(device.type) and (device.type == "cuda" or args.dtype == "bf16")
    dtype = torch.bfloat16 if bf16 else torch.float32

    tiles, captions = [], []
    with tqdm(total=args.n, desc="sampling", unit="image", disable=None) as bar:
        for first in range(0, args.n, ROUND * args.batch_size):
            y = label[first:first + ROUND * args.batch_size].to(device)
            open_pairs = None if given is None else tuple(each.expand(len(y), -1) for each in given)
            pos, code = dq.generate(model, y, options, args.seed, open_pairs, slots=args.batch_size, first=first,
                                    dtype=dtype, compile=args.compile)       # each n, L
            codes, grains = layout.unpack(pos, code)                         # n, H, W and n, h, w
            with autocast(), torch.inference_mode():
                images = torch.cat([vae.decode(part).float() for part in codes.split(64)])  # n, 3, S, S
            for i, (x, g) in enumerate(zip(images, grains), first):
                if args.save_dir:
                    save_picture(args.save_dir / f"{i:06d}.png", to_picture(x, 0))
                if i < 32:
                    tiles += [to_picture(x), draw_grains(x, g, model.config.factors)]
                    n_codes = int((code[i - first] >= 0).sum())
                    captions += [caption(int(label[i]), classes) if classes else f"{i}", f"{n_codes} codes"]
            if args.gif and first == 0:
                save_gif(args.gif, layout, vae, pos[:1], code[:1], autocast)
            bar.update(len(y))
    save_grid(out, tiles, columns=8, captions=captions)
    if args.save_dir:                                                        # by this mark they are no training data
        told = json.dumps({name: str(value) for name, value in vars(args).items()}, indent=1)
        dq.write_file(args.save_dir / "samples.json", lambda file: file.write(told.encode()))
    print("wrote " + ", ".join(str(path) for path in (out, args.save_dir, args.gif) if path))


if __name__ == "__main__":
    run(main)
