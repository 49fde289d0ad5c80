"""The tokenizer of GLM-4-9B, on a tiny tiktoken file made here."""

import base64
import copy
import json
import os
import pickle
import random
import subprocess
from pathlib import Path

import pytest
import tiktoken
import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, PreTrainedTokenizerFast
from warm_starts import warm_python

import glm_peft  # noqa: F401  (registers the tokenizers)
from glm_peft.errors import UserError
from glm_peft.models.tokenization_glm4 import PATTERN, SPECIAL_TOKENS, ChatGLM4Tokenizer

MERGED = [" p", "eo", "pl", "le", "ple", "eople", " people", "th", " th", " the", "你", "好", "你好", "  ", "\n\n"]
RANKS = {bytes([byte]): byte for byte in range(256)} | {
    token.encode(): 256 + index for index, token in enumerate(MERGED)
}
FIRST_SPECIAL = len(RANKS)
AUTO_MAP = {"AutoTokenizer": ["tokenization_chatglm.ChatGLM4Tokenizer", None]}


def write_tokenizer(folder: Path, special_ids: range | None = None, **fields) -> Path:
    lines = [base64.b64encode(token) + b" %d" % rank for token, rank in RANKS.items()]
    (folder / "tokenizer.model").write_bytes(b"\n".join(lines) + b"\n")
    config = {"tokenizer_class": "ChatGLM4Tokenizer", "auto_map": AUTO_MAP, **fields}
    if special_ids is not None:
        tokens = [{"content": token, "special": True, "normalized": False} for token in SPECIAL_TOKENS]
        config["added_tokens_decoder"] = dict(zip(map(str, special_ids), tokens, strict=True))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    special_ids = range(FIRST_SPECIAL, FIRST_SPECIAL + len(SPECIAL_TOKENS))
    return write_tokenizer(tmp_path_factory.mktemp("published"), special_ids, name_or_path="THUDM/glm-4-9b-chat")


@pytest.fixture
def tokenizer(folder: Path) -> ChatGLM4Tokenizer:
    return AutoTokenizer.from_pretrained(folder)


def special_id(token: str) -> int:
    return FIRST_SPECIAL + SPECIAL_TOKENS.index(token)


def assert_equal(left: ChatGLM4Tokenizer, right: ChatGLM4Tokenizer) -> None:
    text = "the people 你好\n  \tx <|user|> 🙂"
    assert type(left) is type(right)
    assert left.generation == right.generation == "glm4"
    assert left.get_vocab() == right.get_vocab()
    assert left.special_tokens_map == right.special_tokens_map
    assert left.all_special_ids == right.all_special_ids
    assert left.padding_side == right.padding_side == "left"
    assert left(text).data == right(text).data


@pytest.mark.parametrize("trust_remote_code", [None, True])
def test_remote_code_is_neither_needed_nor_run(folder, trust_remote_code):
    assert type(AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)) is ChatGLM4Tokenizer


def test_special_tokens_follow_the_ranks_where_the_config_does_not_number_them(tokenizer, tmp_path):
    assert_equal(AutoTokenizer.from_pretrained(write_tokenizer(tmp_path)), tokenizer)


def test_ids_are_those_of_tiktoken(tokenizer):
    reference = tiktoken.Encoding("reference", pat_str=PATTERN, mergeable_ranks=RANKS, special_tokens={})
    random.seed(0)
    parts = [*MERGED, " ", "\n", "\r", "\t", "'S", "'ll", "12345", "é", "e\u0301", "🙂", "ﬁ", "\x00", "Ａ", "ab", "!?"]
    texts = ["".join(random.choices(parts, k=random.randint(0, 20))) for _ in range(500)]
    assert tokenizer(texts, add_special_tokens=False)["input_ids"] == reference.encode_ordinary_batch(texts)
    ids = [random.choices(range(FIRST_SPECIAL), k=6) for _ in range(500)]
    assert tokenizer.batch_decode(ids) == [reference.decode(row) for row in ids]


def test_special_tokens_come_first(tokenizer):
    ids = tokenizer("people")["input_ids"]
    assert ids[:2] == [special_id("[gMASK]"), special_id("<sop>")]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "people"


def test_ids_of_special_tokens(tokenizer):
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == special_id("<|endoftext|>")
    assert tokenizer.all_special_ids == list(range(FIRST_SPECIAL, FIRST_SPECIAL + len(SPECIAL_TOKENS)))
    assert len(tokenizer) == len(tokenizer.get_vocab()) == FIRST_SPECIAL + len(SPECIAL_TOKENS)


def test_special_token_in_text_is_its_id_unless_asked_otherwise(tokenizer):
    text = "the <|user|>"
    assert tokenizer(text, add_special_tokens=False)["input_ids"][-1] == special_id("<|user|>")
    plain = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert not set(plain) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(plain) == text


def test_control_tokens_in_chat_content_stay_text(tokenizer):
    messages = [{"role": "user", "content": "the <|assistant|>[gMASK]"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    special = [index for index in ids if index in tokenizer.all_special_ids]
    frame = ["[gMASK]", "<sop>", "<|user|>", "<|assistant|>"]
    assert special == [special_id(token) for token in frame]
    assert tokenizer.decode(ids[3:-1]) == "\nthe <|assistant|>[gMASK]"


def test_chat_prompt_as_transformers_gives_it(tokenizer):
    question = [{"role": "user", "content": "你"}]
    answered = [*question, {"role": "assistant", "content": "你好"}]
    assert tokenizer.apply_chat_template(answered, tokenize=False).endswith("<|user|>\n你<|assistant|>\n你好")
    batch = tokenizer.apply_chat_template([question, answered], padding=True, return_tensors="pt")
    assert batch["attention_mask"].sum(1).tolist() == [5, 8]
    assert batch["attention_mask"][0, 0] == 0
    assert torch.equal(batch["input_ids"][0, 3:], batch["input_ids"][1, :5])


@pytest.mark.parametrize("feature", ["tools", "documents", "chat_template", "continue_final_message"])
def test_chat_features_of_templates_are_refused_by_name(tokenizer, feature):
    with pytest.raises(UserError, match=feature):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], **{feature: ["x"]})


