"""The preset that stage 1 chooses for a folder of images, and the one that stage 2 chooses for its codes.

    choose, image_side, outline, parse    test_a_folder_chooses_its_preset and the next ten tests
    views, recipe, write_codes            the three tests under "codes.pt"
    fit                                   test_stage_2_fits_its_codes and the next four tests
    Record.steps                          test_the_time_is_estimated_once
"""
import argparse
import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import VAE, call
from PIL import Image

import common
import data as reading
import dq
import train_transformer
import train_vae


def folder(root, counts, size):
    """Write images of this size, of which only the header matters. counts: {class or "": number of images}"""
    for name, n in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        picture = Image.new("RGB", size)
        for i in range(n):
            picture.save(root / name / f"{i}.bmp")
    return root


def parsed(root, monkeypatch, *flags, gpu=False, images=None):
    """-> name, config and schedule of the preset that train_vae.py takes for a folder, and the line that it prints.
    gpu: pretend that there is one. images: pretend that the folder has this number of images"""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    if images:
        real = reading.find_images
        monkeypatch.setattr(train_vae, "find_images", lambda *args: (
            found := real(*args))._replace(files=found.files[:1] * images))
    args, config, schedule = train_vae.parse(["--data", str(root), *flags])
    return args.preset, config, schedule, args.plan


@pytest.mark.parametrize("counts, size, on_cpu, on_gpu", [
    ({"": 60}, (640, 480), "folder64", "folder64-large"),                    # photographs
    ({"": 12}, (300, 300), "folder64", "folder64-large"),
    ({"icons": 40}, (30, 30), "folder32", "folder32"),
    ({"": 5}, (4000, 500), "folder64", "folder64-large"),                    # panoramas: the short side counts
    ({"": 3}, (500, 63), "folder32", "folder32"),
    ({"": 3}, (64, 64), "folder64", "folder64-large")])
def test_a_folder_chooses_its_preset(counts, size, on_cpu, on_gpu, tmp_path, monkeypatch):
    root = folder(tmp_path, counts, size)
    for gpu, expected in ((False, on_cpu), (True, on_gpu)):
        name, config, schedule, line = parsed(root, monkeypatch, gpu=gpu)
        assert name == expected and (config, schedule) == train_vae.PRESETS[name]
        assert config.size in (32, 64, 128, 256) and config.size <= max(32, min(size))
        assert line.startswith(f"preset {name}, for images of {min(size)} pixels on a {'GPU' if gpu else 'CPU'}")
        assert f"{config.size} x {config.size} pixels" in line and f"{schedule.steps} steps" in line
        assert ("enlarged" in line) == (min(size) < 32) and "\n" not in line


@pytest.mark.parametrize("images, size, on_cpu, on_gpu", [
    (3391, 256, "folder64", "folder128"), (4513, 64, "folder64", "folder64-large"),  # emoji, satellite tiles
    (5200, 256, "folder64", "folder128"),                                    # one class of 5,000, ten of 20
    (9999, 300, "folder64", "folder128"), (10_000, 256, "folder64", "folder256"),
    (70_000, 1024, "folder64", "folder256"), (999, 128, "folder64", "folder64-large"),
    (1000, 128, "folder64", "folder128"), (10 ** 6, 31, "folder32", "folder32")])
def test_the_choice_for_a_gpu_depends_on_the_number_of_images(images, size, on_cpu, on_gpu, tmp_path, monkeypatch):
    root = folder(tmp_path, {"": 1}, (size, size))
    for gpu, expected in ((False, on_cpu), (True, on_gpu)):
        name, config, _, _ = parsed(root, monkeypatch, gpu=gpu, images=images)
        monkeypatch.undo()
        assert name == expected and config.size <= max(32, size)


def test_neither_classes_nor_a_few_odd_sizes_change_the_choice(tmp_path, monkeypatch):
    root = folder(tmp_path, {"many": 50} | {f"few{i}": 2 for i in range(10)}, (64, 80))
    folder(root, {"odd": 4}, (20, 20))
    assert parsed(root, monkeypatch)[0] == "folder64"
    (root / "many" / "0.bmp").write_bytes(b"no image")                       # other code reports it
    assert parsed(root, monkeypatch)[0] == "folder64"


