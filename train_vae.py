"""Stage 1: images -> DQ-VAE checkpoint.    python train_vae.py [--data DIR]

Writes into --out: vae.pt (checkpoint), vae.best.pt (that of the lowest held-out loss), vae.jsonl (log),
vae.png (original | reconstruction | grains).

The file: plumbing that both training scripts share; the losses that only training needs (LPIPS,
discriminator); evaluation; the authors' weights; the training loop.
"""
import argparse
import itertools
import json
import math
import os
import random
import signal
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.nn.functional import all_reduce
from torch.nn.parallel import DistributedDataParallel
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
    add("--batch-size", type=int, default=train.batch_size, help="images a step, of all processes together")
    add("--accumulate", metavar="N", type=int, default=train.accumulate, help="work on a batch in N parts, which takes less memory")
    add("--lr", type=float, default=train.lr, help="highest learning rate")
    add("--clip", type=float, default=train.clip, help="largest norm of the gradient; 0: no limit")
    add("--seed", type=int, default=0, help="of weights, data order and noise")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--dtype", choices=["auto", "bf16", "fp32"], default="auto", help="auto: bf16 where the hardware has it")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--workers", type=int, default=0, help="processes that load images")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--eval-every", type=int, default=train.eval_every, help="steps between evaluations")
    add("--save-every", type=int, default=train.eval_every, help="steps between checkpoints")
    return parser, preset


def prepare(args):
    """Refuse what can't be trained, join the other processes, make the output folder. -> device, autocast"""
    for name in ("steps", "batch_size", "accumulate", "eval_every", "save_every"):
        dq.require(getattr(args, name) >= 1, f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    for name in ("seed", "workers"):
        dq.require(getattr(args, name) >= 0, f"--{name} must be at least 0, not {getattr(args, name)}")
    dq.require(args.lr > 0, f"--lr must be above 0, not {args.lr}")
    dq.require(args.clip >= 0, f"--clip must be at least 0, not {args.clip}")
    world, local = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))  # torchrun sets them
    dq.require(args.batch_size % (args.accumulate * world) == 0,
               f"--batch-size {args.batch_size} is not a multiple of --accumulate {args.accumulate}" + f" times {world} processes" * (world > 1))
    if world > 1 and args.device in ("auto", "cuda") and torch.cuda.is_available():
        there = torch.cuda.device_count()
        dq.require(local < there, f"this machine has {there} GPU(s), process {local} finds none; lower --nproc_per_node, or --device cpu")
        args.device = f"cuda:{local}"
    device, autocast = dq.pick_device(args.device, args.dtype)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    args.out.mkdir(parents=True, exist_ok=True)
    random.seed(args.seed)                                                   # nothing here draws from these two; what students add may
    np.random.seed(args.seed % 2 ** 32)
    return device, autocast


def distribute(model):
    """For the forward pass in training: with it, backward averages the gradients over the processes."""
    # the buffers (codebook, batch norm) are alike by themselves; where parts are accumulated, each is averaged
    return DistributedDataParallel(model, broadcast_buffers=False) if dq.processes()[1] > 1 else model


def open_data(folder, size, split, augment=False, seed=0):
    """The images of --data, or the toy data where there is no folder."""
    if folder:
        return dq.ImageFolder(folder, size, split, augment, seed)
    return dq.ToyShapes(size, seed=seed) if split == "train" else dq.ToyShapes(size, n=512, seed=seed + 1_000_003)


def deal(n, batch_size, seed, start=0):
    """Endless lists of batch_size numbers below n, in a fresh random order every epoch, from batch number `start` on.

    Epoch e counts from e n on. Batch number b is a function of the arguments and b alone, so a resumed
    run sees what it would have seen.
    """
    def numbers():
        place = start * batch_size
        while True:
            epoch, skip = divmod(place, n)
            order = np.random.default_rng([seed, epoch]).permutation(n)[skip:]
            yield from (epoch * n + int(i) for i in order)
            place += len(order)

    endless = numbers()
    while True:
        yield list(itertools.islice(endless, batch_size))


def stream(dataset, batch_size, seed, start=0, workers=0, part=None):
    """Endless batches of a data set, in the order of `deal`.

    part: (number, how many) of the part of each batch that is wanted; None: this process's.
    """
    rank, world = part or dq.processes()
    batches = (batch[rank * batch_size // world:(rank + 1) * batch_size // world] for batch in deal(len(dataset), batch_size, seed, start))
    return iter(torch.utils.data.DataLoader(dataset, batch_sampler=batches, num_workers=workers, worker_init_fn=leave_signals_to_the_parent,
                                            generator=torch.Generator(), pin_memory=torch.cuda.is_available()))


def leave_signals_to_the_parent(worker):
    signal.signal(signal.SIGINT, signal.SIG_IGN)                             # Ctrl-C reaches them too


def learning_rate(step, args, warmup):
    """Linear warm-up, then cosine to zero."""
    if step < warmup:
        return args.lr * (step + 1) / warmup
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, args.steps - warmup)))


