"""The open part: who models the same codes best. It ranks checkpoints in students' folders by exact nats per image.

A folder may hold a dq.py of its own, with another model in it, whose class is still DQTransformer. Then a worker is
asked for its `logits`, and the nats are computed here. It never gets what comes after the step that it is asked about.
"""
import math
import sys
import tempfile
from pathlib import Path

import torch

import checks

ROOT = Path(__file__).resolve().parents[2]


def split(codes, public, private):
    """Half of the held-out images, drawn at random, go to a private file, the others stay with the training images.
    Who has them could memorise them, and a look-up table costs hardly any nats."""
    sys.path.insert(0, str(ROOT))
    import dq
    import train_transformer
    stored = train_transformer.read_codes(codes)
    for path in (public, private):
        dq.require(not path.exists(), f"{path} exists; a second split would rank by images that students have")
    torch.seed()
    order = torch.randperm(len(stored["held_out"]["label"]))
    halves = [{name: x[part] for name, x in stored["held_out"].items()} for part in order.chunk(2)]
    parts = dict(train=stored["train"], held_out=halves[0]), dict(train=halves[1], held_out=halves[1], private=True)
    for path, part in zip((public, private), parts):
        dq.write_file(path, lambda file: torch.save(stored | part, file))
    print(f"{public} is what students get: {len(halves[0]['label'])} held-out images. {private} ranks: "
          f"{len(halves[1]['label'])} images. Keep it, {codes} and the images from them.")


def show(folder, codes, variant):
    import assignment
    with tempfile.TemporaryDirectory() as root:
        assignment.write_project(Path(root), variant)                        # by the variant's dq.py
        sys.path[:0] = [root, str(Path(root) / "tests")]
        rank(folder, codes)


def rank(folder, codes):
    import train_transformer
    stored, rows = train_transformer.read_codes(codes), []
    if "private" not in stored:
        print(f"students may have {codes}, so a look-up table would win: `split` keeps some back", file=sys.stderr)
    students = sorted(each for each in folder.iterdir() if each.is_dir()) if folder.is_dir() else []
    if not students:
        sys.exit(f"{folder} holds no folders")
    for each in students:
        try:
            x = evaluated(each, stored)
            rows.append((x["nats_per_image"], each.name, (
                f"{x['nats_per_image']:8.2f} {x['position_nats']:9.2f} {x['content_nats']:8.2f} "
                f"{x['bits_per_code']:10.3f} {x['parameters']:11,} {x['steps']:6}")))
        except Exception as error:                                           # of a student's file or model
            rows.append((math.inf, each.name, str(error).splitlines()[0] if str(error) else type(error).__name__))
    width = max(len(name) for _, name, _ in rows)
    print(f"   {'':{width}}     nats  position  content  bits/code  parameters  steps")
    for place, (nats, name, said) in enumerate(sorted(rows), 1):
        print(f"{place if nats < math.inf else '-':>2} {name:{width}} {said}")
    if min(rows)[0] == math.inf:
        sys.exit(1)


def evaluated(student, stored):
    """-> nats and what belongs to them"""
    import dq
    from train_transformer import Images, evaluate
    checkpoint = student / "transformer.pt"
    saved = dq.load_checkpoint(checkpoint, "dq-transformer")
    config = saved["config"]
    mine = saved["vae_weights"]                                              # codes of another DQ-VAE are other codes
    dq.require(all(name in mine and torch.equal(mine[name], each) for name, each in stored["weights"].items()),
               f"{checkpoint.name} was trained on other codes")
    held_out = Images(stored["held_out"], tuple(stored["config"]["factors"]), not config["classes"])
    if (student / "dq.py").exists():
        model = Foreign((student / "dq.py").read_text(encoding="utf-8"), saved)
    else:
        model = dq.rebuild(dq.DQTransformer, dq.TransformerConfig, config, saved["weights"], torch.device("cpu"))
    figures = evaluate(model, held_out, torch.device("cpu"), lambda: torch.autocast("cpu", enabled=False))
    if not math.isfinite(figures["nats_per_image"]):
        raise ValueError("its nats are not finite")
    return figures | dict(parameters=sum(x.numel() for x in saved["weights"].values()), steps=saved["step"])


BRIDGE = """

def _board(config, weights, *batch):
    if config:
        _board.model = DQTransformer(TransformerConfig(**config))
        _board.model.load_state_dict(weights)
        _board.model.eval()
    return _board.model.logits(*batch) if batch else True
"""


class Foreign(torch.nn.Module):
    """A model of a student's own dq.py, as `evaluate` of train_transformer.py takes it."""

    def __init__(self, source, saved):
        import dq
        super().__init__()
        checks.connect()
        known = dq.TransformerConfig.__dataclass_fields__
        self.config = dq.TransformerConfig(**{name: x for name, x in saved["config"].items() if name in known})
        self.layout = dq.Layout(self.config.size, self.config.factors)
        self.folder = tempfile.TemporaryDirectory()
        self.remote = checks.Remote(source + BRIDGE, "", [], "_board", 3600.0, self.folder.name)
        with torch.no_grad():
            self.remote(saved["config"], dict(saved["weights"]))

    def logits(self, pos, code, label):
        """Those of the remote model, step by step, so that it can't know its answer or what comes later."""
        n, V = int((pos != self.layout.end).sum(1).max()) + 1, self.config.codebook_size
        position, content = torch.zeros(*pos.shape, self.layout.n_positions), torch.zeros(*pos.shape, V)
        with torch.no_grad():
            for t in range(n):
                p, c = pos[:, :t + 1].clone(), code[:, :t + 1].clone()
                p[:, t], c[:, t] = self.layout.end, -1
                position[:, t] = self.remote(None, None, p, c, label)[0][:, t]
                p[:, t] = pos[:, t]
                content[:, t] = self.remote(None, None, p, c, label)[1][:, t]
        legal = self.layout.legal(torch.nn.functional.pad(pos[:, :-1], (1, 0), value=-1), self.layout.grains(pos))
        legal = legal == legal.gather(2, pos[..., None])                     # what a variant says where all is well
        return position.masked_fill(~legal, -math.inf), content

    def forward(self, pos, code, label):
        """Nats of position and content, by our own dq.py from the model's logits."""
        import dq
        return dq.DQTransformer.forward(self, pos, code, label)
