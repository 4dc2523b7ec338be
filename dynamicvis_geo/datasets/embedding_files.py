"""Files of pooled embeddings: finding them, and their vectors as one mapped array."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dynamicvis_geo.errors import OutputError, SourceError
from dynamicvis_geo.paths import Place, kind_of, parquet_source
from dynamicvis_geo.provenance import PROVENANCE_KEY, read_provenance

#: Column of the vectors, and of the factors of those that are stored as integers.
EMBEDDING, SCALE = 'embedding', 'scale'

#: Memory that the vectors decoded at a time take, bytes.
_BLOCK_BYTES = 16 * 2**20
#: Of the end of a file at a URL, which is compared to notice that it was replaced.
_FOOTER_BYTES = 2**16
#: Where mapped arrays lie that cannot lie beside their embeddings.
_CACHE = Path('~/.cache/dynamicvis_geo')
#: To be raised when the mapped arrays are made in another way.
_LAYOUT = 1


def find_parts(path: Place) -> list[Place]:
    """Return the Parquet files that a path stands for.

    Args:
        path: A file or a folder, also at a URL. The ``*.parquet`` files of a folder are
            parts of one table; names that begin with a dot or an underscore are left
            out.

    Raises:
        SourceError: If there is no such file, or no part in the folder.
    """
    kind = kind_of(path)
    if kind == 'file':
        return [path]
    if kind is None:
        raise SourceError(
            f'{path}: no such file or folder; give a GeoParquet file of pooled '
            'embeddings, or a folder of its parts'
        )
    parts: list[Place] = sorted(
        part for part in path.glob('*.parquet') if not part.name.startswith(('.', '_'))
    )
    if not parts:
        raise SourceError(
            f'{path}: no *.parquet file in this folder; give the GeoParquet file of '
            'pooled embeddings, or a folder of its parts (feature maps are opened by '
            'FeatureMaps)'
        )
    return parts


def read_schema(part: Place) -> tuple[pa.Schema, int]:
    """Return the columns of a file of embeddings, and the number of its rows.

    Raises:
        SourceError: If it is no Parquet file, or has no embeddings.
    """
    try:
        with pq.ParquetFile(parquet_source(part)) as file:
            schema, rows = file.schema_arrow, file.metadata.num_rows
    except (OSError, pa.ArrowException) as error:
        raise SourceError(
            f'{part}: not a readable Parquet file ({one_line(error)}): the file may be '
            'cut off; make it anew'
        ) from error
    if EMBEDDING not in schema.names:
        raise SourceError(
            f"{part}: no column '{EMBEDDING}'; its columns are "
            f'{", ".join(schema.names)}: give a file of pooled embeddings'
        )
    return schema, rows


def table_columns(schema: pa.Schema) -> tuple[str, ...]:
    """Return the columns that describe the rows.

    Left out are the embeddings, and the bounds of geometries that GeoParquet keeps to
    filter by, as GeoPandas leaves them out.
    """
    geo = json.loads((schema.metadata or {}).get(b'geo', b'{}'))
    covering = [
        path[0]
        for column in geo.get('columns', {}).values()
        for path in column.get('covering', {}).get('bbox', {}).values()
    ]
    hidden = {EMBEDDING, SCALE, *covering}
    return tuple(name for name in schema.names if name not in hidden)


def shared_provenance(parts: Sequence[Place]) -> dict[str, Any]:
    """Return what made the parts of one table; empty for files of other programs.

    Raises:
        SourceError: If the parts were not made by the same model.
    """
    found = [read_provenance(part) if _has_provenance(part) else {} for part in parts]
    for part, provenance in zip(parts, found, strict=True):
        if provenance.get('model') != found[0].get('model'):
            raise SourceError(
                f'{part}: its embeddings were made by another model, or with other '
                f'settings, than those of {parts[0]}: vectors of two models cannot be '
                'compared; keep them in two folders'
            )
    return found[0]


def _has_provenance(part: Place) -> bool:
    tags = pq.read_metadata(parquet_source(part)).metadata or {}
    return PROVENANCE_KEY.encode() in tags


def map_embeddings(path: Place, parts: Sequence[Place]) -> Path:
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
            temporary = folder / f'{name}.{os.getpid()}.partial'
            stream = temporary.open('wb')
        except OSError:
            # A folder that cannot be written to: the next one is tried.
            continue
        try:
            with stream:
                _convert(parts, stream)
            os.replace(temporary, folder / name)
        except OSError as error:
            raise OutputError(
                f"cannot write '{folder / name}', the embeddings of '{path}' without "
                f'compression: {one_line(error)}: make room, or copy the file to a '
                'larger disk'
            ) from error
        finally:
            temporary.unlink(missing_ok=True)
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
        for block in _blocks(part):
            if dimensions is None:
                dimensions = block.shape[1]
                np.lib.format.write_array_header_1_0(
                    stream,
                    {
                        'descr': '<f4',
                        'fortran_order': False,
                        'shape': (rows, dimensions),
                    },
                )
            if block.shape[1] != dimensions:
                raise SourceError(
                    f'{part}: embeddings of {block.shape[1]} numbers, where others '
                    f'have {dimensions}: keep those of one model in a folder'
                )
            bad = np.flatnonzero(~np.isfinite(block).all(axis=1))
            if len(bad):
                raise SourceError(
                    f'{part}: the embedding in row {first + bad[0] + 1} has NaN or '
                    'infinite numbers: embed that chip again, or remove the row'
                )
            first += len(block)
            stream.write(np.ascontiguousarray(block, '<f4').data)


def _blocks(part: Place) -> Iterator[NDArray[np.float32]]:
    """Yield the vectors of a file, float32 ``[n, D]`` each time."""
    schema, _ = read_schema(part)
    columns = vector_columns(part, schema)
    kind = schema.field(EMBEDDING).type
    fixed = pa.types.is_fixed_size_list(kind)
    rows = max(1, _BLOCK_BYTES // (4 * (kind.list_size if fixed else 1024)))
    first = 0
    with pq.ParquetFile(parquet_source(part), memory_map=True) as file:
        try:
            for batch in file.iter_batches(rows, columns=columns):
                yield scaled(_vectors(part, batch.column(EMBEDDING), first), batch)
                first += len(batch)
        except pa.ArrowException as error:
            raise SourceError(
                f'{part}: its embeddings cannot be read ({one_line(error)}): the file '
                'may be damaged; make it anew'
            ) from error


def vector_columns(part: Place, schema: pa.Schema) -> list[str]:
    """Return the columns that hold the vectors of a file.

    Raises:
        SourceError: If its embeddings are no vectors, or integers without a scale.
    """
    kind = schema.field(EMBEDDING).type
    if not _is_vector(kind):
        raise SourceError(
            f"{part}: column '{EMBEDDING}' holds {kind}, not lists of numbers: give a "
            'file of pooled embeddings'
        )
    if not pa.types.is_integer(kind.value_type):
        return [EMBEDDING]
    if SCALE not in schema.names:
        raise SourceError(
            f'{part}: its embeddings are integers ({kind.value_type}), which a column '
            f"'{SCALE}' must give a factor each; there is none: make the file anew"
        )
    return [EMBEDDING, SCALE]


def scaled(
    vectors: NDArray[np.float32], rows: pa.Table | pa.RecordBatch
) -> NDArray[np.float32]:
    """Multiply vectors by the scale of their rows, if these have one.

    Args:
        vectors: float32 ``[n, D]``, as they are stored.
        rows: The columns of :func:`vector_columns` of these rows.
    """
    if SCALE not in rows.schema.names:
        return vectors
    scale = rows.column(SCALE).cast(pa.float32())
    values: NDArray[np.float32] = (
        vectors * scale.to_numpy(zero_copy_only=False)[:, None]
    )
    return values


def _is_vector(kind: pa.DataType) -> bool:
    types = pa.types
    is_list = types.is_fixed_size_list, types.is_list, types.is_large_list
    is_number = types.is_floating, types.is_integer
    return any(test(kind) for test in is_list) and any(
        test(kind.value_type) for test in is_number
    )


def _vectors(part: Place, column: pa.Array, first: int) -> NDArray[np.float32]:
    missing = column.is_null().to_numpy(zero_copy_only=False)
    if missing.any():
        raise SourceError(
            f'{part}: row {first + int(np.argmax(missing)) + 1} has no embedding: '
            'remove it'
        )
    lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
    dimensions = int(lengths[0])
    if dimensions == 0 or (lengths != dimensions).any():
        raise SourceError(
            f'{part}: embeddings of {lengths.min()} to {lengths.max()} numbers: all '
            'must have the same length, and more than none'
        )
    # A missing number becomes NaN, which is refused later.
    values: NDArray[Any] = column.flatten().to_numpy(zero_copy_only=False)
    return values.astype(np.float32, copy=False).reshape(-1, dimensions)


def one_line(error: Exception) -> str:
    """Return what an error says as one line."""
    return ' '.join(str(error).split())
