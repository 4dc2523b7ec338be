"""Images of chips, found among local files and read in a size to look at."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pyproj import CRS
from rasterio.enums import Resampling
from rasterio.errors import RasterioError
from rasterio.windows import Window

from dynamicvis_geo.datasets.scene_files import (
    SceneFile,
    find_images,
    inspect,
)
from dynamicvis_geo.errors import SourceError
from dynamicvis_geo.paths import AnyPath, Place, image_path
from dynamicvis_geo.projections import crs_name
from dynamicvis_geo.rasters import open_raster
from dynamicvis_geo.time_window import TimeWindow

Bounds = tuple[float, float, float, float]

# Files of ChipCache: the id of the chip, and a hash of the request.
_CACHED = re.compile(r'(?P<id>.+)_[0-9a-f]{32}\.tif')


class Quicklooks:
    """Looks up the images of chips in a folder of scenes, or in a cache of chips.

    In a cache (``--cache`` of dynamicvis-geo embed and fetch) a chip is found by its
    id; where it was fetched under several settings, the newest file counts. Scenes are
    read where the chip lies, if they have its CRS and, where their names hold a date,
    its time.
    """

    def __init__(
        self,
        path: AnyPath,
        bands: tuple[int, int, int] = (1, 2, 3),
        pixels: int = 256,
    ) -> None:
        """Look at the names and headers of the files.

        Args:
            path: A GeoTIFF, or a folder of them, also at a URL; or a cache of chips.
            bands: The bands of scenes that stand for red, green and blue; cached chips
                have these three in order.
            pixels: The longest side of what is read.

        Raises:
            SourceError: If there is no image, or one cannot be read.
        """
        self.path, self.bands, self.pixels = image_path(path), bands, pixels
        self.cached = cached_chips(self.path)
        self._scenes: list[SceneFile] = []
        if not self.cached:
            self._scenes = [inspect(file, bands) for file in find_images(self.path)]

    def __call__(self, chip: pd.Series) -> NDArray[np.float32] | None:
        """Read the image of a chip.

        Args:
            chip: ``id``, ``crs``, ``minx`` to ``maxy``, ``start``, ``end``.

        Returns:
            ``[3, h, w]``, NaN where no image has a value; None if no file shows it.
        """
        if self.cached:
            path = self.cached.get(str(chip['id']))
            return None if path is None else read_image(path, pixels=self.pixels)
        if not chip['crs'] or not np.isfinite(chip['minx']):
            return None
        bounds: Bounds = tuple(chip[['minx', 'miny', 'maxx', 'maxy']])
        crs = CRS.from_user_input(chip['crs'])
        image = None
        for scene in self._scenes:
            if not (_overlap(scene.grid.bounds, bounds) and _same_time(scene, chip)):
                continue
            if CRS.from_user_input(scene.grid.crs) != crs:
                continue
            part = read_image(scene.path, self.bands, bounds, self.pixels)
            image = part if image is None else np.where(np.isnan(image), part, image)
        return None if image is None or np.isnan(image).all() else image


def cached_chips(path: Place | str) -> dict[str, Path]:
    """Return the files of a cache of chips by the ids of the chips; none elsewhere.

    Args:
        path: The cache, or anything else.
    """
    found: dict[str, Path] = {}
    if not isinstance(path, Path):
        return found
    for file in sorted(path.glob('??/[!.]*.tif'), key=lambda f: f.stat().st_mtime):
        match = _CACHED.fullmatch(file.name)
        if match:
            found[match['id']] = file
    return found


def read_image(
    path: AnyPath,
    bands: tuple[int, int, int] = (1, 2, 3),
    bounds: Bounds | None = None,
    pixels: int = 2048,
) -> NDArray[np.float32]:
    """Read an image, or a part of it, in a size to look at.

    Args:
        path: A GeoTIFF.
        bands: Those that stand for red, green and blue; of an image with one or two
            bands the first is read alone.
        bounds: West, south, east and north of the part, in its CRS; it may reach over
            the edges. The whole image by default.
        pixels: The longest side of what is returned; larger images are averaged.

    Returns:
        ``[3, h, w]`` or ``[1, h, w]``, NaN where the image has no value.

    Raises:
        SourceError: If the image cannot be read, or lacks these bands.
    """
    try:
        with open_raster(path) as source:
            chosen = [1] if source.count < 3 and bands == (1, 2, 3) else list(bands)
            if max(chosen) > source.count:
                raise SourceError(
                    f'{path}: the file has {source.count} bands, but bands {bands} are '
                    'asked for; choose others with --bands'
                )
            whole = Window(0, 0, source.width, source.height)
            window = whole if bounds is None else source.window(*bounds)
            scale = min(1.0, pixels / max(window.width, window.height))
            height, width = (
                max(1, round(side * scale)) for side in (window.height, window.width)
            )
            image = np.full((len(chosen), height, width), np.nan, np.float32)
            # Where the image lies in the picture, in pixels of the picture.
            top, bottom = _inside(window.row_off, source.height, scale, height)
            left, right = _inside(window.col_off, source.width, scale, width)
            if bottom > top and right > left:
                part = source.read(
                    chosen,
                    window=Window(
                        window.col_off + left / scale,
                        window.row_off + top / scale,
                        (right - left) / scale,
                        (bottom - top) / scale,
                    ).intersection(whole),
                    out_shape=(len(chosen), bottom - top, right - left),
                    masked=True,
                    resampling=Resampling.average,
                    out_dtype='float32',
                )
                image[:, top:bottom, left:right] = part.filled(np.nan)
    except RasterioError as error:
        raise SourceError(
            f'{path}: rasterio cannot read it ({error}); repair or remove it'
        ) from error
    return image


def georeference(path: AnyPath) -> tuple[str, Bounds] | None:
    """Read where an image lies.

    Args:
        path: A GeoTIFF.

    Returns:
        CRS, and west, south, east and north in its units; None if the image has no
        place, or its rows do not run from west to east, north first.

    Raises:
        RasterioError: If it cannot be read.
    """
    with open_raster(path) as source:
        if source.crs is None:
            return None
        crs, step = CRS.from_user_input(source.crs), source.transform
        on_earth = crs.is_projected or crs.is_geographic
        if not on_earth or step.b or step.d or step.a <= 0 or step.e >= 0:
            return None
        return crs_name(crs), tuple(source.bounds)


def _inside(offset: float, size: int, scale: float, length: int) -> tuple[int, int]:
    first = int(np.clip(round(-offset * scale), 0, length))
    last = int(np.clip(round((size - offset) * scale), 0, length))
    return first, last


def _overlap(one: Bounds, other: Bounds) -> bool:
    return (
        one[0] < other[2]
        and other[0] < one[2]
        and one[1] < other[3]
        and other[1] < one[3]
    )


def _same_time(scene: SceneFile, chip: pd.Series) -> bool:
    return scene.window.overlaps(TimeWindow.closed(chip['start'], chip['end']))
