"""Results of ``predict_step``, and the chip table that they are about."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import ConcatDataset, Subset

from dynamicvis_geo.datasets.source import ChipFailure
from dynamicvis_geo.errors import OutputError
from dynamicvis_geo.formats.base import Predictions, RunChips

#: Dimensions of a batch of embeddings, by the task's output.
BATCH_DIMENSIONS = {'pooled': 2, 'grid': 4}


def take_predictions(prediction: Any, output: str) -> Predictions:
    """Take what outputs need from the result of a ``predict_step``.

    Args:
        prediction: The result.
        output: 'pooled' or 'grid', what the embeddings must be.

    Returns:
        The batch, on the CPU.

    Raises:
        OutputError: If a key is missing, or a shape is not the expected one.
    """
    failures: tuple[ChipFailure, ...] = ()
    if isinstance(prediction, Mapping):
        given = prediction.get('failures', ())
        failures = tuple(ChipFailure(*one) for one in given)
        if not prediction.keys() - {'failures'}:
            # All chips of the batch were left out.
            none = np.empty((0,) * BATCH_DIMENSIONS[output], np.float32)
            return Predictions(np.empty(0, np.int64), none, None, failures)
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
    return Predictions(chip, embedding, valid, failures)


def _numpy(tensor: Any, dtype: torch.dtype) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = (
        torch.as_tensor(tensor).detach().to('cpu', dtype, copy=True).numpy()
    )
    return array


def find_chip_table(dataloaders: Any) -> RunChips:
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


def _tables_behind(dataloaders: Any) -> list[RunChips]:
    datasets = _datasets(dataloaders)
    tables = {id(table): table for dataset in datasets for table in _tables(dataset)}
    return list(tables.values())


def rows_behind(dataloaders: Any) -> npt.NDArray[np.int64]:
    """Return the rows of the chip table that dataloaders may give, each once.

    Args:
        dataloaders: A DataLoader, or a list, tuple or dict of them, over a chip table,
            or over subsets and concatenations of it.
    """
    rows = [_rows(dataset) for dataset in _datasets(dataloaders)]
    return np.unique(np.concatenate(rows))


def _rows(dataset: Any) -> npt.NDArray[np.int64]:
    if isinstance(dataset, RunChips):
        return np.arange(len(dataset.table))
    if isinstance(dataset, ConcatDataset):
        return np.concatenate([_rows(child) for child in dataset.datasets])
    rows = _rows(dataset.dataset)
    return rows[np.asarray(dataset.indices)] if isinstance(dataset, Subset) else rows


def _tables(dataset: Any) -> Iterator[RunChips]:
    if isinstance(dataset, RunChips):
        yield dataset
        return
    children = getattr(dataset, 'datasets', None)
    if children is None:
        child = getattr(dataset, 'dataset', None)
        children = [] if child is None else [child]
    for child in children:
        yield from _tables(child)
