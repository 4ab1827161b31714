r"""Other specifications of the same exercises, for a course that grades: the published solutions fail them.

A variation has one or more choices, none of which is the published specification. A variant takes one choice of each
variation, by its seed. A choice is a list of edits, so that solution, docstrings, naive loops, tests and pages change
together:
    (file, function, old code, new code)    compared as syntax trees: comments and line breaks don't matter. Names _1,
                                            _2, ... stand for any expression, and in the new code for what it was.
                                            Function "*": everywhere in the file
    (file, function, None, text)            a new docstring
    (GONE, pattern)                         words of the published rule, which no text of the variant may contain

HIDDEN are other sizes for the same tests; other seeds go with them. Whoever has this file can solve a variant, just as
whoever has dq.py can solve the exercises. A course that fears this adds variations of its own to a private copy.
"""
import ast
import functools
import random
import re
import textwrap

D, N, S, GONE = "dq.py", "tests/naive.py", "tests/course/test_speed.py", "gone"
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
    if old is None:
        filled = [each if "\n " in each else textwrap.fill(each, 112) for each in new.split("\n\n")]
        where, new = [(inside.body[0], {})] * bool(ast.get_docstring(inside)), '"""' + "\n\n".join(filled) + '"""'
    else:
        pattern = parse(old).body[0]
        pattern = pattern.value if isinstance(pattern, ast.Expr) else pattern
        where = [(node, found) for node in ast.walk(inside) if type(node) is type(pattern)
                 for found in [{}] if matches(pattern, node, found)]
    if not where or len(where) > 1 and function != "*":
        raise ValueError(f"{function} contains {len(where)} times, not once: {old or 'a docstring'}")
    pieces = []
    for node, found in where:
        piece, line, (first, last) = new, starts[node.lineno - 1], span(node)
        for name, each in found.items():
            piece = piece.replace(name, data[slice(*span(each))].decode())
        if old is not None and ("#" in new or not new):
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
        (D, "GrainRouter.forward", None, f"""\
In training a sample (hard Gumbel-softmax, its noise scaled by `noise`), otherwise the argmax. The output is exactly
one-hot. It multiplies the maps (DQVAE.mix), so c_k = d loss / d gate_k says what a move of the region towards
granularity k would do. Backward sees p, the softmax of (noisy logits / {T}), by a straight-through gradient:
{T} d loss / d logit_k = p_k (c_k - sum_j p_j c_j). The noise must fade before training ends, or the *sampled* ratio
meets the budget while that of the *argmax* does not."""),
        (ROUTERS, test, "logits.detach().softmax(1)", f"(logits.detach() / {T}).softmax(1)"),
        (ROUTERS, test, "expected = _1", f"expected = (_1) / {T}"),
        (ROUTERS, test, None, f"Forward is one-hot. Backward is the softmax's at temperature {T}, in all terms."),
        (GONE, r"dL/dlogit_k = p_k \(c_k - sum_j")]


def grey(red, green, blue):
    return [
        (D, "EntropyRouter.score", "_1 * red + _2 * green + _3 * blue",
         f"{red} * red + {green} * green + {blue} * blue"),
        (D, "EntropyRouter.score", None, f"""\
x: (B, 3, S, S) in [-1, 1] -> entropy of each region in nats (B, h, w). Grey is {red} red + {green} green +
{blue} blue. There are 32 bins, linspace(-1, 1, 32). Each bin weighs a pixel by a Gaussian of deviation 0.01."""),
        (N, "entropy", "_1 * r + _2 * g + _3 * b", f"{red} * r + {green} * g + {blue} * b"),
        (GONE, r"0\.2989|0\.587|0\.114")]


