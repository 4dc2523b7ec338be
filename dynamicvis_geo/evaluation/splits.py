"""Splits: samples to learn from, to choose by, and to test on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from dynamicvis_geo.errors import SpecError

#: Names of the splits, in the order of the fractions.
SPLITS = ('train', 'val', 'test')

#: Radius of the sphere with the area of the Earth (GRS 80), metres.
AUTHALIC_RADIUS = 6_371_007.181

#: How many random orders of the blocks are tried, and how many blocks are dealt in all:
#: the more blocks there are, the less the order matters.
_TRIES, _DEALT = 64, 200_000

_SPELLINGS = {
    'train': ('train', 'training', 'trn', 'fit'),
    'val': ('val', 'valid', 'validation', 'validate', 'dev', 'development'),
    'test': ('test', 'testing', 'tst', 'holdout', 'hold-out', 'held-out', 'eval'),
}

Splits = NDArray[np.str_]


def random_split(
    count: int, fractions: Sequence[float] = (0.6, 0.2, 0.2), seed: int = 0
) -> Splits:
    """Draw the splits at random.

    Neighbours are alike, and end up on both sides: scores are too good for places that
    are far from all samples. Prefer :func:`spatial_block_split` there.

    Args:
        count: Number of samples.
        fractions: Shares of train, val and test; val or test may be 0.
        seed: The same seed gives the same splits.

    Returns:
        'train', 'val' or 'test' for each sample, ``[count]``.

    Raises:
        SpecError: If a fraction is wrong, or a split would have no sample.
    """
    sizes = _sizes(count, _checked(fractions))
    splits = np.repeat(SPLITS, sizes)
    return np.random.default_rng(seed).permutation(splits)


def stratified_split(
    labels: ArrayLike, fractions: Sequence[float] = (0.6, 0.2, 0.2), seed: int = 0
) -> Splits:
    """Draw the splits at random, of each class its share.

    Args:
        labels: Class of each sample, ``[n]``.
        fractions: Shares of train, val and test; val or test may be 0.
        seed: The same seed gives the same splits.

    Returns:
        'train', 'val' or 'test' for each sample, ``[n]``; every split has every class.

    Raises:
        SpecError: If a fraction is wrong, there is only one class, or a class has fewer
            samples than there are splits.
    """
    classes = np.asarray(labels)
    if classes.ndim != 1:
        raise SpecError(
            f'labels of shape {classes.shape} are not one class a sample, which a '
            'stratified split needs: use a random or spatial one'
        )
    shares = _checked(fractions)
    names, codes = np.unique(classes, return_inverse=True)
    if len(names) < 2:
        raise SpecError(f'labels have {len(names)} class: a stratified split needs two')
    rng = np.random.default_rng(seed)
    splits = np.empty(len(classes), dtype='<U5')
    owed = np.zeros(len(shares))
    for code, name in enumerate(names):
        members = np.flatnonzero(codes == code)
        sizes = _sizes(len(members), shares, f' of class {name}', owed)
        owed += shares * len(members) - sizes
        splits[members] = rng.permutation(np.repeat(SPLITS, sizes))
    return splits


def spatial_block_split(
    lon: ArrayLike,
    lat: ArrayLike,
    block_m: float,
    fractions: Sequence[float] = (0.6, 0.2, 0.2),
    seed: int = 0,
    labels: ArrayLike | None = None,
) -> Splits:
    """Draw whole blocks of land, so that the splits lie apart.

    Blocks are drawn in random order, each for the split that lacks most samples; of
    several orders the one is taken that lets most splits have most classes, and then
    the one that keeps the fractions best. Chips that overlap, or lie side by side, can
    still be in two blocks and so in two splits (EmbeddingDataModule leaves out those
    that overlap): choose blocks many times as wide as a chip, and as wide as places
    resemble each other.

    Args:
        lon: Longitude of each sample, degrees, ``[n]``.
        lat: Latitude of each sample, degrees, ``[n]``.
        block_m: Side of a block on the ground, metres; see :func:`block_numbers`.
        fractions: Shares of train, val and test; val or test may be 0.
        seed: The same seed gives the same splits.
        labels: Class of each sample, ``[n]``, so that no split lacks one needlessly.

    Returns:
        'train', 'val' or 'test' for each sample, ``[n]``.

    Raises:
        SpecError: If an argument is wrong, or there are fewer blocks than splits.
    """
    shares = _checked(fractions)
    _, blocks = np.unique(block_numbers(lon, lat, block_m), return_inverse=True)
    sizes = np.bincount(blocks)
    wanted = int((shares > 0).sum())
    if len(sizes) < wanted:
        raise SpecError(
            f'block_m={block_m:g}: all {len(blocks)} samples lie in {len(sizes)} '
            f'block{"s" * (len(sizes) != 1)}, too few for {wanted} splits: use smaller '
            'blocks'
        )
    if labels is None:
        codes = np.zeros(len(blocks), np.int64)
    else:
        _, codes = np.unique(np.asarray(labels), return_inverse=True)
    # Samples of each class in each block.
    members = np.zeros((len(sizes), codes.max() + 1), np.int64)
    np.add.at(members, (blocks, codes), 1)
    rng = np.random.default_rng(seed)
    tries = max(1, min(_TRIES, _DEALT // len(sizes)))
    dealt = (_deal(rng.permutation(len(sizes)), sizes, shares) for _ in range(tries))
    best = min(dealt, key=lambda splits: _badness(splits, members, shares))
    return np.array(SPLITS)[best[blocks]]


def block_numbers(lon: ArrayLike, lat: ArrayLike, block_m: float) -> NDArray[np.int64]:
    """Return the block of land in which each place lies.

    Blocks stand in rows from the south pole to the north pole. A row is *block_m* high;
    as many blocks of the same width as come nearest to *block_m* fill it all around, so
    that blocks are about as wide at every latitude and none is cut at the antimeridian.
    Lengths are those on the sphere with the area of the Earth: within 1 % of those on
    the ground.

    Args:
        lon: Longitudes, degrees, ``[n]``; any turn of the globe.
        lat: Latitudes, degrees, ``[n]``.
        block_m: Side of a block, metres.

    Returns:
        int64 ``[n]``; equal numbers are the same block.

    Raises:
        SpecError: If the side is not positive, or a place is none.
    """
    if not (np.isfinite(block_m) and block_m > 0):
        raise SpecError(f'block_m={block_m!r} must be a length in metres, above 0')
    lons, lats = np.asarray(lon, np.float64), np.asarray(lat, np.float64)
    if lons.shape != lats.shape or lons.ndim != 1 or not len(lons):
        raise SpecError(
            f'lon and lat must hold one place a sample, not {lons.shape} and '
            f'{lats.shape} numbers'
        )
    wrong = np.flatnonzero(~(np.isfinite(lons) & (np.abs(lats) <= 90)))
    if len(wrong):
        i = wrong[0]
        raise SpecError(
            f'sample {i} lies at lon={lons[i]}, lat={lats[i]}: no such place'
        )
    height = block_m / AUTHALIC_RADIUS
    row = np.floor((np.radians(lats) + np.pi / 2) / height)
    middle = np.clip((row + 0.5) * height - np.pi / 2, -np.pi / 2, np.pi / 2)
    around = np.maximum(np.rint(2 * np.pi * np.cos(middle) / height), 1)
    column = np.floor((lons + 180) % 360 / 360 * around)
    widest = int(np.ceil(2 * np.pi / height)) + 1
    numbers: NDArray[np.int64] = row.astype(np.int64) * widest + column.astype(np.int64)
    return numbers


def column_split(values: ArrayLike) -> Splits:
    """Read the splits from a column.

    Args:
        values: For each sample 'train', 'val' or 'test', in any case and in the usual
            spellings ('training', 'valid', 'validation', 'dev', 'testing', 'holdout').

    Returns:
        'train', 'val' or 'test' for each sample; '' where the value is missing.

    Raises:
        SpecError: If a value is something else, or none is 'train'.
    """
    column = pd.Series(np.asarray(values, dtype=object))
    written = column.astype(str).str.strip().str.lower()
    known = {word: name for name, words in _SPELLINGS.items() for word in words}
    splits = written.map(known).where(column.notna() & (written != ''), '')
    unknown = column[splits.isna()].unique()
    if len(unknown):
        shown = ', '.join(repr(value) for value in unknown[:5])
        raise SpecError(f'the splits {shown} are none of {", ".join(SPLITS)}')
    if not (splits == 'train').any():
        raise SpecError("the column gives no sample to the split 'train'")
    return splits.to_numpy().astype('<U5')


def _checked(fractions: Sequence[float]) -> NDArray[np.float64]:
    try:
        shares = np.asarray(fractions, np.float64)
    except (TypeError, ValueError):
        shares = np.empty(0)
    if shares.shape != (3,) or not (shares >= 0).all() or shares[0] == 0:
        raise SpecError(
            f'fractions={fractions!r} must be three shares, of train, val and test, '
            'with something for train'
        )
    if abs(shares.sum() - 1) > 1e-6:
        raise SpecError(f'fractions={fractions!r} add up to {shares.sum():g}, not to 1')
    return shares


def _sizes(
    count: int,
    shares: NDArray[np.float64],
    which: str = '',
    owed: NDArray[np.float64] | float = 0.0,
) -> NDArray[np.int64]:
    """Divide a number, at least one for each share above 0.

    What is left after rounding down goes to the largest remainders, and first to whom
    most is owed from earlier divisions.
    """
    wanted = int((shares > 0).sum())
    if count < wanted:
        raise SpecError(
            f'{count} sample{"s" * (count != 1)}{which}, too few for {wanted} splits: '
            f'add some{", or leave the class out" if which else ""}'
        )
    exact = shares * count
    sizes = np.floor(exact).astype(np.int64)
    order = np.argsort(sizes - exact - owed, kind='stable')
    order = order[shares[order] > 0]
    sizes[order[: count - sizes.sum()]] += 1
    for split in np.flatnonzero((shares > 0) & (sizes == 0)):
        sizes[np.argmax(sizes)] -= 1
        sizes[split] += 1
    return sizes


def _deal(
    order: NDArray[np.int64], sizes: NDArray[np.int64], shares: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Give each block, in turn, to the split that lacks most samples."""
    lacking = shares * sizes.sum()
    dealt = np.empty(len(sizes), np.int64)
    for block in order:
        split = int(np.argmax(lacking))
        dealt[block] = split
        lacking[split] -= sizes[block]
    return dealt


def _badness(
    dealt: NDArray[np.int64], members: NDArray[np.int64], shares: NDArray[np.float64]
) -> tuple[int, int, float]:
    """Splits without samples, classes that splits lack, distance from the fractions."""
    counts = np.zeros((len(shares), members.shape[1]), np.int64)
    np.add.at(counts, dealt, members)
    asked = counts[shares > 0]
    totals = counts.sum(axis=1)
    off = float(np.abs(totals / totals.sum() - shares).max())
    return int((asked.sum(axis=1) == 0).sum()), int((asked == 0).sum()), off
