"""Maps of chips put together, one mosaic a CRS and time window."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from pyproj import CRS
from tqdm import tqdm

from dynamicvis_geo.formats.base import spread
from dynamicvis_geo.plotting.colours import MISSING, Picture
from dynamicvis_geo.plotting.features import dates_of, sheet, show
from dynamicvis_geo.plotting.marks import mark_ground

#: Chips that scatter over more than this many times their own area are not a mosaic.
MAX_SPREAD = 8.0
#: Most rows and columns of a mosaic: it is to be looked at.
MAX_PIXELS = 1600
#: Most mosaics of one figure.
MAX_PANELS = 12

_COLUMNS = 6
# A day, or two, as ids of chips and names of scenes have them.
_DAYS = re.compile(r'(?<!\d)(?:19|20)\d{6}(?!\d)')

Bounds = tuple[float, float, float, float]


@dataclass(frozen=True)
class Canvas:
    """An area, into which maps of chips are painted.

    Where chips overlap, a pixel shows the chip whose centre is nearest: cells at the
    edge of a chip were computed without what lies beyond it, and differ from those of
    its neighbour, which is seen as a seam. Chips that share half of their cells show
    none of the outer quarters.

    Attributes:
        values: Float32 ``[H, W, C]``; NaN where there is no map.
        bounds: West, south, east and north, CRS units.
        crs: Name of the CRS.
    """

    values: NDArray[np.float32]
    bounds: Bounds
    crs: str
    _nearest: NDArray[np.float32]

    @classmethod
    def of(cls, chips: pd.DataFrame, channels: int = 3) -> 'Canvas':
        """Make one for chips of one CRS: no finer than their cells, nor too large.

        Args:
            chips: Rows of :attr:`.Output.chips`.
            channels: Values of a pixel.
        """
        west, south = chips[['minx', 'miny']].min()
        east, north = chips[['maxx', 'maxy']].max()
        cell = min(
            ((chips['maxx'] - chips['minx']) / chips['width']).min(),
            ((chips['maxy'] - chips['miny']) / chips['height']).min(),
        )
        pixel = max(cell, max(east - west, north - south) / MAX_PIXELS)
        height, width = (
            max(1, round(side / pixel)) for side in (north - south, east - west)
        )
        return cls(
            np.full((height, width, channels), np.nan, np.float32),
            (west, south, east, north),
            str(chips['crs'].iloc[0]),
            np.full((height, width), np.inf, np.float32),
        )

    @classmethod
    def painted(
        cls,
        chips: pd.DataFrame,
        maps: Iterable[NDArray[np.floating]],
        channels: int = 3,
    ) -> 'Canvas':
        """Make one, and paint the maps of all its chips; many show how far they are.

        Args:
            chips: Rows of :attr:`.Output.chips`.
            maps: ``[h, w, C]`` of each.
            channels: Values of a pixel.
        """
        canvas, count = cls.of(chips, channels), len(chips)
        for (_, chip), values in zip(
            chips.iterrows(),
            tqdm(maps, total=count, unit='map', disable=count < 100, leave=False),
            strict=True,
        ):
            canvas.paint(chip, values)
        return canvas

    def paint(self, chip: pd.Series, values: NDArray[np.floating]) -> None:
        """Paint the map of a chip where it lies, from the cells at pixel middles.

        Args:
            chip: Row of :attr:`.Output.chips`.
            values: ``[h, w, C]``, of any size; what is not finite covers nothing.
        """
        west, south, east, north = self.bounds
        rows, i, down = _cells(
            (north - chip['maxy']) / (north - south),
            (north - chip['miny']) / (north - south),
            self.values.shape[0],
            values.shape[0],
        )
        columns, j, across = _cells(
            (chip['minx'] - west) / (east - west),
            (chip['maxx'] - west) / (east - west),
            self.values.shape[1],
            values.shape[1],
        )
        here, part = np.ix_(rows, columns), values[np.ix_(i, j)]
        distance = (down[:, None] ** 2 + across**2).astype(np.float32)
        # Of several centres as near, the first: sums of rounded numbers tell no order.
        closer = distance < self._nearest[here] * (1 - 1e-6)
        closer &= np.isfinite(part).all(axis=-1)
        self.values[here] = np.where(closer[..., None], part, self.values[here])
        self._nearest[here] = np.where(closer, distance, self._nearest[here])

    def areas(self) -> NDArray[np.float64]:
        """Return the areas of the pixels, ``[H, W]``, in a unit of their own.

        Pixels of a projected CRS count as equal, degrees as they are on the ground.
        """
        height, width = self.values.shape[:2]
        rows = np.ones(height)
        if CRS.from_user_input(self.crs).is_geographic:
            _, south, _, north = self.bounds
            middles = north - (np.arange(height) + 0.5) / height * (north - south)
            rows = np.cos(np.radians(middles))
        return np.repeat(rows[:, None], width, axis=1)


def _cells(
    first: float, last: float, pixels: int, cells: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Return the pixels whose middles lie from *first* to *last*.

    Also gives the cells that these lie in, and their distances from the middle, in
    pixels.
    """
    index = np.arange(pixels)
    share = ((index + 0.5) / pixels - first) / (last - first)
    inside = (share >= 0) & (share < 1)
    share = share[inside]
    cell = np.floor(share * cells).astype(np.int64)
    return index[inside], cell, (share - 0.5) * (last - first) * pixels


