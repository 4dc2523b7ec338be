import builtins
import json
import os
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from dynamicvis_geo.errors import CheckpointError, OutputError
from dynamicvis_geo.models.checkpoint import (
    WITHOUT_TOKEN_SELECTION,
    convert,
    load_into,
    read_checkpoint,
)
from dynamicvis_geo.models.dynamicvis import DynamicVis
from tests.models.checkpoints import (
    RunsOnLoading,
    make_checkpoint,
    mmengine_content,
    official_state_dict,
    reach_for_builtins,
    save_mmengine,
    save_pickle_in_archive,
)


@pytest.fixture(scope='module', autouse=True)
def one_thread() -> Iterator[None]:
    # Many small operations: threads only wait for each other, on a busy machine long.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def first_stage() -> dict[str, Tensor]:
    return official_state_dict(stages=1)


@pytest.fixture(scope='module')
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp('ckpt') / 'epoch_170.pth')


@pytest.fixture(scope='module')
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp('ckpt') / 'small.pth', stages=1)


@pytest.fixture(scope='module')
def model() -> DynamicVis:
    return DynamicVis(arch='b', img_size=64)


def test_official_layout_is_read_without_mmengine(official: Path) -> None:
    checkpoint = read_checkpoint(official)

    assert not any(name.startswith('mmengine') for name in sys.modules)
    expected = official_state_dict()
    assert list(checkpoint.state_dict) == list(expected)
    for name, tensor in checkpoint.state_dict.items():
        assert tensor.is_contiguous()
        assert torch.equal(tensor, expected[name])
    assert checkpoint.arch == 'b'
    assert checkpoint.img_size == (64, 64)
    assert not checkpoint.mamba2
    assert checkpoint.path_type is None
    assert checkpoint.ignored == {'pre_neck': 3, 'neck': 1, 'head': 2}
    assert set(checkpoint.sections) == {
        'meta', 'message_hub', 'optimizer', 'param_schedulers'
    }  # fmt: skip
    assert checkpoint.dtypes == {'float32': 311}
    assert checkpoint.meta['epoch'] == 170
    assert checkpoint.meta['mmengine_version'] == '0.10.7'
    assert '/home/somebody' not in json.dumps(checkpoint.meta)
    assert checkpoint.settings == {
        'arch': 'b',
        'global_token_cfg': {'num': -1, 'pos': 'head'},
        'img_size': 64,
        'is_softmax_on_x': True,
        'path_type': 'forward_reverse_mean',
        'sampling_scale': {'type': 'fixed', 'val': 0.1},
        'spatial_token_keep_ratios': [8, 4, 2, 1],
    }


@pytest.mark.parametrize('prefix', ['', 'backbone.'])
@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_plain_state_dicts_are_read(tmp_path: Path, prefix: str, suffix: str) -> None:
    path = tmp_path / f'weights{suffix}'
    expected = first_stage()
    tensors = {prefix + name: t.contiguous() for name, t in expected.items()}
    if suffix == '.pth':
        torch.save(tensors, path)
    else:
        safetensors.torch.save_file(tensors, path)

    checkpoint = read_checkpoint(path)

    assert checkpoint.state_dict.keys() == expected.keys()
    assert torch.equal(checkpoint.state_dict['pos_embed'], expected['pos_embed'])
    assert checkpoint.ignored == {}
    assert checkpoint.arch == 'b'


def test_files_of_old_pytorch_are_read(tmp_path: Path) -> None:
    path = tmp_path / 'old.pth'
    torch.save(
        {'state_dict': {f'backbone.{k}': v for k, v in first_stage().items()}},
        path,
        _use_new_zipfile_serialization=False,
    )
    assert read_checkpoint(path).state_dict.keys() == first_stage().keys()


def test_kind_of_backbone_is_read_from_the_tensors(tmp_path: Path) -> None:
    large = read_checkpoint(make_checkpoint(tmp_path / 'x.pth', 'l', 128))
    assert (large.arch, large.img_size, len(large.state_dict)) == ('l', (128, 128), 487)
    assert read_checkpoint(
        make_checkpoint(tmp_path / 'y.pth', mamba2=True, stages=1)
    ).mamba2
    for gates, name in (
        (2, 'forward_reverse_gate'),
        (3, 'forward_reverse_shuffle_gate'),
    ):
        path = make_checkpoint(tmp_path / 'z.pth', gates=gates, stages=1)
        assert read_checkpoint(path).path_type == name


