"""The chips that were fetched, kept as a folder of GeoTIFFs."""

import hashlib
import json
import os
import re
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
from rasterio.errors import RasterioError
from rasterio.io import MemoryFile

from dynamicvis_geo.earthengine.composite import MASKED, Pixels
from dynamicvis_geo.earthengine.fetch import Chip
from dynamicvis_geo.errors import OutputError, SpecError
from dynamicvis_geo.paths import local_output
from dynamicvis_geo.specs import SensorSpec
from dynamicvis_geo.store import whole_file

#: Goes into the keys: to be raised when the same request gives other pixels.
KEY_VERSION = 1

#: Share of its limit that a full cache keeps: it is not emptied chip by chip.
KEPT = 0.9

#: Names of chips: an id, and the digest of the request.
_DIGEST = re.compile(r'_[0-9a-f]{32}\.')
_NAME = re.compile(r'[^.].*_[0-9a-f]{32}\.tif')


@dataclass(frozen=True)
class CacheInfo:
    """Contents of a cache.

    Attributes:
        chips: Number of chips.
        bytes: Their size on disk.
        oldest: When the oldest was fetched, in seconds since 1970; None if empty.
        newest: When the newest was fetched.
    """

    chips: int
    bytes: int
    oldest: float | None
    newest: float | None


class ChipCache:
    """A folder of GeoTIFFs, one a chip.

    Each file opens in any GIS and holds, besides the pixels, the request in its tags.
    Files are found by a hash of everything that decides the pixels: source, collection,
    bands, composite, clouds, window, CRS, origin, resolution and shape (not the
    project, nor the server of Earth Engine). They get their names when all of them is
    on disk, and a checksum tells damaged ones, so that any number of processes may
    share a folder and be killed at any time. Only files whose tags say that they are
    chips are ever removed.

    A window that had not ended when its chip was fetched stays as it was then: remove
    its files to see later scenes.

    Args:
        path: The folder; made when the first chip is written.
        max_bytes: When the chips take more than this, those fetched first are removed.

    Raises:
        SpecError: If *path* is a file, or *max_bytes* is not positive.
    """

    def __init__(
        self, path: str | os.PathLike[str], max_bytes: int | None = None
    ) -> None:
        self.path = local_output(path, 'cache').absolute()
        self.max_bytes = max_bytes
        if self.path.exists() and not self.path.is_dir():
            raise SpecError(f'cache={str(path)!r} is a file: name a folder.')
        if max_bytes is not None and not max_bytes > 0:
            raise SpecError(f'max_bytes={max_bytes!r} is not positive.')
        # Bytes that may be written before the folder is measured again.
        self._allowance = 0

    def file(self, sensor: SensorSpec, chip: Chip) -> Path:
        """Name the file of a chip, be it there or not.

        Args:
            sensor: The imagery.
            chip: Where and when.
        """
        digest = _digest(_request(sensor, chip))
        return self.path / digest[:2] / f'{chip.id}_{digest}.tif'

    def read(self, sensor: SensorSpec, chip: Chip) -> Pixels | None:
        """Read the pixels of a chip.

        A file that is damaged, or not what its name says, counts as not at hand.

        Args:
            sensor: The imagery.
            chip: Where and when.

        Returns:
            ``[bands, height, width]`` of ``sensor.dtype``; None if not at hand.
        """
        path = self.file(sensor, chip)
        if not path.exists():
            return None
        try:
            with rasterio.open(path) as source:
                pixels: Pixels = source.read()
                tags = source.tags()
        except RasterioError:
            return None
        intact = (
            tags.get('REQUEST') == _request(sensor, chip)
            and tags.get('CRC32') == _checksum(pixels)
            and pixels.shape == (len(sensor.bands), *chip.grid.shape)
            and pixels.dtype == np.dtype(sensor.dtype)
        )
        return pixels if intact else None

    def write(self, sensor: SensorSpec, chip: Chip, pixels: Pixels) -> None:
        """Keep a chip.

        Args:
            sensor: What was asked for.
            chip: Where and when.
            pixels: Its pixels ``[bands, height, width]``.

        Raises:
            OutputError: If it cannot be written.
        """
        path = self.file(sensor, chip)
        try:
            content = _encode(sensor, chip, pixels)
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as part:
                part.write_bytes(content)
        except (OSError, RasterioError) as error:
            reason = getattr(error, 'strerror', None) or error
            raise OutputError(
                f'{path}: the chip cannot be kept ({reason}); free some space, or give '
                'cache another folder.'
            ) from error
        if self.max_bytes is not None:
            self._make_room(self.max_bytes, len(content))

    def info(self) -> CacheInfo:
        """Count the chips of the cache, and their bytes."""
        return _info([stat for _, stat in self._files()])

    def clear(self) -> CacheInfo:
        """Remove all chips, and what interrupted runs left; tell what was removed."""
        removed: dict[Path, os.stat_result] = {}
        for path in self.path.glob('??/*.tif*'):
            if _is_chip(path):
                # Another process may be clearing too.
                with suppress(FileNotFoundError):
                    removed[path] = path.stat()
                    path.unlink()
        for folder in {path.parent for path in removed}:
            if not any(folder.iterdir()):
                folder.rmdir()
        return _info([s for path, s in removed.items() if _NAME.fullmatch(path.name)])

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        """Each chip."""
        for path in self.path.glob('??/[!.]*.tif'):
            if _NAME.fullmatch(path.name):
                # Another process may be making room.
                with suppress(FileNotFoundError):
                    yield path, path.stat()

    def _make_room(self, max_bytes: int, written: int) -> None:
        """Remove the oldest chips if the folder has grown too large."""
        with _lock:
            self._allowance -= written
            if self._allowance > 0:
                return
            files = sorted(self._files(), key=lambda file: file[1].st_mtime)
            total = sum(stat.st_size for _, stat in files)
            if total > max_bytes:
                for path, stat in files:
                    if total <= KEPT * max_bytes:
                        break
                    if _is_chip(path):
                        path.unlink(missing_ok=True)
                        total -= stat.st_size
            # Other processes write too: measure again well before the limit is near.
            self._allowance = max(0, int(max_bytes - total) // 8)


_lock = threading.Lock()


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=_renew_lock)


