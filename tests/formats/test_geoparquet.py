"""Files of the writer, over real images, read by the programs that people use."""

import json
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely

from dynamicvis_geo.callbacks import EmbeddingWriter
from dynamicvis_geo.provenance import read_provenance
from tests.callbacks.standins import Chips, Task
from tests.callbacks.test_writer import predict
from tests.formats.conftest import MakeChips, assert_valid


def write(tmp_path: Path, chips: Any, dtype: str = 'float32') -> Path:
    path = tmp_path / 'out.parquet'
    writer = EmbeddingWriter(path, dtype=dtype)
    predict(writer, chips, Task(dimensions=7))
    return path


def test_geopandas_reads_chips_in_place(tmp_path: Path, make_chips: MakeChips) -> None:
    chips = make_chips()
    frame = gpd.read_parquet(write(tmp_path, chips))
    # Rows come in an order of their own.
    row_of = {name: row for row, name in enumerate(chips.chips['chip_id'])}
    rows = [row_of[name] for name in frame['id']]
    assert sorted(rows) == list(range(len(chips)))
    table = chips.rows(rows)
    assert frame.crs == 'EPSG:4326'
    assert frame.geometry.geom_equals(table.geometry.reset_index(drop=True)).all()
    names = ['crs', 'minx', 'miny', 'maxx', 'maxy', 'width', 'height']
    names += ['centre_lon', 'centre_lat']
    pd.testing.assert_frame_equal(
        frame[names], pd.DataFrame(table[names]).reset_index(drop=True),
        check_dtype=False, check_index_type=False,
    )  # fmt: skip
    assert (frame['start'] == pd.Timestamp('2024-06-01', tz='UTC')).all()
    assert (frame['end'] == pd.Timestamp('2024-06-02', tz='UTC')).all()
    assert (frame['datetime'] == frame['start']).all()
    assert (frame['timestamp'] == frame['start']).all()
    assert (frame['valid_fraction'] == 0.5).all()
    for i, row in enumerate(rows):
        mean = chips[row]['image'].mean().item()
        np.testing.assert_allclose(
            frame['embedding'][i], mean * np.arange(1, 8), rtol=1e-6
        )


def test_bounding_boxes_select_chips(tmp_path: Path, make_chips: MakeChips) -> None:
    path = write(tmp_path, make_chips())
    first = gpd.read_parquet(path).geometry[0].centroid
    near = gpd.read_parquet(path, bbox=(first.x, first.y, first.x, first.y))
    assert len(near) == 1


def test_metadata_follow_the_specification(
    tmp_path: Path, make_chips: MakeChips
) -> None:
    path = write(tmp_path, make_chips())
    file = pq.ParquetFile(path)
    geo = json.loads(file.metadata.metadata[b'geo'])
    column = geo['columns']['geometry']
    assert geo['version'] == '1.1.0'
    assert geo['primary_column'] == 'geometry'
    assert column['encoding'] == 'WKB'
    assert column['geometry_types'] == ['Polygon']
    assert column['crs']['id'] == {'authority': 'EPSG', 'code': 4326}
    np.testing.assert_allclose(column['bbox'], gpd.read_parquet(path).total_bounds)
    covering = column['covering']['bbox']
    table = file.read()
    for i, name in enumerate(('xmin', 'ymin', 'xmax', 'ymax')):
        assert covering[name] == ['bbox', name]
        values = table['bbox'].combine_chunks().field(name).to_numpy()
        bounds = shapely.bounds(shapely.from_wkb(table['geometry'].to_numpy()))
        np.testing.assert_array_equal(values, bounds[:, i])
    embedding = table.schema.field('embedding').type
    assert embedding == pa.list_(pa.float32(), 7)
    assert file.metadata.row_group(0).column(1).compression == 'ZSTD'


@pytest.mark.parametrize('dtype', ['float32', 'float16', 'int8'])
def test_the_validator_finds_nothing_wrong(
    tmp_path: Path, make_chips: MakeChips, dtype: str
) -> None:
    write(tmp_path, make_chips(), dtype)
    writer = EmbeddingWriter(tmp_path / 'folder', dtype=dtype, format='geoparquet')
    predict(writer, make_chips(), Task(dimensions=7))
    # Zone 1 begins at 180 degrees: its chips reach across.
    far = make_chips('EPSG:32601', west=166021.4 - 480, north=1000.0)
    predict(EmbeddingWriter(tmp_path / 'far.parquet'), far, Task(dimensions=7))
    files = sorted(tmp_path.rglob('*.parquet'))
    assert len(files) == 3
    for file in files:
        assert_valid(file)


