r"""Other specifications of the same exercises, for a course that grades: what is published here fails them.

A variation has two or more choices; a variant takes one of each, by its seed, and the published specification is none
of them. A choice is a list of edits, (file, what stands there exactly once, what stands there then): of the solution,
of its docstring, of the naive loops, the tests and the handout. So docstrings, examples, tests and solution change
together.

HIDDEN are other sizes for the same tests; with them go other seeds. Whoever has this file can solve a variant, as
whoever has dq.py can solve the exercises: a course that fears this adds variations of its own to a private copy of the
table.
"""
import random

D, N, H = "dq.py", "tests/naive.py", "tests/course/handout.py"
ROUTERS, CODEBOOK, VAE = "tests/test_routers.py", "tests/test_codebook.py", "tests/test_vae.py"
LAYOUT, TRANSFORMER, SAMPLING = "tests/test_layout.py", "tests/test_transformer.py", "tests/test_sampling.py"


def temperature(T):
    return [
        (D, "soft = (logits - noise * exponential.log()).softmax(dim=1)",
            f"soft = ((logits - noise * exponential.log()) / {T}).softmax(dim=1)"),
        (D, "Backward sees p, the softmax of the noisy logits (straight-through): d loss / d logit_k",
            f"Backward sees p, the softmax of the noisy logits / {T} (straight-through): {T} d loss / d logit_k"),
        (ROUTERS, "p = logits.detach().softmax(1)", f"p = (logits.detach() / {T}).softmax(1)"),
        (ROUTERS, "expected = p * (cost - (p * cost).sum(1, keepdim=True))",
                  f"expected = p * (cost - (p * cost).sum(1, keepdim=True)) / {T}"),
        (ROUTERS, "dL/dlogit_k = p_k (c_k - sum_j p_j c_j)", f"dL/dlogit_k = p_k (c_k - sum_j p_j c_j) / {T}"),
        (H, r"the softmax of $m$: $\\partial L / \\partial l_k = p_k (c_k - \\sum_j p_j c_j)$",
            rf"the softmax of $m / {T}$: ${T} \\partial L / \\partial l_k = p_k (c_k - \\sum_j p_j c_j)$"),
    ]


def grey(red, green, blue):
    return [
        (D, "0.2989 * red + 0.5870 * green + 0.1140 * blue", f"{red} * red + {green} * green + {blue} * blue"),
        (D, "0.2989 red + 0.5870 green +", f"{red} red + {green} green +"),
        (D, "0.1140 blue;", f"{blue} blue;"),
        (N, "0.2989 * r + 0.587 * g + 0.114 * b", f"{red} * r + {green} * g + {blue} * b"),
    ]


def budget(code, words, slope, one, formula):
    return [
        (D, "return sum((share[k] - ratio) ** 2 for", f"return sum({code} for"),
        (D, "Sum over k of (share of granularity k in the batch - ratio k)^2:", f"Sum over k of {words}:"),
        (ROUTERS, "2 * (share[k] - ratio) / 12", f"{slope} / 12"),
        (ROUTERS, "wanted = sum((share[k] - ratio) ** 2 for", f"wanted = sum({one} for"),
        (H, r"L = \\sum_k (s_k - r_k)^2", rf"L = \\sum_k {formula}"),
    ]


def passed_on(S):
    return [
        (D, "    return z + (q - z).detach()", f"    return {S} * z + (q - {S} * z).detach()"),
        (D, "whose gradient goes to z unchanged", f"whose gradient goes to z times {S}"),
        (CODEBOOK, "assert_close(z.grad, cost, msg", f"assert_close(z.grad, {S} * cost, msg"),
        (CODEBOOK, "the gradient does not reach z unchanged", f"the gradient does not reach z times {S}"),
        (H, "is the identity: the value", f"is {S} times the identity: the value"),
        (H, "the gradient of $z$ is that of the output",
            f"the gradient of $z$ is {S} times that of the output"),
    ]


PRODUCTS = "(codes.square().sum(1) - 2 * (z - centre) @ codes.t()).argmin(dim=1)"
CENTRE = """\
        centre = self.codes.mean(0)                                          # as the origin: rounding then is smallest
        codes = self.codes - centre                                          # V, D
"""
DISTANCE = """\
$|z - e|^2 = |z|^2 - 2 z \\\\cdot e + |e|^2$. The first term is the same for all codes $e$, the second is a product of
matrices for all vectors and codes at once."""


