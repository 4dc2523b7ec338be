"""Images, and feature maps beside them."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.plotting.colours import (
    Limits,
    Picture,
    fit_map_colours,
    map_picture,
    stretch_rgb,
)

_PANEL = 2.2


def plot_rgb(
    image: NDArray[np.generic], title: str | None = None, limits: Limits | None = None
) -> Figure:
    """Draw an image, stretched as :func:`stretch_rgb` does.

    Args:
        image: ``[3, H, W]`` in RGB order, or ``[1, H, W]``; NaN is missing.
        title: Written above it.
        limits: What becomes black and white; the 2nd and 98th percentile by default.

    Returns:
        The figure, in the proportions of the image.

    Raises:
        SpecError: If the image has another number of bands, or no pixels.
    """
    picture = stretch_rgb(image, limits=limits)
    height, width = picture.shape[:2]
    long = 7.0 / max(height, width)
    figure = Figure(
        figsize=(max(width * long, 3.5), max(height * long, 1.0) + 0.5),
        layout='compressed',
    )
    axes = figure.subplots()
    show(axes, picture)
    if title:
        figure.suptitle(title, fontsize=10, wrap=True, parse_math=False)
    return figure


def plot_features(
    image: NDArray[np.generic],
    feature_map: NDArray[np.floating],
    title: str | None = None,
) -> Figure:
    """Draw an image beside the PCA false colour of its feature map.

    Args:
        image: ``[3, H, W]`` in RGB order, any range.
        feature_map: ``[D, h, w]``.
        title: Written above both.

    Returns:
        The figure.

    Raises:
        SpecError: If the image has neither 1 nor 3 bands, or the map fewer than 3
            channels or 3 cells.
    """
    figure = Figure(figsize=(10, 5.4), layout='compressed')
    left, right = figure.subplots(1, 2)
    show(left, stretch_rgb(image))
    left.set_title(f'image, {image.shape[2]} x {image.shape[1]} pixels')
    colours = fit_map_colours([feature_map])
    show(right, map_picture(colours, feature_map))
    channels, height, width = feature_map.shape
    right.set_title(f'features, {width} x {height} cells, {channels} channels')
    caption(right, colours.words)
    if title:
        figure.suptitle(title, parse_math=False)
    return figure


def plot_sheet(
    pictures: Sequence[Picture],
    labels: Sequence[str],
    title: str | None = None,
    columns: int = 6,
) -> Figure:
    """Draw pictures as a contact sheet.

    Args:
        pictures: ``[H, W, 3]`` in 0..1 each, of any sizes.
        labels: What is written under each; may have several lines.
        title: Written above all.
        columns: Pictures in a row.

    Returns:
        The figure.

    Raises:
        SpecError: If there are no pictures.
    """
    if not pictures:
        raise SpecError('pictures is empty: there is nothing to draw')
    figure, axes = sheet(len(pictures), columns, title)
    for panel, picture, label in zip(axes, pictures, labels, strict=True):
        show(panel, picture)
        caption(panel, label)
    return figure


def sheet(count: int, columns: int, title: str | None) -> tuple[Figure, list[Axes]]:
    """Make a figure of panels without ticks.

    Args:
        count: Number of panels.
        columns: Panels in a row.
        title: Written above all.

    Returns:
        The figure and its panels.
    """
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(
        figsize=(max(columns * _PANEL, 3.5), rows * (_PANEL + 0.5) + 0.4),
        layout='compressed',
    )
    panels = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for panel in panels:
        _bare(panel)
    if title:
        figure.suptitle(title, fontsize=10, wrap=True, parse_math=False)
    return figure, panels[:count]


def show(axes: Axes, picture: Picture) -> None:
    """Show a picture without ticks, its pixels as they are.

    Args:
        axes: The panel.
        picture: ``[H, W, 3]`` in 0..1.
    """
    axes.imshow(picture, interpolation='nearest')
    _bare(axes)


def caption(axes: Axes, text: str) -> None:
    """Write under a panel.

    Args:
        axes: The panel.
        text: May have several lines.
    """
    # As the label of an axis, the text gets its room in the layout.
    axes.set_xlabel(text, fontsize=7, parse_math=False)


def _bare(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def chip_names(chips: pd.DataFrame) -> list[str]:
    """Name chips as people know them.

    Args:
        chips: Rows with ``id``; perhaps ``point_id``, ``start`` and ``end``.

    Returns:
        The id of a chip's point, and its dates in a second line; of chips without a
        point their own id, which tells the date.
    """
    names = []
    for _, chip in chips.iterrows():
        point = chip.get('point_id')
        if point is None or pd.isna(point):
            names.append(str(chip['id']))
        else:
            dates = dates_of(chip.get('start'), chip.get('end'))
            names.append(f'{" ".join(str(point).split())}\n{dates}'.rstrip())
    return names


def dates_of(start: pd.Timestamp | None, end: pd.Timestamp | None) -> str:
    """Write a time window in words.

    Args:
        start: Its first moment; NaT if it is not known.
        end: Its end.

    Returns:
        A day, or the first and the last; nothing if it is not known.
    """
    if start is None or pd.isna(start):
        return ''
    if end is not None and end - start > pd.Timedelta(days=1):
        return f'{start:%Y-%m-%d} to {end:%Y-%m-%d}'
    return f'{start:%Y-%m-%d}'


def chip_label(name: str, width: int = 30) -> str:
    """Break the name of a chip at its underscores, into at most three lines in all.

    Args:
        name: The name; what follows in lines of its own is left as it is.
        width: Characters of a line.

    Returns:
        The lines; a longer name ends in an ellipsis.
    """
    name, *rest = name.split('\n')
    lines, most = [''], max(1, 3 - len(rest))
    for word in ' '.join(name.split()).replace('_', '_\0').split('\0'):
        for part in [word[i : i + width] for i in range(0, len(word), width)]:
            if lines[-1] and len(lines[-1]) + len(part) > width:
                lines.append('')
            lines[-1] += part
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1][: width - 1] + '…']
    return '\n'.join([*lines, *rest])
