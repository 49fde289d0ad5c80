"""Rows into conversations: every known shape, and one sentence with place and finding for each bad row."""

import gc
import json
import logging
from pathlib import Path

import pytest
from data_fakes import make_data_args

from glm_peft.errors import UserError
from glm_peft.models.chat_formats import CHAT_FORMATS
from glm_peft.preprocessing.conversations import paused_collection
from glm_peft.preprocessing.split_loading import load_splits

PAIR = {"content": "q", "summary": "a"}
CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(*rows: object, name: str = "train.json") -> str:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=True) for row in rows]
    Path(name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return name


def load(*rows: object, split: str = "train", name: str = "train.json", **flags: object):
    file = write(*rows, name=name)
    return load_splits(make_data_args(**{f"{split}_file": file}, **flags), [split])[split]


def turns(conversation) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in conversation.messages]


def error_of(*rows: object, **flags: object) -> str:
    with pytest.raises(UserError) as error:
        load(*rows, **flags)
    assert "\n" not in str(error.value)
    return str(error.value)


PAIRS = [("content", "summary"), ("prompt", "response"), ("instruction", "output"), ("question", "answer")]
PAIRS += [("prompt", "completion"), ("query", "response"), ("question", "response"), ("input", "target")]


@pytest.mark.parametrize("names", PAIRS)
def test_well_known_columns_are_read_without_flags_and_the_log_says_so(caplog, names):
    caplog.set_level(logging.INFO, logger="glm_peft")
    [conversation] = load(dict(zip(names, "qa", strict=True)))
    assert turns(conversation) == [("user", "q"), ("assistant", "a")]
    form = "Alpaca's" if "instruction" in names else "question and answer"
    assert f"train.json: reading the columns '{names[0]}', '{names[1]}' as {form}.\n" in caplog.text


@pytest.mark.parametrize("names", PAIRS)
@pytest.mark.parametrize("by_flags", [False, True])
def test_history_and_system_text_are_read_beside_every_pair(names, by_flags):
    flags = dict(zip(("prompt_column", "response_column"), names, strict=True)) if by_flags else {}
    row = dict(zip(names, "qa", strict=True)) | {"history": [["q0", "a0"]], "system": "s"}
    split = load(row, {**row, "history": "", "system": None}, **flags)
    roles = ["system", "user", "assistant", "user", "assistant"]
    assert turns(split.conversations[0]) == list(zip(roles, ["s", "q0", "a0", "q", "a"], strict=True))
    assert turns(split.conversations[1]) == [("user", "q"), ("assistant", "a")]
    assert not split.unread


