"""The course: dq.py with holes to fill, and a grader.

    python tests/course/assignment.py list                     the exercises, in the order in which the file reads
    python tests/course/assignment.py make DIR                 a copy of the project for students, with the holes
    python tests/course/assignment.py grade STUDENT_DQ.py      a table of points; --only 3 7: these exercises alone

A hole keeps the signature, the docstring and the comments of its function, most of them about the shape of a variable
of our solution. Students fill the holes in order: the tests of an exercise need those before it and none after.
The minutes that are listed are a student's; the tests of an exercise take seconds, without a GPU.

Each exercise is graded alone: that one function of the student's file is put into a copy of this project, and the
tests that belong to it run there, in a process of their own and under a time limit; all must pass. Nothing else of
the file is used, so a helper or an import of one's own goes *inside* the function. Run in a student's copy, the
project around the function is the student's own. This is a grader, no sandbox: it runs what it is given.
"""
import argparse
import ast
import io
import multiprocessing
import os
import shutil
import sys
import tempfile
import textwrap
import tokenize
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROUTERS, CODEBOOK, VAE = "test_routers.py", "test_codebook.py", "test_vae.py"
LAYOUT, TRANSFORMER, SAMPLING = "test_layout.py", "test_transformer.py", "test_sampling.py"
SOURCES = ["dq.py", "common.py", "sample.py", "train_vae.py", "train_transformer.py", "pyproject.toml"]
TESTS = ["conftest.py", "naive.py", ROUTERS, CODEBOOK, VAE, LAYOUT, TRANSFORMER, SAMPLING]

Exercise = namedtuple("Exercise", "function name points minutes learned file tests")
EXERCISES = [
    # first week: from an image to codes
    Exercise("GrainRouter.forward", "the gate", 8, 60, "Gumbel-max sampling; how a choice gets a gradient", ROUTERS,
             "test_straight_through_gradient_of_the_gate test_gumbel_noise_draws_with_the_softmax_probabilities"),
    Exercise("EntropyRouter.score", "a score without learning", 6, 45, "histograms of all regions at once", ROUTERS,
             "test_entropy_equals_a_loop_over_pixels"),
    Exercise("budget_loss", "the budget", 4, 20, "a constraint on the data set, not on each image", ROUTERS,
             "test_budget_loss_lets_images_differ test_budget_loss_equals_a_loop_and_pulls_on_all_regions_alike"),
    Exercise("straight_through", "straight through", 4, 15, "the value of one tensor, another's gradient", CODEBOOK,
             "test_straight_through_has_the_value_of_q_and_the_gradient_of_z"),
    Exercise("Codebook.assign", "the nearest code", 4, 20, "all distances by one product of matrices", CODEBOOK,
             "test_nearest_code_equals_a_loop"),
    Exercise("Codebook.update", "the codes follow", 8, 60, "k-means online; every code counts once", CODEBOOK,
             "test_ema_update_equals_a_loop_over_codes"),
    Exercise("Codebook.restart", "dead codes start anew", 8, 45, "how a codebook collapses, what prevents it", CODEBOOK,
             "test_restart_revives_dead_codes_and_leaves_the_others test_restart_draws_by_weight "
             "test_a_batch_of_few_different_vectors_gives_codes_that_differ"),
    Exercise("DQVAE.mix", "one map of many", 4, 30, "how the image's loss reaches the gate: by a product", VAE,
             "test_mix_equals_a_loop"),
    Exercise("DQVAE.cell_weight", "what a cell counts", 4, 20, "a mean over codes of different sizes", VAE,
             "test_cell_weight_equals_a_loop"),
    # second week: from codes to sequences and back
    Exercise("Layout.pack", "images to sequences", 10, 90, "an order of the codes as a sort of ids", LAYOUT,
             "test_pack_equals_a_loop"),
    Exercise("Layout.unpack", "sequences to images", 8, 60, "scatter, and the inverse of a reshaped grid", LAYOUT,
             "test_unpack_is_the_inverse_of_pack"),
    Exercise("Layout.legal", "what may come next", 10, 90, "masks that keep a distribution normalised", LAYOUT,
             "test_packed_sequences_are_legal_at_each_step test_every_legal_walk_is_a_complete_tiling"),
    Exercise("DQTransformer.embed", "a pair as a vector", 4, 15, "what, where and how fine, in one sum", TRANSFORMER,
             "test_a_pair_is_the_sum_of_three_rows"),
    Exercise("DQTransformer.logits", "where, then what", 10, 90, "shifting by one; two factors a step", TRANSFORMER,
             "test_logits_equal_a_loop_over_prefixes"),
    Exercise("filter_logits", "top-k and top-p", 4, 30, "sorting, and the entry that crosses p", SAMPLING,
             "test_top_k_and_top_p_equal_a_loop"),
    Exercise("draw", "a draw", 4, 20, "the inverse of a distribution function, and its ends", SAMPLING,
             "test_draws_follow_the_distribution"),
    Exercise("decode_one", "bonus: the sampler's step", 20, 240, "caches, guidance, refilled slots", SAMPLING,
             "test_the_step_draws_what_the_naive_loop_draws"),
]


