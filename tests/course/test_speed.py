"""Speed: a function for whole batches against the loop of naive.py, by time of computing.

Each test calls a function for a few batches, and the loop for some rows of each, for which both answers must agree.
"""
import time

import torch

import dq
import naive
from test_layout import random_image
from test_transformer import tiny
from test_vae import TRIPLE, small

clock = time.process_time                                                    # the grader puts the worker's clock here
ALLOWED = 1 / 5


@torch.no_grad()
def faster(make, ours, loop):
    """make() -> a batch, a tuple of what has B rows; ours(*batch) -> one or more tensors; loop(*row), by naive.py"""
    threads, took, by_loop = torch.get_num_threads(), [], []
    torch.set_num_threads(1)                                                 # others would count while they wait
    for n in range(4):
        batch, wanted, start = make(), [], clock()
        answer = ours(*batch)
        took.append(clock() - start)
        rows, start = torch.randperm(len(batch[0])).tolist(), time.process_time()
        while len(wanted) < len(rows) and time.process_time() - start < 0.005:  # one may be too short to measure
            wanted.append(loop(*(each[rows[len(wanted)]] for each in batch)))
        by_loop.append((time.process_time() - start) / len(wanted) * len(rows))
        answer, wanted = ([x if isinstance(x, tuple) else (x,) for x in each] for each in ([answer], wanted))
        for b, right in zip(rows, wanted):
            for mine, theirs in zip(answer[0], right):
                torch.testing.assert_close(mine[b].float(), torch.as_tensor(theirs).float(), atol=1e-3, rtol=1e-3, msg=(
                    lambda why: f"in a large batch, a row is not what the loop says: {why}"))
        assert n == 0 or took[-1] < by_loop[-1] / 2, "a whole batch takes about as long as a loop over its rows"
    torch.set_num_threads(threads)
    share = min(took) / min(by_loop)
    assert share < ALLOWED, f"a batch takes {share:.2f} times as long as a loop over its rows; {ALLOWED} is allowed"


def test_entropy_is_faster_than_the_loop():
    router, corners = dq.EntropyRouter((0.5, 0.5), 8), range(0, 32, 8)
    faster(lambda: (torch.rand(32, 3, 32, 32) * 2 - 1,), lambda x: router.score(x).flatten(1),
           lambda x: [naive.entropy(x[:, i:i + 8, j:j + 8]) for i in corners for j in corners])


def test_assign_is_faster_than_the_loop():
    book = dq.Codebook(32, 4)
    book.codes.normal_()
    faster(lambda: (torch.randn(512, 4),), lambda z: book.assign(z), lambda z: naive.nearest(book.codes, z))


def test_update_is_faster_than_the_loop():
    def make():                                                              # a single row: what each code gets
        book = dq.Codebook(16, 4, decay=0.0)                                 # the averages of this batch alone
        book.codes.normal_()
        return [book], book.codes[None].clone(), torch.randn(1, 6, 4, 8, 8), torch.rand(1, 6, 8, 8)

    def ours(books, codes, z, weight):
        z = z[0].permute(0, 2, 3, 1).flatten(0, 2)
        books[0].update(z, weight.flatten(), books[0].assign(z))
        return books[0].uses[None], books[0].sums[None]
    faster(make, ours, lambda book, codes, z, weight: naive.averages(
        codes, torch.zeros(16), torch.zeros(16, 4), z, weight, 0.0))


def test_mix_is_faster_than_the_loop():
    model = dq.DQVAE(small(factors=TRIPLE[0], ratios=TRIPLE[1]))
    faster(lambda: (torch.rand(64, 3, 2, 2), *(torch.randn(64, 4, s, s) for s in (2, 4, 8))),
           lambda gate, *maps: model.mix([*maps], gate), lambda gate, *maps: naive.mix(maps, gate))


def test_cell_weight_is_faster_than_the_loop():
    model = dq.DQVAE(small(factors=TRIPLE[0], ratios=TRIPLE[1]))
    faster(lambda: (torch.randint(0, 3, (256, 2, 2)),), lambda grains: model.cell_weight(dq.one_hot(grains, 3)),
           lambda grains: naive.cell_weight(grains, TRIPLE[0]))


def images(layout, B, V=7):
    grains = torch.randint(0, layout.n_grains, (B, layout.side, layout.side))
    return random_image(layout, grains, V), grains


def test_pack_is_faster_than_the_loop():
    """A loop over the cells takes about as long as naive.py's; one over granularities, or even images, far less."""
    layout = dq.Layout(48, (8, 4, 2))

    def loop(codes, grains):
        pairs = naive.pack(layout, codes, grains)
        return tuple(zip(*pairs, *[(layout.end, -1)] * (layout.max_len - len(pairs))))
    faster(lambda: images(layout, 16), lambda codes, grains: layout.pack(codes, grains), loop)


def test_legal_is_faster_than_the_loop():
    layout = dq.Layout(16, (4, 2))

    def make():
        codes, grains = images(layout, 16)
        pairs = [naive.pack(layout, *each) for each in zip(codes, grains)]
        ids = [[-1] + [p for p, _ in each] + [layout.end] * (layout.max_len - len(each)) for each in pairs]
        return torch.tensor(ids)[:, :-1], grains.flatten(1)

    def loop(ids, grains):
        may = [naive.legal(layout, ids[1:t + 1].tolist()) for t in range(len(ids))]
        return [[p in each for p in range(layout.n_positions)] for each in may]
    faster(make, lambda ids, grains: layout.legal(ids, grains), loop)


def test_embed_is_faster_than_the_loop():
    model = tiny(8, (4, 2, 1), V=5)

    def make():
        pos = torch.randint(0, model.layout.n_positions, (2048,))
        return pos, torch.where(model.layout.is_eos[pos], -1, torch.randint(0, 5, pos.shape))
    faster(make, lambda pos, code: model.embed(pos, code), lambda p, c: naive.embed(model, int(p), int(c)))


def test_logits_are_faster_than_the_loop():
    model = tiny(8, (4, 2), V=5, layers=1)
    faster(lambda: model.layout.pack(*images(model.layout, 8, V=5)), lambda pos, code: model.logits(pos, code),
           lambda pos, code: naive.logits(model, list(zip(pos.tolist(), code.tolist())), -1))


def test_filter_logits_is_faster_than_the_loop():
    def loop(row):
        kept = naive.filter_logits(row.tolist(), 300, 0.97)
        return [i in kept for i in range(400)]
    faster(lambda: (torch.randn(128, 400),), lambda logits: dq.filter_logits(logits, 300, 0.97).isfinite(), loop)


def test_draw_is_faster_than_the_loop():
    faster(lambda: (torch.randn(256, 60), 1 - torch.rand(256)), lambda logits, u: dq.draw(logits, u),
           lambda row, u: naive.draw(dict(enumerate(row.tolist())), float(u)))
