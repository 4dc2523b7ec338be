"""LinearProbe under a Trainer, on data whose answer is known."""

import os
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from lightning.pytorch import LightningDataModule, Trainer
from rasterio.transform import from_origin
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    f1_score,
    jaccard_score,
    r2_score,
)
from torch import Tensor
from torch.multiprocessing.spawn import start_processes
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler
from torchgeo.datasets import RasterDataset

from dynamicvis_geo import ChipDataset, FeatureMaps, GridSampler, LinearProbe, collate
from dynamicvis_geo.errors import CheckpointError, SpecError
from dynamicvis_geo.formats.geotiff import encode_feature_map
from dynamicvis_geo.models import DynamicVis
from dynamicvis_geo.tasks import load_probe
from tests.callbacks.standins import Chips

MADE: dict[str, Any] = {
    'model': {
        'backbone': {'weights': 'pretrained', 'sha256': 'a' * 8, 'scan': 'c'},
        'preprocessing': {'input_range': [0, 10000]},
        'output': 'pooled',
        'pooling': 'featmap_mean',
    },
    'source': {'chips': 3},
}


def changed(**model: Any) -> dict[str, Any]:
    return {**MADE, 'model': {**MADE['model'], **model}}


class Table(Dataset[dict[str, Tensor]]):
    def __init__(self, features: Tensor, labels: Tensor) -> None:
        self.features, self.labels = features, labels

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {
            'embedding': self.features[index],
            'label': self.labels[index],
            'index': torch.tensor(index),
        }


class Data(LightningDataModule):
    def __init__(
        self,
        train: tuple[Tensor, Tensor],
        held_out: tuple[Tensor, Tensor],
        provenance: dict[str, Any] | None = None,
        batch_size: int = 32,
    ) -> None:
        super().__init__()
        self.train, self.held_out = Table(*train), Table(*held_out)
        self.provenance = MADE if provenance is None else provenance
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(
            self.train, batch_size=self.batch_size, shuffle=True, drop_last=True
        )

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.held_out, batch_size=self.batch_size)

    test_dataloader = predict_dataloader = val_dataloader


@pytest.fixture(autouse=True)
def quiet() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def trainer(epochs: int = 4, **options: Any) -> Trainer:
    return Trainer(
        accelerator='cpu',
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=2,
        **options,
    )


