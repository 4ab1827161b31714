"""Stage 1: images -> a DQ-VAE checkpoint, and all images as codes.    python train_vae.py [--data DIR]

Writes into --out: vae.pt (checkpoint), vae.best.pt (the one with the lowest validation loss), vae.jsonl (log), vae.png
(original | reconstruction | granularity map) and, at the end, codes.pt (everything that stage 2 needs).
"""
import math
import os
import re
import shlex
import zlib
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import dq
from common import (Record, Schedule, Stop, distribute, draw_grains, explained, flag, natural, on_gpu, override, path,
                    positive, prepare, run, save_grid, say, seed_all, set_aside, shuffled_indices, to_picture,
                    trainer_flags, weight)
from data import BROKEN, ToyShapes, describe, find_images, identity, image_side, loader, open_data, stream


# ---- Presets -----------------------------------------------------------------------------------

@dataclass
class VAESchedule(Schedule):
    """Training hyperparameters of stage 1. The L1 loss and the commitment loss have weight 1."""
    l2_weight: float = 1.0
    budget_weight: float = flag(1.0, type=weight, help="weight of the budget loss")
    perceptual_weight: float = flag(0.0, type=weight, help="weight of the perceptual loss (LPIPS); 0: off")
    gan_weight: float = flag(0.0, type=weight, help="factor on the adaptive weight of the adversarial loss; 0: off")
    gan_start: int = flag(0, metavar="STEP", type=natural, help="first step with the adversarial loss")
    accumulate: int = flag(1, metavar="N", type=positive, help="gradient accumulation steps; more save memory and "
                           "change the results, as budget loss, EMA updates and batch norm see one part at a time")


# The paper's (section 4 and the released settings): 50 epochs of 1,217,000 images, learning rate 4.5e-6 x batch size
SIZES = dict(size=256, codebook_size=1024, code_dim=256, channels=256, width=128,
             encoder_blocks=2, decoder_blocks=3, attention_from=8)
DUAL = dq.VAEConfig(**SIZES, factors=(16, 8), ratios=(0.5, 0.5), multipliers=(1, 1, 2, 2, 4))
TRIPLE = dq.VAEConfig(**SIZES, factors=(32, 16, 8), ratios=(0.4, 0.3, 0.3), multipliers=(1, 1, 2, 2, 4, 4))
PAPER = VAESchedule(steps=507_000, batch_size=120, accumulate=4, lr=5.4e-4, betas=(0.5, 0.9), warmup=1000,
                    eval_every=5000, clip=0.0, budget_weight=10.0, l2_weight=0.0, perceptual_weight=1.0, gan_weight=1.0)

SMALL = VAESchedule(steps=1500, batch_size=16, lr=2e-3, clip=0.0)
LONG = replace(SMALL, steps=20_000, batch_size=64, eval_every=1000)
WIDE = dict(codebook_size=1024, channels=128, width=64, multipliers=(1, 2, 2, 4), decoder_blocks=2, attention_from=8)

PRESETS = {
    # the built-in shapes; at 64 x 64, stage 1 takes 50 minutes on two CPU cores, and stage 2 needs a GPU
    "toy": (dq.VAEConfig(), replace(SMALL, steps=1000, batch_size=32)),
    "toy64": (dq.VAEConfig(size=64, codebook_size=512), replace(SMALL, steps=4000, batch_size=32)),
    # a folder of images, see `choose`: 15 minutes on two CPU cores for both stages ...
    "folder32": (dq.VAEConfig(), replace(SMALL, steps=5000)),
    "folder64": (dq.VAEConfig(size=64, factors=(16, 8), codebook_size=512, attention_from=8), SMALL),
    # ... or an hour on a GPU, by an estimate
    "folder64-large": (dq.VAEConfig(size=64, **WIDE), LONG),
    "folder128": (dq.VAEConfig(size=128, factors=(16, 8), **WIDE), LONG),
    "folder256": (dq.VAEConfig(size=256, factors=(16, 8), **WIDE), replace(LONG, steps=8000, batch_size=32)),
    # a few thousand drawings with 40 codes each; satellite tiles with 1, 4 or 16 codes per region: see assets/README.md
    "emoji64": (dq.VAEConfig(size=64, factors=(16, 8), codebook_size=1024, channels=128, multipliers=(1, 2, 4, 4),
                             attention_from=8), replace(SMALL, steps=8000, batch_size=32, lr=1e-3)),
    "earth64": (dq.VAEConfig(size=64, factors=(8, 4, 2), ratios=(0.5, 0.3, 0.2), codebook_size=1024,
                             multipliers=(2, 3, 3), decoder_blocks=2, attention_from=8),
                replace(SMALL, steps=8000, batch_size=32, lr=1e-3, eval_every=1000)),
    # small networks with all losses of the paper, 640 codes per image
    "emoji128": (dq.VAEConfig(size=128, codebook_size=512, attention_from=8),
                 replace(SMALL, steps=4000, batch_size=8, lr=1e-3,
                         perceptual_weight=1.0, gan_weight=0.5, gan_start=2000)),
    "ffhq256": (DUAL, replace(PAPER, steps=27_700, eval_every=1000)),        # 50 epochs of 66,500 images
    "imagenet256": (DUAL, PAPER),
    "imagenet256-triple": (TRIPLE, replace(PAPER, budget_weight=1.0)),
}
FEW = 500                                # images; for fewer, codes.pt has crops of each


