"""Requests that hold the pixels of chips: neighbours share one, large chips are cut."""

import math
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import shapely
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from dynamicvis_geo.earthengine.composite import MAX_SIDE, Pixels
from dynamicvis_geo.grid import Grid, paste

#: First moment, and first moment after, in ISO form.
Window = tuple[str, str]
#: The pixels of a chip, or the error that stands for them.
Outcome = Pixels | Exception

#: Chips that fill more blocks than this are too large to gain from sharing them.
MOST_BLOCKS = 16


@dataclass(frozen=True)
class Chip:
    """One image to fetch.

    Attributes:
        grid: Its pixels.
        window: First moment, and first moment after, in ISO form.
        id: Its name, for people.
        source: What tells its pixels from those of other sources, if anything.
    """

    grid: Grid
    window: Window
    id: str
    source: str = ''


@dataclass(frozen=True)
class Request:
    """One request for pixels.

    Attributes:
        grid: Its pixels.
        window: First moment, and first moment after.
        chips: Positions of the chips that have pixels in it.
    """

    grid: Grid
    window: Window
    chips: tuple[int, ...]


def plan(chips: Sequence[Chip], block: int, max_pixels: int) -> list[Request]:
    """Choose requests that hold the pixels of all chips.

    Chips of one window on one lattice that touch or overlap are covered by blocks, so
    that each pixel is fetched once. Chips that stand alone, and those for which blocks
    would fetch more pixels or take more requests, get a request of their own.

    Args:
        chips: What is wanted.
        block: Largest side of a block in pixels.
        max_pixels: Largest number of pixels in a request.

    Returns:
        The requests, neighbours near each other.
    """
    groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for i, chip in enumerate(chips):
        groups[(*chip.grid.lattice, *chip.window)].append(i)
    requests: list[Request] = []
    for group in groups.values():
        for cluster in _clusters(chips, group):
            requests += _cover(chips, cluster, block, max_pixels)
    return requests


def _clusters(chips: Sequence[Chip], group: list[int]) -> Iterator[list[int]]:
    """Sets of chips that touch or overlap, directly or through others."""
    if len(group) == 1:
        yield group
        return
    edges = np.array([_edges(chips[i].grid) for i in group])
    boxes = shapely.box(*edges.T)
    a, b = shapely.STRtree(boxes).query(boxes, predicate='intersects')
    touching = coo_array((np.ones(len(a), bool), (a, b)), shape=(len(group),) * 2)
    count, labels = connected_components(touching, directed=False)
    members: list[list[int]] = [[] for _ in range(count)]
    for i, label in zip(group, labels.tolist(), strict=True):
        members[label].append(i)
    yield from members


def _edges(grid: Grid) -> tuple[float, float, float, float]:
    """Left, upper, right and lower edge in pixels, whole numbers on its lattice."""
    col, row = math.floor(grid.col), math.floor(grid.row)
    return col, row, col + grid.width, row + grid.height


