"""What a report says in words and numbers."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from dynamicvis_geo.errors import SourceError
from dynamicvis_geo.paths import Place, kind_of, parquet_source
from dynamicvis_geo.provenance import METADATA_FILE
from dynamicvis_geo.runs import Run

#: A line of a table: what it is, and its value.
Row = tuple[str, str]

_SECTIONS = {
    'model': 'Model and preprocessing',
    'source': 'Images and chips',
    'run': 'Run',
    'processing:software': 'Versions',
}
_MOST_CRS = 12


@dataclass(frozen=True)
class Failures:
    """The chips of a run that have no embedding.

    Attributes:
        path: where they are listed.
        table: ``id``, ``reason``, ``message`` and ``geometry``, EPSG:4326.
    """

    path: Place
    table: gpd.GeoDataFrame

    @property
    def reasons(self) -> list[tuple[str, int]]:
        """How many chips failed for each reason, the most frequent first."""
        counts = self.table['reason'].value_counts()
        return [(str(reason), int(count)) for reason, count in counts.items()]


def read_failures(output: Place) -> Failures | None:
    """Read the list of failures beside an output; None if there is none.

    Raises:
        SourceError: if it is there and cannot be read.
    """
    stem = output.name.removesuffix('.parquet')
    path = output.with_name(f'{stem}.failures.parquet')
    if kind_of(path) is None:
        return None
    try:
        table = gpd.read_parquet(parquet_source(path))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise SourceError(
            f'{path}: the list of failures cannot be read ({error}); remove it to '
            'report without it'
        ) from error
    for name, absent in (('id', 'not told'), ('reason', 'not told'), ('message', '')):
        values = table[name] if name in table else pd.Series(None, table.index, str)
        table[name] = values.fillna(absent).astype(str)
    table = table.rename(columns={table.geometry.name: 'geometry'})
    table = table.set_geometry('geometry')
    return Failures(path, table if table.crs is None else table.to_crs('EPSG:4326'))


def overview(run: Run, failures: Failures | None) -> list[Row]:
    """Say what was made."""
    chips = run.chips
    kind = {
        'pooled': 'pooled embeddings, one vector a chip',
        'grid': 'feature maps, one vector a cell',
    }[run.kind]
    rows = [
        ('What', kind),
        ('Chips', f'{run.total:,}'),
        ('Failures', f'{len(failures.table):,}' if failures else 'none listed'),
        ('Length of a vector', f'{run.dimensions:,}'),
    ]
    if not len(chips):
        return rows
    west, south, east, north = chips.total_bounds
    rows += [
        ('Size of a chip', _size(run)),
        ('Dates', _dates(chips)),
        ('CRS', _crs(chips)),
        ('Longitudes', f'{west:.4f} to {east:.4f}'),
        ('Latitudes', f'{south:.4f} to {north:.4f}'),
        ('Valid fraction', _valid(chips['valid_fraction'])),
    ]
    return rows


def notes(
    run: Run, failures: Failures | None, vectors: NDArray[np.float32]
) -> list[str]:
    """Say what a reader must know before using the output; empty if all is well.

    Args:
        run: the output.
        failures: chips without an embedding.
        vectors: embeddings, or cells of feature maps, ``[N, D]``.
    """
    found = []
    if not run.provenance:
        found.append(
            'The output carries no provenance: nobody can tell which weights and '
            'images made it.'
        )
    if run.kind == 'grid' and run.path.is_dir():
        if not (run.path / METADATA_FILE).is_file():
            found.append(
                f'The folder has no {METADATA_FILE}, which a run writes last: it was '
                'interrupted, or is still going on. Repeat the command to finish it.'
            )
        if len(run.chips) < run.total:
            found.append(
                f'Dates, places and fractions below are those of {len(run.chips):,} '
                f'of the {run.total:,} maps, at even distances.'
            )
    if not run.total:
        found.append('The output holds no chips.')
    broken = int((~np.isfinite(vectors).all(axis=1)).sum())
    if broken:
        found.append(f'{broken:,} of {len(vectors):,} vectors have NaN or infinity.')
    if failures is not None and len(failures.table):
        found.append(
            f'{len(failures.table):,} chips have no embedding: see Failures below.'
        )
    low = int((run.chips['valid_fraction'] < 0.5).sum())
    if low:
        found.append(
            f'{low:,} chips are less than half valid: their features are those of '
            'padding or masked pixels as much as of the image.'
        )
    return found


def random_weights(provenance: Mapping[str, Any]) -> bool:
    """Say whether the weights were random."""
    return 'random' in (
        _find(provenance, 'model', 'backbone', 'weights'),
        _find(provenance, 'model', 'weights'),
    )


def summary(provenance: Mapping[str, Any]) -> list[Row]:
    """Pick what readers look for first."""
    backbone = _find(provenance, 'model', 'backbone')
    if not isinstance(backbone, Mapping):
        backbone = {}
    preprocessing = _find(provenance, 'model', 'preprocessing')
    if not isinstance(preprocessing, Mapping):
        preprocessing = {}
    sources = _find(provenance, 'source', 'sources')
    first = sources[0] if isinstance(sources, list) and sources else {}
    wanted = [
        ('Weights', backbone.get('weights')),
        ('Repository', backbone.get('repository')),
        ('Checkpoint', backbone.get('file')),
        ('Revision', backbone.get('revision')),
        ('SHA-256', backbone.get('sha256')),
        ('Architecture', backbone.get('arch')),
        ('Input size', preprocessing.get('resize') or backbone.get('img_size')),
        ('Input range', preprocessing.get('input_range')),
        ('Pooling', _find(provenance, 'model', 'pooling')),
        ('Dataset', _find(first, 'dataset')),
        ('Sensor', _find(first, 'sensor')),
        ('Windows of time', _find(first, 'windows')),
        ('Made', provenance.get('processing:datetime')),
        ('Version', _find(provenance, 'processing:software', 'dynamicvis-geo')),
        ('Device', _find(provenance, 'run', 'device')),
        ('Command', _find(provenance, 'run', 'command')),
    ]
    return [(name, _text(value)) for name, value in wanted if value is not None]


def sections(provenance: Mapping[str, Any]) -> list[tuple[str, list[Row]]]:
    """Write a provenance completely, as tables."""
    tables = [
        (title, list(_flat(provenance[key])))
        for key, title in _SECTIONS.items()
        if key in provenance
    ]
    others = {k: v for k, v in provenance.items() if k not in _SECTIONS}
    if others:
        tables.append(('Other', list(_flat(others))))
    return tables


def _flat(value: Any, name: str = '') -> Iterator[Row]:
    """Name each value by the way to it."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flat(item, f'{name}: {key}' if name else str(key))
    elif isinstance(value, list) and any(isinstance(i, Mapping | list) for i in value):
        for number, item in enumerate(value, 1):
            yield from _flat(item, f'{name} {number}'.strip())
    else:
        yield name or 'value', _text(value)


