"""The folder beside an output that keeps what an unfinished run has done."""

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dynamicvis_geo.errors import OutputError
from dynamicvis_geo.provenance import to_json

#: Seconds that a run waits for another one to let go of the output: processes that
#: outlive a killed parent need a moment to find out.
LOCK_PATIENCE = 30.0

_RUN_FILE = 'run.json'


def run_folder_of(target: Path) -> Path:
    """Return the folder that keeps unfinished work on *target*."""
    return target.with_name(f'{target.name}.partial')


class RunFolder:
    """What an unfinished run leaves for the next one.

    ``run.json`` holds the provenance of the run and a word, its *token*, that names the
    run which may write at present; ``lock`` is held while the first process lives.
    """

    def __init__(self, target: Path) -> None:
        """Name the folder; nothing is touched yet."""
        self.target = target
        self.path = run_folder_of(target)
        self._lock: FileLock | None = None

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turn what the file system refuses into an error that names the output."""
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"cannot write '{self.target}': {error}; make room or choose another "
                'output'
            ) from error

    def acquire(self) -> None:
        """Make the folder and take the lock, in the first process.

        Raises:
            OutputError: If another run has it, or the file system refuses.
        """
        deadline = time.monotonic() + LOCK_PATIENCE
        with self.errors():
            self._remove_old()
            while True:
                self.path.mkdir(parents=True, exist_ok=True)
                lock = FileLock(self.path / 'lock')
                try:
                    lock.acquire(timeout=max(0.0, deadline - time.monotonic()))
                except Timeout as error:
                    raise OutputError(
                        f"another run is writing '{self.target}': wait for it or end "
                        'it, or choose another output'
                    ) from error
                # A run that ends removes the folder, with the lock that was waited for.
                if (self.path / 'lock').exists():
                    self._lock = lock
                    return
                lock.release()

    def release(self) -> None:
        """Let go of the lock."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def read(self) -> dict[str, Any] | None:
        """Return the provenance of the run that was here; None if there was none.

        Raises:
            OutputError: If it cannot be read.
        """
        file = self.path / _RUN_FILE
        try:
            text = file.read_text(encoding='utf-8')
        except FileNotFoundError:
            return None
        except OSError as error:
            raise OutputError(f"cannot read '{file}': {error}") from error
        try:
            provenance: dict[str, Any] = json.loads(text)['provenance']
        except (ValueError, KeyError, TypeError) as error:
            raise OutputError(
                f"'{file}' is damaged ({error}): remove the folder '{self.path}' to "
                'start anew'
            ) from error
        return provenance

    def begin(self, token: str, provenance: Mapping[str, Any]) -> None:
        """Say what is being made now, and by which run."""
        text = to_json({'token': token, 'provenance': provenance}, indent=2)
        with self.errors():
            write_atomically(self.path / _RUN_FILE, text.encode())

    def require(self, token: str) -> None:
        """Check that no other run has taken over.

        Raises:
            OutputError: If one has, or the folder is gone.
        """
        try:
            current = json.loads((self.path / _RUN_FILE).read_bytes())['token']
        except FileNotFoundError as error:
            raise OutputError(
                f"cannot write '{self.target}': the folder '{self.path}' of this run "
                'is gone'
            ) from error
        if current != token:
            raise OutputError(
                f"cannot write '{self.target}': another run has taken over"
            )

    def remove(self) -> None:
        """Remove the folder and all that is in it."""
        with self.errors():
            self._remove_old()
            if self.path.exists():
                # Other processes still leave signs of life in it: by another name they
                # do not find it any more.
                os.replace(self.path, self._old)
            self._remove_old()
        self.release()

    @property
    def _old(self) -> Path:
        return self.path.with_name(f'.{self.path.name}.old')

    def _remove_old(self) -> None:
        if self._old.exists():
            shutil.rmtree(self._old)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a name to write to; the file appears under its own when it is on disk."""
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.partial')
    try:
        yield temporary
        with temporary.open('rb') as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write a file that appears whole, and is on disk when this returns."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content)