# ---- Losses that only training needs -----------------------------------------------------------

class Perceptual(nn.Module):
    """LPIPS on VGG16, frozen: forward(x, y (B, 3, S, S) in [-1, 1]) -> (B,), 0 for equal images.
    Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", 2018, version 0.1. The
    features after five ReLUs are normalised over the channels. Their squared differences are weighted per channel,
    averaged over the image and summed over the five layers."""
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
        lpips, published, read = cls(), {}, torch.load if files else torch.hub.load_state_dict_from_url
        with explained(f"no weights for the perceptual loss; download {' and '.join(cls.urls)} and pass both files to "
                       "--perceptual-weights, or turn the loss off with --perceptual-weight 0"):
            for source in files or cls.urls:
                published |= read(source, map_location="cpu", weights_only=True)
            lpips.load_state_dict({name: published[re.sub(r"weights\.(\d)", r"lin\1.model.1.weight", name)]
                                   for name in lpips.state_dict()})          # VGG16's layers have the same names
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


class BatchNorm(nn.BatchNorm2d):
    """Batch norm over the images of all ranks. (torch's SyncBatchNorm needs GPUs.)"""
    def forward(self, x):
        rank, world = dq.rank_world()
        return super().forward(dq.all_gather(x)).chunk(world)[rank]          # B, C, H, W


class Discriminator(nn.Module):
    """PatchGAN (Isola et al. 2017): (B, 3, S, S) -> one logit per overlapping patch, high for real images."""
    def __init__(self, width=64):
        super().__init__()
        blocks, c = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)], width
        for c_out, stride in ((2 * width, 2), (4 * width, 2), (8 * width, 1)):
            blocks += [nn.Conv2d(c, c_out, 4, stride, padding=1, bias=False), BatchNorm(c_out), nn.LeakyReLU(0.2)]
            c = c_out
        self.blocks = nn.Sequential(*blocks, nn.Conv2d(c, 1, 4, padding=1))
        for name, p in self.named_parameters():
            if name.endswith("weight"):
                nn.init.normal_(p, 1 if p.dim() == 1 else 0, 0.02)           # those of batch norm are around 1

    def forward(self, x):
        return self.blocks(x).float()                                        # B, 1, S/8 - 2, S/8 - 2


