"""Gradients of the backbone against those of the official network, written out."""

import re
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from . import parity
from .reference import Reference

pytestmark = pytest.mark.once

#: Names of the cases whose settings are taken, and what is changed of them.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    'default': ('b_img64_b2', {'out_indices': (3,)}),
    'gate': ('b_gate', {}),
    'without token selection': ('b_wo_token_selection', {}),
    'mamba2': ('b_mamba2_interleaved', {}),
    'mamba2, tiled': ('b_mamba2', {}),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    # Many small operations: threads only wait for each other, on a busy machine long.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize('case', CASES)
def test_reference_gives_the_outputs_of_the_official_model(case: str) -> None:
    name, changes = CASES[case]
    model, x = parity.build(name, **changes)
    with torch.inference_mode():
        got = Reference(model)(x)[0]
    expected = list(parity.golden(name).values())[-1]
    expected = parity.golden(name).get('stage3', expected)
    tolerance = parity.tolerance(parity.CASES[name])
    assert parity.relative_error(got, expected) <= tolerance


def gradients(model: nn.Module, x: Tensor, direction: Tensor) -> dict[str, Tensor]:
    """Gradients of the image and of the parameters, for a change of the last map.

    Those of one kind are taken together in all mixers of a stage: single ones may
    cancel out but for rounding.
    """
    x = x.clone().requires_grad_()
    (model(x)[-1] * direction.to(x.dtype)).sum().backward()
    together: dict[str, list[Tensor]] = {'image': [cast(Tensor, x.grad)]}
    for name, parameter in model.named_parameters():
        kind = re.sub(r'(layers\.\d\.1\.)\d+', r'\1*', name)
        together.setdefault(kind, []).append(cast(Tensor, parameter.grad))
    return {kind: torch.stack(parts).double() for kind, parts in together.items()}


@pytest.mark.usefixtures('shallow')
@pytest.mark.filterwarnings('ignore:a forward pass that needs gradients')
@pytest.mark.parametrize('case', CASES)
def test_gradients_are_the_official_ones(case: str) -> None:
    name, changes = CASES[case]
    model, x = parity.build(name, **changes)
    direction = parity.sequence('direction', (len(x), 768, 2, 2))
    exact = gradients(Reference(model).double(), x.double(), direction)
    plain = gradients(Reference(model), x, direction)
    ours = gradients(model, x, direction)
    assert ours.keys() == exact.keys()
    for key, expected in exact.items():
        rounding = parity.relative_error(plain[key], expected)
        error = parity.relative_error(ours[key], expected)
        assert error <= max(1e-5, 10 * rounding), key
