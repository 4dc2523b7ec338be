import resource
from collections.abc import Callable
from functools import partial
from pathlib import Path

import geopandas as gpd
import pytest

from dynamicvis_geo import (
    EarthEngineClient,
    EarthEngineDataModule,
    SensorSpec,
    read_provenance,
)
from tests.earthengine_server import EarthEngineServer
from tests.processes import HANG

#: Of a client: project, url, credentials, max_concurrency, timeout, retry_for.
IMPATIENT = (None, None, None, 32, 300.0, 0.5)

RunCli = Callable[..., tuple[int, str, str]]

WINDOW = ('--start', '2022-06-01', '--end', '2022-07-21', '--cloudy-pct', '90')
#: Two points in zone 32 and one in zone 33.
PLOTS = 'id,lon,lat\na,10.3,50.4\nb,12.3,50.4\nc,10.31,50.4\n'
#: A place that no scene of the server's world shows.
NOWHERE = 'id,lon,lat\na,10.3,50.4\nnowhere,10.5,40.5\n'


@pytest.fixture
def options(
    server: EarthEngineServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, ...]:
    monkeypatch.setattr('dynamicvis_geo.earthengine.web.FIRST_WAIT', 0.01)
    (tmp_path / 'plots.csv').write_text(PLOTS)
    (tmp_path / 'nowhere.csv').write_text(NOWHERE)
    place = ('--ee-url', server.url, '--project', 'test-project')
    return (*place, *WINDOW, '--size', '64')


def embed(run_cli: RunCli, *arguments: str | Path) -> tuple[int, str, str]:
    return run_cli('embed', '--weights', 'random', '--device', 'cpu', *arguments)


def test_points_in_two_zones_are_embedded_in_one_run(
    run_cli: RunCli, options: tuple[str, ...], tmp_path: Path
) -> None:
    output = tmp_path / 'e.parquet'
    points = ('--points', tmp_path / 'plots.csv')
    code, out, err = embed(run_cli, *options, *points, '--output', output)
    assert code == 0, err
    assert 'embeddings of 3 chips' in out
    table = gpd.read_parquet(output).set_index('point_id')
    assert table['crs'].to_dict() == {
        'a': 'EPSG:32632',
        'c': 'EPSG:32632',
        'b': 'EPSG:32633',
    }
    assert table['id'].str.endswith('64x64px_10m_20220601-20220721').all()
    assert table.geometry['b'].contains(gpd.points_from_xy([12.3], [50.4])[0])
    assert read_provenance(output)['source']['chips'] == 3


def test_a_chip_for_each_place_and_window(
    run_cli: RunCli, options: tuple[str, ...], tmp_path: Path
) -> None:
    place = (*options[:4], *WINDOW[4:], '--size', '64')
    place = (*place, '--points', str(tmp_path / 'plots.csv'))
    output = tmp_path / 'e.parquet'
    code, out, err = run_cli(
        *('embed', '--weights', 'random', '--output', tmp_path / 'none.parquet'),
        *(*place, '--years', '2018-2020, 2022', '--dry-run'),
    )
    assert code == 0, err
    assert '12 chips of 64 pixels in 2 UTM zones' in out

    code, _, err = embed(run_cli, *options, *place[-2:], '--output', output)
    assert code == 0, err
    before = gpd.read_parquet(output).set_index(['id'])
    # These overlap: each is a composite of its own.
    windows = '2022-06-01/2022-07-21,2022-07-01/2022-08-10'
    several = (*place, '--windows', windows, '--output', output)
    code, out, err = embed(run_cli, *several)
    assert code == 0, err
    assert '6 chips of 64 pixels in 2 UTM zones, 3 of them finished' in err
    assert 'beside 3 from before' in out
    table = gpd.read_parquet(output)
    dates = table.groupby('point_id')[['start', 'end']].agg(
        lambda times: [f'{time:%m%d}' for time in times.dt.round('min')]
    )
    assert dates['start'].tolist() == [['0601', '0701']] * 3
    assert dates['end'].tolist() == [['0721', '0810']] * 3
    table = table.set_index('id')
    assert table.loc[before.index].equals(before[table.columns])
    new = table.index.difference(before.index)
    assert new.str.endswith('_20220701-20220810').all()
    for source in read_provenance(output)['source']['sources']:
        assert ['/'.join(window) for window in source['windows']] == windows.split(',')


def test_area_across_two_zones_is_covered(
    run_cli: RunCli, options: tuple[str, ...], tmp_path: Path
) -> None:
    output = tmp_path / 'e.parquet'
    area = '--roi=11.995,50.4,12.005,50.404'
    code, _, err = embed(run_cli, *options, area, '--output', output)
    assert code == 0, err
    table = gpd.read_parquet(output)
    assert set(table['crs']) == {'EPSG:32632', 'EPSG:32633'}
    covered = table.union_all()
    west, south, east, north = 11.995, 50.4, 12.005, 50.404
    inside = gpd.GeoSeries.from_wkt(
        [
            f'POLYGON (({west} {south}, {east} {south}, {east} {north}, '
            f'{west} {north}, {west} {south}))'
        ]
    )[0]
    assert inside.difference(covered).area < 1e-9


