"""Scores of generated answers, during training and after it."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from glm_peft.chat_formats import ChatFormat
from glm_peft.data import GenerationFeatures
from glm_peft.generation import GenerationSettings, generate_answers
from glm_peft.metrics import compute_scores
from glm_peft.models.generations import CHATGLM3, GLM4
from glm_peft.prediction_files import PREDICTIONS_NAME, write_atomically, write_predictions

RESULTS_NAME = "predict_results.json"


def choose_protocol(chat_format: ChatFormat, metric_protocol: str | None) -> str:
    """The protocol that was asked for, or else that of the generation's published scripts."""
    return metric_protocol or ("chatglm3" if chat_format.name in (CHATGLM3, GLM4) else "thudm")


def score_answers(references: Sequence[str | None], answers: Sequence[str], protocol: str) -> dict[str, float]:
    """The scores of the rows that have a reference; nothing where none has."""
    pairs = [
        (answer, reference) for answer, reference in zip(answers, references, strict=True) if reference is not None
    ]
    if not pairs:
        return {}
    predictions, labels = zip(*pairs, strict=True)
    return compute_scores(list(predictions), list(labels), protocol)


def evaluate_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    chat_format: ChatFormat,
    features: GenerationFeatures,
    settings: GenerationSettings,
    protocol: str,
) -> dict[str, float]:
    """Generate an answer to every prompt and score the answers."""
    answers = generate_answers(model, tokenizer, chat_format, features, settings)
    return score_answers(features.references, answers, protocol)


def predict(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    chat_format: ChatFormat,
    features: GenerationFeatures,
    settings: GenerationSettings,
    protocol: str,
    output_dir: str,
) -> dict[str, float]:
    """
    Generate an answer to every prompt; write `generated_predictions.jsonl` and `predict_results.json`.

    Returns:
        The results: scores where there are references, rows, and rows and tokens a second.
    """
    counted: list[int] = []
    start = time.perf_counter()
    answers = generate_answers(
        model, tokenizer, chat_format, features, settings, on_batch=lambda batch: counted.extend(batch.num_tokens)
    )
    seconds = time.perf_counter() - start
    folder = Path(output_dir)
    write_predictions(folder / PREDICTIONS_NAME, features.prompts, features.references, answers)
    results = {
        f"predict_{name}": score for name, score in score_answers(features.references, answers, protocol).items()
    }
    results |= {
        "predict_samples": len(answers),
        "predict_runtime": round(seconds, 4),
        "predict_samples_per_second": round(len(answers) / seconds, 3),
        "predict_tokens_per_second": round(sum(counted) / seconds, 3),
    }
    write_atomically(folder / RESULTS_NAME, json.dumps(results, indent=4, ensure_ascii=False) + "\n")
    return results
