"""tools/mutants.py: its table fits the sources, and in a tiny project it finds which mutants are killed."""
import ast
import os

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


def test_the_table_fits():
    """Every mutant can be made, and its test exists. A changed line is an error in CI only."""
    assert len({mutant.name for mutant in mutants.MUTANTS}) == len(mutants.MUTANTS) >= 120
    found = mutants.misfits(mutants.MUTANTS, ROOT)
    assert not found or os.environ.get("CI", "").lower() not in ("1", "true"), found
    if found:
        pytest.skip(f"{len(found)} of {len(mutants.MUTANTS)} mutants do not fit the sources; "
                    "python tests/tools/mutants.py --fit lists them")


def test_a_reworded_line_is_an_error_in_ci_alone(monkeypatch, capsys):
    reworded = Mutant("reworded", "no_such_name(x)", "x", "test_vae.py")
    monkeypatch.setattr(mutants, "MUTANTS", [*mutants.MUTANTS[:120], reworded])
    for ci, end in (("", pytest.skip.Exception), ("true", AssertionError)):
        monkeypatch.setenv("CI", ci)
        with pytest.raises(end, match="1 of 121 mutants do not fit" if not ci else "reworded"):
            test_the_table_fits()
    assert mutants.main(["--fit"]) == 1
    assert capsys.readouterr().out.splitlines() == ["reworded: 'no_such_name(x)' fits 0 places", "120 of 121 fit"]


@pytest.fixture
def project(tmp_path):
    root = tmp_path / "project"
    (root / "tests").mkdir(parents=True)
    (root / "thing.py").write_text(GOOD)
    (root / "pyproject.toml").write_text('[tool.pytest.ini_options]\npythonpath = ["."]\n')
    (root / "tests/test_thing.py").write_text(TEST)
    return root


def verdicts(project, capsys, *rows):
    """-> the number of mutants that are not killed, {name: verdict}"""
    left = mutants.try_all([Mutant(*row) for row in rows], project, jobs=2)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith(tuple(row[0] for row in rows))]
    assert (project / "thing.py").read_text() == GOOD
    return left, {line.split(" s  ")[1]: line[:9].strip() for line in lines if " s  " in line}


def test_killed_and_surviving_mutants(project, capsys):
    found = verdicts(project, capsys,
                     ("thrice", "2 * x", "3 * x", "test_thing.py::test_twice"),
                     ("thrice, with a weak test", "2 * x", "3 * x", "test_thing.py::test_zero"),
                     ("an unknown name", "2 * x", "y", "test_thing.py"))
    assert found == (1, {"thrice": "killed", "thrice, with a weak test": "SURVIVED", "an unknown name": "killed"})


def test_an_import_error_kills_no_mutant(project, capsys):
    found = verdicts(project, capsys, ("at import", "def twice(x): ...", "raise ValueError", "test_thing.py"))
    assert found == (1, {"at import": "NO TEST"})


def test_mutants_that_cannot_be_made_are_reported(project, capsys):
    test = "test_thing.py::test_twice"
    rows = [Mutant("nowhere", "3 * x", "x", test), Mutant("often", "x", "2 * x", test),
            Mutant("no Python", "2 * x", "2 *", test), Mutant("no test", "2 * x", "x", "test_thing.py::test_thrice")]
    (project / "thing.py").write_text("def twice(x):\n    x = x\n    return 2 * x\n")
    assert mutants.try_all(rows, project, jobs=1) == 4
    nowhere, often, no_python, no_test = capsys.readouterr().out.splitlines()
    assert nowhere.endswith("nowhere: '3 * x' fits 0 places")
    assert "'x' fits 3 places: thing.twice, thing.twice, thing.twice" in often
    assert no_python.endswith("'2 *' is not valid Python")
    assert no_test.endswith("there is no test test_thing.py::test_thrice")


SOURCE = """
def f(x, scale=0.5):
    # a comment
    y = g(x, (x + 1),
          sides=(1, 2), name='x')
    if y:
        y = h(x)
    else:
        return [k ** 2 for k in range(3)]
    return y[:, -1] + scale


class Net:
    def f(self):
        return g(1.0)
"""


@pytest.mark.parametrize("old, new, where, line, changed", [
    ("(x) + 1", "x", "", "y = g(x, x + 1, sides=(1, 2), name='x')", "y = g(x, x, sides=(1, 2), name='x')"),
    ('g(x, x + 1, name="x", sides=(1, 2))', "0", "", "y = g(x, x + 1, sides=(1, 2), name='x')", "y = 0"),
    ("g(..., name='x')", "h(..., name='y')", "", "y = g(x, x + 1, sides=(1, 2), name='x')",
     "y = h(x, x + 1, sides=(1, 2), name='y')"),
    ("g(x, ...)", "g(0, ...)", "", "y = g(x, x + 1, sides=(1, 2), name='x')",
     "y = g(0, x + 1, sides=(1, 2), name='x')"),
    ("sides(1, 2)", "", "", None, None),
    ("(1, ...)", "(0, ...)", "", "y = g(x, x + 1, sides=(1, 2), name='x')", "y = g(x, x + 1, sides=(0, 2), name='x')"),
    ("0.5", "1.5", "", "def f(x, scale=0.5):", "def f(x, scale=1.5):"),
    ("if y: ...\nelse: ...", "if not y: ...\nelse: ...", "", "if y:", "if not y:"),
    ("y = h(x)", "", "", "y = h(x)", "pass"),
    ("[... for k in range(3)]", "[... for k in range(4)]", "", "return [k ** 2 for k in range(3)]",
     "return [k ** 2 for k in range(4)]"),
    ("(...)[:, -1] + ...", "(...)[:, 0] - ...", "", "return y[:, -1] + scale", "return y[:, 0] - scale"),
    ("g(...)", "h(...)", "Net.f", "return g(1.0)", "return h(1.0)"),
    ("g(...)", "h(...)", "other.Net", "return g(1.0)", "return h(1.0)"),
    ("g(...)", "h(...)", "", None, None),
    ("g(1)", "h(1)", "", None, None),
])
def test_where_a_fragment_fits(tmp_path, old, new, where, line, changed):
    """Syntax trees are compared, not text, in all files. `...` matches any code."""
    (tmp_path / "other.py").write_text(SOURCE)
    (tmp_path / "thing.py").write_text(GOOD)
    mutant, whole = Mutant("", old, new, "", where), ast.unparse(ast.parse(SOURCE))
    assert (mutants.fault(mutant, mutants.Sources(tmp_path)) is None) == (line is not None)
    if line:
        mutants.make(mutant, tmp_path)
        assert whole.count(line) == 1
        assert (tmp_path / "other.py").read_text() == whole.replace(line, changed)
        assert (tmp_path / "thing.py").read_text() == GOOD


def test_tests_must_pass_without_a_mutant(project, capsys):
    (project / "tests/test_thing.py").write_text(TEST.replace("== 6", "== 7"))
    mutant = Mutant("thrice", "2 * x", "3 * x", "test_thing.py::test_twice")
    assert mutants.try_all([mutant], project, jobs=1) == 1
    output = capsys.readouterr().out
    assert output.startswith("FAILS") and "thrice" not in output


def test_mutants_can_be_selected_by_name(capsys):
    assert mutants.main(["--list", "--only", "no second SiLU"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "no second SiLU"
    with pytest.raises(SystemExit):
        mutants.main(["--only", "no such mutant"])
    assert "no mutant is called no such mutant" in capsys.readouterr().err