def _checksum(pixels: Pixels) -> str:
    return f'{zlib.crc32(pixels.tobytes()):08x}'


def _encode(sensor: SensorSpec, chip: Chip, pixels: Pixels) -> bytes:
    """A chip as a GeoTIFF.

    Made in memory: GDAL does not tell of errors when it closes a file on a full disk.
    """
    with MemoryFile() as memory:
        with memory.open(
            driver='GTiff',
            height=chip.grid.height,
            width=chip.grid.width,
            count=len(sensor.bands),
            dtype=sensor.dtype,
            crs=chip.grid.crs,
            transform=chip.grid.transform,
            nodata=MASKED[sensor.dtype],
            compress='zstd',
            zstd_level=1,
            predictor=2 if sensor.dtype == 'uint16' else 3,
        ) as target:
            # Before the pixels, so that what is cut off still says what it was.
            target.descriptions = sensor.bands
            target.update_tags(
                REQUEST=_request(sensor, chip),
                CRC32=_checksum(pixels),
                FETCHED=time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()),
                SOFTWARE='dynamicvis-geo',
            )
            target.write(pixels)
        return bytes(memory.getbuffer())


def _is_chip(path: Path) -> bool:
    """Say if a file was written here, by its tags, not by its name."""
    if not _DIGEST.search(path.name):
        return False
    try:
        with rasterio.open(path) as source:
            request = source.tags().get('REQUEST')
    except RasterioError:
        return False
    return request is not None and _digest(request) in path.name


def _info(stats: list[os.stat_result]) -> CacheInfo:
    times = [stat.st_mtime for stat in stats]
    return CacheInfo(
        len(stats),
        sum(stat.st_size for stat in stats),
        min(times, default=None),
        max(times, default=None),
    )


def _digest(request: str) -> str:
    return hashlib.sha256(request.encode()).hexdigest()[:32]


def _request(sensor: SensorSpec, chip: Chip) -> str:
    """Everything that decides the pixels, as JSON."""
    grid = chip.grid
    request = {
        'version': KEY_VERSION,
        **sensor.pixels(),
        'start': chip.window[0],
        'end': chip.window[1],
        'crs': grid.crs,
        'res': [grid.xres, grid.yres],
        'origin': [grid.col, grid.row],
        'shape': list(grid.shape),
    }
    if chip.source:
        request['source'] = chip.source
    return json.dumps(request, sort_keys=True)
