"""The three scripts, end to end, and what they say to wrong input."""
import ast
import importlib
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image

import common
import dq
import sample
import train_transformer
import train_vae
from conftest import DEVICE, ROOT, TRANSFORMER, VAE, call, script


@pytest.mark.parametrize("stage, fixture, figures", [
    ("vae", "vae_run", {"psnr", "ssim", "l1", "share", "fine_min", "fine_mean", "fine_max", "bits_per_pixel",
                        "codebook_used", "perplexity"}),
    ("transformer", "run", {"nats_per_image", "bits_per_code", "bits_per_pixel"})])
def test_training_writes_logs_pictures_and_checkpoints(stage, fixture, figures, request):
    folder = request.getfixturevalue(fixture)
    log = [json.loads(line) for line in (folder / f"{stage}.jsonl").read_text().splitlines()]
    assert figures <= set(log[-1]) and log[-1]["step"] == 6
    assert Image.open(folder / f"{stage}.png").width > 100
    assert dq.load_checkpoint(folder / f"{stage}.pt", f"dq-{stage}")["step"] == 6


def test_a_transformer_knows_its_classes(run):
    checkpoint = dq.load_checkpoint(run / "transformer.pt", "dq-transformer")
    assert checkpoint["config"]["classes"] == ("circle", "cross", "square", "triangle")


def test_each_trainer_says_first_what_it_understood(images, tmp_path, capsys):
    flags = ["--out", str(tmp_path), "--steps", "1"]
    train_vae.main([*flags, *VAE, "--data", str(images)])
    train, held_out = train_vae.open_data(images, 16)
    first = capsys.readouterr().out.splitlines()[0]
    assert first == train_vae.describe(train, held_out) and len(train) + len(held_out) == 48
    train_transformer.main([*flags, *TRANSFORMER])
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith(f"codes: {tmp_path / 'codes.pt'}, {len(train)} images (checksum ")
    assert f"{2 * len(train)} to train on, with their mirror images, {len(held_out)} held out; 4 classes; " in first


def test_sampling_with_every_option(run, images, tmp_path):
    photo = next(images.rglob("*.png"))
    Image.linear_gradient("L").save(tmp_path / "map.png")
    for extra in (["--label", "cross", "--temperature", 0.9, "--top-k", 5, "--top-p", 0.9, "--cfg", 2,
                   "--gif", tmp_path / "x.gif"],
                  ["--label", "3", "--grain-map", tmp_path / "map.png"],
                  ["--input", photo, "--keep", 1],
                  ["--dtype", "fp32"]):
        assert call(sample.main, run / "transformer.pt", "--n", 5, "--batch-size", 3, "--device", DEVICE,
                    "--out", tmp_path / "grid.png", "--save-dir", tmp_path / "all", *extra) is None
        assert sorted(p.name for p in (tmp_path / "all").glob("*.png")) == [f"{i:06d}.png" for i in range(5)]
        assert Image.open(tmp_path / "all/000004.png").size == (16, 16)
    assert Image.open(tmp_path / "grid.png").width > 200
    assert Image.open(tmp_path / "x.gif").n_frames > 4


def test_the_weights_that_come_along_draw_pictures(tmp_path):
    weights = ROOT / "assets/emoji64.pt"
    assert weights.stat().st_size < 16e6
    assert call(sample.main, weights, "--n", 2, "--label", "people_body", "--device", DEVICE, "--out", tmp_path) is None
    picture = Image.open(tmp_path / "samples.png").convert("L")
    low, high = picture.crop((0, 14, 128, 142)).getextrema()                 # the first sample: dark hair, white around
    assert low < 90 and high > 240


def test_the_toy_data_needs_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(train_vae.main, *VAE, "--steps", 2, "--router", "entropy") is None
    figures = json.loads((tmp_path / "out/vae.jsonl").read_text().splitlines()[-1])
    assert 0 <= figures["auc"] <= 1 and abs(figures["share"][1] - 0.5) < 0.1


def test_three_granularities_without_classes_and_with_loader_processes(images, tmp_path):
    both = ["--out", tmp_path, "--steps", 2]
    for module, *flags in ((train_vae, *both, *VAE, "--data", images, "--workers", 1, "--factors", 8, 4, 2),
                           (train_transformer, *both, *TRANSFORMER, "--uncond"),
                           (sample, tmp_path / "transformer.pt", "--n", 3, "--device", DEVICE)):
        assert call(module.main, *flags) is None
    checkpoint = dq.load_checkpoint(tmp_path / "transformer.pt", "dq-transformer")
    assert checkpoint["config"]["factors"] == (8, 4, 2) and checkpoint["config"]["classes"] == ()
    assert checkpoint["vae_config"]["ratios"] == pytest.approx((1 / 3,) * 3)


