"""The chips that were fetched, kept as a folder of GeoTIFFs."""

import hashlib
import json
import os
import secrets
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

from dynamicvis_geo.earthengine.composite import MASKED, Pixels
from dynamicvis_geo.earthengine.sharing import Chip
from dynamicvis_geo.errors import OutputError, SpecError
from dynamicvis_geo.paths import output_path
from dynamicvis_geo.specs import SensorSpec

#: Goes into the keys: to be raised when the same request gives other pixels.
KEY_VERSION = 1

#: Which share of its limit a full cache keeps: it is not emptied chip by chip.
KEPT = 0.9


@dataclass(frozen=True)
class CacheInfo:
    """What a cache holds.

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
    Files are found by a hash of everything that decides the pixels: collection, bands,
    composite, clouds, window, CRS, origin, resolution and shape (not the project, nor
    the server). They appear by renaming, and a checksum tells damaged ones, so that
    any number of processes may share a folder and be killed at any time.

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
        self.path = output_path(path, 'cache').absolute()
        self.max_bytes = max_bytes
        if self.path.exists() and not self.path.is_dir():
            raise SpecError(f'cache={str(path)!r} is a file: name a folder.')
        if max_bytes is not None and not max_bytes > 0:
            raise SpecError(f'max_bytes={max_bytes!r} is not positive.')
        # Bytes that may be written before the folder is measured again.
        self._allowance = 0

    def file(self, sensor: SensorSpec, chip: Chip) -> Path:
        """Where a chip is kept, whether it is there or not."""
        request = json.dumps(_request(sensor, chip), sort_keys=True)
        digest = hashlib.sha256(request.encode()).hexdigest()[:32]
        return self.path / digest[:2] / f'{chip.id}_{digest}.tif'

    def read(self, sensor: SensorSpec, chip: Chip) -> Pixels | None:
        """The pixels of a chip ``[bands, height, width]``; None if not at hand.

        A file that is damaged, or not what its name says, counts as not at hand.
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
            tags.get('REQUEST') == json.dumps(_request(sensor, chip), sort_keys=True)
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
        # Hidden, and of a name of its own: other processes may write the same chip.
        part = path.with_name(f'.{path.stem}.{os.getpid()}.{secrets.token_hex(4)}.tif')
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with rasterio.open(
                part,
                'w',
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
                target.write(pixels)
                target.descriptions = sensor.bands
                target.update_tags(
                    REQUEST=json.dumps(_request(sensor, chip), sort_keys=True),
                    CRC32=_checksum(pixels),
                    FETCHED=time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()),
                    SOFTWARE='dynamicvis-geo',
                )
            size = part.stat().st_size
            part.replace(path)
        except (OSError, RasterioError) as error:
            with suppress(OSError):
                part.unlink()
            raise OutputError(
                f'{path}: the chip cannot be kept ({error}); free some space, or give '
                'cache another folder.'
            ) from error
        if self.max_bytes is not None:
            self._make_room(self.max_bytes, size)

    def info(self) -> CacheInfo:
        """What the cache holds."""
        files = list(self._files())
        times = [modified for modified, _, _ in files]
        return CacheInfo(
            len(files),
            sum(size for _, size, _ in files),
            min(times, default=None),
            max(times, default=None),
        )

    def clear(self) -> CacheInfo:
        """Remove all chips, and what interrupted runs left; tell what was removed."""
        info = self.info()
        for path in self.path.glob('??/*.tif'):
            path.unlink(missing_ok=True)
        for path in self.path.glob('??'):
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        return info

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """Time of modification, size and path of each chip."""
        for path in self.path.glob('??/[!.]*.tif'):
            try:
                stat = path.stat()
            except FileNotFoundError:
                # Another process is making room.
                continue
            yield stat.st_mtime, stat.st_size, path

    def _make_room(self, max_bytes: int, written: int) -> None:
        """Remove the oldest chips if the folder has grown too large."""
        with _lock:
            self._allowance -= written
            if self._allowance > 0:
                return
            files = sorted(self._files())
            total = sum(size for _, size, _ in files)
            if total > max_bytes:
                for _, size, path in files:
                    if total <= KEPT * max_bytes:
                        break
                    path.unlink(missing_ok=True)
                    total -= size
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


def _request(sensor: SensorSpec, chip: Chip) -> dict[str, object]:
    """Everything that decides the pixels."""
    grid = chip.grid
    return {
        'version': KEY_VERSION,
        **sensor.pixels(),
        'start': chip.window[0],
        'end': chip.window[1],
        'crs': grid.crs,
        'res': [grid.xres, grid.yres],
        'origin': [grid.col, grid.row],
        'shape': list(grid.shape),
    }
