"""The backbone and the device that options describe, without what a Trainer needs."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.models.config import BackboneConfig

if TYPE_CHECKING:
    import torch


def backbone_fields(arguments: Namespace) -> dict[str, Any]:
    """Turn ``--weights`` and ``--img-size`` into fields of :class:`BackboneConfig`.

    Args:
        arguments: The options.

    Returns:
        The fields that they give.
    """
    fields: dict[str, Any] = {}
    if arguments.weights == 'random':
        fields['weights'] = 'random'
    elif arguments.weights != 'pretrained':
        fields['checkpoint'] = Path(arguments.weights)
    if arguments.img_size is not None:
        fields['img_size'] = arguments.img_size
    return fields


def backbone_config(arguments: Namespace) -> BackboneConfig:
    """Make the configuration that the environment and the options describe.

    Args:
        arguments: The options.

    Raises:
        SpecError: if a variable has a value that cannot be used.
    """
    return BackboneConfig.from_env(**backbone_fields(arguments))


def feature_shape(config: BackboneConfig, stage: int = 3) -> tuple[int, int, int]:
    """Compute the shape of feature maps without making the model.

    Args:
        config: The backbone.
        stage: Whose maps, 0 to 3.

    Returns:
        Channels, height and width.
    """
    size = config.img_size
    height, width = size if isinstance(size, tuple) else (size, size)
    # Each stage halves the sides and doubles the channels; a last cell is 32 pixels.
    cell, channels = 4 << stage, 96 << stage
    if config.named_arch == 'l':
        channels = 128 << stage
    return channels, -(-height // cell), -(-width // cell)


def check_device(device: str, processes: int | str = 1) -> tuple[str, str]:
    """Refuse a device that cannot be anywhere.

    Args:
        device: Value of ``--device``.
        processes: Value of ``--devices``.

    Returns:
        Its kind, and its number or nothing.

    Raises:
        SpecError: if there is no such device, or one is to be several.
    """
    kind, colon, number = device.partition(':')
    if kind not in ('auto', 'cpu', 'cuda', 'mps') or (
        colon and not (kind == 'cuda' and number.isdecimal())
    ):
        raise SpecError(
            f'--device {device!r} is unknown: choose auto, cpu, cuda, cuda:N or mps'
        )
    if colon and processes != 1:
        raise SpecError(
            f'--device {device} is one device, and --devices {processes} asks for '
            'several: give --device cuda, or leave out --devices'
        )
    return kind, number


def choose_device(
    device: str, processes: int | str = 1
) -> tuple[str, str | int | list[int]]:
    """Turn ``--device`` and ``--devices`` into Lightning's accelerator and devices.

    Args:
        device: Value of ``--device``.
        processes: Value of ``--devices``.

    Returns:
        Lightning's ``accelerator`` and ``devices``.

    Raises:
        SpecError: if there is no such device here, or not so many.
    """
    import torch

    kind, number = check_device(device, processes)
    if kind == 'cuda':
        count = torch.cuda.device_count()
        if not number and count:
            return 'cuda', _at_most(processes, count)
        if int(number or 0) >= count:
            raise SpecError(
                f'--device {device}: PyTorch finds {count} CUDA devices here: choose '
                'another, or --device cpu'
            )
        return 'cuda', [int(number or 0)]
    if kind == 'mps' and not torch.backends.mps.is_available():
        raise SpecError('--device mps: PyTorch finds no MPS here: choose --device cpu')
    return kind, processes


def _at_most(processes: int | str, count: int) -> int | str:
    if isinstance(processes, int) and processes > count:
        raise SpecError(
            f'--devices {processes}: PyTorch finds {count} CUDA devices here: ask for '
            'so many, or for auto'
        )
    return processes


def torch_device(device: str) -> torch.device:
    """Turn ``--device`` into PyTorch's.

    Args:
        device: Value of ``--device``.

    Returns:
        PyTorch's device.

    Raises:
        SpecError: if there is no such device here.
    """
    import torch

    choose_device(device)
    if device != 'auto':
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device('cuda')
    return torch.device('mps' if torch.backends.mps.is_available() else 'cpu')
