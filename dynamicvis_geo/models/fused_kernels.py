"""The kernels of the fused forward, in Triton; ``fused_triton.py`` launches them."""

# Triton types the arguments of its functions by what a launch gives them.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

from dynamicvis_geo.models.scan_triton import silu


@triton.jit
def tokens_kernel(
    x,
    tokens,
    added,
    rank,
    weights,
    patch_bias,
    scale,
    shift,
    position,
    gate,
    logits,
    block_scale,
    sequence,
    count,
    run,
    keep,
    pooled,
    length,
    width,
    x_sample,
    x_token,
    x_channel,
    norm_eps,
    block_eps,
    EMBED: tl.constexpr,
    MIXES_ALL: tl.constexpr,
    POOLED: tl.constexpr,
    LAST: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Make or mix a run of tokens, and the logits and means that the next mixer needs.

    A program does *run* tokens of one image, *TILE* at a time, with all their channels.

    Args:
        x: patches, if *EMBED*, else tokens; float32.
        tokens: written, float32 ``[B, count, width]``; may be *x*.
        added: what the Mamba block gave for *sequence*, ``[B, length, width]``.
        rank: place of each token in the order of the weights, ``[B, count]``.
        weights: softmax of the logits, float32 ``[B, count]``.
        patch_bias: of the convolution of patches, ``[width]``, or None.
        scale: weight of the LayerNorm of the patches or of the stage, ``[width]``.
        shift: bias of that LayerNorm.
        position: position embedding, ``[count, width]``, or None.
        gate: weight of the next mixer's gate, ``[width]``.
        logits: written unless *LAST*, float32 ``[B, count]``.
        block_scale: weight of the RMSNorm of the next Mamba block, ``[width]``.
        sequence: input of that block, ``[B, length, width]``; its global tokens are
            written.
        count: number of tokens.
        run: tokens of a program, which one global token averages.
        keep: number of chosen tokens.
        pooled: number of global tokens.
        length: *pooled* + *keep*.
        width: channels.
        x_sample: stride of the images in *x*.
        x_token: stride of the tokens in *x*.
        x_channel: stride of the channels in *x*.
        norm_eps: added to the variance by LayerNorm.
        block_eps: added to the mean square by RMSNorm.
        EMBED: whether *x* holds patches.
        MIXES_ALL: whether tokens that were not chosen are scaled by ``1 + weight``.
        POOLED: whether there are global tokens.
        LAST: whether no mixer follows, so that the norm of the stage is applied.
        TILE: tokens at a time, a power of 2.
        WIDTH: the next power of 2 from *width*.
    """
    part = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    c = tl.arange(0, WIDTH)
    has_c = c < width
    x += sample * x_sample + c[None, :] * x_channel
    tokens += sample * count * width + c[None, :]
    if EMBED or LAST:
        norm_scale = tl.load(scale + c, has_c, 0.0)[None, :]
        norm_shift = tl.load(shift + c, has_c, 0.0)[None, :]
    if not LAST:
        direction = tl.load(gate + c, has_c, 0.0)[None, :]
    total = tl.zeros([TILE, WIDTH], tl.float32)
    stop = tl.minimum((part + 1) * run, count)
    for start in range(part * run, stop, TILE):
        n = start + tl.arange(0, TILE)
        has_n = n < stop
        has = has_n[:, None] & has_c[None, :]
        y = tl.load(x + n[:, None] * x_token, has, 0.0)
        if EMBED:
            if patch_bias is not None:
                y += tl.load(patch_bias + c, has_c, 0.0)[None, :]
            y = _layer_norm(y, has_c, width, norm_eps) * norm_scale + norm_shift
            if position is not None:
                y += tl.load(position + n[:, None] * width + c[None, :], has, 0.0)
        else:
            place = tl.load(rank + sample * count + n, has_n, keep)
            weight = tl.load(weights + sample * count + n, has_n, 0.0)
            chosen = place < keep
            source = (sample * length + pooled + place) * width
            update = tl.load(
                added + source[:, None] + c[None, :],
                chosen[:, None] & has_c[None, :],
                0.0,
            )
            if not MIXES_ALL:
                weight = tl.where(chosen, weight, 0.0)
            y += weight[:, None] * (y + update.to(tl.float32))
        if LAST:
            y = _layer_norm(y, has_c, width, norm_eps) * norm_scale + norm_shift
        else:
            tl.store(logits + sample * count + n, tl.sum(y * direction, 1), has_n)
            if POOLED:
                total += tl.where(has, y, 0.0)
        tl.store(tokens + n[:, None] * width, y, has)
    if POOLED and not LAST:
        mean = tl.sum(total, 0) / run
        mean *= tl.rsqrt(tl.sum(mean * mean, 0) / width + block_eps)
        mean *= tl.load(block_scale + c, has_c, 0.0)
        sequence += (sample * length + part) * width + c
        tl.store(sequence, mean.to(sequence.dtype.element_ty), has_c)


@triton.jit
def _layer_norm(x, has_c, width, eps):
    """Normalise rows whose masked columns are zero; those are left as they may be."""
    centred = tl.where(has_c[None, :], x - (tl.sum(x, 1) / width)[:, None], 0.0)
    variance = tl.sum(centred * centred, 1) / width
    return centred * tl.rsqrt(variance + eps)[:, None]


@triton.jit
def gather_kernel(
    tokens,
    ids,
    scale,
    sequence,
    ids_sample,
    count,
    keep,
    pooled,
    length,
    width,
    eps,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Copy a tile of chosen tokens through RMSNorm, behind the global tokens.

    Args:
        tokens: float32 ``[B, count, width]``.
        ids: numbers of the chosen tokens, ``[B, keep]``.
        scale: weight of the RMSNorm, ``[width]``.
        sequence: written, ``[B, length, width]``, from token *pooled* on.
        ids_sample: stride of the images in *ids*.
        count: number of tokens.
        keep: number of chosen tokens.
        pooled: number of global tokens.
        length: *pooled* + *keep*.
        width: channels.
        eps: added to the mean square.
        TILE: tokens of a program, a power of 2.
        WIDTH: the next power of 2 from *width*.
    """
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    sample = tl.program_id(1).to(tl.int64)
    c = tl.arange(0, WIDTH)
    has_place, has_c = place < keep, c < width
    has = has_place[:, None] & has_c[None, :]
    n = tl.load(ids + sample * ids_sample + place, has_place, 0)
    source = (sample * count + n) * width
    x = tl.load(tokens + source[:, None] + c[None, :], has, 0.0)
    x *= tl.rsqrt(tl.sum(x * x, 1) / width + eps)[:, None]
    x *= tl.load(scale + c, has_c, 0.0)[None, :]
    target = (sample * length + pooled + place) * width
    tl.store(
        sequence + target[:, None] + c[None, :], x.to(sequence.dtype.element_ty), has
    )


@triton.jit
def rank_kernel(
    weights, ids, rank, count, keep, BLOCK: tl.constexpr, TILE: tl.constexpr
):
    """Count for each token of a block the tokens that come before it.

    Weights are compared as integers, whose order is that of floats that are not
    negative, and which NaN cannot make contradict each other.

    Args:
        weights: float32 ``[B, count]``, not negative.
        ids: written, numbers of the chosen tokens, int32 ``[B, keep]``.
        rank: written, place of each token in the order, int32 ``[B, count]``.
        count: number of tokens.
        keep: number of chosen tokens.
        BLOCK: tokens of a program.
        TILE: tokens that they are compared with at a time.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sample = tl.program_id(1).to(tl.int64)
    has_i = i < count
    weights += sample * count
    mine = tl.load(weights + i, has_i, 0.0).to(tl.int32, bitcast=True)[:, None]
    before = tl.zeros([BLOCK, TILE], tl.int32)
    for start in range(0, count, TILE):
        j = start + tl.arange(0, TILE)
        has_j = j < count
        other = tl.load(weights + j, has_j, 0.0).to(tl.int32, bitcast=True)[None, :]
        first = (other > mine) | ((other == mine) & (j[None, :] < i[:, None]))
        before += (first & has_j[None, :]).to(tl.int32)
    place = tl.sum(before, 1)
    tl.store(rank + sample * count + i, place, has_i)
    tl.store(ids + sample * keep + place, i, has_i & (place < keep))


@triton.jit(do_not_specialize=['rows'])
def join_kernel(
    y,
    gate,
    joined,
    rows,
    channels,
    gate_token,
    DIRECTIONS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Average the directions of ``[ROWS, CHANNELS]`` of a scan, times SiLU of the gate.

    Args:
        y: the scan, ``[DIRECTIONS, rows, channels]``.
        gate: before SiLU, ``[rows, channels]``.
        joined: written, ``[rows, channels]``.
        rows: tokens of all images.
        channels: channels.
        gate_token: stride of the tokens in *gate*.
        DIRECTIONS: 1 or 2.
        ROWS: tokens of a program.
        CHANNELS: channels of a program.
    """
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    i = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    has = (row < rows) & (i < channels)
    total = tl.load(y + row * channels + i, has, 0.0).to(tl.float32)
    if DIRECTIONS == 2:
        other = y + (rows.to(tl.int64) + row) * channels + i
        total = (total + tl.load(other, has, 0.0).to(tl.float32)) * 0.5
    z = tl.load(gate + row * gate_token + i, has, 0.0).to(tl.float32)
    total *= silu(z)
    tl.store(joined + row * channels + i, total.to(joined.dtype.element_ty), has)
