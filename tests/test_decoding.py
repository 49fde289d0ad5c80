"""The loop that finished rows leave gives what stock's loop gives."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, StoppingCriteria

import glm_peft  # noqa: F401
from glm_peft.models.chat_formats import get_chat_format
from glm_peft.prediction.decoding import _without, decode
from glm_peft.preprocessing.collators import GenerationCollator

GENERATIONS = ("chatglm", "chatglm2", "chatglm3", "glm4", "glm4_0414")
QUESTIONS = ("白色衬衫", "类型#裤*版型#宽松", "今天天气很好，我们去公园散步吧。", "Hello", "她把信放进抽屉，关上了灯")
STEPS = 12
LIMITS = (3, STEPS, 5, 5, 1)


class Setup:
    """A base with a prefix, and five prompts of different lengths in one batch."""

    def __init__(self, folder: Path, chat_format: str | None, attention: str) -> None:
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
        torch.manual_seed(7)
        if base.config.tie_word_embeddings:  # a random model would only repeat its last token
            base.requires_grad_(False)
            torch.nn.init.normal_(base.get_parameter("transformer.final_layernorm.weight"))
            for layer in base.transformer.layers:
                layer.attention.dense.weight.mul_(20)
        self.model: PeftModel = get_peft_model(
            base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        ).eval()
        encode = get_chat_format(self.tokenizer, chat_format).encode_prompt
        rows = [encode(self.tokenizer, [{"role": "user", "content": question}]).ids for question in QUESTIONS]
        batch = GenerationCollator(self.tokenizer)([{"input_ids": ids} for ids in rows])
        self.inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}

    def generate(self, model: Any = None, **options: Any) -> torch.Tensor:
        pad = self.tokenizer.pad_token_id
        model = model or self.model
        return model.generate(**self.inputs, max_new_tokens=STEPS, pad_token_id=pad, **options)


class EndsAt(StoppingCriteria):
    """Ends each answer after a number of tokens of its own, known by the prompt."""

    eos_token_id = ()  # by which stock knows that finished rows are to be padded

    def __init__(self, prompts: torch.Tensor, limits: Sequence[int] = LIMITS) -> None:
        self.limits = {tuple(prompt): limit for prompt, limit in zip(prompts.tolist(), limits, strict=True)}
        self.length = prompts.shape[1]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        limits = [self.limits[tuple(row)] for row in input_ids[:, : self.length].tolist()]
        return torch.tensor([input_ids.shape[1] - self.length >= limit for limit in limits])


@pytest.fixture(scope="module", params=[(name, kind) for name in GENERATIONS for kind in ("sdpa", "eager")], ids=str)
def every_setup(request: pytest.FixtureRequest, tiny_model_dirs: dict[str, Path]) -> Setup:
    generation, attention = request.param
    chat_format = generation if generation in ("chatglm2", "chatglm3") else None
    return Setup(tiny_model_dirs[generation], chat_format, attention)


@pytest.fixture(scope="module")
def setup(tiny_model_dirs: dict[str, Path]) -> Setup:
    return Setup(tiny_model_dirs["glm4"], None, "sdpa")


def rows_in_each_step(model: PeftModel) -> tuple[list[int], Any]:
    """The number of rows of each call of the base, as they come."""
    seen: list[int] = []

    def note(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(len(kwargs["input_ids"]))

    return seen, model.get_base_model().register_forward_pre_hook(note, with_kwargs=True)


def test_greedy_answers_are_stocks_while_rows_leave(every_setup: Setup) -> None:
    options = {"do_sample": False, "stopping_criteria": [EndsAt(every_setup.inputs["input_ids"])]}
    expected = every_setup.generate(**options)
    assert len({tuple(row) for row in expected[:, -STEPS:].tolist()}) > 1
    seen, hook = rows_in_each_step(every_setup.model)
    answers = every_setup.generate(**options, custom_generate=decode)
    hook.remove()
    assert torch.equal(answers, expected)
    assert seen == [5, 4, 4, 3, 3, 1, 1, 1, 1, 1, 1, 1]


def test_a_base_without_a_prefix_and_prompts_without_padding_are_answered_too(every_setup: Setup) -> None:
    base = every_setup.model.get_base_model()
    with every_setup.model.disable_adapter():
        greedy = {"do_sample": False, "eos_token_id": None}
        assert torch.equal(
            every_setup.generate(**greedy, custom_generate=decode), every_setup.generate(base, **greedy)
        )
    longest = every_setup.inputs["attention_mask"].all(dim=1)
    one = {"input_ids": every_setup.inputs["input_ids"][longest], "pad_token_id": 0, "max_new_tokens": STEPS, **greedy}
    expected = every_setup.model.generate(**one)
    assert len(expected) == 1
    assert torch.equal(every_setup.model.generate(**one, custom_generate=decode), expected)


def test_draws_are_stocks_as_long_as_no_row_has_left(setup: Setup) -> None:
    options = {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 1.5, "eos_token_id": None}
    torch.manual_seed(5)
    expected = setup.generate(**options)
    torch.manual_seed(5)
    assert torch.equal(setup.generate(**options, custom_generate=decode), expected)
    torch.manual_seed(6)
    assert not torch.equal(setup.generate(**options, custom_generate=decode), expected)


def test_processors_see_the_sequences_of_the_rows_that_are_left(setup: Setup) -> None:
    ends = {"do_sample": False, "stopping_criteria": [EndsAt(setup.inputs["input_ids"])]}
    free = setup.generate(**ends)
    start = setup.inputs["input_ids"].shape[1]
    first, second = free[LIMITS.index(STEPS), start : start + 2].tolist()
    options = ends | {"sequence_bias": [[[first, second + 1], 1e3]]}  # another token after that one
    expected = setup.generate(**options)
    assert torch.equal(setup.generate(**options, custom_generate=decode), expected)
    assert not torch.equal(expected, free)


@pytest.mark.parametrize(
    ("finished", "rows"),
    [
        ([False, True, False, False], [0, 3, 2]),
        ([True, True, False, True, False], [4, 2]),
        ([False, False, True], [0, 1]),
        ([True, False], [1]),
    ],
)
def test_the_last_rows_take_the_places_of_those_that_left(finished: list[bool], rows: list[int]) -> None:
    assert _without(finished) == rows
