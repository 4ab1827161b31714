"""Dynamic vector quantization: images as variable-length codes, and a transformer that writes them.

After Huang, Mao, Chen, Zhang, "Towards Accurate Image Coding: Improved Autoregressive Image
Generation with Dynamic Vector Quantization", CVPR 2023 (arXiv 2305.11718).

The file reads in the order in which data flows:
    1  configuration and presets      what can be chosen, and the choices that work
    2  dynamic grained coding         routers pick a granularity for every region; the budget loss
    3  codebook                       one for all granularities, learned by moving averages
    4  encoder, decoder, DQVAE        image -> codes and grains -> image
    5  sequences                      Layout: codes and grains <-> (position, content) pairs
    6  DQ-Transformer                 a position stack and, on top of it, a content stack
    7  sampling                       one step over explicit state, and the loop around it
    8  files                          images in, pictures and checkpoints out

Symbols, the same everywhere:
    B batch   K granularities, k = 0 the coarsest   N regions = cells of the coarsest grid, h x w
    s_k codes that a region of granularity k has (1, 4, 16)   H x W the finest grid   S image side
    Z encoder channels   D code dimension   V codebook size
    P position ids   L sequence length   C transformer width
    grains (B, h, w): the granularity of every region
    codes  (B, H, W): codebook ids on the finest grid, a coarse code repeated over its region
"""
import functools
import math
import os
import sys
import warnings
import zipfile
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps


# ------------------------------------------------------------------------------------------------
# 1  Configuration and presets


@dataclass
class VAEConfig:
    """Everything that fixes the architecture of a DQVAE (stage 1)."""
    size: int = 32                       # side of the square images, pixels
    factors: tuple = (8, 4)              # downsampling factor of each granularity, coarse to fine
    ratios: tuple = (0.5, 0.5)           # wanted share of the regions in each granularity
    router: str = "learned"              # learned | entropy | random
    codebook_size: int = 256             # V
    code_dim: int = 8                    # D
    channels: int = 64                   # Z, channels of the encoder's maps and the decoder's input
    width: int = 32                      # channels at full resolution ...
    multipliers: tuple = (1, 1, 2)       # ... times this at factor 1, 2, 4, ...; the last one repeats
    encoder_blocks: int = 1              # residual blocks a level
    decoder_blocks: int = 1
    attention_from: int = 4              # attention in the trunk at this factor and above; heads always have it

    def __post_init__(self):
        self.factors, self.ratios = tuple(self.factors), tuple(self.ratios)
        self.multipliers = tuple(self.multipliers)
        check_factors(self.size, self.factors)
        require(len(self.ratios) == len(self.factors),
                f"{len(self.factors)} factors need {len(self.factors)} ratios, coarse to fine, not {self.ratios}")
        require(min(self.ratios) >= 0 and abs(sum(self.ratios) - 1) < 1e-6, f"ratios must be shares that sum to 1, not {self.ratios}")
        require(self.router in ("learned", "entropy", "random"), f"router must be learned, entropy or random, not {self.router!r}")
        for name in ("codebook_size", "code_dim", "channels", "width", "encoder_blocks", "decoder_blocks"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("channels", "width"):
            require(getattr(self, name) % 32 == 0, f"{name} must be a multiple of 32, for GroupNorm's 32 groups, not {getattr(self, name)}")

    def level_width(self, level):
        """Channels at downsampling factor 2**level."""
        return self.width * self.multipliers[min(level, len(self.multipliers) - 1)]


def check_factors(size, factors):
    """ValueError unless factors are powers of two, coarse to fine, and fit an image of this size."""
    require(factors and all(f >= 1 and f & (f - 1) == 0 for f in factors), f"factors must be powers of two, not {factors}")
    require(all(a > b for a, b in zip(factors, factors[1:])), f"factors must fall from coarse to fine, not {factors}")
    require(size >= 1 and size % factors[0] == 0, f"image size {size} is not a multiple of the largest factor {factors[0]}")


class UserError(ValueError):
    """Something that the user can mend; the message is one clear line."""


def require(condition, message):
    if not condition:
        raise UserError(message)


@dataclass
class TransformerConfig:
    """Everything that fixes the architecture of a DQTransformer (stage 2)."""
    size: int = 32                       # these three come from the DQ-VAE whose codes are modelled
    factors: tuple = (8, 4)
    codebook_size: int = 256
    classes: tuple = ()                  # names of the labels; none: unconditional
    width: int = 192                     # C
    heads: int = 6
    position_layers: int = 2
    content_layers: int = 4
    dropout: float = 0.0
    label_dropout: float = 0.1           # share of training images whose label is hidden, for guidance

    def __post_init__(self):
        self.factors, self.classes = tuple(self.factors), tuple(self.classes)
        check_factors(self.size, self.factors)
        require(self.heads >= 1 and self.width % self.heads == 0,
                f"width {self.width} is not a multiple of the number of heads, {self.heads}")
        for name in ("codebook_size", "width", "position_layers", "content_layers"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("dropout", "label_dropout"):
            require(0 <= getattr(self, name) < 1, f"{name} must be at least 0 and below 1, not {getattr(self, name)}")


@dataclass
class TrainConfig:
    """How a stage is trained: Adam(W), linear warm-up, then cosine to zero."""
    steps: int
    batch_size: int
    lr: float
    betas: tuple = (0.9, 0.99)
    weight_decay: float = 0.0            # stage 2
    warmup: int = 100                    # steps
    eval_every: int = 250                # steps
    accumulate: int = 1                  # parts in which a batch is worked on; in stage 2 each is as wide as it needs
    clip: float = 1.0                    # largest norm of the gradient; 0: no limit
    budget_weight: float = 1.0           # stage 1 only, from here on
    l2_weight: float = 1.0               # beside the absolute error, whose weight is 1
    perceptual_weight: float = 0.0       # LPIPS
    gan_weight: float = 0.0              # adversarial loss, times its adaptive weight
    gan_start: int = 0                   # step from which the discriminator takes part


@dataclass
class Preset:
    vae: VAEConfig
    transformer: TransformerConfig       # size, factors, codebook and classes are taken from the data
    train_vae: TrainConfig
    train_transformer: TrainConfig


# The paper's models (section 4 and the released settings); the learning rate is 4.5e-6 per image of a batch of 120.
PAPER = dict(size=256, codebook_size=1024, code_dim=256, channels=256, width=128, encoder_blocks=2, decoder_blocks=3, attention_from=8)
DUAL = VAEConfig(**PAPER, factors=(16, 8), ratios=(0.5, 0.5), multipliers=(1, 1, 2, 2, 4))
TRIPLE = VAEConfig(**PAPER, factors=(32, 16, 8), ratios=(0.4, 0.3, 0.3), multipliers=(1, 1, 2, 2, 4, 4))
LARGE = TransformerConfig(size=256, factors=(16, 8), codebook_size=1024, width=1024, heads=8, position_layers=6, content_layers=18, dropout=0.1)
FFHQ_STEPS, IMAGENET_STEPS = 27_700, 507_000                                 # 50 epochs of 66,500 and of 1,217,000 images
STAGE1 = TrainConfig(steps=IMAGENET_STEPS, batch_size=120, accumulate=4, lr=5.4e-4, betas=(0.5, 0.9), warmup=1000, eval_every=5000, clip=0.0,
                     budget_weight=10.0, l2_weight=0.0, perceptual_weight=1.0, gan_weight=1.0)
STAGE2 = TrainConfig(steps=IMAGENET_STEPS, batch_size=240, accumulate=4, lr=5e-4, betas=(0.9, 0.95), weight_decay=0.01, warmup=1000, eval_every=5000)

PRESETS = {
    # minutes on two CPU cores: what the README's first command runs
    "toy": Preset(
        VAEConfig(), TransformerConfig(),
        TrainConfig(steps=1000, batch_size=32, lr=2e-3, clip=0.0),
        TrainConfig(steps=1200, batch_size=32, lr=1.5e-3, weight_decay=0.05, accumulate=2)),
    # the same data at 64 x 64, 160 codes an image: stage 1 takes 50 minutes on two cores, stage 2 wants a GPU
    "toy64": Preset(
        VAEConfig(size=64, codebook_size=512),
        TransformerConfig(size=64, codebook_size=512, width=256, heads=8, content_layers=6),
        TrainConfig(steps=4000, batch_size=32, lr=2e-3, clip=0.0),
        TrainConfig(steps=6000, batch_size=64, lr=1e-3, weight_decay=0.05)),
    # a few thousand pictures with smooth surfaces and small features, 640 codes each, with all of the paper's losses
    "emoji128": Preset(
        VAEConfig(size=128, codebook_size=512, attention_from=8),
        TransformerConfig(size=128, codebook_size=512, width=384, heads=6, position_layers=3, content_layers=9, dropout=0.1),
        TrainConfig(steps=4000, batch_size=8, lr=1e-3, clip=0.0, perceptual_weight=1.0, gan_weight=0.5, gan_start=2000),
        TrainConfig(steps=20_000, batch_size=64, lr=5e-4, betas=(0.9, 0.95), weight_decay=0.05, eval_every=1000)),
    # the paper's
    "ffhq256": Preset(
        DUAL, LARGE, replace(STAGE1, steps=FFHQ_STEPS, eval_every=1000), replace(STAGE2, steps=FFHQ_STEPS, eval_every=1000)),
    "imagenet256": Preset(DUAL, LARGE, STAGE1, STAGE2),
    "imagenet256-triple": Preset(TRIPLE, replace(LARGE, factors=TRIPLE.factors), replace(STAGE1, budget_weight=1.0), STAGE2),
}


# ------------------------------------------------------------------------------------------------
# 2  Dynamic grained coding (the paper's stage 1: "Dynamic Grained Coding" and "budget loss")
#
# Every router has  score(x, maps) -> (B, h, w), higher where finer codes are wanted (what evaluation
# compares with the truth), and  forward(x, maps, noise) -> gate (B, K, h, w), one-hot over K.
#
# Under torchrun each of n processes works on its part of a global batch, and all of them draw the same
# random numbers, for the global batch. So what they compute together is what one process computes.


def processes():
    """-> number of this process, how many there are: 0, 1 without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def total(x):
    """Sum of a tensor over the processes, without a gradient."""
    if processes()[1] > 1:
        x = x.detach().clone()
        dist.all_reduce(x)
    return x


def own_part(x):
    """Of a tensor for the global batch, what belongs to the images of this process."""
    rank, world = processes()
    return x.chunk(world)[rank]


class GrainRouter(nn.Module):
    """The paper's learned gate: normalise each map, pool to the regions, and let an MLP choose."""

    def __init__(self, channels, n_grains):
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(32, channels, eps=1e-6) for _ in range(n_grains))
        width = channels * n_grains
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, n_grains))

    def logits(self, maps):
        """maps: K tensors (B, Z, H_k, W_k), coarse to fine -> (B, K, h, w)."""
        regions = maps[0].shape[-2:]
        pooled = [F.adaptive_avg_pool2d(norm(m), regions) for norm, m in zip(self.norms, maps)]  # K x (B, Z, h, w)
        x = torch.cat(pooled, dim=1).permute(0, 2, 3, 1)                     # B, h, w, K Z
        return self.mlp(x).permute(0, 3, 1, 2).float()                       # B, K, h, w

    def score(self, x, maps):
        p = self.logits(maps).softmax(dim=1)                                 # B, K, h, w
        return sum(k * p[:, k] for k in range(p.shape[1]))                   # B, h, w: the expected granularity

    def forward(self, x, maps, noise=1.0):
        """In training a sample (hard Gumbel-softmax, its noise scaled by `noise`), else the argmax.

        What the gate needs in order to learn. Its output multiplies the maps (DQVAE.mix), so
        d loss / d gate_k says how the reconstruction would change if the region moved towards
        granularity k; the softmax hands that on to the logits, since forward is one-hot but
        backward sees `soft` (straight-through). For this to teach anything:
        * both sides of the choice must be tried: the Gumbel noise is what samples them;
        * the gate must reach the reconstruction with its own sign, so the one-hot must multiply
          the maps and nothing may detach it on the way;
        * the budget loss, which knows nothing of the image, must not drown that signal: it pulls
          on all regions alike, and a weight that is too high leaves a gate at the right ratio
          that chooses by chance;
        * the noise must fade before training ends. With full noise the *sampled* ratio can meet
          the budget while the *argmax*, the one that evaluation uses, is far from it.
        """
        logits = self.logits(maps)                                           # B, K, h, w
        if not self.training:
            return one_hot(logits.argmax(dim=1), logits.shape[1])
        exponential = torch.empty(processes()[1] * len(logits), *logits.shape[1:], device=logits.device).exponential_()
        gumbel = -own_part(exponential).log()                                # B, K, h, w
        soft = (logits + noise * gumbel).softmax(dim=1)
        hard = one_hot(soft.argmax(dim=1), logits.shape[1])
        return hard + (soft - soft.detach())                                 # B, K, h, w: exactly one-hot


