"""The interface of a format of output, and the plain data that it is given.

A format stores the features of blocks, joins blocks into an output, and reads its
outputs again. It knows nothing of Trainers, models or processes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray
from pyproj import CRS

from dynamicvis_geo.paths import Place
from dynamicvis_geo.provenance import carries_provenance, find_provenance
from dynamicvis_geo.store import Location, Store

if TYPE_CHECKING:
    from dynamicvis_geo.datasets.source import ChipFailure
    from dynamicvis_geo.formats.block_files import Blocks


@runtime_checkable
class RunChips(Protocol):
    """The part of :class:`~dynamicvis_geo.datasets.ChipDataset` that outputs need.

    Formats import no datasets, and any dataset that has it may be embedded. The chips
    themselves have one form, :class:`~.chip_table.ChipTable`, of which `table` holds
    the columns.
    """

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Description of what the chips were cut from; JSON can hold it."""

    @property
    def table(self) -> NDArray[np.void]:
        """All chips as plain numbers, type :data:`~.chip_table.CHIP`."""

    @property
    def source_crs(self) -> list[CRS]:
        """CRS of each source."""

    @property
    def strides(self) -> Sequence[tuple[int, int] | None]:
        """Pixels from chip to chip of each source; None without a grid."""

    @property
    def point_ids(self) -> pa.StringArray | None:
        """Point of each chip; None if no chip has one."""

    def rows(self, indices: Sequence[int] | NDArray[np.int64]) -> gpd.GeoDataFrame:
        """Return rows of the chip table, EPSG:4326.

        Args:
            indices: Numbers of the rows.

        Returns:
            The rows, in this order: see :meth:`.ChipDataset.rows`.
        """

    def among(self, keys: pa.StringArray) -> NDArray[np.bool_]:
        """Find the chips that have one of some keys.

        Args:
            keys: As :func:`.chip_keys` makes them.

        Returns:
            bool ``[chips]``.
        """


@dataclass(frozen=True)
class Predictions:
    """Features of some chips, on the CPU.

    Attributes:
        chip: int64 ``[B]``, row numbers in the chip table.
        embedding: float32 ``[B, D]`` or ``[B, D, h, w]``.
        valid_fraction: float32 ``[B]``, share of the pixels not masked, if known.
        failures: Chips whose image could not be had.
    """

    chip: NDArray[np.int64]
    embedding: NDArray[np.float32]
    valid_fraction: NDArray[np.float32] | None
    failures: tuple[ChipFailure, ...] = ()

    @property
    def rows(self) -> NDArray[np.int64]:
        """Row numbers of all chips, those that have failed last."""
        failed = np.array([one.chip for one in self.failures], np.int64)
        return np.concatenate([self.chip, failed])

    def part(
        self, chips: NDArray[np.bool_], failures: Sequence[ChipFailure]
    ) -> Predictions:
        """Return some of the chips, with some failures.

        Args:
            chips: A flag for each row of :attr:`chip`.
            failures: The failures.
        """
        valid = self.valid_fraction
        return Predictions(
            self.chip[chips],
            self.embedding[chips],
            None if valid is None else valid[chips],
            tuple(failures),
        )


@dataclass(frozen=True, eq=False)
class OpenRun:
    """A run whose blocks are being written.

    Those that are finished are read as :class:`~.block_files.Blocks`.

    Attributes:
        store: Folder of the blocks, and of what a format keeps beside them.
        id: Stands in the names of the run's files there.
        provenance: What goes into the output.
        chips: Where and when the chips are.
        block_of: int64, the block of each row of the chip table, -1 for those of none.
        square: Chips a side of the squares into which a grid of chips is cut.
    """

    store: Store
    id: str
    provenance: Mapping[str, Any]
    chips: RunChips
    block_of: NDArray[np.int64]
    square: int


