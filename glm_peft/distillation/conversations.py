"""Make the conversations that a prefix learns a text from: the base's own questions or a user's, and its answers."""

import logging
from functools import partial
from typing import Any

from accelerate import PartialState
from tqdm.auto import tqdm

from glm_peft.arguments.data import DataArguments
from glm_peft.arguments.distil import DistilArguments
from glm_peft.arguments.fields import changed
from glm_peft.arguments.training import TrainingArguments
from glm_peft.distillation.conversation_file import ConversationCounts, ConversationFile, Question, read_conversations
from glm_peft.distillation.reading import Readers, Reading
from glm_peft.distillation.self_study import SelfStudy, generate
from glm_peft.errors import UserError
from glm_peft.prediction.generation_settings import GenerationSettings
from glm_peft.prediction.run_description import describe_settings
from glm_peft.preprocessing.split_loading import load_splits
from glm_peft.provenance.fingerprints import digest_rows, sample_weights

logger = logging.getLogger(__name__)

_SMALLEST_GROUP = 64  # conversations that are written at once
_BATCHES = 4  # of a group at least, so that several processes have a share of it


def read_questions(reading: Reading, data_args: DataArguments, distil_args: DistilArguments) -> list[Question] | None:
    """
    Read a user's questions, each with the answer that it may have; `None` where the base is to ask.

    Raises:
        UserError: the file cannot be read or has too few of them, or the text is in several parts.
    """
    if not data_args.train_file:
        return None
    if len(reading.texts) > 1:
        raise UserError(
            f"The documents are read in {len(reading.texts)} parts, and which of them answers a question of "
            f"--train_file {data_args.train_file} is not known: lower --max_source_length or raise "
            "--max_context_tokens, where the base can read more then, or leave out --train_file, and the base asks "
            "about each part by itself."
        )
    as_prompts = changed(data_args, test_file=data_args.train_file, max_predict_samples=data_args.max_train_samples)
    rows = load_splits(as_prompts, ["test"])["test"]
    if len(rows) <= distil_args.num_held_out:
        raise UserError(
            f"--train_file {data_args.train_file} has {len(rows)} questions, and --num_held_out "
            f"{distil_args.num_held_out} of them are not trained on: give more questions, or hold out fewer."
        )
    return [Question(row.prompt, "given", reference=row.answer) for row in rows]


class UserQuestions:
    """Questions of a user, in groups."""

    def __init__(self, questions: list[Question], group_size: int) -> None:
        self.num_questions = len(questions)
        self.groups = [questions[start : start + group_size] for start in range(0, len(questions), group_size)]
        self.run = {"digest of the questions": digest_rows([one.messages, one.reference] for one in questions)[:12]}

    def ask(self, number: int) -> list[Question]:
        """Return the questions of a group."""
        return self.groups[number]


def make_conversations(
    reading: Reading,
    readers: Readers,
    distil_args: DistilArguments,
    training_args: TrainingArguments,
    data_args: DataArguments,
    questions: list[Question] | None,
) -> list[dict[str, Any]]:
    """
    Let the base answer questions with the text in front of it, and write what the folder has not yet.

    Args:
        reading: the texts that the answers are given with, and their pieces, which are asked about.
        readers: put a text in front of the base.
        data_args: by which prompts are shaped.
        questions: of the user; `None` where the base asks.

    Returns:
        The rows of `conversations.jsonl`.

    Raises:
        UserError: the folder has conversations of another run, or nothing is answered.
    """
    settings = GenerationSettings.from_arguments(training_args, data_args)
    group_size = max(_SMALLEST_GROUP, _BATCHES * (settings.batch_size or 0))
    if questions:
        source = UserQuestions(questions, group_size)
    else:
        source = SelfStudy(reading, readers, distil_args, settings, group_size)
    run = {
        **_describe_base(readers),
        "digest of the documents": digest_rows([reading.texts, reading.chunks])[:12],
        **source.run,
        "settings of the answers": describe_settings(settings),
        "conversations in a group": group_size,
    }
    file = ConversationFile(training_args.output_dir, run)
    counts = _converse(file, source, reading, readers, settings)
    logger.info("%s; they are in %s", counts, file.path)
    if not counts.kept:
        raise UserError(f"{file.path}: {counts}; give another base, or questions of your own by --train_file.")
    PartialState().wait_for_everyone()  # or a process could read before the main one has written the last group
    return read_conversations(file.path)


def _converse(
    file: ConversationFile,
    source: SelfStudy | UserQuestions,
    reading: Reading,
    readers: Readers,
    settings: GenerationSettings,
) -> ConversationCounts:
    """Ask, answer and write the groups that the file has not."""

    def answer(questions: list[Question], number: int) -> list[str]:
        reader = readers(reading.texts[questions[0].context])
        return generate(reader, [question.messages for question in questions], settings, number)

    done, is_hidden = file.counts.total, not PartialState().is_local_main_process
    with tqdm(total=source.num_questions, initial=done, desc="Conversations", disable=is_hidden) as progress:
        for number in range(file.num_groups, len(source.groups)):
            questions = source.ask(number)
            file.add(questions, partial(answer, number=number))
            progress.update(len(questions))
    return file.counts


def _describe_base(readers: Readers) -> dict[str, Any]:
    base = readers.base
    return {
        "digest of the base": digest_rows([sample_weights(readers.model)])[:12],
        "dtype": str(readers.model.dtype),
        "quantization_bit": base.model_args.quantization_bit,
        "chat format": base.chat_format.name,
        "system_text": base.data_args.system_text,
        "source_prefix": base.data_args.source_prefix,
    }
