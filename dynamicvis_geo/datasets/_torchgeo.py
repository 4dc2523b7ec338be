"""The one place where the versions of TorchGeo differ.

TorchGeo 0.8 gives every sample of a geospatial dataset ``crs`` and ``bounds`` (the
query itself); 0.9 and later give ``bounds`` and ``transform`` as tensors and no
``crs``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rasterio.transform import from_origin
from torch import Tensor
from torchgeo.datasets import GeoDataset, RasterDataset
from torchgeo.datasets.utils import GeoSlice

from dynamicvis_geo.projections import crs_name

_TO_TENSOR = '_slice_to_tensor'


def georeference(dataset: GeoDataset, query: GeoSlice) -> dict[str, Any]:
    """Return the georeference keys that the installed TorchGeo gives a sample.

    Args:
        dataset: The dataset that makes the sample.
        query: What it was indexed with: slices of x, y and time.

    Returns:
        ``bounds``, and ``crs`` (TorchGeo 0.8) or ``transform`` (0.9 and later).
    """
    if not hasattr(dataset, _TO_TENSOR):
        return {'crs': dataset.crs, 'bounds': query}
    x, y, _ = dataset._disambiguate_slice(query)
    to_tensor: Callable[[GeoSlice], Tensor] = getattr(dataset, _TO_TENSOR)
    return {
        'bounds': to_tensor(query),
        'transform': torch.tensor(from_origin(x.start, y.stop, x.step, y.step)),
    }


def in_one_line(dataset: GeoDataset) -> str:
    """Name a dataset, where TorchGeo's have no ``repr`` of their own."""
    width, height = dataset.res
    return (
        f'<{type(dataset).__name__}: index of {len(dataset)}, '
        f'{crs_name(dataset.crs)}, pixels of {width:g} x {height:g}>'
    )


def forget_file_handles() -> None:
    """Forget the open files that TorchGeo's raster datasets keep.

    A process that was forked shares the file position of each inherited handle with its
    parent and its siblings, and then reads wrong bytes. To be called once in the child.
    """
    RasterDataset._cached_load_warp_file.cache_clear()
