"""A picture for each exercise, by the functions of dq.py as they are: python tests/course/picture.py 2

The images are toy shapes, their DQ-VAE is tests/course/vae.pt. handout/all.md shows the same pictures, by our
functions; yours should look like them.
"""
import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

from PIL import Image, ImageDraw

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
BLUE, ORANGE, GREY, WHITE = "#a8c8f0", "#f6c28b", "#dddddd", "#ffffff"
LETTERS = "abcdefg-"                                                         # contents 0 to 6, and that of an EOS, -1


class Page:
    """A white page, on which things are drawn from left to right."""

    y = 40

    def __init__(self):
        self.image, self.x = Image.new("RGB", (1200, 190), "white"), 20
        self.draw = ImageDraw.Draw(self.image)

    def next(self, title, width):
        """-> where something of this width is drawn, below its title"""
        self.draw.text((self.x, self.y - 20), title, "black")
        left, self.x = self.x, self.x + max(width, int(self.draw.textlength(title))) + 30
        return left

    def table(self, rows, title="", size=30, colours=None):
        """Numbers or words in cells; colours: of the same shape"""
        left = self.next(title, max(map(len, rows)) * size)
        for i, row in enumerate(rows):
            for j, each in enumerate(row.tolist() if hasattr(row, "tolist") else row):
                x, y, word = left + j * size, self.y + i * size, each if isinstance(each, str) else f"{float(each):.4g}"
                self.draw.rectangle((x, y, x + size, y + size), colours[i][j] if colours else WHITE, "#555555")
                self.draw.text((x + size / 2, y + size / 2), word, "black", anchor="mm")
        return self

    def maps(self, x, title="", side=96):
        """Images (n, 3, S, S) in [-1, 1], or maps of numbers (n, h, w)."""
        if x.dim() == 3:
            x = ((x.float() - x.min()) / (x.max() - x.min()).clamp(min=1e-9) * 2 - 1)[:, None].expand(-1, 3, -1, -1)
        left = self.next(title, len(x) * (side + 4))
        for n, each in enumerate(x):
            pixels = ((each.clamp(-1, 1) + 1) * 127.5).byte().permute(1, 2, 0).contiguous().numpy()
            at = left + n * (side + 4)
            self.image.paste(Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST), (at, self.y))
            self.draw.rectangle((at, self.y, at + side, self.y + side), outline="#555555")
        return self


