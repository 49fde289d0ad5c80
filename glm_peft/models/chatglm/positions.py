"""Compute ChatGLM-6B's two position rows (FORMATS section 3)."""

import torch

from glm_peft.errors import UserError
from glm_peft.models.chatglm.configuration_chatglm import ChatGLMConfig


def build_position_rows(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, config: ChatGLMConfig
) -> torch.Tensor:
    """
    Compute the two positions of every token from complete sequences.

    Row 0 counts the tokens up to the one before `<sop>` and then stays at `[gMASK]`'s index; row 1 is 0 there and
    then counts from 1. Both count from the first real token.

    Args:
        input_ids: [batch, length] complete sequences, padded on either side.
        attention_mask: [batch, at least length], 1 for real tokens; its last columns belong to `input_ids`.

    Returns:
        [batch, 2, length], int64.

    Raises:
        UserError: a sequence has no `<sop>`, or neither mask token before it.
    """
    length = input_ids.shape[1]
    columns = torch.arange(length, device=input_ids.device)
    has_mask = attention_mask is not None and attention_mask.dim() == 2
    # PEFT puts the prefix's columns before those of the text.
    real = attention_mask[:, -length:].bool() if has_mask else torch.ones_like(input_ids, dtype=torch.bool)
    start = _first(real)
    # The model may generate these tokens too: only the first `<sop>`, and the first mask token before it, count.
    sop = _first(real & (input_ids == config.bos_token_id))
    prompt = real & (columns < sop)
    gmask, mask = (_first(prompt & (input_ids == id_)) for id_ in (config.gmask_token_id, config.mask_token_id))
    mask = torch.where(gmask < length, gmask, mask)
    _check_control_tokens(sop, mask, length, config)
    # Without `- start` padding would move the text away from a prefix, whose keys are not rotated.
    row_0 = torch.where(columns < sop, columns, mask) - start
    row_1 = columns - sop + 1
    return torch.stack([row_0, row_1], dim=1).clamp(min=0)


def _first(found: torch.Tensor) -> torch.Tensor:
    """Return the column [batch, 1] of the first `True` of each row, or the length where there is none."""
    return torch.where(found.any(dim=1), found.int().argmax(dim=1), found.shape[1])[:, None]


def _check_control_tokens(sop: torch.Tensor, mask: torch.Tensor, length: int, config: ChatGLMConfig) -> None:
    lacking = ((sop == length) | (mask == length)).squeeze(1)
    if not lacking.any():
        return
    row = int(lacking.int().argmax())
    name, ids = "<sop>", str(config.bos_token_id)
    if sop[row] < length:
        name, ids = "[gMASK] or [MASK] before <sop>", f"{config.gmask_token_id} or {config.mask_token_id}"
    raise UserError(
        f"Row {row} of the batch has no {name} (id {ids}), without which ChatGLM-6B's positions are not defined: "
        "encode prompts with the model's own tokenizer and its special tokens."
    )
