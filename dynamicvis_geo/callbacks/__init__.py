"""Lightning callbacks: what is done with predictions."""

import sys

from dynamicvis_geo.callbacks.output import Merged, RunSummary, merge
from dynamicvis_geo.callbacks.progress import ChipProgress
from dynamicvis_geo.callbacks.writer import EmbeddingWriter
from dynamicvis_geo.formats import geoparquet, geotiff, zarr

__all__ = ['ChipProgress', 'EmbeddingWriter', 'Merged', 'RunSummary', 'merge']

# The formats that have always been modules of this folder stay importable from it.
for _format in (geoparquet, geotiff, zarr):
    sys.modules[f'{__name__}.{_format.__name__.rpartition(".")[2]}'] = _format
