"""The official backbone once more, step by step as it is specified: slow and plain.

It has the official names of parameters, walks through time in a loop, and shares no
code with the package. One mistake of those that are easily made can be planted in it.
"""

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynamicvis_geo.models import DynamicVis

#: What somebody who writes the network anew gets wrong.
MISTAKES = (
    'tokens in raster order',
    'tokens in ascending order',
    'global tokens zero',
    'is_softmax_on_x off',
    'forward direction only',
    'reverse not flipped back',
    'D dropped',
    'conv bias dropped',
    'B and C swapped',
    'pos_embed transposed',
    'Mamba output zero',
)


class Reference(nn.Module):
    """A twin of a model, with its weights, in float64 if asked for."""

    def __init__(self, model: DynamicVis, mistake: str | None = None) -> None:
        super().__init__()
        assert mistake is None or mistake in MISTAKES
        settings = model.settings
        widths = model.widths
        channels = (3, *widths)
        self.mistake, self.grid = mistake, model.grid
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    _Patches(channels[stage], width, 7 if stage == 0 else 3, stage),
                    nn.Sequential(
                        *(
                            _Mixer(width, stage, settings, mistake)
                            for _ in model.layers[stage][1]  # type: ignore[index]
                        )
                    ),
                    nn.LayerNorm(width, eps=1e-6),
                ]
            )
            for stage, width in enumerate(widths)
        )
        self.pos_embed = nn.Parameter(torch.empty_like(model.pos_embed))
        self.load_state_dict(copy.deepcopy(model.state_dict()))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        for stage, (patches, mixers, norm) in enumerate(self.layers):  # type: ignore[misc]
            x = patches.projection(x)
            height, width = x.shape[2:]
            x = patches.norm(x.flatten(2).mT)
            if stage == 0:
                x = x + self._positions()
            x = norm(mixers(x)).mT.unflatten(2, (height, width))
        return (x,)

    def _positions(self) -> Tensor:
        if self.mistake != 'pos_embed transposed':
            return self.pos_embed
        return self.pos_embed.unflatten(1, self.grid).transpose(1, 2).flatten(1, 2)


