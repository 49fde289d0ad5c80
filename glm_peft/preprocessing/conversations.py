"""Turn rows of every known shape into conversations: checked messages, with the place that they came from."""

import gc
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice, takewhile

from glm_peft.arguments.data import DataArguments
from glm_peft.arguments.sources import read_train_sources
from glm_peft.arguments.splits import expand_splits, file_of
from glm_peft.errors import UserError
from glm_peft.preprocessing.columns import Columns, carries_meaning, describe_unread, find_columns
from glm_peft.preprocessing.division import choose_held_out
from glm_peft.preprocessing.messages import Message, find_unoffered_calls, read_messages, read_weights, unread_values
from glm_peft.preprocessing.preferences import read_pair
from glm_peft.preprocessing.records import BadRow, Row, read_hub_rows, read_rows
from glm_peft.preprocessing.tool_messages import read_tools_file, with_tools

logger = logging.getLogger(__name__)

FIRST_ROWS = 1000
"""Rows of a source that are read before training where it is streamed."""

_SHOWN_ROWS = 5
_LIMITS = {"train": "max_train_samples", "validation": "max_eval_samples", "test": "max_predict_samples"}


@dataclass(frozen=True, slots=True)
class Conversation:
    """
    One row as messages `{"role", "content"}`: maybe a system message, then user and assistant taking turns.

    The last assistant messages are the answer, several where it calls tools; a conversation that ends with the user's
    question, or with what a tool said, has none.
    """

    messages: list[Message]
    where: str
    is_chat: bool  # a row of messages, where every assistant turn may be trained on, not one of columns
    number: int = 0  # of the line of the file on which it begins, or of the row where there are no lines; from 1
    unread: str = ""  # what the row holds in columns that are not read, as JSON
    muted: frozenset[int] = frozenset()  # its assistant messages, counted from 0, that carry no loss
    rejected: tuple[Message, ...] = ()  # the answer to which its own is preferred

    @property
    def prompt(self) -> list[Message]:
        """Return the messages up to and including the last question, or what a tool said."""
        return self.messages[: len(self.messages) - len(self.answer_messages)]

    @property
    def answer_messages(self) -> list[Message]:
        """Return the messages of the answer: a thought, calls of tools, or a text."""
        reversed_turn = takewhile(lambda message: message["role"] == "assistant", reversed(self.messages))
        return list(reversed_turn)[::-1]

    @property
    def system(self) -> str | None:
        """Return the system text, or `None` where the row has none."""
        return self.messages[0]["content"] if self.messages[0]["role"] == "system" else None

    @property
    def answer(self) -> str | None:
        """Return the answer to the last question, or `None` where the row has none."""
        answer = self.answer_messages
        return (
            "\n".join("\n".join(filter(None, (m.get("metadata"), m["content"]))) for m in answer) if answer else None
        )

    def trained_turns(
        self, train_on: str, arrange: Callable[[list[Message]], list[Message]]
    ) -> list[tuple[list[Message], list[Message]]]:
        """
        Return the prompts and answers to train on: every turn of the assistant in a row of messages, or the last one.

        Turns that carry no loss are left out. Where an answer is preferred to another, there are both, this one first.

        Args:
            arrange: puts messages into the order of a chat format.

        Raises:
            UserError: the chat format cannot write them.
        """
        both = [self.messages, *([[*self.prompt, *self.rejected]] if self.rejected else [])]
        return [turn for messages in both for turn in self._trained_turns(arrange(messages), train_on)]

    def _trained_turns(self, messages: list[Message], train_on: str) -> list[tuple[list[Message], list[Message]]]:
        answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        starts = [place for place in answers if place - 1 not in answers]
        ends = [place + 1 for place in answers if place + 1 not in answers]
        turns = [(messages[:start], messages[start:end]) for start, end in zip(starts, ends, strict=True)]
        # No format changes the order of the assistant's messages among themselves.
        silent = {place for number, place in enumerate(answers) if number in self.muted}
        # As in the published scripts: the `history` of a row of columns is context, and only its response is learnt.
        chosen = turns if self.is_chat and train_on != "last" else turns[-1:]
        return [turn for turn in chosen if len(turn[0]) not in silent]


@dataclass
class Split:
    """
    Conversations of one split, with the rows that were left out and the limit that stopped the reading.

    `unread` has the number of rows in which each column that was not read holds something, `read` the names of the
    columns that were, `unoffered` the places of calls of tools that their row does not offer, and `without_loss` the
    places of the rows of which no answer is learnt: they are left out, too. Where several sources are mixed for
    training, `parts` are their splits, each with its `weight`.
    """

    name: str
    source: str
    conversations: list[Conversation] = field(default_factory=list)
    left_out: list[BadRow] = field(default_factory=list)
    limit: str | None = None
    unread: Counter[str] = field(default_factory=Counter)
    unoffered: list[str] = field(default_factory=list)
    columns: Columns | None = None
    read: dict[str, None] = field(default_factory=dict)
    without_loss: list[str] = field(default_factory=list)
    parts: tuple["Split", ...] = ()
    weight: float = 1.0

    @property
    def source_name(self) -> str:
        """Return the name of a source, without that of the split that it is a part of."""
        return self.name.partition("_")[2]

    @property
    def kind(self) -> str:
        """Return `train`, `validation` or `test`."""
        # Several files for evaluation are called `validation_NAME`, and sources of training `train_NAME`.
        return self.name.partition("_")[0]

    @property
    def rows_read(self) -> int:
        """Return how many rows were used or left out."""
        return len(self.conversations) + len(self.left_out) + len(self.without_loss)

    def __len__(self) -> int:
        return len(self.conversations)

    def __iter__(self) -> Iterator[Conversation]:
        return iter(self.conversations)


