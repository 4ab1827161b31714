"""The figures that the trainers report, against naive computations."""
import itertools
import math

import numpy as np
import pytest
import torch

import common
import dq
import sample
import train_transformer
import train_vae
from test_layout import random_image
from test_transformer import tiny


def plain():
    return torch.autocast("cpu", enabled=False)


def test_auc_equals_counting_pairs():
    score, truth = torch.randint(0, 6, (7, 4)).float(), torch.rand(7, 4) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in score[truth].tolist() for b in score[~truth].tolist()]
    assert train_vae.auc(score, truth) == pytest.approx(sum(pairs) / len(pairs))


def test_evaluation_of_a_dq_vae():
    torch.manual_seed(0)
    config = dq.VAEConfig(size=16, codebook_size=8)
    model = dq.DQVAE(config)
    x = torch.rand(10, 3, 16, 16) * 2 - 1
    model(x)
    figures, y, grains = train_vae.evaluate(model, x, torch.rand(10, 2, 2) < 0.5, plain, batch_size=4)
    assert model.training
    model.eval()
    with torch.no_grad():
        out = model(x)
    y = out.reconstruction.clamp(-1, 1)
    psnr = [10 * math.log10(1 / float(((a - b) / 2).square().mean())) for a, b in zip(x, y)]
    assert figures["psnr"] == pytest.approx(sum(psnr) / 10, rel=1e-4)
    counts, n_codes = [0] * 8, 0
    layout = dq.Layout(16, (8, 4))
    for row in layout.pack(out.codes, out.grains)[1].tolist():               # the codes that are really sent
        for c in row:
            if c >= 0:
                counts[c] += 1
                n_codes += 1
    entropy = -sum(c / n_codes * math.log(c / n_codes) for c in counts if c)
    assert figures["perplexity"] == pytest.approx(math.exp(entropy), rel=1e-4)
    assert figures["codebook_used"] == sum(c > 0 for c in counts) / 8
    assert figures["codes_per_image"] == pytest.approx(n_codes / 10)
    # 3 bits name one of 8 codes, 1 bit the granularity of each of 4 regions
    assert figures["bits_per_pixel"] == pytest.approx((n_codes / 10 * 3 + 4) / 256)
    fine = [float((g == 1).float().mean()) for g in out.grains]
    expected = [min(fine), sum(fine) / 10, max(fine)]
    assert [figures[f"fine_{name}"] for name in ("min", "mean", "max")] == pytest.approx(expected)
    assert figures["share"] == pytest.approx([float((out.grains == k).float().mean()) for k in (0, 1)], abs=1e-4)


def images_of(codes, grains):
    """As train_transformer.py reads them, all without a class."""
    part = dict(codes=codes[:, None].byte(), grains=grains[:, None].byte(), label=torch.full((len(codes),), -1))
    return train_transformer.views(part, (4, 2), uncond=False)


def test_evaluation_of_a_transformer():
    model = tiny(8, (4, 2), V=5)
    grains = torch.randint(0, 2, (6, 2, 2))
    codes = random_image(model.layout, grains, 5)
    pos, code = model.layout.pack(codes, grains)
    figures = train_transformer.evaluate(model, images_of(codes, grains), torch.device("cpu"), plain, batch_size=4)
    model.eval()
    nats = []
    with torch.no_grad():
        for b in range(6):                                                   # each image alone, pair by pair
            position, content = model.logits(pos[b:b + 1], code[b:b + 1])
            logp = 0.0
            for t in range(pos.shape[1]):
                logp += float(position[0, t].log_softmax(-1)[pos[b, t]])
                if code[b, t] >= 0:
                    logp += float(content[0, t].log_softmax(-1)[code[b, t]])
            nats.append(-logp)
    n_codes = (code >= 0).sum().item() / 6
    assert figures["nats_per_image"] == pytest.approx(sum(nats) / 6, rel=1e-4)
    assert figures["bits_per_code"] == pytest.approx(sum(nats) / 6 / math.log(2) / n_codes, rel=1e-4)
    assert figures["bits_per_pixel"] == pytest.approx(sum(nats) / 6 / math.log(2) / 64, rel=1e-4)