class Format(ABC):
    """One format of output.

    A block is finished when its file is there (:mod:`.block_files`); what else a format
    stores of it is on disk before. All that writes may be called again, by any process,
    on an output that others have left at any point.

    Attributes:
        output: What it takes of the task: 'pooled' or 'grid'.
        dtypes: Types in which it can store embeddings.
        suffixes: Ends of names, in lower case, that are of this format.
        members: Patterns of the names of all that it puts into a folder: what else a
            folder holds is not part of the output.
        chip_file: Name of the file of each chip, such as '{id}.tif', where each has its
            own: the STAC catalogue of the output then has a table of them.
    """

    output: ClassVar[Literal['pooled', 'grid']]
    dtypes: ClassVar[tuple[str, ...]]
    suffixes: ClassVar[tuple[str, ...]] = ()
    members: ClassVar[tuple[str, ...]]
    chip_file: ClassVar[str | None] = None

    def __init__(self, url: str, dtype: str) -> None:
        """Say where an output is to be, and the type of its numbers.

        Args:
            url: File or folder; nothing is read.
            dtype: One of :attr:`dtypes`.
        """
        self._location = Location.of(url)
        self._folder = Store(url)
        self._dtype = dtype

    @property
    def is_folder(self) -> bool:
        """True if the output is a folder."""
        return True

    @abstractmethod
    def held(self) -> pa.StringArray:
        """Keys of the chips that the finished output holds; empty without one."""

    def check(self, chips: RunChips) -> None:  # noqa: B027
        """Refuse chips that it cannot hold, before their images are fetched.

        Args:
            chips: All chips of the run.

        Raises:
            OutputError: If there are such chips.
        """

    def origins(self, chips: RunChips) -> Sequence[tuple[float, float] | None]:
        """Give a corner of the squares of chips that are the blocks of a grid.

        Args:
            chips: All chips of the run.

        Returns:
            A point in the CRS of the source, or None for the origin of that CRS.
        """
        return [None] * len(chips.source_crs)

    def write_maps(
        self, run: OpenRun, number: int, predictions: Sequence[Predictions]
    ) -> None:
        """Store the feature maps of a block; they are on disk when this returns.

        Called for formats of feature maps only, if a chip of the block has one.

        Args:
            run: The run.
            number: Number of the block.
            predictions: Its chips that have not failed, at least one, in any order.
        """
        raise NotImplementedError

    @abstractmethod
    def merge(self, blocks: Blocks) -> None:
        """Make the output of the blocks, from what is on disk alone.

        What the output holds of other chips stays. The provenance to write is
        ``{**blocks.provenance, **describe_embeddings(...)}``; an output without it is
        not continued.

        It goes through all rows of the blocks.

        Args:
            blocks: Those that are done, in the order of the plan.

        Raises:
            OutputError: If something cannot be read or written.
        """

    @classmethod
    @abstractmethod
    def is_at(cls, path: Place, is_folder: bool) -> bool:
        """Tell if an output of this format may lie at a path.

        Args:
            path: The path; a ``UPath`` for a URL.
            is_folder: Whether a folder is there.
        """

    @classmethod
    def wrote(cls, path: Place) -> bool:
        """Say whether a file in a folder of this format is this package's.

        It is asked before a folder is overwritten. To be known by itself a file has the
        provenance in it: JSON, Parquet and TIFF files are looked into.

        Args:
            path: The file.
        """
        return carries_provenance(path)

    @classmethod
    @abstractmethod
    def read_chips(cls, path: Place, most: int) -> tuple[pd.DataFrame, int, int]:
        """Read the rows of an output.

        Args:
            path: File or folder.
            most: Rows to read, where each takes a file; they lie at even distances.

        Returns:
            A row each chip: ``id``; ``crs``, ``minx`` to ``maxy``, ``width`` and
            ``height``, if it is no GeoDataFrame, EPSG:4326, with footprints; and what
            is known of ``start``, ``end`` and ``valid_fraction``. Then the number of
            chips of the output, and the length of an embedding.

        Raises:
            SourceError: If it cannot be read.
        """

    @classmethod
    def assets(cls, name: str, crs: str) -> dict[str, dict[str, Any]]:
        """Name what holds the chips of one CRS, for the STAC Item of these.

        Args:
            name: Of the output.
            crs: CRS of the chips, as authority and code or WKT.

        Returns:
            STAC assets, ``embeddings`` among them, with paths that begin with *name* as
            their ``href``.
        """
        return {'embeddings': {'href': name, 'roles': ['data']}}

    @classmethod
    def read_provenance(cls, path: Place) -> dict[str, Any]:
        """Read the provenance of an output.

        Args:
            path: File or folder.

        Returns:
            The provenance; empty if there is none.

        Raises:
            OutputError: If it cannot be read.
        """
        return find_provenance(path) or {}

    @classmethod
    def read_vectors(cls, path: Place) -> Iterator[NDArray[np.float32]]:
        """Yield the embeddings of a pooled output, in the order of its rows.

        Args:
            path: File or folder.

        Yields:
            float32 ``[n, D]``, some rows each time; NaN where there is none.

        Raises:
            SourceError: If they cannot be read.
        """
        raise NotImplementedError

    @classmethod
    def read_maps(
        cls, path: Place, chips: pd.DataFrame
    ) -> Iterator[NDArray[np.float32]]:
        """Yield the feature maps of chips.

        Args:
            path: File or folder.
            chips: Rows of :meth:`read_chips`.

        Yields:
            float32 ``[D, h, w]``, the first row northernmost; NaN where it has none.

        Raises:
            SourceError: If one cannot be read.
        """
        raise NotImplementedError

    @classmethod
    def tiles(cls, path: Place, chips: pd.DataFrame) -> pd.DataFrame:
        """List rectangles of cells that together hold each cell of all maps once.

        Args:
            path: File or folder.
            chips: All rows of :meth:`read_chips`.

        Returns:
            ``crs``, ``minx`` to ``maxy``, ``height``, ``width`` (cells), ``start`` and
            ``end``; the chips themselves, where each has its own map.
        """
        return chips

    @classmethod
    def read_tiles(
        cls, path: Place, tiles: pd.DataFrame
    ) -> Iterator[NDArray[np.float32]]:
        """Yield the cells of tiles.

        Args:
            path: File or folder.
            tiles: Rows of :meth:`tiles`.

        Yields:
            float32 ``[D, h, w]``, the first row northernmost; NaN where it has none.

        Raises:
            SourceError: If one cannot be read.
        """
        return cls.read_maps(path, tiles)


def spread(count: int, most: int) -> NDArray[np.int64]:
    """Pick rows at even distances.

    Args:
        count: Number of rows.
        most: Most rows to pick.

    Returns:
        int64, ascending; all rows if there are no more.
    """
    rows = np.linspace(0, count - 1, min(count, most)).round()
    return np.unique(rows).astype(np.int64)
