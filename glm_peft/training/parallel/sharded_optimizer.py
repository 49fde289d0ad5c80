"""Save and load the state of a sharded optimizer in the format of a single process."""

from pathlib import Path

import torch
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from glm_peft.adapters.sharding import gather_optimizer, shard_optimizer


def save_gathered(trainer: Trainer, folder: Path) -> None:
    """Write the gathered optimizer of FSDP2; must be called in every process."""
    # accelerate would write the frozen base, too, and the optimizer by the names of all its parameters.
    state = gather_optimizer(trainer.optimizer.state_dict())
    if trainer.args.should_save:
        torch.save(state, folder / OPTIMIZER_NAME)
        torch.save(trainer.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)


def load_sharded(trainer: Trainer, folder: Path) -> None:
    """Load in every process of FSDP2 its shard of an optimizer that any number of processes wrote."""
    optimizer, schedule = (
        torch.load(folder / name, map_location="cpu", weights_only=True) for name in (OPTIMIZER_NAME, SCHEDULER_NAME)
    )
    parameters = [value for group in trainer.optimizer.param_groups for value in group["params"]]
    trainer.optimizer.load_state_dict(shard_optimizer(optimizer, parameters))
    trainer.lr_scheduler.load_state_dict(schedule)
