"""A chip table and a task that are as small as the writer allows."""

from collections.abc import Mapping
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import shapely
import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils.data import Dataset

SIZE, RES = 32, 10.0


class Chips(Dataset[dict[str, Tensor] | None]):
    """Chips side by side in UTM zone 18N; chip i's pixels all have the value i."""

    provenance: Mapping[str, Any] = {'dataset': 'stand-in', 'paths': ['a.tif']}

    def __init__(self, count: int, dated: bool = True, points: bool = False) -> None:
        self.count, self.dated, self.points = count, dated, points
        self.left_out: set[int] = set()
        self.asked: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor] | None:
        if index in self.left_out:
            return None
        self.asked.append(index)
        return {
            'image': torch.full((3, SIZE, SIZE), float(index)),
            'chip': torch.tensor([index]),
        }

    @property
    def remaining(self) -> list[int]:
        return [i for i in range(self.count) if i not in self.left_out]

    def restrict(self, leave_out: Any = (), only: Any = None) -> None:
        ids, out = range(self.count), {str(key) for key in leave_out}
        wanted = None if only is None else {str(key) for key in only}

        def named(index: int, names: set[str]) -> bool:
            key = f'chip-{index}'
            return key in names or f'{key}@plot {index}' in names

        self.left_out = {
            i
            for i in ids
            if named(i, out) or (wanted is not None and not named(i, wanted))
        }

    def rows(self, indices: Any) -> gpd.GeoDataFrame:
        indices = np.asarray(indices, np.int64)
        side = SIZE * RES
        minx, miny = 500000.0 + indices * side, np.full(len(indices), 4.5e6)
        table = pd.DataFrame({'chip_id': [f'chip-{i}' for i in indices]})
        table['crs'] = 'EPSG:32618'
        table['minx'], table['miny'] = minx, miny
        table['maxx'], table['maxy'] = minx + side, miny + side
        table['width'], table['height'] = SIZE, SIZE
        table['xres'], table['yres'] = RES, RES
        start = '2024-06-01' if self.dated else None
        end = '2024-09-01' if self.dated else None
        table['start'] = pd.to_datetime(pd.Series([start] * len(indices)))
        table['end'] = pd.to_datetime(pd.Series([end] * len(indices)))
        boxes = gpd.GeoSeries(
            shapely.box(minx, miny, minx + side, miny + side), crs='EPSG:32618'
        )
        table['centre_lon'] = boxes.centroid.to_crs('EPSG:4326').x
        table['centre_lat'] = boxes.centroid.to_crs('EPSG:4326').y
        if self.points:
            table['point_id'] = [f'plot {i}' for i in indices]
        table.index = pd.Index(indices)
        return gpd.GeoDataFrame(
            table, geometry=boxes.to_crs('EPSG:4326').to_numpy(), crs='EPSG:4326'
        )


class Task(LightningModule):
    """Embeddings that say which chip they are of; can fail at a given batch."""

    def __init__(
        self,
        output: str = 'pooled',
        dimensions: int = 5,
        cells: int = 4,
        fail_at: int | None = None,
        error: BaseException | None = None,
    ) -> None:
        super().__init__()
        self.output, self.cells = output, cells
        self.embedding_dim = dimensions
        self.fail_at, self.error = fail_at, error
        self.provenance = {'backbone': 'stand-in', 'weights': 'random'}
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        if batch_idx == self.fail_at:
            raise self.error or RuntimeError('the model failed')
        if 'image' not in batch:
            return batch
        image = batch['image'].float()
        value = image.mean((1, 2, 3))
        scale = torch.arange(1, self.embedding_dim + 1)
        embedding = value[:, None] * scale
        if self.output == 'grid':
            step = image.shape[-1] // self.cells
            cells = image[:, :1, ::step, ::step]
            embedding = cells * scale[None, :, None, None]
        return {
            'embedding': embedding,
            'chip': batch['chip'],
            'valid_fraction': torch.full((len(value), 1), 0.5),
        }
