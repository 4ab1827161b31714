"""Measures speed, as ratios within one run.    python tests/tools/benchmark.py sampling | stage1 | stage2

sampling compares the fused loop with a loop that runs the model on the whole sequence so far at every step: 2 + 6
         layers, width 256, 8 heads, 512 codes, half of the regions fine. The naive loop is timed at every 16th step
         of the sequences that the fused loop sampled. In fp32 it must sample the same codes there.
         --count prints the number of kernels in a step of the paper's model on a GPU, and the bytes of weights and of
         cache that they read. It counts on the device "meta", so it needs no GPU.

stage1   times a training step of the paper's DQ-VAE (dual, 256 x 256, batch 2, autoencoder and codebook losses):
         ours in bf16, ours in fp32, and the same network in its plain textbook form in fp32. Also ours in bf16 with
         all losses: LPIPS (with random weights, which take as long) and the discriminator's step. GPUs train with
         channels last, for which an uncompiled group norm has to permute each map, so GPUs get a row without it.

stage2   times training steps of a preset's DQ-Transformer, in tokens per second without padding (toy: with the tilings
         of its data). Ours has parts of similar length, bf16 if --dtype asks for it, and explicit attention on CPUs.
         The straightforward loop has random batches padded to the longest sequence, fp32 and torch's own attention.
         It also prints the model's FLOP/s as a fraction of those of one large matrix product.
"""
import argparse
import copy
import itertools
import os
import platform
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data as reading  # noqa: E402
import dq  # noqa: E402
import fake_gpu  # noqa: E402
import sample  # noqa: E402
import train_transformer  # noqa: E402
import train_vae  # noqa: E402


def hardware(device):
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            name = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def compare(device, rounds, **steps):
    """Run all steps alternately, `rounds` times after a warm-up. -> {name: [seconds]}"""
    seconds = {name: [] for name in steps}
    for i in range(rounds + 1):
        for name, step in steps.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if i:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds, slow, fast):
    """Median over the rounds of slow / fast."""
    return statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast]))


# ------------------------------------------------------------------------------------------------
# sampling


def count_step(batch_size, dtype, cfg, end=384):
    """A step of the paper's model (class-conditional, 256 x 256) -> kernels, bytes of weights, bytes of cache

    end: length of the cache that attention reads. It grows in steps of 128; its mean is 384 for an image half of whose
    regions are fine.
    """
    config = replace(train_transformer.LARGE, size=256, factors=(16, 8), codebook_size=1024, classes=range(1000))
    with torch.device("meta"):
        model = dq.DQTransformer(config).to(dtype).eval()
        label = torch.zeros(batch_size, dtype=torch.long)
    with torch.no_grad():
        # as in dq.generate: the caches hold a whole image
        job, state = dq.start(model, label, dq.SampleOptions(cfg=cfg), 0, None, first=0, slots=batch_size, M=1152)
        with fake_gpu.rehearsal(fused_attention=True) as seen:
            dq.decode_one(model, job, state, end)
    assert not seen.waits, seen.waits
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    caches = {cache.untyped_storage()._cdata for cache in state.cache}
    n_bytes = [sum(x.nbytes for x in seen.read if x.untyped_storage()._cdata in known) for known in (weights, caches)]
    return seen.kernels, *n_bytes


def count():
    print("Counts for a step of the paper's model on a GPU; mean over an image half of whose regions are fine")
    print(f"{'batch':>5}{'type':>6}{'guidance':>10}{'kernels':>9}{'weights MB':>12}{'cache MB':>10}")
    for batch_size in (1, 64):
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            for guidance, cfg in (("no", 1.0), ("yes", 2.0)):
                kernels, weights, cache = count_step(batch_size, dtype, cfg)
                print(f"{batch_size:5}{name:>6}{guidance:>10}{kernels:9}{weights / 1e6:12.1f}{cache / 1e6:10.1f}")


