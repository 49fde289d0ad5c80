"""Save the trained parameters in a checkpoint, beside or in the adapter, and load them from it."""

import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from accelerate import PartialState
from peft import PeftModel, PeftType, PrefixEncoder, PromptEncoder
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from glm_peft.adapters.sharding import gather_values, is_sharded, set_values
from glm_peft.errors import UserError
from glm_peft.provenance.ownership import digest_weights, set_aside_results

_CONFIGS = ("adapter_config.json", "config.json")
ENCODER_NAME = "prefix_encoder.safetensors"
TRAINED_NAME = "trained_parameters.safetensors"
"""Files of the trained parameters, as PEFT's hold but the result of a prompt encoder: of virtual tokens, of others."""

_ENCODERS = {PeftType.PREFIX_TUNING: PrefixEncoder, PeftType.P_TUNING: PromptEncoder}


def gather_trained(model: PreTrainedModel | PeftModel) -> dict[str, torch.Tensor]:
    """Return the gathered parameters of a prompt encoder, or else all trained parameters, by name."""
    return gather_values(_trained_parameters(model))


def save_weights(
    model: PreTrainedModel | PeftModel, trained: dict[str, torch.Tensor], save: Callable[..., None]
) -> None:
    """
    Let `save` write the adapter, or the model where all of it is trained.

    Args:
        trained: what `gather_trained` returned.
        save: is called with a state dict, or with `None` for the model's own.
    """
    if not isinstance(model, PeftModel):
        save(trained if is_sharded(model) else None)
        return
    if not model.active_peft_config.is_prompt_learning:
        save(trained)
        return
    # PEFT would run the model's own encoder, of which a process may hold only a shard, in process 0 alone.
    model.get_prompt_embedding_to_save = lambda adapter_name: _flat_prompt(model, trained).cpu()
    try:
        save({})  # PEFT takes a prompt from the method above, and nothing from the state dict
    finally:
        del model.get_prompt_embedding_to_save


def save_trained_state(
    model: PreTrainedModel | PeftModel, trained: dict[str, torch.Tensor], folder: str | Path
) -> None:
    """Write what PEFT's files of the adapter lack; a model all of which is trained needs no further file."""
    name = _file_of(model)
    if name:
        save_file({name: value.contiguous() for name, value in trained.items()}, Path(folder) / name)


def load_trained_state(model: PreTrainedModel | PeftModel, folder: str | Path) -> None:
    """
    Set the trained parameters to those of a checkpoint.

    Raises:
        UserError: it was written by a run with another method, base or size.
    """
    name, own = _file_of(model), _trained_parameters(model)
    saved = _read(model, Path(folder), name)
    # Before anything is set: one sentence on all sizes, and a model that is not half another run's.
    if _shapes(saved) != _shapes(own):
        what = "The prefix" if name == ENCODER_NAME else "What was trained"
        raise UserError(
            f"{what} in {folder} has the sizes {_brief(_shapes(saved))}, but this run's has {_brief(_shapes(own))}: "
            f"resume with {_FLAGS[name]} of the run that wrote it."
        )
    set_values(own, saved)


_FLAGS = {
    ENCODER_NAME: "the base, --num_virtual_tokens and --prefix_projection",
    TRAINED_NAME: "the base, --peft_type, --lora_rank and --target_modules",
    None: "the base",
}


def _trained_parameters(model: PreTrainedModel | PeftModel) -> dict[str, torch.Tensor]:
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return dict(model.prompt_encoder[model.active_adapter].named_parameters())
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


@torch.no_grad()
def _flat_prompt(model: PeftModel, trained: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return what PEFT saves of a prompt encoder, [P, width], computed from its gathered parameters."""
    config = model.active_peft_config
    if trained.keys() == {"embedding.weight"}:
        return trained["embedding.weight"]  # without a projection the embedding is what PEFT saves
    with torch.device("meta"):  # draws no random numbers, or a run that saves more often would train otherwise
        encoder = _ENCODERS[config.peft_type](config)
    encoder.load_state_dict(trained, assign=True)
    return encoder(torch.arange(encoder.embedding.num_embeddings, device=trained["embedding.weight"].device))


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


def save_adapter(
    model: PreTrainedModel | PeftModel, output_dir: str | Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> str | None:
    """
    Write `adapter_config.json` and `adapter_model.safetensors`, without the base; must be called in every process.

    A model all of which was trained is written as a model's folder. The results of former weights are set aside.

    Returns:
        The digest of the weights; `None` in processes other than the main one.
    """
    trained = gather_trained(model)
    if not PartialState().is_main_process:
        return None
    former = digest_weights(output_dir)
    save_weights(model, trained, lambda state_dict: model.save_pretrained(output_dir, state_dict=state_dict))
    tidy_weights(Path(output_dir))
    if tokenizer is not None:
        tokenizer.save_pretrained(output_dir)
    return set_aside_results(output_dir, former, curves=None)  # the curves were drawn when training ended


def tidy_weights(folder: Path) -> None:
    """Remove PEFT's card, an empty template, and give the weights the permissions of the config."""
    card = folder / "README.md"
    if card.is_file() and "[More Information Needed]" in card.read_text(encoding="utf-8"):
        card.unlink()
    config = next((path for path in map(folder.joinpath, _CONFIGS) if path.is_file()), None)
    for file in folder.glob("*.safetensors") if config else []:  # safetensors lets only the owner read
        with suppress(OSError):
            file.chmod(stat.S_IMODE(config.stat().st_mode))
