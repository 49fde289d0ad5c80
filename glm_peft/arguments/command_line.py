"""Parse `[CONFIG.yaml|CONFIG.json] [--flags]` into argument dataclasses; the flags win over the file."""

import argparse
import copy
import dataclasses
import difflib
import json
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers.hf_argparser import HfArgumentParser, string_to_bool

from glm_peft.arguments.former_options import IGNORED, REFUSED, RENAMED
from glm_peft.errors import UserError

logger = logging.getLogger(__name__)

# Neither a negative number nor a text that happens to begin with a hyphen.
_is_flag = re.compile(r"--?[A-Za-z]\w[\w-]*(=.*)?", re.DOTALL).fullmatch
HELP_FLAGS = {"-h", "--help", "--help_all"}
_OF_ARGPARSE = ("help", "aliases", "nargs", "const")  # of a field's metadata: what argparse understands
_SUFFIXES = (".yaml", ".yml", ".json")


@dataclasses.dataclass(frozen=True)
class Setting:
    """One argument as it was given: its name, its values as text, and where it stands for an error message."""

    name: str
    values: list[str]
    where: str


def split_words(argv: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Split a command line, that of this process where `None`, into the words before the first flag and the rest."""
    words = list(sys.argv[1:] if argv is None else argv)
    first_flag = next((number for number, word in enumerate(words) if word.startswith("-")), len(words))
    return words[:first_flag], words[first_flag:]


def parse_command(
    argv: Sequence[str], dataclass_types: Sequence[type], renamed: Mapping[str, str] = RENAMED, **parser_options: Any
) -> tuple[Any, ...]:
    """
    Build the dataclasses that a command line describes, a configuration file at its beginning; `--help` exits.

    Every name may be written with underscores or hyphens. Names of older releases are handled as
    `glm_peft.arguments.former_options` says. Each dataclass has an attribute `given` with the values that are not the
    defaults.

    Args:
        argv: the words after the script's name.
        dataclass_types: what to build; a field's metadata may hold `help` and, as `aliases`, other flags for it.
        renamed: other names for fields of these dataclasses.
        parser_options: keyword arguments of `argparse.ArgumentParser`, such as `usage`.

    Raises:
        UserError: the file cannot be read, a name is unknown or refused, a value does not fit, or the dataclasses
            refuse the values.
    """
    parser = _Parser(dataclass_types, renamed, **parser_options)
    if HELP_FLAGS & set(argv):  # before a wrong word beside it can end the run
        parser.parse_args(["--help"])
    has_file = bool(argv) and not argv[0].startswith("-")
    from_file = read_config(argv[0]) if has_file else []
    from_flags = read_flags(argv[1:] if has_file else argv)
    values = parser.parse_known_args([])[0]  # the defaults, over which each source writes
    defaults = dict(vars(values))
    for settings in (from_file, from_flags):
        parser.read_settings(settings, values)
    # Noted before the dataclasses fill in what was not given.
    given = {name: value for name, value in vars(values).items() if value != defaults[name]}
    built = tuple(_build(dataclass_type, vars(values)) for dataclass_type in dataclass_types)
    for arguments in built:
        own = {name: given[name] for name in vars(arguments) if name in given}
        object.__setattr__(arguments, "given", own)  # most of these dataclasses are frozen
    return built


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
    if path.suffix.lower() not in _SUFFIXES:
        raise UserError(f"{file}: a configuration file must end in {', '.join(_SUFFIXES)}, and flags begin with --.")
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors on Windows put a byte order mark first
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: this configuration file cannot be read ({error}).") from error
    read = _json_settings if path.suffix.lower() == ".json" else _yaml_settings
    try:
        return list(read(file, text))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{file}, line {mark.line + 1}, column {mark.column + 1}" if mark else file
        raise UserError(f"{where}: not YAML ({' '.join(str(getattr(error, 'problem', error)).split())}).") from error


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


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Show one spelling of each flag, a default only where there is one, and the epilog's lines unjoined."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(super(_HelpFormatter, self)._fill_text(line, width, indent) for line in text.split("\n"))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        # transformers adds each name with hyphens, too.
        flags = [flag for flag in action.option_strings if "-" not in flag.removeprefix("--")]
        kind = "true|false" if action.const is True else getattr(action.type, "__name__", "value")
        takes = self._format_args(action, kind) if action.nargs != 0 else ""
        return f"{', '.join(flags or action.option_strings)} {takes}".rstrip()

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_default = action.nargs != 0 and action.default not in (None, "")
        return super()._get_help_string(action) if has_default else action.help


class _Problem(Exception):
    """A value that argparse refuses, with its reason."""


class _Parser(HfArgumentParser):
    """A parser that reads settings one by one, so that each error names the place of its argument."""

    def __init__(self, dataclass_types: Sequence[type], renamed: Mapping[str, str], **options: Any) -> None:
        # No abbreviations: a new flag would make one that a recipe uses ambiguous.
        super().__init__(dataclass_types, allow_abbrev=False, formatter_class=_HelpFormatter, **options)
        names = names_of_fields(dataclass_types)
        self._names = names | {old: new for old, new in renamed.items() if new in names}
        for action in self._actions:
            if action.type is string_to_bool and action.nargs is None:
                action.nargs, action.const = "?", True  # --flag alone is true; transformers forgets `bool | None`
            if action.dest in {**REFUSED, **renamed}:
                action.help = argparse.SUPPRESS

    @staticmethod
    def _parse_dataclass_field(parser: argparse.ArgumentParser, field: dataclasses.Field) -> None:
        """Add the flag of a field with the part of its metadata that argparse understands."""
        own = copy.copy(field)
        own.metadata = {name: field.metadata[name] for name in _OF_ARGPARSE if name in field.metadata}
        HfArgumentParser._parse_dataclass_field(parser, own)

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong with a value, where argparse would print it and exit."""
        # Without the argument's name, which is told with its place.
        problem = message.partition(": ")[2] if message.startswith("argument ") else message
        raise _Problem(problem.rstrip("."))

    def read_settings(self, settings: Iterable[Setting], values: argparse.Namespace) -> None:
        """Write the settings of one source into `values`, over those of an earlier source."""
        # Within a source two names of one argument must agree; over the file's a flag wins whatever its name.
        by_target: dict[str, Setting] = {}
        for setting in settings:
            target = self._target(setting)
            if target is None:
                continue
            other = by_target.setdefault(target, setting)
            if other.name != setting.name and other.values != setting.values:
                raise UserError(
                    f"{setting.where}: {' '.join(setting.values)} contradicts {other.name} "
                    f"{' '.join(other.values)}, which is another name for the same argument; give one of them."
                )
            self._read_setting(target, setting, values)

    def _target(self, setting: Setting) -> str | None:
        """Return the argument that a setting is for, or `None` if it has no effect any more."""
        name = setting.name
        if name in REFUSED:
            raise UserError(f"{setting.where} {REFUSED[name]}.")
        if name in self._names:
            return self._names[name]
        if name not in IGNORED:
            near = difflib.get_close_matches(name, [*self._names, *IGNORED], n=1)
            hint = f"the nearest is {near[0]}" if near else "--help lists all"
            raise UserError(f"{setting.where}: there is no such argument, {hint}.")
        warn(f"{setting.where} {IGNORED[name]}.")
        return None

    def _read_setting(self, target: str, setting: Setting, values: argparse.Namespace) -> None:
        # A single value is joined to its flag by =, as argparse would take one that begins with a hyphen for a flag.
        joined = [f"--{target}={setting.values[0]}"] if len(setting.values) == 1 else [f"--{target}", *setting.values]
        try:
            rest = self.parse_known_args(joined, values)[1]
        except _Problem as problem:
            raise UserError(f"{setting.where}: {problem}; --help says what it takes.") from None
        if rest:
            raise UserError(f"{setting.where}: {' '.join(rest)} is one value too many.")


def names_of_fields(dataclass_types: Sequence[type]) -> dict[str, str]:
    """Map every name that a flag or a key may have to the flag that it stands for."""
    names = {}
    for field in [field for dataclass_type in dataclass_types for field in dataclasses.fields(dataclass_type)]:
        aliases = [alias.removeprefix("--") for alias in field.metadata.get("aliases", [])]
        names |= dict.fromkeys((field.name, *aliases), field.name)
        if field.default is True:  # for these transformers adds a flag --no_…
            names[f"no_{field.name}"] = f"no_{field.name}"
    return names


def _build(dataclass_type: type, values: dict[str, Any]) -> Any:
    names = [field.name for field in dataclasses.fields(dataclass_type) if field.init]
    try:
        return dataclass_type(**{name: values[name] for name in names})
    except UserError:
        raise
    except (ValueError, OSError, ImportError) as error:  # what transformers' own arguments raise on a user's mistake
        raise UserError(" ".join(str(error).split())) from error


def warn(message: str) -> None:
    """Log a warning once, not in every process of a run."""
    # By the launcher's variable, as arguments are parsed before the processes know of each other.
    if os.environ.get("RANK", "0") == "0":
        logger.warning(message)
