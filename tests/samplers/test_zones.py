"""Grids of neighbouring zones, checked against footprints drawn independently."""

import geopandas as gpd
import numpy as np
import pytest
import shapely
from pyproj import CRS

from dynamicvis_geo.datasets import ChipDataset, EarthEngineDataset
from dynamicvis_geo.datasets.requests import (
    read_area,
)
from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.projections import utm_codes
from dynamicvis_geo.samplers import GridSampler
from dynamicvis_geo.samplers.zones import (
    cover_once,
    grid_pairs,
    split_area,
    split_points,
)

from ..datasets.rasters import Areas

WINDOWS = [('2022-06-01', '2022-09-01'), ('2023-06-01', '2023-09-01')]
PLACES = {
    'meridian': ('11.9,50.3,12.1,50.5', {32632, 32633}),
    'Norway, three zones': ('5.8,63.9,6.2,64.1', {32631, 32632}),
    'Norway, southern corner': ('2.9,55.9,3.1,56.1', {32631, 32632}),
    'Svalbard, three zones': ('20.5,71.9,21.5,72.1', {32633, 32634, 32635}),
    'equator, four zones': ('11.9,-0.1,12.1,0.1', {32632, 32633, 32732, 32733}),
    'antimeridian': ('179.9,-17.1,-179.9,-16.9', {32701, 32760}),
    'north, three zones': ('20.5,83.95,21.5,84.05', {32633, 32635, 32661}),
    'north, antimeridian': ('179.5,83.95,-179.5,84.05', {32601, 32660, 32661}),
    'south': ('11.5,-80.1,12.5,-79.9', {32732, 32733, 32761}),
}


def make(area: gpd.GeoSeries, crs: CRS) -> EarthEngineDataset:
    return EarthEngineDataset(area, WINDOWS[0], crs=crs)


def chips_of(
    roi: str, size: int, stride: int | None = None
) -> tuple[gpd.GeoDataFrame, gpd.GeoSeries]:
    """Chips, and their outlines and the area in an equal-area projection around it."""
    area = read_area(roi)
    chips = ChipDataset(grid_pairs(split_area(area), make, size, stride)).chips
    lon, lat = area.union_all().representative_point().coords[0]
    local = f'+proj=laea +lat_0={lat} +lon_0={lon} +datum=WGS84'
    drawn = []
    for crs, part in chips.groupby('crs'):
        boxes = shapely.box(part['minx'], part['miny'], part['maxx'], part['maxy'])
        side = (part['maxx'] - part['minx']).iloc[0]
        drawn.append(gpd.GeoSeries(boxes, crs=crs).segmentize(side / 32).to_crs(local))
    outlines = np.concatenate([part.values for part in drawn])
    wanted = area.segmentize(0.005).to_crs(local).union_all()
    return chips, gpd.GeoSeries([wanted, *outlines], crs=local)


@pytest.mark.parametrize('size', [64, 512])
@pytest.mark.parametrize('place', PLACES)
def test_nothing_left_out_and_little_twice(place: str, size: int) -> None:
    roi, codes = PLACES[place]
    chips, shapes = chips_of(roi, size)
    wanted, outlines = shapes.iloc[0], shapes.iloc[1:]
    covered = outlines.union_all()
    assert wanted.difference(covered).area < 1e-9 * wanted.area
    assert chips['chip_id'].is_unique
    zone = chips['crs'].str.removeprefix('EPSG:').astype(int)
    assert set(zone) == codes or size > 64
    assert outlines.area.sum() < (1.06 if size == 64 else 1.3) * covered.area
    # Chips of another zone fill what those of the own zone leave bare, and only that.
    foreign = zone.to_numpy() != utm_codes(chips['centre_lon'], chips['centre_lat'])
    bare = wanted.difference(outlines[~foreign].union_all())
    assert (outlines[foreign].intersection(bare).area > 0).all()


@pytest.mark.parametrize('size', [64, 512])
def test_area_smaller_than_a_chip(size: int) -> None:
    chips, shapes = chips_of('11.9999,50.3,12.0001,50.3002', size)
    assert 1 <= len(chips) <= 2
    assert shapes.iloc[0].within(shapes.iloc[1:].union_all())


@pytest.mark.parametrize('stride', [128, 100])
def test_chips_that_overlap(stride: int) -> None:
    chips, shapes = chips_of('11.95,50.3,12.05,50.4', 256, stride)
    assert shapes.iloc[0].difference(shapes.iloc[1:].union_all()).area < 1e-3
    zone = chips['crs'].str.removeprefix('EPSG:').astype(int)
    assert (zone == utm_codes(chips['centre_lon'], chips['centre_lat'])).all()


