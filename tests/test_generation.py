"""The generation engine on made-up models: answers, batches, settings in effect, what happens on the way."""

import json
import logging
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from warm_starts import warm_python

import glm_peft  # noqa: F401
from glm_peft.errors import UserError
from glm_peft.models.chat_formats import get_chat_format
from glm_peft.prediction.batch_plan import plan_batches
from glm_peft.prediction.generation import AnsweredBatch, _Generator, _ready, _seeded, generate_answers
from glm_peft.prediction.generation_settings import (
    CACHE_BYTES,
    GenerationSettings,
    build_generation_config,
    choose_batch_size,
)
from glm_peft.preprocessing.collators import GenerationCollator

GENERATIONS = ("chatglm", "chatglm2", "chatglm3", "glm4", "glm4_0414")
QUESTIONS = ("白色衬衫", "类型#裤*版型#宽松", "今天天气很好，我们去公园散步吧。", "Hello", "她把信放进抽屉，关上了灯")
SETTINGS = GenerationSettings(max_new_tokens=12, batch_size=3)


class Setup:
    """A base with a prefix that matters, its tokenizer and format, and the questions as prompts."""

    def __init__(self, folder: Path, chat_format: str | None = None) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.chat_format = get_chat_format(self.tokenizer, chat_format)
        self.base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        torch.manual_seed(7)
        self.base.requires_grad_(False)
        if self.base.config.tie_word_embeddings:
            # With tied embeddings and even norms, a random model only repeats its last token.
            torch.nn.init.normal_(self.base.get_parameter("transformer.final_layernorm.weight"))
            # The residuals of ChatGLM-6B are so large that attention says little: let it say more.
            for layer in self.base.transformer.layers:
                layer.attention.dense.weight.mul_(20)
        self.model = get_peft_model(self.base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
        self.prompts = {"input_ids": [self.encode(question) for question in QUESTIONS]}

    def encode(self, question: str) -> list[int]:
        return self.chat_format.encode_prompt(self.tokenizer, [{"role": "user", "content": question}]).ids

    def answer(self, prompts: Any = None, settings: GenerationSettings = SETTINGS, **options: Any) -> list[str]:
        model = options.pop("model", self.model)
        return generate_answers(model, self.tokenizer, self.chat_format, prompts or self.prompts, settings, **options)


@pytest.fixture(scope="module", params=GENERATIONS)
def every_setup(request: pytest.FixtureRequest, tiny_model_dirs: dict[str, Path]) -> Setup:
    chat_format = request.param if request.param in ("chatglm2", "chatglm3") else None
    return Setup(tiny_model_dirs[request.param], chat_format)


@pytest.fixture(scope="module")
def setup(tiny_model_dirs: dict[str, Path]) -> Setup:
    return Setup(tiny_model_dirs["glm4_0414"])


def greedy_by_hand(setup: Setup, prompt: list[int], steps: int) -> str:
    """One prompt, no cache, no padding: the most likely token, again and again."""
    ids, stops = list(prompt), setup.chat_format.stop_token_ids(setup.tokenizer)
    for _ in range(steps):
        positions = torch.arange(len(ids))[None]
        with torch.no_grad():
            output = setup.model(
                input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), position_ids=positions
            )
        ids.append(output.logits[0, -1].argmax().item())
        if ids[-1] in stops:
            break
    new = [id_ for id_ in ids[len(prompt) :] if id_ not in stops]
    return setup.chat_format.clean_answer(setup.tokenizer.decode(new, skip_special_tokens=True))


def test_a_batch_answers_as_one_prompt_at_a_time_without_cache_does(every_setup: Setup) -> None:
    expected = [greedy_by_hand(every_setup, prompt, 12) for prompt in every_setup.prompts["input_ids"]]
    assert any(expected) and len(set(expected)) > 1
    assert every_setup.answer() == expected
    assert every_setup.answer(settings=GenerationSettings(12, batch_size=1)) == expected


def test_the_prefix_has_a_part_in_the_answers_and_a_plain_base_answers_too(every_setup: Setup) -> None:
    with every_setup.model.disable_adapter():
        without_adapter = every_setup.answer()
    assert without_adapter != every_setup.answer()
    assert every_setup.answer(model=every_setup.base) == without_adapter


