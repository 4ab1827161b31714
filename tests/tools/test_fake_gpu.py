"""The GPU's code path on machines without one: no step synchronises, and no copy is read before it has arrived."""
import contextlib
import functools

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common
import data as reading
import dq
import sample
import train_transformer
import train_vae
from benchmark import count_step
from conftest import DEVICE, TRANSFORMER, VAE, call
from fake_gpu import META, line_of_ours, rehearsal
from test_sampling import FakeCuda
from test_transformer import tiny

FACTORS = [(8,), (8, 4), (8, 4, 2)]


@pytest.mark.parametrize("options", [dq.SampleOptions(), dq.SampleOptions(0.7, 3, 0.9, 2.5)], ids=["plain", "all"])
@pytest.mark.parametrize("is_given", [False, True], ids=["drawn", "given"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_a_sampling_step_never_waits(dtype, is_given, options):
    model = tiny(8, (4, 2, 1), V=5, classes=("a", "b")).to(META, dtype)
    pairs = torch.zeros(2, 4, model.layout.max_len, dtype=torch.long, device=META)
    label = torch.zeros(4, dtype=torch.long, device=META)
    job, state = dq.start(model, label, options, 0, tuple(pairs) if is_given else None, first=0, slots=3, M=16)
    with rehearsal() as seen:
        before = [tensor._version for tensor in (*state.cache, *state[1:])]
        dq.decode_one(model, job, state, 8)
    assert seen.waits == [] and seen.kernels > 0
    after = [tensor._version for tensor in (*state.cache, *state[1:])]
    assert all(a > b for a, b in zip(after, before))                         # in place, as a captured graph must
    assert {(cache.device, cache.dtype) for cache in state.cache} == {(META, dtype)}


@pytest.mark.parametrize("factors", FACTORS, ids=str)
def test_what_stands_around_sampling_never_waits(factors):
    layout = dq.Layout(16, factors).to(META)
    pos = torch.zeros(3, layout.max_len, dtype=torch.long, device=META)
    with rehearsal() as seen:
        codes, grains = layout.unpack(pos, pos)
        for keep in range(len(factors) + 1):
            sample.given_coarse(layout, codes, grains, keep)
        sample.given_tiling(layout, grains)
    assert seen.waits == []


@pytest.mark.parametrize("factors, router", [*((FACTORS[-1], router) for router in dq.ROUTERS),
                                             *((factors, "learned") for factors in FACTORS[:-1])], ids=str)
def test_a_step_of_stage_1_never_waits(factors, router):
    """As in train_vae.main, with all losses: every router, and every number of granularities."""
    K, format = len(factors), torch.channels_last
    config = dq.VAEConfig(size=32, factors=factors, ratios=(1 / K,) * K, router=router, codebook_size=16)
    with META:
        model, discriminator, perceptual = dq.DQVAE(config), train_vae.Discriminator(), train_vae.Perceptual()
    record = common.Record(*[None] * 7)
    for module in (model, discriminator):
        module.to(memory_format=format)
    with rehearsal() as seen:
        x = torch.zeros(2, 3, 32, 32).to(torch.device("cuda"), memory_format=format, non_blocking=True)
        out = model(x, 0.5)
        y = out.reconstruction.float()
        budget, lpips = dq.budget_loss(out.gate, config.ratios), perceptual(x, y).mean()
        of_y, of_codes = (y - x).abs().mean() + lpips, out.commitment + budget
        gan_loss = -discriminator(y).mean()
        gan_weight = train_vae.backward(y, model.decoder.out[-1].weight, of_y, gan_loss, of_codes, 0.5, 0.25)
        hinge = train_vae.hinge_loss(discriminator(x), discriminator(y.detach()))
        (0.25 * hinge).backward()
        record.add(1, dict(of_y=of_y, budget=budget, gan_weight=gan_weight, discriminator=hinge), 0.25)
    assert seen.waits == [] and x.device == META
    assert all(p.grad is not None and p.grad.device == META for p in (*model.parameters(), *discriminator.parameters()))


@pytest.mark.parametrize("classes", [(), ("a", "b")], ids=["without labels", "with labels"])
def test_a_step_of_stage_2_never_waits(classes):
    """As in train_transformer.main."""
    model = tiny(8, (4, 2), V=5, classes=classes, dropout=0.1).to(META).train()
    record = common.Record(*[None] * 7)
    stored = dict(codes=torch.zeros(4, 1, 4, 4), grains=torch.zeros(4, 1, 2, 2), label=torch.zeros(4))
    images = train_transformer.Images({name: x.byte() for name, x in stored.items()}, (4, 2))
    with rehearsal() as seen:
        for part in torch.arange(4).chunk(2):
            batch = train_transformer.sequences(images, part, model.layout, torch.device("cuda"))
            position, content = (x.sum() for x in model(*batch).values())
            (position + content).backward()
            record.add(1, dict(position_nats=position, content_nats=content))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert seen.waits == []
    assert all(p.grad is not None and p.grad.device == META for p in model.parameters())


WAITS = ["x.sum().item()", "x.tolist()", "x.cpu()", "bool(x.sum() > 0)", "x[x > 0]", "x.__setitem__(x > 0, x)",
         "torch.tensor([1, 2], device=x.device)", "torch.as_tensor([1, 2], device=x.device)", "x.new_tensor([1])",
         "x[[0, 1]]", "x[torch.arange(2)]", "x + torch.ones(2).to(x.device)", "x * torch.tensor(2.0)"]


@pytest.mark.parametrize("code", WAITS)
def test_the_rehearsal_sees_what_waits(code):
    with rehearsal() as seen, contextlib.suppress(RuntimeError, NotImplementedError):
        eval(code, dict(torch=torch, x=torch.zeros(2, device=META)))
        assert seen.waits


def test_a_sampling_step_at_the_papers_size_is_at_most_340_kernels():
    counts = {cfg: count_step(1, torch.bfloat16, cfg) for cfg in (1.0, 2.0)}
    assert all(kernels <= 340 for kernels, _, _ in counts.values())
    weights, cache = 2 * (24 * 12 * 1024 ** 2 + 1024 * (1282 + 1024)), 2 * (24 * 2 * 1024 * 384)  # bytes
    assert counts[1.0][1:] == (weights, cache) and counts[2.0][1:] == (weights, 2 * cache)  # each matrix once


def test_graphs_are_made_on_the_device_of_the_weights(monkeypatch):
    """Streams and captures use the current device. It is that of the weights during sampling, and only then."""
    current, seen = [0], []

    @contextlib.contextmanager
    def device_of(tensor):                                                   # pretend that it is on device 1
        current.append(1)
        yield
        current.pop()
    FakeCuda(monkeypatch)
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    for module, name in ((torch.cuda, "Stream"), (torch.cuda, "graph_pool_handle"), (torch.cuda, "CUDAGraph"),
                         (torch.cuda, "graph"), (dq, "decode_one")):
        def noted(*args, real=getattr(module, name), name=name, **kwargs):
            seen.append((name, current[-1]))
            return real(*args, **kwargs)
        monkeypatch.setattr(module, name, noted)
    dq.generate(tiny(8, (4, 2), V=5), torch.full((3,), -1), graphs=True, bucket=8)
    assert current == [0] and {device for _, device in seen} == {1} and len({name for name, _ in seen}) == 5


class LateCopies(TorchFunctionMode):
    """A non-blocking copy has not arrived when it is read, so its target still holds another number."""
    stale = 3                            # `generate` below would take it for: no slot has an image left

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        late = (kwargs or {}).get("non_blocking") or function == torch.Tensor.copy_ and True in args[2:]
        return out.fill_(self.stale) if late else out


@pytest.mark.parametrize("graphs", [False, True])
def test_the_host_reads_no_copy_that_has_not_arrived(graphs, monkeypatch):
    model, label = tiny(8, (4, 2), V=5), torch.full((3,), -1)
    wanted = dq.generate(model, label, seed=1)
    FakeCuda(monkeypatch)
    with LateCopies():
        drawn = dq.generate(model, label, seed=1, graphs=graphs)
    assert torch.equal(drawn[0], wanted[0]) and torch.equal(drawn[1], wanted[1])


class NoDouble(TorchDispatchMode):
    """As on an Apple GPU: float64 does not exist."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            assert not isinstance(x, torch.Tensor) or x.dtype != torch.float64, f"{line_of_ours()} ({op})"
        return out


@pytest.mark.usefixtures("few_for_thresholds")
def test_no_script_needs_double_precision(tmp_path, monkeypatch):
    """Runs both stages with their evaluations, all losses except LPIPS, and sampling with every option."""
    flags = ["--out", tmp_path, "--steps", 1, "--eval-every", 1, "--dtype", "fp32"]
    monkeypatch.setattr(reading.ToyShapes, "__len__", lambda toy: 8)
    monkeypatch.setattr(train_vae, "Discriminator", functools.partial(train_vae.Discriminator, width=8))
    with NoDouble():
        assert call(train_vae.main, *flags, *VAE, "--router", "entropy", "--size", 24, "--gan-weight", 1) is None
        assert call(train_transformer.main, *flags, *TRANSFORMER) is None
        assert call(sample.main, tmp_path / "transformer.pt", "--n", 3, "--top-k", 5, "--top-p", 0.9,
                    "--gif", tmp_path / "x.gif", "--device", DEVICE) is None