def sampling(args):
    if args.count:
        return count()
    device, dtype = torch.device(args.device), dict(fp32=torch.float32, bf16=torch.bfloat16)[args.dtype]
    side = int(args.regions ** 0.5)
    torch.manual_seed(0)
    config = dq.TransformerConfig(size=8 * side, factors=(8, 4), codebook_size=args.codebook_size, width=args.width,
                                  heads=8, position_layers=args.position_layers, content_layers=args.content_layers,
                                  qk_norm=True)
    model = dq.DQTransformer(config).to(device).eval()
    drawing, layout = copy.deepcopy(model).to(dtype), model.layout
    matrices = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    read = sum(w.numel() for w in matrices) * dtype.itemsize                 # bytes per step
    print(f"Sampling {side} x {side} regions, half of them fine; {args.position_layers} + {args.content_layers} "
          f"layers, width {args.width}, {args.dtype}{', compiled' if args.compile else ''}; {hardware(device)}")
    copying = f"; copy bandwidth {copy_bandwidth(device):.0f} GB/s" if device.type == "cuda" else ""
    print(f"jobs of {args.images} images per slot; medians of {args.rounds} rounds{copying}")
    print(f"{'batch':>5}{'images/s':>10}{'ms per code':>12}{'weights GB/s':>14}{'naive images/s':>16}"
          f"{'fused / naive':>15}{'matrix work':>13}")
    for B in args.batch_sizes:
        n = args.images * B
        fine = torch.rand(n, side * side, device=device).argsort(1) < side * side // 2
        given = sample.given_tiling(layout, fine.view(n, side, side).long())
        label = torch.full((n,), -1, device=device)

        def fused():
            return dq.generate(drawing, label, seed=1, given=given, slots=B, compile=args.compile)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = statistics.median(compare(device, args.rounds, fused=fused)["fused"]) / args.images  # for B images
        peak = f"  {torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB at most" if device.type == "cuda" else ""
        pos, code = (t[:B] for t in fused())
        length = int(layout.lengths(pos)[0])
        job, _ = dq.start(model, label[:B], dq.SampleOptions(), 1, None, first=0, slots=1, M=1)
        u = job.uniform[:B]                                                  # B, L, 2: the random numbers
        with torch.inference_mode():
            naive = 0.0
            for t in range(0, length, 16):
                def step():
                    with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bf16"):
                        position, content = model.logits(pos[:, :t + 1], code[:, :t + 1])
                    return dq.draw(position[:, t], u[:, t, 0]), dq.draw(content[:, t], u[:, t, 1])
                _, drawn = step()
                there = code[:, t] >= 0
                if args.dtype == "fp32":
                    assert torch.equal(drawn[there], code[there, t]), "the loops draw different codes"
                naive += min(16, length - t) * statistics.median(compare(device, 1, step=step)["step"])
        fraction = matrix_fraction(fused) if device.type == "cpu" else float("nan")
        codes = int((code >= 0).sum()) / B
        print(f"{B:5}{B / seconds:10.2f}{1000 * seconds / codes:12.2f}{read * length / seconds / 1e9:14.1f}"
              f"{B / naive:16.3f}{naive / seconds:15.1f}{fraction:13.0%}{peak}", flush=True)


