"""What a probe is given: its arguments, and batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

from torch import Tensor
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
)

from dynamicvis_geo.errors import SpecError

Task = Literal['binary', 'multiclass', 'multilabel', 'regression']
Standardize = Literal['none', 'zscore', 'batchnorm', 'l2']
Optimizer = Literal['adamw', 'sgd']


def check_arguments(
    task: str,
    in_features: int,
    classes: tuple[str, ...],
    standardize: str,
    class_weights: str | list[float] | None,
    lr: float,
    weight_decay: float,
) -> None:
    """Refuse arguments of a probe that cannot be used."""
    check_choice('task', task, Task)
    check_choice('standardize', standardize, Standardize)
    least, most = {
        'regression': (0, 0),
        'binary': (2, 2),
        'multiclass': (2, None),
        'multilabel': (1, None),
    }[task]
    if len(classes) < least or (most is not None and len(classes) > most):
        needed = f'{least}' if most == least else f'{least} or more'
        raise SpecError(
            f'classes={classes!r}: task={task!r} has {needed} classes; give their names'
        )
    for name, value, low in (
        ('in_features', in_features, 1),
        ('lr', lr, 0),
        ('weight_decay', weight_decay, 0),
    ):
        if not value >= low or (name == 'lr' and value == 0):
            raise SpecError(f'{name}={value!r} must be above {low}')
    if class_weights is None:
        return
    if task == 'regression':
        raise SpecError(
            f'class_weights={class_weights!r} is for classes, not for a regression'
        )
    given = isinstance(class_weights, list)
    if class_weights != 'balanced' and not (
        given
        and len(class_weights) == len(classes)
        and all(float(weight) >= 0 for weight in class_weights)
    ):
        raise SpecError(
            f"class_weights={class_weights!r} must be 'balanced', or one number from 0 "
            f'for each of {len(classes)} classes'
        )


def check_choice(name: str, value: str, choices: Any) -> None:
    """Refuse a value that is none of a Literal's."""
    if value not in get_args(choices):
        raise SpecError(
            f'{name}={value!r} is unknown: choose one of {", ".join(get_args(choices))}'
        )


def find_key(batch: Mapping[str, Any], names: tuple[str, str]) -> str:
    """Return which of two keys a batch has."""
    for name in names:
        if name in batch:
            return name
    raise SpecError(
        f'the batch has no {names[0]!r} and no {names[1]!r}, only '
        f'{", ".join(sorted(map(str, batch)))}'
    )


def flatten(maps: Tensor) -> Tensor:
    """Turn ``[B, D, h, w]`` into one row a cell; rows stay as they are."""
    return maps if maps.ndim == 2 else maps.movedim(1, -1).reshape(-1, maps.shape[1])


def unflatten(rows: Tensor, like: Tensor) -> Tensor:
    """Undo :func:`flatten`."""
    if like.ndim == 2:
        return rows
    batch, _, height, width = like.shape
    return rows.reshape(batch, height, width, -1).movedim(-1, 1)


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


def provenances(dataset: Any) -> list[dict[str, Any]]:
    """Return what a dataset, or the datasets that it joins, say of their features."""
    made = getattr(dataset, 'provenance', None)
    if made and 'model' in made:
        return [made]
    # Chips and TorchGeo's intersections have several datasets, PyTorch's subsets one.
    parts = getattr(dataset, 'datasets', None) or [getattr(dataset, 'dataset', None)]
    found = [m for part in parts if part is not None for m in provenances(part)]
    return found if found or made is None else [made]
