"""The selective scan of Mamba (arXiv 2312.00752, section 3), in plain PyTorch.

The faster forms, one module each, compute the same and are chosen in ``scan_forms.py``.

Every tensor is channel-last, ``[directions, B, L, channels]``: direction 0 walks the
sequence from its first token to its last, direction 1 from its last to its first. Both
take and give the tokens in their own order, so no flipped copy ever leaves this module.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

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


def needs_gradients(tensors: Sequence[Tensor | None]) -> bool:
    """Say whether a result of these tensors has to be differentiable."""
    return torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in tensors
    )


def check_scan_shapes(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    gate: Tensor,
) -> None:
    """Raise ValueError unless a kernel can run on the arguments of a scan."""
    directions, batch, length, channels = u.shape
    states = A.shape[1]
    small = directions, batch, length, states
    shapes = [tuple(t.shape) for t in (dt, A, B, C, D, dt_bias, gate)]
    if directions > 2 or shapes != [
        tuple(u.shape),
        (channels, states),
        small,
        small,
        (channels,),
        (channels,),
        (batch, length, channels),
    ]:
        raise ValueError(f'shapes {tuple(u.shape)}, {shapes} do not fit each other')


def check_conv_shapes(
    x: Tensor, weight: Tensor, bias: Tensor | None, directions: int
) -> None:
    """Raise ValueError unless a kernel can run on the arguments of a convolution."""
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
