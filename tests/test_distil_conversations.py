"""Conversations about a text: what is asked, what is kept, and that a stopped run ends as one that was not stopped."""

import json
import logging
import random
from collections import Counter
from contextlib import suppress
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from glm_peft.adapters.assembly import open_base
from glm_peft.arguments.data import DataArguments
from glm_peft.arguments.distil import DistilArguments
from glm_peft.arguments.model import ModelArguments
from glm_peft.distillation import conversation_file
from glm_peft.distillation.conversation_file import STATE_NAME, read_conversations
from glm_peft.distillation.conversations import make_conversations, read_questions
from glm_peft.distillation.reading import Readers, Reading, plan_reading
from glm_peft.distillation.seed_prompts import SEED_PROMPTS
from glm_peft.distillation.self_study import clean_question, plan_study
from glm_peft.errors import UserError
from glm_peft.prediction.generation_settings import GenerationSettings
from glm_peft.reporting.file_names import CONVERSATIONS_NAME

READING = Reading("甲一甲二乙一乙二", ["甲一甲二", "乙一乙二"], [["甲一", "甲二"], ["乙一", "乙二"]], 4)


class FakeReader:
    """Reader whose questions are drawn from a few, some of them empty, and whose answers tell text and question."""

    def __init__(self, text: str) -> None:
        self.text, self.answering = text, self

    def encode(self, messages: list[dict[str, str]]) -> str:
        return messages[-1]["content"]

    def generate(self, features: dict[str, Any], settings: GenerationSettings, **_: Any) -> list[str]:
        if not settings.do_sample:
            return [f"{self.text}: {prompt}" if "7" not in prompt else " " for prompt in features["input_ids"]]
        draw = random.Random(settings.seed)
        return [draw.choice(["", f"问题：{self.text}{draw.randrange(9)}？"]) for _ in features["input_ids"]]


class FakeReaders:
    """Readers without a base."""

    def __init__(self) -> None:
        self.model = torch.nn.Linear(1, 1)
        self.model.dtype = torch.float32
        shape = SimpleNamespace(system_text=None, source_prefix=None)
        self.base = SimpleNamespace(
            model_args=ModelArguments(model_name_or_path="b"), chat_format=SimpleNamespace(name="f"), data_args=shape
        )

    def __call__(self, text: str) -> FakeReader:
        return FakeReader(text)


READERS = FakeReaders()


def make(folder: Path, readers: Any = READERS, reading: Reading = READING, **changes: Any) -> list[dict[str, Any]]:
    """Make conversations as the command does; the changes are of arguments."""
    wanted = {"num_conversations": changes.pop("num_conversations", 64), "num_held_out": changes.pop("held_out", 1)}
    distil = DistilArguments(document=["d"], **wanted)
    data = DataArguments(train_file=changes.pop("train_file", None))
    training = SimpleNamespace(**{"output_dir": str(folder), "seed": 1, "max_new_tokens": 8, **changes})
    return make_conversations(reading, readers, distil, training, data, read_questions(reading, data, distil))


def write_questions(folder: Path, *rows: dict[str, Any]) -> str:
    """A file of questions."""
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_any_first_part_of_a_plan_covers_the_text_and_the_kinds() -> None:
    plan = plan_study([3, 2], 103, "zh", seed=1, group_size=8)
    assert sum(len(group.requests) for group in plan) == 103 and {len(group.requests) for group in plan} == {8, 7}
    for start in (0, 5):
        pieces = [(group.context, group.piece) for group in plan[start : start + 5]]
        assert sorted(pieces) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
        assert sum(left[0] != right[0] for left, right in zip(pieces, pieces[1:], strict=False)) == 1
    kinds = Counter(kind for group in plan for kind, _ in group.requests)
    assert kinds.keys() == SEED_PROMPTS["zh"].keys() and max(kinds.values()) - min(kinds.values()) <= 1
    assert {request for group in plan for _, request in group.requests} == set().union(*SEED_PROMPTS["zh"].values())
    assert plan == plan_study([3, 2], 103, "zh", 1, 8) != plan_study([3, 2], 103, "zh", 2, 8)


