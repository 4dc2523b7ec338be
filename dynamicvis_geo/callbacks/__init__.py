"""Lightning callbacks: what is done with predictions."""

import sys
from typing import TYPE_CHECKING

from dynamicvis_geo.formats import geoparquet, geotiff, zarr
from dynamicvis_geo.lazy import importer

if TYPE_CHECKING:
    from dynamicvis_geo.callbacks.output import Merged, RunSummary, merge
    from dynamicvis_geo.callbacks.progress import ChipProgress
    from dynamicvis_geo.callbacks.writer import EmbeddingWriter

# Blocks are planned and joined without Lightning.
_MODULES = {
    'ChipProgress': 'callbacks.progress',
    'EmbeddingWriter': 'callbacks.writer',
    'Merged': 'callbacks.output',
    'RunSummary': 'callbacks.output',
    'merge': 'callbacks.output',
}

__all__ = ['ChipProgress', 'EmbeddingWriter', 'Merged', 'RunSummary', 'merge']

# The formats that have always been modules of this folder stay importable from it.
for _format in (geoparquet, geotiff, zarr):
    sys.modules[f'{__name__}.{_format.__name__.rpartition(".")[2]}'] = _format

__getattr__ = importer(__name__, _MODULES)
