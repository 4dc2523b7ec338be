from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd

from dynamicvis_geo.mosaics import Canvas, plot_canvases, side_by_side
from dynamicvis_geo.outputs import open_output
from tests.outputs import write_grid


def test_a_canvas_takes_each_pixel_from_the_cell_below_it(tmp_path: Path) -> None:
    write_grid(tmp_path / 'maps', count=2)
    chips = open_output(tmp_path / 'maps').chips
    canvas = Canvas.of(chips)
    picture = np.random.default_rng(0).random((4, 4, 3)).astype(np.float32)
    canvas.paint(chips.iloc[1], picture)
    assert np.array_equal(canvas.values[:, 4:], picture)
    assert np.isnan(canvas.values[:, :4]).all()
    assert canvas.crs == 'EPSG:32618'


def overlapping(count: int = 3) -> pd.DataFrame:
    """Chips of 8 cells of 10 m in a row, each 4 cells on."""
    west = 40.0 * np.arange(count)
    return pd.DataFrame(
        {'minx': west, 'miny': 0.0, 'maxx': west + 80, 'maxy': 80.0}
    ).assign(width=8, height=8, crs='EPSG:32618')


def test_where_chips_overlap_the_nearest_centre_wins_in_any_order() -> None:
    chips = overlapping()
    for order in ((0, 1, 2), (2, 0, 1)):
        canvas = Canvas.of(chips, 1)
        for i in order:
            canvas.paint(chips.iloc[i], np.full((8, 8, 1), i, np.float32))
        row = canvas.values[4, :, 0].tolist()
        assert row == [0] * 6 + [1] * 4 + [2] * 6


def test_a_missing_cell_covers_nothing() -> None:
    chips = overlapping(2)
    canvas = Canvas.of(chips, 1)
    hole = np.zeros((8, 8, 1), np.float32)
    hole[2, 5] = np.nan
    canvas.paint(chips.iloc[0], hole)
    canvas.paint(chips.iloc[1], np.ones((8, 8, 1), np.float32))
    assert canvas.values[2, 4:7, 0].tolist() == [0, 1, 1]


def test_dates_of_a_place_stand_in_one_row() -> None:
    names = [f'x{i}_512px_2022{m}01-2022{m}28' for m in ('06', '01') for i in range(40)]
    chosen, columns = side_by_side(names, 24)
    assert (len(chosen), columns) == (24, 6)
    pairs = np.reshape([names[i] for i in chosen], (-1, 2))
    assert all(early[:10] == late[:10] and early < late for early, late in pairs)
    series = [f'lake_2022{m:02}01' for m in range(1, 13)] * 4
    assert len(side_by_side(series, 24)[0]) == 24
    assert side_by_side(['b', 'a', 'c'], 24) == ([1, 0, 2], 6)


def test_texts_of_narrow_mosaics_leave_each_other_free() -> None:
    canvas = Canvas.of(overlapping(1).assign(maxy=lambda t: t['miny'] + 2560 * 5), 3)
    names = [f'2024-0{month}-01 to 2024-0{month}-28' for month in (1, 2, 3)]
    pictures = [np.zeros((40, 8, 3), np.float32)] * 3
    figure, panels = plot_canvases(pictures, [canvas] * 3, names)
    figure.draw_without_rendering()
    for texts in ([axes.title for axes in panels], [a.xaxis.label for a in panels]):
        boxes = [text.get_window_extent() for text in texts]
        assert all(a.x1 < b.x0 for a, b in pairwise(boxes))
