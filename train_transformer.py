"""Stage 2: images and a DQ-VAE -> DQ-Transformer checkpoint.    python train_transformer.py [--data DIR]

The images are encoded once, as they are and mirrored; the loop then trains on codes in memory and
never touches a pixel. Writes into --out: transformer.pt (checkpoint, with the frozen DQ-VAE inside),
transformer.best.pt (that of the lowest held-out loss), transformer.jsonl (log), transformer.png
(samples, and where their codes are).
"""
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import dq
from train_vae import Run, common_flags, deal, distribute, open_data, prepare, set_learning_rate


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


@torch.no_grad()
def encode(vae, data, device, autocast, workers, mirrored):
    """All images -> pos, code (M, L), label (M,), on the CPU, trimmed to the longest; each image twice if mirrored."""
    layout = dq.Layout(vae.config.size, vae.config.factors).to(device)
    small = torch.int16 if max(layout.n_positions, vae.config.codebook_size) < 2 ** 15 else torch.int32
    loader = torch.utils.data.DataLoader(data, 64, num_workers=workers)
    pos, code, label = [], [], []
    for x, y in tqdm(loader, desc="encoding", disable=None if dq.processes()[0] == 0 else True, leave=False):
        x = x.to(device)
        for view in (x, x.flip(3)) if mirrored else (x,):
            with autocast():
                p, c = layout.pack(*vae.encode(view))
            pos, code, label = pos + [p.to(small).cpu()], code + [c.to(small).cpu()], label + [y]
    pos, code, label = torch.cat(pos), torch.cat(code), torch.cat(label)
    longest = lengths(pos, layout).max()
    return pos[:, :longest], code[:, :longest], label


def lengths(pos, layout):
    """Pairs up to and with the last EOS. (B, L) -> (B,)"""
    return (pos != layout.end).sum(1) + 1


def batches(length, batch_size, seed, start=0):
    """Endless batches of sequence numbers (batch_size,), in the order of `deal`.

    Inside a batch they are sorted by length (M,), so that parts of it need little padding. (Whole
    batches of like length would need less, but learned less: 168 nats against 164 after 600 steps on
    the toy data.)
    """
    for batch in deal(len(length), batch_size, seed, start):
        index = np.array(batch) % len(length)
        yield torch.from_numpy(index[np.argsort(length[index], kind="stable")])


def width(length, limit, device):
    """Columns that sequences of these lengths (M,) need, rounded up: GPUs compute in eights, and few widths mean few compilations."""
    multiple = 8 if device.type == "cuda" else 2
    return min(-(-int(length.max()) // multiple) * multiple, limit)


def nats(model, batch, device, autocast):
    """Negative log-likelihoods of a batch: position (B,), content (B,)."""
    if device.type == "cuda":
        batch = [t.pin_memory() for t in batch]                              # else the copy would wait for the device
    pos, code, label = (t.to(device, non_blocking=True).long() for t in batch)
    with autocast():
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
    device, autocast = prepare(args)
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
    run = Run(args, "transformer", config, model, dict(optimizer=optimizer), best_by="nats_per_image",
              extra=dict(vae_config=asdict(vae.config), vae_weights=vae.state_dict()), fixed=("vae_weights",))
    with torch.random.fork_rng():                                            # what follows finds the state just restored
        torch.manual_seed(args.seed)                                         # the random router draws
        held_out = encode(vae, open_data(args.data, config.size, "val"), device, autocast, args.workers, mirrored=False)
        pos, code, label = encode(vae, data, device, autocast, args.workers, mirrored=True)
    if args.uncond:
        label, held_out = torch.full_like(label, -1), (*held_out[:2], torch.full_like(held_out[2], -1))
    length = lengths(pos, model.layout)
    codes_per_image = length.float().mean().item() - len(config.factors)
    forward = distribute(torch.compile(model) if args.compile else model)

    def evaluation():
        figures = evaluate(model, held_out, device, autocast)
        draw_samples(args.out / "transformer.png", model, vae, args.seed, autocast)
        return figures

    model.train()
    order = batches(length.numpy(), args.batch_size, args.seed, run.start)
    for step in run.steps():
        if run.world > 1:
            torch.manual_seed((args.seed * args.steps + step) * run.world + run.rank)  # every process drops other units
        set_learning_rate([optimizer], step, args, train.warmup)
        optimizer.zero_grad(set_to_none=True)
        nats_of = dict(position=0.0, content=0.0)
        for part in next(order)[run.rank::run.world].chunk(args.accumulate):
            columns = width(length[part], pos.shape[1], device)
            position, content = nats(forward, (pos[part, :columns], code[part, :columns], label[part]), device, autocast)
            losses = dict(position=position.sum() * run.world / args.batch_size, content=content.sum() * run.world / args.batch_size)
            # nats per code; by the mean number of codes, so that every image counts for what it costs
            ((losses["position"] + losses["content"]) / codes_per_image).backward()
            nats_of = {name: nats_of[name] + losses[name].detach() for name in losses}
        if args.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        bits = (nats_of["position"] + nats_of["content"]) / math.log(2) / codes_per_image
        run.after(step + 1, dict(bits_per_code=bits, position_nats=nats_of["position"], content_nats=nats_of["content"]), evaluation)


if __name__ == "__main__":
    dq.run(main)
