import importlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from lightning.pytorch import Trainer
from timm.models import adapt_input_conv, save_for_hf
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dynamicvis_geo import BackboneConfig
from dynamicvis_geo.errors import CheckpointError, SpecError
from dynamicvis_geo.integrations import timm as ours
from dynamicvis_geo.models import (
    DynamicVis,
    DynamicVis_B_Weights,
    dynamicvis,
    load_backbone,
)
from tests.models.checkpoints import mmengine_content, save_mmengine
from tests.models.hub import Hub, serve_hub

try:
    from torchgeo.tasks import Classification, SemanticSegmentation
except ImportError:  # before TorchGeo 0.10
    from torchgeo.trainers import ClassificationTask as Classification
    from torchgeo.trainers import SemanticSegmentationTask as SemanticSegmentation

FIRST = 'layers.0.0.projection.weight'
BEST = DynamicVis_B_Weights.FMOW_EPOCH_170
LAST = DynamicVis_B_Weights.FMOW_EPOCH_200
SCENES = [
    {
        'image': torch.rand(3, 64, 64),
        'label': torch.tensor(i % 3),
        'mask': (torch.arange(64 * 64) % 3).view(64, 64),
    }
    for i in range(2)
]


@pytest.fixture(scope='module', autouse=True)
def shallow() -> Iterator[None]:
    """Few mixers: nothing here depends on their number."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamicvis, '_DEPTHS', {'b': (1, 2, 1, 1), 'l': (1, 1, 1, 1)})
        yield


@pytest.fixture(scope='module')
def official(tmp_path_factory: pytest.TempPathFactory, shallow: None) -> Path:
    return save(tmp_path_factory.mktemp('official') / BEST.meta['ckpt_file'])


def save(path: Path, arch: str = 'b', **settings: Any) -> Path:
    backbone = DynamicVis(arch, img_size=64, **settings).state_dict()
    return save_mmengine(path, mmengine_content(backbone, arch))


@pytest.fixture
def hub(
    official: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Hub]:
    with serve_hub(monkeypatch, tmp_path / 'hf') as server:
        server.files[BEST.meta['hf_repo'], BEST.meta['ckpt_file']] = (
            official.read_bytes()
        )
        yield server


def weights_of(path: Path, img_size: int = 64) -> dict[str, Tensor]:
    config = BackboneConfig(checkpoint=path, img_size=img_size)
    return load_backbone(config)[0].state_dict()


def without_gradient(model: nn.Module) -> list[str]:
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]


def holds(model: nn.Module, tensors: dict[str, Tensor]) -> bool:
    state = model.state_dict()
    return all(torch.equal(state[name], tensor) for name, tensor in tensors.items())


def test_names_and_weights_are_listed() -> None:
    assert timm.list_models('dynamicvis*') == ['dynamicvis_b', 'dynamicvis_l']
    assert timm.list_pretrained('dynamicvis*') == [
        'dynamicvis_b.fmow_epoch_170',
        'dynamicvis_b.fmow_epoch_200',
        'dynamicvis_l.fmow_epoch_150',
        'dynamicvis_l.fmow_epoch_200',
    ]


def test_classifier_learns() -> None:
    model = timm.create_model('dynamicvis_b', num_classes=3, img_size=64, drop_rate=0.1)
    assert isinstance(model, ours.DynamicVisClassifier)
    logits = model(torch.rand(2, 3, 64, 64))
    assert logits.shape == (2, 3)
    nn.functional.cross_entropy(logits, torch.tensor([0, 2])).backward()
    assert without_gradient(model) == []


def test_classifier_has_the_methods_of_timm() -> None:
    model: Any = timm.create_model('dynamicvis_b', img_size=64).eval()
    image = torch.rand(2, 3, 64, 64)
    features = model.forward_features(image)
    assert features.shape == (2, model.num_features, 2, 2)
    assert model.num_classes == 0
    assert isinstance(model.get_classifier(), nn.Identity)
    assert torch.equal(model(image), features.mean((2, 3)))

    model.reset_classifier(5)
    assert model.num_classes == model.get_classifier().out_features == 5
    pooled = model.forward_head(features, pre_logits=True)
    assert torch.equal(model(image), model.get_classifier()(pooled))

    model.reset_classifier(0, 'max')
    assert torch.equal(model(image), features.amax((2, 3)))
    model.reset_classifier(0, '')
    assert torch.equal(model(image), features)
    last, maps = model.forward_intermediates(image, indices=2)
    assert torch.equal(last, features)
    assert [m.shape[1] for m in maps] == [384, 768]

    config = timm.data.resolve_data_config(model=model)
    assert config['input_size'] == (3, 512, 512)
    assert config['mean'] == (0.485, 0.456, 0.406)
    assert model.default_cfg is model.pretrained_cfg


def test_optimisers_of_timm_know_layers_and_what_not_to_decay() -> None:
    model = timm.create_model('dynamicvis_b', img_size=64, num_classes=2)
    optimiser = create_optimizer_v2(model, weight_decay=0.1, layer_decay=0.5)
    groups = {id(p): group for group in optimiser.param_groups for p in group['params']}
    of = {name: groups[id(p)] for name, p in model.named_parameters()}
    mixer = 'layers.0.1.0.spatial_mamba_mixer.mamba_layer'
    for name in ('pos_embed', f'{mixer}.A_log', f'{mixer}.D'):
        assert of[name]['weight_decay'] == 0
    assert of[f'{mixer}.in_proj.weight']['weight_decay'] == 0.1
    scales = [
        of[name]['lr_scale']
        for name in (
            'pos_embed',
            'layers.1.0.projection.weight',
            'layers.1.1.1.spatial_gate.weight',
            'layers.1.2.weight',
            'layers.3.1.0.spatial_gate.weight',
            'head.weight',
        )
    ]
    assert scales == sorted(set(scales))


@pytest.mark.parametrize(
    ('out_indices', 'stages'),
    [(None, (0, 1, 2, 3)), ((1, 2, 3), (1, 2, 3)), (2, (2, 3)), ((0, -2), (0, 2))],
)
def test_features_only_gives_maps_that_learn(
    out_indices: Any, stages: tuple[int, ...]
) -> None:
    model: Any = timm.create_model(
        'dynamicvis_b', features_only=True, out_indices=out_indices, img_size=64
    )
    maps = model(torch.rand(2, 3, 64, 96))
    info = model.feature_info
    assert info.channels() == [96 * 2**stage for stage in stages]
    assert info.reduction() == [4 * 2**stage for stage in stages]
    assert [m.shape for m in maps] == [
        (2, channels, 64 // reduction, 96 // reduction)
        for channels, reduction in zip(info.channels(), info.reduction(), strict=True)
    ]
    sum(m.square().sum() for m in maps).backward()
    assert without_gradient(model) == []


@pytest.mark.parametrize('size', [(64, 64), (96, 64), (50, 70)])
def test_images_of_other_sizes_are_as_with_a_backbone_of_that_size(
    size: tuple[int, int],
) -> None:
    model: Any = timm.create_model('dynamicvis_b', img_size=64).eval()
    backbone = DynamicVis(img_size=size).eval()
    backbone.load_state_dict(model.state_dict())
    image = torch.rand(1, 3, *size)
    with torch.no_grad():
        assert torch.equal(model.forward_features(image), backbone(image)[0])


@pytest.mark.parametrize('position', ['mid', 'none'])
def test_a_fixed_number_of_global_tokens_stays(position: str) -> None:
    cfg = {'pos': position, 'num': 2}
    model: Any = timm.create_model('dynamicvis_b', img_size=64, global_token_cfg=cfg)
    backbone = DynamicVis(img_size=96, global_token_cfg=cfg)
    backbone.load_state_dict(model.state_dict())
    image = torch.rand(1, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(model.forward_features(image), backbone(image)[0])


def test_a_fifth_map_as_convolutional_networks_have_it_is_left_out() -> None:
    with pytest.warns(UserWarning, match='4 feature maps'):
        model: Any = timm.create_model(
            'dynamicvis_b', features_only=True, out_indices=range(5), img_size=64
        )
    assert model.feature_info.channels() == [96, 192, 384, 768]
    assert len(model(torch.rand(1, 3, 64, 64))) == 4


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(SpecError, match='img_size=-64'):
        timm.create_model('dynamicvis_b', img_size=-64)
    with pytest.raises(SpecError, match=r'out_indices=.*4 stages'):
        timm.create_model('dynamicvis_b', features_only=True, out_indices=(3, 5))
    with pytest.raises(SpecError, match=r'output_stride=16.*UPerNet'):
        timm.create_model('dynamicvis_b', features_only=True, output_stride=16)
    model: Any = timm.create_model('dynamicvis_b', img_size=64)
    with pytest.raises(SpecError, match=r'8 x 64 pixels.*16 or more'):
        model(torch.rand(1, 3, 8, 64))
    with pytest.raises(SpecError, match='NHWC'):
        model.forward_intermediates(torch.rand(1, 3, 64, 64), output_fmt='NHWC')


def test_pretrained_weights_are_those_of_the_backbone(
    hub: Hub, official: Path, tmp_path: Path
) -> None:
    cache = tmp_path / 'cache'
    model: Any = timm.create_model(
        'dynamicvis_b', pretrained=True, img_size=64, num_classes=2, cache_dir=cache
    )
    assert holds(model, weights_of(official))
    assert list(cache.rglob(official.name))
    assert all(p.requires_grad for p in model.parameters())

    features: Any = timm.create_model(
        'dynamicvis_b',
        pretrained=True,
        img_size=96,
        features_only=True,
        out_indices=[1],
    )
    expected = weights_of(official, 96)
    kept = {n: t for n, t in expected.items() if n.startswith('layers.1.')}
    assert holds(features.model, kept | {'pos_embed': expected['pos_embed']})


def test_a_tag_chooses_the_file(hub: Hub, tmp_path: Path) -> None:
    path = save(tmp_path / 'last.pth')
    hub.files[LAST.meta['hf_repo'], LAST.meta['ckpt_file']] = path.read_bytes()
    model = timm.create_model(
        'dynamicvis_b.fmow_epoch_200', pretrained=True, img_size=64
    )
    assert holds(model, weights_of(path))


def test_both_names_of_a_file_of_arch_l_are_tried(hub: Hub, tmp_path: Path) -> None:
    path = save(tmp_path / 'large.pth', 'l')
    cfg = timm.models.get_pretrained_cfg('dynamicvis_l')
    assert cfg is not None
    second = 'pretrain_dynamicvis_l_bf16_mamba/best_single-label_f1-score_epoch_150.pth'
    hub.files[str(cfg.hf_hub_id), second] = path.read_bytes()
    model = timm.create_model('dynamicvis_l', pretrained=True, img_size=64)
    assert holds(model, weights_of(path))


def test_weights_from_elsewhere(hub: Hub, tmp_path: Path) -> None:
    path = tmp_path / 'dynamicvis_b_wo_token.pth'
    torch.save(DynamicVis(img_size=64).state_dict(), path)
    overlay: dict[str, Any] = {'file': str(path)}
    model: Any = timm.create_model(
        'dynamicvis_b', pretrained=True, img_size=64, pretrained_cfg_overlay=overlay
    )
    assert holds(model, weights_of(path))
    # As everywhere, what decides the features follows the checkpoint.
    assert model.settings['spatial_token_keep_ratios'] == [1, 1, 1, 1]
    assert hub.requests == []
    save_for_hf(model, tmp_path / 'saved')
    again: Any = timm.create_model(f'local-dir:{tmp_path / "saved"}', pretrained=True)
    assert again.settings == model.settings

    hub.files['me/mine', 'own.pth'] = path.read_bytes()
    overlay = {'hf_hub_id': 'me/mine@main', 'hf_hub_filename': 'own.pth'}
    model = timm.create_model(
        'dynamicvis_b', pretrained=True, img_size=64, pretrained_cfg_overlay=overlay
    )
    assert holds(model, weights_of(path))


def test_weights_that_do_not_fit_are_refused(hub: Hub, official: Path) -> None:
    overlay = {'file': str(official)}
    with pytest.raises(CheckpointError, match="file is of arch 'b'"):
        timm.create_model(
            'dynamicvis_l', pretrained=True, pretrained_cfg_overlay=overlay
        )
    with pytest.raises(CheckpointError, match='hf_hub_filename=None: give'):
        timm.create_model(
            'dynamicvis_b',
            pretrained=True,
            pretrained_cfg_overlay={'hf_hub_filename': None},
        )
    with pytest.raises(CheckpointError, match='no such file'):
        timm.create_model('dynamicvis_b.fmow_epoch_200', pretrained=True)


@pytest.mark.parametrize('bands', [1, 4])
def test_other_bands_take_the_weights_as_timm_does(
    hub: Hub, official: Path, bands: int
) -> None:
    model = timm.create_model(
        'dynamicvis_b', pretrained=True, in_chans=bands, img_size=64, num_classes=2
    )
    tensors = weights_of(official)
    tensors[FIRST] = adapt_input_conv(bands, tensors[FIRST])
    assert holds(model, tensors)
    model(torch.rand(1, bands, 64, 64)).sum().backward()
    assert without_gradient(model) == []


def test_a_trained_model_is_loaded_again(tmp_path: Path) -> None:
    made = {'img_size': 64, 'num_classes': 2}
    model = timm.create_model('dynamicvis_b', **made)
    torch.save(model.state_dict(), tmp_path / 'trained.pth')
    again = timm.create_model(
        'dynamicvis_b', checkpoint_path=tmp_path / 'trained.pth', **made
    )
    assert holds(again, model.state_dict())

    overlay = {'file': str(tmp_path / 'trained.pth')}
    again = timm.create_model(
        'dynamicvis_b', pretrained=True, pretrained_cfg_overlay=overlay, **made
    )
    assert holds(again, model.state_dict())

    save_for_hf(model, tmp_path / 'saved')
    again = timm.create_model(f'local-dir:{tmp_path / "saved"}', pretrained=True)
    assert again.num_classes == 2
    assert holds(again, model.state_dict())


def test_the_module_may_be_loaded_anew() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        importlib.reload(ours)
    assert timm.list_models('dynamicvis*') == ['dynamicvis_b', 'dynamicvis_l']


def test_a_model_of_another_is_not_replaced() -> None:
    def dynamicvis_b(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return nn.Identity()

    build = timm.models.model_entrypoint('dynamicvis_b')
    with pytest.warns(UserWarning, match='Overwriting dynamicvis_b'):
        timm.models.register_model(dynamicvis_b)
    try:
        with pytest.raises(SpecError, match=f'already, of {__name__}'):
            importlib.reload(ours)
        assert isinstance(timm.create_model('dynamicvis_b'), nn.Identity)
    finally:
        with warnings.catch_warnings(action='ignore'):
            timm.models.register_model(build)


def fit_one_batch(task: Any) -> list[str]:
    """Train; give the names of the parameters that are as before."""
    before = {n: p.clone() for n, p in task.model.named_parameters()}
    trainer = Trainer(
        fast_dev_run=True,
        accelerator='cpu',
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, DataLoader(SCENES, batch_size=2), DataLoader(SCENES, 2))
    after = dict(task.model.named_parameters())
    return [name for name, p in before.items() if torch.equal(p, after[name])]


def test_classification_of_torchgeo_learns(hub: Hub, official: Path) -> None:
    task = Classification(model='dynamicvis_b', weights=BEST, num_classes=3)
    # TorchGeo loads what fits and says nothing of the rest.
    assert holds(task.model, weights_of(official, 512))
    assert fit_one_batch(task) == []


def test_classification_of_torchgeo_with_other_options(
    hub: Hub, official: Path
) -> None:
    task = Classification(
        model='dynamicvis_b',
        weights=True,
        in_channels=4,
        num_classes=3,
        freeze_backbone=True,
    )
    tensors = weights_of(official, 512)
    tensors[FIRST] = adapt_input_conv(4, tensors[FIRST])
    assert holds(task.model, tensors)
    learning = [n for n, p in task.model.named_parameters() if p.requires_grad]
    assert learning == ['head.weight', 'head.bias']


@pytest.mark.filterwarnings('ignore:For .tu-. .timm universal')
def test_segmentation_of_torchgeo_learns(hub: Hub, official: Path) -> None:
    task = SemanticSegmentation(
        model='upernet',
        backbone='tu-dynamicvis_b',
        weights=True,
        task='multiclass',
        num_classes=3,
    )
    assert holds(task.model.encoder.model.model, weights_of(official, 512))
    assert fit_one_batch(task) == []


@pytest.mark.parametrize('decoder', [smp.FPN, smp.UPerNet, smp.Unet])
def test_segmentation_models_learn(decoder: Any) -> None:
    model = decoder(
        encoder_name='tu-dynamicvis_b', encoder_weights=None, classes=3, img_size=64
    )
    maps = model(torch.rand(2, 3, 64, 64))
    assert maps.shape == (2, 3, 64, 64)
    maps.square().sum().backward()
    assert without_gradient(model) == []
