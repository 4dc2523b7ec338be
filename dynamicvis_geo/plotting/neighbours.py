"""The chips that are most like a chip."""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import shapely
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.plotting.colours import stretch_limits, stretch_rgb
from dynamicvis_geo.plotting.features import caption, chip_label, sheet, show
from dynamicvis_geo.plotting.footprints import uncut
from dynamicvis_geo.plotting.maps import LonLat

#: The image ``[3, H, W]`` of a row; None where there is none.
ImageOf = Callable[[int], NDArray[np.generic] | None]

#: The same of a chip.
ImageOfChip = Callable[[pd.Series], NDArray[np.generic] | None]

#: Left, top, width and height, as shares of an image.
Box = tuple[float, float, float, float]

_SLAB = 65_536


def nearest_neighbours(
    embeddings: NDArray[np.floating], query: int, k: int = 8
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Find the embeddings that are most similar to one of them.

    Args:
        embeddings: ``[N, D]``. Rows that are zero or not finite have no direction, and
            are nobody's neighbours.
        query: The row to compare with; it is not its own neighbour.
        k: How many neighbours, fewer if there are fewer.

    Returns:
        The rows, most similar first, and their cosine similarities, -1..1.

    Raises:
        SpecError: If there is no such row, it has no direction, or *k* is below 1.
    """
    if k < 1:
        raise SpecError(f'k={k} is not positive: ask for one neighbour or more')
    if not 0 <= query < len(embeddings):
        raise SpecError(
            f'query={query} is none of the {len(embeddings)} rows; they count from 0'
        )
    direction = embeddings[query].astype(np.float32)
    norm = np.linalg.norm(direction)
    if not (np.isfinite(norm) and norm > 0):
        raise SpecError(
            f'query={query}: its embedding is zero or not finite and has no direction; '
            'choose another chip'
        )
    similarity = np.concatenate(
        [
            _cosine(embeddings[start : start + _SLAB], direction / norm)
            for start in range(0, len(embeddings), _SLAB)
        ]
    )
    similarity[query] = np.nan
    usable = np.flatnonzero(np.isfinite(similarity))
    order = np.argsort(-similarity[usable], kind='stable')[:k]
    rows = usable[order].astype(np.int64)
    return rows, similarity[rows]


def plot_neighbours(
    embeddings: NDArray[np.floating],
    ids: Sequence[str],
    query: int,
    k: int = 8,
    *,
    images: ImageOf | None = None,
    lonlat: LonLat | None = None,
) -> Figure:
    """Draw a chip and its nearest neighbours as a contact sheet.

    Args:
        embeddings: ``[N, D]``.
        ids: The names of the N chips.
        query: The row whose neighbours are looked for.
        k: How many.
        images: Gives the image of a row. All are stretched alike, by the percentiles of
            all images shown.
        lonlat: Longitudes and latitudes ``[N]`` of the chips, degrees: a chip without
            an image is shown as a cross among all chips.

    Returns:
        The figure: id and cosine similarity are written under each panel.

    Raises:
        SpecError: As :func:`nearest_neighbours`, or if *ids* do not fit.
    """
    if len(ids) != len(embeddings):
        raise SpecError(
            f'ids has {len(ids)} entries for {len(embeddings)} embeddings: give one '
            'each'
        )
    rows, similarity = nearest_neighbours(embeddings, query, k)
    if not len(rows):
        raise SpecError(
            'embeddings has no other row with a direction, so there are no neighbours: '
            'give more embeddings'
        )
    shown = [query, *rows.tolist()]
    heads = ['query', *(f'similarity {value:.4f}' for value in similarity)]
    return plot_chips(
        [
            f'{head}\n{chip_label(ids[row])}'
            for head, row in zip(heads, shown, strict=True)
        ],
        [None if images is None else images(row) for row in shown],
        'A chip (first) and those most similar to it, by cosine similarity',
        places=shown,
        lonlat=lonlat,
    )


def plot_chips(
    captions: Sequence[str],
    images: Sequence[NDArray[np.generic] | None],
    title: str,
    *,
    places: Sequence[int],
    lonlat: LonLat | None = None,
    boxes: Sequence[Box | None] | None = None,
    columns: int = 5,
) -> Figure:
    """Draw chips as a contact sheet, those without an image as places.

    Args:
        captions: What is written under each.
        images: ``[3, H, W]`` each, or None. All are stretched alike, by the percentiles
            of all.
        title: Written above all.
        places: Where each is in *lonlat*.
        lonlat: Longitudes and latitudes ``[N]``, degrees: a chip without an image is
            shown as a cross among all of them.
        boxes: Part of each image to outline: left, top, width and height as shares of
            the image; None for none.
        columns: Chips in a row.

    Returns:
        The figure.
    """
    limits = stretch_limits([image for image in images if image is not None])
    figure, panels = sheet(len(captions), columns, title)
    outlines = boxes or [None] * len(captions)
    for panel, text, image, place, box in zip(
        panels, captions, images, places, outlines, strict=True
    ):
        if image is not None:
            show(panel, stretch_rgb(image, limits=limits))
            if box is not None:
                _outline(panel, box, image.shape[1:])
        else:
            _locate(panel, place, lonlat)
        caption(panel, text)
    return figure


def _outline(axes: Axes, box: Box, shape: tuple[int, ...]) -> None:
    height, width = shape
    left, top, across, down = box
    # Pixels are drawn around whole numbers.
    corner = (left * width - 0.5, top * height - 0.5)
    for colour, line in (('black', 2.5), ('white', 1.0)):
        axes.add_patch(
            Rectangle(
                corner,
                across * width,
                down * height,
                fill=False,
                edgecolor=colour,
                linewidth=line,
            )
        )


def _cosine(
    rows: NDArray[np.floating], direction: NDArray[np.float32]
) -> NDArray[np.float32]:
    rows = rows.astype(np.float32)
    with np.errstate(divide='ignore', invalid='ignore'):
        cosine: NDArray[np.float32] = (rows @ direction) / np.linalg.norm(rows, axis=1)
    return np.clip(cosine, -1, 1)


def _locate(axes: Axes, row: int, lonlat: LonLat | None) -> None:
    """Show where a chip is, for want of its image."""
    for spine in axes.spines.values():
        spine.set_visible(True)
    axes.set_box_aspect(1)
    if lonlat is None:
        axes.text(
            0.5, 0.5, 'no image', ha='center', va='center', transform=axes.transAxes
        )
        return
    lon, lat = shapely.get_coordinates(uncut(shapely.points(*lonlat))).T
    axes.scatter(lon, lat, s=2, color='0.75', linewidths=0, rasterized=True)
    axes.scatter(lon[row], lat[row], s=60, marker='x', color='tab:red')
