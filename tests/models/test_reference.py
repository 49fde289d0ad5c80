"""The models against what the published code computed (shared/reference/README.md)."""

import functools

import pytest
import torch
from closeness import assert_close
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import glm_peft  # noqa: F401

NAMES = ("chatglm-6b", "chatglm2-6b", "chatglm3-6b", "glm-4-9b-chat")


@pytest.fixture(scope="module", params=[(name, how) for name in NAMES for how in ("eager", "sdpa")], ids="-".join)
def model_and_expected(request, reference_models) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    name, implementation = request.param
    folder = reference_models / name
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=implementation)
    expected = load_file(folder / "expected.safetensors")
    tag = "base."
    return model, {key.removeprefix(tag): value for key, value in expected.items() if key.startswith(tag)}


def test_the_attention_implementation_is_the_one_asked_for(model_and_expected, request):
    model, _ = model_and_expected
    assert f"-{model.config._attn_implementation}]" in request.node.name


@pytest.mark.parametrize("index", range(3))
@torch.no_grad()
def test_logits_and_loss(model_and_expected, index):
    model, expected = model_and_expected
    single = functools.partial("single{}.{}".format, index)
    output = model(input_ids=expected[single("input_ids")], labels=expected[single("labels")])
    assert_close(output.logits, expected[single("logits")])
    assert_close(output.loss[None], expected[single("loss")])


@torch.no_grad()
def test_last_logits_of_a_left_padded_batch(model_and_expected):
    model, expected = model_and_expected
    mask = expected["batch.attention_mask"]
    assert (mask[:, 0] == 0).any() and mask[:, -1].all()
    position_ids = (mask.cumsum(dim=1) - 1).clamp(min=0)
    output = model(input_ids=expected["batch.input_ids"], attention_mask=mask, position_ids=position_ids)
    assert_close(output.logits[:, -1], expected["batch.last_logits"])


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("index", range(3))
def test_greedy_decoding(model_and_expected, index, use_cache):
    model, expected = model_and_expected
    input_ids, tokens = expected[f"greedy{index}.input_ids"], expected[f"greedy{index}.tokens"]
    # The recorded steps were never stopped by an end token.
    output = model.generate(
        input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=len(tokens), do_sample=False,
        eos_token_id=None, use_cache=use_cache, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    assert output.sequences[0, input_ids.shape[1] :].tolist() == tokens.tolist()
    assert_close(torch.cat(output.logits), expected[f"greedy{index}.logits"])
