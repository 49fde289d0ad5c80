"""The engine: answers in company are those alone, adapters come and go, and nothing waits for ever."""

import asyncio
from collections.abc import Awaitable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, PrefixTuningConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from glm_peft.arguments.model import ModelArguments
from glm_peft.errors import UserError
from glm_peft.prediction.generation_settings import GenerationSettings
from glm_peft.serving.answer_text import Piece, stream_text
from glm_peft.serving.engine import AnswerRequest, EngineStopped
from glm_peft.serving.engines import SharedEngine, open_engine
from glm_peft.serving.paged_prefixes import PAGE_SIZE, blocks_of

LORA = {"r": 4, "init_lora_weights": False, "target_modules": ["q_proj", "v_proj"]}
METHODS = {
    "ads": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "support": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=37),
    "pages": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2 * PAGE_SIZE),
    "style": LoraConfig(task_type="CAUSAL_LM", **LORA),
}
TEXTS = ("你好", "类型#裤*版型#宽松", "今天天气很好，我们去公园散步吧。", "衬衫" * 40, "Hello!")
PREFIX_BLOCKS = sum(blocks_of(METHODS[name].num_virtual_tokens) for name in ("ads", "support", "pages"))


def save_adapter(base: Path, folder: Path, config: PeftConfig, seed: int) -> str:
    torch.manual_seed(seed)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=["chatglm", "chatglm2", "chatglm3", "glm4", "glm4_0414"])
def every_engine(
    request: pytest.FixtureRequest, tiny_model_dirs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SharedEngine]:
    yield from opened(tiny_model_dirs[request.param], tmp_path_factory.mktemp(request.param), cache_tokens=900)


@pytest.fixture(scope="module")
def engine(tiny_model_dirs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedEngine]:
    yield from opened(tiny_model_dirs["chatglm3"], tmp_path_factory.mktemp("engine"), cache_tokens=400)


def opened(base: Path, folder: Path, **options: Any) -> Iterator[SharedEngine]:
    lora = {} if base.name != "chatglm" else LORA | {"target_modules": ["query_key_value"]}
    methods = METHODS | ({"style": LoraConfig(task_type="CAUSAL_LM", **lora)} if lora else {})
    paths = {
        name: save_adapter(base, folder / name, config, seed) for seed, (name, config) in enumerate(methods.items())
    }
    engine = open_engine(ModelArguments(model_name_or_path=str(base), dtype="float32"), paths, **options)
    yield engine
    engine.close()


def ask(engine: SharedEngine, name: str, text: str, **settings: Any) -> AnswerRequest:
    prompt = engine.answerers.encode(name, [{"role": "user", "content": text}])
    return AnswerRequest(name, prompt, GenerationSettings(**{"max_new_tokens": 8} | settings))


async def pieces_of(engine: SharedEngine, request: AnswerRequest, **options: Any) -> list[Piece]:
    return [piece async for piece in stream_text(engine, request, **options)]


def text_of(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def alone(engine: SharedEngine, request: AnswerRequest) -> str:
    with engine._alone():
        return engine.answerers.answer(request.name, request.prompt, request.settings)


def gather(*waiting: Awaitable[Any]) -> list[Any]:
    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*waiting)

    return asyncio.run(all_of_them())


def test_answers_in_company_are_those_alone_to_the_token(every_engine: SharedEngine) -> None:
    engine = every_engine
    lengths = (1, 3, 9, 14)
    requests = [
        ask(engine, name, text, max_new_tokens=lengths[(index + row) % 4], do_sample=index == 2, seed=row)
        for row, text in enumerate(TEXTS)
        for index, name in enumerate(engine.names())
    ]
    answers = gather(*(pieces_of(engine, request) for request in requests))
    for request, pieces in zip(requests, answers, strict=True):
        assert text_of(pieces) == alone(engine, request), request
        ended = "length" if pieces[-1].num_tokens == request.settings.max_new_tokens else "stop"
        assert pieces[-1].finish_reason in (ended, "stop")
    assert engine.load().running == engine.load().waiting == 0
    assert engine.failure() is None


def test_a_prefix_is_in_the_cache_once_however_many_ask_for_it(engine: SharedEngine) -> None:
    seen = []

    async def watched(request: AnswerRequest) -> None:
        async for _ in engine.generate(request):
            seen.append(engine.load())

    gather(*(watched(ask(engine, "support", TEXTS[0], max_new_tokens=24)) for _ in range(4)))
    request = ask(engine, "support", TEXTS[0], max_new_tokens=24)
    own = blocks_of(37 + len(request.prompt) + 24) - 37 // PAGE_SIZE
    assert max(load.used_slots for load in seen) == (PREFIX_BLOCKS + 4 * own) * PAGE_SIZE
    assert engine.load().used_slots == PREFIX_BLOCKS * PAGE_SIZE


