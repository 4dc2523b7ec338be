import re

import pandas as pd
import pytest
import shapely

from dynamicvis_geo.datasets import ChipDataset
from dynamicvis_geo.samplers import GridSampler

from .rasters import Areas

SINUSOIDAL = '+proj=sinu +lon_0=0 +R=6371007.181 +units=m'


def names(dataset: Areas, size: int | tuple[int, int] = 10) -> list[str]:
    chips = ChipDataset([(dataset, GridSampler(dataset, size))])
    ids: list[str] = chips.chips['chip_id'].tolist()
    return ids


@pytest.mark.parametrize(
    ('times', 'window'),
    [
        (('2022-06-01', '2022-09-01'), '20220601-20220901T000000'),
        (('2016-01-12', '2016-01-12 23:59:59.999999'), '20160112'),
        (('2016-01-12', '2016-01-12'), '20160112-20160112T000000'),
        (('2016-01-12 15:50:22', '2016-01-13'), '20160112T155022-20160113T000000'),
        (
            ('2016-01-01', '2016-12-31 23:59:59.999999'),
            '20160101-20170101',
        ),
        ((str(pd.Timestamp.min), '2016-12-31'), 'open-20161231T000000'),
    ],
)
def test_time_windows(times: tuple[str, str], window: str) -> None:
    (name,) = names(Areas([shapely.box(0, 0, 100, 100)], [times]))
    assert name == f'EPSG32618_x0_y100_10x10px_10m_{window}'


def test_degrees_have_the_digits_they_need() -> None:
    dataset = Areas(
        [shapely.box(-71.3, 44.5, -71.2, 44.6)], crs='EPSG:4326', res=1 / 3600
    )
    ids = names(dataset, (7, 9))
    assert len(set(ids)) == len(ids) > 1000
    assert ids[0].startswith('EPSG4326_x-71.3')
    assert '_9x7px_0.000277777778deg_' in ids[0]


def test_a_crs_without_a_code_has_a_stable_short_name() -> None:
    box = shapely.box(0, 0, 1e5, 1e5)
    (name,) = names(Areas([box], crs=SINUSOIDAL, res=1e4))
    assert re.fullmatch(r'CRS[0-9a-f]{10}_x0_y100000_10x10px_10000m_\S+', name)
    other = '+proj=sinu +lon_0=10 +R=6371007.181 +units=m'
    assert names(Areas([box], crs=other, res=1e4)) != [name]
    assert names(Areas([box], crs=SINUSOIDAL, res=1e4)) == [name]


def test_names_can_be_files() -> None:
    for crs, res in (
        ('EPSG:4326', 0.001),
        ('ESRI:102001', 12.5),
        (SINUSOIDAL, 463.3127),
    ):
        dataset = Areas([shapely.box(-1.5, -2.5, 0.1, 0.2)], crs=crs, res=res)
        for name in names(dataset, 512):
            assert re.fullmatch(r'[A-Za-z0-9._-]{1,120}', name)