class _Patches(nn.Module):
    def __init__(self, channels: int, width: int, kernel: int, stage: int) -> None:
        super().__init__()
        stride = 4 if stage == 0 else 2
        self.projection = nn.Conv2d(channels, width, kernel, stride, kernel // 2)
        self.norm = nn.LayerNorm(width, eps=1e-6)


class _Mixer(nn.Module):
    def __init__(
        self, width: int, stage: int, settings: dict[str, Any], mistake: str | None
    ) -> None:
        super().__init__()
        assert settings['global_token_pos'] in ('head', 'none')
        self.ratio = settings['spatial_token_keep_ratios'][stage]
        self.globals = settings['global_tokens'][stage]
        self.on_all = settings['is_softmax_on_x'] and mistake != 'is_softmax_on_x off'
        self.mistake = mistake
        self.spatial_gate = nn.Linear(width, 1, bias=False)
        self.spatial_mamba_mixer = _Block(width, settings, mistake)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.spatial_gate(x).softmax(1)
        ids = torch.topk(weights[..., 0], x.shape[1] // self.ratio, dim=1)[1]
        if self.mistake == 'tokens in raster order':
            ids = ids.sort(1).values
        if self.mistake == 'tokens in ascending order':
            ids = ids.flip(1)
        places = ids[..., None].expand(-1, -1, x.shape[2])
        sequence = x.gather(1, places)
        if self.globals:
            means = F.adaptive_avg_pool1d(x.mT, self.globals).mT
            if self.mistake == 'global tokens zero':
                means = torch.zeros_like(means)
            sequence = torch.cat([means, sequence], 1)
        z = self.spatial_mamba_mixer(sequence)[:, self.globals :]
        chosen = x.gather(1, places) + weights.gather(1, ids[..., None]) * z
        others = x + weights * x if self.on_all else x
        return others.scatter(1, places, chosen)


class _Block(nn.Module):
    def __init__(
        self, width: int, settings: dict[str, Any], mistake: str | None
    ) -> None:
        super().__init__()
        self.path_type, self.mistake = settings['path_type'], mistake
        self.pre_norm = nn.RMSNorm(width, eps=1e-5)
        if settings['mamba2']:
            tiled = settings['mamba2_head_groups'] == 'tiled'
            self.mamba_layer: nn.Module = _Mamba2(width, tiled)
        else:
            self.mamba_layer = _Mamba(width, mistake)
        if self.path_type.endswith('gate'):
            gate = nn.Linear(2 * width, 2, bias=False)
            self.gate_layer = nn.Sequential(gate, nn.Softmax(dim=-1))

    def forward(self, s: Tensor) -> Tensor:
        if self.mistake == 'Mamba output zero':
            return s
        x = s * torch.rsqrt(s.square().mean(-1, keepdim=True) + 1e-5)
        x = x * self.pre_norm.weight
        forward = self.mamba_layer(x)
        if self.path_type == 'forward' or self.mistake == 'forward direction only':
            return s + forward
        reverse = self.mamba_layer(x.flip(1))
        if self.mistake != 'reverse not flipped back':
            reverse = reverse.flip(1)
        if self.path_type == 'forward_reverse_mean':
            return s + (forward + reverse) / 2
        means = torch.cat([forward.mean(1), reverse.mean(1)], 1)
        one, other = self.gate_layer(means)[:, None].split(1, dim=2)
        return s + one * forward + other * reverse


class _Mamba(nn.Module):
    def __init__(self, width: int, mistake: str | None, states: int = 16) -> None:
        super().__init__()
        inner, self.rank, self.states = 2 * width, math.ceil(width / 16), states
        self.mistake = mistake
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, 4, groups=inner, padding=3)
        self.x_proj = nn.Linear(inner, self.rank + 2 * states, bias=False)
        self.dt_proj = nn.Linear(self.rank, inner)
        self.A_log = nn.Parameter(torch.empty(inner, states))
        self.D = nn.Parameter(torch.empty(inner))
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        u, gate = self.in_proj(x).chunk(2, dim=2)
        h = self.conv1d(u.mT)[..., :length]
        if self.mistake == 'conv bias dropped':
            h = h - self.conv1d.bias[:, None]
        h = F.silu(h).mT
        dt, b, c = self.x_proj(h).split([self.rank, self.states, self.states], dim=2)
        if self.mistake == 'B and C swapped':
            b, c = c, b
        dt = F.softplus(self.dt_proj(dt))
        a = -self.A_log.exp()
        state = torch.zeros(*h.shape[::2], self.states, dtype=x.dtype)
        outputs = []
        for t in range(length):
            decay = torch.exp(dt[:, t, :, None] * a)
            state = decay * state + (dt[:, t] * h[:, t])[..., None] * b[:, t, None]
            outputs.append((state * c[:, t, None]).sum(-1))
        y = torch.stack(outputs, 1)
        if self.mistake != 'D dropped':
            y = y + self.D * h
        projected: Tensor = self.out_proj(y * F.silu(gate))
        return projected


class _Mamba2(nn.Module):
    def __init__(
        self, width: int, tiled: bool, head_dim: int = 24, states: int = 32
    ) -> None:
        super().__init__()
        self.inner, self.head_dim, self.states = 2 * width, head_dim, states
        self.heads = self.inner // head_dim
        heads = torch.arange(self.heads)
        self.groups = heads % 2 if tiled else heads // (self.heads // 2)
        mixed = self.inner + 4 * states
        self.in_proj = nn.Linear(width, self.inner + mixed + self.heads, bias=False)
        self.conv1d = nn.Conv1d(mixed, mixed, 4, groups=mixed, padding=3)
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.D = nn.Parameter(torch.empty(self.heads))
        self.norm = nn.RMSNorm(self.inner, eps=1e-5)
        self.out_proj = nn.Linear(self.inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        length, inner, groups = x.shape[1], self.inner, 2 * self.states
        gate, mixed, dt = self.in_proj(x).split(
            [inner, inner + 2 * groups, self.heads], dim=2
        )
        mixed = F.silu(self.conv1d(mixed.mT)[..., :length]).mT
        u, b, c = mixed.split([inner, groups, groups], dim=2)
        u = u.unflatten(2, (self.heads, self.head_dim))
        # For each head the states of its group.
        b, c = (t.unflatten(2, (2, self.states))[:, :, self.groups] for t in (b, c))
        dt = F.softplus(dt + self.dt_bias)
        decay = torch.exp(dt * -self.A_log.exp())
        state = torch.zeros(*u.shape[::2][:1], self.heads, self.head_dim, self.states)
        state = state.to(x.dtype)
        outputs = []
        for t in range(length):
            entering = (dt[:, t, :, None] * u[:, t])[..., None] * b[:, t, :, None]
            state = decay[:, t, :, None, None] * state + entering
            outputs.append((state * c[:, t, :, None]).sum(-1))
        y = torch.stack(outputs, 1) + self.D[:, None] * u
        y = y.flatten(2) * F.silu(gate)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5)
        projected: Tensor = self.out_proj(y * self.norm.weight)
        return projected
