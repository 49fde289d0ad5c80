"""Turn arguments into generation settings, and settings into the config that `generate` takes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from glm_peft.errors import UserError
from glm_peft.models.chat_formats import ChatFormat

FEWEST_ROWS, MOST_ROWS = 8, 64  # of a batch whose size nobody gave
CACHE_BYTES = 1 << 30  # what its keys and values may take on a CPU
CACHE_SHARE = 1 / 8  # and of a GPU's memory

_SAMPLING = ("top_p", "top_k", "temperature")
# Where --max_new_tokens is not given, an answer may be as long as those of the data.
_OTHER_FLAGS = {
    "batch_size": ("per_device_eval_batch_size",),
    "max_new_tokens": ("max_new_tokens", "val_max_target_length", "max_target_length"),
}


@dataclass(frozen=True)
class GenerationSettings:
    """
    Settings by which answers are generated and prompts are put into batches.

    Args:
        max_new_tokens: the most tokens that an answer may have, its end token counted.
        do_sample: draw each token from the `top_k` most likely ones, of those the likeliest that together have the
            probability `top_p`, at `temperature`; off, the most likely token is taken, and the three have no effect.
        num_beams: number of beams; 1 is no beam search.
        seed: of the draws. Each batch has its own, made of this one and of the batch's first row.
        batch_size: rows in a batch; `None` for the size that `choose_batch_size` chooses.
        max_batch_tokens: instead of `batch_size`, the most tokens in a batch: rows * `num_beams` * (longest prompt +
            `max_new_tokens`). A row that is larger by itself is a batch by itself.

    Raises:
        UserError: for a value out of range.
    """

    max_new_tokens: int = 128
    do_sample: bool = False
    top_p: float = 0.7
    top_k: int = 50
    temperature: float = 0.95
    num_beams: int = 1
    seed: int = 42
    batch_size: int | None = None
    max_batch_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_beams", "batch_size", "max_batch_tokens"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"{name} is {value}: give 1 or more.")
        _require(0 < self.top_p <= 1, f"top_p is {self.top_p}: give a probability above 0 and up to 1.")
        _require(self.top_k >= 0, f"top_k is {self.top_k}: give a number of tokens, or 0 for all of them.")
        _require(self.temperature > 0, f"temperature is {self.temperature}: give a number above 0.")

    @classmethod
    def from_arguments(cls, *sources: Any) -> "GenerationSettings":
        """
        Collect the settings from argument dataclasses, each from the first that has a field of its name with a value.

        `batch_size` is called `per_device_eval_batch_size` there, and where there is no `max_new_tokens`, an answer
        may be as long as those of the data: `val_max_target_length` or else `max_target_length`.

        Raises:
            UserError: for a value out of range.
        """
        flags = {name: (name,) for name in cls.__dataclass_fields__} | _OTHER_FLAGS
        found = {name: _first_value(sources, names) for name, names in flags.items()}
        given = {name: value for name, value in found.items() if value is not None}
        return cls(**given)


def choose_batch_size(
    settings: GenerationSettings, model: PreTrainedModel | PeftModel, lengths: Sequence[int]
) -> GenerationSettings:
    """
    Choose a `batch_size` where the settings say nothing of batches.

    It is as many rows, 8 to 64, as have their keys and values in 1 GiB, or in an eighth of the GPU's memory; above 8
    no more than half of each process's rows.

    Args:
        lengths: of all prompts, in tokens.
    """
    if settings.batch_size or settings.max_batch_tokens:
        return settings
    batch_size = FEWEST_ROWS
    # Drawn answers depend on their batches, so there the size must not depend on the number of processes.
    processes = 1 if settings.do_sample else PartialState().num_processes
    half = len(lengths) // (2 * processes)  # two batches at least, or a stopped run would have kept nothing
    if half > FEWEST_ROWS:
        fitting = _cache_bytes(model.device) // _row_bytes(settings, model, max(lengths))
        batch_size = max(min(fitting, half, MOST_ROWS), FEWEST_ROWS)
    return replace(settings, batch_size=batch_size)


def _row_bytes(settings: GenerationSettings, model: PreTrainedModel | PeftModel, longest: int) -> int:
    """Compute the bytes of a row's keys and values when it is as long as it can get."""
    tokens = num_virtual_tokens(model) + longest + settings.max_new_tokens
    return token_bytes(model) * tokens * settings.num_beams


def token_bytes(model: PreTrainedModel | PeftModel) -> int:
    """Return the bytes of one token's keys and values in all layers."""
    config = model.config
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize


def _cache_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return CACHE_BYTES
    return int(torch.cuda.get_device_properties(device).total_memory * CACHE_SHARE)


def num_virtual_tokens(model: PreTrainedModel | PeftModel) -> int:
    """Return how many virtual tokens the model's adapter puts before a prompt."""
    return getattr(model.active_peft_config, "num_virtual_tokens", 0) if isinstance(model, PeftModel) else 0


def build_generation_config(
    tokenizer: PreTrainedTokenizerBase, chat_format: ChatFormat, settings: GenerationSettings
) -> GenerationConfig:
    """Build the config for `generate`, with every token that ends an answer of this generation."""
    # transformers warns about sampling values beside greedy decoding.
    sampling = {name: getattr(settings, name) for name in _SAMPLING if settings.do_sample}
    return GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        do_sample=settings.do_sample,
        num_beams=settings.num_beams,
        eos_token_id=chat_format.stop_token_ids(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,  # PEFT passes a prefix to `generate` as the beginning of the cache
        **sampling,
    )


def _first_value(sources: Sequence[Any], names: Sequence[str]) -> Any:
    values = (getattr(source, name, None) for name in names for source in sources)
    return next((value for value in values if value is not None), None)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(message)
