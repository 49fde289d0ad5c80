"""Decode the values of a JSON text, each with the line on which it begins: an array, lines, or objects in a row."""

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

from glm_peft.errors import UserError

_skip_space = re.compile(r"[ \t\n\r]*").match
_Value = tuple[int, Any, str | None]
_SNIPPET = 40  # characters of a value that an error message shows
_LONGEST_WORD = 6  # characters of what JSON does not divide: a literal, or the code of a character


class _RepeatedKey(ValueError):
    """A key that stands more than once in a JSON object, of which the values but the last would be lost."""


def _as_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise _RepeatedKey(next(name for name in names if names.count(name) > 1))
    return values


# Not strict: a line break inside of a text, which JSON wants as \n, can be read as nothing else.
_decoder = json.JSONDecoder(object_pairs_hook=_as_object, strict=False)
_raw_decode = _decoder.raw_decode


class _Window:
    """
    The part of a text that is held: from the place of reading on, at least `size` characters if there are as many.

    Args:
        stream: of the text.
        size: in characters; all of the text where it is -1.
    """

    def __init__(self, stream: TextIO, size: int) -> None:
        self.stream, self.size = stream, size
        self.text = stream.read(size)
        self.is_last = size < 0 or len(self.text) < size
        self.line, self.column = 1, 0  # of the first character, the column counted from 0

    def move(self, position: int) -> int:
        """Go on to a position, and return where it is now: before it nothing is held any more."""
        if self.is_last or len(self.text) - position >= self.size:
            return position
        last = self.text.rfind("\n", 0, position)
        self.line += self.text.count("\n", 0, position)
        self.column = position - last - 1 + (self.column if last < 0 else 0)
        more = self.stream.read(self.size)
        self.is_last = len(more) < self.size
        self.text = self.text[position:] + more
        return 0

    def runs_out(self, error: json.JSONDecodeError) -> bool:
        """Whether the value that an error is of may go on behind what is held."""
        is_open = error.msg.startswith("Unterminated") or len(error.doc) - error.pos < _LONGEST_WORD
        return is_open and not self.is_last

    def explain(self, error: json.JSONDecodeError, line: int) -> str:
        """Say where an error is, which knows its place in the part alone; its value begins on `line`."""
        if self.runs_out(error):
            return f"line {line}, {_too_long(self.size)}"
        column = error.colno + (self.column if error.lineno == 1 else 0)
        return f"line {self.line + error.lineno - 1}, {_json_problem(error, column)}"


def json_values(file: str, stream: TextIO, size: int = -1) -> Iterator[_Value]:
    """
    Decode an array, an object with an array under `data`, or objects one after another, a line or more each.

    Args:
        file: the name for error messages.
        stream: what it holds.
        size: characters that are held at a time, which no value may be longer than; all of them where it is -1.

    Returns:
        the line on which each value begins, the value, and for a line that cannot be decoded what is wrong with it.

    Raises:
        UserError: the text is broken in a way that leaves no line to go on from.
    """
    window = _Window(stream, size)
    text = window.text
    start = _skip_space(text, 0).end()
    if start == len(text):
        return iter(())
    if text[start] == "[":
        return _array_values(file, window, start, alone=True)
    try:
        value, end = _raw_decode(text, start)  # whatever the extension says: ADGEN's train.json holds lines
    except _RepeatedKey:
        return _line_values(window)
    except json.JSONDecodeError as error:
        # One broken object over many lines has one error, at its own place; of lines each may have its own.
        if window.runs_out(error) or not _looks_like_lines(text):
            first = text.count("\n", 0, start) + 1
            raise UserError(f"{file}, {window.explain(error, first)}.") from error
        return _line_values(window)
    if not window.is_last or _skip_space(text, end).end() < len(text) or not isinstance(value, dict):
        return _line_values(window)
    if isinstance(value.get("data"), list):
        return _array_values(file, window, _start_of_value(text, start, "data"))
    return iter([(text.count("\n", 0, start) + 1, value, None)])


def _looks_like_lines(text: str) -> bool:
    first_lines = [line for line in text.split("\n", 20)[:20] if line.strip()]
    return len(first_lines) == 1 or all(line.lstrip()[0] in "{[" for line in first_lines[:2])


def _start_of_value(text: str, position: int, name: str) -> int:
    """Find where the value of the key `name` begins in the valid JSON object that opens at `position`."""
    # Decoded key by key: a search for the name could find it inside of another value.
    while True:
        key, end = _raw_decode(text, _skip_space(text, position + 1).end())
        start = _skip_space(text, text.index(":", end) + 1).end()
        if key == name:
            return start
        position = _skip_space(text, _raw_decode(text, start)[1]).end()


