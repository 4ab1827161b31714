"""Draws README's figures.

python tests/tools/figures.py rd OUT [--rows NAME ...] [--seeds S ...] [--jobs N] [-- FLAGS]
    trains the missing runs below OUT (routers x budgets and both fixed lengths, each with FLAGS of train_vae.py),
    prints the table of all finished runs, also of other rows and seeds, and draws OUT/rate_distortion.png
python tests/tools/figures.py dial PNG CHECKPOINT ... [--trained CHECKPOINT ...]
    evaluates each vae.pt at many ratios, without training, beside others at those that they were trained for
python tests/tools/figures.py log FILE.jsonl
    draws the curves of a run's log in FILE.curves.png
python tests/tools/figures.py walk [CHECKPOINT] [--image FILE]
    follows one image through both models, as a commented printout and as a figure, walk.png
python tests/tools/figures.py teaser CHECKPOINT FILE [FILE ...]
    draws images, their tokens, their reconstructions, and samples: README's first figure
python tests/tools/figures.py neighbours CHECKPOINT --data DIR
    draws samples, and below each its nearest training image, to check whether samples are copies
python tests/tools/figures.py shrink CHECKPOINT FILE.pt
    writes only the parts of a transformer.pt that sample.py needs, with weights in bfloat16
"""
import argparse
import colorsys
import contextlib
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import data as reading  # noqa: E402
import dq  # noqa: E402
import sample  # noqa: E402
import train_vae  # noqa: E402
from common import natural, positive  # noqa: E402
from runs import flags_to_end, read_log, refuse, split_flags  # noqa: E402

BUDGETS = (0.1, 0.3, 0.5, 0.7, 0.9)
DIALS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
ROUTERS = ("learned", "entropy", "random")
COLOURS = {"learned": "#c01530", "entropy": "#3a6ea5", "random": "#777777", "fixed": "#000000"}


# ------------------------------------------------------------------------------------------------
# Curves: rd, dial and log


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
    title = " · ".join(part for part in (title, y_label) if part)
    draw.text(((left + right) // 2, 16), title, fill="black", font=font, anchor="ma")
    return image.resize(size, Image.Resampling.LANCZOS)


RD_ROWS = ["fixed-coarse", "fixed-fine", *(f"{router}-{budget}" for router in ROUTERS for budget in BUDGETS)]


def rate_distortion(out, names, seeds, flags, jobs, factors):
    """Train the missing runs, print the table of all runs, and draw it."""
    steps = train_vae.parse(flags)[2].steps

    def train(name, seed):
        folder = out / name / f"seed-{seed}"
        more = flags_to_end(folder / "vae.pt", steps)
        if more is None:
            return
        router, budget = name.split("-")
        if router == "fixed":
            row = ["--factors", factors[budget == "fine"]]
        else:
            row = ["--factors", *factors, "--router", router, "--ratios", f"{1 - float(budget):.1f}", budget]
        command = [sys.executable, ROOT / "train_vae.py", "--out", folder, *row, "--seed", seed, *flags, *more]
        status = subprocess.run([str(word) for word in command]).returncode
        dq.require(status == 0, f"the run {name}, seed {seed} failed; its messages are above")
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda run: train(*run), [(name, seed) for seed in seeds for name in names]))

    points = {}                                                              # {row: [(codes, dB) of each seed]}
    for name in RD_ROWS:
        for path in sorted(out.glob(f"{name}/seed-*/vae.jsonl")):
            log = read_log(path)
            dq.require(log and "psnr" in log[-1], f"{path} does not end with an evaluation")
            points.setdefault(name, []).append((log[-1]["codes_per_image"], log[-1]["psnr"]))
    mean = {name: tuple(sum(values) / len(values) for values in zip(*runs)) for name, runs in points.items()}

    def text(name):
        return f"{', '.join(f'{y:.2f}' for _, y in points[name])} ({mean[name][0]:.1f})" if name in points else ""

    def line(budget):
        """The PSNR of a mixture of both fixed lengths with as many codes as the learned router uses."""
        if not {f"learned-{budget}", "fixed-coarse", "fixed-fine"} <= mean.keys():
            return ""
        (x0, y0), (x1, y1), (codes, _) = (mean[name] for name in ("fixed-coarse", "fixed-fine", f"learned-{budget}"))
        return f"{y0 + (y1 - y0) * (codes - x0) / (x1 - x0):.2f}"
    print("| fine budget | learned: dB of each seed (codes) | entropy | random | line between both fixed lengths |")
    print(f"|---|---|---|---|---|\n| fixed, coarse | {text('fixed-coarse')} | | | |")
    for budget in BUDGETS:
        print(f"| {budget} | {' | '.join(text(f'{router}-{budget}') for router in ROUTERS)} | {line(budget)} |")
    print(f"| fixed, fine | {text('fixed-fine')} | | | |")

    curves = {router: (COLOURS[router], [mean[f"{router}-{b}"] for b in BUDGETS if f"{router}-{b}" in mean])
              for router in ROUTERS}
    curves["fixed length"] = (COLOURS["fixed"], [mean[name] for name in RD_ROWS[:2] if name in mean])
    curves = {name: curve for name, curve in curves.items() if curve[1]}
    plot(curves, "held-out PSNR, dB", "codes per image").save(out / "rate_distortion.png")