def groups(chips: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Divide chips by CRS and time window.

    Args:
        chips: Rows of :attr:`.Output.chips`.

    Yields:
        The time window in words, and the rows; of one CRS the earliest first.
    """
    for _, rows in chips.groupby(['crs', 'start', 'end'], dropna=False):
        yield dates_of(*rows[['start', 'end']].iloc[0]), rows


def side_by_side(names: Sequence[str], most: int) -> tuple[list[int], int]:
    """Choose what a contact sheet shows: of a place all dates, one beside the other.

    Args:
        names: Ids of chips or names of scenes, which hold their dates as eight digits.
        most: Pictures of the sheet, at most.

    Returns:
        Numbers of the names, dates of a place in their order; and the columns that keep
        them in a row.
    """
    places: dict[str, list[int]] = {}
    for i in sorted(range(len(names)), key=names.__getitem__):
        places.setdefault(_DAYS.sub('', names[i]), []).append(i)
    dates = min(most, max(map(len, places.values())))
    shown = [list(places.values())[i] for i in spread(len(places), most // dates)]
    columns = dates * max(1, _COLUMNS // dates)
    return [one[i] for one in shown for i in spread(len(one), dates)], columns


def compact(chips: pd.DataFrame) -> bool:
    """Tell if chips lie close enough together for a mosaic.

    Args:
        chips: Rows of :attr:`.Output.chips`, of one CRS.
    """
    area = ((chips['maxx'] - chips['minx']) * (chips['maxy'] - chips['miny'])).sum()
    across = (chips['maxx'].max() - chips['minx'].min()) * (
        chips['maxy'].max() - chips['miny'].min()
    )
    return bool(across <= MAX_SPREAD * area)


def plot_canvases(
    pictures: Sequence[Picture],
    canvases: Sequence[Canvas],
    names: Sequence[str],
    title: str | None = None,
) -> tuple[Figure, list[Axes]]:
    """Draw mosaics, a panel each.

    Args:
        pictures: ``[H, W, 3]`` in 0..1 each, of the values of the canvases; NaN where
            there is nothing.
        canvases: The canvas of each.
        names: Written above each.
        title: Written above all.

    Returns:
        The figure and its panels.
    """
    count = len(pictures)
    columns = min(count, 3)
    figure, panels = sheet(count, columns, title)
    # A row has a square panel and its texts; all rows the title, and perhaps a legend.
    height = (10 / columns + 0.6) * -(-count // columns) + 0.6
    figure.set_size_inches(*((8, 8) if count == 1 else (10, height)))
    if any(picture.shape[0] > 1.5 * picture.shape[1] for picture in pictures):
        # Texts are wider than such panels, which must not move together.
        figure.set_layout_engine('constrained')
    for axes, picture, canvas, name in zip(
        panels, pictures, canvases, names, strict=True
    ):
        show(axes, np.nan_to_num(picture, nan=MISSING))
        # Above the scale bar, which is as wide as narrow panels leave room for.
        axes.set_title(name, fontsize=9, pad=16, parse_math=False)
        mark_ground(axes, canvas.crs, canvas.bounds)
    return figure, panels
