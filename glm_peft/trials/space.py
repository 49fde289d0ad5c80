"""
The space of a search: which arguments of training are tried with which values, and when each has an effect.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from itertools import product
from typing import Any, get_args, get_type_hints

from glm_peft.arguments.data import DataArguments
from glm_peft.arguments.fields import flags_with
from glm_peft.arguments.methods import METHODS, P_TUNING, PREFIX_TUNING
from glm_peft.arguments.model import ModelArguments, flags_of
from glm_peft.arguments.search import Settings
from glm_peft.errors import UserError

Value = bool | int | float | str | None

_LAST = 9
SWITCHES = ("peft_type", "prefix_init", "prefix_projection")  # they decide which others have an effect
_OF_METHODS = set(flags_with(ModelArguments, "methods"))
_OF_ROWS = {"source_prefix", "max_source_length", "max_target_length", "packing", "max_length", "train_on"}
_OF_THE_SEARCH = {"output_dir", "seed", "predict_with_generate", "load_best_model_at_end", "metric_for_best_model"}
_OF_THE_SEARCH |= {"greater_is_better", "resume_from_checkpoint", "use_cpu", "disable_tqdm", "run_name"}
_OF_THE_SEARCH_BEGIN = ("do_", "eval_", "save_", "push_", "hub_", "report_", "log_", "logging_")


@dataclass(frozen=True)
class Parameter:
    """
    An argument that is searched.

    Either `choices` are given, or `low` and `high`, with `log` (evenly over powers) or `step`; `kind` is int or float.
    """

    name: str
    where: str
    choices: tuple[Value, ...] = ()
    kind: type = float
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    step: float | None = None

    def suggest(self, trial: Any) -> Value:
        """The value that an Optuna trial is to have."""
        if self.choices:
            return trial.suggest_categorical(self.name, self.choices)
        if self.kind is int:
            return trial.suggest_int(self.name, self.low, self.high, step=self.step or 1, log=self.log)
        return trial.suggest_float(self.name, self.low, self.high, step=self.step, log=self.log)

    @property
    def samples(self) -> tuple[Value, ...]:
        """The choices, or the ends of the range."""
        return self.choices or (self.low, self.high)

    def describe(self) -> Any:
        """What another run of the same search must have too, as JSON has it."""
        if self.choices:
            return list(self.choices)
        found = {"low": self.low, "high": self.high, "log": self.log or None, "step": self.step}
        return {name: value for name, value in found.items() if value is not None}


@cache
def argument_kinds() -> dict[str, set[type]]:
    """The types that each argument of training may have."""
    from glm_peft.arguments.training import TrainingArguments

    hints = {
        name: hint
        for kind in (ModelArguments, DataArguments, TrainingArguments)
        for name, hint in get_type_hints(kind).items()
    }
    return {name: set(get_args(hint)) or {hint} for name, hint in hints.items()}


def draw_settings(space: Sequence[Parameter], fixed: Settings, choose: Callable[[Parameter], Value]) -> Settings:
    """
    The settings of a trial: the fixed ones, with the values that are chosen in their place.

    What has no effect beside the values chosen before, such as `prefix_init_text` without `prefix_init: text`, is not
    chosen; where a switch such as `prefix_init` is searched, it is also taken out of the fixed ones.
    """
    settings = dict(fixed)
    for parameter in sorted(space, key=lambda each: SWITCHES.index(each.name) if each.name in SWITCHES else _LAST):
        if has_effect(parameter.name, settings):
            words = _as_words(parameter, choose(parameter))
            settings = {name: value for name, value in settings.items() if name != parameter.name}
            settings |= {} if words is None else {parameter.name: words}
    if any(parameter.name in SWITCHES for parameter in space):
        settings = {name: words for name, words in settings.items() if has_effect(name, settings)}
    return settings


def has_effect(name: str, settings: Mapping[str, Sequence[str]]) -> bool:
    """Whether an argument changes training beside these settings."""

    def is_set(other: str, value: str) -> bool:
        return [word.lower() for word in settings.get(other, ())] == [value]

    method = settings.get("peft_type", [PREFIX_TUNING])[0]
    if name in _OF_METHODS and method in METHODS and name not in flags_of(method):
        return False  # a method that does not exist is refused by training's own parser
    if name == "encoder_hidden_size":
        return method == P_TUNING or is_set("prefix_projection", "true")
    if name == "prefix_projection":
        return not is_set("prefix_init", "text")
    needed = {"prefix_init_text": "text", "prefix_init_std": "normal"}
    return name not in needed or is_set("prefix_init", needed[name])


def check_space(space: Sequence[Parameter], fixed: Settings, metric: str, check: Callable[[Settings], None]) -> None:
    """
    Try every value in thought.

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
    tried: dict[str, set[Value]] = {parameter.name: set() for parameter in space}
    switches = [parameter for parameter in space if parameter.name in SWITCHES]
    for values in product(*(switch.samples for switch in switches)):
        context = dict(zip((switch.name for switch in switches), values, strict=True))
        for parameter in space:
            left = set(parameter.samples) - tried[parameter.name]
            for value in (context[parameter.name],) if parameter in switches else left:
                if _try_value(parameter, value, (space, fixed, context), check):
                    tried[parameter.name].add(value)
    for parameter in space:
        if not tried[parameter.name]:
            raise UserError(f"{parameter.where} has no effect in any trial: leave it out, or search what it is for.")


def _try_value(
    parameter: Parameter,
    value: Value,
    place: tuple[Sequence[Parameter], Settings, Mapping[str, Value]],
    check: Callable[[Settings], None],
) -> bool:
    """Whether the value would be chosen beside the first ones of the other arguments; a `UserError` if refused."""
    space, fixed, context = place
    values = {each.name: each.samples[0] for each in space} | dict(context) | {parameter.name: value}
    chosen: set[str] = set()

    def choose(each: Parameter) -> Value:
        chosen.add(each.name)
        return values[each.name]

    settings = draw_settings(space, fixed, choose)
    if parameter.name in chosen:
        try:
            check(settings)
        except UserError as error:
            raise UserError(
                f"{parameter.where}: the value {_text(value)} cannot be tried, as training would stop with: {error}"
            ) from error
    return parameter.name in chosen


def _check_name(parameter: Parameter, fixed: Settings, metric: str) -> None:
    name = parameter.name
    foreign = {field.name for field in fields(ModelArguments)} - _OF_METHODS - {"peft_type"}
    foreign |= {field.name for field in fields(DataArguments)} - _OF_ROWS
    if name in foreign | _OF_THE_SEARCH or name.startswith(_OF_THE_SEARCH_BEGIN):
        raise UserError(
            f"{parameter.where} cannot be searched, as all trials have the same base, rows, seed and evaluations: set "
            "it in the configuration or as a flag."
        )
    if name == "label_smoothing_factor" and metric == "loss":
        raise UserError(
            f"{parameter.where} changes the loss that trials are compared by: give --metric with a score, or leave it "
            "out."
        )
    if name == "max_target_length" and "val_max_target_length" not in fixed:
        raise UserError(
            f"{parameter.where} would cut the answers that trials are compared on, too: give "
            "--val_max_target_length, which is the same in all of them."
        )


def _as_words(parameter: Parameter, value: Value) -> list[str] | None:
    """The words after the flag; `None`: the argument is not given."""
    if value is None:
        return None
    text = _text(value)
    return text.split() if list[str] in argument_kinds()[parameter.name] else [text]


def _text(value: Value) -> str:
    return json.dumps(value) if isinstance(value, bool) or value is None else str(value)
