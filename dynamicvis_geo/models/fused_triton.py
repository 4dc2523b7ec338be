"""The stages of DynamicVis on a CUDA GPU, fused around the matrix products.

A mixer moves its tokens through memory many times over if each step is an operation of
its own. Here each step that a matrix product does not need is in one of four kernels:

- ``_tokens_kernel`` makes the tokens of a stage from its patches, or mixes what Mamba
  gave into them, and in the same pass computes all that the next mixer wants to know of
  them: their routing logits, and the global tokens, averaged and normalised. After the
  last mixer it applies the norm of the stage instead.
- ``_rank_kernel`` orders the tokens by weight (longer sequences are sorted by PyTorch).
- ``_gather_kernel`` collects the chosen tokens, normalised, behind the global ones.
- ``_join_kernel`` averages the directions of the scan and gates them.

The convolutions and the scan are those of ``patches_triton.py`` and ``scan_triton.py``.

Tokens, norms, logits and order are float32. The products of the Mamba blocks are in the
dtype that autocast names, float32 without it.
"""

# Triton types the arguments of its functions by what a launch gives them.
# ruff: noqa: ANN001, ANN202
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from dynamicvis_geo.models.mamba import MambaBlock, MambaMixer, RMSNorm
from dynamicvis_geo.models.patches_triton import convolve_tokens, split_filters
from dynamicvis_geo.models.scan_triton import launch_conv, launch_scan, silu

# Numbers of a tile of tokens: 32 a thread.
_TILE_NUMBERS = 4096
# Tokens a program, where no global token says how many.
_RUN = 64
# Counting what is larger takes time as the square of the length.
_MOST_COUNTED = 2048
_RANK_BLOCK, _RANK_TILE = 64, 128
_JOIN_ROWS, _JOIN_CHANNELS = 16, 128
_T = TypeVar('_T')


def can_fuse(stages: Iterable[nn.Module], x: Tensor) -> bool:
    """Say whether :func:`run_stages` can do what the stages of a model do.

    It serves the paths that released models have: Mamba (not Mamba-2) forward or in
    both directions, averaged; global tokens at the head or nowhere, which divide the
    tokens; float32 weights and images; no gradients.

    Args:
        stages: a patch embedding, mixers and norm each.
        x: the image.
    """
    if x.dtype != torch.float32 or torch.is_grad_enabled() or not x.numel():
        return False
    size = x.shape[-2:]
    for stage in cast(Iterable[Any], stages):
        conv = stage[0].projection
        size = torch.Size(
            (side + 2 * padding - kernel) // stride + 1
            for side, padding, kernel, stride in zip(
                size, conv.padding, conv.kernel_size, conv.stride, strict=True
            )
        )
        if not len(stage[1]) or not all(_can_fuse(m, size.numel()) for m in stage[1]):
            return False
    return True


def _can_fuse(mixer: Any, count: int) -> bool:
    block = mixer.spatial_mamba_mixer
    return (
        mixer.reduction > 0
        and mixer.global_token_position in ('head', 'none')
        and (mixer.global_tokens == 0 or count % mixer.global_tokens == 0)
        and not mixer.norm_topk_prob
        and isinstance(block, MambaBlock)
        and isinstance(block.mamba_layer, MambaMixer)
        and block.directions > 0
        and not block.shuffled
        and block.gate_layer is None
        and block.mamba_layer.scan in ('auto', 'triton')
        and all(p.dtype == torch.float32 for p in mixer.parameters())
    )


@torch.no_grad()
def run_stages(
    stages: Iterable[nn.Module], position: Tensor | None, x: Tensor
) -> list[Tensor]:
    """Give the normalised map of each stage.

    Args:
        stages: a patch embedding, mixers and norm each.
        position: position embedding of the first, ``[1, h * w, C]``, or None.
        x: normalised image, float32 ``[B, C, H, W]``.

    Returns:
        float32 ``[B, C, h, w]`` each.
    """
    kind = x.device.type
    dtype = torch.float32
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    maps = []
    with torch.autocast(kind, enabled=False):
        for stage in cast(Iterable[Any], stages):
            x = run_stage(_convolve(stage[0].projection, x), stage, position, dtype)
            position = None
            maps.append(x)
    return maps


