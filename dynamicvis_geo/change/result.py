"""What was found to have changed: as a table, as rasters, in files and in words."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyproj import CRS

from dynamicvis_geo.change.pairs import window_text
from dynamicvis_geo.change.scores import THRESHOLD
from dynamicvis_geo.datasets.footprints import footprints, to_lonlat
from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.provenance import PROVENANCE_KEY, to_json
from dynamicvis_geo.store import Store
from dynamicvis_geo.terms import random_weights

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_BOUNDS = ['minx', 'miny', 'maxx', 'maxy']
#: What a chip has of each date.
_OF_DATE = ('id', 'start', 'end')
#: With less than this share of its pixels valid, a change may be a cloud.
_CLOUDY = 0.5
_METHOD = (
    'distance: 1 - cos of the vectors of both dates; change: logarithm of half the '
    'square of the difference of the unit vectors, less the median difference, in '
    'units of 1.4826 MAD from its median'
)


@dataclass(frozen=True, repr=False)
class Change:
    """Distances between two dates, of each place in common.

    A place is a chip, of feature maps a cell.

    Attributes:
        chips: A row each chip in common, EPSG:4326: what is known of it at the later
            date; ``before_id``, ``before_start`` and ``before_end`` of the earlier; and
            ``valid_fraction``, the smaller of both.
        chip: int64 ``[n]``, row in *chips* of each place.
        cell: int64 ``[n]``, number of each cell in its chip, along the rows from the
            north; None if places are chips.
        distance: float64 ``[n]``, cosine distance, 0 to 2; NaN without a vector.
        change: float64 ``[n]``, score: robust deviations from what is usual.
        reason: Why there are no scores; None if there are.
        paths: The two outputs; the same one if it has both dates.
        unmatched: Chips of each that the other one lacks.
        made: Provenance of both outputs.
    """

    chips: gpd.GeoDataFrame
    chip: Ints
    cell: Ints | None
    distance: Floats
    change: Floats
    reason: str | None
    paths: tuple[str, str]
    unmatched: tuple[int, int]
    made: tuple[Mapping[str, Any], Mapping[str, Any]]

    def __repr__(self) -> str:
        return f'Change {self.title}\n{self._count(len(self.chip))}, {self._outliers}'

    @cached_property
    def table(self) -> gpd.GeoDataFrame:
        """A row each place, in the order of the earlier output, EPSG:4326.

        ``id``, of a cell also ``cell_row`` and ``cell_column`` in its chip, from the
        north-west corner; ``distance``, ``change`` and ``valid_fraction``; ``lon`` and
        ``lat`` of the centre; and the columns of :attr:`chips`.
        """
        return self.rows(np.arange(len(self.chip)))

    def order(self, k: int) -> Ints:
        """Find the places that have changed most, by score, or by distance without.

        Args:
            k: How many, fewer if there are fewer with a distance.

        Returns:
            Their numbers, the most changed first.
        """
        values = self.distance if self.reason else self.change
        known = np.flatnonzero(np.isfinite(values))
        found: Ints = known[np.argsort(-values[known], kind='stable')[:k]]
        return found

    def top(self, k: int) -> gpd.GeoDataFrame:
        """Return the places that have changed most, as rows of :attr:`table`.

        Args:
            k: How many, as :meth:`order`.
        """
        return self.rows(self.order(k))

    def rows(self, numbers: Ints) -> gpd.GeoDataFrame:
        """Describe places.

        Args:
            numbers: Theirs, from 0.

        Returns:
            Rows of :attr:`table`.
        """
        table = self.chips.iloc[self.chip[numbers]].reset_index(drop=True)
        if self.cell is None:
            table = table.rename(columns={'centre_lon': 'lon', 'centre_lat': 'lat'})
        else:
            table = _of_cells(table, self.cell[numbers])
        table['distance'] = self.distance[numbers]
        table['change'] = self.change[numbers]
        first = ['id', 'point_id', 'cell_row', 'cell_column', 'distance', 'change']
        first += ['valid_fraction', 'lon', 'lat']
        first = [name for name in first if name in table]
        return table[[*first, *(n for n in table.columns if n not in first)]]

    def grid(self, chip: int) -> NDArray[np.float32]:
        """Return the values of the cells of a chip of feature maps.

        Args:
            chip: Row in :attr:`chips`.

        Returns:
            float32 ``[2, h, w]``, score and distance, north up; NaN where a cell is
            that of another chip, or has none.

        Raises:
            SpecError: If places are chips.
        """
        if (cell := self.cell) is None:
            raise _no_cells()
        size = tuple(self.chips[['height', 'width']].iloc[chip].astype(int))
        first, last = np.searchsorted(self.chip, [chip, chip + 1])
        values = np.full((2, size[0] * size[1]), np.nan, np.float32)
        values[0, cell[first:last]] = self.change[first:last]
        values[1, cell[first:last]] = self.distance[first:last]
        return values.reshape(2, *size)

    @property
    def provenance(self) -> dict[str, Any]:
        """Both outputs, and how this was made of them."""
        sides = {}
        for name, path, made in zip(
            ('before', 'after'), self.paths, self.made, strict=True
        ):
            sides[name] = {
                'file': PurePath(path).name,
                'windows': self._windows(name == 'before'),
                'provenance': made,
            }
        version = importlib.metadata.version('dynamicvis-geo')
        return {
            'processing:datetime': datetime.now(UTC).isoformat(timespec='seconds'),
            'processing:software': {'dynamicvis-geo': version},
            # What marks pictures of random weights looks for them here.
            'model': self.made[1].get('model', {}),
            'change': {'method': _METHOD, 'threshold': THRESHOLD, **sides},
        }

    def summary(self) -> str:
        """Say in words what was found, and what it does not say."""
        lines = [f'Matched {self._count(len(self.chip))} {self.title}.']
        lines += [
            f'{self._chips(lost)} of {PurePath(path).name} '
            f'{"is" if lost == 1 else "are"} not in the other and left out.'
            for path, lost in zip(self.paths, self.unmatched, strict=True)
            if lost
        ]
        unknown = int(np.isnan(self.distance).sum())
        if unknown:
            lines.append(f'{self._count(unknown)} without a vector: no distance.')
        if self.reason:
            lines.append(f'{self.reason[0].upper()}{self.reason[1:]}.')
        else:
            lines.append(f'{self._outliers[0].upper()}{self._outliers[1:]}.')
            out = np.flatnonzero(self.change > THRESHOLD)
            valid = self.chips['valid_fraction'].to_numpy(float)[self.chip[out]]
            if cloudy := int((valid < _CLOUDY).sum()):
                lines.append(
                    f'{cloudy} of these {"lies" if cloudy == 1 else "lie"} in chips '
                    'with less than half of their pixels valid: look for clouds.'
                )
        lines.append(
            'This is an order in which to look at places, not a test of significance.'
        )
        if any(map(random_weights, self.made)):
            lines.append('The weights are random: distances and scores mean nothing.')
        return '\n'.join(lines)

    def write(self, path: Path) -> None:
        """Write all places.

        Args:
            path: A ``.csv`` or ``.parquet`` (GeoParquet) file of :attr:`table`. Of
                feature maps also a ``.tif`` of all, if they lie on one grid, or a
                folder of GeoTIFFs, one a chip: bands score, distance, valid fraction.

        Raises:
            SpecError: If that cannot hold them.
        """
        suffix = path.suffix.lower()
        if suffix == '.csv':
            flat = self.table.drop(columns='geometry')
            Store(str(path.parent)).put(path.name, flat.to_csv(index=False).encode())
        elif suffix in ('.parquet', '.geoparquet'):
            self._write_parquet(path)
        elif self.cell is None:
            raise _no_cells()
        else:
            from dynamicvis_geo.change.rasters import write_maps, write_mosaic

            (write_mosaic if suffix in ('.tif', '.tiff') else write_maps)(self, path)

    def _write_parquet(self, path: Path) -> None:
        content = pa.BufferOutputStream()
        self.table.to_parquet(content, index=False, write_covering_bbox=True)
        table = pq.read_table(pa.BufferReader(content.getvalue()))
        told = {PROVENANCE_KEY: to_json(self.provenance)}
        table = table.replace_schema_metadata({**table.schema.metadata, **told})
        file = pa.BufferOutputStream()
        pq.write_table(table, file, compression='zstd')
        Store(str(path.parent)).put(path.name, file.getvalue().to_pybytes())

    def _windows(self, before: bool) -> list[str]:
        prefix = 'before_' if before else ''
        names = [f'{prefix}start', f'{prefix}end']
        pairs = self.chips[names].drop_duplicates().sort_values(names)
        return [window_text(*pair) for pair in pairs.itertuples(index=False)]

    @property
    def title(self) -> str:
        """The two that are compared, in words."""
        one, other = (PurePath(path).name for path in self.paths)
        times = []
        for before in (True, False):
            windows = self._windows(before)
            more = f' and {len(windows) - 1} more' if len(windows) > 1 else ''
            times.append(f'{windows[0]}{more}')
        if one == other:
            return f'of {one}, from {times[0]} to {times[1]}'
        return f'from {one} ({times[0]}) to {other} ({times[1]})'

    @property
    def _outliers(self) -> str:
        if self.reason:
            return 'no scores'
        out = int((self.change > THRESHOLD).sum())
        number = f'{out:,}' if out else 'none'
        return f'{number} stand{"s" * (out <= 1)} out (change above {THRESHOLD})'

    def _count(self, number: int) -> str:
        if self.cell is None:
            return self._chips(number)
        return f'{number:,} cell{"s" * (number != 1)}'

    @staticmethod
    def _chips(number: int) -> str:
        return f'{number:,} chip{"s" * (number != 1)}'


def describe(before: gpd.GeoDataFrame, after: gpd.GeoDataFrame) -> gpd.GeoDataFrame:
    """Join what is known of chips at two dates.

    Args:
        before: Rows of :attr:`~dynamicvis_geo.outputs.Output.chips`.
        after: The rows of the same places.

    Returns:
        :attr:`Change.chips`.
    """
    chips = after.reset_index(drop=True)
    for name in _OF_DATE:
        chips[f'before_{name}'] = before[name].to_numpy()
        if name != 'id':
            chips[f'before_{name}'] = pd.to_datetime(chips[f'before_{name}'], utc=True)
    chips['valid_fraction'] = np.fmin(
        before['valid_fraction'].to_numpy(float),
        after['valid_fraction'].to_numpy(float),
    )
    return chips.drop(columns='file', errors='ignore')


def _no_cells() -> SpecError:
    return SpecError(
        'pooled embeddings have no cells to write GeoTIFFs of: give a name that ends '
        'in .parquet or .csv'
    )


def _of_cells(table: gpd.GeoDataFrame, cell: Ints) -> gpd.GeoDataFrame:
    """Put the place of each cell where that of its chip is."""
    height, width = table[['height', 'width']].to_numpy(np.int64).T
    down, across = np.divmod(cell, width)
    west, south, east, north = table[_BOUNDS].to_numpy(np.float64).T
    xres, yres = (east - west) / width, (north - south) / height
    bounds = np.stack(
        [
            west + across * xres,
            north - (down + 1) * yres,
            west + (across + 1) * xres,
            north - down * yres,
        ],
        axis=1,
    )
    lonlat, shapes = np.empty((len(table), 2)), np.empty(len(table), dtype=object)
    for crs, rows in table.groupby('crs').indices.items():
        known = CRS.from_user_input(crs)
        x, y = (
            bounds[rows][:, [0, 2]].mean(axis=1),
            bounds[rows][:, [1, 3]].mean(axis=1),
        )
        lonlat[rows] = np.stack(to_lonlat(known, x, y), axis=1)
        one = np.ones((len(rows), 2), np.int64)
        shapes[rows] = footprints(known, bounds[rows], one)
    plain = table.drop(
        columns=['geometry', 'height', 'width', 'centre_lon', 'centre_lat']
    )
    plain = pd.DataFrame(plain).assign(
        cell_row=down,
        cell_column=across,
        lon=lonlat[:, 0],
        lat=lonlat[:, 1],
        **dict(zip(_BOUNDS, bounds.T, strict=True)),
    )
    return gpd.GeoDataFrame(plain, geometry=shapes, crs='EPSG:4326')
