"""Dynamic vector quantization: images as variable-length codes, and a transformer that writes them.

After Huang, Mao, Chen, Zhang, "Towards Accurate Image Coding: Improved Autoregressive Image Generation with Dynamic
Vector Quantization", CVPR 2023 (arXiv 2305.11718). The file reads in the order in which data flows:
    1  configuration                  what fixes the architecture of the two models
    2  dynamic grained coding         routers pick a granularity for every region; the budget loss
    3  codebook                       one for all granularities, learned by moving averages
    4  encoder, decoder, DQVAE        image -> codes and grains -> image
    5  sequences                      Layout: codes and grains <-> (position, content) pairs
    6  DQ-Transformer                 a position stack and, on top of it, a content stack
    7  sampling                       one step over explicit state, and the loop around it
    8  checkpoints                    written so that a crash loses nothing, read without running any code

Symbols, the same everywhere:
    B batch   K granularities, k = 0 the coarsest   N regions = cells of the coarsest grid, h x w
    s_k codes that a region of granularity k has (1, 4, 16)   H x W the finest grid   S image side
    Z encoder channels   D code dimension   V codebook size   P position ids   L sequence length   C transformer width
    grains (B, h, w): the granularity of every region
    codes  (B, H, W): codebook ids on the finest grid, a coarse code repeated over its region
"""
import itertools
import math
import os
import zipfile
import zlib
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F


# ------------------------------------------------------------------------------------------------
# 1  Configuration

class UserError(ValueError):
    """Something that the user can mend; the message is one clear line."""


def require(condition, message):
    if not condition:
        raise UserError(message)


def check_factors(size, factors):
    """UserError unless factors are powers of two, coarse to fine, and fit an image of this size."""
    powers = factors and all(f >= 1 and f & (f - 1) == 0 for f in factors)
    require(powers, f"factors must be powers of two, not {factors}")
    require(all(a > b for a, b in zip(factors, factors[1:])), f"factors must fall from coarse to fine, not {factors}")
    require(size > 0 and size % factors[0] == 0, f"size {size} is not a multiple of the largest factor {factors[0]}")


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
        self.factors, self.ratios, self.multipliers = tuple(self.factors), tuple(self.ratios), tuple(self.multipliers)
        check_factors(self.size, self.factors)
        K, shares = len(self.factors), min(self.ratios) >= 0 and abs(sum(self.ratios) - 1) < 1e-6
        require(len(self.ratios) == K, f"{K} factors need {K} ratios, coarse to fine, not {self.ratios}")
        require(shares, f"ratios must be shares that sum to 1, not {self.ratios}")
        require(self.router in ROUTERS, f"router must be learned, entropy or random, not {self.router!r}")
        require(min(self.codebook_size, self.code_dim) >= 1, "a codebook needs at least one code of one dimension")
        require(self.channels % 32 == self.width % 32 == 0, "channels and width must be multiples of 32, for GroupNorm")
        least = min(self.channels, *map(self.level_width, range(self.factors[0].bit_length())[-2:]))  # channels there
        require(self.size > self.factors[0] or least > 32, "GroupNorm of one region needs more than 32 channels")

    def level_width(self, level):
        """Channels at downsampling factor 2**level."""
        return self.width * self.multipliers[min(level, len(self.multipliers) - 1)]


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
    rotary: bool = True                  # attention finds codes by their places (ours; not in the paper's model)
    qk_norm: bool = False                # queries and keys normalised, as in ViT-22B (ours; older checkpoints: False)

    def __post_init__(self):
        self.factors, self.classes = tuple(self.factors), tuple(self.classes)
        check_factors(self.size, self.factors)
        unit = self.heads * (4 if self.rotary else 1)
        require(unit > 0 and self.width % unit == 0, f"width {self.width} is not a multiple of {unit}, for its heads")


# ------------------------------------------------------------------------------------------------
# 2  Dynamic grained coding (the paper's stage 1: "Dynamic Grained Coding" and "budget loss")
# Every router has score(x, maps) -> (B, h, w), higher where finer codes are wanted (what evaluation compares with the
# truth), and forward(x, maps, noise) -> gate (B, K, h, w), one-hot over K.

def norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


def one_hot(grains, n):
    """(B, h, w) -> (B, n, h, w), float."""
    return F.one_hot(grains, n).permute(0, 3, 1, 2).float()


class GrainRouter(nn.Module):
    """The paper's learned gate: normalise each map, pool to the regions, and let an MLP choose."""
    def __init__(self, channels, n_grains):
        super().__init__()
        self.norms = nn.ModuleList(norm(channels) for _ in range(n_grains))
        width = channels * n_grains
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, n_grains))

    def logits(self, maps):
        """maps: K tensors (B, Z, H_k, W_k), coarse to fine -> (B, K, h, w)."""
        pooled = [F.adaptive_avg_pool2d(layer(m), maps[0].shape[-2:]) for layer, m in zip(self.norms, maps)]
        x = torch.cat(pooled, dim=1).permute(0, 2, 3, 1)                     # B, h, w, K Z
        return self.mlp(x).permute(0, 3, 1, 2).float()                       # B, K, h, w

    def score(self, x, maps):
        p = self.logits(maps).softmax(dim=1)                                 # B, K, h, w
        return sum(k * p[:, k] for k in range(p.shape[1]))                   # B, h, w: the mean granularity

    def forward(self, x, maps, noise=1.0):
        """In training a sample (hard Gumbel-softmax, its noise scaled by `noise`), else the argmax.
        The output multiplies the maps (DQVAE.mix), so c_k = d loss / d gate_k says what moving the region towards
        granularity k would do. Backward sees p, the softmax of the noisy logits (straight-through): d loss / d logit_k
        = p_k (c_k - sum_j p_j c_j), so what is better than the average of its rivals becomes likelier. The noise must
        fade before training ends, or the *sampled* ratio meets the budget while that of the *argmax* does not."""
        logits = self.logits(maps)                                           # B, K, h, w
        if not self.training:
            return one_hot(logits.argmax(dim=1), logits.shape[1])
        exponential = sample_global(torch.Tensor.exponential_, logits.shape, logits.device)  # B, K, h, w
        soft = (logits - noise * exponential.log()).softmax(dim=1)           # B, K, h, w
        hard = one_hot(soft.argmax(dim=1), logits.shape[1])
        return hard + (soft - soft.detach())                                 # B, K, h, w: exactly one-hot


