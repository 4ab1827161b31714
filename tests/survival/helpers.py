"""Helpers of the survival tests: scripts that run in separate processes, and comparisons of what they have saved."""
import time

import pytest
import torch

import dq
import train_transformer
import train_vae
from conftest import ROOT, TRANSFORMER, VAE
from warm import Script

DISCRIMINATOR = ["--size", "24", "--gan-weight", "0.5", "--gan-start", "4"]
STAGES = {"vae": (train_vae, VAE), "vae with a discriminator": (train_vae, VAE + DISCRIMINATOR),
          "transformer": (train_transformer, TRANSFORMER)}


def same(a, b, path="checkpoint", **tolerance):
    """Assert that nested dicts, lists and tensors are equal, or close if a tolerance is given."""
    if torch.is_tensor(a):
        assert a.shape == b.shape, path
        if tolerance:
            torch.testing.assert_close(a, b, **tolerance, msg=lambda text: f"{path}: {text}")
        else:
            assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            same(a[key], b[key], f"{path}.{key}", **tolerance)
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b)):
            same(x, y, f"{path}[{i}]", **tolerance)
    else:
        assert a == b or (tolerance and a == pytest.approx(b, rel=1e-3)), (path, a, b)


def load(folder, stem):
    return dq.load_checkpoint(folder / f"{stem}.pt", f"dq-{stem.split('.')[0]}")


HANGS = 240                              # seconds after which a script counts as hung, even on a busy machine


class Killed(Exception):
    pass


def start(stage, data, out, steps, *more, **kwargs):
    """Start a script in a separate process. data: a folder of images, or codes.pt for stage 2. -> Script"""
    flags = [*VAE, "--data", data] if stage == "vae" else [*TRANSFORMER, "--codes", data]
    return Script(ROOT / f"train_{stage}.py", "--out", out, "--steps", steps, *flags, *more, **kwargs)


def wait_for(condition, process):
    end = time.time() + HANGS
    while not condition():
        assert process.poll() is None and time.time() < end, process.communicate()
        time.sleep(0.02)
