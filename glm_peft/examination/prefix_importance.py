"""
Measure what a base does with a prefix: its attention to it, and the loss without each virtual token.

Shapes: P virtual tokens, s tokens of a row, k copies of a row in a batch.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.models.glm.modeling_glm import eager_attention_forward

from glm_peft.adapters.published_checkpoints import rotate_prefix_keys
from glm_peft.preprocessing.collators import IGNORED_LABEL

_NAME = "eager_with_prefix_shares"

Row = dict[str, list[int]]


@dataclass(frozen=True)
class Importance:
    """
    The measures of a prefix on some rows; losses are in nats per answer token.

    `attention` is each layer's share of attention on the prefix (0 to 1), `changes` by how much the loss rises when
    one virtual token is masked.
    """

    attention: list[float]
    loss: float
    loss_without_prefix: float
    changes: list[float]
    num_examples: int
    num_answer_tokens: int

    def most_important(self, number: int) -> list[int]:
        """Return the virtual tokens whose absence raises the loss most, in their order in the prefix."""
        ranked = sorted(range(len(self.changes)), key=lambda token: -self.changes[token])
        return sorted(ranked[:number])


def measure_importance(
    model: PreTrainedModel, weight: torch.Tensor, rows: Sequence[Row], batch_size: int = 8
) -> Importance:
    """
    Measure attention and losses on rows with the prefix, without each of its virtual tokens, and without all of them.

    Args:
        model: the base, without an adapter.
        weight: the prefix [P, layers * 2 * kv], keys as PEFT has them.
        rows: `input_ids` and `labels`, as training has them.
        batch_size: copies of a row in a batch, each with another mask.
    """
    length = len(weight)
    # A virtual token is masked and not cut out: so the positions of all others, and of the text, stay.
    # The masks: all virtual tokens, each one left out, none.
    seen = torch.cat([torch.ones(1, length), 1 - torch.eye(length), torch.zeros(1, length)]).bool()
    losses = measure_losses(model, weight, rows, seen, batch_size).tolist()
    return Importance(
        attention=measure_attention(model, weight, rows),
        loss=losses[0],
        loss_without_prefix=losses[-1],
        changes=[loss - losses[0] for loss in losses[1:-1]],
        num_examples=len(rows),
        num_answer_tokens=sum(len(_predicting(row)) for row in rows),
    )


@torch.no_grad()
def measure_losses(
    model: PreTrainedModel, weight: torch.Tensor, rows: Sequence[Row], seen: torch.Tensor, batch_size: int = 8
) -> torch.Tensor:
    """
    Measure the teacher-forced loss over all answer tokens of the rows under each of several masks of the prefix.

    Args:
        seen: [masks, P], whether the text sees a virtual token.

    Returns:
        [masks], in nats per answer token, float64.
    """
    totals = torch.zeros(len(seen), dtype=torch.float64)  # a token's share is smaller than float32 sums are exact
    for row in tqdm(rows, desc="Taking virtual tokens away", unit="row", disable=not sys.stderr.isatty()):
        # Row by row, so that nothing is padded: the copies of a row differ in their masks alone.
        columns = _predicting(row)
        targets = torch.tensor([row["input_ids"][column + 1] for column in columns], device=model.device)
        # The head only where an answer token is predicted: full logits would be most of the memory.
        sums = [
            _sum_losses(_run(model, weight, row, masks, logits_to_keep=columns.to(model.device)).logits, targets)
            for masks in seen.split(batch_size)
        ]
        totals += torch.cat(sums)
    return totals / max(sum(len(_predicting(row)) for row in rows), 1)


@torch.no_grad()
def measure_attention(model: PreTrainedModel, weight: torch.Tensor, rows: Sequence[Row]) -> list[float]:
    """
    Measure each layer's share of attention on the prefix, 0 to 1: the mean over heads and answer tokens.

    For an answer token it is the attention at the position that the token is predicted from, one before its own.
    """
    everything, totals, count = torch.ones(1, len(weight), dtype=torch.bool), 0, 0
    with _measured_attention(model):
        for row in rows:
            columns, shares = _predicting(row), []
            # Of the logits nothing is needed; one position is the least that the head takes.
            _run(model, weight, row, everything, logits_to_keep=1, prefix_shares=shares, prefix_length=len(weight))
            totals = totals + torch.stack([share[0, columns].double().sum() for share in shares])
            count += len(columns)
    return (totals / count).tolist()


def prune_prefix(weight: torch.Tensor, kept: Sequence[int], config: PreTrainedConfig) -> torch.Tensor:
    """Return a prefix [N, layers * 2 * kv] of the virtual tokens `kept`, which works as if the others were masked."""
    # PEFT counts the text from N now instead of from P, so keys with rotary positions are turned back as far.
    return rotate_prefix_keys(weight[list(kept)], config, len(kept) - len(weight))


def _predicting(row: Row) -> torch.Tensor:
    """Return the positions from which the answer tokens are predicted, each one before its token."""
    return torch.tensor([place for place, label in enumerate(row["labels"][1:]) if label != IGNORED_LABEL])


def _run(model: PreTrainedModel, weight: torch.Tensor, row: Row, seen: torch.Tensor, **kwargs: Any) -> Any:
    """Call the base with the prefix, as PEFT does, on k copies of a row that see the tokens of `seen` [k, P]."""
    copies, length = seen.shape
    ids = torch.tensor([row["input_ids"]], device=model.device).expand(copies, -1)
    mask = torch.cat([seen.to(ids), torch.ones_like(ids)], dim=1)
    # Counted from P whatever is masked, as PEFT counts behind a cache of P.
    positions = torch.arange(length, mask.shape[1], device=model.device)[None].expand(copies, -1)
    cache = _as_cache(weight, model, copies)  # made anew for each call, as the base appends the text to it
    return model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, **kwargs)


def _as_cache(weight: torch.Tensor, model: PreTrainedModel, copies: int) -> DynamicCache:
    config = model.config
    # The order of PEFT's prompt embeddings: layer, key or value, head, dimension.
    states = weight.to(model.device, model.dtype).reshape(
        len(weight), config.num_hidden_layers, 2, config.num_key_value_heads, -1
    )
    layers = states.permute(1, 2, 3, 0, 4)[:, :, None].expand(-1, -1, copies, -1, -1, -1)
    return DynamicCache([(keys, values) for keys, values in layers])


def _sum_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum the losses of logits [k, n, vocabulary] at targets [n] to [k]."""
    losses = nn.functional.cross_entropy(
        logits.float().transpose(1, 2), targets.expand(len(logits), -1), reduction="none"
    )
    return losses.double().sum(dim=1).cpu()


@contextmanager
def _measured_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let calls of the model that hand on `prefix_shares`, a list, and `prefix_length` note the attention."""
    # Keywords travel through the model to the attention function; of the implementations only eager has weights.
    before = model.config._attn_implementation
    AttentionInterface.register(_NAME, _attend_and_note)
    AttentionMaskInterface.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _attend_and_note(
    *args: Any, prefix_shares: list[torch.Tensor], prefix_length: int, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend, and append the layer's share of attention on the prefix [b, s], the mean over its heads."""
    output, weights = eager_attention_forward(*args, **kwargs)
    prefix_shares.append(weights[..., :prefix_length].float().sum(dim=-1).mean(dim=1).cpu())
    return output, weights
