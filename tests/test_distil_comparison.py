"""A prefix in the place of a document: what is measured, shown, warned of, and told in the card."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from closeness import assert_close
from peft import PeftModel

from glm_peft.adapters.assembly import open_base
from glm_peft.adapters.loading import put_prefix_on
from glm_peft.adapters.prefix_initialization import keys_and_values
from glm_peft.arguments.model import ModelArguments
from glm_peft.distillation.comparison import (
    DOCUMENT,
    NEITHER,
    PREFIX,
    Comparison,
    Measures,
    Way,
    compare,
    compare_held_out,
    join,
    ways_of,
)
from glm_peft.distillation.lessons import Lessons
from glm_peft.distillation.reading import Readers, encode_text, open_reader
from glm_peft.distillation.report import format_comparison, is_useless, read_comparison, write_comparison
from glm_peft.metrics import SCORE_NAMES, compute_scores
from glm_peft.prediction.evaluation import Scoring
from glm_peft.prediction.generation_settings import GenerationSettings
from glm_peft.publishing.card.build import TEMPLATES, build_card
from glm_peft.publishing.card.examples import count_examples
from glm_peft.publishing.files import collect_files

TEXT = "牌子：飞鸟。颜色：黑色和白色。价格：一百二十元。材质：棉。"
QUESTIONS = [
    [{"role": "user", "content": question}] for question in ("什么牌子？", "颜色呢", "这件衣服是什么材质的？")
]
SETTINGS = GenerationSettings(max_new_tokens=6, do_sample=True)  # of which only the length counts


def open_ways(folder: Path, share: float) -> list[Way]:
    """The three ways of a tiny model, with the first of the document's own keys and values for a prefix."""
    base = open_base(ModelArguments(str(folder)))
    model = base.load_model()
    ids = encode_text(base, TEXT)
    own = torch.tensor([ids[: int(share * len(ids))]])
    return ways_of(open_reader(base, model, TEXT), put_prefix_on(model, keys_and_values(model, own)))


def measures(divergence: float, same: float, score: float, tokens: int, exact: float | None = None) -> Measures:
    scores = dict.fromkeys(SCORE_NAMES, score)
    return Measures(divergence, same, scores, exact, tokens, 1000 * tokens, 0.5 if tokens > 100 else 0.125)


FINE = Comparison(
    {
        DOCUMENT: measures(0.0, 1.0, 100.0, 400, 0.75),
        PREFIX: measures(0.25, 0.5, 60.0, 100, 0.5),
        NEITHER: measures(1.5, 0.0, 10.0, 0, 0.0),
    },
    questions=8,
    references=4,
    answer_tokens=96,
    protocol="thudm",
)


@pytest.mark.parametrize("generation", ["chatglm2", "chatglm3", "glm4", "glm4_0414"])
def test_a_prefix_that_is_the_document_is_no_further_from_it_than_itself(generation, tiny_model_dirs):
    found = compare(open_ways(tiny_model_dirs[generation], 1), QUESTIONS, [None] * 3, SETTINGS, "chatglm3")
    document, prefix, neither = (found.ways[way] for way in (DOCUMENT, PREFIX, NEITHER))
    assert document.divergence == 0 and abs(prefix.divergence) < 1e-6 < neither.divergence
    assert document.same_answers == prefix.same_answers == 1 > neither.same_answers
    assert prefix.context_tokens == document.context_tokens and prefix.cache_bytes == document.cache_bytes > 0
    assert (neither.context_tokens, neither.cache_bytes, prefix.exact_match) == (0, 0, None)
    assert prefix.scores == document.scores and min(one.first_token_seconds for one in found.ways.values()) > 0


def test_of_chatglm_6b_the_document_stands_in_the_prompt(tiny_model_dirs):
    ways = open_ways(tiny_model_dirs["chatglm"], 1)
    found = compare(ways, QUESTIONS, [None] * 3, SETTINGS, "thudm").ways
    assert found[DOCUMENT].divergence == 0 < found[PREFIX].divergence < found[NEITHER].divergence
    assert ways[0].whole_prompt is None and not isinstance(ways[0].answering.model, PeftModel)