def _text(value: Any) -> str:
    match value:
        case None:
            return 'none'
        case bool():
            return 'yes' if value else 'no'
        case Mapping():
            return '; '.join(f'{k}: {_text(v)}' for k, v in value.items()) or 'none'
        case list():
            return ', '.join(map(_text, value)) or 'none'
        case float():
            return f'{value:g}'
        case _:
            return str(value)


def _find(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _size(run: Run) -> str:
    sizes = run.chips[['width', 'height']].drop_duplicates().dropna()
    if sizes.empty:
        return 'not known'
    listed = [f'{width:.0f} x {height:.0f}' for width, height in sizes.to_numpy()[:4]]
    others = ' and others' if len(sizes) > len(listed) else ''
    unit = {'pooled': 'pixels', 'grid': 'cells'}[run.kind]
    return f'{", ".join(listed)}{others} {unit}'


def _dates(chips: pd.DataFrame) -> str:
    dated = chips[chips['start'].notna()]
    if dated.empty:
        return 'not dated'
    first, last = dated['start'].min(), dated['end'].max()
    windows = len(dated[['start', 'end']].drop_duplicates())
    text = f'{first:%Y-%m-%d}'
    if pd.notna(last) and f'{last:%Y-%m-%d}' != text:
        text += f' to {last:%Y-%m-%d}'
    if windows > 1:
        text += f', {windows:,} time windows'
    undated = len(chips) - len(dated)
    return f'{text}; {undated:,} chips are not dated' if undated else text


def _crs(chips: pd.DataFrame) -> str:
    counts = chips['crs'].fillna('not told').value_counts()
    # A CRS without a code is written as many lines of WKT.
    names = [
        name if len(name) <= 60 else f'{name[:57]}...'
        for name in map(str, counts.index)
    ]
    listed = [
        f'{name} ({count:,})'
        for name, count in zip(names, counts.tolist(), strict=True)
    ]
    others = len(listed) - _MOST_CRS
    text = ', '.join(listed[:_MOST_CRS])
    return f'{text} and {others} more' if others > 0 else text


def _valid(fractions: pd.Series) -> str:
    known = fractions.dropna()
    if known.empty:
        return 'not known'
    text = (
        f'mean {known.mean():.3f}, lowest {known.min():.3f}; '
        f'{int((known >= 1).sum()):,} chips are fully valid'
    )
    unknown = len(fractions) - len(known)
    return f'{text}; not known of {unknown:,}' if unknown else text
