"""Scripts in separate processes that start at once.

Starting Python and importing torch takes three or four seconds, longer than most scripts run in a test. So one process
imports the packages that all scripts need, and each script runs in a fork of it. The fork imports this project's
files itself. It has its own arguments, streams, signals and exit status, as if the shell had started the script.
(test_common.test_an_error_reaches_the_shell and the jobs of torchrun start a new Python.)
"""
import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[2])                              # whose folders pytest adds to sys.path
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch._dynamo", "PIL.Image", "PIL.ImageCms", "tqdm", "pytest"])


def begin():
    """Start the warm process in the background. Otherwise the first Script starts it and waits for it."""
    forkserver.ensure_running()


def inherit():
    """In a forked process: use the warm process that its parent has started, if any."""
    server = forkserver.ensure_running.__self__
    if server._forkserver_pid:
        server.ensure_running = lambda: None                                 # it would wait for a child of its own


@atexit.register
def kill_all():
    """End the scripts that a failed test has left."""
    for process in multiprocessing.active_children():
        process.kill()


def become(script, args, streams, cwd, environment, threads, largest_file, start_new_session):
    """Run the script in this new process, which then ends."""
    for number, path in zip((1, 2), streams):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    os.chdir(cwd)
    if start_new_session:
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)                 # shells ignore it in background jobs
    os.environ.update(environment)
    if threads:
        import torch
        torch.set_num_threads(threads)                                       # OMP_NUM_THREADS is no longer read
    if largest_file:
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.argv = [script, *args]
    sys.path[:] = [os.path.dirname(script), *(each for each in sys.path if not each.startswith(ROOT))]
    runpy.run_path(script, run_name="__main__")


class Script:
    """Like subprocess.Popen in text mode. largest_file: limit in bytes, as on a full disk; threads: torch's number"""

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
        """-> its standard output and standard error"""
        self.wait(timeout)
        return [each.read() for each in self.streams]
