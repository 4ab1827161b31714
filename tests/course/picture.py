"""A picture for each exercise, by the functions of dq.py as they are: python tests/course/picture.py 2

The images are toy shapes, their DQ-VAE is tests/course/vae.pt. The pages in handout/ show the same pictures, by our
functions; yours should look like them.
"""
import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

from PIL import Image, ImageDraw

HERE = Path(__file__).resolve().parent
BLUE, ORANGE, GREY, WHITE = "#a8c8f0", "#f6c28b", "#dddddd", "#ffffff"


class Page:
    """A white page, on which things are drawn from left to right."""

    def __init__(self, width=760, height=190):
        self.image = Image.new("RGB", (width, height), "white")
        self.draw, self.x, self.y = ImageDraw.Draw(self.image), 20, 40

    def title(self, words):
        self.draw.text((self.x, self.y - 20), words, "black")

    def table(self, rows, title="", size=30, colours=None):
        """Words in cells; colours: of the same shape"""
        self.title(title)
        for i, row in enumerate(rows):
            for j, word in enumerate(row):
                x, y = self.x + j * size, self.y + i * size
                self.draw.rectangle((x, y, x + size, y + size), colours[i][j] if colours else WHITE, "#555555")
                self.draw.text((x + size / 2, y + size / 2), str(word), "black", anchor="mm")
        self.x += max(len(row) for row in rows) * size + 40
        return self

    def bars(self, values, title="", names=None, colours=None, width=26):
        self.title(title)
        for i, value in enumerate(values):
            x, top = self.x + i * width, self.y + 110 - 110 * value / max(max(values), 1e-9)
            self.draw.rectangle((x, top, x + width - 4, self.y + 110), colours[i] if colours else BLUE, "#555555")
            self.draw.text((x + width / 2, self.y + 122), str(names[i] if names else i), "black", anchor="mm")
        self.x += len(values) * width + 40
        return self

    def lines(self, curves, title=""):
        """Curves are lists of (x, y) in 0 to 1, drawn in one frame."""
        self.title(title)
        self.draw.rectangle((self.x, self.y, self.x + 130, self.y + 130), WHITE, GREY)
        for points, colour in zip(curves, ("#1f4e8c", "#c0392b", "#2e8b57")):
            self.draw.line([(self.x + 130 * x, self.y + 130 - 130 * y) for x, y in points], colour, 2)
        self.x += 170
        return self

    def dots(self, z, codes, title=""):
        """Vectors, and codes among them: the first two dimensions."""
        self.title(title)
        for points, r, colour in ((z, 1, "#999999"), (codes, 3, "#c0392b")):
            for x, y in points[:, :2].clamp(-3, 3).tolist():
                x, y = self.x + 75 + 22 * x, self.y + 70 + 22 * y
                self.draw.ellipse((x - r, y - r, x + r, y + r), colour)
        self.x += 180
        return self

    def maps(self, x, title="", side=96):
        """Images (n, 3, S, S) in [-1, 1], or maps of numbers (n, h, w)."""
        self.title(title)
        if x.dim() == 3:
            x = ((x.float() - x.min()) / (x.max() - x.min()).clamp(min=1e-9) * 2 - 1)[:, None].expand(-1, 3, -1, -1)
        for each in x:
            pixels = ((each.clamp(-1, 1) + 1) * 127.5).byte().permute(1, 2, 0).contiguous().numpy()
            self.image.paste(Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST), (self.x, self.y))
            self.draw.rectangle((self.x, self.y, self.x + side, self.y + side), outline="#555555")
            self.x += side + 4
        self.x += 20
        return self


def context(dq):
    """What pictures need: toy images, the DQ-VAE and its maps; a layout of 4 x 4 cells with one fine region."""
    torch = dq.torch
    if str(HERE.parents[1]) not in sys.path:
        sys.path.insert(0, str(HERE.parents[1]))
    from data import ToyShapes
    toy, vae = ToyShapes(32), dq.load_vae(HERE / "vae.pt", "cpu")
    x, layout = torch.stack([toy[i][0] for i in range(3)]), dq.Layout(4, (2, 1))
    codes = torch.tensor([[[0, 0, 1, 2], [0, 0, 3, 4], [5, 5, 6, 6], [5, 5, 6, 6]]])
    tables = []
    for k, side in enumerate(layout.sides):
        tables.append([[""] * side for _ in range(side)])
        for i in range(layout.offsets[k], layout.eos[k]):
            row, column = (layout.coordinates[i] * side / layout.fine_side).long().tolist()
            tables[-1][row][column] = i
    return SimpleNamespace(torch=torch, vae=vae, x=x, maps=vae.encoder(x), layout=layout, codes=codes, tables=tables,
                           grains=torch.tensor([[[0, 1], [0, 0]]]))