def test_terms_of_weight_zero_cost_nothing(images, tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError
    monkeypatch.setattr(train_vae, "Discriminator", never)
    monkeypatch.setattr(train_vae, "Perceptual", never)
    monkeypatch.setattr(train_vae, "adaptive_weight", never)
    train_vae.main(["--data", str(images), "--out", str(tmp_path), "--steps", "1", *VAE])
    assert "critic" not in dq.load_checkpoint(tmp_path / "vae.pt", "dq-vae")


def test_the_discriminator_stays_out_until_its_step(images, tmp_path):
    train_vae.main(["--data", str(images), "--out", str(tmp_path), "--steps", "21", *VAE, "--size", "24",
                    "--gan-weight", "1", "--gan-start", "15"])
    log = [json.loads(line) for line in (tmp_path / "vae.jsonl").read_text().splitlines()]
    assert [("gan" in line, "critic" in line) for line in log[:2]] == [(False, False), (True, True)]
    checkpoint = dq.load_checkpoint(tmp_path / "vae.pt", "dq-vae")
    assert {int(state["step"]) for state in checkpoint["critic_optimizer"]["state"].values()} == {6}
    assert {int(state["step"]) for state in checkpoint["optimizer"]["state"].values()} == {21}
    rates = {checkpoint[name]["param_groups"][0]["lr"] for name in ("optimizer", "critic_optimizer")}
    assert rates == {train_vae.parse(["--steps", "21"])[2].learning_rate(20)}


def test_a_batch_in_parts_is_the_batch(vae_run, tmp_path):
    """Stage 2, where an image's loss depends on no other image: the same weights, up to rounding."""
    ends = []
    for n in ("1", "2"):
        train_transformer.main(["--out", str(tmp_path / n), "--codes", str(vae_run / "codes.pt"), "--steps", "3",
                                "--dtype", "fp32", "--label-dropout", "0", *TRANSFORMER, "--accumulate", n])
        ends.append(dq.load_checkpoint(tmp_path / n / "transformer.pt", "dq-transformer")["weights"])
    for name in ends[0]:
        torch.testing.assert_close(ends[0][name], ends[1][name], atol=1e-4, rtol=1e-3)


def test_resuming_on_the_codes_of_another_dq_vae_is_refused(images, tmp_path):
    flags = ["--out", str(tmp_path), "--steps", "1"]
    train_vae.main([*flags, *VAE, "--data", str(images)])
    train_transformer.main([*flags, *TRANSFORMER])
    train_vae.main([*flags, *VAE, "--data", str(images), "--seed", "1"])
    with pytest.raises(dq.UserError, match="trained with --codes .* images .checksum .*, not .* leave --resume out"):
        train_transformer.main([*flags, *TRANSFORMER, "--resume"])


# ------------------------------------------------------------------------------------------------
# Five rooms


SCRIPTS = ["train_vae.py", "train_transformer.py", "sample.py"]
OURS = {path.stem for path in ROOT.glob("*.py")}


def test_scripts_import_dq_and_common_and_no_other_script():
    def imported(name):
        tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
        names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        assert "importlib" not in names and "__import__" not in ast.unparse(tree)
        return OURS.intersection(names)
    assert OURS == {"dq", "common", *(name[:-3] for name in SCRIPTS)}
    assert imported("dq.py") == set() and imported("common.py") == {"dq"}
    assert all(imported(name) == {"dq", "common"} for name in SCRIPTS)


@pytest.mark.parametrize("broken", SCRIPTS)
def test_a_syntax_error_in_one_script_leaves_the_others_running(broken, run, tmp_path):
    for name in OURS:
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    (tmp_path / broken).write_text("def (:")
    flags = {"train_vae.py": ["--encode", run / "vae.pt", "--data", "images", "--out", "x", "--device", DEVICE],
             "train_transformer.py": ["--codes", run / "codes.pt", "--out", "y", "--steps", 1, *TRANSFORMER],
             "sample.py": [run / "transformer.pt", "--n", 1, "--out", "z", "--device", DEVICE]}
    (tmp_path / "images").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "images/0.png")
    for name in SCRIPTS:
        command = [sys.executable, name, *map(str, flags[name])]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode == 0) == (name != broken), done.stderr


# ------------------------------------------------------------------------------------------------
# codes.pt


