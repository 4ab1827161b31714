"""Stage 1: images -> DQ-VAE checkpoint.    python train_vae.py [--data DIR]

Writes into --out: vae.pt (checkpoint), vae.best.pt (that of the lowest held-out loss), vae.jsonl (log),
vae.png (original | reconstruction | grains).

The file: presets; the losses that only training needs (LPIPS, discriminator); evaluation; the authors'
weights; the training loop. Images and pictures: sample.py; flags, checkpoints and logs: train_transformer.py.
"""
import math
import os
import re
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.nn.functional import all_reduce

import dq
from sample import BROKEN, Once, ToyShapes, describe, draw_grains, identity, open_data, run, save_grid, to_picture
from train_transformer import (Checkpoint, Log, Losses, Schedule, Stop, common_flags, distribute, learning_rate,
                               natural, override, positive, prepare, readable, say, stream, weight)


# ------------------------------------------------------------------------------------------------
# Presets


@dataclass
class VAESchedule(Schedule):
    """How stage 1 is trained; losses beside the absolute error and the commitment, whose weights are 1."""
    budget_weight: float = 1.0
    l2_weight: float = 1.0
    perceptual_weight: float = 0.0       # LPIPS
    gan_weight: float = 0.0              # adversarial loss, times its adaptive weight
    gan_start: int = 0                   # step from which the discriminator takes part


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
    "toy": (
        dq.VAEConfig(),
        VAESchedule(steps=1000, batch_size=32, lr=2e-3, clip=0.0)),
    # the same data at 64 x 64, 160 codes an image: stage 1 takes 50 minutes on two cores, stage 2 wants a GPU
    "toy64": (
        dq.VAEConfig(size=64, codebook_size=512),
        VAESchedule(steps=4000, batch_size=32, lr=2e-3, clip=0.0)),
    # a few thousand pictures in 40 codes each: what README's emoji were made with, 25 minutes a stage on two cores
    "emoji64": (
        dq.VAEConfig(size=64, factors=(16, 8), codebook_size=1024, channels=128, multipliers=(1, 2, 4, 4),
                     attention_from=8),
        VAESchedule(steps=5000, batch_size=16, lr=1e-3, clip=0.0)),
    # a few thousand pictures with smooth surfaces and small features, 640 codes each, with all of the paper's losses
    "emoji128": (
        dq.VAEConfig(size=128, codebook_size=512, attention_from=8),
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

    Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", 2018,
    version 0.1: features behind five ReLUs, each vector normalised over its channels, squared
    difference, weighted per channel, averaged over the places, summed over the five.
    """
    urls = ("https://download.pytorch.org/models/vgg16-397923af.pth",
            "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth")
    stages = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

    def __init__(self):
        super().__init__()
        layers, c, self.taps = [], 3, []                                     # numbered as in VGG16's file
        for widths in self.stages:
            for width in widths:
                layers += [nn.Conv2d(c, width, 3, padding=1), nn.ReLU()]
                c = width
            self.taps.append(len(layers) - 1)
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers[:-1])
        self.weights = nn.ParameterList(torch.zeros(1, widths[-1], 1, 1) for widths in self.stages)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None], persistent=False)
        self.requires_grad_(False)

    @classmethod
    def load(cls, files=()):
        """With the published weights, from files or, without files, from torch's cache or the internet."""
        lpips, published, weights = cls(), {}, {}
        try:
            for file in files:
                published |= torch.load(file, map_location="cpu", weights_only=True)
            if not files:
                for url, file in zip(cls.urls, ("vgg16-397923af.pth", "lpips-vgg-0.1.pth")):
                    published |= torch.hub.load_state_dict_from_url(url, map_location="cpu", file_name=file,
                                                                    weights_only=True)
            for name in lpips.state_dict():                                  # VGG16's names are ours
                theirs = re.sub(r"weights\.(\d)", r"lin\1.model.1.weight", name)
                weights[name] = published[theirs]
            lpips.load_state_dict(weights)
        except Exception as error:                                           # no network, no such file, a wrong one ...
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise dq.UserError(f"no weights for the perceptual loss ({reason}); download {' and '.join(cls.urls)} and "
                               "name both files after --perceptual-weights, or train without: "
                               "--perceptual-weight 0") from None
        return lpips

    def maps(self, x):
        """(B, 3, S, S) -> one after the other, the features at the five taps."""
        x = (x - self.shift) / self.scale
        for i, layer in enumerate(self.features):
            x = layer(x)                                                     # B, c, S/2^k, S/2^k
            if i in self.taps:
                # a vector that is zero keeps a gradient that is finite, which x / |x| would not
                yield F.normalize(x.float(), dim=1, eps=1e-10)               # B, c, S/2^k, S/2^k

    def forward(self, x, y):
        with torch.no_grad():
            maps_of_x = list(self.maps(x))
        distance = 0.0
        for importance, a, b in zip(self.weights, maps_of_x, self.maps(y)):
            distance = distance + (importance * (a - b).square()).sum(1).mean(dim=(1, 2))  # B
        return distance


class BatchNorm(nn.BatchNorm2d):
    """Over the batches of all processes (torch's SyncBatchNorm is for GPUs only)."""

    def forward(self, x):
        world = dq.processes()[1]
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

    def __init__(self, layers=3, width=64):
        super().__init__()
        blocks = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        c = width
        for i in range(1, layers + 1):
            c_out, stride = width * min(2 ** i, 8), 2 if i < layers else 1
            blocks += [nn.Conv2d(c, c_out, 4, stride, padding=1, bias=False), BatchNorm(c_out), nn.LeakyReLU(0.2)]
            c = c_out
        self.blocks = nn.Sequential(*blocks, nn.Conv2d(c, 1, 4, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1, 0.02)

    def forward(self, x):
        return self.blocks(x).float()                                        # B, 1, S/8 - 2, S/8 - 2 (three layers)


def hinge_loss(real, fake):
    """Of the discriminator: real logits above 1 and fake ones below -1 cost nothing. Any shapes -> scalar."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(y, last, pull, push, cap=0.75):
    """Weight of the adversarial loss that lets it move the decoder's last layer as much as the reconstruction loss.

    (Esser et al., "Taming Transformers", 2021, equation 7.) y: reconstruction; last: weight of the
    last convolution; pull, push: the gradients of the two losses at y. At most `cap`.
    """
    norms = []
    for gradient in (pull, push):
        at_last, = torch.autograd.grad(y, last, gradient, retain_graph=True)  # as `last`, of this process's images
        norms.append(dq.total(at_last).norm() / dq.processes()[1])
    return (norms[0] / (norms[1] + 1e-4)).clamp(max=cap)


def backward(y, last, loss, adversarial, other, gan_weight=1.0, scale=1.0):
    """Accumulate the gradients of scale * (loss + weight * adversarial + other); -> the weight, or None.

    y: reconstruction (B, 3, S, S). loss, adversarial (or None): scalars that depend on the model
    through y alone. other: a scalar of what the model computed before y (commitment, budget).
    Both gradients are added at y, so that VGG and the discriminator are walked back once each, though
    the adaptive weight needs them apart; nothing that hangs on y, such as the discriminator's weights,
    gets a gradient.
    """
    at_y, weight = torch.autograd.grad(loss, y)[0], None                     # B, 3, S, S
    if adversarial is not None:
        push, = torch.autograd.grad(adversarial, y)                          # B, 3, S, S
        weight = gan_weight * adaptive_weight(y, last, at_y, push)
        at_y = at_y + weight * push
    torch.autograd.backward([y, other], [scale * at_y, torch.full_like(other, scale)])
    return weight


def compiled(model, **how):
    """A DQVAE through torch.compile, all but its last convolution.

    `adaptive_weight` walks back to there twice, and what is compiled can be walked back once only and as a whole.
    """
    last = model.decoder.out[-1]
    last.forward = torch.compiler.disable(last.forward)
    return torch.compile(model, **how)


def gumbel_scale(step, steps):
    """1 until half of training, 0 from 90 % on: the gate explores first and then learns its argmax."""
    return min(1.0, max(0.0, (0.9 - step / steps) / 0.4))


# ------------------------------------------------------------------------------------------------
# Evaluation


def auc(score, truth):
    """Area under the ROC curve: how often a detailed region scores above a smooth one. Ties count half.

    score: any shape; truth: the same shape, bool, with both values in it.
    """
    values, inverse, counts = score.flatten().unique(return_inverse=True, return_counts=True)
    rank = (counts.cumsum(0) - (counts - 1) / 2)[inverse]                    # mean rank of each value, from 1
    truth = truth.flatten()
    n_true, n_false = truth.sum(), (~truth).sum()
    wins = rank[truth].double().sum() - n_true * (n_true + 1) / 2            # pairs that are in the right order
    return (wins / (n_true * n_false)).item()


def ssim(x, y):
    """Structural similarity of images (B, 3, S, S) in [-1, 1] -> (B,), mean over channels and places.

    Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity", 2004:
    Gaussian window of 11 pixels and deviation 1.5, constants (0.01 R)^2 and (0.03 R)^2 for range R, here 1.
    """
    side = min(11, x.shape[-1] - 1 + x.shape[-1] % 2)                        # smaller images: the largest odd window
    line = torch.exp(-0.5 * ((torch.arange(side, device=x.device) - side // 2) / 1.5) ** 2)
    window = (line[:, None] * line).div(line.sum() ** 2).expand(3, 1, side, side)

    def blur(z):
        return F.conv2d(z, window, groups=3)                                 # B, 3, S - 10, S - 10

    x, y = (x + 1) / 2, (y + 1) / 2                                          # black must be 0: means are divided
    mx, my = blur(x), blur(y)
    vx, vy, covariance = blur(x * x) - mx ** 2, blur(y * y) - my ** 2, blur(x * y) - mx * my
    c1, c2 = 0.01 ** 2, 0.03 ** 2
    means = (2 * mx * my + c1) / (mx ** 2 + my ** 2 + c1)                    # B, 3, S - 10, S - 10
    structure = (2 * covariance + c2) / (vx + vy + c2)                       # B, 3, S - 10, S - 10
    return (means * structure).mean(dim=(1, 2, 3))


@torch.no_grad()
def evaluate(model, images, detailed, autocast, perceptual=None, batch_size=64):
    """Held-out images (M, 3, S, S) -> figures, reconstructions (M, 3, S, S), grains (M, h, w).

    detailed: (M, h, w), bool, where detail is, or None.
    """
    config = model.config
    model.eval()
    parts = dict(y=[], codes=[], grains=[], score=[], ssim=[], lpips=[])
    for x in images.split(batch_size):
        with autocast():
            out = model(x)
            y = out.reconstruction.float().clamp(-1, 1)                      # B, 3, S, S
            parts["score"].append(model.router.score(x, out.maps).float())   # B, h, w
            if perceptual:
                parts["lpips"].append(perceptual(x, y))                      # B
        parts["y"].append(y)
        parts["codes"].append(out.codes)                                     # B, H, W
        parts["grains"].append(out.grains)                                   # B, h, w
        parts["ssim"].append(ssim(y, x))                                     # B
    model.train()
    whole = {name: torch.cat(tensors) for name, tensors in parts.items() if tensors}
    y, codes, grains = whole["y"], whole["codes"], whole["grains"]

    cells = torch.tensor([(config.factors[0] // f) ** 2 for f in config.factors], device=grains.device)  # K
    K = len(cells)
    share = [(grains == k).float().mean().item() for k in range(K)]
    fine = (grains == K - 1).float().mean(dim=(1, 2))                        # M
    n_codes = cells[grains].sum(dim=(1, 2)).float().mean().item()
    # what sending an image takes: its codes, and for each region which granularity it has
    bits = n_codes * math.log2(config.codebook_size) + grains[0].numel() * math.log2(K)
    # every code counts once: a cell of the finest grid is 1 / (cells that share its code)
    weight = dq.upsample((cells[grains] / cells[-1])[:, None], codes.shape[-1])[:, 0]  # M, H, W
    use = torch.zeros(config.codebook_size, device=codes.device)             # V
    use.index_add_(0, codes.flatten(), weight.flatten())
    p = use / use.sum()                                                      # V
    error = y - images                                                       # M, 3, S, S
    figures = dict(
        psnr=(10 * torch.log10(4 / error.square().mean(dim=(1, 2, 3)))).mean().item(),
        ssim=whole["ssim"].mean().item(),
        l1=error.abs().mean().item(),
        l2=error.square().mean().item(),
        codes_per_image=n_codes,
        bits_per_pixel=bits / config.size ** 2,
        share=[round(s, 4) for s in share],
        fine_min=fine.min().item(),
        fine_mean=fine.mean().item(),
        fine_max=fine.max().item(),
        perplexity=torch.exp(-(p * (p + 1e-12).log()).sum()).item(),
        codebook_used=(use > 0).float().mean().item())
    if detailed is not None and K > 1 and 0 < detailed.sum() < detailed.numel():
        figures |= dict(auc=auc(whole["score"], detailed), auc_argmax=auc(grains, detailed))
    if perceptual:
        figures["lpips"] = whole["lpips"].mean().item()
    return figures, y, grains


def show(path, images, reconstructions, grains, factors):
    """A picture of up to 8 triples: original, reconstruction, codes."""
    tiles = []
    for x, y, g in zip(images[:8], reconstructions, grains):
        tiles += [to_picture(x), to_picture(y), draw_grains(x, g, factors)]
    save_grid(path, tiles, columns=6)


# ------------------------------------------------------------------------------------------------
# The authors' weights


# A name of ours becomes the authors' by these, one after the other. <k> stands for their name of granularity k. What a
# table can't do, `their_name` does first: it counts levels as they count, and has blocks and attention apart.
AUTHORS_NAMES = (
    (r"^(en|de)coder\.stem", r"\1coder.conv_in"),
    (r"^encoder\.levels", "encoder.down"),
    (r"^encoder\.downs\.(\d)", r"encoder.down.\1.downsample.conv"),
    (r"^encoder\.heads\.(\d)\.3", r"encoder.norm_out_<\1>"),
    (r"^encoder\.heads\.(\d)\.5", r"encoder.conv_out_<\1>"),
    (r"^encoder\.heads\.(\d)", r"encoder.mid_<\1>"),
    (r"^router\.norms\.(\d)", r"encoder.router.feature_norm_<\1>"),
    (r"^router\.mlp", "encoder.router.gate"),
    (r"^pre_quant", "quant_conv"),
    (r"^codebook\.codes", "quantize.codebook.weight"),
    (r"^codebook\.uses", "quantize.codebook.cluster_size_ema"),
    (r"^codebook\.sums", "quantize.codebook.embed_ema"),
    (r"^post_quant", "post_quant_conv"),
    (r"^decoder\.position\.fourier", "decoder.position_bias_fourier.lff.ffm.conv"),
    (r"^decoder\.position\.rows", "decoder.position_bias_learned.row_embed.weight"),
    (r"^decoder\.position\.columns", "decoder.position_bias_learned.col_embed.weight"),
    (r"^decoder\.levels", "decoder.up"),
    (r"^decoder\.ups\.(\d)", r"decoder.up.\1.upsample.conv"),
    (r"^decoder\.out\.0", "decoder.norm_out"),
    (r"^decoder\.out\.2", "decoder.conv_out"),
    (r"\.(mid[^.]*)\.0", r".\1.block_1"),
    (r"\.(mid[^.]*)\.1", r".\1.attn_1"),
    (r"\.(mid[^.]*)\.2", r".\1.block_2"),
    (r"\.shortcut", ".nin_shortcut"),
    (r"\.proj", ".proj_out"),
)


def their_name(name, config):
    """Our name of a weight -> the authors'. Of their q, k and v, one of ours, it is a name with "qkv" in it."""
    def turn(match):                                                         # theirs count from the finest level
        return f"{match[1]}.{int(math.log2(config.factors[-1])) - int(match[2])}"

    def part(match):                                                         # ours alternate in one list; theirs: two
        level, i = int(match[2]), int(match[3])
        kinds = ("block", "attn") if 2 ** level >= config.attention_from else ("block",)
        return f"{match[1]}.{level}.{kinds[i % len(kinds)]}.{i // len(kinds)}"

    name = re.sub(r"^(decoder\.levels|decoder\.ups)\.(\d)", turn, name)
    name = re.sub(r"^(encoder\.levels|decoder\.levels)\.(\d)\.(\d+)", part, name)
    for ours, theirs in AUTHORS_NAMES:
        name = re.sub(ours, theirs, name)
    granularities = ("coarse", "fine") if len(config.factors) == 2 else ("coarse", "median", "fine")
    return re.sub(r"<(\d)>", lambda match: granularities[int(match[1])], name)


def authors_config(theirs):
    """What names and shapes tell, and, of the budgets, what the released models have."""
    def count(pattern):
        return sum(bool(re.fullmatch(pattern, name)) for name in theirs)

    width, levels = len(theirs["encoder.conv_in.weight"]), count(r"encoder\.down\.\d\.block\.0\.conv1\.weight")
    K = 3 if "encoder.conv_out_median.weight" in theirs else 2
    factors = [2 ** (levels - 1 - k) for k in range(K)]
    attention = [2 ** i for i in range(levels) if f"encoder.down.{i}.attn.0.norm.weight" in theirs]
    return dq.VAEConfig(
        size=len(theirs["decoder.position_bias_learned.row_embed.weight"]) * factors[-1],
        factors=factors,
        ratios=(0.5, 0.5) if K == 2 else (0.4, 0.3, 0.3),
        router="learned" if "encoder.router.gate.0.weight" in theirs else "entropy",
        codebook_size=len(theirs["quantize.codebook.weight"]) - 1,
        code_dim=len(theirs["quant_conv.weight"]),
        channels=len(theirs["encoder.conv_out_fine.weight"]),
        width=width,
        multipliers=[len(theirs[f"encoder.down.{i}.block.0.conv1.weight"]) // width for i in range(levels)],
        encoder_blocks=count(r"encoder\.down\.0\.block\.\d+\.conv1\.weight"),
        decoder_blocks=count(r"decoder\.up\.0\.block\.\d+\.conv1\.weight"),
        attention_from=min(attention, default=2 ** levels))


def authors_weights(theirs, config):
    """Their state dict -> ours. KeyError with the name of a weight that is not there."""
    ours, used = {}, set()
    with torch.device("meta"):
        names = list(dq.DQVAE(config).state_dict())
    for name in names:
        if name == "codebook.age":
            ours[name] = torch.tensor(1e6)                                   # many
        elif name == "router.thresholds":
            dq.require(len(config.factors) == 2, "the authors' entropy router has two granularities, not three")
            ours[name] = torch.tensor([1.6778])                              # nats, of half of ImageNet's regions
        else:
            source = their_name(name, config)
            sources = [source.replace("qkv", each) for each in "qkv"] if "qkv" in source else [source]
            ours[name] = torch.cat([theirs[each] for each in sources])
            used.update(sources)
    ours["codebook.codes"] = ours["codebook.codes"][:-1]                     # their last row is padding
    layers = [name for name in theirs if ".block." in name or ".attn." in name]
    dq.require(used.issuperset(layers), "their model has blocks or attention where ours, inferred from it, has none")
    return ours


def read_authors(path):
    """A checkpoint of the authors' stage-1 model -> VAEConfig, our state dict."""
    dq.require(os.path.isfile(path), f"no such file: {path}")

    class Inert:
        """Stands for whatever class a trainer left in the file."""
        def __init__(self, *args, **kwargs):
            pass

        def __setstate__(self, state):
            pass

    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(Inert, name) for name in unknown]):
            theirs = torch.load(path, map_location="cpu", weights_only=True)  # runs no code of the file's
        theirs = theirs.get("state_dict", theirs)
        theirs = {name: tensor.float() for name, tensor in theirs.items() if torch.is_tensor(tensor)}
        config = authors_config(theirs)
        return config, authors_weights(theirs, config)
    except dq.UserError:
        raise
    except KeyError as error:
        raise dq.UserError(f"{path} is not a checkpoint of the authors' stage-1 model: "
                           f"it has no {error.args[0]}") from None
    except Exception as error:
        raise dq.UserError(f"{path} is not a checkpoint, or is damaged ({type(error).__name__})") from None


def import_authors(args, device, autocast):
    """--import-authors: write vae.pt from the authors' checkpoint, say what it is, and evaluate it on --data."""
    config, weights = read_authors(args.import_authors)
    model = dq.rebuild(dq.DQVAE, dq.VAEConfig, asdict(config), weights, device)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{args.import_authors}: {config.size} x {config.size} pixels, factors {config.factors}, {config.router} "
          f"router, {config.codebook_size} codes of {config.code_dim} dimensions, {millions:.1f} M parameters")
    path = args.out / "vae.pt"
    dq.require(not path.exists(), f"{path} exists; choose another folder with --out")
    dq.save_checkpoint(path, "dq-vae", config, model)
    print(f"wrote {path}")
    if args.data:
        _, held_out = open_data(args.data, config.size, skip=args.out)
        images, detailed = held_out_images(held_out, config, device)
        figures, y, grains = evaluate(model, images, detailed, autocast, batch_size=8)
        told = ", ".join(f"{name} {value}" for name, value in readable(figures).items())
        print(f"{len(images)} held-out images: {told}")
        show(path.with_suffix(".png"), images, y, grains, config.factors)
        print(f"wrote {path.with_suffix('.png')}")