def budget(code, words, slope):
    """code, slope: with _1 for the fraction and _2 for the ratio"""
    test = "test_budget_loss_equals_a_loop_and_pulls_on_all_regions_alike"
    return [
        (D, "budget_loss", "(_1 - _2) ** 2", code),
        (D, "budget_loss", None, f"""\
Sum over k of {words}. Images may differ, but not the data
set from its budget. gate: (B, K, h, w), one-hot; ratios: K target fractions -> scalar"""),
        (ROUTERS, test, "2 * (_1 - _2) / 12", f"{slope} / 12"),
        (ROUTERS, test, "(_1 - _2) ** 2", code),
        (GONE, r"over k of \(")]


def passed_on(S):
    test = "test_straight_through_has_the_value_of_q_and_the_gradient_of_z"
    return [
        (D, "straight_through", "z + (q - z).detach()", f"{S} * z + (q - {S} * z).detach()"),
        (D, "straight_through", None, f"Returns q, whose gradient goes to z times {S}: nearest codes have none."),
        (CODEBOOK, test, "torch.testing.assert_close(z.grad, cost, msg=_1)",
         f'torch.testing.assert_close(z.grad, {S} * cost, msg=lambda why: f"not {S} times the gradient: {{why}}")'),
        (GONE, "unchanged")]


def nearest(code, words, key, words_gone):
    return [
        (D, "Codebook.assign", "centre = _1", ""),
        (D, "Codebook.assign", "codes = _1", ""),
        (D, "Codebook.assign", "return _1", code),
        (D, "Codebook.assign", None, f"z: (M, D) -> ids of the nearest codes (M,), {words}."),
        (N, "nearest", "float((codes[v] - vector).square().sum())", key),
        (GONE, words_gone)]


def city_block():
    return nearest(
        "return (z[:, None] - self.codes).abs().sum(-1).argmin(dim=1)", "by the city-block distance sum_d |z_d - e_d|",
        "float((codes[v] - vector).abs().sum())", r"\|z - e\|")


def later_ties():
    test = "test_nearest_code_equals_a_loop"
    return nearest(
        "distance = self.codes.square().sum(1) - 2 * z @ self.codes.t()           # M, V\n"
        "return len(self.codes) - 1 - distance.flip(1).argmin(dim=1)",
        "by |z - e|^2; among equally near codes the last",
        "(float((codes[v] - vector).square().sum()), -v)", r"\|z\|\^2, the same") + [
        (CODEBOOK, test, "torch.randn(50, 3)", "torch.randint(-2, 3, (50, 3)).float()"),
        (CODEBOOK, test, "book.codes.copy_(_1)", "book.codes.copy_(torch.randint(-2, 3, (7, 3)))  # many ties"),
        (CODEBOOK, test, "assert i == naive.nearest(_1, _2), _3",
         'assert i == naive.nearest(_1, _2), "a vector gets a code that is not the last of the nearest ones"')]


def decay(c):
    return [
        (D, "Codebook.update", "9 + self.age", f"{c} + self.age"),
        (D, "Codebook.update", None, f"""\
Online k-means: a code moves to sums / uses, which are moving averages over batches of the vectors that chose it, since
the encoder moves. The averages are short at first (decay n / ({c} + n) in batch n, up to self.decay), or they would lag
behind an encoder that has just begun to learn. It first adds 1 to `age`. z: (M, D); weight, ids: (M,)"""),
        (CODEBOOK, "test_ema_update_equals_a_loop_over_codes", "[_1, _2, _3]",
         f"[(0, 1 / {c + 1}), (5, 6 / {c + 6}), (1000, 0.9)]"),
        (GONE, r"\b9 \+ ")]


