"""Compares codec.py with JPEG, WebP and AVIF: PSNR over file size.

python tests/tools/compare_codecs.py FOLDER OUT [--model assets/earth64.pt] [--n 100] [--details -1 -0.5 -0.25 0 0.5]

FOLDER holds images of the model's size, such as earth/held_out. The first n of them are measured, in a fixed random
order. Each is packed with detail 0 and unpacked, and must return the same codes. So are the first five with every other
value of --details; for the others, the size is computed from the model's likelihood. OUT/files.jsonl stores all
measurements, and the same command later measures only the missing ones. Pillow writes the other formats at many
qualities. The command prints the table and draws OUT/codec.png: the curves and a few of the images.

A header is the part of a file that does not depend on the image. Ours is codec.py's header. For the other formats, its
size is that of the file of a uniformly grey image at the same quality. JPEG's Huffman tables belong to the header only
if they are the standard ones. So JPEG has the standard tables for the curve without headers, and optimised tables
otherwise.
"""
import argparse
import io
import json
import math
import random
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import codec  # noqa: E402
import common  # noqa: E402
import dq  # noqa: E402
import figures  # noqa: E402
from data import load_image  # noqa: E402

COLOURS = {"dq": "#c01530", "WebP": "#3a6ea5", "AVIF": "#2e8b57", "JPEG": "#777777"}
QUALITIES = {"JPEG": (1, 3, 5, 8, 12, 16, 20, 25, 30, 40, 50, 60, 70, 80),
             "WebP": (0, 2, 5, 10, 15, 20, 25, 30, 40, 50, 60, 70, 80, 85),
             "AVIF": (0, 10, 20, 25, 30, 35, 40, 45, 50, 55, 60, 70)}
OPTIONS = {"JPEG": {}, "WebP": {"method": 6}, "AVIF": {"speed": 4}}
Image.init()
FORMATS = [name for name in QUALITIES if name.upper() in Image.SAVE]         # not every Pillow has AVIF


def psnr(a, b):
    """PSNR of two 8-bit Pillow images, in dB."""
    error = np.asarray(a).astype(float) - np.asarray(b).astype(float)
    return 10 * math.log10(255 ** 2 / max((error ** 2).mean(), 1e-3))


def written(picture, name, quality, **options):
    memory = io.BytesIO()
    picture.save(memory, name, quality=quality, **OPTIONS[name], **options)
    return memory


class File(NamedTuple):
    """An image in another format at one quality."""
    size: int                            # bytes
    bare: int                            # bytes without the header
    dB: float
    picture: Image.Image                 # decoded


def files(picture, name):
    """-> Files of an image in another format, one for each quality"""
    found, flat = [], Image.new("RGB", picture.size, (128, 128, 128))
    for quality in QUALITIES[name]:
        memory = written(picture, name, quality)
        back, size = Image.open(memory).convert("RGB"), len(memory.getvalue())
        bare = size - len(written(flat, name, quality).getvalue())
        if name == "JPEG":                                                   # optimised tables, the same pixels
            size = len(written(picture, name, quality, optimize=True).getvalue())
        found.append(File(size, bare, psnr(picture, back), back))
    return found


def measure(path, model, vae, detail, real):
    """-> the entry of files.jsonl for an image and a detail. real: pack and unpack it instead of computing its size"""
    x, bias = load_image(path, vae.config.size)[None], vae.router.mlp[-1].bias
    trained = bias.clone()
    codec.shift_router(vae.router, detail)
    with torch.inference_mode():
        codes, grains = vae.encode(x)
        pos, code = model.layout.pack(codes, grains)
        decoded = vae.decode(codes)[0]
    bias.copy_(trained)
    length, header = int(model.layout.lengths(pos)), codec.HEADER.size + len(torch.__version__)
    nats = codec.nats(model, pos[:, :length], code[:, :length])
    bits = min(nats.values()) / math.log(2)
    entry = dict(picture=path.name, detail=detail, header=header, bits=bits, bytes=header + math.ceil(bits / 8),
                 codes=int((code >= 0).sum()), psnr=psnr(common.to_picture(decoded, 0), common.to_picture(x[0], 0)),
                 likeliest=(("none", *model.config.classes)[min(nats, key=nats.get) + 1]), shown=path.parent.name)
    if real:
        data = codec.pack(model, pos, code)
        same = all(torch.equal(a, b) for a, b in zip(codec.unpack(model, data), (pos, code)))
        entry.update(bytes=len(data), same=same)
    return entry


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def curve_of(pictures, counted):
    """pictures: the Files of each image at every quality -> (mean bytes, mean dB) of each quality, ascending"""
    return sorted((mean(file.size if counted else file.bare for file in of_one), mean(file.dB for file in of_one))
                  for of_one in zip(*pictures))


def at(curve, size):
    """dB of a curve [(bytes, dB), ...] at a size, linearly interpolated; None outside its range."""
    for (x0, y0), (x1, y1) in zip(curve, curve[1:]):
        if x0 <= size <= x1:
            return y0 + (y1 - y0) * (size - x0) / max(x1 - x0, 1e-9)
    return None


