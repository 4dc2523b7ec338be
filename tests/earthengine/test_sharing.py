import numpy as np
import pytest

from dynamicvis_geo.earthengine.fetch import Chip, Request, plan
from dynamicvis_geo.grid import Grid

LIMIT = 48 * 2**20 // 9
WINDOW = ('2022-06-01', '2022-07-01')


def chip(
    row: float, col: float, px: int = 256, window: tuple[str, str] = WINDOW
) -> Chip:
    return Chip(
        Grid('EPSG:32632', 10 * col, -10 * row, px, px, 10, 10), window, f'{row}_{col}'
    )


def rectangle(rows: int, cols: int, stride: int, px: int = 256) -> list[Chip]:
    return [chip(r * stride, c * stride, px) for r in range(rows) for c in range(cols)]


def fetched(chips: list[Chip], requests: list[Request]) -> int:
    """Check that requests hold all pixels of all chips once; return how many."""
    for i, one in enumerate(chips):
        covered = np.zeros(one.grid.shape, int)
        for request in requests:
            if i in request.chips:
                assert request.window == one.window
                row, col = one.grid.offset(request.grid)
                top, left = max(row, 0), max(col, 0)
                covered[
                    top : max(row + request.grid.height, 0),
                    left : max(col + request.grid.width, 0),
                ] += 1
        assert (covered == 1).all(), one.id
    return sum(request.grid.size for request in requests)


def test_chips_side_by_side_share_blocks() -> None:
    chips = rectangle(8, 8, 256)
    requests = plan(chips, 1024, LIMIT)
    assert len(requests) == 4
    assert fetched(chips, requests) == (8 * 256) ** 2


def test_blocks_hold_whole_chips_whatever_their_size() -> None:
    chips = rectangle(6, 6, 300, 300)
    requests = plan(chips, 1024, LIMIT)
    assert len(requests) == 4
    assert {len(request.chips) for request in requests} == {9}


def test_overlapping_chips_fetch_each_pixel_once() -> None:
    chips = rectangle(12, 12, 64)
    requests = plan(chips, 512, LIMIT)
    assert fetched(chips, requests) == (11 * 64 + 256) ** 2
    assert len(requests) == 4


def test_scattered_chips_have_a_request_each() -> None:
    random = np.random.default_rng(1)
    chips = [chip(r, c) for r, c in random.integers(0, 10**6, (50, 2)).tolist()]
    requests = plan(chips, 1024, LIMIT)
    assert len(requests) == 50
    assert all(len(request.chips) == 1 for request in requests)


def test_touching_corners_are_not_worth_a_block() -> None:
    chips = [chip(0, 0), chip(255, 255)]
    assert fetched(chips, plan(chips, 1024, LIMIT)) == 2 * 256**2


def test_ragged_rims_fetch_nothing_that_is_not_needed() -> None:
    chips = rectangle(4, 4, 256)[:-3]
    requests = plan(chips, 512, LIMIT)
    assert fetched(chips, requests) == 13 * 256**2
    assert len(requests) < 13


def test_the_same_chip_twice_is_fetched_once() -> None:
    chips = [chip(0, 0), chip(0, 0)]
    (request,) = plan(chips, 1024, LIMIT)
    assert request.chips == (0, 1)


@pytest.mark.parametrize(
    'other',
    [
        chip(0, 256.5),
        chip(0, 256, window=('2022-07-01', '2022-08-01')),
        Chip(Grid('EPSG:32633', 2560, 0, 256, 256, 10, 10), WINDOW, ''),
        Chip(Grid('EPSG:32632', 2560, 0, 256, 256, 20, 20), WINDOW, ''),
    ],
)
def test_only_chips_of_one_lattice_and_window_share(other: Chip) -> None:
    assert len(plan([chip(0, 0), other], 1024, LIMIT)) == 2


@pytest.mark.parametrize('block', [1, 64])
def test_chips_larger_than_a_block_stay_whole(block: int) -> None:
    chips = rectangle(2, 2, 512, 512)
    requests = plan(chips, block, LIMIT)
    assert [request.chips for request in requests] == [(0,), (1,), (2,), (3,)]


@pytest.mark.parametrize(('px', 'count'), [(2364, 1), (2365, 4), (5000, 9)])
def test_a_chip_too_large_for_a_request_is_cut(px: int, count: int) -> None:
    chips = [chip(0.25, 7, px)]
    requests = plan(chips, 1024, LIMIT)
    assert len(requests) == count
    assert fetched(chips, requests) == px**2
    assert all(request.grid.size <= LIMIT for request in requests)


def test_blocks_stay_within_the_limit_of_a_request() -> None:
    chips = rectangle(20, 20, 256)
    requests = plan(chips, 10**6, LIMIT)
    assert max(request.grid.size for request in requests) <= LIMIT
    assert fetched(chips, requests) == (20 * 256) ** 2
