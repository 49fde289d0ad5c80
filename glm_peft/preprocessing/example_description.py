"""Describe an example token by token, for the log and the doctor."""

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase

from glm_peft.preprocessing.collators import IGNORED_LABEL

_TOKENS_PER_LINE = 8


def describe_example(tokenizer: PreTrainedTokenizerBase, feature: dict[str, Any]) -> str:
    """
    Describe an example for the log: every token with its id, and which of them carry loss.

    Args:
        feature: `input_ids`, and `labels` if it is an example for training.
    """
    ids, labels = feature["input_ids"], feature.get("labels")
    if labels is None:
        tokens = [f"{id_} {text!r}" for text, id_ in zip(_token_texts(tokenizer, ids), ids, strict=True)]
        return "\n".join([f"{len(ids)} tokens", *_token_lines("prompt", tokens)])
    if isinstance(ids[0], list):  # a pair
        both = [{"input_ids": own, "labels": learnt} for own, learnt in zip(ids, labels, strict=True)]
        texts = [describe_example(tokenizer, one) for one in both]
        return "\n".join(f"{name}: {text}" for name, text in zip(("chosen", "rejected"), texts, strict=True))
    lines = [f"{len(ids)} tokens, {sum(label != IGNORED_LABEL for label in labels)} of them carry loss"]
    tokens = zip(_token_texts(tokenizer, ids), ids, labels, strict=True)
    for carries_loss, group in groupby(tokens, lambda token: token[2] != IGNORED_LABEL):
        lines += _token_lines("loss" if carries_loss else "no loss", [f"{id_} {text!r}" for text, id_, _ in group])
    return "\n".join(lines)


def _token_texts(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    tokens = tokenizer.convert_ids_to_tokens(ids)
    if not getattr(tokenizer, "is_fast", False):
        return tokens
    # Byte-level tokens write each byte as some letter: show the text, unless it is a part of a character only.
    texts = [tokenizer.decode([id_]) for id_ in ids]
    return [token if "\ufffd" in text else text for token, text in zip(tokens, texts, strict=True)]


def _token_lines(name: str, tokens: list[str]) -> Iterator[str]:
    for start in range(0, len(tokens), _TOKENS_PER_LINE):
        yield f"  {name if start == 0 else '':<8}" + " | ".join(tokens[start : start + _TOKENS_PER_LINE])
