"""Reading, converting and fitting checkpoint files.

The official files are MMEngine's: a dict with ``state_dict`` (backbone, necks and head
of the pretraining model) beside training logs. Wanted of them is the backbone.
"""

import ast
import contextlib
import hashlib
import json
import re
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isqrt
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from dynamicvis_geo.errors import CheckpointError, OutputError, SpecError, one_line
from dynamicvis_geo.models.config import TRAINED_ARGUMENTS
from dynamicvis_geo.models.safe_load import (
    is_safetensors,
    load_weights_only,
    read_head,
)
from dynamicvis_geo.paths import local_output
from dynamicvis_geo.store import whole_file

#: How the official "without token selection" models differ from the others. Their
#: tensors have the same names and shapes, so the state dict itself does not tell it.
WITHOUT_TOKEN_SELECTION: dict[str, Any] = {
    'spatial_token_keep_ratios': [1, 1, 1, 1],
    'is_softmax_on_x': False,
    'global_token_cfg': {'pos': 'none', 'num': -1},
}

# What reading a configuration raises that is none, or is written in another way.
_NO_CONFIGURATION = (
    AttributeError,
    MemoryError,
    RecursionError,
    SyntaxError,
    TypeError,
    ValueError,
)
_ARCH_OF_WIDTH = {96: 'b', 128: 'l'}
_FIRST_CONV = 'layers.0.0.projection.weight'
_FIRST_MIXER = 'layers.0.1.0.spatial_mamba_mixer.'


@dataclass(frozen=True)
class Checkpoint:
    """The backbone's tensors of one checkpoint file, and what the file says of them.

    Attributes:
        path: The file.
        sha256: SHA-256 of the file, 64 hexadecimal digits.
        state_dict: The backbone's tensors, float32, on the CPU, contiguous, under the
            official names without the ``backbone.`` prefix.
        arch: ``'b'`` or ``'l'``, from the shapes.
        img_size: Height and width in pixels that ``pos_embed`` was made for, or None
            without ``pos_embed`` or where its token count is no square.
        mamba2: Whether the mixers are Mamba-2.
        path_type: ``'forward_reverse_gate'`` or ``'forward_reverse_shuffle_gate'`` if
            the file has gates; None for the types without parameters of their own.
        ignored: Numbers of ``state_dict`` tensors of other parts, by prefix.
        sections: The file's other top-level entries (``optimizer``, ``message_hub``).
        dtypes: Numbers of backbone tensors by the dtype that they have in the file.
        settings: Arguments of the official backbone with which the file was trained,
            as far as the file or its name tells them.
        meta: Plain facts from the file: epoch, iteration, time, versions, seed.
    """

    path: Path
    sha256: str
    state_dict: dict[str, Tensor] = field(repr=False)
    arch: str
    img_size: tuple[int, int] | None
    mamba2: bool
    path_type: str | None
    ignored: dict[str, int]
    sections: tuple[str, ...]
    dtypes: dict[str, int]
    settings: dict[str, Any]
    meta: dict[str, str | int | float | bool]


