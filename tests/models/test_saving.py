"""What is saved loads again, here and without this package, as a whole model and as an adapter."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from closeness import assert_close
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GlmConfig, GlmForCausalLM, PreTrainedModel
from warm_starts import warm_python

import glm_peft  # noqa: F401

NAMES = ("chatglm-6b", "chatglm2-6b", "chatglm3-6b", "glm-4-9b-chat")
IDS = torch.tensor([[10, 11, 12, 251, 254, 5, 6]])
LORA_TARGETS = {
    "chatglm-6b": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "chatglm2-6b": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"],
}
STOCK_PROCESS = """
import json
import sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

*folders, ids, output = sys.argv[1:]
logits = {}
for folder in folders:
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert type(model.config).__module__ == "transformers.models.glm.configuration_glm"
    with torch.no_grad():
        logits[folder] = model(torch.tensor(json.loads(ids))).logits
assert not any(name.startswith("glm_peft") for name in sys.modules)
save_file(logits, output)
"""


@pytest.fixture(params=NAMES)
def name(request) -> str:
    return request.param


@pytest.fixture
def model(name, reference_models) -> PreTrainedModel:
    return load(reference_models / name)


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def logits_of(model: PreTrainedModel | PeftModel) -> torch.Tensor:
    return model(IDS).logits


def assert_same_model(again: PreTrainedModel, model: PreTrainedModel) -> None:
    assert type(again) is type(model)
    state, expected = again.state_dict(), model.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in expected)
    config, expected_config = again.config.to_dict(), model.config.to_dict()
    assert config | {"_name_or_path": ""} == expected_config | {
        "_name_or_path": "",
        "architectures": [type(again).__name__],
    }
    assert again.generation_config.to_dict() == model.generation_config.to_dict()
    assert torch.equal(logits_of(again), logits_of(model))


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "60KB"}], ids=["one-file", "shards"])
def test_a_saved_model_loads_as_the_same(options, model, tmp_path):
    model.save_pretrained(tmp_path, **options)
    assert ("model.safetensors.index.json" in os.listdir(tmp_path)) == bool(options)
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(report[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_model(again, model)


def test_a_twice_saved_model_loads_as_the_same(model, tmp_path):
    model.save_pretrained(tmp_path / "once")
    load(tmp_path / "once").save_pretrained(tmp_path / "twice")
    assert_same_model(load(tmp_path / "twice"), model)


def test_a_saved_model_loads_without_its_head(model, tmp_path):
    model.save_pretrained(tmp_path)
    network = AutoModel.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(model.lm_head(network(IDS).last_hidden_state), logits_of(model))


def test_a_saved_config_says_what_loads_it(name, model, tmp_path):
    model.config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == ("chatglm" if name == "chatglm-6b" else "glm") and "auto_map" not in saved
    assert AutoConfig.from_pretrained(tmp_path).vocab_size == 260


def test_the_tied_head_of_chatglm_6b_is_stored_once(reference_models, tmp_path):
    model = load(reference_models / "chatglm-6b")
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert "transformer.word_embeddings.weight" in stored and "lm_head.weight" not in stored
    again = load(tmp_path)
    assert again.lm_head.weight is again.transformer.word_embeddings.weight


def test_the_head_of_the_others_is_not_tied(reference_models, tmp_path):
    model = load(reference_models / "chatglm2-6b")
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    model.save_pretrained(tmp_path)
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= load_file(tmp_path / "model.safetensors").keys()


def stock_model() -> GlmForCausalLM:
    """A model that never came from a published folder."""
    torch.manual_seed(0)
    config = GlmConfig(
        vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, attention_bias=True, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return GlmForCausalLM(config).eval()


def test_saved_models_load_in_a_process_without_this_package(reference_models, tmp_path):
    models = {name: load(reference_models / name) for name in NAMES[1:]} | {"stock": stock_model()}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    command = [
        warm_python("libraries"),
        "-c",
        STOCK_PROCESS,
        *models,
        json.dumps(IDS.tolist()),
        "logits.safetensors",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "logits.safetensors")
    assert found.keys() == models.keys()
    assert all(torch.equal(found[name], logits_of(model)) for name, model in models.items())


def test_a_stock_model_saved_here_has_its_own_keys(tmp_path):
    model = stock_model()
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()
    assert_same_model(load(tmp_path), model)


@pytest.mark.parametrize("lora_name", LORA_TARGETS)
def test_lora_saves_loads_and_merges(lora_name, reference_models, tmp_path):
    torch.manual_seed(0)
    folder = reference_models / lora_name
    targets = LORA_TARGETS[lora_name]
    # Weights that are not a no-op from the start.
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets, init_lora_weights=False)
    adapted = get_peft_model(load(folder), config).eval()
    expected = logits_of(adapted)
    assert (expected - logits_of(load(folder))).abs().max() > 0.1
    adapted.save_pretrained(tmp_path / "lora")
    stored = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {key.split(".lora_")[0].rsplit(".", 1)[1] for key in stored} == set(targets)
    assert torch.equal(logits_of(PeftModel.from_pretrained(load(folder), tmp_path / "lora")), expected)
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora", dtype=torch.float32)
    assert torch.equal(logits_of(again), expected)
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert_close(logits_of(load(tmp_path / "merged")), expected)


def test_a_prefix_holds_nothing_of_the_base_and_loads_again(name, model, reference_models, tmp_path):
    adapted = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)).eval()
    adapted.save_pretrained(tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == {"prompt_embeddings"}
    expected = logits_of(adapted)
    assert not torch.equal(expected, logits_of(load(reference_models / name)))
    assert torch.equal(logits_of(PeftModel.from_pretrained(load(reference_models / name), tmp_path)), expected)
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits_of(again), expected)
