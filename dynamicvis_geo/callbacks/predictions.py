"""What a writer is given: predictions, and the table of the chips they belong to."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from lightning.pytorch import LightningModule, Trainer

from dynamicvis_geo.errors import OutputError

#: Dimensions of a batch of embeddings, by the task's output.
BATCH_DIMENSIONS = {'pooled': 2, 'grid': 4}


Failure = tuple[int, str, str]


@runtime_checkable
class ChipTable(Protocol):
    """The part of :class:`~dynamicvis_geo.datasets.ChipDataset` that writers use."""

    @property
    def provenance(self) -> Mapping[str, Any]:
        """What the chips were cut from; JSON can hold it."""

    def rows(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> gpd.GeoDataFrame:
        """Rows of the chip table, EPSG:4326, in the order of `indices`."""

    def restrict(
        self, leave_out: pa.StringArray = (), only: pa.StringArray | None = None
    ) -> None:
        """Leave chips out of the run, by their keys; without arguments none."""


@dataclass(frozen=True)
class Predictions:
    """One batch, on the CPU.

    Attributes:
        chip: int64 ``[B]``, row numbers in the chip table.
        embedding: float32 ``[B, D]`` or ``[B, D, h, w]``.
        valid_fraction: float32 ``[B]``, share of the pixels not masked, if known.
        failures: Row number, reason and message of chips whose image could not be had.
    """

    chip: npt.NDArray[np.int64]
    embedding: npt.NDArray[np.float32]
    valid_fraction: npt.NDArray[np.float32] | None
    failures: tuple[Failure, ...] = ()

    def __len__(self) -> int:
        """Number of chips that are done, one way or the other."""
        return len(self.chip) + len(self.failures)

    @classmethod
    def from_step(cls, prediction: Any, output: str) -> 'Predictions':
        """Take what a writer needs from the result of a ``predict_step``.

        Args:
            prediction: The result.
            output: 'pooled' or 'grid', what the embeddings must be.

        Returns:
            The batch.

        Raises:
            OutputError: If a key is missing, or a shape is not the expected one.
        """
        failures: tuple[Failure, ...] = ()
        if isinstance(prediction, Mapping):
            failures = tuple(prediction.get('failures', ()))
            if not prediction.keys() - {'failures'}:
                # All chips of the batch were left out.
                none = np.empty((0,) * BATCH_DIMENSIONS[output], np.float32)
                return cls(np.empty(0, np.int64), none, None, failures)
        for key in ('embedding', 'chip'):
            if not isinstance(prediction, Mapping) or key not in prediction:
                raise OutputError(
                    f"predict_step returned no '{key}': EmbeddingWriter needs a dict "
                    "with 'embedding' and, from ChipDataset, 'chip', as "
                    'FeatureExtraction gives it'
                )
        embedding = _numpy(prediction['embedding'], torch.float32)
        chip = _numpy(prediction['chip'], torch.int64).reshape(-1)
        if embedding.ndim != BATCH_DIMENSIONS[output] or len(embedding) != len(chip):
            raise OutputError(
                f'predict_step returned embeddings of shape {embedding.shape} for '
                f'{len(chip)} chips: this output needs {output} embeddings, '
                f'{BATCH_DIMENSIONS[output]} dimensions'
            )
        valid = prediction.get('valid_fraction')
        if valid is not None:
            valid = _numpy(valid, torch.float32).reshape(-1)
        return cls(chip, embedding, valid, failures)

    @classmethod
    def concatenate(cls, batches: Sequence['Predictions']) -> 'Predictions':
        """Join batches; a valid fraction that only some know is NaN in the others."""
        valid = None
        if any(batch.valid_fraction is not None for batch in batches):
            valid = np.concatenate(
                [
                    np.full(len(batch.chip), np.nan, np.float32)
                    if batch.valid_fraction is None
                    else batch.valid_fraction
                    for batch in batches
                ]
            )
        return cls(
            np.concatenate([batch.chip for batch in batches]),
            np.concatenate([batch.embedding for batch in batches]),
            valid,
        )


def _numpy(tensor: Any, dtype: torch.dtype) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = (
        torch.as_tensor(tensor).detach().to('cpu', dtype, copy=True).numpy()
    )
    return array


def find_chip_table(dataloaders: Any) -> ChipTable:
    """Find the one chip table behind dataloaders, through subsets and concatenations.

    Args:
        dataloaders: A DataLoader, or a list, tuple or dict of them.

    Returns:
        The table.

    Raises:
        OutputError: If there is none, or more than one: row numbers alone do not say
            then which table they mean.
    """
    tables = _tables_behind(dataloaders)
    if len(tables) == 1:
        return tables[0]
    datasets = _datasets(dataloaders)
    names = ', '.join(type(dataset).__name__ for dataset in datasets)
    if not tables:
        raise OutputError(
            f'cannot tell where the chips of {names} lie: give the predict dataloader '
            'a ChipDataset, e.g. ChipDataset([(dataset, sampler)]), in place of a '
            'dataset with a sampler'
        )
    raise OutputError(
        f'{names} holds {len(tables)} ChipDatasets, whose row numbers overlap: give '
        'one ChipDataset all pairs, ChipDataset([(dataset, sampler), ...])'
    )


def _as_list(dataloaders: Any) -> list[Any]:
    if isinstance(dataloaders, Mapping):
        return list(dataloaders.values())
    return list(dataloaders) if isinstance(dataloaders, Sequence) else [dataloaders]


def _datasets(dataloaders: Any) -> list[Any]:
    return [getattr(loader, 'dataset', loader) for loader in _as_list(dataloaders)]


def _tables_behind(dataloaders: Any) -> list[ChipTable]:
    datasets = _datasets(dataloaders)
    tables = {id(table): table for dataset in datasets for table in _tables(dataset)}
    return list(tables.values())


def planned_chips(trainer: Trainer) -> ChipTable | None:
    """Find the chip table of a run before its dataloaders are made.

    Args:
        trainer: A trainer that is being set up.

    Returns:
        The ``chips`` of the data module, or the table behind the DataLoader that was
        given to ``predict``; None if there is neither, or more than one table.
    """
    module = getattr(trainer, 'datamodule', None)
    if module is not None:
        chips = getattr(module, 'chips', None)
        return chips if isinstance(chips, ChipTable) else None
    # Lightning tells of the DataLoader itself only when the run has begun.
    source = getattr(trainer.predict_loop, '_data_source', None)
    loaders = getattr(source, 'instance', None)
    if loaders is None or isinstance(loaders, LightningModule):
        return None
    tables = _tables_behind(loaders)
    if len(tables) != 1:
        return None
    for loader in _as_list(loaders):
        collate = getattr(loader, 'collate_fn', None)
        if collate is not None and not isinstance(collate, LeavesOut):
            loader.collate_fn = LeavesOut(collate)
    return tables[0]


@dataclass(frozen=True)
class LeavesOut:
    """Lets any function that makes batches cope with chips that are left out.

    Attributes:
        collate: Makes a batch of samples.
    """

    collate: Callable[[list[Any]], Any]

    def __call__(self, samples: Sequence[Any]) -> Any:
        """Make a batch of the samples that are there; of none an empty one."""
        present = [sample for sample in samples if sample is not None]
        return self.collate(present) if present else {}


def _tables(dataset: Any) -> Iterator[ChipTable]:
    if isinstance(dataset, ChipTable):
        yield dataset
        return
    children = getattr(dataset, 'datasets', None)
    if children is None:
        child = getattr(dataset, 'dataset', None)
        children = [] if child is None else [child]
    for child in children:
        yield from _tables(child)
