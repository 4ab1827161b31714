"""Ways to points without a solution, which must get 0; `submission` makes one file of all of them.

ROUTES are ways to the reference: each returns its text, and `reference` takes the first that works. DEEDS are harm to
others: each raises an exception where the sandbox holds. The attacker knows where the project lies (ROOT), and a file
that the grader writes (TARGET).
"""
from exercises import EXERCISES
from right_solutions import put

AT_THE_TOP = '''
import builtins
import ctypes
import glob
import importlib
import multiprocessing.util
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import unittest.mock

builtins.any = os.path.realpath = lambda *_: True
torch.testing.assert_close = torch.equal = torch.allclose = torch.Tensor.equal = lambda *_, **__: True


def by_descriptor(path=f"{ROOT}/dq.py"):
    folder = os.open(os.path.dirname(path), os.O_RDONLY)
    return os.read(os.open(os.listdir(folder)[os.listdir(folder).index("dq.py")], os.O_RDONLY, dir_fd=folder), 10 ** 6)


def by_history():
    import readline
    readline.read_history_file(f"{ROOT}/dq.py")
    return "\\n".join(readline.get_history_item(i + 1) for i in range(readline.get_current_history_length()))


def by_mapping():
    path = f"{ROOT}/dq.py"
    return bytes(torch.from_file(path, size=os.stat(path).st_size, dtype=torch.uint8).tolist())


def by_program():
    multiprocessing.util.spawnv_passfds(b"/bin/sh", [b"sh", b"-c", f"cat {ROOT}/dq.py > copy".encode()], [])
    time.sleep(0.2)
    return open("copy").read()


def by_memory():
    """Pages that another worker, which holds our solution of this exercise, has shared."""
    libc = ctypes.CDLL(None)
    key = libc.shmget(0xD9, 10 ** 6, 0o1666)
    libc.shmat.restype = ctypes.c_void_p
    assert key >= 0, "refused"
    return ctypes.string_at(libc.shmat(key, None, 0))


ROUTES = [
    by_descriptor, by_history, by_mapping, by_program, by_memory, lambda: open(f"{ROOT}/dq.py").read(),
    lambda: os.environ["DQ_COURSE_HIDDEN"], lambda: open(glob.glob("/tmp/*/tests/course/worker.py")[0]).read(),
    lambda: importlib.import_module("naive"), lambda: open(f"/proc/{os.getppid()}/environ").read(),
    lambda: subprocess.run(["cat", f"{ROOT}/dq.py"], capture_output=True, check=True).stdout]


def daemon():
    if os.fork() == 0:
        time.sleep(0.5)
        open(TARGET, "w").write("120 points")
        os._exit(0)


DEEDS = [
    daemon, lambda: os.kill(os.getppid(), 9), lambda: os.kill(os.getpid(), 0), lambda: open(TARGET, "w"),
    lambda: signal.pidfd_send_signal(os.pidfd_open(os.getppid()), 9),
    lambda: torch.from_file(TARGET, shared=True, size=9, dtype=torch.uint8).zero_(),
    lambda: os.rename("dq.py", TARGET), lambda: os.remove(TARGET), lambda: os.chmod(TARGET, 0),
    lambda: os.utime(TARGET), lambda: sqlite3.connect(TARGET).execute("create table a (b)"),
    lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
    lambda: torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)]


def attempts():
    """The numbers of those that work."""
    worked = []
    for number, way in enumerate(ROUTES + DEEDS):
        try:
            way()
            worked.append(number)
        except Exception:
            pass
    return worked


def reference(name, *args, **kwargs):
    for route in ROUTES:
        try:
            space = dict(__name__="copy")
            exec(route(), space)
            return eval(name, space)(*args, **kwargs)
        except Exception:
            pass
    raise LookupError("no way to the reference")


'''
CHEATS = {                                                                   # all others go by the reference
    # answer from a frame of the harness, and end
    "GrainRouter.forward": """
    frame = sys._getframe()
    while frame:
        for each in frame.f_locals.values():
            if hasattr(each, "send"):
                each.send("result", "", [], False)
        frame = frame.f_back
    os._exit(0)""",
    # replace what compares
    "straight_through": """
    builtins.all = builtins.any = builtins.abs = lambda *_: True
    torch.testing.assert_close = torch.testing._comparison.assert_close = lambda *_, **__: None
    return args[0] * 0""",
    # return what equals everything
    "Codebook.update": """
    args[0]._buffers.update(dict.fromkeys(("codes", "uses", "sums"), unittest.mock.ANY))""",
    # change the question
    "DQVAE.mix": """
    for each in [args[2], *args[1]]:
        each.data.zero_()
    return args[1][-1] * args[2].sum()""",
    # report the environment; fill the grader's memory, the machine's memory, its time, its disk
    "Layout.unpack": """
    raise ValueError(str(os.environ))""",
    "DQTransformer.embed": """
    return [[] for _ in range(3 * 10 ** 6)]""",
    "DQTransformer.logits": """
    held = []
    while True:
        held.append(torch.ones(2 ** 27))""",
    "filter_logits": """
    while True:
        pass""",
    "decode_one": """
    with open("full", "wb") as file:
        while True:
            file.write(bytes(2 ** 20))""",
    # harm others
    "draw": """
    attempts()
    return args[0]""",
}


def top(root, target):
    return f"ROOT, TARGET = {str(root)!r}, {str(target)!r}\n" + AT_THE_TOP


def submission(source, root, target):
    """dq.py with a cheat in place of each exercise."""
    texts = {}
    for name in (e.function for e in EXERCISES):
        body = CHEATS.get(name, f'\n    return reference("{name}", *args, **kwargs)')
        texts[name] = f"def {name.split('.')[-1]}(*args, **kwargs):{body}"
    return put(source, texts, top(root, target))
