"""Count labels by their weights, where the rows of a run have some."""

from collections.abc import Iterable
from typing import Any

import torch
from datasets import Dataset
from transformers import Trainer

from glm_peft.adapters.label_loss import has_label_loss
from glm_peft.errors import UserError
from glm_peft.models.unwrapping import base_of
from glm_peft.preprocessing.label_weights import has_weights, split_labels


def check_weights(trainer: Trainer) -> bool:
    """
    Return whether labels of training or evaluation may have weights.

    Raises:
        UserError: they do, and the model has transformers' own loss, which knows of none.
    """
    sets = trainer.eval_dataset.values() if isinstance(trainer.eval_dataset, dict) else [trainer.eval_dataset]
    sets = [rows for rows in [trainer.train_dataset, *sets] if rows is not None]
    known = [rows for rows in sets if isinstance(rows, Dataset) and "labels" in rows.column_names]
    if any(map(has_weights, known)) and not has_label_loss(base_of(trainer.model)):
        raise UserError(
            "The 'weight' of a message needs an adapter on a frozen head: leave the weights out, or train one."
        )
    return len(known) < len(sets) or any(map(has_weights, known))


def count_by_weight(trainer: Trainer, batches: Iterable[dict[str, torch.Tensor]], count: Any) -> Any:
    """Return the number of labels in a step's batches, of all processes as `count` is, as the sum of their weights."""
    more = torch.zeros((), device=trainer.args.device)
    for batch in batches:
        weights = split_labels(batch["labels"][..., 1:])[1]
        more += 0 if weights is None else (weights - 1).sum().to(more.device)
    if trainer.args.average_tokens_across_devices and trainer.args.world_size > 1:
        more = trainer.accelerator.gather(more).sum()
    return count + more
