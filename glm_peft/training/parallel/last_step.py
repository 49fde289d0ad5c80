"""Take repeated examples out of the last step of an epoch, where there are too few for all processes."""

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from accelerate.state import GradientState
from torch.utils.data import DataLoader, Sampler

from glm_peft.preprocessing.collators import IGNORED_LABEL

Batch = dict[str, torch.Tensor]


class LastStep:
    """
    Make the last step of an epoch train on the examples that it has in one process, each once.

    accelerate pads its batches with the first examples of the epoch, and the Trainer trains on those again.

    Args:
        loader: of training, prepared by accelerate. In a single process it stays as it is.
    """

    def __init__(self, loader: DataLoader) -> None:
        self.loader, shard = loader, loader.batch_sampler
        is_shared = isinstance(shard, BatchSamplerShard)
        self.is_filled = is_shared and shard.even_batches and not (shard.drop_last or shard.split_batches)
        if self.is_filled:
            # Each process draws the indices of all, so each can tell which of the last ones are its own.
            sampler = shard.batch_sampler.sampler
            shard.batch_sampler.sampler = _Remembered(sampler, shard.batch_size * shard.num_processes)

    def take_out_repeated(self, batches: list[Batch]) -> bool:
        """
        Replace the last of the batches, where it ends an epoch, by one without the repeated examples.

        Args:
            batches: of one step of the optimizer.

        Returns:
            Whether something was replaced.
        """
        own = self._own_examples() if batches and self.is_filled and GradientState().end_of_dataloader else None
        if own is None:
            return False
        # A process without an example keeps a batch that has no labels: it must take part in the gradients' reduction.
        batches[-1] = self._collate(own) if own else _without_labels(batches[-1])
        return True

    def _own_examples(self) -> list[int] | None:
        """Return this process's share of the last step, as indices; `None` where every process has a full batch."""
        shard = self.loader.batch_sampler
        drawn, size = shard.batch_sampler.sampler, shard.batch_size
        remainder = len(drawn) % (size * shard.num_processes)
        first = shard.process_index * size
        return list(drawn.last)[-remainder:][first : first + size] if remainder else None

    def _collate(self, indices: list[int]) -> Batch:
        return self.loader.collate_fn([self.loader.dataset[index] for index in indices])


class _Remembered(Sampler[int]):
    """
    Wrap a sampler and remember its last indices.

    Args:
        sampler: gives the indices of an epoch.
        most: how many of them are remembered: those of a step of all processes.
    """

    def __init__(self, sampler: Sampler[int], most: int) -> None:
        self.sampler, self.last = sampler, deque(maxlen=most)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        self.last.clear()
        for index in self.sampler:
            self.last.append(index)
            yield index

    def __getattr__(self, name: str) -> Any:
        # accelerate looks for `set_epoch` on the sampler, by which the order of an epoch is drawn.
        return getattr(self.__dict__["sampler"], name)


def _without_labels(batch: Batch) -> Batch:
    return {**batch, "labels": torch.full_like(batch["labels"], IGNORED_LABEL)}
