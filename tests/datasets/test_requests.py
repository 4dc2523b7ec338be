from pathlib import Path

import geopandas as gpd
import pytest
import shapely

from dynamicvis_geo.datasets import assign_points, open_scenes, read_points
from dynamicvis_geo.datasets.requests import (
    read_area,
)
from dynamicvis_geo.errors import SourceError
from tests.stores import Upload

from .rasters import Areas, pattern, write_geotiff


def write(path: Path, *lines: str) -> Path:
    path.write_text('\n'.join(lines) + '\n', encoding='utf-8')
    return path


@pytest.mark.parametrize(
    'header', ['lon,lat', 'Longitude,LATITUDE', 'x,y', '\ufefflon,lat', ' Lon, Lat']
)
def test_csv(tmp_path: Path, header: str) -> None:
    points = read_points(write(tmp_path / 'p.csv', header, '-75.5,38.9', '10,50'))
    assert points.crs == 'EPSG:4326'
    assert [(p.x, p.y) for p in points.geometry] == [(-75.5, 38.9), (10, 50)]


def test_csv_keeps_its_columns_and_ids_as_written(tmp_path: Path) -> None:
    lines = 'id,class,lat,lon', '007,forest,38.9,-75.5', '010,water,39,-75'
    points = read_points(write(tmp_path / 'p.csv', *lines))
    assert points['id'].tolist() == ['007', '010']
    assert points['class'].tolist() == ['forest', 'water']


@pytest.mark.parametrize('suffix', ['geojson', 'gpkg', 'parquet'])
def test_vector_files(tmp_path: Path, suffix: str) -> None:
    table = gpd.GeoDataFrame(
        {'id': ['a', 'b']},
        geometry=gpd.points_from_xy([400_000, 400_100], [4_300_000, 4_300_000]),
        crs='EPSG:32618',
    )
    if suffix == 'geojson':
        table = table.to_crs(4326)
    path = tmp_path / f'p.{suffix}'
    table.to_parquet(path) if suffix == 'parquet' else table.to_file(path)
    points = read_points(path)
    assert points.crs == table.crs
    assert points['id'].tolist() == ['a', 'b']
    assert points.geometry.geom_equals_exact(table.geometry, 1e-6).all()


@pytest.mark.parametrize(
    ('lines', 'message'),
    [
        ((), 'empty'),
        (('lon,lat',), 'no points'),
        (('a,b', '1,2'), 'no column of longitudes.*found are: a, b'),
        (('lon;lat', '1;2'), 'no column of longitudes.*lon;lat'),
        (('lon,b', '1,2'), 'no column of latitudes.*found are: lon, b'),
        (
            ('lon,lat', '1,2', 'east,2', ',3'),
            "rows 2, 3 have no longitude.*'lon'.*east",
        ),
        (('lon,lat', '400000,4300000'), r'row 1 has no longitude.*400000.*vector'),
        (('lon,lat', '1,91'), 'row 1 has no latitude of -90 to 90'),
        (('id,lon,lat', 'a,1,2', ',1,2'), "row 2 has no value in column 'id'"),
    ],
)
def test_csv_that_cannot_be_used(
    tmp_path: Path, lines: tuple[str, ...], message: str
) -> None:
    path = tmp_path / 'p.csv'
    path.write_text('\n'.join(lines))
    with pytest.raises(SourceError, match=message) as error:
        read_points(path)
    assert str(error.value).startswith(str(path))
    assert '\n' not in str(error.value)


def test_other_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match='no such file'):
        read_points(tmp_path / 'nothing.csv')
    with pytest.raises(SourceError, match='cannot read it'):
        read_points(write(tmp_path / 'p.gpkg', 'no package'))
    areas = gpd.GeoDataFrame(geometry=[shapely.box(0, 0, 1, 1)], crs=4326)
    areas.to_file(tmp_path / 'areas.geojson')
    with pytest.raises(SourceError, match='row 1 has Polygon geometry'):
        read_points(tmp_path / 'areas.geojson')


def test_points_go_to_the_images_that_show_them(tmp_path: Path) -> None:
    write_geotiff(tmp_path / 'a.tif', pattern(100, 100))
    write_geotiff(tmp_path / 'b.tif', pattern(100, 100), west=400_503.0)
    write_geotiff(tmp_path / 'c.tif', pattern(10, 10), crs='EPSG:32633')
    scenes = open_scenes(tmp_path)
    points = gpd.GeoDataFrame(
        {'id': ['both', 'b', 'a']},
        geometry=gpd.points_from_xy([400_700, 401_300, 400_100], [4_299_500] * 3),
        crs='EPSG:32618',
    ).to_crs(4326)
    pairs = assign_points(scenes, points)
    assert [(len(s), p['id'].tolist()) for s, p in pairs] == [
        (1, ['both', 'a']),
        (1, ['both', 'b']),
    ]
    assert [scene for scene, _ in pairs] == scenes[:2]


def test_points_in_no_image_are_listed() -> None:
    datasets = [Areas([shapely.box(4e5, 4.2e6, 5e5, 4.3e6)])]
    places = gpd.GeoSeries.from_xy([-75.5, 0, 10], [38.5, 50, 51], crs=4326)
    with pytest.raises(SourceError, match=r'2 of 3 points.*1 \(0\.00000, 50\.00000\)'):
        assign_points(datasets, gpd.GeoDataFrame(geometry=places))


@pytest.mark.parametrize('suffix', ['csv', 'geojson', 'gpkg', 'parquet'])
def test_files_of_stores(tmp_path: Path, upload: Upload, suffix: str) -> None:
    path = tmp_path / f'p.{suffix}'
    table = gpd.GeoDataFrame(
        {'id': ['a', 'b']}, geometry=gpd.points_from_xy([10, 11], [50, 51]), crs=4326
    )
    if suffix == 'csv':
        write(path, 'id,lon,lat', 'a,10,50', 'b,11,51')
    else:
        table.to_parquet(path) if suffix == 'parquet' else table.to_file(path)
    url = upload(path)
    for points in (read_points(url), read_points(str(url))):
        assert points['id'].tolist() == ['a', 'b']
        assert points.geometry.geom_equals_exact(table.geometry, 1e-9).all()
    if suffix != 'csv':
        assert len(read_area(str(url))) == 2
    with pytest.raises(SourceError, match=f'^{url}.none: no such file'):
        read_points(f'{url}.none')
