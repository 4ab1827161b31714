"""Stage 1: images -> DQ-VAE checkpoint, and the images as its codes.    python train_vae.py [--data DIR]

Writes into --out: vae.pt (checkpoint), vae.best.pt (that of the lowest held-out loss), vae.jsonl (log), vae.png
(original | reconstruction | grains) and, at the end, codes.pt (all that stage 2 needs).
"""
import contextlib
import functools
import math
import re
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.nn.functional import all_reduce
from tqdm import tqdm

import dq
from common import (Record, Schedule, Stop, distribute, draw_grains, flag, natural, override, positive, prepare, run,
                    save_grid, say, seed_all, set_aside, shuffled_indices, to_picture, trainer_flags, weight)
from data import BROKEN, ToyShapes, describe, identity, loader, open_data, stream


# ------------------------------------------------------------------------------------------------
# Presets


@dataclass
class VAESchedule(Schedule):
    """How stage 1 is trained; losses beside the absolute error and the commitment, whose weights are 1."""
    l2_weight: float = 1.0
    budget_weight: float = flag(1.0, type=weight, help="weight of the budget loss")
    perceptual_weight: float = flag(0.0, type=weight, help="weight of LPIPS; 0: without")
    gan_weight: float = flag(
        0.0, type=weight, help="weight of the adversarial loss, times the adaptive weight; 0: without")
    gan_start: int = flag(0, metavar="STEP", type=natural, help="step from which the discriminator takes part")


# The paper's (section 4 and the released settings); the learning rate is 4.5e-6 per image of a batch of 120.
SIZES = dict(size=256, codebook_size=1024, code_dim=256, channels=256, width=128,
             encoder_blocks=2, decoder_blocks=3, attention_from=8)
DUAL = dq.VAEConfig(**SIZES, factors=(16, 8), ratios=(0.5, 0.5), multipliers=(1, 1, 2, 2, 4))
TRIPLE = dq.VAEConfig(**SIZES, factors=(32, 16, 8), ratios=(0.4, 0.3, 0.3), multipliers=(1, 1, 2, 2, 4, 4))
PAPER = VAESchedule(steps=507_000, batch_size=120, accumulate=4, lr=5.4e-4, betas=(0.5, 0.9), warmup=1000,
                    eval_every=5000, clip=0.0, budget_weight=10.0, l2_weight=0.0, perceptual_weight=1.0,
                    gan_weight=1.0)                                          # 50 epochs of 1,217,000 images

