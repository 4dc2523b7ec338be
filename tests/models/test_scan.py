"""Every kernel of the selective scan against a sequential float64 reference."""

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.models import DynamicVis, scan, scan_c
from dynamicvis_geo.models.config import SCANS
from dynamicvis_geo.models.mamba import MambaMixer
from dynamicvis_geo.models.scan import resolve_scan, run_conv, run_scan
from tests.processes import HANG

C_REASON = scan_c.unavailable()
needs_c = pytest.mark.skipif(
    C_REASON is not None, reason=f'the C kernels cannot run: {C_REASON}'
)
KERNELS = ['torch', pytest.param('c', marks=needs_c)]
# (directions, batch, length, channels, states)
SIZES = [
    (2, 2, 40, 192, 16),
    (1, 1, 40, 192, 16),
    (2, 1, 1, 5, 16),
    (2, 3, 2, 16, 16),
    (2, 2, 33, 50, 16),
    (2, 1, 70, 17, 1),
    (1, 2, 65, 20, 7),
    (2, 1, 64, 33, 40),
    (2, 1, 2176, 24, 16),
]


class Inputs(NamedTuple):
    u: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    dt_bias: Tensor
    gate: Tensor


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def make_inputs(
    directions: int, batch: int, length: int, channels: int, states: int
) -> Inputs:
    """Steps from 1e-6 to 7.4, and decays from 1 down to exp(-100) and below."""
    generator = torch.Generator().manual_seed(channels)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator) * 2 - 1

    return Inputs(
        u=draw(directions, batch, length, channels) * 2,
        dt=draw(directions, batch, length, channels) * 10.6,
        A=-torch.arange(1, states + 1) * (1 + 0.1 * draw(channels, states)),
        B=draw(directions, batch, length, states) * 3,
        C=draw(directions, batch, length, states) * 3,
        D=draw(channels),
        dt_bias=draw(channels) - 3.2,
        gate=draw(batch, length, channels) * 5,
    )


@needs_c
def test_gradients_by_another_kernel_are_told_once() -> None:
    scan.tell_cost_of_gradients.cache_clear()
    model, x = DynamicVis(img_size=16), torch.zeros(1, 3, 16, 16)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        with torch.no_grad():
            model(x)
        DynamicVis(img_size=16, scan='torch')(x)
    with pytest.warns(UserWarning, match=r"'c' has none.*torch\.no_grad\(\)") as told:
        [model(x) for _ in range(2)]
    assert [warning.filename for warning in told] == [__file__]
    model.requires_grad_(False)
    scan.tell_cost_of_gradients.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        model(x)
    with pytest.warns(UserWarning, match='needs gradients'):
        model(x.requires_grad_())


def reference_scan(inputs: Inputs) -> Tensor:
    u, dt, A, B, C, D, dt_bias, gate = (t.double() for t in inputs)
    step = F.softplus(dt + dt_bias, threshold=1000)
    outputs = torch.empty_like(u)
    for k in range(u.shape[0]):
        state = u.new_zeros(u.shape[1], u.shape[3], A.shape[1])
        order = range(u.shape[2]) if k == 0 else reversed(range(u.shape[2]))
        for t in order:
            decay = torch.exp(step[k, :, t, :, None] * A)
            drive = (step[k, :, t] * u[k, :, t])[..., None] * B[k, :, t, None]
            state = decay * state + drive
            y = (state * C[k, :, t, None]).sum(-1) + D * u[k, :, t]
            outputs[k, :, t] = y * F.silu(gate[:, t])
    return outputs


def reference_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, directions: int
) -> Tensor:
    x, weight = x.double(), weight.double()
    bias = None if bias is None else bias.double()
    outputs = []
    for turn in range(directions):
        tokens = x.flip(1) if turn else x
        padded = F.pad(tokens.transpose(1, 2), (weight.shape[-1] - 1, 0))
        y = F.silu(F.conv1d(padded, weight, bias, groups=x.shape[2])).transpose(1, 2)
        outputs.append(y.flip(1) if turn else y)
    return torch.stack(outputs)


def relative_error(value: Tensor, reference: Tensor) -> float:
    return float((value.double() - reference).norm() / reference.norm())


@pytest.mark.parametrize('kernel', KERNELS)
@pytest.mark.parametrize('size', SIZES)
def test_scan_equals_reference(kernel: str, size: tuple[int, ...]) -> None:
    inputs = make_inputs(*size)
    y = run_scan(kernel, *inputs)
    assert y.dtype == torch.float32
    assert relative_error(y, reference_scan(inputs)) < 1e-6