def fresh_uses(f, words):
    revives = "test_restart_revives_dead_codes_and_leaves_the_others"
    few = "book.restart(torch.randn(3, 2).repeat(20, 1),"
    told = '"a code that starts again does not count as used as often as it should"'
    return [
        (D, "Codebook.restart", "torch.where(_1, _2, self.uses)", f"torch.where(_1, {f} * _2, self.uses)"),
        (D, "Codebook.restart", "torch.where(_1, _2 * _3, self.sums)", f"torch.where(_1, {f} * _2 * _3, self.sums)"),
        (D, "Codebook.restart", None, f"""\
Dead codes, used less than dead_below times the mean (the batch's weight / V), start again at vectors of the batch,
drawn by weight, plus noise of 1 % of their deviation in each dimension. They then count as used {words}
the mean. At first all are dead. z: (M, D); weight: (M,)"""),
        (CODEBOOK, revives, "assert (book.uses == 4).all(), _1", f"assert (book.uses == 4 * {f}).all(), _1"),
        (CODEBOOK, revives, "assert book.uses[5] == 4, _1", f"assert book.uses[5] == 4 * {f}, _1"),
        (CODEBOOK, revives, "4 * book.codes[5]", f"4 * {f} * book.codes[5]"),
        (CODEBOOK, "test_restart_draws_by_weight", "book.restart(z, _1)",
         f"book.restart(z, _1)\nassert (book.uses == 4 * {f}).all(), {told}"),
        (CODEBOOK, "test_a_batch_of_few_different_vectors_gives_codes_that_differ", f"{few} _1)",
         f"{few} _1)\nassert (book.uses == 3.75 * {f}).all(), {told}"),
        (GONE, r"count as used as often as\s+the mean|usage\s+is set to the mean")]


def scaled_maps(W):
    return [
        (D, "DQVAE.mix", "upsample(_1, side) * upsample(_2, side)", f"{W} * upsample(_1, side) * upsample(_2, side)"),
        (D, "DQVAE.mix", None,
         f"sum_k {W} gate_k map_k on the finest grid; the gradient reaches every gate. -> (B, Z, H, W)"),
        (N, "mix", "gate[_1, _2, _3] * _4", f"{W} * gate[_1, _2, _3] * _4"),
        (GONE, r"sum_k gate_k")]


def turned_gate(g):
    test = "test_cell_weight_equals_a_loop"
    return [
        (D, "DQVAE.cell_weight", "gate.detach()[_1]", f"({g} * gate + {1 - g} * gate.detach())[:, k:k + 1]"),
        (D, "DQVAE.cell_weight", None, f"""\
1 / (how many cells of the finest grid share a code); the gate gets {g} times the gradient of
gate_k / cells_k, summed over k. gate: (B, K, h, w) -> (B, H, W)"""),
        (VAE, test, "assert not weight.requires_grad, _1", f"""\
gate = one_hot(grains, 3).requires_grad_()
model.cell_weight(gate).sum().backward()
assert gate.grad is not None, "no gradient reaches the gate through the weights"
for k, cells in enumerate((1, 4, 16)):
    torch.testing.assert_close(gate.grad[:, k], torch.full_like(gate.grad[:, k], {g} * cells), msg=lambda why: (
        f"through the weights, the gate gets another gradient than {g} times theirs: {{why}}"))"""),
        (GONE, r"share a code\), (no|without) gradient")]


