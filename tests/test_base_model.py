"""Loading a base: what is wrong with a folder is told in one sentence, and nothing of it is run."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from glm_peft.arguments.model import ModelArguments
from glm_peft.errors import UserError
from glm_peft.models.loading import check_pair, choose_dtype, load_base_model, load_config, load_tokenizer

TOKENIZER_FILES = ("ice_text.model", "tokenizer.model", "tokenizer.json", "tokenizer_config.json")


def arguments(folder: Path | str, **values: object) -> ModelArguments:
    return ModelArguments(str(folder), **values)


@pytest.fixture
def folder(tiny_model_dirs, tmp_path) -> Path:
    """A copy of a model, to be spoilt."""
    return shutil.copytree(tiny_model_dirs["glm4"], tmp_path / "model")


def change_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text()) | values
    config = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def error_of(load: object, model_args: ModelArguments) -> str:
    with pytest.raises(UserError) as error:
        load(model_args)
    assert "\n" not in str(error.value)
    assert model_args.model_name_or_path in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "weights, tokenizer",
    [
        ("chatglm", "chatglm3"),
        ("chatglm2", "chatglm"),
        ("chatglm3", "glm4"),
        ("glm4", "chatglm2"),
        ("glm4_0414", "chatglm"),
    ],
)
def test_a_wrong_pair_names_both_sides(tiny_model_dirs, tmp_path, weights, tokenizer):
    folder = shutil.copytree(tiny_model_dirs[weights], tmp_path / "mixed", ignore=lambda *_: TOKENIZER_FILES)
    for name in TOKENIZER_FILES:
        if (tiny_model_dirs[tokenizer] / name).exists():
            shutil.copy(tiny_model_dirs[tokenizer] / name, folder)
    model_args = arguments(folder)
    config, loaded = load_config(model_args), load_tokenizer(model_args)
    with pytest.raises(UserError, match=f"has {len(loaded)} tokens .* a vocabulary of {config.vocab_size}.*<eos> is"):
        check_pair(loaded, config)


def test_every_generation_fits_itself(tiny_model_dirs):
    for folder in tiny_model_dirs.values():
        tokenizer = load_tokenizer(arguments(folder))
        check_pair(tokenizer, load_config(arguments(folder)))
        assert tokenizer.padding_side == "left"


@pytest.mark.parametrize("model_type", ["llama", "of_tomorrow"])
@pytest.mark.parametrize("load", [load_config, load_tokenizer, load_base_model])
def test_a_model_of_another_type_is_refused(folder, model_type, load):
    change_config(folder, model_type=model_type)
    assert f"is a model of type '{model_type}', and a base model is wanted: give one" in error_of(
        load, arguments(folder)
    )


@pytest.mark.parametrize("load", [load_config, load_tokenizer])
def test_code_in_the_folder_is_neither_run_nor_asked_about(folder, load, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    (folder / "own.py").write_text("raise SystemExit('was run')")
    change_config(folder, model_type=None, auto_map={"AutoConfig": "own.Config", "AutoTokenizer": ["own.T", None]})
    assert "has no config.json with a model_type" in error_of(load, arguments(folder))


@pytest.mark.parametrize("load", [load_config, load_tokenizer, load_base_model])
def test_a_folder_that_is_no_model_is_refused(tmp_path, load):
    assert "is an empty folder, and a base model is wanted" in error_of(load, arguments(tmp_path))


@pytest.mark.parametrize("load", [load_config, load_tokenizer, load_base_model])
def test_a_folder_that_is_not_there_is_refused(tmp_path, load):
    assert "is not there, and a base model is wanted" in error_of(load, arguments(tmp_path / "no" / "folder"))


def test_a_hub_id_that_cannot_be_reached_is_told():
    assert "cannot be loaded (" in error_of(load_config, arguments("somebody/no-model-of-this-name"))


def test_broken_weights_are_told(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "is cut short or broken (SafetensorError, 1,000 bytes)" in error_of(load_base_model, arguments(folder))


def test_missing_weights_are_told(folder):
    (folder / "model.safetensors").unlink()
    assert "holds no weights, such as model.safetensors" in error_of(load_base_model, arguments(folder))


@pytest.mark.parametrize("generation", ["chatglm", "glm4", "glm4_0414"])
def test_weights_that_are_not_all_there_are_told(tiny_model_dirs, tmp_path, generation):
    folder = shutil.copytree(tiny_model_dirs[generation], tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    lacking = next(name for name in weights if ".1.post_attention_layernorm.weight" in name)
    del weights[lacking]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    error = error_of(load_base_model, arguments(folder))
    assert "lack 1 of the model's parameters" in error
    assert "layers.1.post_attention_layernorm.weight" in error


@pytest.mark.parametrize("generation", ["chatglm", "glm4", "glm4_0414"])
def test_weights_of_another_size_are_told(tiny_model_dirs, tmp_path, generation):
    folder = shutil.copytree(tiny_model_dirs[generation], tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if ".1.post_attention_layernorm.weight" in name)
    weights[name] = torch.ones(7)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    error = error_of(load_base_model, arguments(folder))
    assert "layers.1.post_attention_layernorm.weight of shape (7,) where its config.json asks for (32,)" in error


@pytest.mark.parametrize(
    "name, value", [("ffn_hidden_size", 48), ("multi_query_group_num", 4), ("padded_vocab_size", 2048)]
)
def test_a_config_of_other_sizes_is_told(folder, name, value):
    change_config(folder, **{name: value})
    assert "config.json" in error_of(load_base_model, arguments(folder))


def test_an_attention_that_does_not_exist_is_told(folder):
    error = error_of(load_base_model, arguments(folder, attn_implementation="none_such"))
    assert "none_such" in error
    assert "give another --attn_implementation" in error


@pytest.mark.parametrize(
    ("has_it", "stored", "chosen", "why"),
    [
        (False, torch.float16, torch.float32, "neither AMX nor AVX512-BF16"),
        (True, torch.float16, torch.bfloat16, "has instructions for it"),
        (True, "bfloat16", torch.bfloat16, "has instructions for it"),
        (True, torch.float32, torch.float32, "not stored in 16 bits"),
        (True, None, torch.float32, "not stored in 16 bits"),
    ],
)
def test_auto_asks_the_processor(monkeypatch, has_it, stored, chosen, why):
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: has_it)
    dtype, reason = choose_dtype("auto", torch.device("cpu"), stored)
    assert dtype == chosen and why in reason


def test_the_loss_in_bfloat16_is_that_in_float32_within_its_rounding(folder):
    ids = torch.arange(5, 25)[None]
    models = [load_base_model(arguments(folder, dtype=dtype), "cpu") for dtype in ("float32", "bfloat16")]
    exact, rounded = (model(input_ids=ids, labels=ids).loss.item() for model in models)
    assert rounded == pytest.approx(exact, rel=2**-7)  # 8 bits of a number


def test_precision_is_chosen_by_the_device(folder):
    assert choose_dtype("float16", torch.device("cpu"))[0] == torch.float16
    model = load_base_model(arguments(folder, dtype="bfloat16"), "cpu")
    assert model.dtype == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


@pytest.mark.parametrize("generation", ["chatglm", "chatglm3", "glm4", "glm4_0414"])
def test_a_missing_tokenizer_file_is_named(tiny_model_dirs, tmp_path, generation):
    folder = shutil.copytree(tiny_model_dirs[generation], tmp_path / "model")
    for name in TOKENIZER_FILES[:3]:
        (folder / name).unlink(missing_ok=True)
    wanted = "tokenizer.json" if generation == "glm4_0414" else "tokenizer.model"
    error = error_of(load_tokenizer, arguments(folder))
    assert f"The tokenizer file {wanted} " in error and "download it from the repository." in error
