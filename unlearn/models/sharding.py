"""FSDP2: a model's weights, gradients and optimiser state in shards, one on each process (PyTorch's `fully_shard`).

A shard is a DTensor: it knows what it is a part of. What is not sharded passes through all of this as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import PreTrainedModel

SPARE = 4 * 2**30  # bytes that any GPU has


def shard(model: PreTrainedModel, bf16: bool = False) -> None:
    """Split the model's weights over the processes, in place: block by block, and what is around the blocks.

    With one process there is nothing to split.

    Args:
        bf16: the model is run under bfloat16 autocast. Its blocks are then gathered in bfloat16, and their gradients added up
            in float32: autocast's own copies of the weights would be kept, whole, from the forward to the backward pass.
    """
    state = PartialState()
    if state.num_processes == 1:
        return
    mesh = init_device_mesh(state.device.type, (state.num_processes,))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    for block in blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # resharded after its forward pass, else its parameters are whole after one without a backward pass
    fully_shard(model, mesh=mesh, reshard_after_forward=True, mp_policy=policy)


def blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The text model's layers: of the lists of as many modules as its configuration counts, the one with most weights.

    Beside it may stand a vision model as deep, or as many small modules (a projection for each layer).
    """
    depth = model.config.get_text_config().num_hidden_layers
    for part in (model.get_decoder(), model):
        lists = [m for m in part.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
        if lists:
            sizes = [sum(p.numel() for p in found.parameters()) for found in lists]
            return list(lists[sizes.index(max(sizes))])
    return []


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def local(x: Tensor) -> Tensor:
    """This process's part."""
    return x.to_local() if isinstance(x, DTensor) else x


def whole(x: Tensor) -> Tensor:
    """All parts together; every process has to call it."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def like(parameter: Tensor, full: Tensor) -> Tensor:
    """A whole tensor laid out as the parameter is, in its precision and on its device."""
    full = full.detach().to(parameter.device, parameter.dtype)
    if not isinstance(parameter, DTensor):
        return full
    return distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)


def zeros(parameter: Tensor, stack: tuple[int, ...], dtype: torch.dtype, offload: bool = False) -> Tensor:
    """(*stack, *parameter.shape) zeros, split over the processes as the parameter is; `offload`: in CPU memory."""
    here = local(parameter)
    if not isinstance(parameter, DTensor):
        device = "cpu" if offload else here.device
        return torch.zeros((*stack, *here.shape), dtype=dtype, device=device, pin_memory=offload and here.is_cuda)
    found = here.new_zeros((*stack, *here.shape), dtype=dtype)
    shape = torch.Size((*stack, *parameter.shape))
    placements = [Shard(len(stack))]
    strides = torch.empty(shape, device="meta").stride()
    made = DTensor.from_local(found, parameter.device_mesh, placements, run_check=False, shape=shape, stride=strides)
    return made.cpu() if offload else made


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict, whole, on the main process; every process has to call it, and the others get an empty one."""
    if not is_sharded(model):
        return model.state_dict()
    keep = PartialState().is_main_process
    found = {}
    gathered: dict[str, Tensor] = {}  # tied weights once, so that they stay one tensor
    first = first_names(model)
    for name, value in model.state_dict().items():
        once = first.get(name, name)
        if once not in gathered:
            full = whole(value)
            gathered[once] = full.cpu() if keep else full.new_empty(0)
        if keep:
            found[name] = gathered[once]
    return found


def first_names(model: nn.Module) -> dict[str, str]:
    """Each parameter's names -> the first of them; by the modules that share it, for shards may all be empty."""
    first: dict[nn.Parameter, str] = {}
    return {name: first.setdefault(parameter, name) for name, parameter in model.named_parameters(remove_duplicate=False)}


def few_are_trained(model: nn.Module) -> bool:
    """Whether the trained weights' gradients, whole and in float32, take no more than this process's shards, or `SPARE`.

    Then micro-batches' gradients are added up whole and reduced once a step. Else each micro-batch's are reduced to shards:
    whole ones, 4 bytes a parameter on each process, are what a model is in shards to do without.
    """
    held = sum(p.numel() * p.element_size() for p in model.parameters()) / PartialState().num_processes
    return 4 * sum(p.numel() for p in model.parameters() if p.requires_grad) <= max(held, SPARE)


@contextmanager
def unreduced(model: nn.Module) -> Iterator[None]:
    """While entered, backward passes leave each process its own gradients, whole."""
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all numbers of all processes are finite."""
    state = PartialState()
    bad = torch.tensor(sum(not local(x).isfinite().all() for x in tensors), device=state.device)
    if state.num_processes > 1:
        torch.distributed.all_reduce(bad)
    return not bad.item()
