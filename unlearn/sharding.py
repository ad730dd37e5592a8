"""FSDP2: a model's weights, gradients and optimiser state in shards, one on each process (PyTorch's `fully_shard`).

A shard is a DTensor: it knows what it is a part of. What is not sharded passes through all of this as it is.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import PreTrainedModel


def shard(model: PreTrainedModel) -> None:
    """Split the model's weights over the processes, in place: block by block, and what is around the blocks.

    With one process there is nothing to split.
    """
    state = PartialState()
    if state.num_processes == 1:
        return
    mesh = init_device_mesh(state.device.type, (state.num_processes,))
    for block in blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)  # else its parameters are whole after a forward pass alone


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
    first: dict[int, str] = {}
    same = {name: first.setdefault(id(p), name) for name, p in model.named_parameters(remove_duplicate=False)}
    for name, value in model.state_dict().items():
        key = same.get(name, name)  # not by its storage: empty shards have none, on some processes
        full = gathered[key] if key in gathered else whole(value)
        if keep:
            found[name] = gathered[key] = full.cpu()
        else:
            gathered[key] = full.new_empty(0)
    return found


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all numbers of all processes are finite."""
    state = PartialState()
    bad = torch.tensor(sum(not local(x).isfinite().all() for x in tensors), device=state.device)
    if state.num_processes > 1:
        torch.distributed.all_reduce(bad)
    return not bad.item()
