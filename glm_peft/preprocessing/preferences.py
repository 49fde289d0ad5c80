"""Read rows with two answers of which one is preferred, and pair their examples."""

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from glm_peft.errors import UserError
from glm_peft.models.shortening import Message
from glm_peft.preprocessing.columns import Columns, describe_missing_column, holds_messages
from glm_peft.preprocessing.messages import read_messages
from glm_peft.preprocessing.records import BadRow, Row, describe_value

if TYPE_CHECKING:  # its import takes half a second, and one prompt needs none
    from datasets import Dataset

logger = logging.getLogger(__name__)

_ASKING = ("system", "user", "human")  # roles with which a whole conversation begins


def read_pair(row: Row, columns: Columns) -> tuple[list[Message], list[Message], list[Message]]:
    """
    Read a row as the messages up to its question, the answer to it that is preferred, and the other one.

    In its column an answer is a text, a message, the messages of a turn, or the whole conversation.

    Raises:
        BadRow: one of them cannot be read as `read_messages` does, they answer different questions, or are equal.
    """
    names = (columns.response, columns.rejected)
    asked = _read_asked(row, columns)
    (prompt, chosen), (other, rejected) = (_divide(_read_whole(row, columns, name, asked)) for name in names)
    if prompt != other:
        problem = f"{names[0]!r} and {names[1]!r} are conversations that differ before their last answer, where alone "
        raise BadRow(row, f"{problem}they may", "two questions")
    if chosen == rejected:
        problem = f"{names[0]!r} and {names[1]!r} have the same answer, so that none of them is preferred"
        raise BadRow(row, problem, "equal answers")
    return prompt, chosen, rejected


def _read_asked(row: Row, columns: Columns) -> list[Any]:
    """Return the messages that are given beside the answers, not checked where they are a column of messages."""
    if columns.prompt:
        return read_messages(row, replace(columns, response=None, form=""), needs_answer=False)
    return _items(row, columns.messages) if columns.messages else []


def _read_whole(row: Row, columns: Columns, name: str, asked: list[Any]) -> list[Message]:
    """Read the conversation that ends with the answer of a column."""
    items = _items(row, name)
    if _are_dicts(items) and items[0].get("role", items[0].get("from")) in _ASKING:
        said = _said(asked) if _are_dicts(asked) else []
        if _said(items)[: len(said)] != said:
            problem = f"column {name!r}: the conversation does not begin as {columns.prompt or columns.messages!r}"
            raise BadRow(row, f"{problem} does; keep one of the two", "two questions")
    elif not asked:
        problem = f"column {name!r} has an answer, and no column its question; name it prompt, or give --prompt_column"
        raise BadRow(row, problem, "no question")
    else:
        items = [*asked, *items]
    in_column = Columns(messages=name, system=columns.system, required=columns.required)
    return read_messages(replace(row, values={**row.values, name: items}), in_column, needs_answer=True)


def _items(row: Row, name: str) -> list[Any]:
    """Return the messages in a column; a text is one of the assistant."""
    if name not in row.values:
        raise BadRow(row, describe_missing_column(row, name), "missing column")
    value = row.values[name]
    if isinstance(value, str) and not holds_messages(value):
        return [{"role": "assistant", "content": value}]
    try:
        value = json.loads(value) if isinstance(value, str) else value  # as a CSV file has it
    except json.JSONDecodeError as error:
        problem = f"column {name!r}: this text is not JSON ({error.msg}), found {describe_value(value)}"
        raise BadRow(row, problem, "wrong conversation") from error
    if not holds_messages(value) or not value:
        problem = f"column {name!r} must hold text or messages, found {describe_value(value)}"
        raise BadRow(row, problem, "wrong type")
    return [value] if isinstance(value, dict) else value


def _are_dicts(items: list[Any]) -> bool:
    return bool(items) and all(isinstance(item, dict) for item in items)


def _said(items: list[dict[str, Any]]) -> list[Any]:
    # A system text, and tools behind it, may stand in a column of their own.
    spoken = [item for item in items if item.get("role", item.get("from")) not in ("system", "tools")]
    return [item.get("content", item.get("value")) for item in spoken]


def _divide(messages: list[Message]) -> tuple[list[Message], list[Message]]:
    """Return a conversation up to its question, and the answer."""
    answer = list(takewhile(lambda message: message["role"] == "assistant", reversed(messages)))
    start = len(messages) - len(answer)
    return messages[:start], messages[start:]


def without_cut_pairs(examples: "Dataset", where: Sequence[str], flag: str, limit: int, skips: bool) -> "Dataset":
    """
    Leave out the pairs of which an answer was cut, as a part of it is not what was compared.

    Args:
        examples: with `answer_length`, by turns as `pair_examples` takes them.
        where: the place of each.
        flag, limit: of the length of answers, in tokens.
        skips: whether such pairs are left out; if not, or if no pair would be left, they are refused.

    Raises:
        UserError: an answer was cut; the message names the row.
    """
    lengths = examples["answer_length"][:]
    cut = [place for place, length in enumerate(lengths) if length > limit]
    pairs = {place // 2 for place in cut}
    if cut and not (skips and 2 * len(pairs) < len(examples)):
        raise UserError(
            f"{where[cut[0]]}: {flag} {limit} would cut an answer of {lengths[cut[0]]} tokens, and a part of it is "
            "not what was compared with the other: give more, or leave such rows out with --skip_bad_rows."
        )
    if not cut:
        return examples
    logger.warning("Left out, with an answer above %s %d: %d pairs.", flag, limit, len(pairs))
    return examples.select([place for place in range(len(examples)) if place // 2 not in pairs])


def pair_examples(examples: "Dataset") -> "Dataset":
    """
    Return one example [2, tokens] for every two; `length` is that of the longer one.

    Args:
        examples: `input_ids`, `labels` and `length`, of the answer that is preferred and of the other one by turns.
    """
    lengths = examples["length"][:]
    longer = list(map(max, lengths[::2], lengths[1::2]))
    return examples.remove_columns("length").batch(2).add_column("length", longer)
