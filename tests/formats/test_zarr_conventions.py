"""Conventions of groups, against what others make of them."""

import json
from pathlib import Path
from typing import Any

import pytest

from dynamicvis_geo.datasets.chips import ChipDataset
from dynamicvis_geo.provenance import read_provenance
from dynamicvis_geo.samplers import GridSampler
from tests.formats.conftest import DatedImages
from tests.formats.mosaics import PROVENANCE, D, drive, open_group, scene

zarr = pytest.importorskip('zarr')
zarr_cm = pytest.importorskip('zarr_cm')
pytest.importorskip('rioxarray')

PLACES = {'EPSG:32618': (499200.0, 4500480.0), 'EPSG:32719': (3.2e5, 8e6)}
SAMPLER = {'name': 'GridSampler', 'size': [32, 32], 'stride': [16, 16]}
FETCHED = {
    'dataset': 'EarthEngineDataset',
    'crs': 'EPSG:32618',
    'res': [10.0, 10.0],
    'sensor': {'collection': 'COPERNICUS/S2_SR_HARMONIZED'},
    'sampler': SAMPLER,
}
WEIGHTS = {'arch': 'b', 'repository': 'a/b', 'revision': 'c0ffee', 'file': 'd.pth'}


def chips_in(folder: Path, places: dict[str, tuple[float, float]]) -> ChipDataset:
    pairs = []
    for i, (crs, corner) in enumerate(places.items()):
        scene(folder / str(i), crs=crs, corner=corner, shape=(64, 96))
        dataset = DatedImages(folder / str(i))
        pairs.append((dataset, GridSampler(dataset, 32, 16)))
    return ChipDataset(pairs)


def attributes(target: Path, group: str = '') -> dict[str, Any]:
    return dict(zarr.open_group(target, path=group, mode='r').attrs)


@pytest.mark.parametrize('places', [1, 2])
def test_the_toolkit_finds_and_accepts_them(tmp_path: Path, places: int) -> None:
    toolkit = pytest.importorskip('geozarr_toolkit')
    chips = chips_in(tmp_path, dict(list(PLACES.items())[:places]))
    for fails in (range(0, len(chips), 2), ()):
        # Once when it is made, and once when it is filled further.
        target = drive(tmp_path / 'out.zarr', chips, fails=fails)
        root = zarr.open_group(target, mode='r')
        groups = [root, *(group for _, group in root.groups())]
        assert len(groups) == places + 1
        for group in groups:
            assert toolkit.detect_conventions(dict(group.attrs)) == ['spatial', 'proj']
            found = toolkit.validate_group(group)
            assert found == {'spatial': [], 'proj': [], 'zarr_conventions': []}


@pytest.mark.parametrize('crs', PLACES)
def test_they_say_where_the_array_lies(tmp_path: Path, crs: str) -> None:
    target = drive(tmp_path / 'out.zarr', chips_in(tmp_path, {crs: PLACES[crs]}))
    name = crs.replace(':', '_')
    ds = open_group(target, name)
    group = json.loads((target / name / 'zarr.json').read_text())
    for convention in (zarr_cm.proj, zarr_cm.spatial):
        convention.validate_group_metadata(group)
    told = group['attributes']
    assert told['proj:code'] == crs
    assert tuple(told['spatial:dimensions']) == ds['embeddings'].dims[2:]
    assert tuple(told['spatial:transform']) == tuple(ds.rio.transform())[:6]
    assert tuple(told['spatial:shape']) == ds['embeddings'].shape[2:]
    assert tuple(told['spatial:bbox']) == ds.rio.bounds()
    assert told['spatial:registration'] == 'pixel'


def test_the_store_says_where_all_of_it_lies(tmp_path: Path) -> None:
    chips = chips_in(tmp_path, PLACES)
    told = attributes(drive(tmp_path / 'out.zarr', chips))
    assert told['proj:code'] == 'EPSG:4326'
    assert told['spatial:bbox'] == pytest.approx(chips.chips.total_bounds)
    empty = attributes(drive(tmp_path / 'empty.zarr', ChipDataset([])))
    assert empty == {}


def test_they_say_what_the_embeddings_are(tmp_path: Path) -> None:
    made = {
        **PROVENANCE,
        'model': {'backbone': WEIGHTS},
        'source': {'chips': 15, 'sources': [FETCHED]},
    }
    chips = chips_in(tmp_path, {'EPSG:32618': PLACES['EPSG:32618']})
    target = drive(tmp_path / 'out.zarr', chips, dtype='float16', provenance=made)
    for group in ('', 'EPSG_32618'):
        told = attributes(target, group)
        uuids = [convention['uuid'] for convention in told['zarr_conventions']]
        assert '61c12cc5-0e28-4056-999a-480cf3fb7e4c' in uuids
        assert {k: v for k, v in told.items() if k.startswith('geoemb:')} == {
            'geoemb:type': 'pixel',
            'geoemb:dimensions': D,
            'geoemb:model': 'https://huggingface.co/a/b/resolve/c0ffee/d.pth',
            'geoemb:source_data': [
                'https://storage.googleapis.com/earthengine-stac/catalog/COPERNICUS/'
                'COPERNICUS_S2_SR_HARMONIZED.json'
            ],
            'geoemb:data_type': 'float16',
            'geoemb:gsd': 80.0,
            'geoemb:chip_layout': {
                'layout_type': 'regular_grid',
                'chip_size': [32, 32],
                'stride': [16, 16],
            },
            'geoemb:build_version': '0.1.0',
        }


def test_images_and_models_without_an_address(tmp_path: Path) -> None:
    chips = chips_in(tmp_path, {'EPSG:32618': PLACES['EPSG:32618']})
    target = drive(tmp_path / 'out.zarr', chips)
    told = attributes(target, 'EPSG_32618')
    assert told['geoemb:model'] == 'file:metadata.json'
    assert told['geoemb:source_data'] == ['file:metadata.json']
    assert read_provenance(target / 'metadata.json')['source'] == PROVENANCE['source']


def test_conventions_that_others_have_added_stay(tmp_path: Path) -> None:
    chips = chips_in(tmp_path, {'EPSG:32618': PLACES['EPSG:32618']})
    target = drive(tmp_path / 'out.zarr', chips, fails=[3])
    licence = zarr_cm.license.create(spdx='CC-BY-4.0')
    for group in ('', 'EPSG_32618'):
        opened = zarr.open_group(target, path=group, mode='r+', use_consolidated=False)
        opened.attrs.put(zarr_cm.insert_many(dict(opened.attrs), {'license': licence}))
    drive(target, chips)
    for group in ('', 'EPSG_32618'):
        told = attributes(target, group)
        assert len(told['zarr_conventions']) == 4
        assert set(zarr_cm.detect_revisions(told)) == {'proj', 'spatial', 'license'}