def copy_bandwidth(device):
    """Bytes read and written per second when copying 1 GiB, in GB/s."""
    a = torch.empty(2 ** 30, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2 * len(a) / min(compare(device, 5, copy=lambda: b.copy_(a))["copy"]) / 1e9


def matrix_fraction(step):
    """Fraction of the time that is spent in matrix products and attention."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    own = {e.key: e.self_cpu_time_total for e in profile.key_averages()}
    of_products = sum(v for k, v in own.items() if any(name in k for name in ("mm", "_linear", "attention")))
    return of_products / sum(own.values())


# ------------------------------------------------------------------------------------------------
# stage1


class TextbookAttention(dq.AttnBlock):
    """softmax(q k^T / sqrt(c)) v, written out."""

    def forward(self, x):
        B, c, H, W = x.shape
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=-1)  # each B, H W, c
        weights = (q @ k.transpose(1, 2) * c ** -0.5).softmax(dim=-1)        # B, H W, H W
        return x + self.proj((weights @ v).transpose(1, 2).reshape(B, c, H, W))


class TextbookCodebook(dq.Codebook):
    """The complete squared distance, and averages by products with the one-hot matrix of the assignments."""

    def assign(self, z):
        return (z.square().sum(1, keepdim=True) - 2 * z @ self.codes.t() + self.codes.square().sum(1)).argmin(dim=1)

    @torch.no_grad()
    def update(self, z, weight, ids):
        chosen = F.one_hot(ids, len(self.codes)).float() * weight[:, None]   # B H W, V
        self.age += 1
        decay = torch.minimum(self.age / (9 + self.age), torch.tensor(self.decay, device=z.device))
        self.uses.copy_(decay * self.uses + (1 - decay) * chosen.sum(0))
        self.sums.copy_(decay * self.sums + (1 - decay) * (chosen.t() @ z))
        self.codes.copy_(self.sums / self.uses[:, None].clamp(min=1e-6))


class TextbookVAE(dq.DQVAE):
    def mix(self, maps, gate):
        side, h = maps[-1].shape[-1], gate.shape[-1]
        gate = gate.repeat_interleave(side // h, dim=2).repeat_interleave(side // h, dim=3)  # B, K, H, W
        maps = [m.repeat_interleave(side // m.shape[2], dim=2).repeat_interleave(side // m.shape[3], dim=3)
                for m in maps]                                               # each B, C, H, W
        return sum(gate[:, k:k + 1] * m for k, m in enumerate(maps))


def textbook(model):
    """The same weights in the textbook form."""
    plain = TextbookVAE(model.config)
    for module in plain.modules():
        if type(module) is dq.AttnBlock:
            module.__class__ = TextbookAttention
        elif type(module) is dq.Codebook:
            module.__class__ = TextbookCodebook
    plain.load_state_dict(model.state_dict())
    return plain


def stage1(args):
    device = torch.device(args.device)
    config = train_vae.PRESETS["imagenet256"][0]
    torch.manual_seed(0)
    model = dq.DQVAE(config)
    x = torch.rand(args.batch_size, 3, config.size, config.size, device=device) * 2 - 1

    on_gpu = device.type == "cuda"
    as_trained = torch.channels_last if on_gpu else torch.contiguous_format

    def make_step(model, bf16, all_losses=False, memory_format=as_trained):
        model = model.to(device, memory_format=memory_format)
        forward = train_vae.compiled(model) if bf16 and args.compile else model
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
        if all_losses:
            lpips = train_vae.Perceptual().to(device)
            discriminator = train_vae.Discriminator().to(device, memory_format=memory_format)
            for weight in lpips.weights:
                weight.fill_(0.1)
            discriminator_optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-4)

        def autocast():
            return torch.autocast(device.type, torch.bfloat16, enabled=bf16)

        def step():
            torch.manual_seed(0)
            with autocast():
                out = forward(x)
            y = out.reconstruction.float()                                   # B, 3, S, S
            loss, other = (y - x).abs().mean(), out.commitment + 10 * dq.budget_loss(out.gate, config.ratios)
            optimizer.zero_grad(set_to_none=True)
            if all_losses:
                with autocast():
                    perceptual, adversarial = lpips(x, y).mean(), -discriminator(y).mean()
                train_vae.backward(y, model.decoder.out[-1].weight, loss + perceptual, adversarial, other)
                discriminator_optimizer.zero_grad(set_to_none=True)
                with autocast():
                    hinge = train_vae.hinge_loss(discriminator(x), discriminator(y.detach()))
                hinge.backward()
                discriminator_optimizer.step()
            else:
                (loss + other).backward()
            optimizer.step()
            return (loss + other).item()
        return step

    plain, copies = textbook(model), [dq.DQVAE(config) for _ in range(3)]
    for each in copies:
        each.load_state_dict(model.state_dict())
    steps = dict(textbook=make_step(plain, False), fp32=make_step(model, False), bf16=make_step(copies[0], True),
                 all=make_step(copies[1], True, True))
    if on_gpu:
        steps["contiguous"] = make_step(copies[2], True, memory_format=torch.contiguous_format)
    losses = {name: step() for name, step in steps.items()}
    for name, loss in losses.items():                                        # the same network has the same first loss
        assert abs(loss - losses["textbook"]) < (1e-3 if name == "fp32" else 2e-2), losses
    seconds = compare(device, args.rounds, **steps)
    print(f"One training step of DQ-VAE (dual, 256 x 256, batch {args.batch_size}), {hardware(device)}; "
          f"medians of {args.rounds} rounds")
    print(f"{'':34}{'s per step':>11}{'images/s':>10}{'textbook / this':>17}")
    compiled = ", compiled" if args.compile else ""
    labels = dict(textbook="textbook, fp32", fp32="ours, fp32", bf16=f"ours, bf16{compiled}",
                  all=f"all losses{compiled}", contiguous=f"ours, bf16{compiled}, not channels last")
    for name in steps:
        median = statistics.median(seconds[name])
        print(f"{labels[name]:34}{median:11.2f}{args.batch_size / median:10.2f}"
              f"{ratio(seconds, 'textbook', name):17.2f}")
    print(f"fp32 / bf16: {ratio(seconds, 'fp32', 'bf16'):.2f}")


# ------------------------------------------------------------------------------------------------
# stage2


class TextbookBlock(dq.Block):
    """Attention by torch's own function on every device."""

    def forward(self, x, rope=None):
        B, L, C = x.shape
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)                   # each B, L, C
        q, k, v = (t.view(B, L, self.heads, -1).transpose(1, 2) for t in (q, k, v))  # each B, heads, L, d
        if self.qk_norm:
            q, k = (F.layer_norm(x, x.shape[-1:]).type_as(v) for x in (q, k))
        if rope is not None:
            of_q, of_k, _ = rope.unbind(2)                                   # each B, L, 1, 2, d
            q, k = dq.apply_rope(q, of_q.transpose(1, 2)), dq.apply_rope(k, of_k.transpose(1, 2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(B, L, C))                # B, L, C
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def stage2(args):
    device, n_steps = torch.device(args.device), args.steps
    vae, (config, schedule) = train_vae.PRESETS[args.preset][0], train_transformer.PRESETS[args.preset]
    config = replace(config, size=vae.size, factors=vae.factors, codebook_size=vae.codebook_size)
    B, parts = schedule.batch_size, args.accumulate or schedule.accumulate
    layout = dq.Layout(config.size, config.factors)
    torch.manual_seed(0)
    if args.preset == "toy":
        toy = reading.ToyShapes()
        detail = torch.stack([toy.detail_mask(i) for i in range(2048)]).float()  # M, S, S
        grains = (F.avg_pool2d(detail, config.factors[0]) > 0.1).long()      # M, h, w
    else:
        grains = torch.bucketize(torch.rand(2048, layout.side, layout.side), torch.tensor(vae.ratios).cumsum(0)[:-1])
    codes = torch.randint(config.codebook_size, (len(grains), layout.side, layout.side))  # one per region is enough
    codes = dq.upsample(codes[:, None].float(), layout.fine_side).short()    # M, 1, H, W
    part = dict(codes=codes, grains=grains[:, None].byte(), label=torch.full((len(codes),), -1))
    images = train_transformer.Images(part, config.factors)
    pos, code = layout.pack(codes[:, 0].long(), grains)
    length, label = images.length, images.label
    pos, code = pos[:, :length.max()], code[:, :length.max()]

    def make(ours):
        torch.manual_seed(0)
        model = dq.DQTransformer(config).to(device)
        if not ours:
            for block in (*model.position_stack, *model.content_stack):
                block.__class__ = TextbookBlock
        forward = torch.compile(model) if ours and args.compile else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=ours or None)
        if ours:
            order = train_transformer.batches(length.numpy(), B, seed=0)
        else:
            order = (torch.randint(len(pos), (B,)) for _ in itertools.count())
        tokens = []

        def autocast():
            return torch.autocast(device.type, torch.bfloat16, enabled=args.dtype != "fp32")

        def add_gradients(part):
            if ours:
                batch = train_transformer.sequences(images, part, model.layout, device)
                with autocast():
                    losses = forward(*batch)
            else:
                losses = model(*(t[part].to(device) for t in (pos, code, label)))
            (sum(losses.values()).sum() / B).backward()

        def loop():
            tokens.append(0)
            for _ in range(n_steps):
                batch = next(order)
                optimizer.zero_grad(set_to_none=True)
                for part in batch.chunk(1 if args.preset == "toy" and not ours else parts):
                    add_gradients(part)
                optimizer.step()
                tokens[-1] += int(length[batch].sum())
        return loop, tokens

    (ours, our_tokens), (plain, plain_tokens) = make(True), make(False)
    seconds = compare(device, args.rounds, ours=ours, plain=plain)
    rate = {name: [t / s for t, s in zip(tokens[1:], seconds[name])]
            for name, tokens in (("ours", our_tokens), ("plain", plain_tokens))}
    mean_length = length.float().mean().item()
    print(f"Stage 2, preset {args.preset}, batch {B} in {parts} parts, sequences of {length.min()} to {length.max()} "
          f"pairs (mean {mean_length:.1f}); {hardware(device)}; medians of {args.rounds} rounds of {n_steps} steps")
    dtype, side = torch.float32 if args.dtype == "fp32" else torch.bfloat16, 8192 if device.type == "cuda" else 1024
    a = torch.randn(side, side, device=device, dtype=dtype)
    peak = 2 * side ** 3 / min(compare(device, 5, product=lambda: a @ a)["product"])
    matrices = sum(m.weight.numel() for m in dq.DQTransformer(config).modules() if isinstance(m, torch.nn.Linear))
    layers = config.position_layers + config.content_layers
    flops = 6 * (matrices + layers * config.width * mean_length)             # per token, forward and backward
    compiled = ", compiled" if args.compile else ""
    for name, says in (("plain", "padded, fp32"), ("ours", f"ours, {args.dtype}{compiled}")):
        median = statistics.median(rate[name])
        print(f"{says:22}{median:10.0f} tokens/s{median / mean_length:10.1f} images/s; "
              f"model FLOP/s: {median * flops / peak:.0%} of those of a large {args.dtype} product")
    print(f"ours / padded: {statistics.median(a / b for a, b in zip(rate['ours'], rate['plain'])):.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["sampling", "stage1", "stage2"])
    add = parser.add_argument
    add("--rounds", type=int, default=5)
    add("--batch-size", type=int, default=2, help="stage1")
    add("--regions", type=int, default=64, help="sampling")
    add("--images", type=int, default=4, help="sampling: images per slot")
    add("--codebook-size", type=int, default=512, help="sampling")
    add("--batch-sizes", type=int, nargs="+", default=[1, 8, 64], help="sampling")
    add("--width", type=int, default=256, help="sampling")
    add("--position-layers", type=int, default=2, help="sampling")
    add("--content-layers", type=int, default=6, help="sampling")
    add("--dtype", choices=["fp32", "bf16"], default="fp32", help="sampling, stage2")
    add("--count", action="store_true", help="sampling: count kernels and bytes in a step of the paper's model")
    add("--compile", action="store_true", help="use torch.compile for ours")
    add("--preset", choices=list(train_vae.PRESETS), default="toy", help="stage2")
    add("--steps", type=int, default=20, help="stage2: steps per round")
    add("--accumulate", type=int, help="stage2: gradient accumulation steps; default: the preset's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    globals()[args.what](args)
