"""DynamicVis in TerraTorch's factory, tasks and configurations."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
import yaml
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.models import BackboneConfig, dynamicvis, load_backbone
from tests.documents.blocks import ROOT, blocks
from tests.models.checkpoints import make_checkpoint
from tests.models.hub import serve_hub

pytest.importorskip('terratorch')
from terratorch.cli_tools import build_lightning_cli
from terratorch.models import EncoderDecoderFactory
from terratorch.registry import BACKBONE_REGISTRY, TERRATORCH_BACKBONE_REGISTRY
from terratorch.tasks import SemanticSegmentationTask

import dynamicvis_geo.integrations.terratorch  # noqa: F401


@pytest.fixture(scope='module')
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp('weights') / 'dynamicvis_b.pth')


def build(name: str = 'dynamicvis_b', **arguments: Any) -> Any:
    return BACKBONE_REGISTRY.build(name, **{'img_size': 64, **arguments})


def image(bands: int = 3) -> Tensor:
    return torch.randn(1, bands, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ('name', 'channels'),
    [
        ('dynamicvis_b', [96, 192, 384, 768]),
        ('terratorch_dynamicvis_l', [128, 256, 512, 1024]),
    ],
)
def test_registered_by_name(name: str, channels: list[int]) -> None:
    assert name.removeprefix('terratorch_') in TERRATORCH_BACKBONE_REGISTRY
    encoder = build(name)
    assert encoder.out_channels == channels
    with torch.no_grad():
        maps = encoder(image())
    assert isinstance(maps, list)
    assert [tuple(each.shape) for each in maps] == [
        (1, width, side, side)
        for width, side in zip(channels, (16, 8, 4, 2), strict=True)
    ]


@pytest.mark.parametrize(
    ('task', 'decoder', 'arguments', 'shape'),
    [
        ('segmentation', 'UperNetDecoder', {'num_classes': 4}, (2, 4, 64, 64)),
        ('segmentation', 'FCNDecoder', {'num_classes': 4}, (2, 4, 64, 64)),
        ('segmentation', 'smp_FPN', {'num_classes': 4}, (2, 4, 64, 64)),
        ('regression', 'UperNetDecoder', {}, (2, 64, 64)),
        ('classification', 'IdentityDecoder', {'num_classes': 4}, (2, 4)),
        ('scalar_regression', 'IdentityDecoder', {'num_outputs': 1}, (2, 1)),
    ],
)
def test_every_parameter_learns(
    task: str,
    decoder: str,
    arguments: dict[str, int],
    shape: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Few mixers: nothing here depends on their number.
    monkeypatch.setattr(dynamicvis, '_DEPTHS', {'b': (1, 2, 1, 1)})
    model = EncoderDecoderFactory().build_model(
        task=task,
        backbone='dynamicvis_b',
        backbone_img_size=64,
        decoder=decoder,
        **arguments,
    )
    output = model(image().expand(2, -1, -1, -1)).output
    assert output.shape == shape
    output.square().sum().backward()
    for name, parameter in model.encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_task_is_trained() -> None:
    """With what TorchGeo's datasets give beside image and mask in the batch."""
    task = SemanticSegmentationTask(
        model_factory='EncoderDecoderFactory',
        model_args={
            'backbone': 'dynamicvis_b',
            'backbone_img_size': 64,
            'backbone_out_indices': [1, 3],
            'decoder': 'FCNDecoder',
            'decoder_channels': 16,
            'num_classes': 2,
        },
        ignore_index=-1,
        lr=1e-3,
    )
    before = task.model.encoder.maps.model.pos_embed.detach().clone()
    sample = {
        'image': image()[0],
        'mask': torch.zeros(64, 64, dtype=torch.long),
        'bounds': torch.zeros(9),
    }
    trainer = Trainer(fast_dev_run=1, accelerator='cpu', enable_model_summary=False)
    trainer.fit(task, DataLoader([sample, sample], batch_size=2))
    assert not torch.equal(before, task.model.encoder.maps.model.pos_embed)


