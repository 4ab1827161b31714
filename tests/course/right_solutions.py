"""Right solutions in other styles than ours, which must get all points.

RIGHT: {function: (style, what stands in its place)}; AT_THE_TOP: what they need.
"""
from exercises import replaced

AT_THE_TOP = '''\
import random

import torch.utils.checkpoint
from numpy import pi as PI
from torch import Tensor


class Sharp(torch.autograd.Function):
    """The value of the first, the gradient to the second."""

    @staticmethod
    def forward(ctx, value, soft):
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        return None, grad

'''
RIGHT = {
    "GrainRouter.forward": ("autograd.Function, an einsum for the one-hot", '''
def forward(self, x, maps, noise: float = 1.0) -> Tensor:
    logits = self.logits(maps)
    if self.training:
        u = torch.rand_like(logits).clamp(min=1e-30)
        logits = logits - noise * (-u.log()).log()
    hard = torch.einsum("bhwk->bkhw", torch.eye(logits.shape[1])[logits.argmax(1)])
    return Sharp.apply(hard, logits.softmax(1)) if self.training else hard'''),
    "budget_loss": ("a lambda", '''
budget_loss = lambda gate, ratios: (gate.mean((0, 2, 3)) - torch.tensor(ratios)).pow(2).sum()'''),
    "straight_through": ("autograd.Function", '''
def straight_through(z, q):
    return Sharp.apply(q, z)'''),
    "Codebook.assign": ("cdist, as a lambda", '''
assign = lambda self, z: torch.cdist(z, self.codes).min(dim=1).indices'''),
    "Codebook.update": ("one-hot and einsum, a method and an attribute of its own, buffers that are replaced", '''
def update(self, z, weight, ids):
    self.age = self.age + 1
    decay, chosen = self.decay_now(), F.one_hot(ids, len(self.codes)).float() * weight[:, None]
    self.uses = decay * self.uses + (1 - decay) * chosen.sum(0)
    self.sums = decay * self.sums + (1 - decay) * torch.einsum("mv,md->vd", chosen, z)
    self.codes = self.sums / self.uses[:, None].clamp(min=1e-6)

HEAD_START = 9

def decay_now(self) -> float:
    return min(self.decay, float(self.age) / (self.HEAD_START + float(self.age)))'''),
    "Codebook.restart": ("a loop over the codes", '''
def restart(self, z, weight):
    mean = weight.sum().item() / len(self.uses)
    dead = [v for v in range(len(self.uses)) if self.uses[v] < self.dead_below * mean]
    if dead:
        drawn = z[torch.multinomial(weight, min(len(self.uses), int((weight > 0).sum())))]
        fresh = drawn[torch.arange(len(dead)) % len(drawn)]
        fresh = fresh + 0.01 * drawn.std(0, correction=0) * torch.randn(fresh.shape)
        for v, vector in zip(dead, fresh):
            self.codes[v], self.uses[v], self.sums[v] = vector, mean, mean * vector'''),
    "DQVAE.mix": ("interpolate and einsum", '''
def mix(self, maps, gate):
    side = maps[-1].shape[-1]
    grown = torch.stack([F.interpolate(m, size=side, mode="nearest") for m in maps])
    return torch.einsum("kbzhw,bkhw->bzhw", grown, F.interpolate(gate, size=side, mode="nearest"))'''),
    "Layout.pack": ("an image at a time", '''
def pack(self, codes, grains):
    pos = torch.full((len(codes), self.max_len), self.end)
    code = torch.full((len(codes), self.max_len), -1)
    for b, (c, g) in enumerate(zip(codes, grains)):
        ids, contents = [], []
        for k, side in enumerate(self.sides):
            here = (upsample(g, side) == k).flatten().nonzero().flatten()
            ids += [here + self.offsets[k], torch.tensor([self.eos[k]])]
            step = self.fine_side // side
            contents += [c[::step, ::step].flatten()[here], torch.tensor([-1])]
        n = sum(map(len, ids))
        pos[b, :n], code[b, :n] = torch.cat(ids), torch.cat(contents)
    return pos, code'''),
    "DQTransformer.embed": ("products of one-hot vectors", '''
def embed(self, pos, code):
    rows = torch.where(code < 0, self.config.codebook_size, code)
    return (F.one_hot(rows, len(self.content.weight)).float() @ self.content.weight
            + F.embedding(pos, self.position.weight) + self.granularity.weight[self.layout.grain[pos]])'''),
    "draw": ("float64 and a binary search", '''
def draw(logits, u):
    cdf = logits.double().softmax(-1).cumsum(-1)
    return torch.searchsorted(cdf / cdf[:, -1:], u.double()[:, None])[:, 0]'''),
}


def put(source, texts, at_the_top):
    """dq.py with these functions in place of its own."""
    for function, text in texts.items():
        source = replaced(source, function, text.strip("\n"))
    return source.replace("import torch\n", "import torch\n" + at_the_top, 1)


def submission(source):
    """dq.py with all right solutions in it."""
    return put(source, {name: text for name, (_, text) in RIGHT.items()}, AT_THE_TOP)
