"""tools/mutants.py: its table fits the sources, and it tells what is killed from what survives, in a tiny project."""
import ast

import pytest

import mutants
from conftest import ROOT
from mutants import Mutant

GOOD = "def twice(x):\n    return 2 * x\n"
TEST = """import thing

def test_twice():
    assert thing.twice(3) == 6

def test_zero():
    assert thing.twice(0) == 0
"""


def test_every_mutant_can_be_made():
    """What it changes stands in the source once, and the test that shall fail is there."""
    assert len({mutant.name for mutant in mutants.MUTANTS}) == len(mutants.MUTANTS) >= 120
    assert {mutant.file for mutant in mutants.MUTANTS} == {path.name for path in ROOT.glob("*.py")}
    assert [reason for mutant in mutants.MUTANTS if (reason := mutants.fault(mutant, ROOT))] == []
    tests = {}
    for mutant in mutants.MUTANTS:
        file, _, name = mutant.test.partition("::")
        if file not in tests:
            tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
            tests[file] = {each.name for each in ast.walk(tree) if isinstance(each, ast.FunctionDef)}
        assert not name or name in tests[file], mutant.name


@pytest.fixture
def project(tmp_path):
    root = tmp_path / "project"
    (root / "tests").mkdir(parents=True)
    (root / "thing.py").write_text(GOOD)
    (root / "pyproject.toml").write_text('[tool.pytest.ini_options]\npythonpath = ["."]\n')
    (root / "tests/test_thing.py").write_text(TEST)
    return root


def verdicts(project, capsys, *rows):
    """-> how many are left, {name: verdict}"""
    left = mutants.try_all([Mutant(name, "thing.py", old, new, test) for name, old, new, test in rows], project, jobs=2)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith(tuple(row[0] for row in rows))]
    assert (project / "thing.py").read_text() == GOOD
    return left, {line.split(" s  ")[1]: line[:9].strip() for line in lines if " s  " in line}


def test_what_is_killed_and_what_survives(project, capsys):
    found = verdicts(project, capsys,
                     ("thrice", "2 * x", "3 * x", "test_thing.py::test_twice"),
                     ("thrice, with a weak test", "2 * x", "3 * x", "test_thing.py::test_zero"),
                     ("an unknown name", "2 * x", "y", "test_thing.py"))
    assert found == (1, {"thrice": "killed", "thrice, with a weak test": "SURVIVED", "an unknown name": "killed"})


def test_what_can_not_be_read_kills_nothing(project, capsys):
    found = verdicts(project, capsys,
                     ("at import", "def twice(x):", "raise ValueError\ndef twice(x):", "test_thing.py"),
                     ("no Python", "2 * x", "2 *", "test_thing.py::test_twice"))
    assert found == (2, {"at import": "NO TEST", "no Python": "NO TEST"})


def test_what_can_not_be_made_is_said_in_one_line(project, capsys):
    rows = [Mutant("nowhere", "thing.py", "3 * x", "", "test_thing.py"),
            Mutant("twice", "thing.py", "x", "", "test_thing.py")]
    assert mutants.try_all(rows, project, jobs=1) == 2
    nowhere, twice = capsys.readouterr().out.splitlines()
    assert nowhere.endswith("nowhere: '3 * x' stands 0 times in thing.py") and "'x' stands 2 times" in twice


def test_tests_that_fail_without_a_slip_say_nothing(project, capsys):
    (project / "tests/test_thing.py").write_text(TEST.replace("== 6", "== 7"))
    mutant = Mutant("thrice", "thing.py", "2 * x", "3 * x", "test_thing.py::test_twice")
    assert mutants.try_all([mutant], project, jobs=1) == 1
    said = capsys.readouterr().out
    assert said.startswith("FAILS") and "thrice" not in said


def test_only_some_by_name(capsys):
    assert mutants.main(["--list", "--only", "no second SiLU"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "no second SiLU"
    with pytest.raises(SystemExit):
        mutants.main(["--only", "no such slip"])
    assert "no mutant is called no such slip" in capsys.readouterr().err
