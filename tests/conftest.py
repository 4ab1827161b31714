"""Fixtures and helpers of several test files: a device, a folder of images, runs of both stages, script calls."""
import contextlib
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")                              # tensors are small; read by torch's import
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
from data import ToyShapes  # noqa: E402

with contextlib.suppress(ModuleNotFoundError):                             # a student's copy has no such file
    from parallel import pytest_runtestloop  # noqa: F401

torch.backends.cudnn.allow_tf32 = False                                    # comparisons are in float32
DEVICE = os.environ.get("DQ_TEST_DEVICE", "cpu")
VAE = ["--size", "16", "--codebook-size", "16", "--batch-size", "4", "--device", DEVICE]
TRANSFORMER = ["--width", "32", "--heads", "2", "--position-layers", "1", "--content-layers", "1",
               "--batch-size", "4", "--device", DEVICE]


@pytest.fixture
def device():
    return torch.device(DEVICE)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def plain():
    """Stands in for the autocast of common.pick_device; computes in float32."""
    return torch.autocast("cpu", enabled=False)


def call(main, *args):
    """Run a script's main in this process as the shell would. -> its exit status or error message, or None"""
    try:
        common.run(lambda: main(list(map(str, args))))
    except SystemExit as end:
        return end.code


def script(name, *args):
    return subprocess.run([sys.executable, str(ROOT / name), *map(str, args)], capture_output=True, text=True)


@pytest.fixture
def few_for_thresholds(monkeypatch):
    """The thresholds of a router come from 130 images instead of 2,048. (test_wiring.py tests the number.)"""
    monkeypatch.setattr(importlib.import_module("train_vae"), "shuffled_indices",
                        lambda n, size, seed: common.shuffled_indices(n, min(size, 130), seed))


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder with a sub-folder of toy images per class: 13 for training, and 13, 31 and 47 for validation.

    The names decide which images are for validation. The folder is small because every run encodes it at its end.
    """
    root, toy = tmp_path_factory.mktemp("images"), ToyShapes(24, n=48)
    for i in (*range(14), 31, 47):
        x, y = toy[i]
        (root / toy.classes[y]).mkdir(exist_ok=True)
        common.to_picture(x, 0).save(root / toy.classes[y] / f"{i}.png")
    return root


def train(name, out, *flags):
    """Train a stage for a few steps in this process, because starting another process takes longer than training."""
    main = importlib.import_module(name).main                                # a fault in stage 2 spares stage 1's tests
    assert call(main, "--out", out, "--steps", 6, "--eval-every", 3, *flags) is None
    return out


@pytest.fixture(scope="session")
def vae_run(images, tmp_path_factory):
    """A folder with a trained stage 1, which does not depend on sequences or transformers."""
    return train("train_vae", tmp_path_factory.mktemp("run"), "--data", images, *VAE)


@pytest.fixture(scope="session")
def run(vae_run):
    """The same folder, with a trained stage 2 as well."""
    return train("train_transformer", vae_run, *TRANSFORMER)
