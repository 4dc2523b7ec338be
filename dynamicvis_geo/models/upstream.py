"""The official DynamicVis code, run unchanged beside the native backbone.

It is found installed, in a folder of the user's, or cloned with git at a pinned commit.
Of OpenMMLab it needs mmengine and mmcv-lite only: see
:mod:`dynamicvis_geo.models.openmmlab`.
"""

import functools
import importlib
import importlib.util
import io
import logging
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dynamicvis_geo.errors import UpstreamError
from dynamicvis_geo.models.config import BackboneConfig
from dynamicvis_geo.models.openmmlab import (
    OFFICIAL_PACKAGE,
    PACKAGES,
    official_imports,
)
from dynamicvis_geo.models.repository import (
    checked_clone,
    clone_folder,
    clone_repository,
    is_edited,
    repository_commit,
)

#: The one version with which the official code gives the published features.
TRANSFORMERS_VERSION = '4.50.0'

_MODULE = f'{OFFICIAL_PACKAGE}.models.models'
_CLASS = 'DynamicVisBackbone'
_MODELS_FILE = Path(OFFICIAL_PACKAGE, 'models', 'models.py')
_REQUIRED = ('einops', 'mmcv', 'mmengine', 'transformers')
_INSTALL = 'pip install "dynamicvis-geo[upstream]"'
_OFFICIAL = f'commit {BackboneConfig.repo_commit} of {BackboneConfig.repo_url}'

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
    `sys.path`, and the modules of `dynamicvis` and of absent OpenMMLab packages in
    `sys.modules`, as they were; the class works all the same, but its instances cannot
    be pickled.

    Args:
        repo_path: folder of the official repository, used as it is, at any commit.
        repo_url: what git clones.
        repo_commit: full hash of the commit to clone.
        repo_cache: folder of the clones; that of `BackboneConfig` if None.
        auto_download: whether cloning is allowed.

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
    settings: Mapping[str, Any] | None = None,
    out_indices: Sequence[int] = (3,),
) -> nn.Module:
    """Build the official backbone, frozen and in eval mode, without trained weights.

    Args:
        config: which code to run and with what settings.
        arch: 'b' or 'l'.
        settings: arguments of the official class that *config* has no fields for.
        out_indices: stages whose maps are returned.

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
    arguments: dict[str, Any] = {
        **(settings or {}),
        'arch': arch,
        'img_size': config.img_size,
        'path_type': config.path_type,
        'sampling_scale': _sampling_scale(config.sampling_scale),
        'mamba2': config.mamba2,
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
    """Where an official class comes from.

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
        """Whether it is the commit that this package is made for."""
        return self.commit == BackboneConfig.repo_commit


def upstream_source(cls: type) -> UpstreamSource:
    """Say where an official class comes from."""
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
    return _installed_repository() or (
        checked_clone(clone, commit) if clone.exists() else None
    )


def _installed_repository() -> Path | None:
    """Find the folder on the import path that holds the official package."""
    spec = importlib.util.find_spec(OFFICIAL_PACKAGE)
    for location in (spec and spec.submodule_search_locations) or ():
        root = Path(location).parent
        if (root / _MODELS_FILE).is_file():
            return root
    return None


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
    """Import the class, with stand-ins for those OpenMMLab packages that are absent."""
    absent = [name for name in PACKAGES if not _is_installed(name)]
    attempts = [absent]
    if len(absent) < len(PACKAGES):
        # An mmdet without its compiled mmcv, say, is found and fails all the same.
        attempts.append(list(PACKAGES))
    for stand_ins in attempts:
        try:
            with official_imports(root, stand_ins):
                cls: type[nn.Module] = getattr(importlib.import_module(_MODULE), _CLASS)
                return cls
        except Exception as error:  # Importing runs others' code: anything may come.
            failure = error
            _log.info('Importing %s without %s: %r', root, stand_ins, error)
    raise UpstreamError(
        f'{root / _MODELS_FILE} cannot be imported ({type(failure).__name__}: '
        f'{failure}): use {_OFFICIAL}, and run {_INSTALL}'
    ) from failure


def _is_installed(package: str) -> bool:
    return package in sys.modules or importlib.util.find_spec(package) is not None


def _sampling_scale(scale: float | Mapping[str, Any]) -> dict[str, Any]:
    """Write a plain number as the official code wants it."""
    if isinstance(scale, Mapping):
        return dict(scale)
    return {'type': 'fixed', 'val': scale}