def test_flags_take_precedence_over_the_choice(tmp_path, monkeypatch):
    root = folder(tmp_path, {"": 3}, (640, 480))
    name, config, schedule, line = parsed(root, monkeypatch, "--preset", "toy", "--steps", "7")
    assert (name, config.size, schedule.steps) == ("toy", 32, 7)
    assert line == "preset toy: 32 x 32 pixels, about 40 codes per image, 7 steps"
    for gpu, size, expected in ((False, 128, "folder64"), (False, 48, "folder32"), (True, 48, "folder32"),
                                (True, 64, "folder64-large"), (True, 128, "folder128"), (True, 256, "folder256")):
        name, config, _, line = parsed(root, monkeypatch, "--size", str(size), gpu=gpu)
        assert (name, config.size) == (expected, size) and f"{size} x {size} pixels" in line
    assert parsed(root, monkeypatch, "--device", "cpu", gpu=True)[0] == "folder64"
    with pytest.raises(SystemExit):                                          # argparse prints the message
        train_vae.parse(["--data", str(root), "--size", "large"])
    with pytest.raises(dq.UserError, match="no such folder"):
        train_vae.parse(["--data", str(root / "missing")])


def test_without_a_folder_the_preset_is_toy(monkeypatch):
    for gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        args, config, schedule = train_vae.parse([])
        assert args.preset == "toy" and (config, schedule) == train_vae.PRESETS["toy"]


def test_flags_that_are_not_given_take_the_values_of_the_preset():
    """A value of 0 is given."""
    for name, preset in train_vae.PRESETS.items():
        args, *found = train_vae.parse(["--preset", name])
        assert tuple(found) == preset and args.save_every == preset[1].eval_every
    args, config, schedule = train_vae.parse(["--preset", "emoji128", "--gan-weight", "0", "--eval-every", "7"])
    assert (schedule.gan_weight, schedule.gan_start, args.save_every) == (0.0, 2000, 250)
    assert train_transformer.parse(["--preset", "emoji64", "--dropout", "0"])[1].dropout == 0.0


def test_the_line_suggests_what_gives_more(tmp_path, monkeypatch):
    root = folder(tmp_path / "large", {"": 2}, (640, 600))
    assert "for more: --size 128 " in parsed(root, monkeypatch)[3]
    assert "for more: --size 256 " in parsed(root, monkeypatch, "--size", "128")[3]
    assert "for more: --steps 20 " in parsed(root, monkeypatch, "--size", "256", "--steps", "10")[3]  # the largest size
    root = folder(tmp_path / "small", {"": 2}, (100, 100))                   # smaller than 128 pixels
    assert "for more: --steps 20 " in parsed(root, monkeypatch, "--steps", "10")[3]


def test_the_line_names_the_codes_per_image_of_the_budget():
    for name, (config, _) in train_vae.PRESETS.items():
        layout = dq.Layout(config.size, config.factors)
        codes = layout.n_regions * sum(r * s for r, s in zip(config.ratios, layout.cells))
        assert f" about {codes:.0f} codes per image" in train_vae.outline(name, *train_vae.PRESETS[name])


def test_images_without_a_header_get_the_smallest_preset(tmp_path, monkeypatch):
    (tmp_path / "broken.png").write_bytes(b"none")
    assert parsed(tmp_path, monkeypatch)[0] == "folder32"


def test_the_side_is_the_median_of_the_short_sides(tmp_path):
    for i, size in enumerate([(10, 90), (80, 20), (30, 30), (44, 40), (50, 51)]):
        Image.new("L", size).save(tmp_path / f"{i}.png")
    assert reading.image_side(reading.find_images(tmp_path)) == 30


