"""Several ranks: together they compute the same as a single process."""
import os
import signal
import socket
from pathlib import Path

import pytest
import torch
from torch.distributed import run

import common
import dq
import train_vae
from conftest import DEVICE, ROOT, TRANSFORMER, VAE, call
from helpers import DISCRIMINATOR, HANGS, STAGES, load, same, wait_for
from data import ToyShapes
from runs import read_log
from warm import FORKS, Script


def need_gpus(n):
    if DEVICE != "cpu" and torch.cuda.device_count() < n:
        pytest.skip(f"needs {n} GPUs")                                       # NCCL allows one rank per GPU


def torchrun(n, name, *args):
    need_gpus(n)
    return Script(run.__file__, "--standalone", f"--nproc_per_node={n}", ROOT / name, *args, OMP_NUM_THREADS="1")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def two_of(name, *args):
    """Start two ranks without torchrun, whose processes would import torch again. -> their output"""
    need_gpus(2)
    both = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    processes = [Script(ROOT / name, *args, threads=1, RANK=rank, LOCAL_RANK=rank, **both) for rank in "01"]
    said = [process.communicate(timeout=HANGS) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    return said[0][0] + said[1][0]


def gradients(checkpoint):
    """-> {optimiser: moving averages of all gradients, as one vector}. The weights hardly change in a short warm-up."""
    found = {}
    for name, part in checkpoint.items():
        if isinstance(part, dict) and "state" in part:
            each = [state.get("exp_avg", state.get("momentum_buffer")) for state in part["state"].values()]
            found[name] = torch.cat([x.flatten() for x in each])
    return found


@pytest.mark.parametrize("stage, flags", [
    ("vae", [*VAE, *DISCRIMINATOR, "--router", "learned", "--clip", 1]),
    ("vae", [*VAE, "--router", "entropy", "--accumulate", 2, "--batch-size", 16, "--workers", 2]),
    ("transformer", [*TRANSFORMER, "--dropout", 0, "--label-dropout", 0, "--clip", 0])],
    ids=["vae with a discriminator", "vae with the entropy router", "transformer"])
def test_two_processes_compute_what_one_computes(stage, flags, vae_run, images, tmp_path):
    data = ["--codes", vae_run / "codes.pt"] if stage == "transformer" else ["--data", images]
    flags = [*data, "--steps", 6, "--dtype", "fp32", *flags, "--lr", 2e-4]
    out = two_of(f"train_{stage}.py", *flags, "--out", tmp_path / "two")
    assert call(STAGES[stage][0].main, *flags, "--out", tmp_path / "one") is None
    assert out.count("done: ") == 1                                          # only rank 0 reports
    a, b = load(tmp_path / "one", stage), load(tmp_path / "two", stage)
    for part in ("weights", "critic"):
        if part in a:
            same(a[part], b[part], atol=1e-4, rtol=2e-3)
    alone, together = gradients(a), gradients(b)
    assert list(alone) == list(together) and len(alone) == (1 if stage == "vae" and "critic" not in a else 2)
    for name, wanted in alone.items():
        assert (together[name] - wanted).norm() < 0.01 * wanted.norm(), name
    held_out = [read_log(tmp_path / name / f"{stage}.jsonl")[-1] for name in ("one", "two")]
    same(*held_out, atol=0, rtol=1e-4 if stage == "transformer" else 0)


def job(what, rank, world, port, path):
    """Run what(rank, world) as one of `world` ranks and save what it returns."""
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    torch.save(what(rank, world), path / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def several_steps(rank, world):
    """Ten steps of codebook, routers and budget loss on a global batch. -> the codebook, all losses and gates"""
    torch.manual_seed(0)
    model = dq.DQVAE(dq.VAEConfig(size=16, codebook_size=64))
    x = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    mine, losses = x.chunk(world)[rank], []
    for _ in range(10):
        out = model(mine)
        budget = dq.budget_loss(out.gate, (0.5, 0.5))
        gradient = torch.autograd.grad(budget, model.router.mlp[2].weight)[0]
        commitment = dq.all_reduce_sum(out.commitment.detach()) / world
        losses.append(torch.stack([budget.detach(), commitment, dq.all_reduce_sum(gradient.sum()) / world]))
    dial = dq.DQVAE(dq.VAEConfig(size=16, router="dial"))                    # its quantiles are those of all images
    gate = torch.stack([dial(mine).gate for _ in range(3)], dim=1)           # of three steps
    gates, cost = dq.all_gather(gate), torch.rand(8, *gate.shape[1:], generator=torch.Generator().manual_seed(2))
    gradient = torch.autograd.grad((gate * cost.chunk(world)[rank]).sum(), dial.router.scorer.mlp[2].weight)[0]
    return dict(codes=model.codebook.codes, uses=model.codebook.uses, losses=torch.stack(losses), gates=gates,
                thresholds=dial.router.thresholds, gradient=dq.all_reduce_sum(gradient))


def in_two_processes(what, tmp_path):
    """-> what(rank, 2) of both ranks"""
    port = free_port()
    jobs = [FORKS.Process(target=job, args=(what, rank, 2, port, tmp_path)) for rank in (0, 1)]
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
    """-> codes, grains and labels of 151 images, and how many images this rank has read"""
    torch.manual_seed(0)
    model, data = dq.DQVAE(dq.VAEConfig(size=16, codebook_size=64)), CountedShapes(16, n=151)
    model.codebook.codes.normal_()
    plain, device = torch.autocast("cpu", enabled=False), torch.device("cpu")
    with common.Stop() as stop:
        encoded = train_vae.encode_dataset(model.eval(), data, device, lambda: plain, 0, mirrored=True, stop=stop)
    return encoded, data.made


def test_each_process_encodes_its_part_and_the_first_has_all(tmp_path):
    alone, made = encode_shapes(0, 1)
    assert made == 151 and alone["codes"].shape == (151, 2, 4, 4) and alone["label"].tolist()[:6] == [0, 1, 2, 3, 0, 1]
    (first, made), (second, others) = in_two_processes(encode_shapes, tmp_path)
    same(alone, first)
    assert made == others == 76 and second is None                           # 152: the first image twice


def steps_until_a_signal(rank, world):
    """-> the step after which this rank stops, and the signal. Only rank 1 receives a signal, in step 3."""
    with common.Stop(patience=60) as stop:
        for step in range(1, 9):
            if rank == 1 and step == 3:
                os.kill(os.getpid(), signal.SIGINT)
            if number := stop.asked():
                return step, int(number)


def test_all_processes_stop_after_the_same_step(tmp_path):
    assert in_two_processes(steps_until_a_signal, tmp_path) == [(3, signal.SIGINT)] * 2


def test_two_processes_write_the_codes_that_one_writes(vae_run, images, tmp_path):
    flags = ["--encode", vae_run / "vae.pt", "--data", images, "--device", DEVICE, "--dtype", "fp32"]
    assert two_of("train_vae.py", *flags, "--out", tmp_path / "two").count("done: ") == 1
    assert call(train_vae.main, *flags, "--out", tmp_path / "one") is None
    same(*(dq.load_checkpoint(tmp_path / name / "codes.pt", "dq-codes") for name in ("one", "two")))


def test_codebook_router_and_budget_are_those_of_the_global_batch(tmp_path):
    alone = several_steps(0, 1)
    first, second = in_two_processes(several_steps, tmp_path)
    wanted, gradient = alone.pop("gradient"), first.pop("gradient")          # sums of many terms that nearly cancel
    assert (gradient - wanted).norm() < 1e-3 * wanted.norm()
    same(first["codes"], second["codes"])                                    # bit-identical
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
    _, error = process.communicate(timeout=HANGS)
    assert process.returncode != 0 and ("died or lost" in error or "SIGKILL" in error or "Signal 9" in error)


def test_more_gpus_than_there_are(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    for name, value in (("RANK", "3"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(dq.UserError, match="cuda:3, on a machine with 1 CUDA GPUs"):
        train_vae.main(["--out", str(tmp_path)])
