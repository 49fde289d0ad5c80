"""What stock's trainer does not do for a prefix on a frozen base, or does another way than it says."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel, Seq2SeqTrainer
from transformers.integrations.neftune import neftune_post_forward_hook

from glm_peft.models.unwrapping import base_of
from glm_peft.training.operations import count_labels, count_operations, operations_of_a_label


class MendedTrainer(Seq2SeqTrainer):
    """
    The stock trainer, with what it promises for a base of any generation and an adapter of any method.

    - NEFTune: stock looks for the embeddings under a name that ChatGLM-6B does not have.
    - Operations: stock counts as if every weight were trained and the head worked at every token.
    - Tokens seen: packed rows have no mask to count by.
    - Results: stock's printed log takes the operations out of them.
    - Logits: a call with labels makes none here, so that stock's predictions and metrics would be empty.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.neftune_noise_alpha = None  # stock adds none; see below
        self._num_labels: torch.Tensor | int = 0  # on the device, which nobody waits for

    def _inner_training_loop(self, batch_size: int | None = None, *args: Any, **kwargs: Any) -> Any:
        self._num_labels = 0
        with embedding_noise(base_of(self.model), self.args.neftune_noise_alpha):
            return super()._inner_training_loop(batch_size, *args, **kwargs)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """
        Those of the forward and the backward pass on one batch, but for the labels', which `store_flos` adds.

        As stock for what is no model of transformers.
        """
        if not self._counts_operations:
            return super().floating_point_ops(inputs)
        self._num_labels = self._num_labels + count_labels(inputs)
        return count_operations(self.model, inputs, num_labels=0)

    def store_flos(self) -> None:
        """As stock, with the operations of the labels since the last time."""
        if self._counts_operations:
            self.current_flos += int(self._num_labels) * operations_of_a_label(self.model)
            self._num_labels = 0
        super().store_flos()

    @property
    def _counts_operations(self) -> bool:
        return isinstance(base_of(self.model), PreTrainedModel)

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        # Packed rows have no mask; each of their examples, but for padding, has one token at position 1.
        if "attention_mask" not in inputs and "position_ids" in inputs:
            positions = inputs["position_ids"]
            is_real = positions > 0
            is_real[:, :-1] |= positions[:, 1:] == 1
            inputs = inputs | {"attention_mask": is_real}
        super()._track_num_input_tokens(inputs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As stock; what is given stays as it is."""
        given = dict(logs)
        super().log(logs, *args, **kwargs)
        logs.update(given)

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """
        As `transformers.Trainer`: the logits are those of the row as it is.

        That of `Seq2SeqTrainer` would answer after the answer; answers come from `glm_peft.prediction.generation`.

        Returns:
            Loss [], logits [b, s, vocabulary] and labels [b, s]; the loss alone if that is asked for.
        """
        labels = inputs.get("labels")
        loss = None if labels is None else self.evaluation_loss(model, inputs)
        if prediction_loss_only:
            return loss, None, None
        unlabelled = {name: value for name, value in inputs.items() if name != "labels"}
        logits = super(Seq2SeqTrainer, self).prediction_step(model, unlabelled, False, ignore_keys)[1]
        return loss, logits, labels

    def evaluation_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """The mean over the labels of a batch, []."""
        return super(Seq2SeqTrainer, self).prediction_step(model, inputs, True)[0]


@contextmanager
def embedding_noise(base: PreTrainedModel, alpha: float | None) -> Iterator[None]:
    """
    Within, embeddings have noise in training: even, of `alpha / sqrt(tokens of a row x hidden size)` at most.

    Source: NEFTune (https://arxiv.org/abs/2310.05914), by transformers' own hook.

    Args:
        alpha: `None` for no noise.
    """
    if alpha is None:
        yield
        return
    embeddings = base.get_input_embeddings()
    embeddings.neftune_noise_alpha = alpha
    handle = embeddings.register_forward_hook(neftune_post_forward_hook)
    try:
        yield
    finally:
        handle.remove()
        del embeddings.neftune_noise_alpha