def load_splits(data_args: DataArguments, splits: list[str]) -> dict[str, Split]:
    """
    Read the wanted splits from their files, or from the Hub data set where no file is given for a split.

    Args:
        data_args: the data arguments (`glm_peft.arguments.training.DataArguments`).
        splits: of `"train"`, `"validation"`, `"test"`. Rows of `test` need no answer. Where several files are given
            for evaluation, or rows of several sources are held out, each has a name of its own instead of
            `"validation"`; a source without rows for it has none.

    Raises:
        UserError: a source is missing or cannot be read, columns are not found, or (unless `skip_bad_rows`) a row
            cannot be used; the message names file, line, column and what was found.
    """
    names = expand_splits(splits, data_args)
    with paused_collection():
        if data_args.validation_split is None:
            return {name: _load(data_args, name) for name in names}
        loaded = {name: _load(data_args, name) for name in names if name == "test"}
        if len(loaded) < len(names):
            loaded |= _hold_out(_load(data_args, "train", is_limited=False), data_args)
        return {name: loaded[name] for name in names if name in loaded}


@contextmanager
def paused_collection() -> Iterator[None]:
    """Pause Python's collector of reference cycles while many rows are made."""
    # They all stay, and it would go through all of them again and again.
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _load(data_args: DataArguments, name: str, is_limited: bool = True) -> Split:
    """Read a split, or the sources that it is mixed of; without the limit on its rows if not `is_limited`."""
    sources = read_train_sources(data_args.train_file) if name == "train" else []
    if not sources:
        return _load_split(data_args, name, file_of(data_args, name), is_limited)
    parts = []
    for source in sources:
        own_args = replace(data_args, **source.columns) if source.columns else data_args
        part = _load_split(own_args, f"{name}_{source.name}", source.file, is_limited)
        parts.append(replace(part, weight=source.weight))
    return _join(parts)


def _join(parts: list[Split]) -> Split:
    """Return the split that has the conversations of all its parts."""
    conversations = [conversation for part in parts for conversation in part]
    return Split("train", ", ".join(part.source for part in parts), conversations, parts=tuple(parts))


def _hold_out(whole: Split, data_args: DataArguments) -> dict[str, Split]:
    """Divide the rows of training: return those to train on, and those that are held out for its evaluation."""
    wanted, seed = data_args.validation_split, data_args.rows_seed
    chosen = choose_held_out(map(_first_question, whole), wanted, seed)
    told = f"--validation_split {wanted:g}, --rows_seed {seed}"
    kept, held = [], {}
    for part in whole.parts or [whole]:
        rows = [conversation for conversation in part if _first_question(conversation) in chosen]
        level = logging.INFO if rows else logging.WARNING  # as it then has no scores of its own
        found = part.source, len(rows), len(part), told
        logger.log(level, "%s: %d of %d rows are held out for evaluation (%s).", *found)
        kept.append(_without(part, chosen, data_args.max_train_samples))
        name = part.name.replace("train", "validation", 1)
        if rows:
            held[name] = Split(name, f"{part.source} ({told})", rows[: data_args.max_eval_samples])
    return {"train": _join(kept) if whole.parts else kept[0]} | held


def _without(split: Split, held_out: set[str], limit: int | None) -> Split:
    kept = [conversation for conversation in split if _first_question(conversation) not in held_out][:limit]
    if not kept:
        raise UserError(f"{split.source}: --validation_split leaves no row of it to train on: give less.")
    return replace(split, conversations=kept)


def _first_question(conversation: Conversation) -> str:
    text = next(message["content"] for message in conversation.messages if message["role"] == "user")
    return " ".join(text.split())