def test_measures_are_those_of_full_distributions_over_the_answers_with_the_document(tiny_model_dirs, monkeypatch):
    ways = open_ways(tiny_model_dirs["glm4_0414"], 0.5)
    references = ["不是", None, None]
    monkeypatch.setattr("glm_peft.adapters.label_loss.CHUNK_LOGITS", 2000)  # some rows of logits
    found = compare(ways, QUESTIONS, references, SETTINGS, "thudm")

    greedy = replace(SETTINGS, do_sample=False)
    answers = {
        way.name: way.answering.generate({"input_ids": list(map(way.encode, QUESTIONS))}, greedy) for way in ways
    }
    answering, base = ways[0].answering, ways[2].answering.model
    total, count = dict.fromkeys(answers, 0.0), 0
    for question, answer in zip(QUESTIONS, answers[DOCUMENT], strict=True):
        ids = answering.chat_format.encode_answer(answering.tokenizer, answer).ids
        count += len(ids)
        logs = {}
        for way in ways:
            model = base if way.whole_prompt else way.answering.model  # of the document: its ids, no keys of it
            prompt = (way.whole_prompt or way.encode)(question)
            with torch.no_grad():
                positions = torch.arange(len(prompt + ids))[None]
                logits = model(input_ids=torch.tensor([prompt + ids]), position_ids=positions).logits[0]
            logs[way.name] = logits[-len(ids) - 1 : -1].double().log_softmax(-1)
        for way in ways:
            of_document = logs[DOCUMENT]
            total[way.name] += (of_document.exp() * (of_document - logs[way.name])).sum().item()

    assert (found.questions, found.references, found.answer_tokens) == (3, 1, count)
    for name, way in found.ways.items():
        assert_close(torch.tensor(way.divergence), torch.tensor(total[name] / count))
        scores = compute_scores(answers[name], answers[DOCUMENT], "thudm")
        assert way.scores == {score: scores[score] for score in SCORE_NAMES}
        assert way.exact_match == (answers[name][0] == "不是")
        assert (
            way.cache_bytes == 2 * 2 * base.config.num_key_value_heads * base.config.head_dim * 4 * way.context_tokens
        )


def test_held_out_questions_are_asked_with_the_text_that_their_answers_were_given_with(tiny_model_dirs, tmp_path):
    base = open_base(ModelArguments(str(tiny_model_dirs["chatglm3"])))
    model = base.load_model()
    readers = Readers(base, model)
    ids = torch.tensor([encode_text(base, TEXT)])
    asked = [question + [{"role": "assistant", "content": "是"}] for question in QUESTIONS]
    rows = [{"messages": asked[number], "context": number % 2, "reference": None} for number in (1, 2, 0)]
    lessons = Lessons(rows, [TEXT, TEXT[:15]], 2, tmp_path)
    student = put_prefix_on(model, keys_and_values(model, ids))
    scoring = Scoring(readers(TEXT).answering, SETTINGS, "thudm")
    model.activation_checkpointing_enable()  # as training leaves it; a resumed run has opened no reader before
    found = compare_held_out(lessons, readers, student, scoring)
    expected = [
        compare(ways_of(readers(text), student), [question], [None], SETTINGS, "thudm")
        for text, question in ((TEXT[:15], QUESTIONS[1]), (TEXT, QUESTIONS[0]))
    ]
    assert timeless(found) == timeless(join(expected)) and found.questions == 2
    assert expected[1].ways[PREFIX].divergence == 0 < expected[0].ways[PREFIX].divergence


def timeless(comparison: Comparison) -> Comparison:
    return replace(
        comparison, ways={way: replace(one, first_token_seconds=0.0) for way, one in comparison.ways.items()}
    )


def test_comparisons_are_joined_by_what_each_mean_is_over():
    other = Comparison(
        {way: replace(one, exact_match=None, divergence=0.5) for way, one in FINE.ways.items()}, 24, 0, 32, "thudm"
    )
    found = join([FINE, other])
    assert (found.questions, found.references, found.answer_tokens) == (32, 4, 128)
    assert found.ways[PREFIX] == replace(FINE.ways[PREFIX], divergence=(96 * 0.25 + 32 * 0.5) / 128)
    assert join([FINE]) == FINE


def test_what_was_won_and_lost_is_written_beside_the_adapter(tmp_path, caplog):
    write_comparison(tmp_path, FINE)
    assert read_comparison(tmp_path) == FINE and (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "comparison.json").read_text())["ways"]["prefix"] == asdict(FINE.ways[PREFIX])
    assert "| tokens before the question                              | 400" in format_comparison(FINE)
    assert "300 tokens of context fewer, the memory of their keys and values down by a factor of 4.0" in (
        format_comparison(FINE)
    )
    assert "is no better" not in caplog.text


