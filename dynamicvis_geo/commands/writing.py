"""Files that commands write beside what the other rooms write."""

from collections.abc import Callable
from pathlib import Path

from dynamicvis_geo.errors import OutputError

#: Endings of figures.
FIGURES = ('.png', '.pdf', '.svg')


def write_file(
    path: Path, write: Callable[[Path], None], option: str = '--output'
) -> None:
    """Write a file, in a folder that need not exist.

    Args:
        path: Of the file.
        write: Writes it.
        option: What named the path.

    Raises:
        OutputError: If it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
    except OSError as error:
        raise OutputError(
            f'cannot write {path}: {error}; choose another {option}'
        ) from error
