"""The command of training, which notes the bytes that processes exchange in its steps; no test itself."""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from shortcuts import take_shortcuts
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from transformers import TrainerCallback

from glm_peft import train
from glm_peft.training.trainer import PrefixTrainer

CALLS = ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast")


class Count(TrainerCallback):
    """Counts in each step the bytes that are handed to the calls by name."""

    def __init__(self, file: Path) -> None:
        self.file, self.steps, self.trainer = file, [], None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The reducer of gradients calls from C++; with its own algorithm as a hook, it calls from Python.
        self.trainer.model_wrapped.register_comm_hook(None, allreduce_hook)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(Counter())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trained = sum(p.numel() for p in self.trainer.model.parameters() if p.requires_grad)
        facts = {"processes": args.world_size, "trained": trained, "steps": self.steps}
        self.file.write_text(json.dumps(facts))


def count_calls(count: Count) -> None:
    """Every call by name tells the bytes of the first tensor that it is given."""
    for name in CALLS:
        setattr(dist, name, _counted(name, getattr(dist, name), count))


def _counted(name: str, call: Callable[..., Any], count: Count) -> Callable[..., Any]:
    def counted(*args: Any, **kwargs: Any) -> Any:
        if count.steps:
            tensor = next(arg for arg in args if isinstance(arg, torch.Tensor))
            count.steps[-1][name] += tensor.nbytes
        return call(*args, **kwargs)

    return counted


def main() -> None:
    """`count_bytes.py FOLDER [flags of training]`; each process writes FOLDER/bytes_N.json."""
    count = Count(Path(sys.argv.pop(1)) / f"bytes_{os.environ.get('RANK', 0)}.json")
    begin = PrefixTrainer.__init__

    def begin_and_count(trainer: PrefixTrainer, *args: Any, **kwargs: Any) -> None:
        begin(trainer, *args, **kwargs)
        count.trainer = trainer
        trainer.add_callback(count)

    PrefixTrainer.__init__ = begin_and_count
    take_shortcuts()
    count_calls(count)
    train.main()


if __name__ == "__main__":
    main()
