"""Runs that are stopped or killed: nothing on disk is lost, and no traceback is printed."""
import ctypes
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest
from PIL import Image

import common
import dq
import train_vae
from conftest import ROOT, VAE, call
from helpers import HANGS, load, same, start, wait_for
from warm import Script


@pytest.mark.parametrize("stage, number", [("vae", signal.SIGTERM), ("transformer", signal.SIGINT)])
def test_a_signal_ends_the_run_after_a_whole_step(stage, number, vae_run, images, tmp_path):
    """All processes of the run receive the signal, as they do from `timeout` and from Ctrl-C in a terminal."""
    data, *workers = [images, "--workers", 1] if stage == "vae" else [vae_run / "codes.pt"]
    process = start(stage, data, tmp_path, 100_000, "--eval-every", 100_000, *workers, start_new_session=True)
    log = tmp_path / f"{stage}.jsonl"
    wait_for(lambda: log.exists() and log.read_text().count("\n") > 1, process)
    os.killpg(process.pid, number)
    out, error = process.communicate(timeout=HANGS)
    assert process.returncode == 128 + number, error
    step = load(tmp_path, stage)["step"]
    assert step >= 10 and f"stopped by {number.name} after step {step}" in out and "--resume continues" in out
    assert "Traceback" not in error


def test_a_run_that_is_stopped_while_it_encodes_can_be_resumed(tmp_path):
    """The resumed run writes the same codes as a run that was not stopped."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (16, 16), "red").save(tmp_path / "images/0.png")
    for i in range(1, 2000):                                                 # enough to be interrupted
        os.link(tmp_path / "images/0.png", tmp_path / f"images/{i}.png")
    out = tmp_path / "out"
    flags = [*VAE, "--data", tmp_path / "images", "--steps", 2, "--out", out]
    process = Script(ROOT / "train_vae.py", *flags)
    wait_for((out / "vae.pt").exists, process)
    process.send_signal(signal.SIGINT)
    said, error = process.communicate(timeout=HANGS)
    assert process.returncode == 128 + signal.SIGINT and "Traceback" not in error
    assert said.splitlines()[-1] == ("stopped by SIGINT while the images were encoded; "
                                    "the same command with --resume continues")
    assert not list(out.glob("codes*"))
    before = {path: path.read_bytes() for path in out.iterdir()}
    codes, stored = out / "codes.pt", []
    for _ in range(2):
        assert call(train_vae.main, *flags, "--resume") is None
        assert {path: path.read_bytes() for path in out.iterdir() if path != codes} == before
        stored.append(dq.load_checkpoint(codes, "dq-codes"))
        codes.unlink()                                                       # --resume writes the file again
    same(*stored)


def blocked_in_python():
    while True:
        time.sleep(0.01)                                                     # as while the run waits for a loader


def blocked_in_c():
    """As in a collective, or in a read from a file server: no Python code runs, and therefore no signal handler."""
    ctypes.CDLL(None).sigsuspend(ctypes.byref((ctypes.c_ulong * 16)(*[2 ** 64 - 1] * 16)))


def run_that_is_blocked(block, folder):
    with common.Stop(patience=0.2) as stop:
        stop.asked()
        (folder / "begun").touch()
        block()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("block", [blocked_in_python, blocked_in_c])
def test_the_first_signal_ends_a_run_that_is_blocked_in_a_step(block, number, tmp_path):
    process = multiprocessing.get_context("fork").Process(target=run_that_is_blocked, args=(block, tmp_path))
    process.start()
    while not (tmp_path / "begun").exists():
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join(60)
    process.kill()
    assert process.exitcode == 128 + number


def test_a_step_that_ends_in_time_is_not_cut_short(monkeypatch):
    """Neither is the checkpoint after it, although it can take long to write."""
    ended = []
    monkeypatch.setattr(common.os, "_exit", ended.append)
    with common.Stop(patience=0.3) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        assert stop.asked() == signal.SIGTERM
        time.sleep(0.4)
    assert not ended


@pytest.fixture(params=["SIGHUP", "SIGUSR1", "SIGTERM"])
def number(request):
    """A signal without a handler in this process, also if the process was started with one that ignores it."""
    number = getattr(signal, request.param)
    previous = signal.signal(number, signal.SIG_DFL)
    yield number
    signal.signal(number, previous)


def test_signals_of_batch_systems_are_handled(number):
    with common.Stop() as stop:
        os.kill(os.getpid(), number)
        assert stop.asked() == number


@pytest.mark.parametrize("number", ["SIGHUP"], indirect=True)
def test_nohup_is_respected(number):
    signal.signal(number, signal.SIG_IGN)
    with common.Stop() as stop:
        os.kill(os.getpid(), number)
        assert stop.asked() == 0


KILLS = int(os.environ.get("DQ_KILLS", 1))


def test_kill_9_at_random_moments(images, tmp_path):
    """A run is killed twice and resumed. DQ_KILLS=20 repeats this 20 times."""
    steps, flags = 12, ["--save-every", 2, "--eval-every", 6]
    before, chance = time.time(), random.Random(0)
    assert call(train_vae.main, *VAE, "--data", images, "--out", tmp_path / "whole", "--steps", steps, *flags) is None
    whole, imports = time.time() - before, None                              # seconds
    for i in range(KILLS):
        out, deaths = tmp_path / str(i), 0
        while True:
            resume = ["--resume"] if (out / "vae.pt").exists() else []
            before, process = time.time(), start("vae", images, out, steps, *flags, *resume)
            wait_for((out / "vae.jsonl").exists, process)                    # the first time: imports are done
            imports = imports or time.time() - before
            death = before + imports + chance.uniform(0, 1) * whole
            try:
                process.wait(max(0, death - time.time()) if deaths < 2 else None)
            except subprocess.TimeoutExpired:
                process.kill()
                deaths += 1
            process.communicate()
            if process.returncode == 0:
                break
            assert process.returncode == -signal.SIGKILL
        same(load(tmp_path / "whole", "vae"), load(out, "vae"))


@pytest.mark.skipif(not os.path.exists("/proc"), reason="needs /proc")
def test_memory_stays_flat(images, tmp_path, monkeypatch):
    used, real = {}, common.Record.add

    def add(self, done, *args):
        real(self, done, *args)
        used[done] = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2 ** 20
    monkeypatch.setattr(common.Record, "add", add)
    train_vae.main(["--data", str(images), "--out", str(tmp_path), "--steps", "60", *VAE, "--eval-every", "15"])
    assert used[60] - used[30] < 2.5, used                                   # MiB
