"""What the benchmark compares: each variant of training and of prediction, and how one of them is measured."""

import argparse
import resource
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from peft import PeftModel
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
from glm_peft.models.chat_formats import get_chat_format
from glm_peft.models.loading import load_base_model, load_tokenizer
from glm_peft.models.unwrapping import base_of
from glm_peft.prediction import generation
from glm_peft.prediction.generation import generate_answers
from glm_peft.prediction.generation_settings import GenerationSettings
from glm_peft.preprocessing.batching import GROUPING, group_by_length, plan_batching
from glm_peft.preprocessing.collators import GenerationCollator, TrainingCollator
from glm_peft.preprocessing.conversations import load_splits

if TYPE_CHECKING:  # a machine with a GPU may be without it
    from datasets import Dataset

MATRIX = 2048  # rows and columns of the product by which the machine's rate is measured
NUMBERS = 2**27  # whose sum measures the rate of its memory


@dataclass(frozen=True)
class Training:
    """What a variant of training has of this toolkit's savings."""

    layout: str = "chosen"  # by the toolkit from the data; "random": in the file's order, "maximum": to both limits
    label_loss: bool = True
    prefix_attention: bool = True
    activation_checkpointing: bool = False
    compiled: bool = False
    peft_type: str = PREFIX_TUNING


@dataclass(frozen=True)
class Prediction:
    """What a variant of prediction has of them."""

    engine: bool = True
    batch_size: int | None = 0  # 0: that of training, `None`: the engine's own choice
    own_decoding: bool = True
    prefix_once: bool = True


TRAINING = {
    "toolkit": Training(),
    "without the label loss": Training(label_loss=False),
    "without a layout of its own": Training(layout="random"),
    "with activation checkpointing": Training(activation_checkpointing=True),
    "with torch.compile": Training(compiled=True),
    "prefix in a cache": Training(layout="random", prefix_attention=False),
    "published way": Training("maximum", label_loss=False, activation_checkpointing=True),
    "plain PEFT": Training("random", label_loss=False, prefix_attention=False),
    "LoRA": Training(prefix_attention=False, peft_type=LORA),
    "the whole base": Training(label_loss=False, prefix_attention=False, peft_type=FULL),
}
PREDICTION = {
    "toolkit": Prediction(batch_size=None),
    "toolkit, same batch size": Prediction(),
    "with stock's decoding": Prediction(own_decoding=False),
    "prefix for every batch": Prediction(prefix_once=False),
    "published way": Prediction(engine=False, batch_size=1),
    "plain PEFT": Prediction(engine=False),
}


def measure(task: str, name: str, arguments: argparse.Namespace) -> dict[str, float | str]:
    """One variant, in this process."""
    return measure_training(name, arguments) if task == "training" else measure_prediction(name, arguments)


def measure_training(name: str, arguments: argparse.Namespace) -> dict[str, float | str]:
    """Forward, backward and optimizer on all batches but the first."""
    variant, setting = TRAINING[name], load_setting(arguments)
    model = build_model(arguments, variant)
    batches, layout = plan_batches(setting, variant, model, arguments)
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1e-3)
    first, *timed = batches
    train_step(model, optimizer, first)
    processor = time.process_time()
    total = sum(train_step(model, optimizer, batch) for batch in timed)
    processor = time.process_time() - processor
    tokens, labels = (sum(int(batch[key].sum()) for batch in timed) for key in ("real_tokens", "real_labels"))
    flops = useful_flops(model, tokens, labels)
    return {
        "examples/s": arguments.batch_size * len(timed) / total,
        "tokens/s": tokens / total,
        "s a step": total / len(timed),
        "CPU s a step": processor / len(timed),
        "padding, %": 100 * (1 - tokens / sum(batch["input_ids"].numel() for batch in timed)),
        "GFLOP/s": flops / total / 1e9,
        "share of matrix rate, %": 100 * flops / total / matrix_rate(model),
        "peak memory, MiB": peak_memory(),
        "batches": layout,
    }


