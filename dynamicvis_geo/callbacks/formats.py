"""Which format an output has."""

from pathlib import Path

from dynamicvis_geo.callbacks.geotiff import GeoTIFFFolder
from dynamicvis_geo.callbacks.parquet_parts import FILE_SUFFIXES, GeoParquetParts
from dynamicvis_geo.callbacks.sink import Sink
from dynamicvis_geo.callbacks.zarr_mosaic import ZarrMosaic
from dynamicvis_geo.errors import OutputError

FORMATS: dict[str, type[Sink]] = {
    'geoparquet': GeoParquetParts,
    'geotiff': GeoTIFFFolder,
    'zarr': ZarrMosaic,
}

_SUFFIXES = {**dict.fromkeys(FILE_SUFFIXES, 'geoparquet'), '.zarr': 'zarr'}


def resolve_format(path: Path, name: str | None) -> str:
    """Return the name of a format.

    Args:
        path: File or folder to write.
        name: One of :data:`FORMATS`, or None to tell it from `path`.

    Raises:
        OutputError: If it is unknown, does not fit `path`, or cannot be told.
    """
    told = _SUFFIXES.get(path.suffix.lower())
    if name is None:
        if told is None and path.suffix and not path.is_dir():
            raise OutputError(
                f"cannot tell the format of '{path}': end it in .parquet for pooled "
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
            f"format='{name}' does not fit '{path}', whose name is that of {told}"
        )
    return name


def is_folder(path: Path, name: str) -> bool:
    """Return whether an output of a format is a folder."""
    return name != 'geoparquet' or path.suffix.lower() not in FILE_SUFFIXES
