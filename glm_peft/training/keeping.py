"""
Measure what training takes from the base, and hold on to it: general prompts and the base's own answers to them.

The base is the same model without its adapter. Its answers and what it gave their tokens are computed once, before
training, and kept in the output folder.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch.nn.functional import cross_entropy

from glm_peft.adapters.assembly import OpenedBase
from glm_peft.adapters.divergence_loss import divergence_from
from glm_peft.adapters.label_loss import Project, at_labels, chunks_of, replaced_loss
from glm_peft.arguments.data import DataArguments
from glm_peft.arguments.training_defaults import BUILTIN_PROMPTS
from glm_peft.errors import UserError
from glm_peft.models.unwrapping import base_of
from glm_peft.prediction.evaluation import Answering
from glm_peft.prediction.generation_settings import GenerationSettings
from glm_peft.preprocessing.collators import IGNORED_LABEL, TrainingCollator
from glm_peft.preprocessing.split_loading import load_splits
from glm_peft.provenance.fingerprints import sample_weights
from glm_peft.reporting.files import write_atomically
from glm_peft.training.base_calls import calls_of_base, without_adapter
from glm_peft.training.teacher_values import TeacherBatch, TeacherValues, keep_values, number_labels

if TYPE_CHECKING:
    from datasets import Dataset

LIKELIEST = 20
"""Tokens whose probabilities are compared at each place; all others count as one."""
ANSWER_TOKENS = 64
"""The most tokens of an answer that are compared, its end token counted."""
KEEP_FOLDER = "keep"
"""The folder in the output folder that has the base's answers and values."""

_PROMPT_TOKENS = 1024
_GENERAL_PROMPTS = Path(__file__).with_name("general_prompts.jsonl")

logger = logging.getLogger(__name__)


def read_general_prompts(base: OpenedBase, keep_file: str | None, limit: int) -> list[list[int]]:
    """
    Read the prompts of `--keep_file` and encode them as the base is asked them, without the texts of the data's flags.

    Args:
        keep_file: a file in a form that training reads, whose answers are left out, or `builtin`; `None` for none.
        limit: the most prompts.

    Raises:
        UserError: the file cannot be read, a prompt cannot be encoded, or there are fewer than two.
    """
    if keep_file is None:
        return []
    file = str(_GENERAL_PROMPTS) if keep_file == BUILTIN_PROMPTS else keep_file
    skips = base.data_args.skip_bad_rows
    data_args = DataArguments(test_file=file, max_predict_samples=limit, skip_bad_rows=skips)
    try:
        split = load_splits(data_args, ["test"])["test"]
    except UserError as error:
        raise UserError(f"--keep_file {error}") from error  # the sentence begins with the file
    prompts = []
    for row in split:
        try:
            prompts.append(base.chat_format.encode_prompt(base.tokenizer, row.prompt, _PROMPT_TOKENS).ids)
        except UserError as error:
            raise UserError(f"{row.where}: {error}") from error
    if len(prompts) < 2:
        raise UserError(f"--keep_file {keep_file} has one prompt: give two or more, as every other one is measured.")
    return prompts