def city_block():
    return [
        (D, CENTRE, ""),
        (D, PRODUCTS, "(z[:, None] - self.codes).abs().sum(-1).argmin(dim=1)"),
        (D, "by |z - e|^2 without |z|^2, the same for every code.", "by sum_d |z_d - e_d|."),
        (N, "key=lambda v: float((codes[v] - vector).square().sum())",
            "key=lambda v: float((codes[v] - vector).abs().sum())"),
        (H, DISTANCE, "The distance of $z$ and $e$ is $\\\\sum_d |z_d - e_d|$, for all vectors and codes at once."),
    ]


def later_ties():
    return [
        (D, CENTRE, "        distance = self.codes.square().sum(1) - 2 * z @ self.codes.t()           # M, V\n"),
        (D, PRODUCTS, "len(self.codes) - 1 - distance.flip(1).argmin(dim=1)"),
        (D, "by |z - e|^2 without |z|^2, the same for every code.", "by |z - e|^2; of those as near, the highest id."),
        (N, "key=lambda v: float((codes[v] - vector).square().sum())",
            "key=lambda v: (float((codes[v] - vector).square().sum()), -v)"),
        (CODEBOOK, "book, z = Codebook(7, 3), torch.randn(50, 3)",
                   "book, z = Codebook(7, 3), torch.randint(-2, 3, (50, 3)).float()"),
        (CODEBOOK, "book.codes.copy_(torch.randn(7, 3) * torch.linspace(0.2, 3, 7)[:, None])",
                   "book.codes.copy_(torch.randint(-2, 3, (7, 3)))"),
        (CODEBOOK, '"a vector gets a code that is not its nearest"',
                   '"a vector gets a code that is not its nearest, or not the highest id of those as near"'),
        (H, "matrices for all vectors and codes at once.",
            "matrices for all vectors and codes at once. Of codes as near, the highest id wins."),
    ]


def decay(c):
    return [
        (D, "decay = (self.age / (9 + self.age))", f"decay = (self.age / ({c} + self.age))"),
        (D, "decay n / (9 + n) in batch n", f"decay n / ({c} + n) in batch n"),
        (CODEBOOK, "[(0, 0.1), (5, 0.4), (1000, 0.9)]", f"[(0, 1 / {c + 1}), (5, 6 / {c + 6}), (1000, 0.9)]"),
        (H, "n / (9 + n)", f"n / ({c} + n)"),
    ]


def fresh_uses(f, words):
    return [
        (D, "self.uses.copy_(torch.where(dead, mean_uses, self.uses))",
            f"self.uses.copy_(torch.where(dead, {f} * mean_uses, self.uses))"),
        (D, "fresh * mean_uses, self.sums", f"fresh * ({f} * mean_uses), self.sums"),
        (D, "They count as used as often as\n        the mean.", f"They count as used {words}\n        the mean."),
        (CODEBOOK, "assert (book.uses == 4).all()", f"assert (book.uses == 4 * {f}).all()"),
        (CODEBOOK, "assert book.uses[5] == 4,", f"assert book.uses[5] == 4 * {f},"),
        (CODEBOOK, "assert_close(book.sums[5], 4 * book.codes[5]",
                   f"assert_close(book.sums[5], 4 * {f} * book.codes[5]"),
        (H, r"with uses $u_v = \\bar u$", rf"with uses $u_v = {f} \\bar u$"),
    ]


def numbering(cells, first_id, there, back, where, loops, first_cell, opens, words, example, follows):
    """Another order of the cells of a grid. where, loops, first_cell, opens: in naive.py"""
    first, position, content = example
    return [
        (D, "row, column = cells // side, cells % side", f"row, column = {cells}"),
        (D, "= first + row // c * c * side + column // c * c", f"= first + {first_id}"),
        (D, "codes[:, ::step, ::step].flatten(1)", f"codes[:, ::step, ::step]{there}.flatten(1)"),
        (D, ".view(-1, side, side) for o, side", f".view(-1, side, side){back} for o, side"),
        (D, "in raster order over the whole grid\n    (as the authors number them)",
            f"{words} over the whole grid\n    (the authors number them row by row)"),
        (D, "coarse codes\n    first, each granularity row by row.",
            f"coarse codes\n    first, each granularity {words}."),
        (D, 'name = "coarse to fine, row by row"', f'name = "coarse to fine, {words}"'),
        (D, "5 to 8 (first row)", f"5 to 8 ({first})"),
        (D, "position  0  2  3  4   7  8 11 12  21", f"position  {position}"),
        (D, "content   a  f  g  -1  b  c  d  e  -1 ", f"content   {content} "),
        (D, "In the class's example 0 may be followed by 1, 2, 3, 4; 7 by 8 alone; 8,\n"
            "        since region 1 goes on in the next row, by 11 alone.", f"In the class's example {follows}"),
        (N, "return k, (p - first) // side, (p - first) % side", f"return k, {where}"),
        (N, "        for y in range(side):\n            for x in range(side):\n                if grains", loops),
        (N, "pairs.append((first + y * side + x,", f"pairs.append((first + {first_cell},"),
        (N, "y, x = (p - first) // side, (p - first) % side", f"y, x = {where}"),
        (N, "y % c == x % c == 0", opens),
        (N, "yield first, side, first + side * side                               # ids row by row",
            f"yield first, side, first + side * side                               # ids {words}"),
        (N, "coarse codes first, each granularity row by row,", f"coarse codes first, each granularity {words},"),
        (N, "A granularity is written row by row.", f"A granularity is written {words}."),
    ]


