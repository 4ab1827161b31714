"""Our DQ-VAE computes what the authors' does, given the same weights.

The small models in tests/tools/parity/ are compared in every checkout; its README says what the files are. If
DQ_PARITY_DIR names a folder with dual.pt and triple.pt, larger instances are compared too (random weights of the
authors' model, and what it computes).

    small models    test_small_models_give_the_authors_numbers, test_the_recipe_makes_the_same_numbers_everywhere
    large models    test_large_models_give_the_authors_numbers, test_region_entropy_is_the_authors
"""
import json
import math
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import import_authors
from dq import DQVAE, EntropyRouter

SMALL = Path(__file__).with_name("parity")
LARGE = os.environ.get("DQ_PARITY_DIR")
needs_large = pytest.mark.skipif(not LARGE, reason="DQ_PARITY_DIR names no folder")


def uniform(rng, *shape):
    """float32 in [-1, 1)"""
    return rng.random(shape, dtype=np.float32) * 2 - 1


def weights_by_recipe(shapes):
    """{the authors' name of a weight: shape} -> their state dict. Each name seeds the generator of its weight."""
    weights = {}
    for name, shape in shapes.items():
        u = uniform(np.random.default_rng(zlib.crc32(name.encode())), *shape) if shape else np.float32(0)
        if name.endswith("cluster_size_ema"):
            u = np.ones_like(u)
        elif name.endswith("embed_ema") or name.startswith("quantize.codebook.weight"):
            pass
        elif len(shape) > 1:
            u = u * np.float32(math.sqrt(3 / math.prod(shape[1:])))          # keeps the variance of what it multiplies
        else:
            u = np.float32(0.2) * u + np.float32(name.endswith("weight"))    # gains of norms are near 1, biases near 0
        weights[name] = torch.from_numpy(np.asarray(u))
    return weights


def images_by_recipe():
    """-> (4, 3, 32, 32): blocks of 8 x 8 pixels in plain colours, the left half of each image with noise."""
    rng = np.random.default_rng(7)
    noise, blocks = uniform(rng, 4, 3, 32, 32), uniform(rng, 4, 3, 4, 4).repeat(8, axis=2).repeat(8, axis=3)
    left = np.float32(0.2) * noise + np.float32(0.8) * blocks
    return torch.from_numpy(np.where(np.arange(32) < 16, left, blocks))


@torch.no_grad()
def computed(config, weights, x):
    """What our model makes of the images, under the names of the authors' numbers."""
    model = DQVAE(config).eval()
    model.load_state_dict(weights)
    maps = model.encoder(x)
    out, gate = model(x), model.router(x, maps)
    # theirs is (codebook + beta commitment) with beta 0.25; ours, with its EMA codebook, is the latter
    return dict(gate_logits=model.router.logits(maps), features=model.pre_quant(model.mix(maps, gate)),
                grains=out.grains, codes=out.codes, quant_loss=out.commitment * 5, reconstruction=out.reconstruction,
                decoded=model.decode(out.codes))


def compare(ours, theirs):
    assert torch.equal(ours["grains"], theirs["grains"]) and torch.equal(ours["codes"], theirs["codes"])
    for name, wanted in (("gate_logits", "gate_logits"), ("features", "features"),
                         ("reconstruction", "reconstruction"), ("decoded", "reconstruction")):
        torch.testing.assert_close(ours[name][:len(theirs[wanted])], theirs[wanted], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours["quant_loss"], theirs["quant_loss"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name, factors", [("dual", (8, 4)), ("triple", (16, 8, 4))])
def test_small_models_give_the_authors_numbers(name, factors):
    with np.load(SMALL / f"{name}.npz") as file:
        theirs = {key: torch.from_numpy(file[key]) for key in file}
    for key in ("grains", "codes"):                                          # stored as bytes
        theirs[key] = theirs[key].long()
    state_dict = weights_by_recipe(json.loads((SMALL / f"{name}.json").read_text()))
    config = import_authors.authors_config(state_dict)
    assert (config.size, config.factors, config.router) == (32, factors, "learned")
    assert (config.codebook_size, config.code_dim, config.channels) == (64, 16, 32)
    assert len(theirs["codes"].unique()) > 10 and len(theirs["grains"].unique()) > 1
    compare(computed(config, import_authors.authors_weights(state_dict, config), images_by_recipe()), theirs)


def test_the_recipe_makes_the_same_numbers_everywhere():
    """If numpy's generators ever change, this fails, and not the comparison."""
    x = images_by_recipe()
    bias = weights_by_recipe({"encoder.conv_in.bias": [32]})["encoder.conv_in.bias"]
    assert [zlib.crc32(each.numpy().tobytes()) for each in (x, bias)] == [2842872885, 3479391532]


@needs_large
@pytest.mark.parametrize("name, factors", [("dual", (16, 8)), ("triple", (32, 16, 8))])
def test_large_models_give_the_authors_numbers(name, factors):
    data = torch.load(Path(LARGE) / f"{name}.pt", weights_only=True)
    config, weights = import_authors.read_authors(Path(LARGE) / f"{name}.pt")
    assert (config.size, config.factors, config.router) == (64, factors, "learned")
    assert (config.codebook_size, config.code_dim) == (128, 64)
    theirs = {key: data[key] if key in ("grains", "codes") else data[key].float()
              for key in ("gate_logits", "grains", "codes", "quant_loss", "reconstruction")}
    compare(computed(config, weights, data["x"].float()), dict(features=data["pre_quant"].float(), **theirs))


@needs_large
def test_region_entropy_is_the_authors():
    data = torch.load(Path(LARGE) / "dual.pt", weights_only=True)
    ours = EntropyRouter((0.5, 0.5), 16).score(data["x"].float())
    torch.testing.assert_close(ours, data["entropy_patch16"].float(), atol=1e-4, rtol=1e-4)
