"""The divergence from a teacher against torch's own over the full vocabulary."""

import pytest
import torch

from glm_peft.adapters import label_loss
from glm_peft.adapters.divergence_loss import compare_all, compare_likeliest, divergence_from, take_likeliest

VOCABULARY, K = 50, 4


def fold(log_probs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Put all but the tokens `ids` into one, by probabilities."""
    own = log_probs.gather(-1, ids).exp()
    return torch.cat([own, 1 - own.sum(-1, keepdim=True)], dim=-1).log()


class Known:
    """A teacher of known logits."""

    def __init__(self, logits: torch.Tensor, k: int) -> None:
        self.logits, self.k = logits, k

    def measure(self, rows, project):
        if not self.k:
            return lambda logits, chunk: compare_all(logits, self.logits[rows[chunk]])
        return lambda logits, chunk: compare_likeliest(logits, *take_likeliest(self.logits[rows[chunk]], self.k))


@pytest.mark.parametrize("k", [0, K])
def test_loss_and_gradient_are_those_of_full_distributions_whatever_the_chunks(k, monkeypatch):
    monkeypatch.setattr(label_loss, "CHUNK_LOGITS", 3 * VOCABULARY)
    torch.manual_seed(0)
    teacher = torch.randn(9, VOCABULARY).double()
    hidden = torch.randn(2, 8, 6, dtype=torch.float64, requires_grad=True)
    head = torch.nn.Linear(6, VOCABULARY, bias=False).double()
    labels = torch.full((2, 8), -100)
    labels[0, 2:6], labels[1, 3:8] = torch.tensor([3, 1, 0, 2]), torch.tensor([4, 5, 6, 7, 8])

    loss = divergence_from(Known(teacher, k))(hidden, labels, head)
    (gradient,) = torch.autograd.grad(loss, hidden)

    own = head(hidden[:, :-1][labels[:, 1:] != -100]).log_softmax(-1)
    of_teacher = teacher.log_softmax(-1)[[3, 1, 0, 2, 4, 5, 6, 7, 8]]
    if k:
        ids = of_teacher.topk(k).indices
        own, of_teacher = fold(own, ids), fold(of_teacher, ids)
    expected = torch.nn.functional.kl_div(own, of_teacher, log_target=True, reduction="batchmean")
    (expected_gradient,) = torch.autograd.grad(expected, hidden)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6, check_dtype=False)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6, check_dtype=False)


@pytest.mark.parametrize("sharpness", [1.0, 300.0])  # the others together may have no probability at all
def test_a_model_that_is_its_teacher_has_no_divergence_and_no_gradient(sharpness):
    logits = sharpness * torch.randn(5, VOCABULARY, generator=torch.Generator().manual_seed(1))
    loss, gradient = compare_likeliest(logits, *take_likeliest(logits, K))
    assert abs(loss) < 1e-6 and gradient.abs().max() < 1e-6


def test_a_model_that_is_certain_of_what_its_teacher_excludes_has_a_finite_gradient():
    of_teacher, logits = torch.zeros(1, VOCABULARY), torch.zeros(1, VOCABULARY)
    of_teacher[0, :K], logits[0, :K] = 1.0, 500.0
    loss, gradient = compare_likeliest(logits, *take_likeliest(of_teacher, K))
    assert loss.isfinite() and gradient.isfinite().all() and loss > 100
