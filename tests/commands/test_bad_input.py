"""Whatever is wrong with what a user gives, one line says so, and what to give."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import chdir
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely
import torch

from tests.commands.conftest import scene_in
from tests.outputs import write_grid, write_pooled

RunCli = Callable[..., tuple[int, str, str]]

OUT = ('--output', 'o.parquet')
DATES = ('--start', '2022-06-01', '--end', '2022-07-01')
EE = ('embed', *OUT, '--weights', 'random', '--points', 'points.csv')
AREA = ('embed', *OUT, '--weights', 'random', *DATES, '--size', '64', '--roi')
SCENE = ('embed', 'scene.tif', '--weights', 'random', '--size', '64')
PROBE = ('probe', 'e.parquet', '--labels', 'labels.csv', '--target', 'cover')
MAP = ('plot', 'map', 'e.parquet')
PREDICT = ('predict', '--config')


@pytest.fixture(autouse=True)
def files(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of files, few of which are as they should be."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope='module')
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('files')
    with chdir(folder):
        write_files(folder)
    return folder


def write_files(folder: Path) -> None:
    scene_in(folder, 'scene.tif', shape=(3, 64, 64))
    scene_in(folder, 'images/scene.tif', shape=(3, 64, 64))
    texts = {
        'images/metadata.json': '{"camera": "Hasselblad"}',
        'text.txt': 'text',
        'points.csv': 'id,lon,lat\na,13.5,46.2\n',
        'header.csv': 'lon,lat\n',
        'empty.csv': '',
        'columns.csv': 'a,b\n1,2\n',
        'semicolons.csv': 'lon;lat\n13.5;46.2\n',
        'ragged.csv': 'lon,lat\n1,2\n3,4,5,6\n',
        'swapped.csv': 'lon,lat\n46.2,113.5\n',
        'empty.geojson': json.dumps({'type': 'FeatureCollection', 'features': []}),
        'broken.geojson': '{"type": "Feature',
        'broken.yaml': 'a: [1,',
        'unknown.yaml': 'colour: red\n',
        'devices.yaml': (
            'trainer: {accelerator: cpu, devices: 0}\n'
            'data: {class_path: dynamicvis_geo.ScenesDataModule, '
            'init_args: {path: scene.tif}}\n'
            'model: {backbone: {weights: random}}\n'
            'writer: {path: o.parquet}\n'
        ),
        'url.yaml': (
            'data: {class_path: dynamicvis_geo.ScenesDataModule, '
            'init_args: {path: scene.tif}}\n'
            'writer: {path: "https://a.example/o.parquet"}\n'
        ),
    }
    for name, text in texts.items():
        Path(name).write_text(text)
    Path('utf16.csv').write_text('lon,lat\n13,46\n', encoding='utf-16')
    square = gpd.GeoDataFrame(geometry=[shapely.box(13.5, 46.2, 13.6, 46.3)], crs=4326)
    square.to_file('polygon.geojson')
    square.to_file('area.gpkg')
    Path('cut.gpkg').write_bytes(Path('area.gpkg').read_bytes()[:2000])
    square.set_crs(None, allow_override=True).to_parquet('nowhere.parquet')
    square.set_geometry([None]).to_file('none.geojson')
    pd.DataFrame({'a': [1]}).to_parquet('table.parquet')
    write_pooled(Path('e.parquet'))
    write_pooled(Path('none.parquet'), count=0)
    write_grid(Path('maps'))
    Path('cut.parquet').write_bytes(Path('e.parquet').read_bytes()[:-100])
    ids = gpd.read_parquet('e.parquet')['id']
    labels = pd.DataFrame({'id': ids, 'cover': np.tile(['a', 'b'], 6), 'one': 1})
    labels.to_csv('labels.csv', index=False)
    torch.save({'a': torch.ones(2)}, 'other.pth')


def contents(folder: Path) -> dict[Path, bytes]:
    """All files but the hidden ones, in which embeddings lie to be mapped."""
    files = (path for path in folder.rglob('*') if path.is_file())
    return {path: path.read_bytes() for path in files if path.name[0] != '.'}


def outputs() -> Iterator[tuple[tuple[str, ...], str]]:
    """Every command that writes, with an output that it cannot write."""
    commands = {
        ('embed', 'scene.tif', '--output'): '.parquet',
        ('embed', 'scene.tif', '--grid', '--output'): '',
        ('fetch', '--points', 'points.csv', *DATES, '--cache'): '',
        ('probe', 'e.parquet', '--target', 'crs', '--output'): '',
        ('predict-map', 'probe.ckpt', 'maps', '--output'): '',
        ('plot', 'rgb', 'scene.tif', '--output'): '.png',
        ('plot', 'pca', 'maps', '--output'): '',
        (*MAP, '--output'): '.png',
        ('report', 'e.parquet', '--output'): '.html',
        ('convert', 'other.pth'): '.safetensors',
        ('demo', '--output'): '',
    }
    for command, suffix in commands.items():
        option = command[-1] if command[-1].startswith('--') else 'OUT'
        places = ['https://a.example/x', '/vsigs/bucket/x', 'text.txt/x']
        # Runs may go to stores.
        places += ['nope://x'] if command[0] == 'embed' else ['s3://bucket/x']
        for place in places:
            yield (*command, f'{place}{suffix}'), f'{option}.*{place}'
        yield (*command, '/'), f'{option}.*root of a file system'
        yield (*command, ''), f"{option}.*''"


CASES = [
    # Numbers.
    *(
        ((*SCENE, *OUT, *given), f'{given[0]}.*{given[1]}.*must be')
        for given in (
            *(('--size', '-1'), ('--stride', '0'), ('--batch-size', '1e3')),
            *(('--num-workers', '-1'), ('--devices', '0'), ('--bands', '0,1,2')),
            *(('--input-range', '5,5'), ('--input-range', 'nan,1')),
        )
    ),
    *(
        ((*EE, *DATES, *given), f'{given[0]}.*{given[1]}.*must be a number')
        for given in (
            *(('--buffer', 'nan'), ('--buffer', 'inf'), ('--buffer', '-1')),
            *(('--scale', '0'), ('--scale', 'inf'), ('--cloudy-pct', 'nan')),
        )
    ),
    ((*EE, *DATES, '--buffer', '1e12'), '--buffer 10{12}.0 .* at most 500000 m'),
    ((*EE, *DATES, '--size', '9' * 12), '--size 9{12} must be .* to 1048576'),
    # The command line itself.
    (('embed', '--size'), r'--size: expected one argument.*embed --help'),
    ((*SCENE, *OUT, '--colour', 'red'), r'--colour red.*embed --help'),
    (('paint',), "'paint' .*choose from.*--help"),
    # Places and times.
    (EE, r'--points points\.csv without SOURCE.*give --year'),
    ((*EE, '--year', '99999'), '--year 99999 is not within'),
    ((*EE, '--start', '2022-01-01'), '--start 2022-01-01 is given: give .*--end'),
    ((*EE, '--start', '2022-02-30', '--end', '2022-03-01'), '--start .*30 is not a d'),
    ((*EE, '--start', '2022-06-01', '--end', '2022-06-01'), 'is not before'),
    (
        (*EE, '--start', '1066-01-01', '--end', '1067-01-01'),
        '--start 1066-01-01 .*1678',
    ),
    ((*AREA, 'columns.csv'), r'--roi columns\.csv: holds no geometries; give'),
    ((*AREA, 'empty.geojson'), r'--roi empty\.geojson: has no geometry'),
    ((*AREA, 'none.geojson'), r'--roi none\.geojson: has no geometry'),
    ((*AREA, 'broken.geojson'), r'--roi broken\.geojson.*cannot read.*give'),
    ((*AREA, 'cut.gpkg'), r'--roi cut\.gpkg.*cannot read.*give'),
    ((*AREA, 'nowhere.parquet'), r'--roi nowhere\.parquet: has no CRS: name it'),
    ((*AREA, 'nowhere.gpkg'), r'--roi nowhere\.gpkg.*neither a file.*give'),
    ((*AREA, ''), "--roi '': .*neither a file"),
    ((*AREA, 'x' * 300), '--roi x{80}...: .*neither a file'),
    ((*AREA, 'nan,1,2,3'), 'minlon=nan'),
    ((*AREA, 'POLYGON ((46 113, 47 113, 47 114, 46 113))'), 'longitude first'),
    ((*EE, *DATES, '--project', ''), "--project '' is empty: give .* or leave it out"),
    ((*EE, *DATES, '--ee-url', 'ftp://x'), '--ee-url ftp://x is not the address'),
    # Files.
    ((*SCENE, *OUT, '--points', 'header.csv'), r'--points: header\.csv.*no points'),
    ((*SCENE, *OUT, '--points', 'empty.csv'), r'--points: empty\.csv.*first line'),
    ((*SCENE, *OUT, '--points', 'columns.csv'), r'--points: columns\.csv.*rename'),
    ((*SCENE, *OUT, '--points', 'semicolons.csv'), 'comma-separated.*lon;lat'),
    ((*SCENE, *OUT, '--points', 'ragged.csv'), r'--points: ragged\.csv.*line 3.*save'),
    ((*SCENE, *OUT, '--points', 'utf16.csv'), r'--points: utf16\.csv.*UTF-8'),
    ((*SCENE, *OUT, '--points', 'swapped.csv'), r'swapped\.csv: row 1 .*113\.5'),
    ((*SCENE, *OUT, '--points', 'polygon.geojson'), 'row 1 has Polygon.*--roi'),
    ((*SCENE, *OUT, '--points', 'points.csv', '--stride', '3'), '--stride 3 is for'),
    (('embed', 'text.txt', *OUT), r'argument SOURCE: text\.txt: rasterio cannot'),
    (('embed', '', *OUT), "SOURCE: '' is no path"),
    (('embed', 'gs://b/x.tif', *OUT), r"SOURCE: 'gs://b/x\.tif' .*geo\[gcs\]"),
    (('embed', '/vsizip/a.zip/x.tif', *OUT), r'SOURCE: /vsizip/a\.zip/x\.tif: raster'),
    ((*SCENE, *OUT, '--points', 'nope://x.csv'), "--points: 'nope://x.csv' is no URL"),
    ((*SCENE, *OUT, '--points', '/vsis3/b/x.csv'), '--points: .* only images'),
    ((*SCENE, *OUT, '--weights', 's3://b/x.pth'), '--weights: .*local disks only'),
    (('info', '--checkpoint', 'other.pth'), r'--checkpoint: other\.pth has no'),
    ((*SCENE, *OUT, '--weights', ''), "--weights: '' is no path"),
    (('info', '--checkpoint', 'text.txt'), r'--checkpoint: text\.txt is neither'),
    # Outputs.
    ((*SCENE, '--output', 'noext'), r'--output: .*noext.*end it in \.parquet'),
    ((*SCENE, '--output', 'o.csv'), r'--output: .*o\.csv.*end it in \.parquet'),
    ((*SCENE, '--grid', '--overwrite', '--output', 'images'), '--output.*images'),
    ((*MAP, '--output', 'e.parquet'), r'--output e\.parquet: .*must end in'),
    *outputs(),
    # Evaluation and pictures.
    ((*PROBE[:-1], 'geometry'), "no column 'geometry'"),
    ((*PROBE[:2], '--target', 'geometry'), "'geometry' holds values that are no"),
    ((*PROBE[:-1], 'one'), "column 'one' has 1 class"),
    ((*PROBE, '--fractions', '1,1,1'), r'--fractions \(1\.0.*add up to 3'),
    ((*PROBE, '--block', '0'), "--block: '0' must be"),
    (('probe', 'cut.parquet', '--target', 'crs'), r'EMBEDDINGS|cut\.parquet: not a r'),
    (('plot', 'map', 'none.parquet', '--output', 'm.png'), r'none\.parquet holds no'),
    (
        ('plot', 'map', 'table.parquet', '--output', 'm.png'),
        r'table\.parquet has no embeddings: name the column',
    ),
    (('plot', 'map', 'maps', '--output', 'm.png'), r'INPUT: maps holds grid'),
    # Runs that are described by a file.
    ((*PREDICT, 'broken.yaml'), r'config.*correct --config broken\.yaml'),
    ((*PREDICT, 'unknown.yaml'), r"'colour'.*correct --config unknown\.yaml"),
    ((*PREDICT, 'devices.yaml'), r'devices=0.*correct --config devices\.yaml'),
    ((*PREDICT, 'url.yaml'), "path='https://a.example/o.parquet' is a"),
    ((*PREDICT, 'nowhere.yaml'), r'nowhere\.yaml.*--help'),
]


@pytest.mark.parametrize(
    ('arguments', 'words'), CASES, ids=lambda case: str(case)[-60:]
)
def test_one_line_says_what_to_give(
    run_cli: RunCli, files: Path, arguments: tuple[str, ...], words: str
) -> None:
    before = contents(files)
    code, out, err = run_cli(*arguments)
    lines = [line for line in err.splitlines() if ' warning: ' not in line]
    assert code == 2, err
    assert not out
    assert len(lines) == 1, err
    assert lines[0].startswith('dynamicvis-geo: error: ')
    assert re.search(words, lines[0]), lines[0]
    assert contents(files) == before


@pytest.mark.parametrize(
    ('text', 'words'),
    [
        ('id,lon,lat\na,13.5,46.22\na,13.501,46.22\n', "1 ids .* 'a'"),
        ('lon,lat,Lon\n13.5,46.22,99\n', "named 'lon'.*first is used"),
    ],
)
def test_what_is_twice_in_a_table_is_told(
    run_cli: RunCli, tmp_path: Path, text: str, words: str
) -> None:
    Path('points.csv').write_text(text)
    code, _, err = run_cli(*SCENE, *OUT, '--points', 'points.csv')
    assert code == 0, err
    assert re.search(f'warning: points.csv: .*{words}', err)
