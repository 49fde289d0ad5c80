"""The head of a model that generates: its results, on which rows they depend, and that it comes back as it was."""

import pytest
import torch
from closeness import assert_close
from torch import nn

from glm_peft.prediction.head_product import fast_head


class Base(nn.Module):
    """A base that has a head only."""

    def __init__(self, dtype: torch.dtype = torch.float32, bias: bool = False) -> None:
        super().__init__()
        self.head = nn.Linear(64, 5000, bias=bias, dtype=dtype)

    def get_output_embeddings(self) -> nn.Linear:
        return self.head


@pytest.mark.parametrize("rows", [1, 2, 7, 16, 33])
@pytest.mark.parametrize("bias", [False, True])
def test_the_logits_are_those_of_the_head(rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    base, states = Base(bias=bias), torch.randn(rows, 3, 64)[:, -1:]
    with torch.no_grad():
        expected = base.head(states)
        with fast_head(base):
            logits = base.head(states)
    assert logits.shape == (rows, 1, 5000)
    assert_close(logits, expected)


def test_a_row_has_the_same_logits_whatever_the_others_are() -> None:
    torch.manual_seed(0)
    base, states = Base(), torch.randn(16, 1, 64)
    with torch.no_grad(), fast_head(base):
        together = base.head(states)
        assert all(torch.equal(base.head(states[row : row + 1])[0], together[row]) for row in range(16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_head_that_is_not_in_float32_computes_as_it_does(dtype: torch.dtype) -> None:
    base, states = Base(dtype), torch.randn(4, 1, 64, dtype=dtype)
    with torch.no_grad(), fast_head(base):
        assert torch.equal(base.head(states), nn.functional.linear(states, base.head.weight))


def test_the_head_comes_back_as_it_was_also_after_an_error() -> None:
    base = Base()
    with pytest.raises(RuntimeError, match="stop"), fast_head(base):
        raise RuntimeError("stop")
    assert "forward" not in vars(base.head)
    own = base.head.forward = lambda states: states
    with fast_head(base):
        assert base.head.forward is not own
    assert base.head.forward is own


def test_new_weights_are_seen_by_the_next_run() -> None:
    base, states = Base(), torch.randn(2, 1, 64)
    with torch.no_grad():
        with fast_head(base):
            base.head(states)
        base.head.weight.zero_()
        with fast_head(base):
            assert not base.head(states).any()
