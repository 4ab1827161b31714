"""The course: missing functions get no points, right solutions in any style all, wrong ones lose their exercise.

    the exercises          test_every_exercise_is_complete, test_our_solution_passes_with_the_exercises_that_it_needs
    wrong and right ones   test_wrong_solutions_and_the_stub_fail, test_many_submissions_in_one_command
    speed                  test_pasted_loops_get_less_than_half, test_time_of_the_worker_counts
    the sandbox            test_no_way_out_of_the_sandbox, test_a_worker_of_root_is_another_user and three more
    the students' copy     test_the_students_copy, test_a_copy_grades_by_the_same_rule, test_what_comes_along
    messages               test_every_assert_of_a_graded_test_has_a_message
    variants               test_every_edit_is_found_once, test_a_variant_is_solved_by_its_reference_alone and two more
    files that come        test_what_students_hand_in, test_tables_for_gradescope_and_spreadsheets
    the open part          test_the_leaderboard_ranks_by_nats_and_finds_who_looks_ahead
"""
import ast
import contextlib
import csv
import inspect
import json
import math
import os
import re
import signal
import struct
import sys
import time
import zipfile
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

import assignment
import cheats
import checks
import dq
import fence
import handout
import picture
import right_solutions
import variants
import worker
from assignment import ROOT, executed, project
from exercises import (BONUS, EXERCISES, SOURCES, SPEED, TESTS, Assembly, find, graded_tests, is_stub, paths, replaced,
                       stub, text_of)
from warm import Script, begin
from wrong_solutions import WRONG

begin()                                                                      # while the other tests are read
SOURCE = (ROOT / "dq.py").read_text(encoding="utf-8")
OURS = {e.function: text_of(SOURCE, find(ast.parse(SOURCE), e.function)) for e in EXERCISES}
STUBS = {function: stub(text) for function, text in OURS.items()}
POINTS = {e.function: e.points for e in EXERCISES}


def kit(*args, root=ROOT, **environment):
    done = Script(root / "tests" / "course" / "assignment.py", *args, **environment)
    done.stdout, done.stderr = done.communicate()
    return done


def points(done):
    """The table that `grade` prints of one submission -> {function: points}"""
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line[:2].strip().isdecimal()]
    return {row[1]: float(row[2]) for row in rows}


def wrong_text(function, old, new):
    with contextlib.suppress(ValueError, SyntaxError):                       # a syntax tree, if it is there once
        return variants.applied(dict(ours=OURS[function]), [("ours", function.split(".")[-1], old, new)])["ours"]
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


def run_tests(e, skip="test_every_legal_walk_is_a_complete_tiling", speed=False):  # long, and no other one
    checks.torch = dq.torch
    for test in e.tests.split():
        if test != skip and (speed or SPEED not in test):
            checks.run(checks.the_test(e, test))


def test_every_exercise_is_complete():
    assert [e.function for e in EXERCISES] == list(WRONG)
    assert all(len(wrong) == 3 for wrong in WRONG.values())
    tests = [test for e in EXERCISES for test in e.tests.split()]
    assert len(set(tests)) == len(tests)                                     # no test belongs to two exercises
    assert all(not e.parts or len(e.parts) == len(e.tests.split()) and sum(e.parts) == e.points for e in EXERCISES)
    order = [find(ast.parse(SOURCE), e.function).lineno for e in EXERCISES]
    assert order == sorted(order)
    done = kit("list")
    assert done.returncode == 0 and all(e.function in done.stdout and e.name in done.stdout for e in EXERCISES)
    assert "These count" in done.stdout and "100 points in 710 minutes of work" in done.stdout
    assert "20 points in\n240 minutes" in done.stdout or "20 points in 240 minutes" in done.stdout


@pytest.mark.parametrize("number", range(len(EXERCISES)), ids=[e.function for e in EXERCISES])
def test_our_solution_passes_with_the_exercises_that_it_needs(number):
    """And with no others, earlier or later."""
    e = EXERCISES[number]
    needed = {number, *(int(each) - 1 for each in e.needs.split())}
    with in_place({other.function: STUBS[other.function] for n, other in enumerate(EXERCISES) if n not in needed}):
        run_tests(e, speed=e.function in ("DQVAE.mix", "Layout.legal", "draw"))
    for missing in needed - {number} if e.function != "Layout.legal" else []:  # whose tests are long
        with in_place({EXERCISES[missing].function: STUBS[EXERCISES[missing].function]}), pytest.raises(Exception):
            run_tests(e, skip="", speed=True)
            pytest.fail(f"{e.function} does not need {EXERCISES[missing].function}")


@pytest.mark.parametrize("e", EXERCISES, ids=lambda e: e.function)
def test_wrong_solutions_and_the_stub_fail(e):
    texts = {why: wrong_text(e.function, old, new) for why, old, new in WRONG[e.function]}
    for why, text in dict(texts, stub=STUBS[e.function]).items():
        with in_place({e.function: text}), pytest.raises(Exception):
            run_tests(e)
            pytest.fail(f"{why}: the tests of {e.function} pass")


