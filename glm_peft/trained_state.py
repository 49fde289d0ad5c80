"""The numbers that are trained, as a checkpoint keeps them beside or in the adapter, and back."""

from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from glm_peft.checkpoints import ENCODER_NAME, TRAINED_NAME
from glm_peft.errors import UserError


def trained_parameters(model: PreTrainedModel | PeftModel) -> dict[str, torch.Tensor]:
    """By name: everything of a prompt encoder, otherwise every parameter that is trained."""
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return model.prompt_encoder[model.active_adapter].state_dict()
    return {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}


def save_trained_state(model: PreTrainedModel | PeftModel, folder: str | Path) -> None:
    """Write what PEFT's files of the adapter do not tell; a model that is trained as a whole has its own files."""
    name = _file_of(model)
    if name:
        state = {name: value.contiguous() for name, value in trained_parameters(model).items()}
        save_file(state, Path(folder) / name)


def load_trained_state(model: PreTrainedModel | PeftModel, folder: str | Path) -> None:
    """
    Take over what a checkpoint holds.

    Raises:
        UserError: it was written by a run with another method, base or size.
    """
    name, own = _file_of(model), trained_parameters(model)
    saved = _read(model, Path(folder), name)
    if _shapes(saved) != _shapes(own):
        what = "The prefix" if name == ENCODER_NAME else "What was trained"
        raise UserError(
            f"{what} in {folder} has the sizes {_brief(_shapes(saved))}, but this run's has {_brief(_shapes(own))}: "
            f"resume with {_FLAGS[name]} of the run that wrote it."
        )
    with torch.no_grad():
        for key, value in own.items():
            value.copy_(saved[key])


_FLAGS = {
    ENCODER_NAME: "the base, --num_virtual_tokens and --prefix_projection",
    TRAINED_NAME: "the base, --peft_type, --lora_rank and --target_modules",
    None: "the base",
}


def _file_of(model: PreTrainedModel | PeftModel) -> str | None:
    if not isinstance(model, PeftModel):
        return None
    return ENCODER_NAME if model.active_peft_config.is_prompt_learning else TRAINED_NAME


def _read(model: PreTrainedModel | PeftModel, folder: Path, name: str | None) -> dict[str, torch.Tensor]:
    needed = name or "config.json"
    if not (folder / needed).is_file():
        raise UserError(
            f"{folder} was written by a run with another --peft_type (it lacks {needed}): resume with that one."
        )
    if name:
        return load_file(folder / name)
    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype).named_parameters())


def _shapes(state: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}


def _brief(shapes: dict[str, tuple[int, ...]], most: int = 6) -> str:
    return str(shapes) if len(shapes) <= most else f"{dict(list(shapes.items())[:most])} and {len(shapes) - most} more"
