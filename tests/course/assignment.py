"""The course: dq.py with holes to fill, and a grader.

    python tests/course/assignment.py list                     the exercises, in the order in which the file reads
    python tests/course/assignment.py make DIR                 a copy of the project for students, with the holes
    python tests/course/assignment.py grade FILE_OR_FOLDER     a table of points; --only 3 7: these exercises alone
    python tests/course/assignment.py leaderboard FOLDER       the open part: held-out nats of students' checkpoints

A hole keeps the signature, the docstring and the comments of its function, most of them about the shape of a variable
of our solution. Students fill the holes in order: the tests of an exercise need those before it and none after.
The minutes that are listed are a student's; the tests of an exercise take seconds, without a GPU.

Each exercise is graded alone: that one function of the student's file is put into a copy of this project, together with
what is new in the file (imports, helper functions, classes, methods and attributes), and the tests of that exercise ask
it for answers, in a process of its own under limits of time and memory. What replaces something that the file came with
does not count. In a student's copy the same rule holds; the exercises before it are then the student's own.
"""
import argparse
import csv
import json
import os
import secrets
import shutil
import sys
import tempfile
import time
import types
import zipfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import checks
from exercises import (BONUS, EXERCISES, RULES, SOURCES, TESTS, Assembly, binding, graded_tests, paths, read,
                       with_holes)

ROOT = Path(__file__).resolve().parents[2]
COURSE = Path("tests") / "course"
KIT = ["assignment.py", "exercises.py", "checks.py", "worker.py", "test_speed.py"]
HANDED_OUT = ROOT / COURSE / "handed_out.py"                                 # dq.py as it was, in a student's copy
IS_COPY = HANDED_OUT.exists()
HANDOUT = "tests/course/handout.py"
HIDDEN = "DQ_COURSE_HIDDEN"                                                  # environment: the seed of hidden cases


def show():
    for number, e in enumerate(EXERCISES, 1):
        parts = [f"        # {part} points" for part in e.parts] or [""] * len(paths(e))
        tests = [path + part for path, part in zip(paths(e), parts)]
        print(f"{number:2}  {e.name}: {e.function}, {e.points} points, {e.minutes} minutes", f"learned: {e.learned}",
              "\n             ".join(["tests:   " + tests[0], *tests[1:]]), sep="\n    ")
    print(f"\n{RULES}")


# ------------------------------------------------------------------------------------------------
# Copies


def write_project(folder, variant=None, hidden=None):
    """Sources, the tests of the exercises and the kit, in an empty folder; with the edits of a variant, if any."""
    names = [*SOURCES, *(f"tests/{name}" for name in TESTS), *(f"tests/course/{name}" for name in KIT)]
    texts = project(names, variant, hidden)
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def project(names, variant=None, hidden=None):
    """{name: text} of files of the project, as a variant has them; of the tests, those of the exercises."""
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in names}
    if variant is not None or hidden is not None:
        import variants
        texts = variants.edited(texts, variant, hidden)
    return texts if IS_COPY else graded_tests(texts)


def executed(text, name):
    """A module of this text."""
    module = types.ModuleType(name)
    sys.modules[name] = module                                               # dataclasses look there
    exec(compile(text, name, "exec"), vars(module))
    return module


def make(folder, variant):
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        sys.exit(f"{folder} exists and is not an empty folder")
    try:
        write_project(folder, variant)
        full = (folder / "dq.py").read_text(encoding="utf-8")
        pages = executed(project([HANDOUT], variant)[HANDOUT], "handout")
        for name in ("dq.py", COURSE / "handed_out.py"):
            (folder / name).write_text(with_holes(full), encoding="utf-8")
        for name in ("pyproject.toml", "LICENSE", ".gitignore"):
            shutil.copy(ROOT / name, folder)
        scripts, name = (folder / "common.py").read_text(encoding="utf-8"), "except (dq.UserError, OSError) as error:"
        if scripts.count(name) != 1:
            sys.exit("common.py has changed: a script of the copy could not say which exercise is missing")
        scripts = scripts.replace(name, "except (dq.UserError, OSError, NotImplementedError) as error:")
        (folder / "common.py").write_text(scripts, encoding="utf-8")
        pages.write(folder, full, space=vars(executed(full, "dq")))
    except OSError as error:
        sys.exit(f"could not write {folder}: {error}")
    print(f"{folder}/dq.py has {len(EXERCISES)} functions to fill; README.md says how to begin, "
          f"python tests/course/assignment.py list names them in order.\n{RULES}")
    if variant is not None:
        print(f"grade it with --variant {variant}; the published dq.py does not solve it")


