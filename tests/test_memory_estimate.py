"""The memory estimate counts what real models and adapters have, and grows with what costs memory."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from make_tiny_model import make_tiny_model
from peft import PeftModel
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

import glm_peft  # noqa: F401  (registers the generations)
from glm_peft.adapters import label_loss
from glm_peft.adapters.loading import create_adapter
from glm_peft.adapters.prefix_attention import attach_prefix_attention
from glm_peft.arguments.data import DataArguments
from glm_peft.arguments.model import ModelArguments
from glm_peft.arguments.training import TrainingArguments
from glm_peft.examination import memory_estimate
from glm_peft.examination.doctor_report import format_memory
from glm_peft.examination.memory_estimate import (
    BaseSize,
    Settings,
    base_bytes,
    count_trained,
    describe_settings,
    estimate_memory,
    fit_settings,
    measure_base,
)
from glm_peft.models import ChatGLMConfig
from glm_peft.models.loading import load_base_model

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
    assert size.largest_quantized == max(module.weight.numel() for module in linear)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_base_is_counted_as_it_is_stored(tiny_model_dirs: dict[str, Path], bits: int):
    """Of the linear layers; the numbers that scale them are a few of a hundred more."""
    folder = tiny_model_dirs["chatglm2"]
    model_args = ModelArguments(str(folder), dtype="float32", quantization_bit=bits)
    model = load_base_model(model_args, "cpu")
    head = model.get_output_embeddings()
    linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    stored = sum(module.weight.numel() * module.weight.element_size() for module in linear)
    size = measure_base(AutoConfig.from_pretrained(folder))
    assert stored == size.quantized * bits / 8
    whole = base_bytes(size, replace(SETTINGS, dtype="float32"))
    saved = whole - base_bytes(size, replace(SETTINGS, dtype="float32", quantization_bit=bits))
    assert saved == pytest.approx(4 * size.quantized - stored, rel=0.05)


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("encoder_hidden_size", [None, 24])
def test_the_trained_numbers_are_those_of_the_adapter(
    tiny_model_dirs: dict[str, Path], generation: str, encoder_hidden_size: int | None
):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dirs[generation])
    model_args = ModelArguments(
        "base",
        num_virtual_tokens=8,
        prefix_projection=encoder_hidden_size is not None,
        encoder_hidden_size=encoder_hidden_size,
    )
    trained, _ = create_adapter(model, model_args).get_nb_trainable_parameters()
    config = AutoConfig.from_pretrained(tiny_model_dirs[generation])
    assert count_trained(config, replace(SETTINGS, encoder_hidden_size=encoder_hidden_size)) == trained


def test_bytes_of_the_base_by_precision_and_quantization():
    base = BaseSize(parameters=3 * 2**20, quantized=2**21, quantized_rows=2**10, largest_quantized=2**20)
    assert base_bytes(base, replace(SETTINGS, dtype="float32")) == 12 * 2**20
    assert base_bytes(base, SETTINGS) == 6 * 2**20
    assert base_bytes(base, replace(SETTINGS, quantization_bit=8)) == 4 * 2**20 + 4 * 2**10
    assert base_bytes(base, replace(SETTINGS, quantization_bit=4)) == 3 * 2**20 + 2**15 + 2**9


@pytest.mark.parametrize(
    ("has_it", "flags", "dtype", "mapped"),
    [
        (True, {}, "bfloat16", 0),  # the base is the mapped file itself
        (True, {"quantization_bit": 4}, "bfloat16", 2),
        (False, {}, "float32", 0),  # so it is with weights that are kept as they are stored
        (False, {"dtype": "float32"}, "float32", 2),
        (False, {"dtype": "bfloat16"}, "bfloat16", 0),
    ],
)
def test_auto_is_counted_as_it_is_resolved_here_and_as_half_precision_on_a_gpu(
    has_it: bool, flags: dict, dtype: str, mapped: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("glm_peft.models.loading.has_fast_bfloat16", lambda: has_it)
    config, training_args = ChatGLMConfig(dtype="bfloat16"), TrainingArguments(str(tmp_path), use_cpu=True)
    arguments = ModelArguments("base", **flags), DataArguments(), training_args
    settings = describe_settings(*arguments, None, config)
    assert (settings.dtype, settings.mapped_element, settings.gpu_dtype) == (dtype, mapped, flags.get("dtype", "auto"))
    base = measure_base(config)
    told = format_memory(config, settings, base)
    assert ("in float32" in told) == (dtype == "float32")
    assert (f"Resident up to {mapped * base.parameters / 1e9:.2f} GB more" in told) == bool(mapped)
    on_gpu = format_memory(config, replace(settings, dtype="bfloat16"), base)
    assert told.splitlines()[-4:] == on_gpu.splitlines()[-4:]


def test_the_published_recipe_of_chatglm_6b_needs_less_than_what_was_published_for_it():
    """Published: 6.7 GB in 4 bits, rows of 64 + 64 tokens one by one; there the logits of all tokens were kept."""
    settings = Settings(quantization_bit=4, num_virtual_tokens=128, batch_size=1, tokens=128, labels=64)
    assert 5e9 < estimate_memory(ChatGLMConfig(), settings).total < 6.7e9


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operations made and that are still there; those of a model do not count."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.peak, self.live = 0, {}
        self.own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: dict | None = None) -> Any:
        output = operation(*args, **(kwargs or {}))
        for tensor in filter(torch.is_tensor, tree_leaves(output)):
            storage = StorageWeakRef(tensor.untyped_storage())
            if storage.cdata not in self.own:
                self.live.setdefault(storage.cdata, (storage, tensor.untyped_storage().nbytes()))
        self.live = {key: value for key, value in self.live.items() if not value[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return output


def make_model(folder: Path, settings: Settings) -> PeftModel:
    """In training, as `train.py` makes it."""
    attention = "eager" if settings.eager_attention else "sdpa"
    model_args = ModelArguments(
        str(folder),
        dtype=settings.dtype,
        attn_implementation=attention,
        num_virtual_tokens=settings.num_virtual_tokens,
    )
    model = create_adapter(load_base_model(model_args, "cpu"), model_args)
    attach_prefix_attention(model)
    label_loss.attach_label_loss(model.get_base_model())
    if settings.activation_checkpointing:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def make_batch(model: PeftModel, settings: Settings) -> dict[str, torch.Tensor]:
    """The last `labels` tokens of each row carry loss; the first row has some padding."""
    shape, config = (settings.batch_size, settings.tokens), model.config
    ids = torch.randint(5, 60, shape, generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, : -settings.labels] = -100
    if config.model_type == "chatglm":
        frame = torch.tensor([config.gmask_token_id, config.bos_token_id])
        ids[:, -settings.labels - 2 : -settings.labels] = frame
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1) * mask, "labels": labels}


def count_saved(model: PeftModel, forward: Callable[[], Any]) -> int:
    """Bytes that autograd keeps for the backward pass, without those of the model."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for pointer, storage in saved.items() if pointer not in own)


