"""Other specifications of the same exercises, for a course that grades: the published solutions fail them.

A variation has one or more choices, none of which is the published specification. A variant takes one choice of each
variation, by its seed. A choice is a list of edits, so that solution, docstrings, naive loops, tests and pages change
together:
    (file, function, old code, new code)    compared as syntax trees: comments and line breaks don't matter. Names _1,
                                            _2, ... stand for any expression, and in the new code for what it was.
                                            Function "*": everywhere in the file
    (file, function, "doc: words", words)   in a docstring, wherever its lines break. No text of the variant may contain
                                            the old words

HIDDEN are other sizes for the same tests; other seeds go with them. Whoever has this file can solve a variant, just as
whoever has dq.py can solve the exercises. A course that fears this adds variations of its own to a private copy.
"""
import ast
import functools
import random
import re

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


parse = functools.lru_cache(512)(ast.parse)
DOC = "doc: "


def part(tree, name):
    """The class, method or function of this name, or the module; None if there is none."""
    for each in filter(None, name.split(".")):
        tree = next((node for node in tree.body if getattr(node, "name", "") == each), None) if tree else None
    return tree


def located(text, function, old, new):
    """-> [where an edit acts in a text, first and last byte, and what stands there then]. ValueError unless it is there
    once, or, where the function is "*", at least once. New code that brings a comment, or is empty, replaces the old
    comment, too."""
    inside, data = part(parse(text), function.strip("*")), text.encode()
    starts = [0, *(each.end() for each in re.finditer(b"\n", data))]
    if inside is None:
        raise ValueError(f"there is no {function}")

    def span(node):
        return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
    if old.startswith(DOC):
        (first, last), words = span(inside.body[0]), map(re.escape, old[len(DOC):].encode().split())
        found = [*re.finditer(rb"\s+".join(words), data[first:last])]
        where = [(inside.body[0], {}, first + each.start(), first + each.end()) for each in found]
    else:
        pattern = parse(old).body[0]
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
# Choices


def temperature(T):
    test = "test_straight_through_gradient_of_the_gate"
    return [
        (D, "GrainRouter.forward", "(_1 - _2).softmax(dim=1)", f"((_1 - _2) / {T}).softmax(dim=1)"),
        (D, "GrainRouter.forward", "doc: the softmax of the noisy logits (straight-through): d loss",
         f"the softmax of (noisy logits / {T})\n(straight-through): {T} d loss"),
        (ROUTERS, test, "logits.detach().softmax(1)", f"(logits.detach() / {T}).softmax(1)"),
        (ROUTERS, test, "expected = _1", f"expected = (_1) / {T}"),
        (ROUTERS, test, "doc: that of the softmax: dL/dlogit_k",
         f"that of the softmax at temperature {T}:\n{T} dL/dlogit_k")]


def grey(red, green, blue):
    return [
        (D, "EntropyRouter.score", "_1 * red + _2 * green + _3 * blue",
         f"{red} * red + {green} * green + {blue} * blue"),
        (D, "EntropyRouter.score", "doc: 0.2989 red + 0.5870 green + 0.1140 blue. The",
         f"{red} red + {green} green +\n{blue} blue. The"),
        (N, "entropy", "_1 * r + _2 * g + _3 * b", f"{red} * r + {green} * g + {blue} * b")]


def budget(code, words, slope):
    """code, slope: with _1 for the fraction and _2 for the ratio"""
    test = "test_budget_loss_equals_a_loop_and_pulls_on_all_regions_alike"
    return [
        (D, "budget_loss", "(_1 - _2) ** 2", code),
        (D, "budget_loss", "doc: Sum over k of (fraction of granularity k in the batch - ratio k)^2",
         f"Sum over k of\n{words}"),
        (ROUTERS, test, "2 * (_1 - _2) / 12", f"{slope} / 12"),
        (ROUTERS, test, "(_1 - _2) ** 2", code)]


def passed_on(S):
    test = "test_straight_through_has_the_value_of_q_and_the_gradient_of_z"
    return [
        (D, "straight_through", "z + (q - z).detach()", f"{S} * z + (q - {S} * z).detach()"),
        (D, "straight_through", "doc: passed to z unchanged", f"passed to z multiplied by {S}"),
        (CODEBOOK, test, "torch.testing.assert_close(z.grad, cost, msg=_1)",
         f'torch.testing.assert_close(z.grad, {S} * cost, msg=lambda why: f"not {S} times the gradient: {{why}}")')]


