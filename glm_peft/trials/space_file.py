"""
Read the file of a space, with lines such as `num_virtual_tokens: [16, 64, 128]` for values to choose from, or
`learning_rate: {low: 1e-4, high: 1e-1, log: true}` for a range.
"""

import json
import math
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from glm_peft.arguments.command_line import Setting, read_config
from glm_peft.errors import UserError
from glm_peft.trials.space import Distribution, Parameter, Value, argument_kinds

_RANGE = ("low", "high", "log", "step")


def read_space(file: str) -> list[Parameter]:
    """
    Read the arguments to search, and their values.

    Raises:
        UserError: the file cannot be read, or a line is no list of values and no range.
    """
    settings = read_config(file)
    # Once more, as `read_config` leaves out what has no value, which in a space is a mistake.
    named = yaml.safe_load(Path(file).read_text(encoding="utf-8-sig")) or {}
    empty = sorted(map(str, set(named) - {setting.name for setting in settings}))
    if empty or not settings:
        what = f"{empty[0]} has no values" if empty else "there is nothing to search"
        raise UserError(f"{file}: {what}: write lines such as `num_virtual_tokens: [16, 64, 128]`.")
    return [Parameter(setting.name, setting.where, _read_distribution(setting)) for setting in settings]


def _read_distribution(setting: Setting) -> Distribution:
    name, words, where = setting.name, setting.values, setting.where
    if name not in argument_kinds():
        near = get_close_matches(name, argument_kinds(), n=1)
        hint = f"the nearest is {near[0]}" if near else "--help lists all"
        raise UserError(f"{where}: there is no such argument of training, {hint}.")
    if len(words) == 1 and words[0].startswith("{"):
        return _read_range(where, json.loads(words[0]), argument_kinds()[name])
    choices = [_read_value(word, argument_kinds()[name]) for word in words]
    # By `repr`, as 1, 1.0 and True are equal in a set.
    if not choices or len(set(map(repr, choices))) < len(choices):
        raise UserError(f"{where}: {', '.join(words) or 'nothing'} is no list of different values.")
    return CategoricalDistribution(choices)


def _read_value(word: str, kinds: set[type]) -> Value:
    """Return a word of the file in the argument's type; what does not fit is left to the parser of training."""
    if word in ("null", "~"):
        return None
    if bool in kinds and word.lower() in ("true", "false"):
        return word.lower() == "true"
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(word)
            except ValueError:
                continue
    return " ".join(map(str, json.loads(word))) if word.startswith("[") else word


def _read_range(where: str, given: Mapping[str, Any], kinds: set[type]) -> Distribution:
    unknown = [name for name in given if name not in _RANGE]
    if unknown or not {"low", "high"} <= given.keys():
        what = f"{unknown[0]} is not known" if unknown else "low or high is missing"
        raise UserError(f"{where}: {what}, a range is {{low: 1e-4, high: 1e-1}}, with log: true or a step if wanted.")
    if not kinds & {int, float}:
        raise UserError(f"{where}: a range is for numbers: give a list of values.")
    # An argument that may be both is a float: a range of integers would leave out what lies between.
    kind, make = (float, FloatDistribution) if float in kinds else (int, IntDistribution)
    numbers = {name: _read_number(f"{where}: {name}", given[name], kind) for name in given if name != "log"}
    log = given.get("log", False)
    if not isinstance(log, bool):
        raise UserError(f"{where}: log must be true or false, found {log}.")
    try:
        return make(**numbers, log=log)
    except ValueError as error:  # Optuna says what does not go together, with the values
        raise UserError(f"{where}: {str(error).replace('`', '').rstrip('.')}.") from error


def _read_number(where: str, value: Any, kind: type) -> float:
    try:
        number = kind(str(value))  # YAML takes 1e-4 for text
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{where} must be a {'whole ' if kind is int else ''}number, found {value}.")
    return number
