"""The variants of training that the benchmark compares, how one is measured, and what prediction has of this too."""

import argparse
import functools
import os
import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock, patch

import torch
from peft import PeftModel
from real_size_commands import watch
from torch import nn
from transformers import BatchEncoding

from glm_peft.adapters.compilation import compile_layers
from glm_peft.adapters.label_loss import attach_label_loss
from glm_peft.adapters.loading import create_adapter
from glm_peft.adapters.prefix_attention import attach_prefix_attention
from glm_peft.arguments.data import DataArguments
from glm_peft.arguments.methods import FULL, LORA, PREFIX_TUNING
from glm_peft.arguments.model import ModelArguments
from glm_peft.data import build_generation_features, build_training_features
from glm_peft.errors import UserError
from glm_peft.models import loading
from glm_peft.models.chat_formats import get_chat_format
from glm_peft.models.loading import choose_dtype, load_base_model, load_config, load_tokenizer
from glm_peft.models.unwrapping import base_of
from glm_peft.preprocessing.batching import GROUPING, group_by_length, plan_batching, row_sizes
from glm_peft.preprocessing.collators import TrainingCollator
from glm_peft.preprocessing.split_loading import load_splits
from glm_peft.provenance.hardware import peak_resident

if TYPE_CHECKING:  # a machine with a GPU may be without it
    from datasets import Dataset

MATRIX = 2048  # rows and columns of the product by which the machine's rate is measured
NUMBERS = 2**27  # whose sum measures the rate of its memory
ALL_FLOAT32 = "toolkit, all in float32"


@dataclass(frozen=True)
class Training:
    """What a variant of training has of this toolkit's savings."""

    layout: str = "chosen"  # by the toolkit from the data; "random": in the file's order, "maximum": to both limits
    label_loss: bool = True
    prefix_attention: bool = True
    activation_checkpointing: bool = False
    compiled: bool = False
    kept_weights: bool = True  # in 16 bits as stored, where the processor computes in float32
    loaded_as_stock: bool = False
    peft_type: str = PREFIX_TUNING


AS_STOCK = Training("random", label_loss=False, prefix_attention=False, kept_weights=False, loaded_as_stock=True)
TRAINING = {
    "toolkit": Training(),
    ALL_FLOAT32: Training(kept_weights=False),
    "without the label loss": Training(label_loss=False),
    "without a layout of its own": Training(layout="random"),
    "with activation checkpointing": Training(activation_checkpointing=True),
    "with torch.compile": Training(compiled=True),
    "prefix in a cache": Training(layout="random", prefix_attention=False),
    "published way": replace(AS_STOCK, layout="maximum", prefix_attention=True, activation_checkpointing=True),
    "plain PEFT": AS_STOCK,
    "LoRA": Training(prefix_attention=False, peft_type=LORA),
    "the whole base": Training(label_loss=False, prefix_attention=False, peft_type=FULL),
}


def measure_training(name: str, arguments: argparse.Namespace) -> dict[str, float | str]:
    """Forward, backward and optimizer in all steps but the first."""
    variant, setting, accumulated = TRAINING[name], load_setting(arguments), arguments.gradient_accumulation_steps
    model, took = build_model(arguments, variant)
    batches, layout = plan_batches(setting, variant, model, arguments)
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1e-3)
    first, *steps = (batches[start : start + accumulated] for start in range(0, len(batches), accumulated))
    train_step(model, optimizer, *first)
    processor = time.process_time()
    total = sum(train_step(model, optimizer, *step) for step in steps)
    processor, peaks, timed = time.process_time() - processor, memory_peaks(), batches[accumulated:]
    tokens, labels = (sum(int(batch[key].sum()) for batch in timed) for key in ("real_tokens", "real_labels"))
    flops = useful_flops(model, tokens, labels)
    return {
        "examples/s": arguments.batch_size * len(timed) / total,
        "tokens/s": tokens / total,
        "s a step": total / len(steps),
        "CPU s a step": processor / len(steps),
        "padding, %": 100 * (1 - tokens / sum(batch["input_ids"].numel() for batch in timed)),
        "GFLOP/s": flops / total / 1e9,
        "share of matrix rate, %": 100 * flops / total / matrix_rate(model),
        **took,
        **peaks,
        "batches": layout,
    }


