"""Chips of different datasets that could not be told apart."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pyproj import CRS
from torchgeo.datasets import GeoDataset

from dynamicvis_geo.datasets.chip_order import slabs
from dynamicvis_geo.errors import SpecError

_PLACE = ['x', 'y', 'width', 'height', 'xres', 'yres', 'start', 'end']


def refuse_double(
    table: NDArray[np.void], crs: Sequence[CRS], datasets: Sequence[GeoDataset]
) -> None:
    """Refuse chips of different datasets that would have the same id.

    Args:
        table: Chips, as :class:`~dynamicvis_geo.datasets.ChipDataset` keeps them.
        crs: CRS of each source.
        datasets: Dataset of each source; one may occur several times.

    Raises:
        SpecError: If there are such chips.
    """
    first = [
        next(i for i, two in enumerate(datasets) if two is one) for one in datasets
    ]
    for one in dict.fromkeys(crs):
        sources = [i for i, other in enumerate(crs) if other == one]
        # Chips of different CRS never are the same, nor are those of one dataset.
        if len({first[i] for i in sources}) > 1:
            rows = np.flatnonzero(np.isin(table['source'], sources))
            _refuse(table, _alike(table, rows), np.array(first), datasets)


def _alike(table: NDArray[np.void], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the rows whose places have a hash in common: few, seldom wrongly."""
    hashes = np.concatenate(
        [
            pd.util.hash_pandas_object(_places(table, part), index=False).to_numpy()
            for part in slabs(rows)
        ]
        or [np.empty(0, np.uint64)]
    )
    order = np.argsort(hashes, kind='stable')
    same = np.flatnonzero(np.diff(hashes[order]) == 0)
    double: NDArray[np.int64] = rows[np.unique(order[np.concatenate([same, same + 1])])]
    return double


def _places(table: NDArray[np.void], rows: NDArray[np.int64]) -> pd.DataFrame:
    # Adding 0 makes one zero of two.
    return pd.DataFrame({name: table[name][rows] + 0 for name in _PLACE})


def _refuse(
    table: NDArray[np.void],
    rows: NDArray[np.int64],
    first: NDArray[np.int64],
    datasets: Sequence[GeoDataset],
) -> None:
    frame = _places(table, rows)
    frame['source'] = first[table['source'][rows]]
    frame = frame.drop_duplicates()
    double = frame[frame.duplicated(_PLACE, keep=False)]
    if len(double):
        one, two = double['source'].iloc[0], double['source'].iloc[-1]
        names = [type(datasets[i]).__name__ for i in (one, two)]
        raise SpecError(
            f'pairs: datasets {one} ({names[0]}) and {two} ({names[1]}) have the same '
            'chip (CRS, place, size and time), which could not be told apart: join '
            'them with & or |, or make a ChipDataset of each'
        )