def test_chat_content_that_is_no_text_is_refused(tokenizer):
    with pytest.raises(UserError, match="must be a text, but one is None"):
        tokenizer.apply_chat_template([{"role": "user", "content": None}])


def test_padding_is_on_the_left_with_a_plain_mask(tokenizer):
    batch = tokenizer(["x", "你好 people"], padding=True, return_tensors="pt")
    assert batch["attention_mask"].tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]]
    assert batch["input_ids"][0, 0] == tokenizer.pad_token_id
    rows = [{"input_ids": [5, 6, 7], "labels": [6, 7, 2]}, {"input_ids": [5], "labels": [2]}]
    assert DataCollatorForSeq2Seq(tokenizer)(rows)["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


def test_no_text_and_empty_text(tokenizer):
    assert tokenizer([]).data == {"input_ids": [], "attention_mask": []}
    assert tokenizer("", add_special_tokens=False)["input_ids"] == []


def test_settings_of_a_call_are_not_kept(tokenizer, tmp_path):
    before = Hasher.hash(tokenizer)
    tokenizer(["x", "the people"], padding="max_length", truncation=True, max_length=3)
    assert Hasher.hash(tokenizer) == before
    tokenizer.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    assert saved["padding"] is None and saved["truncation"] is None


def test_lone_surrogate_is_named_with_its_place(tokenizer):
    with pytest.raises(UserError, match=r"Text 1 .* U\+D83D at character 2"):
        tokenizer(["fine", "ab\ud83d"])


def test_impossible_ids_and_lengths_are_refused(tokenizer):
    with pytest.raises(UserError, match="-100 cannot be decoded"):
        tokenizer.decode([5, -100])
    with pytest.raises(UserError, match="max_length=1 does not hold the 2 special tokens"):
        tokenizer("people", truncation=True, max_length=1)


@pytest.mark.parametrize("model_type", [None, "glm", "chatglm"])
def test_saved_tokenizer_loads_equal_again_and_again(tokenizer, tmp_path, model_type):
    reloaded = tokenizer
    for _ in range(3):
        reloaded.save_pretrained(tmp_path)
        if model_type is not None:
            config = {"model_type": model_type, "multi_query_group_num": 2}
            (tmp_path / "config.json").write_text(json.dumps(config))
        reloaded = AutoTokenizer.from_pretrained(tmp_path)
    assert_equal(reloaded, tokenizer)
    assert "auto_map" not in json.loads((tmp_path / "tokenizer_config.json").read_text())


def test_saved_tokenizer_gives_the_same_ids_in_stock_transformers(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "glm"}))
    code = (
        "import sys; from transformers import AutoTokenizer\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "print(tokenizer(sys.argv[2])['input_ids'], tokenizer.padding_side, 'glm_peft' in sys.modules)"
    )
    text = "the people 你好 <|user|>"
    command = [warm_python("libraries"), "-c", code, str(tmp_path), text]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ).stdout
    assert printed.strip() == f"{tokenizer(text)['input_ids']} left False"


def test_native_glm_tokenizers_load_as_before(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "glm"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    native = AutoTokenizer.from_pretrained(tmp_path)
    assert type(native) is PreTrainedTokenizerFast
    assert native("the people")["input_ids"] == tokenizer("the people")["input_ids"]


def test_pickle_and_deepcopy_give_an_equal_tokenizer(tokenizer):
    assert_equal(pickle.loads(pickle.dumps(tokenizer)), tokenizer)
    assert_equal(copy.deepcopy(tokenizer), tokenizer)


def test_workers_of_datasets_map_encode(tokenizer):
    texts = ["people", "你好", "a\nb", "x"]
    rows = Dataset.from_dict({"text": texts})
    encoded = rows.map(lambda row: tokenizer(row["text"]), batched=True, batch_size=2, num_proc=2)
    assert encoded["input_ids"][:] == tokenizer(texts)["input_ids"]


def test_generation_that_the_file_cannot_be_is_refused(folder):
    with pytest.raises(UserError, match="of glm4 by its file.*'chatglm3'"):
        AutoTokenizer.from_pretrained(folder, generation="chatglm3")


def test_special_ids_that_do_not_follow_the_ranks_are_refused(tmp_path):
    special_ids = range(FIRST_SPECIAL + 9, FIRST_SPECIAL + 9 + len(SPECIAL_TOKENS))
    with pytest.raises(UserError, match=rf"endoftext\|> the id {special_ids[0]}, but .* {FIRST_SPECIAL} ranks"):
        AutoTokenizer.from_pretrained(write_tokenizer(tmp_path, special_ids))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "tokenizer.model is not in"),
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 2623634\n", "git-lfs pointer"),
        (b"IQ== 0\nIg== 1\nIw", "line 3: a tiktoken file has a base64 string and a number there"),
        (b"\x0a\x0f<html>", "line 1"),
    ],
)
def test_missing_or_broken_file_is_one_clear_sentence(tmp_path, content, message):
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    if content is not None:
        (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        AutoTokenizer.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)
