"""What is written for students alone: the README of their copy, and a page and a figure for each exercise.

The pages are made from the file that is handed out, so that they fit a variant: docstrings come from its text, ids and
masks from its Layout. What `MATHEMATICS` says of formulas a variant edits like any other text.
"""
import ast
import math

from exercises import BONUS, EXERCISES, RULES, find, paths

README = """\
# dq: two weeks from pixels to sequences of codes

You have a project that works but for {n} functions. In the first week an image becomes codes, in the second codes
become sequences, and a model writes them. No GPU is needed.

## Begin

```bash
python3 -m venv .venv && .venv/bin/pip install torch numpy pillow tqdm pytest
.venv/bin/python tests/course/assignment.py grade dq.py      # a table of points: now 0, "not written yet" {n} times
.venv/bin/python tests/course/assignment.py list             # the exercises, with their tests
```

## Work

1. Read the docstring at the top of `dq.py`, then `pack` in `tests/naive.py`: the method once more, by loops, for one
   image. A function of `dq.py` computes the same for whole batches.
2. Take the exercises in the order of the table. The tests of one may need those before it, and none after; of 12 they
   need 10 and 11.
3. For each: its page in `handout/`, its docstring, the comments that are left in the hole (most are shapes of variables
   of our solution; yours may be another), then its tests: `python -m pytest -q` and the paths that `list` names.
4. Points: `python tests/course/assignment.py grade dq.py`, for one exercise with `--only 3`: up to half a minute.
   The exercises before it are then your own, so begin at the first that fails.

| | exercise | function | points | minutes |
|---|---|---|---|---|
{table}

A script that comes to a hole says in one line which it is: `python train_vae.py` in a new copy ends with
`error: exercise 1, the gate: GrainRouter.forward is to be written`.

## Rules

{rules}

## The open part

When all is written, you get a file `codes.pt`, the same for everyone. Put it into `out/` and make the best model of
these codes that {minutes} minutes on two cores allow: `python train_transformer.py`, whose flags and whose model you
may change. The rank is by held-out nats of an image, which are exact: the model's probabilities sum to 1 over all
pictures. Training says them at every evaluation. Hand in a folder with `transformer.pt` and, if you changed them,
`dq.py`, `common.py` and `train_transformer.py`; flags go into `flags.txt`. The class must still be called
`DQTransformer` and have `logits(pos, code, label)`, and a step may not see its own answer: this is tested.
"""