def _convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Convolve without the bias, by cuDNN if *x* is an image rather than tokens."""
    if x.is_contiguous():
        return F.conv2d(x, conv.weight, None, conv.stride, conv.padding)
    return convolve_tokens(x, conv, _kept(conv, 'filters', split_filters))


@torch.no_grad()
def run_stage(
    patches: Tensor,
    stage: Any,
    position: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Make the feature map of a stage from its patches.

    Args:
        patches: convolved, before bias and norm; float32 ``[B, C, h, w]``.
        stage: patch embedding, mixers and norm.
        position: position embedding, ``[1, h * w, C]``, or None.
        dtype: that of the matrix products of the Mamba blocks.

    Returns:
        float32 ``[B, C, h, w]``, channels last in memory.
    """
    embed, mixers, norm = stage
    batch, width, rows, columns = patches.shape
    count = rows * columns
    tokens = patches.new_empty(batch, count, width)
    logits = patches.new_empty(batch, count)
    first = mixers[0]
    keep, pooled = count // first.reduction, first.global_tokens
    length = pooled + keep
    sequence = patches.new_empty(batch, length, width, dtype=dtype)
    tile = max(1, _TILE_NUMBERS // triton.next_power_of_2(width))

    def pass_over(
        source: Tensor,
        strides: Sequence[int],
        following: Any,
        patch_norm: nn.LayerNorm | None = None,
        added: Tensor | None = None,
        rank: Tensor | None = None,
        weights: Tensor | None = None,
        mixes_all: bool = True,
    ) -> None:
        """Launch the kernel of tokens; *following* is the next mixer, if there is."""
        last_norm = norm if following is None else patch_norm
        run = count // pooled if pooled else min(_RUN, count)
        with torch.cuda.device_of(source):
            _tokens_kernel[(triton.cdiv(count, run), batch)](
                *(source, tokens, added, rank, weights),
                embed.projection.bias if patch_norm is not None else None,
                *((None, None) if last_norm is None else _affine(last_norm)),
                position if patch_norm is not None else None,
                None if following is None else following.spatial_gate.weight,
                logits,
                following.spatial_mamba_mixer.pre_norm.weight if following else None,
                sequence,
                *(count, run, keep, pooled, length, width, *strides),
                0.0 if last_norm is None else last_norm.eps,
                following.spatial_mamba_mixer.pre_norm.eps if following else 0.0,
                EMBED=patch_norm is not None,
                MIXES_ALL=mixes_all,
                POOLED=pooled > 0,
                LAST=following is None,
                TILE=min(tile, triton.next_power_of_2(run)),
                WIDTH=triton.next_power_of_2(width),
            )

    sample, channel, row, column = patches.stride()
    if row != columns * column:
        patches = patches.contiguous()
        sample, channel, row, column = patches.stride()
    pass_over(patches, (sample, column, channel), first, patch_norm=embed.norm)
    for mixer, following in zip(mixers, [*mixers[1:], None], strict=True):
        block = mixer.spatial_mamba_mixer
        routed = _with_hooks(mixer.spatial_gate, tokens, logits[..., None])[..., 0]
        weights = F.softmax(routed, dim=-1)
        ids, rank = order_tokens(weights, keep)
        _gather(tokens, ids, block.pre_norm, sequence, pooled)
        added = _mix(block, sequence) if keep else sequence
        pass_over(
            tokens,
            (count * width, width, 1),
            following,
            added=added,
            rank=rank,
            weights=weights,
            mixes_all=mixer.is_softmax_on_x,
        )
    output = _with_hooks(norm, tokens, tokens).view(batch, rows, columns, width)
    return output.permute(0, 3, 1, 2)


def _with_hooks(module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
    """Call the forward hooks of a module that is not called itself.

    Of the gates and the norms of stages, that is: a comparison looks in there.
    """
    for hook in module._forward_hooks.values():
        replaced: Tensor | None = hook(module, (x,), output)
        output = output if replaced is None else replaced
    return output


def order_tokens(weights: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Order tokens by falling weight, equal ones by position.

    Args:
        weights: float32 ``[B, N]``, not negative; NaN counts as the largest.
        keep: how many are chosen.

    Returns:
        Numbers of the chosen tokens, ``[B, keep]``, and the place of each token in the
        order, ``[B, N]``.
    """
    batch, count = weights.shape
    if count > _MOST_COUNTED:
        order = weights.sort(dim=-1, descending=True, stable=True).indices
        places = torch.arange(count, dtype=torch.int32, device=weights.device)
        rank = torch.empty_like(order, dtype=torch.int32)
        return order[:, :keep], rank.scatter_(1, order, places.expand_as(order))
    ids = weights.new_empty(batch, keep, dtype=torch.int32)
    rank = weights.new_empty(batch, count, dtype=torch.int32)
    with torch.cuda.device_of(weights):
        _rank_kernel[(triton.cdiv(count, _RANK_BLOCK), batch)](
            weights, ids, rank, count, keep, BLOCK=_RANK_BLOCK, TILE=_RANK_TILE
        )
    return ids, rank


class _Weights(NamedTuple):
    """The weights of a Mamba block as its kernels and products take them."""

    in_proj: Tensor
    in_bias: Tensor | None
    conv: Tensor
    x_proj: Tensor
    dt_proj: Tensor
    out_proj: Tensor
    out_bias: Tensor | None
    A: Tensor


_made: WeakKeyDictionary[nn.Module, dict[object, tuple[object, Any]]]
_made = WeakKeyDictionary()


def _kept(module: nn.Module, name: object, make: Callable[[Any], _T]) -> _T:
    """Keep what is made of the weights of a module, until they change."""
    state = [
        (p.data_ptr(), 0 if p.is_inference() else p._version)
        for p in module.parameters()
    ]
    known = _made.setdefault(module, {})
    if name not in known or known[name][0] != state:
        known[name] = state, make(module)
    return cast(_T, known[name][1])


def _cast_weights(mixer: MambaMixer, dtype: torch.dtype) -> _Weights:
    rank = mixer.split_sizes[0]
    # Rows of 16 bytes: products of unaligned rows take a slow path.
    padding = -rank % 8
    steps, rest = mixer.x_proj.weight.split([rank, len(mixer.x_proj.weight) - rank])
    return _Weights(
        mixer.in_proj.weight.to(dtype),
        None if mixer.in_proj.bias is None else mixer.in_proj.bias.to(dtype),
        mixer.conv1d.weight[:, 0].T.contiguous().T[:, None],
        torch.cat([F.pad(steps, (0, 0, 0, padding)), rest]).to(dtype),
        F.pad(mixer.dt_proj.weight, (0, padding)).to(dtype),
        mixer.out_proj.weight.to(dtype),
        None if mixer.out_proj.bias is None else mixer.out_proj.bias.to(dtype),
        -torch.exp(mixer.A_log),
    )


def _mix(block: MambaBlock, sequence: Tensor) -> Tensor:
    """Run a Mamba block on normalised tokens, without its residual connection."""
    mixer = cast(MambaMixer, block.mamba_layer)
    dtype = sequence.dtype
    weights = _kept(mixer, dtype, lambda mixer: _cast_weights(mixer, dtype))
    states = mixer.split_sizes[1]
    tokens, gate = F.linear(sequence, weights.in_proj, weights.in_bias).chunk(2, -1)
    h = launch_conv(tokens, weights.conv, mixer.conv1d.bias, block.directions)
    projected = F.linear(h.flatten(0, 2), weights.x_proj)
    rank = weights.dt_proj.shape[1]
    BC = projected[:, rank:].float().view(*h.shape[:3], -1)
    y = launch_scan(
        h,
        (projected[:, :rank] @ weights.dt_proj.T).view_as(h),
        weights.A,
        BC[..., :states],
        BC[..., states:],
        mixer.D,
        mixer.dt_proj.bias,
        None,
    )
    return F.linear(_join(y, gate), weights.out_proj, weights.out_bias)


def _join(y: Tensor, gate: Tensor) -> Tensor:
    """Average ``[K, B, L, I]`` over the directions, times SiLU of ``[B, L, I]``."""
    directions, batch, length, channels = y.shape
    joined = torch.empty_like(y[0])
    rows = batch * length
    blocks = triton.cdiv(rows, _JOIN_ROWS), triton.cdiv(channels, _JOIN_CHANNELS)
    with torch.cuda.device_of(y):
        _join_kernel[blocks](
            *(y, gate, joined, rows, channels, gate.stride(1)),
            DIRECTIONS=directions,
            ROWS=_JOIN_ROWS,
            CHANNELS=_JOIN_CHANNELS,
        )
    return joined


def _gather(
    tokens: Tensor, ids: Tensor, norm: RMSNorm, sequence: Tensor, pooled: int
) -> None:
    """Write the chosen tokens, normalised, behind the global ones."""
    batch, keep = ids.shape
    if not keep:
        return
    width = tokens.shape[2]
    tile = max(1, _TILE_NUMBERS // triton.next_power_of_2(width))
    with torch.cuda.device_of(tokens):
        _gather_kernel[(triton.cdiv(keep, tile), batch)](
            *(tokens, ids, norm.weight, sequence, ids.stride(0)),
            *(tokens.shape[1], keep, pooled, sequence.shape[1], width, norm.eps),
            TILE=tile,
            WIDTH=triton.next_power_of_2(width),
        )


def _affine(norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    return norm.weight, norm.bias


@triton.jit
def _tokens_kernel(
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
    """Make or mix a run of tokens, and what the next mixer wants to know of them."""
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
def _gather_kernel(
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
    """Copy a tile of chosen tokens through RMSNorm."""
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
def _rank_kernel(
    weights, ids, rank, count, keep, BLOCK: tl.constexpr, TILE: tl.constexpr
):
    """Count for each token of a block how many come before it.

    Weights are compared as integers, whose order is that of floats that are not
    negative, and which NaN cannot make contradict each other.
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
def _join_kernel(
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
    """Average the directions of a [ROWS, CHANNELS] piece, and gate it."""
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
