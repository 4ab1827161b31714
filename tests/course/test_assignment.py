"""The course: missing functions get no points, right solutions in any style all, wrong ones lose their exercise.

    exercises.py, wrong_solutions.py   the tests under "Exercises"; test_what_comes_along
    assignment.py                      the tests under "Copies", "Grading" and "Files"
    checks.py, worker.py, fence.py     the tests under "The sandbox"; cheats.py has the attacks
    variants.py, leaderboard.py        the tests under these words
"""
import ast
import contextlib
import csv
import json
import math
import os
import re
import signal
import struct
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
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
import leaderboard
import picture
import right_solutions
import test_speed
import variants
import worker
from assignment import ROOT, executed, project
from exercises import (EXERCISES, SOURCES, SPEED, TESTS, definitions, is_stub, paths, replaced, stub,
                       text_of, unused)
from warm import Script, begin
from wrong_solutions import WRONG

begin()                                                                      # while the other tests are read
ALL = "DQ_COURSE_ALL" in os.environ      # grade all exercises below, which takes minutes; else some
SOURCE = (ROOT / "dq.py").read_text(encoding="utf-8")
FUNCTIONS = [e.function for e in EXERCISES]
OURS = {function: text_of(SOURCE, function) for function in FUNCTIONS}
STUBS = {function: stub(text) for function, text in OURS.items()}
POINTS = {e.function: e.points for e in EXERCISES}


