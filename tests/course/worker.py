"""The process that a submission runs in, and the letters that pass between it and the grader.

It holds dq.py with the exercise's function taken from the submission: no solution of this exercise, no tests and no
naive loops. The tests run in the grader. There, that function is replaced by one that sends its arguments here and
receives tensors. So a submission finds no assert to replace, no frame of a test and nothing to compare with. Letters
are JSON and the bytes of tensors, of which the grader makes numbers, lists and tensors.

Each worker is a fork of a process that has imported torch and nothing of this project; where there is no fork (Windows)
it is a new process. `limits` and fence.py say what it may do.
"""
import contextlib
import json
import os
import signal
import socket
import struct
import sys
from dataclasses import asdict, is_dataclass
from multiprocessing.connection import Connection

import numpy as np
import torch

import fence

HERE = os.path.dirname(os.path.abspath(__file__))
OF_EVERY_MODULE = set(vars(torch.nn.Module()))
MAX_BYTES, MAX_HEAD = 2 ** 27, 2 ** 20                                       # of a letter, of its JSON


# ------------------------------------------------------------------------------------------------
# Letters


class Taught:
    """Stands for a module that was sent before."""

    def __init__(self, key):
        self.key = key


class Letter:
    """Values to bytes: encode(value), then whole(). A tensor that occurs twice is sent once, and arrives as one."""

    def __init__(self):
        self.tensors, self.number, self.callbacks, self.size = [], {}, [], 0

    def encode(self, x):
        if x is None or type(x) in (bool, int, float, str):
            return x
        if isinstance(x, torch.Tensor):
            if id(x) not in self.number:
                self.number[id(x)] = len(self.tensors)
                self.tensors.append(x)
                self.size += x.numel() * x.element_size()
                if self.size > MAX_BYTES:
                    raise ValueError("more than 128 MB of tensors")
            return ["tensor", self.number[id(x)]]
        if isinstance(x, np.generic):
            return x.item()
        if isinstance(x, Taught):
            return ["taught", x.key]
        if isinstance(x, torch.nn.Module):
            plain = {name: each for name, each in vars(x).items() if name not in OF_EVERY_MODULE}
            parts = (x._parameters, x._buffers, x._modules, plain)
            return ["module", f"{type(x).__module__}.{type(x).__name__}", x.training, *map(self.encode, parts)]
        if is_dataclass(x):
            return ["config", type(x).__name__, self.encode(asdict(x))]
        if isinstance(x, tuple) and hasattr(x, "_fields"):
            return ["named", type(x).__name__, [self.encode(each) for each in x]]
        if isinstance(x, (list, tuple)):
            return ["tuple" if isinstance(x, tuple) else "list", [self.encode(each) for each in x]]
        if isinstance(x, dict):
            return ["dict", {str(name): self.encode(each) for name, each in x.items()}]
        if callable(x):
            self.callbacks.append(x)
            return ["callback", len(self.callbacks) - 1]
        raise TypeError(f"a tensor or a number is expected here, not {type(x).__name__}")

    def whole(self, value):
        tree, raw = self.encode(value), [bytes_of(x) for x in self.tensors]
        rows = [[str(x.dtype)[6:], list(x.shape), x.requires_grad, len(each)] for x, each in zip(self.tensors, raw)]
        head = json.dumps([tree, rows]).encode()
        return b"".join([struct.pack("<q", len(head)), head, *raw])