def draw(path, curves, rows):
    """Two plots, and rows of images below them. curves: {counted: {name: line}}; rows: {name: [(image, note)]}"""
    plots = [figures.plot({name: (COLOURS[name], [p for p in line if p[0] <= 800]) for name, line in lines.items()},
                          "headers counted" if counted else "without headers", "bytes per picture", "PSNR, dB",
                          size=(500, 380))
             for counted, lines in curves.items()]
    side, left, top = 128, 84, 390
    sheet = Image.new("RGB", (1000, top + len(rows) * (side + 20)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for i, plot in enumerate(plots):
        sheet.paste(plot, (500 * i, 0))
    for r, (name, pictures) in enumerate(rows.items()):
        y = top + r * (side + 20)
        pen.text((8, y + side // 2), name, fill="black", font=font, anchor="lm")
        for i, (picture, note) in enumerate(pictures):
            x = left + i * (side + 2)
            sheet.paste(picture.resize((side, side), Image.Resampling.NEAREST), (x, y))
            pen.text((x + side // 2, y + side + 1), note, fill="black", font=font, anchor="ma")
    sheet.save(path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--model", type=Path, default=Path("assets/earth64.pt"))
    parser.add_argument("--n", type=common.positive, default=100)
    parser.add_argument("--details", type=float, nargs="+", default=[-1.0, -0.5, -0.25, 0.0, 0.5])
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    model, vae = dq.load_transformer(args.model, torch.device("cpu"))
    paths = sorted(args.folder.rglob("*.png"))
    dq.require(len(paths) >= args.n, f"{args.folder} holds {len(paths)} images, not {args.n}")
    random.Random(0).shuffle(paths)
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / "files.jsonl"
    done = map(json.loads, log.read_text().splitlines()) if log.exists() else []
    known = {(entry["picture"], entry["detail"]): entry for entry in done}
    with open(log, "a") as file:
        for i, path in enumerate(paths[:args.n]):
            for detail in args.details:
                if (path.name, detail) not in known:
                    entry = measure(path, model, vae, detail, real=detail == 0 or i < 5)
                    known[path.name, detail] = entry
                    print(json.dumps(entry), file=file, flush=True)
    report(paths[:args.n], args, vae, known)


def report(paths, args, vae, known):
    """Print the table and draw the figure."""
    pictures = [common.to_picture(load_image(path, vae.config.size), 0) for path in paths]
    ours = {detail: [known[path.name, detail] for path in paths] for detail in sorted(args.details)}
    real = [entry for entries in ours.values() for entry in entries if "same" in entry]
    wrong = sum(not entry["same"] for entry in real)
    excess = [entry["bytes"] - entry["header"] - entry["bits"] / 8 for entry in real]
    print(f"{len(real)} files, of which {wrong} returned other codes; they exceed the model's -log2 p by "
          f"{mean(excess):.2f} bytes on average, {max(excess):.2f} at most")
    others = {name: [files(picture, name) for picture in pictures] for name in FORMATS}
    curves = {counted: {name: curve_of(others[name], counted) for name in FORMATS} for counted in (True, False)}
    names = ", ".join(FORMATS)
    print(f"| detail | codes | bytes, header | PSNR, dB | {names}: dB at as many bytes | without headers |")
    print("|---|---|---|---|---|---|")
    for detail, entries in ours.items():
        codes, size, header, dB = (mean(entry[name] for entry in entries) for name in ("codes", "bytes", "header",
                                                                                       "psnr"))
        beside = [", ".join("-" if y is None else f"{y:.2f}" for y in (at(curves[counted][name], length)
                                                                       for name in FORMATS))
                  for counted, length in ((True, size), (False, size - header))]
        print(f"| {detail:g} | {codes:.0f} | {size:.0f}, {header:.0f} | {dB:.2f} | {beside[0]} | {beside[1]} |")
    for counted in curves:
        line = [(mean(e["bytes"] - (0 if counted else e["header"]) for e in entries), mean(e["psnr"] for e in entries))
                for entries in ours.values()]
        curves[counted] = {"dq": line, **curves[counted]}

    rows = {name: [] for name in ("original", "dq", *FORMATS)}
    for i in range(min(7, len(paths))):
        entry = known[paths[i].name, 0.0]
        x = load_image(paths[i], vae.config.size)[None]
        with torch.inference_mode():
            decoded = common.to_picture(vae.decode(vae.encode(x)[0])[0], 0)
        size = entry["bytes"] - entry["header"]
        rows["original"].append((pictures[i], entry["shown"]))
        rows["dq"].append((decoded, f"{size} bytes, {entry['psnr']:.1f} dB"))
        for name in FORMATS:
            file = min(others[name][i], key=lambda file: abs(file.bare - size))
            rows[name].append((file.picture, f"{file.bare} bytes, {file.dB:.1f} dB"))
    draw(args.out / "codec.png", curves, rows)
    print(f"wrote {args.out / 'codec.png'}")


if __name__ == "__main__":
    common.run(main)
