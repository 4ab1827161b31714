"""Stage 2: images and a DQ-VAE -> DQ-Transformer checkpoint.    python train_transformer.py [--data DIR]

The images are encoded once, as they are and mirrored; the loop then trains on codes in memory and
never touches a pixel. Writes into --out: transformer.pt (checkpoint, with the frozen DQ-VAE inside),
transformer.best.pt (that of the lowest held-out loss), transformer.jsonl (log), transformer.png
(samples, and where their codes are).

What both trainers share stands in front of stage 2: flags, checkpoints, logs. It is here, and not in
train_vae.py, so that whatever happens to the losses and the discriminator there, in the hands of a
student say, stage 2 still runs. Images in and pictures out: sample.py.
"""
import argparse
import itertools
import json
import math
import os
import random
import signal
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import dq
from sample import BROKEN, Once, describe, draw_grains, identity, open_data, pick_device, run, save_grid, to_picture


# ------------------------------------------------------------------------------------------------
# What both trainers share
#
# Of several processes, process 0 alone prints, evaluates and writes files.


@dataclass
class Schedule:
    """How a stage is trained: Adam(W), linear warm-up, then cosine to zero."""
    steps: int
    batch_size: int                      # images a step, of all processes together
    lr: float
    betas: tuple = (0.9, 0.99)
    weight_decay: float = 0.0            # of matrices; stage 2
    warmup: int = 100                    # steps
    eval_every: int = 250                # steps
    accumulate: int = 1                  # parts in which a batch is worked on; in stage 2 each is as wide as it needs
    clip: float = 1.0                    # largest norm of the gradient; 0: no limit
    optimizer: str = "muon"              # stage 2: adamw, or muon for the matrices of the blocks


def number(kind, low, below=math.inf):
    """An argparse type: a number of this kind, at least `low` and below `below`."""
    def read(text):
        if not low <= kind(text) < below:
            limit = "" if below == math.inf else f" and below {below}"
            raise argparse.ArgumentTypeError(f"must be at least {low}{limit}, not {text}")
        return kind(text)
    read.__name__ = kind.__name__                                            # for argparse's "invalid int value"
    return read


positive, natural, weight, share = number(int, 1), number(int, 0), number(float, 0), number(float, 0, below=1)


def common_flags(description, presets, argv):
    """The flags that both trainers have. presets: {name: (config, schedule)}. -> parser, the preset's pair"""
    chooser = argparse.ArgumentParser(add_help=False)
    chooser.add_argument("--preset", choices=presets, default="toy", help="sizes and schedule; other flags override it")
    config, schedule = presets[chooser.parse_known_args(argv)[0].preset]
    parser = argparse.ArgumentParser(description=description, parents=[chooser],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", metavar="DIR", help="folder of images; None: the built-in toy shapes")
    add("--out", metavar="DIR", type=Path, default=Path("out"), help="folder that the run writes")
    add("--steps", type=positive, default=schedule.steps, help="optimiser steps")
    add("--batch-size", type=positive, default=schedule.batch_size, help="images a step, of all processes together")
    add("--accumulate", metavar="N", type=positive, default=schedule.accumulate,
        help="work on a batch in N parts, which takes less memory")
    add("--lr", type=number(float, 1e-12), default=schedule.lr, help="highest learning rate")
    add("--clip", type=weight, default=schedule.clip, help="largest norm of the gradient; 0: no limit")
    add("--seed", type=number(int, 0, below=2 ** 63), default=0, help="of weights, data order and noise")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--dtype", choices=["auto", "bf16", "fp32"], default="auto", help="auto: bf16 where the hardware has it")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--workers", type=natural, default=0, help="processes that load images")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--eval-every", type=positive, default=schedule.eval_every, help="steps between evaluations")
    add("--save-every", type=positive, default=schedule.eval_every, help="steps between checkpoints")
    return parser, config, schedule


def override(preset, args, **more):
    """A preset's config or schedule, with the values of the flags that are named like its fields."""
    flags = {field.name: getattr(args, field.name) for field in fields(preset) if hasattr(args, field.name)}
    return replace(preset, **flags | more)


