"""Labels from other files, joined to embeddings by id or by place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dynamicvis_geo.datasets.label_files import (
    LabelSource,
    has_places,
    label_geometries,
    name_of,
    read_labels,
)
from dynamicvis_geo.datasets.label_places import (
    centres_of,
    containing_pairs,
    inside_pairs,
    nearest_pairs,
)
from dynamicvis_geo.datasets.points import NAMED
from dynamicvis_geo.errors import SpecError

HOWS = ('auto', 'id', 'nearest', 'within')

#: Columns that name a chip or its point: in the labels, and in a file of embeddings.
_LABEL_IDS = ('id', 'chip_id', 'point_id')
_CHIP_IDS = ('point_id', 'id')

Pairs = NDArray[np.int64]


@dataclass(frozen=True)
class JoinedLabels:
    """The chips that have a label.

    Attributes:
        rows: int64 ``[n]``, position of each such chip in the table, ascending.
        values: The label of each, ``[n]``, none missing; named as the target.
        labels: The row of the labels that each came from, ``[n]``.
        how: 'id', 'nearest' or 'within'.
        unmatched: Names of the chips that have no label.
        unused: Number of labels that no chip has.
        missing: Number of labels without a value, which were left out.
        description: All this in words.
    """

    rows: NDArray[np.int64]
    values: pd.Series
    labels: pd.DataFrame
    how: str
    unmatched: tuple[str, ...]
    unused: int
    missing: int
    description: str


def join_labels(
    table: pd.DataFrame,
    labels: LabelSource,
    target: str,
    how: str = 'auto',
    on: str | Sequence[str] | None = None,
    max_distance_m: float | None = None,
) -> JoinedLabels:
    """Find the label of each chip.

    * 'id': a column of the labels holds the chip's ``id`` or ``point_id``.
    * 'nearest': of point labels, the one nearest to the centre of the chip, if it is
      within *max_distance_m* along the ground.
    * 'within': polygon labels that contain the centre of the chip; or point labels in
      the footprint of the chip, of which the one nearest to its centre counts.
    * 'auto': 'id' if at least half of the chips or of the labels match by it, or the
      labels have no places; else 'nearest' if *max_distance_m* is given, else 'within'.

    Labels without a value are left out first. Where several labels belong to a chip
    (same id, same distance, overlapping polygons) they must agree.

    Args:
        table: Chips: :attr:`~dynamicvis_geo.PooledEmbeddings.table`.
        labels: A CSV file, a Parquet file, any vector file that GeoPandas reads, or a
            table. To join by place they need geometries, or columns lon and lat.
        target: Column of the labels.
        how: 'auto', 'id', 'nearest' or 'within'.
        on: Column of the labels that holds the ids; or a pair: column of *table*,
            column of the labels. None tries ``id``, ``chip_id`` and ``point_id``.
        max_distance_m: Greatest distance for 'nearest', metres.

    Returns:
        The chips that have a label, and what was left over.

    Raises:
        SourceError: If the labels cannot be read, or have no usable places.
        SpecError: If an argument cannot be used, no chip has a label, or a chip has
            several that differ.
    """
    _check(how, on, max_distance_m)
    source = name_of(labels)
    everything = read_labels(labels, _text_columns(on))
    if target not in everything:
        raise SpecError(
            f'{source}: no column {target!r} of labels; name one of its columns: '
            f'{", ".join(map(str, everything.columns))}'
        )
    found = everything[everything[target].notna()].reset_index(drop=True)
    if found.empty:
        raise SpecError(
            f'{source}: column {target!r} has no values, all are missing: name another '
            'column'
        )
    if how == 'auto':
        how = _choose(table, found, on, max_distance_m)
    if how == 'id':
        pairs, by = _pairs_by_id(table, found, on, source)
    else:
        pairs, by = _pairs_by_place(table, found, how, max_distance_m, source)
    if not len(pairs):
        raise SpecError(_none_matched(table, found, source, by))
    pairs = _agreed(table, found[target], pairs, source)
    return _joined(table, found, target, how, pairs, len(everything), source, by)


def _check(
    how: str, on: str | Sequence[str] | None, max_distance_m: float | None
) -> None:
    if how not in HOWS:
        raise SpecError(f'how={how!r} is none of {", ".join(HOWS)}')
    if on is not None and not isinstance(on, str) and len(on) != 2:
        raise SpecError(
            f'on={on!r} must be a column of the labels, or a pair: column of the '
            'embeddings, column of the labels'
        )
    if on is not None and how not in ('auto', 'id'):
        raise SpecError(f"on={on!r} is for how='id', not for how={how!r}")
    if max_distance_m is None:
        if how == 'nearest':
            raise SpecError(
                "how='nearest' needs max_distance_m: how far from the centre of a chip "
                'its label may lie, in metres'
            )
    elif not (np.isfinite(max_distance_m) and max_distance_m >= 0):
        raise SpecError(f'max_distance_m={max_distance_m!r} must be a length in metres')
    elif how not in ('auto', 'nearest'):
        raise SpecError(
            f"max_distance_m={max_distance_m:g} is for how='nearest', not for "
            f'how={how!r}'
        )


def _text_columns(on: str | Sequence[str] | None) -> tuple[str, ...]:
    if on is None:
        return _LABEL_IDS
    return (on if isinstance(on, str) else on[1],)


def _choose(
    table: pd.DataFrame,
    labels: pd.DataFrame,
    on: str | Sequence[str] | None,
    max_distance_m: float | None,
) -> str:
    """Return how to join where the user leaves it open."""
    if on is not None or not has_places(labels):
        return 'id'
    for chip_column, label_column in _id_columns(table, labels, on):
        chips, names = _names(table[chip_column]), _names(labels[label_column])
        share = max(chips.isin(set(names)).mean(), names.isin(set(chips)).mean())
        if share >= 0.5:
            return 'id'
    return 'within' if max_distance_m is None else 'nearest'


def _id_columns(
    table: pd.DataFrame, labels: pd.DataFrame, on: str | Sequence[str] | None
) -> list[tuple[str, str]]:
    """Return the pairs of columns that may hold the same ids."""
    if on is None or isinstance(on, str):
        wanted = _LABEL_IDS if on is None else (on,)
        pairs = [(chip, label) for label in wanted for chip in _CHIP_IDS]
    else:
        pairs = [(on[0], on[1])]
    return [(chip, label) for chip, label in pairs if chip in table and label in labels]


def _pairs_by_id(
    table: pd.DataFrame,
    labels: pd.DataFrame,
    on: str | Sequence[str] | None,
    source: str,
) -> tuple[Pairs, str]:
    columns = _id_columns(table, labels, on)
    if not columns:
        wanted = _LABEL_IDS if on is None else _text_columns(on)
        raise SpecError(
            f'{source}: there is no column {" or ".join(wanted)} of ids to join by'
            f'{_where(table, on)}; its columns are '
            f'{", ".join(map(str, labels.columns))}: name it with on='
        )
    found = [
        (_same_names(table[chip], labels[label]), f"by id (column '{label}')")
        for chip, label in columns
    ]
    # The columns that match most chips.
    return max(found, key=lambda pairs: len(np.unique(pairs[0][:, 0])))


def _where(table: pd.DataFrame, on: str | Sequence[str] | None) -> str:
    if on is None or isinstance(on, str) or on[0] in table:
        return ''
    return f', or the embeddings have no column {on[0]!r}'


def _same_names(chips: pd.Series, labels: pd.Series) -> Pairs:
    left = pd.DataFrame({'name': _names(chips), 'chip': np.arange(len(chips))})
    right = pd.DataFrame({'name': _names(labels), 'label': np.arange(len(labels))})
    pairs = (
        left.dropna().merge(right.dropna(), on='name').sort_values(['chip', 'label'])
    )
    return pairs[['chip', 'label']].to_numpy(np.int64)


def _names(ids: pd.Series) -> pd.Series:
    """Return ids as texts; whole numbers without decimals."""
    if pd.api.types.is_float_dtype(ids) and (ids.dropna() % 1 == 0).all():
        ids = ids.astype('Int64')
    return ids.astype(str).str.strip().where(ids.notna().to_numpy())


def _pairs_by_place(
    table: pd.DataFrame,
    labels: pd.DataFrame,
    how: str,
    max_distance_m: float | None,
    source: str,
) -> tuple[Pairs, str]:
    places = label_geometries(labels, source)
    centres = centres_of(table)
    are_points = (places.geom_type == 'Point').all()
    if max_distance_m is not None:
        if not are_points:
            raise SpecError(
                f"{source}: labels are polygons, and how='nearest' is for points: use "
                "how='within', without max_distance_m"
            )
        pairs = nearest_pairs(centres, _lonlat(places), max_distance_m)
        return pairs, f'to the nearest point within {max_distance_m:g} m'
    if not are_points:
        return containing_pairs(centres, places), 'to polygons around chip centres'
    if not isinstance(table, gpd.GeoDataFrame):
        raise SpecError(
            'table has no footprints, which point labels are to lie within: give '
            "PooledEmbeddings.table, or use how='nearest'"
        )
    pairs = inside_pairs(centres, table.geometry, _lonlat(places))
    return pairs, 'to points within footprints'


def _lonlat(points: gpd.GeoSeries) -> NDArray[np.float64]:
    return np.stack([points.x, points.y], axis=1)


def _agreed(table: pd.DataFrame, values: pd.Series, pairs: Pairs, source: str) -> Pairs:
    """Keep one label a chip, after making sure that all of them say the same."""
    chips, first, which = np.unique(pairs[:, 0], return_index=True, return_inverse=True)
    if len(chips) == len(pairs):
        return pairs
    _, codes = np.unique(
        [repr(_plain(value)) for value in values.iloc[pairs[:, 1]]], return_inverse=True
    )
    differ = np.flatnonzero(codes != codes[first][which])
    if len(differ):
        chip = pairs[differ[0], 0]
        several = pairs[pairs[:, 0] == chip, 1]
        shown = ', '.join(
            f'{values.iloc[label]} (label {label + 1})' for label in several[:NAMED]
        )
        count = len(np.unique(pairs[differ, 0]))
        raise SpecError(
            f'{source}: {count} chip{"s" * (count != 1)} would have different labels, '
            f'such as {_chip_names(table)[chip]}: {shown}; remove all but one'
        )
    return pairs[first]


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _chip_names(table: pd.DataFrame) -> pd.Series:
    names = table['id'] if 'id' in table else table.index.to_series()
    return names.astype(str).reset_index(drop=True)


def _none_matched(
    table: pd.DataFrame, labels: pd.DataFrame, source: str, by: str
) -> str:
    chips = ', '.join(_chip_names(table).head(2))
    hint = f'chips are named like {chips}'
    if 'point_id' in table:
        hint += f', their points like {", ".join(map(str, table["point_id"].head(2)))}'
    if 'centre_lon' in table and 'centre_lat' in table:
        first = table.iloc[0]
        hint += (
            f'; the first lies at lon={first["centre_lon"]:.5f}, '
            f'lat={first["centre_lat"]:.5f}'
        )
    return (
        f'{source}: joined {by}, none of {len(labels)} labels belongs to any of '
        f'{len(table)} chips ({hint}): see how=, on= and max_distance_m='
    )


def _joined(
    table: pd.DataFrame,
    labels: pd.DataFrame,
    target: str,
    how: str,
    pairs: Pairs,
    count: int,
    source: str,
    by: str,
) -> JoinedLabels:
    rows, chosen = pairs.T
    without = np.ones(len(table), dtype=bool)
    without[rows] = False
    unmatched = tuple(_chip_names(table)[without])
    missing = count - len(labels)
    unused = len(labels) - len(np.unique(chosen))
    parts = [f'{source}: joined {by}, {len(rows)} of {len(table)} chips have a label']
    if unmatched:
        more = ', ...' if len(unmatched) > NAMED else ''
        parts.append(f'without one: {", ".join(unmatched[:NAMED])}{more}')
    if unused:
        parts.append(f'{unused} of {len(labels)} labels are not used')
    if missing:
        parts.append(f'{missing} labels have no value in {target!r} and were left out')
    beside = labels.iloc[chosen].reset_index(drop=True)
    return JoinedLabels(
        rows, beside[target], beside, how, unmatched, unused, missing, '; '.join(parts)
    )
