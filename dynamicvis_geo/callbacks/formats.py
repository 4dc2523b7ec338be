"""Formats of output, and what each of them does."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import pyarrow as pa

from dynamicvis_geo.callbacks.blocks import Description, Plan
from dynamicvis_geo.callbacks.geotiff import GeoTIFFFolder
from dynamicvis_geo.callbacks.parquet_blocks import Merged
from dynamicvis_geo.callbacks.parquet_merge import FILE_SUFFIXES, GeoParquet
from dynamicvis_geo.callbacks.predictions import ChipTable, Predictions
from dynamicvis_geo.callbacks.store import Store
from dynamicvis_geo.callbacks.zarr_mosaic import ZarrMosaic
from dynamicvis_geo.errors import OutputError


@dataclass(frozen=True)
class Work:
    """What a process knows of the run whose blocks it does.

    Attributes:
        store: Where the blocks are put.
        chips: Where and when the chips are.
        plan: The blocks.
        run: The description of the run.
    """

    store: Store
    chips: ChipTable
    plan: Plan
    run: Description


class Format(Protocol):
    """One format of output.

    A block is finished when its file is there (:mod:`.parquet_blocks`); what else a
    format stores of it is on disk before. All of these may be called again, by any
    process, on an output that others have left at any point.

    Attributes:
        output: What it takes of the task: 'pooled' or 'grid'.
        dtypes: Types in which it can store embeddings.
        members: Patterns of the names of all that it puts into a folder: what else a
            folder holds is not part of the output.
    """

    output: ClassVar[str]
    dtypes: ClassVar[tuple[str, ...]]
    members: ClassVar[tuple[str, ...]]

    def __init__(self, url: str, dtype: str) -> None:
        """Say where the output is, and the type of its numbers; nothing is read."""

    def held(self) -> pa.StringArray:
        """Keys of the chips that the finished output holds; empty without one."""

    def check(self, chips: ChipTable) -> None:
        """Refuse chips that it cannot hold, before their images are fetched.

        Raises:
            OutputError: If there are such chips.
        """

    def origins(self, chips: ChipTable) -> Sequence[tuple[float, float] | None]:
        """Say from where the tiles of the plan hang, for each source of the chips.

        Returns:
            A point in the CRS of the source, or None for the origin of that CRS.
        """

    def write_maps(self, work: Work, number: int, predictions: Predictions) -> None:
        """Store the feature maps of a block; they are on disk when this returns."""

    def merge(self, store: Store, run: Description, partial: bool) -> Merged:
        """Make the output of the blocks, from what is on disk alone.

        Args:
            store: Where the blocks are; they stay.
            run: The description of the run.
            partial: Whether blocks may be missing.

        Raises:
            OutputError: If blocks are missing that may not, or something cannot be
                read or written.
        """


FORMATS: dict[str, type[Format]] = {
    'geoparquet': GeoParquet,
    'geotiff': GeoTIFFFolder,
    'zarr': ZarrMosaic,
}

_SUFFIXES = {**dict.fromkeys(FILE_SUFFIXES, 'geoparquet'), '.zarr': 'zarr'}


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
    told = _SUFFIXES.get(suffix)
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


def is_folder(url: str, name: str) -> bool:
    """Return whether an output of a format is a folder."""
    return name != 'geoparquet' or not url.lower().endswith(FILE_SUFFIXES)
