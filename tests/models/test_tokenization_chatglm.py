"""The tokenizers of ChatGLM-6B, ChatGLM2-6B and ChatGLM3-6B, on tiny SentencePiece files made here."""

import copy
import json
import pickle
import random
from pathlib import Path

import pytest
import sentencepiece
import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from transformers import AutoTokenizer, DataCollatorForSeq2Seq

import glm_peft  # noqa: F401  (registers the tokenizers)
from glm_peft.errors import UserError
from glm_peft.models.tokenization_chatglm import ROLE_TOKENS, SAVED_FILE, ChatGLMTokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz你好世界人民大家说话的了是在有我他这个们中来上"
BLANKS = ["<n>", "<|tab|>", *[f"<|blank_{count}|>" for count in range(2, 81)]]
ICE_CONTROLS = ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>"]
AUTO_MAP = {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]}


def train(folder: Path, filename: str, **options) -> None:
    random.seed(0)
    words = ["".join(random.choices(LETTERS, k=random.randint(1, 5))) for _ in range(4000)]
    sentences = [" ".join(random.choices([*words, "people"], k=8)) for _ in range(1500)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_prefix=str(folder / "trained"),
        byte_fallback=True,
        num_threads=1,
        minloglevel=2,
        **options,
    )
    (folder / "trained.vocab").unlink()
    (folder / "trained.model").rename(folder / filename)


def write_config(folder: Path, name: str = "tokenizer_config.json", **fields) -> Path:
    (folder / name).write_text(json.dumps(fields))
    return folder


def copy_tokenizer(source: Path, target: Path, **fields) -> Path:
    """The tokenizer file of a folder under a new config, in a folder whose name tells nothing."""
    for file in source.glob("*.model"):
        (target / file.name).write_bytes(file.read_bytes())
    return write_config(target, tokenizer_class="ChatGLMTokenizer", auto_map=AUTO_MAP, **fields)


@pytest.fixture(scope="module")
def ice_text_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    options = {"model_type": "unigram", "vocab_size": 700, "normalization_rule_name": "nmt_nfkc", "pad_id": 3}
    train(folder, "ice_text.model", control_symbols=ICE_CONTROLS, user_defined_symbols=BLANKS, **options)
    tokens = {"bos_token": "<sop>", "eos_token": "<eop>", "end_token": "</s>", "gmask_token": "[gMASK]"}
    return write_config(folder, tokenizer_class="ChatGLMTokenizer", num_image_tokens=0, auto_map=AUTO_MAP, **tokens)


@pytest.fixture(scope="module")
def bpe_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    options = {"model_type": "bpe", "vocab_size": 500, "normalization_rule_name": "identity"}
    train(folder, "tokenizer.model", remove_extra_whitespaces=False, **options)
    return write_config(folder, tokenizer_class="ChatGLMTokenizer", auto_map=AUTO_MAP)


@pytest.fixture(scope="module")
def ice_text(ice_text_folder: Path) -> ChatGLMTokenizer:
    return AutoTokenizer.from_pretrained(ice_text_folder)


@pytest.fixture(scope="module")
def chatglm2(bpe_folder: Path) -> ChatGLMTokenizer:
    return AutoTokenizer.from_pretrained(bpe_folder, generation="chatglm2")


@pytest.fixture(scope="module")
def chatglm3(bpe_folder: Path) -> ChatGLMTokenizer:
    return AutoTokenizer.from_pretrained(bpe_folder, generation="chatglm3")


@pytest.fixture(params=["ice_text", "chatglm2", "chatglm3"])
def tokenizer(request) -> ChatGLMTokenizer:
    return request.getfixturevalue(request.param)


def assert_equal(left: ChatGLMTokenizer, right: ChatGLMTokenizer) -> None:
    text = "people 你好\n  \tx <|user|> 🙂"
    assert type(left) is type(right)
    assert left.generation == right.generation
    assert left.get_vocab() == right.get_vocab()
    assert left.special_tokens_map == right.special_tokens_map
    assert left.all_special_ids == right.all_special_ids
    assert left(text).data == right(text).data


# Which tokenizer it is


@pytest.mark.parametrize("trust_remote_code", [None, False, True])
def test_remote_code_is_neither_needed_nor_run(bpe_folder, trust_remote_code):
    tokenizer = AutoTokenizer.from_pretrained(bpe_folder, trust_remote_code=trust_remote_code)
    assert type(tokenizer) is ChatGLMTokenizer


@pytest.mark.parametrize("model_type", ["glm", "chatglm"])
def test_class_name_decides_whatever_the_model_type(bpe_folder, tmp_path, model_type):
    copy_tokenizer(bpe_folder, tmp_path)
    write_config(tmp_path, "config.json", model_type=model_type, multi_query_group_num=2)
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is ChatGLMTokenizer


