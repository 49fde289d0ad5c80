"""Choose the next token of each request in a continuous batch by that request's own settings."""

from dataclasses import dataclass

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.requests import FutureRequestState

from glm_peft.prediction.generation import seed_of_draws
from glm_peft.prediction.generation_settings import GenerationSettings


class TokenChooser(ContinuousBatchingLogitsProcessorList):
    """
    The only processor of a batch whose tokens are taken greedily: it draws for the requests that sample.

    Stock draws for all requests of a batch or for none, by one temperature or by processors that lack a seed.
    """

    def __init__(self) -> None:
        self.drawing = _Drawing()
        super().__init__(LogitsProcessorList([self.drawing]))
        self.tensors_required = 1  # stock counts only processors that it converted

    def add(self, request_id: str, settings: GenerationSettings) -> None:
        """Draw for this request from now on, if its settings sample."""
        if settings.do_sample:
            self.drawing.draws[request_id] = _Draws.of(settings)

    def discard(self, request_id: str) -> None:
        """Forget a request that has ended."""
        self.drawing.draws.pop(request_id, None)


@dataclass(frozen=True)
class _Draws:
    """How the tokens of one request are drawn."""

    processors: LogitsProcessorList
    generator: torch.Generator

    @classmethod
    def of(cls, settings: GenerationSettings) -> "_Draws":
        processors = LogitsProcessorList([TemperatureLogitsWarper(settings.temperature)])  # in transformers' order
        if settings.top_k:
            processors.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1:
            processors.append(TopPLogitsWarper(settings.top_p))
        return cls(processors, torch.Generator().manual_seed(seed_of_draws(settings.seed, 0)))

    def __call__(self, scores: torch.Tensor) -> int:
        """Draw one token by the scores [1, vocabulary]."""
        probabilities = torch.softmax(self.processors(None, scores), dim=-1).cpu()
        return int(torch.multinomial(probabilities, num_samples=1, generator=self.generator))


class _Drawing(ContinuousBatchingLogitsProcessor):
    """Processor that leaves to a request that samples one token only: the one that was drawn for it."""

    supported_kwargs: dict[str, type] = {}
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.draws: dict[str, _Draws] = {}
        self._in_batch: list[_Draws | None] = []

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[FutureRequestState]) -> torch.Tensor:
        # A list beside the tensor that stock hands on, as generators are no numbers.
        self._in_batch = [self.draws.get(request.state.request_id) for request in requests_with_new_token]
        return torch.zeros(len(self._in_batch), dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        """Return the scores [tokens, vocabulary], in the rows that sample all but one of them -inf."""
        for row, draws in enumerate(self._in_batch):
            if draws:
                token = draws(scores[row : row + 1])
                scores[row] = float("-inf")
                scores[row, token] = 0.0
        return scores
