import multiprocessing
import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from rasterio.transform import from_origin

from dynamicvis_geo.earthengine import ChipCache
from dynamicvis_geo.earthengine.fetch import Chip
from dynamicvis_geo.errors import OutputError, SpecError
from dynamicvis_geo.grid import Grid
from dynamicvis_geo.specs import SensorSpec
from tests.processes import HANG

SENSOR = SensorSpec()


def chip(col: int = 59000, px: int = 32, end: str = '2022-07-01') -> Chip:
    grid = Grid('EPSG:32632', 10 * col, 5_580_000, px, px, 10.0, 10.0)
    return Chip(grid, ('2022-06-01', end), f'EPSG32632_x{col}')


def pixels(seed: int = 0, px: int = 32) -> Any:
    return np.random.default_rng(seed).integers(0, 65536, (3, px, px), np.uint16)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    cache = ChipCache(tmp_path / 'new' / 'folder')
    assert cache.read(SENSOR, chip()) is None
    cache.write(SENSOR, chip(), pixels())
    read = cache.read(SENSOR, chip())
    assert read is not None
    assert read.dtype == np.uint16
    assert (read == pixels()).all()


def test_a_file_tells_a_gis_what_it_is(tmp_path: Path) -> None:
    cache = ChipCache(tmp_path)
    cache.write(SENSOR, chip(), pixels())
    (path,) = tmp_path.rglob('*.tif')
    assert path.name.startswith(chip().id)
    with rasterio.open(path) as source:
        assert source.crs.to_epsg() == 32632
        assert source.bounds == chip().grid.bounds
        assert source.descriptions == ('B4', 'B3', 'B2')
        assert source.nodata == 65535
        request = source.tags()['REQUEST']
    for part in ('COPERNICUS/S2_SR_HARMONIZED', '2022-06-01', 'median', '30'):
        assert part in request


def test_floats_are_kept_too(tmp_path: Path) -> None:
    sensor = SensorSpec(dtype='float32', bands=('VV',), cloudy_pct=None)
    cache = ChipCache(tmp_path)
    values = np.linspace(-30, 5, 32 * 32, dtype=np.float32).reshape(1, 32, 32)
    cache.write(sensor, chip(), values)
    read = cache.read(sensor, chip())
    assert read is not None
    assert (read == values).all()


@pytest.mark.parametrize(
    ('sensor', 'other'),
    [
        (SensorSpec(cloudy_pct=31), chip()),
        (SensorSpec(bands=('B3', 'B4', 'B2')), chip()),
        (SensorSpec(composite='mosaic'), chip()),
        (SensorSpec(cloud_mask='scl'), chip()),
        (SENSOR, chip(end='2022-07-02')),
        (SENSOR, chip(col=59001)),
    ],
)
def test_everything_that_decides_the_pixels_counts(
    tmp_path: Path, sensor: SensorSpec, other: Chip
) -> None:
    cache = ChipCache(tmp_path)
    cache.write(SENSOR, chip(), pixels())
    assert cache.read(sensor, other) is None
    assert cache.read(SensorSpec(fill_value=-1), chip()) is not None


