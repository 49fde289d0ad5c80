"""
Let the base read a text in front of its prompts, and take the text apart where it is too long.

What stands in front is itself a prefix, and an exact one: the keys and values of the text. So a model that reads is a
base with a prefix adapter, and all that works with a prefix, such as batches and packing, works with a text, which is
computed once. ChatGLM-6B reads its prompt in both directions, so there the text stands in each prompt.
"""

import logging
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from transformers import PreTrainedModel

from glm_peft.adapters.assembly import OpenedBase
from glm_peft.adapters.loading import put_prefix_on
from glm_peft.adapters.prefix_attention import attach_prefix_attention
from glm_peft.adapters.prefix_initialization import keys_and_values
from glm_peft.arguments.distil import DistilArguments
from glm_peft.errors import UserError
from glm_peft.models.generations import CHATGLM
from glm_peft.models.shortening import Message
from glm_peft.prediction.evaluation import Answering
from glm_peft.preprocessing.prompt_shape import shape_prompt

logger = logging.getLogger(__name__)

_FRAME_TOKENS = 8  # special tokens around a text, and its role
_UNITS = re.compile(r"[^\n。！？.!?]*[\n。！？.!?]*")


@dataclass(frozen=True)
class Reader:
    """
    A base that has a text in front of it.

    Args:
        base: its tokenizer and chat format.
        answering: generates its answers.
        text: what it reads; nothing for a reader that only is asked.
        num_tokens: of the text, as it stands in front.
    """

    base: OpenedBase
    answering: Answering
    text: str
    num_tokens: int

    def encode(self, messages: list[Message]) -> list[int]:
        """Encode a conversation up to its question."""
        messages = shape_prompt(messages, self.base.data_args)
        if self.text and reads_both_ways(self.base):
            messages = [{"role": "system", "content": self.text}, *messages]
        return self.base.chat_format.encode_prompt(self.base.tokenizer, messages).ids


def open_reader(base: OpenedBase, model: PreTrainedModel, text: str) -> Reader:
    """
    Put a text in front of a base.

    Args:
        base: opened.
        model: its loaded weights; the reader is a model around them.
        text: what it is to read.
    """
    ids = encode_text(base, text)
    if not reads_both_ways(base):
        model = put_prefix_on(model, keys_and_values(model, torch.tensor([ids], device=model.device)))
        attach_prefix_attention(model)
    return Reader(base, Answering(model, base.tokenizer, base.chat_format), text, len(ids))


def encode_text(base: OpenedBase, text: str) -> list[int]:
    """
    Encode a text as it stands in front of a prompt: as the system message, where the chat format has one.

    The prompt behind it begins with its own special tokens, as it does behind a prefix.
    """
    chat_format, tokenizer = base.chat_format, base.tokenizer
    if chat_format.has_roles:
        system, question = ({"role": role, "content": content} for role, content in (("system", text), ("user", "a")))
        ids = chat_format.encode_prompt(tokenizer, [system, question]).ids
        # Up to the question's role: it is in no content, which is encoded as plain text.
        return ids[: len(ids) - 1 - ids[::-1].index(tokenizer.convert_tokens_to_ids("<|user|>"))]
    frame = (
        [] if reads_both_ways(base) else chat_format.encode_prompt(tokenizer, [{"role": "user", "content": ""}]).ids
    )
    start = frame[: len(chat_format.frame_tokens)]
    return start + _plain_ids(base, text + "\n\n")


def reads_both_ways(base: OpenedBase) -> bool:
    """Whether the base reads its prompt in both directions, so that a text's keys depend on the question behind it."""
    return base.config.model_type == CHATGLM


class Readers:
    """Readers of texts on one base; the last of them are kept, as their keys and values take memory."""

    def __init__(self, base: OpenedBase, model: PreTrainedModel, kept: int = 2) -> None:
        self.base, self.model = base, model
        self._open = lru_cache(kept)(lambda text: open_reader(base, model, text))

    def __call__(self, text: str) -> Reader:
        """Return the base with a text in front of it."""
        return self._open(text)


@dataclass(frozen=True)
class Reading:
    """
    What is read at once.

    Args:
        text: all of the documents.
        texts: that text; parts of it that overlap, where it is too long.
        chunks: of each of these, the parts that questions are asked about.
        num_tokens: of all as it stands in front of a prompt.
    """

    text: str
    texts: list[str]
    chunks: list[list[str]]
    num_tokens: int


def plan_reading(base: OpenedBase, text: str, distil_args: DistilArguments) -> Reading:
    """
    Take a text apart where it is too long for the base.

    Raises:
        UserError: there is no room for a text beside a question and its answer.
    """
    room = _room_for_text(base, distil_args)
    texts, num_tokens = [text], len(encode_text(base, text))
    if num_tokens > room:
        texts = split_text(base, text, room - _FRAME_TOKENS, overlap=room // 8)
        logger.warning(
            "The documents have %d tokens, and %d are read at once (--max_context_tokens): they are taken in %d parts "
            "that overlap, and what can be told only from two parts together is not learnt.",
            *(num_tokens, room, len(texts)),
        )
    chunks = [split_text(base, own, distil_args.chunk_tokens) for own in texts]
    return Reading(text, texts, chunks, num_tokens)


def _room_for_text(base: OpenedBase, distil_args: DistilArguments) -> int:
    args = base.data_args
    beside = args.max_source_length + args.max_target_length
    room = min(distil_args.max_context_tokens or sys.maxsize, base.config.max_position_embeddings - beside)
    if room <= _FRAME_TOKENS:
        raise UserError(
            f"The base takes {base.config.max_position_embeddings} tokens, and --max_source_length "
            f"{args.max_source_length} and --max_target_length {args.max_target_length} leave no room for the "
            "documents: lower them."
        )
    return room


def split_text(base: OpenedBase, text: str, max_tokens: int, overlap: int = 0) -> list[str]:
    """
    Split a text at the ends of its sentences and lines.

    Args:
        max_tokens: the most tokens of a piece.
        overlap: how many tokens a piece has in common with the one before it, at most or in one sentence; 0 for none.
    """
    pieces, piece, sizes = [], [], []
    for unit, size in _units(base, text, max_tokens):
        if piece and sum(sizes) + size > max_tokens:
            pieces.append("".join(piece))
            keep = _common(sizes, overlap, max_tokens - size)
            piece, sizes = piece[keep:], sizes[keep:]
        piece.append(unit)
        sizes.append(size)
    return [*pieces, "".join(piece)]


def _common(sizes: list[int], overlap: int, room: int) -> int:
    """Return the number of the first sentence that the next piece has, too."""
    if not overlap:
        return len(sizes)
    start = next(number for number in range(len(sizes) + 1) if sum(sizes[number:]) <= min(overlap, room))
    return start - 1 if start == len(sizes) and sizes[-1] <= room else start


def _units(base: OpenedBase, text: str, max_tokens: int) -> Iterator[tuple[str, int]]:
    """Yield sentences with their tokens, those that are too long in halves."""
    for unit in filter(None, _UNITS.findall(text)):
        size = len(_plain_ids(base, unit))
        if size > max_tokens and len(unit) > 1:
            for half in (unit[: len(unit) // 2], unit[len(unit) // 2 :]):
                yield from _units(base, half, max_tokens)
        else:
            yield unit, size


def _plain_ids(base: OpenedBase, text: str) -> list[int]:
    return base.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
