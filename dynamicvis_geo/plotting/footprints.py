"""Footprints on maps in longitude and latitude."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import shapely
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.path import Path
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from dynamicvis_geo.plotting.cartography import (
    decimals,
    degrees,
    draw_north,
    draw_scale_bar,
    extent_words,
    metres_per_degree,
)
from dynamicvis_geo.plotting.colours import Picture
from dynamicvis_geo.plotting.columns import Key
from dynamicvis_geo.plotting.marks import add_legend

Shapes = NDArray[np.object_]

#: Resolution of figures, pixels an inch.
DPI = 150

# Footprints smaller than this, in pixels of the picture, become points.
_SMALLEST = 4.0
# Footprints from this size on are told apart by a thin line.
_OUTLINED = 16.0
_OUTLINE = '0.35'
# Of ticks: a step of 2.5 needs a decimal more.
_STEPS = (1, 2, 5, 10)
# Long side of a panel in inches, by the number of panels beside each other.
_LONG_SIDES = {1: 8.0, 2: 5.4, 3: 4.2}
# Most height of a panel, as a multiple of its width.
_TALLEST = {1: 2.0, 2: 2.0, 3: 1.6}
_CROSS: Mapping[str, Any] = {
    'marker': 'X',
    'markersize': 8,
    'markerfacecolor': 'black',
    'markeredgecolor': 'white',
    'linestyle': 'none',
}


def split_parts(
    shapes: Sequence[Any] | Shapes,
) -> tuple[Shapes, NDArray[np.intp]]:
    """Return the parts of geometries that have a place, and whose they are."""
    parts, owner = shapely.get_parts(np.asarray(shapes, dtype=object), True)
    there = ~(shapely.is_missing(parts) | shapely.is_empty(parts))
    return parts[there], owner[there]


def uncut(shapes: Shapes) -> Shapes:
    """Count longitudes on beyond 180 degrees where that keeps geometries together."""
    boxes = shapely.bounds(shapes)
    west_of = boxes[:, [0, 2]].mean(axis=1) < _western_edge(boxes)
    shapes = shapes.copy()
    shapes[west_of] = shapely.transform(
        shapes[west_of], lambda xy: np.add(xy, [360, 0])
    )
    return shapes


def _western_edge(boxes: NDArray[np.float64]) -> float:
    """Find where to cut the globe: east of the widest gap between footprints.

    A gap that lies across the antimeridian, or that is no wider than that one, leaves
    the longitudes as they are.
    """
    if len(boxes) < 2:
        return -180.0
    order = np.argsort(boxes[:, 0])
    starts = boxes[order, 0]
    ends = np.maximum.accumulate(boxes[order, 2])
    gaps = starts[1:] - ends[:-1]
    outer = starts[0] + 360 - ends[-1]
    if gaps.max() <= outer:
        return -180.0
    return float(starts[1:][gaps.argmax()])


class MapFigure:
    """A figure with one or more panels that show the same area.

    Attributes:
        figure: The figure.
        panels: Axes in longitude and latitude, in their order.
    """

    def __init__(
        self, shapes: Shapes, panels: int, lines: int, key_inches: float
    ) -> None:
        """Make the panels, with their scale bar and north.

        Args:
            shapes: All that is to be shown, in degrees.
            panels: Their number.
            lines: Lines of text above and below them.
            key_inches: Width of the key beside them.
        """
        boxes = shapely.bounds(shapes)
        self._low, self._high = boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)
        margin = np.maximum(0.03 * (self._high - self._low).max(), 1e-4)
        low, high = self._low - margin, self._high + margin
        # At the poles a degree of longitude has no length; the map must have a width.
        shrink = max(np.cos(np.radians((low[1] + high[1]) / 2)), 0.05)
        columns = min(panels, max(_LONG_SIDES))
        rows = -(-panels // columns)
        wide, tall = (high - low) * [shrink, 1]
        # Neither a thread nor narrower than the texts above and below.
        full = np.array([max(wide, tall / _TALLEST[columns]), max(tall, 0.3 * wide)])
        more = (full - [wide, tall]) / [shrink, 1] / 2
        low, high = low - more, high + more
        wide, tall = full
        ratio = tall / wide
        side = _LONG_SIDES[columns]
        width, height = side / max(ratio, 1), side * min(ratio, 1)
        inches = (
            columns * width + 0.9 + key_inches,
            rows * (height + 0.7) + 0.4 + 0.25 * lines,
        )
        self.figure = Figure(figsize=inches, layout='compressed')
        grid = self.figure.subplots(
            rows, columns, sharex=True, sharey=True, squeeze=False
        )
        self.panels: list[Axes] = list(grid.flat)[:panels]
        for empty in list(grid.flat)[panels:]:
            empty.remove()
        first = self.panels[0]
        first.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
        places = decimals(float((high - low).max()))
        for axes in self.panels:
            axes.set_aspect(1 / shrink)
            _set_ticks(axes, 5 if width > 5 else 3, 6 if height > 4 else 4, places)
        self._scale = metres_per_degree(low[1], high[1])
        if self._scale is not None:
            draw_scale_bar(first, self._scale)
        draw_north(first)
        per_degree = min(width / wide, height / tall)
        self._pixels = np.array([per_degree * shrink, per_degree]) * DPI

    @property
    def words(self) -> str:
        """The CRS and the extent, and the scale at which degrees are drawn."""
        words = extent_words('EPSG:4326', (*self._low, *self._high))
        middle = degrees((self._low[1] + self._high[1]) / 2, 'NS', 1)
        words += f'; degrees drawn at the scale of {middle}'
        if self._scale is None:
            words += ', which is not that of the whole map: no scale bar'
        return words

    def draw(self, axes: Axes, shapes: Shapes, colours: Picture) -> None:
        """Draw polygons, or points where polygons would be too small to see."""
        boxes = shapely.bounds(shapes)
        sides = (boxes[:, 2:] - boxes[:, :2]) * self._pixels
        large = sides.max(axis=1) > 0
        side = float(np.median(sides[large].min(axis=1))) if large.any() else 0.0
        large &= side >= _SMALLEST
        # Not GeoSeries.plot, which imports pyplot.
        if large.any():
            outlined = side >= _OUTLINED
            axes.add_collection(
                PathCollection(
                    [_path(one) for one in shapes[large]],
                    facecolors=colours[large],
                    edgecolors=_OUTLINE if outlined else colours[large],
                    linewidths=0.3 if outlined else 0.2,
                    rasterized=True,
                )
            )
        if large.all():
            return
        # Many points are small.
        size = float(np.clip(20_000 / len(shapes), 2.0, 24.0))
        x, y = _middles(boxes[~large]).T
        axes.scatter(
            x,
            y,
            c=colours[~large],
            s=size,
            edgecolors=_OUTLINE if size > 8 else 'none',
            linewidths=0.3,
            rasterized=True,
        )

    def cross(self, axes: Axes, shapes: Shapes) -> None:
        """Draw crosses, for failures."""
        if len(shapes):
            middles = _middles(shapely.bounds(shapes))
            axes.plot(*middles.T, zorder=3, rasterized=True, **_CROSS)

    def explain(self, key: Key, failures: int) -> None:
        """Draw the key beside the panels: a legend, a colour bar or both."""
        handles: list[Artist] = [
            Patch(facecolor=colour, edgecolor=_OUTLINE, linewidth=0.3, label=words)
            for words, colour in key.classes.items()
        ]
        if failures:
            handles.append(Line2D([], [], label=f'failed ({failures:,})', **_CROSS))
        if handles and key.scale is None:
            add_legend(
                self.figure,
                handles,
                loc='outside right upper',
                title=key.title,
                ncols=-(-len(handles) // self._legend_rows),
            )
        elif handles:
            add_legend(
                self.figure, handles, loc='outside upper right', ncols=len(handles)
            )
        if key.scale is not None:
            bar = self.figure.colorbar(
                key.scale, ax=self.panels, shrink=0.8, extend=key.beyond, pad=0.02
            )
            bar.set_label(key.title, fontsize=9, parse_math=False)
            bar.ax.tick_params(labelsize=8)
            bar.ax.ticklabel_format(axis='y', useOffset=False)

    @property
    def _legend_rows(self) -> int:
        return max(4, int(4.5 * self.figure.get_figheight()))


def key_inches(key: Key, failures: int) -> float:
    """Guess the width of what stands beside a map, inches."""
    if key.scale is not None:
        return 0.9
    words = [*key.classes, *['failed (1,000)'] * bool(failures)]
    return 0.5 + 0.07 * max(map(len, [key.title, *words])) if words else 0.0


def _path(shape: Any) -> Path:
    """Return the outline of a part, with its holes."""
    if shape.geom_type != 'Polygon':
        return Path(shapely.get_coordinates(shape))
    # Holes run the other way around than what they are in.
    rings = shapely.get_rings(shapely.normalize(shape))
    return Path.make_compound_path(*(Path(ring.coords, closed=True) for ring in rings))


def _middles(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    middles: NDArray[np.float64] = (boxes[:, :2] + boxes[:, 2:]) / 2
    return middles


def _set_ticks(axes: Axes, across: int, down: int, places: int) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(across, steps=_STEPS))
    axes.yaxis.set_major_locator(MaxNLocator(down, steps=_STEPS))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: degrees(x, 'EW', places)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: degrees(y, 'NS', places)))
    axes.tick_params(labelsize=8)
    axes.grid(color='0.9', linewidth=0.5)
    axes.set_axisbelow(True)
    axes.label_outer()
