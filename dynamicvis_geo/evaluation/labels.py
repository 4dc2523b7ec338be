"""Labels from other files, joined to embeddings by id or by place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dynamicvis_geo.datasets.vector_files import EXAMPLES, read_by_gdal, read_csv
from dynamicvis_geo.errors import SourceError, SpecError, one_line
from dynamicvis_geo.evaluation.label_places import has_places, pairs_by_place
from dynamicvis_geo.paths import AnyPath, Place, input_path, kind_of, parquet_source

LabelSource: TypeAlias = AnyPath | pd.DataFrame

#: Ways to join.
HOWS = ('auto', 'id', 'nearest', 'within')

#: Columns that name a chip or its point: in the labels, and in a file of embeddings.
_LABEL_IDS = ('id', 'chip_id', 'point_id')
_CHIP_IDS = ('point_id', 'id')


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

    def __repr__(self) -> str:
        """Say it in words."""
        return f'<JoinedLabels {self.values.name!r}: {self.description}>'


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
    source = 'labels' if isinstance(labels, pd.DataFrame) else str(labels)
    everything = _read(labels, source, _label_columns(on))
    if target not in everything:
        raise SpecError(
            f'{source}: no column {target!r} of labels; name one of its columns: '
            f'{_listed(everything.columns)}'
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
        pairs, by = pairs_by_place(table, found, max_distance_m, source)
    if pairs.empty:
        raise SpecError(_none_matched(table, found, source, by))
    names = _chip_names(table)
    pairs = pairs.sort_values(['chip', 'label'])
    _check_agreement(names, found[target], pairs, source)
    rows, chosen = pairs.drop_duplicates('chip')[['chip', 'label']].to_numpy().T
    beside = found.iloc[chosen].reset_index(drop=True)
    unmatched = tuple(names.drop(rows))
    unused = len(found) - len(np.unique(chosen))
    missing = len(everything) - len(found)
    parts = [f'{source}: joined {by}, {len(rows)} of {len(table)} chips have a label']
    if unmatched:
        parts.append(f'without one: {_listed(unmatched, EXAMPLES)}')
    if unused:
        parts.append(f'{unused} of {len(found)} labels are not used')
    if missing:
        parts.append(f'{missing} labels have no value in {target!r} and were left out')
    return JoinedLabels(
        rows, beside[target], beside, how, unmatched, unused, missing, '; '.join(parts)
    )


def labels_file(path: AnyPath) -> Place:
    """Return the path of a file of labels.

    Raises:
        SourceError: If there is no such file.
    """
    path = input_path(path)
    if kind_of(path) is None:
        raise SourceError(
            f'{path}: no such file; give a CSV, a Parquet file or a vector file'
        )
    return path


def _read(labels: LabelSource, source: str, text: Iterable[str]) -> pd.DataFrame:
    """Read a table of labels, ids in a CSV as they are written; rows count from 0."""
    if isinstance(labels, pd.DataFrame):
        table = labels
    else:
        path = labels_file(labels)
        try:
            table = _read_file(path, text)
        except (OSError, RuntimeError, ValueError, pa.ArrowException) as error:
            raise SourceError(
                f'{path}: GeoPandas cannot read it ({one_line(error)}); give a CSV, a '
                'Parquet file or a vector file'
            ) from error
    if table.empty:
        raise SourceError(f'{source}: there are no labels')
    return table.reset_index(drop=True)


def _read_file(path: Place, text: Iterable[str]) -> pd.DataFrame:
    suffix = path.suffix.lower()
    if suffix == '.csv':
        return read_csv(path, text)
    if suffix not in ('.parquet', '.geoparquet'):
        return read_by_gdal(path)
    geographic = b'geo' in (pq.read_schema(parquet_source(path)).metadata or {})
    table: pd.DataFrame = (gpd if geographic else pd).read_parquet(parquet_source(path))
    return table


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


def _label_columns(on: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the columns of the labels that may hold ids."""
    if on is None:
        return _LABEL_IDS
    return (on if isinstance(on, str) else on[1],)