@dataclass(frozen=True)
class Keeping:
    """
    The base's answers to general prompts, against which a model with an adapter is measured and held.

    Every other prompt is measured and never trained on; the others are those of the second loss.

    Args:
        answering: the model with its adapter.
        prompts: their ids.
        answers: of the base, cut to `ANSWER_TOKENS`.
        examples: prompts with answers, whose labels are numbers of rows in `values` and in `tokens`.
        values: what the base gave each token of its answers.
        tokens: the tokens themselves, [n].
        batch_size: of the measures.
    """

    answering: Answering
    prompts: list[list[int]]
    answers: list[str]
    examples: "Dataset"
    values: TeacherValues
    tokens: torch.Tensor
    batch_size: int

    def measure(self) -> dict[str, float]:
        """
        Measure how far the answers have moved, by the prompts that are not trained on.

        Returns:
            keep_divergence: from the base on its own answers (Kullback-Leibler, nats per token, the 20 likeliest
                tokens and all others as one).
            keep_same_answers: share of the greedy answers that are those of the base, 0 to 1.
            keep_loss_rise: of the loss on the base's answers, nats per token.
        """
        model, rows = self.answering.model, range(0, len(self.prompts), 2)
        with calls_of_base(model):
            base = self._compare(model, rows)
        found = self._compare(model, rows)
        own = self._answer(self.answering, rows)
        same = [answer == self.answers[row] for answer, row in zip(own, rows, strict=True)]
        return {
            "keep_divergence": found.divergence / found.count,
            "keep_same_answers": sum(same) / len(same),
            "keep_loss_rise": (found.loss - base.loss) / found.count,
        }

    def draw_batch(self, number: int, size: int, seed: int) -> dict[str, torch.Tensor]:
        """Return batch `number` of this process for the second loss; an order of its own in every round."""
        state, rows = PartialState(), range(1, len(self.prompts), 2)
        start = (number * state.num_processes + state.process_index) * size
        drawn = []
        for place in range(start, start + size):
            # By the place alone, so that a resumed run draws what one that was never stopped does.
            around, index = divmod(place, len(rows))
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed + around))
            drawn.append(rows[order[index]])
        return self._collate(drawn)

    def divergence(self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the mean divergence [] from the base on a batch; `model` may be the wrapper of a backend."""
        with replaced_loss(base_of(self.answering.model), divergence_from(self.values)):
            return model(**batch)["loss"]

    def mean_length(self) -> float:
        """Return the mean number of tokens of the examples that the second loss is taken on."""
        lengths = self.examples["length"][1::2]
        return sum(lengths) / len(lengths)

    def _collate(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        batch = TrainingCollator(self.answering.tokenizer)([self.examples[row] for row in rows])
        return {name: tensor.to(self.answering.model.device) for name, tensor in batch.items()}

    def _answer(self, answering: Answering, rows: Sequence[int]) -> list[str]:
        return _answer(answering, [self.prompts[row] for row in rows])

    @torch.no_grad()
    def _compare(self, model: torch.nn.Module, rows: Sequence[int]) -> "_Sums":
        # All processes do all rows: they are few, and sharded models must be called equally often by all.
        sums, is_training = _Sums(self.values, self.tokens), model.training
        model.eval()
        with replaced_loss(base_of(model), sums.take):
            for batch in _in_batches(rows, self.batch_size):
                model(**self._collate(batch))
        model.train(is_training)
        return sums


class _Sums:
    """Divergence and loss summed over the tokens of the base's answers, by a loss for `replaced_loss` that adds up."""

    def __init__(self, values: TeacherValues, tokens: torch.Tensor) -> None:
        self.values, self.tokens = values, tokens
        self.divergence = self.loss = 0.0
        self.count = 0

    def take(self, hidden_states: torch.Tensor, labels: torch.Tensor, project: Project, *_: Any) -> torch.Tensor:
        states, rows = at_labels(hidden_states, labels)
        compare, targets = self.values.measure(rows, project), self.tokens[rows.cpu()].to(states.device)
        for chunk in chunks_of(states, project):
            logits = project(states[chunk])
            self.divergence += compare(logits, chunk)[0].item()
            self.loss += cross_entropy(logits.float(), targets[chunk], reduction="sum").item()
        self.count += len(states)
        return states.new_zeros(())


def hear_base(
    prompts: list[list[int]], answering: Answering, folder: Path, batch_size: int, described: Mapping[str, Any]
) -> Keeping:
    """
    Let the base answer general prompts, and keep its answers and what it gave their tokens; or read them again.

    Args:
        prompts: as `read_general_prompts` returns them.
        answering: the model with its adapter, whose base has `attach_label_loss`.
        folder: of the files, which are made where they are missing or of something else.
        batch_size: in which the values are computed, and the measures.
        described: what the base's answers depend on beside the prompts and its weights, such as how it is quantized.
    """
    model, base = answering.model, base_of(answering.model)
    described = dict(described) | {"base": sample_weights(model), "precision": str(base.dtype)}
    folder.mkdir(parents=True, exist_ok=True)
    with without_adapter(model) as bare:
        digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
        answers = _answer_once(
            folder / "answers.json",
            described | {"prompts": digest, "answer_tokens": ANSWER_TOKENS},
            lambda: _answer(replace(answering, model=bare), prompts),
        )
        examples, tokens = _build_examples(answering, prompts, answers)
        batches = [TeacherBatch(0, rows) for rows in _in_batches(range(len(prompts)), batch_size)]
        collate = TrainingCollator(answering.tokenizer)
        values = keep_values(folder, examples, batches, base, lambda _: bare, collate, LIKELIEST, described)
    return Keeping(answering, prompts, answers, examples, values, tokens, batch_size)


def _in_batches(rows: Sequence[int], size: int) -> list[list[int]]:
    return [list(rows[start : start + size]) for start in range(0, len(rows), size)]


def _answer(answering: Answering, prompts: list[list[int]]) -> list[str]:
    # Greedily, and in as many tokens whatever the run's own settings are, so that figures of runs can be compared.
    return answering.generate({"input_ids": prompts}, GenerationSettings(max_new_tokens=ANSWER_TOKENS))


def _answer_once(file: Path, described: Mapping[str, Any], answer: Callable[[], list[str]]) -> list[str]:
    """Return the answers that a file has of the same base and prompts, or have them given and write them."""
    is_main = PartialState().is_main_process
    text = file.read_text(encoding="utf-8") if is_main and file.is_file() else "{}"
    (known,) = broadcast_object_list([json.loads(text)])
    if known.get("of") == described:
        return known["answers"]
    answers = answer()
    if is_main:
        write_atomically(file, json.dumps({"of": described, "answers": answers}, ensure_ascii=False, indent=1) + "\n")
    return answers


def _build_examples(
    answering: Answering, prompts: list[list[int]], answers: list[str]
) -> tuple["Dataset", torch.Tensor]:
    """Return prompts with the base's answers, labels numbered, and the tokens that the numbers stand for."""
    from datasets import Dataset

    rows, tokens = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        # Cut without an end token, which the base did not give there.
        ids = answering.chat_format.encode_answer(answering.tokenizer, answer).ids[:ANSWER_TOKENS]
        labels = [IGNORED_LABEL] * len(prompt) + ids
        rows.append({"input_ids": prompt + ids, "labels": labels, "length": len(labels)})
        tokens += ids
    return number_labels(Dataset.from_list(rows)), torch.tensor(tokens)
