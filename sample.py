"""Sample images from a DQ-Transformer checkpoint.    python sample.py [CHECKPOINT] [--label circle]

Writes a grid of samples; with --save-dir also each image as a PNG file (the layout that FID tools read); with --gif an
animation of the first image, code by code. --grain-map sets where the codes are fine, --input keeps codes of a photo.
"""
import argparse
import json
import unicodedata
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import dq
from common import (Stop, draw_grains, explained, lock, natural, number, path, pick_device, positive, run, save_grid,
                    save_picture, say, to_picture)
from data import load_image, open_image


def parse(argv=None):
    """-> the flags; the checkpoint and --out are files. Sampling options that are not given are absent."""
    parser = argparse.ArgumentParser(description="Sample images from a DQ-Transformer.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    option = parser.add_argument_group("sampling options (default: the checkpoint's)",
                                       argument_default=argparse.SUPPRESS).add_argument
    add("checkpoint", nargs="?", type=path, default=Path("out"), help="checkpoint, or a folder with one")
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
    add("--out", metavar="PATH", type=path, help="folder or file for a grid of images; None: beside the checkpoint")
    add("--save-dir", metavar="DIR", type=path, help="also save each image as a PNG file in this folder")
    add("--gif", metavar="FILE", type=path, help="also save an animation of how the first image is sampled")
    given = parser.add_mutually_exclusive_group().add_argument
    given("--grain-map", metavar="IMAGE", type=path, help="greyscale image, brighter where codes should be finer")
    given("--input", metavar="IMAGE", type=path, help="photo whose coarse codes are kept (see --keep)")
    add("--keep", metavar="N", type=natural, help="with --input: keep codes of the N coarsest granularities; None: 1")
    args = parser.parse_args(argv)
    if args.checkpoint.is_dir() or args.checkpoint == Path("out"):
        best = args.checkpoint / "transformer.best.pt"
        args.checkpoint = best if best.exists() else args.checkpoint / "transformer.pt"
    args.out = args.out or args.checkpoint.parent
    if args.out.is_dir() or args.out.suffix.lower() not in Image.registered_extensions():
        args.out = args.out / "samples.png"
    check_ending("--out", args.out)
    check_ending("--gif", args.gif, (".gif", ".webp"))
    dq.require(args.input or args.keep is None, "--keep needs --input")
    more = args.save_dir and args.save_dir / f"{args.n:06d}.png"
    dq.require(not (more and more.exists()), f"{more} is of a larger job; empty the folder, or use another --save-dir")
    return args


def check_ending(flag, path, endings=(".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")):
    """UserError unless the name of an image to write, if there is one, has one of these endings."""
    dq.require(not path or path.suffix.lower() in endings, f"{flag} {path}: the name must end in {', '.join(endings)}")


def load(path, device, **given):
    """-> DQTransformer, its DQVAE, SampleOptions (the `given` ones, else the checkpoint's), what limits the samples."""
    dq.SampleOptions(**given).check()
    saved = dq.load_checkpoint(path, "dq-transformer")
    with explained(f"{path} is damaged, or of another version"):
        model, vae = dq.load_transformer(saved, device)
        if path.name == "transformer.best.pt":
            say(f"sampling from {path}: step {saved['step']}, lowest validation loss, {saved['best']:.1f} nats")
        guided = bool(model.config.classes) and model.config.label_dropout > 0  # was the vector "no label" trained?
        of_file = saved.get("sample_options", dict(temperature=0.7, cfg=2.0))  # older ones have no options ...
        options = dq.SampleOptions(**of_file | ({} if guided else dict(cfg=1.0)) | given)
        options.check()
        psnr = float(saved.get("psnr") or 0)                                 # ... and no PSNR
    dq.require(guided or options.cfg == 1, f"--cfg {options.cfg:g} needs classes and label dropout, which {path} lacks")
    limit = f"; reconstructions limit them at {psnr:.1f} dB, which more --steps of train_vae.py raise" if psnr else ""
    return model, vae, options, limit


def label_number(label, classes):
    """--label, a name or a number -> the number of the class. Names match in any Unicode normal form."""
    dq.require(classes, "this model has no classes; leave --label out")
    label, *names = (unicodedata.normalize("NFC", name) for name in (label, *classes))
    if label in names:
        return names.index(label)
    is_number = label.isdecimal() and int(label) < len(names) and not any(name.isdecimal() for name in names)
    dq.require(is_number, f"no class {label!r} among the {len(names)}: {', '.join(names[:20])}")
    return int(label)


def caption(number, classes):
    """The name of a class, or its number if Pillow's own font, which has ASCII only, can't draw the name."""
    name = classes[number]
    return name if name.isascii() and name.isprintable() else f"class {number}"


def read_grain_map(path, layout, columns=None):
    """An image -> grains (1, h, columns or w): its brightness, averaged over each region, cut into K equal steps."""
    grey = open_image(path).convert("L").resize((columns or layout.side, layout.side), Image.Resampling.BOX)
    return torch.from_numpy(np.asarray(grey).astype(np.int64))[None] * layout.n_grains // 256


def given_tiling(layout, grains):
    """Fix these grains (B, h, w) in dq.generate, but no content. -> pos, code, each (B, L), -1 where sampled"""
    return layout.pack(grains.new_full((len(grains), layout.fine_side, layout.fine_side), -1), grains)


def given_coarse(layout, codes, grains, keep):
    """Fix the codes of the `keep` coarsest granularities. codes (B, H, W), grains -> pos, code, as `given_tiling`"""
    pos, code = layout.pack(codes, grains)
    kept = layout.grain[pos] < keep
    return torch.where(kept, pos, -1), torch.where(kept, code, -1)


def save_gif(path, layout, decode, pos, code, frames=80):
    """Animate how one image (1, L) is sampled: each frame shows the codes so far, and grey elsewhere."""
    length = int(layout.lengths(pos)) - 1
    steps = sorted({round(t) for t in np.linspace(1, length, min(length, frames))})
    so_far = torch.arange(pos.shape[1]) < torch.tensor(steps)[:, None]       # frames, L
    pos = torch.where(so_far.to(pos.device), pos, layout.end)                # frames, L
    codes, _ = layout.unpack(pos, code.expand(len(steps), -1))               # frames, H, W; -1 where nothing is yet
    images = decode(codes.clamp(min=0))                                      # frames, 3, S, S
    there = dq.upsample((codes >= 0).float()[:, None], images.shape[-1])     # frames, 1, S, S
    pictures = [to_picture(x, 256) for x in images * there]
    duration = [60] * (len(steps) - 1) + [2000]                              # milliseconds
    save_picture(path, pictures[0], save_all=True, append_images=pictures[1:], duration=duration, loop=0)


def main(argv=None):
    args = parse(argv)
    device, autocast, machine = pick_device(args.device, args.dtype)
    chosen = {name: getattr(args, name) for name in dq.SampleOptions._fields if name in args}
    model, vae, options, limit = load(args.checkpoint, device, **chosen)
    layout, classes, given, locks, n_done = model.layout, model.config.classes, None, [], 0  # n_done: images
    label = torch.arange(args.n, device=device) % max(1, len(classes))
    if args.label is not None:
        label.fill_(label_number(args.label, classes))
    if args.grain_map:
        given = given_tiling(layout, read_grain_map(args.grain_map, layout).to(device))
    elif args.input:
        x = load_image(args.input, vae.config.size)[None].to(device)         # 1, 3, S, S
        with autocast(), torch.inference_mode():
            given = given_coarse(layout, *vae.encode(x), 1 if args.keep is None else args.keep)
    for file in filter(None, (args.out, args.gif, args.save_dir and args.save_dir / "samples.json")):
        file.parent.mkdir(parents=True, exist_ok=True)
        locks.append(lock(file.parent, f".{file.name}.lock"))                # not .lock: a run may be training there
    if args.dtype == "bf16" or (device.type == "cuda" and machine["dtype"] == "bf16"):
        model.to(torch.bfloat16)                                             # on CPUs it is no faster for few rows
    if folder := args.save_dir:                                              # marks its images as output, not data
        labels = {f"{i:06d}.png": classes[k] for i, k in enumerate(label.tolist())} if classes else {}
        told = vars(args) | options._asdict() | machine | dict(labels=labels, written_by="dq")
        dq.write_file(folder / "samples.json", lambda out: out.write(json.dumps(told, indent=1, default=str).encode()))

    def decode(codes):
        """codes (n, H, W) -> images (n, 3, S, S), a batch at a time"""
        with autocast(), torch.inference_mode():
            return torch.cat([vae.decode(part) for part in codes.split(args.batch_size)]).float()

    def save_complete(n_complete, pos, code):
        """For dq.generate: save complete images, in whole batches before the last call. -> stop?"""
        nonlocal n_done
        bar.update(n_complete - bar.n)
        if stop.number:
            tqdm.write("stopping: the images that are complete are saved; a second signal stops at once")
        elif n_complete < args.n:
            n_complete -= n_complete % args.batch_size
        if args.save_dir and n_done < n_complete:
            codes, _ = layout.unpack(pos[n_done:n_complete], code[n_done:n_complete])  # n, H, W
            for i, x in enumerate(decode(codes), n_done):
                save_picture(args.save_dir / f"{i:06d}.png", to_picture(x, 0))
        n_done = n_complete
        return stop.number

    with Stop(patience=None) as stop, tqdm(None, f"sampling on {device}", args.n, unit="image", disable=None) as bar:
        pos, code = dq.generate(model, label, options, args.seed, given and [x.expand(args.n, -1) for x in given],
                                slots=args.batch_size, compile=args.compile, progress=save_complete)
    if n := min(n_done, 32):
        codes, grains = layout.unpack(pos[:n], code[:n])                     # n, H, W and n, h, w
        tiles = [(to_picture(x), draw_grains(x, g, vae.config.factors)) for x, g in zip(decode(codes), grains)]
        names = [caption(k, classes) if classes else str(i) for i, k in enumerate(label[:n].tolist())]
        counts = [f"{count} codes" for count in (code[:n] >= 0).sum(dim=1).tolist()]
        if args.gif:
            save_gif(args.gif, layout, decode, pos[:1], code[:1])
        save_grid(args.out, sum(tiles, ()), columns=8, captions=sum(zip(names, counts), ()))
        wrote = ", ".join(str(path) for path in (args.out, args.save_dir, args.gif) if path)
        used = ", ".join(f"{name.replace('_', '-')} {value:g}" for name, value in options._asdict().items())
        say(f"wrote {wrote} with {used}{limit}")
    if stop.number:
        stop.leave(stop.number, f"when {n_done} of {args.n} images were sampled", "")


if __name__ == "__main__":
    run(main)