@pytest.mark.parametrize("changes", [{"num_beams": 3}, {"do_sample": True, "num_beams": 1}])
def test_beams_and_draws_work_in_padded_batches(every_setup: Setup, changes: dict[str, Any]) -> None:
    answers = every_setup.answer(settings=GenerationSettings(12, batch_size=5, **changes))
    assert len(answers) == 5 and all(isinstance(answer, str) for answer in answers)
    assert answers != every_setup.answer()


def test_beams_of_a_batch_are_those_of_one_prompt_at_a_time(every_setup: Setup) -> None:
    one, five = (GenerationSettings(8, num_beams=3, batch_size=size) for size in (1, 5))
    assert every_setup.answer(settings=five) == every_setup.answer(settings=one)


class Scripted(torch.nn.Module):
    """A model that generates what it is told, by the prompt's last id, after checking that it could be generated."""

    def __init__(self, script: dict[int, list[int]], pad: int) -> None:
        super().__init__()
        self.script, self.pad, self.seen, self.generation_config = script, pad, [], GenerationConfig()
        self.limit: int | None = None

    device = torch.device("cpu")

    def generate(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, generation_config: GenerationConfig
    ) -> torch.Tensor:
        self.seen.append((input_ids, attention_mask))
        if self.limit is not None and len(input_ids) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        rows = [self.script[int(row[-1])] for row in input_ids]
        longest = max(len(row) for row in rows)
        new = torch.tensor([row + [self.pad] * (longest - len(row)) for row in rows])
        return torch.cat((input_ids, new), dim=1)


