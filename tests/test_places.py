import json
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pytest
import rioxarray  # noqa: F401 - gives arrays their .rio
import torch
from torchgeo.datasets import RasterDataset

from dynamicvis_geo import (
    BBox,
    EarthEngineDataset,
    OutputSpec,
    PointBuffer,
    TemporalSpec,
    get_embedding,
    get_embeddings_batch,
    open_scenes,
)
from dynamicvis_geo.errors import SpecError
from tests.datasets.rasters import pattern, write_geotiff
from tests.places import (
    DATES,
    PLOT,
    RANDOM,
    SENSOR,
    TEMPORAL,
    Native,
    Thumbnail,
    earth,
    normalised,
    pixels_of,
    quick,
)

__all__ = ('earth', 'quick')

pytestmark = pytest.mark.usefixtures('quick')


# Datasets.


def test_local_images_are_read_on_their_own_pixels(tmp_path: Path) -> None:
    pixels = pattern(200, 220)
    # Pixels that do not begin at whole pixels from the origin of the CRS.
    write_geotiff(tmp_path / 'a_20220601_.tif', pixels, west=400_003, north=4_300_004)
    [scenes] = open_scenes(tmp_path)
    centre = gpd.GeoSeries.from_xy([401_003], [4_299_004], crs=scenes.crs).to_crs(4326)
    place = PointBuffer(centre.x[0], centre.y[0], 320)
    result = get_embedding(
        spatial=place, backend=scenes, output=OutputSpec.grid(), backbone=Native()
    )
    image = pixels[:, 100 - 32 : 100 + 32, 100 - 32 : 100 + 32]
    np.testing.assert_allclose(result.data, normalised(image), atol=1e-5)
    meta = result.meta
    assert meta['bounds'] == [400_683, 4_298_684, 401_323, 4_299_324]
    assert (meta['backend'], meta['sensor']) == (type(scenes).__name__, None)
    assert (meta['start'], meta['end']) == ('2022-06-01', '2022-06-02')
    assert meta['valid_fraction'] == 1

    west, south, east, north = (
        gpd.GeoSeries.from_xy(
            [400_503, 400_903], [4_299_004, 4_299_504], crs=scenes.crs
        )
        .to_crs(4326)
        .total_bounds
    )
    result = get_embedding(
        spatial=BBox(west, south, east, north),
        backend=scenes,
        output=OutputSpec.grid(),
        backbone=Native(),
    )
    minx, miny, maxx, maxy = result.meta['bounds']
    assert minx <= 400_503
    assert maxx >= 400_903
    rows = slice(round((4_300_004 - maxy) / 10), round((4_300_004 - miny) / 10))
    cols = slice(round((minx - 400_003) / 10), round((maxx - 400_003) / 10))
    image = pixels[:, rows, cols]
    np.testing.assert_allclose(result.data, normalised(image), atol=1e-5)


@pytest.mark.parametrize('crs', ['EPSG:3857', 'EPSG:4326', 'EPSG:32633'])
def test_metres_are_those_of_the_ground_in_any_crs(tmp_path: Path, crs: str) -> None:
    res = 0.0001 if crs == 'EPSG:4326' else 10
    x, y = gpd.GeoSeries.from_xy([14.0], [60.0], crs=4326).to_crs(crs)[0].coords[0]
    write_geotiff(
        tmp_path / 'image.tif',
        pattern(300, 300),
        west=x - 150 * res,
        north=y + 150 * res,
        res=res,
        crs=crs,
    )
    [scenes] = open_scenes(tmp_path / 'image.tif')
    place = PointBuffer(14.0, 60.0, 300)
    meta = get_embedding(spatial=place, backend=scenes, backbone=Native()).meta
    # Of 10 m, a degree of 111.32 km, and the half of both eastwards at this latitude.
    wide, high = {
        'EPSG:3857': (120, 120),
        'EPSG:4326': (107, 54),
        'EPSG:32633': (60, 60),
    }[crs]
    _, height, width = meta['image_shape']
    assert abs(width - wide) <= 1
    assert abs(height - high) <= 1
    assert meta['start'] is meta['end'] is meta['input_time'] is None


def test_dates_choose_the_image_of_a_dataset(tmp_path: Path) -> None:
    june, july = pattern(80, 80, seed=1), pattern(80, 80, seed=2)
    write_geotiff(tmp_path / 'a_20220601_.tif', june)
    write_geotiff(tmp_path / 'a_20220701_.tif', july)
    [scenes] = open_scenes(tmp_path)
    where = gpd.GeoSeries.from_xy([400_400], [4_299_600], crs=scenes.crs).to_crs(4326)
    place = PointBuffer(where.x[0], where.y[0], 400)

    def embed(*dates: str) -> Any:
        return get_embedding(
            spatial=place,
            temporal=TemporalSpec.range(*dates) if dates else None,
            backend=scenes,
            output=OutputSpec.grid(),
            backbone=Native(),
        ).data

    np.testing.assert_allclose(
        embed('2022-06-15', '2022-08-01'), normalised(july), atol=1e-5
    )
    with pytest.raises(SpecError, match=r'2 times.*2022-06-01, 2022-07-01.*temporal'):
        embed()
    with pytest.raises(SpecError, match=r'no data of .*2022-06-01, 2022-07-01'):
        embed('2023-01-01', '2024-01-01')


