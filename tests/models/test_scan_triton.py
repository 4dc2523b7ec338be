"""The Triton form: its behaviour, and that its kernels compile for GPUs.

Triton's interpreter must be chosen before Triton is first imported, so on a machine
without a GPU the cases run in a process of their own.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.models import DynamicVis
from dynamicvis_geo.models.scan_forms import resolve_scan, scan_forms

triton = pytest.importorskip('triton')
scan_triton = pytest.importorskip('dynamicvis_geo.models.scan_triton')

CASES = Path(__file__).with_name('scan_triton_cases.py')
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')


def test_cases() -> None:
    interpreter = {} if torch.cuda.is_available() else {'TRITON_INTERPRET': '1'}
    result = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', str(CASES)],
        cwd=CASES.parents[2],
        env=os.environ | interpreter,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def compile_kernel(
    kernel: Any, capability: int, dtype: str, constants: dict[str, Any], warps: int
) -> Any:
    """Compile for a GPU that need not be here, with pointers and strides aligned."""
    compiler = pytest.importorskip('triton.compiler')
    target = pytest.importorskip('triton.backends.compiler').GPUTarget
    in_dtype, in_float32 = {'u', 'dt', 'gate', 'out', 'x'}, {'A', 'B', 'C', 'D'}
    in_float32 |= {'dt_bias', 'added', 'spans', 'weight', 'bias'}
    signature, aligned = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = 'constexpr'
            continue
        pointer = '*fp32' if name in in_float32 else f'*{dtype}'
        signature[name] = pointer if name in in_dtype | in_float32 else 'i32'
        if not name.startswith(('B', 'C')):
            aligned[(index,)] = [['tt.divisibility', 16]]
    source = compiler.ASTSource(
        kernel,
        signature,
        constexprs={(kernel.arg_names.index(n),): v for n, v in constants.items()},
        attrs=aligned,
    )
    gpu = target('cuda', capability, 32)
    return triton.compile(source, target=gpu, options={'num_warps': warps})


@pytest.mark.parametrize('capability', [80, 90])
@pytest.mark.parametrize('dtype', ['fp32', 'bf16'])
@pytest.mark.parametrize('output', [True, False])
def test_scan_compiles_ahead(capability: int, dtype: str, output: bool) -> None:
    """Tokens are copied ahead (cp.async), and no state goes from lane to lane."""
    constants = {'OUTPUT': output, 'TILE': 4, 'STATES': 16, 'CHANNELS': 32}
    kernel = compile_kernel(scan_triton._scan_kernel, capability, dtype, constants, 1)
    assembly = kernel.asm['ptx']
    assert 'cp.async' in assembly
    assert assembly.count('ex2.approx.ftz') >= 64
    # Those that are left sum the time steps of a tile.
    assert assembly.count('shfl') <= (0 if output else 8)


@pytest.mark.parametrize('dtype', ['fp32', 'bf16'])
def test_convolution_compiles_ahead(dtype: str) -> None:
    constants = {'TAPS': 4, 'TILE': 64, 'CHANNELS': 64}
    assert compile_kernel(scan_triton._conv_kernel, 90, dtype, constants, 4).asm['ptx']


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
    assert scan_forms()['triton'] == 'PyTorch finds no CUDA GPU'
    with pytest.raises(SpecError, match=r"scan='triton' is not available.*no CUDA GPU"):
        DynamicVis(img_size=64, scan='triton')


@without_gpu
def test_without_a_gpu_auto_does_not_take_it() -> None:
    assert resolve_scan('auto', 'cpu') != 'triton'