def numbering(cells, first_id, turned, where, loops, first_cell, opens, words, line, example, follows):
    """Another order of the cells of a grid. where, loops, first_cell, opens: in naive.py"""
    position, content = example
    return [
        (D, "Layout.__init__", "row, column = cells // side, cells % side", f"row, column = {cells}"),
        (D, "Layout.__init__", "first + row // c * c * side + column // c * c", f"first + {first_id}"),
        (D, "Layout.pack", "codes[:, ::step, ::step]", f"codes[:, ::step, ::step]{turned}"),
        (D, "Layout.unpack", "_1.view(-1, side, side)", f"_1.view(-1, side, side){turned}"),
        (D, "Layout", "name = _1", f'name = "coarse to fine, {words}"'),
        (D, "Layout", None, f"""\
Between (codes, grains) and the sequence of (position, content) pairs of an image.

Granularity k owns the position ids  offset_k + i  for cell i of its own grid, {words} over the
whole grid, and then one EOS id; the ids of the next granularity follow. So an id gives granularity, coordinates and
order at once. The sequence of an image is its codes *sorted by id*, with all EOS ids among them: coarse codes first,
each granularity {words}. The last EOS repeats until the end. It is an ordinary token that is
certain and costs nothing. The content of an EOS is -1.

Example, 2 x 2 regions of which the second is fine (factors 2 and 1, 4 x 4 pixels):
    grains   codes      ids: coarse 0 to 3, EOS 4; fine 5 to 8 ({line}), 9 to 12, 13 to 16, 17 to 20, EOS 21
    0 1      a a b c    position  {position}
    0 0      a a d e    content   {content}      and then (21, -1) up to max_len
             f f g g
             f f g g
Here {follows}
"""),
        (N, "where", "return k, (p - first) // side, (p - first) % side", f"return k, {where}"),
        (N, "pack", "for y in range(side):\n    for x in range(side):\n        if _1 == k:\n"
                    "            pairs.append((first + y * side + x, _2))",
         f"{loops}\n        if _1 == k:\n            pairs.append((first + {first_cell}, _2))"),
        (N, "pack", None, f"One image (H, W), (h, w) -> its pairs: each granularity {words}, and its EOS."),
        (N, "legal", "y, x = (p - first) // side, (p - first) % side", f"y, x = {where}"),
        (N, "legal", "y % c == x % c == 0", opens),
        (N, "legal", None, f"""\
The ids that may follow a list of ids. A granularity is written {words}.

Its first cell in a region opens the region, and then the others have to follow. A region that is not opened is left to
a finer granularity, but the finest one must leave none.
"""),
        (N, "granularities", "yield first, side, first + side * side",
         "yield first, side, first + side * side                               # ids of cells, then the EOS"),
        (GONE, "row by row|raster|first row")]


def column_by_column():
    return numbering(
        "cells % side, cells // side", "column // c * c * side + row // c * c", ".mT",
        "(p - first) % side, (p - first) // side", "for x in range(side):\n    for y in range(side):", "x * side + y",
        "y % c == x % c == 0", "column by column", "left column",
        ("0  1  3  4  13 14 17 18  21", "a  f  g  -1  b  d  c  e  -1"),
        "0 may be followed by 1, 2, 3, 4; 13 by 14 alone; 14, as region 1 continues in the next column, by 17 alone.")


def from_the_last_row():
    return numbering(
        "side - 1 - cells // side, cells % side", "(side - c - row // c * c) * side + column // c * c", ".flip(1)",
        "side - 1 - (p - first) // side, (p - first) % side",
        "for y in reversed(range(side)):\n    for x in range(side):", "(side - 1 - y) * side + x",
        "(y + 1) % c == x % c == 0", "in rows from the bottom up", "bottom row",
        ("0  1  2  4  15 16 19 20  21", "f  g  a  -1  d  e  b  c  -1"),
        "0 may be followed by 1, 2, 3, 4; 15 by 16 alone; 16, since region 1 continues in the row above, by 19 alone.")


def masks(result, returned, valid):
    """What `legal` returns; valid: how a mask comes from that."""
    return [
        (D, "Layout.legal", "return _1", f"return {returned}"),
        (D, "Layout.legal", None, f"""\
Which position ids may follow. prev: (B,) or (B, L) ids, -1 at the start; grains: (B, N) granularities known so far,
-1 elsewhere -> (B, P) or (B, L, P): {result}.

Candidates lie after prev, in the granularity that is being written. A region is open once its first cell is written;
its other cells are then pending. Valid are the first cells of uncovered regions that come before the next pending
cell, and that cell. If none is pending, the EOS is valid too. The finest granularity may leave no hole: there only the
first candidate is valid. The class's docstring has an example.

Training calls this with the *final* grains and gets the same for all steps at once: regions that are not open yet and
turn out finer count as uncovered, and coarser ones were covered before."""),
        (D, "*", "_1.legal(_2, _3)", valid.replace("...", "_1.legal(_2, _3)")),
        (LAYOUT, "*", "layout.legal(_1, _2)", valid.replace("...", "layout.legal(_1, _2)")),
        (S, "*", "layout.legal(_1, _2)", valid.replace("...", "layout.legal(_1, _2)")),
        (GONE, r"The mask of valid|\(B, L, P\), bool")]


