"""What the three scripts share, none of which is needed to understand the method; that is dq.py.

Pictures, in and out; a program, its device and its end; a training run: flags, order of the data, losses, checkpoints.
"""
import argparse
import contextlib
import io
import itertools
import json
import math
import os
import random
import signal
import sys
import time
import warnings
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageOps
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import dq


# ------------------------------------------------------------------------------------------------
# Drawing


def save_picture(path, picture, **options):
    """A Pillow image, in the format that the ending says. options: those of Pillow's `save`."""
    memory = io.BytesIO()                                                    # Pillow overlooks it when a disk is full
    picture.save(memory, Image.registered_extensions()[path.suffix.lower()], **options)
    dq.write_file(path, lambda file: file.write(memory.getbuffer()))


def to_picture(x, side=128):
    """(3, S, S) in [-1, 1] -> Pillow image, enlarged by whole pixels to about `side`. Never rescaled in brightness."""
    pixels = ((x.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255).byte()
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    return ImageOps.scale(picture, max(1, side // picture.width), Image.Resampling.NEAREST)


GRAIN_COLOURS = ("#3a6ea5", "#e07b00", "#c01530")                            # blue, orange, red: coarse to fine


def draw_grains(x, grains, factors):
    """One box per code over an image (3, S, S): blue for the coarsest granularity, orange, then red. grains: (h, w)"""
    picture = to_picture(x)
    picture = Image.blend(picture, Image.new("RGB", picture.size, "white"), 0.35)
    pen = ImageDraw.Draw(picture)
    for k, factor in enumerate(factors):                                     # finer boxes lie on top
        side = factor * picture.width / x.shape[-1]
        here = dq.upsample(grains == k, x.shape[-1] // factor)               # S/factor, S/factor
        for row, column in here.nonzero().tolist():
            box = [column * side, row * side, (column + 1) * side, (row + 1) * side]
            pen.rectangle(box, outline=GRAIN_COLOURS[k % 3])
    return picture


def save_grid(path, pictures, columns, captions=None):
    """Pillow images of one size -> one picture, row by row, a caption above each."""
    w, h = pictures[0].size
    top, gap = 14 if captions else 0, 2
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * (w + gap) - gap, rows * (h + gap + top) - gap), "white")
    for i, picture in enumerate(pictures):
        x, y = i % columns * (w + gap), i // columns * (h + gap + top)
        sheet.paste(picture, (x, y + top))
        if captions:
            ImageDraw.Draw(sheet).text((x + 2, y + 1), captions[i], fill="black")
    save_picture(path, sheet)


# ------------------------------------------------------------------------------------------------
# A program: its device, and its end


def pick_device(name, dtype):
    """--device and --dtype -> the device, from now on the current one, and a function that opens an autocast context.
    auto: the GPU if there is one; bfloat16 where the hardware computes in it, else float32."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        if name == "mps" and not decodes_like_the_cpu(torch.device(name)):
            say("note: this Apple GPU computes other numbers than the CPU, which is taken instead")
            name = "cpu"
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError):
        raise dq.UserError(f"no such device here: {name}") from None
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)                                        # streams and graphs are made on that
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        cpu = getattr(torch.cpu, "get_capabilities", dict)()                 # torch has it from 2.11 on
        fast = device.type == "cpu" and (cpu.get("avx512_bf16") or cpu.get("amx_bf16"))
    bf16 = dtype == "bf16" or (dtype == "auto" and bool(fast))
    return device, lambda: torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def decodes_like_the_cpu(device):
    """Apple's GPUs have been known to compute other numbers without a word: does a small decoder give the same?"""
    torch.manual_seed(0)
    with torch.inference_mode():
        vae, codes = dq.DQVAE(dq.VAEConfig(channels=32)).eval(), torch.randint(256, (1, 8, 8))
        vae.codebook.codes.normal_()
        wanted = vae.decode(codes)                                           # 1, 3, 32, 32
        return torch.allclose(vae.to(device).decode(codes.to(device)).cpu(), wanted, atol=1e-3)


GONE = "another process of this job is gone, or its network; --resume goes on from the last checkpoint"
NO_MEMORY = "not enough memory; a smaller --batch-size or a larger --accumulate takes less"
HINTS = {"DataLoader worker": "a process that loads images died; --resume goes on, with fewer --workers in less memory",
         "gloo": GONE, "NCCL": GONE, "out of memory": NO_MEMORY, "allocate memory": NO_MEMORY,
         "compiler": "--compile needs a C++ compiler; leave it out, or install one"}


def run(main):
    """Call a script's main, and exit. What the user can mend ends in one line and exit status 1, not in a traceback."""
    status = 0
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:                                       # closed, as some services do
            setattr(sys, name, open(os.devnull, "w"))
        with contextlib.suppress(AttributeError):                            # each line at once, also into a file
            getattr(sys, name).reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        main()
    except SystemExit as end:                                                # of argparse, or after a signal
        status = end.code
    except KeyboardInterrupt:
        status = 130
    except (dq.UserError, OSError) as error:
        status = printable(f"error: {str(error).strip().splitlines()[-1]}")  # a loader process adds lines before ours
    except RuntimeError as error:
        hint = next((hint for sign, hint in HINTS.items() if sign in str(error)), None)
        if hint is None:
            raise
        status = f"error: {hint} ({str(error).strip().splitlines()[0]})"
    while LOCKS:
        LOCKS.popitem()[1].close()
    if dq.rank_world()[1] > 1 and not status:                                 # none leaves while another is at work
        dist.barrier()
        dist.destroy_process_group()
    elif dq.rank_world()[1] > 1:                                              # an orderly exit could wait for ever
        if isinstance(status, str):
            print(status, file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1 if isinstance(status, str) else status)
    if status:
        sys.exit(status)


# ------------------------------------------------------------------------------------------------
# A training run. Of several processes, process 0 alone prints, evaluates and writes files


def number(kind, low, below=math.inf):
    """An argparse type: a number of this kind, at least `low` and below `below`."""
    def read(text):
        if not low <= kind(text) < below:
            limit = "" if below == math.inf else f" and below {below}"
            raise argparse.ArgumentTypeError(f"must be at least {low}{limit}, not {text}")
        return kind(text)
    read.__name__ = kind.__name__                                            # for argparse's "invalid int value"
    return read


positive, natural, weight = number(int, 1), number(int, 0), number(float, 0)


def flag(default=MISSING, **how):
    """A field that can be set on the command line. how: as in argparse's `add_argument`"""
    return field(default=default, metadata=how)


@dataclass
class Schedule:
    """How a stage is trained."""
    steps: int = flag(type=positive, help="optimiser steps")
    batch_size: int = flag(type=positive, help="images a step, of all processes together")
    lr: float = flag(type=number(float, 1e-12), help="highest learning rate")
    betas: tuple = (0.9, 0.99)
    weight_decay: float = 0.0            # of matrices; stage 2
    warmup: int = 100                    # steps
    decay: str = "cosine"                # how the learning rate then falls to zero; or "linear"
    eval_every: int = flag(250, type=positive, help="steps between evaluations")
    accumulate: int = flag(1, metavar="N", type=positive, help="work on a batch in N parts, which takes less memory")
    clip: float = flag(1.0, type=weight, help="largest norm of the gradient; 0: no limit")

    def learning_rate(self, step):
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (1 - done if self.decay == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


def trainer_flags(description, presets, argv, preset="toy"):
    """What both trainers have. presets: {name: (config, schedule)} -> parser, config and schedule of --preset"""
    chooser = argparse.ArgumentParser(add_help=False)
    chooser.add_argument("--preset", choices=presets, default=preset,
                         help="sizes and schedule; other flags override it")
    config, schedule = presets[chooser.parse_known_args(argv)[0].preset]
    parser = argparse.ArgumentParser(description=description, parents=[chooser],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--out", metavar="DIR", type=Path, default=Path("out"), help="folder that the run writes")
    for each in fields(schedule):
        if each.metadata:
            add(f"--{each.name.replace('_', '-')}", default=getattr(schedule, each.name), **each.metadata)
    add("--seed", type=number(int, 0, below=2 ** 63), default=0, help="of weights, data order and noise")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--dtype", choices=["auto", "bf16", "fp32"], default="auto", help="auto: bf16 where the hardware has it")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--save-every", type=positive, default=schedule.eval_every, help="steps between checkpoints")
    return parser, config, schedule


def override(preset, args, **more):
    """A preset's config or schedule, with the values of the flags that are named like its fields."""
    flags = {field.name: getattr(args, field.name) for field in fields(preset) if hasattr(args, field.name)}
    return replace(preset, **flags | more)


def prepare(args, trains=True):
    """Join the other processes of a torchrun job, make the output folder. -> device, autocast"""
    world, local = (int(os.environ.get(name) or default) for name, default in (("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    dq.require(world == 1 or not missing, f"WORLD_SIZE is {world}, but there is no {', '.join(missing)}: torchrun sets "
               "all of them; for a single process unset WORLD_SIZE")
    parts = args.accumulate * world
    dq.require(args.batch_size % parts == 0 or not trains, f"--batch-size {args.batch_size} is not a multiple of "
               f"{parts}, which is --accumulate times the number of processes")
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
    if dq.rank_world()[0] == 0:
        lock(args.out)
    return device, autocast


LOCKS = {}                               # {folder: open file}


def lock(folder):
    """UserError while another run writes into this folder. `run` drops the lock, or the system if this process dies."""
    if (name := os.path.realpath(folder)) in LOCKS:
        return
    file = open(os.path.join(folder, ".lock"), "a")
    try:
        import fcntl                                                         # not on every system
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise dq.UserError(f"another run is writing into {folder}; wait for its end, or name another --out") from None
    except (ImportError, OSError) as error:
        say(f"note: can't tell whether another run writes into {folder} ({error})")
    LOCKS[name] = file


def seed_all(*numbers):
    """Seed all generators, also those that only students use; what other numbers give, however near, is unlike it.
    Done at every step, it makes a run that goes on draw as if it had never stopped, however often it is evaluated."""
    random.seed(str(numbers))                                                # takes a hash of it
    np.random.seed(random.getrandbits(32))
    torch.manual_seed(random.getrandbits(64))                                # on all devices


def distribute(model):
    """For the forward pass in training: with it, backward averages the gradients over the processes."""
    if dq.rank_world()[1] == 1:
        return model
    # the buffers (codebook, batch norm) are alike by themselves; where parts are accumulated, each is averaged
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)                       # the argument's new name is too new
        return DistributedDataParallel(model, broadcast_buffers=False)


def say(line):
    if dq.rank_world()[0] == 0:
        print(printable(line), flush=True)


def printable(text):
    """Names of files can be any bytes: what is no character, or steers a terminal, becomes its escape sequence."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def shuffled_indices(n, batch_size, seed, start=0):
    """Endless lists of batch_size numbers, from batch number `start` on; in epoch e they are e n to e n + n - 1, in an
    order of its own. All depends on the arguments alone, so a resumed run sees what it would have seen."""
    epochs = itertools.count(start * batch_size // n)
    numbers = (e * n + int(i) for e in epochs for i in dq.numpy_rng(seed, e).permutation(n))
    numbers = itertools.islice(numbers, start * batch_size % n, None)
    while True:
        yield list(itertools.islice(numbers, batch_size))


# Ctrl-C, and what batch systems send; not every system has them all
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]


class Stop(contextlib.ExitStack):
    """with Stop(device): signals that ask for an end are noted, for after the step; the second one takes effect at
    once."""

    def __init__(self, device):
        super().__init__()
        self.device, self.number = device, 0
        self.calls, self.next, self.since = 0, 1, time.monotonic()
        for number in SIGNALS:
            if number.name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                self.callback(signal.signal, number, signal.signal(number, self.note))

    def note(self, number, frame):
        self.number = number
        self.close()                                                         # puts the former handlers back

    def asked(self):
        """After each step -> number of the signal that came, or 0. All processes leave together, or the rest would wait
        for ever. To agree they wait for the device, so not at every step; but in 30 s torchrun would kill them."""
        world, self.calls = dq.rank_world()[1], self.calls + 1
        if world == 1 or self.calls < self.next:
            return self.number if world == 1 else 0
        seconds = (time.monotonic() - self.since) / self.calls               # a step; for 3 s or 10 steps all go on
        noted, seconds = dq.all_reduce_sum(torch.tensor([float(self.number), seconds], device=self.device)).tolist()
        self.next = self.calls + min(10, max(1, int(3 * world / seconds)))
        return signal.SIGTERM if noted else 0

    def leave(self, number, when, then="; the same command with --resume goes on"):
        say(f"stopped by {signal.Signals(number).name} {when}{then}")
        sys.exit(128 + number)


@dataclass
class Record:
    """What a run writes: a log of its losses, and checkpoints, to go on as if it had never stopped."""
    args: argparse.Namespace
    path: Path                           # vae.pt or transformer.pt
    config: object                       # of the model
    settings: dict                       # whatever else makes it this run: data, seed, schedule
    model: torch.nn.Module
    parts: dict                          # {name: what else has a state_dict}: optimisers, discriminator
    extra: dict                          # what else the files shall hold
    step: int = 0                        # of the newest checkpoint; 0: there is none
    best: float = math.inf               # lowest held-out loss
    losses: dict = field(default_factory=dict)                               # {step: {name: scalar}} not yet looked at
    may_change = ("steps", "eval_every", "accumulate")                       # of the settings, in a run that goes on

    def begin(self, *also):
        """With --resume load the newest checkpoint, if it is of this command's run, and say which settings have
        changed; without it move aside what a former run left, and files of the names `also`."""
        if not self.args.resume:
            return set_aside(self.path, *also)
        held = dq.load_checkpoint(self.path, f"dq-{self.path.stem}")
        # older ones lack fields of the configuration, which then had their defaults, and settings
        then = asdict(type(self.config)()) | held.get("config", {}) | held.get("settings", {})
        now = asdict(self.config) | self.settings
        for name in [name for name in now if name in then and then[name] != now[name]]:
            title = f"--{name.replace('_', '-')}" if hasattr(self.args, name) else name
            dq.require(name in self.may_change, f"{self.path} was trained with {title} {then[name]}, not "
                       f"{now[name]}; give the same to go on, or leave --resume out to start anew")
            if held["step"] < now["steps"]:
                say(f"note: {title} was {then[name]} and is {now[name]} from step {held['step']} on")
        try:
            for name, part in dict(weights=self.model, **self.parts).items():
                part.load_state_dict(held[name])
            self.step, self.best = held["step"], held["best"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise dq.UserError(f"{self.path} was written by another command or version, or is damaged; "
                               f"leave --resume out ({str(error).splitlines()[0]})") from None

    def start(self, title):
        """-> the numbers of the steps to come, under a progress bar."""
        rank, steps, self.log = dq.rank_world()[0], self.settings["steps"], self.path.with_suffix(".jsonl")
        self.bar = tqdm(range(self.step, steps), title, initial=self.step, total=steps,
                        disable=True if rank or self.step >= steps else None)
        if rank == 0:                                                        # later steps are about to be done again
            lines = [json.dumps(line) + "\n" for line in read_log(self.log) if line["step"] <= self.step]
            dq.write_file(self.log, lambda file: file.write("".join(lines).encode()))
        return self.bar

    def add(self, done, terms, scale=1.0):
        """Step `done` has these losses, {name: scalar}, times `scale`: added up over the parts of its batch. They stay
        on the device until they are logged: to ask a GPU for a value is to wait."""
        sums = self.losses.setdefault(done, {})
        for name, term in terms.items():
            sums[name] = sums.get(name, 0.0) + scale * term.detach().float()

    def newest_losses(self):
        """Their means over the processes. UserError if one since the last call is not finite."""
        for done, sums in self.losses.items():
            means = dq.all_reduce_sum(torch.stack(list(sums.values()))) / dq.rank_world()[1]
            newest = dict(zip(sums, means.tolist()))
            bad = ", ".join(name for name, value in newest.items() if not math.isfinite(value))
            dq.require(not bad, f"step {done}: not finite in the loss: {bad}; {self.last_good()}; "
                                f"a new run may need a lower --lr")
        self.losses.clear()
        return newest

    def after(self, done, stop):
        """Log the losses of every tenth step. -> what is due: to evaluate, to save, to stop (the signal)"""
        last, asked = done == self.settings["steps"], stop.asked()
        evaluates = last or done % self.settings["eval_every"] == 0
        saves = last or asked or done % self.args.save_every == 0
        if done % 10 == 0 or evaluates or saves:                             # no figure and no file of a broken state
            newest = self.newest_losses()
            if done % 10 == 0:
                self.write_log(done, newest)
        if asked:
            self.bar.close()
        return evaluates, saves, asked if not last else 0

    def write_log(self, done, values, stays=False):
        """One JSON object a line. stays: on the terminal, on a line of its own"""
        if dq.rank_world()[0] > 0:
            return
        line = dict(step=done) | {name: round(x, 5) if isinstance(x, float) else x for name, x in values.items()}
        try:
            with open(self.log, "a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise dq.UserError(f"could not write {self.log} ({error.strerror})") from None
        shown = {name: f"{value:.3f}" if isinstance(value, float) else value for name, value in values.items()}
        self.bar.set_postfix(shown, refresh=False)
        if stays:
            tqdm.write(f"step {done}: " + ", ".join(f"{name} {value}" for name, value in shown.items()))

    def evaluated(self, done, figures, loss):
        """Beside the newest checkpoint goes that of the lowest held-out loss: for use, not for --resume."""
        self.write_log(done, figures, stays=True)
        if loss < self.best:
            self.best = loss
            self.write(self.path.with_suffix(".best.pt"), done)

    def save(self, done):
        finite = all(x.isfinite().all() for x in self.model.state_dict().values())
        dq.require(finite, f"step {done}: a weight is not finite; {self.last_good()}")
        states = {name: part.state_dict() for name, part in self.parts.items()}
        self.write(self.path, done, settings=self.settings, **states)
        self.step = done

    def write(self, path, done, **more):
        if dq.rank_world()[0] == 0:
            dq.save_checkpoint(path, f"dq-{self.path.stem}", self.config, self.model,
                               step=done, best=self.best, **self.extra, **more)

    def last_good(self):
        return f"the last good checkpoint is that of step {self.step}, {self.path}" if self.step else (
            "there is no checkpoint yet")


def read_log(path):
    """The lines of a log as dicts; what a crash or an editor left between them is skipped."""
    lines = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):                                # cut short, or not UTF-8
            line = json.loads(line)
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                lines.append(line)
    return lines


def set_aside(path, *also, hint=" (--resume would have gone on with it)"):
    """A run that starts anew moves what a former one left beside `path`, all of its stem and of the names `also`, into
    a folder of its own."""
    left = [file for pattern in (f"{path.stem}.*", *also) for file in path.parent.glob(pattern)]
    if dq.rank_world()[0] > 0 or not {path.name, *also} & {file.name for file in left}:
        return
    folders = (path.with_name(f"former-{n}") for n in itertools.count(1))
    former = next(folder for folder in folders if not any((folder / file.name).exists() for file in left))
    former.mkdir(exist_ok=True)
    for file in left:
        os.replace(file, former / file.name)
    print(f"{path} and what belongs to it, of a former run, are now in {former}{hint}")
