"""A base model in memory once, with any number of adapters, each of which answers by its name."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count

from accelerate import PartialState
from peft import PeftModel
from transformers import PreTrainedModel, StoppingCriteria

from glm_peft.adapters.assembly import OpenedBase, open_base, put_adapter_on
from glm_peft.adapters.loading import check_base
from glm_peft.adapters.other_methods import load_beside
from glm_peft.arguments.data import DataArguments
from glm_peft.arguments.effects import naming_places
from glm_peft.arguments.fields import changed
from glm_peft.arguments.model import ModelArguments
from glm_peft.errors import UserError
from glm_peft.models.quantization import allow_packing
from glm_peft.models.shortening import Message
from glm_peft.prediction.evaluation import Answering
from glm_peft.prediction.generation_settings import GenerationSettings
from glm_peft.preprocessing.prompt_shape import shape_prompt

BASE = "base"  # the name of the base without an adapter


@dataclass
class Answerers:
    """
    A base and its adapters, by their names; `base` is the base alone. One thread at a time may use them.

    Args:
        model_args: those of the base.
        model: the base.
        by_name: what answers under each name.
        asked: what shapes the prompts of each.
        tuner: the model into whose layers adapters such as LoRA were put; `None` where there are none.
        tuned: the names that PEFT has for those adapters, by ours.
    """

    model_args: ModelArguments
    model: PreTrainedModel
    by_name: dict[str, Answering]
    asked: dict[str, DataArguments]
    tuner: PeftModel | None = None
    tuned: dict[str, str] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=count, init=False)

    def open(self, path: str) -> OpenedBase:
        """Read the small files of an adapter for this base; the errors are those of `open_base`."""
        return open_base(_arguments_of(path, self.model_args))

    def add(self, name: str, opened: OpenedBase) -> None:
        """
        Put an adapter on the base.

        Raises:
            UserError: the name is taken, or the adapter cannot be read or is of another base.
        """
        if name in self.by_name:
            raise UserError(f"The name {name} is taken; give the adapter a name of its own.")
        model = self._put_in_layers(name, opened) if _is_in_layers(opened) else put_adapter_on(self.model, opened)
        self.by_name[name] = Answering(model, opened.tokenizer, opened.chat_format)
        self.asked[name] = opened.data_args

    def remove(self, name: str) -> None:
        """Take an adapter off the base."""
        del self.by_name[name], self.asked[name]
        tuned = self.tuned.pop(name, None)
        if tuned and self.tuned:
            self.tuner.delete_adapter(tuned)
        elif tuned:
            self.tuner.unload()
            self.tuner = None

    def encode(self, name: str, messages: list[Message]) -> list[int]:
        """Encode a conversation as the named one was trained to be asked: with its system text and source prefix."""
        answering = self.by_name[name]
        return answering.chat_format.encode_prompt(answering.tokenizer, shape_prompt(messages, self.asked[name])).ids

    def stop_token_ids(self, name: str) -> list[int]:
        """Return the tokens that end an answer of the named one."""
        answering = self.by_name[name]
        return answering.chat_format.stop_token_ids(answering.tokenizer)

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
        (answer,) = self.answer_batch(name, [prompt], settings, watch)
        return answer

    def answer_batch(
        self, name: str, prompts: list[list[int]], settings: GenerationSettings, watch: StoppingCriteria | None = None
    ) -> list[str]:
        """Answer several prompts by one name; the arguments are those of `answer`."""
        with self._only(name):
            return self.by_name[name].generate({"input_ids": prompts}, settings, watch=watch)

    @contextmanager
    def _only(self, name: str) -> Iterator[None]:
        """Let the layers of the base be those of the named adapter; otherwise they are the base's own."""
        if name not in self.tuned:
            yield
            return
        self.tuner.set_adapter(self.tuned[name])
        self.tuner.base_model.enable_adapter_layers()
        try:
            yield
        finally:
            self.tuner.base_model.disable_adapter_layers()

    def _put_in_layers(self, name: str, opened: OpenedBase) -> PeftModel:
        """Put an adapter such as LoRA into the base's layers; return the model with it."""
        if self.tuner is None:
            self.tuner, self.tuned[name] = put_adapter_on(self.model, opened), "default"
        else:
            check_base(self.model, opened.adapter, self.model_args.allow_other_base)
            # Not ours: PEFT takes no dots, and finds some names within those of its own tensors.
            of_peft = f"number{next(self._numbers)}"
            load_beside(self.tuner, opened.adapter.source, opened.adapter.config, of_peft)
            self.tuned[name] = of_peft
        self.tuner.base_model.disable_adapter_layers()
        return self.tuner


def open_answerers(model_args: ModelArguments, adapters: Mapping[str, str]) -> Answerers:
    """
    Load a base once and put its adapters on it.

    Args:
        model_args: those of the base.
        adapters: folder or Hub id of each adapter, by the name that it will have.

    Raises:
        UserError: an adapter cannot be read or is of another base; none is loaded then.
    """
    opened = {}
    for name, path in adapters.items():
        with naming_places({"adapter_name_or_path": f"the adapter {name}"}):  # of several, which is meant
            opened[name] = open_base(_arguments_of(path, model_args))
    # An adapter may name the chat format where the base's own files do not.
    first = next(iter(opened.values()), None) or open_base(model_args)
    model = first.load_model(PartialState().device)
    allow_packing(model)
    base = Answering(model, first.tokenizer, first.chat_format)
    answerers = Answerers(model_args, model, {BASE: base}, {BASE: DataArguments()})
    for adapter in opened.values():  # all before the first that is put into the layers, which renames them
        check_base(model, adapter.adapter, model_args.allow_other_base)
    for name in sorted(opened, key=lambda name: _is_in_layers(opened[name])):
        answerers.add(name, opened[name])
    answerers.by_name = {name: answerers.by_name[name] for name in (BASE, *opened)}
    return answerers


def _arguments_of(adapter: str, model_args: ModelArguments) -> ModelArguments:
    """Return the arguments of the base with one of its adapters, which decides method and sizes."""
    own = {"peft_type": None, "num_virtual_tokens": None, "prefix_projection": None}
    if adapter != model_args.adapter_name_or_path:
        own["adapter_revision"] = None  # it is of the adapter of that flag alone
    return changed(model_args, adapter_name_or_path=adapter, **own)


def _is_in_layers(base: OpenedBase) -> bool:
    return base.adapter.config is not None and not base.adapter.config.is_prompt_learning


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
