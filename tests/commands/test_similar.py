import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tests.commands.conftest import MakeScene
from tests.outputs import write_grid, write_pooled

Cli = Callable[..., tuple[int, str, str]]


def test_a_table_a_file_and_a_sheet(run_cli: Cli, tmp_path: Path) -> None:
    plots = [f'plot-{i}' for i in range(12)]
    embedding = write_pooled(tmp_path / 'e.parquet', point_id=plots)
    unit = embedding / np.linalg.norm(embedding, axis=1, keepdims=True)
    values = unit @ unit[[3, 5]].mean(axis=0) - unit @ unit[7]
    best = [i for i in np.argsort(-values) if i not in (3, 5, 7)][:4]
    arguments = (
        *('similar', tmp_path / 'e.parquet', '--like', 'chip-3', '--like', '5'),
        *('--unlike', 'chip-7', '--k', '4'),
    )
    code, out, err = run_cli(*arguments)
    assert (code, err) == (0, '')
    head, *lines = (line.split() for line in out.splitlines())
    assert head == ['similarity', 'lon', 'lat', 'point_id', 'id']
    assert [line[3:] for line in lines] == [[plots[i], f'chip-{i}'] for i in best]
    printed = [float(line[0]) for line in lines]
    np.testing.assert_allclose(printed, values[best], atol=2e-6)
    for name in ('found.parquet', 'found.csv'):
        path = tmp_path / 'new' / name
        code, out, _ = run_cli(*arguments, '--output', path)
        assert (code, out) == (0, f'Wrote {path}: 4 chips.\n')
    table = gpd.read_parquet(tmp_path / 'new' / 'found.parquet')
    flat = pd.read_csv(tmp_path / 'new' / 'found.csv')
    for found in (table, flat):
        assert found['id'].tolist() == [f'chip-{i}' for i in best]
        assert found['row'].tolist() == best
        np.testing.assert_allclose(found['similarity'], values[best], atol=1e-6)
    code, out, _ = run_cli(*arguments, '--sheet', tmp_path / 's.png')
    assert code == 0
    assert Image.open(tmp_path / 's.png').width > 400
    code, _, err = run_cli(*arguments, '--sheet', tmp_path / 's.png')
    assert (code, 'give --overwrite' in err) == (2, True)


def test_cells_are_outlined_in_the_images_of_their_chips(
    run_cli: Cli, make_scene: MakeScene, tmp_path: Path
) -> None:
    scene = make_scene()
    for name, options in (('e.parquet', ()), ('maps', ('--grid',))):
        code, _, err = run_cli(
            *('embed', scene, '--size', '64', '--weights', 'random', *options),
            *('--output', tmp_path / name),
        )
        assert code == 0, err
        code, out, err = run_cli(
            *('similar', tmp_path / name, '--like', '0', '--k', '3'),
            *('--images', scene, '--sheet', tmp_path / f'{name}.png'),
        )
        assert code == 0, err
        assert out.count('EPSG32633_x') == 3
        assert Image.open(tmp_path / f'{name}.png').width > 400
    assert 'cell_row' in out


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('e.parquet', '--like', 'x'), '--like x is no chip'),
        (('e.parquet', '--like', '-9,4'), 'follows an equals sign'),
        (('e.parquet', '--like=-9,4'), "--like '-9,4': no chip of e.parquet contains"),
        (
            ('e.parquet', '--like', '1', '--unlike', '70'),
            '--unlike 70 is none of the 12',
        ),
        (('e.parquet', '--like', 'maps'), 'holds feature maps'),
        (('e.parquet', '--like', '1', '--k', '0'), "'0' must be a whole number from 1"),
        (('e.parquet', '--like', '1', '--output', 'a.tif'), 'must end in .parquet'),
        (('e.parquet', '--like', '1', '--sheet', 'a.gif'), '--sheet a.gif: its name'),
        (('e.parquet', '--like', '1', '--output', 'e.parquet'), 'is the input'),
        (('none.parquet', '--like', '1'), 'no such file'),
        (('e.parquet',), 'required: --like'),
    ],
)
def test_what_cannot_be_searched_is_said(
    run_cli: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    write_pooled(tmp_path / 'e.parquet')
    write_grid(tmp_path / 'maps')
    monkeypatch.chdir(tmp_path)
    code, _, err = run_cli('similar', *arguments)
    assert (code, err.count('\n')) == (2, 1)
    assert message in err


def test_searching_needs_no_pytorch(tmp_path: Path) -> None:
    write_pooled(tmp_path / 'e.parquet')
    code = """
import sys
for name in ('torch', 'torchgeo', 'lightning', 'sklearn', 'matplotlib'):
    sys.modules[name] = None
from dynamicvis_geo.cli import main
sys.exit(main(['similar', 'e.parquet', '--like', '3', '--output', 'found.csv']))
"""
    subprocess.run([sys.executable, '-c', code], check=True, cwd=tmp_path)
    assert len(pd.read_csv(tmp_path / 'found.csv')) == 11
