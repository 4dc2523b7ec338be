"""The scripts and the notebook of examples/ do what they say."""

import os
import runpy
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import geopandas as gpd
import nbformat
import numpy as np
import psutil
import pytest
import rasterio
import torch
from geopandas.testing import assert_geodataframe_equal
from nbclient import NotebookClient

from dynamicvis_geo.cli import main
from tests.documents.blocks import ROOT
from tests.documents.fixtures import earth, inputs, small_backbones
from tests.earthengine_server import EarthEngineServer
from tests.processes import HANG, Process, Start, wait_for

__all__ = ('earth', 'inputs', 'small_backbones')

EXAMPLES = ROOT / 'examples'

#: What a user has who is logged in, and the weights that tests have.
PREPARED = """
import warnings
import ee
import ee.deprecation
import google.auth.credentials
import torch
from dynamicvis_geo.models import weights
from tests.documents.fixtures import untrained

warnings.simplefilter('ignore')
torch.set_num_threads(1)
nothing = ee.deprecation.DeprecatedAsset('', None, None, None)
ee.deprecation.deprecated_assets = {{'': nothing}}
anonymous = google.auth.credentials.AnonymousCredentials()
ee.Initialize(anonymous, project='my-project', url={url!r})
weights._pretrained_backbone = untrained(weights._random_backbone)
"""


@pytest.mark.usefixtures('earth', 'small_backbones')
def test_scripts(
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, 'argv', [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name='__main__')
        return capsys.readouterr().out

    plots = inputs / 'plots.csv'
    assert 'written=25' in run('embed_points.py', plots, 'plots.parquet')
    assert 'logistic' in run('linear_probe.py', 'plots.parquet', plots, 'cover')
    assert run('similar_places.py', 'plots.parquet').count('\n') == 5
    assert Path('plots.png').exists()
    scene, sites = inputs / 'scene.tif', inputs / 'sites.csv'
    assert 'of 25 points' in run(
        'class_map.py', scene, sites, 'cover', 'classes', 'random'
    )
    with rasterio.open('classes/classes.tif') as classes:
        # Chips of 512 pixels are 64 for these backbones: cells of 32.
        assert classes.shape == (24, 24)
        assert set(np.unique(classes.read(1))) <= {0, 1, 2}
    assert Path('classes/classes.png').exists()
    assert {path.name for path in EXAMPLES.glob('*.py')} == {
        *('class_map.py', 'embed_points.py', 'linear_probe.py', 'ray_shards.py'),
        *('similar_places.py', 'study.py'),
    }


@pytest.mark.once
def test_notebook(
    server: EarthEngineServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = nbformat.read(EXAMPLES / 'first_steps.ipynb', as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == 'code']
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)
    prepared = nbformat.v4.new_code_cell(PREPARED.format(url=server.url))
    notebook.cells.insert(0, prepared)
    monkeypatch.setenv('PYTHONPATH', str(ROOT))
    monkeypatch.setenv('IPYTHONDIR', str(tmp_path))
    client = NotebookClient(
        notebook,
        timeout=HANG,
        kernel_name='python3',
        resources={'metadata': {'path': str(tmp_path)}},
    )
    client.execute()
    drawn = [cell for cell in notebook.cells if 'image/png' in str(cell.get('outputs'))]
    assert len(drawn) == 3


#: A cluster of this machine with two workers, and a script on it.
ON_RAY = """
import runpy
import sys
import ray

ray.init(num_cpus=2, include_dashboard=False)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


@pytest.fixture
def ray_environment() -> Iterator[dict[str, str]]:
    pytest.importorskip('ray')
    # Names of sockets must be short, and Ray keeps a token at home.
    with TemporaryDirectory(prefix='ray') as folder:
        yield {
            **os.environ,
            'HOME': folder,
            'RAY_TMPDIR': folder,
            'RAY_USAGE_STATS_ENABLED': '0',
            'RAY_AUTH_MODE': 'disabled',
            'PYTHONPATH': str(ROOT),
        }


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As Ray's workers have it: sums of several threads are rounded otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def at_work(run: Process) -> list[psutil.Process]:
    """Workers of a Ray cluster that are in a shard."""
    found = []
    for process in psutil.Process(run.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if 'ray::embed' in process.cmdline():
                found.append(process)
    return found


@pytest.mark.once
@pytest.mark.usefixtures('one_thread')
def test_shards_on_ray_survive_the_death_of_a_worker(
    server: EarthEngineServer,
    start: Start,
    ray_environment: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv('RS_EMBED_DYNAMICVIS_IMG', '64')
    points = [f'{i},{10.2 + 0.02 * i},50.4' for i in range(6)]
    (tmp_path / 'points.csv').write_text('\n'.join(['id,lon,lat', *points]))
    arguments = [
        *('--points', str(tmp_path / 'points.csv'), '--on-missing', 'fill'),
        *('--start', '2022-06-01', '--end', '2022-07-21', '--cloudy-pct', '90'),
        *('--ee-url', server.url, '--project', 'p', '--size', '64', '--quiet'),
        *('--weights', 'random', '--device', 'cpu', '--num-workers', '0'),
        *('--block-chips', '1', '--output'),
    ]
    # One shard gets no further until it is killed.
    server.set(script=[*[None] * 3, 'hang'], hang_s=HANG)
    output = tmp_path / 'shards.parquet'
    run = start(
        *('-c', ON_RAY, EXAMPLES / 'ray_shards.py', '--shards', 3),
        *('--', *arguments, output),
        env={**ray_environment, 'RS_EMBED_DYNAMICVIS_IMG': '64'},
    )
    try:
        wait_for(lambda: server.counts()['requests'] > 3, run)
        wait_for(lambda: len(at_work(run)) == 1, run)
        assert not output.exists()
        at_work(run)[0].kill()
        log = run.communicate(timeout=HANG)[0]
    finally:
        run.terminate()
        run.wait()
    assert run.returncode == 0, log
    assert f'Wrote {output}' in log
    table = gpd.read_parquet(output)
    assert len(table) == 6
    server.set()
    assert main(['embed', *arguments, str(tmp_path / 'one.parquet')]) == 0
    assert_geodataframe_equal(table, gpd.read_parquet(tmp_path / 'one.parquet'))