def test_configuration_of_the_page_is_run(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That in docs/terratorch.md, with smaller images and other weights."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    for folder, bands, highest in (('images', 3, 3000), ('masks', 1, 3)):
        Path(folder).mkdir()
        for name in ('a', 'b'):
            values = generator.integers(0, highest, (bands, 64, 64), dtype=np.int16)
            with rasterio.open(
                f'{folder}/{name}.tif', 'w', 'GTiff', 64, 64, bands, dtype='int16'
            ) as file:
                file.write(values)
    page = ROOT / 'docs' / 'terratorch.md'
    (code,) = (block.code for block in blocks(page) if block.language == 'yaml')
    config = yaml.safe_load(code)
    config['trainer'] |= {'fast_dev_run': 1, 'accelerator': 'cpu'}
    config['data']['init_args'] |= {'num_workers': 0, 'batch_size': 2}
    config['model']['init_args']['model_args'] |= {
        'backbone_img_size': 64,
        'backbone_ckpt_path': str(weights),
        'decoder_channels': 16,
    }
    Path('fit.yaml').write_text(yaml.safe_dump(config))
    monkeypatch.setattr(sys, 'argv', ['terratorch', 'fit', '-c', 'fit.yaml'])
    cli = build_lightning_cli()
    assert cli.trainer.state.finished
    learnt = cli.model.model.encoder.maps.model.pos_embed
    start, _ = load_backbone(BackboneConfig(checkpoint=weights, img_size=64))
    assert not torch.equal(learnt, start.pos_embed)
    torch.testing.assert_close(learnt, start.pos_embed, rtol=0, atol=1e-3)


def test_frozen_backbone_keeps_its_weights(weights: Path) -> None:
    task = SemanticSegmentationTask(
        model_factory='EncoderDecoderFactory',
        model_args={
            'backbone': 'dynamicvis_b',
            'backbone_img_size': 64,
            'backbone_pretrained': True,
            'backbone_ckpt_path': str(weights),
            'decoder': 'FCNDecoder',
            'num_classes': 2,
        },
        freeze_backbone=True,
    )
    assert not any(p.requires_grad for p in task.model.encoder.parameters())
    assert all(p.requires_grad for p in task.model.decoder.parameters())


def test_official_weights_are_fetched(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve_hub(monkeypatch, tmp_path / 'hf') as hub:
        place = (BackboneConfig.hf_repo, BackboneConfig.ckpt_file)
        hub.files[place] = weights.read_bytes()
        encoder = build(pretrained=True)
    expected, _ = load_backbone(BackboneConfig(checkpoint=weights, img_size=64))
    assert all(p.requires_grad for p in encoder.parameters())
    with torch.no_grad():
        assert torch.equal(encoder(image())[-1], expected(image())[0])


def test_maps_come_in_the_order_asked_for() -> None:
    encoder = build(out_indices=[-1, 0])
    assert encoder.out_channels == [768, 96]
    with torch.no_grad():
        assert [each.shape[1] for each in encoder(image())] == [768, 96]


def test_weights_follow_their_bands(weights: Path) -> None:
    load = {'pretrained': True, 'ckpt_path': weights}
    rgb = build(**load)
    bgr = build(**load, bands=['BLUE', 'HLSBands.GREEN', 'RED'])
    more = build(**load, bands=['NIR_NARROW', 'BLUE', 'GREEN', 'RED'])
    x = image()
    flipped = x.flip(1)
    beside = torch.cat([torch.zeros(1, 1, 64, 64), flipped], 1)
    with torch.no_grad():
        expected = rgb(x)[-1]
        torch.testing.assert_close(bgr(flipped)[-1], expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(more(beside)[-1], expected, rtol=1e-4, atol=1e-4)
        other = torch.cat([torch.ones(1, 1, 64, 64), flipped], 1)
        assert not torch.allclose(more(other)[-1], expected, rtol=1e-4, atol=1e-4)


def test_untrained_takes_any_number_of_bands() -> None:
    with torch.no_grad():
        assert len(build(in_chans=5)(image(5))) == 4


def test_checkpoint_without_pretrained_is_not_read(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match='needs pretrained=True'):
        build(ckpt_path=tmp_path / 'none.pth')


@pytest.mark.parametrize(
    ('arguments', 'said'),
    [
        ({'out_indices': [4]}, 'out_indices='),
        ({'bands': ['RDE']}, 'RDE'),
        ({'bands': ['RED', 'BLUE'], 'in_chans': 3}, 'in_chans'),
        ({'bands': []}, 'bands='),
        ({'img_size': 0}, 'img_size=0'),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        build(**arguments)


def test_image_of_another_size() -> None:
    encoder = build(out_indices=[3])
    with torch.no_grad():
        (features,) = encoder(torch.zeros(1, 3, 96, 128))
    assert features.shape == (1, 768, 3, 4)