def count_step(model: PeftModel, settings: Settings) -> int:
    """The most bytes alive in two steps without an optimizer: in the second the gradient of the first is there."""
    batch = make_batch(model, settings)
    with LiveBytes(model) as counted:
        for _ in range(2):
            model(**batch).loss.backward()
    return counted.peak


def estimate_step(config: PreTrainedConfig, settings: Settings) -> float:
    """What `count_step` should find; of what is trained only the gradient."""
    memory = estimate_memory(config, settings)
    return memory.prefix_and_optimizer / 4 + memory.prefix_in_use + memory.activations + memory.work


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("eager_attention", [False, True])
def test_the_activations_are_those_that_autograd_keeps(
    tiny_model_dirs: dict[str, Path], generation: str, dtype: str, eager_attention: bool
):
    settings = replace(SETTINGS, dtype=dtype, eager_attention=eager_attention)
    model = make_model(tiny_model_dirs[generation], settings)
    batch = make_batch(model, settings)
    saved = count_saved(model, lambda: model(**batch))
    assert estimate_memory(model.config, settings).activations == pytest.approx(saved, rel=0.12)


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "float32"},
        {"dtype": "bfloat16"},
        {"dtype": "float32", "activation_checkpointing": True},
        {"dtype": "bfloat16", "activation_checkpointing": True, "tokens": 128},
        {"dtype": "float32", "num_virtual_tokens": 256, "tokens": 16, "labels": 8},
        {"dtype": "bfloat16", "num_virtual_tokens": 256, "tokens": 16, "labels": 8},
    ],
)
@pytest.mark.parametrize("chunk", [1 << 25, 1 << 15])
def test_a_step_needs_what_is_estimated(
    tiny_model_dirs: dict[str, Path], generation: str, change: dict, chunk: int, monkeypatch: pytest.MonkeyPatch
):
    """One chunk of logits or several."""
    for module in (label_loss, memory_estimate):
        monkeypatch.setattr(module, "CHUNK_LOGITS", chunk)
    settings = replace(SETTINGS, **change)
    model = make_model(tiny_model_dirs[generation], settings)
    assert estimate_step(model.config, settings) == pytest.approx(count_step(model, settings), rel=0.25)


