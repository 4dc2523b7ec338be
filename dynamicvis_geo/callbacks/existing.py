"""Outputs that exist: whose they are, and whether they may be written or removed."""

import fnmatch
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dynamicvis_geo.callbacks.blocks import DESCRIPTION_FILE
from dynamicvis_geo.errors import DynamicVisGeoError, OutputError, one_line
from dynamicvis_geo.formats import format_at
from dynamicvis_geo.formats.base import Format
from dynamicvis_geo.paths import Place
from dynamicvis_geo.provenance import (
    PROVENANCE_KEY,
    read_provenance,
)
from dynamicvis_geo.settings import difference_table, differences, settings_of
from dynamicvis_geo.stac.catalogue import MEMBERS, remove_stac
from dynamicvis_geo.store import Location

#: Names of files on their way.
_TEMPORARY = re.compile(r'\..+\.[0-9a-f]+\.partial')
#: Names in the folder of blocks, and in that of a STAC catalogue.
_OF_RUNS = (DESCRIPTION_FILE, 'block-*', 'seam-*', '.*')
_OF_STAC = (*MEMBERS, '.*')


@contextmanager
def _errors(path: Place) -> Iterator[None]:
    """Turn what the file system refuses into an error that names the output."""
    try:
        yield
    except DynamicVisGeoError:
        raise
    except Exception as error:
        # The library of each store has errors of its own.
        if not isinstance(error, OSError) and isinstance(path, Path):
            raise
        told = one_line(error)
        raise OutputError(
            f"cannot write '{path}': {told}; make room or choose another output"
        ) from error


def check_place(path: Place, made: Format, overwrite: bool) -> None:
    """Refuse a place where nothing may be written, or where something else lies.

    Args:
        path: Where the output is to be; a ``UPath`` for a URL.
        made: Format of the output.
        overwrite: Whether what is there will be removed: then each file has to say
            itself that this package wrote it.

    Raises:
        OutputError: If the target is a file where a folder is needed or the reverse, or
            holds what this package did not write.
    """
    _check_beside(path)
    with _errors(path):
        if not path.exists():
            return
        is_dir = path.is_dir()
        content: list[Place] = [*path.iterdir()] if is_dir else []
        content.sort(key=lambda entry: entry.name)
    if is_dir != made.is_folder:
        found, needed = ('file', 'folder') if made.is_folder else ('folder', 'file')
        raise OutputError(
            f"cannot write '{path}': it is a {found}, and this output is a "
            f'{needed}; choose another name'
        )
    if made.is_folder and not content:
        return
    for entry in content:
        known = any(fnmatch.fnmatch(entry.name, name) for name in made.members)
        if not known and not _is_temporary(entry):
            raise OutputError(
                f"will not write into the folder '{path}': it also holds "
                f"'{entry.name}', which is not part of such an output; choose another "
                'folder'
            )
    made_by(path)
    with _errors(path):
        for entry in content if overwrite else ():
            if not _is_ours(entry, made):
                raise OutputError(
                    f"will not remove the folder '{path}': it also holds "
                    f"'{entry.name}', which dynamicvis_geo did not write; choose "
                    'another folder'
                )


def _check_beside(path: Place) -> None:
    """Refuse folders and a list of failures beside it that are somebody else's."""
    location = Location.of(str(path))
    with _errors(path):
        for store, known, kept in (
            (location.blocks, _OF_RUNS, 'unfinished work would be kept'),
            (location.stac, _OF_STAC, 'its STAC catalogue would be'),
        ):
            folder = path.parent / store.url.rpartition('/')[2]
            if folder.is_file() or any(
                not any(fnmatch.fnmatch(name, one) for one in known)
                for name in (store.names() if folder.is_dir() else ())
            ):
                raise OutputError(
                    f"cannot write '{path}': {kept} in '{folder}', which is there and "
                    'not of this package; choose another name'
                )
        failures = path.parent / location.failures
        if not failures.exists():
            return
        try:
            with failures.open('rb') as file:
                names = pq.read_schema(file).names
        except (OSError, pa.ArrowException):
            names = []
    if not {'id', 'reason', 'message'} <= set(names):
        raise OutputError(
            f"cannot write '{path}': failures would be listed in "
            f"'{failures}', which is there and no such list; choose another name"
        )


def _is_temporary(path: Place) -> bool:
    return _TEMPORARY.fullmatch(path.name) is not None


def _is_ours(path: Place, made: Format) -> bool:
    """Return whether an entry of an output says that this package wrote it."""
    # Of a Zarr store: what an older version staged, and a list of what it holds.
    if _is_temporary(path) or path.name in ('.staging', 'zarr.json'):
        return True
    if path.is_dir():
        group = path / 'zarr.json'
        return group.is_file() and PROVENANCE_KEY.encode() in group.read_bytes()
    if path.name.endswith('.aux.xml'):
        path = path.with_name(path.name.removesuffix('.aux.xml'))
    return made.wrote(path)


def made_by(path: Place) -> Mapping[str, Any] | None:
    """Read the provenance of an output that is there.

    Args:
        path: The output; a ``UPath`` for a URL.

    Returns:
        The provenance; None if nothing is there, or a folder that is not finished.

    Raises:
        OutputError: If something is there that this package did not write.
    """
    with _errors(path):
        is_dir = path.is_dir()
        there = any(path.iterdir()) if is_dir else path.exists()
    # Parts of a folder are there before its provenance is.
    if not there or (is_dir and Location.of(str(path)).blocks.read(DESCRIPTION_FILE)):
        return None
    try:
        return read_provenance(path)
    except OutputError as error:
        made = None if is_dir else format_at(path, is_folder=False)
        told = {} if made is None else made.read_provenance(path)
        if told:
            return told
        raise OutputError(
            f"'{path}' exists already and will not be replaced: {error}; choose "
            'another name'
        ) from error


def check_settings(
    path: Place, existing: Mapping[str, Any], new: Mapping[str, Any], dtype: str
) -> None:
    """Refuse to mix embeddings that were made in different ways.

    Args:
        path: The output, for the error.
        existing: Provenance of what is there.
        new: Provenance of what is to be written.
        dtype: Type in which embeddings are to be stored.

    Raises:
        OutputError: If settings differ; the message holds a table of them.
    """
    rows = differences(settings_of(existing), settings_of(new, dtype))
    if rows:
        raise OutputError(
            f"'{path}' was made with other settings:\n"
            + difference_table(rows)
            + '\nchoose another output, use the same settings, or start anew with '
            'overwrite=True'
        )


def remove_existing(path: Place) -> None:
    """Remove an output, and all that unfinished runs have left of it.

    Args:
        path: The output; a ``UPath`` for a URL.
    """
    location = Location.of(str(path))
    location.blocks.clear(DESCRIPTION_FILE)
    location.parent.remove(location.failures)
    remove_stac(location)
    with _errors(path):
        if not path.exists():
            return
        if not path.is_dir():
            path.unlink()
        elif isinstance(path, Path):
            shutil.rmtree(path)
        else:
            path.fs.rm(path.path, recursive=True)
