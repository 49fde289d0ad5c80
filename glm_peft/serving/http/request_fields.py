"""Read the fields that chats and completions share: honoured, without effect here and so accepted, or refused."""

import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from glm_peft.prediction.generation_settings import GenerationSettings
from glm_peft.preprocessing.records import describe_value, quoted
from glm_peft.serving.http.faults import RequestError

MOST_STOPS = 4  # strings, as of OpenAI
_COLDEST = 1e-3  # at lower temperatures an answer is the greedy one, and numbers overflow
_HOTTEST = 100
_LARGEST = 2**31 - 1
_LONG = 2**63  # seeds are of 64 bits
_SAMPLING = ("temperature", "top_p", "top_k")
HONOURED = ("model", "max_tokens", "seed", "stop", "stream", "stream_options", "generation_config", *_SAMPLING)
HARMLESS = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
"""Fields that have no say in an answer."""
_RENAMED = {"prompt": "messages", "history": "messages", "max_length": "max_tokens"}  # of the published api.py
NEUTRAL = {
    "n": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
}
"""Fields that may only have values that change nothing."""
# Of the generation config that `transformers chat` sends; the tokens that end an answer are those of the generation.
_OF_CONFIG = ("max_new_tokens", "do_sample", *_SAMPLING)
_IGNORED_OF_CONFIG = ("transformers_version", "_from_model_config", "use_cache", "cache_implementation")
_IGNORED_OF_CONFIG += ("bos_token_id", "eos_token_id", "pad_token_id", "max_length")


@dataclass(frozen=True)
class Asked:
    """
    What a request asks for beside its prompt.

    Args:
        name: who is to answer: `base`, or an adapter.
        settings: of this request alone.
        stop: strings before which the answer ends.
        stream: whether the answer is sent while it is generated.
        include_usage: whether the numbers of tokens follow a streamed answer in a chunk of their own.
    """

    name: str
    settings: GenerationSettings
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool


def parse_object(raw: bytes) -> dict[str, Any]:
    """
    Parse the body of a request.

    Raises:
        RequestError: it is no JSON object.
    """
    try:
        body = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
        json.dumps(body, ensure_ascii=False).encode()  # JSON can spell half of a character, which has no encoding
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
        place = f" at line {error.lineno}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise RequestError(400, f"The body of the request is not valid JSON ({reason}{place}): correct it.") from None
    if not isinstance(body, dict):
        found = describe_value(body)
        raise RequestError(400, f"The body of the request must be a JSON object, found {found}.")
    return body


def _refuse_constant(name: str) -> None:
    raise json.JSONDecodeError(f"{name} is no number of JSON", "", 0)


def read_asked(
    body: Mapping[str, Any],
    names: Iterable[str],
    defaults: GenerationSettings,
    seed: int | None,
    neutral: Mapping[str, tuple[Any, ...]],
    own: Iterable[str],
) -> Asked:
    """
    Read and check the fields of a request that are not its prompt.

    Args:
        names: who can answer.
        defaults: the settings where the request says nothing.
        seed: of the draws where the request gives none; `None` for another one each time.
        neutral: the values that change nothing, of each field that may only have such.
        own: the fields that only this kind of request has.

    Raises:
        RequestError: a field is unknown, is not supported, or has a wrong value.
        UserError: a number is out of its range.
    """
    given = {name: value for name, value in body.items() if value is not None}
    for name, value in given.items():
        if name in neutral and value not in neutral[name]:
            allowed = " or ".join(json.dumps(one) for one in neutral[name])
            refuse(name, f"may only be {allowed} here" if allowed else "is not supported here", value)
        if name not in (*neutral, *own, *HONOURED, *HARMLESS):
            new = _RENAMED.get(name)
            advice = f"give {new} in its place" if new in (*own, *HONOURED) else "leave it out"
            raise RequestError(400, f"{name} is no field that is supported here: {advice}.", name)
    stream = _flag(given, "stream")
    options = given.get("stream_options", {})
    if not isinstance(options, dict) or not options.keys() <= {"include_usage", "include_obfuscation"}:
        refuse("stream_options", "takes include_usage alone", options)
    name, stop = _read_model(given, names), _read_stop(given)
    return Asked(name, _read_settings(given, defaults, seed), stop, stream, _flag(options, "include_usage"))