def bytes_of(x):
    x = x.detach().cpu()
    return (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy().tobytes()


class Reader:
    """Bytes to values. Without `space`, a module dq, it makes numbers, strings, lists, tuples, dicts and tensors."""

    def __init__(self, data, space=None, callback=None, taught=None):
        n, = struct.unpack("<q", data[:8])
        if space is None and n > MAX_HEAD:                                   # small text can take a lot of memory
            raise ValueError("more than 1 MB of numbers and lists")
        self.tree, rows = json.loads(data[8:8 + n])
        self.space, self.callback, self.taught, at = space, callback, taught, 8 + n
        self.tensors, self.raw, self.slots, self.used = [], [], [], []
        for dtype, shape, requires_grad, size in rows:
            raw, at = bytearray(data[at:at + size]), at + size
            dtype = getattr(torch, dtype)
            x = torch.frombuffer(raw, dtype=dtype) if size else torch.empty(0, dtype=dtype)
            x = x.reshape(shape)
            self.tensors.append(x.requires_grad_() if requires_grad and space else x)
            self.raw.append(bytes(raw))

    def value(self):
        return self.decode(self.tree)

    def decode(self, x):
        if not isinstance(x, list):
            return x
        tag, *rest = x
        if tag == "tensor":
            return self.tensors[rest[0]]
        if tag in ("list", "tuple"):
            made = self.filled([None] * len(rest[0]), enumerate(rest[0]))
            return made if tag == "list" else tuple(made)
        if tag == "dict":
            return self.filled({}, rest[0].items())
        if self.space is None:
            raise TypeError(f"a tensor or a number is expected here, not a {tag}")
        if tag == "taught":
            self.used.append(rest[0])
            return self.taught[rest[0]][1]
        if tag == "callback":
            return lambda *args: self.callback(rest[0], args)
        if tag == "named":
            return getattr(self.space, rest[0])(*[self.decode(each) for each in rest[1]])
        if tag == "config":
            return getattr(self.space, rest[0])(**self.decode(rest[1]))
        name, training, *parts = rest
        owner = self.space if name.startswith("dq.") else torch.nn
        module = torch.nn.Module.__new__(getattr(owner, name.split(".")[-1]))
        torch.nn.Module.__init__(module)
        module.training = training
        for holder, part in zip((module._parameters, module._buffers, module._modules, vars(module)), parts):
            self.filled(holder, part[1].items())
            if holder is module._parameters:
                for key, each in holder.items():
                    if each is not None:
                        holder[key] = torch.nn.Parameter(each.detach(), each.requires_grad)
                        self.tensors[part[1][key][1]] = holder[key]
        return module

    def filled(self, holder, items):
        for key, each in items:
            holder[key] = self.decode(each)
            if isinstance(each, list) and each[0] == "tensor":
                self.slots.append((holder, key, each[1]))                    # who looks here sees what became of it
        return holder

    def changed(self):
        """{number of a tensor: what it is now}, for those that are not what arrived."""
        now = {str(number): holder[key] for holder, key, number in self.slots}
        for number, x in enumerate(self.tensors):
            now.setdefault(str(number), x)
        return {number: x for number, x in now.items() if isinstance(x, torch.Tensor)
                and (x.shape != self.tensors[int(number)].shape or bytes_of(x) != self.raw[int(number)])}


# ------------------------------------------------------------------------------------------------
# The process


def said(error):
    """One line about an exception of the submission, and where in its function it was raised."""
    if isinstance(error, TooLate):
        return "not done after all seconds of computing that it has"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}".removesuffix(": ")[:300]


def load(source):
    """The module dq, made of this text. A new statement of the submission that fails is noted, and left out."""
    module = type(sys)("dq")
    sys.modules["dq"] = module
    module.__file__, module.FAULTS = os.path.join(os.getcwd(), "dq.py"), []
    with open("dq.py", "w", encoding="utf-8") as file:                       # for who asks for the text of a function
        file.write(source)
    exec(compile(source, module.__file__, "exec"), vars(module))
    return module