@pytest.mark.parametrize('kernel', KERNELS)
def test_scan_with_extreme_steps(kernel: str) -> None:
    inputs = make_inputs(2, 1, 300, 32, 16)
    dt = inputs.dt.clone()
    dt[:, :, ::3] = -1e4  # the state stays as it is
    dt[:, :, 1::7] = 1e4  # the state is forgotten
    inputs = inputs._replace(dt=dt)
    assert relative_error(run_scan(kernel, *inputs), reference_scan(inputs)) < 1e-6


@pytest.mark.parametrize('kernel', KERNELS)
def test_scan_remembers_over_a_long_sequence(kernel: str) -> None:
    inputs = make_inputs(2, 1, 2176, 16, 16)
    inputs = inputs._replace(dt=inputs.dt * 0.1 - 10, B=inputs.B + 100)
    assert relative_error(run_scan(kernel, *inputs), reference_scan(inputs)) < 2e-6


@pytest.mark.parametrize('kernel', KERNELS)
def test_small_steps_are_exact(kernel: str) -> None:
    """Softplus keeps its relative precision where it is 1e-6 and below."""
    inputs = make_inputs(1, 1, 1, 64, 16)
    inputs = inputs._replace(
        dt=torch.linspace(-60, -10, 64).expand(1, 1, 1, 64),
        D=torch.zeros(64),
        B=torch.ones(1, 1, 1, 16),
        C=torch.ones(1, 1, 1, 16),
    )
    expected = reference_scan(inputs)
    error = (run_scan(kernel, *inputs) - expected).abs() / expected.abs()
    assert error.max() < 3e-6


@pytest.mark.parametrize('kernel', KERNELS)
def test_not_a_number_is_not_hidden(kernel: str) -> None:
    inputs = make_inputs(1, 1, 8, 16, 16)
    inputs.dt[0, 0, 3, 2] = torch.nan
    y = run_scan(kernel, *inputs)[0, 0]
    assert y[3:, 2].isnan().all()
    assert not y[:3].isnan().any()
    assert not y[:, 3:].isnan().any()


@pytest.mark.parametrize('kernel', KERNELS)
@pytest.mark.parametrize('bits', [0x7FC00000, 0x7FC00001, 0x7FFFFFFF, -1, 0x7F800001])
@pytest.mark.parametrize('name', Inputs._fields)
def test_no_kind_of_not_a_number_becomes_a_number(
    kernel: str, bits: int, name: str
) -> None:
    inputs = make_inputs(2, 1, 5, 17, 3)
    getattr(inputs, name).view(torch.int32).fill_(bits)
    assert run_scan(kernel, *inputs).isnan().all()
    x = inputs.gate
    x.view(torch.int32).fill_(bits)
    assert run_conv(kernel, x, torch.ones(17, 1, 4), None, 2).isnan().all()


@pytest.mark.parametrize('kernel', KERNELS)
@pytest.mark.parametrize('taps', [1, 4, 7])
@pytest.mark.parametrize('size', [(2, 40, 192), (1, 1, 5), (3, 3, 16), (2, 70, 33)])
@pytest.mark.parametrize('has_bias', [True, False])
@pytest.mark.parametrize('directions', [1, 2])
def test_convolution_equals_reference(
    kernel: str, taps: int, size: tuple[int, ...], has_bias: bool, directions: int
) -> None:
    generator = torch.Generator().manual_seed(taps)
    x = torch.randn(size, generator=generator) * 4
    x[0, 0, :2] = torch.tensor([-200.0, 200.0])
    weight = torch.randn(size[2], 1, taps, generator=generator)
    bias = torch.randn(size[2], generator=generator) if has_bias else None
    y = run_conv(kernel, x, weight, bias, directions)
    assert relative_error(y, reference_conv(x, weight, bias, directions)) < 1e-6


