"""Conversations into features and batches: what is learnt, what is cut, what the report says."""

import json
from pathlib import Path

import pytest
import torch
from data_fakes import END, CharacterFormat, CharacterTokenizer, make_data_args, text_of

from glm_peft.data import build_generation_features, build_training_features
from glm_peft.errors import UserError
from glm_peft.models.chat_formats import get_chat_format
from glm_peft.models.tokenization_chatglm import ChatGLMTokenizer
from glm_peft.models.tokenization_glm4 import ChatGLM4Tokenizer
from glm_peft.preprocessing.collators import GenerationCollator, TrainingCollator
from glm_peft.preprocessing.example_description import describe_example
from glm_peft.preprocessing.label_weights import has_weights, split_labels
from glm_peft.preprocessing.split_loading import load_splits

CHAT = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "q1"},
    {"role": "assistant", "content": "a1"},
    {"role": "user", "content": "q2"},
    {"role": "assistant", "content": "a2"},
]


@pytest.fixture
def prepare(tmp_path: Path):
    """Writes rows to a file and gives its split with the data arguments that belong to it."""

    def prepare(rows: list[dict], split: str = "train", **flags: object):
        file = tmp_path / "rows.json"
        file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
        data_args = make_data_args(**{f"{split}_file": str(file)}, **flags)
        return load_splits(data_args, [split])[split], data_args

    return prepare


@pytest.fixture
def training_features(prepare):
    def build(rows: list[dict], **flags: object):
        split, data_args = prepare(rows, **flags)
        return build_training_features(split, CharacterFormat(), CharacterTokenizer(), data_args)

    return build


@pytest.fixture
def generation_features(prepare):
    def build(rows: list[dict], **flags: object):
        split, data_args = prepare(rows, split="test", **flags)
        return build_generation_features(split, CharacterFormat(), CharacterTokenizer(), data_args)

    return build


def pairs(*texts: str) -> list[dict]:
    return [dict(zip(("content", "summary"), text.split("="), strict=True)) for text in texts]


def test_the_loss_is_on_the_answer_and_its_end(training_features):
    dataset, _ = training_features(pairs("qq=a"))
    [example] = dataset
    assert example["input_ids"] == [ord("q"), ord("q"), ord(">"), ord("a"), END]
    assert example["labels"] == [-100, -100, -100, ord("a"), END]
    assert example["length"] == 5


def test_every_assistant_turn_is_an_example_with_its_history_as_the_prompt(training_features):
    dataset, report = training_features([{"messages": CHAT}])
    assert [text_of(ids) for ids in dataset["input_ids"]] == ["s!q1>a1.", "s!q1>a1;q2>a2."]
    learnt = [[label for label in labels if label != -100] for labels in dataset["labels"]]
    assert [text_of(labels) for labels in learnt] == ["a1.", "a2."]
    assert report.examples == 2
    muted = [*CHAT[:2], {**CHAT[2], "loss": False}, *CHAT[3:]]
    dataset, _ = training_features([{"messages": muted}])
    assert [text_of(ids) for ids in dataset["input_ids"]] == ["s!q1>a1;q2>a2."]


def test_an_answer_has_a_weight_in_its_labels_alone(training_features):
    weighed = [*CHAT[:2], {**CHAT[2], "weight": 0.25, "loss": True}, CHAT[3], {**CHAT[4], "weight": 1}]
    dataset, _ = training_features([{"messages": weighed}])
    plain, _ = training_features([{"messages": CHAT}])
    assert dataset["input_ids"] == plain["input_ids"] and has_weights(dataset) and not has_weights(plain)
    (tokens, weights), (_, none) = (split_labels(torch.tensor(labels)) for labels in dataset["labels"])
    assert tokens.tolist() == plain["labels"][0] and none is None
    assert [weight for weight, label in zip(weights.tolist(), tokens.tolist(), strict=True) if label != -100] == [
        0.25
    ] * 3


def test_only_the_last_turn_is_an_example_on_request(training_features):
    dataset, _ = training_features([{"messages": CHAT}], train_on="last")
    assert [text_of(ids) for ids in dataset["input_ids"]] == ["s!q1>a1;q2>a2."]


