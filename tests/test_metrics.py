"""The scores are the published ones, number for number."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import evaluate
import jieba
import pytest
from rouge_chinese import Rouge
from transformers import AutoTokenizer

from glm_peft import metrics
from glm_peft.arguments.data import DataArguments
from glm_peft.data import build_generation_features
from glm_peft.errors import UserError
from glm_peft.metrics import ChineseGenerationMetric, compute_scores, longest_common_subsequence, score_pair
from glm_peft.models.chat_formats import get_chat_format
from glm_peft.prediction.evaluation import Scoring
from glm_peft.preprocessing.split_loading import load_splits
from glm_peft.publishing.card.scores import Split, read_scores

BLEU_COLUMN = {"thudm": "bleu-4 characters", "chatglm3": "bleu-4 words"}


@pytest.fixture(scope="module")
def expected(reference_models):
    return json.loads((reference_models.parent / "expected_metrics.json").read_text(encoding="utf-8"))


def published(row, protocol):
    """The numbers that the published code gave for a row, under our names."""
    rouge = {name: row[name] for name in ("rouge-1", "rouge-2", "rouge-l")}
    return rouge | {"bleu-4": row[BLEU_COLUMN[protocol]]}


def random_text(rng, alphabet, longest):
    return "".join(rng.choices(alphabet, k=rng.randint(1, longest)))


@pytest.mark.parametrize("protocol", metrics.PROTOCOLS)
def test_every_row_has_the_published_scores(expected, protocol):
    assert len(expected["rows"]) == 65
    for row in expected["rows"]:
        scores = score_pair(row["prediction"], row["reference"], protocol)
        numbers = published(row, protocol)
        assert {name: scores[name] for name in numbers} == pytest.approx(numbers, rel=0, abs=5e-5), row["prediction"]


@pytest.mark.parametrize("protocol", metrics.PROTOCOLS)
def test_means_are_the_published_means(expected, protocol):
    rows = expected["rows"]
    means = compute_scores([row["prediction"] for row in rows], [row["reference"] for row in rows], protocol)
    numbers = published(expected["mean"], protocol)
    assert {name: means[name] for name in numbers} == pytest.approx(numbers, rel=0, abs=5e-5)


def test_rouge_equals_rouge_chinese_on_random_texts():
    rng = random.Random(0)
    alphabet = "裙子 很好看。！？”’…\n的，ab?.1\t"
    for _ in range(500):
        prediction, reference = random_text(rng, alphabet, 30), random_text(rng, alphabet, 30)
        if not prediction.strip() or not reference.strip():
            continue
        published_scores = Rouge().get_scores(" ".join(jieba.cut(prediction)), " ".join(jieba.cut(reference)))[0]
        for name, values in published_scores.items():
            assert score_pair(prediction, reference)[name] == round(values["f"] * 100, 4), (prediction, reference)


def test_longest_common_subsequence_equals_the_table_of_rouge_chinese():
    from rouge_chinese.rouge_score import _len_lcs

    rng = random.Random(1)
    for _ in range(500):
        first, second = random_text(rng, "abcd", 25), random_text(rng, "abcde", 25)
        assert longest_common_subsequence(first, second) == _len_lcs(first, second), (first, second)


def test_longest_common_subsequence_of_sequences_longer_than_a_machine_word():
    first = [str(number) for number in range(5000)]
    assert longest_common_subsequence(first, first[::-1]) == 1
    assert longest_common_subsequence(first, first[1::2]) == 2500
    assert longest_common_subsequence(first, []) == 0


@pytest.mark.parametrize("prediction, reference", [("", "好看"), (" \n", "好看"), ("好看", ""), ("", "")])
@pytest.mark.parametrize("protocol", metrics.PROTOCOLS)
def test_an_empty_text_scores_zero(prediction, reference, protocol):
    scores = score_pair(prediction, reference, protocol)
    assert all(scores[name] == 0 for name in (*metrics.SCORE_NAMES, "exact_match"))


def test_empty_texts_are_counted_and_stay_in_the_means():
    scores = compute_scores(["", "裙子很好看", " "], ["裙子", "裙子很好看", ""])
    assert (scores["empty_predictions"], scores["empty_references"]) == (2, 1)
    assert scores["rouge-1"] == pytest.approx(100 / 3, abs=1e-4)
    assert scores["exact_match"] == pytest.approx(100 / 3)


def test_lengths_are_mean_numbers_of_characters():
    scores = compute_scores(["裙子", "好"], ["裙子很好看", "好"])
    assert (scores["prediction_length"], scores["reference_length"]) == (1.5, 3)


def test_white_space_around_the_texts_does_not_break_an_exact_match():
    assert score_pair("裙子\n", " 裙子")["exact_match"] == 100
    assert score_pair("裙 子", "裙子")["exact_match"] == 0


@pytest.mark.parametrize("answer, bleu", [("好", 35.3553), ("好看", 59.4604), ("好看的", 84.0896)])
def test_short_perfect_answers_keep_the_published_bleu(answer, bleu):
    scores = score_pair(answer, answer, "thudm")
    assert scores["bleu-4"] == pytest.approx(bleu, abs=5e-5)
    assert scores["exact_match"] == 100


@pytest.mark.parametrize(
    "predictions, references, protocol, words",
    [
        (["a"], ["a"], "bleu", "'bleu' is not a score protocol: choose one of thudm, chatglm3"),
        (["a"], [], "thudm", "1 predictions and 0 references"),
        ([], [], "thudm", "at least one pair"),
    ],
)
def test_wrong_input_gets_one_sentence(predictions, references, protocol, words):
    with pytest.raises(UserError, match=words):
        compute_scores(predictions, references, protocol)


@pytest.mark.parametrize("protocol", metrics.PROTOCOLS)
def test_the_evaluate_metric_gives_the_scores_of_its_protocol(tmp_path, protocol):
    predictions, references = ["裙子很好看", "", "上衣"], ["裙子好看", "裙子", "上衣"]
    metric = ChineseGenerationMetric(protocol, cache_dir=str(tmp_path))
    metric.add_batch(predictions=predictions[:2], references=references[:2])
    metric.add(prediction=predictions[2], reference=references[2])
    assert metric.compute() == compute_scores(predictions, references, protocol)


def test_the_evaluate_metric_is_loaded_from_its_file_without_network(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluate.config.HF_MODULES_CACHE", str(tmp_path / "modules"))
    metric = evaluate.load(metrics.__file__, "chatglm3", cache_dir=str(tmp_path), keep_in_memory=True)
    scores = metric.compute(predictions=["裙子很好看"], references=["裙子好看"])
    assert scores == compute_scores(["裙子很好看"], ["裙子好看"], "chatglm3")


def test_the_evaluate_metric_refuses_an_unknown_protocol():
    with pytest.raises(UserError, match="'rouge' is not a score protocol"):
        ChineseGenerationMetric("rouge")


@pytest.mark.parametrize("pairs, shown", [(300, False), (301, True)])
def test_many_pairs_show_a_progress_bar(capsys, pairs, shown):
    compute_scores([""] * pairs, ["好"] * pairs)
    assert ("Scoring" in capsys.readouterr().err) == shown


# What the published scripts of ChatGLM-6B and ChatGLM2-6B compare with

ASSETS = Path(metrics.__file__).parent / "assets"
LONG, LIMIT = "这条裤子是白色的，很好看！适合春天穿，也适合秋天穿。", 12


def features_of(tokenizer_dir, folder):
    """A row whose answer is cut, one whose answer is not, and one without an answer."""
    rows = [{"content": "裤", "summary": LONG}, {"content": "裙", "summary": "很好看"}, {"content": "上衣"}]
    (folder / "test.json").write_text("\n".join(map(json.dumps, rows)))
    data_args = DataArguments(test_file=str(folder / "test.json"), max_target_length=LIMIT)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    split = load_splits(data_args, ["test"])["test"]
    return tokenizer, build_generation_features(split, get_chat_format(tokenizer), tokenizer, data_args)


@pytest.mark.parametrize("name", ["chatglm-6b", "chatglm2-6b"])
def test_references_are_encoded_cut_and_decoded_by_the_published_tokenizers(reference_tokenizers, tmp_path, name):
    tokenizer, features = features_of(reference_tokenizers / name, tmp_path)
    published = tokenizer(LONG, max_length=LIMIT, truncation=True)["input_ids"]
    assert len(published) == LIMIT
    decoded = tokenizer.decode(published, skip_special_tokens=True)
    assert features.decoded_references == [decoded, "很好看", None] and 0 < len(decoded) < len(LONG)
    assert ("," in decoded) == (name == "chatglm-6b")


@pytest.mark.parametrize("protocol", metrics.PROTOCOLS)
def test_thudm_compares_as_published_and_with_the_file_beside(tmp_path, caplog, protocol):
    """What is compared is in the predictions too, so that the card's rows give the same scores."""
    caplog.set_level("INFO", "glm_peft.prediction.evaluation")
    tokenizer, features = features_of(ASSETS, tmp_path)
    cut = features.decoded_references[0]
    answers = [f"\n{cut}", "好看", " 白色"]
    answering = SimpleNamespace(generate=lambda *_, **__: answers, chat_format=get_chat_format(tokenizer))
    results = Scoring(answering, None, protocol).predict(features, tmp_path)

    texts = compute_scores([cut, "好看"], [LONG, "很好看"], protocol)
    compared = compute_scores(answers[:2], [cut, "很好看"], protocol) if protocol == "thudm" else texts
    assert {name: results[f"predict_{name}"] for name in compared} == compared
    beside = {name: results.get(f"predict_text-{name}") for name in (*metrics.SCORE_NAMES, "exact_match")}
    assert beside == ({name: texts[name] for name in beside} if protocol == "thudm" else dict.fromkeys(beside))
    assert ("1 of 3 answers of the file are compared" in caplog.text) == (protocol == "thudm")

    rows = [json.loads(line) for line in (tmp_path / "generated_predictions.jsonl").read_text().splitlines()]
    assert [row["predict"] for row in rows] == [cut, "好看", "白色"] and rows[0]["labels"] == LONG
    scored = {"scored_labels": cut, "scored_predict": answers[0]} if protocol == "thudm" else {}
    asked = {"row": 1, "messages": [{"role": "user", "content": "裤"}]}
    assert rows[0] == {"prompt": "裤", "labels": LONG, "predict": cut} | asked | scored
    padded = [{"scored_labels": None, "scored_predict": None} | row for row in rows]
    (told,) = read_scores(results, {"test": Split("test")}, padded, protocol)
    assert told.examples == 2 and ("text-bleu-4" in told.intervals) == (protocol == "thudm")
