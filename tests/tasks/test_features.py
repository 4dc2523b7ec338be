from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from lightning.pytorch import Trainer
from rasterio.transform import from_origin
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torch.utils.data._utils.pin_memory import pin_memory

from dynamicvis_geo.callbacks import EmbeddingWriter
from dynamicvis_geo.datasets import ChipDataset, ChipFailure, Scenes, collate
from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.models import BackboneConfig, DynamicVis
from dynamicvis_geo.provenance import read_provenance
from dynamicvis_geo.samplers import GridSampler
from dynamicvis_geo.tasks import FeatureExtraction
from dynamicvis_geo.transforms import Preprocess


class Blocks(nn.Module):
    """Maps of block means: easy to follow by hand."""

    img_size = (32, 32)

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.dropout = nn.Dropout()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        maps = self.dropout(self.scale * nn.functional.avg_pool2d(x, 8))
        return maps * 0, maps


class Vector(nn.Module):
    """No map and no declared size: one vector an image."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


@pytest.fixture
def chips(tmp_path: Path) -> ChipDataset:
    path = tmp_path / 'scene.tif'
    values = np.random.default_rng(0).integers(0, 9000, (3, 96, 160), dtype=np.uint16)
    with rasterio.open(
        path,
        'w',
        driver='GTiff',
        count=3,
        height=96,
        width=160,
        dtype='uint16',
        crs='EPSG:32633',
        transform=from_origin(320 * 1200, 320 * 20000, 10, 10),
    ) as file:
        file.write(values)
    scene = Scenes(path)
    return ChipDataset([(scene, GridSampler(scene, 32))])


def predict(
    module: FeatureExtraction, chips: ChipDataset, **options: Any
) -> list[dict[str, Any]]:
    trainer = Trainer(
        accelerator='cpu',
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        **options,
    )
    loader = DataLoader(chips, batch_size=4, collate_fn=collate)
    predictions = trainer.predict(module, loader)
    assert predictions is not None
    return predictions  # type: ignore[return-value]


@pytest.mark.parametrize('pooling', ['mean', 'max'])
def test_pooled_features_are_those_of_the_grid(
    chips: ChipDataset, pooling: Any
) -> None:
    grids = predict(FeatureExtraction(Blocks(), 'grid'), chips)
    pooled = predict(FeatureExtraction(Blocks(), pooling=pooling), chips)
    assert sum(len(p['embedding']) for p in pooled) == len(chips) == 15
    for grid, vector in zip(grids, pooled, strict=True):
        assert grid['embedding'].shape[1:] == (3, 4, 4)
        assert vector['embedding'].dtype == torch.float32
        flat = grid['embedding'].flatten(2)
        expected = flat.mean(2) if pooling == 'mean' else flat.amax(2)
        torch.testing.assert_close(vector['embedding'], expected)


def test_predictions_keep_every_key_but_the_image(chips: ChipDataset) -> None:
    predictions = predict(FeatureExtraction(Blocks()), chips)
    batch = collate([chips[0]])
    assert set(predictions[0]) == {*batch, 'embedding'} - {'image'}
    rows = torch.cat([p['chip'] for p in predictions])[:, 0]
    assert rows.tolist() == list(range(15))
    first = FeatureExtraction(Blocks())(batch['image'])
    torch.testing.assert_close(predictions[0]['embedding'][:1], first)


def test_vectors_count_as_maps_of_one_cell(chips: ChipDataset) -> None:
    image = collate([chips[3]])['image']
    vector = FeatureExtraction(Vector())(image)
    torch.testing.assert_close(vector, Preprocess(None)(image).mean((2, 3)))
    assert FeatureExtraction(Vector(), 'grid')(image).shape == (1, 3, 1, 1)


def test_backbone_is_frozen_whatever_is_asked_of_it(chips: ChipDataset) -> None:
    module = FeatureExtraction(Blocks())
    image = collate([chips[0]])['image']
    first = module(image)
    assert module.train().training is False
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert torch.equal(module(image), first)
    probe = nn.Linear(3, 2)
    probe(module(image)).sum().backward()
    assert probe.weight.grad is not None


def test_dynamicvis_runs_in_both_precisions(chips: ChipDataset) -> None:
    torch.manual_seed(0)
    backbone = DynamicVis(img_size=32)
    exact = predict(FeatureExtraction(backbone), chips)
    rough = predict(FeatureExtraction(backbone), chips, precision='bf16-mixed')
    for one, other in zip(exact, rough, strict=True):
        assert one['embedding'].shape[1:] == (768,)
        assert other['embedding'].dtype == torch.float32
        cosine = torch.cosine_similarity(one['embedding'], other['embedding'])
        assert cosine.min() > 0.99


@pytest.mark.parametrize('stage', [0, 1, 2, 3])
def test_stages_of_dynamicvis(stage: int) -> None:
    torch.manual_seed(0)
    backbone = DynamicVis(img_size=64)
    image = torch.rand(2, 3, 64, 64) * 9000
    task = FeatureExtraction(backbone, 'grid', stage=stage)
    grid = task(image)
    with torch.no_grad():
        x = task.preprocess(image)
        expected = backbone(x, out_indices=(0, 1, 2, 3))[stage]
    assert torch.equal(grid, expected)
    side = 16 >> stage
    assert task.feature_shape == grid.shape[1:] == (96 << stage, side, side)
    assert task.embedding_dim == 96 << stage
    made = task.provenance
    assert made['stage'] == stage
    assert made['backbone']['settings']['out_indices'] == [stage]
    mean = FeatureExtraction(backbone, stage=stage)(image)
    torch.testing.assert_close(mean, grid.mean((2, 3)))
    most = FeatureExtraction(backbone, pooling='max', stage=stage)(image)
    assert torch.equal(most, grid.amax((2, 3)))
    # The module may be shared: it stays as it is.
    assert backbone.out_indices == (3,)


def test_stages_of_other_modules_are_counted_from_the_last_map() -> None:
    image = torch.rand(1, 3, 32, 32) * 9000
    last = FeatureExtraction(Blocks(), 'grid')(image)
    assert last.any()
    before = FeatureExtraction(Blocks(), 'grid', stage=2)
    assert torch.equal(before(image), last * 0)
    assert before.provenance['stage'] == 2
    assert before.feature_shape is before.embedding_dim is None
    with pytest.raises(SpecError, match='stage=1: the backbone gives stages 2 to 3'):
        FeatureExtraction(Blocks(), stage=1)(image)
    with pytest.raises(SpecError, match='stage=2: the backbone gives one map, stage 3'):
        FeatureExtraction(Vector(), stage=2)(image)
    telling = Blocks()
    telling.feature_channels = (5, 3)  # type: ignore[assignment]
    dims = [FeatureExtraction(telling, stage=s).embedding_dim for s in (1, 2, 3)]
    assert dims == [None, 5, 3]


def test_a_stage_that_the_backbone_is_not_for_is_refused() -> None:
    one = DynamicVis(img_size=32, out_indices=(1,))
    with pytest.raises(SpecError, match=r'stage=3: .* out_indices=\(1,\)'):
        FeatureExtraction(one)
    assert FeatureExtraction(one, stage=1).embedding_dim == 192
    averaged = DynamicVis(img_size=32, out_type='avg_featmap')
    assert FeatureExtraction(averaged).feature_shape == (768, 1, 1)
    with pytest.raises(SpecError, match='stage=0: the backbone gives one map'):
        FeatureExtraction(averaged, stage=0)


def test_stages_of_a_compiled_model_are_those_of_the_model() -> None:
    backbone = DynamicVis(img_size=32)
    image = torch.rand(1, 3, 32, 32) * 9000
    compiled = FeatureExtraction(torch.compile(backbone, backend='eager'), stage=0)
    plain = FeatureExtraction(backbone, stage=0)
    torch.testing.assert_close(compiled(image), plain(image))
    assert compiled.provenance == plain.provenance


def test_precision_that_rounds_reflectance_is_refused(chips: ChipDataset) -> None:
    with pytest.raises(SpecError, match='bf16-mixed'):
        predict(FeatureExtraction(Blocks()), chips, precision='bf16-true')


def test_provenance_says_what_was_done() -> None:
    module = FeatureExtraction(Blocks(), pooling='max', input_range=(0, 3000))
    made = module.provenance
    assert made['pooling'] == 'featmap_max'
    assert made['preprocessing']['input_range'] == [0, 3000]
    assert made['preprocessing']['resize'] == [32, 32]
    assert made['backbone']['implementation'].endswith('test_features.Blocks')
    assert module.embedding_dim is None
    with pytest.warns(UserWarning, match='untrained'):
        module = FeatureExtraction(BackboneConfig(weights='random', img_size=32))
    assert module.provenance['backbone']['weights'] == 'random'
    assert module.embedding_dim == 768


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        ({'output': 'tokens'}, "output='tokens'.*pooled, grid"),
        ({'pooling': 'median'}, "pooling='median'.*mean, max"),
        ({'stage': 4}, 'stage=4.*0, 1, 2, 3'),
        ({'stage': '1'}, "stage='1'"),
        ({'stage': True}, 'stage=True'),
        ({'input_range': (1, 1)}, 'input_range'),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        FeatureExtraction(Blocks(), **arguments)


class WithGaps(ChipDataset):
    """Chips 1, 4, 5, 6 and 7 have no image: with batches of 4, a whole batch."""

    def __getitems__(self, indices: Any) -> list[dict[str, Any] | None]:
        samples = super().__getitems__(indices)
        gaps = (1, 4, 5, 6, 7)
        return [
            None if index in gaps else sample
            for index, sample in zip(indices, samples, strict=True)
        ]


@pytest.mark.parametrize('output', ['pooled', 'grid'])
def test_skipped_chips_are_left_out_of_batches_and_files(
    chips: ChipDataset, tmp_path: Path, output: Any
) -> None:
    scene = chips.datasets[0]
    gapped = WithGaps([(scene, GridSampler(scene, 32))])
    path = tmp_path / ('e.parquet' if output == 'pooled' else 'maps')
    writer = EmbeddingWriter(path)
    predictions = predict(
        FeatureExtraction(Blocks(), output), gapped, callbacks=[writer]
    )
    rows = [p['chip'][:, 0].tolist() for p in predictions if p]
    assert rows == [[0, 2, 3], [8, 9, 10, 11], [12, 13, 14]]
    assert writer.written == 10


class WithFailures(ChipDataset):
    """The chips that :class:`WithGaps` leaves out, told of as failures."""

    def __getitems__(self, indices: Any) -> list[Any]:
        return [
            ChipFailure(index, 'SourceError', f'chip {index}: no image')
            if index in (1, 4, 5, 6, 7)
            else sample
            for index, sample in zip(
                indices, super().__getitems__(indices), strict=True
            )
        ]


@pytest.mark.parametrize('precision', ['32-true', 'bf16-mixed', 'bf16-true'])
def test_failures_pass_through(chips: ChipDataset, precision: Any) -> None:
    scene = chips.datasets[0]
    failing = WithFailures([(scene, GridSampler(scene, 32))])
    if precision == 'bf16-true':
        # Images are refused in this precision: only failures remain.
        failing = Subset(failing, [4, 5, 6, 7])  # type: ignore[assignment]
    predictions = predict(FeatureExtraction(Blocks()), failing, precision=precision)
    failures = [one for p in predictions for one in p.get('failures', [])]
    assert failures[-4:] == [
        ChipFailure(i, 'SourceError', f'chip {i}: no image') for i in (4, 5, 6, 7)
    ]
    for failure in failures:
        assert type(failure) is ChipFailure
        assert [type(part) for part in failure] == [int, str, str]
    if precision != 'bf16-true':
        assert [p['chip'][:, 0].tolist() for p in predictions if 'chip' in p] == (
            [[0, 2, 3], [8, 9, 10, 11], [12, 13, 14]]
        )
        assert [set(p) for p in predictions][1] == {'failures'}
        assert len(failures) == 5


def test_failures_are_not_touched_by_pinning() -> None:
    batch = {'failures': [ChipFailure(3, 'OSError', 'gone')]}
    assert pin_memory(batch) == batch
    assert type(pin_memory(batch)['failures'][0]) is ChipFailure


def test_an_embedding_in_the_batch_does_not_replace_the_computed_one() -> None:
    batch = {'image': torch.zeros(1, 3, 8, 8), 'embedding': torch.ones(1, 3)}
    with pytest.raises(SpecError, match=r"'embedding' already.*rename or drop"):
        FeatureExtraction(Blocks()).predict_step(batch, 0)


class Telling(Blocks):
    def numerics(self, device: torch.device) -> dict[str, Any]:
        return {'kernel': f'fast on {device}', 'tf32': False}


def test_numerics_are_those_of_the_run(chips: ChipDataset, tmp_path: Path) -> None:
    task = FeatureExtraction(Telling())
    told = {'kernel': 'fast on cpu', 'tf32': False}
    assert task.provenance['numerics'] == {'precision': '32-true', **told}
    writer = EmbeddingWriter(tmp_path / 'e.parquet')
    predict(task, chips, callbacks=[writer], precision='bf16-mixed')
    written = read_provenance(tmp_path / 'e.parquet')['model']['numerics']
    assert written == {'precision': 'bf16-mixed', **told}
    silent = FeatureExtraction(Blocks()).provenance['numerics']
    assert silent == {'precision': '32-true', 'kernel': None, 'tf32': None}
    native = FeatureExtraction(DynamicVis(img_size=32, scan='torch'))
    assert native.provenance['numerics']['kernel'] == 'torch'


def test_settings_are_those_of_the_model_that_runs() -> None:
    backbone = DynamicVis(img_size=32, is_softmax_on_x=False)
    backbone.provenance = {'weights': 'mine'}  # type: ignore[assignment]
    described = FeatureExtraction(backbone).provenance['backbone']
    assert described == {'weights': 'mine', 'settings': backbone.settings}
    assert described['settings']['is_softmax_on_x'] is False


def test_batch_without_an_image_or_with_more_bands() -> None:
    module = FeatureExtraction(Blocks())
    with pytest.raises(SpecError, match=r"no 'image', only mask"):
        module.predict_step({'mask': torch.zeros(1, 8, 8)}, 0)
    with pytest.raises(SpecError, match=r'\(1, 13, 8, 8\)'):
        module.predict_step({'image': torch.zeros(1, 13, 8, 8)}, 0)


def test_module_may_say_what_it_is() -> None:
    backbone = Blocks()
    task = FeatureExtraction(backbone)
    assert task.provenance['backbone']['implementation'].endswith('Blocks')
    backbone.provenance = {'weights': 'mine'}  # type: ignore[assignment]
    task = FeatureExtraction(backbone)
    assert task.provenance['backbone'] == {'weights': 'mine'}
