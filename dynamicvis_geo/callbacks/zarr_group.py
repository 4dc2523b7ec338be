"""One Zarr group: the feature maps of one CRS, with coordinates that xarray reads."""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
from pyproj import CRS

from dynamicvis_geo.callbacks.mosaic import Layout
from dynamicvis_geo.errors import OutputError

#: Name of the array. Not ``embedding``, which is one of its dimensions: xarray would
#: take it for the coordinate of that dimension.
ARRAY = 'embeddings'

_DIMENSIONS = ('time', 'embedding', 'y', 'x')
_CLOCK = {'units': 'nanoseconds since 1970-01-01', 'calendar': 'proleptic_gregorian'}
_ZSTD_LEVEL = 3


def require_zarr() -> ModuleType:
    """Import the zarr package.

    Raises:
        OutputError: If it is missing, or older than Zarr format 3.
    """
    try:
        import zarr
    except ImportError as error:
        raise OutputError(
            'writing Zarr needs the package zarr, which is not installed: '
            "pip install 'dynamicvis-geo[zarr]'"
        ) from error
    if not hasattr(zarr, 'create_array'):
        raise OutputError(
            f'writing Zarr needs zarr 3, but zarr {zarr.__version__} is installed: '
            "pip install --upgrade 'dynamicvis-geo[zarr]'"
        )
    return zarr


def group_name(crs: str) -> str:
    """Return the name of the group of a CRS.

    Args:
        crs: Authority and code, or WKT.

    Returns:
        Such as ``EPSG_32618``; for a CRS without authority its name and a hash.
    """
    if re.fullmatch(r'[A-Za-z0-9]+:[A-Za-z0-9.-]+', crs):
        return crs.replace(':', '_')
    label = re.sub(r'[^A-Za-z0-9]+', '_', CRS.from_user_input(crs).name).strip('_')
    return f'{label[:40]}_{hashlib.sha256(crs.encode()).hexdigest()[:8]}'


def create_array(folder: Path, layout: Layout) -> Any:
    """Create the array of feature maps, empty, in a group that is there or not."""
    zarr = require_zarr()
    return zarr.create_array(
        str(folder),
        name=ARRAY,
        shape=layout.shape,
        chunks=(1, layout.dimensions, *layout.chunk),
        shards=(1, layout.dimensions, *layout.shard),
        dtype=layout.dtype,
        fill_value=float('nan'),
        compressors=zarr.codecs.ZstdCodec(level=_ZSTD_LEVEL),
        dimension_names=_DIMENSIONS,
        attributes={
            'long_name': 'embeddings of feature cells',
            'grid_mapping': 'spatial_ref',
            # xarray makes these coordinates also where it does not follow CF fully.
            'coordinates': 'spatial_ref time_bounds',
        },
        zarr_format=3,
    )


def create_group(
    folder: Path, layout: Layout, crs: str, attributes: Mapping[str, Any]
) -> None:
    """Create a group with all its arrays; the feature maps have no values yet.

    Args:
        folder: Folder of the group.
        layout: Place and axes.
        crs: CRS, as authority and code or WKT.
        attributes: Attributes of the group beside those of the layout.
    """
    zarr = require_zarr()
    (yres, xres), (height, width) = layout.cell, layout.size
    own = {
        'Conventions': 'CF-1.11',
        'chip_size': [height, width],
        'chip_resolution': list(layout.resolution),
        'map_size': list(layout.map_size),
    }
    group = zarr.create_group(
        str(folder), zarr_format=3, attributes={**own, **attributes}
    )
    create_array(folder, layout)
    projection = CRS.from_user_input(crs)
    axes = {axis['axis']: axis for axis in projection.cs_to_cf() if 'axis' in axis}
    y = layout.y - (np.arange(layout.rows) + 0.5) * yres
    x = layout.x + (np.arange(layout.columns) + 0.5) * xres
    times = np.array(layout.times, np.int64).reshape(-1, 2)
    _coordinate(group, 'y', y, ('y',), {'axis': 'Y', **axes.get('Y', {})})
    _coordinate(group, 'x', x, ('x',), {'axis': 'X', **axes.get('X', {})})
    clock = {'standard_name': 'time', 'axis': 'T', 'bounds': 'time_bounds', **_CLOCK}
    _coordinate(group, 'time', times[:, 0], ('time',), clock)
    _coordinate(group, 'time_bounds', times, ('time', 'bounds'), _CLOCK)
    wkt = projection.to_wkt()
    # GDAL's order: west edge, width, rotation, north edge, rotation, -height.
    transform = ' '.join(repr(v) for v in (layout.x, xres, 0.0, layout.y, 0.0, -yres))
    mapping = {**projection.to_cf(), 'crs_wkt': wkt, 'spatial_ref': wkt}
    mapping['GeoTransform'] = transform
    _coordinate(group, 'spatial_ref', np.array(0, np.int64), (), mapping)


