"""
Compute the loss of direct preference optimization (arXiv 2305.18290) without the [tokens, vocabulary] matrix.

Rows are pairs of answers to one prompt, by turns the one that is preferred and the other.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import logsigmoid

from glm_peft.adapters.label_loss import Project, label_loss


def answer_log_probs(hidden_states: torch.Tensor, labels: torch.Tensor, project: Project, *_: Any) -> torch.Tensor:
    """
    Return the log-probability of each row's labels together, [b]; a function for `replaced_loss`.

    Args:
        hidden_states: [b, s, h], what the head takes.
        labels: [b, s], -100 where there is none.
        project: the head, [n, h] -> [n, vocabulary].
    """
    rows = zip(hidden_states.split(1), labels.split(1), strict=True)
    return -torch.stack([label_loss(states, own, project, num_items_in_batch=1) for states, own in rows])


def preference_loss(
    reference: torch.Tensor, beta: float, note: Callable[[torch.Tensor], None]
) -> Callable[..., torch.Tensor]:
    """
    Return the loss, for `replaced_loss`: -log sigmoid of the difference between the rewards of a pair's answers.

    A reward is `beta` times the log-ratio of an answer's probabilities by the model and by the reference.

    Args:
        reference: log-probabilities of the answers, [2 b].
        note: takes the rewards [b, 2] of the pairs that have labels.
    """

    def compute(
        hidden_states: torch.Tensor,
        labels: torch.Tensor,
        project: Project,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        rewards = beta * (answer_log_probs(hidden_states, labels, project) - reference).view(-1, 2)
        # A process without an example of its own takes part with pairs that have no labels.
        rewards = rewards[(labels != -100).any(dim=1).view(-1, 2).all(dim=1).to(rewards.device)]
        note(rewards.detach())
        chosen, rejected = rewards.unbind(dim=1)
        count = len(rewards) if num_items_in_batch is None else num_items_in_batch
        return -logsigmoid(chosen - rejected).sum() / count

    return compute
