"""Cache keys and values in place, and compute the prefix at the cache's head once for many batches."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel, PeftType
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

BLOCK = 128  # tokens by which a full layer grows, with one copy of it each time


class BlockCache(DynamicCache):
    """
    `DynamicCache` with room for tokens to come, into which new ones are written.

    transformers' own is copied at each token. Rows are also removed in place.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layer_class_to_replicate = BlockLayer

    @classmethod
    def repeating(cls, cache: DynamicCache, batch_size: int) -> "BlockCache":
        """Repeat the one row of `cache` for each row of a batch."""
        repeated = cls()
        # Expanded, not copied: the first tokens that are added make the copy.
        for layer in cache.layers:
            own = BlockLayer()
            own.lazy_initialization(layer.keys, layer.values)
            own.keys = layer.keys.expand(batch_size, -1, -1, -1)
            own.values = layer.values.expand(batch_size, -1, -1, -1)
            repeated.layers.append(own)
        return repeated

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Replace row i by row `indices[i]`, and keep as many rows as there are indices (at most all)."""
        wanted = indices.tolist()
        # Only rows that take the place of another are written.
        moved = [row for row, source in enumerate(wanted) if row != source]
        sources = [wanted[row] for row in moved]
        for layer in self.layers:
            layer.move_rows(sources, moved, len(wanted))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)


class BlockLayer(DynamicLayer):
    """Layer whose `keys` and `values` [b, n_kv, s, d] are views of the filled part of `_rooms`."""

    _rooms: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add keys and values [b, n_kv, new, d], and return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past = self.get_seq_length()
        length = past + key_states.shape[2]
        if self._rooms is None or self._rooms[0].shape[2] < length:
            filled = ((self.keys, key_states), (self.values, value_states))
            self._rooms = tuple(_make_room(old, new, past, length + BLOCK) for old, new in filled)
        rows = len(key_states)
        for room, states in zip(self._rooms, (key_states, value_states), strict=True):
            room[:rows, :, past:length] = states
        self.keys, self.values = (room[:rows, :, :length] for room in self._rooms)
        return self.keys, self.values

    def move_rows(self, sources: list[int], targets: list[int], num_rows: int) -> None:
        """Replace the rows `targets` by the rows `sources`, and drop the rows from `num_rows` on."""
        # Before the first update all rows are one expanded tensor, the prefix, which other batches use too.
        if targets and self._rooms is not None:
            self.keys[targets], self.values[targets] = self.keys[sources], self.values[sources]
        self.keys, self.values = self.keys[:num_rows], self.values[:num_rows]


def _make_room(old: torch.Tensor, new: torch.Tensor, past: int, size: int) -> torch.Tensor:
    """Allocate [b, n_kv, size, d], with the old keys or values at its head."""
    room = new.new_empty(*new.shape[:2], size, new.shape[3])
    if past:  # an empty layer's tensors are one-dimensional
        room[:, :, :past] = old
    return room


@contextmanager
def prefix_computed_once(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """
    Compute the prefix of the model's adapter for the first batch, and use it again for the others.

    The adapter must not change meanwhile. Models without a prefix are left alone.
    """
    # PEFT runs its encoder for each call of `generate`, and copies the result for each row.
    if not isinstance(model, PeftModel) or model.active_peft_config.peft_type != PeftType.PREFIX_TUNING:
        yield
        return
    before, compute, prefix = vars(model).get("get_prompt"), model.get_prompt, None

    def get_prompt(batch_size: int, **kwargs: Any) -> BlockCache:
        nonlocal prefix
        prefix = prefix or compute(1, **kwargs)
        return BlockCache.repeating(prefix, batch_size)

    model.get_prompt = get_prompt
    try:
        yield
    finally:
        del model.get_prompt
        if before is not None:
            model.get_prompt = before