def test_alpacas_input_follows_the_instruction():
    row = {"instruction": "翻译", "output": "a", "input": "hello"}
    one, other = load(row, {**row, "input": ""})
    assert [conversation.prompt[0]["content"] for conversation in (one, other)] == ["翻译\nhello", "翻译"]
    flags = {"prompt_column": "instruction", "response_column": "output"}
    assert load(row, **flags).conversations == load(row).conversations
    [other_way] = load({**row, "instruction": ""})
    assert other_way.prompt[0]["content"] == "hello"


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (
            [{"instruction": "q", "input": "", "output": "a"}, {"instruction": "q", "output": "a", "system": "s"}],
            "'instruction', 'input', 'output', 'system' as Alpaca's; an input follows its instruction on a line",
        ),
        ([{"conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]}], "as ShareGPT's"),
        ([{"messages": CHAT}, {"messages": CHAT, "system": "s"}], "'messages', 'system' as messages.\n"),
    ],
)
def test_the_log_says_in_one_line_which_form_is_read_and_which_columns(caplog, rows, told):
    caplog.set_level(logging.INFO, logger="glm_peft")
    load(*rows)
    [line] = [record.message for record in caplog.records if "reading the columns" in record.message]
    assert told in f"{line}\n"


@pytest.mark.parametrize(
    ("first", "second", "found"),
    [
        (PAIR, {"messages": CHAT}, "messages, column 'messages') than the first (question and answer)"),
        (
            {"messages": CHAT},
            {**PAIR, "messages": None},
            "question and answer, column 'content') than the first (mess",
        ),
        ({"input": "q", "output": "a"}, {"instruction": "i", "input": "q", "output": "a"}, "Alpaca's, column 'instr"),
    ],
)
def test_a_row_of_another_form_is_not_half_read(first, second, found):
    assert f"train.json, line 2, this row is of another form ({found}" in error_of(first, second)
    assert [bad_row.kind for bad_row in load(first, second, skip_bad_rows=True).left_out] == ["another form"]


def test_answers_without_loss_are_context_and_rows_without_any_are_told(caplog):
    muted, weighed = {**CHAT[1], "loss": False}, {**CHAT[1], "weight": 1}
    system = {"role": "system", "content": "s", "weight": 0}
    split = load({"messages": [system, CHAT[0], muted, CHAT[0], weighed]}, {"messages": [CHAT[0], muted]})
    [conversation] = split
    assert conversation.trained_turns("all", list) == [(conversation.messages[:4], conversation.messages[4:])]
    assert split.without_loss == ["train.json, line 2"] and not split.unread
    assert "no answer carries loss in 1 row (train.json, line 2)." in caplog.text
    told = error_of({"messages": [CHAT[0], weighed, CHAT[0], muted]}, train_on="last")
    assert "no other row is left to learn from" in told


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({**CHAT[1], "loss": 0}, "'loss' of message 2 must be true or false, found the number 0"),
        ({**CHAT[1], "weight": -0.5}, "'weight' of message 2 must be a number of 0 or more, found the number -0.5"),
        ({**CHAT[1], "weight": float("inf")}, "'weight' of message 2 must be a number of 0 or more"),
        ({**CHAT[1], "weight": "2"}, "'weight' of message 2 must be a number of 0 or more, found the text "),
        ({**CHAT[1], "weight": False}, "'weight' of message 2 must be a number of 0 or more"),
        ({**CHAT[1], "weight": 1, "loss": False}, "'loss' and 'weight' of message 2 contradict each other"),
    ],
)
def test_a_loss_that_cannot_be_is_told(message, words):
    assert f"train.json, line 1, column 'messages': {words}" in error_of({"messages": [CHAT[0], message]})
    asked = error_of({"messages": [{**CHAT[0], "loss": True}, CHAT[1]]})
    assert "message 1 asks for loss, which only answers of the assistant can carry" in asked


def test_a_system_text_stands_before_messages_but_not_beside_their_own():
    [conversation] = load({"messages": CHAT, "who": "s"}, system_column="who")
    assert turns(conversation)[0] == ("system", "s")
    twice = {"messages": [{"role": "system", "content": "t"}, *CHAT], "system": "s"}
    assert "column 'system': the conversation has another system message; keep one of the two" in error_of(twice)
    [conversation] = load({**twice, "system": "t"})
    assert conversation.messages == twice["messages"]
    assert "no column 'who'" in error_of(PAIR, system_column="who")


@pytest.mark.parametrize(
    ("rows", "flags", "line"),
    [
        (
            [{**PAIR, "tools": [1], "history": "of art", "id": 1}, {**PAIR, "tools": "[]", "id": 2}],
            {},
            "'tools' (1 row; no flag reads it), "
            "'history' (1 row; --history_column reads it beside a --prompt_column), 'id' (2 rows)",
        ),
        (
            [{**PAIR, "messages": CHAT, "question": "w"}],
            {"prompt_column": "content", "response_column": "summary"},
            "'messages' (1 row; read where --prompt_column is left out), 'question' (1 row; --prompt_column reads it)",
        ),
        (
            [{"Question": "q", "Answer": "a", "System": "s"}],
            {"prompt_column": "Question", "response_column": "Answer"},
            "'System' (1 row; --system_column reads it)",
        ),
        (
            [{"messages": [CHAT[0], {**CHAT[1], "thinking": "t"}], "answer": "b"}],
            {},
            "'answer' (1 row; --response_column reads it), 'messages[].thinking' (1 row; no flag reads it)",
        ),
    ],
)
def test_what_is_not_read_is_named_with_the_flag_that_reads_it(caplog, rows, flags, line):
    load(*rows, **flags)
    [record] = [record for record in caplog.records if "not read" in record.message]
    assert (record.levelname, record.message) == ("WARNING", f"train.json: not read: {line}.")


