"""Measures the quality of samples.

python tests/tools/quality.py [out/transformer.pt] [--n N] [--seed S] [sample.py's options]
    Trains a small classifier of shapes and textures on real toy images. Then compares three sets with N real images:
    N other real images (the score of a perfect model), N reconstructions of these and N samples. The metrics are:
    FD         Frechet distance of the classifier's features, 0 for equal distributions. It is not FID, which uses
               Inception's features. Its scale depends on the classifier, so compare sets of one run or one table only
    precision  fraction of the set that lies among the real images
    recall     fraction of the real images that lie among the set
    agreement  fraction of the set that the classifier assigns to the requested class

python tests/tools/quality.py table OUT [--rows NAME ...] [--seeds S ...] [--n N] [--vae-steps N] [--steps N] [--speed]
    Compares variable with fixed length. Trains the missing runs below OUT (one stage 1 per row, one stage 2 per row and
    seed), measures them, prints one table and draws OUT/samples.png. You can stop it at any time: the same command
    resumes and keeps what is finished.
    images/s and seconds per step are wall-clock times. They are measured at the end, one row after the other, with the
    first seed. If the machine was busy, measure them again with --speed.

python tests/tools/quality.py folder CHECKPOINT --data DIR [--n N] [--seed S] [--temperatures T ...] [--guidance G ...]
    Compares sampling options on a folder of images: FD of N samples, with the classes of N training images, to these.
    Features: those of a classifier of the folder's classes, if it has classes, and pixels, averaged to 8 x 8.
"""
import argparse
import contextlib
import functools
import itertools
import json
import statistics
import sys
import time
import zlib
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common  # noqa: E402
import data as reading  # noqa: E402
import dq  # noqa: E402
import train_transformer  # noqa: E402
import train_vae  # noqa: E402
from benchmark import hardware  # noqa: E402
from common import natural, number, positive  # noqa: E402
from runs import flags_to_end, read_log  # noqa: E402
from data import ToyShapes  # noqa: E402

TRAIN, TEST, REAL, OTHER = range(2_000_003, 2_000_007)                       # seeds of toy images, plus --seed
NEIGHBOURS, SLOTS, TEXTURES = 3, 64, len(ToyShapes.textures)
DEFAULTS = train_transformer.PRESETS["toy"][1].sampling
several = number(int, NEIGHBOURS + 1)


# ------------------------------------------------------------------------------------------------
# The metrics