def blobs(count: int, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Classes that a plane divides, far from the origin, in columns of unlike units."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    centres = 4 * np.eye(classes, 6)
    features = centres[labels] + rng.normal(size=(count, 6)) * 0.5
    features = features * [1, 10, 0.1, 1, 5, 1] + [1000, 0, 3, 0, 0, -7]
    return torch.tensor(features, dtype=torch.float32), torch.tensor(labels)


def test_separable_classes_are_learnt_and_metrics_are_those_of_scikit_learn() -> None:
    data = Data(blobs(205), blobs(90, seed=1))
    probe = LinearProbe('multiclass', 6, ('a', 'b', 'c'), lr=0.2)
    run = trainer()
    run.fit(probe, datamodule=data)
    (scores,) = run.test(probe, datamodule=data, verbose=False)
    assert scores['test_accuracy_micro'] > 0.97

    truth = data.held_out.labels.numpy()
    rough = LinearProbe('multiclass', 6, ('a', 'b', 'c'), standardize='none')
    with torch.no_grad():
        rough.linear.weight.normal_(0, 0.05)
    (scores,) = run.test(rough, datamodule=data, verbose=False)
    values = rough.probabilities(data.held_out.features).numpy()
    chosen = values.argmax(1)
    expected = {
        'accuracy_micro': (chosen == truth).mean(),
        'accuracy_macro': balanced_accuracy_score(truth, chosen),
        'f1': f1_score(truth, chosen, average='macro'),
        'jaccard': jaccard_score(truth, chosen, average='macro'),
        'average_precision': average_precision_score(
            np.eye(3)[truth], values, average='macro'
        ),
    }
    for name, value in expected.items():
        assert scores[f'test_{name}'] == pytest.approx(value, abs=1e-5)
    assert {'test_loss', 'test_calibration_error'} <= set(scores)


def test_z_scores_are_those_of_all_of_the_training_split_and_nothing_else() -> None:
    features, labels = blobs(205)
    held_out = blobs(50, seed=1)
    data = Data((features, labels), (held_out[0] * 50 + 900, held_out[1]))
    probe = LinearProbe('multiclass', 6, ('a', 'b', 'c'))
    trainer(1).fit(probe, datamodule=data)
    exact = features.double()
    torch.testing.assert_close(probe.mean.double(), exact.mean(0), rtol=1e-6, atol=1e-6)
    spread = exact.std(0, correction=0)
    torch.testing.assert_close(probe.scale.double(), spread, rtol=1e-6, atol=0)


def test_fitting_twice_gives_the_same() -> None:
    weights = []
    for _ in range(2):
        torch.manual_seed(3)
        probe = LinearProbe('multiclass', 6, ('a', 'b', 'c'), lr=0.05)
        trainer(2).fit(probe, datamodule=Data(blobs(64), blobs(20, seed=1)))
        weights.append(probe.linear.weight)
    assert torch.equal(*weights)


@pytest.mark.parametrize('standardize', ['none', 'batchnorm', 'l2'])
def test_other_standardizations_learn_too(standardize: Any) -> None:
    rng = np.random.default_rng(0)
    labels = torch.tensor(rng.integers(0, 2, 160))
    features = torch.tensor(rng.normal(size=(160, 4)), dtype=torch.float32)
    features[:, 0] += 6 * labels - 3
    data = Data((features[:100], labels[:100]), (features[100:], labels[100:]))
    probe = LinearProbe('binary', 4, ('no', 'yes'), standardize, lr=0.3)
    run = trainer()
    run.fit(probe, datamodule=data)
    (scores,) = run.test(probe, datamodule=data, verbose=False)
    assert scores['test_accuracy_macro'] > 0.95
    assert scores['test_average_precision'] > 0.95
    positive = probe.probabilities(features[100:])[:, 1] > 0.5
    expected = f1_score(labels[100:].numpy(), positive.numpy())
    assert scores['test_f1'] == pytest.approx(expected)


def test_regression_in_any_unit() -> None:
    rng = np.random.default_rng(0)
    features = torch.tensor(rng.normal(size=(200, 5)), dtype=torch.float32)
    target = 40_000 + 3000 * features[:, 0] - 1000 * features[:, 3]
    data = Data((features[:120], target[:120]), (features[120:], target[120:]))
    probe = LinearProbe('regression', 5, lr=0.2)
    run = trainer(20)
    run.fit(probe, datamodule=data)
    (scores,) = run.test(probe, datamodule=data, verbose=False)
    assert scores['test_r2'] > 0.99
    values = probe.probabilities(features[120:]).numpy()
    truth = target[120:].numpy()
    assert scores['test_r2'] == pytest.approx(r2_score(truth, values), abs=1e-4)
    assert scores['test_mae'] == pytest.approx(np.abs(truth - values).mean(), rel=1e-4)
    rmse = np.sqrt(((truth - values) ** 2).mean())
    assert scores['test_rmse'] == pytest.approx(rmse, rel=1e-4)


def test_multilabel_and_balanced_weights() -> None:
    rng = np.random.default_rng(0)
    features = torch.tensor(rng.normal(size=(300, 4)), dtype=torch.float32)
    labels = torch.stack([features[:, 0] > 0, features[:, 1] > 1.2], 1).float()
    data = Data((features[:200], labels[:200]), (features[200:], labels[200:]))
    probe = LinearProbe(
        'multilabel', 4, ('wet', 'rare'), class_weights='balanced', lr=0.3
    )
    run = trainer()
    run.fit(probe, datamodule=data)
    positives = labels[:200].sum(0)
    torch.testing.assert_close(probe.class_weight, (200 - positives) / positives)
    (scores,) = run.test(probe, datamodule=data, verbose=False)
    assert scores['test_average_precision'] > 0.95
    assert 'test_calibration_error' in scores


def test_balanced_weights_of_classes() -> None:
    labels = torch.tensor([0] * 30 + [1] * 10)
    probe = LinearProbe('multiclass', 2, ('a', 'b', 'c'), class_weights='balanced')
    probe.fit_statistics([{'embedding': torch.randn(40, 2), 'label': labels}])
    torch.testing.assert_close(probe.class_weight[:2], torch.tensor([40 / 90, 40 / 30]))


def test_grids_are_seen_cell_by_cell() -> None:
    features, labels = blobs(240)
    maps = features.reshape(5, 6, 8, 6).movedim(-1, 1)
    masks = labels.reshape(5, 6, 8).clone()
    rows = LinearProbe('multiclass', 6, ('a', 'b', 'c'), ignore_index=255)
    cells = LinearProbe('multiclass', 6, ('a', 'b', 'c'), lr=0.2, ignore_index=255)
    rows.fit_statistics([{'embedding': features, 'label': labels}])
    cells.fit_statistics([{'image': maps, 'mask': masks[:, None]}])
    torch.testing.assert_close(rows.mean, cells.mean)
    masks[0, 0, :3] = 255
    spoilt = maps.clone()
    spoilt[1, 2, 3, 4] = float('nan')
    with torch.no_grad():
        rows.linear.weight.normal_()
    cells.load_state_dict(rows.state_dict())
    torch.testing.assert_close(
        cells(maps).movedim(1, -1).reshape(-1, 3), rows(features)
    )

    run = trainer()
    run.fit(cells, DataLoader(Table(spoilt, masks), batch_size=2))
    out = cells.predict_step({'embedding': spoilt, 'chip': torch.arange(5)}, 0)
    assert out['prediction'].shape == (5, 6, 8)
    assert out['prediction'][1, 3, 4] == -1
    assert out['probability'][1, :, 3, 4].isnan().all()
    right = (out['prediction'] == labels.reshape(5, 6, 8)).float().mean()
    assert right > 0.9
    assert out['chip'].tolist() == list(range(5))
    assert 'embedding' not in out


class LabelRaster(RasterDataset):
    is_image = False
    filename_glob = 'labels.tif'


def test_feature_maps_and_a_label_raster_of_torchgeo(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, (4, 12)).astype(np.uint8)
    truth[0, 0] = 255
    for i, chip in Chips(3).rows([0, 1, 2]).iterrows():
        cells = truth[:, 4 * i : 4 * i + 4]
        features = np.stack([3.0 * (cells == c) for c in range(3)])
        features += rng.normal(size=features.shape) * 0.2
        path = tmp_path / 'maps' / f'{chip["chip_id"]}.tif'
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode_feature_map(features.astype(np.float32), chip, MADE))
    with rasterio.open(
        tmp_path / 'labels.tif',
        'w',
        driver='GTiff',
        dtype='uint8',
        count=1,
        height=4,
        width=12,
        crs='EPSG:32618',
        transform=from_origin(500000, 4.5e6 + 320, 80, 80),
    ) as file:
        file.write(truth, 1)
    maps = FeatureMaps(tmp_path / 'maps')
    both = maps & LabelRaster(tmp_path)
    chips = ChipDataset([(both, GridSampler(maps, size=4))])
    loader = DataLoader(chips, batch_size=4, collate_fn=collate)
    probe = LinearProbe('multiclass', 3, ('a', 'b', 'c'), lr=0.3, ignore_index=255)
    run = trainer()
    run.fit(probe, loader)
    assert probe.provenance == MADE
    (scores,) = run.test(probe, loader, verbose=False)
    assert scores['test_accuracy_micro'] == 1


