"""Training that is stopped, killed, spread over processes, fed with broken files: nothing is lost, no traceback."""
import math
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
import dq
import sample
import train_transformer
import train_vae
from common import read_log
from conftest import DEVICE, ROOT, TRANSFORMER, VAE, call, script
from train_vae import ToyShapes, open_data

CRITIC = ["--size", "24", "--gan-weight", "0.5", "--gan-start", "4"]
STAGES = {"vae": (train_vae, VAE), "vae with a discriminator": (train_vae, VAE + CRITIC),
          "transformer": (train_transformer, TRANSFORMER)}


def same(a, b, path="checkpoint", **tolerance):
    """Nested dicts, lists and tensors: equal, or close where a tolerance is given."""
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


class Killed(Exception):
    pass


# ------------------------------------------------------------------------------------------------
# Going on


@pytest.mark.parametrize("stage", STAGES)
def test_ten_steps_killed_and_ten_more_are_twenty_steps(stage, vae_run, images, tmp_path, monkeypatch):
    module, flags = STAGES[stage]
    stem = stage.split()[0]
    data = ["--data", str(images)]
    if stem == "transformer":
        data = ["--codes", str(vae_run / "codes.pt"), "--dropout", "0.1"]

    def train(out, *more):
        module.main(["--out", str(tmp_path / out), "--steps", "20", "--eval-every", "5", "--save-every", "10",
                     *data, *flags, *more])

    train("whole")
    save = dq.save_checkpoint

    def save_and_die(path, *args, **kwargs):
        save(path, *args, **kwargs)
        if path.name == f"{stem}.pt":
            raise Killed
    monkeypatch.setattr(dq, "save_checkpoint", save_and_die)
    with pytest.raises(Killed):
        train("halves")
    monkeypatch.setattr(dq, "save_checkpoint", save)
    halves = tmp_path / "halves"
    assert load(halves, stem)["step"] == 10
    with open(halves / f"{stem}.jsonl", "ab") as log:                        # later steps, and what is no line
        log.write(b'{"step": 11, "loss": 3}\nnull\n[1]\n{"loss": 2}\n{"step": "4"}\n'
                  b'{"step": 3, "\xe9": 1}\n{"step": 12, "lo')
    for module_with_state in (random, np.random):                            # the world moves on meanwhile
        module_with_state.seed(99)
    torch.manual_seed(99)
    train("halves", "--resume")
    for name in (stem, f"{stem}.best"):
        same(*(dq.load_checkpoint(tmp_path / folder / f"{name}.pt", f"dq-{stem}") for folder in ("whole", "halves")))
    assert (tmp_path / "whole" / f"{stem}.jsonl").read_text() == (halves / f"{stem}.jsonl").read_text()


def test_the_checkpoint_holds_all_random_states(vae_run):
    rng = load(vae_run, "vae")["rng"]
    assert rng.keys() == {"python", "numpy", "torch", "cuda"}


def test_the_random_state_of_a_gpu_is_that_of_the_own_device(monkeypatch):
    """Process 0 saves that of its GPU; each process gives it to its own."""
    states = {torch.device("cuda", i): torch.tensor([i]) for i in range(3)}
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states[device])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states.update({device: state}))
    saved = common.random_states(torch.device("cuda", 1))
    common.restore_random_states(saved, torch.device("cuda", 2))
    assert [state.item() for state in states.values()] == [0, 1, 1]
    older = saved | dict(cuda=[torch.tensor([7]), torch.tensor([8])])        # of all GPUs of process 0's machine
    common.restore_random_states(older, torch.device("cuda", 2))
    common.restore_random_states(saved | dict(cuda=None), torch.device("cuda", 0))  # saved on a CPU
    assert [state.item() for state in states.values()] == [0, 1, 7]


