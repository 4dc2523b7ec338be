"""Intervals of metrics: their scatter over other draws of the test split."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm, t

from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.evaluation.metrics import all_scores

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
    return draw_scores(
        task, truth, predicted, resamples, seed, level, groups
    ).intervals()


class Draws(NamedTuple):
    """Metrics of the test split, and after it of each draw of its groups.

    Attributes:
        overall: ``[1 + R]`` a metric.
        each: ``[1 + R, C]`` a metric of single classes.
        tail: Share of the draws beyond either end of an interval; NaN if there is none.
    """

    overall: dict[str, NDArray[np.float64]]
    each: dict[str, NDArray[np.float64]]
    tail: float

    def intervals(self) -> dict[str, Interval]:
        """Return the interval of each metric."""
        return {n: _interval(values, self.tail) for n, values in self.overall.items()}

    def intervals_by_class(self) -> dict[str, list[Interval]]:
        """Return the intervals of each metric of single classes, one a class."""
        return {
            name: [_interval(values, self.tail) for values in columns.T]
            for name, columns in self.each.items()
        }

    def less(self, other: Draws) -> dict[str, Interval]:
        """Return the interval of each metric less that of another method, paired.

        Both are scored on the same draws, so that what is hard for both does not widen
        the interval of their difference.

        Args:
            other: Of the same test split, groups, number of draws and seed.

        Returns:
            Differences; a draw for which either is not defined is left out.
        """
        return {
            name: _interval(values - other.overall[name], self.tail)
            for name, values in self.overall.items()
        }


def draw_scores(
    task: str,
    truth: NDArray[np.generic],
    predicted: NDArray[np.floating],
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    groups: ArrayLike | None = None,
) -> Draws:
    """Compute all metrics, and those of each class, of the test split and its draws.

    Args:
        task: As :func:`bootstrap` takes it, as all others.
        truth: Labels.
        predicted: Probabilities, or values.
        resamples: Number of draws.
        seed: Of the draws.
        level: Confidence.
        groups: Group of each sample.

    Returns:
        The metrics of :func:`~dynamicvis_geo.evaluation.metrics.all_scores`.

    Raises:
        SpecError: As :func:`bootstrap`.
    """
    check_resamples(resamples)
    if not 0 < level < 1:
        raise SpecError(f'level={level!r} must lie within 0 and 1')
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
    parts = [all_scores(task, truth, predicted)]
    width = len(truth) * (predicted.shape[1] if task == 'multilabel' else 1)
    step = max(1, _CHUNK // width)
    for start in range(0, resamples, step):
        draws = np.stack(
            [
                np.bincount(rng.integers(0, count, count), minlength=count)
                for _ in range(min(step, resamples - start))
            ]
        ).astype(np.float64)
        parts.append(all_scores(task, truth, predicted, draws[:, member]))
    overall, each = (
        {
            name: np.concatenate([part[i][name] for part in parts])
            for name in parts[0][i]
        }
        for i in (0, 1)
    )
    return Draws(overall, each, tail)


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


def _interval(values: NDArray[np.float64], tail: float) -> Interval:
    """Make the interval of the first value from all others."""
    drawn = values[1:][np.isfinite(values[1:])]
    if not len(drawn) or np.isnan(tail):
        return Interval(float(values[0]), np.nan, np.nan)
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Interval(float(values[0]), float(low), float(high))