def test_half_precision_is_widened_and_recorded(tmp_path: Path) -> None:
    path = tmp_path / 'half.pth'
    tensors = {k: v.bfloat16() for k, v in first_stage().items()}
    tensors['layers.0.2.bias'] = tensors['layers.0.2.bias'].double()
    torch.save(tensors, path)

    checkpoint = read_checkpoint(path)

    assert {t.dtype for t in checkpoint.state_dict.values()} == {torch.float32}
    assert torch.equal(checkpoint.state_dict['pos_embed'], tensors['pos_embed'].float())
    assert checkpoint.dtypes == {'bfloat16': len(tensors) - 1, 'float64': 1}


def test_models_without_token_selection_are_told_apart(tmp_path: Path) -> None:
    plain = tmp_path / 'dynamicvis_b_wo-token-selection_200-epoch.pth'
    torch.save(first_stage(), plain)
    assert read_checkpoint(plain).settings == WITHOUT_TOKEN_SELECTION

    content = mmengine_content(first_stage())
    content['meta']['cfg'] = content['meta']['cfg'].replace(
        '[8, 4, 2, 1]', '[1, 1, 1, 1]'
    )
    told = save_mmengine(tmp_path / 'renamed.pth', content)
    assert read_checkpoint(told).settings['spatial_token_keep_ratios'] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    'config',
    [
        'model = dict(',
        'x = 1',
        'backbone=f(arch="b")',
        '',
        'f(backbone=[1])',
        'f(backbone=dict(arch={[]: 1}))',
        'f(backbone=dict(img_size={1, 2}))',
        'f(backbone=dict(arch=' + '-' * 20000 + '1))',
        'f(backbone=dict(arch=' + '[' * 5000 + ']' * 5000 + '))',
        'arch = "\0"',
    ],
)
def test_unreadable_training_configuration_is_no_obstacle(
    tmp_path: Path, config: str
) -> None:
    content = mmengine_content(first_stage())
    content['meta']['cfg'] = config
    assert read_checkpoint(save_mmengine(tmp_path / 'x.pth', content)).settings == {}


@pytest.mark.parametrize('img_size', ["'big'", "['a', 'b']", '[1e999, 2]', '0'])
def test_image_size_that_is_none_is_not_taken(tmp_path: Path, img_size: str) -> None:
    content = mmengine_content(first_stage())
    content['meta']['cfg'] = f'f(backbone=dict(img_size={img_size}))'
    assert read_checkpoint(save_mmengine(tmp_path / 'x.pth', content)).img_size == (
        64,
        64,
    )


@pytest.mark.parametrize('metadata', [[1], {'': None}, {'': {'grid': 'ab'}}])
def test_odd_metadata_of_a_state_dict_is_no_obstacle(
    tmp_path: Path, metadata: object
) -> None:
    content = mmengine_content(first_stage())
    content['state_dict']._metadata = metadata
    assert read_checkpoint(save_mmengine(tmp_path / 'x.pth', content)).img_size == (
        64,
        64,
    )


# --- code in files


def _payloads(marker: Path) -> dict[str, object]:
    write = f'open({str(marker)!r}, "w").close()'
    return {
        'exec': RunsOnLoading(exec, write),
        'system': RunsOnLoading(os.system, f'touch "{marker}"'),
        'numpy': RunsOnLoading(np.save, str(marker), [1]),
        'partial': RunsOnLoading(builtins.map, RunsOnLoading(exec, write), []),
    }


@pytest.mark.parametrize('kind', ['exec', 'system', 'numpy', 'partial'])
@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
@pytest.mark.parametrize('layout', ['whole', 'message_hub', 'state_dict', 'pickle'])
def test_file_that_runs_code_is_refused(tmp_path: Path, kind: str, layout: str) -> None:
    marker = tmp_path / 'owned'
    path = tmp_path / 'evil.pth'
    payload = _payloads(marker)[kind]
    if layout == 'whole':
        torch.save(payload, path)
    elif layout == 'pickle':
        path.write_bytes(pickle.dumps(payload))
    else:
        content = mmengine_content(first_stage())
        content[layout]['backbone.extra'] = payload
        save_mmengine(path, content)

    with pytest.raises(
        CheckpointError, match=r'refused.*source that you trust'
    ) as info:
        read_checkpoint(path)

    assert str(path) in str(info.value)
    assert 'weights_only' not in str(info.value)
    assert not list(tmp_path.glob('owned*'))


