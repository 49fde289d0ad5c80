"""4-bit bases on CPUs with AVX512-BF16, for which bitsandbytes packs the weights of each layer that it evaluates."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.backends.cpu import ops
from bitsandbytes.nn import Linear4bit
from make_tiny_model import make_tiny_model
from transformers import PreTrainedModel
from warm_starts import warm_python

import glm_peft
from glm_peft.arguments.model import ModelArguments
from glm_peft.models.loading import load_base_model
from glm_peft.models.quantization import allow_packing


@pytest.fixture
def new_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes takes this one for a CPU with AVX512-BF16, and packs and refuses as there."""
    monkeypatch.setattr(functional.lib, "has_avx512bf16_cpu", lambda: True)


@pytest.fixture(params=["chatglm", "glm4", "glm4-fitting"])
def folder(request, tiny_model_dirs, tmp_path) -> Path:
    """A base of 32 columns, which the kernel of such CPUs refuses, or of widths that it takes."""
    if request.param == "glm4-fitting":
        return make_tiny_model(tmp_path / "model", "glm4")
    return tiny_model_dirs[request.param]


def load(folder: Path, dtype: str = "float32") -> PreTrainedModel:
    return load_base_model(ModelArguments(str(folder), dtype=dtype, quantization_bit=4), "cpu")


def probe(model: PreTrainedModel) -> torch.Tensor:
    """[1, 6] ids that every generation takes."""
    config = model.config
    return torch.tensor([[5, 60, getattr(config, "gmask_token_id", 8), config.bos_token_id or 9, 7, 77]])


@torch.no_grad()
def evaluate(model: PreTrainedModel) -> torch.Tensor:
    return model(probe(model)).logits


def gradient_of(model: PreTrainedModel) -> torch.Tensor:
    """How the sum of the logits depends on the embeddings, through all layers."""
    kept = []
    hook = model.get_input_embeddings().register_forward_hook(lambda *call: kept.append(call[-1].requires_grad_()))
    model(probe(model)).logits.sum().backward()
    hook.remove()
    return kept[0].grad


def packed(model: PreTrainedModel) -> set[str]:
    """The kinds of layers whose weights lie as the kernel of such CPUs wants them."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, Linear4bit)]
    state = "packing_format_for_cpu"
    return {name.split(".")[-1] for name, layer in layers if getattr(layer.weight.quant_state, state, False)}


def test_any_width_is_evaluated_and_trained_as_on_other_cpus(folder, request):
    model = load(folder)
    gradient, logits = gradient_of(model), evaluate(model)
    request.getfixturevalue("new_processor")
    model = load(folder)
    assert torch.equal(evaluate(model), logits)
    assert torch.equal(gradient_of(model), gradient), "training goes on after an evaluation"
    assert packed(model) == set()


def test_without_training_the_layers_that_fit_are_packed(new_processor, tmp_path):
    fitting = load(make_tiny_model(tmp_path / "fitting", "glm4"), "bfloat16")
    mixed = load(make_tiny_model(tmp_path / "mixed", "glm4", ffn_size=48), "bfloat16")
    for model in (fitting, mixed):
        allow_packing(model)
        assert evaluate(model).isfinite().all()
    assert packed(mixed) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj"}
    assert packed(fitting) == packed(mixed) | {"down_proj"}


@pytest.mark.parametrize(("has_instructions", "dtype"), [(1, "float32"), (0, "bfloat16")])
def test_nothing_is_packed_where_float32_is_wanted_or_on_other_cpus(monkeypatch, tmp_path, has_instructions, dtype):
    monkeypatch.setattr(functional.lib, "has_avx512bf16_cpu", lambda: has_instructions)
    model = load(make_tiny_model(tmp_path / "model", "glm4"), dtype)
    allow_packing(model)
    evaluate(model)
    assert packed(model) == set()


SAY_AS_BITSANDBYTES = """
import sys
import glm_peft
assert "bitsandbytes" not in sys.modules, "it may have spoken already"
from bitsandbytes.backends.cpu.ops import logger
logger.warning(sys.argv[1], "No module named 'kernels'")
logger.warning("Another kernel is missing: %s", "as this is a test")
"""


def test_a_kernel_that_bitsandbytes_misses_is_not_spoken_of():
    said = "Failed to load CPU gemm_4bit_forward from kernels-community: %s."
    assert f'"{said}' in Path(ops.__file__).read_text(encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(Path(glm_peft.__file__).parents[1])}
    command = [warm_python("torch"), "-c", SAY_AS_BITSANDBYTES, said]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == "Another kernel is missing: as this is a test\n"
