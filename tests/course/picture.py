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

    def bars(self, values, title="", colours=None, width=26):
        self.title(title)
        for i, value in enumerate(values):
            x, top = self.x + i * width, self.y + 110 - 110 * value / max(max(values), 1e-9)
            self.draw.rectangle((x, top, x + width - 4, self.y + 110), colours[i] if colours else BLUE, "#555555")
            self.draw.text((x + width / 2, self.y + 122), str(i), "black", anchor="mm")
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


class Pictures:
    """pictures[number - 1]() -> a Page. dq: the module or what it defines"""

    def __init__(self, dq):
        if str(HERE.parents[1]) not in sys.path:
            sys.path.insert(0, str(HERE.parents[1]))
        from data import ToyShapes
        torch, toy = dq.torch, ToyShapes(32)
        self.dq, self.torch, self.layout = dq, torch, dq.Layout(4, (2, 1))
        self.vae = dq.load_vae(HERE / "vae.pt", "cpu")
        self.x = torch.stack([toy[i][0] for i in range(3)])
        self.maps = self.vae.encoder(self.x)
        # 4 x 4 cells with one fine region, as in the docstring of Layout, and the ids of both grids
        self.codes = torch.tensor([[[0, 0, 1, 2], [0, 0, 3, 4], [5, 5, 6, 6], [5, 5, 6, 6]]])
        self.grains, self.tables = torch.tensor([[[0, 1], [0, 0]]]), []
        for k, side in enumerate(self.layout.sides):
            self.tables.append([[""] * side for _ in range(side)])
            for i in range(self.layout.offsets[k], self.layout.eos[k]):
                row, column = (self.layout.coordinates[i] * side / self.layout.fine_side).long().tolist()
                self.tables[-1][row][column] = i
        self.all = [self.gate, self.score, self.budget, self.through, self.assign, self.update, self.restart, self.mix,
                    self.weight, self.pack, self.unpack, self.legal, self.embed, self.logits, self.cut, self.staircase,
                    self.samples]

    def __getitem__(self, i):
        return self.all[i]

    def vectors(self):
        """Those of many cells, as the codebook of vae.pt gets them: B H W, D"""
        coarse = self.dq.upsample(self.maps[0], self.maps[1].shape[-1])
        return self.vae.pre_quant(0.5 * coarse + 0.5 * self.maps[1]).permute(0, 2, 3, 1).flatten(0, 2)

    def pairs(self):
        """Of the example -> pos, code, its contents as letters"""
        pos, code = self.layout.pack(self.codes, self.grains)
        n = int((pos[0] != self.layout.end).sum()) + 1
        return pos[:, :n], code[:, :n], ["-" if i < 0 else "abcdefg"[i] for i in code[0, :n].tolist()]

    def model(self):
        self.torch.manual_seed(0)
        config = self.dq.TransformerConfig(size=4, factors=(2, 1), codebook_size=7, width=8, heads=1)
        model = self.dq.DQTransformer(config)
        for p in model.parameters():
            p.data.normal_(std=0.5)
        return model.eval()

    def gate(self):
        chosen = self.vae.router(self.x, self.maps).argmax(1)
        three = [m[:1].expand(3, -1, -1, -1) for m in (self.x, *self.maps)]
        noisy = self.vae.router.train()(three[0], three[1:]).argmax(1)
        self.vae.eval()
        return Page(1040).maps(self.x, "images").maps(chosen, "white is fine: argmax").maps(noisy, "image 1, samples")

    def score(self):
        entropy = self.dq.EntropyRouter((0.5, 0.5), 4).score(self.x)
        return Page(700).maps(self.x, "images").maps(entropy, "entropy of 4 x 4 pixels")

    def budget(self):
        losses = []
        for n in range(9):
            gate = self.dq.one_hot((self.torch.arange(8) < n).long().view(1, 2, 4), 2)
            losses.append(float(self.dq.budget_loss(gate, (0.5, 0.5))))
        return Page(560).bars(losses, f"loss, up to {max(losses):g}, with 0 to 8 of 8 regions fine; ratios 1/2")

    def through(self):
        z = self.torch.linspace(0, 1, 101, requires_grad=True)
        out = self.dq.straight_through(z, ((4 * z).round() / 4).detach())
        slope, = self.torch.autograd.grad(out.sum(), z)
        curves = [[*zip(z.tolist(), y.tolist())] for y in (out, slope / 2)]
        return Page(300).lines(curves, f"blue: the value; red: the gradient, {float(slope[0]):g}")

    def assign(self):
        ids = self.vae.codebook.assign(self.vectors()).view(3, *self.maps[1].shape[-2:])
        return Page(1040).maps(self.x, "images").maps(ids, "ids").maps(self.vae.decode(ids), "decoded")

    def learned(self, step):
        """Codes at the start, and after 1, 5 and 25 batches."""
        self.torch.manual_seed(0)
        book, z, page = self.dq.Codebook(16, 8), self.vectors(), Page()
        book.codes.normal_()
        z = (z - z.mean(0)) / z.std(0)
        for n in range(26):
            batch = z[self.torch.randint(len(z), (128,))]
            if n in (0, 1, 5, 25):
                page.dots(z, book.codes, f"codes after {n} batches")
            step(book, batch, self.torch.ones(128))
        return page

    def update(self):
        return self.learned(lambda book, z, weight: book.update(z, weight, self.torch.cdist(z, book.codes).argmin(1)))

    def restart(self):
        return self.learned(lambda book, z, weight: book.restart(z, weight))

    def mix(self):
        maps = [self.torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]), self.torch.arange(10.0, 26.0).view(1, 1, 4, 4)]
        page, mixed = Page(500), self.vae.mix(maps, self.dq.one_hot(self.grains, 2))
        for each, title in zip([*maps, mixed], ("coarse map", "fine map", "mixed: region 1 is fine")):
            page.table([[f"{v:g}" for v in row] for row in each[0, 0].tolist()], title)
        return page

    def weight(self):
        vae = SimpleNamespace(config=SimpleNamespace(factors=(2, 1), size=4))
        rows = self.dq.DQVAE.cell_weight(vae, self.dq.one_hot(self.grains, 2))[0].tolist()
        return Page(300).table([[f"{v:g}" for v in row] for row in rows], "region 1 is fine", 32)

    def pack(self):
        pos, _, letters = self.pairs()
        page = Page(820).table([["abcdefg"[i] for i in row] for row in self.codes[0].tolist()], "codes")
        page.table(self.tables[0], "coarse ids", 60).table(self.tables[1], "fine ids")
        return page.table([pos[0].tolist(), letters], "positions and contents", 34)

    def unpack(self):
        pos, code, letters = self.pairs()
        codes, grains = self.layout.unpack(pos, code)
        cells = [["abcdefg"[i] for i in row] for row in codes[0].tolist()]
        return Page(660).table([pos[0].tolist(), letters], "positions and contents", 34).table(
            cells, "codes").table(grains[0].tolist(), "grains", 40)

    def legal(self):
        (pos, _, _), page = self.pairs(), Page()
        for t in (1, 6):
            may, written = self.layout.legal(pos[:, t - 1], self.layout.grains(pos[:, :t]))[0], pos[0, :t].tolist()
            wanted = may[pos[0, t]]
            for table, size in zip(self.tables, (60, 30)):
                colours = [[ORANGE if may[i] == wanted else BLUE if i in written else WHITE for i in row]
                           for row in table]
                page.table(table, f"after {written[-1]}; orange: {wanted.item()}", size, colours)
        return page

    def embed(self):
        model, (pos, code, letters) = self.model(), self.pairs()
        for table, value in ((model.content, 1.0), (model.position, 10.0), (model.granularity, 100.0)):
            table.weight.data.fill_(value)
        rows = [pos[0].tolist(), letters, [f"{v:g}" for v in model.embed(pos, code)[0, :, 0].tolist()]]
        return Page(480).table(rows, "vectors of pairs: contents are 1, positions 10, granularities 100", 34)

    def logits(self):
        pos, code, _ = self.pairs()
        p, q = (each[0].softmax(-1)[None] for each in self.model().logits(pos, code))
        return Page(420).maps(p, "positions: a step per row", 130).maps(q, "contents, random weights", 130)

    def cut(self):
        p, page = [0.42, 0.28, 0.14, 0.1, 0.06], Page(820)
        for k, top_p in ((0, 1.0), (3, 1.0), (0, 0.8), (3, 0.8)):
            kept = self.dq.filter_logits(self.torch.tensor([p]).log(), k, top_p)[0].isfinite().tolist()
            page.bars(p, f"top_k = {k}, top_p = {top_p}", [ORANGE if each else GREY for each in kept])
        return page

    def staircase(self):
        p, u = [0.2, 0.0, 0.5, 0.3], (self.torch.arange(200) + 1) / 200
        drawn = self.dq.draw(self.torch.tensor([p]).log().expand(200, -1), u) / 4
        return Page(460).bars(p, "probabilities").lines([[*zip(u.tolist(), drawn.tolist())]], "u, and what is drawn")

    def samples(self):
        model = self.model()
        codes, _ = model.layout.unpack(*self.dq.generate(model, self.torch.full((5,), -1), seed=3))
        return Page(760).maps(codes, "samples of a model with random weights: codes", 130)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("number", type=int, choices=range(1, 18), help="the exercise")
    parser.add_argument("--out", type=Path, metavar="FILE", help="instead of picture-NUMBER.png")
    args = parser.parse_args()
    sys.path.insert(0, str(HERE.parents[1]))
    import dq
    try:
        page = Pictures(dq)[args.number - 1]()
    except NotImplementedError as error:
        sys.exit(f"no picture yet: {error}")
    path = args.out or Path(f"picture-{args.number}.png")
    page.image.save(path)
    print(path)


if __name__ == "__main__":
    main()