def test_place_and_id_do_not_depend_on_the_area() -> None:
    large, _ = chips_of('11.9,50.3,12.1,50.5', 128)
    small, _ = chips_of('11.97,50.38,12.02,50.41', 128)
    rim = set(small['chip_id']) - set(large['chip_id'])
    zone = small['crs'].str.removeprefix('EPSG:').astype(int)
    own = zone.to_numpy() == utm_codes(small['centre_lon'], small['centre_lat'])
    assert not rim & set(small['chip_id'][own])


def test_every_time_window_and_points_and_lines() -> None:
    area = gpd.GeoSeries(
        [
            shapely.Point(11.99999, 50.3),
            shapely.LineString([(11.98, 50.4), (12.02, 50.4)]),
            shapely.box(13, 50, 13.001, 50.001),
        ],
        crs=4326,
    )

    def two(area: gpd.GeoSeries, crs: CRS) -> EarthEngineDataset:
        return EarthEngineDataset(area, WINDOWS, crs=crs)

    chips = ChipDataset(grid_pairs(split_area(area), two, 64)).chips
    covered = chips.union_all()
    assert all(shapely.covers(covered.buffer(1e-9), area.values))
    years = chips['start'].dt.year.value_counts()
    assert years[2022] == years[2023]


def test_other_projections_are_refused() -> None:
    dataset = Areas([shapely.box(0, 0, 100, 100)], crs='EPSG:3035')
    with pytest.raises(SpecError, match='no UTM zone'):
        cover_once([(dataset, GridSampler(dataset, 64))])


def lonlat(*geometries: shapely.Geometry) -> gpd.GeoSeries:
    return gpd.GeoSeries(list(geometries), crs='EPSG:4326')


@pytest.mark.parametrize(
    ('box', 'codes'),
    [
        ((11.5, 45, 11.9, 46), [32632]),
        ((11.5, 45, 12.5, 46), [32632, 32633]),
        ((11.5, -1, 12.5, 1), [32632, 32633, 32732, 32733]),
        # Norway: 3 to 6 degrees east belong to zone 32 between 56 and 64 north.
        ((4, 58, 5, 59), [32632]),
        ((4, 55.5, 5, 56.5), [32631, 32632]),
        # Svalbard has no zones 32, 34 and 36.
        ((8, 78, 10, 79), [32631, 32633]),
        ((20, 83, 21, 85), [32633, 32661]),
        ((0, -81, 1, -79), [32731, 32761]),
    ],
)
def test_area_is_divided_by_zone_without_loss(
    box: tuple[float, float, float, float], codes: list[int]
) -> None:
    area = shapely.box(*box)
    pairs = split_area(lonlat(area))
    assert [crs.to_epsg() for crs, _ in pairs] == codes
    parts = [part.iloc[0] for _, part in pairs]
    assert shapely.union_all(parts).symmetric_difference(area).area < 1e-9
    assert sum(part.area for part in parts) == pytest.approx(area.area)


def test_zone_that_an_area_only_touches_is_left_out() -> None:
    assert len(split_area(lonlat(shapely.box(12, 45, 13, 46)))) == 1


def test_area_on_both_sides_of_the_antimeridian() -> None:
    area = lonlat(shapely.box(179, -17, 180, -16), shapely.box(-180, -17, -179, -16))
    assert [crs.to_epsg() for crs, _ in split_area(area)] == [32701, 32760]


def test_area_in_another_crs_and_lines() -> None:
    metric = lonlat(shapely.box(11.5, 45, 12.5, 46)).to_crs(3857)
    assert len(split_area(metric)) == 2
    line = lonlat(shapely.LineString([(11, 45), (13, 45)]))
    assert [part.iloc[0].length for _, part in split_area(line)] == [1, 1]


def test_points_keep_their_columns_and_order() -> None:
    points = gpd.GeoDataFrame(
        {'id': ['a', 'b', 'c', 'd']},
        geometry=gpd.points_from_xy([13, 11, 14, 4.5], [45, 45, 46, 60]),
        crs='EPSG:4326',
    )
    pairs = split_points(points.to_crs(3857))
    assert [crs.to_epsg() for crs, _ in pairs] == [32632, 32633]
    assert [part['id'].tolist() for _, part in pairs] == [['b', 'd'], ['a', 'c']]