MATHEMATICS = {
    "GrainRouter.forward": """\
Let $l_k$ be the logits and $E_k$ independent draws of Exponential(1). $\\arg\\max_k (l_k - \\log E_k)$ has the
probabilities $p = \\mathrm{softmax}(l)$. With noise scaled by $s$, the noisy logits are $m_k = l_k - s \\log E_k$.
Forward, the gate is $g = \\mathrm{onehot}(\\arg\\max m)$. Backward, with $c_k = \\partial L / \\partial g_k$ and $p$
now the softmax of $m$: $\\partial L / \\partial l_k = p_k (c_k - \\sum_j p_j c_j)$.""",
    "EntropyRouter.score": """\
Grey levels $y$ of a region, bins $b_i$, $i = 1 ... 32$: $h_i = \\mathrm{mean}_y \\exp(-((y - b_i) / 0.01)^2 / 2)$,
$p_i = h_i / \\sum_j h_j$, and the entropy is $-\\sum_i p_i \\log p_i$ in nats.""",
    "budget_loss": """\
$s_k$ is the share of granularity $k$ among all regions of all images of the batch, $r_k$ the wanted one:
$L = \\sum_k (s_k - r_k)^2$. Its gradient is the same for every region: no image has to meet the budget alone.""",
    "straight_through": """\
With $f(z) = q$ the nearest code, $f$ is constant almost everywhere. Straight through pretends that
$\\partial f / \\partial z$ is the identity: the value is $q$, and the gradient of $z$ is that of the output.""",
    "Codebook.assign": """\
$|z - e|^2 = |z|^2 - 2 z \\cdot e + |e|^2$. The first term is the same for all codes $e$, the second is a product of
matrices for all vectors and codes at once.""",
    "Codebook.update": """\
In batch $n$, with $d = \\min(n / (9 + n), \\mathrm{decay})$, weights $w_i$ and $A_v$ the vectors that chose code $v$:
$u_v = d u_v + (1 - d) \\sum_{i \\in A_v} w_i$, $s_v = d s_v + (1 - d) \\sum_{i \\in A_v} w_i z_i$, $e_v = s_v /
u_v$.""",
    "Codebook.restart": """\
With weights $w_i$ and $V$ codes, the mean use is $\\bar u = \\sum_i w_i / V$. Code $v$ is dead if
$u_v < \\mathrm{dead\\_below} \\cdot \\bar u$. It starts anew at $e_v = z_i + 0.01 \\sigma \\epsilon$, $i$ drawn with
probability proportional to $w_i$, with uses $u_v = \\bar u$ and sums $s_v = u_v e_v$.""",
    "DQVAE.mix": """\
$M(y, x) = \\sum_k g_k(y, x) m_k(y, x)$, where gates and maps are repeated over the finest grid. So
$\\partial L / \\partial g_k = \\sum \\partial L / \\partial M \\cdot m_k$: each gate learns what its map would have
done.""",
    "DQVAE.cell_weight": """\
A code of granularity $k$ fills $(F_k / F_K)^2$ cells of the finest grid, with $F_k$ the factors. Each of these cells
counts $(F_K / F_k)^2$, so that a sum over cells is a sum over codes.""",
    "Layout.pack": """\
An id names granularity, place and order. A sequence is the set of the ids that are there, sorted, with all EOS ids;
what is not there can be sorted to the end. The loop in `tests/naive.py` says what is wanted; the test of speed wants it
for whole batches.""",
    "Layout.unpack": """\
The inverse: write the contents to a row with a place for every id, cut that row into the granularities' grids, and let
the granularity of each region choose among them. -1 stands where nothing is known.""",
    "Layout.legal": """\
Let $p(\\mathrm{image}) = \\prod_t p(\\mathrm{pos}_t | ...) p(\\mathrm{code}_t | ...)$. It sums to 1 over all images if
at each step something may follow, the factors sum to 1 over what may, and each walk ends in one complete image.""",
    "DQTransformer.embed": """\
$E(p, c) = \\mathrm{content}[c] + \\mathrm{position}[p] + \\mathrm{granularity}[k(p)]$, and an EOS has a content of its
own.""",
    "DQTransformer.logits": """\
Input $t$ is pair $t - 1$, input 0 the label: so output $t$ is about pair $t$ and knows what is before. The position
stack says where; then the place of pair $t$ is added, and the content stack says what.""",
    "filter_logits": """\
Sort the probabilities, $q_1 \\ge q_2 \\ge ...$, after top-k renormalised. Entry $i$ stays if $q_1 + ... + q_{i-1} < p$:
the one that crosses $p$ is the last.""",
    "draw": """\
With $F(i) = p_1 + ... + p_i$ and $u$ uniform in (0, 1], the first $i$ with $F(i) \\ge u$ has probability $p_i$.
Rounding must neither draw an entry of probability 0 nor miss the last one.""",
    "decode_one": """\
One step of the loop in `tests/naive.py` for all slots at once, with keys and values of the past in a cache. Guidance
mixes logits of labelled and unlabelled rows, $l_0 + \\mathrm{cfg} (l_1 - l_0)$, before the temperature.""",
}


