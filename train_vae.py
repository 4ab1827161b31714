"""Stage 1: images -> DQ-VAE checkpoint.    python train_vae.py [--data DIR]

Writes into --out: vae.pt (checkpoint), vae.jsonl (log), vae.png (original | reconstruction | grains).
"""
import argparse
import json
import math
import os
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import dq


# ------------------------------------------------------------------------------------------------
# What both training scripts share


def common_flags(description, stage, argv):
    """A parser with the flags that both have, and the preset that gives the defaults.

    stage: "train_vae" or "train_transformer", a field of dq.Preset.
    """
    chooser = argparse.ArgumentParser(add_help=False)
    chooser.add_argument("--preset", choices=dq.PRESETS, default="toy", help="sizes and schedule; the other flags override it")
    preset = dq.PRESETS[chooser.parse_known_args(argv)[0].preset]
    train = getattr(preset, stage)
    parser = argparse.ArgumentParser(description=description, parents=[chooser], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", metavar="DIR", help="folder of images; None: the built-in toy shapes")
    add("--out", metavar="DIR", type=Path, default=Path("out"), help="folder that the run writes")
    add("--steps", type=int, default=train.steps, help="optimiser steps")
    add("--batch-size", type=int, default=train.batch_size, help="images a step")
    add("--lr", type=float, default=train.lr, help="highest learning rate")
    add("--seed", type=int, default=0, help="of weights, data order and noise")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--dtype", choices=["auto", "bf16", "fp32"], default="auto", help="auto: bf16 where the hardware has it")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--workers", type=int, default=0, help="processes that load images")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--eval-every", type=int, default=train.eval_every, help="steps between evaluations and checkpoints")
    return parser, preset


def prepare(args):
    """Refuse what can't be trained; make the output folder."""
    for name in ("steps", "batch_size", "eval_every"):
        dq.require(getattr(args, name) >= 1, f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    for name in ("seed", "workers"):
        dq.require(getattr(args, name) >= 0, f"--{name} must be at least 0, not {getattr(args, name)}")
    dq.require(args.lr > 0, f"--lr must be above 0, not {args.lr}")
    args.out.mkdir(parents=True, exist_ok=True)


def open_data(folder, size, split, augment=False, seed=0):
    """The images of --data, or the toy data where there is no folder."""
    if folder:
        return dq.ImageFolder(folder, size, split, augment, seed)
    return dq.ToyShapes(size, seed=seed) if split == "train" else dq.ToyShapes(size, n=512, seed=seed + 1_000_003)


def stream(dataset, batch_size, seed, start=0, workers=0):
    """Endless batches in a fresh random order every epoch, from batch number `start` on.

    Batch number b is a function of (seed, batch size, b) alone, so a resumed run sees what it would have seen.
    """
    class Order(torch.utils.data.Sampler):
        def __iter__(self):
            n, place = len(dataset), start * batch_size
            while True:
                epoch, skip = divmod(place, n)
                order = np.random.default_rng([seed, epoch]).permutation(n)[skip:]
                yield from (epoch * n + int(i) for i in order)
                place += len(order)

    loader = torch.utils.data.DataLoader(dataset, batch_size, sampler=Order(), num_workers=workers,
                                         generator=torch.Generator(), pin_memory=torch.cuda.is_available())
    return iter(loader)


def learning_rate(step, args, warmup):
    """Linear warm-up, then cosine to zero."""
    if step < warmup:
        return args.lr * (step + 1) / warmup
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, args.steps - warmup)))


