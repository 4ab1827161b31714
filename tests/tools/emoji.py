"""Drawings of the same subjects in several styles, as folders for train_vae.py, split by subject.

python tests/tools/emoji.py OUT STYLE=DIR [STYLE=DIR ...]        for example fluent=emoji3d noto=noto64
python train_vae.py --data OUT/train --held-out OUT/held_out --preset emoji64 --out runs/emoji64

DIR has a folder for each category. Its files are named by their code points, such as people_body/1f44b-1f3fb.png. They
are copied to OUT/train and OUT/held_out, into folders such as people_body-fluent, which then are the classes. One
subject in 20, chosen by a hash of its code points, belongs to the validation set (held_out) in all styles and skin
tones. The five skin tones of a subject are nearly the same image, so each style keeps only one of them, and the drawing
without a tone.
"""
import argparse
import shutil
import sys
import zlib
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common  # noqa: E402
import dq  # noqa: E402

TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}


def subject(name):
    """"1f44b-1f3fb" -> "1f44b", and its skin tones (1f3fb,). fe0f only asks for an image, so it is dropped."""
    points = [point for point in name.lower().split("-") if point != "fe0f"]
    if TONES.issuperset(points):                                             # a swatch of the tone itself
        return "-".join(points), ()
    return "-".join(point for point in points if point not in TONES), tuple(p for p in points if p in TONES)


def chosen(paths, style):
    """From the drawings of one category and style, choose those without a skin tone and one tone per subject."""
    tones = {}
    for path in sorted(paths):
        name, tone = subject(path.stem)
        tones.setdefault(name, {}).setdefault(tone, path)
    for name, drawings in tones.items():
        plain = drawings.pop((), None)
        of_one_tone = [tone for tone in sorted(drawings) if len(set(tone)) == 1] or sorted(drawings)
        tone = of_one_tone[zlib.crc32(f"{style} {name}".encode()) % len(of_one_tone)] if drawings else None
        yield from ((name, path) for path in (plain, drawings.get(tone)) if path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for the drawings")
    parser.add_argument("styles", metavar="STYLE=DIR", nargs="+", help="a name, and a folder of categories")
    args = parser.parse_args(argv)
    dq.require(not args.out.exists(), f"{args.out} exists already; name a new folder")
    counts = Counter()
    for each in args.styles:
        style, _, folder = each.partition("=")
        dq.require(style and folder and Path(folder).is_dir(), f"{each}: no such folder, or no name of a style")
        for category in sorted(path for path in Path(folder).iterdir() if path.is_dir()):
            for name, path in chosen(category.iterdir(), style):
                part = "held_out" if zlib.crc32(name.encode()) % 20 == 0 else "train"
                target = args.out / part / f"{category.name}-{style}"
                target.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
                counts[style, part] += 1
    dq.require(counts, f"no drawings in folders below {' '.join(args.styles)}")
    print(", ".join(f"{style}: {n} {part}" for (style, part), n in sorted(counts.items())))


if __name__ == "__main__":
    common.run(main)