class Pictures:
    """Of all exercises, by their functions in a module dq: a method each, in this order."""

    ORDER = ("gate score budget through assign update restart mix weight pack unpack legal embed logits cut staircase "
             "samples").split()

    def __init__(self, dq):
        from data import ToyShapes
        torch, toy = dq.torch, ToyShapes(32)
        self.dq, self.torch, self.layout = dq, torch, dq.Layout(4, (2, 1))
        self.vae = dq.load_vae(HERE / "vae.pt", "cpu")
        self.x = torch.stack([toy[i][0] for i in range(3)])
        self.maps = self.vae.encoder(self.x)
        # 4 x 4 cells with one fine region, as in the docstring of Layout, and the ids of both grids
        self.codes = torch.tensor([[[0, 0, 1, 2], [0, 0, 3, 4], [5, 5, 6, 6], [5, 5, 6, 6]]])
        self.grains, self.tables = torch.tensor([[[0, 1], [0, 0]]]), []
        for side, first, eos in zip(self.layout.sides, self.layout.offsets, self.layout.eos):
            row, column = (self.layout.coordinates[first:eos] * side / self.layout.fine_side).long().unbind(1)
            self.tables.append(torch.empty(side, side).index_put_((row, column), torch.arange(first, eos).float()))

    def image(self, number):
        page = getattr(self, self.ORDER[number])(Page())
        return page.image.crop((0, 0, min(page.x, page.image.width), page.image.height))

    def cells(self, codes):
        return [[LETTERS[i] for i in row] for row in codes.tolist()]

    def pairs(self):
        """Of the example -> pos, code, and both as rows of a table"""
        pos, code = self.layout.pack(self.codes, self.grains)
        n = int((pos[0] != self.layout.end).sum()) + 1
        return pos[:, :n], code[:, :n], [pos[0, :n].tolist(), *self.cells(code[:, :n])]

    def model(self):
        self.torch.manual_seed(0)
        config = self.dq.TransformerConfig(size=4, factors=(2, 1), codebook_size=7, width=8, heads=1)
        model = self.dq.DQTransformer(config)
        for p in model.parameters():
            p.data.normal_(std=0.5)
        return model.eval()

    def gate(self, page):
        chosen = self.vae.router(self.x, self.maps).argmax(1)
        three = [m[:1].expand(3, -1, -1, -1) for m in (self.x, *self.maps)]
        noisy = self.vae.router.train()(three[0], three[1:]).argmax(1)
        self.vae.eval()
        return page.maps(self.x, "images").maps(chosen, "white is fine: argmax").maps(noisy, "image 1, samples")

    def score(self, page):
        entropy = self.dq.EntropyRouter((0.5, 0.5), 4).score(self.x)
        return page.maps(self.x, "images").maps(entropy, "entropy of 4 x 4 pixels")

    def budget(self, page):
        gates = [self.dq.one_hot((self.torch.arange(8) < n).long().view(1, 2, 4), 2) for n in range(9)]
        losses = [self.dq.budget_loss(gate, (0.5, 0.5)) for gate in gates]
        return page.table([range(9), losses], "fine regions of 8, and the loss; ratios 1/2", 50)

    def through(self, page):
        z = self.torch.linspace(0, 1, 11, requires_grad=True)
        q = (4 * z).round() / 4
        out = self.dq.straight_through(z, q.detach())
        slope, = self.torch.autograd.grad(out.sum(), z)
        return page.table([z, q, out, slope], "z, q, the value and the gradient", 36)

    def assign(self, page):
        coarse = self.dq.upsample(self.maps[0], self.maps[1].shape[-1])
        z = self.vae.pre_quant(0.5 * coarse + 0.5 * self.maps[1]).permute(0, 2, 3, 1)
        ids = self.vae.codebook.assign(z.flatten(0, 2)).view(z.shape[:3])
        return page.maps(self.x, "images").maps(ids, "ids").maps(self.vae.decode(ids), "decoded")

    def learned(self, page, step):
        """Codes (white) among vectors (grey), in two dimensions, at the start and after 1, 5 and 25 batches."""
        self.torch.manual_seed(0)
        book, shown = self.dq.Codebook(16, 2), self.torch.zeros(26, 48, 48)
        z = self.torch.tensor([[1.0, 1.0], [-1.0, 0.5], [0.5, -1.0]]).repeat(200, 1) + self.torch.randn(600, 2) * 0.2
        book.codes.normal_()
        for image in shown:
            for points, value in ((z, 0.4), (book.codes, 1.0)):
                x, y = ((points.clamp(-2.5, 2.5) + 2.5) * 9).long().unbind(1)
                image[y, x] = value
            batch = z[self.torch.randint(len(z), (128,))]
            step(book, batch, self.torch.ones(128), self.torch.cdist(batch, book.codes).argmin(1))
        return page.maps(shown[[0, 1, 5, 25]], "codes (white) after 0, 1, 5 and 25 batches", 130)

    def update(self, page):
        return self.learned(page, lambda book, *batch: book.update(*batch))

    def restart(self, page):
        return self.learned(page, lambda book, z, weight, ids: book.restart(z, weight))

    def mix(self, page):
        maps = [self.torch.arange(1.0, 5.0).view(1, 1, 2, 2), self.torch.arange(10.0, 26.0).view(1, 1, 4, 4)]
        mixed = self.vae.mix(maps, self.dq.one_hot(self.grains, 2))
        page.table(maps[0][0, 0], "coarse map", 60).table(maps[1][0, 0], "fine map")
        return page.table(mixed[0, 0], "mixed: region 1 is fine")

    def weight(self, page):
        vae = SimpleNamespace(config=SimpleNamespace(factors=(2, 1), size=4))
        return page.table(self.dq.DQVAE.cell_weight(vae, self.dq.one_hot(self.grains, 2))[0], "region 1 is fine", 32)

    def pack(self, page):
        page.table(self.cells(self.codes[0]), "codes").table(self.tables[0], "coarse ids", 60)
        return page.table(self.tables[1], "fine ids").table(self.pairs()[2], "positions and contents", 34)

    def unpack(self, page):
        pos, code, rows = self.pairs()
        codes, grains = self.layout.unpack(pos, code)
        page.table(rows, "positions and contents", 34)
        return page.table(self.cells(codes[0]), "codes").table(grains[0], "grains", 40)

    def legal(self, page):
        pos, _, _ = self.pairs()
        for t in (1, 6):
            may, written = self.layout.legal(pos[:, t - 1], self.layout.grains(pos[:, :t]))[0], pos[0, :t].tolist()
            wanted = may[pos[0, t]]
            for table, size in zip(self.tables, (60, 30)):
                colours = [[ORANGE if may[int(i)] == wanted else BLUE if i in written else WHITE for i in row]
                           for row in table.tolist()]
                page.table(table, f"after {written[-1]}; orange: {wanted.item()}", size, colours)
        return page

    def embed(self, page):
        model, (pos, code, rows) = self.model(), self.pairs()
        for table, value in ((model.content, 1.0), (model.position, 10.0), (model.granularity, 100.0)):
            table.weight.data.fill_(value)
        rows.append(model.embed(pos, code)[0, :, 0])
        return page.table(rows, "vectors of pairs: contents are 1, positions 10, granularities 100", 34)

    def logits(self, page):
        pos, code, _ = self.pairs()
        p, q = (each[0].softmax(-1)[None] for each in self.model().logits(pos, code))
        return page.maps(p, "positions: a step per row", 130).maps(q, "contents, random weights", 130)

    def cut(self, page):
        p = [0.42, 0.28, 0.14, 0.1, 0.06]
        for k, top_p in ((0, 1.0), (3, 1.0), (0, 0.8), (3, 0.8)):
            kept = self.dq.filter_logits(self.torch.tensor([p]).log(), k, top_p)[0].isfinite().tolist()
            page.table([p], f"top_k = {k}, top_p = {top_p}", 36, [[ORANGE if each else GREY for each in kept]])
        return page

    def staircase(self, page):
        p, u = [0.2, 0.0, 0.5, 0.3], (self.torch.arange(11) / 10).clamp(min=1e-3)
        drawn = self.dq.draw(self.torch.tensor([p]).log().expand(11, -1), u)
        return page.table([p], "probabilities", 40).table([u, drawn], "u, and what is drawn", 40)

    def samples(self, page):
        model = self.model()
        codes, _ = model.layout.unpack(*self.dq.generate(model, self.torch.full((5,), -1), seed=3))
        return page.maps(codes, "samples of a model with random weights: codes", 130)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("number", type=int, choices=range(1, 18), help="the exercise")
    args = parser.parse_args()
    import dq
    path = f"picture-{args.number}.png"
    try:
        Pictures(dq).image(args.number - 1).save(path)
    except dq.UserError as error:
        sys.exit(f"no picture yet: {error}")
    print(path)


if __name__ == "__main__":
    main()
