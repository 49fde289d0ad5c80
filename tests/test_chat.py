"""Chat: who answers, what of a conversation goes into a prompt, the commands, and what is streamed."""

import subprocess
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from warm_starts import warm_python

from glm_peft.arguments.data import DataArguments
from glm_peft.arguments.model import ModelArguments
from glm_peft.errors import UserError
from glm_peft.models.chat_formats import get_chat_format
from glm_peft.prediction.evaluation import Answering
from glm_peft.prediction.generation_settings import GenerationSettings
from glm_peft.preprocessing.split_loading import load_splits
from glm_peft.serving.answerers import Answerers, _arguments_of, open_answerers, parse_adapters
from glm_peft.serving.chat_session import ChatSession
from glm_peft.serving.console import read_questions
from glm_peft.serving.dialogue import Dialogue
from glm_peft.serving.streaming import TextStream

PROJECT = Path(__file__).parents[1]
SETTINGS = GenerationSettings(max_new_tokens=12)
METHODS = {
    "ads": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "style": LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    "support": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "tone": LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["o_proj"], init_lora_weights=False),
}


@pytest.fixture(scope="module")
def base(tiny_model_dirs: dict[str, Path]) -> Path:
    return tiny_model_dirs["chatglm3"]


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("adapters")
    for seed, (name, config) in enumerate(METHODS.items()):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        get_peft_model(model, config).save_pretrained(folder / name)
    return {name: str(folder / name) for name in METHODS}


@pytest.fixture(scope="module")
def answerers(base: Path, adapters: dict[str, str]) -> Answerers:
    return open_answerers(ModelArguments(model_name_or_path=str(base)), adapters)


@pytest.fixture
def session(answerers: Answerers) -> ChatSession:
    return ChatSession(answerers, SETTINGS, Dialogue(), "ads")


