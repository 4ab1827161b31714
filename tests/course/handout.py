"""What is written for students alone: the README of their copy, and a handout on each exercise, with a picture.

The handouts come from the file that students get, so they follow a variant: docstrings are from its text, and pictures
from its functions. The formulas below leave open what a variant may change, and refer to the docstring for it.
"""
import ast

from exercises import EXERCISES, RULES, SECOND_WEEK, definitions, described

README = """\
# dq: two weeks from pixels to sequences of codes

This project works, except for {n} functions. In the first week (exercises 1 to {last}) you turn images into codes. In
the second week you turn codes into sequences, and a transformer models them. No GPU is needed.
{in_all}

```bash
python3 -m venv .venv && .venv/bin/pip install torch numpy pillow tqdm pytest
.venv/bin/python tests/course/assignment.py grade dq.py      # a table of points: now 0, "not written yet" {n} times
.venv/bin/python tests/course/assignment.py list             # the exercises, with their tests
```

1. Read the docstring at the top of `dq.py`, then `pack` in `tests/naive.py`. That file explains the method a second
   time, by loops, for one image. A function of `dq.py` computes the same for whole batches.
2. Take the exercises in the order of the table. The tests of an exercise need those that the table names.
3. For each exercise read its section in `handout/all.md`, its docstring, and the comments in its body. Most of these
   give the shape of a variable of our solution; yours may differ.
4. Run its tests: `python -m pytest -q` and the paths that `list` names. `python tests/course/picture.py 2` draws what
   your exercise 2 computes; the handout shows the same picture by our solution.
5. `assignment.py grade dq.py --only 3` prints your points of exercise 3 alone. It needs Linux, macOS or WSL.

| | exercise | function | points | minutes | difficulty | needs |
|---|---|---|---|---|---|---|
{table}

## What to hand in, and what counts

Hand in `dq.py` under this name; modules of your own that it imports go beside it. Where `tests/naive.py` has a loop for
an exercise, half of its points are for speed: a large batch may take a fifth of the loop's time. Your points may also
include *hidden cases*, a quarter of each exercise: the same tests with other sizes and random numbers. A whole file
is graded for at most eight minutes.

{rules}

## The open part

When all is written, you get a file `codes.pt`, the same for everyone. Put it into `out/` and make the best model of
these codes that 20 minutes on two cores allow: `python train_transformer.py`. You may change its flags and the model.
The rank is by nats per image on codes that nobody was given; training prints those of the held-out images you have.
Hand in a folder with `transformer.pt` and, if you changed it, `dq.py`. The class must still be called `DQTransformer`
and have `logits(pos, code, label)`, which gets the pairs one after the other.
"""

