"""Decide how long the prefix of a text is, and let it start as the text."""

import logging
from dataclasses import replace

import torch
from peft import PeftModel

from glm_peft.adapters.assembly import OpenedBase
from glm_peft.adapters.prefix_initialization import freeze_first_tokens, initialize_from_text
from glm_peft.arguments.distil import DistilArguments
from glm_peft.arguments.fields import changed
from glm_peft.distillation.reading import Reading, encode_text, reads_both_ways

logger = logging.getLogger(__name__)

_CHUNK = 32  # tokens that stay together where a prefix starts from parts of the text


def resolve_length(base: OpenedBase, reading: Reading) -> OpenedBase:
    """Return the base with a prefix that is not longer than the text, and warn where it was to be."""
    given, num_tokens = base.model_args.num_virtual_tokens, reading.num_tokens
    if base.adapter or given <= num_tokens:
        return base
    is_same = len(reading.texts) == 1 and not reads_both_ways(base)
    exact = ": as long as they are, a prefix is the documents themselves" if is_same else ""
    logger.warning(
        "--num_virtual_tokens %d is more than the documents have, and becomes %d%s.", given, num_tokens, exact
    )
    return replace(base, model_args=changed(base.model_args, num_virtual_tokens=num_tokens))


def is_exact(base: OpenedBase, reading: Reading) -> bool:
    """Whether the prefix that starts as the text is the text itself, so that there is nothing to learn."""
    is_whole = len(reading.texts) == 1 and base.model_args.num_virtual_tokens == reading.num_tokens
    return is_whole and _starts_as_text(base) and not reads_both_ways(base)


def start_as_text(student: PeftModel, base: OpenedBase, reading: Reading, distil_args: DistilArguments) -> None:
    """Initialize a new prefix with keys and values of the text, and freeze its first tokens."""
    if _starts_as_text(base):
        ids, length = encode_text(base, reading.text), base.model_args.num_virtual_tokens
        initialize_from_text(student, spread(ids, length) if distil_args.prefix_start == "chunks" else ids[:length])
    freeze_first_tokens(student, distil_args.num_frozen_tokens)


def _starts_as_text(base: OpenedBase) -> bool:
    return not base.model_args.prefix_init and not base.adapter


def spread(ids: list[int], length: int) -> list[int]:
    """Return `length` ids in stretches from all over the text, the first of them first."""
    number = -(-length // _CHUNK)
    starts = torch.linspace(0, max(len(ids) - _CHUNK, 0), number).long().tolist()
    chosen = [id_ for start in starts for id_ in ids[start : start + _CHUNK]]
    return chosen[:length]
