"""The process that runs a submission, and its messages to and from the grader.

It holds dq.py without our solution of the exercise, and on top of it what the submission defines: no tests and no naive
loops. The tests run in the grader. There, the exercise's function sends its arguments here and receives tensors. So a
submission finds no assert to replace, no frame of a test and nothing to compare with. Messages to the worker are
pickles. The grader unpickles nothing: messages from the worker are JSON and the bytes of tensors.

Each worker is a fork of a process that has imported torch and nothing of this project. `limits` and fence.py say what
it may do.
"""
import ast
import contextlib
import functools
import io
import json
import os
import pickle
import resource
import signal
import socket
import struct
import sys
import types
from multiprocessing.connection import Connection

import numpy as np
import torch

import fence
from exercises import attribute, bound

HERE = os.path.dirname(os.path.abspath(__file__))
MAX_BYTES, MAX_HEAD = 2 ** 28, 2 ** 20                                       # of a message from a worker; of its JSON


# ------------------------------------------------------------------------------------------------
# Messages


def packed(x):
    return str(x.dtype)[6:], list(x.shape), x.detach().cpu().numpy().tobytes()


def unpacked(dtype, shape, raw):
    dtype = getattr(torch, dtype)
    x = torch.frombuffer(bytearray(raw), dtype=dtype) if raw else torch.empty(0, dtype=dtype)
    return x.reshape(shape)


class Packer(pickle.Pickler):
    """To a worker, with a list of the tensors. A tensor that occurs twice arrives as one."""

    def __init__(self):
        self.file, self.tensors = io.BytesIO(), []
        super().__init__(self.file)

    def reducer_override(self, x):
        if not isinstance(x, torch.Tensor):
            return NotImplemented
        self.tensors.append(x)
        return arrived, (*packed(x), x.requires_grad, isinstance(x, torch.nn.Parameter))


ARRIVED = []                                                                 # the same list, in the worker


def arrived(dtype, shape, raw, requires_grad, is_parameter):
    x = unpacked(dtype, shape, raw)
    ARRIVED.append(torch.nn.Parameter(x, requires_grad) if is_parameter else x.requires_grad_(requires_grad))
    return ARRIVED[-1]


def plain(x, tensors):
    """A value for JSON; its tensors are appended to a list."""
    if x is None or type(x) in (bool, int, float, str):
        return x
    if isinstance(x, torch.Tensor):
        tensors.append(x)
        return {"tensor": len(tensors) - 1}
    if isinstance(x, (tuple, list)):
        return [plain(each, tensors) for each in x]
    raise TypeError(f"a tensor or a number is expected here, not {type(x).__name__}")


def answer_of(*values):
    """To the grader."""
    tensors = []
    tree = plain(list(values), tensors)
    tensors = [packed(x) for x in tensors]
    head = json.dumps([tree, [[dtype, shape, len(raw)] for dtype, shape, raw in tensors]]).encode()
    return b"".join([struct.pack("<q", len(head)), head, *(raw for _, _, raw in tensors)])


def read_answer(data):
    """In the grader: numbers, strings, tensors, and tuples of them."""
    at = 8 + struct.unpack("<q", data[:8])[0]
    if at > MAX_HEAD:                                                        # small text can take a lot of memory
        raise ValueError("more than 1 MB of numbers and lists")
    tree, rows = json.loads(data[8:at])
    tensors = []
    for dtype, shape, size in rows:
        tensors.append(unpacked(dtype, shape, data[at:at + size]))
        at += size

    def value(x):
        if isinstance(x, list):
            return tuple(map(value, x))
        return tensors[x["tensor"]] if isinstance(x, dict) else x
    return value(tree)


def contents(x):
    """The tensors of a module, or of a tuple that may hold lists, in an order that both processes agree on."""
    parts = x._buffers.values() if isinstance(x, torch.nn.Module) else x
    return [each for part in parts for each in (part if isinstance(part, list) else [part])]


# ------------------------------------------------------------------------------------------------
# The process


def said(error):
    """One line about an exception; the words alone, if they are a test's or the grader's."""
    line, *_ = str(error).strip().splitlines() or [""]
    ours = isinstance(error, AssertionError) or type(error).__module__ == "checks"
    return (line if ours and line else f"{type(error).__name__}: {line}").removesuffix(": ")[:300]


def load(base, submission, functions):
    """The module dq: the text `base`, and what a submission defines."""
    module = types.ModuleType("dq")
    sys.modules["dq"] = module
    module.__file__, module.FAULTS = os.path.join(os.getcwd(), "dq.py"), []
    exec(compile(base, "base.py", "exec"), vars(module))
    with open("dq.py", "w", encoding="utf-8") as file:                       # for who asks for the text of a function
        file.write(submission)
    merge(module, submission, functions)
    return module


