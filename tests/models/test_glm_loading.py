"""Published folders through the Auto classes: every kind of weight file, dtype, quantization; no code of theirs."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from make_tiny_model import make_tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from warm_starts import warm_python

import glm_peft  # noqa: F401

PUBLISHED = ("chatglm", "chatglm2", "chatglm3", "glm4")
MODEL_CLASSES = {"chatglm": "ChatGLMForCausalLM", "glm4_0414": "Glm4ForCausalLM"}
SIZES = {"hidden_size": 32, "num_layers": 2}
WEIGHT_FILES = {
    "bin": ({"format": "bin"}, "pytorch_model.bin"),
    "bin-shards": ({"format": "bin", "max_shard_size": "60KB"}, "pytorch_model.bin.index.json"),
    "safetensors-shards": ({"max_shard_size": "60KB"}, "model.safetensors.index.json"),
}


@pytest.fixture(params=PUBLISHED)
def folder(request, tiny_model_dirs) -> Path:
    return tiny_model_dirs[request.param]


def probe(folder: Path) -> torch.Tensor:
    """[1, 6] ids that every generation takes."""
    config = json.loads((folder / "config.json").read_text())
    return torch.tensor([[5, 60, 7, config.get("gmask_token_id", 8), config.get("bos_token_id", 9), 77]])


@torch.no_grad()
def logits_of(model: PreTrainedModel, folder: Path) -> torch.Tensor:
    return model(probe(folder)).logits.float()


def load(folder: Path, **kwargs) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def with_weights(folder: Path, copied: Path, extra: dict[str, torch.Tensor]) -> Path:
    shutil.copytree(folder, copied)
    weights = load_file(folder / "model.safetensors")
    save_file(weights | extra, copied / "model.safetensors", metadata={"format": "pt"})
    return copied


# Weight files


@pytest.mark.parametrize("generation", [*PUBLISHED, "glm4_0414"])
def test_every_key_finds_its_parameter(generation, tiny_model_dirs):
    model, report = load(tiny_model_dirs[generation], output_loading_info=True)
    assert type(model).__name__ == MODEL_CLASSES.get(generation, "GlmForCausalLM")
    assert not any(report[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))


@pytest.mark.parametrize("kind", WEIGHT_FILES)
@pytest.mark.parametrize("generation", PUBLISHED)
def test_the_kind_of_weight_file_makes_no_difference(kind, generation, tiny_model_dirs, tmp_path):
    options, main_file = WEIGHT_FILES[kind]
    other = make_tiny_model(tmp_path / "model", generation, hidden_size=32, **options)
    assert (other / main_file).is_file() and not (other / "model.safetensors").exists()
    model, report = load(other, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    folder = tiny_model_dirs[generation]
    assert torch.equal(logits_of(model, folder), logits_of(load(folder), folder))


@pytest.mark.parametrize("generation", PUBLISHED)
def test_a_fused_projection_cut_by_shards_of_any_order_is_put_together(generation, tiny_model_dirs, tmp_path):
    """The two files hold every second tensor, so weight and bias of one layer lie apart."""
    folder = tiny_model_dirs[generation]
    shutil.copytree(folder, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    weights = load_file(folder / "model.safetensors")
    names = {f"model-0000{part + 1}-of-00002.safetensors": sorted(weights)[part::2] for part in (0, 1)}
    for name, keys in names.items():
        save_file({key: weights[key] for key in keys}, tmp_path / "model" / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: name for name, keys in names.items() for key in keys}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(logits_of(load(tmp_path / "model"), folder), logits_of(load(folder), folder))


def test_auto_model_is_the_network_without_its_head(folder):
    model, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and report["unexpected_keys"] == {"lm_head.weight"}
    with torch.no_grad():
        states = model(probe(folder)).last_hidden_state
        assert torch.equal(load(folder).lm_head(states), logits_of(load(folder), folder))


def test_keys_of_a_prefix_are_reported_and_the_rest_is_loaded(folder, tmp_path):
    key = "transformer.prefix_encoder.embedding.weight"
    whole = with_weights(folder, tmp_path / "whole", {key: torch.zeros(5, 8)})
    model, report = load(whole, output_loading_info=True)
    assert report["unexpected_keys"] == {key} and not report["missing_keys"]
    assert torch.equal(logits_of(model, folder), logits_of(load(folder), folder))


def test_rotary_frequencies_in_the_file_are_left_out_in_silence(folder, tmp_path):
    in_file = [name for name in load_file(folder / "model.safetensors") if "inv_freq" in name]
    assert in_file
    whole = with_weights(folder, tmp_path / "whole", {name: torch.full((2,), 9.0) for name in in_file})
    model, report = load(whole, output_loading_info=True)
    assert not report["unexpected_keys"] and not report["mismatched_keys"]
    assert torch.equal(logits_of(model, folder), logits_of(load(folder), folder))


class _Bomb:
    """Unpickled without `weights_only`, it makes a folder."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_that_runs_code_is_refused_and_not_run(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    weights = load_file(folder / "model.safetensors")
    torch.save(weights | {"bomb": _Bomb(tmp_path / "run")}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(Exception, match="Weights only load failed"):
        load(tmp_path / "model")
    assert not (tmp_path / "run").exists()
    torch.load(tmp_path / "model" / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "run").exists(), "the file would have run its code"


# dtype, device, quantization


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, folder):
    model = load(folder, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}
    expected = logits_of(load(folder), folder)
    # Each of some 20 layers rounds once; kernels differ in where they round in between.
    assert (logits_of(model, folder) - expected).abs().max() < 10 * torch.finfo(dtype).eps * expected.abs().max()