class Classifier(nn.Module):
    """Images (B, 3, S, S) -> logits (B, n_kinds), linear in 64 features, each a mean over the image.

    A kind of toy image is a shape with a texture. Features trained on shapes alone do not notice lost textures: with
    them, 16 blurred codes scored best of all models. There are only 64 features, so 2,000 images are enough to estimate
    their covariance, and the FD between two sets of real images is near 0.
    """

    def __init__(self, n_kinds=len(ToyShapes.classes) * TEXTURES):
        super().__init__()
        layers, c = [], 3
        for width in (32, 64, 64):
            layers += [nn.Conv2d(c, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
            c = width
        self.body, self.head = nn.Sequential(*layers), nn.Linear(c, n_kinds)

    def features(self, x):
        return self.body(x).mean(dim=(2, 3))                                 # B, 64

    def forward(self, x):
        return self.head(self.features(x))                                   # B, n_kinds

    def shape(self, features):
        """Features (n, 64) -> labels (n,) of the predicted shapes."""
        return self.head(features.float()).argmax(1) // TEXTURES


def toy_images(size, n, seed, device="cpu"):
    """-> n images (n, 3, S, S) and their kinds (n,): TEXTURES * label + texture. The labels come in turn."""
    data = ToyShapes(size, n, seed)
    x, label = zip(*(data[i] for i in range(n)))
    kind = [TEXTURES * y + data.texture(i) for i, y in enumerate(label)]
    return torch.stack(x).to(device), torch.tensor(kind, device=device)      # n, 3, S, S; n


def train_classifier(size, seed=0, device="cpu", steps=400, batch_size=64):
    """-> a Classifier of toy images, in evaluation mode."""
    images, kinds = toy_images(size, steps * batch_size, seed + TRAIN, device)
    return fit(zip(images.split(batch_size), kinds.split(batch_size)), steps, seed, device)


def fit(batches, steps, seed, device, **how):
    """Train a Classifier on (images, kinds), in evaluation mode afterwards. how: as for Classifier"""
    torch.manual_seed(seed)
    classifier = Classifier(**how).to(device)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step, (x, y) in enumerate(batches):
        x = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1) if step % 2 else x  # half are blurred, all
        x = x + 0.1 * torch.randn_like(x)                                    # noisy, so that fine detail counts less
        optimizer.zero_grad()
        F.cross_entropy(classifier(x), y).backward()
        optimizer.step()
        schedule.step()
    return classifier.eval().requires_grad_(False)


def kept_classifier(path, size, device):
    """The Classifier in the file `path`, trained if there is none, so that one classifier serves a whole table."""
    if not path.exists():
        weights = train_classifier(size, device=device).state_dict()
        dq.write_file(path, lambda file: torch.save(weights, file))
    classifier = Classifier().to(device).eval().requires_grad_(False)
    classifier.load_state_dict(torch.load(path, map_location=device, weights_only=True))
    return classifier


@torch.inference_mode()
def features(classifier, images):
    """(n, 3, S, S) -> (n, 64), float64."""
    return torch.cat([classifier.features(x) for x in images.split(250)]).double()


def frechet_distance(x, y):
    """Distance of the Gaussians with the means m and covariances S of x (n, D) and y (m, D), rows of features:
    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Dowson and Landau 1982; for images Heusel et al. 2017).

    S1 S2 is not symmetric, but it has the eigenvalues of S1^(1/2) S2 S1^(1/2), which is.
    """
    x, y = x.double(), y.double()
    dq.require(x.isfinite().all() and y.isfinite().all(), "some of the images have features that are not finite")
    s1, s2 = x.T.cov(), y.T.cov()                                            # D, D
    values, vectors = torch.linalg.eigh(s1)                                  # D; D, D
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T                  # D, D: S1^(1/2)
    roots = torch.linalg.eigvalsh(root @ s2 @ root).clamp(min=0).sqrt()      # D
    distance = (x.mean(0) - y.mean(0)).square().sum() + s1.trace() + s2.trace() - 2 * roots.sum()
    return distance.clamp(min=0).item()                                      # rounding can leave -1e-15


def precision_recall(real, fake, k=NEIGHBOURS):
    """Fraction of `fake` (m, D) that lies among `real` (n, D), and of `real` among `fake`; n and m must be above k.

    A point lies among a set if it is in a ball around one of the set's points, whose radius is the distance to that
    point's k-th nearest neighbour in the set (Kynkaanniemi et al., "Improved Precision and Recall Metric for Assessing
    Generative Models", 2019).
    """
    # matrix products would be faster, but by rounding a point would have a distance from itself
    distances = functools.partial(torch.cdist, compute_mode="donot_use_mm_for_euclid_dist")

    def among(points, centres):
        radius = [distances(part, centres).kthvalue(k + 1).values for part in centres.split(500)]  # the first is itself
        radius = torch.cat(radius)                                           # centres
        inside = [(distances(part, centres) <= radius).any(1) for part in points.split(500)]
        return torch.cat(inside).double().mean().item()
    return among(fake, real), among(real, fake)


@torch.inference_mode()
def reconstructed(vae, images, autocast):
    with autocast():
        return torch.cat([vae.decode(vae.encode(x)[0]).float().clamp(-1, 1) for x in images.split(SLOTS)])


@torch.inference_mode()
def sampled(model, vae, label, options, seed, autocast):
    """-> samples of these classes (n, 3, S, S), and their mean number of codes"""
    pos, code = dq.generate(model, label, options, seed, slots=SLOTS)        # each n, L
    codes, _ = model.layout.unpack(pos, code)                                # n, H, W
    with autocast():
        images = torch.cat([vae.decode(part).float().clamp(-1, 1) for part in codes.split(SLOTS)])
    return images, (code >= 0).sum().item() / len(label)


class Evaluator:
    """A classifier and n real images, with which every set is compared."""

    def __init__(self, classifier, size, n, seed, device):
        self.classifier, self.n, self.seed, self.device = classifier, n, seed, device
        self.real = features(classifier, toy_images(size, n, seed + REAL, device)[0])  # n, 64
        images, kind = toy_images(size, n, seed + OTHER, device)
        self.other = images, kind // TEXTURES                                # n, 3, S, S; n
        x, kind = toy_images(size, 1000, seed + TEST, device)
        self.accuracy = (classifier(x).argmax(1) == kind).double().mean().item()

    def measure(self, images, label):
        """n images and the requested classes -> metrics"""
        x = features(self.classifier, images)                                # n, 64
        right = (self.classifier.shape(x) == label).double()                 # n
        precision, recall = precision_recall(self.real, x)
        return dict(fd=frechet_distance(self.real, x), precision=precision, recall=recall,
                    agreement=right.mean().item(),
                    of_classes=[right[label == i].mean().item() for i in range(len(ToyShapes.classes))])

    @torch.inference_mode()
    def of_vae(self, vae, autocast):
        """Metrics of other real images and of their reconstructions."""
        images, label = self.other
        y = reconstructed(vae, images, autocast)
        return {"other real images": self.measure(images, label), "reconstructions": self.measure(y, label)}

    @torch.inference_mode()
    def of_samples(self, model, vae, options, autocast):
        """Metrics of n samples, including their mean number of codes."""
        label = torch.arange(self.n, device=self.device) % len(ToyShapes.classes)  # n
        images, codes = sampled(model, vae, label, options, self.seed, autocast)
        return self.measure(images, label) | dict(codes=codes)


# ------------------------------------------------------------------------------------------------
# Variable against fixed length


ROWS = {"fixed-16": ["--factors", "8"], "fixed-64": ["--factors", "4"]} | {  # flags of train_vae.py
    f"{router}-{fine}": ["--router", router, "--ratios", f"{1 - fine:.1f}", f"{fine}"]
    for router in ("learned", "entropy", "random") for fine in (0.3, 0.5, 0.7)}
COLUMNS = {"codes": ".1f", "bits per pixel": ".3f", "dB": ".2f", "FD, reconstructions": ".2f",
           "FD, temperature 1": ".2f", "FD, defaults": ".2f",
           "agreement, temperature 1": ".3f", "agreement, defaults": ".3f", "images/s": ".1f", "s per step": ".3f"}


def train_to_the_end(trainer, path, steps, flags):
    """Run a stage, or resume it, unless its checkpoint is final."""
    more = flags_to_end(path, steps)
    if more is None and trainer is train_vae and not path.with_name("codes.pt").exists():
        more = ["--resume"]                                                  # it was stopped while encoding
    if more is not None:
        trainer.main(["--out", str(path.parent), "--steps", str(steps), *flags, *more])


def step_seconds(model, vae, device, autocast, n_steps=40, warm_up=5):
    """Median duration of a training step of stage 2 with train_transformer.py's defaults. Changes the model."""
    schedule, seconds = train_transformer.PRESETS["toy"][1], []
    with common.Stop() as stop:
        data = ToyShapes(vae.config.size, n=512)
        part = train_vae.encode_dataset(vae, data, device, autocast, 0, mirrored=False, stop=stop)
    images = train_transformer.Images(part, vae.config.factors)
    optimizers = train_transformer.make_optimizers(model.train().requires_grad_(True), schedule).values()
    for batch in itertools.islice(train_transformer.batches(images.length.numpy(), schedule.batch_size, 0), n_steps):
        start = time.perf_counter()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        for part in batch.chunk(schedule.accumulate):
            of_part = train_transformer.sequences(images, part, model.layout, device)
            with autocast():
                losses = model(*of_part)
            (sum(losses.values()).sum() / schedule.batch_size).backward()
        nn.utils.clip_grad_norm_(model.parameters(), schedule.clip)
        for optimizer in optimizers:
            optimizer.step()
        torch.ones(1, device=device).item()                                  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[warm_up:])


