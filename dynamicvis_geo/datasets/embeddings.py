"""Pooled embeddings as a dataset."""

from __future__ import annotations

import copy
import glob
import hashlib
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

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
from dynamicvis_geo.errors import OutputError, SourceError, SpecError, one_line
from dynamicvis_geo.formats.geoparquet import (
    find_parts,
    read_schema,
    read_vectors,
    shared_provenance,
    table_columns,
)
from dynamicvis_geo.paths import AnyPath, Place, input_path, parquet_source
from dynamicvis_geo.store import whole_file

#: Of the end of a file at a URL, which is compared to notice that it was replaced.
_FOOTER_BYTES = 2**16
#: Where mapped arrays lie that cannot lie beside their embeddings.
_CACHE = Path('~/.cache/dynamicvis_geo')
#: To be raised when the mapped arrays are made in another way.
_LAYOUT = 1


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
        self._mapped = _map_embeddings(self.path, self._parts)
        self.embeddings = np.load(self._mapped, mmap_mode='r')
        self.rows: NDArray[np.int64] = np.arange(len(self.embeddings), dtype=np.int64)
        self.labels: Labels | None = None
        self._table: gpd.GeoDataFrame | None = None
        if target is not None:
            self.rows, values = self.labelled(target)
            self.labels = encode_labels(values)

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


def _map_embeddings(path: Place, parts: Sequence[Place]) -> Path:
    """Write the vectors of all parts into one ``.npy`` file, unless that was done.

    The file lies beside *path*, hidden, or in the user's cache folder where that is a
    URL or cannot be written; its name says which state of the parts it holds, and those
    of earlier states are removed.

    Args:
        path: What the user named.
        parts: Its Parquet files.

    Returns:
        The file: float32 ``[N, D]``.

    Raises:
        SourceError: If the vectors cannot be used.
        OutputError: If the disk is full.
    """
    path = path.resolve()
    name = f'.{path.name}.{_state(parts)}.npy'
    # Files of one name from several folders must not drive each other out.
    place = hashlib.sha256(str(path.parent).encode()).hexdigest()[:16]
    folders = [_CACHE.expanduser() / place]
    if isinstance(path, Path):
        folders.insert(0, path.parent)
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=folder).close()
        except OSError:
            # A folder that cannot be written to: the next one is tried.
            continue
        try:
            with whole_file(folder / name) as file, file.open('wb') as stream:
                _convert(parts, stream)
        except OSError as error:
            raise OutputError(
                f"cannot write '{folder / name}', the embeddings of '{path}' without "
                f'compression: {one_line(error)}: make room, or copy the file to a '
                'larger disk'
            ) from error
        _remove_earlier(folder, path.name, name)
        return folder / name
    raise OutputError(
        f'cannot write the embeddings of {path} without compression into '
        f'{" or ".join(str(folder) for folder in folders)}: allow writing into one'
    )


def _state(parts: Sequence[Place]) -> str:
    """Return a short text that differs when the files do."""
    digest = hashlib.sha256(str(_LAYOUT).encode())
    for part in parts:
        status = part.stat()
        digest.update(f'{part.resolve()}|{status.st_size}'.encode())
        if isinstance(part, Path):
            digest.update(f'|{status.st_mtime_ns}'.encode())
        else:
            # Not all stores tell times. The end of a Parquet file tells of the rest.
            digest.update(part.fs.tail(part.path, _FOOTER_BYTES))
    return digest.hexdigest()[:16]


def _remove_earlier(folder: Path, stem: str, name: str) -> None:
    for file in folder.glob(f'.{glob.escape(stem)}.*.npy'):
        if file.name != name and len(file.name) == len(name):
            # Windows keeps files that another process has mapped.
            with suppress(OSError):
                file.unlink()


def _convert(parts: Sequence[Place], stream: BinaryIO) -> None:
    """Decode vectors a block at a time into a ``.npy`` file."""
    rows = sum(read_schema(part)[1] for part in parts)
    if rows == 0:
        raise SourceError(f'{parts[0]}: holds no embeddings: give a file that does')
    dimensions: int | None = None
    for part in parts:
        first = 0
        for vectors in read_vectors(part):
            if dimensions is None:
                dimensions = vectors.shape[1]
                np.lib.format.write_array_header_1_0(
                    stream,
                    {
                        'descr': '<f4',
                        'fortran_order': False,
                        'shape': (rows, dimensions),
                    },
                )
            if vectors.shape[1] != dimensions:
                raise SourceError(
                    f'{part}: embeddings of {vectors.shape[1]} numbers, where others '
                    f'have {dimensions}: keep those of one model in a folder'
                )
            bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
            if len(bad):
                row, missing = first + bad[0] + 1, np.isnan(vectors[bad[0]]).all()
                raise SourceError(
                    f'{part}: row {row} has no embedding: remove it'
                    if missing
                    else f'{part}: the embedding in row {row} has NaN or infinite '
                    'numbers: embed that chip again, or remove the row'
                )
            first += len(vectors)
            stream.write(np.ascontiguousarray(vectors, '<f4').data)
