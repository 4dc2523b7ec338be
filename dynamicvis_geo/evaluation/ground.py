"""The ground that chips stand on: their places, and what they share across splits."""

from __future__ import annotations

import numpy as np
import pandas as pd
import shapely
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.evaluation.splits import Splits, block_numbers

#: Length of a degree of latitude, metres.
_DEGREE = 111_195.0

#: Sides of blocks to choose from, metres; between places further apart than the widest
#: hardly anything is alike.
_SIDES = (*(float(f * 10**e) for e in range(1, 5) for f in (1, 2, 5)), 100_000.0)

#: Blocks that make good intervals of the test split, where there are as many places.
_ENOUGH = 100

#: Blocks that are let be as few so that they are this many chips wide.
_FEW, _CHIPS_WIDE = 20, 4

#: Part of a footprint that is not yet shared ground, but rounding.
_SLIVER = 1e-4

#: With fewer places a block, on average, most blocks hold one.
_PLACES_A_BLOCK = 1.5


def number_places(chips: pd.DataFrame) -> NDArray[np.int64]:
    """Number the places of chips; those of several dates have one.

    Args:
        chips: A row a chip; those with the same ``point_id``, or with the same
            ``centre_lon`` and ``centre_lat`` to six decimals, are at one place. Without
            such columns, or values, every chip has a place for itself.

    Returns:
        int64 ``[n]``, counted from 0 in the order of the chips.
    """
    chip = np.arange(len(chips))
    ends = [chip]
    for names in (['point_id'], ['centre_lon', 'centre_lat']):
        if set(names) <= set(chips.columns):
            same = chips[names].round(6).groupby(names, sort=False).ngroup()
            _, first, code = np.unique(same, return_index=True, return_inverse=True)
            ends.append(np.where(chips[names].notna().all(axis=1), first[code], chip))
    links = np.stack([np.tile(chip, len(ends)), np.concatenate(ends)])
    graph = coo_array((np.ones(links.shape[1]), links), shape=(len(chip), len(chip)))
    places: NDArray[np.int64]
    places, _ = pd.factorize(connected_components(graph, directed=False)[1])
    return places


