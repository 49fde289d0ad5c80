"""The model maker: its folders have the published layout, and what it writes is what was asked for."""

import base64
import filecmp
import json
import os
import subprocess
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
import torch
from make_demo_data import write_demo_data
from make_tiny_model import make_tiny_model
from safetensors.torch import load_file
from sentencepiece import sentencepiece_model_pb2
from tiny_options import GENERATIONS
from tiny_tokenizers import GLM4_PATTERN, GLM4_SPECIAL
from transformers import AutoModelForCausalLM, AutoTokenizer
from warm_starts import warm_python

from glm_peft.errors import UserError

ROOT = Path(__file__).parents[1]
SENTENCE = "这款白色的衬衫 is 100% new，透气吸汗 🙂"
CHINESE = "这款白色的衬衫透气吸汗"
PUBLISHED_NAMES = {
    "chatglm": "chatglm-6b",
    "chatglm2": "chatglm2-6b",
    "chatglm3": "chatglm3-6b",
    "glm4": "glm-4-9b-chat",
}
PUBLISHED_IDS = {
    "chatglm": {"mask_token_id": 130000, "gmask_token_id": 130001, "bos_token_id": 130004, "eos_token_id": 130005},
    "chatglm2": {"eos_token_id": 2, "pad_token_id": 0},
    "chatglm3": {"eos_token_id": 2, "pad_token_id": 0},
    "glm4": {"eos_token_id": [151329, 151336, 151338], "pad_token_id": 151329},
}


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def pieces_of(folder: Path, name: str) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / name))


@pytest.mark.parametrize(("generation", "name"), PUBLISHED_NAMES.items())
def test_names_shapes_and_fields_are_those_of_the_published_layout(generation, name, reference_models, tmp_path):
    config = read_json(reference_models / name / "config.json")
    sizes = {"hidden_size": config["hidden_size"], "num_layers": config["num_layers"]}
    sizes |= {"num_heads": config["num_attention_heads"], "vocab_size": 512}
    sizes["ffn_size"] = config.get("inner_hidden_size") or config["ffn_hidden_size"]
    if generation != "chatglm":
        sizes |= {"num_kv_heads": config["multi_query_group_num"], "head_dim": config["kv_channels"]}
    folder = make_tiny_model(tmp_path / "model", generation, **sizes)

    published = load_file(reference_models / name / "model.safetensors")
    expected = {key: [512 if size == 260 else size for size in tensor.shape] for key, tensor in published.items()}
    written = load_file(folder / "model.safetensors")
    assert {key: list(tensor.shape) for key, tensor in written.items()} == expected
    buffers = [key for key in published if key.endswith("inv_freq")]
    assert buffers and all(written[key].dtype == published[key].dtype for key in buffers)
    assert read_json(folder / "config.json").keys() == config.keys()


@pytest.mark.parametrize("generation", ["chatglm", "chatglm2", "chatglm3", "glm4"])
def test_settings_that_are_no_sizes_are_the_published_ones(generation, reference_models, tiny_model_dirs):
    published = read_json(reference_models / PUBLISHED_NAMES[generation] / "config.json")
    written = read_json(tiny_model_dirs[generation] / "config.json")
    settings = ["_name_or_path", "model_type", "architectures", "layernorm_epsilon", "position_encoding_2d"]
    settings += ["rope_ratio", "add_bias_linear", "add_qkv_bias", "rmsnorm", "multi_query_attention"]
    assert {key: written.get(key) for key in settings} == {key: published.get(key) for key in settings}


def test_chatglm_tokenizer_has_the_published_order_of_pieces(tiny_model_dirs):
    folder = tiny_model_dirs["chatglm"]
    model = sentencepiece_model_pb2.ModelProto.FromString((folder / "ice_text.model").read_bytes())
    kinds = [piece.type for piece in model.pieces]
    names = [piece.piece for piece in model.pieces]
    assert names[:5] == ["<unk>", "<s>", "</s>", "<pad>", "<n>"] and kinds[:5] == [2, 3, 3, 3, 4]
    first = names.index("[MASK]")
    assert set(kinds[5:first]) == {1} and first > 300
    assert kinds[first:] == [3] * 8 + [4] * 80 + [6] * 256
    assert names[first + 8 : first + 10] == ["<|tab|>", "<|blank_2|>"] and names[-257] == "<|blank_80|>"
    assert model.normalizer_spec.name == "nmt_nfkc"


