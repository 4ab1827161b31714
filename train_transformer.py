"""Stage 2: codes.pt -> DQ-Transformer checkpoint.    python train_transformer.py

Reads what train_vae.py leaves at its end: every image as codes, and the frozen DQ-VAE; it never sees a pixel. Writes
into --out: transformer.pt (checkpoint, all that sample.py needs), transformer.best.pt (that of the lowest held-out
loss), transformer.jsonl (log), transformer.png (samples, and where their codes are).
"""
import argparse
import contextlib
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import dq
from common import (PATIENCE, Record, Schedule, Stop, distribute, draw_grains, machine, number, override, positive,
                    prepare, read_log, run, save_grid, say, seed_all, shuffled_indices, to_picture, trainer_flags)


@dataclass
class TransformerSchedule(Schedule):
    """How stage 2 is trained."""
    decay: str = "linear"                # 3 nats better than a cosine, on the toy data
    optimizer: str = "muon"              # for the matrices of the blocks; all else, or with "adamw" all, has AdamW


# The paper's model; size, factors and codebook of each come from the DQ-VAE, the classes from the data.
LARGE = dq.TransformerConfig(width=1024, heads=8, position_layers=6, content_layers=18, dropout=0.1, rotary=False)
PAPER = TransformerSchedule(steps=507_000, batch_size=240, accumulate=4, lr=5e-4, betas=(0.9, 0.95),
                            weight_decay=0.01, warmup=1000, eval_every=5000,
                            decay="cosine", optimizer="adamw")               # 100 epochs of 1,217,000 images

PRESETS = {                                                                  # what each is for: train_vae.py
    "toy": (
        dq.TransformerConfig(qk_norm=True),
        TransformerSchedule(steps=800, batch_size=32, lr=5e-3, weight_decay=0.05, accumulate=2, eval_every=200)),
    "toy64": (
        dq.TransformerConfig(width=256, heads=8, content_layers=6, qk_norm=True),
        TransformerSchedule(steps=6000, batch_size=64, lr=3e-3, weight_decay=0.05)),
    "emoji64": (
        dq.TransformerConfig(width=160, heads=5, content_layers=6, dropout=0.3, qk_norm=True),
        TransformerSchedule(steps=5000, batch_size=64, lr=3e-3, weight_decay=0.1)),
    "earth64": (
        dq.TransformerConfig(width=192, heads=6, content_layers=6, dropout=0.1, qk_norm=True),
        TransformerSchedule(steps=4500, batch_size=96, lr=3e-3, weight_decay=0.1, eval_every=750)),
    "emoji128": (
        dq.TransformerConfig(width=384, heads=6, position_layers=3, content_layers=9, dropout=0.1, qk_norm=True),
        TransformerSchedule(steps=20_000, batch_size=64, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05,
                            eval_every=1000)),
    "ffhq256": (LARGE, replace(PAPER, steps=27_700, eval_every=1000)),       # 100 epochs of 66,500 images
    "imagenet256": (LARGE, PAPER),
    "imagenet256-triple": (LARGE, PAPER),
}


# ------------------------------------------------------------------------------------------------
# Flags and data


def parse(argv=None):
    """-> the flags, and the preset's config and schedule"""
    first = argparse.ArgumentParser(add_help=False)                          # the preset, from which defaults come
    first.add_argument("--codes", type=Path)
    first.add_argument("--out", type=Path, default=Path("out"))
    known = first.parse_known_args(argv)[0]
    path, preset = known.codes or known.out / "codes.pt", "toy"
    with contextlib.suppress(Exception):                                     # whatever it is, `read_codes` will say it
        preset = torch.load(path, mmap=True, weights_only=True)["preset"]
    parser, config, schedule = trainer_flags("Train a DQ-Transformer on the codes of a DQ-VAE.", PRESETS, argv,
                                             preset if preset in PRESETS else "toy")
    add, share = parser.add_argument, number(float, 0, below=1)
    add("--codes", metavar="FILE", type=Path, default=path, help="what train_vae.py wrote, the preset's name included")
    add("--position-layers", type=positive, default=config.position_layers, help="layers of the position stack")
    add("--content-layers", type=positive, default=config.content_layers, help="layers of the content stack")
    add("--width", type=positive, default=config.width, help="channels")
    add("--heads", type=positive, default=config.heads, help="attention heads")
    add("--dropout", type=share, default=config.dropout, help="dropout")
    add("--label-dropout", type=share, default=config.label_dropout, help="share of images whose label is hidden")
    add("--optimizer", choices=["muon", "adamw"], default=schedule.optimizer,
        help="adamw, or muon for the matrices of the blocks and adamw for the rest")
    add("--uncond", action="store_true", help="ignore the labels")
    args = parser.parse_args(argv)
    return args, config, override(schedule, args)