def test_the_payload_would_work_elsewhere(tmp_path: Path) -> None:
    # Otherwise the test above could pass on files that are no danger.
    path = tmp_path / 'evil.pth'
    torch.save(_payloads(tmp_path / 'owned')['exec'], path)
    torch.load(path, weights_only=False)
    assert (tmp_path / 'owned').exists()


def test_getattr_cannot_be_used_to_reach_code(tmp_path: Path) -> None:
    marker = tmp_path / 'owned'
    pickled = reach_for_builtins(f'open({str(marker)!r}, "w").close()')
    path = save_pickle_in_archive(tmp_path / 'evil.pth', pickled)
    with pytest.raises(CheckpointError, match='refused'):
        read_checkpoint(path)
    assert not marker.exists()


def test_what_others_allow_on_loading_stays_theirs(tmp_path: Path) -> None:
    marker = tmp_path / 'owned'
    evil = tmp_path / 'evil.pth'
    torch.save(RunsOnLoading(exec, f'open({str(marker)!r}, "w").close()'), evil)
    good = make_checkpoint(tmp_path / 'good.pth', stages=1)
    with torch.serialization.safe_globals([np.ndarray, np.dtype, exec]):
        before = set(torch.serialization.get_safe_globals())
        with pytest.raises(CheckpointError, match='refused'):
            read_checkpoint(evil)
        assert read_checkpoint(good).arch == 'b'
        assert set(torch.serialization.get_safe_globals()) == before
    assert not marker.exists()


# --- files that are something else


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (b'', 'is empty: delete it and download it again'),
        (b'\n<!DOCTYPE html><html><body>404</body></html>', 'is a web page.*/resolve/'),
        (b'version https://git-lfs.github.com/spec/v1\noid sha256:0\n', 'git lfs pull'),
        (b'{"error": "Repository not found"}', 'neither a PyTorch nor a safetensors'),
        (b'\x89PNG\r\n\x1a\n0000', 'neither a PyTorch nor a safetensors'),
        (b'PK\x03\x04' + b'\0' * 100, 'is cut short .104 bytes.'),
        (b'\x80\x02garbage', 'damaged'),
        (b'\x10\0\0\0\0\0\0\0{"a"', 'damaged or cut short'),
    ],
)
def test_each_wrong_file_has_its_own_error(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / 'checkpoint.pth'
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as info:
        read_checkpoint(path)
    assert str(path) in str(info.value)
    assert '\n' not in str(info.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r'nowhere\.pth does not exist'):
        read_checkpoint(tmp_path / 'nowhere.pth')
    with pytest.raises(CheckpointError, match='is not a file'):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ({'epoch': 3, 'args': {}}, r'no state_dict \(it holds epoch, args\)'),
        ({'state_dict': {'head.a': torch.ones(1)}}, r"no 'backbone.' keys.*head: 1"),
        ({'state_dict': {}}, "no 'backbone.' keys .*none"),
        ({'backbone.conv1.weight': torch.ones(64, 3, 7, 7)}, 'no DynamicVis.*missing'),
        (
            {'backbone.layers.0.0.projection.weight': torch.ones(64, 3, 7, 7)},
            r'of arch b or l .*of shape \(64, 3, 7, 7\)',
        ),
        ([1, 2], 'holds a list'),
        (torch.ones(3), 'holds a Tensor'),
    ],
)
def test_checkpoints_of_something_else(
    tmp_path: Path, content: object, message: str
) -> None:
    path = tmp_path / 'other.pth'
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(path)


def test_nan_and_infinity_are_refused(tmp_path: Path) -> None:
    tensors = {k: v.clone() for k, v in first_stage().items()}
    tensors['layers.0.2.bias'][3] = float('nan')
    tensors['layers.0.2.weight'][0] = float('inf')
    path = tmp_path / 'nan.pth'
    torch.save(tensors, path)
    with pytest.raises(
        CheckpointError, match=r'2 tensors \(layers.0.2.weight, layers.0.2.bias\)'
    ):
        read_checkpoint(path)


