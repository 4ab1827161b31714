"""tools/codec.py, which stores an image in a small file.

Writer, Reader, cumulated, pack and unpack, shift_router, main -> the tests in this order
"""
import math
import random
import zlib

import pytest
import torch
from PIL import Image

import codec
import common
import dq
from conftest import call
from data import load_image
from test_layout import random_image
from test_transformer import tiny


def write(symbols, tables):
    coder = codec.Writer(symbols)
    for bounds in tables:
        coder.code(bounds)
    return coder.finish()


def read(data, tables):
    coder = codec.Reader(data)
    return [coder.code(bounds) for bounds in tables]


@pytest.mark.parametrize("largest", [2, 300, 2 ** 20])
def test_symbols_come_back_and_cost_their_information(largest):
    """For tables of random counts, some of them zero, and random symbols, likely and unlikely ones."""
    rng = random.Random(largest)
    for length in (0, 1, 2, 50, 400):
        symbols, tables, bits = [], [], 0.0
        for _ in range(length):
            counts = [rng.choice([0, 1, rng.randrange(1, largest)]) for _ in range(rng.randrange(1, 16))] + [1]
            i = rng.choice([i for i, count in enumerate(counts) if count])
            symbols.append(i)
            tables.append([sum(counts[:k]) for k in range(len(counts) + 1)])
            bits -= math.log2(counts[i] / sum(counts))
        data = write(symbols, tables)
        assert read(data, tables) == symbols
        assert bits / 8 - 3 <= len(data) <= bits / 8 + 1.01  # the file's length carries information, too


def test_runs_of_extreme_symbols_come_back():
    """Extreme symbols, many times: the interval's ends are long runs of one byte, with carries."""
    tables = [[0, 1, 2 ** 24 - 1, 2 ** 24]] * 300
    for symbols in ([1] * 300, [0] * 300, [2] * 300, [2, 0] * 150, [1] * 299 + [2], [2] + [1] * 298 + [0]):
        assert read(write(symbols, tables), tables) == symbols
    assert len(write([1] * 300, tables)) <= 1


def test_what_is_certain_costs_nothing():
    tables = [[0, 0, 2 ** 24, 2 ** 24]] * 2000
    assert len(write([1] * 2000, tables)) == 0 and read(b"", tables) == [1] * 2000


def test_bytes_that_nobody_wrote_can_be_read():
    """If the interval's width is not a multiple of the total, its last bits belong to no symbol."""
    assert read(b"\xff" * 9, [[0, 1, 3]] * 3)[0] == 1


def test_integers_follow_the_probabilities():
    torch.manual_seed(0)
    for n in (1, 2, 1024):
        logits = torch.randn(n) * 8                                          # some probabilities are below 2^-24
        logits[1::3] = -math.inf
        bounds = torch.tensor(codec.cumulated(logits))
        counts, p = bounds.diff(), logits.double().softmax(0)
        assert bounds[0] == 0 and len(bounds) == n + 1 and bounds[-1] <= 2 ** 24
        assert (counts[logits == -math.inf] == 0).all() and (counts[logits > -math.inf] >= 1).all()
        torch.testing.assert_close(counts / bounds[-1].double(), p, atol=n * 2.0 ** -23, rtol=1e-3)


MODELS = {
    "two granularities": dict(size=8, factors=(4, 2), V=24, layers=1),
    "three, classes": dict(size=16, factors=(8, 4, 2), V=24, layers=1, classes=("a", "b", "c")),
    "one": dict(size=8, factors=(2,), V=24, layers=1, classes=("a", "b")),
}


def codes_of_noise(layout, n, V=24):
    """n images of random codes and granularities -> pos, code, each (n, L)"""
    grains = torch.randint(layout.n_grains, (n, layout.side, layout.side))
    return layout.pack(random_image(layout, grains, V), grains)


@pytest.mark.parametrize("name", MODELS)
def test_images_come_back_code_by_code(name):
    """Images that are likely for the model, of different lengths, and images that are very unlikely."""
    model = tiny(**MODELS[name])
    label = torch.arange(2) % max(1, model.n_classes)
    drawn = dq.generate(model, label, dq.SampleOptions(temperature=0.5), seed=1)
    odd = codes_of_noise(model.layout, 2)
    for i, (pos, code) in enumerate(zip(torch.cat([drawn[0], odd[0]]), torch.cat([drawn[1], odd[1]]))):
        pos, code = pos[None], code[None]
        data = codec.pack(model, pos, code, model_checksum=7)
        back = codec.unpack(model, data, model_checksum=7)
        assert torch.equal(back[0], pos) and torch.equal(back[1], code)

        with torch.no_grad():                                                # over all labels, and no label
            nats = min(sum(model(pos, code, torch.tensor([y])).values()).item() for y in range(-1, model.n_classes))
        size, header = nats / math.log(2) / 8, codec.HEADER.size + len(torch.__version__)
        assert size - 3 <= len(data) - header <= 1.01 * size + 4, (i, size, len(data) - header)


@pytest.fixture(scope="module")
def packed():
    """A model, an image's codes, and their file."""
    model = tiny(**MODELS["three, classes"])
    pos, code = codes_of_noise(model.layout, 1)
    return model, pos, code, codec.pack(model, pos, code, model_checksum=7)