def _load_split(data_args: DataArguments, name: str, file: str | None, is_limited: bool) -> Split:
    if file is None and data_args.dataset_name is None:
        raise UserError(f"There is no {name} data: give --{name}_file or --dataset_name.")
    rows = open_rows(data_args, name, file)
    split = Split(name, file or f"{data_args.dataset_name} ({name})")
    limit = getattr(data_args, _LIMITS[split.kind]) if is_limited else None
    told = f"--{_LIMITS[split.kind]} {limit}"
    if data_args.streaming and split.kind == "train" and (limit or FIRST_ROWS) >= FIRST_ROWS:
        limit, told = FIRST_ROWS, f"the first {FIRST_ROWS:,}: --streaming reads the others while it trains"
    # islice ends the reading itself at the limit: the rest of a large file is neither read nor checked.
    try:
        split.conversations = list(islice(read_conversations(rows, split, data_args), limit))
    finally:  # at a bad row, too, and only now: history and system text may begin in a later row
        if split.columns:
            logger.info("%s: %s.", split.source, split.columns.describe(split.read))
    if limit is not None and len(split) == limit:
        split.limit = told
    if not split.conversations:
        raise UserError(_nothing_left(split))
    if split.unread:
        level = logging.WARNING if carries_meaning(split.unread) else logging.INFO
        logger.log(level, "%s: %s.", split.source, describe_unread(split.unread))
    if split.unoffered:
        logger.warning(
            "%s calls a tool that its row does not offer (%d such calls in all): add the tool, or correct the name.",
            split.unoffered[0],
            len(split.unoffered),
        )
    if split.without_loss:
        logger.warning("%s.", _describe_without_loss(split))
    return split


def open_rows(data_args: DataArguments, name: str, file: str | None) -> Iterator[Row]:
    """Return the rows of a split, of its file or of the Hub data set; those of training may be streamed."""
    is_streamed = data_args.streaming and name.startswith("train")
    if file:
        return read_rows(file, is_streamed)
    return read_hub_rows(data_args.dataset_name, data_args.dataset_config_name, name, is_streamed)


def read_conversations(rows: Iterator[Row], split: Split, data_args: DataArguments) -> Iterator[Conversation]:
    """
    Read rows as the conversations of a split, in which everything else that is found in them is noted.

    Raises:
        UserError: the columns are not found, or (unless `skip_bad_rows`) a row cannot be used.
    """
    needs_answer, tools = split.name != "test", read_tools_file(data_args.tools_file)
    for row in rows:
        try:
            if row.problem:
                raise BadRow(row, row.problem, "unreadable row")
            # By the first row that can be read; a later one without these columns is an error of that row.
            if split.columns is None:
                split.columns = find_columns(row, data_args, needs_answer)
            split.read |= dict.fromkeys(name for name in row.values if name in split.columns.named)
            conversation = read_conversation(row, split.columns, needs_answer, split.unread)
            if tools:
                conversation = replace(conversation, messages=with_tools(conversation.messages, tools))
            # Here the order of a chat format is all one: of a turn, all messages carry loss or none.
            if needs_answer and conversation.muted and not conversation.trained_turns(data_args.train_on, list):
                split.without_loss.append(row.where)
                continue
            split.unoffered += find_unoffered_calls(row, split.columns, conversation.messages)
            yield conversation
        except BadRow as bad_row:
            if not data_args.skip_bad_rows:
                raise UserError(f"{bad_row}; correct it, or leave such rows out with --skip_bad_rows.") from None
            split.left_out.append(bad_row)


def _nothing_left(split: Split) -> str:
    if split.without_loss:
        return f"{_describe_without_loss(split)}, and no other row is left to learn from: let some answer carry loss."
    if not split.left_out:
        return f"{split.source} holds no rows: it must hold at least one."
    return f"{split.source}: none of the {len(split.left_out)} rows can be used; the first: {split.left_out[0]}."


def _describe_without_loss(split: Split) -> str:
    number, first = len(split.without_loss), ", ".join(split.without_loss[:_SHOWN_ROWS])
    more = ", …" if number > _SHOWN_ROWS else ""
    return f"{split.source}: no answer carries loss in {number} row{'s' if number > 1 else ''} ({first}{more})"


def read_conversation(
    row: Row, columns: Columns, needs_answer: bool, unread: Counter[str] | None = None
) -> Conversation:
    """
    Read a row as a conversation.

    Args:
        needs_answer: whether the row must end with an answer; if not, an empty or absent one counts as none.
        unread: counts the columns that hold something and are not read.

    Raises:
        BadRow: the row cannot be read as `read_messages` does.
    """
    prompt, answer, rejected = read_pair(row, columns) if columns.rejected else ([], [], [])
    messages = [*prompt, *answer] or read_messages(row, columns, needs_answer)
    left = unread_values(row, columns)
    if unread is not None:
        unread.update(left.keys())
    as_json, weights = json.dumps(left, default=str) if left else "", read_weights(row, columns)
    muted = frozenset(place for place, weight in weights.items() if not weight)
    answers = [message for message in messages if message["role"] == "assistant"]
    for place in (place for place, weight in weights.items() if weight not in (0, 1)):
        if rejected:
            problem = f"its 'weight' {weights[place]} has no meaning beside a rejected answer: leave it out"
            raise BadRow(row, problem, "weight beside a rejected answer")
        answers[place]["weight"] = str(weights[place])  # as text, as all of a message is
    is_chat = bool(columns.messages) and not rejected
    return Conversation(messages, row.where, is_chat, row.number, as_json, muted, tuple(rejected))
