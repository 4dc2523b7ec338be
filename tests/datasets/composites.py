"""Datasets of the stand-in server, their chips, and what must be in them."""

import traceback
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from dynamicvis_geo.datasets import ChipDataset, EarthEngineDataset, collate
from dynamicvis_geo.datasets.batches import Batches
from dynamicvis_geo.earthengine import EarthEngineClient
from dynamicvis_geo.specs import BBox, SensorSpec
from tests.earthengine_server import EarthEngineServer
from tests.earthengine_server.oracle import expected

WINDOW = ('2022-06-01', '2022-07-21')
SENSOR = SensorSpec(cloudy_pct=90)
ROI = BBox(10.2, 50.3, 10.4, 50.5)
#: A tile that the world of the server never visits.
GAP = BBox(10.2, 40.2, 10.8, 40.8)


def make(server: EarthEngineServer, roi: Any = ROI, **options: Any) -> Any:
    time_ = options.pop('time', WINDOW)
    sensor = options.pop('sensor', SENSOR)
    limits = options.pop('limits', {})
    client = EarthEngineClient(project='test-project', url=server.url, **limits)
    return EarthEngineDataset(roi, time_, sensor, client=client, **options)


def query(dataset: Any, row: int = 0, col: int = 0, px: int = 32) -> Any:
    """A chip, counted in chips from the middle of the dataset."""
    x, y, t = dataset.bounds
    width, height = px * x.step, px * y.step
    left = (np.floor((x.start + x.stop) / 2 / x.step) + col * px) * x.step
    bottom = (np.floor((y.start + y.stop) / 2 / y.step) - row * px) * y.step
    return slice(left, left + width, x.step), slice(bottom, bottom + height, y.step), t


def grid(dataset: Any, rows: int, cols: int, px: int = 32) -> list:
    return [query(dataset, i // cols, i % cols, px) for i in range(rows * cols)]


def assert_right(dataset: Any, where: Any, sample: Any, window: Any = WINDOW) -> None:
    x, y, _ = where
    values, valid = expected(dataset.crs, x, y, window, dataset.sensor)
    image = np.where(valid, values, dataset.sensor.fill_value)
    assert sample['image'].dtype == torch.float32
    assert sample['image'].shape == image.shape
    assert (sample['image'].numpy() == image).all()
    assert sample['valid_fraction'].shape == (1,)
    assert sample['valid_fraction'].item() == pytest.approx(valid.mean(), abs=1e-6)


def ahead(
    chips: ChipDataset, batch_size: int, workers: int, rows: Any = None, **options: Any
) -> DataLoader[Any]:
    """Loads batches as a data module does: of all chips, or of some in their order."""
    rows = np.arange(len(chips)) if rows is None else np.array(rows)
    options.setdefault('collate_fn', collate)
    batches = Batches(chips, [rows], batch_size)
    return DataLoader(batches, batch_size=None, num_workers=workers, **options)


def batches_before(error: type[Exception], loader: Iterable[Any]) -> list[Any]:
    """What a DataLoader gives before it raises an error."""
    batches = []
    try:
        for batch in loader:
            batches.append(batch)
    except error as caught:
        # Workers end at once only if nothing keeps their iterator alive.
        traceback.clear_frames(caught.__traceback__)
        return batches
    raise AssertionError(f'no {error.__name__}')
