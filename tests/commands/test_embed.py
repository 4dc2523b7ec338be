import re
from collections.abc import Callable
from pathlib import Path

import geopandas as gpd
import numpy as np
import pytest
import rasterio
import torch
import xarray
from geopandas.testing import assert_geodataframe_equal
from rasterio.windows import from_bounds

from dynamicvis_geo import BackboneConfig, FeatureExtraction, read_provenance
from dynamicvis_geo.errors import SourceError
from dynamicvis_geo.outputs import open_output
from tests.stores import Upload

from .conftest import MakeScene

RunCli = Callable[..., tuple[int, str, str]]


def embed(run_cli: RunCli, *arguments: str | Path) -> tuple[int, str, str]:
    return run_cli('embed', *arguments, '--weights', 'random', '--size', '64')


def test_pooled_embeddings_are_those_of_the_pixels_under_the_footprints(
    make_scene: MakeScene, run_cli: RunCli, tmp_path: Path
) -> None:
    scene, output = make_scene(), tmp_path / 'new' / 'e.parquet'
    code, out, err = embed(run_cli, scene, '--output', output)

    assert code == 0
    assert out.splitlines()[-1].startswith(f'Wrote {output}: embeddings of 6 chips in')
    assert 'untrained' in err
    table = gpd.read_parquet(output)
    assert len(table) == table['id'].nunique() == 6
    assert (table['valid_fraction'] == 1).all()
    row = table.iloc[4]
    with rasterio.open(scene) as file:
        window = from_bounds(
            row['minx'], row['miny'], row['maxx'], row['maxy'], file.transform
        )
        pixels = torch.from_numpy(file.read(window=window).astype(np.float32))
    config = BackboneConfig(weights='random', img_size=64)
    with pytest.warns(UserWarning, match='untrained'):
        expected = FeatureExtraction(config)(pixels[None])[0]
    got = torch.tensor(np.array(row['embedding']))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_grid_lies_on_the_chips(
    make_scene: MakeScene, run_cli: RunCli, tmp_path: Path
) -> None:
    output = tmp_path / 'maps'
    code, out, _ = embed(run_cli, make_scene(), '--output', output, '--grid')
    assert code == 0
    assert 'feature maps of 6 chips' in out
    files = sorted(output.glob('*.tif'))
    assert len(files) == 6
    with rasterio.open(files[0]) as file:
        assert (file.count, file.height, file.width) == (768, 2, 2)
        assert file.res == (320, 320)
        assert file.crs.to_epsg() == 32633
    assert read_provenance(files[0])['model']['output'] == 'grid'


def test_maps_of_an_earlier_stage_have_finer_cells(
    make_scene: MakeScene, run_cli: RunCli, tmp_path: Path
) -> None:
    scene, output = make_scene(shape=(3, 64, 128)), tmp_path / 'maps'
    grid = ('--grid', '--output', output)
    code, _, err = embed(run_cli, scene, *grid, '--stage', '1')
    assert code == 0, err
    config = BackboneConfig(weights='random', img_size=64)
    with pytest.warns(UserWarning, match='untrained'):
        task = FeatureExtraction(config, 'grid', stage=1)
    first = sorted(output.glob('*.tif'))[0]
    with rasterio.open(first) as file, rasterio.open(scene) as image:
        assert (file.count, file.height, file.width) == (192, 8, 8)
        assert file.res == (80, 80)
        window = from_bounds(*file.bounds, image.transform)
        pixels = torch.from_numpy(image.read(window=window).astype(np.float32))
        got = torch.from_numpy(file.read())
    torch.testing.assert_close(got, task(pixels[None])[0], atol=1e-4, rtol=1e-4)
    made = read_provenance(first)['model']
    assert made['stage'] == 1
    assert made['backbone']['settings']['out_indices'] == [1]
    code, _, err = embed(run_cli, scene, *grid)
    assert code == 2
    assert re.search(r'\n  model\.stage +1 +3\n', err)
    code, _, err = embed(run_cli, scene, *grid, '--stage', '4')
    assert code == 2
    assert '--stage' in err


def test_mosaic_of_finer_cells_where_chips_overlap(
    make_scene: MakeScene, run_cli: RunCli, tmp_path: Path
) -> None:
    scene = make_scene(shape=(3, 64, 96))
    options = ('--grid', '--stage', '0', '--stride', '32')
    mosaic, maps = tmp_path / 'm.zarr', tmp_path / 'maps'
    for output, more in ((mosaic, ('--dtype', 'float16')), (maps, ())):
        code, _, err = embed(run_cli, scene, '--output', output, *options, *more)
        assert code == 0, err
    with xarray.open_zarr(mosaic, group='EPSG_32633') as opened:
        array = opened['embeddings'].load().isel(time=0)
    assert array.sizes['embedding'] == 96
    assert set(np.diff(array['x'])) == {40}
    assert array.notnull().all()
    # The middle of a chip is its own.
    for path in maps.glob('*.tif'):
        with rasterio.open(path) as file:
            bounds, features = file.bounds, file.read()
        x, y = (bounds.left + bounds.right) / 2, (bounds.top + bounds.bottom) / 2
        cells = array.sel(x=slice(x - 80, x + 80), y=slice(y + 80, y - 80))
        middle = features[:, 6:10, 6:10]
        np.testing.assert_allclose(cells, middle, rtol=1e-3, atol=1e-3)


