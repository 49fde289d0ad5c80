"""The stock trainer, with batches as they were planned."""

from typing import Any

from datasets import Dataset
from torch.utils.data import DataLoader, Sampler

from glm_peft.preprocessing.batching import GROUPING, Batching, LengthGroupedSampler, row_sizes
from glm_peft.training.mended_trainer import MendedTrainer


class BatchingTrainer(MendedTrainer):
    """
    The stock trainer with training batches of its own; evaluation has ordinary ones, by which stock weighs its loss.

    Args:
        batching: examples, order and collator of training; `None` for stock's.
    """

    def __init__(self, *args: Any, batching: Batching | None = None, **kwargs: Any) -> None:
        if batching:
            kwargs["train_dataset"] = batching.examples
        super().__init__(*args, **kwargs)
        self.batching = batching
        if batching:
            self.args.train_sampling_strategy = batching.order

    def get_train_dataloader(self) -> DataLoader:
        """As stock, with the collator of training."""
        collator = self.data_collator
        if self.batching:
            self.data_collator = self.batching.collator
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        # Stock takes away the column of lengths before it asks for it, and reads every example instead.
        columns = getattr(self.train_dataset, "column_names", None) or []
        if self.args.train_sampling_strategy != GROUPING or "length" not in columns:
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        lengths = self.train_dataset["length"][:]
        return LengthGroupedSampler(lengths, row_sizes(self.args)[1], seed, lambda: int(self.state.epoch or 0))