@pytest.mark.parametrize('kernel', KERNELS)
def test_strided_inputs_give_the_same(kernel: str) -> None:
    inputs = make_inputs(2, 2, 40, 50, 16)
    expected = run_scan(kernel, *inputs)
    joined = torch.cat([inputs.dt[..., :9], inputs.B, inputs.C], dim=-1)
    strided = inputs._replace(
        u=inputs.u.mT.contiguous().mT,
        dt=inputs.dt.transpose(0, 1).contiguous().transpose(0, 1),
        B=joined[..., 9:25],
        C=joined[..., 25:],
        gate=torch.cat([inputs.gate, inputs.gate], dim=-1)[..., 50:],
        A=inputs.A.mT.contiguous().mT,
    )
    torch.testing.assert_close(
        run_scan(kernel, *strided), expected, rtol=1e-5, atol=1e-5
    )
    weight, bias = torch.randn(50, 1, 4), torch.randn(50)
    torch.testing.assert_close(
        run_conv(kernel, strided.gate, weight, bias, 2),
        run_conv(kernel, inputs.gate, weight, bias, 2),
    )


@pytest.mark.parametrize('kernel', KERNELS)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(kernel: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(2, 2, 45, 50, 16)
    big = {name: getattr(inputs, name).to(dtype) for name in ('u', 'dt', 'B', 'C')}
    inputs = inputs._replace(**big, gate=inputs.gate.to(dtype))
    y = run_scan(kernel, *inputs)
    assert y.dtype == dtype
    # States are float32 in all of them: only the output is rounded.
    assert relative_error(y, reference_scan(inputs)) < 2 * torch.finfo(dtype).eps
    x, weight = inputs.gate, torch.randn(50, 1, 4, dtype=torch.float64)
    y = run_conv(kernel, x, weight.to(dtype), None, 2)
    assert y.dtype == dtype
    expected = reference_conv(x, weight.to(dtype), None, 2)
    assert relative_error(y, expected) < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize('kernel', KERNELS)
def test_autocast_does_not_reach_the_states(kernel: str) -> None:
    inputs = make_inputs(2, 1, 45, 50, 16)
    with torch.autocast('cpu', torch.bfloat16):
        y = run_scan(kernel, *inputs)
    assert torch.equal(y, run_scan(kernel, *inputs))


@pytest.mark.parametrize('kernel', KERNELS)
def test_gradients(kernel: str) -> None:
    inputs = make_inputs(2, 1, 6, 3, 2)
    leaves = tuple(t.double().requires_grad_() for t in inputs)
    assert torch.autograd.gradcheck(partial(run_scan, kernel), leaves)
    parameters = [t.clone().requires_grad_() for t in inputs]
    run_scan(kernel, *parameters).sum().backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in parameters)


@needs_c
def test_thread_count_does_not_change_a_bit() -> None:
    inputs = make_inputs(2, 3, 77, 200, 16)
    weight, bias = torch.randn(200, 1, 4), torch.randn(200)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        y = run_scan('c', *inputs)
        results.append((y, run_conv('c', inputs.gate, weight, bias, 2)))
    for y, h in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(h, results[0][1])