def write(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder


def kit(*args, root=ROOT, **environment):
    """Run a command -> what it printed, its errors"""
    process = Script(root / "tests" / "course" / "assignment.py", *args, **environment)
    printed, errors = process.communicate()
    assert process.returncode == 0, printed + errors
    return printed, errors


def points(table):
    """What `grade` wrote with --json -> {student: {function: points}}, and its rows by student"""
    rows = {row["student"]: row for row in json.loads(table.read_text())["submissions"]}
    return {name: {each["function"]: each["points"] for each in row["exercises"]} for name, row in rows.items()}, rows


def wrong_text(function, old, new):
    with contextlib.suppress(ValueError, SyntaxError):                       # a syntax tree, if it is there once
        return variants.applied(dict(ours=OURS[function]), [("ours", function.split(".")[-1], old, new)])["ours"]
    assert OURS[function].count(old), f"{function} has changed: it no longer contains {old}"
    return OURS[function].replace(old, new)


@pytest.fixture(scope="module")
def checker():
    """This process checks submissions, as one that `grade` starts."""
    threads = dq.torch.get_num_threads()
    checks.prepare(ROOT)
    yield checks
    dq.torch.set_num_threads(threads)
    checks.nursery.close()


@pytest.fixture
def grade(checker, tmp_path, monkeypatch):
    """`grade` of some exercises without other processes of the grader -> as `points` does"""
    def run(path, *only, **options):
        table = tmp_path / "graded.json"
        args = dict(paths=[path], only=only or range(1, 18), limit=20, minutes=8, csv=None, json=table, gradescope=None)
        assignment.grade(SimpleNamespace(**args | dict(variant=None) | options))
        return points(table)
    monkeypatch.setattr(assignment, "checkers", lambda *_, **__: ThreadPoolExecutor(1))
    monkeypatch.setattr(checks.Nursery, "close", lambda self: None)          # other tests need it, too
    return run


@contextlib.contextmanager
def in_place(texts):
    """{function: text}: dq's functions compute this for a while."""
    with contextlib.ExitStack() as stack:
        for function, text in texts.items():
            space = dict(vars(dq))
            exec(text, space)
            stack.enter_context(checks.in_place(function, space[function.split(".")[-1]]))
        yield


def run_tests(e, skip="test_every_legal_walk_is_a_complete_tiling", speed=False):  # long, and no other one
    for test in e.tests.split():
        if test != skip and (speed or SPEED not in test):
            checks.run(checks.the_test(e, test))


# ------------------------------------------------------------------------------------------------
# Exercises


def test_every_exercise_is_complete(capsys):
    assert FUNCTIONS == list(WRONG) and all(len(wrong) == 3 for wrong in WRONG.values())
    tests = [test for e in EXERCISES for test in e.tests.split()]
    assert len(set(tests)) == len(tests)                                     # no test belongs to two exercises
    assert all(not e.parts or len(e.parts) == len(e.tests.split()) and sum(e.parts) == e.points for e in EXERCISES)
    assert FUNCTIONS == [name for name in definitions(ast.parse(SOURCE)) if name in FUNCTIONS]  # in the file's order
    assignment.show()
    said = " ".join(capsys.readouterr().out.split())
    assert all(f"{e.name}: {e.function} {e.points} points" in said for e in EXERCISES) and "These count" in said
    assert "100 points in 710 minutes of work, and a bonus of 20 points in 240 minutes" in said


@pytest.mark.parametrize("e", EXERCISES, ids=FUNCTIONS)
def test_our_solution_passes_and_wrong_ones_fail(e, checker):
    """With the exercises that it needs, and with no others, earlier or later."""
    needed = [e.function, *(FUNCTIONS[int(each) - 1] for each in e.needs.split())]
    with in_place({function: STUBS[function] for function in FUNCTIONS if function not in needed}):
        run_tests(e, speed=e.function in ("DQVAE.mix", "Layout.legal", "draw"))
    texts = [(why, e.function, wrong_text(e.function, old, new)) for why, old, new in WRONG[e.function]]
    needed = needed if e.function != "Layout.legal" else [e.function]        # its tests are long
    for why, function, text in [*texts, *(("not written", function, STUBS[function]) for function in needed)]:
        with in_place({function: text}), pytest.raises(Exception):
            run_tests(e, skip="", speed=function != e.function)
            pytest.fail(f"{function}, {why}: the tests of {e.function} pass")


@pytest.mark.parametrize("e", [e for e in EXERCISES if SPEED in e.tests and (ALL or e.function in (
    "DQVAE.cell_weight", "Layout.pack", "draw"))], ids=lambda e: e.function)
def test_a_loop_over_the_rows_loses_the_points_for_speed(e, checker, monkeypatch):
    """The loop of naive.py, which students have, for a whole batch. All else has 40 points or less."""
    faster = test_speed.faster

    def by_rows(make, ours, loop):
        def slow(*batch):
            _ = [loop(*row) for row in zip(*batch)]
            return ours(*batch)
        faster(make, slow, loop)
    monkeypatch.setattr(test_speed, "faster", by_rows)
    with pytest.raises(AssertionError, match="as long as a loop"):
        checks.run(checks.the_test(e, e.tests.split()[-1]))
    assert sum(sum(each.parts[:-1]) for each in EXERCISES if SPEED in each.tests) + POINTS["budget_loss"] <= 40
    row = assignment.Submission("", visible={9: {"test_pack": "wrong", f"{SPEED}::test": ""}})
    assert row.parts(9)[0][0] == 0                                           # speed counts for right answers alone


def test_every_assert_of_a_graded_test_has_a_message():
    """Those of the functions, too, that graded tests call by name."""
    for file, name in [path.split("::") for e in EXERCISES for path in paths(e)]:
        functions = definitions(ast.parse((ROOT / file).read_text(encoding="utf-8")))
        called = [functions.get(each.id) for each in ast.walk(functions[name]) if isinstance(each, ast.Name)]
        for node in (each for part in [functions[name], *filter(None, called)] for each in ast.walk(part)):
            if isinstance(node, ast.Assert):
                assert node.msg, f"{file}: {ast.unparse(node)}"
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("assert_close"):
                assert "msg" in [each.arg for each in node.keywords], f"{file}: {ast.unparse(node)}"


# ------------------------------------------------------------------------------------------------
# Copies


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "course"
    kit("make", folder)
    return folder


def test_the_students_copy(copy):
    """Holes with docstrings and comments, the tests of the exercises, pages; no answers."""
    script = Script(copy / "train_vae.py", "--steps", 1, cwd=copy)
    code, pages = ({path.relative_to(copy).as_posix(): path.read_text(encoding="utf-8")
                    for path in copy.rglob(pattern)} for pattern in ("*.py", "*.md"))
    made, ours = definitions(ast.parse(code["dq.py"])), definitions(ast.parse(SOURCE))
    for function in FUNCTIONS:
        assert is_stub(made[function]) and ast.get_docstring(made[function]) == ast.get_docstring(ours[function])
        assert ast.unparse(made[function].args) == ast.unparse(ours[function].args)
    assert "# weight: B, 1, h, w" in code["dq.py"]                           # a comment about a shape
    assert code.keys() == {*SOURCES, *(f"tests/{name}" for name in TESTS), *(f"tests/course/{name}.py" for name in (
        "assignment", "exercises", "checks", "worker", "fence", "picture", "handed_out"))}
    assert len([*(copy / "handout").iterdir()]) == 17 + 1 and (copy / "tests/course/vae.pt").exists()
    for said in ("hidden cases", "30 seconds", "2 GB", "Hand in `dq.py`", "exercises 1 to 9", "exactly 0 and 1"):
        assert said in pages["README.md"] + pages["handout/all.md"]          # what a student has to know
    lines = [line.partition("#")[0].strip() for text in OURS.values()
             for line in text.split("\n")[ast.parse(text).body[0].body[1].lineno - 1:]]
    answers = [each[1] for each in handout.QUESTIONS + handout.EXPERIMENTS] + [each for each in lines if len(each) > 49]
    everything = "\n".join([*code.values(), *pages.values()])
    assert not [each for each in answers if each in everything]
    found = {f"{file}::{name}" for file, text in code.items() for name in definitions(ast.parse(text))
             if file.startswith("tests/") and name.startswith("test_")}
    assert found == {path for e in EXERCISES for path in paths(e)}
    error = script.communicate()[1]
    assert script.returncode == 1
    assert error.splitlines()[-1] == "error: exercise 1, the gate: GrainRouter.forward is to be written"
    with pytest.raises(SystemExit, match="not an empty folder"):
        assignment.make(copy, None)


def test_a_copy_grades_by_the_same_rule(copy, grade, tmp_path, capsys):
    """New imports, helpers, methods and attributes count in both; what replaces something else counts in neither."""
    stubs = (copy / "dq.py").read_text(encoding="utf-8")
    text = replaced(stubs, "one_hot", "def one_hot(grains, n):\n    return 1 / 0") + """
from torch import Tensor
straight_through = lambda z, q: halves(2 * z) + (q - z).detach()

def halves(a: Tensor) -> Tensor:
    return a / 2

def budget_loss(gate, ratios):
    return halves(gate.mean((0, 2, 3)) - torch.tensor(ratios)).pow(2).sum() * 4
"""
    folder, table = write(tmp_path / "in", {"mine.py": text, "stubs.py": stubs}), tmp_path / "all.json"
    kit("grade", folder, "--json", table, root=copy)
    for got, rows in (points(table), grade(folder)):
        assert {function for function in FUNCTIONS if got["mine"][function]} == {"budget_loss", "straight_through"}
        assert rows["mine"]["unused"] == ["one_hot"] and set(got["stubs"].values()) == {0}
        assert {each["fault"] for each in rows["stubs"]["exercises"]} == {"not written yet"}
    grade(folder / "mine.py", 3, 4, 5)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in printed[-5:-2]] == ["4", "4", "0"] and printed[-1].endswith("not used: one_hot")


