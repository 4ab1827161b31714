"""Runs the tests in several processes, one per core (at most 8), a file of tests at a time.

pytest collects all tests. Forks of it, the workers, then run them: each takes the next file from a queue and sends its
reports to pytest, which prints them and counts the failures. pytest alone runs the tests if these are few, if -x, -s or
--pdb is given, on a GPU, on systems other than Linux, and with DQ_TEST_PROCESSES=1.
"""
import contextlib
import itertools
import multiprocessing
import os
import sys
from multiprocessing.connection import wait

import pytest

FORK = multiprocessing.get_context("fork") if sys.platform == "linux" else None
FEW = 100


class Reports:
    """A worker's plugin, which sends what pytest prints."""

    def __init__(self, config, pipe):
        self.config, self.pipe = config, pipe

    def pytest_runtest_logreport(self, report):
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        self.pipe.send(("report", dict(nodeid=report.nodeid, data=data)))

    def pytest_runtest_logfinish(self, nodeid, location):
        self.pipe.send(("end", dict(nodeid=nodeid, location=location)))

    def pytest_warning_recorded(self, warning_message, when, nodeid, location):
        how = dict(warning_message=warning_message, when=when, nodeid=nodeid, location=location)
        self.pipe.send(("warning", how))


def work(config, files, queue, pipe):
    """Run files of tests until the queue is empty."""
    import warm                                                              # not on Windows
    warm.inherit()
    capture = config.pluginmanager.getplugin("capturemanager")
    capture.stop_global_capturing()                                          # it shares a file with pytest's
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    capture.start_global_capturing()
    config.pluginmanager.register(Reports(config, pipe))
    tests = (test for number in iter(lambda: os.read(queue, 1), b"") for test in files[number[0]])
    test = next(tests, None)
    with contextlib.suppress(KeyboardInterrupt):                             # pytest reports it
        while test:
            following = next(tests, None)                                    # fixtures that it needs are kept
            config.hook.pytest_runtest_protocol(item=test, nextitem=following)
            test = following
        pipe.send(None)
    warm.kill_all()                                                          # if a test failed


def number_of_processes(session):
    option = session.config.option
    one_by_one = option.maxfail or option.usepdb or option.capture == "no" or option.collectonly
    on_gpu = os.environ.get("DQ_TEST_DEVICE", "cpu") != "cpu"                # it can't be used after a fork
    broken = session.testsfailed                                             # files of tests that can't be imported
    if FORK is None or on_gpu or one_by_one or broken or len(session.items) < FEW:
        return 1
    return int(os.environ.get("DQ_TEST_PROCESSES", min(8, len(os.sched_getaffinity(0)))))


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    n, config = number_of_processes(session), session.config
    if n < 2:
        return None                                                          # pytest's own loop
    files = [list(tests) for _, tests in itertools.groupby(session.items, key=lambda test: test.path)]
    files.sort(key=lambda tests: -tests[0].path.stat().st_size)              # short files last, so all end together
    config._tmp_path_factory.getbasetemp()                                   # one folder for all
    queue, numbers = os.pipe()
    os.write(numbers, bytes(range(len(files))))
    os.close(numbers)
    running, last = {}, {}                                                   # {pipe: process}, {pipe: its last test}
    try:
        for _ in range(n):
            receiver, sender = FORK.Pipe(duplex=False)
            process = FORK.Process(target=work, args=(config, files, queue, sender))
            process.start()
            sender.close()
            running[receiver] = process
        while running:
            for pipe in wait(running):
                try:
                    message = pipe.recv()
                except EOFError:
                    running[pipe].join()
                    status, test = running[pipe].exitcode, last.get(pipe)
                    raise RuntimeError(f"a process ended with status {status}; its last test was {test}") from None
                if message is None:
                    running.pop(pipe).join()
                    continue
                name, how = message
                last[pipe] = how["nodeid"]
                if name == "report":
                    report = config.hook.pytest_report_from_serializable(config=config, data=how["data"])
                    config.hook.pytest_runtest_logreport(report=report)
                elif name == "end":
                    config.hook.pytest_runtest_logfinish(**how)
                else:
                    config.hook.pytest_warning_recorded.call_historic(kwargs=how)
    finally:
        for process in running.values():
            process.kill()
    return True