def test_codes_hold_all_that_stage_2_needs(vae_run, images):
    """The codes of every image, as it is and mirrored, by the weights that training ended with."""
    stored, vae = dq.load_checkpoint(vae_run / "codes.pt", "dq-codes"), dq.load_vae(vae_run / "vae.pt", DEVICE)
    assert dq.VAEConfig(**stored["config"]) == vae.config and stored["preset"] == "toy" and stored["version"] == 1
    assert stored["classes"] == ("circle", "cross", "square", "triangle")
    for name, x in vae.state_dict().items():
        assert torch.equal(stored["weights"][name], x.cpu())
    for part, data in zip(("train", "held_out"), train_vae.open_data(images, 16)):
        x, label = zip(*map(data.read, range(len(data))))
        x, found = torch.stack(x), stored[part]
        assert found["label"].tolist() == list(label) and {each.dtype for each in found.values()} == {torch.uint8}
        with torch.no_grad(), common.pick_device(DEVICE, "auto")[1]():
            wanted = [vae.encode(view.to(DEVICE)) for view in ((x, x.flip(3)) if part == "train" else (x,))]
        assert found["codes"].shape[:2] == (len(data), len(wanted))
        for v, (codes, grains) in enumerate(wanted):
            assert torch.equal(found["codes"][:, v], codes.cpu()) and torch.equal(found["grains"][:, v], grains.cpu())


@pytest.mark.parametrize("low, high, kind", [(0, 255, torch.uint8), (-1, 127, torch.int8), (-1, 128, torch.int16),
                                             (0, 256, torch.int16), (0, 2 ** 15, torch.int32)])
def test_the_smallest_integers(low, high, kind):
    x = train_vae.smallest(torch.tensor([[low], [high]]))
    assert x.dtype == kind and x.tolist() == [[low], [high]]


