"""What a folder is is told by the heads of its files; a base that cannot be used is refused without its weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from glm_peft.adapters.attention_check import check_attention
from glm_peft.adapters.loading import load_adapter
from glm_peft.arguments.model import ModelArguments
from glm_peft.errors import UserError
from glm_peft.models import ChatGLMConfig
from glm_peft.models.folder_kind import A_BASE, Kind, check_source, recognise
from glm_peft.models.loading import load_base_model
from glm_peft.models.weight_files import check_weight_files


@pytest.mark.parametrize(
    ("implementation", "problem"), [("flex_attention", "cannot carry a prefix"), ("swift", "is not available here")]
)
def test_attention_that_cannot_carry_a_prefix_is_refused(implementation: str, problem: str):
    config = ChatGLMConfig(num_hidden_layers=1, hidden_size=32, num_attention_heads=4, intermediate_size=64)
    with pytest.raises(UserError, match=problem):
        check_attention(config, implementation)
    check_attention(config, "eager")


@pytest.fixture
def base(tiny_model_dirs: dict[str, Path], tmp_path: Path) -> Path:
    """A base with its weights in one file."""
    return Path(shutil.copytree(tiny_model_dirs["chatglm2"], tmp_path / "base"))


def test_a_folder_without_weights_is_refused(base: Path):
    check_weight_files(base)
    (base / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no weights"):
        check_weight_files(base)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "an old pickle"])
def test_a_pointer_of_git_lfs_and_a_file_cut_short_are_refused(base: Path, name: str):
    file = base / "model.safetensors"
    if name != file.name:
        torch.save(load_file(file), base / "pytorch_model.bin", _use_new_zipfile_serialization=" " not in name)
        file.unlink()
        file = base / "pytorch_model.bin"
    check_weight_files(base)
    whole = file.read_bytes()
    for content in (whole[:-100], whole[:9], b"<!DOCTYPE html>", b""):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"is (cut short or broken|not a file of plain tensors) \("):
            check_weight_files(base)
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UserError, match="is a git-lfs pointer, not the weights themselves: run `git lfs pull` there"):
        check_weight_files(base)


def test_every_file_of_an_index_must_be_there(base: Path):
    (base / "model.safetensors").rename(base / "model-1.safetensors")
    index = base / "model.safetensors.index.json"
    for names, problem in (
        ({"a": "model-1.safetensors", "b": "model-2.safetensors"}, "lacks 1 of the 2"),
        ([], "is no index"),
    ):
        index.write_text(json.dumps({"weight_map": names}))
        with pytest.raises(UserError, match=problem):
            check_weight_files(base)
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    check_weight_files(base)


def whole_model(folder: Path, reference_models: Path) -> Path:
    """A model as some published scripts saved it, with the prefix that they trained inside."""
    published = reference_models / "chatglm2-6b"
    shutil.copytree(published / "ptuning-prefix", folder)
    weights = torch.load(folder / "pytorch_model.bin") | load_file(published / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    return folder


def test_a_prefix_inside_a_base_is_not_left_out_unsaid(reference_models: Path, tmp_path: Path, caplog):
    folder = str(whole_model(tmp_path / "whole", reference_models))
    with pytest.raises(UserError, match="with a P-Tuning v2 prefix inside, which would be left out: give its folder"):
        load_base_model(ModelArguments(folder))
    adapted = load_adapter(load_base_model(ModelArguments(folder, adapter_name_or_path=folder)), folder)
    bare = load_base_model(ModelArguments(str(reference_models / "chatglm2-6b")))
    prefix = str(reference_models / "chatglm2-6b" / "ptuning-prefix")
    expected = load_adapter(bare, prefix)
    ids = torch.arange(8, 20)[None]
    torch.testing.assert_close(adapted(input_ids=ids).logits, expected(input_ids=ids).logits, atol=0, rtol=0)
    assert "left out" not in caplog.text
    load_base_model(ModelArguments(folder, adapter_name_or_path=prefix))
    assert "has a P-Tuning v2 prefix inside, which is left out" in caplog.text


def test_what_a_folder_is_and_what_takes_it_is_told(base: Path, reference_models: Path, tmp_path: Path, monkeypatch):
    """Each place by its name below `tmp_path`, what it is told to be as a base, and the way out."""
    monkeypatch.chdir(tmp_path)
    prefix = reference_models / "chatglm2-6b" / "ptuning-prefix"
    for place in ("published/checkpoint-1000", "published/checkpoint-3000"):
        shutil.copytree(prefix, place)
    for place in ("run/checkpoint-4", "run/checkpoint-20"):
        Path(place).mkdir(parents=True)
        (Path(place) / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    shutil.copytree(base, "models--lab--tiny/snapshots/0123abc")
    for place, told, way_out in (
        (
            "published/checkpoint-3000",
            "is a published P-Tuning v2 prefix",
            "takes published/checkpoint-3000, and",
        ),
        ("published", "but in checkpoint-1000 and checkpoint-3000", "takes published/checkpoint-3000, and"),
        ("run/checkpoint-4", "is a PEFT adapter of the method lora", "--adapter_name_or_path takes run/checkpoint-4."),
        ("run", "but in checkpoint-4 and checkpoint-20", "--adapter_name_or_path takes run/checkpoint-20."),
        ("models--lab--tiny", "but in 0123abc", "give models--lab--tiny/snapshots/0123abc."),
        ("base/config.json", "is a file", "give base."),
        ("/dev/null", "is a file", "give a folder with all of its files"),
        ("bsae", "is not there, but base is", "give base."),
        (
            "publishd/checkpoint-3000",
            "but published/checkpoint-3000 is",
            "takes published/checkpoint-3000, and",
        ),
        ("base/other/place", f"is not there in {tmp_path}", "give a folder with all of its files"),
    ):
        with pytest.raises(UserError) as error:
            check_source(place, "--base", A_BASE)
        assert f"--base {place} " in str(error.value) and "and a base model is wanted: " in str(error.value)
        assert told in str(error.value) and way_out in str(error.value) and "\n" not in str(error.value)
    assert recognise("base").what == "is a base model of chatglm2"
    assert check_source("THUDM/chatglm3-6b", "--base", A_BASE).kind == Kind.ON_HUB