@needs_c
def test_threads_without_openmp(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(2, 3, 77, 200, 16)
    expected = run_scan('c', *inputs)
    monkeypatch.setattr(scan_c, '_openmp', lambda: None)
    torch.set_num_threads(3)
    assert torch.equal(run_scan('c', *inputs), expected)


@needs_c
def test_batch_does_not_change_a_bit() -> None:
    inputs = make_inputs(2, 3, 77, 40, 16)
    together = run_scan('c', *inputs)
    for sample in range(3):
        own = slice(sample, sample + 1)
        one = inputs._replace(
            **{n: getattr(inputs, n)[:, own] for n in ('u', 'dt', 'B', 'C')},
            gate=inputs.gate[own],
        )
        assert torch.equal(run_scan('c', *one), together[:, own])


@needs_c
@pytest.mark.parametrize('name', scan_c.INSTRUCTION_SETS)
def test_every_instruction_set(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = scan_c.INSTRUCTION_SETS
    if names.index(name) > names.index(scan_c.instruction_set()):
        pytest.skip(f'this processor has no {name}')
    monkeypatch.setattr(scan_c, 'instruction_set', lambda: name)
    inputs = make_inputs(2, 1, 130, 50, 16)
    assert relative_error(run_scan('c', *inputs), reference_scan(inputs)) < 1e-6
    weight = torch.randn(50, 1, 4)
    y = run_conv('c', inputs.gate, weight, None, 2)
    assert relative_error(y, reference_conv(inputs.gate, weight, None, 2)) < 1e-6


@pytest.mark.parametrize('kernel', KERNELS)
@pytest.mark.parametrize('size', [(2, 0, 5, 4, 16), (1, 2, 0, 4, 16), (2, 1, 0, 4, 1)])
def test_empty_tensors(kernel: str, size: tuple[int, ...]) -> None:
    inputs = make_inputs(*size)
    assert run_scan(kernel, *inputs).shape == size[:4]
    h = run_conv(kernel, inputs.gate, torch.ones(4, 1, 4), None, size[0])
    assert h.shape == size[:4]


@needs_c
def test_wrong_shapes_are_refused() -> None:
    inputs = make_inputs(2, 1, 8, 16, 16)
    with pytest.raises(ValueError, match='do not fit'):
        run_scan('c', *inputs._replace(B=inputs.B[..., :8]))
    with pytest.raises(ValueError, match='do not fit'):
        run_conv('c', inputs.gate, torch.ones(15, 1, 4), None, 2)


@needs_c
def test_operators_are_well_formed() -> None:
    inputs = make_inputs(2, 1, 8, 16, 16)
    torch.library.opcheck(scan.scan_operator, tuple(inputs))
    weight = torch.ones(16, 1, 4)
    torch.library.opcheck(scan.conv_operator, (inputs.gate, weight, None, 2))


def run_python(code: str) -> str:
    result = subprocess.run(
        [sys.executable, '-c', code],
        capture_output=True,
        text=True,
        timeout=HANG,
        env=os.environ | {'PYTHONWARNINGS': 'ignore::DeprecationWarning'},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@needs_c
@pytest.mark.skipif(not hasattr(os, 'fork'), reason='this system does not fork')
def test_runs_in_a_forked_process() -> None:
    """A DataLoader worker is one: OpenMP's threads are not there any more."""
    output = run_python("""
import os, torch
from dynamicvis_geo.models.scan import run_scan
torch.set_num_threads(2)
inputs = [torch.rand(2, 2, 64, 64), torch.rand(2, 2, 64, 64), -torch.rand(64, 16)]
inputs += [torch.rand(2, 2, 64, 16), torch.rand(2, 2, 64, 16)]
inputs += [torch.rand(64), torch.rand(64), torch.rand(2, 64, 64)]
expected = run_scan('c', *inputs)
child = os.fork()
if child == 0:
    same = torch.equal(run_scan('c', *inputs), expected)
    os._exit(0 if same else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
""")
    assert output.strip() == '0'


@needs_c
def test_auto_takes_the_c_kernel_on_the_cpu() -> None:
    assert resolve_scan('auto', 'cpu') == 'c'


def test_auto_takes_pytorch_on_other_devices() -> None:
    assert resolve_scan('auto', 'mps') == 'torch'


def test_kernels_are_listed_with_what_they_lack() -> None:
    kernels = scan.unavailable_kernels()
    assert list(kernels) == list(SCANS[1:])
    assert kernels['torch'] is None
    assert kernels['c'] == C_REASON


def test_unknown_kernel_names_the_choices() -> None:
    with pytest.raises(SpecError, match=r"scan='cuda' is unknown.*auto, torch, c"):
        DynamicVis(img_size=64, scan='cuda')


@needs_c
def test_kernel_of_another_device_is_refused() -> None:
    with pytest.raises(SpecError, match="scan='c' runs on cpu"):
        resolve_scan('c', 'cuda')


@pytest.fixture
def not_built(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    resolve_scan.cache_clear()
    monkeypatch.setattr(scan_c, 'unavailable', lambda: 'it was not built')
    yield
    resolve_scan.cache_clear()


@pytest.mark.usefixtures('not_built')
def test_fallback_warns_once_with_the_remedy() -> None:
    model = DynamicVis(img_size=64).eval()
    image = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        with pytest.warns(UserWarning, match=r'not built.*C compiler'):
            model(image)
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            model(image)


@pytest.mark.usefixtures('not_built')
def test_asking_for_a_kernel_that_is_not_built() -> None:
    with pytest.raises(SpecError, match=r"scan='c' is not available.*C compiler"):
        DynamicVis(img_size=64, scan='c')


@needs_c
def test_model_gives_the_same_by_every_kernel() -> None:
    torch.manual_seed(0)
    model = DynamicVis(img_size=64, scan='torch').eval()
    image = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        expected = model(image)
        for module in model.modules():
            if isinstance(module, MambaMixer):
                module.scan = 'c'
        torch.testing.assert_close(model(image), expected, rtol=1e-4, atol=1e-5)


def test_pytorch_serves_gradients() -> None:
    inputs = make_inputs(1, 1, 4, 3, 2)
    inputs.u.requires_grad_()
    assert scan.selective_scan(*inputs).requires_grad
    assert run_scan('c', *inputs).requires_grad
