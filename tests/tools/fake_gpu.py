"""Runs the GPU's code path on the device "meta", which every machine has.

A tensor on "meta" has a shape, a dtype and a device, but no values. So everything that asks for a value raises: item,
tolist, cpu, a tensor as a condition, a boolean mask as an index. On a GPU, each of these synchronises: the host waits
until the device has finished its work. None of them may be part of a captured graph.

    with rehearsal() as seen:            # in here "meta" passes for a GPU, and so does "cuda"
        step()
    seen.waits, seen.kernels             # synchronisations that "meta" itself would allow, and the number of kernels

The work that an operator does internally, on a GPU only, is not visible.
"""
import contextlib
import traceback
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT, META = Path(__file__).resolve().parents[2], torch.device("meta")
NO_KERNEL = ("empty", "new_empty", "_unsafe_view", "_reshape_alias")         # beside views
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear")


def line_of_ours():
    """The line of the project that is being executed."""
    frames = [f for f in traceback.extract_stack() if Path(f.filename).parent == ROOT]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno} {frames[-1].line}" if frames else "?"


def on_device(x):
    return isinstance(x, torch.Tensor) and x.device == META


def sends_values(function, args, kwargs):
    """Does this call copy values from the host to the device? (For lists, "meta" runs no operator that shows it.)"""
    if function in (torch.tensor, torch.as_tensor):
        return torch.device(kwargs.get("device") or "cpu") == META
    if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and on_device(args[0]):
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return any(isinstance(each, list) for each in index)
    return function == torch.Tensor.new_tensor and on_device(args[0])


def uses_a_mask(indices, values):
    """Assigning several values by a boolean mask synchronises, because the host needs their number."""
    return values.numel() > 1 and any(i is not None and i.dtype == torch.bool for i in indices)


class Operators(TorchDispatchMode):
    """Inspects every operator, including those of the backward pass.

    waits: lines with operators between devices, or with values that the host sends and waits for
    kernels: operators that compute or copy on the device; a sort counts as one, although a GPU runs several kernels
    read: the tensors that matrix products and attention read
    """

    def __init__(self):
        super().__init__()
        self.waits, self.kernels, self.read = [], 0, []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        name = op.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        here = [on_device(x) for x in tensors]
        self.kernels += any(here) and not op.is_view and not name.startswith(NO_KERNEL)
        between = any(here) and not all(here) and not (kwargs or {}).get("non_blocking")
        if between or name.startswith("index_put") and uses_a_mask(*args[1:3]):
            self.waits.append(f"{line_of_ours()} ({name})")
        if name in PRODUCTS:
            self.read += filter(on_device, args)
        return out


class AsOnAGpu(TorchFunctionMode):
    """Answers in place of the device where "meta" can't."""

    def __init__(self, operators, fused_attention):
        super().__init__()
        self.operators, self.fused_attention = operators, fused_attention

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function == torch.Tensor.is_cuda.__get__:
            return on_device(args[0])
        if function == torch.Tensor.pin_memory:
            return args[0]
        if function == torch.Tensor.to:
            args = [META if isinstance(arg, torch.device) and arg.type == "cuda" else arg for arg in args]
        if sends_values(function, args, kwargs):
            self.operators.waits.append(f"{line_of_ours()} (values of the host)")
        if function == F.scaled_dot_product_attention and self.fused_attention and on_device(args[0]):
            query, keys, values = args[:3]
            self.operators.kernels += 1
            self.operators.read += [keys, values]
            return query.new_empty(*query.shape[:-1], values.shape[-1])
        return function(*args, **kwargs)


@contextlib.contextmanager
def rehearsal(fused_attention=False):
    """-> Operators. fused_attention: attention is a single kernel, as on a GPU, without a backward pass"""
    operators, real = Operators(), torch.autocast

    def autocast(device_type, *args, **kwargs):
        return contextlib.nullcontext() if device_type == "meta" else real(device_type, *args, **kwargs)
    with mock.patch("torch.autocast", autocast), AsOnAGpu(operators, fused_attention), operators:
        yield operators
