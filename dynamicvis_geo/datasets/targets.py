"""Targets of learning: columns of labels as numbers, and the kind of task."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dynamicvis_geo.errors import SpecError

Task = Literal['binary', 'multiclass', 'multilabel', 'regression']

#: More distinct whole numbers than this are quantities, not classes.
MAX_NUMBERED_CLASSES = 100

_SEPARATORS = re.compile(r'\s*[;|,]\s*')


@dataclass(frozen=True)
class Labels:
    """Labels as numbers.

    Attributes:
        values: int64 ``[n]`` class numbers; float32 ``[n]`` for regression; float32
            ``[n, C]`` of 0 and 1 for several classes at once.
        classes: Names of the classes, in the order of their numbers; none for
            regression.
        task: 'binary', 'multiclass', 'multilabel' or 'regression'.
    """

    values: NDArray[Any]
    classes: tuple[str, ...]
    task: Task


def encode_labels(values: pd.Series, task: str | None = None) -> Labels:
    """Turn a column of labels without missing values into numbers.

    Lists become several classes at once (multilabel). Texts, categories and booleans
    are classes. Whole numbers are classes where they repeat: at most
    ``MAX_NUMBERED_CLASSES`` distinct ones, each twice on average. All other numbers are
    quantities (regression). Classes are sorted, those of lists by their names.

    Args:
        values: The labels; the name of the series is used in errors.
        task: 'binary', 'multiclass', 'multilabel' or 'regression'; None infers it. With
            'multilabel', texts are split at semicolons, bars and commas.

    Raises:
        SpecError: If the labels do not fit the task.
    """
    if task is not None and task not in get_args(Task):
        raise SpecError(f'task={task!r} is none of {", ".join(get_args(Task))}')
    if values.isna().any():
        raise SpecError(f'column {values.name!r} has missing values: remove them')
    lists = values.map(lambda value: isinstance(value, list | tuple | set | np.ndarray))
    if task == 'multilabel' or (task is None and len(lists) and lists.all()):
        return _multilabel(values)
    if lists.any():
        raise SpecError(
            f"column {values.name!r} holds lists, which task='multilabel' is for"
        )
    if task == 'regression' or (task is None and not _are_classes(values)):
        return Labels(_numbers(values), (), 'regression')
    if pd.api.types.is_float_dtype(values) and _whole(values):
        # Class numbers that became 1.0, 2.0 because one of them was missing.
        values = values.astype(np.int64)
    try:
        codes, found = pd.factorize(values.astype(object), sort=True)
    except TypeError as error:
        raise SpecError(
            f'column {values.name!r} holds values that are no classes, such as '
            f'{str(values.iloc[0])[:40]!r}: name a column of texts or numbers'
        ) from error
    classes = tuple(str(name) for name in found)
    if len(set(classes)) < len(classes):
        raise SpecError(
            f'column {values.name!r} has classes that differ only in their type, such '
            "as 1 and '1': write them alike"
        )
    if len(classes) < 2 or (task == 'binary' and len(classes) > 2):
        raise SpecError(
            f'column {values.name!r} has {len(classes)} '
            f'class{"es" * (len(classes) != 1)} ({", ".join(classes[:5])}): '
            f'{"binary needs 2" if task == "binary" else "there must be two or more"}'
        )
    two: Task = 'multiclass' if task == 'multiclass' else 'binary'
    kind: Task = two if len(classes) == 2 else 'multiclass'
    return Labels(codes.astype(np.int64), classes, kind)


def _are_classes(values: pd.Series) -> bool:
    if pd.api.types.is_bool_dtype(values) or not pd.api.types.is_numeric_dtype(values):
        return True
    distinct = values.nunique()
    few = distinct <= MAX_NUMBERED_CLASSES and 2 * distinct <= len(values)
    return few and _whole(values)


def _whole(values: pd.Series) -> bool:
    numbers = values.to_numpy(np.float64)
    return bool(np.isfinite(numbers).all() and (numbers == np.floor(numbers)).all())


def _numbers(values: pd.Series) -> NDArray[np.float32]:
    numbers = pd.to_numeric(values, errors='coerce').to_numpy(np.float64)
    bad = np.flatnonzero(~np.isfinite(numbers))
    if len(bad):
        raise SpecError(
            f'column {values.name!r} holds {str(values.iloc[bad[0]])!r}, which is no '
            'finite number: a regression needs numbers; for classes, give '
            "task='multiclass'"
        )
    return numbers.astype(np.float32)


def _multilabel(values: pd.Series) -> Labels:
    sets = [_names(value) for value in values]
    classes = tuple(sorted(set().union(*sets)))
    if not classes:
        raise SpecError(f'column {values.name!r} names no class in any row')
    number = {name: i for i, name in enumerate(classes)}
    hot = np.zeros((len(sets), len(classes)), np.float32)
    for row, names in zip(hot, sets, strict=True):
        row[[number[name] for name in names]] = 1
    return Labels(hot, classes, 'multilabel')


def _names(value: Any) -> set[str]:
    parts = _SEPARATORS.split(value.strip()) if isinstance(value, str) else value
    if not isinstance(parts, list | tuple | set | np.ndarray):
        parts = [value]
    return {str(part) for part in parts if str(part)}
