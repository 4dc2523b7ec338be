"""GeoTIFFs as datasets whose pixels are the files' own."""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pandas as pd
import shapely
import torch
from geopandas import GeoDataFrame
from numpy.typing import NDArray
from pyproj import CRS
from rasterio.enums import ColorInterp, Resampling
from rasterio.errors import RasterioError
from rasterio.io import DatasetReader
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window
from torchgeo.datasets import RasterDataset
from torchgeo.datasets.utils import GeoSlice
from upath import UPath

from dynamicvis_geo.datasets._torchgeo import georeference, in_one_line
from dynamicvis_geo.datasets.scene_files import SceneFile, find_images, inspect
from dynamicvis_geo.errors import SourceError, SpecError, one_line
from dynamicvis_geo.grid import Grid
from dynamicvis_geo.paths import AnyPath
from dynamicvis_geo.projections import crs_name
from dynamicvis_geo.rasters import apart_from_parent, is_remote, open_raster

#: Lattices that differ by less than this share of a pixel count as the same.
ALIGNED = 0.01


class Scenes(RasterDataset):
    """Images that share a CRS and a pixel lattice, three bands of each.

    Unlike a plain :class:`~torchgeo.datasets.RasterDataset` it never leaves out a file
    that it cannot read, tells masked pixels from data, and gives the pixels of the
    files themselves to queries on their lattice. Other queries are resampled
    (bilinear).

    A file with a date in its name (eight digits, as in ``_20160112_``) has that day as
    its time window; others are valid at all times. Where files of one time window
    overlap, the first in the order of their names wins.

    A sample holds ``image``, float32 ``[3, height, width]``, the values as stored with
    masked pixels set to 0; ``valid_fraction``, float32 ``[1]``, the share of pixels
    that lie inside the files and are masked in none of the usual ways (nodata value,
    NaN, alpha or mask band) in at least one of the bands; and the georeference keys of
    the installed TorchGeo.
    """

    def __init__(
        self,
        paths: AnyPath | Iterable[AnyPath],
        bands: Sequence[int] = (1, 2, 3),
        transforms: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    ) -> None:
        """Open the images.

        Args:
            paths: GeoTIFF files, or folders of them; or URLs or GDAL's paths of such.
            bands: Three band numbers, from 1: red, green and blue, or what stands in
                their place.
            transforms: A function of a sample that returns a transformed sample.

        Raises:
            SpecError: If *bands* are not three band numbers.
            SourceError: If a file cannot be used, or the files do not share a lattice.
        """
        self._bands = _checked_bands(bands)
        self.bands = self._bands  # type: ignore[assignment]
        if isinstance(paths, str | os.PathLike | UPath):
            paths = [paths]
        files = [file for path in paths for file in find_images(path)]
        files = list(dict.fromkeys(files))
        images = [inspect(file, self._bands) for file in files]
        for image in images[1:]:
            if not images[0].grid.aligned(image.grid, ALIGNED):
                raise SourceError(
                    f'{image.path}: its CRS, resolution or pixel lattice differs from '
                    f'that of {images[0].path}: open them with open_scenes'
                )
        self.paths = files
        self.transforms = transforms
        self.time_series = False
        self._res = images[0].grid.res
        self._images = {image.path: image for image in images}
        self.index = GeoDataFrame(
            {'filepath': self.paths},
            geometry=[shapely.box(*image.grid.bounds) for image in images],
            index=pd.IntervalIndex(
                [image.window.interval for image in images],
                closed='both',
                name='datetime',
            ),
            crs=images[0].grid.crs,
        )

    def __repr__(self) -> str:
        """Count the images, and say where they are."""
        return in_one_line(self)

    def __getitem__(self, query: GeoSlice) -> dict[str, Any]:
        """Read the pixels of a query.

        Args:
            query: ``[xmin:xmax:xres, ymin:ymax:yres, tmin:tmax:tres]`` to index.

        Returns:
            The sample.

        Raises:
            IndexError: If no file lies in *query*.
            SourceError: If a file can no longer be read.
        """
        x, y, t = self._disambiguate_slice(query)
        images = self._overlapping(x, y, t)
        if not images:
            raise IndexError(
                f'query: {query} not found in index with bounds: {self.bounds}'
            )
        grid = Grid.from_slices(crs_name(self.crs), x, y)
        pixels = np.zeros((len(self._bands), *grid.shape), np.float32)
        valid = np.zeros(grid.shape, dtype=bool)
        for image in images:
            paint = partial(self._paint, image, grid, pixels, valid)
            apart_from_parent(paint) if is_remote(image.path) else paint()
            if valid.all():
                break
        sample: dict[str, Any] = {
            'image': torch.from_numpy(pixels),
            'valid_fraction': torch.tensor([valid.mean()], dtype=torch.float32),
            **georeference(self, query),
        }
        if self.transforms is not None:
            sample = self.transforms(sample)
        return sample

    def _overlapping(self, x: slice, y: slice, t: slice) -> list[SceneFile]:
        """Return the images that share an area, not just an edge, with a query."""
        index = self.index[self.index.index.overlaps(pd.Interval(t.start, t.stop))]
        index = index.iloc[:: t.step]
        west, south, east, north = index.geometry.bounds.to_numpy().T
        hit = (west < x.stop) & (east > x.start) & (south < y.stop) & (north > y.start)
        return [self._images[path] for path in index['filepath'].to_numpy()[hit]]

    def _paint(
        self,
        image: SceneFile,
        grid: Grid,
        pixels: NDArray[np.float32],
        valid: NDArray[np.bool_],
    ) -> None:
        """Fill in, in place, the pixels that one file has and no file before it."""
        try:
            modified = 0 if is_remote(image.path) else os.stat(image.path).st_mtime_ns
            handle = _open(image.path, modified, os.getpid(), threading.get_ident())
            if image.grid.aligned(grid, ALIGNED):
                offset = image.grid.offset(grid)
                _paint_exact(handle, self._bands, offset, pixels, valid)
            else:
                _paint_resampled(handle, self._bands, grid, pixels, valid)
        except (OSError, RasterioError) as error:
            raise SourceError(
                f'{image.path}: its pixels cannot be read ({one_line(error)}): the '
                'file may be cut off or have changed; make it anew or remove it'
            ) from error


