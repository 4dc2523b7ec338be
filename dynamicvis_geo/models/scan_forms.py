"""The forms of the selective scan, and the choice among them.

A form is a module with ``selective_scan`` and ``causal_conv``, of the signatures and
the meaning that they have in ``scan.py``; with ``DEVICE``, the type of device it runs
on; and with ``unavailable()``, which says why it cannot run here or gives None.
"""

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.models import scan as torch_form

#: 'auto' is the fastest form that runs on the device of the tensors.
SCANS = ('auto', 'torch', 'c', 'triton', 'mamba_ssm')
_MODULES = {
    'c': 'dynamicvis_geo.models.scan_c',
    'triton': 'dynamicvis_geo.models.scan_triton',
    'mamba_ssm': 'dynamicvis_geo.models.scan_mamba_ssm',
}
_FASTEST = {'cpu': 'c', 'cuda': 'triton'}
_REMEDIES = {
    'c': 'install a C compiler (gcc, clang, or the Visual C++ build tools) and then '
    'dynamicvis-geo again, with pip install --force-reinstall --no-deps',
    'triton': 'install triton (pip install triton), which needs a CUDA GPU and comes '
    'with PyTorch on Linux',
    'mamba_ssm': 'install mamba-ssm (pip install mamba-ssm), which needs CUDA',
}


class ScanForm(NamedTuple):
    """The functions of one form."""

    selective_scan: Callable[..., Tensor]
    causal_conv: Callable[..., Tensor]


_loaded: dict[str, ScanForm] = {}


def scan_forms() -> dict[str, str | None]:
    """Give each form, and why it cannot run on this machine (None if it can)."""
    return {'torch': None} | {name: _unavailable(name) for name in _MODULES}


@functools.cache
def resolve_scan(scan: str, device_type: str) -> str:
    """Name the form that runs on a device.

    Warns, once in a process, if 'auto' has to take the slow form on a CPU or CUDA GPU.

    Args:
        scan: one of :data:`SCANS`.
        device_type: type of a torch device, such as 'cpu' or 'cuda'.

    Returns:
        'torch', 'c', 'triton' or 'mamba_ssm'.

    Raises:
        SpecError: if *scan* is unknown, or asks for a form that cannot run there.
    """
    check_scan(scan)
    if scan == 'auto':
        fastest = _FASTEST.get(device_type, 'torch')
        reason = None if fastest == 'torch' else _unavailable(fastest)
        if reason is None:
            return fastest
        warnings.warn(
            f'the selective scan runs in plain PyTorch on {device_type}, several times '
            f'slower than its form {fastest!r}, which is not available: {reason}. '
            f'To get it, {_REMEDIES[fastest]}',
            stacklevel=2,
        )
        return 'torch'
    if scan != 'torch':
        device = _module(scan).DEVICE
        if device != device_type:
            raise SpecError(
                f'scan={scan!r} runs on {device}, but the tensors are on '
                f"{device_type}: set scan='auto' or move the model"
            )
    return scan


@functools.cache
def tell_cost_of_gradients(scan: str, device_type: str) -> None:
    """Warn, once in a process, if gradients take another form than features do."""
    fastest = resolve_scan(scan, device_type)
    if fastest in ('c', 'triton'):
        warnings.warn(
            'a forward pass that needs gradients runs the selective scan in plain '
            f'PyTorch, as the form {fastest!r} has none: on the CPU about 4 times the '
            'time of inference, 10 times with the backward pass, and more memory. If '
            'features alone are wanted, call it under torch.no_grad() or freeze the '
            'model with requires_grad_(False)',
            stacklevel=5,
        )


def check_scan(scan: str) -> None:
    """Raise SpecError unless *scan* is known and, if it names a form, can run here."""
    if scan not in SCANS:
        raise SpecError(f'scan={scan!r} is unknown: choose one of {", ".join(SCANS)}')
    reason = _unavailable(scan) if scan in _MODULES else None
    if reason is not None:
        raise SpecError(
            f"scan={scan!r} is not available: {reason}. Set scan='auto', or "
            f'{_REMEDIES[scan]}'
        )


def scan_form(scan: str, device_type: str) -> ScanForm:
    """Give the functions of the form that :func:`resolve_scan` names."""
    return _loaded[_load(scan, device_type)]


# torch.compile takes the name as a constant, and does not trace how it was found.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _load(scan: str, device_type: str) -> str:
    name = resolve_scan(scan, device_type)
    if name not in _loaded:
        module = torch_form if name == 'torch' else _module(name)
        _loaded[name] = ScanForm(module.selective_scan, module.causal_conv)
    return name


def _unavailable(name: str) -> str | None:
    try:
        reason: str | None = _module(name).unavailable()
    except ImportError as error:
        return str(error)
    return reason


def _module(name: str) -> Any:
    return importlib.import_module(_MODULES[name])