def measure_cell(folder, vae_path, row, seed, args, evaluator, autocast):
    """Train the missing stages of one row and seed. -> metrics"""
    train_to_the_end(train_vae, vae_path, args.vae_steps, ROWS[row])
    path = folder / "transformer.pt"
    codes = vae_path.with_name("codes.pt")
    train_to_the_end(train_transformer, path, args.steps, ["--codes", str(codes), "--seed", str(seed)])
    model, vae = dq.load_transformer(path, evaluator.device)
    sets = evaluator.of_vae(vae, autocast)
    sets["temperature 1"] = evaluator.of_samples(model, vae, dq.SampleOptions(), autocast)
    sets["defaults"] = evaluator.of_samples(model, vae, DEFAULTS, autocast)
    metrics = {f"FD, {name}": each["fd"] for name, each in sets.items()}
    metrics |= {f"agreement, {name}": each["agreement"] for name, each in sets.items()}
    return metrics | {"codes": sets["temperature 1"]["codes"], "sets": sets}


def images_per_second(model, device, n=8 * SLOTS, rounds=3):
    """Median rate of dq.generate at temperature 1."""
    label, seconds = torch.arange(n, device=device) % len(ToyShapes.classes), []
    for _ in range(rounds):
        start = time.perf_counter()
        dq.generate(model, label, dq.SampleOptions(), seed=0, slots=SLOTS)   # synchronises at its end
        seconds.append(time.perf_counter() - start)
    return n / statistics.median(seconds)


