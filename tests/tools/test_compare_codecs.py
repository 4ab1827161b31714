"""The tool that compares files of codec.py with other formats.

psnr, files, at, curve_of, main -> the tests in this order
"""
import json

import pytest
import torch
from PIL import Image

import common
import compare_codecs
import dq
from conftest import call
from test_transformer import tiny


def noise(side=32, seed=0):
    x = torch.rand(3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return common.to_picture(x, 0)


def test_psnr_of_pictures():
    black, grey = (Image.new("RGB", (4, 4), (level, level, level)) for level in (0, 51))
    assert compare_codecs.psnr(black, grey) == pytest.approx(20 * 0.69897, abs=1e-3)  # 20 log10(255 / 51)
    assert compare_codecs.psnr(grey, grey) > 70


@pytest.mark.parametrize("name", compare_codecs.FORMATS)
def test_a_format_with_and_without_its_header(name, monkeypatch):
    monkeypatch.setitem(compare_codecs.QUALITIES, name, (20, 80))
    picture, flat = noise(), Image.new("RGB", (32, 32), (128, 128, 128))
    low, high = compare_codecs.files(picture, name)
    assert low.size < high.size and low.bare < high.bare and low.dB < high.dB
    for file in (low, high):
        assert 0 < file.bare < file.size and file.picture.size == picture.size
        assert 5 < file.dB < 40 and file.dB == compare_codecs.psnr(picture, file.picture)
    assert [file.bare for file in compare_codecs.files(flat, name)] == [0, 0]


def test_curves_are_read_between_their_points():
    curve = [(100, 20.0), (200, 30.0), (400, 31.0)]
    assert [compare_codecs.at(curve, size) for size in (100, 150, 300, 400)] == [20, 25, 30.5, 31]
    assert compare_codecs.at(curve, 99) is None and compare_codecs.at(curve, 401) is None


def test_a_curve_is_the_mean_of_the_pictures():
    a, b = ([compare_codecs.File(size + 10, size, dB, None) for size, dB in pairs]
            for pairs in ([(300, 30), (100, 20)], [(500, 32), (200, 24)]))
    assert compare_codecs.curve_of([a, b], counted=False) == [(150, 22), (400, 31)]
    assert compare_codecs.curve_of([a, b], counted=True) == [(160, 22), (410, 31)]


def test_the_command(tmp_path, capsys, monkeypatch):
    """Two pictures at two values of detail; what is measured stays, and a second run measures the third picture."""
    for name in compare_codecs.FORMATS:
        monkeypatch.setitem(compare_codecs.QUALITIES, name, (10, 60))
    monkeypatch.setitem(compare_codecs.OPTIONS, "AVIF", {"speed": 10})
    vae = dq.DQVAE(dq.VAEConfig(size=32, codebook_size=16)).eval()
    model = tiny(size=32, factors=(8, 4), V=16, layers=1, classes=("a", "b"))
    extra = dict(vae_config=vars(vae.config), vae_weights=vae.state_dict())
    dq.save_checkpoint(tmp_path / "model.pt", "dq-transformer", model.config, model, **extra)
    for i in range(3):
        (tmp_path / "images" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        noise(seed=i).save(tmp_path / "images" / "ab"[i % 2] / f"{i}.png")
    command = [tmp_path / "images", tmp_path / "out", "--model", tmp_path / "model.pt", "--details", -1, 0]
    assert call(compare_codecs.main, *command, "--n", 2) is None
    log = (tmp_path / "out" / "files.jsonl").read_text()
    assert call(compare_codecs.main, *command, "--n", 3) is None
    lines = (tmp_path / "out" / "files.jsonl").read_text()
    entries = [json.loads(line) for line in lines.splitlines()]
    assert lines.startswith(log) and len(log.splitlines()) == 4 and len(entries) == 6
    for entry in entries:
        assert entry["same"] and entry["shown"] in "ab" and 16 <= entry["codes"] <= 64
        assert 0 <= entry["bytes"] - entry["header"] <= entry["bits"] / 8 + 1
    out = capsys.readouterr().out
    assert "6 files, of which 0 returned other codes" in out and "| -1 | " in out and "| 0 | " in out
    assert Image.open(tmp_path / "out" / "codec.png").width == 1000
    assert "holds 3 images, not 4" in call(compare_codecs.main, *command, "--n", 4)
