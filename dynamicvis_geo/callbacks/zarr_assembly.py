"""What remains to be done when all chips are staged: which shards, from which chips."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dynamicvis_geo.callbacks.finished_maps import (
    CHIPS_FILE,
    STAGING,
    FinishedMaps,
    StagedMaps,
)
from dynamicvis_geo.callbacks.mosaic import ChipGrid, Ints, Layout, Shard, overlap
from dynamicvis_geo.callbacks.zarr_group import group_name, open_array, read_layout
from dynamicvis_geo.errors import OutputError


def replaced_folder(target: Path) -> Path:
    """Return the folder of groups that are being replaced by larger ones."""
    return target / STAGING / 'replaced'


def find_group(target: Path, crs: str) -> Path | None:
    """Return the group that holds what is finished in a CRS; None if there is none."""
    name = group_name(crs)
    # A run that was killed between the two renames that replace it has left it there.
    places = target / name, replaced_folder(target) / name
    return next((place for place in places if place.exists()), None)


@dataclass(frozen=True)
class Mosaic:
    """What is to be done for one CRS.

    Attributes:
        crs: Name of the CRS.
        name: Name of the group.
        layout: Layout of the array to be.
        base: Folder of the group that is there; None if there is none.
        old: Layout of that group.
        chips: Rows of the chips of this CRS among the finished ones.
        places: Their places in *layout*.
        shards: The shards to write, and for each of them rows of *places*.
    """

    crs: str
    name: str
    layout: Layout
    base: Path | None
    old: Layout | None
    chips: Ints
    places: Ints
    shards: dict[Shard, Ints]

    def block(
        self, shard: Shard, finished: FinishedMaps, staged: StagedMaps
    ) -> npt.NDArray[Any]:
        """Return the values of one shard, ``[1, D, rows, columns]``.

        Args:
            shard: Its number along time, y and x.
            finished: The finished chips.
            staged: Their feature maps.
        """
        layout = self.layout
        window = layout.window(shard)
        shape = (layout.dimensions, *window[2:])
        block = np.full(shape, np.nan, layout.dtype)
        if self.base is not None and self.old is not None:
            self._copy(self.base, self.old, shard, block)
        rows = self.shards[shard]
        owner = layout.owners(self.places[rows], window)
        for i in np.unique(owner[owner >= 0]).tolist():
            chip = int(self.chips[rows[i]])
            if finished.file[chip] < 0:
                continue  # Copied.
            corner = self.places[rows[i], 1:]
            here, inside = overlap(corner, layout.map_size, window)
            own = owner[here] == i
            block[:, *here][:, own] = staged.get(chip)[:, *inside][:, own]
        return block[None]

    def _copy(
        self, base: Path, old: Layout, shard: Shard, block: npt.NDArray[Any]
    ) -> None:
        time = self.layout.times[shard[0]]
        if time not in old.times:
            return
        here, inside = overlap(
            self.layout.offset_of(old),
            (old.rows, old.columns),
            self.layout.window(shard),
        )
        block[:, *here] = open_array(base)[old.times.index(time), :, *inside]


def plan_mosaics(
    target: Path,
    finished: FinishedMaps,
    planned: Mapping[str, npt.NDArray[np.void]],
    dtype: str,
) -> list[Mosaic]:
    """Say what is to be done; the answer is the same in every process.

    Args:
        target: The store.
        finished: The finished chips.
        planned: The chips of the run by the name of their CRS: arrays get room for
            them, finished or not.
        dtype: Type in which feature maps are stored.

    Returns:
        One item for each CRS that has chips which are staged only.

    Raises:
        OutputError: If chips do not fit together, or into what is there.
    """
    return [
        _plan(target, finished, crs, planned.get(crs, finished.chips[:0]), dtype)
        for code, crs in enumerate(finished.crs)
        if ((finished.chips['source'] == code) & (finished.file >= 0)).any()
    ]


def _plan(
    target: Path,
    finished: FinishedMaps,
    crs: str,
    planned: npt.NDArray[np.void],
    dtype: str,
) -> Mosaic:
    mine = np.flatnonzero(finished.chips['source'] == finished.crs.index(crs))
    chips, staged = finished.chips[mine], finished.file[mine] >= 0
    base = find_group(target, crs)
    if base is None and not staged.all():
        raise OutputError(
            f"'{target}' is damaged: its {CHIPS_FILE} lists chips in {crs}, but there "
            f"is no group '{group_name(crs)}'; choose another output, or have it "
            'replaced (--overwrite, overwrite=True)'
        )
    old = None if base is None else read_layout(base)
    everything = np.concatenate([chips, planned])
    corner = everything[:0] if old is None else old.corner
    grid = ChipGrid.of(crs, np.concatenate([everything, corner]))
    shapes = {finished.shapes[i] for i in np.unique(finished.file[mine[staged]])}
    if len(shapes) > 1:
        raise OutputError(
            f'feature maps of the chips in {crs} have different shapes (D, h, w), '
            f'{sorted(shapes)}: one Zarr array needs one shape'
        )
    layout = Layout.plan(grid, everything, shapes.pop(), dtype, old)
    places = layout.place(chips)
    shards = layout.shards_of(places)
    if layout == old:
        shards = {shard: rows for shard, rows in shards.items() if staged[rows].any()}
    return Mosaic(crs, group_name(crs), layout, base, old, mine, places, shards)