def test_every_piece_has_a_group_where_there_are_questions_enough(caplog: pytest.LogCaptureFixture) -> None:
    assert {group.piece for group in plan_study([30], 64, "en", 1, group_size=64)} == set(range(30))
    assert not caplog.text
    assert len({group.piece for group in plan_study([30], 20, "en", 1, group_size=64)}) == 20
    assert "--num_conversations 20 is too few for the 30 pieces" in caplog.text


@pytest.mark.parametrize(
    ("text", "question"),
    [
        ("  谁负责？\n", "谁负责？"),
        ("问题：“谁负责？”", "谁负责？"),
        ("**问题**：谁负责？\n\n答案：王芳。为什么？", "谁负责？"),
        ("1. Who is in charge?\n2. Why?", "Who is in charge?"),
        ("情形：客人要退货。\n问题：可以吗？\n可以。", "情形：客人要退货。\n可以吗？"),
        ("请概括第一部分。\n第一部分讲价格。", "请概括第一部分。"),
        ('Question: "Is 1.5 kg too much?"', "Is 1.5 kg too much?"),
        ("3.5元够吗？", "3.5元够吗？"),
        ("“甲”和“乙”哪个贵", "“甲”和“乙”哪个贵"),
        ("答案：", ""),
    ],
)
def test_a_question_is_taken_out_of_what_was_generated(text: str, question: str) -> None:
    assert clean_question(text) == question


def test_what_repeats_a_question_or_is_empty_is_counted_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        rows = make(tmp_path, num_conversations=256)
    assert [list(row) for row in rows] == [["messages", "kind", "context", "reference"]] * len(rows)
    asked = [row["messages"][0]["content"] for row in rows]
    assert sorted(asked) == sorted(
        f"{piece}{i}？" for piece in ("甲一", "甲二", "乙一", "乙二") for i in range(9) if i != 7
    )
    for row, question in zip(rows, asked, strict=True):
        text = READING.texts[row["context"]]
        assert question[:2] in text and row["messages"][1] == {"role": "assistant", "content": f"{text}: {question}"}
    counts = json.loads((tmp_path / STATE_NAME).read_text())["counts"]
    assert sum(counts.values()) == 256 and counts["kept"] == 32 and counts["empty"] > 90
    line = f"256 conversations: 32 kept, {counts['repeated']} repeated a question, {counts['empty']} were empty"
    assert line in caplog.text


class Killed(Exception):
    """The end of a process."""


