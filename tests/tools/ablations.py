"""Ablations of stage 2: each variant undoes one design choice and is measured in exact nats of the validation codes.

python tests/tools/ablations.py OUT [--codes FILE] [--seeds 0 1 2] [--only NAME ...] [--samples N]
                          [-- FLAGS of train_transformer.py]

Trains every variant with every seed in OUT/<variant>-<seed>, then prints a table. Stopped runs are resumed, and
finished runs are kept. With --samples it also samples N toy images from each model and compares them with N real images
as quality.py does. The design choices are those of the paper (coarse to fine, Table 7's input layers, two stacks and
their depths). The variants are:
    ours             what train_transformer.py trains: coarse to fine, row by row; 2 + 4 layers in the toy preset
    region-first     coarse to fine, but the fine codes of a region stand together
    fine-to-coarse   fine codes first
    raster           one raster scan over the finest grid, with each coarse code at its first cell
    region-raster    region by region, whatever the granularity
    no-rotary        no RoPE, as in the paper's model
    no-qk-norm       no QK-norm, as in the paper's model
    adamw            AdamW for all matrices, with its own learning rate
    former           region-first, no-rotary, no-qk-norm and adamw together, for 1,200 steps: an early version of this
                     project, except for its learning-rate schedule and initialisation
    shared-position  one embedding per location, shared by all granularities
    no-granularity   no embedding of the granularity
    no-order         no embedding of the step index
    single-stack     all layers in one stack, which predicts position and content from the same hidden state
    1+5, 3+3, ...    the same number of layers, divided differently between the two stacks

Each variant is a normalised distribution over the same images (test_ablations.py sums the probabilities), and all train
on the same codes, so their nats can be compared, also between seeds. sample.py refuses checkpoints with another token
order, because they name it. It can't recognise the other variants and would sample nonsense from them. Samples of each
variant are in its transformer.png.
"""
import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common  # noqa: E402
import data as reading  # noqa: E402
import dq  # noqa: E402
import quality  # noqa: E402
import train_transformer  # noqa: E402
from runs import flags_to_end, read_log, refuse, split_flags  # noqa: E402


# ------------------------------------------------------------------------------------------------
# Orders


class ReorderedLayout(dq.Layout):
    """The ids of dq.Layout, but a sequence is sorted by the `rank` (P,) of its ids.

    turn (P,): which granularity is written when, 0 for the first. home (P,): rank of the first cell of the id's region.
    """

    def __init__(self, size, factors):
        super().__init__(size, factors)
        rank, turn = torch.empty_like(self.grain), self.turns(self.grain)
        turn[self.is_eos] = self.grain[self.is_eos]                          # so `end` comes last
        rank[self.key(turn).argsort(stable=True)] = torch.arange(self.n_positions)
        home = torch.stack([rank[(turn == t) & (self.region == r)].min() for t, r in zip(turn, self.region)])
        # the first rank after the previous pair; row P, which is also row -1, is the start; `end` follows `end`
        behind = F.pad(rank + 1, (0, 1)).clamp(max=self.end)
        now = turn[rank.argsort()][behind]                                   # its turn
        for name, table in dict(rank=rank, turn=turn, home=home, behind=behind, now=now).items():
            self.register_buffer(name, table, persistent=False)

    def turns(self, grains):
        """Granularities -> their turns; -1 stands for none and stays."""
        return grains.clone()

    def pack(self, codes, grains):
        """codes (B, H, W), grains (B, h, w) -> pos, code, each (B, max_len)."""
        pos, code = super().pack(codes, grains)                              # B, L
        order = self.rank[pos].argsort(dim=1, stable=True)                   # B, L
        return pos.gather(1, order), code.gather(1, order)

    def legal(self, prev, grains):
        """dq.Layout.legal, with ranks for ids and turns for granularities."""
        behind, now = self.behind[prev][..., None], self.now[prev][..., None]  # B, (L,) 1
        turns = F.pad(self.turns(grains), (0, 1), value=-1)                  # B, N + 1: nothing covers an EOS
        taken = turns.gather(1, self.region.expand(len(grains), -1))         # B, P
        taken = taken if prev.dim() == 1 else taken[:, None]                 # B, (1,) P
        ahead = (self.rank >= behind) & (self.turn == now)                   # B, (L,) P
        due = (taken == self.turn) & (self.home < behind) | self.is_eos
        opens = (self.home == self.rank) & ((taken < 0) | (taken >= self.turn))
        stops = ahead & (due | opens & (now == self.n_grains - 1))
        return ahead & (due | opens) & (self.rank <= torch.where(stops, self.rank, self.end).amin(-1, keepdim=True))