SETUP = """\
#!/usr/bin/env bash
set -e
apt-get update -qq && apt-get install -qq -y python3 python3-venv
python3 -m venv /autograder/venv
/autograder/venv/bin/pip install numpy pillow tqdm pytest
/autograder/venv/bin/pip install torch --index-url https://download.pytorch.org/whl/cpu
"""
RUN = """\
#!/usr/bin/env bash
export {hidden}={seed}
cd /autograder/source
/autograder/venv/bin/python tests/course/assignment.py grade /autograder/submission{variant} \\
    --gradescope /autograder/results/results.json
"""


def make_autograder(path, variant):
    """What Gradescope takes: a zip with setup.sh, run_autograder and, beside them, the project with its answers."""
    names = [*SOURCES, "pyproject.toml", *(f"tests/{name}" for name in TESTS),
             *(f"tests/course/{name}" for name in [*KIT, "variants.py"])]
    run = RUN.format(hidden=HIDDEN, seed=secrets.randbelow(2 ** 31),
                     variant="" if variant is None else f" --variant {variant}")
    try:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in names:
                archive.write(ROOT / name, name)
            for name, text in (("setup.sh", SETUP), ("run_autograder", run)):
                info = zipfile.ZipInfo(name, time.localtime()[:6])
                info.external_attr = 0o755 << 16                             # so that it may be executed
                archive.writestr(info, text)
    except OSError as error:
        sys.exit(f"could not write {path}: {error}")
    print(f"{path} is for Gradescope; it holds the answers and the seed of the hidden cases, so don't hand it out")


# ------------------------------------------------------------------------------------------------
# Grading


@dataclass
class Submission:
    """A file, what could not be read of it, and for each exercise what its tests said."""
    name: str
    text: str = ""
    fault: str = ""
    unused: list = field(default_factory=list)
    visible: dict = field(default_factory=dict)                              # number: {test: fault or ""}
    hidden: dict = field(default_factory=dict)

    def points(self, number):
        """-> points, of how many, what is wrong"""
        parts = self.parts(number)
        return sum(part[1] for part in parts), sum(part[2] for part in parts), "; ".join(
            dict.fromkeys(part[3] for part in parts if part[3]))

    def parts(self, number):
        """-> rows: "" or "hidden", points, of how many, what is wrong"""
        e = EXERCISES[number]
        of_hidden = (e.points + 2) // 4 if number in self.hidden else 0
        rest, results = e.points - of_hidden, self.visible[number]
        faults = [f"{test.rpartition('::')[2]}: {fault}" if len(results) > 1 and fault != "missing" else fault
                  for test, fault in results.items() if fault]
        if e.parts:
            got = sum(part for part, fault in zip(e.parts, results.values()) if not fault) * rest / e.points
        else:
            got = 0 if faults else rest
        if len(set(results.values())) == 1:
            faults = [fault for fault in results.values()][:1]
        rows = [("", got, rest, "; ".join(faults) if any(faults) else "")]
        if of_hidden:
            missed = [test.rpartition("::")[2] for test, fault in self.hidden[number].items() if fault]
            rows.append(("hidden", 0 if missed else of_hidden, of_hidden,
                         f"hidden cases of {', '.join(missed)}" if missed else ""))
        return rows

    def total(self, numbers, bonus):
        """-> points and of how many, of the exercises that are a bonus or of the others"""
        rows = [self.points(number) for number in numbers if (EXERCISES[number].function in BONUS) == bonus]
        return sum(row[0] for row in rows), sum(row[1] for row in rows)


def file_in(folder):
    """The submission in a student's folder, or None."""
    named = sorted(folder.rglob("dq.py"), key=lambda path: len(path.parts))
    found = named or [path for path in sorted(folder.rglob("*")) if path.suffix in (".py", ".ipynb")]
    return found[0] if named or len(found) == 1 else None


def collect(path):
    """-> [(name, file or None)]: a file; a student's folder; or a folder of files and of students' folders"""
    if not path.is_dir():
        return [(str(path), path)]
    if (path / "dq.py").exists():
        return [(str(path / "dq.py"), path / "dq.py")]
    found = []
    for each in sorted(path.iterdir()):
        if each.is_dir() and not each.name.startswith((".", "__")):
            file = file_in(each)
            found.append((str(file.relative_to(path)) if file else each.name, file))
        elif each.suffix in (".py", ".ipynb"):
            found.append((each.name, each))
    return found


def load(name, file):
    try:
        if file is None:
            return Submission(name, fault="holds no dq.py, and not one other .py or .ipynb file")
        return Submission(name, read(file))
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, RecursionError, MemoryError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Submission(name, fault=f"can't be read: {reason}")


