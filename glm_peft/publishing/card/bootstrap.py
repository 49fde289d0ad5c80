"""Compute confidence intervals of mean scores by drawing the examples again (bootstrap)."""

from collections.abc import Mapping, Sequence

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 2000
SEED = 0
FEWEST_EXAMPLES = 2  # of one example nothing can be said


def bootstrap_intervals(
    rows: Sequence[Mapping[str, float]], confidence: float = CONFIDENCE, resamples: int = RESAMPLES, seed: int = SEED
) -> dict[str, tuple[float, float]]:
    """
    Return the percentile interval of the mean of each score, from examples drawn with replacement.

    Every score has the same draws. A score that is no mean over examples, such as a loss over tokens, has no such
    interval. Source: B. Efron, "Bootstrap methods: another look at the jackknife", 1979.

    Args:
        rows: the scores of each example, all with the same names.
        confidence: share of the drawn means that lie within, half of the rest on each side.
        resamples: number of draws of as many examples as there are.
        seed: of the draws; the same gives the same intervals.

    Returns:
        Lower and upper end by the score's name; empty where there are fewer than two examples.
    """
    if len(rows) < FEWEST_EXAMPLES:
        return {}
    names = list(rows[0])
    values = np.array([[float(row[name]) for name in names] for row in rows])
    # The old generator, whose draws NumPy promises to keep: the same folder is to give the same card.
    generator, count = np.random.RandomState(seed), len(rows)
    means = np.array([values[generator.randint(0, count, count)].mean(axis=0) for _ in range(resamples)])
    ends = np.percentile(means, [50 * (1 - confidence), 50 * (1 + confidence)], axis=0)
    return {name: (float(low), float(high)) for name, low, high in zip(names, *ends, strict=True)}
