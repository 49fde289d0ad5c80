"""The memory estimate counts what real models and adapters have, and grows with what costs memory."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import glm_peft  # noqa: F401  (registers the generations)
from glm_peft.adapters import create_adapter
from glm_peft.memory_estimate import (
    BaseSize,
    Settings,
    base_bytes,
    count_trained,
    estimate_memory,
    fit_settings,
    measure_base,
)
from glm_peft.models import ChatGLMConfig

SETTINGS = Settings(num_virtual_tokens=8, batch_size=2, tokens=64, labels=32)
GENERATIONS = ("chatglm", "chatglm2", "glm4", "glm4_0414")


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_base_is_counted_as_it_is_loaded(tiny_model_dirs: dict[str, Path], generation: str):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dirs[generation])
    head = model.get_output_embeddings()
    linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    size = measure_base(AutoConfig.from_pretrained(tiny_model_dirs[generation]))
    assert size.parameters == model.num_parameters()
    assert size.quantized == sum(module.weight.numel() for module in linear)
    assert size.quantized_rows == sum(len(module.weight) for module in linear)


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("encoder_hidden_size", [None, 24])
def test_the_trained_numbers_are_those_of_the_adapter(
    tiny_model_dirs: dict[str, Path], generation: str, encoder_hidden_size: int | None
):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dirs[generation])
    model_args = SimpleNamespace(
        num_virtual_tokens=8,
        prefix_projection=encoder_hidden_size is not None,
        encoder_hidden_size=encoder_hidden_size,
        adapter_name_or_path=None,
    )
    trained, _ = create_adapter(model, model_args).get_nb_trainable_parameters()
    config = AutoConfig.from_pretrained(tiny_model_dirs[generation])
    assert count_trained(config, replace(SETTINGS, encoder_hidden_size=encoder_hidden_size)) == trained


def test_bytes_of_the_base_by_precision_and_quantization():
    base = BaseSize(parameters=3 * 2**20, quantized=2**21, quantized_rows=2**10)
    assert base_bytes(base, replace(SETTINGS, dtype="float32")) == 12 * 2**20
    assert base_bytes(base, SETTINGS) == 6 * 2**20
    assert base_bytes(base, replace(SETTINGS, quantization_bit=8)) == 4 * 2**20 + 4 * 2**10
    assert base_bytes(base, replace(SETTINGS, quantization_bit=4)) == 3 * 2**20 + 2**15 + 2**9


def test_the_published_recipe_of_chatglm_6b_needs_less_than_what_was_published_for_it():
    """Published: 6.7 GB in 4 bits, rows of 64 + 64 tokens one by one; there the logits of all tokens were kept."""
    settings = Settings(quantization_bit=4, num_virtual_tokens=128, batch_size=1, tokens=128, labels=64)
    assert 5e9 < estimate_memory(ChatGLMConfig(), settings).total < 6.7e9


@pytest.mark.parametrize(
    "change", [{"tokens": 128}, {"batch_size": 4}, {"dtype": "float32"}, {"eager_attention": True}]
)
def test_activations_grow_with_what_costs_memory(tiny_model_dirs: dict[str, Path], change: dict):
    config = AutoConfig.from_pretrained(tiny_model_dirs["glm4"])
    changed = estimate_memory(config, replace(SETTINGS, **change))
    assert changed.activations > estimate_memory(config, SETTINGS).activations


def test_activation_checkpointing_keeps_one_layer_and_the_inputs_of_all():
    config = ChatGLMConfig()
    layers, inputs = config.num_hidden_layers, 2 * 64 * config.hidden_size * 2
    plain = estimate_memory(config, SETTINGS).activations
    checkpointed = estimate_memory(config, replace(SETTINGS, activation_checkpointing=True)).activations
    assert checkpointed == pytest.approx(plain / layers + layers * inputs)


@pytest.mark.parametrize(
    ("settings", "limit", "flags"),
    [
        (Settings(), 80e9, []),
        (Settings(batch_size=8, tokens=1024), 24e9, ["--activation_checkpointing true"]),
        (Settings(), 10e9, ["--activation_checkpointing true", "--quantization_bit 8"]),
        (Settings(activation_checkpointing=True), 10e9, ["--quantization_bit 8"]),
        (Settings(quantization_bit=8, activation_checkpointing=True), 8e9, ["--quantization_bit 4"]),
        (Settings(), 3e9, None),
    ],
)
def test_the_flags_that_make_training_fit(settings: Settings, limit: float, flags: list[str] | None):
    config = ChatGLMConfig()
    assert fit_settings(config, settings, limit, measure_base(config)) == flags