def write(folder, full, minutes=20, space=None):
    """README.md and handout/ in a copy. full: its dq.py without holes; space: what that defines"""
    rows = [f"| {number} | {'[' + e.name + '](handout/' + file_name(number, e) + ')'} | `{e.function}` | {e.points} | "
            f"{e.minutes} |" for number, e in enumerate(EXERCISES, 1)]
    (folder / "README.md").write_text(README.format(n=len(EXERCISES), table="\n".join(rows), rules=RULES,
                                                    minutes=minutes), encoding="utf-8")
    (folder / "handout").mkdir()
    tree = ast.parse(full)
    for number, e in enumerate(EXERCISES, 1):
        node = find(tree, e.function)
        figure = file_name(number, e).replace(".md", ".svg")
        parts = [f": {part} points" for part in e.parts] or [""] * len(paths(e))
        tests = "\n".join(f"* `{path}`{part}" for path, part in zip(paths(e), parts))
        owner = e.function.partition(".")[0] if "." in e.function else ""
        text = [f"# {number}. {e.name[0].upper() + e.name[1:]}", "",
                f"{e.points} points{' of the bonus' if e.function in BONUS else ''}, about {e.minutes} minutes. "
                f"Learned: {e.learned}.", "", "## Statement", "",
                f"`{owner + '.' if owner else ''}{node.name}({ast.unparse(node.args)})`", "",
                *(line.strip() for line in ast.get_docstring(node).splitlines()), "", "## Mathematics", "",
                MATHEMATICS[e.function], "", f"![figure]({figure})", "", "## What to deliver", "",
                f"The function in `dq.py`. {'Each of these tests counts by itself:' if e.parts else 'All must pass:'}",
                "", tests, ""]
        (folder / "handout" / file_name(number, e)).write_text("\n".join(text), encoding="utf-8")
        (folder / "handout" / figure).write_text(FIGURES[e.function](space), encoding="utf-8")


def file_name(number, e):
    return f"{number:02}-{e.function.replace('.', '-')}.md"


# ------------------------------------------------------------------------------------------------
# Figures: a few shapes in SVG

BLUE, ORANGE, GREY, WHITE = "#a8c8f0", "#f6c28b", "#dddddd", "#ffffff"


def picture(*shapes, width=560, height=200):
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
            f'font-size="12"><rect width="100%" height="100%" fill="white"/>{"".join(shapes)}</svg>\n')


def text(x, y, words, anchor="start"):
    words = str(words).replace("&", "&amp;").replace("<", "&lt;")
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}">{words}</text>'


def box(x, y, w, h, words="", fill=WHITE):
    return (f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" fill="{fill}" stroke="#555"/>'
            + text(x + w / 2, y + h / 2 + 4, words, "middle"))


def grid(x, y, rows, size=30, colours=None, title=""):
    """A table of words; colours: of the same shape."""
    cells = [box(x + j * size, y + i * size, size, size, word, colours[i][j] if colours else WHITE)
             for i, row in enumerate(rows) for j, word in enumerate(row)]
    return "".join([text(x, y - 8, title), *cells])


def bars(x, y, values, height=100, width=24, names=None, colours=None, title=""):
    drawn = [text(x, y - height - 10, title)]
    for i, value in enumerate(values):
        drawn.append(box(x + i * width, y - height * value, width - 4, height * value,
                         fill=colours[i] if colours else BLUE))
        drawn.append(text(x + i * width + width / 2 - 2, y + 14, names[i] if names else i, "middle"))
    return "".join(drawn)


def line(points, colour="#c0392b", dashed=False):
    points, dashes = " ".join(f"{x:.1f},{y:.1f}" for x, y in points), 'stroke-dasharray="4"' if dashed else ""
    return f'<polyline points="{points}" fill="none" stroke="{colour}" {dashes}/>'


def gate(_):
    return picture(bars(20, 150, [0.25, 0.6, 0.15], title="backward sees p"),
                   bars(220, 150, [0, 1, 0], colours=[ORANGE] * 3, title="forward is the gate"),
                   text(120, 100, "one argmax"), text(330, 100, "values of one, gradient of the other"))


def entropy(_):
    noise = [0.3 + 0.6 * abs(math.sin(3 * i)) for i in range(12)]
    return picture(bars(20, 150, [0] * 5 + [0.1, 1, 0.1] + [0] * 4, width=18, title="smooth region: low entropy"),
                   bars(300, 150, noise, width=18, colours=[ORANGE] * 12, title="detail: high entropy"))