def test_size_of_the_images_is_an_option_before_the_variable(
    make_scene: MakeScene, run_cli: RunCli, tmp_path: Path
) -> None:
    scene, output = make_scene(), tmp_path / 'maps'
    small = (scene, '--output', output, '--grid', '--img-size', '32')
    assert embed(run_cli, *small)[0] == 0
    first = sorted(output.glob('*.tif'))[0]
    with rasterio.open(first) as file:
        assert (file.count, file.height, file.width) == (768, 1, 1)
    made = read_provenance(first)['model']
    assert made['backbone']['settings']['img_size'] == [32, 32]
    assert made['preprocessing']['resize'] == [32, 32]
    code, _, err = embed(run_cli, *small[:-2])
    assert code == 2
    assert re.search(r'img_size +\[32, 32\] +\[64, 64\]\n', err)
    for size in ('15', '16385', '512,512', 'large'):
        code, _, err = embed(run_cli, scene, '--output', output, '--img-size', size)
        assert (code, err.count('\n')) == (2, 1)
        assert f"--img-size: '{size}' must be a number of pixels, 16 to 16384" in err


def test_vectors_of_an_earlier_stage(
    make_scene: MakeScene, run_cli: RunCli, tmp_path: Path
) -> None:
    output = tmp_path / 'e.parquet'
    options = ('--stage', '0', '--pooling', 'max', '--dtype', 'int8')
    code, _, err = embed(run_cli, make_scene(), '--output', output, *options)
    assert code == 0, err
    assert open_output(output).embeddings().shape == (6, 96)
    made = read_provenance(output)
    assert made['emb:dimensions'] == 96
    assert (made['model']['stage'], made['model']['pooling']) == (0, 'featmap_max')


def test_points_in_two_zones_each_have_their_chip(
    make_scene: MakeScene, run_cli: RunCli, tmp_path: Path
) -> None:
    folder = make_scene('scenes/a.tif').parent
    make_scene('scenes/b.tif', crs='EPSG:32632')
    lonlat = gpd.GeoSeries.from_xy([640 * 601.5] * 2, [640 * 7998.8] * 2)
    points = [lonlat.iloc[:1].set_crs(c).to_crs(4326).iloc[0] for c in (32633, 32632)]
    csv = tmp_path / 'plots.csv'
    csv.write_text(
        'id,lon,lat\n' + ''.join(f'p{i},{p.x},{p.y}\n' for i, p in enumerate(points))
    )
    output = tmp_path / 'plots.parquet'
    code, _, err = embed(run_cli, folder, '--points', csv, '--output', output)
    assert code == 0, err
    table = gpd.read_parquet(output).set_index('point_id')
    assert table['crs'].to_dict() == {'p0': 'EPSG:32633', 'p1': 'EPSG:32632'}
    for name, point in zip(('p0', 'p1'), points, strict=True):
        assert table.geometry[name].contains(point)


def test_chips_larger_than_the_image_are_padded_with_a_warning(
    make_scene: MakeScene, run_cli: RunCli, tmp_path: Path
) -> None:
    scene = make_scene(shape=(3, 32, 16))
    output = tmp_path / 'e.parquet'
    code, _, err = embed(run_cli, scene, '--output', output)
    assert code == 0
    assert 'larger than the image of 16 x 32 pixels' in err
    assert '0.125 of one is valid' in err
    assert gpd.read_parquet(output)['valid_fraction'].tolist() == [0.125]


def test_byte_images_are_questioned(
    make_scene: MakeScene, run_cli: RunCli, tmp_path: Path
) -> None:
    scene = make_scene(dtype='uint8', shape=(3, 64, 64))
    output = tmp_path / 'e.parquet'
    _, _, err = embed(run_cli, scene, '--output', output)
    assert '--input-range 0,255' in err
    _, _, err = embed(
        run_cli, scene, '--output', output, '--input-range', '0,255', '--overwrite'
    )
    assert '8-bit' not in err
    preprocessing = read_provenance(output)['model']['preprocessing']
    assert preprocessing['input_range'] == [0, 255]


