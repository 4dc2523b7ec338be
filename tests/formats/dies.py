"""A process that is killed while it merges; it imports no PyTorch, to begin at once."""

import os
import signal

from dynamicvis_geo.formats import parquet_files
from dynamicvis_geo.formats.block_files import Blocks
from dynamicvis_geo.formats.geoparquet import GeoParquet


def die_in_merge(blocks: Blocks, path: str) -> None:
    """Be killed when the first row group should be written."""

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    parquet_files.GeoParquetWriter.write = die  # type: ignore[assignment,method-assign]
    GeoParquet(path, 'float32').merge(blocks)
