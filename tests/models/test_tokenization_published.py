"""The published tokenizer files give the published ids, and back, for every recorded line."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from warm_starts import warm_python

import glm_peft  # noqa: F401  (registers the tokenizers)

NAMES = ("chatglm-6b", "chatglm2-6b", "chatglm3-6b", "glm-4-9b-chat")


@pytest.fixture(scope="module", params=NAMES)
def folder(request, reference_tokenizers: Path) -> Path:
    return reference_tokenizers / request.param


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[dict]:
    return json.loads((folder / "expected_encode.json").read_text())


def messages_of(row: dict) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": row["system"]}] if "system" in row else []
    for question, answer in row["history"]:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return [*messages, {"role": "user", "content": row["query"]}]


def test_generation_is_known(folder, tokenizer):
    generations = dict(zip(NAMES, ("chatglm", "chatglm2", "chatglm3", "glm4"), strict=True))
    assert tokenizer.generation == generations[folder.name]


def test_ids_are_the_published_ones(tokenizer, expected):
    texts = [row["text"] for row in expected]
    assert tokenizer(texts, add_special_tokens=False)["input_ids"] == [row["ids"] for row in expected]
    assert tokenizer(texts)["input_ids"] == [row["ids_with_special"] for row in expected]
    assert [tokenizer.encode(text) for text in texts] == [row["ids_with_special"] for row in expected]


def test_texts_are_the_published_ones(tokenizer, expected):
    assert tokenizer.batch_decode([row["ids"] for row in expected]) == [row["decoded"] for row in expected]


def test_skipping_special_tokens_leaves_the_text(tokenizer, expected):
    special = set(tokenizer.all_special_ids)
    rows = [row for row in expected if special.isdisjoint(row["ids"])]
    ends = [tokenizer.pad_token_id, tokenizer.eos_token_id]
    ids = [ends[:1] + row["ids_with_special"] + ends for row in rows]
    assert len(rows) > 200
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == [row["decoded"] for row in rows]


def test_chat_prompts_are_the_published_ones(folder, tokenizer):
    rows = json.loads((folder / "expected_chat.json").read_text())
    rows = [row for row in rows if "ids" in row]
    conversations = [messages_of(row) for row in rows]
    prompts = tokenizer.apply_chat_template(conversations, add_generation_prompt=True, return_dict=False)
    assert prompts == [row["ids"] for row in rows]


def test_saved_and_loaded_it_gives_the_same_ids(tokenizer, expected, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    texts = [row["text"] for row in expected]
    assert reloaded(texts)["input_ids"] == tokenizer(texts)["input_ids"]
    assert reloaded.generation == tokenizer.generation


def test_stock_transformers_reads_a_saved_folder_right_or_not_at_all(folder, tokenizer, expected, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "glm"}))
    code = (
        "import json, sys; from transformers import AutoTokenizer\n"
        "rows = json.load(open(sys.argv[2]))\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "print(sum(tokenizer.encode(row['text']) != row['ids_with_special'] for row in rows))"
    )
    command = [warm_python("libraries"), "-c", code, str(tmp_path), str(folder / "expected_encode.json")]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    if tokenizer.generation == "glm4":
        assert result.stdout.strip() == "0"
    else:
        assert result.returncode != 0
        assert "Couldn't instantiate the backend tokenizer" in result.stderr


def test_word_that_holds_a_special_token_survives(tokenizer):
    ids = tokenizer("people stop")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "people stop"
