"""Pooled embeddings as one GeoParquet file, or a folder of them."""

import json
import os
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dynamicvis_geo.callbacks.geoparquet import (
    DTYPES,
    Extent,
    GeoParquetWriter,
    embedding_schema,
    embedding_table,
    read_keys,
    steady_memory,
    write_geoparquet,
)
from dynamicvis_geo.callbacks.parquet_merge import merge_parts
from dynamicvis_geo.callbacks.predictions import Predictions
from dynamicvis_geo.callbacks.run_folder import run_folder_of, write_atomically
from dynamicvis_geo.callbacks.sink import Job
from dynamicvis_geo.chip_keys import join_keys
from dynamicvis_geo.provenance import (
    PARQUET_METADATA_FILE,
    describe_embeddings,
    to_json,
)

#: What names of single files end in; all others are folders, dots in them or not.
FILE_SUFFIXES = ('.parquet', '.geoparquet')

_SWAP_FILE = 'swap.json'


class GeoParquetParts:
    """Writes a part at each flush, and merges all parts at the end.

    For a file, parts grow in the folder beside it; for a folder, they are files of the
    folder from the start, which readers may use while the run goes on.
    """

    output: ClassVar[str] = 'pooled'
    dtypes: ClassVar[tuple[str, ...]] = DTYPES
    metadata: ClassVar[str] = PARQUET_METADATA_FILE
    members: ClassVar[tuple[str, ...]] = (
        'part-*.parquet',
        'data-*.parquet',
        PARQUET_METADATA_FILE,
    )

    def __init__(self, job: Job) -> None:
        """Prepare to write; see :class:`~dynamicvis_geo.callbacks.sink.Sink`."""
        self.job = job
        self.dimensions = job.dimensions
        self._buffer: list[Predictions] = []
        self._count = 0

    @classmethod
    def recover(cls, target: Path) -> None:
        """Put a merged file in the place of its parts, if that was under way."""
        finish_swap(target)

    @classmethod
    def finished(cls, target: Path) -> pa.StringArray:
        """Keys of the rows in the file, if there is one, and in all parts."""
        return join_keys([read_keys(path) for path in _files(target)])

    def write(self, predictions: Predictions) -> None:
        """Keep a batch until the next flush."""
        if len(predictions.chip):
            self.dimensions = predictions.embedding.shape[1]
            self._buffer.append(predictions)

    def flush(self) -> None:
        """Write what was taken as a part."""
        job, chips = self.job, self.job.chips
        if not self._buffer or chips is None:
            return
        batch = Predictions.concatenate(self._buffer)
        rows, features = chips.rows(batch.chip), batch.embedding
        name = f'part-{job.run}-{job.rank:05d}-{self._count:06d}.parquet'
        with steady_memory():
            table = embedding_table(rows, features, batch.valid_fraction, job.dtype)
            path = _parts_folder(job.target) / name
            write_geoparquet(path, table, self._provenance())
        self._buffer = []
        self._count += 1

    def assemble(self) -> None:
        """Nothing: the first process merges."""

    def complete(self) -> None:
        """Merge all parts, and put the result in place."""
        target = self.job.target
        files = _files(target)
        if len(files) == 1 and files[0] in (target, target / _merged_name(0)):
            return
        merged = run_folder_of(target) / 'merged.parquet'
        self._merge(files, merged)
        if _is_file(target):
            os.replace(merged, target)
            return
        swap = {'remove': [file.name for file in files]}
        write_atomically(run_folder_of(target) / _SWAP_FILE, json.dumps(swap).encode())
        finish_swap(target)
        text = to_json(self._provenance(), indent=2) + '\n'
        write_atomically(target / PARQUET_METADATA_FILE, text.encode())

    def _merge(self, files: list[Path], merged: Path) -> None:
        files = [file for file in files if pq.read_metadata(file).num_rows]
        if not files:
            self._write_empty(merged)
            return
        dimensions = pq.read_schema(files[0]).field('embedding').type.list_size
        self.dimensions = dimensions
        scratch = run_folder_of(self.job.target) / '.rows.arrow'
        merge_parts(files, merged, scratch, self._provenance(), dimensions)

    def _write_empty(self, path: Path) -> None:
        chips = self.job.chips
        none = np.empty(0, np.int64)
        points = chips is not None and 'point_id' in chips.rows(none)
        schema = embedding_schema(self.dimensions, points, self.job.dtype)
        with GeoParquetWriter(path, schema, Extent(), self._provenance()):
            pass

    def _provenance(self) -> dict[str, Any]:
        described = describe_embeddings('chip', self.dimensions, self.job.dtype)
        return {**self.job.provenance, **described}


def finish_swap(target: Path) -> None:
    """Put a merged file in the place of the parts that it was made of.

    If the process is killed meanwhile, the next run does the rest.
    """
    folder = run_folder_of(target)
    swap = folder / _SWAP_FILE
    if not swap.exists():
        return
    merged = folder / 'merged.parquet'
    if merged.exists():
        for name in json.loads(swap.read_bytes())['remove']:
            (target / name).unlink(missing_ok=True)
        os.replace(merged, target / _merged_name(0))
    swap.unlink()


def _is_file(target: Path) -> bool:
    return target.suffix.lower() in FILE_SUFFIXES


def _merged_name(number: int) -> str:
    return f'data-{number:05d}.parquet'


def _parts_folder(target: Path) -> Path:
    return run_folder_of(target) if _is_file(target) else target


def _files(target: Path) -> list[Path]:
    """Return all files with rows of an output, in a fixed order."""
    found = [target] if target.is_file() else []
    found += sorted(_parts_folder(target).glob('part-*.parquet'))
    if not _is_file(target):
        found += sorted(target.glob('data-*.parquet'))
    return found
