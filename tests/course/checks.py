"""Tests one exercise of a submission, in a worker of its own.

The tests run here. They see this project's dq.py, except for one function, which asks the worker for its answers.
"""
import contextlib
import importlib
import inspect
import itertools
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing import Pipe
from pathlib import Path

from exercises import EXERCISES, definitions, is_stub, parsed, with_holes

HERE = Path(__file__).resolve().parent
ALL = [e.function for e in EXERCISES]
nursery = mine = None


def prepare(folder, text=None):
    """Make this process a checker for the project in a folder: its dq.py, its tests, its naive loops.

    text: in a student's copy, the submission, whose other exercises stand in for ours
    """
    global dq, base, modules, mine
    sys.path[:0] = [str(folder), str(folder / "tests"), str(folder / "tests" / "course")]
    base, mine = (folder / "dq.py").read_text(encoding="utf-8"), text
    connect()
    import dq
    if mine:
        dq.FAULTS = []
        worker.merge(dq, mine, ALL)
    torch.set_num_threads(1)
    modules = {e.function: {test: the_test(e, test) for test in e.tests.split()} for e in EXERCISES}


def the_test(e, test):
    file, _, name = test.rpartition("::")
    return getattr(importlib.import_module(Path(file or e.file).stem), name)


# ------------------------------------------------------------------------------------------------
# A worker


def connect():
    """What the leaderboard needs as well: workers, and no tests."""
    global worker, torch, nursery
    import torch
    import worker
    nursery = nursery or Nursery()                                           # the grader's, which all checkers share


def message(value):
    """-> bytes for a worker, and the tensors in them"""
    packer = worker.Packer()
    packer.dump(value)
    return packer.file.getvalue(), packer.tensors


class NotGraded(Exception):
    """A fault of the grader or its machine, which must not cost a student points."""


class Nursery:
    """Where workers come from: forks of a process that knows torch only."""

    def __init__(self):
        self.control, theirs = socket.socketpair()
        kept = {"PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH"} & os.environ.keys()  # no secrets
        environment = {name: os.environ[name] for name in kept} | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen([sys.executable, "-c", "import worker; worker.nursery()"], stdin=theirs,
                                        cwd=HERE, env=environment)
        theirs.close()

    def close(self):
        self.control.close()
        self.process.kill()
        self.process.wait()

    def worker(self):
        """-> a connection to a new worker, its process id. After a failure, the next worker has a new nursery."""
        try:
            ours, theirs = Pipe()
            socket.send_fds(self.control, [b"."], [theirs.fileno()])
            theirs.close()
            if not ours.poll(60):
                raise TimeoutError("not within a minute")
            return ours, worker.read_answer(ours.recv_bytes())[0]
        except (OSError, EOFError) as error:
            self.close()
            self.__init__()
            raise NotGraded(f"no worker could be started ({type(error).__name__}: {error})") from None


class Fault(Exception):
    """What is wrong with a submission, in one line."""


class Lost(Fault):
    """The worker is of no more use."""


NOT_RUN = "not run: the time for the whole file was over"
CHANGES = {"Codebook.update": 0, "Codebook.restart": 0, "decode_one": 2}     # the argument that is changed in place


