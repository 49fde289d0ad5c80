"""The prefix as an argument of attention gives, bit for bit, what stock PEFT gives with its cache."""

import pytest
import torch
from closeness import assert_close
from peft import PeftModel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import AutoModelForCausalLM

from glm_peft.adapters.loading import create_adapter
from glm_peft.adapters.prefix_attention import _widen, attach_prefix_attention
from glm_peft.arguments.model import ModelArguments
from glm_peft.errors import UserError

ROWS = [[7, 8, 9, 251, 254, 10, 11, 12], [20, 251, 254, 30, 31]]
PAD = 3


def make_model(folder, implementation: str = "sdpa", prefix_projection: bool = False) -> PeftModel:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=implementation)
    arguments = ModelArguments("base", num_virtual_tokens=5, prefix_projection=prefix_projection)
    return create_adapter(base, arguments).train()


def make_batch(rows: list[list[int]], side: str) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))

    def pad(row: list[int], filler: int) -> list[int]:
        fillers = [filler] * (width - len(row))
        return fillers + row if side == "left" else row + fillers

    mask = torch.tensor([pad([1] * len(row), 0) for row in rows])
    ids = torch.tensor([pad(row, PAD) for row in rows])
    positions = (mask.cumsum(1) - 1) * mask
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": positions,
        "labels": ids.masked_fill(mask == 0, -100),
    }


def loss_and_gradient(model: PeftModel, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), model.prompt_encoder["default"].embedding.weight.grad


@pytest.fixture(params=["chatglm-6b", "chatglm2-6b", "glm-4-9b-chat", "glm4_0414"])
def folder(request, reference_models, tiny_model_dirs):
    return tiny_model_dirs[request.param] if request.param == "glm4_0414" else reference_models / request.param


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_loss_and_gradient_are_those_of_stock_peft(folder, implementation, side, checkpointing):
    batch = make_batch(ROWS, side)
    expected = loss_and_gradient(make_model(folder, implementation), batch)
    model = make_model(folder, implementation)
    attach_prefix_attention(model)
    if checkpointing:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    found = loss_and_gradient(model, batch)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("number", [3, 8, 17])
def test_rows_that_share_the_prefix_add_to_its_gradient_in_stock_s_order(folder, number):
    batch = make_batch([ROWS[row % 2][: 8 - row % 3] + [40 + row] for row in range(number)], "left")
    expected = loss_and_gradient(make_model(folder), batch)
    model = make_model(folder)
    attach_prefix_attention(model)
    assert all(torch.equal(one, other) for one, other in zip(loss_and_gradient(model, batch), expected, strict=True))


def test_the_encoder_runs_once_a_step_and_a_projection_learns_the_same(folder):
    batch, models = make_batch(ROWS, "left"), [make_model(folder, prefix_projection=True) for _ in range(2)]
    attach_prefix_attention(models[1])
    encoded = []
    models[1].prompt_encoder["default"].register_forward_hook(lambda *call: encoded.append(call[2].shape[:2]))
    losses = [loss_and_gradient(model, batch)[0] for model in models]
    assert encoded == [(1, 5)]
    assert_close(losses[1], losses[0])
    gradients = [{name: value.grad for name, value in model.prompt_encoder.named_parameters()} for model in models]
    assert_close(gradients[1], gradients[0])


def test_a_call_that_keeps_its_cache_has_the_prefix_in_every_row(folder):
    batch = make_batch(ROWS, "left")
    model = make_model(folder).eval()
    with torch.no_grad():
        expected = model(**batch, use_cache=True)
        attach_prefix_attention(model)
        found = model(**batch, use_cache=True)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.past_key_values.layers[1].keys, expected.past_key_values.layers[1].keys)


@pytest.mark.parametrize("given", [(), ("attention_mask",), ("position_ids",)])
def test_what_a_call_leaves_out_is_filled_in_as_stock_does(folder, given):
    batch = make_batch(ROWS[:1], "left")
    batch = {name: batch[name] for name in ("input_ids", "labels", *given)}
    expected = loss_and_gradient(make_model(folder), batch)
    model = make_model(folder)
    attach_prefix_attention(model)
    assert all(torch.equal(one, other) for one, other in zip(loss_and_gradient(model, batch), expected, strict=True))


def test_generation_through_the_cache_stays_as_it_is(folder):
    inputs = make_batch(ROWS, "left")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    model = make_model(folder).eval()
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    expected = model.generate(**inputs, **settings)
    attach_prefix_attention(model)
    assert model.generate(**inputs, **settings).tolist() == expected.tolist()


def test_without_the_adapter_the_base_answers_as_before(folder):
    batch = make_batch(ROWS, "left")
    model = make_model(folder).eval()
    attach_prefix_attention(model)
    with torch.no_grad(), model.disable_adapter():
        found = model(**batch).loss
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        assert_close(found, base(**batch).loss)


def test_an_attention_that_cannot_carry_a_prefix_is_refused(folder):
    model = make_model(folder)
    model.get_base_model().set_attn_implementation("flex_attention")
    with pytest.raises(UserError, match="--attn_implementation flex_attention cannot carry a prefix"):
        attach_prefix_attention(model)


def test_flex_attention_sees_the_prefix_and_what_its_blocks_show():
    generator = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(2, 4, length, 16, generator=generator) for length in (40, 47, 47))
    padding = torch.tensor([9, 0])[:, None, None]

    def mask_mod(row, head, q, k):
        return (q >= k) & (k >= padding[row, 0, 0])

    visible = mask_mod(torch.arange(2)[:, None, None], None, torch.arange(40)[None, :, None], torch.arange(40))
    dense = torch.nn.functional.pad(visible[:, None], (7, 0), value=True)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=dense)
    narrow = create_block_mask(mask_mod, B=2, H=None, Q_LEN=40, KV_LEN=40, device="cpu")
    wide = _widen(narrow, query, 7)
    assert wide is _widen(narrow, query, 7)
    assert_close(flex_attention(query, key, value, block_mask=wide), expected)
