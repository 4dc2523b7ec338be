"""The fused kernels: their behaviour, and that they compile for GPUs."""

from pathlib import Path

import pytest

from .triton_tools import compile_kernel, run_cases

pytestmark = pytest.mark.once

pytest.importorskip('triton')
fused_kernels = pytest.importorskip('dynamicvis_geo.models.fused_kernels')
patches_triton = pytest.importorskip('dynamicvis_geo.models.patches_triton')


def test_cases() -> None:
    run_cases(Path(__file__).with_name('fused_triton_cases.py'))


@pytest.mark.parametrize('capability', [80, 90])
@pytest.mark.parametrize('step', ['patches', 'between', 'last'])
def test_tokens_compile_ahead(capability: int, step: str) -> None:
    fused_tensors = {'added': 'bf16', 'sequence': 'bf16', 'rank': 'i32'}
    float_tensors = (
        'x tokens weights patch_bias scale shift position gate logits block_scale'
    )
    constants = {
        'EMBED': step == 'patches',
        'MIXES_ALL': True,
        'POOLED': True,
        'LAST': step == 'last',
        'TILE': 8,
        'WIDTH': 512,
        'x_token' if step == 'patches' else 'x_channel': 1,
    }
    kernel = compile_kernel(
        fused_kernels.tokens_kernel,
        capability,
        fused_tensors | dict.fromkeys(float_tensors.split(), 'fp32'),
        constants,
        floats=('norm_eps', 'block_eps'),
    )
    assert 'st.local' not in kernel.asm['ptx']


@pytest.mark.parametrize('capability', [80, 90])
def test_small_kernels_compile_ahead(capability: int) -> None:
    compile_kernel(
        fused_kernels.rank_kernel,
        capability,
        {'weights': 'fp32', 'ids': 'i32', 'rank': 'i32'},
        {'BLOCK': 64, 'TILE': 128},
    )
    compile_kernel(
        fused_kernels.gather_kernel,
        capability,
        {'tokens': 'fp32', 'ids': 'i32', 'scale': 'fp32', 'sequence': 'bf16'},
        {'TILE': 8, 'WIDTH': 512},
        floats=('eps',),
    )
    compile_kernel(
        fused_kernels.join_kernel,
        capability,
        {'y': 'bf16', 'gate': 'bf16', 'joined': 'bf16'},
        {'DIRECTIONS': 2, 'ROWS': 16, 'CHANNELS': 128},
    )


@pytest.mark.parametrize(('capability', 'product'), [(80, 'mma.sync'), (90, 'wgmma')])
def test_patches_compile_ahead(capability: int, product: str) -> None:
    """They use the matrix units, shared memory that every GPU has, and copy ahead."""
    names = 'TOKENS', 'OUTPUTS', 'CHUNK', 'STAGES'
    kernel = compile_kernel(
        patches_triton._patch_kernel,
        capability,
        dict.fromkeys(('x', 'high', 'low', 'y'), 'fp32'),
        {'KERNEL': 3, 'RUN': 288, 'WIDTH': 96}
        | {name: getattr(patches_triton, f'_{name}') for name in names},
        unaligned=('count', 'stride', 'padding'),
        warps=patches_triton._WARPS,
    )
    assert product in kernel.asm['ptx']
    assert 'tf32' in kernel.asm['ptx']
    assert 'cp.async' in kernel.asm['ptx']
    assert kernel.metadata.shared <= 99 << 10
