"""Embeddings on a map."""

import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Literal, TypeAlias

import numpy as np
import shapely
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.plotting.colours import PCAColours, Picture

Method: TypeAlias = Literal['auto', 'pca', 'umap']
#: Longitudes and latitudes in degrees, ``[N]`` each.
LonLat: TypeAlias = tuple[NDArray[np.float64], NDArray[np.float64]]

#: With more embeddings than this, 'auto' does not wait for UMAP.
MAX_UMAP = 20_000
# UMAP compares each vector with 15 neighbours.
_MIN_UMAP = 16
# Footprints smaller than this, in pixels of the picture, become points.
_SMALLEST = 4.0
# Footprints from this size on are told apart by a white line.
_OUTLINED = 16.0
_DPI = 150
_LONG_SIDE = 8.0


def embedding_colours(
    embeddings: NDArray[np.floating], method: Method = 'auto'
) -> tuple[Picture, str]:
    """Colour embeddings so that similar ones have similar colours.

    Args:
        embeddings: ``[N, D]``.
        method: 'pca' (the three main components as red, green and blue), 'umap' (three
            dimensions of UMAP, which needs ``umap-learn`` and takes minutes for many
            embeddings), or 'auto': UMAP if it is installed and there are 16 to 20,000
            embeddings, else PCA.

    Returns:
        ``[N, 3]`` in 0..1, NaN where an embedding is not finite; and a sentence that
        says what the colours are.

    Raises:
        SpecError: If no embedding is finite, or UMAP is asked for and not possible.
    """
    if method not in ('auto', 'pca', 'umap'):
        raise SpecError(f"method={method!r} is not one of 'auto', 'pca', 'umap'")
    finite = np.isfinite(embeddings).all(axis=1)
    count = int(finite.sum())
    installed = find_spec('umap') is not None
    if method == 'umap':
        _require_umap(installed, count)
    if method == 'umap' or (
        method == 'auto' and installed and _MIN_UMAP <= count <= MAX_UMAP
    ):
        colours = np.full((len(embeddings), 3), np.nan, np.float32)
        colours[finite] = _umap(embeddings[finite])
        return colours, 'Colours: UMAP to three dimensions, as red, green and blue'
    pca = PCAColours.fit(embeddings)
    shares = ', '.join(f'{100 * share:.0f}' for share in pca.explained if share > 0)
    what = f': {shares} % of the variance' if shares else '; they are all the same'
    return pca(embeddings), (
        f'Colours: main components (PCA) as red, green and blue{what}'
    )


def plot_embedding_map(
    embeddings: NDArray[np.floating],
    footprints: Sequence[Any] | NDArray[np.object_],
    method: Method = 'auto',
    title: str | None = None,
) -> Figure:
    """Draw embeddings as colours over their footprints.

    The axes are longitude and latitude, at a scale that is right in the middle of the
    map; footprints of all UTM zones fit in, and a map across the antimeridian is not
    torn apart. Footprints that would be too small to see are drawn as points.

    Args:
        embeddings: ``[N, D]``.
        footprints: Shapely geometries in EPSG:4326, one an embedding; those across the
            antimeridian in parts.
        method: How embeddings become colours, see :func:`embedding_colours`.
        title: Written above the map.

    Returns:
        The figure.

    Raises:
        SpecError: If there is nothing to draw, the footprints do not fit, or as
            :func:`embedding_colours`.
    """
    if len(embeddings) != len(footprints):
        raise SpecError(
            f'footprints has {len(footprints)} entries for {len(embeddings)} '
            'embeddings: give one each'
        )
    colours, words = embedding_colours(embeddings, method)
    return plot_footprints(
        footprints, np.nan_to_num(colours, nan=0.6), caption=words, title=title
    )


def plot_footprints(
    footprints: Sequence[Any] | NDArray[np.object_],
    colours: Picture,
    *,
    failures: Sequence[Any] | NDArray[np.object_] = (),
    caption: str | None = None,
    title: str | None = None,
) -> Figure:
    """Draw footprints in given colours, and places of failures as red crosses.

    Args:
        footprints: Shapely geometries in EPSG:4326.
        colours: ``[N, 3]`` in 0..1.
        failures: Geometries of chips that failed; None and empty ones are left out.
        caption: Written below the map.
        title: Written above it.

    Returns:
        The figure.

    Raises:
        SpecError: If no geometry has a place.
    """
    parts, owner = _parts(footprints)
    failed, _ = _parts(failures)
    if not len(parts) + len(failed):
        raise SpecError('footprints: none has a place, there is nothing to draw')
    everything = _uncut(np.concatenate([parts, failed]))
    boxes = shapely.bounds(everything)
    middles, count = (boxes[:, :2] + boxes[:, 2:]) / 2, len(parts)
    figure, axes, scale = _map_axes(boxes, bool(title) + bool(caption))
    sides = (boxes[:count, 2:] - boxes[:count, :2]) * scale * _DPI
    side = float(np.median(sides.min(axis=1))) if count else 0.0
    # Not GeoSeries.plot, which imports pyplot.
    if side >= _SMALLEST:
        _draw_polygons(axes, everything[:count], colours[owner], side >= _OUTLINED)
    elif count:
        axes.scatter(
            middles[:count, 0],
            middles[:count, 1],
            c=colours[owner],
            s=_point_size(count),
            linewidths=0,
            rasterized=True,
        )
    if len(failed):
        axes.scatter(
            middles[count:, 0],
            middles[count:, 1],
            s=70,
            marker='X',
            color='#d00000',
            edgecolors='white',
            linewidths=1,
            zorder=3,
            rasterized=True,
        )
    if title:
        figure.suptitle(title, fontsize=11, wrap=True, parse_math=False)
    if caption:
        figure.supxlabel(caption, fontsize=8, wrap=True, parse_math=False)
    return figure