def test_every_assert_of_a_graded_test_has_a_message():
    texts = {f"tests/{name}": (ROOT / "tests" / name).read_text(encoding="utf-8") for name in TESTS}
    kept = graded_tests(texts)
    for name in {path.partition("::")[0] for e in EXERCISES for path in paths(e)}:
        for node in ast.walk(ast.parse(kept[name])):
            if isinstance(node, ast.Assert):
                assert node.msg, f"{name}: {ast.unparse(node)}"
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("assert_close"):
                assert "msg" in [each.arg for each in node.keywords], f"{name}: {ast.unparse(node)}"


# ------------------------------------------------------------------------------------------------
# Copies


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "course"
    done = kit("make", folder)
    assert done.returncode == 0, done.stderr
    assert "These count" in done.stdout
    return folder


def test_the_students_copy(copy):
    """Holes with docstrings and comments, the tests of the exercises, pages; no answers."""
    text = (copy / "dq.py").read_text(encoding="utf-8")
    for e in EXERCISES:
        node, ours = find(ast.parse(text), e.function), find(ast.parse(SOURCE), e.function)
        assert is_stub(node) and ast.get_docstring(node) == ast.get_docstring(ours)
        assert ast.unparse(node.args) == ast.unparse(ours.args)
    assert "# weight: B, 1, h, w" in text                                    # a comment about a shape
    assert list(points(kit("grade", copy / "dq.py", root=copy)).values()) == [0] * 17
    files = {path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()}
    assert not {"tests/course/variants.py", "tests/course/right_solutions.py"} & files
    code = {name for name in files if name.endswith(".py") and "__pycache__" not in name}
    assert code == {*SOURCES, *(f"tests/{name}" for name in TESTS), *(f"tests/course/{name}.py" for name in (
        "assignment", "exercises", "checks", "worker", "fence", "picture", "handed_out"))}
    assert sum(name.startswith("handout/") for name in files) == 2 * 17 + 1 and "tests/course/vae.pt" in files
    everything = (copy / "README.md").read_text() + (copy / "handout/all.md").read_text()
    for said in ("hidden cases", "30 seconds", "2 GB", "Hand in `dq.py`", "exercises 1 to 9", "exactly 0 and 1"):
        assert said in everything                                            # what a student has to know
    assert not any(rubric in everything for _, rubric in handout.QUESTIONS + handout.EXPERIMENTS)
    everything = "\n".join((copy / name).read_text(encoding="utf-8") for name in code)
    for function, text in OURS.items():                                      # the lines of our solutions are gone
        start = ast.parse(text).body[0].body[1].lineno - 1
        for line in text.split("\n")[start:]:
            line = line.partition("#")[0].strip()
            assert len(line) < 50 or line not in everything, f"a line of {function} is in the copy: {line}"
    graded = {path for e in EXERCISES for path in paths(e)}
    found = {f"{name}::{node.name}" for name in code if name.startswith("tests/")
             for node in ast.parse((copy / name).read_text(encoding="utf-8")).body
             if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}
    assert found == graded
    done = Script(copy / "train_vae.py", "--steps", 1, cwd=copy)
    _, error = done.communicate()
    assert done.returncode == 1
    assert error.splitlines()[-1] == "error: exercise 1, the gate: GrainRouter.forward is to be written"
    again = kit("make", copy)
    assert again.returncode == 1 and len(again.stderr.splitlines()) == 1


def test_a_copy_grades_by_the_same_rule(copy, tmp_path):
    """New imports, helpers, methods and attributes count in both; what replaces something else counts in neither."""
    text = (copy / "dq.py").read_text(encoding="utf-8")
    text = text.replace("import torch\n", "import torch\nfrom torch import Tensor\n", 1)
    text = text.replace("def one_hot(grains, n):\n", "def one_hot(grains, n):\n    return 1 / 0\n", 1)
    text += "\n\ndef halves(a: Tensor) -> Tensor:\n    return a / 2\n"
    text += "\n\nstraight_through = lambda z, q: halves(2 * z) + (q - z).detach()\n"
    text = replaced(text, "budget_loss", "def share_of(gate):\n    return gate.mean((0, 2, 3))\n\n\n"
                    "def budget_loss(gate: Tensor, ratios) -> Tensor:\n"
                    "    return (share_of(gate) - torch.tensor(ratios)).pow(2).sum()")
    (tmp_path / "dq.py").write_text(text, encoding="utf-8")
    for root in (copy, ROOT):
        done = kit("grade", tmp_path / "dq.py", "--only", 3, 4, 5, root=root)
        assert points(done) == {"budget_loss": 4, "straight_through": 4, "Codebook.assign": 0}
        assert "not used: one_hot" in done.stdout and "not written yet" in done.stdout
    assert "1 / 0" not in Assembly(SOURCE, text, ["budget_loss"]).text