def hinge_loss(real, fake):
    """The discriminator's loss: 0 for real logits above 1 and fake ones below -1. Any shapes -> scalar."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def backward(y, last, recon_loss, gan_loss, code_loss, gan_weight=1.0, scale=1.0):
    """Accumulate the gradients of scale * (recon_loss + weight * gan_loss + code_loss). -> the weight, or None
    y: reconstruction (B, 3, S, S); last: weight of the last convolution. recon_loss and gan_loss (or None): scalars
    that depend on the model through y only; code_loss: commitment and budget losses, which precede y. The weight is
    gan_weight times the ratio, at most 0.75, of the gradient norms of recon_loss and gan_loss at `last` (Esser et al.,
    "Taming Transformers", 2021, equation 7). The gradients are added up at y, so VGG and the discriminator are
    backpropagated once each, and their parameters receive no gradient."""
    at_y, weight = torch.autograd.grad(recon_loss, y)[0], None               # B, 3, S, S
    if gan_loss is not None:
        gan_at_y, = torch.autograd.grad(gan_loss, y)                         # B, 3, S, S
        at_last = [torch.autograd.grad(y, last, each, retain_graph=True)[0] for each in (at_y, gan_at_y)]
        recon, gan = (dq.all_reduce_sum(each).norm() / dq.rank_world()[1] for each in at_last)
        weight = gan_weight * (recon / (gan + 1e-4)).clamp(max=0.75)
        at_y = at_y + weight * gan_at_y
    torch.autograd.backward([y, code_loss], [scale * at_y, torch.full_like(code_loss, scale)])
    return weight


def compiled(model, **how):
    """A DQVAE under torch.compile, except for its last convolution: `backward` differentiates that layer twice, and a
    compiled graph can be differentiated only once."""
    last = model.decoder.out[-1]
    last.forward = torch.compiler.disable(last.forward)
    return torch.compile(model, **how)


# ---- Evaluation --------------------------------------------------------------------------------

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
        l1=l1.mean().item(), l2=l2.mean().item(), codes_per_image=n_codes, bits_per_pixel=bits / config.size ** 2,
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


# ---- codes.pt: what stage 2 reads --------------------------------------------------------------

def views(x, cropped, mirrored):
    """Images (B, 3, S, S) -> the views to encode, each of this shape: the images; with `cropped` also their corners of
    7/8 of the side, enlarged; with `mirrored` each of these, followed by its mirror image."""
    S, side = x.shape[-1], x.shape[-1] * 7 // 8
    corners = [x[..., top:top + side, left:left + side] for top in (0, S - side) for left in (0, S - side)]
    crops = [F.interpolate(corner, (S, S), mode="bicubic").clamp(-1, 1) for corner in corners] if cropped else []
    return [view for crop in (x, *crops) for view in ((crop, crop.flip(3)) if mirrored else (crop,))]


@torch.no_grad()
def encode_dataset(vae, data, device, autocast, workers, mirrored, stop, batch_size=64, cropped=False):
    """The `views` of all images that can be decoded, in the order of the data set
    -> {codes: (M, views, H, W), grains: (M, views, h, w), label: (M,)} on the CPU, in small integers.
    Each rank encodes its part of the images, and rank 0 collects the codes; the other ranks return None."""
    (rank, world), M, first, rows = dq.rank_world(), len(data), 0, {}
    small = next(kind for kind in (torch.uint8, torch.int16, torch.int32)
                 if vae.config.codebook_size <= torch.iinfo(kind).max + 1)
    kinds = dict(codes=small, grains=torch.uint8, label=torch.int32)
    # the indices wrap around at the end, so that all ranks have the same number
    own = range(rank, -(-M // world) * world, world)
    batches, n_batches = loader(data, workers, batch_size=batch_size, sampler=own), -(-len(own) // batch_size)
    for x, label in tqdm(batches, "encoding", n_batches, leave=False, disable=True if rank else None):
        with autocast():
            encoded = [vae.encode(view) for view in views(x.to(device), cropped, mirrored)]
        codes, grains = (torch.stack(each, dim=1) for each in zip(*encoded))  # n, views, H, W; n, views, h, w
        for name, part in dict(codes=codes, grains=grains, label=label).items():
            by_rank = dq.all_gather(part.to(device, torch.int)).unflatten(0, (world, -1))  # world, n, ...
            of_all = by_rank.transpose(0, 1).flatten(0, 1)                   # n world, ...
            if rank == 0:
                if name not in rows:
                    rows[name] = torch.empty(M, *part.shape[1:], dtype=kinds[name])
                rows[name][first:first + len(of_all)] = of_all[:M - first]
        first += len(of_all)
        if number := stop.asked():
            stop.leave(number, "while the images were encoded")
    if rank:
        return None
    sound = rows["label"] != BROKEN
    if not sound.all():                                                      # each rank has warned of its own only
        say(f"note: {(~sound).sum()} of {M} images can't be decoded; they have no codes")
    dq.require(sound.any(), "none of the images can be read")
    return rows if sound.all() else {name: x[sound] for name, x in rows.items()}


def recipe(preset, config):
    """The name of the preset if it gives codes like those of this VAEConfig, else "custom". Stage 2 chooses by it."""
    made, _ = PRESETS.get(preset, (None, None))
    same = made and (made.size, made.factors, made.ratios) == (config.size, config.factors, config.ratios)
    return preset if same else "custom"


def write_codes(path, vae, train, val, args, device, autocast, stop, psnr):
    """Encode all images and write what stage 2 needs: the codes, the DQ-VAE, the classes, the name of the preset, and
    the PSNR of the validation images in dB."""
    vae.eval()
    parts = [encode_dataset(vae, data, device, autocast, args.workers, mirrored, stop, args.part, cropped)
             for data, mirrored, cropped in ((train, not args.no_flip, len(train) < FEW), (val, False, False))]
    if dq.rank_world()[0] > 0:
        return
    weights, checksum = {name: x.cpu() for name, x in vae.state_dict().items()}, 0
    for x in (*weights.values(), *parts[0].values(), *parts[1].values()):
        checksum = zlib.crc32(x.contiguous().flatten().view(torch.uint8).numpy(), checksum)
    codes = dict(kind="dq-codes", version=1, name=f"{len(parts[0]['label'])} images (checksum {checksum:08x})",
                 preset=recipe(args.preset, vae.config), psnr=psnr, classes=train.classes, config=asdict(vae.config),
                 weights=weights, train=parts[0], held_out=parts[1])
    dq.write_file(path, lambda file: torch.save(codes, file))


# ---- Training ----------------------------------------------------------------------------------

def choose(gpu, images, side):
    """-> the preset for so many images, `side` pixels on their short side, on a GPU or a CPU."""
    if not gpu or side < 64:
        return "folder64" if side >= 64 else "folder32"
    if side < 128 or images < 1000:                                          # few images can't teach many codes
        return "folder64-large"
    return "folder128" if side < 256 or images < 10_000 else "folder256"


def parse(argv=None):
    """-> flags, config, schedule. The flags also have `plan`, a line about the preset, and `found`, the images for
    which it was chosen, or None. With --encode, they have neither, and the config is None."""
    parser, replacing = trainer_flags("Train a DQ-VAE, a variable-length image tokenizer.", PRESETS, VAESchedule)
    add = parser.add_argument
    add("--data", metavar="DIR", type=path, help="folder of images; default: the built-in toy shapes")
    add("--held-out", metavar="DIR", type=path, help="folder of validation images; default: one in 20 of --data")
    add("--no-flip", action="store_true", help="disable horizontal flips, for images with text or arrows")
    add("--workers", type=natural, default=0, help="threads that load images ahead; default: %(default)s")
    add("--perceptual-weights", metavar="FILE", type=path, nargs="+",
        help="files with the weights of VGG16 and LPIPS; default: torch's cache, or download")
    add("--encode", metavar="CHECKPOINT", type=path,
        help="write codes.pt with this DQ-VAE and exit; its data, seed, dtype, ... are used unless flags say otherwise")
    replacing("--size", type=positive, help="side of the images in pixels")
    replacing("--factors", type=positive, nargs="+",
              help="downsampling factors, coarse to fine; a single one gives fixed-length codes")
    replacing("--ratios", type=weight, nargs="+", help="target fraction of the regions for each factor; default: equal "
              "fractions if --factors changes their number. With --encode, they may differ from those of training")
    replacing("--router", choices=dq.ROUTERS, help="what chooses the granularity of a region: a learned gate, the "
              "entropy of its grey levels, chance, or (dial) a learned score that suits any --ratios of --encode")
    replacing("--codebook-size", type=positive, help="number of codebook entries")
    replacing("--code-dim", type=positive, help="dimension of a codebook entry")
    args = parser.parse_args(argv)
    if args.encode:
        parser.set_defaults(**recall(args))
        args = parser.parse_args(argv)
        return args, None, override(PRESETS.get(args.preset, PRESETS["toy"])[1], args)
    if args.resume and not args.preset and (args.out / "vae.pt").exists():
        args.preset = dq.load_checkpoint(args.out / "vae.pt", "dq-vae").get("preset")
    gpu, side, args.found = on_gpu(args.device), None, None
    if args.data and not args.preset:
        args.found = find_images(args.data, [args.out, args.held_out])
        side = image_side(args.found) or 32                                  # 0: no header can be read
        args.preset = choose(gpu, math.inf if args.size else len(args.found.files), args.size or side)
    args.preset = args.preset or "toy"
    config, schedule = PRESETS.get(args.preset, PRESETS["toy"])
    if args.factors and not args.ratios and len(args.factors) != len(config.factors):
        args.ratios = [1 / len(args.factors)] * len(args.factors)
    args.save_every = args.save_every or schedule.eval_every
    if args.router == "dial" and args.budget_weight is None:
        args.budget_weight = 0.0                                             # this router meets the budget by itself
    config, schedule = override(config, args), override(schedule, args)
    for name, used, least in (("gan", schedule.gan_weight, 24), ("perceptual", schedule.perceptual_weight, 16)):
        dq.require(not used or config.size >= least, f"the {name} loss needs images of at least {least} x {least} "
                   f"pixels, not {config.size}; --{name}-weight 0 turns it off")
    args.plan = outline(args.preset, config, schedule, side, gpu)
    return args, config, schedule


def outline(preset, config, schedule, side=None, gpu=False):
    """One line: what this preset trains. If images with this short side chose it, also why, and what gives more."""
    codes = sum(ratio * (config.size // factor) ** 2 for ratio, factor in zip(config.ratios, config.factors))
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
    """The flags {name: value} of a DQ-VAE's training, as far as its checkpoint has them, as defaults of --encode."""
    used = {"encode", "out", "data", "held_out", "no_flip", "seed", "workers", "batch_size", "accumulate", "device",
            "dtype", "ratios"}
    given = {name for name, value in vars(args).items() if value not in (None, False)}
    useless = [f"--{name.replace('_', '-')} has no effect with --encode" for name in sorted(given - used)]
    dq.require(not useless, "; ".join(useless))
    saved = dq.load_checkpoint(args.encode, "dq-vae")
    settings, folders = saved.get("settings", {}), saved.get("folders", {})
    known = {name: settings[name] for name in ("seed", "no_flip", "dtype") if name in settings}
    if args.data is None or os.path.realpath(args.data) == os.path.realpath(folders.get("data") or ""):
        known |= folders
    trained_on = settings.get("data", "the toy shapes")
    dq.require(args.data or folders or trained_on == "the toy shapes",
               f"{args.encode} does not name the folder of its {trained_on}; name it after --data")
    return known | dict(preset=saved.get("preset", "custom"))


