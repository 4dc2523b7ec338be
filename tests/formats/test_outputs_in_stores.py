"""Outputs at URLs, on an S3 server of the test."""

from collections.abc import Callable
from pathlib import Path

import fsspec
import geopandas as gpd
import numpy as np
import pytest
from torch.utils.data import Subset
from upath import UPath

from dynamicvis_geo import FeatureMaps
from dynamicvis_geo.callbacks import EmbeddingWriter
from dynamicvis_geo.callbacks.output import merge
from dynamicvis_geo.datasets import ChipDataset
from dynamicvis_geo.errors import OutputError
from dynamicvis_geo.provenance import read_provenance
from tests.callbacks.standins import Chips, Task
from tests.callbacks.test_resume import Failing, fail
from tests.callbacks.test_sharded_runs import same_provenance
from tests.callbacks.test_writer import predict

__all__ = ('same_provenance',)

FORMATS = pytest.mark.parametrize(
    ('name', 'output', 'format_'),
    [
        ('a.parquet', 'pooled', None),
        ('folder', 'pooled', 'geoparquet'),
        ('maps', 'grid', None),
        ('maps.zarr', 'grid', None),
    ],
)


def contents(url: str) -> dict[str, bytes]:
    system, folder = fsspec.core.url_to_fs(url)
    system.invalidate_cache()
    return {
        path.removeprefix(folder).lstrip('/'): content
        for path, content in system.cat(system.find(folder)).items()
    }


@pytest.mark.usefixtures('same_provenance')
@FORMATS
def test_killed_and_sharded_runs_give_the_files_of_a_local_one(
    tmp_path: Path,
    bucket: str,
    make_chips: Callable[..., ChipDataset],
    name: str,
    output: str,
    format_: str | None,
) -> None:
    if name.endswith('.zarr'):
        pytest.importorskip('zarr')
    chips = make_chips()

    def shard(target: str, index: int, count: int) -> EmbeddingWriter:
        return EmbeddingWriter(target, format_, block_chips=2, shard=(index, count))

    local = tmp_path / 'out' / name
    predict(shard(str(local), 1, 1), chips, Task(output))
    url = f'{bucket}/place/{name}'
    fail(shard(url, 1, 2), chips, Task(output, fail_at=1))
    for index in (2, 1):
        predict(shard(url, index, 2), chips, Task(output))
    assert contents(f'{bucket}/place') == contents(str(local.parent))
    assert read_provenance(url)['emb:dimensions'] == 5
    late = shard(url, 1, 2)
    predict(late, chips, Task(output))
    assert late.summary is not None
    assert (late.summary.written, late.summary.before) == (0, 6)


def test_outputs_are_extended_retried_and_overwritten(bucket: str) -> None:
    url = f'{bucket}/a.parquet'
    predict(EmbeddingWriter(url), Chips(5), Failing())
    assert sorted(gpd.read_parquet(url)['id']) == ['chip-1', 'chip-2', 'chip-4']
    failures = f'{bucket}/a.failures.parquet'
    assert gpd.read_parquet(failures)['id'].tolist() == ['chip-0', 'chip-3']
    predict(EmbeddingWriter(url), Chips(8), Task())
    predict(EmbeddingWriter(url, retry_failed=True), Chips(8), Task())
    frame = gpd.read_parquet(url)
    assert sorted(frame['id']) == [f'chip-{i}' for i in range(8)]
    assert not UPath(failures).exists()
    with pytest.raises(OutputError, match='other settings'):
        predict(EmbeddingWriter(url, dtype='int8'), Chips(8), Task())
    predict(EmbeddingWriter(url, dtype='int8', overwrite=True), Chips(2), Task())
    assert len(gpd.read_parquet(url)) == 2
    names = {name.partition('/')[0] for name in contents(bucket)}
    assert names == {'a.parquet', 'a.parquet.stac'}


def test_a_part_is_joined(bucket: str) -> None:
    url = f'{bucket}/a.parquet'
    fail(EmbeddingWriter(url, block_chips=2), Chips(9), Task(fail_at=2))
    assert merge(url, partial=True).rows == 4
    assert len(gpd.read_parquet(url)) == 4
    predict(EmbeddingWriter(url), Chips(9), Task())
    assert len(gpd.read_parquet(url)) == 9


def test_feature_maps_are_read_where_they_were_written(
    bucket: str, make_chips: Callable[..., ChipDataset]
) -> None:
    chips = make_chips()
    predict(EmbeddingWriter(f'{bucket}/maps'), Subset(chips, [0, 1, 2]), Task('grid'))
    maps = FeatureMaps(f'{bucket}/maps')
    assert len(maps) == 3
    sample = maps[maps.bounds]
    image = chips[0]['image'][0, ::8, ::8]
    np.testing.assert_array_equal(sample['image'][0, :4, :4], image)


def test_somebody_elses_file_is_spared(bucket: str) -> None:
    url = f'{bucket}/a.parquet'
    UPath(url).write_bytes(b'not ours')
    for overwrite in (True, False):
        with pytest.raises(OutputError, match='will not be replaced'):
            predict(EmbeddingWriter(url, overwrite=overwrite), Chips(3))
    assert UPath(url).read_bytes() == b'not ours'


def test_a_bucket_that_is_not_there(bucket: str) -> None:
    run = EmbeddingWriter(f'{bucket}-that-is-not/a.parquet')
    with pytest.raises(OutputError, match=r'a\.parquet'):
        predict(run, Chips(3))