@pytest.mark.parametrize('damage', ['cut', 'empty', 'flipped', 'text', 'other'])
def test_a_damaged_file_counts_as_missing(tmp_path: Path, damage: str) -> None:
    cache = ChipCache(tmp_path)
    cache.write(SENSOR, chip(), pixels())
    path = cache.file(SENSOR, chip())
    content = bytearray(path.read_bytes())
    if damage == 'cut':
        content = content[: len(content) // 2]
    elif damage == 'empty':
        content = bytearray()
    elif damage == 'flipped':
        content[len(content) // 2] ^= 255
    elif damage == 'text':
        content = bytearray(b'not found')
    else:
        cache.write(SENSOR, chip(col=1), pixels(1))
        content = bytearray(cache.file(SENSOR, chip(col=1)).read_bytes())
    path.write_bytes(content)
    assert cache.read(SENSOR, chip()) is None
    cache.write(SENSOR, chip(), pixels())
    assert cache.read(SENSOR, chip()) is not None


def test_the_oldest_make_room(tmp_path: Path) -> None:
    cache = ChipCache(tmp_path)
    for i in range(10):
        cache.write(SENSOR, chip(i), pixels(i))
        os.utime(cache.file(SENSOR, chip(i)), (1000 + i, 1000 + i))
    size = cache.info().bytes // 10
    limited = ChipCache(tmp_path, max_bytes=6 * size)
    limited.write(SENSOR, chip(10), pixels(10))
    kept = [i for i in range(11) if cache.read(SENSOR, chip(i)) is not None]
    assert kept == list(range(11))[-len(kept) :]
    assert 4 <= len(kept) <= 6


def test_the_limit_holds_over_many_chips(tmp_path: Path) -> None:
    cache = ChipCache(tmp_path, max_bytes=100_000)
    for i in range(60):
        cache.write(SENSOR, chip(i), pixels(i))
        assert cache.info().bytes <= 115_000
    assert cache.info().bytes > 70_000


def test_info_and_clear(tmp_path: Path) -> None:
    cache = ChipCache(tmp_path)
    assert cache.info().chips == 0
    assert cache.info().oldest is None
    for i in range(3):
        cache.write(SENSOR, chip(i), pixels(i))
    (tmp_path / 'notes.txt').write_text('mine')
    info = cache.clear()
    assert (info.chips, info.bytes > 0) == (3, True)
    assert cache.info().chips == 0
    assert [path.name for path in tmp_path.iterdir()] == ['notes.txt']


def write_all(path: Path, seed: int) -> None:
    cache = ChipCache(path)
    for i in range(20):
        cache.write(SENSOR, chip(i), pixels(i))
        read = cache.read(SENSOR, chip(i))
        assert read is not None
        assert (read == pixels(i)).all()


def test_many_processes_may_write_the_same_chips(tmp_path: Path) -> None:
    context = multiprocessing.get_context('fork')
    children = [context.Process(target=write_all, args=(tmp_path, i)) for i in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    assert ChipCache(tmp_path).info().chips == 20
    assert not list(tmp_path.rglob('.*'))


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    (tmp_path / 'file').touch()
    with pytest.raises(SpecError, match='file'):
        ChipCache(tmp_path / 'file')
    with pytest.raises(SpecError, match='max_bytes'):
        ChipCache(tmp_path, max_bytes=0)


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    # A file where the folder of the chip would be.
    cache = ChipCache(tmp_path)
    cache.file(SENSOR, chip()).parent.touch()
    with pytest.raises(OutputError, match='cannot be kept'):
        cache.write(SENSOR, chip(), pixels())


def write_on_a_full_disk(path: Path, told: Any) -> None:
    cache = ChipCache(path)
    for limit in 6000, 1000, 0:
        # Files of this process end here, as on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, 6000))
        for i in range(3):
            try:
                cache.write(SENSOR, chip(i), pixels(i))
            except OutputError as error:
                told.send(str(error))
    told.close()


def test_nothing_broken_is_kept_on_a_full_disk(tmp_path: Path) -> None:
    context = multiprocessing.get_context('fork')
    reader, writer = context.Pipe(duplex=False)
    child = context.Process(target=write_on_a_full_disk, args=(tmp_path, writer))
    child.start()
    writer.close()
    child.join(HANG)
    assert child.exitcode == 0
    for _ in range(9):
        assert 'the chip cannot be kept (File too large)' in reader.recv()
    assert not [path for path in tmp_path.rglob('*') if path.is_file()]


# Files that are not ours.


def foreign(folder: Path, chip_name: str) -> list[Path]:
    """Tiles of somebody else, some of them named like ours."""
    paths = []
    for name in ('ab/tile.tif', '12/34.tif', f'{chip_name[:2]}/x_{chip_name}.tif'):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        options = {'transform': from_origin(0, 8, 1, 1), 'crs': 'EPSG:32632'}
        with rasterio.open(
            path, 'w', 'GTiff', 8, 8, 1, dtype='uint8', **options
        ) as target:
            target.update_tags(REQUEST='mine', SOFTWARE='dynamicvis-geo')
        paths.append(path)
    (folder / 'cd').mkdir()
    (folder / 'cd' / 'notes.tif').write_text('no image at all')
    return [*paths, folder / 'cd' / 'notes.tif']


def test_files_of_others_are_never_removed(tmp_path: Path) -> None:
    cache = ChipCache(tmp_path)
    cache.write(SENSOR, chip(), pixels())
    others = foreign(tmp_path, cache.file(SENSOR, chip()).stem[-32:])
    (tmp_path / 'ef').mkdir()
    limited = ChipCache(tmp_path, max_bytes=1)
    limited.write(SENSOR, chip(1), pixels(1))
    assert not list(tmp_path.rglob(f'{chip().id}_*'))
    limited.write(SENSOR, chip(2), pixels(2))
    cache.write(SENSOR, chip(), pixels())
    assert cache.clear().chips == 1
    assert [path for path in others if path.exists()] == others
    assert (tmp_path / 'ef').is_dir()


def test_what_an_interrupted_run_left_is_removed(tmp_path: Path) -> None:
    cache = ChipCache(tmp_path)
    cache.write(SENSOR, chip(), pixels())
    path = cache.file(SENSOR, chip())
    # The first as older versions named it.
    for name in (f'.{path.stem}.123.0a1b2c3d.tif', f'.{path.name}.0a1b.partial'):
        path.with_name(name).write_bytes(path.read_bytes()[:5000])
    assert cache.info().chips == cache.clear().chips == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ('one', 'other'),
    [
        ({'cloudy_pct': 30}, {'cloudy_pct': 30.0}),
        ({'cloudy_pct': 0}, {'cloudy_pct': -0.0}),
        ({'cloudy_pct': 30}, {}),
        ({'bands': ['B4', 'B3', 'B2']}, {}),
        ({'scale_m': 20}, {'scale_m': 20.0}),
        (
            {'cloud_mask': 'cs+', 'cloud_threshold': 1},
            {'cloud_mask': 'cs+', 'cloud_threshold': 1.0},
        ),
        ({'cloud_threshold': 0.5}, {}),
    ],
)
def test_equal_requests_are_kept_once(
    tmp_path: Path, one: dict[str, Any], other: dict[str, Any]
) -> None:
    cache = ChipCache(tmp_path)
    files = {cache.file(SensorSpec(**spec), chip()) for spec in (one, other)}
    assert len(files) == 1


def test_zeros_have_no_sign(tmp_path: Path) -> None:
    cache = ChipCache(tmp_path)
    names = set()
    for zero in (0, 0.0, -0.0):
        x, y = slice(zero, zero + 320, 10), slice(zero - 320, zero, 10)
        grid = Grid.from_slices('EPSG:32632', x, y)
        names.add(cache.file(SENSOR, Chip(grid, ('2022-06-01', '2022-07-01'), 'x')))
    assert len(names) == 1


def test_keys_stay_what_they_were(tmp_path: Path) -> None:
    """Or what users have fetched would be fetched again."""
    path = ChipCache(tmp_path).file(SensorSpec(cloudy_pct=30.0), chip())
    assert path.relative_to(tmp_path) == Path(
        '27/EPSG32632_x59000_27885076390f272821adea4d48ffa07e.tif'
    )
