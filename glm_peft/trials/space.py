"""Describe the space of a search: which arguments of training take which values, and when each has an effect."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any, get_args, get_type_hints

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import BaseTrial, FixedTrial

from glm_peft.arguments.data import DataArguments
from glm_peft.arguments.fields import flags_with
from glm_peft.arguments.methods import METHODS, P_TUNING, PREFIX_TUNING
from glm_peft.arguments.model import ModelArguments, flags_of
from glm_peft.arguments.search import SWITCHES, Settings, is_searchable
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

    def describe(self) -> Any:
        """Return the values as JSON, which must be the same where a search is continued."""
        if isinstance(self.distribution, CategoricalDistribution):
            return list(self.distribution.choices)
        return {
            name: value for name, value in vars(self.distribution).items() if value is not None and value is not False
        }


@cache
def argument_kinds() -> dict[str, set[type]]:
    """Return the types that each argument of training may have."""
    from glm_peft.arguments.training import TrainingArguments

    types = (ModelArguments, DataArguments, TrainingArguments)
    hints = {name: hint for kind in types for name, hint in get_type_hints(kind).items()}
    return {name: set(get_args(hint)) or {hint} for name, hint in hints.items()}


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
            words = _as_words(parameter, parameter.suggest(trial))
            settings = {name: value for name, value in settings.items() if name != parameter.name}
            settings |= {} if words is None else {parameter.name: words}
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
        return not is_set("prefix_init", "text")
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
    for parameter in space:
        _check_name(parameter, fixed, metric)
    checked: dict[str, set[str]] = {parameter.name: set() for parameter in space}
    for parameter, values in _combinations(space):
        trial, value = FixedTrial(values), values[parameter.name]
        settings = draw_settings(space, fixed, trial)
        # Switches are checked beside each other, everything else once: a check takes some hundredths of a second.
        # By `repr`, as 1, 1.0 and True are equal in a set.
        is_new = parameter.name in SWITCHES or repr(value) not in checked[parameter.name]
        if parameter.name in trial.params and is_new:
            _check_value(parameter, value, settings, check)
            checked[parameter.name].add(repr(value))
    for parameter in space:
        if not checked[parameter.name]:
            raise UserError(f"{parameter.where} has no effect in any trial: leave it out, or search what it is for.")


def _combinations(space: Sequence[Parameter]) -> Iterator[tuple[Parameter, dict[str, Value]]]:
    """Yield each value of each parameter, beside all combinations of switches and the first values of the others."""
    switches = [parameter for parameter in space if parameter.name in SWITCHES]
    first = {parameter.name: parameter.samples[0] for parameter in space}
    for chosen in product(*(switch.samples for switch in switches)):
        beside = first | dict(zip((switch.name for switch in switches), chosen, strict=True))
        for parameter in space:
            for value in (beside[parameter.name],) if parameter in switches else parameter.samples:
                yield parameter, beside | {parameter.name: value}


def _check_value(parameter: Parameter, value: Value, settings: Settings, check: Callable[[Settings], object]) -> None:
    try:
        check(settings)
    except UserError as error:
        raise UserError(
            f"{parameter.where}: the value {_text(value)} cannot be tried, as training would stop with: {error}"
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


def _as_words(parameter: Parameter, value: Value) -> list[str] | None:
    """Return the words after the flag; `None` where the argument is not given."""
    if value is None:
        return None
    text = _text(value)
    return text.split() if list[str] in argument_kinds()[parameter.name] else [text]


def _text(value: Value) -> str:
    return json.dumps(value) if isinstance(value, bool) or value is None else str(value)
