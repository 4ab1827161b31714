"""tools/ablations.py: each variant is a normalised distribution over images and lacks the feature that it names."""
import itertools
from functools import lru_cache

import pytest
import torch

import ablations
import common
import data as reading
import dq
import naive
import quality
import train_transformer
from conftest import ROOT, TRANSFORMER
from runs import read_log
from test_layout import grain_maps, padded, random_image
from test_quality import save, small_models
from test_sampling import draws_as_the_naive_loop
from test_transformer import all_images
from warm import Script

KNOWN = ablations.variants([])
ORDERS = ["region-first", "fine-to-coarse", "raster", "region-raster"]
MODELS = ["no-rotary", "no-qk-norm", "shared-position", "no-granularity", "no-order", "single-stack"]
CASES = [(8, (4,)), (4, (2, 1)), (6, (2, 1)), (8, (4, 2, 1))]


def tiny(name, size=4, factors=(2, 1), V=2, classes=(), layers=(2, 2), width=16):
    """A random model whose predictions are far from uniform; embeddings that a variant removes stay zero."""
    torch.manual_seed(1)
    config = dq.TransformerConfig(size=size, factors=factors, codebook_size=V, classes=classes, width=width, heads=2,
                                  position_layers=layers[0], content_layers=layers[1], qk_norm=True)
    with KNOWN[name].classes():
        model = dq.DQTransformer(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1 and p.requires_grad:
                p.normal_(std=0.25)
    return model


# ------------------------------------------------------------------------------------------------
# Orders


def naive_ids(name, side, factors, grains):
    """The position ids of an image: a list of its codes, sorted as the order says. grains: a list of side^2"""
    widths = [side * factors[0] // f for f in factors]                       # codes in a row of each granularity
    offsets = [sum(n ** 2 + 1 for n in widths[:k]) for k in range(len(factors) + 1)]
    codes = []                                                               # granularity, region, row and column, id
    for k, n in enumerate(widths):
        c, step = n // side, widths[-1] // n                                 # c x c codes per region
        for row, column in itertools.product(range(n), repeat=2):
            r = row // c * side + column // c
            if grains[r] == k:
                codes.append((k, r, row * step, column * step, offsets[k] + row * n + column))
    if name in ("raster", "region-raster"):
        codes.sort(key=lambda code: code[2:4] if name == "raster" else code[1:4])
        return [code[-1] for code in codes] + [offsets[-1] - 1]
    ids = []
    for turn in range(len(factors)):
        k = len(factors) - 1 - turn if name == "fine-to-coarse" else turn
        own = [code for code in codes if code[0] == k]
        own.sort(key=lambda code: code[1:4] if name == "region-first" else code[2:4])
        ids += [code[-1] for code in own] + [offsets[turn + 1] - 1]
    return ids


@lru_cache
def tree(name, side, factors):
    """All sequences of ids, one for each tiling, and {prefix: the set of ids that follow it}."""
    tilings = itertools.product(range(len(factors)), repeat=side ** 2)
    sequences, follow = [naive_ids(name, side, factors, grains) for grains in tilings], {}
    for ids in sequences:
        for t, p in enumerate(ids):
            follow.setdefault(tuple(ids[:t]), set()).add(p)
        follow[tuple(ids)] = {ids[-1]}                                       # `end` repeats
    return sequences, follow


def may_follow(name, layout, prefix):
    """As naive.legal: the ids that may follow a list of ids."""
    ids = list(itertools.takewhile(lambda p: p != layout.end, prefix))
    factors = tuple(int(layout.cells[-1] ** 0.5 / s ** 0.5) for s in layout.cells)  # up to a common one
    return tree(name, layout.side, factors)[1][tuple(ids + [layout.end] * (len(ids) < len(prefix)))]


@pytest.mark.parametrize("size, factors", CASES)
@pytest.mark.parametrize("name", ORDERS)
def test_packing_equals_a_loop_and_unpacking_is_its_inverse(name, size, factors, device):
    layout = KNOWN[name].layout(size, factors).to(device)
    grains = grain_maps(layout, device)
    codes = random_image(layout, grains)
    pos, code = layout.pack(codes, grains)
    assert pos.shape == code.shape == (len(codes), layout.max_len)
    for b, each in enumerate(grains.flatten(1).tolist()):
        canvas = dict(zip(*(x[b].tolist() for x in dq.Layout.pack(layout, codes, grains))))  # which content an id has
        pairs = [(p, canvas[p]) for p in naive_ids(name, layout.side, factors, each)]
        assert list(zip(pos[b].tolist(), code[b].tolist())) == padded(layout, pairs)
    again = layout.unpack(pos, code)
    assert torch.equal(again[0], codes) and torch.equal(again[1], grains)


@pytest.mark.parametrize("size, factors", CASES)
@pytest.mark.parametrize("name", ORDERS)
def test_legal_is_the_set_of_ids_that_tilings_continue_with(name, size, factors, device):
    """At each step of the sequences of all tilings, with the granularities known so far and with the final ones.

    As every set is exact, every valid sequence is one of these.
    """
    layout = KNOWN[name].layout(size, factors).to(device)
    sequences, _ = tree(name, layout.side, factors)
    pos = torch.tensor([ids + [layout.end] * (layout.max_len - len(ids)) for ids in sequences], device=device)
    prev = torch.nn.functional.pad(pos[:, :-1], (1, 0), value=-1)
    final = layout.legal(prev, layout.grains(pos))
    assert final.shape == (*pos.shape, layout.n_positions)
    for t in range(layout.max_len):
        known = layout.grains(pos[:, :t]) if t else torch.full((len(pos), layout.n_regions), -1, device=device)
        assert torch.equal(layout.legal(prev[:, t], known), final[:, t])
    for b, ids in enumerate(pos.tolist()):
        for t in range(layout.max_len):
            assert set(final[b, t].nonzero().flatten().tolist()) == may_follow(name, layout, ids[:t])


def test_a_worked_example():
    """2 x 2 regions, of which the first two are fine, with the ids of test_layout's image."""
    grains = torch.tensor([[[1, 1], [0, 0]]])
    codes = torch.tensor([[[1, 2, 5, 6], [3, 4, 7, 8], [0, 0, 9, 9], [0, 0, 9, 9]]])
    for name, wanted_pos, wanted_code in (
            ("ours", [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 21], [0, 9, -1, 1, 2, 5, 6, 3, 4, 7, 8, -1]),
            ("region-first", [2, 3, 4, 5, 6, 9, 10, 7, 8, 11, 12, 21], [0, 9, -1, 1, 2, 3, 4, 5, 6, 7, 8, -1]),
            ("fine-to-coarse", [5, 6, 7, 8, 9, 10, 11, 12, 4, 2, 3, 21], [1, 2, 5, 6, 3, 4, 7, 8, -1, 0, 9, -1]),
            ("raster", [5, 6, 7, 8, 9, 10, 11, 12, 2, 3, 21], [1, 2, 5, 6, 3, 4, 7, 8, 0, 9, -1]),
            ("region-raster", [5, 6, 9, 10, 7, 8, 11, 12, 2, 3, 21], [1, 2, 3, 4, 5, 6, 7, 8, 0, 9, -1])):
        pos, code = (x[0, :len(wanted_pos)].tolist() for x in KNOWN[name].layout(4, (2, 1)).pack(codes, grains))
        assert pos == wanted_pos and code == wanted_code, name


# ------------------------------------------------------------------------------------------------
# Every variant


@pytest.mark.parametrize("name", ORDERS + MODELS)
@torch.no_grad()
def test_probabilities_of_all_images_sum_to_one(name):
    """For one region. The next test has all tilings of 2 x 2 regions, and their contents do not depend on the order."""
    model = tiny(name, 2, layers=(1, 1), width=8)
    codes, grains = all_images(model.layout, 2)
    assert len(codes) == 18
    losses = model(*model.layout.pack(codes, grains))
    total = (-(losses["position"] + losses["content"])).double().exp().sum().item()
    assert abs(total - 1) < 1e-4


@pytest.mark.parametrize("name", ORDERS + MODELS)
@torch.no_grad()
def test_probabilities_of_all_tilings_sum_to_one_with_three_granularities(name):
    """The codebook has a single entry, so contents have probability 1."""
    model = tiny(name, 8, (4, 2, 1), V=1)
    grains = torch.tensor(list(itertools.product(range(3), repeat=4))).view(-1, 2, 2)
    losses = model(*model.layout.pack(torch.zeros(len(grains), 8, 8, dtype=torch.long), grains))
    assert (losses["content"] == 0).all() and losses["position"].min() > 0
    assert abs((-losses["position"]).double().exp().sum().item() - 1) < 1e-5


def shared_place(p, factors, side=2):
    """The row of PlaceEmbedding for an id: its first cell on the finest grid; EOS rows come after all cells."""
    for k, f in enumerate(factors):
        n, step = side * factors[0] // f, f // factors[-1]                   # codes in a row, cells per code
        if p <= n * n:
            H = side * factors[0] // factors[-1]
            return H * H + k if p == n * n else p // n * step * H + p % n * step
        p -= n * n + 1


@pytest.mark.parametrize("name", ORDERS + MODELS)
@torch.no_grad()
def test_the_sampler_draws_what_the_naive_loop_draws(name, monkeypatch):
    """The naive loop uses a naive `legal` of the variant's order, or the variant's embeddings."""
    factors = (4, 2, 1)
    model, embed = tiny(name, 8, factors, V=5, classes=("a", "b"), layers=(1, 1)), naive.embed
    if name in ORDERS:
        monkeypatch.setattr(naive, "legal", lambda layout, prefix: may_follow(name, layout, prefix))
    if name == "shared-position":
        monkeypatch.setattr(naive, "position_row", lambda model, p: model.position.weight[shared_place(p, factors)])
    if name == "single-stack":
        monkeypatch.setattr(naive, "embed", lambda model, p, c: embed(model, p, c) + model.past.weight[p])
    draws_as_the_naive_loop(model, 2.5, dict(slots=2, bucket=8), labels=[0, 1, -1])
    pos, code = dq.generate(model, torch.full((40,), -1), seed=5)
    codes, grains = model.layout.unpack(pos, code)
    assert (codes >= 0).all() and (grains >= 0).all()                        # complete
    for again, drawn in zip(model.layout.pack(codes, grains), (pos, code)):  # and in order, each code once
        assert torch.equal(again, drawn)


# ------------------------------------------------------------------------------------------------
# The feature that each variant lacks


def parameters(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_numbers_of_parameters():
    n = {name: parameters(tiny(name, 8, (4, 2, 1))) for name in ["ours"] + ORDERS + MODELS}
    ids, places, C = (4 + 1) + (16 + 1) + (64 + 1), 64 + 3, 16
    assert all(n[name] == n["ours"] for name in ORDERS + ["no-rotary", "no-qk-norm", "single-stack"])
    assert n["ours"] - n["shared-position"] == (ids - places) * C
    assert n["ours"] - n["no-granularity"] == 3 * C
    assert n["ours"] - n["no-order"] == (64 + 3) * C


@torch.no_grad()
def test_shared_positions_are_places_on_the_finest_grid():
    """Two ids have one row if and only if their codes begin in the same cell; an EOS has its own."""
    model = tiny("shared-position", 8, (4, 2, 1), V=5)
    place = []
    for f, side in ((4, 2), (2, 4), (1, 8)):
        for row, column in itertools.product(range(side), repeat=2):
            place.append((row * f, column * f))                              # pixel, which here is a cell
        place.append(f"end of {f}")
    rows = model.position(torch.arange(len(place)))
    same = (rows[:, None] == rows).all(-1)
    assert same.tolist() == [[a == b for b in place] for a in place]
    pos = torch.tensor([0, 5])                                               # the whole first region, and its quarter
    a, b = model.embed(pos, torch.tensor([3, 3])) - model.granularity.weight[:2]
    torch.testing.assert_close(a, b)


@torch.no_grad()
def test_without_granularity_a_pair_is_the_sum_of_two_rows():
    model = tiny("no-granularity", 8, (4, 2, 1), V=5)
    pos, code = torch.arange(model.layout.n_positions), torch.randint(0, 5, (model.layout.n_positions,))
    assert torch.equal(model.embed(pos, code), model.content.weight[code] + model.position.weight)


@torch.no_grad()
def test_without_order_the_past_is_a_set():
    """With one layer below the position head. Further layers would attend to its outputs, which depend on the order."""
    pos, code = torch.tensor([[0, 2, 3, 4, 9, 10]]), torch.tensor([[1, 0, 1, -1, 0, 1]])
    swapped = [2, 0, 1, 3, 4, 5]                                             # coarse pairs; the last pair stays
    for name in ("ours", "no-order"):
        model = tiny(name, layers=(1, 1))
        a, b = model.logits(pos, code)[0], model.logits(pos[:, swapped], code[:, swapped])[0]
        head = model.position_head.weight
        hidden = []
        for p, c in ((pos, code), (pos[:, swapped], code[:, swapped])):
            x = torch.cat([model.condition.weight[-1:][None], model.embed(p, c)[:, :-1]], 1) + model.order.weight[:6]
            hidden.append(model.position_norm(model.position_stack[0](x))[0, -1] @ head.t())
        assert a.shape == b.shape and torch.allclose(*hidden, atol=1e-5) == (name == "no-order")


@torch.no_grad()
def test_a_single_stack_draws_contents_without_their_place():
    pos, code = torch.tensor([[0, 2, 3, 4, 9, 10]]), torch.tensor([[1, 0, 1, -1, 0, 1]])
    other = pos.clone()
    other[0, 2] = 4
    for name in ("ours", "single-stack"):
        model = tiny(name, layers=(2, 4))
        content, content2 = model.logits(pos, code)[1][0], model.logits(other, code)[1][0]
        torch.testing.assert_close(content[:2], content2[:2])
        assert torch.allclose(content[2], content2[2], atol=1e-5) == (name == "single-stack")
        assert not torch.allclose(content[3], content2[3], atol=1e-5)        # the next step attends to it
    assert (len(model.position_stack), len(model.content_stack)) == (6, 0)


# ------------------------------------------------------------------------------------------------
# The command

FLAGS = ["--steps", 4, "--eval-every", 2, "--save-every", 2, "--dtype", "fp32", *TRANSFORMER]


def call(out, codes, *args, flags=()):
    ablations.main([out, "--codes", codes, *args, "--", *FLAGS, *flags])


@pytest.fixture
def argv(vae_run):
    return dict(codes=vae_run / "codes.pt", flags=["--content-layers", 2])


def test_the_metrics_are_nats_of_the_same_codes(argv, images, tmp_path, capsys):
    """Computed again from the checkpoints, with the classes of each variant. A second call trains nothing."""
    names = ["raster", "2+1"]
    call(tmp_path, argv["codes"], "--seeds", 0, "--only", *names, flags=argv["flags"])
    shown = capsys.readouterr().out
    held_out = dq.load_checkpoint(argv["codes"], "dq-codes")["held_out"]     # encoded in bfloat16, perhaps
    codes, grains, label = (held_out[name].long() for name in ("codes", "grains", "label"))
    codes, grains = codes[:, 0], grains[:, 0]                                # as they are: the only view
    assert len(codes) == len(reading.open_data(images, 16)[1]) and (label >= 0).all()
    for name, layout, layers in (("raster", ablations.RasterLayout, (1, 2)), ("2+1", dq.Layout, (2, 1))):
        with ablations.Variant(layout).classes():
            model, _ = dq.load_transformer(tmp_path / f"{name}-0" / "transformer.pt", "cpu")
        assert type(model.layout) is layout and (len(model.position_stack), len(model.content_stack)) == layers
        with torch.no_grad():
            losses = model(*model.layout.pack(codes, grains), label)
        nats, position = sum(losses.values()).mean().item(), losses["position"].mean().item()
        row = next(line for line in shown.splitlines() if line.startswith(f"| {name} |")).split(" | ")
        assert abs(float(row[1]) - nats) < 0.006 and abs(float(row[4]) - position) < 0.006
        coarse, fine = map(float, row[5].split(", "))
        assert abs(position + coarse + fine - nats) < 0.05                   # in bfloat16, where the hardware has it
        with torch.no_grad():
            pos, code = model.layout.pack(codes, grains)
            p = model.logits(pos, code, label)[1].log_softmax(-1).gather(2, code.clamp(min=0)[..., None])[..., 0]
        assert abs(-p[pos < model.layout.eos[0]].sum() / len(pos) - coarse) < 0.05
    assert read_log(tmp_path / "raster-0" / "transformer.jsonl")[-1]["step"] == 4
    call(tmp_path, argv["codes"], "--seeds", 0, "--only", *names, flags=argv["flags"])
    again = capsys.readouterr().out
    assert again == shown[shown.index("Held-out"):]                          # nothing is trained
    with pytest.raises(dq.UserError, match="is of a run of 4 steps, not 6"):
        call(tmp_path, argv["codes"], "--seeds", 0, "--only", *names, flags=[*argv["flags"], "--steps", 6])


def test_a_stopped_run_resumes(argv, tmp_path, monkeypatch):
    """It ends as if it had never stopped, and the removed embedding is not trained."""
    call(tmp_path / "whole", argv["codes"], "--seeds", 0, "--only", "no-order", flags=argv["flags"])
    save = common.Record.save

    def save_and_stop(self, *args, **how):
        save(self, *args, **how)
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common.Record, "save", save_and_stop)
        call(tmp_path / "halves", argv["codes"], "--seeds", 0, "--only", "no-order", flags=argv["flags"])
    assert dq.DQTransformer is KNOWN["ours"].model                           # the classes are back
    call(tmp_path / "halves", argv["codes"], "--seeds", 0, "--only", "no-order", flags=argv["flags"])
    whole, halves = (dq.load_checkpoint(tmp_path / name / "no-order-0" / "transformer.pt", "dq-transformer")
                     for name in ("whole", "halves"))
    assert whole["step"] == halves["step"] == 4
    assert all(torch.equal(whole["weights"][name], x) for name, x in halves["weights"].items())
    assert (whole["weights"]["order.weight"] == 0).all() and (whole["weights"]["position.weight"] != 0).all()


def test_the_table():
    def log(*metrics):
        return [dict(nats_per_image=nats, position_nats=position) for nats, position in metrics]
    runs = {"ours": [log((12, 1), (10, 2)), log((9, 3), (14, 4))], "raster": [log((11.5, 1)), log((20, 5))]}
    contents = {"ours": [[3.0, 5.0], [4.0, 6.5]], "raster": [[1.0, 9.5], [2.0, 13.0]]}
    assert ablations.table(runs, contents, [0, 7])[-2:] == [
        "| ours | 10.00, 14.00 | 12.00 (10.00 to 14.00) | 0.00 (0.00 to 0.00) | 3.00 | 3.50, 5.75 | 9.50 |",
        "| raster | 11.50, 20.00 | 15.75 (11.50 to 20.00) | 3.75 (1.50 to 6.00) | 3.00 | 1.50, 11.25 | 15.75 |"]
    assert ablations.table({"raster": runs["raster"]}, contents, [0, 7])[-1].split(" | ")[3].strip() == ""


def test_samples_are_drawn_in_the_order_of_the_variant(tmp_path, monkeypatch, capsys):
    """The runs are finished, so the command only samples. The test computes the metrics of the same samples."""
    plain, (_, vae) = common.pick_device("cpu", "fp32")[1], small_models()
    classifier = quality.train_classifier(16, steps=10, batch_size=32)       # its accuracy does not matter
    monkeypatch.setattr(quality, "train_classifier", lambda size, device: classifier)
    monkeypatch.setattr(common, "pick_device", lambda *names: (torch.device("cpu"), plain, {}))
    codes = tmp_path / "codes.pt"
    held_out = dict(codes=torch.zeros(1, 1, 4, 4), grains=torch.zeros(1, 1, 2, 2), label=torch.zeros(1))
    dq.save_checkpoint(codes, "dq-codes", vae.config, vae, version=1, classes=reading.ToyShapes.classes,
                       held_out=held_out)
    evaluator = quality.Evaluator(classifier, 16, 8, 0, torch.device("cpu"))
    expected = {}
    for name in ("ours", "raster"):
        model = tiny(name, size=16, factors=(8, 4), V=16, classes=reading.ToyShapes.classes, width=32)
        folder = tmp_path / f"{name}-0"
        with KNOWN[name].classes():
            save(folder / "transformer.pt", model, vae, step=6, settings=dict(steps=6))
        (folder / "transformer.jsonl").write_text('{"step": 6, "nats_per_image": 9.0, "position_nats": 1.0}\n')
        sets = [evaluator.of_samples(model, vae, options, plain) for options in (dq.SampleOptions(), quality.DEFAULTS)]
        expected[name] = [f"{each[key]:{form}}" for key, form in (("fd", ".2f"), ("agreement", ".3f")) for each in sets]
    assert expected["ours"] != expected["raster"]
    ablations.main([tmp_path, "--codes", codes, "--seeds", 0, "--only", "ours", "raster", "--samples", 8,
                    "--", "--steps", 6])
    rows = {line.split(" | ")[0]: line for line in capsys.readouterr().out.splitlines()}  # the second table wins
    for name, texts in expected.items():
        assert rows[f"| {name}"] == f"| {name} | {' | '.join(f'{x} ({x} to {x})' for x in texts)} |"
    dq.save_checkpoint(codes, "dq-codes", vae.config, vae, version=1, classes=("cat", "dog"))
    with pytest.raises(dq.UserError, match="--samples is for the toy data"):
        ablations.main([tmp_path, "--codes", codes, "--samples", 8])


def test_variants_of_the_toy_preset():
    assert list(KNOWN) == ["ours"] + ORDERS + MODELS + ["adamw", "former", "1+5", "3+3", "5+1"]
    assert list(ablations.variants(["--preset", "imagenet256"]))[-3:] == ["1+23", "12+12", "23+1"]
    config = train_transformer.parse(KNOWN["5+1"].flags)[1]
    assert (config.position_layers, config.content_layers) == (5, 1)


def test_user_errors_are_one_line(vae_run, tmp_path):
    codes, out = vae_run / "codes.pt", tmp_path / "out"
    done = Script(ROOT / "tests/tools/ablations.py", out, "--codes", codes, "--only", "ours", "rastr")
    _, error = done.communicate()
    assert done.returncode == 1 and len(error.splitlines()) == 1
    assert error.startswith("error: no such variant: rastr; choose from ours, region-first, ")
    for flag in ("--seed=3", "--out", "--res", "--codes"):
        with pytest.raises(dq.UserError, match="can't stand behind --"):
            ablations.main([out, "--codes", codes, "--", flag])
    with pytest.raises(dq.UserError, match="no such file"):
        ablations.main([out, "--codes", tmp_path / "codes.pt"])
    with pytest.raises(SystemExit):
        ablations.main([out, "--codes", codes, "--", "--no-such-flag"])
    assert not out.exists()
