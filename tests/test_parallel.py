"""parallel.py: what several processes report is what pytest alone would report."""
import os
import runpy
import subprocess
import sys

import pytest

import parallel
from conftest import ROOT

pytestmark = pytest.mark.skipif(parallel.FORK is None, reason="pytest alone runs the tests")
LOADS = """
import sys
sys.path[:0] = {folders!r}
import pytest
from parallel import pytest_runtestloop

@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("session")
"""
TESTS = """
import os, pathlib, time, warnings
import pytest

def test_in_two_processes():                     # each of two files of tests waits for the other one
    pathlib.Path("{name}.here").touch()
    end = time.time() + 100
    while not pathlib.Path("{other}.here").exists():
        assert time.time() < end
        time.sleep(0.01)

@pytest.mark.parametrize("i", range(50))
def test_many(i, folder, tmp_path):
    if i == 10:
        os.system("echo printed by {name}")
        {what}
"""


def run(folder, **bodies):
    """Run the tests of three files in two processes. -> pytest's exit status and output"""
    (folder / "conftest.py").write_text(LOADS.format(folders=[str(ROOT / "tests"), str(ROOT / "tests/survival")]))
    for (name, what), other in zip(bodies.items(), reversed(bodies)):
        (folder / f"test_{name}.py").write_text(TESTS.format(name=name, other=other, what=what))
    (folder / "test_z.py").write_text("def test_more(folder): pass\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--basetemp", folder / "scratch"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True,
                          env=os.environ | dict(DQ_TEST_PROCESSES="2"))
    return done.returncode, done.stdout


def test_failures_warnings_and_output_are_reported(tmp_path):
    status, out = run(tmp_path, one="assert i < 10, 'too many'", two="warnings.warn('careful')")
    assert status == 1 and "1 failed, 102 passed, 1 warning" in out, out
    for text in ("FAILED test_one.py::test_many[10] - AssertionError: too many", "printed by one",
                 "test_two.py::test_many[10]", "UserWarning: careful"):
        assert text in out, out
    assert "printed by two" not in out
    progress = out[:out.index("[100%]")]
    assert progress.count(".") == 102 and progress.count("F") == 1           # the processes print nothing themselves
    assert len(list((tmp_path / "scratch").glob("session?"))) == 2           # one fixture per process


def test_a_process_that_dies_is_an_error(tmp_path):
    """The other process ends, too."""
    late = "time.sleep(20); pathlib.Path('late').touch()"
    status, out = run(tmp_path, one="os.kill(os.getpid(), 9)", two=late)
    assert status == pytest.ExitCode.INTERNAL_ERROR, out
    assert "a process ended with status -9; its last test was test_one.py::test_many[10]" in out
    assert not (tmp_path / "late").exists()


def test_a_students_copy_has_no_parallel_py(monkeypatch):
    """Its conftest.py is the same, and pytest alone runs its tests."""
    conftest = str(ROOT / "tests/conftest.py")
    monkeypatch.setattr(sys, "path", [*sys.path])                            # conftest.py adds to it
    assert "pytest_runtestloop" in runpy.run_path(conftest)
    monkeypatch.setitem(sys.modules, "parallel", None)                       # as if there were no such file
    assert "pytest_runtestloop" not in runpy.run_path(conftest)
