"""Formats of output: each writes, joins and reads its own files, in its own module.

A new one is a :class:`~.base.Format` in a module of this folder, and a line of
:data:`FORMATS`.
"""

from pathlib import Path

from dynamicvis_geo.errors import OutputError
from dynamicvis_geo.formats.base import Format
from dynamicvis_geo.formats.geoparquet import GeoParquet
from dynamicvis_geo.formats.geotiff import GeoTIFF
from dynamicvis_geo.formats.zarr import Zarr
from dynamicvis_geo.paths import Place

#: All formats. What an output is of is asked of the later ones first: put a format
#: whose outputs another one would take for its own behind that.
FORMATS: dict[str, type[Format]] = {
    'geoparquet': GeoParquet,
    'geotiff': GeoTIFF,
    'zarr': Zarr,
}


def format_at(path: Place, is_folder: bool) -> type[Format] | None:
    """Return the format of what lies at a path; None if it is of none.

    Args:
        path: File or folder.
        is_folder: Which of the two.
    """
    for one in reversed(FORMATS.values()):
        if one.is_at(path, is_folder):
            return one
    return None


def resolve_format(url: str, name: str | None) -> str:
    """Return the name of a format.

    Args:
        url: File or folder to write.
        name: One of :data:`FORMATS`, or None to tell it from `url`.

    Raises:
        OutputError: If it is unknown, does not fit `url`, or cannot be told.
    """
    last = url.rstrip('/').rsplit('/', 1)[-1]
    dot = last.rfind('.')
    suffix = last[dot:].lower() if dot > 0 else ''
    told = next((n for n, one in FORMATS.items() if suffix in one.suffixes), None)
    if name is None:
        if told is None and suffix and not Path(url).is_dir():
            raise OutputError(
                f"cannot tell the format of '{url}': end it in .parquet for pooled "
                'embeddings, or in .zarr or name a folder (without suffix) for feature '
                f'maps; format= chooses among {", ".join(FORMATS)}'
            )
        return told or 'geotiff'
    if name not in FORMATS:
        raise OutputError(
            f"format='{name}' is unknown: choose among {', '.join(FORMATS)}"
        )
    if told not in (None, name):
        raise OutputError(
            f"format='{name}' does not fit '{url}', whose name is that of {told}"
        )
    return name
