"""Pictures of chips and of their features."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.decomposition import PCA

from dynamicvis_geo.errors import SpecError

Picture = NDArray[np.float32]

_FIT_CELLS = 200_000


def stretch_rgb(
    image: NDArray[np.generic], percentiles: tuple[float, float] = (2.0, 98.0)
) -> Picture:
    """Stretch each band between two of its percentiles.

    Args:
        image: ``[3, H, W]`` in RGB order, any range.
        percentiles: what becomes black and what becomes full.

    Returns:
        ``[H, W, 3]`` in 0..1.
    """
    return _to_unit(np.moveaxis(image.astype(np.float32), 0, -1), percentiles)


def pca_false_colour(
    maps: Sequence[NDArray[np.floating]],
    percentiles: tuple[float, float] = (1.0, 99.0),
) -> list[Picture]:
    """Show the three main components of feature maps as red, green and blue.

    One PCA and one stretch serve all maps, so that their colours can be compared.

    Args:
        maps: feature maps ``[D, h, w]`` of one model, of any sizes.
        percentiles: what becomes black and what becomes full.

    Returns:
        one ``[h, w, 3]`` in 0..1 a map.

    Raises:
        SpecError: if the maps have fewer than 3 channels or fewer than 3 cells.
    """
    cells = [np.moveaxis(m, 0, -1).reshape(-1, m.shape[0]) for m in maps]
    together = np.concatenate(cells).astype(np.float32)
    if min(together.shape) < 3:
        raise SpecError(
            f'maps have {together.shape[0]} cells of {together.shape[1]} channels: '
            'three components need at least 3 of each'
        )
    step = -(-len(together) // _FIT_CELLS)
    pca = PCA(n_components=3, random_state=0).fit(together[::step])
    colours = _to_unit(pca.transform(together).astype(np.float32), percentiles)
    ends = np.cumsum([len(c) for c in cells])[:-1]
    return [
        part.reshape(*m.shape[1:], 3)
        for part, m in zip(np.split(colours, ends), maps, strict=True)
    ]


def plot_features(
    image: NDArray[np.generic],
    feature_map: NDArray[np.floating],
    title: str | None = None,
) -> Figure:
    """Draw an image beside the PCA false colour of its feature map.

    Args:
        image: ``[3, H, W]`` in RGB order, any range.
        feature_map: ``[D, h, w]``.
        title: written above both.

    Returns:
        the figure.
    """
    figure = Figure(figsize=(10, 5.4), layout='constrained')
    left, right = figure.subplots(1, 2)
    left.imshow(stretch_rgb(image), interpolation='nearest')
    left.set_title(f'image, {image.shape[2]} x {image.shape[1]} pixels')
    right.imshow(pca_false_colour([feature_map])[0], interpolation='nearest')
    channels, height, width = feature_map.shape
    right.set_title(f'features, {width} x {height} cells, {channels} channels (PCA)')
    for axes in (left, right):
        axes.set_axis_off()
    if title:
        figure.suptitle(title)
    return figure


def _to_unit(values: Picture, percentiles: tuple[float, float]) -> Picture:
    axes = tuple(range(values.ndim - 1))
    low, high = np.nanpercentile(values, percentiles, axis=axes)
    span = np.where(high > low, high - low, 1)
    unit: Picture = np.clip(np.nan_to_num((values - low) / span), 0, 1)
    return unit.astype(np.float32)
