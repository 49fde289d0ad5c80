"""What the checks find in conversations, and what they let pass."""

import random
from dataclasses import replace

import pytest

from glm_peft.examination.data_checks import (
    check_overlaps,
    check_split,
    find_duplicates,
    find_echoes,
    find_far_longer,
    find_invisible,
    find_near_duplicates,
    find_overlap,
    find_suspicious_characters,
)
from glm_peft.examination.near_duplicates import SIMILARITY, Sketch, compute_similarity, find_near
from glm_peft.preprocessing.conversations import Conversation, Split


def make_split(*pairs: tuple[str, str | None], name: str = "train") -> Split:
    conversations = []
    for number, (question, answer) in enumerate(pairs, 1):
        messages = [{"role": "user", "content": question}]
        messages += [{"role": "assistant", "content": answer}] if answer is not None else []
        conversations.append(Conversation(messages, f"{name}.json, line {number}", False, number))
    return Split(name, f"{name}.json", conversations)


def rows_by_name(findings: list) -> dict[str, list[str]]:
    return {finding.what: finding.rows for finding in findings if finding.rows}


def test_clean_rows_give_no_finding():
    assert check_split(make_split(("类型#裙", "A & B，100 % 好看。"), ("类型#裤", "第一行\n第二行\t\u3000完"))) == []


def test_a_repeated_row_and_another_answer_are_told_apart():
    findings = find_duplicates(make_split(("q", "a"), ("p", "a"), ("q", "a"), ("q", "b"), ("q", "b")))
    assert rows_by_name(findings) == {
        "rows that repeat an earlier row, prompt and answer": [
            "train.json, line 3 (as line 1)",
            "train.json, line 5 (as line 4)",
        ],
        "prompts that stand earlier with another answer": ["train.json, line 4 (as line 1)"],
    }


def test_rows_that_differ_in_what_is_not_read_are_not_to_be_removed():
    split = make_split(("q", "a"), ("q", "a"), ("q", "a"))
    split.conversations[1] = replace(split.conversations[1], unread='{"context": "c"}')
    first, second, _ = find_duplicates(split)
    assert (first.rows, second.rows) == (["train.json, line 3 (as line 1)"], ["train.json, line 2 (as line 1)"])
    assert "remove" not in second.advice
    other_answer = make_split(("q", "a"), ("q", "b"))
    other_answer.conversations[1] = replace(other_answer.conversations[1], unread='{"context": "c"}')
    assert find_duplicates(other_answer)[2].advice.startswith("columns that are not read may tell some apart")
    finding = find_overlap(Split("train", "train.json", split.conversations[1:2]), make_split(("q", "a"), name="test"))
    assert finding.advice.startswith("columns that are not read may tell some apart: what of them belongs")


def test_columns_that_are_not_read_are_remarked_upon():
    split = make_split(("q", "a"), ("p", "a"))
    split.conversations[1] = replace(split.conversations[1], unread='{"context": "c"}')
    split.unread["context"] = 1
    split.conversations[0] = replace(split.conversations[0], muted=frozenset({0}))
    split.without_loss.append("train.json, line 3")
    rows = {
        "not read: 'context' (1 row; no flag reads it)": ["train.json, line 2"],
        "rows in which no answer carries loss": ["train.json, line 3"],
        "rows with answers that carry no loss": ["train.json, line 1"],
    }
    assert rows_by_name(check_split(split)) == rows


def test_overlap_names_the_row_of_the_other_split():
    finding = find_overlap(make_split(("q", "a"), ("p", "a")), make_split(("x", "a"), ("p", "b"), name="test"))
    assert finding.rows == ["train.json, line 2 (as test.json, line 2)"]
    assert "from test" in finding.advice


WORDS = ["".join(map(chr, range(start, start + 9))) for start in range(0x4E00, 0x9E00, 9)]


def texts(count: int, seed: int = 0) -> list[str]:
    """Different texts of 90 characters that share no more words than chance wants."""
    draw = random.Random(seed)
    return ["".join(draw.sample(WORDS, 10)) for _ in range(count)]


def with_changes(text: str, count: int, draw: random.Random) -> str:
    for place in draw.sample(range(len(text)), count):
        text = f"{text[:place]}甲{text[place + 1 :]}"
    return text


def test_nearly_all_rows_above_the_similarity_are_found_and_none_below():
    draw, found, wanted = random.Random(1), 0, 0
    first = texts(600)
    second = [with_changes(text, number % 8, draw) for number, text in enumerate(first)]
    pairs = [[{"role": "user", "content": text} for text in pair] for pair in zip(first, second, strict=True)]
    split = make_split(*((text, "答") for text in [*first, *second]))
    near = {one.number: other for one, other, _ in find_near(Sketch.draw(split.conversations, with_answers=False))}
    for number, pair in enumerate(pairs):
        similarity = compute_similarity(*([message] for message in pair))
        assert similarity >= SIMILARITY or number + 601 not in near
        if SIMILARITY <= similarity < 1:
            wanted += 1
            found += near.get(number + 601) is split.conversations[number]
    assert wanted > 200 and found >= 0.98 * wanted


