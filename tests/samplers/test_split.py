import geopandas as gpd
import pytest
import shapely

from dynamicvis_geo.samplers.zones import split_area, split_points


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
