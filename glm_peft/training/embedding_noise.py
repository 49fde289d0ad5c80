"""Add NEFTune's noise to the embeddings of every generation."""

from typing import Any

from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, TrainerCallback
from transformers.integrations.neftune import neftune_post_forward_hook


class EmbeddingNoise(TrainerCallback):
    """
    Add noise to the embeddings in training: uniform, of `alpha / sqrt(tokens of a row x hidden size)` at most.

    Source: NEFTune (https://arxiv.org/abs/2310.05914), by transformers' own hook.
    """

    def __init__(self, base: PreTrainedModel, alpha: float) -> None:
        # The Trainer takes the embeddings of `base_model.model`, which ChatGLM-6B does not have.
        self.embeddings, self.alpha = base.get_input_embeddings(), alpha
        self._handle: RemovableHandle | None = None

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Register the hook, which does nothing in evaluation."""
        self.embeddings.neftune_noise_alpha = self.alpha  # where the hook reads it
        self._handle = self.embeddings.register_forward_hook(neftune_post_forward_hook)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Remove the hook."""
        self._handle.remove()
        del self.embeddings.neftune_noise_alpha
