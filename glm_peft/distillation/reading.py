"""
Let the base read a text in front of its prompts, and take the text apart where it is too long.

What stands in front is itself a prefix, and an exact one: the keys and values of the text. So a model that reads is a
base with a prefix adapter, and all that works with a prefix, such as batches and packing, works with a text, which is
computed once. ChatGLM-6B reads its prompt in both directions, so there the text stands in each prompt.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from glm_peft.adapters.assembly import OpenedBase
from glm_peft.adapters.loading import put_prefix_on
from glm_peft.adapters.prefix_attention import attach_prefix_attention
from glm_peft.adapters.prefix_initialization import keys_and_values
from glm_peft.data import shape_prompt
from glm_peft.models.generations import CHATGLM
from glm_peft.models.shortening import Message
from glm_peft.prediction.evaluation import Answering

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


def split_text(base: OpenedBase, text: str, max_tokens: int, overlap: int = 0) -> list[str]:
    """
    Split a text at the ends of its sentences and lines.

    Args:
        max_tokens: the most tokens of a piece.
        overlap: how many tokens, at most, a piece has in common with the one before it.
    """
    pieces, piece, sizes = [], [], []
    for unit, size in _units(base, text, max_tokens):
        if piece and sum(sizes) + size > max_tokens:
            pieces.append("".join(piece))
            keep = next(
                start for start in range(len(sizes) + 1) if sum(sizes[start:]) <= min(overlap, max_tokens - size)
            )
            piece, sizes = piece[keep:], sizes[keep:]
        piece.append(unit)
        sizes.append(size)
    return [*pieces, "".join(piece)]


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
