"""What the scripts share: drawing, devices, flags, training runs with checkpoints and logs. The method is in dq.py."""
import argparse
import contextlib
import functools
import io
import itertools
import json
import math
import os
import random
import re
import signal
import socket
import sys
import threading
import time
import traceback
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

import dq


# ---- Drawing -----------------------------------------------------------------------------------

def save_picture(path, picture, **options):
    """Save a Pillow image atomically; the extension selects the format. options: as for Pillow's `save`."""
    memory = io.BytesIO()                                                    # Pillow does not notice a full disk
    picture.save(memory, Image.registered_extensions()[path.suffix.lower()], **options)
    dq.write_file(path, lambda file: file.write(memory.getbuffer()), sync=False)


def to_picture(x, side=128):
    """(3, S, S) in [-1, 1] -> Pillow image, upsampled by a whole factor to about `side`; brightness is not rescaled."""
    pixels = ((x.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255).byte()
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    return ImageOps.scale(picture, max(1, side // picture.width), Image.Resampling.NEAREST)


GRAIN_COLOURS = ("#3a6ea5", "#e07b00", "#c01530")                            # blue, orange, red: coarse to fine


def draw_grains(x, grains, factors):
    """An image (3, S, S) with one box per code: blue for the coarsest granularity, then orange, red. grains: (h, w)"""
    picture = to_picture(0.65 * x + 0.35)                                    # paler, so that the boxes stand out
    pen = ImageDraw.Draw(picture)
    for k, factor in enumerate(factors):                                     # finer boxes are drawn on top
        side = factor * picture.width / x.shape[-1]
        here = dq.upsample(grains == k, x.shape[-1] // factor)               # S/factor, S/factor
        for row, column in here.nonzero().tolist():
            box = [column * side, row * side, (column + 1) * side, (row + 1) * side]
            pen.rectangle(box, outline=GRAIN_COLOURS[k % 3])
    return picture


def save_grid(path, pictures, columns, captions=None):
    """Save Pillow images of one size as one picture, row by row, each with a caption above it."""
    (w, h), top, gap = pictures[0].size, 14 if captions else 0, 2
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * (w + gap) - gap, rows * (h + gap + top) - gap), "white")
    for i, picture in enumerate(pictures):
        x, y = i % columns * (w + gap), i // columns * (h + gap + top)
        sheet.paste(picture, (x, y + top))
        ImageDraw.Draw(sheet).text((x + 2, y + 1), captions[i] if captions else "", fill="black")
    save_picture(path, sheet)


# ---- The device, and the entry point of a script -----------------------------------------------

def pick_device(name, dtype):
    """--device and --dtype -> the torch.device, a function that opens an autocast context, and a description of both:
    {"device", "dtype", "torch"}. dtype auto: bfloat16 where the hardware computes in it, else float32."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"                # Apple's GPUs: with --device mps
    if name == "cuda":
        name = f"cuda:{env_number('LOCAL_RANK')}"                            # 0 without torchrun
    with explained(f"no such device: {name}, on a machine with {torch.cuda.device_count()} CUDA GPUs"):
        device = torch.device(name)
        torch.ones(1, device=device).item()
    if device.type == "cuda":
        torch.cuda.set_device(device)                                        # streams and graphs are created there
        chip, fast = torch.cuda.get_device_name(device), torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        chip = torch.backends.cpu.get_cpu_capability()
        cpu = getattr(torch.cpu, "get_capabilities", dict)()                 # torch 2.11 or newer
        fast = device.type == "cpu" and (cpu.get("avx512_bf16") or cpu.get("amx_bf16"))
    bf16 = dtype == "bf16" or (dtype == "auto" and bool(fast))
    machine = dict(device=f"{device.type} ({chip})", dtype="bf16" if bf16 else "fp32", torch=str(torch.__version__))
    return device, lambda: torch.autocast(device.type, torch.bfloat16, enabled=bf16), machine


def on_gpu(name):
    """True if there is a CUDA GPU and --device does not name the CPU: for defaults that depend on it."""
    return name != "cpu" and torch.cuda.is_available()


# What to do about an error, by a pattern in its traceback, where only types and messages begin a line
HINTS = {
    r"^(?! ).*(out of memory|allocate memory|MemoryError|bad_alloc|ALLOC_FAILED)":
        "not enough memory; reduce --batch-size, or in training increase --accumulate",
    r"^(?! ).*(gloo|NCCL)": "another process of this job died or lost its connection; --resume continues",
    r"^torch\._(dynamo|inductor)\.|convert_frame\.py|compile_fx\.py": "--compile does not work here; leave it out"}


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def explained(message):
    """with explained(message): an exception becomes a UserError, which ends with the reason in brackets."""
    try:
        yield
    except (dq.UserError, MemoryError, torch.OutOfMemoryError):              # these have lines of their own
        raise
    except Exception as error:
        raise dq.UserError(f"{message} ({first_line(error)})") from None


def run(main):
    """Call a script's main and exit. User errors print one line, without a traceback, and exit with status 1."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # None if closed
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):                            # streams of notebooks lack it
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    status = None                                                            # as sys.exit takes it: a number or a line
    try:
        main()
        if dq.rank_world()[1] > 1:                                           # wait for the other ranks
            dist.barrier()
            dist.destroy_process_group()
    except (SystemExit, KeyboardInterrupt) as end:                           # of argparse, or by a signal
        status = getattr(end, "code", 130)
    except Exception as error:
        text = "" if isinstance(error, dq.UserError) else "".join(traceback.format_exception(error))
        hint = next((HINTS[pattern] for pattern in HINTS if re.search(pattern, text, re.MULTILINE)), None)
        if not hint and not isinstance(error, (dq.UserError, OSError)):
            raise                                                            # a bug, with its traceback
        status = printable(f"error: {hint} ({first_line(error)})" if hint else f"error: {first_line(error)}")
    if dq.rank_world()[1] > 1:                                               # a clean exit could deadlock
        print(status if isinstance(status, str) else "", file=sys.stderr)
        os._exit(1 if isinstance(status, str) else status or 0)
    if status:
        sys.exit(status)


# ---- Command-line flags ------------------------------------------------------------------------

def number(kind, low, below=math.inf):
    """-> an argparse type: an int or a float (`kind`), at least `low` and below `below`."""
    def read(text):
        if not low <= kind(text) < below:
            limit = "" if below == math.inf else f" and below {below}"
            raise argparse.ArgumentTypeError(f"must be at least {low}{limit}, not {text}")
        return kind(text)
    read.__name__ = kind.__name__                                            # argparse says "invalid int value"
    return read


positive, natural, weight = number(int, 1), number(int, 0), number(float, 0)


def path(text):
    """An argparse type: a Path with `~` expanded. An empty one, as of a shell variable that is not set, is an error."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(os.path.expanduser(text))


def flag(default=MISSING, **how):
    """A dataclass field that is a command-line flag, too. how: as in argparse's `add_argument`"""
    return field(default=default, metadata=how)


@dataclass
class Schedule:
    """Training hyperparameters; those with a `flag` can be set on the command line."""
    steps: int = flag(type=positive, help="optimizer steps")
    batch_size: int = flag(type=positive, help="global batch size, over all processes")
    lr: float = flag(type=number(float, 1e-12), help="peak learning rate")
    betas: tuple = (0.9, 0.99)
    weight_decay: float = 0.0            # of matrices; stage 2
    warmup: int = 100                    # steps
    decay: str = "cosine"                # of the learning rate to zero; or "linear"
    eval_every: int = flag(250, type=positive, help="steps between evaluations on the validation set")
    accumulate: int = flag(1, metavar="N", type=positive, help="gradient accumulation steps; more need less memory")
    clip: float = flag(1.0, type=weight, help="gradient clipping norm; 0: off")

    def learning_rate(self, step):
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (1 - done if self.decay == "linear" else 0.5 * (1 + math.cos(math.pi * done)))

    def update(self, model, optimizers, step):
        """Clip the gradients of the model, step each of the optimizers {name: optimizer}, and reset its gradients."""
        if self.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), self.clip)
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate(step)
            optimizer.step()                                                 # does nothing without gradients
            optimizer.zero_grad(set_to_none=True)