def test_rows_of_columns_learn_the_response_only(training_features):
    dataset, _ = training_features([{"prompt": "q2", "response": "a2", "history": [["q1", "a1"]]}])
    assert [text_of(ids) for ids in dataset["input_ids"]] == ["q1>a1;q2>a2."]


def test_training_and_prediction_have_the_same_prompt_ids(training_features, generation_features):
    for flags in ({}, {"source_prefix": "Say: "}, {"max_source_length": 4}):
        trained, _ = training_features([{"messages": CHAT}], train_on="last", **flags)
        asked = generation_features([{"messages": CHAT}], **flags).dataset
        prompt = [
            id_ for id_, label in zip(trained[0]["input_ids"], trained[0]["labels"], strict=True) if label == -100
        ]
        assert prompt == asked[0]["input_ids"]


def test_the_source_prefix_stands_before_the_last_question_and_a_system_text_where_there_is_none(training_features):
    for rows, prompts in (([{"messages": CHAT}], ["s!P:q1>a1.", "s!q1>a1;P:q2>a2."]), (pairs("q=a"), ["S!P:q>a."])):
        dataset, _ = training_features(rows, source_prefix="P:", system_text="S")
        assert [text_of(ids) for ids in dataset["input_ids"]] == prompts


def test_references_and_prompts_stay_outside_the_batch_in_order(generation_features):
    features = generation_features([*pairs("q1=a1", "q2="), {"content": "q3"}], source_prefix="P:", system_text="S")
    assert features.dataset.column_names == ["input_ids", "length"]
    assert [text_of(ids) for ids in features.dataset["input_ids"]] == ["S!P:q1>", "S!P:q2>", "S!P:q3>"]
    system, question = {"role": "system", "content": "S"}, {"role": "user", "content": "q3"}
    assert features.rows[2] == {"row": 3, "messages": [system, question]}
    assert features.prompts == ["q1", "q2", "q3"]
    assert features.references == ["a1", None, None]
    assert "test: 3 rows read from" in str(features.report)
    assert "3 examples, 2 rows without an answer to compare with" in str(features.report)


def test_what_is_too_long_is_cut_and_counted(training_features):
    rows = pairs("q=a", "qqqqqq=a", "q=aaaaaa", "qqq=aa")
    dataset, report = training_features(rows, max_source_length=4, max_target_length=3)
    assert [text_of(ids) for ids in dataset["input_ids"]] == ["q>a.", "qqq>a.", "q>aa.", "qqq>aa."]
    prompts, answers = report.lengths
    assert (prompts.percentiles, prompts.truncated) == ((2, 7, 7, 7), 1)
    assert (answers.percentiles, answers.truncated) == ((2, 7, 7, 7), 1)


def test_a_row_that_is_cut_is_handed_to_the_chat_format_once(prepare, monkeypatch):
    calls = []
    for name in ("encode_prompt", "encode_answer"):
        encode = getattr(CharacterFormat, name)

        def noted(*args: object, encode=encode, name=name, **kwargs: object):
            calls.append(name)
            return encode(*args, **kwargs)

        monkeypatch.setattr(CharacterFormat, name, noted)
    split, data_args = prepare(pairs("qqqqqq=aaaaaa"), max_source_length=4, max_target_length=3)
    _, report = build_training_features(split, CharacterFormat(), CharacterTokenizer(), data_args)
    assert calls == ["encode_prompt", "encode_answer"]
    assert [lengths.percentiles[-1] for lengths in report.lengths] == [7, 7]


@pytest.mark.parametrize(("own", "text"), [(5, "q>aaaa."), (None, "q>aa.")])
def test_evaluation_may_have_a_limit_of_its_own(training_features, own, text):
    rows, flags = pairs("q=aaaaaa"), {"max_target_length": 3, "val_max_target_length": own}
    dataset, report = training_features(rows, split="validation", **flags)
    assert text_of(dataset[0]["input_ids"]) == text
    assert (report.lengths[1].limit, report.lengths[1].flag) == (own or 3, "--val_max_target_length")
    dataset, _ = training_features(rows, **flags)
    assert text_of(dataset[0]["input_ids"]) == "q>aa."


def test_the_suggested_limits_hold_99_percent(training_features):
    rows = [{"content": "q" * number, "summary": "a" * (2 * number)} for number in range(1, 201)]
    _, report = training_features(rows)
    assert [lengths.suggestion for lengths in report.lengths] == [199, 397]
    assert "99 % of the texts fit within --max_source_length 199 --max_target_length 397" in str(report)


