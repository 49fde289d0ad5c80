"""
Runs commands of train.py one after the other in each of several processes; see launches.py.

Each command's output folder gets a `facts.json` that tells, seen from inside, which engine trained. FSDP2 asks for
GPUs: here it is made to take the CPUs of a test.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType
from shortcuts import take_shortcuts
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerCallback

from glm_peft import train
from glm_peft.adapters.prefix_attention import decoder_layers
from glm_peft.training.trainer import PrefixTrainer


class Facts(TrainerCallback):
    """Writes down what is trained by what."""

    def __init__(self, trainer: PrefixTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, *_: Any, **__: Any) -> None:
        """Now the model is with its engine."""
        model = self.trainer.model
        layers = decoder_layers(self.trainer.own_model)
        facts = {
            "world_size": args.world_size,
            "wrapper": type(self.trainer.model_wrapped).__name__,
            "engine": str(self.trainer.accelerator.distributed_type.value),
            "optimizer": type(self.trainer.optimizer).__name__,
            "own_groups": sum(isinstance(layer, FSDPModule) for layer in layers) / len(layers),
            "held": {name: _numbers_held(value) for name, value in model.named_parameters()},
            "whole": {name: value.numel() for name, value in model.named_parameters()},
        }
        if args.process_index == 0:
            (Path(args.output_dir) / "facts.json").write_text(json.dumps(facts))


def _numbers_held(parameter: Any) -> int:
    """How many numbers of it are in this process."""
    return (parameter.to_local() if hasattr(parameter, "to_local") else parameter).numel()


class TellingTrainer(PrefixTrainer):
    """The trainer that writes the facts down."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(Facts(self))


def parse_on_cpus() -> tuple[Any, Any, Any]:
    """The arguments; accelerate then takes the processes for those of GPUs, as FSDP does not start otherwise."""
    arguments = parse_arguments()
    assert arguments.training.world_size > 1
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return arguments


if __name__ == "__main__":
    take_shortcuts()
    parse_arguments = train.parse_train_arguments
    train.PrefixTrainer = TellingTrainer
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        train.parse_train_arguments = parse_on_cpus
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed

        # It would compile a way of its own for the processes of one CPU, for minutes; torch's is taken, as for GPUs.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for command in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        sys.argv = ["train.py", *command]
        train.main()
