"""tools/import_authors.py on files written here, in the form of the authors' checkpoints."""
import pickle

import pytest
import torch
import torch.nn.functional as F

import common
import data as reading
import dq
import import_authors
import train_vae


def authors_checkpoint(K=2, learned=True, width=32, z=32, d=16, V=24, multipliers=(1, 2, 2, 1), blocks=2):
    """Random weights under the authors' names: `blocks` a level in the encoder, one more in the decoder.

    Downsampling 8 (levels 0 to 3); attention at factor 4 and above; images of 32 x 32.
    """
    sd = {}

    def put(name, *shape):
        sd[f"{name}.weight"], sd[f"{name}.bias"] = torch.randn(*shape) * 0.1, torch.randn(shape[0]) * 0.1

    def res(name, a, b):
        put(f"{name}.norm1", a), put(f"{name}.conv1", b, a, 3, 3)
        put(f"{name}.norm2", b), put(f"{name}.conv2", b, b, 3, 3)
        if a != b:
            put(f"{name}.nin_shortcut", b, a, 1, 1)

    def attn(name, c):
        put(f"{name}.norm", c)
        for part in ("q", "k", "v", "proj_out"):
            put(f"{name}.{part}", c, c, 1, 1)

    def mid(name, c):
        res(f"{name}.block_1", c, c), attn(f"{name}.attn_1", c), res(f"{name}.block_2", c, c)

    put("encoder.conv_in", width, 3, 3, 3)
    c = width
    for i, m in enumerate(multipliers):
        for j in range(blocks):
            res(f"encoder.down.{i}.block.{j}", c, width * m)
            c = width * m
            if 2 ** i >= 4:
                attn(f"encoder.down.{i}.attn.{j}", c)
        if i < 3:
            put(f"encoder.down.{i}.downsample.conv", c, c, 3, 3)
    names = ("coarse", "fine") if K == 2 else ("coarse", "median", "fine")
    for k, name in enumerate(names):
        c = width * multipliers[3 - k]
        mid(f"encoder.mid_{name}", c), put(f"encoder.norm_out_{name}", c), put(f"encoder.conv_out_{name}", z, c, 3, 3)
        if learned:
            put(f"encoder.router.feature_norm_{name}", z)
    if learned:
        put("encoder.router.gate.0", K * z, K * z), put("encoder.router.gate.2", K, K * z)
    top = 4 - K                                                              # log2 of the finest factor
    c = width * multipliers[top]
    put("decoder.conv_in", c, z, 3, 3), mid("decoder.mid", c)
    for i in range(top, -1, -1):
        for j in range(blocks + 1):
            res(f"decoder.up.{i}.block.{j}", c, width * multipliers[i])
            c = width * multipliers[i]
            if 2 ** i >= 4:
                attn(f"decoder.up.{i}.attn.{j}", c)
        if i:
            put(f"decoder.up.{i}.upsample.conv", c, c, 3, 3)
    put("decoder.norm_out", c), put("decoder.conv_out", 3, c, 3, 3)
    put("decoder.position_bias_fourier.lff.ffm.conv", z, 2, 1, 1)
    sd["decoder.position_bias_learned.row_embed.weight"] = torch.rand(32 >> top, z)
    sd["decoder.position_bias_learned.col_embed.weight"] = torch.rand(32 >> top, z)
    put("quant_conv", d, z, 1, 1), put("post_quant_conv", z, d, 1, 1)
    sd["quantize.codebook.weight"] = torch.randn(V + 1, d)
    sd["quantize.codebook.cluster_size_ema"], sd["quantize.codebook.embed_ema"] = torch.rand(V), torch.randn(V, d)
    put("loss.discriminator.main.0", 64, 3, 4, 4)                            # of use in training only
    return sd


class Leftover:
    """What a trainer leaves in its checkpoints."""


