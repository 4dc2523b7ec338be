"""Tables of places to be mapped: outputs, and what was found out from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import geopandas as gpd
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from dynamicvis_geo.datasets.vector_files import place_table, read_csv, read_vector
from dynamicvis_geo.errors import SourceError, SpecError, one_line
from dynamicvis_geo.outputs import Output, open_output
from dynamicvis_geo.paths import AnyPath, Place, input_path, kind_of, parquet_source
from dynamicvis_geo.provenance import find_provenance

_REMEDY = (
    'give what embed, similar, change or probe wrote, a CSV with lon and lat, or a '
    'vector file'
)

#: Columns that come from features, and so from weights.
FROM_FEATURES = frozenset(
    ('prediction', 'correct', 'error', 'similarity', 'change', 'distance')
)


@dataclass(frozen=True)
class MapTable:
    """Places with columns.

    Attributes:
        table: A row each place, EPSG:4326.
        failures: Chips of an output that failed, with ``start`` and ``end`` if it has
            them; none of other tables.
        provenance: What made it; empty if it does not say.
    """

    table: gpd.GeoDataFrame
    failures: gpd.GeoDataFrame
    provenance: dict[str, Any]

    def column(self, name: str) -> pd.Series:
        """Return a column.

        Args:
            name: Its name.

        Raises:
            SpecError: If there is none of this name.
        """
        names = [str(one) for one in self.table.columns.drop(self.table.geometry.name)]
        if name not in names:
            raise SpecError(
                f'--color {name}: no such column; there are {", ".join(names)}'
            )
        values: pd.Series = self.table[name]
        return values

    def labels(self, path: AnyPath, name: str) -> tuple[pd.Series, str]:
        """Join a column of a file of labels, as ``probe`` does.

        Args:
            path: CSV, Parquet or any vector file.
            name: Its column.

        Returns:
            The label of each place, missing where there is none, and how they were
            joined, in words.

        Raises:
            SourceError: If the labels cannot be read.
            SpecError: If they do not fit the places.
        """
        # Of all maps, only these need torch, by way of its package.
        from dynamicvis_geo.evaluation.labels import join_labels

        joined = join_labels(self.table, str(path), name)
        values = joined.values.set_axis(self.table.index[joined.rows])
        return values.reindex(self.table.index).rename(name), joined.description


def open_map_table(path: AnyPath) -> MapTable:
    """Read a table of places.

    Args:
        path: An output of ``embed``, or a file of other commands: GeoParquet, CSV with
            columns lon and lat, or any vector file; or the URL of one.

    Raises:
        SourceError: If it cannot be read, has no places, or no rows.
    """
    place = input_path(path)
    if kind_of(place) != 'file' or has_embeddings(place):
        return of_output(open_output(place))
    table = _read_places(place)
    if table.empty:
        raise SourceError(f'{place} has no rows, so there is nothing to draw')
    return MapTable(table, table.iloc[:0], find_provenance(place) or {})


def of_output(output: Output) -> MapTable:
    """Take the places of an output, and of its failures.

    Args:
        output: The output.
    """
    failures = output.failures()
    listed = output.chips.iloc[:0] if failures is None else failures.table
    return MapTable(output.chips, listed, output.provenance)


def has_embeddings(path: Place) -> bool:
    """Tell if a file is an output of ``embed``, and no other table.

    Args:
        path: The file.

    Raises:
        SourceError: If it ends in .parquet and cannot be read.
    """
    if path.suffix.lower() in ('.tif', '.tiff'):
        return True
    if path.suffix.lower() != '.parquet':
        return False
    try:
        return 'embedding' in pq.read_schema(parquet_source(path)).names
    except (OSError, pa.ArrowException) as error:
        raise SourceError(
            f'{path}: not a readable Parquet file ({one_line(error)}); {_REMEDY}'
        ) from error


def _read_places(path: Place) -> gpd.GeoDataFrame:
    if path.suffix.lower() == '.csv':
        return place_table(read_csv(path), path)
    table = read_vector(path, _REMEDY)
    if table.crs is None:
        raise SourceError(f'{path}: its geometries have no CRS; {_REMEDY}')
    table = table.to_crs('EPSG:4326')
    for name in {'start', 'end'} & set(table.columns):
        table[name] = pd.to_datetime(table[name], utc=True, errors='coerce')
    return table
