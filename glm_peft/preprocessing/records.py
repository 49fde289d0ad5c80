"""Read files and Hub datasets row by row; every row knows the file and the line that it came from."""

import csv
import difflib
import io
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm_peft.errors import UserError
from glm_peft.preprocessing.json_values import json_values, shorten
from glm_peft.reporting.text_files import read_text, refuse_other_kinds

logger = logging.getLogger(__name__)


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
    Read the rows of a `.json`, `.jsonl`, `.csv`, `.tsv` or `.parquet` file, in order.

    JSON may be an array of objects, an object with such an array under `data`, or objects one after another, a line
    or more each, whatever the extension says; blank lines are no rows. A line that cannot be read is a row with a
    `problem`. The columns of a CSV file may be separated by commas, tabs, semicolons or bars.

    Raises:
        UserError: the file does not exist, is of another kind, is empty, is not UTF-8, or cannot be read at all.
    """
    path, reader = Path(file), _reader_of(Path(file))
    if path.is_dir():
        near = next((f", such as {entry}" for entry in sorted(path.iterdir()) if _reader_of(entry)), "")
        raise UserError(f"{file} is a folder; give one file of rows{near}.")
    if not path.is_file():
        raise UserError(f"{file}: there is no such file{_nearest_file(path)}.")
    if reader is not _parquet_rows:
        refuse_other_kinds(file)
    if reader is None:
        raise UserError(f"{file}: files of this kind cannot be read; give a file ending in {', '.join(_READERS)}.")
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
    return f"{kind} {shorten(shown)}"


def quoted(names: Iterable[Any]) -> str:
    """Join names for an error message: `'content', 'summary'`."""
    return ", ".join(repr(name) for name in names)


def _reader_of(path: Path) -> Callable[[str], Iterator[Row]] | None:
    return _READERS.get(path.suffix.lower())


def _nearest_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f", and no folder {path.parent}"
    near = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1)
    return f"; the nearest name beside it is {near[0]!r}" if near else ""


def _json_rows(file: str) -> Iterator[Row]:
    for line, value, problem in json_values(file, read_text(file)):
        if problem is None and not isinstance(value, dict):
            problem = f"column 1: a row must be an object, found {describe_value(value)}"
        yield Row(file, "line", line, {} if problem else value, problem)


def _csv_rows(file: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # the default, 128 KiB, is less than a long document; more overflows on Windows
    text = read_text(file)
    delimiter = _delimiter(text)
    if delimiter != ",":
        logger.info("%s: its columns are separated by %s.", file, "tabs" if delimiter == "\t" else repr(delimiter))
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    header: list[str] | None = None
    for line, fields in _csv_records(file, reader):
        if header is None:
            header = _checked_header(file, fields)
        elif len(fields) != len(header):
            problem = f"the row has {len(fields)} fields, but the header names {len(header)} columns"
            yield Row(file, "line", line, {}, problem)
        else:
            yield Row(file, "line", line, dict(zip(header, fields, strict=True)))


def _delimiter(text: str) -> str:
    """Find what separates the names of the header: a comma, else another sign where there is one."""
    header = text.lstrip().partition("\n")[0]
    return next((sign for sign in ",\t;|" if sign in header), ",")


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


_READERS = {".json": _json_rows, ".jsonl": _json_rows, ".csv": _csv_rows, ".tsv": _csv_rows, ".parquet": _parquet_rows}