def trainer_flags(description, presets, schedule):
    """-> a parser with the flags of both trainers, and its add_argument for flags that replace values of a preset."""
    parser = argparse.ArgumentParser(description=description)
    group = parser.add_argument_group("model and schedule", "Defaults: the preset's; see PRESETS in the script")
    add, replacing = parser.add_argument, group.add_argument
    add("--preset", choices=presets, help="model and schedule; default: the preset that suits the data")
    add("--out", metavar="DIR", type=path, default=Path("out"), help="output folder; default: %(default)s")
    add("--seed", type=number(int, 0, below=2 ** 63), default=0, help="random seed; default: %(default)s")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ...; default: %(default)s")
    add("--dtype", choices=["auto", "bf16", "fp32"], default="auto", help="auto, the default: bf16 where it is fast")
    add("--compile", action="store_true", help="use torch.compile")
    add("--resume", action="store_true", help="continue from the checkpoint in --out, if there is one")
    for each in fields(schedule):
        if each.metadata:
            replacing(f"--{each.name.replace('_', '-')}", **each.metadata)
    replacing("--save-every", type=positive, help="steps between checkpoints; default: the preset's --eval-every")
    return parser, replacing


def override(preset, args):
    """A preset's config or schedule, with the values of the given flags that are named like its fields."""
    names = [each.name for each in fields(preset)]
    return replace(preset, **{name: value for name, value in vars(args).items() if name in names and value is not None})


