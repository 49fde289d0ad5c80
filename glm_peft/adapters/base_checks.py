"""Compare a base with the one that an adapter was trained on: another network or other weights are refused."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isclose
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from glm_peft.arguments.model import ModelArguments
from glm_peft.errors import UserError
from glm_peft.models.generations import generation_by_fields, generation_of_name
from glm_peft.models.loading import read_config
from glm_peft.models.tokenization_common import read_json_beside
from glm_peft.provenance.fingerprints import describe_config, digest_tokenizer, sample_weights
from glm_peft.provenance.record import as_mapping, read_provenance

logger = logging.getLogger(__name__)

# A base may be saved again in bfloat16, which keeps 8 binary digits.
_ROUNDING = {"rel_tol": 0.005, "abs_tol": 1e-7}
_LONGEST = 200  # characters of a text that somebody else's file puts into our messages
_ADVICE = "load it on the base that it was trained on, or expect answers worse than its scores"


@dataclass(frozen=True)
class Origin:
    """
    The base that an adapter was trained on, as far as the adapter's files say; `None` or empty for the rest.

    Args:
        adapter: the folder or Hub id of the adapter.
        base: the name of the base.
        is_recorded: whether `provenance.json` tells the generation; otherwise it is guessed from the base's name.
        tokenizer: sha256 of the tokenizer, see `digest_tokenizer`.
        weights: some values of the weights by parameter, see `sample_weights`.
        prompt: what shaped the prompts, by flag, see `describe_prompt`.
    """

    adapter: str
    base: str | None = None
    generation: str | None = None
    is_recorded: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None
    weights: Mapping[str, Any] = field(default_factory=dict)
    chat_format: str | None = None
    prompt: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sentence(self) -> str:
        """Return the beginning of every message about another base."""
        return f"The adapter in {self.adapter} was trained on {self.base}"


def read_origin(adapter_name_or_path: str) -> Origin:
    """Read an adapter's origin from its `provenance.json`, or else from its `adapter_config.json` or `config.json`."""
    record = read_provenance(adapter_name_or_path)
    base = record.get("base")
    if not isinstance(base, dict):
        return _read_recorded_name(adapter_name_or_path)
    return Origin(
        adapter_name_or_path,
        base=_text(base.get("name")),
        generation=_text(base.get("generation")),
        is_recorded=True,
        config=as_mapping(base.get("config")),
        tokenizer=_text(base.get("tokenizer_sha256")),
        weights=as_mapping(base.get("weights_sample")),
        chat_format=_text(record.get("chat_format")),
        prompt=as_mapping(record.get("prompt", record.get("recipe"))),  # earlier versions have the recipe alone
    )


def check_generation(origin: Origin, base: str, generation: str | None) -> None:
    """
    Refuse a base of another generation, or warn where the adapter's is only guessed from a name.

    Raises:
        UserError: the adapter's record names another generation than the base has.
    """
    if None in (origin.generation, generation) or origin.generation == generation:  # None: not known
        return
    sentence = (
        f"{origin.sentence}, of the generation {origin.generation}, but {base} is "
        f"of {generation}: load it on the base that it was trained on."
    )
    if origin.is_recorded:
        raise UserError(sentence)
    logger.warning(sentence)


def check_model_type(origin: Origin, config: PreTrainedConfig) -> None:
    """Raise a `UserError` where the adapter was trained on another architecture."""
    trained_on = origin.config.get("model_type", config.model_type)
    if trained_on != config.model_type:
        raise UserError(
            f"{origin.sentence}, of type {trained_on}, but {config.name_or_path} "
            f"is of {config.model_type}: load it on the base that it was trained on."
        )


def check_config(origin: Origin, config: PreTrainedConfig) -> None:
    """Warn of a base whose config has other values in the fields that decide what the network computes."""
    # Not refused, as revisions of the same weights may differ in their length or end token.
    own = describe_config(config)
    differing = [name for name in own.keys() | origin.config.keys() if own.get(name) != origin.config.get(name)]
    if not origin.config or not differing:  # an adapter of stock PEFT has no record to compare with
        return
    described = ", ".join(
        f"{name} {origin.config.get(name)} there, {own.get(name)} here" for name in sorted(differing)
    )
    logger.warning(f"{origin.sentence}, and the config of {config.name_or_path} differs ({described}): {_ADVICE}.")