def read_codes(path):
    """-> the dict that train_vae.py wrote. Its tensors lie in the file, and processes share what they read of it."""
    try:
        stored = dq.load_checkpoint(path, "dq-codes")
        dq.require(stored.get("version") == 1, f"{path} is of another version")
        return stored
    except dq.UserError as error:
        raise dq.UserError(f"{error}; to make it from a DQ-VAE: python train_vae.py --encode "
                           f"{path.with_name('vae.pt')} --out {path.parent}") from None


class Images(NamedTuple):
    """Images as codes: M of them, on the CPU, in small integers."""
    codes: torch.Tensor                  # M, H, W
    grains: torch.Tensor                 # M, h, w
    label: torch.Tensor                  # M: -1 without a class
    length: torch.Tensor                 # M: pairs in their sequences, up to and with the last EOS


def views(part, factors, uncond):
    """A part of codes.pt (codes (M, views, H, W), grains, label (M,)) -> Images, the views of one after the other."""
    codes, grains = part["codes"].flatten(0, 1), part["grains"].flatten(0, 1)
    label = part["label"].repeat_interleave(part["codes"].shape[1])
    cells = torch.tensor([(factors[0] // f) ** 2 for f in factors])          # K: codes of a region
    length = torch.cat([cells[each.long()].sum(dim=(1, 2)) for each in grains.split(65_536)]) + len(factors)
    return Images(codes, grains, torch.full_like(label, -1, dtype=torch.int8) if uncond else label, length)


def batches(length, batch_size, seed, start=0):
    """Endless batches of image numbers (batch_size,), in the order of `deal`; inside a batch they are sorted by length
    (M,), so that parts of it need little padding. (Whole batches of like length would need less, but learned less: by
    AdamW, 168 nats against 164 after 600 steps on the toy data.)"""
    for batch in shuffled_indices(len(length), batch_size, seed, start):
        index = np.array(batch) % len(length)
        yield torch.from_numpy(index[np.argsort(length[index], kind="stable")])


def sequences(images, index, layout, device):
    """The images of these numbers (B,) as pos, code (B, L), label (B,) on the device, L just as long as they need,
    rounded up: GPUs compute in eights, and few different shapes mean few compilations."""
    batch = [x[index] for x in (images.codes, images.grains, images.label)]
    if device.type == "cuda":
        batch = [x.pin_memory() for x in batch]                              # else the copy would wait for the device
    codes, grains, label = (x.to(device, non_blocking=True).long() for x in batch)
    pos, code = layout.pack(codes, grains)                                   # B, max_len
    multiple = 8 if device.type == "cuda" else 2
    columns = -(-int(images.length[index].max()) // multiple) * multiple
    return pos[:, :columns], code[:, :columns], label


# ------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def evaluate(model, held_out, device, autocast, batch_size=64, limit=None):
    """Validation metrics: the negative log-likelihood per image, code and pixel. Each rank evaluates its part of the
    images. limit: how many images at most, always the same; None: all."""
    model.eval()
    rank, world = dq.rank_world()
    if limit and len(held_out.label) > limit:
        held_out = Images(*(x[dq.numpy_rng(0).permutation(len(x))[:limit]] for x in held_out))
    sums = torch.zeros(2, device=device)
    for index in held_out.length.argsort().split(batch_size)[rank::world]:   # similar lengths, so little padding
        pos, code, label = sequences(held_out, index, model.layout, device)  # B, L; B, L; B
        with autocast():
            nll = model(pos, code, label)
        sums += torch.stack([nll["position"].sum(), nll["content"].sum()])
    model.train()
    position, content = (dq.all_reduce_sum(sums) / len(held_out.label)).tolist()
    codes = (held_out.length - len(model.config.factors)).float().mean().item()
    bits = (position + content) / math.log(2)
    return dict(nats_per_image=position + content, position_nats=position, content_nats=content,
                bits_per_code=bits / codes, bits_per_pixel=bits / model.config.size ** 2, codes_per_image=codes)


def draw_samples(path, model, vae, seed, autocast, n=16, batch_size=64):
    """A grid of samples, each beside the places of its codes."""
    model.eval()
    label = torch.arange(n, device=vae.codebook.codes.device) % max(1, len(model.config.classes))
    codes, grains = model.layout.unpack(*dq.generate(model, label, seed=seed, slots=batch_size))
    with autocast(), torch.no_grad():
        images = torch.cat([vae.decode(part) for part in codes.split(batch_size)])
    model.train()
    pairs = [(to_picture(x), draw_grains(x, g, vae.config.factors)) for x, g in zip(images, grains)]
    save_grid(path, sum(pairs, ()), columns=8)


# ------------------------------------------------------------------------------------------------
# Training


def make_optimizers(model, schedule):
    """-> {name: optimiser}. Muon (Jordan et al., 2024) moves a matrix by its momentum with all singular values made
    alike, scaled here to the size of AdamW's steps, so that one learning rate does for both."""
    stacks = [*model.position_stack.parameters(), *model.content_stack.parameters()]
    inside = [p for p in stacks if p.dim() == 2] if schedule.optimizer == "muon" else []
    outside = [p for p in model.parameters() if p not in {*inside}]
    groups = [dict(params=[p for p in outside if p.dim() > 1], weight_decay=schedule.weight_decay),
              dict(params=[p for p in outside if p.dim() <= 1], weight_decay=0.0)]
    optimizers = dict(optimizer=torch.optim.AdamW(groups, lr=schedule.lr, betas=schedule.betas, fused=True))
    if inside:
        optimizers["muon"] = torch.optim.Muon(inside, lr=schedule.lr, weight_decay=schedule.weight_decay,
                                              adjust_lr_fn="match_rms_adamw")
    return optimizers


def main(argv=None):
    args, config, schedule = parse(argv)
    device, autocast = prepare(args)
    rank, world = dq.rank_world()
    stored = read_codes(args.codes)
    vae = dq.rebuild(dq.DQVAE, dq.VAEConfig, stored["config"], stored["weights"], device)
    factors, classes = vae.config.factors, stored["classes"]
    train, held_out = (views(stored[part], factors, args.uncond) for part in ("train", "held_out"))
    mirrored = ", with their mirror images" * (stored["train"]["codes"].shape[1] > 1)
    say(f"codes: {args.codes}, {stored['name']}, {len(train.label)} to train on{mirrored}, {len(held_out.label)} held "
        f"out; {len(classes)} classes; preset {args.preset}")
    config = override(config, args, size=vae.config.size, factors=factors, codebook_size=vae.config.codebook_size,
                      classes=() if args.uncond else classes)

    seed_all(args.seed)
    model = dq.DQTransformer(config).to(device)
    optimizers = make_optimizers(model, schedule)
    settings = dict(codes=stored["name"], seed=args.seed) | asdict(schedule) | machine(device, autocast)
    extra = dict(vae_config=asdict(vae.config), vae_weights=vae.state_dict())
    record = Record(args, args.out / "transformer.pt", config, settings, model, optimizers, extra)
    record.begin()
    evaluated = [line["step"] for line in read_log(args.out / "transformer.jsonl") if "nats_per_image" in line]
    if record.step >= schedule.steps and record.step in evaluated:
        return say(f"nothing left to do: {record.path} is at step {record.step}")
    forward = distribute(torch.compile(model) if args.compile else model)
    order = batches(train.length.numpy(), schedule.batch_size, args.seed, record.step)
    codes_per_image = (train.length - len(factors)).float().mean().item()

    def validate(step):
        metrics = evaluate(model, held_out, device, autocast, args.part, limit=512)
        if rank == 0:
            draw_samples(args.out / "transformer.png", model, vae, args.seed, autocast, batch_size=args.part)
        record.evaluated(step, metrics, metrics["nats_per_image"])

    model.train()
    with Stop(device, PATIENCE) as stop:
        for step in record.start("DQ-Transformer"):
            if record.evaluates(step):
                validate(step)
            done = step + 1
            seed_all(args.seed, step, rank)                                  # every process drops other units
            for optimizer in optimizers.values():
                optimizer.zero_grad(set_to_none=True)
                for group in optimizer.param_groups:
                    group["lr"] = schedule.learning_rate(step)
            for part in next(order)[rank::world].chunk(schedule.accumulate):
                pos, code, label = sequences(train, part, model.layout, device)  # B / parts, L; the same; B / parts
                with autocast():
                    nll = forward(pos, code, label)
                # summed over the parts and averaged over the processes, as backward does, it is the mean of the batch
                position, content = (nll[name].sum() * world / schedule.batch_size for name in ("position", "content"))
                # nats per code; by the mean number of codes, so that every image counts for what it costs
                loss = (position + content) / codes_per_image
                loss.backward()
                record.add(done, dict(bits_per_code=loss / math.log(2), position_nats=position, content_nats=content))
            if schedule.clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), schedule.clip)
            for optimizer in optimizers.values():
                optimizer.step()

            saves, stops = record.after(done, stop)
            if saves:
                record.save(done)
            if stops:
                stop.leave(stops, f"after step {done}, saved in {record.path}")
        validate(record.step)
    say(f"done: {record.path}, {args.out / 'transformer.png'} and {record.log}")


if __name__ == "__main__":
    run(main)