def gumbel_scale(step, steps):
    """1 until half of training, 0 from 90 % on: the gate explores first and then learns its argmax."""
    return min(1.0, max(0.0, (0.9 - step / steps) / 0.4))


class ThresholdRouter(nn.Module):
    """Cuts a score into granularities at K - 1 thresholds."""
    def __init__(self, thresholds):
        super().__init__()
        self.register_buffer("thresholds", thresholds)                       # K - 1

    def forward(self, x, maps, noise=1.0):
        grains = torch.bucketize(self.score(x, maps), self.thresholds)       # B, h, w
        return one_hot(grains, len(self.thresholds) + 1)                     # B, K, h, w


class RandomRouter(ThresholdRouter):
    """Granularities drawn blindly at the wanted ratios: the control for every claim about routing."""
    def __init__(self, ratios):
        super().__init__(torch.tensor(ratios).cumsum(0)[:-1])

    def score(self, x, maps):
        side = maps[0].shape[-1]
        if self.training:
            return sample_global(torch.Tensor.uniform_, (len(x), side, side), x.device)  # B, h, w
        # by torch's seed and the image, so that it is routed alike in any batch and on any process
        keys = [zlib.crc32(image.contiguous().numpy()) for image in x.float().cpu()]
        scores = [numpy_rng(torch.initial_seed(), key).random((side, side), np.float32) for key in keys]
        return torch.from_numpy(np.stack(scores)).to(x.device)               # B, h, w


class EntropyRouter(ThresholdRouter):
    """Shannon entropy of the grey levels of each region, cut at quantiles of the training images."""
    def __init__(self, ratios, factor):
        super().__init__(torch.zeros(len(ratios) - 1))                       # in nats; the trainer measures them
        self.factor = factor

    def score(self, x, maps=None):
        """x: (B, 3, S, S) in [-1, 1] -> entropy of each region in nats (B, h, w). Grey is 0.2989 red + 0.5870 green +
        0.1140 blue; of the 32 bins, linspace(-1, 1, 32), each weighs a pixel by a Gaussian of deviation 0.01."""
        red, green, blue = x.float().split(1, dim=1)                         # each B, 1, S, S
        grey = 0.2989 * red + 0.5870 * green + 0.1140 * blue
        pixels = F.unfold(grey, self.factor, stride=self.factor)             # B, F F, N
        bins = torch.linspace(-1, 1, 32, device=x.device)
        hist = [torch.exp(-0.5 * ((pixels - centre) / 0.01) ** 2).mean(1) for centre in bins]  # 32 x (B, N)
        hist = torch.stack(hist, dim=-1)                                     # B, N, 32
        p = hist / (hist.sum(-1, keepdim=True) + 1e-10)
        entropy = -(p * (p + 1e-10).log()).sum(-1)                           # B, N
        return entropy.view(-1, x.shape[2] // self.factor, x.shape[3] // self.factor)  # B, h, w

    def calibrate(self, ratios, images):
        """Set the thresholds: quantiles of the regions' entropies in training batches (B, 3, S, S). Where many regions
        tie (blank surroundings), the ties go to the coarser side."""
        scores = torch.cat([self.score(x).flatten() for x in images])
        cuts = np.cumsum(ratios)[:-1].clip(0, 1)                             # K - 1
        levels = np.quantile(scores.cpu().numpy().astype(float), cuts)
        levels = np.where(cuts < 1e-6, -1, np.where(cuts > 1 - 1e-6, 1e3, levels))  # none, or all, are coarser
        self.thresholds.copy_(torch.from_numpy(levels.astype(np.float32)))


ROUTERS = {
    "learned": lambda config: GrainRouter(config.channels, len(config.factors)),
    "entropy": lambda config: EntropyRouter(config.ratios, config.factors[0]),
    "random": lambda config: RandomRouter(config.ratios),
}


def budget_loss(gate, ratios):
    """Sum over k of (share of granularity k in the batch - ratio k)^2: images may differ, but not the data set from its
    budget. gate: (B, K, h, w), one-hot; ratios: K wanted shares -> scalar"""
    share = gate.mean(dim=(0, 2, 3))                                         # K
    # of all processes in forward; the mean of their gradients is then that of the global batch
    share = share + (all_reduce_sum(share) / rank_world()[1] - share).detach()
    return sum((share[k] - ratio) ** 2 for k, ratio in enumerate(ratios))


# ------------------------------------------------------------------------------------------------
# 3  Codebook

def straight_through(z, q):
    """q, whose gradient goes to z unchanged, since the choice of the nearest code has no gradient of its own."""
    return z + (q - z).detach()


class Codebook(nn.Module):
    """Vector quantization with one codebook for all granularities, learned by moving averages.
    forward(z (B, D, H, W), weight (B, H, W)) -> quantised z (B, D, H, W), ids (B, H, W), loss. `weight` makes every
    *code* count once, in loss and averages: a coarse code repeated over 4 cells gives each of them 1/4."""
    def __init__(self, size, dim, decay=0.99, commitment=0.25, dead_below=0.1):
        super().__init__()
        self.decay, self.commitment, self.dead_below = decay, commitment, dead_below
        self.register_buffer("codes", torch.zeros(size, dim))
        self.register_buffer("uses", torch.zeros(size))                      # moving average per batch
        self.register_buffer("sums", torch.zeros(size, dim))                 # of the vectors that chose it
        self.register_buffer("age", torch.tensor(0.0))                       # batches seen

    def assign(self, z):
        """z: (M, D) -> ids of the nearest codes (M,), by |z - e|^2 without |z|^2, the same for every code."""
        centre = self.codes.mean(0)                                          # as the origin: rounding then is smallest
        codes = self.codes - centre                                          # V, D
        return (codes.square().sum(1) - 2 * (z - centre) @ codes.t()).argmin(dim=1)

    def forward(self, z, weight):
        with torch.autocast(z.device.type, enabled=False):                   # distances need float32
            B, D, H, W = z.shape
            flat = z.float().permute(0, 2, 3, 1).reshape(-1, D)              # B H W, D
            if self.training:
                self.restart(flat.detach(), weight.flatten())
            ids = self.assign(flat.detach())                                 # B H W
            if self.training:
                self.update(flat.detach(), weight.flatten(), ids)
            q = self.codes[ids]                                              # B H W, D
            distance = (q - flat).square().mean(1).view(B, H, W)
            loss = self.commitment * (weight * distance).mean()              # pulls z to its code
            q = straight_through(flat, q).view(B, H, W, D).permute(0, 3, 1, 2)  # B, D, H, W
            return q.contiguous(), ids.view(B, H, W), loss

    @torch.no_grad()
    def update(self, z, weight, ids):
        """Online k-means: a code moves to sums / uses, moving averages over batches of the vectors that chose it, for
        the encoder moves; short ones at first (decay n / (9 + n) in batch n, up to self.decay), or they lag behind an
        encoder that has just begun to learn. It first adds 1 to `age`. z: (M, D); weight, ids: (M,)"""
        self.age += 1
        decay = (self.age / (9 + self.age)).clamp(max=self.decay)
        uses = torch.zeros_like(self.uses).index_add_(0, ids, weight)        # V
        sums = torch.zeros_like(self.sums).index_add_(0, ids, weight[:, None] * z)  # V, D
        self.uses.lerp_(all_reduce_sum(uses), 1 - decay)
        self.sums.lerp_(all_reduce_sum(sums), 1 - decay)
        self.codes.copy_(self.sums / self.uses[:, None].clamp(min=1e-6))

    @torch.no_grad()
    def restart(self, z, weight):
        """Dead codes, used less than dead_below times the mean (the batch's weight / V), start anew at vectors of the
        batch, drawn by weight, plus noise of 1 % of their deviation in each dimension. They count as used as often as
        the mean. At first all are dead. z: (M, D); weight: (M,)"""
        mean_uses = all_reduce_sum(weight.sum()) / len(self.uses)
        dead = self.uses < self.dead_below * mean_uses                       # V
        vectors = sample_vectors(z, weight, len(self.uses))                  # up to V, D
        fresh = vectors[(dead.cumsum(0) - 1) % len(vectors)]                 # V, D; to dead codes, one after the other
        fresh = fresh + 0.01 * fresh.std(0, correction=0) * torch.randn_like(fresh)  # rounding must not decide ties
        self.codes.copy_(torch.where(dead[:, None], fresh, self.codes))
        self.uses.copy_(torch.where(dead, mean_uses, self.uses))
        self.sums.copy_(torch.where(dead[:, None], fresh * mean_uses, self.sums))


# ------------------------------------------------------------------------------------------------
# 4  Encoder, decoder, DQVAE (the VQGAN trunk, with one head per granularity)

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
        qkv = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)              # B, H W, 3 c
        q, k, v = qkv[:, None].chunk(3, dim=-1)                              # each B, 1, H W, c; 1 head
        y = F.scaled_dot_product_attention(q, k, v)[:, 0]                    # B, H W, c
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
        self.levels_of = [f.bit_length() - 1 for f in config.factors]        # level i has downsampling factor 2^i
        widths = [config.level_width(i) for i in range(self.levels_of[0] + 1)]
        self.stem = nn.Conv2d(3, config.width, 3, padding=1)
        self.levels = nn.ModuleList(make_level(config, i, c_in, config.encoder_blocks)
                                    for i, c_in in enumerate([config.width, *widths[:-1]]))
        self.downs = nn.ModuleList(nn.Conv2d(c, c, 3, stride=2) for c in widths[:-1])
        self.heads = nn.ModuleList()                                         # from the trunk to a granularity's map
        for c in [widths[i] for i in self.levels_of]:
            self.heads.append(nn.Sequential(ResBlock(c, c), AttnBlock(c), ResBlock(c, c), norm(c), nn.SiLU(),
                                            nn.Conv2d(c, config.channels, 3, padding=1)))

    def forward(self, x):
        h = self.stem(x)                                                     # B, width, S, S
        maps = {}
        for i, level in enumerate(self.levels):
            h = level(h)                                                     # B, c_i, S/2^i, S/2^i
            if i in self.levels_of:
                maps[i] = self.heads[self.levels_of.index(i)](h)             # B, Z, S/2^i, S/2^i
            if i < len(self.downs):
                h = F.pad(h, (0, 1, 0, 1))                                   # right and below only, as in VQGAN
                h = self.downs[i](h)                                         # B, c_i, S/2^(i+1), S/2^(i+1)
        return [maps[i] for i in self.levels_of]


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
        top = config.factors[-1].bit_length() - 1
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


