import math
import pickle

import numpy as np
import pandas as pd
import pytest
from pyproj import Geod

from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.projections import lonlat_centre, utm_crs, utm_zone
from dynamicvis_geo.specs import (
    BBox,
    OutputSpec,
    PointBuffer,
    SensorSpec,
    TemporalSpec,
)


def test_bbox_is_a_polygon_in_longitude_and_latitude() -> None:
    area = BBox(9, 50, 10, 51).geometry
    assert area.crs == 'EPSG:4326'
    assert area[0].bounds == (9, 50, 10, 51)


def test_bbox_across_the_antimeridian_has_two_parts() -> None:
    box = BBox(179, -18, -178, -16)
    assert box.crosses_antimeridian
    parts = sorted(part.bounds for part in box.geometry[0].geoms)
    assert parts == [(-180, -18, -178, -16), (179, -18, 180, -16)]
    assert lonlat_centre(box.geometry[0]) == (-179.5, -17)


@pytest.mark.parametrize(
    ('values', 'named'),
    [
        ((10, 50, 9, 51), 'minlon'),
        ((9, 51, 10, 50), 'minlat'),
        ((9, 50, 9, 51), 'minlon'),
        ((9, 50, 190, 51), 'maxlon'),
        ((9, -91, 10, 51), 'minlat'),
        ((math.nan, 50, 10, 51), 'minlon'),
        (('9', 50, 10, 51), 'minlon'),
        ((True, 50, 10, 51), 'minlon'),
    ],
)
def test_bbox_refuses_what_is_no_rectangle(values: tuple, named: str) -> None:
    with pytest.raises(SpecError, match=named):
        BBox(*values)


@pytest.mark.parametrize(
    ('lon', 'lat'), [(10, 60), (-70, -33), (25, 78.2), (179.999, -17), (0, 89)]
)
def test_point_buffer_has_its_size_on_the_ground(lon: float, lat: float) -> None:
    series = PointBuffer(lon, lat, 2048).geometry
    west, south, east, north = series[0].bounds
    corners = np.array([(west, south), (east, south), (west, north)])
    lonlat = [
        tuple(
            part[0]
            for part in _points(series.crs, corners[[i]]).get_coordinates().T.to_numpy()
        )
        for i in range(3)
    ]
    geod = Geod(ellps='WGS84')
    for other in lonlat[1:]:
        _, _, length = geod.inv(*lonlat[0], *other)
        # A projection stretches by at most 0.1 percent within its zone, UPS by 0.6.
        assert length == pytest.approx(4096, rel=0.007)


def _points(crs, xy):  # noqa: ANN001, ANN202
    import geopandas as gpd

    return gpd.GeoSeries(gpd.points_from_xy(*xy.T), crs=crs).to_crs('EPSG:4326')


@pytest.mark.parametrize('values', [(200, 0, 10), (0, 95, 10), (0, 0, 0), (0, 0, -5)])
def test_point_buffer_refuses_what_is_no_square(values: tuple) -> None:
    with pytest.raises(SpecError):
        PointBuffer(*values)


@pytest.mark.parametrize(
    ('lon', 'lat', 'zone'),
    [
        (9, 50, 32),
        (5, 60, 32),
        (2.9, 60, 31),
        (12, 60, 33),
        (5, 55, 31),
        (8.9, 75, 31),
        (9, 75, 33),
        (20.9, 80, 33),
        (21, 80, 35),
        (33, 80, 37),
        (42, 75, 38),
        (-180, 0, 1),
        (180, 0, 1),
        (179.9, 0, 60),
    ],
)
def test_utm_zones_have_the_exceptions_of_norway_and_svalbard(
    lon: float, lat: float, zone: int
) -> None:
    assert utm_zone(lon, lat) == zone


@pytest.mark.parametrize(
    ('lat', 'code'),
    [(0, 32632), (-0.1, 32732), (83.9, 32633), (84, 32661), (-80, 32732), (-81, 32761)],
)
def test_local_crs_by_latitude(lat: float, code: int) -> None:
    assert utm_crs(9, lat).to_epsg() == code


def test_temporal_spec_is_half_open_and_its_interval_closed() -> None:
    assert TemporalSpec.year(2023) == TemporalSpec('2023-01-01', '2024-01-01')
    assert TemporalSpec.years(2022, 2022) == [TemporalSpec.year(2022)]
    assert TemporalSpec.years(2022, 2023) == [*map(TemporalSpec.year, (2022, 2023))]
    with pytest.raises(SpecError, match='first=2023 is after last=2022'):
        TemporalSpec.years(2023, 2022)
    spec = TemporalSpec.range('2023-06-01T02:00:00+02:00', '2023-07-01')
    assert (spec.start, spec.end) == ('2023-06-01', '2023-07-01')
    assert spec.interval.closed == 'both'
    assert pd.Timestamp('2023-06-30T23:59:59.999') in spec.interval
    assert pd.Timestamp('2023-07-01') not in spec.interval


@pytest.mark.parametrize(
    ('start', 'end'),
    [
        ('2023-07-01', '2023-06-01'),
        ('2023-06-01', '2023-06-01'),
        ('June', '2023-06-01'),
        ('', '2023-06-01'),
        (None, '2023-06-01'),
    ],
)
def test_temporal_spec_refuses_what_is_no_window(start: str, end: str) -> None:
    with pytest.raises(SpecError):
        TemporalSpec.range(start, end)


@pytest.mark.parametrize('year', ['2023', 23, 2023.0, True])
def test_temporal_spec_refuses_what_is_no_year(year: int) -> None:
    with pytest.raises(SpecError, match='year'):
        TemporalSpec.year(year)


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        ('collection', ''),
        ('bands', ()),
        ('bands', 'B4'),
        ('bands', ('B4', 'B4')),
        ('bands', ('B4', 3)),
        ('scale_m', 0),
        ('scale_m', -10),
        ('scale_m', math.inf),
        ('cloudy_pct', 101),
        ('composite', 'mean'),
        ('fill_value', math.nan),
        ('cloud_mask', 'qa60'),
        ('cloud_threshold', 2),
        ('dtype', 'int8'),
    ],
)
def test_sensor_spec_names_what_it_refuses(name: str, value: object) -> None:
    with pytest.raises(SpecError, match=name):
        SensorSpec(**{name: value})


def test_sensor_spec_takes_lists_and_stays_hashable() -> None:
    spec = SensorSpec(bands=['B8', 'B4'], cloudy_pct=None)
    assert spec.bands == ('B8', 'B4')
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert len({spec, spec}) == 1


def test_sensor_spec_knows_what_decides_its_pixels() -> None:
    spec = SensorSpec()
    assert spec.pixels() == SensorSpec(fill_value=-1, cloud_threshold=0.9).pixels()
    assert spec.pixels() != SensorSpec(cloudy_pct=31).pixels()
    clear = SensorSpec(cloud_mask='cs+')
    assert clear.pixels() != SensorSpec(cloud_mask='cs+', cloud_threshold=0.9).pixels()


def test_output_spec() -> None:
    assert OutputSpec.pooled() == OutputSpec('pooled', 'mean')
    assert OutputSpec.pooled('max').pooling == 'max'
    assert OutputSpec.grid().mode == 'grid'
    with pytest.raises(SpecError, match='pooling'):
        OutputSpec.pooled('median')