def prepare(args):
    """Join the other processes of a torchrun job, seed, make the output folder. -> device, autocast"""
    world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))  # torchrun sets them
    parts = args.accumulate * world
    dq.require(args.batch_size % parts == 0, f"--batch-size {args.batch_size} is not a multiple of {parts}, "
                                             f"which is --accumulate times the number of processes")
    if world > 1 and args.device in ("auto", "cuda") and torch.cuda.is_available():
        there = torch.cuda.device_count()
        dq.require(local < there, f"this machine has {there} GPU(s), process {local} finds none; "
                                  f"lower --nproc_per_node, or --device cpu")
        args.device = f"cuda:{local}"
    device, autocast = pick_device(args.device, args.dtype)
    on_gpu = device.type == "cuda"
    if world > 1:                                                            # the job's barrier then knows its device
        dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    args.out.mkdir(parents=True, exist_ok=True)
    random.seed(args.seed)                                                   # nothing here draws from these two;
    np.random.seed(args.seed % 2 ** 32)                                      # what students add may
    return device, autocast


def distribute(model):
    """For the forward pass in training: with it, backward averages the gradients over the processes."""
    # the buffers (codebook, batch norm) are alike by themselves; where parts are accumulated, each is averaged
    return DistributedDataParallel(model, broadcast_buffers=False) if dq.processes()[1] > 1 else model


def deal(n, batch_size, seed, start=0):
    """Endless lists of batch_size numbers, in a fresh random order every epoch, from batch number `start` on.

    In epoch e the numbers are e n to e n + n - 1. Batch number b is a function of the arguments and b
    alone, so a resumed run sees what it would have seen.
    """
    epoch, skip = divmod(start * batch_size, n)
    orders = (e * n + np.random.default_rng([seed, e]).permutation(n) for e in itertools.count(epoch))
    numbers = itertools.islice(itertools.chain.from_iterable(orders), skip, None)
    while True:
        yield [int(i) for i in itertools.islice(numbers, batch_size)]