def _require_umap(installed: bool, count: int) -> None:
    if not installed:
        raise SpecError(
            "method='umap' needs umap-learn: pip install 'dynamicvis-geo[umap]', or "
            "choose method='pca'"
        )
    if count < _MIN_UMAP:
        raise SpecError(
            f"method='umap' needs {_MIN_UMAP} finite embeddings, and there are "
            f"{count}: choose method='pca'"
        )


def _umap(embeddings: NDArray[np.floating]) -> Picture:
    from umap import UMAP

    with warnings.catch_warnings():
        # That a seed costs parallelism, and what its dependencies deprecate.
        warnings.simplefilter('ignore')
        scores = UMAP(n_components=3, random_state=0, n_jobs=1).fit_transform(
            embeddings.astype(np.float32)
        )
    low, high = np.percentile(scores, (1, 99), axis=0)
    span = np.where(high > low, high - low, 1)
    unit: Picture = np.clip((scores - low) / span, 0, 1).astype(np.float32)
    return unit


def _parts(
    shapes: Sequence[Any] | NDArray[np.object_],
) -> tuple[NDArray[np.object_], NDArray[np.intp]]:
    """Return the parts of geometries that have a place, and whose they are."""
    parts, owner = shapely.get_parts(np.asarray(shapes, dtype=object), True)
    there = ~(shapely.is_missing(parts) | shapely.is_empty(parts))
    return parts[there], owner[there]


def _uncut(shapes: NDArray[np.object_]) -> NDArray[np.object_]:
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
    order = np.argsort(boxes[:, 0])
    starts = boxes[order, 0]
    ends = np.maximum.accumulate(boxes[order, 2])
    gaps = starts[1:] - ends[:-1]
    outer = starts[0] + 360 - ends[-1]
    if not len(gaps) or gaps.max() <= outer:
        return -180.0
    return float(starts[1:][gaps.argmax()])


def _map_axes(
    boxes: NDArray[np.float64], lines: int
) -> tuple[Figure, Axes, NDArray[np.float64]]:
    """Make axes around boxes, with room for lines of text.

    Also gives the inches of a degree, in x and y.
    """
    low, high = boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)
    margin = np.maximum(0.03 * (high - low).max(), 1e-4)
    low, high = low - margin, high + margin
    # At the poles a degree of longitude has no length; the map must have a width.
    shrink = max(np.cos(np.radians((low[1] + high[1]) / 2)), 0.05)
    ratio = (high[1] - low[1]) / ((high[0] - low[0]) * shrink)
    ratio = min(max(ratio, 0.3), 2.0)
    width, height = _LONG_SIDE / max(ratio, 1), _LONG_SIDE * min(ratio, 1)
    figure = Figure(
        figsize=(max(width, 4) + 0.9, height + 0.4 + 0.35 * lines), layout='compressed'
    )
    axes = figure.subplots()
    axes.set_xlim(low[0], high[0])
    axes.set_ylim(low[1], high[1])
    axes.set_aspect(1 / shrink)
    places = _decimals(float((high - low).max()))
    axes.xaxis.set_major_locator(MaxNLocator(5 if width > 5 else 3))
    axes.yaxis.set_major_locator(MaxNLocator(6 if height > 4 else 4))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda x, _: _degrees(x, 'EW', places))
    )
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda y, _: _degrees(y, 'NS', places))
    )
    axes.tick_params(labelsize=8)
    axes.grid(color='0.9', linewidth=0.5)
    axes.set_axisbelow(True)
    per_degree = min(width / ((high[0] - low[0]) * shrink), height / (high[1] - low[1]))
    return figure, axes, np.array([per_degree * shrink, per_degree])


def _draw_polygons(
    axes: Axes, shapes: NDArray[np.object_], colours: Picture, outlined: bool
) -> None:
    outlines = [one.exterior if one.geom_type == 'Polygon' else one for one in shapes]
    axes.add_collection(
        PolyCollection(
            [shapely.get_coordinates(outline) for outline in outlines],
            facecolors=colours,
            edgecolors='white' if outlined else colours,
            linewidths=0.5 if outlined else 0.2,
            rasterized=True,
        )
    )


def _point_size(count: int) -> float:
    """Return the area of a point, in square points: many points are small."""
    return float(np.clip(20_000 / count, 2.0, 24.0))


def _decimals(span: float) -> int:
    """Return the decimals that tell ticks apart."""
    return int(np.clip(np.ceil(1 - np.log10(max(span, 1e-9))), 0, 5))


def _degrees(value: float, names: str, places: int) -> str:
    value = (value + 180) % 360 - 180 if names == 'EW' else value
    text = f'{abs(value):.{places}f}°'
    if (float(text[:-1]) in (0.0, 180.0) and names == 'EW') or float(text[:-1]) == 0:
        return text
    return text + names[0 if value > 0 else 1]
