import multiprocessing
import signal
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import fsspec
import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dynamicvis_geo.callbacks.blocks import (
    DESCRIPTION_FILE,
    BlockPlan,
    Description,
    block_name,
    describe,
    finished,
    share,
)
from dynamicvis_geo.callbacks.output import Merged, join_blocks
from dynamicvis_geo.callbacks.shards import Shard
from dynamicvis_geo.datasets import ChipDataset
from dynamicvis_geo.datasets.source import ChipFailure
from dynamicvis_geo.errors import OutputError
from dynamicvis_geo.formats import parquet_files
from dynamicvis_geo.formats.base import Predictions
from dynamicvis_geo.formats.block_files import SUFFIX, Blocks, encode_block
from dynamicvis_geo.formats.geoparquet import GeoParquet
from dynamicvis_geo.provenance import read_provenance
from dynamicvis_geo.store import Location, Store
from tests.callbacks.test_blocks import begin, grid, plan_of, points
from tests.formats.conftest import assert_valid
from tests.formats.dies import die_in_merge

NOW = datetime(2024, 5, 6, tzinfo=UTC)
SIDE = 640
ALL = Shard()
PROVENANCE = {'model': {'weights': 'random'}, 'processing:datetime': '2024-05-06'}


class Run:
    """An output on its way: what a writer would do, in one process."""

    def __init__(
        self,
        place: str,
        chips: ChipDataset,
        block_chips: int = 16,
        dtype: str = 'float32',
        fails: frozenset[int] = frozenset(),
    ) -> None:
        self.chips, self.dtype, self.fails = chips, dtype, fails
        self.plan: BlockPlan = plan_of(chips, block_chips)
        self.store, self.target = Store(f'{place}/out.parquet.partial'), Store(place)
        described = describe(self.plan, {'dtype': dtype}, PROVENANCE)
        self.description: Description = begin(self.store, described)

    def features(self, rows: np.ndarray) -> np.ndarray:
        seeds = np.stack([rows * 0.7, np.sin(rows), np.cos(rows)], axis=1)
        return seeds.astype(np.float32)

    def predictions(self, rows: np.ndarray) -> list[Predictions]:
        rows = np.random.default_rng(len(rows)).permutation(rows)
        failures: list[ChipFailure] = [
            ChipFailure(int(row), 'NoImageryError', f'chip {row} has no scene')
            for row in rows
            if row in self.fails
        ]
        good = np.array([row for row in rows if row not in self.fails], np.int64)
        batches = [
            Predictions(part, self.features(part), np.full(len(part), 0.5, np.float32))
            for part in np.array_split(good, 3)
        ]
        none = np.empty((0, 3), np.float32)
        return [*batches, Predictions(good[:0], none, None, tuple(failures))]

    def do(self, shard: Shard = ALL, most: int | None = None) -> None:
        done = finished(self.store, self.description, SUFFIX)
        for number in share(done, shard)[:most].tolist():
            block = self.plan.block(number)
            content = encode_block(
                self.chips, block, self.predictions(block), NOW, self.dtype
            )
            name = block_name(self.description, number, SUFFIX)
            self.store.put(name, memoryview(content))

    def blocks(self) -> Blocks:
        told = self.description
        names = sorted(name for name in self.store.names() if name != DESCRIPTION_FILE)
        return Blocks(
            self.store, names, told.id, told.chip_set, told.chips, told.provenance
        )

    def merge(self, partial: bool = False) -> Merged:
        path = f'{self.target.url}/out.parquet'
        output = GeoParquet(path, self.dtype)
        return join_blocks(output, Location.of(path), self.description, partial)


MakePlace = Callable[[], str]


@pytest.fixture(params=['folder', 'memory'])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakePlace]:
    """Give a place that nothing was written to, as often as asked."""
    if request.param == 'folder':
        yield lambda: str(tmp_path / uuid4().hex)
        return
    root = f'memory://{uuid4().hex}'
    yield lambda: f'{root}/{uuid4().hex}'
    fsspec.filesystem('memory').rm(root, recursive=True)


def read(store: Store, name: str) -> bytes:
    content = store.read(name)
    assert content is not None
    return content


def chips_of_two_times() -> ChipDataset:
    return grid((-3 * SIDE, -5 * SIDE, 11 * SIDE, 9 * SIDE), order='sampler')


