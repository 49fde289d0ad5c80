"""What a run tells: the log, and the table of results at its end."""

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from peft import PeftModel, PeftType
from transformers import PreTrainedModel, TrainingArguments
from transformers.training_args import trainer_log_levels

from glm_peft.checks.length_report import LengthReport
from glm_peft.prediction.prediction_files import write_atomically
from glm_peft.training.batching import Batching

RESULTS_NAME = "all_results.json"
_LARGE = 1e9  # from here on numbers are told by their power of ten

logger = logging.getLogger(__name__)


def set_up_logging(level: int | None = None, is_main_process: bool = True) -> None:
    """
    The log on stderr.

    Args:
        level: the least that is told. `None`: of this package information and of libraries warnings; errors alone in
            processes other than the main one.
        is_main_process: the others show no progress bars.
    """
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    usual = (logging.INFO, logging.WARNING) if is_main_process else (logging.ERROR, logging.ERROR)
    own, of_libraries = usual if level is None else (level, level)
    logging.getLogger("glm_peft").setLevel(own)
    transformers.utils.logging.set_verbosity(of_libraries)
    if not is_main_process:
        transformers.utils.logging.disable_progress_bar()


def choose_level(training_args: TrainingArguments) -> int | None:
    """That of `--log_level` in the process that logs, and of `--log_level_replica` in others; `None` for passive."""
    name = training_args.log_level if training_args.should_log else training_args.log_level_replica
    return None if name == "passive" else trainer_log_levels[name]


def log_run(
    model: PreTrainedModel | PeftModel,
    arguments: tuple[Any, Any],
    reports: Mapping[str, LengthReport],
    batching: Batching | None,
) -> None:
    """
    What is trained, on what, with which data and in which steps, and where the results will be.

    Args:
        arguments: those of the model and of the training.
        reports: of each split that is used.
        batching: of training; `None` where there is none.
    """
    model_args, training_args = arguments
    trainable, total = _count_parameters(model)
    start = model_args.adapter_name_or_path
    lines = [
        f"base: {model_args.model_name_or_path} ({model.config.model_type})",
        f"precision: {_describe_precision(model, model_args, training_args)}",
        f"device: {describe_device(training_args.device)}, {training_args.world_size} process(es)",
        f"adapter: {_describe_adapter(model)}",
        *([f"continued from: {start}"] if start else []),
        f"trainable parameters: {trainable:,} of {total:,} ({100 * trainable / total:.4f} %)",
        "data: " + ", ".join(f"{report.examples:,} {name} examples" for name, report in reports.items()),
        *(_training_lines(training_args, len(batching.examples)) if batching else []),
        f"results: {training_args.output_dir}",
    ]
    logger.info("The run\n  %s", "\n  ".join(lines))


def print_section(title: str, body: str) -> None:
    """A part of a report on stdout."""
    print(f"\n{title}\n{body}", flush=True)


def describe_device(device: torch.device) -> str:
    """Such as `cpu`, or a GPU with its name and memory."""
    if device.type != "cuda":
        return str(device)
    properties = torch.cuda.get_device_properties(device)
    return f"{device} ({properties.name}, {properties.total_memory / 2**30:.0f} GiB)"


def describe_precision(dtype: torch.dtype, quantization_bit: int | None) -> str:
    """Of a base, such as `torch.bfloat16, quantized to 4 bits`."""
    return f"{dtype}, {f'quantized to {quantization_bit} bits' if quantization_bit else 'not quantized'}"


def format_bytes(size: int) -> str:
    """A size in kB, or from a MiB on in MiB."""
    return f"{size / 2**20:.2f} MiB" if size >= 2**20 else f"{size / 1000:.1f} kB"


def count_steps(training_args: TrainingArguments, rows: int) -> tuple[int, float]:
    """Steps of the optimizer and epochs that training on so many rows takes, counted as the trainer does."""
    batches = math.ceil(rows / training_args.train_batch_size / training_args.world_size)
    steps = max(math.ceil(batches / training_args.gradient_accumulation_steps), 1)
    if training_args.max_steps > 0:
        return training_args.max_steps, training_args.max_steps / steps
    return math.ceil(training_args.num_train_epochs * steps), training_args.num_train_epochs


def _describe_precision(model: PreTrainedModel | PeftModel, model_args: Any, training_args: TrainingArguments) -> str:
    mixed = next((f"; trained in {name}" for name in ("bf16", "fp16") if getattr(training_args, name)), "")
    return describe_precision(model.dtype, model_args.quantization_bit) + mixed


def _training_lines(training_args: TrainingArguments, rows: int) -> list[str]:
    batch, accumulated = training_args.train_batch_size, training_args.gradient_accumulation_steps
    steps, epochs = count_steps(training_args, rows)
    parts = f"{batch} in a batch x {accumulated} accumulated x {training_args.world_size} process(es)"
    return [
        f"step: {batch * accumulated * training_args.world_size} examples ({parts})",
        f"training: {steps:,} steps, {epochs:.4g} epochs of {rows:,} rows",
        f"learning rate: {training_args.learning_rate:g}, {training_args.lr_scheduler_type.value}, "
        f"{training_args.get_warmup_steps(steps)} steps of warm-up",
    ]


def _count_parameters(model: PreTrainedModel | PeftModel) -> tuple[int, int]:
    """Those that are trained, and all."""
    if isinstance(model, PeftModel):
        return model.get_nb_trainable_parameters()
    sizes = [(value.numel(), value.requires_grad) for value in model.parameters()]
    return sum(size for size, is_trained in sizes if is_trained), sum(size for size, _ in sizes)


def _describe_adapter(model: PreTrainedModel | PeftModel) -> str:
    if not isinstance(model, PeftModel):
        return f"none, the base itself is trained in {model.dtype}"
    config = model.active_peft_config
    if config.peft_type != PeftType.PREFIX_TUNING:
        return config.peft_type.value.lower()
    size = config.num_virtual_tokens * config.num_layers * 2 * config.token_dim
    return (
        f"{config.num_virtual_tokens} virtual tokens{', projected' if config.prefix_projection else ''}; "
        f"{size:,} numbers in float32, {format_bytes(4 * size)}"
    )


def format_results(results: dict[str, float]) -> str:
    """The results as a table, one line each."""
    width = max(map(len, results), default=0)
    lines = [f"  {name:<{width}}  {_format(value):>14}" for name, value in results.items()]
    return "\n".join(["Results", *lines])


def save_results(results: dict[str, float], output_dir: str) -> None:
    """Write `all_results.json`, in the main process."""
    if PartialState().is_main_process:
        write_atomically(Path(output_dir) / RESULTS_NAME, json.dumps(results, indent=4) + "\n")


def _format(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < _LARGE else f"{value:.4g}"
    return f"{value}"
