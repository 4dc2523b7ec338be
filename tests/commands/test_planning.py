"""What embed and fetch say before they start, and what they refuse to start."""

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import geopandas as gpd
import pytest

from dynamicvis_geo.datasets import Scenes
from tests.earthengine_server import EarthEngineServer

from .conftest import MakeScene

RunCli = Callable[..., tuple[int, str, str]]

WINDOW = ('--start', '2022-06-01', '--end', '2022-07-21', '--cloudy-pct', '90')
#: Two points in zone 32 and one in zone 33.
PLOTS = 'id,lon,lat\na,10.3,50.4\nb,12.3,50.4\nc,10.31,50.4\n'
EARTH = '--roi=-180,-90,180,90'
NOBODY = ('--ee-url', 'http://127.0.0.1:9', '--project', 'x')


@pytest.fixture
def options(server: EarthEngineServer, tmp_path: Path) -> tuple[str | Path, ...]:
    (tmp_path / 'plots.csv').write_text(PLOTS)
    place = ('--ee-url', server.url, '--project', 'test-project')
    return (*place, *WINDOW, '--size', '64', '--points', tmp_path / 'plots.csv')


def embed(run_cli: RunCli, *arguments: str | Path) -> tuple[int, str, str]:
    return run_cli('embed', '--weights', 'random', '--device', 'cpu', *arguments)


def test_embed_says_what_it_will_do_before_the_model_is_made(
    run_cli: RunCli, options: tuple[str | Path, ...], tmp_path: Path
) -> None:
    output = ('--output', tmp_path / 'e.parquet')
    code, out, err = embed(run_cli, *options, *output)
    assert code == 0, err
    plan = (
        '3 chips of 64 pixels in 2 UTM zones, 0 of them finished already; 3 requests, '
        '73.7 kB to fetch; 9.22 kB to write'
    )
    assert f'dynamicvis-geo: {plan}\n' in err
    assert err.index(plan) < err.index('untrained')
    assert plan not in out
    code, _, err = embed(run_cli, *options, *output)
    assert '3 of them finished already; 0 requests, 0 B to fetch; 0 B to write' in err
    code, _, err = embed(run_cli, *options, *output, '--overwrite', '--dtype', 'int8')
    assert '0 of them finished already; 3 requests' in err
    assert '2.3 kB to write' in err
    code, out, err = embed(run_cli, *options, *output, '--overwrite', '--quiet')
    assert code == 0
    assert 'finished' not in out + err


def test_fetch_says_what_it_will_do(
    run_cli: RunCli, options: tuple[str | Path, ...], tmp_path: Path
) -> None:
    cache = ('--cache', tmp_path / 'cache')
    code, _, err = run_cli('fetch', *options, *cache)
    assert code == 0, err
    assert '0 of them finished already; 3 requests, 73.7 kB to fetch; 73.7 kB' in err
    _, out, _ = run_cli('fetch', *options, *cache, '--dry-run')
    assert '3 of them finished already; 0 requests, 0 B to fetch; 0 B to write' in out


def test_images_of_ones_own(
    make_scene: MakeScene, run_cli: RunCli, tmp_path: Path
) -> None:
    scene, output = make_scene(), tmp_path / 'maps'
    code, out, _ = embed(
        run_cli, scene, '--size', '64', '--grid', '--output', output, '--dry-run'
    )
    assert code == 0
    assert out == (
        '6 chips of 64 pixels in 1 UTM zone, 0 of them finished already; 0 requests, '
        '0 B to fetch; 73.7 kB to write\n'
    )
    assert not output.exists()
    for stage, size in ((0, '590 kB'), (1, '295 kB'), (2, '147 kB'), (3, '73.7 kB')):
        _, out, _ = embed(
            *(run_cli, scene, '--size', '64', '--grid', '--output', output),
            *('--dry-run', '--stage', str(stage)),
        )
        assert f'; {size} to write' in out
    plain = make_scene('lonlat.tif', crs='EPSG:3035')
    _, out, _ = embed(
        run_cli, plain, '--size', '64', '--output', 'e.parquet', '--dry-run'
    )
    assert ' in 1 CRS, ' in out


def test_a_dry_run_needs_neither_weights_nor_gpu_and_counts_scenes(
    run_cli: RunCli,
    options: tuple[str | Path, ...],
    tmp_path: Path,
    server: EarthEngineServer,
) -> None:
    before = sorted(tmp_path.rglob('*'))
    code, out, err = run_cli(
        *('embed', *options, '--output', tmp_path / 'new' / 'e.parquet', '--dry-run'),
        *('--weights', tmp_path / 'none.pth', '--device', 'cuda:7', '--nodes', '2'),
    )
    assert code == 0, err
    (line,) = out.splitlines()
    assert line.startswith('3 chips of 64 pixels in 2 UTM zones')
    found = re.search(
        r'; (\d+) scenes a chip, counted for one.* about (\d+) here', line
    )
    assert found is not None
    assert int(found[2]) == 3 * int(found[1]) > 0
    assert 'the budget of Earth Engine counts the scenes' in line
    assert server.counts()['requests'] == 1
    assert sorted(tmp_path.rglob('*')) == before