def test_all_rows_in_the_order_of_the_plan(tmp_path: Path) -> None:
    run = Run(str(tmp_path), chips_of_two_times())
    run.do()
    assert run.merge() == Merged(rows=392, failed=0, missing=0)
    frame = gpd.read_parquet(tmp_path / 'out.parquet')
    table = run.chips.rows(run.plan.rows)
    assert frame['id'].tolist() == table['chip_id'].tolist()
    assert frame.geometry.geom_equals(table.geometry.reset_index(drop=True)).all()
    expected = run.features(run.plan.rows)
    np.testing.assert_array_equal(np.stack(frame['embedding'].to_list()), expected)
    assert (frame['valid_fraction'] == 0.5).all()
    assert frame.total_bounds == pytest.approx(table.total_bounds)
    provenance = read_provenance(tmp_path / 'out.parquet')
    assert provenance == {
        **PROVENANCE,
        'emb:type': 'chip',
        'emb:dimensions': 3,
        'data_type': 'float32',
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        'out.parquet',
        'out.parquet.partial',
        'out.parquet.stac',
    ]


def test_sharded_killed_and_undisturbed_runs_give_the_same_file(
    place: MakePlace,
) -> None:
    chips = grid((-3 * SIDE, -5 * SIDE, 5 * SIDE, 5 * SIDE), order='sampler')
    undisturbed = Run(place(), chips)
    undisturbed.do()
    undisturbed.merge()
    expected = read(undisturbed.target, 'out.parquet')
    sharded = Run(place(), chips)
    for index in (2, 0, 2, 1):
        sharded.do(Shard(index, 3))
    killed = Run(place(), chips)
    for most in (1, 3, 2, None):
        killed.do(most=most)
    for run in (sharded, killed):
        run.merge()
        assert read(run.target, 'out.parquet') == expected
        run.merge()
        assert read(run.target, 'out.parquet') == expected


@pytest.mark.skipif(not hasattr(signal, 'SIGKILL'), reason='processes are not killed')
def test_a_merge_that_is_killed_leaves_nothing_beside_the_output(
    tmp_path: Path,
) -> None:
    run = Run(str(tmp_path), points(20))
    run.do()
    path = str(tmp_path / 'out.parquet')
    process = multiprocessing.get_context('spawn').Process(
        target=die_in_merge, args=(run.blocks(), path)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert run.target.names() == ['out.parquet.partial']
    run.merge()
    run.store.clear(DESCRIPTION_FILE)
    assert sorted(run.target.names()) == ['out.parquet', 'out.parquet.stac']


def test_size_of_the_blocks_does_not_show(tmp_path: Path) -> None:
    contents = set()
    for size in (1, 7, 64):
        run = Run(str(tmp_path / str(size)), points(30), size)
        run.do()
        run.merge()
        contents.add(read(run.target, 'out.parquet'))
    assert len(contents) == 1


def test_missing_blocks_are_told_or_left_out(place: MakePlace) -> None:
    run = Run(place(), points(100), 10)
    run.do(Shard(1, 3))
    with pytest.raises(OutputError, match='lacks 7 of 10 blocks'):
        run.merge()
    assert run.target.read('out.parquet') is None
    assert run.merge(partial=True) == Merged(rows=30, failed=0, missing=7)
    table = pq.read_table(pa.BufferReader(read(run.target, 'out.parquet')))
    wanted = np.concatenate([run.plan.block(number) for number in (1, 4, 7)])
    names = run.chips.rows(wanted)['chip_id'].tolist()
    assert table['id'].to_pylist() == names
    run.do()
    assert run.merge().rows == 100


@pytest.mark.parametrize('dtype', ['float32', 'float16', 'int8'])
def test_failures_are_listed_and_not_in_the_output(tmp_path: Path, dtype: str) -> None:
    # All of the second block, and some of others; points have ids of their own.
    chips = points(50)
    fails = frozenset(plan_of(chips, 8).block(1).tolist()) | {3, 17}
    run = Run(str(tmp_path), chips, 8, dtype, fails)
    run.do()
    assert run.merge() == Merged(50 - len(fails), len(fails), 0)
    frame = gpd.read_parquet(tmp_path / 'out.parquet')
    assert frame['embedding'].notna().all()
    kept = [row for row in run.plan.rows if row not in fails]
    table = run.chips.rows(kept)
    assert frame['point_id'].tolist() == table['point_id'].tolist()
    assert frame.total_bounds == pytest.approx(table.total_bounds)
    embedding = np.stack(frame['embedding'].to_list()).astype(np.float64)
    if dtype == 'int8':
        embedding *= frame['scale'].to_numpy()[:, None]
    tolerance = {'float32': 0, 'float16': 0.02, 'int8': 0.2}[dtype]
    np.testing.assert_allclose(
        embedding, run.features(np.array(kept)), atol=tolerance, rtol=0
    )
    assert read_provenance(tmp_path / 'out.parquet')['data_type'] == dtype
    failures = gpd.read_parquet(tmp_path / 'out.failures.parquet')
    columns = ['id', 'point_id', 'reason', 'message', 'datetime', 'start', 'end', 'crs']
    assert failures.columns.tolist() == [*columns, 'geometry']
    told = run.chips.rows(sorted(fails))
    assert set(failures['id']) == set(told['chip_id'])
    assert set(failures['point_id']) == set(told['point_id'])
    assert set(failures['reason']) == {'NoImageryError'}
    assert 'chip 17 has no scene' in set(failures['message'])
    assert (failures['datetime'] == pd.Timestamp(NOW)).all()
    assert failures.geometry.is_valid.all()


@pytest.mark.parametrize('chips', [points(1000), grid((0, 0, 16000, 16000))])
def test_the_validator_finds_nothing_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chips: ChipDataset
) -> None:
    # Many row groups of the little that tests write, and failures beside them.
    monkeypatch.setattr(parquet_files, 'ROW_GROUP_BYTES', (1, 2**20))
    run = Run(str(tmp_path), chips, 64, fails=frozenset(range(0, len(chips), 50)))
    run.do()
    run.merge()
    path = tmp_path / 'out.parquet'
    assert pq.read_metadata(path).num_row_groups > 5
    assert_valid(path)
    assert_valid(tmp_path / 'out.failures.parquet')