def test_footprints_across_the_antimeridian(
    tmp_path: Path, make_chips: MakeChips
) -> None:
    # Zone 1 begins at 180 degrees: 333,978.6 m west of its central meridian here.
    chips = make_chips('EPSG:32601', west=166021.4 - 480, north=1000.0)
    path = write(tmp_path, chips)
    frame = gpd.read_parquet(path)
    assert set(frame.geom_type) == {'Polygon', 'MultiPolygon'}
    geo = json.loads(pq.read_metadata(path).metadata[b'geo'])
    assert geo['columns']['geometry']['geometry_types'] == ['MultiPolygon', 'Polygon']
    both = shapely.union_all(frame.geometry.to_numpy())
    assert both.bounds[0] == -180
    assert both.bounds[2] == 180
    # A bounding box that reaches round the Earth still finds the chip on either side.
    assert len(gpd.read_parquet(path, bbox=(179.99, -1, 180, 1))) >= 2


def test_duckdb_reads_it(tmp_path: Path, make_chips: MakeChips) -> None:
    duckdb = pytest.importorskip('duckdb')
    path = write(tmp_path, make_chips())
    query = f"""
        SELECT id, len(embedding), embedding[2], bbox.xmin, year("start"),
            geometry IS NOT NULL
        FROM read_parquet('{path}') WHERE centre_lat > 40 ORDER BY minx, miny
    """
    rows = duckdb.connect().execute(query).fetchall()
    frame = gpd.read_parquet(path).sort_values(['minx', 'miny'])
    assert [row[0] for row in rows] == frame['id'].tolist()
    assert {(row[1], row[4], row[5]) for row in rows} == {(7, 2024, True)}
    assert [row[2] for row in rows] == [row[1] for row in frame['embedding']]
    assert [row[3] for row in rows] == frame.bounds['minx'].tolist()


@pytest.mark.parametrize(
    'name', ['ClayEmbeddings', 'MajorTOMEmbeddings', 'EarthEmbeddings']
)
@pytest.mark.parametrize(
    ('dated', 'dtype'), [(True, 'float32'), (False, 'float32'), (True, 'float16')]
)
def test_embedding_datasets_of_torchgeo(
    tmp_path: Path, make_chips: MakeChips, name: str, dated: bool, dtype: str
) -> None:
    import torchgeo.datasets

    if not hasattr(torchgeo.datasets, name):
        pytest.skip(f'this TorchGeo has no {name}')
    path = write(tmp_path, make_chips(dated=dated), dtype)
    dataset = getattr(torchgeo.datasets, name)(path)
    assert len(dataset) == 6
    centre = gpd.read_parquet(path).iloc[4]
    sample = dataset[4]
    assert sample['embedding'].shape == (7,)
    assert sample['embedding'].dtype.is_floating_point
    assert sample['x'].item() == pytest.approx(centre['centre_lon'], abs=1e-4)
    assert sample['y'].item() == pytest.approx(centre['centre_lat'], abs=1e-4)
    if dated:
        assert sample['t'].item() == pd.Timestamp('2024-06-01').timestamp()
    dataset.plot(sample)


def test_chips_without_dates(tmp_path: Path, make_chips: MakeChips) -> None:
    frame = gpd.read_parquet(write(tmp_path, make_chips(dated=False)))
    assert frame['start'].isna().all()
    assert frame['end'].isna().all()
    assert (frame['datetime'].dt.year == 1677).all()


def test_points_keep_their_names(tmp_path: Path) -> None:
    frame = gpd.read_parquet(write(tmp_path, Chips(3, points=True)))
    assert frame['point_id'].sort_values().tolist() == ['plot 0', 'plot 1', 'plot 2']


def test_provenance_is_in_the_file(tmp_path: Path, make_chips: MakeChips) -> None:
    chips = make_chips()
    provenance = read_provenance(write(tmp_path, chips))
    assert provenance['model'] == {'backbone': 'stand-in', 'weights': 'random'}
    assert provenance['source']['chips'] == 6
    assert provenance['emb:type'] == 'chip'
    assert provenance['emb:dimensions'] == 7
    assert provenance['data_type'] == 'float32'
