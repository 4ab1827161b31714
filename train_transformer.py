"""Stage 2: images and a DQ-VAE -> DQ-Transformer checkpoint.    python train_transformer.py [--data DIR]

The images are encoded once, as they are and mirrored; the loop then trains on codes in memory and
never touches a pixel. Writes into --out: transformer.pt (checkpoint, with the frozen DQ-VAE inside),
transformer.jsonl (log), transformer.png (samples, and where their codes are).
"""
import math
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import dq
from train_vae import Log, common_flags, keep_former, open_data, prepare, restore, set_learning_rate, stream, training_state


def parse(argv=None):
    parser, preset = common_flags("Train a DQ-Transformer on the codes of a DQ-VAE.", "train_transformer", argv)
    config, add = preset.transformer, parser.add_argument
    add("--vae", metavar="FILE", type=Path, help="DQ-VAE checkpoint; None: vae.pt in --out")
    add("--position-layers", type=int, default=config.position_layers, help="layers of the position stack")
    add("--content-layers", type=int, default=config.content_layers, help="layers of the content stack")
    add("--width", type=int, default=config.width, help="channels")
    add("--heads", type=int, default=config.heads, help="attention heads")
    add("--dropout", type=float, default=config.dropout, help="dropout")
    add("--label-dropout", type=float, default=config.label_dropout, help="share of images whose label is hidden")
    add("--uncond", action="store_true", help="ignore the labels")
    return parser.parse_args(argv), preset


class Codes(torch.utils.data.Dataset):
    """Sequences in memory; i may run past the length, as in every data set here."""

    def __init__(self, *tensors):
        self.tensors = tensors

    def __len__(self):
        return len(self.tensors[0])

    def __getitem__(self, i):
        return tuple(t[i % len(self)] for t in self.tensors)


@torch.no_grad()
def encode(vae, data, device, autocast, workers, mirrored):
    """All images -> pos, code (M, L), label (M,), on the CPU, trimmed to the longest; each image twice if mirrored."""
    layout = dq.Layout(vae.config.size, vae.config.factors).to(device)
    loader = torch.utils.data.DataLoader(data, 64, num_workers=workers)
    pos, code, label = [], [], []
    for x, y in tqdm(loader, desc="encoding", disable=None, leave=False):
        x = x.to(device)
        for view in (x, x.flip(3)) if mirrored else (x,):
            with autocast():
                p, c = layout.pack(*vae.encode(view))
            pos, code, label = pos + [p.cpu()], code + [c.cpu()], label + [y]
    pos, code, label = torch.cat(pos), torch.cat(code), torch.cat(label)
    longest = lengths(pos, layout).max()
    return pos[:, :longest], code[:, :longest], label


def lengths(pos, layout):
    """Pairs up to and with the last EOS. (B, L) -> (B,)"""
    return (pos != layout.end).sum(1) + 1


