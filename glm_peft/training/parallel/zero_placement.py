"""How DeepSpeed's ZeRO-3 gets a base that no GPU could hold as a whole from the machine's memory to the GPUs."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from accelerate import Accelerator


def cut_before_moving(accelerator: Accelerator) -> None:
    """
    Let what ZeRO-3 prepares go to the GPUs parameter by parameter, each process's part of it.

    A model that transformers has not built in parts is moved to each GPU as a whole, and cut there
    (`DeepSpeedEngine._configure_distributed_model`).
    """
    prepare = accelerator._prepare_deepspeed

    @wraps(prepare)
    def prepare_cut(*args: Any) -> tuple[Any, ...]:
        with _cutting(accelerator.device):
            return prepare(*args)

    accelerator._prepare_deepspeed = prepare_cut


@contextmanager
def _cutting(device: torch.device) -> Iterator[None]:
    """Within, `deepspeed.initialize` cuts the model first."""
    import deepspeed

    initialize = deepspeed.initialize

    @wraps(initialize)
    def initialize_cut(*, model: torch.nn.Module, config_params: dict[str, Any], **kwargs: Any) -> Any:
        if not any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
            deepspeed.zero.Init(module=model, config_dict_or_path=config_params)
            _move_buffers(model, device)
        return initialize(model=model, config_params=config_params, **kwargs)

    deepspeed.initialize = initialize_cut
    try:
        yield
    finally:
        deepspeed.initialize = initialize


def _move_buffers(model: torch.nn.Module, device: torch.device) -> None:
    """They are not in parts, and what is cut already DeepSpeed does not move."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