def test_rows_to_predict_are_read_by_the_pair_of_which_both_are_there():
    [conversation] = load({"prompt": "q", "completion": "a"}, split="test", name="test.json")
    assert conversation.answer == "a"
    [conversation] = load({"question": "q"}, split="test", name="test.json")
    assert (turns(conversation), conversation.answer) == ([("user", "q")], None)


def call(arguments: object = "{}", name: str = "f", **keys: object) -> dict:
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function, **keys}]}


RESULT = {"role": "tool", "content": "7"}
TOOL = {"name": "f", "parameters": {}}
CALLED = [("user", "q"), ("assistant", "{}"), ("observation", "7"), ("assistant", "a")]


@pytest.mark.parametrize(
    "middle",
    [
        [call(), RESULT],
        [
            {"role": "assistant", "content": "", "function_call": {"name": "f", "arguments": {}}},
            {**RESULT, "role": "function"},
        ],
        [{"role": "tool", "name": "f", "parameters": {}, "observation": 7}],
        [{"role": "assistant", "metadata": "f", "content": "{}"}, {"role": "observation", "content": "7"}],
        [{"role": "assistant", "metadata": "f", "content": " ```python\ntool_call()\n```"}, RESULT],
        [{"role": "assistant", "content": '{"name": "f", "arguments": {}}'}, {"role": "observation", "content": "7"}],
        [{"from": "function_call", "value": '{"name": "f", "arguments": {}}'}, {"from": "observation", "value": "7"}],
    ],
)
def test_calls_of_every_form_become_the_same_messages(middle):
    plain = {"messages": [CHAT[0], *middle, CHAT[1]]}
    as_glm4 = {"messages": [{"role": "system", "content": "", "tools": [{"type": "function", "function": TOOL}]}]}
    rows = [{**plain, "tools": [TOOL]}, {**plain, "tools": json.dumps([TOOL]), "system": "s"}]
    rows += [{"messages": as_glm4["messages"] + plain["messages"]}]
    tools = ("tools", json.dumps([TOOL]))
    split = load(*rows)
    assert [turns(conversation) for conversation in split] == [
        [tools, *CALLED],
        [("system", "s"), tools, *CALLED],
        [tools, *CALLED],
    ]
    assert not split.unread and not split.unoffered
    assert [message.get("metadata") for message in split.conversations[0].messages] == [None, None, "f", None, None]