def budget(_):
    return picture(grid(40, 40, [[""] * 4] * 4, colours=[[BLUE] * 4] * 4, title="image 1: all coarse"),
                   grid(220, 40, [[""] * 4] * 4, colours=[[ORANGE] * 4] * 4, title="image 2: all fine"),
                   text(370, 90, "shares of the batch: 0.5, 0.5"), text(370, 110, "a budget of halves is met"))


def through(_):
    steps = [(40 + 20 * i + j, 160 - 20 * i) for i in range(6) for j in (0, 20)]
    return picture(line(steps, "#1f4e8c"), line([(40, 170), (160, 50)], dashed=True),
                   text(200, 80, "value: the nearest code"), text(200, 110, "gradient: as if it were the dashed line"))


def nearest(_):
    codes = [(60, 50), (160, 60), (100, 150), (250, 120)]
    others = [line([(149, 95), each], GREY) for each in codes if each != (160, 60)]
    return picture(*(box(x - 6, y - 6, 12, 12, fill=BLUE) for x, y in codes), box(146, 92, 6, 6, fill=ORANGE),
                   line([(149, 95), (160, 60)]), *others,
                   text(300, 80, "blue: codes, orange: a vector"), text(300, 100, "its id is that of the nearest code"))


def follow(_):
    z = [(70, 60), (110, 50), (130, 90), (90, 100)]
    return picture(*(box(x - 3, y - 3, 6, 6, fill=ORANGE) for x, y in z), box(194, 124, 12, 12, fill=GREY),
                   box(94, 69, 12, 12, fill=BLUE), line([(200, 130), (104, 79)], dashed=True),
                   text(230, 80, "a code moves towards the average of what chose it"),
                   text(230, 100, "quickly in the first batches, slowly later"))


def dead(_):
    uses = [0.9, 0.6, 0.03, 0.8, 0.5, 0.02, 0.7]
    return picture(bars(30, 150, uses, width=40, colours=[ORANGE if u < 0.1 else BLUE for u in uses], title="uses"),
                   line([(20, 143), (320, 143)], dashed=True), text(330, 147, "dead below this"))


def mixture(_):
    coarse = [["A", "A", "B", "B"], ["A", "A", "B", "B"], ["C", "C", "D", "D"], ["C", "C", "D", "D"]]
    fine = [[chr(97 + 4 * i + j) for j in range(4)] for i in range(4)]
    mixed = [[fine[i][j] if i < 2 <= j else coarse[i][j] for j in range(4)] for i in range(4)]
    colours = [[ORANGE if i < 2 <= j else BLUE for j in range(4)] for i in range(4)]
    return picture(grid(20, 40, coarse, title="coarse map, repeated"), grid(200, 40, fine, title="fine map"),
                   grid(380, 40, mixed, colours=colours, title="mixed: region 1 is fine"))


def weights(_):
    rows = [["1/4", "1/4", "1", "1"] if i < 2 else ["1/4"] * 4 for i in range(4)]
    return picture(grid(40, 40, rows, 36, [[ORANGE if each == "1" else BLUE for each in row] for row in rows],
                        "four coarse and fine regions: each code counts 1"), height=220)


def example(space):
    """The example of Layout's docstring -> its ids of both grids, and its pairs."""
    torch, layout = space["torch"], space["Layout"](4, (2, 1))
    codes = torch.tensor([[[0, 0, 1, 2], [0, 0, 3, 4], [5, 5, 6, 6], [5, 5, 6, 6]]])
    pos, code = layout.pack(codes, torch.tensor([[[0, 1], [0, 0]]]))
    tables = []
    for k, side in enumerate(layout.sides):
        table = [[""] * side for _ in range(side)]
        for i in range(layout.offsets[k], layout.eos[k]):
            y, x = (layout.coordinates[i] * side / layout.fine_side).long().tolist()
            table[y][x] = i
        tables.append(table)
    n = int(layout.lengths(pos)[0])
    return layout, tables, pos[0, :n].tolist(), ["abcdefg"[c] if c >= 0 else "-1" for c in code[0, :n].tolist()]


