"""Inputs of a probe, checked: its arguments, and the batches that it learns from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
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
    """Refuse arguments of a probe that cannot be used.

    Args:
        task: As :class:`~dynamicvis_geo.LinearProbe` takes it, as all others.
        in_features: Length of a vector.
        classes: Names of the classes.
        standardize: Way to standardise.
        class_weights: Weights in the loss.
        lr: Learning rate.
        weight_decay: Of the weights.
        optimizer: Name of the optimizer.

    Raises:
        SpecError: If one cannot be used; it names the argument, the value and the
            choices.
    """
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


def copy_moments(scaler: StandardScaler, mean: Tensor, scale: Tensor) -> None:
    """Copy mean and standard deviation, 1 where that is rounding of float32.

    Args:
        scaler: Fitted.
        mean: ``[D]``, overwritten.
        scale: ``[D]``, overwritten.
    """
    constant = scaler.scale_ <= np.finfo(np.float32).eps * np.abs(scaler.mean_)
    mean.copy_(torch.from_numpy(scaler.mean_))
    scale.copy_(torch.from_numpy(np.where(constant, 1.0, scaler.scale_)))


def find_key(batch: Mapping[str, Any], names: tuple[str, str]) -> str:
    """Find the one of two keys that a batch has.

    Args:
        batch: The batch.
        names: The keys, of which the first goes before.

    Returns:
        The key.

    Raises:
        SpecError: If it has neither.
    """
    for name in names:
        if name in batch:
            return name
    raise SpecError(
        f'the batch has no {names[0]!r} and no {names[1]!r}, only '
        f'{", ".join(sorted(map(str, batch)))}'
    )


def flat(maps: Tensor) -> Tensor:
    """Turn feature maps into rows, one a cell; rows stay as they are.

    Args:
        maps: ``[B, D, h, w]`` or ``[B, D]``.

    Returns:
        ``[n, D]``.
    """
    return maps if maps.ndim == 2 else maps.movedim(1, -1).reshape(-1, maps.shape[1])


def label_rows(labels: Tensor, features: Tensor, task: str, classes: int) -> Tensor:
    """Turn labels ``[B]`` or ``[B, h, w]`` into one a row of :func:`flat` features.

    Args:
        labels: One each sample or cell; of multilabel C, as the second dimension.
        features: ``[B, D]`` or ``[B, D, h, w]``.
        task: Task of the probe.
        classes: C, number of its classes.

    Returns:
        ``[n]``, or ``[n, C]`` for multilabel.

    Raises:
        SpecError: If their shapes do not fit together.
    """
    cells = features.shape[:1] + features.shape[2:]
    several = task == 'multilabel'
    expected = (cells[0], classes, *cells[1:]) if several else (*cells,)
    if not several and labels.ndim == len(cells) + 1 and labels.shape[1] == 1:
        labels = labels.squeeze(1)
    if tuple(labels.shape) != expected:
        raise SpecError(
            f'labels have shape {tuple(labels.shape)}, but features of shape '
            f'{tuple(features.shape)} need labels {expected}'
        )
    return flat(labels) if several else labels.reshape(-1)


def check_classes(labels: Tensor, task: str, classes: int) -> None:
    """Refuse numbers that are of no class.

    Raises:
        SpecError: If there is one.
    """
    top = 1 if task == 'multilabel' else classes - 1
    if len(labels) and (labels.min() < 0 or labels.max() > top):
        raise SpecError(
            f'labels run from {labels.min().item():g} to {labels.max().item():g}, '
            f'but a {task} probe of {classes} classes takes 0 to '
            f'{top}: number them anew, or name the one to leave out by ignore_index'
        )


def once(loader: Any) -> Iterable[Mapping[str, Any]]:
    """Give all training data once: in order, and without leaving out a last batch.

    Every process of a distributed run sees all of them, and so fits the same.

    Args:
        loader: The training data.

    Returns:
        Batches; a loader with a sampler, or batches, of its own as it is.
    """
    known = RandomSampler, SequentialSampler, DistributedSampler
    batches = getattr(loader, 'batch_sampler', None)
    sampler = getattr(loader if batches is None else batches, 'sampler', None)
    if not isinstance(loader, DataLoader) or not isinstance(sampler, known):
        return loader  # type: ignore[no-any-return]
    size = None if batches is None else batches.batch_size
    return DataLoader(loader.dataset, batch_size=size, collate_fn=loader.collate_fn)


def provenances(trainer: Trainer, loaders: Any) -> list[dict[str, Any]]:
    """Collect the provenances of the features that a Trainer is given.

    Args:
        trainer: Its datamodule is asked first.
        loaders: A DataLoader, or several, whose datasets are asked else.

    Returns:
        One a dataset that tells any.
    """
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