def test_a_resumed_run_keeps_its_preset(tmp_path, monkeypatch):
    """The device and the folder would choose another one."""
    flags = ["--data", folder(tmp_path / "images", {"": 3}, (20, 20)), "--out", tmp_path / "out", *VAE]
    assert call(train_vae.main, *flags, "--preset", "folder64", "--steps", 1) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args, config, _ = train_vae.parse([*map(str, flags), "--resume"])
    assert args.preset == "folder64" and config.attention_from == 8
    args = train_vae.parse([*map(str, flags), "--resume", "--out", str(tmp_path / "new")])[0]
    assert args.preset == "folder32"                                         # nothing to resume


# ------------------------------------------------------------------------------------------------
# codes.pt


def test_crops_are_the_corners_enlarged():
    x = torch.linspace(-1, 1, 16).expand(2, 3, 16, 16)                       # brighter to the right
    whole, *corners = train_vae.views(x, cropped=True, mirrored=False)
    assert torch.equal(whole, x) and len(corners) == 4 and all(c.shape == x.shape for c in corners)
    for corner, expected in zip(corners, [x[..., :14], x[..., 2:]] * 2):     # top left, top right, then bottom
        assert corner.mean().item() == pytest.approx(expected.mean().item(), abs=0.01)
        assert corner.abs().max() <= 1
    top, bottom = (train_vae.views(x.transpose(2, 3), cropped=True, mirrored=False)[i].mean() for i in (1, 3))
    assert top < bottom


@pytest.mark.parametrize("n, n_views", [(4, 10), (6, 2)])
def test_few_images_are_cropped(n, n_views, tmp_path, monkeypatch, capsys):
    """This holds for fewer than FEW training images. Validation images are never cropped."""
    monkeypatch.setattr(train_vae, "FEW", 5)
    root = folder(tmp_path / "a", {"": n}, (20, 20))
    other = folder(tmp_path / "b", {"": 2}, (20, 20))
    flags = ["--data", root, "--held-out", other, "--steps", 1, *VAE]
    assert call(train_vae.main, *flags, "--out", tmp_path / "out") is None
    codes = torch.load(tmp_path / "out" / "codes.pt", weights_only=True)
    assert codes["train"]["codes"].shape[:2] == (n, n_views) and codes["held_out"]["codes"].shape[:2] == (2, 1)
    assert (f"note: with only {n} images" in capsys.readouterr().out) == (n < 5)


def test_codes_that_differ_from_those_of_the_preset_are_custom():
    for name, (config, _) in train_vae.PRESETS.items():
        assert train_vae.recipe(name, config) == name
    toy = train_vae.PRESETS["toy"][0]
    for changes in (dict(size=64), dict(factors=(8, 2)), dict(ratios=(0.3, 0.7))):
        assert train_vae.recipe("toy", replace(toy, **changes)) == "custom"
    assert train_vae.recipe("toy", replace(toy, codebook_size=99)) == "toy"
    assert train_vae.recipe("of a later version", toy) == train_vae.recipe("custom", toy) == "custom"


# ------------------------------------------------------------------------------------------------
# Stage 2


def stored(path, preset, size, factors, fine, images):
    """Write the entries of codes.pt on which the choice depends. fine: the fraction of regions with the finest codes"""
    config = dict(size=size, factors=factors, ratios=(1 - fine, fine))
    torch.save(dict(preset=preset, config=config, train=dict(label=torch.zeros(images))), path)
    return ["--codes", str(path)]


SMALL, MEDIUM, LARGE = ("folder64", 192), ("folder64-large", 256), ("folder256", 512)


@pytest.mark.parametrize("size, factors, images, on_cpu, on_gpu, batch", [
    (64, (16, 8), 3391, SMALL, MEDIUM, 32), (32, (8, 4), 12, SMALL, MEDIUM, 32),
    (256, (16, 8), 3391, SMALL, MEDIUM, 8), (256, (16, 8), 10_000, SMALL, LARGE, 8),
    (128, (16, 8), 40_000, SMALL, LARGE, 8), (128, (16, 8), 20_000, SMALL, MEDIUM, 8)])
