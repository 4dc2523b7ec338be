from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely

from dynamicvis_geo import datasets
from dynamicvis_geo.errors import SourceError, SpecError
from dynamicvis_geo.evaluation import join_labels
from tests.datasets.embedding_parts import HALF, footprint
from tests.stores import Upload


def chips(
    count: int = 4, lon: Any = None, lat: Any = None, **columns: Any
) -> gpd.GeoDataFrame:
    """Chips of 0.02 degrees, side by side from 13 degrees east, at 48 north."""
    lon = 13 + 2 * HALF * np.arange(count) if lon is None else lon
    lat = np.full(count, 48.0) if lat is None else lat
    return gpd.GeoDataFrame(
        {
            'id': [f'chip-{i}' for i in range(count)],
            'centre_lon': lon,
            'centre_lat': lat,
            **columns,
        },
        geometry=[footprint(*place) for place in zip(lon, lat, strict=True)],
        crs='EPSG:4326',
    )


def csv(tmp_path: Path, text: str) -> Path:
    path = tmp_path / 'labels.csv'
    path.write_text(text)
    return path


def test_join_by_chip_id(tmp_path: Path) -> None:
    labels = csv(
        tmp_path, 'id,cover\nchip-2,water\nchip-0,forest\nchip-9,rock\nchip-1,\n'
    )
    joined = join_labels(chips(), labels, 'cover')
    assert joined.how == 'id'
    assert joined.rows.tolist() == [0, 2]
    assert joined.values.tolist() == ['forest', 'water']
    assert joined.labels['id'].tolist() == ['chip-0', 'chip-2']
    assert joined.unmatched == ('chip-1', 'chip-3')
    assert (joined.unused, joined.missing) == (1, 1)
    for part in (
        "by id (column 'id')",
        '2 of 4 chips have a label',
        'without one: chip-1, chip-3',
        '1 of 3 labels are not used',
        "1 labels have no value in 'cover'",
    ):
        assert part in joined.description


def test_join_by_point_id_keeps_leading_zeros(tmp_path: Path) -> None:
    table = chips(point_id=['007', '008', '007', '7'])
    labels = csv(tmp_path, 'plot,cover\n007,a\n7,b\n')
    joined = join_labels(table, labels, 'cover', on='plot')
    assert joined.rows.tolist() == [0, 2, 3]
    assert joined.values.tolist() == ['a', 'a', 'b']


def test_join_by_named_columns_and_numbers() -> None:
    table = chips(site=[10, 11, 12, 13])
    labels = pd.DataFrame({'nr': [13.0, 10.0, np.nan], 'yield': [1.5, 2.5, 3.5]})
    joined = join_labels(table, labels, 'yield', on=('site', 'nr'))
    assert joined.rows.tolist() == [0, 3]
    assert joined.values.tolist() == [2.5, 1.5]


def test_auto_goes_by_place_when_ids_do_not_match(tmp_path: Path) -> None:
    labels = csv(tmp_path, 'id,lon,lat,cover\n1,13.001,48.001,a\n2,13.039,48,b\n')
    table = chips()
    joined = join_labels(table, labels, 'cover')
    assert joined.how == 'within'
    assert joined.rows.tolist() == [0, 2]
    assert 'points within footprints' in joined.description
    joined = join_labels(table, labels, 'cover', max_distance_m=100)
    assert joined.how == 'nearest'
    assert joined.rows.tolist() == [2]


def test_auto_goes_by_id_when_labels_have_no_place(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r'none of 1 labels.*named like chip-0, chip-1'):
        join_labels(chips(), csv(tmp_path, 'id,cover\nx,a\n'), 'cover')


def test_same_id_twice_must_agree(tmp_path: Path) -> None:
    table = chips()
    labels = csv(tmp_path, 'id,cover\nchip-0,a\nchip-0,a\nchip-1,b\n')
    assert join_labels(table, labels, 'cover').values.tolist() == ['a', 'b']
    labels = csv(tmp_path, 'id,cover\nchip-0,a\nchip-1,a\nchip-1,b\n')
    with pytest.raises(SpecError, match=r'1 chip would.*chip-1: a \(label 2\), b'):
        join_labels(table, labels, 'cover')


def test_nearest_is_measured_on_the_ground(tmp_path: Path) -> None:
    # At 60 degrees north, 0.01 degrees of longitude are 558 m, of latitude 1114 m.
    table = chips(1, lon=[10.0], lat=[60.0])
    labels = csv(tmp_path, 'lon,lat,cover\n10.01,60,east\n10,60.006,north\n')
    joined = join_labels(table, labels, 'cover', 'nearest', max_distance_m=600)
    assert joined.values.tolist() == ['east']
    with pytest.raises(SpecError, match='none of 2 labels'):
        join_labels(table, labels, 'cover', 'nearest', max_distance_m=550)


