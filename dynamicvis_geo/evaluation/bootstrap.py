"""Intervals of metrics: their scatter over other draws of the test split."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm, t

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
    groups: ArrayLike | None = None,
) -> dict[str, Interval]:
    """Compute all metrics with percentile intervals (Efron 1979).

    Whole groups of test samples are drawn with replacement, as many as there are: the
    samples of one block of land, or of one place, are alike, and say less than as many
    from elsewhere. For few groups, the percentiles lie further out, by the quantiles of
    Student's t (Hesterberg 2015, "expanded percentile interval"). The intervals tell
    how much a metric depends on which groups are in the test split; not how it depends
    on the training split, nor on places that are unlike all of these.

    Args:
        task: 'binary', 'multiclass', 'multilabel' or 'regression'.
        truth: As :func:`~dynamicvis_geo.evaluation.metrics.scores` takes it.
        predicted: As there.
        resamples: Number of draws; 0 gives intervals of NaN.
        seed: The same seed gives the same intervals, and the same draws for all methods
            on one test split.
        level: Confidence.
        groups: Group of each sample, ``[n]``; None takes each for itself.

    Returns:
        Value, low and high of each metric. Draws for which a metric is not defined
        (none of the samples drawn is positive) are left out of its interval. Of a
        single group there is no interval.

    Raises:
        SpecError: If a number is out of range, or the groups are not one a sample.
    """
    check_resamples(resamples)
    if not 0 < level < 1:
        raise SpecError(f'level={level!r} must lie within 0 and 1')
    exact = scores(task, truth, predicted)
    if groups is None:
        groups = np.arange(len(truth))
    elif np.shape(groups) != (len(truth),):
        raise SpecError(
            f'groups of shape {np.shape(groups)} are not one for each of {len(truth)} '
            'test samples'
        )
    names, member = np.unique(groups, return_inverse=True)
    count = len(names)
    tail = _tail(level, count)
    rng = np.random.default_rng(seed)
    drawn: dict[str, list[NDArray[np.float64]]] = {name: [] for name in exact}
    width = len(truth) * (predicted.shape[1] if task == 'multilabel' else 1)
    step = max(1, _CHUNK // width)
    for start in range(0, resamples, step):
        draws = np.stack(
            [
                np.bincount(rng.integers(0, count, count), minlength=count)
                for _ in range(min(step, resamples - start))
            ]
        ).astype(np.float64)
        for name, values in scores(task, truth, predicted, draws[:, member]).items():
            drawn[name].append(values)
    intervals = {}
    for name, values in exact.items():
        low, high = _percentiles(drawn[name], tail)
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


def _tail(level: float, count: int) -> float:
    """Share of the draws beyond either end of an interval; NaN of a single group."""
    if count < 2:
        return np.nan
    ends = t.ppf((1 - level) / 2, count - 1) * np.sqrt(count / (count - 1))
    return float(norm.cdf(ends))


def _percentiles(parts: list[NDArray[np.float64]], tail: float) -> tuple[float, float]:
    values = np.concatenate(parts) if parts else np.empty(0)
    values = values[np.isfinite(values)]
    if not len(values) or np.isnan(tail):
        return np.nan, np.nan
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)
