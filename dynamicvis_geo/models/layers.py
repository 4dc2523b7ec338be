"""The layers of a stage of DynamicVis: patches, and mixers of chosen tokens.

Names of parameters are those of the official checkpoints.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.models.mamba import MambaBlock

#: Places of the global tokens in the sequence that Mamba sees.
GLOBAL_TOKEN_POSITIONS = ('head', 'none', 'headtail', 'mid')


class PatchEmbed(nn.Module):
    """Overlapping patches as tokens: a convolution, row-major flattening, LayerNorm.

    Args:
        in_channels: bands of the image, or channels of the stage before.
        width: channels of the tokens.
        patch_size: pixels of a side of a patch; padding is half of it.
        stride: pixels between patches.
        eps: added to the variance by the LayerNorm.
    """

    def __init__(
        self, in_channels: int, width: int, patch_size: int, stride: int, eps: float
    ) -> None:
        super().__init__()
        self.projection = nn.Conv2d(
            in_channels, width, patch_size, stride, padding=patch_size // 2
        )
        nn.init.kaiming_normal_(self.projection.weight, mode='fan_out')
        nn.init.zeros_(cast(Tensor, self.projection.bias))
        self.norm = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Embed an image, or the map of the stage before, as tokens.

        In the dtype of the weights also under autocast: nearly all that bfloat16 would
        cost features, it would cost here. From a contiguous tensor, since convolutions
        of channels-last ones round about twice as much.

        Args:
            x: ``[B, in_channels, H, W]``.

        Returns:
            Tokens ``[B, h * w, width]``, and ``(h, w)``.
        """
        with torch.autocast(x.device.type, enabled=False):
            x = self.projection(x.to(self.projection.weight.dtype).contiguous())
            height, width = x.shape[-2:]
            return self.norm(x.flatten(2).transpose(1, 2)), (height, width)


class Gate(nn.Linear):
    """The routing logit of a token, by which it is chosen or not.

    It is computed in float32 (float64 for float64 tokens) also under autocast, since
    the order of the logits decides the features.

    Args:
        width: channels of the tokens.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Score tokens.

        Args:
            x: ``[B, N, width]``.

        Returns:
            ``[B, N, 1]``, float32, or float64 if *x* is.
        """
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), self.weight.to(dtype))


