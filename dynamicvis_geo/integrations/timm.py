"""DynamicVis in timm: importing this module registers ``dynamicvis_b`` and ``_l``.

So it is in what takes a name of timm's as well: TorchGeo's tasks, and
segmentation_models_pytorch with ``tu-dynamicvis_b``.
"""

import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import timm.models
from timm.layers.classifier import create_classifier
from timm.models import PretrainedCfg, adapt_input_conv
from torch import Tensor, nn

from dynamicvis_geo.errors import CheckpointError, SpecError
from dynamicvis_geo.models.checkpoint import Checkpoint, load_into, read_checkpoint
from dynamicvis_geo.models.config import MIN_IMG_SIZE, following
from dynamicvis_geo.models.dynamicvis import DynamicVis
from dynamicvis_geo.models.layers import read_global_tokens, resize_tokens
from dynamicvis_geo.models.weights import (
    DynamicVis_B_Weights,
    DynamicVis_L_Weights,
    fetch_checkpoint,
)
from dynamicvis_geo.transforms import IMAGENET_MEAN, IMAGENET_STD

__all__ = ['DynamicVisClassifier', 'dynamicvis_b', 'dynamicvis_l']

_FIRST_CONV = 'layers.0.0.projection'
_STAGES = 4


class DynamicVisClassifier(DynamicVis):
    """DynamicVis with timm's interface: logits of classes, or feature maps.

    It takes images of any size from 16 pixels on. For one of another size than
    *img_size*, the position embedding is interpolated and global tokens are as many as
    the image has rows of patches, as in a backbone that is built for that size.

    Args:
        arch: 'b' or 'l'.
        img_size: pixels of a side, or (height, width), of the position embedding that
            is stored and learns.
        in_chans: bands of the image.
        num_classes: outputs of the linear head; 0 means no head, and the pooled
            features are the output.
        global_pool: timm's name of the pooling before the head: 'avg', 'max' and
            others; '' without a head means the last feature map as it is.
        drop_rate: dropout before the head, in training.
        **kwargs: further arguments of
            :class:`~dynamicvis_geo.models.dynamicvis.DynamicVis`.

    Attributes:
        num_features: channels of the last map, 768 (arch b) or 1024.
        feature_info: of each stage, ``num_chs``, ``reduction`` and ``module``.

    Raises:
        SpecError: if an argument has a value that cannot be used.
    """

    # What timm saves with a model, to build it again.
    _model_args: dict[str, Any]

    def __init__(
        self,
        arch: str = 'b',
        img_size: int | tuple[int, int] = 512,
        in_chans: int = 3,
        num_classes: int = 0,
        global_pool: str = 'avg',
        drop_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(arch, img_size, in_chans, out_indices=range(_STAGES), **kwargs)
        position, count = read_global_tokens(kwargs.get('global_token_cfg'))
        self._counts_rows = position != 'none' and count == -1
        self.num_features = self.head_hidden_size = self.widths[-1]
        reductions = accumulate(self.settings['strides'], operator.mul)
        self.feature_info = [
            {'num_chs': width, 'reduction': reduction, 'module': f'layers.{stage}'}
            for stage, (width, reduction) in enumerate(
                zip(self.widths, reductions, strict=True)
            )
        ]
        self.head_drop = nn.Dropout(drop_rate)
        self.global_pool: Any
        self.head: nn.Module
        self.reset_classifier(num_classes, global_pool)

    def get_classifier(self) -> nn.Module:
        """Give the head: ``Linear``, or ``Identity`` if there are no classes."""
        return self.head

    def reset_classifier(
        self, num_classes: int, global_pool: str | None = None
    ) -> None:
        """Put a new, untrained head in place of the present one.

        Args:
            num_classes: its outputs; 0 means no head.
            global_pool: another pooling; None keeps it.
        """
        self.num_classes = num_classes
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        # The head is the last module: there TorchGeo looks for the number of classes.
        self.global_pool, self.head = create_classifier(
            self.num_features, num_classes, pool_type=pool
        )

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Give the logits, or without a head the pooled features.

        Args:
            x: normalised image, ``[B, in_chans, H, W]``.

        Returns:
            ``[B, num_classes]``; without a head ``[B, num_features]``.

        Raises:
            SpecError: if *x* is smaller than 16 pixels.
        """
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Give the map of the last stage.

        Args:
            x: normalised image, ``[B, in_chans, H, W]``.

        Returns:
            ``[B, num_features, h, w]``, after its LayerNorm.

        Raises:
            SpecError: if *x* is smaller than 16 pixels.
        """
        return self._maps(x)[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool a map of the last stage, and classify.

        Args:
            x: ``[B, num_features, h, w]``.
            pre_logits: whether to stop before the head.

        Returns:
            ``[B, num_classes]``, or the pooled features ``[B, num_features]``.
        """
        pooled: Tensor = self.head_drop(self.global_pool(x))
        return pooled if pre_logits else cast(Tensor, self.head(pooled))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Give the maps of some stages.

        Args:
            x: normalised image, ``[B, in_chans, H, W]``.
            indices: stages as timm names them: None is all, a number the last so many,
                a sequence those, from the end if negative.
            norm: accepted for timm: all maps are after the LayerNorm of their stage.
            stop_early: accepted for timm: to compute no more stages than needed, drop
                the others by :meth:`prune_intermediate_layers`.
            output_fmt: 'NCHW'.
            intermediates_only: whether to give the maps alone.

        Returns:
            ``[B, C, h, w]`` of each; before them, unless *intermediates_only*, what
            :meth:`forward_features` gives.

        Raises:
            SpecError: if there is no such stage, or *output_fmt* is another.
        """
        if str(getattr(output_fmt, 'value', output_fmt)) != 'NCHW':
            raise SpecError(f"output_fmt={output_fmt!r} is not supported: give 'NCHW'")
        stages = _stages('indices', indices)
        maps = self._maps(x)
        chosen = [maps[stage] for stage in stages]
        return chosen if intermediates_only else (maps[-1], chosen)

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drop the stages behind those that are needed.

        Args:
            indices: stages that are needed, as in :meth:`forward_intermediates`.
            prune_norm: accepted for timm: norms belong to their stages.
            prune_head: whether to drop pooling and head.

        Returns:
            The stages, counted from 0.

        Raises:
            SpecError: if there is no such stage.
        """
        stages = _stages('out_indices', indices)
        self.layers = self.layers[: max(stages) + 1]
        self.out_indices = tuple(range(len(self.layers)))
        if prune_head:
            self.reset_classifier(0, '')
        return stages

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Name groups of parameters from input to output, for timm's layer decay.

        Args:
            coarse: whether a group is a stage; else it is a mixer.

        Returns:
            Patterns of names of parameters.
        """
        mixers = [(r'^layers\.(\d+)\.0', (0,)), (r'^layers\.(\d+)\.1\.(\d+)', None)]
        return {
            'stem': r'^pos_embed|^layers\.0\.0',
            'blocks': r'^layers\.(\d+)'
            if coarse
            else [*mixers, (r'^layers\.(\d+)\.2', (999,))],
        }

    def no_weight_decay(self) -> set[str]:
        """Name the parameters that timm's optimisers shall not decay."""
        names = {name for name, _ in self.named_parameters()}
        return {n for n in names if n == 'pos_embed' or n.endswith(('.A_log', '.D'))}

    def can_fuse(self, x: Tensor) -> bool:
        """Decide if the forward of *x* takes the fused kernels for CUDA GPUs.

        Args:
            x: normalised image, ``[B, in_chans, H, W]``.

        Returns:
            True if it has *img_size*, and the backbone would take them.
        """
        return tuple(x.shape[-2:]) == self.img_size and super().can_fuse(x)

    def _maps(self, x: Tensor) -> tuple[Tensor, ...]:
        if x.ndim == 4 and min(x.shape[-2:]) < MIN_IMG_SIZE:
            raise SpecError(
                f'x is {x.shape[-2]} x {x.shape[-1]} pixels: resize it to '
                f'{MIN_IMG_SIZE} or more a side'
            )
        return super().forward(x)

    def _positions(self, grid: tuple[int, int], x: Tensor) -> Tensor:
        if grid == self.grid:
            return self.pos_embed
        return resize_tokens(self.pos_embed, self.grid, grid, self.interpolate_mode)

    def _global_tokens(self, rows: int) -> int | None:
        return rows if self._counts_rows else None


def _stages(name: str, indices: int | Sequence[int] | None) -> list[int]:
    """Count the stages that timm's *indices* mean from 0."""
    if indices is None:
        indices = _STAGES
    if isinstance(indices, int):
        indices = range(_STAGES - indices, _STAGES)
    stages = [index + _STAGES if index < 0 else index for index in indices]
    if not stages or not all(stage in range(_STAGES) for stage in stages):
        raise SpecError(
            f'{name}={indices!r}: DynamicVis has {_STAGES} stages, give some of 0 to 3'
        )
    return stages


def _pretrained_cfg(meta: Mapping[str, Any]) -> dict[str, Any]:
    return {
        'hf_hub_id': meta['hf_repo'],
        'hf_hub_filename': meta['ckpt_file'],
        'input_size': (meta['in_chans'], meta['img_size'], meta['img_size']),
        'crop_pct': 1.0,
        'mean': IMAGENET_MEAN,
        'std': IMAGENET_STD,
        'num_classes': 0,
        'first_conv': _FIRST_CONV,
        'classifier': 'head',
        'license': meta['license'].lower(),
        'origin_url': meta['repo'],
        'paper_ids': 'arXiv:2503.16426',
    }


_WEIGHTS: dict[str, Any] = {
    f'dynamicvis_{arch}.{name.lower()}': weights
    for arch, enum in (('b', DynamicVis_B_Weights), ('l', DynamicVis_L_Weights))
    for name, weights in enum.__members__.items()
}
#: The official weights by timm's names, such as ``dynamicvis_b.fmow_epoch_170``.
default_cfgs = timm.models.generate_default_cfgs(
    {name: _pretrained_cfg(weights.meta) for name, weights in _WEIGHTS.items()}
)
# Names of arch l are inferred: a file may have one of several.
_CKPT_FILES: dict[str, Sequence[str]] = {
    weights.meta['ckpt_file']: weights.meta['ckpt_files']
    for weights in _WEIGHTS.values()
}


def dynamicvis_b(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build DynamicVis of arch b; see :func:`timm.create_model`.

    Args:
        pretrained: whether to load weights; by default those of fMoW.
        **kwargs: of timm (``features_only``, ``out_indices``, ``pretrained_cfg``,
            ``pretrained_cfg_overlay``, ``cache_dir``) and of
            :class:`DynamicVisClassifier`.

    Returns:
        A :class:`DynamicVisClassifier`, or with ``features_only`` timm's module that
        gives a list of its maps.

    Raises:
        CheckpointError: If the weights cannot be fetched or do not fit.
        SpecError: If an argument has a value that cannot be used.
    """
    return _create('b', pretrained, **kwargs)


def dynamicvis_l(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build DynamicVis of arch l; as :func:`dynamicvis_b`.

    Args:
        pretrained: whether to load weights; by default those of fMoW.
        **kwargs: as of :func:`dynamicvis_b`.

    Returns:
        As of :func:`dynamicvis_b`.

    Raises:
        CheckpointError: If the weights cannot be fetched or do not fit.
        SpecError: If an argument has a value that cannot be used.
    """
    return _create('l', pretrained, **kwargs)


def _create(
    arch: str,
    pretrained: bool,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    **kwargs: Any,
) -> nn.Module:
    if (stride := kwargs.pop('output_stride', 32)) != 32:
        raise SpecError(
            f'output_stride={stride!r}: DynamicVis has strides 4, 8, 16 and 32 only, '
            'which DeepLabV3 and its like cannot use; take UPerNet, FPN or Unet'
        )
    asked = kwargs.get('out_indices')
    if isinstance(asked, Sequence) and _STAGES in asked and len(asked) > 1:
        warnings.warn(
            f'out_indices={asked!r}: DynamicVis has {_STAGES} feature maps, 0 to 3; '
            'the fifth is left out',
            stacklevel=3,
        )
        kwargs['out_indices'] = tuple(index for index in asked if index != _STAGES)
    name = f'dynamicvis_{arch}'
    config: Any = timm.models.resolve_pretrained_cfg(
        name, pretrained_cfg, pretrained_cfg_overlay
    )
    # What timm has saved itself, head and all, it also loads.
    by_timm = config.source in ('hf-hub', 'local-dir') or bool(config.state_dict)
    checkpoint = _fetch(config, cache_dir) if pretrained and not by_timm else None
    trained = {} if checkpoint is None else _trained(checkpoint)

    def build(**arguments: Any) -> DynamicVisClassifier:
        model = DynamicVisClassifier(arch, **trained | arguments)
        model._model_args = trained
        if checkpoint is not None:
            _load(model, checkpoint, arguments.get('in_chans', 3))
        return model

    return cast(
        nn.Module,
        timm.models.build_model_with_cfg(
            build,
            name,
            pretrained and by_timm,
            pretrained_cfg=config,
            feature_cfg={'feature_cls': 'getter', 'out_indices': range(_STAGES)},
            cache_dir=cache_dir,
            **kwargs,
        ),
    )


def _fetch(config: PretrainedCfg, cache_dir: str | Path | None) -> Checkpoint:
    if config.file:
        return read_checkpoint(config.file)
    if not config.hf_hub_id or not config.hf_hub_filename:
        raise CheckpointError(
            f'pretrained_cfg has hf_hub_id={config.hf_hub_id!r} and hf_hub_filename='
            f'{config.hf_hub_filename!r}: give both, or file, the path of a checkpoint'
        )
    repository, _, revision = config.hf_hub_id.partition('@')
    file, *others = _CKPT_FILES.get(config.hf_hub_filename, (config.hf_hub_filename,))
    path = fetch_checkpoint(
        repository, file, revision or 'main', *others, cache_dir=cache_dir
    )
    return read_checkpoint(path)


def _trained(checkpoint: Checkpoint) -> dict[str, Any]:
    """Give the arguments with which a checkpoint was trained, as far as it tells."""
    arguments = following(checkpoint.settings) | {'mamba2': checkpoint.mamba2}
    if path_type := checkpoint.path_type or checkpoint.settings.get('path_type'):
        arguments['path_type'] = path_type
    return arguments


def _load(model: DynamicVisClassifier, checkpoint: Checkpoint, in_chans: int) -> None:
    """Load what there is; a head that a checkpoint has not stays as it is."""
    tensors = dict(checkpoint.state_dict)
    for name, tensor in model.head.state_dict(prefix='head.').items():
        tensors.setdefault(name, tensor)
    weight = f'{_FIRST_CONV}.weight'
    if tensors[weight].shape[1] != in_chans:
        tensors[weight] = adapt_input_conv(in_chans, tensors[weight])
    load_into(model, replace(checkpoint, state_dict=tensors))


def _register(*builders: Callable[..., nn.Module]) -> None:
    for name in (build.__name__ for build in builders):
        if not timm.models.is_model(name):
            continue
        holder = timm.models.model_entrypoint(name).__module__
        if holder != __name__:
            raise SpecError(
                f'timm has a model {name!r} already, of {holder}: import either that '
                f'module or {__name__}'
            )
    with warnings.catch_warnings():
        # A module that is loaded anew takes the place of its older self.
        warnings.filterwarnings('ignore', 'Overwriting dynamicvis_')
        for build in builders:
            timm.models.register_model(build)


_register(dynamicvis_b, dynamicvis_l)
