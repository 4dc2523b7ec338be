"""Image files: finding them, and reading their headers and names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePath

import pandas as pd
from pyproj import CRS
from rasterio.errors import RasterioError

from dynamicvis_geo.errors import SourceError, one_line
from dynamicvis_geo.grid import Grid
from dynamicvis_geo.paths import AnyPath, Place, image_path, input_path, kind_of
from dynamicvis_geo.projections import crs_name
from dynamicvis_geo.rasters import gdal_name, open_raster
from dynamicvis_geo.time_window import ALWAYS, TimeWindow

SUFFIXES = ('.tif', '.tiff')

#: Stores in which GDAL's paths may name folders.
_STORES = {'/vsis3/': 's3://', '/vsigs/': 'gs://', '/vsiaz/': 'az://'}

_DATE = re.compile(r'(?<!\d)(?:19|20)\d{6}(?!\d)')


@dataclass(frozen=True)
class SceneFile:
    """An image file as its header and its name describe it.

    Attributes:
        path: The file, or its URL, or GDAL's name of it.
        grid: Its pixels.
        window: Its time.
    """

    path: str
    grid: Grid
    window: TimeWindow


def find_images(path: AnyPath) -> list[str]:
    """Find the images that a path, a URL or one of GDAL's paths stands for.

    Args:
        path: A GeoTIFF, or a folder of them.

    Returns:
        Names that GDAL has for them, sorted.

    Raises:
        SourceError: As :func:`find_files`.
    """
    checked = image_path(path)
    if not isinstance(checked, str):
        return [str(file) for file in find_files(checked)]
    for prefix, protocol in _STORES.items():
        if checked.startswith(prefix) and not checked.lower().endswith(SUFFIXES):
            url = input_path(checked.replace(prefix, protocol, 1))
            return [gdal_name(file) for file in find_files(url)]
    return [checked]


def check_images(path: AnyPath, bands: tuple[int, int, int]) -> None:
    """Look for images, and at the first one, where that takes no network.

    Args:
        path: As for :func:`find_images`.
        bands: As for :func:`inspect`.

    Raises:
        SourceError: As of these.
    """
    if isinstance(image_path(path), Path):
        inspect(find_images(path)[0], bands)


def find_files(path: Place) -> list[Place]:
    """Find the GeoTIFFs that a path or a URL stands for.

    Args:
        path: A GeoTIFF, or a folder that is searched with all folders in it.

    Returns:
        The files, sorted.

    Raises:
        SourceError: If there is none, or its store cannot be reached.
    """
    remote = not isinstance(path, Path)
    if remote and path.suffix.lower() in SUFFIXES:
        # GDAL, which is to read it, may know more than fsspec of how to get there.
        return [path]
    kind = kind_of(path)
    if kind == 'file':
        return [path]
    if kind is None:
        raise SourceError(
            f'{path}: no such file or folder; give a GeoTIFF or a folder of them'
        )
    files: list[Place] = sorted(
        file
        for file in path.rglob('*')
        if file.suffix.lower() in SUFFIXES and (remote or file.is_file())
    )
    if not files:
        raise SourceError(
            f'{path}: no *.tif or *.tiff file in it or in the folders below it; give a '
            'folder that holds GeoTIFFs'
        )
    return files


def inspect(path: Place | str, bands: tuple[int, int, int]) -> SceneFile:
    """Read the header of an image, and the day in its name.

    Args:
        path: The file, or GDAL's name of it.
        bands: Numbers of the red, green and blue band, from 1.

    Returns:
        The image without its pixels.

    Raises:
        SourceError: If the file cannot be read, or not be embedded truthfully.
    """
    try:
        with open_raster(path) as source:
            if source.crs is None:
                raise SourceError(
                    f'{path}: the file has no CRS; name it with gdal_edit -a_srs, or '
                    'warp an image with control points with gdalwarp'
                )
            transform = source.transform
            if transform.b or transform.d or transform.a <= 0 or transform.e >= 0:
                raise SourceError(
                    f'{path}: its rows do not run from west to east, north first '
                    f'(geotransform {transform.to_gdal()}); warp it north-up with '
                    'gdalwarp'
                )
            if max(bands) > source.count:
                count = f'{source.count} band' + 's' * (source.count != 1)
                raise SourceError(
                    f'{path}: the file has {count}, but bands {bands} are asked for; '
                    'choose three of its bands, the same one twice if need be'
                )
            kinds = {source.dtypes[band - 1] for band in bands}
            if any('complex' in kind for kind in kinds):
                raise SourceError(
                    f'{path}: its values are {", ".join(sorted(kinds))}; convert '
                    'complex values to amplitudes first'
                )
            grid = Grid(
                crs_name(CRS.from_user_input(source.crs)),
                x=transform.c,
                y=transform.f,
                width=source.width,
                height=source.height,
                xres=transform.a,
                yres=-transform.e,
            )
            window = window_of_name(PurePath(str(path)).stem)
            return SceneFile(str(path), grid, window)
    except RasterioError as error:
        raise SourceError(
            f'{path}: rasterio cannot open it ({one_line(error)}); repair or remove it'
        ) from error


def window_of_name(name: str) -> TimeWindow:
    """Read the day that a file name holds, as eight digits.

    Args:
        name: The name.

    Returns:
        That day; all of time if there is none.
    """
    for digits in _DATE.findall(name):
        start = pd.to_datetime(digits, format='%Y%m%d', errors='coerce')
        if not pd.isna(start):
            return TimeWindow(start, start + pd.Timedelta(days=1))
    return ALWAYS