def test_more_than_the_cache_holds_waits_and_is_answered(engine: SharedEngine) -> None:
    requests = [ask(engine, "base", f"{TEXTS[3]}{number}", max_new_tokens=5) for number in range(12)]
    waiting = []

    async def answer(request: AnswerRequest) -> list[Piece]:
        pieces = stream_text(engine, request)
        first = await anext(pieces)
        waiting.append(engine.load().waiting)
        return [first, *[piece async for piece in pieces]]

    answers = gather(*map(answer, requests))
    assert max(waiting) > 0
    assert [text_of(pieces) for pieces in answers] == [alone(engine, request) for request in requests]


@pytest.mark.parametrize("name", ["support", "style"])
def test_who_leaves_frees_the_place_at_once(engine: SharedEngine, name: str) -> None:
    async def leave() -> int:
        async with aclosing(engine.generate(ask(engine, name, TEXTS[0], max_new_tokens=200))) as arrivals:
            await anext(arrivals)
        return engine.load().running

    async def be_cancelled() -> int:
        task = asyncio.create_task(pieces_of(engine, ask(engine, name, TEXTS[0], max_new_tokens=200)))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.wait([task])
        return engine.load().running

    assert gather(leave(), be_cancelled())[1] == 0
    assert engine.load().used_slots == PREFIX_BLOCKS * PAGE_SIZE
    request = ask(engine, name, TEXTS[1])
    assert text_of(gather(pieces_of(engine, request))[0]) == alone(engine, request)


def test_an_answer_ends_before_a_stop_string_and_never_shows_its_beginning(engine: SharedEngine) -> None:
    request = ask(engine, "ads", TEXTS[1], max_new_tokens=14)
    whole = alone(engine, request)
    word = whole[3:5]
    pieces = gather(pieces_of(engine, request, stop=[word, "nowhere"]))[0]
    assert text_of(pieces) == whole[: whole.index(word)]
    assert pieces[-1].finish_reason == "stop"
    assert engine.load().running == 0


