"""What the three scripts share: drawing, device, command-line flags, and training runs with their checkpoints and logs.

Nothing here is needed to understand the method; that is dq.py.
"""
import argparse
import contextlib
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
    picture = to_picture(x)
    picture = Image.blend(picture, Image.new("RGB", picture.size, "white"), 0.35)
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
    """--device and --dtype -> the torch.device, which becomes the current one, and a function that opens an autocast
    context. dtype auto: bfloat16 where the hardware computes in it, else float32. UserError if there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"                # Apple's GPUs: with --device mps
    if name == "cuda":
        name = f"cuda:{variable('LOCAL_RANK')}"                              # 0 without torchrun
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise dq.UserError(f"no such device: {name}, on a machine with {torch.cuda.device_count()} CUDA GPUs "
                           f"({first_line(error)})") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)                                        # streams and graphs are created there
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        cpu = getattr(torch.cpu, "get_capabilities", dict)()                 # torch 2.11 or newer
        fast = device.type == "cpu" and (cpu.get("avx512_bf16") or cpu.get("amx_bf16"))
    bf16 = dtype == "bf16" or (dtype == "auto" and bool(fast))
    return device, lambda: torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def on_gpu(name):
    """True if --device names a CUDA GPU: for defaults that depend on the type of the device alone."""
    return name.startswith("cuda") or name == "auto" and torch.cuda.is_available()


def machine(device, autocast):
    """What computes, as strings -> {"device", "dtype", "torch"}"""
    with autocast():
        dtype = "bf16" if torch.is_autocast_enabled(device.type) else "fp32"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return dict(device=f"{device.type} ({name})", dtype=dtype, torch=str(torch.__version__))


def limit(psnr):
    """What reconstructions of this PSNR, in dB, mean for samples, as the end of a line; nothing if it is not known."""
    return f"; reconstructions limit them at {psnr:.1f} dB, which more --steps of train_vae.py raise" if psnr else ""


# What to do about an error, by a pattern in its traceback, where only types and messages begin a line
HINTS = {
    r"^(?! ).*(out of memory|allocate memory|MemoryError|bad_alloc|ALLOC_FAILED)":
        "not enough memory; reduce --batch-size, or in training increase --accumulate",
    r"^(?! ).*(gloo|NCCL)": "another process of this job died or lost its connection; --resume continues",
    r"^torch\._(dynamo|inductor)\.|convert_frame\.py|compile_fx\.py":
        "--compile does not work here; leave it out, or install what it lacks"}


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def explain(error):
    """An exception -> one line if the user can fix it, else None."""
    text = "" if isinstance(error, dq.UserError) else "".join(traceback.format_exception(error))
    hint = next((HINTS[pattern] for pattern in HINTS if re.search(pattern, text, re.MULTILINE)), None)
    if not hint and isinstance(error, (dq.UserError, OSError)):
        return f"error: {first_line(error)}"
    return hint and f"error: {hint} ({first_line(error)})"


class Suppress(contextlib.suppress, contextlib.ContextDecorator):
    """contextlib.suppress, also as a decorator."""


def run(main):
    """Call a script's main and exit. User errors print one line, without a traceback, and exit with status 1."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")                 # None if closed, as some services do
        setattr(sys, name, stream)
        with contextlib.suppress(AttributeError):                            # each line at once, also into a file
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
            if "write" not in vars(stream):                                  # a reader may be gone: `| head -1`
                stream.write, stream.flush = map(Suppress(OSError), (stream.write, stream.flush))
    status, line = 0, ""
    try:
        main()
        if dq.rank_world()[1] > 1:                                           # wait for the other ranks
            dist.barrier()
            dist.destroy_process_group()
    except (SystemExit, KeyboardInterrupt) as end:                           # of argparse, or by a signal
        status = getattr(end, "code", 130)
    except Exception as error:
        line = printable(explain(error) or "")
        if not line:
            raise
    LOCKS.clear()                                                            # closes the files
    if dq.rank_world()[1] > 1:                                               # a clean exit could deadlock
        print(line, file=sys.stderr, flush=True)
        os._exit(1 if line else status or 0)
    if line or status:
        sys.exit(line or status)


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
    """The flags of both trainers. presets: {name: ...}; schedule: a subclass of Schedule -> the parser, and a function
    like its add_argument for the flags that replace a value of the preset. Without the flag, `override` takes it."""
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--preset", choices=presets, help="model and schedule; default: the preset that suits the data")
    add("--out", metavar="DIR", type=path, default=Path("out"), help="output folder; default: %(default)s")
    add("--seed", type=number(int, 0, below=2 ** 63), default=0, help="random seed; default: %(default)s")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ...; default: %(default)s")
    add("--dtype", choices=["auto", "bf16", "fp32"], default="auto",
        help="auto, which is the default: bf16 where the hardware supports it")
    add("--compile", action="store_true", help="use torch.compile")
    add("--resume", action="store_true", help="continue from the checkpoint in --out, if there is one")
    replacing = parser.add_argument_group("model and schedule", "Defaults: the preset's; see PRESETS in the script")
    for each in fields(schedule):
        if each.metadata:
            replacing.add_argument(f"--{each.name.replace('_', '-')}", **each.metadata)
    replacing.add_argument("--save-every", type=positive, help="steps between checkpoints; one is also saved before "
                           "each evaluation; default: --eval-every of the preset")
    return parser, replacing.add_argument


