"""An output opened again, whatever its format."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray
from pyproj import CRS

from dynamicvis_geo.datasets.footprints import footprints
from dynamicvis_geo.errors import SourceError, SpecError, one_line
from dynamicvis_geo.formats import format_at
from dynamicvis_geo.formats.base import Format
from dynamicvis_geo.paths import AnyPath, Place, input_path, kind_of, parquet_source
from dynamicvis_geo.store import failures_name
from dynamicvis_geo.terms import find

#: Chips of an output whose headers are read, at most, where each takes a file: 10 ms.
MAX_HEADERS = 5_000

# Columns that other software may leave out, with what stands for them.
_OPTIONAL: dict[str, Any] = {
    'crs': None,
    **dict.fromkeys(('minx', 'miny', 'maxx', 'maxy'), np.nan),
    **dict.fromkeys(('width', 'height', 'valid_fraction'), np.nan),
}


@dataclass(frozen=True)
class Failures:
    """The chips of a run that have no embedding.

    Attributes:
        path: File in which they are listed.
        table: ``id``, ``reason``, ``message`` and ``geometry``, EPSG:4326.
    """

    path: Place
    table: gpd.GeoDataFrame

    def __repr__(self) -> str:
        """Count them."""
        reasons = ', '.join(f'{count} {reason}' for reason, count in self.reasons)
        return f'<Failures: {reasons or "none"}; {self.path}>'

    @property
    def reasons(self) -> list[tuple[str, int]]:
        """Number of chips that failed for each reason, the most frequent first."""
        counts = self.table['reason'].value_counts()
        return [(str(reason), int(count)) for reason, count in counts.items()]


@dataclass(frozen=True)
class Output:
    """An output of this package.

    Attributes:
        path: File or folder; a URL is a ``UPath``.
        format: Its format, which reads it.
        chips: A row each chip, EPSG:4326: ``id``, ``crs``, ``minx`` to ``maxy``,
            ``width`` and ``height`` (pixels; of feature maps cells), ``start`` and
            ``end`` (UTC), ``valid_fraction``, ``centre_lon``, ``centre_lat`` and
            ``geometry``, of GeoTIFFs also ``file``; NaN or None where it is not known.
        total: Number of chips; of a folder of more than 5,000 GeoTIFFs, *chips* are
            5,000 of them, at even distances.
        dimensions: Length of an embedding.
        provenance: What made it; empty if the output does not say.
    """

    path: Place
    format: type[Format]
    chips: gpd.GeoDataFrame
    total: int
    dimensions: int
    provenance: dict[str, Any]

    def __repr__(self) -> str:
        """Say in two lines what it holds, and by which model."""
        model = find(self.provenance, 'model', 'backbone') or {}
        what = 'vectors' if self.kind == 'pooled' else 'feature maps'
        made = [f'arch {model["arch"]}'] if 'arch' in model else []
        if 'weights' in model:
            made.append(f'{model["weights"]} weights')
        return (
            f'<Output: {what} of {self.total:,} chips, {self.dimensions} numbers each, '
            f'{self.format.__name__}\n {", ".join([*made, str(self.path)])}>'
        )

    @property
    def kind(self) -> Literal['pooled', 'grid']:
        """'pooled' for a vector each chip, 'grid' for feature maps."""
        return self.format.output

    def embeddings(self) -> NDArray[np.float32]:
        """Read all embeddings of a pooled output, in the order of its chips.

        Returns:
            float32 ``[N, D]``, multiplied by their scale if they are stored as
            integers; a row is NaN where the output has none.

        Raises:
            SourceError: If they cannot be read, or differ in length.
        """
        rows = np.empty((self.total, self.dimensions), np.float32)
        start = 0
        for some in self.format.read_vectors(self.path):
            if some.shape[1] != self.dimensions:
                raise SourceError(
                    f'{self.path}: its files have embeddings of {self.dimensions} and '
                    f'of {some.shape[1]} numbers: keep those of one model in a folder'
                )
            rows[start : start + len(some)] = some
            start += len(some)
        return rows

    def maps(self, chips: pd.DataFrame) -> Iterator[NDArray[np.float32]]:
        """Yield the feature maps of chips, float32 ``[D, h, w]``, north up.

        Args:
            chips: Rows of :attr:`chips`.

        Raises:
            SourceError: If one cannot be read.
        """
        return self.format.read_maps(self.path, chips)

    def failures(self) -> Failures | None:
        """Read the list of failures beside it; None if there is none.

        Raises:
            SourceError: If it is there and cannot be read.
        """
        path = self.path.with_name(failures_name(self.path.name))
        if kind_of(path) is None:
            return None
        try:
            table = gpd.read_parquet(parquet_source(path))
        except (OSError, ValueError, pa.ArrowException) as error:
            raise SourceError(
                f'{path}: the list of failures cannot be read ({one_line(error)}); '
                'remove it to go on without it'
            ) from error
        absent = {'id': 'not told', 'reason': 'not told', 'message': ''}
        for name, word in absent.items():
            values = table[name] if name in table else pd.Series(None, table.index, str)
            table[name] = values.fillna(word).astype(str)
        table = table.rename(columns={table.geometry.name: 'geometry'})
        table = table.set_geometry('geometry')
        return Failures(path, table if table.crs is None else table.to_crs('EPSG:4326'))


def open_output(path: AnyPath, most: int = MAX_HEADERS) -> Output:
    """Read all but the features of an output.

    Args:
        path: A GeoParquet file of pooled embeddings or a folder of such, a folder of
            GeoTIFFs of feature maps or one of them, a Zarr store; or the URL of one.
        most: Chips whose headers are read, at most, where each takes a file.

    Raises:
        SourceError: If it is none of these, or cannot be read.
    """
    path = input_path(path)
    kind = kind_of(path)
    if kind is None:
        raise SourceError(
            f'{path}: no such file or folder; give what dynamicvis-geo embed wrote, a '
            '.parquet file or feature maps. An interrupted run has no output under its '
            'name yet: repeat it, and it continues'
        )
    form = format_at(path, kind == 'folder')
    if form is None:
        raise SourceError(
            f'{path}: no feature map (*.tif) and no *.parquet file in it; give what '
            'dynamicvis-geo embed wrote'
        )
    rows, total, dimensions = form.read_chips(path, most)
    if 'id' not in rows:
        raise SourceError(
            f'{path}: it has no column id; give a file of pooled embeddings that '
            'dynamicvis-geo embed wrote'
        )
    provenance = form.read_provenance(path)
    return Output(path, form, _completed(rows), total, dimensions, provenance)


def _completed(rows: pd.DataFrame) -> gpd.GeoDataFrame:
    """Return rows with all columns that :attr:`Output.chips` names."""
    if not isinstance(rows, gpd.GeoDataFrame):
        rows = gpd.GeoDataFrame(rows, geometry=_footprints(rows), crs='EPSG:4326')
    for name, absent in _OPTIONAL.items():
        if name not in rows:
            rows[name] = absent
    for name in ('start', 'end'):
        times = rows[name] if name in rows else pd.Series(pd.NaT, rows.index)
        rows[name] = pd.to_datetime(times, utc=True)
    if 'centre_lon' not in rows or 'centre_lat' not in rows:
        middle = rows.geometry.representative_point()
        rows['centre_lon'], rows['centre_lat'] = middle.x, middle.y
    return rows


def _footprints(rows: pd.DataFrame) -> NDArray[np.object_]:
    outlines = np.empty(len(rows), dtype=object)
    for name, those in rows.groupby('crs').indices.items():
        some = rows.iloc[those]
        outlines[those] = footprints(
            CRS.from_user_input(name),
            some[['minx', 'miny', 'maxx', 'maxy']].to_numpy(float),
            some[['height', 'width']].to_numpy(np.int64),
        )
    return outlines


def find_chip(chips: gpd.GeoDataFrame, chip: str) -> int:
    """Find the row of a chip by its id, the id of its point, or its number from 0.

    Args:
        chips: Rows of :attr:`Output.chips`.
        chip: Id of the chip or of its point, or its number, as text.

    Returns:
        The position of the row.

    Raises:
        SpecError: If there is none, or several have this id.
    """
    for column in ('id', 'point_id'):
        if column in chips:
            rows = np.flatnonzero(chips[column].astype(str) == chip)
            if len(rows) > 1:
                raise SpecError(
                    f'chip {chip!r} is the {column} of {len(rows)} chips; give the '
                    f'number of one, such as {rows[0]}'
                )
            if len(rows):
                return int(rows[0])
    if chip.isdecimal() and int(chip) < len(chips):
        return int(chip)
    some = ', '.join(chips['id'].astype(str).head(2))
    raise SpecError(
        f'chip {chip!r} is none of the {len(chips)} chips, such as {some}; give an id '
        f'or a number from 0 to {len(chips) - 1}'
    )


def recorded_bands(provenance: dict[str, Any]) -> tuple[int, int, int]:
    """Read the bands of the images that were embedded.

    Args:
        provenance: Of an output.

    Returns:
        Three numbers from 1; 1, 2, 3 if it is not said.
    """
    source = provenance.get('source')
    sources = source.get('sources') if isinstance(source, dict) else None
    for entry in sources if isinstance(sources, list) else []:
        match entry:
            case {'bands': [int(red), int(green), int(blue)]}:
                return red, green, blue
    return 1, 2, 3
