"""Batches of samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dynamicvis_geo.datasets.source import ChipFailure, Sample
from dynamicvis_geo.errors import SpecError


def collate(samples: Sequence[Sample | ChipFailure | None]) -> Sample:
    """Join samples into a batch, alike for all versions of TorchGeo.

    Args:
        samples: Samples with the same keys; a
            :class:`~dynamicvis_geo.datasets.ChipFailure` or None for each chip that was
            skipped.

    Returns:
        Tensors stacked along a new first axis; lists of everything else; under
        ``failures`` the list of failures, if there are any. These alone, or nothing, if
        all chips were skipped.

    Raises:
        SpecError: If the samples differ in their keys, or their tensors in shape.
    """
    present = [sample for sample in samples if isinstance(sample, dict)]
    failures = [sample for sample in samples if isinstance(sample, ChipFailure)]
    told: Sample = {'failures': failures} if failures else {}
    if not present:
        return told
    keys = present[0].keys()
    for sample in present:
        if sample.keys() != keys:
            raise SpecError(
                f'the samples of a batch have different keys: {sorted(keys)} and '
                f'{sorted(sample)}; give their datasets transforms that lead to the '
                'same keys, or batch them apart'
            )
    batch: Sample = {}
    for key in keys:
        values = [sample[key] for sample in present]
        if not all(isinstance(value, Tensor) for value in values):
            batch[key] = values
            continue
        shapes = {tuple(value.shape) for value in values}
        if len(shapes) > 1:
            raise SpecError(
                f'the samples of a batch have {key!r} of different shapes: '
                f'{sorted(shapes)}; give all samplers the same size, or use batch size '
                '1'
            )
        batch[key] = torch.stack(values)
    return {**batch, **told}