def city_block():
    return [
        (D, "Codebook.assign", "centre = _1", ""),
        (D, "Codebook.assign", "codes = _1", ""),
        (D, "Codebook.assign", "return _1", "return (z[:, None] - self.codes).abs().sum(-1).argmin(dim=1)"),
        (D, "Codebook.assign", "doc: by |z - e|^2 without |z|^2, the same for every code",
         "by the city-block distance sum_d |z_d - e_d|"),
        (N, "nearest", "float((codes[v] - vector).square().sum())", "float((codes[v] - vector).abs().sum())")]


def decay(c):
    return [
        (D, "Codebook.update", "9 + self.age", f"{c} + self.age"),
        (D, "Codebook.update", "doc: decay n / (9 + n)", f"decay n / ({c} + n)"),
        (CODEBOOK, "test_ema_update_equals_a_loop_over_codes", "[_1, _2, _3]",
         f"[(0, 1 / {c + 1}), (5, 6 / {c + 6}), (1000, 0.9)]")]


def fresh_uses(f):
    revives = "test_restart_revives_dead_codes_and_leaves_the_others"
    few = "book.restart(torch.randn(3, 2).repeat(20, 1),"
    told = '"a restarted code does not have the usage that the docstring says"'
    return [
        (D, "Codebook.restart", "torch.where(_1, _2, self.uses)", f"torch.where(_1, {f} * _2, self.uses)"),
        (D, "Codebook.restart", "torch.where(_1, _2 * _3, self.sums)", f"torch.where(_1, {f} * _2 * _3, self.sums)"),
        (D, "Codebook.restart", "doc: usage becomes the mean", f"usage becomes {f} times the mean"),
        (CODEBOOK, revives, "assert (book.uses == 4).all(), _1", f"assert (book.uses == 4 * {f}).all(), _1"),
        (CODEBOOK, revives, "assert book.uses[5] == 4, _1", f"assert book.uses[5] == 4 * {f}, _1"),
        (CODEBOOK, revives, "4 * book.codes[5]", f"4 * {f} * book.codes[5]"),
        (CODEBOOK, "test_restart_draws_by_weight", "book.restart(z, _1)",
         f"book.restart(z, _1)\nassert (book.uses == 4 * {f}).all(), {told}"),
        (CODEBOOK, "test_a_batch_of_few_different_vectors_gives_codes_that_differ", f"{few} _1)",
         f"{few} _1)\nassert (book.uses == 3.75 * {f}).all(), {told}")]


def scaled_maps(W):
    return [
        (D, "DQVAE.mix", "upsample(_1, side) * upsample(_2, side)", f"{W} * upsample(_1, side) * upsample(_2, side)"),
        (D, "DQVAE.mix", "doc: sum_k gate_k map_k", f"sum_k {W} gate_k map_k"),
        (N, "mix", "gate[_1, _2, _3] * _4", f"{W} * gate[_1, _2, _3] * _4")]


def turned_gate(g):
    test = "test_cell_weight_equals_a_loop"
    return [
        (D, "DQVAE.cell_weight", "gate.detach()[_1]", f"({g} * gate + {1 - g} * gate.detach())[:, k:k + 1]"),
        (D, "DQVAE.cell_weight", "doc: 1 / (number of finest cells that share a code), without gradient",
         f"1 / cells_k, where cells_k is the number of finest cells that share a code. The gate gets {g} times\n"
         "the gradient of gate_k / cells_k, summed over k"),
        (VAE, test, "assert not weight.requires_grad, _1", f"""\
gate = one_hot(grains, 3).requires_grad_()
model.cell_weight(gate).sum().backward()
assert gate.grad is not None, "no gradient reaches the gate through the weights"
for k, cells in enumerate((1, 4, 16)):
    torch.testing.assert_close(gate.grad[:, k], torch.full_like(gate.grad[:, k], {g} * cells), msg=lambda why: (
        f"through the weights, the gate gets another gradient than {g} times theirs: {{why}}"))""")]