SUBMISSION = """\
from __future__ import annotations
import os
import no_such_package
from math import *
from math import tau, e as F
os.getcwd = None
print(1 / 0)

def upsample(x, side):
    return 2

class RandomRouter(ThresholdRouter):
    corners: int = 4

    def score(self, x) -> Missing:
        return 2 * self.corners + x

    def forward(self, x):
        return 2

def helper(x, tau=tau):
    return floor(x) + tau

RandomRouter.volume = lambda self: 8
ThresholdRouter.forward = lambda self: 9
draw = lambda x: 3 * helper(x)
"""


def test_what_comes_along(tmp_path, monkeypatch):
    """What is new, wherever it stands; nothing that replaces what is there, and no other statement."""
    monkeypatch.setitem(sys.modules, "dq", dq)
    monkeypatch.chdir(tmp_path)
    made = worker.load(SOURCE, SUBMISSION, ["RandomRouter.score", "draw"])
    router = made.RandomRouter((0.5, 0.5))
    assert (router.corners, router.volume(), router.score(1)) == (4, 8, 9)
    assert made.draw(1.5) == pytest.approx(3 * (1 + math.tau))
    assert made.F is dq.F and made.upsample(dq.torch.ones(1, 1, 1), 2).shape == (1, 2, 2)
    assert made.ThresholdRouter.forward.__name__ == made.RandomRouter.forward.__name__ == "forward"
    assert len(made.FAULTS) == 1 and "no_such_package" in made.FAULTS[0] and os.getcwd is not None
    assert unused(SOURCE, SUBMISSION) == ["upsample", "RandomRouter.score", "ThresholdRouter.forward"]
    assert worker.load(SOURCE, "Codebook.assign = lambda self: 7\n", ["Codebook.assign"]).Codebook(1, 1).assign() == 7


