"""The selective scan and the causal convolution in Triton, for CUDA GPUs.

A program of the scan is one warp. It walks along the tokens of one sequence, in one
direction, with 32 channels: a lane owns a channel and holds its states in registers, so
that neither the recurrence nor the sum over states leaves the lane. The tokens to come
are copied to shared memory meanwhile. The exponential of each token, channel and state
bounds the time; softplus, skip connection and gate come along with it, and the reverse
direction is an index, so that every tensor is read and written once.

One sequence alone would leave most of a GPU idle: the 2176 tokens of the first stage of
one 512-px image make 12 programs, and an H100 has room for over a thousand. When there
are few programs, sequences are therefore cut into chunks: a first pass finds what each
chunk adds to the state, and the second starts each chunk from what those before it
leave. That takes the exponentials twice, so large batches are done in one pass. Which
of the two runs changes the results by rounding only.
"""

# Triton types the arguments of its functions by what a launch gives them.
# ruff: noqa: ANN001, ANN202
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import math
import os
import subprocess

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynamicvis_geo.models.scan import (
    check_conv_shapes,
    check_scan_shapes,
    conv_operator,
    scan_operator,
)

_INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
#: The type of device that these kernels run on; the CPU under TRITON_INTERPRET=1, where
#: they take the place of those in C if they are imported after them.
DEVICE = 'cpu' if _INTERPRETED else 'cuda'
_CHANNELS = 32
# States times tokens that a lane works on at once: enough to overlap their latencies,
# and few enough for the registers, of which three warps a scheduler leave 168 each
# (nothing spilled on sm_80 and sm_90).
_ELEMENTS = 64
_REGISTERS = 168
# States of a lane; more are shared out among warps.
_STATES = 32
_CONV_TOKENS, _CONV_CHANNELS = 32, 64
_LOG2_E = tl.constexpr(math.log2(math.e))
# Programs for each multiprocessor: with _BUSY, one pass keeps its four schedulers at
# work; _FULL is what chunks aim at.
_BUSY, _FULL = 4, 8


def unavailable() -> str | None:
    """Tell what keeps these kernels from running here.

    Returns:
        The reason; None if they can run.
    """
    if _INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return 'PyTorch finds no CUDA GPU'
    if torch.cuda.get_device_capability() < (7, 0):
        name = torch.cuda.get_device_name()
        return f'Triton needs compute capability 7.0, which {name} has not'
    try:
        # Triton builds its launcher with the C compiler of the machine.
        triton.runtime.driver.active.get_current_target()
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        return f'Triton does not start ({error})'
    return None


