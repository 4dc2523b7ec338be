"""What a prompt of Python shows of results: a line or two, whatever their size."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from dynamicvis_geo import (
    BackboneConfig,
    BBox,
    ChipDataset,
    EarthEngineDataset,
    FeatureMaps,
    GridSampler,
    OutputSpec,
    PooledEmbeddings,
    get_embedding,
    open_scenes,
)
from dynamicvis_geo.evaluation import evaluate, join_labels
from dynamicvis_geo.outputs import open_output
from dynamicvis_geo.similarity import find_similar
from tests.commands.conftest import scene_in
from tests.outputs import write_grid, write_pooled


def lines(value: Any) -> list[str]:
    text = repr(value)
    assert len(text) < 300
    return text.splitlines()


@pytest.mark.parametrize('output', [OutputSpec.pooled(), OutputSpec.grid()])
def test_an_embedding(output: OutputSpec) -> None:
    first, second = lines(
        get_embedding(
            input_chw=np.full((3, 40, 40), 900.0),
            backbone=BackboneConfig(weights='random', img_size=32),
            output=output,
        )
    )
    assert first.startswith('<Embedding: 768')
    assert second.endswith('arch b, random weights>')


def test_outputs_and_what_is_found_in_them(tmp_path: Path) -> None:
    write_pooled(tmp_path / 'pooled.parquet')
    write_grid(tmp_path / 'maps')
    pooled = open_output(tmp_path / 'pooled.parquet')
    assert (
        lines(pooled)[0] == '<Output: vectors of 12 chips, 6 numbers each, GeoParquet'
    )
    assert lines(open_output(tmp_path / 'maps'))[0].endswith('GeoTIFF')
    found = find_similar(tmp_path / 'pooled.parquet', '0', k=3)
    assert lines(found)[0].startswith('<Similar: 3 chips, similarity 0.')
    assert lines(found.like) == ['<Examples like=: 1 of what is searched, 0 others>']
    (text,) = lines(PooledEmbeddings(tmp_path / 'pooled.parquet'))
    assert text.startswith('<PooledEmbeddings: 12 vectors of 6 numbers, ')
    (text,) = lines(FeatureMaps(tmp_path / 'maps'))
    assert text.startswith('<FeatureMaps: index of 4, EPSG:32')
    labels = pd.DataFrame({'id': pooled.chips['id'], 'kind': list('abcabcabcabc')})
    (text,) = lines(join_labels(pooled.chips, labels, 'kind'))
    assert '12 of 12 chips have a label' in text


def test_scores() -> None:
    random = np.random.default_rng(0)
    arrays = {
        name: (random.normal(size=(30, 4)), np.arange(30) % 3)
        for name in ('train', 'val', 'test')
    }
    first, second = lines(evaluate(arrays, 'multiclass', 'abc', k=(5,), resamples=10))
    assert first == (
        '<Results: multiclass, 3 classes, 30 train, 30 val, 30 test samples'
    )
    assert 'knn k=5 cosine' in second


def test_datasets(tmp_path: Path) -> None:
    (scenes,) = open_scenes(scene_in(tmp_path))
    sampler = GridSampler(scenes, 64)
    told = '<Scenes: index of 1, EPSG:32633, pixels of 10 x 10>'
    assert lines(scenes) == [told]
    assert lines(sampler.table()) == ['<ChipTable: 6 chips, EPSG:32633>']
    chips = ChipDataset([(scenes, sampler)])
    assert lines(chips) == ['<ChipDataset: 6 chips of Scenes>']
    asked = EarthEngineDataset(BBox(10, 47, 10.1, 47.1), ('2022-01-01', '2022-02-01'))
    assert lines(asked)[0].startswith('<EarthEngineDataset: index of 1, EPSG:32632')