def test_ignored_labels_do_not_count() -> None:
    features, labels = blobs(60)
    spoilt = features.clone()
    spoilt[50:] = 1e6
    ignored = labels.clone()
    ignored[50:] = -1
    probe = LinearProbe('multiclass', 6, ('a', 'b', 'c'), ignore_index=-1)
    loader = DataLoader(Table(spoilt, ignored), batch_size=20)
    run = trainer(1)
    run.fit(probe, loader)
    torch.testing.assert_close(probe.mean, features[:50].mean(0), rtol=1e-4, atol=1e-4)
    (scores,) = run.test(probe, loader, verbose=False)
    chosen = probe.probabilities(features[:50]).argmax(1)
    expected = (chosen == labels[:50]).float().mean().item()
    assert scores['test_accuracy_micro'] == pytest.approx(expected)


def fit_as_rank(rank: int, port: int, folder: Path) -> None:
    # What torchrun sets for the processes that it starts.
    os.environ.update(
        LOCAL_RANK=str(rank), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port)
    )
    run = trainer(1, devices=2, strategy='ddp')
    probe = LinearProbe('multiclass', 6, ('a', 'b', 'c'), lr=0.1, ignore_index=-1)
    loaders = half_ignored()
    run.fit(probe, *loaders)
    torch.save((probe.state_dict(), dict(run.callback_metrics)), folder / f'{rank}.pt')