def take_speeds(folders, device, autocast):
    """folders: {row: folder with a transformer.pt} -> {row: the columns with wall-clock times}"""
    speeds = {}
    for row, folder in folders.items():
        model, vae = dq.load_transformer(folder / "transformer.pt", device)
        speeds[row] = {"images/s": images_per_second(model, device),          # before the next line changes the model
                       "s per step": step_seconds(model, vae, device, autocast)}
    return speeds


def of_first_stage(folder):
    """-> the columns that come from the last evaluation of stage 1"""
    log = [line for line in read_log(folder / "vae.jsonl") if "psnr" in line]
    dq.require(log, f"{folder / 'vae.jsonl'} holds no evaluation")
    return {"bits per pixel": log[-1]["bits_per_pixel"], "dB": log[-1]["psnr"]}


@torch.inference_mode()
def draw_samples(path, folders, device, autocast, n=8):
    """Draw n samples of each row with the preset's sampling options."""
    pictures, captions, label = [], [], torch.arange(n, device=device) % len(ToyShapes.classes)
    for row, folder in folders.items():
        model, vae = dq.load_transformer(folder / "transformer.pt", device)
        codes, _ = model.layout.unpack(*dq.generate(model, label, DEFAULTS, seed=0))  # n, H, W
        with autocast():
            images = vae.decode(codes).float().clamp(-1, 1)                  # n, 3, S, S
        pictures += [common.to_picture(x, side=64) for x in images]
        captions += [row] + [""] * (n - 1)
    common.save_grid(path, pictures, n, captions)


def show(cells, of_rows, machine, n):
    """Print the table. cells: {row: [metrics of each seed]}; of_rows: {row: metrics that do not depend on the seed}"""
    print(f"| | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}")
    for row, of_seeds in cells.items():
        texts = []
        for name, form in COLUMNS.items():
            values = [of_rows[row][name]] if name in of_rows[row] else [metrics[name] for metrics in of_seeds]
            middle, low, high = (f"{value:{form}}" for value in (statistics.median(values), min(values), max(values)))
            texts.append(middle if low == high else f"{middle} ({low} to {high})")
        print(f"| {row} | {' | '.join(texts)} |")
    every = [metrics for of_seeds in cells.values() for metrics in of_seeds]
    print(f"\nMedian over seeds of stage 2 (min to max); {n} images per set. Other real images have an FD of "
          f"{every[0]['FD, other real images']:.2f}. Temperature 1 is without guidance; defaults are the preset's, "
          f"temperature {DEFAULTS.temperature} and guidance {DEFAULTS.cfg}.\nimages/s: dq.generate at temperature 1, "
          f"{SLOTS} images at a time, without the decoder, median of 3 jobs of {8 * SLOTS}. s per step: stage 2, "
          f"median of 35 steps.\nBoth were measured with one seed, on {machine}.")


