"""The mamba-ssm form, with a stand-in for the package, which needs a GPU to install."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.models import scan_mamba_ssm
from dynamicvis_geo.models.scan_forms import check_scan

from .test_scan import make_inputs, reference_scan, relative_error

# The documented signature, in PyTorch, and what the kernel insists on.
STAND_IN = """
import torch
import torch.nn.functional as F

def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None,
                      delta_softplus=False, return_last_state=False):
    batch, dim, length = u.shape
    assert B.shape == C.shape == (batch, A.shape[1], length)
    assert delta.shape == z.shape == u.shape
    assert u.dtype == delta.dtype == B.dtype == C.dtype == z.dtype
    assert A.dtype == D.dtype == delta_bias.dtype == torch.float32
    assert all(t.stride(-1) == 1 or length == 1 for t in (u, delta, B, C, z))
    dtype = u.dtype
    u, delta, B, C, z = (t.float() for t in (u, delta, B, C, z))
    delta = delta + delta_bias[:, None]
    delta = F.softplus(delta) if delta_softplus else delta
    state, outputs = u.new_zeros(batch, dim, A.shape[1]), []
    for t in range(length):
        drive = (delta[..., t] * u[..., t])[..., None] * B[:, None, :, t]
        state = torch.exp(delta[..., t, None] * A) * state + drive
        outputs.append((state * C[:, None, :, t]).sum(-1))
    y = torch.stack(outputs, dim=-1) + D[:, None] * u
    return (y * F.silu(z)).to(dtype)
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    folder = tmp_path / 'mamba_ssm' / 'ops'
    folder.mkdir(parents=True)
    (tmp_path / 'mamba_ssm' / '__init__.py').touch()
    (folder / '__init__.py').touch()
    (folder / 'selective_scan_interface.py').write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.split('.')[0] == 'mamba_ssm']:
        del sys.modules[name]


@pytest.mark.usefixtures('stand_in')
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    'size', [(2, 3, 21, 10, 16), (1, 2, 9, 5, 7), (2, 1, 1, 4, 16)]
)
def test_scan_equals_reference(size: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = make_inputs(*size)
    names = 'u', 'dt', 'B', 'C', 'gate'
    inputs = inputs._replace(**{n: getattr(inputs, n).to(dtype) for n in names})
    y = scan_mamba_ssm.selective_scan(*inputs)
    assert y.dtype == dtype
    tolerance = (
        max(1e-6, 2 * torch.finfo(dtype).eps) if dtype != torch.float64 else 1e-6
    )
    assert relative_error(y, reference_scan(inputs)) < tolerance


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(SpecError, match=r'no CUDA GPU.*pip install mamba-ssm'):
        check_scan('mamba_ssm')


def test_without_the_package_it_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setitem(sys.modules, 'mamba_ssm', None)
    with pytest.raises(SpecError, match=r'mamba_ssm.*pip install mamba-ssm'):
        check_scan('mamba_ssm')


@pytest.mark.usefixtures('stand_in')
def test_with_a_gpu_and_the_package_it_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    assert scan_mamba_ssm.unavailable() is None