def count_chunks(programs: int, length: int, processors: int) -> int:
    """Count the chunks into which a sequence is cut, 1 for one pass.

    Args:
        programs: programs that one pass would launch.
        length: tokens.
        processors: multiprocessors of the GPU.

    Returns:
        1, or 3 and more.
    """
    if programs >= _BUSY * processors:
        return 1
    # Each chunk looks at all that precede it, so their number and their length together
    # are least at the square root. Two chunks gain nothing over one pass.
    chunks = min(_FULL * processors // programs, math.isqrt(length))
    return chunks if chunks > 2 else 1


def launch_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    gate: Tensor | None,
) -> Tensor:
    """Run the kernels of the scan.

    Args:
        u: input, ``[K, B, L, I]``.
        dt: time steps before bias and softplus, ``[K, B, L, I]``.
        A: decay rates, ``[I, N]``.
        B: input projection, ``[K, B, L, N]``.
        C: output projection, ``[K, B, L, N]``.
        D: skip connection, ``[I]``.
        dt_bias: bias of the time steps, ``[I]``.
        gate: gate before SiLU, ``[B, L, I]``; None leaves the result as it is.

    Returns:
        ``[K, B, L, I]`` in the dtype of *u*.
    """
    directions, batch, length, channels = u.shape
    states = A.shape[1]
    out = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    if out.numel() == 0:
        return out
    # Rows of B and C in 16 bits are rarely aligned to the 4 bytes that a copy ahead of
    # time needs; as float32 they are, and they are small.
    u, dt = _rows(u), _rows(dt)
    A, B, C, D, dt_bias = (_rows(t.float()) for t in (A, B, C, D, dt_bias))
    gate = None if gate is None else _rows(gate)
    padded = triton.next_power_of_2(states)
    sequences, blocks = directions * batch, triton.cdiv(channels, _CHANNELS)
    programs, processors = sequences * blocks, _processors(u.device)
    chunks = count_chunks(programs, length, processors)
    width, elements = _CHANNELS, _ELEMENTS
    if chunks == 1 and programs < _FULL * processors:
        # Two lanes share the states of a channel, so that more warps have work.
        width, elements = _CHANNELS // 2, 2 * _ELEMENTS
        blocks = triton.cdiv(channels, width)
    tile = max(1, elements // padded)
    chunk = tile * triton.cdiv(length, chunks * tile)
    chunks = triton.cdiv(length, chunk)
    # What the first pass leaves for the second: for each chunk, the state that it adds,
    # and the sum of its time steps.
    carried = chunks if chunks > 1 else 0
    added = A.new_empty(sequences, carried, states, channels)
    spans = A.new_empty(sequences, carried, channels)
    with torch.cuda.device_of(u):
        for output in (False, True) if carried else (True,):
            _scan_kernel[(sequences, blocks, chunks)](
                *(u, dt, A.contiguous(), B, C, D, dt_bias, gate, out, added, spans),
                *(batch, length, channels, states, chunk),
                *(s for t in (u, dt, B, C) for s in t.stride()[:3]),
                *((0, 0) if gate is None else gate.stride()[:2]),
                OUTPUT=output,
                TILE=tile,
                STATES=padded,
                CHANNELS=width,
                num_warps=max(1, min(padded // _STATES, 16)),
                maxnreg=_REGISTERS,
            )
    return out


@scan_operator.register_kernel(DEVICE)
def _selective_scan(*tensors: Tensor) -> Tensor:
    check_scan_shapes(*tensors)
    return launch_scan(*tensors)


def launch_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, directions: int
) -> Tensor:
    """Run the kernel of the convolution.

    Args:
        x: ``[B, L, I]``.
        weight: ``[I, 1, taps]``.
        bias: ``[I]`` or None.
        directions: 1 or 2.

    Returns:
        ``[directions, B, L, I]`` in the dtype of *x*.
    """
    batch, length, channels = x.shape
    taps = weight.shape[-1]
    out = torch.empty((directions, *x.shape), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    x = _rows(x)
    blocks = triton.cdiv(channels, _CONV_CHANNELS)
    with torch.cuda.device_of(x):
        _conv_kernel[(triton.cdiv(length, _CONV_TOKENS), blocks, batch)](
            *(x, weight, bias, out),
            *(batch, length, channels, *x.stride()[:2]),
            *(weight.stride(0), weight.stride(2)),
            DIRECTIONS=directions,
            TAPS=taps,
            TILE=_CONV_TOKENS,
            CHANNELS=_CONV_CHANNELS,
        )
    return out


@conv_operator.register_kernel(DEVICE)
def _causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, directions: int
) -> Tensor:
    check_conv_shapes(x, weight, bias, directions)
    return launch_conv(x, weight, bias, directions)


@triton.jit(do_not_specialize=['batch'])
def _scan_kernel(
    u,
    dt,
    A,
    B,
    C,
    D,
    dt_bias,
    gate,
    out,
    added,
    spans,
    batch,
    length,
    channels,
    states,
    chunk,
    u_direction,
    u_sample,
    u_token,
    dt_direction,
    dt_sample,
    dt_token,
    B_direction,
    B_sample,
    B_token,
    C_direction,
    C_sample,
    C_token,
    gate_sample,
    gate_token,
    OUTPUT: tl.constexpr,
    TILE: tl.constexpr,
    STATES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Scan one chunk of one sequence with CHANNELS channels.

    Without OUTPUT, from a state of zero, it stores the last state and the sum of the
    time steps; with OUTPUT, from the state that the chunks before it leave, it stores
    the output. Tiles are [TILE tokens, STATES, CHANNELS].
    """
    sequence = tl.program_id(0).to(tl.int64)
    part = tl.program_id(2).to(tl.int64)
    direction, sample = sequence // batch, sequence % batch
    i = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    j = tl.arange(0, STATES)
    row = tl.arange(0, TILE)
    has_i, has_j = i < channels, j < states
    has_ji = has_j[:, None] & has_i[None, :]
    rate = tl.load(A + i[None, :] * states + j[:, None], has_ji, 0.0)
    rate *= _LOG2_E  # exp2 is the exponential that the hardware has
    bias = tl.load(dt_bias + i, has_i, 0.0)
    skip = tl.load(D + i, has_i, 0.0)
    u += direction * u_direction + sample * u_sample + i[None, :]
    dt += direction * dt_direction + sample * dt_sample + i[None, :]
    B += direction * B_direction + sample * B_sample + j[None, :]
    C += direction * C_direction + sample * C_sample + j[None, :]
    if gate is not None:
        gate += sample * gate_sample + i[None, :]
    out += sequence * length * channels + i[None, :]
    spans += sequence * tl.num_programs(2) * channels + i
    added += sequence * tl.num_programs(2) * states * channels
    added += j[:, None] * channels + i[None, :]

    state = tl.zeros([STATES, CHANNELS], tl.float32)
    span = tl.zeros([CHANNELS], tl.float32)
    if OUTPUT:
        for before in tl.range(0, part, num_stages=4):
            elapsed = tl.load(spans + before * channels, has_i, 0.0)
            more = tl.load(added + before * states * channels, has_ji, 0.0)
            state = tl.exp2(elapsed[None, :] * rate) * state + more
    stop = tl.minimum((part + 1) * chunk, length)
    for start in tl.range(part * chunk, stop, TILE, num_stages=3):
        has_t = start + row < stop
        token = direction * (length - 1) + (1 - 2 * direction) * (start + row)
        has_ti = has_t[:, None] & has_i[None, :]
        has_tj = has_t[:, None] & has_j[None, :]
        x = tl.load(u + token[:, None] * u_token, has_ti, 0.0).to(tl.float32)
        step = tl.load(dt + token[:, None] * dt_token, has_ti, 0.0).to(tl.float32)
        b = tl.load(B + token[:, None] * B_token, has_tj, 0.0)
        # A step of zero keeps the state as it is, so rows past the end change nothing.
        step = tl.where(has_t[:, None], _softplus(step + bias[None, :]), 0.0)
        decay = tl.exp2(step[:, None, :] * rate[None, :, :])
        drive = (step * x)[:, None, :] * b[:, :, None]
        # The state enters with the first token. That leaves the decays of the scan
        # unused, and the compiler one multiply-add for each token.
        first = (row == 0)[:, None, None]
        drive = tl.where(first, decay * state[None, :, :] + drive, drive)
        _, s = tl.associative_scan((decay, drive), 0, _follow)
        state = tl.sum(tl.where((row == TILE - 1)[:, None, None], s, 0.0), 0)
        if OUTPUT:
            c = tl.load(C + token[:, None] * C_token, has_tj, 0.0)
            y = tl.sum(s * c[:, :, None], 1) + skip[None, :] * x
            if gate is not None:
                z = tl.load(gate + token[:, None] * gate_token, has_ti, 0.0)
                y *= silu(z.to(tl.float32))
            tl.store(
                out + token[:, None] * channels, y.to(out.dtype.element_ty), has_ti
            )
        else:
            span += tl.sum(step, 0)
    if not OUTPUT:
        tl.store(added + part * states * channels, state, has_ji)
        tl.store(spans + part * channels, span, has_i)


# Another batch size must not compile anew: it is no constant, and no multiple of 16.
@triton.jit(do_not_specialize=['batch'])
def _conv_kernel(
    x,
    weight,
    bias,
    out,
    batch,
    length,
    channels,
    x_sample,
    x_token,
    weight_channel,
    weight_tap,
    DIRECTIONS: tl.constexpr,
    TAPS: tl.constexpr,
    TILE: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Convolve a [TILE, CHANNELS] piece of one sequence, in all directions."""
    sample = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    i = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    has_i = i < channels
    x += sample * x_sample + i[None, :]
    weight += i * weight_channel
    total = tl.zeros([TILE, CHANNELS], tl.float32)
    if bias is not None:
        total += tl.load(bias + i, has_i, 0.0).to(tl.float32)[None, :]
    forward, reverse = total, total
    for offset in tl.static_range((TAPS - 1) * DIRECTIONS + 1):
        source = token + (offset - (TAPS - 1))
        inside = (source >= 0) & (source < length)
        window = tl.load(
            x + source[:, None] * x_token, inside[:, None] & has_i[None, :], 0.0
        ).to(tl.float32)
        if offset < TAPS:
            factor = tl.load(weight + offset * weight_tap, has_i, 0.0)
            forward += window * factor.to(tl.float32)[None, :]
        if offset >= TAPS - 1:
            mirrored = 2 * (TAPS - 1) - offset
            factor = tl.load(weight + mirrored * weight_tap, has_i, 0.0)
            reverse += window * factor.to(tl.float32)[None, :]
    out += (sample * length + token[:, None]) * channels + i[None, :]
    has = (token < length)[:, None] & has_i[None, :]
    tl.store(out, silu(forward).to(out.dtype.element_ty), has)
    if DIRECTIONS == 2:
        out += batch.to(tl.int64) * length * channels
        tl.store(out, silu(reverse).to(out.dtype.element_ty), has)


@triton.jit
def _follow(decay_1, state_1, decay_2, state_2):
    """Join two runs of tokens, each of which multiplies the state and adds to it."""
    return decay_1 * decay_2, decay_2 * state_1 + state_2


@triton.jit
def silu(x):  # noqa: ANN201
    """Multiply a block by its logistic function.

    Args:
        x: float32.

    Returns:
        The same shape.
    """
    return x / (1 + tl.exp2(-x * _LOG2_E))


@triton.jit
def _softplus(x):
    """max(x, 0) + log1p(e) with e = exp(-|x|), also where e is far below 1's precision.

    log1p(e) = 2 artanh(w) with w = e / (2 + e) <= 1/3: seven terms of its power series
    leave a relative error below 2e-8.
    """
    e = tl.exp2(-tl.abs(x) * _LOG2_E)
    w = e / (2 + e)
    square = w * w
    series = square * (1 / 13) + 1 / 11
    series = series * square + 1 / 9
    series = series * square + 1 / 7
    series = series * square + 1 / 5
    series = series * square + 1 / 3
    series = series * square + 1
    return tl.maximum(x, 0.0) + 2 * w * series


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _processors(device: torch.device) -> int:
    if device.type != 'cuda':
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
