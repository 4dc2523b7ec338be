"""``dynamicvis-geo completion``: commands, options and files on the Tab key.

Print what a shell has to read for it; ~/.bashrc, ~/.zshrc (below compinit) or
~/.config/fish/config.fish is the place.
"""

from argparse import ArgumentParser, Namespace

from dynamicvis_geo.commands.options import add_examples


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument('shell', choices=('bash', 'zsh', 'fish'), help='yours')
    add_examples(
        parser,
        'eval "$(dynamicvis-geo completion bash)"',
        'dynamicvis-geo completion fish | source',
    )


def run(arguments: Namespace) -> None:
    """Print what the shell has to read."""
    from argcomplete.shell_integration import shellcode

    print(shellcode(['dynamicvis-geo'], shell=arguments.shell))
