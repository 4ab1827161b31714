"""The course: dq.py with functions to write, and a grader. README.md has examples of the commands.

A student's copy keeps signature, docstring and comments of each function that is to be written. The grader takes each
exercise by itself: a process in a sandbox has our dq.py, in which this one function and all that is new come from the
submission. The tests of the exercise ask it for answers. In a student's copy, the other exercises are the student's.
"""
import argparse
import contextlib
import csv
import io
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
from exercises import (BONUS, EXERCISES, RULES, SECOND_WEEK, SOURCES, SPEED, TESTS, described, graded_tests, read,
                       unused, with_holes)

ROOT = Path(__file__).resolve().parents[2]
COURSE = Path("tests") / "course"
KIT = ["assignment.py", "exercises.py", "checks.py", "worker.py", "fence.py", "picture.py"]
NAMES = [*SOURCES, *(f"tests/{name}" for name in TESTS), *(f"tests/course/{name}" for name in KIT)]
HANDED_OUT = ROOT / COURSE / "handed_out.py"                                 # dq.py as it was, in a student's copy
IS_COPY = HANDED_OUT.exists()
HIDDEN = "DQ_COURSE_HIDDEN"                                                  # environment: the seed of hidden cases
CODE = (".py", ".ipynb")
NOT_GRADED = "not graded: "


def show():
    for number, e in enumerate(EXERCISES, 1):
        if number in (1, SECOND_WEEK):
            print(f"Week {1 + (number > 1)}")
        print(f"{number:2}  {e.name}: {e.function}", *described(e), sep="\n    ")
    print(f"\n{in_all()}\n\n{RULES}")


def total(what, bonus):
    return sum(getattr(e, what) for e in EXERCISES if (e.function in BONUS) == bonus)


def in_all():
    return (f"{total('points', False)} points in {total('minutes', False)} minutes of work, and a bonus of "
            f"{total('points', True)} points in {total('minutes', True)} minutes.")


# ------------------------------------------------------------------------------------------------
# Copies


def write_project(folder, variant=None, hidden=None):
    """Write sources, the tests of the exercises and the kit into an empty folder, edited for a variant, if any."""
    for name, text in project(NAMES, variant, hidden).items():
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
    write_project(folder, variant)
    full = (folder / "dq.py").read_text(encoding="utf-8")
    holes = with_holes(full)
    for name in ("dq.py", COURSE / "handed_out.py"):
        (folder / name).write_text(holes, encoding="utf-8")
    for name in ("pyproject.toml", "LICENSE", ".gitignore", COURSE / "vae.pt"):
        shutil.copy(ROOT / name, folder / name)
    handout.write(folder, full, in_all(), executed(full, "solution"))
    print(f"{folder} is a copy with {len(EXERCISES)} functions to write; there, "
          f"python tests/course/assignment.py list names them in order.\n{RULES}")
    if variant is not None:
        print(f"grade it with --variant {variant}; the published dq.py does not solve it")


def write_for_staff(path, text, what):
    path.write_text(text, encoding="utf-8")
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
    run = RUN.format(hidden=HIDDEN, seed=secrets.randbelow(2 ** 31),
                     variant="" if variant is None else f" --variant {variant}")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in (*NAMES, "tests/course/variants.py"):
            archive.write(ROOT / name, name)
        for name, text in (("setup.sh", SETUP), ("run_autograder", run)):
            info = zipfile.ZipInfo(name, time.localtime()[:6])
            info.external_attr = 0o755 << 16                                 # so that it may be executed
            archive.writestr(info, text)
    print(f"{path} is for Gradescope; it holds the answers and the seed of the hidden cases, so don't hand it out.\n"
          f"Set the assignment's maximum to {total('points', False)} points; the bonus comes on top of them.")


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

    def parts(self, number):
        """-> rows of the visible and the hidden cases: points, maximum, what is wrong"""
        e, results = EXERCISES[number], self.visible[number]
        of_hidden = (e.points + 2) // 4 if number in self.hidden else 0
        rest = e.points - of_hidden
        wrong = {test.rpartition("::")[2]: fault for test, fault in results.items() if fault}
        got = 0 if wrong else e.points
        if e.parts:                                                          # each test for itself; speed comes last
            right = not any(fault for test, fault in results.items() if SPEED not in test)
            got = sum(part for part, (test, fault) in zip(e.parts, results.items())
                      if not fault and (right or SPEED not in test))
        same = len(set(results.values())) == 1
        said = [*results.values()][:1] if same else [f"{test}: {fault}" for test, fault in wrong.items()]
        rows = [(got * rest / e.points, rest, "; ".join(said))]
        if of_hidden:
            missed = {test.rpartition("::")[2]: fault for test, fault in self.hidden[number].items() if fault}
            said = f"hidden cases of {', '.join(missed)}" if missed else ""
            failed = [fault for fault in missed.values() if fault.startswith(NOT_GRADED)]
            rows.append((0 if missed else of_hidden, of_hidden, failed[0] if failed else said))
        return rows

    def row(self, numbers):
        """As --json has it. Every other table is made of these rows."""
        exercises = []
        for number in numbers if not self.fault else []:
            got, of, said = zip(*self.parts(number))
            exercises.append(dict(number=number + 1, function=EXERCISES[number].function, points=sum(got), of=sum(of),
                                  fault="; ".join(dict.fromkeys(filter(None, said))), parts=self.parts(number)))
        failed = [str(each["number"]) for each in exercises if NOT_GRADED in each["fault"]]
        row = dict(student=self.student, file=self.name, exercises=exercises, unused=self.unused,
                   fault=self.fault or (NOT_GRADED + ", ".join(failed) if failed else ""))
        for name, bonus in (("all", False), ("bonus", True)):
            counted = [each for each in exercises if (each["function"] in BONUS) == bonus]
            row |= {name: sum(each["points"] for each in counted), f"of_{name}": sum(each["of"] for each in counted)}
        return row


