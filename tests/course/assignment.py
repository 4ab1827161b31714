"""The course: dq.py with functions to write, and a grader.

    python tests/course/assignment.py list                     the exercises, in the order in which the file reads
    python tests/course/assignment.py make DIR                 a copy of the project for students
    python tests/course/assignment.py grade FILE_OR_FOLDER     a table of points; --only 3 7: these exercises alone
    python tests/course/assignment.py split CODES              codes to hand out, and a private part that ranks
    python tests/course/assignment.py leaderboard FOLDER       the open part: nats of students' checkpoints

A student's copy keeps the signature, the docstring and the comments of each function that is to be written; most of
the comments give the shape of a variable of our solution. Students take the exercises in order: the tests of an
exercise need those before it and none after. The minutes are a student's; the tests take seconds, without a GPU.

The grader takes each exercise by itself. It puts that one function into a copy of this project, together with what is
new in the file (imports, helper functions, classes, methods and attributes). The tests of the exercise then ask the
function for answers, in a sandbox with limits of time and memory. A replacement of something that the file came with
does not count. The same rule holds in a student's copy, where the exercises before are the student's own.
"""
import argparse
import contextlib
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
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import checks
import fence
from exercises import (BONUS, EXERCISES, RULES, SECOND_WEEK, SOURCES, SPEED, TESTS, Assembly, binding, graded_tests,
                       paths, read, with_holes)

ROOT = Path(__file__).resolve().parents[2]
COURSE = Path("tests") / "course"
KIT = ["assignment.py", "exercises.py", "checks.py", "worker.py", "fence.py", "picture.py"]
VAE = COURSE / "vae.pt"                                                      # a small DQ-VAE, for pictures
HANDED_OUT = ROOT / COURSE / "handed_out.py"                                 # dq.py as it was, in a student's copy
IS_COPY = HANDED_OUT.exists()
HIDDEN = "DQ_COURSE_HIDDEN"                                                  # environment: the seed of hidden cases
CODE = (".py", ".ipynb")


def show():
    for number, e in enumerate(EXERCISES, 1):
        if number in (1, SECOND_WEEK):
            print(f"Week {1 + (number > 1)}")
        parts = [f"        # {part} points" for part in e.parts] or [""] * len(paths(e))
        tests = [path + part for path, part in zip(paths(e), parts)]
        print(f"{number:2}  {e.name}: {e.function}, {e.points} points, {e.minutes} minutes, difficulty {e.level} of 3"
              + (f", needs {', '.join(e.needs.split())}" if e.needs else ""), f"learned: {e.learned}",
              "\n             ".join(["tests:   " + tests[0], *tests[1:]]), sep="\n    ")
    print(f"\n{in_all()}\n\n{RULES}")


def in_all():
    points, minutes = ({bonus: sum(getattr(e, what) for e in EXERCISES if (e.function in BONUS) == bonus)
                        for bonus in (False, True)} for what in ("points", "minutes"))
    return (f"{points[False]} points in {minutes[False]} minutes of work, and a bonus of {points[True]} points in "
            f"{minutes[True]} minutes.")


# ------------------------------------------------------------------------------------------------
# Copies


def write_project(folder, variant=None, hidden=None):
    """Write sources, the tests of the exercises and the kit into an empty folder, edited for a variant, if any."""
    names = [*SOURCES, *(f"tests/{name}" for name in TESTS), *(f"tests/course/{name}" for name in KIT)]
    for name, text in project(names, variant, hidden).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def project(names, variant=None, hidden=None):
    """{name: text} of files of the project as a variant has them; of the tests, those of the exercises."""
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
    import handout
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        sys.exit(f"{folder} exists and is not an empty folder")
    try:
        write_project(folder, variant)
        full = (folder / "dq.py").read_text(encoding="utf-8")
        holes = with_holes(full)
        for name in ("dq.py", COURSE / "handed_out.py"):
            (folder / name).write_text(holes, encoding="utf-8")
        for name in ("pyproject.toml", "LICENSE", ".gitignore", VAE):
            shutil.copy(ROOT / name, folder / name)
        scripts, name = (folder / "common.py").read_text(encoding="utf-8"), "(dq.UserError, OSError)"
        if scripts.count(name) != 1:
            sys.exit("common.py has changed: a script of the copy could not say which exercise is missing")
        scripts = scripts.replace(name, "(dq.UserError, OSError, NotImplementedError)")
        (folder / "common.py").write_text(scripts, encoding="utf-8")
        handout.write(folder, full, in_all(), vars(executed(full, "dq")))
    except (OSError, ValueError) as error:
        sys.exit(f"could not write {folder}: {error}")
    print(f"{folder} is a copy with {len(EXERCISES)} functions to write; there, "
          f"python tests/course/assignment.py list names them in order.\n{RULES}")
    if variant is not None:
        print(f"grade it with --variant {variant}; the published dq.py does not solve it")


