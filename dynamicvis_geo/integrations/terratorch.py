"""DynamicVis among the backbones of TerraTorch; importing this registers it.

TerraTorch's factories, tasks and configurations know ``dynamicvis_b`` and
``dynamicvis_l`` then. It needs ``pip install 'dynamicvis-geo[terratorch]'``.
"""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from terratorch.registry import TERRATORCH_BACKBONE_REGISTRY
from torch import Tensor, nn

from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.integrations import timm
from dynamicvis_geo.models import DynamicVis

#: Bands of the official weights, in their order, by TerraTorch's names.
PRETRAINED_BANDS = ('RED', 'GREEN', 'BLUE')


class Encoder(nn.Module):
    """Feature maps of DynamicVis, as TerraTorch's models want an encoder.

    Args:
        maps: A model of timm with ``features_only``.

    Attributes:
        out_channels: Channels of each map.
    """

    def __init__(self, maps: nn.Module) -> None:
        super().__init__()
        self.maps = maps
        self.out_channels: list[int] = maps.feature_info.channels()  # type: ignore[union-attr, operator]

    def forward(self, x: Tensor, **_: Any) -> list[Tensor]:
        """Give the maps; what else TerraTorch hands on of a batch has no effect.

        Args:
            x: Normalised image, ``[B, C, H, W]``.
            **_: Other keys of the batch.

        Returns:
            ``[B, channels, h, w]`` of each stage that was asked for.

        Raises:
            SpecError: If *x* is smaller than 16 pixels.
        """
        return cast(list[Tensor], self.maps(x))


def dynamicvis_b(pretrained: bool = False, **arguments: Any) -> Encoder:
    """Build DynamicVis of arch b for TerraTorch.

    Args:
        pretrained: Whether to load weights, by default the official ones.
        **arguments: ``bands``, the names by TerraTorch of the image's bands in their
            order (the weights are of RED, GREEN and BLUE; those of other bands are
            initialised at random); ``ckpt_path``, a file with other weights, read if
            *pretrained*; and those of the model in timm, such as ``img_size``, pixels
            of a side, and ``out_indices``, stages whose maps are given.

    Returns:
        The encoder, in float32 on the CPU, not frozen.

    Raises:
        CheckpointError: If the weights cannot be fetched or read, or do not fit.
        SpecError: If an argument has a value that cannot be used.
    """
    return _encoder(timm.dynamicvis_b, pretrained, **arguments)


def dynamicvis_l(pretrained: bool = False, **arguments: Any) -> Encoder:
    """Build DynamicVis of arch l for TerraTorch.

    Args:
        pretrained: Whether to load weights, by default the official ones.
        **arguments: As of :func:`dynamicvis_b`.

    Returns:
        The encoder, in float32 on the CPU, not frozen.

    Raises:
        CheckpointError: If the weights cannot be fetched or read, or do not fit.
        SpecError: If an argument has a value that cannot be used.
    """
    return _encoder(timm.dynamicvis_l, pretrained, **arguments)


for _builder in (dynamicvis_b, dynamicvis_l):
    TERRATORCH_BACKBONE_REGISTRY.register(_builder)


def _encoder(
    build: Callable[..., nn.Module],
    pretrained: bool,
    bands: Sequence[Any] | None = None,
    ckpt_path: str | Path | None = None,
    **arguments: Any,
) -> Encoder:
    names = PRETRAINED_BANDS if bands is None else _names(bands)
    if bands is not None and arguments.pop('in_chans', len(names)) != len(names):
        raise SpecError(f'bands={names!r} are not as many as in_chans: leave that out')
    if ckpt_path is not None:
        if pretrained:
            arguments['pretrained_cfg_overlay'] = {'file': str(ckpt_path)}
        else:
            # As TerraTorch's own: a configuration is used again for a trained model.
            warnings.warn(
                f'ckpt_path={str(ckpt_path)!r} is not read: that needs pretrained=True',
                stacklevel=3,
            )
    maps = build(pretrained, features_only=True, **arguments)
    if names != PRETRAINED_BANDS:
        _take_bands(cast(DynamicVis, maps.model), names)
    return Encoder(maps)


def _names(bands: Sequence[Any]) -> tuple[str, ...]:
    from terratorch.datasets import OpticalBands, SARBands

    known = {band.value for band in (*OpticalBands, *SARBands)}
    # Members of TerraTorch's enumerations, their values, or such as 'HLSBands.RED'.
    names = tuple(str(getattr(b, 'value', b)).rpartition('.')[2] for b in bands)
    if not names or not known.issuperset(names):
        raise SpecError(f'bands={names!r}: give some of {", ".join(sorted(known))}')
    return names


def _take_bands(backbone: DynamicVis, names: Sequence[str]) -> None:
    """Let a backbone that takes red, green and blue take other bands."""
    patches = cast(nn.ModuleList, backbone.layers[0])[0]
    old = cast(nn.Conv2d, patches.projection)
    new = nn.Conv2d(
        len(names),
        old.out_channels,
        cast(tuple[int, int], old.kernel_size),
        cast(tuple[int, int], old.stride),
        cast(tuple[int, int], old.padding),
    )
    nn.init.kaiming_normal_(new.weight, mode='fan_out')
    new.bias = old.bias
    with torch.no_grad():
        for column, name in enumerate(names):
            if name in PRETRAINED_BANDS:
                new.weight[:, column] = old.weight[:, PRETRAINED_BANDS.index(name)]
    patches.projection = new