def _id_columns(
    table: pd.DataFrame, labels: pd.DataFrame, on: str | Sequence[str] | None
) -> list[tuple[str, str]]:
    """Return the pairs of columns that may hold the same ids, those that exist."""
    chip_columns = _CHIP_IDS if on is None or isinstance(on, str) else (on[0],)
    return [
        (chip, label)
        for label in _label_columns(on)
        for chip in chip_columns
        if chip in table and label in labels
    ]


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
        if max(chips.isin(set(names)).mean(), names.isin(set(chips)).mean()) >= 0.5:
            return 'id'
    return 'within' if max_distance_m is None else 'nearest'


def _pairs_by_id(
    table: pd.DataFrame,
    labels: pd.DataFrame,
    on: str | Sequence[str] | None,
    source: str,
) -> tuple[pd.DataFrame, str]:
    columns = _id_columns(table, labels, on)
    if not columns:
        also = ''
        if on is not None and not isinstance(on, str) and on[0] not in table:
            also = f', or the embeddings have no column {on[0]!r}'
        raise SpecError(
            f'{source}: there is no column {" or ".join(_label_columns(on))} of ids to '
            f'join by{also}; its columns are {_listed(labels.columns)}: name it with '
            'on='
        )
    found = [
        (_same_names(table[chip], labels[label]), f"by id (column '{label}')")
        for chip, label in columns
    ]
    # The columns that match most chips.
    return max(found, key=lambda pairs: pairs[0]['chip'].nunique())


def _same_names(chips: pd.Series, labels: pd.Series) -> pd.DataFrame:
    left = pd.DataFrame({'name': _names(chips), 'chip': np.arange(len(chips))})
    right = pd.DataFrame({'name': _names(labels), 'label': np.arange(len(labels))})
    return left.dropna().merge(right.dropna(), on='name')[['chip', 'label']]


def _names(ids: pd.Series) -> pd.Series:
    """Return ids as texts; whole numbers without decimals."""
    if pd.api.types.is_float_dtype(ids) and (ids.dropna() % 1 == 0).all():
        ids = ids.astype('Int64')
    return ids.astype(str).str.strip().where(ids.notna().to_numpy())


def _check_agreement(
    names: pd.Series, values: pd.Series, pairs: pd.DataFrame, source: str
) -> None:
    """Refuse labels of one chip that say different things."""
    several = pairs[pairs['chip'].duplicated(keep=False)]
    told = several['label'].map(lambda label: repr(_plain(values.iloc[label])))
    differ = several[told.groupby(several['chip']).transform('nunique') > 1]
    if differ.empty:
        return
    chip = differ['chip'].iloc[0]
    shown = ', '.join(
        f'{values.iloc[label]} (label {label + 1})'
        for label in differ['label'][differ['chip'] == chip][:EXAMPLES]
    )
    count = differ['chip'].nunique()
    raise SpecError(
        f'{source}: {count} chip{"s" * (count != 1)} would have different labels, '
        f'such as {names[chip]}: {shown}; remove all but one'
    )


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _chip_names(table: pd.DataFrame) -> pd.Series:
    names = table['id'] if 'id' in table else table.index.to_series()
    return names.astype(str).reset_index(drop=True)


def _none_matched(
    table: pd.DataFrame, labels: pd.DataFrame, source: str, by: str
) -> str:
    hint = f'chips are named like {_listed(_chip_names(table).head(2))}'
    if 'point_id' in table:
        hint += f', their points like {_listed(table["point_id"].head(2))}'
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


def _listed(names: Iterable[Any], most: int | None = None) -> str:
    shown = [str(name) for name in names]
    more = most is not None and len(shown) > most
    return ', '.join([*shown[:most], *['...'] * more])