class RegionFirstLayout(ReorderedLayout):
    """Coarse to fine, but the codes of a region stand together."""
    name = "coarse to fine, region by region"

    def key(self, turn):
        return turn * (self.n_regions + 1) + self.region                     # an EOS comes after all regions


class FineToCoarseLayout(ReorderedLayout):
    """The finest granularity first, each row by row. The remaining regions get coarser codes."""
    name = "fine to coarse, row by row"

    def turns(self, grains):
        return torch.where(grains < 0, -1, self.n_grains - 1 - grains)

    def key(self, turn):
        return 2 * turn + self.is_eos


class RasterLayout(dq.Layout):
    """All granularities at once: row by row over the finest grid, with each coarse code at its first cell.

    The first id of a region also tells its granularity. The image ends where its last region ends, so a normalised
    model needs no EOS. There is one nevertheless, because sampling and padding rely on it; its probability is 1, so it
    costs nothing. The EOS ids of the other granularities never occur. max_len and n_positions are those of dq.Layout,
    so both models have the same number of parameters.
    """
    name = "all granularities at once, row by row"

    def __init__(self, size, factors):
        super().__init__(size, factors)
        P, H = self.n_positions, self.fine_side
        first = torch.full((P, 2), H)                                        # row and column of an id's first cell
        for k, side in enumerate(self.sides):
            cells = torch.arange(side ** 2)
            first[self.offsets[k]:self.eos[k]] = torch.stack([cells // side, cells % side], 1) * (H // side)
        key = self.key(*first.unbind(1))                                     # P: equal for all first cells of a region
        key[self.is_eos] = H * H
        written = F.pad(key, (0, 1), value=-1)                               # row P, which is also row -1: the start
        for name, table in dict(rank=key, written=written, home=key[self.first_id]).items():
            self.register_buffer(name, table, persistent=False)

    def key(self, row, column):
        return row * self.fine_side + column

    def pack(self, codes, grains):
        """codes (B, H, W), grains (B, h, w) -> pos, code, each (B, max_len)."""
        pos, code = super().pack(codes, grains)                              # B, L
        order = self.rank[pos].argsort(dim=1, stable=True)                   # B, L: all EOS ids after the codes
        pos, code = pos.gather(1, order), code.gather(1, order)
        return torch.where(self.is_eos[pos], self.end, pos), code

    def legal(self, prev, grains):
        """As dq.Layout.legal: prev (B,) or (B, L), grains (B, N) -> mask (B, P) or (B, L, P).

        Valid are the ids at the first cell that is not covered: in an open region its next cell, otherwise the first
        cell of a region, in any granularity. The final granularities, given in training, also cover regions that are
        not open yet, but these are not looked up.
        """
        written = self.written[prev][..., None]                              # B, (L,) 1
        grains = F.pad(grains, (0, 1), value=-1)                             # B, N + 1
        taken = grains.gather(1, self.region.expand(len(grains), -1))        # B, P
        taken = taken if prev.dim() == 1 else taken[:, None]                 # B, (1,) P
        ids = torch.arange(self.n_positions, device=prev.device)
        due = (taken == self.grain) & (self.home <= written) & (self.rank > written) & ~self.is_eos
        opens = (self.first_id == ids) & (self.home > written) & ~self.is_eos
        may = due | opens | (ids == self.end)                                # B, (L,) P
        return may & (self.rank == torch.where(may, self.rank, self.fine_side ** 2).amin(-1, keepdim=True))


class RegionRasterLayout(RasterLayout):
    """All granularities at once, region by region, each row by row."""
    name = "all granularities at once, region by region"

    def key(self, row, column):
        m = self.fine_side // self.side                                      # side of a region, in finest cells
        return (row // m * self.side + column // m) * m * m + row % m * m + column % m


# ------------------------------------------------------------------------------------------------
# Input layers and stacks


def nothing(rows, C):
    """An embedding of zeros that is not trained; it replaces one that is removed."""
    return nn.Embedding.from_pretrained(torch.zeros(rows, C))


class PlaceEmbedding(nn.Embedding):
    """Embeds position ids, with one row for each cell of the finest grid (a code's first cell) and one for each EOS."""

    def __init__(self, layout, C):
        H = layout.fine_side
        super().__init__(H * H + layout.n_grains, C)
        nn.init.normal_(self.weight, std=0.02)                               # as all embeddings of DQTransformer
        grid = torch.arange(H * H).view(H, H)
        place = torch.empty(layout.n_positions, dtype=torch.long)
        for k, side in enumerate(layout.sides):
            step = H // side                                                 # side of a code, in finest cells
            place[layout.offsets[k]:layout.eos[k]] = grid[::step, ::step].flatten()
            place[layout.eos[k]] = H * H + k
        self.register_buffer("place", place, persistent=False)

    def forward(self, pos):
        return super().forward(self.place[pos])                              # ..., C


class SharedPosition(dq.DQTransformer):
    def __init__(self, config):
        super().__init__(config)
        self.position = PlaceEmbedding(self.layout, config.width)


class NoRotary(dq.DQTransformer):
    def __init__(self, config):
        super().__init__(replace(config, rotary=False))


class NoQKNorm(dq.DQTransformer):
    def __init__(self, config):
        super().__init__(replace(config, qk_norm=False))


class Former(NoRotary, NoQKNorm):
    """Neither RoPE nor QK-norm."""


class NoGranularity(dq.DQTransformer):
    def __init__(self, config):
        super().__init__(config)
        self.granularity = nothing(self.layout.n_grains, config.width)


class NoOrder(dq.DQTransformer):
    def __init__(self, config):
        super().__init__(config)
        self.order = nothing(self.layout.max_len, config.width)


class SingleStack(dq.DQTransformer):
    """p(image) = prod_t p(pos_t | before) p(code_t | before): a content is sampled without knowing its position.

    The position only decides whether there is a content: that of an EOS has probability 1, as always.
    """

    def __init__(self, config):
        super().__init__(config)
        self.position_stack.extend(self.content_stack)
        self.content_stack = nn.ModuleList()
        self.past = self.position                                            # for previous pairs only
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
        """Context manager in which the variant's classes replace those of dq."""
        return mock.patch.multiple(dq, Layout=self.layout, DQTransformer=self.model)


ADAMW = ("--optimizer", "adamw", "--lr", "1.5e-3")


def variants(flags):
    """{name: Variant}. flags: of train_transformer.py, for all variants; they set the total number of layers."""
    known = {"ours": Variant(), "region-first": Variant(RegionFirstLayout),
             "fine-to-coarse": Variant(FineToCoarseLayout), "raster": Variant(RasterLayout),
             "region-raster": Variant(RegionRasterLayout), "no-rotary": Variant(model=NoRotary),
             "no-qk-norm": Variant(model=NoQKNorm),
             "shared-position": Variant(model=SharedPosition), "no-granularity": Variant(model=NoGranularity),
             "no-order": Variant(model=NoOrder), "single-stack": Variant(model=SingleStack),
             "adamw": Variant(flags=ADAMW),
             "former": Variant(RegionFirstLayout, Former, (*ADAMW, "--steps", "1200"))}
    config = train_transformer.parse(flags)[1]
    depth = config.position_layers + config.content_layers
    for n in sorted({1, depth // 2, depth - 1} - {config.position_layers}):
        known[f"{n}+{depth - n}"] = Variant(flags=("--position-layers", f"{n}", "--content-layers", f"{depth - n}"))
    return known


def train(variant, out, codes, seed, flags):
    """Train a variant, or resume it, unless it is finished. -> the evaluations in its log"""
    argv = [*flags, *variant.flags, "--out", str(out), "--codes", str(codes), "--seed", str(seed)]
    steps = train_transformer.parse(argv)[2].steps
    with variant.classes():
        more = flags_to_end(out / "transformer.pt", steps)
        if more is not None:
            print(f"{out}:")
            train_transformer.main([*argv, *more])
    log = out / "transformer.jsonl"
    evaluations = [line for line in read_log(log) if "nats_per_image" in line]
    dq.require(evaluations and evaluations[-1]["step"] == steps, f"the evaluation of step {steps} is missing in {log}")
    return evaluations


@torch.no_grad()
def content_nats(variant, out, held_out, device, autocast):
    """-> list of nats per image, one for the contents of each granularity, coarse to fine"""
    with variant.classes():
        model, _ = dq.load_transformer(out / "transformer.pt", device)
    sums = torch.zeros(model.layout.n_grains)
    for index in torch.arange(len(held_out.label)).split(64):
        pos, code, label = train_transformer.sequences(held_out, index, model.layout, device)  # B, L; B, L; B
        with autocast():
            _, content = model.logits(pos, code, label)                      # B, L, V
        nll = F.cross_entropy(content.flatten(0, 1), code.flatten(), reduction="none", ignore_index=-1)  # B L
        sums.index_add_(0, model.layout.grain[pos].flatten().cpu(), nll.cpu())
    return (sums / len(held_out.label)).tolist()


def measure(variant, out, evaluator, autocast):
    """-> metrics of samples at temperature 1 without guidance, and of samples with sample.py's defaults"""
    with variant.classes():
        model, vae = dq.load_transformer(out / "transformer.pt", evaluator.device)
    return [evaluator.of_samples(model, vae, options, autocast) for options in (dq.SampleOptions(), quality.DEFAULTS)]


def samples_table(metrics, n):
    """metrics: {variant: for each seed, both results of `measure`} -> the lines of a markdown table"""
    lines = ["", f"{n} samples of each, against {n} real images: mean over seeds (range).", "",
             "| variant | FD, temperature 1 | FD, defaults | agreement, temperature 1 | agreement, defaults |",
             "|---" * 5 + "|"]
    for name, of_seeds in metrics.items():
        cells = [spread([both[i][key] for both in of_seeds], form)
                 for key, form in (("fd", ".2f"), ("agreement", ".3f")) for i in range(2)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def spread(values, form=".2f"):
    return f"{sum(values) / len(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def table(runs, contents, seeds):
    """runs: {variant: its evaluations for each seed}; contents: {variant: its `content_nats` for each seed}
    -> the lines of a markdown table"""
    nats = {name: [log[-1]["nats_per_image"] for log in logs] for name, logs in runs.items()}
    lines = [f"Held-out nats per image at the end of training, seeds {' '.join(map(str, seeds))}: mean (range). Minus "
             "ours: difference to ours with the same seed. Positions, contents of each granularity (coarse to fine): "
             "mean over seeds. Best: the lowest of all evaluations, mean over seeds.", "",
             "| variant | each seed | nats per image | minus ours | positions | contents | best |",
             "|---" * 7 + "|"]
    for name, logs in runs.items():
        against = [a - b for a, b in zip(nats[name], nats["ours"])] if "ours" in nats else []
        position = sum(log[-1]["position_nats"] for log in logs) / len(logs)
        best = sum(min(line["nats_per_image"] for line in log) for log in logs) / len(logs)
        each = ", ".join(f"{x:.2f}" for x in nats[name])
        of_grains = ", ".join(f"{sum(x) / len(x):.2f}" for x in zip(*contents[name]))
        lines.append(f"| {name} | {each} | {spread(nats[name])} | {spread(against) if against else ''} "
                     f"| {position:.2f} | {of_grains} | {best:.2f} |")
    return lines


def main(argv=None):
    argv, flags = split_flags(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for all runs")
    parser.add_argument("--codes", metavar="FILE", type=Path, default=Path("out/codes.pt"),
                        help="encoded images, written by train_vae.py")
    parser.add_argument("--seeds", metavar="SEED", type=common.natural, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", metavar="NAME", nargs="+", help="these variants instead of all")
    parser.add_argument("--samples", metavar="N", type=quality.several, help="images per set; default: no samples")
    args = parser.parse_args(argv)
    refuse(flags, "--out", "--codes", "--seed", "--resume")
    known = variants(flags)
    names = args.only or list(known)
    unknown = [name for name in names if name not in known]
    dq.require(not unknown, f"no such variant: {', '.join(unknown)}; choose from {', '.join(known)}")
    codes = train_transformer.read_codes(args.codes)                         # before a folder is created
    toy = codes["classes"] == reading.ToyShapes.classes
    dq.require(not args.samples or toy, "--samples is for the toy data")
    runs = {name: [] for name in names}
    for seed in args.seeds:                                                  # so one run of each comes early
        for name in names:
            runs[name].append(train(known[name], args.out / f"{name}-{seed}", args.codes, seed, flags))
    uncond = train_transformer.parse(flags)[0].uncond
    held_out = train_transformer.Images(codes["held_out"], codes["config"]["factors"], uncond)
    device, autocast, _ = common.pick_device("auto", "auto")
    contents = {name: [content_nats(known[name], args.out / f"{name}-{seed}", held_out, device, autocast)
                       for seed in args.seeds] for name in names}
    print("\n".join(table(runs, contents, args.seeds)))
    if args.samples:
        size = codes["config"]["size"]
        classifier = quality.kept_classifier(args.out / "classifier.pt", size, device)
        evaluator = quality.Evaluator(classifier, size, args.samples, 0, device)
        metrics = {name: [measure(known[name], args.out / f"{name}-{seed}", evaluator, autocast)
                          for seed in args.seeds] for name in names}
        print("\n".join(samples_table(metrics, args.samples)))


if __name__ == "__main__":
    common.run(main)