@pytest.mark.filterwarnings('ignore')  # PyTorch's own, of sparse and nested tensors
@pytest.mark.parametrize(
    'tensor',
    [
        torch.ones(96, dtype=torch.complex64),
        torch.ones(96).to_sparse(),
        torch.ones(96, dtype=torch.int64),
        torch.ones(96, dtype=torch.bool),
        torch.ones(96, dtype=torch.uint16),
        torch.ones(96, device='meta'),
    ],
    ids=['complex', 'sparse', 'int64', 'bool', 'uint16', 'meta'],
)
@pytest.mark.parametrize('key', ['layers.0.2.bias', 'layers.0.0.projection.weight'])
def test_tensors_that_are_no_dense_numbers_are_refused(
    tmp_path: Path, tensor: Tensor, key: str
) -> None:
    path = tmp_path / 'x.pth'
    tensors = {k: v.contiguous() for k, v in first_stage().items()}
    torch.save(tensors | {key: tensor}, path)
    with pytest.raises(
        CheckpointError, match=f'no dense floating-point numbers.*{key}'
    ):
        read_checkpoint(path)


@pytest.mark.parametrize('name', ['settings', 'meta'])
@pytest.mark.parametrize('text', ['[1]', '5', '{', '[' * 100_000])
def test_odd_metadata_of_safetensors_is_refused(
    tmp_path: Path, name: str, text: str
) -> None:
    path = tmp_path / 'x.safetensors'
    tensors = {k: v.contiguous() for k, v in first_stage().items()}
    safetensors.torch.save_file(tensors, path, {name: text})
    with pytest.raises(CheckpointError, match='damaged'):
        read_checkpoint(path)


def test_damaged_compressed_archive_is_refused(small: Path, tmp_path: Path) -> None:
    path = tmp_path / 'compressed.pth'
    with (
        zipfile.ZipFile(small) as source,
        zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as target,
    ):
        for entry in source.namelist():
            target.writestr(entry, source.read(entry))
    whole = path.read_bytes()
    for start in range(200, 3000, 100):
        damaged = bytearray(whole)
        damaged[start : start + 20] = bytes(255 - byte for byte in whole[start:][:20])
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            read_checkpoint(path)


def test_every_truncation_is_noticed(small: Path, tmp_path: Path) -> None:
    whole = small.read_bytes()
    converted = convert(small, tmp_path / 'whole.safetensors').read_bytes()
    path = tmp_path / 'part'
    for content in (whole, converted):
        for part in (1, 5, 100, 1000, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:part])
            with pytest.raises(CheckpointError):
                read_checkpoint(path)


def test_damage_anywhere_is_noticed(small: Path, tmp_path: Path) -> None:
    whole = small.read_bytes()
    with zipfile.ZipFile(small) as archive:
        entries = [e for e in archive.infolist() if e.file_size]
    path = tmp_path / 'damaged.pth'
    for entry in entries:
        damaged = bytearray(whole)
        with small.open('rb') as file:
            file.seek(entry.header_offset + 26)  # lengths of the name and extra fields
            name, extra = struct.unpack('<HH', file.read(4))
        start = entry.header_offset + 30 + name + extra
        damaged[start + entry.file_size // 2] ^= 0xFF
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r'damaged.*wrong checksum'):
            read_checkpoint(path)


def test_sha256_is_enforced(small: Path) -> None:
    digest = read_checkpoint(small).sha256
    assert read_checkpoint(small, sha256=digest.upper()).sha256 == digest
    with pytest.raises(CheckpointError, match=f'has SHA-256 {digest}, but'):
        read_checkpoint(small, sha256='0' * 64)


# --- convert


def test_convert_keeps_tensors_and_facts(small: Path, tmp_path: Path) -> None:
    source = read_checkpoint(small)
    out = convert(small, tmp_path / 'backbone.safetensors')

    assert list(tmp_path.iterdir()) == [out]
    converted = read_checkpoint(out)
    assert converted.state_dict.keys() == source.state_dict.keys()
    for name, tensor in source.state_dict.items():
        assert torch.equal(converted.state_dict[name], tensor)
    assert converted.settings | {'img_size': 64} == source.settings
    assert converted.img_size == source.img_size
    assert converted.meta['source'] == 'small.pth'
    assert converted.meta['source_sha256'] == source.sha256
    assert converted.meta['epoch'] == 170
    assert converted.ignored == {}


