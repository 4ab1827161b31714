"""Our DQ-VAE computes what the authors' does, given their weights.

Runs where DQ_PARITY_DIR names a folder with dual.pt and triple.pt (small instances of the
authors' model with random weights, and what it computes); skipped elsewhere.
"""
import os
from pathlib import Path

import pytest
import torch

import import_authors
from dq import DQVAE, EntropyRouter

FOLDER = os.environ.get("DQ_PARITY_DIR")
pytestmark = pytest.mark.skipif(not FOLDER, reason="DQ_PARITY_DIR names no folder")


@pytest.mark.parametrize("name, factors", [("dual", (16, 8)), ("triple", (32, 16, 8))])
def test_the_authors_weights_give_the_authors_numbers(name, factors):
    data = torch.load(Path(FOLDER) / f"{name}.pt", weights_only=True)
    config, weights = import_authors.read_authors(Path(FOLDER) / f"{name}.pt")
    assert (config.size, config.factors, config.router) == (64, factors, "learned")
    assert (config.codebook_size, config.code_dim) == (128, 64)
    model = DQVAE(config).eval()
    model.load_state_dict(weights)
    x = data["x"].float()
    with torch.no_grad():
        maps = model.encoder(x)
        logits = model.router.logits(maps)
        gate = model.router(x, maps)
        features = model.pre_quant(model.mix(maps, gate))
        out = model(x)
        decoded = model.decode(out.codes)
    torch.testing.assert_close(logits, data["gate_logits"].float(), atol=1e-4, rtol=1e-4)
    assert torch.equal(out.grains, data["grains"])
    torch.testing.assert_close(features, data["pre_quant"].float(), atol=1e-4, rtol=1e-4)
    assert torch.equal(out.codes, data["codes"])
    for reconstruction in (out.reconstruction, decoded):
        torch.testing.assert_close(reconstruction, data["reconstruction"].float(), atol=1e-4, rtol=1e-4)
    # theirs is (codebook + beta commitment) with beta 0.25; ours, with its EMA codebook, is the latter
    torch.testing.assert_close(out.commitment * 5, data["quant_loss"].float(), atol=1e-5, rtol=1e-4)


def test_region_entropy_is_the_authors():
    data = torch.load(Path(FOLDER) / "dual.pt", weights_only=True)
    ours = EntropyRouter((0.5, 0.5), 16).score(data["x"].float())
    torch.testing.assert_close(ours, data["entropy_patch16"].float(), atol=1e-4, rtol=1e-4)
