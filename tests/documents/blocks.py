"""The code blocks of a page, and what is to be done with each."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').rglob('*.md'))]

_BLOCK = re.compile(r'^```(\S*)[^\n]*\n(.*?)^```$', re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One code block.

    Attributes:
        language: What stands behind the first fence.
        code: What is between the fences.
        line: Number of its first line in the page, from 1.
    """

    language: str
    code: str
    line: int

    @property
    def commands(self) -> list[str]:
        """The lines of a console block, continued ones joined."""
        lines = self.code.replace('\\\n', ' ').splitlines()
        return [' '.join(line.split()) for line in lines if line.strip()]


def blocks(page: Path) -> Iterator[Block]:
    """Give the code blocks of a page, in their order."""
    text = page.read_text(encoding='utf-8')
    for match in _BLOCK.finditer(text):
        line = text.count('\n', 0, match.start(2)) + 1
        yield Block(match[1], match[2], line)


def arguments(command: str) -> list[str] | None:
    """Give the arguments of a ``dynamicvis-geo`` line, None for another program."""
    program, *rest = shlex.split(command)
    return rest if Path(program).name == 'dynamicvis-geo' else None
