"""Parse `[CONFIG.yaml|CONFIG.json] [--flags]` into argument dataclasses; the flags win over the file."""

import argparse
import copy
import dataclasses
import difflib
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from glm_peft.arguments.effects import find_outdone, find_without_effect, naming_places
from glm_peft.arguments.fields import flags_with
from glm_peft.arguments.former_options import IGNORED, REFUSED, RENAMED
from glm_peft.arguments.settings import Setting, check_order, read_sources
from glm_peft.arguments.transformers_source import load_argument_parser
from glm_peft.errors import UserError

_argparser = load_argument_parser()
HfArgumentParser, string_to_bool = _argparser.HfArgumentParser, _argparser.string_to_bool

logger = logging.getLogger(__name__)

HELP_FLAGS = {"-h", "--help", "--help_all"}
_OF_ARGPARSE = ("help", "aliases", "nargs", "const")  # of a field's metadata: what argparse understands


def parse_command(
    argv: Sequence[str],
    dataclass_types: Sequence[type],
    renamed: Mapping[str, str] = RENAMED,
    refused: Mapping[str, str] = REFUSED,
    **parser_options: Any,
) -> tuple[Any, ...]:
    """
    Build the dataclasses that a command line describes, a configuration file at its beginning; `--help` exits.

    Every name may be written with underscores or hyphens. Names of older releases are handled as
    `glm_peft.arguments.former_options` says. Each dataclass has an attribute `given` with the values that are not the
    defaults, and `places`, which says of those of the file where they stand.

    Args:
        argv: the words after the script's name.
        dataclass_types: what to build; a field's metadata may hold `help` and, as `aliases`, other flags for it.
        renamed: other names for fields of these dataclasses.
        refused: what is said of names that are refused, behind the name.
        parser_options: keyword arguments of `argparse.ArgumentParser`, such as `usage`.

    Raises:
        UserError: the file cannot be read, a name is unknown or refused, a value does not fit, the file takes the
            effect from a flag, or the dataclasses refuse the values.
    """
    parser = _Parser(dataclass_types, renamed, refused, **parser_options)
    if HELP_FLAGS & set(argv):  # before a wrong word beside it can end the run
        parser.parse_args(["--help"])
    from_file, from_flags = read_sources(argv)
    outdone = find_outdone(from_file, from_flags, parser.names, dataclass_types)
    for setting, flag in outdone:
        warn(f"{setting.text} is given up for {flag.text}.")
        from_file.remove(setting)
    values = parser.parse_known_args([])[0]  # the defaults, over which each source writes
    defaults = dict(vars(values))
    in_file, in_flags = [parser.read_settings(settings, values) for settings in (from_file, from_flags)]
    # Noted before the dataclasses fill in what was not given.
    given = {name: value for name, value in vars(values).items() if value != defaults[name]}
    places = {name: setting.where for name, setting in in_file.items() if name not in in_flags}
    with naming_places(places):
        built = tuple(_build(dataclass_type, vars(values)) for dataclass_type in dataclass_types)
    decided = {parser.names[setting.name]: flag for setting, flag in outdone} | in_flags
    for message in find_without_effect(dataclass_types, vars(values), in_file, decided):
        warn(message)
    for arguments in built:
        own = {name: given[name] for name in vars(arguments) if name in given}
        object.__setattr__(arguments, "given", own)  # most of these dataclasses are frozen
        object.__setattr__(arguments, "places", places)
    return built


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
        shown = super()._get_help_string(action) if has_default else action.help
        return shown and shown.replace("None: ", "Not given: ")  # who types flags need not know Python's word


class _Problem(Exception):
    """A value that argparse refuses, with its reason."""


class _Parser(HfArgumentParser):
    """A parser that reads settings one by one, so that each error names the place of its argument."""

    def __init__(
        self, dataclass_types: Sequence[type], renamed: Mapping[str, str], refused: Mapping[str, str], **options: Any
    ) -> None:
        # No abbreviations: a new flag would make one that a recipe uses ambiguous.
        super().__init__(dataclass_types, allow_abbrev=False, formatter_class=_HelpFormatter, **options)
        self.refused, names = refused, names_of_fields(dataclass_types)
        self.names = names | {old: new for old, new in renamed.items() if new in names}
        self.joined = {name for kind in dataclass_types for name in flags_with(kind, "joined")}
        self.lists = {action.dest for action in self._actions if action.nargs == "+"}
        for action in self._actions:
            if action.type is string_to_bool and action.nargs is None:
                action.nargs, action.const = "?", True  # --flag alone is true; transformers forgets `bool | None`
            if action.dest in {**refused, **renamed}:
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

    def read_settings(self, settings: Iterable[Setting], values: argparse.Namespace) -> dict[str, Setting]:
        """Write the settings of a source into `values`, over those of an earlier one; return them by argument."""
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
            if other is not setting and target in self.lists:  # given once more: no value is lost
                setting = dataclasses.replace(setting, values=[*other.values, *setting.values])
            self._read_setting(target, setting, values)
            by_target[target] = setting
        return by_target

    def _target(self, setting: Setting) -> str | None:
        """Return the argument that a setting is for, or `None` if it has no effect any more."""
        name = setting.name
        if name in self.refused:
            raise UserError(f"{setting.where} {self.refused[name]}.")
        if name in self.names:
            return self.names[name]
        if name not in IGNORED:
            near = difflib.get_close_matches(name, [*self.names, *IGNORED], n=1)
            hint = f"the nearest is {near[0]}" if near else "--help lists all"
            raise UserError(f"{setting.where}: there is no such argument, {hint}.")
        warn(f"{setting.where} {IGNORED[name]}.")
        return None

    def _read_setting(self, target: str, setting: Setting, values: argparse.Namespace) -> None:
        if target in self.joined and len(setting.values) > 1:
            check_order(setting)
            setting = dataclasses.replace(setting, values=[",".join(setting.values)])
        # A single value is joined to its flag by =, as argparse would take one that begins with a hyphen for a flag.
        joined = [f"--{target}={setting.values[0]}"] if len(setting.values) == 1 else [f"--{target}", *setting.values]
        try:
            rest = self.parse_known_args(joined, values)[1]
        except _Problem as problem:
            check_order(setting)
            raise UserError(f"{setting.where}: {problem}; --help says what it takes.") from None
        if len(setting.values) > 1:
            check_order(setting)
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