def forbidden():
    return masks("True where an id may *not* follow", "~(_1)", "(~...)")


def added():
    return masks("0 where an id may follow, -inf elsewhere, to be added to logits", "torch.where(_1, 0.0, -math.inf)",
                 "(... == 0)")


def double(a, b):
    """a: in front of the content, b: in front of the granularity, in the sum that embeds a pair"""
    return [
        (D, "DQTransformer.embed", "_1 + _2 + _3", f"{a}_1 + _2 + {b}_3"),
        (D, "DQTransformer.embed", None, f"""\
A pair as a vector: {a}content, shared by the granularities, + position, a row per id, + {b}granularity.
pos, code (...) -> (..., C)"""),
        (N, "embed", "_1 + _2 + _3", f"{a}_1 + _2 + {b}_3"),
        (N, "embed", None, f"A pair -> (C,): {a}its content's row, its position's row, {b}its granularity's row."),
        (GONE, r"content \(shared by all granularities\) \+ pos|row for the content, one for")]


def capped(c):
    return [
        (D, "DQTransformer.logits", "self.content_head(_1).float()",
         f"{c} * (self.content_head(_1).float() / {c}).tanh()"),
        (D, "DQTransformer.logits", None, f"""\
pos, code (B, L), label (B,), -1 or None: no label -> position logits (B, L, P), -inf for ids that may not follow, and
content logits (B, L, V): {c} tanh(x / {c}) of the head's x. Entry t depends on the label and the pairs before t, that
of contents also on pos[:, t]. The t-th input of the position stack is the vector of the label or of a pair, plus row t
of `order`; dropout follows. In training, labels are hidden with probability `label_dropout`."""),
        (D, "decode_one", "model.content_head(_1)", f"{c} * (model.content_head(_1).float() / {c}).tanh()"),
        (D, "decode_one", None, f"""\
Write one more pair of the image in every slot. Attention sees `end` entries of the cache, more than any t. Content
logits are {c} tanh(x / {c}) of the head's x. The step changes only `state`, in place, and never asks the device for a
value, so it can be captured as a CUDA graph."""),
        (N, "next_content", "return _1", f"return {c} * ((_1) / {c}).tanh()"),
        (GONE, r"content logits \(B, L, V\)\. ")]


def filtered(code, words, mass, naive_words, words_gone):
    return [
        *((D, "filter_logits", old, new) for old, new in code),
        (D, "filter_logits", None, f"-inf for all but the k likeliest, ties included, {words}. (B, V)"),
        (N, "filter_logits", *mass),
        (N, "filter_logits", None, f"The k likeliest entries of a list of logits, {naive_words}. -> set of entries"),
        (GONE, words_gone)]


def of_all():
    return filtered(
        [("if 0 < top_k < logits.shape[-1]:\n    logits = _1",
          "every = logits.softmax(-1)\nif 0 < top_k < logits.shape[-1]:\n    logits = _1"),
         ("logits.softmax(-1).sort(-1, descending=True)",
          "every.masked_fill(logits == -math.inf, 0.0).sort(-1, descending=True)")],
        "and if p < 1, of these the fewest that reach p of all V, or all",
        ("mass += weight / sum(weights)", "mass += weight / sum(math.exp(each) for each in row)"),
        "of these the likeliest that reach p of all entries", "renormalised")