def _array_values(file: str, window: _Window, position: int, alone: bool = False) -> Iterator[_Value]:
    """Read the elements of the array that opens at `position`, each with its line; nothing may follow one `alone`."""
    # Element by element, as json.loads would not say on which line each begins.
    line, counted = window.line, 0
    position = _skip_space(window.text, position + 1).end()
    while not window.text.startswith("]", position):
        line += window.text.count("\n", counted, position)
        counted = position = window.move(position)
        try:
            value, position = _array_element(file, window, position, line)
        except _RepeatedKey as key:
            raise UserError(f"{file}, line {line}, {_repeated(key)}.") from key
        yield line, value, None
    after = _skip_space(window.text, position + 1).end()
    if alone and after < len(window.text):
        error = json.JSONDecodeError("text after the closing bracket", window.text, after)
        raise UserError(f"{file}, {window.explain(error, line)}.")


def _array_element(file: str, window: _Window, position: int, line: int) -> tuple[Any, int]:
    """Decode one element, and return it with the place where the next one (or the closing bracket) begins."""
    text = window.text
    try:
        value, end = _raw_decode(text, position)
        end = _skip_space(text, end).end()
        if text.startswith(",", end):
            end = _skip_space(text, end + 1).end()
            if text.startswith("]", end):
                raise json.JSONDecodeError("a comma before the closing bracket", text, end)
        elif not text.startswith("]", end):
            raise json.JSONDecodeError("Expecting ',' or ']'", text, end)
    except json.JSONDecodeError as error:
        raise UserError(f"{file}, {window.explain(error, line)}.") from error
    return value, end


def _line_values(window: _Window) -> Iterator[_Value]:
    start, number = 0, 1
    # Not splitlines(): JSON strings may hold U+2028 and other line separators.
    while (start := window.move(start)) < len(window.text):
        text = window.text
        end = _end_of_line(text, start)
        if text[start:end].strip():
            value, end = _value_of_lines(window, number, start, end)
            yield value
        number += text.count("\n", start, end + 1)
        start = end + 1


def _value_of_lines(window: _Window, number: int, start: int, end: int) -> tuple[_Value, int]:
    """Decode what begins on the line from `start` to `end`, and return it with the end of its last line."""
    text = window.text
    try:
        return (number, _decoder.decode(text[start:end]), None), end
    except _RepeatedKey as key:
        return (number, None, _repeated(key)), end
    except json.JSONDecodeError as error:
        problem = _json_problem(error)
    # It may go on over several lines: printed so, or with a line break inside of a text.
    try:
        value, after = _raw_decode(text, _skip_space(text, start).end())
        last = _end_of_line(text, after)
        if not text[after:last].strip():
            return (number, value, None), last
    except _RepeatedKey as key:
        problem = _repeated(key)
    except json.JSONDecodeError as error:
        if window.runs_out(error):
            problem = _too_long(window.size)
        elif text[start:end].strip() == "{":
            problem = f"in the object that begins here, {window.explain(error, number)}"
    return (number, None, problem), end


def _end_of_line(text: str, position: int) -> int:
    found = text.find("\n", position)
    return len(text) if found < 0 else found


def _repeated(key: _RepeatedKey) -> str:
    return f"the key {str(key)!r} stands more than once in one object, which keeps only the last; name each once"


def _too_long(size: int) -> str:
    return (
        f"the value that begins here has more than {size:,} characters, the most that --streaming holds of one; rows "
        "under 'data' become JSON lines by `jq -c '.data[]'`"
    )


def _json_problem(error: json.JSONDecodeError, column: int | None = None) -> str:
    found = error.doc[error.pos :].split("\n", 1)[0].rstrip("\r")
    shown = repr(shorten(found)) if found else "the end of the line"
    cure = ""
    if found.startswith("'"):
        cure = "; JSON has double quotes, as json.dumps writes them"
    elif error.msg == "Extra data" and found.strip() == ",":
        cure = "; rows on lines of their own have no comma between them"
    return f"column {column or error.colno}: this is not JSON ({error.msg}), found {shown}{cure}"


def shorten(text: str) -> str:
    """Cut a text to what an error message shows."""
    return text if len(text) <= _SNIPPET else text[:_SNIPPET] + "…"
