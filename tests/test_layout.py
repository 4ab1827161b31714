"""Layout, section 5 of dq.py: `pack` is a sort, `unpack` its inverse, and `legal` allows exactly the complete tilings.

    Layout.pack               test_pack_equals_a_loop, test_the_example_of_the_docstring
    Layout.unpack, grains     test_unpack_is_the_inverse_of_pack
    Layout.lengths            test_pack_equals_a_loop
    Layout.legal              test_packed_sequences_are_legal_at_each_step, test_every_legal_walk_is_a_complete_tiling
    sizes and coordinates     test_sizes_of_the_paper, test_places_are_the_centres_of_codes_on_the_finest_grid
"""
import pytest
import torch

import naive
from dq import Layout

CASES = [(8, (4,)), (8, (4, 2)), (16, (4, 2)), (16, (8, 4, 2)), (12, (4, 1)), (4, (4, 2, 1))]


def random_image(layout, grains, V=7):
    """Codes (B, H, W) that are constant over each coarse code's cells."""
    B, h, H = len(grains), layout.side, layout.fine_side
    codes = torch.randint(0, V, (B, H, H), device=grains.device)
    for b in range(B):
        for y in range(H):
            for x in range(H):
                m = H // h
                k = int(grains[b, y // m, x // m])
                c = m // int(layout.cells[k] ** 0.5)                         # side of one code, in fine cells
                codes[b, y, x] = codes[b, y // c * c, x // c * c]
    return codes


def grain_maps(layout, device):
    """All coarse, all fine, and four random maps."""
    h, K = layout.side, layout.n_grains
    parts = torch.zeros(1, h, h, dtype=torch.long), torch.full((1, h, h), K - 1), torch.randint(0, K, (4, h, h))
    return torch.cat(parts).to(device)


def padded(layout, pairs):
    return pairs + [(layout.end, -1)] * (layout.max_len - len(pairs))


@pytest.mark.parametrize("size, factors", CASES)
def test_pack_equals_a_loop(size, factors, device):
    layout = Layout(size, factors).to(device)
    grains = grain_maps(layout, device)
    codes = random_image(layout, grains)
    pos, code = layout.pack(codes, grains)
    shape = (len(codes), layout.max_len)
    assert pos.shape == code.shape == shape, f"pos or code does not have the shape (B, max_len) = {shape}"
    for b in range(len(codes)):
        pairs = naive.pack(layout, codes[b], grains[b])
        n = sum(layout.cells[k] for k in grains[b].flatten()) + layout.n_grains
        assert len(pairs) == n, "naive.pack does not return one pair per code and EOS"
        target_pos, target_code = map(list, zip(*padded(layout, pairs)))
        assert sorted(pos[b].tolist()) == sorted(target_pos), "in pos, an id of a code or EOS is missing or repeated"
        assert pos[b].tolist() == target_pos, "pos has the right ids, but in the wrong order"
        assert code[b].tolist() == target_code, "pos is right, but a content does not belong to its position"
        assert layout.lengths(pos)[b] == len(pairs), "lengths does not count the pairs up to and including the last EOS"


@pytest.mark.parametrize("size, factors", CASES)
def test_unpack_is_the_inverse_of_pack(size, factors, device):
    """For a complete sequence, and for its coarse codes alone, where the other regions are unknown."""
    layout = Layout(size, factors).to(device)
    grains = grain_maps(layout, device)
    codes = random_image(layout, grains)
    pairs = [naive.pack(layout, c, g) for c, g in zip(codes, grains)]
    pos, code = torch.tensor([padded(layout, each) for each in pairs], device=device).unbind(-1)
    codes2, grains2 = layout.unpack(pos, code)
    assert torch.equal(grains2, grains), "unpacking a complete image does not return the granularities that were packed"
    assert torch.equal(codes2, codes), "unpacking a complete image does not return the codes that were packed"
    for b in range(len(pairs)):
        n = sum(p < layout.eos[0] for p, _ in pairs[b]) + 1                  # the coarse codes and their EOS
        codes2, grains2 = layout.unpack(pos[b:b + 1, :n], code[b:b + 1, :n])
        known = grains[b] == 0
        assert torch.equal(grains2[0], torch.where(known, 0, -1)), "a region that is not written yet has a granularity"
        cells = known.repeat_interleave(layout.fine_side // layout.side, 0)
        cells = cells.repeat_interleave(layout.fine_side // layout.side, 1)
        assert torch.equal(codes2[0], torch.where(cells, codes[b], -1)), "a cell that is not written yet has a code"


def test_places_are_the_centres_of_codes_on_the_finest_grid(device):
    """An EOS and the start, which has the last row, are at 0, 0."""
    layout, places = Layout(8, (4, 2, 1)).to(device), []
    for side, width in ((2, 4), (4, 2), (8, 1)):
        places += [[(y + 0.5) * width, (x + 0.5) * width] for y in range(side) for x in range(side)] + [[0, 0]]
    assert layout.coordinates.tolist() == places + [[0, 0]]
    ids = [*range(layout.n_positions), -1]
    assert layout.coordinates[ids].tolist() == [list(naive.place(layout, p)) for p in ids]


def test_the_example_of_the_docstring():
    a, b, c, d, e, f, g = range(7)
    codes = torch.tensor([[[a, a, b, c], [a, a, d, e], [f, f, g, g], [f, f, g, g]]])
    layout, grains = Layout(4, (2, 1)), torch.tensor([[[0, 1], [0, 0]]])
    pos, code = layout.pack(codes, grains)
    assert pos.tolist() == [[0, 2, 3, 4, 7, 8, 11, 12] + 10 * [21]]
    assert code.tolist() == [[a, f, g, -1, b, c, d, e] + 10 * [-1]]
    following = {-1: {0, 1, 2, 3, 4}, 0: {1, 2, 3, 4}, 4: {7}, 7: {8}, 8: {11}, 12: {21}, 21: {21}}
    for prev, target in following.items():
        final = layout.legal(torch.tensor([prev]), grains.flatten(1))
        assert set(final[0].nonzero().flatten().tolist()) == target


def test_sizes_of_the_paper():
    layout = Layout(256, (16, 8))
    assert (layout.n_regions, layout.cells, layout.n_positions) == (256, [1, 4], 256 + 1 + 1024 + 1)
    half = torch.arange(256).view(1, 16, 16) % 2
    pos, code = layout.pack(torch.zeros(1, 32, 32, dtype=torch.long), half)
    assert (pos != layout.end).sum() + 1 == 640 + 2 and (code >= 0).sum() == 640


@pytest.mark.parametrize("size, factors", CASES)
def test_packed_sequences_are_legal_at_each_step(size, factors, device):
    layout = Layout(size, factors).to(device)
    grains = grain_maps(layout, device)
    pos, _ = layout.pack(random_image(layout, grains), grains)
    prev = torch.nn.functional.pad(pos[:, :-1], (1, 0), value=-1)
    mask = layout.legal(prev, grains.flatten(1))                             # final granularities, as in training
    assert mask.gather(2, pos[..., None]).all(), (
        "with the final granularities, as in training, the mask excludes the next id of a packed sequence: "
        "it must not use the granularity of a region that is not open yet")
    for b in range(len(pos)):
        for t in range(layout.max_len):
            prefix = pos[b, :t].tolist()
            expected = naive.legal(layout, prefix)
            ours = set(mask[b, t].nonzero().flatten().tolist())
            assert ours >= expected, f"with the final granularities, the mask excludes an id that is valid at step {t}"
            assert ours <= expected, f"with the final granularities, the mask allows an id that is invalid at step {t}"
            known = layout.grains(pos[b:b + 1, :t]) if t else torch.full((1, layout.n_regions), -1, device=device)
            step = layout.legal(prev[b:b + 1, t], known)                     # granularities so far, as in sampling
            assert torch.equal(step[0], mask[b, t]), (
                f"at step {t}, the granularities known so far give another mask than the final granularities")


@pytest.mark.parametrize("size, factors", CASES)
def test_every_legal_walk_is_a_complete_tiling(size, factors, device):
    layout, B = Layout(size, factors).to(device), 64
    pos = torch.zeros(B, 0, dtype=torch.long, device=device)
    for t in range(layout.max_len):
        prev = pos[:, -1] if t else torch.full((B,), -1, device=device)
        grains = layout.grains(pos) if t else torch.full((B, layout.n_regions), -1, device=device)
        mask = layout.legal(prev, grains)
        assert mask.any(1).all(), f"a sequence is stuck at step {t}: no id is valid"
        pos = torch.cat([pos, torch.multinomial(mask.float(), 1)], 1)
    assert (pos[:, -1] == layout.end).all(), "a sequence of max_len steps does not reach the last EOS"
    codes, grains = layout.unpack(pos, torch.where(layout.is_eos[pos], -1, 3))
    assert (codes == 3).all() and (grains >= 0).all(), "a sequence leaves a hole in its image"
    for row, g in zip(pos, grains):                                          # each region exactly once
        ids = row[row != layout.end].tolist()
        once = len(set(ids)) == len(ids) == sum(layout.cells[k] for k in g.flatten()) + layout.n_grains - 1
        assert once, "a sequence repeats an id, or covers a region with two granularities"
