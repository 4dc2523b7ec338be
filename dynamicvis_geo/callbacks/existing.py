"""What lies where an output is to be written."""

import fnmatch
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dynamicvis_geo.callbacks.failures import failures_file_of
from dynamicvis_geo.callbacks.finished_maps import STAGING
from dynamicvis_geo.callbacks.run_folder import RunFolder
from dynamicvis_geo.callbacks.settings import differences, settings_of, table
from dynamicvis_geo.errors import OutputError
from dynamicvis_geo.provenance import (
    PROVENANCE_KEY,
    carries_provenance,
    read_provenance,
)

#: Names of files on their way, which end in the number of the process.
_TEMPORARY = re.compile(r'\..+\.\d+\.partial')


def check_place(
    folder: RunFolder, is_folder: bool, members: tuple[str, ...], overwrite: bool
) -> None:
    """Refuse a place where nothing may be written, or where something else lies.

    Args:
        folder: Folder of the run.
        is_folder: Whether the output is a folder.
        members: Patterns of the names of what belongs into it.
        overwrite: Whether what is there will be removed: then each file has to say
            itself that this package wrote it.

    Raises:
        OutputError: If the target is a file where a folder is needed or the reverse, or
            holds what this package did not write.
    """
    target = folder.target
    _check_beside(folder)
    with folder.errors():
        if not target.exists():
            return
        content = sorted(target.iterdir()) if target.is_dir() else []
    if target.is_dir() != is_folder:
        found, needed = ('file', 'folder') if is_folder else ('folder', 'file')
        raise OutputError(
            f"cannot write '{target}': it is a {found}, and this output is a "
            f'{needed}; choose another name'
        )
    if is_folder and not content:
        return
    for entry in content:
        known = any(fnmatch.fnmatch(entry.name, name) for name in members)
        if not known and not _is_temporary(entry):
            raise OutputError(
                f"will not write into the folder '{target}': it also holds "
                f"'{entry.name}', which is not part of such an output; choose another "
                'folder'
            )
    existing_provenance(folder)
    with folder.errors():
        for entry in content if overwrite else ():
            if not _is_ours(entry):
                raise OutputError(
                    f"will not remove the folder '{target}': it also holds "
                    f"'{entry.name}', which dynamicvis_geo did not write; choose "
                    'another folder'
                )


def _check_beside(folder: RunFolder) -> None:
    """Refuse a folder of a run and a list of failures that are somebody else's."""
    with folder.errors():
        if folder.path.is_file() or (
            folder.path.is_dir()
            and folder.read() is None
            and any(
                entry.name != 'lock' and not entry.name.startswith('.')
                for entry in folder.path.iterdir()
            )
        ):
            raise OutputError(
                f"cannot write '{folder.target}': unfinished work would be kept in "
                f"'{folder.path}', which is there and not of this package; choose "
                'another name'
            )
        failures = failures_file_of(folder.target)
        if not failures.exists():
            return
        try:
            names = pq.read_schema(failures).names
        except (OSError, pa.ArrowException):
            names = []
    if not {'id', 'reason', 'message'} <= set(names):
        raise OutputError(
            f"cannot write '{folder.target}': failures would be listed in "
            f"'{failures}', which is there and no such list; choose another name"
        )


def _is_temporary(path: Path) -> bool:
    return _TEMPORARY.fullmatch(path.name) is not None


def _is_ours(path: Path) -> bool:
    """Whether an entry of an output says that this package wrote it."""
    # Of a Zarr store: what is staged, and a list of what it holds.
    if _is_temporary(path) or path.name in (STAGING, 'zarr.json'):
        return True
    if path.is_dir():
        group = path / 'zarr.json'
        return group.is_file() and PROVENANCE_KEY.encode() in group.read_bytes()
    if path.name.endswith('.aux.xml'):
        path = path.with_name(path.name.removesuffix('.aux.xml'))
    return carries_provenance(path)


def existing_provenance(folder: RunFolder) -> Mapping[str, Any] | None:
    """Return what made that which is there; None if nothing is.

    Raises:
        OutputError: If something is there that this package did not write.
    """
    unfinished = folder.read()
    target = folder.target
    there = any(target.iterdir()) if target.is_dir() else target.exists()
    if unfinished is not None or not there:
        return unfinished
    try:
        return read_provenance(target)
    except OutputError as error:
        raise OutputError(
            f"'{target}' exists already and will not be replaced: {error}; choose "
            'another name'
        ) from error


def check_settings(
    folder: RunFolder, existing: Mapping[str, Any], new: Mapping[str, Any], dtype: str
) -> None:
    """Refuse to mix embeddings that were made in different ways.

    Raises:
        OutputError: If settings differ; the message holds a table of them.
    """
    rows = differences(settings_of(existing), settings_of(new, dtype))
    if rows:
        raise OutputError(
            f"'{folder.target}' was made with other settings:\n"
            + table(rows, ('setting', 'there', 'now'))
            + '\nchoose another output, use the same settings, or start anew with '
            '--overwrite (overwrite=True)'
        )


def remove_existing(folder: RunFolder) -> None:
    """Remove the output and all that earlier runs have left; the lock is held."""
    with folder.errors():
        for entry in folder.path.iterdir():
            if entry.name != 'lock':
                _remove(entry)
        failures_file_of(folder.target).unlink(missing_ok=True)
        if folder.target.exists():
            _remove(folder.target)


def remove_temporary(folder: RunFolder) -> None:
    """Remove files that killed processes have left half written."""
    with folder.errors():
        for place in (folder.path, folder.target):
            if not place.is_dir():
                continue
            with os.scandir(place) as entries:
                names = [entry.name for entry in entries]
            for name in names:
                # Of the first kind are files on their way, of the second the signs
                # that processes give each other.
                if _is_temporary(place / name) or (
                    place == folder.path and name.startswith('.')
                ):
                    _remove(place / name)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
