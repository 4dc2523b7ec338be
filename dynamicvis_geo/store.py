"""Files that are listed, read and put whole, in any place that fsspec knows."""

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem

from dynamicvis_geo.errors import DynamicVisGeoError, OutputError, one_line
from dynamicvis_geo.paths import is_url

#: What a file system answers that has no hard links.
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


@dataclass(frozen=True)
class Store:
    """A folder, on this machine or behind any URL that fsspec knows.

    Files are listed, read and put whole; nothing else is asked of the place. It is
    plain text, so that any process may have it.

    Attributes:
        url: Path or URL of the folder.
    """

    url: str

    def names(self) -> list[str]:
        """Return the names of all files, in no order; none if there is no folder.

        Raises:
            OutputError: If they cannot be listed.
        """
        system, folder = self._place()
        with self._errors('list', ''):
            # Others write, too: what was listed before is not asked again.
            system.invalidate_cache(folder)
            try:
                if isinstance(system, LocalFileSystem):
                    return os.listdir(folder)
                paths = system.ls(folder, detail=False)
            except FileNotFoundError:
                return []
        return [path.rsplit('/', 1)[-1] for path in paths]

    def read(self, name: str) -> bytes | None:
        """Return what a file holds; None if there is none.

        Args:
            name: Of the file.

        Raises:
            OutputError: If it cannot be read.
        """
        system, folder = self._place()
        with self._errors('read', name):
            try:
                content: bytes = system.cat_file(f'{folder}/{name}')
            except FileNotFoundError:
                return None
        return content

    def put(self, name: str, content: bytes | memoryview) -> None:
        """Write a file, which appears whole, also in the place of another.

        Args:
            name: Of the file.
            content: All of it.

        Raises:
            OutputError: If it cannot be written.
        """
        system, folder = self._place()
        with self._errors('write', name):
            if isinstance(system, LocalFileSystem):
                Path(folder).mkdir(parents=True, exist_ok=True)
                with whole_file(Path(folder, name)) as temporary:
                    temporary.write_bytes(content)
            else:
                # Of views, S3 takes none.
                system.pipe_file(f'{folder}/{name}', bytes(content))

    @contextmanager
    def whole(self, name: str, scratch: 'Store | None' = None) -> Iterator[Path]:
        """Give a local file to write to, which is put whole when that is over.

        Args:
            name: Of the file to be.
            scratch: Folder for the file until then, if it is on the same disk: there
                it is removed with all else if the process is killed. This one by
                default.

        Raises:
            OutputError: If it cannot be written.
        """
        system, folder = self._place()
        with self._errors('write', name, own=False):
            if isinstance(system, LocalFileSystem):
                Path(folder).mkdir(parents=True, exist_ok=True)
                way = Path(folder if scratch is None else scratch._place()[1])
                way.mkdir(parents=True, exist_ok=True)
                with whole_file(Path(folder, name), way) as temporary:
                    yield temporary
                return
            with TemporaryDirectory() as place:
                temporary = Path(place, name)
                yield temporary
                with self._errors('write', name):
                    system.put_file(str(temporary), f'{folder}/{name}')

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """Open a file to read parts of it.

        Args:
            name: Of the file.

        Raises:
            OutputError: If it cannot be read.
        """
        system, folder = self._place()
        with self._errors('read', name):
            opened = system.open(f'{folder}/{name}')
        with self._errors('read', name, own=False), opened as file:
            yield file

    def remove(self, name: str) -> None:
        """Remove a file, if there is one.

        Args:
            name: Of the file.

        Raises:
            OutputError: If it cannot be removed.
        """
        system, folder = self._place()
        with self._errors('remove', name), suppress(FileNotFoundError):
            system.rm_file(f'{folder}/{name}')

    def clear(self, first: str) -> None:
        """Remove all files, and the folder if others do not write into it meanwhile.

        Args:
            first: Name of the file to remove first.

        Raises:
            OutputError: If they cannot be removed.
        """
        self.remove(first)
        for name in self.names():
            self.remove(name)
        self.remove_if_empty()

    def remove_if_empty(self) -> None:
        """Remove the folder if there is nothing in it; object stores have none."""
        system, folder = self._place()
        if isinstance(system, LocalFileSystem):
            with self._errors('remove', ''):
                try:
                    os.rmdir(folder)
                except OSError as error:
                    if error.errno not in (errno.ENOENT, errno.ENOTEMPTY):
                        raise

    def put_new(self, name: str, content: bytes) -> bool:
        """Write a file unless there is one; of several at once, one does.

        Args:
            name: Of the file.
            content: All of it.

        Returns:
            Whether it was written.

        Raises:
            OutputError: If it cannot be written.
        """
        system, folder = self._place()
        with self._errors('write', name):
            try:
                if isinstance(system, LocalFileSystem):
                    _link_new(Path(folder), name, content)
                else:
                    system.pipe_file(f'{folder}/{name}', content, mode='create')
            except FileExistsError:
                return False
        return True

    def _place(self) -> tuple[Any, str]:
        """Return file system and folder, which fsspec keeps for each process."""
        if '://' not in self.url:
            # A path, which may hold what fsspec would take for a chain of URLs.
            return LocalFileSystem(), os.path.abspath(os.path.expanduser(self.url))
        try:
            system, folder = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise OutputError(f"cannot use '{self.url}': {error}") from error
        return system, folder.rstrip('/')

    @contextmanager
    def _errors(self, doing: str, name: str, own: bool = True) -> Iterator[None]:
        """Name the file in errors; of a store's library, *own* ones, too."""
        try:
            yield
        except DynamicVisGeoError:
            raise
        except Exception as error:
            # The library of each store has errors of its own.
            if not isinstance(error, OSError) and not (own and is_url(self.url)):
                raise
            place = f'{self.url.rstrip("/")}/{name}' if name else self.url
            told = one_line(error)
            raise OutputError(f"cannot {doing} '{place}': {told}") from error


