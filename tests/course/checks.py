"""A checker is a process that has imported the tests. It grades one exercise of a submission, in a worker of its own.

The tests run here. They see this project's dq.py, except for one function, which asks the worker for its answers.
"""
import ast
import contextlib
import functools
import hashlib
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
from multiprocessing import Pipe, get_context
from pathlib import Path

from exercises import EXERCISES, SOURCES, Assembly, binding, from_tests, is_stub

HERE = Path(__file__).resolve().parent
nursery = None


def prepare(folder, is_copy=False):
    """Make this process a checker for the project in a folder: its dq.py, its tests, its naive loops.

    is_copy: dq.py in that folder is already the submission's, with all its exercises
    """
    global dq, naive, torch, worker, base, modules, nursery, whole
    whole = is_copy
    sys.path[:0] = [str(folder), str(folder / "tests"), str(folder / "tests" / "course")]
    base = (folder / "dq.py").read_text(encoding="utf-8")
    nursery = nursery or Nursery()                                           # the grader's, which all checkers share
    import torch
    import dq
    import naive
    import worker
    torch.set_num_threads(1)
    modules = {e.function: {test: the_test(e, test) for test in e.tests.split()} for e in EXERCISES}
    for name in ("legal", "logits", "generate"):
        setattr(naive, name, remembered(getattr(naive, name)))


def the_test(e, test):
    file, _, name = test.rpartition("::")
    return getattr(importlib.import_module(Path(file or e.file).stem), name)


def remembered(function):
    """A function that keeps its answers, so that slow loops of naive.py run once for all submissions."""
    @functools.wraps(function)
    def answer(*args, **kwargs):
        if function.__name__ == "legal":                                     # called most often
            key = (*args[0].sides, None, *args[1])
        else:
            key = hashlib.sha1(worker.Letter().whole([args, kwargs])).digest()
        if key not in known:
            known[key] = function(*args, **kwargs)
        return known[key]
    known = {}
    return answer


# ------------------------------------------------------------------------------------------------
# A worker


def connect():
    """For the leaderboard: workers, and no tests."""
    global worker, torch, nursery
    import torch
    import worker
    nursery = nursery or Nursery()


class NotGraded(Exception):
    """A fault of the grader or its machine, which must not cost a student points."""


KEPT = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "SYSTEMROOT")          # of the environment: no secrets


