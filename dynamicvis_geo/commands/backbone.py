"""The backbone and the device that options describe, without what a Trainer needs."""

from pathlib import Path
from typing import Any

import torch

from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.models.config import BackboneConfig


def weights_fields(weights: str) -> dict[str, Any]:
    """Turn ``--weights`` into fields of :class:`BackboneConfig`.

    Args:
        weights: The value of the option.

    Returns:
        The fields.
    """
    if weights == 'pretrained':
        return {}
    if weights == 'random':
        return {'weights': 'random'}
    return {'checkpoint': Path(weights)}


def backbone_config(weights: str) -> BackboneConfig:
    """Make the configuration that the environment and ``--weights`` describe.

    Args:
        weights: The value of the option.

    Raises:
        SpecError: if a variable has a value that cannot be used.
    """
    return BackboneConfig.from_env(**weights_fields(weights))


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
    if kind == 'cuda':
        count = torch.cuda.device_count()
        if not colon and count:
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
    choose_device(device)
    if device != 'auto':
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device('cuda')
    return torch.device('mps' if torch.backends.mps.is_available() else 'cpu')
