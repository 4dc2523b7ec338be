"""Scores of cells as GeoTIFFs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from rasterio.io import MemoryFile
from rasterio.transform import from_bounds

from dynamicvis_geo.change.pairs import window_text
from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.grid import TOLERANCE
from dynamicvis_geo.provenance import METADATA_FILE, PROVENANCE_KEY, to_json
from dynamicvis_geo.store import Store

if TYPE_CHECKING:
    from dynamicvis_geo.change.result import Change

Bounds = tuple[float, float, float, float]

_BOUNDS = ['minx', 'miny', 'maxx', 'maxy']
_BANDS = ('change', 'distance', 'valid_fraction')
#: Cells of a mosaic, empty ones among them, that fit into memory: 1.2 GB.
_MOST_CELLS = 100_000_000


def mosaic(change: Change) -> tuple[NDArray[np.float32], Bounds]:
    """Put the cells of all chips together.

    Args:
        change: Of feature maps.

    Returns:
        float32 ``[3, h, w]``: score, distance and valid fraction, north up, NaN where
        there is none; and west, south, east and north.

    Raises:
        SpecError: If the chips have several CRSs or grids, or the mosaic is too large.
    """
    chips = change.chips
    bounds = chips[_BOUNDS].to_numpy(np.float64)
    sizes = chips[['height', 'width']].to_numpy(np.int64)
    cell = (bounds[0, 2:] - bounds[0, :2]) / sizes[0, ::-1]
    west, south = bounds[:, :2].min(axis=0)
    east, north = bounds[:, 2:].max(axis=0)
    corners = np.stack([north - bounds[:, 3], bounds[:, 0] - west], axis=1) / cell[::-1]
    first = corners.round()
    cells = (bounds[:, 2:] - bounds[:, :2]) / cell
    if (
        chips['crs'].nunique() > 1
        or (np.abs(corners - first) > TOLERANCE).any()
        or (np.abs(cells - sizes[:, ::-1]) > TOLERANCE).any()
    ):
        raise SpecError(
            'the chips do not lie on one grid of cells in one CRS, so that one GeoTIFF '
            'cannot hold them: name a folder, which gets one a chip'
        )
    height, width = np.round(np.array([north - south, east - west]) / cell[::-1])
    if height * width > _MOST_CELLS:
        raise SpecError(
            f'one GeoTIFF of all chips would have {height:.0f} x {width:.0f} cells: '
            'name a folder, which gets one a chip'
        )
    values = np.full((3, int(height), int(width)), np.nan, np.float32)
    for chip, (row, column) in enumerate(first.astype(int)):
        rows, columns = sizes[chip]
        part = values[:, row : row + rows, column : column + columns]
        known = _bands(change, chip)
        part[...] = np.where(np.isnan(known[1]), part, known)
    return values, (west, south, east, north)


def write_mosaic(change: Change, path: Path) -> None:
    """Write all cells into one GeoTIFF.

    Args:
        change: Of feature maps.
        path: The file.

    Raises:
        SpecError: As :func:`mosaic`.
    """
    values, bounds = mosaic(change)
    chip = change.chips.iloc[0]
    content = _encode(values, chip['crs'], bounds, _tags(change, chip))
    Store(str(path.parent)).put(path.name, content)


def write_maps(change: Change, folder: Path) -> None:
    """Write the cells of each chip into a GeoTIFF, named by its id.

    Args:
        change: Of feature maps.
        folder: The folder.
    """
    store = Store(str(folder))
    for number in range(len(change.chips)):
        chip = change.chips.iloc[number]
        tags = {'chip_id': str(chip['id']), **_tags(change, chip)}
        content = _encode(
            _bands(change, number), chip['crs'], tuple(chip[_BOUNDS]), tags
        )
        store.put(f'{chip["id"]}.tif', content)
    store.put(METADATA_FILE, to_json(change.provenance, indent=2).encode())


def _bands(change: Change, chip: int) -> NDArray[np.float32]:
    values = change.grid(chip)
    valid = np.float32(change.chips['valid_fraction'].iloc[chip])
    return np.concatenate([values, np.where(np.isnan(values[1:]), np.nan, valid)])


def _tags(change: Change, chip: pd.Series) -> dict[str, str]:
    return {
        PROVENANCE_KEY: to_json(change.provenance),
        'before': window_text(chip['before_start'], chip['before_end']),
        'after': window_text(chip['start'], chip['end']),
    }


def _encode(
    values: NDArray[np.float32], crs: str, bounds: Bounds, tags: dict[str, str]
) -> bytes:
    bands, height, width = values.shape
    with MemoryFile() as memory:
        with memory.open(
            driver='COG',
            dtype='float32',
            count=bands,
            height=height,
            width=width,
            crs=crs,
            transform=from_bounds(*bounds, width, height),
            nodata=np.nan,
            compress='deflate',
            predictor=3,
            overview_resampling='average',
        ) as image:
            image.update_tags(**tags)
            image.descriptions = _BANDS
            image.write(values)
        return bytes(memory.getbuffer())
