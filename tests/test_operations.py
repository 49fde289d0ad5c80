"""The operations of a step, compared with what torch counts as it computes them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from glm_peft.adapters.loading import create_adapter
from glm_peft.adapters.other_methods import attach_loss
from glm_peft.adapters.prefix_attention import attach_prefix_attention
from glm_peft.arguments.model import ModelArguments
from glm_peft.models.loading import load_base_model
from glm_peft.models.unwrapping import has_prefix
from glm_peft.training.operations import count_operations

TOKENS = torch.arange(5, 53).view(2, 24)
LABELS = TOKENS.masked_fill(torch.arange(24) < 9, -100)
BATCH = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS), "labels": LABELS}
BATCH["position_ids"] = torch.arange(24).expand(2, 24)


def make_model(base: Path, **changes: Any) -> torch.nn.Module:
    """Eager attention, whose products torch counts on a CPU."""
    given = {"num_virtual_tokens": 8} if changes.get("peft_type") in (None, "prompt_tuning") else {}
    model_args = ModelArguments(str(base), attn_implementation="eager", **(given | changes))
    model = create_adapter(load_base_model(model_args, "cpu"), model_args)
    if has_prefix(model):
        attach_prefix_attention(model)
    attach_loss(model)
    return model.train()


@pytest.mark.parametrize("generation", ["chatglm", "chatglm2", "glm4_0414"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"prefix_projection": True}, {"peft_type": "lora"}, {"peft_type": "none"}, {"peft_type": "prompt_tuning"}],
)
def test_operations_are_those_that_torch_counts(tiny_model_dirs, generation, changes):
    """But for the first of the two layers, which hands no gradient on to the embeddings where these are frozen."""
    if generation == "chatglm" and changes.get("peft_type") == "prompt_tuning":
        generation = "glm4"
    model = make_model(tiny_model_dirs[generation], **changes)
    batch = BATCH | {"input_ids": TOKENS.clone()}
    if generation == "chatglm":  # which reads its positions off these
        batch["input_ids"][:, 7:9] = torch.tensor([model.config.gmask_token_id, model.config.bos_token_id])
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    assert 0.99 * counter.get_total_flops() <= count_operations(model, batch) <= 1.08 * counter.get_total_flops()


def test_stock_counts_far_more(tiny_model_dirs):
    """As if every weight were trained, and the head worked at every token."""
    model = make_model(tiny_model_dirs["chatglm2"])
    stock = 6 * TOKENS.numel() * model.num_parameters(exclude_embeddings=True)
    assert stock > 1.5 * count_operations(model, BATCH)


def test_twice_the_rows_take_twice_as_many_and_labels_make_the_head_work(tiny_model_dirs):
    model = make_model(tiny_model_dirs["chatglm3"])
    twice = {name: value.repeat(2, 1) for name, value in BATCH.items()}
    assert count_operations(model, twice) == 2 * count_operations(model, BATCH)
    unlabelled = BATCH | {"labels": torch.full_like(TOKENS, -100)}
    head = model.get_base_model().get_output_embeddings()
    assert count_operations(model, BATCH) - count_operations(model, unlabelled) == 2 * 15 * 4 * head.weight.numel()
