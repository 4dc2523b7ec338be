"""Deterministic weights and inputs, and the outputs of the official model for them.

`tests/data/parity` holds outputs of the official implementation. The weights and images
that gave them are made anew here, from uniform numbers whose seeds are the CRC-32 of
their names; checksums in the manifest say whether they came out the same.
"""

import functools
import hashlib
import json
import math
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dynamicvis_geo.models import DynamicVis

DATA = Path(__file__).parents[1] / 'data' / 'parity'
MANIFEST: dict[str, Any] = json.loads((DATA / 'manifest.json').read_text())
CASES: dict[str, Any] = MANIFEST['cases']
COMPONENTS: dict[str, Any] = MANIFEST['components']

_GATE_GAINS = (2.5, 2.0, 0.8, 0.8)


def uniform(name: str, count: int) -> NDArray[np.float64]:
    seed = zlib.crc32(name.encode())
    return np.random.Generator(np.random.PCG64(seed)).random(count)


def noise(name: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Zero mean, unit variance."""
    return ((2 * uniform(name, math.prod(shape)) - 1) * math.sqrt(3)).reshape(shape)


# Of one model of arch b: most cases have the same weights.
@functools.lru_cache(maxsize=320)
def weight(key: str, shape: tuple[int, ...], out_gain: float = 1.0) -> Tensor:
    """The weight of a state-dict key, by the first rule that fits the key's end."""
    if key.endswith('A_log') and len(shape) == 1:
        return _tensor(np.log(1 + 15 * uniform(key, shape[0])))
    z = noise(key, shape)
    fan = math.sqrt(math.prod(shape[1:]))
    if key.endswith('spatial_gate.weight'):
        stage, index = int(key.split('.')[-5]), int(key.split('.')[-3])
        return _tensor(_GATE_GAINS[stage] / (1 + 0.3 * index) * (z / fan))
    rules: dict[str, Callable[[], NDArray[np.float64]]] = {
        'pos_embed': lambda: 0.5 * z,
        'projection.weight': lambda: z / fan,
        'projection.bias': lambda: 0.1 * z,
        'gate_layer.0.weight': lambda: 4 * (z / fan),
        'in_proj.weight': lambda: z / fan,
        'x_proj.weight': lambda: 3 * (z / fan),
        'dt_proj.weight': lambda: z / fan,
        'dt_proj.bias': lambda: z - 3.5,
        'dt_bias': lambda: z - 3.5,
        'conv1d.weight': lambda: 0.5 * z,
        'conv1d.bias': lambda: 0.1 * z,
        'out_proj.weight': lambda: out_gain * (z / fan),
        'A_log': lambda: np.log(1 + np.arange(shape[-1])) + 0.1 * z,
        '.D': lambda: 1 + 0.1 * z,
        '.bias': lambda: 0.1 * z,
        '.weight': lambda: 1 + 0.1 * z,
    }
    return _tensor(next(rule for end, rule in rules.items() if key.endswith(end))())


def image(name: str, shape: tuple[int, ...]) -> Tensor:
    """Noise a pixel plus noise on an 8 x 8 grid of blocks."""
    batch, channels, height, width = shape
    coarse = noise(f'{name}/coarse', (batch, channels, 8, 8))
    blocks = coarse.repeat(height // 8, axis=2).repeat(width // 8, axis=3)
    return _tensor(0.6 * noise(f'{name}/fine', shape) + 0.8 * blocks)


def sequence(name: str, shape: tuple[int, ...]) -> Tensor:
    return _tensor(noise(name, shape))


def fill(module: nn.Module, prefix: str = '', out_gain: float = 1.0) -> nn.Module:
    """Load the deterministic weights of all keys of a module."""
    module.load_state_dict(
        {
            key: weight(prefix + key, tuple(value.shape), out_gain)
            for key, value in module.state_dict().items()
        }
    )
    return module.eval()


def build(name: str, **changes: Any) -> tuple[DynamicVis, Tensor]:
    """The model and the input of a case."""
    case = CASES[name]
    size = case['img_size']
    arguments = case['constructor'] | {
        'arch': case['arch'],
        'img_size': tuple(size) if isinstance(size, list) else size,
    }
    if name == 'b_mamba2':
        arguments['mamba2_head_groups'] = 'tiled'
    with torch.device('meta'):
        model = DynamicVis(**arguments | changes)
    fill(model.to_empty(device='cpu'), out_gain=case['out_gain'])
    return model, image(case['input_name'], tuple(case['input_shape']))


def golden(name: str) -> dict[str, Tensor]:
    """The arrays of a case, but for its routing."""
    with np.load(DATA / f'{name}.npz') as arrays:
        return {
            key: torch.from_numpy(arrays[key])
            for key in arrays
            if not key.startswith('ids_')
        }


def routing(name: str) -> list[Tensor]:
    """The tokens that each mixer of the official model chose, in their order."""
    with np.load(DATA / f'{name}.npz') as arrays:
        keys = sorted(key for key in arrays if key.startswith('ids_'))
        return [torch.from_numpy(arrays[key].astype(np.int64)) for key in keys]


class Routing(TorchFunctionMode):
    """Note the order of tokens in each mixer, and impose another if there is one."""

    def __init__(self, imposed: list[Tensor] | None = None) -> None:
        super().__init__()
        self.imposed = imposed
        self.found: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is not torch.Tensor.sort:
            return result
        self.found.append(result.indices)
        if self.imposed is None:
            return result
        chosen = self.imposed[len(self.found) - 1]
        return torch.return_types.sort((result.values, chosen))

    def differing(self, expected: list[Tensor]) -> int:
        """Count the places that hold another token than expected."""
        pairs = zip(self.found, expected, strict=True)
        return sum(int((own[:, : e.shape[1]] != e).sum()) for own, e in pairs)


def tolerance(entry: Mapping[str, Any]) -> float:
    """Ten times the official model's own float32 rounding; 1e-5 is always allowed."""
    return max(1e-5, 10 * (entry['rounding_rel_l2'] or 0.0))


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(key.encode())
        digest.update(tensors[key].numpy().tobytes())
    return digest.hexdigest()


def _tensor(values: NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))
