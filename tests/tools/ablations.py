"""What the choices of stage 2 are worth: each is undone alone, and measured by exact held-out nats of the same codes.

python tests/tools/ablations.py OUT [--codes FILE] [--seeds 0 1 2] [--only NAME ...] [--samples N]
                          [-- FLAGS of train_transformer.py]

Trains every variant with every seed, in OUT/<variant>-<seed>, then prints a table. What was stopped goes on; what is
finished is not done again. With --samples it also draws N toy images by each model, and holds them against N real ones
as quality.py does. The choices are those of the paper (coarse to fine, Table 7's input layers, two stacks and
their depths), the variants:
    ours             what train_transformer.py trains: 2 + 4 layers in the toy preset
    raster           one region after the other, each in its granularity, instead of coarse to fine
    row-first        fine codes row by row over the whole image, as the authors write them, not region by region
    shared-position  one embedding of a place for all granularities
    no-granularity   no embedding of the granularity
    no-order         no embedding of the number of the pair
    single-stack     all layers in one stack, which predicts position and content from the same hidden state
    1+5, 3+3, ...    other shares of the two stacks in as many layers

Each is a proper distribution over the same images (test_ablations.py adds their probabilities up), so nats can
be compared, between seeds as well: all train on the same codes. Checkpoints of
the variants have the form of ours, but sample.py would read them as ours, so it draws nonsense from them; samples of
each are in its transformer.png.
"""
import argparse
import math
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common  # noqa: E402
import dq  # noqa: E402
import quality  # noqa: E402
import train_transformer  # noqa: E402
import train_vae  # noqa: E402
from figures import flags_to_end, refuse  # noqa: E402


# ------------------------------------------------------------------------------------------------
# Orders


class ReorderedLayout(dq.Layout):
    """The ids of dq.Layout, but a sequence is sorted by the `rank` (P,) of its ids. Sub-classes set it, and `legal`."""

    def pack(self, codes, grains):
        """codes (B, H, W), grains (B, h, w) -> pos, code, each (B, max_len)."""
        pos, code = super().pack(codes, grains)                              # B, L
        order = self.rank[pos].argsort(dim=1)                                # B, L
        return pos.gather(1, order), code.gather(1, order)


class RasterLayout(ReorderedLayout):
    """One region after the other, in raster order. The first id of a region tells its granularity, too.

    Where the last region ends the image does: nothing is left to say, and no EOS is needed for a normalised model.
    One stands there nevertheless, for sampling and padding know an end by it; it is certain and so costs nothing.
    The EOS ids of the other granularities never occur. max_len and n_positions remain those of dq.Layout, so models
    of the two have equally many parameters.
    """

    def __init__(self, size, factors):
        super().__init__(size, factors)
        P, N = self.n_positions, self.n_regions
        self.register_buffer("rank", self.region * P + torch.arange(P), persistent=False)  # by region, then id
        self.follow = torch.zeros(P + 1, P, dtype=torch.bool)                # row P, which is also row -1: the start
        cells = [self.offsets[k] + torch.arange(N * s).view(N, s) for k, s in enumerate(self.cells)]  # each N, s_k
        first = torch.stack([cell[:, 0] for cell in cells], dim=1)           # N, K
        self.follow[-1, first[0]] = True
        for cell in cells:
            self.follow[cell[:, :-1], cell[:, 1:]] = True                    # inside a region: its next cell
            self.follow[cell[:-1, -1:], first[1:]] = True                    # after it: the next, in any granularity
            self.follow[cell[-1, -1], self.end] = True
        self.follow[self.end, self.end] = True

    def pack(self, codes, grains):
        """codes (B, H, W), grains (B, h, w) -> pos, code, each (B, max_len)."""
        pos, code = super().pack(codes, grains)                              # B, L: all EOS ids are behind the codes
        return torch.where(self.is_eos[pos], self.end, pos), code

    def legal(self, prev, grains):
        """As dq.Layout.legal: prev (B,) or (B, L) -> mask (B, P) or (B, L, P). What is known of others doesn't matter:
        all regions before that of prev are there, and none behind it."""
        return self.follow[prev]


