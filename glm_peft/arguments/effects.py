"""Find settings that others take the effect from: a flag wins over a file or is refused, and the rest is told."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from glm_peft.arguments.fields import facts_of
from glm_peft.arguments.settings import Setting
from glm_peft.errors import UserError

_OFF = (None, False, "", "no", "none", "false", 0, -1)  # -1: transformers' default of `max_steps`


@dataclass(frozen=True)
class _Need:
    """What another flag must be for one to have an effect, or must not be; see `needs` of `fields.option`."""

    name: str
    pattern: str
    is_negative: bool

    @classmethod
    def read(cls, text: str) -> "_Need":
        before, name, between, pattern = re.fullmatch(r"(!?)(\w+)(?:(!?=)(.+))?", text).groups(default="")
        return cls(name, pattern, "!" in before + between)

    def is_met(self, value: Any) -> bool:
        text = " ".join(value) if isinstance(value, list) else str(getattr(value, "value", value))
        holds = re.fullmatch(self.pattern, text) if self.pattern else not _is_off(value)
        return bool(holds) != self.is_negative

    def __str__(self) -> str:
        return f"--{self.name} {self.pattern.replace('|', ' or ')}".rstrip()


def find_outdone(
    from_file: Sequence[Setting], from_flags: Sequence[Setting], names: Mapping[str, str], kinds: Sequence[type]
) -> list[tuple[Setting, Setting]]:
    """
    Return the settings of a file that flags of the command line take the place of, each with that flag.

    Args:
        names: the argument that each name stands for.
        kinds: the argument dataclasses.
    """
    typed = {names.get(flag.name) for flag in from_flags}
    pairs = []
    for flag in from_flags:
        fact = "ends" if "".join(flag.values).lower() in _OFF and flag.values else "outdoes"
        outdone = set(_merge(kinds, fact).get(names.get(flag.name, ""), ())) - typed
        pairs += [(setting, flag) for setting in from_file if names.get(setting.name) in outdone]
    return pairs


def find_without_effect(
    kinds: Sequence[type],
    values: Mapping[str, Any],
    in_file: Mapping[str, Setting],
    in_flags: Mapping[str, Setting],
) -> Iterator[str]:
    """
    Yield a sentence on each setting that has no effect beside the others.

    Args:
        kinds: the argument dataclasses.
        values: of all arguments.
        in_file: the settings of the file by argument.
        in_flags: those of the command line.

    Raises:
        UserError: the file takes the effect from a flag of the command line.
    """
    for name, stated in _merge(kinds, "needs").items():
        setting = in_flags.get(name) or in_file.get(name)
        # Those of the other commands that share the flag cannot be met in this one.
        needs = [need for need in map(_Need.read, stated) if need.name in values]
        if not setting or _is_off(values[name]) or (stated and not needs):
            continue
        if any(need.is_met(values[need.name]) for need in needs):
            continue
        blamed = next((in_file[need.name] for need in needs if need.name in in_file.keys() - in_flags.keys()), None)
        needed = " or ".join(map(str, needs))
        if blamed and name in in_flags:
            only = "" if needs[0].is_negative else f", only with {needed}"
            raise UserError(
                f"{setting.text} has no effect beside {blamed.text}{only}: change one of the two, or leave one out."
            )
        # What the command line switches off takes its companions in the file with it, as it should.
        if name in in_flags or not any(need.name in in_flags for need in needs):
            without = "beside" if needs and needs[0].is_negative else "without"
            yield f"{setting.text} has no effect {f'{without} {needed}' if needs else 'here'}."


@contextmanager
def naming_places(places: Mapping[str, str]) -> Iterator[None]:
    """
    Say behind each `UserError` inside where in the configuration file the flags stand that it names.

    Args:
        places: file and line of the settings by the names of their flags.
    """
    try:
        yield
    except UserError as error:
        message = str(error)
        named = [where for name, where in places.items() if re.search(rf"--{name}\b", message)]
        if not named or named[0] in message:  # in none, or a caller has named them
            raise
        raise UserError(f"{message.removesuffix('.')} ({'; '.join(named)}).") from error


def _merge(kinds: Sequence[type], fact: str) -> dict[str, Any]:
    return {name: stated for kind in kinds for name, stated in facts_of(kind, fact).items()}


def _is_off(value: Any) -> bool:
    return not isinstance(value, list) and value in _OFF
