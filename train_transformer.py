"""Stage 2: train a DQ-Transformer on codes.pt.    python train_transformer.py

Reads codes.pt: the codes of all images, and the frozen DQ-VAE. Writes into --out: transformer.pt (the checkpoint for
sample.py), transformer.best.pt (of the lowest validation loss), transformer.jsonl (log) and transformer.png (samples).
"""
import contextlib
import math
import shlex
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

import dq
from common import (Record, Schedule, Stop, distribute, draw_grains, explained, flag, number, on_gpu, override, path,
                    positive, prepare, run, save_grid, say, seed_all, shuffled_indices, to_picture, trainer_flags)


@dataclass
class TransformerSchedule(Schedule):
    """Hyperparameters of training, and the sampling options that checkpoints carry: by default those for photos."""
    decay: str = "linear"                # 3 nats better than a cosine, on the toy data
    optimizer: str = flag("muon", choices=["muon", "adamw"], help="muon: for the blocks' matrices, AdamW elsewhere")
    sampling: dq.SampleOptions = dq.SampleOptions(temperature=1.0, cfg=1.5)


SHAPES = dq.SampleOptions(temperature=0.7, cfg=2.0)                          # for few, clearly drawn kinds of image
LARGE = dq.TransformerConfig(width=1024, heads=8, position_layers=6, content_layers=18, dropout=0.1, rotary=False)
PAPER = TransformerSchedule(steps=507_000, batch_size=240, accumulate=4, lr=5e-4, betas=(0.9, 0.95),
                            weight_decay=0.01, warmup=1000, eval_every=5000, decay="cosine", optimizer="adamw",
                            sampling=dq.SampleOptions(top_k=300))            # 100 epochs of 1,217,000 images
OURS = dq.TransformerConfig(qk_norm=True)
MEDIUM = replace(OURS, width=256, heads=8, content_layers=6)
SHORT = TransformerSchedule(steps=800, batch_size=32, lr=4e-3, weight_decay=0.1, eval_every=200)
LONG = TransformerSchedule(steps=10_000, batch_size=64, lr=3e-3, weight_decay=0.1, eval_every=500)
TOY = replace(SHORT, lr=5e-3, weight_decay=0.05, accumulate=2, sampling=SHAPES)

PRESETS = {                                                                  # train_vae.py says what each is for
    "toy": (OURS, TOY),
    "toy64": (MEDIUM, replace(LONG, steps=6000, weight_decay=0.05, eval_every=250, sampling=SHAPES)),
    **dict.fromkeys(["folder32", "folder64"], (replace(OURS, dropout=0.1), SHORT)),
    **dict.fromkeys(["folder64-large", "folder128"], (replace(MEDIUM, dropout=0.2), LONG)),
    "folder256": (replace(OURS, width=512, heads=8, position_layers=3, content_layers=9, dropout=0.1), LONG),
    "emoji64": (replace(OURS, width=160, heads=5, content_layers=6, dropout=0.3),
                replace(LONG, steps=5000, eval_every=250, sampling=SHAPES)),
    "earth64": (replace(OURS, content_layers=6, dropout=0.1), replace(LONG, steps=4500, batch_size=96, eval_every=750)),
    "emoji128": (replace(OURS, width=384, position_layers=3, content_layers=9, dropout=0.1),
                 replace(LONG, steps=20_000, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05, eval_every=1000)),
    "ffhq256": (LARGE, replace(PAPER, steps=27_700, eval_every=1000)),       # 100 epochs of 66,500 images
    **dict.fromkeys(["imagenet256", "imagenet256-triple"], (LARGE, PAPER)),  # the paper's model and schedule
    # for codes of the preset toy: without what is ours, RoPE, QK-norm, Muon and the linear decay
    "toy-paper": (dq.TransformerConfig(rotary=False), replace(TOY, lr=1.5e-3, decay="cosine", optimizer="adamw")),
}


# ---- Flags and data ----------------------------------------------------------------------------