def test_nearest_refuses_different_labels_of_one_place(tmp_path: Path) -> None:
    labels = csv(tmp_path, 'lon,lat,cover\n13,48,a\n13,48,a\n13,48,b\n')
    with pytest.raises(SpecError, match=r'chip-0: a .*, a .*, b \(label 3\)'):
        join_labels(chips(), labels, 'cover', 'nearest', max_distance_m=10)


@pytest.mark.parametrize('how', ['nearest', 'within'])
def test_points_across_the_antimeridian(tmp_path: Path, how: str) -> None:
    table = chips(2, lon=[179.995, -170.0], lat=[-17.0, -17.0])
    labels = csv(tmp_path, 'lon,lat,cover\n-179.998,-17,a\n-170.001,-17,b\n')
    limit = 1000.0 if how == 'nearest' else None
    joined = join_labels(table, labels, 'cover', how, max_distance_m=limit)
    assert joined.values.tolist() == ['a', 'b']


def test_of_points_in_a_footprint_the_one_nearest_to_its_centre(
    tmp_path: Path,
) -> None:
    labels = csv(
        tmp_path, 'lon,lat,cover\n13.008,48,far\n13.002,48,near\n12.95,48,outside\n'
    )
    joined = join_labels(chips(), labels, 'cover', 'within')
    assert joined.rows.tolist() == [0]
    assert joined.values.tolist() == ['near']
    assert joined.unused == 2


def test_polygons_that_contain_the_centre(tmp_path: Path) -> None:
    fields = gpd.GeoDataFrame(
        {'cover': ['a', 'b']},
        geometry=[
            shapely.box(12.995, 47.995, 13.005, 48.005),
            shapely.box(13.015, 47.9, 13.1, 48.1),
        ],
        crs='EPSG:4326',
    )
    for crs, name in (('EPSG:4326', 'a.geojson'), ('EPSG:32633', 'b.gpkg')):
        path = tmp_path / name
        fields.to_crs(crs).to_file(path)
        joined = join_labels(chips(), path, 'cover')
        assert joined.how == 'within'
        assert joined.values.tolist() == ['a', 'b', 'b', 'b']
    path = tmp_path / 'fields.parquet'
    fields.to_parquet(path)
    assert len(join_labels(chips(), path, 'cover').rows) == 4


@pytest.mark.parametrize('crs', ['EPSG:4326', 'EPSG:32760'])
def test_polygon_across_the_antimeridian(crs: str) -> None:
    table = chips(3, lon=[179.99, -179.99, 0.0], lat=[-17.0] * 3)
    if crs == 'EPSG:4326':
        # As many programs write it: a side jumps over the antimeridian.
        outline = [(179.9, -18), (-179.9, -18), (-179.9, -16), (179.9, -16)]
        area = gpd.GeoSeries([shapely.Polygon(outline)], crs=crs)
    else:
        area = gpd.GeoSeries([shapely.box(179.9, -18, 180.1, -16)], crs='EPSG:4326')
        area = area.to_crs(crs)
    joined = join_labels(table, gpd.GeoDataFrame({'v': [1]}, geometry=area), 'v')
    assert joined.rows.tolist() == [0, 1]


def test_overlapping_polygons_must_agree() -> None:
    box = shapely.box(12.9, 47.9, 13.03, 48.1)
    fields = gpd.GeoDataFrame({'v': [1, 2]}, geometry=[box, box], crs='EPSG:4326')
    with pytest.raises(SpecError, match='2 chips would have different labels'):
        join_labels(chips(), fields, 'v')
    fields['v'] = 1
    assert join_labels(chips(), fields, 'v').values.tolist() == [1, 1]


def test_points_in_other_tables(tmp_path: Path) -> None:
    table = chips()
    points = gpd.GeoDataFrame(
        {'v': [1.0, 2.0]},
        geometry=[shapely.MultiPoint([(13.0, 48)]), shapely.MultiPoint([(13.02, 48)])],
        crs='EPSG:4326',
    )
    path = tmp_path / 'points.gpkg'
    points.to_crs('EPSG:32633').to_file(path)
    joined = join_labels(table, path, 'v', max_distance_m=1)
    assert joined.rows.tolist() == [0, 1]
    plain = tmp_path / 'plain.parquet'
    pd.DataFrame({'Longitude': [13.04], 'Latitude': [48.0], 'v': ['a']}).to_parquet(
        plain
    )
    assert join_labels(table, plain, 'v').rows.tolist() == [2]


