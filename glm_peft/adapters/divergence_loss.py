"""
Compute how far a model's next-token distributions are from a teacher's, without the [tokens, vocabulary] matrix.

The labels of a batch are not tokens but numbers of rows in the teacher's values, so that batches are padded, packed,
counted and shared among processes as those of ordinary training.
"""

from collections.abc import Callable
from typing import Protocol

import torch

from glm_peft.adapters.label_loss import Measure, Project, at_labels, mean_over_labels


class Teacher(Protocol):
    """What is known of a teacher's distributions."""

    def measure(self, rows: torch.Tensor, project: Project) -> Measure:
        """Return the function that compares logits with the teacher's distributions `rows` [n]."""


def divergence_from(teacher: Teacher) -> Callable[..., torch.Tensor]:
    """Return the loss, for `replaced_loss`: the Kullback-Leibler divergence of the model from its teacher, in nats."""

    @torch.compiler.disable  # a loop over chunks whose number follows the labels
    def compute(
        hidden_states: torch.Tensor,
        labels: torch.Tensor,
        project: Project,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        states, rows = at_labels(hidden_states, labels)
        return mean_over_labels(states, project, teacher.measure(rows, project), num_items_in_batch)

    return compute


def take_likeliest(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return the k likeliest tokens [n, k], and their log-probabilities with that of all others together [n, k + 1].

    Args:
        logits: [n, vocabulary].
        k: below the size of the vocabulary.
    """
    values = torch.log_softmax(logits.float(), dim=-1)
    own, ids = values.topk(k, dim=-1)
    others = values.scatter_(-1, ids, -torch.inf).logsumexp(dim=-1, keepdim=True)
    return ids, torch.cat([own, others], dim=-1)


def compare_likeliest(
    logits: torch.Tensor, ids: torch.Tensor, log_probs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return the summed divergence [] where all but the likeliest tokens are one, and its gradient [n, vocabulary].

    Args:
        logits: of the model, [n, vocabulary].
        ids, log_probs: of the teacher, as `take_likeliest` returns them.
    """
    values = torch.log_softmax(logits.float(), dim=-1)
    own = values.gather(-1, ids)
    others = values.scatter_(-1, ids, -torch.inf).logsumexp(dim=-1, keepdim=True)
    student = torch.cat([own, others], dim=-1)
    probs = log_probs.exp()
    loss = (probs * (log_probs - student)).sum()
    # Of a likely token: q - p. Of the others: q - P q / Q, with P and Q what teacher and model give them together; by
    # logarithms, as P / Q may be too large for a number.
    gradient = values.exp() - (values + log_probs[:, -1:] - others).exp()
    gradient.scatter_(-1, ids, own.exp() - probs[:, :-1])
    return loss, gradient.to(logits.dtype)


def compare_all(logits: torch.Tensor, of_teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed divergence [] over all tokens, and its gradient; both logits are [n, vocabulary]."""
    student, teacher = (torch.log_softmax(values.float(), dim=-1) for values in (logits, of_teacher))
    probs = teacher.exp()
    loss = (probs * (teacher - student)).sum()
    return loss, (student.exp_() - probs).to(logits.dtype)
