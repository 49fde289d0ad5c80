"""
Pack several examples into one row where lengths differ much: less padding, the same losses and gradients.

The positions of every example begin at 0, by which the models find where it begins; the prefix stands once before the
row and is seen by all. Packed rows have no attention mask: transformers' Glm, and ChatGLM-6B here, then build one with
a block for each example.
"""

import random
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heappop, heappush, heapreplace
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig

from glm_peft.errors import UserError
from glm_peft.models.chatglm.positions import build_position_rows
from glm_peft.preprocessing.collators import IGNORED_LABEL, TrainingCollator

if TYPE_CHECKING:  # its import takes half a second, and one prompt needs none
    from datasets import Dataset

_PACKED_TOGETHER = 1000  # examples of a stream: with fewer, rows stay less full
_LEAST_GAIN = 0.03  # of the cost: below this, a batch stays padded, bit for bit


def pack_examples(examples: "Dataset", max_length: int, config: PreTrainedConfig) -> "Dataset":
    """
    Put the examples into as few rows as best-fit decreasing needs.

    Args:
        examples: `input_ids` and `labels`.
        max_length: the most tokens of a row.
        config: of the base; ChatGLM-6B's rows carry both of its position rows.

    Returns:
        A dataset of `input_ids`, `labels`, `position_ids` and, for ChatGLM-6B, `position_rows`.

    Raises:
        UserError: an example is longer than a row.
    """
    from datasets import Dataset

    return Dataset.from_dict(_pack({name: examples[name][:] for name in ("input_ids", "labels")}, max_length, config))


def pack_stream(
    examples: Iterator[dict[str, Any]], max_length: int, config: PreTrainedConfig, seed: int
) -> Iterator[dict[str, Any]]:
    """
    Put successive examples into rows as `pack_examples` does, so many at a time, and yield the rows in random order.

    Args:
        seed: of the order.

    Raises:
        UserError: an example is longer than a row.
    """
    draw = random.Random(seed)
    while window := list(islice(examples, _PACKED_TOGETHER)):
        packed = _pack({name: [each[name] for each in window] for name in ("input_ids", "labels")}, max_length, config)
        rows = [dict(zip(packed, row, strict=True)) for row in zip(*packed.values(), strict=True)]
        draw.shuffle(rows)  # they come with the longest examples first
        yield from rows


def _pack(columns: dict[str, list[Any]], max_length: int, config: PreTrainedConfig) -> dict[str, list[Any]]:
    lengths = [len(ids) for ids in columns["input_ids"]]
    if max(lengths) > max_length:
        raise UserError(
            f"--max_length {max_length} is less than the longest example, which has {max(lengths)} tokens: give at "
            "least that, or lower --max_source_length or --max_target_length."
        )
    return _join(columns, plan_rows(lengths, max_length), config)


def plan_rows(lengths: list[int], max_length: int) -> list[list[int]]:
    """Return the indices of the examples of each row, by best-fit decreasing."""
    # Rows are found by the room left in them: to try each would be quadratic in the number of examples.
    rows: list[list[int]] = []
    rows_with_room: dict[int, list[int]] = {}  # tokens left -> rows, a heap
    rooms: list[int] = []  # the keys, sorted
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        place = bisect_left(rooms, lengths[index])
        if place == len(rooms):
            rows.append([])
            left, row = max_length, len(rows) - 1
        else:
            left = rooms[place]
            row = heappop(rows_with_room[left])
            if not rows_with_room[left]:
                del rows_with_room[rooms.pop(place)]
        rows[row].append(index)
        left -= lengths[index]
        if left not in rows_with_room:
            insort(rooms, left)
        heappush(rows_with_room.setdefault(left, []), row)
    return rows


@dataclass(frozen=True)
class RowCost:
    """
    Compute what rows cost, padding included; the unit is a token without attention.

    Args:
        even: the number of tokens, in hidden sizes, at which attention costs as much as the rest.
    """

    # In every layer a token takes some 12 h² multiplications, and 2 h for each of the P + length tokens that a dense
    # mask has for it, so that attention costs as much as the rest at 6 h tokens; measured, it does at 5 h.

    num_virtual_tokens: int
    hidden_size: int
    even: float = 5

    def __call__(self, rows: int, length: int) -> float:
        """Return the cost of so many rows of so many tokens."""
        return rows * length * (1 + (self.num_virtual_tokens + length) / (self.even * self.hidden_size))


