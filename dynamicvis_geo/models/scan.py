"""The selective scan of Mamba (arXiv 2312.00752, section 3) and its convolution.

Both are written here in plain PyTorch, which runs anywhere, in float64, and with
gradients. Both are operators of PyTorch as well, ``dynamicvis_geo::...``, to which
``scan_c.py`` adds a kernel for CPUs and ``scan_triton.py`` one for CUDA; PyTorch's
dispatcher chooses by the device of the tensors. A program that ``torch.export`` saved
needs the module of its device imported where it runs.

Every tensor is channel-last, ``[directions, B, L, channels]``: direction 0 walks the
sequence from its first token to its last, direction 1 from its last to its first. Both
take and give the tokens in their own order, so no flipped copy ever leaves this module.
"""

import functools
import importlib
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.models.config import SCANS

_MODULES = {
    'c': 'dynamicvis_geo.models.scan_c',
    'triton': 'dynamicvis_geo.models.scan_triton',
}
_FASTEST = {'cpu': 'c', 'cuda': 'triton'}
_REMEDIES = {
    'c': 'install a C compiler (gcc, clang, or the Visual C++ build tools) and then '
    'dynamicvis-geo again from its source, with pip install --force-reinstall '
    '--no-deps --no-cache-dir --no-binary=dynamicvis-geo dynamicvis-geo',
    'triton': 'install triton (pip install triton), which needs a CUDA GPU and comes '
    'with PyTorch on Linux',
}
# The states of all chunks are updated together, so they should stay in the cache of a
# core while being large enough to hide the cost of launching an operation.
_STATE_ELEMENTS = 1 << 17


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
    """Run the selective state-space recurrence, its skip connection and its gate.

    For each channel ``i`` and state ``j``, starting from zero, with
    ``d = softplus(dt + dt_bias)``::

        s[t, i, j] = exp(d[t, i] * A[i, j]) * s[t-1, i, j] + d[t, i] * B[t, j] * u[t, i]
        y[t, i] = (sum_j C[t, j] * s[t, i, j] + D[i] * u[t, i]) * silu(gate[t, i])

    Args:
        u: input, ``[K, B, L, I]`` for K = 1 or 2 directions.
        dt: time steps before bias and softplus, ``[K, B, L, I]``.
        A: decay rates, negative, float32 ``[I, N]``.
        B: input projection, ``[K, B, L, N]``.
        C: output projection, ``[K, B, L, N]``.
        D: skip connection, ``[I]``.
        dt_bias: bias of the time steps, ``[I]``.
        gate: gate before SiLU, shared by the directions, ``[B, L, I]``.

    Returns:
        ``[K, B, L, I]`` in the dtype of *u*; all arithmetic is float32 (float64 if *u*
        is float64), also under autocast.
    """
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    with torch.autocast(u.device.type, enabled=False):
        x = u.to(dtype)
        step = F.softplus(dt.to(dtype) + dt_bias.to(dtype))
        y = _run_directions(step, step * x, A.to(dtype), B.to(dtype), C.to(dtype))
        y = torch.addcmul(y, x, D.to(dtype))
        return (y * F.silu(gate.to(dtype))).to(u.dtype)


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, directions: int
) -> Tensor:
    """Depthwise causal convolution along the sequence, then SiLU.

    In direction 1 the past of a token is what follows it.

    Args:
        x: ``[B, L, I]``.
        weight: one filter a channel, ``[I, 1, taps]``; the last tap is the token's own.
        bias: ``[I]`` or None.
        directions: 1 or 2.

    Returns:
        ``[directions, B, L, I]``.
    """
    taps = weight.shape[-1]
    length = x.shape[1]
    filters = weight[:, 0].to(x.dtype).unbind(-1)
    padded = F.pad(x, (0, 0, taps - 1, taps - 1))
    outputs = []
    for direction in range(directions):
        offsets = range(taps) if direction == 0 else range(2 * taps - 2, taps - 2, -1)
        shifted = [padded[:, offset : offset + length] for offset in offsets]
        total = shifted[0] * filters[0]
        for window, tap in zip(shifted[1:], filters[1:], strict=True):
            total = torch.addcmul(total, window, tap)
        outputs.append(total if bias is None else total + bias.to(x.dtype))
    return F.silu(torch.stack(outputs))


scan_operator = torch.library.custom_op(
    'dynamicvis_geo::selective_scan', selective_scan, mutates_args=()
)
conv_operator = torch.library.custom_op(
    'dynamicvis_geo::causal_conv', causal_conv, mutates_args=()
)


@scan_operator.register_fake
def _(u: Tensor, *_: Tensor) -> Tensor:
    return u.new_empty(u.shape)


@conv_operator.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, directions: int) -> Tensor:
    return x.new_empty((directions, *x.shape))


