"""Layouts as large as real ones, of which no cell is written."""

import numpy as np
import pytest
from pyproj import CRS

from dynamicvis_geo.callbacks.blocks import make_plan
from dynamicvis_geo.datasets.chip_table import CHIP
from dynamicvis_geo.formats.zarr_cells import Sites
from dynamicvis_geo.formats.zarr_layout import ChipGrid, Layout

WEST, NORTH = 500_000.0, 4_000_000.0
MAPS = 768, 16, 16


def lattice(rows: int, columns: int, stride: int) -> np.ndarray:
    """Chips of 512 pixels of 10 m, in a random order."""
    chips = np.zeros(rows * columns, CHIP)
    number = np.random.default_rng(0).permutation(len(chips))
    chips['x'] = WEST + number % columns * stride * 10
    chips['y'] = NORTH - number // columns * stride * 10
    chips['width'] = chips['height'] = 512
    chips['xres'] = chips['yres'] = 10
    return chips


def layout_of(chips: np.ndarray, square: int | None) -> Layout:
    return Layout.plan(ChipGrid.of('here', chips), chips, MAPS, 'float32', square)


def test_shards_are_as_large_as_files_and_blocks_allow() -> None:
    chips = lattice(100, 130, 512)
    # 64 MB are 85 chips, and 8 x 8 of them the largest square.
    sides = {square: layout_of(chips, square).shard for square in (1, 2, 8, 64)}
    assert sides == {1: (16, 16), 2: (32, 32), 8: (128, 128), 64: (128, 128)}
    small = layout_of(lattice(3, 130, 512), 64)
    assert small.shard == (48, 128)
    assert (small.cells.x, small.cells.y) == (WEST, NORTH)
    assert layout_of(chips, None).shard == (144, 144)


@pytest.mark.parametrize(
    ('rows', 'shard', 'margin'), [(300, 128, 124), (150, 64, 60), (40, 16, 12)]
)
def test_the_margin_of_overlapping_chips_is_a_sixteenth(
    rows: int, shard: int, margin: int
) -> None:
    layout = layout_of(lattice(rows, 400, 256), 16)
    assert layout.shard == (shard, shard)
    assert layout.cells.height == rows * 8 + 8 + margin
    assert layout.cells.y == NORTH + margin * 320
    # One block holds all of these.
    layout = layout_of(lattice(16, 16, 256), 16)
    assert (layout.cells.x, layout.cells.y, layout.cells.height) == (WEST, NORTH, 136)


@pytest.mark.parametrize('stride', [512, 480, 256, 160, 96, 1024])
@pytest.mark.parametrize('block_chips', [64, 300])
def test_no_shard_of_a_full_grid_is_of_two_blocks(
    stride: int, block_chips: int
) -> None:
    chips = lattice(37, 53, stride)
    plan = make_plan(
        chips,
        [CRS('EPSG:32618')],
        block_chips,
        strides=[(stride, stride)],
        origins=[(WEST, NORTH)],
    )
    layout = layout_of(chips, plan.square)
    every = np.arange(len(chips))
    sites = Sites.of(layout, layout.place(chips), every, plan.block_of(len(chips)))
    seen = np.zeros(len(chips), dtype=bool)
    for shard in layout.shards_of(sites.places):
        owners = np.unique(sites.owners(shard))
        owners = owners[owners >= 0]
        seen[sites.chip[owners]] = True
        assert len(np.unique(sites.block[owners])) <= 1
    assert seen.all()
