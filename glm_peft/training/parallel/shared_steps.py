"""Steps that several processes share, also the last one of an epoch, whose examples are too few for all of them."""

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import DataLoader, Sampler

from glm_peft.preprocessing.collators import IGNORED_LABEL
from glm_peft.training.batching_trainer import BatchingTrainer


class SharedStepsTrainer(BatchingTrainer):
    """
    The trainer whose steps have the examples that they have in one process, each counted once.

    accelerate fills the batches of the last step up with the first examples of the epoch, which stock trains on again.
    Here they are taken out; a process that has no other keeps a batch without labels, as all must go on together.
    """

    _shared: DataLoader | None = None

    def get_train_dataloader(self) -> DataLoader:
        """As stock; where processes share it, what was drawn last is remembered."""
        loader = super().get_train_dataloader()
        shard = loader.batch_sampler
        if (
            isinstance(shard, BatchSamplerShard)
            and shard.even_batches
            and not (shard.drop_last or shard.split_batches)
        ):
            self._shared = loader
            shard.batch_sampler.sampler = _Remembered(
                shard.batch_sampler.sampler, shard.batch_size * shard.num_processes
            )
        return loader

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Any]:
        """As stock, without the examples that were there before."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches or self._shared is None or not self.accelerator.gradient_state.end_of_dataloader:
            return batches, count
        last = self._own_examples()
        if last is None:
            return batches, count
        batches[-1] = self._collate(last) if last else _without_labels(batches[-1])
        return batches, self._get_num_items_in_batch(batches, device)

    def _own_examples(self) -> list[int] | None:
        """This process's part of the last step, as indices; `None` where every process has a whole batch."""
        shard = self._shared.batch_sampler
        drawn, size = shard.batch_sampler.sampler, shard.batch_size
        remainder = len(drawn) % (size * shard.num_processes)
        first = shard.process_index * size
        return list(drawn.last)[-remainder:][first : first + size] if remainder else None

    def _collate(self, indices: list[int]) -> dict[str, Any]:
        return self._shared.collate_fn([self._shared.dataset[index] for index in indices])


class _Remembered(Sampler[int]):
    """
    A sampler that knows what it gave last.

    Args:
        sampler: gives the indices of an epoch.
        most: how many of them are kept.
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
        # accelerate tells the sampler which epoch begins.
        return getattr(self.__dict__["sampler"], name)


def _without_labels(batch: dict[str, Any]) -> dict[str, Any]:
    return {**batch, "labels": torch.full_like(batch["labels"], IGNORED_LABEL)}