def file_in(folder):
    """The submission in a student's folder, or None."""
    named = sorted(folder.rglob("dq.py"), key=lambda path: len(path.parts))
    found = named or [path for path in folder.rglob("*") if path.suffix in CODE]
    return found[0] if named or len(found) == 1 else None


def collect(path, one=False):
    """-> [(name, student, file or None)] of a file, of one student's folder, or of a folder of files and folders."""
    if path.is_dir() and not one and not (path / "dq.py").exists():
        inside = [each for each in sorted(path.iterdir()) if not each.name.startswith((".", "__"))]
        return [row for each in inside for row in collect(each, one=True)]
    file = file_in(path) if path.is_dir() else path
    student = path.name if path.is_dir() else path.parent.name if path.name == "dq.py" else path.stem
    return [(str(file or path), student, file)]


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


def checkers(folder, text, n_tasks):
    """Processes that run tests, as many as there are cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    checks.connect()                                                         # imports torch once for all of them
    return ProcessPoolExecutor(min(cores, -(-n_tasks // 4)), get_context("fork"), checks.prepare, (folder, text))


def run_tests(submissions, numbers, folder, args, seed, kind):
    """The tests of these exercises: one submission after the other, the exercises of each in parallel."""
    how = folder, submissions[0].text if IS_COPY else None, len(submissions) * len(numbers)
    pool = checkers(*how)
    for each in submissions:
        begin, results, left = time.monotonic(), getattr(each, kind), list(numbers)
        until = begin + max(0.0, 60 * args.minutes - each.seconds)
        for number in numbers:
            results[number] = dict.fromkeys(EXERCISES[number].tests.split(), f"{NOT_GRADED}please report this")
        for attempt in range(3):                                             # after a fault of the grader's own
            futures = {}
            with contextlib.suppress(BrokenExecutor):                        # one of the processes has died
                for number in left:
                    task = number, each.text, args.limit, seed, until, each.helpers
                    futures[number] = pool.submit(checks.check, *task)
            for number, future in futures.items():
                try:
                    results[number] = future.result()
                    left.remove(number)
                except Exception as error:
                    said = f"{NOT_GRADED}{type(error).__name__}: {error}; please report this"
                    results[number] = dict.fromkeys(results[number], said)
            if not left:
                break
            pool.shutdown()
            pool = checkers(*how)
        each.seconds += time.monotonic() - begin
    pool.shutdown()


def grade(args):
    os.environ["OMP_NUM_THREADS"] = "1"
    start, numbers, hidden = time.monotonic(), [number - 1 for number in args.only], os.environ.get(HIDDEN)
    if hidden and not hidden.isdecimal():
        sys.exit(f"{HIDDEN} must be a whole number, not {hidden!r}")
    submissions = [load(*each) for path in args.paths for each in collect(path, one=bool(args.gradescope))]
    if not submissions:
        sys.exit(f"no files in {', '.join(map(str, args.paths))}")
    good = [each for each in submissions if not each.fault]
    if good and not IS_COPY and (gap := fence.gap(ROOT)):
        print(f"submissions are not fenced: {gap}", file=sys.stderr)
    base = HANDED_OUT.read_text(encoding="utf-8") if IS_COPY else project(["dq.py"], args.variant)["dq.py"]
    for each in good:
        each.unused = unused(base, each.text)
    for kind, seed in [("visible", None)] + [("hidden", int(hidden or 0))] * bool(hidden and not IS_COPY):
        for group in [[each] for each in good] if IS_COPY else [good] * bool(good):
            with tempfile.TemporaryDirectory() as folder:
                write_project(Path(folder), args.variant, seed)
                (Path(folder) / "dq.py").write_text(base, encoding="utf-8")
                run_tests(group, numbers, Path(folder), args, seed or 0, kind)
    if checks.nursery:
        checks.nursery.close()                                               # no student's process is left now
    rows, seconds = [each.row(numbers) for each in submissions], time.monotonic() - start
    if len(rows) == 1:
        show_one(rows[0])
    else:
        show_many(rows, numbers, seconds)
    tables = {args.csv: in_csv(rows, numbers), args.json: json.dumps(dict(submissions=rows), indent=1),
              args.gradescope: for_gradescope(rows[0], seconds)}
    for path, text in tables.items():
        if path:
            path.write_text(text, encoding="utf-8", newline="")
    failed = [row["file"] for row in rows if row["fault"].startswith(NOT_GRADED)]
    if failed:
        sys.exit(f"the grader failed with exercises of {', '.join(failed)}; grade them again")
    if not good:
        sys.exit(1)


def show_one(row):
    if not row["exercises"]:
        return print(f"0 points: {row['file']} {row['fault']}", file=sys.stderr)
    print(row["file"])
    for each in row["exercises"]:
        print(f"{each['number']:2}  {each['function']:22} {each['points']:4g} / {each['of']:2}  "
              f"{each['fault']}"[:400].rstrip())
    for name in ("all", "bonus"):
        if row[f"of_{name}"]:
            print(f"    {name:22} {row[name]:4g} / {row[f'of_{name}']}")
    if row["unused"]:
        print(f"changed, but not an exercise, so not used: {', '.join(row['unused'])}")


def show_many(rows, numbers, seconds):
    width = max(len(row["file"]) for row in rows)
    print(f"{'':{width}} " + "".join(f"{number + 1:4}" for number in numbers) + "    all  bonus")
    for row in rows:
        cells = "".join("   ?" if NOT_GRADED in each["fault"] else f"{each['points']:4g}" for each in row["exercises"])
        print(f"{row['file']:{width}} " + (f"{cells} {row['all']:6g} {row['bonus']:6g}" if cells else row["fault"]))
    bad = sum(not row["exercises"] for row in rows)
    print(f"{len(rows)} submissions, {bad} of them can't be read, {seconds:.0f} seconds")


def in_csv(rows, numbers):
    file = io.StringIO(newline="")
    table = csv.writer(file)
    table.writerow(["student", "file", *(EXERCISES[number].function for number in numbers), "all", "bonus", "fault"])
    for row in rows:
        points = [*(each["points"] for each in row["exercises"]), row["all"], row["bonus"]]
        cells = [f"{each:g}" for each in points] if row["exercises"] else [""] * (len(numbers) + 2)
        table.writerow([row["student"], row["file"], *cells, row["fault"]])
    return file.getvalue()


def for_gradescope(row, seconds):
    """results.json of one submission, by the names of Gradescope's autograder specification."""
    tests = []
    for each in row["exercises"]:
        for hidden, (got, most, fault) in enumerate(each["parts"]):
            name = f"{EXERCISES[each['number'] - 1].name}: {each['function']}" + ", hidden cases" * hidden
            tests.append(dict(number=f"{each['number']}.{hidden + 1}", name=name, score=got, max_score=most,
                              status="passed" if got == most else "failed", output=fault or "all tests pass",
                              output_format="text", visibility="after_due_date" if hidden else "visible"))
    fault = row["fault"] and f"{Path(row['file']).name} {row['fault']}"
    if row["fault"].startswith(NOT_GRADED):
        fault = "The grader failed with some of the exercises. This is not your fault: tell the staff."
    return json.dumps(dict(
        score=sum(test["score"] for test in tests), execution_time=round(seconds, 1), output=fault or RULES,
        output_format="text", visibility="visible", stdout_visibility="hidden", tests=tests), indent=1)


# ------------------------------------------------------------------------------------------------
# The command line


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands, numbers = parser.add_subparsers(dest="command", required=True), range(1, len(EXERCISES) + 1)
    commands.add_parser("list", help="the exercises, in the order in which the file reads, and the rules")
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
    ranking = commands.add_parser("leaderboard", help="the open part: nats of students' checkpoints")
    ranking.add_argument("folder", type=Path, metavar="FOLDER", help="a transformer.pt in each student's folder")
    ranking.add_argument("--codes", type=Path, metavar="FILE", default=Path("private.pt"), help="of `split`")
    for command in (making, grading, ranking):
        command.add_argument("--variant", type=int, metavar="SEED",
                             help="a specification that the published dq.py does not solve")
    args = parser.parse_args(argv)
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
            leaderboard.split(args.codes, Path("public.pt"), Path("private.pt"))
        else:
            leaderboard.show(args.folder, args.codes, args.variant)


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__name__ != "UserError":
            raise
        sys.exit(f"error: {error}")                                          # of a path that was given
