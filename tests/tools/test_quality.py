"""tools/quality.py: the metrics against closed forms and loops, and the commands on small checkpoints."""
import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import common
import data as reading
import dq
import quality
import train_transformer
import train_vae
from conftest import plain
from quality import features, frechet_distance, precision_recall
from data import ToyShapes


def with_moments(n, mean, covariance):
    """n random rows with exactly this mean (D,) and covariance (D, D)."""
    x = torch.randn(n, len(mean), dtype=torch.double)
    x = x - x.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T.cov()), x.T, upper=False).T
    return white @ torch.linalg.cholesky(covariance).T + mean


def random_covariance(D):
    a = torch.randn(D, 2 * D, dtype=torch.double)
    return a @ a.T / D


def eigenvalues(D):
    return torch.rand(2, D, dtype=torch.double) + 0.1


@pytest.mark.parametrize("rotated", [False, True])
def test_fd_of_commuting_covariances_is_the_closed_form(rotated):
    """With the same eigenvectors Q: the distance of the means plus that of the square roots of the eigenvalues."""
    (a, b), m1, m2 = eigenvalues(5), torch.randn(5).double(), torch.randn(5).double()
    Q = torch.linalg.qr(torch.randn(5, 5, dtype=torch.double)).Q if rotated else torch.eye(5, dtype=torch.double)
    x, y = with_moments(40, m1, Q * a @ Q.T), with_moments(60, m2, Q * b @ Q.T)
    wanted = sum((m1 - m2) ** 2) + sum((a.sqrt() - b.sqrt()) ** 2)
    assert frechet_distance(x, y) == pytest.approx(wanted.item(), rel=1e-9)
    assert frechet_distance(y, x) == pytest.approx(wanted.item(), rel=1e-9)


def test_fd_by_the_eigenvalues_of_the_product():
    for D in (2, 3, 8):
        x = with_moments(50, torch.randn(D).double(), random_covariance(D)).float()
        y = with_moments(30, torch.randn(D).double(), random_covariance(D)).float()
        a, b = x.double().numpy(), y.double().numpy()
        s1, s2 = (np.atleast_2d(np.cov(z, rowvar=False)) for z in (a, b))
        roots = np.sqrt(np.linalg.eigvals(s1 @ s2).real)
        wanted = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * roots.sum()
        assert frechet_distance(x, y) == pytest.approx(wanted, rel=1e-9)     # computed in float64, whatever the input


def test_fd_of_equal_sets_is_zero():
    x = torch.randn(50, 6)
    assert 0 <= frechet_distance(x, x.flip(0)) < 1e-9
    assert 0 <= frechet_distance(x[:5], x[:5]) < 1e-5                        # fewer rows than features: a singular S
    with pytest.raises(dq.UserError, match="not finite"):                    # as of a broken model
        frechet_distance(x, x.index_fill(0, torch.tensor([7]), math.nan))
    assert frechet_distance(x, x + 3) == pytest.approx(6 * 9, rel=1e-5)


def test_fd_of_one_distribution_shrinks_with_more_images():
    floors = [np.mean([frechet_distance(torch.randn(n, 16), torch.randn(n, 16)) for _ in range(4)])
              for n in (50, 500, 5000)]
    assert floors[0] > 5 * floors[1] > 25 * floors[2] > 0


def naive_fraction(points, centres, k):
    """The fraction of points that are at most as far from some centre as its k-th nearest other centre."""
    count = 0
    for p in points:
        for i, c in enumerate(centres):
            others = sorted(math.dist(c, d) for j, d in enumerate(centres) if j != i)
            if math.dist(p, c) <= others[k - 1]:
                count += 1
                break
    return count / len(points)


@pytest.mark.parametrize("n, m, k", [(24, 31, 3), (31, 24, 1), (501, 9, 3), (9, 501, 2)])
def test_precision_and_recall_equal_double_loops(n, m, k):
    real, fake = torch.randn(n, 2).double(), 1.5 * torch.randn(m, 2).double() + 0.5
    wanted = naive_fraction(fake.tolist(), real.tolist(), k), naive_fraction(real.tolist(), fake.tolist(), k)
    assert wanted[0] != wanted[1] and 0 < min(wanted)
    assert precision_recall(real, fake, k) == pytest.approx(wanted)


