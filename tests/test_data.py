"""Images in, checkpoints out."""
import numpy as np
import pytest
import torch
from PIL import Image

import dq
import train_vae
from dq import ImageFolder, ToyShapes


def read(tmp_path, image, name="x.png", size=4, **save):
    """Save one Pillow image, load it as the scripts do -> (S, S, 3) in 0..255."""
    image.save(tmp_path / name, **save)
    return ((dq.load_image(tmp_path / name, size) + 1) * 127.5).permute(1, 2, 0).numpy()


def flat(mode, color, size=(4, 4)):
    return Image.new(mode, size, color)


def palette_with_transparency():
    image = flat("P", 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.info["transparency"] = 1
    return image


@pytest.mark.parametrize("image, name, expected", [
    (flat("RGB", (10, 20, 30)), "x.png", (10, 20, 30)),
    (flat("L", 90), "x.png", (90, 90, 90)),
    (flat("1", 1), "x.png", (255, 255, 255)),
    (flat("P", 0), "x.gif", (0, 0, 0)),
    (flat("CMYK", (0, 255, 255, 0)), "x.tif", (255, 0, 0)),
    (flat("CMYK", (0, 255, 255, 0)), "x.jpg", (255, 0, 0)),
    (flat("RGBA", (255, 0, 0, 0)), "x.png", (255, 255, 255)),               # transparent: white
    (flat("RGBA", (0, 0, 0, 51)), "x.webp", (204, 204, 204)),               # a fifth black over white
    (flat("LA", (0, 0)), "x.png", (255, 255, 255)),
    (palette_with_transparency(), "x.png", (255, 255, 255)),
    (flat("I;16", 32896), "x.png", (128, 128, 128)),
    (flat("I;16", 257), "x.tif", (1, 1, 1)),
    (flat("F", 0.5), "x.tif", (127.5, 127.5, 127.5)),
], ids=["rgb", "grey", "bit", "gif", "cmyk", "cmyk-jpeg", "transparent", "translucent", "grey+alpha", "palette+alpha", "16bit", "16bit-tif", "float"])
def test_images_of_every_mode(tmp_path, image, name, expected):
    save = dict(lossless=True) if name.endswith("webp") else {}
    pixels = read(tmp_path, image, name, **save)
    assert np.abs(pixels - expected).max() <= 1, pixels[0, 0]


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (8, 8))
    image.paste("white", (0, 0, 8, 4))                                       # the upper half white ...
    exif = Image.Exif()
    exif[0x0112] = 3                                                         # ... stored upside down
    pixels = read(tmp_path, image, "x.png", size=8, exif=exif)
    assert pixels[:4].max() < 5 and pixels[4:].min() > 250


def test_resize_crop_and_flip(tmp_path):
    ramp = np.tile(np.arange(64, dtype=np.uint8)[None] * 4, (16, 1))         # 64 x 16, brighter to the right
    Image.fromarray(ramp).save(tmp_path / "wide.png")
    centre = dq.load_image(tmp_path / "wide.png", 16)
    assert abs(((centre.mean() + 1) * 127.5).item() - ramp.mean()) < 2
    crops = [dq.load_image(tmp_path / "wide.png", 16, np.random.default_rng(i)) for i in range(40)]
    rising = [bool(c[0, 0, -1] > c[0, 0, 0]) for c in crops]
    assert 8 < sum(rising) < 32                                              # half of them flipped
    assert len({round(c.mean().item(), 3) for c in crops}) > 15              # at many places
    noise = np.indices((64, 64)).sum(0).astype(np.uint8) % 2 * 255           # pixel checkerboard: antialiasing makes it grey
    Image.fromarray(noise).save(tmp_path / "noise.png")
    small = dq.load_image(tmp_path / "noise.png", 8)
    assert small.abs().max() < 0.1


def fill(folder, n, size=20):
    folder.mkdir(parents=True)
    for i in range(n):
        Image.new("RGB", (size, size + i), (i * 9 % 256, 40, 90)).save(folder / f"{i}.png")


def test_classes_splits_and_epochs(tmp_path):
    fill(tmp_path / "b/deeper", 30)
    fill(tmp_path / "a", 30)
    (tmp_path / "notes.txt").write_text("no image")
    train, val = (ImageFolder(tmp_path, 16, split, augment=split == "train") for split in ("train", "val"))
    assert train.classes == val.classes == ("a", "b")
    names = [{p for p, _ in d.files[:len(d)]} for d in (train, val)]
    assert len(names[0] | names[1]) == 60 and not names[0] & names[1] and len(names[1]) > 0
    assert {p.relative_to(tmp_path).parts[0]: y for p, y in train.files[:len(train)]} == {"a": 0, "b": 1}
    x, y = train[3]
    assert x.shape == (3, 16, 16) and -1 <= x.min() and x.max() <= 1 and y == 0
    assert torch.equal(train[3][0], x)                                       # the same image, the same crop
    assert ImageFolder(tmp_path / "a", 16).classes == ()                     # one folder is no classes
    assert ImageFolder(tmp_path / "a", 16)[0][1] == -1


