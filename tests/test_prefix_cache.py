"""The cache that is written in place answers as stock's does, and the prefix is computed once."""

from pathlib import Path

import pytest
import torch
from closeness import assert_close
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, DynamicCache

import glm_peft  # noqa: F401
from glm_peft.prediction.prefix_cache import BLOCK, BlockCache, prefix_computed_once


def states(rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 2, length, 4), torch.randn(rows, 2, length, 4)


def pair_of_caches() -> tuple[DynamicCache, BlockCache]:
    """Stock's cache and ours, both with a prefix of 3 tokens for 5 rows, in two layers."""
    prefix = DynamicCache([states(1, 3) for _ in range(2)])
    stock = DynamicCache([(layer.keys.repeat(5, 1, 1, 1), layer.values.repeat(5, 1, 1, 1)) for layer in prefix.layers])
    return stock, BlockCache.repeating(prefix, 5)


def add_to_both(caches: tuple[DynamicCache, BlockCache], rows: int, length: int) -> None:
    for index in range(2):
        new = states(rows, length)
        given = [cache.update(*new, index) for cache in caches]
        assert all(torch.equal(stock, own) for stock, own in zip(*given, strict=True))


def assert_equal(stock: DynamicCache, own: BlockCache) -> None:
    assert stock.get_seq_length() == own.get_seq_length()
    for expected, layer in zip(stock.layers, own.layers, strict=True):
        assert torch.equal(expected.keys, layer.keys) and torch.equal(expected.values, layer.values)


def test_it_holds_what_stock_holds_beyond_one_block() -> None:
    torch.manual_seed(0)
    caches = pair_of_caches()
    assert_equal(*caches)
    for length in (7, 1, 1, BLOCK, 1, 2):
        add_to_both(caches, 5, length)
    assert_equal(*caches)


def test_tokens_are_added_without_a_copy_of_the_others() -> None:
    _, cache = pair_of_caches()
    addresses = set()
    for _ in range(BLOCK):
        cache.update(*states(5, 1), 0)
        addresses.add(cache.layers[0].keys.data_ptr())
    assert len(addresses) == 1


@pytest.mark.parametrize("rows", [[0, 4, 2], [3], [4, 3, 2, 1, 0], [1, 1, 0, 4, 4], [0, 1, 2, 3, 4]])
def test_rows_leave_and_change_places_as_in_stock(rows: list[int]) -> None:
    torch.manual_seed(0)
    caches = pair_of_caches()
    add_to_both(caches, 5, 6)
    for cache in caches:
        cache.batch_select_indices(torch.tensor(rows))
    assert_equal(*caches)
    add_to_both(caches, len(rows), 1)
    for cache in caches:
        cache.reorder_cache(torch.arange(len(rows)).flip(0))
    add_to_both(caches, len(rows), BLOCK)
    assert_equal(*caches)


@pytest.fixture(scope="module")
def model(tiny_model_dirs: dict[str, Path]) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dirs["chatglm2"], dtype=torch.float32)
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, prefix_projection=True)
    return get_peft_model(base, config).eval()


def test_the_prefix_is_what_peft_makes_for_every_row_and_made_once(model: PeftModel) -> None:
    calls = []
    hook = model.prompt_encoder["default"].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        expected = model.get_prompt(3)
        calls.clear()
        with prefix_computed_once(model):
            prompts = [model.get_prompt(batch_size=rows) for rows in (3, 2, 3)]
    hook.remove()
    assert len(calls) == 1
    # Made for three rows at once, a projection is one larger product, which kernels may sum in another order.
    for layer, own in zip(expected.layers, prompts[0].layers, strict=True):
        assert_close(own.keys, layer.keys)
        assert_close(own.values, layer.values)
    assert prompts[1].layers[0].keys.shape[0] == 2


def test_what_is_written_behind_the_prefix_of_one_batch_is_not_in_the_next(model: PeftModel) -> None:
    with torch.no_grad(), prefix_computed_once(model):
        first = model.get_prompt(2)
        before = first.layers[0].keys.clone()
        config = model.get_base_model().config
        new = torch.ones(2, config.num_key_value_heads, 5, config.head_dim)
        first.update(new, new, 0)
        first.batch_select_indices(torch.tensor([1]))
        assert torch.equal(model.get_prompt(2).layers[0].keys, before)


def test_peft_computes_the_prefix_again_afterwards_and_after_an_error(model: PeftModel) -> None:
    with pytest.raises(RuntimeError, match="stop"), prefix_computed_once(model):
        raise RuntimeError("stop")
    assert "get_prompt" not in vars(model)
    with prefix_computed_once(model.get_base_model()):
        assert "get_prompt" not in vars(model)