def model_arguments(arguments: argparse.Namespace) -> ModelArguments:
    """The base and the prefix, as the toolkit's commands name them."""
    names = ("model_name_or_path", "num_virtual_tokens", "dtype", "quantization_bit", "attn_implementation")
    return ModelArguments(**{name: getattr(arguments, name, None) for name in names})


def resolve_dtype(model_args: ModelArguments) -> str:
    """Return the precision in which the base computes, and in which stock would have each of its weights."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, _ = choose_dtype(model_args.dtype, device, load_config(model_args).dtype)
    return str(dtype).removeprefix("torch.")


def load_setting(arguments: argparse.Namespace) -> SimpleNamespace:
    """Tokenizer, chat format and the encoded rows."""
    tokenizer = load_tokenizer(model_arguments(arguments))
    chat_format = get_chat_format(tokenizer, None)
    data_args = DataArguments(
        train_file=arguments.train_file,
        test_file=arguments.train_file,
        max_source_length=arguments.max_source_length,
        max_target_length=arguments.max_target_length,
        max_train_samples=count_examples(arguments),
        max_predict_samples=arguments.rows,
    )
    splits = load_splits(data_args, ["train", "test"])
    examples, _ = build_training_features(splits["train"], chat_format, tokenizer, data_args)
    if arguments.log_normal:
        examples = stretch(examples, *arguments.log_normal, data_args)
    prompts = build_generation_features(splits["test"], chat_format, tokenizer, data_args).dataset["input_ids"][:]
    return SimpleNamespace(tokenizer=tokenizer, chat_format=chat_format, examples=examples, prompts=prompts)


def count_examples(arguments: argparse.Namespace) -> int:
    """Return how many examples all steps have, with the one that is not timed."""
    return arguments.batch_size * arguments.gradient_accumulation_steps * (arguments.steps + 1)


def stretch(examples: "Dataset", median: float, sigma: float, data_args: DataArguments) -> "Dataset":
    """The examples with answers repeated or cut so that whole lengths are log-normal, within the two limits."""
    from datasets import Dataset

    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(len(examples), generator=generator).mul(sigma).exp().mul(median).tolist()
    most = data_args.max_source_length + data_args.max_target_length
    return Dataset.from_list([_stretched(*each, most) for each in zip(examples, drawn, strict=True)])


def _stretched(example: dict[str, Any], length: float, most: int) -> dict[str, Any]:
    start = example["labels"].count(-100)
    prompt, answer = example["input_ids"][:start], example["input_ids"][start:]
    wanted = max(round(min(length, most)) - start, 1)
    answer = (answer * (wanted // len(answer) + 1))[:wanted]
    return {"input_ids": prompt + answer, "labels": [-100] * start + answer, "length": start + wanted}


def build_model(arguments: argparse.Namespace, variant: Training) -> tuple[PeftModel, dict[str, float]]:
    """A fresh adapter on the base, with the savings of the variant; and what loading the base took."""
    watch_memory()
    torch.manual_seed(0)
    model_args = model_arguments(arguments)
    if not variant.kept_weights:
        model_args = replace(model_args, dtype=resolve_dtype(model_args))
    if variant.peft_type != PREFIX_TUNING:
        model_args = replace(model_args, peft_type=variant.peft_type, num_virtual_tokens=None)
    start = time.perf_counter()
    stock = {"copy_head_input": Mock(), "keep_unpacked": Mock()}
    with patch.multiple(loading, **stock) if variant.loaded_as_stock else nullcontext():
        base = load_base_model(model_args)
    synchronize()
    took = {"load, s": time.perf_counter() - start, "peak of loading, MiB": peak_memory()}
    model = create_adapter(base, model_args).train()
    if variant.prefix_attention:
        attach_prefix_attention(model)
    if variant.label_loss:
        attach_label_loss(base)
    if variant.activation_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    if variant.compiled:
        compile_layers(base)
    return model, took


def plan_batches(
    setting: SimpleNamespace, variant: Training, model: PeftModel, arguments: argparse.Namespace
) -> tuple[list[BatchEncoding], str]:
    """Batches of the same examples for every variant, with their numbers of tokens and labels; and their layout."""
    size, wanted, lengths = arguments.batch_size, count_examples(arguments), setting.examples["length"][:]
    if len(lengths) < wanted:
        raise UserError(
            f"--train_file {arguments.train_file} has {len(lengths)} examples and {arguments.steps} + 1 steps need "
            f"{wanted}: give a longer file, or fewer --steps."
        )
    length = arguments.max_source_length + arguments.max_target_length if variant.layout == "maximum" else None
    collate, order, layout = (
        TrainingCollator(setting.tokenizer, pad_to_multiple_of=length),
        range(len(lengths)),
        "file",
    )
    if variant.layout == "chosen":
        training = SimpleNamespace(train_batch_size=size, world_size=1, neftune_noise_alpha=None, device=model.device)
        training.gradient_accumulation_steps = arguments.gradient_accumulation_steps
        training.train_sampling_strategy = "auto"
        data = DataArguments(train_file=arguments.train_file)
        planned = plan_batching(setting.examples, collate, model.config, (model_arguments(arguments), data, training))
        collate, layout = planned.collator, planned.reason
        if planned.order == GROUPING:
            generator = torch.Generator().manual_seed(0)
            order = group_by_length(torch.tensor(lengths), row_sizes(training)[1], generator).tolist()
    rows = [list(setting.examples.select(order[start : start + size])) for start in range(0, len(order), size)]
    return [counted(collate(batch), batch).to(model.device) for batch in rows], layout


def counted(batch: dict[str, torch.Tensor], rows: list[dict[str, Any]]) -> BatchEncoding:
    """The batch, with how many tokens and labels it has without padding."""
    labels = [label for row in rows for label in row["labels"][1:] if label != -100]
    tokens = sum(row["length"] for row in rows)
    return BatchEncoding(batch | {"real_tokens": torch.tensor(tokens), "real_labels": torch.tensor(len(labels))})


def train_step(model: PeftModel, optimizer: torch.optim.Optimizer, *batches: BatchEncoding) -> float:
    """Seconds of a step, whose gradients are those of all its batches."""
    start = time.perf_counter()
    for batch in batches:
        inputs = {name: value for name, value in batch.items() if not name.startswith("real_")}
        (model(**inputs).loss / len(batches)).backward()
    optimizer.step()
    optimizer.zero_grad()
    synchronize()
    return time.perf_counter() - start


def useful_flops(model: PeftModel, tokens: int, labels: int) -> float:
    """
    Operations that the loss and the prefix's gradient need, without padding, recomputation and attention.

    A frozen product takes 2 for each weight and token in the forward pass and 2 in the backward pass; the head's are
    needed only where there is a label.
    """
    base = base_of(model)
    head = base.get_output_embeddings()
    layers = [layer for layer in base.modules() if isinstance(layer, nn.Linear) and layer is not head]
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    return 4.0 * (weights * tokens + head.weight.numel() * labels)


def matrix_rate(model: PeftModel) -> float:
    """Operations a second of a square product in the model's precision, the best of several."""
    one, other = (torch.randn(MATRIX, MATRIX, device=model.device, dtype=model.dtype) for _ in range(2))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        one @ other
        synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * MATRIX**3 / min(seconds)


def memory_rate(model: PeftModel) -> float:
    """Return the bytes a second at which memory is read, by the best of several sums over 512 MiB."""
    numbers = torch.ones(NUMBERS, device=model.device)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        numbers.sum()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return numbers.nbytes / min(seconds)


def synchronize() -> None:
    """Waits for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def memory_peaks() -> dict[str, float]:
    """The peaks by now, in MiB; on CPUs that of allocated memory too, as pages of a weight file are resident."""
    allocated = {} if torch.cuda.is_available() else {"allocated, MiB": watch_memory()["allocated"] / 2**20}
    return {"peak memory, MiB": peak_memory(), **allocated}


def peak_memory() -> float:
    """MiB that the process had at most: allocated on the GPU, resident on CPUs."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return peak_resident() / 2**20


@functools.cache
def watch_memory() -> dict[str, int]:
    """Begin to watch this process, once; the peaks in bytes, which grow while it runs."""
    peaks = {"allocated": 0, "resident": 0}
    threading.Thread(target=watch, args=(os.getpid(), peaks), daemon=True).start()
    return peaks
