"""The Triton kernels: their behaviour, and that they compile for GPUs."""

from pathlib import Path

import pytest
import torch

from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.models import DynamicVis
from dynamicvis_geo.models.scan import resolve_scan, unavailable_kernels

from .triton_tools import compile_kernel, run_cases

pytestmark = pytest.mark.once

pytest.importorskip('triton')
scan_triton = pytest.importorskip('dynamicvis_geo.models.scan_triton')

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')


def test_cases() -> None:
    run_cases(Path(__file__).with_name('scan_triton_cases.py'))


@pytest.mark.parametrize('capability', [80, 90])
@pytest.mark.parametrize('dtype', ['fp32', 'bf16'])
@pytest.mark.parametrize('output', [True, False])
def test_scan_compiles_ahead(capability: int, dtype: str, output: bool) -> None:
    """Tokens are copied ahead (cp.async), and no state goes from lane to lane."""
    float32 = dict.fromkeys(('A', 'B', 'C', 'D', 'dt_bias', 'added', 'spans'), 'fp32')
    kernel = compile_kernel(
        scan_triton._scan_kernel,
        capability,
        float32 | dict.fromkeys(('u', 'dt', 'gate', 'out'), dtype),
        {'OUTPUT': output, 'TILE': 4, 'STATES': 16, 'CHANNELS': 32},
        unaligned=[n for n in scan_triton._scan_kernel.arg_names if n[0] in 'BC'],
        warps=1,
    )
    assembly = kernel.asm['ptx']
    assert 'cp.async' in assembly
    assert assembly.count('ex2.approx.ftz') >= 64
    # Those that are left sum the time steps of a tile.
    assert assembly.count('shfl') <= (0 if output else 8)


@pytest.mark.parametrize('dtype', ['fp32', 'bf16'])
def test_convolution_compiles_ahead(dtype: str) -> None:
    compile_kernel(
        scan_triton._conv_kernel,
        90,
        {'x': dtype, 'weight': 'fp32', 'bias': 'fp32', 'out': dtype},
        {'DIRECTIONS': 2, 'TAPS': 4, 'TILE': 32, 'CHANNELS': 64},
        unaligned=('batch',),
    )


@pytest.mark.parametrize(
    ('programs', 'length', 'chunks'),
    [(12, 2176, 46), (96, 272, 11), (96, 2176, 11), (384, 2176, 1), (768, 272, 1)],
)
def test_small_grids_are_cut_into_chunks(
    programs: int, length: int, chunks: int
) -> None:
    assert scan_triton.count_chunks(programs, length, processors=132) == chunks


@without_gpu
def test_without_a_gpu_it_says_so() -> None:
    assert unavailable_kernels()['triton'] == 'PyTorch finds no CUDA GPU'
    with pytest.raises(SpecError, match=r"scan='triton' is not available.*no CUDA GPU"):
        DynamicVis(img_size=64, scan='triton')


@without_gpu
def test_without_a_gpu_auto_does_not_take_it() -> None:
    assert resolve_scan('auto', 'cpu') != 'triton'
