"""Read what the files of a saved adapter say of it, once, and resolve the arguments of a command by it."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftType
from transformers import PreTrainedConfig

from glm_peft.adapters.base_checks import (
    Origin,
    check_generation,
    check_model_type,
    read_origin,
    resolve_chat_format,
)
from glm_peft.adapters.files import check_sizes, check_width, read_adapter_config
from glm_peft.adapters.published_checkpoints import read_published_sizes
from glm_peft.arguments.data import DataArguments
from glm_peft.arguments.fields import changed, flags_with, require
from glm_peft.arguments.methods import CONTINUED, FULL, LORA, METHODS, PREFIX_TUNING
from glm_peft.arguments.model import ModelArguments, flags_of
from glm_peft.errors import UserError
from glm_peft.hub.connection import set_up_connection
from glm_peft.hub.download import fetch_adapter
from glm_peft.models.folder_kind import A_CHECKPOINT, AN_ADAPTER, check_source
from glm_peft.models.loading import find_generation, load_config
from glm_peft.provenance.record import as_flags

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SavedAdapter:
    """
    An adapter in a folder or on the Hub, before its weights are read.

    Args:
        source: the folder, or the Hub id where no adapter in a known format is there.
        method: the value of `--peft_type`.
        config: PEFT's; `None` for a published P-Tuning v2 checkpoint.
        origin: the base that it was trained on, as far as it is known.
    """

    source: str
    method: str
    config: PeftConfig | None
    origin: Origin


def read_saved_adapter(name_or_path: str, revision: str | None = None, cache_dir: str | None = None) -> SavedAdapter:
    """
    Read an adapter's config and origin from a folder or, after a download, from the Hub.

    Args:
        revision: branch, tag or commit on the Hub; `None` for main.
        cache_dir: folder of downloads; `None` for the Hub's usual cache.

    Raises:
        UserError: there is no adapter of this name, its config cannot be read, its weights are missing, or it is of
            no method that is here.
    """
    hub = {"revision": revision, "cache_dir": cache_dir}
    kind = check_source(name_or_path, "--adapter_name_or_path", AN_ADAPTER, **hub).kind
    source = fetch_adapter(name_or_path, **hub)
    config = None if kind in A_CHECKPOINT else read_adapter_config(source)
    if config and Path(source).is_dir() and not list(Path(source).glob("adapter_model.*")):
        raise UserError(
            f"{source} has an adapter_config.json, but no adapter_model.safetensors: copy all of its files."
        )
    method = PREFIX_TUNING if config is None else config.peft_type.value.lower()
    if method not in METHODS:
        raise UserError(
            f"{source} is of the method {method}, which glm_peft does not have: load it with PEFT itself, or give an "
            f"adapter of {', '.join(name for name in METHODS if name != FULL)}."
        )
    return SavedAdapter(source, method, config, read_origin(source))


def resolve_adapter(model_args: ModelArguments, is_trainable: bool) -> tuple[ModelArguments, SavedAdapter | None]:
    """
    Resolve what is not given by the adapter to load, if one is named: method, prefix length, projection, chat format.

    Args:
        is_trainable: whether training goes on from the adapter; otherwise its projection has no meaning.

    Returns:
        The resolved arguments, and the adapter.

    Raises:
        UserError: there is no such adapter, what is given contradicts it, or the base is of another generation.
    """
    set_up_connection()
    if not model_args.adapter_name_or_path:
        require(
            not model_args.adapter_revision,
            "--adapter_revision is for --adapter_name_or_path",
            model_args.adapter_revision,
        )
        return model_args, None
    adapter = read_saved_adapter(model_args.adapter_name_or_path, model_args.adapter_revision, model_args.cache_dir)
    # From here on the order matters: the base's config is translated by its chat format, and sizes are read off it.
    check_generation(adapter.origin, model_args.model_name_or_path, find_generation(model_args))
    chat_format = resolve_chat_format(adapter.origin, model_args.chat_format)
    # The path becomes the downloaded folder, so that nothing later asks the Hub again.
    decided: dict[str, Any] = {"adapter_name_or_path": adapter.source, "chat_format": chat_format}
    if is_trainable:
        decided["peft_type"] = _resolve_method(adapter, model_args)
    model_args = changed(model_args, **decided)
    config = load_config(model_args)
    # By config and header alone: a wrong base is told in a second, not after minutes of loading.
    check_model_type(adapter.origin, config)
    sizes = _read_sizes(adapter, config, is_trainable)
    _check_given_sizes(adapter, model_args, sizes)
    return changed(model_args, **sizes), adapter


def resolve_prompt(data_args: DataArguments, adapter: SavedAdapter | None) -> DataArguments:
    """
    Resolve what shapes the prompt and is not given as the adapter was trained; warn of what is given and differs.

    Returns:
        The resolved arguments; as they are where no adapter is named, or nothing is recorded of its training.
    """
    recorded = _read_prompt(adapter.origin.prompt) if adapter else {}
    if not recorded:
        return data_args
    left_open = data_args.left_open
    taken = {name: value for name, value in recorded.items() if name in left_open}
    # What is left open follows what is now decided, and a length of evaluation that of training where it is given.
    taken |= dict.fromkeys(left_open - taken.keys())
    if "max_target_length" not in left_open and "val_max_target_length" in left_open:
        taken["val_max_target_length"] = None
    told = {name: value for name, value in taken.items() if value not in (None, getattr(data_args, name))}
    if told:
        logger.info("As %s was trained: %s", adapter.source, as_flags(told))
    _warn_of_other_prompt(data_args, adapter.source, recorded)
    return changed(data_args, **taken)


def _warn_of_other_prompt(data_args: DataArguments, source: str, recorded: Mapping[str, Any]) -> None:
    given = {name: getattr(data_args, name) for name in recorded.keys() - data_args.left_open}
    differing = [name for name in recorded if name in given and (given[name] or None) != recorded[name]]
    if differing:
        there, here = ({name: values[name] for name in differing} for values in (recorded, given))
        logger.warning(
            f"{source} was trained with {as_flags(there)}, and {as_flags(here)} is given: leave it out, or expect "
            "answers worse than its scores."
        )


def _read_prompt(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is recorded of the flags that shape the prompt; what has another form counts as not recorded."""
    unset = DataArguments()
    kinds = {name: type(getattr(unset, name) or "") for name in flags_with(unset, "shapes_prompt")}
    known = {name: recorded[name] or None for name in kinds if name in recorded}
    return {name: value for name, value in known.items() if value is None or isinstance(value, kinds[name])}


