"""Runs described by YAML."""

from collections.abc import Callable
from pathlib import Path

import geopandas as gpd
import pytest
import yaml

from dynamicvis_geo import read_provenance
from dynamicvis_geo.formats.geotiff import GeoTIFF
from tests.earthengine_server import EarthEngineServer

from .conftest import MakeScene

RunCli = Callable[..., tuple[int, str, str]]

EXAMPLES = Path(__file__).parents[2] / 'examples'
TINY = ('--model.backbone.weights', 'random', '--model.backbone.img_size', '64')
QUIET = ('--trainer.accelerator', 'cpu', '--trainer.enable_progress_bar', 'false')


def test_the_example(
    server: EarthEngineServer, run_cli: RunCli, tmp_path: Path
) -> None:
    output = tmp_path / 'e.parquet'
    code, out, err = run_cli(
        'predict',
        *('--config', EXAMPLES / 'predict.yaml', *TINY, *QUIET),
        *('--data.points', EXAMPLES / 'plots.csv', '--data.size', '64'),
        *('--data.client.url', server.url, '--data.client.project', 'test-project'),
        *('--data.sensor.cloudy_pct', '90', '--writer.path', output),
    )
    assert code == 0, err
    assert f'Wrote {output}: embeddings of 2 chips' in out
    table = gpd.read_parquet(output).set_index('point_id')
    assert table['crs'].to_dict() == {'meadow': 'EPSG:32632', 'forest': 'EPSG:32633'}
    assert (table['width'] == 64).all()
    assert read_provenance(output)['model']['backbone']['weights'] == 'random'


def test_local_images(make_scene: MakeScene, run_cli: RunCli, tmp_path: Path) -> None:
    config = {
        'model': {
            'backbone': {'weights': 'random', 'img_size': 64},
            'output': 'grid',
            'input_range': [0, 4000],
        },
        'data': {
            'class_path': 'ScenesDataModule',
            'init_args': {'path': str(make_scene()), 'size': 64, 'bands': [1, 2, 3]},
        },
        'trainer': {'accelerator': 'cpu', 'enable_progress_bar': False},
        'writer': {'path': str(tmp_path / 'maps')},
    }
    (tmp_path / 'run.yaml').write_text(yaml.safe_dump(config))
    code, _, err = run_cli('predict', '--config', tmp_path / 'run.yaml')
    assert code == 0, err
    assert len(list((tmp_path / 'maps').glob('*.tif'))) == 6
    # Without a progress bar, only warnings are told.
    assert 'finished already' not in err


def test_stage_of_a_configuration(
    make_scene: MakeScene, run_cli: RunCli, tmp_path: Path
) -> None:
    config = {
        'model': {'output': 'grid', 'stage': 2},
        'data': {
            'class_path': 'ScenesDataModule',
            'init_args': {'path': str(make_scene()), 'size': 64},
        },
        'writer': {'path': str(tmp_path / 'maps')},
    }
    (tmp_path / 'run.yaml').write_text(yaml.safe_dump(config))
    options = ('--config', tmp_path / 'run.yaml', *TINY, '--trainer.accelerator', 'cpu')
    code, _, err = run_cli('predict', *options)
    assert code == 0, err
    assert '; 147 kB to write' in err
    chips, count, dimensions = GeoTIFF.read_chips(tmp_path / 'maps', 1)
    assert (count, dimensions) == (6, 384)
    assert chips['width'].tolist() == [4]
    assert read_provenance(tmp_path / 'maps')['model']['stage'] == 2
    code, _, err = run_cli('predict', *options, '--model.stage', '7')
    assert code == 2
    assert 'stage=7 is unknown: choose one of 0, 1, 2, 3' in err.splitlines()[-1]


def test_shards_of_a_configuration(
    make_scene: MakeScene, run_cli: RunCli, tmp_path: Path
) -> None:
    config = {
        'data': {
            'class_path': 'ScenesDataModule',
            'init_args': {'path': str(make_scene()), 'size': 64},
        },
        'writer': {'path': str(tmp_path / 'e.parquet'), 'block_chips': 1},
    }
    (tmp_path / 'run.yaml').write_text(yaml.safe_dump(config))
    options = ('--config', tmp_path / 'run.yaml', *TINY, '--trainer.accelerator', 'cpu')
    code, out, err = run_cli('predict', *options, '--writer.shard', '2/3')
    assert code == 0, err
    assert '. 4 blocks are left to other shards' in out
    assert err.count('this is shard 2/3') == 1
    assert 'all 3 shards together: 6 chips of 64 pixels in 1 UTM zone, 0 of' in err
    config['writer']['shard'] = [1, 3]
    (tmp_path / 'run.yaml').write_text(yaml.safe_dump(config))
    code, out, err = run_cli('predict', *options)
    assert code == 0, err
    assert '. 2 blocks are left to other shards' in out
    code, out, _ = run_cli('predict', *options, '--writer.shard', '3/3')
    assert code == 0
    assert 'beside 4 from before' in out
    code, _, err = run_cli('predict', *options, '--writer.shard', '4/3')
    assert code == 2
    assert 'shard=4/3' in err.splitlines()[-1]


def test_the_configuration_is_printed_and_can_be_run(run_cli: RunCli) -> None:
    code, out, _ = run_cli(
        'predict', '--config', EXAMPLES / 'predict.yaml', *TINY, '--print_config'
    )
    assert code == 0
    config = yaml.safe_load(out)
    assert config['model']['backbone']['img_size'] == 64
    assert config['data']['init_args']['sensor']['composite'] == 'median'
    assert config['data']['init_args']['client']['max_concurrency'] == 32
    assert 'optimizer' not in config


def test_help_lists_every_class(run_cli: RunCli) -> None:
    code, out, _ = run_cli('predict', '--help')
    assert code == 0
    for name in ('--model.backbone', '--writer.path', '--trainer.devices', '--data'):
        assert name in out
    code, out, _ = run_cli('predict', '--data.help', 'EarthEngineDataModule')
    assert code == 0
    assert '--data.on_missing' in out


@pytest.mark.parametrize(
    ('arguments', 'names'),
    [
        (('--data.sensor.cloudy_pct', '900'), 'cloudy_pct=900'),
        (('--data.roi', '1,2,3,4'), 'roi or points'),
        (('--data.points', 'nowhere.csv'), 'nowhere.csv: no such file'),
        (('--model.backbone.img_size', '3'), 'img_size=3'),
        (('--model.pooling', 'sum'), 'model.pooling'),
        (('--data.sizes', '3'), "'sizes'"),
        (('--writer.path', 'e.csv'), 'e.csv'),
        (('--bogus', '3'), '--bogus'),
        (('--config', 'nowhere.yaml'), 'nowhere.yaml'),
    ],
)
def test_errors_take_one_line(
    arguments: tuple[str, ...], names: str, run_cli: RunCli, tmp_path: Path
) -> None:
    code, _, err = run_cli(
        'predict',
        *('--config', EXAMPLES / 'predict.yaml', *TINY, *QUIET),
        *('--writer.path', tmp_path / 'e.parquet', *arguments),
    )
    assert code == 2
    (line,) = (line for line in err.splitlines() if 'error' in line)
    assert line.startswith('dynamicvis-geo: error: ')
    assert names in line
    assert 'Traceback' not in err
    assert not (tmp_path / 'e.parquet').exists()
