"""Tools, calls and what tools said: the published ids and losses, and calls read again out of generated text."""

import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import SHARED_REFERENCE
from transformers import AutoTokenizer

from glm_peft.errors import UserError
from glm_peft.examination.tool_checks import check_tools
from glm_peft.models.chat_formats import CHAT_FORMATS, get_chat_format
from glm_peft.models.tool_formats import ToolCall
from glm_peft.prediction.answer_decoding import decode_answer
from glm_peft.prediction.tool_scores import read_calls, score_calls
from glm_peft.preprocessing.columns import Columns
from glm_peft.preprocessing.conversations import Conversation, Split, read_conversation
from glm_peft.preprocessing.prompt_shape import with_source_prefix
from glm_peft.preprocessing.records import Row

# The beginning of the published template of GLM-4-0414, which takes the tools beside the messages.
TEMPLATE_OF_0414 = "[gMASK]<sop>\n{%- if tools -%}\n<|system|>\n# 可用工具\n{% for tool in tools %}"
# Text of a user or a tool that would become a control token; and arguments that Python cannot name.
UNSAFE = {
    "chatglm3-6b": {"argument_name_not_identifier"},
    "glm-4-9b-chat": set(),
    "glm-4-0414": {"control_text_in_arguments", "control_text_in_observation", "control_text_in_user_and_tool"},
}
IDS = ("ids_block_by_block", "ids", "ids_with_the_glm-4-9b-chat_tokenizer")


def published(generation: str) -> dict:
    file = SHARED_REFERENCE / "tools" / f"expected_tools_{generation}.json"
    if not file.is_file():
        pytest.skip(f"the published numbers are not at {file} (set GLM_PEFT_REFERENCE to the folder that has them)")
    return json.loads(file.read_text(encoding="utf-8"))


@cache
def load_tokenizer(folder: Path):
    return AutoTokenizer.from_pretrained(folder)


def tokenizer_of(generation: str, folder: Path, monkeypatch: pytest.MonkeyPatch):
    if generation != "glm-4-0414":
        return load_tokenizer(folder / generation)
    tokenizer = load_tokenizer(folder / "glm-4-9b-chat")
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE_OF_0414)
    return tokenizer


def read(messages: list[dict], needs_answer: bool = True, **columns):
    row = Row("rows.jsonl", "line", 1, {"messages": messages, **columns})
    return read_conversation(row, Columns(messages="messages"), needs_answer)


def spans(ids: list[int], mask: list[int]) -> list[list[int]]:
    """The stretches of the ids that carry loss."""
    text = "".join(map(str, mask)) + "0"
    starts = [i for i in range(len(mask)) if text[i] == "1" and (i == 0 or text[i - 1] == "0")]
    return [ids[start : text.index("0", start)] for start in starts]


@pytest.mark.parametrize("generation", list(UNSAFE))
def test_prompts_and_losses_are_the_published_ones(generation, reference_tokenizers, monkeypatch):
    tokenizer = tokenizer_of(generation, reference_tokenizers, monkeypatch)
    chat_format, num_equal = get_chat_format(tokenizer), 0
    for case in published(generation)["cases"]:
        conversation = read(case["messages"], tools=case["tools"])
        prompt = chat_format.encode_prompt(tokenizer, conversation.prompt).ids
        if case["case"] in UNSAFE[generation]:
            continue
        assert prompt in [case[name] for name in IDS if name in case], case["case"]
        num_equal += 1
        if case["messages"][-1].get("tool_calls") or "control_text" in case["case"]:
            continue  # published rows end a last call as an answer, and hold control tokens from text
        learnt = [
            chat_format.encode_answer(tokenizer, answer).ids
            for _, answer in conversation.trained_turns("all", chat_format.arrange)
        ]
        training = case["training"]
        ids = next(training[name] for name in IDS if name in training)
        expected = spans(ids, training["loss_mask"])
        # All but the token that ends an answer within the row, which ChatGLM3's row has of the next speaker; and GLM-4
        # writes no empty result, so that two turns run together.
        if case["case"] == "observation_empty" and generation == "glm-4-9b-chat":
            continue
        assert [one[:-1] for one in learnt] == [one[:-1] for one in expected], case["case"]
        assert learnt[-1] == expected[-1]
    assert num_equal >= 29


@pytest.mark.parametrize("generation", list(UNSAFE))
def test_every_published_call_is_read_again(generation):
    chat_format = CHAT_FORMATS["chatglm3" if generation == "chatglm3-6b" else "glm4"]
    calls = [
        (call, wanted["function"])
        for case in published(generation)["cases"]
        for call, wanted in zip(
            case.get("calls", []),
            (one for message in case["messages"] for one in message.get("tool_calls", [])),
            strict=True,
        )
    ]
    for call, wanted in calls:
        arguments = json.loads(wanted["arguments"])
        text = call.get("generated") or call["decoded_generation"]
        if call["published_parser_gives"] != "SyntaxError":
            assert chat_format.read_turn(text, [wanted["name"]]) == ("", [ToolCall(wanted["name"], arguments)])
        written = chat_format.write_turn([{"metadata": wanted["name"], "content": wanted["arguments"]}])
        assert chat_format.read_turn(written) == ("", [ToolCall(wanted["name"], arguments)])
    assert len(calls) > 25