def encoded(c):
    """Vectors of many cells, as the codebook of vae.pt gets them."""
    side = c.maps[-1].shape[-1]
    fine = c.maps[0].repeat_interleave(2, -1).repeat_interleave(2, -2)[..., :side, :side]
    return c.vae.pre_quant(0.5 * fine + 0.5 * c.maps[-1]).permute(0, 2, 3, 1).flatten(0, 2)  # B H W, D


def pairs_of(dq, c):
    pos, code = c.layout.pack(c.codes, c.grains)
    n = int(c.layout.lengths(pos)[0])
    return pos[:, :n], code[:, :n], ["-" if i < 0 else "abcdefg"[i] for i in code[0, :n].tolist()]


def gate(dq, c):
    chosen = c.vae.router(c.x, c.maps).argmax(1)
    noisy = c.vae.router.train()(c.x[:1].expand(3, -1, -1, -1), [m[:1].expand(3, -1, -1, -1) for m in c.maps]).argmax(1)
    c.vae.eval()
    return Page(1100).maps(c.x, "images").maps(chosen, "fine regions: argmax").maps(noisy, "image 1, three samples")


def score(dq, c):
    return Page(700).maps(c.x, "images").maps(dq.EntropyRouter((0.5, 0.5), 4).score(c.x), "entropy of 4 x 4 pixels")


def budget(dq, c):
    losses = []
    for n in range(9):
        grains = (c.torch.arange(8) < n).long().view(1, 2, 4)
        losses.append(float(dq.budget_loss(dq.one_hot(grains, 2), (0.5, 0.5))))
    return Page().bars(losses, "loss of a batch with 0, 1, ... 8 of 8 regions fine; ratios 0.5 and 0.5")


def through(dq, c):
    z = c.torch.linspace(0, 1, 101, requires_grad=True)
    out = dq.straight_through(z, ((4 * z).round() / 4).detach())
    slope, = c.torch.autograd.grad(out.sum(), z)
    curves = [[*zip(z.tolist(), out.tolist())], [*zip(z.tolist(), (slope / 2).tolist())]]
    return Page().lines(curves, f"blue: the value; red: the gradient, {float(slope[0]):g}")


def assigned(dq, c):
    side, ids = c.maps[-1].shape[-1], c.vae.codebook.assign(encoded(c)).view(3, -1)
    return Page(1000).maps(c.x, "images").maps(ids.view(3, side, side), "ids").maps(
        c.vae.decode(ids.view(3, side, side)), "decoded")


def training(dq, c, book):
    """Codes at the start, and after 1, 5 and 25 batches."""
    c.torch.manual_seed(0)
    z, page = encoded(c), Page()
    z = (z - z.mean(0)) / z.std(0)
    for n in range(26):
        batch = z[c.torch.randint(len(z), (128,))]
        if n in (0, 1, 5, 25):
            page.dots(z, book.codes, f"codes after {n} batches")
        yield page, batch


def update(dq, c):
    book = dq.Codebook(16, 8)
    book.codes.normal_()
    for page, z in training(dq, c, book):
        book.update(z, c.torch.ones(len(z)), c.torch.cdist(z, book.codes).argmin(1))
    return page


def restart(dq, c):
    book = dq.Codebook(16, 8)
    for page, z in training(dq, c, book):
        book.restart(z, c.torch.ones(len(z)))
    return page


def mix(dq, c):
    maps = [c.torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]), c.torch.arange(10.0, 26.0).view(1, 1, 4, 4)]
    mixed = c.vae.mix(maps, dq.one_hot(c.grains, 2))
    page = Page(500)
    for each, title in zip([*maps, mixed], ("coarse map", "fine map", "mixed: region 1 is fine")):
        page.table([[f"{v:g}" for v in row] for row in each[0, 0].tolist()], title)
    return page


def weight(dq, c):
    vae = SimpleNamespace(config=SimpleNamespace(factors=(2, 1), size=4))
    rows = dq.DQVAE.cell_weight(vae, dq.one_hot(c.grains, 2))[0].tolist()
    return Page(300).table([[f"{v:g}" for v in row] for row in rows], "region 1 is fine", 32)


