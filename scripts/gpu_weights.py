"""Draws the weights of a base on its device, where its folder has none."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel


@contextmanager
def drawn_weights() -> Iterator[None]:
    """Let bases be loaded with weights that are drawn on their device, where their folders have none."""
    load = AutoModelForCausalLM.from_pretrained

    def draw(
        name: str, config: PreTrainedConfig, device_map: dict[str, Any], dtype: torch.dtype, **kwargs: Any
    ) -> tuple[PreTrainedModel, dict[str, Any]]:
        if any(Path(name).glob("*.safetensors")):
            return load(name, config=config, device_map=device_map, dtype=dtype, **kwargs)
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config)
        options = {"dtype": dtype, "device": device_map[""]}
        state = {key: torch.ones(value.shape, **options) for key, value in empty.state_dict().items()}
        for key, value in state.items():
            if "norm" not in key:
                value.normal_(0, 0.02)
        kwargs |= {"config": config, "device_map": device_map, "dtype": dtype}
        model, info = type(empty).from_pretrained(None, state_dict=state, **kwargs)
        model.config.name_or_path = name
        return model, info

    unchecked = patch("glm_peft.models.loading.check_base_weights")  # of which there are none
    with patch.object(AutoModelForCausalLM, "from_pretrained", draw), unchecked:
        yield