def training_state(step, optimizer):
    """What a checkpoint holds besides the model, for an exact resume."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return dict(step=step, optimizer=optimizer.state_dict(), rng=torch.get_rng_state(), cuda_rng=cuda)


def restore(path, kind, config, model, optimizer):
    """Load a checkpoint in order to go on with the command that wrote it. -> number of steps that are done"""
    checkpoint = dq.load_checkpoint(path, kind)
    dq.require(checkpoint.get("config") == asdict(config), f"{path} has other settings than this command; give the same flags, or leave --resume out")
    model.load_state_dict(checkpoint["weights"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    torch.set_rng_state(checkpoint["rng"])
    if checkpoint["cuda_rng"] and torch.cuda.is_available():
        for device, state in zip(range(torch.cuda.device_count()), checkpoint["cuda_rng"]):
            torch.cuda.set_rng_state(state, device)
    return checkpoint["step"]


def keep_former(path):
    """A run that starts anew in a folder that holds one doesn't destroy its checkpoint."""
    if path.exists():
        former = path.with_suffix(".former.pt")
        os.replace(path, former)
        print(f"{path} of a former run is now {former} (--resume would have gone on with it)")


class Log:
    """Shows values on the terminal and appends them to a file, one JSON object a line."""

    def __init__(self, path, resume):
        self.file = open(path, "a" if resume else "w", buffering=1)

    def __call__(self, step, values, bar=None):
        self.file.write(json.dumps(dict(step=step) | {k: round(v, 5) if isinstance(v, float) else v for k, v in values.items()}) + "\n")
        text = {k: f"{v:.3f}" if isinstance(v, float) else f"{v}" for k, v in values.items()}
        if bar is not None:
            bar.set_postfix(text, refresh=False)
        else:
            tqdm.write(f"step {step}: " + ", ".join(f"{k} {v}" for k, v in text.items()))


# ------------------------------------------------------------------------------------------------


def parse(argv=None):
    parser, preset = common_flags("Train a DQ-VAE: images to variable-length codes and back.", "train_vae", argv)
    vae, add = preset.vae, parser.add_argument
    add("--size", type=int, default=vae.size, help="side of the images, pixels")
    add("--factors", type=int, nargs="+", default=vae.factors, help="downsampling factors, coarse to fine; one: fixed length")
    add("--ratios", type=float, nargs="+", help="share of regions per factor; None: the preset's, or equal shares")
    add("--router", choices=["learned", "entropy", "random"], default=vae.router, help="what picks the granularities")
    add("--codebook-size", type=int, default=vae.codebook_size, help="number of codes")
    add("--code-dim", type=int, default=vae.code_dim, help="dimension of a code")
    add("--budget-weight", type=float, default=preset.train_vae.budget_weight, help="weight of the budget loss")
    return parser.parse_args(argv), preset


def gumbel_scale(step, steps):
    """1 until half of training, 0 from 90 % on: the gate explores first and then learns its argmax."""
    return min(1.0, max(0.0, (0.9 - step / steps) / 0.4))


def auc(score, truth):
    """Area under the ROC curve: how often a detailed region scores above a smooth one. Ties count half."""
    values, inverse, counts = score.flatten().unique(return_inverse=True, return_counts=True)
    rank = (counts.cumsum(0) - (counts - 1) / 2)[inverse]                    # mean rank of each value, from 1
    truth = truth.flatten()
    n_true, n_false = truth.sum(), (~truth).sum()
    return ((rank[truth].double().sum() - n_true * (n_true + 1) / 2) / (n_true * n_false)).item()


