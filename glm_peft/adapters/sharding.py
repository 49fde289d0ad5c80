"""
Gather and shard parameters: those that FSDP2 shards, and the float32 copies that DeepSpeed's ZeRO-2 keeps.

Gathering is a collective operation: every function here must be called in all processes.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor


def gather_values(parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Return the gathered value of each parameter, by name; in float32 where ZeRO-2's optimizer keeps a float32 copy.

    Args:
        parameters: of a model; the tensors of its `state_dict` have no link to that optimizer.
    """
    return {name: _gather(parameter) for name, parameter in parameters.items()}


@torch.no_grad()
def set_values(parameters: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
    """Set each parameter to the gathered value of its name: every process sets the shard that it holds."""
    for name, parameter in parameters.items():
        value = values[name].to(parameter.device)
        parameter.copy_(_shard_like(parameter, value))
        # ZeRO-2's next step would overwrite the parameter from its own copy.
        if _has_master_copy(parameter):
            from deepspeed.utils import safe_set_full_fp32_param

            safe_set_full_fp32_param(parameter, value.float())


def is_sharded(model: nn.Module) -> bool:
    """Return whether a process holds only a shard of the model's parameters."""
    return any(isinstance(value, DTensor) for value in model.parameters())


def gather_optimizer(state: dict[str, Any]) -> dict[str, Any]:
    """Return the gathered state of a sharded optimizer, as a single process would have it."""
    moments = {
        number: {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in moment.items()}
        for number, moment in state["state"].items()
    }
    return state | {"state": moments}


def shard_optimizer(state: dict[str, Any], parameters: list[torch.Tensor]) -> dict[str, Any]:
    """
    Return what this process holds of a gathered optimizer's state: a shard where the parameter is sharded.

    Args:
        parameters: the optimizer's, in its order, by which its state numbers them.
    """
    moments = {
        number: {name: _shard_like(parameters[number], value) for name, value in moment.items()}
        for number, moment in state["state"].items()
    }
    return state | {"state": moments}


def _shard_like(parameter: torch.Tensor, value: Any) -> Any:
    """Shard a tensor of the parameter's shape as the parameter is; return anything else, such as a step, as it is."""
    if not isinstance(parameter, DTensor) or not isinstance(value, torch.Tensor) or value.shape != parameter.shape:
        return value
    value = value.to(parameter.device)
    # Every process read the same file, so none has to send its values to the others.
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


@torch.no_grad()
def _gather(parameter: torch.Tensor) -> torch.Tensor:
    if isinstance(parameter, DTensor):
        return parameter.full_tensor()
    # In bfloat16 the parameter itself is a rounded copy, from which a resumed run would not be the same.
    if _has_master_copy(parameter):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter).view(parameter.shape).clone()
    return parameter.detach()


def _has_master_copy(parameter: torch.Tensor) -> bool:
    """Return whether ZeRO-2's optimizer keeps a float32 copy of the parameter."""
    # Its presence, not its value, which is `None` where this process holds no shard: all must join the collective.
    return parameter.requires_grad and hasattr(parameter, "_hp_mapping")
