"""Dynamic vector quantization: images as variable-length sequences of codes (tokens), and a transformer for them.

An implementation of Huang, Mao, Chen, Zhang, "Towards Accurate Image Coding: Improved Autoregressive Image Generation
with Dynamic Vector Quantization", CVPR 2023 (arXiv 2305.11718). The sections:
    1  configuration                  hyperparameters of the two models
    2  dynamic grained coding         routers choose a granularity for every region; the budget loss
    3  codebook                       shared by all granularities, EMA updates
    4  encoder, decoder, DQVAE        image -> codes and granularities -> image
    5  sequences                      Layout: codes and granularities <-> (position, content) pairs
    6  DQ-Transformer                 a position stack and, on top of it, a content stack
    7  sampling                       a simple loop, then continuous batching with a KV cache
    8  checkpoints                    atomic writes, safe loading
    9  distributed training           helpers; with one process, all_gather(x) and all_reduce_sum(x) return x

Notation used throughout:
    B batch size   K granularities, k = 0 the coarsest   N regions = cells of the coarsest grid, h x w
    s_k codes per region at granularity k (1, 4, 16)   H x W the finest grid   S image side
    Z encoder channels   D code dimension   V codebook size   P position ids   L sequence length   C transformer width
    d dimension of a head   M entries of the KV cache in use   R rows: B, or 2 B with guidance   n number of items
    -1 marks "none": no label, start, EOS content, unknown granularity
    grains (B, h, w) granularity of each region   codes (B, H, W) codebook ids on the finest grid, coarse ones repeated
"""
import itertools
import math
import os
import zipfile
import zlib
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F


# ---- 1  Configuration --------------------------------------------------------------------------

class UserError(ValueError):
    """An error that the user can fix. The message is a single line."""


def require(condition, message):
    if not condition:
        raise UserError(message)


def check_factors(size, factors):
    """Raise UserError unless the factors are powers of two, coarse to fine, and fit an image of this size."""
    powers = factors and all(f >= 1 and f & (f - 1) == 0 for f in factors)
    require(powers, f"factors must be powers of two, not {factors}")
    require(all(a > b for a, b in zip(factors, factors[1:])), f"factors must decrease, coarse to fine, not {factors}")
    require(size > 0 and size % factors[0] == 0, f"size {size} is not a multiple of the largest factor {factors[0]}")


@dataclass
class VAEConfig:
    """Hyperparameters that define a DQVAE (stage 1)."""
    size: int = 32                       # side of the square images, in pixels
    factors: tuple = (8, 4)              # downsampling factor of each granularity, coarse to fine
    ratios: tuple = (0.5, 0.5)           # target fraction of regions per granularity
    router: str = "learned"              # learned | entropy | random | dial; see section 2
    codebook_size: int = 256             # V
    code_dim: int = 8                    # D
    channels: int = 64                   # Z, channels of the encoder's maps and of the decoder's input
    width: int = 32                      # base number of channels; see multipliers
    multipliers: tuple = (1, 1, 2)       # channel multiplier at downsampling factor 1, 2, 4, ...; the last one repeats
    encoder_blocks: int = 1              # residual blocks per level
    decoder_blocks: int = 1
    attention_from: int = 4              # self-attention at factors >= this; always in Encoder.heads, Decoder.mid

    def __post_init__(self):
        self.factors, self.ratios, self.multipliers = tuple(self.factors), tuple(self.ratios), tuple(self.multipliers)
        check_factors(self.size, self.factors)
        K = len(self.factors)
        require(len(self.ratios) == K, f"{K} factors need {K} ratios, coarse to fine, not {self.ratios}")
        sums_to_one = min(self.ratios) >= 0 and abs(sum(self.ratios) - 1) < 1e-6
        require(sums_to_one, f"ratios must be non-negative and sum to 1, not {self.ratios}")
        require(self.router in ROUTERS, f"router must be {' or '.join(ROUTERS)}, not {self.router!r}")
        require(min(self.codebook_size, self.code_dim) >= 1, "codebook_size and code_dim must be at least 1")
        require(self.channels % 32 == self.width % 32 == 0, "channels and width must be multiples of 32, for GroupNorm")

    def level_width(self, level):                                            # channels at downsampling factor 2**level
        return self.width * self.multipliers[min(level, len(self.multipliers) - 1)]


@dataclass
class TransformerConfig:
    """Hyperparameters that define a DQTransformer (stage 2)."""
    size: int = 32                       # size, factors and codebook_size are those of the DQ-VAE
    factors: tuple = (8, 4)
    codebook_size: int = 256
    classes: tuple = ()                  # class names; empty: unconditional
    width: int = 192                     # C
    heads: int = 6
    position_layers: int = 2
    content_layers: int = 4
    dropout: float = 0.0
    label_dropout: float = 0.1           # probability of dropping the label, for classifier-free guidance
    rotary: bool = True                  # 2-D RoPE; not in the paper
    qk_norm: bool = False                # QK-norm (ViT-22B) without learned scales; not in the paper

    def __post_init__(self):
        self.factors, self.classes = tuple(self.factors), tuple(self.classes)
        check_factors(self.size, self.factors)
        unit = self.heads * (4 if self.rotary else 1)
        require(unit > 0 and self.width % unit == 0, f"width {self.width} must be a multiple of {unit} (heads, RoPE)")


# ---- 2  Dynamic grained coding and the budget loss ----------------------------------------------
# Every router has score(x, maps) -> (B, h, w), higher for finer codes, and forward(x, maps, noise) -> gate
# (B, K, h, w), one-hot over K. x: images (B, 3, S, S); maps: the encoder's K feature maps; noise: Gumbel noise scale.

def norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


def one_hot(grains, n):
    """(B, h, w) -> (B, n, h, w), float."""
    return F.one_hot(grains, n).permute(0, 3, 1, 2).float()


class GrainRouter(nn.Module):
    """The paper's learned gate: normalise each map, average-pool it per region, and let an MLP choose."""
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
        """The expected granularity of each region, (B, h, w)."""
        p = self.logits(maps).softmax(dim=1)                                 # B, K, h, w
        return sum(k * p[:, k] for k in range(p.shape[1]))                   # B, h, w

    def forward(self, x, maps, noise=1.0):
        """In training, the gate is a hard Gumbel-softmax sample with scaled noise. In evaluation it is the argmax.
        Why it learns: the gate multiplies the maps (DQVAE.mix), so c_k = d loss / d gate_k estimates the cost of
        granularity k for a region. The backward pass uses p, the softmax of the noisy logits (straight-through):
        d loss / d logit_k = p_k (c_k - sum_j p_j c_j), so granularities of below-average cost become more likely.
        Unless the noise is annealed to zero (gumbel_scale), the argmax may miss the budget."""
        logits = self.logits(maps)                                           # B, K, h, w
        if not self.training:
            return one_hot(logits.argmax(dim=1), logits.shape[1])
        exponential = sample_global(torch.Tensor.exponential_, logits.shape, logits.device)  # B, K, h, w
        soft = (logits - noise * exponential.log()).softmax(dim=1)           # B, K, h, w; -log E is Gumbel noise
        hard = one_hot(soft.argmax(dim=1), logits.shape[1])
        return hard + (soft - soft.detach())                                 # B, K, h, w: exactly one-hot


