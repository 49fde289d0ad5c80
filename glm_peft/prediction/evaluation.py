"""Generate answers and score them, during training and after it."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from glm_peft.arguments.data import DataArguments
from glm_peft.arguments.generation import GenerationArguments
from glm_peft.arguments.splits import VALIDATION
from glm_peft.data import GenerationFeatures, join_features
from glm_peft.models.chat_formats import ChatFormat
from glm_peft.models.generations import CHATGLM3, GLM4
from glm_peft.models.tool_formats import TURN_MARK, ToolCall
from glm_peft.prediction.answer_decoding import decode_answer, decode_blocks
from glm_peft.prediction.generation import AnsweredBatch, generate_answers
from glm_peft.prediction.generation_settings import GenerationSettings
from glm_peft.prediction.prediction_files import PartialPredictions, write_predictions
from glm_peft.prediction.tool_scores import describe_calls, read_calls, score_calls
from glm_peft.reporting.file_names import PREDICT_RESULTS_NAME, PREDICTIONS_NAME
from glm_peft.reporting.results import save_results

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answering:
    """Model that answers prompts, with its adapter if it has one, its tokenizer and its chat format."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    chat_format: ChatFormat

    def generate(self, features: GenerationFeatures, settings: GenerationSettings, **options: Any) -> list[str]:
        """Generate an answer to every prompt, see `generate_answers`."""
        return generate_answers(self.model, self.tokenizer, self.chat_format, features, settings, **options)

    def decode(self, ids: list[int], keeps_marks: bool = False) -> str:
        """
        Decode the generated ids of an answer.

        Args:
            keeps_marks: keep the mark between blocks of the turn, whether or not they call tools.
        """
        decoded = (self.tokenizer, self.chat_format, ids)
        text = TURN_MARK.join(decode_blocks(*decoded)) if keeps_marks else decode_answer(*decoded)
        return self.chat_format.clean_answer(text)


def choose_protocol(chat_format: ChatFormat, metric_protocol: str | None) -> str:
    """Return the protocol that was asked for, or else the one of the generation's published scripts."""
    return metric_protocol or ("chatglm3" if chat_format.name in (CHATGLM3, GLM4) else "thudm")


def score_answers(features: GenerationFeatures, answers: Sequence[str], protocol: str) -> dict[str, float]:
    """
    Score the rows that have a reference; return no scores where none has.

    By `thudm` the texts are those of the published scripts: `decoded_references`, and answers with the white space
    around them. The scores against the text of the file then stand beside, under names that begin with `text-`.

    Args:
        answers: with the white space around them, as `generate_answers(keep_white_space=True)` returns them.
    """
    from glm_peft.metrics import TEXT_SCORE_NAMES, compute_scores  # slow, and of no use without scores

    rows = zip(answers, features.references, features.decoded_references, strict=True)
    rows = [row for row in rows if row[1] is not None]
    if not rows:
        return {}
    answers, references, decoded = zip(*rows, strict=True)
    scores = compute_scores([answer.strip() for answer in answers], references, protocol)
    if protocol != "thudm":
        return scores
    return compute_scores(answers, decoded, protocol) | {
        text_name: scores[name] for name, text_name in TEXT_SCORE_NAMES.items()
    }


