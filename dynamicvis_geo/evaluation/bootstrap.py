"""Intervals of metrics: their scatter over other draws of the test split."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.evaluation.metrics import scores

#: Numbers in the weights that are held at a time.
_CHUNK = 2**22


class Interval(NamedTuple):
    """A metric of the test split, and the interval around it; NaN where not defined."""

    value: float
    low: float
    high: float


def bootstrap(
    task: str,
    truth: NDArray[np.generic],
    predicted: NDArray[np.floating],
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Interval]:
    """Compute all metrics with percentile intervals (Efron 1979).

    Test samples are drawn with replacement, as many as there are. The intervals tell
    how much a metric depends on which samples are in the test split; not how it depends
    on the training split, nor on places without samples. Samples that lie close to each
    other are alike, which makes the intervals too narrow.

    Args:
        task: 'binary', 'multiclass', 'multilabel' or 'regression'.
        truth: As :func:`~dynamicvis_geo.evaluation.metrics.scores` takes it.
        predicted: As there.
        resamples: Number of draws; 0 gives intervals of NaN.
        seed: The same seed gives the same intervals, and the same draws for all methods
            on one test split.
        level: Share of the draws inside the interval.

    Returns:
        Value, low and high of each metric. Draws for which a metric is not defined
        (none of the samples drawn is positive) are left out of its interval.

    Raises:
        SpecError: If a number is out of range.
    """
    check_resamples(resamples)
    if not 0 < level < 1:
        raise SpecError(f'level={level!r} must lie within 0 and 1')
    exact = scores(task, truth, predicted)
    count = len(truth)
    rng = np.random.default_rng(seed)
    drawn: dict[str, list[NDArray[np.float64]]] = {name: [] for name in exact}
    width = count * (predicted.shape[1] if task == 'multilabel' else 1)
    step = max(1, _CHUNK // width)
    for start in range(0, resamples, step):
        weights = np.stack(
            [
                np.bincount(rng.integers(0, count, count), minlength=count)
                for _ in range(min(step, resamples - start))
            ]
        ).astype(np.float64)
        for name, values in scores(task, truth, predicted, weights).items():
            drawn[name].append(values)
    intervals = {}
    for name, values in exact.items():
        low, high = _percentiles(drawn[name], level)
        intervals[name] = Interval(float(values[0]), low, high)
    return intervals


def check_resamples(resamples: int) -> None:
    """Refuse a number of draws that there cannot be.

    Args:
        resamples: As :func:`bootstrap` takes it.

    Raises:
        SpecError: If it is less than 0.
    """
    if resamples < 0:
        raise SpecError(f'resamples={resamples!r} must be 0 or more')


def _percentiles(parts: list[NDArray[np.float64]], level: float) -> tuple[float, float]:
    values = np.concatenate(parts) if parts else np.empty(0)
    values = values[np.isfinite(values)]
    if not len(values):
        return np.nan, np.nan
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
