"""
Compute the loss of a causal language model without the [tokens, vocabulary] matrix.

Logits are computed only where there is a label, a chunk at a time; each chunk's gradient with respect to its hidden
states is computed in the forward pass, so that no chunk is kept or recomputed. The head must be frozen: its own
gradient is not computed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from glm_peft.preprocessing.label_weights import split_labels

CHUNK_LOGITS = 1 << 25  # logits in a chunk: 128 MiB in float32, whatever the vocabulary

Project = Callable[[torch.Tensor], torch.Tensor]
"""A head: [n, h] -> [n, vocabulary]."""
Measure = Callable[[torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor]]
"""(logits [n, vocabulary] of a chunk, its place) -> the summed loss [] and its gradient [n, vocabulary]."""


def attach_label_loss(base: PreTrainedModel, label_smoothing: float = 0.0, caller: nn.Module | None = None) -> None:
    """
    Let calls with `labels` compute the loss in chunks; they return no logits. Other calls stay as they are.

    The loss is `ForCausalLMLoss` of transformers: shifted by one, without -100, divided by `num_items_in_batch`;
    `replaced_loss` puts another in its place.

    Args:
        label_smoothing: the share of each label's weight that goes to the whole vocabulary, 0 to 1.
        caller: the module that is called with the labels, where it is not the base but one around it.
    """
    caller = base if caller is None else caller
    head = base.get_output_embeddings()
    project = head.forward
    is_deferred = False

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal is_deferred
        # The base calls its head before its loss: the head then passes the hidden states on, and `label_loss` runs it.
        is_deferred = kwargs.get("labels") is not None

    def end(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        nonlocal is_deferred
        if is_deferred and output is not None:
            output["logits"] = None  # they are hidden states
        is_deferred = False
        return output

    head.forward = lambda hidden_states: hidden_states if is_deferred else project(hidden_states)
    base.loss_function = _HeadLoss(project, partial(label_loss, label_smoothing=label_smoothing))
    caller.register_forward_pre_hook(begin, with_kwargs=True)
    caller.register_forward_hook(end, always_call=True)  # after an error, too, or the next call would lack its logits


class _HeadLoss:
    """A loss function of transformers' that gets the hidden states which the head passed on, and the head."""

    def __init__(self, project: Project, compute: Callable[..., torch.Tensor]) -> None:
        self.project, self.compute = project, compute

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Return the loss []; `logits` are hidden states, [b, s, h]."""
        return self.compute(logits, labels, self.project, kwargs.get("num_items_in_batch"))


def has_label_loss(base: PreTrainedModel) -> bool:
    """Whether `attach_label_loss` was called on the base."""
    return isinstance(base.loss_function, _HeadLoss)


@contextmanager
def replaced_loss(base: PreTrainedModel, compute: Callable[..., torch.Tensor]) -> Iterator[None]:
    """
    Let a base with `attach_label_loss` compute another loss within this context.

    Args:
        compute: takes hidden states [b, s, h], labels [b, s], the head, and `num_items_in_batch`; returns the loss [].
    """
    before, base.loss_function.compute = base.loss_function.compute, compute
    try:
        yield
    finally:
        base.loss_function.compute = before


@torch.compiler.disable  # a loop over chunks whose number follows the labels; its products need no compiler
def label_loss(
    hidden_states: torch.Tensor,
    labels: torch.Tensor,
    project: Project,
    num_items_in_batch: torch.Tensor | int | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """
    Return the cross-entropy of the next token, [].

    Args:
        hidden_states: [b, s, h], what the head takes.
        labels: [b, s], -100 where there is none; they may have weights (`weigh_labels`), of which it is the mean.
        project: the head, [n, h] -> [n, vocabulary].
        num_items_in_batch: what the sum is divided by; the number of labels, or their weights' sum, where `None`.
        label_smoothing: the share of each label's weight that goes to the whole vocabulary, 0 to 1.
    """
    states, targets = at_labels(hidden_states, labels)
    targets, weights = split_labels(targets)
    if num_items_in_batch is None and weights is not None:
        num_items_in_batch = weights.sum()

    def measure(logits: torch.Tensor, chunk: slice) -> tuple[torch.Tensor, torch.Tensor]:
        own = None if weights is None else weights[chunk, None]
        return _loss_and_gradient(logits, targets[chunk], label_smoothing, own)

    return mean_over_labels(states, project, measure, num_items_in_batch)


def at_labels(hidden_states: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the hidden states [n, h] that predict a token with a label, and the labels [n]."""
    targets = labels[:, 1:]
    is_label = targets != -100
    return hidden_states[:, :-1][is_label], targets[is_label].to(hidden_states.device)


def mean_over_labels(
    states: torch.Tensor, project: Project, measure: Measure, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """
    Return a loss [] that is summed chunk by chunk, divided by a number of labels.

    Args:
        states: [n, h], of the positions that carry loss.
        num_items_in_batch: what the sum is divided by; n where `None`.
    """
    total = _ChunkedLoss.apply(states, project, measure)
    count = len(states) if num_items_in_batch is None else num_items_in_batch
    return total / (count.to(total.device) if isinstance(count, torch.Tensor) else count)


class _ChunkedLoss(torch.autograd.Function):
    """Compute a loss summed over positions, and its gradient, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, hidden_states: torch.Tensor, project: Project, measure: Measure) -> torch.Tensor:
        needs_gradient = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden_states) if needs_gradient else None
        total = torch.zeros((), dtype=torch.float32, device=hidden_states.device)
        for chunk in chunks_of(hidden_states, project):
            with torch.set_grad_enabled(needs_gradient):
                # A graph of its own for each chunk, which is freed with it.
                states = hidden_states[chunk].detach().requires_grad_(needs_gradient)
                logits = project(states)
            loss, logits_gradient = measure(logits.detach(), chunk)
            total += loss
            if needs_gradient:
                (gradient[chunk],) = torch.autograd.grad(logits, states, logits_gradient)
            del logits, logits_gradient  # before the next chunk's are made
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        # The forward pass formed it for a sum whose gradient is 1.
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output.to(gradient.dtype), None, None


def _loss_and_gradient(
    logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float, weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed cross-entropy, and its gradient with respect to the logits, which may overwrite them."""
    # In place throughout, as fetching fresh memory for matrices of this size takes as long as filling them.
    values = logits.float()
    torch.log_softmax(values, dim=-1, out=values)
    targets = targets[:, None]
    weigh = (lambda losses: losses) if weights is None else (lambda losses: losses * weights)
    loss = (label_smoothing - 1) * weigh(values.gather(-1, targets)).sum()
    even = label_smoothing / values.shape[-1]
    if even:
        loss -= even * weigh(values).sum()
    values.exp_()  # the gradient is softmax minus the smoothed labels
    if even:
        values -= even
    values.scatter_add_(-1, targets, values.new_full((1, 1), label_smoothing - 1).expand_as(targets))
    return loss, weigh(values).to(logits.dtype)


def chunks_of(hidden_states: torch.Tensor, project: Project) -> list[slice]:
    """Return the places of chunks that have at most `CHUNK_LOGITS` logits each."""
    # The head is known as a function alone, so its width shows in a call: of no rows, which reads no weights.
    vocabulary = project(hidden_states[:0].detach()).shape[-1]
    size = max(CHUNK_LOGITS // vocabulary, 1)
    return [slice(start, start + size) for start in range(0, len(hidden_states), size)]