def read_checkpoint(path: str | Path, sha256: str | None = None) -> Checkpoint:
    """Read the backbone out of a checkpoint file; nothing from the file is run.

    Args:
        path: An MMEngine checkpoint, a plain state dict saved with ``torch.save`` (with
            or without the ``backbone.`` prefix), or a safetensors file.
        sha256: The SHA-256 that the file must have, compared before it is parsed.

    Returns:
        The backbone's tensors as float32, and the facts of the file.

    Raises:
        CheckpointError: If the file is missing, empty, truncated, a web page, a Git-LFS
            pointer or no checkpoint; if its SHA-256 is another; if loading it could run
            code; if it holds no DynamicVis backbone, tensors that are no dense
            floating-point numbers, or NaN or infinite values.
    """
    path = Path(path).expanduser()
    head = read_head(path)
    digest = _file_sha256(path)
    if sha256 is not None and digest != sha256.lower():
        raise CheckpointError(
            f'{path} has SHA-256 {digest}, but sha256={sha256!r} is asked for: fetch '
            'the file anew, or correct sha256'
        )
    content = _read_safetensors(path) if is_safetensors(head) else _read_torch(path)
    stored, ignored = _split_prefixes(path, content.tensors)
    arch = _arch_of(path, stored)
    odd = [name for name, tensor in stored.items() if not _is_dense_float(tensor)]
    if odd:
        raise CheckpointError(
            f'{path} holds tensors that are no dense floating-point numbers '
            f'({_first_few(odd)}): give a checkpoint that is not quantised or sparse'
        )
    tensors = {name: _to_float32(tensor) for name, tensor in stored.items()}
    bad = [name for name, tensor in tensors.items() if not _is_finite(tensor)]
    if bad:
        raise CheckpointError(
            f'{path} holds NaN or infinite values in {len(bad)} tensors '
            f'({_first_few(bad)}): it is damaged or its training diverged; use another'
        )
    settings = content.settings
    if 'spatial_token_keep_ratios' not in settings and re.search(
        'wo[-_]token', path.name
    ):
        settings = settings | WITHOUT_TOKEN_SELECTION
    return Checkpoint(
        path=path,
        sha256=digest,
        state_dict=tensors,
        arch=arch,
        img_size=_img_size_of(stored, settings.get('img_size')),
        mamba2=f'{_FIRST_MIXER}mamba_layer.dt_bias' in stored,
        path_type=_path_type_of(stored),
        ignored=ignored,
        sections=content.sections,
        dtypes=dict(Counter(str(t.dtype).partition('.')[2] for t in stored.values())),
        settings=settings,
        meta={
            name: value
            for name, value in content.meta.items()
            if isinstance(value, str | int | float)
        },
    )


