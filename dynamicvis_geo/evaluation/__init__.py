"""How good features are: splits, probes and their scores."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynamicvis_geo.evaluation.report import Results, evaluate

# The datasets import the splits from here: they need neither scikit-learn nor torch.
_NAMES = ('Results', 'evaluate')

__all__ = ('Results', 'evaluate')


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(f'{__name__}.report'), name)
