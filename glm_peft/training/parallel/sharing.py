"""How several processes share a data set: each row is some process's own, once."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import PartialState
from accelerate.state import GradientState
from accelerate.utils import find_batch_size
from transformers import TrainingArguments


def own_rows(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Return a batch of an evaluation without the rows that fill it up, which are the first of the data set again.

    What is left is a batch as one process has it, with its loss. One of nothing but such rows stays as it is: all
    processes must go on equally often, and stock drops its loss.
    """
    state, loading = PartialState(), GradientState()
    if state.num_processes == 1 or not loading.end_of_dataloader or loading.remainder < 1:
        return batch
    rows = find_batch_size(batch)
    own = loading.remainder - state.process_index * rows
    return {name: value[:own] for name, value in batch.items()} if 0 < own < rows else batch


@contextmanager
def own_labels(training_args: TrainingArguments) -> Iterator[None]:
    """Divide the loss of a batch by its own labels within, not by those of the batches of all processes."""
    before = training_args.average_tokens_across_devices
    training_args.average_tokens_across_devices = False
    try:
        yield
    finally:
        training_args.average_tokens_across_devices = before
