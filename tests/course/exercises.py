"""The exercises, and what is done with the text of dq.py: holes, and a submission's functions put into another file."""
import ast
import functools
import io
import json
import re
import textwrap
import tokenize
from collections import namedtuple
from pathlib import Path

ROUTERS, CODEBOOK, VAE = "test_routers.py", "test_codebook.py", "test_vae.py"
LAYOUT, TRANSFORMER, SAMPLING = "test_layout.py", "test_transformer.py", "test_sampling.py"
SOURCES = ["dq.py", "data.py", "common.py", "sample.py", "train_vae.py", "train_transformer.py"]
SPEED = "course/test_speed.py"
TESTS = ["conftest.py", "naive.py", ROUTERS, CODEBOOK, VAE, LAYOUT, TRANSFORMER, SAMPLING, SPEED]

# level: 1 to 3, how difficult it is. needs: the exercises without which its tests can't pass
# parts: points of each test, where it counts by itself; without them all tests of an exercise must pass. The test of
# speed counts only if all others pass.
Exercise = namedtuple("Exercise", "function name points minutes level needs learned file tests parts", defaults=[()])
EXERCISES = [
    # first week: from an image to codes
    Exercise("GrainRouter.forward", "the gate", 8, 60, 3, "", "Gumbel-max sampling; how a choice gets a gradient",
             ROUTERS, "test_straight_through_gradient_of_the_gate "
             "test_gumbel_noise_draws_with_the_softmax_probabilities"),
    Exercise("EntropyRouter.score", "the entropy score", 6, 45, 2, "", "histograms of all regions at once", ROUTERS,
             f"test_entropy_equals_a_loop_over_pixels {SPEED}::test_entropy_is_faster_than_the_loop", (3, 3)),
    Exercise("budget_loss", "the budget", 4, 20, 1, "", "a constraint on the data set, not on each image", ROUTERS,
             "test_budget_loss_lets_images_differ test_budget_loss_equals_a_loop_and_pulls_on_all_regions_alike"),
    Exercise("straight_through", "straight-through", 4, 15, 1, "", "the value of one tensor, another's gradient",
             CODEBOOK, "test_straight_through_has_the_value_of_q_and_the_gradient_of_z"),
    Exercise("Codebook.assign", "the nearest code", 4, 20, 1, "", "all distances at once", CODEBOOK,
             f"test_nearest_code_equals_a_loop {SPEED}::test_assign_is_faster_than_the_loop", (2, 2)),
    Exercise("Codebook.update", "moving averages", 8, 60, 2, "4 5", "k-means online; every code counts once", CODEBOOK,
             f"test_ema_update_equals_a_loop_over_codes {SPEED}::test_update_is_faster_than_the_loop", (4, 4)),
    Exercise("Codebook.restart", "dead codes", 8, 45, 3, "", "how a codebook collapses, and what prevents it",
             CODEBOOK, "test_restart_revives_dead_codes_and_leaves_the_others test_restart_draws_by_weight "
             "test_a_batch_of_few_different_vectors_gives_codes_that_differ", (4, 2, 2)),
    Exercise("DQVAE.mix", "one map of many", 4, 30, 1, "", "how the image's loss reaches the gate: by a product", VAE,
             f"test_mix_equals_a_loop {SPEED}::test_mix_is_faster_than_the_loop", (2, 2)),
    Exercise("DQVAE.cell_weight", "the weight of a cell", 4, 20, 1, "", "a mean over codes of different sizes", VAE,
             f"test_cell_weight_equals_a_loop {SPEED}::test_cell_weight_is_faster_than_the_loop", (2, 2)),
    # second week: from codes to sequences and back
    Exercise("Layout.pack", "images to sequences", 10, 90, 3, "", "an order of the codes as a sort of ids", LAYOUT,
             f"test_pack_equals_a_loop {SPEED}::test_pack_is_faster_than_the_loop", (5, 5)),
    Exercise("Layout.unpack", "sequences to images", 8, 60, 2, "", "scatter, and the inverse of a reshaped grid",
             LAYOUT, "test_unpack_is_the_inverse_of_pack"),
    Exercise("Layout.legal", "the next position", 10, 90, 3, "10 11", "masks that keep a distribution normalised",
             LAYOUT, "test_packed_sequences_are_legal_at_each_step test_every_legal_walk_is_a_complete_tiling "
             f"{SPEED}::test_legal_is_faster_than_the_loop", (3, 2, 5)),
    Exercise("DQTransformer.embed", "a pair as a vector", 4, 15, 1, "", "content, position and granularity in one sum",
             TRANSFORMER, f"test_a_pair_is_the_sum_of_three_rows {SPEED}::test_embed_is_faster_than_the_loop", (2, 2)),
    Exercise("DQTransformer.logits", "where, then what", 10, 90, 3, "10 12 13", "shifting by one; two factors a step",
             TRANSFORMER, f"test_logits_equal_a_loop_over_prefixes {SPEED}::test_logits_are_faster_than_the_loop",
             (5, 5)),
    Exercise("filter_logits", "top-k and top-p", 4, 30, 2, "", "sorting, and which entries stay", SAMPLING,
             f"test_top_k_and_top_p_equal_a_loop {SPEED}::test_filter_logits_is_faster_than_the_loop", (2, 2)),
    Exercise("draw", "a sample", 4, 20, 2, "", "the inverse of a distribution function, and its ends", SAMPLING,
             f"test_draws_follow_the_distribution {SPEED}::test_draw_is_faster_than_the_loop", (2, 2)),
    Exercise("decode_one", "bonus: one sampling step", 20, 240, 3, "10 12 13 15 16", "caches, guidance, refilled slots",
             SAMPLING, "test_the_step_draws_what_the_naive_loop_draws"),
]
BONUS = [e.function for e in EXERCISES if e.name.startswith("bonus")]
SECOND_WEEK = 10                                                             # the exercise with which it begins
RULES = """\
These count, here and where points are given: the functions of the exercises, and everything that is new in the file:
imports, functions, classes and variables at the top level, methods and attributes in existing classes. A replacement
of anything else that the file came with does not count, nor do calls and other statements at the top level. Modules of
your own beside dq.py may be imported; the tests and their loops may not. A function gets what its signature names and
returns tensors or numbers. It runs in a sandbox: 30 seconds of computing and 2 GB for each exercise, files in its own
folder only, and no other programs, network or signals."""