def test_results_stand_in_the_order_of_their_calls_and_a_last_call_is_the_answer():
    calls = {"role": "assistant", "content": "Let me look."}
    calls["tool_calls"] = [call(name=name, id=name)["tool_calls"][0] for name in "xy"]
    results = [{**RESULT, "tool_call_id": name, "content": name} for name in "yx"]
    [conversation] = load({"messages": [CHAT[0], calls, *results, CHAT[1]]})
    assert [content for _, content in turns(conversation)][4:] == ["x", "y", "a"]
    [conversation] = load({"messages": [CHAT[0], calls]})
    assert (len(conversation.prompt), conversation.answer) == (1, "Let me look.\nx\n{}\ny\n{}")


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([call(), CHAT[1]], "message 2 calls the tool 'f', and the tool's answer does not follow"),
        ([RESULT, CHAT[1]], "message 2 is a tool's answer, and no call stands before it"),
        ([call(), RESULT, RESULT, CHAT[1]], "message 4 is a tool's answer, and no call stands before it"),
        ([call(id="x"), {**RESULT, "tool_call_id": "y"}], "message 3 answers the call 'y', and each of 'x' needs one"),
        ([call("{'a': 1}"), RESULT, CHAT[1]], "the arguments of the call of 'f' in message 2 are no JSON"),
        (
            [call("[1]"), RESULT, CHAT[1]],
            "of the call of 'f' in message 2 must be a JSON object, found the text \"[1]\"",
        ),
        ([call('{"a": NaN}'), RESULT, CHAT[1]], "in message 2 are no JSON"),
        ([call('{"a": 1, "a": 2}'), RESULT, CHAT[1]], "are no JSON (a name stands twice in an object), found"),
        ([call(name=""), RESULT, CHAT[1]], "a call in message 2 must name a tool, found the text"),
        ([{"role": "assistant", "tool_calls": "f"}], "the tool_calls of message 2 must be a list, found the text"),
        (
            [{"role": "user", "content": "q", "tool_calls": [1]}],
            "message 2 calls a tool, which only the assistant can",
        ),
        ([{"role": "tool_use", "content": "7"}], "the role of message 2 must be one of 'system', 'user', "),
        ([call(), RESULT, CHAT[0]], "message 4 has the role 'user' where 'assistant' must follow"),
    ],
)
def test_calls_that_cannot_be_used_are_told_with_their_message(messages, said):
    told = error_of({"messages": [CHAT[0], *messages], "tools": [TOOL]})
    assert told.startswith("train.json, line 1, column 'messages': ") and said in told


def test_rows_without_tools_offer_those_of_the_file():
    own = {"messages": [CHAT[0], call(), RESULT, CHAT[1]], "tools": [{"name": "g"}, TOOL]}
    tools = write([TOOL], name="tools.json")
    split = load(own, {"messages": CHAT}, tools_file=tools)
    assert [[tool["name"] for tool in json.loads(one.messages[0]["content"])] for one in split] == [["g", "f"], ["f"]]
    write([TOOL, TOOL], name="tools.json")
    assert error_of(own, tools_file=tools).startswith("--tools_file tools.json: the tool 'f' is named twice;")
    write([], name="tools.json")
    assert "--tools_file tools.json holds no tools" in error_of(own, tools_file=tools)
    assert "there is no such file" in error_of(own, tools_file="other.json")


def test_tools_are_named_once_and_calls_of_others_are_warned_of(caplog):
    row = {"messages": [CHAT[0], call(), RESULT, CHAT[1]]}
    assert "line 1, column 'tools': the tool 'f' is named twice" in error_of({**row, "tools": [TOOL, TOOL]})
    assert "column 'tools': tool 1 must be an object with the name" in error_of({**row, "tools": ["f"]})
    assert "column 'tools': the tools are no JSON" in error_of({**row, "tools": "f"})
    load({**row, "tools": [{"name": "g"}]}, row)
    assert "train.json, line 1, message 2 ('f') calls a tool that its row does not offer (2 such calls" in caplog.text


@pytest.mark.parametrize("form", ["chatglm3", "glm4"])
@pytest.mark.parametrize(
    "muted",
    [
        [{"role": "tool", "name": "f", "parameters": {}, "observation": 7, "loss": False}],
        [{"role": "tool", "name": "f", "parameters": {}, "observation": 7, "loss": False}] * 2,
        [{**call(), "weight": 0}, RESULT],
        [{**call(), "content": "t", "tool_calls": call()["tool_calls"] * 2, "weight": 0}, RESULT, RESULT],
    ],
)
def test_a_muted_call_is_context_with_its_thought_and_all_its_calls(muted, form):
    split = load({"messages": [CHAT[0], *muted, {"role": "tool", **TOOL, "observation": 8}, CHAT[1]]})
    [conversation], arrange = split, CHAT_FORMATS[form].arrange
    [call_turn, last] = conversation.trained_turns("all", arrange)
    assert call_turn == (
        arrange(conversation.messages)[:-3],
        [{"role": "assistant", "content": "{}", "metadata": "f"}],
    )
    assert last == (arrange(conversation.messages)[:-1], [CHAT[1]]) and not split.unread


