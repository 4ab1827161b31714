"""Stage 1: images -> a DQ-VAE checkpoint, and all images as codes.    python train_vae.py [--data DIR]

Writes into --out: vae.pt (checkpoint), vae.best.pt (the one with the lowest validation loss), vae.jsonl (log), vae.png
(original | reconstruction | granularity map) and, at the end, codes.pt (everything that stage 2 needs).
"""
import argparse
import contextlib
import functools
import math
import os
import re
import shlex
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.nn.functional import all_reduce
from tqdm import tqdm

import dq
from common import (PATIENCE, Record, Schedule, Stop, distribute, draw_grains, flag, machine, natural, on_gpu, override,
                    path, positive, prepare, run, save_grid, say, seed_all, set_aside, shuffled_indices, to_picture,
                    trainer_flags, weight)
from data import BROKEN, ImageFolder, ToyShapes, describe, find_images, identity, image_side, loader, open_data, stream


# ------------------------------------------------------------------------------------------------
# Presets


@dataclass
class VAESchedule(Schedule):
    """Training hyperparameters of stage 1. The L1 loss and the commitment loss have weight 1."""
    l2_weight: float = 1.0
    budget_weight: float = flag(1.0, type=weight, help="weight of the budget loss")
    perceptual_weight: float = flag(0.0, type=weight, help="weight of the perceptual loss (LPIPS); 0: off")
    gan_weight: float = flag(0.0, type=weight, help="factor on the adaptive weight of the adversarial loss; 0: off")
    gan_start: int = flag(0, metavar="STEP", type=natural, help="first step with the adversarial loss")
    accumulate: int = flag(1, metavar="N", type=positive, help="gradient accumulation steps; more need less memory "
                           "and give other results, as budget loss, EMA updates and batch norm are per part")


# The paper's (section 4 and the released settings); the learning rate is 4.5e-6 per image of a batch of 120.
SIZES = dict(size=256, codebook_size=1024, code_dim=256, channels=256, width=128,
             encoder_blocks=2, decoder_blocks=3, attention_from=8)
DUAL = dq.VAEConfig(**SIZES, factors=(16, 8), ratios=(0.5, 0.5), multipliers=(1, 1, 2, 2, 4))
TRIPLE = dq.VAEConfig(**SIZES, factors=(32, 16, 8), ratios=(0.4, 0.3, 0.3), multipliers=(1, 1, 2, 2, 4, 4))
PAPER = VAESchedule(steps=507_000, batch_size=120, accumulate=4, lr=5.4e-4, betas=(0.5, 0.9), warmup=1000,
                    eval_every=5000, clip=0.0, budget_weight=10.0, l2_weight=0.0, perceptual_weight=1.0,
                    gan_weight=1.0)                                          # 50 epochs of 1,217,000 images

FOLDER = VAESchedule(steps=1500, batch_size=16, lr=2e-3, clip=0.0)
WIDE = dict(codebook_size=1024, channels=128, width=64, multipliers=(1, 2, 2, 4), decoder_blocks=2, attention_from=8)

