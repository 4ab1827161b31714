"""Other specifications of the same exercises, for a course that grades: the published solutions fail them.

A variation has one or more choices, none of which is the published specification. A variant takes one choice of each
variation, by its seed. A choice gives words, which stand for <0>, <1>, ... in the new code of the variation's edits. So
solution, docstrings, naive loops, tests and pages change together. An edit is one of these:
    (file, function, old code, new code)    compared as syntax trees: comments and line breaks don't matter. Names _1,
                                            _2, ... stand for any expression, and in the new code for what it was.
                                            Function "*": everywhere in the file
    (file, function, "doc: words", words)   in a docstring, wherever its lines break; "..." is its rest. No text of the
                                            variant may contain the old words

HIDDEN are other sizes for the same tests; other seeds go with them.
"""
import ast
import random
import re

from exercises import definitions, parsed

D, N, S = "dq.py", "tests/naive.py", "tests/course/test_speed.py"
ROUTERS, CODEBOOK, VAE = "tests/test_routers.py", "tests/test_codebook.py", "tests/test_vae.py"
LAYOUT, TRANSFORMER, SAMPLING = "tests/test_layout.py", "tests/test_transformer.py", "tests/test_sampling.py"


# ------------------------------------------------------------------------------------------------
# Edits


def matches(pattern, node, found):
    """Whether a syntax tree is that of a pattern; found: {"_1": the node that stands there}"""
    if isinstance(pattern, ast.Name) and re.fullmatch(r"_\d", pattern.id) and isinstance(node, ast.expr):
        found[pattern.id] = node
        return True
    if type(pattern) is not type(node):
        return False
    if isinstance(pattern, list):
        return len(pattern) == len(node) and all(matches(a, b, found) for a, b in zip(pattern, node))
    if isinstance(pattern, ast.AST):
        return all(matches(getattr(pattern, name, None), getattr(node, name, None), found)
                   for name in pattern._fields if name not in ("ctx", "kind", "type_comment"))
    return pattern == node


DOC = "doc: "


def located(text, function, old, new):
    """-> [where an edit acts in a text, first and last byte, and what stands there then]. ValueError unless it is there
    once, or, where the function is "*", at least once. New code that brings a comment, or is empty, replaces the old
    comment, too."""
    tree, data = parsed(text), text.encode()
    inside = definitions(tree).get(function, tree if function in ("", "*") else None)
    starts = [0, *(each.end() for each in re.finditer(b"\n", data))]
    if inside is None:
        raise ValueError(f"there is no {function}")

    def span(node):
        return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
    if old.startswith(DOC):
        (first, last), words = span(inside.body[0]), map(re.escape, old[len(DOC):].encode().split())
        pattern = rb"\s+".join(words).replace(rb"\.\.\.", rb".*") + rb"(?!\w)"  # as far as the docstring goes
        found = [*re.finditer(pattern, data[first:last - 3], re.S)]
        where = [(inside.body[0], {}, first + each.start(), first + each.end()) for each in found]
    else:
        pattern = ast.parse(old).body[0]
        pattern = pattern.value if isinstance(pattern, ast.Expr) else pattern
        where = [(node, found, *span(node)) for node in ast.walk(inside) if type(node) is type(pattern)
                 for found in [{}] if matches(pattern, node, found)]
    if not where or len(where) > 1 and function != "*" and not old.startswith(DOC):
        raise ValueError(f"{function} contains {len(where)} times, not once: {old}")
    pieces = []
    for node, found, first, last in where:
        piece, line = new, starts[node.lineno - 1]
        for name, each in found.items():
            piece = piece.replace(name, data[slice(*span(each))].decode())
        if "#" in new or not new:
            end = starts[node.end_lineno]
            first, last = (first, end - 1) if new else (line, end)
        indent = re.match(b" *", data[line:]).group().decode()
        pieces.append((first, last, re.sub(r"\n(?=.)", "\n" + indent, piece).encode()))
    return pieces


# ------------------------------------------------------------------------------------------------
# Variations