class SparseMixer(nn.Module):
    """Choose the tokens of the highest weight and let Mamba mix those.

    Args:
        width: channels of the tokens.
        reduction: one token in *reduction* is chosen. At 0 or less there is no gate and
            Mamba sees all tokens in raster order.
        global_tokens: number of averages of the sequence that are shown to Mamba beside
            the chosen tokens.
        global_token_position: where these stand, one of
            :data:`GLOBAL_TOKEN_POSITIONS`.
        is_softmax_on_x: whether tokens that were not chosen are scaled by
            ``1 + weight``.
        norm_topk_prob: whether the weights of the chosen tokens are made to sum to 1.
        block: the Mamba block.
    """

    def __init__(
        self,
        width: int,
        reduction: int,
        global_tokens: int,
        global_token_position: str,
        is_softmax_on_x: bool,
        norm_topk_prob: bool,
        block: MambaBlock,
    ) -> None:
        super().__init__()
        self.reduction = reduction
        self.global_tokens = 0 if global_token_position == 'none' else global_tokens
        self.global_token_position = global_token_position
        self.is_softmax_on_x = is_softmax_on_x
        self.norm_topk_prob = norm_topk_prob
        if reduction > 0:
            self.spatial_gate = Gate(width)
        self.spatial_mamba_mixer: Callable[..., Tensor] = block

    def forward(
        self,
        x: Tensor,
        generator: torch.Generator | None = None,
        global_tokens: int | None = None,
    ) -> Tensor:
        """Mix tokens.

        Args:
            x: ``[B, N, width]``.
            generator: a CPU generator for the permutations of the ``shuffle`` paths.
            global_tokens: another number of them than the mixer was built with.

        Returns:
            ``[B, N, width]``, in the order of *x*.
        """
        count = self.global_tokens if global_tokens is None else global_tokens
        if self.reduction <= 0:
            return self._mix(x, x, count, generator)
        weights = F.softmax(self.spatial_gate(x)[..., 0], dim=-1)
        keep = x.shape[1] // self.reduction
        # A stable sort breaks exact ties by position on every machine; topk does not.
        ids = weights.sort(dim=-1, descending=True, stable=True).indices[:, :keep]
        chosen_weights = weights.gather(1, ids)[..., None].to(x.dtype)
        if self.norm_topk_prob:
            chosen_weights = chosen_weights / chosen_weights.sum(1, keepdim=True)
        # Rows of all samples in one table: whole tokens are copied, not single numbers.
        starts = torch.arange(0, x.shape[0] * x.shape[1], x.shape[1], device=x.device)
        rows = (ids + starts[:, None]).flatten()
        chosen = x.flatten(0, 1).index_select(0, rows).unflatten(0, ids.shape)
        mixed = self._mix(x, chosen, count, generator) if keep else chosen
        updated = torch.addcmul(chosen, chosen_weights, mixed).flatten(0, 1)
        if self.is_softmax_on_x:
            output = x * (1 + weights[..., None].to(x.dtype))
        else:
            output = x.clone()
        output = output.contiguous()
        output.flatten(0, 1).index_copy_(0, rows, updated)
        return output

    def _mix(
        self, x: Tensor, chosen: Tensor, count: int, generator: torch.Generator | None
    ) -> Tensor:
        """Show Mamba the chosen tokens among global ones, and take the former back."""
        if not count:
            return self.spatial_mamba_mixer(chosen, generator)
        pooled = _average_runs(x, count)
        kept = chosen.shape[1]
        if self.global_token_position == 'mid':
            before, after = chosen.split([kept // 2, kept - kept // 2], dim=1)
            sequence = self.spatial_mamba_mixer(
                torch.cat([before, pooled, after], dim=1), generator
            )
            # The official code cuts here, which is not where it inserted: half of the
            # global tokens stay in place of chosen ones.
            cut = (kept + count) // 2
            return torch.cat([sequence[:, :cut], sequence[:, cut + count :]], dim=1)
        ends = [pooled] if self.global_token_position == 'headtail' else []
        sequence = self.spatial_mamba_mixer(
            torch.cat([pooled, chosen, *ends], dim=1), generator
        )
        return sequence[:, count : count + kept]


def _average_runs(x: Tensor, count: int) -> Tensor:
    """Average ``[B, N, C]`` over *count* runs of tokens, as adaptive pooling does."""
    if x.shape[1] % count == 0:
        return x.reshape(x.shape[0], count, x.shape[1] // count, x.shape[2]).mean(2)
    return F.adaptive_avg_pool1d(x.transpose(1, 2), count).transpose(1, 2)


def resize_tokens(
    tokens: Tensor, old: Sequence[int], new: Sequence[int], mode: str
) -> Tensor:
    """Interpolate tokens of one grid on another, in float32.

    Args:
        tokens: ``[1, h * w, C]``.
        old: rows and columns that they have.
        new: rows and columns of the result.
        mode: of :func:`torch.nn.functional.interpolate`.

    Returns:
        The tokens of the new grid, in the dtype of the old.
    """
    image = tokens.float().reshape(1, *old, -1).permute(0, 3, 1, 2)
    smooth = {} if mode == 'nearest' else {'align_corners': False}
    resized = F.interpolate(image, tuple(new), mode=mode, **smooth)
    return resized.flatten(2).transpose(1, 2).to(tokens.dtype)


def conv_size(pixels: int, kernel: int, stride: int) -> int:
    """Count the outputs of a convolution that is padded by half its kernel.

    Args:
        pixels: size of the input along one axis.
        kernel: size of the kernel.
        stride: stride of the convolution.

    Returns:
        Size of the output along that axis.
    """
    return (pixels + 2 * (kernel // 2) - kernel) // stride + 1


def read_global_tokens(config: Mapping[str, Any] | None) -> tuple[str, int]:
    """Read position and number of the global tokens from ``global_token_cfg``.

    Args:
        config: ``{'pos': position, 'num': count}``; what is missing, or all if None, is
            ``'head'`` and -1.

    Returns:
        Position, one of :data:`GLOBAL_TOKEN_POSITIONS`, and number.

    Raises:
        SpecError: if it holds anything else.
    """
    given: dict[str, Any] = {'pos': 'head', 'num': -1} | dict(config or {})
    position, count = given.pop('pos'), given.pop('num')
    if given or not isinstance(count, int) or count < -1:
        raise SpecError(
            f'global_token_cfg has num={count!r} and further keys {sorted(given)}: '
            "give 'pos' and 'num' (-1 or more)"
        )
    if position not in GLOBAL_TOKEN_POSITIONS:
        raise SpecError(
            f"global_token_cfg['pos']={position!r} is unknown: choose one of "
            f'{", ".join(GLOBAL_TOKEN_POSITIONS)}'
        )
    return position, count