def test_stage_2_fits_its_codes(size, factors, images, on_cpu, on_gpu, batch, tmp_path, monkeypatch):
    """It does so under every name of a preset that is not the name of a recipe."""
    for preset in ("custom", "folder32", "folder256", "of a later version"):
        flags = stored(tmp_path / "codes.pt", preset, size, factors, 0.5, images)
        for gpu, expected in ((False, on_cpu), (True, on_gpu)):
            monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
            args, config, schedule = train_transformer.parse(flags)
            assert (args.preset, config.width, schedule.batch_size) == (*expected, 64 if gpu else batch)
            assert config.dropout == (0.3 if images < 500 else train_transformer.PRESETS[args.preset][0].dropout)
    flags = stored(tmp_path / "codes.pt", "earth64", size, factors, 0.5, images)
    assert train_transformer.parse(flags)[1:] == train_transformer.PRESETS["earth64"]


def test_stage_2_counts_codes_not_regions(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for fine, batch in ((0.0, 32), (0.5, 8)):                                # 64 and 160 codes per image
        flags = stored(tmp_path / "codes.pt", "custom", 64, (8, 4), fine, 2000)
        assert train_transformer.parse(flags)[2].batch_size == batch


def test_a_preset_by_name_is_that_preset(tmp_path):
    """Neither the number of images nor that of codes changes it."""
    flags = stored(tmp_path / "codes.pt", "custom", 256, (16, 8), 0.5, 12)
    for name, preset in train_transformer.PRESETS.items():
        args, config, schedule = train_transformer.parse([*flags, "--preset", name])
        assert args.preset == name and (config, schedule) == preset
    assert train_transformer.parse([*flags, "--dropout", "0", "--steps", "5"])[1].dropout == 0


def test_the_presets_for_folders_differ_in_size():
    parameters = []
    for name in ("folder64", "folder64-large", "folder256"):
        with torch.device("meta"):
            model = dq.DQTransformer(train_transformer.PRESETS[name][0])
        parameters.append(sum(p.numel() for p in model.parameters()))
    assert parameters == sorted(parameters) and parameters[2] > 3 * parameters[1] > 3 * parameters[0]


# ------------------------------------------------------------------------------------------------
# Device and time


def test_the_device_of_the_flag_chooses_the_preset(tmp_path, monkeypatch):
    """Of both stages. A GPU that there is counts, unless the flag names the CPU."""
    codes = stored(tmp_path / "codes.pt", "custom", 64, (16, 8), 0.5, 3000)
    images = ["--data", str(folder(tmp_path / "images", {"": 2}, (64, 64)))]
    for there, device in itertools.product((False, True), ("auto", "cpu", "cuda:1")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
        chosen = [main.parse([*flags, "--device", device])[0].preset
                  for main, flags in ((train_vae, images), (train_transformer, codes))]
        assert chosen == 2 * ["folder64-large" if there and device != "cpu" else "folder64"]


def test_the_time_is_estimated_once(tmp_path, monkeypatch):
    """The estimate follows the first twenty steps of a process, and leaves out the first one, which takes longer."""
    lines, seconds = [], SimpleNamespace(value=0.0)
    monkeypatch.setattr(common.time, "monotonic", lambda: seconds.value)
    monkeypatch.setattr(common.tqdm, "write", lines.append)
    for start in (0, 100):
        record = common.Record(argparse.Namespace(save_every=1000), tmp_path / "vae.pt", dq.VAEConfig(),
                               dict(steps=220, eval_every=1000), torch.nn.Linear(1, 1), {}, {}, step=start)
        seconds.value = 50.0
        for step in record.steps("test", SimpleNamespace(asked=lambda: 0), lambda step: ({}, math.inf)):
            seconds.value += 6 if step > start else 500                      # seconds per step
            record.add(step + 1, dict(loss=torch.tensor(1.0)))
    lines = [line for line in lines if "min" in line]                        # without the metrics of the last step
    assert lines == ["step 20: about 20 min for the other 200 steps", "step 120: about 10 min for the other 100 steps"]
