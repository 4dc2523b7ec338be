import hashlib
import json
import os
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from dynamicvis_geo.errors import CheckpointError, SpecError
from dynamicvis_geo.models.checkpoint import convert
from dynamicvis_geo.models.config import BackboneConfig
from dynamicvis_geo.models.dynamicvis import DynamicVis
from dynamicvis_geo.models.weights import (
    DynamicVis_B_Weights,
    DynamicVis_L_Weights,
    dynamicvis_b,
    dynamicvis_l,
    fetch_checkpoint,
    load_backbone,
)
from tests.models.checkpoints import (
    make_checkpoint,
    mmengine_content,
    official_state_dict,
    save_mmengine,
)
from tests.models.hub import COMMIT, Hub, serve_hub

pytestmark = pytest.mark.once

REPO = 'KyanChen/DynamicVis'
FILE = 'pretrain_dynamicvis_b_bf16_mamba_best_single-label_f1-score_epoch_170.pth'
SMALL = BackboneConfig(img_size=64)


@pytest.fixture(scope='module', autouse=True)
def one_thread() -> Iterator[None]:
    # Many small operations: threads only wait for each other, on a busy machine long.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope='module')
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp('ckpt') / FILE)


@pytest.fixture
def hub(
    official: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Hub]:
    """A server with the official repository's layout, and an empty cache."""
    monkeypatch.setattr(time, 'sleep', lambda seconds: None)  # between its retries
    with serve_hub(monkeypatch, tmp_path / 'hf') as server:
        server.files[REPO, FILE] = official.read_bytes()
        yield server


def test_official_weights_are_fetched_and_loaded(hub: Hub, official: Path) -> None:
    backbone, provenance = load_backbone(SMALL)

    assert isinstance(backbone, DynamicVis)
    assert not backbone.training
    assert not any(p.requires_grad for p in backbone.parameters())
    expected = official_state_dict()
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, expected[name])
    (features,) = backbone(torch.zeros(1, 3, 64, 64))
    assert features.shape == (1, 768, 2, 2)

    assert json.loads(json.dumps(provenance)) == provenance
    values = torch.cat([p.flatten() for p in backbone.parameters()]).double()
    statistics = provenance.pop('parameters')
    assert statistics['count'] == values.numel()
    assert statistics['mean'] == pytest.approx(float(values.mean()))
    assert statistics['std'] == pytest.approx(float(values.std(correction=0)))
    assert statistics['absmax'] == pytest.approx(float(values.abs().max()))
    assert provenance.pop('training')['epoch'] == 170
    assert provenance.pop('trained_settings')['path_type'] == 'forward_reverse_mean'
    assert provenance.pop('settings') == backbone.settings
    assert provenance == {
        'weights': 'pretrained',
        'repository': REPO,
        'file': FILE,
        'revision': COMMIT,
        'sha256': hashlib.sha256(official.read_bytes()).hexdigest(),
        'loaded_keys': 311,
        'ignored_keys': 6,
        'missing_keys': 0,
        'stored_dtypes': {'float32': 311},
        'trained_img_size': [64, 64],
        'arch': 'b',
        'path_type': 'forward_reverse_mean',
        'sampling_scale': 0.1,
        'mamba2': False,
        'img_size': [64, 64],
        'implementation': 'native',
        'feature_kind': 'featmap',
        'scan': 'auto',
        'dtype': 'float32',
    }