# ---- A training run. Only rank 0 prints and writes files ---------------------------------------

def env_number(name, valid=natural):
    """A number that torchrun has put into the environment; 0 without it. valid: as for argparse"""
    with explained(f"the environment variable {name}, which torchrun sets, is wrong; for one process unset WORLD_SIZE"):
        return valid(os.environ.get(name) or "0")


def prepare(args, schedule, trains=True):
    """Join the other processes of a torchrun job, make and lock the output folder. -> what `pick_device` returns"""
    world = max(1, env_number("WORLD_SIZE"))
    parts = schedule.accumulate * world
    dq.require(schedule.batch_size % parts == 0 or not trains, f"--batch-size {schedule.batch_size} is not a multiple "
               f"of {parts}, which is --accumulate times the number of processes")
    args.part = max(1, schedule.batch_size // parts)                         # images that a process holds at a time
    device, autocast, machine = pick_device(args.device, args.dtype)
    if world > 1:
        env_number("RANK", number(int, 0, below=world))                      # torch would wait for ever
        env_number("MASTER_PORT", number(int, 1, below=65_536))
        backend, bound = ("cpu:gloo,cuda:nccl", device) if device.type == "cuda" else ("gloo", None)
        # the store keeps addresses of dead processes, so a restart needs new keys; several nodes would count separately
        attempt = env_number("TORCHELASTIC_RESTART_COUNT") if env_number("LOCAL_WORLD_SIZE") == world else 0
        with explained(f"could not join the {world} processes of this job"):  # no MASTER_ADDR, a port in use, ...
            store, rank, _ = next(dist.rendezvous("env://"))
            store = dist.PrefixStore(f"attempt {attempt}", store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world, device_id=bound)
    args.out.mkdir(parents=True, exist_ok=True)
    if dq.rank_world()[0] == 0:
        args.lock = lock(args.out)                                           # until main ends
    say("{device}, {dtype}, torch {torch}".format(**machine))
    return device, autocast, machine


def lock(folder, file_name=".lock"):
    """UserError if another process writes into this folder. -> a file that holds the lock while it is open"""
    file = open(os.path.join(folder, file_name), "a")
    try:
        import fcntl                                                         # not on Windows
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)                     # child processes do not inherit it
    except (BlockingIOError, PermissionError):
        raise dq.UserError(f"another run is writing into {folder}; wait until it ends, or use another --out") from None
    except (ImportError, OSError) as error:
        say(f"note: can't tell whether another run writes into {folder} ({error})")
    return file


def seed_all(*numbers):
    """Seed Python, NumPy and torch. Done at every step, this makes resumed runs draw the same random numbers."""
    random.seed(str(numbers))                                                # a hash: similar seeds, unrelated streams
    np.random.seed(random.getrandbits(32))
    torch.manual_seed(random.getrandbits(64))                                # on all devices


def say(line):
    """Print a line on rank 0, above the progress bar. Its reader may be gone, as with `| head -1`."""
    if dq.rank_world()[0] == 0:
        try:
            tqdm.write(printable(line))
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())   # for the rest of the run