class RandomRouter(nn.Module):
    """Granularities drawn blindly at the wanted ratios: the control for every claim about routing."""

    def __init__(self, ratios):
        super().__init__()
        self.register_buffer("thresholds", torch.tensor(ratios).cumsum(0)[:-1])  # K - 1

    def score(self, x, maps):
        return own_part(torch.rand(processes()[1] * len(x), *maps[0].shape[-2:], device=x.device))  # B, h, w

    def forward(self, x, maps, noise=1.0):
        grains = torch.bucketize(self.score(x, maps), self.thresholds)       # B, h, w
        return one_hot(grains, len(self.thresholds) + 1)                     # B, K, h, w


class EntropyRouter(nn.Module):
    """Shannon entropy of the grey levels of each region, cut at quantiles of the training images."""

    def __init__(self, ratios, factor):
        super().__init__()
        self.ratios, self.factor = ratios, factor
        self.register_buffer("thresholds", torch.zeros(len(ratios) - 1))     # K - 1, in nats

    def score(self, x, maps=None):
        """x: (B, 3, S, S) in [-1, 1] -> entropy of each region in nats, (B, h, w).

        The histogram has 32 bins, each a Gaussian of deviation 0.01 around its centre.
        """
        rgb = torch.tensor([0.2989, 0.5870, 0.1140], device=x.device)
        grey = (x.float() * rgb[:, None, None]).sum(1, keepdim=True)         # B, 1, S, S
        pixels = F.unfold(grey, self.factor, stride=self.factor)             # B, F F, N
        bins = torch.linspace(-1, 1, 32, device=x.device)
        hist = torch.stack([torch.exp(-0.5 * ((pixels - b) / 0.01) ** 2).mean(1) for b in bins], -1)  # B, N, 32
        p = hist / (hist.sum(-1, keepdim=True) + 1e-10)
        entropy = -(p * (p + 1e-10).log()).sum(-1)                           # B, N
        return entropy.view(-1, x.shape[2] // self.factor, x.shape[3] // self.factor)

    def calibrate(self, images):
        """Set the thresholds from an iterable of training batches (B, 3, S, S).

        Where many regions tie (blank surroundings), the ties go to the coarser side.
        """
        scores = torch.cat([self.score(x).flatten() for x in images])
        cuts = torch.tensor(self.ratios, dtype=torch.float64).cumsum(0)[:-1].clamp(0, 1)
        self.thresholds.copy_(torch.from_numpy(np.quantile(scores.cpu().double().numpy(), cuts.numpy())))

    def forward(self, x, maps, noise=1.0):
        grains = torch.bucketize(self.score(x), self.thresholds)             # B, h, w
        return one_hot(grains, len(self.thresholds) + 1)                     # B, K, h, w


def one_hot(grains, n):
    """(B, h, w) -> (B, n, h, w), float."""
    return F.one_hot(grains, n).permute(0, 3, 1, 2).float()


def budget_loss(gate, ratios):
    """How far the shares of the granularities in this batch are from the wanted ones.

    gate: (B, K, h, w), one-hot; ratios: K wanted shares. The mean runs over the whole batch: images
    may differ from each other, but not the data set from its budget. For K = 2 this times 10 is the
    2 gamma (r - r*)^2 with gamma = 10 of the authors' model.
    """
    share = gate.mean(dim=(0, 2, 3))                                         # K
    # of all processes in forward; the mean of their gradients is then that of the global batch
    share = share + (total(share) / processes()[1] - share).detach()
    return ((share - torch.tensor(ratios, device=gate.device)) ** 2).sum()


# ------------------------------------------------------------------------------------------------
# 3  Codebook


class Codebook(nn.Module):
    """Vector quantization with one codebook for all granularities, learned by moving averages.

    forward(z (B, D, H, W), weight (B, H, W)) -> quantised z (B, D, H, W), ids (B, H, W), loss.
    `weight` makes every *code* count once: a coarse code that is repeated over 4 cells gives each
    of them 1/4, in the commitment loss and in the averages.
    """

    def __init__(self, size, dim, decay=0.99, commitment=0.25, dead_below=0.1):
        super().__init__()
        self.decay, self.commitment, self.dead_below = decay, commitment, dead_below
        self.register_buffer("codes", torch.zeros(size, dim))
        self.register_buffer("uses", torch.zeros(size))                      # moving average per batch
        self.register_buffer("sums", torch.zeros(size, dim))                 # of the vectors that chose it
        self.register_buffer("age", torch.tensor(0.0))                       # batches seen

    def assign(self, z):
        """z: (M, D) -> ids of the nearest codes (M,)."""
        # |z - e|^2 without the |z|^2 that is the same for every code
        return (self.codes.square().sum(1) - 2 * z @ self.codes.t()).argmin(dim=1)

    def forward(self, z, weight):
        with torch.autocast(z.device.type, enabled=False):                   # distances need float32
            B, D, H, W = z.shape
            flat = z.float().permute(0, 2, 3, 1).reshape(-1, D)              # B H W, D
            if self.training:
                self.restart(flat.detach(), weight.reshape(-1))
            ids = self.assign(flat.detach())                                 # B H W
            if self.training:
                self.update(flat.detach(), weight.reshape(-1), ids)
            q = self.codes[ids]                                              # B H W, D
            distance = (q - flat).square().mean(1).view(B, H, W)
            loss = self.commitment * (weight * distance).mean()              # pulls z to its code
            # Straight-through: forward gives q, backward hands the gradient of q to z unchanged,
            # since the choice of the nearest code has no gradient of its own.
            q = flat + (q - flat).detach()
            return q.view(B, H, W, D).permute(0, 3, 1, 2).contiguous(), ids.view(B, H, W), loss

    @torch.no_grad()
    def update(self, z, weight, ids):
        """Each code moves to the average of the vectors that chose it: one EMA step of k-means.

        The average is short at first: a codebook that remembers a hundred batches lags behind an
        encoder that has just begun to learn, and then few codes are in use and colours come late.
        """
        self.age += 1
        decay = (self.age / (9 + self.age)).clamp(max=self.decay)
        uses = torch.zeros_like(self.uses).index_add_(0, ids, weight)        # V
        sums = torch.zeros_like(self.sums).index_add_(0, ids, weight[:, None] * z)  # V, D
        self.uses.lerp_(total(uses), 1 - decay)
        self.sums.lerp_(total(sums), 1 - decay)
        self.codes.copy_(self.sums / self.uses[:, None].clamp(min=1e-6))

    @torch.no_grad()
    def restart(self, z, weight):
        """Codes that hardly anything chooses start anew at random vectors of the batch.

        In the first batch all of them are dead: that is how the codebook is initialised.
        """
        V, M, (rank, world) = len(self.uses), len(z), processes()
        mean_uses = total(weight.sum()) / V
        dead = (self.uses < self.dead_below * mean_uses)[:, None]            # V, 1
        weights = torch.zeros(world, M, device=z.device)
        weights[rank] = weight.nan_to_num(1.0)                               # should the loss be NaN, the trainer says so
        weights = total(weights).view(-1)                                    # world x M
        chosen = torch.multinomial(weights, V, replacement=V > len(weights))  # V
        fresh = torch.where((chosen // M == rank)[:, None], z[chosen % M], 0)
        fresh = total(fresh)                                                 # V, D: each came from one process
        fresh = fresh + 0.01 * fresh.std(0, correction=0) * torch.randn_like(fresh)  # none twice: rounding would choose
        self.codes.copy_(torch.where(dead, fresh, self.codes))
        self.uses.copy_(torch.where(dead[:, 0], mean_uses, self.uses))
        self.sums.copy_(torch.where(dead, fresh * mean_uses, self.sums))

    def lookup(self, ids):
        """(B, H, W) -> (B, D, H, W)."""
        return self.codes[ids].permute(0, 3, 1, 2).contiguous()


# ------------------------------------------------------------------------------------------------
# 4  Encoder, decoder, DQVAE (the VQGAN trunk, with one head per granularity)


def norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResBlock(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = norm(c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))                                # B, c_out, H, W
        h = self.conv2(F.silu(self.norm2(h)))
        return self.shortcut(x) + h


class AttnBlock(nn.Module):
    """Single-headed attention over all positions of the map."""

    def __init__(self, c):
        super().__init__()
        self.norm, self.qkv, self.proj = norm(c), nn.Conv2d(c, 3 * c, 1), nn.Conv2d(c, c, 1)

    def forward(self, x):
        B, c, H, W = x.shape
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=-1)  # each B, H W, c
        y = F.scaled_dot_product_attention(q, k, v)                          # B, H W, c
        return x + self.proj(y.transpose(1, 2).reshape(B, c, H, W).contiguous())


def make_level(config, level, c_in, n_blocks):
    """The blocks at downsampling factor 2**level, with attention after each where it is due."""
    layers, c = [], config.level_width(level)
    for _ in range(n_blocks):
        layers.append(ResBlock(c_in, c))
        if 2 ** level >= config.attention_from:
            layers.append(AttnBlock(c))
        c_in = c
    return nn.Sequential(*layers)


class Encoder(nn.Module):
    """Image (B, 3, S, S) -> K maps (B, Z, S/F_k, S/F_k), coarse to fine."""

    def __init__(self, config):
        super().__init__()
        self.factors = config.factors
        n_levels = int(math.log2(config.factors[0])) + 1
        widths = [config.level_width(i) for i in range(n_levels)]
        self.stem = nn.Conv2d(3, config.width, 3, padding=1)
        self.levels = nn.ModuleList(
            make_level(config, i, widths[max(i - 1, 0)] if i else config.width, config.encoder_blocks)
            for i in range(n_levels))
        self.downs = nn.ModuleList(nn.Conv2d(c, c, 3, stride=2) for c in widths[:-1])
        self.heads = nn.ModuleList(self._head(widths[int(math.log2(f))], config.channels) for f in config.factors)

    @staticmethod
    def _head(c, channels):
        return nn.Sequential(ResBlock(c, c), AttnBlock(c), ResBlock(c, c), norm(c), nn.SiLU(),
                             nn.Conv2d(c, channels, 3, padding=1))

    def forward(self, x):
        h = self.stem(x)                                                     # B, width, S, S
        maps = {}
        for i, level in enumerate(self.levels):
            h = level(h)                                                     # B, c_i, S/2^i, S/2^i
            if 2 ** i in self.factors:
                maps[2 ** i] = self.heads[self.factors.index(2 ** i)](h)     # B, Z, S/2^i, S/2^i
            if i < len(self.downs):
                h = self.downs[i](F.pad(h, (0, 1, 0, 1)))                    # B, c_i, S/2^(i+1), S/2^(i+1)
        return [maps[f] for f in self.factors]


class PositionEmbedding(nn.Module):
    """Adds where a cell is: sines of a learned linear map of (x, y), then a row and a column vector."""

    def __init__(self, channels, side):
        super().__init__()
        self.fourier = nn.Conv2d(2, channels, 1)
        self.rows = nn.Parameter(torch.rand(side, channels))
        self.columns = nn.Parameter(torch.rand(side, channels))
        line = torch.linspace(-1, 1, side) if side > 1 else torch.zeros(1)
        y, x = torch.meshgrid(line, line, indexing="ij")
        self.register_buffer("grid", torch.stack([x, y])[None], persistent=False)  # 1, 2, H, W

    def forward(self, z):
        learned = self.rows[:, None] + self.columns[None]                    # H, W, Z
        return z + torch.sin(self.fourier(self.grid)) + learned.permute(2, 0, 1)  # B, Z, H, W


class Decoder(nn.Module):
    """Quantised grid (B, Z, H, W) -> image (B, 3, S, S). It sees codes only, never the grains."""

    def __init__(self, config):
        super().__init__()
        top = int(math.log2(config.factors[-1]))
        c = config.level_width(top)
        self.position = PositionEmbedding(config.channels, config.size // config.factors[-1])
        self.stem = nn.Conv2d(config.channels, c, 3, padding=1)
        self.mid = nn.Sequential(ResBlock(c, c), AttnBlock(c), ResBlock(c, c))
        self.levels, self.ups = nn.ModuleList(), nn.ModuleList()
        for i in range(top, -1, -1):
            self.levels.append(make_level(config, i, c, config.decoder_blocks))
            c = config.level_width(i)
            if i:
                self.ups.append(nn.Conv2d(c, c, 3, padding=1))
        self.out = nn.Sequential(norm(c), nn.SiLU(), nn.Conv2d(c, 3, 3, padding=1))

    def forward(self, z):
        h = self.mid(self.stem(self.position(z)))                            # B, c, H, W
        for i, level in enumerate(self.levels):
            h = level(h)
            if i < len(self.ups):
                h = self.ups[i](F.interpolate(h, scale_factor=2))            # twice the side
        return self.out(h)                                                   # B, 3, S, S


class VAEOutput(NamedTuple):
    reconstruction: torch.Tensor         # B, 3, S, S
    codes: torch.Tensor                  # B, H, W
    grains: torch.Tensor                 # B, h, w
    gate: torch.Tensor                   # B, K, h, w
    commitment: torch.Tensor             # scalar
    maps: list                           # the encoder's, K x (B, Z, H_k, W_k)


class DQVAE(nn.Module):
    """Images to variable-length codes and back (the paper's stage 1).

    encode(x) -> codes, grains;  decode(codes) -> x.  Images are (B, 3, S, S) in [-1, 1].
    K = 1 is the fixed-length VQGAN tokenizer.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        K = len(config.factors)
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.router = {"learned": lambda: GrainRouter(config.channels, K),
                       "entropy": lambda: EntropyRouter(config.ratios, config.factors[0]),
                       "random": lambda: RandomRouter(config.ratios)}[config.router]()
        self.pre_quant = nn.Conv2d(config.channels, config.code_dim, 1)
        self.codebook = Codebook(config.codebook_size, config.code_dim)
        self.post_quant = nn.Conv2d(config.code_dim, config.channels, 1)

    def mix(self, maps, gate):
        """sum_k gate_k map_k on the finest grid; the gradient reaches every gate. -> (B, Z, H, W)"""
        side = maps[-1].shape[-1]
        return sum(upsample(gate[:, k:k + 1], side) * upsample(m, side) for k, m in enumerate(maps))

    def cell_weight(self, gate):
        """1 / (how many cells of the finest grid share a code). -> (B, H, W)"""
        share = torch.tensor([(self.config.factors[-1] / f) ** 2 for f in self.config.factors], device=gate.device)
        weight = (gate.detach() * share[:, None, None]).sum(1, keepdim=True)  # B, 1, h, w
        return upsample(weight, self.config.size // self.config.factors[-1])[:, 0]

    def quantize(self, x, noise=1.0):
        """Image -> quantised grid (B, D, H, W), codes, gate, commitment loss, the encoder's maps."""
        maps = self.encoder(x)
        gate = self.router(x, maps, noise)                                   # B, K, h, w
        z = self.pre_quant(self.mix(maps, gate))                             # B, D, H, W
        q, codes, commitment = self.codebook(z, self.cell_weight(gate))
        return q, codes, gate, commitment, maps

    def forward(self, x, noise=1.0):
        """noise: scale of the router's Gumbel noise in training."""
        q, codes, gate, commitment, maps = self.quantize(x, noise)
        reconstruction = self.decoder(self.post_quant(q))                    # B, 3, S, S
        return VAEOutput(reconstruction, codes, gate.argmax(dim=1), gate, commitment, maps)

    def encode(self, x):
        _, codes, gate, *_ = self.quantize(x)
        return codes, gate.argmax(dim=1)                                     # B, H, W; B, h, w

    def decode(self, codes):
        return self.decoder(self.post_quant(self.codebook.lookup(codes)))    # B, 3, S, S


def upsample(x, side):
    """Repeat every cell of (B, c, h, h) so that the side becomes `side`, a multiple of h."""
    return F.interpolate(x, size=(side, side)) if x.shape[-1] != side else x


# ------------------------------------------------------------------------------------------------
# 5  Sequences (the paper's stage 2: coarse to fine, position and content)


class Layout(nn.Module):
    """Between (codes, grains) and the sequence of (position, content) pairs of an image.

    Granularity k owns the position ids  offset_k + r s_k + j  for region r and cell j in it, both in
    raster order, and then one EOS id; the next granularity's ids follow. So an id names
    granularity, place and order at once, and an image's sequence is its codes *sorted by id*, with
    the EOS ids in place: coarse codes first, raster inside, the cells of a region together.
    After its last EOS a sequence goes on with that EOS for ever: padding is an ordinary token
    that is certain and so costs nothing. The content of an EOS is -1.
    """

    def __init__(self, size, factors):
        super().__init__()
        check_factors(size, factors)
        self.side = size // factors[0]                                       # h
        self.fine_side = size // factors[-1]                                 # H
        self.n_regions = N = self.side ** 2
        self.cells = [(factors[0] // f) ** 2 for f in factors]               # s_k
        self.n_grains = K = len(factors)
        self.max_len = N * self.cells[-1] + K                                # all fine, and the EOS ids
        self.offsets, self.eos, P = [], [], 0
        for s in self.cells:
            self.offsets.append(P)
            self.eos.append(P + N * s)
            P += N * s + 1
        self.n_positions = P
        self.end = P - 1                                                     # the last EOS

        # What an id says, as tables. Row P (also reached as row -1) stands for "before the first pair".
        ids = torch.arange(P)
        grain, cell = torch.zeros(P + 1, dtype=torch.long), torch.zeros(P + 1, dtype=torch.long)
        region, after, forced = (torch.full((P + 1,), fill) for fill in (-1, 0, -1))
        is_eos = torch.isin(torch.arange(P + 1), torch.tensor(self.eos))
        for k, s in enumerate(self.cells):
            own = slice(self.offsets[k], self.eos[k])
            j = torch.arange(N * s)
            grain[own], region[own], cell[own], after[own] = k, j // s, j % s, k
            forced[own] = torch.where(j % s < s - 1, ids[own] + 1, -1)
            grain[self.eos[k]], after[self.eos[k]] = k, min(k + 1, K - 1)
        forced[self.end] = self.end
        # which ids may come after which, as far as regions covered by coarser codes have no say in it
        later = (cell[:P] == 0) & (region[:P] > region[:, None])             # P + 1, P
        follow = (grain[:P] == after[:, None]) & (is_eos[:P] | later)
        follow = torch.where((forced >= 0)[:, None], ids == forced[:, None], follow)
        tables = dict(grain=grain,                # its granularity
                      region=region,              # its region, -1 for EOS and the start
                      follow=follow,
                      unordered=(after < K - 1)[:, None],  # any of those, or only the first
                      is_eos=is_eos,
                      place=torch.where(region < 0, N, region)[:P],  # its region, N for EOS
                      home=region[:P].clamp(min=0),  # its region; an EOS has one that does not matter, since
                      rank=torch.where(is_eos, 0, grain)[:P],  # only codes coarser than this, in that region, rule it out
                      index=ids)
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)

    def pack(self, codes, grains):
        """codes (B, H, W), grains (B, h, w) -> pos, code, each (B, max_len)."""
        B, h, m = len(codes), self.side, self.fine_side // self.side         # m x m fine cells a region
        blocks = codes.reshape(B, h, m, h, m).transpose(2, 3).reshape(B, self.n_regions, m, m)
        flat = grains.reshape(B, -1, 1)                                      # B, N, 1
        keys, contents = [], []
        for k, s in enumerate(self.cells):
            step = m // math.isqrt(s)                                        # one code fills step x step cells
            content = blocks[:, :, ::step, ::step].reshape(B, self.n_regions, s)  # B, N, s_k
            ids = self.index[self.offsets[k]:self.eos[k]].view(1, self.n_regions, s)
            eos = self.index[self.eos[k]].expand(B, 1)
            keys += [torch.where(flat == k, ids, self.end).flatten(1), eos]  # what is not there sorts last
            contents += [torch.where(flat == k, content, -1).flatten(1), torch.full_like(eos, -1)]
        pos, order = torch.cat(keys, 1).sort(dim=1)                          # B, P
        code = torch.cat(contents, 1).gather(1, order)
        return pos[:, :self.max_len], code[:, :self.max_len]

    def unpack(self, pos, code):
        """pos, code (B, L) -> codes (B, H, W), grains (B, h, w); -1 in regions that are not there (yet)."""
        B, h, m = len(pos), self.side, self.fine_side // self.side
        canvas = torch.full((B, self.n_positions), -1, device=pos.device)
        canvas = canvas.scatter(1, pos, code)                                # B, P: a content per id
        grains = self.grains(pos)                                            # B, N
        codes = torch.full((B, self.n_regions, m, m), -1, device=pos.device)
        for k, s in enumerate(self.cells):
            c = math.isqrt(s)                                                # c x c codes a region
            block = canvas[:, self.offsets[k]:self.eos[k]].view(B, self.n_regions, c, c)
            block = block.repeat_interleave(m // c, 2).repeat_interleave(m // c, 3)  # B, N, m, m
            codes = torch.where((grains == k)[..., None, None], block, codes)
        codes = codes.view(B, h, h, m, m).transpose(2, 3).reshape(B, h * m, h * m)
        return codes, grains.view(B, h, h)

    def grains(self, pos):
        """Granularity of the regions that the ids pos (B, L) cover, -1 elsewhere. -> (B, N)"""
        known = torch.full((len(pos), self.n_regions + 1), -1, device=pos.device)
        return known.scatter(1, self.place[pos], self.grain[pos])[:, :-1]    # EOS wrote to a spare column

    def length(self, grains):
        """Pairs in the sequence of each image, EOS ids included. (B, h, w) -> (B,)"""
        cells = torch.tensor(self.cells, device=grains.device)
        return cells[grains].sum(dim=(1, 2)) + self.n_grains

    def legal(self, prev, grains):
        """Which position ids may follow. prev: (B,) or (B, L) ids, -1 at the start; grains: (B, N)
        granularities known so far, -1 elsewhere (further columns are not looked at) -> mask (B, P) or (B, L, P).

        Inside a region: its next cell. Between regions: the first cell of any later region that is
        not covered, or EOS; in the finest granularity, which must leave no hole, the first such
        region, or EOS when there is none. What `prev` shows to lie in its future is not looked at,
        so a whole training sequence can be masked with its final grains.
        """
        there = grains.gather(1, self.home.expand(len(grains), -1))          # B, P: what covers the region of each id
        free = (there < 0) | (there >= self.rank)                            # B, P: no coarser code does
        free = free if prev.dim() == 1 else free[:, None]                    # B, (1,) P
        mask = self.follow[prev] & free                                      # B, (L,) P
        first = mask.view(torch.uint8).argmax(-1, keepdim=True)              # B, (L,) 1: the lowest id
        return mask & (self.unordered[prev] | (self.index == first))


# ------------------------------------------------------------------------------------------------
# 6  DQ-Transformer (the paper's stage 2: Position-Transformer and Content-Transformer)


def few_rows(weight, dtype, rows, gelu=False):
    """-> F.linear(., weight), and GELU if wanted, as a function of x (R, C) with so few rows R that its work is to read weights.

    On CPUs F.linear reads them at a fraction of the memory's speed. One to three rows are two to four times faster with the
    weights as left factor, cut in two for two threads (bfloat16 gains nothing there); more rows are two to three times faster
    with the weights in oneDNN's own order, by the operator that torch.compile uses for that, and faster still in bfloat16.
    x is of the weight's type or, where that differs, of `dtype`.
    """
    cpu, weight = weight.device.type == "cpu", weight.detach()
    if cpu and rows < 4 and weight.dtype == torch.float32 and len(weight) % 2 == 0:
        halves, dtype = weight.view(2, -1, weight.shape[1]), weight.dtype    # 2, O / 2, C

        def product(x):
            y = torch.bmm(halves, x.t().expand(2, -1, -1))                   # 2, O / 2, R
            return y.view(1, -1) if rows == 1 else y.view(-1, rows).t().contiguous()  # R, O
    elif cpu and torch.backends.mkldnn.is_available() and (dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        packed, after = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype), rows), "gelu" if gelu else "none"
        linear, gelu = torch.ops.mkldnn._linear_pointwise.default, False     # it does the GELU too

        def product(x):
            return linear(x, packed, None, after, [], "none")                # R, O
    else:
        product = functools.partial(F.linear, weight=weight.to(dtype))       # R, O
    activated = (lambda x: F.gelu(product(x))) if gelu else product
    # not x.to(dtype) for all: in a step, calls that do nothing are 5 % of the time
    return activated if weight.dtype == dtype else lambda x: activated(x.to(dtype))


class Block(nn.Module):
    """Pre-norm transformer block, causal."""

    def __init__(self, config):
        super().__init__()
        C = config.width
        self.heads, self.dropout = config.heads, config.dropout
        self.norm1, self.qkv, self.proj = nn.LayerNorm(C, bias=False), nn.Linear(C, 3 * C, bias=False), nn.Linear(C, C, bias=False)
        self.norm2, self.up, self.down = nn.LayerNorm(C, bias=False), nn.Linear(C, 4 * C, bias=False), nn.Linear(4 * C, C, bias=False)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x):
        """x: (B, L, C)."""
        B, L, C = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, L, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)  # each B, heads, L, d
        if x.is_cuda:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0)
        else:                                                                # on CPUs the fused kernel's backward is slow: half a training step
            future = torch.full((L, L), -math.inf, dtype=q.dtype, device=x.device).triu(1)
            attention = (q * q.shape[-1] ** -0.5 @ k.transpose(2, 3) + future).softmax(-1)  # B, heads, L, L
            y = F.dropout(attention, self.dropout, self.training) @ v        # B, heads, L, d
        x = x + self.drop(self.proj(y.transpose(1, 2).reshape(B, L, C)))     # B, L, C
        return x + self.drop(self.down(F.gelu(self.up(self.norm2(x)))))

    def for_decoding(self, dtype, rows):
        """-> the same as a function for one more position of so many rows, with matrices of this type."""
        C = self.proj.in_features
        d = C // self.heads
        norm1, norm2, qkv = self.norm1.weight, self.norm2.weight, self.qkv.weight.detach().clone()
        qkv[:C] *= d ** -0.5                                                 # queries come out scaled for the attention
        qkv, proj = few_rows(qkv, dtype, rows), few_rows(self.proj.weight, dtype, rows)
        up, down = few_rows(self.up.weight, dtype, rows, gelu=True), few_rows(self.down.weight, dtype, rows)

        def decode(x, slot, bias, cache, keys, values):
            """x: (R, C); cache: (2 R heads L, d), of which the rows `slot` (R, 2 heads) are written; keys (R heads, d, end)
            and values (R heads, end, d): views of the part that attention reads; bias: (R heads, 1, end), -inf where it is
            not to look."""
            h = qkv(torch.layer_norm(x, (C,), norm1))                        # R, 3 C
            q, kv = (h if h.dtype == cache.dtype else h.to(cache.dtype)).split_with_sizes([C, 2 * C], 1)  # R, C and R, 2 C
            cache[slot] = kv.view(rows, -1, d)                               # R, 2 heads, d
            # written out, since on CPUs the fused kernel takes up to three times as long for a single query
            attention = torch.bmm(q.reshape(-1, 1, d), keys).add_(bias).softmax(-1)  # R heads, 1, end
            x = x + proj(torch.bmm(attention, values).view(rows, C))         # R, C
            return x + down(up(torch.layer_norm(x, (C,), norm2)))            # R, C
        return decode


class DQTransformer(nn.Module):
    """p(image) = prod_t p(pos_t | before) p(code_t | before, pos_t): where, then what, by two stacks.

    The content embedding is shared between granularities; the position embeddings are not (every
    id has its own row), and a granularity embedding tells them apart.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.layout = Layout(config.size, config.factors)
        C, V, P = config.width, config.codebook_size, self.layout.n_positions
        self.content = nn.Embedding(V + 1, C)                                # the last row is the content of an EOS
        self.position = nn.Embedding(P, C)
        self.granularity = nn.Embedding(self.layout.n_grains, C)
        self.order = nn.Embedding(self.layout.max_len, C)
        self.condition = nn.Embedding(len(config.classes) + 1, C)            # the last row: no label, the start vector
        self.drop = nn.Dropout(config.dropout)
        self.position_stack = nn.ModuleList(Block(config) for _ in range(config.position_layers))
        self.content_stack = nn.ModuleList(Block(config) for _ in range(config.content_layers))
        self.position_norm, self.position_head = nn.LayerNorm(C, bias=False), nn.Linear(C, P, bias=False)
        self.content_norm, self.content_head = nn.LayerNorm(C, bias=False), nn.Linear(C, V, bias=False)
        self.apply(self._init)
        depth = config.position_layers + config.content_layers               # GPT-2: residual branches start small
        for block in [*self.position_stack, *self.content_stack]:
            for linear in (block.proj, block.down):
                nn.init.normal_(linear.weight, std=0.02 / math.sqrt(2 * depth))

    @staticmethod
    def _init(module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)

    def embed(self, pos, code):
        """A pair as a vector: content + position + granularity. pos, code (...) -> (..., C)"""
        content = torch.where(code < 0, self.config.codebook_size, code)
        return self.content(content) + self.position(pos) + self.granularity(self.layout.grain[pos])

    def labels(self, label, B):
        """(B,) labels or None -> (B,) rows of the condition embedding; negative labels mean none."""
        none = len(self.config.classes)
        if label is None or not none:
            return torch.full((B,), none, device=self.condition.weight.device)
        return torch.where(label < 0, none, label)

    def logits(self, pos, code, label=None):
        """pos, code (B, L) -> position logits (B, L, P), -inf where not legal, and content logits (B, L, V).

        Entry t of both is computed from the condition and the pairs before t; the content logits
        also from pos[:, t].
        """
        B, L = pos.shape
        label = self.labels(label, B)
        if self.training and len(self.config.classes):
            hide = torch.rand(B, device=pos.device) < self.config.label_dropout
            label = torch.where(hide, len(self.config.classes), label)
        start = self.condition(label)[:, None]                               # B, 1, C
        x = torch.cat([start, self.embed(pos[:, :-1], code[:, :-1])], dim=1)  # B, L, C
        h = self.drop(x + self.order.weight[:L])
        for block in self.position_stack:
            h = block(h)                                                     # B, L, C
        prev = F.pad(pos[:, :-1], (1, 0), value=-1)                          # B, L
        legal = self.layout.legal(prev, self.layout.grains(pos))             # B, L, P
        position = self.position_head(self.position_norm(h)).float()         # B, L, P
        h = h + self.position(pos)                                           # now it knows where
        for block in self.content_stack:
            h = block(h)
        content = self.content_head(self.content_norm(h)).float()            # B, L, V
        return position.masked_fill(~legal, -math.inf), content

    def forward(self, pos, code, label=None):
        """-> {"position": (B,), "content": (B,)}: negative log-likelihoods of the images, in nats."""
        position, content = self.logits(pos, code, label)
        position = F.cross_entropy(position.transpose(1, 2), pos, reduction="none")  # B, L; 0 where forced
        content = F.cross_entropy(content.transpose(1, 2), code, reduction="none", ignore_index=-1)  # B, L; 0 at EOS
        return {"position": position.sum(1), "content": content.sum(1)}


# ------------------------------------------------------------------------------------------------
# 7  Sampling


class SampleOptions(NamedTuple):
    """temperature acts on positions and contents, top-k and top-p on contents; cfg = 1: no guidance."""
    temperature: float = 1.0
    top_k: int = 0                       # 0: all
    top_p: float = 1.0
    cfg: float = 1.0

    def check(self):
        require(self.temperature > 0, f"temperature must be above 0, not {self.temperature}")
        require(self.top_k >= 0, f"top-k must be at least 0 (0: all), not {self.top_k}")
        require(0 < self.top_p <= 1, f"top-p must be above 0 and at most 1, not {self.top_p}")
        require(self.cfg >= 0, f"cfg must be at least 0, not {self.cfg}")


def filter_logits(logits, top_k, top_p):
    """Keep the k likeliest entries, then the fewest whose probabilities reach p; the rest -> -inf. (B, V)"""
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    if top_p < 1:
        probs, order = logits.softmax(-1).sort(-1, descending=True)
        surplus = probs.cumsum(-1) - probs >= top_p                          # already reached without this one
        logits = logits.masked_fill(torch.zeros_like(surplus).scatter(1, order, surplus), -math.inf)
    return logits


def scramble(x):
    """One round of mixing of int32 to int32, in place: high bits into the low ones, then all into the high ones."""
    return x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(-0x7A143595)  # a shift repeats the sign; products wrap


def noise_keys(seed, images, L):
    """A hash of (seed, image, t) for image numbers (n,) and the L pairs of each -> (n, L), int32."""
    keys = images.int()
    for part in (seed & 0x7FFFFFFF, seed >> 31 & 0x7FFFFFFF):
        keys = scramble(scramble(keys * 0x2545F491 + part))
    return keys[:, None] + torch.arange(L, dtype=torch.int32, device=images.device) * 0x27D4EB2F


def noise_entries(n, device=None):
    """What tells the n entries of a row of `gumbel_noise` apart: int32 (n,)."""
    return scramble(torch.arange(1, n + 1, dtype=torch.int32, device=device))


def gumbel_noise(key, entries):
    """Gumbel noise (B, n): entry j of row b is a function of key[b] and entries[j] and nothing else, so of the image's number
    and the step, not of the image's slot, its batch or the device."""
    x = key[:, None] ^ entries                                               # B, n: any int32
    x = scramble(x.mul_(-0x61C88647))
    uniform = (x >> 9) * 2.0 ** -23 + (0.5 + 2.0 ** -24)                     # in (0, 1), exact in float32
    return uniform.log_().neg_().log_().neg_()


class Job(NamedTuple):
    """What is wanted, n images, and the weights in the form that a step wants. Image n is nobody's: for slots with nothing to do."""
    start: torch.Tensor                  # n + 1: P + the row of the condition embedding
    key: torch.Tensor                    # n + 1, L: of the noise
    entries: torch.Tensor                # P + V: of the noise
    given: tuple                         # positions and contents, each n + 1, L, -1 where they are to be drawn; or None
    options: SampleOptions
    where: torch.Tensor                  # P + classes + 1, C: embedding of each position with its granularity, then the conditions
    what: torch.Tensor                   # V + 2, C: embedding of each content, that of an EOS, and 0 beside a condition
    position_stack: list                 # of functions that take a layer one position further (see `Block.for_decoding`)
    content_stack: list
    position_head: object                # functions as `few_rows` makes them
    content_head: object


class DecodeState(NamedTuple):
    """All that changes while images are being written by B slots; R = B rows, or 2 B with guidance."""
    cache: tuple                         # for each layer memory for keys and values: 2, R heads, L, d; steps see it through a Window
    image: torch.Tensor                  # B: which image the slot is writing; n when there is none left
    taken: torch.Tensor                  # scalar: the last image that a slot has taken
    t: torch.Tensor                      # B: the step that comes next
    last: torch.Tensor                   # B: row of `where` for the pair written last, or for the condition
    last_code: torch.Tensor              # B: row of `what`
    grains: torch.Tensor                 # B, N + 1: granularities known so far; the last column is spare
    pos: torch.Tensor                    # n + 1, L: the images, the end id where nothing is written
    code: torch.Tensor                   # n + 1, L: V is the content of an EOS


def start_job(model, label, options, seed, given, first, dtype, rows):
    """The job of `generate`, with weights for steps of so many rows."""
    layout, n, device = model.layout, len(label), model.position_head.weight.device
    P, content = layout.n_positions, model.content.weight
    return Job(
        start=P + F.pad(model.labels(label, n), (0, 1)),
        key=noise_keys(seed, torch.arange(first, first + n + 1, device=device), layout.max_len),
        entries=noise_entries(P + model.config.codebook_size, device),
        given=given and tuple(F.pad(each, (0, 0, 0, 1), value=-1) for each in given),
        options=options,
        where=torch.cat([model.position.weight + model.granularity(layout.grain[:P]), model.condition.weight]),
        what=torch.cat([content, torch.zeros_like(content[:1])]),
        position_stack=[block.for_decoding(dtype, rows) for block in model.position_stack],
        content_stack=[block.for_decoding(dtype, rows) for block in model.content_stack],
        position_head=few_rows(model.position_head.weight, dtype, rows),
        content_head=few_rows(model.content_head.weight, dtype, rows))


def start_state(model, job, slots, rows, dtype):
    """All slots at the start of their first images, with caches for so many rows."""
    config, layout, device = model.config, model.layout, job.start.device
    n, B, L = len(job.start) - 1, slots, layout.max_len
    return DecodeState(
        cache=tuple(torch.zeros(2, rows * config.heads, L, config.width // config.heads, device=device, dtype=dtype)
                    for _ in range(config.position_layers + config.content_layers)),
        image=torch.arange(B, device=device),
        taken=torch.tensor(B - 1, device=device),
        t=torch.zeros(B, dtype=torch.long, device=device),
        last=job.start[:B].clone(),
        last_code=torch.full((B,), config.codebook_size + 1, device=device),
        grains=torch.full((B, layout.n_regions + 1), -1, device=device),
        pos=torch.full((n + 1, L), layout.end, device=device),
        code=torch.full((n + 1, L), config.codebook_size, device=device))


class Window(NamedTuple):
    """The cache as a step sees it, with room for the first `end` places of every row and no gaps, which CPUs read up to three times faster."""
    bias: torch.Tensor                   # end, 1, end: for each step what attention adds to its scores, 0 or, for later places, -inf
    slot: torch.Tensor                   # R, 2 heads: where the keys and values of place 0 are, in the first of the views below
    layers: list                         # for each layer three views: 2 R heads end, d (all of it); keys R heads, d, end; values R heads, end, d


def look_at(state, heads, end):
    """-> the Window of this size, at the beginning of the memory of the cache."""
    _, R_heads, _, d = state.cache[0].shape
    views = [cache.view(-1)[:2 * R_heads * end * d].view(2, R_heads, end, d) for cache in state.cache]
    slot = torch.arange(0, 2 * R_heads * end, end, device=state.t.device).view(2, -1, heads)  # 2, R, heads
    later = torch.full((end, end), -math.inf, dtype=views[0].dtype, device=slot.device).triu(1)
    return Window(later[:, None], slot.transpose(0, 1).reshape(-1, 2 * heads),
                  [(view.view(-1, d), view[0].transpose(1, 2), view[1]) for view in views])


def move(old, new):
    """The cache from one window into another, as far as both reach."""
    ends = len(old.bias), len(new.bias)
    for (whole, *_), (target, *_) in zip(old.layers, new.layers):
        here, there = (view.view(-1, end, view.shape[-1])[:, :min(ends)] for view, end in zip((whole, target), ends))
        there.copy_(here.clone())                                            # the two share memory


def decode_one(model, job, state, window):
    """Write one more pair of the image in every slot; a slot whose image is complete takes the next one.

    The window must reach further than every t. Reads nothing but its arguments, changes nothing but
    `state`, and never asks the device for a value, so it can be captured as a graph: all shapes
    depend on the size of the window alone.
    """
    layout, options, image, t, last = model.layout, job.options, state.image, state.t, state.last
    (B, n), P, V = (len(t), len(job.start) - 1), layout.n_positions, model.config.codebook_size
    C, heads, guided = model.config.width, model.config.heads, len(window.slot) > B

    def guide(logits):
        if logits.dtype != torch.float32:
            logits = logits.float()                                          # R, P or V
        if guided:
            labelled, unlabelled = logits.chunk(2)
            logits = unlabelled + options.cfg * (labelled - unlabelled)
        return logits / options.temperature if options.temperature != 1 else logits  # B, P or V

    def unless_given(drawn, which):
        """which: 0 for positions, 1 for contents."""
        if job.given is None:
            return drawn
        given = job.given[which][image, t]                                   # B
        return torch.where(given >= 0, given, drawn)

    # embed the last pair, or the condition; with guidance once more, for the rows without a label
    rows_last, rows_code, rows_t = last, state.last_code, t
    if guided:
        rows_last = torch.cat([last, last.masked_fill(last >= P, len(job.where) - 1)])
        rows_code, rows_t = rows_code.repeat(2), t.repeat(2)                 # R
    h = job.where.index_select(0, rows_last) + job.what.index_select(0, rows_code) + model.order.weight.index_select(0, rows_t)  # R, C
    slot = window.slot + rows_t[:, None]                                     # R, 2 heads
    bias = window.bias.index_select(0, rows_t.repeat_interleave(heads))      # R heads, 1, end

    # where: position stack, then one draw among the legal ids
    noise, content_noise = gumbel_noise(job.key[image, t], job.entries).split([P, V], dim=1)  # B, P and B, V
    for decode, views in zip(job.position_stack, window.layers):
        h = decode(h, slot, bias, *views)                                    # R, C
    legal = layout.legal(last.clamp(max=P), state.grains)                    # B, P
    logits = guide(job.position_head(torch.layer_norm(h, (C,), model.position_norm.weight)))
    pos = unless_given((logits + noise).masked_fill_(~legal, -math.inf).argmax(-1), 0)  # B

    # what: content stack, then one draw
    h = h + model.position.weight.index_select(0, pos.repeat(2) if guided else pos)  # R, C
    for decode, views in zip(job.content_stack, window.layers[len(job.position_stack):]):
        h = decode(h, slot, bias, *views)
    logits = guide(job.content_head(torch.layer_norm(h, (C,), model.content_norm.weight)))
    code = unless_given((filter_logits(logits, options.top_k, options.top_p) + content_noise).argmax(-1), 1)  # B
    code = code.masked_fill(layout.is_eos.index_select(0, pos), V)

    # write the pair, and take the next image where this one has its last EOS
    state.pos[image, t], state.code[image, t] = pos, code
    state.grains.scatter_(1, layout.place.index_select(0, pos)[:, None], layout.grain.index_select(0, pos)[:, None])
    done = pos == layout.end                                                 # B
    order = done.cumsum(0)                                                   # B: 1, 2, ... among those
    image.copy_(torch.where(done, state.taken + order, image).clamp_(max=n))
    state.taken.add_(order[-1])
    t.add_(1).masked_fill_(done, 0)
    last.copy_(torch.where(done, job.start.index_select(0, image), pos))
    state.last_code.copy_(code.masked_fill_(done, V + 1))
    state.grains.masked_fill_(done[:, None], -1)


@torch.inference_mode()
def generate(model, label, options=SampleOptions(), seed=0, given=None, slots=None, first=0, dtype=None, bucket=None, look_every=None, graphs=None):
    """Draw images. label: (n,) classes, -1 for none -> pos, code, each (n, max_len); Layout.unpack reads them.

    given: optional (pos, code), each (n, max_len), -1 where it is to be drawn. Two uses: the positions of a
    grain map with all contents open choose where the detail goes, and the coarse part of a
    photo's sequence with the rest open redraws its details (see `given_tiling` and `given_coarse`).
    slots: how many images are written at a time (None: all); a slot whose image is complete takes
    the next, so the cost follows the mean length. Image i's noise depends on seed and first + i alone.

    What makes it fast. dtype: of the matrices (None: the model's), and on a GPU of the cache; the sum that runs through the
    layers keeps the model's. bucket: the part of the cache that a step sees is rounded up to a multiple of this. graphs
    (None: on GPUs): a step is captured as a CUDA graph for each such size, and replayed. look_every: steps between two
    looks of the host at the state; with graphs it reads what the state was one look ago, so that the device never waits.
    """
    options.check()
    layout, weight = model.layout, model.position_head.weight
    dtype, graphs = dtype or weight.dtype, weight.is_cuda if graphs is None else graphs
    bucket, look_every = bucket or (128 if graphs else 32), look_every or (32 if graphs else 1)
    n, L = len(label), layout.max_len
    slots = min(n, slots or n)
    rows = 2 * slots if options.cfg != 1 and model.config.classes else slots
    job = start_job(model, label, options, seed, given, first, dtype, rows)
    state = start_state(model, job, slots, rows, dtype if weight.is_cuda else weight.dtype)
    # for one to three rows oneDNN's GELU takes up to eight times as long as torch's own
    with torch.autocast(weight.device.type, enabled=False), torch.backends.mkldnn.flags(enabled=weight.dtype != torch.float32, allow_tf32=None):
        windows = [look_at(state, model.config.heads, min(end, L)) for end in range(bucket, L + bucket, bucket)]  # graphs read them: to be kept
        steps = [functools.partial(decode_one, model, job, state, window) for window in windows]
        if graphs:
            steps = [capture(step, state) for step in steps]
        looks, at, n_steps, size = [], 0, 0, 0                               # no slot is further than `at`
        while True:
            if not size // 2 <= at // bucket <= size:                        # too narrow, or much too wide
                move(windows[size], windows[at // bucket])
                size = at // bucket
            steps[size]()
            at, n_steps = min(at + 1, L - 1), n_steps + 1
            if n_steps % look_every:
                continue
            look = torch.stack([state.image.min(), state.t.max()]).to("cpu", non_blocking=True)
            looks.append((n_steps, look, torch.cuda.current_stream().record_event() if graphs else None))
            if graphs and len(looks) == 1:
                continue
            then, look, arrived = looks.pop(0)
            if graphs:
                arrived.synchronize()                                        # of the look before: the device has work until the next
            least, furthest = look.tolist()
            if least == n:                                                   # every slot has run out of images
                break
            at = min(furthest + n_steps - then, L - 1)
    pos, code = state.pos[:n], state.code[:n]
    return pos, code.masked_fill_(code == model.config.codebook_size, -1)


def capture(step, state):
    """A CUDA graph of step(), to call. The warm-up in front of it is undone (the cache needs no undoing)."""
    former = [tensor.clone() for tensor in state[1:]]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    for tensor, old in zip(state[1:], former):
        tensor.copy_(old)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def given_tiling(layout, grains):
    """For `generate`: this grain map (B, h, w), every content open."""
    H = layout.fine_side
    pos, _ = layout.pack(torch.zeros(len(grains), H, H, dtype=torch.long, device=grains.device), grains)
    return pos, torch.full_like(pos, -1)


def given_coarse(layout, codes, grains, keep):
    """For `generate`: the codes of the `keep` coarsest granularities of these images, the rest open."""
    pos, code = layout.pack(codes, grains)
    kept = layout.grain[pos] < keep
    return torch.where(kept, pos, -1), torch.where(kept, code, -1)


# ------------------------------------------------------------------------------------------------
# 8  Files: images in, pictures and checkpoints out


class ToyShapes(torch.utils.data.Dataset):
    """Textured shapes (much information) on smooth gradients (little), any size, made on the fly.

    self[i] -> image (3, S, S) in [-1, 1], label (the kind of shape, i % 4). Image i depends on
    (seed, i mod n) alone. detail_mask(i) tells where the information is.
    """
    classes = ("circle", "square", "triangle", "cross")
    backgrounds = np.array([[205, 226, 240], [240, 222, 206], [214, 236, 212], [232, 216, 240],
                            [246, 238, 200], [150, 178, 206], [206, 160, 150], [150, 190, 160]]) / 255
    inks = np.array([[[30, 60, 130], [250, 200, 60]], [[190, 40, 50], [250, 240, 225]], [[20, 110, 90], [250, 170, 140]],
                     [[90, 40, 120], [150, 220, 210]], [[40, 40, 50], [245, 245, 245]], [[220, 100, 20], [40, 60, 100]]]) / 255

    def __init__(self, size=32, n=8192, seed=0):
        self.size, self.n, self.seed = size, n, seed
        line = (np.arange(size) + 0.5) / size * 2 - 1                        # pixel centres in [-1, 1]
        self.x, self.y = np.meshgrid(line, line)                             # S, S; y points down

    def __len__(self):
        return self.n

    def _shape(self, i):
        """Signed distance to the shape's edge (S, S), negative inside, and the generator for all the rest."""
        rng = np.random.default_rng([self.seed, i % self.n])
        r = rng.choice([0.6, 0.675, 0.75])
        x, y = self.x - rng.integers(-2, 3) / 8, self.y - rng.integers(-2, 3) / 8  # on a grid: few codes say much
        kind = self.classes[i % self.n % 4]
        if kind == "circle":
            d = np.hypot(x, y) - r
        elif kind == "square":
            d = np.maximum(abs(x), abs(y)) - 0.85 * r
        elif kind == "triangle":
            d = np.maximum(0.866 * abs(x) - 0.5 * y - 0.55 * r, y - 0.7 * r)
        else:
            a, b = np.maximum(abs(x), abs(y)), np.minimum(abs(x), abs(y))
            d = np.maximum(a - r, b - 0.36 * r)
        return d, x, y, rng

    def detail_mask(self, i):
        """Pixels of the textured shape: (S, S), bool."""
        return torch.from_numpy(self._shape(i)[0] < 0)

    def __getitem__(self, i):
        d, x, y, rng = self._shape(i)
        c0, c1 = self.backgrounds[rng.choice(len(self.backgrounds), 2, replace=False)]
        angle = rng.uniform(0, 2 * np.pi)
        t = 0.5 + (np.cos(angle) * self.x + np.sin(angle) * self.y) / 2.83   # S, S in [0, 1]
        image = c0 + (c1 - c0) * t[..., None]                                # S, S, 3
        turn, k = rng.integers(4) * np.pi / 4, 2 * np.pi / 0.5               # 4 periods across the image
        u, v = k * (np.cos(turn) * x + np.sin(turn) * y), k * (np.cos(turn) * y - np.sin(turn) * x)
        wave = (np.sin(u), np.sin(u) * np.sin(v) * 1.4, np.cos(u) * 0.6 + np.cos(v) * 0.6 - 0.3)[rng.integers(3)]
        sharp = self.size * 0.5 / 8                                          # stripes, checks or dots; soft edges
        ink0, ink1 = self.inks[rng.integers(len(self.inks))]
        texture = ink0 + (ink1 - ink0) * np.clip(0.5 + sharp * wave, 0, 1)[..., None]
        edge = np.clip(1.5 + (d + 0.06) * self.size / 2, 0, 1)[..., None]    # an outline that closes the shape
        texture = texture + (ink0 - texture) * edge
        cover = np.clip(0.5 - d * self.size / 2, 0, 1)[..., None]            # antialiased edge
        image = image + (texture - image) * cover
        return torch.from_numpy(image.transpose(2, 0, 1) * 2 - 1).float(), i % self.n % 4


class ImageFolder(torch.utils.data.Dataset):
    """Every image below a folder; the first level of sub-folders are classes if there are two or more.

    self[i] -> image (3, S, S) in [-1, 1], label (-1 without a class). i may run past the length:
    i // len(self) is then the epoch, which with the seed fixes the random crop and flip.
    One file in 20, chosen by a hash of its name, is held out: split "val" has those, "train" the
    rest. A file that can't be decoded is named in a warning, and the next one stands in for it.
    """
    suffixes = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}

    def __init__(self, root, size, split="train", augment=False, seed=0):
        self.root, self.size, self.augment, self.seed, self.broken = Path(root), size, augment, seed, set()
        require(self.root.is_dir(), f"no such folder: {root}")
        files = sorted(Path(folder, name) for folder, _, names in os.walk(self.root) for name in names
                       if os.path.splitext(name)[1].lower() in self.suffixes)
        require(files, f"no images below {root} (looked for {', '.join(sorted(self.suffixes))})")
        folder = [p.relative_to(self.root).parts[0] if p.parent != self.root else None for p in files]
        names = sorted(set(folder) - {None})
        self.classes = tuple(names) if len(names) > 1 else ()
        files = [(p, self.classes.index(f) if self.classes and f else -1) for p, f in zip(files, folder)]
        held = [zlib.crc32(p.relative_to(self.root).as_posix().encode(errors="surrogateescape")) % 20 == 0 for p, _ in files]
        if len(set(held)) == 1:                                              # so few files that chance left one side empty
            held = [i == 0 for i in range(len(files))]
        own, other = ([f for f, h in zip(files, held) if h == side] for side in (split == "val", split != "val"))
        self.n = len(own) or 1                                               # a single file is in both
        self.files = own + other                                             # the other split only stands in for broken files

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        start = i % self.n
        for j in (*range(start, self.n), *range(start), *range(self.n, len(self.files))):
            path, label = self.files[j]
            if path in self.broken:
                continue
            try:
                return load_image(path, self.size, np.random.default_rng([self.seed, i]) if self.augment else None), label
            except UserError as error:
                self.broken.add(path)
                print(f"warning: left out {error}", file=sys.stderr)
        raise UserError(f"none of the {len(self.files)} images below {self.root} can be decoded")


def load_image(path, size, rng=None):
    """One file -> (3, S, S) in [-1, 1]: short side to S, then a centre crop, or a random crop and flip."""
    image = open_image(path)
    w, h = image.size
    scale = size / min(w, h)
    w, h = max(size, round(w * scale)), max(size, round(h * scale))          # what it would be when resized
    x, y = ((w - size) // 2, (h - size) // 2) if rng is None else (rng.integers(w - size + 1), rng.integers(h - size + 1))
    sx, sy = image.width / w, image.height / h
    box = (x * sx, y * sy, min((x + size) * sx, image.width), min((y + size) * sy, image.height))
    image = image.resize((size, size), Image.Resampling.BICUBIC, box, reducing_gap=3.0)  # Pillow antialiases
    if rng is not None and rng.random() < 0.5:
        image = ImageOps.mirror(image)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def open_image(path):
    """One file -> Pillow image, RGB and upright. UserError when it can't be decoded, whatever the reason."""
    require(os.path.isfile(path), f"{path}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)   # more pixels than Pillow thinks sane
            with Image.open(path) as image:
                return to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:                                               # decoders raise nearly everything on broken files
        raise UserError(f"{path}: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from None


def to_rgb(image):
    """A Pillow image of any mode -> RGB; transparency over white, 16 bits and floats scaled to 8."""
    if image.mode.startswith("I") or image.mode == "F":
        x = np.asarray(image).astype(np.float32)
        top = 1.0 if image.mode == "F" and x.max() <= 1 else 65535.0 if x.max() > 255 or ";16" in image.mode else 255.0
        image = Image.fromarray((x * (255 / top)).clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def save_checkpoint(path, kind, config, model, **state):
    """One file: kind, config as a plain dict, weights, and whatever a trainer needs to go on.

    Written under another name first, so that a crash leaves the former file whole.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(dict(kind=kind, config=asdict(config), weights=model.state_dict(), **state), file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"could not write {path} ({str(error).splitlines()[0]}); what was there before is whole") from None
    os.replace(temporary, path)


def load_checkpoint(path, kind):
    """-> the dict that was saved, on the CPU. UserError when the file is not a checkpoint of this kind."""
    maker = {"dq-vae": "train_vae.py", "dq-transformer": "train_transformer.py"}[kind]
    require(os.path.isfile(path), f"no such file: {path} ({maker} writes it)")
    try:
        with zipfile.ZipFile(path) as archive:
            require(archive.testzip() is None, "a checksum is wrong")        # torch.load doesn't look at them
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # runs no code of the file's
    except Exception as error:
        raise UserError(f"{path} is not a checkpoint, or is damaged ({type(error).__name__})") from None
    found = checkpoint.get("kind") if isinstance(checkpoint, dict) else None
    require(found == kind, f"{path} holds {f'a {found}' if found else 'no dq checkpoint'}; a {kind} is needed ({maker} writes it)")
    return checkpoint


def rebuild(model_class, config_class, config, weights, device):
    """A saved model for use, not for training."""
    try:
        model = model_class(config_class(**config))
        model.load_state_dict(weights)
    except (TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"the checkpoint is damaged or of another version ({str(error).splitlines()[0]})") from None
    return model.to(device).eval().requires_grad_(False)


def load_vae(path, device):
    checkpoint = load_checkpoint(path, "dq-vae")
    return rebuild(DQVAE, VAEConfig, checkpoint.get("config"), checkpoint.get("weights"), device)


def load_transformer(path, device):
    """-> DQTransformer and the DQVAE that its checkpoint carries."""
    checkpoint = load_checkpoint(path, "dq-transformer")
    return (rebuild(DQTransformer, TransformerConfig, checkpoint.get("config"), checkpoint.get("weights"), device),
            rebuild(DQVAE, VAEConfig, checkpoint.get("vae_config"), checkpoint.get("vae_weights"), device))


def to_picture(x, side=128):
    """(3, S, S) in [-1, 1] -> Pillow image, enlarged by whole pixels to about `side`. Never rescaled in brightness."""
    pixels = ((x.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    image = Image.fromarray(pixels)
    times = max(1, side // image.width)
    return image.resize((image.width * times,) * 2, Image.Resampling.NEAREST)


def draw_grains(x, grains, factors):
    """One box per code over an image (3, S, S): blue for the coarsest granularity, orange, then red. grains: (h, w)"""
    picture = to_picture(x)
    picture = Image.blend(picture, Image.new("RGB", picture.size, "white"), 0.35)
    pen, region = ImageDraw.Draw(picture), picture.width / grains.shape[1]
    grains = grains.tolist()
    for k in range(len(factors)):                                            # finer boxes lie on top
        cells = factors[0] // factors[k]
        for y, x in [(y, x) for y, row in enumerate(grains) for x, g in enumerate(row) if g == k]:
            for j in range(cells ** 2):
                x0, y0 = (x + j % cells / cells) * region, (y + j // cells / cells) * region
                pen.rectangle([x0, y0, x0 + region / cells, y0 + region / cells], outline=["#3a6ea5", "#e07b00", "#c01530"][k % 3])
    return picture


def save_grid(path, pictures, columns, captions=None):
    """Pillow images of one size -> one picture, row by row, a caption above each."""
    w, h = pictures[0].size
    top, gap = 14 if captions else 0, 2
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (w + gap) - gap, rows * (h + gap + top) - gap), "white")
    for i, picture in enumerate(pictures):
        x, y = i % columns * (w + gap), i // columns * (h + gap + top)
        sheet.paste(picture, (x, y + top))
        if captions:
            ImageDraw.Draw(sheet).text((x + 2, y + 1), captions[i], fill="black")
    sheet.save(path)


def pick_device(name, dtype):
    """--device and --dtype -> device and a function that opens an autocast context.

    auto: the GPU if there is one; bfloat16 where the hardware computes in it, else float32.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"no such device here: {name}") from None
    if dtype == "auto":
        cpu = getattr(torch.cpu, "get_capabilities", dict)()
        fast = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else cpu.get("avx512_bf16") or cpu.get("amx_bf16")
        dtype = "bf16" if fast else "fp32"
    return device, lambda: torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16")


def run(main):
    """Call a script's main; what the user can mend ends in one line and exit status 1."""
    end = attempt(main)
    if processes()[1] > 1:
        if end is None:
            dist.barrier()                                                   # none leaves while another is still at work
            dist.destroy_process_group()
        else:                                                                # an orderly exit could wait for ever for processes that are gone
            if isinstance(end, str):
                print(end, file=sys.stderr)
                end = 1
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(end)
    if end is not None:
        sys.exit(end)


def attempt(main):
    """-> None, an exit status, or the line to end with."""
    try:
        return main()
    except SystemExit as exit:
        return exit.code
    except (UserError, OSError) as error:
        return f"error: {str(error).strip().splitlines()[-1]}"               # a loader process adds lines before ours
    except KeyboardInterrupt:
        return 130
    except RuntimeError as error:
        says = {"DataLoader worker": "a process that loads images died; with fewer --workers it may have more memory, and --resume goes on",
                "gloo": "another process of this job is gone; --resume goes on from the last checkpoint",
                "NCCL": "another process of this job is gone, or its network; --resume goes on from the last checkpoint",
                "out of memory": "not enough memory on the device; a smaller --batch-size or a larger --accumulate takes less"}
        known = [line for sign, line in says.items() if sign in str(error)]
        if not known:
            raise
        return f"error: {known[0]} ({str(error).strip().splitlines()[0]})"
