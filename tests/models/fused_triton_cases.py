"""What the fused kernels must do; ``test_fused_triton.py`` runs this file.

On a GPU if there is one, else in Triton's interpreter, for which all is kept small.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynamicvis_geo.models import fused_triton, patches_triton, scan_triton
from dynamicvis_geo.models.layers import PatchEmbed, SparseMixer
from dynamicvis_geo.models.mamba import MambaBlock

from .test_scan import relative_error

DEVICE = scan_triton.DEVICE


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == 'cpu':
        monkeypatch.setattr(scan_triton, '_CHANNELS', 4)
        monkeypatch.setattr(fused_triton, '_TILE_NUMBERS', 32)
        for name, value in (('_TOKENS', 16), ('_OUTPUTS', 16), ('_CHUNK', 16)):
            monkeypatch.setattr(patches_triton, name, value)


def make_stage(
    channels: int,
    width: int,
    *,
    reduction: int = 2,
    global_tokens: int = 3,
    position: str = 'head',
    is_softmax_on_x: bool = True,
    path_type: str = 'forward_reverse_mean',
    bias: bool = False,
) -> nn.ModuleList:
    """A stage of two mixers whose weights all matter."""
    config = {'state_size': 4, 'use_bias': bias}
    mixers = [
        SparseMixer(
            width,
            reduction,
            global_tokens,
            position,
            is_softmax_on_x,
            False,
            MambaBlock(width, path_type, layer_cfgs=config),
        )
        for _ in range(2)
    ]
    stage = nn.ModuleList(
        [
            PatchEmbed(channels, width, 3, 2, 1e-6),
            nn.Sequential(*mixers),
            nn.LayerNorm(width, eps=1e-6),
        ]
    )
    for name, parameter in stage.named_parameters():
        mean = 1.0 if 'norm.weight' in name or name == '2.weight' else 0.0
        if not name.endswith('A_log'):
            nn.init.normal_(parameter, mean, 0.3)
    return stage.eval().to(DEVICE)


def run_plainly(stages: list[Any], position: Tensor | None, x: Tensor) -> list[Tensor]:
    """Run stages by their own modules, as the general form of the model does."""
    maps = []
    for patch_embed, mixers, norm in stages:
        tokens, (height, width) = patch_embed(x)
        tokens = tokens if position is None else tokens + position
        position = None
        for mixer in mixers:
            tokens = mixer(tokens)
        x = norm(tokens).unflatten(1, (height, width)).permute(0, 3, 1, 2).contiguous()
        maps.append(x)
    return maps


def set_scan(stages: list[Any], form: str) -> None:
    for stage in stages:
        for mixer in stage[1]:
            mixer.spatial_mamba_mixer.mamba_layer.scan = form


@torch.no_grad()
def compare(stages: list[Any], position: Tensor | None, x: Tensor) -> None:
    set_scan(stages, 'torch')
    expected = run_plainly(stages, position, x)
    set_scan(stages, 'triton')
    assert fused_triton.can_fuse(stages, x)
    found = fused_triton.run_stages(stages, position, x)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == torch.float32
        assert relative_error(ours, theirs.double()) < 1e-6


@pytest.mark.parametrize(
    'options',
    [
        {},
        {'global_tokens': 6, 'reduction': 5, 'is_softmax_on_x': False},
        {'global_tokens': 0, 'position': 'none', 'reduction': 1},
        {'path_type': 'forward', 'bias': True},
        {'reduction': 40},
    ],
    ids=str,
)
def test_stages_equal_the_general_form(options: dict[str, Any]) -> None:
    stages = [
        make_stage(3, 6, **options),
        make_stage(6, 5, reduction=1, global_tokens=0),
    ]
    position = torch.randn(1, 18, 6, device=DEVICE)
    compare(stages, position, torch.randn(2, 3, 12, 6, device=DEVICE))


def test_long_sequences_are_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_triton, '_MOST_COUNTED', 4)
    compare([make_stage(3, 6)], None, torch.randn(1, 3, 6, 12, device=DEVICE))


@torch.no_grad()
def test_weights_that_change_are_prepared_anew() -> None:
    stage = make_stage(3, 4)
    x = torch.randn(1, 3, 6, 6, device=DEVICE)
    compare([stage], None, x)
    stage[1][0].spatial_mamba_mixer.mamba_layer.out_proj.weight.mul_(2)
    compare([stage], None, x)


@torch.no_grad()
def test_autocast_gives_its_dtype_to_the_products_alone() -> None:
    stage = make_stage(3, 8)
    x = torch.randn(1, 3, 12, 12, device=DEVICE)
    set_scan([stage], 'triton')
    (exact,) = fused_triton.run_stages([stage], None, x)
    with torch.autocast(DEVICE, torch.bfloat16):
        (found,) = fused_triton.run_stages([stage], None, x)
    assert found.dtype == torch.float32
    assert 1e-6 < relative_error(found, exact.double()) < 1e-2


@torch.no_grad()
def test_hooks_on_gates_choose_the_tokens_and_see_the_logits() -> None:
    stage = make_stage(3, 6)
    x = torch.randn(1, 3, 12, 6, device=DEVICE)
    forced = torch.randn(1, 18, 1, device=DEVICE)
    seen: list[Tensor] = []

    def force(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        seen.append(output.clone())
        return forced

    for mixer in stage[1]:
        mixer.spatial_gate.register_forward_hook(force)
    compare([stage], None, x)
    plain, fused = seen[:2], seen[2:]
    for theirs, ours in zip(plain, fused, strict=True):
        assert ours.shape == (1, 18, 1)
        assert relative_error(ours, theirs.double()) < 1e-6


@torch.no_grad()
def test_not_a_number_stays_in_its_image() -> None:
    stage = make_stage(3, 6)
    set_scan([stage], 'triton')
    x = torch.randn(2, 3, 12, 6, device=DEVICE)
    (expected,) = fused_triton.run_stages([stage], None, x)
    x[1, 0, 4, 4] = torch.nan
    (found,) = fused_triton.run_stages([stage], None, x)
    assert torch.equal(found[0], expected[0])
    assert found[1].isnan().any()


def test_order_is_that_of_a_stable_sort() -> None:
    weights = torch.rand(3, 70, device=DEVICE)
    weights[0, 10:30] = 0.5
    weights[1] = 0.0
    weights[2, 40:] = torch.nan
    ids, rank = fused_triton.order_tokens(weights, 20)
    expected = weights.sort(dim=1, descending=True, stable=True).indices
    assert torch.equal(ids.long(), expected[:, :20])
    assert torch.equal(rank.long(), expected.argsort(1))


@pytest.mark.parametrize('keep', ['reduction', 'global_token_position', 'gate', 'grad'])
def test_other_configurations_are_left_alone(keep: str) -> None:
    x = torch.randn(1, 3, 12, 6, device=DEVICE)
    options: dict[str, Any] = {
        'reduction': {'reduction': 0},
        'global_token_position': {'position': 'mid'},
        'gate': {'path_type': 'forward_reverse_gate'},
        'grad': {},
    }[keep]
    with torch.set_grad_enabled(keep == 'grad'):
        assert not fused_triton.can_fuse([make_stage(3, 6, **options)], x)
    with torch.no_grad():
        assert not fused_triton.can_fuse([make_stage(3, 6)], x.double())
        # Three global tokens do not divide 20.
        assert not fused_triton.can_fuse(
            [make_stage(3, 6)], x[:, :, :8, :].repeat(1, 1, 1, 2)[..., :10]
        )


@torch.no_grad()
@pytest.mark.parametrize(
    ('channels', 'kernel', 'stride', 'size'),
    [(3, 7, 4, (16, 12)), (6, 3, 2, (9, 7)), (32, 3, 2, (4, 4)), (5, 2, 1, (5, 3))],
)
def test_patches_equal_a_convolution(
    channels: int, kernel: int, stride: int, size: tuple[int, int]
) -> None:
    conv = nn.Conv2d(channels, 20, kernel, stride, kernel // 2, bias=False)
    conv = conv.to(DEVICE)
    x = torch.randn(2, channels, *size, device=DEVICE) * 30
    x = x.contiguous(memory_format=torch.channels_last)
    y = patches_triton.convolve_tokens(x, conv, patches_triton.split_filters(conv))
    expected = nn.functional.conv2d(
        x.double(), conv.weight.double(), None, stride, kernel // 2
    )
    assert relative_error(y, expected) < 1e-6