@torch.no_grad()
def evaluate(model, images, detailed, autocast, batch_size=64):
    """Held-out images (M, 3, S, S) -> figures, and the outputs. detailed: (M, h, w), the truth, or None."""
    model.eval()
    outputs, scores = [], []
    for x in images.split(batch_size):
        with autocast():
            maps = model.encoder(x)
            scores.append(model.router.score(x, maps).float())
            outputs.append(model(x))
    model.train()
    y = torch.cat([o.reconstruction.float() for o in outputs]).clamp(-1, 1)
    codes, grains = (torch.cat([getattr(o, name) for o in outputs]) for name in ("codes", "grains"))
    config = model.config
    cells = torch.tensor([(config.factors[0] // f) ** 2 for f in config.factors], device=grains.device)
    share = torch.stack([(grains == k).float().mean() for k in range(len(cells))])
    # every code counts once: a cell of the finest grid is 1 / (cells that share its code)
    weight = dq.upsample((cells[grains] / cells[-1])[:, None], codes.shape[-1])[:, 0]
    use = torch.zeros(config.codebook_size, device=grains.device).index_add_(0, codes.flatten(), weight.flatten())
    p = use / use.sum()
    figures = dict(
        psnr=(10 * torch.log10(4 / (y - images).square().mean(dim=(1, 2, 3)))).mean().item(),
        l1=(y - images).abs().mean().item(),
        codes_per_image=cells[grains].sum(dim=(1, 2)).float().mean().item(),
        share=[round(s, 4) for s in share.tolist()],
        perplexity=torch.exp(-(p * (p + 1e-12).log()).sum()).item(),
        codebook_used=(use > 0).float().mean().item())
    if detailed is not None and len(cells) > 1 and 0 < detailed.sum() < detailed.numel():
        figures |= dict(auc=auc(torch.cat(scores), detailed), auc_argmax=auc(grains, detailed))
    return figures, y, grains


def main(argv=None):
    args, preset = parse(argv)
    ratios = args.ratios or (preset.vae.ratios if len(args.factors) == len(preset.vae.factors) else [1 / len(args.factors)] * len(args.factors))
    config = replace(preset.vae, size=args.size, factors=args.factors, ratios=ratios, router=args.router,
                     codebook_size=args.codebook_size, code_dim=args.code_dim)
    train = preset.train_vae
    prepare(args)
    device, autocast = dq.pick_device(args.device, args.dtype)
    data = open_data(args.data, config.size, "train", augment=True, seed=args.seed)
    held_out = open_data(args.data, config.size, "val")
    shown = min(len(held_out), 512)
    images = torch.stack([held_out[i][0] for i in range(shown)]).to(device)  # M, 3, S, S
    detailed = None
    if not args.data:                                                        # only the toy data knows the truth
        masks = torch.stack([held_out.detail_mask(i) for i in range(shown)]).float()
        detailed = F.avg_pool2d(masks, config.factors[0]).to(device) > 0.1   # M, h, w

    torch.manual_seed(args.seed)
    # GPUs convolve faster with channels last; on CPUs group norm is many times slower that way
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    model = dq.DQVAE(config).to(device, memory_format=layout)
    if config.router == "entropy":
        sample = stream(data, args.batch_size, args.seed)
        model.router.calibrate(next(sample)[0].to(device) for _ in range(max(1, 2048 // args.batch_size)))
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, betas=train.betas)
    path, start = args.out / "vae.pt", 0
    if args.resume:
        start = restore(path, "dq-vae", config, model, optimizer)
    else:
        keep_former(path)
    batches = stream(data, args.batch_size, args.seed, start, args.workers)
    log = Log(args.out / "vae.jsonl", args.resume)
    forward = torch.compile(model) if args.compile else model

    model.train()
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, desc="DQ-VAE", disable=None)
    for step in bar:
        x = next(batches)[0].to(device, memory_format=layout, non_blocking=True)  # B, 3, S, S
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args, train.warmup)
        with autocast():
            out = forward(x, gumbel_scale(step, args.steps))
        y = out.reconstruction.float()
        l1, l2 = (y - x).abs().mean(), (y - x).square().mean()
        budget = dq.budget_loss(out.gate, config.ratios)
        loss = l1 + l2 + out.commitment + args.budget_weight * budget
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

        if step % 10 == 0:
            log(step, dict(loss=loss.item(), l1=l1.item(), budget=budget.item(), commitment=out.commitment.item()), bar)
        if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            figures, y, grains = evaluate(model, images, detailed, autocast)
            log(step + 1, figures)
            rows = [tile for i in range(min(8, len(y))) for tile in (
                dq.to_picture(images[i]), dq.to_picture(y[i]),
                dq.draw_grains(dq.to_picture(images[i]), grains[i], config.factors))]
            dq.save_grid(args.out / "vae.png", rows, columns=6)
            dq.save_checkpoint(path, "dq-vae", config, model, **training_state(step + 1, optimizer))
    print(f"wrote {path}, {path.with_suffix('.png')} and {path.with_suffix('.jsonl')}")


if __name__ == "__main__":
    dq.run(main)
