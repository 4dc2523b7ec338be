import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any

import pytest

from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.models import config as config_module
from dynamicvis_geo.models.config import (
    PATH_TYPES,
    BackboneConfig,
    arch_of_name,
    sources,
)
from dynamicvis_geo.models.mamba import PATH_TYPES as NATIVE_PATH_TYPES

PREFIX = 'RS_EMBED_DYNAMICVIS_'
OFFICIAL = 'pretrain_dynamicvis_b_bf16_mamba_best_single-label_f1-score_epoch_170.pth'


def test_defaults_are_the_official_model() -> None:
    config = BackboneConfig()
    assert config.hf_repo == 'KyanChen/DynamicVis'
    assert config.ckpt_file == OFFICIAL
    assert config.img_size == 512
    assert config.path_type == 'forward_reverse_mean'
    assert config.sampling_scale == 0.1
    assert config.repo_commit == '0bfe96f471af4ddf1c41ae596c468ce40502b67a'
    assert config.named_arch == 'b'
    assert config.weights == 'pretrained'
    assert BackboneConfig.from_env({}) == config
    assert PATH_TYPES == NATIVE_PATH_TYPES


def test_values_are_brought_into_one_form() -> None:
    config = BackboneConfig(
        checkpoint='~/x.pth',  # type: ignore[arg-type]
        repo_path='code',  # type: ignore[arg-type]
        arch='large',
        img_size=[64, 64],  # type: ignore[arg-type]
    )
    assert config.checkpoint == Path.home() / 'x.pth'
    assert config.repo_path == Path('code')
    assert config.repo_cache == Path.home() / '.cache/rs_embed/dynamicvis'
    assert config.arch == 'l'
    assert config.img_size == 64
    assert BackboneConfig(img_size=(64, 96)).img_size == (64, 96)
    assert replace(config, arch='base').arch == 'b'
    with pytest.raises(FrozenInstanceError):
        config.arch = 'b'  # type: ignore[misc]


@pytest.mark.parametrize(
    ('name', 'value', 'choices'),
    [
        ('arch', 'xl', 'auto, b, base, l, large'),
        ('weights', 'none', 'pretrained, random'),
        ('path_type', 'backward', 'forward, forward_reverse_mean'),
        ('implementation', 'official', 'native, upstream'),
        ('scan', 'cuda', 'auto, torch, c, triton'),
        ('img_size', 0, 'number of pixels, 16 to 16384'),
        ('img_size', '512', 'number of pixels'),
        ('img_size', (64, 64, 64), r'\(height, width\)'),
        ('img_size', True, 'number of pixels'),
        ('sampling_scale', -1, '0 or more'),
        ('sampling_scale', float('nan'), '0 or more'),
        ('sampling_scale', {'type': 'other', 'val': 0.1}, "'fixed' or 'decay'"),
        ('sampling_scale', {'type': 'fixed'}, 'such as'),
        ('mamba2', 1, 'True or False'),
        ('auto_download_repo', 'yes', 'True or False'),
        ('fetch_workers', 0, '1 or more'),
        ('sha256', 'abc', '64 hexadecimal digits'),
        ('hf_repo', '', 'not empty'),
        ('ckpt_file', None, 'not empty'),
        ('checkpoint', 3, 'must be a path'),
        ('repo_cache', None, 'must be a path'),
    ],
)
def test_bad_values_are_named(name: str, value: Any, choices: str) -> None:
    with pytest.raises(SpecError, match=choices) as info:
        BackboneConfig(**{name: value})
    assert str(info.value).startswith(f'{name}={value!r} ')


@pytest.mark.parametrize('scale', [0, 1.5, {'type': 'decay', 'val': 0.1}])
def test_official_forms_of_the_sampling_scale(scale: Any) -> None:
    assert BackboneConfig(sampling_scale=scale).sampling_scale == scale