def scripted(setup: Setup, texts: list[str], end: int) -> tuple[Scripted, dict[str, list[list[int]]]]:
    """A model that gives these texts, one a prompt, each followed by the end token and something after it."""
    ids = [setup.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    script = {row: [*ids[row], end, *ids[0]] for row in range(len(texts))}
    prompts = {"input_ids": [[50] * length + [row] for row, length in enumerate((2, 9, 4, 9, 1)[: len(texts)])]}
    return Scripted(script, setup.tokenizer.pad_token_id), prompts


def test_only_the_answer_comes_out_and_it_ends_at_every_end_token(setup: Setup) -> None:
    texts = ["白色", "很好的天气", "Hello", "公园", "衬衫"]
    for end in setup.chat_format.stop_token_ids(setup.tokenizer):
        model, prompts = scripted(setup, texts, end)
        batches: list[AnsweredBatch] = []
        assert setup.answer(prompts, model=model, on_batch=batches.append) == texts
        counted = {row: count for batch in batches for row, count in zip(batch.rows, batch.num_tokens, strict=True)}
        assert counted[2] == len(setup.tokenizer("Hello", add_special_tokens=False)["input_ids"]) + 1


def test_batches_are_padded_on_the_left_and_the_longest_come_first(setup: Setup) -> None:
    model, prompts = scripted(
        setup, ["一", "二", "三", "四", "五"], setup.chat_format.stop_token_ids(setup.tokenizer)[0]
    )
    setup.answer(prompts, model=model)
    pad = setup.tokenizer.pad_token_id
    assert [ids[:, -1].tolist() for ids, _ in model.seen] == [[1, 3, 2], [0, 4]]
    assert model.seen[1][0].tolist() == [[50, 50, 0], [pad, 50, 4]]
    assert model.seen[1][1].tolist() == [[1, 1, 1], [0, 1, 1]]


def test_a_batch_too_large_for_the_memory_is_halved_and_nothing_is_lost(
    setup: Setup, caplog: pytest.LogCaptureFixture
) -> None:
    texts = ["一", "二", "三", "四", "五"]
    model, prompts = scripted(setup, texts, setup.chat_format.stop_token_ids(setup.tokenizer)[0])
    model.limit = 2
    batches: list[AnsweredBatch] = []
    assert setup.answer(prompts, GenerationSettings(4, batch_size=5), model=model, on_batch=batches.append) == texts
    assert [batch.rows for batch in batches] == [[1, 3], [2], [0, 4]]
    assert [len(ids) for ids, _ in model.seen] == [5, 3, 2, 1, 2]
    assert "5 rows at a time are too many for the GPU's memory" in caplog.text


def test_a_single_prompt_too_large_for_the_memory_is_an_error_that_names_it(setup: Setup) -> None:
    model, prompts = scripted(setup, ["一", "二"], setup.chat_format.stop_token_ids(setup.tokenizer)[0])
    model.limit = 0
    with pytest.raises(UserError, match=r"Row 2 alone, with 10 tokens and 4 to come, does not fit"):
        setup.answer(prompts, GenerationSettings(4), model=model)


def test_known_answers_are_kept_and_only_the_others_generated(setup: Setup) -> None:
    batches: list[AnsweredBatch] = []
    answers = setup.answer(on_batch=batches.append, known_answers={1: "known", 2: "known too"})
    assert answers[1:3] == ["known", "known too"]
    assert sorted(row for batch in batches for row in batch.rows) == [0, 3, 4]
    assert answers[0] == setup.answer()[0]


def test_the_token_budget_counts_padding_answers_and_beams() -> None:
    lengths = [10, 30, 20, 10, 10]
    plan = plan_batches(lengths, GenerationSettings(10, max_batch_tokens=60))
    assert plan == [[1], [2, 0], [3, 4]]
    assert plan_batches(lengths, GenerationSettings(10, max_batch_tokens=60, num_beams=3))[0] == [1]
    assert plan_batches(lengths, GenerationSettings(10, batch_size=4)) == [[1, 2, 0, 3], [4]]


def test_without_a_size_a_batch_is_as_large_as_memory_and_the_number_of_rows_allow(setup: Setup) -> None:
    def rows(count: int, length: int, **options: int) -> int | None:
        return choose_batch_size(GenerationSettings(**options), setup.model, [length] * count).batch_size

    config = setup.base.config
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    fitting = [CACHE_BYTES // (20 * token) - 4 - new for new in (4, 8)]  # 4 is the prefix
    assert rows(1000, 10) == 64 and rows(50, 10) == 25 and rows(10, 10) == rows(0, 0) == 8
    assert rows(1000, fitting[0], max_new_tokens=4) == 20 and rows(1000, fitting[1] + 1, max_new_tokens=8) == 19
    assert rows(1000, fitting[0], max_new_tokens=4, num_beams=3) == 8
    assert rows(1000, 10, batch_size=3) == 3
    assert rows(1000, 10, max_batch_tokens=99) is None


def test_draws_keep_their_batches_where_rows_are_known_and_greedy_ones_do_not() -> None:
    lengths, known = [4, 4, 4, 4], {0, 1, 2}
    assert plan_batches(lengths, GenerationSettings(batch_size=2, do_sample=True), known) == [[2, 3]]
    assert plan_batches(lengths, GenerationSettings(batch_size=2), known) == [[3]]


def test_draws_depend_on_the_seed_alone_and_leave_the_random_state(setup: Setup) -> None:
    drawn = GenerationSettings(12, do_sample=True, top_p=1.0, top_k=0, batch_size=2)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = setup.answer(settings=drawn)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert setup.answer(settings=drawn) == first
    other = GenerationSettings(12, do_sample=True, top_p=1.0, top_k=0, batch_size=2, seed=43)
    assert setup.answer(settings=other) != first


def test_a_resumed_run_draws_what_an_uninterrupted_one_does(setup: Setup) -> None:
    drawn = GenerationSettings(12, do_sample=True, batch_size=2)
    batches: list[AnsweredBatch] = []
    answers = setup.answer(settings=drawn, on_batch=batches.append)
    known = dict(zip(batches[0].rows, batches[0].answers, strict=True))
    known[batches[1].rows[0]] = batches[1].answers[0]
    assert setup.answer(settings=drawn, known_answers=known) == answers


def test_threads_wait_for_each_other(setup: Setup) -> None:
    """PEFT's `generate` is not safe in threads: of two calls at once, one loses its prefix."""
    expected, answers = setup.answer(), []
    other = Thread(target=lambda: answers.append(setup.answer()))

    def start_other(batch: AnsweredBatch) -> None:
        if not other.ident:
            other.start()
        other.join(0.3)
        assert not answers

    assert setup.answer(on_batch=start_other) == expected
    other.join()
    assert answers == [expected]


@pytest.fixture
def stubborn_base(setup: Setup) -> Iterator[PreTrainedModel]:
    """The base with a published configuration of its own that contradicts greedy decoding."""
    before = setup.base.generation_config
    setup.base.generation_config = GenerationConfig(
        do_sample=True, top_p=0.8, temperature=0.5, max_length=20, eos_token_id=1, num_beams=2, repetition_penalty=5.0
    )
    yield setup.base
    setup.base.generation_config = before


def test_the_settings_are_in_effect_whatever_the_base_says_without_a_warning(
    setup: Setup, stubborn_base: PreTrainedModel, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    own_config = stubborn_base.generation_config
    with caplog.at_level(logging.WARNING):
        logging.getLogger("transformers").addHandler(caplog.handler)
        assert setup.answer() == [greedy_by_hand(setup, prompt, 12) for prompt in setup.prompts["input_ids"]]
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert not caplog.records and not recwarn.list
    assert stubborn_base.generation_config is own_config


@pytest.mark.parametrize(
    "own", [{"cache_implementation": "static"}, {"use_cache": False}, {"prompt_lookup_num_tokens": 2}]
)
def test_no_cache_of_the_bases_own_choice_reaches_a_prefix(setup: Setup, own: dict[str, Any]) -> None:
    beams = GenerationSettings(8, num_beams=2)
    expected, before = (setup.answer(), setup.answer(settings=beams)), setup.base.generation_config
    setup.base.generation_config = GenerationConfig(**own)
    try:
        assert (setup.answer(), setup.answer(settings=beams)) == expected
    finally:
        setup.base.generation_config = before


def test_finished_rows_cost_no_steps(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    row = torch.tensor(setup.prompts["input_ids"][:1])
    fourth = int(setup.model.generate(input_ids=row, max_new_tokens=4, do_sample=False, eos_token_id=None)[0, -1])
    monkeypatch.setattr(type(setup.chat_format), "stop_token_ids", lambda *_: [fourth])
    batches: list[AnsweredBatch] = []
    rows_of_steps: list[int] = []
    hook = setup.base.get_input_embeddings().register_forward_pre_hook(
        lambda _, ids: rows_of_steps.append(len(ids[0]))
    )
    setup.answer(on_batch=batches.append)
    hook.remove()
    num_tokens = [count for batch in batches for count in batch.num_tokens]
    assert len(set(num_tokens)) > 1 and sum(rows_of_steps) == sum(num_tokens)


def test_the_prefix_is_computed_once_for_all_batches(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    compute, rows = setup.model.get_prompt, []
    monkeypatch.setattr(setup.model, "get_prompt", lambda *words, **kw: rows.append(words) or compute(*words, **kw))
    batches: list[AnsweredBatch] = []
    setup.answer(on_batch=batches.append)
    assert len(batches) == 2 and rows == [(1,)]


@pytest.mark.parametrize("changes", [{"num_beams": 3}, {"do_sample": True, "top_k": 0}])
def test_beams_and_first_draws_are_those_of_stock_peft(every_setup: Setup, changes: dict[str, Any]) -> None:
    settings = GenerationSettings(8, batch_size=5, **changes)
    config = build_generation_config(every_setup.tokenizer, every_setup.chat_format, settings)
    config.eos_token_id = None
    rows = plan_batches([len(ids) for ids in every_setup.prompts["input_ids"]], settings)[0]
    batch = GenerationCollator(every_setup.tokenizer)(
        [{"input_ids": every_setup.prompts["input_ids"][row]} for row in rows]
    )
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with _seeded(settings, rows[0], torch.device("cpu")):
        expected = every_setup.model.generate(**inputs, generation_config=config)
    generator = _Generator(every_setup.model, every_setup.tokenizer, every_setup.chat_format, settings)
    generator.config.eos_token_id = None
    with _ready(every_setup.model, generator.config), _seeded(settings, rows[0], torch.device("cpu")):
        answers = every_setup.model.generate(**inputs, generation_config=generator.config, **generator.decoding)
    assert torch.equal(answers, expected)


def test_a_lora_adapter_answers_as_one_prompt_at_a_time_in_stock_does(tiny_model_dirs: dict[str, Path]) -> None:
    setup = Setup(tiny_model_dirs["chatglm2"], "chatglm2")
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(setup.base, config).eval()
    options = {
        "max_new_tokens": 12,
        "do_sample": False,
        "eos_token_id": setup.chat_format.stop_token_ids(setup.tokenizer),
    }
    rows = [torch.tensor([ids]) for ids in setup.prompts["input_ids"]]
    ids = [model.generate(input_ids=row, **options)[0, row.shape[1] :].tolist() for row in rows]
    expected = [setup.chat_format.clean_answer(setup.tokenizer.decode(new, skip_special_tokens=True)) for new in ids]
    assert setup.answer(model=model) == expected and len(set(expected)) > 1


def test_generation_stops_at_the_end_tokens_and_at_the_limit(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = {"input_ids": setup.prompts["input_ids"][:1]}
    batches: list[AnsweredBatch] = []
    setup.answer(prompts, GenerationSettings(max_new_tokens=7), on_batch=batches.append)
    assert batches[0].num_tokens == [7]
    ids = setup.model.generate(input_ids=torch.tensor(prompts["input_ids"]), max_new_tokens=7, do_sample=False)[0]
    fourth = int(ids[len(prompts["input_ids"][0]) + 3])
    monkeypatch.setattr(type(setup.chat_format), "stop_token_ids", lambda *_: [2, fourth])
    setup.answer(prompts, GenerationSettings(max_new_tokens=7), on_batch=batches.append)
    assert batches[1].num_tokens[0] <= 4


def test_training_mode_comes_back_as_it_was(setup: Setup) -> None:
    setup.model.train()
    setup.base.model.norm.eval()
    before = {name: module.training for name, module in setup.model.named_modules()}
    setup.base.activation_checkpointing_enable()
    try:
        answers = setup.answer()
        assert {name: module.training for name, module in setup.model.named_modules()} == before
    finally:
        setup.base.activation_checkpointing_disable()
        setup.model.eval()
    assert answers == setup.answer()


def test_an_adapter_loaded_by_stock_peft_answers_the_same(setup: Setup, tmp_path: Path) -> None:
    setup.model.save_pretrained(tmp_path)
    expected = setup.answer()
    base = AutoModelForCausalLM.from_pretrained(setup.base.name_or_path, dtype=torch.float32)
    assert setup.answer(model=PeftModel.from_pretrained(base, tmp_path)) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"num_beams": 0}, "num_beams is 0"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"max_batch_tokens": 0}, "max_batch_tokens is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": -1}, "top_k is -1"),
        ({"temperature": 0.0}, "temperature is 0.0"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        GenerationSettings(**changes)


def test_settings_come_from_the_first_arguments_that_have_them() -> None:
    training = SimpleNamespace(max_new_tokens=None, num_beams=2, per_device_eval_batch_size=5, top_p=0.6, seed=1)
    data = SimpleNamespace(val_max_target_length=None, max_target_length=64, num_beams=4)
    expected = GenerationSettings(max_new_tokens=64, num_beams=2, batch_size=5, top_p=0.6, seed=1)
    assert GenerationSettings.from_arguments(training, data) == expected
    data.val_max_target_length = 32
    assert GenerationSettings.from_arguments(training, data).max_new_tokens == 32
    training.max_new_tokens = 16
    assert GenerationSettings.from_arguments(training, data).max_new_tokens == 16


SHARED_RUN = """
import json, sys
import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer
import glm_peft
from glm_peft.models.chat_formats import get_chat_format
from glm_peft.prediction.generation import generate_answers
from glm_peft.prediction.generation_settings import GenerationSettings
folder, prompts, target = sys.argv[1:]
state = PartialState(cpu=True)
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
rows, calls, generate = [], [], model.generate
model.generate = lambda **inputs: (calls.append(1), generate(**inputs))[1]
answers = generate_answers(
    model, tokenizer, get_chat_format(tokenizer), json.loads(prompts), GenerationSettings(12, batch_size=2),
    on_batch=lambda batch: rows.extend(batch.rows),
)
with open(f"{target}.{state.process_index}", "w") as file:
    json.dump({"answers": answers, "rows": rows, "calls": len(calls), "processes": state.num_processes}, file)
"""


def test_two_processes_share_the_batches_and_both_have_all_answers(setup: Setup, tmp_path: Path) -> None:
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    command = [warm_python(), "-c", SHARED_RUN, setup.base.name_or_path, json.dumps(setup.prompts)]
    processes = []
    for rank in ("0", "1"):
        environment = os.environ | common | {"RANK": rank, "LOCAL_RANK": rank}
        processes.append(subprocess.Popen([*command, str(tmp_path / "out")], env=environment))
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    first, second = (json.loads((tmp_path / f"out.{rank}").read_text()) for rank in (0, 1))
    assert first["processes"] == second["processes"] == 2
    assert sorted(first["rows"] + second["rows"]) == [0, 1, 2, 3, 4]
    assert first["calls"] == second["calls"] == 2
    assert first["answers"] == second["answers"] == setup.answer(model=setup.base)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