def test_the_dtype_is_that_of_the_files_unless_told(folder, tmp_path):
    other = make_tiny_model(tmp_path / "half", folder.name, hidden_size=16, dtype="float16")
    assert (load(other).dtype, load(other, dtype=torch.float32).dtype) == (torch.float16, torch.float32)
    assert load(folder).dtype == torch.float32


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_map(device_map, folder):
    model = load(folder, device_map=device_map)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert torch.equal(logits_of(model, folder), logits_of(load(folder), folder))


def test_layers_can_stay_on_the_disk(folder, tmp_path):
    names = [name for name, _ in load(folder).named_children()] + ["lm_head"]
    inner = names[0]
    parts = [f"{inner}.{name}" for name, _ in getattr(load(folder), inner).named_children()]
    device_map = {name: "disk" if name.endswith(".layers") else "cpu" for name in [*parts, "lm_head"]}
    model = load(folder, device_map=device_map, offload_folder=tmp_path)
    assert any(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(logits_of(model, folder), logits_of(load(folder), folder))


QUANTIZATIONS = {
    "Linear4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "Linear8bitLt": {"load_in_8bit": True},
}


@pytest.mark.parametrize("linear", QUANTIZATIONS)
@pytest.mark.parametrize("generation", PUBLISHED)
def test_quantized_while_loading(linear, generation, tmp_path):
    folder = make_tiny_model(
        tmp_path / "model", generation
    )  # of widths that 4-bit layers have a kernel for on any CPU
    model = load(folder, quantization_config=BitsAndBytesConfig(**QUANTIZATIONS[linear]))
    kinds = {
        name: type(module).__name__ for name, module in model.named_modules() if "Linear" in type(module).__name__
    }
    assert kinds.pop("lm_head") == "Linear"
    assert len(kinds) >= 8 and set(kinds.values()) == {linear}
    expected = logits_of(load(folder), folder)
    # Four bits move these random weights' logits, but a row in the wrong place would leave nothing of them.
    similarity = torch.nn.functional.cosine_similarity(logits_of(model, folder), expected, dim=-1)
    assert similarity.min() > 0.9
    tokens = model.generate(probe(folder), attention_mask=torch.ones(1, 6), max_new_tokens=3, eos_token_id=None)
    assert tokens.shape == (1, 9)


# Remote code


_LOAD_WITH_TRUST = """
import sys
import glm_peft
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.utils import logging
logging.disable_progress_bar()
for folder in sys.argv[1:]:
    for kwargs in ({}, {"trust_remote_code": True}, {"trust_remote_code": False}):
        print(type(AutoConfig.from_pretrained(folder, **kwargs)).__module__)
        print(type(AutoModelForCausalLM.from_pretrained(folder, **kwargs)).__module__)
"""


def test_remote_code_is_neither_run_nor_asked_about(tiny_model_dirs, tmp_path):
    folders = [shutil.copytree(tiny_model_dirs[generation], tmp_path / generation) for generation in PUBLISHED]
    for folder in folders:
        auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
        for module in {reference.split(".")[0] for reference in auto_map.values()}:
            (folder / f"{module}.py").write_text("raise SystemExit('remote code was run')")
    done = subprocess.run(
        [warm_python(), "-c", _LOAD_WITH_TRUST, *map(str, folders)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(glm_peft.__file__).parents[1])},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "no warning and no question"
    ours = ["glm_peft.models.chatglm.configuration_chatglm", "glm_peft.models.chatglm.modeling_chatglm"]
    glm = ["glm_peft.models.glm.configuration_glm", "transformers.models.glm.modeling_glm"]
    assert done.stdout.split() == ours * 3 + glm * 9


def test_a_model_can_be_made_from_a_config_alone(folder):
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config)
    expected = {name: tensor.shape for name, tensor in load(folder).state_dict().items()}
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == expected
    assert logits_of(model, folder).isfinite().all()