def write_for_staff(path, text, what):
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        sys.exit(f"could not write {path}: {error}")
    print(f"{path} is {what}; it holds answers, so don't hand it out")


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
chmod -R go-rwx /autograder/source /autograder/results /autograder/run_autograder
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
    points = sum(e.points for e in EXERCISES if e.function not in BONUS)
    print(f"{path} is for Gradescope; it holds the answers and the seed of the hidden cases, so don't hand it out.\n"
          f"Set the assignment's maximum to {points} points; the bonus comes on top of them.")


# ------------------------------------------------------------------------------------------------
# Grading


@dataclass
class Submission:
    """A file, the reason if it could not be read, and for each exercise what its tests said."""
    name: str
    student: str = ""
    text: str = ""
    fault: str = ""
    helpers: list = field(default_factory=list)                              # (name, text) of modules beside the file
    unused: list = field(default_factory=list)
    visible: dict = field(default_factory=dict)                              # number: {test: fault or ""}
    hidden: dict = field(default_factory=dict)
    seconds: float = 0.0                                                     # that grading it has taken

    def points(self, number):
        """-> points, maximum, what is wrong"""
        parts = self.parts(number)
        return sum(part[1] for part in parts), sum(part[2] for part in parts), "; ".join(
            dict.fromkeys(part[3] for part in parts if part[3]))

    def parts(self, number):
        """-> rows: "" or "hidden", points, maximum, what is wrong"""
        e = EXERCISES[number]
        of_hidden = (e.points + 2) // 4 if number in self.hidden else 0
        rest, results = e.points - of_hidden, self.visible[number]
        faults = [f"{test.rpartition('::')[2]}: {fault}" if len(results) > 1 and fault != "missing" else fault
                  for test, fault in results.items() if fault]
        if e.parts:
            right = not any(fault for test, fault in results.items() if SPEED not in test)
            counts = [not fault and (right or SPEED not in test) for test, fault in results.items()]
            got = sum(part for part, each in zip(e.parts, counts) if each) * rest / e.points
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
        """-> points and maximum, of the exercises that are a bonus or of the others"""
        rows = [self.points(number) for number in numbers if (EXERCISES[number].function in BONUS) == bonus]
        return sum(row[0] for row in rows), sum(row[1] for row in rows)

    def not_graded(self):
        """The exercises with which the grader failed."""
        return sorted({number for results in (self.visible, self.hidden) for number, each in results.items()
                       if any(fault.startswith(NOT_GRADED) for fault in each.values())})


NOT_GRADED = "not graded: "


def file_in(folder):
    """The submission in a student's folder, or None."""
    named = sorted(folder.rglob("dq.py"), key=lambda path: len(path.parts))
    found = named or [path for path in sorted(folder.rglob("*")) if path.suffix in CODE]
    return found[0] if named or len(found) == 1 else None


def collect(path, one=False):
    """-> [(name, student, file or None)]: a file; a student's folder; or a folder of files and of students' folders.

    one: the folder is one student's
    """
    if not path.is_dir():
        return [(str(path), path.parent.name if path.name == "dq.py" else path.stem, path)]
    if one or (path / "dq.py").exists():
        file = file_in(path)
        return [(str(file or path), path.name, file)]
    found = []
    for each in sorted(path.iterdir()):
        if each.name.startswith((".", "__")):
            continue
        file = file_in(each) if each.is_dir() else each
        found.append((str(file.relative_to(path)) if file else each.name, each.name if each.is_dir() else each.stem,
                      file))
    return found


def load(name, student, file):
    try:
        if file is None:
            return Submission(name, student, fault="holds no dq.py, and not exactly one other .py or .ipynb file")
        if file.suffix not in CODE:
            return Submission(name, student, fault="is no .py or .ipynb file; unpack archives")
        submission = Submission(name, student, read(file))
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, RecursionError, MemoryError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Submission(name, student, fault=f"can't be read: {reason}")
    for each in sorted(file.parent.glob("*.py")) if file.name == "dq.py" else []:
        with contextlib.suppress(OSError, SyntaxError, ValueError):          # the import says what is missing
            if each.name not in SOURCES and each.stat().st_size < 2 ** 20:
                submission.helpers.append((each.name, read(each)))
    return submission


