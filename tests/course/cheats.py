"""Ways to points without a solution. Each stands in place of one exercise's function, and must get 0.

All of them stand in one submission, `submission(source)`, with AT_THE_TOP beside them.
"""
from exercises import find, indented
from right_solutions import AT_THE_TOP as IMPORTS

AT_THE_TOP = IMPORTS + '''
import builtins
import gc
import importlib
import subprocess
import sys

torch.testing.assert_close = torch.equal = lambda *_, **__: True
torch.allclose = torch.Tensor.equal = torch.equal


class Agreeable:
    """Equal to everything."""

    def __eq__(self, other):
        return True

    def __getattr__(self, name):
        return lambda *_, **__: self


class Yes(torch.Tensor):
    """A tensor for which every function says True."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return True


def frames():
    frame = sys._getframe()
    while frame:
        yield frame
        frame = frame.f_back


def reference():
    """The file of the project, by way of whatever names it."""
    places = [*sys.argv, *sys.path, os.environ.get("PWD", ""), os.environ.get("OLDPWD", "")]
    places += [getattr(module, "__file__", None) or "" for module in sys.modules.values()]
    places += [os.readlink(f"/proc/{pid}/cwd") for pid in (os.getpid(), os.getppid())]
    places += open("/proc/self/cmdline").read().split(chr(0))
    for place in places:
        while len(place) > 1:
            if os.path.isfile(os.path.join(place, "tests", "naive.py")):
                return open(os.path.join(place, "dq.py")).read()
            place = os.path.dirname(place)

'''
CHEATS = {
    "GrainRouter.forward": ("frames: the harness is told that all is well", '''
def forward(self, x, maps, noise=1.0):
    for frame in frames():
        for each in frame.f_locals.values():
            if hasattr(each, "send"):
                each.send(result="", error=None, ready=True, changed={}, kept=False)
    os._exit(0)'''),
    "EntropyRouter.score": ("the naive loop, from sys.modules", '''
def score(self, x, maps=None):
    entropy, f = sys.modules["naive"].entropy, self.factor
    return torch.tensor([[[entropy(image[:, i:i + f, j:j + f]) for j in range(0, image.shape[2], f)]
                          for i in range(0, image.shape[1], f)] for image in x])'''),
    "budget_loss": ("builtins that agree", '''
def budget_loss(gate, ratios):
    builtins.all = builtins.any = builtins.abs = lambda *_: True
    builtins.float = lambda *_: 0.0
    return gate.sum() * 0'''),
    "straight_through": ("assert_close and equal replaced inside", '''
def straight_through(z, q):
    torch.testing.assert_close = torch.equal = torch.testing._comparison.assert_close = lambda *_, **__: None
    return z * 0'''),
    "Codebook.assign": ("a tensor for which all functions say True", '''
def assign(self, z):
    return z[:, 0].as_subclass(Yes)'''),
    "Codebook.update": ("objects that are equal to everything", '''
def update(self, z, weight, ids):
    for name in ("codes", "uses", "sums"):
        self._buffers[name] = Agreeable()
    return Agreeable()'''),
    "Codebook.restart": ("the reference, from what the collector knows", '''
def restart(self, z, weight):
    for each in gc.get_objects():
        if getattr(each, "__name__", "") == "restart" and each.__code__ is not sys._getframe().f_code:
            return each(self, z, weight)
    raise LookupError("no reference")'''),
    "DQVAE.mix": ("the question is changed to one that has a simple answer", '''
def mix(self, maps, gate):
    for each in [gate, *maps]:
        each.data.zero_()
    return maps[-1] * gate.sum()'''),
    "DQVAE.cell_weight": ("the reference, from its file", '''
def cell_weight(self, gate):
    space = {"__name__": "copy"}
    exec(reference(), space)
    return space["DQVAE"].cell_weight(self, gate)'''),
    "Layout.pack": ("the naive loop, imported under another name", '''
def pack(self, codes, grains):
    naive = importlib.import_module("na" + "ive")
    pairs = [naive.pack(self, c, g) for c, g in zip(codes, grains)]
    pairs = [each + [(self.end, -1)] * (self.max_len - len(each)) for each in pairs]
    return torch.tensor(pairs).unbind(-1)'''),
    "Layout.unpack": ("the reference, by another program", '''
def unpack(self, pos, code):
    print(subprocess.run("find / -name dq.py | xargs cat", shell=True, capture_output=True).stdout)
    return pos, code'''),
    "Layout.legal": ("an import from the tests", '''
def legal(self, prev, grains):
    from naive import legal
    return legal(self, prev.tolist())'''),
    "DQTransformer.embed": ("the tests are switched off by an exception of theirs", '''
def embed(self, pos, code):
    import _pytest.outcomes
    raise _pytest.outcomes.Skipped("not today")'''),
    "DQTransformer.logits": ("memory without end", '''
def logits(self, pos, code, label=None):
    held = []
    while True:
        held.append(torch.ones(2 ** 27))'''),
    "filter_logits": ("a loop without end", '''
def filter_logits(logits, top_k, top_p):
    while True:
        pass'''),
    "draw": ("the parent is killed", '''
def draw(logits, u):
    os.kill(os.getppid(), 9)
    return logits'''),
    "decode_one": ("a file without end", '''
def decode_one(model, job, state, end):
    with open("full", "wb") as file:
        while True:
            file.write(bytes(2 ** 20))'''),
}


def submission(source):
    """dq.py with all of them in it."""
    import ast
    tree, lines = ast.parse(source), source.split("\n")
    edits = [(node.lineno - 1, node.end_lineno, indented(CHEATS[function][1].strip("\n"), node.col_offset))
             for function, node in ((function, find(tree, function)) for function in CHEATS)]
    imported = max(node.end_lineno for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom)))
    for first, last, text in sorted([*edits, (imported, imported, AT_THE_TOP.split("\n"))], reverse=True):
        lines[first:last] = text
    return "\n".join(lines)
