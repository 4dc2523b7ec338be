"""The convolution of overlapping patches on CUDA, in float32 by matrix units.

A float32 is the sum of two numbers that TF32 holds, but for its last bits. Three TF32
products of such parts, high by high, high by low and low by high, leave an error near
that of one float32 product, and take half the time of float32 arithmetic on an H100.
Matrix units truncate as they add up, so a run of them is kept short: each block of
patches is summed by itself and then added in float32. (On an H100 the result was
4e-7 from float64, in relative L2, and cuDNN's float32 convolution 5e-7 to 1e-6.)
"""

# Triton types the arguments of its functions by what a launch gives them.
# ruff: noqa: ANN001, ANN202
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

# They take 80 to 96 KiB of shared memory; every GPU since sm_80 has 99.
_TOKENS, _OUTPUTS, _CHUNK, _STAGES, _WARPS = 128, 64, 32, 3, 8
_TF32_MASK = tl.constexpr(-(1 << 13))


def split_filters(conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """Split filters into a high and a low part, in the order that the kernel takes.

    Args:
        conv: the convolution.

    Returns:
        High and low part, ``[outputs, kernel * kernel * channels]`` each.
    """
    rows = conv.weight.detach().permute(0, 2, 3, 1).flatten(1).contiguous()
    high = (rows.view(torch.int32) & _TF32_MASK.value).view(torch.float32)
    return high, rows - high


def convolve_tokens(
    x: Tensor, conv: nn.Conv2d, filters: tuple[Tensor, Tensor]
) -> Tensor:
    """Convolve without the bias.

    Args:
        x: float32 ``[B, C, H, W]``, channels last in memory.
        conv: a convolution with a square kernel, a stride, and a padding.
        filters: what :func:`split_filters` gave for it.

    Returns:
        float32 ``[B, outputs, h, w]``, channels last in memory.
    """
    batch, width, height, columns = x.shape
    kernel, stride, padding = conv.kernel_size[0], conv.stride[0], int(conv.padding[0])
    rows_out = (height + 2 * padding - kernel) // stride + 1
    columns_out = (columns + 2 * padding - kernel) // stride + 1
    count, outputs = batch * rows_out * columns_out, conv.out_channels
    y = x.new_empty(count, outputs)
    with torch.cuda.device_of(x):
        _patch_kernel[(triton.cdiv(count, _TOKENS), triton.cdiv(outputs, _OUTPUTS))](
            *(x, *filters, y, count, rows_out, columns_out, height, columns, outputs),
            *(stride, padding, x.stride(0), x.stride(2), x.stride(3)),
            KERNEL=kernel,
            RUN=kernel * width,
            WIDTH=width,
            TOKENS=_TOKENS,
            OUTPUTS=_OUTPUTS,
            CHUNK=_CHUNK,
            STAGES=_STAGES,
            num_warps=_WARPS,
        )
    return y.view(batch, rows_out, columns_out, outputs).permute(0, 3, 1, 2)


# Another batch size must not compile anew.
@triton.jit(do_not_specialize=['count'])
def _patch_kernel(
    x,
    high,
    low,
    y,
    count,
    rows_out,
    columns_out,
    height,
    columns,
    outputs,
    stride,
    padding,
    x_sample,
    x_row,
    x_column,
    KERNEL: tl.constexpr,
    RUN: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Multiply TOKENS patches with OUTPUTS filters.

    A row of a patch is a RUN of numbers that lie together, KERNEL pixels of WIDTH.
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    has_token, has_output = token < count, output < outputs
    row = token // columns_out % rows_out * stride - padding
    column = token % columns_out * stride - padding
    sample = (token // (rows_out * columns_out)).to(tl.int64)
    x += (sample * x_sample + row * x_row + column * x_column)[:, None]
    total = tl.zeros([TOKENS, OUTPUTS], tl.float32)
    CHUNKS: tl.constexpr = (RUN + CHUNK - 1) // CHUNK
    for step in tl.range(0, KERNEL * CHUNKS, num_stages=STAGES):
        tap = step // CHUNKS
        e = step % CHUNKS * CHUNK + tl.arange(0, CHUNK)
        pixel = column[:, None] + (e // WIDTH)[None, :]
        inside = has_token & (row + tap >= 0) & (row + tap < height)
        inside = inside[:, None] & (pixel >= 0) & (pixel < columns) & (e < RUN)[None, :]
        patch = tl.load(x + tap * x_row + e[None, :], inside, 0.0)
        place = output[None, :] * (KERNEL * RUN) + tap * RUN + e[:, None]
        has = (e < RUN)[:, None] & has_output[None, :]
        filter_high = tl.load(high + place, has, 0.0)
        filter_low = tl.load(low + place, has, 0.0)
        patch_high = (patch.to(tl.int32, bitcast=True) & _TF32_MASK).to(
            tl.float32, bitcast=True
        )
        part = tl.dot(patch - patch_high, filter_high, input_precision='tf32')
        part = tl.dot(patch_high, filter_low, part, input_precision='tf32')
        part = tl.dot(patch_high, filter_high, part, input_precision='tf32')
        # A plain sum would be taken into the matrix units, which truncate.
        total = tl.fma(part, 1.0, total)
    target = token.to(tl.int64)[:, None] * outputs + output[None, :]
    tl.store(y + target, total, has_token[:, None] & has_output[None, :])
