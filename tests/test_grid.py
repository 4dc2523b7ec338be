from dataclasses import replace

import numpy as np
import pytest
from pyproj import CRS

from dynamicvis_geo.grid import Grid, crs_text, paste


def grid(x: float, y: float, px: int = 512, res: float = 10.0) -> Grid:
    return Grid.from_slices(
        'EPSG:32632', slice(x, x + px * res, res), slice(y, y + px * res, res)
    )


@pytest.mark.parametrize('px', [1, 33, 224, 512])
def test_the_number_of_pixels_survives_any_origin(px: int) -> None:
    random = np.random.default_rng(0)
    for x, y in random.uniform(-1e7, 1e7, (300, 2)):
        for res in (10.0, 0.1 + 0.2, 1 / 3, 8.983152841195215e-05):
            assert grid(x * res / 10, y * res / 10, px, res).shape == (px, px)


def test_the_transform_is_that_of_the_query() -> None:
    transform = grid(500003.7, 5400001.2, 64).transform
    assert transform.c == pytest.approx(500003.7, abs=1e-5)
    assert transform.f == pytest.approx(5400001.2 + 640, abs=1e-5)
    assert (transform.a, transform.e) == (10, -10)


def test_noise_of_floats_does_not_make_another_grid() -> None:
    noisy = grid(500000 + 1e-9, 5400000 - 1e-9)
    assert noisy.rounded() == grid(500000, 5400000)
    assert noisy.lattice == grid(500000, 5400000).lattice
    assert grid(500000, 5400000) != grid(500000.1, 5400000)


@pytest.mark.parametrize(
    ('other', 'same'),
    [
        (grid(499_990.0, 5_400_130.0, 33), True),
        (grid(500_000.05, 5_400_000.0), True),
        (grid(500_000.2, 5_400_000.0), False),
        (grid(500_000.0, 5_400_000.0, res=10.0005), False),
        (grid(500_000.0, 5_400_000.0, res=20.0), False),
    ],
)
def test_grids_on_one_lattice_within_a_hundredth_of_a_pixel(
    other: Grid, same: bool
) -> None:
    assert grid(500_000.0, 5_400_000.0).aligned(other, 0.01) == same
    wkt = CRS.from_epsg(32632).to_wkt()
    assert grid(500_000.0, 5_400_000.0).aligned(replace(other, crs=wkt), 0.01) == same


def test_a_part_has_the_pixels_of_the_whole() -> None:
    whole = grid(500_003.7, 5_400_001.2, 64, 1 / 3)
    part = whole.part(-2, 5, 10, 20)
    assert (part.shape, whole.offset(part)) == ((10, 20), (-2, 5))
    assert part.lattice == whole.lattice
    assert Grid.from_slices(part.crs, *part.slices).shape == part.shape


def test_a_query_without_a_pixel_is_refused() -> None:
    with pytest.raises(ValueError, match='no pixel'):
        Grid.from_slices('EPSG:32632', slice(0, 4, 10), slice(0, 100, 10))


def test_tiles_cover_a_grid_once() -> None:
    whole = grid(0, 0, 1001)
    covered = np.zeros((1, 1001, 1001), int)
    for tile in whole.tiles(300, 400):
        assert tile.height <= 300
        assert tile.width <= 400
        part = np.ones((1, *tile.shape), int)
        row, col = whole.offset(tile)
        covered[:, row : row + tile.height, col : col + tile.width] += part
    assert (covered == 1).all()


def test_paste_copies_what_two_grids_share() -> None:
    left, right = grid(0, 0, 8), grid(50, 30, 8)
    target = np.zeros((2, 8, 8), int)
    source = np.arange(128).reshape(2, 8, 8)
    paste(target, left, source, right)
    # The other grid begins 5 pixels east, and 3 pixels north.
    assert (target[:, :5, 5:] == source[:, 3:, :3]).all()
    assert (target[:, 5:] == 0).all()
    assert (target[:, :, :5] == 0).all()


@pytest.mark.parametrize(
    ('crs', 'x', 'y', 'boxes'),
    [
        (4326, slice(9, 10, 0.1), slice(50, 51, 0.1), [(9, 50, 10, 51)]),
        (
            4326,
            slice(179.5, 180.5, 0.1),
            slice(0, 1, 0.1),
            [(-180, 0, -179.5, 1), (179.5, 0, 180, 1)],
        ),
        (
            32661,
            slice(1_990_000, 2_010_000, 10),
            slice(1_990_000, 2_010_000, 10),
            [(-180, 89.87, 180, 90)],
        ),
    ],
)
def test_boxes_in_longitude_and_latitude(
    crs: int, x: slice, y: slice, boxes: list
) -> None:
    found = sorted(Grid.from_slices(f'EPSG:{crs}', x, y).lonlat_boxes)
    assert np.allclose(found, boxes, atol=0.01)


def test_boxes_across_the_antimeridian_from_utm() -> None:
    x, y = slice(800_000, 900_000, 10), slice(0, 100_000, 10)
    west, east = sorted(Grid.from_slices('EPSG:32660', x, y).lonlat_boxes)
    assert west[0] == -180
    assert -179.5 < west[2] < -179.3
    assert east[2] == 180
    assert 179.6 < east[0] < 179.8


def test_crs_without_a_code_travels_as_wkt() -> None:
    assert crs_text(CRS.from_epsg(32632)) == 'EPSG:32632'
    custom = CRS.from_proj4('+proj=laea +lat_0=52 +lon_0=10 +datum=WGS84')
    assert CRS.from_wkt(crs_text(custom)).equals(custom, ignore_axis_order=True)
    sent = Grid(crs_text(custom), 0, 0, 4, 4, 10, 10).to_ee()
    assert 'crsCode' not in sent
    assert sent['crsWkt'].startswith('PROJCS')
