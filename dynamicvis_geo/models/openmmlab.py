"""Stand-ins for OpenMMLab's packages while the official code is imported.

The official `models.py` imports mmdet, mmseg, opencd and mmpretrain, most of it for
detectors and heads that the backbone does not need. Those packages need a compiled
mmcv, which has no wheel for current PyTorch. Where one is absent, its modules are made
up here: the few pieces that the backbone uses work, and everything else can be imported
and subclassed, but not used.
"""

import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynamicvis_geo.errors import UpstreamError

#: Packages that are stood in for.
PACKAGES = ('mmdet', 'mmpretrain', 'mmseg', 'opencd')
OFFICIAL_PACKAGE = 'dynamicvis'
#: Warnings of the imports about parts that the backbone does not have.
_IRRELEVANT_WARNINGS = ('horovod is not installed', 'Fail to import ``MultiScale')
T = TypeVar('T')


@contextmanager
def official_imports(root: Path, stand_ins: Collection[str]) -> Iterator[None]:
    """Make the repository at *root* importable as `dynamicvis`, for a moment.

    Its packages are namespaces: their `__init__` files, which load datasets and what
    these need, are not run.

    Only names of `dynamicvis` and *stand_ins* are affected: modules of these names that
    were loaded before are put back afterwards, and no others of these names stay. The
    import path is not touched. What has been imported keeps working.

    Args:
        root: folder of the official repository.
        stand_ins: packages of :data:`PACKAGES` to stand in for.
    """
    names = {OFFICIAL_PACKAGE, *stand_ins}
    finder = _Finder(root, stand_ins)
    hidden = _take_modules(names)
    import_path = list(sys.path)
    sys.meta_path.insert(0, finder)
    try:
        with warnings.catch_warnings():
            for message in _IRRELEVANT_WARNINGS:
                warnings.filterwarnings('ignore', message=message)
            yield
    finally:
        sys.meta_path.remove(finder)
        _take_modules(names)
        sys.modules.update(hidden)
        sys.path[:] = import_path


def _take_modules(packages: Collection[str]) -> dict[str, ModuleType]:
    names = [name for name in sys.modules if name.partition('.')[0] in packages]
    return {name: sys.modules.pop(name) for name in names}


class _Finder(MetaPathFinder, Loader):
    """Finds the official package in its repository, and makes up the stand-ins."""

    def __init__(self, root: Path, stand_ins: Collection[str]) -> None:
        self.root = root
        self.stand_ins = stand_ins

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        package = fullname.partition('.')[0]
        if package == OFFICIAL_PACKAGE:
            return self._official_spec(fullname)
        if package in self.stand_ins:
            return ModuleSpec(fullname, self, is_package=True)
        return None

    def _official_spec(self, fullname: str) -> ModuleSpec | None:
        place = self.root.joinpath(*fullname.split('.'))
        file = place.with_name(f'{place.name}.py')
        if file.is_file():
            return spec_from_file_location(fullname, file)
        if not place.is_dir():
            return None
        spec = ModuleSpec(fullname, None, is_package=True)
        spec.submodule_search_locations = [str(place)]
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: the module answers to every name."""


class _StandIn(ModuleType):
    """A module in which every name can be imported."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith('__'):
            raise AttributeError(name)
        if name == 'BaseBackbone':
            return import_module('mmengine.model').BaseModule
        if name in _PIECES:
            return _PIECES[name]
        if self.__name__.endswith('.registry'):
            return _Registry()
        return _placeholder(self.__name__, name)


class _Registry:
    """A registry that registers nothing."""

    def register_module(
        self, *_: Any, module: type | None = None, **__: Any
    ) -> type | Callable[[T], T]:
        """Leave the class as it is, as a decorator or called with `module`."""
        return module if module is not None else lambda cls: cls


def _placeholder(module: str, name: str) -> type:
    """Give a class that can be imported and subclassed."""
    package = module.partition('.')[0]

    def refuse(self: object, *_: Any, **__: Any) -> None:
        raise UpstreamError(
            f'{module}.{name} stands in for a part of {package}, which was not at hand '
            f'when the official code was imported: only the backbone can be used. For '
            f'the rest, install {package}'
        )

    return type(name, (), {'__init__': refuse, '__module__': module})


def _nlc_to_nchw(x: Tensor, hw_shape: Sequence[int]) -> Tensor:
    """Turn tokens ``[B, h * w, C]`` into a map ``[B, C, h, w]``."""
    height, width = hw_shape
    return x.mT.reshape(*x.mT.shape[:2], height, width).contiguous()


def _nchw_to_nlc(x: Tensor) -> Tensor:
    """Turn a map ``[B, C, h, w]`` into tokens ``[B, h * w, C]``."""
    return x.flatten(2).transpose(1, 2).contiguous()


def _build_norm_layer(cfg: Mapping[str, Any], num_features: int) -> nn.Module:
    """Build the layer that ``cfg['type']`` names; mmcv's builder names it as well."""
    layer: nn.Module = import_module('mmcv.cnn').build_norm_layer(cfg, num_features)[1]
    return layer


def _resize_pos_embed(
    pos_embed: Tensor,
    src_shape: Sequence[int],
    dst_shape: Sequence[int],
    mode: str = 'bicubic',
    num_extra_tokens: int = 1,
) -> Tensor:
    """Resize ``[1, extra + h * w, C]`` to another grid, in float32."""
    if tuple(src_shape) == tuple(dst_shape):
        return pos_embed
    height, width = src_shape
    count = pos_embed.shape[1] - num_extra_tokens
    if count != height * width:
        raise UpstreamError(
            f'pos_embed has {count} tokens, which are not the {height} x {width} grid '
            'that the official code takes them for: it resizes square images only'
        )
    extra, tokens = pos_embed.split([num_extra_tokens, count], dim=1)
    grid = tokens.float().transpose(1, 2).unflatten(-1, (height, width))
    resized = F.interpolate(grid, tuple(dst_shape), mode=mode, align_corners=False)
    return torch.cat(
        [extra, resized.flatten(2).transpose(1, 2).to(tokens.dtype)], dim=1
    )


_PIECES: Mapping[str, Any] = {
    'build_norm_layer': _build_norm_layer,
    'nchw_to_nlc': _nchw_to_nlc,
    'nlc_to_nchw': _nlc_to_nchw,
    'resize_pos_embed': _resize_pos_embed,
}