def run_tests(submissions, numbers, folder, limit, seed, kind):
    """The tests of these exercises, in as many processes as there are cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    tasks = []
    for each in submissions:
        for number in numbers:
            fault = checks.unwritten(each.text, EXERCISES[number].function)
            if fault:
                getattr(each, kind)[number] = dict.fromkeys(EXERCISES[number].tests.split(), fault)
            else:
                tasks.append((each, number))
    if not tasks:
        return
    size, how = min(cores, -(-len(tasks) // 4)), "spawn"                     # each starts a process that imports torch
    if checks.Nursery.forks:
        import torch  # noqa: F401  (once for all of them)
        checks.nursery, how = checks.nursery or checks.Nursery(), "fork"
    with ProcessPoolExecutor(size, get_context(how), checks.prepare, (folder, IS_COPY)) as pool:
        futures = [pool.submit(checks.check, number, each.text, limit, seed) for each, number in tasks]
        for (each, number), future in zip(tasks, futures):
            try:
                getattr(each, kind)[number] = future.result()
            except Exception as error:                                       # a fault of ours costs one cell
                fault = f"the grader failed ({type(error).__name__}: {error}); please report this"
                getattr(each, kind)[number] = dict.fromkeys(EXERCISES[number].tests.split(), fault)


def grade(args):
    os.environ["OMP_NUM_THREADS"] = "1"
    start, numbers = time.monotonic(), [number - 1 for number in args.only]
    submissions = [load(*each) for path in args.paths for each in collect(path)]
    if not submissions and args.gradescope:                                  # the student shall read it there
        submissions = [Submission(str(args.paths[0]), fault="holds no .py or .ipynb file")]
    if not submissions:
        sys.exit(f"no .py or .ipynb file in {', '.join(map(str, args.paths))}")
    good = [each for each in submissions if not each.fault]
    base = HANDED_OUT.read_text(encoding="utf-8") if IS_COPY else project(["dq.py"], args.variant)["dq.py"]
    hidden = os.environ.get(HIDDEN)
    for each in good:                                                        # before anything of it is run
        tree = checks.parsed(each.text)
        functions = [e.function for e in EXERCISES if binding(tree, e.function) is not None]
        assembly = Assembly(base, each.text, functions)
        each.unused = assembly.unused
        if IS_COPY:
            with tempfile.TemporaryDirectory() as folder:
                write_project(Path(folder))
                (Path(folder) / "dq.py").write_text(assembly.text, encoding="utf-8")
                run_tests([each], numbers, Path(folder), args.limit, 0, "visible")
    if good and not IS_COPY:
        for kind, seed in [("visible", None)] + ([("hidden", int(hidden))] if hidden else []):
            with tempfile.TemporaryDirectory() as folder:
                write_project(Path(folder), args.variant, seed)
                run_tests(good, numbers, Path(folder), args.limit, seed or 0, kind)
    if len(submissions) == 1:
        show_one(submissions[0], numbers)
    else:
        show_many(submissions, numbers, time.monotonic() - start)
    for path, write in ((args.csv, write_csv), (args.json, write_json), (args.gradescope, write_gradescope)):
        if path:
            try:
                write(path, submissions, numbers, time.monotonic() - start)
            except OSError as error:
                sys.exit(f"could not write {path}: {error}")
    if not good:
        sys.exit(1)


def show_one(each, numbers):
    if each.fault:
        return print(f"0 points: {each.name} {each.fault}", file=sys.stderr)
    print(each.name)
    for number in numbers:
        got, most, fault = each.points(number)
        print(f"{number + 1:2}  {EXERCISES[number].function:22} {got:4g} / {most:2}  {fault}"[:400].rstrip())
    for title, bonus in (("all", False), ("bonus", True)):
        got, most = each.total(numbers, bonus)
        if most:
            print(f"    {title:22} {got:4g} / {most}")
    if each.unused:
        print(f"changed, but not an exercise, so not used: {', '.join(each.unused)}")


def show_many(submissions, numbers, seconds):
    width = max(len(each.name) for each in submissions)
    print(f"{'':{width}} " + "".join(f"{number + 1:4}" for number in numbers) + "    all  bonus")
    for each in submissions:
        if each.fault:
            print(f"{each.name:{width}}   {each.fault}")
            continue
        cells = "".join(f"{each.points(number)[0]:4g}" for number in numbers)
        print(f"{each.name:{width}} {cells} {each.total(numbers, False)[0]:6g} {each.total(numbers, True)[0]:6g}")
    bad = sum(bool(each.fault) for each in submissions)
    print(f"{len(submissions)} submissions, {bad} of them can't be read, {seconds:.0f} seconds")


def write_csv(path, submissions, numbers, seconds):
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["file", *(EXERCISES[number].function for number in numbers), "all", "bonus", "fault"])
        for each in submissions:
            cells = [""] * (len(numbers) + 2) if each.fault else [
                *(each.points(number)[0] for number in numbers),
                each.total(numbers, False)[0], each.total(numbers, True)[0]]
            table.writerow([each.name, *cells, each.fault])


def write_json(path, submissions, numbers, seconds):
    rows = []
    for each in submissions:
        row = dict(file=each.name, fault=each.fault, exercises=[])
        if not each.fault:
            for number in numbers:
                got, most, fault = each.points(number)
                row["exercises"].append(dict(number=number + 1, function=EXERCISES[number].function, points=got,
                                             of=most, fault=fault))
            row |= dict(all=each.total(numbers, False)[0], bonus=each.total(numbers, True)[0], unused=each.unused)
        rows.append(row)
    path.write_text(json.dumps(dict(seconds=round(seconds, 1), submissions=rows), indent=1), encoding="utf-8")


def write_gradescope(path, submissions, numbers, seconds):
    """results.json, by the names of Gradescope's autograder specification."""
    each, tests = submissions[0], []
    for number in [] if each.fault or len(submissions) > 1 else numbers:
        for kind, got, most, fault in each.parts(number):
            e = EXERCISES[number]
            title = f"{e.name}: {e.function}" + (", hidden cases" if kind else "")
            tests.append(dict(number=f"{number + 1}{'.2' if kind else '.1'}", name=title, score=got, max_score=most,
                              status="passed" if got == most else "failed", output=fault or "all tests pass",
                              output_format="text", visibility="after_due_date" if kind else "visible"))
    fault = each.fault and f"{Path(each.name).name} {each.fault}"
    if len(submissions) > 1:
        fault = "more than one file was handed in, and none is named dq.py"
    result = dict(score=sum(test["score"] for test in tests), execution_time=round(seconds, 1),
                  output=fault or RULES, output_format="text", visibility="visible", stdout_visibility="hidden",
                  tests=tests)
    path.write_text(json.dumps(result, indent=1), encoding="utf-8")


