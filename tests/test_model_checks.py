"""A base whose weights cannot be loaded, or whose attention cannot carry a prefix, is refused without its weights."""

import json
import shutil
from pathlib import Path

import pytest

from glm_peft.adapters.attention_check import check_attention
from glm_peft.errors import UserError
from glm_peft.examination.weight_files import check_weight_files
from glm_peft.models import ChatGLMConfig


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


def test_whole_weights_and_hub_ids_are_let_pass(base: Path):
    check_weight_files(str(base))
    check_weight_files("THUDM/chatglm3-6b")


def test_a_folder_without_weights_is_refused(base: Path):
    (base / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no weights"):
        check_weight_files(str(base))


def test_a_pointer_of_git_lfs_and_a_file_cut_short_are_refused(base: Path):
    file = base / "model.safetensors"
    whole = file.read_bytes()
    for content in (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", whole[:-100], b""):
        file.write_bytes(content)
        with pytest.raises(UserError, match=rf"model.safetensors \({len(content):,} bytes\) is no complete"):
            check_weight_files(str(base))


def test_every_file_of_an_index_must_be_there(base: Path):
    (base / "model.safetensors").rename(base / "model-1.safetensors")
    index = base / "model.safetensors.index.json"
    for names, problem in (
        ({"a": "model-1.safetensors", "b": "model-2.safetensors"}, "lacks 1 of the 2"),
        ([], "is no list"),
    ):
        index.write_text(json.dumps({"weight_map": names}))
        with pytest.raises(UserError, match=problem):
            check_weight_files(str(base))
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    check_weight_files(str(base))
