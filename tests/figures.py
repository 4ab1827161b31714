"""README's figures about stage 1.

python tests/figures.py rd OUT [--jobs N] [-- FLAGS]   trains what is missing below OUT (one folder a row: routers x budgets and
                                             the fixed-length ends, each with FLAGS of train_vae.py), prints the
                                             table and draws OUT/rate_distortion.png
python tests/figures.py log FILE.jsonl       draws the curves of a run's log beside it, FILE.curves.png
"""
import argparse
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from train_transformer import read_log  # noqa: E402

BUDGETS = (0.1, 0.3, 0.5, 0.7, 0.9)
COLOURS = {"learned": "#c01530", "entropy": "#3a6ea5", "random": "#777777", "fixed": "#000000"}


def ticks(low, high, n=5):
    """About n round numbers between low and high."""
    raw = max(high - low, 1e-9) / n
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def plot(curves, title, x_label, y_label="", size=(560, 400)):
    """curves: {name: (colour, [(x, y), ...])} -> Pillow image with axes, points, lines and a legend."""
    w, h = (2 * s for s in size)
    image = Image.new("RGB", (w, h), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(22)
    points = [p for _, line in curves.values() for p in line]
    (x0, x1), (y0, y1) = ((min(v), max(v)) for v in zip(*points))
    dx, dy = (x1 - x0) * 0.04 or 1, (y1 - y0) * 0.06 or 1
    x0, x1, y0, y1 = x0 - dx, x1 + dx, y0 - dy, y1 + dy
    left, top, right, bottom = 100, 60, w - 30, h - 90

    def place(x, y):
        return left + (x - x0) / (x1 - x0) * (right - left), bottom - (y - y0) / (y1 - y0) * (bottom - top)

    for x in ticks(x0, x1):
        draw.line([*place(x, y0), *place(x, y1)], fill="#e5e5e5")
        draw.text((place(x, y0)[0], bottom + 8), f"{x:g}", fill="black", font=font, anchor="ma")
    for y in ticks(y0, y1):
        draw.line([*place(x0, y), *place(x1, y)], fill="#e5e5e5")
        draw.text((left - 8, place(x0, y)[1]), f"{y:.6g}", fill="black", font=font, anchor="rm")
    draw.rectangle([left, top, right, bottom], outline="black")
    for i, (name, (colour, line)) in enumerate(curves.items()):
        line = [place(*p) for p in line]
        draw.line(line, fill=colour, width=3)
        if len(line) < 20:
            for x, y in line:
                draw.ellipse([x - 7, y - 7, x + 7, y + 7], fill=colour)
        if len(curves) > 1:
            y = bottom - 30 * (len(curves) - i)
            draw.line([right - 230, y, right - 190, y], fill=colour, width=4)
            draw.text((right - 180, y), name, fill="black", font=font, anchor="lm")
    draw.text(((left + right) // 2, h - 44), x_label, fill="black", font=font, anchor="ma")
    draw.text(((left + right) // 2, 16), " · ".join(part for part in (title, y_label) if part), fill="black", font=font, anchor="ma")
    return image.resize(size, Image.Resampling.LANCZOS)


def rate_distortion(out, flags, jobs, factors):
    rows = {"fixed-coarse": ["--factors", factors[0]], "fixed-fine": ["--factors", factors[1]]}
    for router in ("learned", "entropy", "random"):
        for budget in BUDGETS:
            rows[f"{router}-{budget}"] = ["--factors", *factors, "--router", router, "--ratios", f"{1 - budget:.1f}", budget]

    def train(name):
        if not (out / name / "vae.pt").exists():                             # written last
            subprocess.run([sys.executable, ROOT / "train_vae.py", "--out", out / name, *map(str, rows[name]), *flags], check=True)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(train, rows))
    end = {name: read_log(out / name / "vae.jsonl")[-1] for name in rows}

    def point(name):
        return end[name]["codes_per_image"], end[name]["psnr"]
    (x0, y0), (x1, y1) = point("fixed-coarse"), point("fixed-fine")
    print("| fine budget | learned | entropy | random | straight line |\n|---|---|---|---|---|")
    print(f"| fixed, coarse: {x0:.0f} codes | {y0:.2f} | | | |")
    for budget in BUDGETS:
        cells = ["{1:.2f} ({0:.1f})".format(*point(f"{router}-{budget}")) for router in ("learned", "entropy", "random")]
        codes = point(f"learned-{budget}")[0]
        print(f"| {budget} | {' | '.join(cells)} | {y0 + (y1 - y0) * (codes - x0) / (x1 - x0):.2f} |")
    print(f"| fixed, fine: {x1:.0f} codes | {y1:.2f} | | | |")
    curves = {router: (COLOURS[router], [point(f"{router}-{b}") for b in BUDGETS]) for router in ("learned", "entropy", "random")}
    curves["fixed length"] = (COLOURS["fixed"], [(x0, y0), (x1, y1)])
    plot(curves, "held-out PSNR, dB", "codes per image").save(out / "rate_distortion.png")


def curves(path):
    log = [{"held-out " * ("psnr" in line or "bits_per_pixel" in line) * (name != "step") + name: value for name, value in line.items()} for line in read_log(path)]
    names = [name for name in dict.fromkeys(key for line in log for key in line) if name != "step" and any(isinstance(line.get(name), float) for line in log)]
    panels = []
    for name in names:
        line = [(entry["step"], entry[name]) for entry in log if name in entry]
        if len(line) > 1:
            panels.append(plot({name: ("#c01530", line)}, name, "step", size=(300, 220)))
    sheet = Image.new("RGB", (4 * 300, -(-len(panels) // 4) * 220), "white")
    for i, panel in enumerate(panels):
        sheet.paste(panel, (i % 4 * 300, i // 4 * 220))
    sheet.save(path.with_suffix(".curves.png"))


if __name__ == "__main__":
    argv = sys.argv[1:]
    flags = argv[argv.index("--") + 1:] if "--" in argv else []
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["rd", "log"])
    parser.add_argument("path", type=Path)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--factors", type=int, nargs=2, default=(8, 4))
    args = parser.parse_args(argv[:len(argv) - len(flags) - bool("--" in argv)])
    if args.what == "rd":
        rate_distortion(args.path, flags, args.jobs, args.factors)
    else:
        curves(args.path)