# ------------------------------------------------------------------------------------------------
# Training


def parse(argv=None):
    """-> the flags, config, schedule"""
    parser, config, schedule = common_flags("Train a DQ-VAE: images to variable-length codes and back.", PRESETS, argv)
    add = parser.add_argument
    add("--size", type=positive, default=config.size, help="side of the images, pixels")
    add("--factors", type=positive, nargs="+", default=config.factors,
        help="downsampling factors, coarse to fine; one: fixed length")
    add("--ratios", type=weight, nargs="+", help="share of regions per factor; None: the preset's, or equal shares")
    add("--router", choices=["learned", "entropy", "random"], default=config.router, help="what picks granularities")
    add("--codebook-size", type=positive, default=config.codebook_size, help="number of codes")
    add("--code-dim", type=positive, default=config.code_dim, help="dimension of a code")
    add("--budget-weight", type=weight, default=schedule.budget_weight, help="weight of the budget loss")
    add("--perceptual-weight", type=weight, default=schedule.perceptual_weight, help="weight of LPIPS; 0: without")
    add("--perceptual-weights", metavar="FILE", nargs="+", default=[],
        help="files with the weights of VGG16 and LPIPS; none: torch's cache, or download")
    add("--gan-weight", type=weight, default=schedule.gan_weight,
        help="weight of the adversarial loss, times the adaptive weight; 0: without")
    add("--gan-start", metavar="STEP", type=natural, default=schedule.gan_start,
        help="step from which the discriminator takes part")
    add("--import-authors", metavar="FILE",
        help="instead of training, turn the authors' stage-1 checkpoint into vae.pt; with --data, evaluate it")
    args = parser.parse_args(argv)
    if args.ratios is None:
        K = len(args.factors)
        args.ratios = config.ratios if K == len(config.factors) else [1 / K] * K
    return args, override(config, args), override(schedule, args)