def test_loss_in_conversations_with_tools_is_refused_where_it_cannot_be():
    glm4 = {"role": "assistant", "metadata": "f", "content": "{}"}
    told = error_of({"messages": [CHAT[0], {**CHAT[1], "loss": False}, glm4]})
    assert "column 'messages': messages 2 and 3 are one turn, of which all messages carry loss or none, with" in told
    assert "messages 2 and 3 are one turn" in error_of({"messages": [CHAT[0], {**CHAT[1], "weight": 2}, glm4]})
    told = error_of({"messages": [CHAT[0], glm4, {**RESULT, "loss": True}, CHAT[1]]})
    assert "message 3 asks for loss, which only answers of the assistant can carry" in told
    assert "no answer carries loss in 1 row" in error_of({"messages": [CHAT[0], {**call(), "weight": 0}]})


def test_keys_of_calls_that_hold_nothing_are_no_calls():
    [conversation] = load({"messages": [{**message, "tool_calls": None, "function_call": {}} for message in CHAT]})
    assert conversation.messages == CHAT


def test_the_place_of_what_is_not_read_in_a_conversation_tells_rows_apart():
    noted = {**CHAT[1], "thinking": "t"}
    rows = ([CHAT[0], noted, *CHAT], [*CHAT, CHAT[0], noted])
    one, other = load(*({"messages": messages} for messages in rows))
    assert one.unread != other.unread


def test_columns_are_read_by_their_flags():
    row = {"instruction": "q", "output": "a", "past": [["q0", "a0"], ["q1", "a1"]]}
    flags = {"prompt_column": "instruction", "response_column": "output", "history_column": "past"}
    [conversation] = load(row, **flags)
    assert [content for _, content in turns(conversation)] == ["q0", "a0", "q1", "a1", "q", "a"]
    assert (conversation.answer, conversation.prompt[-1]["content"], conversation.is_chat) == ("a", "q", False)


@pytest.mark.parametrize("history", [None, "", []])
def test_an_absent_history_is_none(history):
    row = {"prompt": "q", "response": "a"}
    first, second = load(row, {**row, "history": history})
    assert first.messages == second.messages


def test_history_that_only_later_rows_have_is_read():
    row = {"prompt": "q", "response": "a"}
    _, second = load(row, {**row, "history": [["q0", "a0"]]})
    assert len(second.messages) == 4


def test_history_and_messages_are_json_text_in_csv():
    line = '"[[""q0"", ""a0""]]"'
    [conversation] = load("prompt,response,history", f"q,a,{line}", name="train.csv")
    assert [content for _, content in turns(conversation)] == ["q0", "a0", "q", "a"]
    [chat] = load("messages", '"' + json.dumps(CHAT).replace('"', '""') + '"', name="chat.csv")
    assert chat.messages == CHAT


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_rows_of_messages_are_read(column):
    messages = [{"role": "system", "content": ""}, *CHAT, *CHAT]
    [conversation] = load({column: messages})
    assert conversation.messages == messages
    assert conversation.is_chat


def test_messages_may_be_from_and_value():
    [conversation] = load({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]})
    assert conversation.messages == CHAT


def test_test_rows_need_no_answer():
    rows = [{"content": "q"}, {"content": "q", "summary": None}, {"content": "q", "summary": ""}, PAIR]
    assert [conversation.answer for conversation in load(*rows, split="test")] == [None, None, None, "a"]
    chats = [{"messages": CHAT[:1]}, {"messages": [CHAT[0], {"role": "assistant", "content": ""}]}, {"messages": CHAT}]
    assert [conversation.answer for conversation in load(*chats, split="test")] == [None, None, "a"]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_an_empty_answer_to_learn_from_is_an_error(split):
    message = error_of(PAIR, {"content": "q", "summary": " "}, split=split)
    assert message == (
        "train.json, line 2, column 'summary': the answer is empty, found ' '; "
        "correct it, or leave such rows out with --skip_bad_rows."
    )


