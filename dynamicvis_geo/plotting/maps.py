"""Embeddings on a map."""

import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Literal, TypeAlias

import geopandas as gpd
import numpy as np
import pandas as pd
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from numpy.typing import NDArray

from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.plotting.colours import PCAColours, Picture
from dynamicvis_geo.plotting.columns import Key, column_colours
from dynamicvis_geo.plotting.features import dates_of
from dynamicvis_geo.plotting.footprints import (
    MapFigure,
    Shapes,
    key_inches,
    split_parts,
    uncut,
)
from dynamicvis_geo.plotting.palette import MISSING

Method: TypeAlias = Literal['auto', 'pca', 'umap']
#: Longitudes and latitudes in degrees, ``[N]`` each.
LonLat: TypeAlias = tuple[NDArray[np.float64], NDArray[np.float64]]

#: With more embeddings than this, 'auto' does not wait for UMAP.
MAX_UMAP = 20_000
# UMAP compares each vector with 15 neighbours.
_MIN_UMAP = 16
#: With more dates than this, a map shows some of them.
MAX_PANELS = 6


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
    return pca(embeddings), f'Colours: {pca.words}'


def plot_embedding_map(
    embeddings: NDArray[np.floating],
    footprints: Sequence[Any] | Shapes,
    method: Method = 'auto',
    title: str | None = None,
    *,
    failures: Sequence[Any] | Shapes = (),
    panels: Sequence[str] | None = None,
    failure_panels: Sequence[str] | None = None,
) -> Figure:
    """Draw embeddings as colours over their footprints.

    Args:
        embeddings: ``[N, D]``.
        footprints: Shapely geometries in EPSG:4326, one an embedding; those across the
            antimeridian in parts.
        method: How embeddings become colours, see :func:`embedding_colours`.
        title: Written above the map.
        failures: As :func:`plot_footprints` takes them.
        panels: As :func:`plot_footprints` takes them.
        failure_panels: As :func:`plot_footprints` takes them.

    Returns:
        The figure.

    Raises:
        SpecError: If there is nothing to draw, the footprints do not fit, or as
            :func:`embedding_colours`.
    """
    _check_number('embeddings', len(embeddings), footprints)
    colours, words = embedding_colours(embeddings, method)
    absent = np.isnan(colours).any(axis=1)
    colours[absent] = to_rgb(MISSING)
    broken = {f'not finite ({absent.sum():,})': MISSING} if absent.any() else {}
    return plot_footprints(
        footprints,
        colours,
        failures=failures,
        panels=panels,
        failure_panels=failure_panels,
        key=Key(classes=broken),
        caption=words,
        title=title,
    )


def plot_column_map(
    values: pd.Series,
    footprints: Sequence[Any] | Shapes,
    title: str | None = None,
    *,
    class_colours: Mapping[str, str] | None = None,
    failures: Sequence[Any] | Shapes = (),
    panels: Sequence[str] | None = None,
    failure_panels: Sequence[str] | None = None,
) -> Figure:
    """Draw the values of a column over footprints, with a legend or a colour bar.

    Args:
        values: The column, named: classes or numbers, see
            :func:`~dynamicvis_geo.plotting.columns.column_colours`.
        footprints: Shapely geometries in EPSG:4326, one a value.
        title: Written above the map.
        class_colours: Colours by the name of a class.
        failures: As :func:`plot_footprints` takes them.
        panels: As :func:`plot_footprints` takes them.
        failure_panels: As :func:`plot_footprints` takes them.

    Returns:
        The figure.

    Raises:
        SpecError: If there is nothing to draw, the footprints do not fit, or the column
            has no colours.
    """
    _check_number('values', len(values), footprints)
    colours, key = column_colours(values, class_colours)
    return plot_footprints(
        footprints,
        colours,
        failures=failures,
        panels=panels,
        failure_panels=failure_panels,
        key=key,
        title=title,
    )