def refuse(name: str, rule: str, found: Any) -> None:
    """Raise a `RequestError` about a field."""
    raise RequestError(400, f"{name} {rule}, found {describe_value(found)}.", name)


def _flag(values: Mapping[str, Any], name: str, default: bool = False) -> bool:
    value = values.get(name)
    if value is not None and not isinstance(value, bool):
        refuse(name, "must be true or false", value)
    return default if value is None else value


def _number(values: Mapping[str, Any], name: str, low: float, high: float, kind: type = int) -> Any:
    """Return a number from `low` to `high`, `None` where there is none."""
    value = values.get(name)
    if value is None:
        return None
    kinds = (int,) if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        number = "a whole number" if kind is int else "a number"
        refuse(name, f"must be {number} from {low}" + (f" to {high}" if high < _LARGEST else ""), value)
    return kind(value)


def find_model(name: Any, names: Iterable[str], param: str = "model") -> str:
    """
    Return the name of a model that is here.

    Raises:
        RequestError: it is not; the sentence says which are.
    """
    if not isinstance(name, str):
        refuse(param, f"must name one of {quoted(names)}", name)
    if name not in names:
        message = f"There is no model {name[:80]!r} here; choose one of {quoted(names)}."
        raise RequestError(404, message, param, "model_not_found")
    return name


def _read_model(given: Mapping[str, Any], names: Iterable[str]) -> str:
    if "model" not in given:
        raise RequestError(400, f"model is not given: choose one of {quoted(names)}.", "model")
    return find_model(given["model"], names)


def _read_stop(given: Mapping[str, Any]) -> tuple[str, ...]:
    stop = given.get("stop", [])
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(isinstance(s, str) and s for s in stops):
        refuse("stop", f"must be a text or a list of at most {MOST_STOPS} texts, none of them empty", stop)
    return tuple(stops)


def _read_settings(given: Mapping[str, Any], defaults: GenerationSettings, seed: int | None) -> GenerationSettings:
    given = {**_read_config(given.get("generation_config")), **given}
    longest = [_number(given, name, 1, _LARGEST) for name in ("max_completion_tokens", "max_tokens", "max_new_tokens")]
    temperature = _number(given, "temperature", 0, _HOTTEST, float)
    # Who gives a field of sampling wants it, unless it says that nothing is to be drawn.
    is_drawn = any(name in given for name in _SAMPLING) or defaults.do_sample
    is_drawn = _flag(given, "do_sample", is_drawn)
    if temperature is not None and temperature < _COLDEST:
        is_drawn, temperature = False, None
    values = {
        "seed": next((one for one in (_number(given, "seed", -_LONG, _LONG - 1), seed) if one is not None), None),
        "max_new_tokens": next((number for number in longest if number), None),
        "temperature": temperature,
        "top_p": _number(given, "top_p", 0, 1, float),
        "top_k": _number(given, "top_k", 0, _LARGEST),
    }
    values = {"seed": random.getrandbits(31)} | {name: value for name, value in values.items() if value is not None}
    return replace(defaults, do_sample=is_drawn, **values)


def _read_config(config: Any) -> dict[str, Any]:
    """Read the generation config that `transformers chat` sends, a JSON object in a text."""
    if config is None:
        return {}
    values = parse_object(config.encode()) if isinstance(config, str) else config
    if not isinstance(values, dict):
        refuse("generation_config", "must be a JSON object, or the text of one", config)
    values = {name: value for name, value in values.items() if value is not None and name not in _IGNORED_OF_CONFIG}
    unknown = [name for name in values if name not in _OF_CONFIG]
    if unknown:
        refuse("generation_config", f"may hold {', '.join(_OF_CONFIG)}", unknown)
    return values
