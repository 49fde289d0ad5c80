"""Read files and Hub datasets row by row; every row knows the file and the line that it came from."""

import codecs
import csv
import difflib
import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm_peft.errors import UserError

_raw_decode = json.JSONDecoder().raw_decode
_skip_space = re.compile(r"[ \t\n\r]*").match
_SNIPPET = 40  # characters of a value that an error message shows
_SAMPLE = 1 << 16  # bytes from which the encoding is guessed


@dataclass(frozen=True, slots=True)
class Row:
    """
    One row as it was read: its `values` by column, or the `problem` that kept it from being read.

    `number` counts from 1: the line in a text file on which the row begins (`unit` "line"), or its place in a
    Parquet file or a Hub dataset (`unit` "row").
    """

    file: str
    unit: str
    number: int
    values: dict[str, Any]
    problem: str | None = None

    @property
    def where(self) -> str:
        """Name the place for an error message, such as `train.json, line 3`."""
        return f"{self.file}, {self.unit} {self.number}"


class BadRow(UserError):
    """Error about a row that cannot be used: the row, what is wrong with it, and the `kind` that it is counted as."""

    def __init__(self, row: Row, problem: str, kind: str) -> None:
        super().__init__(f"{row.where}, {problem}")
        self.row = row
        self.kind = kind


def read_rows(file: str) -> Iterator[Row]:
    """
    Read the rows of a `.json`, `.jsonl`, `.csv` or `.parquet` file, in order.

    JSON may be an array of objects, an object with such an array under `data`, or one object a line, whatever the
    extension says; blank lines are no rows. A line that cannot be read is a row with a `problem`.

    Raises:
        UserError: the file does not exist, has another extension, is empty, is not UTF-8, or cannot be read at all.
    """
    reader = _READERS.get(Path(file).suffix.lower())
    if reader is None:
        raise UserError(f"{file}: files of this kind cannot be read; give a file ending in {', '.join(_READERS)}.")
    if not Path(file).is_file():
        raise UserError(f"{file}: there is no such file{_nearest_file(Path(file))}.")
    return reader(file)


def read_hub_rows(dataset_name: str, config_name: str | None, split: str) -> Iterator[Row]:
    """
    Read the rows of one split of a Hub dataset or of a local folder that `datasets` can load.

    Raises:
        UserError: the dataset cannot be loaded or has no such split.
    """
    import datasets

    try:
        dataset = datasets.load_dataset(dataset_name, config_name)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"--dataset_name {dataset_name} could not be loaded: {reason}") from error
    if split not in dataset:
        raise UserError(
            f"--dataset_name {dataset_name} has no split {split!r}, only {quoted(dataset)}; give a file instead."
        )
    return (Row(dataset_name, f"{split} row", number, values) for number, values in enumerate(dataset[split], 1))


def describe_value(value: Any) -> str:
    """Describe a value in JSON's terms, short enough for an error message."""
    if value is None:
        return "null"
    if isinstance(value, bool):  # before int, of which it is a kind
        return f"the truth value {str(value).lower()}"
    if isinstance(value, int | float):
        return f"the number {value}"
    kind = {str: "the text", list: "the list", dict: "the object"}.get(type(value), f"the {type(value).__name__}")
    shown = json.dumps(value, ensure_ascii=False, default=str)
    return f"{kind} {_shortened(shown)}"


def quoted(names: Iterable[Any]) -> str:
    """Join names for an error message: `'content', 'summary'`."""
    return ", ".join(repr(name) for name in names)


def _shortened(text: str) -> str:
    return text if len(text) <= _SNIPPET else text[:_SNIPPET] + "…"


def _nearest_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f", and no folder {path.parent}"
    near = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1)
    return f"; the nearest name beside it is {near[0]!r}" if near else ""


def _read_text(file: str) -> str:
    data = Path(file).read_bytes()
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")  # Windows editors begin UTF-8 files with it
    except UnicodeDecodeError as error:
        raise UserError(_encoding_problem(file, data, error.start)) from error
    if not text.strip():
        raise UserError(f"{file} is empty ({len(data)} bytes): it must hold at least one row.")
    return text


def _encoding_problem(file: str, data: bytes, offset: int) -> str:
    line, column = data.count(b"\n", 0, offset) + 1, offset - data.rfind(b"\n", 0, offset)
    found = f"{file}, line {line}, byte {column}: 0x{data[offset]:02x} is not UTF-8"
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return f"{found} (the file looks like UTF-16); save the file as UTF-8."
    # From the line's first byte, not from the bad one, which may be the second of a character.
    if _looks_like_gbk(data[offset - column + 1 :][:_SAMPLE]):
        return f"{found} (the file looks like GBK): convert it with `iconv -f GB18030 -t UTF-8 {file} > NEW_FILE`."
    return f"{found}; save the file as UTF-8."


