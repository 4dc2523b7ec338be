"""A chip table and a task that are as small as the writer allows."""

from collections.abc import Mapping
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow as pa
import shapely
import torch
from lightning.pytorch import LightningModule
from pyproj import CRS
from torch import Tensor
from torch.utils.data import Dataset

from dynamicvis_geo.datasets.chip_table import CHIP

SIZE, RES = 32, 10.0


class Chips(Dataset[dict[str, Tensor]]):
    """Chips side by side in UTM zone 18N; chip i's pixels all have the value i."""

    provenance: Mapping[str, Any] = {'dataset': 'stand-in', 'paths': ['a.tif']}

    def __init__(self, count: int, dated: bool = True, points: bool = False) -> None:
        self.count, self.dated, self.points = count, dated, points
        self.asked: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        self.asked.append(index)
        return {
            'image': torch.full((3, SIZE, SIZE), float(index)),
            'chip': torch.tensor([index]),
        }

    @property
    def table(self) -> np.ndarray:
        table = np.zeros(self.count, CHIP)
        table['x'] = 500000.0 + np.arange(self.count) * SIZE * RES
        table['y'] = 4.5e6 + SIZE * RES
        table['width'] = table['height'] = SIZE
        table['xres'] = table['yres'] = RES
        for name, date in (('start', '2024-06-01'), ('end', '2024-09-01')):
            table[name] = pd.Timestamp(date).value
        return table

    @property
    def source_crs(self) -> list[CRS]:
        return [CRS.from_epsg(32618)]

    @property
    def strides(self) -> list[tuple[int, int] | None]:
        return [None]

    @property
    def point_ids(self) -> pa.StringArray | None:
        if not self.points:
            return None
        return pa.array([f'plot {i}' for i in range(self.count)], pa.string())

    def among(self, keys: pa.StringArray) -> np.ndarray:
        names = set(keys.to_pylist())
        rows = self.rows(np.arange(self.count))
        ids = rows['chip_id'].tolist()
        points = rows.get('point_id', pd.Series(ids))
        return np.array(
            [
                one in names or f'{one}@{point}' in names
                for one, point in zip(ids, points, strict=True)
            ],
            dtype=bool,
        )

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