def chat_of(*roles: str) -> dict:
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"content": "q", "summary": "a"', "column 32: this is not JSON (Expecting ',' delimiter), found the end of"),
        (
            {"content": "q", "sumary": "a"},
            "there is no column 'summary', the nearest is 'sumary', the columns found are",
        ),
        ({"content": 3, "summary": "a"}, "column 'content': the prompt must be text, found the number 3"),
        ({"content": None, "summary": "a"}, "column 'content': the prompt must be text, found null"),
        ({"content": "", "summary": "a"}, "column 'content': the prompt is empty, found ''"),
        ({"content": "q", "summary": 7}, "column 'summary': the answer must be text, found the number 7"),
        ({"content": "q", "summary": ["a"]}, """column 'summary': the answer must be text, found the list ["a"]"""),
        ({"content": "q", "summary": "\ud800"}, "column 'summary': the answer holds '\\ud800', half of a character"),
    ],
)
def test_a_bad_row_of_columns_is_named_with_what_was_found(row, words):
    assert f"train.json, line 2, {words}" in error_of(PAIR, row)


@pytest.mark.parametrize(
    ("history", "words"),
    [
        (5, "the history must be a list, found the number 5"),
        ({"q": "a"}, 'the history must be a list, found the object {"q": "a"}'),
        ("[[1", "the history is text that is not JSON (Expecting ',' delimiter), found the text"),
        (["q", "a"], 'a history is a list of [question, answer] pairs, found the text "q" as pair 1'),
        ([["q", "a"], ["q"]], 'a history is a list of [question, answer] pairs, found the list ["q"] as pair 2'),
        ([["q", 4]], "the answer of history pair 1 must be text, found the number 4"),
        ([["q", "a"], ["", "a"]], "the question of history pair 2 is empty, found ''"),
    ],
)
def test_a_bad_history_is_named_with_what_was_found(history, words):
    good = {"prompt": "q", "response": "a", "history": []}
    assert f"train.json, line 2, column 'history': {words}" in error_of(good, {**good, "history": history})


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": "hello"}, "the conversation is text that is not JSON (Expecting value), found the text"),
        ({"messages": None}, "the conversation must be a list, found null"),
        ({"messages": []}, "the conversation has no question, found the list []"),
        ({"messages": [1]}, "message 1 must have 'role' and 'content', found the number 1"),
        ({"messages": [{"role": ["user"], "content": "q"}]}, "the role of message 1 must be one of"),
        ({"messages": [{"role": "user"}]}, "message 1 must have 'role' and 'content', found the object"),
        ({"messages": [{"role": "user", "content": []}]}, "the content of message 1 must be text, found the list []"),
        (
            chat_of("user", "bot"),
            "the role of message 2 must be one of 'system', 'user', 'human', 'assistant', 'gpt'",
        ),
        (chat_of("system"), "the conversation has no question"),
        (chat_of("user", "user"), "message 2 has the role 'user' where 'assistant' must follow"),
        (chat_of("assistant", "user"), "message 1 has the role 'assistant' where 'user' must follow"),
        (chat_of("user", "system"), "message 2 has the role 'system' where 'assistant' must follow"),
        (
            chat_of("user", "assistant", "user"),
            "the last message must be the assistant's answer, found one of the role",
        ),
        (
            {"messages": [CHAT[0], {"role": "assistant", "content": " "}]},
            "the assistant content of message 2 is empty",
        ),
    ],
)
def test_bad_messages_are_named_with_what_was_found(row, words):
    assert f"train.json, line 2, column 'messages': {words}" in error_of({"messages": CHAT}, row)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            {"prompt_column": "contents", "response_column": "summary"},
            "no column 'contents', the nearest is 'content'",
        ),
        ({"prompt_column": "content", "response_column": "Sumary"}, "no column 'Sumary', the nearest is 'summary'"),
        ({"prompt_column": "content"}, "--response_column is not given; the columns found are 'content', 'summary'."),
        ({"response_column": "summary"}, "--prompt_column is not given; the columns found are 'content', 'summary'."),
        (
            {"history_column": "past"},
            "the columns found are 'content', 'summary' (--history_column; rows that have none may hold it empty).",
        ),
    ],
)
def test_flags_that_name_no_column_are_errors(flags, words):
    assert words in error_of(PAIR, **flags)