def test_what_finds_no_room_is_refused_with_both_lengths(engine: SharedEngine) -> None:
    longest = engine.longest_prompt("support", 8)
    assert longest == (400 // PAGE_SIZE - PREFIX_BLOCKS) * PAGE_SIZE - 37 - 8
    whole = AnswerRequest("support", [5] * longest, GenerationSettings(max_new_tokens=8))
    assert gather(pieces_of(engine, whole))[0][-1].finish_reason
    with pytest.raises(UserError, match=f"has {longest + 1} tokens, and {longest} find room beside an answer of 8"):
        gather(pieces_of(engine, AnswerRequest("support", [5] * (longest + 1), whole.settings)))
    with pytest.raises(UserError, match="There is no 'nobody' to answer, only base, ads"):
        gather(pieces_of(engine, AnswerRequest("nobody", [5], whole.settings)))


@pytest.mark.parametrize("method", ["support", "style"])
def test_adapters_come_and_go_while_others_are_answered(
    engine: SharedEngine, tiny_model_dirs: dict[str, Path], tmp_path: Path, method: str
) -> None:
    path = save_adapter(tiny_model_dirs["chatglm3"], tmp_path / "new", METHODS[method], seed=11)
    under_way = [ask(engine, "ads", TEXTS[0], max_new_tokens=40), ask(engine, "base", TEXTS[1], max_new_tokens=40)]
    used = engine.load().used_slots

    async def come_and_go() -> tuple[AnswerRequest, str]:
        await asyncio.to_thread(engine.add_adapter, "new.1", path)
        request = ask(engine, "new.1", TEXTS[2], max_new_tokens=12)
        pieces = stream_text(engine, request)
        first = await anext(pieces)
        engine.remove_adapter("new.1")
        assert "new.1" not in engine.names()
        with pytest.raises(UserError, match="There is no 'new.1'"):
            await pieces_of(engine, request)
        return request, first.text + "".join([piece.text async for piece in pieces])

    (request, text), *others = gather(come_and_go(), *(pieces_of(engine, request) for request in under_way))
    assert [text_of(pieces) for pieces in others] == [alone(engine, request) for request in under_way]
    assert engine.load().used_slots == used and "new.1" not in engine.answerers.by_name
    engine.add_adapter("new.1", path)
    try:
        assert text == alone(engine, request)
        with pytest.raises(UserError, match="name new.1 is taken"):
            engine.add_adapter("new.1", path)
    finally:
        engine.remove_adapter("new.1")


def test_an_adapter_that_cannot_be_loaded_leaves_everything_as_it_was(
    engine: SharedEngine, tiny_model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    large = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=400)
    path = save_adapter(tiny_model_dirs["chatglm3"], tmp_path / "large", large, seed=1)
    before = engine.names(), engine.load()
    with pytest.raises(UserError, match="no room for large"):
        engine.add_adapter("large", path)
    with pytest.raises(UserError, match="holds no model or adapter itself"):
        engine.add_adapter("empty", str(tmp_path))
    with pytest.raises(UserError, match="no adapter 'nobody' to remove, only ads"):
        engine.remove_adapter("nobody")
    assert (engine.names(), engine.load()) == before
    with pytest.raises(UserError, match="cache of 64 tokens does not hold the prefixes"):
        open_engine(engine.answerers.model_args, {"large": path}, cache_tokens=64)


def test_a_further_lora_adapter_that_is_not_whole_leaves_the_others_as_they_were(
    engine: SharedEngine, tiny_model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    base, style = tiny_model_dirs["chatglm3"], METHODS["style"]
    ia3 = IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[])
    paths = {name: save_adapter(base, tmp_path / name, style, seed=1) for name in ("rank", "weights")}
    LoraConfig(task_type="CAUSAL_LM", **LORA | {"r": 2}).save_pretrained(paths["rank"])
    save_file({"other": torch.zeros(1)}, tmp_path / "weights" / "adapter_model.safetensors")
    paths["ia3"] = save_adapter(base, tmp_path / "ia3", ia3, seed=1)
    request = ask(engine, "style", TEXTS[1])
    expected = alone(engine, request)
    told = {"rank": "size mismatch", "weights": "8 tensors are missing", "ia3": "beside one of lora"}
    for name, path in paths.items():
        with pytest.raises(UserError, match=told[name]):
            engine.add_adapter(name, path)
        assert name not in engine.names() and text_of(gather(pieces_of(engine, request))[0]) == expected


def test_an_adapter_that_goes_while_a_request_comes_in_answers_it(
    engine: SharedEngine, tiny_model_dirs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_adapter(tiny_model_dirs["chatglm3"], tmp_path / "new", METHODS["support"], seed=11)
    engine.add_adapter("new", path)
    request, check = ask(engine, "new", TEXTS[2]), engine._check
    expected = alone(engine, request)

    def check_then_remove(asked: AnswerRequest) -> None:
        check(asked)
        engine.remove_adapter("new")  # as another thread may do it

    monkeypatch.setattr(engine, "_check", check_then_remove)
    assert text_of(gather(pieces_of(engine, request))[0]) == expected
    assert "new" not in engine.answerers.by_name


@pytest.mark.parametrize("name", ["ads", "style"])
def test_a_failed_worker_tells_all_who_wait(
    tiny_model_dirs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (engine,) = opened_once(tiny_model_dirs["chatglm3"], tmp_path)

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no memory left")

    monkeypatch.setattr(engine.answerers.model.model, "forward", fail)

    async def ask_twice() -> list[Any]:
        asked = (pieces_of(engine, ask(engine, name, text)) for text in TEXTS * 3)  # more than find room
        return await asyncio.gather(*asked, return_exceptions=True)

    answers = asyncio.run(ask_twice())
    assert all(isinstance(answer, EngineStopped) and "no memory left" in str(answer) for answer in answers), answers
    assert "no memory left" in str(engine.failure())
    with pytest.raises(EngineStopped):
        gather(pieces_of(engine, ask(engine, name, TEXTS[0])))
    engine.close()


def opened_once(base: Path, folder: Path) -> list[SharedEngine]:
    return [next(opened(base, folder, cache_tokens=400))]


def test_closing_waits_for_what_is_under_way_and_takes_nothing_new(
    tiny_model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    (engine,) = opened_once(tiny_model_dirs["chatglm3"], tmp_path)
    request = ask(engine, "ads", TEXTS[1], max_new_tokens=20)
    expected = alone(engine, request)

    async def close_meanwhile() -> tuple[str, str]:
        pieces = stream_text(engine, request)
        first = await anext(pieces)
        closing = asyncio.create_task(asyncio.to_thread(engine.close, 30.0))
        await asyncio.sleep(0.01)
        with pytest.raises(EngineStopped, match="shutting down"):
            await pieces_of(engine, request)
        rest = "".join([piece.text async for piece in pieces])
        await closing
        return first.text + rest

    assert asyncio.run(close_meanwhile()) == expected
