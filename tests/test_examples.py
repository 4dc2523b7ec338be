"""The scripts and the notebook of examples/ do what they say."""

import runpy
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.documents.blocks import ROOT
from tests.documents.fixtures import earth, inputs, small_backbones
from tests.earthengine_server import EarthEngineServer
from tests.earthengine_server.fixtures import running_server, server
from tests.processes import HANG

__all__ = ('earth', 'inputs', 'running_server', 'server', 'small_backbones')

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
    assert {path.name for path in EXAMPLES.glob('*.py')} == {
        *('embed_points.py', 'linear_probe.py', 'similar_places.py')
    }


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
    assert 'image/png' in notebook.cells[-2].outputs[0].data
