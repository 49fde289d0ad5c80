"""Training runs in this process, with the trainer and the batches of every step kept for the test."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from short_runs import log_of, run, training_words

from glm_peft.training.trainer import PrefixTrainer


@dataclass
class WatchedRun:
    """What a run did: `batches` are the inputs of each micro-batch, with the optimizer's step that it was part of."""

    folder: Path
    trainer: PrefixTrainer | None = None
    batches: list[tuple[int, dict[str, torch.Tensor]]] = field(default_factory=list)

    @property
    def prefix(self) -> torch.Tensor:
        """The adapter that was saved, [P, numbers of a virtual token]."""
        return load_file(self.folder / "adapter_model.safetensors")["prompt_embeddings"]

    @property
    def log(self) -> list[dict[str, float]]:
        """What the trainer logged."""
        return self.trainer.state.log_history

    def logged(self, name: str) -> list[float]:
        """The values of one name in the order in which they were logged."""
        return [entry[name] for entry in self.log if name in entry]

    def rows(self) -> list[tuple[int, ...]]:
        """Every row of every batch as its token ids, without padding."""
        return [
            tuple(ids[mask.bool()].tolist())
            for _, batch in self.batches
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]


def watch(base: Path, folder: Path, *more: str) -> WatchedRun:
    """A run without checkpoints, three steps of four of the twelve rows, unless `more` says otherwise."""
    seen, step = WatchedRun(folder), PrefixTrainer.training_step

    def training_step(self: PrefixTrainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.trainer = self
        seen.batches.append((self.state.global_step, {name: value.clone() for name, value in inputs.items()}))
        return step(self, model, inputs, *args, **kwargs)

    usual = [] if "--save_steps" in more or "--save_strategy" in more else ["--save_strategy", "no"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PrefixTrainer, "training_step", training_step)
        run(training_words(base, folder, "--num_train_epochs", "1", "--logging_steps", "1", *usual, *more))
    return seen


Watch = Callable[..., WatchedRun]

__all__ = ["Watch", "WatchedRun", "log_of", "watch"]