def find(tree, function):
    """The (last) definition of "name" or "Class.name" in a module, or None."""
    body, node = tree.body, None
    for name in function.split("."):
        found = [each for each in body if isinstance(each, (ast.FunctionDef, ast.ClassDef)) and each.name == name]
        if not found:
            return None
        node, body = found[-1], found[-1].body
    return node if isinstance(node, ast.FunctionDef) else None


def text_of(source, node):
    """A function without its decorators, from the left margin."""
    lines, n = source.split("\n")[node.lineno - 1:node.end_lineno], node.col_offset
    return "\n".join(line if line[:n].strip() else line[n:] for line in lines)  # but strings may begin further left


def replaced(source, function, text):
    """A source in which a function has another text; its decorators stay."""
    node, lines = find(ast.parse(source), function), source.split("\n")
    lines[node.lineno - 1:node.end_lineno] = textwrap.indent(text, " " * node.col_offset).split("\n")
    return "\n".join(lines)


def is_stub(node):
    """Nothing but `raise NotImplementedError`, below a docstring if there is one."""
    return len(node.body) <= 2 and ast.unparse(node.body[-1]).startswith("raise NotImplementedError")


def comments(text):
    """Those of a function's body; one behind an assignment or a return begins with what it is about."""
    about = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Return):
            about[node.end_lineno] = "returned: "
        elif isinstance(node, (ast.Assign, ast.AugAssign)):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            about[node.end_lineno] = ast.unparse(target).strip("()") + ": "
    found = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            alone = not token.line[:token.start[1]].strip()
            found.append("# " + ("" if alone else about.get(token.start[0], "")) + token.string.lstrip("# "))
    return found


def stub(text):
    """The hole that an exercise leaves: signature, docstring, comments."""
    node, lines = ast.parse(text).body[0], text.split("\n")
    n_kept = node.body[0].end_lineno if ast.get_docstring(node) is not None else node.body[0].lineno - 1
    return "\n".join(lines[:n_kept] + ["    " + line for line in comments(text) + ["raise NotImplementedError"]])


def paths(e):
    return [f"tests/{e.file}::{test}" for test in e.tests.split()]


def show():
    for number, e in enumerate(EXERCISES, 1):
        print(f"{number:2}  {e.name}: {e.function}, {e.points} points, {e.minutes} minutes", f"learned: {e.learned}",
              "\n             ".join(["tests:   " + paths(e)[0], *paths(e)[1:]]), sep="\n    ")


def make(folder):
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        sys.exit(f"{folder} exists and is not an empty folder")
    source = (ROOT / "dq.py").read_text(encoding="utf-8")
    for e in EXERCISES:
        source = replaced(source, e.function, stub(text_of(source, find(ast.parse(source), e.function))))
    try:
        answers = shutil.ignore_patterns("test_assignment.py", "wrong_solutions.py", "__pycache__")
        shutil.copytree(ROOT / "tests", folder / "tests", ignore=answers)
        for name in SOURCES + ["README.md", "LICENSE", ".gitignore"]:
            shutil.copy(ROOT / name, folder)
        shutil.copytree(ROOT / "assets", folder / "assets")
        (folder / "dq.py").write_text(source, encoding="utf-8")
    except OSError as error:
        sys.exit(f"could not write {folder}: {error}")
    print(f"{folder}/dq.py has {len(EXERCISES)} functions to fill; "
          f"python tests/course/assignment.py list names them in order")


