"""``dynamicvis-geo info``: what would run, and why.

Show the configuration of the backbone and where each value comes from, versions, the
device, and the kernel of the selective scan that will run; or inspect a checkpoint
without building a model.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from dynamicvis_geo.commands.options import (
    add_backbone,
    add_device,
    add_examples,
    checkpoint,
)
from dynamicvis_geo.errors import SpecError

if TYPE_CHECKING:
    import torch

    from dynamicvis_geo.models.config import BackboneConfig

_HUB = 'hf://'


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_examples(
        parser,
        'dynamicvis-geo info',
        'dynamicvis-geo info --checkpoint hf://KyanChen/DynamicVis',
    )
    parser.add_argument(
        '--checkpoint',
        type=checkpoint,
        metavar='FILE|hf://OWNER/NAME[/FILE]',
        help='inspect this file instead; of a Hugging Face repository, list the '
        'checkpoints, or fetch and inspect one',
    )
    add_backbone(parser)
    add_device(parser)


def run(arguments: Namespace) -> None:
    """Print the configuration, or what a checkpoint holds."""
    from dynamicvis_geo.commands.backbone import (
        backbone_config,
        backbone_fields,
        torch_device,
    )
    from dynamicvis_geo.settings import aligned

    if arguments.checkpoint is not None:
        if arguments.checkpoint.startswith(_HUB):
            print(_on_the_hub(arguments.checkpoint))
        else:
            print(aligned(_checkpoint_rows(Path(arguments.checkpoint))))
        return
    device = torch_device(arguments.device)
    config = backbone_config(arguments)
    print(aligned(_environment_rows(device, config.scan)), end='\n\n')
    print(aligned(_setting_rows(config, backbone_fields(arguments))))


def _on_the_hub(address: str) -> str:
    """List the checkpoints of a repository, or inspect one of them."""
    from dynamicvis_geo.models.weights import fetch_checkpoint, list_checkpoints
    from dynamicvis_geo.settings import aligned

    parts = address.removeprefix(_HUB).strip('/').split('/')
    if len(parts) < 2:
        raise SpecError(
            f'--checkpoint {address!r}: give hf://OWNER/NAME, and /FILE to inspect one '
            'of its checkpoints (hf://OWNER/NAME@REVISION for another revision)'
        )
    owner, name, *file = parts
    name, _, revision = name.partition('@')
    repository, revision = f'{owner}/{name}', revision or 'main'
    if file:
        path = fetch_checkpoint(repository, '/'.join(file), revision)
        return aligned(_checkpoint_rows(path))
    return '\n'.join(list_checkpoints(repository, revision)) or 'no checkpoints'


def _environment_rows(device: torch.device, scan: str) -> Iterable[tuple[str, ...]]:
    import torch

    from dynamicvis_geo.models.scan import resolve_scan, unavailable_kernels
    from dynamicvis_geo.provenance import software_versions

    yield from software_versions().items()
    detail = ''
    if device.type == 'cpu':
        detail = f' (threads: {torch.get_num_threads()})'
    elif device.type == 'cuda':
        detail = f' ({torch.cuda.get_device_name(device)})'
    yield 'device', f'{device}{detail}'
    yield 'selective scan', f'{resolve_scan(scan, device.type)} (asked for: {scan})'
    for kernel, reason in unavailable_kernels().items():
        yield f'  {kernel}', reason or 'available'


def _setting_rows(
    config: BackboneConfig, given: Iterable[str]
) -> Iterable[tuple[str, ...]]:
    from dynamicvis_geo.models.config import sources

    origins = sources(given)
    yield 'setting', 'value', 'from'
    for field in fields(config):
        yield field.name, str(getattr(config, field.name)), origins[field.name]


def _checkpoint_rows(path: Path) -> Iterable[tuple[str, ...]]:
    from dynamicvis_geo.models.safe_load import read_head

    read_head(path)
    from dynamicvis_geo.models.checkpoint import read_checkpoint

    checkpoint = read_checkpoint(path)
    size = checkpoint.img_size
    yield 'file', str(checkpoint.path)
    yield 'SHA-256', checkpoint.sha256
    yield 'arch', checkpoint.arch
    yield 'image size', f'{size[0]} x {size[1]}' if size else 'not told by the file'
    yield 'mixers', 'Mamba-2' if checkpoint.mamba2 else 'Mamba'
    yield 'path type', checkpoint.path_type or 'one without parameters of its own'
    yield 'backbone keys', str(len(checkpoint.state_dict))
    parameters = sum(tensor.numel() for tensor in checkpoint.state_dict.values())
    yield 'parameters', f'{parameters:,}'
    yield 'stored as', _listed(checkpoint.dtypes)
    yield 'ignored keys', _listed(checkpoint.ignored) or 'none'
    yield 'other sections', ', '.join(checkpoint.sections) or 'none'
    for title, values in (
        ('trained with', checkpoint.settings),
        ('meta', checkpoint.meta),
    ):
        yield title, ', '.join(f'{k}={v}' for k, v in values.items()) or 'not told'


def _listed(counts: dict[str, int]) -> str:
    return ', '.join(f'{count} {name}' for name, count in counts.items())