def test_what_was_fetched_ahead_needs_no_server(
    run_cli: RunCli,
    options: tuple[str, ...],
    tmp_path: Path,
    server: EarthEngineServer,
) -> None:
    cache = tmp_path / 'cache'
    where = ('--points', tmp_path / 'plots.csv', '--cache', cache)
    code, out, err = run_cli('fetch', *options, *where)
    assert code == 0, err
    assert 'holds all 3 chips: fetched 3 (0 without imagery)' in out
    code, out, _ = run_cli('fetch', *options, *where)
    assert 'fetched 0' in out
    code, out, _ = run_cli('cache', 'info', cache)
    assert 'holds 3 chips' in out

    gone = [o if o != server.url else 'http://127.0.0.1:9' for o in options]
    output = tmp_path / 'e.parquet'
    code, _, err = embed(run_cli, *gone, *where, '--output', output)
    assert code == 0, err
    assert len(gpd.read_parquet(output)) == 3

    code, out, _ = run_cli('cache', 'clear', cache)
    assert 'Removed 3 chips' in out
    _, out, _ = run_cli('cache', 'info', cache)
    assert 'holds 0 chips' in out


def test_fetching_onto_a_full_disk_fails_in_one_line(
    run_apart: RunCli, options: tuple[str, ...], tmp_path: Path
) -> None:
    cache = tmp_path / 'cache'
    where = ('--points', str(tmp_path / 'plots.csv'), '--cache', str(cache))
    # Files end early, as on a full disk.
    code, _, err = run_apart(
        *('fetch', *options, *where),
        prepare=partial(resource.setrlimit, resource.RLIMIT_FSIZE, (5000, 5000)),
    )
    assert code == 2, err
    (line,) = [line for line in err.splitlines() if 'error' in line]
    assert 'the chip cannot be kept (File too large); free some space' in line
    assert 'Traceback' not in err
    assert not list(cache.rglob('[!.]*.tif'))


def test_a_cache_is_shared_by_the_command_line_and_python(
    run_cli: RunCli, options: tuple[str, ...], tmp_path: Path, server: EarthEngineServer
) -> None:
    cache = tmp_path / 'cache'
    data = EarthEngineDataModule(
        points=tmp_path / 'plots.csv',
        time=('2022-06-01', '2022-07-21'),
        size=64,
        sensor=SensorSpec(cloudy_pct=90),
        client=EarthEngineClient('test-project', server.url),
        cache=cache,
    )
    for dataset, sampler in data.pairs:
        dataset.prefetch(sampler, progress=False)
    where = ('--points', tmp_path / 'plots.csv', '--cache', cache)
    code, out, err = run_cli('fetch', *options, *where)
    assert code == 0, err
    assert 'fetched 0' in out


@pytest.mark.parametrize(
    ('on_missing', 'ids', 'code'),
    [('raise', [], 2), ('skip', ['a'], 3), ('fill', ['a', 'nowhere'], 0)],
)
def test_chips_without_imagery(
    run_cli: RunCli,
    options: tuple[str, ...],
    tmp_path: Path,
    on_missing: str,
    ids: list[str],
    code: int,
) -> None:
    output = tmp_path / 'e.parquet'
    got, out, err = embed(
        run_cli,
        *options,
        *('--points', tmp_path / 'nowhere.csv', '--output', output),
        *('--on-missing', on_missing),
    )
    assert got == code, err
    if on_missing == 'raise':
        assert 'no imagery' in err.splitlines()[-1]
        assert 'x64px_10m_20220601-20220721' in err.splitlines()[-1]
        assert not output.exists()
    else:
        table = gpd.read_parquet(output)
        assert sorted(table['point_id']) == ids
        valid = dict(zip(table['point_id'], table['valid_fraction'], strict=True))
        assert valid.get('nowhere', 0) == 0
        assert valid['a'] > 0
    if on_missing == 'skip':
        failures = tmp_path / 'e.failures.parquet'
        assert f'1 chips have failed: listed in {failures}' in out
        (failure,) = gpd.read_parquet(failures).itertuples()
        assert (failure.point_id, failure.reason) == ('nowhere', 'NoImageryError')
        assert 'no imagery of COPERNICUS/S2_SR_HARMONIZED' in failure.message