BASE = """\
import os
from math import pi


def one():
    return 1


class Box:
    side = 1

    def area(self):
        raise NotImplementedError

    def side_of(self):
        return self.side


def solve(x):
    raise NotImplementedError
"""
SUBMISSION = """\
from __future__ import annotations
import os, json as j
import os.path
import no_such_package
from math import *
from math import tau, e as pi
try:
    import numpy as fast
except ImportError:
    fast = None
os.getcwd = None
print(1 / 0)


def one():
    return 2


class Box:
    side = 2
    corners: int = 4

    def area(self) -> Missing:
        return self.side * self.twice() * self.corners

    def twice(self):
        return 2 * one()


class Other(Box):
    pass


def solve(x):
    raise NotImplementedError


def helper(x, tau=tau):
    return floor(x) + tau


Box.volume = lambda self: 8
Box.side_of = lambda self: 9
FACTOR = 3
solve = lambda x: FACTOR * helper(x) * (fast is not None)
"""


def test_what_comes_along():
    """What is new, wherever it stands; nothing that replaces what is there, and no other statement."""
    assembly = Assembly(BASE, SUBMISSION, ["Box.area", "solve"])
    space = dict(FAULTS=[], __name__="made")
    exec(compile(assembly.text, "made", "exec"), space)
    box = space["Box"]()
    assert (box.side, box.corners, box.side_of(), box.volume(), space["one"]()) == (1, 4, 1, 8, 1)
    assert box.area() == 8 and space["Other"]().area() == 8
    assert space["pi"] == math.pi and space["solve"](1.5) == pytest.approx(3 * (1 + math.tau))
    assert len(space["FAULTS"]) == 1 and "no_such_package" in space["FAULTS"][0] and os.getcwd is not None
    assert assembly.unused == ["one", "Box.side", "Box.side_of"]
    assert Assembly(BASE, BASE + "\n\nBox.area = lambda self: 7\n", ["Box.area"]).text.endswith("lambda self: 7\n")


# ------------------------------------------------------------------------------------------------
# Grading


ALL = "DQ_COURSE_ALL" in os.environ      # grade all exercises below, which takes a minute; else some


def test_many_submissions_in_one_command(tmp_path):
    """Ours, right ones in other styles, wrong ones, cheats, holes, and what can't be read: a row each."""
    numbers = [number for number in range(len(EXERCISES)) if ALL or number in (0, 3, 4, 9, 15)]
    points = {EXERCISES[number].function: EXERCISES[number].points for number in numbers}
    assert len(right_solutions.RIGHT) >= 10
    lost = [e.function for e in EXERCISES[::2] if e.function not in ("Layout.unpack", "Codebook.restart")]
    wrong = SOURCE
    for function in lost:
        wrong = replaced(wrong, function, wrong_text(function, *WRONG[function][1][1:]))
    holes = SOURCE.replace("import torch\n", "import torch\nimport no_such_package\n", 1)
    holes = holes.replace("def mix(", "def mixed(")
    for e in EXERCISES[4:]:
        if e.function != "DQVAE.mix":
            holes = replaced(holes, e.function, STUBS[e.function])
    cells = [dict(cell_type="markdown", source=["# mine"]), dict(cell_type="code", source=["%pip list\n", holes])]
    for name, text in {"ours.py": SOURCE, "right.py": right_solutions.submission(SOURCE), "wrong/dq.py": wrong,
                       "cheats/my_dq.py": cheats.submission(SOURCE, ROOT, tmp_path / "target"),
                       "book.ipynb": json.dumps(dict(cells=cells)),
                       "syntax.py": "def f(:\n", "null.py": "x = '\0'", "none/notes.txt": "", "bad.ipynb": "{"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "text.py").write_bytes(b"\xff\xfe")
    out = tmp_path / "out"
    out.mkdir()
    done = kit("grade", tmp_path, "--limit", 5, "--csv", out / "all.csv", "--json", out / "all.json",
               "--only", *(number + 1 for number in numbers))
    assert done.returncode == 0, done.stderr
    rows = {row["file"]: row for row in json.loads((out / "all.json").read_text())["submissions"]}
    assert not (tmp_path / "target").exists()
    got = {name: {each["function"]: each["points"] for each in row["exercises"]} for name, row in rows.items()}
    assert got["ours.py"] == got["right.py"] == points, rows["right.py"]
    if fence.landlock_version():                                             # else `grade` says that there is no fence
        assert set(got["cheats/my_dq.py"].values()) == {0}, rows["cheats/my_dq.py"]
    allowed = {function: points[function] for function in points if function not in lost}
    assert {function: each for function, each in got["wrong/dq.py"].items() if function not in lost} == allowed
    assert all(got["wrong/dq.py"][function] < points[function] for function in lost if function in points)
    assert got["book.ipynb"] == {e.function: e.points if number < 4 else 0
                                 for number, e in enumerate(EXERCISES) if number in numbers}
    faults = {each["fault"] for each in rows["book.ipynb"]["exercises"]}
    assert faults == {"", "not written yet"} | ({"missing"} if ALL else set())
    unread = {"syntax.py", "null.py", "none", "bad.ipynb", "text.py", "out"}
    assert {name for name, row in rows.items() if row["fault"]} == unread
    assert all(name in done.stdout for name in rows)
    with open(out / "all.csv", newline="", encoding="utf-8") as file:
        table = {row["file"]: row for row in csv.DictReader(file)}
    assert float(table["ours.py"]["all"]) == sum(points.values()) - (20 if ALL else 0)
    assert float(table["ours.py"]["bonus"]) == (20 if ALL else 0)
    assert table["syntax.py"]["fault"] and not table["syntax.py"]["all"]


