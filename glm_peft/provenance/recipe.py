"""Tell a run's arguments and results without what is private: of paths only the last part, no services or tokens."""

import dataclasses
import json
import os
import re
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

from glm_peft.arguments.fields import facts_of, flags_with
from glm_peft.arguments.sources import read_train_sources, tell_sources
from glm_peft.arguments.transformers_flags import NEVER_TOLD_KINDS

if TYPE_CHECKING:
    from glm_peft.arguments.training import TrainArguments

# The Hub's cache: a path through it is a Hub id in disguise.
_CACHED = re.compile(r"[/\\]models--(?P<name>[^/\\]+)[/\\]snapshots[/\\][0-9a-f]{40}")
_WINDOWS_PATH = re.compile(r"[A-Za-z]:[/\\]|\\\\")
_NAMED, _NEXT_NAMED = re.compile(r"[A-Za-z]\w*="), re.compile(r",\s*(?=[A-Za-z]\w*=)")  # as --validation_file has them
_TECHNICAL = ("_runtime", "_per_second", "_flos", "_samples", "epoch")


def describe_recipe(arguments: "TrainArguments") -> dict[str, Any]:
    """Return what the model card tells of the training, by flag; of files and folders only the names."""
    values: dict[str, Any] = {}
    for part in arguments:
        values |= {name: getattr(part, name) for name in flags_with(part, "recipe", "always")}
    # Of the two lengths of training the card tells the one that counted.
    length = "max_steps" if arguments.training.max_steps > 0 else "num_train_epochs"
    values |= {"world_size": arguments.training.world_size, length: getattr(arguments.training, length)}
    for part in arguments:
        values |= _changed_settings(part)
    values["train_file"] = public_sources(values["train_file"])
    values["dataset_name"] = public_name(values["dataset_name"]) if values["dataset_name"] else None
    return {name: getattr(value, "value", value) for name, value in values.items() if value or name == "seed"}


def describe_flags(*arguments: object) -> dict[str, Any]:
    """Return the flags that were given values other than their defaults; of files and folders only the names."""
    told: dict[str, Any] = {}
    for part in arguments:
        given = getattr(part, "given", {})
        how = facts_of(part, "public")
        named = {name: value for name, value in given.items() if not name.startswith(NEVER_TOLD_KINDS)}
        told |= {
            name: _TELLERS.get(how.get(name), _public_value)(v)
            for name, v in named.items()
            if how.get(name) != "never"
        }
    return told


def public_sources(value: str | None) -> str | None:
    """Return a value of `--train_file`, of each file in it only the name."""
    sources = read_train_sources(value)
    return tell_sources(sources, public_name) if sources else _public_value(value)


def _public_value(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _public_value(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_public_value(item) for item in value]
    if not isinstance(value, str):
        return getattr(value, "value", value)
    if value.startswith("{"):  # a flag that takes JSON: each text in it may be a path
        return json.dumps(_public_value(json.loads(value)), ensure_ascii=False)
    if not _NAMED.match(value):
        return public_name(value)
    parts = [part.partition("=") for part in _NEXT_NAMED.split(value)]
    return ",".join(f"{name}={public_name(part)}" for name, _, part in parts)


_TELLERS = {"text": lambda value: value, "sources": public_sources}


def select_scores(results: dict[str, Any]) -> dict[str, Any]:
    """Return the results that tell how good the answers are, without times and counts."""
    return {name: value for name, value in results.items() if not name.endswith(_TECHNICAL)}


def public_name(name_or_path: str) -> str:
    """Return a Hub id as it is, the id that a folder of the Hub's cache is for, or of another path the last part."""
    cached = _CACHED.search(name_or_path)
    if cached:
        return cached["name"].replace("--", "/")
    if _WINDOWS_PATH.match(name_or_path):  # a record may come from another system than the one that reads it
        return PureWindowsPath(name_or_path).name
    path = Path(name_or_path)
    is_folder = path.is_absolute() or path.exists() or name_or_path[:1] in ".~"
    return Path(os.path.abspath(path)).name if is_folder else name_or_path


def _changed_settings(arguments: object) -> dict[str, Any]:
    defaults = {own.name: own.default for own in dataclasses.fields(arguments)}
    names = flags_with(arguments, "recipe", "changed")
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name) != defaults[name]}