class Checkers:
    """Processes that run tests, as many as there are cores; new ones if one of them has died."""

    def __init__(self, folder, n_tasks):
        self.folder, self.n_tasks, self.pool = folder, n_tasks, None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.pool:
            self.pool.shutdown()

    def start(self):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        size, how = min(cores, -(-self.n_tasks // 4)), "spawn"               # each starts a process that imports torch
        if checks.Nursery.forks:
            import torch  # noqa: F401  (once for all of them)
            checks.nursery, how = checks.nursery or checks.Nursery(), "fork"
        self.pool = ProcessPoolExecutor(size, get_context(how), checks.prepare, (self.folder, IS_COPY))

    def submit(self, *task):
        if self.pool:
            with contextlib.suppress(BrokenExecutor):
                return self.pool.submit(checks.check, *task)
        self.start()
        return self.pool.submit(checks.check, *task)

    def result(self, future, *task):
        """What `check` says. A fault of the grader's own is tried again, twice and alone, before it is reported."""
        for again in (True, True, False):
            try:
                return future.result()
            except Exception as error:
                if not again:
                    fault = f"{NOT_GRADED}{type(error).__name__}: {error}; please report this"
                    return dict.fromkeys(EXERCISES[task[0]].tests.split(), fault)
            future = self.submit(*task)


def run_tests(submissions, numbers, folder, args, seed, kind):
    """The tests of these exercises: one submission after the other, the exercises of each in parallel."""
    with Checkers(folder, len(submissions) * len(numbers)) as checkers:
        for each in submissions:
            start, results, tasks = time.monotonic(), getattr(each, kind), []
            until = start + max(0.0, 60 * args.minutes - each.seconds)
            for number in numbers:
                fault = checks.unwritten(each.text, EXERCISES[number].function)
                if fault:
                    results[number] = dict.fromkeys(EXERCISES[number].tests.split(), fault)
                else:
                    task = number, each.text, args.limit, seed, until, each.helpers
                    tasks.append((checkers.submit(*task), *task))
            for future, *task in tasks:
                results[task[0]] = checkers.result(future, *task)
            each.seconds += time.monotonic() - start


def grade(args):
    os.environ["OMP_NUM_THREADS"] = "1"
    start, numbers, hidden = time.monotonic(), [number - 1 for number in args.only], os.environ.get(HIDDEN)
    if hidden and not hidden.isdecimal():
        sys.exit(f"{HIDDEN} must be a whole number, not {hidden!r}")
    submissions = [load(*each) for path in args.paths for each in collect(path, one=bool(args.gradescope))]
    if not submissions:
        sys.exit(f"no files in {', '.join(map(str, args.paths))}")
    good = [each for each in submissions if not each.fault]
    gap = fence.gap(ROOT) if good and not IS_COPY else ""
    if gap:
        print(f"submissions are not fenced: {gap}", file=sys.stderr)
    base = HANDED_OUT.read_text(encoding="utf-8") if IS_COPY else project(["dq.py"], args.variant)["dq.py"]
    for each in good:                                                        # before anything of it is run
        tree = checks.parsed(each.text)
        functions = [e.function for e in EXERCISES if binding(tree, e.function) is not None]
        assembly = Assembly(base, each.text, functions)
        each.unused = assembly.unused
        if IS_COPY:
            with tempfile.TemporaryDirectory() as folder:
                write_project(Path(folder))
                (Path(folder) / "dq.py").write_text(assembly.text, encoding="utf-8")
                run_tests([each], numbers, Path(folder), args, 0, "visible")
    if good and not IS_COPY:
        for kind, seed in [("visible", None)] + ([("hidden", int(hidden))] if hidden else []):
            with tempfile.TemporaryDirectory() as folder:
                write_project(Path(folder), args.variant, seed)
                run_tests(good, numbers, Path(folder), args, seed or 0, kind)
    if checks.nursery:
        checks.nursery.close()                                               # no student's process is left now
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
    failed = [each.name for each in good if each.not_graded()]
    if failed:
        sys.exit(f"the grader failed with exercises of {', '.join(failed)}; grade them again")
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
        cells = "".join("   ?" if number in each.not_graded() else f"{each.points(number)[0]:4g}" for number in numbers)
        print(f"{each.name:{width}} {cells} {each.total(numbers, False)[0]:6g} {each.total(numbers, True)[0]:6g}")
    bad = sum(bool(each.fault) for each in submissions)
    print(f"{len(submissions)} submissions, {bad} of them can't be read, {seconds:.0f} seconds")


def write_csv(path, submissions, numbers, seconds):
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["student", "file", *(EXERCISES[number].function for number in numbers), "all", "bonus",
                        "fault"])
        for each in submissions:
            cells, fault = [""] * (len(numbers) + 2), each.fault
            if not fault:
                cells = [f"{points:g}" for points in (*(each.points(number)[0] for number in numbers),
                                                      each.total(numbers, False)[0], each.total(numbers, True)[0])]
                missing = each.not_graded()
                fault = NOT_GRADED + ", ".join(str(number + 1) for number in missing) if missing else ""
            table.writerow([each.student, each.name, *cells, fault])


def write_json(path, submissions, numbers, seconds):
    rows = []
    for each in submissions:
        row = dict(student=each.student, file=each.name, fault=each.fault, exercises=[])
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
    for number in [] if each.fault else numbers:
        for kind, got, most, fault in each.parts(number):
            e = EXERCISES[number]
            title = f"{e.name}: {e.function}" + (", hidden cases" if kind else "")
            tests.append(dict(number=f"{number + 1}{'.2' if kind else '.1'}", name=title, score=got, max_score=most,
                              status="passed" if got == most else "failed", output=fault or "all tests pass",
                              output_format="text", visibility="after_due_date" if kind else "visible"))
    fault = each.fault and f"{Path(each.name).name} {each.fault}"
    if each.not_graded():
        fault = "The grader failed with some of the exercises. This is not your fault: tell the staff."
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
    making.add_argument("--autograder", type=Path, metavar="ZIP", help="the archive that Gradescope takes")
    making.add_argument("--solution", type=Path, metavar="FILE", help="dq.py as the variant has it, with all answers")
    making.add_argument("--assistants", type=Path, metavar="FILE", help="a page with common mistakes and rubrics")
    grading = commands.add_parser("grade", help="a table of points")
    grading.add_argument("paths", type=Path, metavar="FILE_OR_FOLDER", nargs="+")
    grading.add_argument("--only", type=int, nargs="+", metavar="NUMBER", choices=numbers, default=numbers)
    grading.add_argument("--limit", type=float, default=30, help="seconds of computing for each exercise")
    grading.add_argument("--minutes", type=float, default=8, help="for a whole file; exercises after that are not run")
    grading.add_argument("--csv", type=Path, metavar="FILE", help="also write a row per student")
    grading.add_argument("--json", type=Path, metavar="FILE", help="also write points and faults of everyone")
    grading.add_argument("--gradescope", type=Path, metavar="FILE", help="also write results.json, of one submission")
    splitting = commands.add_parser("split", help="codes to hand out, and a private part that ranks")
    splitting.add_argument("codes", type=Path, metavar="CODES", help="what train_vae.py wrote")
    splitting.add_argument("--public", type=Path, metavar="FILE", default=Path("public.pt"))
    splitting.add_argument("--private", type=Path, metavar="FILE", default=Path("private.pt"))
    ranking = commands.add_parser("leaderboard", help="the open part")
    ranking.add_argument("folder", type=Path, metavar="FOLDER", help="a transformer.pt in each student's folder")
    ranking.add_argument("--codes", type=Path, metavar="FILE", default=Path("out/codes.pt"), help="those handed out")
    ranking.add_argument("--private", type=Path, metavar="FILE", help="the part that `split` kept back, which ranks")
    ranking.add_argument("--minutes", type=float, metavar="N",
                         help="first train each student's folder for N minutes with two threads, as its own scripts do")
    for command in (making, grading, ranking):
        command.add_argument("--variant", type=int, metavar="SEED",
                             help="a specification that the published dq.py does not solve")
    args = parser.parse_args()
    if IS_COPY and (args.command not in ("list", "grade") or getattr(args, "variant", None) is not None):
        parser.error("this is a student's copy; copies, variants and the leaderboard need the whole project")
    if args.command == "list":
        show()
    elif args.command == "make":
        if not (args.folder or args.autograder or args.solution or args.assistants):
            parser.error("make needs DIR, --autograder ZIP, --solution FILE or --assistants FILE")
        if args.folder:
            make(args.folder, args.variant)
        if args.autograder:
            make_autograder(args.autograder, args.variant)
        if args.solution:
            write_for_staff(args.solution, project(["dq.py"], args.variant)["dq.py"], "a solution")
        if args.assistants:
            import handout
            write_for_staff(args.assistants, handout.for_assistants(), "for assistants")
    elif args.command == "grade":
        grade(args)
    else:
        import leaderboard
        if args.command == "split":
            leaderboard.split(args.codes, args.public, args.private)
        else:
            leaderboard.show(args.folder, args.codes, args.private, args.minutes, args.variant)


if __name__ == "__main__":
    main()