def column_by_column():
    words = "doc: row by row", "column by column"
    return [
        (D, "Layout.__init__", "row, column = cells // side, cells % side",
         "row, column = cells % side, cells // side"),
        (D, "Layout.__init__", "first + row // c * c * side + column // c * c",
         "first + column // c * c * side + row // c * c"),
        (D, "Layout.pack", "codes[:, ::step, ::step]", "codes[:, ::step, ::step].mT"),
        (D, "Layout.unpack", "_1.view(-1, side, side)", "_1.view(-1, side, side).mT"),
        (D, "Layout", "name = _1",
         'name = "coarse to fine, column by column"                               # stored in checkpoints'),
        (D, "Layout", "doc: in raster order over the whole grid (as the authors number them). One",
         "column by column over the whole grid.\nOne"),
        (D, "Layout", *words),
        (D, "Layout", "doc: (first row)", "(left column)"),
        (D, "Layout", "doc: 0 2 3 4 7 8 11 12 21", "0  1  3  4  13 14 17 18  21"),
        (D, "Layout", "doc: a f g -1 b c d e -1", "a  f  g  -1  b  d  c  e  -1"),
        (D, "Layout", "doc: region 0 1 2 3 4 0 0 1 1 0 0 1 1 2 2 3 3 2 2 3 3 4",
         "region     0  2  1  3   4    0  0  2  2   0  0  2  2   1  1  3  3   1  1  3  3   4"),
        (D, "Layout.legal", "doc: 4 -> 7 (the first hole) 7 -> 8 8 -> 11 (pending) 12 -> 21",
         "4 -> 13    (the first hole)          13 -> 14      14 -> 17 (pending)     18 -> 21"),
        (N, "where", "return k, (p - first) // side, (p - first) % side",
         "return k, (p - first) % side, (p - first) // side"),
        (N, "pack", "for y in range(side):\n    for x in range(side):\n        if _1 == k:\n"
                    "            pairs.append((first + y * side + x, _2))",
         "for x in range(side):\n    for y in range(side):\n        if _1 == k:\n"
         "            pairs.append((first + x * side + y, _2))"),
        (N, "pack", *words),
        (N, "legal", "y, x = (p - first) // side, (p - first) % side",
         "y, x = (p - first) % side, (p - first) // side"),
        (N, "legal", *words),
        (N, "granularities", "yield first, side, first + side * side",
         "yield first, side, first + side * side                               # ids of cells, then the EOS")]


def forbidden():
    return [
        (D, "Layout.legal", "return _1", "return ~(_1)"),
        (D, "Layout.legal", "doc: The mask of valid next position ids", "The mask of *invalid* next position ids"),
        (D, "Layout.legal", "doc: (B, L, P), bool", "(B, L, P),\nTrue where an id may *not* follow"),
        (D, "*", "_1.legal(_2, _3)", "(~_1.legal(_2, _3))"),
        (LAYOUT, "*", "layout.legal(_1, _2)", "(~layout.legal(_1, _2))"),
        (S, "*", "layout.legal(_1, _2)", "(~layout.legal(_1, _2))")]


def double(a, b):
    """a: in front of the content, b: in front of the granularity, in the sum that embeds a pair"""
    return [
        (D, "DQTransformer.embed", "_1 + _2 + _3", f"{a}_1 + _2 + {b}_3"),
        (D, "DQTransformer.embed", "doc: content (shared by all granularities) + position (a row per id) + granularity",
         f"{a}content (shared by all) + position (a row per id) + {b}granularity"),
        (N, "embed", "_1 + _2 + _3", f"{a}_1 + _2 + {b}_3"),
        (N, "embed", "doc: a pair: content + position + granularity",
         f"a pair: {a}content + position + {b}granularity")]


def capped(c):
    words = f"{c} tanh(x / {c}) of the head's x"
    return [
        (D, "DQTransformer.logits", "self.content_head(_1).float()",
         f"{c} * (self.content_head(_1).float() / {c}).tanh()"),
        (D, "DQTransformer.logits", "doc: content logits (B, L, V). Entry",
         f"content logits (B, L, V), {words}.\nEntry"),
        (D, "decode_one", "model.content_head(_1)", f"{c} * (model.content_head(_1).float() / {c}).tanh()"),
        (D, "decode_one", "doc: in every slot. Attention reads",
         f"in every slot. Content logits are {words}. Attention\nreads"),
        (N, "next_content", "return _1", f"return {c} * ((_1) / {c}).tanh()"),
        (N, "next_content", "doc: The content logits (V,) of", f"The content logits (V,), {words}, of")]