def test_a_dry_run_goes_without_scenes_where_nobody_answers(
    run_cli: RunCli,
    options: tuple[str | Path, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr('dynamicvis_geo.datasets.earthengine.PATIENCE', 0.1)
    code, out, err = run_cli(
        'fetch', *options, *NOBODY, '--cache', tmp_path / 'cache', '--dry-run'
    )
    assert code == 0
    assert out.startswith('3 chips of 64 pixels')
    assert 'scenes' not in out
    (line,) = err.splitlines()
    assert 'warning: scenes a chip could not be counted: ' in line


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        ((EARTH,), ('more than 1,000,000 chips', 'at least 19,4', '122 UTM zones')),
        ((EARTH, '--size', '1', '--scale', '0.001'), ('more than 1,000,000 chips',)),
        (
            ('--roi=10,50,11,51', '--size', '1000000'),
            ('above 4096 pixels a side', 'of 1000000 pixels'),
        ),
        (('--roi=10,50,11,51', '--size', '40000'), ('of 40000 pixels',)),
        (('--roi=10,50,11,51', '--buffer', '40000'), ('of 8000 pixels',)),
    ],
)
@pytest.mark.parametrize('command', ['embed', 'fetch'])
def test_what_may_be_a_mistake_is_refused_with_its_numbers(
    run_cli: RunCli,
    tmp_path: Path,
    command: str,
    arguments: tuple[str, ...],
    words: tuple[str, ...],
) -> None:
    place = tmp_path / 'new'
    target = ('--output', place / 'e.parquet')
    if command == 'fetch':
        target = ('--cache', place)
    code, out, err = run_cli(command, *WINDOW, *NOBODY, *arguments, *target)
    assert code == 2
    assert not out
    (line,) = err.splitlines()
    for word in (*words, 'to write', 'Give --yes'):
        assert word in line
    assert not place.exists()


@pytest.mark.parametrize(
    ('size', 'stage', 'words'),
    [('1024', '3', '1.27 TB to write'), ('512', '0', '2.54 TB to write')],
)
def test_a_terabyte_is_refused(
    run_cli: RunCli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    size: str,
    stage: str,
    words: str,
) -> None:
    monkeypatch.setenv('RS_EMBED_DYNAMICVIS_IMG', size)
    target = ('--grid', '--stage', stage, '--output', tmp_path / 'maps')
    place = ('--roi=0,44,10,50', '--size', '112', *WINDOW, *NOBODY)
    code, _, err = embed(run_cli, *place, *target)
    assert code == 2
    assert 'error: more than 1 TB of output: at least 4' in err
    assert words in err


def test_yes_means_it(
    run_cli: RunCli,
    options: tuple[str | Path, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr('dynamicvis_geo.datamodules.plan.MOST_CHIPS', 2)
    output = tmp_path / 'e.parquet'
    code, _, err = embed(run_cli, *options, '--output', output)
    assert code == 2
    assert 'Give --yes' in err
    # A dry run is no run, and says what that would need.
    code, out, err = embed(run_cli, *options, '--output', output, '--dry-run')
    assert code == 0
    assert 'at least 3 chips' in out
    assert 'without --yes it is refused' in err
    code, _, err = embed(run_cli, *options, '--output', output, '--yes')
    assert code == 0, err
    assert len(gpd.read_parquet(output)) == 3


def test_many_chips_of_ones_own_images_are_refused(
    make_scene: MakeScene, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_scene('in/a_20220101_.tif').parent
    make_scene('in/b_20220101_.tif')
    make_scene('in/c_20220201_.tif')
    monkeypatch.setattr('dynamicvis_geo.datamodules.plan.MOST_CHIPS', 11)
    # Two files of one day show the same place.
    code, _, err = embed(run_cli, folder, '--size', '64', '--output', 'e.parquet')
    assert code == 2
    assert 'more than 11 chips: at least 12 chips of 64 pixels in 1 UTM zone' in err


def _ended(*_: Any) -> None:
    """What the system does to a process for which there is no memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def _refused(*_: Any) -> None:
    raise MemoryError('Unable to allocate 17.9 GiB')


@pytest.mark.parametrize(
    ('workers', 'fails', 'words'),
    [(1, _ended, 'worker .*(exited|killed)'), (0, _refused, 'allocate 17.9 GiB')],
)
def test_images_that_do_not_fit_are_told_in_one_line(
    make_scene: MakeScene,
    run_cli: RunCli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
    fails: Callable[..., None],
    words: str,
) -> None:
    monkeypatch.setattr(Scenes, '__getitem__', fails)
    code, _, err = embed(
        *(run_cli, make_scene(), '--size', '64', '--num-workers', str(workers)),
        *('--output', tmp_path / 'e.parquet', '--batch-size', '2'),
    )
    assert code == 2
    line = err.splitlines()[-1]
    told = 'error: there seems to be too little memory for batches of 2 chips of 64 '
    assert told in line
    assert re.search(words, line)
    assert 'Traceback' not in err


def test_machines_that_nothing_joins_are_not_waited_for(
    make_scene: MakeScene,
    run_cli: RunCli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ('MASTER_ADDR', 'SLURM_NTASKS', 'LSB_JOBID'):
        monkeypatch.delenv(name, raising=False)
    scene, output = make_scene(), tmp_path / 'e.parquet'
    code, _, err = embed(run_cli, scene, '--output', output, '--nodes', '2')
    assert code == 2
    assert (
        '--nodes 2 (trainer.num_nodes): no launcher has started this on 2 machines'
        in err
    )
    code, _, err = run_cli(
        *('predict', '--data', 'ScenesDataModule', '--data.path', scene),
        *('--model.backbone.weights', 'random', '--writer.path', output),
        *('--trainer.num_nodes', '2', '--trainer.accelerator', 'cpu'),
    )
    assert code == 2
    assert '2 machines' in err.splitlines()[-1]
    assert not output.exists()
