"""Vectors of Parquet files, decoded once into an array that is mapped into memory."""

import glob
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from dynamicvis_geo.errors import OutputError, SourceError, one_line
from dynamicvis_geo.formats.geoparquet import read_schema, read_vectors
from dynamicvis_geo.paths import Place
from dynamicvis_geo.store import whole_file

#: Of the end of a file at a URL, which is compared to notice that it was replaced.
_FOOTER_BYTES = 2**16
#: Where mapped arrays lie that cannot lie beside their embeddings.
_CACHE = Path('~/.cache/dynamicvis_geo')
#: To be raised when the mapped arrays are made in another way.
_LAYOUT = 1
#: Vectors that are read at a time: they stay in the cache of a core.
_BLOCK_BYTES = 3 * 2**20


def map_vectors(path: Place, parts: Sequence[Place]) -> Path:
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


def vector_blocks(mapped: Path) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield the vectors of an array that :func:`map_vectors` made, in little memory.

    They are read, not mapped: pages that are mapped count as memory of the process.

    Args:
        mapped: The file.

    Yields:
        Number of the first row, and float32 ``[n, D]``, valid until the next.
    """
    whole = np.load(mapped, mmap_mode='r')
    rows, dimensions = whole.shape
    block = np.empty((max(1, _BLOCK_BYTES // (4 * dimensions)), dimensions), '<f4')
    with mapped.open('rb') as file:
        file.seek(whole.offset)
        for first in range(0, rows, len(block)):
            vectors = block[: rows - first]
            file.readinto(vectors.data)
            yield first, vectors
