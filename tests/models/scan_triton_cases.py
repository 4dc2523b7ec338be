"""What the Triton kernels must do; ``test_scan_triton.py`` runs this file.

On a GPU if there is one, else in Triton's interpreter, whose time grows with each
number that it touches: sizes are small, and so are the blocks.
"""

import pytest
import torch

# In this order: in the interpreter, the kernels in Triton take the place of those in C.
from dynamicvis_geo.models import scan, scan_c, scan_triton
from dynamicvis_geo.models.layers import SparseMixer
from dynamicvis_geo.models.mamba import MambaBlock, MambaMixer

from . import parity
from .test_scan import (
    Inputs,
    make_inputs,
    reference_conv,
    reference_scan,
    relative_error,
)

DEVICE = scan_triton.DEVICE


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == 'cpu':
        monkeypatch.setattr(scan_triton, '_CHANNELS', 4)


@pytest.fixture(params=[False, True], ids=['one pass', 'chunks'])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    processors = 1000 if request.param else 0
    monkeypatch.setattr(scan_triton, '_processors', lambda device: processors)


def run_scan(inputs: Inputs) -> torch.Tensor:
    return scan.run_scan('triton', *(t.to(DEVICE) for t in inputs)).cpu()


def test_operators_run_these_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    assert scan_c.DEVICE == 'cpu'
    launched = []
    for name in ('launch_scan', 'launch_conv'):
        kernel = getattr(scan_triton, name)
        monkeypatch.setattr(
            scan_triton, name, lambda *t, k=kernel: launched.append(k) or k(*t)
        )
    inputs = make_inputs(2, 1, 4, 3, 2)
    run_scan(inputs)
    weight = torch.ones(3, 1, 4, device=DEVICE)
    scan.run_conv('triton', inputs.gate.to(DEVICE), weight, None, 2)
    assert len(launched) == 2


# (directions, batch, length, channels, states)
@pytest.mark.usefixtures('chunks')
@pytest.mark.parametrize(
    'size',
    [
        (2, 1, 21, 6, 16),
        (1, 2, 26, 5, 8),
        (2, 2, 19, 3, 5),
        (2, 1, 1, 4, 16),
        (1, 1, 11, 2, 1),
        (1, 1, 5, 3, 40),
    ],
)
def test_scan_equals_reference(size: tuple[int, ...]) -> None:
    inputs = make_inputs(*size)
    error = relative_error(run_scan(inputs), reference_scan(inputs))
    assert error < 1e-6


@pytest.mark.usefixtures('chunks')
def test_scan_with_extreme_steps() -> None:
    inputs = make_inputs(2, 1, 24, 4, 16)
    dt = inputs.dt.clone()
    dt[:, :, ::3] = -1e4  # the state stays as it is
    dt[:, :, 1::7] = 1e4  # the state is forgotten
    inputs = inputs._replace(dt=dt)
    assert relative_error(run_scan(inputs), reference_scan(inputs)) < 1e-6


def test_small_steps_are_exact() -> None:
    inputs = make_inputs(1, 1, 1, 64, 1)
    inputs = inputs._replace(
        dt=torch.linspace(-60, -10, 64).expand(1, 1, 1, 64),
        D=torch.zeros(64),
        B=torch.ones(1, 1, 1, 1),
        C=torch.ones(1, 1, 1, 1),
    )
    expected = reference_scan(inputs)
    error = (run_scan(inputs) - expected).abs() / expected.abs()
    # The argument of exp2, up to 87, is rounded to 24 bits.
    assert error.max() < 6e-6


@pytest.mark.usefixtures('chunks')
def test_not_a_number_is_not_hidden() -> None:
    inputs = make_inputs(1, 1, 24, 4, 4)
    inputs.dt[0, 0, 3, 2] = torch.nan
    y = run_scan(inputs)[0, 0]
    assert y[3:, 2].isnan().all()
    assert not y[:3].isnan().any()
    assert not y[:, 3:].isnan().any()


def test_strided_inputs_give_the_same() -> None:
    inputs = make_inputs(2, 2, 9, 5, 8)
    joined = torch.cat([inputs.dt[..., :3], inputs.B, inputs.C], dim=-1)
    strided = inputs._replace(
        u=inputs.u.mT.contiguous().mT,
        dt=inputs.dt.transpose(0, 1).contiguous().transpose(0, 1),
        B=joined[..., 3:11],
        C=joined[..., 11:],
        gate=torch.cat([inputs.gate, inputs.gate], dim=-1)[..., 5:],
        A=inputs.A.mT.contiguous().mT,
    )
    assert torch.equal(run_scan(strided), run_scan(inputs))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    inputs = make_inputs(2, 1, 21, 5, 8)
    names = 'u', 'dt', 'B', 'C', 'gate'
    inputs = inputs._replace(**{n: getattr(inputs, n).to(dtype) for n in names})
    y = run_scan(inputs)
    assert y.dtype == dtype
    # States are float32 in all of them: only the output is rounded.
    assert relative_error(y, reference_scan(inputs)) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize('size', [(2, 70, 33), (1, 2, 5), (1, 1, 65)])