def test_a_history_beside_messages_is_refused():
    told = error_of({"messages": CHAT, "past": [["q0", "a0"]]}, history_column="past")
    assert "--history_column past needs a prompt, but the column read is 'messages'" in told


def test_a_file_of_unknown_columns_lists_them():
    message = error_of({"q": "1", "a": "2"})
    assert "train.json, line 1: the columns found are 'q', 'a'; name yours with --prompt_column" in message


@pytest.mark.parametrize("name", ["train.json", "train.csv"])
def test_an_empty_file_is_an_error(name):
    assert error_of(name=name) == f"{name} is empty (1 bytes): there is nothing to read in it."


@pytest.mark.parametrize(("name", "text"), [("train.json", "[]"), ("train.csv", "content,summary")])
def test_a_file_without_rows_is_an_error(name, text):
    assert error_of(text, name=name) == f"{name} holds no rows: it must hold at least one."


def test_bad_rows_are_left_out_on_request_and_kept_count_of():
    rows = ["{", PAIR, {"content": "q"}, {"content": "q", "summary": ""}, PAIR]
    split = load(*rows, skip_bad_rows=True)
    assert (split.rows_read, len(split)) == (5, 2)
    found = [(bad_row.row.number, bad_row.kind) for bad_row in split.left_out]
    assert found == [(1, "unreadable row"), (3, "missing column"), (4, "empty answer")]


def test_a_file_in_which_nothing_is_left_is_an_error():
    message = error_of({"content": "", "summary": "a"}, {"content": "q", "summary": ""}, skip_bad_rows=True)
    assert message.startswith("train.json: none of the 2 rows can be used; the first: train.json, line 1, column")


@pytest.mark.parametrize(
    ("split", "flag"),
    [("train", "max_train_samples"), ("validation", "max_eval_samples"), ("test", "max_predict_samples")],
)
def test_only_the_first_samples_are_read_where_a_number_is_given(split, flag):
    loaded = load(PAIR, PAIR, "{", split=split, **{flag: 2})
    assert (len(loaded), loaded.limit) == (2, f"--{flag} 2")


def test_a_split_without_a_source_names_its_flags():
    with pytest.raises(UserError, match="There is no validation data: give --validation_file or --dataset_name."):
        load_splits(make_data_args(train_file=write(PAIR)), ["validation"])


def test_a_file_goes_before_the_data_set(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    Path("hub").mkdir()
    write({"prompt": "hub", "response": "a"}, name="hub/train.jsonl")
    data_args = make_data_args(dataset_name="./hub", test_file=write({"content": "file"}, name="own.json"))
    splits = load_splits(data_args, ["train", "test"])
    assert [splits[name].conversations[0].prompt[0]["content"] for name in ("train", "test")] == ["hub", "file"]
    assert splits["train"].conversations[0].where == "./hub, train row 1"


@pytest.mark.parametrize("was_on", [True, False])
def test_the_collector_of_cycles_pauses_and_is_as_it_was_afterwards(monkeypatch, was_on):
    state = [was_on]
    monkeypatch.setattr(gc, "isenabled", lambda: state[-1])
    monkeypatch.setattr(gc, "enable", lambda: state.append(True))
    monkeypatch.setattr(gc, "disable", lambda: state.append(False))
    with pytest.raises(UserError), paused_collection():
        assert not gc.isenabled()
        raise UserError("a row")
    assert gc.isenabled() == was_on