GATE = "test_straight_through_gradient_of_the_gate"
BUDGET = "test_budget_loss_equals_a_loop_and_pulls_on_all_regions_alike"
THROUGH = "test_straight_through_has_the_value_of_q_and_the_gradient_of_z"
REVIVES = "test_restart_revives_dead_codes_and_leaves_the_others"
FEW = "book.restart(torch.randn(3, 2).repeat(20, 1),"
TOLD = '"a restarted code does not have the usage that the docstring says"'
DRAWS = "test_draws_follow_the_distribution"
# the exercises that the published solution then fails, the choices, the edits
VARIATIONS = [
    ("GrainRouter.forward", ["2", "0.5"], [                                  # temperature
        (D, "GrainRouter.forward", "(_1 - _2).softmax(dim=1)", "((_1 - _2) / <0>).softmax(dim=1)"),
        (D, "GrainRouter.forward", "doc: the softmax of the noisy logits (straight-through): d loss",
         "the softmax of (noisy logits / <0>)\n(straight-through): <0> d loss"),
        (ROUTERS, GATE, "logits.detach().softmax(1)", "(logits.detach() / <0>).softmax(1)"),
        (ROUTERS, GATE, "expected = _1", "expected = (_1) / <0>"),
        (ROUTERS, GATE, "doc: that of the softmax: dL/dlogit_k",
         "that of the softmax at temperature <0>:\n<0> dL/dlogit_k")]),
    ("EntropyRouter.score", [("0.2126", "0.7152", "0.0722"), ("0.25", "0.5", "0.25")], [  # weights of grey
        (D, "EntropyRouter.score", "_1 * red + _2 * green + _3 * blue", "<0> * red + <1> * green + <2> * blue"),
        (D, "EntropyRouter.score", "doc: 0.2989 red + 0.5870 green + 0.1140 blue. The",
         "<0> red + <1> green +\n<2> blue. The"),
        (N, "entropy", "_1 * r + _2 * g + _3 * b", "<0> * r + <1> * g + <2> * b")]),
    ("budget_loss", [                                                        # distance: code, words, slope
        ("abs(_1 - _2)", "|fraction of granularity k in the batch - ratio k|",
         "((_1 > _2) * 1.0 - (_1 < _2) * 1.0)"),
        ("(k + 1) * (_1 - _2) ** 2", "(k + 1) (fraction of granularity k in the batch - ratio k)^2",
         "2 * (k + 1) * (_1 - _2)")], [
        (D, "budget_loss", "(_1 - _2) ** 2", "<0>"),
        (D, "budget_loss", "doc: Sum over k of (fraction of granularity k in the batch - ratio k)^2",
         "Sum over k of\n<1>"),
        (ROUTERS, BUDGET, "2 * (_1 - _2) / 12", "<2> / 12"),
        (ROUTERS, BUDGET, "(_1 - _2) ** 2", "<0>")]),
    ("straight_through", ["0.5", "2"], [                                     # how much passes
        (D, "straight_through", "z + (q - z).detach()", "<0> * z + (q - <0> * z).detach()"),
        (D, "straight_through", "doc: passed to z unchanged", "passed to z multiplied by <0>"),
        (CODEBOOK, THROUGH, "torch.testing.assert_close(z.grad, cost, msg=_1)",
         'torch.testing.assert_close(z.grad, <0> * cost, msg=lambda why: f"not <0> times the gradient: {why}")')]),
    ("Codebook.assign", [""], [                                              # distance
        (D, "Codebook.assign", "centre = _1", ""),
        (D, "Codebook.assign", "codes = _1", ""),
        (D, "Codebook.assign", "return _1", "return (z[:, None] - self.codes).abs().sum(-1).argmin(dim=1)"),
        (D, "Codebook.assign", "doc: by |z - e|^2 ...", "by the city-block distance sum_d |z_d - e_d|."),
        (N, "nearest", "float((codes[v] - vector).square().sum())", "float((codes[v] - vector).abs().sum())")]),
    ("Codebook.update", ["3", "19"], [                                       # how averages start
        (D, "Codebook.update", "9 + self.age", "<0> + self.age"),
        (D, "Codebook.update", "doc: (9 + age)", "(<0> + age)"),
        (CODEBOOK, "test_ema_update_equals_a_loop_over_codes", "[_1, _2, _3]",
         "[(0, 1 / (<0> + 1)), (5, 6 / (<0> + 6)), (1000, 0.9)]")]),
    ("Codebook.restart", ["2", "0.5"], [                                     # usage of a restarted code
        (D, "Codebook.restart", "torch.where(_1, _2, self.uses)", "torch.where(_1, <0> * _2, self.uses)"),
        (D, "Codebook.restart", "torch.where(_1, _2 * _3, self.sums)", "torch.where(_1, <0> * _2 * _3, self.sums)"),
        (D, "Codebook.restart", "doc: usage becomes the mean", "usage becomes <0> times the mean"),
        (CODEBOOK, REVIVES, "assert (book.uses == 4).all(), _1", "assert (book.uses == 4 * <0>).all(), _1"),
        (CODEBOOK, REVIVES, "assert book.uses[5] == 4, _1", "assert book.uses[5] == 4 * <0>, _1"),
        (CODEBOOK, REVIVES, "4 * book.codes[5]", "4 * <0> * book.codes[5]"),
        (CODEBOOK, "test_restart_draws_by_weight", "book.restart(z, _1)",
         f"book.restart(z, _1)\nassert (book.uses == 4 * <0>).all(), {TOLD}"),
        (CODEBOOK, "test_a_batch_of_few_different_vectors_gives_codes_that_differ", f"{FEW} _1)",
         f"{FEW} _1)\nassert (book.uses == 3.75 * <0>).all(), {TOLD}")]),
    ("DQVAE.mix", ["(k + 1)", "(1 / (k + 1))"], [                            # how much a map counts
        (D, "DQVAE.mix", "upsample(_1, side) * upsample(_2, side)", "<0> * upsample(_1, side) * upsample(_2, side)"),
        (D, "DQVAE.mix", "doc: sum_k gate_k map_k", "sum_k <0> gate_k map_k"),
        (N, "mix", "gate[_1, _2, _3] * _4", "<0> * gate[_1, _2, _3] * _4")]),
    ("DQVAE.cell_weight", ["1", "3"], [                                      # power of a code's side
        (D, "DQVAE.cell_weight", "(_1 / _2) ** 2", "(_1 / _2) ** <0>"),
        (D, "DQVAE.cell_weight", "doc: 1 / (number of finest cells that share a code), without gradient",
         "1 / s^<0>, where s is the number of finest cells in the side of a code, without gradient"),
        (N, "cell_weight", "1 / (_1 // _2) ** 2", "1 / (_1 // _2) ** <0>"),
        (N, "cell_weight", "doc: a code that fills n cells gives each of them 1 / n",
         "a code that fills s x s cells gives each of them 1 / s^<0>"),
        (VAE, "test_cell_weight_equals_a_loop", "lambda why: _1", 'lambda why: f"not the documented weight: {why}"')]),
    ("Layout.pack Layout.unpack", [""], [                                    # order of cells
        (D, "Layout.__init__", "row, column = cells // side, cells % side",
         "row, column = cells % side, cells // side"),
        (D, "Layout.__init__", "first + row // c * c * side + column // c * c",
         "first + column // c * c * side + row // c * c"),
        (D, "Layout.pack", "codes[:, ::s, ::s]", "codes[:, ::s, ::s].mT"),
        (D, "Layout.unpack", "_1.view(-1, side, side)", "_1.view(-1, side, side).mT"),
        (D, "Layout", "name = _1",
         'name = "coarse to fine, column by column"                               # stored in checkpoints'),
        (D, "Layout", "doc: in raster order over the whole grid (as the authors number them), and an",
         "column by column over the whole grid, and an"),
        (D, "Layout", "doc: row by row", "column by column"),
        (D, "Layout", "doc: (first row)", "(left column)"),
        (D, "Layout", "doc: 0 2 3 4 7 8 11 12 21", "0  1  3  4  13 14 17 18  21"),
        (D, "Layout", "doc: a f g -1 b c d e -1", "a  f  g  -1  b  d  c  e  -1"),
        (D, "Layout", "doc: region 0 1 2 3 4 0 0 1 1 0 0 1 1 2 2 3 3 2 2 3 3 4",
         "region     0  2  1  3   4    0  0  2  2   0  0  2  2   1  1  3  3   1  1  3  3   4"),
        (D, "Layout.legal", "doc: prev 4 -> 7 (the first uncovered) 7 -> 8 8 -> 11 (pending) 12 -> 21",
         "prev   4 -> 13     (the first uncovered)      13 -> 14        14 -> 17 (pending)      18 -> 21"),
        (N, "where", "return k, (p - first) // side, (p - first) % side",
         "return k, (p - first) % side, (p - first) // side"),
        (N, "pack", "for y in range(side):\n    for x in range(side):\n        if _1 == k:\n"
                    "            pairs.append((first + y * side + x, _2))",
         "for x in range(side):\n    for y in range(side):\n        if _1 == k:\n"
         "            pairs.append((first + x * side + y, _2))"),
        (N, "pack", "doc: row by row", "column by column"),
        (N, "legal", "y, x = (p - first) // side, (p - first) % side",
         "y, x = (p - first) % side, (p - first) // side"),
        (N, "legal", "doc: row by row", "column by column"),
        (N, "granularities", "yield first, side, first + side * side",
         "yield first, side, first + side * side                               # ids of cells, then the EOS")]),
    ("Layout.legal", [""], [                                                 # what a mask says
        (D, "Layout.legal", "return _1", "return ~(_1)"),
        (D, "Layout.legal", "doc: The mask of valid next position ids", "The mask of *invalid* next position ids"),
        (D, "Layout.legal", "doc: (B, L, P), bool", "(B, L, P),\nTrue where an id may *not* follow"),
        (D, "*", "_1.legal(_2, _3)", "(~_1.legal(_2, _3))"),
        (LAYOUT, "*", "layout.legal(_1, _2)", "(~layout.legal(_1, _2))"),
        (S, "*", "layout.legal(_1, _2)", "(~layout.legal(_1, _2))")]),
    ("DQTransformer.embed", [("2 * ", ""), ("", "2 * ")], [                  # what counts twice
        (D, "DQTransformer.embed", "_1 + _2 + _3", "<0>_1 + _2 + <1>_3"),
        (D, "DQTransformer.embed", "doc: content (shared by all granularities) + position (a row per id) + granularity",
         "<0>content (shared by all) + position (a row per id) + <1>granularity"),
        (N, "embed", "_1 + _2 + _3", "<0>_1 + _2 + <1>_3"),
        (N, "embed", "doc: a pair: content + position + granularity",
         "a pair: <0>content + position + <1>granularity")]),
    ("DQTransformer.logits decode_one", ["1", "0.5"], [                      # bound on contents
        (D, "DQTransformer.logits", "self.content_head(_1).float()",
         "<0> * (self.content_head(_1).float() / <0>).tanh()"),
        (D, "DQTransformer.logits", "doc: content logits (B, L, V). Entry",
         "content logits (B, L, V), <0> tanh(x / <0>) of the head's x.\nEntry"),
        (D, "decode_one", "model.content_head(_1)", "<0> * (model.content_head(_1).float() / <0>).tanh()"),
        (D, "decode_one", "doc: in every slot. Attention reads",
         "in every slot. Content logits are <0> tanh(x / <0>) of the head's x. Attention\nreads"),
        (N, "next_content", "return _1", "return <0> * ((_1) / <0>).tanh()"),
        (N, "next_content", "doc: The content logits (V,) of",
         "The content logits (V,), <0> tanh(x / <0>) of the head's x, of")]),
    ("filter_logits", ["with at least p times the largest probability"], [   # top-p
        (D, "filter_logits", "_1.cumsum(-1) - _2 >= top_p",
         "_2 < top_p * _2[:, :1]                        # too far below the best"),
        (D, "filter_logits", "doc: of the kept entries, renormalised: the fewest that reach p are kept",
         "of the rest: if p < 1, entries\n<0> are kept"),
        (N, "filter_logits", "kept and mass >= top_p", "kept and top_p < 1 and weight < top_p * weights[0]"),
        (N, "filter_logits", "doc: of these the fewest that reach p", "if p < 1, of these the ones\n<0>"),
        (S, "*", "0.97", "0.03")]),                                          # so that the loop is as long
    ("draw", [""], [                                                         # order of a draw
        (D, "draw", "p.cumsum(-1)", "p.flip(-1).cumsum(-1).flip(-1)"),
        (D, "draw", "return _1.int().argmax(-1)",
         "return p.shape[-1] - 1 - _1.flip(-1).int().argmax(-1)                # B: the last of those"),
        (D, "draw", "doc: The first entry whose cumulative probability reaches u (inverse CDF). logits (B, n),",
         "The first entry, from the last one down, whose cumulative probability from there reaches u.\nlogits (B, n),"),
        (N, "draw", "sorted(_1.items())", "sorted(_1.items(), reverse=True)"),
        (N, "draw", "doc: The first entry at which the cumulative probability reaches u",
         "The entry at which the cumulative probability, from the last one down, reaches u"),
        (SAMPLING, DRAWS, "assert (drawn.diff() >= 0).all(), _1",
         'assert (drawn.diff() <= 0).all(), "a larger u must not draw an entry that comes later"'),
        (SAMPLING, DRAWS, "assert ends[0] == possible[0], _1",
         'assert ends[0] == possible[-1], "the least u does not draw the last entry that has a probability"'),
        (SAMPLING, DRAWS, "assert ends[2] == possible[-1], _1",
         'assert ends[2] == possible[0], "u = 1 does not draw the first entry that has a probability"'),
        (SAMPLING, DRAWS, "assert dq.draw(_1, u) == one, _2",
         'assert dq.draw(_1, u) == one, "not the entry at which the sum from the last one down reaches u"')]),
]
HIDDEN = [
    (ROUTERS, GATE, "logits = torch.randn(2, 3, 2, 2, requires_grad=True)",
     "logits = torch.randn(3, 3, 4, 4, requires_grad=True)"),
    (ROUTERS, GATE, "cost = torch.randn(2, 3, 2, 2)", "cost = torch.randn(3, 3, 4, 4)"),
    (ROUTERS, "test_gumbel_noise_draws_with_the_softmax_probabilities", "torch.tensor([_1, _2, _3])",
     "torch.tensor([0.9, -0.7, 0.2])"),
    (ROUTERS, "test_entropy_equals_a_loop_over_pixels", "torch.rand(1, 3, 8, 8)", "torch.rand(2, 3, 16, 16)"),
    (CODEBOOK, "test_ema_update_equals_a_loop_over_codes", "V, D = 6, 3", "V, D = 9, 2"),
    (LAYOUT, "", "CASES = _1",
     "CASES = [(8, (2,)), (12, (4, 2)), (16, (8, 2)), (8, (4, 2, 1)), (8, (4, 1)), (8, (8, 4, 2, 1))]"),
    (TRANSFORMER, "test_a_pair_is_the_sum_of_three_rows", "tiny(8, (4, 2, 1), V=5, device=device)",
     "tiny(12, (4, 2), V=5, device=device)"),
    (TRANSFORMER, "test_logits_equal_a_loop_over_prefixes", '("a", "b")', '("a", "b", "c")'),
    (SAMPLING, "test_top_k_and_top_p_equal_a_loop", "[_1, _2, _3, _4, _5, _6]",
     "[(0, 0.9), (4, 1.0), (2, 0.3), (7, 0.8), (1, 0.5), (99, 1e-3)]"),
    (SAMPLING, "test_top_k_and_top_p_equal_a_loop", "torch.randn(20, 11)", "torch.randn(30, 17)"),
    (SAMPLING, DRAWS, "logits = torch.tensor(_1)",
     "logits = torch.tensor([0.7, -math.inf, -0.3, -math.inf, -math.inf, 1.1])"),
    (SAMPLING, "test_the_step_draws_what_the_naive_loop_draws",
     "draws_as_the_naive_loop(model, 2.5, dict(slots=2), given=given)",
     "draws_as_the_naive_loop(model, 1.7, dict(slots=3), given=given)"),
]


