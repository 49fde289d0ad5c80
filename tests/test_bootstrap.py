"""The interval of a mean score."""

import random
import statistics

import numpy as np
import pytest

from glm_peft.publishing.card.bootstrap import bootstrap_intervals


def rows_of(values: list[float]) -> list[dict[str, float]]:
    return [{"score": value} for value in values]


def test_the_interval_is_that_of_means_drawn_one_by_one():
    values = [random.Random(1).gauss(30, 10) for _ in range(37)]
    generator = np.random.RandomState(5)
    means = [statistics.fmean(values[row] for row in generator.randint(0, 37, 37)) for _ in range(400)]
    (low, high) = bootstrap_intervals(rows_of(values), resamples=400, seed=5)["score"]
    assert (low, high) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])))


def test_the_interval_is_near_the_normal_one_where_there_are_many_rows():
    generator = random.Random(2)
    values = [generator.gauss(50, 8) for _ in range(900)]
    mean, error = statistics.fmean(values), statistics.stdev(values) / 30
    (low, high) = bootstrap_intervals(rows_of(values))["score"]
    assert low == pytest.approx(mean - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.15 * error)


def test_some_95_of_100_intervals_hold_the_mean_of_what_was_drawn_from():
    generator = random.Random(3)
    samples = [[generator.expovariate(0.1) for _ in range(60)] for _ in range(300)]
    spans = [bootstrap_intervals(rows_of(sample), resamples=300)["score"] for sample in samples]
    held = sum(low <= 10 <= high for low, high in spans)
    assert 0.90 <= held / 300 <= 0.98  # a little below 95 % where values are skewed and rows few


def test_the_wider_the_confidence_the_wider_the_interval():
    rows = rows_of([float(value) for value in range(20)])
    (low, high), (lower, higher) = (bootstrap_intervals(rows, share)["score"] for share in (0.5, 0.99))
    assert lower < low < 9.5 < high < higher


def test_the_same_seed_gives_the_same_interval_and_every_score_has_the_same_draws():
    rows = [{"a": float(value), "b": 2.0 * value} for value in range(12)]
    first, second = bootstrap_intervals(rows), bootstrap_intervals(rows)
    assert first == second != bootstrap_intervals(rows, seed=1)
    assert first["b"] == pytest.approx([2 * end for end in first["a"]])


@pytest.mark.parametrize("rows", [[], [{"score": 1.0}]])
def test_of_one_example_nothing_is_said(rows):
    assert bootstrap_intervals(rows) == {}
