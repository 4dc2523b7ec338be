"""Pictures of the maps that a probe made."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.transforms import nonsingular
from numpy.typing import NDArray
from rasterio.errors import RasterioError

from dynamicvis_geo.datasets.scene_files import find_files
from dynamicvis_geo.errors import SourceError, one_line
from dynamicvis_geo.formats.geotiff import Header, read_header
from dynamicvis_geo.mosaics import MAX_PANELS, Canvas, compact, groups, plot_canvases
from dynamicvis_geo.paths import AnyPath, Place, input_path
from dynamicvis_geo.plotting.colours import Picture, stretch_limits
from dynamicvis_geo.plotting.features import chip_label, chip_names
from dynamicvis_geo.plotting.marks import add_legend, mark_random_weights
from dynamicvis_geo.plotting.palette import MISSING, SEQUENTIAL, class_colours
from dynamicvis_geo.provenance import find_provenance
from dynamicvis_geo.rasters import open_raster
from dynamicvis_geo.terms import find

#: More panels than this have no shares in the legend, which would be too long.
_MAX_SHARES = 3
_OTHER = '#ececec'


@dataclass(frozen=True)
class ClassMaps:
    """Maps that :func:`~dynamicvis_geo.evaluation.class_maps.predict_maps` wrote.

    Attributes:
        chips: A row each map: ``crs``, ``minx`` to ``maxy``, ``width``, ``height``,
            ``start``, ``end`` and ``file``.
        classes: Their names; none of a regression.
        bands: Bands of each map: one, or of multilabel one a class.
        colours: Colours by class, of the files; none of other kinds.
        provenance: What made the features.
    """

    chips: pd.DataFrame
    classes: tuple[str, ...]
    bands: int
    colours: dict[str, str]
    provenance: Mapping[str, Any]

    @property
    def multilabel(self) -> bool:
        """True if a cell may have several classes, or none."""
        return bool(self.classes) and self.bands == len(self.classes)

    def read(self, path: Place) -> NDArray[np.float32]:
        """Read a map: ``[h, w, bands]``, NaN where there is nothing.

        Raises:
            SourceError: If it cannot be read, or a number stands for no class.
        """
        try:
            with open_raster(path) as file:
                values = file.read(masked=True, out_dtype='float32').filled(np.nan)
        except RasterioError as error:
            raise SourceError(
                f'{path}: rasterio cannot read it ({one_line(error)}); make it anew'
            ) from error
        count, highest = len(self.classes), np.nanmax(values, initial=0)
        if count and highest >= (2 if self.multilabel else count):
            raise SourceError(
                f'{path} has the number {highest:.0f}, but names {count} classes: make '
                'it anew with dynamicvis-geo predict-map'
            )
        shown: NDArray[np.float32] = np.moveaxis(values, 0, -1)
        return shown

    def parts(self) -> list[tuple[str, pd.DataFrame]]:
        """Divide the maps into what is drawn as one, with words for each.

        These are CRS and time windows; maps that lie far apart are drawn one by one.
        """
        parts = list(groups(self.chips))
        if all(compact(rows) for _, rows in parts):
            return parts
        names = map(chip_label, chip_names(self.chips))
        return [(name, self.chips.iloc[[i]]) for i, name in enumerate(names)]


def open_class_maps(source: AnyPath) -> ClassMaps:
    """Read all of the maps of a probe but their values.

    Args:
        source: A GeoTIFF, or a folder of them; or the URL of one.

    Raises:
        SourceError: If they cannot be read, are not such maps, or differ in their
            classes.
    """
    files = find_files(input_path(source))
    headers = [read_header(file) for file in files]
    first, classes = headers[0], _classes(headers[0])
    for header in headers:
        if _classes(header) != classes or header.shape[0] != first.shape[0]:
            raise SourceError(
                f'{header.path} has other classes or bands than {first.path}: draw '
                'the maps of one probe at a time'
            )
    bands = first.shape[0]
    if bands != 1 and bands != len(classes):
        raise SourceError(
            f'{first.path} has {bands} bands and {len(classes)} names of classes: it '
            'is no map of a probe; give what dynamicvis-geo predict-map wrote'
        )
    with open_raster(first.path) as file:
        dtype = file.dtypes[0]
    if not classes and not dtype.startswith('float'):
        raise SourceError(
            f'{first.path} holds numbers of {dtype} without names of classes (tags '
            'class_0, class_1, ...): give what dynamicvis-geo predict-map wrote'
        )
    return ClassMaps(
        pd.DataFrame([header.row() for header in headers]),
        classes,
        bands,
        _colours(files[0], classes) if bands == 1 and classes else {},
        find(find_provenance(files[0]) or {}, 'features') or {},
    )


def plot_class_maps(
    source: AnyPath, colours: Mapping[str, str] | None = None
) -> tuple[Figure, pd.DataFrame]:
    """Draw the maps of a probe as mosaics, a panel each CRS and time window.

    Of multilabel each class has a panel, and of regression numbers have a colour bar.
    Where maps overlap, the nearest one is shown. There are 12 panels at most.

    Args:
        source: A GeoTIFF of :func:`~dynamicvis_geo.evaluation.class_maps.predict_maps`,
            or a folder of them; or the URL of one.
        colours: Colours by class, instead of those of the files; other classes have
            those of :func:`~dynamicvis_geo.plotting.palette.class_colours`.

    Returns:
        The figure; and the shares of the area, 0..1, of each class (a row) in each
        panel, without the area that has none. No rows for a regression.

    Raises:
        SourceError: As :func:`open_class_maps`.
        SpecError: If a colour is none, or all are of other classes.
    """
    maps = open_class_maps(source)
    parts = maps.parts()
    names = [name for name, _ in parts[:MAX_PANELS]]
    canvases = [
        Canvas.painted(rows, map(maps.read, rows['file']), maps.bands)
        for _, rows in parts[:MAX_PANELS]
    ]
    if not maps.classes:
        figure, shares = _plot_numbers(canvases, names), np.empty((0, len(canvases)))
    else:
        chosen = maps.colours
        if colours or not chosen:
            chosen = class_colours(maps.classes, colours)
        shares = np.stack([_shares(one, maps) for one in canvases], axis=1)
        draw = _plot_labels if maps.multilabel else _plot_classes
        figure = draw(canvases, names, chosen, shares)
    title = PurePath(str(source)).name
    if len(maps.chips) > 1:
        title += f': {len(maps.chips)} maps'
    wanted = len(parts) * (maps.bands if maps.multilabel else 1)
    if wanted > MAX_PANELS:
        title += f' ({wanted - MAX_PANELS} of {wanted} panels are not shown)'
    figure.suptitle(title, fontsize=10, wrap=True, parse_math=False)
    mark_random_weights(figure, maps.provenance)
    panels = [
        ', '.join(filter(None, (one.crs, *name.splitlines())))
        for one, name in zip(canvases, names, strict=True)
    ]
    return figure, pd.DataFrame(shares, list(maps.classes), panels)


def _classes(header: Header) -> tuple[str, ...]:
    names: list[str] = []
    while (name := header.tags.get(f'class_{len(names)}')) is not None:
        names.append(name)
    return tuple(names)


def _colours(file: Place, classes: Sequence[str]) -> dict[str, str]:
    """Return the colours of the file; nothing if it has none."""
    with open_raster(file) as source:
        try:
            table = source.colormap(1)
        except ValueError:
            return {}
    return {
        name: '#{:02x}{:02x}{:02x}'.format(*table[i])
        for i, name in enumerate(classes)
        if i in table
    }


def _shares(canvas: Canvas, maps: ClassMaps) -> NDArray[np.float64]:
    """Measure the share of the area of each class."""
    weights = canvas.areas()
    known = np.isfinite(canvas.values).all(axis=-1)
    values, weights = canvas.values[known], weights[known]
    total = weights.sum() or 1.0
    if maps.multilabel:
        of_labels: NDArray[np.float64] = weights @ (values > 0) / total
        return of_labels
    numbers = values[:, 0].astype(np.int64)
    return np.bincount(numbers, weights, len(maps.classes)) / total


def _plot_classes(
    canvases: Sequence[Canvas],
    names: Sequence[str],
    colours: Mapping[str, str],
    shares: NDArray[np.float64],
) -> Figure:
    table = np.array([to_rgb(colour) for colour in colours.values()], np.float32)
    pictures, missing = [], False
    for canvas in canvases:
        values = canvas.values[..., 0]
        known = np.isfinite(values)
        missing |= not known.all()
        picture = np.full((*values.shape, 3), to_rgb(MISSING), np.float32)
        picture[known] = table[values[known].astype(np.int64)]
        pictures.append(picture)
    figure, _ = plot_canvases(pictures, canvases, names)
    handles = []
    for (name, colour), row in zip(colours.items(), shares, strict=True):
        told = ''
        if len(canvases) <= _MAX_SHARES:
            told = f'  {" / ".join(map(_percent, row))} %'
        handles.append(Patch(facecolor=colour, label=f'{name}{told}'))
    if missing:
        handles.append(Patch(facecolor=MISSING, label='no class'))
    add_legend(figure, handles, loc='outside lower center', ncols=min(len(handles), 3))
    return figure


def _plot_labels(
    canvases: Sequence[Canvas],
    names: Sequence[str],
    colours: Mapping[str, str],
    shares: NDArray[np.float64],
) -> Figure:
    """Draw a panel each class of each mosaic."""
    pictures, shown, titles = [], [], []
    for i, (name, canvas) in enumerate(zip(names, canvases, strict=True)):
        for k, (label, colour) in enumerate(colours.items()):
            values = canvas.values[..., k]
            picture = np.full((*values.shape, 3), to_rgb(_OTHER), np.float32)
            picture[values > 0] = to_rgb(colour)
            picture[~np.isfinite(values)] = to_rgb(MISSING)
            pictures.append(picture)
            shown.append(canvas)
            titles.append(f'{label}  {_percent(shares[k, i])} %\n{name}'.rstrip())
    most = MAX_PANELS
    return plot_canvases(pictures[:most], shown[:most], titles[:most])[0]


def _plot_numbers(canvases: Sequence[Canvas], names: Sequence[str]) -> Figure:
    colormap = matplotlib.colormaps[SEQUENTIAL].with_extremes(bad=MISSING)
    values = [canvas.values[..., 0] for canvas in canvases]
    # As a colour bar does, so that both give a single number the same colour.
    scale = Normalize(*nonsingular(*stretch_limits(values), expander=0.1))
    pictures: list[Picture] = [
        colormap(scale(np.ma.masked_invalid(one)))[..., :3] for one in values
    ]
    figure, panels = plot_canvases(pictures, canvases, names)
    colours = ScalarMappable(scale, colormap)
    figure.colorbar(colours, ax=panels, extend='both', shrink=0.6, label='prediction')
    return figure


def _percent(share: float) -> str:
    return f'{100 * share:.1f}' if share < 0.0995 else f'{100 * share:.0f}'