def column_by_column():
    return numbering(
        "cells % side, cells // side", "column // c * c * side + row // c * c", ".mT", ".mT",
        "(p - first) % side, (p - first) // side",
        "        for x in range(side):\n            for y in range(side):\n                if grains", "x * side + y",
        "y % c == x % c == 0", "column by column",
        ("first column", "0  1  3  4  13 14 17 18  21", "a  f  g  -1  b  d  c  e  -1"),
        "0 may be followed by 1, 2, 3, 4; 13 by 14 alone;\n"
        "        14, since region 1 goes on in the next column, by 17 alone.")


def from_the_last_row():
    return numbering(
        "side - 1 - cells // side, cells % side", "(side - c - row // c * c) * side + column // c * c",
        ".flip(1)", ".flip(1)",
        "side - 1 - (p - first) // side, (p - first) % side",
        "        for y in reversed(range(side)):\n            for x in range(side):\n                if grains",
        "(side - 1 - y) * side + x", "(y + 1) % c == x % c == 0", "row by row from the last row up",
        ("last row", "0  1  2  4  15 16 19 20  21", "f  g  a  -1  d  e  b  c  -1"),
        "0 may be followed by 1, 2, 3, 4; 15 by 16 alone;\n"
        "        16, since region 1 goes on in the row above, by 19 alone.")


def double(what):
    """Of content or granularity, in the sum that embeds a pair."""
    content, granularity = ("2 * ", "") if what == "content" else ("", "2 * ")
    return [
        (D, "return content + self.position(pos) + self.granularity(self.layout.grain[pos])",
            f"return {content}content + self.position(pos) + {granularity}self.granularity(self.layout.grain[pos])"),
        (D, "A pair as a vector: content, shared by the granularities, + position, a row per id, + granularity.",
            f"A pair as a vector: {content}content, shared by the granularities, + position, a row per id, + "
            f"{granularity}granularity."),
        (N, "return content + position_row(model, p) + model.granularity",
            f"return {content}content + position_row(model, p) + {granularity}model.granularity"),
        (H, r"\\mathrm{content}[c] +" if content else r"\\mathrm{granularity}[k(p)]",
            r"2 \\mathrm{content}[c] +" if content else r"2 \\mathrm{granularity}[k(p)]"),
    ]


def capped(c):
    return [
        (D, "content = self.content_head(self.content_norm(h)).float()",
            f"content = {c} * (self.content_head(self.content_norm(h)).float() / {c}).tanh()"),
        (D, "content logits (B, L, V). Entry t",
            f"content logits (B, L, V), the head's x as {c} tanh(x / {c}). Entry t"),
        (D, "guided(model.content_head(model.content_norm(h)), options, B)",
            f"guided({c} * (model.content_head(model.content_norm(h)).float() / {c}).tanh(), options, B)"),
        (D, "Attention sees `end` places of the cache, more than any t.",
            f"Attention sees `end` places of the cache, more than any t.\n    Content logits x are {c} tanh(x / {c})."),
        (N, "return layer_norm(model.content_norm, h[-1]) @ model.content_head.weight.t()",
            f"return {c} * torch.tanh(layer_norm(model.content_norm, h[-1]) @ model.content_head.weight.t() / {c})"),
        (H, "and the content stack says what.",
            f"and the content stack says what: its logits $x$ become ${c} \\\\tanh(x / {c})$."),
    ]


