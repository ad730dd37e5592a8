# mypy: ignore-errors
"""A pretended GPU: real numbers on the CPU under a device of another name. Mixing the two raises, as CUDA would.

Importing this changes torch for the whole process: give it one of its own.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend


class Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def set_rng_state(self, *_: Any) -> None: ...

    def get_rng_state(self, *_: Any) -> torch.Tensor:
        return torch.zeros(1, dtype=torch.uint8)

    def device_count(self) -> int:
        return 1

    def synchronize(self, *_: Any) -> None: ...

    def empty_cache(self) -> None: ...


_setup_privateuseone_for_python_backend("gpu", backend_module=Backend())
GPU = torch.device("gpu", 0)
aten = torch.ops.aten
CROSS = {aten._to_copy.default, aten.copy_.default, aten.set_.source_Tensor}  # what may go from one to the other
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default, aten.index_put.default}
real = {"tensor": torch.tensor, "generator": torch.Generator, "to": torch.nn.Module.to}


class OnGpu(torch.Tensor):
    """A tensor of the device; `numbers` holds its numbers."""

    @staticmethod
    def __new__(cls, numbers: torch.Tensor) -> OnGpu:
        layout = {"strides": numbers.stride(), "storage_offset": numbers.storage_offset()}
        return torch.Tensor._make_wrapper_subclass(cls, numbers.size(), dtype=numbers.dtype, device=GPU, **layout)

    def __init__(self, numbers: torch.Tensor) -> None:
        self.numbers = numbers

    def __repr__(self) -> str:
        return f"OnGpu({self.numbers})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.numbers.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert gpu:0 device type tensor to numpy")


def is_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "gpu"


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation on the numbers; its result is on the device if an argument is, or if it is asked for."""
    flat, _ = tree_flatten((args, kwargs))
    there = [x for x in flat if isinstance(x, OnGpu)]
    here = [x for x in flat if type(x) is not OnGpu and isinstance(x, torch.Tensor) and x.dim() and x.device.type == "cpu"]
    if there and here and func not in CROSS:
        by_index = func in INDEXING and isinstance(args[0], OnGpu) and all(any(x is i for i in args[1]) for x in here)
        if not by_index:  # CUDA too takes indices from the CPU
            raise RuntimeError(f"{func}: Expected all tensors to be on the same device, but found gpu:0 and cpu!")
    if func is aten._efficientzerotensor.default:  # forward mode's; it has no numbers that could be held
        func = aten.zeros.default
    target = kwargs.get("device")
    on_cpu = {"device": torch.device("cpu")} if is_gpu(target) else {}
    kwargs = kwargs | on_cpu | {key: False for key in kwargs if key == "pin_memory"}
    out = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    same = {id(x.numbers): x for x in there}
    on_gpu = is_gpu(target) if target is not None else isinstance(args[0], OnGpu) if func is aten.copy_.default else bool(there)

    def wrap(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or isinstance(x, OnGpu):
            return x
        return same.get(id(x)) if id(x) in same else OnGpu(x) if on_gpu else x

    return tree_map(wrap, out)


def _inner(x: Any) -> Any:
    return x.numbers if isinstance(x, OnGpu) else x


class Pretend(TorchDispatchMode):
    """While entered, what is made on the device is there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def tensor(data: Any, *, device: Any = None, requires_grad: bool = False, **kwargs: Any) -> torch.Tensor:
    made = real["tensor"](data, **kwargs)
    return (made if device is None else made.to(device)).requires_grad_(requires_grad)


class Generator(torch.Generator):
    def __new__(cls, device: Any = "cpu") -> Any:
        return real["generator"]("cpu" if is_gpu(device) else device)


def to(module: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
    """As CUDA's, which keeps tied parameters tied."""
    if not is_gpu(torch._C._nn._parse_to(*args, **kwargs)[0]):
        return real["to"](module, *args, **kwargs)
    moved: dict[int, torch.nn.Parameter] = {}
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None and not isinstance(p, OnGpu):
                part._parameters[name] = moved.setdefault(id(p), torch.nn.Parameter(p.detach().to(GPU), p.requires_grad))
        for name, b in part._buffers.items():
            if b is not None and not isinstance(b, OnGpu):
                part._buffers[name] = b.to(GPU)
    return module


torch.tensor, torch.Generator, torch.nn.Module.to, transformers.PreTrainedModel.to = tensor, Generator, to, to
_autocast = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")  # is entered, and casts nothing
_autocast.fallback(torch.library.fallthrough_kernel)
