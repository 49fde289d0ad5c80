"""Read several sources with weights from `--train_file`: `a.json:0.7,b.jsonl:0.3`, with names or as a list in YAML."""

import json
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glm_peft.errors import UserError

# The weight is a number at the end: the colon of a Windows path has a slash behind it, that of a name an extension.
_WEIGHED = re.compile(r"(?:(?P<name>[A-Za-z]\w*)=)?(?P<file>.+):(?P<weight>[-+]?(?:\d[\d.]*|\.\d+)(?:[eE][-+]?\d+)?)")
_KEYS = ("name", "file", "weight")
_COLUMNS = ("prompt_column", "response_column", "history_column", "system_column")


@dataclass(frozen=True)
class Source:
    """A file to train on, its name and weight, and its own columns by the names of their flags."""

    name: str
    file: str
    weight: float
    columns: dict[str, str] = field(default_factory=dict)


def read_train_sources(train_file: str | None) -> list[Source]:
    """
    Return the sources that the value of `--train_file` names; none where it is one file without a weight.

    Raises:
        UserError: a source has no weight or one of 0 or below, or two have the same name.
    """
    # A file whose own name looks like FILE:WEIGHT is taken as a file; not by pathlib, which refuses long texts.
    if not train_file or os.path.exists(train_file):
        return []
    if train_file.lstrip().startswith("{"):
        sources = list(_read_list(train_file))
    else:
        parts = [part.strip() for part in train_file.split(",")]
        if not any(map(_WEIGHED.fullmatch, parts)):
            _refuse_unweighed(train_file, parts)
            return []
        sources = [_read_part(train_file, part) for part in parts]
    for source in sources:
        if not 0 < source.weight < math.inf:
            raise UserError(
                f"--train_file: the weight of {source.file} must be above 0, found {source.weight:g}; leave the "
                "source out, or give it a weight."
            )
    names = [source.name for source in sources]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"--train_file: two sources have the name {twice[0]}; name them NAME=FILE:WEIGHT.")
    return sources


def tell_sources(sources: list[Source], public_name: Callable[[str], str]) -> str:
    """Return a value of `--train_file` that names the sources, of each file only what `public_name` makes of it."""
    if any(source.columns for source in sources):
        rows = [dict(zip(_KEYS, (s.name, public_name(s.file), s.weight), strict=True)) | s.columns for s in sources]
        return ",".join(json.dumps(row, ensure_ascii=False) for row in rows)
    return ",".join(f"{source.name}={public_name(source.file)}:{source.weight:g}" for source in sources)


def _refuse_unweighed(train_file: str, parts: list[str]) -> None:
    if len(parts) > 1 and all(map(os.path.exists, parts)):
        weighed = ",".join(f"{part}:1" for part in parts)
        raise UserError(f"--train_file {train_file}: several files want a weight each, such as {weighed}.")


def _read_part(train_file: str, part: str) -> Source:
    found = _WEIGHED.fullmatch(part)
    if not found:
        raise UserError(
            f"--train_file {train_file}: {part or 'an empty place'} has no weight, and others have one; give each "
            "source as FILE:WEIGHT, separated by commas."
        )
    whole = part[: found.start("weight") - 1]
    name, file = (None, whole) if os.path.exists(whole) else (found["name"], found["file"])
    return Source(name or Path(file).stem, file, float(found["weight"]))


def _read_list(text: str) -> Iterator[Source]:
    """Read the items of a list in YAML, which come as objects of JSON with commas between them."""
    try:
        items = json.loads(f"[{text}]")
    except json.JSONDecodeError as error:
        raise UserError(
            f"--train_file: {text} is not a list of sources ({error.msg}); give each name, file, weight."
        ) from error
    for item in items:
        known = isinstance(item, dict) and {*item} <= {*_KEYS, *_COLUMNS}
        if not known or not isinstance(item.get("file"), str) or not _is_number(item.get("weight")):
            raise UserError(
                f"--train_file: a source has a file, a weight and maybe a name and columns ({', '.join(_COLUMNS)}), "
                f"found {json.dumps(item, ensure_ascii=False)}."
            )
        columns = {name: str(item[name]) for name in _COLUMNS if item.get(name)}
        yield Source(str(item.get("name") or Path(item["file"]).stem), item["file"], float(item["weight"]), columns)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