def half_ignored() -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Data to train and to validate; every other sample of the latter is ignored."""
    features, labels = blobs(40, seed=1)
    labels[1::2] = -1
    train = DataLoader(Table(*blobs(64)), batch_size=8)
    return train, DataLoader(Table(features, labels), batch_size=4)


@pytest.mark.skipif(sys.platform == 'win32', reason='gloo')
@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore:.*fork')
def test_two_processes_validate_as_one_where_one_has_only_ignored_samples(
    tmp_path: Path,
) -> None:
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    start_processes(fit_as_rank, (port, tmp_path), nprocs=2, start_method='fork')
    (state, found), (other, elsewhere) = (
        torch.load(tmp_path / f'{rank}.pt') for rank in (0, 1)
    )
    for name, tensor in state.items():
        assert torch.equal(tensor, other[name]), name
    probe = LinearProbe('multiclass', 6, ('a', 'b', 'c'), ignore_index=-1)
    probe.load_state_dict(state)
    train, held_out = half_ignored()
    torch.testing.assert_close(probe.mean, train.dataset.features.mean(0))
    (expected,) = trainer().validate(probe, held_out, verbose=False)
    assert {'val_loss', 'val_f1', 'val_average_precision'} <= set(expected)
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value, rel=1e-5), name
        assert elsewhere[name].item() == pytest.approx(value, rel=1e-5), name


def test_batches_of_nothing_log_nothing() -> None:
    features, labels = blobs(20)
    ignored = DataLoader(Table(features, torch.full_like(labels, -1)), batch_size=8)
    probe = LinearProbe(
        'multiclass', 6, ('a', 'b', 'c'), standardize='none', ignore_index=-1
    )
    assert trainer().validate(probe, ignored, verbose=False) == [{}]
    # The loss is the mean over samples, not over batches.
    with torch.no_grad():
        probe.linear.weight.normal_()
    (found,) = trainer().validate(
        probe, DataLoader(Table(features, labels), batch_size=19), verbose=False
    )
    expected = torch.nn.functional.cross_entropy(probe(features), labels)
    assert found['val_loss'] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize('own', [False, True])
def test_batches_of_a_sampler(own: bool) -> None:
    table = Table(*blobs(64))
    sampler: Any = BatchSampler(RandomSampler(table), 8, drop_last=True)
    if own:
        sampler = [list(range(32)), list(range(32, 64))]
    probe = LinearProbe('multiclass', 6, ('a', 'b', 'c'), lr=0.1)
    trainer(1).fit(probe, DataLoader(table, batch_sampler=sampler))
    torch.testing.assert_close(probe.mean, table.features.mean(0))
    assert probe.linear.weight.any()


def test_checkpoint_holds_everything(tmp_path: Path) -> None:
    data = Data(blobs(80), blobs(20, seed=1))
    probe = LinearProbe(
        'multiclass', 6, ('a', 'b', 'c'), class_weights=[1, 2, 3], lr=0.05
    )
    run = trainer(3)
    run.fit(probe, datamodule=data)
    path = tmp_path / 'probe.ckpt'
    run.save_checkpoint(path, weights_only=True)
    expected = probe(data.held_out.features)
    for loaded in (load_probe(path), LinearProbe.load_from_checkpoint(path)):
        torch.testing.assert_close(loaded(data.held_out.features), expected)
        assert loaded.classes == ('a', 'b', 'c')
        assert loaded.provenance == MADE
        assert loaded.class_weight.tolist() == [1, 2, 3]
    again = LinearProbe('multiclass', 6, ('a', 'b', 'c'), class_weights=[1, 2, 3])
    moved = Data((data.train.features + 5, data.train.labels), blobs(20, seed=1))
    run.save_checkpoint(path)
    trainer(4).fit(again, datamodule=moved, ckpt_path=path)
    assert torch.equal(again.mean, probe.mean)


def test_checkpoints_keep_their_layout(tmp_path: Path) -> None:
    weight = torch.tensor([[1.0, 0], [0, 1], [1, 1]])
    state = {
        'mean': torch.tensor([1.0, 2]),
        'scale': torch.tensor([2.0, 4]),
        'class_weight': torch.ones(3),
        'target_mean': torch.zeros(1),
        'target_scale': torch.ones(1),
        'fitted': torch.tensor(True),
        'linear.weight': weight,
        'linear.bias': torch.zeros(3),
    }
    arguments = {
        'task': 'multiclass',
        'in_features': 2,
        'classes': ['a', 'b', 'c'],
        'standardize': 'zscore',
        'class_weights': None,
        'lr': 0.001,
        'weight_decay': 0.01,
        'optimizer': 'adamw',
        'ignore_index': None,
    }
    content = {
        'hyper_parameters': arguments,
        'state_dict': state,
        'dynamicvis_geo_probe': {'features': MADE},
    }
    path = tmp_path / 'probe.ckpt'
    torch.save(content, path)
    probe = load_probe(path)
    assert probe.provenance == MADE
    logits = probe(torch.tensor([[3.0, 10]]))
    torch.testing.assert_close(logits, torch.tensor([[1.0, 2, 3]]))
    run = trainer()
    run.strategy.connect(probe)
    run.save_checkpoint(path)
    again = torch.load(path, weights_only=True)
    assert dict(again['hyper_parameters']) == arguments
    assert set(again['state_dict']) == set(state)


def test_columns_that_vary_by_rounding_are_not_blown_up() -> None:
    probe = LinearProbe('regression', 2)
    last = np.nextafter(np.float32(1000), np.float32(2000)).item()
    features = torch.tensor([[1000, 0.0], [last, 2], [1000, 4], [last, 6]])
    labels = torch.tensor([1.0, 2, 3, 4])
    probe.fit_statistics([{'embedding': features, 'label': labels}])
    torch.testing.assert_close(probe.scale, torch.tensor([1.0, 5**0.5]))


def test_features_made_otherwise_are_refused() -> None:
    probe = LinearProbe('multiclass', 6, ('a', 'b', 'c'))
    run = trainer(1)
    train, held_out = blobs(40), blobs(20, seed=1)
    run.fit(probe, datamodule=Data(train, held_out))
    elsewhere = {**MADE, 'source': {'chips': 99}}
    elsewhere['model'] = {
        **MADE['model'],
        'backbone': {**MADE['model']['backbone'], 'scan': 'torch'},
    }
    run.predict(probe, datamodule=Data(train, held_out, elsewhere))
    stretched = changed(preprocessing={'input_range': [0, 3000]}, pooling='featmap_max')
    other = Data(train, held_out, stretched)
    for step in (run.predict, run.test, run.fit):
        with pytest.raises(SpecError) as refused:
            step(probe, datamodule=other)
        assert 'input_range: [0, 10000] (probe), [0, 3000]' in str(refused.value)
        assert 'pooling: featmap_mean (probe), featmap_max' in str(refused.value)
    with pytest.raises(SpecError, match='no provenance'):
        run.predict(probe, datamodule=Data(train, held_out, {}))
    maps = changed(output='grid', pooling=None)
    with pytest.raises(SpecError, match='output'):
        probe.check_features(maps)
    probe.check_features(maps, any_pooling=True)
    weights = {'weights': 'random', 'seed': 0}
    with pytest.raises(SpecError, match=r'backbone\.sha256.*not told'):
        probe.check_features(changed(backbone=weights), any_pooling=True)


def test_features_of_other_routing_or_precision_are_refused() -> None:
    probe = LinearProbe('multiclass', 6, ('a', 'b', 'c'))
    with torch.device('meta'):
        routed, not_routed = (
            DynamicVis(img_size=64, spatial_token_keep_ratios=ratios).settings
            for ratios in ((8, 4, 2, 1), (1, 1, 1, 1))
        )
    weights = {'weights': 'pretrained', 'sha256': 'a' * 64}
    exact = {'precision': '32-true', 'kernel': 'c', 'tf32': False}
    probe.provenance = changed(backbone={**weights, 'settings': routed}, numerics=exact)
    elsewhere = {**exact, 'kernel': 'triton'}
    probe.check_features(
        changed(backbone={**weights, 'settings': routed}, numerics=elsewhere)
    )
    rough = {**exact, 'precision': 'bf16-mixed'}
    with pytest.raises(SpecError, match=r'precision: 32-true \(probe\), bf16-mixed'):
        probe.check_features(
            changed(backbone={**weights, 'settings': routed}, numerics=rough)
        )
    with pytest.raises(SpecError, match=r'keep_ratios: \[8, 4, 2, 1\] \(probe\), \[1,'):
        probe.check_features(
            changed(backbone={**weights, 'settings': not_routed}, numerics=exact)
        )


def test_provenance_is_found_on_datasets_too() -> None:
    table = Table(*blobs(40))
    table.provenance = MADE  # type: ignore[attr-defined]
    probe = LinearProbe('multiclass', 6, ('a', 'b', 'c'))
    run = trainer(1)
    run.fit(probe, DataLoader(table, batch_size=10))
    assert probe.provenance == MADE
    table.provenance = changed(pooling=None)  # type: ignore[attr-defined]
    with pytest.raises(SpecError, match='pooling'):
        run.predict(probe, DataLoader(table, batch_size=10))


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        ({'task': 'segmentation'}, "task='segmentation'.*multilabel"),
        ({'classes': ('a',)}, "classes=.*'multiclass' has 2 or more"),
        ({'task': 'binary', 'classes': ('a', 'b', 'c')}, "'binary' has 2 classes"),
        ({'task': 'regression'}, "'regression' has 0 classes"),
        ({'standardize': 'minmax'}, "standardize='minmax'.*zscore"),
        ({'class_weights': [1.0]}, 'class_weights=.*2 classes'),
        ({'class_weights': 'even'}, 'class_weights'),
        (
            {'task': 'regression', 'classes': (), 'class_weights': 'balanced'},
            'regression',
        ),
        ({'lr': 0}, 'lr=0'),
        ({'lr': float('nan')}, 'lr=nan'),
        ({'weight_decay': -1}, 'weight_decay=-1'),
        ({'in_features': 0}, 'in_features=0'),
        ({'optimizer': 'lion'}, "optimizer='lion'.*adamw, sgd"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], words: str) -> None:
    defaults: dict[str, Any] = {
        'task': 'multiclass',
        'in_features': 3,
        'classes': ('a', 'b'),
    }
    with pytest.raises(SpecError, match=words):
        LinearProbe(**{**defaults, **arguments})


def test_wrong_batches() -> None:
    probe = LinearProbe('multiclass', 3, ('a', 'b'), standardize='none')
    features = torch.zeros(4, 3)
    for batch, words in (
        ({'label': torch.zeros(4)}, "no 'embedding'"),
        ({'embedding': features}, "no 'label'"),
        ({'embedding': features[:, :2], 'label': torch.zeros(4)}, r'\(4, 2\)'),
        ({'embedding': features, 'label': torch.zeros(3)}, r'\(3,\).*need.*\(4,\)'),
        ({'embedding': features, 'label': torch.full((4,), 2)}, 'labels run from 2'),
    ):
        with pytest.raises(SpecError, match=words):
            probe.training_step(batch, 0)
    with pytest.raises(SpecError, match='not fitted'):
        LinearProbe('multiclass', 3, ('a', 'b'))(features)
    normed = LinearProbe('multiclass', 3, ('a', 'b'), standardize='batchnorm')
    one = {'embedding': features[:1], 'label': torch.zeros(1)}
    with pytest.raises(SpecError, match='larger batches'):
        normed.training_step(one, 0)
    with pytest.raises(SpecError, match='no labelled sample'):
        LinearProbe('multiclass', 3, ('a', 'b'), ignore_index=0).fit_statistics([one])


def test_files_that_are_no_probe(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match='no such file'):
        load_probe(tmp_path / 'none.ckpt')
    text = tmp_path / 'text.ckpt'
    text.write_text('not a checkpoint')
    with pytest.raises(CheckpointError, match='not a readable checkpoint'):
        load_probe(text)
    other = tmp_path / 'other.ckpt'
    torch.save({'state_dict': {}}, other)
    with pytest.raises(CheckpointError, match='no checkpoint of a LinearProbe'):
        load_probe(other)
