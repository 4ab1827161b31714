"""Converts the authors' stage-1 checkpoint.    python tests/tools/import_authors.py FILE [--data DIR] [--out DIR]

Infers the configuration from the names and shapes of the weights, writes OUT/vae.pt and prints the configuration. With
--data it also evaluates the model on the held-out images of that folder, and draws them in OUT/vae.png. For stage 2:
python train_vae.py --encode OUT/vae.pt --data DIR --out OUT
"""
import argparse
import math
import os
import re
import sys
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data as reading  # noqa: E402
import dq  # noqa: E402
import train_vae  # noqa: E402
from common import pick_device, run  # noqa: E402


# These substitutions, one after the other, turn our names into the authors'. <k> stands for their name of granularity
# k. `their_name` first does what a table can't: it numbers levels as they do, and separates blocks from attention.
AUTHORS_NAMES = (
    (r"^(en|de)coder\.stem", r"\1coder.conv_in"),
    (r"^encoder\.levels", "encoder.down"),
    (r"^encoder\.downs\.(\d)", r"encoder.down.\1.downsample.conv"),
    (r"^encoder\.heads\.(\d)\.3", r"encoder.norm_out_<\1>"),
    (r"^encoder\.heads\.(\d)\.5", r"encoder.conv_out_<\1>"),
    (r"^encoder\.heads\.(\d)", r"encoder.mid_<\1>"),
    (r"^router\.norms\.(\d)", r"encoder.router.feature_norm_<\1>"),
    (r"^router\.mlp", "encoder.router.gate"),
    (r"^pre_quant", "quant_conv"),
    (r"^codebook\.codes", "quantize.codebook.weight"),
    (r"^codebook\.uses", "quantize.codebook.cluster_size_ema"),
    (r"^codebook\.sums", "quantize.codebook.embed_ema"),
    (r"^post_quant", "post_quant_conv"),
    (r"^decoder\.position\.fourier", "decoder.position_bias_fourier.lff.ffm.conv"),
    (r"^decoder\.position\.rows", "decoder.position_bias_learned.row_embed.weight"),
    (r"^decoder\.position\.columns", "decoder.position_bias_learned.col_embed.weight"),
    (r"^decoder\.levels", "decoder.up"),
    (r"^decoder\.ups\.(\d)", r"decoder.up.\1.upsample.conv"),
    (r"^decoder\.out\.0", "decoder.norm_out"),
    (r"^decoder\.out\.2", "decoder.conv_out"),
    (r"\.(mid[^.]*)\.0", r".\1.block_1"),
    (r"\.(mid[^.]*)\.1", r".\1.attn_1"),
    (r"\.(mid[^.]*)\.2", r".\1.block_2"),
    (r"\.shortcut", ".nin_shortcut"),
    (r"\.proj", ".proj_out"),
)


def their_name(name, config):
    """Our name of a weight -> the authors' name. Their q, k and v are one weight here, whose name contains "qkv"."""
    def turn(match):                                                         # theirs count from the finest level
        return f"{match[1]}.{int(math.log2(config.factors[-1])) - int(match[2])}"

    def part(match):                                                         # ours alternate in one list; theirs: two
        level, i = int(match[2]), int(match[3])
        kinds = ("block", "attn") if 2 ** level >= config.attention_from else ("block",)
        return f"{match[1]}.{level}.{kinds[i % len(kinds)]}.{i // len(kinds)}"

    name = re.sub(r"^(decoder\.levels|decoder\.ups)\.(\d)", turn, name)
    name = re.sub(r"^(encoder\.levels|decoder\.levels)\.(\d)\.(\d+)", part, name)
    for ours, theirs in AUTHORS_NAMES:
        name = re.sub(ours, theirs, name)
    granularities = ("coarse", "fine") if len(config.factors) == 2 else ("coarse", "median", "fine")
    return re.sub(r"<(\d)>", lambda match: granularities[int(match[1])], name)


