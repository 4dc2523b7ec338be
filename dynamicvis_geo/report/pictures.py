"""The pictures of a report, as PNGs within the page."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

import matplotlib.image
import numpy as np
import pandas as pd
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from dynamicvis_geo.plotting import (
    PCAColours,
    map_picture,
    plot_footprints,
    stretch_limits,
    stretch_rgb,
)
from dynamicvis_geo.plotting.colours import Picture
from dynamicvis_geo.quicklooks import Quicklooks
from dynamicvis_geo.report.facts import Failures
from dynamicvis_geo.runs import Run

_BINS = 30
_BLUE = '#2b6ca3'


@dataclass(frozen=True)
class Image:
    """A picture within the page.

    Attributes:
        uri: the PNG, as a data URI.
        alt: what it shows, for those who cannot see it.
    """

    uri: str
    alt: str


@dataclass(frozen=True)
class Card:
    """A chip that is shown as an example.

    Attributes:
        id: its id.
        details: date and valid fraction.
        images: its quicklook, if there is one, and its features in colour.
    """

    id: str
    details: str
    images: list[Image]


def figure_image(figure: Figure, alt: str, dpi: int = 100) -> Image:
    """Turn a figure into an image of the page."""
    buffer = BytesIO()
    figure.savefig(buffer, format='png', dpi=dpi)
    return Image(_uri(buffer), alt)


def picture_image(picture: Picture, alt: str) -> Image:
    """Turn a picture ``[h, w, 3]`` into an image of the page, a pixel a pixel."""
    buffer = BytesIO()
    matplotlib.image.imsave(buffer, picture, format='png')
    return Image(_uri(buffer), alt)


def map_image(
    run: Run, failures: Failures | None, colours: Picture | None
) -> Image | None:
    """Draw where the chips are, and where those that failed; None without a place.

    Args:
        run: the output.
        failures: chips without an embedding.
        colours: ``[N, 3]`` of the chips, NaN where there is none.
    """
    shapes = run.chips.geometry.to_numpy()
    failed = failures.table.geometry.to_numpy() if failures is not None else ()
    if not any(
        shape is not None and not shape.is_empty for shape in [*shapes, *failed]
    ):
        return None
    if colours is None:
        colours = np.tile(np.array(to_rgb(_BLUE), np.float32), (len(shapes), 1))
    figure = plot_footprints(shapes, np.nan_to_num(colours, nan=0.6), failures=failed)
    # Smaller than a figure on paper, so that its labels can be read on a phone.
    figure.set_size_inches(*(0.7 * figure.get_size_inches()))
    alt = f'Map in longitude and latitude with the places of {len(shapes):,} chips'
    if len(failed):
        alt += f' and of {len(failed):,} failures'
    return figure_image(figure, alt, dpi=150)


def histogram(
    values: NDArray[np.floating],
    label: str,
    what: str,
    bounds: tuple[float, float] | None,
) -> Image | None:
    """Draw how often values occur; None if no value is finite."""
    values = values[np.isfinite(values)].astype(np.float64)
    if not values.size:
        return None
    if bounds is None and np.ptp(values) < 1e-3 * max(np.abs(values).max(), 1e-6):
        # Normalised vectors have one length: finer bins would show rounding.
        margin = max(0.01 * abs(values[0]), 0.01)
        bounds = (values[0] - margin, values[0] + margin)
    figure = Figure(figsize=(5.2, 3), layout='constrained')
    axes = figure.subplots()
    axes.hist(values, bins=_BINS, range=bounds, color=_BLUE)
    axes.set_xlabel(label)
    axes.set_ylabel(what)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.spines[['top', 'right']].set_visible(False)
    low, middle, high = np.percentile(values, (0, 50, 100))
    return figure_image(
        figure,
        f'Histogram of {label} of {values.size:,} {what}: lowest {low:.4g}, median '
        f'{middle:.4g}, highest {high:.4g}',
    )


def cards(
    chips: pd.DataFrame,
    features: Sequence[NDArray[np.float32]],
    colours: PCAColours | None,
    quicklooks: Quicklooks | None,
) -> list[Card]:
    """Show chips as examples, their images and their features.

    Args:
        chips: the rows of the chips.
        features: a feature map ``[D, h, w]`` of each; an embedding is a map of 1 x 1.
        colours: how features become colours; None if they cannot.
        quicklooks: where images are; all are stretched alike.
    """
    found = [
        None if quicklooks is None else quicklooks(chip) for _, chip in chips.iterrows()
    ]
    limits = stretch_limits([image for image in found if image is not None])
    result = []
    for (_, chip), image, values in zip(chips.iterrows(), found, features, strict=True):
        images = []
        if image is not None:
            images.append(
                picture_image(
                    stretch_rgb(image, limits=limits), f'Image of chip {chip["id"]}'
                )
            )
        if colours is not None:
            images.append(
                picture_image(
                    map_picture(colours, values),
                    f'Features of chip {chip["id"]} in PCA false colour',
                )
            )
        if images:
            result.append(Card(str(chip['id']), _details(chip), images))
    return result


def _details(chip: pd.Series) -> str:
    words = []
    if pd.notna(chip['start']):
        words.append(f'{chip["start"]:%Y-%m-%d}')
    if pd.notna(chip['valid_fraction']):
        words.append(f'valid {chip["valid_fraction"]:.2f}')
    return ', '.join(words)


def _uri(png: BytesIO) -> str:
    return 'data:image/png;base64,' + base64.b64encode(png.getvalue()).decode('ascii')
