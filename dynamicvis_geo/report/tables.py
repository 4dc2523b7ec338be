"""Tables and notes of a report: the words and numbers of an output."""

from collections.abc import Iterator, Mapping
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import shapely
from numpy.typing import NDArray

from dynamicvis_geo.outputs import Failures, Output
from dynamicvis_geo.plotting.cartography import degrees
from dynamicvis_geo.plotting.footprints import split_parts, uncut
from dynamicvis_geo.provenance import METADATA_FILE
from dynamicvis_geo.terms import find

#: A line of a table: a name, and its value.
Row = tuple[str, str]

_SECTIONS = {
    'model': 'Model and preprocessing',
    'source': 'Images and chips',
    'run': 'Run',
    'processing:software': 'Versions',
}
_MOST_CRS = 12


def overview(output: Output, failures: Failures | None) -> list[Row]:
    """Count and bound what was made.

    Args:
        output: The output.
        failures: Chips without an embedding; None if none are listed.

    Returns:
        Names and values.
    """
    chips = output.chips
    kind = {
        'pooled': 'pooled embeddings, one vector a chip',
        'grid': 'feature maps, one vector a cell',
    }[output.kind]
    rows = [
        ('What', kind),
        ('Chips', f'{output.total:,}'),
        ('Failures', f'{len(failures.table):,}' if failures else 'none listed'),
        ('Length of a vector', f'{output.dimensions:,}'),
    ]
    if not len(chips):
        return rows
    rows += [
        ('Size of a chip', _size(output)),
        ('Dates', _dates(chips)),
        ('CRS', _crs(chips)),
        *_extent(chips),
        ('Valid fraction', _valid(chips['valid_fraction'])),
    ]
    return rows


def _extent(chips: gpd.GeoDataFrame) -> list[Row]:
    parts, _ = split_parts(chips.geometry.to_numpy())
    if not len(parts):
        return []
    west, south, east, north = shapely.total_bounds(uncut(parts))
    return [
        ('Longitudes', f'{degrees(west, "EW", 4)} to {degrees(east, "EW", 4)}'),
        ('Latitudes', f'{degrees(south, "NS", 4)} to {degrees(north, "NS", 4)}'),
    ]


def notes(
    output: Output, failures: Failures | None, vectors: NDArray[np.float32]
) -> list[str]:
    """List what a reader must know before using the output.

    Args:
        output: The output.
        failures: Chips without an embedding.
        vectors: Embeddings, or cells of feature maps, ``[N, D]``.

    Returns:
        Sentences; none if all is well.
    """
    found = []
    if not output.provenance:
        found.append(
            'The output carries no provenance: nobody can tell which weights and '
            'images made it.'
        )
    if output.kind == 'grid' and output.path.is_dir():
        if not (output.path / METADATA_FILE).is_file():
            found.append(
                f'The folder has no {METADATA_FILE}, which a run writes last: it was '
                'interrupted, or is still going on. Repeat the command to finish it.'
            )
        if len(output.chips) < output.total:
            found.append(
                f'Dates, places and fractions below are those of {len(output.chips):,} '
                f'of the {output.total:,} maps, at even distances.'
            )
    if not output.total:
        found.append('The output holds no chips.')
    broken = int((~np.isfinite(vectors).all(axis=1)).sum())
    if broken:
        found.append(f'{broken:,} of {len(vectors):,} vectors have NaN or infinity.')
    if failures is not None and len(failures.table):
        found.append(
            f'{len(failures.table):,} chips have no embedding: see Failures below.'
        )
    low = int((output.chips['valid_fraction'] < 0.5).sum())
    if low:
        found.append(
            f'{low:,} chips are less than half valid: their features are those of '
            'padding or masked pixels as much as of the image.'
        )
    return found


#: Names of the lines of a summary, and the way to their values in a provenance.
_SUMMARY = (
    ('Weights', ('model', 'backbone', 'weights')),
    ('Repository', ('model', 'backbone', 'repository')),
    ('Checkpoint', ('model', 'backbone', 'file')),
    ('Revision', ('model', 'backbone', 'revision')),
    ('SHA-256', ('model', 'backbone', 'sha256')),
    ('Architecture', ('model', 'backbone', 'arch')),
    ('Input size', ('model', 'preprocessing', 'resize')),
    ('Input size', ('model', 'backbone', 'img_size')),
    ('Input range', ('model', 'preprocessing', 'input_range')),
    ('Stage', ('model', 'stage')),
    ('Pooling', ('model', 'pooling')),
    ('Dataset', ('source', 'sources', 0, 'dataset')),
    ('Sensor', ('source', 'sources', 0, 'sensor')),
    ('Time windows', ('source', 'sources', 0, 'windows')),
    ('Made', ('processing:datetime',)),
    ('Version', ('processing:software', 'dynamicvis-geo')),
    ('Device', ('run', 'device')),
    ('Command', ('run', 'command')),
)


def summary(provenance: Mapping[str, Any]) -> list[Row]:
    """Pick what readers look for first in a provenance.

    Args:
        provenance: Of an output.

    Returns:
        Names and values.
    """
    found: dict[str, str] = {}
    for name, keys in _SUMMARY:
        value = find(provenance, *keys)
        if value is not None:
            found.setdefault(name, _text(value))
    return list(found.items())


def sections(provenance: Mapping[str, Any]) -> list[tuple[str, list[Row]]]:
    """Write a provenance completely, as tables.

    Args:
        provenance: Of an output.

    Returns:
        Title and rows of each.
    """
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


def _size(output: Output) -> str:
    sizes = output.chips[['width', 'height']].drop_duplicates().dropna()
    if sizes.empty:
        return 'not known'
    listed = [f'{width:.0f} x {height:.0f}' for width, height in sizes.to_numpy()[:4]]
    others = ' and others' if len(sizes) > len(listed) else ''
    unit = {'pooled': 'pixels', 'grid': 'cells'}[output.kind]
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
