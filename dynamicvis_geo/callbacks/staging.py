"""Outputs that appear whole or not at all."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dynamicvis_geo.errors import OutputError
from dynamicvis_geo.provenance import METADATA_FILE, read_provenance


def _check_parents(target: Path) -> None:
    existing = next(parent for parent in target.parents if parent.exists())
    if not existing.is_dir():
        raise OutputError(
            f"cannot write '{target}': '{existing}' is a file, not a folder"
        )


class StagedOutput:
    """A file or a folder that is written beside its place and then renamed into it.

    All work happens in a hidden folder next to the target, hence on the same file
    system, where a rename is atomic. What the target held before stays until then.
    """

    def __init__(self, target: Path, *, folder_of: str | None, overwrite: bool) -> None:
        """Name the target; nothing is touched yet.

        Args:
            target: Absolute path of the file or folder to be.
            folder_of: Suffix of the files in the folder; None if the target is a file.
            overwrite: Whether an existing target may be replaced.
        """
        self.target = target
        self.folder_of = folder_of
        self.overwrite = overwrite
        self.path: Path | None = None

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turn what the file system refuses into an error that names the output."""
        try:
            yield
        except OSError as error:
            reason = str(error)
            if self.path is not None and not self.path.exists():
                reason = (
                    'another process has failed, for the reason that it gives, and '
                    'has removed what was unfinished'
                )
            raise OutputError(f"cannot write '{self.target}': {reason}") from error

    def check(self) -> None:
        """Refuse a target that is there and must not be replaced.

        Raises:
            OutputError: If it exists and `overwrite` is not set, is a file where a
                folder is needed or the reverse, is a folder that holds what this
                package did not write, or lies in something that is no folder.
        """
        target = self.target
        with self.errors():
            if not target.exists():
                _check_parents(target)
                return
            is_folder = target.is_dir()
            content = sorted(target.iterdir()) if is_folder else []
        if is_folder != (self.folder_of is not None):
            found, needed = ('folder', 'file') if is_folder else ('file', 'folder')
            raise OutputError(
                f"cannot write '{target}': it is a {found}, and this output is a "
                f'{needed}; choose another name'
            )
        if is_folder and not content:
            return
        if not self.overwrite:
            raise OutputError(
                f"'{target}' exists already: choose another name, or allow it to be "
                'replaced (--overwrite, overwrite=True)'
            )
        if is_folder:
            self._check_ours(content)

    def _check_ours(self, content: list[Path]) -> None:
        for entry in content:
            # GDAL and QGIS leave statistics of a.tif in a.tif.aux.xml.
            name = entry.name.removesuffix('.aux.xml')
            known = name == METADATA_FILE or Path(name).suffix == self.folder_of
            if not (known and entry.is_file()):
                raise OutputError(
                    f"will not replace the folder '{self.target}': it also holds "
                    f"'{entry.name}', which is not part of such an output; "
                    'choose another folder'
                )
        read_provenance(self.target)

    def create(self) -> str:
        """Make the hidden folder, and so find out whether the target can be written.

        Returns:
            Its path, for the other processes to :meth:`join`.

        Raises:
            OutputError: If the file system refuses.
        """
        parent = self.target.parent
        path = parent / f'.{self.target.name}.{secrets.token_hex(4)}.partial'
        with self.errors():
            parent.mkdir(parents=True, exist_ok=True)
            path.mkdir()
        self.path = path
        return str(path)

    def join(self, path: str) -> None:
        """Write into the folder that another process made.

        Raises:
            OutputError: If this process does not see it.
        """
        if not os.path.isdir(path):
            raise OutputError(
                f"cannot write '{self.target}': this process does not see '{path}', "
                'which the first one made; the output of several machines must lie on '
                'a file system that all of them share'
            )
        self.path = Path(path)

    def publish(self, staged: Path) -> None:
        """Move what was written to its place, and clean up.

        Args:
            staged: The finished file inside the hidden folder, or the folder itself.
        """
        if self.path is None:
            raise RuntimeError('publish() needs create() or join() first')
        with self.errors():
            if self.folder_of is not None and self.target.exists():
                self._swap(staged)
            else:
                os.replace(staged, self.target)
            if self.path.exists():
                shutil.rmtree(self.path)
        self.path = None

    def _swap(self, staged: Path) -> None:
        # A folder that is not empty cannot be replaced by a rename.
        old = staged.with_suffix('.replaced')
        os.replace(self.target, old)
        try:
            os.replace(staged, self.target)
        except OSError:
            os.replace(old, self.target)
            raise
        shutil.rmtree(old)

    def discard(self) -> None:
        """Remove everything unfinished; the target stays as it was."""
        if self.path is not None:
            # Another failing process may be removing the same files.
            shutil.rmtree(self.path, ignore_errors=True)
            self.path = None
