"""The Mamba-2 mixer (state-space duality, arXiv 2405.21060)."""

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.models.scan import run_conv

HeadGroups = Literal['contiguous', 'tiled']


class Mamba2Mixer(nn.Module):
    """Mamba-2's mixer: one decay a head, and states shared by groups of heads.

    Args:
        width: channels of the tokens.
        head_groups: which of the ``n_groups`` input and output projections a head uses.
            'contiguous' (head ``h`` uses group ``h // (heads / n_groups)``) is what the
            CUDA kernels do, 'tiled' (``h % n_groups``) what transformers 4.50.0 does on
            the CPU. The two give different features from the same checkpoint.
        state_size: states a channel.
        conv_kernel: taps of the causal convolution.
        expand: inner channels are ``expand * width``.
        head_dim: channels a head; must divide the inner channels.
        n_groups: number of groups; must divide the number of heads.
        chunk_size: tokens that are multiplied as one matrix; affects speed only.
        use_bias: whether `in_proj` and `out_proj` have a bias.
        use_conv_bias: whether the convolution has a bias.
        scan: one of :data:`~dynamicvis_geo.models.config.SCANS`. It chooses the
            kernel of the convolution; the scan itself is matrix products.

    Raises:
        SpecError: if the sizes do not divide, or *head_groups* is unknown.
    """

    def __init__(
        self,
        width: int,
        head_groups: HeadGroups = 'contiguous',
        state_size: int = 32,
        conv_kernel: int = 4,
        expand: int = 2,
        head_dim: int = 24,
        n_groups: int = 2,
        chunk_size: int = 64,
        use_bias: bool = False,
        use_conv_bias: bool = True,
        scan: str = 'auto',
    ) -> None:
        super().__init__()
        self.scan = scan
        inner = expand * width
        if inner % head_dim or (inner // head_dim) % n_groups:
            raise SpecError(
                f'head_dim={head_dim} does not fit {inner} inner channels in '
                f"{n_groups} groups: set layer_cfgs={{'head_dim': ...}} to a divisor "
                f'of {inner // n_groups}, such as {_divisors(inner // n_groups)}'
            )
        if head_groups not in get_args(HeadGroups):
            raise SpecError(
                f'mamba2_head_groups={head_groups!r} is unknown: choose one of '
                f'{", ".join(get_args(HeadGroups))}'
            )
        heads = inner // head_dim
        self.head_groups = head_groups
        self.heads, self.head_dim = heads, head_dim
        self.n_groups, self.state_size = n_groups, state_size
        self.chunk_size = chunk_size
        mixed = inner + 2 * n_groups * state_size
        self.split_sizes = [inner, mixed, heads]
        self.dt_bias = nn.Parameter(torch.ones(heads))
        self.A_log = nn.Parameter(torch.arange(1, heads + 1).float().log())
        self.D = nn.Parameter(torch.ones(heads))
        self.conv1d = nn.Conv1d(
            mixed, mixed, conv_kernel, groups=mixed, bias=use_conv_bias
        )
        self.in_proj = nn.Linear(width, sum(self.split_sizes), bias=use_bias)
        self.norm = GatedRMSNorm(inner)
        self.out_proj = nn.Linear(inner, width, bias=use_bias)

    def inner(self, x: Tensor, directions: int) -> Tensor:
        """Do everything but the output projection.

        Args:
            x: normalised tokens, ``[B, L, width]``.
            directions: 1 (forward) or 2 (forward, then reverse).

        Returns:
            ``[directions, B, L, inner]``, tokens in their own order.
        """
        gate, mixed, dt = self.in_proj(x).split(self.split_sizes, dim=-1)
        mixed = run_conv(
            self.scan, mixed, self.conv1d.weight, self.conv1d.bias, directions
        )
        outputs = [self._scan(mixed[0], dt)]
        if directions == 2:
            outputs.append(self._scan(mixed[1].flip(1), dt.flip(1)).flip(1))
        normed: Tensor = self.norm(torch.stack(outputs), gate)
        return normed.to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens in forward direction.

        Args:
            x: normalised tokens, ``[B, L, width]``.

        Returns:
            ``[B, L, width]``.
        """
        output: Tensor = self.out_proj(self.inner(x, directions=1)[0])
        return output

    def _scan(self, mixed: Tensor, dt: Tensor) -> Tensor:
        groups = self.n_groups * self.state_size
        dtype = torch.float64 if mixed.dtype == torch.float64 else torch.float32
        with torch.autocast(mixed.device.type, enabled=False):
            x, B, C = mixed.to(dtype).split(
                [self.heads * self.head_dim, groups, groups], dim=-1
            )
            x = x.unflatten(-1, (self.heads, self.head_dim))
            step = F.softplus(dt.to(dtype) + self.dt_bias.to(dtype))
            y = chunked_head_scan(
                step * -torch.exp(self.A_log.to(dtype)),
                step[..., None] * x,
                self._per_head(B),
                self._per_head(C),
                self.chunk_size,
            )
            skipped: Tensor = y + self.D.to(dtype)[:, None] * x
            return skipped.flatten(2)

    def _per_head(self, x: Tensor) -> Tensor:
        grouped = x.reshape(*x.shape[:2], self.n_groups, self.state_size)
        share = self.heads // self.n_groups
        if self.head_groups == 'tiled':
            return grouped.repeat(1, 1, share, 1)
        return grouped.repeat_interleave(share, dim=2)


class GatedRMSNorm(nn.Module):
    """RMSNorm over all channels of ``x * silu(gate)``, computed in float32.

    Args:
        channels: number of channels.
        eps: added to the mean square.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.eps = eps

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """Gate, then divide by the root mean square of the channels.

        Args:
            x: ``[..., channels]``.
            gate: before SiLU, of a shape that broadcasts to *x*.

        Returns:
            The shape of *x*.
        """
        gated = x * F.silu(gate.to(x.dtype))
        scale = torch.rsqrt(gated.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (gated * scale)


def chunked_head_scan(
    log_decay: Tensor, x: Tensor, B: Tensor, C: Tensor, chunk_size: int
) -> Tensor:
    """Scan with one decay a head, as matrix products within chunks.

    ``s[t] = exp(log_decay[t]) * s[t-1] + outer(x[t], B[t])`` and ``y[t] = s[t] @ C[t]``
    for each head.

    Args:
        log_decay: ``[B, L, heads]``, not positive.
        x: ``[B, L, heads, head_dim]``.
        B: ``[B, L, heads, N]``.
        C: ``[B, L, heads, N]``.
        chunk_size: tokens a chunk.

    Returns:
        ``[B, L, heads, head_dim]``.
    """
    length = x.shape[1]
    if not length:
        return x
    state = x.new_zeros(x.shape[0], x.shape[2], x.shape[3], B.shape[3])
    outputs = []
    for first in range(0, length, chunk_size):
        part = slice(first, min(first + chunk_size, length))
        # [B, heads, chunk, ...], and the log of the decay from the chunk's start.
        xs, bs, cs = (t[:, part].transpose(1, 2) for t in (x, B, C))
        decay = log_decay[:, part].transpose(1, 2).cumsum(-1)
        between = decay[..., :, None] - decay[..., None, :]
        causal = torch.ones(between.shape[-2:], device=x.device).tril().bool()
        between = between.masked_fill(~causal, -math.inf).exp()
        y = (cs @ bs.mT * between) @ xs
        y = y + decay.exp()[..., None] * (cs @ state.mT)
        remaining = (decay[..., -1:] - decay).exp()
        state = (
            decay[..., -1:, None].exp() * state + (remaining[..., None] * xs).mT @ bs
        )
        outputs.append(y.transpose(1, 2))
    return torch.cat(outputs, dim=1)


def _divisors(number: int) -> str:
    divisors = [d for d in range(8, 129) if number % d == 0]
    return ', '.join(map(str, divisors[:6]))
