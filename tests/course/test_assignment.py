"""The course: stubs get no points, right solutions in any style all, wrong ones lose their exercise, cheats get none.

    the exercises          test_every_exercise_is_complete, test_our_solution_passes_though_later_...
    wrong and right ones   test_wrong_solutions_and_the_stub_fail, test_many_submissions_in_one_command
    the students' copy     test_the_students_copy, test_a_copy_grades_by_the_same_rule, test_what_comes_along
    messages               test_every_assert_of_a_graded_test_has_a_message
    variants               test_a_variant_is_solved_by_its_reference_alone, test_every_edit_is_found_once
    Gradescope             test_results_agree_with_gradescopes_specification
    the open part          test_the_leaderboard_ranks_by_nats_and_finds_who_looks_ahead
"""
import ast
import contextlib
import csv
import inspect
import json
import math
import os
import zipfile

import pytest

import cheats
import checks
import dq
import right_solutions
import variants
from assignment import ROOT, executed, project
from exercises import (BONUS, EXERCISES, SOURCES, TESTS, Assembly, find, graded_tests, is_stub, paths, replaced, stub,
                       text_of)
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


def run_tests(e, skip=()):
    checks.torch = dq.torch
    for test in e.tests.split():
        if test not in skip:
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
    assert "What counts" in done.stdout


@pytest.mark.parametrize("number", range(len(EXERCISES)), ids=[e.function for e in EXERCISES])
def test_our_solution_passes_though_later_exercises_are_not_written(number):
    with in_place({e.function: STUBS[e.function] for e in EXERCISES[number + 1:]}):
        run_tests(EXERCISES[number], skip=["test_every_legal_walk_is_a_complete_tiling"])  # long, and no other one


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
    assert "What counts" in done.stdout
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
        "assignment", "exercises", "checks", "worker", "handed_out"))}
    assert sum(name.startswith("handout/") for name in files) == 2 * 17
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
    assert len(right_solutions.RIGHT) >= 12 and len(cheats.CHEATS) == len(EXERCISES)
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
                       "cheats/my_dq.py": cheats.submission(SOURCE), "book.ipynb": json.dumps(dict(cells=cells)),
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
    got = {name: {each["function"]: each["points"] for each in row["exercises"]} for name, row in rows.items()}
    assert got["ours.py"] == got["right.py"] == points, rows["right.py"]
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
# Variants


def test_every_edit_is_found_once():
    """Of every choice; and at least eight exercises vary."""
    assert len({function for _, functions, _ in variants.VARIATIONS for function in functions}) >= 8
    names = {file for _, _, choices in variants.VARIATIONS for choice in choices for file, _, _ in choice}
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in names}
    for name, functions, choices in variants.VARIATIONS:
        for choice in choices:
            now = dict(texts)
            for file, old, new in choice:
                assert now[file].count(old) == 1, f"{name}: not once in {file}: {old}"
                now[file] = now[file].replace(old, new)
    for seed in range(8):
        variants.edited(texts, seed, hidden=0)
    with pytest.raises(ValueError, match="not once"):
        variants.edited(dict(texts, **{"dq.py": ""}), 0)


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
    words = space["Layout"].legal.__doc__.split("may be followed by")[1].split("alone.")[0].split(";")
    followed = [[int(word) for word in each.replace(",", " ").split() if word.isdecimal()] for each in words]
    grains = layout.grains(pos)                                              # as in training: the final ones
    for start, *wanted in [[0, *followed[0]], [*followed[1]], [followed[2][0], followed[2][-1]]]:
        may = layout.legal(dq.torch.tensor([start]), grains)[0].nonzero().flatten().tolist()
        assert set(may) == set(wanted)


def test_a_variant_is_solved_by_its_reference_alone(tmp_path):
    seed, other = 5, 2
    functions = [function for _, names, _ in variants.VARIATIONS for function in names if function not in BONUS]
    functions = functions if ALL else functions[:8]
    for name, of in (("this.py", seed), ("other.py", other)):
        (tmp_path / name).write_text(project(["dq.py"], of)["dq.py"], encoding="utf-8")
    (tmp_path / "public.py").write_text(SOURCE, encoding="utf-8")
    numbers = [number for number, e in enumerate(EXERCISES, 1) if e.function in functions]
    done = kit("grade", tmp_path, "--variant", seed, "--only", *numbers, "--json", tmp_path / "all.json")
    assert done.returncode == 0, done.stderr
    got = {row["file"]: {each["function"]: each["points"] for each in row["exercises"]}
           for row in json.loads((tmp_path / "all.json").read_text())["submissions"]}
    assert got["this.py"] == {function: POINTS[function] for function in got["this.py"]}
    passed = [function for function in functions if got["public.py"][function] == POINTS[function]]
    assert len(numbers) >= 8 and not passed
    pairs = zip(variants.chosen(seed), variants.chosen(other), variants.VARIATIONS)
    differ = [function for a, b, (_, names, _) in pairs if a != b for function in names if function in functions]
    assert len(differ) >= (4 if ALL else 2) and all(got["other.py"][function] < POINTS[function] for function in differ)


VISIBILITY = {"hidden", "after_due_date", "after_published", "visible"}


def test_results_agree_with_gradescopes_specification(tmp_path):
    """Its fields, by name; hidden cases are seen after the due date."""
    done = kit("make", "--autograder", tmp_path / "autograder.zip")
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(tmp_path / "autograder.zip") as archive:
        archive.extractall(tmp_path / "source")
        modes = {info.filename: info.external_attr >> 16 for info in archive.infolist()}
        run = archive.read("run_autograder").decode()
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
        "same": "return position.masked_fill(~legal, -math.inf), content",
        "other": "return position.masked_fill(~legal, -math.inf), 3 * content - content.mean(-1, keepdim=True)",
        "peeks": "return position, content + 9 * F.one_hot(code.clamp(min=0), content.shape[-1])",
        "peeks-where": "return position + 9 * F.one_hot(pos, position.shape[-1]), content",
        "far": "return position, content + pos[:, -1:, None].float() * content.flip(-1)"}
    ends = "return position.masked_fill(~legal, -math.inf), content"
    assert SOURCE.count(ends) == 1
    for name in ("plain", "damaged", "none", *answers):
        (tmp_path / name).mkdir()
        if name != "none":
            (tmp_path / name / "transformer.pt").write_bytes((run / "transformer.pt").read_bytes())
        if name in answers:
            (tmp_path / name / "dq.py").write_text(SOURCE.replace(ends, answers[name]), encoding="utf-8")
    (tmp_path / "damaged" / "transformer.pt").write_bytes(b"rubbish")
    done = kit("leaderboard", tmp_path, "--codes", run / "codes.pt")
    assert done.returncode == 0, done.stderr
    rows = {line.split()[1]: line for line in done.stdout.splitlines()[1:]}
    assert rows.keys() == {"plain", "damaged", "none", *answers}
    assert "depend on its content" in rows["peeks"] and "depend on its position" in rows["peeks-where"]
    assert "later" in rows["far"] and "no such file" in rows["none"] and "not a checkpoint" in rows["damaged"]
    nats = {name: float(rows[name].split()[2]) for name in ("plain", "same", "other")}
    assert nats["plain"] == pytest.approx(nats["same"], abs=0.01) and nats["other"] != nats["plain"]
    assert [line.split()[1] for line in done.stdout.splitlines()[1:4]] == sorted(nats, key=nats.get) or (
        nats["plain"] == nats["same"])
