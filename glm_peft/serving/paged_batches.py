"""One continuous batch of requests for the base and for adapters that are prefixes."""

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count

from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.requests import GenerationOutput

from glm_peft.errors import UserError
from glm_peft.models.generations import CHATGLM
from glm_peft.models.unwrapping import has_prefix
from glm_peft.prediction.generation_settings import CACHE_BYTES, token_bytes
from glm_peft.serving.answerers import Answerers
from glm_peft.serving.engine import AnswerRequest, EngineStopped
from glm_peft.serving.ordinary_batches import Deliver
from glm_peft.serving.paged_prefixes import PAGE_SIZE, PagedPrefix, PrefixManager, blocks_of

MOST_SLOTS = 32_768  # on a CPU, as the mask of a batch has a column for each


@dataclass
class Ticket:
    """A request that was taken, and how much of its answer was delivered."""

    key: str
    request: AnswerRequest
    deliver: Deliver
    blocks: int
    has_begun: bool = False
    has_ended: bool = False
    sent: int = 0


class PagedBatches:
    """
    Requests that go on together, each entering and leaving the batch on its own.

    A request begins when the cache has room for all that it may become, so that none is ever thrown out for another.

    Args:
        answerers: the base and its adapters.
        slots: the most tokens whose keys and values are kept; `None` for what the memory holds.
        max_batch_tokens: the most tokens that are computed in one step.

    Raises:
        UserError: the prefixes do not fit into the cache.
    """

    def __init__(self, answerers: Answerers, slots: int | None, max_batch_tokens: int) -> None:
        self.answerers = answerers
        self.prefixes: dict[str, PagedPrefix] = {}
        self.waiting: deque[Ticket] = deque()
        self._lock = threading.RLock()  # adapters come and go in other threads than that of the event loop
        self._keys = count()
        self.manager = PrefixManager(answerers.model, *_configs(answerers.model, slots, max_batch_tokens))
        for name, answering in answerers.by_name.items():
            if has_prefix(answering.model):
                self.prefixes[name] = self.manager.add_prefix(name, answering.model)
        try:
            self.manager.warmup()  # makes the cache here, where an error is the caller's
        except MemoryError:
            raise UserError(_too_small(slots)) from None
        self.num_blocks = self.manager.cache.num_blocks
        self.free_blocks = self._blocks_of_requests()
        self.manager.start()

    def room(self) -> int:
        """Return how many tokens one request may become, its prefix counted."""
        return self._blocks_of_requests() * PAGE_SIZE

    def add(self, request: AnswerRequest, deliver: Deliver) -> Ticket:
        """
        Take a request; call it in the thread of the event loop, to which its ids are delivered.

        Raises:
            EngineStopped: the worker has failed, or is stopping.
        """
        self._check_worker()
        ticket = Ticket(f"request-{next(self._keys)}", request, deliver, self._blocks_of(request))
        self.waiting.append(ticket)
        self._begin()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Free the place of a request, wherever it stands; one that has ended has none."""
        if ticket.has_begun and not ticket.has_ended:
            self.manager.cancel_request(ticket.key)
            self._end(ticket)
        elif ticket in self.waiting:
            self.waiting.remove(ticket)

    def add_prefix(self, name: str) -> None:
        """
        Write the prefix of a new adapter into the cache; call it within `paused`.

        Raises:
            UserError: the cache has no room for it.
        """
        model = self.answerers.by_name[name].model
        blocks = blocks_of(model.active_peft_config.num_virtual_tokens)
        with self._lock:
            if blocks > self.free_blocks:
                raise UserError(f"The cache has no room for {name} now: load it later, or raise --cache_tokens.")
            self.prefixes[name] = self.manager.add_prefix(name, model)
            self.free_blocks -= blocks

    def remove_prefix(self, name: str) -> None:
        """Free the cache of an adapter that nobody is answered by; call it within `paused`."""
        with self._lock:
            prefix = self.prefixes.pop(name)
            self.manager.remove_prefix(prefix)
            self.free_blocks += blocks_of(len(prefix.ids))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Keep the worker from the model meanwhile."""
        self._check_worker()
        with self.manager.pause():
            yield

    def failure(self) -> BaseException | None:
        """Return the error that ended the worker."""
        return self.manager.failure

    def stop(self) -> None:
        """End the worker; what is under way fails."""
        self.manager.stop(block=True, hard_stop=True)

    def _check_worker(self) -> None:
        reason = self.manager.background_thread_status.can_accept_new_requests()
        if reason:
            raise EngineStopped(reason)

    def _blocks_of_requests(self) -> int:
        """Return how many blocks there are beside those of the prefixes."""
        return self.num_blocks - sum(blocks_of(len(prefix.ids)) for prefix in self.prefixes.values())

    def _blocks_of(self, request: AnswerRequest) -> int:
        """Return the blocks of its own that a request may need; whole pages of a prefix are shared."""
        num_virtual_tokens = len(self.prefixes[request.name].ids) if request.name in self.prefixes else 0
        most = num_virtual_tokens + len(request.prompt) + request.settings.max_new_tokens
        return blocks_of(most) - num_virtual_tokens // PAGE_SIZE

    def _begin(self) -> None:
        """Let the oldest waiting requests begin that have room."""
        with self._lock:
            while self.waiting and self.waiting[0].blocks <= self.free_blocks and not self.failure():
                ticket = self.waiting.popleft()
                self.free_blocks -= ticket.blocks
                ticket.has_begun = True
                self._submit(ticket)

    def _submit(self, ticket: Ticket) -> None:
        request = ticket.request
        ids = self.prefixes[request.name].ids if request.name in self.prefixes else []
        self.manager.chooser.add(ticket.key, request.settings)
        self.manager.register_result_handler(ticket.key, lambda output: self._take(ticket, output))
        self.manager.add_request(
            [*ids, *request.prompt],
            request_id=ticket.key,
            max_new_tokens=request.settings.max_new_tokens,
            streaming=True,
            eos_token_id=self.answerers.stop_token_ids(request.name),
        )

    def _take(self, ticket: Ticket, output: GenerationOutput) -> None:
        """Deliver what is new of an answer."""
        if ticket.has_ended:
            return  # cancelled while this was on its way
        new, ticket.sent = output.generated_tokens[ticket.sent :], len(output.generated_tokens)
        if output.is_finished() or output.error:
            self._end(ticket)
        ticket.deliver(new, ticket.has_ended, EngineStopped(output.error) if output.error else None)
        if self.failure():
            self._fail_waiting()

    def _end(self, ticket: Ticket) -> None:
        ticket.has_ended = True
        self.manager.forget(ticket.key)
        with self._lock:
            self.free_blocks += ticket.blocks
        self._begin()

    def _fail_waiting(self) -> None:
        while self.waiting:
            self.waiting.popleft().deliver([], True, EngineStopped(str(self.failure())))


