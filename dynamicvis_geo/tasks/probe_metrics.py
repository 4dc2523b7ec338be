"""Metrics of probes, of torchmetrics, under the names of ``evaluation.metrics``."""

from torchmetrics import (
    MeanAbsoluteError,
    MeanSquaredError,
    Metric,
    MetricCollection,
    R2Score,
)
from torchmetrics.classification import (
    BinaryAveragePrecision,
    BinaryCalibrationError,
    BinaryF1Score,
    BinaryJaccardIndex,
    MulticlassAccuracy,
    MulticlassAveragePrecision,
    MulticlassCalibrationError,
    MulticlassF1Score,
    MulticlassJaccardIndex,
    MultilabelAccuracy,
    MultilabelAveragePrecision,
    MultilabelF1Score,
    MultilabelJaccardIndex,
)


def class_metrics(task: str, classes: int) -> MetricCollection:
    """Return the metrics that take probabilities ``[n, C]`` and labels.

    Accuracy, micro (share of right samples) and macro (mean over classes); F1, Jaccard
    and average precision, means over classes, or of binary those of the second class;
    the expected calibration error of the winning class in 15 bins. For multilabel every
    sample and class is a decision, at 0.5, and accuracy is the share of right ones.
    """
    if task == 'multilabel':
        return MetricCollection(
            {
                'accuracy_micro': MultilabelAccuracy(classes, average='micro'),
                'f1': MultilabelF1Score(classes),
                'average_precision': MultilabelAveragePrecision(classes),
                'jaccard': MultilabelJaccardIndex(classes),
            }
        )
    metrics: dict[str, Metric | MetricCollection] = {
        'accuracy_micro': MulticlassAccuracy(classes, average='micro'),
        'accuracy_macro': MulticlassAccuracy(classes, average='macro'),
        'calibration_error': MulticlassCalibrationError(classes, n_bins=15),
    }
    if task == 'multiclass':
        metrics |= {
            'f1': MulticlassF1Score(classes),
            'average_precision': MulticlassAveragePrecision(classes),
            'jaccard': MulticlassJaccardIndex(classes),
        }
    return MetricCollection(metrics)


def score_metrics(task: str) -> MetricCollection:
    """Return the metrics that take one number a decision.

    Of binary, the probability of the second class; of multilabel, the probability of
    every class, flat; of regression, the value.
    """
    if task == 'regression':
        return MetricCollection(
            {
                'r2': R2Score(),
                'mae': MeanAbsoluteError(),
                'rmse': MeanSquaredError(squared=False),
            }
        )
    if task == 'multilabel':
        return MetricCollection(
            {'calibration_error': BinaryCalibrationError(n_bins=15)}
        )
    return MetricCollection(
        {
            'f1': BinaryF1Score(),
            'average_precision': BinaryAveragePrecision(),
            'jaccard': BinaryJaccardIndex(),
        }
    )