def _looks_like_gbk(data: bytes) -> bool:
    """Whether the bytes are GB18030, and most of what is not ASCII is common Chinese."""
    # Nearly all bytes are some GB18030, most of it rare characters where the encoding is another one.
    try:
        text = codecs.getincrementaldecoder("gb18030")().decode(data)  # incremental: a sample may end in a character
    except UnicodeDecodeError:
        return False
    other = [character for character in text if not character.isascii()]
    common = sum(_is_common(character) for character in other)
    return 10 * common > 9 * len(other)


def _is_common(character: str) -> bool:
    """Whether a character is of GB 2312's first level, or one of its signs and full-width letters."""
    try:
        lead = character.encode("gb2312")[0]
    except UnicodeEncodeError:
        return False
    return lead <= 0xD7  # the second level, of rarer characters, follows


def _json_rows(file: str) -> Iterator[Row]:
    text = _read_text(file)
    start = _skip_space(text, 0).end()
    if text[start] == "[":
        return _array_rows(file, text, start, alone=True)
    try:
        value, end = _raw_decode(text, start)  # whatever the extension says: ADGEN's train.json holds lines
    except json.JSONDecodeError as error:
        # One broken object over many lines has one error, at its own place; of lines each may have its own.
        if not _looks_like_lines(text):
            raise UserError(f"{file}, line {error.lineno}, {_json_problem(error)}.") from error
        return _line_rows(file, text)
    if _skip_space(text, end).end() < len(text) or not isinstance(value, dict):
        return _line_rows(file, text)
    if isinstance(value.get("data"), list):
        return _array_rows(file, text, _start_of_value(text, start, "data"))
    return iter([Row(file, "line", text.count("\n", 0, start) + 1, value)])


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


def _array_rows(file: str, text: str, position: int, alone: bool = False) -> Iterator[Row]:
    """Read the elements of the array that opens at `position`, each with its line; nothing may follow one `alone`."""
    # Element by element, as json.loads would not say on which line each begins.
    line, counted = 1, 0
    position = _skip_space(text, position + 1).end()
    while not text.startswith("]", position):
        line, counted = line + text.count("\n", counted, position), position
        value, position = _array_element(file, text, position)
        yield _object_row(file, line, value)
    after = _skip_space(text, position + 1).end()
    if alone and after < len(text):
        error = json.JSONDecodeError("text after the closing bracket", text, after)
        raise UserError(f"{file}, line {error.lineno}, {_json_problem(error)}.")


def _array_element(file: str, text: str, position: int) -> tuple[Any, int]:
    """Decode one element, and return it with the place where the next one (or the closing bracket) begins."""
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
        raise UserError(f"{file}, line {error.lineno}, {_json_problem(error)}.") from error
    return value, end


def _line_rows(file: str, text: str) -> Iterator[Row]:
    # Not splitlines(): JSON strings may hold U+2028 and other line separators.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield _object_row(file, number, json.loads(line))
        except json.JSONDecodeError as error:
            yield Row(file, "line", number, {}, _json_problem(error))


def _json_problem(error: json.JSONDecodeError) -> str:
    found = error.doc[error.pos :].split("\n", 1)[0].rstrip("\r")
    shown = repr(_shortened(found)) if found else "the end of the line"
    return f"column {error.colno}: this is not JSON ({error.msg}), found {shown}"


def _object_row(file: str, line: int, value: Any) -> Row:
    if isinstance(value, dict):
        return Row(file, "line", line, value)
    return Row(file, "line", line, {}, f"column 1: a row must be an object, found {describe_value(value)}")


def _csv_rows(file: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # the default, 128 KiB, is less than a long document; more overflows on Windows
    reader = csv.reader(io.StringIO(_read_text(file), newline=""), strict=True)
    header: list[str] | None = None
    for line, fields in _csv_records(file, reader):
        if header is None:
            header = _checked_header(file, fields)
        elif len(fields) != len(header):
            problem = f"the row has {len(fields)} fields, but the header names {len(header)} columns"
            yield Row(file, "line", line, {}, problem)
        else:
            yield Row(file, "line", line, dict(zip(header, fields, strict=True)))


def _csv_records(file: str, reader: Any) -> Iterator[tuple[int, list[str]]]:
    """Read each record that is not a blank line, with the line on which it begins."""
    while True:
        line = reader.line_num + 1  # taken before the record is read, as a quoted field may span lines
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f"{file}, line {line}: the row that begins here is not CSV ({error}).") from error
        if fields:
            yield line, fields


def _checked_header(file: str, fields: list[str]) -> list[str]:
    twice = sorted({name for name in fields if fields.count(name) > 1})
    if twice:
        raise UserError(f"{file}, line 1: the header names {quoted(twice)} more than once.")
    return fields


def _parquet_rows(file: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1024)
        values = (row for batch in batches for row in batch.to_pylist())
        yield from (Row(file, "row", number, row) for number, row in enumerate(values, 1))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{file}: this is not a readable Parquet file ({error}).") from error


_READERS = {".json": _json_rows, ".jsonl": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