PRESETS = {
    # minutes on two CPU cores: what the README's first command runs
    "toy": (dq.VAEConfig(), VAESchedule(steps=1000, batch_size=32, lr=2e-3, clip=0.0)),
    # the same data at 64 x 64, 160 codes an image: stage 1 takes 50 minutes on two cores, stage 2 wants a GPU
    "toy64": (dq.VAEConfig(size=64, codebook_size=512), VAESchedule(steps=4000, batch_size=32, lr=2e-3, clip=0.0)),
    # a few thousand pictures in 40 codes each: what assets/emoji64.pt was made with
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


# ------------------------------------------------------------------------------------------------
# Losses that only training needs


class Perceptual(nn.Module):
    """LPIPS on VGG16, frozen: forward(x, y (B, 3, S, S) in [-1, 1]) -> (B,), 0 for equal images.

    Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", 2018, version 0.1: features
    behind five ReLUs, each vector normalised over its channels, squared difference, weighted per channel, averaged over
    the places, summed over the five.
    """
    urls = ("https://download.pytorch.org/models/vgg16-397923af.pth",
            "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth")

    def __init__(self):
        super().__init__()
        layers, c, self.ends, self.weights = [], 3, [0], nn.ParameterList()  # layers: numbered as in VGG16's file
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
        """With the published weights, from files or, without files, from torch's cache or the internet."""
        lpips, published = cls(), {}
        try:
            for url, name in zip(cls.urls, () if files else ("vgg16-397923af.pth", "lpips-vgg-0.1.pth")):
                published |= torch.hub.load_state_dict_from_url(url, map_location="cpu", file_name=name,
                                                                weights_only=True)
            for file in files:
                published |= torch.load(file, map_location="cpu", weights_only=True)
            lpips.load_state_dict({name: published[re.sub(r"weights\.(\d)", r"lin\1.model.1.weight", name)]
                                   for name in lpips.state_dict()})          # VGG16's names are ours
        except Exception as error:                                           # no network, no such file, a wrong one ...
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise dq.UserError(f"no weights for the perceptual loss ({reason}); download {' and '.join(cls.urls)} and "
                               "name both files after --perceptual-weights, or train without: "
                               "--perceptual-weight 0") from None
        return lpips

    def forward(self, x, y):
        x, y = (x - self.shift) / self.scale, (y - self.shift) / self.scale
        distance = 0.0
        for start, end, weight in zip(self.ends, self.ends[1:], self.weights):  # weight: 1, c, 1, 1
            with torch.no_grad():
                x = self.features[start:end](x)                              # B, c, S/2^k, S/2^k
            y = self.features[start:end](y)
            # a vector that is zero keeps a gradient that is finite, which y / |y| would not
            a, b = (F.normalize(maps.float(), dim=1, eps=1e-10) for maps in (x, y))
            distance = distance + (weight * (a - b).square()).sum(1).mean(dim=(1, 2))  # B
        return distance


class BatchNorm(nn.BatchNorm2d):
    """Over the batches of all processes (torch's SyncBatchNorm is for GPUs only)."""

    def forward(self, x):
        world = dq.rank_world()[1]
        if world == 1 or not self.training:
            return super().forward(x)
        sums = torch.stack([x.float().mean(dim=(0, 2, 3)), x.float().square().mean(dim=(0, 2, 3))])  # 2, C
        mean, square = all_reduce(sums) / world                              # each C; with a gradient to all processes
        var = square - mean ** 2                                             # C
        n = world * x.numel() / x.shape[1]                                   # values that each mean is over
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (var + self.eps).rsqrt()                       # C
        shift = self.bias - mean * scale                                     # C
        return (x * scale[:, None, None] + shift[:, None, None]).to(x.dtype)  # B, C, H, W


class Discriminator(nn.Module):
    """PatchGAN (Isola et al. 2017): (B, 3, S, S) -> a logit for each overlapping patch, high for real."""

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
    """Of the discriminator: real logits above 1 and fake ones below -1 cost nothing. Any shapes -> scalar."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(y, last, pull, push, cap=0.75):
    """Weight of the adversarial loss that lets it move the decoder's last layer as much as the reconstruction loss, at
    most `cap` (Esser et al., "Taming Transformers", 2021, equation 7). y: reconstruction; last: weight of the last
    convolution; pull, push: the gradients of the two losses at y."""
    at_last = [torch.autograd.grad(y, last, gradient, retain_graph=True)[0] for gradient in (pull, push)]
    pull, push = (dq.all_reduce_sum(each).norm() / dq.rank_world()[1] for each in at_last)  # at_last: of this process's images
    return (pull / (push + 1e-4)).clamp(max=cap)


def backward(y, last, loss, adversarial, other, gan_weight=1.0, scale=1.0):
    """Accumulate the gradients of scale * (loss + weight * adversarial + other); -> the weight, or None.

    y: reconstruction (B, 3, S, S). loss, adversarial (or None): scalars that depend on the model through y alone.
    other: a scalar of what the model computed before y (commitment, budget). Both gradients are added at y: VGG and the
    discriminator are walked back once each, though the adaptive weight needs them apart, and their weights get none.
    """
    at_y, weight = torch.autograd.grad(loss, y)[0], None                     # B, 3, S, S
    if adversarial is not None:
        push, = torch.autograd.grad(adversarial, y)                          # B, 3, S, S
        weight = gan_weight * adaptive_weight(y, last, at_y, push)
        at_y = at_y + weight * push
    torch.autograd.backward([y, other], [scale * at_y, torch.full_like(other, scale)])
    return weight


def compiled(model, **how):
    """A DQVAE through torch.compile, all but its last convolution: `adaptive_weight` walks back to there twice, and
    what is compiled can be walked back once only and as a whole."""
    last = model.decoder.out[-1]
    last.forward = torch.compiler.disable(last.forward)
    return torch.compile(model, **how)


# ------------------------------------------------------------------------------------------------
# Evaluation


def auc(score, truth):
    """Area under the ROC curve: how often a detailed region scores above a smooth one. Ties count half.
    score: any shape; truth: the same shape, bool, with both values in it."""
    detailed, smooth = score[truth], score[~truth].sort().values
    below, not_above = (torch.searchsorted(smooth, detailed, right=ties) for ties in (False, True))
    return ((below + not_above).sum() / (2 * len(detailed) * len(smooth))).item()


def ssim(x, y):
    """Structural similarity of images (B, 3, S, S) in [-1, 1] -> (B,), mean over channels and places.

    Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity", 2004:
    Gaussian window of 11 pixels and deviation 1.5, constants (0.01 R)^2 and (0.03 R)^2 for range R, here 1.
    """
    side = min(11, x.shape[-1] - 1 + x.shape[-1] % 2)                        # smaller images: the largest odd window
    line = torch.exp(-0.5 * ((torch.arange(side, device=x.device) - side // 2) / 1.5) ** 2)
    window = (line[:, None] * line).div(line.sum() ** 2).expand(3, 1, side, side)
    x, y = (x + 1) / 2, (y + 1) / 2                                          # black must be 0: means are divided
    mx, my, xx, yy, xy = (F.conv2d(z, window, groups=3) for z in (x, y, x * x, y * y, x * y))  # B, 3, S - 10, S - 10
    c1, c2 = 0.01 ** 2, 0.03 ** 2
    means = (2 * mx * my + c1) / (mx ** 2 + my ** 2 + c1)                    # B, 3, S - 10, S - 10
    structure = (2 * (xy - mx * my) + c2) / (xx - mx ** 2 + yy - my ** 2 + c2)  # B, 3, S - 10, S - 10
    return (means * structure).mean(dim=(1, 2, 3))


@torch.no_grad()
def evaluate(model, images, detailed, autocast, perceptual=None, batch_size=64):
    """Held-out images (M, 3, S, S) -> figures, reconstructions (M, 3, S, S), grains (M, h, w).
    detailed: (M, h, w), bool, where detail is, or None."""
    model.eval()
    parts = []
    for x in images.split(batch_size):
        with autocast():
            out = model(x)
            y = out.reconstruction.float().clamp(-1, 1)                      # B, 3, S, S
            score = model.router.score(x, out.maps).float()                  # B, h, w
            lpips = [perceptual(x, y)] if perceptual else []                 # B
        parts.append([y, out.codes, out.grains, model.cell_weight(out.gate), score, ssim(y, x), *lpips])
    model.train()
    y, codes, grains, weight, score, similarity, *lpips = map(torch.cat, zip(*parts))  # codes, weight: M, H, W

    config, K = model.config, len(model.config.factors)
    n_codes = weight.sum(dim=(1, 2)).mean().item()                           # every code counts once
    # what sending an image takes: its codes, and for each region which granularity it has
    bits = n_codes * math.log2(config.codebook_size) + grains[0].numel() * math.log2(K)
    use = codes.flatten().bincount(weight.flatten(), config.codebook_size)   # V
    p = use / use.sum()                                                      # V
    error = y - images                                                       # M, 3, S, S
    figures = dict(
        psnr=(10 * torch.log10(4 / error.square().mean(dim=(1, 2, 3)))).mean().item(),
        ssim=similarity.mean().item(), l1=error.abs().mean().item(), l2=error.square().mean().item(),
        codes_per_image=n_codes, bits_per_pixel=bits / config.size ** 2,
        share=[round((grains == k).float().mean().item(), 4) for k in range(K)],
        perplexity=torch.exp(-(p * (p + 1e-12).log()).sum()).item(), codebook_used=(use > 0).float().mean().item())
    if detailed is not None and K > 1 and 0 < detailed.sum() < detailed.numel():
        figures |= dict(auc=auc(score, detailed), auc_argmax=auc(grains, detailed))
    if perceptual:
        figures["lpips"] = lpips[0].mean().item()
    return figures, y, grains


def show(path, images, reconstructions, grains, factors):
    """A picture of up to 8 triples: original, reconstruction, codes."""
    triples = [(to_picture(x), to_picture(y), draw_grains(x, g, factors))
               for x, y, g in zip(images[:8], reconstructions, grains)]
    save_grid(path, sum(triples, ()), columns=6)


# ------------------------------------------------------------------------------------------------
# codes.pt: what stage 2 reads


@torch.no_grad()
def encode(vae, data, device, autocast, workers, mirrored, stop):
    """All images, and the mirror image of each if `mirrored` -> {codes: (M, views, H, W), grains: (M, views, h, w),
    label: (M,)} on the CPU, in small integers, without what can't be decoded.

    Each process encodes its part of the images, and all get the whole, in the order of the data set.
    """
    rank, world = dq.rank_world()
    # numbers past the end are those of the first images again: all processes must have as many
    own = range(rank, -(-len(data) // world) * world, world)
    rows = dict(codes=[], grains=[], label=[])
    bar = tqdm(loader(data, workers, batch_size=64, sampler=own), "encoding", leave=False,
               disable=True if rank else None)
    for x, label in bar:
        x = x.to(device)                                                     # n, 3, S, S
        with autocast():
            views = [vae.encode(view) for view in ((x, x.flip(3)) if mirrored else (x,))]
        codes, grains = (torch.stack(each, dim=1) for each in zip(*views))   # n, views, H, W; n, views, h, w
        for name, part in dict(codes=codes, grains=grains, label=label).items():
            of_all = torch.zeros(world, *part.shape, dtype=torch.int, device=device)
            of_all[rank] = part
            rows[name].append(smallest(dq.all_reduce_sum(of_all).transpose(0, 1).flatten(0, 1).cpu()))  # n world, ...
        if number := stop.asked():
            bar.close()
            stop.leave(number, "while the images were encoded")
    rows = {name: torch.cat(parts)[:len(data)] for name, parts in rows.items()}
    sound = rows["label"] != BROKEN
    dq.require(sound.any(), "none of the images can be read")
    return {name: smallest(x[sound]) for name, x in rows.items()}


def smallest(x):
    """The same whole numbers, in the smallest type that holds them."""
    low, high = x.aminmax()
    kinds = (torch.uint8, torch.int8, torch.int16, torch.int32)
    return x.to(next(kind for kind in kinds if torch.iinfo(kind).min <= low and high <= torch.iinfo(kind).max))


def write_codes(path, vae, train, held_out, preset, args, device, autocast, stop):
    """Encode all images and write what stage 2 needs: these, the DQ-VAE, the classes, the name of the preset."""
    vae.eval()
    seed_all(args.seed)                                                      # the random router draws
    train_codes, held_out_codes = (encode(vae, data, device, autocast, args.workers, mirrored, stop)
                                   for data, mirrored in ((train, not args.no_flip), (held_out, False)))
    weights, checksum = {name: x.cpu() for name, x in vae.state_dict().items()}, 0
    for x in (*weights.values(), *train_codes.values(), *held_out_codes.values()):
        checksum = zlib.crc32(x.contiguous().flatten().view(torch.uint8).numpy(), checksum)
    codes = dict(kind="dq-codes", version=1, name=f"{len(train_codes['label'])} images (checksum {checksum:08x})",
                 preset=preset, classes=train.classes, config=asdict(vae.config), weights=weights,
                 train=train_codes, held_out=held_out_codes)
    if dq.rank_world()[0] == 0:
        dq.write_file(path, lambda file: torch.save(codes, file))


def holds_codes_of(path, vae):
    """Is this file there and whole, and are the codes in it of this DQ-VAE?"""
    with contextlib.suppress(dq.UserError, KeyError):
        weights, ours = dq.load_checkpoint(path, "dq-codes")["weights"], vae.state_dict()
        return weights.keys() == ours.keys() and all(torch.equal(x.cpu(), weights[name]) for name, x in ours.items())


# ------------------------------------------------------------------------------------------------
# Training


def parse(argv=None):
    """-> the flags, config, schedule"""
    parser, config, schedule = trainer_flags(
        "Train a DQ-VAE: images to variable-length codes and back.", PRESETS, argv)
    add = parser.add_argument
    add("--data", metavar="DIR", help="folder of images; None: the built-in toy shapes")
    add("--held-out", metavar="DIR", help="folder of images to evaluate on; None: one in 20 of --data")
    add("--no-flip", action="store_true", help="no mirror images: where left and right are not alike, as in letters")
    add("--workers", type=natural, default=0, help="processes that load images")
    add("--size", type=positive, default=config.size, help="side of the images, pixels")
    add("--factors", type=positive, nargs="+", default=config.factors,
        help="downsampling factors, coarse to fine; one: fixed length")
    add("--ratios", type=weight, nargs="+", help="share of regions per factor; None: the preset's, or equal shares")
    add("--router", choices=["learned", "entropy", "random"], default=config.router, help="what picks granularities")
    add("--codebook-size", type=positive, default=config.codebook_size, help="number of codes")
    add("--code-dim", type=positive, default=config.code_dim, help="dimension of a code")
    add("--perceptual-weights", metavar="FILE", nargs="+", default=[],
        help="files with the weights of VGG16 and LPIPS; none: torch's cache, or download")
    add("--encode", metavar="CHECKPOINT", type=Path,
        help="instead of training, write codes.pt: the images of --data as codes of this DQ-VAE")
    args = parser.parse_args(argv)
    if args.ratios is None:
        K = len(args.factors)
        args.ratios = config.ratios if K == len(config.factors) else [1 / K] * K
    for name, weighs, side in (("gan", args.gan_weight, 24), ("perceptual", args.perceptual_weight, 16)):
        dq.require(not weighs or args.size >= side, f"the {name} loss needs images of at least {side} x {side} pixels, "
                                                    f"not {args.size}; --{name}-weight 0 trains without")
    return args, override(config, args), override(schedule, args)


def held_out_images(data, config, device):
    """Up to 512 held-out images (M, 3, S, S), always the same, and, of the toy data only, where detail is: (M, h, w),
    bool."""
    shown = dq.numpy_rng(0).permutation(len(data))[:512].tolist()
    images = [x for x, label in map(data.__getitem__, shown) if label != BROKEN]
    dq.require(images, f"none of {len(shown)} held-out images can be decoded")
    images = torch.stack(images).to(device)                                  # M, 3, S, S
    if not isinstance(data, ToyShapes):
        return images, None
    masks = torch.stack([data.detail_mask(i) for i in shown]).float()        # M, S, S
    return images, F.avg_pool2d(masks, config.factors[0]).to(device) > 0.1


def encode_only(args, device, autocast):
    """--encode: codes.pt of any DQ-VAE and any folder."""
    vae, path = dq.load_vae(args.encode, device), args.out / "codes.pt"
    data = open_data(args.data, vae.config.size, seed=args.seed, skip=args.out, held_out=args.held_out)
    say(describe(*data))
    set_aside(path, hint="")
    preset = dq.load_checkpoint(args.encode, "dq-vae").get("preset", args.preset)
    with Stop(device) as stop:
        write_codes(path, vae, *data, preset, args, device, autocast, stop)
    say(f"done: {path}")


def main(argv=None):
    args, config, schedule = parse(argv)
    device, autocast = prepare(args, trains=not args.encode)
    if args.encode:
        return encode_only(args, device, autocast)
    train, held_out = open_data(args.data, config.size, augment=True, seed=args.seed, skip=args.out,
                                flip=not args.no_flip, held_out=args.held_out)
    say(describe(train, held_out))
    images, detailed = held_out_images(held_out, config, device)
    perceptual = Perceptual.load(args.perceptual_weights).to(device) if schedule.perceptual_weight else None

    seed_all(args.seed)
    # GPUs convolve faster with channels last; on CPUs group norm is many times slower that way
    memory_format = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    model = dq.DQVAE(config).to(device, memory_format=memory_format)
    if config.router == "entropy":
        sample = loader(train, args.workers, batch_size=64, sampler=next(shuffled_indices(len(train), 2048, args.seed)))
        model.router.calibrate(config.ratios, (x.to(device) for x, _ in sample))
    adam = functools.partial(torch.optim.Adam, lr=schedule.lr, betas=schedule.betas, fused=device.type == "cuda")
    optimizers = parts = dict(optimizer=adam(model.parameters()))
    if schedule.gan_weight:
        critic = Discriminator().to(device, memory_format=memory_format)
        judge = distribute(critic)
        optimizers["critic_optimizer"] = adam(critic.parameters())
        parts = dict(critic=critic, **optimizers)
    settings = dict(data=identity(train), held_out=identity(held_out), no_flip=args.no_flip, seed=args.seed)
    settings |= asdict(schedule)
    record = Record(args, args.out / "vae.pt", config, settings, model, parts, dict(preset=args.preset))
    codes = args.out / "codes.pt"
    record.begin(codes.name)
    if record.step >= schedule.steps and holds_codes_of(codes, model):
        return say(f"nothing left to do: {record.path} is at step {record.step}, and {codes} is there")
    batches = stream(train, schedule.batch_size, args.seed, record.step, args.workers, schedule.accumulate)
    forward = distribute(compiled(model) if args.compile else model)
    last_weight = model.decoder.out[-1].weight

    model.train()
    with Stop(device) as stop:
        for step in record.start("DQ-VAE"):
            done = step + 1
            seed_all(args.seed, step)                                        # all processes draw the same
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
                    gan = -critic(y).mean() if adversarial_on else None
                l1, l2 = (y - x).abs().mean(), (y - x).square().mean()
                budget = dq.budget_loss(out.gate, config.ratios)
                of_y = l1 + schedule.l2_weight * l2                          # the losses that depend on y alone
                of_codes = out.commitment + schedule.budget_weight * budget
                terms, scale = dict(l1=l1, budget=budget, commitment=out.commitment), 1 / schedule.accumulate
                if perceptual:
                    of_y = of_y + schedule.perceptual_weight * lpips
                    terms["lpips"] = lpips
                gan_weight = backward(y, last_weight, of_y, gan, of_codes, schedule.gan_weight, scale)
                if adversarial_on:                                           # the same y, seen from the other side
                    with autocast():
                        critic_loss = hinge_loss(judge(x), judge(y.detach()))
                    (scale * critic_loss).backward()
                    terms |= dict(gan=gan, gan_weight=gan_weight, critic=critic_loss)
                record.add(done, dict(loss=of_y + of_codes) | terms, scale)
            if schedule.clip:
                nn.utils.clip_grad_norm_(model.parameters(), schedule.clip)
            for optimizer in optimizers.values():
                optimizer.step()                                             # nothing without gradients

            evaluates, saves, stops = record.after(done, stop)
            if evaluates and dq.rank_world()[0] == 0:
                figures, y, grains = evaluate(model, images, detailed, autocast, perceptual)
                figures["loss"] = (figures["l1"] + schedule.l2_weight * figures["l2"]
                                   + schedule.perceptual_weight * figures.get("lpips", 0.0))
                show(args.out / "vae.png", images, y, grains, config.factors)
                record.evaluated(done, figures, figures["loss"])
            if saves:
                record.save(done)
            if stops:
                stop.leave(stops, f"after step {done}, saved in {record.path}")
        train.augment = False                                                # each image is encoded once, as it is
        write_codes(codes, model, train, held_out, args.preset, args, device, autocast, stop)
    say(f"done: {record.path}, {codes}, {args.out / 'vae.png'} and {record.log}")


if __name__ == "__main__":
    run(main)