def test_precision_and_recall_of_equal_disjoint_and_narrow_sets():
    x = torch.randn(200, 64).double()
    assert precision_recall(x, x.flip(0)) == (1, 1)
    assert precision_recall(x.repeat(5, 1), x.repeat(5, 1)) == (1, 1)        # balls of radius 0 contain their centre
    assert precision_recall(x, x + 100) == (0, 0)
    y = 0.9 * torch.randn(200, 64).double()
    far = precision_recall(x + 1e8, y + 1e8)                                 # |x|^2 + |y|^2 - 2 x y has no digits left
    assert far == precision_recall(x, y) and 0 < min(far) < max(far) < 1
    twice = torch.cat([x, x + 100])
    assert precision_recall(twice, x) == (1, 0.5)                            # one of two modes is missing
    assert precision_recall(x, twice) == (0.5, 1)


def test_a_classifier_learns_in_a_few_steps():
    classifier = quality.train_classifier(16, steps=60, batch_size=32)
    assert not classifier.training
    x, y = quality.toy_images(16, 300, seed=5)
    assert (y // 3).tolist() == [i % 4 for i in range(300)] and set(y.tolist()) == set(range(12))
    z = features(classifier, x)
    assert z.shape == (300, 64) and z.dtype == torch.double
    one = classifier.body(x[299:])[0].double().flatten(1)                    # 64, locations; from another batch
    assert z[299].tolist() == pytest.approx([sum(row) / len(row) for row in one.tolist()], rel=1e-4, abs=1e-5)
    right = classifier.head(z.float()).argmax(1) == y
    assert torch.equal(classifier(x).argmax(1) == y, right) and right.float().mean() > 0.25  # by chance: 0.08
    assert torch.equal(classifier.shape(z), classifier(x).argmax(1) // 3)
    one, other = (quality.train_classifier(16, steps=10, batch_size=32) for _ in range(2))
    assert torch.equal(features(one, x), features(other, x))


def small_models(size=16, classes=ToyShapes.classes):
    torch.manual_seed(0)
    vae = dq.DQVAE(dq.VAEConfig(size=size, codebook_size=16, channels=32))
    vae(quality.toy_images(size, 16, seed=0)[0])                           # the codebook starts with the first batch
    config = dq.TransformerConfig(size=size, codebook_size=16, classes=classes, width=32, heads=2, position_layers=1,
                                  content_layers=1)
    return dq.DQTransformer(config), vae.eval()


def save(path, model, vae, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    dq.save_checkpoint(path, "dq-transformer", model.config, model, vae_config=asdict(vae.config),
                       vae_weights=vae.state_dict(), **more)
    return path


def test_the_command_measures_other_images_reconstructions_and_samples(tmp_path, monkeypatch, capsys):
    model, vae = small_models()
    path = save(tmp_path / "transformer.pt", model, vae)
    classifier = quality.train_classifier(16, seed=3, steps=20, batch_size=32)
    monkeypatch.setattr(quality, "train_classifier", lambda size, seed, device: classifier)
    monkeypatch.setattr(common, "pick_device", lambda *names: (torch.device("cpu"), plain, {}))
    quality.main([str(path), "--n", "60", "--seed", "3", "--temperature", "0.9", "--top-k", "5", "--cfg", "1.5"])
    said = capsys.readouterr().out

    (real, _), (other, kind) = (quality.toy_images(16, 60, 3 + seed) for seed in (quality.REAL, quality.OTHER))
    label = kind // 3
    pos, code = dq.generate(model.eval(), label, dq.SampleOptions(0.9, 5, 1.0, 1.5), seed=3)
    with torch.no_grad():
        sets = {"other real images": other, "reconstructions": vae(other).reconstruction.clamp(-1, 1),
                "samples": vae.decode(model.layout.unpack(pos, code)[0]).clamp(-1, 1)}
    lines = {line[:20].strip(): line[20:].split() for line in said.splitlines()}
    for name, images in sets.items():
        x, y = features(classifier, real), features(classifier, images)
        right = (classifier(images).argmax(1) // 3 == label).float()
        wanted = [frechet_distance(x, y), *precision_recall(x, y), right.mean().item()]
        assert [float(text) for text in lines[name]] == pytest.approx(wanted, abs=2e-3)
    each = ", ".join(f"{name} {right[i::4].mean():.2f}" for i, name in enumerate(ToyShapes.classes))
    assert said.splitlines()[-1] == f"agreement of the samples by class: {each}"


@pytest.mark.parametrize("args, says", [
    (["nowhere.pt"], "no such file"), (["FOLDER"], "not trained on the classes"),
    (["FOLDER", "--temperature", "0"], "temperature"), (["FOLDER", "--n", "3"], "--n: must be at least 4"),
    (["FOLDER", "--seed", "-1"], "--seed"), (["file"], "not a checkpoint"),
    (["table"], "required: out"), (["table", "file"], "file"), (["table", "x", "--rows", "fixed-32"], "fixed-32"),
    (["table", "x", "--steps", "0"], "--steps"), (["table", "x", "--seeds", "-1"], "--seeds")])
def test_user_errors_are_one_line(args, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    save(tmp_path / "FOLDER", *small_models(classes=("circle", "cross", "square", "triangle")))  # in a folder's order
    with pytest.raises(SystemExit) as end:
        common.run(lambda: quality.main(args))
    line = capsys.readouterr().err.splitlines()[-1] if end.value.code == 2 else end.value.code
    assert says in line and "\n" not in line


# ------------------------------------------------------------------------------------------------
# The table


def test_rows_are_flags_of_the_first_stage():
    configs = {row: train_vae.parse(flags)[1] for row, flags in quality.ROWS.items()}
    assert len(configs) == 11
    for row, config in configs.items():
        kind, value = row.split("-")                                         # codes, or fraction of fine regions
        if kind == "fixed":
            assert (config.size // config.factors[0]) ** 2 == int(value) and len(config.factors) == 1
        else:
            assert config.router == kind and config.factors == (8, 4)
            assert config.ratios == pytest.approx((1 - float(value), float(value)))


@pytest.fixture
def trainers(monkeypatch):
    """Replaces both trainers by functions that write small models. -> the calls, and a set of folders to fail in"""
    calls, broken = [], set()
    (model, vae), quick = small_models(16), quality.train_classifier(16, steps=4, batch_size=8)
    config, schedule = train_vae.PRESETS["toy"]
    monkeypatch.setitem(train_vae.PRESETS, "toy", (replace(config, size=16), schedule))

    def stage(parse, kind):
        def main(argv):
            args, *_ = parse(argv)
            calls.append((args.out.name, args.resume, argv))
            final = dict(step=args.steps, settings=dict(steps=args.steps))
            if str(args.out.relative_to(args.out.parents[1])) in broken:
                raise dq.UserError("step 7: not finite in the loss")
            if kind == "vae":
                args.out.mkdir(parents=True)
                dq.save_checkpoint(args.out / "vae.pt", "dq-vae", vae.config, vae, **final)
                (args.out / "codes.pt").touch()
                lines = (dict(step=4, psnr=1.0, bits_per_pixel=2.0), dict(step=5, psnr=21.5, bits_per_pixel=0.375),
                         dict(step=6, loss=1))
                (args.out / "vae.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            else:
                assert args.codes == args.out.parent / "vae/codes.pt" and args.out.name == f"seed-{args.seed}"
                save(args.out / "transformer.pt", model, vae, **final)
        return main
    monkeypatch.setattr(train_vae, "main", stage(train_vae.parse, "vae"))
    monkeypatch.setattr(train_transformer, "main", stage(train_transformer.parse, "transformer"))
    monkeypatch.setattr(quality, "train_classifier", lambda size, device: quick)
    few = quality.toy_images                                                 # a table needs no accuracy
    monkeypatch.setattr(quality, "toy_images", lambda size, n, *a, **k: few(size, min(n, 16), *a, **k))
    monkeypatch.setattr(quality, "step_seconds", lambda *args: 0.25)
    monkeypatch.setattr(quality, "images_per_second", lambda *args: 123.0)
    return calls, broken


def run_table(out, capsys, *flags):
    quality.main(["table", str(out), "--n", "8", "--vae-steps", "5", "--steps", "6", *flags])
    return capsys.readouterr().out


def test_the_table_trains_what_is_missing_and_remembers(tmp_path, trainers, capsys):
    calls, _ = trainers
    first = run_table(tmp_path, capsys, "--rows", "fixed-16", "learned-0.5", "--seeds", "0", "1")
    assert [call[0] for call in calls] == ["vae", "seed-0", "seed-1"] * 2 and not any(call[1] for call in calls)
    assert calls[3][2][-5:] == ["--router", "learned", "--ratios", "0.5", "0.5"]
    lines = first.splitlines()
    assert lines[0].count("|") == lines[2].count("|") == lines[3].count("|") == 12
    assert " | 0.375 | 21.50 | " in lines[2] and Image.open(tmp_path / "samples.png").width > 8 * 16
    assert lines[2].startswith("| fixed-16 | ") and lines[3].startswith("| learned-0.5 | ")
    calls.clear()
    assert run_table(tmp_path, capsys, "--rows", "fixed-16", "learned-0.5", "--seeds", "0", "1") == first and not calls

    cell = json.loads((tmp_path / "fixed-16/seed-1/figures.json").read_text())
    assert cell["settings"]["n"] == 8 and lines[2].endswith(" | 123.0 | 0.250 |")
    cell["FD, defaults"] = 1000.0                                            # the table shows the stored cells
    (tmp_path / "fixed-16/seed-1/figures.json").write_text(json.dumps(cell))
    other = json.loads((tmp_path / "fixed-16/seed-0/figures.json").read_text())["FD, defaults"]
    told = run_table(tmp_path, capsys, "--rows", "fixed-16", "--seeds", "0", "1")
    assert f"| {(other + 1000) / 2:.2f} ({other:.2f} to 1000.00) |" in told

    (tmp_path / "fixed-16/seed-1/figures.json").write_text("{")              # damaged: measured again, not trained
    assert run_table(tmp_path, capsys, "--rows", "fixed-16", "--seeds", "0", "1").splitlines()[2].split("|")[3:10] \
        == lines[2].split("|")[3:10] and not calls
    run_table(tmp_path, capsys, "--rows", "fixed-16", "--seeds", "1", "--n", "9")
    assert json.loads((tmp_path / "fixed-16/seed-1/figures.json").read_text())["settings"]["n"] == 9 and not calls


def test_unfinished_runs_resume_and_others_are_refused(tmp_path, trainers, capsys):
    calls, _ = trainers
    model, vae = small_models(16)
    save(tmp_path / "fixed-64/seed-0/transformer.pt", model, vae, step=4, settings=dict(steps=6))
    save(tmp_path / "fixed-64/seed-1/transformer.pt", model, vae, step=4, settings=dict(steps=4))
    with pytest.raises(dq.UserError, match="1 of 2 cells failed: .*seed-1.* of a run of 4 steps, not 6"):
        run_table(tmp_path, capsys, "--rows", "fixed-64", "--seeds", "0", "1")
    assert [call[:2] for call in calls] == [("vae", False), ("seed-0", True)]


def test_a_cell_that_fails_does_not_stop_the_others(tmp_path, trainers, capsys):
    _, broken = trainers
    broken.add("fixed-16/seed-0")
    with pytest.raises(dq.UserError, match="1 of 4 cells failed: fixed-16, seed 0: step 7: not finite"):
        run_table(tmp_path, capsys, "--rows", "fixed-16", "fixed-64", "--seeds", "0", "1")
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| fixed-16 | ") and " to " not in lines[2]   # of one seed
    assert lines[3].startswith("| fixed-64 | ") and not lines[4]
    assert sorted(str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("figures.json")) == [
        "fixed-16/seed-1", "fixed-64/seed-0", "fixed-64/seed-1"]


def test_speeds_are_taken_again_when_asked_or_missing(tmp_path, trainers, monkeypatch, capsys):
    """They are measured with the first seed that succeeded."""
    _, broken = trainers
    broken.add("fixed-16/seed-0")
    with pytest.raises(dq.UserError, match="1 of 2 cells failed"):
        run_table(tmp_path, capsys, "--rows", "fixed-16", "--seeds", "0", "1")
    taken = []
    monkeypatch.setattr(quality, "images_per_second", lambda *args: taken.append(args) or 45.6)
    for flags, times, shown in (([], 0, "123.0"), (["--speed"], 1, "45.6"), ([], 1, "45.6")):
        said = run_table(tmp_path, capsys, "--rows", "fixed-16", "--seeds", "1", *flags)
        assert f" | {shown} | 0.250 |" in said and len(taken) == times
    run_table(tmp_path, capsys, "--rows", "fixed-16", "fixed-64", "--seeds", "1")
    assert len(taken) == 3                                                   # one right after the other


def test_the_rate_of_sampling_is_the_median_job(monkeypatch):
    ticks = iter([0.0, 9.0, 10.0, 12.0, 20.0, 21.0])                         # jobs of 9, 2 and 1 seconds
    monkeypatch.setattr(quality.time, "perf_counter", lambda: next(ticks))
    drawn = []
    monkeypatch.setattr(dq, "generate", lambda model, label, *args, **kwargs: drawn.append(len(label)))
    assert quality.images_per_second(None, "cpu", n=6) == 3.0 and drawn == [6, 6, 6]


def test_a_timed_step_is_a_training_step():
    model, vae = small_models()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    assert quality.step_seconds(model, vae, torch.device("cpu"), plain, n_steps=3, warm_up=1) > 0
    assert all(not torch.equal(x, before[name]) for name, x in model.named_parameters() if x.dim() > 1)


def test_sampling_options_for_a_folder(run, images, capsys, monkeypatch):
    """The FD of two rows, from images that are read and sampled here. The tool, too, computes in float32."""
    pick_device = quality.common.pick_device
    monkeypatch.setattr(quality.common, "pick_device", lambda name, dtype: pick_device(name, "fp32"))
    path, sizes = run / "transformer.pt", ["--n", "6", "--temperatures", "0.5", "1", "--guidance", "1", "2"]
    quality.folder([str(path), "--data", str(images), *sizes], steps=4, batch_size=4)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    names = ["", "other real images", "reconstructions of these"]
    names += [f"temperature {t}, guidance {g}" for t in ("0.5", "1") for g in (1, 2)]
    assert [row[0].strip("| ") for row in rows] == names
    model, vae = dq.load_transformer(path, torch.device("cpu"))
    data, _ = reading.open_data(images, vae.config.size)
    order = dq.numpy_rng(0).permutation(len(data))
    x, label = zip(*(data[int(i)] for i in order[:12]))

    def pixels(x):
        return torch.stack([F.interpolate(each[None], 8, mode="area").flatten() for each in x])
    real = pixels(x[:6])
    assert float(rows[1][2]) == pytest.approx(frechet_distance(real, pixels(x[6:])), abs=2e-3)
    pos, code = dq.generate(model, torch.tensor(label[:6]), dq.SampleOptions(temperature=0.5, cfg=2.0), seed=0)
    samples = vae.decode(model.layout.unpack(pos, code)[0]).clamp(-1, 1)
    assert float(rows[4][2]) == pytest.approx(frechet_distance(real, pixels(samples)), abs=2e-3)
    with pytest.raises(dq.UserError, match="two sets of --n are needed"):
        quality.folder([str(path), "--data", str(images), "--n", "7"])