def of_all():
    return [
        (D, "    if 0 < top_k < logits.shape[-1]:",
            "    every = logits.softmax(-1)\n    if 0 < top_k < logits.shape[-1]:"),
        (D, "probs, order = logits.softmax(-1).sort(", "probs, order = every.sort("),
        (D, "and of these, renormalised, the fewest that reach p.",
            "and of these the fewest that reach p of all V, or all."),
        (N, "mass += weight / sum(weights)", "mass += weight / sum(math.exp(each) for each in row)"),
        (N, "of these the likeliest that reach p together.", "of these the likeliest that reach p of all."),
        (H, "after top-k renormalised.", "those of all $V$ entries, also where top-k drops some."),
    ]


def least_share():
    return [
        (D, "surplus = probs.cumsum(-1) - probs >= top_p                          # already reached without this one",
            "surplus = probs < top_p * probs[:, :1]                               # too far below the likeliest"),
        (D, "and of these, renormalised, the fewest that reach p.",
            "and if p < 1 those with p times the largest share."),
        (N, "if kept and mass >= top_p:", "if kept and top_p < 1 and weight < top_p * weights[0]:"),
        (N, "of these the likeliest that reach p together.", "of these those with p times the largest share."),
        (H, "Entry $i$ stays if $q_1 + ... + q_{i-1} < p$:\nthe one that crosses $p$ is the last.",
            "Entry $i$ stays if $q_i \\\\ge p q_1$."),
    ]


def from_the_end():
    return [
        (D, "cdf = p.cumsum(-1).masked_fill(p == 0, 0.0)",
            "cdf = p.flip(-1).cumsum(-1).flip(-1).masked_fill(p == 0, 0.0)"),
        (D, "    return reached.int().argmax(-1)                                          # B: the first of those",
            "    return p.shape[-1] - 1 - reached.flip(-1).int().argmax(-1)               # B: the last of those"),
        (D, "The first entry whose cumulated probability reaches u times the sum.",
            "Cumulated from the last entry down: the first to reach u times the sum."),
        (N, "sorted(logits.items())", "sorted(logits.items(), reverse=True)"),
        (N, "The entry at which the sum of all probabilities so far reaches u.",
            "The entry at which the sum of all probabilities, from the last one on, reaches u."),
        (SAMPLING, '(drawn.diff() >= 0).all(), "a larger u must not draw an entry that comes earlier"',
                   '(drawn.diff() <= 0).all(), "a larger u must not draw an entry that comes later"'),
        (SAMPLING, 'ends[0] == possible[0], "the least u does not draw the first entry',
                   'ends[0] == possible[-1], "the least u does not draw the last entry'),
        (SAMPLING, 'ends[2] == possible[-1], "u = 1 does not draw the last entry',
                   'ends[2] == possible[0], "u = 1 does not draw the first entry'),
        (SAMPLING, '"not the first entry whose cumulated probability reaches u"',
                   '"not the entry at which the probability, cumulated from the last one on, reaches u"'),
        (H, "With $F(i) = p_1 + ... + p_i$ and $u$ uniform in (0, 1], the first $i$ with",
            "With $F(i) = p_i + ... + p_n$ and $u$ uniform in (0, 1], the last $i$ with"),
        (H, "nor miss the last one.", "nor miss the first one."),
    ]


