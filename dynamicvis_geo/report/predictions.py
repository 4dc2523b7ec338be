"""Where a probe is right and wrong, as a report shows it."""

from dataclasses import dataclass
from typing import Any

import geopandas as gpd
import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.colors import to_hex, to_rgb

from dynamicvis_geo.errors import SourceError, one_line
from dynamicvis_geo.paths import Place, kind_of, open_file, parquet_source
from dynamicvis_geo.plotting.colours import Picture
from dynamicvis_geo.plotting.palette import SEQUENTIAL
from dynamicvis_geo.report.places import PlaceMap, place_map

#: File of the predictions in the folder that ``dynamicvis-geo probe`` writes.
PREDICTIONS = 'predictions.parquet'

# Colour-blind people tell them apart, and so does a grey print.
_RIGHT, _WRONG, _UNTESTED = '#56a0d3', '#b33c00', '#ccd2da'


@dataclass(frozen=True)
class PredictionMap:
    """A map of the plots of a probe.

    Attributes:
        map: All plots, those of the test split on top.
        legend: Colours and their meanings.
        words: What the colours are of.
    """

    map: PlaceMap
    legend: list[tuple[str, str]]
    words: str


def map_predictions(folder: Place) -> PredictionMap | None:
    """Draw the plots of a probe where it was right and wrong.

    Args:
        folder: Folder that ``dynamicvis-geo probe`` wrote.

    Returns:
        The map; None if the folder has no predictions, or these no places.

    Raises:
        SourceError: If the predictions cannot be read.
    """
    path = folder / PREDICTIONS
    if kind_of(path) != 'file':
        return None
    try:
        with open_file(path) as file:
            if b'geo' not in (pq.read_schema(file).metadata or {}):
                return None
        table = gpd.read_parquet(parquet_source(path)).to_crs('EPSG:4326')
        tested = (table['split'] == 'test').to_numpy()
        table = table.iloc[np.argsort(tested, kind='stable')]
        colours, legend = _colours(table)
        labels = table[['id', 'label', 'prediction']].astype(str)
    except (OSError, ValueError, LookupError, pa.ArrowException) as error:
        raise SourceError(
            f'{path}: the predictions cannot be read ({one_line(error)}); remove the '
            'file to go on without it'
        ) from error
    splits = table['split'].tolist()

    def told(row: int) -> str:
        name, label, prediction = labels.iloc[row]
        if splits[row] != 'test':
            return f'{name}: {label} ({splits[row]})'
        return f'{name}: {label}, predicted {prediction}'

    places = table.geometry.to_numpy()
    drawn = place_map('plots', places, colours, told, places[:0], str)
    words = 'Predictions' if 'correct' in table else 'Absolute errors'
    words += ' of the linear probe on the test split.'
    return None if drawn is None else PredictionMap(drawn, legend, words)


def _colours(table: gpd.GeoDataFrame) -> tuple[Picture, list[tuple[str, str]]]:
    """Colour plots by what came of them."""
    tested = (table['split'] == 'test').to_numpy()
    colours = np.tile(np.array(to_rgb(_UNTESTED), np.float32), (len(table), 1))
    untested = (_UNTESTED, f'{int((~tested).sum()):,} plots of other splits')
    if 'correct' in table:
        right = table['correct'][tested].to_numpy(bool)
        colours[tested] = np.where(right[:, None], to_rgb(_RIGHT), to_rgb(_WRONG))
        return colours, [
            (_RIGHT, f'{int(right.sum()):,} right'),
            (_WRONG, f'{int((~right).sum()):,} wrong'),
            untested,
        ]
    errors = table['error'][tested].abs().to_numpy(np.float64)
    top = float(np.percentile(errors, 98)) if errors.size else 0.0
    shade: Any = matplotlib.colormaps[SEQUENTIAL]
    colours[tested] = shade(np.clip(errors / (top or 1), 0, 1))[:, :3]
    steps = [
        (to_hex(shade(share)), f'{share * top:.3g}{" and more" * (share == 1)}')
        for share in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    return colours, [*steps, untested]
