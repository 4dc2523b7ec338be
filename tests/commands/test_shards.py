"""Runs of several shards, and what is joined by hand."""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pytest
import torch
from geopandas.testing import assert_geodataframe_equal

from dynamicvis_geo.callbacks.blocks import DESCRIPTION_FILE
from dynamicvis_geo.formats.geotiff import read_feature_map
from dynamicvis_geo.tasks import FeatureExtraction
from tests.earthengine_server import EarthEngineServer

from .conftest import MakeScene

RunCli = Callable[..., tuple[int, str, str]]
Embed = Callable[..., tuple[int, str, str]]

#: The third task of an array of three, as each service tells it.
ARRAYS = [
    {
        'SLURM_ARRAY_TASK_ID': '3',
        'SLURM_ARRAY_TASK_MIN': '1',
        'SLURM_ARRAY_TASK_MAX': '3',
        'SLURM_ARRAY_TASK_COUNT': '3',
    },
    {'BATCH_TASK_INDEX': '2', 'BATCH_TASK_COUNT': '3'},
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def embed(run_cli: RunCli, make_scene: MakeScene, tmp_path: Path) -> Embed:
    """Embed a scene of six chips in as many blocks."""
    options = ('--weights', 'random', '--device', 'cpu', '--size', '64')
    scene = make_scene()

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        return run_cli('embed', scene, *options, '--block-chips', '1', *arguments)

    return run


def blocks(output: Path) -> int:
    folder = output.with_name(f'{output.name}.partial')
    return len(list(folder.glob('block-*')))


@pytest.mark.parametrize(
    ('name', 'options'), [('e.parquet', ()), ('maps', ('--grid',))]
)
def test_shards_in_any_order_make_what_one_run_makes(
    embed: Embed, tmp_path: Path, name: str, options: tuple[str, ...]
) -> None:
    one, shards = tmp_path / 'one' / name, tmp_path / 'shards' / name
    assert embed('--output', one, *options, '--quiet')[0] == 0
    told = []
    for shard in ('2/3', '3/3', '2/3', '1/3'):
        code, out, err = embed('--output', shards, *options, '--shard', shard)
        assert code == 0, err
        own = [line for line in err.splitlines() if 'warning' not in line]
        assert own[0] == f'dynamicvis-geo: this is shard {shard}'
        assert own[1].startswith('dynamicvis-geo: all 3 shards together: 6 chips of 64')
        told.append(out)
    assert '2 chips in' in told[0]
    for text, left in zip(told, (4, 2, 2), strict=False):
        assert f'. {left} blocks are left to other shards; the last of them' in text
        assert f'or dynamicvis-geo merge {shards} does.' in text
    assert told[2].startswith('Done: ')
    assert 'of 0 chips' in told[2]
    assert told[3].startswith(f'Wrote {shards}: ')
    assert 'of 2 chips in' in told[3]
    assert 'beside 4 from before.' in told[3]
    assert not shards.with_name(f'{name}.partial').exists()
    if options:
        found = [sorted(p.name for p in f.glob('*.tif')) for f in (one, shards)]
        assert found[0] == found[1]
        for file in found[0]:
            maps = [read_feature_map(folder / file) for folder in (one, shards)]
            assert np.array_equal(*maps)
    else:
        assert_geodataframe_equal(gpd.read_parquet(shards), gpd.read_parquet(one))
    code, out, _ = embed('--output', shards, *options, '--shard', '1/3')
    assert code == 0
    assert 'of all 6 chips already.' in out


@pytest.mark.parametrize('environment', ARRAYS)
def test_an_array_job_says_which_shard_this_is(
    embed: Embed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    output = tmp_path / 'e.parquet'
    code, out, err = embed('--output', output)
    assert code == 0, err
    assert '4 blocks are left to other shards' in out
    said = 'this is shard 3/3, as the array job says: --shard 1/1'
    assert err.count('this is shard') == err.count(said) == 1
    _, _, err = embed('--output', output, '--shard', '/3')
    assert said in err
    # All of it, in an array job of the user's.
    code, out, err = embed('--output', output, '--shard', '1/1')
    assert code == 0, err
    assert 'this is shard' not in err
    assert f'Wrote {output}' in out
    assert len(gpd.read_parquet(output)) == 6


@pytest.mark.parametrize(
    ('variable', 'count'),
    [('AWS_BATCH_JOB_ARRAY_INDEX', 3), ('JOB_COMPLETION_INDEX', 3)],
)
def test_array_jobs_that_do_not_say_how_many_they_are(
    embed: Embed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    count: int,
) -> None:
    monkeypatch.setenv(variable, '2')
    output = tmp_path / 'e.parquet'
    code, _, err = embed('--output', output)
    assert code == 2
    assert f'{variable}=2' in err.splitlines()[-1]
    assert '--shard /N' in err.splitlines()[-1]
    code, out, _ = embed('--output', output, '--shard', f'/{count}')
    assert code == 0
    assert '4 blocks are left' in out


@pytest.mark.parametrize('shard', ['0/3', '4/3', '3', 'a/b', '1/0', '/3', '', '-1/3'])
def test_bad_shards(embed: Embed, tmp_path: Path, shard: str) -> None:
    code, out, err = embed('--output', tmp_path / 'e.parquet', f'--shard={shard}')
    assert (code, out) == (2, '')
    (line,) = err.splitlines()
    assert re.search(r'--shard.*3/10', line), line
    assert not list(tmp_path.glob('e.parquet*'))


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (('--shard', '1/3', '--overwrite'), r'--overwrite.*shard 1/3.*remove'),
        (('--block-chips', '0'), "--block-chips: '0' must be"),
        (('--shards-at-once', '2'), '--shards-at-once, but SOURCE'),
        (('--flush-chips', '2'), 'unrecognized'),
    ],
)
def test_options_that_do_not_fit(
    embed: Embed, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    code, out, err = embed('--output', tmp_path / 'e.parquet', *arguments)
    assert (code, out) == (2, '')
    assert re.search(words, err.splitlines()[-1]), err


def test_what_is_there_can_be_joined_before_the_end(
    embed: Embed, run_cli: RunCli, tmp_path: Path
) -> None:
    output = tmp_path / 'e.parquet'
    code, _, err = run_cli('merge', output)
    assert code == 2
    assert re.search(r'argument OUT: .*has no blocks to join', err)
    embed('--output', output, '--shard', '2/3')
    code, _, err = run_cli('merge', output)
    assert code == 2
    (line,) = err.splitlines()
    assert 'lacks 4 of 6 blocks' in line
    assert '--partial' in line
    for _ in range(2):
        code, out, err = run_cli('merge', output, '--partial')
        assert (code, err) == (0, '')
        assert out == (
            f'Wrote {output}: 2 chips joined; 4 blocks are missing, which embed still '
            'makes.\n'
        )
    assert len(gpd.read_parquet(output)) == 2
    assert blocks(output) == 2
    # What is left may be divided otherwise.
    code, out, err = embed('--output', output, '--shard', '2/2')
    assert (code, blocks(output)) == (0, 4), err
    code, out, err = embed('--output', output)
    assert code == 0, err
    assert len(gpd.read_parquet(output)) == 6
    assert not blocks(output)


def test_a_merge_that_was_cut_off_is_made_by_hand(
    embed: Embed, run_cli: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / 'e.parquet'

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr('dynamicvis_geo.callbacks.output.Destination.finish', killed)
        assert embed('--output', output)[0] == 130
    assert blocks(output) == 6
    assert run_cli('merge', output)[1] == f'Wrote {output}: 6 chips joined.\n'
    assert len(gpd.read_parquet(output)) == 6
    assert not blocks(output)


def test_other_settings_and_other_places_are_refused_until_the_end(
    embed: Embed, tmp_path: Path
) -> None:
    output = tmp_path / 'e.parquet'
    assert embed('--output', output, '--shard', '1/3')[0] == 0
    begun = (output.with_name('e.parquet.partial') / DESCRIPTION_FILE).read_bytes()
    for arguments, setting in (
        (('--pooling', 'max'), 'pooling'),
        (('--dtype', 'float16'), 'dtype'),
        (('--stride', '32'), 'chips'),
    ):
        code, _, err = embed('--output', output, '--shard', '2/3', *arguments)
        assert code == 2
        assert 'begun with other settings' in err
        assert re.search(rf'^ *\S*{setting}', err, re.MULTILINE), err
    folder = output.with_name('e.parquet.partial')
    assert (folder / DESCRIPTION_FILE).read_bytes() == begun
    # The size of blocks is that with which it was begun.
    code, out, _ = embed('--output', output, '--shard', '2/3')
    assert code == 0
    assert '2 blocks are left' in out


POINTS = 'id,lon,lat\na,10.3,50.4\nb,12.3,50.4\nc,10.31,50.4\nd,10.32,50.41\n'


@pytest.fixture
def earth(server: EarthEngineServer, tmp_path: Path) -> tuple[str | Path, ...]:
    (tmp_path / 'points.csv').write_text(POINTS)
    return (
        *('embed', '--points', tmp_path / 'points.csv', '--size', '64'),
        *('--start', '2022-06-01', '--end', '2022-07-21', '--cloudy-pct', '90'),
        *('--ee-url', server.url, '--project', 'p', '--weights', 'random'),
        *('--device', 'cpu', '--num-workers', '0', '--block-chips', '1', '--quiet'),
        *('--output', tmp_path / 'e.parquet'),
    )


@pytest.mark.parametrize(
    ('at_once', 'peak'),
    [((), 1), (('--shards-at-once', '1'), 2), (('--shards-at-once', '9'), 1)],
)
def test_shards_share_the_limit_of_requests(
    run_cli: RunCli,
    earth: tuple[str | Path, ...],
    server: EarthEngineServer,
    at_once: tuple[str, ...],
    peak: int,
) -> None:
    server.set(latency=0.2)
    for shard in ('1/2', '2/2'):
        code, _, err = run_cli(
            *(*earth, '--max-concurrency', '2', '--shard', shard, *at_once)
        )
        assert code == 0, err
    assert server.counts()['peak'] == peak


def test_shards_at_once_of_a_run_without_shards(
    run_cli: RunCli, earth: tuple[str | Path, ...]
) -> None:
    code, _, err = run_cli(*earth, '--shards-at-once', '2')
    assert code == 2
    assert '--shards-at-once 2 is for one of several shards' in err


def test_failures_are_told_by_the_shard_that_makes_the_output(
    run_cli: RunCli, earth: tuple[str | Path, ...], tmp_path: Path
) -> None:
    (tmp_path / 'points.csv').write_text(f'{POINTS}nowhere,10.5,40.5\n')
    codes = []
    for shard in ('1/2', '2/2'):
        codes.append(run_cli(*earth, '--on-missing', 'skip', '--shard', shard)[0])
    assert codes == [0, 3]
    assert len(gpd.read_parquet(tmp_path / 'e.parquet')) == 4
    (failure,) = gpd.read_parquet(tmp_path / 'e.failures.parquet').itertuples()
    assert failure.point_id == 'nowhere'


@pytest.mark.parametrize('same', [True, False])
def test_a_run_that_another_has_overtaken(
    embed: Embed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same: bool
) -> None:
    output = tmp_path / 'e.parquet'
    step, made = FeatureExtraction.predict_step, []

    def overtaken(*arguments: Any) -> Any:
        if not made:
            made.append(None)
            if same:
                assert embed('--output', output, '--quiet')[0] == 0
                made[0] = output.read_bytes()
            else:
                shutil.rmtree(tmp_path / 'e.parquet.partial')
        return step(*arguments)

    monkeypatch.setattr(FeatureExtraction, 'predict_step', overtaken)
    code, out, err = embed('--output', output, '--quiet')
    left = {entry.name for entry in tmp_path.iterdir() if 'parquet' in entry.name}
    if same:
        assert code == 0, err
        assert out.splitlines()[-1].endswith('another process has made it meanwhile.')
        assert output.read_bytes() == made[0]
        assert left == {'e.parquet', 'e.parquet.stac'}
    else:
        assert code == 2
        assert 'another process has finished it, removed it' in err
        assert not left
