"""What the list of exercises promises of speed: a function for whole batches, against the loop of naive.py."""
import time

import torch

import naive
from dq import Layout
from test_layout import random_image


def seconds(function, repeats):
    """The least time of computing that a call took: what else goes on in the machine only adds to it."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times)


def test_pack_is_faster_than_the_loop():
    """A loop over the cells takes about as long as naive.py's; one over granularities, or even images, far less."""
    layout = Layout(48, (8, 4, 2))
    grains = torch.randint(0, 3, (32, 6, 6))
    codes = random_image(layout, grains)
    pairs = [naive.pack(layout, c, g) for c, g in zip(codes, grains)]
    pos, code = layout.pack(codes, grains)
    right = all(list(zip(*row)) == wanted + [(layout.end, -1)] * (layout.max_len - len(wanted))
                for wanted, row in zip(pairs, zip(pos.tolist(), code.tolist())))
    assert right, "what pack returns is not what the loop returns, so its speed does not count"
    loop = seconds(lambda: [naive.pack(layout, c, g) for c, g in zip(codes, grains)], 1)
    batch = seconds(lambda: layout.pack(codes, grains), 20)
    assert batch < loop / 5, f"pack takes {batch / loop:.2f} times as long as a loop over all cells; 0.2 is allowed"