def _coordinate(
    group: Any,
    name: str,
    values: npt.NDArray[Any],
    dimensions: tuple[str, ...],
    attributes: Mapping[str, Any],
) -> None:
    array = group.create_array(
        name,
        shape=values.shape,
        chunks=values.shape,
        dtype=values.dtype,
        dimension_names=dimensions or None,
        attributes=dict(attributes),
    )
    array[...] = values


def read_layout(folder: Path) -> Layout:
    """Return the layout of a group that :func:`create_group` made.

    Raises:
        OutputError: If it is not such a group.
    """
    zarr = require_zarr()
    try:
        group = zarr.open_group(str(folder), mode='r', use_consolidated=False)
        array, attributes = group[ARRAY], group.attrs
        transform = group['spatial_ref'].attrs['GeoTransform']
        x, _, _, y, _, _ = (float(value) for value in transform.split())
        return Layout(
            x=x,
            y=y,
            size=_pair(attributes['chip_size']),
            resolution=_pair(attributes['chip_resolution']),
            map_size=_pair(attributes['map_size']),
            dimensions=array.shape[1],
            dtype=str(array.dtype),
            rows=array.shape[2],
            columns=array.shape[3],
            times=tuple(_pair(pair) for pair in group['time_bounds'][...].tolist()),
            chunk=_pair(array.chunks[2:]),
            shard=_pair(array.shards[2:]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise OutputError(
            f"'{folder}' is not a Zarr group that dynamicvis_geo wrote ({error!r}): "
            'choose another output'
        ) from error


def _pair(values: Any) -> tuple[Any, Any]:
    first, second = values
    return first, second


def open_array(folder: Path) -> Any:
    """Open the feature maps of a group for reading."""
    zarr = require_zarr()
    return zarr.open_array(str(folder / ARRAY), mode='r')


def write_shard(
    array: Any, folder: Path, shard: tuple[int, int, int], block: npt.NDArray[Any]
) -> None:
    """Write one shard, on disk when this returns.

    Args:
        array: Of :func:`create_array` in *folder*.
        folder: Folder of the group.
        shard: Its number along time, y and x.
        block: Its values, ``[1, D, rows, columns]``.
    """
    time, down, across = shard
    top, left = down * array.shards[2], across * array.shards[3]
    rows, columns = block.shape[2:]
    array[time : time + 1, :, top : top + rows, left : left + columns] = block
    file = folder / ARRAY / f'c/{time}/0/{down}/{across}'
    if file.exists():  # Nothing but NaN makes no file.
        with file.open('rb') as written:
            os.fsync(written.fileno())


def move_shards(source: Path, target: Path) -> None:
    """Move all shards of one group into another of the same layout, one by one."""
    folder = source / ARRAY
    for file in sorted((folder / 'c').glob('*/*/*/*')):
        place = target / ARRAY / file.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        file.replace(place)


def update_attributes(folder: Path, attributes: Mapping[str, Any]) -> None:
    """Change attributes of a group."""
    zarr = require_zarr()
    zarr.open_group(str(folder), mode='r+', use_consolidated=False).update_attributes(
        dict(attributes)
    )


def consolidate(store: Path, group: str | None = None) -> None:
    """Write the metadata of all below a group into the group, to open it at once."""
    zarr = require_zarr()
    with _quiet():
        zarr.consolidate_metadata(str(store), path=group, zarr_format=3)


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what zarr says of files that are no arrays, and of consolidation."""
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='Consolidated metadata is currently')
        warnings.filterwarnings('ignore', message='Object at .* is not recognized')
        yield