# ------------------------------------------------------------------------------------------------
# Grading


def test_many_submissions_in_one_command(grade, tmp_path, capsys):
    """Ours, right ones in other styles, wrong ones, cheats, and what can't be read: a row each."""
    numbers = range(1, 18) if ALL else (1, 4, 5, 10, 16)
    wanted = {FUNCTIONS[number - 1]: EXERCISES[number - 1].points for number in numbers}
    lost = [function for function in FUNCTIONS[::2] if function not in ("Layout.unpack", "Codebook.restart")]
    wrong = SOURCE
    for function in lost:
        wrong = replaced(wrong, function, wrong_text(function, *WRONG[function][1][1:]))
    folder = write(tmp_path / "in", {
        "ours.py": SOURCE, "right.py": right_solutions.submission(SOURCE), "wrong/dq.py": wrong,
        "cheats/my_dq.py": cheats.submission(SOURCE, ROOT, tmp_path / "target"),
        "syntax.py": "def f(:\n", "null.py": "x = '\0'",
        "none/notes.txt": "", "bad.ipynb": "{", "text.py": b"\xff\xfe", "bob.zip": b"PK"})
    got, rows = grade(folder, *numbers, limit=5, csv=tmp_path / "all.csv")
    printed = capsys.readouterr().out
    assert not (tmp_path / "target").exists() and len(right_solutions.RIGHT) >= 10
    assert got["ours"] == got["right"] == wanted, rows["right"]
    if fence.landlock_version():                                             # else `grade` says that there is no fence
        assert set(got["cheats"].values()) == {0}, rows["cheats"]
    for function, most in wanted.items():
        assert got["wrong"][function] < most if function in lost else got["wrong"][function] == most
    unread = {"syntax", "null", "none", "bad", "text", "bob"}
    assert {name for name, row in rows.items() if row["fault"]} == unread and "unpack" in rows["bob"]["fault"]
    assert all(row["file"] in printed for row in rows.values())
    with open(tmp_path / "all.csv", newline="", encoding="utf-8") as file:
        table = {row["student"]: row for row in csv.DictReader(file)}
    assert table["ours"]["all"] == str(sum(wanted.values()) - 20 * ALL) and table["ours"]["bonus"] == str(20 * ALL)
    assert table["wrong"]["file"].endswith("wrong/dq.py") and table["syntax"]["fault"] and not table["syntax"]["all"]


def test_commands_that_end_with_a_line(grade, tmp_path, monkeypatch, capsys):
    for files in ({}, {"dq.py": "def f(:\n"}):
        with pytest.raises(SystemExit, match="^1$"):
            grade(write(tmp_path, files) / "dq.py", 4)
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 1 and said.startswith("0 points")
    with monkeypatch.context() as patch:
        patch.setattr(fence, "landlock_version", lambda: 0)
        patch.setattr(os, "geteuid", lambda: 1000, raising=False)
        grade(write(tmp_path, {"dq.py": STUBS["straight_through"]}) / "dq.py", 4)
    assert capsys.readouterr().err.startswith("submissions are not fenced: this system has no Landlock")
    monkeypatch.setenv("DQ_COURSE_HIDDEN", "abc")
    with pytest.raises(SystemExit, match="whole number, not 'abc'"):
        grade(tmp_path, 4)