def test_resuming_with_other_settings(images, tmp_path, capsys):
    """What makes another run is refused by name, what may change is named."""
    def train(*flags):
        return call(train_vae.main, "--out", tmp_path, *VAE, "--data", images, "--steps", 2, *flags)

    def files():
        return {path: path.read_bytes() for path in tmp_path.rglob("*.*")}

    (tmp_path / "other").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "other/one.png")
    assert train() is None
    before = files()
    for flag, value in (("--data", tmp_path / "other"), ("--batch-size", 8), ("--seed", 1), ("--lr", 0.5),
                        ("--clip", 3), ("--budget-weight", 2), ("--codebook-size", 32), ("--gan-start", 7)):
        line = train("--steps", 4, flag, value, "--resume")
        assert line.startswith("error: ") and f"trained with {flag} " in line and "leave --resume out" in line, line
    assert files() == before
    capsys.readouterr()
    for steps in (1, 2):                                                     # as many are done, or more
        assert train("--steps", steps, "--resume", "--eval-every", 1) is None
        out = capsys.readouterr().out.splitlines()
        vae, codes = tmp_path / "vae.pt", tmp_path / "codes.pt"
        assert out[1:] == [f"nothing left to do: {vae} is at step 2, and {codes} is there"] and files() == before
    assert train("--steps", 4, "--resume", "--eval-every", 1) is None
    out = capsys.readouterr().out
    assert "note: --steps was 2 and is 4 from step 2 on" in out and "note: --eval-every was 250 and is 1" in out
    assert load(tmp_path, "vae")["step"] == 4


def test_a_checkpoint_of_before_the_settings_goes_on(images, tmp_path):
    """And what it holds as the lowest loss counts."""
    flags = ["--data", images, "--out", tmp_path, *VAE]
    assert call(train_vae.main, *flags, "--steps", 2) is None
    checkpoint = load(tmp_path, "vae") | dict(best=0.0)
    del checkpoint["settings"]
    torch.save(checkpoint, tmp_path / "vae.pt")
    assert call(train_vae.main, *flags, "--steps", 4, "--lr", 0.01, "--resume") is None
    assert load(tmp_path, "vae")["step"] == 4 and load(tmp_path, "vae.best")["step"] == 2


def test_evaluating_more_often_changes_nothing(images, tmp_path):
    for every in ("1", "4"):
        train_vae.main(["--data", str(images), "--out", str(tmp_path / every), "--steps", "4", "--router", "random",
                        *VAE, "--eval-every", every])
    same(load(tmp_path / "1", "vae")["weights"], load(tmp_path / "4", "vae")["weights"])


@pytest.mark.parametrize("stem, fixture, key", [("vae", "vae_run", "loss"), ("transformer", "run", "nats_per_image")])
def test_the_best_checkpoint_is_that_of_the_lowest_held_out_loss(stem, fixture, key, request):
    folder = request.getfixturevalue(fixture)
    held_out = [line for line in read_log(folder / f"{stem}.jsonl") if "psnr" in line or "nats_per_image" in line]
    best = min(held_out, key=lambda line: line[key])
    checkpoint = dq.load_checkpoint(folder / f"{stem}.best.pt", f"dq-{stem}")
    assert checkpoint["step"] == best["step"] and checkpoint["best"] == pytest.approx(best[key], abs=1e-4)


def test_the_best_checkpoint_can_be_sampled_from(run):
    dq.load_transformer(run / "transformer.best.pt", "cpu")


def test_a_run_that_starts_anew_moves_the_former_one_aside(images, tmp_path, capsys):
    for steps in (1, 2, 3):
        train_vae.main(["--data", str(images), "--out", str(tmp_path), "--steps", str(steps), *VAE])
    assert [load(tmp_path / name, "vae")["step"] for name in ("former-1", "former-2", ".")] == [1, 2, 3]
    for name in ("vae.pt", "vae.best.pt", "vae.jsonl", "vae.png"):
        assert (tmp_path / "former-1" / name).exists() and (tmp_path / name).exists()
    assert "former-2" in capsys.readouterr().out


def start(stage, data, out, steps, *more, **kwargs):
    """A script in a process of its own. data: a folder of images, or for stage 2 codes"""
    flags = [*VAE, "--data", data] if stage == "vae" else [*TRANSFORMER, "--codes", data]
    command = [sys.executable, ROOT / f"train_{stage}.py", "--out", out, "--steps", steps]
    return piped([*command, *flags, *more], **kwargs)


def piped(command, **kwargs):
    pipe = subprocess.PIPE
    return subprocess.Popen(list(map(str, command)), stdout=pipe, stderr=pipe, text=True, **kwargs)


