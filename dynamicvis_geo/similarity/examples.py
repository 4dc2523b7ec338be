"""Examples and counter-examples: what they name among the rows that are searched."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dynamicvis_geo.datasets.vector_files import place_table, read_csv, read_vector
from dynamicvis_geo.errors import SourceError, SpecError
from dynamicvis_geo.formats import format_at
from dynamicvis_geo.formats.geoparquet import (
    EMBEDDING,
    find_parts,
    read_rows,
    read_schema,
    read_vectors,
    shared_provenance,
)
from dynamicvis_geo.paths import (
    Place,
    input_path,
    is_url,
    kind_of,
    open_file,
    parquet_source,
)
from dynamicvis_geo.settings import check_same_settings
from dynamicvis_geo.similarity.collections import (
    Chips,
    Collection,
    Ints,
    Vectors,
    with_lonlat,
)
from dynamicvis_geo.similarity.search import unit_vectors

#: The id of a chip or its point, 'LON,LAT' or a path; longitude and latitude; the
#: number of a chip; or vectors ``[D]`` or ``[n, D]``.
Example: TypeAlias = (
    str | os.PathLike[str] | tuple[float, float] | int | NDArray[np.floating]
)

#: Places that differ less in their distance are equally near, metres.
_TIE_M = 1e-3
_WAYS = (
    'give the id of a chip or of its point, the number of a chip from 0, LON,LAT in '
    'degrees, or a file of embeddings or points'
)


@dataclass
class Examples:
    """Examples that were found.

    Attributes:
        collections: What is searched.
        argument: Name of the argument that names them, for errors.
        rows: Of each collection, the rows that are examples.
        described: Of each collection, the rows that examples in files describe.
        vectors: Vectors of examples that are no rows, ``[n, D]`` each.
        tables: The chips of these, as far as they are known.
    """

    collections: Sequence[Collection]
    argument: str
    rows: list[Ints] = field(init=False)
    described: list[Ints] = field(init=False)
    vectors: list[Vectors] = field(default_factory=list)
    tables: list[pd.DataFrame] = field(default_factory=list)

    def __repr__(self) -> str:
        """Count them."""
        rows, others = sum(map(len, self.rows)), sum(map(len, self.vectors))
        return (
            f'<Examples {self.argument}=: {rows} of what is searched, {others} others>'
        )

    def __post_init__(self) -> None:
        self.rows = [np.empty(0, np.int64) for _ in self.collections]
        self.described = list(self.rows)

    def add(self, example: Example) -> None:
        """Find an example.

        Args:
            example: The example.

        Raises:
            SpecError: If it is not there, or was made otherwise.
            SourceError: If it is a file that cannot be read.
        """
        match example:
            case np.ndarray():
                self._add_vectors(np.atleast_2d(example))
            case tuple():
                self._add_place(*example)
            case int() | np.integer():
                self._add_number(int(example))
            case os.PathLike():
                self._add_file(input_path(example))
            case _:
                self._add_text(str(example))

    def named(self, number: int) -> tuple[Ints, Ints]:
        """Return the rows of a collection that are examples, or described by one.

        Args:
            number: Of the collection.
        """
        return self.rows[number], self.described[number]

    def all_vectors(self) -> Vectors:
        """Read the vectors of all examples, float32 ``[n, D]``.

        Cells without a vector, which an id may name with others, are left out.

        Raises:
            SpecError: If one has no direction, or nothing is left.
        """
        found = list(self.vectors)
        for collection, rows in zip(self.collections, self.rows, strict=True):
            if len(rows):
                some = collection.vectors(rows)
                is_there = ~np.isnan(some).all(axis=1)
                found.append(some if isinstance(collection, Chips) else some[is_there])
        none = np.empty((0, self.collections[0].dimensions), np.float32)
        together = np.concatenate([none, *found])
        if not np.isfinite(unit_vectors(together)).all():
            raise SpecError(
                f'{self.argument}=: an example is zero or not finite, so that it has '
                'no direction; choose another'
            )
        return together

    def shown(self, most: int) -> pd.DataFrame:
        """Return the chips that show examples, each once.

        Args:
            most: Number of chips.

        Returns:
            ``id``, and what is known of ``crs``, ``minx`` to ``maxy``, ``start``,
            ``end``, ``lon`` and ``lat``.
        """
        tables = [
            collection.pictured(rows[:: max(1, len(rows) // most)])
            for collection, rows in zip(self.collections, self.rows, strict=True)
            if len(rows)
        ]
        chips = pd.concat([*tables, *self.tables, pd.DataFrame({'id': []})])
        return chips.drop_duplicates('id').head(most).reset_index(drop=True)

    def _add_text(self, text: str) -> None:
        found = [collection.named(text) for collection in self.collections]
        if any(map(len, found)):
            self._add_rows(found)
        elif (place := _lonlat(text)) is not None:
            self._add_place(*place)
        elif is_url(text) or kind_of(input_path(text)) is not None:
            self._add_file(input_path(text))
        elif text.isdecimal():
            self._add_number(int(text))
        else:
            raise SpecError(
                f'{self.argument}={text!r} is no chip of {self._names()}, and no file: '
                f'{_WAYS}'
            )

    def _add_rows(self, found: Sequence[Ints]) -> None:
        self.rows = [
            np.union1d(old, new) for old, new in zip(self.rows, found, strict=True)
        ]

    def _add_number(self, number: int) -> None:
        found, left = [np.empty(0, np.int64) for _ in self.collections], number
        for i, collection in enumerate(self.collections):
            if 0 <= left < collection.chips:
                found[i] = collection.of_chip(left)
                self._add_rows(found)
                return
            left -= collection.chips
        raise SpecError(
            f'{self.argument}={number} is none of the {number - left} chips, which '
            f'count from 0, and no id of one: {_WAYS}'
        )

    def _add_place(self, lon: float, lat: float) -> None:
        found = self._around(lon, lat)
        if found is None:
            kinds = ' or '.join(sorted({one.what for one in self.collections}))
            raise SpecError(
                f"{self.argument}='{lon:g},{lat:g}': no {kinds} of {self._names()} "
                'contains this place (longitude first, then latitude, in degrees): '
                'choose a place within one, such as those that dynamicvis-geo plot '
                'map shows, or embed this place and give the file'
            )
        self._add_rows(found)

    def _around(self, lon: float, lat: float) -> list[Ints] | None:
        """Find the rows nearest to a place, several if they are equally near."""
        lon = (lon + 180) % 360 - 180 if abs(lon) > 180 else lon
        found = [collection.around(lon, lat) for collection in self.collections]
        nearest = min((float(m.min()) for _, m in found if len(m)), default=math.inf)
        if math.isinf(nearest):
            return None
        return [rows[metres <= nearest + _TIE_M] for rows, metres in found]

    def _add_file(self, path: Place) -> None:
        form = format_at(path, kind_of(path) == 'folder')
        if form is not None and form.output == 'grid':
            raise SpecError(
                f"{self.argument}='{path}' holds feature maps: name one of their cells "
                'by LON,LAT and search these maps, or give pooled embeddings'
            )
        if kind_of(path) == 'folder' or _holds_embeddings(path):
            self._add_embeddings(path)
        else:
            self._add_points(path)

    def _add_embeddings(self, path: Place) -> None:
        parts = find_parts(path)
        ours = self.collections[0]
        check_same_settings(ours.path, ours.provenance, path, shared_provenance(parts))
        for part in parts:
            self._add_vectors(np.concatenate([*read_vectors(part)]))
            table = with_lonlat(read_rows(part, np.arange(read_schema(part)[1])))
            self.tables.append(table)
            described = [one.same(table) for one in self.collections]
            self.described = [
                np.union1d(*pair)
                for pair in zip(self.described, described, strict=True)
            ]

    def _add_vectors(self, vectors: NDArray[np.floating]) -> None:
        dimensions = self.collections[0].dimensions
        if vectors.ndim != 2 or vectors.shape[1] != dimensions:
            raise SpecError(
                f'{self.argument}= is an example of {vectors.shape[-1]} numbers, but '
                f'embeddings of {self._names()} have {dimensions}: give one of the '
                'same model'
            )
        self.vectors.append(vectors.astype(np.float32))

    def _add_points(self, path: Place) -> None:
        remedy = 'give embeddings, or points in a CSV or vector file'
        if path.suffix.lower() in ('.csv', '.txt'):
            table = place_table(read_csv(path), path)
        else:
            table = read_vector(path, remedy)
        if table.crs is None:
            raise SourceError(f'{path}: has no CRS: name it in the file')
        if not len(table) or set(table.geom_type) != {'Point'}:
            kinds = ' and '.join(map(str, sorted(set(table.geom_type)))) or 'nothing'
            raise SourceError(f'{path}: holds {kinds}, not points alone: {remedy}')
        points = table.geometry.to_crs('EPSG:4326')
        found = [self._around(point.x, point.y) for point in points]
        known = [rows for rows in found if rows is not None]
        beyond = len(found) - len(known)
        text = (
            f'{path}: {beyond} of {len(found)} points lie in no footprint of '
            f'{self._names()}'
        )
        if not known:
            raise SpecError(f'{text}: give points within them')
        if beyond:
            warnings.warn(f'{text} and are left out', stacklevel=2)
        for rows in known:
            self._add_rows(rows)

    def _names(self) -> str:
        return ', '.join(str(collection.path) for collection in self.collections)


def find_examples(
    given: Example | list[Example],
    collections: Sequence[Collection],
    argument: str,
) -> Examples:
    """Find examples among collections, or read them.

    Args:
        given: One example, or a list of some.
        collections: What is searched.
        argument: Name of the argument, for errors.

    Raises:
        SpecError: If one is not there, has no direction, or was made otherwise.
        SourceError: If a file cannot be read.
    """
    examples = Examples(collections, argument)
    for one in given if isinstance(given, list) else [given]:
        examples.add(one)
    return examples


def _holds_embeddings(path: Place) -> bool:
    """Tell if a file is Parquet with a column of embeddings."""
    with open_file(path) as file:
        if file.read(4) != b'PAR1':
            return False
    return EMBEDDING in pq.read_schema(parquet_source(path)).names


def _lonlat(text: str) -> tuple[float, float] | None:
    """Read LON,LAT; None if a text is something else."""
    try:
        lon, lat = map(float, text.split(','))
    except ValueError:
        return None
    return (lon, lat) if abs(lon) <= 360 and abs(lat) <= 90 else None