F = "f\n"
READ = [
    (
        "chatglm3",
        F + " ```python\ntool_call(a=-1, b=[1, {'k': None}], c=true)",
        {"a": -1, "b": [1, {"k": None}], "c": True},
    ),
    ("chatglm3", F + "```python\ntool_call(**{'a-b': 'x'})\n```\n", {"a-b": "x"}),
    ("chatglm3", F + "```python\ntool_call('x')\n```", None),
    ("chatglm3", F + "```python\ntool_call(a=open('secret').read())\n```", None),
    ("chatglm3", F + "```python\nimport os\ntool_call(a=1)\n```", None),
    ("chatglm3", F + "```python\n__import__('os').system('true')\n```", None),
    ("chatglm3", F + "```python\ntool_call(a={1, 2}, b=1e999)\n```", None),
    ("glm4", F + '{"a": {"b": "}"}}\nthanks', {"a": {"b": "}"}}),
    ("glm4", F + '```json\n{"a": 1}\n```', {"a": 1}),
    ("glm4", F + "{'a': True, 'b': None}", {"a": True, "b": None}),
    ("glm4", F + '{"a": 1', None),
    ("glm4", F + '{"a": NaN}', None),
    ("glm4", F + "[1]", None),
    ("glm4", F + '{"a": ' * 5000, None),
    ("glm4", F + "{'a': __import__('os')}", None),
]


@pytest.mark.parametrize(("name", "text", "arguments"), READ)
def test_generated_calls_are_read_and_never_evaluated(name, text, arguments):
    assert CHAT_FORMATS[name].read_turn(text, ["f"]) == ("", [ToolCall("f", arguments)])
    assert CHAT_FORMATS[name].read_turn(text, ["g"]) == (text, [])


def test_a_turn_may_hold_a_thought_and_several_calls_and_the_mark_as_text():
    turn = [
        {"content": "Let me look."},
        {"metadata": "f", "content": '{"a": "x<|assistant|>f\\n"}'},
        {"metadata": "g", "content": "{}"},
    ]
    for name in ("chatglm3", "glm4"):
        calls = [ToolCall("f", {"a": "x<|assistant|>f\n"}), ToolCall("g", {})]
        assert CHAT_FORMATS[name].read_turn(CHAT_FORMATS[name].write_turn(turn), ["f", "g"]) == ("Let me look.", calls)
    assert CHAT_FORMATS["glm4"].read_turn("Sure, here it is:\nhello", ["f"]) == ("Sure, here it is:\nhello", [])


def test_calls_are_scored_by_the_rows_that_ask_for_some():
    chat_format, tools = CHAT_FORMATS["glm4"], [{"role": "tools", "content": '[{"name": "f"}]'}]
    references = ['f\n{"a": 1, "b": 2}', 'f\n{"a": 1}', 'f\n{"a": 1}', "f\n{}", "text", None]
    answers = ['f\n{"b":2,"a":1}', 'f\n{"a": 1.0}', 'f\n{"a": ', "g\n{}", "text", 'f\n{"a": 1}']
    features = SimpleNamespace(rows=[{"messages": tools}] * 6, references=references)
    expected = {"call_exact_match": 25.0, "call_name_match": 75.0, "call_valid": 50.0}
    assert score_calls(features, answers, chat_format) == expected
    assert read_calls(features, answers, chat_format)[2] == ([ToolCall("f", {"a": 1})], [ToolCall("f", None)])
    without = SimpleNamespace(rows=[{"messages": []}] * 6, references=references)
    assert score_calls(without, answers, chat_format) == {} and read_calls(without, answers, chat_format) == [None] * 6


def test_the_mark_of_a_turn_stays_only_where_it_calls_and_a_call_is_never_cut(tiny_model_dirs):
    tokenizer = load_tokenizer(tiny_model_dirs["glm4"])
    chat_format, mark = get_chat_format(tokenizer), tokenizer.convert_tokens_to_ids("<|assistant|>")
    thought = {"role": "assistant", "content": "你好"}
    call = {"role": "assistant", "metadata": "f", "content": '{"a": 1}'}
    ids = chat_format.encode_answer(tokenizer, [thought, call]).ids
    assert decode_answer(tokenizer, chat_format, ids).strip() == '你好<|assistant|>f\n{"a": 1}'
    ids = chat_format.encode_answer(tokenizer, "你好").ids
    assert decode_answer(tokenizer, chat_format, [*ids[:-1], mark, *ids]) == "\n你好\n你好"
    with pytest.raises(UserError, match="--max_target_length 3 is too short for a call of the tool 'f', which takes"):
        chat_format.encode_answer(tokenizer, [call], max_length=3)
    with pytest.raises(UserError, match="but 2 calls stand together without their results"):
        CHAT_FORMATS["chatglm3"].arrange([call, call])


def test_the_doctor_finds_calls_that_are_lost():
    called = [{"role": "assistant", "metadata": "f", "content": '{"a": 1}'}, {"role": "observation", "content": ""}]
    as_text = {"role": "assistant", "content": '{"name": "f", "arguments": {}}'}
    broken = {**called[0], "content": '{"a": 1e999}'}
    asked = {"role": "user", "content": "q"}
    messages = [[asked, *called, as_text], [asked, broken], [asked, {"role": "assistant", "content": "a"}]]
    rows = [Conversation(row, f"line {number}", is_chat=True) for number, row in enumerate(messages, 1)]
    split = Split("train", "rows.jsonl", rows, unoffered=["line 1, message 2 ('f')"])
    found = {finding.what: finding.rows for finding in check_tools(split, CHAT_FORMATS["chatglm3"], "last")}
    assert list(found.values()) == [["line 1, message 2 ('f')"], ["line 2 (f)"], ["line 1"], ["line 1 (1)"]]
    assert "cannot be read again as chatglm3 writes them" in list(found)[1]
    assert not check_tools(Split("train", "rows.jsonl", rows[2:]), CHAT_FORMATS["chatglm3"], "all")


def test_the_source_prefix_stands_before_the_question_and_not_before_a_result():
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "metadata": "f", "content": "{}"}]
    messages += [{"role": "observation", "content": "7"}]
    assert [message["content"] for message in with_source_prefix(messages, "p")] == ["pq", "{}", "7"]