@pytest.fixture
def small_window(answerers: Answerers, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of 512 positions."""
    monkeypatch.setattr(answerers.by_name["base"].model.config, "max_position_embeddings", 512)


def prompt_of(answering: Answering, *contents: str) -> list[int]:
    roles = ("user", "assistant") * len(contents)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return answering.chat_format.encode_prompt(answering.tokenizer, messages).ids


def answers_of(answerers: Answerers, *names: str) -> list[str]:
    """What each answers to the same first question."""
    return [answerers.answer(name, prompt_of(answerers.by_name[name], "你好"), SETTINGS) for name in names]


def test_each_adapter_and_the_base_answer_as_alone_whoever_answered_before(base, adapters, answerers):
    tokenizer = AutoTokenizer.from_pretrained(base)
    alone = {}
    for name in ("base", *adapters):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, adapters[name]) if name in adapters else model
        answering = Answering(model, tokenizer, get_chat_format(tokenizer))
        (alone[name],) = answering.generate({"input_ids": [prompt_of(answering, "你好")]}, SETTINGS)
    assert len(set(alone.values())) == len(alone)
    order = ("style", "base", "ads", "tone", "support", "style", "ads", "base")
    assert answers_of(answerers, *order) == [alone[name] for name in order]


def test_a_stream_is_the_answer_in_pieces_of_whole_characters(answerers):
    answering, pieces = answerers.by_name["ads"], []
    stream = TextStream(answering, pieces.append)
    answer = answerers.answer("ads", prompt_of(answering, "你好"), SETTINGS, stream)
    stream.finish(answer)
    assert "".join(pieces) == answer and len(pieces) > 1


def test_a_character_of_several_tokens_is_streamed_as_one():
    class Bytes:
        def decode(self, ids: list[int]) -> str:
            return bytes(ids).decode(errors="replace")

    pieces: list[str] = []
    stream, ids = TextStream(Bytes(), pieces.append), torch.tensor([[0, *"海😀a".encode()]])
    for end in range(2, ids.shape[1] + 1):
        stream(ids[:, :end], None)
    assert pieces == ["海", "😀", "a"]


def test_a_chat_goes_on_from_its_history(session, answerers, capsys):
    session.take("你好")
    first = capsys.readouterr().out.removesuffix("\n")
    session.take("再说一次")
    second = capsys.readouterr().out.removesuffix("\n")
    prompt = prompt_of(answerers.by_name["ads"], "你好", first, "再说一次")
    assert second == answerers.answer("ads", prompt, SETTINGS)
    assert [message["content"] for message in session.dialogue.messages] == ["你好", first, "再说一次", second]
    session.take("/retry")
    assert capsys.readouterr().out.removesuffix("\n") == second
    session.take("/undo")
    session.take("/undo")
    assert session.dialogue.messages == []
    session.take("/undo")
    assert "nothing to take back" in capsys.readouterr().err


def test_an_adapter_is_asked_as_it_was_trained(answerers):
    asked = {**answerers.asked, "ads": DataArguments(system_text="你是店员。", source_prefix="问：")}
    encode = partial(replace(answerers, asked=asked).encode, "ads")
    messages = [{"role": "system", "content": "你是店员。"}, {"role": "user", "content": "问：你好"}]
    assert encode([{"role": "user", "content": "你好"}]) == answerers.encode("ads", messages)
    assert answerers.encode("base", messages[1:]) == prompt_of(answerers.by_name["base"], "问：你好")


def test_compare_shows_base_and_adapter_and_keeps_the_conversation(session, answerers, capsys):
    session.take("你好")
    kept = list(session.dialogue.messages)
    capsys.readouterr()
    session.take("/compare")
    shown = capsys.readouterr()
    assert (shown.out.splitlines(), shown.err) == (answers_of(answerers, "base", "ads"), "base:\nads:\n")
    assert session.dialogue.messages == kept


def test_what_is_saved_is_read_as_a_row_of_training(session, tmp_path, capsys):
    session.take("/system 你是店员。")
    session.take("你好")
    session.take("/adapter base")
    session.take("再见")
    session.take(f"/save {tmp_path}/chat.jsonl")
    split = load_splits(DataArguments(train_file=str(tmp_path / "chat.jsonl")), ["train"])["train"]
    assert split.conversations[0].messages == session.dialogue.whole()
    assert [message["role"] for message in split.conversations[0].messages] == ["system", *["user", "assistant"] * 2]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/nope", "There is no command /nope, only /help, /clear"),
        ("/adapter other", "There is no adapter 'other'; choose one of base, ads, style, support, tone."),
        ("/save", "Give /save a FILE"),
        ("/compare", "There is no question yet."),
        ("字" * 600, "tokens with the system text, and"),
    ],
)
def test_what_is_wrong_is_told_and_the_chat_goes_on(session, small_window, capsys, line, words):
    session.take(line)
    shown = capsys.readouterr()
    assert words in shown.err and shown.out == "" and session.dialogue.messages == []


def test_too_long_a_history_loses_its_oldest_turns_and_says_so(session, small_window, capsys):
    for number in range(40):
        session.dialogue.add("user", f"第{number}个问题" + "长" * 30)
        session.dialogue.add("assistant", "好" * 30)
    session.take("最后")
    forgotten = session.dialogue.forgotten
    assert f"The oldest {forgotten} messages no longer fit into the prompt." in capsys.readouterr().err
    assert forgotten % 2 == 0 and 0 < forgotten < 80
    assert len(session.dialogue.messages) == 82


def test_a_question_without_an_answer_is_taken_back_and_told(session, monkeypatch, capsys):
    monkeypatch.setattr(session, "_answer", lambda name: "")
    session.take("你好")
    assert session.dialogue.messages == []
    assert capsys.readouterr().err == "The answer is empty, and the question is taken back.\n"


def test_ctrl_c_ends_the_answer_and_not_the_chat(session, monkeypatch, capsys):
    calls = []

    def interrupted(stream: TextStream, *args: object, **kwargs: object) -> torch.Tensor:
        calls.append(None)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return original(stream, *args)

    original = TextStream.__call__
    monkeypatch.setattr(TextStream, "__call__", interrupted)
    session.take("你好")
    monkeypatch.undo()
    shown = session.dialogue.messages[-1]["content"]
    assert capsys.readouterr().out == shown + "\n" and shown
    session.take("你好")
    assert len(session.dialogue.messages) == 4


def test_questions_of_a_terminal_may_have_several_lines_and_be_thrown_away(monkeypatch):
    typed = iter(["一\\", "二\\", "三", KeyboardInterrupt, " ", "四", EOFError])

    def read(prompt: str) -> str:
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)
    assert list(read_questions(lambda: "> ", is_typed=True)) == ["一\n二\n三", "四"]


@pytest.mark.parametrize("words", [["ads"], ["=x"], ["ads="], ["a=x", "a=y"], ["base=x"]])
def test_adapters_have_names_of_their_own(words):
    with pytest.raises(UserError, match=f"--adapters {words[-1]}: "):
        parse_adapters(words)
    with pytest.raises(UserError, match="the name adapter is taken"):
        parse_adapters(["adapter=x"], "output/other")


def test_an_adapter_that_is_not_there_is_told_by_its_name(base, adapters):
    with pytest.raises(UserError, match=r"/none is not there.* \(the adapter lost\)\.$"):
        open_answerers(ModelArguments(model_name_or_path=str(base)), {**adapters, "lost": "/nowhere/none"})


def test_a_revision_is_of_the_one_adapter_that_it_is_given_for():
    given = ModelArguments("base", adapter_name_or_path="someone/a", adapter_revision="v1")
    assert [_arguments_of(path, given).adapter_revision for path in ("someone/a", "someone/b")] == ["v1", None]


def test_from_a_pipe_each_line_is_a_question_and_only_answers_are_printed(base, adapters, answerers, tmp_path):
    command = [warm_python(), "-m", "glm_peft.chat", "--model_name_or_path", str(base), "--max_new_tokens", "12"]
    command += ["--adapters", f"ads={adapters['ads']}", f"support={adapters['support']}"]
    piped = "你好\n\n/clear\n/adapter base\n你好\n".encode()
    done = subprocess.run(command, input=piped, capture_output=True, cwd=PROJECT, check=True)
    assert done.stdout.decode().splitlines() == answers_of(answerers, "ads", "base")
