"""
The file that says what to search, in lines such as `num_virtual_tokens: [16, 64, 128]` for values to choose from, or
`learning_rate: {low: 1e-4, high: 1e-1, log: true}` for a range.
"""

import json
import math
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from glm_peft.arguments.command_line import Setting, read_config
from glm_peft.errors import UserError
from glm_peft.trials.space import Parameter, Value, argument_kinds

_RANGE = {"low", "high", "log", "step"}


def read_space(file: str) -> list[Parameter]:
    """
    The arguments to search.

    Raises:
        UserError: the file cannot be read, or a line is no list of values and no range.
    """
    settings = read_config(file)
    empty = set(yaml.safe_load(Path(file).read_text(encoding="utf-8-sig")) or {}) - {each.name for each in settings}
    if empty or not settings:
        what = f"{sorted(map(str, empty))[0]} has no values" if empty else "there is nothing to search"
        raise UserError(f"{file}: {what}: write lines such as `num_virtual_tokens: [16, 64, 128]`.")
    kinds = argument_kinds()
    return [_read_parameter(setting, kinds) for setting in settings]


def _read_parameter(setting: Setting, kinds: Mapping[str, set[type]]) -> Parameter:
    name, words = setting.name, setting.values
    if name not in kinds:
        near = get_close_matches(name, kinds, n=1)
        hint = f"the nearest is {near[0]}" if near else "--help lists all"
        raise UserError(f"{setting.where}: there is no such argument of training, {hint}.")
    if len(words) == 1 and words[0].startswith("{"):
        return _read_range(setting, json.loads(words[0]), kinds[name])
    choices = tuple(_read_value(word, kinds[name]) for word in words)
    if not choices or len(set(map(repr, choices))) < len(choices):
        raise UserError(f"{setting.where}: {', '.join(words) or 'nothing'} is no list of different values.")
    return Parameter(name, setting.where, choices)


def _read_value(word: str, kinds: set[type]) -> Value:
    """A word of the file as the argument has it; what does not fit is left to the check by training's own parser."""
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


def _read_range(setting: Setting, given: Mapping[str, Any], kinds: set[type]) -> Parameter:
    where, unknown = setting.where, sorted(set(given) - _RANGE)
    if unknown or not {"low", "high"} <= set(given):
        what = f"{unknown[0]} is not known" if unknown else "low or high is missing"
        raise UserError(f"{where}: {what}, a range is {{low: 1e-4, high: 1e-1}}, with log: true or a step if wanted.")
    kind = next((each for each in (float, int) if each in kinds), None)
    if kind is None:
        raise UserError(f"{where}: a range is for numbers: give a list of values.")
    low, high, step = (_read_number(setting, name, given, kind) for name in ("low", "high", "step"))
    log = given.get("log", False)
    if not isinstance(log, bool):
        raise UserError(f"{where}: log must be true or false, found {log}.")
    if low >= high:
        raise UserError(f"{where}: low must be below high, found {low:g} and {high:g}.")
    if log and (low <= 0 or step is not None):
        raise UserError(
            f"{where}: with log: true low must be above 0 and there is no step, found low {low:g}"
            f"{'' if step is None else f' and step {step:g}'}."
        )
    if step is not None and step <= 0:
        raise UserError(f"{where}: step must be above 0, found {step:g}.")
    return Parameter(setting.name, where, kind=kind, low=low, high=high, log=log, step=step)


def _read_number(setting: Setting, name: str, given: Mapping[str, Any], kind: type) -> Any:
    value = given.get(name)
    if name == "step" and value is None:
        return None
    try:
        number = kind(str(value))  # YAML takes 1e-4 for text
    except ValueError:
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        what = "a whole number" if kind is int else "a number"
        raise UserError(f"{setting.where}: {name} must be {what}, found {value}.")
    return number
