import geopandas as gpd
import numpy as np
import pytest
import shapely
from pyproj import CRS

from dynamicvis_geo.datasets import ChipDataset
from dynamicvis_geo.datasets.footprints import footprints
from dynamicvis_geo.samplers import GridSampler

from .rasters import Areas


def outline(crs: str, box: tuple[float, ...], pixels: int) -> shapely.Geometry:
    bounds, shape = np.array([box], dtype=float), np.array([[pixels, pixels]])
    (polygon,) = footprints(CRS.from_user_input(crs), bounds, shape)
    return polygon


@pytest.mark.parametrize(
    ('crs', 'box', 'pixels'),
    [
        ('EPSG:32618', (400_000, 4_000_000, 405_120, 4_005_120), 512),
        ('EPSG:32631', (200_000, 9_000_000, 251_200, 9_051_200), 512),
        ('EPSG:32633', (400_000, 7_000_000, 656_000, 7_256_000), 512),
        ('EPSG:3035', (4e6, 3e6, 4.512e6, 3.512e6), 512),
        ('EPSG:3413', (-800_000, -900_000, -700_000, -800_000), 1000),
    ],
)
def test_within_a_fraction_of_a_pixel_of_the_true_outline(
    crs: str, box: tuple[float, ...], pixels: int
) -> None:
    polygon = outline(crs, box, pixels)
    dense = gpd.GeoSeries([polygon], crs=4326).segmentize(0.001).to_crs(crs).iloc[0]
    pixel = (box[2] - box[0]) / pixels
    assert dense.boundary.hausdorff_distance(shapely.box(*box).boundary) < 0.2 * pixel
    assert polygon.is_valid


def test_no_more_corners_than_needed() -> None:
    small = outline('EPSG:32618', (400_000, 4_000_000, 405_120, 4_005_120), 512)
    assert shapely.get_num_coordinates(small) == 5
    assert shapely.get_num_coordinates(outline('EPSG:4326', (0, 0, 30, 30), 9000)) == 5


def test_chip_across_the_antimeridian_is_cut_there() -> None:
    # Zone 60 reaches past 180 degrees here.
    box = shapely.box(680_000, 6_990_000, 820_000, 7_010_000)
    dataset = Areas([box], crs='EPSG:32660', res=100.0)
    chips = ChipDataset([(dataset, GridSampler(dataset, (200, 1400)))]).chips
    crossing = chips[chips.geom_type == 'MultiPolygon']
    assert len(crossing) == 2
    for parts in crossing.geometry:
        west, east = sorted(parts.geoms, key=lambda part: part.bounds[0])
        assert west.bounds[0] == -180
        assert east.bounds[2] == 180
        assert parts.is_valid
        # 140 km by 20 km at 63 degrees north.
        assert parts.area == pytest.approx(2.78 * 0.18, rel=0.02)
    assert (chips.centre_lon.abs() <= 180).all()


@pytest.mark.parametrize(
    ('box', 'parts'),
    [
        ((179, 10, 181, 12), [(-180, 10, -179, 12), (179, 10, 180, 12)]),
        ((-181, 10, -179, 12), [(-180, 10, -179, 12), (179, 10, 180, 12)]),
        ((190, 10, 200, 12), [(-170, 10, -160, 12)]),
        ((178, 80, 180, 95), [(178, 80, 180, 90)]),
        ((-200, -95, 200, 95), [(-180, -90, 180, 90)]),
        ((-180, -90, 180, 90), [(-180, -90, 180, 90)]),
    ],
)
def test_degrees_past_the_edge_of_the_map(
    box: tuple[float, ...], parts: list[tuple[float, ...]]
) -> None:
    polygon = outline('EPSG:4326', box, 100)
    assert sorted(part.bounds for part in shapely.get_parts(polygon)) == parts
    assert polygon.area == pytest.approx(sum(shapely.box(*p).area for p in parts))


@pytest.mark.parametrize(('crs', 'pole'), [('EPSG:3413', 90), ('EPSG:3031', -90)])
def test_chip_over_a_pole_reaches_it(crs: str, pole: int) -> None:
    polygon = outline(crs, (-1e5, -1e5, 1e5, 1e5), 200)
    assert polygon.is_valid
    assert (polygon.bounds[0], polygon.bounds[2]) == (-180, 180)
    assert polygon.covers(shapely.Point(33, np.sign(pole) * 89.99))
    assert not polygon.covers(shapely.Point(33, np.sign(pole) * 88))


def test_outside_the_reach_of_the_crs_there_is_no_footprint() -> None:
    geostationary = '+proj=geos +h=35785831 +lon_0=0 +a=6378169 +b=6356583.8'
    assert outline(geostationary, (8e6, 8e6, 8.1e6, 8.1e6), 10).is_empty
