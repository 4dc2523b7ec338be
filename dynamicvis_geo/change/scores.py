"""Distances between two dates, and how far they stand out from those of all places."""

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from dynamicvis_geo.similarity.search import unit_vectors

Floats = NDArray[np.float64]
#: Vectors of places before and after, float32 ``[n, D]`` each.
Pair = tuple[NDArray[np.float32], NDArray[np.float32]]

#: From this score on a place stands out (Iglewicz and Hoaglin, 1993).
THRESHOLD = 3.5
#: Of fewer places nothing can be said of what is usual among them.
FEWEST = 10
#: Places from which the shift that all have in common is taken, at most.
SAMPLE = 10_000

#: The MAD of a normal distribution times this is its standard deviation.
_MAD_TO_SD = 1.4826
#: Distances below this are rounding of float32.
_ROUNDING = 1e-12
#: Vectors that are worked with at a time, in float64.
_SLAB = 4096


def common_shift(pairs: Iterable[Pair]) -> Floats | None:
    """Find what changed everywhere, such as the season or the haze.

    Args:
        pairs: A sample of places.

    Returns:
        float64 ``[D]``, the median of the differences of their unit vectors, number by
        number; None if no place has a vector at both dates.
    """
    found = [
        difference[np.isfinite(difference).all(axis=1)].astype(np.float32)
        for difference in _differences(pairs)
    ]
    together = np.concatenate(found) if found else np.empty((0, 0), np.float32)
    return np.median(together, axis=0).astype(np.float64) if len(together) else None


def distances(pairs: Iterable[Pair], shift: Floats) -> tuple[Floats, Floats]:
    """Compute the distances of all places.

    Args:
        pairs: The places.
        shift: As :func:`common_shift` gives it.

    Returns:
        The cosine distances of their vectors, and what of these the common shift
        leaves; NaN where a vector is zero or not finite, and has no direction.
    """
    whole, rest = [np.empty(0)], [np.empty(0)]
    for difference in _differences(pairs):
        whole.append(_half_square(difference))
        rest.append(_half_square(difference - shift))
    return np.concatenate(whole), np.concatenate(rest)


def robust_scores(rest: Floats) -> tuple[Floats, str | None]:
    """Scale distances by those of the places that did not change.

    Args:
        rest: Distances; those that are NaN do not count.

    Returns:
        For each place the deviation of the logarithm of its distance from the median of
        all, in units of 1.4826 times the median absolute deviation. And why all are
        NaN, if they are.
    """
    none, known = np.full(len(rest), np.nan), rest[np.isfinite(rest)]
    if len(known) < FEWEST:
        places = '1 place has' if len(known) == 1 else f'{len(known)} places have'
        return none, (
            f'only {places} a vector at both dates, and what is usual takes {FEWEST}, '
            'so that there are distances, but no scores'
        )
    logs = np.log(np.maximum(rest, _ROUNDING))
    middle = np.nanmedian(logs)
    spread = _MAD_TO_SD * np.nanmedian(np.abs(logs - middle))
    if spread < np.sqrt(_ROUNDING):
        return none, (
            'the distances of most places are equal, so that there is no measure of '
            'what is usual: there are distances, but no scores; perhaps both are of '
            'the same images'
        )
    return (logs - middle) / spread, None


def _differences(pairs: Iterable[Pair]) -> Iterator[Floats]:
    """Yield unit vectors after less those before, some at a time."""
    for before, after in pairs:
        for first in range(0, len(before), _SLAB):
            some = slice(first, first + _SLAB)
            yield unit_vectors(after[some]) - unit_vectors(before[some])


def _half_square(difference: Floats) -> Floats:
    """Return 1 - cos of unit vectors from their difference, exactly also near 0."""
    values: Floats = np.einsum('ij,ij->i', difference, difference) / 2
    return values