def wait_for(condition, process, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert process.poll() is None and time.time() < end, process.communicate()
        time.sleep(0.02)


@pytest.mark.parametrize("stage, number", [("vae", signal.SIGINT), ("transformer", signal.SIGTERM)])
def test_a_signal_ends_the_run_after_a_whole_step(stage, number, vae_run, images, tmp_path):
    data, *workers = [images, "--workers", 1] if stage == "vae" else [vae_run / "codes.pt"]
    process = start(stage, data, tmp_path, 100_000, "--eval-every", 100_000, *workers)
    log = tmp_path / f"{stage}.jsonl"
    wait_for(lambda: log.exists() and log.stat().st_size, process)
    process.send_signal(number)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number, error
    step = load(tmp_path, stage)["step"]
    assert step >= 10 and f"stopped by {number.name} after step {step}" in out and "--resume goes on" in out
    assert "Traceback" not in error


def test_a_run_that_is_stopped_while_it_encodes_goes_on(tmp_path):
    """And what has been encoded by a run that was not is the same."""
    command = [sys.executable, ROOT / "train_vae.py", *VAE, "--steps", 2, "--out", tmp_path]
    process = piped(command)
    wait_for((tmp_path / "vae.pt").exists, process)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT and "Traceback" not in error
    assert out.splitlines()[-1] == ("stopped by SIGINT while the images were encoded; "
                                    "the same command with --resume goes on")
    assert not list(tmp_path.glob("codes*"))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    codes, stored = tmp_path / "codes.pt", []
    for _ in range(2):
        assert call(train_vae.main, *command[2:], "--resume") is None
        assert {path: path.read_bytes() for path in tmp_path.iterdir() if path != codes} == before
        stored.append(dq.load_checkpoint(codes, "dq-codes"))
        codes.unlink()                                                       # a finished run that lacks it writes it
    same(*stored)


def test_codes_are_those_of_the_newest_weights(images, tmp_path):
    flags = [*VAE, "--data", images, "--out", tmp_path, "--resume"]
    for steps in (1, 2):
        assert call(train_vae.main, *flags[:-1 if steps == 1 else None], "--steps", steps) is None
        same(load(tmp_path, "vae")["weights"], dq.load_checkpoint(tmp_path / "codes.pt", "dq-codes")["weights"])
    newest = (tmp_path / "codes.pt").read_bytes()
    (tmp_path / "codes.pt").write_bytes(newest[:-9])                         # damaged
    assert call(train_vae.main, *flags, "--steps", 2) is None
    same(load(tmp_path, "vae")["weights"], dq.load_checkpoint(tmp_path / "codes.pt", "dq-codes")["weights"])


def test_several_processes_ask_each_other_every_tenth_step_whether_to_stop(monkeypatch):
    asked, before = [], signal.getsignal(signal.SIGINT)                      # ignored, in a shell's background
    monkeypatch.setattr(dq, "processes", lambda: (0, 2))
    monkeypatch.setattr(dq, "total", lambda flag: (asked.append(flag.item()), flag)[1])
    with common.Stop(torch.device("cpu")) as stop:
        for done in range(1, 31):
            if done == 13:
                os.kill(os.getpid(), signal.SIGINT)
            assert bool(stop.asked(done)) == (done >= 20 and done % 10 == 0)
    assert asked == [0, signal.SIGINT, signal.SIGINT]
    assert signal.getsignal(signal.SIGINT) is before


KILLS = int(os.environ.get("DQ_KILLS", 2))


def test_kill_9_at_random_moments(images, tmp_path):
    """DQ_KILLS=20 makes it 20 runs."""
    steps, flags = 12, ["--save-every", 2, "--eval-every", 6]
    whole = start("vae", images, tmp_path / "whole", steps, *flags)
    before = time.time()
    assert whole.wait() == 0
    seconds, chance = time.time() - before, random.Random(0)
    for i in range(KILLS):
        out, deaths = tmp_path / str(i), 0
        while True:
            resume = ["--resume"] if (out / "vae.pt").exists() else []
            process = start("vae", images, out, steps, *flags, *resume)
            try:
                process.wait(chance.uniform(0.3, 1.0) * seconds if deaths < 2 else None)
            except subprocess.TimeoutExpired:
                process.kill()
                deaths += 1
            process.communicate()
            if process.returncode == 0:
                break
            assert process.returncode == -signal.SIGKILL
        same(load(tmp_path / "whole", "vae"), load(out, "vae"))


def test_a_full_disk_leaves_the_former_checkpoint_whole(images, tmp_path):
    assert call(train_vae.main, "--data", images, "--out", tmp_path, "--steps", 2, *VAE) is None
    former = (tmp_path / "vae.pt").read_bytes()
    few = len(former) // 2
    process = start("vae", images, tmp_path, 4, "--resume", preexec_fn=files_of_at_most(few))
    _, error = process.communicate()
    assert process.returncode == 1 and "Traceback" not in error
    assert error.splitlines()[-1].startswith("error: could not write")
    assert (tmp_path / "vae.pt").read_bytes() == former and not list(tmp_path.glob("*.tmp"))


def test_a_full_disk_leaves_the_former_codes_whole(vae_run, images, tmp_path):
    (tmp_path / "codes.pt").write_bytes(b"older")
    flags = ["--encode", vae_run / "vae.pt", "--data", images, "--out", tmp_path, "--device", DEVICE]
    process = piped([sys.executable, ROOT / "train_vae.py", *flags], preexec_fn=files_of_at_most(10_000))
    _, error = process.communicate()
    assert process.returncode == 1
    assert error.splitlines()[-1].startswith(f"error: could not write {tmp_path}/codes.pt (")
    assert (tmp_path / "former-1/codes.pt").read_bytes() == b"older" and not (tmp_path / "codes.pt").exists()
    assert not list(tmp_path.glob("*.tmp"))


def files_of_at_most(n_bytes):
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))