def test_any_raster_dataset_serves(tmp_path: Path) -> None:
    write_geotiff(tmp_path / 'image.tif', pattern(100, 100))
    dataset = RasterDataset(tmp_path)
    where = gpd.GeoSeries.from_xy([400_000], [4_299_500], crs=dataset.crs).to_crs(4326)
    place = PointBuffer(where.x[0], where.y[0], 200)
    results = get_embeddings_batch(
        spatials=[place, place], backend=dataset, backbone=Thumbnail()
    )
    # The western half of the chip lies beside the image.
    assert [r.meta['valid_fraction'] for r in results] == pytest.approx([0.5, 0.5])
    assert (results[0].data == results[1].data).all()
    for away in (PLOT, BBox(10, 50, 10.1, 50.1)):
        with pytest.raises(SpecError, match=r'spatials\[1\]: .* outside the data.*-76'):
            get_embeddings_batch(
                spatials=[place, away], backend=dataset, backbone=Thumbnail()
            )


def test_earth_engine_dataset_serves(earth: dict[str, Any]) -> None:
    area = BBox(10.2, 50.3, 10.4, 50.5)
    dataset = EarthEngineDataset(
        area, [DATES, ('2023-06-01', '2023-07-01')], SENSOR, client=earth['client']
    )
    result = get_embedding(
        spatial=PLOT, temporal=TEMPORAL, backend=dataset, backbone=RANDOM, device='cpu'
    )
    plain = get_embedding(spatial=PLOT, backbone=RANDOM, **earth)
    assert (result.data == plain.data).all()
    assert result.meta['backend'] == 'gee'
    for key in ('chip_id', 'sensor', 'start', 'end', 'source', 'valid_fraction'):
        assert result.meta[key] == plain.meta[key]


# Images of the user.


def test_image_of_the_user_needs_no_network(earth: dict[str, Any]) -> None:
    fetched = get_embedding(spatial=PLOT, backbone=RANDOM, **earth)
    image, _ = pixels_of(fetched.meta)
    for given in (image, image.astype('uint16'), torch.from_numpy(image)):
        result = get_embedding(input_chw=given, backbone=RANDOM, device='cpu')
        assert (result.data == fetched.data).all()
    meta = result.meta
    assert meta['source'] == meta['backend'] == 'input_chw'
    for key in ('crs', 'bounds', 'chip_id', 'start', 'sensor', 'valid_fraction'):
        assert meta[key] is None
    json.dumps(meta, allow_nan=False)


def test_image_of_the_user_is_where_it_is_said_to_be() -> None:
    image = pattern(64, 64)
    options: Any = {'output': OutputSpec.grid(), 'backbone': RANDOM, 'backend': 'auto'}
    grid = get_embedding(input_chw=image, **options).data
    assert set(grid.coords) == {'d'}
    result = get_embedding(
        input_chw=image, spatial=PLOT, temporal=TEMPORAL, sensor=SENSOR, **options
    )
    assert (result.data.values == grid.values).all()
    assert result.data.rio.crs == 'EPSG:32632'
    assert result.data.rio.bounds() == tuple(PLOT.geometry.total_bounds)
    assert result.meta['input_time'] == '2022-06-26'


@pytest.mark.parametrize(
    ('image', 'way_out'),
    [
        (np.ones((64, 64, 3)) * 500, r'\(64, 64, 3\).*np.moveaxis'),
        (np.ones((4, 64, 64)) * 500, r'\(4, 64, 64\)'),
        (np.ones((1, 3, 64, 64)) * 500, r'\(1, 3, 64, 64\)'),
        (np.ones((3, 0, 64)), r'\(3, 0, 64\)'),
        (np.ones((3, 64, 64), object), 'dtype is object'),
        (np.ones((3, 64, 64), bool), 'dtype is bool'),
        (np.ones((3, 64, 64), complex), 'dtype is complex'),
        (np.full((3, 64, 64), 500, np.float16), '16 bits'),
        (torch.full((3, 64, 64), 500, dtype=torch.bfloat16), '16 bits'),
        (np.full((3, 64, 64), np.nan), 'NaN.*nan_to_num'),
        (torch.full((3, 64, 64), torch.inf), 'infinity.*nan_to_num'),
        (np.full((3, 64, 64), -1), 'from -1 to -1.*clip'),
        (np.full((3, 64, 64), 10001), r'to 10001.*clip\(0, 10000\)'),
        (np.full((3, 64, 64), 0.3), r'0\.3.*10000'),
        (np.ma.masked_less(pattern(64, 64), 500), 'filled'),
        ('image.tif', 'dtype'),
        ([[[1, 2], [3]]], 'no array'),
    ],
)
def test_other_images_are_refused(image: Any, way_out: str) -> None:
    with pytest.raises(SpecError, match=rf'^input_chw.*{way_out}'):
        get_embedding(input_chw=image, backbone=Native())