def calibration_images(train, device, seed, batch_size=64, workers=0):
    """2,048 views of training images, the same each time, in batches (n, 3, S, S): for the thresholds of a router."""
    chosen = next(shuffled_indices(len(train), 2048, seed))
    return (x.to(device) for x, _ in loader(train, workers, batch_size=batch_size, sampler=chosen))


def encode_only(args, device, autocast):
    """--encode: write codes.pt with a DQ-VAE that is already trained."""
    path, vae = args.out / "codes.pt", dq.load_vae(args.encode, device)
    train, val = open_data(args.data, vae.config.size, seed=args.seed, skip=args.out, held_out=args.held_out)
    say(describe(train, val))
    if args.ratios:
        with autocast():
            vae.set_ratios(tuple(args.ratios), calibration_images(train, device, args.seed, args.part, args.workers))
    set_aside(path, hint="")
    metrics = evaluate(vae, *validation_images(val, vae.config), autocast, batch_size=args.part)[0]
    say(f"ratios {' '.join(f'{ratio:g}' for ratio in metrics['share'])} on the validation images, which makes "
        f"{metrics['codes_per_image']:.1f} codes per image and {metrics['psnr']:.1f} dB PSNR")
    with Stop() as stop:
        write_codes(path, vae, train, val, args, device, autocast, stop, metrics["psnr"])
    say(f"done: {path}")


