"""PCA false colour of feature maps of an output, a map at a time."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rasterio.io import MemoryFile
from tqdm import tqdm

from dynamicvis_geo.errors import OutputError
from dynamicvis_geo.formats.base import spread
from dynamicvis_geo.formats.geotiff import read_feature_map
from dynamicvis_geo.mosaics import (
    MAX_PANELS,
    Canvas,
    compact,
    groups,
    plot_canvases,
    side_by_side,
)
from dynamicvis_geo.outputs import Output
from dynamicvis_geo.paths import Place, local_output
from dynamicvis_geo.plotting.colours import (
    FIT_VECTORS,
    PCAColours,
    fit_map_colours,
    map_picture,
    sample_rows,
)
from dynamicvis_geo.plotting.features import chip_label, chip_names, plot_sheet
from dynamicvis_geo.plotting.marks import RANDOM_WEIGHTS, mark_random_weights
from dynamicvis_geo.provenance import PROVENANCE_KEY, find_provenance, refuse_others
from dynamicvis_geo.rasters import open_raster
from dynamicvis_geo.store import Store
from dynamicvis_geo.terms import random_weights

#: Maps from which the colours are fitted, at most.
FIT_MAPS = 256

_SHEET_MAPS = 48

Item = TypeVar('Item')


def fit_file_colours(files: Sequence[Place]) -> PCAColours:
    """Fit one PCA to feature maps, to 256 of them if there are more.

    Args:
        files: GeoTIFFs of feature maps of one model.

    Raises:
        SourceError: If a file cannot be read.
        SpecError: If the maps have too few cells or channels, or differ in channels.
    """
    chosen = [files[i] for i in spread(len(files), FIT_MAPS)]
    return _fit(map(read_feature_map, chosen), len(chosen))


def _fit(maps: Iterable[NDArray[np.float32]], count: int) -> PCAColours:
    """Fit colours to maps of which not all fit into memory: cells of each are kept."""
    share = FIT_VECTORS // max(count, 1) or 1
    cells = (sample_rows(m.reshape(len(m), -1).T, share).T for m in maps)
    return fit_map_colours([some[..., None] for some in cells])


def write_false_colour(path: Place, target: Path, colours: PCAColours) -> None:
    """Write the false colour of a feature map as a GeoTIFF.

    It has three bands of uint8, the CRS and the transform of the map, and values from 1
    to 255; 0 is nodata, where a feature is not finite. Its tags hold those of the map
    and, as ``false_colour``, the shares of the variance that are shown; a ``warning``
    says where weights are random.

    Args:
        path: GeoTIFF of the feature map.
        target: File to write; it appears when it is complete.
        colours: Fitted to all maps that will be compared.

    Raises:
        SourceError: If the map cannot be read.
        SpecError: If it has other channels than the colours.
        OutputError: If the file cannot be written.
    """
    target = local_output(target)
    coloured = colours(np.moveaxis(read_feature_map(path), 0, -1))
    missing = ~np.isfinite(coloured).all(axis=-1)
    values = np.rint(1 + 254 * np.nan_to_num(coloured)).astype(np.uint8)
    values[missing] = 0
    with open_raster(path) as source:
        crs, transform, tags = source.crs, source.transform, source.tags()
    names = ('chip_id', 'start', 'end', PROVENANCE_KEY)
    shown = {'method': 'PCA', 'explained_variance': colours.explained.tolist()}
    with MemoryFile() as memory:
        with memory.open(
            driver='GTiff',
            count=3,
            height=values.shape[0],
            width=values.shape[1],
            dtype='uint8',
            crs=crs,
            transform=transform,
            nodata=0,
            compress='deflate',
            photometric='RGB',
        ) as image:
            image.write(np.moveaxis(values, -1, 0))
            kept = {name: tags[name] for name in names if name in tags}
            if random_weights(find_provenance(path) or {}):
                kept['warning'] = RANDOM_WEIGHTS
            image.update_tags(**kept, false_colour=json.dumps(shown))
        Store(str(target.parent)).put(target.name, memory.getbuffer())


def write_false_colours(files: Sequence[Place], folder: Path) -> PCAColours:
    """Write the false colour of each map into a folder, under the name of the map.

    Args:
        files: GeoTIFFs of feature maps of one model.
        folder: Folder to write into; made if it is not there.

    Returns:
        The colours that all have in common.

    Raises:
        SourceError: If a map cannot be read.
        SpecError: If the maps cannot share colours.
        OutputError: If the folder is that of the maps, has another file under the name
            of one, or cannot be written.
    """
    folder = local_output(folder)
    if any(str(file.parent.resolve()) == str(folder.resolve()) for file in files):
        raise OutputError(
            f'{folder} holds the feature maps: choose another folder for their colours'
        )
    others = [folder / file.name for file in files]
    refuse_others(path for path in others if path.exists())
    colours = fit_file_colours(files)
    for file in _progress(files, len(files)):
        write_false_colour(file, folder / file.name, colours)
    return colours


def plot_false_colours(output: Output, colours: PCAColours | None = None) -> Figure:
    """Draw the feature maps of an output in PCA false colour.

    Maps that cover an area are put together, a panel each CRS and time window (12 at
    most); others, such as those around far-off points, become a contact sheet of 48.

    Args:
        output: Feature maps.
        colours: How they are coloured; fitted to the maps by default.

    Raises:
        SourceError: If a map cannot be read.
        SpecError: If the maps cannot share colours.
    """
    chips = output.chips
    if colours is None:
        some = chips.iloc[spread(len(chips), FIT_MAPS)]
        colours = _fit(output.maps(some), len(some))
    title = f'Feature maps, {output.dimensions} channels\n{colours.words}'
    parts = list(groups(chips))
    if all(compact(some) for _, some in parts):
        figure = _plot_mosaics(output, parts, colours, title)
    else:
        chosen, columns = side_by_side(chips['id'].astype(str).tolist(), _SHEET_MAPS)
        rows = chips.iloc[chosen]
        pictures = [map_picture(colours, features) for features in output.maps(rows)]
        labels = [chip_label(name) for name in chip_names(rows)]
        figure = plot_sheet(pictures, labels, title, columns)
    mark_random_weights(figure, output.provenance)
    return figure


def _progress(items: Iterable[Item], count: int) -> Iterator[Item]:
    """Show how far we are, when there are many maps."""
    yield from tqdm(items, total=count, unit='map', disable=count < 100, leave=False)


def _plot_mosaics(
    output: Output,
    parts: Sequence[tuple[str, pd.DataFrame]],
    colours: PCAColours,
    title: str,
) -> Figure:
    left_out = len(parts) - MAX_PANELS
    if left_out > 0:
        title += f' ({left_out} more of CRS and dates are not shown)'
    canvases = [
        Canvas.painted(
            chips, (colours(np.moveaxis(one, 0, -1)) for one in output.maps(chips))
        )
        for _, chips in parts[:MAX_PANELS]
    ]
    names = [name for name, _ in parts[:MAX_PANELS]]
    pictures = [canvas.values for canvas in canvases]
    figure, _ = plot_canvases(pictures, canvases, names, title)
    return figure