class Watch:
    """A plugin of pytest that remembers how many tests passed, and what went wrong first."""
    passed, fault = 0, ""

    def pytest_runtest_logreport(self, report):
        self.passed += report.when == "call" and report.passed
        if report.failed and not self.fault:
            reasons = [line[1:].strip() for line in report.longreprtext.split("\n") if line.startswith("E ")]
            self.fault = ": ".join([report.nodeid.split("::")[-1], *reasons[:1]])


def run_tests(folder, e, answer):
    """In a process of its own: the tests of an exercise, in a project of its own. Sends what went wrong, or ""."""
    answer.send("it runs")
    os.chdir(folder)
    sys.path.insert(0, folder)
    watch = Watch()
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        try:
            import pytest
            import dq  # noqa: F401
        except Exception as error:                                         # a default value or annotation, probably
            return answer.send(f"{type(error).__name__}: {error}".split("\n")[0])
        status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *paths(e)], plugins=[watch])
    answer.send("" if status == 0 and watch.passed else watch.fault or "no test was run")


def grade_one(e, node, student, limit):
    """-> what is wrong with the student's solution of an exercise; "" when nothing is."""
    if node is None or is_stub(node):
        return "not written yet" if node else "missing"
    with tempfile.TemporaryDirectory() as folder:
        for name in SOURCES + [f"tests/{test}" for test in TESTS]:
            (Path(folder) / name).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, Path(folder) / name)
        reference = (ROOT / "dq.py").read_text(encoding="utf-8")
        (Path(folder) / "dq.py").write_text(replaced(reference, e.function, text_of(student, node)), encoding="utf-8")
        receiver, sender = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.Process(target=run_tests, args=(folder, e, sender), daemon=True)
        process.start()
        sender.close()                                                     # so that recv sees when it has died
        try:
            receiver.recv()                                                # its time begins
            return receiver.recv() if receiver.poll(limit) else f"not done after {limit:g} seconds"
        except EOFError:
            return "its process died"
        finally:
            process.kill()
            process.join()


def grade(path, limit, numbers):
    try:
        student = path.read_text(encoding="utf-8-sig")
        tree = ast.parse(student, path.name)
    except (OSError, SyntaxError, ValueError) as error:
        sys.exit(f"0 points: {path} can't be read: {error}")
    os.environ["OMP_NUM_THREADS"] = "1"
    if os.name == "posix":                                                 # import once what takes long
        multiprocessing.set_start_method("forkserver")
        multiprocessing.set_forkserver_preload(["torch.distributed.tensor", "PIL.Image", "tqdm", "pytest"])
    chosen = [EXERCISES[number - 1] for number in numbers]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        faults = list(pool.map(lambda e: grade_one(e, find(tree, e.function), student, limit), chosen))
    for number, e, fault in zip(numbers, chosen, faults):
        print(f"{number:2}  {e.function:22} {0 if fault else e.points:3} / {e.points:2}  {fault}"[:160].rstrip())
    got = sum(e.points for e, fault in zip(chosen, faults) if not fault)
    print(f"    {'all':22} {got:3} / {sum(e.points for e in chosen)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list")
    commands.add_parser("make").add_argument("folder", type=Path, metavar="DIR")
    grading, numbers = commands.add_parser("grade"), range(1, len(EXERCISES) + 1)
    grading.add_argument("file", type=Path, metavar="STUDENT_DQ.py")
    grading.add_argument("--only", type=int, nargs="+", metavar="NUMBER", choices=numbers, default=numbers)
    grading.add_argument("--limit", type=float, default=30, help="seconds for each exercise")
    args = parser.parse_args()
    if args.command == "list":
        show()
    elif args.command == "make":
        make(args.folder)
    else:
        grade(args.file, args.limit, args.only)


if __name__ == "__main__":
    main()