PRESETS = {
    # minutes on two CPU cores: what the README's first command runs
    "toy": (dq.VAEConfig(), VAESchedule(steps=1000, batch_size=32, lr=2e-3, clip=0.0)),
    # the same data at 64 x 64, 160 codes per image: stage 1 takes 50 minutes on two cores, stage 2 wants a GPU
    "toy64": (dq.VAEConfig(size=64, codebook_size=512), VAESchedule(steps=4000, batch_size=32, lr=2e-3, clip=0.0)),
    # a folder of images, for `choose`: the first two are for 15 minutes on two CPU cores ...
    "folder32": (dq.VAEConfig(), replace(FOLDER, steps=5000)),
    "folder64": (dq.VAEConfig(size=64, factors=(16, 8), codebook_size=512, attention_from=8), FOLDER),
    # ... and these take an hour on a GPU, by an estimate; they have not been tried on one
    "folder64-large": (dq.VAEConfig(size=64, **WIDE), replace(FOLDER, steps=20_000, batch_size=64, eval_every=1000)),
    "folder128": (dq.VAEConfig(size=128, factors=(16, 8), **WIDE),
                  replace(FOLDER, steps=20_000, batch_size=64, eval_every=1000)),
    "folder256": (dq.VAEConfig(size=256, factors=(16, 8), **WIDE),
                  replace(FOLDER, steps=8000, batch_size=32, eval_every=1000)),
    # a few thousand pictures in 40 codes each: the recipe of assets/emoji64.pt, see assets/README.md
    "emoji64": (dq.VAEConfig(size=64, factors=(16, 8), codebook_size=1024, channels=128, multipliers=(1, 2, 4, 4),
                             attention_from=8),
                VAESchedule(steps=8000, batch_size=32, lr=1e-3, clip=0.0)),
    # natural pictures, calm water beside jagged coasts (tests/tools/earth.py): 1, 4 or 16 codes a region
    "earth64": (dq.VAEConfig(size=64, factors=(8, 4, 2), ratios=(0.5, 0.3, 0.2), codebook_size=1024,
                             multipliers=(2, 3, 3), decoder_blocks=2, attention_from=8),
                VAESchedule(steps=8000, batch_size=32, lr=1e-3, clip=0.0, eval_every=1000)),
    # a few thousand pictures with smooth surfaces and small features, 640 codes each, with all of the paper's losses
    "emoji128": (dq.VAEConfig(size=128, codebook_size=512, attention_from=8),
                 VAESchedule(steps=4000, batch_size=8, lr=1e-3, clip=0.0,
                             perceptual_weight=1.0, gan_weight=0.5, gan_start=2000)),
    # the paper's
    "ffhq256": (DUAL, replace(PAPER, steps=27_700, eval_every=1000)),        # 50 epochs of 66,500 images
    "imagenet256": (DUAL, PAPER),
    "imagenet256-triple": (TRIPLE, replace(PAPER, budget_weight=1.0)),
}


FEW = 500                                # images; for fewer, codes.pt has crops of each


# ------------------------------------------------------------------------------------------------
# Losses that only training needs


class Perceptual(nn.Module):
    """LPIPS on VGG16, frozen: forward(x, y (B, 3, S, S) in [-1, 1]) -> (B,), 0 for equal images.

    Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", 2018, version 0.1: features
    after five ReLUs, normalised over the channels; squared differences, weighted per channel, averaged over the image
    and summed over the five layers.
    """
    urls = ("https://download.pytorch.org/models/vgg16-397923af.pth",
            "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth")

    def __init__(self):
        super().__init__()
        layers, c, self.ends, self.weights = [], 3, [0], nn.ParameterList()  # numbered as in VGG16's file
        for depth, width in ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)):
            layers += [nn.MaxPool2d(2)] if layers else []
            for _ in range(depth):
                layers += [nn.Conv2d(c, width, 3, padding=1), nn.ReLU()]
                c = width
            self.ends.append(len(layers))
            self.weights.append(torch.zeros(1, width, 1, 1))
        self.features = nn.Sequential(*layers)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None], persistent=False)
        self.requires_grad_(False)

    @classmethod
    def load(cls, files=()):
        """With the published weights, from `files`, or else from torch's cache or the internet."""
        lpips, published = cls(), {}
        try:
            for url, name in zip(cls.urls, () if files else ("vgg16-397923af.pth", "lpips-vgg-0.1.pth")):
                published |= torch.hub.load_state_dict_from_url(url, map_location="cpu", file_name=name,
                                                                weights_only=True)
            for file in files:
                published |= torch.load(file, map_location="cpu", weights_only=True)
            lpips.load_state_dict({name: published[re.sub(r"weights\.(\d)", r"lin\1.model.1.weight", name)]
                                   for name in lpips.state_dict()})          # VGG16's layers have the same names
        except Exception as error:                                           # no network, no file, a wrong one ...
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise dq.UserError(f"no weights for the perceptual loss ({reason}); download {' and '.join(cls.urls)} "
                               "and pass both files to --perceptual-weights, or turn the loss off with "
                               "--perceptual-weight 0") from None
        return lpips

    def forward(self, x, y):
        x, y = (x - self.shift) / self.scale, (y - self.shift) / self.scale
        distance = 0.0
        for start, end, weight in zip(self.ends, self.ends[1:], self.weights):  # weight: 1, c, 1, 1
            with torch.no_grad():
                x = self.features[start:end](x)                              # B, c, S/2^k, S/2^k
            y = self.features[start:end](y)
            # F.normalize has a finite gradient at zero vectors, y / |y| has not
            a, b = (F.normalize(maps.float(), dim=1, eps=1e-10) for maps in (x, y))
            distance = distance + (weight * (a - b).square()).sum(1).mean(dim=(1, 2))  # B
        return distance


