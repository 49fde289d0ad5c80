"""Recognise what a path or Hub id is, by the names and heads of its files; every command asks here."""

import difflib
import json
import os
import re
from dataclasses import dataclass
from enum import Flag, auto
from pathlib import Path
from typing import Any

from glm_peft.errors import UserError
from glm_peft.hub.connection import set_up_connection
from glm_peft.hub.rights import is_hub_id
from glm_peft.models.generations import generation_by_fields
from glm_peft.models.tokenization_common import read_json_beside, recorded_generation
from glm_peft.models.weight_files import find_weights, read_tensors, read_weight_map

PREFIX = "prefix_encoder."
"""What stands in the names of a published prefix's parameters."""

_MODEL_TYPES = ("chatglm", "glm", "glm4")
_CONFIG, _ADAPTER_CONFIG = "config.json", "adapter_config.json"
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_MOST_NAMES = 3


class Kind(Flag):
    """What a path or Hub id can be, or, several together, what a flag takes."""

    BASE = auto()
    MODEL_WITH_PREFIX = auto()
    PUBLISHED_PREFIX = auto()
    ADAPTER = auto()
    BROKEN = auto()
    OTHER_MODEL = auto()
    ELSEWHERE = auto()
    NOTHING = auto()
    ON_HUB = auto()


A_BASE = Kind.BASE | Kind.MODEL_WITH_PREFIX
A_PEFT_ADAPTER = Kind.ADAPTER
A_CHECKPOINT = Kind.PUBLISHED_PREFIX | Kind.MODEL_WITH_PREFIX
AN_ADAPTER = A_PEFT_ADAPTER | A_CHECKPOINT

_NAMES = {
    A_BASE: "a base model",
    A_PEFT_ADAPTER: "a PEFT adapter",
    A_CHECKPOINT: "a published P-Tuning v2 checkpoint",
    AN_ADAPTER: "a PEFT adapter or a published P-Tuning v2 checkpoint",
}
_CONVERTED = "--adapter_name_or_path takes {}, and python -m glm_peft.convert import makes a PEFT adapter of it"
# What takes each kind, for messages: the end of a sentence.
_TAKEN_BY = {
    Kind.BASE: "--model_name_or_path or --base takes {}",
    Kind.MODEL_WITH_PREFIX: _CONVERTED,
    Kind.PUBLISHED_PREFIX: _CONVERTED,
    Kind.ADAPTER: "--adapter_name_or_path takes {}",
    Kind.OTHER_MODEL: "give one of ChatGLM-6B, ChatGLM2-6B, ChatGLM3-6B, GLM-4-9B or GLM-4-0414",
    Kind.ELSEWHERE: "give one of them",
    Kind.NOTHING: "give a folder with all of its files, or a Hub id with its owner, such as THUDM/chatglm3-6b",
}


@dataclass(frozen=True)
class Source:
    """
    What a path or Hub id was recognised as.

    Args:
        name: the path or id.
        what: the predicate of a sentence about it; of something broken, the whole sentence.
        other: the place that is meant instead, where one shows.
    """

    name: str
    kind: Kind
    what: str
    other: "Source | None" = None


def check_source(name: str, flag: str, wanted: Kind, **hub_arguments: str | None) -> Source:
    """
    Recognise a path or Hub id, and check that a flag takes its kind; a Hub id that says nothing passes.

    Args:
        flag: the flag or the place on the command line, as the user knows it.
        wanted: `A_BASE`, `A_PEFT_ADAPTER`, `A_CHECKPOINT` or `AN_ADAPTER`.

    Raises:
        UserError: it is something else, with the flag or command that takes it, or its weights are broken.
    """
    source = recognise(name, **hub_arguments)
    if source.kind in wanted or source.kind == Kind.ON_HUB:
        return source
    if source.kind == Kind.BROKEN:
        raise UserError(source.what)
    raise UserError(f"{flag} {name} {source.what}, and {_NAMES[wanted]} is wanted: {_advice(source, wanted)}.")


def recognise(name: str, **hub_arguments: str | None) -> Source:
    """
    Tell what a path or Hub id is, without reading any weights.

    Args:
        hub_arguments: `revision` and `cache_dir` of a Hub id.
    """
    path = Path(name)
    try:
        if path.is_dir():
            return _recognise_folder(path)
        if path.exists():  # a device and a pipe, too
            return Source(name, Kind.ELSEWHERE, "is a file", recognise(str(path.parent)))
        on_hub = _recognise_on_hub(name, hub_arguments) if is_hub_id(name) else None
        near = _nearest(path)
    except UserError as error:
        return Source(name, Kind.BROKEN, str(error))
    except OSError as error:
        return Source(name, Kind.BROKEN, f"{name} cannot be looked into ({error.strerror}): see to its permissions.")
    if on_hub:
        return on_hub
    if near:
        return Source(name, Kind.ELSEWHERE, f"is not there, but {near} is", recognise(str(near)))
    if is_hub_id(name) and not path.parent.is_dir():
        return Source(name, Kind.ON_HUB, "is a Hub id that says nothing")
    place = "" if path.is_absolute() else f" in {Path.cwd()}{', nor does the Hub give it' if is_hub_id(name) else ''}"
    return Source(name, Kind.NOTHING, f"is not there{place}")