@pytest.mark.parametrize("content", [b"def f(:\n", None], ids=["syntax", "none"])
def test_a_file_that_cannot_be_read_gives_one_line(content, tmp_path):
    if content is not None:
        (tmp_path / "dq.py").write_bytes(content)
    done = kit("grade", tmp_path / "dq.py")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and done.stderr.startswith("0 points")


# ------------------------------------------------------------------------------------------------
# The sandbox, time, faults of the grader


@pytest.fixture(scope="module")
def checker():
    """This process checks submissions, as one that `grade` starts."""
    kept = {name: getattr(checks.naive, name) for name in ("legal", "logits", "generate")} if hasattr(
        checks, "naive") else None
    import naive
    kept = kept or {name: getattr(naive, name) for name in ("legal", "logits", "generate")}
    threads = dq.torch.get_num_threads()
    checks.prepare(ROOT)
    yield checks
    dq.torch.set_num_threads(threads)
    vars(naive).update(kept)
    checks.nursery.close()


def graded(checker, function, text=None, **kwargs):
    """-> what the tests of an exercise say of a file, or of one with this text of the function"""
    number = [e.function for e in EXERCISES].index(function)
    return checker.check(number, text if "\nimport" in text else replaced(SOURCE, function, text), **kwargs)


def test_one_closed_folder_of_python_is_noticed(tmp_path, monkeypatch):
    """A virtual environment in a folder of root's own, beside an interpreter that everybody can read."""
    (tmp_path / "closed").mkdir(mode=0o700)
    for path in (tmp_path, *tmp_path.parents):
        if path.stat().st_uid == os.geteuid() and not path.stat().st_mode & 1:
            monkeypatch.setattr(fence, "open_to_all", lambda path: Path(path).name != "closed")
    monkeypatch.setattr(fence, "pythons_folders", lambda: [str(tmp_path)])
    assert fence.others_can_read_python()
    monkeypatch.setattr(fence, "pythons_folders", lambda: [str(tmp_path), str(tmp_path / "closed")])
    assert not fence.others_can_read_python()


needs_landlock = pytest.mark.skipif(not fence.landlock_version(), reason="this kernel has no Landlock")
needs_root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can be another user")


@needs_landlock
def test_no_way_out_of_the_sandbox(checker, tmp_path):
    """Neither to the reference, by which every cheat would score, nor to other files, processes, networks."""
    target, folder = tmp_path / "results.json", tmp_path / "worker"
    target.write_text("0 points")
    folder.mkdir()
    remote = checks.Remote("import torch\n" + cheats.top(ROOT, target), "attempts", 30.0, str(folder))
    try:
        assert remote() == ""
    finally:
        remote.close()
    time.sleep(1.2)                                                          # a daemon would have written by now
    assert target.read_text() == "0 points" and target.stat().st_mode & 0o400


@needs_root
def test_a_worker_of_root_is_another_user(tmp_path, monkeypatch):
    """Where there is no Landlock, permissions and the owner of a process are what holds."""
    monkeypatch.setattr(fence, "landlock_version", lambda: 0)
    secret, folder = tmp_path / "secret", tmp_path / "worker"
    secret.write_text("42")
    secret.chmod(0o600)
    folder.mkdir()
    child = os.fork()
    if child == 0:
        fence.other_user(folder)
        refused = [os.getuid() >= 50_000]
        for deed in (secret.read_text, lambda: os.kill(os.getppid(), 0), lambda: os.setuid(0),
                     lambda: os.chown(secret, 1, 1)):
            with contextlib.suppress(PermissionError):
                deed()
                refused.append(False)
        os._exit(0 if all(refused) else 1)
    assert os.waitpid(child, 0)[1] == 0


def arguments(*paths, **kwargs):
    return SimpleNamespace(**dict(paths=[Path(path) for path in paths], only=[4], limit=20, minutes=8, csv=None,
                                  json=None, gradescope=None, variant=None) | kwargs)


