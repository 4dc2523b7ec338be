import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import rasterio
from rasterio.transform import from_origin

from dynamicvis_geo.errors import SourceError
from dynamicvis_geo.quicklooks import Quicklooks, cached_chips, read_image


def write(path: Path, values: np.ndarray, x: float = 0, **changes: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    profile = {
        'driver': 'GTiff',
        'count': values.shape[0],
        'height': values.shape[1],
        'width': values.shape[2],
        'dtype': values.dtype,
        'crs': 'EPSG:32633',
        'transform': from_origin(500000 + x, 5000000, 10, 10),
    } | changes
    with rasterio.open(path, 'w', **profile) as file:
        file.write(values)
    return path


def chip(x: float, y: float = 0, side: float = 80, **changes: object) -> pd.Series:
    return pd.Series(
        {
            'id': 'chip',
            'crs': 'EPSG:32633',
            'minx': 500000 + x,
            'maxx': 500000 + x + side,
            'miny': 5000000 + y - side,
            'maxy': 5000000 + y,
            'start': pd.Timestamp('2022-06-01', tz='UTC'),
            'end': pd.Timestamp('2022-06-02', tz='UTC'),
        }
        | changes
    )


def ramp(height: int = 16, width: int = 16) -> np.ndarray:
    values = np.arange(height * width, dtype=np.uint16).reshape(height, width) + 1
    return np.stack([values, 2 * values, 3 * values])


def test_a_chip_over_the_edge_has_the_pixels_that_are_there(tmp_path: Path) -> None:
    write(tmp_path / 'scene.tif', ramp())
    image = Quicklooks(tmp_path / 'scene.tif', (3, 2, 1))(chip(x=-40, y=20))
    assert image is not None
    assert image.shape == (3, 8, 8)
    assert np.isnan(image[:, :2]).all()
    assert np.isnan(image[:, :, :4]).all()
    assert np.array_equal(image[:, 2:, 4:], ramp()[::-1, :6, :4])


def test_images_side_by_side_make_one_and_nodata_is_missing(tmp_path: Path) -> None:
    values = ramp()
    values[:, 0, 0] = 0
    write(tmp_path / 'a' / 'one.tif', values, nodata=0)
    write(tmp_path / 'a' / 'two.tif', ramp(), x=160)
    image = Quicklooks(tmp_path / 'a')(chip(x=0, side=160, maxx=500320))
    assert image is not None
    assert image.shape == (3, 16, 32)
    assert np.isnan(image).sum() == 3
    assert np.array_equal(image[:, :, 16:], ramp())


def test_scenes_of_another_place_crs_or_day_do_not_show_a_chip(tmp_path: Path) -> None:
    write(tmp_path / 's_20220601_x.tif', ramp())
    quicklooks = Quicklooks(tmp_path)
    assert quicklooks(chip(0)) is not None
    assert quicklooks(chip(5000)) is None
    assert quicklooks(chip(0, crs='EPSG:32634')) is None
    assert quicklooks(chip(0, crs=None)) is None
    later = pd.Timestamp('2023-06-01', tz='UTC')
    assert quicklooks(chip(0, start=later, end=later)) is None
    assert quicklooks(chip(0, start=pd.NaT, end=pd.NaT)) is not None


def test_chips_of_a_cache_are_found_by_id_the_newest_first(tmp_path: Path) -> None:
    for folder, value in (('ab', 100), ('cd', 200)):
        path = tmp_path / folder / f'EPSG_x_1_{folder * 16}.tif'
        write(path, np.full((3, 8, 8), value, np.uint16))
        os.utime(path, (value, value))
    (tmp_path / 'ab' / '.hidden_part.tif').write_text('')
    assert list(cached_chips(tmp_path)) == ['EPSG_x_1']
    image = Quicklooks(tmp_path)(chip(0, id='EPSG_x_1'))
    assert image is not None
    assert (image == 200).all()
    assert Quicklooks(tmp_path)(chip(0)) is None


def test_large_images_are_averaged_and_grey_ones_read_alone(tmp_path: Path) -> None:
    values = np.zeros((1, 100, 200), np.uint8)
    values[:, ::2] = 100
    path = write(tmp_path / 'grey.tif', values)
    image = read_image(path, pixels=50)
    assert image.shape == (1, 25, 50)
    assert image == pytest.approx(50)
    with pytest.raises(SourceError, match=r'1 bands, but bands \(4, 3, 2\)'):
        read_image(path, (4, 3, 2))
    (tmp_path / 'text.tif').write_text('text')
    with pytest.raises(SourceError, match='cannot read it'):
        read_image(tmp_path / 'text.tif')
