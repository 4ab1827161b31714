"""Do samples show the class that was asked for?    python tests/agreement.py [out/transformer.pt] [sample.py's options]

Trains a small classifier on real toy shapes, reports its accuracy on held-out ones, draws 400 samples,
100 of each class, and reports how many the classifier puts into the class that was asked for.
"""
import argparse
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dq
import sample
from sample import ToyShapes

parser = argparse.ArgumentParser()
parser.add_argument("checkpoint", nargs="?", default="out/transformer.pt")
for name, default in zip(dq.SampleOptions._fields, dq.SampleOptions()):
    parser.add_argument("--" + name.replace("_", "-"), type=type(default), default=getattr(sample.parse([]), name))
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

device, autocast = sample.pick_device("auto", "auto")
model, vae = dq.load_transformer(args.checkpoint, device)
S = vae.config.size


def batch(dataset, indices):
    x, y = zip(*(dataset[i] for i in indices))
    return torch.stack(x).to(device), torch.tensor(y, device=device)


torch.manual_seed(args.seed)
layers, c = [], 3
for width in (32, 64, 128):
    layers += [nn.Conv2d(c, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
    c = width
classifier = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * c, 4)).to(device)
optimizer, steps = torch.optim.AdamW(classifier.parameters(), lr=2e-3), 400
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
real = ToyShapes(S, n=64 * steps, seed=args.seed + 7)
for step in range(steps):
    x, y = batch(real, range(64 * step, 64 * step + 64))
    x = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1) if step % 2 else x   # half of them blurred:
    x = x + 0.1 * torch.randn_like(x)                                       # shape counts, not crispness
    optimizer.zero_grad()
    F.cross_entropy(classifier(x), y).backward()
    optimizer.step()
    schedule.step()
classifier.eval()
with torch.inference_mode():
    x, y = batch(ToyShapes(S, n=1000, seed=args.seed + 8), range(1000))
    print(f"real held-out images classified right: {(classifier(x).argmax(1) == y).float().mean():.3f}")
    label = torch.arange(400, device=device) % 4
    options = dq.SampleOptions(*(getattr(args, name) for name in dq.SampleOptions._fields))
    with autocast():
        codes, grains = model.layout.unpack(*dq.generate(model, label, options, args.seed))
        images = vae.decode(codes).float().clamp(-1, 1)
    right = classifier(images).argmax(1) == label
    each = ", ".join(f"{name} {right[label == i].float().mean():.2f}" for i, name in enumerate(model.config.classes))
    print(f"samples of the class that was asked for: {right.float().mean():.3f} ({each})")