class Nursery:
    """Where workers come from: forks of a process that knows torch only; where there is no fork, new processes."""

    forks = hasattr(os, "fork")

    def __init__(self):
        self.process = None
        self.start()

    def start(self):
        self.close()
        if self.forks:
            self.control, theirs = socket.socketpair()
            environment = {name: os.environ[name] for name in KEPT if name in os.environ} | {"OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen([sys.executable, str(HERE / "worker.py")], stdin=theirs, cwd="/",
                                            env=environment)
            theirs.close()

    def close(self):
        if self.process:
            self.control.close()
            self.process.kill()
            self.process = None

    def worker(self):
        """-> a connection to a new worker, its process id. A second and a third try begin with a new nursery."""
        for again in (True, True, False):
            try:
                return self.born()
            except (OSError, EOFError) as error:
                reason = error
            if again:
                self.start()
        raise NotGraded(f"no worker could be started ({type(reason).__name__}: {reason})")

    def born(self):
        ours, theirs = Pipe()
        if self.forks:
            socket.send_fds(self.control, [b"."], [theirs.fileno()])
            theirs.close()
            if not ours.poll(60):
                raise TimeoutError("not within a minute")
            return ours, worker.Reader(ours.recv_bytes()).value()
        process = get_context("spawn").Process(target=worker.run, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        return ours, process.pid


class Fault(Exception):
    """What is wrong with a submission, in one line."""


class Lost(Fault):
    """The worker is of no more use."""


NOT_RUN = "not run: the time for the whole file was over"
CHANGES = {"Codebook.update": 0, "Codebook.restart": 0, "decode_one": 2}     # the argument that is changed in place


class Remote:
    """Calls the function of a submission in a worker, as if it were here: gradients, changes in place, callbacks."""

    def __init__(self, source, function, limit, folder, memory=2 ** 31, until=math.inf):
        self.connection, self.pid = nursery.worker()
        self.limit, self.count, self.waited, self.until = limit, 0, 0.0, until
        self.wait = 10 * limit if nursery.forks else limit                   # by the clock: others use the cores too
        self.deadline = min(time.monotonic() + self.wait, until)
        self.states, self.letters, self.changes = {}, {}, CHANGES.get(function)
        try:
            self.send(source=source, function=function, folder=folder, memory=memory, seconds=limit)
            self.faults = self.receive()["faults"]
        except BaseException:
            self.close()
            raise

    def close(self):
        self.connection.close()
        with contextlib.suppress(OSError):
            os.kill(self.pid, signal.SIGKILL if nursery.forks else signal.SIGTERM)

    def clock(self):
        """Seconds that the worker has computed. Linux counts them, elsewhere it is the time for which we waited."""
        if sys.platform == "linux":
            return time.clock_gettime(~self.pid << 3 | 2)                    # the clock of another process
        return self.waited

    def send(self, **letter):
        self.post(worker.Letter().whole(letter))

    def post(self, data):
        try:
            self.connection.send_bytes(data)
        except OSError:
            raise Lost("its process died") from None

    def receive(self):
        left = self.deadline - time.monotonic()
        try:
            if left <= 0 or not self.connection.poll(left):
                raise Lost(NOT_RUN if self.deadline == self.until else f"not done after {self.wait:g} seconds")
            letter = worker.Reader(self.connection.recv_bytes(2 * worker.MAX_BYTES)).value()
            error = letter.get("error")
            if "unfenced" in letter:
                raise NotGraded(f"the worker could not be fenced ({letter['unfenced']})")
        except (EOFError, OSError):
            raise Lost("its process died") from None
        except (Fault, NotGraded):
            raise
        except Exception as error:
            raise Fault(f"an answer that can't be read ({type(error).__name__})") from None
        if error is not None:
            late = str(error).startswith("not done after all")
            raise Lost(f"not done after {self.limit:g} seconds of computing") if late else Fault(str(error))
        return letter

    def __call__(self, *args, **kwargs):
        self.count += 1
        start = time.perf_counter()
        number, letter, args = self.count, worker.Letter(), list(args)
        may_change = worker.Letter()
        if self.changes is not None:
            may_change.encode(args[self.changes])
        letters = {-1: letter}
        for i, each in enumerate(args):
            if isinstance(each, torch.nn.Module):
                args[i] = self.teach(each)
                letters[args[i].key] = self.letters[args[i].key]
        self.post(letter.whole(dict(args=args, kwargs=kwargs, grad=torch.is_grad_enabled(), number=number,
                                    seed=int(torch.randint(2 ** 62, ())))))
        answered, reply = [], self.receive()
        while "callback" in reply:
            key, i = reply["callback"]
            answer = worker.Letter()
            self.post(answer.whole(letters[key].callbacks[i](*reply["args"])))
            answered += answer.tensors
            reply = self.receive()
        self.waited += time.perf_counter() - start
        with torch.no_grad():
            for key, changed in reply["changed"].items():
                for index, now in changed.items():
                    was = letters[int(key)].tensors[int(index)]
                    if id(was) in may_change.number:                         # else the question would be changed
                        if now.shape != was.shape:
                            raise Fault("it changes the shape of what it was given")
                        was.copy_(now)
        if reply["result"] is None and self.changes is None:
            raise Fault("it returns nothing")
        inputs = [x for each in letters.values() for x in each.tensors] + answered
        inputs = [x for x in inputs if x.requires_grad]
        if not (reply["kept"] and inputs and torch.is_grad_enabled()):
            return reply["result"]

        class Gradient(torch.autograd.Function):
            @staticmethod
            def forward(ctx, output, *inputs):
                return output.clone()

            @staticmethod
            def backward(ctx, grad):
                self.send(backward=number, grads=[grad])
                return None, *self.receive()["result"]

        return Gradient.apply(reply["result"], *inputs)

    def teach(self, module):
        """Modules are sent once, and again when something in them is another, or has changed."""
        state = [module]
        for each in module.modules():
            state += [each.training, *vars(each).values()]
            for x in (*each._parameters.values(), *each._buffers.values()):
                state += [x, x if x is None else x._version]
        same = [key for key, held in self.states.items() if len(held) == len(state) and all(
            a is b or type(a) is int and a == b for a, b in zip(held, state))]
        if not same:
            key, letter = len(self.states), worker.Letter()
            self.post(letter.whole(dict(teach=key, module=module)))
            self.states[key], self.letters[key] = state, letter
            same = [key]
        return worker.Taught(same[-1])


@contextlib.contextmanager
def in_place(function, remote):
    """For a while dq's function, and what the tests have imported of it, is that of a submission."""
    owner, _, name = function.rpartition(".")
    holder = getattr(dq, owner) if owner else dq
    ours, places = vars(holder)[name], [holder]
    if not owner:
        places = [each for each in list(sys.modules.values()) if getattr(each, "__dict__", {}).get(name) is ours]
    for place in places:
        setattr(place, name, lambda *args, **kwargs: remote(*args, **kwargs))
    speed = importlib.import_module("test_speed")
    try:
        speed.clock = remote.clock                                           # the submission computes there, not here
        yield
    finally:
        speed.clock = time.process_time
        for place in places:
            setattr(place, name, ours)


# ------------------------------------------------------------------------------------------------
# Tests


def calls(test):
    """What pytest would call: the arguments of a test, for each row of its tables."""
    tables = []
    for names, rows in (mark.args for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"):
        names = names.split(", ")
        tables.append([dict(zip(names, row if len(names) > 1 else [row])) for row in rows])
    for choice in itertools.product(*tables):
        yield {name: value for part in choice for name, value in part.items()}


def run(test, seed=0):
    """As pytest would, without it."""
    for arguments in calls(test):
        torch.manual_seed(seed)
        if "device" in inspect.signature(test).parameters:
            arguments["device"] = torch.device("cpu")
        test(**arguments)


def why(error):
    """One line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, (Fault, AssertionError)):
        return lines[0] if lines else "a test fails"
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def check(number, submission, limit=30.0, seed=0, until=math.inf, helpers=()):
    """-> {test: what is wrong, or ""} of an exercise of a submission, which is the text of a file

    until: by time.monotonic, which all processes share; helpers: (name, text) of modules beside the file
    """
    e = EXERCISES[number]
    tests = e.tests.split()
    try:
        source = assembled(submission, e.function, helpers)
    except Fault as fault:
        return dict.fromkeys(tests, str(fault))
    with tempfile.TemporaryDirectory() as folder:
        for name, text in helpers:
            (Path(folder) / name).write_text(text, encoding="utf-8")
        for name in SOURCES[1:]:
            if f"import {name[:-3]}" in submission or f"from {name[:-3]}" in submission:
                (Path(folder) / name).write_text((HERE.parents[1] / name).read_text(encoding="utf-8"), encoding="utf-8")
        results, remote = {}, None
        for test in tests:
            try:
                remote = remote or Remote(source, e.function, limit, folder, until=until)
                with in_place(e.function, remote):
                    run(modules[e.function][test], seed)
                results[test] = ""
            except NotGraded:
                raise
            except Exception as error:
                note = f" ({'; '.join(remote.faults)})" if remote and remote.faults else ""
                results[test] = why(error) + note
                if not e.parts or isinstance(error, Lost):
                    break
        if remote:
            remote.close()
        return {test: results.get(test, results[list(results)[-1]]) for test in tests}


def unwritten(submission, function):
    """What there is to say without any test, or ""."""
    node = binding(parsed(submission), function)
    return "missing" if node is None else "not written yet" if is_stub(node) else ""


def assembled(submission, function, helpers=()):
    handed_out = (HERE / "handed_out.py").read_text(encoding="utf-8") if whole else base
    assembly = Assembly(handed_out, submission, [function])
    module = from_tests([*assembly.new, *(parsed(text) for _, text in helpers)])
    if module:
        raise Fault(f"{module} is imported, but nothing may come from the tests")
    return base if whole else assembly.text


@functools.lru_cache(4)
def parsed(text):
    return ast.parse(text)
