"""``dynamicvis-geo predict``: a prediction run described by a YAML file.

LightningCLI adds the arguments, also for ``--help``; it needs all classes for that.
"""

from argparse import Namespace
from collections.abc import Sequence
from itertools import pairwise

from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.paths import is_url, kind_of, local_input


def run(arguments: Namespace) -> int:
    """Run what the arguments and files of configuration describe.

    Raises:
        SpecError: if they describe nothing that can be run.
    """
    configs = config_files(arguments.rest)
    for name in configs:
        if not is_url(name) and kind_of(local_input(name)) is None:
            raise SpecError(
                f'--config {name}: no such file; give a YAML file, or see '
                'dynamicvis-geo predict --help'
            )
    # What takes seconds to import comes after what can be told without.
    from dynamicvis_geo.commands.lightning_cli import run_configured

    return run_configured(arguments.rest, configs)


def config_files(arguments: Sequence[str]) -> list[str]:
    """Return the files of configuration among arguments.

    Args:
        arguments: Those of the command.
    """
    pairs = pairwise(arguments)
    found = [after for name, after in pairs if name in ('-c', '--config')]
    return found + [
        name.removeprefix('--config=')
        for name in arguments
        if name.startswith('--config=')
    ]
