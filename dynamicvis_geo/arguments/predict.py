"""The command that is described by a YAML file; its arguments are Lightning's."""

from dynamicvis_geo.arguments.common import Commands

#: Its arguments are read by LightningCLI, which knows the classes.
NAME = 'predict'


def add_commands(commands: Commands) -> None:
    """Add predict."""
    commands.add_parser(
        NAME,
        help='run what a YAML file describes, every class configurable',
        add_help=False,
    )