class Remote:
    """Calls a function of dq.py in a worker, as if it were here: with gradients and changes in place.

    base: the text of dq.py; submission: what the worker adds to it; functions: of these, what replaces ours
    """

    def __init__(self, base, submission, functions, name, limit, folder, until=math.inf):
        self.connection, self.pid = nursery.worker()
        self.limit, self.waited, self.until = limit, 0.0, until
        self.deadline = min(time.monotonic() + 10 * limit, until)            # by the clock: others use the cores too
        self.changed = CHANGES.get(name)
        try:
            _, (self.faults,) = self.ask(base=base, submission=submission, functions=functions, name=name,
                                         folder=folder, memory=2 ** 31, seconds=limit)
        except BaseException:
            self.close()
            raise

    def close(self):
        self.connection.close()
        with contextlib.suppress(OSError):
            os.kill(self.pid, signal.SIGKILL)

    def clock(self):
        """Seconds that the worker has computed. Linux counts them, elsewhere it is the time for which we waited."""
        if sys.platform == "linux":
            return time.clock_gettime(~self.pid << 3 | 2)                    # the clock of another process
        return self.waited

    def ask(self, **order):
        """-> the tensors that were sent, and the reply"""
        (data, tensors), start, before = message(order), time.monotonic(), 0.0
        try:
            before = self.clock()
            self.connection.send_bytes(data)
            left = self.deadline - start
            if left <= 0 or not self.connection.poll(left):
                raise Lost(NOT_RUN if self.deadline == self.until else f"not done after {10 * self.limit:g} seconds")
            kind, *reply = worker.read_answer(self.connection.recv_bytes(worker.MAX_BYTES))
        except (EOFError, OSError):
            late = before + time.monotonic() - start >= 0.95 * self.limit    # the kernel counts start-up, and in ticks
            raise Lost(f"not done after {self.limit:g} seconds of computing" if late else "its process died") from None
        except Lost:
            raise
        except Exception as error:
            raise Fault(f"an answer that can't be read ({type(error).__name__})") from None
        self.waited += time.monotonic() - start
        if kind == "unfenced":
            raise NotGraded(f"the worker could not be fenced ({reply[0]})")
        if kind == "error":
            raise Fault(str(reply[0]))
        return tensors, reply

    def __call__(self, *args, **kwargs):
        tensors, (result, changed, number) = self.ask(
            args=args, kwargs=kwargs, changed=self.changed, grad=torch.is_grad_enabled(),
            seed=int(torch.randint(2 ** 62, ())))
        if self.changed is not None:
            for was, now in zip(worker.contents(args[self.changed]), changed, strict=True):
                if now.shape != was.shape:
                    raise Fault("it changes the shape of what it was given")
                was.data.copy_(now)
        elif result is None:
            raise Fault("it returns nothing")
        inputs = [x for x in tensors if x.requires_grad]
        if number is None or not inputs or not torch.is_grad_enabled():
            return result

        class Gradient(torch.autograd.Function):
            @staticmethod
            def forward(ctx, output, *inputs):
                return output.clone()

            @staticmethod
            def backward(ctx, grad):
                return None, *self.ask(number=number, grads=[grad])[1][0]

        return Gradient.apply(result, *inputs)


@contextlib.contextmanager
def in_place(function, theirs, clock=time.process_time):
    """For a while dq's function, and what the tests have imported of it, is another one, which this clock times."""
    owner, _, name = function.rpartition(".")
    holder = getattr(dq, owner) if owner else dq
    ours, places = vars(holder)[name], [holder]
    if not owner:
        places = [each for each in list(sys.modules.values()) if getattr(each, "__dict__", {}).get(name) is ours]
    for place in places:
        setattr(place, name, lambda *args, **kwargs: theirs(*args, **kwargs))
    speed = importlib.import_module("test_speed")
    try:
        speed.clock = clock
        yield
    finally:
        speed.clock = time.process_time
        for place in places:
            setattr(place, name, ours)


# ------------------------------------------------------------------------------------------------
# Tests


def run(test, seed=0):
    """Call a test as pytest would: for each row of its tables."""
    tables = []
    for names, rows in (mark.args for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"):
        names = names.split(", ")
        tables.append([dict(zip(names, row if len(names) > 1 else [row])) for row in rows])
    if "device" in inspect.signature(test).parameters:
        tables.append([dict(device=torch.device("cpu"))])
    for choice in itertools.product(*tables):
        torch.manual_seed(seed)
        test(**{name: value for part in choice for name, value in part.items()})


def check(number, submission, limit=30.0, seed=0, until=math.inf, helpers=()):
    """-> {test: what is wrong, or ""} of an exercise of a submission, which is the text of a file

    until: by time.monotonic, which all processes share; helpers: (name, text) of modules beside the file
    """
    e = EXERCISES[number]
    node = definitions(parsed(submission)).get(e.function)
    if node is None or is_stub(node):
        return dict.fromkeys(e.tests.split(), "missing" if node is None else "not written yet")
    functions = ALL if mine else [e.function]
    ours = base if mine else with_holes(base, functions)
    with tempfile.TemporaryDirectory() as folder:
        for name, text in helpers:
            (Path(folder) / name).write_text(text, encoding="utf-8")
        results, remote = {}, None
        for test in e.tests.split():
            try:
                remote = remote or Remote(ours, submission, functions, e.function, limit, folder, until)
                with in_place(e.function, remote, remote.clock):             # it computes there, not here
                    run(modules[e.function][test], seed)
                results[test] = ""
            except NotGraded:
                raise
            except Exception as error:
                results[test] = "; ".join([worker.said(error), *(remote.faults if remote else [])])
                if not e.parts or isinstance(error, Lost):
                    break
        if remote:
            remote.close()
        return {test: results.get(test, results[list(results)[-1]]) for test in e.tests.split()}
