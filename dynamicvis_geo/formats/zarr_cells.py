"""Cells of an array: which chip has them, which block writes them, and seams.

A seam is the file in which a block keeps its cells of shards that are not its own.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynamicvis_geo.errors import OutputError
from dynamicvis_geo.formats.base import Predictions
from dynamicvis_geo.formats.block_files import SUFFIX
from dynamicvis_geo.formats.zarr_group import Group
from dynamicvis_geo.formats.zarr_layout import ArrayShard, Ints, Layout, overlap
from dynamicvis_geo.store import Store

#: Positions in a shard, ``[n]``, and the values there, ``[D, n]``.
Cells = tuple[Ints, NDArray[Any]]
#: Arrays of a seam, for each shard.
_SEAM_ARRAYS = ('cells.npy', 'values.npy')


@dataclass(frozen=True, eq=False)
class Sites:
    """The places that chips have in an array, each once, and whose work they are.

    Attributes:
        layout: The array.
        places: Time, row and column of the first cell, ``[n, 3]``.
        chip: Row of the chip table, -1 for chips that the array holds already.
        block: Block of the plan, -1 for chips of none.
        keys: Number of the shard in which each begins, ascending.
    """

    layout: Layout
    places: Ints
    chip: Ints
    block: Ints
    keys: Ints

    @classmethod
    def of(cls, layout: Layout, places: Ints, chip: Ints, block: Ints) -> Sites:
        """Sort places; of several chips in the same, one with work to do is kept.

        Args:
            layout: The array.
            places: Time, row and column of the first cell, ``[n, 3]``.
            chip: Row of the chip table, -1 for chips that the array holds already.
            block: Block of the plan, -1 for chips of none.
        """
        keys = _key(layout, places[:, 0], *(places[:, 1:] // layout.shard).T)
        order = np.lexsort((chip, block < 0, places[:, 2], places[:, 1], keys))
        again = np.zeros(len(order), dtype=bool)
        again[1:] = (np.diff(places[order], axis=0) == 0).all(axis=1)
        order = order[~again]
        return cls(layout, places[order], chip[order], block[order], keys[order])

    def owners(self, shard: ArrayShard) -> Ints:
        """Find the chip from which each cell of a shard takes its values.

        Args:
            shard: Its number along time, y and x.

        Returns:
            Rows of `places`, ``[rows, columns]``; -1 where there is no chip.
        """
        near = self._near(shard)
        owners = _owners(self.layout, self.places[near], self.layout.window(shard))
        return np.append(near, -1)[owners]

    def _near(self, shard: ArrayShard) -> Ints:
        """Return the chips that reach into a shard, as rows of `places`."""
        time, down, across = shard
        reach = (np.array(self.layout.map_size) - 2) // self.layout.shard + 1
        west = max(0, across - int(reach[1]))
        found = []
        for row in range(max(0, down - int(reach[0])), down + 1):
            ends = (
                _key(self.layout, time, row, west),
                _key(self.layout, time, row, across),
            )
            low = np.searchsorted(self.keys, ends[0], 'left')
            high = np.searchsorted(self.keys, ends[1], 'right')
            found.append(np.arange(low, high))
        rows = np.concatenate(found)
        window = self.layout.window(shard)
        first = self.places[rows, 1:]
        there = (first < np.add(window[:2], window[2:])) & (
            first + self.layout.map_size > window[:2]
        )
        return rows[there.all(axis=1)]


def _owners(layout: Layout, places: Ints, window: tuple[int, int, int, int]) -> Ints:
    """Say which chip each cell of a window takes its values from.

    It is the chip whose centre is nearest; of several, the northernmost, and of
    these the westernmost. This depends on the chips alone, not on their order.

    Args:
        layout: The array.
        places: Chips of one time, ``[n, 3]``.
        window: First row, first column, rows and columns.

    Returns:
        Rows of *places*, ``[rows, columns]``; -1 where there is no chip.
    """
    rows, columns = window[2:]
    height, width = layout.map_size
    aspect = layout.cells.yres / layout.cells.xres
    # Whole numbers, where cells are square, so that ties are ties.
    aspect = 1.0 if math.isclose(aspect, 1.0, rel_tol=1e-9) else aspect
    owner = np.full((rows, columns), -1, np.int64)
    nearest = np.full((rows, columns), np.inf)
    # Half cells from the centre of a chip to the centres of its cells.
    down = (2 * np.arange(height) + 1 - height) * aspect
    across = 2 * np.arange(width) + 1 - width
    distance = down[:, None] ** 2 + across[None, :] ** 2
    for i in np.lexsort((places[:, 2], places[:, 1])).tolist():
        here, inside = overlap(places[i, 1:], (height, width), window)
        closer = distance[inside] < nearest[here]
        nearest[here][closer] = distance[inside][closer]
        owner[here][closer] = i
    return owner


def _key(layout: Layout, time: Any, down: Any, across: Any) -> Any:
    """Number shards through."""
    rows, columns = (
        -(-length // side)
        for length, side in zip(layout.cells.shape, layout.shard, strict=True)
    )
    return (time * rows + down) * columns + across


@dataclass(frozen=True, eq=False)
class Mosaic:
    """The array of one CRS, and all chips that have cells in it.

    Attributes:
        group: The array.
        name: Name of the group.
        sites: Places of the chips.
        dtype: Type of the values.
    """

    group: Group
    name: str
    sites: Sites
    dtype: str

    def cells(
        self, number: int, predictions: Sequence[Predictions]
    ) -> Iterator[tuple[ArrayShard, bool, Iterator[Cells]]]:
        """Yield shards, whether their cells are this block's alone, and its cells.

        Args:
            number: Of the block.
            predictions: Its chips.
        """
        sites = self.sites
        given = {
            row: features
            for some in predictions
            for row, features in zip(some.chip.tolist(), some.embedding, strict=True)
        }
        mine = sites.block == number
        for shard in self.group.layout.shards_of(sites.places[mine]):
            owners = sites.owners(shard)
            present = np.unique(owners[owners >= 0])
            alone = bool((mine[present] | (sites.block[present] < 0)).all())
            # Of those that have failed nothing is given.
            own = {
                site: given[int(sites.chip[site])]
                for site in present[mine[present]].tolist()
                if int(sites.chip[site]) in given
            }
            if own:
                yield shard, alone, self._cells(shard, owners, own)

    def _cells(
        self, shard: ArrayShard, owners: Ints, maps: Mapping[int, NDArray[np.float32]]
    ) -> Iterator[Cells]:
        """Yield what chips own of a shard, chip by chip."""
        layout = self.group.layout
        window = layout.window(shard)
        position = np.arange(owners.size).reshape(owners.shape)
        for site, features in maps.items():
            corner = self.sites.places[site, 1:]
            here, inside = overlap(corner, layout.map_size, window)
            own = owners[here] == site
            yield position[here][own], _cast(features[:, *inside][:, own], self.dtype)


def put_cells(group: Group, shard: ArrayShard, cells: Iterable[Cells]) -> None:
    """Put cells into a shard, all others of which stay as they are.

    Args:
        group: The array.
        shard: Its number along time, y and x.
        cells: Values, and where they belong.
    """
    block = group.read(shard)
    flat = block.reshape(len(block), -1)
    for places, values in cells:
        flat[:, places] = values
    group.put(shard, block)


def write_seam(
    archive: zipfile.ZipFile, place: tuple[str, ArrayShard], cells: Iterable[Cells]
) -> None:
    """Add the cells that a block has in a shard of a group to its seam.

    Args:
        archive: File of the block's seams.
        place: Name of the group, and the shard.
        cells: The cells.
    """
    places, values = zip(*cells, strict=True)
    arrays = np.concatenate(places), np.concatenate(values, axis=1)
    for what, array in zip(_SEAM_ARRAYS, arrays, strict=True):
        with archive.open(_entry(place, what), 'w', force_zip64=True) as file:
            np.lib.format.write_array(file, array)


def read_seam(store: Store, name: str, place: tuple[str, ArrayShard]) -> Cells:
    """Return the cells that a block has kept of a shard of a group.

    Args:
        store: Folder of the blocks.
        name: Of the file.
        place: Name of the group, and the shard.

    Raises:
        OutputError: If they cannot be read.
    """
    with _archive(store, name) as archive:
        parts = []
        for what in _SEAM_ARRAYS:
            with archive.open(_entry(place, what)) as file:
                parts.append(np.lib.format.read_array(file))
    return parts[0], parts[1]


def seam_places(store: Store, name: str) -> Iterator[tuple[str, ArrayShard]]:
    """List group and shard of all cells in a block's file of seams.

    Args:
        store: Folder of the blocks.
        name: Of the file.
    """
    with _archive(store, name) as archive:
        names = archive.namelist()
    for entry in names:
        group, shard, what = entry.split('/')
        time, down, across = map(int, shard.split('.'))
        if what == _SEAM_ARRAYS[0]:
            yield group, (time, down, across)


def _entry(place: tuple[str, ArrayShard], what: str) -> str:
    return f'{place[0]}/{".".join(map(str, place[1]))}/{what}'


@contextmanager
def _archive(store: Store, name: str) -> Iterator[zipfile.ZipFile]:
    with store.open(name) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                yield archive
        except (zipfile.BadZipFile, ValueError) as error:
            block = name.replace('seam-', 'block-', 1).replace('.zip', SUFFIX)
            raise OutputError(
                f"'{store.url}/{name}' cannot be read ({error}): it was damaged after "
                f"it was written; remove it and '{block}', and their chips are "
                'computed again'
            ) from error


def _cast(features: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    with np.errstate(over='ignore'):
        cast = features.astype(dtype)
    if dtype == 'float16' and (np.isinf(cast) & np.isfinite(features)).any():
        raise OutputError(
            f"dtype='float16' cannot hold features of {np.nanmax(np.abs(features)):g}: "
            "use dtype='float32'"
        )
    return cast