def test_workers_pooling_and_bands_reach_the_run(
    make_scene: MakeScene, run_cli: RunCli, tmp_path: Path
) -> None:
    scene = make_scene(shape=(4, 64, 128))
    options = ('--bands', '4,2,1', '--pooling', 'max', '--precision', 'bf16-mixed')
    tables = []
    for workers in ('0', '2'):
        output = tmp_path / f'{workers}.parquet'
        code, _, _ = embed(
            run_cli, scene, '--output', output, '--num-workers', workers, *options
        )
        assert code == 0
        tables.append(gpd.read_parquet(output))
    assert tables[0].equals(tables[1])
    made = read_provenance(output)
    assert made['source']['sources'][0]['bands'] == [4, 2, 1]
    assert made['model']['pooling'] == 'featmap_max'
    assert made['run']['precision'] == 'bf16-mixed'


def test_output_that_exists_is_refused_before_any_work(
    make_scene: MakeScene, run_cli: RunCli, tmp_path: Path
) -> None:
    output = tmp_path / 'e.parquet'
    output.write_text('precious')
    code, _, err = embed(run_cli, make_scene(), '--output', output)
    assert code == 2
    assert f"'{output}'" in err
    assert 'was not written by dynamicvis_geo' in err
    assert output.read_text() == 'precious'


@pytest.mark.parametrize(
    ('changes', 'arguments', 'words'),
    [
        ({'crs': None}, (), 'no CRS'),
        ({'shape': (2, 64, 64)}, (), '2 bands'),
        ({}, ('--bands', '1,2,9'), '9'),
        ({}, ('--device', 'tpu'), "'tpu'.*auto, cpu"),
        ({}, ('--input-range', '9,1'), '--input-range'),
        ({}, ('--points', 'nowhere.csv'), 'nowhere.csv'),
        ({}, ('--points', '{tmp}/far.csv'), 'points lie outside'),
        ({}, ('--weights', '{tmp}/none.pth'), 'none.pth'),
        ({}, ('--grid', '--output', '{tmp}/o.parquet'), 'parquet'),
        ({}, ('--output', '{tmp}/far.csv/o.parquet'), 'far.csv'),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    make_scene: MakeScene,
    run_cli: RunCli,
    tmp_path: Path,
    changes: dict[str, object],
    arguments: tuple[str, ...],
    words: str,
) -> None:
    scene = make_scene('in/scene.tif', **changes)
    (tmp_path / 'far.csv').write_text('lon,lat\n100,-40\n')
    before = sorted(tmp_path.rglob('*'))
    arguments = tuple(argument.format(tmp=tmp_path) for argument in arguments)
    code, out, err = run_cli(
        *('embed', scene, '--weights', 'random', '--size', '64'),
        *('--output', tmp_path / 'o.parquet', *arguments),
    )
    errors = [line for line in err.splitlines() if 'warning' not in line]
    assert code == 2
    assert not out
    assert len(errors) == 1
    assert errors[0].startswith('dynamicvis-geo: error: ')
    assert re.search(words, errors[0]), errors[0]
    assert sorted(tmp_path.rglob('*')) == before


def test_broken_file_among_good_ones_is_named_from_a_worker_too(
    make_scene: MakeScene, run_cli: RunCli, tmp_path: Path
) -> None:
    scene = make_scene('in/scene.tif', tiled=True, blockxsize=64, blockysize=64)
    content = scene.read_bytes()
    scene.write_bytes(content[: len(content) // 2])
    output = tmp_path / 'o.parquet'
    for workers in ('0', '1'):
        code, _, err = embed(
            run_cli, scene.parent, '--output', output, '--num-workers', workers
        )
        assert code == 2
        assert 'scene.tif' in err.splitlines()[-1]
        assert 'Traceback' not in err
        assert [p.name for p in tmp_path.iterdir()] == ['in']


def test_debug_shows_the_traceback(run_cli: RunCli, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r'missing\.tif'):
        embed(
            run_cli,
            tmp_path / 'missing.tif',
            '--output',
            tmp_path / 'o',
            '--debug',
            '--grid',
        )


def test_random_weights_are_the_same_each_time(
    make_scene: MakeScene, run_cli: RunCli, tmp_path: Path
) -> None:
    scene = make_scene(shape=(3, 64, 64))
    vectors = []
    for name in ('1.parquet', '2.parquet'):
        embed(run_cli, scene, '--output', tmp_path / name)
        vectors.append(np.array(gpd.read_parquet(tmp_path / name)['embedding'].iloc[0]))
    assert np.array_equal(*vectors)


def test_images_of_stores_are_embedded_as_those_of_disks(
    make_scene: MakeScene, run_cli: RunCli, tmp_path: Path, upload: Upload, web: str
) -> None:
    make_scene('scenes/scene.tif')
    url = upload(tmp_path / 'scenes')
    sources = (
        tmp_path / 'scenes',
        url,
        f'/vsis3/{url.path}/scene.tif',
        f'{web}/scenes/scene.tif',
    )
    tables = []
    for i, source in enumerate(sources):
        output = tmp_path / f'{i}.parquet'
        code, _, err = embed(run_cli, source, '--output', output)
        assert code == 0, err
        tables.append(gpd.read_parquet(output))
    for table in tables[1:]:
        assert_geodataframe_equal(table, tables[0])
