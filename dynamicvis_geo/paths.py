"""Paths that users give, refused at once where nothing can be read or written."""

import os
import re
from pathlib import Path

from dynamicvis_geo.errors import OutputError, SpecError

#: A letter and a colon are a drive of Windows, not a scheme. Of two slashes, Path
#: leaves one.
_URL = re.compile(r'[A-Za-z][A-Za-z0-9+.-]+:/|/vsi[a-z0-9]+/')


def input_path(path: str | os.PathLike[str]) -> Path:
    """Check the path of something to be read, whether or not it exists.

    Raises:
        SpecError: If it is empty, or no name that a file can have.
    """
    if not str(path).strip() or '\0' in str(path):
        raise SpecError(f'{os.fspath(path)!r} is no path: name a file or a folder')
    try:
        checked = Path(path).expanduser()
        checked.stat()
    except (FileNotFoundError, NotADirectoryError):
        return checked
    except (OSError, RuntimeError) as error:
        reason = getattr(error, 'strerror', None) or error
        raise SpecError(
            f'{os.fspath(path)!r} is a path that cannot be followed ({reason}): name '
            'another'
        ) from error
    return checked


def output_path(path: str | os.PathLike[str], name: str | None = None) -> Path:
    """Check the path of something to be written.

    Args:
        path: The path.
        name: Name of the argument, for errors.

    Returns:
        The path, with ``~`` resolved.

    Raises:
        OutputError: If it is a URL, empty, or the root of a file system.
    """
    text = os.fspath(path)
    told = repr(text) if name is None else f'{name}={text!r}'
    if _URL.match(text):
        raise OutputError(
            f'{told} is a URL, and this version writes to local disks only: name a '
            'local path, and copy the result'
        )
    try:
        checked = input_path(path)
    except SpecError as error:
        raise OutputError(str(error).replace(repr(text), told, 1)) from error
    there = next((one for one in checked.resolve().parents if one.exists()), checked)
    if not there.is_dir() and there != checked:
        raise OutputError(
            f"{told} cannot be written: '{there}' is a file, not a folder; name "
            'another place'
        )
    if not checked.resolve().name:
        raise OutputError(
            f'{told} is the root of a file system: name a file or folder in it'
        )
    return checked
