"""One HTML file in which both models run: where each code goes, what each step sampled from, what else could have come.

python tests/tools/page.py [CHECKPOINT] [--data DIR [--held-out DIR]] [--out FILE.html]

The file needs no server, no network and no library: open it in a browser. Its template lies beside this tool:
page.html, page.js (the models, which follow dq.py name by name) and panels.js. Weights are rounded: the decoder to
float16, the matrices of the transformer to int8 with a scale per row, or to float16 where int8 would cost more than
0.5 % of the validation nats. With #selftest behind its address the page compares itself with numbers that dq.py
computed from the same weights. With a page in place of a checkpoint, the page gets today's template.
"""
import argparse
import base64
import copy
import hashlib
import json
import sys
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common  # noqa: E402
import data  # noqa: E402
import dq  # noqa: E402
import sample  # noqa: E402

HERE = Path(__file__).resolve().parent
ADVICE = "train a smaller model (--width and --content-layers of train_transformer.py, or --preset toy)"
LARGEST = 20e6                                                               # bytes of a page
WORSE = 0.005                                                                # fraction of the nats that int8 may cost


# ------------------------------------------------------------------------------------------------
# Weights: rounded, as bytes


def text(values):
    """An array -> base64 of its bytes."""
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()


def round_rows(x):
    """A matrix (m, n) -> whole numbers from -127 to 127 (m, n) and a scale per row (m, 1), whose product is near it."""
    scale = (x.abs().amax(dim=1, keepdim=True) / 127).clamp(min=1e-12)       # m, 1
    return (x / scale).round().to(torch.int8), scale


class Weights:
    """Tensors of a page: their bytes, a list of what lies where, and the models with the rounded values."""

    def __init__(self):
        self.parts, self.tensors, self.size = [], [], 0

    def put(self, values):
        """Append an array at a multiple of 4 bytes. -> where it begins"""
        start, held = self.size, values.tobytes()
        self.parts.append(held + bytes(-len(held) % 4))
        self.size += len(self.parts[-1])
        return start

    def add(self, name, x, matrices="float16"):
        """Append a tensor, rounded: a matrix as named, any other to float16. -> what the page will compute with"""
        entry, x = dict(name=name, shape=list(x.shape)), x.detach().float()
        if matrices == "int8" and x.dim() == 2:
            q, scale = round_rows(x)
            entry |= dict(kind="int8", start=self.put(q.numpy()), scale=self.put(scale.numpy()))
            x = q.float() * scale
        else:
            x = x.half().float()
            entry |= dict(kind="float16", start=self.put(x.numpy().astype(np.float16)))
        self.tensors.append(entry)
        return x

    def bytes(self):
        return b"".join(self.parts)


def needed(vae):
    """The tensors of a DQ-VAE that decoding needs, by name."""
    return {name: x for name, x in vae.state_dict().items()
            if name.startswith(("decoder.", "post_quant.")) or name == "codebook.codes"}


def rounded(model, vae, matrices):
    """-> Weights, and copies of both models that compute with what the page will hold."""
    weights, model, vae = Weights(), copy.deepcopy(model), copy.deepcopy(vae)
    for module, names, kind in ((vae, needed(vae), "float16"), (model, model.state_dict(), matrices)):
        state = module.state_dict()
        module.load_state_dict(state | {name: weights.add(name, state[name], kind) for name in names})
    return weights, model, vae


def page_bytes(model, vae, matrices):
    """About how large the weights make the page, before any work: base64 takes 4 bytes for 3."""
    stage2 = sum(p.numel() for p in model.parameters()) * (1 if matrices == "int8" else 2)
    return (stage2 + 2 * sum(x.numel() for x in needed(vae).values())) * 4 / 3


# ------------------------------------------------------------------------------------------------
# Pictures, and what dq.py says about them


class Everywhere(torch.nn.Module):
    """A router that gives every region granularity k."""

    def __init__(self, k, factors):
        super().__init__()
        self.k, self.n_grains = k, len(factors)

    def forward(self, x, maps, noise=1.0):
        side = maps[0].shape[-1]
        gate = torch.zeros(len(x), self.n_grains, side, side)                # B, K, h, w
        gate[:, self.k] = 1
        return gate


@torch.inference_mode()
def describe(vae, x, labels):
    """Images (n, 3, S, S) -> for the page: pixels, the router's score and choice, the codes in every granularity.

    A code depends on its own cell's features alone, so any map of granularities is put together from these.
    """
    seen = vae(x)
    score, router = vae.router.score(x, seen.maps), vae.router               # n, h, w
    codes = []
    for k in range(len(vae.config.factors)):
        vae.router = Everywhere(k, vae.config.factors)
        codes.append(vae.encode(x)[0])                                       # n, H, W
    vae.router = router
    pixels = to_bytes(x)                                                     # n, S, S, 3
    return [dict(label=label, pixels=text(pixels[i]), score=[round(s, 4) for s in score[i].flatten().tolist()],
                 grains=seen.grains[i].flatten().tolist(), codes=[each[i].flatten().tolist() for each in codes])
            for i, label in enumerate(labels)]