class RowFirstLayout(ReorderedLayout):
    """Coarse to fine, and inside a granularity row by row over the grid of all its cells, as the authors have it.

    The first row of cells of a row of regions decides which of these are of this granularity; the rows of cells below
    it then follow without a choice.
    """

    def __init__(self, size, factors):
        super().__init__(size, factors)
        P, h = self.n_positions, self.side
        rank = torch.arange(P)                                               # an EOS stays where it is
        home = torch.arange(P)                                               # rank of the region's first cell
        for k, s in enumerate(self.cells):
            c, ids = math.isqrt(s), torch.arange(self.offsets[k], self.eos[k])
            cell = ids.view(h, h, c, c)                                      # row and column of region, then of cell
            rank[cell.transpose(1, 2).flatten()] = ids                       # row of region, row of cell, the columns
            home[cell] = rank[cell[:, :, :1, :1]]
        # of the pair before, with row P, which is also row -1, for the start: its rank, and the granularity of what
        # comes next. An EOS leads to the next one, but for the last, which is followed by itself
        written, now = F.pad(rank, (0, 1), value=-1), F.pad(self.grain, (0, 1))
        now[self.eos[:-1]] += 1
        written[self.end] -= 1
        for name, table in dict(rank=rank, home=home, written=written, now=now).items():
            self.register_buffer(name, table, persistent=False)

    def legal(self, prev, grains):
        """As dq.Layout.legal: prev (B,) or (B, L), grains (B, N) -> mask (B, P) or (B, L, P).

        A region of this granularity is open from its first cell on, and its other cells then are due. So may come, of
        what lies ahead: the first cell that is due, or EOS if there is none; and before that the first cell of any
        region that nothing covers. In the finest granularity the first such region can't be passed over either.

        Final grains, as in training, tell of regions of this granularity that are not open yet: open is one only if
        its first cell is not ahead of prev. They tell of finer ones too, and these count as free. So the mask is the
        same as with the grains known at that step.
        """
        grains = F.pad(grains, (0, 1), value=-1)                             # B, N + 1: nothing covers an EOS
        covered = grains.gather(1, self.region.expand(len(grains), -1))      # B, P
        covered = covered if prev.dim() == 1 else covered[:, None]           # B, (1,) P
        written, now = self.written[prev][..., None], self.now[prev][..., None]  # B, (L,) 1
        ahead = (self.grain == now) & (self.rank > written)                  # B, (L,) P
        due = (covered == self.grain) & (self.home <= written) | self.is_eos
        opening = (self.home == self.rank) & ((covered < 0) | (covered >= self.grain))
        stops = ahead & (due | opening & (now == self.n_grains - 1))         # what can't be passed over
        limit = torch.where(stops, self.rank, self.n_positions).amin(-1, keepdim=True)  # B, (L,) 1
        return ahead & (due | opening) & (self.rank <= limit)


# ------------------------------------------------------------------------------------------------
# Input layers and stacks


def nothing(rows, C):
    """An embedding that adds nothing and is not trained, in the place of one that is taken out."""
    return nn.Embedding.from_pretrained(torch.zeros(rows, C))


class PlaceEmbedding(nn.Embedding):
    """Of position ids, with a row for each place on the finest grid, where a code's first cell lies, and each EOS."""

    def __init__(self, layout, C):
        H = layout.fine_side
        super().__init__(H * H + layout.n_grains, C)
        nn.init.normal_(self.weight, std=0.02)                               # as all embeddings of DQTransformer
        grid = torch.arange(H * H).view(H, H)
        place = torch.empty(layout.n_positions, dtype=torch.long)
        for k, s in enumerate(layout.cells):
            c = math.isqrt(s)
            step = H // (layout.side * c)                                    # finest cells in the side of a code's
            at = grid[::step, ::step].reshape(layout.side, c, layout.side, c).transpose(1, 2)  # h, h, c, c
            place[layout.offsets[k]:layout.eos[k]] = at.flatten()
            place[layout.eos[k]] = H * H + k
        self.register_buffer("place", place, persistent=False)

    def forward(self, pos):
        return super().forward(self.place[pos])                              # ..., C


class SharedPosition(dq.DQTransformer):
    def __init__(self, config):
        super().__init__(config)
        self.position = PlaceEmbedding(self.layout, config.width)


class NoGranularity(dq.DQTransformer):
    def __init__(self, config):
        super().__init__(config)
        self.granularity = nothing(self.layout.n_grains, config.width)


class NoOrder(dq.DQTransformer):
    def __init__(self, config):
        super().__init__(config)
        self.order = nothing(self.layout.max_len, config.width)


class SingleStack(dq.DQTransformer):
    """p(image) = prod_t p(pos_t | before) p(code_t | before): a content is drawn without knowing its place.

    (Only whether there is one depends on it: the content of an EOS is certain, as ever.)
    """

    def __init__(self, config):
        super().__init__(config)
        self.position_stack.extend(self.content_stack)
        self.content_stack = nn.ModuleList()
        self.past = self.position                                            # for the pairs before, and for these alone
        self.position = nothing(self.layout.n_positions, config.width)

    def embed(self, pos, code):
        return super().embed(pos, code) + self.past(pos)                     # ..., C


# ------------------------------------------------------------------------------------------------
# The command


class Variant(NamedTuple):
    layout: type = dq.Layout
    model: type = dq.DQTransformer
    flags: tuple = ()

    def classes(self):
        """with variant.classes(): its classes stand in for those of dq."""
        return mock.patch.multiple(dq, Layout=self.layout, DQTransformer=self.model)


