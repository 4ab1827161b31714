"""Our DQ-VAE computes what the authors' does, given their weights.

Runs where DQ_PARITY_DIR names a folder with dual.pt and triple.pt (small instances of the
authors' model with random weights, and what it computes); skipped elsewhere.
"""
import os
from pathlib import Path

import pytest
import torch

from dq import DQVAE, EntropyRouter, VAEConfig

FOLDER = os.environ.get("DQ_PARITY_DIR")
pytestmark = pytest.mark.skipif(not FOLDER, reason="DQ_PARITY_DIR names no folder")


def rename(theirs, K):
    """Their state dict -> ours."""
    granularities = {2: ["coarse", "fine"], 3: ["coarse", "median", "fine"]}[K]
    ours = {}

    def copy(to, source):
        for end in ("weight", "bias"):
            if f"{source}.{end}" in theirs:
                ours[f"{to}.{end}"] = theirs[f"{source}.{end}"]

    def res(to, source):
        for name in ("norm1", "conv1", "norm2", "conv2"):
            copy(f"{to}.{name}", f"{source}.{name}")
        copy(f"{to}.shortcut", f"{source}.nin_shortcut")

    def attn(to, source):
        copy(f"{to}.norm", f"{source}.norm")
        copy(f"{to}.proj", f"{source}.proj_out")
        for end in ("weight", "bias"):
            ours[f"{to}.qkv.{end}"] = torch.cat([theirs[f"{source}.{x}.{end}"] for x in "qkv"])

    def has(prefix):
        return any(name.startswith(prefix + ".") for name in theirs)

    def level(to, source):
        i = j = 0
        while has(f"{source}.block.{i}"):
            res(f"{to}.{j}", f"{source}.block.{i}")
            if has(f"{source}.attn.{i}"):
                attn(f"{to}.{j + 1}", f"{source}.attn.{i}")
                j += 1
            i, j = i + 1, j + 1

    def mid(to, source):
        res(f"{to}.0", f"{source}.block_1")
        attn(f"{to}.1", f"{source}.attn_1")
        res(f"{to}.2", f"{source}.block_2")

    copy("encoder.stem", "encoder.conv_in")
    i = 0
    while has(f"encoder.down.{i}"):
        level(f"encoder.levels.{i}", f"encoder.down.{i}")
        copy(f"encoder.downs.{i}", f"encoder.down.{i}.downsample.conv")
        i += 1
    for k, name in enumerate(granularities):
        mid(f"encoder.heads.{k}", f"encoder.mid_{name}")
        copy(f"encoder.heads.{k}.3", f"encoder.norm_out_{name}")
        copy(f"encoder.heads.{k}.5", f"encoder.conv_out_{name}")
        copy(f"router.norms.{k}", f"encoder.router.feature_norm_{name}")
    copy("router.mlp.0", "encoder.router.gate.0")
    copy("router.mlp.2", "encoder.router.gate.2")
    copy("decoder.stem", "decoder.conv_in")
    mid("decoder.mid", "decoder.mid")
    top = max(int(name.split(".")[2]) for name in theirs if name.startswith("decoder.up."))
    for i in range(top, -1, -1):
        level(f"decoder.levels.{top - i}", f"decoder.up.{i}")
        copy(f"decoder.ups.{top - i}", f"decoder.up.{i}.upsample.conv")
    copy("decoder.out.0", "decoder.norm_out")
    copy("decoder.out.2", "decoder.conv_out")
    copy("decoder.position.fourier", "decoder.position_bias_fourier.lff.ffm.conv")
    ours["decoder.position.rows"] = theirs["decoder.position_bias_learned.row_embed.weight"]
    ours["decoder.position.columns"] = theirs["decoder.position_bias_learned.col_embed.weight"]
    copy("pre_quant", "quant_conv")
    copy("post_quant", "post_quant_conv")
    ours["codebook.codes"] = theirs["quantize.codebook.weight"][:-1]         # the last row is padding
    ours["codebook.uses"] = theirs["quantize.codebook.cluster_size_ema"]
    ours["codebook.sums"] = theirs["quantize.codebook.embed_ema"]
    return ours


@pytest.mark.parametrize("name, factors", [("dual", (16, 8)), ("triple", (32, 16, 8))])
def test_the_authors_weights_give_the_authors_numbers(name, factors):
    data = torch.load(Path(FOLDER) / f"{name}.pt", weights_only=True)
    K = len(factors)
    config = VAEConfig(size=64, factors=factors, ratios=(1 / K,) * K, codebook_size=128, code_dim=64, channels=64,
                       width=32, multipliers=(1, 1, 2, 2, 4), encoder_blocks=2, decoder_blocks=3, attention_from=8)
    model = DQVAE(config).eval()
    model.load_state_dict(rename({k: v.float() for k, v in data["state_dict"].items()}, K))
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