def dial(out, checkpoints, trained):
    """Draw PSNR over codes per image: a curve for each DQ-VAE in `checkpoints`, and one through those `trained`."""
    def points(path, fractions):
        """(codes per image, dB) with these fine fractions; None: the ratios of the checkpoint. Of more than two
        granularities, a fraction f of the path from all coarse to all fine is a binomial distribution."""
        saved, vae = dq.load_checkpoint(path, "dq-vae"), dq.load_vae(path, torch.device("cpu"))
        folders, size, n = saved.get("folders", {}), vae.config.size, len(vae.config.factors) - 1
        train, val = reading.open_data(folders.get("data"), size, seed=saved.get("settings", {}).get("seed", 0),
                                       skip=path.parent, held_out=folders.get("held_out"))
        images, detailed = train_vae.validation_images(val, vae.config)
        for f in fractions:
            if f is not None:
                ratios = tuple(math.comb(n, k) * f ** k * (1 - f) ** (n - k) for k in range(n + 1))
                vae.set_ratios(ratios, train_vae.calibration_images(train, torch.device("cpu"), seed=0))
            metrics, *_ = train_vae.evaluate(vae, images, detailed, contextlib.nullcontext)
            print(f"| {path} | {'its own' if f is None else f} | {metrics['codes_per_image']:.1f} | "
                  f"{metrics['psnr']:.2f} | {metrics.get('auc', math.nan):.3f} |", flush=True)
            yield metrics["codes_per_image"], metrics["psnr"]

    print("| DQ-VAE | fine | codes per image | PSNR, dB | AUC |\n|---|---|---|---|---|")
    colours = ["#c01530", "#3a6ea5", "#e07b00", "#777777"]
    curves = {path.parent.name: (colours[i % 4], list(points(path, (None, *DIALS)))[1:])
              for i, path in enumerate(checkpoints)}
    if trained:
        curves["one for each"] = ("#000000", sorted(xy for path in trained for xy in points(path, [None])))
    plot(curves, "validation PSNR, dB", "codes per image").save(out)


