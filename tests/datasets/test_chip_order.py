import numpy as np
import pytest
import shapely

from dynamicvis_geo.datasets import ChipDataset, read_points
from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.samplers import GridSampler, PointSampler

from .rasters import Areas

TIMES = [('2023-01-01', '2023-02-01'), ('2022-01-01', '2022-02-01')]


def ordered(dataset: Areas, size: int = 64) -> ChipDataset:
    return ChipDataset([(dataset, GridSampler(dataset, size))], order='hilbert')


def test_sixteen_in_a_row_are_a_square() -> None:
    chips = ordered(Areas([shapely.box(0, 0, 640 * 32, 640 * 32)]))
    table = chips.chips
    for first in range(0, len(chips), 16):
        part = table.iloc[first : first + 16]
        sides = (
            part['maxx'].max() - part['minx'].min(),
            part['maxy'].max() - part['miny'].min(),
        )
        assert sides == (4 * 640, 4 * 640)


def test_same_chips_by_source_and_time_first() -> None:
    box = shapely.box(0, 0, 640 * 5, 640 * 9)
    west, east = Areas([box, box], TIMES), Areas([box], crs='EPSG:32619')
    pairs = [(west, GridSampler(west, 64)), (east, GridSampler(east, 64))]
    plain, chips = ChipDataset(pairs), ChipDataset(pairs, order='hilbert')
    assert set(chips.chips['chip_id']) == set(plain.chips['chip_id'])
    years = chips.chips['start'].dt.year[chips.chips['crs'] == 'EPSG:32618']
    assert years.tolist() == [2022] * 45 + [2023] * 45
    assert chips.chips['crs'].tolist() == ['EPSG:32618'] * 90 + ['EPSG:32619'] * 45


def test_points_keep_their_ids(tmp_path_factory: pytest.TempPathFactory) -> None:
    generator = np.random.default_rng(0)
    xy = generator.uniform(0, 50_000, (40, 2))
    path = tmp_path_factory.mktemp('points') / 'points.csv'
    lonlat = Areas([shapely.MultiPoint(xy)]).index.geometry.to_crs(4326)
    lines = [
        f'p{i},{point.x:.9f},{point.y:.9f}'
        for i, point in enumerate(lonlat.iloc[0].geoms)
    ]
    path.write_text('\n'.join(['id,lon,lat', *lines]))
    points = read_points(path)
    dataset = Areas([shapely.box(-1000, -1000, 51_000, 51_000)])
    pairs = [(dataset, PointSampler(dataset, points, 32))]
    plain, chips = ChipDataset(pairs), ChipDataset(pairs, order='hilbert')
    assert plain.chips['point_id'].tolist() == [f'p{i}' for i in range(40)]
    assert chips.chips['point_id'].tolist() != plain.chips['point_id'].tolist()
    one, two = (
        table.chips.set_index('point_id')['chip_id'].sort_index()
        for table in (plain, chips)
    )
    assert one.equals(two)

    def length(table: ChipDataset) -> float:
        xy = table.chips[['minx', 'miny']].to_numpy()
        return float(np.hypot(*np.diff(xy, axis=0).T).sum())

    assert length(chips) < length(plain) / 2


def test_chips_that_overlap_and_few_or_none() -> None:
    dataset = Areas([shapely.box(0, 0, 6400, 6400)])
    dense = GridSampler(dataset, 64, 16)
    assert len(ChipDataset([(dataset, dense)], order='hilbert')) == len(dense)
    assert len(ordered(Areas([shapely.Point(5, 5)]))) == 1
    assert len(ChipDataset([], order='hilbert')) == 0
    assert len(ChipDataset([(dataset, [])], order='hilbert')) == 0


def test_unknown_order() -> None:
    with pytest.raises(SpecError, match="order='morton'"):
        ChipDataset([], order='morton')  # type: ignore[arg-type]