def authors_config(theirs):
    """The configuration that names and shapes imply, with the budgets of the released models."""
    def count(pattern):
        return sum(bool(re.fullmatch(pattern, name)) for name in theirs)

    width, levels = len(theirs["encoder.conv_in.weight"]), count(r"encoder\.down\.\d\.block\.0\.conv1\.weight")
    K = 3 if "encoder.conv_out_median.weight" in theirs else 2
    factors = [2 ** (levels - 1 - k) for k in range(K)]
    attention = [2 ** i for i in range(levels) if f"encoder.down.{i}.attn.0.norm.weight" in theirs]
    return dq.VAEConfig(
        size=len(theirs["decoder.position_bias_learned.row_embed.weight"]) * factors[-1],
        factors=factors,
        ratios=(0.5, 0.5) if K == 2 else (0.4, 0.3, 0.3),
        router="learned" if "encoder.router.gate.0.weight" in theirs else "entropy",
        codebook_size=len(theirs["quantize.codebook.weight"]) - 1,
        code_dim=len(theirs["quant_conv.weight"]),
        channels=len(theirs["encoder.conv_out_fine.weight"]),
        width=width,
        multipliers=[len(theirs[f"encoder.down.{i}.block.0.conv1.weight"]) // width for i in range(levels)],
        encoder_blocks=count(r"encoder\.down\.0\.block\.\d+\.conv1\.weight"),
        decoder_blocks=count(r"decoder\.up\.0\.block\.\d+\.conv1\.weight"),
        attention_from=min(attention, default=2 ** levels))


def authors_weights(theirs, config):
    """Their state dict -> ours. KeyError with the name of a missing weight."""
    ours, used = {}, set()
    with torch.device("meta"):
        names = list(dq.DQVAE(config).state_dict())
    for name in names:
        if name == "codebook.age":
            ours[name] = torch.tensor(1e6)                                   # many
        elif name == "router.thresholds":
            dq.require(len(config.factors) == 2, "the authors' entropy router has two granularities, not three")
            ours[name] = torch.tensor([1.6778])                              # nats; the median of ImageNet's regions
        else:
            source = their_name(name, config)
            sources = [source.replace("qkv", each) for each in "qkv"] if "qkv" in source else [source]
            ours[name] = torch.cat([theirs[each] for each in sources])
            used.update(sources)
    ours["codebook.codes"] = ours["codebook.codes"][:-1]                     # their last row is padding
    layers = [name for name in theirs if ".block." in name or ".attn." in name]
    dq.require(used.issuperset(layers), "their model has blocks or attention where ours, inferred from it, has none")
    return ours


def read_authors(path):
    """A checkpoint of the authors' stage-1 model -> VAEConfig, our state dict."""
    dq.require(os.path.isfile(path), f"no such file: {path}")

    class Inert:
        """Replaces any class that a trainer left in the file."""
        def __init__(self, *args, **kwargs):
            pass

        def __setstate__(self, state):
            pass

    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(Inert, name) for name in unknown]):
            theirs = torch.load(path, map_location="cpu", weights_only=True)  # runs no code of the file's
        theirs = theirs.get("state_dict", theirs)
        theirs = {name: tensor.float() for name, tensor in theirs.items() if torch.is_tensor(tensor)}
        config = authors_config(theirs)
        return config, authors_weights(theirs, config)
    except dq.UserError:
        raise
    except KeyError as error:
        raise dq.UserError(f"{path} is not a checkpoint of the authors' stage-1 model: "
                           f"it has no {error.args[0]}") from None
    except Exception as error:
        raise dq.UserError(f"{path} is not a checkpoint, or is damaged ({type(error).__name__})") from None


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("file", metavar="FILE", type=Path, help="the authors' checkpoint")
    add("--data", metavar="DIR", help="folder of images to evaluate it on; default: none")
    add("--out", metavar="DIR", type=Path, default=Path("out"), help="folder for vae.pt (default: out)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--dtype", choices=["auto", "bf16", "fp32"], default="auto", help="auto: bf16 where the hardware has it")
    args = parser.parse_args(argv)
    device, autocast, _ = pick_device(args.device, args.dtype)
    config, weights = read_authors(args.file)
    model = dq.rebuild(dq.DQVAE, dq.VAEConfig, asdict(config), weights, device)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{args.file}: {config.size} x {config.size} pixels, factors {config.factors}, {config.router} "
          f"router, {config.codebook_size} codes of {config.code_dim} dimensions, {millions:.1f} M parameters")
    path = args.out / "vae.pt"
    dq.require(not path.exists(), f"{path} exists; choose another folder with --out")
    args.out.mkdir(parents=True, exist_ok=True)
    preset = "imagenet256" if len(config.factors) == 2 else "imagenet256-triple"  # for stage 2, on its codes
    dq.save_checkpoint(path, "dq-vae", config, model, preset=preset)
    print(f"wrote {path}")
    if args.data:
        _, held_out = reading.open_data(args.data, config.size, skip=args.out)
        images, detailed = train_vae.validation_images(held_out, config)
        metrics, y, grains = train_vae.evaluate(model, images, detailed, autocast, batch_size=8)
        told = ", ".join(f"{name} {x:.3f}" if isinstance(x, float) else f"{name} {x}" for name, x in metrics.items())
        print(f"{len(images)} held-out images: {told}")
        train_vae.show(path.with_suffix(".png"), images, y, grains, config.factors)
        print(f"wrote {path.with_suffix('.png')}")


if __name__ == "__main__":
    run(main)