def upsample(x, side):
    """Repeat every cell of (..., h, h) so that the side becomes `side`, a multiple of h."""
    n = side // x.shape[-1]
    return x.repeat_interleave(n, -2).repeat_interleave(n, -1) if n > 1 else x


class VAEOutput(NamedTuple):
    reconstruction: torch.Tensor         # B, 3, S, S
    codes: torch.Tensor                  # B, H, W
    grains: torch.Tensor                 # B, h, w
    gate: torch.Tensor                   # B, K, h, w
    commitment: torch.Tensor             # scalar
    maps: list                           # the encoder's, K x (B, Z, H_k, W_k)


class DQVAE(nn.Module):
    """Images (B, 3, S, S) in [-1, 1] to variable-length codes and back. K = 1 is the fixed-length VQGAN tokenizer."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.router = ROUTERS[config.router](config)
        self.pre_quant = nn.Conv2d(config.channels, config.code_dim, 1)
        self.codebook = Codebook(config.codebook_size, config.code_dim)
        self.post_quant = nn.Conv2d(config.code_dim, config.channels, 1)

    def mix(self, maps, gate):
        """sum_k gate_k map_k on the finest grid; the gradient reaches every gate. -> (B, Z, H, W)"""
        side = maps[-1].shape[-1]
        return sum(upsample(gate[:, k:k + 1], side) * upsample(m, side) for k, m in enumerate(maps))

    def cell_weight(self, gate):
        """1 / (how many cells of the finest grid share a code), no gradient. gate: (B, K, h, w) -> (B, H, W)"""
        share = [(self.config.factors[-1] / f) ** 2 for f in self.config.factors]
        weight = sum(share[k] * gate.detach()[:, k:k + 1] for k in range(len(share)))  # B, 1, h, w
        return upsample(weight, self.config.size // self.config.factors[-1])[:, 0]  # B, H, W

    def quantize(self, x, noise=1.0):
        """Image -> quantised grid (B, D, H, W), codes, gate, commitment loss, the encoder's maps."""
        maps = self.encoder(x)
        gate = self.router(x, maps, noise)                                   # B, K, h, w
        z = self.pre_quant(self.mix(maps, gate))                             # B, D, H, W
        q, codes, commitment = self.codebook(z, self.cell_weight(gate))
        return q, codes, gate, commitment, maps

    def forward(self, x, noise=1.0):
        q, codes, gate, commitment, maps = self.quantize(x, noise)
        reconstruction = self.decoder(self.post_quant(q))                    # B, 3, S, S
        return VAEOutput(reconstruction, codes, gate.argmax(dim=1), gate, commitment, maps)

    def encode(self, x):
        _, codes, gate, *_ = self.quantize(x)
        return codes, gate.argmax(dim=1)                                     # B, H, W; B, h, w

    def decode(self, codes):
        q = self.codebook.codes[codes].permute(0, 3, 1, 2).contiguous()      # B, D, H, W
        return self.decoder(self.post_quant(q))                              # B, 3, S, S


