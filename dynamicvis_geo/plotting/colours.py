"""Values as colours: the stretch of an image, and PCA false colour."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dynamicvis_geo.errors import SpecError

#: Colours in 0..1; the last axis is red, green, blue.
Picture = NDArray[np.float32]
#: What becomes black and what becomes white.
Limits = tuple[float, float]

#: Vectors from which a PCA is fitted, at most: 150 MB of 768 float32.
FIT_VECTORS = 50_000
#: What is shown where there is nothing to show.
MISSING = 1.0

_FIT_PIXELS = 200_000


def stretch_limits(
    images: Iterable[NDArray[np.generic]],
    percentiles: tuple[float, float] = (2.0, 98.0),
) -> Limits:
    """Find one stretch for several images, so that they can be compared.

    Args:
        images: ``[C, H, W]`` each; what is not finite is left out.
        percentiles: What becomes black and what becomes white, of all bands together.

    Returns:
        The two values; (0, 1) if no value is finite.
    """
    samples = []
    for image in images:
        values = image.reshape(-1)
        values = values[:: -(-values.size // _FIT_PIXELS) or 1].astype(np.float32)
        samples.append(values[np.isfinite(values)])
    together = np.concatenate(samples) if samples else np.empty(0, np.float32)
    if not together.size:
        return 0.0, 1.0
    low, high = np.percentile(together, percentiles)
    return float(low), float(high)


def stretch_rgb(
    image: NDArray[np.generic],
    percentiles: tuple[float, float] = (2.0, 98.0),
    limits: Limits | None = None,
) -> Picture:
    """Stretch an image between two percentiles of all its bands together.

    One stretch for all bands keeps their proportions, and so the hues: what is grey on
    the ground stays grey, and a chip of open water does not become a rainbow of noise,
    as it does when each band is stretched alone.

    Args:
        image: ``[3, H, W]`` in RGB order, or ``[1, H, W]`` to be shown in grey; any
            range. NaN stands for a missing pixel.
        percentiles: What becomes black and what becomes full.
        limits: The values themselves, instead of percentiles of this image.

    Returns:
        ``[H, W, 3]`` in 0..1; white where a band is missing.

    Raises:
        SpecError: If the image has neither 1 nor 3 bands, or no pixels.
    """
    if image.ndim != 3 or image.shape[0] not in (1, 3) or image.size == 0:
        raise SpecError(
            f'image has shape {image.shape}: a picture needs [3, height, width], or '
            '[1, height, width] for grey'
        )
    low, high = stretch_limits([image], percentiles) if limits is None else limits
    values = np.moveaxis(image.astype(np.float32), 0, -1)
    return np.repeat(_to_unit(values, low, high), 3 // image.shape[0], axis=-1)


@dataclass(frozen=True)
class PCAColours:
    """The three main components of vectors as red, green and blue.

    Fitted once and then applied to any number of vectors, so that equal vectors have
    equal colours everywhere. All components have the scale of the widest one, each
    around its own middle: one of little variance shows little colour. Those that the
    vectors do not have (fewer than three channels, or of vectors) are middle grey.

    Attributes:
        mean: Float32 ``[D]``, the mean of the vectors.
        components: Float32 ``[3, D]``, orthonormal; zero where there are fewer.
        low: Float32 ``[3]``, the coordinate that becomes 0.
        high: Float32 ``[3]``, the coordinate that becomes 1.
        explained: Float32 ``[3]``, the share of the variance of each component, 0..1.
    """

    mean: NDArray[np.float32]
    components: NDArray[np.float32]
    low: NDArray[np.float32]
    high: NDArray[np.float32]
    explained: NDArray[np.float32]

    @classmethod
    def fit(
        cls,
        vectors: NDArray[np.floating],
        percentiles: tuple[float, float] = (1.0, 99.0),
    ) -> 'PCAColours':
        """Fit to vectors, or to a random sample of 50,000 of them.

        Args:
            vectors: ``[N, D]``; those that are not finite are left out.
            percentiles: Coordinates of the widest component that become 0 and 1.

        Returns:
            The colours.

        Raises:
            SpecError: If no vector is finite.
        """
        sample = sample_rows(vectors, FIT_VECTORS).astype(np.float32)
        sample = sample[np.isfinite(sample).all(axis=1)]
        if not sample.size:
            raise SpecError(
                f'vectors of shape {vectors.shape}: none is finite, there is nothing '
                'to colour'
            )
        mean = sample.mean(axis=0, dtype=np.float64).astype(np.float32)
        # Differences of rounding are no variance.
        spread = sample.std(axis=0) > 1e-6 * np.abs(sample).max(axis=0)
        count = min(3, sample.shape[0] - 1, sample.shape[1]) if spread.any() else 0
        components = np.zeros((3, sample.shape[1]), np.float32)
        explained = np.zeros(3, np.float32)
        if count:
            components[:count], explained[:count] = _main_axes(sample - mean, count)
            components[explained < 1e-6] = 0
        scores = (sample - mean) @ components.T
        low, high = np.percentile(scores, percentiles, axis=0).astype(np.float32)
        middle, half = (low + high) / 2, (high - low).max() / 2 or 1
        return cls(mean, components, middle - half, middle + half, explained)

    @property
    def shares(self) -> str:
        """Shares of the variance in words, for a caption."""
        there = [100 * float(share) for share in self.explained if share > 0]
        if not there:
            return 'all are the same'
        *first, last = [f'{x:.0f}' if x > 99.95 else f'{x:.1f}' for x in there]
        return f'{", ".join(first)}{" and " if first else ""}{last} % of the variance'

    @property
    def words(self) -> str:
        """Meaning of the colours in words, for a caption."""
        return f'main components (PCA) as red, green and blue: {self.shares}'

    def __call__(self, vectors: NDArray[np.floating]) -> Picture:
        """Colour vectors ``[..., D]``: ``[..., 3]`` in 0..1, NaN where not finite."""
        if vectors.shape[-1] != len(self.mean):
            raise SpecError(
                f'vectors have {vectors.shape[-1]} channels, but the colours were '
                f'fitted to {len(self.mean)}: outputs of one model have equal channels'
            )
        scores = (vectors.astype(np.float32) - self.mean) @ self.components.T
        unit: Picture = np.clip((scores - self.low) / (self.high - self.low), 0, 1)
        return unit


def _main_axes(
    centred: NDArray[np.float32], count: int
) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Find the directions of most variance, and their shares of it.

    As scikit-learn's PCA does, the import of which alone takes a second.

    Args:
        centred: ``[N, D]``, with a mean of zero.
        count: How many.

    Returns:
        ``[count, D]``, orthonormal, the largest number of each positive; and
        ``[count]``.
    """
    if len(centred) < centred.shape[1]:
        _, deviations, axes = np.linalg.svd(centred, full_matrices=False)
        variances = deviations**2
    else:
        covariance = (centred.T @ centred).astype(np.float64)
        variances, axes = np.linalg.eigh(covariance)
        variances, axes = variances[::-1].clip(0), axes.T[::-1]
    axes = axes[:count]
    largest = np.take_along_axis(axes, np.abs(axes).argmax(axis=1)[:, None], axis=1)
    return axes * np.sign(largest), variances[:count] / variances.sum()


