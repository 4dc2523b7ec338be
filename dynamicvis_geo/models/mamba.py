"""The Mamba mixer, and the block that runs it along several paths.

Names of parameters and submodules are those of the official checkpoints.
"""

import functools
import inspect
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.models.config import PATH_TYPES
from dynamicvis_geo.models.mamba2 import HeadGroups, Mamba2Mixer
from dynamicvis_geo.models.scan import run_conv, run_scan


class RMSNorm(nn.Module):
    """Root-mean-square norm over the channels (arXiv 1910.07467).

    Args:
        channels: number of channels.
        eps: added to the mean square.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Divide by the root mean square of the channels.

        Args:
            x: ``[..., channels]``.

        Returns:
            The same shape.
        """
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class MambaMixer(nn.Module):
    """The first Mamba's mixer (arXiv 2312.00752, figure 3), without its norm.

    Args:
        width: channels of the tokens.
        state_size: states a channel.
        conv_kernel: taps of the causal convolution.
        expand: inner channels are ``expand * width``.
        time_step_rank: rank of the time-step projection; ``ceil(width / 16)`` if
            'auto'.
        use_bias: whether `in_proj` and `out_proj` have a bias.
        use_conv_bias: whether the convolution has a bias.
        scan: one of :data:`~dynamicvis_geo.models.config.SCANS`.
    """

    def __init__(
        self,
        width: int,
        state_size: int = 16,
        conv_kernel: int = 4,
        expand: int = 2,
        time_step_rank: int | Literal['auto'] = 'auto',
        use_bias: bool = False,
        use_conv_bias: bool = True,
        scan: str = 'auto',
    ) -> None:
        super().__init__()
        self.scan = scan
        inner = expand * width
        rank = math.ceil(width / 16) if time_step_rank == 'auto' else time_step_rank
        self.split_sizes = [rank, state_size, state_size]
        self.A_log = nn.Parameter(
            torch.arange(1, state_size + 1).float().log().repeat(inner, 1)
        )
        self.D = nn.Parameter(torch.ones(inner))
        self.conv1d = nn.Conv1d(
            inner, inner, conv_kernel, groups=inner, bias=use_conv_bias
        )
        self.in_proj = nn.Linear(width, 2 * inner, bias=use_bias)
        self.x_proj = nn.Linear(inner, rank + 2 * state_size, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.out_proj = nn.Linear(inner, width, bias=use_bias)
        init_time_step_bias_(self.dt_proj.bias)

    def inner(self, x: Tensor, directions: int) -> Tensor:
        """Do everything but the output projection.

        The input projection does not depend on the direction and is done once; the
        output projection is linear, so callers may average directions before it.

        Args:
            x: normalised tokens, ``[B, L, width]``.
            directions: 1 (forward) or 2 (forward, then reverse).

        Returns:
            ``[directions, B, L, inner]``, tokens in their own order.
        """
        tokens, gate = self.in_proj(x).chunk(2, dim=-1)
        h = run_conv(
            self.scan, tokens, self.conv1d.weight, self.conv1d.bias, directions
        )
        dt, B, C = self.x_proj(h).split(self.split_sizes, dim=-1)
        double = self.A_log.dtype == torch.float64
        return run_scan(
            self.scan,
            h,
            F.linear(dt, self.dt_proj.weight),
            -torch.exp(self.A_log if double else self.A_log.float()),
            B,
            C,
            self.D,
            self.dt_proj.bias,
            gate,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens in forward direction.

        Args:
            x: normalised tokens, ``[B, L, width]``.

        Returns:
            ``[B, L, width]``.
        """
        output: Tensor = self.out_proj(self.inner(x, directions=1)[0])
        return output


class MambaBlock(nn.Module):
    """RMSNorm, the mixer along one or more paths, and the residual connection.

    Args:
        width: channels of the tokens.
        path_type: which paths, and how they are joined. The mean or the gated sum of
            the token order, its reverse, and (``shuffle``) a random permutation.
        mamba2: whether the mixer is Mamba-2.
        mamba2_head_groups: see :class:`~dynamicvis_geo.models.mamba2.Mamba2Mixer`.
        layer_cfgs: arguments of the mixer that replace its defaults.
        scan: one of :data:`~dynamicvis_geo.models.config.SCANS`.

    Raises:
        SpecError: if *path_type* or *layer_cfgs* is wrong.
    """

    def __init__(
        self,
        width: int,
        path_type: str = 'forward_reverse_mean',
        mamba2: bool = False,
        mamba2_head_groups: HeadGroups = 'contiguous',
        layer_cfgs: dict[str, Any] | None = None,
        scan: str = 'auto',
    ) -> None:
        super().__init__()
        if path_type not in PATH_TYPES:
            raise SpecError(
                f'path_type={path_type!r} is unknown: choose one of '
                f'{", ".join(PATH_TYPES)}'
            )
        self.directions = 2 if 'reverse' in path_type else int('forward' in path_type)
        self.shuffled = 'shuffle' in path_type
        self.pre_norm = RMSNorm(width)
        self.mamba_layer: MambaMixer | Mamba2Mixer
        try:
            if mamba2:
                self.mamba_layer = Mamba2Mixer(
                    width, mamba2_head_groups, scan=scan, **(layer_cfgs or {})
                )
            else:
                self.mamba_layer = MambaMixer(width, scan=scan, **(layer_cfgs or {}))
        except TypeError as error:
            raise SpecError(
                f'layer_cfgs={layer_cfgs!r} does not fit the mixer ({error}): see the '
                f'arguments of {"Mamba2Mixer" if mamba2 else "MambaMixer"}'
            ) from error
        if path_type.endswith('gate'):
            branches = self.directions + self.shuffled
            self.gate_layer: nn.Module | None = nn.Sequential(
                nn.Linear(branches * width, branches, bias=False), nn.Softmax(dim=-1)
            )
        else:
            self.gate_layer = None

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Mix tokens along the paths of the block.

        Args:
            x: ``[B, L, width]``.
            generator: a CPU generator for the permutation of the ``shuffle`` paths.

        Returns:
            ``[B, L, width]``, in the order of *x*.
        """
        normed = self.pre_norm(x)
        branches = []
        if self.directions:
            branches.append(self.mamba_layer.inner(normed, self.directions))
        if self.shuffled:
            order = torch.randperm(x.shape[1], generator=generator).to(x.device)
            mixed = self.mamba_layer.inner(normed[:, order], directions=1)
            branches.append(mixed[:, :, order.argsort()])
        inner = torch.cat(branches) if len(branches) > 1 else branches[0]
        if self.gate_layer is None:
            # Twice as fast as mean(0), whose reduction is over the outermost axis.
            joined = functools.reduce(torch.add, inner)
            if len(inner) > 1:
                joined /= len(inner)
            added: Tensor = self.mamba_layer.out_proj(joined)
            return x + added
        # The gate is float32 (or wider) also under autocast, as everything is that
        # decides by how much a token moves.
        outputs = self.mamba_layer.out_proj(inner).to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            means = outputs.mean(2).transpose(0, 1).flatten(1)
            shares = self.gate_layer(means)
            return x + torch.einsum('bk,kblc->blc', shares, outputs)


def mixer_settings(
    mixer: type[nn.Module], layer_cfgs: Mapping[str, Any]
) -> dict[str, Any]:
    """Pick the arguments of a mixer's class that decide its features.

    Args:
        mixer: the class.
        layer_cfgs: arguments that replace its defaults.

    Returns:
        Values by the names of the arguments.
    """
    return {
        name: layer_cfgs.get(name, parameter.default)
        for name, parameter in inspect.signature(mixer).parameters.items()
        if name not in ('width', 'head_groups', 'chunk_size', 'scan')
    }


def init_time_step_bias_(bias: Tensor) -> None:
    """Draw time steps, log-uniform in 0.001 to 0.1 after softplus, as in Mamba's code.

    Args:
        bias: of the time steps, ``[I]``; changed in place.
    """
    with torch.no_grad():
        low, high = math.log(1e-3), math.log(1e-1)
        dt = torch.exp(torch.empty_like(bias).uniform_(low, high))
        bias.copy_(dt + torch.log(-torch.expm1(-dt)))