def sequence(space):
    layout, (coarse, fine), pos, code = example(space)
    return picture(grid(20, 30, coarse, 40, title=f"coarse ids, EOS {layout.eos[0]}"),
                   grid(180, 30, fine, 30, title=f"fine ids, EOS {layout.eos[1]}"),
                   grid(20, 190, [pos, code], 34, title="region 1 is fine: positions and contents"), height=270)


def back(space):
    _, _, pos, code = example(space)
    rows = [["a", "a", "b", "c"], ["a", "a", "d", "e"], ["f", "f", "g", "g"], ["f", "f", "g", "g"]]
    colours = [[ORANGE if i < 2 <= j else BLUE for j in range(4)] for i in range(4)]
    return picture(grid(20, 40, [pos, code], 34, title="a sequence"),
                   grid(400, 40, rows, colours=colours, title="codes"))


def mask(space):
    layout, tables, pos, _ = example(space)
    torch, shapes = space["torch"], []
    for n, (known, t) in enumerate([(pos[:1], 1), (pos[:5], 5)]):
        may = layout.legal(torch.tensor([known[-1]]), layout.grains(torch.tensor([known])))[0]
        for k, table in enumerate(tables):
            colours = [[ORANGE if may[i] else BLUE if i in known else WHITE for i in row] for row in table]
            shapes.append(grid(20 + 130 * k, 30 + 140 * n, table, 50 if k == 0 else 25, colours,
                               f"after {known[-1]}" if k == 0 else "blue: written"))
        ends = [i for i in layout.eos if may[i]]
        shapes.append(text(260, 80 + 140 * n, "orange: may follow" + (f"; and EOS {ends[0]}" if ends else "")))
    return picture(*shapes, height=290)


def summed(_):
    return picture(box(20, 40, 150, 30, "content[c]", BLUE), text(185, 60, "+"),
                   box(205, 40, 150, 30, "position[p]", ORANGE), text(370, 60, "+"),
                   box(390, 40, 150, 30, "granularity[k(p)]", GREY), text(20, 110, "three rows, one vector"))


def shifted(_):
    return picture(grid(20, 140, [["label", "pair 0", "pair 1", "pair 2"]], 70, title="inputs"), *(
                   box(20 + 70 * t, 30, 70, 30, f"pos {t}, code {t}", ORANGE) for t in range(4)), *(
                   line([(55 + 70 * s, 140), (55 + 70 * t, 60)], "#888") for t in range(4) for s in range(t + 1)),
                   text(320, 50, "a step sees what is before it"), height=230)


def cut(_):
    p = [0.42, 0.28, 0.14, 0.1, 0.06]
    return picture(bars(30, 150, [2 * each for each in p], colours=[BLUE] * 2 + [ORANGE] + [GREY] * 2, width=50,
                        title="sorted, p = 0.8"), text(320, 80, "orange crosses p, and stays"))


def staircase(_):
    p, points, total = [0.2, 0.0, 0.5, 0.3], [(40, 160)], 0.0
    for i, each in enumerate(p):
        total += each
        points += [(40 + 60 * i, 160 - 120 * total), (100 + 60 * i, 160 - 120 * total)]
    return picture(line(points, "#1f4e8c"), line([(30, 100), (160, 100)], dashed=True), text(10, 104, "u"),
                   *(text(70 + 60 * i, 178, i, "middle") for i in range(4)),
                   text(300, 90, "the entry at which u is reached;"), text(300, 110, "entry 1 has no probability"))


def slots(_):
    rows = [["0"] * 5 + ["2"] * 4 + ["3"] * 3, ["1"] * 8 + ["4"] * 4]
    return picture(grid(20, 40, rows, 36, [[BLUE if int(each) % 2 else ORANGE for each in row] for row in rows],
                        "two slots, steps from left to right: which image is written"), height=140)


FIGURES = dict(zip([e.function for e in EXERCISES], [
    gate, entropy, budget, through, nearest, follow, dead, mixture, weights, sequence, back, mask, summed, shifted, cut,
    staircase, slots]))