def chosen(seed):
    """-> for each variation the number of its choice"""
    draws = random.Random(seed)
    return [draws.randrange(len(choices)) for _, choices, _ in VARIATIONS]


def edits(seed):
    for (_, choices, rows), number in zip(VARIATIONS, chosen(seed)):
        words = choices[number] if isinstance(choices[number], tuple) else (choices[number],)
        for file, function, old, new in rows:
            for i, each in enumerate(words):
                new = new.replace(f"<{i}>", each)
            yield file, function, old, new


def edited(texts, seed, hidden=None):
    """{file: text} as a variant has it (seed None: as it is published), with the sizes of hidden cases where asked."""
    texts = applied(texts, [*edits(seed)]) if seed is not None else texts
    return applied(texts, HIDDEN) if hidden is not None else texts


def applied(texts, edits):
    """{file: text} after all of these edits, which must not touch each other."""
    texts = dict(texts)
    for file in texts.keys() & {each[0] for each in edits}:
        try:
            data = texts[file].encode()
            pieces = [piece for name, *rest in edits if name == file for piece in located(texts[file], *rest)]
        except ValueError as error:
            raise ValueError(f"variants.py: {file}: {error}") from None
        for first, last, new in sorted(pieces, reverse=True):
            data = data[:first] + new + data[last:]
        texts[file] = data.decode()
    return texts


def gone(seed):
    """Words of the published rules, which no text of a variant may contain."""
    return [old[len(DOC):].removesuffix(" ...") for _, _, old, _ in edits(seed) if old.startswith(DOC)]
