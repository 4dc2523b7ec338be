import json
import multiprocessing
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import geopandas as gpd
import numpy as np
import pytest
import shapely

from dynamicvis_geo.callbacks.blocks import (
    DESCRIPTION_FILE,
    BlockPlan,
    Description,
    block_name,
    block_size,
    describe,
    finished,
    make_plan,
    offer,
    read_description,
    require_same,
    share,
)
from dynamicvis_geo.callbacks.shards import Shard
from dynamicvis_geo.datasets import ChipDataset
from dynamicvis_geo.errors import OutputError, SpecError
from dynamicvis_geo.samplers import GridSampler, PointSampler
from dynamicvis_geo.store import Store

from ..datasets.rasters import Areas

#: Metres of a chip of 64 pixels.
SIDE = 640
TIMES = [('2023-01-01', '2023-02-01'), ('2022-01-01', '2022-02-01')]


#: Of the four by four chips at two times that a test makes.
FINGERPRINT = '8eb6af1ad2369e483a74af2f555de0b69a117ee1dfc7e09a4044c705dc8b2945'


def begin(store: Store, mine: Description) -> Description:
    """Begin a run, or join one, as each of its processes does."""
    there = offer(store, mine)
    require_same(store, there, mine)
    return there


def plan_of(chips: ChipDataset, block_chips: int, **options: object) -> BlockPlan:
    return make_plan(
        chips.table,
        chips.source_crs,
        block_chips,
        strides=chips.strides,
        point_ids=chips.point_ids,
        **options,  # type: ignore[arg-type]
    )


def grid(
    bounds: tuple[float, float, float, float],
    stride: int | tuple[int, int] | None = None,
    order: str = 'hilbert',
) -> ChipDataset:
    dataset = Areas([shapely.box(*bounds)] * 2, TIMES)
    pairs = [(dataset, GridSampler(dataset, 64, stride))]
    return ChipDataset(pairs, order=order)  # type: ignore[arg-type]


def points(count: int, name: str = 'plot') -> ChipDataset:
    dataset = Areas([shapely.box(-1000, -1000, 51_000, 51_000)])
    xy = np.random.default_rng(0).uniform(0, 50_000, (count, 2))
    frame = gpd.GeoDataFrame(
        {'id': [f'{name} {i}' for i in range(count)]},
        geometry=gpd.points_from_xy(*xy.T),
        crs=dataset.crs,
    )
    return ChipDataset([(dataset, PointSampler(dataset, frame, 32))])


def assert_covers(plan: BlockPlan, chips: ChipDataset) -> None:
    assert sorted(plan.rows) == list(range(len(chips)))
    block_of = plan.block_of(len(chips))
    for number in range(len(plan)):
        rows = plan.block(number)
        assert 0 < len(rows) <= plan.block_chips
        assert (block_of[rows] == number).all()


def test_blocks_of_a_grid_are_aligned_squares_of_one_time() -> None:
    chips = grid((-3 * SIDE, -5 * SIDE, 11 * SIDE, 9 * SIDE))
    plan = plan_of(chips, 20)
    assert_covers(plan, chips)
    table, full = chips.chips, 0
    for number in range(len(plan)):
        part = table.loc[plan.block(number)]
        assert part['start'].nunique() == 1
        west, south = part['minx'] // (4 * SIDE), part['miny'] // (4 * SIDE)
        assert west.nunique() == south.nunique() == 1
        full += len(part) == 16
    # Whole squares: 2 to 11 of -3 to 11 eastwards, -4 to 8 of -5 to 9 northwards.
    assert full == 2 * 2 * 3
    assert len(plan) == 2 * 4 * 5


