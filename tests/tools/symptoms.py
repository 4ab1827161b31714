"""Provokes every symptom in the manual's table of training problems.

python tests/tools/symptoms.py OUT [--only NAME ...]

Runs the commands of each case below OUT (finished cases are kept), prints metrics of their evaluations, and draws
OUT/symptoms.png with a row of images for each case. Takes about 15 minutes on one CPU core.
"""
import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import data as reading  # noqa: E402
import dq  # noqa: E402
from runs import read_log  # noqa: E402


@dataclass
class Case:
    name: str
    commands: tuple                      # script, flags; FEW: a folder with 96 toy images, HEALTHY: the first codes.pt
    metrics: tuple                       # names in the log's evaluations
    steps: tuple = ()                    # at which to print them; empty if the run fails before

    def folder(self, out):
        return out / self.name.replace(" ", "-")


STAGE_1 = "train_vae.py --steps 300 --eval-every 100"
CASES = (
    Case("healthy", (STAGE_1,), ("psnr", "auc", "share", "codebook_used", "perplexity"), (100, 200, 300)),
    Case("collapse", (STAGE_1 + " --lr 0.3",), ("psnr", "codebook_used", "perplexity"), (100, 200, 300)),
    Case("too many codes", (STAGE_1 + " --codebook-size 8192",), ("psnr", "codebook_used", "perplexity"), (100, 300)),
    Case("router at chance", (STAGE_1 + " --budget-weight 300",), ("psnr", "auc", "auc_argmax", "share"),
         (100, 200, 300)),
    Case("no budget", (STAGE_1 + " --budget-weight 0",), ("psnr", "share", "codes_per_image"), (100, 300)),
    Case("not a number", (STAGE_1 + " --lr 100",), ()),
    Case("overfitting", (STAGE_1 + " --data FEW", "train_transformer.py --steps 300 --eval-every 50"),
         ("nats_per_image",), (50, 100, 150, 300)),
    Case("too short", ("train_transformer.py --codes HEALTHY --steps 60 --eval-every 30",),
         ("nats_per_image",), (30, 60)),
)


def stage_of(command):
    return "vae" if command.startswith("train_vae.py") else "transformer"


def provoke(case, out, few):
    """Run or resume the commands of a case. -> the error message of the one that failed, or None"""
    folder = case.folder(out)
    for command in case.commands:
        words = command.replace("FEW", str(few)).replace("HEALTHY", str(out / "healthy/codes.pt")).split()
        resume = ["--resume"] if (folder / f"{stage_of(command)}.pt").exists() else []
        done = subprocess.run([sys.executable, ROOT / words[0], *words[1:], "--out", folder, *resume],
                              stderr=subprocess.PIPE, text=True)
        if done.returncode:
            return done.stderr.splitlines()[-1]


def told(case, out):
    """-> lines with the metrics in the log of its last command, one for each of its steps"""
    stage = stage_of(case.commands[-1])
    log = read_log(case.folder(out) / f"{stage}.jsonl")
    lines = []
    for step in case.steps:
        held_out = [line for line in log if line["step"] == step and case.metrics[0] in line][0]
        values = [f"{name} {held_out[name] if name == 'share' else format(held_out[name], '.4g')}"
                  for name in case.metrics]
        trained = [line for line in log if line["step"] == step and ("budget" in line or "position_nats" in line)][0]
        if stage == "vae":
            values.append(f"(budget in training {trained['budget']:.5f})")
        else:
            values.append(f"(in training {trained['position_nats'] + trained['content_nats']:.4g})")
        lines.append(f"step {step}: " + ", ".join(values))
    return lines


@torch.inference_mode()
def pictures(case, out, n=3):
    """Tiles of a case: originals, reconstructions and granularities, or samples and their granularities."""
    folder, tiles = case.folder(out), []
    if stage_of(case.commands[-1]) == "transformer":
        model, vae = dq.load_transformer(folder / "transformer.pt", "cpu")
        label = torch.arange(n + 1) % max(1, len(model.config.classes))
        codes, grains = model.layout.unpack(*dq.generate(model, label))
        for x, g in zip(vae.decode(codes), grains):
            tiles += [common.to_picture(x), common.draw_grains(x, g, vae.config.factors)]
        return tiles
    vae = dq.load_vae(folder / "vae.pt", "cpu")
    x = torch.stack([reading.ToyShapes(vae.config.size, n=8, seed=1)[i][0] for i in range(n)])
    codes, grains = vae.encode(x)
    for x, y, g in zip(x, vae.decode(codes), grains):
        tiles += [common.to_picture(x), common.to_picture(y), common.draw_grains(x, g, vae.config.factors)]
    return tiles


def sheet(rows):
    """{name: tiles} -> one image, with a row for each name."""
    side, left, font = 96, 170, ImageFont.load_default(17)
    width = left + (side + 2) * max(len(tiles) for tiles in rows.values())
    picture = Image.new("RGB", (width, (side + 6) * len(rows)), "white")
    for row, (name, tiles) in enumerate(rows.items()):
        y = row * (side + 6)
        ImageDraw.Draw(picture).text((4, y + side / 2), name, fill="black", font=font, anchor="lm")
        for column, tile in enumerate(tiles):
            picture.paste(tile.resize((side, side), Image.Resampling.LANCZOS), (left + column * (side + 2), y))
    return picture


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for the runs")
    parser.add_argument("--only", nargs="+", choices=[case.name for case in CASES], help="only these cases")
    args = parser.parse_args()
    few = args.out / "few"
    if not few.exists():
        few.mkdir(parents=True)
        toy = reading.ToyShapes(32, n=96)
        for i in range(96):
            common.save_picture(few / f"{i}.png", common.to_picture(toy[i][0], 0))
    rows = {}
    for case in CASES:
        if args.only and case.name not in args.only:
            continue
        fault = provoke(case, args.out, few)
        print(f"{case.name}: " + ", then ".join(f"python {command}" for command in case.commands))
        print("\n".join("    " + line for line in ([fault] if fault else told(case, args.out))), flush=True)
        if not fault:
            rows[case.name] = pictures(case, args.out)
    if rows:
        common.save_picture(args.out / "symptoms.png", sheet(rows))
        print(f"wrote {args.out / 'symptoms.png'}")


if __name__ == "__main__":
    common.run(main)