def test_chatglm_ids_in_the_config_are_those_of_the_tokenizer(tiny_model_dirs):
    config = read_json(tiny_model_dirs["chatglm"] / "config.json")
    pieces = pieces_of(tiny_model_dirs["chatglm"], "ice_text.model")
    names = {"mask": "[MASK]", "gmask": "[gMASK]", "bos": "<sop>", "eos": "<eop>", "pad": "<pad>"}
    found = {key: pieces.piece_to_id(name) for key, name in names.items()}
    assert {key: config[f"{key}_token_id"] for key in names} == found
    assert found["pad"] == 3 and len(pieces) <= config["vocab_size"] < len(pieces) + 64


@pytest.mark.parametrize(("generation", "special"), [("chatglm2", 5), ("chatglm3", 9)])
def test_chatglm2_and_3_leave_room_for_special_ids_after_the_vocabulary(generation, special, tiny_model_dirs):
    pieces = pieces_of(tiny_model_dirs[generation], "tokenizer.model")
    size = read_json(tiny_model_dirs[generation] / "config.json")["padded_vocab_size"]
    assert size % 64 == 0 and len(pieces) + special <= size
    assert pieces.decode(pieces.encode(SENTENCE)) == SENTENCE
    settings = read_json(tiny_model_dirs[generation] / "tokenizer_config.json")
    assert settings["name_or_path"] == f"THUDM/{generation}-6b"


def test_glm4_ranks_are_read_by_tiktoken(tiny_model_dirs):
    folder = tiny_model_dirs["glm4"]
    lines = [line.split() for line in (folder / "tokenizer.model").read_text(encoding="ascii").splitlines()]
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    added = read_json(folder / "tokenizer_config.json")["added_tokens_decoder"]
    special = {token["content"]: int(index) for index, token in added.items()}
    encoding = tiktoken.Encoding("tiny", pat_str=GLM4_PATTERN, mergeable_ranks=ranks, special_tokens=special)
    assert list(ranks.values()) == list(range(len(lines))) and sum(len(token) == 1 for token in ranks) == 256
    assert list(special) == list(GLM4_SPECIAL) and special["<|endoftext|>"] == len(ranks)
    ids = encoding.encode(SENTENCE)
    assert encoding.decode(ids) == SENTENCE and len(ids) < len(SENTENCE.encode())


