"""Probabilities, loss and metrics of the scores of a probe, by its task."""

from typing import Any

import torch.nn.functional as F
import torchmetrics.classification as tm
from torch import Tensor
from torchmetrics import (
    MeanAbsoluteError,
    MeanSquaredError,
    Metric,
    MetricCollection,
    R2Score,
)

#: Label of what counts nowhere in the metrics.
IGNORED = -1


def activated(task: str, scores: Tensor) -> Tensor:
    """Turn scores ``[n, C, ...]`` into probabilities, or values ``[n, ...]``."""
    if task == 'regression':
        return scores.squeeze(1)
    return scores.sigmoid() if task == 'multilabel' else scores.softmax(1)


def probe_loss(
    task: str, scores: Tensor, labels: Tensor, class_weight: Tensor
) -> Tensor:
    """Mean loss of scores ``[n, C]``: squared error, or cross entropy.

    Args:
        task: 'binary', 'multiclass', 'multilabel' or 'regression'.
        scores: Of each class, before the activation; or standardised values ``[n, 1]``.
        labels: int64 ``[n]``; of multilabel 0 and 1, float32 ``[n, C]``; standardised
            values float32 ``[n]`` of a regression.
        class_weight: Weight of each class ``[C]``; of multilabel, of its positives.
    """
    if task == 'regression':
        return F.mse_loss(scores.squeeze(1), labels)
    if task == 'multilabel':
        return F.binary_cross_entropy_with_logits(
            scores, labels, pos_weight=class_weight
        )
    return F.cross_entropy(scores, labels, class_weight)


def probe_metrics(task: str, classes: int) -> MetricCollection:
    """Return the metrics that take probabilities ``[n, C]``, or values, and labels.

    Accuracy, micro (share of right samples) and macro (mean over classes); F1, average
    precision and Jaccard index, means over classes, of binary one value a class; the
    expected calibration error of the winning class in 15 bins. Of multilabel every
    sample and class is a decision, at 0.5: accuracy and calibration error are those of
    all decisions.

    Args:
        task: 'binary', 'multiclass', 'multilabel' or 'regression'.
        classes: Number of classes, 2 for binary.

    Returns:
        Metrics under the names of :mod:`~dynamicvis_geo.evaluation.metrics`.
    """
    metrics: dict[str, Metric | MetricCollection]
    ignored: Any = {'ignore_index': IGNORED}
    if task == 'regression':
        metrics = {
            'r2': R2Score(),
            'mae': MeanAbsoluteError(),
            'rmse': MeanSquaredError(squared=False),
        }
    elif task == 'multilabel':
        metrics = {
            'accuracy_micro': tm.MultilabelAccuracy(
                classes, average='micro', **ignored
            ),
            'f1': tm.MultilabelF1Score(classes, **ignored),
            'average_precision': tm.MultilabelAveragePrecision(classes, **ignored),
            'jaccard': tm.MultilabelJaccardIndex(classes, **ignored),
            'calibration_error': tm.BinaryCalibrationError(n_bins=15, **ignored),
        }
    else:
        each: Any = {'num_classes': classes, **ignored}
        average: Any = 'none' if task == 'binary' else 'macro'
        metrics = {
            'accuracy_micro': tm.MulticlassAccuracy(average='micro', **each),
            'accuracy_macro': tm.MulticlassAccuracy(average='macro', **each),
            'f1': tm.MulticlassF1Score(average=average, **each),
            'average_precision': tm.MulticlassAveragePrecision(average=average, **each),
            'jaccard': tm.MulticlassJaccardIndex(average=average, **each),
            'calibration_error': tm.MulticlassCalibrationError(n_bins=15, **each),
        }
    return MetricCollection(metrics)
