"""What every format of output does, so that one writer serves them all."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import pyarrow as pa

from dynamicvis_geo.callbacks.predictions import ChipTable, Predictions


@dataclass(frozen=True)
class Job:
    """What one process needs to know to write its share of an output.

    Attributes:
        target: File or folder to be.
        rank: Number of this process among all that write the output.
        world_size: Number of these processes.
        run: A word that no other run has; goes into names of files of this run.
        chips: Where and when the chips are; None if there are none.
        provenance: What makes the embeddings.
        dimensions: Length of an embedding, if known before the first.
        dtype: Type in which embeddings are stored.
    """

    target: Path
    rank: int
    world_size: int
    run: str
    chips: ChipTable | None
    provenance: Mapping[str, Any]
    dimensions: int | None
    dtype: str = 'float32'


class Sink(Protocol):
    """One format of output, as one process writes it.

    An output is finished in steps, so that what is done survives whatever happens:

    1. every process takes batches (:meth:`write`) and now and then puts all that it has
       taken on disk (:meth:`flush`): from then on these chips are *finished*, and a
       later run finds them by :meth:`finished`, also if this one is killed;
    2. when all processes have flushed for the last time, each does its share of what
       remains (:meth:`assemble`), and the first one then completes (:meth:`complete`).

    All of these may be called again on an output that an earlier run has left at any
    point. Nothing that a reader would take for a file of the output is ever half
    written.

    Attributes:
        output: What it takes of the task: 'pooled' or 'grid'.
        dtypes: Types in which it can store embeddings.
        metadata: File that a folder gets last, with its provenance.
        members: Patterns of the names of all that it puts into a folder: what else a
            folder holds is not part of the output.
    """

    output: ClassVar[str]
    dtypes: ClassVar[tuple[str, ...]]
    metadata: ClassVar[str]
    members: ClassVar[tuple[str, ...]]

    def __init__(self, job: Job) -> None:
        """Prepare to write."""

    @classmethod
    def recover(cls, target: Path) -> None:
        """End what a killed run has left half done; called by one process alone."""

    @classmethod
    def finished(cls, target: Path) -> pa.StringArray:
        """Keys of what is on disk, as ``chip_keys`` makes them, or mere ids."""

    def write(self, predictions: Predictions) -> None:
        """Take one batch; chips taken before are replaced or left, never doubled."""

    def flush(self) -> None:
        """Have on disk all that was taken."""

    def assemble(self) -> None:
        """Do this process' share of completing the output; all have flushed."""

    def complete(self) -> None:
        """Complete the output, in the first process; all have assembled."""
