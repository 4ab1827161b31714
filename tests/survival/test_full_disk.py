"""A full disk: the error is one line, and the previous file is intact."""
import resource
from contextlib import contextmanager

import pytest

import sample
import train_vae
from conftest import DEVICE, ROOT, VAE, call
from helpers import start
from warm import Script


def test_a_full_disk_leaves_the_previous_checkpoint_intact(images, tmp_path):
    assert call(train_vae.main, "--data", images, "--out", tmp_path, "--steps", 2, *VAE) is None
    previous = (tmp_path / "vae.pt").read_bytes()
    process = start("vae", images, tmp_path, 4, "--resume", largest_file=len(previous) // 2)
    _, error = process.communicate()
    assert process.returncode == 1 and "Traceback" not in error
    assert error.splitlines()[-1].startswith("error: could not write")
    assert (tmp_path / "vae.pt").read_bytes() == previous and not list(tmp_path.glob("*.tmp"))


def test_a_full_disk_leaves_the_previous_codes_intact(vae_run, images, tmp_path):
    (tmp_path / "codes.pt").write_bytes(b"older")
    flags = ["--encode", vae_run / "vae.pt", "--data", images, "--out", tmp_path, "--device", DEVICE]
    process = Script(ROOT / "train_vae.py", *flags, largest_file=10_000)
    _, error = process.communicate()
    assert process.returncode == 1
    assert error.splitlines()[-1].startswith(f"error: could not write {tmp_path}/codes.pt (")
    assert (tmp_path / "former-1/codes.pt").read_bytes() == b"older" and not (tmp_path / "codes.pt").exists()
    assert not list(tmp_path.glob("*.tmp"))


@contextmanager
def nearly_full_disk(room):
    """Limit the size of every file to `room` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_reported_with_the_name_of_the_log(images, tmp_path, capsys):  # capsys keeps output in memory
    with nearly_full_disk(50):
        line = call(train_vae.main, "--data", images, "--out", tmp_path, "--steps", 20, *VAE)
    assert line.startswith(f"error: could not write {tmp_path / 'vae.jsonl'} (") and "\n" not in line


@pytest.mark.parametrize("option, name", [
    ("--out", "s.png"), ("--out", "s.jpg"), ("--gif", "s.gif"), ("--save-dir", "samples.json")])
def test_a_full_disk_leaves_the_previous_image_intact(option, name, run, tmp_path):
    (tmp_path / name).write_bytes(b"previous")
    target = tmp_path if option == "--save-dir" else tmp_path / name
    with nearly_full_disk(300):
        line = call(sample.main, run / "transformer.pt", "--device", DEVICE, "--n", 1,
                    "--out", tmp_path / "other.png", option, target)
    assert line == (f"error: could not write {tmp_path / name} ([Errno 27] File too large); "
                    "any previous file is intact")
    assert {path.name for path in tmp_path.iterdir() if path.suffix != ".lock"} == {name}
    assert (tmp_path / name).read_bytes() == b"previous"
