"""Keep conversations about a text in a file, group by group, so that a stopped run goes on exactly where it was."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from glm_peft.errors import UserError
from glm_peft.models.shortening import Message
from glm_peft.preprocessing.columns import Columns
from glm_peft.preprocessing.messages import read_messages
from glm_peft.preprocessing.records import BadRow, Row, describe_value, read_rows
from glm_peft.reporting.file_names import CONVERSATIONS_NAME
from glm_peft.reporting.files import flush_to_disk, read_json, write_atomically

STATE_NAME = "conversations.state.json"


@dataclass(frozen=True)
class Question:
    """
    A question about a text, as the last of its messages.

    Args:
        messages: up to the question.
        kind: of the request that led to it.
        context: the number of the text that it is answered with.
        reference: the user's own answer, where there is one.
    """

    messages: list[Message]
    kind: str
    context: int = 0
    reference: str | None = None


@dataclass
class ConversationCounts:
    """Conversations that were kept, and those left out: with a question that was asked before, or an empty side."""

    kept: int = 0
    repeated: int = 0
    empty: int = 0

    @property
    def total(self) -> int:
        """Return how many questions were asked."""
        return self.kept + self.repeated + self.empty

    def __str__(self) -> str:
        return (
            f"{self.total:,} conversations: {self.kept:,} kept, {self.repeated:,} repeated a question, "
            f"{self.empty:,} were empty"
        )


class ConversationFile:
    """
    File of conversations, a row each, to which whole groups are added.

    A second file says how many groups it has and where they end; it is replaced when a group is on the disk. So what
    is behind that end is of a group that was being written when the run was stopped, and is written anew. `counts` are
    those of the `num_groups` that are there.
    """

    def __init__(self, folder: str | Path, run: Mapping[str, Any]) -> None:
        """
        Read what a stopped run left in the folder.

        Args:
            run: what the conversations depend on, by the names that an error gives them; values that JSON has.

        Raises:
            UserError: the folder has the conversations of another run, or a file that was changed since.
        """
        self.path, self._state_path = Path(folder) / CONVERSATIONS_NAME, Path(folder) / STATE_NAME
        self._run = dict(run)
        # As the first process found it: all must ask, and leave out, the same.
        ((self.num_groups, self._end, self.counts, self._asked),) = broadcast_object_list([self._read()])
        self._save()  # before the first row: rows without it are not of a stopped run

    def add(self, questions: Sequence[Question], answer: Callable[[list[Question]], list[str]]) -> None:
        """
        Answer a group of questions, and write the conversations that are to be kept.

        Args:
            answer: is called once with those that are neither empty nor asked before, if there are any.
        """
        asked = [question for question in questions if question.messages[-1]["content"].strip()]
        new: dict[Any, Question] = {}
        for question in asked:
            key = _key(question.context, question.messages)
            if key not in self._asked:
                new.setdefault(key, question)
        answers = answer(list(new.values())) if new else []
        kept = {key: text for key, text in zip(new, answers, strict=True) if text.strip()}
        self._append([_row(new[key], text) for key, text in kept.items()])
        self._asked |= kept.keys()
        self.num_groups += 1
        self.counts.kept += len(kept)
        self.counts.repeated += len(asked) - len(new)
        self.counts.empty += len(questions) - len(asked) + len(new) - len(kept)
        self._save()

    def _append(self, rows: list[dict[str, Any]]) -> None:
        if PartialState().is_main_process:
            with self.path.open("ab") as file:
                file.truncate(self._end)
                file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
                flush_to_disk(file)
                self._end = file.tell()

    def _save(self) -> None:
        if PartialState().is_main_process:
            state = {"run": self._run, "groups": self.num_groups, "bytes": self._end, "counts": asdict(self.counts)}
            write_atomically(self._state_path, json.dumps(state, ensure_ascii=False, indent=2))

    def _read(self) -> tuple[int, int, ConversationCounts, set[Any]]:
        state = read_json(self._state_path)
        content = self.path.read_bytes() if self.path.exists() else b""
        if not state and not content:
            return 0, 0, ConversationCounts(), set()
        self._check(state, len(content))
        rows = map(json.loads, content[: state["bytes"]].splitlines())
        asked = {_key(row["context"], row["messages"][:-1]) for row in rows}
        return state["groups"], state["bytes"], ConversationCounts(**state["counts"]), asked

    def _check(self, state: Mapping[str, Any], size: int) -> None:
        cure = f"give another --output_dir, or remove it and {STATE_NAME} to begin anew"
        begun = state.get("run", {})
        for name in (name for name in self._run if begun.get(name) != self._run[name]):
            raise UserError(
                f"{self.path} is of another run, with {name} {begun.get(name)!r} where this one has "
                f"{self._run[name]!r}: {cure}."
            )
        if size < state["bytes"]:
            raise UserError(
                f"{self.path} was changed: it has {size:,} bytes, {state['bytes']:,} were written; {cure}."
            )


def read_conversations(file: str | Path) -> list[dict[str, Any]]:
    """
    Read the rows of a file of conversations.

    Raises:
        UserError: it is not there, or a row is no conversation with an answer, or does not say which text it is about.
    """
    return [_checked(row) for row in read_rows(str(file))]


def _checked(row: Row) -> dict[str, Any]:
    if row.problem:
        raise BadRow(row, row.problem, "not read")
    read_messages(row, Columns(messages="messages"), needs_answer=True)
    context = row.values.get("context")
    if not isinstance(context, int) or isinstance(context, bool) or context < 0:
        problem = f"column 'context': give the number of the text, from 0; found {describe_value(context)}"
        raise BadRow(row, problem, "wrong context")
    return row.values


def _row(question: Question, answer: str) -> dict[str, Any]:
    messages = [*question.messages, {"role": "assistant", "content": answer}]
    return {**asdict(question), "messages": messages}


def _key(context: int, messages: Sequence[Message]) -> tuple[int, tuple[str, ...]]:
    """Return what two conversations share that ask the same of the same text."""
    return context, tuple(message["content"] for message in messages)