def test_the_report_is_a_table_with_what_was_left_out_and_cut(training_features, tmp_path):
    rows = [*pairs("q=a", "qqqq=aaa"), {"content": ""}, {"content": "", "summary": "a"}, {"content": ""}]
    _, report = training_features(rows, skip_bad_rows=True, max_source_length=4)
    assert str(report).replace(str(tmp_path) + "/", "").split("\n") == [
        "train: 5 rows read from rows.json, 3 left out, 2 examples",
        "  left out, empty prompt: 3 (lines 3, 4, 5)",
        "  tokens      50 %    90 %    99 %     max  limit                         truncated",
        "  prompt         2       5       5       5  --max_source_length 4         1 (50.0 %)",
        "  answer         2       4       4       4  --max_target_length 128       0",
        "  99 % of the texts fit within --max_source_length 5 --max_target_length 4",
    ]


@pytest.mark.parametrize("workers", [None, 2])
def test_a_row_that_the_chat_format_refuses_is_named(training_features, workers):
    with pytest.raises(UserError, match=r"rows.json, line 2: This format has no such word."):
        training_features(pairs("q=a", "forbidden=a"), preprocessing_num_workers=workers)


def test_several_processes_give_the_same_features(training_features):
    rows = pairs(*(f"q{number}=a{number}" for number in range(50)))
    alone, _ = training_features(rows)
    together, _ = training_features(rows, preprocessing_num_workers=2)
    assert alone.to_dict() == together.to_dict()


def test_an_example_is_described_with_ids_tokens_and_loss(training_features):
    dataset, _ = training_features(pairs("q" * 9 + "=a"))
    assert describe_example(CharacterTokenizer(), dataset[0]).split("\n") == [
        "12 tokens, 2 of them carry loss",
        "  no loss " + " | ".join(["113 'q'"] * 8),
        "          113 'q' | 62 '>'",
        "  loss    97 'a' | 1 '<end>'",
    ]


def test_a_prompt_is_described_without_loss(generation_features):
    described = describe_example(CharacterTokenizer(), generation_features(pairs("q=a")).dataset[0])
    assert described == "2 tokens\n  prompt  113 'q' | 62 '>'"


FEATURES = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "length": 3}, {"input_ids": [8], "labels": [8]}]


def test_training_batches_are_padded_on_the_left_to_the_longest():
    batch = TrainingCollator(CharacterTokenizer())(FEATURES)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7], [0, 0, 8]],
        "attention_mask": [[1, 1, 1], [0, 0, 1]],
        "position_ids": [[0, 1, 2], [0, 0, 0]],
        "labels": [[-100, 6, 7], [-100, -100, 8]],
    }
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_labels_are_padded_with_the_pad_token_where_it_is_not_ignored():
    batch = TrainingCollator(CharacterTokenizer(), ignore_pad_token_for_loss=False)(FEATURES)
    assert batch["labels"].tolist() == [[-100, 6, 7], [0, 0, 8]]


def test_padding_to_a_multiple_and_on_the_right():
    tokenizer = CharacterTokenizer()
    tokenizer.padding_side = "right"
    batch = TrainingCollator(tokenizer, pad_to_multiple_of=4)(FEATURES)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0], [8, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0], [0, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100], [8, -100, -100, -100]]


def test_prompts_are_padded_on_the_left_whatever_the_tokenizer_says():
    tokenizer = CharacterTokenizer()
    tokenizer.padding_side = "right"
    batch = GenerationCollator(tokenizer)([{"input_ids": [5, 6]}, {"input_ids": [8]}])
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6], [0, 8]],
        "attention_mask": [[1, 1], [0, 1]],
        "position_ids": [[0, 1], [0, 0]],
    }


def test_a_tokenizer_without_a_pad_token_is_an_error():
    tokenizer = CharacterTokenizer()
    tokenizer.pad_token_id = None
    with pytest.raises(UserError, match="has no pad token"):
        GenerationCollator(tokenizer)(FEATURES)