def test_broken_files_are_named_and_left_out(tmp_path, capsys):
    for i in range(6):
        Image.new("RGB", (16, 16), "red").save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_bytes(b"not an image")
    whole = (tmp_path / "3.png").read_bytes()
    (tmp_path / "3.png").write_bytes(whole[:50])
    data = ImageFolder(tmp_path, 16)
    for i in range(2 * len(data)):
        assert (data[i][0][0] == 1).all()
    error = capsys.readouterr().err
    assert error.count("warning: left out") == 2 and "2.png" in error and "3.png" in error


def test_broken_held_out_files_do_not_end_a_run(tmp_path, capsys):
    for i in range(4):
        Image.new("RGB", (16, 16), "red").save(tmp_path / f"{i}.png")
    held_out, = [p for p, _ in ImageFolder(tmp_path, 16, "val").files[:1]]
    held_out.write_bytes(b"not an image")
    data = ImageFolder(tmp_path, 16, "val")
    assert len(data) == 1 and (data[0][0][0] == 1).all()


def test_no_folder_no_images_nothing_that_decodes(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        ImageFolder(tmp_path / "missing", 16)
    with pytest.raises(ValueError, match="no images"):
        ImageFolder(tmp_path, 16)
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match="can be decoded"):
        ImageFolder(tmp_path, 16)[0]


def test_stream_is_a_function_of_seed_and_batch_number():
    class Numbers(torch.utils.data.Dataset):
        def __len__(self):
            return 10

        def __getitem__(self, i):
            return i

    def take(n, **kwargs):
        batches = train_vae.stream(Numbers(), 4, **kwargs)
        return [next(batches).tolist() for _ in range(n)]

    whole = take(10, seed=1)
    assert whole[3:] == take(7, seed=1, start=3) and whole != take(10, seed=2)
    flat_ = sum(whole, [])
    for epoch in range(4):                                                   # every epoch holds each image once
        assert sorted(flat_[10 * epoch:10 * epoch + 10]) == list(range(10 * epoch, 10 * epoch + 10))


@pytest.mark.parametrize("size", [16, 32, 64])
def test_toy_shapes(size):
    data = ToyShapes(size, n=40)
    same, other = ToyShapes(size, n=40), ToyShapes(size, n=40, seed=1)
    for i in range(8):
        x, y = data[i]
        assert x.shape == (3, size, size) and x.abs().max() <= 1 and y == i % 4
        assert torch.equal(x, same[i][0]) and torch.equal(x, data[i + 40][0]) and not torch.equal(x, other[i][0])
        mask = data.detail_mask(i)
        change = (x[:, 1:, 1:] - x[:, :-1, 1:]).abs().sum(0) + (x[:, 1:, 1:] - x[:, 1:, :-1]).abs().sum(0)
        inside = torch.nn.functional.max_pool2d(mask[None].float(), 5, 1, 2)[0, 1:, 1:] > 0
        assert change[~inside].max() < 6 / size                              # outside the mask all is smooth
        assert change[mask[1:, 1:]].max() > 0.5                              # inside it is not
        assert 0.05 < mask.float().mean() < 0.8


def test_checkpoints(tmp_path):
    config = dq.VAEConfig(size=16, codebook_size=16)
    model = dq.DQVAE(config)
    path = tmp_path / "vae.pt"
    dq.save_checkpoint(path, "dq-vae", config, model, step=3)
    loaded = dq.load_vae(path, torch.device("cpu"))
    assert loaded.config == config and dq.load_checkpoint(path, "dq-vae")["step"] == 3
    for a, b in zip(model.state_dict().values(), loaded.state_dict().values()):
        assert torch.equal(a, b)
    assert [p.name for p in tmp_path.iterdir()] == ["vae.pt"]                # no temporary file is left
    with pytest.raises(ValueError, match="a dq-transformer is needed"):
        dq.load_transformer(path, torch.device("cpu"))
    whole = path.read_bytes()
    for missing in ({"kind": "dq-vae"}, {"kind": "dq-vae", "config": {"colour": 1}, "weights": {}}):
        torch.save(missing, path)
        with pytest.raises(dq.UserError, match="damaged or of another version"):
            dq.load_vae(path, torch.device("cpu"))
    for damage in (b"", b"hello", whole[:len(whole) // 2]):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match="damaged"):
            dq.load_checkpoint(path, "dq-vae")


def test_a_checkpoint_runs_no_code(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))
    torch.save({"kind": "dq-vae", "weights": Hostile()}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="not a checkpoint"):
        dq.load_checkpoint(tmp_path / "bad.pt", "dq-vae")
    assert not (tmp_path / "pwned").exists()
