"""Published checkpoints to adapters and back, from the command line."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from glm_peft.adapters import load_adapter
from glm_peft.convert import main
from glm_peft.legacy import read_published_prefix

NAMES = ["chatglm-6b", "chatglm2-6b", "chatglm3-6b"]


@pytest.fixture(params=[(name, tag) for name in NAMES for tag in ("prefix", "prefix_projection")], ids="-".join)
def published(request, reference_models):
    """A base and its published checkpoint."""
    name, tag = request.param
    return reference_models / name, reference_models / name / f"ptuning-{tag}"


def convert(direction, source, base, output_dir, *flags) -> None:
    main([direction, str(source), "--base", str(base), "--output_dir", str(output_dir), *flags])


def test_an_imported_adapter_is_what_loading_the_checkpoint_gives(published, tmp_path):
    base, checkpoint = published
    convert("import", checkpoint, base, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected = load_adapter(model, str(checkpoint)).prompt_encoder["default"].embedding.weight
    found = load_file(tmp_path / "adapter_model.safetensors")
    assert found.keys() == {"prompt_embeddings"}
    torch.testing.assert_close(found["prompt_embeddings"], expected, atol=0, rtol=0)
    loaded = load_adapter(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(tmp_path))
    torch.testing.assert_close(loaded.prompt_encoder["default"].embedding.weight, expected, atol=0, rtol=0)


def test_verifying_compares_the_logits(published, tmp_path, caplog):
    base, checkpoint = published
    with caplog.at_level("INFO", "glm_peft.convert"):
        convert("import", checkpoint, base, tmp_path, "--verify")
    assert "the logits differ by at most" in caplog.text


def test_verifying_finds_keys_that_were_not_rotated(reference_models, tmp_path, monkeypatch, capsys):
    base = reference_models / "chatglm2-6b"
    monkeypatch.setattr("glm_peft.convert.rotate_prefix_keys", lambda weight, config, positions=None: weight)
    with pytest.raises(SystemExit):
        convert("import", base / "ptuning-prefix", base, tmp_path, "--verify")
    assert "gives logits that differ" in capsys.readouterr().err


def test_export_after_import_gives_the_checkpoint_back(published, tmp_path):
    base, checkpoint = published
    convert("import", checkpoint, base, tmp_path / "adapter")
    convert("export", tmp_path / "adapter", base, tmp_path / "checkpoint")
    expected, found = read_published_prefix(checkpoint), read_published_prefix(tmp_path / "checkpoint")
    torch.testing.assert_close(found.weight, expected.weight, atol=1e-6, rtol=0)
    config = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    assert config | {"pre_seq_len": 5, "prefix_projection": False} == config
    assert {name: config[name] for name in ("model_type", "num_layers")} == {"model_type": "chatglm", "num_layers": 3}


def test_a_prefix_of_another_base_is_refused(reference_models, tmp_path, capsys):
    checkpoint = reference_models / "chatglm-6b" / "ptuning-prefix"
    with pytest.raises(SystemExit) as stopped:
        convert("import", checkpoint, reference_models / "chatglm2-6b", tmp_path)
    assert stopped.value.code == 2
    assert "has 384 numbers a virtual token, but" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