class Server:
    """Answers calls of one function until the grader hangs up."""

    def __init__(self, connection):
        self.connection, self.kept, self.taught = connection, {}, {}

    def send(self, **letter):
        self.connection.send_bytes(Letter().whole(letter))

    def receive(self):
        return self.connection.recv_bytes()

    def serve(self):
        order = Reader(self.receive(), self).value()                       # the grader's, of any size
        os.chdir(order["folder"])
        sys.path[:] = [order["folder"], *(each for each in sys.path if each not in ("", HERE))]
        torch.set_num_threads(1)
        os.environ["TMPDIR"] = order["folder"]
        limits(order["memory"], order["seconds"])
        try:
            fence.close(order["folder"])
        except Exception as error:
            return self.send(unfenced=f"{type(error).__name__}: {error}")
        try:
            self.module = load(order["source"])
            self.function = self.module
            for name in order["function"].split("."):
                self.function = getattr(self.function, name)
            self.send(ready=True, faults=self.module.FAULTS)
        except BaseException as error:
            return self.send(error=said(error))
        while True:
            try:
                data = self.receive()
            except EOFError:
                return
            try:
                self.answer(data)
            except BaseException as error:                                   # SystemExit is no way out
                self.send(error=said(error))

    def callback(self, key, number, args):
        self.send(callback=[key, number], args=list(args))
        reader = Reader(self.receive(), self.module)
        self.inputs += reader.tensors
        return reader.value()

    def answer(self, data):
        reader = Reader(data, self.module, lambda number, args: self.callback(reader.key, number, args), self.taught)
        self.inputs = []
        order = reader.value()
        reader.key = order.get("teach", -1)
        if "teach" in order:                                                 # a module, which calls will refer to
            self.taught[order["teach"]] = reader, order["module"]
            return
        if "backward" in order:
            outputs, inputs = self.kept[order["backward"]]
            # of a scalar: with tensors of gradients autograd imports what takes two seconds
            scalar = sum((x * grad).sum() for x, grad in zip(outputs, order["grads"]))
            grads = torch.autograd.grad(scalar, inputs, allow_unused=True, retain_graph=True)
            return self.send(result=list(grads))
        torch.manual_seed(order["seed"])
        np.random.seed(order["seed"] % 2 ** 32)
        with torch.set_grad_enabled(order["grad"]):
            result = self.function(*order["args"], **order["kwargs"])
        letter = Letter()
        letter.encode(result)
        outputs = [x for x in letter.tensors if x.requires_grad]
        readers = {"-1": reader} | {str(key): self.taught[key][0] for key in reader.used}
        inputs = [x for each in readers.values() for x in each.tensors] + self.inputs
        inputs = [x for x in inputs if x.requires_grad]
        if outputs and inputs:
            self.kept[order["number"]] = outputs, inputs
        self.send(result=result, changed={key: each.changed() for key, each in readers.items()},
                  kept=bool(outputs and inputs))


class TooLate(BaseException):
    """So that no `except Exception` of a submission takes it for one of its own."""


def too_late(number, frame):
    raise TooLate


def limits(memory, seconds):
    """Of memory, time of computing, and the size of files; Windows has none of them."""
    with contextlib.suppress(ImportError):
        import resource
        signal.signal(signal.SIGXCPU, too_late)
        seconds = max(1, int(seconds))
        wanted = [(resource.RLIMIT_CPU, seconds, seconds + 2), (resource.RLIMIT_FSIZE, 2 ** 20, 2 ** 20),
                  (resource.RLIMIT_CORE, 0, 0)]
        with contextlib.suppress(OSError), open("/proc/self/statm") as file:  # Linux: what torch has mapped is a lot
            now = int(file.read().split()[0]) * resource.getpagesize()
            wanted.append((resource.RLIMIT_AS, now + memory, now + memory))
        for which, soft, hard in wanted:
            with contextlib.suppress(ValueError, OSError):                   # a lower one is set already
                resource.setrlimit(which, (soft, hard))


def run(connection):
    """In the new process, until the grader hangs up."""
    quiet = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):                                                 # the submission's prints go nowhere
        os.dup2(quiet, number)
    with contextlib.suppress(EOFError, OSError):
        Server(connection).serve()


def nursery():
    """Read connections from the socket that is standard input; each gets a fork of this process."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)                            # nobody waits for them
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    control = socket.socket(fileno=os.dup(0))
    while True:
        data, handles, *_ = socket.recv_fds(control, 1, 1)
        if not handles:
            return
        child = os.fork()
        if child == 0:
            control.close()
            connection = Connection(handles[0])
            connection.send_bytes(Letter().whole(os.getpid()))
            run(connection)
            os._exit(0)
        os.close(handles[0])


if __name__ == "__main__":
    nursery()
