"""Pooled embeddings as a dataset."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torchgeo.datasets import NonGeoDataset

from dynamicvis_geo.datasets.source import Sample
from dynamicvis_geo.datasets.targets import Labels, encode_labels
from dynamicvis_geo.errors import SourceError, SpecError, one_line
from dynamicvis_geo.formats.geoparquet import (
    find_parts,
    read_schema,
    shared_provenance,
    table_columns,
)
from dynamicvis_geo.formats.mapped_vectors import map_vectors
from dynamicvis_geo.paths import AnyPath, Place, input_path, parquet_source
from dynamicvis_geo.similarity import Example, search
from dynamicvis_geo.similarity.collections import Chips


class PooledEmbeddings(NonGeoDataset):
    """The vectors that :class:`~dynamicvis_geo.EmbeddingWriter` wrote, one a chip.

    A sample holds ``embedding``, float32 ``[D]``; ``index``, int64 ``[1]``, the row in
    :attr:`table`; and, if there is a target, ``label``: int64 ``[]`` for classes,
    float32 ``[]`` for quantities, float32 ``[C]`` of 0 and 1 for several classes at
    once.

    The vectors are decoded once, into a file from which they are mapped into memory:
    opening takes no memory to speak of, however many there are, and worker processes
    share it. The file is ``.NAME.*.npy``, beside the embeddings where that is a local
    folder that can be written to, else in ``~/.cache/dynamicvis_geo``; it may be
    removed at any time, and is replaced when the embeddings change.

    Attributes:
        embeddings: All vectors, float32 ``[N, D]``, memory-mapped, read-only.
        rows: int64 ``[n]``, the row of each sample; all, or those with a label.
        labels: The labels of the samples, and what they mean; None without a target.
        columns: Names of the columns of :attr:`table`.
    """

    embeddings: NDArray[np.float32]

    def __init__(
        self,
        path: AnyPath,
        target: str | None = None,
        transforms: Callable[[Sample], Sample] | None = None,
    ) -> None:
        """Open a file of embeddings.

        Embeddings stored as float16, or as int8 with a column ``scale`` (value = int8 x
        scale), are read as float32.

        Args:
            path: A GeoParquet file of pooled embeddings, or a folder of its parts; or
                the URL of one.
            target: Column of the file that holds the labels: texts, booleans or whole
                numbers are classes, other numbers quantities, lists several classes at
                once. Rows without a label are left out, with a warning.
            transforms: A function of a sample that returns a transformed sample.

        Raises:
            SourceError: If there is no such file, or its embeddings cannot be used.
            SpecError: If there is no column *target*, or it has no labels.
            OutputError: If the vectors cannot be written anywhere to map them.
        """
        self.path = input_path(path)
        self.transforms = transforms
        self._parts = find_parts(self.path)
        self.columns = table_columns(read_schema(self._parts[0])[0])
        self.provenance = shared_provenance(self._parts)
        self._mapped = map_vectors(self.path, self._parts)
        self.embeddings = np.load(self._mapped, mmap_mode='r')
        self.rows: NDArray[np.int64] = np.arange(len(self.embeddings), dtype=np.int64)
        self.labels: Labels | None = None
        self._table: gpd.GeoDataFrame | None = None
        if target is not None:
            self.rows, values = self.labelled(target)
            self.labels = encode_labels(values)

    def __repr__(self) -> str:
        """Count the vectors."""
        shape = f'{len(self):,} vectors of {self.embeddings.shape[1]} numbers'
        labels = '' if self.labels is None else f', labels of {self.labels.task}'
        return f'<PooledEmbeddings: {shape}{labels}, {self.path}>'

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        """Return one sample.

        Raises:
            IndexError: If there is no such sample.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f'sample {index} of {len(self)} samples')
        batch = self.batch([index])
        sample = {name: value[0] for name, value in batch.items()}
        sample['index'] = batch['index']
        return sample if self.transforms is None else self.transforms(sample)

    def batch(self, indices: Sequence[int] | NDArray[np.int64]) -> Sample:
        """Return many samples at once, as a DataLoader collates them.

        Args:
            indices: Which samples.

        Returns:
            ``embedding`` float32 ``[B, D]``, ``index`` int64 ``[B]``, and ``label`` if
            there is a target. Transforms are not applied.
        """
        chosen = np.asarray(indices, np.int64)
        rows = self.rows[chosen]
        batch = {
            'embedding': torch.from_numpy(np.array(self.embeddings[rows])),
            'index': torch.from_numpy(rows),
        }
        if self.labels is not None:
            batch['label'] = torch.from_numpy(np.array(self.labels.values[chosen]))
        return batch

    def select(
        self, rows: NDArray[np.int64], labels: Labels | None = None
    ) -> PooledEmbeddings:
        """Return the samples of some rows, on the same mapped vectors.

        Args:
            rows: Rows of :attr:`table`, int64 ``[n]``.
            labels: The labels of these rows.
        """
        selected = copy.copy(self)
        selected.rows = np.asarray(rows, np.int64)
        selected.labels = labels
        return selected

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return int(self.embeddings.shape[1])

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their numbers."""
        return () if self.labels is None else self.labels.classes

    @property
    def table(self) -> gpd.GeoDataFrame:
        """All columns but the embeddings, a row each, read when first asked for."""
        if self._table is None:
            self._table = self.read(self.columns)
        return self._table

    def read(self, columns: Sequence[str]) -> gpd.GeoDataFrame | pd.DataFrame:
        """Read some columns of all rows.

        Args:
            columns: Their names.

        Returns:
            A GeoDataFrame if the geometry is among them, else a DataFrame; the index
            counts the rows from 0.

        Raises:
            SpecError: If there is no such column.
            SourceError: If a file can no longer be read.
        """
        missing = [name for name in columns if name not in self.columns]
        if missing:
            raise SpecError(
                f'{self.path}: no column {missing[0]!r}; name one of its columns: '
                f'{", ".join(self.columns)}'
            )
        names = list(columns)
        try:
            tables = [_read_part(part, names) for part in self._parts]
        except (OSError, ValueError, pa.ArrowException) as error:
            raise SourceError(
                f'{self.path}: its columns cannot be read ({one_line(error)})'
            ) from error
        return pd.concat(tables, ignore_index=True)

    def labelled(self, target: str) -> tuple[NDArray[np.int64], pd.Series]:
        """Find the rows that have a value in a column.

        Args:
            target: The column.

        Returns:
            The rows, int64 ``[n]``, and their values. The others are counted in a
            warning.

        Raises:
            SpecError: If there is no such column, or no value in it.
        """
        values = self.read([target])[target]
        missing = values.isna().to_numpy()
        if missing.all():
            raise SpecError(
                f'{self.path}: column {target!r} has no values, all are missing: name '
                'another column'
            )
        if missing.any():
            warnings.warn(
                f'{self.path}: {missing.sum()} of {len(values)} rows have no value in '
                f'column {target!r} and are left out',
                stacklevel=2,
            )
        return np.flatnonzero(~missing), values[~missing]

    def similar(
        self,
        like: Example | list[Example],
        unlike: Example | list[Example] | None = None,
        k: int = 50,
        *,
        keep_examples: bool = False,
    ) -> gpd.GeoDataFrame:
        """Find the rows that are most similar to examples, by cosine similarity.

        All rows of :attr:`table` are searched, with or without a label, in little
        memory: see :func:`dynamicvis_geo.similarity.find_similar`.

        Args:
            like: One example or a list of some: the id of a chip or of its point, the
                number of a row, ``(lon, lat)`` in degrees, vectors ``[D]`` or
                ``[n, D]``, or a file of embeddings or points.
            unlike: Counter-examples, likewise.
            k: How many rows, fewer if there are fewer.
            keep_examples: Whether examples are among the rows that are found.

        Returns:
            The rows of :attr:`table`, the most similar first, with ``row`` and
            ``similarity``: the mean cosine with the examples, less the mean cosine with
            the counter-examples. The centres are named ``lon`` and ``lat``.

        Raises:
            SpecError: If an example is not there, or was made with other settings.
        """
        rows = Chips(self.path, self._parts, self._mapped, self.provenance)
        return search([rows], like, unlike, k, keep_examples).table

    def __getstate__(self) -> dict[str, Any]:
        # A mapped array would be pickled with its contents.
        return {**self.__dict__, 'embeddings': None, '_table': None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.embeddings = np.load(self._mapped, mmap_mode='r')


def _read_part(part: Place, columns: list[str]) -> gpd.GeoDataFrame | pd.DataFrame:
    if 'geometry' in columns:
        return gpd.read_parquet(parquet_source(part), columns=columns)
    return pq.read_table(parquet_source(part), columns=columns).to_pandas()
