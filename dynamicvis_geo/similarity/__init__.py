"""Places that are like others, by the similarity of their embeddings.

How similar a chip or a cell is to examples is the mean of the cosines of its embedding
and those of the examples; with counter-examples, less the mean of the cosines with
those.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.paths import AnyPath
from dynamicvis_geo.provenance import PROVENANCE_KEY, to_json
from dynamicvis_geo.settings import check_same_settings
from dynamicvis_geo.similarity.collections import Collection, open_collection
from dynamicvis_geo.similarity.examples import (
    Example,
    Examples,
    find_examples,
)
from dynamicvis_geo.similarity.search import direction_of, most_similar

#: Length of a direction that is left of rounding alone.
_NOWHERE = 1e-6

__all__ = ('Example', 'Examples', 'Similar', 'find_similar', 'search')


@dataclass(frozen=True)
class Similar:
    """The chips or cells that are most similar to examples.

    Attributes:
        table: A row each, the most similar first, EPSG:4326: ``similarity``; ``file``
            and ``row``, its number in that; ``id`` of the chip, of a cell also
            ``cell_row`` and ``cell_column`` in the chip, from its north-west corner;
            ``lon`` and ``lat`` of its centre; and all else that is known of it.
        vectors: Their embeddings, float32 ``[k, D]``.
        pictured: The chip of each row.
        like: The examples.
        unlike: The counter-examples.
        provenance: What made the embeddings; empty if they do not say.
    """

    table: gpd.GeoDataFrame
    vectors: NDArray[np.float32]
    pictured: pd.DataFrame
    like: Examples
    unlike: Examples
    provenance: Mapping[str, Any]

    def __repr__(self) -> str:
        """Say in one line how many there are, and how similar."""
        cells = 'cell_row' in self.table
        best, least = self.table['similarity'].iloc[[0, -1]]
        return (
            f'<Similar: {len(self.table)} {"cells" if cells else "chips"}, similarity '
            f'{best:.4f} to {least:.4f}, of {len(self.vectors[0])} numbers each>'
        )

    def write(self, path: AnyPath) -> None:
        """Write the table, with the embeddings as GeoParquet, without as CSV.

        The GeoParquet is a file of embeddings itself, which all that reads those takes,
        as examples for another search, too.

        Args:
            path: File; ``.csv`` or, with any other name, GeoParquet.
        """
        if str(path).lower().endswith('.csv'):
            self.table.drop(columns='geometry').to_csv(path, index=False)
            return
        content = pa.BufferOutputStream()
        self.table.to_parquet(content, index=False, write_covering_bbox=True)
        table = pq.read_table(pa.BufferReader(content.getvalue()))
        flat = pa.array(self.vectors.reshape(-1))
        vectors = pa.FixedSizeListArray.from_arrays(flat, self.vectors.shape[1])
        table = table.append_column('embedding', vectors)
        if self.provenance:
            told = {PROVENANCE_KEY: to_json(self.provenance)}
            table = table.replace_schema_metadata({**table.schema.metadata, **told})
        pq.write_table(table, path, compression='zstd')


def find_similar(
    paths: AnyPath | list[AnyPath],
    like: Example | list[Example],
    unlike: Example | list[Example] | None = None,
    k: int = 50,
    *,
    keep_examples: bool = False,
) -> Similar:
    """Find the chips or cells of outputs that are most similar to examples.

    Args:
        paths: Pooled embeddings, in which a row is a chip, or feature maps, in which it
            is a cell; one or several, made with the same settings.
        like: One example or a list of some: the id of a chip or of its point (of
            several dates, all; in maps, all cells of the chip), ``(lon, lat)`` or
            'LON,LAT' in degrees (the chip or cell that contains the place, of several
            the one with the nearest centre; of several dates, all), the number of a
            chip, counted through all *paths* from 0, vectors ``[D]`` or ``[n, D]``, or
            a file: embeddings made with the same settings, or points in a CSV or vector
            file.
        unlike: Counter-examples, likewise.
        k: How many, fewer if there are fewer.
        keep_examples: Whether examples are among those that are found, which leaves
            them out otherwise.

    Returns:
        What was found; equals are in the order of their rows.

    Raises:
        SpecError: If an example is not there, or was made with other settings.
        SourceError: If a file cannot be read.
    """
    several = paths if isinstance(paths, list) else [paths]
    collections = [open_collection(path) for path in several]
    return search(collections, like, unlike, k, keep_examples)


def search(
    collections: Sequence[Collection],
    like: Example | list[Example],
    unlike: Example | list[Example] | None,
    k: int,
    keep_examples: bool,
) -> Similar:
    """Search collections that are open, as :func:`find_similar`.

    Args:
        collections: At least one.
        like: Examples.
        unlike: Counter-examples.
        k: How many.
        keep_examples: Whether examples are found, too.
    """
    if k < 1:
        raise SpecError(f'k={k} is not positive: ask for one or more')
    first, *others = collections
    for one in others:
        check_same_settings(first.path, first.provenance, one.path, one.provenance)
        if one.dimensions != first.dimensions:
            raise SpecError(
                f'{one.path} has embeddings of {one.dimensions} numbers, {first.path} '
                f'of {first.dimensions}: search those of one model'
            )
    wanted = find_examples(like, collections, 'like')
    unwanted = find_examples([] if unlike is None else unlike, collections, 'unlike')
    examples = wanted.all_vectors()
    if not len(examples):
        raise SpecError('like= names no example: give at least one')
    direction = direction_of(examples, unwanted.all_vectors())
    if np.linalg.norm(direction) < _NOWHERE:
        raise SpecError(
            'unlike=: examples and counter-examples point into the same direction, so '
            'that nothing is more like the ones than the others: choose others'
        )
    found = []
    for i, one in enumerate(collections):
        known = [*wanted.named(i), *unwanted.named(i)]
        without = np.empty(0, np.int64) if keep_examples else np.concatenate(known)
        rows, values = most_similar(one.blocks(), direction, k, without)
        found.append(pd.DataFrame({'similarity': values, 'file': i, 'row': rows}))
    # The order of files and rows stays among equals.
    best = pd.concat(found, ignore_index=True).sort_values(
        'similarity', ascending=False, kind='stable', ignore_index=True
    )
    return _described(collections, best.head(k), wanted, unwanted)


def _described(
    collections: Sequence[Collection],
    best: pd.DataFrame,
    wanted: Examples,
    unwanted: Examples,
) -> Similar:
    tables, pictured = [], []
    vectors = np.empty((len(best), collections[0].dimensions), np.float32)
    for number, one in enumerate(collections):
        some = best[best['file'] == number]
        rows = some['row'].to_numpy()
        if not len(rows):
            continue
        vectors[some.index] = one.vectors(rows)
        about = some.assign(file=str(one.path))
        # What was found by an earlier search has these columns, too.
        known = one.table(rows).drop(columns=[*some.columns], errors='ignore')
        tables.append(about.join(known.set_index(some.index)))
        pictured.append(one.pictured(rows).set_index(some.index))
    if not tables:
        raise SpecError(
            'like= names all there is, so that nothing else can be like it: search '
            'more embeddings, or keep the examples (keep_examples=True)'
        )
    table = gpd.GeoDataFrame(pd.concat(tables).sort_index(), crs='EPSG:4326')
    return Similar(
        table,
        vectors,
        pd.concat(pictured).sort_index(),
        wanted,
        unwanted,
        collections[0].provenance,
    )
