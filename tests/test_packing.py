"""Packed rows give each example the logits, the loss and the gradients that it has alone."""

from types import SimpleNamespace

import pytest
import torch
from closeness import ROUNDING, assert_close
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM

from glm_peft.adapters.loading import create_adapter
from glm_peft.adapters.prefix_attention import attach_prefix_attention
from glm_peft.arguments.model import ModelArguments
from glm_peft.errors import UserError
from glm_peft.preprocessing.collators import TrainingCollator
from glm_peft.preprocessing.packing import (
    BatchPackingCollator,
    PackingCollator,
    RowCost,
    pack_examples,
    plan_batch,
    plan_rows,
)

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
    arguments = ModelArguments("base", num_virtual_tokens=5)
    model = create_adapter(base, arguments).train()
    attach_prefix_attention(model)
    return model


@pytest.fixture(params=["chatglm-6b", "chatglm2-6b", "glm-4-9b-chat", "glm4_0414"])
def folder(request, reference_models, tiny_model_dirs):
    return tiny_model_dirs[request.param] if request.param == "glm4_0414" else reference_models / request.param


def gradient_of(model: PeftModel) -> torch.Tensor:
    return model.prompt_encoder["default"].embedding.weight.grad


def run_alone(folder, examples) -> tuple[PeftModel, list[torch.Tensor], float]:
    """A model with the gradient of all examples, the logits of each and the sum of their losses."""
    model, logits, total = make_model(folder), [], 0.0
    for row in examples:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, num_items_in_batch=1)
        output.loss.backward()
        logits.append(output.logits[0].detach())
        total += output.loss.item()
    return model, logits, total


def assert_same(packed, batch, plan, alone, logits, total) -> None:
    output = packed(**batch, num_items_in_batch=1)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(total, rel=ROUNDING)
    assert_close(gradient_of(packed), gradient_of(alone))
    for row, indices in zip(output.logits, plan, strict=True):
        expected = torch.cat([logits[index] for index in indices])
        assert_close(row[: len(expected)].detach(), expected)


def test_logits_loss_and_gradient_are_those_of_the_examples_alone(folder, examples):
    packed = make_model(folder)
    rows = pack_examples(examples, 20, packed.config)
    assert len(rows) == 2
    batch = PackingCollator(TOKENIZER, TrainingCollator(TOKENIZER))(list(rows))
    plan = plan_rows([len(ids) for ids in examples["input_ids"]], 20)
    assert_same(packed, batch, plan, *run_alone(folder, examples))


@pytest.mark.parametrize("hidden_size, rows", [(1000, 1), (20, 2)])
def test_the_same_holds_for_the_examples_of_a_batch(folder, examples, hidden_size, rows):
    packed, cost = make_model(folder), RowCost(5, hidden_size)
    plan = plan_batch([len(ids) for ids in examples["input_ids"]], cost)
    batch = BatchPackingCollator(TOKENIZER, TrainingCollator(TOKENIZER), packed.config, cost)(list(examples))
    assert len(plan) == len(batch["input_ids"]) == rows
    assert_same(packed, batch, plan, *run_alone(folder, examples))


def test_a_packed_batch_counts_as_many_labels_as_a_padded_one(folder, examples):
    padded = TrainingCollator(TOKENIZER)
    packed = BatchPackingCollator(TOKENIZER, padded, make_model(folder).config, RowCost(5, 1000))
    counts = [(collate(list(examples))["labels"][:, 1:] != -100).sum() for collate in (padded, packed)]
    assert counts[0] == counts[1] == sum(len(answer) for answer in ANSWERS)


def test_a_batch_of_equal_lengths_is_the_padded_one_bit_for_bit(examples, reference_models):
    padded, config = TrainingCollator(TOKENIZER), make_model(reference_models / "chatglm-6b").config
    rows = [examples[0], examples[2]] * 4
    batch = BatchPackingCollator(TOKENIZER, padded, config, RowCost(5, 32))(rows)
    assert batch.keys() == padded(rows).keys()
    assert all(torch.equal(batch[name], values) for name, values in padded(rows).items())


def test_no_example_answers_for_the_end_of_the_one_before(examples, reference_models):
    config = make_model(reference_models / "chatglm2-6b").config
    without_prompts = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 2
    labels = pack_examples(Dataset.from_list(without_prompts), 6, config)[0]["labels"]
    assert labels == [-100, 6, 7, -100, 6, 7]


def test_a_batch_takes_the_number_of_rows_that_costs_least():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        lengths = torch.randint(8, 513, (16,), generator=generator).tolist()
        plan = plan_batch(lengths, RowCost(128, 512))
        assert sorted(index for row in plan for index in row) == list(range(16))
        longest_row = max(sum(lengths[index] for index in row) for row in plan)
        assert RowCost(128, 512)(len(plan), longest_row) <= RowCost(128, 512)(16, max(lengths))
        assert len(plan) < 16


def test_rows_get_longer_where_attention_is_cheap():
    lengths = [300, 200, 290, 210, 310, 190, 300, 200]
    rows = [len(plan_batch(lengths, RowCost(128, hidden_size))) for hidden_size in (16, 100_000)]
    assert rows[0] > rows[1]


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