@dataclass(frozen=True)
class Location:
    """The place of an output: its name, and the folder that it is in.

    Attributes:
        parent: The folder.
        name: Name of the file or folder of the output.
    """

    parent: Store
    name: str

    @classmethod
    def of(cls, url: str) -> 'Location':
        """Take apart a path or URL.

        Args:
            url: Of the output.
        """
        parent, name = url.rstrip('/').replace(os.sep, '/').rsplit('/', 1)
        # 's3://bucket' and '/' have no parent, and are no outputs.
        return cls(Store(parent or '/'), name)

    @property
    def failures(self) -> str:
        """Name of the list of chips that have failed."""
        return failures_name(self.name)

    @property
    def stac(self) -> Store:
        """Folder of the STAC catalogue of the output."""
        return Store(f'{self.parent.url}/{self.name}.stac')

    @property
    def blocks(self) -> Store:
        """Folder of what is done of an output that is on its way."""
        return Store(f'{self.parent.url}/{self.name}.partial')


def failures_name(name: str) -> str:
    """Name the list of failures beside an output.

    Args:
        name: Of the output.
    """
    stem = name.removesuffix('.parquet').removesuffix('.zarr')
    return f'{stem}.failures.parquet'


@contextmanager
def whole_file(path: Path, scratch: Path | None = None) -> Iterator[Path]:
    """Give a file to write to, which gets its name when it is on disk.

    If it cannot be written, nothing is left of it, and what had the name stays.

    Args:
        path: The file to be, in a folder that is there.
        scratch: Folder for the file until then, if it is on the same disk; that of
            *path* by default.
    """
    folder = path.parent
    if scratch is not None and scratch.stat().st_dev == folder.stat().st_dev:
        folder = scratch
    with _temporary(folder, path.name) as temporary:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)


@contextmanager
def _temporary(folder: Path, name: str) -> Iterator[Path]:
    """Give a name that no process on any machine has; what is left of it goes."""
    temporary = folder / f'.{name}.{secrets.token_hex(8)}.partial'
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    with path.open('rb') as file:
        os.fsync(file.fileno())


def _link_new(folder: Path, name: str, content: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with _temporary(folder, name) as temporary:
        temporary.write_bytes(content)
        _sync(temporary)
        try:
            os.link(temporary, folder / name)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            with (folder / name).open('xb') as file:
                file.write(content)
