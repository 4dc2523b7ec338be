"""Paths and URLs that users give, refused where nothing can be read or written."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal, TypeAlias, cast

from dynamicvis_geo.errors import OutputError, SourceError, SpecError, one_line

if TYPE_CHECKING:
    from upath import UPath

    #: A path as users give it: also a URL, and an object of universal_pathlib.
    AnyPath: TypeAlias = str | os.PathLike[str] | UPath
    #: A path that was checked: of a file on this machine, or a URL that fsspec knows.
    Place: TypeAlias = Path | UPath
else:
    # fsspec would make the command line twice as slow to start.
    AnyPath, Place = str | os.PathLike[str], Path

#: A letter and a colon are a drive of Windows, not a scheme. Of two slashes, Path
#: leaves one.
_URL = re.compile(r'(?:[A-Za-z][A-Za-z0-9+.-]*::)*[A-Za-z][A-Za-z0-9+.-]+:/')
_PROTOCOLS = re.compile(r'(?:^|::)([A-Za-z][A-Za-z0-9+.-]*)(?=::|://)')
_GDAL = re.compile(r'/vsi[a-z0-9_]+[/?]')

#: How to get the packages that fsspec needs for the larger stores.
_INSTALL = {
    **dict.fromkeys(('s3', 's3a'), "'dynamicvis-geo[s3]'"),
    **dict.fromkeys(('gs', 'gcs'), "'dynamicvis-geo[gcs]'"),
    **dict.fromkeys(('az', 'abfs', 'abfss', 'adl'), 'adlfs'),
}


def input_path(path: AnyPath, name: str | None = None) -> Place:
    """Check the path or URL of something to be read, whether or not it exists.

    Args:
        path: The path.
        name: Name of the argument, for errors.

    Returns:
        The path, with ``~`` resolved.

    Raises:
        SpecError: If it is empty, no name that a file can have, or a URL of a kind that
            is not known or whose package is not installed.
    """
    text, told = str(path), _told(path, name)
    if not text.strip() or '\0' in text:
        raise SpecError(f'{told} is no path: name a file or a folder')
    if is_gdal_path(text):
        raise SpecError(
            f"{told} is a path of GDAL's, from which only images are read: give a "
            'local path or a URL, such as s3://BUCKET/KEY'
        )
    if is_url(text):
        return _url(path, told)
    try:
        checked = Path(text).expanduser()
        checked.stat()
    except (FileNotFoundError, NotADirectoryError):
        return checked
    except (OSError, RuntimeError) as error:
        reason = getattr(error, 'strerror', None) or error
        raise SpecError(
            f'{told} is a path that cannot be followed ({reason}): name another'
        ) from error
    return checked


def image_path(path: AnyPath) -> Place | str:
    """Check the path of images to be read, which may be one of GDAL's (``/vsi...``).

    Args:
        path: A path, a URL, or a path of GDAL's.

    Returns:
        As :func:`input_path`; a path of GDAL's as it is.

    Raises:
        SpecError: As :func:`input_path`.
    """
    text = str(path)
    return text if is_gdal_path(text) else input_path(path)


def local_input(path: AnyPath, name: str | None = None) -> Path:
    """Check the path of something that is read from local disks only.

    Args:
        path: The path.
        name: Name of the argument, for errors.

    Raises:
        SpecError: If it is a URL, and as :func:`input_path`.
    """
    checked = input_path(path, name)
    if not isinstance(checked, Path):
        raise SpecError(
            f'{_told(path, name)} is a URL, and this is read from local disks only: '
            'copy it, and name the local path'
        )
    return checked


def output_path(path: AnyPath, name: str | None = None) -> Place:
    """Check the path or URL of something to be written.

    Args:
        path: The path.
        name: Name of the argument, for errors.

    Returns:
        The path, with ``~`` resolved.

    Raises:
        OutputError: If it is empty, the root of a file system, or a URL that cannot be
            written to.
    """
    told = _told(path, name)
    try:
        checked = input_path(path, name)
    except SpecError as error:
        raise OutputError(str(error)) from error
    if isinstance(checked, Path):
        _check_place(checked, told)
    elif checked.protocol in ('http', 'https'):
        raise OutputError(
            f'{told} is a web address, which can only be read: name a local path or a '
            'store, such as s3://BUCKET/KEY'
        )
    # There must be a name, beside which unfinished work can lie.
    if not (checked.resolve() if isinstance(checked, Path) else checked).name:
        raise OutputError(
            f'{told} is the root of a file system: name a file or folder in it'
        )
    return checked


def local_output(path: AnyPath, name: str | None = None) -> Path:
    """Check the path of something that is written to local disks only.

    Args:
        path: The path.
        name: Name of the argument, for errors.

    Raises:
        OutputError: If it is a URL, and as :func:`output_path`.
    """
    if is_url(path) or is_gdal_path(path):
        raise OutputError(
            f'{_told(path, name)} is a URL, and this is written to local disks only: '
            'name a local path, and copy the result'
        )
    return cast(Path, output_path(path, name))


def is_url(path: object) -> bool:
    """Tell if a path is a URL.

    Args:
        path: Anything.
    """
    return _URL.match(str(path)) is not None


def is_gdal_path(path: object) -> bool:
    """Tell if a path is one of GDAL's, such as ``/vsizip/a.zip/b.tif``.

    Args:
        path: Anything.
    """
    return _GDAL.match(str(path)) is not None


def kind_of(path: Place) -> Literal['file', 'folder'] | None:
    """Look what lies at a path.

    Args:
        path: A path, or a ``UPath`` for a URL.

    Returns:
        'file' or 'folder'; None if nothing is there.

    Raises:
        SourceError: If the store of a URL does not tell.
    """
    if isinstance(path, Path):
        return 'folder' if path.is_dir() else 'file' if path.exists() else None
    try:
        # Others write, too: what was listed before is asked again.
        path.fs.invalidate_cache()
        found = path.fs.info(path.path)
    except FileNotFoundError:
        return None
    # The library of each store has errors of its own.
    except Exception as error:
        raise SourceError(
            f'{path}: cannot be reached ({one_line(error)}): see to its '
            'address, the network and your credentials'
        ) from error
    return 'folder' if found['type'] == 'directory' else 'file'


def open_file(path: Place) -> BinaryIO:
    """Open a file to read parts of it.

    Args:
        path: A path, or a ``UPath`` for a URL.
    """
    if isinstance(path, Path):
        return path.open('rb')
    # By default 50 MB are read ahead of every part.
    return path.open('rb', cache_type='none')


def parquet_source(path: Place) -> Path | BinaryIO:
    """Return what PyArrow and GeoPandas open to read a Parquet file.

    Args:
        path: A path, or a ``UPath`` for a URL.

    Returns:
        The path itself, or a file that was opened.
    """
    return path if isinstance(path, Path) else open_file(path)


def check_picture_path(
    path: Path,
    suffixes: Sequence[str],
    overwrite: bool,
    source: Place | str,
    option: str = '--output',
) -> None:
    """Refuse to write where it cannot be, or would destroy something.

    Args:
        path: File to be written.
        suffixes: Those that it may have.
        overwrite: Whether it may exist.
        source: Input that it is made from.
        option: Name of the option, for errors.

    Raises:
        OutputError: If the path has another suffix, exists, or is the source.
    """
    if path.suffix.lower() not in suffixes:
        raise OutputError(
            f'{option} {path}: its name must end in {", ".join(suffixes[:-1])} or '
            f'{suffixes[-1]}'
            if len(suffixes) > 1
            else f'{option} {path}: its name must end in {suffixes[0]}'
        )
    if isinstance(source, Path) and path.resolve() == source.resolve():
        raise OutputError(f'{option} {path} is the input: choose another name')
    if path.is_dir():
        raise OutputError(f'{option} {path} is a folder: add the name of a file')
    if path.exists() and not overwrite:
        raise OutputError(f'{path} exists: give --overwrite to replace it')


def _told(path: AnyPath, name: str | None) -> str:
    return repr(str(path)) if name is None else f'{name}={str(path)!r}'


def _url(path: AnyPath, told: str) -> Place:
    import fsspec
    from upath import UPath

    text = str(path)
    if '://' not in text:
        raise SpecError(
            f'{told} is a URL that has lost a slash: give it as text, not as a Path'
        )
    for protocol in _PROTOCOLS.findall(text):
        try:
            fsspec.get_filesystem_class(protocol)
        except ValueError as error:
            raise SpecError(
                f'{told} is no URL of a known kind: give a local path, or one that '
                'begins with s3://, gs://, az://, https:// or another name that '
                'fsspec knows'
            ) from error
        except ImportError as error:
            package = _INSTALL.get(protocol)
            way_out = f'pip install {package}' if package else str(error)
            raise SpecError(
                f'{told} needs a package that is not installed: {way_out}'
            ) from error
    url = UPath(path)
    return Path(url.path) if url.protocol in ('file', 'local') else url


def _check_place(path: Path, told: str) -> None:
    """Refuse a path below a file."""
    there = next((one for one in path.resolve().parents if one.exists()), path)
    if not there.is_dir() and there != path:
        raise OutputError(
            f"{told} cannot be written: '{there}' is a file, not a folder; name "
            'another place'
        )