def least_share():
    words = "with at least p times the largest probability"
    return [
        (D, "filter_logits", "_1.cumsum(-1) - _2 >= top_p",
         "_2 < top_p * _2[:, :1]                        # too far below the best"),
        (D, "filter_logits", "doc: of the renormalised rest: the fewest entries that reach p are kept",
         f"of the rest: if p < 1, entries\n{words} are kept"),
        (N, "filter_logits", "kept and mass >= top_p", "kept and top_p < 1 and weight < top_p * weights[0]"),
        (N, "filter_logits", "doc: of these the fewest that reach p", f"if p < 1, of these the ones\n{words}")]


def from_the_end():
    test = "test_draws_follow_the_distribution"
    return [
        (D, "draw", "p.cumsum(-1)", "p.flip(-1).cumsum(-1).flip(-1)"),
        (D, "draw", "return _1.int().argmax(-1)",
         "return p.shape[-1] - 1 - _1.flip(-1).int().argmax(-1)                # B: the last of those"),
        (D, "draw", "doc: The first entry whose cumulative probability reaches u (inverse CDF). logits (B, n),",
         "The first entry, from the last one down, whose cumulative probability from there reaches u.\nlogits (B, n),"),
        (N, "draw", "sorted(_1.items())", "sorted(_1.items(), reverse=True)"),
        (N, "draw", "doc: The first entry at which the cumulative probability reaches u",
         "The entry at which the cumulative probability, from the last one down, reaches u"),
        (SAMPLING, test, "assert (drawn.diff() >= 0).all(), _1",
         'assert (drawn.diff() <= 0).all(), "a larger u must not draw an entry that comes later"'),
        (SAMPLING, test, "assert ends[0] == possible[0], _1",
         'assert ends[0] == possible[-1], "the least u does not draw the last entry that has a probability"'),
        (SAMPLING, test, "assert ends[2] == possible[-1], _1",
         'assert ends[2] == possible[0], "u = 1 does not draw the first entry that has a probability"'),
        (SAMPLING, test, "assert dq.draw(_1, u) == one, _2",
         'assert dq.draw(_1, u) == one, "not the entry at which the sum from the last one down reaches u"')]


