"""The commands and the Python code of a model card, which must run as they stand there."""

import json
import shlex
from typing import Any

from glm_peft.arguments.methods import FULL
from glm_peft.publishing.card.facts import Facts

_OUTPUT_DIR = "output/repeated"
_LONGEST_QUESTION = 200  # characters
_STOCK = """import glm_peft  # {comment}
{imports}

{loading}
{asking}"""
_STOCK_ADAPTER = """tokenizer = AutoTokenizer.from_pretrained({base})
base = AutoModelForCausalLM.from_pretrained({base}, dtype="auto", device_map="auto")
model = PeftModel.from_pretrained(base, {adapter}).eval()"""
_STOCK_MODEL = """tokenizer = AutoTokenizer.from_pretrained({adapter})
model = AutoModelForCausalLM.from_pretrained({adapter}, dtype="auto", device_map="auto").eval()"""
_ASKING = """messages = [{{"role": "user", "content": {question}}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
answer = model.generate(**inputs.to(model.device), max_new_tokens={length})[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))"""
_TOOLKIT = """{imports}

model_args = ModelArguments({arguments})
tokenizer = load_tokenizer(model_args)
model = {loading}
chat_format = get_chat_format(tokenizer, {chat_format})
messages = [{{"role": "user", "content": {question}}}]
prompt = chat_format.encode_prompt(tokenizer, messages)
settings = GenerationSettings(max_new_tokens={length})
print(generate_answers(model, tokenizer, chat_format, {{"input_ids": [prompt.ids]}}, settings)[0])"""
_TOOLKIT_IMPORTS = (
    "from glm_peft.adapters.loading import load_adapter",  # the first one, which a whole model does without
    "from glm_peft.arguments.model import ModelArguments",
    "from glm_peft.models.loading import load_base_model, load_tokenizer",
    "from glm_peft.models.chat_formats import get_chat_format",
    "from glm_peft.prediction.generation import generate_answers",
    "from glm_peft.prediction.generation_settings import GenerationSettings",
)


class Code:
    """
    What to type for one adapter.

    Args:
        facts: of the adapter.
        adapter: its folder or id, as the reader is to write it.
        question: to ask where the predictions have none that fits a line.
    """

    def __init__(self, facts: Facts, adapter: str, question: str) -> None:
        self.facts, self.adapter = facts, adapter
        self.base = facts.base if facts.base_is_on_hub else f"path/to/{facts.base or 'base'}"
        self.flags, self.recipe = facts.part("flags"), facts.part("recipe")
        asked = next((row["prompt"] for row in facts.predictions), "")
        fits = 0 < len(asked) <= _LONGEST_QUESTION and asked.isprintable()
        self.question = asked if fits else question
        self.length = next((n for n in map(self._given, _LENGTHS) if isinstance(n, int)), 128)

    @property
    def chat_format(self) -> str | None:
        """The one that was given, as the tokenizer's files do not say it."""
        return self._given("chat_format")

    def stock(self, comment: str) -> str:
        """With PEFT and transformers."""
        is_full = self.facts.method == FULL
        names = "AutoModelForCausalLM, AutoTokenizer"
        imports = ([] if is_full else ["from peft import PeftModel"]) + [f"from transformers import {names}"]
        loading = (_STOCK_MODEL if is_full else _STOCK_ADAPTER).format(
            base=_quoted(self.base), adapter=_quoted(self.adapter)
        )
        asking = "" if self.chat_format else _ASKING.format(question=self._content(), length=self.length)
        return _STOCK.format(comment=comment, imports="\n".join(imports), loading=loading, asking=asking)

    def toolkit(self) -> str:
        """With this package's own functions, which know every chat format."""
        is_full = self.facts.method == FULL
        arguments = {"model_name_or_path": self.adapter if is_full else self.base}
        arguments |= {name: self._given(name) for name in ("chat_format", "quantization_bit") if self._given(name)}
        loading = "load_base_model(model_args)"
        return _TOOLKIT.format(
            imports="\n".join(_TOOLKIT_IMPORTS[is_full:]),
            arguments=", ".join(f"{name}={_quoted(value)}" for name, value in arguments.items()),
            loading=loading if is_full else f"load_adapter({loading}, {_quoted(self.adapter)})",
            chat_format=_quoted(self.facts.record["chat_format"]) if "chat_format" in self.facts.record else None,
            question=self._content(),
            length=self.length,
        )

    def predict(self) -> str:
        """The command that answers one question."""
        is_full = self.facts.method == FULL
        flags = {"model_name_or_path": self.adapter if is_full else self.base}
        flags |= {} if is_full else {"adapter_name_or_path": self.adapter}
        flags |= {name: self._given(name) for name in ("chat_format", "quantization_bit", "source_prefix")}
        return _join("python -m glm_peft.predict", flags | {"max_new_tokens": self.length, "prompt": self.question})

    def train(self) -> str | None:
        """The command that repeats the run, or `None` where nothing is known of it."""
        known = dict(self.flags) or {"do_train": True} | {k: v for k, v in self.recipe.items() if k != "world_size"}
        if not self.flags and not self.recipe:
            return None
        places = {"model_name_or_path": self.base, "output_dir": _OUTPUT_DIR}
        return _join(
            f"{self._launcher()} glm_peft/train.py", places | {k: v for k, v in known.items() if k not in places}
        )

    def _launcher(self) -> str:
        hardware = self.facts.part("hardware")
        processes, engine = hardware.get("processes"), hardware.get("engine")
        processes = processes if isinstance(processes, int) else 1
        on_cpu = hardware.get("kind") == "cpu"
        name = "cpu" if on_cpu else "single_gpu"
        if engine == "FSDP":
            name = "fsdp2"
        elif engine == "DEEPSPEED":
            name = f"deepspeed_zero{hardware.get('zero_stage', 2)}{'_offload' if hardware.get('offload') else ''}"
        elif processes > 1:
            name = "cpu_2_processes" if on_cpu else "multi_gpu"
        number = f" --num_processes {processes}" if processes > 1 else ""
        return f"accelerate launch --quiet --config_file accelerate_configs/{name}.yaml{number}"

    def _content(self) -> str:
        return _quoted((self._given("source_prefix") or "") + self.question)

    def _given(self, name: str) -> Any:
        return self.flags.get(name, self.recipe.get(name))


_LENGTHS = ("max_new_tokens", "val_max_target_length", "max_target_length")


def _quoted(value: Any) -> str:
    """A literal of Python."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _join(command: str, flags: dict[str, Any]) -> str:
    """A command of bash, a flag a line."""
    words = [_flag(name, value) for name, value in flags.items() if value is not None]
    return " \\\n    ".join([command, *words])


def _flag(name: str, value: Any) -> str:
    if value is True:
        return f"--{name}"
    values = value if isinstance(value, list) else [value]
    words = [item if isinstance(item, str) else _word(item) for item in values]
    if len(words) == 1 and (words[0][:1] == "-" or not words[0]):
        return f"--{name}={shlex.quote(words[0])}"
    return " ".join([f"--{name}", *map(shlex.quote, words)])


def _word(value: Any) -> str:
    """A number as one would type it, or anything else as JSON."""
    short = f"{value:g}" if isinstance(value, float) else ""
    return short if short and float(short) == value else json.dumps(value)
