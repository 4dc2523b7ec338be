"""Baselines: what one scores without the features."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dynamicvis_geo.errors import SourceError
from dynamicvis_geo.evaluation.problem import Problem
from dynamicvis_geo.evaluation.splits import SPLITS

if TYPE_CHECKING:
    from dynamicvis_geo.evaluation.datamodule import EmbeddingDataModule

_CONSTANT = {'multilabel': 'class shares', 'regression': 'mean'}


def constant(problem: Problem) -> tuple[str, NDArray[np.float64]]:
    """Predict the same for every test sample, from the other labels alone.

    Args:
        problem: The splits.

    Returns:
        'largest class', 'class shares' of multilabel or 'mean' of a regression; and the
        shares of the classes in training and validation split together, ``[n, C]``, or
        their mean ``[n]``.
    """
    known = np.concatenate([problem.splits[name][1] for name in ('train', 'val')])
    if problem.task in ('binary', 'multiclass'):
        known = np.eye(len(problem.classes))[known]
    mean = known.mean(axis=0)
    count = problem.sizes['test']
    name = _CONSTANT.get(problem.task, 'largest class')
    return name, np.tile(mean, (count, 1) if mean.ndim else count)


def mean_colours(
    data: EmbeddingDataModule,
    images: Callable[[pd.Series], NDArray[np.floating] | None],
) -> dict[str, NDArray[np.float32]]:
    """Take the mean colour of each chip, as features to compare with.

    Chips without an image get the mean of those that train, with a warning.

    Args:
        data: The labelled chips.
        images: Gives the image of a chip, ``[3, h, w]``, NaN where it has no value, or
            None; such as :class:`~dynamicvis_geo.quicklooks.Quicklooks`.

    Returns:
        For 'train', 'val' and 'test' float32 ``[n, 3]``.

    Raises:
        SourceError: If no chip to train has an image.
    """
    found = {name: _colours(data, data.rows(name), images) for name in SPLITS}
    seen = found['train'][np.isfinite(found['train']).all(axis=1)]
    if not len(seen):
        raise SourceError(
            f'none of the {len(found["train"])} chips to train has an image: name the '
            'images, or the cache, that were embedded'
        )
    without = {n: ~np.isfinite(rows).all(axis=1) for n, rows in found.items()}
    missing = sum(int(rows.sum()) for rows in without.values())
    if missing:
        total = sum(map(len, found.values()))
        warnings.warn(
            f'{missing} of {total} chips have no image, and get the mean of others',
            stacklevel=2,
        )
    for name, rows in found.items():
        rows[without[name]] = seen.mean(axis=0)
    return found


def _colours(
    data: EmbeddingDataModule,
    rows: NDArray[np.int64],
    images: Callable[[pd.Series], NDArray[np.floating] | None],
) -> NDArray[np.float32]:
    colours = np.full((len(rows), 3), np.nan, np.float32)
    for colour, row in zip(colours, rows, strict=True):
        image = images(data.dataset.table.iloc[row])
        if image is not None:
            valid = image[:, np.isfinite(image).all(axis=0)]
            if valid.size:
                colour[:] = valid.mean(axis=1)
    return colours