def test_glm4_0414_is_read_by_stock_transformers(tiny_model_dirs):
    folder = tiny_model_dirs["glm4_0414"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer(SENTENCE)["input_ids"]) == "[gMASK]<sop>" + SENTENCE
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "好"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "[gMASK]<sop><|user|>\n好<|assistant|>"


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_auto_classes_read_every_generation(generation, tiny_model_dirs):
    import glm_peft  # noqa: F401  (registers the published layouts)

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dirs[generation])
    inputs = tokenizer(CHINESE, return_tensors="pt")
    assert tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True) == CHINESE
    model, report = AutoModelForCausalLM.from_pretrained(tiny_model_dirs[generation], output_loading_info=True)
    assert not any(report[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        spread = model(**inputs).logits.std()
    assert 0.3 < spread < 10


def test_chatglm_ties_its_head_to_its_embeddings(tiny_model_dirs):
    weights = load_file(tiny_model_dirs["chatglm"] / "model.safetensors")
    assert torch.equal(weights["lm_head.weight"], weights["transformer.word_embeddings.weight"])
    assert weights["lm_head.weight"].std() > 0


def test_weights_follow_the_seed(tmp_path):
    folders = [
        make_tiny_model(tmp_path / str(i), "chatglm2", hidden_size=16, seed=seed) for i, seed in enumerate([1, 1, 2])
    ]
    first, again, other = (load_file(folder / "model.safetensors") for folder in folders)
    name = "transformer.encoder.layers.1.self_attention.dense.weight"
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first[name], other[name])


@pytest.mark.parametrize(("file_format", "stem"), [("safetensors", "model"), ("bin", "pytorch_model")])
def test_shards_hold_the_same_weights_as_one_file(file_format, stem, tmp_path):
    whole = make_tiny_model(tmp_path / "whole", "chatglm", hidden_size=32)
    cut = make_tiny_model(tmp_path / "cut", "chatglm", hidden_size=32, format=file_format, max_shard_size="100KB")
    index = read_json(cut / f"{stem}.{file_format}.index.json")
    files = sorted(path.name for path in cut.glob(f"{stem}-*.{file_format}"))
    assert len(files) > 2 and files == sorted(set(index["weight_map"].values()))

    def load(path: Path) -> dict[str, torch.Tensor]:
        return load_file(path) if file_format == "safetensors" else torch.load(path, weights_only=True)

    expected = load_file(whole / "model.safetensors")
    shards = {file: load(cut / file) for file in files}
    assert index["weight_map"].keys() == expected.keys()
    assert all(torch.equal(shards[file][key], expected[key]) for key, file in index["weight_map"].items())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_have_the_type_that_was_asked_for(dtype, tmp_path):
    folder = make_tiny_model(tmp_path / "model", "glm4", hidden_size=16, dtype=dtype)
    weights = load_file(folder / "model.safetensors")
    assert {tensor.dtype for key, tensor in weights.items() if "inv_freq" not in key} == {getattr(torch, dtype)}
    assert read_json(folder / "config.json")["torch_dtype"] == dtype


def test_sizes_and_scale_are_taken_over(tmp_path):
    folder = make_tiny_model(
        tmp_path / "model", "chatglm3", hidden_size=48, num_heads=6, num_kv_heads=3, head_dim=16, ffn_size=80,
        num_layers=3, vocab_size=640, rope_ratio=50, std=0.5,
    )  # fmt: skip
    config = read_json(folder / "config.json")
    keys = ("hidden_size", "num_attention_heads", "multi_query_group_num", "kv_channels", "ffn_hidden_size")
    assert [config[key] for key in (*keys, "num_layers", "padded_vocab_size")] == [48, 6, 3, 16, 80, 3, 640]
    assert config["rope_ratio"] == 50
    weight = load_file(folder / "model.safetensors")["transformer.output_layer.weight"]
    assert weight.shape == (640, 48) and weight.std() == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_small_table_gets_a_tokenizer_that_fits_it(generation, tmp_path):
    folder = make_tiny_model(tmp_path / "model", generation, hidden_size=16, vocab_size=400)
    config = read_json(folder / "config.json")
    assert config.get("padded_vocab_size", config.get("vocab_size")) == 400
    if (folder / "ice_text.model").is_file():
        assert len(pieces_of(folder, "ice_text.model")) <= 400
    elif generation == "glm4":
        added = read_json(folder / "tokenizer_config.json")["added_tokens_decoder"]
        assert max(int(index) for index in added) < 400


def test_a_text_file_trains_the_tokenizer(tmp_path):
    (tmp_path / "text.txt").write_text("鲸鱼在海里唱歌\n" * 20, encoding="utf-8")
    folder = make_tiny_model(tmp_path / "model", "chatglm2", hidden_size=16, tokenizer_text=str(tmp_path / "text.txt"))
    assert len(pieces_of(folder, "tokenizer.model").encode("鲸鱼在海里唱歌")) <= 2


@pytest.mark.parametrize("generation", PUBLISHED_IDS)
def test_a_published_tokenizer_brings_its_published_sizes_and_ids(generation, reference_tokenizers, tmp_path):
    source = reference_tokenizers / PUBLISHED_NAMES[generation]
    folder = make_tiny_model(tmp_path / "model", generation, hidden_size=16, tokenizer_dir=str(source))
    config, published = read_json(folder / "config.json"), read_json(source / "config.json")
    assert {key: config[key] for key in PUBLISHED_IDS[generation]} == PUBLISHED_IDS[generation]
    size = "vocab_size" if generation == "chatglm" else "padded_vocab_size"
    assert config[size] == published[size]
    main_file = "ice_text.model" if generation == "chatglm" else "tokenizer.model"
    assert filecmp.cmp(source / main_file, folder / main_file, shallow=False)


def test_the_older_chatglm_revision_has_every_id_shifted(tiny_model_dirs, tmp_path):
    source = make_tiny_model(tmp_path / "source", "chatglm", hidden_size=16)
    settings = read_json(source / "tokenizer_config.json") | {"num_image_tokens": 20000}
    (source / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    folder = make_tiny_model(tmp_path / "model", "chatglm", hidden_size=16, tokenizer_dir=str(source))
    config, unshifted = read_json(folder / "config.json"), read_json(source / "config.json")
    assert config["vocab_size"] == 150528 and config["pad_token_id"] == 20003
    assert config["gmask_token_id"] == unshifted["gmask_token_id"] + 20000


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"generation": "chatglm5"}, "chatglm5 is none of chatglm, chatglm2"),
        ({"hidden_size": 50}, "--hidden_size 50 is no multiple of --num_heads 4"),
        ({"hidden_size": 24}, "the size of a head is 6"),
        ({"num_kv_heads": 3}, "--num_heads 4 is no multiple of --num_kv_heads 3"),
        ({"generation": "chatglm", "num_kv_heads": 2}, "--num_kv_heads 2 does not exist in chatglm"),
        ({"num_layers": 0}, "--num_layers is 0"),
        ({"vocab_size": 100}, "--vocab_size 100 is too small for chatglm2"),
        ({"tokenizer_text": "absent.txt"}, "--tokenizer_text absent.txt is not a file"),
        ({"tokenizer_dir": "absent"}, "the tokenizer folder absent has no tokenizer.model"),
    ],
)
def test_what_cannot_be_made_is_refused_in_one_sentence(options, words, tmp_path):
    with pytest.raises(UserError, match=words.replace(".", r"\.")) as error:
        make_tiny_model(tmp_path / "model", **{"generation": "chatglm2"} | options)
    assert "\n" not in str(error.value)


