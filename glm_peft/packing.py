"""
Several examples in one row, for data whose lengths differ much: no padding, the same losses and gradients.

Every example counts its positions anew, by which the mask tells where it begins; the prefix stands once before the
row and is seen by all. Packed rows have no attention mask: transformers' Glm, and ChatGLM-6B here, build a block for
each example where there is none.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedConfig

from glm_peft.collators import IGNORED_LABEL, TrainingCollator
from glm_peft.errors import UserError
from glm_peft.models.chatglm.positions import build_position_rows


def pack_examples(examples: Dataset, max_length: int, config: PreTrainedConfig) -> Dataset:
    """
    Put the examples into as few rows as best-fit decreasing needs.

    Args:
        examples: `input_ids` and `labels`.
        max_length: the most tokens of a row.
        config: of the base; ChatGLM-6B's rows carry both of its position rows.

    Returns:
        A data set of `input_ids`, `labels`, `position_ids` and, for ChatGLM-6B, `position_rows`.

    Raises:
        UserError: an example is longer than a row.
    """
    columns = {name: examples[name][:] for name in ("input_ids", "labels")}
    lengths = [len(ids) for ids in columns["input_ids"]]
    if max(lengths) > max_length:
        raise UserError(
            f"--max_length {max_length} is less than the longest example, which has {max(lengths)} tokens: give at "
            "least that, or lower --max_source_length or --max_target_length."
        )
    columns["position_ids"] = [list(range(length)) for length in lengths]
    if config.model_type == "chatglm":
        columns["position_rows"] = [_position_rows(ids, config) for ids in columns["input_ids"]]
    rows = plan_rows(lengths, max_length)
    return Dataset.from_dict(
        {name: [_joined([values[index] for index in row], name) for row in rows] for name, values in columns.items()}
    )


def plan_rows(lengths: list[int], max_length: int) -> list[list[int]]:
    """Indices of the examples of each row: the longest first, each where the least room is left over."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        place = bisect_left(room, (lengths[index], -1))
        if place == len(room):
            rows.append([])
            left, row = max_length, len(rows) - 1
        else:
            left, row = room.pop(place)
        rows[row].append(index)
        insort(room, (left - lengths[index], row))
    return rows


@dataclass
class PackingCollator:
    """
    Packed rows, padded on the right to the longest of the batch; padding is an example of its own, without loss.

    Rows that are not packed, such as those of an evaluation, go to `unpacked`.

    Output, each [b, s] and int64: `input_ids`, `labels`, `position_ids`, and for ChatGLM-6B `position_rows` [b, 2, s].
    """

    tokenizer: Any
    unpacked: TrainingCollator

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if "position_ids" not in rows[0]:
            return self.unpacked(rows)
        length = max(len(row["input_ids"]) for row in rows)
        fillers = {"input_ids": self.tokenizer.pad_token_id, "labels": IGNORED_LABEL}
        return {
            name: torch.stack([_padded(torch.tensor(row[name]), length, fillers.get(name, 0)) for row in rows])
            for name in ("input_ids", "labels", "position_ids", "position_rows")
            if name in rows[0]
        }


def _position_rows(ids: list[int], config: PreTrainedConfig) -> list[list[int]]:
    return build_position_rows(torch.tensor([ids]), None, config)[0].tolist()


def _joined(parts: list[Any], name: str) -> list[Any]:
    if name == "position_rows":
        return [sum((part[row] for part in parts), []) for row in range(2)]
    return sum(parts, [])


def _padded(values: torch.Tensor, length: int, filler: int) -> torch.Tensor:
    return torch.nn.functional.pad(values, (0, length - values.shape[-1]), value=filler)
