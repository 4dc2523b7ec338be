"""The problem that is evaluated: features and labels in splits, checked once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dynamicvis_geo.datasets.targets import Task
from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.evaluation.splits import SPLITS

if TYPE_CHECKING:
    from dynamicvis_geo.evaluation.datamodule import EmbeddingDataModule

Arrays = tuple[NDArray[np.float32], NDArray[Any]]


@dataclass(frozen=True)
class Problem:
    """Features and labels in splits.

    Attributes:
        task: 'binary', 'multiclass', 'multilabel' or 'regression'.
        classes: Names of the classes; none for regression.
        splits: Features float32 ``[n, D]`` and labels of 'train', 'val' and 'test':
            int64 ``[n]``, 0 and 1 ``[n, C]`` for multilabel, float64 ``[n]`` for
            regression. 'val' may have none.
        groups: Group of each test sample, int64 ``[n]``: samples of one are alike.
        grouped_by: 'block', 'place', 'group', or 'sample' where each is its own.
        provenance: Provenance of the features.
        notes: Warnings for a reader of the results.
    """

    task: str
    classes: tuple[str, ...]
    splits: dict[str, Arrays]
    groups: NDArray[Any]
    grouped_by: str
    provenance: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def sizes(self) -> dict[str, int]:
        """Number of samples in each split."""
        return {name: len(self.splits[name][1]) for name in SPLITS}


def as_problem(
    data: EmbeddingDataModule | Mapping[str, Arrays],
    task: str | None = None,
    classes: Sequence[str] = (),
    groups: ArrayLike | None = None,
) -> Problem:
    """Take the splits from a datamodule, or from arrays, and check them.

    Args:
        data: A datamodule; or features ``[n, D]`` and labels of 'train', 'test' and, if
            there is one, 'val'.
        task: Of arrays: 'binary', 'multiclass', 'multilabel' or 'regression'.
        classes: Of arrays: names of the classes; their numbers if left out.
        groups: Of arrays: group of each test sample; each for itself if left out.

    Returns:
        The problem, all of whose features are finite.

    Raises:
        SpecError: If there is nothing to learn or to test on, or the arrays do not fit
            each other.
    """
    notes: tuple[str, ...] = ()
    if isinstance(data, Mapping):
        if task is None or task not in get_args(Task):
            raise SpecError(f'task={task!r} is none of {", ".join(get_args(Task))}')
        splits, provenance = dict(data), {}
        grouped_by = 'sample' if groups is None else 'group'
    else:
        if groups is not None:
            raise SpecError(
                f'groups={groups!r} is for arrays: a datamodule knows its own'
            )
        classes, task, provenance = data.classes, data.task, data.provenance
        groups, grouped_by, notes = data.groups('test'), data.grouped_by, data.notes
        splits = {name: data.arrays(name) for name in SPLITS if len(data.rows(name))}
    for name in ('train', 'test'):
        if name not in splits or not len(splits[name][1]):
            raise SpecError(
                f'split {name!r} has no samples: give it a share '
                '(fractions=), or another split='
            )
    names = tuple(classes) or _numbered(task, splits)
    dimensions = np.shape(splits['train'][0])[-1]
    labels = np.asarray(splits['train'][1])
    splits.setdefault('val', (np.empty((0, dimensions), np.float32), labels[:0]))
    checked = {
        name: _checked(name, *splits[name], task, len(names), dimensions)
        for name in SPLITS
    }
    _check_variety(task, names, checked['train'][1])
    tested = len(checked['test'][1])
    members = np.arange(tested) if groups is None else np.asarray(groups)
    if members.shape != (tested,):
        raise SpecError(
            f'groups has shape {members.shape}: give one for each of {tested} test '
            'samples'
        )
    notes += _notes(task, names, checked)
    return Problem(task, names, checked, members, grouped_by, provenance, notes)


def _numbered(task: str, splits: Mapping[str, Arrays]) -> tuple[str, ...]:
    if task == 'regression':
        return ()
    if task == 'multilabel':
        return tuple(map(str, range(np.shape(splits['train'][1])[-1])))
    top = max(int(np.max(y)) for _, y in splits.values() if len(y))
    return tuple(map(str, range(max(2, top + 1))))


def _checked(
    name: str, features: Any, labels: Any, task: str, classes: int, dimensions: int
) -> Arrays:
    x, y = np.asarray(features, np.float32), np.asarray(labels)
    wanted = (len(x), classes) if task == 'multilabel' else (len(x),)
    if x.ndim != 2 or x.shape[1] != dimensions or y.shape != wanted:
        raise SpecError(
            f'split {name!r} has features of shape {x.shape} and labels of shape '
            f'{y.shape}: give [n, {dimensions}] and {list(wanted)}'
        )
    if not np.isfinite(x).all() or not np.isfinite(y.astype(np.float64)).all():
        raise SpecError(f'split {name!r} has NaN or infinite numbers: remove them')
    if task == 'regression':
        return x, y.astype(np.float64)
    top = 1 if task == 'multilabel' else classes - 1
    if len(y) and (y.min() < 0 or y.max() > top):
        raise SpecError(
            f'split {name!r} has labels from {y.min()} to {y.max()}: {task} with '
            f'{classes} classes takes 0 to {top}'
        )
    return x, y.astype(np.int64)


def _check_variety(task: str, classes: Sequence[str], labels: NDArray[Any]) -> None:
    if np.ptp(labels, axis=0).any():
        return
    if task == 'multilabel':
        alike = 'in the training split every class is always or never there'
    elif task == 'regression':
        alike = f'the target of all {len(labels)} training samples is {labels[0]:g}'
    else:
        name = classes[labels[0]]
        alike = f'all {len(labels)} training samples are of one class, {name}'
    raise SpecError(f'{alike}: nothing can be learnt from it; divide otherwise')


def _notes(
    task: str, classes: Sequence[str], splits: Mapping[str, Arrays]
) -> tuple[str, ...]:
    notes = []
    for split in SPLITS:
        labels = splits[split][1]
        if not len(labels):
            notes.append(
                f'split {split!r} has no samples: no regularisation could be chosen'
            )
        elif task != 'regression':
            several = task == 'multilabel'
            there = set(np.flatnonzero(labels.any(axis=0)) if several else labels)
            absent = [name for i, name in enumerate(classes) if i not in there]
            if absent:
                notes.append(f'split {split!r} has no sample of {", ".join(absent)}')
    return tuple(notes)