@pytest.mark.parametrize("K, learned", [(2, True), (3, True), (2, False)])
def test_configuration_is_inferred_and_every_weight_arrives(K, learned, tmp_path):
    sd = authors_checkpoint(K, learned)
    torch.save({"epoch": 7, "callbacks": {"checkpoint": Leftover()}, "state_dict": sd}, tmp_path / "theirs.ckpt")
    config, ours = import_authors.read_authors(tmp_path / "theirs.ckpt")
    assert config == dq.VAEConfig(
        size=32, factors=(8, 4, 2)[:K], ratios=(0.5, 0.5) if K == 2 else (0.4, 0.3, 0.3),
        router="learned" if learned else "entropy", codebook_size=24, code_dim=16, channels=32, width=32,
        multipliers=(1, 2, 2, 1), encoder_blocks=2, decoder_blocks=3, attention_from=4)
    model = dq.DQVAE(config)
    model.load_state_dict(ours)                                              # strict: no name is missing or left over
    weights = [name for name in sd if not name.startswith(("loss.", "quantize."))]
    assert sum(sd[name].numel() for name in weights) == sum(p.numel() for p in model.parameters())
    assert torch.equal(model.codebook.codes, sd["quantize.codebook.weight"][:24])
    if not learned:
        assert model.router.thresholds.tolist() == pytest.approx([1.6778])


def test_the_parts_land_where_they_belong(tmp_path):
    sd = authors_checkpoint()
    torch.save(sd, tmp_path / "bare.pt")                                     # a bare state dict does as well
    config, ours = import_authors.read_authors(tmp_path / "bare.pt")
    model = dq.DQVAE(config).eval()
    model.load_state_dict(ours)
    x = torch.randn(1, 32, 4, 4)

    def conv(name, z, **kwargs):
        return F.conv2d(z, sd[f"{name}.weight"], sd[f"{name}.bias"], **kwargs)

    def norm(name, z):
        return F.group_norm(z, 32, sd[f"{name}.weight"], sd[f"{name}.bias"], eps=1e-6)

    name = "encoder.mid_coarse.attn_1"                                       # attention, from the definition
    q, k, v = (conv(f"{name}.{part}", norm(f"{name}.norm", x)).flatten(2)[0] for part in "qkv")  # each 32, 16
    weights = (q.T @ k / 32 ** 0.5).softmax(-1)
    expected = x + conv(f"{name}.proj_out", (v @ weights.T).view(1, 32, 4, 4))
    torch.testing.assert_close(model.encoder.heads[0][1](x), expected)
    name = "decoder.up.0.block.2"                                            # the last block before the picture
    h = conv(f"{name}.conv1", F.silu(norm(f"{name}.norm1", x)), padding=1)
    expected = x + conv(f"{name}.conv2", F.silu(norm(f"{name}.norm2", h)), padding=1)
    torch.testing.assert_close(model.decoder.levels[-1][2](x), expected)
    gates = [sd[f"encoder.router.gate.{i}.{end}"] for i in (0, 2) for end in ("weight", "bias")]
    maps = [torch.randn(1, 32, 4, 4), torch.randn(1, 32, 8, 8)]
    pooled = [F.avg_pool2d(norm(f"encoder.router.feature_norm_{n}", m), s)
              for n, m, s in zip(("coarse", "fine"), maps, (1, 2))]
    z = F.linear(F.silu(F.linear(torch.cat(pooled, 1)[0, :, 1, 2], *gates[:2])), *gates[2:])
    torch.testing.assert_close(model.router.logits(maps)[0, :, 1, 2], z)