def test_evaluation_is_no_wider_than_needed(monkeypatch):
    model = tiny(8, (4, 2), V=5)
    grains = torch.zeros(5, 2, 2, dtype=torch.long)                          # 4 codes and 2 EOS each ...
    grains[1], grains[3] = 1, 1                                              # ... but for two images of 16 codes
    images = images_of(random_image(model.layout, grains, 5), grains)
    widths, real = [], train_transformer.sequences

    def sequences(*args):
        batch = real(*args)
        widths.append(tuple(batch[0].shape))
        return batch
    monkeypatch.setattr(train_transformer, "sequences", sequences)
    train_transformer.evaluate(model, images, torch.device("cpu"), plain, batch_size=3)
    assert widths == [(3, 6), (2, 18)]


def test_seeds_of_processes_have_nothing_in_common():
    numbers = itertools.product(range(3), range(50), range(4))               # seed, step, process
    seeds = {train_transformer.seed_of(*three) for three in numbers}
    assert len(seeds) == 600
    assert train_transformer.seed_of(1, 2, 3) == train_transformer.seed_of(1, 2, 3)
    torch.manual_seed(max(seeds))                                            # torch takes them


def test_encoding_keeps_every_image_and_its_mirror_image():
    torch.manual_seed(0)
    model = dq.DQVAE(dq.VAEConfig(size=16, codebook_size=8))
    data = train_vae.ToyShapes(16, n=10)
    x = torch.stack([data[i][0] for i in range(10)])
    model(x)
    model.eval()
    device, layout = torch.device("cpu"), dq.Layout(16, (8, 4))
    with common.Stop(device) as stop:
        part = train_vae.encode(model, data, device, plain, workers=0, mirrored=True, stop=stop)
    assert part["codes"].shape == (10, 2, 4, 4) and part["grains"].shape == (10, 2, 2, 2)
    assert {x.dtype for x in part.values()} == {torch.uint8}                 # 8 codes, 2 granularities, 4 classes
    images = train_transformer.views(part, (8, 4), uncond=False)
    with torch.no_grad():
        for v, view in enumerate((x, x.flip(3))):
            codes, grains = model.encode(view)
            assert torch.equal(images.codes[v::2], codes) and torch.equal(images.grains[v::2], grains)
            assert images.label[v::2].tolist() == [i % 4 for i in range(10)]
            pos, code = layout.pack(codes, grains)
            assert images.length[v::2].tolist() == ((pos != layout.end).sum(1) + 1).tolist()
            for index in (torch.tensor([3]), torch.tensor([1, 7, 4])):
                n = images.length[v::2][index].max()
                batch = train_transformer.sequences(images, 2 * index + v, layout, device)
                assert batch[0].shape[1] in (n, n + 1) and batch[2].tolist() == (index % 4).tolist()
                for ours, whole in zip(batch, (pos, code)):
                    assert torch.equal(ours, whole[index, :ours.shape[1]])


def test_batches_of_stage_2():
    """Each epoch deals every sequence once, in another order; a batch is sorted; any start gives the same batches."""
    length = np.random.default_rng(0).integers(6, 18, size=12)
    dealt = list(itertools.islice(train_transformer.batches(length, 4, seed=5), 9))
    epochs = [torch.cat(dealt[e:e + 3]).tolist() for e in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) == 3
    assert all((np.diff(length[batch]) >= 0).all() for batch in dealt)
    for start in (1, 4, 8):
        assert torch.equal(next(train_transformer.batches(length, 4, seed=5, start=start)), dealt[start])
    big = next(train_transformer.batches(length, 30, seed=5)).tolist()       # more than an epoch
    assert all(2 <= big.count(i) <= 3 for i in range(12))


def test_schedules():
    assert [round(train_vae.gumbel_scale(s, 100), 3) for s in (0, 50, 70, 90, 99)] == [1, 1, 0.5, 0, 0]

    schedule = common.Schedule(steps=110, batch_size=1, lr=2.0, warmup=10)
    rates = [schedule.learning_rate(step) for step in range(110)]
    assert rates[0] == 0.2 and rates[9] == max(rates) == 2.0 and rates[60] == pytest.approx(1.0) and rates[-1] < 0.01


def test_a_grain_map_is_read_bright_for_fine(tmp_path):
    from PIL import Image
    picture = Image.new("L", (40, 40), 0)
    picture.paste(255, (20, 0, 40, 20))
    picture.paste(120, (0, 20, 20, 40))
    picture.save(tmp_path / "map.png")
    assert sample.read_grain_map(tmp_path / "map.png", dq.Layout(16, (8, 4, 2))).tolist() == [[[0, 2], [1, 0]]]