def stream(dataset, batch_size, seed, start=0, workers=0, part=None):
    """Endless batches of a data set, in the order of `deal`.

    part: (number, how many) of the part of each batch that is wanted; None: this process's.
    """
    rank, world = part or dq.processes()
    own = slice(rank * batch_size // world, (rank + 1) * batch_size // world)
    batches = (batch[own] for batch in deal(len(dataset), batch_size, seed, start))
    return iter(torch.utils.data.DataLoader(
        dataset, batch_sampler=batches, num_workers=workers, worker_init_fn=leave_signals_to_the_parent,
        generator=torch.Generator(), pin_memory=torch.cuda.is_available()))


def leave_signals_to_the_parent(worker):
    signal.signal(signal.SIGINT, signal.SIG_IGN)                             # Ctrl-C reaches them too


def learning_rate(step, schedule):
    """Linear warm-up, then cosine to zero."""
    if step < schedule.warmup:
        return schedule.lr * (step + 1) / schedule.warmup
    done = (step - schedule.warmup) / max(1, schedule.steps - schedule.warmup)
    return schedule.lr * 0.5 * (1 + math.cos(math.pi * done))


def say(line):
    if dq.processes()[0] == 0:
        print(line)


class Losses:
    """Loss terms of the last steps, on the device until `read`: to ask a GPU for a value is to wait for it."""

    def __init__(self):
        self.steps = {}

    def add(self, done, terms, scale=1.0):
        """Step `done` has these terms, {name: scalar}, times `scale`: added up over the parts of its batch."""
        sums = self.steps.setdefault(done, {})
        for name, term in terms.items():
            sums[name] = sums.get(name, 0.0) + scale * term.detach().float()

    def read(self, last_good):
        """Newest terms, mean over the processes. UserError if one since the last `read` is not finite."""
        terms = {}
        for done, sums in self.steps.items():
            means = dq.total(torch.stack(list(sums.values()))) / dq.processes()[1]
            terms = dict(zip(sums, means.tolist()))
            bad = ", ".join(name for name, value in terms.items() if not math.isfinite(value))
            dq.require(not bad, f"step {done}: not finite in the loss: {bad}; {last_good}; "
                                f"a new run may need a lower --lr")
        self.steps = {}
        return terms


class Log:
    """A progress bar, and a file with one JSON object a line."""

    def __init__(self, path, title, start, steps):
        self.path, self.writes = path, dq.processes()[0] == 0
        self.bar = tqdm(range(start, steps), title, initial=start, total=steps, disable=None if self.writes else True)
        if self.writes:                                                      # later steps are about to be done again
            former = path.with_name(path.name + ".tmp")
            write_lines(former, "w", [line for line in read_log(path) if line["step"] <= start])
            os.replace(former, path)

    def write(self, done, values, stays=False):
        """stays: on the terminal, on a line of its own."""
        if self.writes:
            rounded = {name: round(x, 5) if isinstance(x, float) else x for name, x in values.items()}
            write_lines(self.path, "a", [dict(step=done) | rounded])
            shown = readable(values)
            self.bar.set_postfix(shown, refresh=False)
            if stays:
                tqdm.write(f"step {done}: " + ", ".join(f"{name} {value}" for name, value in shown.items()))


def readable(values):
    return {name: f"{value:.3f}" if isinstance(value, float) else f"{value}" for name, value in values.items()}


def write_lines(path, mode, lines):
    try:
        with open(path, mode) as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    except OSError as error:
        raise dq.UserError(f"could not write {path} ({error.strerror})") from None


def read_log(path):
    """The lines of a log as dicts; what a crash or an editor left between them is skipped."""
    lines = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            line = json.loads(line)
        except ValueError:                                                   # cut short, or not UTF-8
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


@dataclass
class Checkpoint:
    """What a run keeps in its folder, to go on as if it had never stopped."""
    path: Path                           # vae.pt or transformer.pt
    config: object                       # of the model
    settings: dict                       # whatever else makes it this run: data, seed, schedule
    model: torch.nn.Module
    parts: dict                          # {name: what else has a state_dict}: optimisers, discriminator
    extra: dict                          # what else the files shall hold
    device: torch.device                 # whose random state counts, beside the CPU's
    step: int = 0                        # of the newest checkpoint; 0: there is none
    best: float = math.inf               # lowest held-out loss
    may_change = ("steps", "eval_every", "accumulate")                       # of the settings, in a run that goes on

    def save(self, done):
        finite = [x.isfinite().all() for x in self.model.state_dict().values() if x.is_floating_point()]
        dq.require(torch.stack(finite).all(), f"step {done}: a weight is not finite; {self.last_good()}")
        states = {name: part.state_dict() for name, part in self.parts.items()}
        self.write(self.path, done, settings=self.settings, rng=random_states(self.device), **states)
        self.step = done

    def save_best(self, done, loss):
        """Beside the newest one, that of the lowest held-out loss: for use, not for --resume."""
        if loss < self.best:
            self.best = loss
            self.write(self.path.with_suffix(".best.pt"), done)

    def write(self, path, done, **more):
        if dq.processes()[0] == 0:
            dq.save_checkpoint(path, f"dq-{self.path.stem}", self.config, self.model,
                               step=done, best=self.best, **self.extra, **more)

    def last_good(self):
        if self.step == 0:
            return "there is no checkpoint yet"
        return f"the last good checkpoint is that of step {self.step}, {self.path}"

    def resume(self, args):
        """Load the newest checkpoint, if it is of this command's run. -> its `extra`"""
        held = dq.load_checkpoint(self.path, f"dq-{self.path.stem}")
        try:
            self.compare(held["config"] | held.get("settings", {}), held["step"], args)  # older ones have no settings
            for name, part in dict(weights=self.model, **self.parts).items():
                part.load_state_dict(held[name])
            restore_random_states(held["rng"], self.device)
            self.step, self.best = held["step"], held["best"]
            return {name: held[name] for name in self.extra}
        except dq.UserError:
            raise
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise dq.UserError(f"{self.path} was written by another command or version, or is damaged; "
                               f"leave --resume out ({str(error).splitlines()[0]})") from None

    def compare(self, then, step, args):
        """Refuse settings of another run, and name those that may change."""
        now = asdict(self.config) | self.settings
        for name in [name for name in now if name in then and then[name] != now[name]]:
            title = f"--{name.replace('_', '-')}" if hasattr(args, name) else name
            dq.require(name in self.may_change, f"{self.path} was trained with {title} {then[name]}, not {now[name]}; "
                                                f"give the same to go on, or leave --resume out to start anew")
            if step < now["steps"]:
                say(f"note: {title} was {then[name]} and is {now[name]} from step {step} on")

    def keep_former(self):
        """A run that starts anew where a checkpoint is moves the former run's files into a folder of their own."""
        stem, folder = self.path.stem, self.path.parent
        if not self.path.exists() or dq.processes()[0] > 0:
            return
        n = 1
        while list(folder.glob(f"former-{n}/{stem}.*")):
            n += 1
        former = folder / f"former-{n}"
        former.mkdir(exist_ok=True)
        for file in folder.glob(f"{stem}.*"):
            os.replace(file, former / file.name)
        print(f"{self.path} and what belongs to it, of a former run, are now in {former} "
              f"(--resume would have gone on with it)")


def random_states(device):
    name, keys, *rest = np.random.get_state()
    return dict(python=random.getstate(), numpy=(name, keys.tolist(), *rest), torch=torch.get_rng_state(),
                cuda=torch.cuda.get_rng_state(device) if device.type == "cuda" else None)


def restore_random_states(states, device):
    """Every process takes up those of process 0, on its own device: all draw the same, for the global batch."""
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    cuda = states["cuda"]
    if isinstance(cuda, list):                                               # older checkpoints: of all GPUs, from 0 on
        cuda = cuda[0] if cuda else None
    if device.type == "cuda" and cuda is not None:
        torch.cuda.set_rng_state(cuda, device)


class Stop:
    """with Stop(device): Ctrl-C and SIGTERM are noted, for after the step; the second one takes effect at once."""

    def __init__(self, device):
        self.device, self.number = device, 0

    def __enter__(self):
        self.former = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number, frame):
        self.number = number
        self.__exit__()

    def __exit__(self, *error):
        for number, handler in self.former.items():
            signal.signal(number, handler)

    def asked(self, done):
        """-> number of the signal that came, or 0. All processes leave together, or the rest would wait for ever."""
        if dq.processes()[1] == 1:
            return self.number
        if done % 10:                                                        # the answer is a wait for the device
            return 0
        noted = torch.full((), float(self.number), device=self.device)       # filled there: no copy to wait for
        return signal.SIGTERM if dq.total(noted) > 0 else 0

    def leave(self, number, done, path):
        say(f"stopped by {signal.Signals(number).name} after step {done}, saved in {path}; "
            f"the same command with --resume goes on")
        sys.exit(128 + number)


