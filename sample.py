"""A DQ-Transformer checkpoint -> pictures.    python sample.py [CHECKPOINT] [--label circle]

Writes one grid of samples; with --save-dir one PNG an image too (the layout that FID tools read);
with --gif the first image as it grows from coarse to fine.
"""
import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import dq


def parse(argv=None):
    parser = argparse.ArgumentParser(description="Sample images from a DQ-Transformer.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
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
    add("--out", metavar="FILE", type=Path, help="the grid, of the first 32 images; None: samples.png beside the checkpoint")
    add("--save-dir", metavar="DIR", type=Path, help="also write every image as a PNG of its own here")
    add("--gif", metavar="FILE", type=Path, help="also write how the first image grows, code by code")
    add("--grain-map", metavar="FILE", type=Path, help="picture that is bright where finer codes shall go; only contents are drawn")
    add("--input", metavar="FILE", type=Path, help="photo whose coarse codes are kept (see --keep)")
    add("--keep", type=int, help="with --input: how many of the coarsest granularities to keep; None: 1")
    return parser.parse_args(argv)


def label_number(label, classes):
    """--label, a name or a number -> a number."""
    dq.require(classes, "this model knows no classes; leave --label out")
    if label in classes:
        return classes.index(label)
    names = ", ".join(classes[:20]) + (", ..." if len(classes) > 20 else "")
    dq.require(label.isdecimal() and int(label) < len(classes), f"no class {label!r}; there are 0 to {len(classes) - 1}: {names}")
    return int(label)


def read_grain_map(path, layout):
    """A picture -> grains (1, h, w): its brightness, averaged over each region, cut into K equal steps."""
    grey = dq.open_image(path).convert("L").resize((layout.side, layout.side), Image.Resampling.BOX)
    grains = np.asarray(grey).astype(np.int64) * layout.n_grains // 256
    return torch.from_numpy(grains)[None]


def save_gif(path, layout, vae, pos, code, autocast, frames=80):
    """One image (1, L) as it is written: after each code what is there so far, the rest grey."""
    length = int((pos != layout.end).sum())
    steps = sorted({round(t) for t in np.linspace(1, length, min(length, frames))})
    codes, grains = layout.unpack(torch.cat([torch.where(torch.arange(pos.shape[1], device=pos.device) < t, pos, layout.end) for t in steps]),
                                  torch.cat([code] * len(steps)))
    with autocast(), torch.inference_mode():
        images = torch.cat([vae.decode(c) for c in codes.clamp(min=0).split(64)]).float()
    there = dq.upsample((codes >= 0).float()[:, None], images.shape[-1])
    pictures = [dq.to_picture(x, 256) for x in images * there]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=[60] * (len(steps) - 1) + [2000], loop=0)


def main(argv=None):
    args = parse(argv)
    options = dq.SampleOptions(args.temperature, args.top_k, args.top_p, args.cfg)
    options.check()
    dq.require(args.n >= 1 and args.batch_size >= 1, "--n and --batch-size must be at least 1")
    dq.require(args.seed >= 0, f"--seed must be at least 0, not {args.seed}")
    dq.require(not (args.input and args.grain_map), "--input and --grain-map exclude each other")
    dq.require(args.input or args.keep is None, "--keep needs --input")
    device, autocast = dq.pick_device(args.device, args.dtype)
    model, vae = dq.load_transformer(args.checkpoint, device)
    layout, classes = model.layout, model.config.classes
    if args.label is not None:
        label = torch.full((args.n,), label_number(args.label, classes))
    else:
        label = torch.arange(args.n) % len(classes) if classes else torch.full((args.n,), -1)

    given = None
    if args.grain_map:
        given = dq.given_tiling(layout, read_grain_map(args.grain_map, layout).to(device))
    elif args.input:
        keep = 1 if args.keep is None else args.keep
        dq.require(0 <= keep <= layout.n_grains, f"--keep must be 0 to {layout.n_grains}, the number of granularities")
        x = dq.load_image(args.input, vae.config.size)[None].to(device)
        with autocast(), torch.inference_mode():
            given = dq.given_coarse(layout, *vae.encode(x), keep)

    out = args.out or args.checkpoint.with_name("samples.png")
    for folder in (out.parent, args.save_dir, args.gif and args.gif.parent):
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
    for path in (out, args.gif):
        dq.require(path is None or path.suffix.lower() in Image.registered_extensions(), f"{path}: no picture format has that ending")
    with autocast():
        dtype = torch.bfloat16 if torch.is_autocast_enabled(device.type) else torch.float32
    tiles, captions = [], []
    with tqdm(total=args.n, desc="sampling", unit="image", disable=None) as bar:
        for first in range(0, args.n, 16 * args.batch_size):                 # slots run empty at the end of each round only
            y = label[first:first + 16 * args.batch_size].to(device)
            open_pairs = None if given is None else tuple(t.expand(len(y), -1) for t in given)
            pos, code = dq.generate(model, y, options, args.seed, open_pairs, slots=args.batch_size, first=first, dtype=dtype)
            codes, grains = layout.unpack(pos, code)
            with autocast(), torch.inference_mode():
                images = torch.cat([vae.decode(c).float() for c in codes.split(64)])
            for i, (x, g) in enumerate(zip(images, grains), first):
                if args.save_dir:
                    dq.to_picture(x, 0).save(args.save_dir / f"{i:06d}.png")
                if len(captions) < 64:
                    tiles += [dq.to_picture(x), dq.draw_grains(x, g, model.config.factors)]
                    captions += [classes[label[i]] if classes else f"{i}", f"{layout.length(g[None]).item() - layout.n_grains} codes"]
            if args.gif and first == 0:
                save_gif(args.gif, layout, vae, pos[:1], code[:1], autocast)
            bar.update(len(y))
    dq.save_grid(out, tiles, columns=8, captions=captions)
    print("wrote " + ", ".join(str(p) for p in (out, args.save_dir, args.gif) if p))


if __name__ == "__main__":
    dq.run(main)