def gumbel_scale(step, steps):
    """1 in the first half of training, then a linear decay to 0 at 90 %: the gate explores, then uses its argmax."""
    return min(1.0, max(0.0, (0.9 - step / steps) / 0.4))


class ThresholdRouter(nn.Module):
    """Base class: turns a subclass's score into granularities with K - 1 thresholds."""
    def __init__(self, thresholds):
        super().__init__()
        self.register_buffer("thresholds", thresholds)                       # K - 1

    def forward(self, x, maps, noise=1.0):
        grains = torch.bucketize(self.score(x, maps), self.thresholds)       # B, h, w; ties take the coarser one
        return one_hot(grains, len(self.thresholds) + 1)                     # B, K, h, w

    @torch.no_grad()
    def calibrate(self, ratios, images, encoder=lambda x: None):
        """Set the thresholds to quantiles of the scores over batches of training images (B, 3, S, S)."""
        scores = torch.cat([self.score(x, encoder(x)).flatten() for x in images])
        below = np.cumsum(ratios)[:-1].clip(0, 1)                            # K - 1: fraction below each threshold
        cuts = np.quantile(scores.cpu().numpy().astype(float), below)        # K - 1
        cuts = np.where(below < 1e-6, -1e9, np.where(below > 1 - 1e-6, 1e9, cuts))  # ratio 0: no regions
        self.thresholds.copy_(torch.from_numpy(cuts.astype(np.float32)))


class DialRouter(ThresholdRouter):
    """A dial for the budget: one learned score serves all ratios. It is trained with random ratios, so new thresholds
    change the sequence lengths without retraining. Not in the paper. scorer: a GrainRouter"""
    def __init__(self, ratios, scorer):
        super().__init__(torch.zeros(len(ratios) - 1))
        self.ratios, self.scorer = torch.tensor(ratios), scorer

    def score(self, x, maps):
        """The log-odds of the finest against the coarsest granularity, (B, h, w)."""
        logits = self.scorer.logits(maps)                                    # B, K, h, w
        return logits[:, -1] - logits[:, 0]                                  # B, h, w

    def forward(self, x, maps, noise=1.0):
        """In training, each image has its own ratios, 0.4 * target + 0.6 * random. The random ones come from
        Dirichlet(1/2), often near 0 or 1. The cuts are quantiles of the batch's noisy scores at these ratios, so no
        budget loss is needed. For evaluation, `thresholds` is an EMA of noise-free quantiles at the target ratios."""
        if not self.training:
            return super().forward(x, maps)
        (rank, world), target = rank_world(), self.ratios.to(x.device)       # target: K
        scores = all_gather(self.score(x, maps))                             # B, h, w; here B is the global batch size
        self.thresholds.lerp_(scores.detach().quantile(target.cumsum(0)[:-1]), 0.1)
        scores = 3 * F.layer_norm(scores, scores.shape)                      # a fixed std: scores do not outgrow noise
        scores = scores + noise * torch.rand_like(scores).logit(eps=1e-6)    # logistic: a difference of Gumbels
        squares = torch.randn(len(scores), len(target), device=x.device).square()  # B, K; normalised: Dirichlet(1/2)
        ratios = 0.4 * target + 0.6 * squares / squares.sum(1, keepdim=True)  # B, K
        below = ratios.cumsum(1)[:, :-1].clamp(max=1)                        # B, K - 1; 0.2 to 0.8 if the target is 0.5
        cuts = scores.detach().quantile(below.flatten()).view(len(scores), -1, 1, 1)  # B, K - 1, 1, 1
        # cuts ascend; logit k is the sum of score - cut over the first k, so the argmax counts the cuts below the score
        logits = F.pad((scores[:, None] - cuts).cumsum(1), (0, 0, 0, 0, 1, 0))  # B, K, h, w
        soft = logits.softmax(dim=1)                                         # B, K, h, w
        gate = one_hot(soft.argmax(dim=1), len(target)) + (soft - soft.detach())  # B, K, h, w: exactly one-hot
        return gate.chunk(world)[rank]                                       # only the images of this rank


class RandomRouter(ThresholdRouter):
    """Random granularities at the target ratios: the baseline for every claim about routing."""
    def __init__(self, ratios):
        super().__init__(torch.tensor(ratios).cumsum(0)[:-1])

    def score(self, x, maps):
        side = maps[0].shape[-1]
        if self.training:
            return sample_global(torch.Tensor.uniform_, (len(x), side, side), x.device)  # B, h, w
        # seeded by the image's checksum: the same routing in any batch, on any rank and in any run
        seeds = [zlib.crc32(image.contiguous().numpy()) for image in x.float().cpu()]
        scores = [numpy_rng(seed).random((side, side), np.float32) for seed in seeds]
        return torch.from_numpy(np.stack(scores)).to(x.device)               # B, h, w