MATHEMATICS = {
    "GrainRouter.forward": """\
Let $l_k$ be the logits and $E_k$ independent samples of Exponential(1), so $-\\log E_k$ is Gumbel noise.
$\\arg\\max_k (l_k - \\log E_k)$ has the probabilities $\\mathrm{softmax}(l)$. Noise scaled by $s$ gives
$m_k = l_k - s \\log E_k$. Forward, the gate is $g = \\mathrm{onehot}(\\arg\\max m)$: exactly 0 and 1, not only up to
rounding, so mind the order of a sum of three. Backward it is a softmax $p$ of these logits, whose derivatives are
$\\partial p_k / \\partial m_j = p_k (1[k = j] - p_j)$. The docstring gives the gradient that results.""",
    "EntropyRouter.score": """\
Grey levels $y$ of a region, bins $b_i$, $i = 1 ... 32$: $h_i = \\mathrm{mean}_y \\exp(-((y - b_i) / 0.01)^2 / 2)$,
$p_i = h_i / \\sum_j h_j$, and the entropy is $-\\sum_i p_i \\log p_i$ in nats.""",
    "budget_loss": """\
The loss is a function of the fractions $s_k$ over all regions of the batch alone. So its gradient is the same for all
regions, and no image has to meet the budget by itself.""",
    "straight_through": """\
With $f(z) = q$ the nearest code, $f$ is constant almost everywhere. A straight-through gradient replaces
$\\partial f / \\partial z$ by a multiple of the identity: the docstring says how much of the gradient $z$ gets.""",
    "Codebook.assign": """\
Compare all vectors with all codes at once, by the distance of the docstring. A term that is the same for all codes can
be left out, and the scalar products of all vectors with all codes are one product of matrices.""",
    "Codebook.update": """\
With the decay $d$ of the docstring, weights $w_i$ and $A_v$ the vectors that chose code $v$:
$u_v = d u_v + (1 - d) \\sum_{i \\in A_v} w_i$, $s_v = d s_v + (1 - d) \\sum_{i \\in A_v} w_i z_i$,
$e_v = s_v / u_v$.""",
    "Codebook.restart": """\
With weights $w_i$ and $V$ codes, the mean use is $\\bar u = \\sum_i w_i / V$. Code $v$ is dead if
$u_v < \\mathrm{dead\\_below} \\cdot \\bar u$. It restarts at $e_v = z_i + 0.01 \\sigma \\epsilon$; $i$ is drawn with
a probability proportional to $w_i$. The docstring says what $u_v$ becomes; the sums are $s_v = u_v e_v$.""",
    "DQVAE.mix": """\
The mixed map $M$ is linear in the gates, so $\\partial L / \\partial g_k$ sums $\\partial L / \\partial M \\cdot
\\partial M / \\partial g_k$ over a region's cells: each gate learns what its map would have done.""",
    "DQVAE.cell_weight": """\
A code of granularity $k$ with factor $F_k$ fills $n_k = (F_k / F_K)^2$ cells of the finest grid.""",
    "Layout.pack": """\
An id gives granularity, coordinates and order. A sequence is the sorted set of the ids that are there, and all EOS ids;
what is not there can be sorted to the end.""",
    "Layout.unpack": """\
The inverse: write the contents to a row with an entry for every id, cut that row into the granularities' grids, and let
the granularity of each region choose among them. -1 stands where nothing is known.""",
    "Layout.legal": """\
Let $p(\\mathrm{image}) = \\prod_t p(\\mathrm{pos}_t | ...) p(\\mathrm{code}_t | ...)$. It sums to 1 over all images if
at each step something may follow, the factors sum to 1 over what may follow, and each path ends in one complete
image.""",
    "DQTransformer.embed": """\
A sum of three rows of tables. An EOS has a content of its own.""",
    "DQTransformer.logits": """\
Input $t$ is pair $t - 1$, and input 0 is the label. So output $t$ is about pair $t$ and knows only what is before. The
position stack says where. Then the position of pair $t$ is added, and the content stack says what.""",
    "filter_logits": """\
Sort the probabilities, $q_1 \\ge q_2 \\ge ...$. Top-k keeps the first k. The docstring says which of them top-p keeps,
and by which probabilities.""",
    "draw": """\
Inverse transform sampling: $u$ is uniform in (0, 1], and $F$ sums the probabilities in the order of the docstring. The
first entry at which $F \\ge u$ has the right probability. Rounding must neither draw an entry of probability 0 nor miss
the last one in this order.""",
    "decode_one": """\
One step of the loop in `tests/naive.py` for all slots at once, with a KV cache. Guidance mixes the logits of labelled
and unlabelled rows, $l_0 + \\mathrm{cfg} (l_1 - l_0)$, before the temperature.""",
}

