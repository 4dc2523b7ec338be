"""Pictures within a page, which needs no other file then."""

import base64
from dataclasses import dataclass
from io import BytesIO

import matplotlib.image
from matplotlib.figure import Figure

from dynamicvis_geo.plotting.colours import Picture


@dataclass(frozen=True)
class Image:
    """A picture within the page.

    Attributes:
        uri: The PNG, as a data URI.
        alt: What it shows, for those who cannot see it.
    """

    uri: str
    alt: str


def figure_image(figure: Figure, alt: str, dpi: int = 100) -> Image:
    """Turn a figure into an image of the page.

    Args:
        figure: The figure.
        alt: What it shows.
        dpi: Pixels an inch.
    """
    buffer = BytesIO()
    figure.savefig(buffer, format='png', dpi=dpi)
    return Image(_uri(buffer), alt)


def picture_image(picture: Picture, alt: str) -> Image:
    """Turn a picture into an image of the page, a pixel a pixel.

    Args:
        picture: ``[h, w, 3]`` in 0..1.
        alt: What it shows.
    """
    buffer = BytesIO()
    matplotlib.image.imsave(buffer, picture, format='png')
    return Image(_uri(buffer), alt)


def _uri(png: BytesIO) -> str:
    return 'data:image/png;base64,' + base64.b64encode(png.getvalue()).decode('ascii')