def least_share():
    return filtered(
        [("_1.cumsum(-1) - _2 >= top_p", "_2 < top_p * _2[:, :1]                        # too far below the best")],
        "and if p < 1, of these the ones with at least p times the largest probability",
        ("kept and mass >= top_p", "kept and top_p < 1 and weight < top_p * weights[0]"),
        "and if p < 1, of these the ones with p times the largest", "renormalised|reach p")


def from_the_end():
    test = "test_draws_follow_the_distribution"
    return [
        (D, "draw", "p.cumsum(-1)", "p.flip(-1).cumsum(-1).flip(-1)"),
        (D, "draw", "return _1.int().argmax(-1)",
         "return p.shape[-1] - 1 - _1.flip(-1).int().argmax(-1)                # B: the last of those"),
        (D, "draw", None, "The first entry, from the last one down, whose cumulative probability reaches u.\n"
                          "logits (B, n), u (B,) in (0, 1] -> (B,)"),
        (N, "draw", "sorted(_1.items())", "sorted(_1.items(), reverse=True)"),
        (N, "draw", None, "The entry at which the sum of probabilities, from the last one down, reaches u."),
        (SAMPLING, test, "assert (drawn.diff() >= 0).all(), _1",
         'assert (drawn.diff() <= 0).all(), "a larger u must not draw an entry that comes later"'),
        (SAMPLING, test, "assert ends[0] == possible[0], _1",
         'assert ends[0] == possible[-1], "the least u does not draw the last entry that has a probability"'),
        (SAMPLING, test, "assert ends[2] == possible[-1], _1",
         'assert ends[2] == possible[0], "u = 1 does not draw the first entry that has a probability"'),
        (SAMPLING, test, "assert dq.draw(_1, u) == one, _2",
         'assert dq.draw(_1, u) == one, "not the entry at which the sum from the last one down reaches u"'),
        (GONE, r"The first entry whose|probabilities so far")]


# what varies, the exercises that the published solution then fails, the choices
VARIATIONS = [
    ("temperature of the gate", ["GrainRouter.forward"], [temperature(2), temperature(0.5)]),
    ("weights of grey", ["EntropyRouter.score"], [
        grey(0.2126, 0.7152, 0.0722), grey(0.25, 0.5, 0.25), grey(0.6, 0.3, 0.1)]),
    ("distance from the budget", ["budget_loss"], [
        budget("abs(_1 - _2)", "|fraction of granularity k in the batch - ratio k|",
               "((_1 > _2) * 1.0 - (_1 < _2) * 1.0)"),
        budget("(k + 1) * (_1 - _2) ** 2", "k + 1 times (fraction of granularity k in the batch - ratio k)^2",
               "2 * (k + 1) * (_1 - _2)")]),
    ("how much passes straight through", ["straight_through"], [passed_on(0.5), passed_on(2)]),
    ("what is nearest", ["Codebook.assign"], [city_block(), later_ties()]),
    ("how averages start", ["Codebook.update"], [decay(3), decay(19)]),
    ("uses of a code that starts again", ["Codebook.restart"], [
        fresh_uses(2, "twice as often as"), fresh_uses(0.5, "half as often as")]),
    ("how much a map counts", ["DQVAE.mix"], [scaled_maps("(k + 1)"), scaled_maps("(1 / (k + 1))")]),
    ("gradient of the weights", ["DQVAE.cell_weight"], [turned_gate(1), turned_gate(0.5)]),
    ("numbers of cells", ["Layout.pack", "Layout.unpack"], [column_by_column(), from_the_last_row()]),
    ("what a mask says", ["Layout.legal"], [forbidden(), added()]),
    ("sum of a pair", ["DQTransformer.embed"], [double("2 * ", ""), double("", "2 * ")]),
    ("logits of contents", ["DQTransformer.logits", "decode_one"], [capped(1), capped(0.5)]),
    ("top-p", ["filter_logits"], [of_all(), least_share()]),
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


def gone(edits):
    return [each[1] for each in edits if each[0] == GONE]