def test_an_outage_ends_a_run_that_is_then_continued(
    run_cli: RunCli,
    options: tuple[str, ...],
    tmp_path: Path,
    server: EarthEngineServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / 'e.parquet'
    where = ('--points', tmp_path / 'plots.csv', '--on-error', 'skip')
    where = (*where, '--num-workers', '0', '--batch-size', '1', '--output', output)
    where = (*where, '--max-concurrency', '1')
    # The default of a parameter of a dataclass is that of its class.
    monkeypatch.setattr(EarthEngineClient.__init__, '__defaults__', IMPATIENT)
    # Of the probe, and of each try: what is answered late is no outage.
    for module in ('client', 'web'):
        monkeypatch.setattr(f'dynamicvis_geo.earthengine.{module}.LEAST_TIME', HANG)
    server.set(script=[None, None], kinds=[503], rate=1)
    code, _, err = embed(run_cli, *options, *where, '--block-chips', '1', '--quiet')
    assert code == 2
    assert 'Told to fail with 503. (HTTP status 503); gave up' in err.splitlines()[-1]
    assert not (tmp_path / 'e.failures.parquet').exists()
    server.set()
    code, out, err = embed(run_cli, *options, *where)
    assert code == 0, err
    assert 'beside 2 from before' in out
    assert server.counts()['requests'] == 1


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (('--roi=0,0,1,1', '--year', '2022', '--end', '2023-01-01'), 'or both'),
        (('--roi=0,0,1,1', '--start', '2022-01-01'), '--year, or both'),
        (('--year', '2022', '--roi', '0,0,1,1', '--points', 'p.csv'), 'either --roi'),
        (('--year', '2022'), 'either --roi or --points'),
        (('--roi=0,0,9', '--year', '2022'), '0,0,9'),
        (('--roi=0,0,1,1', '--year', '2022', '--buffer', '9', '--size', '8'), 'either'),
        (('--roi=0,0,1,1', '--year', '2022', '--cloudy-pct', '130'), '--cloudy-pct'),
        ((), 'nothing to embed'),
        (('--roi=0,0,1,1', '--years', '2018', '--year', '2022'), '--year 2022 --years'),
        (('--years', '2020-2018'), 'argument --years: first=2020 is after last=2018'),
        (('--years', '2018-2020,2019'), "'2018-2020,2019' has 2019-01-01/2020-01-01"),
        (('--years', '18'), "'18' is no year: write 2018,2020 or 2018-2024"),
        (('--windows', '2022-06-01'), "argument --windows: '2022-06-01' is no window"),
        (('--windows', '2022-09-01/2022-06-01'), "start='2022-09-01' is not before"),
        (('--windows=2022-06-01/2022-09-01,',), "'' is no window: write START/END"),
        (
            ('--windows=2022-06-01/2022-09-01,20220601/2022-09-01T00:00',),
            'has 2022-06-01/2022-09-01 twice: leave out one',
        ),
    ],
)
def test_options_that_cannot_be_used(
    run_cli: RunCli, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    code, _, err = embed(run_cli, '--output', tmp_path / 'e.parquet', *arguments)
    assert code == 2
    assert words in err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    'option',
    [
        ('--roi=1,2,3,4',),
        ('--year', '2022'),
        ('--start', '2022-01-01'),
        ('--end', '2022-01-01'),
        ('--buffer', '9'),
        ('--scale', '10'),
        ('--cloudy-pct', '0'),
        ('--composite', 'median'),
        ('--cloud-mask', 'scl'),
        ('--on-missing', 'raise'),
        ('--cache', 'chips'),
        ('--project', 'mine'),
        ('--ee-url', 'http://127.0.0.1:9'),
        ('--max-concurrency', '32'),
    ],
)
def test_source_and_earth_engine_exclude_each_other(
    run_cli: RunCli, tmp_path: Path, option: tuple[str, ...]
) -> None:
    output = tmp_path / 'e.parquet'
    code, out, err = embed(run_cli, 'scene.tif', *option, '--output', output)
    assert (code, out) == (2, '')
    (line,) = err.splitlines()
    assert option[0].partition('=')[0] in line
    assert 'SOURCE is scene.tif: leave out one or the other' in line


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (('--roi=0,0,1,1', '--year', '2022', '--bands', '1,2,3'), '--bands 1,2,3 is'),
        (('scene.tif', '--grid', '--pooling', 'mean'), '--pooling mean makes one'),
        (('scene.tif', '--overwrite', '--retry-failed'), '--retry-failed'),
    ],
)
def test_options_that_would_be_ignored_are_refused(
    run_cli: RunCli, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    name = 'maps' if '--grid' in arguments else 'e.parquet'
    code, out, err = embed(run_cli, *arguments, '--output', tmp_path / name)
    assert (code, out) == (2, '')
    (line,) = err.splitlines()
    assert words in line
    assert 'leave' in line


def test_buffer_sets_the_size_on_the_ground(
    run_cli: RunCli, options: tuple[str, ...], tmp_path: Path
) -> None:
    output = tmp_path / 'e.parquet'
    code, _, err = embed(
        run_cli,
        *options[:-2],
        *('--points', tmp_path / 'plots.csv', '--output', output),
        *('--buffer', '500', '--scale', '20'),
    )
    assert code == 0, err
    table = gpd.read_parquet(output)
    assert set(table['width']) == {50}
    assert ((table['maxx'] - table['minx']) == 1000).all()
