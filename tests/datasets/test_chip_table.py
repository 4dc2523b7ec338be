from typing import Any

import geopandas as gpd
import numpy as np
import pyarrow as pa
import pytest
import shapely

from dynamicvis_geo.datasets import ChipDataset
from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.samplers import GridSampler, PointSampler

from .rasters import UTM, Areas


@pytest.fixture
def chips() -> ChipDataset:
    dataset = Areas([shapely.box(0, 0, 1280 * 4, 1280 * 3)])
    return ChipDataset([(dataset, GridSampler(dataset, 128))])


@pytest.mark.parametrize('kind', [list, set, iter, pa.array, pa.chunked_array])
def test_chips_are_found_by_their_ids(chips: ChipDataset, kind: Any) -> None:
    ids = chips.chips['chip_id'].tolist()
    names = [*ids[2:5], 'EPSG32618_of_another_run']
    found = chips.among(kind([names] if kind is pa.chunked_array else names))
    assert (found.dtype, found.shape) == (np.bool_, (12,))
    assert np.flatnonzero(found).tolist() == [2, 3, 4]
    assert chips.among([]).tolist() == [False] * 12


def test_points_that_share_a_chip_are_told_apart_by_their_keys() -> None:
    dataset = Areas([shapely.box(0, 0, 1000, 1000)])
    points = gpd.GeoSeries.from_xy(
        [105, 105, 905], [500] * 3, index=['a', 'b', 'c'], crs=UTM
    )
    chips = ChipDataset([(dataset, PointSampler(dataset, points, 10))])
    one, two, three = chips.chips['chip_id']
    assert one == two
    assert chips.among([f'{one}@b']).tolist() == [False, True, False]
    assert chips.among([one]).tolist() == [True, True, False]
    assert chips.among([f'{three}@a', f'{three}@c']).tolist() == [False, False, True]


@pytest.mark.parametrize('wrong', ['one-id', [1, 2], 5])
def test_what_are_no_ids(chips: ChipDataset, wrong: Any) -> None:
    with pytest.raises(SpecError, match='keys'):
        chips.among(wrong)


def test_more_ids_than_are_compared_at_a_time(
    chips: ChipDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr('dynamicvis_geo.datasets.chip_table.COMPARED', 5)
    ids = chips.chips['chip_id'].tolist()
    found = chips.among([f'x{i}' for i in range(7)] + ids[3:11])
    assert np.flatnonzero(~found).tolist() == [0, 1, 2, 11]
