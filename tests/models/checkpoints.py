"""Makes checkpoint files in the layouts that users have, under a megabyte each."""

import contextlib
import io
import math
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

CONFIG = """
img_size = 512
model = dict(
    backbone=dict(
        arch='{arch}',
        global_token_cfg=dict(num=-1, pos='head'),
        img_size={img_size},
        is_softmax_on_x=True,
        out_indices=(0, 1, 2, 3),
        path_type='forward_reverse_mean',
        sampling_scale=dict(type='fixed', val=0.1),
        spatial_token_keep_ratios=[8, 4, 2, 1],
        type='mmpretrain.DynamicVisBackbone'),
    neck=dict(type='GenericRoIExtractor'))
work_dir = '/home/somebody/work_dirs'
"""


def official_state_dict(
    arch: str = 'b',
    img_size: int = 64,
    mamba2: bool = False,
    gates: int = 0,
    stages: int = 4,
) -> 'OrderedDict[str, Tensor]':
    """Backbone keys and shapes of the official model, with random values.

    The tensors are windows that slide over a few numbers, which keeps the files small.
    One stage of four is all that a reader looks at, and quick to make.
    """
    widths = {'b': (96, 192, 384, 768), 'l': (128, 256, 512, 1024)}[arch]
    depths = {'b': (2, 4, 16, 4), 'l': (2, 4, 32, 4)}[arch]
    shapes: dict[str, tuple[int, ...]] = {
        'pos_embed': (1, (img_size // 4) ** 2, widths[0])
    }
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        if stage == stages:
            break
        channels, kernel = (3, 7) if stage == 0 else (widths[stage - 1], 3)
        at = f'layers.{stage}'
        shapes[f'{at}.0.projection.weight'] = (width, channels, kernel, kernel)
        shapes[f'{at}.0.projection.bias'] = (width,)
        shapes[f'{at}.0.norm.weight'] = shapes[f'{at}.0.norm.bias'] = (width,)
        for i in range(depth):
            shapes[f'{at}.1.{i}.spatial_gate.weight'] = (1, width)
            block = f'{at}.1.{i}.spatial_mamba_mixer'
            shapes[f'{block}.pre_norm.weight'] = (width,)
            if gates:
                shapes[f'{block}.gate_layer.0.weight'] = (gates, gates * width)
            mixer = _mamba2(width) if mamba2 else _mamba(width)
            shapes |= {
                f'{block}.mamba_layer.{name}': shape for name, shape in mixer.items()
            }
        shapes[f'{at}.2.weight'] = shapes[f'{at}.2.bias'] = (width,)
    generator = torch.Generator().manual_seed(0)
    return OrderedDict((n, _sliding(n, s, generator)) for n, s in shapes.items())


def _sliding(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    strides = (1, 3, 5, 7)[: len(shape)]
    length = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    values = torch.rand(length, generator=generator) - 0.5
    if len(shape) == 1:  # norms and biases
        values = 0.1 * values + name.endswith(('.weight', '.D'))
    else:
        values = 3 * values / math.prod(shape[1:]) ** 0.5
    return values.as_strided(shape, strides)


def _mamba(width: int) -> dict[str, tuple[int, ...]]:
    inner, rank = 2 * width, width // 16
    return {
        'A_log': (inner, 16),
        'D': (inner,),
        'conv1d.weight': (inner, 1, 4),
        'conv1d.bias': (inner,),
        'in_proj.weight': (2 * inner, width),
        'x_proj.weight': (rank + 32, inner),
        'dt_proj.weight': (inner, rank),
        'dt_proj.bias': (inner,),
        'out_proj.weight': (width, inner),
    }


def _mamba2(width: int) -> dict[str, tuple[int, ...]]:
    inner = 2 * width
    heads = inner // 24
    return {
        'dt_bias': (heads,),
        'A_log': (heads,),
        'D': (heads,),
        'conv1d.weight': (inner + 128, 1, 4),
        'conv1d.bias': (inner + 128,),
        'in_proj.weight': (2 * inner + 128 + heads, width),
        'norm.weight': (inner,),
        'out_proj.weight': (width, inner),
    }


def mmengine_content(
    backbone: dict[str, Tensor], arch: str = 'b', img_size: int = 64, **extra: Any
) -> dict[str, Any]:
    """The dict that MMEngine saves for the pretraining model, but no log buffers."""
    state_dict = OrderedDict((f'backbone.{k}', v) for k, v in backbone.items())
    for i in range(3):
        state_dict[f'pre_neck.lateral_convs.{i}.conv.weight'] = torch.ones(4, 4, 1, 1)
    state_dict['neck.pre_module.conv.weight'] = torch.ones(4)
    state_dict['head.fc.weight'] = torch.ones(63, 4)
    state_dict['head.fc.bias'] = torch.full((63,), float('nan'))  # ignored, so harmless
    return {
        'meta': {
            'cfg': CONFIG.format(arch=arch, img_size=img_size),
            'epoch': 170,
            'iter': 12345,
            'seed': 7,
            'time': '20250401_120000',
            'experiment_name': 'pretrain',
            'mmengine_version': '0.10.7',
            'dataset_meta': {'classes': ('airport',), 'palette': np.zeros((1, 3))},
            'hook_msgs': {'best_score': np.float64(0.5)},
        },
        'state_dict': state_dict,
        'message_hub': {'log_scalars': OrderedDict(), 'resumed_keys': OrderedDict()},
        'optimizer': {'state': {0: {'step': 1, 'exp_avg': torch.ones(4)}}},
        'param_schedulers': [{'last_step': 170}],
        **extra,
    }


def save_mmengine(path: Path, content: dict[str, Any]) -> Path:
    """Save as MMEngine does: its HistoryBuffer objects are in the message hub."""
    with _history_buffer() as history_buffer:
        scalars = content['message_hub']['log_scalars']
        scalars['train/loss'] = history_buffer([0.5, 0.25])
        scalars['train/lr'] = history_buffer([0.1])
        torch.save(content, path)
    return path


def make_checkpoint(
    path: Path, arch: str = 'b', img_size: int = 64, **kwargs: Any
) -> Path:
    """Write a whole checkpoint in the official layout."""
    backbone = official_state_dict(arch, img_size, **kwargs)
    return save_mmengine(path, mmengine_content(backbone, arch, img_size))


@contextlib.contextmanager
def _history_buffer() -> Iterator[type]:
    """A class that pickles as MMEngine's does: arrays, and its own methods."""

    class HistoryBuffer:
        def __init__(self, values: list[float]) -> None:
            self._log_history = np.array(values)
            self._count_history = np.ones(len(values), dtype=np.int64)

        def min(self) -> float:
            return float(self._log_history.min())

        def __getstate__(self) -> dict[str, Any]:
            return self.__dict__ | {'statistics_methods': {'min': HistoryBuffer.min}}

    name = 'mmengine.logging.history_buffer'
    HistoryBuffer.__module__ = HistoryBuffer.min.__module__ = name
    HistoryBuffer.__qualname__ = 'HistoryBuffer'
    HistoryBuffer.min.__qualname__ = 'HistoryBuffer.min'
    module = types.ModuleType(name)
    module.HistoryBuffer = HistoryBuffer  # type: ignore[attr-defined]
    packages = {n: types.ModuleType(n) for n in ('mmengine', 'mmengine.logging')}
    sys.modules.update(packages | {name: module})
    try:
        yield HistoryBuffer
    finally:
        for n in (*packages, name):
            del sys.modules[n]


class RunsOnLoading:
    """An object whose unpickling calls *function*."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def save_pickle_in_archive(path: Path, pickled: bytes) -> Path:
    """Write an archive as torch.save does, around any pickle."""
    buffer = io.BytesIO()
    torch.save({}, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, 'w') as target:
        for entry in source.namelist():
            is_pickle = entry.endswith('/data.pkl')
            target.writestr(entry, pickled if is_pickle else source.read(entry))
    return path


def reach_for_builtins(code: str) -> bytes:
    """A pickle that climbs from a harmless class to `exec` by getattr, and calls it."""
    getattr_ = b'c__builtin__\ngetattr\n'

    def text(value: str) -> bytes:
        return b'X' + len(value).to_bytes(4, 'little') + value.encode()

    buffer = b'cmmengine.logging.history_buffer\nHistoryBuffer\n'
    init = getattr_ + buffer + text('__init__') + pickle.TUPLE2 + pickle.REDUCE
    names = getattr_ + init + text('__globals__') + pickle.TUPLE2 + pickle.REDUCE
    get = getattr_ + names + text('get') + pickle.TUPLE2 + pickle.REDUCE
    builtins = get + text('__builtins__') + pickle.TUPLE1 + pickle.REDUCE
    get_exec = getattr_ + builtins + text('get') + pickle.TUPLE2 + pickle.REDUCE
    exec_ = get_exec + text('exec') + pickle.TUPLE1 + pickle.REDUCE
    call = exec_ + text(code) + pickle.TUPLE1 + pickle.REDUCE
    return b'\x80\x02' + call + pickle.STOP
