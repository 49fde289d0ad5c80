"""
Keep on the disk what a teacher gives each token of the answers, computed once and read by every epoch.

A row is a token with a label: the likeliest tokens with their probabilities, or, to be exact, the hidden state before
the head. Labels become the numbers of these rows, see `glm_peft.adapters.divergence_loss`.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import count, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from glm_peft.adapters.divergence_loss import compare_all, compare_likeliest, take_likeliest
from glm_peft.adapters.label_loss import Measure, Project, at_labels, chunks_of, replaced_loss
from glm_peft.models.unwrapping import base_of
from glm_peft.preprocessing.collators import IGNORED_LABEL, TrainingCollator
from glm_peft.reporting.files import write_atomically

if TYPE_CHECKING:
    from datasets import Dataset

_DESCRIPTION = "values.json"


@dataclass(frozen=True)
class TeacherBatch:
    """Examples `rows` of a dataset that are computed together, with the text number `context` in front."""

    context: int
    rows: list[int]


class TeacherValues:
    """
    The values of a teacher in files that are mapped into memory.

    Args:
        folder: of the files, which are made where they are missing.
        num_rows: tokens with a label.
        k: how many of the likeliest tokens are kept; 0 keeps the hidden states, and so all.
        base: whose hidden size and precision the states have.
    """

    def __init__(self, folder: Path, num_rows: int, k: int, base: PreTrainedModel) -> None:
        self.k = min(k, base.config.vocab_size - 1)
        if k:
            self.ids = _map(folder / "ids.bin", num_rows, self.k, torch.int32)
            self.log_probs = _map(folder / "log_probs.bin", num_rows, self.k + 1, torch.float32)
        else:
            self.states = _map(folder / "states.bin", num_rows, base.config.hidden_size, base.dtype)

    def take(self, hidden_states: torch.Tensor, labels: torch.Tensor, project: Project, *_: Any) -> torch.Tensor:
        """Keep the values of a batch instead of computing a loss; the arguments are those of a loss."""
        states, rows = at_labels(hidden_states, labels)
        rows = rows.cpu()
        for chunk in chunks_of(states, project) if self.k else ():
            ids, log_probs = take_likeliest(project(states[chunk]), self.k)
            self.ids[rows[chunk]], self.log_probs[rows[chunk]] = ids.int().cpu(), log_probs.cpu()
        if not self.k:
            self.states[rows] = states.cpu()
        return states.new_zeros(())

    def measure(self, rows: torch.Tensor, project: Project) -> Measure:
        """Return the function that compares logits with the distributions `rows` [n]."""
        device, rows = rows.device, rows.cpu()

        def measure(logits: torch.Tensor, chunk: slice) -> tuple[torch.Tensor, torch.Tensor]:
            if not self.k:
                return compare_all(logits, project(self.states[rows[chunk]].to(device)))
            ids, log_probs = self.ids[rows[chunk]].to(device), self.log_probs[rows[chunk]].to(device)
            return compare_likeliest(logits, ids.long(), log_probs)

        return measure


def number_labels(examples: "Dataset", numbers: Iterator[int] | None = None) -> "Dataset":
    """Return the examples with numbers in the place of the tokens that are labels, counted through all of them."""
    numbers = count() if numbers is None else numbers
    labels = [[label if label == IGNORED_LABEL else next(numbers) for label in row] for row in examples["labels"][:]]
    return examples.remove_columns("labels").add_column("labels", labels)


def keep_values(
    folder: Path,
    examples: "Dataset",
    batches: list[TeacherBatch],
    base: PreTrainedModel,
    open_model: Callable[[int], torch.nn.Module],
    collate: TrainingCollator,
    k: int,
    described: Mapping[str, Any],
) -> TeacherValues:
    """
    Compute the teacher's values of all examples; those that a stopped run left are not computed again.

    Args:
        folder: where they are kept; of several machines each has its own.
        examples: prompts and answers as the teacher reads them, with numbered labels.
        batches: of the examples.
        base: of the teacher, with `attach_label_loss`.
        open_model: returns the teacher with a text in front, by its number: a model around the base, or itself.
        collate: makes the batches.
        k: see `TeacherValues`.
        described: what the values depend on beside these, such as the base's fingerprint.
    """
    num_rows = sum(label != IGNORED_LABEL for row in examples["labels"][:] for label in row)
    described = described | {"k": k, "examples": _digest(examples), "batches": [asdict(batch) for batch in batches]}
    state = PartialState()
    if state.is_local_main_process:
        _begin(folder, described)
    state.wait_for_everyone()
    values = TeacherValues(folder, num_rows, k, base)
    done = _map(folder / "done.bin", len(batches), 1, torch.uint8)
    # Each machine computes all, as its processes read its own files.
    own = range(len(batches))[state.local_process_index :: int(os.environ.get("LOCAL_WORLD_SIZE", "1"))]
    missing = [number for number in own if not done[number]]
    is_hidden = not missing or not state.is_local_main_process
    for context, numbers in groupby(missing, lambda number: batches[number].context):
        model = open_model(context)
        for number in tqdm(list(numbers), desc="Teacher's values", unit="batch", disable=is_hidden):
            _take(values, model, collate([examples[row] for row in batches[number].rows]))
            done[number] = 1
    state.wait_for_everyone()
    return values


@torch.no_grad()
def _take(values: TeacherValues, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    base, is_training = base_of(model), model.training
    model.eval()
    with replaced_loss(base, values.take):
        model(**{name: tensor.to(base.device) for name, tensor in inputs.items()})
    model.train(is_training)


def _begin(folder: Path, described: Mapping[str, Any]) -> None:
    """Make the folder, or empty one whose values are of something else."""
    folder.mkdir(parents=True, exist_ok=True)
    text, file = json.dumps(described, indent=2), folder / _DESCRIPTION
    if file.is_file() and file.read_text(encoding="utf-8") == text:
        return
    for stale in folder.glob("*.bin"):
        stale.unlink()
    write_atomically(file, text)


def _digest(examples: "Dataset") -> str:
    digest = hashlib.sha256()
    for row in examples:
        digest.update(json.dumps([row["input_ids"], row["labels"]]).encode())
    return digest.hexdigest()


def _map(file: Path, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Map a file, made of zeros where it is missing, as a tensor [rows, width] whose changes are kept in it."""
    return torch.from_file(str(file), shared=True, size=rows * width, dtype=dtype).view(rows, width)