def read_json(path):
    """-> dict, empty if the file is missing or damaged"""
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text())
    return {}


def write_json(path, metrics):
    dq.write_file(path, lambda file: file.write(json.dumps(metrics, indent=1).encode()))


def table(argv):
    parser = argparse.ArgumentParser(prog="quality.py table", description="Compares variable with fixed length.")
    add = parser.add_argument
    add("out", type=Path, help="folder for all runs and metrics")
    add("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME", help=", ".join(ROWS))
    add("--seeds", nargs="+", type=natural, default=[0, 1, 2], help="seeds of stage 2; stage 1 has seed 0")
    add("--n", type=several, default=2000, help="images per set")
    add("--vae-steps", type=positive, default=train_vae.PRESETS["toy"][1].steps, help="steps of each stage 1")
    add("--steps", type=positive, default=train_transformer.PRESETS["toy"][1].steps, help="steps of each stage 2")
    add("--speed", action="store_true", help="measure the speeds again")
    args = parser.parse_args(argv)
    device, autocast, _ = common.pick_device("auto", "auto")
    args.out.mkdir(parents=True, exist_ok=True)
    size, path = train_vae.PRESETS["toy"][0].size, args.out / "classifier.pt"
    classifier = kept_classifier(path, size, device)
    settings = dict(n=args.n, vae_steps=args.vae_steps, steps=args.steps, classifier=zlib.crc32(path.read_bytes()))
    evaluator, cells, folders, failed = None, {}, {}, []                     # folders: the first of each row
    for row, seed in itertools.product(args.rows, args.seeds):
        folder = args.out / row / f"seed-{seed}"
        metrics = read_json(folder / "figures.json")
        if metrics.get("settings") != settings:
            try:
                evaluator = evaluator or Evaluator(classifier, size, args.n, 0, device)
                with contextlib.redirect_stdout(sys.stderr):                 # only the table goes to standard output
                    print(f"{row}, seed {seed}")
                    metrics = measure_cell(folder, args.out / row / "vae/vae.pt", row, seed, args, evaluator, autocast)
                write_json(folder / "figures.json", dict(settings=settings) | metrics)
            except (dq.UserError, OSError, RuntimeError) as error:           # one failure must not stop the others
                failed.append(f"{row}, seed {seed}: {str(error).strip().splitlines()[-1]}")
                print(f"failed: {failed[-1]}", file=sys.stderr)
                continue
        cells.setdefault(row, []).append(metrics)
        folders.setdefault(row, folder)
    speeds = read_json(args.out / "speeds.json")
    if args.speed or not all("s per step" in speeds.get(row, ()) for row in cells):
        speeds = take_speeds(folders, device, autocast) | {"hardware": hardware(device)}
        write_json(args.out / "speeds.json", speeds)
        draw_samples(args.out / "samples.png", folders, device, autocast)
    if cells:
        of_rows = {row: speeds[row] | of_first_stage(args.out / row / "vae") for row in cells}
        show(cells, of_rows, speeds["hardware"], args.n)
    dq.require(not failed, f"{len(failed)} of {len(args.rows) * len(args.seeds)} cells failed: {'; '.join(failed)}")


# ------------------------------------------------------------------------------------------------
# One checkpoint


# ------------------------------------------------------------------------------------------------
# Sampling options for a folder of images