def nats(model, batch, device, autocast):
    """Negative log-likelihoods of a batch: position (B,), content (B,)."""
    pos, code, label = (t.to(device, non_blocking=True) for t in batch)
    # on CPUs the backward of the written-out attention takes half the time of the fused kernel's
    kernels = [SDPBackend.MATH] if device.type == "cpu" else [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with autocast(), sdpa_kernel(kernels):
        losses = model(pos, code, label)
    return losses["position"], losses["content"]


@torch.no_grad()
def evaluate(model, held_out, device, autocast, batch_size=64):
    """Held-out likelihood per image, code and pixel."""
    model.eval()
    pos, code, label = held_out
    parts = [nats(model, (p, c, y), device, autocast)
             for p, c, y in zip(pos.split(batch_size), code.split(batch_size), label.split(batch_size))]
    model.train()
    position, content = (torch.cat(part).mean().item() for part in zip(*parts))
    codes = (code >= 0).sum(1).float().mean().item()
    bits = (position + content) / math.log(2)
    return dict(nats_per_image=position + content, position_nats=position, content_nats=content,
                bits_per_code=bits / codes, bits_per_pixel=bits / model.config.size ** 2, codes_per_image=codes)


def draw_samples(path, model, vae, seed, autocast, n=16):
    """A grid of samples, each beside the places of its codes."""
    model.eval()
    label = torch.arange(n, device=vae.codebook.codes.device) % max(1, len(model.config.classes))
    codes, grains = model.layout.unpack(*dq.generate(model, label, seed=seed))
    with autocast(), torch.no_grad():
        images = vae.decode(codes)
    model.train()
    tiles = [tile for x, g in zip(images, grains) for tile in (dq.to_picture(x), dq.draw_grains(x, g, vae.config.factors))]
    dq.save_grid(path, tiles, columns=8)


def main(argv=None):
    args, preset = parse(argv)
    train = preset.train_transformer
    prepare(args)
    device, autocast = dq.pick_device(args.device, args.dtype)
    vae = dq.load_vae(args.vae or args.out / "vae.pt", device)
    data = open_data(args.data, vae.config.size, "train", seed=args.seed)
    config = replace(preset.transformer, size=vae.config.size, factors=vae.config.factors, codebook_size=vae.config.codebook_size,
                     classes=() if args.uncond else data.classes, width=args.width, heads=args.heads, position_layers=args.position_layers,
                     content_layers=args.content_layers, dropout=args.dropout, label_dropout=args.label_dropout)
    torch.manual_seed(args.seed)
    model = dq.DQTransformer(config).to(device)
    matrices, vectors = [[p for p in model.parameters() if (p.dim() > 1) == big] for big in (True, False)]
    optimizer = torch.optim.AdamW([dict(params=matrices, weight_decay=train.weight_decay), dict(params=vectors, weight_decay=0.0)],
                                  lr=args.lr, betas=train.betas, fused=True)
    path, start = args.out / "transformer.pt", 0
    if args.resume:
        start = restore(path, "dq-transformer", config, dict(vae_weights=vae.state_dict()), weights=model, optimizer=optimizer)
    with torch.random.fork_rng():                                            # what follows finds the state just restored
        torch.manual_seed(args.seed)                                         # the random router draws
        held_out = encode(vae, open_data(args.data, config.size, "val"), device, autocast, args.workers, mirrored=False)
        pos, code, label = encode(vae, data, device, autocast, args.workers, mirrored=True)
    if args.uncond:
        label, held_out = torch.full_like(label, -1), (*held_out[:2], torch.full_like(held_out[2], -1))
    if not args.resume:
        keep_former(path)
    batches = stream(Codes(pos, code, label), args.batch_size, args.seed, start)
    log = Log(args.out / "transformer.jsonl", args.resume)
    forward = torch.compile(model) if args.compile else model

    model.train()
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, desc="DQ-Transformer", disable=None)
    for step in bar:
        batch = next(batches)                                                # pos B, L; code B, L; label B
        set_learning_rate([optimizer], step, args, train.warmup)
        n_codes, bits = int((batch[1] >= 0).sum()), 0.0
        optimizer.zero_grad(set_to_none=True)
        for pos, code, label in zip(*(tensor.chunk(args.accumulate) for tensor in batch)):
            longest = lengths(pos, model.layout).max()                       # no wider than this part needs
            position, content = nats(forward, (pos[:, :longest], code[:, :longest], label), device, autocast)
            loss = (position + content).sum() / n_codes                      # nats per code of the whole batch
            loss.backward()
            bits = bits + loss.detach() / math.log(2)
        if args.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()

        if step % 10 == 0:
            log(step, dict(bits_per_code=bits.item(), position_nats=position.mean().item(), content_nats=content.mean().item()), bar)
        if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            log(step + 1, evaluate(model, held_out, device, autocast))
            draw_samples(args.out / "transformer.png", model, vae, args.seed, autocast)
            dq.save_checkpoint(path, "dq-transformer", config, model, **training_state(step + 1, optimizer=optimizer),
                               vae_config=asdict(vae.config), vae_weights=vae.state_dict())
    print(f"wrote {path}, {path.with_suffix('.png')} and {path.with_suffix('.jsonl')}")


if __name__ == "__main__":
    dq.run(main)
