import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import rasterio
from PIL import Image

from tests.change.test_places import two_dates
from tests.outputs import write_grid

Cli = Callable[..., tuple[int, str, str]]

pytestmark = pytest.mark.once


def test_a_table_a_file_a_map_and_a_sheet(run_cli: Cli, tmp_path: Path) -> None:
    one, other, distance = two_dates(tmp_path)
    code, out, err = run_cli('change', one, other, '-k', 3)
    assert (code, err) == (0, '')
    head, *lines = out.splitlines()
    columns = 'change distance valid_fraction lon lat point_id'
    assert head.split() == columns.split()
    best = np.argsort(-distance)[:3]
    found = {tuple(line.split()[-2:]) for line in lines[:3]}
    assert len(found & {('plot', str(i)) for i in best}) >= 2
    assert lines[3].startswith('Matched 40 chips from one.parquet (2022-06-01/2022-09')
    assert lines[-1].endswith('not a test of significance.')
    given = ('change', one, other, '-k', 3)
    for name, option in (
        ('change.parquet', '--output'),
        ('change.csv', '--output'),
        ('map.png', '--map'),
        ('sheet.png', '--sheet'),
    ):
        path = tmp_path / 'new' / name
        code, out, err = run_cli(*given, option, path)
        assert (code, err) == (0, '')
        assert f'Wrote {path}.' in out
        code, _, err = run_cli(*given, option, path)
        assert (code, 'give --overwrite' in err) == (2, True)
    table = gpd.read_parquet(tmp_path / 'new' / 'change.parquet')
    np.testing.assert_allclose(table['distance'], distance, atol=1e-6)
    flat = pd.read_csv(tmp_path / 'new' / 'change.csv')
    np.testing.assert_allclose(flat['change'], table['change'])
    for name in ('map.png', 'sheet.png'):
        assert Image.open(tmp_path / 'new' / name).width > 400


def test_cells_are_outlined_in_images_of_both_dates(
    run_cli: Cli, tmp_path: Path
) -> None:
    for name in ('before', 'after'):
        write_grid(tmp_path / name)
    random = np.random.default_rng(1)
    for path in sorted((tmp_path / 'after').glob('*.tif')):
        with rasterio.open(path, 'r+') as file:
            values = file.read()
            file.write(values + 0.3 * random.normal(size=values.shape).astype('f4'))
            bounds = file.bounds
    for name in ('before', 'after'):
        with rasterio.open(
            tmp_path / f'{name}.tif',
            'w',
            driver='GTiff',
            count=3,
            height=32,
            width=128,
            dtype='uint8',
            crs='EPSG:32618',
            transform=rasterio.transform.from_origin(5e5, bounds.top, 10, 10),
        ) as file:
            file.write(random.integers(0, 255, (3, 32, 128), np.uint8))
    both = f'{tmp_path}/before.tif,{tmp_path}/after.tif'
    code, out, err = run_cli(
        *('change', tmp_path / 'before', tmp_path / 'after', '-k', 2),
        *('--images', both, '--sheet', tmp_path / 's.png'),
        *('--map', tmp_path / 'm.png', '--output', tmp_path / 'change.tif'),
    )
    assert (code, err) == (0, '')
    assert 'Matched 64 cells' in out
    for name in ('s.png', 'm.png'):
        assert Image.open(tmp_path / name).width > 400
    with rasterio.open(tmp_path / 'change.tif') as file:
        assert file.shape == (4, 16)
        assert np.isfinite(file.read()).all()


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('one.parquet',), 'argument A: one.parquet: has one time window'),
        (('one.parquet', 'one.parquet'), 'is named twice'),
        (('other.parquet', 'one.parquet'), 'give the earlier one first'),
        (('one.parquet', 'none.parquet'), 'argument B: none.parquet: no such file'),
        (
            ('one.parquet', 'other.parquet', '--before', '2022'),
            '--before 2022 is no time window: give START/END',
        ),
        (('one.parquet', 'other.parquet', '--output', 'a.tif'), 'no cells to write'),
        (('one.parquet', 'other.parquet', '--output', 'a.xls'), 'must end in .parquet'),
        (('one.parquet', 'other.parquet', '--output', 'one.parquet'), 'is the input'),
        (('one.parquet', 'other.parquet', '--map', 'a.tif'), '--map a.tif: its name'),
        (('one.parquet', 'other.parquet', '--output', 'full'), 'is not empty'),
        (
            ('one.parquet', 'other.parquet', '--output', 'full', '--overwrite'),
            'which dynamicvis_geo did not write',
        ),
        (
            ('one.parquet', 'other.parquet', '--map', 'a.png', '--sheet', './a.png'),
            '--map and --sheet are both a.png: name two files',
        ),
        (('one.parquet', 'other.parquet', '--images', '.'), 'give --sheet FILE, too'),
        (
            ('one.parquet', 'other.parquet', '--images', 'a,b,c'),
            'must be one path, or two',
        ),
    ],
)
def test_what_cannot_be_compared_is_said(
    run_cli: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    two_dates(tmp_path, 10)
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'notes.txt').write_text('mine')
    monkeypatch.chdir(tmp_path)
    code, _, err = run_cli('change', *arguments)
    assert (code, err.count('\n')) == (2, 1)
    assert message in err


@pytest.mark.parametrize('output', ['after', 'before', 'after/change', '.'])
def test_maps_are_not_written_into_those_that_are_compared(
    run_cli: Cli, tmp_path: Path, output: str
) -> None:
    for name in ('before', 'after'):
        write_grid(tmp_path / name)
    files = sorted((tmp_path / 'after').rglob('*'))
    content = [file.read_bytes() for file in files]
    code, _, err = run_cli(
        *('change', tmp_path / 'before', tmp_path / 'after'),
        *('--output', tmp_path / output, '--overwrite'),
    )
    assert (code, 'choose another folder' in err) == (2, True)
    assert sorted((tmp_path / 'after').rglob('*')) == files
    assert [file.read_bytes() for file in files] == content


def test_comparing_needs_no_pytorch(tmp_path: Path) -> None:
    two_dates(tmp_path)
    code = """
import sys
for name in ('torch', 'torchgeo', 'lightning', 'sklearn', 'matplotlib'):
    sys.modules[name] = None
from dynamicvis_geo.cli import main
sys.exit(main(['change', 'one.parquet', 'other.parquet', '--output', 'found.csv']))
"""
    subprocess.run([sys.executable, '-c', code], check=True, cwd=tmp_path)
    assert len(pd.read_csv(tmp_path / 'found.csv')) == 40