# ------------------------------------------------------------------------------------------------
# The sandbox, time, faults of the grader


def test_one_closed_folder_of_python_is_noticed(tmp_path, monkeypatch):
    """A virtual environment in a folder of root's own, beside an interpreter that everybody can read."""
    monkeypatch.setattr(fence, "open_to_all", lambda path: Path(path).name != "closed")
    for name in ("open", "closed"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(fence, "pythons_folders", lambda: [str(tmp_path), str(tmp_path / name)])
        assert fence.others_can_read_python() == (name == "open")


@pytest.mark.skipif(not fence.landlock_version(), reason="this kernel has no Landlock")
def test_no_way_out_of_the_sandbox(checker, tmp_path):
    """Neither to the reference, by which every cheat would score, nor to other files, processes, networks."""
    folder = write(tmp_path, {"results.json": "0 points", "worker/empty": ""})
    target = folder / "results.json"
    source = "import torch\n" + cheats.top(ROOT, target)
    with contextlib.closing(checks.Remote(source, "", [], "attempts", 30.0, str(folder / "worker"))) as remote:
        assert remote() == ()
    time.sleep(0.6)                                                          # a daemon would have written by now
    assert target.read_text() == "0 points" and target.stat().st_mode & 0o400


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can be another user")
def test_a_worker_of_root_is_another_user(tmp_path, monkeypatch):
    """Where there is no Landlock, permissions and the owner of a process are what holds."""
    monkeypatch.setattr(fence, "landlock_version", lambda: 0)
    secret, folder = write(tmp_path, {"secret": "42"}) / "secret", tmp_path / "worker"
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


def test_faults_in_starting_workers_cost_no_points(grade, checker, tmp_path, monkeypatch, capsys):
    """A killed nursery is started again; if none can be started, the cell is not graded, and the status says so.
    Workers have nothing of the environment but what Python needs."""
    monkeypatch.setenv("MY_TOKEN", "42")
    os.kill(checks.nursery.process.pid, signal.SIGKILL)
    checks.nursery.process.wait()
    write(tmp_path, {"dq.py": replaced(SOURCE, "Codebook.assign", "def assign(self, z):\n    import os\n"
                                       "    raise ValueError('MY_TOKEN' in os.environ, len(os.environ))")})
    got, rows = grade(tmp_path / "dq.py", 4, 5)
    fault = rows[tmp_path.name]["exercises"][1]["fault"]
    assert [*got.values()] == [{"straight_through": 4, "Codebook.assign": 0}]
    assert "ValueError: (False, " in fault and int(re.search(r"False, (\d+)", fault)[1]) < 9
    started = []
    monkeypatch.setattr(checks, "Pipe", lambda: os.open(tmp_path / "none", os.O_RDONLY))  # an OSError
    monkeypatch.setattr(checks.Nursery, "__init__", lambda self: started.append(self))
    with pytest.raises(SystemExit, match="failed with exercises"):
        grade(tmp_path / "dq.py", 4, csv=tmp_path / "all.csv")
    assert len(started) == 3
    assert "not graded" in capsys.readouterr().out and "not graded: 4" in (tmp_path / "all.csv").read_text()


def test_small_text_cannot_fill_the_graders_memory():
    with pytest.raises(ValueError, match="1 MB"):
        worker.read_answer(struct.pack("<q", 9 * 10 ** 6) + b"[]," * 10)     # as lists 25 times as much


def test_time_is_limited(checker, grade, tmp_path):
    """For an exercise and for a whole file. What the latter cuts off is "not run", whether it has begun or not."""
    def said(body, **limits):
        text = replaced(SOURCE, "straight_through", f"def straight_through(z, q):\n    import time\n    {body}")
        return [*checker.check(3, text, **limits).values()]
    assert said("while True: pass", limit=1) == ["not done after 1 seconds of computing"]
    assert said("time.sleep(60)", until=time.monotonic() + 1) == [checks.NOT_RUN]
    assert [*checker.check(3, "def straight(): pass").values()] == ["missing"]
    nearest = "min(range(len(self.codes)), key=lambda v: float((self.codes[v] - x).square().sum()))"
    text = replaced(SOURCE, "Codebook.assign", f"def assign(self, z):\n    return torch.tensor([{nearest} for x in z])")
    right, fast = checker.check(4, text).values()
    assert right == "" and "as long as a loop" in fast                       # by the time that the worker computes
    got, rows = grade(write(tmp_path, {"dq.py": SOURCE}) / "dq.py", 4, minutes=0)
    assert [*got.values()] == [{"straight_through": 0}] and "not run" in str(rows)


# ------------------------------------------------------------------------------------------------
# Files that come and go


def test_what_students_hand_in(checker, tmp_path):
    """Encodings, notebooks with IPython's own syntax, helper modules; `tom` imports from the tests."""
    mine = "from helpers import half  # \xfc\n\ndef straight_through(z, q):\n    return half(z + z) + (q - z).detach()"
    cells = ("x?\n", "if True:\n    %time y = 1\n    !ls\n", "%%bash\nls -l\n", "files = !ls\n??dq.draw\n",
             mine.replace("half(z + z)", "z"))
    write(tmp_path, {
        "ann/dq.py": ("# coding: cp1252\n" + mine).encode("cp1252"),
        "ann/helpers.py": "def half(x):\n    return x / 2\n", "eve.pdf": "%PDF",
        "tom/dq.py": mine, "tom/helpers.py": "from naive import draw as half\n",
        "lea.ipynb": json.dumps(dict(cells=[dict(cell_type="code", source=source) for source in cells]))})
    rows = {each.student: each for each in (assignment.load(*each) for each in assignment.collect(tmp_path))}
    assert {name for name, row in rows.items() if row.fault} == {"eve"}
    said = {name: set(checker.check(3, rows[name].text, helpers=rows[name].helpers).values())
            for name in ("ann", "lea", "tom")}
    assert said["ann"] == said["lea"] == {""} and "No module named 'naive'" in str(said["tom"])


def test_what_the_staff_gets(tmp_path):
    """A solution of the variant, and a page with every common mistake and rubric."""
    assignment.main(["make", "--solution", str(tmp_path / "dq.py"), "--assistants", str(tmp_path / "staff.md"),
                     "--variant", "5"])
    assert (tmp_path / "dq.py").read_text(encoding="utf-8") == project(["dq.py"], 5)["dq.py"]
    page = (tmp_path / "staff.md").read_text(encoding="utf-8")
    assert all(why in page for wrong in WRONG.values() for why, _, _ in wrong)
    assert len(handout.QUESTIONS) == 5 and all(row[1] in page for row in handout.QUESTIONS + handout.EXPERIMENTS)


def test_results_agree_with_gradescopes_specification(tmp_path, capsys):
    """Its fields, by name; hidden cases are seen after the due date."""
    assignment.make_autograder(tmp_path / "autograder.zip", 5)
    assert "maximum to 100 points" in capsys.readouterr().out
    with zipfile.ZipFile(tmp_path / "autograder.zip") as archive:
        archive.extractall(tmp_path / "source")
        modes = {info.filename: info.external_attr >> 16 for info in archive.infolist()}
        assert modes["setup.sh"] == modes["run_autograder"] == 0o755 and len(modes) == len(archive.namelist())
        run = archive.read("run_autograder").decode().replace("/autograder/", f"{tmp_path}/").replace("\\\n", "")
    text = replaced(project(["dq.py"], 5)["dq.py"], "budget_loss", OURS["budget_loss"])
    write(tmp_path, {"submission/solution.py": text, "results/none": ""})
    command = run.splitlines()[-1].split("assignment.py")[1].split()
    kit(*command, "--only", 3, 4, root=tmp_path / "source", DQ_COURSE_HIDDEN=run.split("HIDDEN=")[1].split()[0])
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert set(results) == {"score", "execution_time", "output", "output_format", "visibility", "stdout_visibility",
                            "tests"} and (results["visibility"], results["stdout_visibility"]) == ("visible", "hidden")
    assert results["score"] == 4 == sum(test["score"] for test in results["tests"])
    assert sum(test["max_score"] for test in results["tests"]) == 8
    for test in results["tests"]:
        assert set(test) == {"number", "name", "score", "max_score", "status", "output", "output_format", "visibility"}
        assert test["status"] == ("passed" if test["score"] == test["max_score"] else "failed")
        assert test["visibility"] == ("after_due_date" if "hidden" in test["name"] else "visible")


# ------------------------------------------------------------------------------------------------
# Variants


@pytest.mark.parametrize("choice", [0, 1])
def test_no_text_of_a_variant_has_the_published_rule(choice, tmp_path, monkeypatch):
    """Sources, tests, pages; and where a picture can show the rule, it is another one. Every exercise varies."""
    assert {function for functions, _, _ in variants.VARIATIONS for function in functions.split()} == set(FUNCTIONS)
    monkeypatch.setattr(variants, "chosen", lambda seed: [
        min(choice, len(choices) - 1) for _, choices, _ in variants.VARIATIONS])
    with pytest.raises(ValueError, match="there is no GrainRouter.forward"):
        variants.edited({"dq.py": ""}, 0)
    folder, image = tmp_path / "copy", picture.Pictures.image
    if choice:
        monkeypatch.setattr(picture.Pictures, "image", lambda *_: picture.Page().image)
    assignment.make(folder, 0)
    texts = {path.name: " ".join(path.read_text(encoding="utf-8").split()) for path in folder.rglob("*")
             if path.suffix in (".py", ".md") and path.name not in SOURCES[1:]}
    for words in variants.gone(0):
        found = [name for name, text in texts.items() if " ".join(words.split()) in text]
        assert not found, f"{words} is still in {found}"
    if not choice:
        for number in (3, 4, 6, 8, 9, 10, 12, 13, 15, 16):
            theirs = Image.open(folder / "handout" / f"{number:02}.png")
            ours = image(picture.Pictures(dq), number - 1)
            assert ours.tobytes() != theirs.tobytes(), f"picture {number} does not show the variant"


def test_the_example_of_the_docstring_is_that_of_the_variant():
    of_variant, torch = executed(project(["dq.py"], 5)["dq.py"], "variant").Layout, dq.torch
    layout = of_variant(4, (2, 1))
    codes = torch.tensor([["abcdefg".index(c) for c in row] for row in ("aabc", "aade", "ffgg", "ffgg")])
    pos, code = layout.pack(codes[None], torch.tensor([[[0, 1], [0, 0]]]))
    n = int(layout.lengths(pos)[0])
    said = {name: re.findall(r"[\w-]+", row)[:n] for name, row in re.findall(
        r"(position|content) +([\w -]+)", of_variant.__doc__.split("Example")[1])}
    assert said["position"] == [str(p) for p in pos[0, :n].tolist()]
    assert said["content"] == ["-1" if c < 0 else "abcdefg"[c] for c in code[0, :n].tolist()]
    tables = dict(re.findall(r"(grain|region|first_id) +([\d ]+)", of_variant.__doc__))
    assert all(getattr(layout, name).tolist() == [int(x) for x in row.split()] for name, row in tables.items())
    follows = re.findall(r"(-?\d+) -> (\d+(?: \d+)*)", of_variant.legal.__doc__)
    assert len(tables) == 3 and len(follows) == 7
    for prev, ids in follows:                                                # grains: the final ones, as in training
        may = layout.legal(torch.tensor([int(prev)]), layout.grains(pos))[0]
        ids = [int(each) for each in ids.split()]
        assert (may == may[ids[0]]).nonzero().flatten().tolist() == ids


def test_a_variant_is_solved_by_its_reference_alone(tmp_path):
    """The published functions get no points of any exercise, not even a part."""
    folder = write(tmp_path / "in", {"this.py": project(["dq.py"], 5)["dq.py"], "public.py": SOURCE})
    numbers, environment = ([1, 4, 7, 8, 10, 15], {}) if not ALL else (range(1, 18), dict(DQ_COURSE_HIDDEN="3"))
    kit("grade", folder, "--variant", 5, "--only", *numbers, "--json", tmp_path / "all.json", **environment)
    got, rows = points(tmp_path / "all.json")
    assert got["this"] == {function: POINTS[function] for function in got["this"]}, rows["this"]
    assert set(got["public"].values()) == {0}, rows["public"]


# ------------------------------------------------------------------------------------------------
# The open part


def test_the_leaderboard_ranks_by_nats_and_lets_nobody_look_ahead(run, checker, tmp_path, capsys):
    """A checkpoint; two with a dq.py of their own; three whose logits want to know more; none; a damaged one."""
    answers = {
        "same": "return _1, _2", "other": "return _1, 3 * _2 - _2.mean(-1, keepdim=True)",
        "peeks": "return _1, _2 + 9 * F.one_hot(code.clamp(min=0), _2.shape[-1])",
        "peeks-where": "return _1.clamp(min=-9) + 9 * F.one_hot(pos, _1.shape[-1]), _2",
        "far": "return _1, _2 + pos[:, -1:, None].float() * _2.flip(-1)"}
    saved, folder = (run / "transformer.pt").read_bytes(), tmp_path / "students"
    write(folder, {f"{name}/transformer.pt": saved for name in ("plain", *answers)})
    write(folder, {"damaged/transformer.pt": "rubbish", "none/notes.txt": ""})
    for name, answer in answers.items():
        edit = [("dq", "DQTransformer.logits", "return _1, _2", answer)]
        write(folder, {f"{name}/dq.py": variants.applied(dict(dq=SOURCE), edit)["dq"]})
    parts = [tmp_path / "public.pt", tmp_path / "private.pt"]
    leaderboard.split(run / "codes.pt", *parts)
    whole, public, private = ([str(each) for each in dq.load_checkpoint(path, "dq-codes")["held_out"]["codes"]]
                              for path in (run / "codes.pt", *parts))
    assert private and sorted(public + private) == sorted(whole)
    with pytest.raises(dq.UserError, match="public.pt exists"):              # another half would rank
        leaderboard.split(run / "codes.pt", *parts)
    capsys.readouterr()
    leaderboard.rank(folder, parts[1])
    printed, errors = capsys.readouterr()
    rows = {line.split()[1]: line for line in printed.splitlines()[1:]}
    assert rows.keys() == {"plain", "damaged", "none", *answers} and not errors
    assert "no such file" in rows["none"] and "not a checkpoint" in rows["damaged"]
    nats = {name: float(rows[name].split()[2]) for name in ("plain", *answers)}
    assert nats["plain"] == pytest.approx(nats["same"], abs=0.01) and nats["other"] != nats["plain"]
    assert min(nats.values()) > nats["plain"] - 2                            # who knew the contents would have 3
    assert sorted(nats.values()) == [nats[line.split()[1]] for line in printed.splitlines()[1:7]]


def test_the_leaderboard_of_a_variant(run, tmp_path):
    """A checkpoint of the variant's own layout, which the published dq.py refuses."""
    (tmp_path / "ann").mkdir()
    checkpoint, path = dq.torch.load(run / "transformer.pt", weights_only=True), tmp_path / "ann" / "transformer.pt"
    layout = executed(project(["dq.py"], 5)["dq.py"], "variant").Layout
    dq.torch.save(checkpoint | dict(layout=layout.name), path)
    with pytest.raises(dq.UserError):
        dq.load_checkpoint(path, "dq-transformer")
    printed, errors = kit("leaderboard", tmp_path, "--codes", run / "codes.pt", "--variant", 5)
    assert "look-up table" in errors and re.search(r"^ 1 ann +\d+\.\d\d", printed, re.M)