def paths(e):
    """As pytest takes them."""
    return [f"tests/{test}" if "::" in test else f"tests/{e.file}::{test}" for test in e.tests.split()]


def described(e):
    """-> a line about points and minutes, and a line for each test"""
    needs = f" Its tests need exercises {', '.join(e.needs.split())}." if e.needs else ""
    parts = [f"      # {part} points" for part in e.parts] or [""] * len(paths(e))
    bonus = " of the bonus" if e.function in BONUS else ""
    return (f"{e.points} points{bonus}, about {e.minutes} minutes, difficulty {e.level} of 3.{needs} Learned: "
            f"{e.learned}.", *(path + part for path, part in zip(paths(e), parts)))


# ------------------------------------------------------------------------------------------------
# Holes


parsed = functools.lru_cache(4)(ast.parse)


def text_of(source, function):
    """A function without its decorators, from the left margin."""
    node = definitions(parsed(source))[function]
    lines, n = source.split("\n")[node.lineno - 1:node.end_lineno], node.col_offset
    return "\n".join(line if line[:n].strip() else line[n:] for line in lines)  # but strings may begin further left


def replaced(source, function, text):
    """A source in which a function has another text; its decorators stay."""
    node, lines = definitions(parsed(source))[function], source.split("\n")
    lines[node.lineno - 1:node.end_lineno] = textwrap.indent(text, " " * node.col_offset).split("\n")
    return "\n".join(lines)


def is_stub(node):
    """Nothing but such a `raise`, below a docstring if there is one."""
    return (isinstance(node, ast.FunctionDef) and len(node.body) <= 2
            and ast.unparse(node.body[-1]).startswith(("raise UserError", "raise NotImplementedError")))


def comments(text):
    """Those of a function's body; one behind an assignment or a return begins with what it is about."""
    nodes, about, found = ast.walk(ast.parse(text)), {}, []
    for node in (each for each in nodes if isinstance(each, (ast.Assign, ast.Return))):
        name = "returned" if isinstance(node, ast.Return) else ast.unparse(node.targets[0]).strip("()")
        about[node.end_lineno] = f"# {name}: "
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            alone = not token.line[:token.start[1]].strip()
            found.append(("# " if alone else about.get(token.start[0], "# ")) + token.string.lstrip("# "))
    return found


