"""The selective scan and the causal convolution in C, for the CPU.

``_scan.c`` is compiled for the wheel for Linux, and when the package is installed from
its source, if there is a compiler. It is a plain shared library, loaded with ctypes,
and so fits any version of Python and PyTorch.
"""

import ctypes
import functools
import importlib.util
import os
import sys
import threading
from ctypes import c_int64, c_uint, c_void_p

import torch
from torch import Tensor

from dynamicvis_geo.models.scan import (
    check_conv_shapes,
    check_scan_shapes,
    conv_operator,
    scan_operator,
)

#: The type of device that these kernels run on.
DEVICE = 'cpu'
INSTRUCTION_SETS = ('baseline', 'avx2', 'avx512')
# As in _scan.c: a library that was built from another version of it is not called.
_VERSION = 2
_LANES, _TILE = 16, 32

_forked = False


class _Rows(ctypes.Structure):
    _fields_ = (
        ('data', c_void_p),
        ('direction', c_int64),
        ('sample', c_int64),
        ('token', c_int64),
    )


class _Scan(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ('directions', 'batch', 'length', 'channels')),
        *((name, c_int64) for name in ('states', 'bf16', 'next', 'failed')),
        *((name, _Rows) for name in ('u', 'dt', 'b', 'c', 'gate', 'out')),
        *((name, c_void_p) for name in ('a', 'd', 'dt_bias')),
    )


class _Conv(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ('directions', 'batch', 'length', 'channels')),
        *((name, c_int64) for name in ('taps', 'bf16', 'next', 'failed')),
        *((name, _Rows) for name in ('x', 'out')),
        *((name, c_void_p) for name in ('weight', 'bias')),
    )


def unavailable() -> str | None:
    """Tell what keeps these kernels from running here.

    Returns:
        The reason; None if they can run.
    """
    try:
        _library()
    except OSError as error:
        return str(error)
    return None


@functools.cache
def instruction_set() -> str:
    """Name the best of :data:`INSTRUCTION_SETS` that this processor has.

    Returns:
        One of them.
    """
    return INSTRUCTION_SETS[_library().instruction_sets() - 1]


@scan_operator.register_kernel('cpu')
def _selective_scan(*tensors: Tensor) -> Tensor:
    check_scan_shapes(*tensors)
    u, dt, A, B, C, D, dt_bias, gate = tensors
    directions, batch, length, channels = u.shape
    states = A.shape[1]
    dtype = _storage(u)
    u_, dt_, B_, C_, gate_ = (_rows(t, dtype) for t in (u, dt, B, C, gate))
    A_, D_, dt_bias_ = (t.to(torch.float32).contiguous() for t in (A, D, dt_bias))
    out = torch.empty(u.shape, dtype=dtype)
    arguments = _Scan(
        *(directions, batch, length, channels),
        *(states, int(dtype == torch.bfloat16), 0, 0),
        *(_describe(t) for t in (u_, dt_, B_, C_)),
        *(_describe(gate_[None]), _describe(out)),
        *(t.data_ptr() for t in (A_, D_, dt_bias_)),
    )
    _run('scan', arguments, directions * batch * -(-channels // _LANES))
    return out.to(u.dtype)


@conv_operator.register_kernel('cpu')
def _causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, directions: int
) -> Tensor:
    batch, length, channels = x.shape
    taps = weight.shape[-1]
    check_conv_shapes(x, weight, bias, directions)
    dtype = _storage(x)
    x_ = _rows(x, dtype)
    weight_ = weight[:, 0].T.to(torch.float32).contiguous()
    bias_ = torch.zeros(channels) if bias is None else bias.float().contiguous()
    out = torch.empty((directions, *x.shape), dtype=dtype)
    arguments = _Conv(
        *(directions, batch, length, channels),
        *(taps, int(dtype == torch.bfloat16), 0, 0),
        *(_describe(x_[None]), _describe(out)),
        *(weight_.data_ptr(), bias_.data_ptr()),
    )
    _run('conv', arguments, batch * -(-length // _TILE))
    return out.to(x.dtype)


def _storage(x: Tensor) -> torch.dtype:
    return torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    x = x.to(dtype)
    return x if x.stride(-1) == 1 else x.contiguous()


def _describe(x: Tensor) -> _Rows:
    return _Rows(x.data_ptr(), x.stride(0), x.stride(1), x.stride(2))


def _run(name: str, arguments: ctypes.Structure, pieces: int) -> None:
    """Run the workers, on the threads of PyTorch where these can be had.

    Threads of our own beside those would compete with them for the cores, since OpenMP
    keeps its threads spinning for a while after each operation.
    """
    worker = getattr(_library(), f'{name}_{instruction_set()}')
    threads = 1 if _forked else min(torch.get_num_threads(), pieces)
    pointer = ctypes.byref(arguments)
    parallel = _openmp() if threads > 1 else None
    if threads <= 1:
        worker(pointer)
    elif parallel is not None:
        parallel(worker, pointer, threads, 0)
    else:
        helpers = [
            threading.Thread(target=worker, args=(pointer,)) for _ in range(threads - 1)
        ]
        for helper in helpers:
            helper.start()
        worker(pointer)
        for helper in helpers:
            helper.join()
    if arguments.failed:
        raise MemoryError('no memory for the working space of a thread')


@functools.cache
def _library() -> ctypes.CDLL:
    spec = importlib.util.find_spec('dynamicvis_geo.models._scan')
    if spec is None or spec.origin is None:
        raise OSError('the package was installed without it')
    library = ctypes.CDLL(spec.origin)
    version = library.version()
    if version != _VERSION:
        raise OSError(
            f'{spec.origin} was built from another version of the package '
            f'({version}, not {_VERSION})'
        )
    return library


@functools.cache
def _openmp() -> 'ctypes._NamedFuncPointer | None':
    """Find the entry of the OpenMP library that PyTorch has loaded, on Linux."""
    if sys.platform != 'linux':
        return None
    function = getattr(ctypes.CDLL(None), 'GOMP_parallel', None)
    if function is not None:
        function.argtypes = (c_void_p, c_void_p, c_uint, c_uint)
        function.restype = None
    return function


def _note_fork() -> None:
    """OpenMP's threads do not survive a fork, and waiting for them would never end."""
    global _forked
    _forked = True


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=_note_fork)
