"""Turn rows of every known shape into conversations: checked messages, with the place that they came from."""

import gc
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import takewhile

from glm_peft.arguments.data import DataArguments
from glm_peft.errors import UserError
from glm_peft.preprocessing.columns import Columns, find_columns
from glm_peft.preprocessing.messages import Message, find_unoffered_calls, read_messages, read_weights, unread_values
from glm_peft.preprocessing.preferences import read_pair
from glm_peft.preprocessing.records import BadRow, Row, read_hub_rows, read_rows
from glm_peft.preprocessing.tool_messages import read_tools_file, with_tools


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
