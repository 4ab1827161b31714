"""The course: stubs get no points, our solutions all, and a wrong one loses its exercise and no other."""
import ast
import contextlib
import importlib
import inspect
import itertools
import subprocess
import sys

import pytest

import dq
from assignment import EXERCISES, find, is_stub, replaced, stub, text_of
from conftest import ROOT
from wrong_solutions import WRONG

SOURCE = (ROOT / "dq.py").read_text(encoding="utf-8")
OURS = {e.function: text_of(SOURCE, find(ast.parse(SOURCE), e.function)) for e in EXERCISES}
STUBS = {function: stub(text) for function, text in OURS.items()}


def kit(*args):
    return subprocess.run([sys.executable, str(ROOT / "tests" / "course" / "assignment.py"), *map(str, args)],
                          capture_output=True, text=True)


def points(done):
    """The table that `grade` prints -> {function: points}"""
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[:-1]]
    return {row[1]: int(row[2]) for row in rows}


def wrong_text(function, old, new):
    assert OURS[function].count(old), f"{function} has changed: it no longer contains {old}"
    return OURS[function].replace(old, new)


@contextlib.contextmanager
def in_place(texts):
    """{function: text}: dq's functions compute this for a while. Whoever holds one of them notices, too."""
    kept = []
    for function, text in texts.items():
        space = dict(vars(dq))
        exec(text, space)
        ours = inspect.unwrap(eval(f"dq.{function}"))
        kept.append((ours, ours.__code__))
        ours.__code__ = space[function.split(".")[-1]].__code__
    try:
        yield
    finally:
        for ours, code in kept:
            ours.__code__ = code


def calls(e):
    """What pytest would call for the tests of an exercise: functions with their arguments."""
    module = importlib.import_module(e.file[:-3])
    for name in e.tests.split():
        test, tables = getattr(module, name), []
        for mark in getattr(test, "pytestmark", []):
            names, rows = mark.args
            names = names.split(", ")
            tables.append([dict(zip(names, row if len(names) > 1 else [row])) for row in rows])
        for choice in itertools.product(*tables):
            yield test, {name: value for part in choice for name, value in part.items()}


def run_tests(e, device):
    for test, arguments in calls(e):
        dq.torch.manual_seed(0)
        if "device" in inspect.signature(test).parameters:
            arguments["device"] = device
        test(**arguments)


def test_every_exercise_is_complete():
    assert [e.function for e in EXERCISES] == list(WRONG)
    assert all(len(wrong) == 3 for wrong in WRONG.values())
    tests = [test for e in EXERCISES for test in e.tests.split()]
    assert len(set(tests)) == len(tests)                                     # no test belongs to two exercises
    order = [find(ast.parse(SOURCE), e.function).lineno for e in EXERCISES]
    assert order == sorted(order)
    done = kit("list")
    assert done.returncode == 0 and all(e.function in done.stdout and e.name in done.stdout for e in EXERCISES)


@pytest.mark.parametrize("number", range(len(EXERCISES)), ids=[e.function for e in EXERCISES])
def test_our_solution_passes_though_later_exercises_are_not_written(number, device):
    with in_place({e.function: STUBS[e.function] for e in EXERCISES[number + 1:]}):
        run_tests(EXERCISES[number], device)


@pytest.mark.parametrize("e", EXERCISES, ids=lambda e: e.function)
def test_wrong_solutions_and_the_stub_fail(e, device):
    texts = {why: wrong_text(e.function, old, new) for why, old, new in WRONG[e.function]}
    for why, text in dict(texts, stub=STUBS[e.function]).items():
        with in_place({e.function: text}), pytest.raises(Exception):
            run_tests(e, device)
            pytest.fail(f"{why}: the tests of {e.function} pass")


def test_the_students_copy_gets_no_points(tmp_path):
    done = kit("make", tmp_path / "course")
    assert done.returncode == 0, done.stderr
    copy = (tmp_path / "course" / "dq.py").read_text(encoding="utf-8")
    for e in EXERCISES:
        node, ours = find(ast.parse(copy), e.function), find(ast.parse(SOURCE), e.function)
        assert is_stub(node) and ast.get_docstring(node) == ast.get_docstring(ours)
        assert ast.unparse(node.args) == ast.unparse(ours.args)
    assert "# weight: B, 1, h, w" in copy                                    # a comment about a shape
    assert set(points(kit("grade", tmp_path / "course" / "dq.py")).values()) == {0}
    names = [path.name for path in (tmp_path / "course" / "tests").rglob("*.py")]
    assert "test_vae.py" in names and not {"wrong_solutions.py", "test_assignment.py"} & set(names)
    again = kit("make", tmp_path / "course")
    assert again.returncode == 1 and len(again.stderr.splitlines()) == 1


def test_our_solutions_get_all_points():
    assert points(kit("grade", ROOT / "dq.py")) == {e.function: e.points for e in EXERCISES}


def test_each_fault_costs_its_exercise_and_no_other(tmp_path):
    """A wrong solution, an endless loop, a hole, a function that is gone, and rubbish where nobody looks."""
    text = replaced(SOURCE, "Layout.legal", wrong_text("Layout.legal", *WRONG["Layout.legal"][0][1:]))
    text = replaced(text, "straight_through", "def straight_through(z, q):\n    while True:\n        pass")
    text = replaced(text, "draw", STUBS["draw"]).replace("def mix(", "def mixed(")
    text = text.replace("import torch\n", "import no_such_package\n")
    (tmp_path / "dq.py").write_text(text, encoding="utf-8")
    lost = ["straight_through", "Layout.legal", "draw", "DQVAE.mix"]
    chosen = [e for e in EXERCISES if e.function in lost + ["Layout.pack", "Layout.unpack", "DQVAE.cell_weight"]]
    numbers = [EXERCISES.index(e) + 1 for e in chosen]
    done = kit("grade", tmp_path / "dq.py", "--limit", 6, "--only", *numbers)
    assert points(done) == {e.function: 0 if e.function in lost else e.points for e in chosen}
    for word in ("not done after 6 seconds", "not written yet", "missing", "test_packed_sequences"):
        assert word in done.stdout


@pytest.mark.parametrize("content", [b"def f(:\n", b"\xff\xfe", b"x = '\0'", None], ids=["syntax", "text", "0", "none"])
def test_a_file_that_cannot_be_read_gives_one_line(content, tmp_path):
    if content is not None:
        (tmp_path / "dq.py").write_bytes(content)
    done = kit("grade", tmp_path / "dq.py")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and done.stderr.startswith("0 points")
