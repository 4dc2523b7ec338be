"""The C library, and the README as the index shows it; the rest is in pyproject.toml.

`optional`: where there is no compiler, the package installs without it and runs on the
PyTorch form of the scan.
"""

import re
import sys
import tomllib
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
FLAGS = ['-std=c11', '-O3', '-g0', '-ffp-contract=fast']
FLAGS += ['-fno-math-errno', '-fno-trapping-math']


class BuildLibrary(build_ext):
    """It uses nothing of Python, so its name and its symbols have nothing of Python."""

    def get_ext_filename(self, fullname: str) -> str:
        """Name the file with the ending that fits every Python."""
        return str(Path(*fullname.split('.'))) + EXTENSION_SUFFIXES[-1]

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """Leave out the function that a module of Python has."""
        return ext.export_symbols


class Wheel(bdist_wheel):
    """It fits every Python 3, and without the library every platform."""

    def run(self) -> None:
        """See if the library could be built, and make the wheel."""
        self.run_command('build')
        outputs = self.get_finalized_command('build_ext').get_outputs()
        if not any(Path(path).exists() for path in outputs):
            self.distribution.ext_modules = []
            self.root_is_pure = True
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        """Give the tags of Python, of its ABI, and of the platform."""
        return 'py3', 'none', super().get_tag()[-1]


def readme() -> str:
    """Read README.md, with links that work away from the repository."""
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text('utf-8'))['project']
    repository = project['urls']['Repository']
    fence = re.compile(r'(^```.*?^```$)', re.DOTALL | re.MULTILINE)
    link = re.compile(
        r'(?P<before>\]\(|^\[[^]]+\]:\s*|\b(?:src|srcset|href)=")'
        r'(?![a-z]+:|#)(?P<path>[^)\s"]+)',
        re.MULTILINE,
    )

    def absolute(found: re.Match[str]) -> str:
        image = re.search(r'\.(png|jpe?g|gif|svg|webp)$', found['path'])
        kind = 'raw' if image else 'blob'
        return f'{found["before"]}{repository}/{kind}/HEAD/{found["path"]}'

    parts = fence.split((ROOT / 'README.md').read_text('utf-8'))
    # Code stands at odd places.
    parts[::2] = (link.sub(absolute, text) for text in parts[::2])
    return ''.join(parts)


setup(
    long_description=readme(),
    long_description_content_type='text/markdown',
    ext_modules=[
        Extension(
            'dynamicvis_geo.models._scan',
            ['dynamicvis_geo/models/_scan.c'],
            extra_compile_args=['/O2'] if sys.platform == 'win32' else FLAGS,
            optional=True,
        )
    ],
    cmdclass={'bdist_wheel': Wheel, 'build_ext': BuildLibrary},
)