def plot_footprints(
    footprints: Sequence[Any] | Shapes,
    colours: Picture,
    *,
    failures: Sequence[Any] | Shapes = (),
    panels: Sequence[str] | None = None,
    failure_panels: Sequence[str] | None = None,
    key: Key | None = None,
    caption: str | None = None,
    title: str | None = None,
) -> Figure:
    """Draw footprints in given colours, and places of failures as black crosses.

    The axes are longitude and latitude, at a scale that is right in the middle of the
    map; footprints of all UTM zones fit in, and a map across the antimeridian is not
    torn apart. Footprints that would be too small to see are drawn as points. A scale
    bar is drawn where it is true for the whole map.

    Args:
        footprints: Shapely geometries in EPSG:4326.
        colours: ``[N, 3]`` in 0..1.
        failures: Geometries of chips that failed; None and empty ones are left out.
        panels: The panel of each footprint, such as its date; there are at most 6, in
            the order of their names. None draws one map.
        failure_panels: The panel of each failure; needed with *panels* and *failures*.
        key: The meaning of the colours.
        caption: Written below the map.
        title: Written above it.

    Returns:
        The figure.

    Raises:
        SpecError: If no geometry has a place, or there is not one panel for each.
    """
    key = key or Key()
    parts, owner = split_parts(footprints)
    failed, failed_owner = split_parts(failures)
    if not len(parts) + len(failed):
        raise SpecError('footprints: none has a place, there is nothing to draw')
    of_parts = _panels_of(panels, owner, len(footprints), 'panels')
    of_failed = _panels_of(
        failure_panels if panels is not None else None,
        failed_owner,
        len(failures),
        'failure_panels',
    )
    names = sorted({*of_parts, *of_failed})
    shown = _some(names)
    everything = uncut(np.concatenate([parts, failed]))
    parts, failed = np.split(everything, [len(parts)])
    notes = [caption] if caption else []
    if len(shown) < len(names):
        notes.append(f'{len(shown)} of {len(names)} dates are shown')
    map_figure = MapFigure(
        everything,
        len(shown),
        bool(title) + len(notes) + 1,
        key_inches(key, len(failed)),
    )
    # What has no value does not hide what has one.
    grey = (np.abs(colours - to_rgb(MISSING)) < 1e-6).all(axis=1)[owner]
    for axes, name in zip(map_figure.panels, shown, strict=True):
        for those in (grey, ~grey):
            rows = np.flatnonzero((of_parts == name) & those)
            map_figure.draw(axes, parts[rows], colours[owner[rows]])
        map_figure.cross(axes, failed[of_failed == name])
        if name:
            # Above the scale bar.
            axes.set_title(name, fontsize=9, pad=16, parse_math=False)
    map_figure.explain(key, len(failed))
    figure = map_figure.figure
    if title:
        figure.suptitle(title, fontsize=11, wrap=True, parse_math=False)
    words = '\n'.join([*notes, map_figure.words])
    figure.supxlabel(words, fontsize=7, wrap=True, parse_math=False)
    return figure


def date_panels(table: gpd.GeoDataFrame) -> list[str] | None:
    """Name the panel of each row of a table in which places have several dates.

    Args:
        table: With a geometry, and perhaps ``start`` and ``end``.

    Returns:
        The dates of each row in words; None if no place has more than one.
    """
    if 'start' not in table or 'end' not in table:
        return None
    windows = pd.DataFrame(
        {'place': table.geometry.to_wkb(), **table[['start', 'end']]}
    )
    if not windows.drop_duplicates()['place'].duplicated().any():
        return None
    return panel_names(table)


def panel_names(table: pd.DataFrame) -> list[str]:
    """Name the dates of each row of a table with ``start`` and ``end``."""
    pairs = zip(table['start'], table['end'], strict=True)
    return [dates_of(start, end) or 'no date' for start, end in pairs]


def _check_number(what: str, count: int, footprints: Sequence[Any] | Shapes) -> None:
    if count != len(footprints):
        raise SpecError(
            f'footprints has {len(footprints)} entries for {count} {what}: give one '
            'each'
        )


def _panels_of(
    panels: Sequence[str] | None, owner: NDArray[np.intp], count: int, name: str
) -> NDArray[np.object_]:
    """Return the panel of each part; '' if there is only one."""
    if panels is None:
        panels = [''] * count
    if len(panels) != count:
        raise SpecError(f'{name} has {len(panels)} entries, not {count}: give one each')
    return np.array([*panels, ''], dtype=object)[owner]


def _some(names: Sequence[str]) -> list[str]:
    """Choose panels, evenly with the first and the last one."""
    count = min(len(names), MAX_PANELS)
    return [names[round(i)] for i in np.linspace(0, len(names) - 1, count)]


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