def variants(flags):
    """{name: Variant}. flags: of train_transformer.py, for all of them; they say how many layers are to be shared."""
    known = {"ours": Variant(), "raster": Variant(RasterLayout), "row-first": Variant(RowFirstLayout),
             "shared-position": Variant(model=SharedPosition), "no-granularity": Variant(model=NoGranularity),
             "no-order": Variant(model=NoOrder), "single-stack": Variant(model=SingleStack)}
    args = train_transformer.parse(flags)[0]
    depth = args.position_layers + args.content_layers
    for n in sorted({1, depth // 2, depth - 1} - {args.position_layers}):
        known[f"{n}+{depth - n}"] = Variant(flags=("--position-layers", f"{n}", "--content-layers", f"{depth - n}"))
    return known


def train(variant, out, codes, seed, flags):
    """Train a variant, or go on with it, unless it is finished. -> the lines of its log that are evaluations"""
    argv = [*flags, *variant.flags, "--out", str(out), "--codes", str(codes), "--seed", str(seed)]
    steps = train_transformer.parse(argv)[0].steps
    more = flags_to_end(out / "transformer.pt", steps)
    if more is not None:
        print(f"{out}:")
        with variant.classes():
            train_transformer.main([*argv, *more])
    log = out / "transformer.jsonl"
    evaluations = [line for line in common.read_log(log) if "nats_per_image" in line]
    dq.require(evaluations and evaluations[-1]["step"] == steps, f"the evaluation of step {steps} is missing in {log}")
    return evaluations


def measure(variant, out, judge, autocast):
    """-> figures of samples at temperature 1 without guidance, and as sample.py draws them by default"""
    with variant.classes():
        model, vae = dq.load_transformer(out / "transformer.pt", judge.device)
    return [judge.of_samples(model, vae, options, autocast) for options in (dq.SampleOptions(), quality.DEFAULTS)]


def samples_table(figures, n):
    """figures: {variant: for each seed, both of `measure`} -> the lines of a markdown table"""
    lines = ["", f"{n} samples of each, against {n} real images: mean over the seeds (range).", "",
             "| variant | FD, temperature 1 | FD, defaults | agreement, temperature 1 | agreement, defaults |",
             "|---" * 5 + "|"]
    for name, of_seeds in figures.items():
        cells = [spread([both[i][key] for both in of_seeds], form)
                 for key, form in (("fd", ".2f"), ("agreement", ".3f")) for i in range(2)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def spread(values, form=".2f"):
    return f"{sum(values) / len(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def table(runs, seeds):
    """runs: {variant: for each seed its evaluations} -> the lines of a markdown table"""
    nats = {name: [log[-1]["nats_per_image"] for log in logs] for name, logs in runs.items()}
    lines = [f"Held-out nats an image at the end of training, seeds {' '.join(map(str, seeds))}: mean (range). Minus "
             "ours: of the same seed. Best: the lowest of all evaluations, mean of the seeds.", "",
             "| variant | each seed | nats an image | minus ours | of these, positions | best |", "|---" * 6 + "|"]
    for name, logs in runs.items():
        against = [a - b for a, b in zip(nats[name], nats["ours"])] if "ours" in nats else []
        position = sum(log[-1]["position_nats"] for log in logs) / len(logs)
        best = sum(min(line["nats_per_image"] for line in log) for log in logs) / len(logs)
        each = ", ".join(f"{x:.2f}" for x in nats[name])
        lines.append(f"| {name} | {each} | {spread(nats[name])} | {spread(against) if against else ''} "
                     f"| {position:.2f} | {best:.2f} |")
    return lines


def main(argv=None):
    argv = sys.argv[1:] if argv is None else [str(word) for word in argv]
    own, flags = (argv[:argv.index("--")], argv[argv.index("--") + 1:]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT", type=Path, help="folder of all runs")
    parser.add_argument("--codes", metavar="FILE", type=Path, default=Path("out/codes.pt"),
                        help="what train_vae.py wrote")
    parser.add_argument("--seeds", metavar="SEED", type=common.natural, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", metavar="NAME", nargs="+", help="these variants instead of all")
    parser.add_argument("--samples", metavar="N", type=quality.several, help="images a set; None: no samples")
    args = parser.parse_args(own)
    refuse(flags, "--out", "--codes", "--seed", "--resume")
    known = variants(flags)
    names = args.only or list(known)
    unknown = [name for name in names if name not in known]
    dq.require(not unknown, f"no such variant: {', '.join(unknown)}; there are {', '.join(known)}")
    codes = train_transformer.read_codes(args.codes)                         # before a folder is made
    toy = codes["classes"] == train_vae.ToyShapes.classes
    dq.require(not args.samples or toy, "--samples is for the toy data")
    runs = {name: [] for name in names}
    for seed in args.seeds:                                                  # so that all are there early, once
        for name in names:
            runs[name].append(train(known[name], args.out / f"{name}-{seed}", args.codes, seed, flags))
    print("\n".join(table(runs, args.seeds)))
    if args.samples:
        device, autocast = common.pick_device("auto", "auto")
        size = codes["config"]["size"]
        classifier = quality.kept_classifier(args.out / "classifier.pt", size, device)
        judge = quality.Judge(classifier, size, args.samples, 0, device)
        figures = {name: [measure(known[name], args.out / f"{name}-{seed}", judge, autocast) for seed in args.seeds]
                   for name in names}
        print("\n".join(samples_table(figures, args.samples)))


if __name__ == "__main__":
    common.run(main)
