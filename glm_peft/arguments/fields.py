"""Declare a flag as a dataclass field that states every fact about it, and require that values are in range."""

import copy
from collections.abc import Iterator
from dataclasses import field, fields, replace
from typing import Any, TypeVar

from glm_peft.arguments.transformers_flags import FACTS
from glm_peft.errors import UserError

Arguments = TypeVar("Arguments")


def option(default: Any, help: str, *aliases: str, **facts: Any) -> Any:
    """
    Declare a flag: a dataclass field with a help text and the facts that other rooms ask for.

    Args:
        default: the value where the flag is not given; a list or a dict is copied for each instance.
        help: a fragment that says the effect, and what `None` means.
        aliases: other names of the flag, such as that of the published scripts.
        facts: what is true of the flag, by these names.
            methods: the values of `--peft_type` that the flag belongs to; of all where it is missing.
            recipe: whether the model card tells the value: "always", or "changed" where it is not the default.
            public: how a record tells the value: "text" as it is, "never" not at all, "sources" by the files in it;
                of paths the last part where it is missing.
            joined: whether several values, such as a list in YAML, are joined by commas.
            prediction: what `glm_peft.predict` makes of it: "ignored", "refused", or the help text that it has there.
            reads: whether it says which column of a row is read.
            encodes: whether the token ids of a row depend on it.
            shapes_prompt: whether it is recorded with an adapter, which decides it later on where it is not given.
            needs: the flags without which it has no effect, of which one is enough: "NAME" is on, "!NAME" is off,
                "NAME=PATTERN" has a value that the regular expression matches, "NAME!=PATTERN" another one; none at
                all where it never has an effect.
            outdoes: the flags of a configuration file that it takes the place of on the command line.
            ends: the same, where it is switched off there.
            search: "varied" where trials may differ in it, "free" where a search may go on with another value.
            nargs, const: for argparse.
    """
    # In the field's metadata, so that a flag is declared in one place and no list of names has to follow it.
    metadata = {"help": help, **facts} | ({"aliases": [f"--{alias}" for alias in aliases]} if aliases else {})
    if isinstance(default, list | dict):  # dataclasses refuse a mutable default
        return field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def facts_of(arguments: object, fact: str) -> dict[str, Any]:
    """Return what is stated of a fact by the names of the flags, of an argument dataclass or an instance of one."""
    # Flags of transformers have no metadata of ours: what is true of them stands in a table.
    stated = {one.name: one.metadata.get(fact, FACTS.get(one.name, {}).get(fact)) for one in fields(arguments)}
    return {name: value for name, value in stated.items() if value is not None}


def flags_with(arguments: object, fact: str, *values: Any) -> Iterator[str]:
    """
    Yield the names of the flags of which a fact is stated.

    Args:
        arguments: an argument dataclass, or an instance of one.
        fact: the fact's name, see `option`.
        values: those that count; any where none is given.
    """
    for name, stated in facts_of(arguments, fact).items():
        if not values or stated in values:
            yield name


def changed(arguments: Arguments, **values: Any) -> Arguments:
    """Return a copy of frozen arguments with other values, which are checked as those of the command line are."""
    new = replace(arguments, **values)  # what the user gave, and where, stays: it is no field
    for name in ("given", "places"):
        object.__setattr__(new, name, getattr(arguments, name, {}))
    return new


def require_at_least_one(arguments: object, *names: str) -> None:
    """Raise a `UserError` where one of these numbers is below 1."""
    for name in names:
        value = getattr(arguments, name)
        require(value is None or value >= 1, f"--{name} must be at least 1", value)


def require(holds: bool, rule: str, found: Any) -> None:
    """Raise a `UserError` that names the rule and what was found, unless it holds."""
    if not holds:
        raise UserError(f"{rule}, found {found}.")