# The ids of the row {"content": "类型#裤", "summary": "好看。"}: its prompt, then its answer with the end token.
LITERAL_EXAMPLES = {
    "chatglm-6b": ([5, 65421, 61, 67329, 130001, 130004], [5, 68004, 63823, 130005]),
    "chatglm2-6b": (
        [64790, 64792, 790, 30951, 517, 30910, 30939, 30996, 13, 13, 54761, 31211]
        + [33467, 31010, 56532, 13, 13, 55437, 31211],
        [30910, 35886, 31155, 2],
    ),
    "chatglm3-6b": (
        [64790, 64792, 64795, 30910, 13, 30910, 33467, 31010, 56532, 64796],
        [30910, 13, 30910, 35886, 31155, 2],
    ),
    "glm-4-9b-chat": ([151331, 151333, 151336, 198, 100173, 2, 101857, 151337], [198, 104236, 1773, 151336]),
}


@pytest.fixture(params=LITERAL_EXAMPLES)
def published(request: pytest.FixtureRequest, reference_tokenizers: Path):
    """The name, the folder and the tokenizer of each generation."""
    folder = reference_tokenizers / request.param
    tokenizer_class = ChatGLM4Tokenizer if request.param.startswith("glm-4") else ChatGLMTokenizer
    return request.param, folder, tokenizer_class.from_pretrained(str(folder))


def test_a_literal_row_gives_literal_ids_and_labels_in_every_generation(published, prepare):
    name, _, tokenizer = published
    split, data_args = prepare([{"content": "类型#裤", "summary": "好看。"}])
    [example] = build_training_features(split, get_chat_format(tokenizer), tokenizer, data_args)[0]
    prompt, answer = LITERAL_EXAMPLES[name]
    assert example["input_ids"] == prompt + answer
    assert example["labels"] == [-100] * len(prompt) + answer


def test_rows_with_history_give_the_published_prompt_ids(published, prepare):
    _, folder, tokenizer = published
    chats = json.loads((folder / "expected_chat.json").read_text(encoding="utf-8"))
    chats = [chat for chat in chats if not chat.get("system")]
    rows = [{"prompt": chat["query"], "history": chat["history"]} for chat in chats]
    split, data_args = prepare(rows, split="test", max_source_length=100_000)
    features = build_generation_features(split, get_chat_format(tokenizer), tokenizer, data_args)
    assert features.dataset["input_ids"][:] == [chat["ids"] for chat in chats]


def test_cut_rows_keep_the_end_of_the_prompt_and_of_the_answer(published, prepare):
    _, _, tokenizer = published
    flags = {"max_source_length": 24, "max_target_length": 12}
    rows = [{"content": "好", "summary": "好"}, {"content": "很好看的裤子，" * 20, "summary": "很好看的裤子，" * 20}]
    split, data_args = prepare(rows, **flags)
    short, long = build_training_features(split, get_chat_format(tokenizer), tokenizer, data_args)[0]
    last_of_prompt = [example["labels"].count(-100) - 1 for example in (short, long)]
    assert short["input_ids"][last_of_prompt[0]] == long["input_ids"][last_of_prompt[1]]
    assert short["input_ids"][-1] == long["input_ids"][-1]
    assert last_of_prompt[1] < 24 and len(long["input_ids"]) <= 36


def test_published_tokenizers_go_to_worker_processes(published, prepare):
    _, _, tokenizer = published
    split, data_args = prepare(pairs(*(f"裤{number}=好" for number in range(20))), preprocessing_num_workers=2)
    chat_format = get_chat_format(tokenizer)
    together, _ = build_training_features(split, chat_format, tokenizer, data_args)
    data_args.preprocessing_num_workers = None
    alone, _ = build_training_features(split, chat_format, tokenizer, data_args)
    assert together.to_dict() == alone.to_dict()


def test_a_fast_tokenizer_s_tokens_are_shown_as_text(reference_tokenizers):
    tokenizer = ChatGLM4Tokenizer.from_pretrained(str(reference_tokenizers / "glm-4-9b-chat"))
    prompt, answer = LITERAL_EXAMPLES["glm-4-9b-chat"]
    described = describe_example(tokenizer, {"input_ids": prompt + answer, "labels": [-100] * 8 + answer})
    assert "100173 '类型' | 2 '#' | 101857 '裤' | 151337 '<|assistant|>'" in described
    assert described.endswith("  loss    198 '\\n' | 104236 '好看' | 1773 '。' | 151336 '<|user|>'")
