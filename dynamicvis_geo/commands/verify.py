"""``dynamicvis-geo verify``: this implementation against the official code.

Run the official code and this implementation with the same weights on the same images,
on this machine, and report how far they differ. Exits with 1 if that is more than
rounding explains.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dynamicvis_geo.commands.options import (
    add_backbone,
    add_device,
    add_examples,
    add_precision,
    images,
)
from dynamicvis_geo.errors import SourceError
from dynamicvis_geo.paths import AnyPath

if TYPE_CHECKING:
    from torch import Tensor

DISAGREE = 1


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_examples(
        parser,
        'dynamicvis-geo verify',
        'dynamicvis-geo verify scene.tif --weights weights.pth --precision bf16-mixed',
    )
    parser.add_argument(
        'images',
        type=images,
        nargs='*',
        metavar='IMAGE',
        help='GeoTIFFs, each resized to one input (default: two generated images)',
    )
    add_backbone(parser)
    add_device(parser)
    add_precision(parser)


def run(arguments: Namespace) -> int:
    """Compare, print the report, and give the exit code."""
    from dynamicvis_geo.commands.backbone import backbone_config, torch_device
    from dynamicvis_geo.models.verify import format_report, verify

    device = torch_device(arguments.device)
    config = backbone_config(arguments)
    images = _read(arguments.images, config.img_size) if arguments.images else None
    report = verify(config, images, device=device, precision=arguments.precision)
    print(format_report(report))
    return 0 if report.agrees else DISAGREE


def _read(paths: Sequence[AnyPath], img_size: int | tuple[int, int]) -> Tensor:
    """Read the first three bands of images and preprocess them."""
    import numpy as np
    import torch
    from rasterio.errors import RasterioError

    from dynamicvis_geo.rasters import open_raster
    from dynamicvis_geo.transforms import Preprocess

    preprocess = Preprocess(img_size)
    images = []
    for path in paths:
        try:
            with open_raster(path) as file:
                if file.count < 3:
                    raise SourceError(
                        f'{path}: the file has {file.count} bands: give an image of '
                        'red, green and blue'
                    )
                pixels = file.read((1, 2, 3)).astype(np.float32)
        except RasterioError as error:
            raise SourceError(
                f'{path}: rasterio cannot read it ({error}): give a GeoTIFF'
            ) from error
        images.append(preprocess(torch.from_numpy(pixels)))
    return torch.stack(images)
