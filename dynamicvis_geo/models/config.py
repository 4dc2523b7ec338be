"""The choice of a backbone: plain values, read quickly (without PyTorch)."""

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from dynamicvis_geo.errors import SpecError

#: Path types of the official backbone.
PATH_TYPES = (
    'forward',
    'forward_reverse_mean',
    'forward_reverse_gate',
    'shuffle',
    'forward_reverse_shuffle_mean',
    'forward_reverse_shuffle_gate',
)
#: Kernels of the selective scan; 'auto' is the fastest for the device of the tensors.
SCANS = ('auto', 'torch', 'c', 'triton')
_CHOICES = {
    'weights': ('pretrained', 'random'),
    'arch': ('auto', 'b', 'base', 'l', 'large'),
    'path_type': PATH_TYPES,
    'implementation': ('native', 'upstream'),
    'scan': SCANS,
}
_ARCHS = {'base': 'b', 'large': 'l'}
#: Fields that are arguments of the backbone.
_ARGUMENTS = ('arch', 'img_size', 'path_type', 'sampling_scale', 'mamba2')
#: Arguments of the backbone that are no fields: they follow the checkpoint.
_FOLLOWING = (
    'global_token_cfg',
    'is_softmax_on_x',
    'layer_cfgs',
    'norm_topk_prob',
    'spatial_token_keep_ratios',
)
#: Arguments with which a checkpoint may have been trained.
TRAINED_ARGUMENTS = frozenset({*_ARGUMENTS, *_FOLLOWING})
#: The smallest image at which the official model is known to run.
MIN_IMG_SIZE = 16
#: A mistake, rather than an image, is larger.
MAX_IMG_SIZE = 16_384