@pytest.mark.parametrize(
    ("name", "generation"),
    [("THUDM/chatglm2-6b", "chatglm2"), ("THUDM/chatglm3-6b-32k", "chatglm3"), ("x/y", None), (None, None)],
)
def test_recorded_name_tells_the_generation(bpe_folder, tmp_path, name, generation):
    copy_tokenizer(bpe_folder, tmp_path, name_or_path=name)
    assert AutoTokenizer.from_pretrained(tmp_path).generation == generation


def test_name_in_the_model_config_tells_the_generation_where_the_tokenizer_has_none(bpe_folder, tmp_path):
    copy_tokenizer(bpe_folder, tmp_path)
    write_config(tmp_path, "config.json", model_type="chatglm", _name_or_path="THUDM/chatglm3-6b")
    assert AutoTokenizer.from_pretrained(tmp_path).generation == "chatglm3"


def test_folder_name_tells_nothing(bpe_folder, tmp_path):
    folder = tmp_path / "chatglm3-6b"
    folder.mkdir()
    assert AutoTokenizer.from_pretrained(copy_tokenizer(bpe_folder, folder)).generation is None


def test_role_tokens_listed_in_the_file_tell_chatglm3(bpe_folder, tmp_path):
    copy_tokenizer(bpe_folder, tmp_path, additional_special_tokens=["<|user|>", "<|observation|>"])
    assert AutoTokenizer.from_pretrained(tmp_path).generation == "chatglm3"


def test_argument_wins_over_the_record_and_survives_reloads(bpe_folder, tmp_path):
    copy_tokenizer(bpe_folder, tmp_path, name_or_path="THUDM/chatglm2-6b")
    write_config(tmp_path, "config.json", model_type="chatglm", _name_or_path="THUDM/chatglm2-6b")
    AutoTokenizer.from_pretrained(tmp_path, generation="chatglm3").save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).generation == "chatglm3"


def test_ice_text_needs_no_record(ice_text):
    assert ice_text.generation == "chatglm"


def test_generation_that_the_file_cannot_be_is_refused(bpe_folder, ice_text_folder):
    with pytest.raises(UserError, match="chatglm2 or chatglm3 by its file.*'glm4'"):
        AutoTokenizer.from_pretrained(bpe_folder, generation="glm4")
    with pytest.raises(UserError, match="chatglm by its file.*'chatglm3'"):
        AutoTokenizer.from_pretrained(ice_text_folder, generation="chatglm3")


def test_generation_is_read_only(chatglm3):
    with pytest.raises(AttributeError):
        chatglm3.generation = "chatglm2"


def test_unknown_generation_encodes_and_only_its_chat_prompt_is_refused(bpe_folder, chatglm2):
    unknown = AutoTokenizer.from_pretrained(bpe_folder)
    assert unknown("people 你好").data == chatglm2("people 你好").data
    with pytest.raises(UserError, match="chat_format"):
        unknown.apply_chat_template([{"role": "user", "content": "你好"}], add_generation_prompt=True)


# Ids and texts


def test_special_tokens_come_last_in_chatglm(ice_text):
    assert ice_text.convert_ids_to_tokens(ice_text("好")["input_ids"])[-2:] == ["[gMASK]", "<sop>"]
    assert (ice_text.bos_token, ice_text.eos_token, ice_text.pad_token_id) == ("<sop>", "<eop>", 3)


def test_special_tokens_come_first_in_chatglm2(chatglm2):
    assert chatglm2("好")["input_ids"][:2] == [501, 503]
    assert (chatglm2.eos_token_id, chatglm2.pad_token_id, chatglm2.unk_token_id) == (2, 0, 0)
    assert chatglm2.all_special_ids == [1, 2, 0, 500, 501, 502, 503, 504]


def test_chatglm3_has_four_role_tokens_more(chatglm2, chatglm3):
    assert chatglm3.convert_tokens_to_ids(ROLE_TOKENS) == [505, 506, 507, 508]
    assert chatglm2.convert_tokens_to_ids(ROLE_TOKENS) == [chatglm2.unk_token_id] * 4
    assert (len(chatglm2), len(chatglm3)) == (505, 509)
    assert len(chatglm3.get_vocab()) == chatglm3.vocab_size == 509