def _cover(
    chips: Sequence[Chip], cluster: list[int], block: int, max_pixels: int
) -> list[Request]:
    side = min(math.isqrt(max_pixels), MAX_SIDE)
    alone = [
        Request(tile, chips[i].window, (i,))
        for i in cluster
        for tile in _tiles(chips[i].grid, side, max_pixels)
    ]
    if len(cluster) == 1:
        return alone
    block = min(block, side)
    if any(-(-chips[i].grid.size // block**2) > MOST_BLOCKS for i in cluster):
        return alone
    shared = _blocks(chips, cluster, block)
    pixels, pixels_alone = (
        sum(request.grid.size for request in requests) for requests in (shared, alone)
    )
    if len(shared) < len(alone) and pixels <= pixels_alone:
        return shared
    return alone


def _tiles(grid: Grid, side: int, max_pixels: int) -> Iterator[Grid]:
    """A grid in parts that fit into one request each."""
    if grid.size <= max_pixels and max(grid.shape) <= MAX_SIDE:
        yield grid
    else:
        yield from grid.tiles(side, side)


def _blocks(chips: Sequence[Chip], cluster: list[int], block: int) -> list[Request]:
    """Cut the area of a cluster into blocks that fetch each pixel once."""
    first = chips[cluster[0]].grid
    offsets = np.array([first.offset(chips[i].grid) for i in cluster])
    corner = offsets.min(axis=0)
    offsets -= corner
    # Blocks of whole strides do not cut through chips that lie side by side.
    strides = np.gcd.reduce(offsets, axis=0)
    height, width = (
        block // stride * stride if 0 < stride <= block else block
        for stride in strides.tolist()
    )
    # For each block: the chips in it, and the outline of what they need of it.
    members: dict[tuple[int, int], list[int]] = defaultdict(list)
    outlines: dict[tuple[int, int], tuple[int, int, int, int]] = {}
    for i, (top, left) in zip(cluster, offsets.tolist(), strict=True):
        grid = chips[i].grid
        bottom, right = top + grid.height, left + grid.width
        for row in range(top // height, (bottom - 1) // height + 1):
            for col in range(left // width, (right - 1) // width + 1):
                members[row, col].append(i)
                t, b, le, r = outlines.get((row, col), (bottom, top, right, left))
                outlines[row, col] = (
                    min(t, max(top, row * height)),
                    max(b, min(bottom, (row + 1) * height)),
                    min(le, max(left, col * width)),
                    max(r, min(right, (col + 1) * width)),
                )
    window = chips[cluster[0]].window
    requests = []
    for key in sorted(members):
        top, bottom, left, right = outlines[key]
        part = first.part(
            int(corner[0]) + top, int(corner[1]) + left, bottom - top, right - left
        )
        grids = [chips[i].grid for i in members[key]]
        # At the rim of an area a block may hold less than its outline.
        if sum(grid.size for grid in grids) < part.size and all(map(part.holds, grids)):
            requests += [Request(chips[i].grid, window, (i,)) for i in members[key]]
        else:
            requests.append(Request(part, window, tuple(members[key])))
    return requests


class Assembly:
    """Chips under way, put together from the requests that hold their pixels.

    Args:
        chips: The chips.
        requests: As :func:`plan` gives them.
        ask: Gives the pixels ``[bands, height, width]`` of a grid and a window; its
            third argument names what is fetched, the fourth gives up when set.
        keep: Whether an error takes the place of the pixels of its chips.
        store: Called with each complete chip.
    """

    def __init__(
        self,
        chips: Sequence[Chip],
        requests: Sequence[Request],
        ask: Callable[[Grid, Window, str, threading.Event], Pixels],
        keep: Callable[[Exception], bool],
        store: Callable[[Chip, Pixels], None],
    ) -> None:
        self.chips = chips
        self.ask, self.keep, self.store = ask, keep, store
        # How many requests each chip still waits for.
        self.waiting = np.zeros(len(chips), np.int64)
        for request in requests:
            self.waiting[list(request.chips)] += 1
        self.partial: dict[int, Pixels] = {}
        self.failed: set[int] = set()
        self.lock = threading.Lock()

    def download(
        self, request: Request, cancelled: threading.Event
    ) -> Sequence[tuple[int, Outcome]]:
        """Make one request.

        Args:
            request: One of those that this was made with.
            cancelled: Gives up when set.

        Returns:
            Positions and outcomes of the chips that it completed, or that it ended.
        """
        name = self.chips[request.chips[0]].id
        if len(request.chips) > 1:
            name += f' and {len(request.chips) - 1} more'
        try:
            pixels = self.ask(request.grid, request.window, name, cancelled)
        except Exception as error:
            if not self.keep(error):
                raise
            return self._fail(request, error)
        done = self._share_out(request, pixels)
        for i, chip_pixels in done:
            self.store(self.chips[i], chip_pixels)
        return done

    def _fail(self, request: Request, error: Exception) -> list[tuple[int, Exception]]:
        # A chip of several requests fails once, and is never complete after that.
        with self.lock:
            ended = [i for i in request.chips if i not in self.failed]
            self.failed.update(ended)
            for i in ended:
                self.partial.pop(i, None)
        return [(i, error) for i in ended]

    def _share_out(self, request: Request, pixels: Pixels) -> list[tuple[int, Pixels]]:
        if (
            len(request.chips) == 1
            and self.chips[request.chips[0]].grid == request.grid
        ):
            return [(request.chips[0], pixels)]
        done = []
        for i in request.chips:
            grid = self.chips[i].grid
            with self.lock:
                if i in self.failed:
                    continue
                if i not in self.partial:
                    self.partial[i] = np.empty((len(pixels), *grid.shape), pixels.dtype)
                target = self.partial[i]
            paste(target, grid, pixels, request.grid)
            with self.lock:
                self.waiting[i] -= 1
                if self.waiting[i] == 0:
                    done.append((i, self.partial.pop(i)))
        return done
