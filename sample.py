"""A DQ-Transformer checkpoint -> pictures.    python sample.py [CHECKPOINT] [--label circle]

Writes one grid of samples; with --save-dir one PNG an image too (the layout that FID tools read); with --gif the first
image as it grows from coarse to fine. --grain-map chooses where the detail goes, --input what a photo fixes.
"""
import argparse
import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import dq
from common import Stop, draw_grains, number, pick_device, positive, run, save_grid, save_picture, to_picture
from data import load_image, open_image

ROUND = 16    # batches in a call of dq.generate; slots stand idle at the end of a call only, pictures are written then


def parse(argv=None):
    parser = argparse.ArgumentParser(description="Sample images from a DQ-Transformer.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("checkpoint", nargs="?", type=Path, default=Path("out/transformer.pt"), help="what train_transformer.py wrote")
    add("--n", type=positive, default=32, help="number of images")
    add("--batch-size", type=positive, default=64, help="images at a time")
    add("--label", help="class, by name or number; None: all in turn")
    add("--temperature", type=float, default=0.7, help="of positions and contents; 1: the model as it is")
    add("--top-k", type=int, default=0, help="draw contents from the k likeliest; 0: all")
    add("--top-p", type=float, default=1.0, help="draw contents from the likeliest that make up p")
    add("--cfg", type=float, default=2.0, help="classifier-free guidance; 1: off")
    add("--seed", type=number(int, 0, below=2 ** 64), default=0, help="of the draws")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--dtype", choices=["auto", "bf16", "fp32"], default="auto", help="auto: bf16 where it is fast")
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
        numbers = [int(path.stem) for path in args.save_dir.glob("[0-9]*.png") if path.stem.isdecimal()]
        last = max(numbers, default=0)
        dq.require(last < args.n, f"--save-dir {args.save_dir} holds {last:06d}.png of a larger job, which --n "
                                  f"{args.n} would leave among its own images; empty it, or name another folder")
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
    if any(name.isdecimal() for name in classes):
        print(f"note: no class is named {label}; class number {label} is drawn, which is named {classes[int(label)]}")
    return int(label)


def caption(number, classes):
    """The name of a class, or its number where the captions' font, which is Pillow's own, has ASCII only."""
    name = classes[number]
    return name if name.isascii() and name.isprintable() else f"class {number}"


def read_grain_map(path, layout, columns=None):
    """A picture -> grains (1, h, columns or w): its brightness, averaged over each region, cut into K equal steps."""
    grey = open_image(path).convert("L").resize((columns or layout.side, layout.side), Image.Resampling.BOX)
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
    length = int(layout.lengths(pos)) - 1
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
    label = torch.arange(args.n) % max(1, len(classes))
    if args.label is not None:
        label.fill_(label_number(args.label, classes))
    given = given_pairs(args, layout, vae, device, autocast)
    for folder in (out.parent, args.save_dir, args.gif and args.gif.parent):
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
    with autocast():                                                         # on CPUs it is no faster for few rows
        bf16 = torch.is_autocast_enabled(device.type) and (device.type == "cuda" or args.dtype == "bf16")
    model.to(torch.bfloat16 if bf16 else torch.float32)

    if args.save_dir:                                                        # by this mark they are no training data
        told = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        told["labels"] = {f"{i:06d}.png": classes[k] for i, k in enumerate(label.tolist())} if classes else {}
        dq.write_file(args.save_dir / "samples.json", lambda file: file.write(json.dumps(told, indent=1).encode()))
    tiles, captions = [], []
    with Stop(device) as stop, tqdm(total=args.n, desc="sampling", unit="image", disable=None) as bar:
        for first in range(0, args.n, ROUND * args.batch_size):
            y = label[first:first + ROUND * args.batch_size].to(device)
            open_pairs = None if given is None else tuple(each.expand(len(y), -1) for each in given)
            pos, code = dq.generate(model, y, options, args.seed, open_pairs, slots=args.batch_size, first=first,
                                    compile=args.compile)                    # each n, L
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
            if stop.number:
                break
    save_grid(out, tiles, columns=8, captions=captions)
    print("wrote " + ", ".join(str(path) for path in (out, args.save_dir, args.gif) if path))
    if stop.number:
        stop.leave(stop.number, f"when {first + len(y)} of {args.n} images were drawn", "")


if __name__ == "__main__":
    run(main)
