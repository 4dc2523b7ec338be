"""One Zarr group: the feature maps of one CRS, with coordinates that xarray reads.

Zarr itself works in memory alone: files are read and put whole, like all others, so
that they are on disk when they are written, wherever that is.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pyproj import CRS

from dynamicvis_geo.errors import OutputError, SourceError, one_line
from dynamicvis_geo.formats.zarr_conventions import with_others
from dynamicvis_geo.formats.zarr_layout import ArrayShard, Layout, overlap
from dynamicvis_geo.grid import Grid
from dynamicvis_geo.projections import crs_name
from dynamicvis_geo.store import Store

#: Name of the array. Not ``embedding``, which is one of its dimensions: xarray would
#: take it for the coordinate of that dimension.
ARRAY = 'embeddings'
#: File of a group or an array that says what it is.
METADATA = 'zarr.json'

_COORDINATES = ('y', 'x', 'time', 'time_bounds', 'spatial_ref')
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


class _Memory:
    """A Zarr store of files in memory, by name."""

    def __init__(self, files: Mapping[str, bytes] | None = None) -> None:
        require_zarr()
        from zarr.core.buffer.cpu import Buffer
        from zarr.storage import MemoryStore

        self._files: dict[str, Any] = {
            name: Buffer.from_bytes(content) for name, content in (files or {}).items()
        }
        self.store = MemoryStore(self._files)

    def get(self, name: str) -> memoryview | None:
        """Return a file, without a copy; None if there is none."""
        found = self._files.get(name)
        return None if found is None else memoryview(found.as_numpy_array())

    def files(self) -> dict[str, bytes]:
        """Return all files, in the order of their names."""
        return {name: self._files[name].to_bytes() for name in sorted(self._files)}


@dataclass(frozen=True)
class Group:
    """The feature maps of one CRS in a store.

    Attributes:
        url: Path or URL of the group.
        layout: Place and axes of the array.
        metadata: What Zarr has to know of the array.
    """

    url: str
    layout: Layout
    metadata: bytes

    @classmethod
    def open(cls, url: str) -> Self | None:
        """Open a group, if there is one.

        Args:
            url: Path or URL of the group.

        Returns:
            The group; None if there is none.

        Raises:
            OutputError: If it is not one that :meth:`begin` made.
        """
        names = (
            METADATA,
            f'{ARRAY}/{METADATA}',
            f'spatial_ref/{METADATA}',
            f'time_bounds/{METADATA}',
            'time_bounds/c/0/0',
        )
        files = {}
        for name in names:
            content = _read(url, name)
            if content is None and name == METADATA:
                return None
            if content is not None:
                files[name] = content
        try:
            return cls(url, _layout(files), files[f'{ARRAY}/{METADATA}'])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise OutputError(
                f"'{url}' is not a Zarr group that dynamicvis_geo wrote ({error!r}): "
                'choose another output'
            ) from error

    @classmethod
    def begin(
        cls, url: str, layout: Layout, crs: str, attributes: Mapping[str, Any]
    ) -> Self:
        """Make a group whose array has no values yet, or join others who do.

        Args:
            url: Path or URL of the group.
            layout: Place and axes.
            crs: CRS, as authority and code or WKT.
            attributes: Attributes of the group beside those of the layout.

        Raises:
            OutputError: If something else has been begun there.
        """
        files = _new_files(layout, crs, attributes)
        # The file that makes it a group comes last: then all others are there.
        for name in sorted(files, key=lambda name: (name == METADATA, name)):
            folder, last = _split(url, name)
            new = folder.put_new(last, files[name])
            if not new and name != METADATA and folder.read(last) != files[name]:
                raise OutputError(
                    f"'{folder.url}/{last}' was begun for other chips or with another "
                    f"version of zarr: choose another output, or remove '{url}'"
                )
        group = cls.open(url)
        if group is None or group.layout != layout:
            raise OutputError(
                f"'{url}' was begun for other chips: choose another output, or begin "
                'anew (overwrite=True)'
            )
        return group

    def read(
        self, shard: ArrayShard, part: tuple[slice, slice] | None = None
    ) -> NDArray[Any]:
        """Return values of a shard, ``[D, rows, columns]``; NaN if it has none.

        Args:
            shard: Its number along time, y and x.
            part: Rows and columns of it; all by default.
        """
        folder, name = self._file(shard)
        content = folder.read(name)
        index = self._index(shard, part)
        if content is None:
            shape = [one.stop - one.start for one in index[2:]]
            return np.full((self.layout.dimensions, *shape), np.nan, self.layout.dtype)
        memory = _Memory({METADATA: self.metadata, _chunk_name(shard): content})
        values: NDArray[Any] = self._array(memory)[index]
        return values

    def read_map(self, chip: NDArray[np.void]) -> NDArray[np.float32]:
        """Return the cells where a chip lies, float32 ``[D, h, w]``.

        Args:
            chip: One row with ``x``, ``y``, ``start`` and ``end``.

        Raises:
            SourceError: If the array has not the chip's time, or cannot be read.
        """
        layout = self.layout
        place = layout.place(chip)
        time, *corner = place[0].tolist()
        height, width = layout.map_size
        if time < 0:
            raise SourceError(f'{self.url}: it has no chip of this time: make it anew')
        features = np.full((layout.dimensions, height, width), np.nan, np.float32)
        for shard in layout.shards_of(place):
            box = np.array(corner)
            here, inside = overlap(box, (height, width), layout.window(shard))
            features[:, *inside] = self.read_shard(shard, here)
        return features

    def read_shard(
        self, shard: ArrayShard, part: tuple[slice, slice] | None = None
    ) -> NDArray[np.float32]:
        """Return values of a shard, as :meth:`read`, float32.

        Args:
            shard: Its number along time, y and x.
            part: Rows and columns of it; all by default.

        Raises:
            SourceError: If the array cannot be read.
        """
        try:
            return self.read(shard, part).astype(np.float32, copy=False)
        except (OSError, ValueError, OutputError) as error:
            raise SourceError(
                f'{self.url}: it cannot be read ({one_line(error)}): make it anew'
            ) from error

    def put(self, shard: ArrayShard, values: NDArray[Any]) -> None:
        """Write a shard, which is on disk when this returns.

        Args:
            shard: Its number along time, y and x.
            values: ``[D, rows, columns]``.
        """
        memory = _Memory({METADATA: self.metadata})
        self._array(memory)[self._index(shard)] = values
        content = memory.get(_chunk_name(shard))
        folder, name = self._file(shard)
        if content is None:  # Nothing but NaN makes no file.
            folder.remove(name)
        else:
            folder.put(name, content)

    def _array(self, memory: _Memory) -> Any:
        return require_zarr().open_array(memory.store, mode='r+')

    def _index(
        self, shard: ArrayShard, part: tuple[slice, slice] | None = None
    ) -> tuple[int, slice, slice, slice]:
        top, left, rows, columns = self.layout.window(shard)
        down, across = part or (slice(0, rows), slice(0, columns))
        return (
            shard[0],
            slice(None),
            slice(top + down.start, top + down.stop),
            slice(left + across.start, left + across.stop),
        )

    def _file(self, shard: ArrayShard) -> tuple[Store, str]:
        return _split(self.url, f'{ARRAY}/{_chunk_name(shard)}')


def _chunk_name(shard: ArrayShard) -> str:
    time, down, across = shard
    return f'c/{time}/0/{down}/{across}'


def _split(url: str, name: str) -> tuple[Store, str]:
    folder, _, last = f'{url}/{name}'.rpartition('/')
    return Store(folder), last


def _read(url: str, name: str) -> bytes | None:
    folder, last = _split(url, name)
    return folder.read(last)


def _new_files(
    layout: Layout, crs: str, attributes: Mapping[str, Any]
) -> dict[str, bytes]:
    """Return all files of a group without values."""
    zarr = require_zarr()
    memory = _Memory()
    cells = layout.cells
    own = {
        'Conventions': 'CF-1.11',
        'chip_size': list(layout.size),
        'chip_resolution': list(layout.resolution),
        'map_size': list(layout.map_size),
    }
    group = zarr.create_group(
        memory.store, zarr_format=3, attributes={**own, **attributes}
    )
    group.create_array(
        ARRAY,
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
    )
    projection = CRS.from_user_input(crs)
    axes = {axis['axis']: axis for axis in projection.cs_to_cf() if 'axis' in axis}
    y = cells.y - (np.arange(cells.height) + 0.5) * cells.yres
    x = cells.x + (np.arange(cells.width) + 0.5) * cells.xres
    times = np.array(layout.times, np.int64).reshape(-1, 2)
    _coordinate(group, 'y', y, ('y',), {'axis': 'Y', **axes.get('Y', {})})
    _coordinate(group, 'x', x, ('x',), {'axis': 'X', **axes.get('X', {})})
    clock = {'standard_name': 'time', 'axis': 'T', 'bounds': 'time_bounds', **_CLOCK}
    _coordinate(group, 'time', times[:, 0], ('time',), clock)
    _coordinate(group, 'time_bounds', times, ('time', 'bounds'), _CLOCK)
    wkt = projection.to_wkt()
    # GDAL's order: west edge, width, rotation, north edge, rotation, -height.
    transform = ' '.join(map(repr, cells.transform.to_gdal()))
    mapping = {**projection.to_cf(), 'crs_wkt': wkt, 'spatial_ref': wkt}
    mapping['GeoTransform'] = transform
    _coordinate(group, 'spatial_ref', np.array(0, np.int64), (), mapping)
    return memory.files()


def _coordinate(
    group: Any,
    name: str,
    values: NDArray[Any],
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


def _layout(files: Mapping[str, bytes]) -> Layout:
    """Read the layout back from files of :func:`_new_files`."""
    zarr = require_zarr()
    store = _Memory(files).store
    group = zarr.open_group(store, mode='r', use_consolidated=False)
    array, attributes = group[ARRAY], group.attrs
    mapping = group['spatial_ref'].attrs
    x, xres, _, y, _, yres = map(float, mapping['GeoTransform'].split())
    height, width = array.shape[2:]
    crs = crs_name(CRS.from_wkt(mapping['crs_wkt']))
    return Layout(
        cells=Grid(crs, x, y, width, height, xres, -yres),
        size=_pair(attributes['chip_size']),
        resolution=_pair(attributes['chip_resolution']),
        map_size=_pair(attributes['map_size']),
        dimensions=array.shape[1],
        dtype=str(array.dtype),
        times=tuple(_pair(pair) for pair in group['time_bounds'][...].tolist()),
        chunk=_pair(array.chunks[2:]),
        shard=_pair(array.shards[2:]),
    )


def _pair(values: Any) -> tuple[Any, Any]:
    first, second = values
    return first, second


def complete(
    url: str, attributes: Mapping[str, Any], groups: Mapping[str, Mapping[str, Any]]
) -> None:
    """Describe groups, and write the metadata of all below a group into it.

    A reader then opens the store, or a group, by one file; that of the store is last.

    Args:
        url: Path or URL of the store.
        attributes: Attributes that the store gets.
        groups: Names of all its groups, each with attributes that it gets.
    """
    zarr = require_zarr()
    files = {}
    for group in ('', *groups):
        for member in ('', ARRAY, *_COORDINATES) if group else ('',):
            name = '/'.join(part for part in (group, member, METADATA) if part)
            content = _read(url, name)
            if content is not None:
                files[name] = content
    memory = _Memory(files)
    root = zarr.open_group(
        memory.store, mode='a', zarr_format=3, use_consolidated=False
    )
    root.update_attributes(with_others(attributes, root.attrs))
    for group, own in groups.items():
        opened = zarr.open_group(
            memory.store, path=group, mode='r+', use_consolidated=False
        )
        opened.update_attributes(with_others(own, opened.attrs))
    with _quiet():
        for group in groups:
            zarr.consolidate_metadata(memory.store, path=group, zarr_format=3)
        zarr.consolidate_metadata(memory.store, zarr_format=3)
    made = memory.files()
    for name in (*(f'{group}/{METADATA}' for group in groups), METADATA):
        folder, last = _split(url, name)
        folder.put(last, made[name])


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what zarr says of files that are no arrays, and of consolidation."""
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='Consolidated metadata is currently')
        warnings.filterwarnings('ignore', message='Object at .* is not recognized')
        yield
