"""Confusion matrices as pictures."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from dynamicvis_geo.errors import SpecError

#: With more classes than this, the cells are too small for numbers.
MAX_NUMBERED = 20
_LONGEST_LABEL = 28


def plot_confusion_matrix(
    matrix: ArrayLike, classes: Sequence[Any], normalize: bool = True
) -> Figure:
    """Draw a confusion matrix: true classes as rows, predicted ones as columns.

    Args:
        matrix: ``[K, K]``, how many samples (or which weight) of the class of the row
            were predicted as the class of the column; as scikit-learn and torchmetrics
            give it.
        classes: The names of the K classes, in the order of the matrix.
        normalize: Whether colours and numbers are shares of the row in percent; the
            diagonal is then the recall of each class. A class without samples has an
            empty row. Otherwise they are the values of the matrix.

    Returns:
        The figure.

    Raises:
        SpecError: If the matrix is not square, empty, negative or not finite, or does
            not fit the classes.
    """
    counts = _checked(matrix, len(classes))
    size = len(counts)
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(
        counts, totals, out=np.full_like(counts, np.nan), where=totals > 0
    )
    shown = 100 * shares if normalize else counts
    labels = [_shorten(str(name)) for name in classes]
    cell = 0.62 if size <= MAX_NUMBERED else 0.24
    margin = 0.075 * max(map(len, labels))
    figure = Figure(
        figsize=(
            max(size * cell + margin + 2.4, 4.8),
            max(size * cell + margin + 1.4, 3.6),
        ),
        layout='compressed',
    )
    axes = figure.subplots()
    top = 100 if normalize else max(float(counts.max()), 1.0)
    # Cells without a value keep this grey.
    axes.set_facecolor('0.92')
    image = axes.imshow(
        np.ma.masked_invalid(shown), cmap='Blues', vmin=0, vmax=top, aspect='equal'
    )
    slanted = max(map(len, labels)) > 3 or size > 10
    # Names such as '$5' are not formulas.
    axes.set_xticks(
        range(size),
        labels,
        rotation=45 if slanted else 0,
        ha='right' if slanted else 'center',
        rotation_mode='anchor',
        parse_math=False,
    )
    axes.set_yticks(range(size), labels, parse_math=False)
    axes.set_xlabel('predicted')
    axes.set_ylabel('true')
    if size <= MAX_NUMBERED:
        _write_numbers(axes, shown, top, normalize)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02)
    bar.set_label('share of the true class, %' if normalize else 'samples')
    return figure


def _checked(matrix: ArrayLike, classes: int) -> NDArray[np.float64]:
    counts = np.asarray(matrix, dtype=np.float64)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or counts.size == 0:
        raise SpecError(
            f'matrix has shape {counts.shape}: a confusion matrix is square, a row and '
            'a column each class'
        )
    if len(counts) != classes:
        raise SpecError(
            f'matrix has {len(counts)} classes, but classes names {classes}: name each '
            'once, in the order of the matrix'
        )
    if not np.isfinite(counts).all() or (counts < 0).any():
        raise SpecError(
            'matrix has values that are negative or not finite: give counts, and '
            'normalize=True for shares'
        )
    return counts


def _shorten(label: str) -> str:
    label = ' '.join(label.split())
    if len(label) <= _LONGEST_LABEL:
        return label
    return label[: _LONGEST_LABEL - 1] + '…'


def _write_numbers(
    axes: Any, shown: NDArray[np.float64], top: float, normalize: bool
) -> None:
    for (row, column), value in np.ndenumerate(shown):
        if np.isnan(value):
            continue
        axes.text(
            column,
            row,
            f'{value:.0f}' if normalize else _compact(value),
            ha='center',
            va='center',
            fontsize=9,
            color='white' if value > 0.55 * top else '0.1',
        )


def _compact(value: float) -> str:
    """Write a count in the width of a cell."""
    for limit, unit in ((1e9, 'G'), (1e6, 'M'), (1e4, 'k')):
        if value >= limit:
            return f'{value / (1e3 if unit == "k" else limit):.3g}{unit}'
    return f'{value:.4g}'
