import numpy as np
import pandas as pd
import pytest

from dynamicvis_geo.datasets.targets import encode_labels
from dynamicvis_geo.errors import SpecError


def column(*values: object) -> pd.Series:
    return pd.Series(list(values), name='cover')


@pytest.mark.parametrize(
    ('values', 'task', 'classes'),
    [
        (('b', 'a', 'b'), 'binary', ('a', 'b')),
        (('b', 'a', 'c'), 'multiclass', ('a', 'b', 'c')),
        ((True, False), 'binary', ('False', 'True')),
        ((10, 2, 10, 2), 'binary', ('2', '10')),
        ((3.0, 1.0, 2.0, 1.0, 2.0, 3.0), 'multiclass', ('1', '2', '3')),
        ((1, 2, 3, 4), 'regression', ()),
        ((0.5, 1.0, 1.0, 1.0), 'regression', ()),
        ((['a'], ['b', 'a']), 'multilabel', ('a', 'b')),
    ],
)
def test_task_is_inferred(
    values: tuple[object, ...], task: str, classes: tuple[str, ...]
) -> None:
    labels = encode_labels(column(*values))
    assert (labels.task, labels.classes) == (task, classes)


def test_values() -> None:
    classes = encode_labels(column('b', 'a', 'b')).values
    assert (classes.dtype, classes.tolist()) == (np.int64, [1, 0, 1])
    numbers = encode_labels(column(1, 2, 2, 1), 'regression').values
    assert (numbers.dtype, numbers.tolist()) == (np.float32, [1, 2, 2, 1])
    several = encode_labels(column('a; b', 'c', 'b|a'), 'multilabel')
    assert several.classes == ('a', 'b', 'c')
    assert several.values.dtype == np.float32
    assert several.values.tolist() == [[1, 1, 0], [0, 0, 1], [1, 1, 0]]


def test_categories_that_do_not_occur_are_no_classes() -> None:
    values = column('a', 'b', 'a').astype(pd.CategoricalDtype(['a', 'b', 'c']))
    assert encode_labels(values).classes == ('a', 'b')


def test_task_can_be_named() -> None:
    assert encode_labels(column('a', 'b'), 'multiclass').task == 'multiclass'
    assert encode_labels(column(1, 2, 3), 'multiclass').classes == ('1', '2', '3')


@pytest.mark.parametrize(
    ('values', 'task', 'message'),
    [
        (('a', 'b', 'c'), 'binary', '3 classes .* binary needs 2'),
        (('a', 'a'), None, '1 class .*two or more'),
        (('a', 'b'), 'regression', "'a', which is no finite number"),
        ((1.0, np.inf, 0.5), None, "'inf', which is no finite number"),
        (('a', 'b'), 'ranking', "task='ranking' is none of"),
        ((['a'], 'b'), None, 'holds lists'),
        (([], []), None, 'names no class'),
        (('a', None), None, 'missing values'),
    ],
)
def test_unusable_labels(
    values: tuple[object, ...], task: str | None, message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        encode_labels(column(*values), task)
