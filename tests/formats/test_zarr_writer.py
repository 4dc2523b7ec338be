from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import Subset

from dynamicvis_geo.callbacks import EmbeddingWriter
from dynamicvis_geo.datasets import ChipDataset
from dynamicvis_geo.errors import OutputError
from dynamicvis_geo.provenance import read_provenance
from tests.callbacks.standins import Task
from tests.callbacks.test_writer import predict

xr = pytest.importorskip('xarray')
pytest.importorskip('zarr')


def test_a_trainer_writes_and_extends_a_store(
    tmp_path: Path, make_chips: Callable[..., ChipDataset]
) -> None:
    chips = make_chips()
    target = tmp_path / 'maps.zarr'
    first = EmbeddingWriter(target)
    predict(first, Subset(chips, range(4)), Task('grid'))
    second = EmbeddingWriter(target)
    predict(second, chips, Task('grid'))
    assert first.summary is not None
    assert second.summary is not None
    assert (first.summary.written, second.summary.written) == (4, 2)
    assert read_provenance(target)['emb:type'] == 'pixel'
    assert len(read_provenance(target)['runs']) == 2
    with xr.open_zarr(target, group='EPSG_32618') as mosaic:
        cells = mosaic['embeddings'].isel(time=0, embedding=0)
        assert cells.shape == (8, 12)
        for row in range(6):
            sample = chips[row]
            at = chips.rows([row]).iloc[0]
            inside = cells.sel(
                x=slice(at['minx'], at['maxx']), y=slice(at['maxy'], at['miny'])
            )
            np.testing.assert_array_equal(inside, sample['image'][0, ::8, ::8])
    names = {entry.name for entry in tmp_path.iterdir()}
    assert names == {'scene', 'maps.zarr', 'maps.zarr.stac'}


def test_overwrite_spares_a_store_with_something_else_in_it(
    tmp_path: Path, make_chips: Callable[..., ChipDataset]
) -> None:
    chips, target = make_chips(), tmp_path / 'maps.zarr'
    predict(EmbeddingWriter(target), chips, Task('grid'))
    photo = target / 'photos' / 'a.tif'
    photo.parent.mkdir()
    photo.write_text('years of work')
    again = EmbeddingWriter(target, overwrite=True)
    with pytest.raises(OutputError, match='photos'):
        predict(again, chips, Task('grid'))
    photo.unlink()
    photo.parent.rmdir()
    again = EmbeddingWriter(target, overwrite=True)
    predict(again, Subset(chips, [0]), Task('grid'))
    assert again.summary is not None
    assert (again.summary.before, again.summary.written) == (0, 1)
