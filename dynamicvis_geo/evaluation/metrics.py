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

Values equal those of torchmetrics, which :class:`~dynamicvis_geo.LinearProbe` logs, and
of scikit-learn with its usual settings: F1 and Jaccard index with ``average='macro'``
('binary' of two classes), ``accuracy_macro`` as the recall so averaged. So a class
without samples counts 0 in a mean if it was predicted, of multilabel in any case, and
is left out else; so does its average precision, which is left out of multiclass, where
scikit-learn has no value. But R2 of a constant target is NaN, not a number.

A class that the samples have may be missing in a weighting of them. Metrics that are
then not defined are left out of means, and are NaN of binary: a bootstrap would
otherwise take a lack of luck for a lack of skill.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse
import torch
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
    return all_scores(task, truth, predicted, weights)[0]


def all_scores(
    task: str,
    truth: NDArray[np.generic],
    predicted: NDArray[np.floating],
    weights: Floats | None = None,
) -> tuple[dict[str, Floats], dict[str, Floats]]:
    """Compute all metrics of a task, and those of each class.

    Args:
        task: As :func:`scores` takes it, as all others.
        truth: Labels.
        predicted: Probabilities, or values.
        weights: ``[R, n]``, from 0.

    Returns:
        ``[R]`` a metric; and ``[R, C]`` for ``precision``, ``recall``, ``f1``,
        ``average_precision`` and ``jaccard``, none of a regression.
    """
    if weights is None:
        weights = np.ones((1, len(truth)))
    values = predicted.astype(np.float64)
    with np.errstate(divide='ignore', invalid='ignore'):
        if task == 'regression':
            return _regression(truth.astype(np.float64), values, weights), {}
        return _classes(task, truth, values, weights)


def _classes(
    task: str, truth: NDArray[np.generic], values: Floats, weights: Floats
) -> tuple[dict[str, Floats], dict[str, Floats]]:
    several = task == 'multilabel'
    if several:
        actual, chosen = truth.astype(bool), values > 0.5
        hits, confidence = actual.ravel().astype(float), values.ravel()
    else:
        names = np.arange(values.shape[1])
        actual = truth[:, None] == names
        chosen = values.argmax(1)[:, None] == names
        hits, confidence = (actual & chosen).any(1).astype(float), values.max(1)
    right, positive, claimed = (
        weights @ part.astype(float) for part in (actual & chosen, actual, chosen)
    )
    each = {
        'precision': right / claimed,
        'recall': right / positive,
        'f1': 2 * right / (positive + claimed),
        'average_precision': np.stack(
            [
                _average_precision(*columns, weights)
                for columns in zip(actual.T, values.T, strict=True)
            ],
            axis=1,
        ),
        'jaccard': right / (positive + claimed - right),
    }
    # Called, but never right; there, but never found: 0, as in the libraries.
    each['recall'][(claimed > 0) & ~actual.any(0)] = 0
    each['precision'][(positive > 0) & ~chosen.any(0)] = 0
    if task != 'multiclass':
        never = ~(actual | chosen).any(0)
        each['f1'][:, never] = each['jaccard'][:, never] = 0
        each['average_precision'][:, ~actual.any(0)] = 0
    total = weights.sum(1)
    if several:
        agree = (weights @ (actual == chosen).astype(float)).mean(1)
        accuracy = {'accuracy_micro': agree / total}
        weights = np.repeat(weights, values.shape[1], axis=1)
    else:
        accuracy = {
            'accuracy_micro': right.sum(1) / total,
            'accuracy_macro': _mean(each['recall']),
        }
    overall = {
        **accuracy,
        **{
            name: each[name][:, 1] if task == 'binary' else _mean(each[name])
            for name in ('f1', 'average_precision', 'jaccard')
        },
        'calibration_error': _calibration_error(confidence, hits, weights),
    }
    return overall, each


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


def _mean(values: Floats) -> Floats:
    """Mean over the classes for which a metric is defined."""
    mean: Floats = np.nansum(values, axis=1) / np.isfinite(values).sum(1)
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
    # The edges of torchmetrics, to the last bit; certainty (1) has a bin of its own.
    edges = torch.linspace(0, 1, _BINS + 1, dtype=torch.float32).numpy()
    bins = np.digitize(confidence.astype(np.float32), edges) - 1
    gap = scipy.sparse.csr_array(
        (hits - confidence, (np.arange(len(bins)), bins)), shape=(len(bins), _BINS + 1)
    )
    error: Floats = np.abs(weights @ gap).sum(1) / weights.sum(1)
    return error
