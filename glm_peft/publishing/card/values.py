"""Read single values of recorded JSON, which may hold anything: what has another form counts as not recorded."""

import math
from collections.abc import Mapping
from typing import Any


def part(record: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    """Return the object under these names; empty where the record holds none there."""
    value: Any = record
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value if isinstance(value, Mapping) else {}


def text_of(value: Any) -> str | None:
    """Return a text in one line, and `None` for an empty one and for anything else."""
    # The Hub's own reader ends the metadata of a card at a line of dashes, also inside a quoted text.
    return " ".join(value.splitlines()) or None if isinstance(value, str) else None


def read_prompt(record: Mapping[str, Any]) -> dict[str, str]:
    """Return the texts that stand in every prompt, by flag; empty where none are recorded."""
    # Adapters of earlier versions have them among the flags alone.
    recorded = part(record, "prompt") or {**part(record, "recipe"), **part(record, "flags")}
    names = ("source_prefix", "system_text")
    return {name: recorded[name] for name in names if isinstance(recorded.get(name), str) and recorded[name]}


def read_messages(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the conversation of a row of predictions up to its question; of earlier versions the question alone."""
    messages, keys = row.get("messages"), ("role", "content")
    is_read = isinstance(messages, list) and all(
        isinstance(message, dict) and all(isinstance(message.get(key), str) for key in keys) for message in messages
    )
    return messages if is_read and messages else [{"role": "user", "content": row["prompt"]}]


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number; a card can show no other."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