# ------------------------------------------------------------------------------------------------
# Stage 2


# The paper's model; size, factors and codebook of each come from the DQ-VAE, the classes from the data.
LARGE = dq.TransformerConfig(width=1024, heads=8, position_layers=6, content_layers=18, dropout=0.1, rotary=False)
PAPER = Schedule(steps=507_000, batch_size=240, accumulate=4, lr=5e-4, betas=(0.9, 0.95), weight_decay=0.01,
                 warmup=1000, eval_every=5000, optimizer="adamw")            # 100 epochs of 1,217,000 images

PRESETS = {                                                                  # what each is for: train_vae.py
    "toy": (
        dq.TransformerConfig(),
        Schedule(steps=800, batch_size=32, lr=5e-3, weight_decay=0.05, accumulate=2, eval_every=200)),
    "toy64": (
        dq.TransformerConfig(width=256, heads=8, content_layers=6),
        Schedule(steps=6000, batch_size=64, lr=1e-3, weight_decay=0.05)),
    "emoji64": (
        dq.TransformerConfig(width=160, heads=5, content_layers=6, dropout=0.1),
        Schedule(steps=5000, batch_size=64, lr=1e-3, weight_decay=0.1)),
    "emoji128": (
        dq.TransformerConfig(width=384, heads=6, position_layers=3, content_layers=9, dropout=0.1),
        Schedule(steps=20_000, batch_size=64, lr=5e-4, betas=(0.9, 0.95), weight_decay=0.05, eval_every=1000)),
    "ffhq256": (LARGE, replace(PAPER, steps=27_700, eval_every=1000)),       # 100 epochs of 66,500 images
    "imagenet256": (LARGE, PAPER),
    "imagenet256-triple": (LARGE, PAPER),
}


