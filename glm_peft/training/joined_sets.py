"""Compute loss, rewards and scores of several datasets for evaluation together, where they are parts of one."""

from collections.abc import Callable, Mapping

import numpy as np

from glm_peft.arguments.splits import VALIDATION
from glm_peft.errors import UserError

Scorer = Callable[[], dict[str, float]]


class JoinedSets:
    """
    Losses of the sets of an evaluation, with the rewards of pairs of answers, and what they make together.

    Args:
        score_answers: that of `validation` scores what the others generated.
    """

    def __init__(self, score_answers: Mapping[str, Scorer | None]) -> None:
        self.score_answers = score_answers.get(VALIDATION)
        self._means: dict[str, tuple[int, Mapping[str, float]]] = {}

    def add(self, name: str, rows: int, means: Mapping[str, float]) -> None:
        """Note the means of a set over so many rows, such as its loss."""
        self._means[name] = rows, means

    def score(self) -> dict[str, float]:
        """Return means and scores of all sets together, as an evaluation names them."""
        rows, means = zip(*self._means.values(), strict=True)
        # By rows, as the Trainer's own mean weighs its batches.
        scores = {name: float(np.average([each[name] for each in means], weights=rows)) for name in means[0]}
        scores |= self.score_answers() if self.score_answers else {}
        return {f"eval_{name}": score for name, score in scores.items()}


def check_best_metric(wanted: str | None, metrics: Mapping[str, float]) -> None:
    """Raise a `UserError` where the best model is chosen by a metric that the evaluation does not have."""
    # The Trainer raises a KeyError, with a traceback.
    names = [name.removeprefix("eval_") for name in metrics]
    if wanted and wanted.removeprefix("eval_") not in names:
        raise UserError(
            f"--metric_for_best_model {wanted} is no score of this evaluation: give one of {', '.join(names)}."
        )
