"""The variants of prediction that the benchmark compares, and how one of them is measured."""

import argparse
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from benchmark_cases import (
    ALL_FLOAT32,
    AS_STOCK,
    build_model,
    load_setting,
    memory_peaks,
    memory_rate,
    synchronize,
)
from peft import PeftModel

from glm_peft.models.quantization import allow_packing
from glm_peft.models.unwrapping import base_of
from glm_peft.prediction import generation
from glm_peft.prediction.generation import generate_answers
from glm_peft.prediction.generation_settings import GenerationSettings
from glm_peft.preprocessing.collators import GenerationCollator


@dataclass(frozen=True)
class Prediction:
    """What a variant of prediction has of this toolkit's savings."""

    engine: bool = True
    batch_size: int | None = 0  # 0: that of training, `None`: the engine's own choice
    own_decoding: bool = True
    prefix_once: bool = True
    kept_weights: bool = True


PREDICTION = {
    "toolkit": Prediction(batch_size=None),
    "toolkit, same batch size": Prediction(),
    ALL_FLOAT32: Prediction(batch_size=None, kept_weights=False),
    "with stock's decoding": Prediction(own_decoding=False),
    "prefix for every batch": Prediction(prefix_once=False),
    "published way": Prediction(engine=False, batch_size=1, kept_weights=False),
    "plain PEFT": Prediction(engine=False, kept_weights=False),
}


def measure_prediction(name: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Greedy answers of a fixed length, so that every variant does the same work."""
    variant, setting = PREDICTION[name], load_setting(arguments)
    loaded = replace(AS_STOCK, kept_weights=variant.kept_weights, loaded_as_stock=not variant.engine)
    model, took = build_model(arguments, loaded)
    model.eval()
    if variant.engine:
        allow_packing(model)
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
    peaks, read = memory_peaks(), passes * weight_bytes(model)
    return {
        "rows/s": len(prompts) / seconds,
        "tokens/s": len(prompts) * arguments.max_new_tokens / seconds,
        "GB/s of weights": read / seconds / 1e9,
        "share of memory rate, %": 100 * read / seconds / memory_rate(model),
        **took,
        **peaks,
    }


def weight_bytes(model: PeftModel) -> int:
    """Return the bytes of the weights that a pass reads: all but the embeddings, of which it takes a row a token."""
    base = base_of(model)
    embeddings = base.get_input_embeddings().weight
    head = base.get_output_embeddings().weight
    weights = sum(weight.nbytes for weight in base.parameters())
    return weights - (embeddings.nbytes if embeddings is not head else 0)


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