def stub(text, what="it is to be written"):
    """The hole that an exercise leaves: signature, docstring, comments. A script then ends with the line `what`."""
    node, lines = ast.parse(text).body[0], text.split("\n")
    hole = [*comments(text), f'raise UserError("{what}")']
    return "\n".join(lines[:node.body[0].end_lineno] + ["    " + line for line in hole])


def with_holes(source, functions=None):
    """dq.py in which these functions, or those of all exercises, are to be written."""
    for number, e in enumerate(EXERCISES, 1):
        if functions is None or e.function in functions:
            what = f"exercise {number}, {e.name}: {e.function} is to be written"
            source = replaced(source, e.function, stub(text_of(source, e.function), what))
    return source


# ------------------------------------------------------------------------------------------------
# Submissions


def read(path):
    """The text of a submission: a Python file in any declared encoding, or the code cells of a notebook.
    ValueError, SyntaxError or OSError if it is neither."""
    data = path.read_bytes()
    if path.suffix == ".ipynb":
        cells = [cell for cell in json.loads(data.decode("utf-8-sig"))["cells"] if cell["cell_type"] == "code"]
        text = "\n".join(python_of("".join(cell["source"])) for cell in cells)
    else:
        text = data.decode(tokenize.detect_encoding(io.BytesIO(data).readline)[0])
    ast.parse(text)
    return text


def python_of(cell):
    """A cell without what IPython alone understands: %magic, !command, name? and cells of another language."""
    if re.match(r"\s*%%(?!time|capture|timeit|prun)", cell):
        return ""
    try:
        ast.parse(cell)
        return cell
    except SyntaxError:
        return re.sub(r"(?m)^([ \t]*)((\w+ *= *)?[%!?].*|[\w.*]+\?\??[ \t]*)$", r"\1pass", cell)


def bound(node):
    """The names that a statement defines where it stands."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {alias.asname or alias.name.split(".")[0] for alias in node.names}
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return {node.id}
    if isinstance(node, (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
        return set()
    return set().union(*map(bound, ast.iter_child_nodes(node)))


def attribute(node):
    """"Class.name" of a statement `Class.name = ...`, or ""."""
    target = node.targets[0] if isinstance(node, ast.Assign) else None
    return ast.unparse(target) if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) else ""


def definitions(tree):
    """{"name" or "Class.name": the last statement that defines it} of a module."""
    found = {}
    for node in tree.body:
        found |= dict.fromkeys(bound(node), node)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{name}": each for each in node.body for name in bound(each)}
        elif attribute(node):
            found[attribute(node)] = node
    return found


def unused(base, submission):
    """The names that a submission defines otherwise than dq.py does, although they are no exercises."""
    ours, theirs = definitions(ast.parse(base)), definitions(ast.parse(submission))
    ignored = ast.Import, ast.ImportFrom, ast.ClassDef                       # a class is compared by its members
    return [name for name, node in theirs.items() if name in ours and not isinstance(node, ignored)
            and name not in {e.function for e in EXERCISES} and ast.dump(node) != ast.dump(ours[name])]


# ------------------------------------------------------------------------------------------------
# Tests for students


def graded_tests(texts):
    """{"tests/test_x.py": text} -> the same without the tests that belong to no exercise."""
    graded = {path for e in EXERCISES for path in paths(e)}
    return {name: pruned(name, text, graded) if Path(name).name.startswith("test_") else text
            for name, text in texts.items()}


def pruned(name, text, graded):
    """The test file without other tests, and of its docstring the first line."""
    body, lines = ast.parse(text).body, text.split("\n")
    for node in reversed(body):
        if bound(node) and f"{name}::{min(bound(node))}" not in graded and min(bound(node)).startswith("test_"):
            first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))]) - 1
            while not lines[first - 1] or lines[first - 1].startswith("#"):
                first -= 1
            lines[first:node.end_lineno] = []
    lines[:body[0].end_lineno] = [f'"""{ast.get_docstring(ast.parse(text)).splitlines()[0].rstrip(".:")}."""']
    return "\n".join(lines)