def test_grade_says_where_submissions_are_not_fenced(tmp_path, monkeypatch, capsys):
    (tmp_path / "dq.py").write_text(STUBS["straight_through"])
    assert fence.gap(ROOT) == "" or "Landlock" in fence.gap(ROOT)
    monkeypatch.setattr(fence, "landlock_version", lambda: 0)
    monkeypatch.setattr(os, "geteuid", lambda: 1000, raising=False)
    monkeypatch.setattr(checks.Nursery, "close", lambda self: None)          # other tests go on with it
    assignment.grade(arguments(tmp_path / "dq.py"))
    assert capsys.readouterr().err.startswith("submissions are not fenced: this system has no Landlock")


def inline(checker):
    """In place of Checkers.submit: no other processes."""
    def submit(self, *task):
        future = Future()
        try:
            future.set_result(checker.check(*task))
        except checks.NotGraded as error:
            future.set_exception(error)
        return future
    return submit


def test_faults_in_starting_workers_cost_no_points(checker, tmp_path, monkeypatch, capsys):
    """A killed nursery is started again; if none can be started, the cell is not graded, and the status says so.

    Nurseries and workers have nothing of the environment but what Python needs.
    """
    monkeypatch.setenv("MY_TOKEN", "42")
    os.kill(checks.nursery.process.pid, signal.SIGKILL)
    checks.nursery.process.wait()
    text = "def straight_through(z, q):\n    import os\n    raise ValueError('MY_TOKEN' in os.environ, len(os.environ))"
    fault = graded(checker, "straight_through", text)["test_straight_through_has_the_value_of_q_and_the_gradient_of_z"]
    assert fault.startswith("ValueError: (False, ") and int(fault.split()[2].strip(")")) < 9
    assert set(graded(checker, "straight_through", OURS["straight_through"]).values()) == {""}
    tried = []

    def born(self):
        tried.append(self)
        raise OSError("no processes left")
    monkeypatch.setattr(checks.Nursery, "born", born)
    monkeypatch.setattr(checks.Nursery, "start", lambda self: None)
    monkeypatch.setattr(checks.Nursery, "close", lambda self: None)
    monkeypatch.setattr(assignment.Checkers, "submit", inline(checker))
    (tmp_path / "dq.py").write_text(SOURCE, encoding="utf-8")
    with pytest.raises(SystemExit, match="failed with exercises"):
        assignment.grade(arguments(tmp_path / "dq.py", csv=tmp_path / "all.csv"))
    assert len(tried) == 9                                                   # three times three
    assert "not graded" in capsys.readouterr().out and "not graded: 4" in (tmp_path / "all.csv").read_text()


def test_small_text_cannot_fill_the_graders_memory():
    with pytest.raises(ValueError, match="1 MB"):
        worker.Reader(struct.pack("<q", 9 * 10 ** 6) + b"[]," * 10)          # as lists 25 times as much


def test_a_whole_file_has_a_deadline(checker, tmp_path, monkeypatch, capsys):
    """An exercise that sleeps costs itself and what follows, and all before it counts."""
    monkeypatch.setattr(assignment.Checkers, "submit", inline(checker))
    monkeypatch.setattr(checks.Nursery, "close", lambda self: None)
    text = replaced(SOURCE, "Codebook.assign", "def assign(self, z):\n    import time\n    time.sleep(60)")
    (tmp_path / "dq.py").write_text(text, encoding="utf-8")
    assignment.grade(arguments(tmp_path / "dq.py", only=[4, 5, 16], minutes=0.1))
    rows = [line.split(maxsplit=5) for line in capsys.readouterr().out.splitlines()[1:4]]
    assert [row[2] for row in rows] == ["4", "0", "0"]
    assert all("not run" in row[5] for row in rows[1:])


def test_pasted_loops_get_less_than_half(checker):
    """tests/naive.py, which students have, with wrappers: right, but too slow. `ALL`: at most 40 of 100 points."""
    pasted = right_solutions.pasted(SOURCE, (ROOT / "tests/naive.py").read_text(encoding="utf-8"))
    for function in ("DQVAE.cell_weight", "Layout.pack", "draw"):
        results = graded(checker, function, pasted)
        assert [bool(fault) for fault in results.values()] == [False, True], results
        assert "as long as a loop" in [*results.values()][-1]
    assert sum(sum(e.parts[:-1]) for e in EXERCISES if SPEED in e.tests) <= 40
    row = assignment.Submission("", visible={9: {"test_pack": "wrong", f"{SPEED}::test": ""}})
    assert row.points(9)[0] == 0                                             # speed counts for right answers alone


# ------------------------------------------------------------------------------------------------
# Files that come


