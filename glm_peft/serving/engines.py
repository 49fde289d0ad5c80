"""The engine that commands start: requests for the base and its adapters, together where that is possible."""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from functools import partial

from glm_peft.arguments.model import ModelArguments
from glm_peft.errors import UserError
from glm_peft.models.unwrapping import has_prefix
from glm_peft.prediction.generation_settings import num_virtual_tokens
from glm_peft.serving.answerers import BASE, Answerers, open_answerers
from glm_peft.serving.engine import AnswerRequest, EngineStopped, Load
from glm_peft.serving.ordinary_batches import Deliver, OrdinaryBatches, Row
from glm_peft.serving.paged_batches import PagedBatches, can_be_paged
from glm_peft.serving.paged_prefixes import PAGE_SIZE

MAX_BATCH_TOKENS = 512


def open_engine(
    model_args: ModelArguments,
    adapters: Mapping[str, str],
    cache_tokens: int | None = None,
    max_batch_tokens: int | None = None,
) -> "SharedEngine":
    """
    Load a base and its adapters, and start the threads that answer.

    Args:
        model_args: those of the base.
        adapters: folder or Hub id of each adapter, by the name that it will have.
        cache_tokens: how many tokens' keys and values are kept for all requests together; `None` for what fits into
            1 GiB, or into the free memory of a GPU.
        max_batch_tokens: the most tokens that are computed in one step; a longer prompt takes several.

    Raises:
        UserError: an adapter cannot be read or is of another base, or the cache does not hold the prefixes.
    """
    return SharedEngine(open_answerers(model_args, adapters), cache_tokens, max_batch_tokens or MAX_BATCH_TOKENS)


class SharedEngine:
    """
    An `Engine` of one continuous batch for the base and all prefixes, and of ordinary batches for everything else.

    Args:
        answerers: the base and its adapters.
        cache_tokens: see `open_engine`.
        max_batch_tokens: see `open_engine`.
    """

    def __init__(
        self, answerers: Answerers, cache_tokens: int | None = None, max_batch_tokens: int = MAX_BATCH_TOKENS
    ) -> None:
        self.answerers = answerers
        answerers.model.eval()
        is_paged = can_be_paged(answerers.model)
        self.paged = PagedBatches(answerers, cache_tokens, max_batch_tokens) if is_paged else None
        self.ordinary = OrdinaryBatches(answerers, self._alone)
        self._under_way: Counter[str] = Counter()
        self._leaving: set[str] = set()
        self._is_closing = self._is_closed = False
        self._model_lock = threading.Lock()

    async def generate(self, request: AnswerRequest) -> AsyncIterator[list[int]]:
        """Yield new ids of an answer, see `Engine.generate`."""
        self._check(request)
        loop, arrivals = asyncio.get_running_loop(), asyncio.Queue()

        def deliver(ids: list[int], is_last: bool, error: BaseException | None) -> None:
            with suppress(RuntimeError):  # the loop has ended, and with it whoever waited
                loop.call_soon_threadsafe(arrivals.put_nowait, (ids, is_last, error))

        cancel = self._take(request, deliver)
        self._under_way[request.name] += 1
        try:
            is_last = False
            while not is_last:
                ids, is_last, error = await arrivals.get()
                if error:
                    raise EngineStopped(f"The worker ended: {error}") from error
                if ids:
                    yield ids
        finally:
            cancel()
            self._under_way[request.name] -= 1
            if request.name in self._leaving and not self._under_way[request.name]:
                await asyncio.to_thread(self._drop, request.name)

    def longest_prompt(self, name: str, max_new_tokens: int) -> int:
        """Return how many tokens a prompt may have, see `Engine.longest_prompt`."""
        model = self.answerers.by_name[name].model
        limit = self.answerers.model.config.max_position_embeddings
        if self._is_in_pages(name):
            limit = min(limit, self.paged.room())
        return limit - num_virtual_tokens(model) - max_new_tokens

    def load(self) -> Load:
        """Return what the engine is doing now."""
        waiting = self.ordinary.num_waiting() + (len(self.paged.waiting) if self.paged else 0)
        total = self.paged.num_blocks if self.paged else 0
        used = total - self.paged.free_blocks if self.paged else 0
        return Load(sum(self._under_way.values()) - waiting, waiting, used * PAGE_SIZE, total * PAGE_SIZE)

    def failure(self) -> BaseException | None:
        """Return the error that ended a worker; `None` while both are well."""
        return (self.paged and self.paged.failure()) or self.ordinary.failure

    def add_adapter(self, name: str, path: str) -> None:
        """Load an adapter, see `Engine.add_adapter`."""
        if name in self.answerers.by_name or name in self._leaving:
            raise UserError(f"The name {name} is taken; give the adapter a name of its own.")
        opened = self.answerers.open(path)  # outside of the pause, as it may be fetched from the Hub
        with self._alone():
            self.answerers.add(name, opened)
            try:
                if self._is_in_pages(name):
                    self.paged.add_prefix(name)
            except UserError:
                self.answerers.remove(name)
                raise

    def remove_adapter(self, name: str) -> None:
        """Take no more requests for an adapter, see `Engine.remove_adapter`."""
        if name == BASE or name not in self.names():
            raise UserError(
                f"There is no adapter {name!r} to remove, only {', '.join(self.names()[1:]) or 'the base'}."
            )
        self._leaving.add(name)
        if not self._under_way[name]:
            self._drop(name)

    def names(self) -> list[str]:
        """Return who can be asked now, the base first."""
        return [name for name in self.answerers.by_name if name not in self._leaving]

    def close(self, drain_seconds: float = 0.0) -> None:
        """End after at most `drain_seconds`, see `Engine.close`."""
        if self._is_closed:
            return
        self._is_closing = True
        deadline = time.monotonic() + drain_seconds
        while self._under_way.total() and time.monotonic() < deadline and not self.failure():
            time.sleep(0.05)
        self._is_closed = True
        self.ordinary.stop()
        if self.paged:
            self.paged.stop()

    def _check(self, request: AnswerRequest) -> None:
        """Raise where a request cannot be taken."""
        if self._is_closing:
            raise EngineStopped("The engine is shutting down.")
        if request.name not in self.names():
            raise UserError(f"There is no {request.name!r} to answer, only {', '.join(self.names())}.")
        longest = self.longest_prompt(request.name, request.settings.max_new_tokens)
        if len(request.prompt) > longest:
            raise UserError(
                f"The prompt has {len(request.prompt)} tokens, and {max(longest, 0)} find room beside an answer of "
                f"{request.settings.max_new_tokens}: shorten it, or ask for fewer tokens."
            )

    def _take(self, request: AnswerRequest, deliver: Deliver) -> Callable[[], None]:
        """Hand a request to its batches; return what frees its place."""
        if self._is_in_pages(request.name):
            return partial(self.paged.cancel, self.paged.add(request, deliver))
        if self.ordinary.failure:
            raise EngineStopped(f"The worker ended: {self.ordinary.failure}")
        row = Row(request, deliver)
        self.ordinary.add(row)
        return row.cancel

    def _is_in_pages(self, name: str) -> bool:
        return self.paged is not None and (name == BASE or has_prefix(self.answerers.by_name[name].model))

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep everybody else from the model, whose layers or `generate` are changed meanwhile."""
        with self._model_lock, self.paged.paused() if self.paged else nullcontext():
            yield

    def _drop(self, name: str) -> None:
        """Free what an adapter takes that nobody is answered by any more."""
        with self._alone():
            if self._is_in_pages(name):
                self.paged.remove_prefix(name)
            self.answerers.remove(name)
        self._leaving.discard(name)
