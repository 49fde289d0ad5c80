"""Models of sizes and seeds that no recorded number is of, against the same networks as plain arithmetic."""

from pathlib import Path

import pytest
import torch
from closeness import assert_close
from make_tiny_model import make_tiny_model
from plain_networks import plain_greedy, plain_logits
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import glm_peft  # noqa: F401

SIZES = {
    "chatglm-one-layer": dict(generation="chatglm", hidden_size=24, num_heads=3, num_layers=1, ffn_size=70),
    "chatglm-wide-heads": dict(
        generation="chatglm", hidden_size=96, num_heads=2, num_layers=3, vocab_size=451, seed=3
    ),
    "chatglm-deep": dict(generation="chatglm", hidden_size=32, num_heads=8, num_layers=5, seed=4),
    "chatglm2-odd": dict(
        generation="chatglm2", hidden_size=40, num_heads=6, num_kv_heads=3, head_dim=12, ffn_size=37, num_layers=3
    ),
    "chatglm2-32k": dict(generation="chatglm2", hidden_size=32, num_kv_heads=4, rope_ratio=16, seed=5),
    "chatglm3-one-group": dict(generation="chatglm3", hidden_size=56, num_heads=7, num_kv_heads=1, seed=6),
    "chatglm3-128k": dict(generation="chatglm3", hidden_size=32, head_dim=24, rope_ratio=500, vocab_size=777),
    "glm4-every-head": dict(generation="glm4", hidden_size=48, num_heads=3, num_kv_heads=3, head_dim=32, num_layers=1),
    "glm4-1m": dict(generation="glm4", hidden_size=64, num_heads=8, num_kv_heads=2, rope_ratio=10000, seed=7),
}


def shake_norms(folder: Path) -> None:
    """Made-up models have norms of 1 and 0, which would hide a norm that is lost or in the wrong place."""
    weights, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(1)
    for name in (name for name in weights if "norm" in name):
        weights[name] += torch.empty_like(weights[name]).normal_(0, 0.2, generator=generator)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module", params=SIZES)
def folder(request, tmp_path_factory) -> Path:
    made = make_tiny_model(tmp_path_factory.mktemp("sizes") / request.param, **SIZES[request.param])
    shake_norms(made)
    return made


@pytest.fixture(scope="module")
def model(folder) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def prompts(folder) -> list[list[int]]:
    """Of several lengths; ChatGLM-6B's end with its control tokens and go on with an answer or without."""
    config = AutoConfig.from_pretrained(folder)
    if config.model_type == "glm":
        return [[5, 60, 7, 99, 250], [17, 18], [101, 3, 3, 44, 205, 6, 71, 8]]
    sop, gmask, mask = config.bos_token_id, config.gmask_token_id, config.mask_token_id
    return [[5, 60, 7, gmask, sop, 99, 250], [17, gmask, sop], [mask, 101, 4, 44, 205, sop, 71]]


def pad(rows: list[list[int]], pad_id: int, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows)) + 1
    gaps = [width - len(row) for row in rows]
    left = side == "left"
    ids = [[pad_id] * gap + row if left else row + [pad_id] * gap for row, gap in zip(rows, gaps, strict=True)]
    mask = [
        [0] * gap + [1] * len(row) if left else [1] * len(row) + [0] * gap for row, gap in zip(rows, gaps, strict=True)
    ]
    return torch.tensor(ids), torch.tensor(mask)


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.std() > 0.1
    assert_close(actual.double(), expected)


@torch.no_grad()
def test_logits_are_those_of_the_plain_network(folder, model, prompts):
    for ids in prompts:
        assert_same(model(torch.tensor([ids])).logits[0], plain_logits(folder, ids))


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_no_logits(side, folder, model, prompts):
    input_ids, mask = pad(prompts, model.config.pad_token_id, side)
    position_ids = (mask.cumsum(dim=1) - 1).clamp(min=0)
    logits = model(input_ids, attention_mask=mask, position_ids=position_ids).logits
    assert logits.isfinite().all()
    for ids, row, real in zip(prompts, logits, mask.bool(), strict=True):
        assert_same(row[real], plain_logits(folder, ids))


def test_generation_with_the_cache_takes_the_plain_networks_steps(folder, model, prompts):
    input_ids, mask = pad(prompts, model.config.pad_token_id, "left")
    output = model.generate(input_ids, attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert output[:, input_ids.shape[1] :].tolist() == [plain_greedy(folder, ids, 5) for ids in prompts]