def test_what_students_hand_in(checker, tmp_path):
    """Encodings, notebooks with IPython's own syntax, archives, helper modules."""
    mine = "from helpers import half  # \xfc\n\ndef straight_through(z, q):\n    return half(z + z) + (q - z).detach()"
    files = {
        "ann/dq.py": ("# coding: cp1252\n" + mine).encode("cp1252"),
        "ann/helpers.py": b"def half(x):\n    return x / 2\n", "bob.zip": b"PK", "eve.pdf": b"%PDF",
        "tom/dq.py": b"import naive\n", "tom/naive2.py": b"from naive import draw\n",
        "lea.ipynb": json.dumps(dict(cells=[dict(cell_type="code", source=source) for source in (
            "x?\n", "if True:\n    %time y = 1\n    !ls\n", "%%bash\nls -l\n", "files = !ls\n??dq.draw\n",
            mine.replace("half(z + z)", "z"))])).encode()}
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    rows = {each.student: each for each in (assignment.load(*each) for each in assignment.collect(tmp_path))}
    assert {name for name, row in rows.items() if row.fault} == {"bob", "eve"} and "unpack" in rows["bob"].fault
    for name in ("ann", "lea"):
        said = graded(checker, "straight_through", "\nimport os\n" + rows[name].text, helpers=rows[name].helpers)
        assert set(said.values()) == {""}, said
    said = graded(checker, "straight_through", "\nimport os\n" + rows["ann"].text, helpers=rows["tom"].helpers)
    assert "nothing may come from the tests" in str(said)


def test_what_the_staff_gets(tmp_path, monkeypatch):
    """A solution of the variant, and a page with every common mistake and rubric."""
    monkeypatch.setattr(sys, "argv", ["assignment.py", "make", "--solution", str(tmp_path / "dq.py"), "--assistants",
                                      str(tmp_path / "staff.md"), "--variant", "5"])
    assignment.main()
    assert (tmp_path / "dq.py").read_text(encoding="utf-8") == project(["dq.py"], 5)["dq.py"]
    page = (tmp_path / "staff.md").read_text(encoding="utf-8")
    assert all(why in page for wrong in WRONG.values() for why, _, _ in wrong)
    assert len(handout.QUESTIONS) == 5 and all(row[1] in page for row in handout.QUESTIONS + handout.EXPERIMENTS)


def test_tables_for_gradescope_and_spreadsheets(tmp_path, monkeypatch):
    """A column for the student, and one way to write a number."""
    rows = [assignment.Submission(f"{name}/dq.py", name, visible={3: {"t": fault}}) for name, fault in
            (("ann", ""), ("bob", "wrong"))]
    assignment.write_csv(tmp_path / "all.csv", rows, [3], 1.0)
    with open(tmp_path / "all.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["student"] for row in table] == ["ann", "bob"] and [row["all"] for row in table] == ["4", "0"]
    monkeypatch.setenv("DQ_COURSE_HIDDEN", "abc")
    with pytest.raises(SystemExit, match="whole number, not 'abc'"):
        assignment.grade(arguments(tmp_path))


# ------------------------------------------------------------------------------------------------
# Variants


def test_every_edit_is_found_once():
    """Of every choice; and every exercise varies."""
    assert {function for _, functions, _ in variants.VARIATIONS for function in functions} == {
        e.function for e in EXERCISES}
    edits = [each for _, _, choices in variants.VARIATIONS for choice in choices for each in choice]
    names = {each[0] for each in edits} - {variants.GONE}
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in {*names, "tests/test_transformer.py"}}
    for name, functions, choices in variants.VARIATIONS:
        for choice in choices:
            now = variants.applied(texts, choice)
            assert all(now[file] != texts[file] for file in {each[0] for each in choice} - {variants.GONE}), name
    for seed in range(4):
        for text in variants.edited(texts, seed, hidden=0).values():
            ast.parse(text)
    with pytest.raises(ValueError, match="there is no GrainRouter.forward"):
        variants.edited(dict(texts, **{"dq.py": ""}), 0)


def test_edits_match_code_whatever_its_comments_and_line_breaks():
    text = ("class A:\n    def f(self, x):\n        \"\"\"Old.\"\"\"\n        y = g(x,  # why\n              1)  # B\n"
            "        return y\n")
    edits = [("f", "A.f", "g(_1, 1)", "2 * g(_1, 3)"), ("f", "A.f", None, "New,\n\nin two paragraphs."),
             ("f", "A.f", "return _1", "return -_1  # C")]
    assert variants.applied(dict(f=text), edits)["f"] == (
        "class A:\n    def f(self, x):\n        \"\"\"New,\n\n        in two paragraphs.\"\"\"\n"
        "        y = 2 * g(x, 3)  # B\n        return -y  # C\n")