def curves(path):
    """Draw a panel for every number in the log, with separate panels for training steps and evaluations."""
    log = []
    for line in read_log(path):
        prefix = "held-out " if "psnr" in line or "bits_per_pixel" in line else ""
        log.append({name if name == "step" else prefix + name: value for name, value in line.items()})
    panels = []
    for name in dict.fromkeys(name for entry in log for name in entry if name != "step"):
        line = [(entry["step"], entry[name]) for entry in log if name in entry]
        if len(line) > 1 and any(isinstance(value, float) for _, value in line):
            panels.append(plot({name: ("#c01530", line)}, name, "step", size=(300, 220)))
    dq.require(panels, f"{path} is not the log of a run, or has no curve yet")
    sheet = Image.new("RGB", (4 * 300, -(-len(panels) // 4) * 220), "white")
    for i, panel in enumerate(panels):
        sheet.paste(panel, (i % 4 * 300, i // 4 * 220))
    sheet.save(path.with_suffix(".curves.png"))


# ------------------------------------------------------------------------------------------------
# walk: one image, step by step through both models


class Walk:
    """One image on its way through both models. M: number of its pairs, up to and including the last EOS.

    x: (3, S, S) in [-1, 1]; label: -1 for none
    """

    @torch.inference_mode()
    def __init__(self, model, vae, x, label=-1):
        self.config, self.layout, self.router, self.x = vae.config, model.layout, type(vae.router).__name__, x
        K, label = self.layout.n_grains, torch.tensor([label])
        self.names = {1: ["fixed"], 2: ["coarse", "fine"], 3: ["coarse", "medium", "fine"]}.get(K)
        self.names = self.names or [f"granularity {k}" for k in range(K)]
        seen = vae(x[None])
        self.score = vae.router.score(x[None], seen.maps)[0]                 # h, w
        self.grains, self.codes = seen.grains[0], seen.codes[0]              # h, w; H, W

        pos, code = self.layout.pack(seen.codes, seen.grains)                # each 1, max_len
        M = int(self.layout.lengths(pos))
        pos, code = pos[:, :M], code[:, :M]                                  # each 1, M
        self.pos, self.code = pos[0], code[0]                                # M; the content of an EOS is -1
        self.grain = self.layout.grain[self.pos]                             # M: granularity of each pair
        self.counts = [int(((self.grain == k) & (self.code >= 0)).sum()) for k in range(K)]  # codes of each
        self.n_codes = sum(self.counts)

        # the predictions for pair t, given the pairs before it; the content is also given pos[t]
        place, content = model.logits(pos, code, label)                      # 1, M, P; 1, M, V
        self.place = place[0].log_softmax(-1)                                # M, P: log p, -inf where not legal
        self.content = content[0].log_softmax(-1)                            # M, V: log p
        self.place_nats = -self.place.gather(1, self.pos[:, None])[:, 0]     # M
        self.content_nats = -self.content.gather(1, self.code.clamp(min=0)[:, None])[:, 0]  # M
        self.content_nats = self.content_nats.masked_fill(self.code < 0, 0.0)  # M
        self.nats = (self.place_nats.sum() + self.content_nats.sum()).item()
        self.forward = {name: loss.item() for name, loss in model(pos, code, label).items()}

        self.decoded = vae.decode(self.layout.unpack(pos, code)[0])[0].clamp(-1, 1)  # 3, S, S: from the pairs alone
        error = (self.decoded - x).square().mean().item()
        self.psnr = 10 * math.log10(4 / max(error, 1e-10))                   # images in [-1, 1]: 4 is the range squared
        self.bits_without = (self.n_codes * math.log2(self.config.codebook_size)  # a code: log2 V bits,
                             + self.grains.numel() * math.log2(K))           # a region's granularity: log2 K

    def where(self, position):
        """A position id -> granularity k, region r, cell j in it; an EOS has neither region nor cell."""
        k = int(self.layout.grain[position])
        if self.layout.is_eos[position]:
            return k, None, None
        side, c = self.layout.sides[k], math.isqrt(self.layout.cells[k])     # c x c codes per region
        row, column = divmod(position - self.layout.offsets[k], side)
        return k, row // c * self.layout.side + column // c, row % c * c + column % c

    def describe(self, position):
        """A position id in words."""
        k, r, j = self.where(position)
        if r is None:
            return f"EOS of {self.names[k]}"
        cells, side = self.layout.cells[k], self.layout.side
        text = f"{self.names[k]}, region {r} (row {r // side}, column {r % side})"
        if cells > 1:
            side = math.isqrt(cells)
            text += f", cell {j} (row {j // side}, column {j % side})"
        return text

    def moments(self):
        """Steps t at which the walk shows the next position, with a description: at the start, in the middle of the
        first granularity's codes, and after each EOS but the last (or, if there is only one, before it).
        """
        eos = (self.code < 0).nonzero()[:, 0].tolist()
        found = {eos[0] // 2: f"in the middle of the {self.names[0]} codes"}
        if len(eos) == 1:
            found[eos[0]] = "at the end"
        for k, t in enumerate(eos[:-1]):
            found[t + 1] = f"after the {self.names[k]} EOS"
        return sorted((found | {0: "at the start"}).items())


# ------------------------------------------------------------------------------------------------
# walk as a commented printout. Names in brackets are those of dq.py


def matrix(values, form):
    """(rows, columns) -> a line for each row."""
    return ["       " + " ".join(format(value, form) for value in row) for row in values.tolist()]


def plural(n, noun):
    return f"{n} {noun}{'s' * (n != 1)}"


def tell_grains(walk):
    h, factor, names = walk.layout.side, walk.config.factors[0], walk.names
    ends = " to ".join(f"{k} ({names[k]})" for k in sorted({0, len(names) - 1}))
    meaning = {"learned": f"the mean granularity that it expects, {ends}",
               "entropy": "the entropy of the region's grey levels, in nats",
               "random": "a random number, independent of the image"}[walk.config.router]
    return [
        f"1  Where is detail?   [DQVAE.quantize, {walk.router}]",
        f"   The image has {h} x {h} regions of {factor} x {factor} pixels. The router scores each of them:",
        f"   {meaning}.",
        *matrix(walk.score, "5.2f"),
        "   It chooses a granularity for each region:",
        *(f"       {k} = {name}: {plural(cells, 'code')} per region"
          for k, (name, cells) in enumerate(zip(names, walk.layout.cells))),
        "   and here its choice is",
        *matrix(walk.grains, "5d"), ""]


def tell_codes(walk):
    V, N, K, cells = walk.config.codebook_size, walk.layout.n_regions, walk.layout.n_grains, walk.layout.cells
    H, pixels, distinct = walk.layout.fine_side, walk.config.size ** 2, len(set(walk.code.tolist()) - {-1})
    counts = " + ".join(f"{count} {name}" for count, name in zip(walk.counts, walk.names))
    total = f"   {counts} = {plural(walk.n_codes, 'code')}, {distinct} of them different"
    if K > 1:
        total += f". (All {walk.names[0]}: {N * cells[0]}; all {walk.names[-1]}: {N * cells[-1]}.)"
    grains = f", {N} granularities of log2 {K} = {math.log2(K):.4g}" if K > 1 else ""
    return [
        "2  What is there?   [DQVAE.mix, Codebook.assign]",
        f"   Each cell of the finest grid, {H} x {H}, gets the index of the nearest of {V} codebook vectors.",
        *(f"   A {name} code fills {cells[-1] // s} cells, which show the same index: it is one code all the same."
          for name, s in list(zip(walk.names, cells))[:-1]),
        *matrix(walk.codes, f"{len(str(V - 1))}d"),
        total,
        f"   Bits without entropy coding: {plural(walk.n_codes, 'code')} of log2 {V} = {math.log2(V):.4g}{grains}; "
        f"in all {walk.bits_without:.0f}, or {walk.bits_without / pixels:.3f} per pixel", ""]


def tell_pairs(walk, shown):
    """shown: a granularity with more pairs is shortened to so many, the first and the last ones"""
    layout = walk.layout
    lines = ["3  In which order is it written?   [Layout.pack]",
             "   As pairs of a position and a content, sorted by the position id:"]
    for name, first, eos in zip(walk.names, layout.offsets, layout.eos):
        lines.append(f"       ids {first} to {eos - 1} are {name}, {eos} is their EOS, an end token without content")
    start = 0
    for name, count in zip(walk.names, walk.counts):
        skipped = range(0)
        if count > shown:
            skipped = range(start + shown - shown // 3, start + count - shown // 3)
        lines.append(f"   {name}: {plural(count, 'code')}")
        for t in range(start, start + count + 1):
            position, code = int(walk.pos[t]), int(walk.code[t])
            if t not in skipped:
                text = f"{walk.describe(position)}  code {code}" if code >= 0 else "EOS"
                lines.append(f"       t={t:<4d} id {position:<5d} {text}")
            elif t == skipped[0]:
                lines.append(f"       ... and {len(skipped)} more ...")
        start += count + 1
    return lines + [""]


def tell_moments(walk, top=5):
    P, V = walk.layout.n_positions, walk.config.codebook_size
    lines = ["4  What does the transformer predict?   [DQTransformer.logits, Layout.legal]",
             "   It knows the pairs before t. Its position stack predicts the next position among the valid ones (from",
             "   which the image can be completed). Its content stack is given the position and predicts the code.", ""]
    for t, when in walk.moments():
        p, came, legal = walk.place[t].exp(), int(walk.pos[t]), int(walk.place[t].isfinite().sum())
        likely = p.argsort(descending=True)[:min(top, legal)].tolist()
        listed = likely if came in likely else [*likely, came]
        lines.append(f"   t={t}, {when}: {plural(legal, 'valid position')} of {P}")
        for position in listed:
            mark = "   <- the next pair" if position == came else ""
            lines.append(f"       p {p[position]:.4f}  id {position:<5d} {walk.describe(position)}{mark}")
        if legal > len(listed):
            rest = (1 - p[listed].sum()).clamp(min=0)
            lines.append(f"       p {rest:.4f}  all {legal - len(listed)} others together")
        if walk.code[t] >= 0:
            q, code = walk.content[t].exp(), int(walk.code[t])
            rank, best = 1 + int((q > q[code]).sum()), int(q.argmax())
            lines.append(f"     content: code {code}, p {q[code]:.4f}, rank {rank} of {V}"
                         + (f"; rank 1 is code {best}, p {q[best]:.4f}" if rank > 1 else ""))
        lines.append("")
    return lines


def tell_cost(walk):
    # `forward` computes the same as cross entropies; a difference would be a bug in this file
    for ours, theirs in ((walk.place_nats, walk.forward["position"]), (walk.content_nats, walk.forward["content"])):
        assert math.isclose(ours.sum().item(), theirs, rel_tol=1e-4, abs_tol=1e-3)
    pixels, bits = walk.config.size ** 2, walk.nats / math.log(2)
    rows = [(name, walk.grain == k) for k, name in enumerate(walk.names)] + [("all", walk.grain >= 0)]
    return [
        "5  What does it cost?   [DQTransformer.forward]",
        "   -log p of the image's pairs, summed, in nats:",
        f"       {'':14}{'pairs':>7}{'positions':>11}{'contents':>11}",
        *(f"       {name:14}{int(row.sum()):7d}{walk.place_nats[row].sum():11.3f}{walk.content_nats[row].sum():11.3f}"
          for name, row in rows),
        f"   total {walk.nats:.3f} nats = {bits:.1f} bits = {bits / pixels:.3f} bits per pixel "
        f"(without the transformer, see 2: {walk.bits_without / pixels:.3f})",
        f"   DQTransformer.forward: {walk.forward['position']:.3f} + {walk.forward['content']:.3f} nats, the same",
        f"   From these bits the decoder reconstructs the image with a PSNR of {walk.psnr:.2f} dB."]


# ------------------------------------------------------------------------------------------------
# walk as a figure. It is drawn at twice its size and halved at the end, for smooth lines and letters


SIDE, GAP, COLUMNS = 448, 36, 4          # of a panel, between panels; panels in a row
BLUE, ORANGE, RED = common.GRAIN_COLOURS


def code_colour(code):
    """Always the same for a code; multiples of irrational numbers, mod 1, lie apart from each other."""
    rgb = colorsys.hsv_to_rgb(code * 0.618034 % 1, 0.2 + 0.4 * (code * 0.414214 % 1), 0.97)
    return tuple(round(255 * c) for c in rgb)


def fit(picture):
    """A square Pillow image -> SIDE x SIDE, its pixels kept apart where they are large."""
    side = -(-SIDE // picture.width) * picture.width
    return picture.resize((side, side), Image.Resampling.NEAREST).resize((SIDE, SIDE), Image.Resampling.BOX)


def box_of(walk, position):
    """The pixels of a panel that a position id covers: left, top, right, bottom."""
    k = int(walk.layout.grain[position])
    row, column = divmod(position - walk.layout.offsets[k], walk.layout.sides[k])
    side = SIDE / walk.layout.sides[k]
    return [round(column * side), round(row * side), round((column + 1) * side), round((row + 1) * side)]


def write_inside(pen, box, text, widest):
    """Write in the middle of the box, in the largest font in which `widest` fits, or not at all if no font fits."""
    width, height = box[2] - box[0], box[3] - box[1]
    for size in (26, 22, 20):
        font = ImageFont.load_default(size)
        if font.getlength(widest) < 0.88 * width and size < height:
            pen.text(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), text, fill="black", font=font, anchor="mm")
            return


def between(a, b, t):
    """A colour on the way from a to b."""
    return tuple(round(x + (y - x) * t) for x, y in zip(ImageColor.getrgb(a), ImageColor.getrgb(b)))


def draw_score(walk):
    """From blue, where coarse codes are enough, through white to the colour of the finest granularity."""
    low, high = walk.score.min().item(), walk.score.max().item()
    if walk.config.router == "learned":                                      # then white is the middle of the scale
        low, high = 0, walk.layout.n_grains - 1
    warm = RED if walk.layout.n_grains > 2 else ORANGE
    panel = Image.new("RGB", (SIDE, SIDE))
    pen = ImageDraw.Draw(panel)
    for r, value in enumerate(walk.score.flatten().tolist()):
        t = (value - low) / (high - low) if high > low else 0.0
        box, colour = box_of(walk, walk.layout.offsets[0] + r), between(BLUE, "white", 2 * t)
        pen.rectangle(box, fill=colour if t < 0.5 else between("white", warm, 2 * t - 1), outline="#bbbbbb")
        write_inside(pen, box, f"{value:.2f}", widest="0.00")
    return panel


def draw_codes(walk):
    """A rectangle for every code. Its colour tells its index, which is written inside if there is room."""
    panel, widest = Image.new("RGB", (SIDE, SIDE), "white"), str(walk.config.codebook_size - 1)
    pen = ImageDraw.Draw(panel)
    for position, code in zip(walk.pos.tolist(), walk.code.tolist()):
        if code >= 0:
            pen.rectangle(box_of(walk, position), fill=code_colour(code), outline="white", width=2)
            write_inside(pen, box_of(walk, position), str(code), widest)
    return panel


def draw_pairs(walk, width):
    """A line for each granularity: its pairs in order, with the position id above and the code below. If there are
    many pairs: the first, the last, and those at which a panel shows the next position; these have arrows."""
    moments = [t for t, _ in walk.moments()[:3]]
    widest = max("EOS", str(walk.layout.end), str(walk.config.codebook_size - 1), key=len)
    step, height, above, left = 13 * len(widest) + 12, 64, 40, 170
    panel = Image.new("RGB", (width, len(walk.names) * (above + height)), "white")
    pen, small, large = ImageDraw.Draw(panel), ImageFont.load_default(20), ImageFont.load_default(26)
    room, start = (width - left) // step, 0
    for k, (name, count) in enumerate(zip(walk.names, walk.counts)):
        eos, y = start + count, k * (above + height) + above
        shown = list(range(start, eos + 1))
        if len(shown) > room:
            n = (room - 5) // 2                                              # 5: a moment, its neighbours, two gaps
            near = {t + d for t in moments for d in (-1, 0, 1) if start <= t + d <= eos}
            shown = sorted({*shown[:n], *near, *shown[-n:]})
        pen.text((0, y + height / 2), name, fill="black", font=large, anchor="lm")
        x = left
        for previous, t in zip([start - 1, *shown], shown):
            if t > previous + 1:
                pen.text((x + step / 2, y + height / 2), "...", fill="black", font=large, anchor="mm")
                x += step
            code = int(walk.code[t])
            upper, lower = [x, y, x + step, y + height / 2], [x, y + height / 2, x + step, y + height]
            pen.rectangle(upper, outline="#bbbbbb", fill="#f3f3f3")
            pen.rectangle(lower, outline="#bbbbbb", fill=code_colour(code) if code >= 0 else "#dddddd")
            write_inside(pen, upper, str(int(walk.pos[t])), widest)
            write_inside(pen, lower, str(code) if code >= 0 else "EOS", widest)
            if t in moments:
                middle = x + step / 2
                pen.polygon([middle - 8, y - 12, middle + 8, y - 12, middle, y - 3], fill="black")
                pen.text((min(middle, width - 32), y - 14), f"t={t}", fill="black", font=small, anchor="mb")
            x += step
        start = eos + 1
    return panel


def draw_places(walk, t):
    """The probabilities of the position of pair t, in red over the image. The actual position is framed.

    The image is pale where nothing is written yet.
    """
    picture = fit(common.to_picture(walk.x))
    panel = Image.blend(picture.convert("L").convert("RGB"), Image.new("RGB", picture.size, "white"), 0.7)
    for position in walk.pos[:t].tolist():
        if not walk.layout.is_eos[position]:
            box = box_of(walk, position)
            panel.paste(picture.crop(box), box)
    p = walk.place[t].exp().tolist()
    legal = [i for i in walk.place[t].isfinite().nonzero()[:, 0].tolist() if not walk.layout.is_eos[i]]
    for position in legal:                                                   # the root makes 1 % visible
        box = box_of(walk, position)
        red = Image.new("RGB", (box[2] - box[0], box[3] - box[1]), RED)
        panel.paste(Image.blend(panel.crop(box), red, 0.85 * p[position] ** 0.5), box)
    pen = ImageDraw.Draw(panel)
    for position in legal:
        pen.rectangle(box_of(walk, position), outline=RED, width=1)
        if p[position] >= 0.01:
            write_inside(pen, box_of(walk, position), f"{100 * p[position]:.0f}", widest="100")
    came = int(walk.pos[t])
    left, top, right, bottom = [0, 0, SIDE, SIDE] if walk.layout.is_eos[came] else box_of(walk, came)
    frame = [max(left - 3, 0), max(top - 3, 0), min(right + 2, SIDE - 1), min(bottom + 2, SIDE - 1)]
    pen.rectangle(frame, outline="black", width=5)
    return panel


def caption_places(walk, t, when):
    p, came, legal = walk.place[t].exp(), int(walk.pos[t]), walk.place[t].isfinite()
    text = f"{when[0].upper()}{when[1:]}. " + ("Coloured: generated so far. " if t else "")
    if legal.sum() == 1 and walk.layout.is_eos[came]:
        return text + "The image is complete: EOS is certain."
    if legal.sum() == 1:
        return text + f"The {walk.names[int(walk.grain[t])]} codes fill the rest in order: the next one is certain."
    text += "" if t else "Red: probabilities of the first code's position, in percent. "
    eos = int((legal & walk.layout.is_eos).nonzero())
    came_text = "EOS, so the whole panel is framed" if came == eos else f"framed, p {p[came]:.1%}"
    return text + f"Actual next position: {came_text}. EOS: p {p[eos]:.1%}."


def draw_walk(walk, class_name=""):
    """-> Pillow image: four panels, the pairs, four panels; each has a title above and a caption below."""
    S, K, V = walk.config.size, walk.layout.n_grains, walk.config.codebook_size
    kinds = [f"{plural(cells, 'code')} ({('blue', 'orange', 'red')[k % 3]})"
             for k, cells in enumerate(walk.layout.cells)]
    score = {"learned": f"Router score: how fine each region's codes should be, from 0 to {K - 1}." if K > 1 else
                        "Router score; with one granularity there is no choice.",
             "entropy": "Router score: entropy of each region's grey levels, in nats.",
             "random": "Router score: random numbers."}[walk.config.router]
    bits = walk.nats / math.log(2)
    first = [
        ("image", fit(common.to_picture(walk.x)), f"{S} x {S} pixels{class_name and ', class ' + class_name}."),
        ("score", draw_score(walk), score),
        ("granularities", fit(common.draw_grains(walk.x, walk.grains, walk.config.factors)),
         f"The router's choice for each region: {' or '.join(kinds)}."),
        ("codes", draw_codes(walk), f"{plural(walk.n_codes, 'code')} from a codebook of {V}, by index and colour.")]
    width = COLUMNS * (SIDE + GAP) - GAP
    pairs = [("pairs", draw_pairs(walk, width),
              "The same codes in the order in which the transformer generates them. Above: the position id, which "
              "also tells the granularity. Below: the code. EOS ends a granularity. The panels below show the "
              "predicted next position at the arrows.")]
    last = [
        *((f"next position, t = {t}", draw_places(walk, t), caption_places(walk, t, when))
          for t, when in walk.moments()[:3]),
        ("decoded", fit(common.to_picture(walk.decoded)),
         f"From the codes alone: PSNR {walk.psnr:.1f} dB, for {bits:.0f} bits, {bits / S ** 2:.3f} per pixel.")]

    titles, captions = ImageFont.load_default(30), ImageFont.load_default(25)
    sheet, y, number = Image.new("RGB", (width + 2 * GAP, 4000), "white"), GAP, 1
    pen = ImageDraw.Draw(sheet)
    for row in (first, pairs, last):
        ends = []
        for i, (title, panel, caption) in enumerate(row):
            x, below = GAP + i * (SIDE + GAP), y + 44 + panel.height + 12
            pen.text((x, y), f"{number}  {title}", fill="black", font=titles)
            sheet.paste(panel, (x, y + 44))
            text = wrap(caption, captions, panel.width)
            pen.multiline_text((x, below), text, fill="#333333", font=captions, spacing=6)
            ends.append(pen.multiline_textbbox((x, below), text, font=captions, spacing=6)[3])
            number += 1
        y = math.ceil(max(ends)) + GAP
    sheet = sheet.crop((0, 0, sheet.width, y + y % 2))
    return sheet.resize((sheet.width // 2, sheet.height // 2), Image.Resampling.LANCZOS)


def wrap(text, font, width):
    """The text with line breaks between words, so that no line is wider."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)


def walk_through(args):
    out = args.out or args.checkpoint.parent / "walk.png"
    sample.check_ending("--out", out)
    dq.require(0 <= args.seed < 2 ** 64, f"--seed must be at least 0 and below 2**64, not {args.seed}")
    dq.require(args.pairs >= 1, f"--pairs must be at least 1, not {args.pairs}")
    model, vae = dq.load_transformer(args.checkpoint, "cpu")
    size, classes = vae.config.size, model.config.classes
    if args.image:
        x, label, name = reading.load_image(args.image, size), -1, str(args.image)
    else:
        toy = reading.open_data(None, size)[1]
        x, label = toy[args.seed]
        name = f"held-out toy image {args.seed % len(toy)}"
        label = label if classes == toy.classes else -1                      # a model of other data has other classes
    if args.label is not None:
        label = sample.label_number(args.label, classes)
    class_name = sample.caption(label, classes) if label >= 0 else ""
    walk = Walk(model, vae, x, label)
    of_class = f"class {class_name}" if class_name else "no class"
    print(f"A walk through {name} ({size} x {size} pixels, {of_class}), by the models of {args.checkpoint}\n")
    print("\n".join([*tell_grains(walk), *tell_codes(walk), *tell_pairs(walk, args.pairs), *tell_moments(walk),
                     *tell_cost(walk)]))
    out.parent.mkdir(parents=True, exist_ok=True)
    common.save_picture(out, draw_walk(walk, class_name))
    print(f"\nwrote {out}")


# ------------------------------------------------------------------------------------------------
# neighbours: samples and their nearest training images


def nearest(x, pictures):
    """For each of x (n, 3, S, S), find the nearest of pictures (M, 3, S, S) and their mirror images.

    -> these (n, 3, S, S), mirrored where that is nearer, and the root mean squared differences (n,)
    """
    views = torch.stack([pictures, pictures.flip(3)], dim=1).flatten(0, 1)   # 2 M, 3, S, S
    distance = torch.cdist(x.flatten(1), views.flatten(1)) / x[0].numel() ** 0.5  # n, 2 M
    least, index = distance.min(dim=1)                                       # n
    return views[index], least


@torch.inference_mode()
def neighbours(args):
    """Draw samples. Print how far they, and reconstructed held-out images, are from the nearest training image."""
    out = args.out or args.checkpoint.parent / "neighbours.png"
    sample.check_ending("--out", out)
    columns = min(args.n, args.columns)
    dq.require(args.n % columns == 0, f"--n {args.n} is not a multiple of --columns {columns}")
    given = {name: getattr(args, name) for name in ("temperature", "cfg") if getattr(args, name) is not None}
    model, vae, options, _ = sample.load(args.checkpoint, "cpu", **given)
    classes, size = model.config.classes, vae.config.size
    parts = []
    for data in reading.open_data(args.data, size, skip=args.checkpoint.parent, held_out=args.held_out):
        pairs = map(data.__getitem__, range(len(data)))
        parts.append(torch.stack([x for x, label in pairs if label != reading.BROKEN]))
    train, held_out = parts                                                  # M, 3, S, S each
    label = torch.arange(args.n) % len(classes) if classes else torch.full((args.n,), -1)
    codes, _ = model.layout.unpack(*dq.generate(model, label, options, args.seed))
    x = vae.decode(codes).clamp(-1, 1)                                       # n, 3, S, S
    y = vae.decode(torch.cat([vae.encode(part)[0] for part in held_out.split(64)])).clamp(-1, 1)
    (near, distance), (_, usual) = nearest(x, train), nearest(y, train)
    captions = [sample.caption(int(k), classes) if classes else f"{i}" for i, k in enumerate(label)]
    rows = []
    for start in range(0, args.n, columns):
        part = slice(start, start + columns)
        for pictures, texts in ((x, captions[part]), (near, [f"rms {d:.2f}" for d in distance[part].tolist()])):
            rows += zip(map(common.to_picture, pictures[part]), texts)
    common.save_grid(out, [picture for picture, _ in rows], columns, [text for _, text in rows])
    print(f"root mean square difference to the nearest of {len(train)} training images, also mirrored (median, min "
          f"to max; pixels in [-1, 1])\n  {args.n} samples: {distance.median():.3f}, {distance.min():.3f} to "
          f"{distance.max():.3f}\n  {len(y)} held-out images, encoded and decoded: {usual.median():.3f}, "
          f"{usual.min():.3f} to {usual.max():.3f}\nwrote {out}")


# ------------------------------------------------------------------------------------------------
# teaser: README's first figure


def panel(rows, titles, side=144, gap=6):
    """Rows of (Pillow image, label) below one another, under a title for each column. -> Pillow image"""
    font, top = ImageFont.load_default(15), 26
    w, h = side + gap, side + 22
    sheet = Image.new("RGB", (len(titles) * w - gap, top + len(rows) * h), "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        pen.text((column * w + side / 2, 4), title, fill="black", font=font, anchor="ma")
        for row, cells in enumerate(rows):
            image, label = cells[column]
            sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), (column * w, top + row * h))
            pen.text((column * w + side / 2, top + row * h + side + 2), label, fill="#555555", anchor="ma",
                     font=ImageFont.load_default(13))
    return sheet


@torch.inference_mode()
def teaser(args):
    """Draw images, their tokens and reconstructions on the left, samples and their tokens on the right."""
    out = args.out or args.checkpoint.parent / "teaser.png"
    sample.check_ending("--out", out)
    model, vae = dq.load_transformer(args.checkpoint, "cpu")
    n, config, classes = len(args.images), vae.config, model.config.classes
    x = torch.stack([reading.load_image(path, config.size) for path in args.images])  # n, 3, S, S
    label = torch.full((2 * n,), sample.label_number(args.label, classes) if args.label else -1)
    options = dq.SampleOptions(args.temperature, cfg=args.cfg)
    codes, grains = vae.encode(x)                                            # n, H, W; n, h, w
    new, new_grains = model.layout.unpack(*dq.generate(model, label, options, args.seed))
    y, z = (vae.decode(each).clamp(-1, 1) for each in (codes, new))          # n and 2 n images, 3, S, S

    def tokens(image, grains):
        cells = torch.tensor(model.layout.cells)[grains].sum()
        return common.draw_grains(image, grains, config.factors), f"{cells} tokens"

    rows = []
    for i in range(n):
        psnr = 10 * math.log10(4 / (x[i] - y[i]).square().mean().item())
        left = [(common.to_picture(x[i]), ""), tokens(x[i], grains[i]), (common.to_picture(y[i]), f"{psnr:.1f} dB")]
        pairs = [[(common.to_picture(z[j]), ""), tokens(z[j], new_grains[j])] for j in (2 * i, 2 * i + 1)]
        rows.append(left + sum(pairs, []))
    titles = ["image", "where its tokens go", "reconstruction"]
    common.save_picture(out, panel(rows, [*titles, *("generated", "its tokens") * 2]))
    print(f"wrote {out}")


# ------------------------------------------------------------------------------------------------
# shrink: a checkpoint to distribute


def shrink(path, out):
    """Drop what only training needs. Round all weights to bfloat16 but the codebook, so that codes stay the same."""
    held = dq.load_checkpoint(path, "dq-transformer")
    dq.load_transformer(held, "cpu")                                         # so it is intact

    def rounded(weights):
        return {name: x.bfloat16() if x.is_floating_point() and not name.startswith("codebook") else x
                for name, x in weights.items()}
    kept = {name: held[name] for name in ("kind", "layout", "config", "vae_config", "step", "best",
                                           "sample_options") if name in held}
    kept |= {name: rounded(held[name]) for name in ("weights", "vae_weights")}
    dq.write_file(out, lambda file: torch.save(kept, file))
    print(f"wrote {out}, {out.stat().st_size / 1e6:.1f} MB instead of {path.stat().st_size / 1e6:.1f}")


# ------------------------------------------------------------------------------------------------
# The commands


def main(argv=None):
    argv, flags = split_flags(argv)                                          # flags: of train_vae.py
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    add = commands.add_parser("rd", help="rate and distortion of the routers",
                              epilog="Flags after -- are passed to train_vae.py.").add_argument
    add("out", metavar="OUT", type=Path, help="folder of the runs")
    add("--rows", metavar="NAME", nargs="+", choices=RD_ROWS, default=RD_ROWS, help=", ".join(RD_ROWS))
    add("--seeds", metavar="S", type=natural, nargs="+", default=[0])
    add("--jobs", type=positive, default=1, help="runs at a time")
    add("--factors", type=int, nargs=2, default=(8, 4))

    add = commands.add_parser("dial", help="models cut at other ratios").add_argument
    add("out", metavar="PNG", type=Path)
    add("checkpoints", metavar="CHECKPOINT", type=Path, nargs="+", help="a vae.pt; its folder's name is in the legend")
    add("--trained", metavar="CHECKPOINT", type=Path, nargs="+", default=[], help="evaluated at their own ratios only")

    add = commands.add_parser("log", help="curves of a run").add_argument
    add("log", metavar="FILE.jsonl", type=Path)

    add = commands.add_parser("walk", help="one image, step by step",
                              formatter_class=argparse.ArgumentDefaultsHelpFormatter).add_argument
    add("checkpoint", nargs="?", type=Path, default=Path("out/transformer.pt"), help="what train_transformer.py wrote")
    add("--image", metavar="FILE", type=Path, help="any image; None: a held-out toy image")
    add("--label", help="its class, by name or number; None: that of the toy image, or none")
    add("--seed", type=int, default=0, help="index of the toy image")
    add("--pairs", metavar="N", type=int, default=9, help="print at most so many pairs of each granularity")
    add("--out", metavar="PNG", type=Path, help="file to write; None: walk.png in the checkpoint's folder")

    add = commands.add_parser("teaser", help="images, their tokens, reconstructions and samples",
                              formatter_class=argparse.ArgumentDefaultsHelpFormatter).add_argument
    add("checkpoint", type=Path, help="what train_transformer.py wrote")
    add("images", metavar="FILE", type=Path, nargs="+", help="images to encode, a row for each")
    add("--label", metavar="CLASS", help="class of the samples, by name or number; None: no class")
    add("--temperature", type=float, default=1.0)
    add("--cfg", type=float, default=1.5, help="guidance")
    add("--seed", type=natural, default=0)
    add("--out", metavar="PNG", type=Path, help="None: teaser.png in the checkpoint's folder")

    add = commands.add_parser("neighbours", help="samples and their nearest training images",
                              formatter_class=argparse.ArgumentDefaultsHelpFormatter).add_argument
    add("checkpoint", type=Path, help="what train_transformer.py wrote")
    add("--data", metavar="DIR", help="its training images; None: the built-in toy shapes")
    add("--held-out", metavar="DIR", help="its validation images; None: a part of --data")
    add("--n", type=positive, default=8, help="number of samples")
    add("--columns", type=positive, default=8, help="samples in a row")
    add("--temperature", type=float, help="None: that of the checkpoint")
    add("--cfg", type=float, help="guidance; None: that of the checkpoint")
    add("--seed", type=natural, default=0)
    add("--out", metavar="PNG", type=Path, help="None: neighbours.png in the checkpoint's folder")

    add = commands.add_parser("shrink", help="a checkpoint for sample.py alone").add_argument
    add("checkpoint", type=Path, help="what train_transformer.py wrote")
    add("out", metavar="FILE.pt", type=Path)

    args = parser.parse_args(argv)
    if flags and args.command != "rd":
        parser.error(f"{args.command} takes nothing after --")
    if args.command == "rd":
        refuse(flags, "--out", "--seed", "--factors", "--ratios", "--router")
        rate_distortion(args.out, args.rows, args.seeds, flags, args.jobs, args.factors)
    elif args.command == "dial":
        dial(args.out, args.checkpoints, args.trained)
    elif args.command == "log":
        curves(args.log)
    elif args.command == "walk":
        walk_through(args)
    elif args.command == "neighbours":
        neighbours(args)
    elif args.command == "teaser":
        teaser(args)
    else:
        shrink(args.checkpoint, args.out)


if __name__ == "__main__":
    common.run(main)