def load_into(model: nn.Module, checkpoint: Checkpoint) -> dict[str, int]:
    """Copy a checkpoint's tensors into a model, all of them or none.

    Args:
        model: A backbone with the official parameter names. A ``pos_embed`` of another
            image size is fitted by the model itself.
        checkpoint: What :func:`read_checkpoint` returned.

    Returns:
        Numbers of keys: ``loaded``, ``ignored`` (of other parts), ``missing``.

    Raises:
        CheckpointError: If keys are missing, unexpected, or of another shape.
    """
    wanted = model.state_dict()
    given = checkpoint.state_dict
    problems = {
        'missing': [name for name in wanted if name not in given],
        'unexpected': [name for name in given if name not in wanted],
        'of another shape': [
            f'{name} {tuple(given[name].shape)} instead of {tuple(tensor.shape)}'
            for name, tensor in wanted.items()
            # The model resizes pos_embed, and says so itself where it cannot.
            if name in given
            and name != 'pos_embed'
            and given[name].shape != tensor.shape
        ],
    }
    found = [f'{len(v)} {kind}: {_first_few(v)}' for kind, v in problems.items() if v]
    if found:
        raise CheckpointError(
            f'{checkpoint.path} does not fit the model'
            f'{_mismatch_hint(model, checkpoint)}; keys {"; ".join(found)}'
        )
    state_dict = OrderedDict(given)
    if checkpoint.img_size is not None:
        # Where the model finds the true grid of a pos_embed that it has to resize.
        grid = tuple(-(-side // 4) for side in checkpoint.img_size)
        state_dict._metadata = {'': {'grid': grid}}  # type: ignore[attr-defined]
    try:
        model.load_state_dict(state_dict)
    except (RuntimeError, SpecError) as error:
        reason = one_line(error)
        raise CheckpointError(
            f'{checkpoint.path} does not fit the model: {reason}'
        ) from error
    return {
        'loaded': len(given),
        'ignored': sum(checkpoint.ignored.values()),
        'missing': 0,
    }


def convert(
    checkpoint: Checkpoint | str | Path, out: str | Path, overwrite: bool = False
) -> Path:
    """Write the backbone alone as safetensors: smaller, and faster to load.

    The metadata of the new file name the source and its SHA-256, arch, and the training
    settings. The file appears by renaming, whole or not at all.

    Args:
        checkpoint: A checkpoint, or the path of one.
        out: The file to write, ending in ``.safetensors``.
        overwrite: Replace a file that exists.

    Returns:
        The path that was written.

    Raises:
        CheckpointError: If the checkpoint cannot be read.
        OutputError: If ``out`` has another suffix, exists, or cannot be written.
    """
    out = local_output(out)
    if out.suffix != '.safetensors':
        raise OutputError(f'{out} does not end in .safetensors: give a name that does')
    if out.exists() and not overwrite:
        raise OutputError(f'{out} exists: give another name, or allow overwriting')
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = read_checkpoint(checkpoint)
    settings = checkpoint.settings
    if checkpoint.img_size is not None:
        settings = settings | {'img_size': checkpoint.img_size}
    metadata = {
        'format': 'pt',
        'model': 'DynamicVis backbone',
        'arch': checkpoint.arch,
        'source': checkpoint.path.name,
        'source_sha256': checkpoint.sha256,
        'settings': json.dumps(settings),
        'meta': json.dumps(checkpoint.meta),
    }
    try:
        with whole_file(out) as partial:
            safetensors.torch.save_file(checkpoint.state_dict, partial, metadata)
    except (OSError, safetensors.SafetensorError) as error:
        raise OutputError(f'{out} cannot be written: {error}') from error
    return out


@dataclass(frozen=True)
class _Content:
    """The content of a file of either format."""

    tensors: Mapping[str, Any]
    sections: tuple[str, ...]
    settings: dict[str, Any]
    meta: dict[str, Any]


def _file_sha256(path: Path) -> str:
    with path.open('rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def _read_safetensors(path: Path) -> _Content:
    try:
        with safetensors.safe_open(path, framework='pt') as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        # Both are dictionaries in what we write.
        settings = dict(json.loads(metadata.pop('settings', '{}')))
        meta = dict(json.loads(metadata.pop('meta', '{}')))
    except (
        safetensors.SafetensorError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise CheckpointError(
            f'{path} is damaged or cut short ({error}): delete it, and fetch or '
            'convert it again'
        ) from error
    return _Content(tensors, (), settings, meta | metadata)


def _read_torch(path: Path) -> _Content:
    data = load_weights_only(path)
    if not isinstance(data, dict):
        raise CheckpointError(
            f'{path} holds a {type(data).__name__}, not a state dict: give a checkpoint'
        )
    if isinstance(data.get('state_dict'), dict):
        meta = data.get('meta')
        meta = dict(meta) if isinstance(meta, dict) else {}
        # The configuration is long, and names places on the machine that trained.
        config = meta.pop('cfg', None)
        settings = _settings_of(config) if isinstance(config, str) else {}
        settings |= _size_of_grid(data['state_dict'])
        sections = tuple(str(key) for key in data if key != 'state_dict')
        return _Content(data['state_dict'], sections, settings, meta)
    if any(isinstance(value, Tensor) for value in data.values()):
        return _Content(data, (), _size_of_grid(data), {})
    entries = _first_few([str(key) for key in data]) or 'nothing'
    raise CheckpointError(
        f'{path} has no state_dict (it holds {entries}): give a checkpoint of the model'
    )


def _settings_of(config: str) -> dict[str, Any]:
    """Return the backbone's arguments from the text of an MMEngine configuration."""
    with contextlib.suppress(*_NO_CONFIGURATION):
        for node in ast.walk(ast.parse(config)):
            if isinstance(node, ast.keyword) and node.arg == 'backbone':
                arguments = _literal(node.value)
                settings = {
                    k: v for k, v in arguments.items() if k in TRAINED_ARGUMENTS
                }
                json.dumps(settings)  # raises on other values than plain ones
                return settings
    return {}


def _size_of_grid(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return the image size from the grid that our own models note in a state dict."""
    with contextlib.suppress(AttributeError, KeyError, TypeError):
        modules = state_dict._metadata  # type: ignore[attr-defined]
        for module in ('', 'backbone'):
            if size := _pair(modules.get(module, {}).get('grid')):
                return {'img_size': [4 * side for side in size]}
    return {}


def _literal(node: ast.expr) -> Any:
    """Return the value of a literal or of ``dict(name=literal)``; nothing is run."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) == 'dict':
        return {str(pair.arg): _literal(pair.value) for pair in node.keywords}
    return ast.literal_eval(node)


def _split_prefixes(
    path: Path, tensors: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Return the backbone's tensors without prefix, and the counts of the others."""
    found = {str(k): v for k, v in tensors.items() if isinstance(v, Tensor)}
    backbone = {
        name.removeprefix('backbone.'): tensor
        for name, tensor in found.items()
        if name.startswith('backbone.')
    }
    if not backbone and _FIRST_CONV in found:
        return found, {}
    others = Counter(name.partition('.')[0] for name in found)
    del others['backbone']
    if not backbone:
        counts = ', '.join(f'{prefix}: {n}' for prefix, n in others.most_common(10))
        raise CheckpointError(
            f"{path} has no 'backbone.' keys (tensors by prefix: {counts or 'none'}): "
            'give a checkpoint of DynamicVis'
        )
    return backbone, dict(others)


def _arch_of(path: Path, tensors: Mapping[str, Tensor]) -> str:
    conv = tensors.get(_FIRST_CONV)
    shape = tuple(conv.shape) if conv is not None else ()
    arch = _ARCH_OF_WIDTH.get(shape[0]) if shape else None
    if arch is None:
        found = f'of shape {shape}' if shape else 'missing'
        raise CheckpointError(
            f'{path} holds no DynamicVis backbone of arch b or l ({_FIRST_CONV} is '
            f'{found}): give a checkpoint of DynamicVis'
        )
    return arch


def _img_size_of(
    tensors: Mapping[str, Tensor], trained: object
) -> tuple[int, int] | None:
    """Return the image size of ``pos_embed``: the trained one if it fits, or square."""
    if 'pos_embed' not in tensors or tensors['pos_embed'].ndim != 3:
        return None
    tokens = tensors['pos_embed'].shape[1]
    size = _pair((trained, trained) if isinstance(trained, int) else trained)
    # The first stage's convolution has stride 4.
    if size and -(-size[0] // 4) * -(-size[1] // 4) == tokens:
        return size
    side = isqrt(tokens)
    return (4 * side, 4 * side) if side and side * side == tokens else None


def _pair(value: object) -> tuple[int, int] | None:
    """Return two positive whole numbers, if they are that."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        return None
    if not all(isinstance(side, int) and side > 0 for side in value):
        return None
    return value[0], value[1]


def _path_type_of(tensors: Mapping[str, Tensor]) -> str | None:
    gate = tensors.get(f'{_FIRST_MIXER}gate_layer.0.weight')
    if gate is None:
        return None
    gates = {2: 'forward_reverse_gate', 3: 'forward_reverse_shuffle_gate'}
    return gates.get(gate.shape[0])


def _is_dense_float(tensor: Tensor) -> bool:
    return (
        tensor.is_floating_point()
        and tensor.layout is torch.strided
        and not (tensor.is_nested or tensor.is_meta)
    )


def _to_float32(tensor: Tensor) -> Tensor:
    """Return a contiguous copy, as the file's tensors may be mapped or share memory."""
    wide = tensor.detach().to(torch.float32)
    return wide.clone(memory_format=torch.contiguous_format)


def _is_finite(tensor: Tensor) -> bool:
    # One pass, 25 times as fast as tensor.isfinite(): the extremes take over any NaN.
    extremes = torch.stack(tensor.aminmax()) if tensor.numel() else tensor
    return bool(extremes.isfinite().all())


def _first_few(names: list[str], limit: int = 10) -> str:
    more = f' and {len(names) - limit} more' if len(names) > limit else ''
    return ', '.join(names[:limit]) + more


def _mismatch_hint(model: nn.Module, checkpoint: Checkpoint) -> str:
    """Say in words what a mismatch of keys looks like, or nothing."""
    arch = str(getattr(model, 'arch', checkpoint.arch))[:1]
    if arch != checkpoint.arch:
        return f': the file is of arch {checkpoint.arch!r}, the model of arch {arch!r}'
    mamba2 = any(name.endswith('.dt_bias') for name in model.state_dict())
    if mamba2 != checkpoint.mamba2:
        return f': the file has mamba2={checkpoint.mamba2}, the model mamba2={mamba2}'
    return ''
