"""Runs that share one output, and know nothing of each other."""

import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import geopandas as gpd
import pytest
from torch.utils.data import Subset

from dynamicvis_geo.callbacks import EmbeddingWriter, writer
from dynamicvis_geo.callbacks.output import Destination, Merged, merge
from dynamicvis_geo.errors import OutputError, SpecError
from dynamicvis_geo.formats.parquet_files import GeoParquetWriter
from tests.callbacks.standins import Chips, Task
from tests.callbacks.test_resume import OUTPUTS, Failing, Noise, fail
from tests.callbacks.test_writer import predict, values
from tests.processes import HANG, Start

CHIPS = 40


@pytest.fixture
def same_provenance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all runs have been made at the same time, by the same command."""
    made = {
        'processing:datetime': '2024-05-06T00:00:00+00:00',
        'processing:software': {'dynamicvis-geo': '0'},
        'model': {'weights': 'random'},
        'source': {},
        'run': {},
    }
    monkeypatch.setattr(writer, 'run_provenance', lambda *_: dict(made))


def files(path: Path) -> dict[str, bytes]:
    """Bytes of an output and of its catalogue; nothing else may lie beside it."""
    names = {path.name, f'{path.name}.stac'}
    assert {entry.name for entry in path.parent.iterdir()} == names
    found = [file for file in path.parent.rglob('*') if file.is_file()]
    return {str(f.relative_to(path.parent)): f.read_bytes() for f in found}


def shard(path: Path, format_: str | None, index: int, count: int) -> EmbeddingWriter:
    return EmbeddingWriter(path, format_, block_chips=4, shard=(index, count))


@pytest.mark.usefixtures('same_provenance')
@OUTPUTS
def test_shards_in_any_order_killed_and_again_give_the_same_bytes(
    tmp_path: Path, name: str, output: str, format_: str | None
) -> None:
    for number in range(3):
        (tmp_path / str(number)).mkdir()
    alone = tmp_path / '0' / name
    predict(EmbeddingWriter(alone, format_, block_chips=4), Chips(CHIPS), Task(output))
    expected = files(alone)
    for number in (1, 2):
        path = tmp_path / str(number) / name
        chance = random.Random(number)
        order = chance.sample(range(1, 6), 5)
        for turn, index in enumerate([*order[:3], *order[:2]]):
            run = shard(path, format_, index, 5)
            if turn in (0, number):
                fail(run, Chips(CHIPS), Task(output, fail_at=1))
                run = shard(path, format_, index, 5)
            predict(run, Chips(CHIPS), Task(output))
            assert run.summary is not None
            assert run.summary.missing
        assert f'{name}.partial' in {entry.name for entry in path.parent.iterdir()}
        for index in order[3:]:
            run = shard(path, format_, index, 5)
            predict(run, Chips(CHIPS), Task(output))
        assert run.summary is not None
        assert run.summary.missing == 0
        assert files(path) == expected
        # A shard that comes too late finds nothing to do.
        chips, late = Chips(CHIPS), shard(path, format_, order[0], 5)
        predict(late, chips, Task(output))
        assert chips.asked == []
        assert files(path) == expected


def test_a_shard_says_what_is_left(tmp_path: Path) -> None:
    path = tmp_path / 'a.parquet'
    chips, run = Chips(10), shard(path, None, 2, 3)
    predict(run, chips, Failing())
    assert not path.exists()
    assert run.summary is not None
    assert run.summary.missing == 2
    with pytest.raises(OutputError, match=r'lacks 2 of 3 blocks.*partial=True'):
        merge(path)
    merged = merge(path, partial=True)
    assert merged.missing == 2
    assert merged.rows + merged.failed == len(chips.asked)
    assert len(values(path)) == merged.rows
    for index in (1, 3):
        predict(shard(path, None, index, 3), Chips(10), Failing())
    assert len(values(path)) == 6
    assert merge(path) == Merged(0, 4, 0)
    with pytest.raises(OutputError, match='no blocks to join'):
        merge(tmp_path / 'b.parquet')


@pytest.mark.parametrize('name', ['a.parquet', 'folder'])
def test_a_slow_merge_and_a_quick_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = tmp_path / name
    with monkeypatch.context() as patch:
        patch.setattr(Destination, 'finish', lambda *_: 0)
        writer = EmbeddingWriter(path, 'geoparquet', block_chips=4)
        predict(writer, Chips(CHIPS), Noise(dimensions=50_000))
    begun, go_on = threading.Event(), threading.Event()
    write = GeoParquetWriter.write

    def slow(*arguments: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            begun.set()
            assert go_on.wait(HANG)
        write(*arguments)

    monkeypatch.setattr(GeoParquetWriter, 'write', slow)
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(merge, path)
        try:
            assert begun.wait(HANG)
            quick = merge(path)
            made = gpd.read_parquet(path)
        finally:
            go_on.set()
    assert quick.rows == CHIPS
    # It may have read all blocks before they were removed.
    assert late.result() in (Merged(0, 0, 0), quick)
    assert gpd.read_parquet(path).equals(made)
    assert files(path)


def test_shards_of_array_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level('INFO')
    path = tmp_path / 'a.parquet'
    for name, value in (('MIN', '0'), ('MAX', '1'), ('COUNT', '2')):
        monkeypatch.setenv(f'SLURM_ARRAY_TASK_{name}', value)
    asked = []
    for index in (1, 0):
        monkeypatch.setenv('SLURM_ARRAY_TASK_ID', str(index))
        chips, run = Chips(10), EmbeddingWriter(path, block_chips=2)
        assert f'shard {index + 1}/2, as the array job says' in caplog.text
        predict(run, chips)
        asked += chips.asked
    assert sorted(asked) == list(range(10))
    assert len(values(path)) == 10
    alone = EmbeddingWriter(tmp_path / 'b.parquet', shard='1/1')
    predict(alone, Chips(3))
    assert len(values(tmp_path / 'b.parquet')) == 3


@pytest.mark.parametrize(
    'wrong', [(0, 3), (4, 3), (1, 0), '4/3', 'three', '/3', (1,), 3, (1.5, 3)]
)
def test_no_such_shard(tmp_path: Path, wrong: Any) -> None:
    with pytest.raises(SpecError, match='shard='):
        EmbeddingWriter(tmp_path / 'a.parquet', shard=wrong)


def test_a_shard_overwrites_nothing(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r'overwrite.*shard 1/2'):
        EmbeddingWriter(tmp_path / 'a.parquet', shard=(1, 2), overwrite=True)


def test_a_loader_of_the_users_is_no_shard(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match='ChipDataModule'):
        predict(shard(tmp_path / 'a.parquet', None, 1, 2), Subset(Chips(4), [0, 1]))


@pytest.mark.once
@pytest.mark.parametrize('same', [True, False])
def test_two_runs_on_one_output_at_once(
    start: Start, tmp_path: Path, same: bool
) -> None:
    path = tmp_path / 'a.parquet'
    command = ('-m', 'tests.callbacks.job', path, '--processes', 1)
    chips = (CHIPS, CHIPS if same else CHIPS + 1)
    runs = [start(*command, '--chips', count) for count in chips]
    logs = [run.communicate(timeout=HANG)[0] for run in runs]
    codes = sorted(run.returncode for run in runs)
    # The later of two equal ones may find that the first has made the output.
    told = ' '.join(logs)
    if same:
        assert codes == [0, 0] or 'RunEndedError' in told, told
        assert len(gpd.read_parquet(path)) == CHIPS
    else:
        refused = 'other settings' in told
        assert refused == (codes == [0, 1]), told
        assert len(gpd.read_parquet(path)) in {*chips}
    assert sorted(os.listdir(tmp_path)) == ['a.parquet', 'a.parquet.stac']


@pytest.mark.parametrize('by', ['run', 'merge'])
def test_blocks_that_were_not_all_removed_go_with_the_next_run(
    tmp_path: Path, by: str
) -> None:
    path = tmp_path / 'a.parquet'
    predict(shard(path, None, 1, 1), Chips(CHIPS), Task('pooled'))
    # As the process leaves them that is killed while it removes the blocks.
    left = Path(f'{path}.partial')
    left.mkdir()
    (left / 'block-0123456789ab-00000003.parquet').touch()
    if by == 'run':
        predict(shard(path, None, 2, 3), Chips(CHIPS), Task('pooled'))
    else:
        assert merge(path).rows == 0
    assert not left.exists()
    assert len(gpd.read_parquet(path)) == CHIPS
