"""Arguments of the commands about the backbone."""

from dynamicvis_geo.arguments.common import (
    Commands,
    add_device,
    add_precision,
    add_weights,
    checkpoint,
    command,
    images,
    local_output_path,
    local_source,
)


def add_commands(commands: Commands) -> None:
    """Add info, verify and convert."""
    _add_info(commands)
    _add_verify(commands)
    _add_convert(commands)


def _add_info(commands: Commands) -> None:
    parser = command(
        commands,
        'info',
        'show the configuration, or inspect a checkpoint',
        'Show the configuration of the backbone and where each value comes from, '
        'versions, the device, and the form of the selective scan that will run; or '
        'inspect a checkpoint without building a model.',
    )
    parser.add_argument(
        '--checkpoint',
        type=checkpoint,
        metavar='FILE|hf://OWNER/NAME[/FILE]',
        help='inspect this file instead; of a Hugging Face repository, list the '
        'checkpoints, or fetch and inspect one',
    )
    add_weights(parser)
    add_device(parser)


def _add_verify(commands: Commands) -> None:
    parser = command(
        commands,
        'verify',
        'compare this implementation with the official code',
        'Run the official code and this implementation with the same weights on the '
        'same images, on this machine, and report how far they differ. Exits with 1 if '
        'that is more than rounding explains.',
    )
    parser.add_argument(
        'images',
        type=images,
        nargs='*',
        metavar='IMAGE',
        help='GeoTIFFs, each resized to one input (default: two generated images)',
    )
    add_weights(parser)
    add_device(parser)
    add_precision(parser)


def _add_convert(commands: Commands) -> None:
    parser = command(
        commands,
        'convert',
        'write the backbone of a checkpoint as safetensors',
        'Write the backbone alone, which is smaller and loads faster; its metadata '
        'says which file it was taken from.',
    )
    parser.add_argument('checkpoint', type=local_source, metavar='CHECKPOINT')
    parser.add_argument('out', type=local_output_path, metavar='OUT.safetensors')
    parser.add_argument(
        '--overwrite', action='store_true', help='replace an output that exists'
    )
