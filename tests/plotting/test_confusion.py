from io import BytesIO

import numpy as np
import pytest

from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.plotting import plot_confusion_matrix


def test_shares_are_of_the_true_class_and_an_absent_class_is_empty() -> None:
    matrix = [[30, 10, 0], [0, 0, 0], [1, 1, 2]]
    figure = plot_confusion_matrix(matrix, ['water', 'a $tree', 'bare'])
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == [
        '75',
        '25',
        '0',
        '25',
        '25',
        '50',
    ]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        'water',
        'a $tree',
        'bare',
    ]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ('predicted', 'true')
    figure.savefig(BytesIO(), format='png')


def test_counts_are_written_so_that_they_fit() -> None:
    figure = plot_confusion_matrix(
        [[7, 12345], [0, 2_500_000]], [0, 1], normalize=False
    )
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ['7', '12.3k', '0', '2.5M']


def test_many_classes_are_drawn_without_numbers() -> None:
    figure = plot_confusion_matrix(np.eye(60, dtype=int), range(60))
    assert not figure.axes[0].texts
    assert max(figure.get_size_inches()) < 20


@pytest.mark.parametrize(
    ('matrix', 'classes', 'message'),
    [
        ([[1, 2]], ['a'], r'shape \(1, 2\)'),
        (np.empty((0, 0)), [], r'shape \(0, 0\)'),
        ([[1, 0], [0, 1]], ['a'], 'names 1'),
        ([[1, -1], [0, 1]], ['a', 'b'], 'negative'),
        ([[1, np.nan], [0, 1]], ['a', 'b'], 'not finite'),
    ],
)
def test_what_is_no_confusion_matrix_is_refused(
    matrix: object, classes: list[str], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        plot_confusion_matrix(matrix, classes)  # type: ignore[arg-type]
