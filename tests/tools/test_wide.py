"""tools/wide.py, which samples images that are wider than the model's.

windows, given_left_half, draw, main -> the tests in this order
"""
import pytest
import torch
from PIL import Image

import dq
import wide
from conftest import call


def test_windows_overlap_by_half():
    grains = torch.arange(4 * 10).view(4, 10)
    parts = wide.windows(grains, 2)
    assert len(parts) == 4 and all(part.shape == (4, 4) for part in parts)
    assert all(torch.equal(a[:, 2:], b[:, :2]) for a, b in zip(parts, parts[1:]))
    assert torch.equal(parts[-1], grains[:, -4:])


def test_what_is_given_is_the_tiling_and_the_left_half():
    layout = dq.Layout(32, (8, 4))
    grains = torch.randint(2, (1, 4, 4))
    codes = torch.arange(64).view(1, 8, 8)
    pos, code = wide.given_left_half(layout, codes, grains)
    all_pos, all_code = layout.pack(codes, grains)
    assert torch.equal(pos, all_pos)
    column = layout.coordinates[pos][..., 1]                                 # of a code's centre, on the finest grid
    left = (column < 4) & (all_code >= 0)
    assert torch.equal(code[left], all_code[left]) and (code[~left] == -1).all() and 0 < left.sum() < left.numel()


@pytest.fixture
def models():
    config = dq.VAEConfig(size=32, codebook_size=16)
    t = dq.TransformerConfig(size=32, factors=(8, 4), codebook_size=16, classes=("a", "b"), width=32, heads=2,
                             position_layers=1, content_layers=1)
    return dq.DQTransformer(t).eval(), dq.DQVAE(config).eval()


def test_each_window_keeps_what_is_written(models, monkeypatch):
    """The left half of a window has the codes of the previous window's right half, and the image has its pixels."""
    model, vae = models
    seen, decode = [], vae.decode
    monkeypatch.setattr(vae, "decode", lambda codes: (seen.append(codes), decode(codes))[1])
    grains = torch.randint(2, (4, 10), generator=torch.Generator().manual_seed(1))
    image = wide.draw(model, vae, grains, 1, dq.SampleOptions(), 0)
    assert image.shape == (3, 32, 80) and len(seen) == 4
    for before, after in zip(seen, seen[1:]):
        assert torch.equal(before[:, :, 4:], after[:, :, :4])
    with torch.no_grad():
        assert torch.equal(image[:, :, :16], decode(seen[0])[0, :, :, :16])
        assert torch.equal(image[:, :, -16:], decode(seen[-1])[0, :, :, 16:])
        old, new = decode(seen[0])[0, :, :, 16:], decode(seen[1])[0, :, :, :16]
    torch.testing.assert_close(image[:, :, 16], old[:, :, 0])                # no seam where a window begins ...
    torch.testing.assert_close(image[:, :, 31], new[:, :, 15])               # ... or where its fade ends


def test_the_command(models, tmp_path, capsys):
    model, vae = models
    extra = dict(vae_config=vars(vae.config), vae_weights=vae.state_dict())
    dq.save_checkpoint(tmp_path / "t.pt", "dq-transformer", model.config, model, **extra)
    Image.linear_gradient("L").resize((90, 32)).save(tmp_path / "map.png")   # 11.25 regions: 12
    command = [tmp_path / "t.pt", tmp_path / "map.png", tmp_path / "out.png"]
    assert call(wide.main, *command, "--label", "b") is None
    assert Image.open(tmp_path / "out.png").size == (96, 32) and "in 5 windows" in capsys.readouterr().out
    assert "no class 'c'" in call(wide.main, *command, "--label", "c")
