"""The C extension; everything else is in pyproject.toml.

`optional`: where there is no compiler, the package installs without it and runs on the
PyTorch form of the scan.
"""

import sys

from setuptools import Extension, setup

FLAGS = ['-std=c11', '-O3', '-g0', '-ffp-contract=fast']
FLAGS += ['-fno-math-errno', '-fno-trapping-math']

setup(
    ext_modules=[
        Extension(
            'dynamicvis_geo.models._scan',
            ['dynamicvis_geo/models/_scan.c'],
            extra_compile_args=['/O2'] if sys.platform == 'win32' else FLAGS,
            # It uses nothing of Python, so it fits every version.
            py_limited_api=True,
            optional=True,
        )
    ],
    options={'bdist_wheel': {'py_limited_api': 'cp311'}},
)