@pytest.mark.parametrize("seed", [0, 2, 5])                                  # together, all choices
def test_no_text_of_a_variant_has_the_published_rule(seed, tmp_path, monkeypatch):
    """Sources, tests, pages; and where a picture can show the rule, it is another one."""
    assert {(n, choice) for seed in (0, 2, 5) for n, choice in enumerate(variants.chosen(seed))} == {
        (n, choice) for n, (_, _, choices) in enumerate(variants.VARIATIONS) for choice in range(len(choices))}
    folder, blank = tmp_path / "copy", picture.Page()
    monkeypatch.setitem(sys.modules, "dq", dq)                               # `make` puts its own there
    if seed != 5:
        monkeypatch.setattr(picture, "Pictures", lambda _: [lambda: blank] * 17)
    assignment.make(folder, seed)
    texts = {path: path.read_text(encoding="utf-8") for path in folder.rglob("*")
             if path.suffix in (".py", ".md") and path.name not in SOURCES[1:]}
    for pattern in variants.gone(variants.edits(seed)):
        found = [path.name for path, text in texts.items() if re.search(pattern, text)]
        assert not found, f"{pattern} is still in {found}"
    if seed == 5:
        for number in (3, 4, 8, 10, 12, 13, 15, 16):
            ours = picture.Pictures(dq)[number - 1]().image
            theirs = Image.open(next((folder / "handout").glob(f"{number:02}-*.png")))
            assert ours.tobytes() != theirs.tobytes(), f"picture {number} does not show the variant"


@pytest.mark.parametrize("seed", [None, 0, 5])                               # the published one, both other numberings
def test_the_example_of_the_docstring_is_that_of_the_variant(seed):
    space = vars(executed(project(["dq.py"], seed)["dq.py"], "variant"))
    codes = [["abcdefg".index(c) for c in row] for row in ("aabc", "aade", "ffgg", "ffgg")]
    layout = space["Layout"](4, (2, 1))
    pos, code = layout.pack(dq.torch.tensor([codes]), dq.torch.tensor([[[0, 1], [0, 0]]]))
    lines = [line.split() for line in space["Layout"].__doc__.splitlines()]
    said = {word: line[i + 1:] for line in lines if line[:1] == ["0"] for i, word in enumerate(line)
            if word in ("position", "content")}
    n = int(layout.lengths(pos)[0])
    assert list(map(int, said["position"])) == pos[0, :n].tolist()
    assert [-1 if c == "-1" else "abcdefg".index(c) for c in said["content"][:n]] == code[0, :n].tolist()
    if seed is None:                                                         # tests/test_layout.py knows it by heart
        return
    words = space["Layout"].__doc__.split("may be followed by")[1].split("alone.")[0].split(";")
    followed = [[int(word) for word in each.replace(",", " ").split() if word.isdecimal()] for each in words]
    grains = layout.grains(pos)                                              # as in training: the final ones
    for start, *wanted in [[0, *followed[0]], [*followed[1]], [followed[2][0], followed[2][-1]]]:
        may = layout.legal(dq.torch.tensor([start]), grains)[0]
        assert set((may == may[wanted[0]]).nonzero().flatten().tolist()) == set(wanted)


def test_a_variant_is_solved_by_its_reference_alone(tmp_path):
    """The published functions get no points of any exercise, not even a part; with ALL, pasted loops at most 40."""
    seed = 5
    (tmp_path / "this.py").write_text(project(["dq.py"], seed)["dq.py"], encoding="utf-8")
    (tmp_path / "public.py").write_text(SOURCE, encoding="utf-8")
    if ALL:
        naive = project(["tests/naive.py"], seed)["tests/naive.py"]
        (tmp_path / "pasted.py").write_text(right_solutions.pasted(SOURCE, naive), encoding="utf-8")
    numbers = range(1, 18) if ALL else [1, 4, 7, 8, 9, 13]
    done = kit("grade", tmp_path, "--variant", seed, "--only", *numbers, "--json", tmp_path / "all.json",
               **(dict(DQ_COURSE_HIDDEN="3") if ALL else {}))
    assert done.returncode == 0, done.stderr
    rows = {row["file"]: row for row in json.loads((tmp_path / "all.json").read_text())["submissions"]}
    got = {name: {each["function"]: each["points"] for each in row["exercises"]} for name, row in rows.items()}
    assert got["this.py"] == {function: POINTS[function] for function in got["this.py"]}, rows["this.py"]
    assert set(got["public.py"].values()) == {0}, rows["public.py"]
    assert not ALL or rows["pasted.py"]["all"] <= 40, rows["pasted.py"]


VISIBILITY = {"hidden", "after_due_date", "after_published", "visible"}


