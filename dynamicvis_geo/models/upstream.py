"""The official DynamicVis code, run unchanged beside the native backbone.

It is found in a folder of the user's, installed, or cloned with git at a pinned commit,
and imported beside stand-ins. Its `models.py` imports mmdet, mmseg, opencd and
mmpretrain, most of it for detectors and heads that the backbone does not need, and
those packages need a compiled mmcv, which has no wheel for current PyTorch. So their
modules are made up here, also where they are installed: the few pieces that the
backbone uses work, and everything else can be imported and subclassed, but not used.
"""

import functools
import importlib
import importlib.util
import io
import logging
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynamicvis_geo.errors import UpstreamError
from dynamicvis_geo.models.config import BackboneConfig
from dynamicvis_geo.models.repository import (
    checked_clone,
    clone_folder,
    clone_repository,
    is_edited,
    repository_commit,
)

#: The one version with which the official code gives the published features.
TRANSFORMERS_VERSION = '4.50.0'

_PACKAGE = 'dynamicvis'
_MODULE = f'{_PACKAGE}.models.models'
_CLASS = 'DynamicVisBackbone'
_MODELS_FILE = Path(_PACKAGE, 'models', 'models.py')
_STOOD_IN_FOR = ('mmdet', 'mmpretrain', 'mmseg', 'opencd')
_REQUIRED = ('einops', 'mmcv', 'mmengine', 'transformers')
_INSTALL = 'pip install "dynamicvis-geo[upstream]"'
_OFFICIAL = f'commit {BackboneConfig.repo_commit} of {BackboneConfig.repo_url}'
#: Warnings of the imports about parts that the backbone does not have.
_IRRELEVANT_WARNINGS = ('horovod is not installed', 'Fail to import ``MultiScale')

_log = logging.getLogger(__name__)
_import_lock = threading.Lock()


def load_upstream_class(
    repo_path: str | Path | None = None,
    repo_url: str = BackboneConfig.repo_url,
    repo_commit: str = BackboneConfig.repo_commit,
    repo_cache: str | Path | None = None,
    auto_download: bool = True,
) -> type[nn.Module]:
    """Give the official `DynamicVisBackbone` class.

    It is taken from *repo_path* if that is given, else from an installed `dynamicvis`,
    else from a clone in *repo_cache*, which is made if there is none. The import leaves
    `sys.path`, and the modules of `dynamicvis` and of OpenMMLab's packages in
    `sys.modules`, as they were; the class works all the same, but its instances cannot
    be pickled.

    Args:
        repo_path: folder of the official repository, used as it is, at any commit.
        repo_url: what git clones.
        repo_commit: full hash of the commit to clone.
        repo_cache: folder of the clones; that of `BackboneConfig` if None.
        auto_download: whether cloning is allowed.

    Returns:
        The class, a :class:`torch.nn.Module`.

    Raises:
        UpstreamError: if the code cannot be found, fetched or imported, or a package
            that it needs is missing or has the wrong version.
    """
    cache = Path(repo_cache or BackboneConfig.repo_cache).expanduser()
    root = _find_repository(repo_path, repo_commit, cache)
    if root is None and not auto_download:
        raise UpstreamError(
            f'the official code is not installed, repo_path is not given, {cache} has '
            f'no clone of commit {repo_commit}, and auto_download_repo=False forbids '
            f'cloning {repo_url}: set repo_path to a folder with the repository, or '
            'allow cloning'
        )
    _check_packages()
    root = root or clone_repository(repo_url, repo_commit, cache)
    if not (root / _MODELS_FILE).is_file():
        raise UpstreamError(
            f'{root} has no file {_MODELS_FILE}, so it is not the official code: use '
            f'{_OFFICIAL}'
        )
    with _import_lock:
        return _import_class(root.resolve())


def build_upstream(
    config: BackboneConfig,
    arch: str,
    trained: Mapping[str, Any] | None = None,
    out_indices: Sequence[int] = (3,),
) -> nn.Module:
    """Build the official backbone, frozen and in eval mode, without trained weights.

    Args:
        config: which code to run and with what settings.
        arch: 'b' or 'l'.
        trained: arguments with which the checkpoint was trained.
        out_indices: stages whose maps are returned.

    Returns:
        The backbone, on the CPU, with its initial weights.

    Raises:
        UpstreamError: if the code cannot be had, or refuses the settings.
    """
    cls = load_upstream_class(
        config.repo_path,
        config.repo_url,
        config.repo_commit,
        config.repo_cache,
        config.auto_download_repo,
    )
    arguments = config.model_arguments(arch, trained or {})
    scale = config.sampling_scale
    arguments |= {
        'sampling_scale': dict(scale)
        if isinstance(scale, Mapping)
        else {'type': 'fixed', 'val': scale},
        'out_indices': tuple(out_indices),
        'out_type': 'featmap',
    }
    if not config.mamba2:
        # The official default wants the mambapy package, which acts in training only.
        arguments['layer_cfgs'] = {
            **(arguments.get('layer_cfgs') or {}),
            'use_mambapy': False,
        }
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            model = cls(**arguments)
    except (ImportError, KeyError, TypeError, ValueError) as error:
        raise UpstreamError(
            f'{_CLASS} of {upstream_source(cls).file} refuses {arguments} '
            f'({type(error).__name__}: {error}): use {_OFFICIAL}, and run {_INSTALL}'
        ) from error
    _log.debug('%s printed: %s', _CLASS, printed.getvalue())
    # Not chained: the official train() and eval() return None.
    model.requires_grad_(False)
    model.eval()
    return model


