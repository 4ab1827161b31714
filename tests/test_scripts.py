"""The three scripts, end to end, and what they say to wrong input."""
import importlib
import json

import pytest
import torch
from PIL import Image

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


def test_each_trainer_says_first_what_it_understood(vae_run, images, tmp_path, monkeypatch, capsys):
    flags = ["--data", str(images), "--out", str(tmp_path), "--steps", "1"]
    for module, more in ((train_vae, VAE), (train_transformer, [*TRANSFORMER, "--vae", str(vae_run / "vae.pt")])):
        told = []
        monkeypatch.setattr(module, "describe", lambda *data: told.append([len(each) for each in data]))
        module.main([*flags, *more])
        assert len(told) == 1 and sum(told[0]) == 48 and 0 < told[0][1] < 10


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


def test_the_toy_data_needs_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(train_vae.main, *VAE, "--steps", 2, "--router", "entropy") is None
    figures = json.loads((tmp_path / "out/vae.jsonl").read_text().splitlines()[-1])
    assert 0 <= figures["auc"] <= 1 and abs(figures["share"][1] - 0.5) < 0.1


def test_three_granularities_without_classes_and_with_loader_processes(images, tmp_path):
    common = ["--data", images, "--out", tmp_path, "--steps", 2, "--workers", 1]
    for module, *flags in ((train_vae, *common, *VAE, "--factors", 8, 4, 2),
                           (train_transformer, *common, *TRANSFORMER, "--uncond"),
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
    assert rates == {train_vae.learning_rate(20, train_vae.parse(["--steps", "21"])[2])}


def test_a_batch_in_parts_is_the_batch(vae_run, images, tmp_path):
    """Stage 2, where an image's loss depends on no other image: the same weights, up to rounding."""
    ends = []
    for n in ("1", "2"):
        train_transformer.main(["--data", str(images), "--out", str(tmp_path / n), "--vae", str(vae_run / "vae.pt"),
                                "--steps", "3", "--dtype", "fp32", "--label-dropout", "0", *TRANSFORMER,
                                "--accumulate", n])
        ends.append(dq.load_checkpoint(tmp_path / n / "transformer.pt", "dq-transformer")["weights"])
    for name in ends[0]:
        torch.testing.assert_close(ends[0][name], ends[1][name], atol=1e-4, rtol=1e-3)


def test_resuming_on_the_codes_of_another_dq_vae_is_refused(images, tmp_path):
    flags = ["--data", str(images), "--out", str(tmp_path), "--steps", "1"]
    train_vae.main([*flags, *VAE])
    train_transformer.main([*flags, *TRANSFORMER])
    train_vae.main([*flags, *VAE, "--seed", "1"])
    with pytest.raises(dq.UserError, match="another DQ-VAE"):
        train_transformer.main([*flags, *TRANSFORMER, "--resume"])


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
    ("train_vae.py", ["--import-authors", "file"], "not a checkpoint"),
    ("train_vae.py", ["--seed", -1], "--seed"),
    ("train_transformer.py", ["--vae", "VAE", "--width", 33], "width"),
    ("train_vae.py", ["--resume"], "no such file"),
    ("train_vae.py", ["--out", "file/x"], "file"),
    ("train_transformer.py", ["--vae", "nowhere.pt"], "no such file"),
    ("train_transformer.py", ["--vae", "file"], "not a checkpoint"),
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
    for word, fixture, file in (("VAE", "vae_run", "vae.pt"), ("MODEL", "run", "transformer.pt")):
        if word in args:                                                     # a fault in stage 2 is none of stage 1's
            args = [request.getfixturevalue(fixture) / file if a == word else a for a in args]
    args = [str(a) for a in args]
    with pytest.raises(SystemExit) as end:                                   # anything else would be a traceback
        sample.run(lambda: importlib.import_module(name[:-3]).main(args))
    if end.value.code == 2:                                                  # argparse has printed its line
        assert says in capsys.readouterr().err.splitlines()[-1]
    else:
        assert end.value.code.startswith("error: ") and says in end.value.code and "\n" not in end.value.code


def test_an_error_reaches_the_shell():
    done = script("sample.py", "nowhere.pt")
    assert done.returncode == 1 and done.stderr == "error: no such file: nowhere.pt (train_transformer.py writes it)\n"
