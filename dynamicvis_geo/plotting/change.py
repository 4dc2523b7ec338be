"""Change between two dates: its map, and the places that changed most."""

import numpy as np
import pandas as pd
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure
from numpy.typing import NDArray
from pyproj import CRS

from dynamicvis_geo.change.rasters import Bounds, mosaic
from dynamicvis_geo.change.result import Change
from dynamicvis_geo.change.scores import THRESHOLD
from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.plotting.columns import Key
from dynamicvis_geo.plotting.features import chip_label, chip_names, dates_of
from dynamicvis_geo.plotting.maps import plot_footprints
from dynamicvis_geo.plotting.marks import mark_ground, mark_random_weights
from dynamicvis_geo.plotting.neighbours import Box, ImageOfChip, plot_chips
from dynamicvis_geo.plotting.palette import MISSING, SEQUENTIAL

#: Score with the last colour.
_HIGHEST = 2 * THRESHOLD
_LONG_SIDE = 7.0


def plot_change_map(change: Change) -> Figure:
    """Draw the score of every place on a map, or its distance if there are no scores.

    Args:
        change: As :func:`~dynamicvis_geo.change.find_change` gives it.

    Returns:
        The figure, with a bar of colours, which has a line where places begin to stand
        out. Feature maps on one grid are an image of their cells; of others, a chip has
        the colour of the cell that changed most.
    """
    values, words = change.change, 'change (robust deviations from what is usual)'
    norm = Normalize(0, _HIGHEST, clip=True)
    if change.reason:
        values, words = change.distance, 'cosine distance'
        norm = Normalize(0, max(float(np.nanmax(values)), 1e-6))
    title = f'Change {change.title}'
    band = 1 if change.reason else 0
    try:
        cells = None if change.cell is None else mosaic(change)
    except SpecError:
        cells = None
    scale = ScalarMappable(norm, SEQUENTIAL)
    key = Key(words, scale=scale, beyond='neither' if change.reason else 'both')
    if cells is None:
        figure = _chips(change, values, scale, key, title)
    else:
        crs = str(change.chips['crs'].iloc[0])
        figure = _cells(cells[0][band], cells[1], crs, norm, key, title)
    if not change.reason:
        bar = figure.axes[-1]
        bar.axhline(THRESHOLD, color='white', linewidth=1.5)
        bar.set_yticks([0, THRESHOLD, _HIGHEST])
    mark_random_weights(figure, change.provenance)
    return figure


def plot_change_sheet(
    change: Change,
    k: int = 12,
    before: ImageOfChip | None = None,
    after: ImageOfChip | None = None,
) -> Figure:
    """Draw the places that changed most, each at both dates.

    Args:
        change: As :func:`~dynamicvis_geo.change.find_change` gives it.
        k: How many places.
        before: Gives the image of a chip at the earlier date, such as
            :class:`~dynamicvis_geo.quicklooks.Quicklooks`; all images have one stretch.
            Of a cell that of its chip, in which the cell is outlined.
        after: The same at the later date.

    Returns:
        The figure: under each pair stand the name of the place, of a cell also its row
        and column in its chip, dates and score.

    Raises:
        SpecError: If no place has a distance.
    """
    numbers = change.order(k)
    if not len(numbers):
        raise SpecError('no place has a distance, so that there is nothing to draw')
    later = change.chips.iloc[change.chip[numbers]].reset_index(drop=True)
    earlier = later.assign(
        id=later['before_id'], start=later['before_start'], end=later['before_end']
    )
    captions, images, boxes = [], [], []
    names = chip_names(earlier.drop(columns=['start', 'end']))
    for i, number in enumerate(numbers):
        box = None if change.cell is None else _box(later.iloc[i], change.cell[number])
        name = chip_label(names[i])
        if change.cell is not None:
            row, column = divmod(change.cell[number], int(later['width'].iloc[i]))
            name += f'\ncell row {row}, column {column}'
        score = f'distance {change.distance[number]:.4f}'
        if not change.reason:
            score = f'change {change.change[number]:.1f}, {score}'
        for side, image_of, text in (
            (earlier, before, name),
            (later, after, score),
        ):
            chip = side.iloc[i]
            when = dates_of(chip['start'], chip['end']) or 'no date'
            captions.append(f'{i + 1}: {when}\n{text}')
            images.append(None if image_of is None else image_of(chip))
            boxes.append(box)
    figure = plot_chips(
        captions,
        images,
        f'Places that changed most, before and after, {change.title}',
        places=np.repeat(np.arange(len(later)), 2).tolist(),
        lonlat=(
            later['centre_lon'].to_numpy(float),
            later['centre_lat'].to_numpy(float),
        ),
        boxes=boxes,
        columns=8,
    )
    mark_random_weights(figure, change.provenance)
    return figure


def _chips(
    change: Change,
    values: NDArray[np.float64],
    scale: ScalarMappable,
    key: Key,
    title: str,
) -> Figure:
    highest = np.full(len(change.chips), np.nan)
    np.fmax.at(highest, change.chip, values)
    colours = scale.to_rgba(highest)[:, :3].astype(np.float32)
    colours[np.isnan(highest)] = to_rgb(MISSING)
    grey = np.isnan(highest).any()
    return plot_footprints(
        change.chips.geometry.to_numpy(),
        colours,
        key=key,
        caption='Grey: no vector at one of the dates' if grey else None,
        title=title,
    )


def _cells(
    values: NDArray[np.float32],
    bounds: Bounds,
    crs: str,
    norm: Normalize,
    key: Key,
    title: str,
) -> Figure:
    west, south, east, north = bounds
    shrink = 1.0
    if CRS.from_user_input(crs).is_geographic:
        shrink = max(float(np.cos(np.radians((south + north) / 2))), 0.05)
    ratio = min(max((north - south) / (shrink * (east - west)), 0.3), 2.0)
    width, height = _LONG_SIDE / max(ratio, 1), _LONG_SIDE * min(ratio, 1)
    figure = Figure(figsize=(max(width, 4) + 1.4, height + 1), layout='compressed')
    axes = figure.subplots()
    axes.set_facecolor(MISSING)
    image = axes.imshow(values, cmap=SEQUENTIAL, norm=norm, interpolation='nearest')
    axes.set(xticks=[], yticks=[])
    mark_ground(axes, crs, bounds)
    figure.suptitle(title, fontsize=11, wrap=True, parse_math=False)
    if np.isnan(values).any():
        words = 'Grey: no vector at one of the dates, or no chip'
        figure.supxlabel(words, fontsize=8, wrap=True)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, extend=key.beyond, pad=0.02)
    bar.set_label(key.title, fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return figure


def _box(chip: pd.Series, cell: int) -> Box:
    """Return the part of a chip that a cell covers."""
    row, column = divmod(cell, int(chip['width']))
    height, width = 1 / chip['height'], 1 / chip['width']
    return column * width, row * height, width, height