@pytest.mark.parametrize("text", ["people", "[gMASK]sop", "<|user|>", "</s>", "<unk>", "<sop><eop>", "[MASK]"])
@pytest.mark.parametrize("split_special_tokens", [True, False])
def test_special_tokens_are_never_looked_for_in_text(tokenizer, text, split_special_tokens):
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=split_special_tokens)["input_ids"]
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("a\nb", ["▁a", "<n>", "b"]),
        ("\tb", ["▁", "<|tab|>", "b"]),
        ("a     b", ["▁a", "<|blank_5|>", "b"]),
        ("a" + " " * 162 + "b", ["▁a", "<|blank_80|>", "<|blank_80|>", "<|blank_2|>", "b"]),
        ("a" + " " * 81 + "b", ["▁a", "<|blank_80|>", "▁b"]),
        ("a<n><|blank_7|>b", ["▁a", "<n>", "<|blank_7|>", "b"]),
    ],
)
def test_blanks_are_pieces_of_their_own_in_chatglm(ice_text, text, pieces):
    ids = ice_text.encode(text, add_special_tokens=False)
    assert ice_text.convert_ids_to_tokens(ids) == pieces
    assert ice_text.decode(ids) == text.replace("<n>", "\n").replace("<|blank_7|>", " " * 7)


@pytest.mark.parametrize("text", ["", " ", "a  b\t\n c ", "🙂👩‍👩‍👧", "e\u0301", "\x00\x01\x7f", "ﬁ①Ａ"])
def test_chatglm2_text_survives_whatever_it_holds(chatglm2, text):
    ids = chatglm2.encode(text, add_special_tokens=False)
    assert chatglm2.decode(ids) == text


def test_old_revision_has_image_ids_before_those_of_text(ice_text_folder, ice_text, tmp_path):
    copy_tokenizer(ice_text_folder, tmp_path, num_image_tokens=20000)
    old = AutoTokenizer.from_pretrained(tmp_path)
    text = "people\n你好  x"
    assert old(text)["input_ids"] == [index + 20000 for index in ice_text(text)["input_ids"]]
    assert old.decode(old(text)["input_ids"], skip_special_tokens=True) == text
    assert (old.pad_token_id, old.vocab_size) == (20003, ice_text.vocab_size + 20000)
    assert old.convert_ids_to_tokens([7, old.eos_token_id]) == ["<image_7>", "<eop>"]
    old.save_pretrained(tmp_path)
    assert_equal(AutoTokenizer.from_pretrained(tmp_path), old)


def test_old_revision_without_a_number_is_known_by_the_models_vocabulary(ice_text_folder, tmp_path):
    copy_tokenizer(ice_text_folder, tmp_path)
    write_config(tmp_path, "config.json", model_type="chatglm", vocab_size=150528, position_encoding_2d=True)
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token_id == 20003


def test_skipping_special_tokens_leaves_just_the_text(tokenizer):
    ids = tokenizer("people 你好\nx")["input_ids"]
    ids = [tokenizer.pad_token_id] * 3 + ids + [tokenizer.eos_token_id]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "people 你好\nx"
    assert tokenizer.batch_decode(torch.tensor([ids, ids]), skip_special_tokens=True) == ["people 你好\nx"] * 2


def test_stretches_between_special_tokens_are_read_each_by_itself(chatglm3):
    question, answer = (chatglm3.encode(text, add_special_tokens=False) for text in ("你好", "people"))
    ids = [506, *question, 507, *answer, 2]
    assert chatglm3.decode(ids) == "<|user|>你好<|assistant|>people</s>"
    assert chatglm3.decode(ids, skip_special_tokens=True) == "你好people"


def test_ids_beyond_the_vocabulary_are_no_text(tokenizer):
    beyond = [len(tokenizer), len(tokenizer) + 100]
    assert tokenizer.decode(tokenizer.encode("x", add_special_tokens=False) + beyond) == "x"
    assert tokenizer.convert_ids_to_tokens(beyond) == ["", ""]


def test_negative_ids_are_refused(tokenizer):
    with pytest.raises(UserError, match="-100 cannot be decoded"):
        tokenizer.decode([5, -100])


def test_lone_surrogate_is_named_with_its_place(tokenizer):
    with pytest.raises(UserError, match=r"Text 1 .* U\+D83D at character 2"):
        tokenizer(["fine", "ab\ud83d"])


# The interface of transformers


def test_a_batch_gives_what_its_texts_give(tokenizer):
    texts = ["people", "", "你好 a\n  b"]
    batch = tokenizer(texts)
    assert batch["input_ids"] == [tokenizer(text)["input_ids"] for text in texts]
    assert batch["input_ids"] == [tokenizer.encode(text) for text in texts]
    assert batch["attention_mask"] == [[1] * len(ids) for ids in batch["input_ids"]]
    assert tokenizer([]).data == {"input_ids": [], "attention_mask": []}


def test_fast_path_agrees_with_that_of_transformers(tokenizer):
    texts = ["people 你好", "a\n b"]
    options = {"truncation": True, "max_length": 5, "padding": "max_length"}
    assert tokenizer(texts, **options).data == {
        key: tokenizer(texts, return_length=True, **options)[key] for key in ("input_ids", "attention_mask")
    }