def parse(argv=None):
    """-> the flags, and the preset's config and schedule"""
    parser, config, schedule = common_flags("Train a DQ-Transformer on the codes of a DQ-VAE.", PRESETS, argv)
    add = parser.add_argument
    add("--vae", metavar="FILE", type=Path, help="DQ-VAE checkpoint; None: vae.pt in --out")
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


@torch.no_grad()
def encode(vae, data, device, autocast, workers, mirrored):
    """All images -> pos, code (M, L), label (M,), on the CPU, trimmed to the longest; each image twice if mirrored.

    Each process encodes its part of the images, and all get the whole, in the order of the data set.
    """
    layout = dq.Layout(vae.config.size, vae.config.factors).to(device)
    rank, world = dq.processes()
    largest = max(layout.n_positions, vae.config.codebook_size, len(data.classes))
    small = torch.int16 if largest < 2 ** 15 else torch.int32
    # numbers past the end are those of the first images again: all processes must have as many
    own = range(rank, -(-len(data) // world) * world, world)
    loader = torch.utils.data.DataLoader(Once(data), 64, sampler=own, num_workers=workers)
    rows = []
    for x, label in tqdm(loader, desc="encoding", disable=None if rank == 0 else True, leave=False):
        x, label = x.to(device), label.to(device)                            # n, 3, S, S; n
        views = []
        for view in (x, x.flip(3)) if mirrored else (x,):
            with autocast():
                pos, code = layout.pack(*vae.encode(view))                   # n, L
            views.append(torch.cat([pos, code, label[:, None]], dim=1).int())  # n, 2 L + 1
        rows.append(gather(torch.stack(views, dim=1)).to(small).cpu())       # n world, views, 2 L + 1
    rows = torch.cat(rows)[:len(data)]                                       # images, views, 2 L + 1
    rows = rows[rows[:, 0, -1] != BROKEN].flatten(0, 1)                      # M, 2 L + 1
    dq.require(len(rows), "none of the images can be read")
    pos, code, label = rows.tensor_split((rows.shape[1] // 2, rows.shape[1] - 1), dim=1)
    longest = lengths(pos, layout).max()
    return pos[:, :longest], code[:, :longest], label[:, 0].long()


def gather(x):
    """Rows (n, ...) of each process -> those of all, (n world, ...), one of each process in turn."""
    world = dq.processes()[1]
    if world == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world)]
    dist.all_gather(parts, x)
    return torch.stack(parts, dim=1).flatten(0, 1)                           # n world, ...


def lengths(pos, layout):
    """Pairs up to and with the last EOS. (B, L) -> (B,)"""
    return (pos != layout.end).sum(1) + 1


def batches(length, batch_size, seed, start=0):
    """Endless batches of sequence numbers (batch_size,), in the order of `deal`.

    Inside a batch they are sorted by length (M,), so that parts of it need little padding. (Whole
    batches of like length would need less, but learned less: 168 nats against 164 after 600 steps on
    the toy data.)
    """
    for batch in deal(len(length), batch_size, seed, start):
        index = np.array(batch) % len(length)
        yield torch.from_numpy(index[np.argsort(length[index], kind="stable")])


def columns_for(length, limit, device):
    """How many columns sequences of these lengths (M,) need.

    Rounded up: GPUs compute in eights, and few different shapes mean few compilations.
    """
    multiple = 8 if device.type == "cuda" else 2
    return min(-(-int(length.max()) // multiple) * multiple, limit)


def nats(model, pos, code, label, device, autocast):
    """Negative log-likelihoods of sequences (B, L) that are on the CPU: position (B,), content (B,)."""
    batch = pos, code, label
    if device.type == "cuda":
        batch = [t.pin_memory() for t in batch]                              # else the copy would wait for the device
    pos, code, label = (t.to(device, non_blocking=True).long() for t in batch)
    with autocast():
        losses = model(pos, code, label)
    return losses["position"], losses["content"]


@torch.no_grad()
def evaluate(model, held_out, device, autocast, batch_size=64):
    """Held-out likelihood per image, code and pixel."""
    model.eval()
    pos, code, label = held_out
    length = lengths(pos, model.layout)
    parts = []
    for part in length.argsort().split(batch_size):                          # like lengths, so little padding
        columns = columns_for(length[part], pos.shape[1], device)
        of_part = pos[part, :columns], code[part, :columns], label[part]
        parts.append(nats(model, *of_part, device, autocast))
    model.train()
    position, content = (torch.cat(part).mean().item() for part in zip(*parts))
    codes = (code >= 0).sum(1).float().mean().item()
    bits = (position + content) / math.log(2)
    return dict(nats_per_image=position + content, position_nats=position, content_nats=content,
                bits_per_code=bits / codes, bits_per_pixel=bits / model.config.size ** 2, codes_per_image=codes)


def draw_samples(path, model, vae, seed, autocast, n=16):
    """A grid of samples, each beside the places of its codes."""
    model.eval()
    label = torch.arange(n, device=vae.codebook.codes.device) % max(1, len(model.config.classes))
    codes, grains = model.layout.unpack(*dq.generate(model, label, seed=seed))
    with autocast(), torch.no_grad():
        images = vae.decode(codes)
    model.train()
    tiles = []
    for x, g in zip(images, grains):
        tiles += [to_picture(x), draw_grains(x, g, vae.config.factors)]
    save_grid(path, tiles, columns=8)


def make_optimizers(model, schedule):
    """-> {name: optimiser}. Muon (Jordan et al., 2024) moves a matrix by its momentum with all singular values made
    alike, scaled here to what AdamW's steps have on average, so that one learning rate does for both."""
    inside = {p for p in model.parameters() if p.dim() == 2 and schedule.optimizer == "muon"}
    inside &= {*model.position_stack.parameters(), *model.content_stack.parameters()}
    outside = [p for p in model.parameters() if p not in inside]
    groups = [dict(params=[p for p in outside if p.dim() > 1], weight_decay=schedule.weight_decay),
              dict(params=[p for p in outside if p.dim() <= 1], weight_decay=0.0)]
    optimizers = dict(optimizer=torch.optim.AdamW(groups, lr=schedule.lr, betas=schedule.betas, fused=True))
    if inside:
        matrices = [p for p in model.parameters() if p in inside]            # in their order, as a resumed run needs
        optimizers["muon"] = torch.optim.Muon(matrices, lr=schedule.lr, weight_decay=schedule.weight_decay,
                                              adjust_lr_fn="match_rms_adamw")
    return optimizers


def seed_of(*numbers):
    """One seed for torch from several numbers; it has nothing to do with that of other numbers, however near."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def main(argv=None):
    args, config, schedule = parse(argv)
    device, autocast = prepare(args)
    rank, world = dq.processes()
    vae = dq.load_vae(args.vae or args.out / "vae.pt", device)
    train, held_out = open_data(args.data, vae.config.size, seed=args.seed, skip=args.out)
    say(describe(train, held_out))
    config = override(config, args, size=vae.config.size, factors=vae.config.factors,
                      codebook_size=vae.config.codebook_size, classes=() if args.uncond else train.classes)

    torch.manual_seed(args.seed)
    model = dq.DQTransformer(config).to(device)
    optimizers = make_optimizers(model, schedule)
    checkpoint = Checkpoint(
        args.out / "transformer.pt", config, dict(data=identity(train), seed=args.seed) | asdict(schedule), model,
        parts=optimizers, extra=dict(vae_config=asdict(vae.config), vae_weights=vae.state_dict()),
        device=device)
    if args.resume:
        former = checkpoint.resume(args)["vae_weights"]
        same = former.keys() == vae.state_dict().keys() and all(
            torch.equal(former[name], tensor.cpu()) for name, tensor in vae.state_dict().items())
        dq.require(same, f"{checkpoint.path} was trained on the codes of another DQ-VAE; leave --resume out")
        if checkpoint.step >= schedule.steps:
            return say(f"nothing left to do: {checkpoint.path} is at step {checkpoint.step}")

    gpus = [device] if device.type == "cuda" else []                         # whose random state fork_rng keeps
    with torch.random.fork_rng(gpus):                                        # a run that goes on has restored its own
        torch.manual_seed(args.seed)                                         # the random router draws
        held_out = encode(vae, held_out, device, autocast, args.workers, mirrored=False)
        pos, code, label = encode(vae, train, device, autocast, args.workers, mirrored=True)
    if args.uncond:
        label, held_out = torch.full_like(label, -1), (*held_out[:2], torch.full_like(held_out[2], -1))
    length = lengths(pos, model.layout)
    codes_per_image = (code >= 0).sum(1).float().mean().item()
    forward = distribute(torch.compile(model) if args.compile else model)
    order = batches(length.numpy(), schedule.batch_size, args.seed, checkpoint.step)
    losses = Losses()

    if not args.resume:
        checkpoint.keep_former()
    log = Log(args.out / "transformer.jsonl", "DQ-Transformer", checkpoint.step, schedule.steps)
    model.train()
    with Stop(device) as stop:
        for step in log.bar:
            done = step + 1
            if world > 1:
                torch.manual_seed(seed_of(args.seed, step, rank))            # every process drops other units
            for optimizer in optimizers.values():
                optimizer.zero_grad(set_to_none=True)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, schedule)
            for part in next(order)[rank::world].chunk(schedule.accumulate):
                columns = columns_for(length[part], pos.shape[1], device)
                of_part = pos[part, :columns], code[part, :columns], label[part]
                # summed over the parts and averaged over the processes, as backward does, it is the mean of the batch
                position, content = (x.sum() * world / schedule.batch_size
                                     for x in nats(forward, *of_part, device, autocast))
                # nats per code; by the mean number of codes, so that every image counts for what it costs
                loss = (position + content) / codes_per_image
                loss.backward()
                losses.add(done, dict(bits_per_code=loss / math.log(2), position_nats=position, content_nats=content))
            if schedule.clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), schedule.clip)
            for optimizer in optimizers.values():
                optimizer.step()

            last, stopped = done == schedule.steps, stop.asked(done)
            evaluates = done % schedule.eval_every == 0 or last
            saves = done % args.save_every == 0 or last or stopped
            if done % 10 == 0 or evaluates or saves:                         # no figure and no file of a broken state
                newest = losses.read(checkpoint.last_good())
            if done % 10 == 0:
                log.write(done, newest)
            if evaluates and rank == 0:
                with torch.random.fork_rng(gpus):                            # how often it is done changes nothing
                    figures = evaluate(model, held_out, device, autocast)
                    draw_samples(args.out / "transformer.png", model, vae, args.seed, autocast)
                log.write(done, figures, stays=True)
                checkpoint.save_best(done, figures["nats_per_image"])
            if saves:
                checkpoint.save(done)
            if stopped and not last:
                log.bar.close()
                stop.leave(stopped, done, checkpoint.path)
    say(f"wrote {checkpoint.path}, {args.out / 'transformer.png'} and {log.path}")


if __name__ == "__main__":
    run(main)