def plan_batch(lengths: list[int], cost: RowCost) -> list[list[int]]:
    """
    Return the indices of the examples of each row: a batch's, in as many rows as cost least.

    Where nothing is gained, each example has a row of its own.
    """
    longest, count = max(lengths), len(lengths)
    best, least = [[index] for index in range(count)], (1 - _LEAST_GAIN) * cost(count, longest)
    for number in range(1, count):
        rows, length = _spread(lengths, number)
        if cost(number, length) < least:
            best, least = rows, cost(number, length)
        if length == longest:  # more rows cannot be shorter
            break
    return best


@dataclass
class PackingCollator:
    """
    Make batches of packed rows, padded on the right to the longest.

    Rows that are not packed, such as those of an evaluation, go to `unpacked`.

    Output, each [b, s] and int64: `input_ids`, `labels`, `position_ids`, and for ChatGLM-6B `position_rows` [b, 2, s].
    """

    tokenizer: Any
    unpacked: TrainingCollator

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if "position_ids" not in rows[0]:
            return self.unpacked(rows)
        length = max(len(row["input_ids"]) for row in rows)
        # Positions are padded with 0, so that each token of padding is an example of its own, without a label.
        fillers = {"input_ids": self.tokenizer.pad_token_id, "labels": IGNORED_LABEL}
        return {
            name: torch.stack([_padded(torch.tensor(row[name]), length, fillers.get(name, 0)) for row in rows])
            for name in ("input_ids", "labels", "position_ids", "position_rows")
            if name in rows[0]
        }


@dataclass
class BatchPackingCollator(PackingCollator):
    """
    Pack the examples of a batch into fewer rows where that costs less; otherwise let `unpacked` make the batch.

    Which examples a step has, their losses and their labels are the same either way. Input: `input_ids` and `labels`.
    """

    config: PreTrainedConfig
    cost: RowCost

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        plan = plan_batch([len(example["input_ids"]) for example in examples], self.cost)
        if len(plan) == len(examples):
            return self.unpacked(examples)
        columns = {name: [example[name] for example in examples] for name in ("input_ids", "labels")}
        joined = _join(columns, plan, self.config)
        return super().__call__([dict(zip(joined, row, strict=True)) for row in zip(*joined.values(), strict=True)])


def _spread(lengths: list[int], number: int) -> tuple[list[list[int]], int]:
    """Return `number` rows, each example (longest first) in the row that is shortest so far; and the most tokens."""
    rows: list[list[int]] = [[] for _ in range(number)]
    filled = [(0, row) for row in range(number)]
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        tokens, row = filled[0]
        rows[row].append(index)
        heapreplace(filled, (tokens + lengths[index], row))
    return rows, max(filled)[0]


def _join(columns: dict[str, list[Any]], plan: list[list[int]], config: PreTrainedConfig) -> dict[str, list[Any]]:
    """Return the rows of a plan, with the positions of each example."""
    # The token before an example's first belongs to another example, and must not be trained to predict it.
    labels = [[IGNORED_LABEL, *labels[1:]] for labels in columns["labels"]]
    positions = [list(range(len(ids))) for ids in columns["input_ids"]]
    columns = columns | {"labels": labels, "position_ids": positions}
    joined = {
        name: [list(chain.from_iterable(values[index] for index in row)) for row in plan]
        for name, values in columns.items()
    }
    if config.model_type == "chatglm":
        rows = [build_position_rows(torch.tensor([ids]), None, config)[0] for ids in columns["input_ids"]]
        joined["position_rows"] = [torch.cat([rows[index] for index in row], dim=1).tolist() for row in plan]
    return joined


def _padded(values: torch.Tensor, length: int, filler: int) -> torch.Tensor:
    return torch.nn.functional.pad(values, (0, length - values.shape[-1]), value=filler)