def pca_false_colour(
    maps: Sequence[NDArray[np.floating]],
    percentiles: tuple[float, float] = (1.0, 99.0),
) -> list[Picture]:
    """Show the three main components of feature maps as red, green and blue.

    One PCA and one stretch serve all maps, so that their colours can be compared. They
    are fitted to a sample of the cells; see :class:`PCAColours` to colour more maps
    than memory holds.

    Args:
        maps: Feature maps ``[D, h, w]`` of one model, of any sizes.
        percentiles: What becomes black and what becomes full.

    Returns:
        One ``[h, w, 3]`` in 0..1 a map; white where a feature is not finite.

    Raises:
        SpecError: If the maps have fewer than 3 channels or fewer than 3 cells, or
            differ in the number of channels.
    """
    colours = fit_map_colours(maps, percentiles)
    return [map_picture(colours, features) for features in maps]


def fit_map_colours(
    maps: Sequence[NDArray[np.floating]],
    percentiles: tuple[float, float] = (1.0, 99.0),
) -> PCAColours:
    """Fit colours to the cells of feature maps of one model.

    Args:
        maps: ``[D, h, w]`` each.
        percentiles: Those of the coordinates that become 0 and 1.

    Returns:
        The colours.

    Raises:
        SpecError: As :func:`pca_false_colour`.
    """
    channels = {m.shape[0] for m in maps}
    if len(channels) > 1:
        raise SpecError(
            f'maps have {" and ".join(map(str, sorted(channels)))} channels: one PCA '
            'serves the maps of one model only'
        )
    share = FIT_VECTORS // max(len(maps), 1) or 1
    cells = [sample_rows(m.reshape(m.shape[0], -1).T, share) for m in maps]
    together = np.concatenate(cells) if cells else np.empty((0, 0), np.float32)
    finite = together[np.isfinite(together).all(axis=1)]
    if min(finite.shape) < 3:
        raise SpecError(
            f'maps have {finite.shape[0]} cells of {finite.shape[1]} channels: '
            'three components need at least 3 of each: give larger maps, or more'
        )
    return PCAColours.fit(finite, percentiles)


def map_picture(colours: PCAColours, features: NDArray[np.floating]) -> Picture:
    """Colour a feature map.

    Args:
        colours: Fitted to maps of the same model.
        features: ``[D, h, w]``.

    Returns:
        ``[h, w, 3]`` in 0..1; white where a feature is not finite.
    """
    coloured = colours(np.moveaxis(features, 0, -1))
    return np.nan_to_num(coloured, nan=MISSING)


def sample_rows(rows: NDArray[np.floating], count: int) -> NDArray[np.floating]:
    """Draw rows at random, always the same.

    Args:
        rows: ``[N, D]``.
        count: Most rows to return.

    Returns:
        ``[n, D]``, in their order; all if there are no more.
    """
    if len(rows) <= count:
        return rows
    chosen = np.random.default_rng(0).choice(len(rows), count, replace=False)
    return rows[np.sort(chosen)]


def _to_unit(values: Picture, low: float, high: float) -> Picture:
    """Stretch; white where the last axis misses a value."""
    unit = np.clip((values - low) / (high - low if high > low else 1), 0, 1)
    missing = ~np.isfinite(values).all(axis=-1, keepdims=True)
    return np.where(missing, MISSING, unit).astype(np.float32)
