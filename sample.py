"""Sample images from a DQ-Transformer checkpoint.    python sample.py [CHECKPOINT] [--label circle]

Writes a grid of samples; with --save-dir also each image as a PNG file (the layout that FID tools read); with --gif an
animation of the first image, code by code. --grain-map sets where the codes are fine, --input keeps codes of a photo.
"""
import argparse
import contextlib
import io
import json
import unicodedata
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import dq
from common import (Stop, draw_grains, lock, machine, number, path, pick_device, positive, run, save_grid, save_picture,
                    to_picture)
from data import load_image, open_image

ROUND = 16                               # batches per call of dq.generate: slots are idle at the end of a call only
OLD_OPTIONS = dq.SampleOptions(temperature=0.7, cfg=2.0)                     # for checkpoints without options


def parse(argv=None):
    """-> the flags, the checkpoint as a file. Sampling options that are not given are absent."""
    parser = argparse.ArgumentParser(description="Sample images from a DQ-Transformer.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    option = parser.add_argument_group("sampling options (default: the checkpoint's)",
                                       argument_default=argparse.SUPPRESS).add_argument
    add("checkpoint", nargs="?", type=path, default=Path("out"),
        help="checkpoint, or a folder: the better of its transformer.pt and transformer.best.pt by validation loss")
    add("--n", type=positive, default=32, help="number of images")
    add("--batch-size", type=positive, default=64, help="number of images that are sampled at the same time")
    add("--label", metavar="CLASS", help="name or number of a class; without it the images cycle through all classes")
    option("--temperature", type=float, help="divides the logits of positions and contents")
    option("--top-k", metavar="K", type=int, help="sample contents from the K most likely codes; 0: from all codes")
    option("--top-p", metavar="P", type=float, help="nucleus sampling of contents: the most likely codes that reach P")
    option("--cfg", metavar="SCALE", type=float, help="scale of classifier-free guidance; 1: no guidance")
    add("--seed", type=number(int, 0, below=2 ** 64), default=0, help="random seed")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--dtype", choices=["auto", "bf16", "fp32"], default="auto", help="auto: bf16 where it is fast")
    add("--compile", action="store_true", help="compile the sampling step with torch.compile")
    add("--out", metavar="PATH", type=path,
        help="folder for samples.png, a grid of up to 32 images, or a file name for it; None: the checkpoint's folder")
    add("--save-dir", metavar="DIR", type=path, help="also save each image as a PNG file in this folder")
    add("--gif", metavar="FILE", type=path, help="also save an animation of how the first image is sampled")
    add("--grain-map", metavar="IMAGE", type=path,
        help="greyscale image, brighter where codes should be finer; fixes all positions, so only contents are sampled")
    add("--input", metavar="IMAGE", type=path, help="photo whose coarse codes are kept (see --keep)")
    add("--keep", metavar="N", type=int, help="with --input: keep the codes of the N coarsest granularities; None: 1")
    args = parser.parse_args(argv)
    if args.checkpoint.is_dir() or args.checkpoint == Path("out"):
        args.checkpoint = better_checkpoint(args.checkpoint)
    return args


def peek(path):
    """-> the entries of a checkpoint, its tensors still on disk; {} if it can't be read, which `main` reports."""
    with contextlib.suppress(Exception):
        return dict(torch.load(path, mmap=True, weights_only=True))
    return {}


def better_checkpoint(folder):
    """-> transformer.pt, or transformer.best.pt if that is of another step, where the validation loss was lower."""
    last, best = folder / "transformer.pt", folder / "transformer.best.pt"
    return last if peek(best).get("step") in (None, peek(last).get("step")) else best


def has_guidance(config):
    """Was the vector for "no label" trained? Guidance extrapolates from it."""
    return bool(config.classes) and config.label_dropout > 0


def default_options(path):
    """-> the SampleOptions of a checkpoint"""
    saved = peek(path)
    try:
        options = dq.SampleOptions(**saved.get("sample_options", OLD_OPTIONS._asdict()))
        options.check()
        return options if has_guidance(dq.TransformerConfig(**saved["config"])) else options._replace(cfg=1.0)
    except Exception:                                                        # damaged: `main` reports it
        return OLD_OPTIONS


def check(args):
    """Validate the output paths before any work. -> path of the grid"""
    dq.require(not (args.input and args.grain_map), "--input and --grain-map exclude each other")
    dq.require(args.input or args.keep is None, "--keep needs --input")
    out = args.out or args.checkpoint.parent
    if out.is_dir() or out.suffix.lower() not in Image.registered_extensions():
        out = out / "samples.png"
    check_ending("--out", out)
    if args.gif:
        dq.require(args.gif.suffix.lower() in (".gif", ".webp", ".png"),
                   f"--gif {args.gif}: the name of an animation must end in .gif, .webp or .png")
        dq.require(args.gif != out, f"--out and --gif are the same file, {out}")
    if args.save_dir:
        last = max((int(path.stem) for path in args.save_dir.glob("[0-9]*.png") if path.stem.isdecimal()), default=0)
        dq.require(last < args.n, f"--save-dir {args.save_dir} holds {last:06d}.png of a larger job, which would stay "
                                  f"among the {args.n} new images; empty the folder, or name another one")
    return out


def check_ending(flag, path):
    """UserError unless Pillow can write an RGB image under this name: it reads more formats than it writes."""
    try:
        Image.new("RGB", (16, 16)).save(io.BytesIO(), Image.registered_extensions()[path.suffix.lower()])
    except (KeyError, OSError, ValueError):
        raise dq.UserError(f"{flag} {path}: can't write RGB images as {path.suffix}; use .png") from None


def label_number(label, classes):
    """--label, a name or a number -> the number of the class. Names match in any Unicode normal form."""
    dq.require(classes, "this model has no classes; leave --label out")
    for form in (str, lambda name: unicodedata.normalize("NFC", name)):
        if form(label) in (names := list(map(form, classes))):
            return names.index(form(label))
    names = ", ".join(classes[:20]) + (", ..." if len(classes) > 20 else "")
    dq.require(label.isdecimal() and int(label) < len(classes),
               f"no class {label!r}; the classes are 0 to {len(classes) - 1}: {names}")
    if any(name.isdecimal() for name in classes):
        print(f"note: no class is named {label}; sampling class number {label}, which is named {classes[int(label)]}")
    return int(label)


def caption(number, classes):
    """The name of a class, or its number if Pillow's own font, which has ASCII only, can't draw the name."""
    name = classes[number]
    return name if name.isascii() and name.isprintable() else f"class {number}"


def read_grain_map(path, layout, columns=None):
    """An image -> grains (1, h, columns or w): its brightness, averaged over each region, cut into K equal steps."""
    grey = open_image(path).convert("L").resize((columns or layout.side, layout.side), Image.Resampling.BOX)
    grains = np.asarray(grey).astype(np.int64) * layout.n_grains // 256
    return torch.from_numpy(grains)[None]


def given_tiling(layout, grains):
    """Fix these grains (B, h, w) in dq.generate, but no content. -> pos, code, each (B, L), -1 where sampled"""
    H = layout.fine_side
    pos, _ = layout.pack(torch.zeros(len(grains), H, H, dtype=torch.long, device=grains.device), grains)
    return pos, torch.full_like(pos, -1)


def given_coarse(layout, codes, grains, keep):
    """Fix the codes of the `keep` coarsest granularities. codes (B, H, W), grains -> pos, code, as `given_tiling`"""
    pos, code = layout.pack(codes, grains)
    kept = layout.grain[pos] < keep
    return torch.where(kept, pos, -1), torch.where(kept, code, -1)


def given_pairs(args, layout, vae, device, autocast):
    """-> the positions and contents that --grain-map or --input fix for every image, each (1, max_len), or None"""
    if args.grain_map:
        return given_tiling(layout, read_grain_map(args.grain_map, layout).to(device))
    if args.input:
        keep = 1 if args.keep is None else args.keep
        dq.require(0 <= keep <= layout.n_grains, f"--keep must be 0 to {layout.n_grains}, the number of granularities")
        x = load_image(args.input, vae.config.size)[None].to(device)         # 1, 3, S, S
        with autocast(), torch.inference_mode():
            return given_coarse(layout, *vae.encode(x), keep)
    return None


def save_gif(path, layout, vae, pos, code, autocast, batch_size, frames=80):
    """Animate how one image (1, L) is sampled: each frame shows the codes so far, and grey elsewhere."""
    length = int(layout.lengths(pos)) - 1
    steps = sorted({round(t) for t in np.linspace(1, length, min(length, frames))})
    order = torch.arange(pos.shape[1], device=pos.device)                    # L
    so_far = torch.cat([torch.where(order < t, pos, layout.end) for t in steps])  # frames, L
    codes, _ = layout.unpack(so_far, code.expand(len(steps), -1))            # frames, H, W; -1 where nothing is yet
    with autocast(), torch.inference_mode():
        images = [vae.decode(part) for part in codes.clamp(min=0).split(batch_size)]
        images = torch.cat(images).float()                                   # frames, 3, S, S
    there = dq.upsample((codes >= 0).float()[:, None], images.shape[-1])     # frames, 1, S, S
    pictures = [to_picture(x, 256) for x in images * there]
    duration = [60] * (len(steps) - 1) + [2000]                              # milliseconds
    save_picture(path, pictures[0], save_all=True, append_images=pictures[1:], duration=duration, loop=0)


def main(argv=None):
    args = parse(argv)
    given_options = {name: getattr(args, name) for name in dq.SampleOptions._fields if name in args}
    options = default_options(args.checkpoint)._replace(**given_options)
    options.check()
    out = check(args)
    device, autocast = pick_device(args.device, args.dtype)
    model, vae = dq.load_transformer(args.checkpoint, device)
    layout, classes = model.layout, model.config.classes
    dq.require(options.cfg == 1 or has_guidance(model.config), f"--cfg {options.cfg:g}: {args.checkpoint} was trained "
               f"without {'label dropout' if classes else 'classes'}, so it has no guidance; leave --cfg out")
    label = torch.arange(args.n) % max(1, len(classes))
    if args.label is not None:
        label.fill_(label_number(args.label, classes))
    given = given_pairs(args, layout, vae, device, autocast)
    for folder in filter(None, (out.parent, args.save_dir, args.gif and args.gif.parent)):
        folder.mkdir(parents=True, exist_ok=True)
        if folder == args.save_dir or out == folder / "samples.png":
            lock(folder, ".sample.lock")                                     # not .lock: a run may be training there
    if args.dtype == "bf16" or (device.type == "cuda" and machine(device, autocast)["dtype"] == "bf16"):
        model.to(torch.bfloat16)                                             # on CPUs it is no faster for few rows
    if args.checkpoint.name == "transformer.best.pt" and (saved := peek(args.checkpoint)).get("best"):
        print(f"sampling from {args.checkpoint}: validation loss {saved['best']:.1f} nats per image at step "
              f"{saved['step']}, the lowest of its run; for the last step name transformer.pt")

    if args.save_dir:                                                        # marks its images as output, not data
        labels = {f"{i:06d}.png": classes[k] for i, k in enumerate(label.tolist())} if classes else {}
        told = json.dumps(vars(args) | options._asdict() | dict(labels=labels, written_by="dq"), indent=1, default=str)
        dq.write_file(args.save_dir / "samples.json", lambda file: file.write(told.encode()))
    n_saved, tiles, captions = 0, [], []

    def save_complete(n_complete, pos, code):
        """For dq.generate: decode and save the images that are complete, a batch at a time. -> stop?"""
        nonlocal n_saved
        bar.update(first + n_complete - bar.n)
        if stop.number:
            tqdm.write("stopping: the images that are complete are saved; a second signal stops at once")
        if n_complete < len(y) and not stop.number:
            n_complete -= n_complete % args.batch_size                       # whole batches
        for start in range(n_saved - first, n_complete, args.batch_size):
            part = slice(start, min(start + args.batch_size, n_complete))
            codes, grains = layout.unpack(pos[part], code[part])             # n, H, W and n, h, w
            with autocast(), torch.inference_mode():
                images = vae.decode(codes).float()                           # n, 3, S, S
            if args.gif and n_saved == 0:
                save_gif(args.gif, layout, vae, pos[:1], code[:1], autocast, args.batch_size)
            for x, g, n_codes in zip(images, grains, (code[part] >= 0).sum(dim=1).tolist()):
                if args.save_dir:
                    save_picture(args.save_dir / f"{n_saved:06d}.png", to_picture(x, 0))
                if n_saved < 32:
                    tiles.extend([to_picture(x), draw_grains(x, g, model.config.factors)])
                    name = caption(int(label[n_saved]), classes) if classes else f"{n_saved}"
                    captions.extend([name, f"{n_codes} codes"])
                n_saved += 1
        return stop.number

    with Stop(patience=None) as stop, tqdm(total=args.n, desc="sampling", unit="image", disable=None) as bar:
        for first in range(0, args.n, ROUND * args.batch_size):
            y = label[first:first + ROUND * args.batch_size].to(device)
            open_pairs = None if given is None else tuple(each.expand(len(y), -1) for each in given)
            dq.generate(model, y, options, args.seed, open_pairs, slots=args.batch_size, first=first,
                        compile=args.compile, progress=save_complete)
            if stop.number:
                break
    if tiles:
        save_grid(out, tiles, columns=8, captions=captions)
        print("wrote " + ", ".join(str(path) for path in (out, args.save_dir, args.gif) if path) + " with "
              + ", ".join(f"{name.replace('_', '-')} {value:g}" for name, value in options._asdict().items()))
    if stop.number:
        stop.leave(stop.number, f"when {n_saved} of {args.n} images were sampled", "")


if __name__ == "__main__":
    run(main)