@dataclass(frozen=True)
class Scoring:
    """
    Answers as they are generated and scored.

    Args:
        answering: generates them.
        settings: by which they are generated.
        protocol: the name of the score protocol.
    """

    answering: Answering
    settings: GenerationSettings
    protocol: str

    @classmethod
    def from_arguments(
        cls, answering: Answering, generation_args: GenerationArguments, data_args: DataArguments
    ) -> "Scoring":
        """Take settings and protocol from the arguments, and what they leave open from the chat format."""
        settings = GenerationSettings.from_arguments(generation_args, data_args)
        return cls(answering, settings, choose_protocol(answering.chat_format, data_args.metric_protocol))

    def _score(self, features: GenerationFeatures, answers: Sequence[str]) -> dict[str, float]:
        of_calls = score_calls(features, answers, self.answering.chat_format)
        return score_answers(features, answers, self.protocol) | of_calls

    def make_scorers(self, prompts: Mapping[str, GenerationFeatures]) -> dict[str, Callable[[], dict[str, float]]]:
        """
        Make a function for each split but `test` that generates and scores its answers.

        Where there are several, that of `validation` scores together what the others generated last.
        """
        # Without `test`, whose scores must not choose the checkpoint.
        sets = {name: features for name, features in prompts.items() if name != "test"}
        answers: dict[str, list[str]] = {}

        def evaluate(name: str) -> dict[str, float]:
            answers[name] = self.answering.generate(sets[name], self.settings, keep_white_space=True)
            return self._score(sets[name], answers[name])

        def evaluate_together() -> dict[str, float]:
            return self._score(join_features(sets.values()), [answer for name in sets for answer in answers[name]])

        return {VALIDATION: evaluate_together} | {name: partial(evaluate, name) for name in sets} if sets else {}

    def predict(
        self,
        features: GenerationFeatures,
        output_dir: str | Path,
        kept: PartialPredictions | None = None,
        origin: Mapping[str, Any] | None = None,
    ) -> dict[str, float | str]:
        """
        Generate an answer to every prompt; write `generated_predictions.jsonl` and `predict_results.json`.

        Args:
            kept: keeps each batch on the disk as soon as it is answered, and has the answers of a stopped run.
            origin: the weights and the data that the results are of, as `state_origin` returns them.

        Returns:
            The results: scores where there are references, rows, and rows and tokens per second of this run alone.
        """
        # Gathered: all processes must plan the same batches, and none may write before all have read.
        known = dict(gather_object(list(kept.answers.items()))) if kept else {}
        num_tokens: list[int] = []

        def keep(batch: AnsweredBatch) -> None:
            num_tokens.extend(batch.num_tokens)
            if kept:
                kept.add(batch.rows, batch.answers)

        start = time.perf_counter()
        answers = self.answering.generate(
            features, self.settings, on_batch=keep, known_answers=known, keep_white_space=True
        )
        speed = _measure_speed(len(answers), len(known), num_tokens, time.perf_counter() - start)
        scores = self._score(features, answers)
        results = {"metric_protocol": self.protocol, **scores} if scores else {}
        results = {f"predict_{name}": value for name, value in (results | speed).items()}
        if PartialState().is_main_process:
            folder = Path(output_dir)
            (folder / PREDICT_RESULTS_NAME).unlink(missing_ok=True)  # or it would tell of answers that were replaced
            self._write(folder / PREDICTIONS_NAME, features, answers)
            save_results(results, folder / PREDICT_RESULTS_NAME, origin or {})
        return results

    def _write(self, file: Path, features: GenerationFeatures, answers: Sequence[str]) -> None:
        texts, rows = [self.answering.chat_format.clean_answer(answer) for answer in answers], features.rows
        if self.protocol == "thudm":
            rows = [row | more for row, more in zip(rows, _scored_texts(features, answers), strict=True)]
        calls = read_calls(features, texts, self.answering.chat_format)
        rows = [row | _written_calls(*of_row) if of_row else row for row, of_row in zip(rows, calls, strict=True)]
        write_predictions(file, features.prompts, features.references, texts, rows)


def _written_calls(wanted: list[ToolCall], found: list[ToolCall]) -> dict[str, Any]:
    return {"label_calls": describe_calls(wanted), "predict_calls": describe_calls(found)}


def _scored_texts(features: GenerationFeatures, answers: Sequence[str]) -> list[dict[str, str | None]]:
    """Return for each row the texts that `thudm` compares, where they are not those that the file shows."""
    scored: list[dict[str, str | None]] = []
    for reference, decoded, answer in zip(features.references, features.decoded_references, answers, strict=True):
        scored.append({"scored_labels": decoded} if decoded != reference else {})
        if answer != answer.strip():
            scored[-1]["scored_predict"] = answer
    changed = sum("scored_labels" in texts for texts in scored)
    if changed:
        logger.info(
            "As published, %d of %d answers of the file are compared otherwise than they stand there: encoded, cut to "
            "--max_target_length (--val_max_target_length) tokens and decoded, see scored_labels in %s. The scores "
            "that begin with text- are against the file.",
            changed,
            len(scored),
            PREDICTIONS_NAME,
        )
    return scored


def _measure_speed(rows: int, known: int, num_tokens: list[int], seconds: float) -> dict[str, float]:
    """Measure the speed of all processes together."""
    # What a stopped run answered is not divided by this run's time.
    return {
        "samples": rows,
        "resumed_samples": known,
        "runtime": round(seconds, 4),
        "samples_per_second": round((rows - known) / seconds, 3),
        "tokens_per_second": round(sum(gather_object([sum(num_tokens)])) / seconds, 3),
    }