def authors_model(sd, x, K):
    """The authors' stage 1 by torch's functions and their names: a VQGAN with a head for each granularity.

    x: (B, 3, S, S) -> gate logits (B, K, h, w), grains (B, h, w), codes (B, H, W), commitment, picture.
    """
    names = ("coarse", "fine") if K == 2 else ("coarse", "median", "fine")

    def conv(name, z, stride=1):
        weight = sd[f"{name}.weight"]
        return F.conv2d(z, weight, sd[f"{name}.bias"], stride, padding=weight.shape[-1] // 2 if stride == 1 else 0)

    def norm(name, z):
        return F.group_norm(z, 32, sd[f"{name}.weight"], sd[f"{name}.bias"], eps=1e-6)

    def res(name, z):
        h = conv(f"{name}.conv1", F.silu(norm(f"{name}.norm1", z)))
        h = conv(f"{name}.conv2", F.silu(norm(f"{name}.norm2", h)))
        return h + (conv(f"{name}.nin_shortcut", z) if f"{name}.nin_shortcut.weight" in sd else z)

    def attn(name, z):
        q, k, v = (conv(f"{name}.{part}", norm(f"{name}.norm", z)).flatten(2) for part in "qkv")  # B, c, H W
        weights = (torch.einsum("bci,bcj->bij", q, k) / q.shape[1] ** 0.5).softmax(-1)
        return z + conv(f"{name}.proj_out", torch.einsum("bij,bcj->bci", weights, v).view_as(z))

    def mid(name, z):
        return res(f"{name}.block_2", attn(f"{name}.attn_1", res(f"{name}.block_1", z)))

    def level(name, z):
        j = 0
        while f"{name}.block.{j}.conv1.weight" in sd:
            z = res(f"{name}.block.{j}", z)
            z = attn(f"{name}.attn.{j}", z) if f"{name}.attn.{j}.q.weight" in sd else z
            j += 1
        return z

    h, maps = conv("encoder.conv_in", x), {}
    for i in range(4):
        h = level(f"encoder.down.{i}", h)
        if 3 - i < K:
            name = names[3 - i]
            out = F.silu(norm(f"encoder.norm_out_{name}", mid(f"encoder.mid_{name}", h)))
            maps[name] = conv(f"encoder.conv_out_{name}", out)
        if i < 3:                                                            # a row below and a column at the right
            h = conv(f"encoder.down.{i}.downsample.conv", F.pad(h, (0, 1, 0, 1)), stride=2)
    maps = [maps[name] for name in names]                                    # coarse to fine
    pooled = [F.avg_pool2d(norm(f"encoder.router.feature_norm_{name}", m), 2 ** k)
              for k, (name, m) in enumerate(zip(names, maps))]
    gates = [(sd[f"encoder.router.gate.{i}.weight"], sd[f"encoder.router.gate.{i}.bias"]) for i in (0, 2)]
    z = torch.cat(pooled, 1).permute(0, 2, 3, 1)
    logits = F.linear(F.silu(F.linear(z, *gates[0])), *gates[1]).permute(0, 3, 1, 2)
    grains, n = logits.argmax(1), 2 ** (K - 1)
    chosen = grains.repeat_interleave(n, 1).repeat_interleave(n, 2)          # B, H, W
    mixed, weight = 0, 0
    for k, m in enumerate(maps):
        here, times = (chosen == k)[:, None], n // 2 ** k                    # a code fills times x times cells
        mixed = mixed + here * F.interpolate(m, scale_factor=times, mode="nearest")
        weight = weight + here[:, 0] / times ** 2
    z = conv("quant_conv", mixed).permute(0, 2, 3, 1)                        # B, H, W, D
    codes = (z[..., None, :] - sd["quantize.codebook.weight"][:-1]).square().sum(-1).argmin(-1)
    q = sd["quantize.codebook.weight"][codes]
    commitment = 0.25 * (weight * (z - q).square().mean(-1)).mean()

    H = q.shape[1]
    line = torch.arange(H) * 2 / (H - 1) - 1
    at = torch.stack([line.expand(H, H), line[:, None].expand(H, H)])[None]  # x, y
    embedded = [sd[f"decoder.position_bias_learned.{part}_embed.weight"] for part in ("row", "col")]
    h = conv("post_quant_conv", q.permute(0, 3, 1, 2))
    h = h + torch.sin(conv("decoder.position_bias_fourier.lff.ffm.conv", at))
    h = h + (embedded[0][:, None] + embedded[1][None]).permute(2, 0, 1)
    h = mid("decoder.mid", conv("decoder.conv_in", h))
    for i in range(4 - K, -1, -1):
        h = level(f"decoder.up.{i}", h)
        if i:
            h = conv(f"decoder.up.{i}.upsample.conv", h.repeat_interleave(2, 2).repeat_interleave(2, 3))
    return logits, grains, codes, commitment, conv("decoder.conv_out", F.silu(norm("decoder.norm_out", h)))


@pytest.mark.parametrize("K", [2, 3])
@torch.no_grad()
def test_the_authors_weights_give_the_authors_numbers(K, tmp_path):
    """From the picture to the gate, the codes, the loss and the picture. (test_parity.py: by the authors' own code.)"""
    torch.manual_seed(K)
    sd, x = authors_checkpoint(K), torch.rand(4, 3, 32, 32) * 2 - 1
    logits = authors_model(sd, x, K)[0]
    sd["encoder.router.gate.2.bias"] -= logits.mean(dim=(0, 2, 3))           # so that each granularity is chosen ...
    sd["encoder.router.gate.2.weight"] *= 10                                 # ... and by far
    sd["encoder.router.gate.2.bias"] *= 10
    sd["quant_conv.weight"] *= 10                                            # and of many codes
    torch.save(sd, tmp_path / "theirs.pt")
    config, ours = import_authors.read_authors(tmp_path / "theirs.pt")
    model = dq.DQVAE(config).eval()
    model.load_state_dict(ours)
    logits, grains, codes, commitment, picture = authors_model(sd, x, K)
    out = model(x)
    torch.testing.assert_close(model.router.logits(out.maps), logits, atol=1e-5, rtol=1e-4)
    assert torch.equal(out.grains, grains) and len(grains.unique()) == K
    assert torch.equal(out.codes, codes) and len(codes.unique()) > 4
    torch.testing.assert_close(out.commitment, commitment, atol=1e-6, rtol=1e-4)
    for drawn in (out.reconstruction, model.decode(codes)):
        torch.testing.assert_close(drawn, picture, atol=1e-5, rtol=1e-4)


def test_the_command_writes_a_checkpoint_that_the_other_scripts_take(tmp_path, capsys):
    torch.save({"state_dict": authors_checkpoint()}, tmp_path / "theirs.ckpt")
    for i in range(3):
        common.to_picture(reading.ToyShapes(32)[i][0]).save(tmp_path / f"{i}.png")
    flags = ["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--dtype", "fp32"]
    import_authors.main([str(tmp_path / "theirs.ckpt"), *flags])
    said = capsys.readouterr().out
    assert "32 x 32" in said and "(8, 4)" in said and "psnr" in said
    vae = dq.load_vae(tmp_path / "out/vae.pt", "cpu")
    assert vae.encode(torch.zeros(1, 3, 32, 32))[0].shape == (1, 8, 8)
    with pytest.raises(dq.UserError, match="exists; choose another folder"):
        import_authors.main([str(tmp_path / "theirs.ckpt"), *flags])
    train_vae.main(["--encode", str(tmp_path / "out/vae.pt"), *flags])
    codes = dq.load_checkpoint(tmp_path / "out/codes.pt", "dq-codes")
    assert codes["preset"] == "custom"                                       # 32 x 32, and imagenet256 is 256 x 256
    assert len(codes["train"]["label"]) + len(codes["held_out"]["label"]) == 3


class Bomb:
    def __reduce__(self):
        return open, ("boom", "w")


def test_files_that_are_no_checkpoints_are_refused_and_run_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sd = authors_checkpoint()
    torch.save({"state_dict": {k: v for k, v in sd.items() if k != "quant_conv.weight"}}, "incomplete")
    torch.save({"state_dict": sd, "callbacks": Bomb()}, "bomb")
    (tmp_path / "pickle").write_bytes(pickle.dumps(Bomb()))
    (tmp_path / "text").write_text("hello")
    torch.save([1, 2], "list")
    for name, says in (("incomplete", "has no quant_conv.weight"), ("pickle", "not a checkpoint"),
                       ("text", "not a checkpoint"), ("list", "not a checkpoint"), ("nowhere", "no such file")):
        with pytest.raises(dq.UserError, match=says):
            import_authors.read_authors(name)
    try:
        import_authors.read_authors("bomb")                                       # may load without the bomb, or refuse
    except dq.UserError:
        pass
    assert not (tmp_path / "boom").exists()
