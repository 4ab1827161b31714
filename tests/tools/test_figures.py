"""tools/figures.py: the walk through one image against naive computations, and the tables and curves of logs."""
import contextlib
import io
import json
import math
import re
import shutil
import sys
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import common
import conftest
import data as reading
import dq
import figures
import naive
import symptoms
from warm import Script

SHAPES = [(16, (8,)), (16, (8, 4)), (16, (8, 4, 2))]
NAMES = {1: ["fixed"], 2: ["coarse", "fine"], 3: ["coarse", "medium", "fine"]}


def call(*args):
    return conftest.call(figures.main, *args)


def untrained(path, size, factors, router="entropy", classes=()):
    """A checkpoint of random models; the router's thresholds split toy image 0 into all granularities.

    -> DQTransformer, DQVAE, toy image 0
    """
    K, x = len(factors), reading.open_data(None, size)[1][0][0]
    vae = dq.DQVAE(dq.VAEConfig(size=size, factors=factors, ratios=(1 / K,) * K, router=router, codebook_size=12))
    vae.codebook.codes.normal_()
    if router == "entropy":
        scores = vae.router.score(x[None]).flatten().sort().values
        middle = (scores[1:] + scores[:-1]) / 2
        vae.router.thresholds.copy_(middle[[len(scores) * (k + 1) // K - 1 for k in range(K - 1)]])
    model = dq.DQTransformer(dq.TransformerConfig(size=size, factors=factors, codebook_size=12, classes=classes,
                                                  width=32, heads=2, position_layers=1, content_layers=1))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(std=0.25)
    dq.save_checkpoint(path, "dq-transformer", model.config, model, vae_config=asdict(vae.config),
                       vae_weights=vae.state_dict())
    return model.eval(), vae.eval(), x


def pairs_of(model, vae, x):
    """-> the pairs of an image, by loops."""
    codes, grains = vae.encode(x[None])
    return naive.pack(model.layout, codes[0], grains[0])


def printed_nats(text):
    return float(re.search(r"total ([\d.]+) nats", text)[1])


# ------------------------------------------------------------------------------------------------
# walk: the printout


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def walk(request, tmp_path_factory):
    """-> DQTransformer, DQVAE and toy image 0; the printout of their walk; the folder with walk.png"""
    torch.manual_seed(0)
    size, factors = request.param
    folder, text = tmp_path_factory.mktemp("walk"), io.StringIO()
    models = untrained(folder / "transformer.pt", size, factors)
    with contextlib.redirect_stdout(text):
        assert call("walk", folder / "transformer.pt", "--pairs", 1000) is None
    return SimpleNamespace(size=size, factors=factors, models=models, folder=folder, text=text.getvalue())


@torch.no_grad()
def test_the_printout_shows_every_pair_and_what_it_costs(walk):
    (model, vae, x), size, factors, text = walk.models, walk.size, walk.factors, walk.text
    layout = model.layout
    assert text.endswith(f"wrote {walk.folder / 'walk.png'}\n")

    pairs, wanted = pairs_of(model, vae, x), []
    assert {int(layout.grain[p]) for p, c in pairs if c >= 0} == set(range(len(factors)))
    for t, (position, code) in enumerate(pairs):
        k = sum(position > eos for eos in layout.eos)
        name = NAMES[len(factors)][k]
        n, side = 2 ** k, layout.side * 2 ** k                               # n x n codes per region
        row, column = divmod(position - sum(layout.n_regions * s + 1 for s in layout.cells[:k]), side)
        where = f"{name}, region {row // n * layout.side + column // n} (row {row // n}, column {column // n})"
        where += f", cell {row % n * n + column % n} (row {row % n}, column {column % n})" if n > 1 else ""
        wanted.append((t, position, f"{where}  code {code}" if code >= 0 else "EOS"))
    found = re.findall(r"^ +t=(\d+) +id (\d+) +(.*)$", text, re.MULTILINE)
    assert [(int(t), int(position), what) for t, position, what in found] == wanted

    pos, code = (torch.tensor(each)[None] for each in zip(*pairs))
    losses = model(pos, code)
    costs = {name: losses[name].item() for name in ("position", "content")}
    assert printed_nats(text) == pytest.approx(sum(costs.values()), abs=2e-3)
    rows = re.findall(r"^ +([a-z]+) +(\d+) +(\d+\.\d+) +(\d+\.\d+)$", text, re.MULTILINE)
    assert [name for name, *_ in rows] == [*NAMES[len(factors)], "all"]
    for column, wanted in ((1, len(pairs)), (2, costs["position"]), (3, costs["content"])):
        values = [float(row[column]) for row in rows]
        assert values[-1] == pytest.approx(wanted, abs=2e-3) and sum(values[:-1]) == pytest.approx(wanted, abs=4e-3)
    bits = sum(costs.values()) / math.log(2)
    plain = sum(c >= 0 for _, c in pairs) * math.log2(12) + layout.n_regions * math.log2(len(factors))
    assert f"{bits:.1f} bits = {bits / size ** 2:.3f} bits per pixel" in text
    assert f"see 2: {plain / size ** 2:.3f}" in text and f"in all {plain:.0f}, or" in text
    error = (vae(x[None]).reconstruction.clamp(-1, 1) - x).square().mean().item()
    assert float(re.search(r"PSNR of ([\d.]+) dB", text)[1]) == pytest.approx(10 * math.log10(4 / error), abs=0.01)


def matrix_below(text, line):
    """The numbers of the matrix that follows the first line that contains `line`."""
    lines = text.splitlines()
    start, rows = next(i for i, each in enumerate(lines) if line in each) + 1, []
    while re.fullmatch(r" {7}[ \d.]+", lines[start]):
        rows.append([float(number) for number in lines[start].split()])
        start += 1
    return rows


@pytest.mark.parametrize("router", ["learned", "entropy", "random"])
@torch.no_grad()
def test_scores_grains_and_codes_are_printed(router, tmp_path, capsys):
    model, vae, x = untrained(tmp_path / "t.pt", 16, (8, 4), router)
    assert call("walk", tmp_path / "t.pt", "--pairs", 1000) is None
    text = capsys.readouterr().out
    out = vae(x[None])
    score = vae.router.score(x[None], out.maps)[0]
    assert matrix_below(text, "the mean granularity" if router == "learned" else "the entropy" if router == "entropy"
                        else "a random number") == [[round(v, 2) for v in row] for row in score.tolist()]
    assert matrix_below(text, "here its choice is") == out.grains[0].tolist()
    assert matrix_below(text, "it is one code all the same") == out.codes[0].tolist()
    threshold = vae.router.thresholds[0] if router != "learned" else 0.5     # what is shown is what was decided by
    assert torch.equal(score > threshold, out.grains[0] == 1)
    assert f"[DQVAE.quantize, {type(vae.router).__name__}]" in text


@torch.no_grad()
def test_probabilities_at_the_moments(walk):
    """Everything that is printed for a step is computed from the pairs before it alone."""
    (model, vae, x), factors = walk.models, walk.factors
    blocks = re.findall(r"^   t=(\d+), (.*): (\d+) valid positions? of (\d+)\n((?:     .*\n)+)", walk.text, re.M)
    pairs, layout = pairs_of(model, vae, x), model.layout
    eos = [t for t, (_, code) in enumerate(pairs) if code < 0]
    times = [int(t) for t, *_ in blocks]
    if len(factors) == 1:
        assert times == [0, eos[0] // 2, eos[0]]
    else:                                                                    # here one coarse code or two come first
        assert times == sorted({0, eos[0] // 2, *(t + 1 for t in eos[:-1])})
    for t, when, n_legal, P, lines in blocks:
        t, places = int(t), re.findall(r"p ([\d.]+)  id (\d+) +(.*)", lines)
        legal = naive.legal(layout, [position for position, _ in pairs[:t]])
        assert int(n_legal) == len(legal) and int(P) == layout.n_positions
        pos, code = (torch.tensor(each)[None] for each in zip(*pairs[:t + 1]))
        place, content = model.logits(pos, code)
        p, q = place[0, t].softmax(0), content[0, t].softmax(0)
        assert {int(position) for _, position, _ in places} <= legal
        for value, position, _ in places:
            assert float(value) == pytest.approx(p[int(position)].item(), abs=1e-4)
        values = [float(value) for value, *_ in places]
        rest = re.search(r"p ([\d.]+)  all (\d+) others together", lines)
        assert len(places) + (int(rest[2]) if rest else 0) == len(legal)
        assert sum(values) + (float(rest[1]) if rest else 0) == pytest.approx(1, abs=1e-3)
        assert max(p).item() == pytest.approx(values[0], abs=1e-4)
        assert [int(i) for _, i, text in places if text.endswith("<- the next pair")] == [pairs[t][0]]
        told = re.search(r"content: code (\d+), p ([\d.]+), rank (\d+) of 12", lines)
        assert bool(told) == (pairs[t][1] >= 0)
        if told:
            c = pairs[t][1]
            assert int(told[1]) == c and float(told[2]) == pytest.approx(q[c].item(), abs=1e-4)
            assert int(told[3]) == 1 + sum(value > q[c] for value in q)
            other = re.search(r"rank 1 is code (\d+), p ([\d.]+)", lines)
            assert int(other[1] if other else told[1]) == q.argmax()


@pytest.mark.parametrize("size, factors", SHAPES + [(24, (4, 2)), (16, (16, 8, 4, 2))])
@torch.no_grad()
def test_probabilities_sum_to_one_over_the_legal_places(size, factors, tmp_path):
    model, vae, x = untrained(tmp_path / "t.pt", size, factors, "random")
    walk = figures.Walk(model, vae, x)
    positions = walk.pos.tolist()
    assert positions[-1] == model.layout.end and positions.count(model.layout.end) == 1
    for t in range(len(positions)):
        legal, p = naive.legal(model.layout, positions[:t]), walk.place[t].double().exp()
        assert p[sorted(legal)].sum().item() == pytest.approx(1, abs=1e-5)
        assert set(p.nonzero()[:, 0].tolist()) <= legal
    assert torch.allclose(walk.content.exp().sum(-1), torch.ones(len(positions)))


def test_a_long_sequence_is_shortened(tmp_path, capsys):
    model, vae, x = untrained(tmp_path / "t.pt", 32, (8, 4))
    pairs = pairs_of(model, vae, x)
    assert call("walk", tmp_path / "t.pt", "--pairs", 7) is None
    text = capsys.readouterr().out
    start, wanted = 0, []
    for eos in [t for t, (_, code) in enumerate(pairs) if code < 0]:
        assert eos - start > 7
        wanted += [*range(start, start + 5), *range(eos - 2, eos + 1)]       # two thirds of 7 at the start, and the EOS
        assert f"\n       ... and {eos - start - 7} more ...\n" in text
        start = eos + 1
    assert [int(t) for t in re.findall(r"^ +t=(\d+) +id", text, re.MULTILINE)] == wanted


# ------------------------------------------------------------------------------------------------
# walk: the image, its class, user errors


@torch.no_grad()
def test_the_class_of_a_toy_image_is_known_and_that_of_a_file_is_not(tmp_path, capsys):
    path, toy = tmp_path / "t.pt", reading.open_data(None, 16)[1]
    model, vae, _ = untrained(path, 16, (8, 4), classes=toy.classes)
    x, _ = toy[6]                                                            # a triangle
    common.to_picture(x, 16).save(tmp_path / "x.png")
    pos, code = (torch.tensor(each)[None] for each in zip(*pairs_of(model, vae, x)))
    nats = {label: sum(model(pos, code, torch.tensor([label])).values()).item() for label in (-1, 2, 3)}
    assert len({round(value, 1) for value in nats.values()}) == 3
    for args, label, told in ((["--seed", 6], 2, "held-out toy image 6 (16 x 16 pixels, class triangle)"),
                              (["--image", tmp_path / "x.png"], -1, "x.png (16 x 16 pixels, no class)"),
                              (["--image", tmp_path / "x.png", "--label", "cross"], 3, "class cross"),
                              (["--seed", 6, "--label", "3"], 3, "class cross")):
        assert call("walk", path, *args) is None
        text = capsys.readouterr().out
        assert told in text.splitlines()[0]
        assert printed_nats(text) == pytest.approx(nats[label], abs=0.05)    # a file has 8 bits a channel

    untrained(path, 16, (8, 4), classes=("cat", "dog"))                      # no circle, no class 0
    assert call("walk", path) is None and "no class" in capsys.readouterr().out


def test_user_errors_of_walk_are_one_line(tmp_path):
    path = tmp_path / "t.pt"
    assert call("walk", path) == f"error: no such file: {path} (train_transformer.py writes it)"
    untrained(path, 16, (8, 4))
    missing = tmp_path / "no.png"
    assert call("walk", path, "--image", missing) == f"error: {missing}: No such file or directory"
    assert call("walk", path, "--label", "cat") == "error: this model has no classes; leave --label out"
    assert "must end in .png" in call("walk", path, "--out", tmp_path / "x.txt")
    assert "--seed must be at least 0" in call("walk", path, "--seed", -1)
    assert "--pairs must be at least 1" in call("walk", path, "--pairs", 0)
    assert call("walk", path, "--", "--steps", 3) == 2 and call() == 2 and call("run") == 2
    assert [file.name for file in tmp_path.iterdir()] == ["t.pt"]


# ------------------------------------------------------------------------------------------------
# walk: the figure


def is_the_figure(path):
    width, height = Image.open(path).size
    return 900 <= width <= 1000 and 600 < height < 1000


def test_the_figure_is_written(walk):
    assert is_the_figure(walk.folder / "walk.png")


def test_the_figure_is_written_where_it_is_asked_for(tmp_path):
    untrained(tmp_path / "t.pt", 16, (8,))
    assert call("walk", tmp_path / "t.pt", "--out", tmp_path / "new/w.png") is None
    assert is_the_figure(tmp_path / "new/w.png") and not (tmp_path / "walk.png").exists()


@torch.no_grad()
def test_panels_show_what_is_where(tmp_path):
    model, vae, x = untrained(tmp_path / "t.pt", 16, (8, 4, 2))
    walk, size = figures.Walk(model, vae, x), figures.SIDE
    codes = figures.draw_codes(walk)
    H = walk.layout.fine_side
    for row in range(H):
        for column in range(H):                                              # beside lines and numbers
            at = column * size // H + 5, row * size // H + size // H // 2
            assert codes.getpixel(at) == figures.code_colour(int(walk.codes[row, column]))
    score, low, high = figures.draw_score(walk), walk.score.argmin().item(), walk.score.argmax().item()
    centre = [(size // 4 + 60 + r % 2 * size // 2, size // 4 + 60 + r // 2 * size // 2) for r in range(4)]
    assert score.getpixel(centre[low]) == (0x3a, 0x6e, 0xa5) and score.getpixel(centre[high]) == (0xc0, 0x15, 0x30)

    start, p = figures.draw_places(walk, 0), walk.place[0].exp()
    redness = [start.getpixel((x, y))[0] - start.getpixel((x, y))[1] for x, y in centre]
    assert redness.index(max(redness)) == p[:4].argmax() and redness.index(min(redness)) == p[:4].argmin()
    for t in range(len(walk.pos)):                                           # the frame's upper edge, in the middle
        k, r, j = walk.where(int(walk.pos[t]))
        side, n = size // 2, 2 ** k
        column, row = (r % 2 * n + j % n, r // 2 * n + j // n) if r is not None else (0, 0)
        side = side // n if r is not None else size
        places = figures.draw_places(walk, t)
        assert places.getpixel((column * side + side // 2, row * side + 1)) == (0, 0, 0)


# ------------------------------------------------------------------------------------------------
# rd and log


def no_training(command):
    raise AssertionError(f"nothing was to be trained, but {command}")


def fake_run(folder, codes, psnr, step=30):
    """Write the files of a run of 30 steps, as far as the table reads them."""
    folder.mkdir(parents=True)
    lines = [dict(step=10, loss=0.5, psnr_now=3.0), dict(step=20, codes_per_image=codes + 1, psnr=psnr - 1),
             dict(step=30, codes_per_image=codes, psnr=psnr)]
    (folder / "vae.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    torch.save(dict(kind="dq-vae", config={}, weights={}, step=step, settings=dict(steps=30)), folder / "vae.pt")


def fake_runs(out, seed=0):
    fake_run(out / f"fixed-coarse/seed-{seed}", 16.0, 18.0)
    fake_run(out / f"fixed-fine/seed-{seed}", 64.0, 24.0)
    for i, budget in enumerate((0.1, 0.3, 0.5, 0.7, 0.9)):
        for name, codes, psnr in (("learned", 20, 19), ("entropy", 21, 18.5), ("random", 22, 18.125)):
            fake_run(out / f"{name}-{budget}/seed-{seed}", codes + 10.0 * i, psnr + i)


HEAD = ["| fine budget | learned: dB of each seed (codes) | entropy | random | line between both fixed lengths |",
        "|---|---|---|---|---|"]


def test_the_table_of_finished_runs(tmp_path, monkeypatch, capsys):
    fake_runs(tmp_path)
    monkeypatch.setattr(figures.subprocess, "run", no_training)
    assert call("rd", tmp_path, "--jobs", 2, "--", "--steps", 30) is None
    assert capsys.readouterr().out.splitlines() == HEAD + [
        "| fixed, coarse | 18.00 (16.0) | | | |",
        "| 0.1 | 19.00 (20.0) | 18.50 (21.0) | 18.12 (22.0) | 18.50 |",      # 6 dB for 48 codes: 1 for 8
        "| 0.3 | 20.00 (30.0) | 19.50 (31.0) | 19.12 (32.0) | 19.75 |",
        "| 0.5 | 21.00 (40.0) | 20.50 (41.0) | 20.12 (42.0) | 21.00 |",
        "| 0.7 | 22.00 (50.0) | 21.50 (51.0) | 21.12 (52.0) | 22.25 |",
        "| 0.9 | 23.00 (60.0) | 22.50 (61.0) | 22.12 (62.0) | 23.50 |",
        "| fixed, fine | 24.00 (64.0) | | | |"]
    assert Image.open(tmp_path / "rate_distortion.png").size == (560, 400)


def test_a_table_shows_each_seed_that_is_there(tmp_path, monkeypatch, capsys):
    """One row has more seeds, and one row has no run."""
    fake_runs(tmp_path)
    (tmp_path / "random-0.1/seed-0/vae.jsonl").unlink()
    fake_run(tmp_path / "learned-0.5/seed-2", 44.0, 21.5)
    monkeypatch.setattr(figures.subprocess, "run", no_training)
    assert call("rd", tmp_path, "--rows", "learned-0.5", "--seeds", 0, 2, "--", "--steps", 30) is None
    lines = capsys.readouterr().out.splitlines()
    assert lines[3] == "| 0.1 | 19.00 (20.0) | 18.50 (21.0) |  | 18.50 |"
    assert lines[5] == "| 0.5 | 21.00, 21.50 (42.0) | 20.50 (41.0) | 20.12 (42.0) | 21.25 |"  # the line: at 42 codes


def test_a_row_that_is_missing_is_trained(tmp_path, monkeypatch, capsys):
    fake_runs(tmp_path)
    (tmp_path / "entropy-0.3/seed-0/vae.pt").unlink()
    commands, status = [], 1

    def run(command):
        commands.append(command[2:])
        return figures.subprocess.CompletedProcess(command, status)
    monkeypatch.setattr(figures.subprocess, "run", run)
    assert call("rd", tmp_path, "--factors", 4, 2, "--", "--steps", 30) == (
        "error: the run entropy-0.3, seed 0 failed; its messages are above")
    status = 0
    assert call("rd", tmp_path, "--factors", 4, 2, "--", "--steps", 30) is None
    expected = ["--factors", "4", "2", "--router", "entropy", "--ratios", "0.7", "0.3", "--seed", "0", "--steps", "30"]
    assert commands == 2 * [["--out", str(tmp_path / "entropy-0.3/seed-0"), *expected]]
    fake_run(tmp_path / "entropy-0.3/seed-7", 31.0, 19.5, step=10)
    assert call("rd", tmp_path, "--rows", "entropy-0.3", "--seeds", 7, "--", "--steps", 30) is None
    assert commands.pop()[-3:] == ["--steps", "30", "--resume"]
    assert call("rd", tmp_path, "--rows", "fixed-fine", "--seeds", 1, 2) is None
    assert commands[2:] == [["--out", str(tmp_path / f"fixed-fine/seed-{seed}"), "--factors", "4", "--seed", str(seed)]
                            for seed in (1, 2)]
    path = tmp_path / "random-0.9/seed-0/vae.jsonl"
    path.write_text("")
    assert call("rd", tmp_path, "--rows", "fixed-fine") == (
        f"error: {tmp_path / 'fixed-fine/seed-0/vae.pt'} is of a run of 30 steps, not 1000; name another folder")
    assert call("rd", tmp_path, "--", "--steps", 30) == f"error: {path} does not end with an evaluation"


@pytest.mark.parametrize("flag, name, flags", [("--seed", "--seed", ["--seed", 1]), ("--see", "--seed", ["--see=1"]),
                                               ("--rat", "--ratios", ["--rat", 0.5, 0.5])])
def test_what_rd_sets_can_t_be_set_again(tmp_path, flag, name, flags):
    assert call("rd", tmp_path, "--", *flags) == f"error: {flag} can't stand behind --: {name} is set for each run"
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("few_for_thresholds")
@pytest.mark.parametrize("factors", [(8, 4), (8, 4, 2)])
def test_the_curve_of_a_dial(factors, tmp_path, monkeypatch, capsys):
    """One row per fraction: the codes are those of the binomial ratios, and the checkpoint's own row comes first."""
    K, names = len(factors), ("one", "other")
    monkeypatch.setattr(reading, "open_data", lambda *args, **kwargs: [reading.ToyShapes(16, n) for n in (130, 64)])
    monkeypatch.setattr(figures, "DIALS", (0.25, 0.75))
    for name in names:
        vae = dq.DQVAE(dq.VAEConfig(size=16, factors=factors, ratios=[1 / K] * K, router="dial", codebook_size=12))
        vae.codebook.codes.normal_()
        (tmp_path / name).mkdir()
        dq.save_checkpoint(tmp_path / name / "vae.pt", "dq-vae", vae.config, vae,
                           folders=dict(data=None, held_out=None))
    one, other = (tmp_path / name / "vae.pt" for name in names)
    assert call("dial", tmp_path / "dial.png", one, "--trained", other) is None
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:2] for row in rows] == [[str(one), "its own"], [str(one), "0.25"], [str(one), "0.75"],
                                         [str(other), "its own"]]
    for row, f in zip(rows[1:3], (0.25, 0.75)):                              # codes per region: 1, 4, 16
        assert float(row[2]) == pytest.approx(4 * (1 + 3 * f) ** (K - 1), rel=0.15)
    assert Image.open(tmp_path / "dial.png").size == (560, 400)


def test_the_curves_of_a_log(tmp_path, monkeypatch):
    path, lines, drawn, plot = tmp_path / "vae.jsonl", [], {}, figures.plot
    for step in (10, 20, 30, 40):
        lines.append(dict(step=step, l1=1 / step, loss=2.0, share=[0.5, 0.5]))
        if step % 20 == 0:                                                   # an evaluation
            lines.append(dict(step=step, l1=3 / step, psnr=20.0 + step, once=1.0, n=step))
    del lines[-1]["once"]                                                    # a single point is no curve
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def note(curves, title, *args, **kwargs):
        drawn[title] = [points for _, points in curves.values()]
        return plot(curves, title, *args, **kwargs)
    monkeypatch.setattr(figures, "plot", note)
    assert call("log", path) is None
    assert drawn == {"l1": [[(step, 1 / step) for step in (10, 20, 30, 40)]],
                     "loss": [[(step, 2.0) for step in (10, 20, 30, 40)]],
                     "held-out l1": [[(20, 3 / 20), (40, 3 / 40)]], "held-out psnr": [[(20, 40.0), (40, 60.0)]]}
    assert Image.open(tmp_path / "vae.curves.png").size == (4 * 300, 220)
    path.write_text("no log\n")
    assert call("log", path) == f"error: {path} is not the log of a run, or has no curve yet"


# ------------------------------------------------------------------------------------------------
# Neighbours


def test_the_nearest_picture_is_that_of_a_loop():
    pictures, x = torch.rand(7, 3, 8, 8), torch.rand(4, 3, 8, 8)
    x[2] = pictures[5].flip(2)                                               # mirrored
    near, distance = figures.nearest(x, pictures)
    for i in range(4):
        views = [view for picture in pictures for view in (picture, picture.flip(2))]
        each = [((x[i] - view) ** 2).mean().sqrt().item() for view in views]
        assert distance[i].item() == pytest.approx(min(each), abs=1e-5)
        assert torch.equal(near[i], views[each.index(min(each))])
    assert distance[2] < 1e-3 < distance[0] and torch.equal(near[2], x[2])


def test_samples_are_shown_beside_their_neighbours(images, tmp_path, capsys):
    path = tmp_path / "t.pt"
    untrained(path, 16, (8, 4), classes=("circle", "cross"))
    assert call("neighbours", path, "--data", images, "--n", 6, "--columns", 3) is None
    assert "6 samples: " in capsys.readouterr().out
    w, h = Image.open(tmp_path / "neighbours.png").size
    assert (w, h) == (3 * 130 - 2, 4 * 144 - 2)                              # tiles of 128, 2 apart, lines of 14
    assert call("neighbours", path, "--data", images, "--n", 5, "--columns", 3).startswith("error: --n 5 is not a")
    shutil.copytree(images, tmp_path / "others")
    flags = ["--data", images, "--held-out", tmp_path / "others", "--n", 6, "--columns", 3]
    assert call("neighbours", path, *flags) is None
    assert "16 training images" in (told := capsys.readouterr().out) and "16 held-out images" in told


def test_the_teaser_shows_images_tokens_reconstructions_and_samples(images, tmp_path):
    path, files = tmp_path / "t.pt", sorted(images.glob("circle/*.png"))[:2]
    untrained(path, 16, (8, 4), classes=("circle", "cross"))
    assert call("teaser", path, *files, "--label", "cross", "--seed", 3) is None
    sheet = Image.open(tmp_path / "teaser.png")
    assert sheet.size == (7 * 150 - 6, 26 + 2 * 166)                         # tiles of 144, 6 apart, 22 for a label
    model, vae = dq.load_transformer(path, "cpu")
    x = torch.stack([reading.load_image(file, 16) for file in files])
    codes, _ = vae.encode(x)
    new, _ = model.layout.unpack(*dq.generate(model, torch.ones(4).long(), dq.SampleOptions(1.0, cfg=1.5), 3))
    shown = {0: x, 2: vae.decode(codes), 3: vae.decode(new[::2]), 5: vae.decode(new[1::2])}
    for column, wanted in shown.items():
        for row in range(2):
            tile = sheet.crop((column * 150, 26 + row * 166, column * 150 + 144, 26 + row * 166 + 144))
            assert tile.tobytes() == common.to_picture(wanted[row], 144).tobytes(), (column, row)


# ------------------------------------------------------------------------------------------------
# A checkpoint to distribute


def test_a_shrunk_checkpoint_samples_the_same_images(run, tmp_path):
    assert call("shrink", run / "transformer.pt", tmp_path / "small.pt") is None
    assert (tmp_path / "small.pt").stat().st_size < 0.5 * (run / "transformer.pt").stat().st_size
    (model, vae), (small, small_vae) = (dq.load_transformer(path, "cpu")
                                        for path in (run / "transformer.pt", tmp_path / "small.pt"))
    assert torch.equal(vae.codebook.codes, small_vae.codebook.codes)
    for ours, theirs in ((model, small), (vae, small_vae)):
        for name, x in ours.state_dict().items():
            torch.testing.assert_close(x, theirs.state_dict()[name], rtol=2 ** -8, atol=0)
    label = torch.arange(16) % 4
    (pos, code), (pos2, code2) = dq.generate(model, label), dq.generate(small, label)
    same = ((pos == pos2) & (code == code2)).all(1).float().mean()
    assert same > 0.7                                                        # rounding changes few samples
    assert call("shrink", run / "vae.pt", tmp_path / "x.pt").startswith("error: ") and not (tmp_path / "x.pt").exists()


# ------------------------------------------------------------------------------------------------
# Symptoms


def test_a_symptom_is_provoked_and_told(tmp_path, monkeypatch, capsys):
    """Provoke the symptom that stops by itself after a few steps, and report another from a log."""
    def run(command, stderr, text):
        process = Script(*command[1:], *conftest.VAE)                        # a small model, to save time
        _, error = process.communicate()
        return SimpleNamespace(returncode=process.returncode, stderr=error)
    monkeypatch.setattr(symptoms.subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["symptoms.py", str(tmp_path), "--only", "not a number"])
    assert common.run(symptoms.main) is None
    said = capsys.readouterr().out
    assert "not finite in the loss" in said and "--lr 100" in said
    assert len(list((tmp_path / "few").glob("*.png"))) == 96 and not (tmp_path / "symptoms.png").exists()
    (tmp_path / "collapse").mkdir()
    lines = [dict(step=step, **more) for step in (100, 200, 300)
             for more in (dict(budget=0.5), dict(psnr=step / 10, codebook_used=0.25, perplexity=3.0))]
    (tmp_path / "collapse/vae.jsonl").write_text("\n".join(map(json.dumps, lines)))
    case = next(case for case in symptoms.CASES if case.name == "collapse")
    assert symptoms.told(case, tmp_path)[1] == (
        "step 200: psnr 20, codebook_used 0.25, perplexity 3, (budget in training 0.50000)")
