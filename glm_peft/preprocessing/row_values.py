"""Read single values of a row, and say in the words of a `BadRow` what is wrong with one."""

import json
from collections.abc import Callable
from typing import Any, TypeVar

from glm_peft.preprocessing.columns import describe_missing_column
from glm_peft.preprocessing.records import BadRow, Row, describe_value

_T = TypeVar("_T")


def read_by(row: Row, column: str, kind: str, read: Callable[..., _T], *values: Any) -> _T:
    """Return what `read` makes of the values, or raise its `ValueError` as a `BadRow` of this kind."""
    try:
        return read(*values)
    except ValueError as error:
        raise BadRow(row, f"column {column!r}: {error}", kind) from None


def without_nulls(row: Row, value: Any) -> Any:
    """Leave out the keys that tables of one schema fill with null, where the row is of such a table."""
    if row.unit == "line":
        return value
    if isinstance(value, list):
        return [without_nulls(row, item) for item in value]
    if isinstance(value, dict):
        return {name: without_nulls(row, item) for name, item in value.items() if item is not None}
    return value


def read_value(row: Row, column: str) -> Any:
    """Return what the row has in a column, or raise a `BadRow` where it has none."""
    if column not in row.values:
        raise BadRow(row, describe_missing_column(row, column), "missing column")
    return row.values[column]


def read_text(row: Row, column: str, value: Any, name: str, may_be_empty: bool = False) -> str:
    """Return the value if it is text, or raise a `BadRow` that calls it `name`."""
    if not isinstance(value, str):
        problem = f"column {column!r}: the {name} must be text, found {describe_value(value)}"
        raise BadRow(row, problem, "wrong type")
    if not may_be_empty and not value.strip():
        raise BadRow(row, f"column {column!r}: the {name} is empty, found {value!r}", f"empty {name.split(' of ')[0]}")
    # JSON can spell half of a surrogate pair, which no tokenizer and no output file can encode.
    try:
        value.encode()
    except UnicodeEncodeError as error:
        found = ascii(value[error.start])
        problem = f"column {column!r}: the {name} holds {found}, half of a character that cannot be encoded"
        raise BadRow(row, problem, "not text") from error
    return value


def read_list(row: Row, column: str, value: Any, name: str) -> list[Any]:
    """Return the value if it is a list, or the list that its text is in JSON."""
    if isinstance(value, str):  # as a CSV file holds it
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            problem = f"the {name} is text that is not JSON ({error.msg}), found {describe_value(value)}"
            raise BadRow(row, f"column {column!r}: {problem}", f"wrong {name}") from error
    if not isinstance(value, list):
        raise BadRow(
            row, f"column {column!r}: the {name} must be a list, found {describe_value(value)}", f"wrong {name}"
        )
    return value
