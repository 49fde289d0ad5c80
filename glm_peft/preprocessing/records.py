"""Read files and Hub datasets row by row; every row knows the file and the line that it came from."""

import csv
import difflib
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm_peft.errors import UserError
from glm_peft.preprocessing.json_values import json_values, shorten
from glm_peft.reporting.text_files import open_text, refuse_other_kinds

logger = logging.getLogger(__name__)

_HELD = 1 << 22  # characters of a JSON file that are held at a time where it is streamed
_BATCH = 1024  # rows of a table that are held at a time
_FETCHING = (OSError, ValueError, RuntimeError)  # what goes wrong with a dataset on the Hub


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


def read_rows(file: str, is_streamed: bool = False) -> Iterator[Row]:
    """
    Read the rows of a `.json`, `.jsonl`, `.csv`, `.tsv` or `.parquet` file, in order.

    JSON may be an array of objects, an object with such an array under `data`, or objects one after another, a line
    or more each, whatever the extension says; blank lines are no rows. A line that cannot be read is a row with a
    `problem`. The columns of a CSV file may be separated by commas, tabs, semicolons or bars.

    Args:
        is_streamed: whether a part of the file is in memory at a time, not all of it.

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
    return reader(file, is_streamed)


def read_hub_rows(dataset_name: str, config_name: str | None, split: str, is_streamed: bool = False) -> Iterator[Row]:
    """
    Read the rows of one split of a Hub dataset or of a local folder that `datasets` can load.

    Args:
        is_streamed: whether rows are fetched while they are read, instead of the whole dataset before.

    Raises:
        UserError: the dataset cannot be loaded or has no such split.
    """
    import datasets

    try:
        dataset = datasets.load_dataset(dataset_name, config_name, streaming=is_streamed)
    except (*_FETCHING, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"--dataset_name {dataset_name} could not be loaded: {_first_line(error)}") from error
    if split not in dataset:
        raise UserError(
            f"--dataset_name {dataset_name} has no split {split!r}, only {quoted(dataset)}; give a file instead."
        )
    return _table_rows(dataset[split], dataset_name, f"{split} row")


def _table_rows(dataset: Any, name: str, unit: str) -> Iterator[Row]:
    number = 0
    try:
        # By batches: of a stream `datasets` would otherwise give each worker of a data loader some of its files alone.
        for batch in dataset.iter(_BATCH):
            for row in zip(*batch.values(), strict=True):
                number += 1
                yield Row(name, unit, number, dict(zip(batch, row, strict=True)))
    except _FETCHING as error:
        raise UserError(f"--dataset_name {name} broke off after {unit} {number}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


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


def _reader_of(path: Path) -> Callable[[str, bool], Iterator[Row]] | None:
    return _READERS.get(path.suffix.lower())


def _nearest_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f", and no folder {path.parent}"
    near = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1)
    return f"; the nearest name beside it is {near[0]!r}" if near else ""


def _json_rows(file: str, is_streamed: bool) -> Iterator[Row]:
    with open_text(file, is_streamed) as stream:
        for line, value, problem in json_values(file, stream, _HELD if is_streamed else -1):
            if problem is None and not isinstance(value, dict):
                problem = f"column 1: a row must be an object, found {describe_value(value)}"
            yield Row(file, "line", line, {} if problem else value, problem)


def _csv_rows(file: str, is_streamed: bool) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # the default, 128 KiB, is less than a long document; more overflows on Windows
    with open_text(file, is_streamed) as stream:
        delimiter = _delimiter(next((line for line in stream if line.strip()), ""))
        stream.seek(0)
        if delimiter != ",":
            logger.info("%s: its columns are separated by %s.", file, "tabs" if delimiter == "\t" else repr(delimiter))
        reader = csv.reader(stream, strict=True, delimiter=delimiter)
        header: list[str] | None = None
        for line, fields in _csv_records(file, reader):
            if header is None:
                header = _checked_header(file, fields)
            elif len(fields) != len(header):
                problem = f"the row has {len(fields)} fields, but the header names {len(header)} columns"
                yield Row(file, "line", line, {}, problem)
            else:
                yield Row(file, "line", line, dict(zip(header, fields, strict=True)))


def _delimiter(header: str) -> str:
    """Find what separates the names of the header: a comma, else another sign where there is one."""
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


def _parquet_rows(file: str, is_streamed: bool) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=_BATCH)
        values = (row for batch in batches for row in batch.to_pylist())
        yield from (Row(file, "row", number, row) for number, row in enumerate(values, 1))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{file}: this is not a readable Parquet file ({error}).") from error


_READERS = {".json": _json_rows, ".jsonl": _json_rows, ".csv": _csv_rows, ".tsv": _csv_rows, ".parquet": _parquet_rows}