def run_scan(scan: str, *tensors: Tensor) -> Tensor:
    """Run :func:`selective_scan` by a kernel.

    float64 tensors, and tensors that need gradients, take PyTorch's.

    Args:
        scan: one of :data:`~dynamicvis_geo.models.config.SCANS`.
        *tensors: the arguments of :func:`selective_scan`.

    Returns:
        ``[K, B, L, I]`` in the dtype of the first.

    Raises:
        SpecError: if the kernel cannot run on the device of the tensors.
        ValueError: if the shapes do not fit each other.
    """
    if _runs_in_pytorch(scan, *tensors):
        return selective_scan(*tensors)
    y: Tensor = scan_operator(*tensors)
    return y


def run_conv(
    scan: str, x: Tensor, weight: Tensor, bias: Tensor | None, directions: int
) -> Tensor:
    """Run :func:`causal_conv` by a kernel, as :func:`run_scan` does the scan.

    Args:
        scan: one of :data:`~dynamicvis_geo.models.config.SCANS`.
        x: ``[B, L, I]``.
        weight: one filter a channel, ``[I, 1, taps]``.
        bias: ``[I]`` or None.
        directions: 1 or 2.

    Returns:
        ``[directions, B, L, I]``.

    Raises:
        SpecError: if the kernel cannot run on the device of the tensors.
        ValueError: if the shapes do not fit each other.
    """
    if _runs_in_pytorch(scan, x, weight, bias):
        return causal_conv(x, weight, bias, directions)
    y: Tensor = conv_operator(x, weight, bias, directions)
    return y


def _runs_in_pytorch(scan: str, x: Tensor, *others: Tensor | None) -> bool:
    return (
        _kernel(scan, x.device.type) == 'torch'
        or x.dtype == torch.float64
        or needs_gradients((x, *others))
    )


def unavailable_kernels() -> dict[str, str | None]:
    """List all kernels, and what keeps each from running on this machine.

    Returns:
        A reason by the name of the kernel; None if it can run.
    """
    return {'torch': None} | {name: _unavailable(name) for name in _MODULES}


def check_scan(scan: str) -> None:
    """Refuse a kernel that is unknown, or cannot run on this machine.

    Args:
        scan: 'auto', or the name of a kernel.

    Raises:
        SpecError: if it is refused; it says what to do.
    """
    if scan not in SCANS:
        raise SpecError(f'scan={scan!r} is unknown: choose one of {", ".join(SCANS)}')
    reason = _unavailable(scan) if scan in _MODULES else None
    if reason is not None:
        raise SpecError(
            f"scan={scan!r} is not available: {reason}. Set scan='auto', or "
            f'{_REMEDIES[scan]}'
        )


@functools.cache
def resolve_scan(scan: str, device_type: str) -> str:
    """Name the kernel that runs on a device.

    Warns, once in a process, if 'auto' has to take PyTorch's on a CPU or CUDA GPU.

    Args:
        scan: one of :data:`~dynamicvis_geo.models.config.SCANS`.
        device_type: type of a torch device, such as 'cpu' or 'cuda'.

    Returns:
        'torch', 'c' or 'triton'.

    Raises:
        SpecError: if *scan* is unknown, or names a kernel that cannot run there.
    """
    check_scan(scan)
    if scan == 'auto':
        fastest = _FASTEST.get(device_type, 'torch')
        reason = None if fastest == 'torch' else _unavailable(fastest)
        if reason is None:
            return fastest
        warnings.warn(
            f'the selective scan runs in plain PyTorch on {device_type}, several times '
            f'slower than the kernel {fastest!r}, which is not available: {reason}. '
            f'To get it, {_REMEDIES[fastest]}',
            stacklevel=2,
        )
        return 'torch'
    device = device_type if scan == 'torch' else _module(scan).DEVICE
    if device != device_type:
        raise SpecError(
            f'scan={scan!r} runs on {device}, but the tensors are on '
            f"{device_type}: set scan='auto' or move the model"
        )
    return scan


@functools.cache
def tell_cost_of_gradients(scan: str, device_type: str) -> None:
    """Warn, once for each kernel, if gradients take another one than features do.

    Args:
        scan: one of :data:`~dynamicvis_geo.models.config.SCANS`.
        device_type: type of a torch device, such as 'cpu' or 'cuda'.
    """
    fastest = resolve_scan(scan, device_type)
    if fastest != 'torch':
        warnings.warn(
            'a forward pass that needs gradients runs the selective scan in plain '
            f'PyTorch, as the kernel {fastest!r} has none: on the CPU about 4 times '
            'the time of inference, 10 times with the backward pass, and more memory. '
            'If features alone are wanted, call it under torch.no_grad() or freeze the '
            'model with requires_grad_(False)',
            stacklevel=5,
        )


def _kernel(scan: str, device_type: str) -> str:
    return resolve_scan(scan, device_type)


