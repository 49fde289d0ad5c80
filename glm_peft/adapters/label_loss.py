"""
Compute the loss of a causal language model without the [tokens, vocabulary] matrix.

Logits are computed only where there is a label, a chunk at a time; each chunk's gradient with respect to its hidden
states is computed in the forward pass, so that no chunk is kept or recomputed. The head must be frozen: its own
gradient is not computed.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

CHUNK_LOGITS = 1 << 25  # logits in a chunk: 128 MiB in float32, whatever the vocabulary


def attach_label_loss(base: PreTrainedModel, label_smoothing: float = 0.0, caller: nn.Module | None = None) -> None:
    """
    Let calls with `labels` compute the loss in chunks; they return no logits. Other calls stay as they are.

    The loss is `ForCausalLMLoss` of transformers: shifted by one, without -100, divided by `num_items_in_batch`.

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

    def loss_function(logits: torch.Tensor, labels: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Return the loss; `logits` are the hidden states that the head passed on, [b, s, h]."""
        return label_loss(logits, labels, project, kwargs.get("num_items_in_batch"), label_smoothing)

    head.forward = lambda hidden_states: hidden_states if is_deferred else project(hidden_states)
    base.loss_function = loss_function
    caller.register_forward_pre_hook(begin, with_kwargs=True)
    caller.register_forward_hook(end, always_call=True)  # after an error, too, or the next call would lack its logits


def has_label_loss(base: PreTrainedModel) -> bool:
    """Whether `attach_label_loss` was called on the base."""
    return getattr(base.loss_function, "__module__", None) == __name__


@torch.compiler.disable  # a loop over chunks whose number follows the labels; its products need no compiler
def label_loss(
    hidden_states: torch.Tensor,
    labels: torch.Tensor,
    project: Callable[[torch.Tensor], torch.Tensor],
    num_items_in_batch: torch.Tensor | int | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """
    Return the cross-entropy of the next token, [].

    Args:
        hidden_states: [b, s, h], what the head takes.
        labels: [b, s], -100 where there is none.
        project: the head, [n, h] -> [n, vocabulary].
        num_items_in_batch: what the sum is divided by; the number of labels where `None`.
        label_smoothing: the share of each label's weight that goes to the whole vocabulary, 0 to 1.
    """
    targets = labels[:, 1:]
    is_label = targets != -100
    targets = targets[is_label].to(hidden_states.device)
    total = _ChunkedCrossEntropy.apply(hidden_states[:, :-1][is_label], targets, project, label_smoothing)
    count = len(targets) if num_items_in_batch is None else num_items_in_batch
    return total / (count.to(total.device) if isinstance(count, torch.Tensor) else count)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Compute the summed cross-entropy in float32, and its gradient, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: torch.Tensor,
        targets: torch.Tensor,
        project: Callable[[torch.Tensor], torch.Tensor],
        label_smoothing: float,
    ) -> torch.Tensor:
        needs_gradient = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden_states) if needs_gradient else None
        total = torch.zeros((), dtype=torch.float32, device=hidden_states.device)
        for chunk in _chunks(hidden_states, project):
            with torch.set_grad_enabled(needs_gradient):
                # A graph of its own for each chunk, which is freed with it.
                states = hidden_states[chunk].detach().requires_grad_(needs_gradient)
                logits = project(states)
            loss, logits_gradient = _loss_and_gradient(logits.detach(), targets[chunk], label_smoothing)
            total += loss
            if needs_gradient:
                (gradient[chunk],) = torch.autograd.grad(logits, states, logits_gradient)
            del logits, logits_gradient  # before the next chunk's are made
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        # The forward pass formed it for a sum whose gradient is 1.
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output.to(gradient.dtype), None, None, None


def _loss_and_gradient(
    logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed cross-entropy, and its gradient with respect to the logits, which may overwrite them."""
    # In place throughout, as fetching fresh memory for matrices of this size takes as long as filling them.
    values = logits.float()
    torch.log_softmax(values, dim=-1, out=values)
    targets = targets[:, None]
    loss = (label_smoothing - 1) * values.gather(-1, targets).sum()
    even = label_smoothing / values.shape[-1]
    if even:
        loss -= even * values.sum()
    values.exp_()  # the gradient is softmax minus the smoothed labels
    if even:
        values -= even
    values.scatter_add_(-1, targets, values.new_full((1, 1), label_smoothing - 1).expand_as(targets))
    return loss, values.to(logits.dtype)


def _chunks(hidden_states: torch.Tensor, project: Callable[[torch.Tensor], torch.Tensor]) -> list[slice]:
    # The head is known as a function alone, so its width shows in a call.
    vocabulary = project(hidden_states[:1].detach()).shape[-1] if len(hidden_states) else 1
    size = max(CHUNK_LOGITS // vocabulary, 1)
    return [slice(start, start + size) for start in range(0, len(hidden_states), size)]
