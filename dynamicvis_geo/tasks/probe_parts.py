"""Parts of a probe: checks of its arguments, metrics, and batches with labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
import torchmetrics.classification as tm
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
)
from torchmetrics import (
    MeanAbsoluteError,
    MeanSquaredError,
    Metric,
    MetricCollection,
    R2Score,
)

from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.provenance import Described

if TYPE_CHECKING:
    from sklearn.preprocessing import StandardScaler

Standardize = Literal['none', 'zscore', 'batchnorm', 'l2']
Optimizer = Literal['adamw', 'sgd']

#: Least and greatest number of classes of each task.
_CLASSES = {
    'binary': (2, 2),
    'multiclass': (2, np.inf),
    'multilabel': (1, np.inf),
    'regression': (0, 0),
}


def check_arguments(
    task: str,
    in_features: int,
    classes: list[str],
    standardize: str,
    class_weights: str | list[float] | None,
    lr: float,
    weight_decay: float,
    optimizer: str,
) -> None:
    """Refuse arguments of a probe that cannot be used."""
    for name, value, choices in (
        ('task', task, tuple(_CLASSES)),
        ('standardize', standardize, get_args(Standardize)),
        ('optimizer', optimizer, get_args(Optimizer)),
    ):
        if value not in choices:
            raise SpecError(
                f'{name}={value!r} is unknown: choose one of {", ".join(choices)}'
            )
    for name, number, fits, needed in (
        ('in_features', in_features, in_features >= 1, '1 or more'),
        ('lr', lr, lr > 0, 'above 0'),
        ('weight_decay', weight_decay, weight_decay >= 0, '0 or more'),
    ):
        if not fits:
            raise SpecError(f'{name}={number!r} must be {needed}')
    least, most = _CLASSES[task]
    if not least <= len(classes) <= most:
        needed = f'{least}' if most == least else f'{least} or more'
        raise SpecError(
            f'classes={classes!r}: task={task!r} has {needed} classes; give their names'
        )
    if class_weights is not None and task == 'regression':
        raise SpecError(
            f'class_weights={class_weights!r} is for classes, not for a regression'
        )
    if class_weights is None or class_weights == 'balanced':
        return
    if (
        isinstance(class_weights, str)
        or len(class_weights) != len(classes)
        or not all(weight >= 0 for weight in class_weights)
    ):
        raise SpecError(
            f"class_weights={class_weights!r} must be 'balanced', or one number from 0 "
            f'for each of {len(classes)} classes'
        )


def probe_metrics(task: str, classes: int) -> MetricCollection:
    """Return the metrics that take probabilities ``[n, C]``, or values, and labels.

    Accuracy, micro (share of right samples) and macro (mean over classes); F1, average
    precision and Jaccard index, means over classes, of binary one value a class; the
    expected calibration error of the winning class in 15 bins. Of multilabel every
    sample and class is a decision, at 0.5: accuracy and calibration error are those of
    all decisions. Other than in ``evaluation``, a class that was predicted and has no
    sample counts as 0 in the means.
    """
    metrics: dict[str, Metric | MetricCollection]
    if task == 'regression':
        metrics = {
            'r2': R2Score(),
            'mae': MeanAbsoluteError(),
            'rmse': MeanSquaredError(squared=False),
        }
    elif task == 'multilabel':
        metrics = {
            'accuracy_micro': tm.MultilabelAccuracy(classes, average='micro'),
            'f1': tm.MultilabelF1Score(classes),
            'average_precision': tm.MultilabelAveragePrecision(classes),
            'jaccard': tm.MultilabelJaccardIndex(classes),
            'calibration_error': tm.BinaryCalibrationError(n_bins=15),
        }
    else:
        average: Any = 'none' if task == 'binary' else 'macro'
        metrics = {
            'accuracy_micro': tm.MulticlassAccuracy(classes, average='micro'),
            'accuracy_macro': tm.MulticlassAccuracy(classes, average='macro'),
            'f1': tm.MulticlassF1Score(classes, average=average),
            'average_precision': tm.MulticlassAveragePrecision(classes, average),
            'jaccard': tm.MulticlassJaccardIndex(classes, average=average),
            'calibration_error': tm.MulticlassCalibrationError(classes, n_bins=15),
        }
    return MetricCollection(metrics)


def copy_moments(scaler: StandardScaler, mean: Tensor, scale: Tensor) -> None:
    """Copy mean and standard deviation, 1 where all is rounding of float32."""
    constant = scaler.scale_ <= np.finfo(np.float32).eps * np.abs(scaler.mean_)
    mean.copy_(torch.from_numpy(scaler.mean_))
    scale.copy_(torch.from_numpy(np.where(constant, 1.0, scaler.scale_)))


def find_key(batch: Mapping[str, Any], names: tuple[str, str]) -> str:
    """Return the one of two keys that a batch has."""
    for name in names:
        if name in batch:
            return name
    raise SpecError(
        f'the batch has no {names[0]!r} and no {names[1]!r}, only '
        f'{", ".join(sorted(map(str, batch)))}'
    )


def flat(maps: Tensor) -> Tensor:
    """Turn ``[B, D, h, w]`` into one row a cell; rows stay as they are."""
    return maps if maps.ndim == 2 else maps.movedim(1, -1).reshape(-1, maps.shape[1])


def once(loader: Any) -> Iterable[Mapping[str, Any]]:
    """Give all training data once: in order, and without leaving out a last batch.

    Every process of a distributed run sees all of them, and so fits the same.
    """
    known = RandomSampler, SequentialSampler, DistributedSampler
    if not isinstance(loader, DataLoader) or not isinstance(loader.sampler, known):
        return loader  # type: ignore[no-any-return]
    return DataLoader(
        loader.dataset, batch_size=loader.batch_size, collate_fn=loader.collate_fn
    )


def provenances(trainer: Trainer, loaders: Any) -> list[dict[str, Any]]:
    """Return what the datamodule, or else the datasets, say of their features."""
    module = getattr(trainer, 'datamodule', None)
    if isinstance(module, Described):
        return [module.provenance]
    loaders = loaders if isinstance(loaders, list | tuple) else [loaders]
    datasets = [getattr(loader, 'dataset', None) for loader in loaders]
    return [made for dataset in datasets for made in _provenances(dataset)]


def _provenances(dataset: Any) -> list[dict[str, Any]]:
    """Return what a dataset, or the datasets that it joins, say of their features."""
    made = [dataset.provenance] if isinstance(dataset, Described) else []
    if made and 'model' in made[0]:
        return made
    # Chips and TorchGeo's intersections have several datasets, PyTorch's subsets one.
    parts = getattr(dataset, 'datasets', None) or [getattr(dataset, 'dataset', None)]
    found = [m for part in parts if part is not None for m in _provenances(part)]
    return found or made