def test_a_full_disk_names_the_log(images, tmp_path):
    process = start("vae", images, tmp_path, 20, preexec_fn=files_of_at_most(50))
    _, error = process.communicate()
    assert process.returncode == 1 and error.startswith(f"error: could not write {tmp_path / 'vae.jsonl'} (")
    assert error.count("\n") == 1


@pytest.mark.parametrize("bad_step", [3, 12])
def test_a_loss_that_is_not_a_number_stops_the_run(bad_step, images, tmp_path, monkeypatch):
    calls, real = [], dq.budget_loss

    def budget_loss(gate, ratios):
        calls.append(1)
        return real(gate, ratios) * (math.nan if len(calls) == bad_step else 1)
    monkeypatch.setattr(dq, "budget_loss", budget_loss)
    with pytest.raises(dq.UserError) as error:
        train_vae.main(["--data", str(images), "--out", str(tmp_path), "--steps", "30", "--save-every", "10", *VAE])
    assert f"step {bad_step}: not finite in the loss: loss, budget;" in str(error.value)
    if bad_step > 10:
        assert "that of step 10" in str(error.value) and load(tmp_path, "vae")["step"] == 10
    else:
        assert "no checkpoint yet" in str(error.value) and not (tmp_path / "vae.pt").exists()


@pytest.mark.parametrize("bad_part", [0, 1])
def test_a_loss_that_is_not_a_number_in_one_part_of_a_batch_stops_the_run(bad_part, images, tmp_path, monkeypatch):
    calls, real = [], dq.budget_loss

    def budget_loss(gate, ratios):
        calls.append(1)
        return real(gate, ratios) * (math.nan if len(calls) == 3 + bad_part else 1)
    monkeypatch.setattr(dq, "budget_loss", budget_loss)
    line = call(train_vae.main, "--data", images, "--out", tmp_path, "--steps", 4, *VAE, "--accumulate", 2)
    assert line.startswith("error: step 2: not finite in the loss: loss, budget;")


def test_what_is_logged_is_the_mean_over_the_parts_of_a_batch(images, tmp_path, monkeypatch):
    calls, real = [], dq.budget_loss

    def budget_loss(gate, ratios):
        calls.append(1)
        return real(gate, ratios) * 0 + (len(calls) - 1) % 4                 # 0, 1, 2, 3 in the parts of each batch
    monkeypatch.setattr(dq, "budget_loss", budget_loss)
    train_vae.main(["--data", str(images), "--out", str(tmp_path), "--steps", "10", *VAE, "--accumulate", "4"])
    assert read_log(tmp_path / "vae.jsonl")[0]["budget"] == 1.5