@pytest.mark.parametrize(
    ("prefix", "useless"),
    [
        (measures(1.5, 0.0, 10.0, 100, 0.0), True),
        (measures(2.0, 0.0, 5.0, 100, 0.0), True),
        (measures(1.4, 0.0, 5.0, 100, 0.0), False),
        (measures(2.0, 0.0, 5.0, 100, 0.25), True),
    ],
)
def test_a_prefix_that_is_no_better_than_neither_is_warned_of(prefix, useless, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("glm_peft.distillation.report.plot_comparison", lambda *args: None)
    comparison = replace(FINE, ways=FINE.ways | {PREFIX: prefix})
    write_comparison(tmp_path, comparison)
    assert is_useless(comparison) is useless is ("larger --num_virtual_tokens" in caplog.text)


# The card

ANSWERS = [
    {
        "messages": [{"role": "user", "content": question}],
        "reference": None,
        DOCUMENT: one,
        PREFIX: two,
        NEITHER: "不知道",
    }
    for question, one, two in (("裙子多少钱？", "三百元", "三百块|一条"), ("周一开门吗？", "休息", "休息"))
]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prefix with its comparison and a record that names the document, beside what must stay at home."""
    folder = tmp_path_factory.mktemp("adapter")
    config = {"peft_type": "PREFIX_TUNING", "base_model_name_or_path": "a/b", "num_virtual_tokens": 100}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    documents = [{"file": "handbook.md", "sha256": "f" * 64, "tokens": 1400}]
    (folder / "provenance.json").write_text(json.dumps({"documents": documents, "card_examples": 0}))
    write_comparison(folder, replace(FINE, answers=ANSWERS))
    (folder / "conversations.jsonl").write_text("{}")
    (folder / "teacher").mkdir()
    return folder


@pytest.mark.parametrize(
    ("language", "texts"),
    [
        ("en", ["\n## Document\n", "Won: with every question 300 tokens of context fewer"]),
        ("zh", ["\n## 文档\n", "得：每个问题少 300 个 token 的上下文"]),
    ],
)
def test_the_card_tells_what_the_document_was_and_what_is_kept_of_it(language, texts, adapter):
    card = build_card(adapter, language=language)
    assert f"| `handbook.md` | 1,400 | `{'f' * 64}` |" in card and "](comparison.png)" in card
    assert format_comparison(FINE, language) in card and all(text in card for text in texts)
    assert "| 0.25 " in card and "| 75.0 " in card


@pytest.mark.parametrize("language", sorted(TEMPLATES))
def test_answers_are_in_the_card_only_where_they_are_asked_for(language, adapter, tmp_path):
    answers = ("三百元", "三百块|一条", "不知道")
    assert all(answer in (adapter / "comparison_answers.jsonl").read_text(encoding="utf-8") for answer in answers)
    assert "card_examples 3" in build_card(adapter, language=language)
    assert not any(text in build_card(adapter, language=language) for text in ("裙子多少钱", *answers))
    asked = build_card(adapter, language=language, examples=1)
    assert "| 裙子多少钱？ | 三百元 | 三百块&#124;一条 | 不知道 |" in asked and "周一开门吗" not in asked
    assert [count_examples(adapter, number) for number in (None, 0, 1, 5)] == [0, 0, 1, 2]
    other = shutil.copytree(adapter, tmp_path / "other")
    (other / "adapter_model.safetensors").write_bytes(b"others")
    assert "三百元" not in build_card(other, language=language, examples=1) and count_examples(other, 1) == 0


def test_the_comparison_is_sent_and_what_it_was_made_from_is_not(adapter):
    files = collect_files(adapter, "a/b")
    assert {"comparison.json", "comparison.png"} < set(files)
    assert not {"conversations.jsonl", "teacher", "comparison_answers.jsonl"} & set(files)
    assert not any("三百元".encode() in content for content in files.values())


@pytest.mark.parametrize("language", sorted(TEMPLATES))
def test_a_comparison_of_other_weights_or_form_is_left_out(language, adapter, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "other")
    (folder / "adapter_model.safetensors").write_bytes(b"others")
    assert "comparison.png" not in build_card(folder, language=language)
    assert not {"comparison.json", "comparison.png"} & set(collect_files(folder, "a/b"))
    edited = shutil.copytree(adapter, tmp_path / "edited")
    file = edited / "comparison.json"
    for change in ({"questions": "many"}, {"protocol": "`| x"}, {"ways": {}}, {"ways": []}, {"more": 1}):
        file.write_text(json.dumps(json.loads((adapter / "comparison.json").read_text()) | change))
        assert "`thudm`" not in build_card(edited, language=language)