# ------------------------------------------------------------------------------------------------
# The command line


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands, numbers = parser.add_subparsers(dest="command", required=True), range(1, len(EXERCISES) + 1)
    commands.add_parser("list", help="the exercises and the rules")
    making = commands.add_parser("make", help="a copy for students")
    making.add_argument("folder", type=Path, metavar="DIR", nargs="?")
    making.add_argument("--autograder", type=Path, metavar="ZIP", help="also, or only, what Gradescope takes")
    grading = commands.add_parser("grade", help="a table of points")
    grading.add_argument("paths", type=Path, metavar="FILE_OR_FOLDER", nargs="+")
    grading.add_argument("--only", type=int, nargs="+", metavar="NUMBER", choices=numbers, default=numbers)
    grading.add_argument("--limit", type=float, default=30, help="seconds of computing for each exercise")
    grading.add_argument("--csv", type=Path, metavar="FILE", help="also write a row a student")
    grading.add_argument("--json", type=Path, metavar="FILE", help="also write points and faults of everyone")
    grading.add_argument("--gradescope", type=Path, metavar="FILE", help="also write results.json, of one submission")
    for command in (making, grading):
        command.add_argument("--variant", type=int, metavar="SEED",
                             help="a specification that the published dq.py does not solve")
    ranking = commands.add_parser("leaderboard", help="the open part")
    ranking.add_argument("folder", type=Path, metavar="FOLDER", help="a transformer.pt in each student's folder")
    ranking.add_argument("--codes", type=Path, metavar="FILE", default=Path("out/codes.pt"), help="those handed out")
    ranking.add_argument("--minutes", type=float, metavar="N",
                         help="first train each student's folder for N minutes with two threads, as its own scripts do")
    args = parser.parse_args()
    if IS_COPY and (args.command in ("make", "leaderboard") or getattr(args, "variant", None) is not None):
        parser.error("this is a student's copy; copies, variants and the leaderboard need the whole project")
    if args.command == "list":
        show()
    elif args.command == "make":
        if not (args.folder or args.autograder):
            parser.error("make needs DIR, --autograder ZIP, or both")
        if args.folder:
            make(args.folder, args.variant)
        if args.autograder:
            make_autograder(args.autograder, args.variant)
    elif args.command == "grade":
        grade(args)
    else:
        import leaderboard
        leaderboard.show(args.folder, args.codes, args.minutes)


if __name__ == "__main__":
    main()
