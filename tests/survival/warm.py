"""Scripts in processes of their own that start at once.

To start Python and import torch takes three or four seconds of computing, longer than most of what a script does in a
test. So one process imports what all scripts import, of other projects, and each script is a fork of it, which imports
this project's files itself. All else is as if the shell had started it: own arguments, streams, signals, exit status.
(test_common.test_an_error_reaches_the_shell and the jobs of torchrun start Python itself.)
"""
import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from multiprocessing import forkserver

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch._dynamo", "torch.distributed.nn", "PIL.Image", "PIL.ImageCms", "tqdm", "pytest"])
atexit.register(lambda: [process.kill() for process in multiprocessing.active_children()])  # of a test that failed


def begin():
    """Start that one process, and go on meanwhile; the first script does it, too."""
    forkserver.ensure_running()


def become(script, args, streams, cwd, environment, threads, largest_file, start_new_session):
    """In the new process: from here on it is this script."""
    for number, path in zip((1, 2), streams):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    os.chdir(cwd)
    if start_new_session:
        os.setsid()
    os.environ.update(environment)
    if threads:
        import torch
        torch.set_num_threads(threads)                                       # OpenMP has read its variable long ago
    if largest_file:
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.argv = [script, *args]
    sys.path.insert(0, os.path.dirname(script))
    runpy.run_path(script, run_name="__main__")


class Script:
    """As subprocess.Popen, with text. largest_file: bytes, as on a disk that is nearly full; threads: of torch"""

    def __init__(self, script, *args, cwd=".", threads=None, largest_file=None, start_new_session=False, **environment):
        self.streams = [tempfile.NamedTemporaryFile("r", errors="backslashreplace") for _ in range(2)]
        names, args = [each.name for each in self.streams], [str(each) for each in args]
        how = (os.path.abspath(script), args, names, str(cwd), environment, threads, largest_file, start_new_session)
        self.process = FORKS.Process(target=become, args=how)
        self.process.start()
        self.pid, self.kill = self.process.pid, self.process.kill

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.returncode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("script", timeout)

    def communicate(self, timeout=None):
        """-> what it has printed, and its errors"""
        self.wait(timeout)
        return [each.read() for each in self.streams]