# what varies, the exercises that the published solution then fails, the choices
VARIATIONS = [
    ("temperature of the gate", ["GrainRouter.forward"], [temperature(2), temperature(0.5)]),
    ("weights of grey", ["EntropyRouter.score"], [
        grey(0.2126, 0.7152, 0.0722), grey(0.25, 0.5, 0.25), grey(0.6, 0.3, 0.1)]),
    ("distance from the budget", ["budget_loss"], [
        budget("(share[k] - ratio).abs()", "|share of granularity k in the batch - ratio k|",
               "((share[k] > ratio) - (share[k] < ratio))", "abs(share[k] - ratio)", "|s_k - r_k|"),
        budget("(k + 1) * (share[k] - ratio) ** 2", "k + 1 times (share of granularity k in the batch - ratio k)^2",
               "2 * (k + 1) * (share[k] - ratio)", "(k + 1) * (share[k] - ratio) ** 2", "(k + 1) (s_k - r_k)^2")]),
    ("how much passes straight through", ["straight_through"], [passed_on(0.5), passed_on(2)]),
    ("what is nearest", ["Codebook.assign"], [city_block(), later_ties()]),
    ("how averages start", ["Codebook.update"], [decay(3), decay(19)]),
    ("uses of a code that starts anew", ["Codebook.restart"], [fresh_uses(2, "twice as often as"),
                                                              fresh_uses(0.5, "half as often as")]),
    ("numbers of cells", ["Layout.pack", "Layout.unpack"], [column_by_column(), from_the_last_row()]),
    ("sum of a pair", ["DQTransformer.embed"], [double("content"), double("granularity")]),
    ("logits of contents", ["DQTransformer.logits", "decode_one"], [capped(1), capped(0.5)]),
    ("top-p", ["filter_logits"], [of_all(), least_share()]),
    ("order of a draw", ["draw"], [from_the_end()]),
]
HIDDEN = [
    (ROUTERS, "logits = torch.randn(2, 3, 2, 2, requires_grad=True)",
              "logits = torch.randn(3, 3, 4, 4, requires_grad=True)"),
    (ROUTERS, "cost = torch.randn(2, 3, 2, 2)", "cost = torch.randn(3, 3, 4, 4)"),
    (ROUTERS, "torch.tensor([1.0, 0.0, -1.0]).view", "torch.tensor([0.9, -0.7, 0.2]).view"),
    (ROUTERS, "image = torch.rand(1, 3, 8, 8) * 2 - 1", "image = torch.rand(2, 3, 16, 16) * 2 - 1"),
    (ROUTERS, "one_hot(torch.randint(0, K, (3, 2, 2)), K)", "one_hot(torch.randint(0, K, (2, 3, 2)), K)"),
    (ROUTERS, "torch.full((3, 2, 2), ", "torch.full((2, 3, 2), "),
    (CODEBOOK, "torch.randn(5, 3, requires_grad=True), torch.randn(5, 3), torch.randn(5, 3)",
               "torch.randn(7, 2, 4, requires_grad=True), torch.randn(7, 2, 4), torch.randn(7, 2, 4)"),
    (CODEBOOK, "V, D = 6, 3", "V, D = 9, 2"),
    (VAE, "torch.randint(0, 3, (2, 2, 2))", "torch.randint(0, 3, (4, 2, 2))"),
    (VAE, "weight.shape == (2, 8, 8)", "weight.shape == (4, 8, 8)"),
    (LAYOUT, "CASES = [(8, (4,)), (8, (4, 2)), (16, (4, 2)), (16, (8, 4, 2)), (12, (4, 1)), (4, (4, 2, 1))]",
             "CASES = [(8, (2,)), (12, (4, 2)), (16, (8, 2)), (8, (4, 2, 1)), (8, (4, 1)), (8, (8, 4, 2, 1))]"),
    (TRANSFORMER, "rows(device):\n    model = tiny(8, (4, 2, 1), V=5",
                  "rows(device):\n    model = tiny(12, (4, 2), V=5"),
    (TRANSFORMER, 'tiny(8, (4, 2), V=5, classes=("a", "b"), label_dropout=label_dropout',
                  'tiny(8, (4, 2), V=5, classes=("a", "b", "c"), label_dropout=label_dropout'),
    (SAMPLING, "[(0, 1.0), (3, 1.0), (0, 0.6), (5, 0.5), (1, 1.0), (99, 1e-6)]",
               "[(0, 0.9), (4, 1.0), (2, 0.3), (7, 0.8), (1, 0.5), (99, 1e-3)]"),
    (SAMPLING, "logits = torch.randn(20, 11) * 2", "logits = torch.randn(30, 17) * 2"),
    (SAMPLING, "torch.tensor([-math.inf, 0.3, -math.inf, 1.2, -0.5, -math.inf])",
               "torch.tensor([0.7, -math.inf, -0.3, -math.inf, -math.inf, 1.1])"),
    (SAMPLING, "draws_as_the_naive_loop(model, 2.5, dict(slots=2), given=given)",
               "draws_as_the_naive_loop(model, 1.7, dict(slots=3), given=given)"),
]


def chosen(seed):
    """-> for each variation the number of its choice"""
    draws = random.Random(seed)
    return [draws.randrange(len(choices)) for _, _, choices in VARIATIONS]


def edited(texts, seed, hidden=None):
    """{file: text} as a variant has it (seed None: as it is published), with the sizes of hidden cases where asked."""
    texts = dict(texts)
    edits = []
    if seed is not None:
        for number, (_, _, choices) in zip(chosen(seed), VARIATIONS):
            edits += choices[number]
    for file, old, new in edits + (HIDDEN if hidden is not None else []):
        if file in texts:
            if texts[file].count(old) != 1:
                raise ValueError(f"variants.py: {file} contains {texts[file].count(old)} times, not once: {old}")
            texts[file] = texts[file].replace(old, new)
    return texts