@pytest.mark.parametrize(
    ('variable', 'text', 'field', 'value'),
    [
        ('HF_REPO', 'me/mine', 'hf_repo', 'me/mine'),
        ('CKPT_FILE', ' x_l_y.pth ', 'ckpt_file', 'x_l_y.pth'),
        ('REPO_PATH', '/code', 'repo_path', Path('/code')),
        ('REPO_URL', 'git@host:x', 'repo_url', 'git@host:x'),
        ('REPO_CACHE', '~/c', 'repo_cache', Path.home() / 'c'),
        ('AUTO_DOWNLOAD_REPO', '0', 'auto_download_repo', False),
        ('AUTO_DOWNLOAD_REPO', 'False', 'auto_download_repo', False),
        ('IMG', '224', 'img_size', 224),
        ('ARCH', 'Large', 'arch', 'l'),
        ('PATH_TYPE', 'forward', 'path_type', 'forward'),
        ('SAMPLING_SCALE', '0.5', 'sampling_scale', 0.5),
        ('MAMBA2', 'true', 'mamba2', True),
        ('FETCH_WORKERS', '3', 'fetch_workers', 3),
    ],
)
def test_environment_variables(
    monkeypatch: pytest.MonkeyPatch, variable: str, text: str, field: str, value: Any
) -> None:
    monkeypatch.setenv(PREFIX + variable, text)
    config = BackboneConfig.from_env()
    assert config == replace(BackboneConfig(), **{field: value})
    origin = sources()
    assert origin.pop(field) == PREFIX + variable
    assert set(origin.values()) == {'default'}


@pytest.mark.parametrize(
    ('variable', 'text', 'message'),
    [
        ('IMG', 'big', 'give a whole number'),
        ('IMG', '-1', 'img_size=-1 .*16 to'),
        ('ARCH', 'x', "arch='x' is unknown: choose one of auto"),
        ('MAMBA2', 'maybe', "'maybe': give 1 or 0"),
        ('SAMPLING_SCALE', 'much', 'give a number'),
        ('FETCH_WORKERS', '0', '1 or more'),
    ],
)
def test_bad_environment_variables_are_named(
    variable: str, text: str, message: str
) -> None:
    with pytest.raises(SpecError, match=message) as info:
        BackboneConfig.from_env({PREFIX + variable: text})
    assert f'environment variable {PREFIX}{variable}: ' in str(info.value)


def test_arguments_come_before_the_environment() -> None:
    environ = {PREFIX + 'IMG': 'nonsense', PREFIX + 'ARCH': 'l', PREFIX + 'MAMBA2': ''}
    config = BackboneConfig.from_env(environ, img_size=64)
    assert (config.img_size, config.arch, config.mamba2) == (64, 'l', False)
    origin = sources(['img_size'], environ)
    assert list(origin) == [field.name for field in fields(BackboneConfig)]
    assert origin['img_size'] == 'argument'
    assert origin['arch'] == PREFIX + 'ARCH'
    assert origin['mamba2'] == origin['scan'] == 'default'


@pytest.mark.parametrize(
    ('name', 'arch'),
    [
        (OFFICIAL, 'b'),
        ('pretrain_dynamicvis_l_bf16_mamba_epoch_200.pth', 'l'),
        ('some/where_l_else/dynamicvis_b.safetensors', 'b'),
        ('my_l_model.pth', 'l'),
        ('dynamicvis_b_l_mixed.pth', 'b'),
        ('x_b_x_l_x.pth', None),
        ('epoch_170.pth', None),
        ('model_b.pth', None),
    ],
)
def test_arch_of_a_file_name(name: str, arch: str | None) -> None:
    assert arch_of_name(name) == arch


def test_arch_argument_comes_before_the_name() -> None:
    assert BackboneConfig(arch='l').named_arch == 'l'
    local = BackboneConfig(checkpoint=Path('epoch_170.pth'))
    assert local.named_arch is None


def test_configuration_needs_no_pytorch() -> None:
    code = (
        'import importlib.util, sys\n'
        f'path = {config_module.__file__!r}\n'
        'spec = importlib.util.spec_from_file_location("c", path)\n'
        'module = importlib.util.module_from_spec(spec)\n'
        'sys.modules["c"] = module\n'
        'spec.loader.exec_module(module)\n'
        'module.BackboneConfig.from_env()\n'
        'assert "torch" not in sys.modules and "numpy" not in sys.modules\n'
    )
    subprocess.run([sys.executable, '-c', code], check=True)


def test_fetching_is_no_matter_of_the_backbone() -> None:
    config = BackboneConfig(fetch_workers=2)
    assert config == BackboneConfig()
    assert 'fetch_workers' not in config.model_arguments('b', {'fetch_workers': 2})