def test_padding_is_on_the_left_with_a_plain_mask(tokenizer):
    batch = tokenizer(["a", "people 你好"], padding=True, return_tensors="pt")
    longest = batch["input_ids"].shape[1]
    assert batch["attention_mask"].tolist()[0] == [0] * (longest - 3) + [1] * 3
    assert batch["input_ids"].tolist()[0][: longest - 3] == [tokenizer.pad_token_id] * (longest - 3)


def test_collator_pads_inputs_and_labels(tokenizer):
    rows = [{"input_ids": [5, 6, 7], "labels": [6, 7, 2]}, {"input_ids": [5], "labels": [2]}]
    batch = DataCollatorForSeq2Seq(tokenizer)(rows)
    assert batch["input_ids"][1].tolist() == [tokenizer.pad_token_id] * 2 + [5]
    assert batch["attention_mask"][1].tolist() == [0, 0, 1]
    assert batch["labels"][1].tolist() == [-100, -100, 2]


@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_keeps_the_special_tokens(tokenizer, side):
    tokenizer.truncation_side = side
    text = tokenizer.encode("people 你好 people", add_special_tokens=False)
    kept = text[:3] if side == "right" else text[-3:]
    ids = tokenizer("people 你好 people", truncation=True, max_length=5)["input_ids"]
    assert ids == tokenizer.build_inputs_with_special_tokens(kept)
    tokenizer.truncation_side = "right"


def test_length_without_room_for_special_tokens_is_refused(tokenizer):
    with pytest.raises(UserError, match="max_length=1 does not hold the 2 special tokens"):
        tokenizer("people", truncation=True, max_length=1)


def test_pairs_are_joined(tokenizer):
    first, second = (tokenizer.encode(text, add_special_tokens=False) for text in ("people", "你好"))
    ids = tokenizer("people", "你好")["input_ids"]
    assert ids == tokenizer.build_inputs_with_special_tokens(first, second)


def test_tokens_are_the_pieces_of_the_ids(tokenizer):
    tokens = tokenizer.tokenize("people 你好")
    assert tokenizer.convert_tokens_to_ids(tokens) == tokenizer.encode("people 你好", add_special_tokens=False)
    assert tokenizer.convert_tokens_to_string(tokens) == "people 你好"


def test_token_outside_the_vocabulary_cannot_be_added(tokenizer):
    with pytest.raises(UserError, match="'<new>' is not in the vocabulary"):
        tokenizer.add_special_tokens({"pad_token": "<new>"})


# Saving, copying, workers


@pytest.mark.parametrize("model_type", [None, "glm", "chatglm"])
def test_saved_tokenizer_loads_equal_again_and_again(tokenizer, tmp_path, model_type):
    reloaded = tokenizer
    for _ in range(3):
        reloaded.save_pretrained(tmp_path)
        if model_type is not None:
            write_config(tmp_path, "config.json", model_type=model_type)
        reloaded = AutoTokenizer.from_pretrained(tmp_path)
    assert_equal(reloaded, tokenizer)


def test_saved_folder_names_no_code_and_no_file_that_stock_transformers_would_misread(chatglm3, bpe_folder, tmp_path):
    chatglm3.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {SAVED_FILE, "tokenizer_config.json"}
    assert (tmp_path / SAVED_FILE).read_bytes() == (bpe_folder / "tokenizer.model").read_bytes()
    assert "auto_map" not in json.loads((tmp_path / "tokenizer_config.json").read_text())


def test_pickle_and_deepcopy_give_an_equal_tokenizer(tokenizer):
    assert_equal(pickle.loads(pickle.dumps(tokenizer)), tokenizer)
    assert_equal(copy.deepcopy(tokenizer), tokenizer)


def test_fingerprint_does_not_change_with_use(tokenizer):
    before = Hasher.hash(tokenizer)
    tokenizer(["a", "people"], padding=True, truncation=True, max_length=4)
    tokenizer.decode([5, 6], skip_special_tokens=True)
    assert Hasher.hash(tokenizer) == before


def test_workers_of_datasets_map_encode(tokenizer):
    texts = ["people", "你好", "a\nb", "x"]
    rows = Dataset.from_dict({"text": texts})
    encoded = rows.map(lambda row: tokenizer(row["text"]), batched=True, batch_size=2, num_proc=2)
    assert encoded["input_ids"][:] == tokenizer(texts)["input_ids"]


# Broken files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "tokenizer.model .* is not in"),
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1018370\n", "git-lfs pointer"),
        (b"\x0a\x0fcut off in the middle", "not a complete SentencePiece model"),
    ],
)
def test_missing_or_broken_file_is_one_clear_sentence(tmp_path, content, message):
    write_config(tmp_path, tokenizer_class="ChatGLMTokenizer")
    if content is not None:
        (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        AutoTokenizer.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)
