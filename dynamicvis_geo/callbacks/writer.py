"""Writes the embeddings of a prediction run to disk while it runs."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from dynamicvis_geo.callbacks.geoparquet import GeoParquetFile
from dynamicvis_geo.callbacks.geotiff import GeoTIFFFolder
from dynamicvis_geo.callbacks.predictions import (
    ChipTable,
    Predictions,
    find_chip_table,
)
from dynamicvis_geo.callbacks.staging import StagedOutput
from dynamicvis_geo.errors import OutputError
from dynamicvis_geo.provenance import run_provenance


class Sink(Protocol):
    """One file format, as one process writes it.

    Attributes:
        output: What it takes of the task: 'pooled' or 'grid'.
        folder_of: Suffix of the files it makes in a folder; None if it makes one file.
    """

    output: ClassVar[str]
    folder_of: ClassVar[str | None]

    def __init__(
        self,
        folder: Path,
        rank: int,
        chips: ChipTable | None,
        provenance: dict[str, Any],
        dimensions: int | None,
    ) -> None:
        """Prepare to write.

        Args:
            folder: Folder that all processes write into.
            rank: Number of this process.
            chips: Where and when the chips are; None if there are none.
            provenance: What makes the embeddings.
            dimensions: Length of an embedding, if known before the first.
        """

    def write(self, predictions: Predictions) -> None:
        """Take one batch."""

    def close(self) -> None:
        """Have everything of this process on disk."""

    def abort(self) -> None:
        """Let go of open files; they are removed."""

    def finish(self) -> Path:
        """Complete the output, in the first process, when all have closed theirs.

        Returns:
            The file, or the folder itself.
        """


_FORMATS: dict[str, type[Sink]] = {
    'geoparquet': GeoParquetFile,
    'geotiff': GeoTIFFFolder,
}


class EmbeddingWriter(BasePredictionWriter):
    """Lightning callback that writes embeddings with their place, time and provenance.

    * Pooled embeddings: one GeoParquet file, a row a chip, which GeoPandas, DuckDB and
      TorchGeo's embedding datasets read
      (:mod:`~dynamicvis_geo.callbacks.geoparquet` lists the columns).
    * Feature maps (``output='grid'``): a folder with one cloud-optimised GeoTIFF a
      chip, ``<chip_id>.tif`` with a band a feature, and ``metadata.json``.

    The output appears under its name when the run has succeeded, complete; a run that
    fails or is interrupted leaves nothing, and what was there before stays. The predict
    dataloader must be over a :class:`~dynamicvis_geo.datasets.ChipDataset` (or a subset
    of one), from which each embedding's place and time are taken. Several processes
    write one output together; its rows are then grouped by process.

    Memory stays flat with ``trainer.predict(..., return_predictions=False)``: by
    default Lightning collects every prediction besides.

    Attributes:
        written: Number of chips that this process has written in the current run.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        format: str | None = None,  # noqa: A002
        overwrite: bool = False,
    ) -> None:
        """Initialize a new EmbeddingWriter.

        Args:
            path: File (``.parquet``) or folder to write; missing parents are created.
            format: 'geoparquet' or 'geotiff'; None takes it from `path`.
            overwrite: Replace an existing output, when the new one is complete. A
                folder is replaced only if it holds nothing but such an output.

        Raises:
            OutputError: If `format` is unknown or does not fit `path`.
        """
        super().__init__(write_interval='batch')
        self.path = Path(path).expanduser().resolve()
        self.format = _resolve_format(self.path, format)
        self.overwrite = overwrite
        self.written = 0
        self._sink: Sink | None = None
        self._staged = StagedOutput(
            self.path,
            folder_of=_FORMATS[self.format].folder_of,
            overwrite=overwrite,
        )

    def check(self, output: str | None = None) -> None:
        """Refuse what cannot end well, before any work is done.

        Called when a run starts; call it earlier to spare the loading of a model.

        Args:
            output: 'pooled' or 'grid', what the task will give; None if unknown.

        Raises:
            OutputError: If the task's output does not fit the format, or the path
                cannot be written or exists already.
        """
        needed = _FORMATS[self.format].output
        if output is not None and output != needed:
            raise OutputError(
                f"cannot write {output} embeddings to '{self.path}': "
                + {
                    'pooled': 'a .parquet file holds one vector a chip; name a folder '
                    "for feature maps, or use output='pooled'",
                    'grid': 'a folder holds one GeoTIFF a chip; name a file that ends '
                    "in .parquet for pooled embeddings, or use output='grid' (--grid)",
                }[needed]
            )
        self._staged.check()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the output and make the hidden folder that it grows in.

        Raises:
            OutputError: As :meth:`check` raises it.
        """
        super().setup(trainer, pl_module, stage)
        if stage != 'predict':
            return
        output = getattr(pl_module, 'output', None)
        self.check(output if isinstance(output, str) else None)
        self.written = 0
        folder = self._staged.create() if trainer.is_global_zero else ''
        folder = trainer.strategy.broadcast(folder)
        if not trainer.is_global_zero:
            self._staged.join(folder)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the table of the chips.

        Raises:
            OutputError: If the predict dataloader is not over a ChipDataset.
        """
        self._sink = self._open(trainer, pl_module)

    def _open(self, trainer: Trainer, pl_module: LightningModule) -> Sink:
        folder = self._staged.path
        if folder is None:
            raise RuntimeError('EmbeddingWriter.setup() has not run')
        loaders = trainer.predict_dataloaders
        # Lightning makes no dataloaders for limit_predict_batches=0.
        chips = None if loaders is None else find_chip_table(loaders)
        source = {} if chips is None else chips.provenance
        return _FORMATS[self.format](
            folder,
            trainer.global_rank,
            chips,
            run_provenance(trainer, pl_module, source),
            getattr(pl_module, 'embedding_dim', None),
        )

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Take the embeddings of one batch.

        Raises:
            OutputError: If they are not what the format needs, or cannot be written.
        """
        if self._sink is None:
            raise RuntimeError('EmbeddingWriter.on_predict_start() has not run')
        if isinstance(prediction, dict) and not prediction:
            return  # All chips of the batch were skipped.
        predictions = Predictions.from_step(prediction, self._sink.output)
        with self._staged.errors():
            self._sink.write(predictions)
        self.written += len(predictions.chip)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Complete the output and give it its name."""
        self._finish(trainer, pl_module)

    def teardown(
        self, trainer: Trainer, pl_module: LightningModule, stage: str
    ) -> None:
        """Write an empty output if there were no chips: Lightning then runs no loop."""
        if stage == 'predict':
            self._finish(trainer, pl_module)

    def _finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._staged.path is None:
            return
        sink = self._sink or self._open(trainer, pl_module)
        with self._staged.errors():
            sink.close()
        trainer.strategy.barrier('EmbeddingWriter: all parts written')
        if trainer.is_global_zero:
            with self._staged.errors():
                staged = sink.finish()
            self._staged.publish(staged)
        trainer.strategy.barrier('EmbeddingWriter: output in place')
        self._staged.path = None
        self._sink = None

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave nothing half-written behind."""
        if self._sink is not None:
            self._sink.abort()
            self._sink = None
        self._staged.discard()


def _resolve_format(path: Path, name: str | None) -> str:
    parquet = path.suffix.lower() in ('.parquet', '.geoparquet')
    if name is None:
        if not parquet and path.suffix and not path.is_dir():
            raise OutputError(
                f"cannot tell the format of '{path}': end it in .parquet for pooled "
                'embeddings, or name a folder (without suffix) for feature maps; '
                f'format= chooses among {", ".join(_FORMATS)}'
            )
        return 'geoparquet' if parquet else 'geotiff'
    if name not in _FORMATS:
        raise OutputError(
            f"format='{name}' is unknown: choose among {', '.join(_FORMATS)}"
        )
    if parquet and name != 'geoparquet':
        raise OutputError(
            f"format='{name}' does not fit '{path}', the name of a GeoParquet file"
        )
    return name
