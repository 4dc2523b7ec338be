"""The stages of DynamicVis on a CUDA GPU, fused around the matrix products.

A mixer moves its tokens through memory many times over if each step is an operation of
its own. Here each step that a matrix product does not need is in one of the four
kernels of ``fused_kernels.py``:

- ``tokens_kernel`` makes the tokens of a stage from its patches, or mixes what Mamba
  gave into them, and in the same pass computes all that the next mixer wants to know of
  them: their routing logits, and the global tokens, averaged and normalised. After the
  last mixer it applies the norm of the stage instead.
- ``rank_kernel`` orders the tokens by weight (longer sequences are sorted by PyTorch).
- ``gather_kernel`` collects the chosen tokens, normalised, behind the global ones.
- ``join_kernel`` averages the directions of the scan and gates them.

The convolutions and the scan are those of ``patches_triton.py`` and ``scan_triton.py``.

Tokens, norms, logits and order are float32. The products of the Mamba blocks are in the
dtype that autocast names, float32 without it.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
import triton
from torch import Tensor, nn

from dynamicvis_geo.models.fused_kernels import (
    gather_kernel,
    join_kernel,
    rank_kernel,
    tokens_kernel,
)
from dynamicvis_geo.models.graphs import state_of
from dynamicvis_geo.models.layers import conv_size
from dynamicvis_geo.models.mamba import MambaBlock, MambaMixer, RMSNorm
from dynamicvis_geo.models.patches_triton import convolve_tokens, split_filters
from dynamicvis_geo.models.scan_triton import launch_conv, launch_scan

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
    """Decide if :func:`run_stages` can do what the stages of a model do.

    It serves the paths that released models have: Mamba (not Mamba-2) forward or in
    both directions, averaged; global tokens at the head or nowhere, which divide the
    tokens; float32 weights and images; no gradients.

    Args:
        stages: a patch embedding, mixers and norm each.
        x: the image.

    Returns:
        True if it can.
    """
    if x.dtype != torch.float32 or torch.is_grad_enabled() or not x.numel():
        return False
    height, width = x.shape[-2:]
    for stage in cast(Iterable[Any], stages):
        conv = stage[0].projection
        kernel, stride = conv.kernel_size[0], conv.stride[0]
        height = conv_size(height, kernel, stride)
        width = conv_size(width, kernel, stride)
        if not len(stage[1]) or not all(_can_fuse(m, height * width) for m in stage[1]):
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
    tile = _tile(width)

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
            tokens_kernel[(triton.cdiv(count, run), batch)](
                *(source, tokens, added, rank, weights),
                embed.projection.bias if patch_norm is not None else None,
                *(
                    (None, None)
                    if last_norm is None
                    else (last_norm.weight, last_norm.bias)
                ),
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
        rank_kernel[(triton.cdiv(count, _RANK_BLOCK), batch)](
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
    state = state_of(module.parameters())
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
        join_kernel[blocks](
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
    tile = _tile(width)
    with torch.cuda.device_of(tokens):
        gather_kernel[(triton.cdiv(keep, tile), batch)](
            *(tokens, ids, norm.weight, sequence, ids.stride(0)),
            *(tokens.shape[1], keep, pooled, sequence.shape[1], width, norm.eps),
            TILE=tile,
            WIDTH=triton.next_power_of_2(width),
        )


def _tile(width: int) -> int:
    """Count the tokens of so many channels that a kernel works on at once."""
    tile: int = max(1, _TILE_NUMBERS // triton.next_power_of_2(width))
    return tile