def test_the_header_names_the_likeliest_label(packed):
    model, pos, code, data = packed
    with torch.no_grad():
        nats = [sum(model(pos, code, torch.tensor([label])).values()).item() for label in range(-1, model.n_classes)]
    assert codec.HEADER.unpack_from(data)[3] == nats.index(min(nats)) != 0   # 0 is no label


def test_the_number_of_threads_changes_nothing(packed):
    """Neither the file, nor the number of threads that the rest of the program uses."""
    model, pos, code, data = packed
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert codec.pack(model, pos, code, model_checksum=7) == data and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_another_torch_and_another_model_are_refused(packed, monkeypatch):
    model, *_, data = packed
    with pytest.raises(dq.UserError, match="packed with another model"):
        codec.unpack(model, data, model_checksum=8)
    version = torch.__version__
    monkeypatch.setattr(torch, "__version__", "9.8.7")
    with pytest.raises(dq.UserError) as error:
        codec.unpack(model, data, model_checksum=7)
    assert version in str(error.value) and "9.8.7" in str(error.value) and "\n" not in str(error.value)


def test_other_sums_are_detected(packed, monkeypatch):
    """The same torch and model, but a processor whose last digits differ: a one-line error and no wrong image."""
    model, *_, data = packed
    real = codec.cumulated
    monkeypatch.setattr(codec, "cumulated", lambda logits: real(logits * (1 + 1e-3)))
    with pytest.raises(dq.UserError, match="this processor computes other sums"):
        codec.unpack(model, data, model_checksum=7)


def test_a_damaged_file_never_gives_another_picture(packed):
    """With changed bytes or a truncated file, unpacking gives a one-line error. Only if the changed bits are redundant,
    it returns the same codes."""
    model, pos, code, data = packed
    rng, damaged = random.Random(0), []
    places = [*range(codec.HEADER.size + 4), *rng.sample(range(len(data)), 4), len(data) - 1]
    for i in places:
        damaged.append(data[:i] + bytes([data[i] ^ (1 << rng.randrange(8))]) + data[i + 1:])
    damaged += [data[:n] for n in (0, 2, codec.HEADER.size - 1, codec.HEADER.size + 3, len(data) // 2, len(data) - 1)]
    refused = 0
    for each in damaged:
        try:
            back = codec.unpack(model, each, model_checksum=7)
            assert torch.equal(back[0], pos) and torch.equal(back[1], code)
        except dq.UserError as error:
            refused += 1
            assert str(error).isprintable()
    assert refused >= len(damaged) - 2


@pytest.fixture
def files(tmp_path):
    """A folder with a checkpoint of both stages and a picture."""
    vae = dq.DQVAE(dq.VAEConfig(size=32, codebook_size=16)).eval()
    model = tiny(size=32, factors=(8, 4), V=16, layers=1, classes=("a", "b"))
    extra = dict(vae_config=vars(vae.config), vae_weights=vae.state_dict())
    dq.save_checkpoint(tmp_path / "model.pt", "dq-transformer", model.config, model, **extra)
    Image.effect_noise((50, 40), 80).convert("RGB").save(tmp_path / "in.png")
    return tmp_path, vae


def test_the_commands(files, capsys):
    folder, vae = files
    command = ["--model", folder / "model.pt"]
    assert call(codec.main, "pack", folder / "in.png", folder / "file.dq", *command) is None
    size = (folder / "file.dq").stat().st_size
    assert f"file.dq: {size} bytes" in capsys.readouterr().out
    assert call(codec.main, "unpack", folder / "file.dq", folder / "out.png", *command) is None
    with torch.no_grad():
        codes, _ = vae.encode(load_image(folder / "in.png", 32)[None])
        picture = common.to_picture(vae.decode(codes)[0], 0)
    assert Image.open(folder / "out.png").tobytes() == picture.tobytes()
    model_checksum = int.from_bytes((folder / "file.dq").read_bytes()[3:7], "big")
    assert model_checksum == zlib.crc32((folder / "model.pt").read_bytes())


def test_detail_chooses_the_granularity(files, capsys):
    folder, _ = files
    for detail, codes in ((-1e6, 16), (1e6, 64)):
        command = ["--model", folder / "model.pt", "--detail", detail]
        assert call(codec.main, "pack", folder / "in.png", folder / "file.dq", *command) is None
        assert f"for {codes} codes" in capsys.readouterr().out


def test_detail_moves_thresholds_too():
    router = dq.EntropyRouter((0.5, 0.5), 8)
    router.thresholds.fill_(2.0)
    codec.shift_router(router, 0.5)
    assert router.thresholds.tolist() == [1.5]


def test_what_the_commands_refuse(files):
    folder, _ = files
    command = ["--model", folder / "model.pt"]
    assert "not a file of codec.py" in call(codec.main, "unpack", folder / "in.png", folder / "out.png", *command)
    assert "no such file" in call(codec.main, "unpack", folder / "none.dq", folder / "out.png", *command)
    assert "No such file" in call(codec.main, "pack", folder / "none.png", folder / "file.dq", *command)
    assert "the name must end in .png" in call(codec.main, "unpack", folder / "in.png", folder / "out.xyz", *command)
    assert not list(folder.glob("out.*")) and not (folder / "file.dq").exists()
