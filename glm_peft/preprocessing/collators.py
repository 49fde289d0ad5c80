"""Collate features into batches: padding, masks and positions."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from glm_peft.errors import UserError

IGNORED_LABEL = -100


@dataclass
class GenerationCollator:
    """
    Pad prompts on the left to the longest of the batch.

    Input: features with `input_ids`; other columns are ignored. Output, each [b, s] and int64: `input_ids`,
    `attention_mask`, and `position_ids` that count the real tokens from 0 (0 on padding).
    """

    tokenizer: Any
    pad_to_multiple_of: int | None = None

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return _padded_inputs([feature["input_ids"] for feature in features], self, "left")


@dataclass
class TrainingCollator:
    """
    Pad prompts with answers on the tokenizer's padding side to the longest of the batch.

    Input: features with `input_ids`, and `labels` if there are any. Output as `GenerationCollator`, with `labels`:
    padded with -100, or, where `ignore_pad_token_for_loss` is off as published scripts allow, with the pad token.
    Features that are pairs, with two of each, become tensors [b, 2, s], in which padding never is a label.
    """

    tokenizer: Any
    ignore_pad_token_for_loss: bool = True
    pad_to_multiple_of: int | None = None

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if "labels" in features[0] and any(isinstance(part, list) for part in features[0]["labels"][:1]):
            return self._of_pairs(features)
        side = self.tokenizer.padding_side
        batch = _padded_inputs([feature["input_ids"] for feature in features], self, side)
        filler = IGNORED_LABEL if self.ignore_pad_token_for_loss else self.tokenizer.pad_token_id
        length = batch["input_ids"].shape[1]
        if "labels" in features[0]:
            batch["labels"] = _padded([feature["labels"] for feature in features], filler, length, side)
        return batch

    def _of_pairs(self, pairs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        both = [zip(pair["input_ids"], pair["labels"], strict=True) for pair in pairs]
        each = [{"input_ids": ids, "labels": labels} for one in both for ids, labels in one]
        batch = replace(self, ignore_pad_token_for_loss=True)(each)
        return {name: values.unflatten(0, (-1, 2)) for name, values in batch.items()}


def _padded_inputs(
    rows: list[list[int]], collator: GenerationCollator | TrainingCollator, side: str
) -> dict[str, torch.Tensor]:
    pad = collator.tokenizer.pad_token_id
    if pad is None:
        raise UserError("The tokenizer has no pad token, which batches need: set tokenizer.pad_token.")
    multiple = collator.pad_to_multiple_of or 1
    length = -(-max(len(row) for row in rows) // multiple) * multiple  # rounded up
    attention_mask = _padded([[1] * len(row) for row in rows], 0, length, side)
    return {
        "input_ids": _padded(rows, pad, length, side),
        "attention_mask": attention_mask,
        # Always given: without them PEFT counts the padding too, and the logits of padded rows are wrong.
        "position_ids": (attention_mask.cumsum(dim=-1) - 1) * attention_mask,
    }


def _padded(rows: list[list[int]], filler: int, length: int, side: str) -> torch.Tensor:
    """Pad rows to one tensor [b, length]."""
    fillers = [[filler] * (length - len(row)) for row in rows]
    pairs = zip(fillers, rows, strict=True) if side == "left" else zip(rows, fillers, strict=True)
    return torch.tensor([first + second for first, second in pairs], dtype=torch.long)
