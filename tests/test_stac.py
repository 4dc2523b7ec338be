"""The STAC catalogue beside an output, and the terms in its files."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import geopandas as gpd
import numpy as np
import pyarrow.parquet as pq
import pytest
import shapely
from pyproj import CRS
from torchgeo.datasets import RasterDataset

from dynamicvis_geo import GridSampler
from dynamicvis_geo.callbacks import EmbeddingWriter
from dynamicvis_geo.callbacks.output import merge
from dynamicvis_geo.datasets import ChipDataset
from dynamicvis_geo.errors import OutputError, SourceError
from dynamicvis_geo.formats import FORMATS
from dynamicvis_geo.outputs import open_output
from dynamicvis_geo.stac import write_stac
from dynamicvis_geo.stac.catalogue import lonlat_bbox
from dynamicvis_geo.stac.model import model_item
from dynamicvis_geo.terms import collection_url, emb_json, embedding_terms
from tests.callbacks.standins import Chips, Task
from tests.callbacks.test_resume import fail
from tests.callbacks.test_writer import predict
from tests.formats.mosaics import scene
from tests.formats.test_own import NPY
from tests.outputs import PROVENANCE, write_grid, write_pooled

pystac = pytest.importorskip('pystac')
SCHEMAS = Path(__file__).parent / 'data' / 'stac' / 'schemas.json'
Json = dict[str, Any]


class Scene(RasterDataset):
    filename_glob = '*.tif'
    filename_regex = r'.*_(?P<date>\d{8})'


@pytest.fixture(autouse=True)
def offline() -> Iterator[None]:
    """Have PySTAC validate by the schemas that lie here."""
    from pystac.validation import set_validator
    from pystac.validation.stac_validator import JsonSchemaSTACValidator

    validator = JsonSchemaSTACValidator()
    validator.schema_cache |= json.loads(SCHEMAS.read_text())
    set_validator(validator)
    yield
    set_validator(JsonSchemaSTACValidator())


def chips_of(folder: Path, *places: tuple[str, float, float]) -> ChipDataset:
    """Chips of 32 pixels of 10 m of a scene a place: CRS and upper left corner."""
    pairs = []
    for number, (crs, x, y) in enumerate(places):
        scene(folder / f'scene-{number}', crs=crs, corner=(x, y), shape=(64, 96))
        dataset = Scene(folder / f'scene-{number}')
        pairs.append((dataset, GridSampler(dataset, 32)))
    return ChipDataset(pairs)


ONE = ('EPSG:32618', 499200.0, 4500480.0)
NEXT = ('EPSG:32619', 300800.0, 4500480.0)


def read(path: Path) -> tuple[Json, dict[str, Json]]:
    """Read the Collection and Items of an output, and validate all there is."""
    folder = path.with_name(f'{path.name}.stac')
    collection = json.loads((folder / 'collection.json').read_text())
    pystac.validation.validate_dict(collection)
    names = [link['href'] for link in collection['links'] if link['rel'] == 'item']
    assert sorted(names) == sorted(f'./items/{n}' for n in os.listdir(folder / 'items'))
    items = {}
    for name in names:
        item = json.loads((folder / name).read_text())
        pystac.validation.validate_dict(item)
        items[item['id']] = item
    validator = pystac.validation.RegisteredValidator.get_validator()
    model = json.loads((folder / 'model.json').read_text())
    validator.validate_core(model, pystac.STACObjectType.ITEM, '1.1.0')

    # As others read it: all that is named relatively is there.
    opened = pystac.Collection.from_file(folder / 'collection.json')
    found = list(opened.get_items())
    assert {one.id for one in found} == items.keys()
    for one in [opened, *found]:
        assert one.get_root().id == collection['id']
        for asset in one.assets.values():
            assert os.path.exists(asset.get_absolute_href())
        for link in one.links:
            assert '://' in link.get_absolute_href() or os.path.exists(
                link.get_absolute_href()
            )
    assert all(one.get_parent().id == collection['id'] for one in found)
    return collection, items


@pytest.mark.parametrize(
    ('name', 'format_', 'dtype', 'embeddings'),
    [
        ('a.parquet', None, 'float32', 'a.parquet'),
        ('a.parquet', None, 'int8', 'a.parquet'),
        ('folder', 'geoparquet', 'float16', 'folder'),
        ('maps', None, 'float32', 'maps'),
        ('a.zarr', None, 'float16', 'a.zarr/EPSG_32618'),
        ('a map', None, 'float32', 'a%20map'),
    ],
)
def test_every_format_has_a_collection_and_an_item_a_zone(
    tmp_path: Path, name: str, format_: str | None, dtype: str, embeddings: str
) -> None:
    if name.endswith('.zarr'):
        pytest.importorskip('zarr')
    chips, path = chips_of(tmp_path, ONE, NEXT), tmp_path / name
    pooled = name.endswith('.parquet') or format_ == 'geoparquet'
    task = Task('pooled' if pooled else 'grid')
    writer = EmbeddingWriter(path, format_, dtype=dtype)
    predict(writer, chips, task)
    if '%' in embeddings:
        # PySTAC does not know that spaces are written so; that they are is below.
        folder = tmp_path / 'a map.stac'
        items = {
            file.stem: json.loads(file.read_text())
            for file in (folder / 'items').iterdir()
        }
    else:
        collection, items = read(path)
        assert collection['emb:type'] == ('chip' if pooled else 'pixel')
        assert (collection['emb:dimensions'], collection['data_type']) == (5, dtype)
        # A pixel; or a cell, of which a chip has 4 a side.
        assert collection['gsd'] == (10 if pooled else 80)
        assert collection['emb:chip_layout'] == {
            'layout_type': 'regular_grid',
            'chip_size': [32, 32],
            'stride': [32, 32],
        }
        boxes = collection['extent']['spatial']['bbox']
        assert boxes[1:] == [item['bbox'] for item in items.values()]
        chips_box = open_output(path).chips.total_bounds
        np.testing.assert_allclose(boxes[0], chips_box, atol=1e-4)
        (interval,) = collection['extent']['temporal']['interval']
        assert interval[0] == '2024-06-01T00:00:00Z'
        assert 'random' in collection['description']
        (software,) = collection['providers']
        assert 'dynamicvis-geo' in software['processing:software']
    assert sorted(items) == ['EPSG_32618', 'EPSG_32619']
    item = items['EPSG_32618']
    asset = item['assets']['embeddings']
    assert asset['href'] == f'../../{embeddings}'
    told = item['properties']
    assert told['proj:code'] == 'EPSG:32618'
    assert told['proj:bbox'] == [499200, 4499840, 500160, 4500480]
    assert told['start_datetime'] == '2024-06-01T00:00:00Z'
    assert told['end_datetime'] == '2024-06-01T23:59:59.999999Z'
    assert told['emb:runtime_parameters']['device'] == 'cpu'
    assert ('emb:quantization' in told) == (dtype == 'int8')


def test_the_outline_holds_the_chips_of_a_zone(tmp_path: Path) -> None:
    path = tmp_path / 'a.parquet'
    predict(EmbeddingWriter(path), chips_of(tmp_path, ONE, NEXT), Task())
    _, items = read(path)
    chips = gpd.read_parquet(path)
    for name, rows in chips.groupby('crs'):
        item = items[str(name).replace(':', '_')]
        # To a hundredth of a pixel.
        outline = shapely.geometry.shape(item['geometry']).buffer(1e-6)
        assert rows.covered_by(outline).all()


def test_the_antimeridian_is_crossed_as_geojson_has_it(tmp_path: Path) -> None:
    path = tmp_path / 'fiji.parquet'
    # 180 degrees east lie in the middle of the scene.
    chips = chips_of(tmp_path, ('EPSG:32701', 179520.0, 8149120.0))
    predict(EmbeddingWriter(path), chips, Task())
    if not gpd.read_parquet(path).geometry.geom_type.eq('MultiPolygon').any():
        pytest.fail('no chip crosses')
    collection, items = read(path)
    (item,) = items.values()
    assert item['geometry']['type'] == 'MultiPolygon'
    west, south, east, north = item['bbox']
    assert 179.98 < west < 180
    assert -180 < east < -179.98
    assert south < north
    assert collection['extent']['spatial']['bbox'] == [item['bbox']]


@pytest.mark.parametrize(
    ('boxes', 'bbox'),
    [
        ([(179, -1, 180, 1), (-180, -1, -179, 1)], [179, -1, -179, 1]),
        ([(179, 0, 180, 1), (-180, 0, -179, 1), (160, 0, 161, 1)], [160, 0, -179, 1]),
        ([(179, 0, 180, 1), (-180, 0, -179, 1), (10, 0, 11, 1)], [10, 0, -179, 1]),
        ([(10, 0, 11, 1), (-20, 0, -19, 1)], [-20, 0, 11, 1]),
        ([(170, 0, 180, 1)], [170, 0, 180, 1]),
        ([(-180, 80, 180, 90)], [-180, 80, 180, 90]),
        ([(-180, 80, 0, 90), (0, 80, 180, 90)], [-180, 80, 180, 90]),
    ],
)
def test_boxes(boxes: list[tuple[float, ...]], bbox: list[float]) -> None:
    parts = [shapely.box(*box) for box in boxes]
    assert lonlat_bbox(shapely.GeometryCollection(parts)) == bbox
    assert lonlat_bbox(shapely.MultiPolygon(parts)) == bbox


@pytest.mark.parametrize('name', ['a.parquet', 'maps'])
def test_an_extended_output_is_described_as_a_whole(tmp_path: Path, name: str) -> None:
    path, output = tmp_path / name, 'grid' if name == 'maps' else 'pooled'
    predict(EmbeddingWriter(path), chips_of(tmp_path, ONE), Task(output))
    before, _ = read(path)
    predict(EmbeddingWriter(path), chips_of(tmp_path, NEXT), Task(output))
    after, items = read(path)
    assert sorted(items) == ['EPSG_32618', 'EPSG_32619']
    assert (
        after['extent']['spatial']['bbox'][1] == before['extent']['spatial']['bbox'][0]
    )
    if name == 'maps':
        listed = gpd.read_parquet(tmp_path / 'maps.stac' / 'chips.parquet')
        names = sorted(os.path.basename(place) for place in listed['location'])
        assert names == sorted(file.name for file in path.glob('*.tif'))
        assert listed.crs == 'EPSG:4326'
        for place in listed['location']:
            assert (tmp_path / 'maps.stac' / place).is_file()

    # Without the old catalogue, the output itself is read.
    (tmp_path / f'{name}.stac' / 'collection.json').write_text('{}')
    far = ('EPSG:32620', 300800.0, 4500480.0)
    predict(EmbeddingWriter(path), chips_of(tmp_path, far), Task(output))
    again, items = read(path)
    assert len(items) == 3
    assert again['gsd'] == after['gsd']
    if name == 'maps':
        listed = gpd.read_parquet(tmp_path / 'maps.stac' / 'chips.parquet')
        assert len(listed) == 18

    predict(
        EmbeddingWriter(path, overwrite=True), chips_of(tmp_path, NEXT), Task(output)
    )
    _, items = read(path)
    assert sorted(items) == ['EPSG_32619']


def test_a_catalogue_of_something_that_is_gone_is_no_part_of_the_next(
    tmp_path: Path,
) -> None:
    path = tmp_path / 'a.parquet'
    predict(EmbeddingWriter(path), chips_of(tmp_path, ONE), Task())
    text = (tmp_path / 'a.parquet.stac' / 'items' / 'EPSG_32618.json').read_text()
    made = json.loads(text)['properties']['processing:datetime']
    old = text.replace(made, '2001-02-03T04:05:06+00:00')
    (tmp_path / 'a.parquet.stac' / 'items' / 'EPSG_32618.json').write_text(old)
    path.unlink()
    predict(EmbeddingWriter(path), chips_of(tmp_path, NEXT), Task())
    _, items = read(path)
    assert sorted(items) == ['EPSG_32619']


def test_a_part_is_described_too(tmp_path: Path) -> None:
    path, chips = tmp_path / 'a.parquet', Chips(8)
    fail(EmbeddingWriter(path, block_chips=2), chips, Task(fail_at=2))
    merge(path, partial=True)
    _, items = read(path)
    first = items['EPSG_32618']['properties']['proj:bbox']
    predict(EmbeddingWriter(path), chips, Task())
    _, items = read(path)
    whole = items['EPSG_32618']['properties']['proj:bbox']
    assert whole[2] - whole[0] == 2 * (first[2] - first[0])


def test_a_format_of_ones_own_has_one_without_a_line_of_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FORMATS, 'npy', NPY)
    path = tmp_path / 'maps.npys'
    predict(EmbeddingWriter(path), Chips(3, dated=False), Task('grid'))
    collection, items = read(path)
    assert items['EPSG_32618']['assets'].keys() == {'embeddings'}
    # STAC wants dates of everything: those of chips without any are open.
    assert collection['extent']['temporal']['interval'][0][1] is None
    monkeypatch.setattr(NPY, 'chip_file', '{id}.npy')
    predict(EmbeddingWriter(path, overwrite=True), Chips(3), Task('grid'))
    read(path)
    listed = gpd.read_parquet(tmp_path / 'maps.npys.stac' / 'chips.parquet')
    assert sorted(listed['location']) == [
        f'../maps.npys/chip-{i}.npy' for i in (0, 1, 2)
    ]


def test_without_chips_there_is_none(tmp_path: Path) -> None:
    predict(EmbeddingWriter(tmp_path / 'a.parquet'), Chips(0), Task())
    assert not (tmp_path / 'a.parquet.stac').exists()
    with pytest.raises(SourceError, match='no chips'):
        write_stac(tmp_path / 'a.parquet')


def test_what_lies_in_its_place_is_spared(tmp_path: Path) -> None:
    folder = tmp_path / 'a.parquet.stac'
    folder.mkdir()
    (folder / 'thesis.docx').write_text('mine')
    for overwrite in (False, True):
        writer = EmbeddingWriter(tmp_path / 'a.parquet', overwrite=overwrite)
        with pytest.raises(OutputError, match=r'a\.parquet\.stac.*not of this package'):
            predict(writer, Chips(2))
    assert (folder / 'thesis.docx').read_text() == 'mine'


def test_an_output_outlives_a_catalogue_that_cannot_be_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / 'a.parquet'
    folder = tmp_path / 'a.parquet.stac'
    folder.mkdir()
    # Nothing can be put in the place of a folder.
    (folder / 'model.json').mkdir()
    predict(EmbeddingWriter(path), Chips(3), Task())
    assert 'STAC catalogue could not be written' in caplog.text
    assert open_output(path).total == 3
    assert not (tmp_path / 'a.parquet.partial').exists()
    (folder / 'model.json').rmdir()
    assert write_stac(path) == folder / 'collection.json'
    read(path)


@pytest.mark.parametrize('write', [write_pooled, write_grid])
def test_outputs_of_earlier_versions_get_one(tmp_path: Path, write: Any) -> None:
    path = tmp_path / ('a.parquet' if write is write_pooled else 'maps')
    made = {'emb:type': 'chip', 'emb:dimensions': 6, 'data_type': 'float32'}
    write(path, provenance=PROVENANCE | made)
    write_stac(path)
    collection, items = read(path)
    (link,) = (one for one in collection['links'] if one['rel'] == 'emb:source-data')
    assert link['href'] == collection_url('COPERNICUS/S2')
    names = [one['name'] for one in collection['providers']]
    assert names[1:] == ['Google Earth Engine', 'European Union, ESA, Copernicus']
    told = items['EPSG_32618']['properties']['emb:preprocessing']['expression']
    assert told['images']['cloudy_pct'] == 30


def test_outputs_in_stores_have_one_that_overwriting_removes(bucket: str) -> None:
    url = f'{bucket}/place/a.parquet'
    predict(EmbeddingWriter(url), Chips(4), Task())
    predict(EmbeddingWriter(url), Chips(6), Task())
    system = fsspec.filesystem('s3')
    names = [path.partition('/a.parquet.stac/')[2] for path in system.find(bucket)]
    assert sorted(filter(None, names)) == [
        'collection.json',
        'items/EPSG_32618.json',
        'model.json',
        'provenance.json',
    ]
    item = json.loads(system.cat(f'{url}.stac/items/EPSG_32618.json'))
    west, _, east, _ = item['properties']['proj:bbox']
    assert east - west == 6 * 320
    predict(EmbeddingWriter(url, overwrite=True), Chips(1), Task())
    system.invalidate_cache()
    item = json.loads(system.cat(f'{url}.stac/items/EPSG_32618.json'))
    west, _, east, _ = item['properties']['proj:bbox']
    assert east - west == 320


def test_a_crs_without_a_code_is_written_out(tmp_path: Path) -> None:
    path = tmp_path / 'a.parquet'
    crs = CRS('+proj=laea +lat_0=45 +lon_0=10 +datum=WGS84 +units=m')
    predict(EmbeddingWriter(path), chips_of(tmp_path, (crs.to_wkt(), 0.0, 0.0)), Task())
    for _ in range(2):
        _, items = read(path)
        (told,) = (item['properties'] for item in items.values())
        assert told['proj:code'] is None
        assert CRS.from_wkt(told['proj:wkt2']) == crs
        more = chips_of(tmp_path, (crs.to_wkt(), 960.0, 0.0))
        predict(EmbeddingWriter(path), more, Task())


@pytest.mark.parametrize(
    ('collection', 'url'),
    [
        (
            'COPERNICUS/S2_SR_HARMONIZED',
            'https://storage.googleapis.com/earthengine-stac/catalog/COPERNICUS/'
            'COPERNICUS_S2_SR_HARMONIZED.json',
        ),
        (
            'LANDSAT/LC08/C02/T1_L2',
            'https://storage.googleapis.com/earthengine-stac/catalog/LANDSAT/'
            'LANDSAT_LC08_C02_T1_L2.json',
        ),
        (
            'projects/mine/assets/images',
            'https://code.earthengine.google.com/?asset=projects/mine/assets/images',
        ),
    ],
)
def test_collections_are_linked_where_they_are_described(
    collection: str, url: str
) -> None:
    assert collection_url(collection) == url


HUB = {
    'weights': 'pretrained',
    'repository': 'KyanChen/DynamicVis',
    'file': 'pretrain/b.pth',
    'revision': 'abc123',
    'sha256': 'c0ffee',
    'arch': 'b',
    'settings': {'arch': 'b', 'strides': [4, 2, 2, 2]},
    'parameters': {'count': 35197248},
}


def test_the_model_is_told_as_the_extension_for_models_has_it() -> None:
    from pystac.extensions.mlm import MLMExtension

    def read_model(made: Json) -> Any:
        return MLMExtension.ext(pystac.Item.from_dict(model_item(made)))

    preprocessing = {
        'input_range': [0.0, 3000.0],
        'resize': [512, 512],
        'mean': [0.485, 0.456, 0.406],
        'std': [0.229, 0.224, 0.225],
    }
    model = {'backbone': HUB, 'preprocessing': preprocessing, 'pooling': 'featmap_mean'}
    terms = {'emb:type': 'chip', 'emb:dimensions': 768}
    made = PROVENANCE | terms | {'model': model}
    told = read_model(made)
    assert (told.mlm_name, told.architecture) == ('DynamicVis-B', 'DynamicVis')
    assert (told.pretrained, told.total_parameters) == (True, 35197248)
    assert told.input[0].input.shape == [-1, 3, 512, 512]
    assert told.output[0].result.shape == [-1, 768]
    assert told.hyperparameters.to_dict()['strides'] == [4, 2, 2, 2]
    asset = model_item(made)['assets']['model']
    assert asset['href'] == (
        'https://huggingface.co/KyanChen/DynamicVis/resolve/abc123/pretrain/b.pth'
    )
    assert {'mlm:model', 'mlm:weights'} <= set(asset['roles'])

    random = {'backbone': {'weights': 'random', 'seed': 0, 'arch': 'l'}}
    told = read_model(terms | {'model': random})
    assert told.mlm_name == 'DynamicVis-L-with-random-weights'
    assert (told.pretrained, told.pretrained_source) == (False, None)
    asset = model_item(terms | {'model': random})['assets']['model']
    assert 'random weights' in asset['title']
    own = {'backbone': {'implementation': 'a.b.ResNet', 'parameters': 7}}
    told = read_model(terms | {'model': own})
    assert (told.mlm_name, told.total_parameters) == ('ResNet', 7)


def test_the_footer_says_the_same(tmp_path: Path) -> None:
    path = tmp_path / 'a.parquet'
    predict(EmbeddingWriter(path, dtype='int8'), chips_of(tmp_path, ONE), Task())
    collection, items = read(path)
    emb = json.loads(pq.read_metadata(path).metadata[b'emb'])
    for name in ('emb:type', 'emb:dimensions', 'data_type', 'gsd', 'emb:chip_layout'):
        assert emb[name] == collection[name]
    told = items['EPSG_32618']['properties']
    names = [name for name in told if name.startswith(('emb:', 'processing:'))]
    assert {'emb:quantization', 'processing:datetime'} <= set(names)
    assert {name: emb[name] for name in names} == {name: told[name] for name in names}


def test_the_footer_links_to_what_has_an_address() -> None:
    links = json.loads(emb_json(PROVENANCE | {'model': {'backbone': HUB}}))['links']
    assert [link['rel'] for link in links] == ['emb:model', 'emb:source-data']
    assert json.loads(emb_json({'model': 'mine', 'source': []}))['links'] == []


def test_layouts_that_are_no_grid() -> None:
    def layout(*samplers: Json, kind: str = 'chip') -> Any:
        sources = [{'sampler': one} for one in samplers]
        made = {'emb:type': kind, 'source': {'sources': sources}}
        return embedding_terms(made).get('emb:chip_layout')

    points = {'name': 'PointSampler', 'size': [64, 64], 'points': 3}
    assert layout(points) == {'layout_type': 'variable_grid', 'chip_size': [64, 64]}
    other = {'name': 'PointSampler', 'size': [32, 32]}
    assert layout(points, other) == {'layout_type': 'variable_grid'}
    assert layout({'name': 'Mine'}) == {'layout_type': 'variable_grid'}
    assert layout({'name': 'Mine'}, kind='pixel') is None


def test_pixels_are_measured_in_metres() -> None:
    def gsd(crs: str, res: float) -> float:
        source = {'crs': crs, 'res': [res, res]}
        return float(embedding_terms({'source': {'sources': [source]}})['gsd'])

    assert gsd('EPSG:32618', 10) == 10
    assert gsd('EPSG:2263', 1) == pytest.approx(0.3048, rel=1e-5)  # feet
    assert gsd('EPSG:4326', 1 / 3600) == pytest.approx(30.9, abs=0.1)