def can_be_paged(model: PreTrainedModel) -> bool:
    """Whether continuous batching can carry a base: not ChatGLM-6B, which reads its prompt in both directions."""
    return model.config.model_type != CHATGLM


def _configs(
    model: PreTrainedModel, slots: int | None, max_batch_tokens: int
) -> tuple[GenerationConfig, ContinuousBatchingConfig]:
    if slots is None and model.device.type == "cpu":
        slots = min(CACHE_BYTES // token_bytes(model), MOST_SLOTS)
    config = ContinuousBatchingConfig(
        page_size=PAGE_SIZE,
        num_blocks=slots and blocks_of(slots),
        max_batch_tokens=max_batch_tokens,
        # Below it, pages kept of earlier prompts are freed: a step must always find room.
        safety_margin=min(1.0, max(0.2, 2 * max_batch_tokens / slots)) if slots else 0.2,
        # Answers are to be those of `predict`, by the same attention; tokens are drawn by Python, outside of graphs.
        auto_switch_to_flash=False,
        use_cuda_graph=False,
        use_async_batching=False,
    )
    return GenerationConfig(do_sample=False, max_new_tokens=1, eos_token_id=-1), config


def _too_small(slots: int | None) -> str:
    return f"The cache of {slots or 'all'} tokens does not hold the prefixes of all adapters: raise --cache_tokens."
