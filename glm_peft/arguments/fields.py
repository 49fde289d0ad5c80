"""Declare a flag as a dataclass field, and require that its value is in range."""

from dataclasses import field
from typing import Any

from glm_peft.errors import UserError


def option(default: Any, help: str, *aliases: str, **metadata: Any) -> Any:
    """A dataclass field with a help text and other names for its flag."""
    metadata |= {"help": help} | ({"aliases": [f"--{alias}" for alias in aliases]} if aliases else {})
    return field(default=default, metadata=metadata)


def require_at_least_one(arguments: Any, *names: str) -> None:
    """Raise a `UserError` where one of these numbers is below 1."""
    for name in names:
        value = getattr(arguments, name)
        require(value is None or value >= 1, f"--{name} must be at least 1", value)


def require(holds: bool, rule: str, found: Any) -> None:
    """Raise a `UserError` that names the rule and what was found, unless it holds."""
    if not holds:
        raise UserError(f"{rule}, found {found}.")