@pytest.mark.parametrize('taps', [1, 4])
@pytest.mark.parametrize('has_bias', [True, False])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_convolution_equals_reference(
    size: tuple[int, ...], taps: int, has_bias: bool, dtype: torch.dtype
) -> None:
    x = torch.cat([torch.randn(size), torch.randn(size) * 9], dim=-1)[..., 1:].to(dtype)
    weight = torch.randn(x.shape[2], 1, taps)
    bias = torch.randn(x.shape[2]) if has_bias else None
    arguments = (None if t is None else t.to(DEVICE) for t in (x, weight, bias))
    y = scan.run_conv('triton', *arguments, 2)
    assert y.dtype == dtype
    error = relative_error(y.cpu(), reference_conv(x, weight, bias, 2))
    assert error < (1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps)


def test_gradients_are_of_pytorch() -> None:
    inputs = [t.to(DEVICE).requires_grad_() for t in make_inputs(2, 1, 6, 3, 2)]
    y = scan.run_scan('triton', *inputs)
    assert torch.equal(y, scan.selective_scan(*inputs))
    y.sum().backward()
    assert all(t.grad is not None for t in inputs)


def test_empty_tensors() -> None:
    for size in ((2, 0, 5, 4, 16), (1, 2, 0, 4, 16)):
        assert run_scan(make_inputs(*size)).shape == size[:4]
    empty = torch.empty(0, 5, 4, device=DEVICE)
    weight = torch.ones(4, 1, 4, device=DEVICE)
    assert scan.run_conv('triton', empty, weight, None, 2).shape == (2, 0, 5, 4)


def test_wrong_shapes_are_refused() -> None:
    inputs = make_inputs(2, 1, 8, 16, 16)
    with pytest.raises(ValueError, match='do not fit'):
        run_scan(inputs._replace(B=inputs.B[..., :8]))
    weight = torch.ones(15, 1, 4, device=DEVICE)
    with pytest.raises(ValueError, match='do not fit'):
        scan.run_conv('triton', inputs.gate.to(DEVICE), weight, None, 2)


@pytest.mark.skipif(DEVICE == 'cpu', reason='the operators of the CPU are in C')
def test_operators_are_well_formed() -> None:
    inputs = tuple(t.to(DEVICE) for t in make_inputs(2, 1, 4, 3, 2))
    torch.library.opcheck(scan.scan_operator, inputs)
    weight = torch.ones(3, 1, 4, device=DEVICE)
    torch.library.opcheck(scan.conv_operator, (inputs[7], weight, None, 2))


@torch.inference_mode()
@pytest.mark.parametrize('autocast', [False, True])
def test_mixer_equals_that_in_pytorch(autocast: bool) -> None:
    mixers = []
    for kernel in ('triton', 'torch'):
        torch.manual_seed(0)
        block = MambaBlock(4, layer_cfgs={'state_size': 4}, scan=kernel)
        mixers.append(SparseMixer(4, 2, 3, 'head', True, False, block).to(DEVICE))
    x = torch.randn(2, 18, 4, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        ours, expected = (mixer(x) for mixer in mixers)
    assert ours.dtype == expected.dtype
    tolerance = 1e-2 if autocast else 1e-6
    assert relative_error(ours, expected.double()) < tolerance


@torch.inference_mode()
@pytest.mark.skipif(DEVICE == 'cpu', reason='takes minutes in the interpreter')
@pytest.mark.parametrize('name', ['comp_mixer', 'comp_mixer_long'])
def test_mixer_equals_the_official_one(name: str) -> None:
    component, arrays = parity.COMPONENTS[name], parity.golden(name)
    mixer = parity.fill(MambaMixer(96, scan='triton'), component['weight_prefix'])
    if name == 'comp_mixer':
        x, step = arrays['x'], 1
    else:
        shape = tuple(component['input_shape'])
        x, step = parity.sequence(component['input_name'], shape), 16
    y = mixer.to(DEVICE)(x.to(DEVICE)).cpu()[:, ::step]
    assert parity.relative_error(y, arrays['y']) <= parity.tolerance(component)