@dataclass(frozen=True)
class BackboneConfig:
    """A choice of weights, of their architecture, and of what runs them.

    Attributes:
        hf_repo: Hugging Face repository of the checkpoint.
        ckpt_file: File in that repository. With ``arch='l'``, the default stands for
            the official files of that size.
        revision: Branch, tag or commit of that repository.
        checkpoint: A local file to load instead.
        weights: ``'pretrained'``, or ``'random'`` for untrained weights under a fixed
            seed (for trying things out; their features mean nothing).
        img_size: Pixels of a side of the images, or (height, width). A checkpoint of
            another size has its position embedding resized.
        arch: ``'b'`` (``'base'``), ``'l'`` (``'large'``), or ``'auto'``: what the
            file's name says (``_b_`` or ``_l_``), else its content.
        path_type: One of :data:`PATH_TYPES`, with which the checkpoint was trained.
        sampling_scale: Scale of the routing noise in training, a number or the official
            dict with ``type`` and ``val``. No effect on features; recorded.
        mamba2: Whether the checkpoint's mixers are Mamba-2.
        implementation: ``'native'`` (ours), or ``'upstream'`` (the official code).
        repo_path: Folder of the official code, for ``'upstream'``.
        repo_url: Where the official code is cloned from.
        repo_commit: The commit of it that is used.
        repo_cache: Folder for clones.
        auto_download_repo: Whether the official code may be cloned if it is not found.
        fetch_workers: Number of images fetched at once; no matter of the backbone.
        sha256: SHA-256 that the checkpoint file must have; None accepts any.
        scan: Kernel of the selective scan; ``'auto'`` takes the fastest that runs.

    Raises:
        SpecError: If a value cannot be used; it names the field, the value and the
            choices.
    """

    hf_repo: str = 'KyanChen/DynamicVis'
    ckpt_file: str = (
        'pretrain_dynamicvis_b_bf16_mamba_best_single-label_f1-score_epoch_170.pth'
    )
    revision: str = 'main'
    checkpoint: Path | None = None
    weights: str = 'pretrained'
    img_size: int | tuple[int, int] = 512
    arch: str = 'auto'
    path_type: str = 'forward_reverse_mean'
    sampling_scale: float | Mapping[str, Any] = 0.1
    mamba2: bool = False
    implementation: str = 'native'
    repo_path: Path | None = None
    repo_url: str = 'https://github.com/KyanChen/DynamicVis.git'
    repo_commit: str = '0bfe96f471af4ddf1c41ae596c468ce40502b67a'
    repo_cache: Path = Path('~/.cache/rs_embed/dynamicvis')
    auto_download_repo: bool = True
    # A matter of Earth Engine: no two backbones differ by it.
    fetch_workers: int = field(default=8, compare=False)
    sha256: str | None = None
    scan: str = 'auto'

    def __post_init__(self) -> None:
        """Check every value, and bring paths and short names into one form."""
        for name, choices in _CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise SpecError(
                    f'{name}={value!r} is unknown: choose one of {", ".join(choices)}'
                )
        for name in ('hf_repo', 'ckpt_file', 'revision', 'repo_url', 'repo_commit'):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise SpecError(f'{name}={value!r} must be a text that is not empty')
        for name in ('mamba2', 'auto_download_repo'):
            if not isinstance(value := getattr(self, name), bool):
                raise SpecError(f'{name}={value!r} must be True or False')
        if not _is_integer(self.fetch_workers) or self.fetch_workers < 1:
            raise SpecError(f'fetch_workers={self.fetch_workers!r} must be 1 or more')
        if self.sha256 is not None and not re.fullmatch(
            '[0-9a-fA-F]{64}', str(self.sha256)
        ):
            raise SpecError(f'sha256={self.sha256!r} must be 64 hexadecimal digits')
        _check_sampling_scale(self.sampling_scale)
        for name in ('checkpoint', 'repo_path', 'repo_cache'):
            value = getattr(self, name)
            if value is not None or name == 'repo_cache':
                object.__setattr__(self, name, _path(name, value))
        object.__setattr__(self, 'img_size', _img_size(self.img_size))
        object.__setattr__(self, 'arch', _ARCHS.get(self.arch, self.arch))

    @property
    def named_arch(self) -> str | None:
        """``'b'`` or ``'l'`` by the field or the file's name; None if neither tells."""
        if self.arch != 'auto':
            return self.arch
        return arch_of_name(
            self.ckpt_file if self.checkpoint is None else self.checkpoint
        )

    def model_arguments(self, arch: str, trained: Mapping[str, Any]) -> dict[str, Any]:
        """Give the arguments of the backbone that decide its features.

        Args:
            arch: 'b' or 'l'.
            trained: Arguments with which the checkpoint was trained.

        Returns:
            Keyword arguments of the backbone's class, native or official.
        """
        values = {name: getattr(self, name) for name in _ARGUMENTS}
        return {**values, 'arch': arch, **following(trained)}

    @classmethod
    def from_env(
        cls, environ: Mapping[str, str] | None = None, **arguments: Any
    ) -> 'BackboneConfig':
        """Read the ``RS_EMBED_DYNAMICVIS_*`` variables; arguments come before them.

        Args:
            environ: The variables; None means ``os.environ``. Empty ones are as unset.
            **arguments: Fields that are given directly.

        Returns:
            The configuration.

        Raises:
            SpecError: If a variable or an argument has a value that cannot be used.
        """
        environ = os.environ if environ is None else environ
        values: dict[str, Any] = {}
        for name, (variable, parse) in _VARIABLES.items():
            text = environ.get(variable, '').strip()
            if not text or name in arguments:
                continue
            try:
                values[name] = parse(text)
                # Alone, so that an error is this variable's.
                cls(**{name: values[name]})
            except ValueError as error:
                told = _NEEDED.get(parse, error)
                reason = error if isinstance(error, SpecError) else f'{text!r}: {told}'
                raise SpecError(f'environment variable {variable}: {reason}') from error
        return cls(**values, **arguments)


def following(trained: Mapping[str, Any]) -> dict[str, Any]:
    """Pick the arguments of the backbone that always follow the checkpoint.

    Args:
        trained: Arguments with which the checkpoint was trained.

    Returns:
        Those of them that no field of :class:`BackboneConfig` sets.
    """
    return {name: trained[name] for name in _FOLLOWING if name in trained}


