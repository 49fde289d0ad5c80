"""Learn to prefer one answer to another; the reference is the same model with its adapter switched off."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from peft import PeftModel

from glm_peft.adapters.label_loss import replaced_loss
from glm_peft.adapters.preference_loss import answer_log_probs, preference_loss
from glm_peft.models.unwrapping import base_of
from glm_peft.training.base_calls import calls_of_base

REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
"""What is logged of the pairs: the mean rewards, their mean difference, and the share in which the chosen has more."""


class Preference:
    """
    The loss of pairs of answers, and the rewards that are logged with it.

    Args:
        model: with its adapter, and `attach_label_loss` on its base.
        accelerator: of the trainer, whose precision the reference is computed in.
        beta: see `preference_loss`.
    """

    def __init__(self, model: PeftModel, accelerator: Accelerator, beta: float) -> None:
        self.model, self.accelerator, self.beta = model, accelerator, beta
        self.last = torch.zeros(0, 2)
        self.sums = {mode: torch.zeros(len(REWARDS) + 1, dtype=torch.float64) for mode in (True, False)}

    @contextmanager
    def as_loss(self, pairs: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
        """
        Give a batch of pairs as one of twice as many rows, whose loss within this context is that of the pairs.

        Args:
            pairs: each [b, 2, s], of the chosen and the rejected answer.
        """
        batch = {name: values.flatten(0, 1) for name, values in pairs.items()}
        loss = preference_loss(self._log_probs_of_base(batch), self.beta, self._note)
        with replaced_loss(base_of(self.model), loss):
            yield batch

    @torch.no_grad()
    def _log_probs_of_base(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        is_training = self.model.training
        self.model.eval()
        replaced = replaced_loss(base_of(self.model), answer_log_probs)
        with calls_of_base(self.model), replaced, self.accelerator.autocast():
            log_probs = self.model(**batch)["loss"]
        self.model.train(is_training)
        return log_probs

    def _note(self, rewards: torch.Tensor) -> None:
        self.last = rewards

    def count_last(self) -> None:
        """Count the rewards of the last batch among those of training, or of the evaluation under way."""
        chosen, rejected = self.last.double().cpu().unbind(dim=1)
        columns = [chosen, rejected, chosen - rejected, (chosen > rejected).double(), torch.ones_like(chosen)]
        self.sums[self.model.training] += torch.stack(columns).sum(dim=1)

    def take(self, is_training: bool) -> dict[str, float]:
        """Return the mean rewards, of all processes, that were counted since they were taken last."""
        sums = self.sums[is_training]
        *totals, count = self.accelerator.reduce(sums.float().to(self.accelerator.device)).tolist()
        sums.zero_()
        return {name: total / count for name, total in zip(REWARDS, totals, strict=True)} if count else {}


def count_pairs_once(pairs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a batch of pairs in which the Trainer, as it counts labels, finds one for each pair that has any."""
    return pairs | {"shift_labels": pairs["labels"].flatten(1).amax(dim=1)}
