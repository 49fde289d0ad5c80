"""
Let labels carry the weight of their token in the loss, above the 32 bits of the token.

So they are padded, packed, shared among processes and counted as labels without weights, which are the tokens alone.
"""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:  # its import takes half a second, and one prompt needs none
    from datasets import Dataset

_TOKEN_BITS = 32
_ONE = 0x3F800000  # the bits of 1.0 in float32: of a label of weight 1 nothing is left above the token


def weigh_labels(ids: list[int], weight: float) -> list[int]:
    """Return the labels of tokens that all have a weight, above 0."""
    if weight == 1:  # nearly all: a tensor for each example would take longer than its ids
        return ids
    bits = int(torch.tensor(weight, dtype=torch.float32).view(torch.int32)) ^ _ONE
    return [id_ | bits << _TOKEN_BITS for id_ in ids]


def split_labels(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the tokens of labels, int64, of which -100 stays, and their weights; `None` where all are 1."""
    bits = torch.where(labels < 0, 0, labels >> _TOKEN_BITS)
    if not bits.any():
        return labels, None
    return labels - (bits << _TOKEN_BITS), (bits ^ _ONE).to(torch.int32).view(torch.float32)


def has_weights(examples: "Dataset") -> bool:
    """Whether any label weighs other than 1."""
    import pyarrow.compute as pc

    # All labels are in the table, also of examples that were taken out: that costs nothing but a sum more.
    return (pc.max(pc.list_flatten(examples.data["labels"], recursive=True)).as_py() or 0) >= 1 << _TOKEN_BITS