@pytest.fixture
def kill_at(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that lets one of the next writes end halfway: the how-manieth, or none of them."""
    calls, place = count(), [-1]
    flush, write = conversation_file.flush_to_disk, conversation_file.write_atomically

    def killed_flush(file: Any) -> None:
        flush(file)
        if next(calls) == place[0]:
            end = json.loads(Path(file.name).with_name(STATE_NAME).read_text())["bytes"]
            file.truncate(random.Random(place[0]).randint(end, file.tell()))
            raise Killed

    def killed_write(path: Path, text: str) -> None:
        if next(calls) == place[0]:
            raise Killed
        write(path, text)

    def kill(number: int) -> None:
        nonlocal calls
        calls, place[0] = count(), number

    monkeypatch.setattr(conversation_file, "flush_to_disk", killed_flush)
    monkeypatch.setattr(conversation_file, "write_atomically", killed_write)
    return kill


def files_of(folder: Path) -> list[bytes]:
    """The bytes of the two files."""
    return [(folder / name).read_bytes() for name in (CONVERSATIONS_NAME, STATE_NAME)]


def test_killed_at_any_write_and_resumed_the_files_are_the_same(tmp_path: Path, kill_at: Any) -> None:
    (tmp_path / "whole").mkdir()
    make(tmp_path / "whole")
    for number in range(12):
        folder = tmp_path / str(number)
        folder.mkdir()
        for again in (number, number // 2 + 1, -1):
            kill_at(again)
            with suppress(Killed):
                make(folder)
        assert files_of(folder) == files_of(tmp_path / "whole"), number


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 2}, "is of another run, with seed 1 where this one has 2: give another --output_dir, or remove it"),
        ({"num_conversations": 65}, "with num_conversations 64 where this one has 65"),
        ({"max_new_tokens": 9}, "with settings of the questions 'at most 8 new tokens a row; drawn"),
        ({"reading": Reading("甲", ["甲"], [["甲"]], 1)}, "with digest of the documents"),
    ],
)
def test_conversations_of_another_run_are_refused_by_what_differs(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    make(tmp_path)
    before = files_of(tmp_path)
    with pytest.raises(UserError) as error:
        make(tmp_path, **changes)
    assert str(tmp_path / CONVERSATIONS_NAME) in str(error.value) and message in str(error.value)
    assert files_of(tmp_path) == before


def test_a_file_that_was_changed_or_is_not_ours_is_refused(tmp_path: Path) -> None:
    make(tmp_path)
    file = tmp_path / CONVERSATIONS_NAME
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"was changed: it has [\d,]+ bytes, [\d,]+ were written"):
        make(tmp_path)
    (tmp_path / STATE_NAME).unlink()
    with pytest.raises(UserError, match=r"conversations.jsonl .* conversations.state.json"):
        make(tmp_path)


def test_the_questions_of_a_user_are_answered_and_keep_their_own_answers(tmp_path: Path) -> None:
    turns = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant", "user")]
    file = write_questions(tmp_path, {"prompt": "a", "response": "b"}, {"prompt": "c"}, {"prompt": "a"})
    whole = Reading("甲", ["甲"], [["甲"]], 1)
    rows = make(tmp_path, reading=whole, train_file=file)
    assert [row["messages"][-1]["content"] for row in rows] == ["甲: a", "甲: c"]
    assert [(row["reference"], row["kind"]) for row in rows] == [("b", "given"), (None, "given")]
    (tmp_path / "more").mkdir()
    file = write_questions(tmp_path, {"messages": turns}, {"messages": turns})
    (row,) = make(tmp_path / "more", reading=whole, train_file=file)
    assert row["messages"] == [*turns, {"role": "assistant", "content": "甲: u"}]
    with pytest.raises(UserError, match=r"read in 2 parts, and which of them answers a question of --train_file"):
        make(tmp_path, train_file=file)
    with pytest.raises(UserError, match=r"has 2 questions, and --num_held_out 2 of them are not trained on"):
        make(tmp_path, reading=whole, train_file=file, held_out=2)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, "line 2, column 'messages': the conversation has no question"),
        (
            {"messages": [{"role": "user", "content": "a"}], "context": 0},
            "line 2, .*the last message must be the assist",
        ),
        ({"context": 0}, "line 2, there is no column 'messages'"),
        ({}, "line 2, column 'context': give the number of the text, from 0; found null"),
    ],
)
def test_a_row_that_is_no_conversation_is_refused_by_its_line(
    tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    good = {"messages": turns, "context": 0}
    with pytest.raises(UserError, match=message):
        read_conversations(write_questions(tmp_path, good, row or {"messages": turns}))


def test_a_model_that_was_stopped_draws_the_same_questions(
    tmp_path: Path, tiny_model_dirs: dict[str, Path], kill_at: Any
) -> None:
    base = open_base(ModelArguments(model_name_or_path=str(tiny_model_dirs["chatglm3"])), DataArguments())
    readers = Readers(base, base.load_model())
    reading = plan_reading(base, "第一条。第二条。" * 4, DistilArguments(document=["d"], chunk_tokens=16))
    assert len(reading.chunks[0]) > 1
    options = {"num_conversations": 9, "per_device_eval_batch_size": 3}
    for folder in ("whole", "stopped"):
        (tmp_path / folder).mkdir()
        kill_at(4 if folder == "stopped" else -1)
        with suppress(Killed):
            make(tmp_path / folder, readers, reading, **options)
    kill_at(-1)
    rows = make(tmp_path / "stopped", readers, reading, **options)
    assert files_of(tmp_path / "stopped") == files_of(tmp_path / "whole")
    assert len({row["messages"][0]["content"] for row in rows}) > 3
