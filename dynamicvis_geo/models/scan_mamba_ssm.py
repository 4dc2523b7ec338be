"""The selective scan of the mamba-ssm package, for CUDA GPUs and only when asked for.

``selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None,
delta_softplus=False, return_last_state=False)`` takes and gives ``[B, channels, L]``,
in one direction (mamba-ssm, ``mamba_ssm/ops/selective_scan_interface.py``). Turning the
sequences costs copies, so this form is there to compare with, not for speed.
"""

import importlib

import torch
from torch import Tensor

from dynamicvis_geo.models import scan
from dynamicvis_geo.models.scan import causal_conv

__all__ = ['DEVICE', 'causal_conv', 'selective_scan', 'unavailable']

#: The type of device that this form runs on.
DEVICE = 'cuda'
_MODULE = 'mamba_ssm.ops.selective_scan_interface'


def unavailable() -> str | None:
    """Say why this form cannot run here, or None if it can."""
    if not torch.cuda.is_available():
        return 'PyTorch finds no CUDA GPU'
    try:
        importlib.import_module(_MODULE)
    except ImportError as error:
        return str(error)
    return None


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    gate: Tensor,
) -> Tensor:
    """Run the recurrence of :func:`dynamicvis_geo.models.scan.selective_scan`."""
    if u.dtype == torch.float64:
        return scan.selective_scan(u, dt, A, B, C, D, dt_bias, gate)
    y: Tensor = importlib.import_module(_MODULE).selective_scan_fn(
        _sequences(u),
        _sequences(dt.to(u.dtype)),
        A.float(),
        _sequences(B.to(u.dtype)),
        _sequences(C.to(u.dtype)),
        D.float(),
        z=_sequences(gate.to(u.dtype).expand_as(u)),
        delta_bias=dt_bias.float(),
        delta_softplus=True,
    )
    return _turn_second(y.to(u.dtype).mT.unflatten(0, u.shape[:2]))


def _sequences(x: Tensor) -> Tensor:
    """Make ``[K, B, L, channels]`` the contiguous ``[K * B, channels, L]``."""
    return _turn_second(x).flatten(0, 1).mT.contiguous()


def _turn_second(x: Tensor) -> Tensor:
    return x if x.shape[0] == 1 else torch.stack([x[0], x[1].flip(1)])