@pytest.mark.parametrize('stride', [16, 100, (16, 40)])
def test_blocks_of_chips_that_overlap_or_leave_gaps(
    stride: int | tuple[int, int],
) -> None:
    down, across = (stride, stride) if isinstance(stride, int) else stride
    chips = grid((7, 9, 9000, 9000), stride)
    plan = plan_of(chips, 16)
    assert_covers(plan, chips)
    table = chips.chips
    counts = []
    for number in range(len(plan)):
        part = table.loc[plan.block(number)]
        assert (part['minx'] // (4 * across * 10)).nunique() == 1
        assert ((part['maxy'] / (down * 10) - 1) // 4).nunique() == 1
        counts.append(len(part))
    assert max(counts) == 16


def test_a_grid_off_the_origin_is_cut_as_one_on_it() -> None:
    chips = grid((0, 0, 16 * SIDE, 16 * SIDE))
    moved = chips.table.copy()
    for name, offset in (('x', 6.3), ('y', 2.9)):
        moved[name] += offset
    plan = plan_of(chips, 64)
    shifted = make_plan(moved, chips.source_crs, 64, strides=chips.strides)
    assert plan.starts.tolist() == shifted.starts.tolist() == [*range(0, 513, 64)]
    assert plan.rows.tolist() == shifted.rows.tolist()


def test_squares_hang_from_a_given_corner() -> None:
    chips = grid((SIDE, SIDE, 17 * SIDE, 17 * SIDE))
    assert len(plan_of(chips, 64)) == 2 * 9
    corner = SIDE + 0.002, 17 * SIDE - 0.002
    plan = plan_of(chips, 64, origins=[corner])
    assert plan.starts.tolist() == [*range(0, 513, 64)]
    assert plan.fingerprint != plan_of(chips, 64).fingerprint
    assert (
        plan_of(chips, 64, origins=[None]).fingerprint == plan_of(chips, 64).fingerprint
    )


def test_a_square_does_not_depend_on_the_area_asked_for() -> None:
    small = grid((2 * SIDE, 2 * SIDE, 9 * SIDE, 9 * SIDE))
    large = grid((-9 * SIDE, -2 * SIDE, 20 * SIDE, 31 * SIDE))
    corners = [
        {
            frozenset(chips.chips.loc[plan.block(number), 'chip_id'])
            for number in range(len(plan))
            if len(plan.block(number)) == 16
        }
        for chips, plan in ((one, plan_of(one, 16)) for one in (small, large))
    ]
    assert len(corners[0]) == 2
    assert corners[0] < corners[1]


def test_points_are_cut_into_runs_along_the_curve() -> None:
    chips = points(100)
    plan = plan_of(chips, 16)
    assert_covers(plan, chips)
    assert np.diff(plan.starts).tolist() == [16] * 6 + [4]
    table = chips.chips.loc[plan.rows]

    def length(rows: gpd.GeoDataFrame) -> float:
        return float(np.hypot(*np.diff(rows[['minx', 'miny']].T)).sum())

    assert length(table) < length(chips.chips) / 3


def test_sources_are_kept_apart_and_cut_each_in_its_way() -> None:
    one = Areas([shapely.box(0, 0, 4 * SIDE, 4 * SIDE)])
    two = Areas([shapely.box(0, 0, 40 * SIDE, 40 * SIDE)], crs='EPSG:32619')
    queries = list(GridSampler(two, 64))[::97]
    chips = ChipDataset([(one, GridSampler(one, 64)), (two, queries)])
    plan = plan_of(chips, 7)
    assert_covers(plan, chips)
    assert np.diff(plan.starts).tolist() == [4] * 4 + [7, 7, 3]


def test_order_depends_neither_on_block_size_nor_on_order_of_the_table() -> None:
    bounds = (-3 * SIDE, -5 * SIDE, 11 * SIDE, 9 * SIDE)
    ids = []
    for order, size in (('hilbert', 4), ('hilbert', 100), ('sampler', 16)):
        chips = grid(bounds, order=order)
        plan = plan_of(chips, size)
        ids.append(chips.chips['chip_id'].loc[plan.rows].tolist())
        if order == 'hilbert':
            assert plan.rows.tolist() == list(range(len(chips)))
        assert plan.fingerprint == plan_of(grid(bounds), 1).fingerprint
    assert ids[0] == ids[1] == ids[2]


def test_fingerprint_tells_chips_times_and_points_apart() -> None:
    chips = grid((0, 0, 4 * SIDE, 4 * SIDE))
    later, elsewhere = chips.table.copy(), chips.table.copy()
    later['end'] += 1
    elsewhere['x'] += 10
    prints = [
        make_plan(table, chips.source_crs, 16).fingerprint
        for table in (chips.table, later, elsewhere, chips.table[1:])
    ]
    prints += [plan_of(points(9, name), 16).fingerprint for name in ('plot', 'tree')]
    other = Areas([shapely.Point(0, 0)], crs='EPSG:32619')
    prints.append(make_plan(chips.table, [other.crs], 16).fingerprint)
    assert len(set(prints)) == len(prints)
    # Fixed for good: outputs that are begun are gone on with by later versions.
    assert prints[0] == FINGERPRINT


def test_plan_of_some_chips() -> None:
    chips = points(50)
    some = np.arange(3, 50, 2)
    left_out = ~np.isin(np.arange(50), some)
    plan = plan_of(chips, 8, left_out=left_out)
    assert sorted(plan.rows) == some.tolist()
    block_of = plan.block_of(len(chips))
    assert (block_of >= 0).sum() == len(some)
    assert block_of[0] == -1
    order = plan_of(chips, 8).rows
    assert plan.rows.tolist() == order[np.isin(order, some)].tolist()
    assert plan.fingerprint == plan_of(chips, 8).fingerprint
    described = describe(plan, {}, {})
    assert described.id != describe(plan_of(chips, 8), {}, {}).id
    again = plan_of(chips, 8, left_out=described.left_out)
    assert again.rows.tolist() == plan.rows.tolist()
    assert again.starts.tolist() == plan.starts.tolist()


def test_plan_of_nothing() -> None:
    plan = plan_of(ChipDataset([]), 8)
    assert len(plan) == 0
    with pytest.raises(IndexError, match='block 0 of 0'):
        plan.block(0)


@pytest.mark.parametrize('size', [0, -4, 2.5, True, '8'])
def test_wrong_block_size(size: int) -> None:
    with pytest.raises(SpecError, match='block_chips='):
        plan_of(ChipDataset([]), size)


def description(chips: ChipDataset, size: int, **settings: object) -> Description:
    return describe(plan_of(chips, size), settings, {'run': 'of a test'})


def test_a_run_is_begun_by_one_and_joined_by_others(store: Store) -> None:
    assert read_description(store) is None
    mine = description(points(20), 4, weights='abc', bands=('B4', 'B3'), scale=0.1)
    assert begin(store, mine).id == mine.id
    again = replace(mine, provenance={'run': 'later'})
    there = begin(store, again)
    assert there == read_description(store)
    assert there.provenance == {'run': 'of a test'}
    assert (there.chips, there.blocks, there.block_chips) == (20, 5, 4)
    assert store.names() == [DESCRIPTION_FILE]


@pytest.mark.parametrize(
    ('chips', 'size', 'weights', 'differs'),
    [
        (20, 5, 'abc', ['block_chips']),
        (21, 4, 'abc', ['chips']),
        (20, 4, 'xyz', ['weights']),
        (21, 5, 'xyz', ['block_chips', 'chips', 'weights']),
    ],
)
def test_other_settings_are_refused_with_a_table(
    store: Store, chips: int, size: int, weights: str, differs: list[str]
) -> None:
    begin(store, description(points(20), 4, weights='abc', bands=('B4', 'B3')))
    before = store.read(DESCRIPTION_FILE)
    other = description(points(chips), size, weights=weights, bands=('B4', 'B3'))
    with pytest.raises(OutputError, match='other settings') as refused:
        begin(store, other)
    rows = [line.split()[0] for line in str(refused.value).splitlines()[2:-1]]
    assert rows == differs
    assert 'overwrite=True' in str(refused.value)
    assert store.read(DESCRIPTION_FILE) == before


@pytest.mark.parametrize('content', ['', '{', '[]', '{"plan": "abc"}'])
def test_a_damaged_description_is_told(store: Store, content: str) -> None:
    store.put(DESCRIPTION_FILE, content.encode())
    with pytest.raises(OutputError, match=r'run\.json.*damaged'):
        read_description(store)


def test_what_is_done_and_whose_the_rest_is(store: Store) -> None:
    run = begin(store, description(points(50), 4))
    other = description(points(50), 3)
    assert not finished(store, run, '.parquet').any()
    for number in (0, 3, 11):
        store.put(block_name(run, number, '.parquet'), b'')
    store.put(block_name(other, 5, '.parquet'), b'')
    store.put(block_name(run, 6, '.tif'), b'')
    store.put(f'.{block_name(run, 7, ".parquet")}.0f.partial', b'')
    done = finished(store, run, '.parquet')
    assert len(done) == 13
    assert np.flatnonzero(done).tolist() == [0, 3, 11]
    assert share(done, Shard()).tolist() == [1, 2, 4, 5, 6, 7, 8, 9, 10, 12]
    assert share(done, Shard(0, 3)).tolist() == [6, 9, 12]
    assert share(done, Shard(99, 100)).tolist() == []


def test_shards_that_look_at_any_time_do_all_of_it(store: Store) -> None:
    run = begin(store, description(points(50), 3))
    shards = [Shard(i, 7) for i in (3, 0, 6, 1, 5, 2, 4)]
    did = []
    for shard in shards:
        for number in share(finished(store, run, '.x'), shard):
            store.put(block_name(run, number, '.x'), b'')
            did.append(number)
    assert sorted(did) == list(range(17))
    assert finished(store, run, '.x').all()


def test_a_killed_worker_loses_the_block_in_hand_and_nothing_else(
    tmp_path: Path,
) -> None:
    store = Store(str(tmp_path / 'out.partial'))
    run = begin(store, description(points(60), 2))
    context = multiprocessing.get_context('fork')

    def work(shard: Shard, told: Connection) -> None:
        for number in share(finished(store, run, '.x'), shard):
            store.put(block_name(run, number, '.x'), b'%8d' % number * 100_000)
            told.send(number)
        told.close()

    def start(shard: Shard, kill_after: int | None) -> None:
        hears, tells = context.Pipe(duplex=False)
        worker = context.Process(target=work, args=(shard, tells))
        worker.start()
        tells.close()
        if kill_after is not None:
            for _ in range(kill_after):
                hears.recv()
            worker.kill()
        worker.join()

    for kill_after in (1, 4, 2, 0, None):
        start(Shard(1, 2), kill_after)
    assert np.flatnonzero(finished(store, run, '.x')).tolist() == [*range(1, 30, 2)]
    start(Shard(0, 2), None)
    for number in range(30):
        whole = b'%8d' % number * 100_000
        assert store.read(block_name(run, number, '.x')) == whole


def test_shards_divided_among_processes_are_all_there_is() -> None:
    done = np.zeros(40, dtype=bool)
    taken = [
        share(done, Shard(i, 3).within(rank, 4)) for i in range(3) for rank in range(4)
    ]
    assert sorted(np.concatenate(taken)) == list(range(40))


def test_description_is_readable(store: Store) -> None:
    begin(store, description(points(20), 4, weights='abc'))
    content = store.read(DESCRIPTION_FILE)
    assert content is not None
    assert json.loads(content)['settings'] == {'weights': 'abc'}


def test_a_block_has_fewer_chips_where_feature_maps_are_large() -> None:
    many = 10**6
    last, first = (768, 16, 16), (96, 128, 128)
    assert block_size(many, 'grid', 'cuda', 1) == 256
    assert block_size(many, 'grid', 'cuda', 1, last) == 256
    assert block_size(many, 'grid', 'cuda', 1, first) == 32
    assert block_size(many, 'grid', 'cpu', 1, (192, 64, 64)) == 64
    assert block_size(many, 'grid', 'cpu', 1, first) == 32
    assert block_size(many, 'grid', 'cpu', 1, (96, 4096, 4096)) == 1
    assert block_size(many, 'pooled', 'cuda', 1, first) == 4096
    assert block_size(80, 'grid', 'cuda', 4, first) == 5
