"""A base model in memory once, with any number of adapters, each of which answers by its name."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

from accelerate import PartialState
from peft import PeftModel
from transformers import PreTrainedModel, StoppingCriteria

from glm_peft.adapters.assembly import OpenedBase, open_base, put_adapter_on
from glm_peft.adapters.loading import check_base
from glm_peft.arguments.data import DataArguments
from glm_peft.arguments.fields import changed
from glm_peft.arguments.model import ModelArguments
from glm_peft.data import shape_prompt
from glm_peft.errors import UserError
from glm_peft.models.quantization import allow_packing
from glm_peft.models.shortening import Message
from glm_peft.prediction.evaluation import Answering
from glm_peft.prediction.generation_settings import GenerationSettings

BASE = "base"  # the name of the base without an adapter


@dataclass(frozen=True)
class Answerers:
    """
    A base and its adapters, by their names; `base` is the base alone. One thread at a time may use them.

    Args:
        by_name: what answers under each name.
        asked: what shapes the prompts of each.
        tuner: the model into whose layers adapters such as LoRA were put; `None` where there are none.
        tuned: the names that PEFT has for those adapters, by ours.
    """

    by_name: dict[str, Answering]
    asked: dict[str, DataArguments]
    tuner: PeftModel | None = None
    tuned: dict[str, str] = field(default_factory=dict)

    def encode(self, name: str, messages: list[Message]) -> list[int]:
        """Encode a conversation as the named one was trained to be asked: with its system text and source prefix."""
        answering = self.by_name[name]
        return answering.chat_format.encode_prompt(answering.tokenizer, shape_prompt(messages, self.asked[name])).ids

    def answer(
        self, name: str, prompt: list[int], settings: GenerationSettings, watch: StoppingCriteria | None = None
    ) -> str:
        """
        Answer one prompt.

        Args:
            name: who answers.
            prompt: its token ids.
            watch: is called after every token, and may end the answer.
        """
        with self._only(name):
            (answer,) = self.by_name[name].generate({"input_ids": [prompt]}, settings, watch=watch)
        return answer

    @contextmanager
    def _only(self, name: str) -> Iterator[None]:
        """Let the layers of the base be those of the named adapter alone."""
        if name in self.tuned:
            self.tuner.set_adapter(self.tuned[name])
        with nullcontext() if self.tuner is None or name in self.tuned else self.tuner.disable_adapter():
            yield


def open_answerers(model_args: ModelArguments, adapters: Mapping[str, str]) -> Answerers:
    """
    Load a base once and put its adapters on it.

    Args:
        model_args: those of the base.
        adapters: folder or Hub id of each adapter, by the name that it will have.

    Raises:
        UserError: an adapter cannot be read or is of another base; none is loaded then.
    """
    opened = {name: open_base(_arguments_of(path, model_args)) for name, path in adapters.items()}
    # An adapter may name the chat format where the base's own files do not.
    first = next(iter(opened.values()), None) or open_base(model_args)
    model = first.load_model(PartialState().device)
    allow_packing(model)
    in_layers = {name: base for name, base in opened.items() if _is_in_layers(base)}
    models = {name: put_adapter_on(model, base) for name, base in opened.items() if name not in in_layers}
    # After those that only stand before the tokens, as the base's layers are others with adapters such as LoRA.
    tuner, tuned = _put_in_layers(model, in_layers)
    models |= dict.fromkeys(in_layers, tuner)
    by_name = {name: Answering(models[name], base.tokenizer, base.chat_format) for name, base in opened.items()}
    by_name = {BASE: Answering(model, first.tokenizer, first.chat_format), **by_name}
    asked = {BASE: DataArguments(), **{name: base.data_args for name, base in opened.items()}}
    return Answerers(by_name, asked, tuner, tuned)


def _arguments_of(adapter: str, model_args: ModelArguments) -> ModelArguments:
    """Return the arguments of the base with one of its adapters, which decides method and sizes."""
    own = {"peft_type": None, "num_virtual_tokens": None, "prefix_projection": None}
    if adapter != model_args.adapter_name_or_path:
        own["adapter_revision"] = None  # it is of the adapter of that flag alone
    return changed(model_args, adapter_name_or_path=adapter, **own)


def _is_in_layers(base: OpenedBase) -> bool:
    return base.adapter.config is not None and not base.adapter.config.is_prompt_learning


def _put_in_layers(
    model: PreTrainedModel, opened: Mapping[str, OpenedBase]
) -> tuple[PeftModel | None, dict[str, str]]:
    """Put adapters such as LoRA into the base's layers; return the model with them, and PEFT's name of each."""
    tuner, tuned = None, {}
    for base in opened.values():  # all before the first, which renames the layers
        check_base(model, base.adapter, base.model_args.allow_other_base)
    for name, base in opened.items():
        if tuner is None:
            tuner, tuned[name] = put_adapter_on(model, base), "default"
        else:
            tuner.load_adapter(base.adapter.source, adapter_name=name)
            tuned[name] = name
    return tuner, tuned


def parse_adapters(words: list[str], unnamed: str | None = None) -> dict[str, str]:
    """
    Read `name=PATH` words.

    Args:
        unnamed: folder or Hub id of an adapter that comes first, with the name `adapter`.

    Raises:
        UserError: a word has no name or no path, or a name comes twice or is `base`.
    """
    adapters = {"adapter": unnamed} if unnamed else {}
    for word in words:
        name, _, path = word.partition("=")
        if not name or not path:
            raise UserError(f"--adapters {word}: give each adapter as name=PATH, such as ads=output/ads.")
        if name in adapters or name == BASE:
            raise UserError(f"--adapters {word}: the name {name} is taken; give each adapter a name of its own.")
        adapters[name] = path
    return adapters
