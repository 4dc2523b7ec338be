"""What the documentation needs beyond Markdown, for mkdocs.yml."""

import argparse
import re
from collections.abc import Iterator
from typing import Any

import griffe

from dynamicvis_geo import cli

#: A role of Sphinx in a docstring, such as :class:`~dynamicvis_geo.ChipDataset`.
_ROLE = re.compile(r':(?:class|func|meth|mod|attr|data):`([~.]?)([^`]+)`')


class RolesAsCode(griffe.Extension):
    """Shows roles of Sphinx, which the code's docstrings use, as plain code."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Replace the roles of one docstring."""
        if obj.docstring is not None:
            text = obj.docstring.value.replace('``', '`')
            obj.docstring.value = _ROLE.sub(_code, text)


def _code(match: re.Match[str]) -> str:
    short, name = match.groups()
    return f'`{name.rpartition(".")[2] if short else name}`'


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Fill the page of commands with what ``--help`` says (a hook of MkDocs)."""
    if page.file.src_uri != 'reference/commands.md':
        return markdown
    sections = [
        f'## {parser.prog}\n\n```text\n{parser.format_help()}```\n'
        for parser in _commands(cli._parser(list(cli.COMMANDS)))
    ]
    return '\n\n'.join([markdown, *sections])


def _commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield command
                yield from _commands(command)