def _recognise_folder(folder: Path) -> Source:
    name = str(folder)
    if (folder / _ADAPTER_CONFIG).is_file():
        return _recognise_adapter(folder)
    config = _read_config(folder / _CONFIG)
    if config.get("model_type") not in (None, *_MODEL_TYPES):
        return _recognise_model(name, config)
    try:
        names = list(read_weight_map(folder))
    except UserError:
        if not config.get("model_type") or config.get("pre_seq_len"):  # it may be a prefix or a base
            raise
        names = []
    if any(PREFIX in parameter for parameter in names):
        if all(PREFIX in parameter for parameter in names):
            return Source(name, Kind.PUBLISHED_PREFIX, "is a published P-Tuning v2 prefix without its base")
        return Source(name, Kind.MODEL_WITH_PREFIX, "is a whole model with a P-Tuning v2 prefix inside")
    if config.get("model_type"):
        return _recognise_model(name, config, _read_config(folder / "tokenizer_config.json"))
    if config or find_weights(folder):
        return Source(name, Kind.OTHER_MODEL, "has no config.json with a model_type")
    return _recognise_parent(folder)


def _recognise_model(name: str, config: dict[str, Any], tokenizer_config: dict[str, Any] | None = None) -> Source:
    if config["model_type"] not in _MODEL_TYPES:
        return Source(name, Kind.OTHER_MODEL, f"is a model of type {config['model_type']!r}")
    generation = recorded_generation(tokenizer_config or {}, config) or generation_by_fields(config)
    return Source(name, Kind.BASE, f"is a base model{f' of {generation}' if generation else ''}")


def _recognise_adapter(folder: Path) -> Source:
    for name in _ADAPTER_WEIGHTS:
        if (folder / name).is_file():
            read_tensors(folder / name, None)
    method = str(_read_config(folder / _ADAPTER_CONFIG).get("peft_type")).lower()
    return Source(str(folder), Kind.ADAPTER, f"is a PEFT adapter of the method {method}")


def _recognise_parent(folder: Path) -> Source:
    """Recognise a folder that holds nothing itself: it may be empty, or have folders that do."""
    # The cache of the Hub keeps the files of a repository one folder deeper.
    folders = [path for path in (*folder.iterdir(), *folder.glob("snapshots/*")) if path.is_dir()]
    inner = sorted((path for path in folders if _holds_something(path)), key=_by_number)
    if inner:
        is_run = _CHECKPOINT.fullmatch(inner[-1].name)
        other = _recognise_folder(inner[-1]) if is_run or len(inner) == 1 else None
        what = f"holds no model or adapter itself, but in {_listed([path.name for path in inner])}"
        return Source(str(folder), Kind.ELSEWHERE, what, other)
    names = sorted(path.name for path in folder.iterdir())
    what = f"holds no model or adapter, only {_listed(names)}" if names else "is an empty folder"
    return Source(str(folder), Kind.NOTHING, what)


def _recognise_on_hub(name: str, hub_arguments: dict[str, Any]) -> Source | None:
    """Recognise a Hub id by its small files, or return `None` where the Hub and the cache have none of them."""
    set_up_connection()
    try:
        config = read_json_beside(name, _CONFIG, **hub_arguments)
        adapter = {} if config else read_json_beside(name, _ADAPTER_CONFIG, **hub_arguments)
    except (OSError, ValueError):
        return None  # loading says what is wrong
    if adapter:
        return Source(name, Kind.ADAPTER, f"is a PEFT adapter of the method {str(adapter.get('peft_type')).lower()}")
    return _recognise_model(name, config) if config.get("model_type") else None


def _holds_something(folder: Path) -> bool:
    return find_weights(folder) is not None or any((folder / name).is_file() for name in (_CONFIG, _ADAPTER_CONFIG))


def _by_number(folder: Path) -> tuple[int, str]:
    found = _CHECKPOINT.fullmatch(folder.name)
    return (int(found[1]) if found else -1, folder.name)


def _listed(names: list[str]) -> str:
    more = [f"{len(names) - _MOST_NAMES} more"] if len(names) > _MOST_NAMES else []
    *first, last = names[-_MOST_NAMES:] + more
    return f"{', '.join(first)} and {last}" if first else last


def _nearest(path: Path) -> Path | None:
    """Return the path on this disk that one with a typing mistake is nearest to, or `None`."""
    at_home = Path(os.path.expanduser(path))
    if at_home.exists():  # a shell expands ~, but not in a configuration file
        return at_home
    missing = next((part for part in reversed((path, *path.parents)) if not part.exists()), path)
    beside = missing.parent.iterdir() if missing.parent.is_dir() else ()
    folders = {found.name.lower(): found for found in beside if found.is_dir()}
    near = difflib.get_close_matches(missing.name.lower(), folders, 1)
    if not near:
        return None
    whole = folders[near[0]] / path.relative_to(missing)
    return whole if whole.exists() else _nearest(whole)


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} cannot be read ({type(error).__name__}): copy or download it again.") from error
    return config if isinstance(config, dict) else {}


def _advice(source: Source, wanted: Kind) -> str:
    if source.other is None:
        return _TAKEN_BY[source.kind].format(source.name)
    if source.other.kind in wanted:
        return f"give {source.other.name}"
    return source.other.what.rstrip(".") if source.other.kind == Kind.BROKEN else _advice(source.other, wanted)
