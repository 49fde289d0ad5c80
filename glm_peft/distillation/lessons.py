"""Turn conversations about a text into what the prefix learns: tokens, and what a reader of the text gives each."""

import hashlib
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets

from glm_peft.adapters.assembly import OpenedBase
from glm_peft.arguments.data import DataArguments
from glm_peft.arguments.distil import DistilArguments
from glm_peft.arguments.fields import changed
from glm_peft.arguments.training import TrainArguments, TrainingArguments
from glm_peft.data import EncodedSplits, build_training_features, encode_splits
from glm_peft.distillation.reading import Readers, reads_both_ways
from glm_peft.errors import UserError
from glm_peft.preprocessing.collators import TrainingCollator
from glm_peft.preprocessing.conversations import Conversation, Split
from glm_peft.preprocessing.prompt_shape import with_system
from glm_peft.provenance.fingerprints import sample_weights
from glm_peft.reporting.file_names import CONVERSATIONS_NAME
from glm_peft.training.teacher_values import TeacherBatch, TeacherValues, keep_values, number_labels

_MORE_THAN_ANY_PROMPT = 1 << 30  # tokens


@dataclass(frozen=True)
class Lessons:
    """
    Conversations about the texts, some of which are held out, from all over them.

    Args:
        rows: as `conversations.jsonl` has them.
        texts: that the answers were given with, by the number `context` of a row.
        num_held_out: how many are not trained on.
        folder: that their file stands in, and the teacher's values.
    """

    rows: list[dict[str, Any]]
    texts: list[str]
    num_held_out: int
    folder: Path

    def __post_init__(self) -> None:
        if len(self.rows) <= self.num_held_out:
            raise UserError(
                f"{self.file} has {len(self.rows)} conversations, and --num_held_out {self.num_held_out} of them are "
                "not trained on: give more questions or a larger --num_conversations, or hold out fewer."
            )

    @property
    def file(self) -> Path:
        """Return the file of the conversations."""
        return self.folder / CONVERSATIONS_NAME

    @property
    def held_out(self) -> list[dict[str, Any]]:
        """Return the rows that are not trained on."""
        return [self.rows[number] for number in self._numbers()["validation"]]

    @property
    def in_order(self) -> list[dict[str, Any]]:
        """Return the rows in the order of the examples of all splits."""
        return [self.rows[number] for numbers in self._numbers().values() for number in numbers]

    def _numbers(self) -> dict[str, list[int]]:
        # Evenly, as rows that stand together may be about the same part of the text.
        total, held = len(self.rows), self.num_held_out
        validation = [(number + 1) * total // held - 1 for number in range(held)]
        return {"train": sorted({*range(total)} - {*validation}), "validation": validation}

    def as_splits(self) -> dict[str, Split]:
        """Return the conversations for training, and for its evaluation those that are held out."""
        made = [
            Conversation(row["messages"], f"{self.file}, line {number}", is_chat=True, number=number)
            for number, row in enumerate(self.rows, start=1)
        ]
        numbers = self._numbers()
        return {name: Split(name, str(self.file), [made[number] for number in own]) for name, own in numbers.items()}


def learning_from_conversations(arguments: TrainArguments) -> TrainArguments:
    """Return the arguments of a training on the conversations, which will stand in the output folder."""
    file = str(Path(arguments.training.output_dir) / CONVERSATIONS_NAME)
    data_args = changed(arguments.data, train_file=file, validation_file=file, dataset_name=None)
    return replace(arguments, data=data_args)


def encode_lessons(lessons: Lessons, base: OpenedBase, data_args: DataArguments) -> EncodedSplits:
    """Encode the conversations as the prefix is asked them; labels are numbers of rows of the teacher's values."""
    data = encode_splits(lessons.as_splits(), base.chat_format, base.tokenizer, data_args, with_prompts=False)
    numbers = count()
    for name, examples in data.examples.items():
        data.examples[name] = number_labels(examples, numbers)
    return data


def hear_teacher(
    lessons: Lessons,
    data: EncodedSplits,
    readers: Readers,
    distil_args: DistilArguments,
    training_args: TrainingArguments,
) -> TeacherValues:
    """
    Compute what the reader of each conversation's text gives the tokens of its answer.

    Args:
        data: what `encode_lessons` returned.
        readers: put a text in front of the base.
    """
    examples = concatenate_datasets([*data.examples.values()])
    if reads_both_ways(readers.base):
        examples = _with_texts(lessons, readers.base, examples)
    contexts = [row["context"] for row in lessons.in_order]
    batches = _plan(examples["length"][:], contexts, training_args.per_device_eval_batch_size)
    described = {
        "texts": [hashlib.sha256(text.encode()).hexdigest() for text in lessons.texts],
        "base": sample_weights(readers.model),
        "precision": str(readers.model.dtype),
    }
    return keep_values(
        lessons.folder / "teacher",
        examples,
        batches,
        readers.model,
        lambda context: readers(lessons.texts[context]).answering.model,
        TrainingCollator(readers.base.tokenizer),
        distil_args.teacher_top_k,
        described,
    )


def _plan(lengths: list[int], contexts: list[int], batch_size: int) -> list[TeacherBatch]:
    """Put conversations about the same text and of like length into batches."""
    order = sorted(range(len(lengths)), key=lambda row: (contexts[row], -lengths[row]))
    batches: list[TeacherBatch] = []
    for row in order:
        if batches and batches[-1].context == contexts[row] and len(batches[-1].rows) < batch_size:
            batches[-1].rows.append(row)
        else:
            batches.append(TeacherBatch(contexts[row], [row]))
    return batches


def _with_texts(lessons: Lessons, base: OpenedBase, examples: Dataset) -> Dataset:
    """Return the examples with the texts in their prompts, where a text cannot stand in front of them as a prefix."""
    made = []
    for row in lessons.in_order:
        # As `Reader.encode` has it: the run's own system text would be left out where a row has one already.
        messages = with_system(row["messages"], base.data_args.system_text)
        text = {"role": "system", "content": lessons.texts[row["context"]]}
        made.append(Conversation([text, *messages], lessons.file.name, is_chat=True))
    data_args = changed(base.data_args, max_source_length=_MORE_THAN_ANY_PROMPT)
    split = Split("train", str(lessons.file), made)
    return number_labels(build_training_features(split, base.chat_format, base.tokenizer, data_args)[0])