QUESTIONS = [                                                                # question, what a full answer says
    ("Why must the gate's noise fade before training ends?",
     "In training the *sampled* granularities meet the budget, in use the *argmax* decides (1). A gate without a "
     "preference can meet the budget by noise alone (1), and then its argmax is far from it or arbitrary (1)."),
    ("What does it mean that an image has 90 nats under the model? When can two models be compared by nats?",
     "Its probability is e^-90, so a code for it takes 90 / ln 2 = 130 bits (1). The probabilities of all images sum "
     "to 1 (1). Only models of the same codes compare: another DQ-VAE has other codes and another quality (1)."),
    ("Why does a codebook collapse, and how do restarts and weights prevent it?",
     "A code that no vector chooses gets no update, so it stays away (1). A restart moves it to where vectors are (1). "
     "Without weights, a coarse code would count once for each cell that it covers (1)."),
    ("Why does the position come before the content, and what would be lost if the order were reversed?",
     "A content has a size and coordinates, which the position gives (1). The content stack can attend by distance "
     "from there (1). The other way round is normalised too, but it predicts contents for all positions at once (1)."),
    ("Is a longer sequence a better image? Say what the budget trades, and how you would measure it.",
     "More codes give a lower distortion and a higher rate (1). Compare PSNR or FD at equal bits (1), against random "
     "routing and fixed lengths at the same number of codes (1)."),
]
EXPERIMENTS = [                                                              # task, expected figures
    ("Train stage 1 with `--router learned`, `entropy` and `random` (three minutes each). Compare PSNR at equal codes "
     "per image, and explain the order.",
     "With 1,000 steps of the toy preset, about 40.6 codes per image each: learned 24.6 dB (24.2 to 24.7 for three "
     "seeds), entropy 24.2 (23.6 to 24.3), random 21.5 (21.5 to 22.1); fixed lengths 18.9 (16 codes), 25.2 (64)."),
    ("In a run of 1,000 steps, compare `budget` in `vae.jsonl` with the fraction of fine regions (`share`) of the "
     "held-out images, at each evaluation. Explain the difference.",
     "Early in a run the loss of sampled granularities is nearly 0, while the argmax can be far from one half: 0.26 at "
     "step 200 in one run. The noise fades from half of the run on; at the end it is 0.51 to 0.52."),
]


def write(folder, full, in_all, dq):
    """README.md and handout/ in a copy. full, dq: its dq.py with all solutions, as text and as a module"""
    import picture
    pictures, pages = picture.Pictures(dq), []
    (folder / "README.md").write_text(README.format(
        n=len(EXERCISES), last=SECOND_WEEK - 1, rules=RULES, in_all=in_all, table="\n".join(
            f"| {n} | {e.name} | `{e.function}` | {e.points} | {e.minutes} | {e.level} | {', '.join(e.needs.split())} |"
            for n, e in enumerate(EXERCISES, 1))), encoding="utf-8")
    (folder / "handout").mkdir()
    functions = definitions(ast.parse(full))
    for number, e in enumerate(EXERCISES, 1):
        node, (facts, *tests) = functions[e.function], described(e)
        pages += [f"# {number}. {e.name[0].upper() + e.name[1:]}", "", facts, "", "## Statement", "",
                f"`{e.function}({ast.unparse(node.args)})`", "",
                *(line.strip() for line in ast.get_docstring(node).splitlines()), "", "## Mathematics", "",
                MATHEMATICS[e.function], "", f"![picture {number}]({number:02}.png)", "",
                "## What to deliver", "",
                f"The function in `dq.py`. {'Each of these tests counts by itself:' if e.parts else 'All must pass:'}",
                "", "```", *tests, "```", ""]
        pictures.image(number - 1).save(folder / "handout" / f"{number:02}.png")
    for title, rows in (("Questions", QUESTIONS), ("Experiments", EXPERIMENTS)):
        pages += [f"# {title}\n", *(f"{n}. {row[0]}" for n, row in enumerate(rows, 1)), ""]
    (folder / "handout" / "all.md").write_text("\n".join(pages), encoding="utf-8")


def for_assistants():
    """Common mistakes of each exercise, with the code by which they differ from our solution; rubrics; figures."""
    from wrong_solutions import WRONG
    lines = ["# For assistants: common mistakes, rubrics, expected figures", "",
             "`_1`, `_2`, ... stand for the expressions in our solution. Each point of a rubric is marked (1).", ""]
    for number, e in enumerate(EXERCISES, 1):
        lines += [f"## {number}. {e.name}: {e.function}", ""]
        lines += [f"* {why}: `{' '.join(new.split())}` instead of `{' '.join(old.split())}`"
                  for why, old, new in WRONG[e.function]] + [""]
    for title, rows in (("Questions, 3 points each", QUESTIONS), ("Experiments", EXPERIMENTS)):
        lines += [f"## {title}\n", *(f"{n}. {task} *{answer}*" for n, (task, answer) in enumerate(rows, 1)), ""]
    return "\n".join(lines) + "\n"
