"""Packed rows give each example the logits, the loss and the gradients that it has alone."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM

from glm_peft.adapters import create_adapter
from glm_peft.collators import TrainingCollator
from glm_peft.errors import UserError
from glm_peft.packing import PackingCollator, pack_examples, plan_rows
from glm_peft.prefix_attention import attach_prefix_attention

PROMPTS = [[7, 8, 9], [20], [30, 31, 32, 33, 34], [40, 41]]
ANSWERS = [[10, 11, 12], [13, 14], [15], [16, 17, 18, 19, 21]]
SPECIAL = [251, 254]  # [gMASK] <sop> of the reference models
TOKENIZER = SimpleNamespace(pad_token_id=3, padding_side="left")


@pytest.fixture(scope="module")
def examples() -> Dataset:
    rows = zip(PROMPTS, ANSWERS, strict=True)
    ids = [[*prompt, *SPECIAL, *answer] for prompt, answer in rows]
    labels = [[-100] * (len(row) - len(answer)) + answer for row, answer in zip(ids, ANSWERS, strict=True)]
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


def make_model(folder) -> PeftModel:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    arguments = SimpleNamespace(
        num_virtual_tokens=5, prefix_projection=False, encoder_hidden_size=None, adapter_name_or_path=None
    )
    model = create_adapter(base, arguments).train()
    attach_prefix_attention(model)
    return model


@pytest.fixture(params=["chatglm-6b", "chatglm2-6b", "glm-4-9b-chat", "glm4_0414"])
def folder(request, reference_models, tiny_model_dirs):
    return tiny_model_dirs[request.param] if request.param == "glm4_0414" else reference_models / request.param


def gradient_of(model: PeftModel) -> torch.Tensor:
    return model.prompt_encoder["default"].embedding.weight.grad


def test_logits_loss_and_gradient_are_those_of_the_examples_alone(folder, examples):
    alone = make_model(folder)
    logits, total = [], 0.0
    for row in examples:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        output = alone(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, num_items_in_batch=1)
        output.loss.backward()
        logits.append(output.logits[0].detach())
        total += output.loss.item()

    packed = make_model(folder)
    rows = pack_examples(examples, 20, packed.config)
    assert len(rows) == 2
    output = packed(**PackingCollator(TOKENIZER, TrainingCollator(TOKENIZER))(list(rows)), num_items_in_batch=1)
    output.loss.backward()

    assert output.loss.item() == pytest.approx(total, abs=1e-5)
    torch.testing.assert_close(gradient_of(packed), gradient_of(alone), atol=1e-5, rtol=0)
    plan = plan_rows([len(ids) for ids in examples["input_ids"]], 20)
    for row, indices in zip(output.logits, plan, strict=True):
        expected = torch.cat([logits[index] for index in indices])
        torch.testing.assert_close(row[: len(expected)].detach(), expected, atol=1e-5, rtol=0)


def test_every_example_is_in_one_row_and_no_row_is_too_long():
    lengths = torch.randint(1, 100, (500,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = plan_rows(lengths, 128)
    assert sorted(index for row in rows for index in row) == list(range(500))
    assert max(sum(lengths[index] for index in row) for row in rows) <= 128
    assert len(rows) <= 1.05 * sum(lengths) / 128 + 1


def test_an_example_longer_than_a_row_is_named(examples, reference_models):
    config = make_model(reference_models / "chatglm-6b").config
    with pytest.raises(UserError, match="--max_length 6 is less than the longest example, which has 9 tokens"):
        pack_examples(examples, 6, config)


def test_chatglm_6b_rows_carry_both_positions_of_every_example(examples, reference_models):
    config = make_model(reference_models / "chatglm-6b").config
    row = pack_examples(examples, 64, config)[0]
    starts = [index for index, pair in enumerate(zip(*row["position_rows"], strict=True)) if pair == (0, 0)]
    assert len(starts) == len(PROMPTS)
    assert [row["position_ids"][start] for start in starts] == [0] * len(PROMPTS)