def open_scenes(path: AnyPath, bands: Sequence[int] = (1, 2, 3)) -> list[Scenes]:
    """Open a GeoTIFF, or all in a folder, each in its own CRS and on its own pixels.

    Args:
        path: A raster file, or a folder that is searched, with all folders in it, for
            ``*.tif`` and ``*.tiff`` in any case; or the URL of one, or GDAL's path
            (``/vsi...``) of a file or of a folder of a store.
        bands: Three band numbers, from 1.

    Returns:
        One dataset for each set of files that share a CRS and a pixel lattice, files
        with and without a date apart, in the order of their first file.

    Raises:
        SpecError: If *bands* are not three band numbers.
        SourceError: If there is no image, or one of them cannot be used.
    """
    checked = _checked_bands(bands)
    groups: list[list[SceneFile]] = []
    for file in find_images(path):
        image = inspect(file, checked)
        for group in groups:
            # An image without a date would show through in those of every day.
            if group[0].window.is_limited == image.window.is_limited and group[
                0
            ].grid.aligned(image.grid, ALIGNED):
                group.append(image)
                break
        else:
            groups.append([image])
    return [Scenes([image.path for image in group], bands) for group in groups]


def _checked_bands(bands: Sequence[int]) -> tuple[int, int, int]:
    remedy = f'bands={bands!r} must be three band numbers from 1, such as (1, 2, 3)'
    try:
        red, green, blue = bands
    except (TypeError, ValueError) as error:
        raise SpecError(remedy) from error
    checked = (red, green, blue)
    if not all(isinstance(band, int | np.integer) and band >= 1 for band in checked):
        raise SpecError(remedy)
    return checked


@lru_cache(maxsize=64)
def _open(path: str, modified: int, process: int, thread: int) -> DatasetReader:
    """Open a file once for each version of it, process and thread.

    Processes that share a handle after a fork read wrong bytes, and handles are not
    safe to share among threads. The caller passes in who it is.
    """
    return open_raster(path)


# Files that are closed later than this fail to, noisily, while Python shuts down.
atexit.register(_open.cache_clear)


def _paint_exact(
    handle: DatasetReader,
    bands: tuple[int, ...],
    offset: tuple[int, int],
    pixels: NDArray[np.float32],
    valid: NDArray[np.bool_],
) -> None:
    """Copy the pixels of a file; *offset* is the row and column of the query in it."""
    row, col = offset
    top, left = max(-row, 0), max(-col, 0)
    bottom = min(handle.height - row, valid.shape[0])
    right = min(handle.width - col, valid.shape[1])
    if bottom <= top or right <= left:
        return
    window = Window(col + left, row + top, right - left, bottom - top)
    part = (slice(top, bottom), slice(left, right))
    _merge(
        handle.read(bands, window=window),
        handle.read_masks(bands, window=window) > 0,
        pixels[:, *part],
        valid[part],
    )


def _paint_resampled(
    handle: DatasetReader,
    bands: tuple[int, ...],
    grid: Grid,
    pixels: NDArray[np.float32],
    valid: NDArray[np.bool_],
) -> None:
    """Resample the pixels of a file to the grid of the query."""
    kinds = list(handle.colorinterp)
    has_alpha = ColorInterp.alpha in kinds
    with WarpedVRT(
        handle,
        crs=CRS.from_user_input(grid.crs).to_wkt(),
        transform=grid.transform,
        height=grid.height,
        width=grid.width,
        resampling=Resampling.bilinear,
        add_alpha=not has_alpha,
    ) as vrt:
        # The mask of a warped dataset misses where the source ends; its alpha does not.
        alpha = kinds.index(ColorInterp.alpha) + 1 if has_alpha else vrt.count
        inside = vrt.read(alpha) > 0
        read = vrt.read(bands)
    _merge(read, np.broadcast_to(inside, read.shape), pixels, valid)


def _merge(
    read: NDArray[Any],
    mask: NDArray[np.bool_],
    pixels: NDArray[np.float32],
    valid: NDArray[np.bool_],
) -> None:
    """Add, in place, what was read where there is nothing yet."""
    mask = mask & ~np.isnan(read)
    new = mask.any(axis=0) & ~valid
    np.copyto(pixels, np.where(mask, read, 0), where=new)
    valid |= new