def set_learning_rate(optimizers, step, args, warmup):
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args, warmup)


def readable(values):
    return {name: f"{value:.3f}" if isinstance(value, float) else f"{value}" for name, value in values.items()}


class Run:
    """What goes on around the steps of a training: log, checkpoints, signals, a look at the numbers.

    stem: "vae" or "transformer"; parts: what must be saved besides the model for an exact resume,
    things with a state_dict; extra: what else a checkpoint shall hold, of which those named in
    `fixed` must be the same in a run that goes on; best_by: the held-out figure that the best
    checkpoint has lowest. All processes take part; process 0 evaluates and writes.
    """

    def __init__(self, args, stem, config, model, parts, best_by, extra=None, fixed=()):
        self.args, self.kind, self.config, self.model, self.parts, self.best_by, self.extra = args, f"dq-{stem}", config, model, parts, best_by, extra or {}
        self.path, self.log_path = args.out / f"{stem}.pt", args.out / f"{stem}.jsonl"
        self.rank, self.world = dq.processes()
        self.start, self.saved, self.best, self.signal, self.recent = 0, None, math.inf, 0, []
        if args.resume:
            self.restore(fixed)

    def asked_to_stop(self, number, frame):
        self.signal = number
        self.release_signals()                                               # the second time takes effect at once

    def release_signals(self):
        for each, handler in self.handlers.items():
            signal.signal(each, handler)

    def restore(self, fixed):
        """Load a checkpoint, to go on with the command that wrote it."""
        checkpoint = dq.load_checkpoint(self.path, self.kind)
        dq.require(checkpoint.get("config") == asdict(self.config) and {"step", "best", "rng", *self.parts, *self.extra} <= checkpoint.keys(),
                   f"{self.path} has other settings than this command; give the same flags, or leave --resume out")
        for key in fixed:
            then, now = checkpoint[key], self.extra[key]
            dq.require(then.keys() == now.keys() and all(torch.equal(then[name], tensor.cpu()) for name, tensor in now.items()),
                       f"{self.path} was trained on the codes of another DQ-VAE; leave --resume out")
        try:
            for name, part in dict(weights=self.model, **self.parts).items():
                part.load_state_dict(checkpoint[name])
            rng = checkpoint["rng"]
            random.setstate(rng["python"])
            name, keys, *rest = rng["numpy"]
            np.random.set_state((name, np.array(keys, np.uint32), *rest))
            torch.set_rng_state(rng["torch"])
            for device, state in zip(range(torch.cuda.device_count()), rng["cuda"]):
                torch.cuda.set_rng_state(state, device)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise dq.UserError(f"{self.path} is damaged or of another version ({str(error).splitlines()[0]})") from None
        self.start = self.saved = checkpoint["step"]
        self.best = checkpoint["best"]

    def save(self, done):
        self.refuse_nan()
        finite = [tensor.isfinite().all() for tensor in self.model.state_dict().values() if tensor.is_floating_point()]
        dq.require(torch.stack(finite).all(), f"step {done}: a weight is not finite; {self.last_good()}")
        if self.rank == 0:
            name, keys, *rest = np.random.get_state()
            rng = dict(python=random.getstate(), numpy=(name, keys.tolist(), *rest), torch=torch.get_rng_state(),
                       cuda=torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])
            dq.save_checkpoint(self.path, self.kind, self.config, self.model, step=done, best=self.best, rng=rng, **self.extra,
                               **{name: part.state_dict() for name, part in self.parts.items()})
        self.saved = done

    def last_good(self):
        return f"the last good checkpoint is that of step {self.saved}, {self.path}" if self.saved else "there is no checkpoint yet"

    def keep_former(self):
        """A run that starts anew in a folder that holds one moves the former one's files into a folder of their own."""
        stem = self.path.stem
        if self.path.exists():
            former = next(folder for i in itertools.count(1) if not any((folder := self.args.out / f"former-{i}").glob(f"{stem}.*")))
            former.mkdir(exist_ok=True)
            for file in self.args.out.glob(f"{stem}.*"):
                os.replace(file, former / file.name)
            print(f"{self.path} and what belongs to it, of a former run, are now in {former} (--resume would have gone on with it)")

    def steps(self):
        """The numbers of the steps that are to be done, with a progress bar."""
        if self.rank == 0:
            if not self.args.resume:
                self.keep_former()
            former = read_log(self.log_path) if self.args.resume else []
            self.log_file = open(self.log_path, "w", buffering=1)
            for line in former:
                if line["step"] <= self.start:                               # what came later is about to be done again
                    self.log_file.write(json.dumps(line) + "\n")
        self.bar = tqdm(range(self.start, self.args.steps), initial=self.start, total=self.args.steps,
                        desc={"dq-vae": "DQ-VAE", "dq-transformer": "DQ-Transformer"}[self.kind], disable=None if self.rank == 0 else True)
        self.handlers = {each: signal.signal(each, self.asked_to_stop) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield from self.bar
        finally:
            self.release_signals()
        if self.rank == 0:
            print(f"wrote {self.path}, {self.path.with_suffix('.png')} and {self.log_path}")

    def log(self, done, values):
        """On the terminal and, as one JSON object a line, in the file."""
        self.log_file.write(json.dumps(dict(step=done) | {k: round(v, 5) if isinstance(v, float) else v for k, v in values.items()}) + "\n")
        if "psnr" in values or "nats_per_image" in values:                   # held-out figures
            tqdm.write(f"step {done}: " + ", ".join(f"{k} {v}" for k, v in readable(values).items()))
        else:
            self.bar.set_postfix(readable(values), refresh=False)

    def after(self, done, terms, evaluate):
        """Call after each step. terms: the loss and its terms, scalars on the device; evaluate() -> held-out figures"""
        args = self.args
        values = torch.stack([term.detach().float() for term in terms.values()])
        self.recent.append((done, list(terms), values))
        if done % 10 == 0:                                                   # the device is asked for values every tenth step only
            newest = self.refuse_nan()
            if self.rank == 0:
                self.log(done, dict(zip(terms, newest)))
        if done % args.eval_every == 0 or done == args.steps:
            self.refuse_nan()
            with torch.random.fork_rng():                                    # how often it is done doesn't change the training
                if self.rank == 0:
                    figures = evaluate()
                    self.log(done, figures)
                    if figures[self.best_by] < self.best:
                        self.best = figures[self.best_by]
                        dq.save_checkpoint(self.path.with_suffix(".best.pt"), self.kind, self.config, self.model, step=done, best=self.best, **self.extra)
        leave = self.signal
        if self.world > 1:                                                   # all leave together, or the rest would wait for ever
            flag = torch.tensor(float(self.signal), device=values.device)
            leave = signal.SIGTERM if done % 10 == 0 and dq.total(flag) > 0 else 0
        if done % args.save_every == 0 or done == args.steps or leave:
            self.save(done)
        if leave and done < args.steps:
            self.bar.close()
            if self.rank == 0:
                print(f"stopped by {signal.Signals(leave).name} after step {done}, saved in {self.path}; the same command with --resume goes on")
            sys.exit(128 + leave)

    def refuse_nan(self):
        """Look at the terms since the last look. -> the newest ones, mean over the processes"""
        newest = []
        for step, names, values in self.recent:
            newest = (dq.total(values) / self.world).tolist()
            bad = [name for name, value in zip(names, newest) if not math.isfinite(value)]
            dq.require(not bad, f"step {step}: not finite in the loss: {', '.join(bad)}; {self.last_good()}; a lower --lr may help")
        self.recent.clear()
        return newest


def read_log(path):
    """The lines of a log as dicts, without one that was cut short."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            pass
    return lines


# ------------------------------------------------------------------------------------------------
# Losses that only training needs


class Perceptual(nn.Module):
    """LPIPS on VGG16, frozen: forward(x, y (B, 3, S, S) in [-1, 1]) -> (B,), 0 for equal images.

    Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", 2018,
    version 0.1: features behind five ReLUs, each vector normalised over its channels, squared
    difference, weighted per channel, averaged over the places, summed over the five.
    """
    urls = ("https://download.pytorch.org/models/vgg16-397923af.pth",
            "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth")
    stages = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

    def __init__(self):
        super().__init__()
        layers, c, self.taps = [], 3, []                                     # numbered as in VGG16's file
        for widths in self.stages:
            for width in widths:
                layers += [nn.Conv2d(c, width, 3, padding=1), nn.ReLU()]
                c = width
            self.taps.append(len(layers) - 1)
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers[:-1])
        self.weights = nn.ParameterList(torch.zeros(1, widths[-1], 1, 1) for widths in self.stages)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None], persistent=False)
        self.requires_grad_(False)

    @classmethod
    def load(cls, files=()):
        """With the published weights, from files or, without files, from torch's cache or the internet."""
        try:
            parts = ([torch.load(file, map_location="cpu", weights_only=True) for file in files] or
                     [torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True, file_name=name)
                      for url, name in zip(cls.urls, ("vgg16-397923af.pth", "lpips-vgg-0.1.pth"))])
            given = {name: tensor for part in parts for name, tensor in part.items()}
            lpips = cls()
            lpips.load_state_dict({name: given[name.replace("weights.", "lin") + ".model.1.weight" if name.startswith("weights.") else name]
                                   for name in lpips.state_dict()})
        except Exception as error:                                           # no network, no such file, another file, ...
            raise dq.UserError(f"no weights for the perceptual loss ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}); "
                               f"download {' and '.join(cls.urls)} and name both files after --perceptual-weights, "
                               "or train without: --perceptual-weight 0") from None
        return lpips

    def maps(self, x):
        x = (x - self.shift) / self.scale
        for i, layer in enumerate(self.features):
            x = layer(x)                                                     # B, c, S/2^k, S/2^k
            if i in self.taps:
                # a vector that is zero keeps a gradient that is finite, which x / |x| would not
                yield F.normalize(x.float(), dim=1, eps=1e-10)

    def forward(self, x, y):
        with torch.no_grad():
            of_x = list(self.maps(x))
        pairs = zip(of_x, self.maps(y), self.weights)
        return sum((w * (a - b).square()).sum(1).mean(dim=(1, 2)) for a, b, w in pairs)  # B