# ------------------------------------------------------------------------------------------------
# 5  Sequences (the paper's stage 2: coarse to fine, position and content)

class Layout(nn.Module):
    """Between (codes, grains) and the sequence of (position, content) pairs of an image.

    Granularity k owns the position ids  offset_k + i  for cell i of its own grid, in raster order over the whole grid
    (as the authors number them), and then one EOS id; the next granularity's ids follow. So an id names granularity,
    place and order at once, and an image's sequence is its codes *sorted by id*, the EOS ids among them: coarse codes
    first, each granularity row by row. The last EOS goes on for ever, an ordinary token that is certain and so costs
    nothing. The content of an EOS is -1.

    Example, 2 x 2 regions of which the second is fine (factors 2 and 1, 4 x 4 pixels):
        grains   codes      ids: coarse 0 to 3, EOS 4; fine 5 to 8 (first row), 9 to 12, 13 to 16, 17 to 20, EOS 21
        0 1      a a b c    position  0  2  3  4   7  8 11 12  21
        0 0      a a d e    content   a  f  g  -1  b  c  d  e  -1      and then (21, -1) up to max_len
                 f f g g
                 f f g g
    """
    name = "coarse to fine, row by row"                                      # checkpoints say what their ids mean

    def __init__(self, size, factors):
        super().__init__()
        check_factors(size, factors)
        self.sides = [size // f for f in factors]                            # of the grid of each granularity
        self.side, self.fine_side = self.sides[0], self.sides[-1]            # h, H
        self.n_regions = N = self.side ** 2
        self.cells = [(side // self.side) ** 2 for side in self.sides]       # s_k
        self.n_grains = K = len(factors)
        self.max_len = N * self.cells[-1] + K                                # all fine, and the EOS ids
        ends = list(itertools.accumulate(side ** 2 + 1 for side in self.sides))  # of the ids of each granularity
        self.offsets, self.eos = [0, *ends[:-1]], [end - 1 for end in ends]
        self.n_positions = P = ends[-1]
        self.end = P - 1                                                     # the last EOS

        grain = torch.zeros(P, dtype=torch.long)                             # granularity of an id
        region = torch.full((P,), N)                                         # its region; N for an EOS
        first_id = torch.arange(P)                                             # the first id of its region
        # row and column of a code's centre, in cells of the finest grid; 0, 0 for an EOS and, in row P, the start
        place = torch.zeros(P + 1, 2)
        for k, side in enumerate(self.sides):
            c, cells, first = side // self.side, torch.arange(side ** 2), self.offsets[k]
            row, column = cells // side, cells % side
            grain[first:self.eos[k] + 1] = k
            region[first:self.eos[k]] = row // c * self.side + column // c
            first_id[first:self.eos[k]] = first + row // c * c * side + column // c * c
            place[first:self.eos[k]] = (torch.stack([row, column], dim=1) + 0.5) * (self.fine_side / side)
        tables = dict(ids=torch.arange(P), grain=grain, region=region, first_id=first_id, coordinates=place,
                      is_eos=region == N, opens=first_id == torch.arange(P), finest=grain == K - 1)
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)

    def pack(self, codes, grains):
        """codes (B, H, W), grains (B, h, w) -> pos, code, each (B, max_len)."""
        covers = F.pad(grains.flatten(1), (0, 1))[:, self.region]            # B, P: granularity where an id lies
        there = self.is_eos | (covers == self.grain)                         # B, P
        pos, order = torch.where(there, self.ids, self.end).sort(dim=1)      # B, P: what is not there sorts last
        steps = [self.fine_side // side for side in self.sides]              # one code fills step x step cells
        code = torch.cat([F.pad(codes[:, ::step, ::step].flatten(1), (0, 1), value=-1) for step in steps], 1)  # B, P
        code = code.masked_fill(~there, -1).gather(1, order)
        return pos[:, :self.max_len], code[:, :self.max_len]

    def unpack(self, pos, code):
        """pos, code (B, L) -> codes (B, H, W), grains (B, h, w); -1 in what is not there (yet)."""
        canvas = pos.new_full((len(pos), self.n_positions), -1).scatter(1, pos, code)  # B, P: a content per id
        grains = self.grains(pos).view(-1, self.side, self.side)             # B, h, w
        blocks = [canvas[:, o:o + side ** 2].view(-1, side, side) for o, side in zip(self.offsets, self.sides)]
        codes = torch.stack([upsample(block, self.fine_side) for block in blocks], dim=1)  # B, K, H, W
        here = upsample(grains, self.fine_side).clamp(min=0)[:, None]        # B, 1, H, W; nothing there: all are -1
        return codes.gather(1, here)[:, 0], grains

    def grains(self, pos):
        """Granularity of the regions that the ids pos (B, L) cover, -1 elsewhere. -> (B, N)"""
        known = torch.full((len(pos), self.n_regions + 1), -1, device=pos.device)
        return known.scatter(1, self.region[pos], self.grain[pos])[:, :-1]   # EOS wrote to a spare column

    def lengths(self, pos):
        """Pairs up to and with the last EOS. pos (B, L) -> (B,)"""
        return (pos != self.end).sum(1) + 1

    def legal(self, prev, grains):
        """Which position ids may follow. prev: (B,) or (B, L) ids, -1 at the start; grains: (B, N) granularities known
        so far, -1 elsewhere -> mask (B, P) or (B, L, P).

        All that may come lies ahead, in the granularity that is being written. There a region is open from its first
        cell on, and its other cells then are *due*. So may come: the first cell that is due, or EOS if none is; before
        that, whatever *opens* a region that nothing covers yet; but in the finest granularity, which must leave no
        hole, nothing past the first of those. In the class's example 0 may be followed by 1, 2, 3, 4; 7 by 8 alone; 8,
        since region 1 goes on in the next row, by 11 alone. *Final* grains, as in training, give the same mask: of
        regions that are not open yet, coarser ones were there before, and all others count as free."""
        following = (prev + 1).clamp(max=self.end)[..., None]                # B, (L,) 1
        taken = F.pad(grains % (self.n_grains + 1), (0, 1), value=self.n_grains)  # B, N + 1: K where nothing covers
        taken = taken.gather(1, self.region.expand(len(grains), -1))         # B, P
        taken = taken if prev.dim() == 1 else taken[:, None]                 # B, (1,) P
        ahead = (self.ids >= following) & (self.grain == self.grain[following])  # B, (L,) P
        due = ahead & (taken == self.grain) & (self.first_id < following)
        opens = ahead & (taken >= self.grain) & self.opens                   # EOS, the last one, is among these
        stops = due | opens & self.finest                                    # what can't be passed over
        return (due | opens) & (self.ids <= torch.where(stops, self.ids, self.end).amin(-1, keepdim=True))


# ------------------------------------------------------------------------------------------------
# 6  DQ-Transformer (the paper's stage 2: Position-Transformer and Content-Transformer)

def add_linear(x, layer, y):
    """x + layer(y), one pair in every row, by one kernel. x: (B, 1, C), y: (B, 1, n), layer: without bias"""
    return torch.addmm(x[:, 0], y[:, 0], layer.weight.t())[:, None]          # B, 1, C


def attention(q, k, v, mask=None, dropout=0.0):
    """softmax(q k^T / sqrt(d) + mask) v; causal when there is no mask. q: (B, heads, L, d); k, v: (B, heads, M, d)"""
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None)  # B, heads, L, d
    # written out: on CPUs a training step with the fused kernel takes twice as long
    if mask is None:
        mask = torch.full((q.shape[2], k.shape[2]), -math.inf, dtype=q.dtype, device=q.device).triu(1)  # L, M
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + mask).softmax(-1)  # B, heads, L, M
    return F.dropout(weights, dropout) @ v                                   # B, heads, L, d


def rope_table(place, d):
    """Angles of a rotary embedding by place, for `apply_rope`: places (n, 2) -> (n, 2, d). (Su et al., "RoFormer", 2021)
    Each of the d / 2 planes turns by row or column times a frequency, 1 to 1 / 10, as grids of codes are small: so a
    product of query and key depends on how far apart in the picture they are, and place 0, 0 is not turned."""
    frequency = 10.0 ** -(torch.arange(d // 4) / (d // 4))                   # d/4
    angle = (place[:, :, None] * frequency).flatten(1)                       # n, d/2: by the row, by the column
    return torch.stack([angle.cos().repeat(1, 2), torch.cat([-angle.sin(), angle.sin()], dim=1)], dim=1)


def apply_rope(x, turns):
    """Turn the planes of channels i and i + d/2 of x (..., d), by cosines and signed sines (..., 2, d)."""
    cos, sin = turns.type_as(x).unbind(-2)                                   # each ..., d
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)    # ..., d


class Block(nn.Module):
    """Pre-norm transformer block. In training causal over a whole sequence; in sampling a step over a cache."""
    def __init__(self, config):
        super().__init__()
        C = config.width
        self.heads, self.dropout, self.qk_norm = config.heads, config.dropout, config.qk_norm
        self.norm1, self.norm2 = nn.LayerNorm(C, bias=False), nn.LayerNorm(C, bias=False)
        self.qkv, self.proj = nn.Linear(C, 3 * C, bias=False), nn.Linear(C, C, bias=False)
        self.up, self.down = nn.Linear(C, 4 * C, bias=False), nn.Linear(4 * C, C, bias=False)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, turns=None, cache=None, at=None, mask=None):
        """x: (B, L, C) -> (B, L, C). turns: (B, L, 3, 1, 2, d), by which queries, keys, values are rotated, or None.
        In sampling L = 1. cache (2, B, heads, M, d): the keys and values of the pairs so far; it takes those of x too,
        at the rows and places `at`, (B,) and (B,). mask (B, heads, 1, M): -inf where attention is not to look."""
        B, L, C = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, L, 3, self.heads, C // self.heads)
        if self.qk_norm:
            qk, v = qkv.split([2, 1], dim=2)                                 # B, L, 2, heads, d; B, L, 1, heads, d
            qkv = torch.cat([F.layer_norm(qk, qk.shape[-1:]).type_as(v), v], dim=2)  # B, L, 3, heads, d
        if turns is not None:
            qkv = apply_rope(qkv, turns)                                         # B, L, 3, heads, d
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                 # each B, heads, L, d
        if cache is None:
            y = attention(q, k, v, dropout=self.dropout if self.training else 0.0)  # B, heads, L, d
            x = x + self.drop(self.proj(y.transpose(1, 2).reshape(B, L, C)))  # B, L, C
            return x + self.drop(self.down(F.gelu(self.up(self.norm2(x)))))
        cache[:, at[0], :, at[1]] = qkv[:, 0, 1:]                            # B, 2, heads, d
        y = attention(q, *cache, mask)                                       # B, heads, 1, d
        x = add_linear(x, self.proj, y.view(B, 1, C))                        # B, 1, C
        return add_linear(x, self.down, F.gelu(self.up(self.norm2(x))))


class DQTransformer(nn.Module):
    """p(image) = prod_t p(pos_t | before) p(code_t | before, pos_t): where, then what, by two stacks. Each factor sums
    to 1 over what may come at its step, and every legal walk ends in a complete tiling, so the product sums to 1 over
    all images. Position comes first: a content needs to know its place and size."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.layout = Layout(config.size, config.factors)
        C, V, P, self.n_classes = config.width, config.codebook_size, self.layout.n_positions, len(config.classes)
        if config.rotary:
            self.register_buffer("turns", rope_table(self.layout.coordinates, C // config.heads), persistent=False)
        self.content = nn.Embedding(V + 1, C)                                # the last row is the content of an EOS
        self.position = nn.Embedding(P, C)
        self.granularity = nn.Embedding(self.layout.n_grains, C)
        self.order = nn.Embedding(self.layout.max_len, C)
        self.condition = nn.Embedding(self.n_classes + 1, C)                 # the last row: no label, the start vector
        self.drop = nn.Dropout(config.dropout)
        self.position_stack = nn.ModuleList(Block(config) for _ in range(config.position_layers))
        self.content_stack = nn.ModuleList(Block(config) for _ in range(config.content_layers))
        self.position_norm, self.position_head = nn.LayerNorm(C, bias=False), nn.Linear(C, P, bias=False)
        self.content_norm, self.content_head = nn.LayerNorm(C, bias=False), nn.Linear(C, V, bias=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:                                            # branches and predictions begin as nothing
                zero = name.endswith(("proj.weight", "down.weight", "head.weight"))
                nn.init.normal_(weight, std=0.0 if zero else 0.02)

    def embed(self, pos, code):
        """A pair as a vector: content, shared by the granularities, + position, a row per id, + granularity.
        pos, code (...) -> (..., C)"""
        content = self.content(code % (self.config.codebook_size + 1))       # that of an EOS, -1, is the last row
        return content + self.position(pos) + self.granularity(self.layout.grain[pos])

    def rope_of(self, queries, keys):
        """How a block rotates queries and keys that belong to these position ids, (B, L), -1 for the start."""
        if self.config.rotary:                                               # values stay, as if at the start
            ids = torch.stack([queries, keys, torch.full_like(keys, -1)], dim=-1)  # B, L, 3
            return self.turns[ids][:, :, :, None]                            # B, L, 3, 1, 2, d

    def logits(self, pos, code, label=None):
        """pos, code (B, L), label (B,), -1 or None: no label -> position logits (B, L, P), -inf where not legal, and
        content logits (B, L, V). Entry t depends on the label and the pairs before t, of contents on pos[:, t] too.
        To the t-th input of the position stack, the label's or a pair's vector, `order` adds row t; dropout follows."""
        B, L = pos.shape
        label = torch.full_like(pos[:, 0], -1) if label is None else label
        if self.training:
            hide = torch.rand(B, device=pos.device) < self.config.label_dropout
            label = torch.where(hide, -1, label)
        start = self.condition(label % (self.n_classes + 1))[:, None]        # B, 1, C; that of -1 is the last row
        x = torch.cat([start, self.embed(pos[:, :-1], code[:, :-1])], dim=1)  # B, L, C
        h = self.drop(x + self.order.weight[:L])
        prev = F.pad(pos[:, :-1], (1, 0), value=-1)                          # B, L
        turns = self.rope_of(prev, prev)                                    # entry t holds the pair before t
        for block in self.position_stack:
            h = block(h, turns)                                              # B, L, C
        legal = self.layout.legal(prev, self.layout.grains(pos))             # B, L, P
        position = self.position_head(self.position_norm(h)).float()         # B, L, P
        h = h + self.position(pos)                                           # now it knows where,
        turns = self.rope_of(pos, prev)                                     # and looks around from there
        for block in self.content_stack:
            h = block(h, turns)
        content = self.content_head(self.content_norm(h)).float()            # B, L, V
        return position.masked_fill(~legal, -math.inf), content

    def forward(self, pos, code, label=None):
        """-> {"position": (B,), "content": (B,)}: negative log-likelihoods of the images, in nats."""
        position, content = self.logits(pos, code, label)
        nll = dict(position=F.cross_entropy(position.flatten(0, 1), pos.flatten(), reduction="none"),  # B L
                   content=F.cross_entropy(content.flatten(0, 1), code.flatten(), reduction="none", ignore_index=-1))
        return {name: each.view(pos.shape).sum(1) for name, each in nll.items()}  # 0 where forced, 0 at EOS


# ------------------------------------------------------------------------------------------------
# 7  Sampling

class SampleOptions(NamedTuple):
    """Guidance, unlabelled + cfg (labelled - unlabelled), and temperature on both draws; top-k, top-p on contents."""
    temperature: float = 1.0
    top_k: int = 0                       # 0: all
    top_p: float = 1.0
    cfg: float = 1.0                     # 1: no guidance

    def check(self):
        require(1e-6 <= self.temperature <= 1e6, f"temperature must lie in 1e-6 to 1e6, not {self.temperature}")
        require(self.top_k >= 0, f"top-k must be at least 0 (0: all), not {self.top_k}")
        require(0 < self.top_p <= 1, f"top-p must be above 0 and at most 1, not {self.top_p}")
        require(0 <= self.cfg <= 1e6, f"cfg must lie in 0 to 1e6, not {self.cfg}")


def filter_logits(logits, top_k, top_p):
    """-inf for all but the k likeliest, ties included, and of these, renormalised, the fewest that reach p. (B, V)"""
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    if top_p < 1:
        probs, order = logits.softmax(-1).sort(-1, descending=True)
        surplus = probs.cumsum(-1) - probs >= top_p                          # already reached without this one
        logits = logits.masked_fill(torch.zeros_like(surplus).scatter(1, order, surplus), -math.inf)
    return logits


def draw(logits, u):
    """The first entry whose cumulated probability reaches u times the sum. logits (B, n), u (B,) in (0, 1] -> (B,)"""
    p = logits.softmax(-1)                                                   # B, n
    cdf = p.cumsum(-1).masked_fill(p == 0, 0.0)                              # what can't be drawn is never reached
    reached = cdf >= u[:, None] * cdf.amax(-1, keepdim=True)                 # the largest is 1, but for rounding
    return reached.int().argmax(-1)                                          # B: the first of those


class Job(NamedTuple):
    """What is wanted, n images. Row n is for slots that have run out of images; what they write is thrown away."""
    condition: torch.Tensor              # n + 1, 1 or, with guidance, 2: rows of the condition embedding
    uniform: torch.Tensor                # n + 1, L, 2: what decides the draws of position and content
    given: torch.Tensor                  # n + 1, L, 2: position and content, -1 where they are to be drawn; or None
    options: SampleOptions


class State(NamedTuple):
    """What changes while B slots write images; R = B rows, or 2 B with guidance: labelled, then unlabelled."""
    cache: list                          # for each layer its keys and values: 2, R, heads, M, d
    image: torch.Tensor                  # B: which image the slot is writing; n when there is none left
    newest: torch.Tensor                 # scalar: the last image that a slot has begun
    t: torch.Tensor                      # B: number of the pair that comes next
    last: torch.Tensor                   # B: position of the pair before, -1 at the start
    last_code: torch.Tensor              # B: its content
    grains: torch.Tensor                 # B, N + 1: granularities known so far; in the last column EOS ids write
    pos: torch.Tensor                    # n + 1, L: the images; the end id where nothing is written
    code: torch.Tensor                   # n + 1, L


def make_job(model, label, options, seed, given, first, copies):
    """The job of `generate`, whose arguments these are. copies: 2 with guidance"""
    n, L, device = len(label), model.layout.max_len, label.device
    # each image has a generator of its own, so its draws depend on the seed and its number, and on nothing else
    uniform = [1 - numpy_rng(seed, i).random((L, 2), np.float32)        # 1 - [0, 1) is (0, 1]
               for i in range(first, first + n + 1)]
    condition = torch.stack([label, torch.full_like(label, -1)], dim=1)[:, :copies] % (model.n_classes + 1)
    given = given and F.pad(torch.stack(given, dim=-1), (0, 0, 0, 0, 0, 1), value=-1)  # n + 1, L, 2
    return Job(F.pad(condition, (0, 0, 0, 1)), torch.from_numpy(np.stack(uniform)).to(device), given, options)


def first_state(model, n, slots, rows, end, device):
    """In front of the first step, with caches for `end` pairs."""
    config, layout = model.config, model.layout
    cache = model.order.weight.new_zeros(2, rows, config.heads, end, config.width // config.heads)
    with device:
        return State([cache.clone() for _ in range(config.position_layers + config.content_layers)],
                     image=torch.arange(slots), newest=torch.full((), slots - 1), t=torch.full((slots,), 0),
                     last=torch.full((slots,), -1), last_code=torch.full((slots,), -1),
                     grains=torch.full((slots, layout.n_regions + 1), -1),
                     pos=torch.full((n + 1, layout.max_len), layout.end), code=torch.full((n + 1, layout.max_len), -1))


def guided(logits, options, B):
    """Logits (R, 1, n) of labelled and, with guidance, unlabelled rows -> (B, n), divided by the temperature."""
    logits = logits[:, 0].float()                                            # R, n
    if len(logits) > B:
        labelled, unlabelled = logits.chunk(2)
        logits = unlabelled + options.cfg * (labelled - unlabelled)
    return logits / options.temperature                                      # B, n


def decode_one(model, job, state, end):
    """Write one more pair of the image in every slot. Attention sees `end` places of the cache, more than any t.
    Changes nothing but `state`, in place, and never asks the device for a value, so it can be captured as a graph."""
    options, image, t = job.options, state.image, state.t
    B, R = len(t), state.cache[0].shape[1]
    u = job.uniform[image, t].unbind(1)                                      # 2 x (B,)
    given = (None, None) if job.given is None else job.given[image, t].unbind(1)  # 2 x (B,)

    def twice(x):
        return torch.cat([x, x]) if R > B else x                             # R, ...: for labelled and unlabelled rows
    def unless_given(drawn, given):
        return drawn if given is None else torch.where(given < 0, drawn, given)  # B

    # embed the last pair, or at the start the condition
    condition = model.condition(job.condition[image].t().flatten())          # R, C
    at, last = (torch.arange(R, device=t.device), twice(t)), twice(state.last)
    pair = twice(model.embed(state.last.clamp(min=0), state.last_code))      # R, C
    h = torch.where((twice(t) == 0)[:, None], condition, pair)
    h = (h + model.order(twice(t)))[:, None]                                 # R, 1, C
    future = torch.arange(end, device=t.device) > at[1][:, None, None, None]  # R, 1, 1, M
    mask = torch.zeros(R, model.config.heads, 1, end, dtype=h.dtype, device=t.device).masked_fill(future, -math.inf)
    caches = [cache[..., :end, :] for cache in state.cache]

    # where: position stack, then one draw among the legal ids
    turns = model.rope_of(last[:, None], last[:, None])
    for block, cache in zip(model.position_stack, caches):
        h = block(h, turns, cache, at, mask)                                 # R, 1, C
    logits = guided(model.position_head(model.position_norm(h)), options, B)  # B, P
    logits = logits.masked_fill(~model.layout.legal(state.last, state.grains[:, :-1]), -math.inf)
    pos = unless_given(draw(logits, u[0]), given[0])                         # B

    # what: content stack, then one draw
    h = h + model.position(twice(pos))[:, None]                              # R, 1, C
    turns = model.rope_of(twice(pos)[:, None], last[:, None])
    for block, cache in zip(model.content_stack, caches[len(model.position_stack):]):
        h = block(h, turns, cache, at, mask)
    logits = guided(model.content_head(model.content_norm(h)), options, B)   # B, V
    code = draw(filter_logits(logits, options.top_k, options.top_p), u[1])   # B
    code = unless_given(code, given[1]).masked_fill(model.layout.is_eos[pos], -1)
    write(model.layout, state, pos, code)


def write(layout, state, pos, code):
    """Store a pair (B,), (B,) of each slot's image. Behind its last EOS a slot goes on with the next image: slots that
    end together take consecutive ones."""
    state.pos[state.image, state.t], state.code[state.image, state.t] = pos, code
    state.grains.scatter_(1, layout.region[pos][:, None], layout.grain[pos][:, None])
    done = pos == layout.end                                                 # B
    among_done = done.cumsum(0)                                              # B: 1, 2, ...
    n = len(state.pos) - 1
    torch.where(done, state.newest + among_done, state.image, out=state.image).clamp_(max=n)
    state.newest.add_(among_done[-1])
    state.t.add_(1).masked_fill_(done, 0)
    state.last.copy_(pos.masked_fill(done, -1))
    state.last_code.copy_(code)
    state.grains.masked_fill_(done[:, None], -1)


def plain_steps(step, model, job, state):
    """-> a function that takes a step with room for `end` pairs. The caches grow, and shrink by half, to fit: CPUs read
    caches without gaps up to three times faster than slices."""
    def take(end):
        nonlocal state
        size = state.cache[0].shape[3]
        if end > size or end <= size // 2:                                   # a negative padding crops
            state = state._replace(cache=[F.pad(old, (0, 0, 0, end - size)) for old in state.cache])
        step(model, job, state, state.cache[0].shape[3])
    return take


def captured_steps(step, model, job, state):
    """The same, by CUDA graphs, one for each `end`. They read memory that stays where it is."""
    graphs, pool, stream = {}, torch.cuda.graph_pool_handle(), torch.cuda.Stream(state.t.device)
    def take(end):
        if end in graphs:
            return graphs[end].replay()
        step(model, job, state, end)                                         # a step like any other, and the warm-up of
        graphs[end] = torch.cuda.CUDAGraph()                                 # the capture, which computes nothing
        with torch.cuda.graph(graphs[end], pool=pool, stream=stream):
            step(model, job, state, end)
    return take


@torch.inference_mode()
def generate(model, label, options=SampleOptions(), seed=0, given=None, slots=None, first=0, graphs=None, bucket=None,
             sync_every=None, compile=False):
    """Draw images. label: (n,) classes, -1 for none -> pos, code, each (n, max_len); Layout.unpack reads them.
    given: optional (pos, code), each (n, max_len), -1 where it is to be drawn; positions that are given come first.
    slots: how many images are written at a time (None: all); a slot whose image is complete takes the next, so the
    cost follows the mean length. Image i depends on its label, the seed and first + i alone.
    For speed. bucket: attention sees a part of the cache that grows by so many places. graphs (None: on GPUs): for each
    such size a step is captured as a CUDA graph when first needed. sync_every: steps between the host's looks."""
    options.check()
    n, L, device = len(label), model.layout.max_len, label.device
    require((label < max(1, model.n_classes)).all(), f"labels must be below {model.n_classes}, the number of classes")
    in_front = given is None or ((given[0] < 0).int().diff(dim=1) >= 0).all()  # what is left can then be tiled
    require(in_front, "given positions must stand in front of those that are to be drawn")
    graphs = device.type == "cuda" if graphs is None else graphs
    bucket, sync_every = bucket or (128 if graphs else 32), sync_every or (32 if graphs else 1)
    step, slots = torch.compile(decode_one) if compile else decode_one, max(1, min(n, slots or n))
    copies = 2 if options.cfg != 1 and model.n_classes else 1
    with torch.cuda.device_of(label), torch.autocast(device.type, enabled=False):
        job = make_job(model, label, options, seed, given, first, copies)
        state = first_state(model, n, slots, copies * slots, -(-L // bucket) * bucket if graphs else bucket, device)
        take = (captured_steps if graphs else plain_steps)(step, model, job, state)
        furthest = 0                                                         # no slot is further than this
        for n_steps in itertools.count(1):
            take((furthest // bucket + 1) * bucket)
            furthest = min(furthest + 1, L - 1)
            if n_steps % sync_every == 0:
                least, furthest = torch.stack([state.image.min(), state.t.max()]).tolist()
                if least == n:                                               # every slot has run out of images
                    return state.pos[:n], state.code[:n]


# ------------------------------------------------------------------------------------------------
# 8  Checkpoints

def write_file(path, save):
    """save(file) under another name first, so that whatever fails or stops leaves the older file whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            save(file)
            file.flush()
            os.fsync(file)
        os.replace(temporary, path)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"could not write {path} ({reason}); what was there before is whole") from None
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path, kind, config, model, **state):
    """One file: kind, config as a plain dict, weights, and whatever a trainer needs to go on."""
    checkpoint = dict(kind=kind, layout=Layout.name, config=asdict(config), weights=model.state_dict(), **state)
    write_file(path, lambda file: torch.save(checkpoint, file))


def load_checkpoint(path, kind):
    """-> the dict that was saved, on the CPU. UserError when the file is not a checkpoint of this kind."""
    maker = "train_transformer.py" if kind == "dq-transformer" else "train_vae.py"
    require(os.path.isfile(path), f"no such file: {path} ({maker} writes it)")
    try:
        with zipfile.ZipFile(path) as archive:
            require(archive.testzip() is None, "a checksum is wrong")        # torch.load doesn't look at them
        checkpoint = torch.load(path, map_location="cpu", mmap=kind == "dq-codes", weights_only=True)  # runs no code
        found = checkpoint.get("kind", "something else")
    except Exception as error:
        raise UserError(f"{path} is not a checkpoint, or is damaged ({type(error).__name__})") from None
    require(found == kind, f"{path} holds {found}; a {kind} is needed ({maker} writes it)")
    if kind == "dq-transformer":
        layout = checkpoint.get("layout", "of an older version")
        require(layout == Layout.name, f"{path} was trained on sequences in another order ({layout}) than is read here "
                                       f"({Layout.name}); {maker} trains a new one")
    return checkpoint


def rebuild(model_class, config_class, config, weights, device):
    """A saved model for use, not for training. config: the dict that was saved"""
    try:
        model = model_class(config_class(**config))
        model.load_state_dict(weights)
    except (TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"the checkpoint is damaged or of another version ({str(error).splitlines()[0]})") from None
    return model.to(device).eval().requires_grad_(False)


def load_vae(path, device):
    saved = load_checkpoint(path, "dq-vae")
    return rebuild(DQVAE, VAEConfig, saved.get("config"), saved.get("weights"), device)


def load_transformer(path, device):
    """-> DQTransformer and the DQVAE that its checkpoint carries."""
    saved = load_checkpoint(path, "dq-transformer")
    return (rebuild(DQTransformer, TransformerConfig, saved.get("config"), saved.get("weights"), device),
            rebuild(DQVAE, VAEConfig, saved.get("vae_config"), saved.get("vae_weights"), device))


# ------------------------------------------------------------------------------------------------
# 9  Several processes

def rank_world():
    """-> number of this process, how many share a batch under torchrun: 0, 1 without it."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def all_reduce_sum(x):
    """Sum of a tensor over the processes, without a gradient."""
    if rank_world()[1] > 1:
        x = x.detach().clone()
        dist.all_reduce(x)
    return x


def sample_global(fill, shape, device):
    """Random numbers (B, ...) for the images of this process. Every process draws the same, for the whole batch, and
    takes its part: together they have what one would have. fill: torch.Tensor.uniform_, say"""
    rank, world = rank_world()
    return fill(torch.empty(world * shape[0], *shape[1:], device=device)).chunk(world)[rank]


def sample_vectors(z, weight, n):
    """Vectors z (M, D) of all processes, drawn by weight (M,), none twice: n of them, or all -> (up to n, D)"""
    (rank, world), M = rank_world(), len(z)
    weights = torch.zeros(world, M, device=z.device)
    weights[rank] = weight.nan_to_num(1.0)                                   # if the loss is NaN, the trainer says so
    chosen = torch.multinomial(all_reduce_sum(weights).view(-1), min(n, world * M))   # n
    mine = (chosen // M == rank)[:, None]                                    # n, 1
    return all_reduce_sum(torch.where(mine, z[chosen % M], 0))                        # n, D: each came from one process


def numpy_rng(*seeds):
    """numpy's generator for whole numbers below 2^64, each as two words: so no others, as many, make the same one."""
    return np.random.default_rng([seed % 2 ** 32 for seed in seeds] + [seed >> 32 for seed in seeds])