def _resolve_method(adapter: SavedAdapter, model_args: ModelArguments) -> str:
    """Return the method that training goes on with, the adapter's; its rank and layers are the adapter's, too."""
    check_continuable(adapter)
    # The same method may be given again, as a recipe does that serves the first run and the next.
    if model_args.peft_type not in (None, adapter.method):
        raise UserError(
            f"--peft_type {model_args.peft_type} contradicts --adapter_name_or_path {adapter.source}, which is a "
            f"{adapter.method} adapter: leave one of the two out."
        )
    for name in flags_of(LORA):  # refused even where equal: the adapter's config decides them
        if getattr(model_args, name):
            raise UserError(f"--{name} is for a new adapter: leave it out, or --adapter_name_or_path.")
    return adapter.method


def check_continuable(adapter: SavedAdapter) -> None:
    """Raise a `UserError` where the files of an adapter do not hold all that training needs to go on."""
    if adapter.method not in CONTINUED:
        raise UserError(
            f"{adapter.source} is of the method {adapter.method}, from which training cannot go on, as its files do "
            f"not hold all of it: give one of {', '.join(CONTINUED)}, or start anew."
        )


def _read_sizes(adapter: SavedAdapter, config: PreTrainedConfig, is_trainable: bool) -> dict[str, Any]:
    """Return the sizes that the adapter decides, by the names of the arguments; none for LoRA and its kin."""
    if adapter.config is None:  # a published checkpoint, whose own tensors tell
        num_virtual_tokens, width, encoder_hidden_size = read_published_sizes(adapter.source)
        check_width(width, config, adapter.source)
    else:
        num_virtual_tokens, encoder_hidden_size = getattr(adapter.config, "num_virtual_tokens", None), None
        if adapter.config.peft_type == PeftType.PROMPT_TUNING and is_trainable:
            return {"num_virtual_tokens": num_virtual_tokens}
        if adapter.config.peft_type != PeftType.PREFIX_TUNING:
            return {}  # PEFT itself checks the shapes of adapters inside the layers
        check_sizes(adapter.config, config, adapter.source)
    sizes: dict[str, Any] = {"num_virtual_tokens": num_virtual_tokens}
    # PEFT saves of a projection only its result, so training goes on without; ChatGLM-6B's published one can go on.
    if is_trainable:
        sizes |= {"prefix_projection": encoder_hidden_size is not None, "encoder_hidden_size": encoder_hidden_size}
    return sizes


def _check_given_sizes(adapter: SavedAdapter, model_args: ModelArguments, sizes: dict[str, Any]) -> None:
    for name, found in sizes.items():
        given = getattr(model_args, name)
        if given not in (None, found):
            projected = "" if name == "num_virtual_tokens" else " (of a projection PEFT keeps only the result)"
            raise UserError(
                f"--{name} {_as_typed(given)} contradicts --adapter_name_or_path {adapter.source}, which goes "
                f"on with {name} {_as_typed(found)}{projected}: leave one of the two out."
            )


def _as_typed(value: Any) -> str:  # as a command line spells it
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