def held_out_images(data, config, device):
    """Up to 512 held-out images (M, 3, S, S) and, of the toy data only, where detail is: (M, h, w), bool."""
    shown = range(min(len(data), 512))
    images = [x for x, label in map(Once(data).__getitem__, shown) if label != BROKEN]
    dq.require(images, f"none of {len(shown)} held-out images can be decoded")
    images = torch.stack(images).to(device)                                  # M, 3, S, S
    if not isinstance(data, ToyShapes):
        return images, None
    masks = torch.stack([data.detail_mask(i) for i in shown]).float()        # M, S, S
    return images, F.avg_pool2d(masks, config.factors[0]).to(device) > 0.1


def calibrate(router, ratios, images):
    """Set the thresholds of an EntropyRouter from an iterable of training batches (B, 3, S, S).

    They are quantiles of the regions' entropies. Where many regions tie (blank surroundings), the ties go to the
    coarser side.
    """
    scores = torch.cat([router.score(x).flatten() for x in images])
    cuts = np.cumsum(ratios)[:-1].clip(0, 1)                                 # K - 1
    router.thresholds.copy_(torch.from_numpy(np.quantile(scores.cpu().double().numpy(), cuts)))


def main(argv=None):
    args, config, schedule = parse(argv)
    device, autocast = prepare(args)
    rank, world = dq.processes()
    if args.import_authors:
        return import_authors(args, device, autocast)
    dq.require(schedule.gan_weight == 0 or config.size >= 24,
               f"the discriminator needs at least 24 x 24 pixels, not {config.size}; --gan-weight 0 trains without")
    dq.require(schedule.perceptual_weight == 0 or config.size >= 16,
               f"LPIPS needs at least 16 x 16 pixels, not {config.size}; --perceptual-weight 0 trains without")
    train, held_out = open_data(args.data, config.size, augment=True, seed=args.seed, skip=args.out)
    say(describe(train, held_out))
    images, detailed = held_out_images(held_out, config, device)
    perceptual = Perceptual.load(args.perceptual_weights).to(device) if schedule.perceptual_weight else None

    torch.manual_seed(args.seed)
    # GPUs convolve faster with channels last; on CPUs group norm is many times slower that way
    on_gpu = device.type == "cuda"
    memory_format = torch.channels_last if on_gpu else torch.contiguous_format
    model = dq.DQVAE(config).to(device, memory_format=memory_format)
    if config.router == "entropy":
        sample = stream(train, schedule.batch_size, args.seed, part=(0, 1))
        n = max(1, 2048 // schedule.batch_size)
        calibrate(model.router, config.ratios, (next(sample)[0].to(device) for _ in range(n)))
    optimizer = torch.optim.Adam(model.parameters(), lr=schedule.lr, betas=schedule.betas, fused=on_gpu)
    parts, optimizers = dict(optimizer=optimizer), [optimizer]
    if schedule.gan_weight:
        critic = Discriminator().to(device, memory_format=memory_format)
        critic_optimizer = torch.optim.Adam(critic.parameters(), lr=schedule.lr, betas=schedule.betas, fused=on_gpu)
        parts |= dict(critic=critic, critic_optimizer=critic_optimizer)
        optimizers.append(critic_optimizer)
        judge = distribute(critic)
    checkpoint = Checkpoint(
        args.out / "vae.pt", config, dict(data=identity(train), seed=args.seed) | asdict(schedule), model, parts,
        extra={}, device=device)
    if args.resume:
        checkpoint.resume(args)
        if checkpoint.step >= schedule.steps:
            return say(f"nothing left to do: {checkpoint.path} is at step {checkpoint.step}")
    batches = stream(train, schedule.batch_size, args.seed, checkpoint.step, args.workers)
    forward = distribute(compiled(model) if args.compile else model)
    last_weight = model.decoder.out[-1].weight
    losses = Losses()

    if not args.resume:
        checkpoint.keep_former()
    log = Log(args.out / "vae.jsonl", "DQ-VAE", checkpoint.step, schedule.steps)
    model.train()
    with Stop(device) as stop:
        for step in log.bar:
            done = step + 1
            batch = next(batches)[0].to(device, memory_format=memory_format, non_blocking=True)  # B, 3, S, S
            adversarial_on = schedule.gan_weight > 0 and step >= schedule.gan_start
            for each in optimizers:
                each.zero_grad(set_to_none=True)
                for group in each.param_groups:
                    group["lr"] = learning_rate(step, schedule)
            for x in batch.chunk(schedule.accumulate):
                with autocast():
                    out = forward(x, gumbel_scale(step, schedule.steps))
                y = out.reconstruction.float()                               # B / parts, 3, S, S
                l1, l2 = (y - x).abs().mean(), (y - x).square().mean()
                budget = dq.budget_loss(out.gate, config.ratios)
                of_y = l1 + schedule.l2_weight * l2                          # the losses that depend on y alone
                of_codes = out.commitment + schedule.budget_weight * budget
                terms, gan = dict(l1=l1, budget=budget, commitment=out.commitment), None
                if perceptual:
                    with autocast():
                        terms["lpips"] = perceptual(x, y).mean()
                    of_y = of_y + schedule.perceptual_weight * terms["lpips"]
                if adversarial_on:
                    with autocast():
                        gan = -critic(y).mean()
                scale = 1 / schedule.accumulate
                gan_weight = backward(y, last_weight, of_y, gan, of_codes, schedule.gan_weight, scale)
                if adversarial_on:                                           # the same y, seen from the other side
                    with autocast():
                        critic_loss = hinge_loss(judge(x), judge(y.detach()))
                    (scale * critic_loss).backward()
                    terms |= dict(gan=gan, gan_weight=gan_weight, critic=critic_loss)
                losses.add(done, dict(loss=of_y + of_codes) | terms, scale)
            if schedule.clip:
                nn.utils.clip_grad_norm_(model.parameters(), schedule.clip)
            optimizer.step()
            if adversarial_on:
                critic_optimizer.step()

            last, stopped = done == schedule.steps, stop.asked(done)
            evaluates = done % schedule.eval_every == 0 or last
            saves = done % args.save_every == 0 or last or stopped
            if done % 10 == 0 or evaluates or saves:                         # no figure and no file of a broken state
                newest = losses.read(checkpoint.last_good())
            if done % 10 == 0:
                log.write(done, newest)
            if evaluates and rank == 0:
                with torch.random.fork_rng([device] if on_gpu else []):      # how often it is done changes nothing
                    figures, y, grains = evaluate(model, images, detailed, autocast, perceptual)
                figures["loss"] = (figures["l1"] + schedule.l2_weight * figures["l2"]
                                   + schedule.perceptual_weight * figures.get("lpips", 0.0))
                show(args.out / "vae.png", images, y, grains, config.factors)
                log.write(done, figures, stays=True)
                checkpoint.save_best(done, figures["loss"])
            if saves:
                checkpoint.save(done)
            if stopped and not last:
                log.bar.close()
                stop.leave(stopped, done, checkpoint.path)
    say(f"wrote {checkpoint.path}, {args.out / 'vae.png'} and {log.path}")


if __name__ == "__main__":
    run(main)
