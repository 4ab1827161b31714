"""Samples images that are wider than the model's, with a window that moves along a granularity map.

python tests/tools/wide.py CHECKPOINT MAP OUT.png [--label CLASS] [--seed S] [sample.py's options]

MAP is an image of any width, bright where finer codes should go (as for sample.py's --grain-map). Its height stands for
the height of one image of the model. The window moves by half its width. In each window but the first, the codes of the
left half are given by the previous window, and the model samples the contents of the right half. The decoder sees each
location in two windows, and the two results are cross-faded. MAP gives all positions: the model samples positions
before all contents of finer granularities, so it could not keep one half of an image while it samples the other.
"""
import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common  # noqa: E402
import data as reading  # noqa: E402
import dq  # noqa: E402
import sample  # noqa: E402


def windows(grains, half):
    """A grain map (h, w) -> maps (h, 2 half) that overlap by `half`."""
    return [grains[:, left:left + 2 * half] for left in range(0, grains.shape[1] - half, half)]


def given_left_half(layout, codes, grains):
    """`given` for dq.generate: all positions, and the contents of the left half. codes: (1, H, W)"""
    pos, code = layout.pack(codes, grains)                                   # each 1, L
    right = layout.region[pos] % layout.side >= layout.side // 2
    return pos, torch.where(right, -1, code)


@torch.inference_mode()
def draw(model, vae, grains, label, options, seed):
    """A grain map (h, w), w a multiple of h / 2 -> image (3, S, w S / h)."""
    layout, half = model.layout, model.layout.side // 2
    S, H = vae.config.size, layout.fine_side
    codes = torch.zeros(1, H, H, dtype=torch.long)
    image = torch.zeros(3, S, grains.shape[1] * S // layout.side)
    fade = torch.linspace(0, 1, S // 2)                                      # weight of the newer window
    for i, part in enumerate(windows(grains, half)):
        pos, code = given_left_half(layout, codes, part[None])
        if i == 0:
            code = torch.full_like(code, -1)
        codes, _ = layout.unpack(*dq.generate(model, torch.tensor([label]), options, seed, (pos, code), first=i))
        x, left = vae.decode(codes)[0], i * S // 2                           # 3, S, S
        seen = image[:, :, left:left + S]
        seen[:, :, S // 2:] = x[:, :, S // 2:]
        seen[:, :, :S // 2] = x[:, :, :S // 2] if i == 0 else torch.lerp(seen[:, :, :S // 2], x[:, :, :S // 2], fade)
        codes = torch.cat([codes[:, :, H // 2:], torch.zeros_like(codes[:, :, H // 2:])], dim=2)  # 1, H, W
    return image


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", type=Path, help="checkpoint of train_transformer.py")
    add("map", metavar="MAP", type=Path, help="the granularity map, an image")
    add("out", metavar="OUT", type=Path, help="the image to write")
    add("--label", help="class, by name or number; default: no class")
    add("--seed", type=common.natural, default=0)
    for name, value in dq.SampleOptions()._asdict().items():
        add(f"--{name.replace('_', '-')}", type=type(value), help="default: that of the checkpoint")
    args = parser.parse_args(argv)
    given = {name: value for name in dq.SampleOptions._fields if (value := getattr(args, name)) is not None}
    sample.check_ending("OUT", args.out)
    model, vae, options, _ = sample.load(args.checkpoint, torch.device("cpu"), **given)
    side, half = model.layout.side, model.layout.side // 2
    dq.require(side % 2 == 0, f"an image of this model has {side} regions per row, an odd number that can't be halved")
    label = -1 if args.label is None else sample.label_number(args.label, model.config.classes)
    picture = reading.open_image(args.map)
    columns = max(2, round(picture.width / picture.height * side / half)) * half
    grains = sample.read_grain_map(args.map, model.layout, columns)[0]       # h, columns
    image = draw(model, vae, grains, label, options, args.seed)
    common.save_picture(args.out, common.to_picture(image, 0))
    print(f"wrote {args.out}, {image.shape[2]} x {image.shape[1]} pixels in {columns // half - 1} windows")


if __name__ == "__main__":
    common.run(main)