def test_broken_weights_are_not_saved(images, tmp_path, monkeypatch):
    """The loss is finite and its gradient is not: the last step before a checkpoint can do that."""
    real = train_vae.backward

    def backward(y, last, *args):
        weight = real(y, last, *args)
        last.grad.fill_(math.inf)
        return weight
    monkeypatch.setattr(train_vae, "backward", backward)
    with pytest.raises(dq.UserError, match="a weight is not finite"):
        train_vae.main(["--data", str(images), "--out", str(tmp_path), "--steps", "1", *VAE])
    assert not (tmp_path / "vae.pt").exists()


# ------------------------------------------------------------------------------------------------
# Several processes


def torchrun(n, name, *args, **kwargs):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", ROOT / name]
    return piped([*command, *args], env=os.environ | dict(OMP_NUM_THREADS="1"), **kwargs)


@pytest.mark.parametrize("stage, flags", [
    ("vae", [*VAE, *CRITIC, "--router", "learned", "--clip", 1]),
    ("vae", [*VAE, "--router", "entropy"]),
    ("transformer", [*TRANSFORMER, "--label-dropout", 0])],
    ids=["vae with a discriminator", "vae with the entropy router", "transformer"])
def test_two_processes_compute_what_one_computes(stage, flags, vae_run, images, tmp_path):
    data = ["--codes", vae_run / "codes.pt"] if stage == "transformer" else ["--data", images]
    flags = [*data, "--steps", 6, "--dtype", "fp32", *flags, "--lr", 2e-4]
    two = torchrun(2, f"train_{stage}.py", *flags, "--out", tmp_path / "two")
    out, error = two.communicate(timeout=150)
    assert two.returncode == 0, error
    assert call(STAGES[stage][0].main, *flags, "--out", tmp_path / "one") is None
    assert out.count("done: ") == 1                                          # only one of them writes
    a, b = load(tmp_path / "one", stage), load(tmp_path / "two", stage)
    for part in ("weights", "critic"):
        if part in a:
            same(a[part], b[part], atol=1e-4, rtol=2e-3)                     # Adam can have moved a weight by 1.2e-3
    held_out = [read_log(tmp_path / name / f"{stage}.jsonl")[-1] for name in ("one", "two")]
    same(*held_out, atol=0, rtol=0)


def job(what, rank, world, port, path):
    """One of `world` processes: what the test below compares with a single process."""
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    torch.save(what(rank, world), path / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def several_steps(rank, world):
    """Codebook, router and budget over ten steps of a global batch. -> the codebook and all losses"""
    torch.manual_seed(0)
    model = dq.DQVAE(dq.VAEConfig(size=16, codebook_size=64))
    x = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    mine, losses = x.chunk(world)[rank], []
    for _ in range(10):
        out = model(mine)
        budget = dq.budget_loss(out.gate, (0.5, 0.5))
        gradient = torch.autograd.grad(budget, model.router.mlp[2].weight)[0]
        commitment = dq.total(out.commitment.detach()) / world
        losses.append(torch.stack([budget.detach(), commitment, dq.total(gradient.sum()) / world]))
    return dict(codes=model.codebook.codes, uses=model.codebook.uses, losses=torch.stack(losses))


def free_port():
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def in_two_processes(what, tmp_path):
    """-> what(rank, 2) of each."""
    context, port = multiprocessing.get_context("spawn"), free_port()
    jobs = [context.Process(target=job, args=(what, rank, 2, port, tmp_path)) for rank in (0, 1)]
    for process in jobs:
        process.start()
    for process in jobs:
        process.join()
    return [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]


class CountedShapes(ToyShapes):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.made = 0

    def __getitem__(self, i):
        self.made += 1
        return super().__getitem__(i)


def encode_shapes(rank, world):
    """-> codes, grains and labels of 151 images, and how many of them this process has made"""
    torch.manual_seed(0)
    model, data = dq.DQVAE(dq.VAEConfig(size=16, codebook_size=64)), CountedShapes(16, n=151)
    model.codebook.codes.normal_()
    plain, device = torch.autocast("cpu", enabled=False), torch.device("cpu")
    with common.Stop(device) as stop:
        encoded = train_vae.encode(model.eval(), data, device, lambda: plain, workers=0, mirrored=True, stop=stop)
    return encoded, data.made


def test_each_process_encodes_its_part_and_has_all(tmp_path):
    alone, made = encode_shapes(0, 1)
    assert made == 151 and alone["codes"].shape == (151, 2, 4, 4) and alone["label"].tolist()[:6] == [0, 1, 2, 3, 0, 1]
    for encoded, made in in_two_processes(encode_shapes, tmp_path):
        same(alone, encoded)
        assert made == 76                                                    # of 152: the first image twice


def test_two_processes_write_the_codes_that_one_writes(vae_run, images, tmp_path):
    flags = ["--encode", vae_run / "vae.pt", "--data", images, "--device", DEVICE, "--dtype", "fp32"]
    two = torchrun(2, "train_vae.py", *flags, "--out", tmp_path / "two")
    out, error = two.communicate(timeout=150)
    assert two.returncode == 0 and out.count("done: ") == 1, error
    assert call(train_vae.main, *flags, "--out", tmp_path / "one") is None
    same(*(dq.load_checkpoint(tmp_path / name / "codes.pt", "dq-codes") for name in ("one", "two")))


def test_codebook_router_and_budget_are_those_of_the_global_batch(tmp_path):
    alone = several_steps(0, 1)
    first, second = in_two_processes(several_steps, tmp_path)
    same(first["codes"], second["codes"])                                    # identical, bit by bit
    same(alone, first, atol=1e-6, rtol=1e-4)


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not os.path.exists("/proc"), reason="needs /proc")
def test_a_dead_process_ends_the_job(images, tmp_path):
    many = ["--steps", 100_000, "--eval-every", 100_000]
    process = torchrun(2, "train_vae.py", "--data", images, "--out", tmp_path, *VAE, *many)
    log = tmp_path / "vae.jsonl"
    wait_for(lambda: log.exists() and log.stat().st_size, process)
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    _, error = process.communicate(timeout=90)
    assert process.returncode != 0 and ("is gone" in error or "SIGKILL" in error or "Signal 9" in error)