class BatchNorm(nn.BatchNorm2d):
    """Over the batches of all processes (torch's SyncBatchNorm is for GPUs only)."""

    def forward(self, x):
        world = dq.processes()[1]
        if world == 1 or not self.training:
            return super().forward(x)
        sums = torch.stack([x.float().mean(dim=(0, 2, 3)), x.float().square().mean(dim=(0, 2, 3))])  # 2, C
        mean, square = all_reduce(sums) / world                              # with a gradient to all processes
        var, n = square - mean ** 2, world * x.numel() / x.shape[1]
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (var + self.eps).rsqrt()
        return (x * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]).to(x.dtype)  # B, C, H, W


class Discriminator(nn.Module):
    """PatchGAN (Isola et al. 2017): (B, 3, S, S) -> a logit for each overlapping patch, high for real."""

    def __init__(self, layers=3, width=64):
        super().__init__()
        blocks = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(1, layers + 1):
            c_in, c_out, stride = width * min(2 ** (i - 1), 8), width * min(2 ** i, 8), 2 if i < layers else 1
            blocks += [nn.Conv2d(c_in, c_out, 4, stride, padding=1, bias=False), BatchNorm(c_out), nn.LeakyReLU(0.2)]
        self.blocks = nn.Sequential(*blocks, nn.Conv2d(c_out, 1, 4, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1, 0.02)

    def forward(self, x):
        return self.blocks(x).float()                                        # B, 1, S/8 - 2, S/8 - 2 (three layers)


def hinge_loss(real, fake):
    """Of the discriminator: real logits above 1 and fake ones below -1 cost nothing."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(y, last, pull, push, cap=0.75):
    """Weight of the adversarial loss that lets it move the decoder's last layer as much as the reconstruction loss.

    (Esser et al., "Taming Transformers", 2021, equation 7.) y: reconstruction; last: weight of the
    last convolution; pull, push: the gradients of the two losses at y. At most `cap`.
    """
    a, b = (dq.total(torch.autograd.grad(y, last, gradient, retain_graph=True)[0]).norm() / dq.processes()[1] for gradient in (pull, push))
    return (a / (b + 1e-4)).clamp(max=cap)


def backward(y, last, loss, adversarial, other, gan_weight=1.0, scale=1.0):
    """Accumulate the gradients of scale * (loss + weight * adversarial + other); -> the weight.

    y: reconstruction, on which the scalars loss and adversarial (or None) depend, and all else
    depends on y alone; other: a scalar whose graph joins that of y further up. Both gradients are
    added at y, so that VGG and the discriminator are walked back once each, though the adaptive
    weight needs them apart; nothing below y, such as the discriminator's weights, gets a gradient.
    """
    pull, weight = torch.autograd.grad(loss, y)[0], None                     # B, 3, S, S
    if adversarial is not None:
        push, = torch.autograd.grad(adversarial, y)                          # B, 3, S, S
        weight = gan_weight * adaptive_weight(y, last, pull, push)
        pull = pull + weight * push
    torch.autograd.backward([y, other], [scale * pull, torch.full_like(other, scale)])
    return weight


def compiled(model, **how):
    """A DQVAE through torch.compile, all but its last convolution: `adaptive_weight` walks back to there twice, and what is
    compiled can be walked back once only and as a whole."""
    last = model.decoder.out[-1]
    last.forward = torch.compiler.disable(last.forward)
    return torch.compile(model, **how)


def gumbel_scale(step, steps):
    """1 until half of training, 0 from 90 % on: the gate explores first and then learns its argmax."""
    return min(1.0, max(0.0, (0.9 - step / steps) / 0.4))


# ------------------------------------------------------------------------------------------------
# Evaluation


def auc(score, truth):
    """Area under the ROC curve: how often a detailed region scores above a smooth one. Ties count half."""
    values, inverse, counts = score.flatten().unique(return_inverse=True, return_counts=True)
    rank = (counts.cumsum(0) - (counts - 1) / 2)[inverse]                    # mean rank of each value, from 1
    truth = truth.flatten()
    n_true, n_false = truth.sum(), (~truth).sum()
    return ((rank[truth].double().sum() - n_true * (n_true + 1) / 2) / (n_true * n_false)).item()


def ssim(x, y):
    """Structural similarity of images (B, 3, S, S) in [-1, 1] -> (B,), mean over channels and places.

    Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity", 2004:
    Gaussian window of 11 pixels and deviation 1.5, constants (0.01 R)^2 and (0.03 R)^2 for range R, here 1.
    """
    side = min(11, x.shape[-1] - 1 + x.shape[-1] % 2)                        # smaller images: the largest odd window
    line = torch.exp(-0.5 * ((torch.arange(side, device=x.device) - side // 2) / 1.5) ** 2)
    window = (line[:, None] * line).div(line.sum() ** 2).expand(3, 1, side, side)

    def blur(z):
        return F.conv2d(z, window, groups=3)                                 # B, 3, S - 10, S - 10

    x, y = (x + 1) / 2, (y + 1) / 2                                          # black must be 0: the formula knows ratios of means
    mx, my = blur(x), blur(y)
    vx, vy, covariance = blur(x * x) - mx ** 2, blur(y * y) - my ** 2, blur(x * y) - mx * my
    c1, c2 = 0.01 ** 2, 0.03 ** 2
    return ((2 * mx * my + c1) * (2 * covariance + c2) / ((mx ** 2 + my ** 2 + c1) * (vx + vy + c2))).mean(dim=(1, 2, 3))


@torch.no_grad()
def evaluate(model, images, detailed, autocast, perceptual=None, batch_size=64):
    """Held-out images (M, 3, S, S) -> figures, and the outputs. detailed: (M, h, w), the truth, or None."""
    model.eval()
    outputs, scores, lpips = [], [], []
    for x in images.split(batch_size):
        with autocast():
            out = model(x)
            scores.append(model.router.score(x, out.maps).float())
            if perceptual:
                lpips.append(perceptual(x, out.reconstruction.float().clamp(-1, 1)))
        outputs.append(out._replace(maps=None))                              # the maps of all images would fill the memory
    model.train()
    y = torch.cat([o.reconstruction.float() for o in outputs]).clamp(-1, 1)
    codes, grains = (torch.cat([getattr(o, name) for o in outputs]) for name in ("codes", "grains"))
    config = model.config
    cells = torch.tensor([(config.factors[0] // f) ** 2 for f in config.factors], device=grains.device)
    share = torch.stack([(grains == k).float().mean() for k in range(len(cells))])
    # every code counts once: a cell of the finest grid is 1 / (cells that share its code)
    weight = dq.upsample((cells[grains] / cells[-1])[:, None], codes.shape[-1])[:, 0]
    n_codes = cells[grains].sum(dim=(1, 2)).float().mean().item()
    # what sending an image takes: its codes, and for each region which granularity it has
    bits = n_codes * math.log2(config.codebook_size) + grains[0].numel() * math.log2(len(cells))
    fine = (grains == len(cells) - 1).float().mean(dim=(1, 2))               # M
    use = torch.zeros(config.codebook_size, device=grains.device).index_add_(0, codes.flatten(), weight.flatten())
    p = use / use.sum()
    figures = dict(
        psnr=(10 * torch.log10(4 / (y - images).square().mean(dim=(1, 2, 3)))).mean().item(),
        ssim=torch.cat([ssim(a, b) for a, b in zip(y.split(batch_size), images.split(batch_size))]).mean().item(),
        l1=(y - images).abs().mean().item(),
        l2=(y - images).square().mean().item(),
        codes_per_image=n_codes,
        bits_per_pixel=bits / config.size ** 2,
        share=[round(s, 4) for s in share.tolist()],
        fine_min=fine.min().item(), fine_mean=fine.mean().item(), fine_max=fine.max().item(),
        perplexity=torch.exp(-(p * (p + 1e-12).log()).sum()).item(),
        codebook_used=(use > 0).float().mean().item())
    if detailed is not None and len(cells) > 1 and 0 < detailed.sum() < detailed.numel():
        figures |= dict(auc=auc(torch.cat(scores), detailed), auc_argmax=auc(grains, detailed))
    if perceptual:
        figures["lpips"] = torch.cat(lpips).mean().item()
    return figures, y, grains


def show(path, images, reconstructions, grains, factors):
    """A picture of up to 8 triples: original, reconstruction, codes."""
    tiles = [tile for x, y, g in zip(images[:8], reconstructions, grains)
             for tile in (dq.to_picture(x), dq.to_picture(y), dq.draw_grains(x, g, factors))]
    dq.save_grid(path, tiles, columns=6)


# ------------------------------------------------------------------------------------------------
# The authors' weights


def read_authors(path):
    """A checkpoint of the authors' stage-1 model -> VAEConfig, our state dict.

    Configuration and router are inferred from names and shapes. What the file does not tell is taken
    from their released models: the budgets, and the threshold of the entropy router.
    """
    dq.require(os.path.isfile(path), f"no such file: {path}")

    class Inert:                                                             # stands for whatever class a trainer left in the file
        def __init__(self, *args, **kwargs): pass
        def __setstate__(self, state): pass

    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(Inert, name) for name in unknown]):
            theirs = torch.load(path, map_location="cpu", weights_only=True)  # runs no code of the file's
        theirs = {name: tensor.float() for name, tensor in theirs.get("state_dict", theirs).items() if torch.is_tensor(tensor)}
        config = authors_config(theirs)
        ours = authors_names(theirs, len(config.factors))
        if config.router == "entropy":
            ours["router.thresholds"] = torch.tensor([1.6778])               # nats, of half of ImageNet's regions
    except dq.UserError:
        raise
    except KeyError as error:
        raise dq.UserError(f"{path} is not a checkpoint of the authors' stage-1 model: it has no {error.args[0]}") from None
    except Exception as error:
        raise dq.UserError(f"{path} is not a checkpoint, or is damaged ({type(error).__name__})") from None
    return config, ours


def authors_config(theirs):
    def count(pattern):
        """How many numbers i there are, from 0 on, for which a name starts with the pattern."""
        return next(i for i in range(100) if not any(name.startswith(pattern.format(i)) for name in theirs))

    levels = count("encoder.down.{}.")
    factors = [2 ** (levels - 1 - k) for k in range(3 if "encoder.conv_out_median.weight" in theirs else 2)]
    width = theirs["encoder.conv_in.weight"].shape[0]
    learned = "encoder.router.gate.0.weight" in theirs
    dq.require(learned or len(factors) == 2, "the authors' entropy router has two granularities, not three")
    return dq.VAEConfig(
        size=theirs["decoder.position_bias_learned.row_embed.weight"].shape[0] * factors[-1],
        factors=factors, ratios=(0.5, 0.5) if len(factors) == 2 else (0.4, 0.3, 0.3), router="learned" if learned else "entropy",
        codebook_size=theirs["quantize.codebook.weight"].shape[0] - 1, code_dim=theirs["quant_conv.weight"].shape[0],
        channels=theirs["encoder.conv_out_fine.weight"].shape[0], width=width,
        multipliers=[theirs[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] // width for i in range(levels)],
        encoder_blocks=count("encoder.down.0.block.{}."), decoder_blocks=count("decoder.up.0.block.{}."),
        attention_from=next(2 ** i for i in range(levels + 1) if f"encoder.down.{i}.attn.0.norm.weight" in theirs or i == levels))


def authors_names(theirs, K):
    """Their state dict -> ours."""
    ours = {}

    def has(prefix):
        return any(name.startswith(prefix + ".") for name in theirs)

    def copy(to, source):
        for name in ("weight", "bias"):
            ours[f"{to}.{name}"] = theirs[f"{source}.{name}"]

    def res(to, source):
        for name in ("norm1", "conv1", "norm2", "conv2"):
            copy(f"{to}.{name}", f"{source}.{name}")
        if has(f"{source}.nin_shortcut"):
            copy(f"{to}.shortcut", f"{source}.nin_shortcut")

    def attention(to, source):
        copy(f"{to}.norm", f"{source}.norm")
        copy(f"{to}.proj", f"{source}.proj_out")
        for name in ("weight", "bias"):
            ours[f"{to}.qkv.{name}"] = torch.cat([theirs[f"{source}.{x}.{name}"] for x in "qkv"])

    def level(to, source):
        i = j = 0                                                            # their block and attention lists are one list here
        while has(f"{source}.block.{i}"):
            res(f"{to}.{j}", f"{source}.block.{i}")
            if has(f"{source}.attn.{i}"):
                attention(f"{to}.{j + 1}", f"{source}.attn.{i}")
                j += 1
            i, j = i + 1, j + 1

    def middle(to, source):
        res(f"{to}.0", f"{source}.block_1")
        attention(f"{to}.1", f"{source}.attn_1")
        res(f"{to}.2", f"{source}.block_2")

    copy("encoder.stem", "encoder.conv_in")
    i = 0
    while has(f"encoder.down.{i}"):
        level(f"encoder.levels.{i}", f"encoder.down.{i}")
        if has(f"encoder.down.{i}.downsample"):
            copy(f"encoder.downs.{i}", f"encoder.down.{i}.downsample.conv")
        i += 1
    for k, name in enumerate(("coarse", "fine") if K == 2 else ("coarse", "median", "fine")):
        middle(f"encoder.heads.{k}", f"encoder.mid_{name}")
        copy(f"encoder.heads.{k}.3", f"encoder.norm_out_{name}")
        copy(f"encoder.heads.{k}.5", f"encoder.conv_out_{name}")
        if has("encoder.router"):
            copy(f"router.norms.{k}", f"encoder.router.feature_norm_{name}")
    if has("encoder.router"):
        copy("router.mlp.0", "encoder.router.gate.0")
        copy("router.mlp.2", "encoder.router.gate.2")
    copy("decoder.stem", "decoder.conv_in")
    middle("decoder.mid", "decoder.mid")
    i = 0                                                                    # their levels count from the finest, ours as the data flows
    while has(f"decoder.up.{i}"):
        i += 1
    for j in range(i):
        level(f"decoder.levels.{j}", f"decoder.up.{i - 1 - j}")
        if has(f"decoder.up.{i - 1 - j}.upsample"):
            copy(f"decoder.ups.{j}", f"decoder.up.{i - 1 - j}.upsample.conv")
    copy("decoder.out.0", "decoder.norm_out")
    copy("decoder.out.2", "decoder.conv_out")
    copy("decoder.position.fourier", "decoder.position_bias_fourier.lff.ffm.conv")
    ours["decoder.position.rows"] = theirs["decoder.position_bias_learned.row_embed.weight"]
    ours["decoder.position.columns"] = theirs["decoder.position_bias_learned.col_embed.weight"]
    copy("pre_quant", "quant_conv")
    copy("post_quant", "post_quant_conv")
    ours["codebook.codes"] = theirs["quantize.codebook.weight"][:-1]         # the last row is padding
    ours["codebook.uses"] = theirs["quantize.codebook.cluster_size_ema"]
    ours["codebook.sums"] = theirs["quantize.codebook.embed_ema"]
    ours["codebook.age"] = torch.tensor(1e6)                                 # many
    return ours


def import_authors(args, device, autocast):
    """--import-authors: write vae.pt from the authors' checkpoint, say what it is, and evaluate it on --data."""
    config, weights = read_authors(args.import_authors)
    model = dq.rebuild(dq.DQVAE, dq.VAEConfig, asdict(config), weights, device)
    print(f"{args.import_authors}: {config.size} x {config.size} pixels, factors {config.factors}, {config.router} router, "
          f"{config.codebook_size} codes of {config.code_dim} dimensions, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
    path = args.out / "vae.pt"
    dq.require(not path.exists(), f"{path} exists; choose another folder with --out")
    dq.save_checkpoint(path, "dq-vae", config, model)
    print(f"wrote {path}")
    if args.data:
        images, detailed = held_out_images(args.data, config, device)
        figures, y, grains = evaluate(model, images, detailed, autocast, batch_size=8)
        print(f"{len(images)} held-out images: " + ", ".join(f"{name} {value}" for name, value in readable(figures).items()))
        show(path.with_suffix(".png"), images, y, grains, config.factors)
        print(f"wrote {path.with_suffix('.png')}")


# ------------------------------------------------------------------------------------------------
# Training


def parse(argv=None):
    parser, preset = common_flags("Train a DQ-VAE: images to variable-length codes and back.", "train_vae", argv)
    vae, train, add = preset.vae, preset.train_vae, parser.add_argument
    add("--size", type=int, default=vae.size, help="side of the images, pixels")
    add("--factors", type=int, nargs="+", default=vae.factors, help="downsampling factors, coarse to fine; one: fixed length")
    add("--ratios", type=float, nargs="+", help="share of regions per factor; None: the preset's, or equal shares")
    add("--router", choices=["learned", "entropy", "random"], default=vae.router, help="what picks the granularities")
    add("--codebook-size", type=int, default=vae.codebook_size, help="number of codes")
    add("--code-dim", type=int, default=vae.code_dim, help="dimension of a code")
    add("--budget-weight", type=float, default=train.budget_weight, help="weight of the budget loss")
    add("--perceptual-weight", type=float, default=train.perceptual_weight, help="weight of LPIPS; 0: without")
    add("--perceptual-weights", metavar="FILE", nargs="+", default=[], help="files with the weights of VGG16 and LPIPS; none: torch's cache, or download")
    add("--gan-weight", type=float, default=train.gan_weight, help="weight of the adversarial loss, times the adaptive weight; 0: without")
    add("--gan-start", metavar="STEP", type=int, default=train.gan_start, help="step from which the discriminator takes part")
    add("--import-authors", metavar="FILE", help="instead of training, turn a checkpoint of the authors' stage-1 model into vae.pt; with --data, evaluate it")
    return parser.parse_args(argv), preset


def held_out_images(folder, config, device):
    """Up to 512 held-out images (M, 3, S, S) and, of the toy data only, where detail is: (M, h, w), bool."""
    held_out = open_data(folder, config.size, "val")
    shown = min(len(held_out), 512)
    images = torch.stack([held_out[i][0] for i in range(shown)]).to(device)
    if folder:
        return images, None
    masks = torch.stack([held_out.detail_mask(i) for i in range(shown)]).float()
    return images, F.avg_pool2d(masks, config.factors[0]).to(device) > 0.1


def main(argv=None):
    args, preset = parse(argv)
    for name in ("budget_weight", "perceptual_weight", "gan_weight", "gan_start"):
        dq.require(getattr(args, name) >= 0, f"--{name.replace('_', '-')} must be at least 0, not {getattr(args, name)}")
    device, autocast = prepare(args)
    if args.import_authors:
        return import_authors(args, device, autocast)
    ratios = args.ratios or (preset.vae.ratios if len(args.factors) == len(preset.vae.factors) else [1 / len(args.factors)] * len(args.factors))
    config = replace(preset.vae, size=args.size, factors=args.factors, ratios=ratios, router=args.router,
                     codebook_size=args.codebook_size, code_dim=args.code_dim)
    dq.require(not args.gan_weight or config.size >= 24, f"the discriminator needs images of at least 24 pixels, not {config.size}; --gan-weight 0 trains without")
    dq.require(not args.perceptual_weight or config.size >= 16, f"LPIPS needs images of at least 16 pixels, not {config.size}; --perceptual-weight 0 trains without")
    train = preset.train_vae
    data = open_data(args.data, config.size, "train", augment=True, seed=args.seed)
    images, detailed = held_out_images(args.data, config, device)
    perceptual = Perceptual.load(args.perceptual_weights).to(device) if args.perceptual_weight else None

    torch.manual_seed(args.seed)
    # GPUs convolve faster with channels last; on CPUs group norm is many times slower that way
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    model = dq.DQVAE(config).to(device, memory_format=layout)
    if config.router == "entropy":
        sample = stream(data, args.batch_size, args.seed, part=(0, 1))
        model.router.calibrate(next(sample)[0].to(device) for _ in range(max(1, 2048 // args.batch_size)))
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, betas=train.betas)
    parts, optimizers = dict(optimizer=optimizer), [optimizer]
    if args.gan_weight:
        critic = Discriminator().to(device, memory_format=layout)
        critic_optimizer = torch.optim.Adam(critic.parameters(), lr=args.lr, betas=train.betas)
        parts |= dict(critic=critic, critic_optimizer=critic_optimizer)
        optimizers.append(critic_optimizer)
        judge = distribute(critic)
    run = Run(args, "vae", config, model, parts, best_by="loss")
    batches = stream(data, args.batch_size, args.seed, run.start, args.workers)
    forward = distribute(compiled(model) if args.compile else model)
    last = model.decoder.out[-1].weight

    def held_out():
        figures, y, grains = evaluate(model, images, detailed, autocast, perceptual)
        show(args.out / "vae.png", images, y, grains, config.factors)
        loss = figures["l1"] + train.l2_weight * figures["l2"] + args.perceptual_weight * figures.get("lpips", 0.0)
        return figures | dict(loss=loss)

    model.train()
    for step in run.steps():
        batch = next(batches)[0].to(device, memory_format=layout, non_blocking=True)  # B, 3, S, S
        set_learning_rate(optimizers, step, args, train.warmup)
        adversarial = args.gan_weight > 0 and step >= args.gan_start
        for each in optimizers:
            each.zero_grad(set_to_none=True)
        for x in batch.chunk(args.accumulate):
            with autocast():
                out = forward(x, gumbel_scale(step, args.steps))
            y = out.reconstruction.float()
            l1, l2 = (y - x).abs().mean(), (y - x).square().mean()
            budget = dq.budget_loss(out.gate, config.ratios)
            loss, terms, gan = l1 + train.l2_weight * l2, dict(l1=l1, budget=budget, commitment=out.commitment), None
            if perceptual:
                with autocast():
                    terms["lpips"] = perceptual(x, y).mean()
                loss = loss + args.perceptual_weight * terms["lpips"]
            if adversarial:
                with autocast():
                    gan = -critic(y).mean()
            other = out.commitment + args.budget_weight * budget
            weight = backward(y, last, loss, gan, other, args.gan_weight, 1 / args.accumulate)
            if adversarial:                                                  # the same y, seen from the other side
                with autocast():
                    critic_loss = hinge_loss(judge(x), judge(y.detach()))
                (critic_loss / args.accumulate).backward()
                terms |= dict(gan=gan, gan_weight=weight, critic=critic_loss)
        if args.clip:
            nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        for each in optimizers[:1 + adversarial]:
            each.step()
        run.after(step + 1, dict(loss=loss + other) | terms, held_out)


if __name__ == "__main__":
    dq.run(main)