# torch.compile takes the name as a constant, and does not trace how it was found. This
# is what torch.compiler.assume_constant_result does, after an import of two seconds.
_kernel._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _unavailable(kernel: str) -> str | None:
    try:
        reason: str | None = _module(kernel).unavailable()
    except ImportError as error:
        return str(error)
    return reason


def _module(kernel: str) -> Any:
    """Import the module of a kernel, which registers it with the operators."""
    return importlib.import_module(_MODULES[kernel])


def needs_gradients(tensors: Sequence[Tensor | None]) -> bool:
    """Decide if a result of these tensors has to be differentiable.

    Args:
        tensors: arguments of an operation; None counts as none.

    Returns:
        True if gradients are on, and one of them requires some.
    """
    return torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in tensors
    )


def check_scan_shapes(*tensors: Tensor) -> None:
    """Refuse arguments of a scan whose shapes do not fit each other.

    Args:
        *tensors: the arguments of :func:`selective_scan`.

    Raises:
        ValueError: if they do not.
    """
    (directions, batch, length, channels), states = (
        tensors[0].shape,
        tensors[2].shape[1],
    )
    large = directions, batch, length, channels
    small = directions, batch, length, states
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if directions > 2 or shapes != [
        *(large, large, (channels, states), small, small),
        *((channels,), (channels,), (batch, length, channels)),
    ]:
        raise ValueError(f'shapes {shapes} do not fit each other')


def check_conv_shapes(
    x: Tensor, weight: Tensor, bias: Tensor | None, directions: int
) -> None:
    """Refuse arguments of a convolution whose shapes do not fit each other.

    Args:
        x: ``[B, L, I]``.
        weight: ``[I, 1, taps]``.
        bias: ``[I]`` or None.
        directions: 1 or 2.

    Raises:
        ValueError: if they do not.
    """
    channels, taps = x.shape[-1], weight.shape[-1]
    if (
        directions not in (1, 2)
        or weight.shape != (channels, 1, taps)
        or (bias is not None and bias.shape != (channels,))
    ):
        raise ValueError(
            f'{directions} directions, weight {tuple(weight.shape)} and its bias do '
            f'not fit x {tuple(x.shape)}'
        )


def _run_directions(dt: Tensor, x: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Turn direction 1 round, scan all sequences as one batch, turn it back."""
    turned = [_turn_second(t).flatten(0, 1) for t in (dt, x, B, C)]
    y = _chunked_scan(turned[0], turned[1], A, turned[2], turned[3])
    return _turn_second(y.unflatten(0, dt.shape[:2]))


def _turn_second(x: Tensor) -> Tensor:
    return x if x.shape[0] == 1 else torch.stack([x[0], x[1].flip(1)])


def _chunked_scan(dt: Tensor, x: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Scan ``[S, L, I]`` sequences in chunks that advance side by side.

    The first pass finds the state that each chunk adds, the carry makes from these the
    state in which each chunk starts, and the second pass runs from there. No product of
    decays is ever divided by another, so strong decays cannot underflow a quotient.
    """
    sequences, length, channels = x.shape
    states = A.shape[1]
    elements = max(1, sequences * states * channels)
    chunks = max(1, min(length, _STATE_ELEMENTS // elements))
    steps = max(1, -(-length // chunks))
    chunks = -(-length // steps)

    # A step of zero keeps the state as it is, so padding changes nothing.
    padding = (0, 0, 0, chunks * steps - length)
    dt, x, B, C = (
        F.pad(t, padding).unflatten(1, (chunks, steps)) for t in (dt, x, B, C)
    )
    A = A.T.contiguous()
    tracked = needs_gradients((dt, x, A, B, C))
    buffer = None if tracked else x.new_empty(sequences, chunks, states, channels)

    def advance(state: Tensor, t: int) -> Tensor:
        decay = torch.mul(dt[:, :, t, None], A, out=buffer).exp_()
        drive = x[:, :, t, None], B[:, :, t, :, None]
        if tracked:
            return torch.addcmul(state * decay, *drive)
        return state.mul_(decay).addcmul_(*drive)

    state = x.new_zeros(sequences, chunks, states, channels)
    if chunks > 1:
        for t in range(steps):
            state = advance(state, t)
        state = _carry(state, torch.exp(dt.sum(2)[:, :, None] * A))
    outputs = []
    for t in range(steps):
        state = advance(state, t)
        outputs.append(torch.matmul(C[:, :, t, None], state).squeeze(2))
    return torch.stack(outputs, dim=2).flatten(1, 2)[:, :length]


def _carry(added: Tensor, decay: Tensor) -> Tensor:
    """Give the state in which each chunk starts, ``[S, chunks, N, I]``."""
    start = [torch.zeros_like(added[:, 0])]
    for chunk in range(added.shape[1] - 1):
        start.append(torch.addcmul(added[:, chunk], decay[:, chunk], start[-1]))
    return torch.stack(start, dim=1)