@dataclass(frozen=True)
class UpstreamSource:
    """The origin of an official class.

    Attributes:
        file: of the class.
        commit: of the repository around the file; None if there is none.
        edited: whether files of the repository differ from those of the commit; None
            if that cannot be told.
    """

    file: Path
    commit: str | None
    edited: bool | None

    @property
    def is_pinned(self) -> bool:
        """True if it is the commit that this package is made for."""
        return self.commit == BackboneConfig.repo_commit


def upstream_source(cls: type) -> UpstreamSource:
    """Find the origin of an official class.

    Args:
        cls: what :func:`load_upstream_class` gave.

    Returns:
        File, commit, and whether it was edited.
    """
    file = Path(cls.__init__.__code__.co_filename)  # type: ignore[misc]
    root = file.parents[2]
    return UpstreamSource(file, repository_commit(root), is_edited(root))


def _find_repository(
    repo_path: str | Path | None, commit: str, cache: Path
) -> Path | None:
    """Find the official code on this machine; None if it must be cloned."""
    if repo_path is not None:
        root = Path(repo_path).expanduser()
        if not (root / _MODELS_FILE).is_file():
            raise UpstreamError(
                f'repo_path={str(repo_path)!r} has no file {_MODELS_FILE}: give the '
                f'folder that {BackboneConfig.repo_url} was cloned to'
            )
        return root
    clone = clone_folder(cache, commit)
    spec = importlib.util.find_spec(_PACKAGE)
    for location in (spec and spec.submodule_search_locations) or ():
        if (Path(location).parent / _MODELS_FILE).is_file():
            return Path(location).parent
    return checked_clone(clone, commit) if clone.exists() else None


def _check_packages() -> None:
    """Import what the official code is built on, so that what is missing is said."""
    missing, failing = [], []
    for name in _REQUIRED:
        if importlib.util.find_spec(name) is None:
            missing.append(name)
            continue
        try:
            importlib.import_module(name)
        except (ImportError, AttributeError, KeyError) as error:
            failing.append(f'{name} ({error})')
    if missing or failing:
        problems = [f'{", ".join(missing)} is not installed'] if missing else []
        problems += [f'cannot import {", ".join(failing)}'] if failing else []
        raise UpstreamError(
            f"implementation='upstream': {', and '.join(problems)}: run {_INSTALL}"
        )
    version = sys.modules['transformers'].__version__
    if version != TRANSFORMERS_VERSION:
        raise UpstreamError(
            f'the official code needs transformers {TRANSFORMERS_VERSION}, not '
            f'{version}: others lack settings that it relies on, or compute other '
            f'features. Run {_INSTALL}, in an environment of its own if something else '
            "needs another version, or use implementation='native'"
        )


@functools.cache
def _import_class(root: Path) -> type[nn.Module]:
    try:
        with _official_imports(root):
            cls: type[nn.Module] = getattr(importlib.import_module(_MODULE), _CLASS)
            return cls
    except Exception as error:  # Importing runs others' code: anything may come.
        raise UpstreamError(
            f'{root / _MODELS_FILE} cannot be imported ({type(error).__name__}: '
            f'{error}): use {_OFFICIAL}, and run {_INSTALL}'
        ) from error


@contextmanager
def _official_imports(root: Path) -> Iterator[None]:
    """Make the repository at *root* importable, beside the stand-ins, for a moment.

    Its packages are namespaces: their `__init__` files, which load datasets and what
    these need, are not run. Modules of the same names that were loaded before are put
    back afterwards, and no others stay; what has been imported keeps working.
    """
    finder = _Finder(root)
    hidden = _take_modules()
    import_path = list(sys.path)
    sys.meta_path.insert(0, finder)
    try:
        with warnings.catch_warnings():
            for message in _IRRELEVANT_WARNINGS:
                warnings.filterwarnings('ignore', message=message)
            yield
    finally:
        sys.meta_path.remove(finder)
        _take_modules()
        sys.modules.update(hidden)
        sys.path[:] = import_path


def _take_modules() -> dict[str, ModuleType]:
    packages = {_PACKAGE, *_STOOD_IN_FOR}
    names = [name for name in sys.modules if name.partition('.')[0] in packages]
    return {name: sys.modules.pop(name) for name in names}


class _Finder(MetaPathFinder, Loader):
    """Finds the official package in its repository, and makes up the stand-ins."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def find_spec(self, fullname: str, *_: Any) -> ModuleSpec | None:
        package = fullname.partition('.')[0]
        if package in _STOOD_IN_FOR:
            return ModuleSpec(fullname, self, is_package=True)
        if package != _PACKAGE:
            return None
        place = self.root.joinpath(*fullname.split('.'))
        file = place.with_name(f'{place.name}.py')
        if file.is_file():
            return importlib.util.spec_from_file_location(fullname, file)
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
            return importlib.import_module('mmengine.model').BaseModule
        if name in _PIECES:
            return _PIECES[name]
        if self.__name__.endswith('.registry'):
            return _Registry()
        return _placeholder(self.__name__, name)


class _Registry:
    """A registry that registers nothing."""

    def register_module(self, *_: Any, module: type | None = None, **__: Any) -> Any:
        """Leave the class as it is, as a decorator or called with `module`."""
        return module if module is not None else lambda cls: cls


def _placeholder(module: str, name: str) -> type:
    """Give a class that can be imported and subclassed."""

    def refuse(self: object, *_: Any, **__: Any) -> None:
        raise UpstreamError(
            f'{module}.{name} stands in for a part of {module.partition(".")[0]}: of '
            'the official code only the backbone can be used here'
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
    mmcv: Any = importlib.import_module('mmcv.cnn')
    layer: nn.Module = mmcv.build_norm_layer(cfg, num_features)[1]
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