def test_nothing_but_failures_and_nothing_at_all(tmp_path: Path) -> None:
    run = Run(str(tmp_path / 'one'), points(5), 2, fails=frozenset(range(5)))
    run.do()
    assert run.merge() == Merged(0, 5, 0)
    empty = Run(str(tmp_path / 'two'), ChipDataset([]))
    assert empty.merge() == Merged(0, 0, 0)
    for folder in ('one', 'two'):
        frame = gpd.read_parquet(tmp_path / folder / 'out.parquet')
        assert len(frame) == 0
    assert not (tmp_path / 'two' / 'out.failures.parquet').exists()


def test_a_list_of_failures_that_are_none_any_more_goes(tmp_path: Path) -> None:
    run = Run(str(tmp_path), points(5), 2, fails=frozenset({1}))
    run.do()
    assert run.merge().failed == 1
    run.fails = frozenset()
    for number in range(3):
        run.store.remove(block_name(run.description, number, SUFFIX))
    run.do()
    assert run.merge() == Merged(5, 0, 0)
    assert not (tmp_path / 'out.failures.parquet').exists()


def test_a_block_takes_its_own_chips_each_once() -> None:
    chips = points(20)
    block = plan_of(chips, 8).block(0)

    def batch(rows: np.ndarray, *failures: ChipFailure) -> Predictions:
        features = np.ones((len(rows), 3), np.float32)
        return Predictions(rows, features, None, failures)

    for wrong in (
        [batch(block[1:])],
        [batch(np.append(block, np.setdiff1d(np.arange(20), block)[0]))],
        [batch(block, ChipFailure(int(block[0]), 'Error', 'and there all the same'))],
        [],
    ):
        with pytest.raises(ValueError, match='chip'):
            encode_block(chips, block, wrong, NOW)


def test_a_damaged_block_is_named(tmp_path: Path) -> None:
    run = Run(str(tmp_path), points(20), 8)
    run.do()
    name = block_name(run.description, 1, SUFFIX)
    run.store.put(name, read(run.store, name)[:-20])
    with pytest.raises(OutputError, match=f'{name}.*damaged'):
        run.merge()
    assert run.target.read('out.parquet') is None
    assert sorted(run.target.names()) == ['out.parquet.partial']
