"""The DynamicVis backbone (arXiv 2503.16426), for inference.

Four stages; each embeds overlapping patches, then lets its mixers choose the tokens
that Mamba sees. Names of parameters are those of the official checkpoints, which load
without renaming other than their ``backbone.`` prefix.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.models.layers import (
    PatchEmbed,
    SparseMixer,
    conv_size,
    read_global_tokens,
    resize_tokens,
)
from dynamicvis_geo.models.mamba import MambaBlock, mixer_settings
from dynamicvis_geo.models.mamba2 import HeadGroups, Mamba2Mixer
from dynamicvis_geo.models.precision import float32_products
from dynamicvis_geo.models.scan import (
    check_scan,
    needs_gradients,
    resolve_scan,
    tell_cost_of_gradients,
)

OutType = Literal['featmap', 'avg_featmap']
_WIDTHS = {'b': (96, 192, 384, 768), 'l': (128, 256, 512, 1024)}
_DEPTHS = {'b': (2, 4, 16, 4), 'l': (2, 4, 32, 4)}
_ARCHS = {'b': 'b', 'base': 'b', 'l': 'l', 'large': 'l'}
_INTERPOLATE_MODES = ('bicubic', 'bilinear', 'nearest')
# The scan of the first stage, of fewest channels, is cut into 24 pieces an image (arch
# b): three for each thread, so that few threads wait long for the last ones.
_THREADS_AN_IMAGE = 8


class DynamicVis(nn.Module):
    """The DynamicVis backbone.

    A model for inference: every result equals the official model's in eval mode, also
    after ``train()``.

    Args:
        arch: 'b' ('base') or 'l' ('large').
        img_size: pixels of a side, or (height, width). Fixes the length of the position
            embedding and the number of global tokens.
        in_channels: bands of the image.
        patch_sizes: kernel of each stage's patch embedding.
        strides: stride of each stage's patch embedding.
        spatial_token_keep_ratios: each stage keeps one token in this many; 0 or less
            means no selection at all. The official variants "without token selection"
            have ``[1, 1, 1, 1]``: all tokens, sorted by weight.
        path_type: one of :data:`~dynamicvis_geo.models.config.PATH_TYPES`. The
            ``shuffle`` types draw permutations: from *shuffle_seed*, anew at each
            call, so that a call can be repeated (the official code draws from PyTorch's
            global generator).
        global_token_cfg: ``{'pos': position, 'num': count}``, of
            :data:`~dynamicvis_geo.models.layers.GLOBAL_TOKEN_POSITIONS`; a count of -1
            means the rows of the stage's grid.
        is_softmax_on_x: whether tokens that were not chosen are scaled by
            ``1 + weight``.
        norm_topk_prob: whether the weights of the chosen tokens are made to sum to 1.
        mamba2: whether the mixers are Mamba-2.
        mamba2_head_groups: see :class:`~dynamicvis_geo.models.mamba2.Mamba2Mixer`.
        layer_cfgs: arguments of the mixers that replace their defaults.
        out_indices: stages whose maps are returned.
        out_type: 'featmap', or 'avg_featmap' for the normalised mean of the last map.
        with_pe: whether there is a position embedding; without, any image size runs.
        interpolate_mode: how loading resizes a position embedding of another size.
        norm_cfg: ``{'type': 'LN', 'eps': 1e-6}``, for patches, stages and the mean.
        sampling_scale: the scale of the noise by which the official model explores
            routing **in training**, a number or the official dict. It does nothing at
            inference and is kept for the record.
        shuffle_seed: seed of the permutations of the ``shuffle`` paths.
        frozen_stages: so many stages, from the first, take no gradients; the position
            embedding is never frozen. 0 or less freezes nothing.
        loading_loss: accepted as in the official class; acts in training only.
        branch_format: accepted as in the official class, which does not use it.
        channel_token_keep_ratios: accepted as in the official class, which does not use
            it.
        init_cfg: accepted as in the official class; load weights with
            :meth:`load_state_dict`.
        scan: the kernel of the selective scan, one of
            :data:`~dynamicvis_geo.models.config.SCANS`. All give the same features
            but for rounding.

    Raises:
        SpecError: if an argument has a value that cannot be used.
    """

    def __init__(
        self,
        arch: str = 'b',
        img_size: int | tuple[int, int] = 512,
        in_channels: int = 3,
        patch_sizes: Sequence[int] = (7, 3, 3, 3),
        strides: Sequence[int] = (4, 2, 2, 2),
        spatial_token_keep_ratios: Sequence[int] = (8, 4, 2, 1),
        path_type: str = 'forward_reverse_mean',
        global_token_cfg: Mapping[str, Any] | None = None,
        is_softmax_on_x: bool = True,
        norm_topk_prob: bool = False,
        mamba2: bool = False,
        mamba2_head_groups: HeadGroups = 'contiguous',
        layer_cfgs: dict[str, Any] | None = None,
        out_indices: Sequence[int] = (3,),
        out_type: OutType = 'featmap',
        with_pe: bool = True,
        interpolate_mode: str = 'bicubic',
        norm_cfg: Mapping[str, Any] | None = None,
        sampling_scale: float | Mapping[str, Any] = 0.1,
        shuffle_seed: int = 0,
        frozen_stages: int = -1,
        loading_loss: bool = False,
        branch_format: Any = None,
        channel_token_keep_ratios: Any = None,
        init_cfg: Any = None,
        scan: str = 'auto',
    ) -> None:
        super().__init__()
        self.arch = _choice('arch', arch, _ARCHS)
        self.img_size = _image_size(img_size)
        self.path_type = path_type
        self.mamba2 = mamba2
        self.layer_cfgs = dict(layer_cfgs or {})
        self.sampling_scale = sampling_scale
        self.shuffle_seed = shuffle_seed
        check_scan(scan)
        self.scan = scan
        self.out_indices = check_stages(out_indices, out_type)
        self.out_type = out_type
        self.interpolate_mode = _choice(
            'interpolate_mode', interpolate_mode, {m: m for m in _INTERPOLATE_MODES}
        )
        self.widths = _WIDTHS[self.arch]
        for name, value in (
            ('patch_sizes', patch_sizes),
            ('strides', strides),
            ('spatial_token_keep_ratios', spatial_token_keep_ratios),
        ):
            if len(value) != 4:
                raise SpecError(f'{name}={value!r} must have 4 values, one a stage')
        position, count = read_global_tokens(global_token_cfg)
        eps = _layer_norm_eps(norm_cfg)

        def mixer(stage: int, rows: int) -> SparseMixer:
            width = self.widths[stage]
            return SparseMixer(
                width,
                spatial_token_keep_ratios[stage],
                rows if count == -1 else count,
                position,
                is_softmax_on_x,
                norm_topk_prob,
                MambaBlock(
                    width, path_type, mamba2, mamba2_head_groups, layer_cfgs, scan
                ),
            )

        channels = (in_channels, *self.widths)
        grid = self.img_size
        self.layers = nn.ModuleList()
        for stage, width in enumerate(self.widths):
            kernel, stride = patch_sizes[stage], strides[stage]
            grid = (
                conv_size(grid[0], kernel, stride),
                conv_size(grid[1], kernel, stride),
            )
            if stage == 0:
                self.grid = grid
            mixers = [mixer(stage, grid[0]) for _ in range(_DEPTHS[self.arch][stage])]
            self.layers.append(
                nn.ModuleList(
                    [
                        PatchEmbed(channels[stage], width, kernel, stride, eps),
                        nn.Sequential(*mixers),
                        nn.LayerNorm(width, eps=eps),
                    ]
                )
            )
        if with_pe:
            tokens = self.grid[0] * self.grid[1]
            self.pos_embed = nn.Parameter(torch.empty(1, tokens, self.widths[0]))
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
            self.register_state_dict_post_hook(_note_grid)  # type: ignore[no-untyped-call]
            self.register_load_state_dict_pre_hook(_fit_pos_embed)  # type: ignore[no-untyped-call]
        else:
            self.pos_embed = None  # type: ignore[assignment]
        if out_type == 'avg_featmap':
            self.post_meanpool_norm = nn.LayerNorm(self.widths[-1], eps=eps)
        self._freeze(frozen_stages)

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that decide the features, read off the built model, ready for JSON.

        How they are computed (kernel, precision, device) is not among them.
        """
        stages = [cast(nn.ModuleList, stage) for stage in self.layers]
        embeds = [cast(PatchEmbed, stage[0]).projection for stage in stages]
        mixers = [
            cast(SparseMixer, cast(nn.Sequential, stage[1])[0]) for stage in stages
        ]
        block = cast(MambaBlock, mixers[0].spatial_mamba_mixer)
        settings: dict[str, Any] = {
            'arch': self.arch,
            'img_size': list(self.img_size),
            'in_channels': embeds[0].in_channels,
            'patch_sizes': [embed.kernel_size[0] for embed in embeds],
            'strides': [embed.stride[0] for embed in embeds],
            'spatial_token_keep_ratios': [mixer.reduction for mixer in mixers],
            'path_type': self.path_type,
            'global_token_pos': mixers[0].global_token_position,
            'global_tokens': [mixer.global_tokens for mixer in mixers],
            'is_softmax_on_x': mixers[0].is_softmax_on_x,
            'norm_topk_prob': mixers[0].norm_topk_prob,
            'mamba2': self.mamba2,
            'layer_cfgs': mixer_settings(type(block.mamba_layer), self.layer_cfgs),
            'out_indices': list(self.out_indices),
            'out_type': self.out_type,
            'with_pe': self.pos_embed is not None,
            'interpolate_mode': self.interpolate_mode,
            'norm_eps': cast(nn.LayerNorm, stages[0][2]).eps,
        }
        if isinstance(block.mamba_layer, Mamba2Mixer):
            settings['mamba2_head_groups'] = block.mamba_layer.head_groups
        if 'shuffle' in self.path_type:
            settings['shuffle_seed'] = self.shuffle_seed
        return settings

    def numerics(self, device: torch.device) -> dict[str, Any]:
        """Describe the computation of features on a device, ready for JSON.

        Args:
            device: where the backbone is to run.

        Returns:
            ``kernel``, that of the scan which runs there, and ``tf32``, whether
            products or convolutions are rounded to TF32: never, see
            :func:`~dynamicvis_geo.models.precision.float32_products`.

        Raises:
            SpecError: if the kernel that was chosen cannot run there.
        """
        return {'kernel': resolve_scan(self.scan, device.type), 'tf32': False}

    @property
    def feature_channels(self) -> tuple[int, ...]:
        """Channels of each returned map."""
        return tuple(self.widths[stage] for stage in self.out_indices)

    def can_fuse(self, x: Tensor) -> bool:
        """Decide if the forward of *x* takes the fused kernels for CUDA GPUs.

        They serve the configurations that were released, without gradients; see
        :func:`dynamicvis_geo.models.fused_triton.can_fuse`.

        Args:
            x: normalised image, ``[B, in_channels, H, W]``.

        Returns:
            True if :meth:`forward` would take them.
        """
        if not x.is_cuda or torch.compiler.is_compiling():
            return False
        if self.scan == 'torch' or resolve_scan(self.scan, 'cuda') != 'triton':
            return False
        if self.pos_embed is not None and tuple(x.shape[-2:]) != self.img_size:
            return False
        from dynamicvis_geo.models import fused_triton

        return fused_triton.can_fuse(self.layers, x)

    def forward(
        self,
        x: Tensor,
        generator: torch.Generator | None = None,
        out_indices: Sequence[int] | None = None,
    ) -> tuple[Tensor, ...]:
        """Give the maps of the stages in `out_indices`; later stages do not run.

        Patches, norms, gates, their order and what flows between the mixers are float32
        (float64 in a float64 model) also under autocast, which reaches the products of
        the Mamba blocks alone. Float32 is float32 whatever PyTorch's settings allow:
        see :func:`~dynamicvis_geo.models.precision.float32_products`; a model that
        ``torch.compile`` or ``torch.export`` traced follows the settings.

        On the CPU the images of a batch are done one after the other, which takes less
        memory and makes features independent of the batch. With more than 8 threads,
        which one image does not fill, they are done in small groups; then another batch
        may change features by rounding.

        Args:
            x: normalised image, ``[B, in_channels, H, W]`` of `img_size`.
            generator: a CPU generator for the permutations of the ``shuffle`` paths,
                instead of `shuffle_seed`.
            out_indices: stages whose maps are returned by this call, instead of those
                of the model.

        Returns:
            ``[B, C, h, w]`` of each stage, contiguous, at strides 4, 8, 16 and 32,
            after its LayerNorm; for 'avg_featmap' one ``[B, C]``.

        Raises:
            SpecError: if *x* has another shape than the model was built for, or
                *out_indices* names other stages than there are.
        """
        if x.ndim != 4:
            raise SpecError(f'x has shape {tuple(x.shape)}: give [B, C, H, W]')
        stages = self.out_indices
        if out_indices is not None:
            stages = check_stages(out_indices, self.out_type)
        if generator is None and 'shuffle' in self.path_type:
            generator = torch.Generator().manual_seed(self.shuffle_seed)
        if torch.compiler.is_compiling():
            return self._forward_together(x, generator, stages)
        if needs_gradients((x, *self.parameters())):
            tell_cost_of_gradients(self.scan, x.device.type)
        with float32_products():
            if x.device.type != 'cpu':
                return self._forward_together(x, generator, stages)
            return self._forward_in_groups(x, generator, stages)

    def _forward_in_groups(
        self, x: Tensor, generator: torch.Generator | None, stages: tuple[int, ...]
    ) -> tuple[Tensor, ...]:
        start = None if generator is None else generator.get_state()
        outputs = []
        for images in x.split(-(-torch.get_num_threads() // _THREADS_AN_IMAGE)):
            if generator is not None and start is not None:
                generator.set_state(start)  # A batch shares its permutations.
            outputs.append(self._forward_together(images, generator, stages))
        if len(outputs) == 1:
            return outputs[0]
        return tuple(torch.cat(maps) for maps in zip(*outputs, strict=True))

    def _forward_together(
        self, x: Tensor, generator: torch.Generator | None, stages: tuple[int, ...]
    ) -> tuple[Tensor, ...]:
        # All stages or none, so that a map is the same whether later ones run or not.
        if self.can_fuse(x):
            from dynamicvis_geo.models.fused_triton import run_stages

            needed = list(self.layers)[: stages[-1] + 1]
            every = run_stages(needed, self.pos_embed, x)
            return self._outputs([every[stage].contiguous() for stage in stages])
        maps = []
        for stage, parts in enumerate(self.layers):
            patch_embed, mixers, norm = cast(nn.ModuleList, parts)
            tokens, (height, width) = patch_embed(x)
            if stage == 0 and self.pos_embed is not None:
                tokens = tokens + self._positions((height, width), x)
            for mixer in cast(nn.Sequential, mixers):
                tokens = mixer(tokens, generator, self._global_tokens(height))
            x = norm(tokens).transpose(1, 2).contiguous()
            x = x.unflatten(2, (height, width))
            if stage in stages:
                maps.append(x)
            if stage == stages[-1]:
                break
        return self._outputs(maps)

    def _outputs(self, maps: list[Tensor]) -> tuple[Tensor, ...]:
        if self.out_type == 'avg_featmap':
            return (self.post_meanpool_norm(maps[-1].mean((-2, -1))),)
        return tuple(maps)

    def _positions(self, grid: tuple[int, int], x: Tensor) -> Tensor:
        """Give the position embedding of a grid: here it is of one grid alone."""
        if grid != self.grid:
            raise SpecError(
                f'x is {x.shape[-2]} x {x.shape[-1]} pixels, but the model was built '
                f'for img_size={self.img_size}: resize x or build the model with '
                f'img_size={tuple(x.shape[-2:])}'
            )
        return self.pos_embed

    def _global_tokens(self, rows: int) -> int | None:
        """Give their number for a grid of so many rows; None is that of the mixer."""
        return None

    def _freeze(self, frozen_stages: int) -> None:
        if frozen_stages > len(self.layers):
            raise SpecError(
                f'frozen_stages={frozen_stages!r}: there are {len(self.layers)} stages '
                'to freeze, give 0 to 4'
            )
        for stage in self.layers[: max(frozen_stages, 0)]:
            stage.requires_grad_(False)
        if frozen_stages == len(self.layers) and self.out_type == 'avg_featmap':
            self.post_meanpool_norm.requires_grad_(False)


def map_shapes(settings: Mapping[str, Any]) -> tuple[tuple[int, int, int], ...]:
    """Work out the shapes of feature maps.

    Args:
        settings: As :attr:`DynamicVis.settings` gives them.

    Returns:
        Channels, height and width of the map of each stage, of the first stage first;
        for 'avg_featmap' of the last one alone.
    """
    widths = _WIDTHS[settings['arch']]
    if settings['out_type'] == 'avg_featmap':
        return ((widths[-1], 1, 1),)
    height, width = settings['img_size']
    shapes = []
    for channels, kernel, stride in zip(
        widths, settings['patch_sizes'], settings['strides'], strict=True
    ):
        height = conv_size(height, kernel, stride)
        width = conv_size(width, kernel, stride)
        shapes.append((channels, height, width))
    return tuple(shapes)


def _note_grid(
    model: nn.Module, state_dict: Any, prefix: str, local_metadata: dict[str, Any]
) -> None:
    """Remember the true grid: a number of tokens alone can tell only a square."""
    if isinstance(model, DynamicVis):
        local_metadata['grid'] = model.grid


def _fit_pos_embed(
    model: nn.Module,
    state_dict: dict[str, Tensor],
    prefix: str,
    local_metadata: dict[str, Any],
    *_: Any,
) -> None:
    """Resize the position embedding of a checkpoint of another image size."""
    key = f'{prefix}pos_embed'
    if not isinstance(model, DynamicVis) or key not in state_dict:
        return
    old = state_dict[key]
    if old.ndim != 3 or old.shape[-1] != model.pos_embed.shape[-1]:
        return  # Loading reports the mismatch, with the others.
    count = old.shape[1]
    side = math.isqrt(count)
    grid = local_metadata.get('grid')
    if grid is None and count == model.pos_embed.shape[1]:
        if side * side == count and model.grid[0] != model.grid[1]:
            warnings.warn(
                f'pos_embed has {count} tokens and no record of its grid: it is taken '
                f'as {model.grid[0]} x {model.grid[1]}, not as {side} x {side}',
                stacklevel=2,
            )
        grid = model.grid
    if grid is None and side * side != count:
        raise SpecError(
            f'pos_embed has {count} tokens, which are no square grid, so it cannot be '
            f'resized for img_size={model.img_size}: build the model with the img_size '
            'of the checkpoint'
        )
    grid = grid or (side, side)
    if tuple(grid) != model.grid:
        state_dict[key] = resize_tokens(old, grid, model.grid, model.interpolate_mode)


def _choice(name: str, value: str, choices: Mapping[str, str]) -> str:
    if value not in choices:
        raise SpecError(
            f'{name}={value!r} is unknown: choose one of {", ".join(choices)}'
        )
    return choices[value]


def _image_size(img_size: int | tuple[int, int]) -> tuple[int, int]:
    size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if len(size) != 2 or any(not isinstance(side, int) or side < 1 for side in size):
        raise SpecError(
            f'img_size={img_size!r} must be a number of pixels or (height, width)'
        )
    return size[0], size[1]


def check_stages(
    out_indices: Sequence[int], out_type: str = 'featmap'
) -> tuple[int, ...]:
    """Sort the numbers of stages, each once.

    Args:
        out_indices: as :class:`DynamicVis` takes it.
        out_type: what it gives of them.

    Raises:
        SpecError: if there are no such stages, or none of them has that output.
    """
    stages = tuple(sorted(set(out_indices)))
    if not stages or any(stage not in range(4) for stage in stages):
        raise SpecError(f'out_indices={out_indices!r} must name stages from 0 to 3')
    if out_type not in get_args(OutType):
        raise SpecError(
            f'out_type={out_type!r} is unknown: choose one of '
            f'{", ".join(get_args(OutType))}'
        )
    if out_type == 'avg_featmap' and stages != (3,):
        raise SpecError(
            f"out_type='avg_featmap' averages the last stage, but out_indices="
            f'{out_indices!r}: set out_indices=(3,)'
        )
    return stages


def _layer_norm_eps(config: Mapping[str, Any] | None) -> float:
    given: dict[str, Any] = {'type': 'LN', 'eps': 1e-6} | dict(config or {})
    if given.keys() != {'type', 'eps'} or given['type'] != 'LN':
        raise SpecError(
            f"norm_cfg={given!r} is not supported: give {{'type': 'LN', 'eps': ...}}"
        )
    return float(given['eps'])