def override(preset, args, **more):
    """A preset's config or schedule, with the flags that are named like its fields and with the values `more`. Flags
    that are not given are None; they take the preset's value, in `args` as well."""
    names = [each.name for each in fields(preset) if hasattr(args, each.name)]
    for name in names:
        if getattr(args, name) is None:
            setattr(args, name, getattr(preset, name))
    return replace(preset, **{name: getattr(args, name) for name in names} | more)


# ---- A training run. Only rank 0 prints and writes files ---------------------------------------

def prepare(args, trains=True):
    """Join the other processes of a torchrun job, make and lock the output folder. -> device, autocast"""
    world = max(1, variable("WORLD_SIZE"))
    parts = args.accumulate * world
    dq.require(args.batch_size % parts == 0 or not trains, f"--batch-size {args.batch_size} is not a multiple of "
               f"{parts}, which is --accumulate times the number of processes")
    args.part = max(1, args.batch_size // parts)                             # images that a process holds at a time
    device, autocast = pick_device(args.device, args.dtype)
    if world > 1:
        join(world, device)
    args.out.mkdir(parents=True, exist_ok=True)
    if dq.rank_world()[0] == 0:
        lock(args.out)
    say("{device}, {dtype}, torch {torch}".format(**machine(device, autocast)))
    return device, autocast


LOCKS = []                               # open files; closing a file releases its lock


def lock(folder, file_name=".lock"):
    """UserError if another process writes into this folder. `run` releases the lock, or the death of this process."""
    LOCKS.append(open(os.path.join(folder, file_name), "a"))
    try:
        import fcntl                                                         # not on Windows
        fcntl.lockf(LOCKS[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise dq.UserError(f"another run is writing into {folder}; wait until it ends, or use another --out") from None
    except (ImportError, OSError) as error:
        say(f"note: can't tell whether another run writes into {folder} ({error})")


def seed_all(*numbers):
    """Seed Python, NumPy and torch with a hash of these numbers, so that nearby ones give unrelated streams. Done at
    every step, it makes a resumed run draw the same random numbers, however often it evaluates."""
    random.seed(str(numbers))                                                # hashes the string
    np.random.seed(random.getrandbits(32))
    torch.manual_seed(random.getrandbits(64))                                # on all devices


def say(line):
    """Print a line on rank 0, above the progress bar."""
    if dq.rank_world()[0] == 0:
        tqdm.write(printable(line))


def printable(text):
    """Escape unprintable characters: file names can contain any bytes, and control characters steer terminals."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def shuffled_indices(n, batch_size, seed, start=0):
    """Endless shuffled batches of indices, from batch number `start` on. Each epoch has its own order; the indices of
    epoch e run from e * n to e * n + n - 1. Batches depend on the arguments only, so a run can be resumed."""
    epochs = itertools.count(start * batch_size // n)
    numbers = (e * n + int(i) for e in epochs for i in dq.numpy_rng(seed, e).permutation(n))
    numbers = itertools.islice(numbers, start * batch_size % n, None)
    while True:
        yield list(itertools.islice(numbers, batch_size))


# Ctrl-C and the signals of batch systems; not every system has all of them
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]


class Stop(contextlib.ExitStack):
    """with Stop() as stop: the first termination signal is deferred to the end of the step, a second one exits at once.

    A loader, a file server or another rank may block a step for ever, and then Python may not run its signal handlers.
    So a thread ends the process if the step takes `patience` more seconds. Batch systems wait for 30.
    """

    def __init__(self, patience=20):
        super().__init__()
        self.number, self.noted, self.patience, self.over = 0, math.inf, patience, threading.Event()
        # over the CPU, because to ask a GPU would wait for it
        self.group = dist.new_group(backend="gloo") if dq.rank_world()[1] > 1 else None
        self.receiver, sender = socket.socketpair()                          # Python sends the numbers of signals
        self.enter_context(sender).setblocking(False)
        self.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False))
        self.callback(self.over.set)
        threading.Thread(target=self.watch, daemon=True).start()
        for number in SIGNALS:
            if number.name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN:  # ignored under nohup
                self.callback(signal.signal, number, signal.signal(number, self.note))

    def note(self, number, frame):
        if time.monotonic() > self.noted + 1:                                # `timeout` sends its signal twice
            sys.exit(128 + number)
        self.number, self.noted = number, min(self.noted, time.monotonic())

    def watch(self):
        number = next((byte[0] for byte in iter(lambda: self.receiver.recv(1), b"") if byte[0] in SIGNALS), 0)
        if number and not self.over.wait(self.patience):
            say(f"stopped by {signal.Signals(number).name} in a step that does not end: a loader, a file server or "
                "another process does not answer; --resume continues from the last checkpoint")
            os._exit(128 + number)

    def asked(self):
        """After each step -> the number of the signal that came, or 0; the same on all ranks, which stop together."""
        noted = torch.tensor(self.number)
        if self.group:
            dist.all_reduce(noted, dist.ReduceOp.MAX, group=self.group)
        if noted:
            self.over.set()                                                  # saving may take longer than a step
        return noted.item()

    def leave(self, number, when, then="; the same command with --resume continues"):
        say(f"stopped by {signal.Signals(number).name} {when}{then}")
        sys.exit(128 + number)


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
    may_change: tuple = ("steps", "eval_every", "device", "dtype", "torch", "accumulate")  # settings, when resuming
    step: int = 0                        # of the latest checkpoint; 0: there is none
    best: float = math.inf               # lowest validation loss
    log_bytes: int = 0                   # length of the log when the checkpoint was written
    news: dict = field(default_factory=dict)                                 # settings to write into the log
    losses: dict = field(default_factory=dict)                               # {step: {name: scalar}}, on the device

    def begin(self, *also):
        """Load the checkpoint to resume, after checking that it belongs to this run. A new run moves the files of a
        previous one aside, and with them those named in `also`."""
        self.news = now = asdict(self.config) | self.settings
        resumes = self.args.resume or variable("TORCHELASTIC_RESTART_COUNT") > 0  # torchrun has restarted this job
        if resumes and not self.path.exists():
            say(f"note: there is no {self.path} to resume yet; starting from scratch")
        if not resumes or not self.path.exists():
            return set_aside(self.path, *also)
        saved = dq.load_checkpoint(self.path, f"dq-{self.path.stem}")
        # older checkpoints lack some fields of the configuration, which had their defaults then, and some settings
        then = asdict(type(self.config)()) | saved.get("config", {}) | saved.get("settings", {})
        self.news = {name: now[name] for name in now if name in then and then[name] != now[name]}
        for name, value in self.news.items():
            title = f"--{name.replace('_', '-')}" if hasattr(self.args, name) else name
            dq.require(name in self.may_change, f"{self.path} was trained with {title} {then[name]}, not {value}; "
                       "use the same to resume, or leave --resume out to start from scratch")
            say(f"note: {title} was {then[name]} and is {value} from step {saved['step']} on")
        try:
            for name, part in dict(weights=self.model, **self.parts).items():
                part.load_state_dict(saved[name])
            self.step, self.best, self.log_bytes = saved["step"], saved["best"], saved.get("log_bytes", math.inf)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise dq.UserError(f"{self.path} was written by another command or version, or is damaged; "
                               f"leave --resume out to start from scratch ({first_line(error)})") from None

    def steps(self, title, stop, validate):
        """Yield the number of each step to come, under a progress bar. Between two steps, this logs, saves and
        evaluates, and exits if there was a signal. validate: step -> metrics, validation loss"""
        first, every = self.step, self.settings["eval_every"]
        steps = max(first, self.settings["steps"])
        due, began, self.log = {steps, *range(every, steps, every)}, None, self.path.with_suffix(".jsonl")
        bar = tqdm(range(first, steps + 1), title, initial=first, total=steps,
                   disable=True if dq.rank_world()[0] or first >= steps else None)
        if dq.rank_world()[0] == 0:
            with open(self.log, "ab") as file:                               # drop what is about to be repeated
                file.truncate(min(file.tell(), self.log_bytes))
        if self.news:
            self.write_log(first, self.news)
        for step in bar:
            if step in due:          # after saving, because it can fail; a run that resumes here evaluates again
                self.metrics, loss = validate(step)
                if loss < self.best:
                    self.best = loss
                    self.write(self.path.with_suffix(".best.pt"), step)
                self.write_log(step, self.metrics, stays=True)
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
                self.save(done)
            if number and done < steps:
                stop.leave(number, f"after step {done}, saved in {self.path}")

    def add(self, done, terms, scale=1.0):
        """Add `scale` times the losses {name: scalar} of a part of a batch to those of step `done`. They stay on the
        device until they are logged, because reading a value waits for the device."""
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
        bad = ", ".join(name for name, value in values.items() if not math.isfinite(value))
        there = f"the last good checkpoint is that of step {self.step}, {self.path}"
        dq.require(not bad, f"step {done}: not finite in the {what}: {bad}; "
                            f"{there if self.step else 'there is no checkpoint yet'}; a new run may need a lower --lr")

    def write_log(self, done, values, stays=False):
        """Append one JSON object. stays: print it as a line as well"""
        if dq.rank_world()[0] > 0:
            return
        rounded = {name: float(f"{x:.6g}") if isinstance(x, float) else x for name, x in values.items()}
        try:
            with open(self.log, "a") as file:
                file.write(json.dumps(dict(step=done) | rounded) + "\n")
        except OSError as error:
            raise dq.UserError(f"could not write {self.log} ({error.strerror})") from None
        if stays:
            shown = {name: f"{x:.4g}" if isinstance(x, float) else x for name, x in values.items()}
            say(f"step {done}: " + ", ".join(f"{name} {x}" for name, x in shown.items()))

    def save(self, done):
        weights = {name: x.abs().max().item() for name, x in self.model.state_dict().items()}
        self.require_finite(done, "weights", weights)
        self.write(self.path, done, settings=self.settings,
                   **{name: part.state_dict() for name, part in self.parts.items()})
        self.step = done

    def write(self, path, done, **more):
        if dq.rank_world()[0] == 0:
            dq.save_checkpoint(path, f"dq-{self.path.stem}", self.config, self.model, step=done, best=self.best,
                               log_bytes=self.log.stat().st_size, **self.extra, **more)


def read_log(path):
    """The lines of a log as dicts, without those that a crash or an editor damaged."""
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if re.fullmatch(r'\{"step": \d.*\}', line)]


def set_aside(path, *also, hint=" (--resume would have continued it)"):
    """Move the files of a previous run, all with the stem of `path` and those named in `also`, into a new folder."""
    left = [file for pattern in (f"{path.stem}.*", *also) for file in path.parent.glob(pattern)]
    if dq.rank_world()[0] > 0 or not {path.name, *also} & {file.name for file in left}:
        return
    numbered = (path.with_name(f"former-{n}") for n in itertools.count(1))
    former = next(folder for folder in numbered if not folder.exists())
    former.mkdir()
    for file in left:
        os.replace(file, former / file.name)
    say(f"moved {path} and the other files of a previous run to {former}{hint}")


# ---- Several processes -------------------------------------------------------------------------

def variable(name):
    """A number that torchrun has put into the environment; 0 without it."""
    text = os.environ.get(name) or "0"
    dq.require(text.isdecimal(), f"the environment variable {name} is {text!r}, which is no number or below 0; "
                                 "torchrun sets it; for a single process unset WORLD_SIZE")
    return int(text)


def join(world, device):
    """Join the other processes of a torchrun job. UserError if its variables make no sense, or a process is missing."""
    rank, port = variable("RANK"), variable("MASTER_PORT")
    dq.require(rank < world and 0 < port < 65536,
               f"RANK is {rank}, WORLD_SIZE {world} and MASTER_PORT {port}; torchrun sets these environment variables; "
               "for a single process unset WORLD_SIZE")
    backend, how = ("nccl", dict(device_id=device)) if device.type == "cuda" else ("gloo", {})
    try:
        dist.init_process_group(backend, **how)                              # barriers then know their device
    except Exception as error:                                               # no MASTER_ADDR, a port in use, no network
        raise dq.UserError(f"could not join the {world} processes of this job ({first_line(error)})") from None


def distribute(model):
    """Wrap the forward pass in DistributedDataParallel: backward then averages the gradients over the ranks."""
    return torch.nn.parallel.DistributedDataParallel(model) if dq.rank_world()[1] > 1 else model
