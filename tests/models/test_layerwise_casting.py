"""Bases whose weights stay in 16 bits while they compute in float32, as on CPUs without bfloat16 of their own."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from closeness import assert_close
from make_tiny_model import make_tiny_model
from torch import nn
from training_steps import trained
from transformers import PreTrainedConfig

from glm_peft.arguments.model import ModelArguments
from glm_peft.models import layerwise_casting
from glm_peft.models.layerwise_casting import CastEmbedding, CastLinear, cast_layerwise, kept_dtype
from glm_peft.models.loading import choose_kept_dtype


@pytest.fixture(autouse=True)
def old_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """This one counts as one without AMX and AVX512-BF16; weights of tiny models have several tiles."""
    monkeypatch.setattr("glm_peft.models.loading.has_fast_bfloat16", lambda: False)
    for name in ("layerwise_casting", "loading"):
        monkeypatch.setattr(f"glm_peft.models.{name}.SMALLEST_KEPT", 512)
    monkeypatch.setattr(layerwise_casting, "_TILE", 512)
    monkeypatch.setattr(layerwise_casting, "_ROWS", 5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 7, 24), (1, 24), (24,), (0, 24)])
def test_products_and_gradients_are_those_of_float32(dtype: torch.dtype, shape: tuple[int, ...]):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(24, 101)).requires_grad_(False)
    plain.load_state_dict({name: value.to(dtype).float() for name, value in plain.state_dict().items()})
    kept = nn.Sequential(nn.Linear(24, 101)).requires_grad_(False)
    kept.load_state_dict(plain.state_dict())
    cast_layerwise(kept.to(dtype))
    assert kept[0].weight.dtype == dtype and kept[0].bias.dtype == torch.float32
    states, same = (torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in "ab")
    products = plain(states), kept(same)
    for product in products:
        product.backward(torch.ones_like(product))
    assert products[1].shape == products[0].shape and products[1].dtype == torch.float32
    assert_close(products[1], products[0])
    assert_close(same.grad, states.grad)


def test_the_compiler_leaves_the_loop_over_tiles_alone():
    kept = cast_layerwise(nn.Sequential(nn.Linear(24, 101)).requires_grad_(False).half())
    graphs = []

    def record(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled, states = torch.compile(lambda states: kept(states + 1) * 2, backend=record), torch.ones(3, 24)
    assert torch.equal(compiled(states), kept(states + 1) * 2)
    called = {str(node.target) for graph in graphs for node in graph.graph.nodes if node.op.startswith("call")}
    assert called and not any("mm" in name or "copy" in name for name in called)


@pytest.mark.parametrize(
    ("generation", "dtype", "flags"),
    [
        ("chatglm", "float16", {}),
        ("chatglm2", "bfloat16", {"peft_type": "lora"}),
        ("chatglm3", "bfloat16", {"attn_implementation": "eager"}),
        ("glm4", "bfloat16", {"quantization_bit": 4}),
        ("glm4_0414", "bfloat16", {"prefix_projection": True}),
    ],
)
def test_a_base_stored_in_16_bits_trains_as_in_float32(generation: str, dtype: str, flags: dict, tmp_path: Path):
    folder = str(make_tiny_model(tmp_path / "model", generation, hidden_size=64, dtype=dtype))
    plain, expected = trained(ModelArguments(folder, dtype="float32", **flags))
    base, found = trained(ModelArguments(folder, **flags), checkpointing=flags.get("peft_type") != "lora")
    for value, other in zip(found, expected, strict=True):
        assert_close(value, other)
    assert base.dtype == plain.dtype == torch.float32 and kept_dtype(plain) is None
    assert kept_dtype(base) == getattr(torch, dtype)
    kept = [each for each in base.modules() if isinstance(each, (CastLinear, CastEmbedding))]
    assert {each.weight.dtype for each in kept} == {kept_dtype(base)}
    assert base.get_memory_footprint() < 0.75 * plain.get_memory_footprint()
    assert type(base).__name__ == type(plain).__name__
    assert {name for name, _ in base.named_parameters()} == {name for name, _ in plain.named_parameters()}


def test_weights_are_kept_only_where_that_changes_nothing_but_memory(monkeypatch: pytest.MonkeyPatch):
    def choose(stored: torch.dtype | str | None = torch.bfloat16, device: str = "cpu", **flags) -> torch.dtype | None:
        config = PreTrainedConfig(dtype=stored, vocab_size=64, hidden_size=8)
        return choose_kept_dtype(ModelArguments("base", **flags), torch.device(device), config)

    assert choose() == torch.bfloat16 and choose("float16") == torch.float16
    assert choose(torch.float32) is None and choose(None) is None and choose(device="cuda") is None
    for flags in ({"dtype": "float32"}, {"dtype": "bfloat16"}, {"peft_type": "none"}, {"quantization_bit": 8}):
        assert choose(**flags) is None
    with monkeypatch.context() as other:
        other.setattr("glm_peft.models.loading.PartialState", lambda: SimpleNamespace(num_processes=2))
        assert choose() is None
    with monkeypatch.context() as other:
        other.setattr("glm_peft.models.loading.SMALLEST_KEPT", 513)
        assert choose() is None
    monkeypatch.setattr("glm_peft.models.loading.has_fast_bfloat16", lambda: True)
    assert choose() is None