def test_more_gpus_than_there_are(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(dq.UserError, match="1 GPU.*process 3"):
        train_vae.main(["--out", str(tmp_path)])


# ------------------------------------------------------------------------------------------------
# Hostile and broken files


class Bomb:
    def __reduce__(self):
        return os.system, ("touch ran",)


def spoil(path, how, tmp_path):
    """A broken variant of a checkpoint -> its path."""
    broken = tmp_path / "broken.pt"
    data = bytearray(path.read_bytes())
    if how == "truncated":
        data = data[:len(data) * 2 // 3]
    elif how == "bits flipped":
        data[len(data) // 2] ^= 0xFF
    elif how == "empty":
        data = b""
    broken.write_bytes(data)
    if how == "code":
        torch.save(dict(kind="dq-transformer", config=Bomb()), broken)
    elif how in ("version", "config"):
        checkpoint = torch.load(path, weights_only=True)
        if how == "version":
            checkpoint["weights"]["something.new"] = checkpoint["weights"].pop("condition.weight")
        else:
            checkpoint["config"] = dict(size="big")
        torch.save(checkpoint, broken)
    return broken


@pytest.mark.parametrize("how", ["truncated", "bits flipped", "empty", "code", "version", "config"])
def test_broken_checkpoints(how, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    broken = spoil(run / "transformer.pt", how, tmp_path)
    line = call(sample.main, broken)
    assert line.startswith("error: ") and "\n" not in line
    assert not (tmp_path / "ran").exists()                                   # a checkpoint runs no code
    (tmp_path / "out").mkdir()
    broken.rename(tmp_path / "out/transformer.pt")
    flags = ["--codes", run / "codes.pt", "--steps", 8, *TRANSFORMER]
    line = call(train_transformer.main, *flags, "--resume")
    assert line.startswith("error: ") and "\n" not in line


def test_images_that_are_odd_or_broken(tmp_path, capfd):
    """What can be read is read, the rest is named once and left out."""
    root = tmp_path / "images"
    root.mkdir()
    Image.new("RGB", (1, 1), "red").save(root / "one.png")
    Image.new("RGB", (20_000, 10), "green").save(root / "wide.png")
    Image.new("RGB", (10, 20_000), "blue").save(root / "high.png")
    Image.new("RGB", (30, 30), "white").save(os.fsencode(root) + b"/caf\xe9 \xff.png")   # no UTF-8
    Image.new("RGB", (30, 30), "white").save(root / "名前 🙂.png")
    Image.new("1", (20_000, 20_000)).save(root / "bomb.png")
    Image.new("1", (10_000, 10_000)).save(root / "small bomb.png")
    (root / "empty.png").write_bytes(b"")
    (root / "text.jpg").write_text("no image")
    (root / "cut.png").write_bytes((root / "wide.png").read_bytes()[:-30])
    (root / "folder.png").mkdir()
    (root / "dangling.png").symlink_to("nowhere.png")
    os.mkfifo(root / "pipe.png")                                             # who opens it waits for ever
    (root / "locked.png").write_bytes((root / "one.png").read_bytes())
    (root / "locked.png").chmod(0)
    for data in open_data(root, 8, augment=True):
        for i in range(2 * len(data)):
            image, _ = data[i]
            assert image.shape == (3, 8, 8) and image.isfinite().all()
    told = capfd.readouterr().err
    for name in ("bomb.png", "small bomb.png", "empty.png", "text.jpg", "cut.png", "dangling.png", "pipe.png"):
        assert any(f"/{name}: " in line for line in told.splitlines()), name
    for name in ("one.png", "wide.png", "high.png", "folder.png"):
        assert f"/{name}" not in told
    assert "Traceback" not in told
    assert call(train_vae.main, "--data", root, "--out", tmp_path / "out", "--steps", 2, *VAE) is None


def test_classes_of_any_name(tmp_path):
    for name in (b"caf\xe9", "名前".encode()):
        folder = os.fsencode(tmp_path) + b"/images/" + name
        os.makedirs(folder)
        for i in range(4):
            Image.new("RGB", (16, 16), (60 * i, 90, 0)).save(folder + b"/%d.png" % i)
    both = ["--out", tmp_path, "--steps", 1]
    assert call(train_vae.main, *both, *VAE, "--data", tmp_path / "images") is None
    assert call(train_transformer.main, *both, *TRANSFORMER) is None
    assert call(sample.main, tmp_path / "transformer.pt", "--n", 2) is None
    done = script("sample.py", tmp_path / "transformer.pt", "--label", "dog")
    assert done.returncode == 1 and "no class 'dog'" in done.stderr and done.stderr.count("\n") == 1


def test_training_starts_without_a_look_at_every_file(tmp_path, monkeypatch):
    root = tmp_path / "images"
    root.mkdir()
    Image.new("RGB", (8, 8)).save(root / "0.png")
    for i in range(1, 6000):
        os.link(root / "0.png", root / f"{i}.png")
    opened, real = [], common.open_image
    for module in (common, train_vae):
        monkeypatch.setattr(module, "open_image", lambda *args: (opened.append(1), real(*args))[1])
    monkeypatch.setattr(train_vae, "write_codes", lambda *args: opened.append("codes"))  # at the end all are read
    train_vae.main(["--data", str(root), "--out", str(tmp_path), "--steps", "2", *VAE])
    assert opened.index("codes") <= 512 + 2 * 4                              # the held-out images, two batches


@pytest.mark.skipif(not os.path.exists("/proc"), reason="needs /proc")
def test_memory_stays_flat(images, tmp_path, monkeypatch):
    used, real = {}, common.Losses.add

    def add(self, done, *args):
        real(self, done, *args)
        used[done] = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2 ** 20
    monkeypatch.setattr(common.Losses, "add", add)
    train_vae.main(["--data", str(images), "--out", str(tmp_path), "--steps", "120", *VAE, "--eval-every", "30"])
    assert used[120] - used[60] < 5, used                                    # MiB


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="the trap below is inherited by a fork")
def test_a_loader_process_that_dies_is_reported(images, tmp_path, monkeypatch):
    def trap(self, i):
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, i)
    parent, real = os.getpid(), train_vae.ImageFolder.__getitem__
    monkeypatch.setattr(train_vae.ImageFolder, "__getitem__", trap)
    line = call(train_vae.main, "--data", images, "--out", tmp_path, "--steps", 4, *VAE, "--workers", 1)
    assert line.startswith("error: a process that loads images died") and "\n" not in line


@pytest.mark.parametrize("size", [(1, 1), (1000, 3)])
def test_a_grain_map_of_another_shape_is_stretched(size, run, tmp_path):
    Image.new("L", size, 255).save(tmp_path / "map.png")
    flags = ["--n", 1, "--grain-map", tmp_path / "map.png", "--out", tmp_path / "x.png", "--device", DEVICE]
    assert call(sample.main, run / "transformer.pt", *flags) is None