def printable(text):
    """Escape unprintable characters: file names can contain any bytes, and control characters steer terminals."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def shuffled_indices(n, batch_size, seed, start=0):
    """Endless shuffled batches of indices, from batch number `start` on. Each epoch has its own order; the indices of
    epoch e run from e * n to e * n + n - 1. Batches depend on the arguments only, so a run can be resumed."""
    order = functools.lru_cache(2)(lambda epoch: dq.numpy_rng(seed, epoch).permutation(n))
    for first in itertools.count(start * batch_size, batch_size):
        yield [i // n * n + int(order(i // n)[i % n]) for i in range(first, first + batch_size)]


class Stop(contextlib.ExitStack):
    """with Stop() as stop: a first Ctrl-C or signal of a batch system waits for the end of the step, a second one exits
    at once. A loader, a file server or another rank may block a step for ever, and then Python may not run its signal
    handlers. So a thread ends the process if the step takes `patience` more seconds. Batch systems wait for 30."""
    signals = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]

    def __init__(self, patience=20):
        super().__init__()
        self.number, self.noted, self.patience, self.over = 0, 0.0, patience, threading.Event()
        self.receiver, sender = socket.socketpair()                          # Python sends the numbers of signals
        self.enter_context(sender).setblocking(False)
        self.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False))
        self.callback(self.over.set)
        threading.Thread(target=self.watch, daemon=True).start()
        for number in self.signals:
            if number.name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN:  # ignored under nohup
                self.callback(signal.signal, number, signal.signal(number, self.note))

    def note(self, number, frame):
        if self.number and time.monotonic() > self.noted + 1:                # `timeout` sends its signal twice
            sys.exit(128 + number)
        self.number, self.noted = number, time.monotonic()

    def watch(self):
        number = next((byte[0] for byte in iter(lambda: self.receiver.recv(1), b"") if byte[0] in self.signals), 0)
        if number and not self.over.wait(self.patience):
            self.leave(number, "in a step that does not end; a loader, a file server or a rank hangs", exit=os._exit)

    def asked(self):
        """After each step -> the number of the signal that came, or 0; the same on all ranks, which stop together."""
        number = dq.all_gather(torch.tensor([self.number])).max().item()     # on the CPU: a GPU would be waited for
        if number:
            self.over.set()                                                  # saving may take longer than a step
        return number

    def leave(self, number, when, then="; the same command with --resume continues", exit=sys.exit):
        say(f"stopped by {signal.Signals(number).name} {when}{then}")
        exit(128 + number)


@dataclass
class Record:
    """Logging, checkpointing and evaluation of a run. A resumed run continues as if it had never stopped."""
    args: argparse.Namespace
    path: Path                           # vae.pt or transformer.pt
    config: object                       # of the model
    settings: dict                       # what else defines the run: data, seed, schedule; and the machine
    model: torch.nn.Module
    parts: dict                          # {name: object with a state_dict}: optimizers, discriminator
    extra: dict                          # further entries of the checkpoints
    may_change: frozenset = frozenset({"steps", "eval_every", "device", "dtype", "torch", "accumulate"})  # on --resume
    step: int = 0                        # of the latest checkpoint; 0: there is none
    best: float = math.inf               # lowest validation loss
    log_bytes: int = 0                   # length of the log; a killed run may have written more
    news: dict = field(default_factory=dict)                                 # settings to write into the log
    losses: dict = field(default_factory=dict)                               # {step: {name: scalar}}, on the device
    metrics: dict = field(default_factory=dict)                              # of the latest evaluation, on rank 0

    def begin(self, *also):
        """Load the checkpoint to resume if it is of this run, or set a previous run aside, with the files in `also`."""
        self.news = now = asdict(self.config) | self.settings
        resumes = self.args.resume or env_number("TORCHELASTIC_RESTART_COUNT") > 0  # torchrun has restarted this job
        if resumes and not self.path.exists():
            say(f"note: there is no {self.path} to resume yet; starting from scratch")
        if not resumes or not self.path.exists():
            return set_aside(self.path, *also)
        saved = dq.load_checkpoint(self.path, f"dq-{self.path.stem}")
        with explained(f"{self.path} is damaged, or of another command; leave --resume out to start from scratch"):
            # older checkpoints lack some fields of the configuration, which had their defaults then, and some settings
            then = asdict(type(self.config)()) | saved.get("config", {}) | saved.get("settings", {})
            self.news = {name: value for name, value in now.items() if then.get(name, value) != value}
            for name, value in self.news.items():
                title = f"--{name.replace('_', '-')}" if hasattr(self.args, name) else name
                dq.require(name in self.may_change, f"{self.path} was trained with {title} {then[name]}, not {value}; "
                           "use the same to resume, or leave --resume out to start from scratch")
                say(f"note: {title} was {then[name]} and is {value} from step {saved['step']} on")
            for name, part in dict(weights=self.model, **self.parts).items():
                part.load_state_dict(saved[name])
            self.step, self.best, self.log_bytes = saved["step"], saved["best"], saved.get("log_bytes", math.inf)

    def steps(self, title, stop, validate):
        """Yield the number of each step to come, under a progress bar. Between two steps, this logs, saves and
        evaluates, and exits if there was a signal. validate: step -> metrics, validation loss; on rank 0"""
        first, every, rank = self.step, self.settings["eval_every"], dq.rank_world()[0]
        steps = max(first, self.settings["steps"])
        due, began, self.log = {steps, *range(every, steps, every)}, None, self.path.with_suffix(".jsonl")
        bar = tqdm(range(first, steps + 1), title, steps, initial=first, disable=True if rank else None)
        self.write_log(first, self.news)
        for step in bar:
            if step in due and rank == 0:  # after saving, because it can fail; a run that resumes here evaluates again
                self.metrics, loss = validate(step)
                if loss < self.best:
                    self.best = loss
                    self.save(self.path.with_suffix(".best.pt"), step)
                self.write_log(step, self.metrics)
                say(f"step {step}: " + ", ".join(f"{name} {x:.4g}" if isinstance(x, float) else f"{name} {x}"
                                                 for name, x in self.metrics.items()))
            if step == steps:
                return
            yield step
            done, number = step + 1, stop.asked()
            saves = number or done in due or done % self.args.save_every == 0
            if done % 10 == 0 or saves:                                      # never save after a loss of NaN
                newest = self.newest_losses()
                bar.set_postfix(newest, refresh=False)
                if done % 10 == 0:
                    self.write_log(done, newest)
            began = began or time.monotonic()                                # leave out the first step, which warms up
            if done == first + 20 and done < steps:
                minutes = (time.monotonic() - began) / 19 * (steps - done) / 60
                say(f"step {done}: about {max(1, round(minutes))} min for the other {steps - done} steps")
            if saves:
                self.require_finite(done, "weights", self.model.state_dict())
                states = {name: part.state_dict() for name, part in self.parts.items()}
                self.save(self.path, done, settings=self.settings, **states)
                self.step = done
            if number and done < steps:
                stop.leave(number, f"after step {done}, saved in {self.path}")

    def add(self, done, terms, scale=1.0):
        """Add `scale` times the losses {name: scalar} of a part of step `done`. Reading them would wait for a GPU."""
        sums = self.losses.setdefault(done, {})
        for name, term in terms.items():
            sums[name] = sums.get(name, 0.0) + scale * term.detach().float()

    def newest_losses(self):
        """The latest losses, averaged over the ranks. UserError if one since the last call is not finite."""
        for done, sums in self.losses.items():
            means = dq.all_reduce_sum(torch.stack(list(sums.values()))) / dq.rank_world()[1]
            newest = dict(zip(sums, means.tolist()))
            self.require_finite(done, "loss", newest)
        self.losses.clear()
        return newest

    def require_finite(self, done, what, values):
        bad = ", ".join(name for name, x in values.items() if not torch.as_tensor(x).isfinite().all())
        last = f"the checkpoint of step {self.step} is still good" if self.step else "there is no checkpoint yet"
        dq.require(not bad, f"step {done}: not finite in the {what}: {bad}; {last}; a new run may need a lower --lr")

    def write_log(self, done, values):
        """Append one JSON object, in place of what a killed run has written after its last checkpoint."""
        if dq.rank_world()[0] > 0 or not values:
            return
        rounded = {name: float(f"{x:.6g}") if isinstance(x, float) else x for name, x in values.items()}
        with explained(f"could not write {self.log}"), open(self.log, "ab") as file:
            file.seek(file.truncate(min(file.tell(), self.log_bytes)))
            file.write(json.dumps(dict(step=done) | rounded).encode() + b"\n")
            self.log_bytes = file.tell()

    def save(self, path, done, **more):
        if dq.rank_world()[0] == 0:
            dq.save_checkpoint(path, f"dq-{self.path.stem}", self.config, self.model, step=done, best=self.best,
                               log_bytes=self.log_bytes, **self.extra, **more)


def set_aside(path, *also, hint=" (--resume would have continued it)"):
    """Move the files of a previous run, all with the stem of `path` and those named in `also`, into a new folder."""
    left = [file for pattern in (f"{path.stem}.*", *also) for file in path.parent.glob(pattern)]
    if left and dq.rank_world()[0] == 0:
        former = next(new for n in itertools.count(1) if not (new := path.with_name(f"former-{n}")).exists())
        former.mkdir()
        for file in left:
            os.replace(file, former / file.name)
        say(f"moved the files of a previous run from {path.parent} to {former}{hint}")


def distribute(model):
    """Wrap the forward pass in DistributedDataParallel: backward then averages the gradients over the ranks."""
    return torch.nn.parallel.DistributedDataParallel(model) if dq.rank_world()[1] > 1 else model
