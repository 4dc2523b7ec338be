"""Maps of a probe, over feature maps as the writer makes them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from lightning.pytorch import Trainer

from dynamicvis_geo import LinearProbe, read_provenance
from dynamicvis_geo.errors import CheckpointError, OutputError, SourceError, SpecError
from dynamicvis_geo.evaluation.class_maps import predict_maps
from dynamicvis_geo.formats.geotiff import encode_feature_map
from tests.callbacks.standins import Chips
from tests.stores import Upload

GRID: dict[str, Any] = {
    'model': {
        'backbone': {'weights': 'random', 'seed': 0},
        'preprocessing': {'input_range': [0, 10000]},
        'output': 'grid',
        'pooling': None,
    }
}
POOLED = {'model': {**GRID['model'], 'output': 'pooled', 'pooling': 'featmap_mean'}}


def save(probe: LinearProbe, path: Path, provenance: dict[str, Any] = GRID) -> Path:
    """Save a probe whose every output is the feature of the same number."""
    size = probe.linear.weight.shape[0]
    with torch.no_grad():
        probe.linear.weight.copy_(torch.eye(size, probe.in_features))
    probe.fitted.fill_(True)
    probe.provenance = provenance
    trainer = Trainer(logger=False, accelerator='cpu', enable_progress_bar=False)
    trainer.strategy.connect(probe)
    trainer.save_checkpoint(path)
    return path


@pytest.fixture
def maps(tmp_path: Path) -> Path:
    """Two chips of 4 features and 3 x 5 cells; one cell of the first is NaN."""
    folder = tmp_path / 'maps'
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i, chip in Chips(2).rows([0, 1]).iterrows():
        features = rng.normal(size=(4, 3, 5)).astype(np.float32)
        if i == 0:
            features[2, 1, 3] = np.nan
        path = folder / f'{chip["chip_id"]}.tif'
        path.write_bytes(encode_feature_map(features, chip, GRID, 0.5))
    return folder


@pytest.fixture
def probe(tmp_path: Path) -> Path:
    made = LinearProbe('multiclass', 4, ('water', 'forest', 'sand'), 'none')
    return save(made, tmp_path / 'probe.ckpt')


def test_class_maps_lie_on_the_cells_and_say_what_the_numbers_mean(
    maps: Path, probe: Path, tmp_path: Path
) -> None:
    output = tmp_path / 'new' / 'classes'
    red = {'sand': 'red'}
    written, skipped = predict_maps(probe, maps, output, colours=red)
    assert [path.name for path in written] == ['chip-0.tif', 'chip-1.tif']
    assert not skipped
    for path in written:
        with rasterio.open(maps / path.name) as source, rasterio.open(path) as made:
            features, numbers = source.read(), made.read(1)
            assert (made.crs, made.transform) == (source.crs, source.transform)
            assert made.dtypes == ('uint8',)
            assert made.nodata == 255
            tags = made.tags()
            colours = [made.colormap(1)[i] for i in range(3)]
        known = np.isfinite(features).all(0)
        np.testing.assert_array_equal(numbers[known], features[:3].argmax(0)[known])
        assert (numbers[~known] == 255).all()
        assert [tags[f'class_{i}'] for i in range(3)] == ['water', 'forest', 'sand']
        assert tags['chip_id'] == path.stem
        assert tags['start'].startswith('2024-06-01')
        # Water is blue, forest green; the last was chosen.
        water, forest, sand = colours
        assert max(water[:3]) == water[2]
        assert max(forest[:3]) == forest[1]
        assert sand == (255, 0, 0, 255)
    made = read_provenance(written[0])
    assert made['features'] == GRID
    assert made['probe']['classes'] == ['water', 'forest', 'sand']
    assert read_provenance(output)['probe'] == made['probe']


def test_blocks_do_not_show(probe: Path, tmp_path: Path) -> None:
    features = np.random.default_rng(0).normal(size=(4, 530, 40)).astype(np.float32)
    chip = Chips(1).rows([0]).iloc[0]
    (tmp_path / 'large.tif').write_bytes(encode_feature_map(features, chip, GRID))
    (path,), _ = predict_maps(probe, tmp_path / 'large.tif', tmp_path / 'out')
    with rasterio.open(path) as made:
        np.testing.assert_array_equal(made.read(1), features[:3].argmax(0))


def test_finished_maps_are_skipped_and_others_are_not_overwritten(
    maps: Path, probe: Path, tmp_path: Path
) -> None:
    output = tmp_path / 'out'
    written, _ = predict_maps(probe, maps, output)
    written[0].unlink()
    again, skipped = predict_maps(probe, maps, output)
    assert (again, skipped) == (written[:1], written[1:])
    assert not list(output.glob('.*'))
    other = LinearProbe('multiclass', 4, ('a', 'b'), 'none')
    other_path = save(other, tmp_path / 'other.ckpt')
    with pytest.raises(OutputError, match=r'not of this probe.*overwrite=True'):
        predict_maps(other_path, maps, output)
    again, _ = predict_maps(other_path, maps, output, overwrite=True)
    assert read_provenance(again[0])['probe']['classes'] == ['a', 'b']
    written[0].write_text('notes')
    for overwrite in (False, True):
        with pytest.raises(OutputError, match='did not write'):
            predict_maps(probe, maps, output, overwrite)
    assert written[0].read_text() == 'notes'


def test_metadata_of_others_are_not_overwritten(
    maps: Path, probe: Path, tmp_path: Path
) -> None:
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'metadata.json').write_text('{"camera": "Hasselblad"}')
    with pytest.raises(OutputError, match=r'metadata\.json'):
        predict_maps(probe, maps, tmp_path / 'out', overwrite=True)
    assert len(list((tmp_path / 'out').iterdir())) == 1


def test_regression_gives_values(maps: Path, tmp_path: Path) -> None:
    made = LinearProbe('regression', 4, standardize='none')
    made.target_mean.fill_(100.0)
    made.target_scale.fill_(10.0)
    path = save(made, tmp_path / 'r.ckpt')
    written, _ = predict_maps(path, maps, tmp_path / 'out')
    with rasterio.open(written[0]) as image, rasterio.open(maps / 'chip-0.tif') as f:
        values, features = image.read(1), f.read()
        assert image.dtypes == ('float32',)
        assert np.isnan(image.nodata)
    expected = np.where(np.isfinite(features).all(0), features[0] * 10 + 100, np.nan)
    np.testing.assert_allclose(values, expected, rtol=1e-6)


def test_multilabel_gives_a_band_a_class(maps: Path, tmp_path: Path) -> None:
    made = LinearProbe('multilabel', 4, ('wet', 'green'), 'none')
    path = save(made, tmp_path / 'm.ckpt')
    written, _ = predict_maps(path, maps, tmp_path / 'out')
    with rasterio.open(written[0]) as image, rasterio.open(maps / 'chip-0.tif') as f:
        assert image.descriptions == ('wet', 'green')
        values, features = image.read(), f.read()
    expected = np.where(np.isfinite(features).all(0), features[:2] > 0, 255)
    np.testing.assert_array_equal(values, expected)


def test_more_classes_than_a_byte_holds(maps: Path, tmp_path: Path) -> None:
    made = LinearProbe('multiclass', 4, tuple(f'c{i}' for i in range(300)), 'none')
    with torch.no_grad():
        made.linear.bias[299] = 50
    path = save(made, tmp_path / 'm.ckpt')
    written, _ = predict_maps(path, maps, tmp_path / 'out')
    with rasterio.open(written[1]) as image:
        assert image.dtypes == ('uint16',)
        assert image.nodata == 65535
        assert (image.read(1) == 299).all()


def test_a_probe_of_pooled_features_extrapolates_with_a_warning(
    maps: Path, tmp_path: Path
) -> None:
    made = LinearProbe('multiclass', 4, ('a', 'b'), 'none')
    path = save(made, tmp_path / 'p.ckpt', POOLED)
    with pytest.warns(UserWarning, match='pooled features.*single cells'):
        written, _ = predict_maps(path, maps, tmp_path / 'out')
    assert len(written) == 2


def test_what_does_not_fit_is_refused(maps: Path, probe: Path, tmp_path: Path) -> None:
    output = tmp_path / 'out'
    with pytest.raises(CheckpointError, match='no such file'):
        predict_maps(tmp_path / 'none.ckpt', maps, output)
    with pytest.raises(SourceError, match='no such file or folder'):
        predict_maps(probe, tmp_path / 'none', output)
    with pytest.raises(OutputError, match='folder of the feature maps'):
        predict_maps(probe, maps, maps / 'classes')
    with pytest.raises(OutputError, match='is a file'):
        predict_maps(probe, maps, probe)
    stretched = {**GRID['model'], 'preprocessing': {'input_range': [0, 3000]}}
    other = LinearProbe('multiclass', 4, ('a', 'b'), 'none')
    path = save(other, tmp_path / 'other.ckpt', {'model': stretched})
    with pytest.raises(SpecError, match=r'chip-0\.tif.*\[0, 3000\] \(probe\)'):
        predict_maps(path, maps, output)
    # Of an earlier version: the last stage.
    other = LinearProbe('multiclass', 4, ('a', 'b'), 'none')
    path = save(other, tmp_path / 'stage.ckpt', {'model': GRID['model'] | {'stage': 1}})
    with pytest.raises(SpecError, match=r'chip-0\.tif.*model\.stage: 1 \(probe\), 3\.'):
        predict_maps(path, maps, output)
    wide = LinearProbe('multiclass', 5, ('a', 'b'), 'none')
    path = save(wide, tmp_path / 'wide.ckpt')
    with pytest.raises(SourceError, match='4 bands, but the probe takes 5'):
        predict_maps(path, maps, output)
    (maps / 'chip-0.tif').write_bytes(b'II*\0 cut off')
    with pytest.raises(SourceError, match='chip-0'):
        predict_maps(probe, maps, output)
    with pytest.raises(SpecError, match="the colour of 'sand', 'rde'"):
        predict_maps(probe, maps, output, colours={'sand': 'rde'})
    assert not output.exists()


def test_maps_of_a_store_are_classified(
    tmp_path: Path, maps: Path, probe: Path, upload: Upload
) -> None:
    local, _ = predict_maps(probe, maps, tmp_path / 'local')
    url = upload(maps)
    written, _ = predict_maps(probe, url, tmp_path / 'remote')
    assert [path.name for path in written] == [path.name for path in local]
    for one, other in zip(written, local, strict=True):
        with rasterio.open(one) as got, rasterio.open(other) as expected:
            np.testing.assert_array_equal(got.read(), expected.read())