def folder(argv, steps=400, batch_size=64):
    parser = argparse.ArgumentParser(prog="quality.py folder")
    add = parser.add_argument
    add("checkpoint")
    add("--data", type=common.path, required=True, help="the folder that the model was trained on")
    add("--n", type=several, default=1000, help="images per set; default: %(default)s")
    add("--seed", type=number(int, 0, below=2 ** 63), default=0, help="seed of the classifier and the samples")
    add("--temperatures", type=float, nargs="+", default=[0.7, 0.85, 1.0])
    add("--guidance", type=float, nargs="+", default=[1.0, 1.5, 2.0])
    args = parser.parse_args(argv)
    device, autocast, _ = common.pick_device("auto", "auto")
    model, vae = dq.load_transformer(args.checkpoint, device)
    data, _ = reading.open_data(args.data, vae.config.size)
    classes = model.config.classes
    dq.require(not classes or tuple(data.classes) == classes,
               f"{args.checkpoint} was not trained on the classes of {args.data}")
    dq.require(len(data) >= 2 * args.n, f"{args.data} has {len(data)} training images; two sets of --n are needed")
    rows = torch.from_numpy(dq.numpy_rng(args.seed).permutation(len(data))[:8000])
    images, label = zip(*(data[i] for i in rows.tolist()))
    images, label = torch.stack(images).to(device), torch.tensor(label, device=device)  # M, 3, S, S; M
    extract = {"pixels": lambda x: F.adaptive_avg_pool2d(x, 8).flatten(1)}   # n, 192
    if classes:
        batches = (rows % len(images) for rows in torch.arange(steps * batch_size).split(batch_size))
        classifier = fit(((images[rows], label[rows]) for rows in batches), steps, args.seed, device,
                         n_kinds=len(classes))
        extract["classifier"] = functools.partial(features, classifier)
    else:
        label = torch.full_like(label, -1)
    real, other = images[:args.n], images[args.n:2 * args.n]
    print("| " + " | ".join(["", "codes per image", *(f"FD, {name}" for name in extract)]) + " |")

    def report(name, x, codes=None):
        fds = [f"{frechet_distance(of(real), of(x)):.3f}" for of in extract.values()]
        print("| " + " | ".join([name, "" if codes is None else f"{codes:.1f}", *fds]) + " |", flush=True)
    report("other real images", other)
    report("reconstructions of these", reconstructed(vae, other, autocast))
    for temperature, cfg in itertools.product(args.temperatures, args.guidance if classes else [1.0]):
        options = dq.SampleOptions(temperature=temperature, cfg=cfg)
        report(f"temperature {temperature:g}, guidance {cfg:g}",
               *sampled(model, vae, label[:args.n], options, args.seed, autocast))


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["table"]:
        return table(argv[1:])
    if argv[:1] == ["folder"]:
        return folder(argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", nargs="?", default="out/transformer.pt")
    for name, default in DEFAULTS._asdict().items():
        add(f"--{name.replace('_', '-')}", type=type(default), default=default)
    add("--n", type=several, default=2000, help="images per set")
    add("--seed", type=number(int, 0, below=2 ** 63), default=0, help="seed of the classifier, images and samples")
    args = parser.parse_args(argv)
    options = dq.SampleOptions(*(getattr(args, name) for name in dq.SampleOptions._fields))
    options.check()
    device, autocast, _ = common.pick_device("auto", "auto")
    model, vae = dq.load_transformer(args.checkpoint, device)
    dq.require(model.config.classes == ToyShapes.classes,
               f"{args.checkpoint} was not trained on the classes of the built-in toy shapes")
    size = vae.config.size
    evaluator = Evaluator(train_classifier(size, args.seed, device), size, args.n, args.seed, device)
    sets = evaluator.of_vae(vae, autocast) | {"samples": evaluator.of_samples(model, vae, options, autocast)}
    print(f"accuracy of the classifier on real held-out images, shape and texture: {evaluator.accuracy:.3f}\n")
    print(f"{f'{args.n} images per set':20}{'FD':>9}{'precision':>11}{'recall':>9}{'agreement':>11}")
    for name, metrics in sets.items():
        print("{:20}{fd:9.3f}{precision:11.3f}{recall:9.3f}{agreement:11.3f}".format(name, **metrics))
    each = zip(ToyShapes.classes, sets["samples"]["of_classes"])
    print(f"\nagreement of the samples by class: {', '.join(f'{name} {fraction:.2f}' for name, fraction in each)}")


if __name__ == "__main__":
    common.run(main)
