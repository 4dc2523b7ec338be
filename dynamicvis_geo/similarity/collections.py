"""Rows to search: the chips of pooled embeddings, or the cells of feature maps."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import shapely
from numpy.typing import NDArray
from pyproj import CRS, Geod, Transformer

from dynamicvis_geo.datasets.footprints import footprints, to_lonlat
from dynamicvis_geo.errors import SourceError
from dynamicvis_geo.formats import format_at
from dynamicvis_geo.formats.geoparquet import (
    find_parts,
    read_bounds,
    read_column,
    read_rows,
    read_schema,
    shared_provenance,
)
from dynamicvis_geo.formats.mapped_vectors import map_vectors, vector_blocks
from dynamicvis_geo.outputs import Output, open_output
from dynamicvis_geo.paths import AnyPath, Place, input_path, kind_of

Ints = NDArray[np.int64]
Vectors = NDArray[np.float32]

_NONE = np.empty(0, np.int64)
_BOUNDS = ['minx', 'miny', 'maxx', 'maxy']


class Collection(ABC):
    """Vectors of one output, each of a chip or a cell, numbered from 0.

    Attributes:
        path: File or folder.
        provenance: What made it; empty if it does not say.
        dimensions: Length of a vector.
        chips: Number of chips.
    """

    what: str
    path: Place
    provenance: dict[str, Any]
    dimensions: int
    chips: int

    @abstractmethod
    def blocks(self) -> Iterator[tuple[int, Vectors]]:
        """Yield all vectors: the number of the first, and float32 ``[n, D]``."""

    @abstractmethod
    def vectors(self, rows: Ints) -> Vectors:
        """Read some vectors, float32 ``[n, D]``; NaN where there is none.

        Args:
            rows: Their numbers.
        """

    @abstractmethod
    def table(self, rows: Ints) -> gpd.GeoDataFrame:
        """Describe rows: ``id``, ``lon``, ``lat``, ``geometry`` and what is known.

        Args:
            rows: Their numbers.
        """

    @abstractmethod
    def pictured(self, rows: Ints) -> pd.DataFrame:
        """Return the chips whose images show rows.

        Args:
            rows: Their numbers.

        Returns:
            ``id``, ``lon``, ``lat``, and what is known of ``crs``, ``minx`` to
            ``maxy``, ``start`` and ``end``.
        """

    @abstractmethod
    def named(self, name: str) -> Ints:
        """Find the rows of a chip by its id or that of its point.

        Args:
            name: The id.
        """

    @abstractmethod
    def of_chip(self, number: int) -> Ints:
        """Find the rows of a chip by its number.

        Args:
            number: From 0.
        """

    @abstractmethod
    def around(self, lon: float, lat: float) -> tuple[Ints, NDArray[np.float64]]:
        """Find the rows whose footprint contains a place.

        Args:
            lon: Longitude, degrees.
            lat: Latitude.

        Returns:
            The rows, and the distances of their centres from the place, metres.
        """

    @abstractmethod
    def same(self, table: pd.DataFrame) -> Ints:
        """Find the rows that rows of a file of embeddings describe.

        Args:
            table: The columns of that file.
        """


class Chips(Collection):
    """Pooled embeddings: a row is a chip."""

    what = 'chip'

    def __init__(
        self, path: Place, parts: Sequence[Place], mapped: Path, made: dict[str, Any]
    ) -> None:
        """Take what :class:`~dynamicvis_geo.PooledEmbeddings` knows of them.

        Args:
            path: File or folder.
            parts: Its Parquet files.
            mapped: Array of their vectors.
            made: Their provenance.
        """
        self.path, self.provenance = path, made
        self._parts, self._mapped = parts, mapped
        self._counts = [read_schema(part)[1] for part in parts]
        self._vectors: Vectors = np.load(mapped, mmap_mode='r')
        self.chips, self.dimensions = self._vectors.shape

    @classmethod
    def open(cls, path: Place) -> Chips:
        """Open a file or folder.

        Args:
            path: The path.

        Raises:
            SourceError: If its embeddings cannot be used.
            OutputError: If the vectors cannot be written anywhere to map them.
        """
        parts = find_parts(path)
        return cls(path, parts, map_vectors(path, parts), shared_provenance(parts))

    def blocks(self) -> Iterator[tuple[int, Vectors]]:
        """Yield all vectors."""
        return vector_blocks(self._mapped)

    def vectors(self, rows: Ints) -> Vectors:
        """Read some vectors."""
        return np.array(self._vectors[rows])

    def table(self, rows: Ints) -> gpd.GeoDataFrame:
        """Return the columns of the file, with ``lon`` and ``lat``."""
        ordered = np.sort(rows)
        ends = np.cumsum(self._counts)
        tables = []
        for part, end, count in zip(self._parts, ends, self._counts, strict=True):
            inside = ordered[(ordered >= end - count) & (ordered < end)]
            if len(inside):
                tables.append(read_rows(part, inside - (end - count)))
        together = with_lonlat(pd.concat(tables, ignore_index=True))
        table: gpd.GeoDataFrame = together.iloc[np.searchsorted(ordered, rows)]
        return table.reset_index(drop=True)

    def pictured(self, rows: Ints) -> pd.DataFrame:
        """Return the rows themselves."""
        table: pd.DataFrame = self.table(rows)
        return table

    def named(self, name: str) -> Ints:
        """Find the rows of an id; of points, those around it."""
        for column in ('id', 'point_id'):
            rows = self._rows_with(column, [name])
            if len(rows):
                return rows
        return _NONE

    def of_chip(self, number: int) -> Ints:
        """Return the row of this number."""
        return np.array([number])

    def around(self, lon: float, lat: float) -> tuple[Ints, NDArray[np.float64]]:
        """Find the chips whose footprint contains a place."""
        west, south, east, north = self._bounds.T
        near = (west <= lon) & (lon <= east) & (south <= lat) & (lat <= north)
        rows = np.flatnonzero(near)
        if not len(rows):
            return _NONE, np.empty(0)
        table = self.table(rows)
        inside = shapely.intersects_xy(table.geometry.to_numpy(), lon, lat)
        rows, table = rows[inside], table[inside]
        return rows, _metres(lon, lat, table['lon'].to_numpy(), table['lat'].to_numpy())

    def same(self, table: pd.DataFrame) -> Ints:
        """Find the chips of the same ids."""
        if 'id' not in table or 'cell_row' in table:
            return _NONE
        return self._rows_with('id', table['id'].astype(str).tolist())

    @cached_property
    def _bounds(self) -> NDArray[np.float64]:
        return np.concatenate([read_bounds(part) for part in self._parts])

    def _rows_with(self, column: str, texts: Sequence[str]) -> Ints:
        """Return the rows with one of some texts in a column."""
        values = pa.array(texts, pa.string())
        found = [
            pc.is_in(read_column(part, column).cast(pa.string()), value_set=values)
            for part in self._parts
        ]
        return np.flatnonzero(np.concatenate([one.to_numpy() for one in found]))


class Cells(Collection):
    """Feature maps: a row is a cell.

    Rows are numbered tile by tile, and along the rows of each.
    """

    what = 'cell'

    def __init__(self, opened: Output) -> None:
        """Take the tiles of an output.

        Args:
            opened: The output, with all its chips.
        """
        self.path, self.provenance = opened.path, opened.provenance
        self.dimensions = opened.dimensions
        self._format = opened.format
        self._chips = opened.chips
        self.chips = len(self._chips)
        self._tiles = opened.format.tiles(opened.path, opened.chips)
        sizes = self._tiles['height'] * self._tiles['width']
        self._first = np.append(0, np.cumsum(sizes.to_numpy(np.int64)))

    def blocks(self) -> Iterator[tuple[int, Vectors]]:
        """Yield the vectors of a tile each time."""
        numbers = np.arange(len(self._tiles))
        for first, vectors in zip(self._first, self._read(numbers), strict=False):
            yield int(first), vectors

    def vectors(self, rows: Ints) -> Vectors:
        """Read the tiles of some cells."""
        tiles = self._tile_of(rows)
        found = np.empty((len(rows), self.dimensions), np.float32)
        wanted = np.unique(tiles)
        for tile, vectors in zip(wanted, self._read(wanted), strict=True):
            found[tiles == tile] = vectors[rows[tiles == tile] - self._first[tile]]
        return found

    def table(self, rows: Ints) -> gpd.GeoDataFrame:
        """Describe cells: chip, row and column in it, time, bounds and footprint."""
        tile = self._tiles.iloc[self._tile_of(rows)].reset_index(drop=True)
        bounds = self._bounds(rows)
        x, y = bounds[:, [0, 2]].mean(axis=1), bounds[:, [1, 3]].mean(axis=1)
        chip = self._chips.iloc[self._chip_of(rows, x, y)].reset_index(drop=True)
        lonlat, shapes = np.empty((len(rows), 2)), np.empty(len(rows), dtype=object)
        for crs, those in tile.groupby('crs').indices.items():
            known = CRS.from_user_input(crs)
            lonlat[those] = np.stack(to_lonlat(known, x[those], y[those]), axis=1)
            size = np.ones((len(those), 2), np.int64)
            shapes[those] = footprints(known, bounds[those], size)
        res = bounds[:, 2] - bounds[:, 0], bounds[:, 3] - bounds[:, 1]
        return gpd.GeoDataFrame(
            {
                'id': chip['id'],
                'cell_row': _whole((chip['maxy'] - bounds[:, 3]) / res[1]),
                'cell_column': _whole((bounds[:, 0] - chip['minx']) / res[0]),
                'lon': lonlat[:, 0],
                'lat': lonlat[:, 1],
                'start': tile['start'],
                'end': tile['end'],
                'crs': tile['crs'],
                **dict(zip(_BOUNDS, bounds.T, strict=True)),
            },
            geometry=shapes,
            crs='EPSG:4326',
        )

    def pictured(self, rows: Ints) -> pd.DataFrame:
        """Return the chips in which cells lie."""
        bounds = self._bounds(rows)
        x, y = bounds[:, [0, 2]].mean(axis=1), bounds[:, [1, 3]].mean(axis=1)
        chips = self._chips.iloc[self._chip_of(rows, x, y)]
        table: pd.DataFrame = with_lonlat(chips).reset_index(drop=True)
        return table

    def named(self, name: str) -> Ints:
        """Find all cells of the chips of an id."""
        for column in ('id', 'point_id'):
            if column in self._chips:
                chips = np.flatnonzero(self._chips[column].astype(str) == name)
                if len(chips):
                    return np.concatenate(
                        [self.of_chip(chip) for chip in chips.tolist()]
                    )
        return _NONE

    def of_chip(self, number: int) -> Ints:
        """Find all cells that lie in a chip."""
        if self._own_maps:
            return np.arange(self._first[number], self._first[number + 1])
        chip = self._chips.iloc[number]
        width = (chip['maxx'] - chip['minx']) / chip['width']
        height = (chip['maxy'] - chip['miny']) / chip['height']
        x, y = np.meshgrid(
            chip['minx'] + (np.arange(chip['width']) + 0.5) * width,
            chip['maxy'] - (np.arange(chip['height']) + 0.5) * height,
        )
        alike = _alike(self._tiles, chip)
        return np.concatenate(
            [self._cells_at(tile, x.ravel(), y.ravel()) for tile in alike]
        )

    def around(self, lon: float, lat: float) -> tuple[Ints, NDArray[np.float64]]:
        """Find the cells that contain a place and have a vector."""
        found = [_NONE]
        for crs, tiles in self._tiles.groupby('crs').indices.items():
            to_crs = Transformer.from_crs('EPSG:4326', crs, always_xy=True)
            x, y = (np.array([value]) for value in to_crs.transform(lon, lat))
            near = _contains(self._tiles.iloc[tiles], x[0], y[0])
            there = np.asarray(tiles)[near]
            found.extend(self._cells_at(tile, x, y) for tile in there)
        rows = np.concatenate(found)
        if len(rows):
            rows = rows[np.isfinite(self.vectors(rows)).all(axis=1)]
        if not len(rows):
            return _NONE, np.empty(0)
        table = self.table(rows)
        return rows, _metres(lon, lat, table['lon'].to_numpy(), table['lat'].to_numpy())

    def same(self, table: pd.DataFrame) -> Ints:
        """Find the cells of the same chip, row and column."""
        names = ['id', 'cell_row', 'cell_column']
        if not {*names, 'lon', 'lat'} <= {*table.columns}:
            return _NONE
        found = [_NONE]
        for lon, lat, *cell in table[['lon', 'lat', *names]].itertuples(index=False):
            rows, _ = self.around(lon, lat)
            if len(rows):
                equal = (self.table(rows)[names] == cell).all(axis=1)
                found.append(rows[equal.to_numpy()])
        return np.unique(np.concatenate(found))

    @property
    def _own_maps(self) -> bool:
        """True if each chip has a map of its own, which is its tile."""
        return self._tiles is self._chips

    def _read(self, tiles: Ints) -> Iterator[Vectors]:
        """Yield the vectors of tiles, ``[h * w, D]``."""
        some = self._tiles.iloc[tiles]
        for values in self._format.read_tiles(self.path, some):
            if len(values) != self.dimensions:
                raise SourceError(
                    f'{self.path}: its maps have features of {self.dimensions} and of '
                    f'{len(values)} numbers: keep those of one model in a folder'
                )
            yield np.ascontiguousarray(values.reshape(len(values), -1).T)

    def _tile_of(self, rows: Ints) -> Ints:
        return np.searchsorted(self._first, rows, side='right') - 1

    def _bounds(self, rows: Ints) -> NDArray[np.float64]:
        """Return west, south, east and north of cells, ``[n, 4]``."""
        number = self._tile_of(rows)
        tile = self._tiles.iloc[number]
        west, south, east, north = tile[_BOUNDS].to_numpy(np.float64).T
        height, width = tile[['height', 'width']].to_numpy(np.int64).T
        down, across = np.divmod(rows - self._first[number], width)
        xres, yres = (east - west) / width, (north - south) / height
        return np.stack(
            [
                west + across * xres,
                north - (down + 1) * yres,
                west + (across + 1) * xres,
                north - down * yres,
            ],
            axis=1,
        )

    def _cells_at(
        self, tile: int, x: NDArray[np.float64], y: NDArray[np.float64]
    ) -> Ints:
        """Return the rows of the cells of a tile at places in its CRS."""
        west, south, east, north, height, width = self._tiles.iloc[tile][
            [*_BOUNDS, 'height', 'width']
        ]
        inside = (x >= west) & (x <= east) & (y >= south) & (y <= north)
        across = np.floor((x[inside] - west) / (east - west) * width)
        down = np.floor((north - y[inside]) / (north - south) * height)
        across, down = np.minimum(across, width - 1), np.minimum(down, height - 1)
        rows: Ints = (self._first[tile] + down * width + across).astype(np.int64)
        return rows

    def _chip_of(
        self, rows: Ints, x: NDArray[np.float64], y: NDArray[np.float64]
    ) -> Ints:
        """Return the chips whose vectors cells have."""
        tiles = self._tile_of(rows)
        if self._own_maps:
            return tiles
        found = []
        for tile, across, down in zip(tiles, x, y, strict=True):
            those = _alike(self._chips, self._tiles.iloc[tile])
            some = self._chips.iloc[those]
            there = _contains(some, across, down)
            some, those = some[there], those[there]
            # As the mosaic does: the nearest centre, then the northernmost chip, then
            # the westernmost. In parts of a cell that rounding does not change.
            width = (some['maxx'] - some['minx']) / some['width']
            away = np.hypot(
                across - (some['minx'] + some['maxx']) / 2,
                down - (some['miny'] + some['maxy']) / 2,
            )
            order = np.lexsort((some['minx'], -some['maxy'], (away / width).round(6)))
            found.append(those[order[0]])
        return np.array(found, np.int64)


def open_collection(path: AnyPath) -> Collection:
    """Open an output to search it.

    Args:
        path: Pooled embeddings or feature maps, in any format.

    Raises:
        SourceError: If it cannot be read, or there is nothing in it.
        OutputError: If vectors cannot be written anywhere to map them.
    """
    path = input_path(path)
    kind = kind_of(path)
    form = None if kind is None else format_at(path, kind == 'folder')
    if form is not None and form.output == 'pooled':
        return Chips.open(path)
    opened = open_output(path, sys.maxsize)
    if not opened.total:
        raise SourceError(f'{path} holds no feature maps: give another output')
    return Cells(opened)


def with_lonlat(table: gpd.GeoDataFrame) -> gpd.GeoDataFrame:
    """Name the centres of chips ``lon`` and ``lat``, as files of points do.

    Args:
        table: Columns of a file of embeddings, EPSG:4326.
    """
    table = table.rename(columns={'centre_lon': 'lon', 'centre_lat': 'lat'})
    if not {'lon', 'lat'} <= {*table.columns}:
        middle = table.geometry.representative_point()
        table['lon'], table['lat'] = middle.x, middle.y
    return table


def _whole(numbers: pd.Series) -> Ints:
    return numbers.to_numpy(np.float64).round().astype(np.int64)


def _alike(table: pd.DataFrame, row: pd.Series) -> Ints:
    """Return the rows of the same CRS and time."""
    alike = (table['crs'] == row['crs']).to_numpy()
    for name in ('start', 'end'):
        times = table[name]
        same = times.isna() if pd.isna(row[name]) else times == row[name]
        alike = alike & same.to_numpy()
    return np.flatnonzero(alike)


def _contains(table: pd.DataFrame, x: float, y: float) -> NDArray[np.bool_]:
    inside = (table['minx'] <= x) & (x <= table['maxx'])
    inside &= (table['miny'] <= y) & (y <= table['maxy'])
    return inside.to_numpy()


def _metres(
    lon: float, lat: float, lons: NDArray[np.float64], lats: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the distances of places from one, along the ground."""
    one = np.full(len(lons), lon), np.full(len(lons), lat)
    _, _, metres = Geod(ellps='WGS84').inv(*one, lons, lats)
    return np.asarray(metres)
