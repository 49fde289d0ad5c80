"""Share the rows of an evaluation among processes, so that each row counts once."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import PartialState
from accelerate.state import GradientState
from accelerate.utils import find_batch_size
from transformers import TrainingArguments


def own_rows(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Return a batch of an evaluation without the rows that pad it, which are the first of the dataset again.

    What is left has the loss of the same batch in one process.
    """
    own = count_own(batch)
    # A batch of nothing but padding stays: all processes must take part in every gather, after which its loss is cut.
    return {name: value[:own] for name, value in batch.items()} if own else batch


def count_own(batch: dict[str, torch.Tensor]) -> int:
    """Return how many rows of a batch of an evaluation do not pad it."""
    state, loading, rows = PartialState(), GradientState(), find_batch_size(batch)
    if state.num_processes == 1 or not loading.end_of_dataloader or loading.remainder < 1:
        return rows
    return min(max(loading.remainder - state.process_index * rows, 0), rows)


@contextmanager
def own_labels(training_args: TrainingArguments) -> Iterator[None]:
    """Divide the loss of a batch by its own number of labels within this context, not by that of all processes."""
    # The Trainer weighs each batch's loss by its rows afterwards, as in one process.
    before = training_args.average_tokens_across_devices
    training_args.average_tokens_across_devices = False
    try:
        yield
    finally:
        training_args.average_tokens_across_devices = before
