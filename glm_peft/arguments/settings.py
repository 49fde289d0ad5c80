"""Read settings: the flags of a command line, and the lines of a configuration file."""

import dataclasses
import difflib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from glm_peft.errors import UserError
from glm_peft.reporting.text_files import read_text

# Neither a negative number nor a text that happens to begin with a hyphen.
_is_flag = re.compile(r"(--[A-Za-z][\w-]*|-[A-Za-z]\w[\w-]*)(=.*)?", re.DOTALL).fullmatch
_SUFFIXES = (".yaml", ".yml", ".json")


@dataclasses.dataclass(frozen=True)
class Setting:
    """One argument as it was given: its name, its values as text, and where it stands for an error message."""

    name: str
    values: list[str]
    where: str

    @property
    def text(self) -> str:
        """Return the setting as a message tells it, with its place where it stands in a file."""
        separator = " " if self.is_flag else ": "
        return f"{self.where}{separator}{' '.join(self.values)}" if self.values else self.where

    @property
    def is_flag(self) -> bool:
        """Whether it was given on the command line."""
        return self.where.startswith("--")


def split_words(argv: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Split a command line, that of this process where `None`, into the words before the first flag and the rest."""
    words = list(sys.argv[1:] if argv is None else argv)
    first_flag = next((number for number, word in enumerate(words) if word.startswith("-")), len(words))
    return words[:first_flag], words[first_flag:]


def read_sources(argv: Sequence[str]) -> tuple[list[Setting], list[Setting]]:
    """Read the configuration file that a command line may begin with, and its flags."""
    has_file = bool(argv) and not argv[0].startswith("-")
    return read_config(argv[0]) if has_file else [], read_flags(argv[1:] if has_file else argv)


def check_order(setting: Setting) -> None:
    """Raise a `UserError` where a word behind a flag is what stands before the first one."""
    found = [word for word in setting.values if word.lower().endswith(_SUFFIXES)]
    # Of two JSON files one may be the flag's own, such as rows.
    if setting.is_flag and found and (len(found) == 1 or not found[-1].lower().endswith(".json")):
        raise UserError(f"{found[-1]}: a configuration file stands before the first flag, not behind {setting.where}.")


def read_flags(argv: Sequence[str]) -> list[Setting]:
    """
    Read the flags of a command line with the words that follow each.

    Raises:
        UserError: the first word is no flag.
    """
    settings: list[Setting] = []
    for word in argv:
        if _is_flag(word):
            written, equals, value = word.lstrip("-").partition("=")
            name = _normal(written)
            settings.append(Setting(name, [value] if equals else [], f"--{name}"))
        elif settings:
            settings[-1].values.append(word)
        else:
            raise UserError(f"{word}: a flag begins with --, and only the first word may be a configuration file.")
    return settings


def read_config(file: str) -> list[Setting]:
    """
    Read the arguments of a YAML or JSON file, without those that are null.

    Raises:
        UserError: the file is not there, has another extension, is broken, is no mapping, or has a name twice.
    """
    path = Path(file)
    if path.is_dir():
        raise UserError(f"{file} is a folder: give a configuration file in it.")
    if path.suffix.lower() not in _SUFFIXES:
        raise UserError(f"{file}: a configuration file must end in {', '.join(_SUFFIXES)}, and flags begin with --.")
    try:
        text = read_text(file)
    except FileNotFoundError:
        raise UserError(f"{file}: this configuration file cannot be read: {where_to_look(path)}.") from None
    except OSError as error:
        raise UserError(f"{file}: this configuration file cannot be read ({error}).") from error
    read = _json_settings if path.suffix.lower() == ".json" else _yaml_settings
    try:
        return list(read(file, text))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{file}, line {mark.line + 1}, column {mark.column + 1}" if mark else file
        raise UserError(f"{where}: not YAML ({' '.join(str(getattr(error, 'problem', error)).split())}).") from error


def where_to_look(path: Path) -> str:
    """Say where a file that is not there was looked for, and which one may be meant."""
    root = Path(__file__).parents[2]
    looked = f"there is no such file in {path.absolute().parent}"
    if not path.is_absolute() and (root / path).is_file():
        return f"{looked}, but {root / path} is there: give that, or start in {root}, as the paths in it begin there"
    if not path.is_absolute() and (root / "glm_peft" / path).is_file():  # installed without a checkout
        return f"{looked}; `glm-peft recipes {path.stem}` puts it there"
    beside = {found.name: found for found in path.parent.glob("*.*") if found.suffix.lower() in _SUFFIXES}
    near = difflib.get_close_matches(path.name, beside, n=1)
    return f"{looked}, {f'the nearest is {beside[near[0]]}' if near else 'give its whole path'}"


def _json_settings(file: str, text: str) -> Iterator[Setting]:
    def as_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _require_once(file, [name for name, _ in pairs])
        return dict(pairs)

    try:
        config = json.loads(text, object_pairs_hook=as_dict)
    except json.JSONDecodeError as error:
        raise UserError(f"{file}, line {error.lineno}, column {error.colno}: not JSON ({error.msg}).") from error
    if not isinstance(config, dict):
        raise UserError(f"{file}: a configuration must be an object of names and values.")
    for name, value in config.items():
        if value is not None:
            yield Setting(_normal(name), _as_words(value), f"{file}, {name}")


def _yaml_settings(file: str, text: str) -> Iterator[Setting]:
    # Nodes instead of values, for the lines of the names and the scalars as they are written.
    loader = yaml.SafeLoader(text)
    root = loader.get_single_node()
    if root is not None and not isinstance(root, yaml.MappingNode):
        raise UserError(f"{file}: a configuration must be lines of `name: value`.")
    pairs = root.value if root else []
    _require_once(file, [str(key.value) for key, _ in pairs])
    for key, value in pairs:
        if value.tag != "tag:yaml.org,2002:null":
            words = _yaml_words(loader, value)
            yield Setting(_normal(key.value), words, f"{file}, line {key.start_mark.line + 1}, {key.value}")


def _yaml_words(loader: yaml.SafeLoader, node: yaml.Node) -> list[str]:
    # YAML itself would read the `no` of `eval_strategy: no` as false, and 2e-2 as text.
    if isinstance(node, yaml.ScalarNode):
        return [node.value]
    if isinstance(node, yaml.SequenceNode) and all(isinstance(item, yaml.ScalarNode) for item in node.value):
        return [item.value for item in node.value]
    return _as_words(loader.construct_object(node, deep=True))


def _as_words(value: Any) -> list[str]:
    """Return a value as the words that would follow its flag: a list as several, a dictionary as JSON."""
    values = value if isinstance(value, list) else [value]
    return [item if isinstance(item, str) else json.dumps(item) for item in values]


def _require_once(file: str, names: list[str]) -> None:
    # Both formats would take the last one without a word.
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"{file}: {twice[0]} stands there more than once; keep one.")


def _normal(name: str) -> str:
    return str(name).replace("-", "_")