def test_near_duplicates_and_leaking_prompts_are_told_with_their_places():
    question, answer = texts(2)
    train = make_split(
        (question, answer), ("q", answer), (f"{question[:-1]}丁", answer), ("Ｑ ", answer), ("q", answer)
    )
    assert rows_by_name(find_near_duplicates(train)) == {
        "rows that are nearly an earlier row": [
            "train.json, line 3 (as line 1, 98 % alike)",
            "train.json, line 4 (as line 2, 100 % alike)",
        ]
    }
    test = make_split((f"{question[:-1]} 丙", None), ("q", None), ("别的问题", None), name="test")
    [(title, findings)] = check_overlaps([train, test])
    assert title == "Overlap of train and test"
    assert rows_by_name(findings) == {
        "train prompts that are in test too": [f"train.json, line {line} (as test.json, line 2)" for line in (2, 5)],
        "test prompts that are nearly one in train": ["test.json, line 1 (as train.json, line 1, 97 % alike)"],
    }
    sources = [replace(train, name="train_a"), replace(train, name="train_b")]
    [(_, [finding])] = check_overlaps(sources)
    assert finding.advice.startswith("keep them in one of the sources")


def test_the_history_is_a_part_of_the_prompt():
    split = make_split(("q", "a"), ("q", "a"))
    split.conversations[1].messages[:0] = [{"role": "system", "content": "s"}]
    assert rows_by_name(find_duplicates(split)) == {}


def test_answers_that_echo_the_question_are_found():
    split = make_split(
        ("类型#裙", " 类型#裙 "), ("类型#裙", "类型#裙：很美"), ("类型#裙", "很美"), ("裙", "裙很美"), ("问", None)
    )
    assert rows_by_name(find_echoes(split)) == {
        "answers that are the prompt and nothing else": ["train.json, line 1"],
        "answers that repeat the prompt": ["train.json, line 2"],
    }


@pytest.mark.parametrize(
    ("text", "what", "found"),
    [
        ("a\x07b", "control characters", "U+0007"),
        ("a\ufffd", "U+FFFD, what a wrong decoding leaves", "U+FFFD"),
        ("\ufeffa", "byte order marks", "U+FEFF"),
        ("a\u200bb", "zero-width and direction characters", "U+200B"),
        ("a\u00a0b", "unusual white space", "U+00A0"),
        ("a&nbsp;b", "HTML entities or tags", "'&nbsp;'"),
        ("a<br/>b", "HTML entities or tags", "'<br/>'"),
        ("宽松".encode().decode("cp1252", "ignore"), "mojibake, text decoded with the wrong encoding", "'å®½æ'"),
        ("锟斤拷", "mojibake, text decoded with the wrong encoding", "'锟斤拷'"),
        ("x<|user|>y", "control tokens spelt out", "'<|user|>'"),
        ("x</s>", "control tokens spelt out", "'</s>'"),
        ("[INST]x", "control tokens spelt out", "'[INST]'"),
    ],
)
@pytest.mark.parametrize("is_in_answer", [False, True])
def test_suspicious_characters_are_found_in_prompts_and_answers(text: str, what: str, found: str, is_in_answer: bool):
    split = make_split(("q", "a"), ("q", text) if is_in_answer else (text, "a"))
    assert rows_by_name(find_suspicious_characters(split)) == {what: [f"train.json, line 2 ({found})"]}


def test_texts_that_are_far_longer_than_the_others_are_found():
    pairs = [("类型#裙", "很美" * 10)] * 20
    split = make_split(*pairs, ("类型#裙" * 11, "很美"), ("类型#裤", "很美" * 101))
    assert rows_by_name(find_far_longer(split)) == {
        "prompts that are far longer than the others": ["train.json, line 21 (44 characters)"],
        "answers that are far longer than the others": ["train.json, line 22 (202 characters)"],
    }


def test_texts_of_which_nothing_can_be_seen_are_found():
    split = make_split(("\u200b\ufeff", "a"), ("q", "\u200b\u202e"), ("q", "。"), ("q", None))
    assert rows_by_name(find_invisible(split)) == {
        "prompts without a visible character": ["train.json, line 1"],
        "answers without a visible character": ["train.json, line 2"],
    }


@pytest.mark.parametrize(
    "text", ["這件衣服很漂亮，这件很好", "naïve café à Ñuñoa", "R&D; a < b > c", "e\u0301", "😀👍"]
)
def test_ordinary_text_of_other_scripts_is_let_pass(text: str):
    assert rows_by_name(find_suspicious_characters(make_split((text, text)))) == {}