def main(argv=None):
    args, config, schedule = parse(argv)
    device, autocast, machine = prepare(args, schedule, trains=not args.encode)
    if args.encode:
        return encode_only(args, device, autocast)
    train, val = open_data(args.data, config.size, augment=True, seed=args.seed, skip=args.out, flip=not args.no_flip,
                           held_out=args.held_out, found=args.found)
    say(describe(train, val))
    say(args.plan)
    if len(train) < FEW:
        say(f"note: with only {len(train)} images, expect samples that repeat or blend them; a few thousand images "
            "give new ones. Stage 2 will train on five crops of each image")
    images, detailed = validation_images(val, config)
    perceptual = Perceptual.load(args.perceptual_weights).to(device) if schedule.perceptual_weight else None

    seed_all(args.seed)
    # on GPUs convolutions are faster with channels last; on CPUs group norm is many times slower that way
    memory_format = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    model = dq.DQVAE(config).to(device, memory_format=memory_format)
    if config.router == "entropy":
        model.set_ratios(config.ratios, calibration_images(train, device, args.seed, args.part, args.workers))
    adam = dict(lr=schedule.lr, betas=schedule.betas, fused=True)
    optimizers = parts = dict(optimizer=torch.optim.Adam(model.parameters(), **adam))
    if schedule.gan_weight:
        discriminator = Discriminator().to(device, memory_format=memory_format)
        discriminator_ddp = distribute(discriminator)
        optimizers["critic_optimizer"] = torch.optim.Adam(discriminator.parameters(), **adam)
        parts = dict(critic=discriminator, **optimizers)                     # these names are in checkpoints
    settings = dict(data=identity(train), held_out=identity(val), no_flip=args.no_flip, seed=args.seed)
    settings |= asdict(schedule) | machine
    folders = {name: getattr(args, name) and os.path.abspath(getattr(args, name)) for name in ("data", "held_out")}
    extra = dict(preset=args.preset, folders=folders)
    record = Record(args, args.out / "vae.pt", config, settings, model, parts, extra)
    record.may_change -= {"accumulate"}                                      # its help says why
    codes = args.out / "codes.pt"
    record.begin(codes.name)
    if record.step >= schedule.steps and codes.exists() and codes.stat().st_mtime >= record.path.stat().st_mtime:
        return say(f"nothing left to do: {record.path} is at step {record.step}, and {codes} is there")
    batches = stream(train, schedule.batch_size, args.seed, record.step, args.workers, schedule.accumulate)
    forward, last = distribute(compiled(model) if args.compile else model), model.decoder.out[-1]

    def validate(step):
        metrics, y, grains = evaluate(model, images, detailed, autocast, perceptual, args.part)
        metrics["loss"] = (metrics["l1"] + schedule.l2_weight * metrics["l2"]
                           + schedule.perceptual_weight * metrics.get("lpips", 0.0))
        show(args.out / "vae.png", images, y, grains, config.factors)
        return metrics, metrics["loss"]

    model.train()
    with Stop() as stop:
        for step in record.steps("DQ-VAE", stop, validate):
            seed_all(args.seed, step)                                        # the same random numbers on all ranks
            batch = next(batches)[0].to(device, memory_format=memory_format, non_blocking=True)  # B, 3, S, S
            adversarial_on = schedule.gan_weight > 0 and step >= schedule.gan_start
            for x in batch.chunk(schedule.accumulate):
                with autocast():
                    out = forward(x, dq.gumbel_scale(step, schedule.steps))
                    y = out.reconstruction.float()                           # B / parts, 3, S, S
                    lpips = perceptual(x, y).mean() if perceptual else 0.0
                    gan_loss = -discriminator(y).mean() if adversarial_on else None
                l1, l2 = (y - x).abs().mean(), (y - x).square().mean()
                budget = dq.budget_loss(out.gate, config.ratios)
                recon_loss = l1 + schedule.l2_weight * l2 + schedule.perceptual_weight * lpips  # depends on y only
                code_loss = out.commitment + schedule.budget_weight * budget
                terms, scale = dict(l1=l1, budget=budget, commitment=out.commitment), 1 / schedule.accumulate
                if perceptual:
                    terms["lpips"] = lpips
                gan_weight = backward(y, last.weight, recon_loss, gan_loss, code_loss, schedule.gan_weight, scale)
                if adversarial_on:                                           # the discriminator's turn, on the same y
                    with autocast():
                        critic_loss = hinge_loss(discriminator_ddp(x), discriminator_ddp(y.detach()))
                    (scale * critic_loss).backward()
                    terms |= dict(gan=gan_loss, gan_weight=gan_weight, critic=critic_loss)
                record.add(step + 1, dict(loss=recon_loss + code_loss) | terms, scale)
            schedule.update(model, optimizers, step)
        train.augment = False                                                # encode each image once, without crops
        write_codes(codes, model, train, val, args, device, autocast, stop, record.metrics.get("psnr"))
    say(f"done: {record.path}, {codes}, {args.out / 'vae.png'} and {record.log}")
    if metrics := record.metrics:
        say(f"{metrics['psnr']:.1f} dB PSNR on the validation images at {metrics['codes_per_image']:.1f} codes per "
            f"image; next: python train_transformer.py --out {shlex.quote(str(args.out))}")


if __name__ == "__main__":
    run(main)
