"""Log what a training run is made of before it starts."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path

from peft import PeftModel, PeftType
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from glm_peft.arguments.methods import FULL
from glm_peft.arguments.model import ModelArguments
from glm_peft.arguments.training import TrainArguments
from glm_peft.data import EncodedSplits
from glm_peft.models.layerwise_casting import kept_dtype
from glm_peft.preprocessing.batching import Batching
from glm_peft.preprocessing.example_description import describe_example
from glm_peft.preprocessing.lengths import LengthReport
from glm_peft.provenance.ownership import digest_weights, refuse_adapter
from glm_peft.reporting.results import describe_device, describe_precision, format_bytes
from glm_peft.training.checkpoints import complete_checkpoints

logger = logging.getLogger(__name__)


def log_data(data: EncodedSplits, tokenizer: PreTrainedTokenizerBase, batching: Batching | None) -> None:
    """Log rows and lengths of every split, the first example of training token by token, and its batches."""
    for report in data.reports.values():
        logger.info("%s", report)
    if batching:
        logger.info("The first example\n%s", describe_example(tokenizer, data.examples["train"][0]))
        logger.info("%s", batching.reason)


def log_run(
    model: PreTrainedModel | PeftModel,
    arguments: TrainArguments,
    reports: Mapping[str, LengthReport],
    batching: Batching | None,
) -> None:
    """
    Log what is trained, on what, with which data and in which steps, and where the results will be.

    Args:
        reports: lengths and number of examples of each split that is used, by its name.
        batching: what training makes batches of; `None` where only an evaluation runs.
    """
    model_args, training_args = arguments.model, arguments.training
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
        *(_training_lines(arguments, len(batching.examples)) if batching else []),
        f"results: {training_args.output_dir}",
    ]
    logger.info("The run\n  %s", "\n  ".join(lines))


def check_former_run(output_dir: str | Path, checkpoint: str | None, peft_type: str) -> None:
    """
    Warn, before training, of the weights and the checkpoints that an earlier run left in the output folder.

    Args:
        checkpoint: the folder to resume from; a run that goes on in its own folder is none before.
        peft_type: the method of training.

    Raises:
        UserError: a whole model would be written into the folder of an adapter.
    """
    if peft_type == FULL:
        refuse_adapter(output_dir)
    if checkpoint and Path(checkpoint).resolve().parent == Path(output_dir).resolve():
        return
    found = {
        "its weights are replaced when this one ends (another --output_dir keeps them)": digest_weights(output_dir),
        "--resume_from_checkpoint last would go on from its checkpoints": complete_checkpoints(output_dir),
    }
    if any(found.values()):
        told = "; ".join(text for text, is_there in found.items() if is_there)
        logger.warning("%s has what a run before left, and this one starts afresh: %s.", output_dir, told)


def count_steps(training_args: TrainingArguments, rows: int) -> tuple[int, float]:
    """Return how many steps of the optimizer and epochs training on so many rows takes."""
    # Rounded as the Trainer does: a last batch that is not full counts, and so do the last batches of an epoch.
    batches = math.ceil(rows / training_args.train_batch_size / training_args.world_size)
    steps = max(math.ceil(batches / training_args.gradient_accumulation_steps), 1)
    if training_args.max_steps > 0:
        return training_args.max_steps, training_args.max_steps / steps
    return math.ceil(training_args.num_train_epochs * steps), training_args.num_train_epochs


def _describe_precision(
    model: PreTrainedModel | PeftModel, model_args: ModelArguments, training_args: TrainingArguments
) -> str:
    mixed = next((f"; trained in {name}" for name in ("bf16", "fp16") if getattr(training_args, name)), "")
    return describe_precision(model.dtype, kept_dtype(model), model_args.quantization_bit) + mixed


def _training_lines(arguments: TrainArguments, rows: int) -> list[str]:
    training_args = arguments.training
    batch, accumulated = training_args.train_batch_size, training_args.gradient_accumulation_steps
    steps, epochs = count_steps(training_args, rows)
    parts = f"{batch} in a batch x {accumulated} accumulated x {training_args.world_size} process(es)"
    of_rows = "of rows that are streamed" if arguments.data.streaming else f"{epochs:.4g} epochs of {rows:,} rows"
    return [
        f"step: {batch * accumulated * training_args.world_size} examples ({parts})",
        f"training: {steps:,} steps, {of_rows}",
        f"learning rate: {training_args.learning_rate:g}, {training_args.lr_scheduler_type.value}, "
        f"{training_args.get_warmup_steps(steps)} steps of warm-up",
    ]


def _count_parameters(model: PreTrainedModel | PeftModel) -> tuple[int, int]:
    """Return how many parameters are trained, and how many there are."""
    if isinstance(model, PeftModel):
        # PEFT counts what is packed in 4 bits by its values, not by its bytes.
        return model.get_nb_trainable_parameters()
    sizes = [(value.numel(), value.requires_grad) for value in model.parameters()]
    return sum(size for size, is_trained in sizes if is_trained), sum(size for size, _ in sizes)


def _describe_adapter(model: PreTrainedModel | PeftModel) -> str:
    if not isinstance(model, PeftModel):
        return f"none, the base itself is trained in {model.dtype}"
    config = model.active_peft_config
    if config.peft_type != PeftType.PREFIX_TUNING:
        return config.peft_type.value.lower()
    # Keys and values of each layer: what is saved, even where a projection has more parameters than its result.
    size = config.num_virtual_tokens * config.num_layers * 2 * config.token_dim
    return (
        f"{config.num_virtual_tokens} virtual tokens{', projected' if config.prefix_projection else ''}; "
        f"{size:,} parameters in float32, {format_bytes(4 * size)}"
    )