def fit(stored, device):
    """codes.pt -> name, config, schedule: the preset of its recipe, or else one for its number of codes and images."""
    name, vae, images = stored.get("preset"), stored["config"], len(stored["train"]["label"])
    if name in PRESETS and not name.startswith("folder"):
        return name, *PRESETS[name]
    codes = sum(ratio * (vae["size"] // factor) ** 2 for ratio, factor in zip(vae["ratios"], vae["factors"]))
    name = ("folder256" if codes * images >= 5e6 else "folder64-large") if on_gpu(device) else "folder64"
    config, schedule = PRESETS[name]
    if codes > 100 and name == "folder64":                                   # long sequences: fewer images per step
        schedule = replace(schedule, batch_size=8)
    return name, replace(config, dropout=0.3) if images < 500 else config, schedule


def parse(argv=None):
    """-> flags, config, schedule. Without --preset, `fit` chooses one for codes.pt."""
    parser, replacing = trainer_flags("Train a DQ-Transformer on the codes of a DQ-VAE.", PRESETS, TransformerSchedule)
    add, fraction = parser.add_argument, number(float, 0, below=1)
    add("--codes", metavar="FILE", type=path, help="codes.pt of train_vae.py; default: the one in --out")
    add("--uncond", action="store_true", help="train an unconditional model, without the labels")
    replacing("--position-layers", type=positive, help="layers of the position stack")
    replacing("--content-layers", type=positive, help="layers of the content stack")
    replacing("--width", type=positive, help="embedding width")
    replacing("--heads", type=positive, help="number of attention heads")
    replacing("--dropout", type=fraction, help="dropout probability")
    replacing("--label-dropout", type=fraction, help="probability of hiding a label; 0: no classifier-free guidance")
    args = parser.parse_args(argv)
    args.codes = args.codes or args.out / "codes.pt"
    config, schedule = PRESETS[args.preset or "toy"]
    if not args.preset:
        with contextlib.suppress(Exception):                                 # `read_codes` reports what is wrong
            args.preset, config, schedule = fit(torch.load(args.codes, mmap=True, weights_only=True), args.device)
    args.save_every = args.save_every or schedule.eval_every
    return args, override(config, args), override(schedule, args)


def read_codes(path):
    """-> the dict that train_vae.py wrote, memory-mapped, so that processes on one machine share its tensors."""
    try:
        stored = dq.load_checkpoint(path, "dq-codes")
        dq.require(stored.get("version") == 1, f"{path} is of another version")
        return stored
    except dq.UserError as error:
        raise dq.UserError(f"{error}; to make it from a DQ-VAE: python train_vae.py --encode "
                           f"{path.with_name('vae.pt')} --out {path.parent}") from None


class Images:
    """A part of codes.pt, {codes (n, views, H, W), grains, label (n,)}, as M = n * views images."""
    def __init__(self, part, factors, uncond=False):
        label = part["label"].repeat_interleave(part["codes"].shape[1])
        self.codes, self.grains = part["codes"].flatten(0, 1), part["grains"].flatten(0, 1)  # M, H, W; M, h, w
        self.label = torch.full_like(label, -1) if uncond else label         # M; -1 without a class
        codes = sum((self.grains == k).sum(dim=(1, 2)) * (factors[0] // f) ** 2 for k, f in enumerate(factors))
        self.length = codes + len(factors)                                   # M; EOS tokens included


def batches(length, batch_size, seed, start=0):
    """Endless batches of image indices (batch_size,) in the order of `shuffled_indices`, from batch `start` on. Each is
    sorted by sequence length (M,), so that its parts need little padding. (Batches of one length learned less.)"""
    for batch in shuffled_indices(len(length), batch_size, seed, start):
        index = np.array(batch) % len(length)
        yield torch.from_numpy(index[np.argsort(length[index], kind="stable")])


def sequences(images, index, layout, device):
    """The images of these indices (B,) -> pos, code, each (B, L), and label (B,), on the device. L is the longest
    length among them, rounded up to a multiple of 8 on GPUs and of 2 on CPUs: fewer shapes to compile."""
    gpu, parts = device.type == "cuda", (images.codes, images.grains, images.label)
    batch = [x[index].pin_memory() if gpu else x[index] for x in parts]      # otherwise the copy would synchronise
    codes, grains, label = (x.to(device, non_blocking=True).long() for x in batch)
    pos, code = layout.pack(codes, grains)                                   # B, max_len
    multiple = 8 if gpu else 2
    columns = -(-int(images.length[index].max()) // multiple) * multiple
    return pos[:, :columns], code[:, :columns], label


# ---- Evaluation --------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, held_out, device, autocast, batch_size=64, limit=None):
    """The negative log-likelihood per image, code and pixel, of all images or of `limit`, which are always the same."""
    model.eval()
    chosen = torch.from_numpy(np.sort(dq.numpy_rng(0).permutation(len(held_out.label))[:limit]))
    length, sums = held_out.length[chosen], torch.zeros(2, device=device)
    for index in chosen[length.argsort()].split(batch_size):                 # similar lengths, so little padding
        pos, code, label = sequences(held_out, index, model.layout, device)  # B, L; B, L; B
        with autocast():
            nll = model(pos, code, label)
        sums += torch.stack([nll["position"].sum(), nll["content"].sum()])
    model.train()
    position, content = (sums / len(chosen)).tolist()
    codes = (length - len(model.config.factors)).float().mean().item()
    bits = (position + content) / math.log(2)
    return dict(nats_per_image=position + content, position_nats=position, content_nats=content,
                bits_per_code=bits / codes, bits_per_pixel=bits / model.config.size ** 2, codes_per_image=codes)


def save_samples(path, model, vae, options, seed, autocast, n=16, batch_size=64):
    """Save a grid of samples, each beside its granularity map."""
    model.eval()
    label = torch.arange(n, device=vae.codebook.codes.device) % max(1, len(model.config.classes))
    codes, grains = model.layout.unpack(*dq.generate(model, label, options, seed, slots=batch_size))
    with autocast(), torch.no_grad():
        images = torch.cat([vae.decode(part) for part in codes.split(batch_size)])
    model.train()
    pairs = [(to_picture(x), draw_grains(x, g, vae.config.factors)) for x, g in zip(images, grains)]
    save_grid(path, sum(pairs, ()), columns=8)


# ---- Training ----------------------------------------------------------------------------------

class Muon(torch.optim.Muon):
    """torch.optim.Muon in float32. The original uses bfloat16, which takes 15 times as long on CPUs that emulate it."""
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            a, b, c = group["ns_coefficients"]
            for p in (p for p in group["params"] if p.grad is not None):
                momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                x = p.grad.lerp(momentum, group["momentum"])                 # Nesterov; m, n
                x = x.T if x.shape[0] > x.shape[1] else x                    # the smaller Gram matrix
                x = x / x.norm().clamp(min=group["eps"])
                for i in range(group["ns_steps"]):                           # Newton-Schulz: singular values become 1
                    # x becomes (a + b gram + c gram^2) x; such factors commute, so gram can be updated without x
                    gram = factor @ gram @ factor if i else x @ x.T          # m, m
                    factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
                    factor.diagonal().add_(a)
                    product = factor @ product if i else factor              # m, m: of the factors so far
                x = product @ x                                              # m, n
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(x if x.shape == p.shape else x.T, alpha=-0.2 * group["lr"] * max(p.shape) ** 0.5)


def make_optimizers(model, schedule, muon=Muon):
    """-> {name: optimizer}. Muon (Jordan et al., 2024) orthogonalises the momentum of a matrix. Its updates are scaled
    to the size of AdamW's, so that both take the same learning rate. muon: its class"""
    stacks = [*model.position_stack.parameters(), *model.content_stack.parameters()]
    inside = [p for p in stacks if p.dim() == 2] if schedule.optimizer == "muon" else []
    outside = [p for p in model.parameters() if p not in {*inside}]
    groups = [dict(params=[p for p in outside if p.dim() > 1], weight_decay=schedule.weight_decay),
              dict(params=[p for p in outside if p.dim() <= 1], weight_decay=0.0)]
    optimizers = dict(optimizer=torch.optim.AdamW(groups, lr=schedule.lr, betas=schedule.betas, fused=True))
    if inside:
        optimizers["muon"] = muon(inside, lr=schedule.lr, weight_decay=schedule.weight_decay,
                                  adjust_lr_fn="match_rms_adamw")
    return optimizers


def main(argv=None):
    args, config, schedule = parse(argv)
    device, autocast, machine = prepare(args, schedule)
    rank, world = dq.rank_world()
    stored = read_codes(args.codes)
    with explained(f"{args.codes} is damaged, or of another version"):
        vae = dq.rebuild(dq.DQVAE, dq.VAEConfig, stored["config"], stored["weights"], device)
        factors, classes, name = vae.config.factors, stored["classes"], stored["name"]
        train, held_out = (Images(stored[part], factors, args.uncond) for part in ("train", "held_out"))
    say(f"codes: {args.codes}, {name}, {len(train.label)} views of them to train on, "
        f"{len(held_out.label)} images for validation; {len(classes)} classes; preset {args.preset}")
    config = replace(config, size=vae.config.size, factors=factors, codebook_size=vae.config.codebook_size,
                     classes=() if args.uncond else classes)

    seed_all(args.seed)
    model = dq.DQTransformer(config).to(device)
    optimizers = make_optimizers(model, schedule, torch.optim.Muon if machine["dtype"] == "bf16" else Muon)
    settings = dict(codes=name, seed=args.seed) | asdict(schedule) | machine
    options, guided = settings.pop("sampling"), config.classes and config.label_dropout
    options = options if guided else options._replace(cfg=1.0)               # guidance needs the vector "no label"
    extra = dict(vae_config=asdict(vae.config), vae_weights=vae.state_dict(), psnr=stored.get("psnr"),
                 sample_options=options._asdict())
    record = Record(args, args.out / "transformer.pt", config, settings, model, optimizers, extra)
    record.begin()
    forward = distribute(torch.compile(model) if args.compile else model)
    order = batches(train.length.numpy(), schedule.batch_size, args.seed, record.step)
    codes_per_image = (train.length - len(factors)).float().mean().item()

    def validate(step):
        metrics = evaluate(model, held_out, device, autocast, args.part, limit=512)
        save_samples(args.out / "transformer.png", model, vae, options, args.seed, autocast, batch_size=args.part)
        return metrics, metrics["nats_per_image"]

    with Stop() as stop:
        for step in record.steps("DQ-Transformer", stop, validate):
            seed_all(args.seed, step, rank)                                  # a different dropout mask on each rank
            for part in next(order)[rank::world].chunk(schedule.accumulate):
                pos, code, label = sequences(train, part, model.layout, device)  # B / parts, L; the same; B / parts
                with autocast():
                    nll = forward(pos, code, label)
                # backward sums over the parts, and averages over the ranks: together the mean over the batch
                position, content = (nll[name].sum() * world / schedule.batch_size for name in ("position", "content"))
                loss = (position + content) / codes_per_image                # nats per code; long images count for more
                loss.backward()
                bits = loss / math.log(2)
                record.add(step + 1, dict(bits_per_code=bits, position_nats=position, content_nats=content))
            schedule.update(model, optimizers, step)
    if metrics := record.metrics:
        say(f"done: validation loss {metrics['nats_per_image']:.1f} nats per image (lowest: {record.best:.1f}), "
            f"samples: {args.out / 'transformer.png'}; next: python sample.py {shlex.quote(str(args.out))}")


if __name__ == "__main__":
    run(main)