def merge(module, submission, functions):
    """Add to a module what a submission defines: these functions, and everything that is new.

    What else the module has stays as it is. Calls and other statements are left out, and so are statements that fail:
    module.FAULTS names these, and they cost points only where they are needed.
    """
    space, tree = vars(module), ast.parse(submission)
    future = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
    members = {name: dict(vars(each)) for name, each in space.items()
               if isinstance(each, type) and each.__module__ == module.__name__}
    for node in tree.body:
        owner, _, name = attribute(node).partition(".")                      # of a statement `Class.name = ...`
        is_new = owner in members and (name not in members[owner] or f"{owner}.{name}" in functions)
        if node in future or not (bound(node) or is_new):
            continue
        ours = dict(space)
        try:
            exec(compile(ast.Module([*future, node], []), module.__file__, "exec"), space)
        except Exception as error:
            module.FAULTS.append(f"line {node.lineno}: {said(error)}")
        for name, was in ours.items():
            theirs = space.get(name)
            if theirs is was or name in functions:
                continue
            space[name] = was
            for each, value in vars(theirs).items() if name in members and isinstance(theirs, type) else ():
                if each not in members[name] or f"{name}.{each}" in functions:
                    setattr(was, each, value)


class Server:
    """Answers calls of one function until the grader hangs up."""

    def __init__(self, connection):
        self.connection, self.kept = connection, []

    def send(self, *values):
        self.connection.send_bytes(answer_of(*values))

    def serve(self):
        order = pickle.loads(self.connection.recv_bytes())
        os.chdir(order["folder"])
        sys.path[:] = [order["folder"], *(each for each in sys.path if each not in ("", HERE))]
        torch.set_num_threads(1)
        os.environ["TMPDIR"] = order["folder"]
        limits(order["memory"], order["seconds"])
        try:
            fence.close(order["folder"])
        except Exception as error:
            return self.send("unfenced", said(error))
        try:
            module = load(order["base"], order["submission"], order["functions"])
            self.function = functools.reduce(getattr, order["name"].split("."), module)
            self.send("ready", module.FAULTS)
        except BaseException as error:
            return self.send("error", said(error))
        while True:
            data = self.connection.recv_bytes()
            try:
                self.answer(data)
            except BaseException as error:                                   # SystemExit is no way out
                self.send("error", said(error))

    def answer(self, data):
        ARRIVED.clear()
        order = pickle.loads(data)
        if "grads" in order:
            outputs, inputs = self.kept[order["number"]]
            # of a scalar: with tensors of gradients autograd imports what takes two seconds
            scalar = sum((x * grad).sum() for x, grad in zip(outputs, order["grads"]))
            grads = torch.autograd.grad(scalar, inputs, allow_unused=True, retain_graph=True)
            return self.send("result", list(grads))
        torch.manual_seed(order["seed"])
        np.random.seed(order["seed"] % 2 ** 32)
        with torch.set_grad_enabled(order["grad"]):
            result = self.function(*order["args"], **order["kwargs"])
        outputs = []
        plain(result, outputs)
        outputs, inputs = ([x for x in each if x.requires_grad] for each in (outputs, ARRIVED))
        self.kept.append((outputs, inputs))
        changed = [] if order["changed"] is None else contents(order["args"][order["changed"]])
        self.send("result", result, changed, len(self.kept) - 1 if outputs and inputs else None)


def limits(memory, seconds):
    """Of memory, time of computing, and the size of files. The kernel ends a process that computes for longer."""
    seconds = max(1, int(seconds))
    wanted = [(resource.RLIMIT_CPU, seconds), (resource.RLIMIT_FSIZE, 2 ** 20), (resource.RLIMIT_CORE, 0)]
    with contextlib.suppress(OSError), open("/proc/self/statm") as file:     # Linux: what torch has mapped is a lot
        wanted.append((resource.RLIMIT_AS, int(file.read().split()[0]) * resource.getpagesize() + memory))
    for which, most in wanted:
        with contextlib.suppress(ValueError, OSError):                       # a lower one is set already
            resource.setrlimit(which, (most, most))


def nursery():
    """Read connections from the socket that is standard input; each gets a fork of this process."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)                            # nobody waits for them
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    control, quiet = socket.socket(fileno=os.dup(0)), os.open(os.devnull, os.O_RDWR)
    while True:
        data, handles, *_ = socket.recv_fds(control, 1, 1)
        if not handles:
            return
        if os.fork() == 0:
            control.close()
            for number in (0, 1, 2):                                         # the submission's prints go nowhere
                os.dup2(quiet, number)
            with contextlib.suppress(EOFError, OSError):                     # the grader hangs up
                server = Server(Connection(handles[0]))
                server.send(os.getpid())
                server.serve()
            os._exit(0)
        os.close(handles[0])