def test_rows_are_positions_in_a_part_of_a_table() -> None:
    part = chips().iloc[[3, 1]]
    labels = pd.DataFrame({'id': ['chip-1'], 'v': ['a']})
    joined = join_labels(part, labels, 'v')
    assert joined.rows.tolist() == [1]
    assert joined.unmatched == ('chip-3',)


def test_labels_of_several_classes() -> None:
    labels = pd.DataFrame(
        {'id': ['chip-0', 'chip-1', 'chip-1'], 'tags': [['a'], ['a', 'b'], ['a', 'b']]}
    )
    joined = join_labels(chips(), labels, 'tags')
    assert joined.values.tolist() == [['a'], ['a', 'b']]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'how': 'near'}, "how='near' is none of auto, id, nearest, within"),
        ({'how': 'nearest'}, 'needs max_distance_m'),
        ({'how': 'within', 'max_distance_m': 5}, "is for how='nearest'"),
        ({'how': 'within', 'on': 'id'}, "is for how='id'"),
        ({'max_distance_m': -1}, 'must be a length'),
        ({'on': ('a', 'b', 'c')}, 'or a pair'),
        ({'on': 'plot'}, 'no column plot of ids'),
        ({'on': ('site', 'id')}, "the embeddings have no column 'site'"),
        (
            {'target': 'height'},
            "no column 'height' of labels; name one of its columns: id",
        ),
        ({'target': 'none'}, 'all are missing'),
    ],
)
def test_unusable_arguments(
    tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    labels = csv(tmp_path, 'id,lon,lat,cover,none\nchip-0,13,48,a,\n')
    with pytest.raises(SpecError, match=message):
        join_labels(chips(), labels, **{'target': 'cover', **arguments})


def test_unusable_files(tmp_path: Path) -> None:
    table = chips()
    with pytest.raises(SourceError, match='no such file'):
        join_labels(table, tmp_path / 'none.csv', 'cover')
    with pytest.raises(SourceError, match='there are no labels'):
        join_labels(table, csv(tmp_path, 'id,cover\n'), 'cover')
    bad = tmp_path / 'bad.gpkg'
    bad.write_text('no such thing')
    with pytest.raises(SourceError, match='GeoPandas cannot read it'):
        join_labels(table, bad, 'cover')
    with pytest.raises(SourceError, match='no column of longitudes'):
        join_labels(table, csv(tmp_path, 'id,cover\na,b\n'), 'cover', 'within')
    with pytest.raises(SourceError, match='has no longitude of -180 to 180'):
        join_labels(table, csv(tmp_path, 'lon,lat,cover\n700000,1,b\n'), 'cover')
    lines = gpd.GeoDataFrame(
        {'v': [1]}, geometry=[shapely.LineString([(0, 0), (1, 1)])], crs='EPSG:4326'
    )
    with pytest.raises(SourceError, match='labels are LineString'):
        join_labels(table, lines, 'v')
    points = gpd.GeoDataFrame({'v': [1]}, geometry=[shapely.Point(0, 0)])
    with pytest.raises(SourceError, match='has no CRS'):
        join_labels(table, points, 'v')
    points = gpd.GeoDataFrame({'v': [1, 2]}, geometry=[shapely.Point(0, 0), None])
    with pytest.raises(SourceError, match=r'1 of 2 labels have no geometry.*row 2'):
        join_labels(table, points.set_crs('EPSG:4326'), 'v')


def test_labels_of_a_store(tmp_path: Path, upload: Upload) -> None:
    path = csv(tmp_path, 'id,cover\nchip-2,water\nchip-0,forest\n')
    table = chips()
    expected = join_labels(table, path, 'cover').values.tolist()
    assert join_labels(table, upload(path), 'cover').values.tolist() == expected
    labels = table[['id', 'geometry']].assign(cover='water')
    labels.to_file(tmp_path / 'labels.gpkg')
    labels.to_parquet(tmp_path / 'labels.parquet')
    for name in ('labels.gpkg', 'labels.parquet'):
        joined = join_labels(table, str(upload(tmp_path / name)), 'cover', 'within')
        assert joined.rows.tolist() == [0, 1, 2, 3]


def test_labels_are_where_earlier_versions_had_them() -> None:
    assert datasets.join_labels is join_labels