def to_bytes(x):
    """(n, 3, S, S) in [-1, 1] -> (n, S, S, 3), 0 to 255."""
    return ((x + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


@torch.inference_mode()
def nats(model, pos, code, label):
    losses = model(pos, code, label)
    return (losses["position"] + losses["content"]).mean().item()


def pairs(pos, code, end):
    """A sequence (L,), (L,) -> [[position, content], ...], up to and with the last EOS."""
    n = int((pos != end).sum()) + 1
    return torch.stack([pos[:n], code[:n]], dim=1).tolist()


@torch.inference_mode()
def references(model, vae, pos, code, label, seed=0):
    """What dq.py computes with the page's weights, for #selftest. pos, code (n, L), label (n,): validation images."""
    layout, n_classes, generator = model.layout, len(model.config.classes), torch.Generator().manual_seed(seed)
    logits = []
    for i in range(3):
        of = label[i:i + 1] if i < 2 else torch.tensor([-1])
        held = pairs(pos[i], code[i], layout.end)
        where, what = model.logits(pos[i:i + 1, :len(held)], code[i:i + 1, :len(held)], of)
        logits.append(dict(label=int(of), pairs=held, position=text(where[0].numpy()), content=text(what[0].numpy())))

    drawn = []
    with_map = torch.randint(layout.n_grains, (1, layout.side, layout.side), generator=generator)
    kept = sample.given_coarse(layout, *layout.unpack(pos[:1], code[:1]), 1)
    for seed, first, of, given, options in (
            (0, 0, 0, None, dq.SampleOptions(0.7, cfg=2.0)), (1, 3, -1, None, dq.SampleOptions()),
            (2 ** 33 + 5, 0, 1, None, dq.SampleOptions(1.2, top_p=0.8, cfg=3.0)),
            (7, 1, 2, None, dq.SampleOptions(0.9, top_k=5)),
            (8, 2, 0, None, dq.SampleOptions(1.0, top_k=20, top_p=0.5)),
            (3, 2, 0, sample.given_tiling(layout, with_map), dq.SampleOptions(1.0, cfg=1.5)),
            (4, 0, 0, kept, dq.SampleOptions(0.8, top_p=0.9))):
        of = min(of, n_classes - 1)
        p, c = dq.generate(model, torch.tensor([of]), options, seed, given, first=first)
        given = [] if given is None else torch.stack(given, dim=-1)[0]
        drawn.append(dict(seed=str(seed), number=first, label=of, options=options._asdict(),
                          given=[pair for pair in given.tolist() if pair[0] >= 0] if len(given) else [],
                          pairs=pairs(p[0], c[0], layout.end)))

    legal = []
    for i in range(50):                                                      # by the grains so far, or the final ones
        grains = torch.randint(layout.n_grains, (1, layout.side, layout.side), generator=generator)
        p, c = layout.pack(torch.zeros(1, layout.fine_side, layout.fine_side, dtype=torch.long), grains)
        t = int(torch.randint(len(pairs(p[0], c[0], layout.end)), (), generator=generator))
        known = layout.unpack(p[:, :t], c[:, :t])[1] if t else torch.full_like(grains, -1)
        known = (grains if i % 2 else known).flatten(1)                      # 1, N
        prev = p[:, t - 1] if t else torch.tensor([-1])
        legal.append(dict(prev=int(prev), grains=known[0].tolist(),
                          legal=layout.legal(prev, known)[0].nonzero()[:, 0].tolist()))

    decoded = vae.decode(layout.unpack(pos[:2], code[:2])[0])                # 2, 3, S, S
    decoded = [dict(pairs=pairs(*pair, layout.end), pixels=text(x))
               for *pair, x in zip(pos[:2], code[:2], to_bytes(decoded))]
    return dict(logits=logits, drawn=drawn, legal=legal, decoded=decoded)


# ------------------------------------------------------------------------------------------------
# The file


def digest(source):
    """How a content security policy names a script or a style sheet that it allows."""
    return "'sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode() + "'"


def document(facts, weights, script=None):
    """The page as text. Its policy allows this script, its own style and pictures that it paints; no request at all."""
    html = (HERE / "page.html").read_text("utf-8")
    script = script or "\n".join((HERE / name).read_text("utf-8") for name in ("page.js", "panels.js"))
    style = html.split("<style>")[1].split("</style>")[0]
    policy = (f"default-src 'none'; script-src {digest(script)}; style-src {digest(style)}; img-src data:; "
              "base-uri 'none'; form-action 'none'")
    for name, value in (("policy", policy), ("data", json.dumps(facts, separators=(",", ":")).replace("<", "\\u003c")),
                        ("weights", base64.b64encode(weights).decode()), ("script", script)):
        html = html.replace(f"<!--{name}-->", value)
    return html


def read(path):
    """The page in a file -> its facts and weights."""
    html = path.read_text("utf-8")
    marks = [f'id="{name}">' for name in ("data", "weights")]
    parts = [html.split(mark)[1].split("</script>")[0] for mark in marks if mark in html]
    dq.require(len(parts) == 2, f"{path} is no page of this tool")
    return json.loads(parts[0]), base64.b64decode(parts[1])


def make(model, vae, images, source, n=64):
    """-> facts and weights for `document`. images: a data set of validation images; source: the checkpoint's name"""
    layout, classes = model.layout, model.config.classes
    found = [(x, y if classes else -1) for x, y in (images[i] for i in range(min(len(images), n))) if y >= -1]
    dq.require(len(found) >= 3, f"a page needs at least 3 validation images that can be decoded, not {len(found)}")
    x, label = torch.stack([x for x, _ in found]), torch.tensor([y for _, y in found])
    if int(label.max()) >= len(classes):
        label = torch.full_like(label, -1)                                   # a model of other pictures
    with torch.inference_mode():
        pos, code = layout.pack(*vae.encode(x))                              # n, L
    exact = nats(model, pos, code, label)
    for matrices in ("int8", "float16"):
        weights, model_, vae_ = rounded(model, vae, matrices)
        cost = nats(model_, pos, code, label)
        if cost <= exact * (1 + WORSE):
            break
    params = dict(transformer=millions(sum(p.numel() for p in model.parameters())),
                  decoder=millions(sum(x.numel() for x in needed(vae).values())))
    facts = dict(source=source, params=params, config=asdict(model.config), vae=asdict(vae.config),
                 tensors=weights.tensors, crc=zlib.crc32(weights.bytes()), matrices=matrices,
                 nats=dict(exact=round(exact, 3), rounded=round(cost, 3), images=len(found)),
                 thresholds=thresholds(vae), pictures=describe(vae, x[:8], label[:8].tolist()),
                 reference=references(model_, vae_, pos, code, label))
    return facts, weights.bytes()


def millions(n):
    return f"{n / 1e6:.1f} million" if n >= 95_000 else f"{n:,}"


def thresholds(vae):
    """Where a score is cut into granularities. A learned router takes the likeliest one: for two, that is at 0.5."""
    held = getattr(vae.router, "thresholds", torch.arange(len(vae.config.factors) - 1) + 0.5)
    return [round(value, 4) for value in held.tolist()]


def make_from(args):
    """The checkpoint and the images that the command names -> facts and weights."""
    model, vae = dq.load_transformer(args.checkpoint, torch.device("cpu"))
    size = page_bytes(model, vae, "int8")
    dq.require(size <= LARGEST, f"{args.checkpoint} makes a page of {size / 1e6:.0f} MB, more than the "
                                f"{LARGEST / 1e6:.0f} MB that browsers open at once; {ADVICE}")
    images = data.open_data(args.data, vae.config.size, skip=args.checkpoint.parent, held_out=args.held_out)[1]
    return make(model, vae, images, args.checkpoint.name)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", nargs="?", type=Path, default=Path("out/transformer.pt"),
        help="what train_transformer.py wrote; or a page, which then gets today's template")
    add("--data", metavar="DIR", help="what it was trained on; None: the built-in toy shapes")
    add("--held-out", metavar="DIR", help="its validation images; None: a part of --data")
    add("--out", metavar="FILE.html", type=Path, help="None: page.html in the checkpoint's folder")
    args = parser.parse_args(argv)
    out = args.out or args.checkpoint.parent / "page.html"
    if args.checkpoint.suffix == ".html":                                    # a page again, from today's template
        out, (facts, weights) = args.out or args.checkpoint, read(args.checkpoint)
    else:
        facts, weights = make_from(args)
    html = document(facts, weights).encode()
    dq.require(len(html) <= LARGEST, f"with {facts['matrices']} weights the page of {args.checkpoint} takes "
                                     f"{len(html) / 1e6:.0f} MB, more than {LARGEST / 1e6:.0f}; {ADVICE}")
    out.parent.mkdir(parents=True, exist_ok=True)
    dq.write_file(out, lambda file: file.write(html))
    cost = facts["nats"]
    print(f"wrote {out}, {len(html) / 1e6:.1f} MB; {facts['matrices']} weights: {cost['rounded']:.2f} nats per image, "
          f"{cost['exact']:.2f} with the checkpoint's, on {cost['images']} validation images")


if __name__ == "__main__":
    common.run(main)
