"""
Read the space of a search, and draw settings of training from it.

The file has lines such as `num_virtual_tokens: [16, 64, 128]` for values to choose from, or
`learning_rate: {low: 1e-4, high: 1e-1, log: true}` for a range.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import BaseTrial, FixedTrial

from glm_peft.arguments.data import DataArguments
from glm_peft.arguments.fields import flags_with
from glm_peft.arguments.methods import METHODS, P_TUNING, PREFIX_TUNING
from glm_peft.arguments.model import SETTING_STARTS, ModelArguments, flags_of
from glm_peft.arguments.search import SWITCHES, Settings, as_words, is_searchable
from glm_peft.arguments.settings import Setting, read_config
from glm_peft.errors import UserError

Value = bool | int | float | str | None
Distribution = CategoricalDistribution | FloatDistribution | IntDistribution


@dataclass(frozen=True)
class Parameter:
    """
    An argument that is searched.

    Args:
        name: of its flag.
        where: file and line, for errors.
        distribution: the values that are tried.
    """

    name: str
    where: str
    distribution: Distribution

    def suggest(self, trial: BaseTrial) -> Value:
        """Return the value that an Optuna trial is to have."""
        values = self.distribution
        if isinstance(values, CategoricalDistribution):
            return trial.suggest_categorical(self.name, values.choices)
        suggest = trial.suggest_int if isinstance(values, IntDistribution) else trial.suggest_float
        return suggest(self.name, values.low, values.high, step=values.step, log=values.log)

    @property
    def samples(self) -> tuple[Value, ...]:
        """Return the choices, or the ends of the range."""
        values = self.distribution
        return values.choices if isinstance(values, CategoricalDistribution) else (values.low, values.high)


def read_space(file: str) -> list[Parameter]:
    """
    Read the arguments to search, and their values.

    Raises:
        UserError: the file cannot be read, or a line is no list of values and no range.
    """
    settings = read_config(file)
    # Once more, as `read_config` leaves out what has no value, which in a space is a mistake.
    named = yaml.safe_load(Path(file).read_text(encoding="utf-8-sig")) or {}
    empty = [name for name, values in named.items() if values is None]
    if empty or not settings:
        what = f"{empty[0]} has no values" if empty else "there is nothing to search"
        raise UserError(f"{file}: {what}: write lines such as `num_virtual_tokens: [16, 64, 128]`.")
    return [Parameter(setting.name, setting.where, _read_distribution(setting)) for setting in settings]


def _read_distribution(setting: Setting) -> Distribution:
    words, kinds = setting.values, _kinds_of(setting.name)
    try:
        if len(words) == 1 and words[0].startswith("{"):
            return _read_range(json.loads(words[0]), kinds)
        return CategoricalDistribution([_read_value(word, kinds) for word in words])
    except (TypeError, ValueError) as error:  # Python and Optuna say what does not go together, with the values
        raise UserError(
            f"{setting.where} is neither a list of values nor a range such as {{low: 1e-4, high: 1e-1, log: true}}: "
            f"{str(error).rstrip('.')}."
        ) from error


def _read_range(given: dict[str, Any], kinds: set[type]) -> Distribution:
    # An argument that may be both is a float: a range of integers would leave out what lies between.
    kind, make = (float, FloatDistribution) if float in kinds else (int, IntDistribution)
    # By way of text, as YAML takes 1e-4 for one.
    return make(**{name: value if name == "log" else kind(str(value)) for name, value in given.items()})


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


def draw_settings(space: Sequence[Parameter], fixed: Settings, trial: BaseTrial) -> Settings:
    """
    Return the settings of a trial: the fixed ones, with the values that the trial suggests in their place.

    What has no effect beside the values drawn before, such as `prefix_init_text` without `prefix_init: text`, is not
    drawn; where a switch such as `prefix_init` is searched, it is also taken out of the fixed ones.
    """
    settings = dict(fixed)
    # The switches first, as they decide what else is drawn; `sorted` leaves all others in the order of the file.
    for parameter in sorted(space, key=lambda each: (*SWITCHES, each.name).index(each.name)):
        if has_effect(parameter.name, settings):
            value = parameter.suggest(trial)
            settings.pop(parameter.name, None)
            # A choice that is a list is one text with spaces for Optuna.
            has_list = list[str] in _kinds_of(parameter.name) and value is not None
            settings |= {} if value is None else {parameter.name: as_words(value.split() if has_list else value)}
    if any(parameter.name in SWITCHES for parameter in space):
        settings = {name: words for name, words in settings.items() if has_effect(name, settings)}
    return settings


def has_effect(name: str, settings: Mapping[str, Sequence[str]]) -> bool:
    """Return whether an argument changes training beside these settings."""

    def is_set(other: str, value: str) -> bool:
        return [word.lower() for word in settings.get(other, ())] == [value]

    method = settings.get("peft_type", [PREFIX_TUNING])[0]
    if method in METHODS and name in flags_with(ModelArguments, "methods") and name not in flags_of(method):
        return False  # a method that does not exist is refused by training's own parser
    if name == "encoder_hidden_size":
        return method == P_TUNING or is_set("prefix_projection", "true")
    # A prefix from a text is the keys and values of that text: there is nothing to project.
    if name == "prefix_projection":
        return not any(is_set("prefix_init", start) for start in SETTING_STARTS)
    needed = {"prefix_init_text": "text", "prefix_init_std": "normal"}
    return name not in needed or is_set("prefix_init", needed[name])


def check_space(space: Sequence[Parameter], fixed: Settings, metric: str, check: Callable[[Settings], object]) -> None:
    """
    Refuse, before weights are loaded, a space with a value that training would refuse.

    Args:
        fixed: the settings of training that all trials share.
        metric: by which trials are compared.
        check: raises a `UserError` where training would refuse the settings.

    Raises:
        UserError: an argument is none of training's, belongs to what all trials share, or never has an effect; or a
            value is refused.
    """
    first = {parameter.name: parameter.samples[0] for parameter in space}
    switches = {parameter.name: parameter.samples for parameter in space if parameter.name in SWITCHES}
    combinations = [dict(zip(switches, values, strict=True)) for values in product(*switches.values())]
    checked: list[Settings] = []  # a check takes some hundredths of a second
    for parameter in space:
        _check_name(parameter, fixed, metric)
        for value in parameter.samples:
            trials = [FixedTrial(first | switched | {parameter.name: value}) for switched in combinations]
            drawn = [(draw_settings(space, fixed, trial), trial) for trial in trials]
            tried = [settings for settings, trial in drawn if parameter.name in trial.params]
            if not tried:
                raise UserError(
                    f"{parameter.where} has no effect in any trial: leave it out, or search what it is for."
                )
            # Switches are checked beside each other, and every other value once.
            for settings in tried if parameter.name in SWITCHES else tried[:1]:
                if settings not in checked:
                    _check_value(parameter, value, settings, check)
                    checked.append(settings)


def _check_value(parameter: Parameter, value: Value, settings: Settings, check: Callable[[Settings], object]) -> None:
    try:
        check(settings)
    except UserError as error:
        raise UserError(
            f"{parameter.where}: the value {value} cannot be tried, as training would stop with: {error}"
        ) from error


def _check_name(parameter: Parameter, fixed: Settings, metric: str) -> None:
    if not is_searchable(parameter.name):
        raise UserError(
            f"{parameter.where} cannot be searched, as all trials have the same base, rows, seed and evaluations: set "
            "it in the configuration or as a flag."
        )
    if parameter.name == "label_smoothing_factor" and metric == "loss":
        raise UserError(
            f"{parameter.where} changes the loss that trials are compared by: give --metric with a score, or leave it "
            "out."
        )
    if parameter.name == "max_target_length" and "val_max_target_length" not in fixed:
        raise UserError(
            f"{parameter.where} would cut the answers that trials are compared on, too: give "
            "--val_max_target_length, which is the same in all of them."
        )


def _kinds_of(name: str) -> set[type]:
    """Return the types that an argument of training may have; none where there is no such argument."""
    hint = _hints().get(name)
    return set(get_args(hint)) or {hint}


@cache
def _hints() -> dict[str, Any]:
    from glm_peft.arguments.training import TrainingArguments

    types = (ModelArguments, DataArguments, TrainingArguments)
    return {name: hint for kind in types for name, hint in get_type_hints(kind).items()}
