"""Names of packages that are imported when they are first used."""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def importer(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """Make the ``__getattr__`` of a package (PEP 562).

    Args:
        package: Its ``__name__``.
        modules: The module of each name, from ``dynamicvis_geo`` on.
    """

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f'module {package!r} has no attribute {name!r}')
        value = getattr(import_module(f'dynamicvis_geo.{modules[name]}'), name)
        setattr(sys.modules[package], name, value)
        return value

    return get
