"""Labels and predictions of single plots, to be mapped or looked into."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dynamicvis_geo.evaluation.splits import SPLITS
from dynamicvis_geo.provenance import PROVENANCE_KEY, to_json

if TYPE_CHECKING:
    from dynamicvis_geo.evaluation.datamodule import EmbeddingDataModule

_KEPT = ('id', 'point_id', 'start', 'end', 'centre_lon', 'centre_lat', 'geometry')


def write_predictions(
    path: Path, data: EmbeddingDataModule, predicted: NDArray[np.float64]
) -> None:
    """Write a row each labelled plot, as GeoParquet where the places are known.

    Columns are those that tell the plot (``id``, dates, place), and ``split``,
    ``label``, ``prediction``, and ``correct``, or for numbers ``error``, the prediction
    less the label. Only plots of the test split have a prediction: those of the other
    splits were seen when the model was made. Several classes at once are one text.

    Args:
        path: The file.
        data: The plots.
        predicted: Of the test split: probabilities ``[n, C]``, or values ``[n]`` of a
            regression, such as :attr:`Results.predicted` holds.
    """
    table = data.dataset.table
    kept = table[[name for name in _KEPT if name in table.columns]]
    parts = []
    for split in SPLITS:
        rows = data.rows(split)
        if not len(rows):
            continue
        truth = data.arrays(split)[1]
        part = kept.iloc[rows].assign(split=split, label=_named(truth, data))
        if split == 'test' and data.task == 'regression':
            part = part.assign(prediction=predicted, error=predicted - truth)
        elif split == 'test':
            several = data.task == 'multilabel'
            chosen = _named(predicted > 0.5 if several else predicted.argmax(1), data)
            part = part.assign(prediction=chosen, correct=chosen == part['label'])
        parts.append(part)
    together = pd.concat(parts).sort_index()
    if 'correct' in together:
        together['correct'] = together['correct'].astype('boolean')
    together.to_parquet(path, index=False)
    written = pq.read_table(path)
    told = {PROVENANCE_KEY: to_json(data.provenance)}
    pq.write_table(
        written.replace_schema_metadata({**(written.schema.metadata or {}), **told}),
        path,
    )


def _named(values: NDArray[Any], data: EmbeddingDataModule) -> NDArray[Any]:
    """Name classes by their numbers, or by 0 and 1 of each; leave numbers alone."""
    if data.task == 'regression':
        return values
    names = np.array(data.classes, dtype=object)
    if data.task == 'multilabel':
        return np.array([';'.join(names[row.astype(bool)]) for row in values], object)
    named: NDArray[Any] = names[values]
    return named