class EntropyRouter(ThresholdRouter):
    """Shannon entropy of each region's grey levels. The thresholds are quantiles over the training images."""
    def __init__(self, ratios, factor):
        super().__init__(torch.zeros(len(ratios) - 1))                       # in nats; set by `calibrate`
        self.factor = factor

    def score(self, x, maps=None):
        """x: (B, 3, S, S) in [-1, 1] -> entropy of each region in nats (B, h, w). Grey is 0.2989 red + 0.5870 green +
        0.1140 blue. The histogram has 32 soft bins, Gaussians around linspace(-1, 1, 32), standard deviation 0.01."""
        red, green, blue = x.float().split(1, dim=1)                         # each B, 1, S, S
        grey = 0.2989 * red + 0.5870 * green + 0.1140 * blue
        pixels = F.unfold(grey, self.factor, stride=self.factor)             # B, f f, N for regions of f x f pixels
        bins = torch.linspace(-1, 1, 32, device=x.device)
        hist = torch.stack([torch.exp(-0.5 * ((pixels - c) / 0.01) ** 2).mean(1) for c in bins], dim=-1)  # B, N, 32
        p = hist / (hist.sum(-1, keepdim=True) + 1e-10)
        entropy = -(p * (p + 1e-10).log()).sum(-1)                           # B, N
        return entropy.view(-1, x.shape[2] // self.factor, x.shape[3] // self.factor)  # B, h, w


ROUTERS = {
    "learned": lambda config: GrainRouter(config.channels, len(config.factors)),
    "entropy": lambda config: EntropyRouter(config.ratios, config.factors[0]),
    "random": lambda config: RandomRouter(config.ratios),
    "dial": lambda config: DialRouter(config.ratios, GrainRouter(config.channels, len(config.factors))),
}


def budget_loss(gate, ratios):
    """Sum over k of (fraction of granularity k in the batch - ratio k)^2: only the batch as a whole is penalised,
    not single images. gate: (B, K, h, w), one-hot; ratios: K target fractions -> scalar"""
    fraction = all_gather(gate).mean(dim=(0, 2, 3))                          # K
    return sum((fraction[k] - ratio) ** 2 for k, ratio in enumerate(ratios))


# ---- 3  Codebook -------------------------------------------------------------------------------

def straight_through(z, q):
    """Return q. Its gradient is passed to z unchanged, because nearest-neighbour lookup has no gradient."""
    return z + (q - z).detach()


class Codebook(nn.Module):
    """Vector quantization with one codebook for all granularities, trained by exponential moving averages (EMA).
    forward(z (B, D, H, W), weight (B, H, W)) -> quantized z (B, D, H, W), ids (B, H, W), commitment loss. `weight`
    makes every *code* count once: each cell of a coarse code that covers 4 cells has weight 1/4.
    A training step restarts dead entries, assigns vectors to entries, and updates the entries. At the start every entry
    is dead, so the first restart is also the data-dependent initialisation."""
    def __init__(self, size, dim, decay=0.99, commitment=0.25, dead_below=0.1):
        super().__init__()
        self.decay, self.commitment, self.dead_below = decay, commitment, dead_below
        self.register_buffer("codes", torch.zeros(size, dim))                # the entries (vectors, not ids)
        self.register_buffer("uses", torch.zeros(size))                      # EMA of assignment counts per batch
        self.register_buffer("sums", torch.zeros(size, dim))                 # EMA of the sum of assigned vectors
        self.register_buffer("age", torch.tensor(0.0))                       # batches seen

    def assign(self, z):
        """z: (n, D) -> ids (n,) of the nearest entries e, by |z - e|^2 without |z|^2, which is the same for every e."""
        centre = self.codes.mean(0)                                          # subtracted to reduce rounding error
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
            loss = self.commitment * (weight * distance).mean()              # pulls z to its entry
            q = straight_through(flat, q).view(B, H, W, D).permute(0, 3, 1, 2)  # B, D, H, W
            return q.contiguous(), ids.view(B, H, W), loss

    @torch.no_grad()
    def update(self, z, weight, ids):
        """EMA update (online k-means): every entry becomes sums / uses, the moving average of its assigned vectors.
        The encoder changes quickly at first, so the averaging window starts short: the decay is age / (9 + age), at
        most self.decay, where age is the number of batches so far. z: (n, D); weight, ids: (n,)"""
        self.age += 1
        decay = (self.age / (9 + self.age)).clamp(max=self.decay)
        uses = torch.zeros_like(self.uses).index_add_(0, ids, weight)        # V
        sums = torch.zeros_like(self.sums).index_add_(0, ids, weight[:, None] * z)  # V, D
        self.uses.lerp_(all_reduce_sum(uses), 1 - decay)
        self.sums.lerp_(all_reduce_sum(sums), 1 - decay)
        self.codes.copy_(self.sums / self.uses[:, None].clamp(min=1e-6))

    @torch.no_grad()
    def restart(self, z, weight):
        """Entries are dead if their usage is below dead_below times the mean, weight.sum() / V. They are replaced by
        vectors of the batch, sampled by weight, plus noise of 1 % of the standard deviation per dimension. Their
        usage becomes the mean. z: (n, D); weight: (n,)"""
        z, weight = all_gather(z), all_gather(weight).nan_to_num(1.0)        # multinomial rejects NaN
        mean_uses = weight.sum() / len(self.uses)
        dead = self.uses < self.dead_below * mean_uses                       # V
        vectors = z[torch.multinomial(weight, min(len(self.uses), len(z)))]  # <= V, D
        fresh = vectors[(dead.cumsum(0) - 1) % len(vectors)]                 # V, D: the i-th dead one gets vectors[i]
        fresh = fresh + 0.01 * fresh.std(0, correction=0) * torch.randn_like(fresh)  # so that equal vectors don't tie
        self.codes.copy_(torch.where(dead[:, None], fresh, self.codes))
        self.uses.copy_(torch.where(dead, mean_uses, self.uses))
        self.sums.copy_(torch.where(dead[:, None], fresh * mean_uses, self.sums))


# ---- 4  Encoder, decoder, DQVAE (the VQGAN backbone, with one head per granularity) ------------

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
    """Single-head self-attention over all cells of the map."""
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
    """The blocks at downsampling factor 2**level, each followed by attention at factors >= attention_from."""
    layers, c = [], config.level_width(level)
    for _ in range(n_blocks):
        layers.append(ResBlock(c_in, c))
        if 2 ** level >= config.attention_from:
            layers.append(AttnBlock(c))
        c_in = c
    return nn.Sequential(*layers)


class Encoder(nn.Module):
    """Image (B, 3, S, S) -> K maps (B, Z, H_k, W_k), coarse to fine, where H_k = W_k = S / factors[k]."""
    def __init__(self, config):
        super().__init__()
        self.head_levels = [f.bit_length() - 1 for f in config.factors]        # level i has downsampling factor 2^i
        widths = [config.level_width(i) for i in range(self.head_levels[0] + 1)]
        self.stem = nn.Conv2d(3, config.width, 3, padding=1)
        self.levels = nn.ModuleList(make_level(config, i, c_in, config.encoder_blocks)
                                    for i, c_in in enumerate([config.width, *widths[:-1]]))
        self.downs = nn.ModuleList(nn.Conv2d(c, c, 3, stride=2) for c in widths[:-1])
        self.heads = nn.ModuleList(nn.Sequential(ResBlock(c, c), AttnBlock(c), ResBlock(c, c), norm(c), nn.SiLU(),
                                                 nn.Conv2d(c, config.channels, 3, padding=1))
                                   for c in map(config.level_width, self.head_levels))  # to Z channels

    def forward(self, x):
        h = self.stem(x)                                                     # B, width, S, S
        maps = {}
        for i, level in enumerate(self.levels):
            h = level(h)                                                     # B, c_i, S/2^i, S/2^i
            if i in self.head_levels:
                maps[i] = self.heads[self.head_levels.index(i)](h)             # B, Z, S/2^i, S/2^i
            if i < len(self.downs):
                h = self.downs[i](F.pad(h, (0, 1, 0, 1)))                    # B, c_i, S/2^(i+1), S/2^(i+1); as in VQGAN
        return [maps[i] for i in self.head_levels]


class PositionEmbedding(nn.Module):
    """Adds learned Fourier features of a cell's (x, y), and learned row and column embeddings."""
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
    """Embedded codes (B, Z, H, W) -> image (B, 3, S, S). The decoder sees codes only, never the granularities."""
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
    """Nearest-neighbour upsampling of (..., h, h) to (..., side, side); side is a multiple of h."""
    n = side // x.shape[-1]
    return x.repeat_interleave(n, -2).repeat_interleave(n, -1) if n > 1 else x


class VAEOutput(NamedTuple):
    reconstruction: torch.Tensor         # B, 3, S, S
    codes: torch.Tensor                  # B, H, W
    grains: torch.Tensor                 # B, h, w
    gate: torch.Tensor                   # B, K, h, w
    commitment: torch.Tensor             # scalar
    maps: list                           # K encoder feature maps (B, Z, H_k, W_k)


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
        """1 / (number of finest cells that share a code), without gradient. gate: (B, K, h, w) -> (B, H, W)"""
        per_cell = [(self.config.factors[-1] / f) ** 2 for f in self.config.factors]
        weight = sum(per_cell[k] * gate.detach()[:, k:k + 1] for k in range(len(per_cell)))  # B, 1, h, w
        return upsample(weight, self.config.size // self.config.factors[-1])[:, 0]  # B, H, W

    def quantize(self, x, noise=1.0):
        """Image -> quantized grid (B, D, H, W), codes, gate, commitment loss, the encoder's maps."""
        maps = self.encoder(x)
        gate = self.router(x, maps, noise)                                   # B, K, h, w
        z = self.pre_quant(self.mix(maps, gate))                             # B, D, H, W
        q, codes, commitment = self.codebook(z, self.cell_weight(gate))
        return q, codes, gate, commitment, maps

    def set_ratios(self, ratios, images):
        """Change the target ratios, without training. images: batches of training images (B, 3, S, S), whose
        scores give the thresholds. A learned router becomes a DialRouter: the same MLP with thresholds."""
        self.config = replace(self.config, ratios=ratios)
        if self.config.router in ("learned", "dial"):
            self.config.router = "dial"
            self.router = DialRouter(ratios, getattr(self.router, "scorer", self.router)).to(self.codebook.codes.device)
        self.router.train(self.training).calibrate(ratios, images, self.encoder)

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


# ---- 5  Sequences (the paper's stage 2: coarse to fine, position and content) ------------------

def none_last(ids, n):
    """Map -1 to n, the row for "none" in a table of n + 1 rows."""
    return ids % (n + 1)


class Layout(nn.Module):
    """Converts between (codes, grains) and the sequence of (position, content) pairs of an image.
    Cell i of granularity k has the position id  offset_k + i. Cells are counted in raster order over the whole grid
    (as the authors number them), and an EOS id ends each granularity. An id therefore determines granularity, location
    and order, and the sequence of an image is its codes *sorted by id*, with every EOS id in its place: coarse codes
    first, each granularity row by row. The content of an EOS is -1. Sequences are padded with the last EOS: nothing
    else is valid after it, so padding has probability 1 and adds nothing to the loss.

    Example, 2 x 2 regions of which the second is fine (factors 2 and 1, 4 x 4 pixels):
        grains   codes      ids: coarse 0 to 3, EOS 4; fine 5 to 8 (first row), 9 to 12, 13 to 16, 17 to 20, EOS 21
        0 1      a a b c    position  0  2  3  4   7  8 11 12  21
        0 0      a a d e    content   a  f  g  -1  b  c  d  e  -1      and then (21, -1) up to max_len
                 f f g g
                 f f g g
    The tables have an entry for each of the 22 ids (N = 4 stands for "no region"):
        ids        0  1  2  3   4    5  6  7  8   9 10 11 12  13 14 15 16  17 18 19 20  21
        grain      0  0  0  0   0    1  1  1  1   1  1  1  1   1  1  1  1   1  1  1  1   1
        region     0  1  2  3   4    0  0  1  1   0  0  1  1   2  2  3  3   2  2  3  3   4
        first_id   0  1  2  3   4    5  5  7  7   5  5  7  7  13 13 15 15  13 13 15 15  21"""
    name = "coarse to fine, row by row"                                      # stored in checkpoints with the weights

    def __init__(self, size, factors):
        super().__init__()
        check_factors(size, factors)
        self.sides = [size // f for f in factors]                            # side of the grid of each granularity
        self.side, self.fine_side = self.sides[0], self.sides[-1]            # h, H
        self.n_regions = N = self.side ** 2
        self.cells = [(side // self.side) ** 2 for side in self.sides]       # s_k
        self.n_grains = K = len(factors)
        self.max_len = N * self.cells[-1] + K                                # all regions fine, and the EOS ids
        ends = list(itertools.accumulate(side ** 2 + 1 for side in self.sides))  # end of each granularity's id range
        self.offsets, self.eos = [0, *ends[:-1]], [end - 1 for end in ends]
        self.n_positions = P = ends[-1]
        self.end = P - 1                                                     # the last EOS

        grain = torch.zeros(P, dtype=torch.long)                             # granularity of an id
        region = torch.full((P,), N)                                         # its region; N for an EOS
        first_id = torch.arange(P)                                           # the region's first id at this granularity
        # centre (row, column) of each code, in finest-grid cells; (0, 0) for EOS ids and for the start (index P)
        coordinates = torch.zeros(P + 1, 2)
        for k, side in enumerate(self.sides):
            c, cells, first = side // self.side, torch.arange(side ** 2), self.offsets[k]
            row, column = cells // side, cells % side
            grain[first:self.eos[k] + 1] = k
            region[first:self.eos[k]] = (row // c) * self.side + column // c  # c x c cells per region
            first_id[first:self.eos[k]] = first + (row // c) * c * side + (column // c) * c  # its top left
            coordinates[first:self.eos[k]] = (torch.stack([row, column], dim=1) + 0.5) * (self.fine_side / side)
        tables = dict(ids=torch.arange(P, dtype=torch.int32), grain=grain, region=region, first_id=first_id,
                      opens=first_id == torch.arange(P),                     # a region's first id, or an EOS
                      is_eos=region == N, finest=grain == K - 1, coordinates=coordinates)
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)

    def pack(self, codes, grains):
        """codes (B, H, W), grains (B, h, w) -> pos, code, each (B, max_len)."""
        grain_at_id = F.pad(grains.flatten(1), (0, 1))[:, self.region]       # B, P: granularity of the id's region
        present = self.is_eos | (grain_at_id == self.grain)                  # B, P
        pos, order = torch.where(present, self.ids, self.end).sort(dim=1)    # B, P: absent ids become `end`, sort last
        strides = [self.fine_side // side for side in self.sides]            # one code fills stride x stride cells
        code = torch.cat([F.pad(codes[:, ::s, ::s].flatten(1), (0, 1), value=-1) for s in strides], 1)  # B, P
        code = code.masked_fill(~present, -1).gather(1, order)
        return pos[:, :self.max_len].long(), code[:, :self.max_len]

    def unpack(self, pos, code):
        """pos, code (B, L) -> codes (B, H, W), grains (B, h, w); -1 where nothing has been written yet."""
        canvas = pos.new_full((len(pos), self.n_positions), -1).scatter(1, pos, code)  # B, P: the content of each id
        grains = self.grains(pos).view(-1, self.side, self.side)             # B, h, w
        blocks = [canvas[:, o:o + side ** 2].view(-1, side, side) for o, side in zip(self.offsets, self.sides)]
        codes = torch.stack([upsample(block, self.fine_side) for block in blocks], dim=1)  # B, K, H, W
        pick = upsample(grains, self.fine_side).clamp(min=0)[:, None]        # B, 1, H, W; uncovered: any k gives -1
        return codes.gather(1, pick)[:, 0], grains

    def grains(self, pos):
        """Granularity of the regions that the ids pos (B, L) cover, -1 elsewhere. -> (B, N)"""
        known = torch.full((len(pos), self.n_regions + 1), -1, device=pos.device)
        return known.scatter(1, self.region[pos], self.grain[pos])[:, :-1]   # EOS ids write to a spare column

    def lengths(self, pos):                                                  # (B, L) -> (B,): pairs up to the last EOS
        return (pos != self.end).sum(1) + 1

    def legal(self, prev, grains):
        """The mask of valid next position ids. (tests/naive.py has the same rules as a loop.) prev: (B,) or (B, L) ids,
        -1 at the start; grains: (B, N) granularities known so far, -1 elsewhere -> (B, P) or (B, L, P), bool.
        Candidates are the ids after prev, up to the next EOS. Writing a region's first cell opens the region. Its other
        cells are then pending, and must follow in order. Two kinds of id are valid: the next pending one (the EOS, if
        nothing is pending), and all ids before it that open an uncovered region. At the finest granularity, only the
        lowest of these ids is valid, because no region may be skipped. In the class's example:
            prev  -1 -> 0 1 2 3 4      0 -> 1 2 3 4      3 -> 4        coarse codes may skip regions
            prev   4 -> 7     (the first uncovered)      7 -> 8        8 -> 11 (pending)      12 -> 21
        Training passes the *final* grains, for all steps at once. The mask is the same: a region of the current
        granularity or a finer one counts as uncovered until its first cell is written."""
        following = (prev + 1).clamp(max=self.end)[..., None]                # B, (L,) 1: the id after prev
        region_grain = F.pad(none_last(grains, self.n_grains), (0, 1), value=self.n_grains)  # B, N + 1; K: uncovered
        region_grain = region_grain.gather(1, self.region.expand(len(grains), -1))  # B, P
        region_grain = region_grain if prev.dim() == 1 else region_grain[:, None]  # B, (1,) P
        candidate = (self.ids >= following) & (self.grain == self.grain[following])  # B, (L,) P
        pending = candidate & (region_grain == self.grain) & (self.first_id < following)
        opening = candidate & (region_grain >= self.grain) & self.opens        # the last of these is the EOS
        must_take = pending | (opening & self.finest)                         # cannot be skipped
        limit = torch.where(must_take, self.ids, self.end).amin(-1, keepdim=True)  # B, (L,) 1: the first, else `end`
        return (pending | opening) & (self.ids <= limit)


# ---- 6  DQ-Transformer (the paper's stage 2: Position-Transformer and Content-Transformer) -----

def attention(q, k, v, mask=None, dropout=0.0):
    """softmax(q k^T / sqrt(d) + mask) v; causal when there is no mask. q: (B, heads, L, d); k, v: (B, heads, M, d)"""
    if q.is_cuda:                                                            # on CPUs, SDPA trains at half the speed
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None)  # B, heads, L, d
    if mask is None:
        mask = torch.full((q.shape[2], k.shape[2]), -math.inf, dtype=q.dtype, device=q.device).triu(1)  # L, M
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + mask).softmax(-1)  # B, heads, L, M
    return (F.dropout(weights, dropout) if dropout else weights) @ v         # B, heads, L, d


def rope_table(coordinates, d):
    """2-D rotary position embedding (RoPE; Su et al., "RoFormer", 2021): (n, 2) -> the cosines and signed sines that
    `apply_rope` takes, (n, 2, d). Half of the channel pairs rotate with the row, half with the column, at frequencies
    from 1 to about 1/10, because the grids are small. RoPE encodes only relative positions. (0, 0) is not rotated."""
    frequency = 10.0 ** -(torch.arange(d // 4) / (d // 4))                   # d/4
    angle = (coordinates[:, :, None] * frequency).flatten(1)                 # n, d/2: by the row, by the column
    return torch.stack([angle.cos().repeat(1, 2), torch.cat([-angle.sin(), angle.sin()], dim=1)], dim=1)


def apply_rope(x, rope):
    """Rotate the channel pairs (i, i + d/2) of x (..., d). rope: cosines and sines (..., 2, d)"""
    cos, sin = rope.type_as(x).unbind(-2)                                    # each ..., d
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)    # ..., d


class Block(nn.Module):
    """Pre-norm transformer block. `forward` takes whole sequences, `step` decodes one token with a KV cache."""
    def __init__(self, config):
        super().__init__()
        C = config.width
        self.heads, self.dropout, self.qk_norm = config.heads, config.dropout, config.qk_norm
        self.norm1, self.norm2 = nn.LayerNorm(C, bias=False), nn.LayerNorm(C, bias=False)
        self.qkv, self.proj = nn.Linear(C, 3 * C, bias=False), nn.Linear(C, C, bias=False)
        self.up, self.down = nn.Linear(C, 4 * C, bias=False), nn.Linear(4 * C, C, bias=False)
        self.drop = nn.Dropout(config.dropout)

    def queries_keys_values(self, x, rope):
        """x: (..., C); rope: from DQTransformer.rope_of; values are not rotated -> (..., 3, heads, d)"""
        qkv = self.qkv(self.norm1(x)).view(*x.shape[:-1], 3, self.heads, -1)  # ..., 3, heads, d
        if self.qk_norm:
            qk, v = qkv.split([2, 1], dim=-3)                                # ..., 2, heads, d; ..., 1, heads, d
            qkv = torch.cat([F.layer_norm(qk, qk.shape[-1:]).type_as(v), v], dim=-3)  # ..., 3, heads, d
        return qkv if rope is None else apply_rope(qkv, rope)                # ..., 3, heads, d

    def forward(self, x, rope=None):
        """Causal attention over the sequence: (B, L, C) -> (B, L, C)."""
        q, k, v = self.queries_keys_values(x, rope).permute(2, 0, 3, 1, 4)   # each B, heads, L, d
        y = attention(q, k, v, dropout=self.dropout if self.training else 0.0)  # B, heads, L, d
        x = x + self.drop(self.proj(y.transpose(1, 2).reshape(x.shape)))     # B, L, C
        return x + self.drop(self.down(F.gelu(self.up(self.norm2(x)))))

    def step(self, x, rope, cache, rows, steps, mask):
        """One token per row: (R, C) -> (R, C). cache (2, R, heads, M, d) holds keys and values; those of x are
        written at the given rows (R,) and steps (R,). mask (R, heads, 1, M): -inf at masked entries"""
        qkv = self.queries_keys_values(x, rope)                              # R, 3, heads, d
        cache[:, rows, :, steps] = qkv[:, 1:]                                # R, 2, heads, d: indexing puts R first
        y = attention(qkv[:, 0, :, None], *cache, mask)                      # R, heads, 1, d
        x = torch.addmm(x, y.flatten(1), self.proj.weight.t())               # R, C: x + proj(y) in one kernel
        return torch.addmm(x, F.gelu(self.up(self.norm2(x))), self.down.weight.t())  # R, C


class DQTransformer(nn.Module):
    """p(sequence) = prod_t p(pos_t | pairs before) p(code_t | pairs before, pos_t): one stack predicts the position;
    a second one, on top of it, predicts the content given that position. Every conditional is normalised over
    the valid choices, and every valid sequence ends with the last EOS, so the product is normalised too."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.layout = Layout(config.size, config.factors)
        C, V, P, self.n_classes = config.width, config.codebook_size, self.layout.n_positions, len(config.classes)
        if config.rotary:
            self.register_buffer("rope", rope_table(self.layout.coordinates, C // config.heads), persistent=False)
        self.content = nn.Embedding(V + 1, C)                                # last row: the content of an EOS
        self.position = nn.Embedding(P, C)
        self.granularity = nn.Embedding(self.layout.n_grains, C)
        self.order = nn.Embedding(self.layout.max_len, C)                    # embeds the step t
        self.condition = nn.Embedding(self.n_classes + 1, C)                 # last row: no label
        self.drop = nn.Dropout(config.dropout)
        self.position_stack = nn.ModuleList(Block(config) for _ in range(config.position_layers))
        self.content_stack = nn.ModuleList(Block(config) for _ in range(config.content_layers))
        self.position_norm, self.position_head = nn.LayerNorm(C, bias=False), nn.Linear(C, P, bias=False)
        self.content_norm, self.content_head = nn.LayerNorm(C, bias=False), nn.Linear(C, V, bias=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:                                            # zero: residual projections, output heads
                zero = name.endswith(("proj.weight", "down.weight", "head.weight"))
                nn.init.normal_(weight, std=0.0 if zero else 0.02)

    def embed(self, pos, code):
        """content (shared by all granularities) + position (a row per id) + granularity. pos, code (...) -> (..., C)"""
        content = self.content(none_last(code, self.config.codebook_size))   # ..., C
        return content + self.position(pos) + self.granularity(self.layout.grain[pos])

    def rope_of(self, queries, keys):
        """RoPE tables for queries and keys at the ids (...), -1 for the start -> (..., 3, 1, 2, d), or None."""
        if self.config.rotary:
            ids = torch.stack([queries, keys, torch.full_like(keys, -1)], dim=-1)  # ..., 3; -1: values are not rotated
            return self.rope[ids].unsqueeze(-3)                              # ..., 3, 1, 2, d

    def logits(self, pos, code, label=None):
        """pos, code (B, L); label (B,), -1 or None: no label -> position logits (B, L, P), -inf at invalid ids, and
        content logits (B, L, V). Entry t depends on the label and the pairs before t; the content logits also depend on
        pos[:, t]. Input t of the position stack is the condition (t = 0) or pair t - 1, plus the learned order[t]."""
        B, L = pos.shape
        label = torch.full_like(pos[:, 0], -1) if label is None else label
        if self.training:
            label = torch.where(torch.rand(B, device=pos.device) < self.config.label_dropout, -1, label)
        start = self.condition(none_last(label, self.n_classes))[:, None]    # B, 1, C
        x = torch.cat([start, self.embed(pos[:, :-1], code[:, :-1])], dim=1)  # B, L, C
        h = self.drop(x + self.order.weight[:L])
        prev = F.pad(pos[:, :-1], (1, 0), value=-1)                          # B, L
        rope = self.rope_of(prev, prev)                                      # entry t holds the pair before t
        for block in self.position_stack:
            h = block(h, rope)                                               # B, L, C
        legal = self.layout.legal(prev, self.layout.grains(pos))             # B, L, P
        position_logits = self.position_head(self.position_norm(h)).float()  # B, L, P
        h = h + self.position(pos)                                           # the position that was chosen at t
        rope = self.rope_of(pos, prev)                                       # query t: at pos[t]; key t: at pos[t - 1]
        for block in self.content_stack:
            h = block(h, rope)
        content_logits = self.content_head(self.content_norm(h)).float()     # B, L, V
        return position_logits.masked_fill(~legal, -math.inf), content_logits

    def forward(self, pos, code, label=None):
        """-> {"position": (B,), "content": (B,)}: negative log-likelihoods of the images, in nats.
        A position with a single valid id contributes 0. So does the content of an EOS."""
        position, content = self.logits(pos, code, label)
        nll = dict(position=F.cross_entropy(position.flatten(0, 1), pos.flatten(), reduction="none"),  # B L
                   content=F.cross_entropy(content.flatten(0, 1), code.flatten(), reduction="none", ignore_index=-1))
        return {name: each.view(pos.shape).sum(1) for name, each in nll.items()}


# ---- 7  Sampling -------------------------------------------------------------------------------

class SampleOptions(NamedTuple):
    """Temperature and classifier-free guidance apply to positions and contents, top-k and top-p to contents only."""
    temperature: float = 1.0
    top_k: int = 0                       # 0: off
    top_p: float = 1.0                   # 1: off
    cfg: float = 1.0                     # uncond + cfg (cond - uncond); 1: off

    def check(self):
        require(1e-6 <= self.temperature <= 1e6, f"temperature must be between 1e-6 and 1e6, not {self.temperature}")
        require(self.top_k >= 0, f"top-k must be at least 0 (0: off), not {self.top_k}")
        require(0 < self.top_p <= 1, f"top-p must be above 0 and at most 1, not {self.top_p}")
        require(0 <= self.cfg <= 1e6, f"cfg must be between 0 and 1e6, not {self.cfg}")


def apply_guidance(logits, options, B):
    """Logits (R, n) -> (B, n): classifier-free guidance if R = 2 B, then division by the temperature."""
    logits = logits.float()
    if len(logits) > B:
        cond, uncond = logits.chunk(2)
        logits = uncond + options.cfg * (cond - uncond)
    return logits / options.temperature                                      # B, n


def filter_logits(logits, top_k, top_p):
    """Top-k filtering (ties are kept), then top-p (nucleus) filtering of the kept entries, renormalised: the fewest
    that reach p are kept. All others become -inf. logits: (B, V)"""
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    if top_p < 1:
        probs, order = logits.softmax(-1).sort(-1, descending=True)
        surplus = probs.cumsum(-1) - probs >= top_p                          # p is reached without this entry
        logits = logits.masked_fill(torch.zeros_like(surplus).scatter(1, order, surplus), -math.inf)
    return logits


def draw(logits, u):
    """The first entry whose cumulative probability reaches u (inverse CDF). logits (B, n), u (B,) in (0, 1] -> (B,)"""
    p = logits.softmax(-1)                                                   # B, n
    cdf = p.cumsum(-1).masked_fill(p == 0, 0.0)                              # impossible entries never reach u
    reached = cdf >= u[:, None] * cdf.amax(-1, keepdim=True)                 # the largest is 1, up to rounding
    return reached.int().argmax(-1)                                          # B: the first of those


@torch.no_grad()
def generate_one(model, label=-1, options=SampleOptions(), seed=0, index=0):
    """The simplest sampler: one image and no cache, so every step recomputes the whole sequence. label: class, or -1.
    Returns pos and code (L,), up to and including the last EOS: the same as image `index` of `generate`."""
    layout, device = model.layout, model.order.weight.device
    labels = torch.tensor([label] if options.cfg == 1 else [label, -1], device=device)  # R = 1, or 2 with guidance
    u = 1 - torch.from_numpy(numpy_rng(seed, index).random((layout.max_len, 2), np.float32)).to(device)  # L, 2; > 0
    pos, code = torch.zeros(2, 1, 0, dtype=torch.long, device=device)        # each 1, 0
    for t in range(layout.max_len):
        pos, code = F.pad(pos, (0, 1), value=layout.end), F.pad(code, (0, 1), value=-1)  # each 1, t + 1; placeholders
        valid = layout.legal(F.pad(pos, (1, 0), value=-1)[:, t], layout.grains(pos))  # 1, P
        logits, _ = model.logits(pos.expand(len(labels), -1), code.expand(len(labels), -1), labels)  # R, t + 1, P
        logits = apply_guidance(logits[:, t], options, 1).masked_fill(~valid, -math.inf)  # 1, P; guided -inf: NaN
        pos[:, t] = draw(logits, u[t, :1])
        _, logits = model.logits(pos.expand(len(labels), -1), code.expand(len(labels), -1), labels)  # R, t + 1, V
        logits = filter_logits(apply_guidance(logits[:, t], options, 1), options.top_k, options.top_p)  # 1, V
        code[:, t] = torch.where(layout.is_eos[pos[:, t]], -1, draw(logits, u[t, 1:]))
        if pos[0, t] == layout.end:
            return pos[0], code[0]


# Fast sampling of many images: continuous batching with a KV cache. B slots (images in progress) decode one pair per
# step. A slot whose image is complete starts the next image. So if B << n, the cost scales with the mean length.

class Job(NamedTuple):
    """The constant inputs of a sampling run for n images. Row n is a dummy for idle slots."""
    condition: torch.Tensor              # (n + 1, 1), or (n + 1, 2) with guidance: embedding indices
    uniform: torch.Tensor                # n + 1, L, 2: random numbers for position and content
    given: torch.Tensor                  # n + 1, L, 2: position and content, -1 where they are sampled; or None
    options: SampleOptions


class State(NamedTuple):
    """The mutable decoding state of B slots. R = B rows, or 2 B with guidance: conditional, then unconditional ones."""
    cache: list                          # keys and values of each layer: 2, R, heads, >= M, d
    image: torch.Tensor                  # B: index of the slot's image; n when the slot is idle
    newest: torch.Tensor                 # scalar: index of the most recently started image
    t: torch.Tensor                      # B: step within the image
    last: torch.Tensor                   # B: position of the previous pair, -1 at the start
    last_code: torch.Tensor              # B: its content
    grains: torch.Tensor                 # B, N + 1: granularities known so far; EOS ids write to the last column
    pos: torch.Tensor                    # n + 1, L: the images; `layout.end` where nothing is written
    code: torch.Tensor                   # n + 1, L


def decode_one(model, job, state, M):
    """Sample one pair in every slot. Attention reads the first M entries of the cache, so all t must be below M.
    This changes only `state`, in place, and never synchronises host and device, so CUDA graphs can capture it."""
    options, image, t = job.options, state.image, state.t
    B, R = len(t), state.cache[0].shape[1]
    u = job.uniform[image, t].unbind(1)                                      # 2 x (B,)
    given = (None, None) if job.given is None else job.given[image, t].unbind(1)  # 2 x (B,)

    def per_row(x):
        return torch.cat([x, x]) if R > B else x                             # R, ...: conditional, unconditional rows
    def unless_given(sampled, given):
        return sampled if given is None else torch.where(given < 0, sampled, given)  # B
    # embed the previous pair, or the condition at the start
    condition = model.condition(job.condition[image].t().flatten())          # R, C
    rows, steps, last = torch.arange(R, device=t.device), per_row(t), per_row(state.last)  # each R
    h = torch.where((steps == 0)[:, None], condition, per_row(model.embed(state.last.clamp(min=0), state.last_code)))
    h = h + model.order(steps)                                               # R, C
    future = torch.arange(M, device=t.device) > steps[:, None, None, None]   # R, 1, 1, M
    mask = h.new_zeros(R, model.config.heads, 1, M).masked_fill(future, -math.inf)
    caches = [cache[..., :M, :] for cache in state.cache]

    # position: its stack, then sample one of the valid ids
    rope = model.rope_of(last, last)                                         # R, 3, 1, 2, d
    for block, cache in zip(model.position_stack, caches):
        h = block.step(h, rope, cache, rows, steps, mask)                    # R, C
    logits = apply_guidance(model.position_head(model.position_norm(h)), options, B)  # B, P
    logits = logits.masked_fill(~model.layout.legal(state.last, state.grains[:, :-1]), -math.inf)
    pos = unless_given(draw(logits, u[0]), given[0])                         # B

    # content: its stack, then sample a codebook id
    h = h + model.position(per_row(pos))                                     # R, C
    rope = model.rope_of(per_row(pos), last)
    for block, cache in zip(model.content_stack, caches[len(model.position_stack):]):
        h = block.step(h, rope, cache, rows, steps, mask)
    logits = apply_guidance(model.content_head(model.content_norm(h)), options, B)  # B, V
    code = draw(filter_logits(logits, options.top_k, options.top_p), u[1])   # B
    code = unless_given(code, given[1]).masked_fill(model.layout.is_eos[pos], -1)
    write(model.layout, state, pos, code)


def write(layout, state, pos, code):
    """Store one pair per slot, pos and code (B,). After the last EOS of an image, its slot starts the next image."""
    state.pos[state.image, state.t], state.code[state.image, state.t] = pos, code
    state.grains.scatter_(1, layout.region[pos][:, None], layout.grain[pos][:, None])
    done = pos == layout.end                                                 # B
    nth_done = done.cumsum(0)                                                # B: the j-th done slot gets newest + j
    torch.where(done, state.newest + nth_done, state.image, out=state.image).clamp_(max=len(state.pos) - 1)
    state.newest.add_(nth_done[-1])
    state.t.add_(1).masked_fill_(done, 0)
    state.last.copy_(pos.masked_fill(done, -1))
    state.last_code.copy_(code)
    state.grains.masked_fill_(done[:, None], -1)


def start(model, label, options, seed, given, first, slots, M):
    """-> the Job and the initial State of B = `slots` slots, with a KV cache of length M. See `generate`."""
    n, layout, config, device = len(label), model.layout, model.config, label.device
    copies = 2 if options.cfg != 1 and model.n_classes else 1                # rows per image
    labels = none_last(torch.stack([label, torch.full_like(label, -1)], dim=1), model.n_classes)[:, :copies]
    # one generator per image: numbers in (0, 1] that depend only on the seed and the image's index
    uniform = [1 - numpy_rng(seed, first + i).random((layout.max_len, 2), np.float32) for i in range(n + 1)]
    if given is not None:
        given = F.pad(torch.stack(given, dim=-1), (0, 0, 0, 0, 0, 1), value=-1)  # n + 1, L, 2
    cache = model.order.weight.new_zeros(2, copies * slots, config.heads, M, config.width // config.heads)
    with device:                                                             # the default for new tensors
        state = State([cache.clone() for _ in range(config.position_layers + config.content_layers)],
                      image=torch.arange(slots), newest=torch.full((), slots - 1), t=torch.full((slots,), 0),
                      last=torch.full((slots,), -1), last_code=torch.full((slots,), -1),
                      grains=torch.full((slots, layout.n_regions + 1), -1),
                      pos=torch.full((n + 1, layout.max_len), layout.end),
                      code=torch.full((n + 1, layout.max_len), -1))
    return Job(F.pad(labels, (0, 0, 0, 1)), torch.from_numpy(np.stack(uniform)).to(device), given, options), state


def make_stepper(step, model, job, state, graphs):
    """Return run_step(M), which runs a step whose attention reads the first M entries of the cache. Without graphs, the
    cache is kept shorter than 2 M, since slices of a long cache are slower. With graphs, each M has a CUDA graph, which
    is captured after its first step. Graphs need fixed addresses, so the cache has its full length from the start."""
    if not graphs:
        def run_step(M):
            size = state.cache[0].shape[3]
            if size < M or size >= 2 * M:
                state.cache[:] = [F.pad(old, (0, 0, 0, M - size)) for old in state.cache]  # negative padding crops
            step(model, job, state, M)
        return run_step
    captured, pool, stream = {}, torch.cuda.graph_pool_handle(), torch.cuda.Stream(state.t.device)
    def run_step(M):
        if M in captured:
            return captured[M].replay()
        step(model, job, state, M)                                           # a capture records, and does not run
        captured[M] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured[M], pool=pool, stream=stream):
            step(model, job, state, M)
    return run_step


def check_given(model, n, pos, code):
    """Raise UserError unless the given pairs (n, L) are prefixes of valid sequences, with contents below V.
    `pack` must reproduce a prefix if all uncovered regions get the finest granularity."""
    layout, V = model.layout, model.config.codebook_size
    require(pos.shape == code.shape == (n, layout.max_len), f"given tensors must have shape ({n}, {layout.max_len})")
    in_range = -1 <= pos.min() and pos.max() <= layout.end and -1 <= code.min() and code.max() < V
    require(in_range, f"given positions must be below {layout.n_positions} and contents below {V} (-1: sampled)")
    known = pos >= 0
    grains = layout.grains(torch.where(known, pos, layout.end))              # n, N
    grains = torch.where(grains < 0, layout.n_grains - 1, grains).view(n, layout.side, -1)  # uncovered: the finest
    whole, _ = layout.pack(grains.new_zeros(n, layout.fine_side, layout.fine_side), grains)  # n, L
    prefix = (known.int().diff(dim=1) <= 0).all() and (whole == pos)[known].all()  # -1 comes last
    require(prefix, "given positions must form a prefix of a valid sequence")


def generate(model, label, options=SampleOptions(), seed=0, given=None, slots=None, first=0, graphs=None, bucket=None,
             sync_every=None, compile=False, progress=None):
    """Sample images. Returns pos and code, each (n, max_len), for Layout.unpack. label: (n,) classes, or -1. Image i
    depends on its label, the options, the seed and its index first + i, but not on other images. given: optional
    (pos, code), each (n, max_len), -1 where sampled; given positions must form a prefix. slots: images decoded
    concurrently (None: all). progress: called with (n_done, pos, code) when host and device synchronise. The first
    n_done images are then complete, and at the end n_done is n. If `progress` returns True, sampling ends.
    The other arguments change the speed only. bucket: attention reads a multiple of this many cache entries; graphs
    (None: on GPUs): capture CUDA graphs; sync_every: steps between synchronisations; compile: use torch.compile."""
    options.check()
    n, L, device = len(label), model.layout.max_len, label.device
    last = max(0, model.n_classes - 1)                                       # without classes, 0 means no label, too
    require(((label >= -1) & (label <= last)).all(), f"labels must be in [-1, {last}]; -1: none")
    if given is not None:
        check_given(model, n, *given)
    graphs = device.type == "cuda" if graphs is None else graphs
    bucket, sync_every = bucket or (128 if graphs else 32), sync_every or (32 if graphs else 1)
    step = torch.compile(decode_one) if compile else decode_one
    slots = max(1, min(n, slots or n))
    with torch.inference_mode(), torch.cuda.device_of(label), torch.autocast(device.type, enabled=False):
        M = -(-L // bucket) * bucket if graphs else bucket                   # L, rounded up, or the first bucket
        job, state = start(model, label, options, seed, given, first, slots, M)
        run_step = make_stepper(step, model, job, state, graphs)
        longest = 0                                                          # all t are at most this
        for n_steps in itertools.count(1):
            run_step((longest // bucket + 1) * bucket)
            longest = min(longest + 1, L - 1)
            if n_steps % sync_every == 0:
                n_done, longest = torch.stack([state.image.min(), state.t.max()]).tolist()  # n_done: images complete
                if (progress and progress(n_done, state.pos, state.code)) or n_done == n:
                    break
    return state.pos[:n].clone(), state.code[:n].clone()                     # normal tensors, not inference tensors


# ---- 8  Checkpoints ----------------------------------------------------------------------------

def write_file(path, save, sync=True):
    """Atomic write: save(file) to a temporary file, then rename it, so that a failure leaves the older file intact.
    sync: wait until the disk has the data; False for files that are easy to recreate."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            save(file)
            file.flush()
            if sync:
                os.fsync(file)
        os.replace(temporary, path)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"could not write {path} ({str(error).splitlines()[0]}); any previous file is intact") from None
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path, kind, config, model, **state):
    """One file: kind (dq-vae, dq-transformer), config as a dict, weights, and what a trainer needs to resume."""
    checkpoint = dict(kind=kind, layout=Layout.name, config=asdict(config), weights=model.state_dict(), **state)
    write_file(path, lambda file: torch.save(checkpoint, file))


def load_checkpoint(path, kind):
    """-> the dict that was saved, on the CPU. Raises UserError if the file is not a checkpoint of this kind."""
    maker = "train_transformer.py" if kind == "dq-transformer" else "train_vae.py"
    require(os.path.isfile(path), f"no such file: {path} ({maker} writes it)")
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():                                            # torch.load verifies no checksums
                raise zipfile.BadZipFile
        checkpoint = torch.load(path, map_location="cpu", mmap=kind == "dq-codes", weights_only=True)  # no pickled code
        found, order = checkpoint.get("kind", "unknown"), checkpoint.get("layout", "of an older version")
    except Exception as error:
        raise UserError(f"{path} is not a checkpoint, or is corrupt ({type(error).__name__})") from None
    require(found == kind, f"{path} is of kind {found}, not {kind} ({maker} writes it)")
    require(order == Layout.name or kind != "dq-transformer", f"{path} was trained with another token order ({order}; "
            f"this version uses {Layout.name}); retrain with {maker}")
    return checkpoint


def rebuild(model_class, config_class, config, weights, device):
    """Rebuild a saved model in evaluation mode, without gradients. config: the dict that was saved"""
    try:
        model = model_class(config_class(**config))
        model.load_state_dict(weights)
    except (TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"the checkpoint is corrupt or from another version ({str(error).splitlines()[0]})") from None
    return model.to(device).eval().requires_grad_(False)


def load_vae(path, device):
    saved = load_checkpoint(path, "dq-vae")
    return rebuild(DQVAE, VAEConfig, saved.get("config"), saved.get("weights"), device)


def load_transformer(path, device):
    """-> DQTransformer and DQVAE. path: a file, or the dict from `load_checkpoint`"""
    saved = path if isinstance(path, dict) else load_checkpoint(path, "dq-transformer")
    return (rebuild(DQTransformer, TransformerConfig, saved.get("config"), saved.get("weights"), device),
            rebuild(DQVAE, VAEConfig, saved.get("vae_config"), saved.get("vae_weights"), device))


# ---- 9  Distributed training, and random numbers independent of the world size -----------------

def rank_world():
    """-> rank and world size under torchrun, (0, 1) without it."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


class AllReduceSum(torch.autograd.Function):
    """Sum of a tensor over the ranks. Its gradient is summed over the ranks, too."""
    @staticmethod
    def forward(ctx, x):
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient):
        return AllReduceSum.apply(gradient)


def all_reduce_sum(x):
    return AllReduceSum.apply(x) if rank_world()[1] > 1 else x


def all_gather(x):
    """Concatenate x (B, ...) of all ranks, differentiably. -> (world B, ...)"""
    rank, world = rank_world()
    if world == 1:
        return x
    parts = x.new_zeros(world, *x.shape)
    parts[rank] = x
    return all_reduce_sum(parts).flatten(0, 1)


def sample_global(fill, shape, device):
    """Random numbers (B, ...) for the images of this rank. All ranks share a seed; each samples the global batch and
    keeps its slice, so results don't depend on the world size. fill: torch.Tensor.uniform_, for example"""
    rank, world = rank_world()
    return fill(torch.empty(world * shape[0], *shape[1:], device=device)).chunk(world)[rank]


def numpy_rng(*seeds):
    """A NumPy generator, seeded by integers below 2**64. Distinct tuples of equal length give distinct streams."""
    return np.random.default_rng([seed % 2 ** 32 for seed in seeds] + [seed >> 32 for seed in seeds])
