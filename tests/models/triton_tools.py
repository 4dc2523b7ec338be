"""Run cases for Triton's kernels without a GPU, and compile kernels for one."""

import os
import subprocess
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch


def run_cases(path: Path) -> None:
    """Run a file of cases in a process of its own.

    Triton's interpreter must be chosen before Triton is first imported.
    """
    interpreter = {} if torch.cuda.is_available() else {'TRITON_INTERPRET': '1'}
    result = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', str(path)],
        cwd=path.parents[2],
        env=os.environ | interpreter,
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def compile_kernel(
    kernel: Any,
    capability: int,
    pointers: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    floats: Collection[str] = (),
    unaligned: Collection[str] = (),
    warps: int = 4,
) -> Any:
    """Compile for a GPU that need not be here.

    Args:
        kernel: what ``triton.jit`` made.
        capability: 80 for sm_80.
        pointers: the element type of each argument that is a tensor.
        constants: the value of each argument that is known ahead.
        floats: arguments that are float32 numbers; the others are integers.
        unaligned: pointers and integers that are no multiple of 16.
        warps: of a program.
    """
    triton = pytest.importorskip('triton')
    compiler = pytest.importorskip('triton.compiler')
    target = pytest.importorskip('triton.backends.compiler').GPUTarget
    signature, aligned = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = 'constexpr'
        elif name in floats:
            signature[name] = 'fp32'
        else:
            signature[name] = f'*{pointers[name]}' if name in pointers else 'i32'
            if name not in unaligned:
                aligned[(index,)] = [['tt.divisibility', 16]]
    source = compiler.ASTSource(
        kernel,
        signature,
        constexprs={(kernel.arg_names.index(n),): v for n, v in constants.items()},
        attrs=aligned,
    )
    gpu = target('cuda', capability, 32)
    return triton.compile(source, target=gpu, options={'num_warps': warps})