def sources(
    arguments: Iterable[str] = (), environ: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Tell the origin of each value of :meth:`BackboneConfig.from_env`.

    Args:
        arguments: Names of the fields that are given as arguments.
        environ: The variables; None means ``os.environ``.

    Returns:
        For each field ``'argument'``, the name of an environment variable, or
        ``'default'``.
    """
    environ = os.environ if environ is None else environ
    given = set(arguments)

    def origin(name: str) -> str:
        variable, _ = _VARIABLES.get(name, ('', str))
        is_set = bool(environ.get(variable, '').strip())
        return 'argument' if name in given else variable if is_set else 'default'

    return {each.name: origin(each.name) for each in fields(BackboneConfig)}


def arch_of_name(name: str | Path) -> str | None:
    """Return ``'b'`` or ``'l'`` as the official file names tell it, or None.

    Args:
        name: A file's name or path, such as ``pretrain_dynamicvis_b_bf16_mamba.pth``.

    Returns:
        ``'b'``, ``'l'``, or None.
    """
    base = Path(name).name.lower()
    found = re.findall(r'dynamicvis_([bl])(?=[_.])', base)
    found = found or re.findall(r'(?<=_)([bl])(?=_)', base)
    return found[0] if len(set(found)) == 1 else None


def _flag(text: str) -> bool:
    lowered = text.lower()
    if lowered in ('1', 'true', 'yes', 'on'):
        return True
    if lowered in ('0', 'false', 'no', 'off'):
        return False
    raise ValueError('give 1 or 0')


_VARIABLES: dict[str, tuple[str, Callable[[str], Any]]] = {
    name: (f'RS_EMBED_DYNAMICVIS_{variable}', parse)
    for name, variable, parse in (
        ('hf_repo', 'HF_REPO', str),
        ('ckpt_file', 'CKPT_FILE', str),
        ('repo_path', 'REPO_PATH', str),
        ('repo_url', 'REPO_URL', str),
        ('repo_cache', 'REPO_CACHE', str),
        ('auto_download_repo', 'AUTO_DOWNLOAD_REPO', _flag),
        ('img_size', 'IMG', int),
        ('arch', 'ARCH', str.lower),
        ('path_type', 'PATH_TYPE', str),
        ('sampling_scale', 'SAMPLING_SCALE', float),
        ('mamba2', 'MAMBA2', _flag),
        ('fetch_workers', 'FETCH_WORKERS', int),
    )
}


#: What texts are to be, where Python's own words would not say it.
_NEEDED: dict[Callable[[str], Any], str] = {
    int: 'give a whole number',
    float: 'give a number',
}


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _path(name: str, value: object) -> Path:
    if not isinstance(value, str | os.PathLike) or not str(value):
        raise SpecError(f'{name}={value!r} must be a path')
    return Path(value).expanduser()


def _img_size(value: object) -> int | tuple[int, int]:
    sides = tuple(value) if isinstance(value, list | tuple) else (value, value)
    if len(sides) != 2 or not all(
        _is_integer(s) and MIN_IMG_SIZE <= s <= MAX_IMG_SIZE for s in sides
    ):
        raise SpecError(
            f'img_size={value!r} must be a number of pixels, {MIN_IMG_SIZE} to '
            f'{MAX_IMG_SIZE}, or two of them (height, width)'
        )
    height, width = sides
    return height if height == width else (height, width)


def _check_sampling_scale(value: object) -> None:
    scale = value
    if isinstance(value, Mapping) and value.get('type') in ('fixed', 'decay'):
        scale = value.get('val')
    if (
        isinstance(scale, bool)
        or not isinstance(scale, int | float)
        or not 0 <= scale < math.inf
    ):
        raise SpecError(
            f'sampling_scale={value!r} must be a number of 0 or more, or a dict such '
            "as {'type': 'fixed', 'val': 0.1} (type 'fixed' or 'decay')"
        )