def check_weights(origin: Origin, model: PreTrainedModel, is_allowed: bool = False) -> None:
    """
    Refuse a base with other weights, or warn where that is allowed; quantized parameters are not compared.

    Raises:
        UserError: a value that was recorded of the base's weights is another one here, and that is not allowed.
    """
    if not origin.weights:
        return
    own = sample_weights(model)
    # Only names on both sides: quantized parameters, and those that another process holds, have no sample.
    differing = [
        name for name in own.keys() & origin.weights.keys() if not _are_close(own[name], origin.weights[name])
    ]
    if not differing:
        return
    found = f"{origin.sentence}, and {model.config.name_or_path} has other weights (such as {min(differing)})"
    if not is_allowed:
        raise UserError(f"{found}: load it on the base that it was trained on, or give --allow_other_base.")
    logger.warning(f"{found}: {_ADVICE}.")


def check_tokenizer(origin: Origin, tokenizer: PreTrainedTokenizerBase) -> None:
    """Warn of a tokenizer with another vocabulary, other special ids or another way to cut a text."""
    if origin.tokenizer is None:
        return
    own = digest_tokenizer(tokenizer)
    if own != origin.tokenizer:
        logger.warning(
            f"The adapter in {origin.adapter} was trained with the tokenizer of {origin.base}, and that of "
            f"{tokenizer.name_or_path} gives other ids (sha256 {origin.tokenizer[:12]} there, {own[:12]} here): "
            f"{_ADVICE}."
        )


def resolve_chat_format(origin: Origin, given: str | None) -> str | None:
    """
    Return the chat format that is given, or else the one that the adapter was trained with; warn where they differ.

    Args:
        given: the value of `--chat_format`.
    """
    if origin.chat_format is None or given == origin.chat_format:
        return given
    if given is None:
        logger.info("Prompts of %s, as %s was trained with", origin.chat_format, origin.adapter)
        return origin.chat_format
    logger.warning(
        f"The adapter in {origin.adapter} was trained with --chat_format {origin.chat_format}, and {given} is given: "
        "leave it out, or expect answers worse than its scores."
    )
    return given


def _read_recorded_name(adapter: str) -> Origin:
    """Read what stock PEFT or the published scripts wrote of the base, where there is no `provenance.json`."""
    try:
        # PEFT's config names the base; a published checkpoint's config.json is the base's own with two fields more.
        name = read_json_beside(adapter, "adapter_config.json").get("base_model_name_or_path")
        config = {} if name else read_json_beside(adapter, "config.json")
    except (OSError, ValueError, AttributeError):
        return Origin(adapter)  # loading the adapter says what is wrong
    name = _text(name or config.get("_name_or_path"))
    generation = generation_of_name(name) or generation_by_fields(config)  # a guess, so it is not `is_recorded`
    return Origin(adapter, name, generation=generation, config=_read_config(adapter, generation) if config else {})


def _read_config(folder: str, generation: str | None) -> dict[str, Any]:
    try:
        return describe_config(read_config(ModelArguments(folder, chat_format=generation)))
    except UserError:
        return {}  # it has no base's config in it


def _are_close(own: list[float], recorded: Any) -> bool:
    # A record that somebody edited proves nothing against the base, so what is no list of numbers counts as close.
    is_comparable = isinstance(recorded, list) and all(isinstance(value, int | float) for value in recorded)
    return not is_comparable or all(isclose(a, b, **_ROUNDING) for a, b in zip(own, recorded, strict=False))


def _text(value: Any) -> str | None:
    """Return a recorded text cut to fit on one line of an error message."""
    return " ".join(value.split())[:_LONGEST] if isinstance(value, str) else None
