"""
Parameters that several processes hold in parts: FSDP2 and DeepSpeed's ZeRO.

The trained numbers are put together whenever they are saved or looked at, and the base's head where the loss is
computed. What is gathered is gathered by all processes together: every function here is to be called in all of them.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor


def gather_values(parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    The whole of each parameter, by name; in full precision where an optimizer of ZeRO has it so.

    Args:
        parameters: of a model, not values of its `state_dict`, which do not tell where the other parts are.
    """
    return {name: _whole(parameter) for name, parameter in parameters.items()}


@torch.no_grad()
def set_values(parameters: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
    """Each parameter takes over the whole value of its name: every process the part that it holds."""
    for name, parameter in parameters.items():
        value = values[name].to(parameter.device)
        with _gathered([parameter], is_changed=True):
            parameter.copy_(_cut_like(parameter, value))
        if _has_master_copy(parameter):
            from deepspeed.utils import safe_set_full_fp32_param

            safe_set_full_fp32_param(parameter, value.float())


def whole_shape(parameter: torch.Tensor) -> torch.Size:
    """That of a parameter when it is put together."""
    return getattr(parameter, "ds_shape", parameter.shape)


def is_in_parts(model: nn.Module) -> bool:
    """Whether a process holds a part of the model's parameters only (FSDP2, ZeRO-3)."""
    return any(isinstance(value, DTensor) or _is_of_zero_3(value) for value in model.parameters())


def gather_optimizer(state: dict[str, Any]) -> dict[str, Any]:
    """The state of an optimizer under FSDP2 as it is in one process."""
    moments = {
        number: {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in moment.items()}
        for number, moment in state["state"].items()
    }
    return state | {"state": moments}


def cut_optimizer(state: dict[str, Any], parameters: list[torch.Tensor]) -> dict[str, Any]:
    """
    The other way: what this process holds of each moment that belongs to a parameter in parts.

    Args:
        parameters: those of the optimizer, in its order.
    """
    moments = {
        number: {name: _cut_like(parameters[number], value) for name, value in moment.items()}
        for number, moment in state["state"].items()
    }
    return state | {"state": moments}


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """The module's own parameters are whole within; for what is not called as a module, whose hooks see to it."""
    with _gathered(list(module.parameters())):
        yield


def _cut_like(parameter: torch.Tensor, value: Any) -> Any:
    """A whole tensor of the parameter's shape in the parts of the parameter; anything else as it is."""
    if not isinstance(parameter, DTensor) or not isinstance(value, torch.Tensor) or value.shape != parameter.shape:
        return value
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


@torch.no_grad()
def _whole(parameter: torch.Tensor) -> torch.Tensor:
    if isinstance(parameter, DTensor):
        return parameter.full_tensor()
    if _has_master_copy(parameter):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter).view(whole_shape(parameter)).clone()
    with _gathered([parameter]):
        return parameter.detach().clone() if _is_of_zero_3(parameter) else parameter.detach()


@contextmanager
def _gathered(parameters: list[torch.Tensor], is_changed: bool = False) -> Iterator[None]:
    """Within it, parameters of ZeRO-3 are whole; what process 0 writes to them is everyone's afterwards."""
    if not any(_is_of_zero_3(parameter) for parameter in parameters):
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(parameters, modifier_rank=0 if is_changed else None):
        yield


def _is_of_zero_3(parameter: torch.Tensor) -> bool:
    return hasattr(parameter, "ds_id")


def _has_master_copy(parameter: torch.Tensor) -> bool:
    """Whether an optimizer of ZeRO keeps the numbers that are trained apart from the parameter."""
    if not parameter.requires_grad:
        return False
    # A process may hold no part of it: what `_hp_mapping` is differs among them, that it is there does not.
    return hasattr(parameter, "_z3_optimizer") or hasattr(parameter, "_hp_mapping")
