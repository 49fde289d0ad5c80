"""Numbers of float32 that are equal but for rounding, on every processor; no test itself."""

from collections.abc import Mapping

import torch

ROUNDING = 3e-5
"""
By how much of the largest number two computations of the same may differ.

One rounding is 6e-8 of a number. Kernels differ in the order in which they sum: with those of other processors, logits
of a few layers have been seen to differ by up to 2e-6 of the largest, and gradients by 5e-6. A mistake moves results
by 1e-3 and more.
"""

Tensors = torch.Tensor | Mapping[str, torch.Tensor]


def assert_close(found: Tensors, expected: Tensors, share: float = ROUNDING) -> None:
    """
    Assert that tensors have the same shapes and types, and no number is further off than a share of the largest.

    Args:
        found: a tensor, or several by name.
        expected: the same; each tensor is compared to the largest of its own numbers.
        share: of that number.
    """
    if isinstance(expected, torch.Tensor):
        largest = expected.abs().max().item() if expected.numel() else 0.0
        torch.testing.assert_close(found, expected, rtol=0, atol=share * largest)
        return
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(found[name], value, share)