def test_convert_refuses_and_leaves_nothing(small: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r'does not end in \.safetensors'):
        convert(small, tmp_path / 'x.pth')
    with pytest.raises(OutputError, match='cannot be written'):
        convert(small, tmp_path / 'no' / 'x.safetensors')
    out = tmp_path / 'x.safetensors'
    out.write_text('precious')
    with pytest.raises(OutputError, match='exists'):
        convert(small, out)
    assert out.read_text() == 'precious'
    convert(small, out, overwrite=True)
    assert read_checkpoint(out).arch == 'b'
    assert list(tmp_path.iterdir()) == [out]


def test_no_partial_file_survives_a_failed_write(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b'part')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(safetensors.torch, 'save_file', full_disk)
    with pytest.raises(OutputError, match='No space left'):
        convert(small, tmp_path / 'x.safetensors')
    assert list(tmp_path.iterdir()) == []


# --- load_into


def test_load_into_copies_everything(official: Path, model: DynamicVis) -> None:
    checkpoint = read_checkpoint(official)
    assert load_into(model, checkpoint) == {'loaded': 311, 'ignored': 6, 'missing': 0}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, checkpoint.state_dict[name])


@pytest.mark.parametrize('img_size', [128, (64, 96)])
def test_pos_embed_of_another_image_size_is_fitted(
    official: Path, img_size: int | tuple[int, int]
) -> None:
    model = DynamicVis(arch='b', img_size=img_size)
    load_into(model, read_checkpoint(official))
    stored = official_state_dict()['pos_embed']
    expected = torch.nn.functional.interpolate(
        stored.reshape(1, 16, 16, -1).permute(0, 3, 1, 2), model.grid, mode='bicubic'
    )
    torch.testing.assert_close(
        model.pos_embed.detach(), expected.flatten(2).transpose(1, 2)
    )


def test_grid_of_a_model_that_is_not_square_is_kept(tmp_path: Path) -> None:
    source = DynamicVis(arch='b', img_size=(32, 128))  # 256 tokens, like 64 x 64
    saved = tmp_path / 'oblong.pth'
    torch.save(source.state_dict(), saved)
    converted = convert(saved, tmp_path / 'oblong.safetensors')
    target = DynamicVis(arch='b', img_size=(64, 64))
    for path in (saved, converted):
        checkpoint = read_checkpoint(path)
        assert checkpoint.img_size == (32, 128)
        load_into(target, checkpoint)
        fitted = target.pos_embed.detach().reshape(16, 16, -1)
        expected = torch.nn.functional.interpolate(
            source.pos_embed.detach().reshape(1, 8, 32, -1).permute(0, 3, 1, 2),
            (16, 16),
            mode='bicubic',
        )[0].permute(1, 2, 0)
        torch.testing.assert_close(fitted, expected)


def test_mismatches_are_listed_and_nothing_is_loaded(
    tmp_path: Path, model: DynamicVis
) -> None:
    tensors = OrderedDict(official_state_dict())
    del tensors['layers.1.2.bias'], tensors['layers.3.1.0.spatial_gate.weight']
    tensors['extra.weight'] = torch.ones(1)
    tensors['layers.0.2.bias'] = torch.ones(5)
    path = tmp_path / 'x.pth'
    torch.save(tensors, path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    with pytest.raises(CheckpointError) as info:
        load_into(model, read_checkpoint(path))

    message = str(info.value)
    assert str(path) in message
    assert (
        '2 missing: layers.1.2.bias, layers.3.1.0.spatial_gate.weight; '
        '1 unexpected: extra.weight; '
        '1 of another shape: layers.0.2.bias (5,) instead of (96,)'
    ) in message
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_wrong_arch_is_named_and_long_lists_are_cut(
    tmp_path: Path, model: DynamicVis
) -> None:
    checkpoint = read_checkpoint(make_checkpoint(tmp_path / 'x.pth', 'l'))
    with pytest.raises(CheckpointError) as info:
        load_into(model, checkpoint)
    message = str(info.value)
    assert "the file is of arch 'l', the model of arch 'b'" in message
    assert '176 unexpected' in message
    assert 'and 166 more' in message
    assert len(message) < 3000


def test_other_mamba_version_is_named(tmp_path: Path, model: DynamicVis) -> None:
    checkpoint = read_checkpoint(make_checkpoint(tmp_path / 'x.pth', mamba2=True))
    with pytest.raises(CheckpointError, match='mamba2=True, the model mamba2=False'):
        load_into(model, checkpoint)