def test_a_folder_with_files_is_left_alone(tmp_path):
    (tmp_path / "model.safetensors").write_text("mine")
    with pytest.raises(UserError, match="is not an empty folder"):
        make_tiny_model(tmp_path, "chatglm2")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_the_command_writes_the_folder_and_tells_mistakes_without_a_traceback(tmp_path):
    command = [warm_python("torch"), "scripts/make_tiny_model.py", "--generation", "glm4", "--hidden_size", "16"]
    command += ["--output_dir", str(tmp_path / "model")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == str(tmp_path / "model"), done.stderr
    names = {"config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json"}
    assert {path.name for path in (tmp_path / "model").iterdir()} == names
    again = subprocess.run([warm_python(), *command[1:]], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert again.returncode == 1 and again.stderr.startswith("error: --output_dir")
    assert "Traceback" not in again.stderr


def test_demo_data_is_what_its_script_makes(tmp_path):
    for path in write_demo_data(tmp_path):
        assert filecmp.cmp(path, ROOT / "examples" / "demo" / path.name, shallow=False)


def test_demo_data_has_no_row_twice_and_each_summary_tells_the_content():
    rows = []
    for path in sorted((ROOT / "examples" / "demo").glob("*.json")):
        rows += [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 280 and len({row["content"] for row in rows}) == 280
    for row in rows:
        attributes = dict(pair.split("#") for pair in row["content"].split("*"))
        assert attributes["颜色"] in row["summary"] and attributes["材质"] in row["summary"]
