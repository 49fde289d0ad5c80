"""The loss in chunks, held to the stock loss and its gradients."""

from collections.abc import Callable

import pytest
import torch
from closeness import assert_close
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.trainer_pt_utils import LabelSmoother

from glm_peft.adapters import label_loss
from glm_peft.adapters.label_loss import attach_label_loss
from glm_peft.adapters.prefix_attention import attach_prefix_attention
from glm_peft.preprocessing.label_weights import split_labels, weigh_labels

GENERATIONS = ("chatglm", "glm4", "glm4_0414")


@pytest.fixture(params=GENERATIONS)
def model(request, tiny_model_dirs) -> PeftModel:
    torch.manual_seed(5)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dirs[request.param], dtype=torch.float32)
    adapted = get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    attach_prefix_attention(adapted)
    return adapted


@pytest.fixture
def batch(model) -> dict[str, torch.Tensor]:
    """Rows with 6, 3 and 1 labels, padded on the left."""
    config = model.get_base_model().config
    torch.manual_seed(6)
    input_ids = torch.randint(20, 200, (3, 12))
    if config.model_type == "chatglm":
        input_ids[:, 4], input_ids[:, 5] = config.gmask_token_id, config.bos_token_id
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, :3] = 0
    labels = input_ids.clone()
    for row, count in enumerate((6, 3, 1)):
        labels[row, :-count] = -100
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": positions, "labels": labels}


def loss_and_gradient(model: PeftModel, compute: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    model.zero_grad()
    loss = compute()
    loss.backward()
    return loss.detach(), model.get_parameter("prompt_encoder.default.embedding.weight").grad.clone()


def assert_equal(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    assert_close(found[0], expected[0])
    assert_close(found[1], expected[1])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("chunk_logits", [1, 4000, 1 << 24])
def test_loss_and_gradients_are_those_of_stock(model, batch, chunk_logits, training, monkeypatch):
    monkeypatch.setattr(label_loss, "CHUNK_LOGITS", chunk_logits)
    model.train(training)
    expected = loss_and_gradient(model, lambda: model(**batch).loss)
    attach_label_loss(model.get_base_model())
    output = model(**batch)
    assert output.logits is None
    assert expected[1].abs().max() > 1e-5
    assert_equal(loss_and_gradient(model, lambda: model(**batch).loss), expected)


@pytest.mark.parametrize("count", [7, torch.tensor(7)])
def test_the_number_of_items_divides_as_in_stock(model, batch, count):
    expected = loss_and_gradient(model, lambda: model(**batch, num_items_in_batch=count).loss)
    attach_label_loss(model.get_base_model())
    assert_equal(loss_and_gradient(model, lambda: model(**batch, num_items_in_batch=count).loss), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_a_weighted_loss_is_the_weighted_mean_of_stock_losses(model, batch, smoothing):
    weights = (2.0, 0.1, 1.0)
    rows = [{name: values[[row]] for name, values in batch.items()} for row in range(3)]
    counts = [weight * int((row["labels"][:, 1:] != -100).sum()) for weight, row in zip(weights, rows, strict=True)]
    attach_label_loss(model.get_base_model(), smoothing)

    def mean() -> torch.Tensor:
        losses = [model(**row).loss for row in rows]
        return sum(count * loss for count, loss in zip(counts, losses, strict=True)) / sum(counts)

    expected = loss_and_gradient(model, mean)
    for row, weight in zip(batch["labels"].unbind(), weights, strict=True):
        row[row != -100] = torch.tensor(weigh_labels(row[row != -100].tolist(), weight))
    tokens, found = split_labels(batch["labels"][1])
    assert tokens.tolist() == rows[1]["labels"][0].tolist() and found[-1] == torch.tensor(0.1)
    assert_equal(loss_and_gradient(model, lambda: model(**batch).loss), expected)


def test_small_batches_add_up_to_the_large_one(model, batch):
    attach_label_loss(model.get_base_model())
    expected = loss_and_gradient(model, lambda: model(**batch).loss)
    count = (batch["labels"][:, 1:] != -100).sum()
    rows = [{name: values[[row]] for name, values in batch.items()} for row in range(3)]
    found = loss_and_gradient(model, lambda: sum(model(**row, num_items_in_batch=count).loss for row in rows))
    assert_equal(found, expected)


def test_label_smoothing_is_that_of_the_trainer(model, batch):
    labels = batch.pop("labels")
    smoother = LabelSmoother(epsilon=0.2)
    expected = loss_and_gradient(model, lambda: smoother(model(**batch), labels, shift_labels=True))
    attach_label_loss(model.get_base_model(), label_smoothing=0.2)
    assert_equal(loss_and_gradient(model, lambda: model(**batch, labels=labels).loss), expected)


def test_a_batch_without_a_label_has_no_gradient(model, batch):
    attach_label_loss(model.get_base_model())
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss, gradient = loss_and_gradient(model, lambda: model(**batch, num_items_in_batch=torch.tensor(4)).loss)
    assert loss == 0
    assert not gradient.any()


@torch.no_grad()
def test_calls_without_labels_stay_as_they_are(model, batch):
    model.eval()
    labels = batch.pop("labels")
    prompt = {name: batch[name][:, :8] for name in ("input_ids", "attention_mask")}
    expected = model(**batch).logits, model.generate(**prompt, max_new_tokens=4, do_sample=False)
    attach_label_loss(model.get_base_model())
    model(**batch, labels=labels)
    assert torch.equal(model(**batch).logits, expected[0])
    assert torch.equal(model.generate(**prompt, max_new_tokens=4, do_sample=False), expected[1])


@torch.no_grad()
def test_a_call_that_failed_leaves_the_next_one_alone(model, batch):
    model.eval()
    labels = batch.pop("labels")
    expected = model(**batch).logits
    attach_label_loss(model.get_base_model())
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        model(**batch, labels=labels[:, :-1])
    assert torch.equal(model(**batch).logits, expected)