def test_codes_in_another_folder_need_no_image(vae_run, tmp_path, monkeypatch):
    """What a course hands out: one file, from which stage 2 and sampling run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    shutil.copy(vae_run / "codes.pt", "out")
    for module, name in ((common, "open_image"), (train_vae, "open_data"), (train_vae, "ToyShapes")):
        monkeypatch.setattr(module, name, None)
    before = (tmp_path / "out/codes.pt").read_bytes()
    assert call(train_transformer.main, *TRANSFORMER, "--steps", 2) is None
    assert call(sample.main, "--n", 2, "--device", DEVICE) is None
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "codes.pt", "transformer.pt", "transformer.best.pt", "transformer.jsonl", "transformer.png", "samples.png"}
    assert (tmp_path / "out/codes.pt").read_bytes() == before


def test_the_preset_comes_with_the_codes(vae_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train_transformer.parse([])[0].preset == "toy"                    # there are none
    (tmp_path / "out").mkdir()
    codes = torch.load(vae_run / "codes.pt", weights_only=True)
    for preset, found in (("emoji64", "emoji64"), ("of a later version", "toy")):
        torch.save(codes | dict(preset=preset), "out/codes.pt")
        os.replace("out/codes.pt", "elsewhere.pt")
        args, config, schedule = train_transformer.parse(["--codes", "elsewhere.pt", "--heads", "4"])
        assert args.preset == found and (config, schedule) == train_transformer.PRESETS[found] and args.heads == 4
    torch.save(codes | dict(preset="emoji64"), "out/codes.pt")
    assert train_transformer.parse([])[0].width == 160
    args = train_transformer.parse(["--preset", "toy", "--steps", "3"])[0]   # what is asked for counts
    assert (args.preset, args.width, args.steps) == ("toy", 192, 3)


@pytest.mark.parametrize("how", ["cut", "a bit flipped", "empty", "of another version", "a list"])
def test_codes_that_are_none_end_in_a_line_that_helps(how, vae_run, tmp_path):
    path = tmp_path / "codes.pt"
    data = bytearray((vae_run / "codes.pt").read_bytes())
    if how == "a bit flipped":
        data[len(data) // 2] ^= 1
    path.write_bytes(dict(cut=data[:-1000], empty=b"").get(how, data))
    if how == "of another version":
        torch.save(torch.load(path, weights_only=True) | dict(version=2), path)
    elif how == "a list":
        torch.save([1], path)
    line = call(train_transformer.main, "--out", tmp_path, *TRANSFORMER, "--steps", 1)
    assert line.startswith("error: ") and "\n" not in line
    assert [each.name for each in tmp_path.iterdir()] == ["codes.pt"]
    assert f"python train_vae.py --encode {tmp_path / 'vae.pt'} --out {tmp_path}" in line


def test_encoding_anew_keeps_former_codes(vae_run, images, tmp_path):
    """--encode takes any DQ-VAE, here the best one, and any folder."""
    for n in (1, 2):
        flags = ["--encode", vae_run / "vae.best.pt", "--data", images / "cross", "--out", tmp_path, "--device", DEVICE]
        assert call(train_vae.main, *flags, "--batch-size", 7) is None       # of no importance here
        codes = dq.load_checkpoint(tmp_path / "codes.pt", "dq-codes")
        assert codes["classes"] == () and codes["preset"] == "toy" and len(list(tmp_path.glob("former-*"))) == n - 1
        assert codes["train"]["label"].dtype == torch.int8 and set(codes["train"]["label"].tolist()) == {-1}
    assert (tmp_path / "former-1/codes.pt").exists()
    assert call(train_vae.main, *VAE, "--data", images, "--out", tmp_path, "--steps", 1) is None  # no vae.pt was there
    assert dq.load_checkpoint(tmp_path / "former-2/codes.pt", "dq-codes")["name"] == codes["name"]


# ------------------------------------------------------------------------------------------------
# Wrong input


@pytest.mark.parametrize("name, args, says", [
    ("train_vae.py", ["--data", "nowhere"], "no such folder"),
    ("train_vae.py", ["--data", "empty"], "no images"),
    ("train_vae.py", ["--size", 20], "not a multiple"),
    ("train_vae.py", ["--factors", 8, 4, "--ratios", 0.5], "need 2 ratios"),
    ("train_vae.py", ["--ratios", 0.5, 0.6], "sum to 1"),
    ("train_vae.py", ["--steps", 0], "--steps: must be at least 1, not 0"),
    ("train_vae.py", ["--lr", 0], "--lr"),
    ("train_vae.py", ["--lr", "nan"], "--lr"),
    ("train_vae.py", ["--clip", "much"], "--clip: invalid float value"),
    ("train_vae.py", ["--seed", 2 ** 64], "--seed"),
    ("train_transformer.py", ["--dropout", 1], "--dropout: must be at least 0 and below 1"),
    ("train_vae.py", ["--device", "cuda:99"], "no such device"),
    ("train_vae.py", ["--preset", "huge"], "invalid choice"),
    ("train_vae.py", ["--gan-weight", -1], "--gan-weight"),
    ("train_vae.py", ["--gan-weight", 1, "--size", 16], "at least 24"),
    ("train_vae.py", ["--perceptual-weight", 1, "--perceptual-weights", "file"], "--perceptual-weight 0"),
    ("train_vae.py", ["--batch-size", 6, "--accumulate", 4], "--accumulate"),
    ("train_vae.py", ["--encode", "file"], "not a checkpoint"),
    ("train_vae.py", ["--encode", "nowhere.pt"], "no such file"),
    ("train_vae.py", ["--encode", "VAE", "--data", "empty"], "no images"),
    ("train_vae.py", ["--seed", -1], "--seed"),
    ("train_transformer.py", ["--codes", "CODES", "--width", 33], "width"),
    ("train_vae.py", ["--resume"], "no such file"),
    ("train_vae.py", ["--out", "file/x"], "file"),
    ("train_transformer.py", [], "no such file: out/codes.pt (train_vae.py writes it); to make it from a DQ-VAE: "
                                 "python train_vae.py --encode out/vae.pt --out out"),
    ("train_transformer.py", ["--codes", "nowhere.pt"], "no such file"),
    ("train_transformer.py", ["--codes", "file"], "not a checkpoint"),
    ("train_transformer.py", ["--codes", "VAE"], "a dq-codes is needed"),
    ("sample.py", ["nowhere.pt"], "no such file"),
    ("sample.py", ["file"], "not a checkpoint"),
    ("sample.py", ["VAE"], "a dq-transformer is needed"),
    ("sample.py", ["MODEL", "--label", "dog"], "no class"),
    ("sample.py", ["MODEL", "--label", 4], "no class"),
    ("sample.py", ["MODEL", "--n", 0], "--n"),
    ("sample.py", ["MODEL", "--keep", 1], "--keep needs --input"),
    ("sample.py", ["MODEL", "--out", "x.psd"], "no picture in colour"),
    ("sample.py", ["MODEL", "--temperature", -1], "temperature"),
    ("sample.py", ["MODEL", "--top-p", 0], "top-p"),
    ("sample.py", ["MODEL", "--input", "file"], "file"),
])
def test_wrong_input_ends_in_one_line(name, args, says, request, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("no checkpoint, no image")
    for word, fixture, file in (("VAE", "vae_run", "vae.pt"), ("CODES", "vae_run", "codes.pt"),
                                ("MODEL", "run", "transformer.pt")):
        if word in args:                                                     # a fault in stage 2 is none of stage 1's
            args = [request.getfixturevalue(fixture) / file if a == word else a for a in args]
    args = [str(a) for a in args]
    with pytest.raises(SystemExit) as end:                                   # anything else would be a traceback
        common.run(lambda: importlib.import_module(name[:-3]).main(args))
    if end.value.code == 2:                                                  # argparse has printed its line
        assert says in capsys.readouterr().err.splitlines()[-1]
    else:
        assert end.value.code.startswith("error: ") and says in end.value.code and "\n" not in end.value.code


def test_an_error_reaches_the_shell():
    done = script("sample.py", "nowhere.pt")
    assert done.returncode == 1 and done.stderr == "error: no such file: nowhere.pt (train_transformer.py writes it)\n"
