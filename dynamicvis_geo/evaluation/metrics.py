"""Metrics of predictions, for many weightings of the samples at once.

A bootstrap weighs each sample by how often it was drawn: with all weightings in one
array, a thousand resamples cost a few matrix products, where a library that takes one
at a time needs minutes.

=============================== ======================================================
``accuracy_micro``              share of right samples; multilabel: of right decisions
``accuracy_macro``              mean over classes of the share of right samples; not of
                                multilabel
``f1``, ``average_precision``,  mean over classes; of binary, of the second class alone
``jaccard``
``calibration_error``           expected calibration error (Guo et al. 2017): of the
                                winning class, multilabel: of each decision, 15 bins
``r2``, ``mae``, ``rmse``       coefficient of determination; errors in the unit of the
                                target
=============================== ======================================================

Where every class has samples, values equal those of scikit-learn with
``sample_weight`` up to rounding; the calibration error equals that of torchmetrics,
but that there certainty (1) has a bin of its own. Where a class has no sample in a
weighting, means over classes leave it out, also if it was predicted, for which
scikit-learn's F1 and Jaccard index count a 0. Values that are not defined (R2 of a
constant target, F1 where nothing is or is called positive, average precision without
positives) are NaN, where scikit-learn gives a number.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

Floats = NDArray[np.float64]

#: Metric by which hyper-parameters are chosen on the validation split.
CHOSEN_BY = {
    'binary': 'accuracy_micro',
    'multiclass': 'accuracy_micro',
    'multilabel': 'average_precision',
    'regression': 'r2',
}

_BINS = 15


def scores(
    task: str,
    truth: NDArray[np.generic],
    predicted: NDArray[np.floating],
    weights: Floats | None = None,
) -> dict[str, Floats]:
    """Compute all metrics of a task.

    Args:
        task: 'binary', 'multiclass', 'multilabel' or 'regression'.
        truth: Class numbers ``[n]``; 0 and 1 ``[n, C]`` for multilabel; values ``[n]``
            for regression.
        predicted: Probabilities ``[n, C]``; values ``[n]`` for regression.
        weights: ``[R, n]``, from 0; None weighs all samples alike, once.

    Returns:
        ``[R]`` a metric.
    """
    if weights is None:
        weights = np.ones((1, len(truth)))
    values = predicted.astype(np.float64)
    with np.errstate(divide='ignore', invalid='ignore'):
        if task == 'regression':
            return _regression(truth.astype(np.float64), values, weights)
        if task == 'multilabel':
            return _multilabel(truth.astype(bool), values, weights)
        return _classes(task == 'binary', truth.astype(np.int64), values, weights)


def _classes(
    binary: bool, truth: NDArray[np.int64], values: Floats, weights: Floats
) -> dict[str, Floats]:
    count, classes = values.shape
    chosen = values.argmax(1)
    pairs = scipy.sparse.csr_array(
        (np.ones(count), (np.arange(count), truth * classes + chosen)),
        shape=(count, classes**2),
    )
    matrix = (weights @ pairs).reshape(-1, classes, classes)
    right = np.diagonal(matrix, axis1=1, axis2=2)
    actual, claimed = matrix.sum(2), matrix.sum(1)
    hits = (chosen == truth).astype(np.float64)
    present = actual > 0
    precision = np.stack(
        [_average_precision(truth == c, values[:, c], weights) for c in range(classes)],
        axis=1,
    )
    each = {
        'f1': 2 * right / (actual + claimed),
        'average_precision': precision,
        'jaccard': right / (actual + claimed - right),
    }
    return {
        'accuracy_micro': right.sum(1) / actual.sum(1),
        'accuracy_macro': _mean(right / actual, present),
        **{
            name: value[:, 1] if binary else _mean(value, present)
            for name, value in each.items()
        },
        'calibration_error': _calibration_error(values.max(1), hits, weights),
    }


def _multilabel(
    truth: NDArray[np.bool_], values: Floats, weights: Floats
) -> dict[str, Floats]:
    chosen = values > 0.5
    right = weights @ (truth & chosen)
    actual, claimed = weights @ truth, weights @ chosen
    present = actual > 0
    classes = truth.shape[1]
    precision = np.stack(
        [
            _average_precision(truth[:, c], values[:, c], weights)
            for c in range(classes)
        ],
        axis=1,
    )
    agree = (weights @ (truth == chosen)).sum(1)
    return {
        'accuracy_micro': agree / (classes * weights.sum(1)),
        'f1': _mean(2 * right / (actual + claimed), present),
        'average_precision': _mean(precision, present),
        'jaccard': _mean(right / (actual + claimed - right), present),
        'calibration_error': _calibration_error(
            values.ravel(), truth.ravel().astype(float), np.repeat(weights, classes, 1)
        ),
    }


def _regression(truth: Floats, values: Floats, weights: Floats) -> dict[str, Floats]:
    total = weights.sum(1)
    # About the plain mean first: no digits are lost where values are large.
    centred = truth - truth.mean()
    mean = weights @ centred / total
    spread = weights @ centred**2 / total - mean**2
    spread = np.where(spread > 1e-12 * (weights @ centred**2 / total), spread, 0)
    squares = weights @ (truth - values) ** 2 / total
    return {
        'r2': np.where(spread > 0, 1 - squares / spread, np.nan),
        'mae': weights @ np.abs(truth - values) / total,
        'rmse': np.sqrt(squares),
    }


def _mean(values: Floats, present: NDArray[np.bool_]) -> Floats:
    mean: Floats = np.where(present, values, 0).sum(1) / present.sum(1)
    return mean


def _average_precision(
    truth: NDArray[np.bool_], values: Floats, weights: Floats
) -> Floats:
    """Sum precision over the steps of recall, thresholds from high to low."""
    order = np.argsort(-values, kind='stable')
    # Samples of one value enter together: only the last of them is a threshold.
    ends = np.flatnonzero(np.append(np.diff(values[order]) != 0, True))
    drawn = np.cumsum(weights[:, order], axis=1)[:, ends]
    right = np.cumsum(weights[:, order] * truth[order], axis=1)[:, ends]
    precision = np.where(drawn > 0, right / drawn, 0)
    steps = np.diff(right, axis=1, prepend=0)
    precise: Floats = (steps * precision).sum(1) / right[:, -1]
    return precise


def _calibration_error(confidence: Floats, hits: Floats, weights: Floats) -> Floats:
    bins = np.minimum((confidence * _BINS).astype(np.int64), _BINS - 1)
    gap = scipy.sparse.csr_array(
        (hits - confidence, (np.arange(len(bins)), bins)), shape=(len(bins), _BINS)
    )
    error: Floats = np.abs(weights @ gap).sum(1) / weights.sum(1)
    return error