@pytest.mark.parametrize(
    "change", [{"tokens": 128}, {"batch_size": 4}, {"dtype": "float32"}, {"eager_attention": True}]
)
def test_activations_grow_with_what_costs_memory(tiny_model_dirs: dict[str, Path], change: dict):
    config = AutoConfig.from_pretrained(tiny_model_dirs["glm4"])
    changed = estimate_memory(config, replace(SETTINGS, **change))
    assert changed.activations > estimate_memory(config, SETTINGS).activations


def test_the_prefix_is_counted_once_for_all_rows():
    config = ChatGLMConfig()
    few, many = (estimate_memory(config, replace(SETTINGS, batch_size=size)).prefix_in_use for size in (1, 8))
    assert few == many == 8 * 2 * config.num_hidden_layers * config.hidden_size * 2


def test_a_quantized_base_makes_one_matrix_whole_at_a_time():
    config = ChatGLMConfig()
    plain = estimate_memory(config, SETTINGS).work
    quantized = estimate_memory(config, replace(SETTINGS, quantization_bit=4)).work
    assert quantized == plain + 2 * config.hidden_size * config.intermediate_size


@pytest.mark.parametrize("generation", ["chatglm", "chatglm3"])
@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_a_step_of_a_deep_model_needs_what_is_estimated(
    tmp_path: Path, generation: str, activation_checkpointing: bool
):
    folder = make_tiny_model(tmp_path / "deep", generation, hidden_size=32, num_layers=8)
    settings = replace(SETTINGS, dtype="float32", labels=8, activation_checkpointing=activation_checkpointing)
    model = make_model(folder, settings)
    assert estimate_step(model.config, settings) == pytest.approx(count_step(model, settings), rel=0.15)


def test_activation_checkpointing_keeps_one_layer_whole_and_the_inputs_of_all():
    few, many = (ChatGLMConfig(num_hidden_layers=layers) for layers in (10, 11))
    settings = replace(SETTINGS, activation_checkpointing=True)
    inputs = 2 * 64 * few.hidden_size * 2
    more = estimate_memory(many, settings).activations - estimate_memory(few, settings).activations
    assert more == inputs
    # One layer that is kept whole takes as much either way.
    one = ChatGLMConfig(num_hidden_layers=1)
    plain, checkpointed = (estimate_memory(one, replace(SETTINGS, activation_checkpointing=x)) for x in (False, True))
    assert checkpointed.activations - plain.activations == inputs


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