def test_results_agree_with_gradescopes_specification(tmp_path):
    """Its fields, by name; hidden cases are seen after the due date."""
    done = kit("make", "--autograder", tmp_path / "autograder.zip")
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(tmp_path / "autograder.zip") as archive:
        archive.extractall(tmp_path / "source")
        modes = {info.filename: info.external_attr >> 16 for info in archive.infolist()}
        run = archive.read("run_autograder").decode()
        assert len(archive.namelist()) == len(set(archive.namelist())) and "maximum to 100 points" in done.stdout
    assert modes["setup.sh"] == modes["run_autograder"] == 0o755
    seed = run.split("DQ_COURSE_HIDDEN=")[1].split()[0]
    assert "/autograder/submission" in run and "--gradescope /autograder/results/results.json" in run
    (tmp_path / "submission").mkdir()
    wrong = replaced(SOURCE, "budget_loss", wrong_text("budget_loss", *WRONG["budget_loss"][1][1:]))
    (tmp_path / "submission" / "solution.py").write_text(wrong, encoding="utf-8")
    done = kit("grade", tmp_path / "submission", "--gradescope", tmp_path / "results.json", "--only", 3, 4,
               root=tmp_path / "source", DQ_COURSE_HIDDEN=seed)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results) == {"score", "execution_time", "output", "output_format", "visibility", "stdout_visibility",
                            "tests"}
    assert results["visibility"] in VISIBILITY and results["stdout_visibility"] in VISIBILITY
    assert results["score"] == 4 == sum(test["score"] for test in results["tests"])
    assert sum(test["max_score"] for test in results["tests"]) == 8
    for test in results["tests"]:
        assert set(test) == {"number", "name", "score", "max_score", "status", "output", "output_format", "visibility"}
        assert test["status"] == ("passed" if test["score"] == test["max_score"] else "failed")
        assert test["visibility"] == ("after_due_date" if "hidden" in test["name"] else "visible")


def test_the_leaderboard_ranks_by_nats_and_finds_who_looks_ahead(run, tmp_path):
    """A checkpoint; two with a dq.py of their own; two whose logits know the answer; none; and one that is damaged."""
    answers = {
        "same": "return _1, _2", "other": "return _1, 3 * _2 - _2.mean(-1, keepdim=True)",
        "peeks": "return _1, _2 + 9 * F.one_hot(code.clamp(min=0), _2.shape[-1])",
        "peeks-where": "return _1.clamp(min=-9) + 9 * F.one_hot(pos, _1.shape[-1]), _2",
        "far": "return _1, _2 + pos[:, -1:, None].float() * _2.flip(-1)"}
    for name in ("plain", "damaged", "none", *answers):
        (tmp_path / name).mkdir()
        if name != "none":
            (tmp_path / name / "transformer.pt").write_bytes((run / "transformer.pt").read_bytes())
        if name in answers:
            other = [("dq", "DQTransformer.logits", "return _1, _2", answers[name])]
            text = variants.applied(dict(dq=SOURCE), other)["dq"]
            (tmp_path / name / "dq.py").write_text(text, encoding="utf-8")
    (tmp_path / "damaged" / "transformer.pt").write_bytes(b"rubbish")
    parts = [tmp_path / "public.pt", tmp_path / "private.pt"]
    done = kit("split", run / "codes.pt", "--public", parts[0], "--private", parts[1])
    assert done.returncode == 0, done.stderr
    public, private = (dq.load_checkpoint(path, "dq-codes") for path in parts)
    whole = dq.load_checkpoint(run / "codes.pt", "dq-codes")["held_out"]["codes"]
    both = [*public["held_out"]["codes"], *private["held_out"]["codes"]]
    assert sorted(map(str, both)) == sorted(map(str, whole)) and len(private["held_out"]["codes"]) >= 1
    assert dq.torch.equal(private["train"]["codes"], private["held_out"]["codes"])  # nothing else is in it
    done = kit("leaderboard", tmp_path, "--codes", parts[0], "--private", parts[1])
    assert done.returncode == 0 and not done.stderr, done.stderr
    rows = {line.split()[1]: line for line in done.stdout.splitlines()[1:]}
    assert rows.keys() == {"plain", "damaged", "none", *answers}
    assert "depend on its content" in rows["peeks"] and "depend on its position" in rows["peeks-where"]
    assert "later" in rows["far"] and "no such file" in rows["none"] and "not a checkpoint" in rows["damaged"]
    nats = {name: float(rows[name].split()[2]) for name in ("plain", "same", "other")}
    assert nats["plain"] == pytest.approx(nats["same"], abs=0.01) and nats["other"] != nats["plain"]
    ranked = [nats[line.split()[1]] for line in done.stdout.splitlines()[1:4]]
    assert ranked == sorted(ranked)


def test_the_leaderboard_of_a_variant(run, tmp_path):
    """A checkpoint of the variant's own layout, which the published dq.py refuses."""
    (tmp_path / "ann").mkdir()
    checkpoint = dq.torch.load(run / "transformer.pt", weights_only=True)
    space = vars(executed(project(["dq.py"], 5)["dq.py"], "variant"))
    dq.torch.save(checkpoint | dict(layout=space["Layout"].name), tmp_path / "ann" / "transformer.pt")
    with pytest.raises(dq.UserError):
        dq.load_checkpoint(tmp_path / "ann" / "transformer.pt", "dq-transformer")
    done = kit("leaderboard", tmp_path, "--codes", run / "codes.pt", "--variant", 5)
    assert done.returncode == 0 and "look-up table" in done.stderr, done.stdout + done.stderr
    assert re.search(r"^ 1 ann +\d+\.\d\d", done.stdout, re.M)
