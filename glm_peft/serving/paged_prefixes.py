"""
Prefixes in the paged cache of transformers' continuous batching, so that many adapters and the base share a batch.

Each prefix lies in the cache once, under an owner of its own, and is known by virtual token ids, which are negative: a
request for its adapter has them before its prompt, and starts as a fork of the owner, with nothing computed for them.
"""

from dataclasses import dataclass
from functools import partial
from itertools import count

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.continuous_api import (
    ContinuousBatchingManager,
    ContinuousBatchProcessor,
)

from glm_peft.serving.choosing import TokenChooser

PAGE_SIZE = 16  # tokens; stock's 256 would leave a prefix of 128 half of its page


@dataclass(frozen=True)
class PagedPrefix:
    """
    A prefix as the cache has it.

    Args:
        owner: the name of its blocks.
        ids: its virtual token ids, one for each of its tokens.
        model: computes its keys and values.
    """

    owner: str
    ids: list[int]
    model: PeftModel


class PrefixManager(ContinuousBatchingManager):
    """Continuous batching in which requests may begin with a prefix, and each chooses its tokens for itself."""

    def __init__(
        self, model: PreTrainedModel, generation_config: GenerationConfig, config: ContinuousBatchingConfig
    ) -> None:
        super().__init__(model, generation_config, config)
        # Before the batch processor is made, which takes it over. Stock's would share one switch for all requests.
        self.logit_processor = self.chooser = TokenChooser()
        self.prefixes: dict[int, PagedPrefix] = {}  # by the first of their ids
        # Ids are never used twice: blocks of a prefix that has gone may still be known by them.
        self._next_id = count(-2, -1)

    @property
    def cache(self) -> PagedAttentionCache:
        """The cache, once the generation thread has made it."""
        return self.batch_processor.cache

    def add_prefix(self, owner: str, model: PeftModel) -> PagedPrefix:
        """
        Add the prefix of an adapter.

        Call it before `start`, or within `pause`.

        Raises:
            MemoryError: the cache has no room for it.
        """
        num_tokens = model.active_peft_config.num_virtual_tokens
        prefix = PagedPrefix(owner, [next(self._next_id) for _ in range(num_tokens)], model)
        if self.batch_processor is not None:
            _install(prefix, self.cache)
        self.prefixes[prefix.ids[0]] = prefix
        return prefix

    def remove_prefix(self, prefix: PagedPrefix) -> None:
        """Free the blocks of a prefix for which no request is waiting; call it within `pause`."""
        del self.prefixes[prefix.ids[0]]
        self.cache.free_blocks(prefix.owner, no_cache=True)

    def forget(self, request_id: str) -> None:
        """Forget a request that has ended, or was cancelled, of which stock would keep the handler."""
        self.chooser.discard(request_id)
        with self.output_router._lock:
            self.output_router.result_handlers.pop(request_id, None)

    def _create_batch_processor(self) -> ContinuousBatchProcessor:
        """Override as the cache is made, or emptied, here and nowhere else, in the generation thread."""
        processor = super()._create_batch_processor()
        for prefix in self.prefixes.values():
            _install(prefix, processor.cache)
        self._fork_prefixes(processor.cache)
        return processor

    def _fork_prefixes(self, cache: PagedAttentionCache) -> None:
        """Let requests that begin with a prefix start as forks of it; stock finds whole pages only."""
        find_shared = partial(type(cache).search_prefix_match, cache)

        def search_prefix_match(request_id: str, prompt_ids: list[int]) -> int:
            prefix = self.prefixes.get(prompt_ids[0])
            # Pages of prefix and prompt together may be there already, from the same question asked before.
            if prefix is None or _known_tokens(cache, prompt_ids) >= len(prefix.ids):
                return find_shared(request_id, prompt_ids)
            return _fork(prefix, request_id, cache)

        cache.search_prefix_match = search_prefix_match


@torch.no_grad()
def _install(prefix: PagedPrefix, cache: PagedAttentionCache) -> None:
    """Write keys and values of a prefix into blocks of its own."""
    (allocator,) = cache.cache_allocators.values()
    num_tokens = len(prefix.ids)
    for _ in range(allocator.needs_new_sectors(prefix.owner, 0, num_tokens)):
        if not cache.pool.num_free_sectors:
            _evict(cache)
        if not cache.pool.num_free_sectors:
            raise MemoryError
        cache.pool.allocate_sector(allocator.index)
    allocator.allocate_cache_to_request(prefix.owner, 0, num_tokens)
    slots = torch.tensor(allocator.get_write_indices(prefix.owner, 0, num_tokens), device=cache.device)
    for number, layer in enumerate(prefix.model.get_prompt(1).layers):
        for pages, values in zip(allocator._kv_token_views[number], (layer.keys, layer.values), strict=True):
            # [1, heads, tokens, dim] -> [tokens, heads, dim]
            pages.index_copy_(0, slots, values[0].transpose(0, 1).to(pages.device, pages.dtype))


def _fork(prefix: PagedPrefix, request_id: str, cache: PagedAttentionCache) -> int:
    """Give a request the blocks of a prefix; return how many of its tokens need no computing."""
    (allocator,) = cache.cache_allocators.values()
    # A last page that is not full is copied into a block from the pool, which raises where it is short of them.
    if allocator.count_non_shareable_blocks(prefix.owner, len(prefix.ids)):
        _ensure_free_block(cache)
    source, destination = allocator.fork_blocks(prefix.owner, request_id, len(prefix.ids))
    if source:
        allocator.copy_blocks(source, destination)
    return len(prefix.ids)


def _ensure_free_block(cache: PagedAttentionCache) -> None:
    (allocator,) = cache.cache_allocators.values()
    if cache.pool.count_free_blocks(allocator.index):
        return
    if not cache.pool.num_free_sectors:
        _evict(cache)
    if not cache.pool.count_free_blocks(allocator.index):
        cache.pool.allocate_sector(allocator.index)


def _evict(cache: PagedAttentionCache) -> None:
    """Free the pages that are kept of earlier prompts only."""
    cache.evict_cached_blocks()
    cache.pool.try_to_free_sectors()


def _known_tokens(cache: PagedAttentionCache, prompt_ids: list[int]) -> int:
    (allocator,) = cache.cache_allocators.values()
    return len(allocator.match_prefix_blocks(prompt_ids)) * allocator.tokens_per_page


def blocks_of(num_tokens: int) -> int:
    """Return how many pages hold so many tokens."""
    return -(-num_tokens // PAGE_SIZE)