def pack(dq, c):
    pos, _, letters = pairs_of(dq, c)
    page = Page(820).table([["abcdefg"[i] for i in row] for row in c.codes[0].tolist()], "codes")
    for table, title in zip(c.tables, ("coarse ids", "fine ids")):
        page.table(table, title, 60 if len(table) == 2 else 30)
    return page.table([pos[0].tolist(), letters], "positions and contents", 34)


def unpack(dq, c):
    pos, code, letters = pairs_of(dq, c)
    codes, grains = c.layout.unpack(pos, code)
    return Page(660).table([pos[0].tolist(), letters], "positions and contents", 34).table(
        [["abcdefg"[i] for i in row] for row in codes[0].tolist()], "codes").table(grains[0].tolist(), "grains", 40)


def mask(dq, c):
    pos, _, _ = pairs_of(dq, c)
    page = Page(760)
    for t in (1, 6):
        may = c.layout.legal(pos[:, t - 1], c.layout.grains(pos[:, :t]))[0].tolist()
        for table in c.tables:
            page.table(table, f"orange: legal is {may[int(pos[0, t])]}, after {pos[0, t - 1]}",
                       60 if len(table) == 2 else 30, [[ORANGE if may[i] == may[int(pos[0, t])] else
                                                        BLUE if i in pos[0, :t] else WHITE for i in row] for row in table])
            page.x += 20
    return page


def model_of(dq, c, **kwargs):
    c.torch.manual_seed(0)
    model = dq.DQTransformer(dq.TransformerConfig(size=4, factors=(2, 1), codebook_size=7, width=8, heads=1, **kwargs))
    for p in model.parameters():
        p.data.normal_(std=0.5)
    return model.eval()


def embed(dq, c):
    model, (pos, code, letters) = model_of(dq, c), pairs_of(dq, c)
    for table, value in ((model.content, 1.0), (model.position, 10.0), (model.granularity, 100.0)):
        table.weight.data.fill_(value)
    rows = [pos[0].tolist(), letters, [f"{v:g}" for v in model.embed(pos, code)[0, :, 0].tolist()]]
    return Page(480).table(rows, "pairs, and their vectors: contents are 1, positions 10, granularities 100", 34)


def logits(dq, c):
    model, (pos, code, _) = model_of(dq, c), pairs_of(dq, c)
    p, q = (each[0].softmax(-1) for each in model.logits(pos, code))
    return Page(420).maps(p[None], "positions: a step per row", 130).maps(q[None], "contents, random weights", 130)


def cut(dq, c):
    p, page = [0.42, 0.28, 0.14, 0.1, 0.06], Page(820)
    for k, top_p in ((0, 1.0), (3, 1.0), (0, 0.8), (3, 0.8)):
        kept = dq.filter_logits(c.torch.tensor([p]).log(), k, top_p)[0].isfinite().tolist()
        page.bars(p, f"top_k = {k}, top_p = {top_p}", colours=[ORANGE if each else GREY for each in kept])
    return page


def staircase(dq, c):
    p, u = [0.2, 0.0, 0.5, 0.3], (c.torch.arange(200) + 1) / 200
    drawn = dq.draw(c.torch.tensor([p]).log().expand(200, -1), u)
    return Page(460).bars(p, "probabilities").lines([[*zip(u.tolist(), (drawn / 4).tolist())]], "u, and what is drawn")


def step(dq, c):
    model = model_of(dq, c)
    pos, code = dq.generate(model, c.torch.full((5,), -1), seed=3)
    return Page(780).maps(model.layout.unpack(pos, code)[0], "samples of a model with random weights: codes", 130)


PICTURES = [gate, score, budget, through, assigned, update, restart, mix, weight, pack, unpack, mask, embed, logits, cut,
            staircase, step]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("number", type=int, choices=range(1, 18), help="the exercise")
    parser.add_argument("--out", type=Path, metavar="FILE", help="instead of picture-NUMBER.png")
    args = parser.parse_args()
    sys.path.insert(0, str(HERE.parents[1]))
    import dq
    try:
        page = PICTURES[args.number - 1](dq, context(dq))
    except NotImplementedError as error:
        sys.exit(f"no picture yet: {error}")
    path = args.out or Path(f"picture-{args.number}.png")
    page.image.save(path)
    print(path)


if __name__ == "__main__":
    main()
