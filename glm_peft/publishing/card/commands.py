"""Write the commands of a model card, which must run as they stand there, and the values in its Python code."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from glm_peft.hub.rights import is_hub_id
from glm_peft.preprocessing.messages import Message
from glm_peft.preprocessing.prompt_shape import with_source_prefix, with_system
from glm_peft.publishing.card.values import part, read_prompt, text_of

_OUTPUT_DIR = "output/repeated"
_LONGEST_QUESTION = 200  # characters
_GREETING = "你好"
_PREDICT = "python -m glm_peft.predict"
# Whichever comes first limited the answers in the run, as in `GenerationSettings`.
_LENGTHS = ("max_new_tokens", "val_max_target_length", "max_target_length")


@dataclass(frozen=True)
class Commands:
    """
    The commands of a card and the values of its Python code.

    Args:
        adapter: id or placeholder of the adapter, or of the model where there is no adapter.
        base: id or placeholder of the base.
        messages: what the code asks: the conversation of the first prediction, where its question fits a line.
        source_prefix: the text that stands before every question.
        chat_format: the format of the prompts; `None` where it is not recorded.
        given_chat_format: the value of `--chat_format`, which the tokenizer's files do not say.
        predict: the command that answers the question.
        train: the command that repeats the run; `None` where nothing is recorded of it.
    """

    adapter: str
    base: str
    messages: list[Message]
    source_prefix: str | None
    max_new_tokens: int
    chat_format: str | None
    given_chat_format: str | None
    quantization_bit: int | None
    predict: str
    train: str | None

    def asked(self, messages: list[Message]) -> list[Message]:
        """Return a conversation of the predictions as the model was asked it."""
        return with_source_prefix(messages, self.source_prefix)


def write_commands(
    record: Mapping[str, Any],
    base: str,
    adapter_id: str | None,
    is_full: bool,
    predictions: list[dict[str, Any]],
) -> Commands:
    """
    Write the commands for an adapter, or for a fully fine-tuned model.

    Args:
        base: the Hub id of the base, or the name of its folder.
        adapter_id: the adapter's id on the Hub; `None` for a placeholder.
        predictions: the generated answers with their conversations, of which the code asks the first one.
    """
    flags, recipe = part(record, "flags"), part(record, "recipe")
    given = {**recipe, **flags}
    adapter = adapter_id or f"path/to/{'model' if is_full else 'adapter'}"
    base = base if is_hub_id(base) else f"path/to/{base or 'base'}"
    prompt = read_prompt(record)
    messages = _choose_messages(predictions, prompt.get("system_text"))
    length = next((given[name] for name in _LENGTHS if isinstance(given.get(name), int)), 128)
    model = {"model_name_or_path": adapter if is_full else base}
    model |= {} if is_full else {"adapter_name_or_path": adapter}
    needed = {name: given.get(name) for name in ("chat_format", "quantization_bit")}
    needed["source_prefix"] = prompt.get("source_prefix")
    known = flags or ({"do_train": True, **recipe} if recipe else {})
    # The number of processes is a flag of the launcher.
    places = {"model_name_or_path": base, "output_dir": _OUTPUT_DIR}
    settings = {name: value for name, value in known.items() if name not in places and name != "world_size"}
    return Commands(
        adapter=adapter,
        base=base,
        messages=with_source_prefix(messages, prompt.get("source_prefix")),
        source_prefix=prompt.get("source_prefix"),
        max_new_tokens=length,
        chat_format=text_of(record.get("chat_format")),
        given_chat_format=text_of(given.get("chat_format")),
        quantization_bit=given.get("quantization_bit"),
        predict=_ask(model | needed | {"max_new_tokens": length}, messages),
        train=_join(f"{_launcher(part(record, 'hardware'))} glm_peft/train.py", places | settings) if known else None,
    )


def quoted(value: Any) -> str:
    """Return a value as a literal of Python; Chinese characters stay readable."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str | list) else repr(value)


def _choose_messages(predictions: list[dict[str, Any]], system_text: str | None) -> list[Message]:
    """Return the first conversation that was answered, or a greeting where its question is no text to type."""
    messages = predictions[0]["messages"] if predictions else []
    # One line, and no characters that a terminal does not show: the reader types it.
    question = messages[-1]["content"] if messages else ""
    if 0 < len(question) <= _LONGEST_QUESTION and question.isprintable():
        return messages
    return with_system([{"role": "user", "content": _GREETING}], system_text)


def _ask(flags: Mapping[str, Any], messages: list[Message]) -> str:
    """Return the command of bash that answers a conversation: of more than a question it is a row of a file."""
    *earlier, question = messages
    if not earlier:
        return _join(_PREDICT, flags | {"prompt": question["content"]})
    if len(earlier) == 1 and earlier[0]["role"] == "system":
        return _join(_PREDICT, flags | {"system_text": earlier[0]["content"], "prompt": question["content"]})
    row = json.dumps({"messages": messages}, ensure_ascii=False)
    command = _join(_PREDICT, flags | {"test_file": "asked.jsonl", "output_dir": "output/answers"})
    return f"printf '%s\\n' {shlex.quote(row)} > asked.jsonl\n{command}"


def _launcher(hardware: Mapping[str, Any]) -> str:
    processes, engine = hardware.get("processes"), hardware.get("engine")
    processes = processes if isinstance(processes, int) else 1
    on_cpu = hardware.get("kind") == "cpu"
    name = "cpu" if on_cpu else "single_gpu"
    # Adapters of earlier versions may record ZeRO-3, which is refused now: FSDP2 shards the base as it did.
    if engine == "FSDP" or (engine == "DEEPSPEED" and hardware.get("zero_stage") == 3):
        name = "fsdp2"
    elif engine == "DEEPSPEED":
        name = "deepspeed_zero2"
    elif processes > 1:
        name = "cpu_2_processes" if on_cpu else "multi_gpu"
    number = f" --num_processes {processes}" if processes > 1 else ""
    return f"accelerate launch --quiet --config_file {shlex.quote(f'accelerate_configs/{name}.yaml')}{number}"


def _join(command: str, flags: Mapping[str, Any]) -> str:
    """Return a command of bash, one flag a line."""
    words = [_flag(name, value) for name, value in flags.items() if value is not None]
    return " \\\n    ".join([command, *words])


def _flag(name: str, value: Any) -> str:
    flag = shlex.quote(f"--{name}")
    if value is True:
        return flag
    values = value if isinstance(value, list) else [value]
    words = [item if isinstance(item, str) else _word(item) for item in values]
    if len(words) == 1 and (words[0][:1] == "-" or not words[0]):
        return f"{flag}={shlex.quote(words[0])}"  # such a word would be taken for a flag, or for none
    return " ".join([flag, *map(shlex.quote, words)])


def _word(value: Any) -> str:
    """Return a number as one would type it, and anything else as JSON."""
    short = f"{value:g}" if isinstance(value, float) else ""
    return short if short and float(short) == value else json.dumps(value)