# what varies, the exercises that the published solution then fails, the choices
VARIATIONS = [
    ("temperature of the gate", ["GrainRouter.forward"], [temperature(2), temperature(0.5)]),
    ("weights of grey", ["EntropyRouter.score"], [
        grey(0.2126, 0.7152, 0.0722), grey(0.25, 0.5, 0.25), grey(0.6, 0.3, 0.1)]),
    ("distance from the budget", ["budget_loss"], [
        budget("abs(_1 - _2)", "|fraction of granularity k in the batch - ratio k|",
               "((_1 > _2) * 1.0 - (_1 < _2) * 1.0)"),
        budget("(k + 1) * (_1 - _2) ** 2", "(k + 1) (fraction of granularity k in the batch - ratio k)^2",
               "2 * (k + 1) * (_1 - _2)")]),
    ("how much passes straight through", ["straight_through"], [passed_on(0.5), passed_on(2)]),
    ("what is nearest", ["Codebook.assign"], [city_block()]),
    ("how averages start", ["Codebook.update"], [decay(3), decay(19)]),
    ("uses of a code that starts again", ["Codebook.restart"], [fresh_uses(2), fresh_uses(0.5)]),
    ("how much a map counts", ["DQVAE.mix"], [scaled_maps("(k + 1)"), scaled_maps("(1 / (k + 1))")]),
    ("gradient of the weights", ["DQVAE.cell_weight"], [turned_gate(1), turned_gate(0.5)]),
    ("numbers of cells", ["Layout.pack", "Layout.unpack"], [column_by_column()]),
    ("what a mask says", ["Layout.legal"], [forbidden()]),
    ("sum of a pair", ["DQTransformer.embed"], [double("2 * ", ""), double("", "2 * ")]),
    ("logits of contents", ["DQTransformer.logits", "decode_one"], [capped(1), capped(0.5)]),
    ("top-p", ["filter_logits"], [least_share()]),
    ("order of a draw", ["draw"], [from_the_end()]),
]
GATE = "test_straight_through_gradient_of_the_gate"
BUDGET = "test_budget_loss_equals_a_loop_and_pulls_on_all_regions_alike"
HIDDEN = [
    (ROUTERS, GATE, "logits = torch.randn(2, 3, 2, 2, requires_grad=True)",
     "logits = torch.randn(3, 3, 4, 4, requires_grad=True)"),
    (ROUTERS, GATE, "cost = torch.randn(2, 3, 2, 2)", "cost = torch.randn(3, 3, 4, 4)"),
    (ROUTERS, "test_gumbel_noise_draws_with_the_softmax_probabilities", "torch.tensor([_1, _2, _3])",
     "torch.tensor([0.9, -0.7, 0.2])"),
    (ROUTERS, "test_entropy_equals_a_loop_over_pixels", "torch.rand(1, 3, 8, 8)", "torch.rand(2, 3, 16, 16)"),
    (ROUTERS, BUDGET, "torch.randint(0, K, (3, 2, 2))", "torch.randint(0, K, (2, 3, 2))"),
    (ROUTERS, BUDGET, "torch.full((3, 2, 2), _1)", "torch.full((2, 3, 2), _1)"),
    (CODEBOOK, "test_straight_through_has_the_value_of_q_and_the_gradient_of_z", "z, q, cost = _1",
     "z, q, cost = torch.randn(7, 2, 4, requires_grad=True), torch.randn(7, 2, 4), torch.randn(7, 2, 4)"),
    (CODEBOOK, "test_ema_update_equals_a_loop_over_codes", "V, D = 6, 3", "V, D = 9, 2"),
    (VAE, "test_cell_weight_equals_a_loop", "torch.randint(0, 3, (2, 2, 2))", "torch.randint(0, 3, (4, 2, 2))"),
    (VAE, "test_cell_weight_equals_a_loop", "weight.shape == (2, 8, 8)", "weight.shape == (4, 8, 8)"),
    (LAYOUT, "", "CASES = _1",
     "CASES = [(8, (2,)), (12, (4, 2)), (16, (8, 2)), (8, (4, 2, 1)), (8, (4, 1)), (8, (8, 4, 2, 1))]"),
    (TRANSFORMER, "test_a_pair_is_the_sum_of_three_rows", "tiny(8, (4, 2, 1), V=5, device=device)",
     "tiny(12, (4, 2), V=5, device=device)"),
    (TRANSFORMER, "test_logits_equal_a_loop_over_prefixes", '("a", "b")', '("a", "b", "c")'),
    (SAMPLING, "test_top_k_and_top_p_equal_a_loop", "[_1, _2, _3, _4, _5, _6]",
     "[(0, 0.9), (4, 1.0), (2, 0.3), (7, 0.8), (1, 0.5), (99, 1e-3)]"),
    (SAMPLING, "test_top_k_and_top_p_equal_a_loop", "torch.randn(20, 11)", "torch.randn(30, 17)"),
    (SAMPLING, "test_draws_follow_the_distribution", "logits = torch.tensor(_1)",
     "logits = torch.tensor([0.7, -math.inf, -0.3, -math.inf, -math.inf, 1.1])"),
    (SAMPLING, "test_the_step_draws_what_the_naive_loop_draws",
     "draws_as_the_naive_loop(model, 2.5, dict(slots=2), given=given)",
     "draws_as_the_naive_loop(model, 1.7, dict(slots=3), given=given)"),
]


def chosen(seed):
    """-> for each variation the number of its choice"""
    draws = random.Random(seed)
    return [draws.randrange(len(choices)) for _, _, choices in VARIATIONS]


def edits(seed):
    return [each for number, (_, _, choices) in zip(chosen(seed), VARIATIONS) for each in choices[number]]


def edited(texts, seed, hidden=None):
    """{file: text} as a variant has it (seed None: as it is published), with the sizes of hidden cases where asked."""
    texts = applied(texts, edits(seed)) if seed is not None else texts
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
    return [old[len(DOC):] for _, _, old, _ in edits(seed) if old.startswith(DOC)]