def choose_block(lon: ArrayLike, lat: ArrayLike, chip_m: float = 0.0) -> float:
    """Choose the side of blocks: as wide as the intervals of scores can bear.

    That is the widest of 10, 20, 50, 100 m and so on to 100 km that divides the places
    into 100 blocks, or half as many as there are places. Blocks of less than four chips
    may be fewer, but 20: across the edges of small blocks, most chips share ground.

    Args:
        lon: Longitude of each place, degrees, ``[n]``.
        lat: Latitude of each place, degrees, ``[n]``.
        chip_m: Side of a chip, metres.

    Returns:
        Metres.

    Raises:
        SpecError: If a place is none.
    """
    enough = max(3, min(_ENOUGH, len(np.asarray(lon)) // 2))
    for side in reversed(_SIDES):
        needed = min(_FEW, enough) if side < _CHIPS_WIDE * chip_m else enough
        if len(np.unique(block_numbers(lon, lat, side))) >= needed:
            return side
    return _SIDES[0]


def height_m(footprints: NDArray[np.object_]) -> float:
    """Measure the side of chips from south to north.

    Args:
        footprints: Shapely geometries in degrees, ``[n]``.

    Returns:
        The median, metres.
    """
    _, south, _, north = shapely.bounds(footprints).T
    return float(np.median(north - south)) * _DEGREE


def shared_ground(footprints: NDArray[np.object_], splits: Splits) -> NDArray[np.int64]:
    """Find the chips of different splits that share ground.

    Args:
        footprints: Shapely geometries in degrees, cut at the antimeridian, ``[n]``.
        splits: Split of each, ``[n]``; '' is in none.

    Returns:
        Pairs of positions, int64 ``[m, 2]``, each pair in both orders. Chips that only
        touch share none.
    """
    tree = shapely.STRtree(footprints)
    one, two = tree.query(footprints, predicate='intersects')
    across = (splits[one] != splits[two]) & (splits[one] != '') & (splits[two] != '')
    one, two = one[across], two[across]
    common = shapely.area(shapely.intersection(footprints[one], footprints[two]))
    smaller = np.minimum(*(shapely.area(footprints[side]) for side in (one, two)))
    pairs: NDArray[np.int64] = np.stack([one, two], 1)[common > _SLIVER * smaller]
    return pairs


def without_shared_ground(splits: Splits, pairs: NDArray[np.int64]) -> Splits:
    """Leave out chips until no two splits share ground.

    Those to train and to validate give way to those to test, and those to train to
    those that are left to validate.

    Args:
        splits: Split of each chip, ``[n]``.
        pairs: As :func:`shared_ground` finds them.

    Returns:
        The splits, '' for chips that were left out.
    """
    kept = splits.copy()
    for stays in ('test', 'val'):
        beside = pairs[kept[pairs[:, 1]] == stays, 0]
        kept[beside[~np.isin(kept[beside], ('test', stays))]] = ''
    return kept


def refuse_torn(
    chips: pd.DataFrame, places: NDArray[np.int64], splits: Splits, column: str
) -> None:
    """Refuse places that a column puts into several splits.

    Args:
        chips: A row a chip, if known with its ``id``.
        places: Place of each, ``[n]``.
        splits: Split of each, ``[n]``.
        column: Name of the column, for the error.

    Raises:
        SpecError: If there is one.
    """
    told = pd.Series(splits).groupby(places).transform('nunique').to_numpy() > 1
    if told.any():
        one = np.flatnonzero(places == places[told][0])
        name = chips['id'].iloc[one[0]] if 'id' in chips else f'{one[0]}'
        raise SpecError(
            f'column {column!r} divides {len(np.unique(places[told]))} places that '
            f'have several chips (dates), such as that of {name}: '
            f'{", ".join(sorted(set(splits[one])))}; give all chips of a place one '
            'split, or leave some empty'
        )


def keep_apart(
    chips: pd.DataFrame, splits: Splits, kind: str
) -> tuple[Splits, tuple[str, ...]]:
    """Leave out, or count, chips that share ground with those of another split.

    Args:
        chips: A row a chip, if known with its ``geometry``.
        splits: Split of each, ``[n]``.
        kind: 'spatial', of which they are left out; any other is counted.

    Returns:
        The splits, '' for chips that were left out; and notes for a reader of scores.

    Raises:
        SpecError: If a split has no chip left.
    """
    notes: tuple[str, ...] = ()
    if kind in ('random', 'stratified'):
        notes = (
            f'after a {kind} split, places to test on have neighbours to learn from; a '
            'spatial one (--split spatial) tells more of new places',
        )
    if 'geometry' not in chips:
        return splits, (
            *notes,
            'without footprints, it is not known if splits share ground',
        )
    pairs = shared_ground(chips['geometry'].to_numpy(), splits)
    if not len(pairs):
        return splits, notes
    if kind != 'spatial':
        tested = np.unique(pairs[splits[pairs[:, 0]] == 'test', 0])
        note = (
            f'{len(tested)} of {(splits == "test").sum()} chips to test share ground '
            'with chips to train or validate'
        )
        return splits, (*notes, note)
    kept = without_shared_ground(splits, pairs)
    for name in sorted(set(splits)):
        if name not in kept:
            raise SpecError(
                f'all chips of split {name!r} share ground with chips of other splits: '
                'use wider blocks (block_m=), or fewer overlapping chips'
            )
    note = (
        f'{(kept == "").sum()} of {len(kept)} chips were left out, which share ground '
        'with chips of another split'
    )
    return kept, (note,)


def sparse_blocks(
    blocks: NDArray[np.int64], places: NDArray[np.int64]
) -> tuple[str, ...]:
    """Say if blocks of a split hold hardly more than a place each.

    Args:
        blocks: Block of each chip to test, ``[n]``.
        places: Place of each, ``[n]``.

    Returns:
        The note, or none.
    """
    count, there = len(np.unique(blocks)), len(np.unique(places))
    if not there or there >= _PLACES_A_BLOCK * count:
        return ()
    return (
        f'the test split has {there} place{"s" * (there != 1)} in {count} '
        f'block{"s" * (count != 1)}: intervals resample nearly single places, and are '
        'too narrow where neighbouring blocks are alike; wider blocks (--block) would '
        'tell more',
    )