def test_cached_file_needs_no_server(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fetch_checkpoint(REPO, FILE)
    hub.requests.clear()
    assert fetch_checkpoint(REPO, FILE, COMMIT) == path
    assert hub.requests == []  # a commit cannot change
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    assert fetch_checkpoint(REPO, FILE) == path
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setenv('HF_ENDPOINT', f'http://127.0.0.1:{_unused_port()}')
    assert fetch_checkpoint(REPO, FILE) == path


def _unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return int(probe.getsockname()[1])


def _error(config: BackboneConfig) -> str:
    with pytest.raises(CheckpointError) as info:
        load_backbone(config)
    assert '\n' not in str(info.value)
    return str(info.value)


@pytest.mark.parametrize(
    ('change', 'parts'),
    [
        (
            {'hf_repo': 'KyanChen/Nothing'},
            ('of KyanChen/Nothing', 'Repository Not Found', 'correct hf_repo'),
        ),
        (
            {'ckpt_file': 'dynamicvis_b_none.pth'},
            ('dynamicvis_b_none.pth of KyanChen', 'no such file', f'holds {FILE}:'),
        ),
        (
            {'revision': 'v9'},
            ("at revision 'v9'", 'Invalid rev id: v9', '/commits'),
        ),
        ({'hf_repo': 'a/b/c'}, ('of a/b/c', "give hf_repo as 'owner/name'")),
        ({'hf_repo': 'gated/repo'}, ('gated/repo is restricted', 'hf auth login')),
    ],
)
def test_wrong_source_says_what_from_where_and_what_to_do(
    hub: Hub, change: dict[str, Any], parts: tuple[str, ...]
) -> None:
    hub.gated.add('gated/repo')
    message = _error(replace(SMALL, **change))
    assert f'from {hub.url}' in message
    for part in parts:
        assert part in message


def test_offline_without_a_cached_file(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('HF_ENDPOINT', f'http://127.0.0.1:{_unused_port()}')
    message = _error(SMALL)
    assert f'{FILE} of {REPO}' in message
    assert 'cannot find the requested files in the local cache' in message
    assert 'refused' in message
    assert 'local file by checkpoint' in message
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    assert 'go online once without HF_HUB_OFFLINE, or' in _error(SMALL)


@pytest.mark.parametrize(
    ('status', 'remedy'),
    [(401, 'hf auth login'), (403, 'hf auth login'), (503, 'go online')],
)
def test_server_that_refuses(hub: Hub, status: int, remedy: str) -> None:
    hub.failing = status
    message = _error(SMALL)
    assert f'{FILE} of {REPO}' in message
    assert str(status) in message
    assert remedy in message


def test_truncated_download_is_not_kept(hub: Hub, tmp_path: Path) -> None:
    hub.cut = 1000
    message = _error(SMALL)
    assert f'{FILE} of {REPO}' in message
    assert 'size' in message
    assert 'run it again' in message
    assert not list((tmp_path / 'hf').glob('*/snapshots/*/*'))
    hub.cut = None
    assert fetch_checkpoint(REPO, FILE).stat().st_size == len(hub.files[REPO, FILE])


def test_sha256_of_the_configuration_is_enforced(official: Path) -> None:
    digest = hashlib.sha256(official.read_bytes()).hexdigest()
    load_backbone(replace(SMALL, checkpoint=official, sha256=digest))
    message = _error(replace(SMALL, checkpoint=official, sha256='0' * 64))
    assert digest in message
    assert '0' * 64 in message


def test_environment_of_a_fresh_process(hub: Hub, tmp_path: Path) -> None:
    # The variables as users set them, before anything is imported.
    env = os.environ | {
        'HF_HOME': str(tmp_path / 'home'),
        'RS_EMBED_DYNAMICVIS_HF_REPO': 'me/mine',
        'RS_EMBED_DYNAMICVIS_CKPT_FILE': 'my_b_weights.pth',
        'OMP_NUM_THREADS': '1',
    }
    hub.files['me/mine', 'my_b_weights.pth'] = hub.files[REPO, FILE]
    code = (
        'from dynamicvis_geo.models.config import BackboneConfig\n'
        'from dynamicvis_geo.models.weights import fetch_checkpoint\n'
        'c = BackboneConfig.from_env()\n'
        'print(fetch_checkpoint(c.hf_repo, c.ckpt_file, c.revision))\n'
    )
    run = subprocess.run(
        [sys.executable, '-c', code],
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    path = Path(run.stdout.strip())
    assert path.is_relative_to(tmp_path / 'home')
    assert path.read_bytes() == hub.files[REPO, FILE]


# --- arch l, whose names of files are inferred


@pytest.fixture(scope='module')
def large(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp('ckpt') / 'l.pth'
    return make_checkpoint(path, 'l').read_bytes()


L = 'pretrain_dynamicvis_l_bf16_mamba'
BEST_L = 'best_single-label_f1-score_epoch_150.pth'


@pytest.mark.parametrize('name', [f'{L}_{BEST_L}', f'{L}/{BEST_L}'])
def test_large_weights_are_found_under_either_name(
    hub: Hub, large: bytes, name: str
) -> None:
    hub.files[REPO, name] = large
    found = DynamicVis_L_Weights.FMOW_EPOCH_150.get_state_dict()
    assert torch.equal(found['pos_embed'], official_state_dict('l')['pos_embed'])
    with pytest.raises(CheckpointError, match=rf'no such file.*holds .*{name}'):
        DynamicVis_L_Weights.FMOW_EPOCH_200.get_state_dict()


def test_large_by_its_arch_alone_is_the_first_of_its_files(
    hub: Hub, large: bytes
) -> None:
    config = replace(SMALL, arch='l')
    message = _error(config)
    assert f'{L}_{BEST_L} or {L}/{BEST_L} or {L}_epoch_200.pth' in message
    assert f'the repository holds {FILE}: give one of these as ckpt_file' in message
    hub.files[REPO, f'{L}_epoch_200.pth'] = large
    provenance = load_backbone(config)[1]
    assert (provenance['arch'], provenance['file']) == ('l', f'{L}_epoch_200.pth')
    hub.files[REPO, f'{L}/{BEST_L}'] = large
    provenance = load_backbone(config)[1]
    assert (provenance['revision'], provenance['file']) == (COMMIT, f'{L}/{BEST_L}')


def test_what_lies_in_the_cache_is_taken_when_there_is_no_server(
    hub: Hub, large: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(SMALL, arch='l')
    hub.files[REPO, f'{L}_epoch_200.pth'] = large
    fetch_checkpoint(REPO, f'{L}_epoch_200.pth')
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    assert load_backbone(config)[1]['file'] == f'{L}_epoch_200.pth'


def test_repository_that_cannot_be_listed(hub: Hub) -> None:
    hub.unlisted = True
    message = _error(replace(SMALL, ckpt_file='dynamicvis_b_none.pth'))
    assert f'take one of {hub.url}/{REPO}/tree/main as ckpt_file' in message


# --- local files


def test_local_file_of_another_image_size(official: Path) -> None:
    config = BackboneConfig(checkpoint=official, img_size=96)
    backbone, provenance = load_backbone(config)
    assert backbone(torch.zeros(1, 3, 96, 96))[0].shape == (1, 768, 3, 3)
    assert provenance['img_size'] == [96, 96]
    assert provenance['trained_img_size'] == [64, 64]
    assert provenance['repository'] is None
    assert provenance['revision'] is None
    assert provenance['file'] == FILE


def test_converted_file_gives_the_same_backbone(official: Path, tmp_path: Path) -> None:
    converted = convert(official, tmp_path / 'x.safetensors')
    x = torch.rand(1, 3, 64, 64)
    (expected,) = load_backbone(replace(SMALL, checkpoint=official))[0](x)
    backbone, provenance = load_backbone(replace(SMALL, checkpoint=converted))
    torch.testing.assert_close(backbone(x)[0], expected, rtol=0, atol=0)
    assert provenance['training']['source'] == FILE


def test_loading_large_and_telling_it_by_content(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / 'epoch_200.pth', 'l')
    backbone, provenance = load_backbone(replace(SMALL, checkpoint=path))
    assert provenance['arch'] == 'l'
    assert provenance['loaded_keys'] == 487
    assert backbone(torch.zeros(1, 3, 64, 64))[0].shape == (1, 1024, 2, 2)


def test_arch_that_contradicts_the_content(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / 'dynamicvis_l_x.pth', stages=1)
    config = replace(SMALL, checkpoint=path)
    message = _error(config)
    assert "holds arch 'b', but the name of the file says 'l'" in message
    assert "give arch='b'" in message
    renamed = path.rename(tmp_path / 'dynamicvis_b_x.pth')
    message = _error(replace(config, checkpoint=renamed, arch='l'))
    assert "holds arch 'b', but the configuration says 'l'" in message


def test_argument_overrules_a_misleading_name(official: Path, tmp_path: Path) -> None:
    path = tmp_path / 'dynamicvis_l_x.pth'
    path.symlink_to(official)
    config = replace(SMALL, checkpoint=path, arch='b')
    assert load_backbone(config)[1]['arch'] == 'b'


@pytest.mark.parametrize(
    ('made', 'asked', 'message'),
    [
        ({'mamba2': True}, {}, 'has mamba2=True, but mamba2=False'),
        ({}, {'mamba2': True}, 'has mamba2=False, but mamba2=True'),
        ({'gates': 2}, {}, 'made with forward_reverse_gate, but'),
        ({}, {'path_type': 'forward_reverse_gate'}, 'path_type without gates'),
        (
            {'gates': 2},
            {'path_type': 'forward_reverse_shuffle_gate'},
            'made with forward_reverse_gate, but',
        ),
    ],
)
def test_settings_that_contradict_the_content(
    tmp_path: Path, made: dict[str, Any], asked: dict[str, Any], message: str
) -> None:
    path = make_checkpoint(tmp_path / 'x.pth', stages=1, **made)
    assert message in _error(replace(SMALL, checkpoint=path, **asked))


def test_gates_and_mamba2_load_when_asked_for(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / 'x.pth', mamba2=True, gates=2)
    config = replace(
        SMALL, checkpoint=path, mamba2=True, path_type='forward_reverse_gate'
    )
    with pytest.warns(
        UserWarning, match="trained with path_type='forward_reverse_mean'"
    ):
        _, provenance = load_backbone(config)
    assert provenance['mamba2']
    assert provenance['path_type'] == 'forward_reverse_gate'


def test_model_without_token_selection_runs_as_it_was_trained(
    official: Path, tmp_path: Path
) -> None:
    content = mmengine_content(official_state_dict())
    content['meta']['cfg'] = (
        content['meta']['cfg']
        .replace('[8, 4, 2, 1]', '[1, 1, 1, 1]')
        .replace('is_softmax_on_x=True', 'is_softmax_on_x=False')
        .replace("pos='head'", "pos='none'")
    )
    path = save_mmengine(tmp_path / 'x.pth', content)
    backbone, provenance = load_backbone(replace(SMALL, checkpoint=path))
    assert provenance['trained_settings']['spatial_token_keep_ratios'] == [1, 1, 1, 1]

    reference = DynamicVis(
        img_size=64,
        spatial_token_keep_ratios=[1, 1, 1, 1],
        is_softmax_on_x=False,
        global_token_cfg={'pos': 'none', 'num': -1},
    ).eval()
    reference.load_state_dict(backbone.state_dict())
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(backbone(x), reference(x), rtol=0, atol=0)


@pytest.mark.parametrize('ratios', ['5', '[8, 4]', "['a', 4, 2, 1]"])
def test_settings_of_the_file_that_cannot_be_built(tmp_path: Path, ratios: str) -> None:
    content = mmengine_content(official_state_dict(stages=1))
    content['meta']['cfg'] = content['meta']['cfg'].replace('[8, 4, 2, 1]', ratios)
    path = save_mmengine(tmp_path / 'x.pth', content)
    message = _error(replace(SMALL, checkpoint=path))
    assert f'{path} was trained with settings of which no backbone can be built' in (
        message
    )
    assert 'spatial_token_keep_ratios' in message


def test_loading_is_silent_and_leaves_the_global_generator_alone(
    official: Path,
) -> None:
    torch.manual_seed(5)
    expected_draw = torch.rand(3)
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        load_backbone(replace(SMALL, checkpoint=official))
    assert torch.equal(torch.rand(3), expected_draw)


# --- random weights


def test_random_weights_are_the_same_each_time_and_said() -> None:
    config = replace(SMALL, weights='random')
    torch.manual_seed(5)
    expected_draw = torch.rand(3)
    torch.manual_seed(5)
    with pytest.warns(UserWarning, match='untrained') as caught:
        first, provenance = load_backbone(config)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert torch.equal(torch.rand(3), expected_draw)
    torch.manual_seed(6)
    with pytest.warns(UserWarning, match='untrained'):
        second, _ = load_backbone(config)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])
    assert provenance['weights'] == 'random'
    assert provenance['seed'] == 0
    assert 'repository' not in provenance
    json.dumps(provenance)


def test_random_weights_of_unknown_arch() -> None:
    with pytest.raises(SpecError, match=r"weights.pth: give arch='b' or arch='l'"):
        load_backbone(replace(SMALL, weights='random', ckpt_file='weights.pth'))


# --- the way of torchvision and TorchGeo


def test_factories_without_weights() -> None:
    assert dynamicvis_b(img_size=64).arch == 'b'
    large = dynamicvis_l(img_size=64, out_indices=(0, 3))
    assert large.arch == 'l'
    assert large.out_indices == (0, 3)
    assert large.training
    assert all(p.requires_grad for p in large.parameters())


def test_factory_with_weights(hub: Hub) -> None:
    weights = DynamicVis_B_Weights.FMOW_EPOCH_170
    model = dynamicvis_b(weights=weights, img_size=64)
    assert all(p.requires_grad for p in model.parameters())
    expected = official_state_dict()
    assert torch.equal(model.state_dict()['pos_embed'], expected['pos_embed'])
    assert weights.get_state_dict(progress=False).keys() == expected.keys()
    assert {path.split('/resolve/main/')[1] for _, path in hub.requests} == {FILE}


def test_factory_refuses_what_does_not_fit(hub: Hub, tmp_path: Path) -> None:
    content = mmengine_content(official_state_dict())
    del content['state_dict']['backbone.layers.3.2.bias']
    path = save_mmengine(tmp_path / 'x.pth', content)
    hub.files[REPO, FILE] = path.read_bytes()
    with pytest.raises(CheckpointError, match=r'1 missing: layers\.3\.2\.bias'):
        dynamicvis_b(weights=DynamicVis_B_Weights.FMOW_EPOCH_170, img_size=64)
    with pytest.raises(TypeError, match='DynamicVis_L_Weights'):
        dynamicvis_l(weights=DynamicVis_B_Weights.FMOW_EPOCH_170)  # type: ignore[arg-type]


def test_weights_describe_themselves() -> None:
    for weights in DynamicVis_B_Weights:
        name = weights.meta['ckpt_file']
        assert weights.url == f'https://huggingface.co/{REPO}/resolve/main/{name}'
        assert weights.meta['model'] == 'DynamicVis-B'
        assert BackboneConfig(ckpt_file=name).named_arch == 'b'
        image = weights.transforms(torch.full((1, 3, 40, 40), 5000.0))
        assert image.shape == (1, 3, 512, 512)
        assert DynamicVis_B_Weights.verify(str(weights)) is weights
        assert not weights.meta['name_is_inferred']
    assert len(DynamicVis_L_Weights) == 2
    for weights in DynamicVis_L_Weights:
        assert weights.meta['model'] == 'DynamicVis-L'
        assert weights.meta['name_is_inferred']
        for name in weights.meta['ckpt_files']:
            assert BackboneConfig(ckpt_file=name, arch='l').named_arch == 'l'


@pytest.mark.usefixtures('shallow')
@pytest.mark.filterwarnings('ignore:weights=.random')
def test_kernel_of_the_scan_reaches_the_backbone() -> None:
    config = BackboneConfig(weights='random', img_size=64, scan='torch')
    backbone, provenance = load_backbone(config)
    assert isinstance(backbone, DynamicVis)
    assert backbone.scan == 'torch'
    assert provenance['scan'] == 'torch'


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_kernel_of_the_scan_that_is_not_here_is_refused() -> None:
    with pytest.raises(SpecError, match=r"scan='triton'.*install"):
        load_backbone(BackboneConfig(weights='random', scan='triton'))


@pytest.mark.parametrize('weights', [*DynamicVis_B_Weights, *DynamicVis_L_Weights])
def test_members_say_what_those_of_torchgeo_say(weights: Any) -> None:
    assert {
        'bands',
        'dataset',
        'in_chans',
        'license',
        'model',
        'publication',
        'repo',
        'ssl_method',
    } <= weights.meta.keys()
    assert weights.meta['in_chans'] == len(weights.meta['bands']) == 3
    sample = {'image': torch.full((3, 8, 8), 5000), 'mask': torch.eye(8)}
    got = weights.transforms(sample)
    side = weights.meta['img_size']
    assert got['image'].shape == (3, side, side)
    assert got['mask'].shape == (side, side)
    assert torch.equal(weights.transforms(sample['image']), got['image'])