class Discriminator(nn.Module):
    """PatchGAN (Isola et al. 2017): (B, 3, S, S) -> one logit per overlapping patch, high for real images."""

    def __init__(self, width=64):
        super().__init__()
        blocks, c = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)], width
        for c_out, stride in ((2 * width, 2), (4 * width, 2), (8 * width, 1)):
            blocks += [nn.Conv2d(c, c_out, 4, stride, padding=1, bias=False), BatchNorm(c_out), nn.LeakyReLU(0.2)]
            c = c_out
        self.blocks = nn.Sequential(*blocks, nn.Conv2d(c, 1, 4, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1, 0.02)

    def forward(self, x):
        return self.blocks(x).float()                                        # B, 1, S/8 - 2, S/8 - 2


def hinge_loss(real, fake):
    """The discriminator's loss: 0 for real logits above 1 and fake ones below -1. Any shapes -> scalar."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(y, last, recon_grad, gan_grad, cap=0.75):
    """Weight of the adversarial loss that gives it a gradient as large as that of the reconstruction loss at the
    decoder's last layer, at most `cap` (Esser et al., "Taming Transformers", 2021, equation 7). y: reconstruction;
    last: weight of the last convolution; recon_grad, gan_grad: gradients of the two losses with respect to y."""
    at_last = [torch.autograd.grad(y, last, gradient, retain_graph=True)[0] for gradient in (recon_grad, gan_grad)]
    recon, gan = (dq.all_reduce_sum(each).norm() / dq.rank_world()[1] for each in at_last)
    return (recon / (gan + 1e-4)).clamp(max=cap)


def backward(y, last, recon_loss, gan_loss, code_loss, gan_weight=1.0, scale=1.0):
    """Accumulate the gradients of scale * (recon_loss + weight * gan_loss + code_loss); -> the weight, or None.

    y: reconstruction (B, 3, S, S). recon_loss, gan_loss (or None): scalars that depend on the model through y only.
    code_loss: a scalar of what precedes y (commitment, budget). The gradients of the first two are added up at y, so
    VGG and the discriminator are backpropagated once each, and their parameters receive no gradient.
    """
    at_y, weight = torch.autograd.grad(recon_loss, y)[0], None               # B, 3, S, S
    if gan_loss is not None:
        gan_grad, = torch.autograd.grad(gan_loss, y)                         # B, 3, S, S
        weight = gan_weight * adaptive_weight(y, last, at_y, gan_grad)
        at_y = at_y + weight * gan_grad
    torch.autograd.backward([y, code_loss], [scale * at_y, torch.full_like(code_loss, scale)])
    return weight


def compiled(model, **how):
    """torch.compile all of a DQVAE but its last convolution: `adaptive_weight` runs its backward pass twice, and a
    compiled graph allows only one."""
    last = model.decoder.out[-1]
    last.forward = torch.compiler.disable(last.forward)
    return torch.compile(model, **how)


# ------------------------------------------------------------------------------------------------
# Evaluation


def auc(score, truth):
    """Area under the ROC curve: the probability that a detailed region scores above a smooth one; ties count half.
    score: any shape; truth: the same shape, bool, with both values in it."""
    detailed, smooth = score[truth], score[~truth].sort().values
    below, not_above = (torch.searchsorted(smooth, detailed, right=ties) for ties in (False, True))
    return ((below + not_above).sum() / (2 * len(detailed) * len(smooth))).item()


@torch.no_grad()
def evaluate(model, images, detailed, autocast, perceptual=None, batch_size=64):
    """Validation images (M, 3, S, S) -> metrics, reconstructions (M, 3, S, S), grains (M, h, w), on the CPU.
    detailed: (M, h, w), bool, true for regions with detail, or None."""
    model.eval()
    parts = []
    for x in images.split(batch_size):
        x = x.to(model.codebook.codes.device)                                # B, 3, S, S
        with autocast():
            out = model(x)
            y = out.reconstruction.float().clamp(-1, 1)                      # B, 3, S, S
            score = model.router.score(x, out.maps).float()                  # B, h, w
            lpips = [perceptual(x, y)] if perceptual else []                 # B
        l1, l2 = (y - x).abs().mean(dim=(1, 2, 3)), (y - x).square().mean(dim=(1, 2, 3))  # B; B
        rows = [y, out.codes, out.grains, model.cell_weight(out.gate), score, l1, l2, *lpips]
        parts.append([each.cpu() for each in rows])
    model.train()
    y, codes, grains, weight, score, l1, l2, *lpips = map(torch.cat, zip(*parts))  # codes, weight: M, H, W

    config, K = model.config, len(model.config.factors)
    n_codes = weight.sum(dim=(1, 2)).mean().item()                           # every code counts once
    # an image is sent as its codes and the granularity of each region
    bits = n_codes * math.log2(config.codebook_size) + grains[0].numel() * math.log2(K)
    use = codes.flatten().bincount(weight.flatten(), config.codebook_size)   # V
    p = use / use.sum()                                                      # V
    rounding = (2 / 255) ** 2 / 12                                           # of 8 bits: no reconstruction is better
    metrics = dict(
        psnr=(10 * torch.log10(4 / l2.clamp(min=rounding))).mean().item(),
        l1=l1.mean().item(), l2=l2.mean().item(),
        codes_per_image=n_codes, bits_per_pixel=bits / config.size ** 2,
        share=[round((grains == k).float().mean().item(), 4) for k in range(K)],
        perplexity=torch.exp(-(p * (p + 1e-12).log()).sum()).item(), codebook_used=(use > 0).float().mean().item())
    if detailed is not None and K > 1 and 0 < detailed.sum() < detailed.numel():
        metrics |= dict(auc=auc(score, detailed), auc_argmax=auc(grains, detailed))
    if perceptual:
        metrics["lpips"] = lpips[0].mean().item()
    return metrics, y, grains


def show(path, images, reconstructions, grains, factors):
    """Save up to 8 triples as one picture: original, reconstruction, granularity map."""
    triples = [(to_picture(x), to_picture(y), draw_grains(x, g, factors))
               for x, y, g in zip(images[:8], reconstructions, grains)]
    save_grid(path, sum(triples, ()), columns=6)


# ------------------------------------------------------------------------------------------------
# codes.pt: what stage 2 reads


def crops(x):
    """Images (B, 3, S, S) -> five of this shape: themselves, and 7/8 of their side from each corner, enlarged."""
    S, side = x.shape[-1], x.shape[-1] * 7 // 8
    corners = [x[..., top:top + side, left:left + side] for top in (0, S - side) for left in (0, S - side)]
    return [x] + [F.interpolate(corner, (S, S), mode="bicubic").clamp(-1, 1) for corner in corners]


@torch.no_grad()
def encode_dataset(vae, data, device, autocast, workers, mirrored, stop, batch_size=64, cropped=False):
    """All images that can be decoded, with `cropped` the crops of each and with `mirrored` their mirror images,
    in the order of the data set
    -> {codes: (M, views, H, W), grains: (M, views, h, w), label: (M,)} on the CPU, in small integers.

    Each rank encodes its part of the images, and rank 0 collects the codes; the other ranks return None.
    """
    (rank, world), config, M, first = dq.rank_world(), vae.config, len(data), 0
    H, h = (config.size // config.factors[k] for k in (-1, 0))
    n_views = (5 if cropped else 1) * (1 + mirrored)
    kinds = dict(codes=((n_views, H, H), smallest(0, config.codebook_size - 1)),
                 grains=((n_views, h, h), torch.uint8), label=((), torch.int))
    rows = {name: torch.empty(0 if rank else M, *shape, dtype=dtype) for name, (shape, dtype) in kinds.items()}
    # the indices wrap around at the end, so that all ranks have the same number
    own = range(rank, -(-M // world) * world, world)
    bar = tqdm(loader(data, workers, batch_size=batch_size, sampler=own), "encoding", -(-len(own) // batch_size),
               leave=False, disable=True if rank else None)
    for x, label in bar:
        x = x.to(device)                                                     # n, 3, S, S
        with autocast():
            views = [vae.encode(view) for crop in (crops(x) if cropped else [x])
                     for view in ((crop, crop.flip(3)) if mirrored else (crop,))]
        codes, grains = (torch.stack(each, dim=1) for each in zip(*views))   # n, views, H, W; n, views, h, w
        for name, part in dict(codes=codes, grains=grains, label=label).items():
            of_all = torch.zeros(world, *part.shape, dtype=torch.int, device=device)
            of_all[rank] = part
            of_all = dq.all_reduce_sum(of_all).transpose(0, 1).flatten(0, 1)  # n world, ...
            if rank == 0:
                rows[name][first:first + len(of_all)] = of_all[:M - first]
        first += len(of_all)
        if number := stop.asked():
            bar.close()
            stop.leave(number, "while the images were encoded")
    if rank:
        return None
    label = rows["label"]
    sound = label != BROKEN
    dq.require(sound.any(), "none of the images can be read")
    rows["label"] = label.to(smallest(label[sound].min(), label.max()))
    return rows if sound.all() else {name: x[sound] for name, x in rows.items()}


def smallest(low, high):
    """The smallest integer type that holds numbers from low to high."""
    kinds = (torch.uint8, torch.int8, torch.int16, torch.int32)
    return next(kind for kind in kinds if torch.iinfo(kind).min <= low and high <= torch.iinfo(kind).max)


def recipe(preset, config):
    """The name of the preset, by which stage 2 trains; "custom" if flags have changed what the codes are like."""
    like = (config.size, config.factors, config.ratios)
    made = PRESETS.get(preset, (config,))[0]
    return preset if preset in PRESETS and like == (made.size, made.factors, made.ratios) else "custom"


def write_codes(path, vae, train, val, args, device, autocast, stop):
    """Encode all images and write what stage 2 needs: the codes, the DQ-VAE, the classes, the name of the preset."""
    vae.eval()
    seed_all(args.seed)                                                      # for the random router
    cropped = isinstance(train, ImageFolder) and len(train) < FEW
    parts = [encode_dataset(vae, data, device, autocast, args.workers, mirrored, stop, args.part, crops_too)
             for data, mirrored, crops_too in ((train, not args.no_flip, cropped), (val, False, False))]
    if dq.rank_world()[0] > 0:
        return
    stop.alive += 15                                                         # to write them takes longer than a step
    weights, checksum = {name: x.cpu() for name, x in vae.state_dict().items()}, 0
    for x in (*weights.values(), *parts[0].values(), *parts[1].values()):
        checksum = zlib.crc32(x.contiguous().flatten().view(torch.uint8).numpy(), checksum)
    codes = dict(kind="dq-codes", version=1, name=f"{len(parts[0]['label'])} images (checksum {checksum:08x})",
                 preset=args.preset, classes=train.classes, config=asdict(vae.config),
                 weights=weights, train=parts[0], held_out=parts[1])
    dq.write_file(path, lambda file: torch.save(codes, file))


def holds_codes_of(path, vae):
    """True if `path` is a valid codes.pt that was made with this DQ-VAE."""
    with contextlib.suppress(dq.UserError, KeyError):
        weights, ours = dq.load_checkpoint(path, "dq-codes")["weights"], vae.state_dict()
        return weights.keys() == ours.keys() and all(torch.equal(x.cpu(), weights[name]) for name, x in ours.items())


# ------------------------------------------------------------------------------------------------
# Training


# flags that --encode uses; it takes those that are not given from the checkpoint, where it has them
ENCODE_FLAGS = {"encode", "out", "preset", "data", "held_out", "no_flip", "seed", "workers", "batch_size", "accumulate",
                "device", "dtype"}


def choose(gpu, images, side):
    """-> the preset for so many images, `side` pixels on their short side, on a GPU or a CPU."""
    if not gpu or side < 64:
        return "folder64" if side >= 64 else "folder32"
    if side < 128 or images < 1000:                                          # few images can't teach many codes
        return "folder64-large"
    return "folder128" if side < 256 or images < 10_000 else "folder256"


def default_preset(argv):
    """The preset without --preset: that of the run to resume, or for the images of --data. -> its name, the images'
    short side (median, pixels), GPU or not, the images; without a choice, None for side and images"""
    first = argparse.ArgumentParser(add_help=False)
    for name in ("--preset", "--size", "--encode"):
        first.add_argument(name)
    for name in ("--data", "--held-out"):
        first.add_argument(name, type=path)
    first.add_argument("--out", type=path, default=Path("out"))
    first.add_argument("--device", default="auto")
    first.add_argument("--resume", action="store_true")
    known = first.parse_known_args(argv)[0]
    gpu, size = on_gpu(known.device), known.size or ""
    if known.resume:
        with contextlib.suppress(Exception):                                 # Record.begin says what is wrong with it
            preset = torch.load(known.out / "vae.pt", mmap=True, weights_only=True)["preset"]
            return preset if preset in PRESETS else "toy", None, gpu, None
    if not known.data or known.preset or known.encode:
        return "toy", None, gpu, None
    found = find_images(known.data, [known.out, known.held_out])
    side = image_side(found) or 32                                           # 0: no header can be read
    preset = choose(gpu, math.inf, int(size)) if size.isdecimal() else choose(gpu, len(found.files), side)
    return preset, side, gpu, found


def parse(argv=None):
    """-> flags, config, schedule; args.given has the names of the flags that the command line sets."""
    preset, short_side, gpu, found = default_preset(argv)
    parser, config, schedule = trainer_flags(
        "Train a DQ-VAE, which encodes images as variable-length codes.", PRESETS, argv, preset)
    add = parser.add_argument
    add("--data", metavar="DIR", type=path, help="folder of images; None: the built-in toy shapes")
    add("--held-out", metavar="DIR", type=path,
        help="folder of validation images, which are not trained on; None: one in 20 of --data")
    add("--no-flip", action="store_true", help="disable horizontal flips, for images with text or arrows")
    add("--workers", type=natural, default=0, help="threads that load images ahead")
    add("--size", type=positive, default=config.size, help="side of the images in pixels")
    add("--factors", type=positive, nargs="+", default=config.factors,
        help="downsampling factors, coarse to fine; a single one gives fixed-length codes")
    add("--ratios", type=weight, nargs="+",
        help="target fraction of the regions for each factor; None: the preset's, or equal fractions")
    add("--router", choices=["learned", "entropy", "random"], default=config.router,
        help="how the granularity of a region is chosen")
    add("--codebook-size", type=positive, default=config.codebook_size, help="number of codebook entries")
    add("--code-dim", type=positive, default=config.code_dim, help="dimension of a codebook entry")
    add("--perceptual-weights", metavar="FILE", type=path, nargs="+", default=[],
        help="files with the weights of VGG16 and LPIPS; none: torch's cache, or download")
    add("--encode", metavar="CHECKPOINT", type=path,
        help="write codes.pt with this DQ-VAE and exit; its data, seed, dtype, ... are used unless flags say otherwise")
    args = parser.parse_args(argv)
    unset = argparse.Namespace(**dict.fromkeys(vars(args), ...))
    args.given = {name for name, value in vars(parser.parse_args(argv, unset)).items() if value is not ...}
    useless = sorted(args.given - ENCODE_FLAGS) if args.encode else []
    dq.require(not useless, "; ".join(f"--{name.replace('_', '-')} has no effect with --encode" for name in useless))
    if args.ratios is None:
        K = len(args.factors)
        args.ratios = config.ratios if K == len(config.factors) else [1 / K] * K
    for name, weighs, side in (("gan", args.gan_weight, 24), ("perceptual", args.perceptual_weight, 16)):
        dq.require(not weighs or args.size >= side or args.encode, f"the {name} loss needs images of at least {side} x "
                   f"{side} pixels, not {args.size}; --{name}-weight 0 turns it off")
    config, schedule = override(config, args), override(schedule, args)
    args.plan, args.found = outline(args.preset, config, schedule, short_side, gpu), found
    return args, config, schedule


def outline(preset, config, schedule, side=None, gpu=False):
    """One line: what this preset trains and, where images with this short side chose it, what would give more."""
    cells = [(config.size // factor) ** 2 for factor in config.factors]      # K
    codes = sum(ratio * n for ratio, n in zip(config.ratios, cells))
    line = f"{config.size} x {config.size} pixels, about {codes:.0f} codes per image, {schedule.steps} steps"
    if side is None:
        return f"preset {preset}: {line}"
    why = f"for images of {side} pixels on a {'GPU' if gpu else 'CPU'}" + ", enlarged" * (side < config.size)
    more = (f"--size {2 * config.size} shows finer detail and takes about four times as long"
            if 2 * config.size <= min(side, 256) else f"--steps {2 * schedule.steps} takes twice as long")
    return f"preset {preset}, {why}: {line}; for more: {more}"


def validation_images(data, config):
    """Up to 512 validation images (M, 3, S, S), always the same, and for the toy shapes which regions have detail:
    (M, h, w), bool, else None."""
    shown = dq.numpy_rng(0).permutation(len(data))[:512].tolist()
    images = [x for x, label in map(data.__getitem__, shown) if label != BROKEN]
    dq.require(images, f"none of {len(shown)} validation images can be decoded")
    images = torch.stack(images)                                             # M, 3, S, S
    if not isinstance(data, ToyShapes):
        return images, None
    masks = torch.stack([data.detail_mask(i) for i in shown]).float()        # M, S, S
    return images, F.avg_pool2d(masks, config.factors[0]) > 0.1


def recall(args):
    """--encode: set the flags that are not given to the values that the DQ-VAE was trained with. -> its checkpoint"""
    saved = dq.load_checkpoint(args.encode, "dq-vae")
    known = {name: saved.get("settings", {})[name] for name in ("seed", "no_flip", "dtype")
             if name in saved.get("settings", {})} | {"preset": saved.get("preset", args.preset)}
    folders = saved.get("folders", {})
    if "data" not in args.given or os.path.realpath(args.data) == os.path.realpath(folders.get("data") or ""):
        known |= {name: folder and Path(folder) for name, folder in folders.items()}
    for name, value in known.items():
        if name not in args.given:
            setattr(args, name, value)
    return saved


def encode_only(args, saved, device, autocast):
    """--encode: write codes.pt with a DQ-VAE that is already trained."""
    vae = dq.rebuild(dq.DQVAE, dq.VAEConfig, saved.get("config"), saved.get("weights"), device)
    path = args.out / "codes.pt"
    trained_on = saved.get("settings", {}).get("data")
    train, val = open_data(args.data, vae.config.size, seed=args.seed, skip=args.out, held_out=args.held_out)
    say(describe(train, val))
    if trained_on not in (None, identity(train)):
        say(f"note: this DQ-VAE was trained on other images: {trained_on}")
    set_aside(path, hint="")
    if "preset" not in args.given:
        args.preset = recipe(args.preset, vae.config)
    with Stop(device, PATIENCE) as stop:
        write_codes(path, vae, train, val, args, device, autocast, stop)
    say(f"done: {path}")


def main(argv=None):
    args, config, schedule = parse(argv)
    saved = recall(args) if args.encode else None
    device, autocast = prepare(args, trains=not args.encode)
    if args.encode:
        return encode_only(args, saved, device, autocast)
    train, val = open_data(args.data, config.size, augment=True, seed=args.seed, skip=args.out, flip=not args.no_flip,
                           held_out=args.held_out, found=args.found)
    say(describe(train, val))
    say(args.plan)
    if isinstance(train, ImageFolder) and len(train) < FEW:
        say(f"note: with only {len(train)} images, expect samples that repeat or blend them; a few thousand images "
            "give new ones. Stage 2 will train on five crops of each image")
    images, detailed = validation_images(val, config)
    perceptual = Perceptual.load(args.perceptual_weights).to(device) if schedule.perceptual_weight else None

    seed_all(args.seed)
    # on GPUs convolutions are faster with channels last; on CPUs group norm is many times slower that way
    memory_format = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    model = dq.DQVAE(config).to(device, memory_format=memory_format)
    if config.router == "entropy":
        sample = loader(train, args.workers, batch_size=args.part,
                        sampler=next(shuffled_indices(len(train), 2048, args.seed)))
        model.router.calibrate(config.ratios, (x.to(device) for x, _ in sample))
    adam = functools.partial(torch.optim.Adam, lr=schedule.lr, betas=schedule.betas, fused=device.type == "cuda")
    optimizers = parts = dict(optimizer=adam(model.parameters()))
    if schedule.gan_weight:
        discriminator = Discriminator().to(device, memory_format=memory_format)
        discriminator_ddp = distribute(discriminator)
        optimizers["critic_optimizer"] = adam(discriminator.parameters())
        parts = dict(critic=discriminator, **optimizers)                     # these names are in checkpoints
    settings = dict(data=identity(train), held_out=identity(val), no_flip=args.no_flip, seed=args.seed)
    settings |= asdict(schedule) | machine(device, autocast)
    folders = {name: getattr(args, name) and os.path.abspath(getattr(args, name)) for name in ("data", "held_out")}
    extra = dict(preset=args.preset, folders=folders)
    record = Record(args, args.out / "vae.pt", config, settings, model, parts, extra)
    record.may_change = tuple(name for name in record.may_change if name != "accumulate")
    codes = args.out / "codes.pt"
    record.begin(codes.name)
    if record.step >= schedule.steps and holds_codes_of(codes, model):
        return say(f"nothing left to do: {record.path} is at step {record.step}, and {codes} is there")
    batches = stream(train, schedule.batch_size, args.seed, record.step, args.workers, schedule.accumulate)
    forward = distribute(compiled(model) if args.compile else model)
    last_weight = model.decoder.out[-1].weight

    def validate(step):
        if dq.rank_world()[0] > 0:
            return None
        metrics, y, grains = evaluate(model, images, detailed, autocast, perceptual, args.part)
        metrics["loss"] = (metrics["l1"] + schedule.l2_weight * metrics["l2"]
                           + schedule.perceptual_weight * metrics.get("lpips", 0.0))
        show(args.out / "vae.png", images, y, grains, config.factors)
        record.evaluated(step, metrics, metrics["loss"])
        return metrics

    model.train()
    with Stop(device, PATIENCE) as stop:
        for step in record.start("DQ-VAE"):
            if record.evaluates(step):
                validate(step)
            done = step + 1
            seed_all(args.seed, step)                                        # the same random numbers on all ranks
            batch = next(batches)[0].to(device, memory_format=memory_format, non_blocking=True)  # B, 3, S, S
            adversarial_on = schedule.gan_weight > 0 and step >= schedule.gan_start
            for optimizer in optimizers.values():
                optimizer.zero_grad(set_to_none=True)
                for group in optimizer.param_groups:
                    group["lr"] = schedule.learning_rate(step)
            for x in batch.chunk(schedule.accumulate):
                with autocast():
                    out = forward(x, dq.gumbel_scale(step, schedule.steps))
                    y = out.reconstruction.float()                           # B / parts, 3, S, S
                    lpips = perceptual(x, y).mean() if perceptual else None
                    gan_loss = -discriminator(y).mean() if adversarial_on else None
                l1, l2 = (y - x).abs().mean(), (y - x).square().mean()
                budget = dq.budget_loss(out.gate, config.ratios)
                recon_loss = l1 + schedule.l2_weight * l2                    # these depend on y only
                code_loss = out.commitment + schedule.budget_weight * budget
                terms, scale = dict(l1=l1, budget=budget, commitment=out.commitment), 1 / schedule.accumulate
                if perceptual:
                    recon_loss = recon_loss + schedule.perceptual_weight * lpips
                    terms["lpips"] = lpips
                gan_weight = backward(y, last_weight, recon_loss, gan_loss, code_loss, schedule.gan_weight, scale)
                if adversarial_on:                                           # the discriminator's turn, on the same y
                    with autocast():
                        critic_loss = hinge_loss(discriminator_ddp(x), discriminator_ddp(y.detach()))
                    (scale * critic_loss).backward()
                    terms |= dict(gan=gan_loss, gan_weight=gan_weight, critic=critic_loss)
                record.add(done, dict(loss=recon_loss + code_loss) | terms, scale)
            if schedule.clip:
                nn.utils.clip_grad_norm_(model.parameters(), schedule.clip)
            for optimizer in optimizers.values():
                optimizer.step()                                             # does nothing without gradients

            saves, stops = record.after(done, stop)
            if saves:
                record.save(done)
            if stops:
                stop.leave(stops, f"after step {done}, saved in {record.path}")
        metrics = validate(record.step)
        train.augment = False                                                # encode each image once, without crops
        args.preset = recipe(args.preset, config)
        write_codes(codes, model, train, val, args, device, autocast, stop)
    say(f"done: {record.path}, {codes}, {args.out / 'vae.png'} and {record.log}")
    if metrics:
        out = "" if args.out == Path("out") else f" --out {shlex.quote(str(args.out))}"
        say(f"{metrics['psnr']:.1f} dB PSNR on the validation images at {metrics['codes_per_image']:.1f} codes per "
            f"image; next: python train_transformer.py{out}")


# ------------------------------------------------------------------------------------------------
# Several processes


class BatchNorm(nn.BatchNorm2d):
    """Batch norm over the batches of all ranks (torch's SyncBatchNorm needs GPUs)."""

    def forward(self, x):
        world = dq.rank_world()[1]
        if world == 1 or not self.training:
            return super().forward(x)
        sums = torch.stack([x.float().mean(dim=(0, 2, 3)), x.float().square().mean(dim=(0, 2, 3))])  # 2, C
        mean, square = all_reduce(sums) / world                              # each C; differentiable
        var = square - mean ** 2                                             # C
        n = world * x.numel() / x.shape[1]                                   # values in each mean
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (var + self.eps).rsqrt()                       # C
        shift = self.bias - mean * scale                                     # C
        return (x * scale[:, None, None] + shift[:, None, None]).to(x.dtype)  # B, C, H, W


if __name__ == "__main__":
    run(main)