def measure_prediction(name: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Greedy answers of a fixed length, so that every variant does the same work."""
    variant, setting = PREDICTION[name], load_setting(arguments)
    model = build_model(arguments, Training(label_loss=False, prefix_attention=False)).eval()
    prompts = setting.prompts[: arguments.rows]
    size = arguments.batch_size if variant.batch_size == 0 else variant.batch_size
    answer = answer_with_engine if variant.engine else answer_in_order
    answer(model, setting, prompts[:2], variant, size, arguments)  # what is only done once is not counted
    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    head = base_of(model).get_output_embeddings()
    head.register_forward_pre_hook(count)  # which every pass comes to once
    start = time.perf_counter()
    answer(model, setting, prompts, variant, size, arguments)
    synchronize()
    seconds = time.perf_counter() - start
    peak, read = peak_memory(), passes * weight_bytes(model)
    return {
        "rows/s": len(prompts) / seconds,
        "tokens/s": len(prompts) * arguments.max_new_tokens / seconds,
        "GB/s of weights": read / seconds / 1e9,
        "share of memory rate, %": 100 * read / seconds / memory_rate(model),
        "peak memory, MiB": peak,
    }


def model_arguments(arguments: argparse.Namespace) -> ModelArguments:
    """The base and the prefix, as the toolkit's commands name them."""
    names = ("model_name_or_path", "num_virtual_tokens", "dtype", "quantization_bit", "attn_implementation")
    return ModelArguments(**{name: getattr(arguments, name, None) for name in names})


def load_setting(arguments: argparse.Namespace) -> SimpleNamespace:
    """Tokenizer, chat format and the encoded rows."""
    tokenizer = load_tokenizer(model_arguments(arguments))
    chat_format = get_chat_format(tokenizer, None)
    data_args = DataArguments(
        train_file=arguments.train_file,
        test_file=arguments.train_file,
        max_source_length=arguments.max_source_length,
        max_target_length=arguments.max_target_length,
        max_train_samples=arguments.batch_size * (arguments.steps + 1),
        max_predict_samples=arguments.rows,
    )
    splits = load_splits(data_args, ["train", "test"])
    examples, _ = build_training_features(splits["train"], chat_format, tokenizer, data_args)
    if arguments.log_normal:
        examples = stretch(examples, *arguments.log_normal, data_args)
    prompts = build_generation_features(splits["test"], chat_format, tokenizer, data_args).dataset["input_ids"][:]
    return SimpleNamespace(tokenizer=tokenizer, chat_format=chat_format, examples=examples, prompts=prompts)


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


def build_model(arguments: argparse.Namespace, variant: Training) -> PeftModel:
    """A fresh adapter on the base, with the savings of the variant."""
    torch.manual_seed(0)
    model_args = model_arguments(arguments)
    if variant.peft_type != PREFIX_TUNING:
        model_args = replace(model_args, peft_type=variant.peft_type, num_virtual_tokens=None)
    model = create_adapter(load_base_model(model_args), model_args).train()
    base = base_of(model)
    if variant.prefix_attention:
        attach_prefix_attention(model)
    if variant.label_loss:
        attach_label_loss(base)
    if variant.activation_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    if variant.compiled:
        compile_layers(base)
    return model


def plan_batches(
    setting: SimpleNamespace, variant: Training, model: PeftModel, arguments: argparse.Namespace
) -> tuple[list[BatchEncoding], str]:
    """Batches of the same examples for every variant, with their numbers of tokens and labels; and their layout."""
    size, lengths = arguments.batch_size, setting.examples["length"][:]
    length = arguments.max_source_length + arguments.max_target_length if variant.layout == "maximum" else None
    collate, order, layout = (
        TrainingCollator(setting.tokenizer, pad_to_multiple_of=length),
        range(len(lengths)),
        "file",
    )
    if variant.layout == "chosen":
        training = SimpleNamespace(train_batch_size=size, gradient_accumulation_steps=1, world_size=1)
        training.train_sampling_strategy, training.neftune_noise_alpha = "auto", None
        data = DataArguments(train_file=arguments.train_file)
        planned = plan_batching(setting.examples, collate, model.config, (model_arguments(arguments), data, training))
        collate, layout = planned.collator, planned.reason
        if planned.order == GROUPING:
            order = group_by_length(torch.tensor(lengths), size, torch.Generator().manual_seed(0)).tolist()
    rows = [list(setting.examples.select(order[start : start + size])) for start in range(0, len(order), size)]
    return [counted(collate(batch), batch).to(model.device) for batch in rows], layout


def counted(batch: dict[str, torch.Tensor], rows: list[dict[str, Any]]) -> BatchEncoding:
    """The batch, with how many tokens and labels it has without padding."""
    labels = [label for row in rows for label in row["labels"][1:] if label != -100]
    tokens = sum(row["length"] for row in rows)
    return BatchEncoding(batch | {"real_tokens": torch.tensor(tokens), "real_labels": torch.tensor(len(labels))})


def train_step(model: PeftModel, optimizer: torch.optim.Optimizer, batch: BatchEncoding) -> float:
    """Seconds of a step."""
    start = time.perf_counter()
    model(**{name: value for name, value in batch.items() if not name.startswith("real_")}).loss.backward()
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


def weight_bytes(model: PeftModel) -> int:
    """Return the bytes of the weights that a pass reads: all but the embeddings, of which it takes a row a token."""
    base = base_of(model)
    embeddings = base.get_input_embeddings().weight
    head = base.get_output_embeddings().weight
    weights = sum(weight.nbytes for weight in base.parameters())
    return weights - (embeddings.nbytes if embeddings is not head else 0)


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


def answer_with_engine(
    model: PeftModel,
    setting: SimpleNamespace,
    prompts: list[list[int]],
    variant: Prediction,
    size: int | None,
    arguments: argparse.Namespace,
) -> None:
    """The engine of `glm_peft.predict`, with some of its savings put out."""
    settings = GenerationSettings(max_new_tokens=arguments.max_new_tokens, batch_size=size)
    patches = {} if variant.prefix_once else {"prefix_computed_once": lambda model: nullcontext()}
    patches |= {} if variant.own_decoding else {"_decoding": lambda *_: {}}
    with patch.multiple(generation, **patches) if patches else nullcontext():
        generate_answers(model, setting.tokenizer, Endless(setting.chat_format), {"input_ids": prompts}, settings)


def answer_in_order(
    model: PeftModel,
    setting: SimpleNamespace,
    prompts: list[list[int]],
    variant: Prediction,
    size: int,
    arguments: argparse.Namespace,
) -> None:
    """Stock `generate` on batches in the order of the file."""
    for batch in prompt_batches(setting, prompts, size):
        inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
        model.generate(**inputs, max_new_tokens=arguments.max_new_tokens, do_sample=False, eos_token_id=None)


def prompt_batches(setting: SimpleNamespace, prompts: list[list[int]], size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Padded on the left."""
    collate = GenerationCollator(setting.tokenizer)
    for start in range(0, len(prompts), size):
        yield collate([{"input_ids": ids} for ids in prompts[start : start + size]])


class Endless:
    """A chat format whose answers are never ended."""

    has_roles = False

    def __init__(self, chat_format: Any) -> None:
        self.clean_answer = chat_format.clean_answer

    def stop_token_ids(self, tokenizer: Any) -> list[int]:
        return [-1]


def synchronize() -> None:
    """Waits for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory() -> float:
    """MiB that the process had at most: allocated on the GPU, resident on CPUs."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
